"""pytest tests/tools/test_sample_mixed.py: the drawn set in which the manner decides what the answer is about."""

import csv
import hashlib
from collections import Counter

import numpy as np
import pytest

from tools import drawing, make_sample, sample_mixed

PICTURES = 24
TECHNIQUE_OF = {technique: style for style, technique in drawing.TECHNIQUES.items()}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Pictures of a seventh of the side; those whose pixels are looked at are drawn by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_mixed, "PICTURE_SIZE", 32)
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "set"
    sample_mixed.make(out, 3, PICTURES, pytest.fail)
    return out, [row for split in drawing.SPLITS for row in csv.DictReader((out / f"{split}.csv").open(encoding="utf-8"))]


def by_picture(rows):
    found = {}
    for row in rows:
        found.setdefault(row["image"], []).append(row)
    return found


def test_every_answer_is_what_the_design_says(drawn):
    out, rows = drawn
    designed = sample_mixed.design(PICTURES, 3)
    for image, asked in by_picture(rows).items():
        row = designed[int(image[:4]) - 1]
        if row["two"]:
            assert [(TECHNIQUE_OF[r["question"].removeprefix("What is painted ")[:-1]], r["answer"]) for r in asked] == list(
                zip(row["styles"], row["kinds"])) and {r["question_type"] for r in asked} == {"which"} and not asked[0]["style"]
        else:
            about, control = asked
            counts = about["style"] in ("Pointillism", "Impressionism", "Expressionism", "Northern Renaissance")
            assert about["style"] == row["styles"][0] and about["answer"] == (row["kinds"] if counts else row["colours"])[0]
            assert control["answer"] == {"what": row["kinds"], "colour": row["colours"]}[control["question_type"]][0]
    assert len({r["image"] for r in rows}) == len(list((out / "images").iterdir())) == PICTURES and len(rows) == 2 * PICTURES


def test_who_sees_what_is_there_and_no_manner_is_right_every_second_time():
    """Of `which` both things are asked about, of `about` both readings are as frequent; neither manner, thing nor side gives it away."""
    designed = sample_mixed.design(960, 0)
    two, one = ([row for row in designed if row["two"] == wanted] for wanted in (True, False))
    assert all(len(set(row[name])) == 2 for row in two for name in ("styles", "kinds", "colours"))
    for split in drawing.SPLITS:
        about = [row["styles"][0] in sample_mixed.MARKS for row in one if row["split"] == split]
        assert abs(np.mean(about) - 0.5) < 0.12, split
    sides = Counter((row["styles"][0], row["kinds"][0]) for row in two)
    assert len(sides) == 64 and max(sides.values()) <= 18  # 7.5 on the average
    assert Counter(row["split"] for row in designed) == {"train": 672, "val": 144, "test": 144}


def test_each_half_is_that_of_a_picture_in_its_own_manner():
    rng = np.random.default_rng(0)
    scenes = sample_mixed.two_things(rng, "sand", ("boat", "star"), ("red", "blue"))
    styles = ("Pointillism", "Cubism")
    both = np.asarray(sample_mixed.draw_halves(scenes, styles, 112, 5))
    left, right = (np.asarray(drawing.draw_scene(scene, style, 112, 5)) for scene, style in zip(scenes, styles))
    assert np.array_equal(both[:, :52], left[:, :52]) and np.array_equal(both[:, 60:], right[:, 60:])
    assert not np.array_equal(left, right)
    for scene, (low, high) in zip(scenes, ((0, .5), (.5, 1))):
        thing, = scene["things"]
        assert low < thing["x"] - .9 * thing["radius"] and thing["x"] + .9 * thing["radius"] < high


def test_two_runs_give_the_same_bytes_and_nobody_elses_data_is_touched(drawn, tmp_path, capsys):
    out, _ = drawn

    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))}
    sample_mixed.make(out, 3, PICTURES, pytest.fail)
    assert "already holds this set" in capsys.readouterr().out
    before = digests(out)
    next((out / "images").iterdir()).unlink()
    sample_mixed.make(out, 3, PICTURES, pytest.fail)  # drawn again, to the bit
    assert digests(out) == before
    with pytest.MonkeyPatch.context() as patch:  # interrupted while another set is drawn over it
        patch.setattr(sample_mixed, "draw_picture", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample_mixed.make(out, 4, PICTURES, pytest.fail)
    assert not sample_mixed.is_complete(out, {"set": "mixed", "version": sample_mixed.VERSION, "seed": 3, "pictures": PICTURES})
    sample_mixed.make(out, 3, PICTURES, pytest.fail)
    assert digests(out) == before
    (tmp_path / "train.csv").write_text("image,question,answer\na.jpg,b,c\n")
    for command in (["--mixed", "--out", str(tmp_path)], ["--mixed", "--cirr"]):
        with pytest.raises(SystemExit):
            make_sample.main(command)
    told = capsys.readouterr().err
    assert "another data set" in told and "not allowed with" in told


def test_the_command_draws_960_pictures_where_no_number_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(sample_mixed, "make", lambda *given: asked.append(given[:3]))
    make_sample.main(["--mixed"])
    make_sample.main(["--mixed", "--pictures", "64", "--seed", "2", "--out", "x"])
    assert [(str(out), *numbers) for out, *numbers in asked] == [("data/mixed", 0, 960), ("x", 2, 64)]
