"""pytest tests/tools/test_tiny.py: the tiny models that ship, and make_tiny.py, their recipe.

Reference-checked: the bytes of what ships against the digests of the records. Behaviour-checked: the same recipe, much smaller,
makes the same files again and tells where it is.
"""

import contextlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

import core
import metrics
from data import rows, tables
from engine import checkpoints, published
from tools import make_tiny

RECORDS = {part: published.TINY / f"{part.removesuffix('.pt')}.json" for part in make_tiny.PARTS}


@pytest.mark.parametrize("part", make_tiny.PARTS)
def test_what_ships_has_the_digests_of_its_record(part):
    record = json.loads(RECORDS[part].read_text(encoding="utf-8"))
    assert make_tiny.digests(published.TINY / part) == record["sha256"] and record["recipe_version"] == make_tiny.RECIPE
    defaults = vars(make_tiny.get_args(["--out", "x"]))
    assert all(value == (list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name])
               for name, value in record["settings"].items()) and len(record["settings"]) > 5
    assert record["figures on the drawn sample's test pictures, %"]


def test_all_that_ships_is_small_and_in_half_precision():
    files = [path for path in published.TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert {tensors.get_tensor(name).dtype for name in tensors.keys()} <= {torch.float16, torch.int64}, path
        elif path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            state = content.get("model", content.get("state"))
            assert {tensor.dtype for tensor in state.values()} <= {torch.float16, torch.int64}, path


def test_no_file_tells_of_the_machine_that_made_it():
    files = [path for path in published.TINY.rglob("*") if path.is_file()]
    assert files and not [path for path in files if re.search(rb"/(home|root|tmp|work|Users)/", path.read_bytes())]


def test_the_gates_that_ship_load_into_float32_and_answer_as_their_record_says(tmp_path, sample):
    model, processor = core.load_gated(published.tiny("gated"))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    figures = json.loads(RECORDS["gated"].read_text(encoding="utf-8"))["figures on the drawn sample's test pictures, %"]
    read = [r for r in rows.read_split(sample, "train") if r.question_type == "style"]
    hits = {gated: np.mean([metrics.exact_match(answer, r.answer) for answer, r in zip(model.predict_answers(
        processor([r.image for r in read]), [r.question for r in read], gated=gated), read)]) for gated in (True, False)}
    # of other pictures, style alone without technique: near the record, far from closed gates
    assert 100 * hits[True] == pytest.approx(figures["exact match, style questions, gates open"], abs=20)
    assert hits[False] < hits[True] - 0.4


def test_a_missing_part_says_how_to_get_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "TINY", tmp_path)
    with pytest.raises(rows.DataError, match="git checkout -- models/tiny"):
        published.tiny("blip2")


# --- the recipe ------------

SMALL = ["--pictures", "16", "--vision-steps", "2", "--language-steps", "2", "--style-steps", "2", "--caption-steps", "2", "2",
         "--retrieval-steps", "2", "--sample-pictures", "64", "--gate-epochs", "1", "--cir-pictures", "12", "--cir-epochs", "1"]


def test_the_same_recipe_makes_the_same_files(tmp_path, capsys, monkeypatch, no_curves):
    """All parts in small; three of them once more, for their files alone: without figures and the sample that these are taken on."""
    digests = []
    for name, parts in (("first", make_tiny.PARTS), ("again", ("blip2", "blip2-itm", "blip"))):
        make_tiny.main(["--out", str(tmp_path / name), "--parts", *parts, *SMALL])
        digests.append({part: make_tiny.digests(tmp_path / name / part) for part in parts})
        monkeypatch.setattr(make_tiny, "record", lambda *args: None)
        monkeypatch.setattr(make_tiny, "drawn_sample", lambda args: contextlib.nullcontext())
    assert {part: digests[0][part] for part in digests[1]} == digests[1]
    for folder in ("gated", "cir"):
        best = checkpoints.load_checkpoint(tmp_path / "first" / folder / "best.pt")
        assert best["model_args"]["blip2"] == best["args"]["blip2"] == "tiny"
        assert {t.dtype for t in best["state"].values()} == {torch.float32}
    for folder, held, key in (("gated", "examples", "image"), ("cir", "gallery", "reference")):
        names = {path.name for path in (tmp_path / "first" / folder / held).iterdir()}
        listed = [row for _, row in tables.read_table(tmp_path / "first" / folder / "examples.csv")]
        assert {row[key] for row in listed} <= names and (len(names), len(listed)) == {"gated": (8, 40), "cir": (12, 2)}[folder]
    assert {row["target"] for row in listed} <= names
    for part in make_tiny.PARTS:
        record = json.loads((tmp_path / "first" / RECORDS[part].name).read_text(encoding="utf-8"))
        assert record["sha256"] == digests[0][part] and record["settings"]["vision_steps"] == 2


def test_the_words_of_a_tokenizer_do_not_depend_on_the_order_of_the_texts(tmp_path):
    texts = ["three red boats", "a red boat", "three blue boats at night", "at night, one boat"] * 2
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).mkdir()
        make_tiny.make_wordpiece(order, tmp_path / name)
    assert (tmp_path / "a/vocab.txt").read_bytes() == (tmp_path / "b/vocab.txt").read_bytes()
    tokenizer = make_tiny.make_wordpiece(texts, tmp_path / "a")
    assert tokenizer.tokenize("Three red zyx") == ["three", "red", "z", "##y", "##x"]
    assert tokenizer("red").input_ids == [tokenizer.cls_token_id, tokenizer.convert_tokens_to_ids("red"), tokenizer.sep_token_id]


def test_where_it_is_is_told_while_it_is_at_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_tiny, "HEARTBEAT", 0.05)
    with make_tiny.told(tmp_path):
        make_tiny.now("vision tower: step 1 of 500")
        make_tiny.threading.Event().wait(0.3)
    lines = (tmp_path / "make_tiny.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 3 and all(line.endswith("vision tower: step 1 of 500") for line in lines)
    assert capsys.readouterr().out.splitlines() == lines
    assert make_tiny.LOG.handlers == []
