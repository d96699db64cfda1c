"""pytest tests/test_missing.py: what is not there is said at once, all of it, with the shortest way to each; and what is there is found.

Behaviour-checked: a fresh clone, names with a slip in them, a hub that is asked or must not be, run folders in place of best.pt, and
a model that is loaded from another working directory.
"""

import os
import pathlib
import shutil
import types

import huggingface_hub

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

import core
import demo
import eval_gated
import pretrain_qformer
import train_blip_caption
import train_cir
import train_gated
from engine import checkpoints, errors, files, loop, published, runfolder
from engine.errors import DataError
from show import sharing
from tools import faithfulness, make_tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT = "Salesforce/blip2-opt-2.7b"
SHORT = ["--epochs", "1", "--batch-size", "16", "--workers", "0", "--precision", "no"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty working directory and project, offline; anything heavy fails."""
    def heavy(*args, **kwargs):
        raise AssertionError("something heavy was begun")

    for module in (published, files):
        monkeypatch.setattr(module, "PROJECT", tmp_path, raising=False)
    monkeypatch.setattr(published, "TINY", tmp_path / "models/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(published, "hub_answers", lambda: False)
    monkeypatch.setattr(core.Blip2OPTGated, "build", heavy)
    monkeypatch.setattr(train_gated, "loop", types.SimpleNamespace(**{**vars(loop), "make_accelerator": heavy}))  # of this stage alone
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told(sample, capsys):
    """Function: main and its flags -> the error, whose form is the same for all: one that is indented below its first line."""
    def run(main, *argv):
        assert errors.exit_code(main, [*argv]) == 2
        text = capsys.readouterr().err
        text = text[text.index("error: "):].rstrip("\n").replace(str(sample), "sample")
        first, *below = text.split("\n")
        assert all(line.startswith("  ") for line in below) and "error: " not in text[1:]
        assert all(len(line) <= 110 for line in (first, *below)), text
        return text
    return run


def place(folder, tiny=None, name="blip2-opt-2.7b"):
    """A BLIP-2 in models/, linked."""
    (folder / "models").mkdir(exist_ok=True)
    (folder / "models" / name).symlink_to(tiny[0])


# --- a fresh clone ------------

@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_all_that_is_missing_is_said_at_once(clone, told, more):
    text = told(train_gated.main, "--data", "data/artquest", *more)
    assert text.startswith("error: 3 things are missing:\n  data: data/artquest: ")
    for words in ("python tools/make_sample.py", "image, question, answer", "data/README.md",
                  f"\n  BLIP-2: {DEFAULT} ", "the hub cannot be reached", "--blip2 DIR", "models/blip2-opt-2.7b", "--blip2 tiny",
                  "\n  style classifier: runs/efficientnet-28/best.pt: ", "python efficientnet_pretrain.py", "--efficientnet FILE",
                  "--gating none"):
        assert words in text, words
    assert text.endswith("python tools/make_sample.py, then python train_gated.py --data data/artquest --blip2 tiny")
    assert not (clone / "runs").exists()


def test_only_what_is_missing_is_said(clone, sample, tiny, told):
    text = told(train_gated.main, "--data", str(sample))
    assert "make_sample" not in text and "BLIP-2: " in text and "style classifier: " in text
    place(clone, tiny)
    text = told(train_gated.main, "--data", str(sample), "--images", str(sample))
    assert text.startswith("error: style classifier: runs/efficientnet-28/best.pt") and "BLIP-2:" not in text
    text = told(train_gated.main, "--data", "nothing", "--gating", "none")
    assert text.startswith("error: data: nothing: ") and "style classifier" not in text
    text = told(train_gated.main, "--data", "nothing", "--gating", "none", "--style", "efficientnet", "--qformer", "none.pth")
    assert "style classifier: " in text and "Q-Former: none.pth" in text
    assert "2 things" in told(train_gated.main, "--data", str(sample), "--efficientnet", "e.pt", "--qformer", "q.pt")


def test_where_all_is_there_nothing_is_said(clone, sample, tiny):
    def missing(*more):
        return train_gated.missing(train_gated.get_args(["--data", str(sample), *more]))
    assert missing("--blip2", tiny[0], "--efficientnet", tiny[1]) == {}
    place(clone, tiny)
    (clone / "runs/efficientnet-28").mkdir(parents=True)
    shutil.copy(tiny[1], clone / "runs/efficientnet-28/best.pt")
    assert missing() == {} and missing("--efficientnet", "runs/efficientnet-28") == {}
    assert missing("--data", str(sample / "train.csv")) == {}
    shutil.copytree(tiny[0], clone / "models/tiny/blip2")
    assert list(missing("--blip2", "tiny")) == ["BLIP-2"] and missing("--blip2", "tiny", "--efficientnet", tiny[1]) == {}
    shutil.copy(tiny[1], clone / "models/tiny/efficientnet-28.pt")
    assert missing("--blip2", "tiny") == {}


def test_tables_that_are_missing(clone, sample, told):
    (clone / "data").mkdir()
    for name in "abcdef":
        (clone / "data" / name).touch()
    text = told(train_gated.main, "--data", "data", "--gating", "none")
    assert "no train.csv and no val.csv in it, only a, b, c, d and 2 more" in text
    shutil.copy(sample / "train.csv", clone / "data/train.csv")
    text = told(train_gated.main, "--data", "data", "--gating", "none")
    assert "data: no val.csv in it" in text and "a tenth is held out" in text


def test_tiny_that_was_deleted(clone, sample, told):
    text = told(train_gated.main, "--data", str(sample), "--blip2", "tiny")
    assert "models/tiny/blip2 and models/tiny/efficientnet-28.pt: missing" in text and "git checkout -- models/tiny" in text
    assert "things" not in text and "shortest" not in text


def test_check_data_says_it_too(clone, sample, capsys):
    assert train_gated.main(["--data", str(sample), "--check-data", "--workers", "0"]) == 1
    text = capsys.readouterr().out
    assert "--- train" in text and "--- val" in text and text.endswith("training would fail\n")
    assert f"  BLIP-2: {DEFAULT}" in text and "  style classifier: " in text and "tokens not checked" not in text
    assert train_gated.main(["--data", "nothing", "--check-data", "--gating", "none"]) == 1
    text = capsys.readouterr().out
    assert "2 things are missing" in text and "make_sample.py" in text and "--- train" not in text


def test_check_data_where_all_is_there(clone, sample, tiny, capsys):
    argv = ["--data", str(sample), "--check-data", "--workers", "0", "--blip2", tiny[0], "--efficientnet", tiny[1]]
    assert train_gated.main(argv) == 0
    text = capsys.readouterr().out
    assert "error" not in text and "missing" not in text and "prompt | target" in text


# --- names with a slip in them ------------

@pytest.mark.parametrize("name, meant", [
    ("tinny", "tiny"), ("Tiny", "tiny"), ("models/blip2-opt-2.7", f"models/blip2-opt or {DEFAULT}"),
    ("Salesforce/blip2-opt-2.7", f"{DEFAULT} or models/blip2-opt"), ("blip2_opt", "models/blip2-opt"), ("models/tin", "tiny")])
def test_a_slip_is_told_with_what_was_meant(clone, sample, tiny, told, name, meant):
    place(clone, tiny, "blip2-opt")
    found = told(train_gated.main, "--data", str(sample), "--blip2", name).split("did you mean ")[1].split("?")[0]
    assert set(found.split(" or ")) == set(meant.split(" or "))


def test_a_slip_of_tiny_needs_no_classifier(clone, sample, told):
    text = told(train_gated.main, "--data", str(sample), "--blip2", "tinny")
    assert text.startswith("error: BLIP-2: 'tinny' ") and "style classifier" not in text
    text = told(train_gated.main, "--data", str(sample), "--blip2", "tinny", "--efficientnet", "none.pt")
    assert "style classifier: none.pt" in text


def test_a_folder_called_like_tiny_needs_one(clone, sample, tiny, told):
    place(clone, tiny, "tiny2")
    assert told(train_gated.main, "--data", str(sample), "--blip2", "models/tiny2").startswith("error: style classifier: ")


def test_a_name_like_no_other(clone, sample, tiny, told):
    place(clone, tiny, "mine")
    text = told(train_gated.main, "--data", str(sample), "--gating", "none", "--blip2", "models/nothing")
    assert "no such folder: 'models/nothing'\n" in text and "did you mean" not in text and "models/mine" in text


@pytest.mark.parametrize("main, flag, default, data", [
    (train_blip_caption.main, "--blip", "Salesforce/blip-image-captioning-base", "nothing"),
    (train_cir.main, "--blip2", "Salesforce/blip2-itm-vit-g", "nothing"),
    (pretrain_qformer.main, "--blip2", "Salesforce/blip2-itm-vit-g", "drawn=nothing")])
def test_the_other_stages_say_it_too(clone, told, main, flag, default, data):
    text = told(main, "--data", data)
    assert f": {default} is not on this machine" in text and f"{flag} tiny" in text and f"{flag} DIR" in text
    assert f"models/{default.split('/')[1]}" in text
    assert "did you mean tiny?" in told(main, "--data", data, flag, "tinny")
    assert f"did you mean {default}?" in told(main, "--data", data, flag, default[:-1])


def test_the_other_stages_say_how_their_data_are_drawn(clone, tiny, told):
    (clone / "models/tiny").mkdir(parents=True)
    for part in ("blip", "blip2-itm"):
        (clone / "models/tiny" / part).symlink_to(tiny[0])
    for main, flag, data, command in ((train_blip_caption.main, "--blip", "nothing", "make_sample.py "),
                                      (train_cir.main, "--blip2", "nothing", "make_sample.py --cirr"),
                                      (pretrain_qformer.main, "--blip2", "drawn=nothing", "make_sample.py ")):
        assert errors.exit_code(main, ["--data", data, flag, "tiny"]) == 2
        with pytest.raises(DataError, match=f"nothing.*python tools/{command}"):
            main(["--data", data, flag, "tiny"])


# --- the hub ------------

def asked(monkeypatch, answer):
    """The hub is there, and answers so -> list of the names that it is asked for."""
    names = []

    def file_exists(name, file):
        names.append(name)
        if isinstance(answer, Exception):
            raise answer
        return answer
    monkeypatch.setattr(published, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "file_exists", file_exists)
    return names


def test_what_the_hub_has_is_not_missing(clone, monkeypatch):
    names = asked(monkeypatch, True)
    assert published.missing_model("Salesforce/blip2-opt-6.7b", "blip2") == [] and names == ["Salesforce/blip2-opt-6.7b"]
    asked(monkeypatch, HfHubHTTPError.__new__(HfHubHTTPError))  # 500: it is for the loader to say
    assert published.missing_model(DEFAULT, "blip2") == []


def test_what_the_hub_does_not_have(clone, monkeypatch):
    asked(monkeypatch, False)
    assert "the hub has no such model" in published.missing_model(DEFAULT[:-1], "blip2")[0]
    asked(monkeypatch, OSError("the proxy leads nowhere"))
    assert "the hub cannot be reached" in published.missing_model(DEFAULT, "blip2")[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in published.missing_model(DEFAULT, "blip2")[0]


@pytest.mark.parametrize("name", ["tinny", "models/blip2", "./a/b", "../blip2", "a/b/c", "/no/such", "runs/x", "owner/with space"])
def test_the_hub_is_not_asked_for_a_path(clone, monkeypatch, name):
    names = asked(monkeypatch, True)
    assert published.missing_model(name, "blip2") and names == []
    with pytest.raises(DataError, match="none could be fetched"):
        published.load_blip2(name)


def test_what_is_in_the_hubs_cache_is_not_missing(clone, monkeypatch):
    cached = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "there" if file in cached else None)
    assert published.missing_model(DEFAULT, "blip2")
    cached.append("config.json")  # alone it is of a download that never came to the weights
    assert published.missing_model(DEFAULT, "blip2")
    cached.append("model.safetensors.index.json")
    assert published.missing_model(DEFAULT, "blip2") == []


# --- a run's folder in place of its best.pt ------------

STAGES = {
    "eval_gated": lambda place: eval_gated.main(["--checkpoint", place]),
    "load_gated": lambda place: core.load_gated(place),
    "faithfulness": lambda place: faithfulness.load(place),
    "captions": lambda place: train_blip_caption.main(["--caption", "p.png", "--checkpoint", place]),
    "captioner": lambda place: demo.load_captioner(place),
    "retrieval": lambda place: train_cir.main(["--data", "x", "--checkpoint", place]),
    "finder": lambda place: demo.load_finder(place, "x"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_a_run_folder(stage, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(next((sample / "images").iterdir()), "p.png")
    (tmp_path / "runs/demo").mkdir(parents=True)
    opened = []

    def load(path, needs=()):
        opened.append(str(path))
        raise DataError("enough")
    monkeypatch.setattr(checkpoints, "load_checkpoint", load)
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/demo/best.pt").touch()
    for place in ("runs/demo", "runs/demo/", "runs/demo/best.pt"):
        with pytest.raises(DataError, match="enough"):
            STAGES[stage](place)
    assert opened == ["runs/demo/best.pt"] * 3
    with pytest.raises(DataError) as none:
        STAGES[stage]("runs/other")
    assert str(none.value).startswith("runs/other: no best.pt in this folder (there is one in runs/demo): give the folder of a run")
    if stage != "captioner":  # where it may be an id on the hub
        with pytest.raises(DataError, match="runs/nothing: no such checkpoint: give the folder of a run .* best.pt"):
            STAGES[stage]("runs/nothing")


# --- from another working directory ------------

@pytest.fixture(scope="module")
def project(few, tmp_path_factory):
    """A copy of the project with models/blip2-opt-2.7b, a classifier and a run that was trained with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    for file in [ROOT / "requirements.txt", *(file for room in (".", "data", "engine") for file in ROOT.glob(f"{room}/*.py"))]:
        (folder / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, folder / file.relative_to(ROOT))
    blip2, net = make_tiny.save_random(folder / "models/new")
    shutil.move(blip2, folder / "models/blip2-opt-2.7b")
    (folder / "runs/efficientnet-28").mkdir(parents=True)
    shutil.move(net, folder / "runs/efficientnet-28/best.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(runfolder, "draw_curves", lambda *args: None)
        for out, more in (("plain", []), ("named", ["--blip2", "models/blip2-opt-2.7b", "--qformer", "models/blip2-opt-2.7b",
                                                    "--efficientnet", "runs/efficientnet-28"])):
            assert not train_gated.main(["--data", str(few), *SHORT, "--out", f"runs/{out}", *more])
    return folder


def test_load_gated_from_another_folder(project, sample, tmp_path, forker):
    picture = str(next((sample / "images").iterdir()))
    code = (f"import sys; sys.path.insert(0, {str(project)!r}); import core\n"
            f"for place in ({str(project / 'runs/plain')!r}, 'runs/plain', {str(project / 'runs/named')!r}):\n"
            "    model, processor = core.load_gated(place)\n"
            f"    print('answers:', model.predict_answers(processor({picture!r}), ['What style is this painting?']))")
    done, = forker.run(["-c", code], cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stdout.count("answers: [") == 3, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_the_working_directory_goes_first(project, tmp_path, monkeypatch):
    for module in (files, published):
        monkeypatch.setattr(module, "PROJECT", project)
    monkeypatch.chdir(tmp_path)
    assert files.located("runs/plain") == str(project / "runs/plain")
    assert published.in_models(DEFAULT) == str(project / "models/blip2-opt-2.7b")
    for folder in ("runs/plain", "models/blip2-opt-2.7b"):
        (tmp_path / folder).mkdir(parents=True)
    assert files.located("runs/plain") == "runs/plain" and files.located("/no/such") == "/no/such"
    assert published.in_models(DEFAULT) == "models/blip2-opt-2.7b" and published.in_models("no/such") == "no/such"


def test_what_lies_beside_the_checkpoint_lies_in_the_run_folder(project, sample, tmp_path, monkeypatch):
    for module in (files, published):
        monkeypatch.setattr(module, "PROJECT", project)
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", "runs/plain", "--no-baselines", "--beams", "1", "--max-new-tokens", "2", "--workers", "0", "--maps", "1",
            "--report", "page.html"]
    assert not eval_gated.main(argv)
    assert (project / "runs/plain/maps/001.png").is_file() and sorted(p.name for p in tmp_path.iterdir()) == ["page.html"]
    assert not (project / "runs/maps").exists()
    assert "optimizer step" in (tmp_path / "page.html").read_text(encoding="utf-8")  # of the curves


def test_an_export_finds_its_base_in_the_project(project, tmp_path, monkeypatch):
    for module in (files, published):
        monkeypatch.setattr(module, "PROJECT", project)
    monkeypatch.chdir(tmp_path)
    assert sharing.base_model("models/blip2-opt-2.7b", "x")["kind"] == "folder"
