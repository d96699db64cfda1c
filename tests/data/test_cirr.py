"""pytest tests/data/test_cirr.py

Reference-checked: recalls against a count by hand in Python, pictures against torchvision, CIRR's annotations and its example
of a submission where they are present (CIRR=folder). Behaviour-checked: what is refused and how, missing pictures, the drawn
set. The recalls and submission files of SPRC are in test_golden.py.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
import train_cir
from data import cirr, rows
from data.cirr import Query
from engine import loaders
from engine.errors import DataError
from tools import drawing, make_sample, sample_cirr

ROOT = pathlib.Path(__file__).resolve().parents[2]
REAL = pathlib.Path(os.environ.get("CIRR") or ROOT / "../shared/data/cirr")
SIZES = {"train": 2, "val": 3, "test1": 1}
CIRR_NAMES = ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3", "mean"]
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no folder {REAL} (set CIRR)")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A CIRR-like folder of 36 pictures, not to be written to."""
    folder = tmp_path_factory.mktemp("cirr") / "cirr"
    sample_cirr.make_set(folder, 1, SIZES)
    return folder


@pytest.fixture
def copy(drawn, tmp_path):
    return pathlib.Path(shutil.copytree(drawn, tmp_path / "cirr"))


def read(path):
    return json.loads(path.read_text())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def read_val(folder, **more):
    pool, = cirr.read_split(str(folder), "cirr", "val", log=lambda line: None, **more)
    return pool


# --- CIRCO ------------

def circo(folder, **changes):
    """CIRCO's layout: seven pictures, two queries of three and of one right answer in val, one in test. changes: of val's first row."""
    rows = [{"reference_img_id": 10, "target_img_id": 11, "relative_caption": "Is held by a girl.", "shared_concept": "a bear",
             "gt_img_ids": [11, 13, 15], "id": 0, **changes},
            {"reference_img_id": 12, "target_img_id": 16, "relative_caption": "at night", "shared_concept": "a car", "gt_img_ids": [16],
             "id": 1}]
    write(folder / "annotations/val.json", rows)
    write(folder / "annotations/test.json", [{"reference_img_id": 14, "relative_caption": "in red", "shared_concept": "a bus", "id": 0}])
    images = [{"id": n, "file_name": f"{n:012}.jpg"} for n in range(10, 17)]
    write(folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", {"info": {}, "images": images})
    for n in range(10, 17):
        path = folder / f"COCO2017_unlabeled/unlabeled2017/{n:012}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (10 * n, 90, 90)).save(path)
    return folder


def test_average_precision_by_hand():
    """Right answers at the places 1, 3 and 6 of the first query, at 2 of the second, which says the same of two pictures."""
    scores = [[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [0.1, 0.9, 0.9, 0.2, 0.0, 0.3, 0.05]]
    right = np.zeros((2, 7), bool)
    right[0, [0, 2, 5]] = right[1, 1] = True
    found = metrics.average_precision(scores, right, (1, 2, 5, 10))
    assert found[1].tolist() == pytest.approx([100, 0])  # min(k, right answers) = 1
    assert found[2].tolist() == pytest.approx([50, 50])  # 1/1 over 2; a tie counts against
    assert found[5].tolist() == pytest.approx([100 * (1 + 2 / 3) / 3, 50])
    assert found[10].tolist() == pytest.approx([100 * (1 + 2 / 3 + 3 / 6) / 3, 50])
    broken = np.array(scores)
    broken[0, 0] = np.nan  # a right answer of no score comes last: places 2, 5 and 7
    assert metrics.average_precision(broken, right, (10,))[10][0] == pytest.approx(100 * (1 / 2 + 2 / 5 + 3 / 7) / 3)
    with pytest.raises(ValueError, match="a right answer in every row"):
        metrics.average_precision(scores, right & False)


def test_average_precision_equals_that_of_the_list_of_a_submission():
    """CIRCO's server: of the best 50 names, precision at the places of right answers, over min(k, right answers)."""
    rng = np.random.default_rng(3)
    scores, right = rng.random((30, 80)), rng.random((30, 80)) < 0.06
    right[:, 7] = True
    listed = [names[:50] for names in cirr.ranking(scores, range(80))]
    for k, values in metrics.average_precision(scores, right).items():
        hits = np.array([[own[name] for name in names] for own, names in zip(right, listed)])
        precision = hits.cumsum(1) / np.arange(1, 51) * hits
        assert values == pytest.approx(100 * precision[:, :k].sum(1) / np.minimum(k, right.sum(1)))
    found = metrics.circo_scores(scores, right, np.full(30, 7))
    assert found["mean"] == found["mAP@10"] and found["R@50"] == 100 * np.mean([7 in names for names in listed])
    scores = rng.random((4000, 20))
    right = np.arange(20)[None] < rng.integers(1, 6, 4000)[:, None]
    assert metrics.circo_scores(scores, right, np.zeros(4000, int)) == pytest.approx(metrics.circo_chance(20, right.sum(1)), abs=2)


def test_circo_is_read_with_all_its_right_answers(tmp_path):
    pool, = cirr.read_split(str(circo(tmp_path)), "circo", "val", log=lambda line: None)
    first, second = pool.queries
    assert (first.reference, first.target, first.answers, first.captions) == ("10", "11", ("11", "13", "15"), ("is held by a girl",))
    assert len(pool.gallery) == 7 and all(pathlib.Path(path).is_file() for path in pool.gallery.values()) and second.answers == ("16",)
    elsewhere, = cirr.read_split(str(tmp_path), "circo", "val", str(tmp_path / "COCO2017_unlabeled"), log=lambda line: None)
    assert elsewhere.gallery == pool.gallery
    unseen, = cirr.read_split(str(tmp_path), "circo", "test", log=lambda line: None)
    assert unseen.queries[0].target == "" and unseen.queries[0].answers == ()
    path, = cirr.write_circo(tmp_path, unseen.queries, unseen.gallery, np.array([[3, 1, 9, 2, 5, 4, 0]]))
    assert read(path) == {"0": [12, 14, 15, 10, 13, 11, 16]}  # the reference, 14, among them


@pytest.mark.parametrize("change, message", [
    ({"gt_img_ids": [13, 15]}, "the target and all other right answers"), ({"gt_img_ids": [11, 11]}, "each once"),
    ({"gt_img_ids": 11}, "the target and all other"), ({"gt_img_ids": [11, 10]}, "reference and right answer"),
    ({"target_img_id": "a11"}, "no number of a target picture"), ({"gt_img_ids": [11, 99]}, "picture '99' is not in"),
    ({"id": 1}, "that of row 1 as well"), ({"relative_caption": None}, "give the caption as text")])
def test_bad_rows_of_circo(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        cirr.annotations(str(circo(tmp_path, **change)), "circo", "val")


# --- recall ------------

def rank_by_hand(scores, target, left_out=()):
    others = [s for i, s in enumerate(scores) if i != target and i not in left_out]
    return 1 + sum(not s < scores[target] for s in others)


def random_queries(rng, queries, gallery):
    members = np.array([rng.permutation(gallery)[:6] for _ in range(queries)])
    return members, members[:, 2], members[:, 4]  # members, target, reference


def test_recalls_equal_a_count_by_hand_with_many_ties_and_nan():
    rng = np.random.default_rng(0)
    for gallery, values in ((6, 4), (9, 4), (80, 4), (80, 60)):
        scores = rng.integers(0, values, (60, gallery)).astype(np.float32)
        scores[rng.random(scores.shape) < 0.05] = np.nan
        members, target, reference = random_queries(rng, 60, gallery)
        ranks = [rank_by_hand(s, t, [r]) for s, t, r in zip(scores, target, reference)]
        inner = [rank_by_hand(s, t, set(range(gallery)) - {*m} | {r})
                 for s, t, r, m in zip(scores, target, reference, members)]
        assert metrics.target_ranks(scores, target, reference).tolist() == ranks
        assert metrics.subset_ranks(scores, target, reference, members).tolist() == inner
        found = metrics.cirr_scores(scores, target, reference, members)
        wanted = {f"R@{k}": 100 * np.mean([r <= k for r in ranks]) for k in (1, 5, 10, 50)}
        wanted |= {f"Rs@{k}": 100 * np.mean([r <= k for r in inner]) for k in (1, 2, 3)}
        assert list(found) == CIRR_NAMES and found == pytest.approx(wanted | {"mean": (wanted["R@5"] + wanted["Rs@1"]) / 2})
        ranks = [rank_by_hand(s, t) for s, t in zip(scores, target)]  # FashionIQ leaves the reference in
        found = metrics.fashioniq_scores(scores, target)
        assert [found["R@10"], found["R@50"]] == [100 * np.mean([r <= k for r in ranks]) for k in (10, 50)]
        assert found["mean"] == (found["R@10"] + found["R@50"]) / 2


@pytest.mark.parametrize("value", [0.5, np.nan, -np.inf])
def test_a_collapsed_model_finds_nothing(value):
    members, target, reference = random_queries(np.random.default_rng(1), 20, 40)
    found = metrics.cirr_scores(np.full((20, 40), value, np.float32), target, reference, members)
    assert found == dict(zip(CIRR_NAMES, [0, 0, 0, 100, 0, 0, 0, 0]))  # 39 candidates are fewer than 50
    assert metrics.fashioniq_scores(np.full((20, 40), value), target)["R@10"] == 0


def test_reference_is_left_out_and_nan_of_the_target_is_last():
    scores = np.array([[0.9, 0.8, 0.1]])
    assert metrics.target_ranks(scores, [1]).tolist() == [2] and metrics.target_ranks(scores, [1], [0]).tolist() == [1]
    assert metrics.target_ranks(np.array([[0.9, np.nan, 0.1]]), [1], [0]).tolist() == [2]


def test_chance_level_is_what_random_scores_reach():
    rng = np.random.default_rng(2)
    members, target, reference = random_queries(rng, 20_000, 60)
    scores = rng.random((20_000, 60), dtype=np.float32)
    chance = metrics.chance_level(60, 6)
    assert metrics.cirr_scores(scores, target, reference, members) == pytest.approx(chance, abs=1.2)
    assert [chance[f"Rs@{k}"] for k in (1, 2, 3)] == [20, 40, 60] and chance["R@1"] == pytest.approx(100 / 59)
    assert metrics.fashioniq_scores(scores, target) == pytest.approx(metrics.chance_level(60), abs=1.2)
    assert metrics.chance_level(60)["R@10"] == pytest.approx(1000 / 60) and metrics.chance_level(20)["R@50"] == 100


@pytest.mark.parametrize("wrong, message", [
    (dict(target=[3]), "outside the gallery"), (dict(target=[-1]), "outside the gallery"),
    (dict(excluded=[1]), "excluded from its own"),
    (dict(target=[1, 1]), "wanted, got"), (dict(scores=np.zeros(3)), "wanted, got")])
def test_ranks_refuse(wrong, message):
    with pytest.raises(ValueError, match=message):
        metrics.target_ranks(**{"scores": np.zeros((1, 3)), "target": [1], "excluded": [0], **wrong})


def test_subset_and_recall_refuse():
    with pytest.raises(ValueError, match="query 1: target and reference belong once"):
        metrics.subset_ranks(np.zeros((2, 4)), [1, 3], [0, 0], [[0, 1, 2], [0, 1, 2]])
    with pytest.raises(ValueError, match="no queries"):
        metrics.recall_at([], 1)


# --- captions ------------

def test_chinese_captions_are_counted_by_characters(tmp_path):
    said, query = [], cirr.Query("1", "a", "b", ("换成两只狗，在水里",), (), "x.json", 1)
    cirr.check_pool(cirr.Pool("cirr", [query], {}, "train", "y.json"), str(tmp_path), lambda pool: "nothing", 1, said.append)
    assert "captions of 8 to 8 words (characters where no blanks part them), 0 empty" in said[0]


@pytest.mark.parametrize("text, wanted", [
    ('Show "three" (red) #boats!', "show three red boats"), ("a.b*c:d;e~f", "a b c d e f"), ("  Two   dogs.  ", "two dogs"),
    ("it's not-blue, is it?", "it's not-blue, is it?"), (" . ", ""), ("w " * 60, " ".join(["w"] * 50)),
    ("tab\tstays\n", "tab\tstays"), ("Red。" + "猫" * 60, "red。" + "猫" * 49), ("สวัส" + "ดี" * 60, "สวัส" + "ดี" * 47)])
def test_clean_text(text, wanted):
    assert cirr.clean_text(text) == wanted and cirr.clean_text(wanted) == wanted


def fashioniq(folder, split="val", categories=cirr.CATEGORIES, **row):
    """A made FashionIQ folder: three pictures a category, PNG and JPEG."""
    for k, category in enumerate(categories):
        names = [f"B00{category}{i}" for i in range(3)]
        given = {"candidate": names[0], "target": names[1], "captions": ["is Red.", " has longer sleeves, "], **row}
        write(folder / f"captions/cap.{category}.{split}.json", [given, {**given, "target": names[2]}])
        write(folder / f"image_splits/split.{category}.{split}.json", names)
        for i, name in enumerate(names):
            path = folder / f"images/{name}.{'png' if i else 'jpg'}"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8 + k)).save(path)
    return folder


def test_fashioniq_is_ranked_by_category(tmp_path):
    pools = cirr.read_split(str(fashioniq(tmp_path)), "fashioniq", "val", log=lambda line: None)
    assert [pool.name for pool in pools] == ["dress", "shirt", "toptee"]
    for pool in pools:
        assert list(pool.gallery) == [f"B00{pool.name}{i}" for i in range(3)]
        assert [pathlib.Path(path).suffix for path in pool.gallery.values()] == [".jpg", ".png", ".png"]
        assert [(q.pairid, q.reference, q.target, q.members) for q in pool.queries] == [
            ("1", f"B00{pool.name}0", f"B00{pool.name}1", ()), ("2", f"B00{pool.name}0", f"B00{pool.name}2", ())]
    os.remove(pools[2].gallery["B00toptee0"])
    with pytest.raises(DataError, match="split.toptee.val.json: 1 of 3 pictures are missing .*'B00toptee0.jpg' is not there"):
        cirr.read_split(str(tmp_path), "fashioniq", "val", log=lambda line: None)
    one, = cirr.annotations(str(tmp_path), "fashioniq", "val", "shirt")
    assert one.name == "shirt" and loaders.list_rows(one.queries).startswith("B00shirt0 + 'is red / has longer sleeves' (row 1)")


def test_text_of_fashioniq_has_four_variants(tmp_path):
    query = cirr.annotations(str(fashioniq(tmp_path)), "fashioniq", "val")[0].queries[0]
    both, turned = "is red and has longer sleeves", "has longer sleeves and is red"
    assert cirr.text_of(query) == both
    drawn = [cirr.text_of(query, draw) for draw in (0.0, 0.24, 0.25, 0.49, 0.5, 0.74, 0.75, 0.999)]
    assert drawn == [both, both, turned, turned, "is red", "is red", "has longer sleeves", "has longer sleeves"]
    long = Query("1", "a", "b", ("w " * 49 + "end", "x"), (), "f", 1)
    assert cirr.text_of(long) == "w " * 49 + "end"  # 50 words of both
    assert cirr.text_of(Query("1", "a", "b", ("one caption",), (), "f", 1), 0.9) == "one caption"


@pytest.mark.parametrize("row, message", [
    ({"captions": ["one"]}, "row 1: 1 captions where two belong"),
    ({"captions": "is red"}, "row 1: 'captions' is .* no list of two captions"),
    ({"candidate": "nowhere"}, "row 1: the reference 'nowhere' is not in .*split.dress.val.json"),
    ({"target": ""}, "row 1: the target '' is not in")])
def test_bad_fashioniq_rows(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        cirr.annotations(str(fashioniq(tmp_path, **row)), "fashioniq", "val")


# --- CIRR's files ------------

def test_drawn_set_is_read_whole(drawn):
    for split, sets in SIZES.items():
        pool, = cirr.read_split(str(drawn), "cirr", split, log=lambda line: None)
        raw = read(drawn / f"captions/cap.rc2.{split}.json")
        assert (pool.name, pool.split, len(pool.gallery)) == ("cirr", split, 6 * sets)
        wanted = [(r["pairid"], r["reference"], r.get("target_hard", ""), (cirr.clean_text(r["caption"]),),
                   r["img_set"]["members"], n) for n, r in enumerate(raw, 1)]
        assert wanted == [(int(q.pairid), q.reference, q.target, q.captions, list(q.members), q.line) for q in pool.queries]
        assert all(pathlib.Path(path).stem == name and os.path.isabs(path) for name, path in pool.gallery.items())
        assert all(q.target == "" for q in pool.queries) == (split == "test1")


def damaged(change):
    """A function that applies `change` to the third row of the validation captions."""
    def damage(folder):
        path = folder / "captions/cap.rc2.val.json"
        content = read(path)
        change(content[2])
        write(path, content)
    return damage


def set_of(row):
    return row["img_set"]["members"]


def drop_bystander(row):
    set_of(row).remove(next(name for name in set_of(row) if name not in (row["reference"], row["target_hard"])))


BAD_ROWS = [
    (damaged(lambda row: row.pop("reference")), "row 3: no 'reference' for the reference picture"),
    (damaged(lambda row: row.pop("target_hard")), "row 3: no 'target_hard'"),
    (damaged(lambda row: row.pop("caption")), "row 3: no 'caption'"),
    (damaged(lambda row: row.pop("pairid")), "row 3: no 'pairid'"),
    (damaged(lambda row: row.pop("img_set")), "row 3: 'img_set' is 'null' and no object"),
    (damaged(lambda row: row.update(caption=["x"])), "row 3: 'caption' is .* and not text"),
    (damaged(lambda row: row.update(pairid="version")), "row 3: pair id 'version' is no number"),
    (damaged(lambda row: row.update(pairid=23)), "row 3: pair id '23' is that of row 1 as well"),  # 22 are of training
    (damaged(lambda row: row["img_set"].update(members="abc")), "row 3: 'members' is .* no list of picture names"),
    (damaged(drop_bystander), "row 3: 5 different members"),
    (damaged(lambda row: drop_bystander(row) or set_of(row).append(set_of(row)[0])), "row 3: 5 different members"),
    (damaged(lambda row: set_of(row).append(set_of(row)[0])), "row 3: 6 different members in the image set, 6 belong"),
    (damaged(lambda row: row.update(reference="dev-1-0-img0")), "row 3: the reference 'dev-1-0-img0' is no member"),
    (damaged(lambda row: row.update(target_hard="dev-1-0-img0")), "row 3: the target 'dev-1-0-img0' is no member"),
    (damaged(lambda row: row.update(target_hard=row["reference"])), "row 3: .* is reference and target"),
    (damaged(lambda row: row["img_set"].update(members=[row["reference"], row["target_hard"], *"abcd"])),
     "row 3: the member 'a' is not in"),
    (lambda folder: write(folder / "captions/cap.rc2.val.json", '[{"pairid": 1,}]'), "cap.rc2.val.json, line 1, .*not JSON"),
    (lambda folder: write(folder / "image_splits/split.rc2.val.json", "3"), "split.rc2.val.json: no object"),
    (lambda folder: write(folder / "image_splits/split.rc2.val.json", {"a": ["b"]}), "split.rc2.val.json: no object"),
    (lambda folder: write(folder / "image_splits/split.rc2.val.json", ["a", "a"]), "picture 'a' stands there twice"),
    (lambda folder: os.remove(folder / "image_splits/split.rc2.val.json"),
     "split.rc2.val.json: there is no such file; .*split.rc2.train"),
    (lambda folder: os.remove(folder / "captions/cap.rc2.val.json"),
     "cap.rc2.val.json: there is no such file; .*cap.rc2.test1"),
    (lambda folder: shutil.rmtree(folder / "captions"), "no folder captions/ in it"),
]


@pytest.mark.parametrize("damage, message", BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_damaged_annotations(copy, damage, message):
    damage(copy)
    with pytest.raises(DataError, match=message) as error:
        cirr.annotations(str(copy), "cirr", "val")
    assert "\n" not in str(error.value)


# --- pictures ------------

def test_layouts_in_circulation(copy, tmp_path):
    wanted = {name: pathlib.Path(path).name for name, path in read_val(copy).gallery.items()}

    def found(folder, **more):
        return {name: pathlib.Path(path).name for name, path in read_val(folder, **more).gallery.items()}

    assert wanted == {name: f"{name}.jpg" for name in wanted}
    assert found(tmp_path) == wanted  # the folder above cirr/
    sprc = tmp_path / "cirr_dataset"  # SPRC: train/ dev/ test1/ beside cirr/
    for name in ("captions", "image_splits"):
        shutil.move(copy / name, sprc / "cirr" / name)
    for path in (copy / "img_raw").iterdir():
        shutil.move(path, sprc / path.name)
    assert found(sprc) == found(sprc / "cirr") == wanted
    moved = shutil.move(sprc / "dev", tmp_path / "flat")  # any folder, the pictures flat in it and with another suffix
    for path in list(pathlib.Path(moved).iterdir())[:5]:
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    assert [pathlib.Path(path).stem for path in read_val(sprc, images=str(moved)).gallery.values()] == list(wanted)
    with pytest.raises(DataError, match="18 of 18 pictures are missing .*--images"):
        found(sprc)
    with pytest.raises(DataError, match="no such image folder: check --images"):
        found(sprc, images=str(tmp_path / "nowhere"))


def test_numbered_folders_that_the_download_lacks(copy, tmp_path):
    """split.rc2.train.json says train/34/NAME, NLVR2's download has train/NAME; in SPRC's folder, above the annotations."""
    path = copy / "image_splits/split.rc2.val.json"
    write(path, {name: place.replace("dev/", "dev/34/") for name, place in read(path).items()})
    for name in ("captions", "image_splits"):
        shutil.move(copy / name, tmp_path / "sprc/cirr" / name)
    for place in (copy / "img_raw").iterdir():
        shutil.move(place, tmp_path / "sprc" / place.name)
    found = read_val(tmp_path / "sprc/cirr").gallery
    assert len(found) == 18 and all(pathlib.Path(place).parent.name == "dev" and pathlib.Path(place).stem == name
                                    for name, place in found.items())


def test_a_path_cannot_leave_the_root(copy, tmp_path):
    path = copy / "image_splits/split.rc2.val.json"
    content = read(path)
    name = next(iter(content))
    for bad in ("../../secret.png", "/etc/secret.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
        write(path, content | {name: bad})
        with pytest.raises(DataError, match="1 of 18 pictures .*absolute or holds"):
            read_val(copy)


def test_missing_pictures_are_counted_named_and_only_left_out_when_asked(copy, capsys):
    pool = read_val(copy)
    missing = list(pool.gallery)[:2]
    os.remove(pool.gallery[missing[0]])
    pathlib.Path(pool.gallery[missing[1]]).write_bytes(b"no picture")  # found, but broken
    with pytest.raises(DataError, match=rf"1 of 18 pictures are missing .*{missing[0]}.*--images.*--check-.*--skip-bad 0.06"):
        read_val(copy)
    with pytest.raises(DataError, match="2 of 18 pictures"):
        read_val(copy, skip_bad=0.1)
    said = []
    left, = cirr.read_split(str(copy), "cirr", "val", skip_bad=0.2, log=said.append)
    needing = [q for q in pool.queries if set(missing) & set(q.members)]
    assert list(left.gallery) == list(pool.gallery)[2:] and len(left.queries) == len(pool.queries) - len(needing) > 0
    assert not any(set(missing) & set(q.members) for q in left.queries)
    assert any(line.startswith("WARNING") and f"2 of 18 pictures and {len(needing)} of 30 queries" in line for line in said)
    assert sum(line.startswith("left out: ") for line in said) == 2
    elsewhere = [dataclasses.replace(q, file="elsewhere", line=1) for q in pool.queries]
    assert cirr.fingerprint(left.queries) != cirr.fingerprint(pool.queries) == cirr.fingerprint(elsewhere)


def test_check_lists_everything(copy):
    def checked(**more):
        said = []
        return cirr.check(str(copy), "cirr", train_cir.chance_text, log=said.append, **more), said

    code, said = checked()
    assert code == 0 and said[-1] == "training can start"
    assert not any(line.startswith(("missing", "broken", "in ")) for line in said)
    assert "30 pairs" in said[2] and "3 image sets, gallery of 18 pictures" in said[2] and "Rs@1 20.00" in said[2]
    pool = read_val(copy)
    missing, broken, *_ = pool.gallery
    pathlib.Path(pool.gallery[broken]).write_bytes(b"no picture")
    assert checked(splits=("val",))[0] == 1
    os.remove(pool.gallery[missing])
    code, said = checked()
    assert code == 1 and said[-1] == "training would fail"
    assert [line.split(":")[1].strip() for line in said if line.startswith("missing: ")] == [missing]
    assert [line.split(":")[1].strip() for line in said if line.startswith("broken: ")] == [broken]
    assert any(re.search("1 of 18 pictures are missing in .*, 1 are broken", line) for line in said)
    for name in ("captions/cap.rc2.test1.json", "captions/cap.rc2.train.json"):
        os.remove(copy / name)
    code, said = checked()
    assert code == 1 and sum("error" in line for line in said) == 1  # test1 need not be there
    assert checked(splits=("test1",))[0] == 1


def test_check_names_pictures_that_stand_in_two_splits(copy):
    path = copy / "image_splits/split.rc2.test1.json"
    content = read(path)
    content[next(iter(content))] = next(iter(read(copy / "image_splits/split.rc2.val.json").values()))
    write(path, content)
    said = []
    assert cirr.check(str(copy), "cirr", train_cir.chance_text, log=said.append) == 0
    assert sum(line.startswith("in val and test1: ") for line in said) == 1


@needs_real
def test_real_annotations():
    for split, pairs, pictures in (("val", 4181, 2297), ("test1", 4148, 2315)):
        pool, = cirr.annotations(str(REAL), "cirr", split)
        assert (len(pool.queries), len(pool.gallery)) == (pairs, pictures)
        assert {len(q.members) for q in pool.queries} == {6} and len({q.members for q in pool.queries}) == 503
        said = []
        with pytest.raises(DataError, match=f"{pictures} of {pictures} pictures are missing .*--images"):
            cirr.read_split(str(REAL), "cirr", split, log=said.append)
        assert cirr.check(str(REAL), "cirr", train_cir.chance_text, splits=[split], log=said.append) == 1
        assert sum(line.startswith("missing: ") for line in said) == pictures
    first = cirr.annotations(str(REAL), "cirr", "val")[0].queries[0]
    assert (first.pairid, first.target, first.captions) == ("12060", "dev-1028-1-img1", ("show three bottles of soft drink",))


@needs_real
def test_real_example_of_a_submission_passes():
    pool, = cirr.annotations(str(REAL), "cirr", "test1")
    with gzip.open(REAL / "test1_pred_ranks_recall.json.gz", "rt") as file:
        cirr.check_submission(json.load(file), pool.queries, pool.gallery)
    cirr.check_submission(read(REAL / "test1_pred_ranks_recall_subset.json"), pool.queries, pool.gallery)


# --- pixels ------------

def noise_image(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size, ratio, wanted", [
    ((100, 100), 1.25, (100, 100)), ((120, 100), 1.25, (120, 100)), ((200, 100), 1.25, (200, 160)),
    ((100, 200), 1.25, (160, 200)), ((101, 50), 1, (101, 100)), ((50, 100), 1, (100, 100)), ((1000, 10), 2, (1000, 500))])
def test_pad_to_ratio(size, ratio, wanted):
    image = noise_image(*size)
    padded = cirr.pad_to_ratio(image, ratio)
    left, top = ((wanted[i] - size[i]) // 2 for i in (0, 1))
    assert padded.size == wanted and np.array_equal(padded.crop((left, top, left + size[0], top + size[1])), image)
    assert np.asarray(padded).sum() == np.asarray(image).sum()  # black all around


def test_prepare_equals_torchvision():
    tv = pytest.importorskip("torchvision.transforms.v2", exc_type=ImportError)
    mode = tv.InterpolationMode.BICUBIC
    for shape in ((90, 60), (61, 97), (50, 50), (300, 40), (33, 41)):
        image = noise_image(*shape)
        for transform, ratio in (("targetpad", 1.25), ("targetpad", 1.6), ("squarepad", 1.25), ("plain", 1.25)):
            padded = image if transform == "plain" else cirr.pad_to_ratio(image, 1 if transform == "squarepad" else ratio)
            steps = [tv.Resize((28, 28), mode)] if transform == "plain" else [tv.Resize(28, mode), tv.CenterCrop(28)]
            pixels = torch.from_numpy(np.array(tv.Compose(steps)(padded))).permute(2, 0, 1) / 255
            wanted = tv.functional.normalize(pixels, rows.BLIP_MEAN, rows.BLIP_STD)
            assert torch.allclose(cirr.prepare(image, 28, transform, ratio), wanted, atol=1e-5), (shape, transform)


def test_prepare_keeps_the_proportions():
    image = Image.new("RGB", (300, 100))
    image.paste((255, 255, 255), (100, 0, 200, 100))  # a white square in the middle
    pixels = cirr.prepare(image, 40, "squarepad")[0] > 0
    assert pixels.shape == (40, 40) and abs(pixels.any(0).sum() - pixels.any(1).sum()) <= 1
    assert cirr.prepare(image, 40).shape == (3, 40, 40) and cirr.prepare(image, 40).dtype == torch.float32
    assert torch.equal(cirr.prepare(image, 40, "plain"), rows.image_tensor(image, 40))


def test_a_line_is_not_padded_to_gigabytes():
    with pytest.raises(DataError, match="too long to be padded"):
        cirr.prepare(Image.new("RGB", (60_000, 1)), 28)


# --- submissions ------------

def test_submission_ranks_and_leaves_the_reference_out(drawn, tmp_path):
    pool, = cirr.read_split(str(drawn), "cirr", "val", log=lambda line: None)
    names = list(pool.gallery)
    scores = np.random.default_rng(0).random((len(pool.queries), len(names)), dtype=np.float32)
    paths = cirr.write_submission(tmp_path / "out", pool.queries, pool.gallery, scores)
    assert [path.name for path in paths] == ["recall_submission.json", "recall_subset_submission.json"]
    recall, subset = map(read, paths)
    assert (recall["version"], recall["metric"], subset["metric"]) == ("rc2", "recall", "recall_subset")
    assert list(recall) == sorted(recall) and len(recall) == len(pool.queries) + 2
    for query, row in zip(pool.queries, scores):
        best = [names[i] for i in sorted(range(len(names)), key=lambda i: -row[i]) if names[i] != query.reference]
        assert recall[query.pairid] == best[:50] and len(best) == 17
        assert subset[query.pairid] == [name for name in best if name in query.members][:3]
    own = [names.index(q.target) for q in pool.queries], [names.index(q.reference) for q in pool.queries]
    ranks = metrics.target_ranks(scores, *own)
    assert [recall[q.pairid].index(q.target) + 1 for q in pool.queries] == ranks.tolist()


def test_ranking_keeps_the_order_of_ties_and_puts_nan_last():
    assert list(cirr.ranking(np.array([[0.5, np.nan, 0.5, 0.9]]), dict.fromkeys("abcd", ""))) == [["d", "a", "c", "b"]]


def small_submission(metric="recall"):
    queries = [Query(str(k), "a", "", ("x",), tuple("abcdef"), "f", k) for k in (1, 2)]
    gallery = dict.fromkeys([*"abcdefg", *map(str, range(60))], "")
    ranked = [list(gallery)] * 2
    return cirr.submission(queries, ranked, metric), queries, gallery


@pytest.mark.parametrize("metric, change, message", [
    ("recall", lambda c: c.update(version="rc1"), "version 'rc1'"),
    ("recall", lambda c: c.update(metric="mrr"), "metric 'mrr'"),
    ("recall", lambda c: c.pop("2"), "pair 2 is missing"),
    ("recall", lambda c: c.update({"3": c["2"]}), "pair 3 is missing or is none"),
    ("recall", lambda c: c["1"].pop(), "pair 1: 49 different names in 49, 50 belong"),
    ("recall", lambda c: c["1"].append("59"), "pair 1: 51 different names"),
    ("recall", lambda c: c["2"].__setitem__(3, c["2"][4]), "pair 2: 49 different names in 50"),
    ("recall", lambda c: c["2"].__setitem__(0, "a"), "pair 2: 'a' is the reference"),
    ("recall", lambda c: c["2"].__setitem__(0, "unknown"), "pair 2: 'unknown' is"),
    ("recall_subset", lambda c: c["1"].__setitem__(0, "g"), "pair 1: 'g' is"),
    ("recall_subset", lambda c: c["1"].pop(), "pair 1: 2 different names in 2, 3 belong")])
def test_check_submission_refuses(metric, change, message):
    content, queries, gallery = small_submission(metric)
    cirr.check_submission(content, queries, gallery)
    change(content)
    with pytest.raises(DataError, match=message):
        cirr.check_submission(content, queries, gallery)


def test_a_submission_over_the_limit_is_not_written(tmp_path, monkeypatch):
    _, queries, gallery = small_submission()
    monkeypatch.setattr(cirr, "MAX_BYTES", 300)
    with pytest.raises(DataError, match="bytes are over the server's 300"):
        cirr.write_submission(tmp_path, queries, gallery, np.zeros((2, len(gallery))))
    assert not list(tmp_path.iterdir())


# --- the drawn set ------------

def attributes(seed=0, sizes=None):
    return sample_cirr.design(sizes or {"train": 20, "val": 20, "test1": 5}, seed)


def test_every_query_of_the_drawn_set_has_one_answer():
    """No two pictures agree in all properties; a query changes one or two and its sentence says exactly those."""
    designed, seen, changes = attributes(), set(), Counter()
    for split, (sets, queries) in designed.items():
        pictures = {name: picture for six in sets for name, picture in six.items()}
        tuples = {tuple(sorted(p.items())) for p in pictures.values()}
        assert len(tuples) == len(pictures) == 6 * len(sets) and not tuples & seen  # nor across splits
        seen |= tuples
        for six in sets:
            varied = [len({p[name] for p in six.values()}) for name in sample_cirr.PROPERTIES]
            assert sorted(varied) == [1, 1, 1, 2, 3]
        asked = Counter((row["reference"], row["caption"]) for row in queries)
        assert max(asked.values()) == 1
        for row in queries:
            assert ("target_hard" in row) == (split != "test1")
            if split == "test1":
                continue
            old, new = pictures[row["reference"]], pictures[row["target_hard"]]
            changed = [name for name in sample_cirr.PROPERTIES if old[name] != new[name]]
            assert 1 <= len(changed) <= 2
            changes.update(changed)
            assert told(row["caption"], new) >= set(changed), row["caption"]
            assert not told(row["caption"], old) - set(changed), row["caption"]
    assert set(changes) == set(sample_cirr.PROPERTIES)


def told(caption, picture):
    """The properties of `picture` that the caption names."""
    words = f" {caption} "
    number = drawing.COUNTS[picture["count"]]
    said = {"count": [f" {number} ", " add ", " take "],
            "kind": [f" {picture['kind']} ", f" {drawing.plural(picture['kind'])} "],
            "colour": [f" {picture['colour']} "], "ground": [f" {place} " for place in drawing.PLACES[picture["ground"]]],
            "manner": [f" {picture['manner']} ", f" {drawing.TECHNIQUES[picture['manner']]} "]}
    return {name for name, forms in said.items() if any(form in words for form in forms)}


def test_a_sentence_alone_does_not_tell_the_target():
    """Of the five candidates, those with the new values: on average more than one."""
    sets, queries = attributes()["val"]
    pictures = {name: picture for six in sets for name, picture in six.items()}
    fits = []
    for row in queries:
        old, new = pictures[row["reference"]], pictures[row["target_hard"]]
        changed = [name for name in new if old[name] != new[name]]
        others = [pictures[m] for m in row["img_set"]["members"] if m != row["reference"]]
        fits.append(sum(all(p[name] == new[name] for name in changed) for p in others))
    assert min(fits) == 1 and np.mean(fits) > 1.5


def test_what_does_not_change_keeps_its_place():
    picture = {"kind": "boat", "count": 2, "colour": "red", "ground": "sand", "manner": "Cubism"}
    first, other = (np.asarray(sample_cirr.draw(picture | {"colour": c}, 0, "val", 3), dtype=int) for c in ("red", "blue"))
    moved = np.asarray(sample_cirr.draw(picture | {"colour": "blue"}, 0, "val", 4), dtype=int)
    same = (np.abs(first - other).max(axis=2) < 40).mean()
    assert same > 0.6 and same > (np.abs(first - moved).max(axis=2) < 40).mean() + 0.1


def test_two_draws_give_the_same_files(drawn, tmp_path):
    def contents(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    (tmp_path / "img_raw/dev").mkdir(parents=True)
    for name in ("dev-99-0-img0.jpg", "mine.jpg"):  # the first is one of another set's
        (tmp_path / "img_raw/dev" / name).write_bytes(b"")
    sample_cirr.make_set(tmp_path, 1, SIZES)
    left = contents(tmp_path)
    assert left.pop("img_raw/dev/mine.jpg") == b"" and left == contents(drawn)
    assert attributes(1) != attributes(2)


def test_make_sample_draws_it_once_and_spares_other_data(tmp_path, capsys):
    out, command = tmp_path / "cirr", ["--cirr", "--pictures", "64", "--out", str(tmp_path / "cirr")]
    make_sample.main(command)
    assert "train 60 pictures, 10 image sets, 110 queries; val 12 pictures, 2 image sets" in capsys.readouterr().out
    assert cirr.check(str(out), "cirr", train_cir.chance_text, log=lambda line: None) == 0
    picture = next((out / "img_raw/dev").iterdir())
    stamp = picture.stat().st_mtime_ns
    make_sample.main(command)
    assert "already holds this set" in capsys.readouterr().out and picture.stat().st_mtime_ns == stamp
    picture.unlink()
    make_sample.main(command)
    assert "already holds" not in capsys.readouterr().out and picture.exists()
    (out / "sample.json").unlink()
    write(out / "image_splits/split.rc2.val.json", {"dev-1-0-img0": "./dev/dev-1-0-img0.png"})  # CIRR's own are PNG
    with pytest.raises(SystemExit):
        make_sample.main(command)
    assert "holds another data set" in capsys.readouterr().err
    for damage in ("{", [], None):
        path = out / "image_splits/split.rc2.val.json"
        path.unlink() if damage is None else write(path, damage)
        assert sample_cirr.holds_other_data(out)
    assert not sample_cirr.holds_other_data(tmp_path / "nothing")
