"""Tests of the drawn data set.

    python -m pytest -q tests/tools/test_sample.py
"""
import csv
import hashlib
import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from tools import drawing as ms
from tools import make_sample

PICTURES = 64


def make(out, seed=3):
    """A set of pictures of a seventh of the side: what a test says of files holds at any size, and of pictures it draws its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ms, "PICTURE_SIZE", 32)
        make_sample.main(["--out", str(out), "--seed", str(seed), "--pictures", str(PICTURES)])
    return out


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sample") / "set")


@pytest.fixture(scope="module")
def pictures():
    """The same 12 scenes in every style: float (styles, scenes, 112, 112, 3) in [0, 255]."""
    scenes = [ms.random_scene(np.random.default_rng([7, i])) for i in range(12)]
    return np.array([[np.asarray(ms.draw_scene(scene, style, seed=i), dtype=float)
                      for i, scene in enumerate(scenes)] for style in ms.STYLES])


def tables(out):
    """split -> list of rows (dicts)."""
    return {split: list(csv.DictReader((out / f"{split}.csv").open(encoding="utf-8")))
            for split in ms.SPLITS}


def digests(out):
    """Relative path -> hash of every file under `out`, hidden ones included."""
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(out.rglob("*")) if p.is_file()}


def test_two_runs_give_the_same_bytes_and_another_seed_does_not(sample, tmp_path):
    again = digests(make(tmp_path / "again"))
    assert again == digests(sample)
    assert not [name for name in again if name.endswith(".part")]
    first, other = (ms.random_scene(np.random.default_rng([seed, 1])) for seed in (3, 4))
    assert first != other


@pytest.mark.parametrize("style", ms.STYLES)
def test_draw_scene_depends_on_its_arguments_only(style):
    scene = ms.random_scene(np.random.default_rng([1, 1]))
    before = json.dumps(scene)
    first = ms.draw_scene(scene, style, 112, 5).tobytes()
    ms.draw_scene(ms.random_scene(np.random.default_rng([1, 2])), style, 112, 6)
    assert ms.draw_scene(scene, style, 112, 5).tobytes() == first
    assert ms.draw_scene(scene, style, 112, 6).tobytes() != first
    assert json.dumps(scene) == before


def test_things_do_not_overlap_and_stay_inside():
    for i in range(400):
        things = ms.random_scene(np.random.default_rng([2, i]))["things"]
        for thing in things:
            x, y = thing["x"], thing["y"]
            assert .8 * thing["radius"] < min(x, y, 1 - x, 1 - y)
        for a, b in combinations(things, 2):
            gap = np.hypot(a["x"] - b["x"], a["y"] - b["y"]) - a["radius"] - b["radius"]
            assert gap > -.04  # the radius reaches the farthest corner only


def test_design_is_balanced_in_pairs():
    rows = ms.balanced_design(480, np.random.default_rng([0, 0]))
    factors = {"style": ms.STYLES, "kind": ms.KINDS, "count": ms.COUNTS,
               "colour": ms.COLOURS, "ground": ms.GROUNDS}
    for a, b in combinations(factors, 2):
        met = Counter((row[a], row[b]) for row in rows)
        cells = [met[u, v] for u in factors[a] for v in factors[b]]
        expected = len(rows) / len(cells)
        assert max(abs(n - expected) for n in cells) <= max(3, .25 * expected), (a, b)
    for split, share in ms.SPLITS.items():
        part = [row for row in rows if row["split"] == split]
        assert abs(len(part) / len(rows) - share) < .02
        assert len(set(Counter(row["style"] for row in part).values())) == 1
        for name in ("kind", "count", "colour"):
            n = Counter(row[name] for row in part)
            assert max(n.values()) <= 1.35 * len(part) / len(factors[name]), (split, name)
    styles = [row["style"] for row in rows]
    assert len(set(styles[::8])) > 4  # the number of a picture does not tell its style


def test_splits_share_no_picture_and_name_every_picture(sample):
    names = [{row["image"] for row in rows} for rows in tables(sample).values()]
    for a, b in combinations(names, 2):
        assert not a & b
    drawn = {p.name for p in (sample / "images").iterdir()}
    assert drawn == set().union(*names)
    classes = [line.split(" ") for line in (sample / "style_class.txt").read_text().splitlines()]
    assert [(int(i), name.replace("_", " ")) for i, name in classes] == list(enumerate(ms.STYLES))
    for split, of_split in zip(ms.SPLITS, names):
        assert set(json.loads((sample / f"{split}_captions.json").read_text())) == of_split
        styles = dict(line.split(",") for line in (sample / f"style_{split}.csv").read_text().splitlines())
        with (sample / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            assert {f"images/{row['image']}": list(ms.STYLES).index(row["style"]) for row in csv.DictReader(file)} == {
                path: int(index) for path, index in styles.items()}
    assert len(drawn) == PICTURES


def test_answers_are_known_and_agree_with_the_picture(sample):
    known = {"what": set(ms.KINDS), "count": set(ms.COUNTS.values()), "colour": set(ms.COLOURS),
             "style": set(ms.STYLES), "technique": set(ms.TECHNIQUES.values())}
    answers = {}
    for row in sum(tables(sample).values(), []):
        assert row["answer"] in known[row["question_type"]]
        answers.setdefault(row["image"], {"style column": row["style"]})
        answers[row["image"]][row["question_type"]] = row["answer"]
    for name, found in answers.items():
        count, colour, noun = name[5:-4].split("-")
        assert (found["count"], found["colour"]) == (count, colour)
        assert noun in (found["what"], ms.plural(found["what"]))
        assert found["style"] == found["style column"]
        assert found["technique"] == ms.TECHNIQUES[found["style"]]


def test_content_questions_do_not_give_away_other_answers():
    for i in range(200):
        rng = np.random.default_rng([4, i])
        scene, style = ms.random_scene(rng), list(ms.STYLES)[i % 8]
        secret = {"count": ms.COUNTS[scene["count"]], "colour": scene["colour"],
                  "style": style, "technique": ms.TECHNIQUES[style]}
        one = {**scene, "count": 1}
        for question, _, _ in ms.questions(scene, style, rng):
            padded = f" {question.lower()} "
            assert not any(f" {word.lower()} " in padded for word in secret.values())
        # the same wording for one thing as for many
        assert ms.questions(scene, style, np.random.default_rng(i))[2][0] == \
            ms.questions(one, style, np.random.default_rng(i))[2][0]


def test_captions_tell_the_content_and_not_the_manner():
    texts = set()
    for i in range(200):
        rng = np.random.default_rng([5, i])
        scene = ms.random_scene(rng)
        text = ms.caption(scene, rng)
        assert scene["kind"] in text and scene["colour"] in text
        assert scene["count"] == 1 or ms.COUNTS[scene["count"]] in text
        assert any(place in text for place in ms.PLACES[scene["ground"]])
        assert not any(style.lower() in text.lower() for style in ms.STYLES)
        texts.add(text)
    assert len(texts) > 150


def test_file_names_do_not_tell_the_style(sample):
    words = {word.lower() for style in ms.STYLES for word in style.replace("-", " ").split()
             if len(word) > 1}
    for path in (sample / "images").iterdir():
        assert ms.NAME.fullmatch(path.name)
        assert not any(word in path.name.lower() for word in words)


def test_mean_colour_does_not_depend_on_the_style(pictures):
    means = pictures.mean(axis=(1, 2, 3))  # (styles, 3)
    assert np.ptp(means, axis=0).max() < 1
    within = pictures.mean(axis=(2, 3))    # (styles, scenes, 3): scene by scene
    assert np.abs(within - within.mean(axis=0)).max() < 2


def texture(pictures):
    """Relative sizes and sparseness of local differences: (styles, scenes, 14)."""
    grey = pictures.mean(axis=-1)
    steps = [grey[..., k:] - grey[..., :-k] for k in (1, 2, 3)]
    steps += [grey[..., k:, :] - grey[..., :-k, :] for k in (1, 2, 3)]
    steps += [grey[..., 2:] - 2 * grey[..., 1:-1] + grey[..., :-2]]
    mean = np.stack([np.abs(s).mean(axis=(-1, -2)) for s in steps], axis=-1)
    peak = np.stack([s.std(axis=(-1, -2)) for s in steps], axis=-1)
    # ratios only: dark scenes have less contrast in every style
    return np.log(np.concatenate([mean / mean[..., 1:2] + 1e-9, peak / mean], axis=-1))


def centroid_accuracy(features):
    """Share of right styles by the nearest centroid, each scene left out in turn."""
    features = features / (features.std(axis=(0, 1)) + 1e-6)
    right = 0
    for scene in range(features.shape[1]):
        centroids = np.delete(features, scene, axis=1).mean(axis=1)
        gaps = np.linalg.norm(features[:, scene, None] - centroids, axis=-1)
        right += (gaps.argmin(axis=1) == np.arange(len(features))).sum()
    return right / features[..., 0].size


def test_texture_tells_the_style_and_mean_colour_does_not(pictures):
    assert centroid_accuracy(texture(pictures)) > .6      # chance is 0.125
    colour = pictures.mean(axis=(2, 3))
    hue = colour / colour.sum(axis=-1, keepdims=True)
    assert centroid_accuracy(colour) < .3
    assert centroid_accuracy(hue) < .3


def test_a_complete_set_is_left_alone_and_an_interrupted_one_is_redone(tmp_path, capsys, monkeypatch):
    out = make(tmp_path / "set")
    complete = digests(out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    capsys.readouterr()
    make(out)
    assert "already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.*")} == times
    with monkeypatch.context() as broken:
        broken.setattr(ms, "write_csv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(out, seed=4)
    assert not (out / "sample.json").exists()
    make(out)
    assert digests(out) == complete
    next((out / "images").iterdir()).unlink()
    make(out)
    assert digests(out) == complete


@pytest.mark.parametrize("name", ["train.csv", "artquest_train.csv"])
def test_another_data_set_is_not_overwritten(tmp_path, name):
    table = tmp_path / name
    table.write_text("image,question,answer,question_type,style\nmona-lisa.jpg,Who?,her,what,x\n")
    before = table.read_text()
    with pytest.raises(SystemExit):
        make(tmp_path)
    assert table.read_text() == before
