"""What README.md, data/README.md, the pages of docs/, their Chinese pages and the scripts' docstrings tell people to type.

Every command parses, the two languages tell the same ones, and those of the indented blocks are run in the order of the page, on
small stand-ins for what a reader would have (data, published weights), only shortened by the flags of SHORTER, and one gate map drawn.
"""

import ast
import io
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import tarfile

import pytest
import torch
from PIL import Image

import demo
import efficientnet_pretrain
import eval_gated
import metrics
import pretrain_qformer
import pretrain_stage2
import train_blip_caption
import train_cir
import train_gated
from engine import errors, galleries, loop
from test_cirr import circo
from tools import assemble, bench, compare_gated, faithfulness, make_tiny, sample_cirr, steering

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {"README.md": "README.zh-CN.md", "data/README.md": "data/README.zh-CN.md", "docs/faq.md": "docs/faq.zh-CN.md",
         "docs/small.md": "docs/small.zh-CN.md"}
ALONE = ("docs/train_gated.md", "docs/eval_gated.md", "docs/efficientnet_pretrain.md", "docs/train_blip_caption.md", "docs/train_cir.md",
         "docs/pretrain_qformer.md", "docs/results.md", "docs/speed.md", "docs/stages.zh-CN.md")  # in one language
ALL = ("README.md", *ALONE, *list(PAGES)[1:], *PAGES.values())  # as they are run: what faq.md evaluates the stages' pages have trained
ELSEWHERE_READ = ("docs/recipes.md", "docs/design.md")  # test_recipes.py applies the one; the other has no command
SCRIPTS = {"train_gated.py": train_gated, "eval_gated.py": eval_gated, "tools/compare_gated.py": compare_gated,
           "train_cir.py": train_cir,
           "efficientnet_pretrain.py": efficientnet_pretrain, "train_blip_caption.py": train_blip_caption, "metrics.py": metrics,
           "pretrain_qformer.py": pretrain_qformer, "tools/bench.py": bench, "tools/faithfulness.py": faithfulness,
           "demo.py": demo, "tools/steering.py": steering, "pretrain_stage2.py": pretrain_stage2, "tools/assemble.py": assemble,
           "tools/make_tiny.py": make_tiny}
# what the pages leave out of a command that they name in passing
LEFT_OUT = {"eval_gated.py": ["--checkpoint", "x"], "train_gated.py": ["--data", "x"], "train_cir.py": ["--data", "x"],
            "train_blip_caption.py": ["--data", "x"], "efficientnet_pretrain.py": ["--data", "x"],
            "metrics.py": ["--references", "x", "--predictions", "x"],
            "pretrain_qformer.py": ["--data", "x=y"], "pretrain_stage2.py": ["--data", "x=y"], "tools/make_tiny.py": ["--out", "x"]}
SHORTER = {**{f"{name}.py": ["--epochs", "1", "--batch-size", size] for name, size in (  # the largest batch is rehearsed first
               ("train_gated", "4"), ("train_blip_caption", "4"), ("train_cir", "8"), ("pretrain_qformer", "40"),
               ("pretrain_stage2", "8"))},
           "efficientnet_pretrain.py": ["--epochs", "1", "--size", "32", "--batch-size", "8"]}
WRITTEN = ("runs/gated/test.json", "runs/qformer/hf/config.json", "runs/lavis/hf/config.json", "submission/recall_submission.json",
           "runs/blip/test.json", "runs/cir/search.html")
# test_bench.py (minutes), test_sample.py (writes into the project), test_assemble.py (parts of other models)
ELSEWHERE = {"tools/bench.py", "tools/make_sample.py", "tools/assemble.py"}
MEASURED = {"docs/results.md"}  # its commands take an hour: parsed here, and run in small by test_scripts.py's test_compare_gated


def text_of(page):
    """A page, or the docstring of a script, whose indentation Python 3.13 drops from __doc__."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text if page.endswith(".md") else ast.get_docstring(ast.parse(text), clean=False)


def texts_of(page):
    """The indented blocks and the `inline` texts of a page, one command each, without comments; (is it of a block, text)."""
    for line in text_of(page).replace("\\\n", " ").splitlines():
        inline = [] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        yield from ((line.startswith("    "), re.sub(r"\s+#.*", "", text).strip())
                    for text in ([line] if line.startswith("    ") else inline))


def commands(page, blocks=False):
    """[(script, its arguments)] of what is typed in a page, each once; blocks: those of its indented blocks alone."""
    found = {}
    for in_block, text in texts_of(page):
        typed = re.match(r"(?:[A-Z_]+=\S+ )?(python|accelerate launch)? ?((?:tools/)?\w+\.py)(?: (?=[-\w\"])(.*))?$", text)
        if typed and (in_block or not blocks) and (typed[1] or not in_block):
            found[typed[2], tuple(shlex.split(typed[3] or ""))] = None
    return list(found)


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_tell_the_same(page):
    english, chinese = (set(commands(name)) for name in (page, PAGES[page]))
    assert len(english) >= 5 and english <= chinese
    if page == "README.md":
        assert chinese == english


def test_no_page_is_left_out():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md", "README.zh-CN.md"} <= {*ALL, *ELSEWHERE_READ}


@pytest.mark.parametrize("page", [*ALL, *ELSEWHERE_READ])
def test_a_page_can_be_read_in_one_go(page):
    """README in a minute or two; lines of text that a screen holds; Chinese characters take two columns."""
    lines = text_of(page).splitlines()
    assert len(lines) <= (150 if page in ("README.md", "README.zh-CN.md") else 240 if page.startswith("data/") else 200)
    if page == "README.md":
        assert len(text_of(page).split()) <= 1500
        assert all(len(line) <= 140 for line in lines if not line.startswith(("|", "![")))


@pytest.mark.parametrize("page", [*ALL, *SCRIPTS])
def test_every_command_parses(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("")
    found = commands(page)
    assert found
    for script, argv in found:
        if script in ("test_gated_fusion.py", "core.py", "tools/make_sample.py"):  # without get_args
            continue
        for place in argv if script == "demo.py" else ():  # it looks for its files at once
            folder = pathlib.Path(place).parent if place.endswith(".html") else pathlib.Path(place)
            folder.mkdir(parents=True, exist_ok=True)
            if place.endswith(".html"):
                pathlib.Path(place).touch()
        missing = LEFT_OUT.get(script, [])
        complete = set(missing[:1]) & set(argv) or {"--search", "--caption", "--convert"} & set(argv)
        SCRIPTS[script].get_args(["1" if one == "S" else one for one in argv] + ([] if complete else missing))


@pytest.mark.parametrize("page", ALL)
def test_every_flag_is_one_of_ours(page):
    """Flags stand alone, too, in tables and sentences."""
    known = set()
    for path in {*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")}:
        known |= set(re.findall(r"add_argument\(\s*\"(--[a-z0-9-]+)\"", path.read_text(encoding="utf-8")))
    known |= set(re.findall(r"--env", (ROOT / "core.py").read_text(encoding="utf-8")))
    others = r"^(hf|modelscope|pip|pytest|export|GOLDEN|KILLS|accelerate|make|source)\b"
    named = {flag for _, text in texts_of(page) if not re.match(others, text) for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)}
    assert len(named) > 4 and named - known - {"--nproc_per_node", "--help"} == set()


def headings(path):
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("page", ALL)
def test_every_file_and_target_is_there(page):
    text = text_of(page)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)) <= set(targets)
    links = [link for link in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text) if "://" not in link[0]]
    assert links
    for name, heading in links:
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), name
        assert not heading or heading in headings(target), (name, heading)
    for script, _ in commands(page):
        assert (ROOT / script).is_file(), script


def test_every_command_of_the_makefile_parses():
    done = subprocess.run(["make", "-n", "-B", "demo-all"], cwd=ROOT, capture_output=True, text=True)
    typed = re.findall(r"\.venv/bin/python ((?:tools/)?\w+\.py)(.*)", done.stdout.replace("\\\n", " "))
    assert done.returncode == 0 and len(typed) >= 9, done.stderr
    for script, argv in typed:
        if script != "tools/make_sample.py":
            SCRIPTS[script].get_args(shlex.split(argv))


# --- the blocks, run ------------

def save_retrieval(captions, folder):
    """A random retrieval model with as many queries and as wide heads as the published one, so that a start from BERT fits it, and
    one layer: one of its trainings reads 332 tar files."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval
    shutil.move(make_tiny.save_random_retrieval("models/new", captions), folder)
    config = Blip2Config.from_pretrained(folder)
    config.num_query_tokens, config.image_text_hidden_size, config.qformer_config.num_hidden_layers = 32, 256, 1
    Blip2ForImageTextRetrieval(config).save_pretrained(folder)


def save_bert(retrieval, folder, layers=3):
    """A random BERT of the sizes of save_random_retrieval's Q-Former, whose words it has but for [DEC], as the published two."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast
    pathlib.Path(folder).mkdir()
    shutil.copy(pathlib.Path(retrieval, "vocab.txt"), folder)
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=make_tiny.WIDTH, num_hidden_layers=layers, num_attention_heads=8,
                               intermediate_size=2 * make_tiny.WIDTH, max_position_embeddings=64)).save_pretrained(folder)


def published_models(tiny):
    """models/ and runs/efficientnet-28 as a reader has them, with small random weights under the published names."""
    import timm
    from safetensors.torch import save_file
    captions = list(json.loads(pathlib.Path("data/artquest/train_captions.json").read_text(encoding="utf-8")).values())
    shutil.copytree(tiny[0], "models/blip2-opt-2.7b")
    loop.seed_everything(0)
    shutil.move(make_tiny.save_random_captioner("models/new", captions), "models/blip-image-captioning-base")
    save_retrieval(captions, "models/blip2-itm-vit-g")
    save_bert("models/blip2-itm-vit-g", "models/bert-base-uncased", layers=1)
    pathlib.Path("models/efficientnet_b3.ra2_in1k").mkdir()
    save_file(timm.create_model("efficientnet_b3").state_dict(), "models/efficientnet_b3.ra2_in1k/model.safetensors")
    classifier(tiny)


def classifier(tiny):
    """The style classifier where train_gated.py looks for it."""
    pathlib.Path("runs/efficientnet-28").mkdir(parents=True)
    shutil.copy(tiny[1], "runs/efficientnet-28/best.pt")


def lavis_file():
    """blip2_pretrained.pth with the weights of models/blip2-itm-vit-g."""
    from test_qformer import save_lavis
    args = pretrain_qformer.get_args(["--data", "x=y", "--init", "models/blip2-itm-vit-g"])
    save_lavis(pretrain_qformer.load_model(args, torch.float32, lambda *words: None), "blip2_pretrained.pth")


def data_sets(few):
    """data/, wikiart, shards/ and the loose pictures that the pages name."""
    shutil.copytree(few, "data/artquest")
    sample_cirr.make(pathlib.Path("data/cirr"), 0, 24, pytest.fail)
    circo(pathlib.Path("data/circo"))
    here = pathlib.Path.cwd()
    for link in ("data/captions", "wikiart"):
        pathlib.Path(link).symlink_to(here / "data/artquest")
    names = sorted(p.name for p in pathlib.Path("data/artquest/images").iterdir())
    pairs = [{"image": name, "caption": "a boat"} for name in names]
    for place, files in (("data/coco", {"coco_karpathy_train": pairs[4:], "coco_karpathy_val": pairs[:4]}),
                         ("data/vg", {"vg_caption": pairs[4:]})):
        pathlib.Path(place).mkdir()
        pathlib.Path(place, "images").symlink_to(here / "data/artquest/images")
        for name, content in files.items():
            pathlib.Path(place, name + ".json").write_text(json.dumps(content))
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "JPEG")
    pathlib.Path("shards").mkdir()
    for number in range(332):
        with tarfile.open(f"shards/{number:03}.tar", "w") as tar:
            for name, content in ((f"{number}.jpg", file.getvalue()), (f"{number}.txt", b"a red square")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    for place in ("folder", "photos"):
        pathlib.Path(place).symlink_to(here / "data/artquest/images")
    for name in ("a.jpg", "photo.jpg"):
        shutil.copy(here / "data/artquest/images" / names[0], name)
    pathlib.Path("refs.json").write_text(json.dumps({"1": ["a boat on the water"]}))
    pathlib.Path("preds.json").write_text(json.dumps({"1": "a boat"}))


@pytest.fixture
def world(tmp_path, monkeypatch, few, tiny, no_curves):
    """A folder with everything that the commands of the pages read; the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(galleries, "MAPS", 1)  # of --gate-maps, a second each
    data_sets(few)
    published_models(tiny)
    lavis_file()


def run_one(script, argv):
    """One command as main() runs it, on one processor -> its exit code. A training starts in an empty run folder."""
    module, argv = SCRIPTS[script], [*argv]
    shown = {"--check-data", "--checkpoint", "--convert", "--caption", "--search"} & set(argv)
    if script in SHORTER and not shown:
        argv += SHORTER[script] + ["--workers", "0"]
        shutil.rmtree(module.get_args(argv).out, ignore_errors=True)
    return errors.exit_code(module.main, argv)


def test_the_blocks_run(world, tiny, capsys):
    told, written = {}, set()
    for page in [page for page in ALL if page not in MEASURED]:
        for script, argv in commands(page, blocks=True):
            if script in ELSEWHERE or (script, argv) in told:
                continue
            code = run_one(script, argv)
            told[script, argv] = capsys.readouterr()
            written |= {path for path in WRITTEN if pathlib.Path(path).is_file()}  # the next training may empty the folder
            if "--pretrained" in argv:  # timm's own weights come from the hub, which is not there
                assert code == 2 and "give a file of them as --init FILE" in told[script, argv].err.splitlines()[-1]
                classifier(tiny)
            else:
                assert not code, (script, argv, told[script, argv].err[-2000:])
    assert len(told) >= 19
    assert written == set(WRITTEN)
