"""pytest tests/test_metrics_cli.py: python metrics.py on good and bad files. Behaviour-checked; WordNet is not asked for."""

import json

import pytest

import metrics
from engine import errors
import conftest

REFERENCES = {"a.jpg": ["A black cat.", "The cat sits."], "b.jpg": ["Two dogs run!", "dogs"], "c.jpg": ["A green tree"]}
PREDICTIONS = {"c.jpg": "", "a.jpg": "a black cat", "b.jpg": "Dogs."}
IMAGES = [{"id": 7, "file_name": "a.jpg"}, {"id": 5, "file_name": "b.jpg"}, {"id": 6, "file_name": "c.jpg"}]
NUMBERS = {image["file_name"]: image["id"] for image in IMAGES}
ANNOTATIONS = {"info": {"year": 2014}, "images": IMAGES, "annotations": [
    {"image_id": NUMBERS[name], "id": n, "caption": caption} for n, (name, caption) in
    enumerate((name, caption) for name, captions in REFERENCES.items() for caption in captions)]}
RESULTS = [{"image_id": NUMBERS[name], "caption": caption} for name, caption in PREDICTIONS.items()]


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch):
    monkeypatch.setattr(metrics, "_wordnet", lambda: None)
    metrics._meteor_helpers.cache_clear()
    yield
    metrics._meteor_helpers.cache_clear()


@pytest.fixture
def run(tmp_path, capsys):
    """Function: contents of the two files (text as it is, else JSON, None for no file), flags -> (code, stdout, stderr)."""
    def run_main(references, predictions, *flags):
        for name, content in (("refs.json", references), ("preds.json", predictions)):
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        code = errors.exit_code(metrics.main, ["--references", str(tmp_path / "refs.json"),
                                                  "--predictions", str(tmp_path / "preds.json"), *flags])
        return code, *capsys.readouterr()
    return run_main


def expected():
    return metrics.score_captions(PREDICTIONS, REFERENCES)


# --- good files ------------

@pytest.mark.parametrize("references, predictions, ids", [
    (REFERENCES, PREDICTIONS, PREDICTIONS),
    (REFERENCES, {name: [caption] for name, caption in PREDICTIONS.items()}, PREDICTIONS),
    (ANNOTATIONS, RESULTS, "675"),
    (ANNOTATIONS, {str(NUMBERS[name]): caption for name, caption in PREDICTIONS.items()}, "675"),
    (ANNOTATIONS, PREDICTIONS, PREDICTIONS),  # by the file names of the annotations
    ({NUMBERS[name]: captions for name, captions in REFERENCES.items()}, RESULTS, "675"),
    ({"annotations": ANNOTATIONS["annotations"]}, RESULTS, "675"),
    (ANNOTATIONS["annotations"], RESULTS, "675"),
], ids=["dicts", "lists of one", "coco", "coco and dict", "coco and file names", "dict and coco", "no images", "bare rows"])
def test_forms(run, references, predictions, ids):
    code, out, err = run(references, predictions, "--json")
    found, wanted = json.loads(out), expected()
    assert (code, err, found["images"]) == (0, "", 3) and found["corpus"] == wanted["corpus"]
    assert list(found["per_image"]) == list(ids)
    for i, scores in enumerate(found["per_image"].values()):
        assert scores == {name: values[i] for name, values in wanted["per_item"].items()}


def test_one_caption_a_string(run):
    code, out, _ = run({"a": "a cat", "b": "dogs"}, {"a": "a cat", "b": "x"}, "--json")
    assert code == 0 and json.loads(out)["per_image"]["a"]["ROUGE-L"] == 1


def test_table(run):
    code, out, err = run(REFERENCES, PREDICTIONS)
    lines, corpus = out.splitlines(), expected()["corpus"]
    assert (code, err) == (0, "") and lines[0].split() == ["images", "3"]
    assert [line.rsplit(None, 1) for line in lines[1:8]] == [[name, f"{value:.4f}"] for name, value in corpus.items()]
    assert lines[5].startswith("METEOR (no WordNet)") and len({len(line) for line in lines[:8]}) == 1
    assert len(lines) == 9 and lines[8].startswith("note: METEOR (no WordNet) counts no synonyms")


def test_with_wordnet_there_is_no_note(run, monkeypatch):
    monkeypatch.setattr(metrics, "meteor_name", lambda: "METEOR")
    code, out, _ = run(REFERENCES, PREDICTIONS)
    assert code == 0 and "note" not in out and "METEOR  " in out
    assert json.loads(run(REFERENCES, PREDICTIONS, "--json")[1])["notes"] == []


def test_one_image(run):
    one = {"a.jpg": ["a cat"]}, {"a.jpg": "a cat"}
    code, out, _ = run(*one)
    assert code == 0 and [line.split() for line in out.splitlines() if line.startswith("CIDEr-D")] == [["CIDEr-D", "-"]]
    assert "note: CIDEr-D has no meaning for one image" in out
    found = json.loads(run(*one, "--json")[1])
    assert found["corpus"]["CIDEr-D"] is None and "one image" in found["notes"][0] and found["corpus"]["ROUGE-L"] == 1


def test_empty_captions_score_0(run):
    code, out, _ = run(REFERENCES, dict.fromkeys(REFERENCES, " . "), "--json")
    assert code == 0 and set(json.loads(out)["corpus"].values()) == {0}


def test_coco_meteor_has_its_own_column(run, monkeypatch):
    monkeypatch.setattr(metrics, "coco_meteor", lambda hypotheses, references: (0.25, [0.5] * len(hypotheses)))
    out = run(REFERENCES, PREDICTIONS, "--coco-meteor")[1]
    assert "METEOR 1.5" not in run(REFERENCES, PREDICTIONS)[1]
    assert [line.split() for line in out.splitlines() if "1.5" in line] == [["METEOR", "1.5", "0.2500"]]
    assert "METEOR (no WordNet)" in out


def test_encoding(run):
    text = json.dumps({"a": "caf\u00e9", "b": "x"}, ensure_ascii=False).encode("latin-1").decode("utf-8", "surrogateescape")
    code, out, _ = run(text, text, "--encoding", "latin-1", "--json")
    assert code == 0 and json.loads(out)["corpus"]["ROUGE-L"] == 1
    code, _, err = run(text, text)
    assert code == 2 and "pass --encoding latin-1" in err


# --- bad files ------------

BAD = {
    "no references file": (None, PREDICTIONS, "refs.json: there is no such file"),
    "no predictions file": (REFERENCES, None, "preds.json: there is no such file"),
    "not JSON": (REFERENCES, "{'a.jpg': 'a cat'}", "preds.json, line 1, character 2: not JSON"),
    "cut off": (json.dumps(ANNOTATIONS)[:-5], RESULTS, "refs.json, line 1, character"),
    "empty file": (REFERENCES, "", "preds.json: the file is empty"),
    "a number": (REFERENCES, "3", "preds.json: neither {image: captions} nor COCO's annotations or results"),
    "a string": ('"a cat"', PREDICTIONS, "refs.json: neither"),
    "annotations no list": ({"annotations": {"a": "b"}}, RESULTS, "refs.json: neither"),
    "empty object": ({}, PREDICTIONS, "refs.json: it holds no captions"),
    "empty list": (ANNOTATIONS, [], "preds.json: it holds no captions"),
    "no annotations": ({"images": IMAGES, "annotations": []}, RESULTS, "refs.json: it holds no captions"),
    "list of strings": (ANNOTATIONS, ["a cat"], "preds.json, row 1: '\"a cat\"' where an object with image_id and caption"),
    "no image_id": (ANNOTATIONS, [*RESULTS[:1], {"caption": "x"}], "preds.json, row 2: no column image or file_name or "),
    "no caption": (ANNOTATIONS, [{"image_id": 7}], "preds.json, row 1: no column caption or captions or text"),
    "caption null": (ANNOTATIONS, [{"image_id": 7, "caption": None}], "preds.json, row 1: 'caption' is 'null' and not text"),
    "image_id null": (ANNOTATIONS, [{"image_id": None, "caption": "x"}], "preds.json, row 1: 'image_id' is 'null' and not text"),
    "dict of objects": ({"a.jpg": {"raw": "a cat"}}, PREDICTIONS, "refs.json, 'a.jpg': 'caption' is"),
    "null among captions": ({"a.jpg": ["a cat", None]}, PREDICTIONS, "refs.json, 'a.jpg': 'caption' is 'null' and not text"),
    "half a character": (REFERENCES, '{"a.jpg": "\\ud800"}', "preds.json, 'a.jpg': 'caption' holds a NUL or half a character"),
    "lacking prediction": (REFERENCES, {"a.jpg": "x", "c.jpg": "x"},
                           "refs.json: no caption for 1 of 3 images, first 'b.jpg': both sides must hold the same images"),
    "lacking references": ({"a.jpg": ["x"]}, PREDICTIONS, "refs.json: no references for 2 of 3 images, first 'c.jpg'"),
    "no image in common": (REFERENCES, RESULTS, "refs.json: no caption for 3 of 3 images, first 'a.jpg'"),
    "annotated image lacks": (ANNOTATIONS, RESULTS[1:], "refs.json: no caption for 1 of 3 images, first '6'"),
    "file name lacks": (ANNOTATIONS, {"a.jpg": "x"}, "refs.json: no caption for 2 of 3 images, first 'b.jpg'"),
    "file names twice": ({**ANNOTATIONS, "images": [{**image, "file_name": "a.jpg"} for image in IMAGES]}, PREDICTIONS,
                         "refs.json: no caption for 3 of 3 images, first '7'"),
    "duplicate result": (ANNOTATIONS, [*RESULTS, RESULTS[0]], "preds.json: 2 captions for image '6': give exactly one"),
    "duplicate key": (REFERENCES, '{"a.jpg": "x", "b.jpg": "x", "a.jpg": "y"}', "preds.json: key 'a.jpg' stands twice"),
    "several predictions": (REFERENCES, {**PREDICTIONS, "b.jpg": ["x", "y"]}, "preds.json: 2 captions for image 'b.jpg'"),
    "empty prediction list": (REFERENCES, {**PREDICTIONS, "b.jpg": []}, "preds.json: 0 captions for image 'b.jpg'"),
    "empty references": ({**REFERENCES, "b.jpg": []}, PREDICTIONS, "refs.json: the list of references of 'b.jpg' is empty"),
}


@pytest.mark.parametrize("references, predictions, message", BAD.values(), ids=BAD.keys())
def test_bad_files(run, references, predictions, message):
    code, out, err = run(references, predictions)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_coco_meteor_that_is_missing(run, monkeypatch):
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    code, out, err = run(REFERENCES, PREDICTIONS, "--coco-meteor")
    assert (code, out) == (2, "") and err == ("error: --coco-meteor needs Java and the package pycocoevalcap: install both or "
                                              "leave the flag out\n")


def test_the_script_itself(tmp_path, forker):
    (tmp_path / "refs.json").write_text(json.dumps(REFERENCES))
    (tmp_path / "preds.json").write_text(json.dumps(PREDICTIONS))

    def script(*flags):
        return forker.run(["metrics.py", *flags], cwd=conftest.ROOT)[0]

    done = script("--references", str(tmp_path / "refs.json"), "--predictions", str(tmp_path / "preds.json"))
    assert done.returncode == 0 and done.stderr == "" and "\nROUGE-L " in done.stdout and "\nMETEOR" in done.stdout
    bad = script("--references", str(tmp_path / "refs.json"), "--predictions", "nowhere.json")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.startswith("error: nowhere.json: there is no such file")
    assert script("--references", "refs.json").returncode == 2  # argparse's own message
