"""pytest tests/test_demo.py: what the demo computes, what it shows of hostile texts, and the whole page in a real browser.

Behaviour-checked: both sides against the model's own methods; every HTML string parsed; in the browser: all four tabs, upload,
question, style, maps, both languages, a phone, no error in its console, no request to another address. That test is skipped without
gradio, playwright or chromium.
"""

import base64
import html.parser
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

import core
import demo
from data import rows, tables
from engine import checkpoints, published
from engine.errors import DataError

ROOT = pathlib.Path(demo.__file__).parent
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)> ${alert(3)} {{7*7}} ../../etc/passwd &lt;b&gt;"""
HOSTILE_NAME = """..\\"'><img src=x onerror=alert(4)>${alert(5)} {{7*7}}%2e%2e%2f.png"""
HOSTILE_ANSWERS = [HOSTILE, HOSTILE + "2", HOSTILE_NAME]
# a model that was taught hostile texts, for a process of its own; its probabilities are the model's
TAUGHT = f"""
import sys
import core, demo
core.Blip2OPTGated.predict_answers = lambda self, images, questions, best=0, **more: [
    {HOSTILE_ANSWERS!r} if best else {HOSTILE!r} for _ in questions]
demo.main(sys.argv[1:])
"""
QUESTION = "Which style is this painting?"
TAGS = {"div", "p", "h1", "h3", "h4", "b", "i", "span", "figure", "figcaption", "img", "br", "iframe", "a"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_BROWSER = not (CHROMIUM and importlib.util.find_spec("gradio") and importlib.util.find_spec("playwright"))


def open_gates(model):
    """Gates that change much, and by style: the last layers drawn at random."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for gate in model.gates:
            for last in (gate.key, gate.value, gate.shift):
                last.weight.copy_(torch.randn(last.weight.shape, generator=generator))
    return model


@pytest.fixture
def fresh(build):
    return demo.Session(build())


@pytest.fixture
def opened(build):
    return demo.Session(open_gates(build()))


@pytest.fixture
def picture(tmp_path):
    """Path of a wide picture of noise."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return str(path)


def same(a, b):
    """Two sides of answers_of, to the bit."""
    return np.array_equal(a["attention"], b["attention"]) and all(a[name] == b[name] for name in ("answer", "confidence", "candidates"))


class Read(html.parser.HTMLParser):
    """What a browser makes of a string: its tags with attributes, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def harmless(source):
    """Its text, once it is clear that it holds the demo's own tags alone and none that loads or runs anything."""
    read = Read(source)
    for tag, attributes in read.tags:
        assert tag in TAGS, tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert attributes.get("href", "#about-gate") in {f"#about-{name}" for name in demo.ABOUT}
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert tag != "iframe" or attributes["sandbox"] == ""
    return read.text


# --- answers ------------

def test_fresh_gates_leave_all_cards_equal_whatever_the_style(fresh, picture):
    found = demo.answers_of(fresh, picture, QUESTION, ["Baroque"])
    assert same(found["gated"], found["closed"])
    (style, other), = found["others"]
    assert style == "Baroque" and same(other, found["closed"])


def test_another_style_is_a_card_more_and_the_two_others_stay(opened, picture):
    own = demo.answers_of(opened, picture, QUESTION)
    more = demo.answers_of(opened, picture, QUESTION, ["Baroque", "Cubism"])
    assert own["others"] == [] and [style for style, _ in more["others"]] == ["Baroque", "Cubism"]
    assert same(own["gated"], more["gated"]) and same(own["closed"], more["closed"]) and own["seen"] == more["seen"]
    cards = [own["gated"], own["closed"], *(side for _, side in more["others"])]
    assert not any(same(one, other) for n, one in enumerate(cards) for other in cards[n + 1:])
    assert not np.allclose(cards[0]["attention"], cards[1]["attention"], rtol=1e-3)


def test_both_sides_are_what_the_model_says(opened, picture):
    model, found = opened.model, demo.answers_of(opened, picture, QUESTION)
    features = model.image_features(rows.picture_tensor(picture, model.image_size)[None])
    for side, gated in (("gated", True), ("closed", False)):
        texts, shares = zip(*found[side]["candidates"])
        assert found[side]["answer"] == texts[0] == model.predict_answers(None, [QUESTION], **features, gated=gated)[0]
        assert 1 < len(set(texts)) == len(texts) <= demo.BEST
        sums = model.score_answers([QUESTION], list(texts), **features, gated=gated)[0]
        assert list(shares) == pytest.approx(sums.exp().tolist(), rel=1e-4)
        mean = model.confidence([QUESTION], [found[side]["answer"]], **features, gated=gated).item()
        assert np.log(found[side]["confidence"]) == pytest.approx(mean, rel=1e-4)
        assert found[side]["attention"].sum() + found[side]["on_cls"] == pytest.approx(1, abs=1e-4)


def test_the_share_0_is_the_own_style_and_1_the_other_to_the_bit(opened, picture):
    features = demo.look(opened, picture)["features"]
    own, net = features["style_feature"], opened.model.efficientnet
    other = demo.prototype(net, "Baroque", [], own, opened.model.image_size)
    assert not torch.equal(own, other)
    assert demo.style_feature(opened, features, "", 1.0) is own and demo.style_feature(opened, features, "Baroque", 0.0) is own
    assert torch.equal(demo.mix_features(own, other, 0.0), own)
    assert torch.equal(demo.style_feature(opened, features, "Baroque", 1.0), other)
    half = demo.style_feature(opened, features, "Baroque", 0.25)
    assert torch.allclose(half, own + 0.25 * (other - own), atol=1e-5)
    with pytest.raises(DataError, match="none of the styles"):
        demo.style_feature(opened, features, HOSTILE, 0.5)


def test_a_style_is_the_mean_of_its_first_eight_pictures(opened, tmp_path):
    net, size, paths = opened.model.efficientnet, opened.model.image_size, []
    for shade in range(9):
        paths.append(str(tmp_path / f"{shade}.png"))
        Image.new("RGB", (40, 30), (25 * shade, 60, 255 - 25 * shade)).save(paths[-1])
    with torch.no_grad():
        each = torch.cat([net(rows.picture_tensor(path, size)[None]) for path in paths])  # [9,F]
    own = each[:1]
    assert torch.allclose(demo.prototype(net, "Cubism", paths, own, size), each[:8].mean(0, keepdim=True), atol=1e-5)
    assert not torch.allclose(each[:8].mean(0), each.mean(0), atol=1e-5)
    opened.examples = {"Cubism": paths[:2]}
    assert opened.styles == ["Cubism"]
    mixed = demo.style_feature(opened, {"style_feature": own}, "Cubism", 1.0)
    assert torch.allclose(mixed, each[:2].mean(0, keepdim=True), atol=1e-5)


def test_without_pictures_a_style_is_its_row_of_weights_as_long_as_the_features(opened):
    net, own = opened.model.efficientnet, torch.randn(3, opened.model.efficientnet.width)
    found = demo.prototype(net, "Baroque", [], own, 112)
    assert found.shape == (1, net.width) and found.norm() == pytest.approx(own.norm(dim=-1).mean().item(), rel=1e-5)
    row = net.net.get_classifier().weight[net.style_names().index("Baroque")]
    assert torch.cosine_similarity(found, row[None]).item() == pytest.approx(1, abs=1e-5)


def test_a_card_is_computed_once_a_picture_question_style_and_share(opened, picture, tmp_path, monkeypatch):
    asked, once = [], demo.side_of

    def counted(state, features, question, gated):
        asked.append((question, gated))
        return once(state, features, question, gated)

    monkeypatch.setattr(demo, "side_of", counted)
    demo.answers_of(opened, picture, QUESTION)
    demo.answers_of(opened, picture, QUESTION, ["Baroque"], 0.5, ["attention"])
    assert asked == [(QUESTION, True), (QUESTION, False), (QUESTION, True)]
    demo.answers_of(opened, picture, QUESTION, ["Baroque"], 1.0)
    assert len(asked) == 4
    demo.answers_of(opened, picture, "How many?")
    assert asked[4:] == [("How many?", True), ("How many?", False)]
    other = tmp_path / "other.png"
    Image.new("RGB", (50, 50), "red").save(other)
    assert not np.array_equal(demo.answers_of(opened, str(other), "How many?")["closed"]["attention"],
                              demo.answers_of(opened, picture, "How many?")["closed"]["attention"])
    assert len(asked) == 10


def test_a_model_without_gates_shows_no_style(build, picture):
    asked = demo.Session(build(gating="none"))
    found = demo.answers_of(asked, picture, QUESTION)
    assert same(found["gated"], found["closed"]) and found["seen"] == [] and asked.styles == []
    assert "without gates" in demo.status(asked, demo.words_of("en"))
    assert harmless(demo.cards_html(found, demo.words_of("en")))


def test_a_question_that_the_model_cannot_read_is_said():
    """Bytes of Chinese letters, [UNK], and words in pieces; what the tokenizers of the tiny models know passes."""
    for part in ("blip2", "blip2-itm"):
        tokenizer = published.load_tokenizer(published.tiny(part))
        share, _ = demo.unread(tokenizer, "\u8fd9\u5e45\u753b\u662f\u4ec0\u4e48\u98ce\u683c\uff1f")
        assert share == 1
        assert demo.unread(tokenizer, "two red boats on the water") == (0, [])
        assert demo.unread(tokenizer, "two red boats \u753b\u753b\u753b")[0] == pytest.approx(3 / 14)
    tokenizer = published.load_tokenizer(published.tiny("blip2"))
    assert demo.unread(tokenizer, QUESTION) == (0, []) == demo.unread(tokenizer, "")
    assert demo.unread(tokenizer, "Which zebra is hidden?") == (0, ["zebra", "hidden"])
    words = demo.words_of("en")
    assert "100 %" in demo.notes_html(1, ["zebra"], words) and "zebra" in demo.notes_html(0.1, ["zebra"], words)
    assert demo.notes_html(0.1, [], words) == ""


def test_the_language_is_the_one_that_the_browser_asks_for_first():
    for header, lang in (("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.9,zh;q=0.8", "en"), ("zh-TW", "zh"), ("fr-FR,zh;q=0.5", "zh"),
                         (None, "en"), ("", "en"), ("fr,de", "en"), ("zh;q=broken,en", "en")):
        assert demo.language_of(header) == lang, header


# --- what is shown ------------

@pytest.fixture
def taught(monkeypatch):
    """A model that was taught hostile texts, see TAUGHT."""
    monkeypatch.setattr(core.Blip2OPTGated, "predict_answers", lambda self, images, questions, **more: [HOSTILE_ANSWERS for _ in questions])


def test_hostile_texts_stay_text_in_every_string(opened, taught, picture, tmp_path):
    words, net = demo.words_of("zh"), opened.model.efficientnet
    net.classes = [f"{HOSTILE}{i}" for i in range(net.num_classes)]
    found = demo.answers_of(opened, picture, HOSTILE, [f"{HOSTILE}1"], 1.0, ["attention", "occlusion"])
    cards, drawn = demo.cards_html(found, words), demo.maps_html(found, words)
    assert HOSTILE in harmless(cards) and HOSTILE_NAME in harmless(cards) and harmless(cards).count(f"{HOSTILE}1") >= 1
    assert not any(tag == "img" for tag, _ in Read(cards).tags) and sum(tag == "img" for tag, _ in Read(drawn).tags) == 4
    assert harmless(drawn)
    assert HOSTILE_NAME in harmless(demo.hits_html([(picture, HOSTILE_NAME, 0.5), (str(tmp_path / "gone.png"), HOSTILE, 0.25)], words))
    assert HOSTILE in harmless(demo.fault_html(HOSTILE)) and HOSTILE in harmless(demo.notes_html(0, [HOSTILE], words))
    assert HOSTILE in harmless(demo.bars_html([(HOSTILE, 0.5)], words))


def test_every_picture_has_a_link_to_what_explains_it(opened, picture):
    words = demo.words_of("en")
    found = demo.answers_of(opened, picture, QUESTION, (), 1.0, ["attention", "occlusion"])
    explained = {attributes["id"] for _, attributes in Read(demo.about_html(words)).tags if "id" in attributes}
    assert explained == {f"about-{name}" for name in demo.ABOUT}
    figures = demo.maps_html(found, words).split("<figure>")[1:]
    links = [[attributes["href"][1:] for _, attributes in Read(figure).tags if "href" in attributes] for figure in figures]
    assert links == [["about-attention"], ["about-attention"], ["about-difference"], ["about-fall"]]
    for source in (demo.cards_html(found, words), demo.intro_html(words)):
        assert {attributes["href"][1:] for _, attributes in Read(source).tags if "href" in attributes} <= explained


def test_a_picture_of_a_hostile_name_that_cannot_be_read_is_told_without_its_folder(opened, tmp_path):
    path = tmp_path / HOSTILE_NAME
    path.write_text("no picture")
    results, fault = demo.guarded(lambda image: demo.answers_of(opened, image, QUESTION), str(path))
    assert results is None and HOSTILE_NAME in harmless(fault) and str(tmp_path) not in fault
    assert "missing" in harmless(demo.guarded(lambda image: demo.look(opened, image), str(tmp_path / "none.png"))[1])
    assert demo.guarded(lambda image: image, "x") == ("x", "")


def test_a_report_is_framed_whole_and_can_run_nothing(tmp_path):
    report = tmp_path / "report.html"
    report.write_text(f'<h1 title="a">{HOSTILE}</h1>', encoding="utf-8")
    frame = [attributes for tag, attributes in Read(demo.report_html(report)).tags if tag == "iframe"]
    assert harmless(demo.report_html(report)) == "" and frame[0]["srcdoc"] == report.read_text()


def test_bars_are_as_long_as_their_shares():
    read = Read(demo.bars_html([("a", 1.0), ("", 0.125)], demo.words_of("en")))
    assert [attributes["style"] for tag, attributes in read.tags if tag == "i"] == ["width:100.00%", "width:12.50%"]
    assert "100.0 %" in read.text and "12.5 %" in read.text and "(nothing)" in read.text


def test_a_map_lies_on_its_place_and_the_picture_keeps_its_shape():
    heat = np.zeros((4, 4))
    heat[1, 3] = 1
    picture = Image.new("RGB", (800, 400), "grey")
    made = np.asarray(demo.overlay(picture, heat, 1.0), dtype=int)
    assert made.shape == (210, 420, 3)
    bright = made.sum(-1) > made.sum(-1).min() + 60
    down, across = bright.nonzero()
    assert 50 <= down.min() <= 54 and 103 <= down.max() <= 106 and 313 <= across.min() <= 317 and across.max() == 419
    assert picture.size == (800, 400)


def test_a_difference_of_zero_is_grey_and_the_signs_are_red_and_blue():
    heat = np.array([[1.0, 0.0], [0.0, -1.0]])
    made = np.asarray(demo.overlay(Image.new("RGB", (100, 100), "white"), heat, 1.0, diverging=True), dtype=int)
    assert np.ptp(made[10, 90]) <= 2
    assert made[10, 10, 0] > made[10, 10, 2] + 60 and made[90, 90, 2] > made[90, 90, 0] + 60


def test_every_label_is_there_in_both_languages():
    en, zh = demo.words_of("en"), demo.words_of("zh")
    assert en.keys() == zh.keys() and en["ask"] == "Ask" and zh["ask"] == "提问"
    for name in en:
        assert en[name].isascii() and (any("\u4e00" <= letter <= "\u9fff" for letter in zh[name]) or name == "nats"), name
        assert en[name].count("{}") == zh[name].count("{}")


def test_while_a_model_loads_there_is_a_picture_to_look_at():
    read = Read(demo.loading_html(demo.words_of("zh")))
    uri, = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))) as figure:
        assert figure.width > 1000 and figure.convert("L").getextrema()[0] < 50
    assert "几秒" in read.text


# --- loading ------------

@pytest.fixture
def run(build, tiny, tmp_path):
    """A run folder whose gates are open."""
    model = open_gates(build())
    places = {"blip2": str(tiny[0]), "efficientnet": str(tiny[1]), "qformer": None, "gating": "film", "styles": model.styles}
    checkpoints.save_checkpoint(tmp_path / "run/best.pt", {
        "stage": "gated", "model_args": places, "state": checkpoints.trainable_state(model), "frozen": checkpoints.fingerprint(model),
        "args": {}})
    return tmp_path / "run"


def test_a_run_is_loaded_with_the_pictures_by_style(run, sample, opened, picture):
    for place in (run, run / "best.pt"):
        asked = demo.load_session(str(place), str(sample))
    assert asked.styles == sorted({row.style for row in rows.read_split(sample, "train")})
    assert all(len(set(paths)) == len(paths) > 1 for paths in asked.examples.values())
    assert same(demo.answers_of(asked, picture, QUESTION)["gated"], demo.answers_of(opened, picture, QUESTION)["gated"])
    assert "example pictures" in demo.status(asked, demo.words_of("en"))


def test_rows_without_a_picture_or_a_style_are_no_examples(run, tmp_path, monkeypatch):
    found = [rows.Row(image, "name", QUESTION, "red", "", style, 2, "train.csv", fault)
             for image, style, fault in (("a.png", "Cubism", ""), ("", "Cubism", "gone"), ("b.png", " ", ""), ("a.png", "Cubism", ""))]
    monkeypatch.setattr(rows, "read_split", lambda *place: found)
    assert demo.load_session(str(run), str(tmp_path)).examples == {"Cubism": ["a.png"]}


def test_without_data_styles_come_from_the_weights_and_the_page_says_so(run, tmp_path):
    asked = demo.load_session(str(run), str(tmp_path / "none"))
    assert len(asked.styles) == 28 and "classifier's weights" in demo.status(asked, demo.words_of("en"))


def test_data_that_is_not_there_or_not_whole(tmp_path, monkeypatch, capsys):
    """What was asked for is refused, what was not is said and left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.csv").write_text("image,question,answer\n")
    for place in ("nowhere", "one.csv"):
        with pytest.raises(DataError, match=f"--data {place}: no such folder"):
            demo.get_args(["--data", place])
    (tmp_path / "data/artquest/images").mkdir(parents=True)
    args = demo.get_args([])
    assert "note: data/artquest: none of train.csv" in capsys.readouterr().err
    assert len(demo.example_rows(args.data)) == 40


def test_what_ships_is_the_default_and_its_answers_are_right(tmp_path, monkeypatch):
    """The gates that ship tell the manner of the test pictures beside them; closed, they do not. Tab Errors makes its page of them."""
    monkeypatch.chdir(tmp_path)
    args = demo.get_args([])
    asked, examples = demo.load_session(args.checkpoint, args.data), demo.example_rows(args.data)
    assert len({row.image for row in examples}) == 8 and len(examples) == 40 and not any(row.fault for row in examples)
    assert [row.style for row in examples[::5]] == sorted({row.style for row in examples})
    page = demo.make_report(asked, examples, tmp_path / "report.html").read_text(encoding="utf-8")
    title = re.search("<title>.*: ([0-9.]+) % exact match, gates closed ([0-9.]+) %, [+]([0-9.]+) ", page)
    gated, closed, gap = map(float, title.groups())
    assert gated >= 75 and closed < 60 and gap == pytest.approx(gated - closed, abs=0.11)
    assert "Gate helped" in page and "no training_log.csv" in page


def test_tab_find_has_a_model_and_pictures_that_ship(tmp_path):
    """The target of most shipped queries is among the first five of 59 pictures; nothing is written beside what ships."""
    shipped, queries = pathlib.Path(published.tiny("cir")), demo.example_queries(None)
    assert len(queries) == demo.EXAMPLES and all(os.path.isfile(path) and text for path, text in queries)
    targets = {one["reference"]: one["target"] for _, one in tables.read_table(shipped / "examples.csv")}
    before = sorted(shipped.rglob("*"))
    find = demo.load_finder(str(shipped), str(shipped / "gallery"), tmp_path / "index")
    found = [[name for _, name, _ in find(path, text)] for path, text in queries]
    hits = sum(targets[os.path.basename(path)] in names[:5] for (path, _), names in zip(queries, found))
    assert hits > len(queries) / 2 and sorted(shipped.rglob("*")) == before
    assert [text for _, text in demo.example_queries(str(shipped / "gallery"))] == [""] * demo.EXAMPLES


def test_examples_are_validation_pictures(sample):
    found = demo.example_rows(str(sample))
    validation = {row.image for row in rows.read_split(sample, "val")}
    pictures = list(dict.fromkeys(row.image for row in found))
    assert len(pictures) == min(demo.EXAMPLES, len(validation)) and set(pictures) <= validation and all(row.question for row in found)
    styles = [next(row.style for row in found if row.image == path) for path in pictures]
    assert len(set(styles)) == min(len(styles), len({row.style for row in rows.read_split(sample, "val")}))


def test_captions_come_from_the_captioner_of_a_folder(tmp_path, picture):
    from tools import make_tiny
    import train_blip_caption
    folder = make_tiny.save_random_captioner(tmp_path)
    model, tokenizer = train_blip_caption.load_blip(folder)
    pixels = rows.picture_tensor(picture, model.config.vision_config.image_size)[None]
    wanted = train_blip_caption.describe(model.eval(), tokenizer, pixels, train_blip_caption.GENERATION)[0]
    assert demo.load_captioner(folder)(picture) == wanted


def test_find_gives_what_the_search_of_train_cir_prints_without_the_reference_itself(sample, tmp_path, capsys):
    from tools import make_tiny
    import train_cir
    base, folder, best = make_tiny.save_random_retrieval(tmp_path), tmp_path / "gallery", str(tmp_path / "cir/best.pt")
    args = train_cir.get_args(["--data", "none", "--blip2", base])
    model = train_cir.load_model(args, torch.float32)
    checkpoints.save_checkpoint(best, {
        "stage": "cir", "state": checkpoints.trainable_state(model), "frozen": checkpoints.fingerprint(model), "precision": "no",
        "model_args": {name: getattr(args, name) for name in train_cir.MODEL_ARGS}})
    folder.mkdir()
    for path in sorted((sample / "images").iterdir())[:15]:
        shutil.copy(path, folder)
    names = sorted(os.listdir(folder))
    text, upload = "show three and paint it in small dots", tmp_path / "upload"
    shutil.copy(folder / names[3], upload)
    hits = demo.load_finder(best, str(folder))(str(upload), text)
    assert len(hits) == 12 and names[3] not in [name for _, name, _ in hits]
    capsys.readouterr()
    train_cir.main(["--checkpoint", best, "--gallery", str(folder), "--image", str(folder / names[3]), "--search", text, "--out",
                    str(tmp_path),
                    "--workers", "0"])
    printed = capsys.readouterr().out
    assert "15 of them indexed before" in printed
    lines = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit() and line.endswith(".jpg")]
    assert [(path, f"{score:.3f}") for path, _, score in hits] == [(path, score) for _, score, path in lines]


def test_places_that_are_not_there_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    for flag in ("--report", "--gallery", "--retrieval"):
        with pytest.raises(DataError, match="no such file or folder"):
            demo.get_args([flag, str(tmp_path / "none")])
    monkeypatch.chdir(tmp_path)
    assert demo.get_args([]).checkpoint == "tiny" and demo.get_args([]).captioner == published.tiny("blip")
    (tmp_path / "runs/gated").mkdir(parents=True)
    (tmp_path / "runs/gated/best.pt").touch()
    assert demo.get_args([]).checkpoint == "runs/gated/best.pt"


def test_installing_gradio_changes_nothing_that_requirements_settle():
    """What gradio demands of a package in requirements.txt holds for every version that our range admits."""
    if not importlib.util.find_spec("gradio"):
        pytest.skip("gradio is not installed")
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    ours = {one.name.lower(): one.specifier for one in map(Requirement, lines)}
    shared = [one for name in ("gradio", "gradio_client", "huggingface_hub") for one in map(Requirement, importlib.metadata.requires(name))
              if one.name.lower() in ours and (one.marker is None or one.marker.evaluate({"extra": ""}))]
    assert {"pillow", "numpy", "pyyaml"} <= {one.name for one in shared}

    def ends(specifier, sign):
        return [Version(one.version) for one in specifier if one.operator == sign]
    for one in shared:
        mine = ours[one.name.lower()]
        assert {part.operator for part in one.specifier} <= {"<", ">="} and {part.operator for part in mine} == {"<", ">="}
        assert all(end >= ends(mine, "<")[0] for end in ends(one.specifier, "<")), f"{one}, ours {mine}"
        assert all(end <= ends(mine, ">=")[0] for end in ends(one.specifier, ">=")), f"{one}, ours {mine}"


def test_without_gradio_one_line_says_what_to_install(tmp_path, monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DataError, match='pip install "gradio'):
        demo.import_gradio(str(tmp_path))
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)


# --- the page ------------

@pytest.fixture
def served(run, sample, tmp_path):
    """The demo as a process of its own, with a model that was taught hostile texts -> its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "-c", TAUGHT, "--checkpoint", str(run), "--data", str(sample), "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path, env={**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0",
                                                                                      "GRADIO_SHARE": "True", "PYTHONPATH": str(ROOT)})
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


class Visit:
    """A page in the browser, and what went wrong in it."""

    def __init__(self, browser, home, **context):
        self.requests, self.errors, self.dialogs = [], [], []
        self.page = page = browser.new_context(**context).new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.response = page.goto(home)
        page.set_default_timeout(20000)
        page.locator("#cards .answer").first.wait_for()  # the first example, without a click

    def text(self, place="#cards"):
        return self.page.locator(f"{place} .demo").text_content()

    def changed(self, before, place="#cards"):
        """The text of a place once it is another than `before`; beside .demo the seconds run while an answer is computed."""
        self.page.wait_for_function("([place, text]) => (document.querySelector(place + ' .demo')?.textContent ?? text) !== text",
                                    arg=[place, before])
        return self.text(place)

    def check(self, home):
        outside = [url for url in self.requests if not url.startswith((home, "data:", "blob:"))]
        assert not outside and not self.errors and not self.dialogs


@pytest.mark.skipif(NO_BROWSER, reason="needs gradio, playwright and chromium")
def test_the_page_in_a_browser(served, taught, run, sample, picture, tmp_path):
    from playwright.sync_api import sync_playwright
    home, upload = f"http://127.0.0.1:{served}/", tmp_path / HOSTILE_NAME
    broken = tmp_path / f"broken {HOSTILE_NAME}"
    shutil.copy(picture, upload)
    broken.write_text("no picture")
    asked, words = demo.load_session(str(run), str(sample)), demo.words_of("en")
    wanted = [demo.answers_of(asked, picture, HOSTILE, styles, 1.0, ["attention"]) for styles in ((), ["Pop Art"])]
    for path in (run / "best.pt", ROOT / "demo.py", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{home}gradio_api/file={path}", timeout=10)
    with pytest.raises(OSError):  # another address of this machine
        socket.create_connection(("127.0.0.2", served), timeout=1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        visit = Visit(browser, home, locale="en-US")
        page, first = visit.page, visit.text()
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        page.locator("#painting input[type=file]").set_input_files(upload)
        page.locator("#painting img").wait_for()
        page.locator("#question textarea").fill(HOSTILE)
        page.click("#ask")
        assert visit.changed(first) == Read(demo.cards_html(wanted[0], words)).text
        page.get_by_label(words["attention_map"]).check()
        page.locator("#maps img").nth(2).wait_for()
        assert visit.text("#maps") == Read(demo.maps_html(wanted[0], words)).text and page.locator("#cards img").count() == 0
        page.click("#style input")
        page.get_by_role("option", name="Pop Art", exact=True).click()
        assert visit.changed(Read(demo.cards_html(wanted[0], words)).text) == Read(demo.cards_html(wanted[1], words)).text
        page.locator("#maps .why").first.click()
        assert page.url.endswith("#about-attention")
        page.get_by_text("中文").click()
        chinese = demo.words_of("zh")
        page.get_by_role("tab", name=chinese["find"]).wait_for()
        assert visit.changed(Read(demo.cards_html(wanted[1], words)).text) == Read(demo.cards_html(wanted[1], chinese)).text
        page.get_by_text("English").click()
        page.get_by_role("tab", name=words["find"]).wait_for()
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        page.locator("#painting input[type=file]").set_input_files(broken)
        page.locator("#painting img").wait_for(state="attached")
        page.click("#ask")
        assert "no picture in" in page.locator("#cards .fault").text_content()
        for name, result in (("caption", "#caption .answer"), ("find", "#found img >> nth=11"), ("errors", "#report iframe")):
            page.get_by_role("tab", name=words[name], exact=True).click()
            page.locator(result).wait_for()
        assert page.frame_locator("#report iframe").locator("h1").inner_text().startswith("The demo's example pictures: ")
        policy = visit.response.headers["content-security-policy"]
        visit.check(home)
        phone = Visit(browser, home, locale="zh-CN", viewport={"width": 390, "height": 844})
        page, shown = phone.page, phone.page.inner_text("body")
        assert all(chinese[name] in shown and words[name] not in shown
                   for name in ("title", "intro", "gated", "closed", "confidence", "style"))
        boxes = [page.locator(f"#cards .{side} .answer").bounding_box() for side in ("gated", "closed")]
        assert all(box["y"] + box["height"] <= 844 for box in boxes) and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        phone.check(home)
        browser.close()
    assert policy == demo.POLICY and "http" not in policy
