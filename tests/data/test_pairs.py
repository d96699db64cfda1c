"""pytest tests/data/test_pairs.py

Reference-checked: a crop against torchvision's for the same box. Behaviour-checked: every layout, image numbers, what is
refused and how, views, and streams of tar files: each sample once over processes and workers, memory, damage.
"""

import io
import itertools
import json
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from data import pairs, rows, shards
from engine import loaders
from engine.errors import DataError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def streamed(stream, batch_size, workers):
    return loaders.load_stream(stream, shards.packed, batch_size, workers)


def refusal(*parts, call):
    """The text of the DataError that `call` raises; it must be one line and hold every one of `parts`."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable(), text
    for part in parts:
        assert str(part) in text, (part, text)
    return text


def draw(path, seed=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def coco(tmp_path):
    """A folder in COCO's Karpathy layout: 4 pictures of two captions, 2 of five."""
    folder, table = tmp_path / "coco", []
    for k in range(4):
        draw(folder / f"images/train2014/{k}.jpg", k)
        table += [{"caption": f"A {c}, number {k}.", "image": f"train2014/{k}.jpg", "image_id": f"coco_{k}"} for c in "xy"]
    write(folder / "coco_karpathy_train.json", table)
    held = [{"image": f"val2014/{k}.png", "caption": [f"view {k} {c}" for c in range(5)]} for k in range(2)]
    for k in range(2):
        draw(folder / f"images/val2014/{k}.png", 10 + k)
    write(folder / "coco_karpathy_val.json", held)
    return folder


@pytest.fixture
def vg(tmp_path):
    """A folder in Visual Genome's layout with the paths of another disk; 7.jpg is in both of its folders."""
    folder, away = tmp_path / "vg", "/export/share/datasets/vision/visual-genome/image/"
    names = ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/7.jpg", "VG_100K_2/7.jpg"]
    for k, name in enumerate(names):
        draw(folder / "images" / name, 20 + k)
    write(folder / "vg_caption.json", [{"image": away + name, "caption": f"Region {k}", "image_id": f"vg_{k}", "dataset": "vg"}
                                       for k, name in enumerate([*names, names[0]])])
    return folder


def read(places, split="train", said=None, **more):
    return pairs.read_sets({name: str(place) for name, place in places.items()}, split, workers=1,
                           log=(said if said is not None else []).append, **more)


# --- layouts ------------

def test_karpathy_files_give_a_pair_for_each_caption(coco):
    found = read({"coco": coco})
    assert [p.text for p in found[:3]] == ["a x, number 0", "a y, number 0", "a x, number 1"]
    assert found[0].image == str((coco / "images/train2014/0.jpg").resolve()) and found[0].name == "train2014/0.jpg"
    assert [p.line for p in found] == list(range(1, 9)) and {p.source for p in found} == {"coco"}
    held = read({"coco": coco}, "val")
    assert [p.text for p in held[:6]] == ["view 0 0", "view 0 1", "view 0 2", "view 0 3", "view 0 4", "view 1 0"]


def test_annotations_may_stand_in_a_folder_of_that_name_and_a_file_is_a_training_set(coco):
    (coco / "annotations").mkdir()
    for name in ("coco_karpathy_train.json", "coco_karpathy_val.json"):
        (coco / name).rename(coco / "annotations" / name)
    assert len(read({"coco": coco})) == 8 and len(read({"coco": coco}, "val")) == 10
    alone = coco / "annotations/coco_karpathy_train.json"
    assert len(read({"coco": alone}, val_share=0)) == 8
    assert len(read({"coco": alone})) + len(read({"coco": alone}, "val")) == 8


def test_plain_files_hold_a_caption_or_a_list_beside_their_pictures(tmp_path):
    draw(tmp_path / "a.jpg"), draw(tmp_path / "b.jpg")
    write(tmp_path / "train_captions.json", {"a.jpg": "One", "b.jpg": ["Two", "Three"]})
    write(tmp_path / "val_captions.json", {"b.jpg": "Four"})
    assert [(p.name, p.text) for p in read({"own": tmp_path})] == [("a.jpg", "one"), ("b.jpg", "two"), ("b.jpg", "three")]
    assert [p.text for p in read({"own": tmp_path}, "val")] == ["four"]


def test_paths_of_another_disk_are_found_by_file_name_and_folder(vg):
    said = []
    found = read({"vg": vg}, said=said, val_share=0)
    assert [os.path.relpath(p.image, (vg / "images").resolve()) for p in found] == [
        "VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/7.jpg", "VG_100K_2/7.jpg", "VG_100K/1.jpg"]
    assert all(p.name.startswith("/export/") and p.strong for p in found)
    assert "found by their file names" in said[0]
    (vg / "images/VG_100K/7.jpg").rename(vg / "images/7.jpg")
    (vg / "images/VG_100K_2/7.jpg").rename(vg / "images/VG_100K/8.jpg")
    draw(vg / "images/other/7.jpg")
    text = refusal("2 of 5 train captions (2 pictures)", "could be any of", "vg_caption.json, row 3",
                   call=lambda: read({"vg": vg}, val_share=0))
    assert "--skip-bad 0.41" in text
    outside = draw(vg / "elsewhere/1.jpg")
    (vg / "images/VG_100K/1.jpg").unlink()
    (vg / "images/VG_100K/1.jpg").symlink_to(outside)
    refusal("leaves", call=lambda: read({"vg": vg}, val_share=0))


def test_images_names_the_root_of_one_set_or_of_all(coco, vg):
    (coco / "images").rename(coco.parent / "pictures")
    refusal("is not there", call=lambda: read({"coco": coco}))
    assert len(read({"coco": coco}, images=str(coco.parent / "pictures"))) == 8
    assert len(read({"coco": coco, "vg": vg}, images={"coco": str(coco.parent / "pictures")})) == 13


@pytest.mark.parametrize("table, parts", [
    ([{"image": "a.jpg"}], ("row 1", "caption")), ([{"caption": "x"}], ("row 1", "image")),
    ([{"image": "a.jpg", "caption": "x"}, {"image": "a.jpg", "caption": [1.5, True, None]}], ("row 2", "not text")),
    ([{"image": "a.jpg", "caption": {"x": 1}}], ("row 1", "not text")), ("[", ("not JSON",)), ({}, ("no captions",)),
    ("[]", ("empty",)),
    ([{"image": "../a.jpg", "caption": "x"}], ("'..'",)), ([{"image": "http://x/a.jpg", "caption": "x"}], ("URL",))])
def test_a_row_that_cannot_be_read_is_named(tmp_path, table, parts):
    draw(tmp_path / "a.jpg")
    write(tmp_path / "train_captions.json", table)
    refusal("train_captions.json", *parts, call=lambda: read({"x": tmp_path}, val_share=0))


def test_places_that_are_not_sets_are_refused(tmp_path, coco):
    assert pairs.named_places(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    refusal("NAME=PLACE", call=lambda: pairs.named_places(["data/coco"]))
    refusal("x stands for a and b", call=lambda: pairs.named_places(["x=a", "x=b"]))
    refusal("no such file or folder", call=lambda: read({"x": tmp_path / "nowhere"}))
    draw(tmp_path / "y/images/a.jpg")
    refusal("none of coco_karpathy_train.json", "it holds 'images'", call=lambda: read({"x": tmp_path / "y"}))
    write(coco / "train_captions.json", {"train2014/0.jpg": "x"})
    refusal("are both there", call=lambda: read({"coco": coco}))


# --- all sets together ------------

def test_image_numbers_are_one_for_all_captions_of_a_picture_over_all_sets(coco, vg):
    write(coco.parent / "again.json", [{"image": "./train2014//1.jpg", "caption": "again"}])
    places = {"coco": coco, "vg": vg, "again": coco.parent / "again.json"}
    found = read(places, images={"again": str(coco / "images")})
    by_image = {}
    for p in found:
        by_image.setdefault(p.image, set()).add(p.image_id)
    assert all(len(numbers) == 1 for numbers in by_image.values())
    assert len({p.image_id for p in found}) == len(by_image) == 8
    again = next(p for p in found if p.source == "again")
    assert again.image_id == next(p.image_id for p in found if p.name == "train2014/1.jpg") and again.name != "train2014/1.jpg"
    assert 0 <= min(p.image_id for p in found) and torch.tensor([p.image_id for p in found]).dtype == torch.int64
    assert {p.image_id for p in read(places, "val")}.isdisjoint(p.image_id for p in found)


def test_the_first_pictures_are_the_same_wherever_a_set_lies(coco, tmp_path):
    moved = shutil.copytree(coco, tmp_path / "elsewhere" / "coco")
    chosen = []
    for place in (coco, moved):
        found = read({"coco": str(place)})
        numbers = {pair.image_id: pair.name for pair in found}
        chosen.append([numbers[number] for number in pairs.first_pictures(found, 2)])
        assert sorted(numbers[number] for number in pairs.first_pictures(found, 99)) == sorted(set(numbers.values()))
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 2


def test_a_view_of_a_tar_s_sample_is_the_same_wherever_the_tar_lies(twenty, tmp_path):
    moved, sums = shutil.copytree(twenty[0], tmp_path / "moved"), []
    for place in (twenty[0], moved):
        stream, = streams(counted(place), processes=1)
        stream.set_epoch(0)
        sums.append([image.sum().item() for image, _ in itertools.islice(stream, 20)])
    assert sums[0] == sums[1] and len(set(sums[0])) > 10


def test_a_set_without_a_validation_file_is_for_training_alone(coco, vg):
    said = []
    assert {p.source for p in read({"coco": coco, "vg": vg}, "val", said)} == {"coco"}
    assert any("vg" in line and "training alone" in line for line in said)
    assert len(read({"coco": coco, "vg": vg})) == 13


def test_where_no_set_has_one_pictures_are_held_out_by_their_names(coco, vg):
    (coco / "coco_karpathy_val.json").unlink()
    write(coco.parent / "alias.json", [{"image": f"./train2014//{k}.jpg", "caption": f"alias {k}"} for k in range(4)])
    places, roots = {"coco": coco, "vg": vg, "alias": coco.parent / "alias.json"}, {"alias": str(coco / "images")}
    train, val = (read(places, split, images=roots, val_share=0.4) for split in ("train", "val"))
    assert len(train) + len(val) == 17 and len({p.image_id for p in val}) == 3  # 0.4 of 8
    assert not {p.image for p in train} & {p.image for p in val}
    backwards = read(dict(reversed(places.items())), "val", images=roots, val_share=0.4)
    assert {p.image for p in backwards} == {p.image for p in val}
    refusal("no set has a validation file", call=lambda: read(places, "val", images=roots, val_share=0))


def test_missing_pictures_and_empty_captions_stop_the_run_unless_they_are_few(coco):
    (coco / "images/train2014/3.jpg").unlink()
    (coco / "images/train2014/2.jpg").write_bytes(b"")
    table = json.loads((coco / "coco_karpathy_train.json").read_text())
    table[0]["caption"] = ' .!" '
    write(coco / "coco_karpathy_train.json", table)
    text = refusal("5 of 8 train captions (3 pictures)", "row 1: empty caption", "0 bytes", "is not there",
                   call=lambda: read({"coco": coco}))
    assert "--skip-bad 0.63" in text and text.count("2.jpg' has 0 bytes") == 1
    refusal("5 of 8", call=lambda: read({"coco": coco}, skip_bad=0.6))
    said = []
    left = read({"coco": coco}, said=said, skip_bad=0.63)
    assert [p.text for p in left] == ["a y, number 0", "a x, number 1", "a y, number 1"]
    assert sum(line.startswith("left out: ") for line in said) == 3 and "5 of 8" in said[-1]


def test_skip_bad_decodes_every_picture(coco):
    (coco / "images/train2014/1.jpg").write_bytes(b"no picture")
    assert len(read({"coco": coco})) == 8
    said = []
    assert len(read({"coco": coco}, said=said, skip_bad=0.25)) == 6 and "no picture in" in " ".join(said)


def test_fingerprint_sees_texts_names_and_sets_and_not_places(coco, tmp_path):
    found = read({"coco": coco})
    moved = [pairs.replace(p, image="/other", line=p.line + 1, file="x") for p in found]
    assert pairs.fingerprint(moved) == pairs.fingerprint(found)
    for change in ({"text": "z"}, {"name": "z"}, {"source": "z"}):
        assert pairs.fingerprint([pairs.replace(found[0], **change), *found[1:]]) != pairs.fingerprint(found)


def check(places, **more):
    said, places = [], {name: str(place) for name, place in places.items()}
    return pairs.check(places, workers=1, log=said.append, **more), "\n".join(said)


def test_check_says_what_is_there_and_fails_where_training_would(coco, vg):
    code, said = check({"coco": coco, "vg": vg})
    assert code == 0 and "8 captions of 4 pictures (4 with 2)" in said and "10 captions of 2 pictures (2 with 5)" in said
    assert said.endswith("training can start") and "more than one split" not in said
    write(coco / "coco_karpathy_val.json", [{"image": "train2014/0.jpg", "caption": ["x"]}])
    code, said = check({"coco": coco, "vg": vg})
    assert code == 0 and "in train and val: " in said and "1 pictures stand in more than one split" in said
    (coco / "images/train2014/1.jpg").write_bytes(b"no picture")
    (coco / "images/train2014/2.jpg").unlink()
    code, said = check({"coco": coco})
    assert code == 1 and "1 pictures missing, 1 broken, 0 captions empty" in said and said.endswith("training would fail")
    assert check({"coco": coco}, skip_bad=0.5)[0] == 0
    assert check({"coco": coco / "nowhere"})[0] == 1


# --- views ------------

@pytest.fixture(scope="module")
def photo():
    """Smooth, so that a mirrored or turned picture differs everywhere."""
    y, x = np.mgrid[:90, :120]
    return Image.fromarray(np.stack([2 * x, 2 * y, (x + y) % 256], -1).astype(np.uint8))


def view(photo, seed, caption="", strong=False, size=48):
    return pairs.train_view(photo, size, np.random.default_rng(seed), caption, strong)


@pytest.mark.parametrize("strong", [False, True])
def test_a_view_is_a_pure_function_of_its_arguments(photo, strong):
    before, state = np.asarray(photo).copy(), (torch.random.get_rng_state(), np.random.get_state()[1].copy())
    views = [view(photo, seed, strong=strong) for seed in range(6)]
    assert all(torch.equal(a, view(photo, seed, strong=strong)) for seed, a in enumerate(views))
    assert len({a.numpy().tobytes() for a in views}) == 6
    assert views[0].shape == (3, 48, 48) and views[0].dtype == torch.float32 and views[0].is_contiguous()
    assert np.array_equal(before, np.asarray(photo))
    assert torch.equal(state[0], torch.random.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])


def test_half_are_mirrored_but_never_where_the_caption_says_left_or_right(photo):
    def mirrored(caption):
        views = [view(photo, seed, caption, size=16) for seed in range(200)]
        return [bool(v[0, :, 0].mean() > v[0, :, -1].mean()) for v in views]

    assert 70 < sum(mirrored("a dog")) < 130
    assert sum(mirrored("a dog on the left")) == sum(mirrored("the rightmost dog")) == 0


def test_crops_are_those_of_torchvision(photo):
    boxes = [pairs.crop_box(*photo.size, np.random.default_rng(seed)) for seed in range(300)]
    shares = [(right - left) * (b - t) / (120 * 90) for left, t, right, b in boxes]
    ratios = [(right - left) / (b - t) for left, t, right, b in boxes]
    assert all(0 <= left < right <= 120 and 0 <= t < b <= 90 for left, t, right, b in boxes)
    assert 0.49 < min(shares) < 0.53 and 0.9 < max(shares) <= 1 and 0.73 < min(ratios) < 0.8 and 1.28 < max(ratios) < 1.36
    assert len({left for left, _, _, _ in boxes}) > 20 and len({t for _, t, _, _ in boxes}) > 20
    assert pairs.crop_box(400, 100, np.random.default_rng(0)) == (133, 0, 266, 100)  # no such part fits: the middle
    assert pairs.crop_box(100, 400, np.random.default_rng(0)) == (0, 133, 100, 266)
    left, top, right, bottom = boxes[0]
    bicubic = functional.InterpolationMode.BICUBIC
    crop = functional.resized_crop(photo, top, left, bottom - top, right - left, [48, 48], bicubic)
    assert torch.equal(view(photo, 0, "left"), rows.image_tensor(crop, 48))


def test_the_stronger_view_uses_each_operation_about_as_often_as_lavis(photo, monkeypatch):
    used, real = [], pairs.changed

    def noted(image, operation, sign):
        used.append((operation, sign))
        return real(image, operation, sign)

    monkeypatch.setattr(pairs, "changed", noted)
    for seed in range(500):
        view(photo, seed, size=8)
        assert not used
    for seed in range(1000):
        view(photo, seed, strong=True, size=8)
    counts = Counter(operation for operation, _ in used)
    assert 920 < len(used) < 1080 and set(counts) == set(pairs.OPERATIONS)
    assert 65 < min(counts.values()) <= max(counts.values()) < 140
    assert 400 < sum(sign > 0 for _, sign in used) < 600


def test_operations_do_what_they_are_named(photo):
    same = [name for name in pairs.OPERATIONS if np.array_equal(np.asarray(pairs.changed(photo, name, 1)), np.asarray(photo))]
    assert same == ["Identity", "Brightness", "Sharpness"]  # magnitude 5 of 10: a factor of 1
    pixels = np.asarray(photo).astype(int)
    for sign in (1, -1):
        sideways, down = (np.asarray(pairs.changed(photo, name, sign)).astype(int) for name in ("TranslateX", "TranslateY"))
        inner, moved = (slice(0, -5), slice(5, None)) if sign > 0 else (slice(5, None), slice(0, -5))
        assert np.array_equal(sideways[:, inner], pixels[:, moved]) and np.array_equal(down[inner], pixels[moved])
        sheared = np.asarray(pairs.changed(photo, "ShearX", sign)).astype(int)
        assert np.abs(sheared[40, 20:100, 0] - (pixels[40, 20:100, 0] + 2 * 0.15 * 40 * sign)).max() <= 2
        sheared = np.asarray(pairs.changed(photo, "ShearY", sign)).astype(int)
        assert np.abs(sheared[30:60, 40, 1] - (pixels[30:60, 40, 1] + 2 * 0.15 * 40 * sign)).max() <= 2
        turned = np.asarray(pairs.changed(photo, "Rotate", sign)).astype(int)
        assert tuple(turned[0, 0]) == pairs.GREY and np.abs(turned[45, 60] - pixels[45, 60]).max() <= 2
    dull = Image.fromarray((np.asarray(photo) // 4 + 90).astype(np.uint8))
    assert all(np.ptp(np.asarray(pairs.changed(dull, name, 1))) == 255 for name in ("AutoContrast", "Equalize"))


def test_a_picture_from_memory_is_read_as_from_its_file(tmp_path):
    path = draw(tmp_path / "a.png")
    assert rows.load_image("x", file=io.BytesIO(path.read_bytes())).tobytes() == rows.load_image(path).tobytes()
    refusal("here.jpg: no picture in", "b'<html>'", call=lambda: rows.load_image("here.jpg", file=io.BytesIO(b"<html>")))
    refusal("here.jpg: no picture in", call=lambda: rows.load_image("here.jpg", file=io.BytesIO(b"")))
    refusal("here.png: cannot be read", call=lambda: rows.load_image("here.png", file=io.BytesIO(path.read_bytes()[:-400])))
    Image.open(path).save(tmp_path / "a.pcx")
    refusal("no picture in", call=lambda: rows.load_image("here.jpg", file=io.BytesIO((tmp_path / "a.pcx").read_bytes())))
    refusal("over 10 pixels", call=lambda: rows.load_image("here.png", 10, io.BytesIO(path.read_bytes())))


# --- shards ------------

@pytest.fixture(autouse=True)
def package(request):
    if "shard" in request.node.name:
        pytest.importorskip("webdataset", reason="tar files are read with webdataset: pip install webdataset")


def encoded(seed, kind="PNG", size=(6, 5)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def pack(path, members):
    """Write {name: bytes} as a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def sample_members(first, count, start=""):
    """Members of samples with captions "number N": texts and JSON in turn."""
    members = {}
    for n in range(first, first + count):
        members[f"{start}{n:05}.{'png' if n % 2 else 'JPG'}"] = encoded(n, "PNG" if n % 2 else "JPEG")
        caption = {"caption" if n % 4 else "text": f"Number {n}.", "width": 6}
        text = f"Number {n}." if n % 3 else json.dumps(caption)
        members[f"{start}{n:05}.{'txt' if n % 3 else 'json'}"] = text.encode()
    return members


def make_shards(folder, count, each=None):
    first = 0
    for k in range(count):
        size = each or 13 + k % 5
        pack(folder / f"cc-{k:03}.tar", sample_members(first, size))
        first += size
    return first


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """(folder of 20 tar files of 13 to 17 samples, number of samples), not to be written to."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, make_shards(folder, 20)


def counted(place, said=None, **more):
    return shards.count_samples(shards.shard_files(str(place)), "cc", log=(said if said is not None else []).append, **more)


def streams(found, processes=2, **more):
    return [shards.ShardStream(found, 8, 3, rank, processes, buffer=20, **more) for rank in range(processes)]


def seen(stream, epoch, workers):
    """[[Pair] of each process's loader], in order; every picture good."""
    stream.set_epoch(epoch)
    order = []
    for images, found, faults in streamed(stream, 4, workers):
        assert not faults and images.shape == (len(found), 3, 8, 8)
        order += found
    return order


@pytest.mark.parametrize("processes, workers", [(2, 2), (1, 0), (3, 1), (11, 0), (24, 0)])
def test_shard_samples_come_exactly_once_over_processes_and_workers(twenty, processes, workers):
    folder, total = twenty
    found = counted(folder)
    order = [[p.text for p in seen(stream, 0, workers)] for stream in streams(found, processes)]
    assert sorted(text for part in order for text in part) == sorted(f"number {n}" for n in range(total))
    assert max(map(len, order)) - min(map(len, order)) <= 1
    steps = shards.steps_per_epoch(found, 4, processes)
    assert steps == min(len(part) // 4 for part in order)


def test_the_order_of_shards_is_one_for_an_epoch_and_another_for_the_next(twenty):
    found = counted(twenty[0])
    stream = streams(found)[1]
    first, again, second = (seen(stream, epoch, 2) for epoch in (0, 0, 1))
    assert first == again and first != second and {p.text for p in first} != {p.text for p in second}
    assert len({p.image_id for p in first}) == len(first)
    both = {p.text: p.image_id for p in second}
    assert all(both.get(p.text, p.image_id) == p.image_id for p in first)
    numbers = [int(p.text.split()[1]) for p in first]
    assert sum(abs(a - b) == 1 for a, b in zip(numbers, numbers[1:])) < len(numbers) / 4  # not as they stand in the file


def test_views_of_shard_samples_depend_on_the_epoch_and_not_on_who_reads_them(twenty):
    found = counted(twenty[0])[:2]

    def views(processes, epoch, **more):
        result = {}
        for stream in streams(found, processes, **more):
            stream.set_epoch(epoch)
            result |= {pair.text: image for image, pair in stream}
        return result

    one, two, later = views(1, 0), views(2, 0), views(1, 1)
    assert all(torch.equal(one[text], two[text]) for text in one)
    assert sum(torch.equal(one[text], later[text]) for text in one) < len(one) / 3  # few crops of so small a picture differ
    plain = views(1, 0, augment=False)
    expected = rows.image_tensor(rows.load_image("x", file=io.BytesIO(encoded(1))), 8)
    assert torch.equal(plain["number 1"], expected) and torch.equal(plain["number 1"], views(1, 1, augment=False)["number 1"])


def test_shard_steps_are_what_arrives(twenty):
    found = counted(twenty[0])
    for batch_size, workers in ((7, 2), (5, 0)):
        steps = shards.steps_per_epoch(found, batch_size, 2)
        for stream in streams(found):
            batches = list(shards.batches_of(streamed(stream, batch_size, workers), batch_size, steps, list))
            assert [len(batch) for batch in batches] == [batch_size] * steps
            texts = [pair.text for batch in batches for _, pair in batch]
            assert len(set(texts)) == len(texts) == steps * batch_size
    loaded = iter([([], [], []), ([1, 2], ["a", "b"], []), ([3], ["c"], []), ([4], ["d"], [])])
    assert list(shards.batches_of(loaded, 2, 1, list)) == [[(1, "a"), (2, "b")]] and len(list(loaded)) == 2  # reads no further
    assert shards.steps_per_epoch(found, 149, 2) == 1
    refusal("no batch of 151 for each of 2", call=lambda: shards.steps_per_epoch(found, 151, 2))


def test_places_of_shards(twenty, tmp_path):
    folder = twenty[0]
    assert shards.is_shards(str(folder)) and shards.is_shards("cc/{000..331}.tar") and shards.is_shards("a.tar")
    assert not shards.is_shards(str(tmp_path)) and not shards.is_shards("data/coco.json")
    pattern = str(folder / "cc-{003..005}.tar")
    assert [os.path.basename(path) for path in shards.shard_files(pattern)] == ["cc-003.tar", "cc-004.tar", "cc-005.tar"]
    refusal("1 of 3 shards are not there", "cc-020.tar", call=lambda: shards.shard_files(str(folder / "cc-{018..020}.tar")))
    for place in ("http://x/{0..3}.tar", f"pipe:touch {tmp_path}/ran{{0..1}}.tar"):
        refusal("read from disk", call=lambda: shards.shard_files(place))
    assert not list(tmp_path.iterdir())


def test_shards_are_counted_once(twenty, tmp_path, monkeypatch):
    folder, total = twenty
    copies = [pack(tmp_path / f"{k}.tar", sample_members(k, 2 + k)) for k in range(3)]
    cache, calls, real = tmp_path / "counts.json", [], shards.count
    monkeypatch.setattr(shards, "count", lambda path: (calls.append(path), real(path))[1])
    assert [s.samples for s in counted(tmp_path, cache=cache)] == [2, 3, 4] and len(calls) == 3
    assert [s.samples for s in counted(tmp_path, cache=cache)] == [2, 3, 4] and len(calls) == 3
    pack(copies[1], sample_members(0, 7))
    assert [s.samples for s in counted(tmp_path, cache=cache)] == [2, 7, 4] and len(calls) == 4
    os.utime(copies[1], ns=(5, 5))
    counted(tmp_path, cache=cache)
    assert len(calls) == 5
    pack(copies[1], sample_members(0, 17))
    os.utime(copies[1], ns=(5, 5))
    assert [s.samples for s in counted(tmp_path, cache=cache)] == [2, 17, 4] and len(calls) == 6
    cache.write_text("[1, 2")
    assert [s.samples for s in counted(tmp_path, cache=cache)] == [2, 17, 4] and len(calls) == 9
    assert sum(s.samples for s in counted(folder)) == total


def cut_at(path, place):
    path.write_bytes(path.read_bytes()[:place])


def damage_header(path):
    """Spoil the header of the fifth member, which tarfile takes for the end."""
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[place + 10] ^= 1
    path.write_bytes(data)


DAMAGE = {"within a member": lambda path: cut_at(path, 700), "between members": lambda path: cut_at(path, 2048),
          "within a header": lambda path: cut_at(path, 2148), "a header": damage_header,
          "no tar": lambda path: path.write_bytes(b"<html>" * 400), "empty": lambda path: path.write_bytes(b""),
          "no samples": lambda path: pack(path, {"a.bin": b"1", "b.x.jpg": b"2"}) and None,
          "twice the same": lambda path: pack(path, {"a.jpg": b"1", "a.JPG": b"2"}) and None}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_shard_is_named_and_left_out_only_on_request(tmp_path, name):
    make_shards(tmp_path, 3)
    DAMAGE[name](tmp_path / "cc-001.tar")
    refusal("cc-001.tar", "--skip-broken", call=lambda: counted(tmp_path))
    said = []
    found = counted(tmp_path, said, skip_broken=True)
    assert [os.path.basename(s.path) for s in found] == ["cc-000.tar", "cc-002.tar"]
    assert "left out: " in said[0] and "cc-001.tar" in said[0]
    assert len(seen(streams(found, 1)[0], 0, 0)) == 13 + 15
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(b"")
    refusal("all of the 3 shards", call=lambda: counted(tmp_path, skip_broken=True))


BROKEN = {"truncated picture": ("00003.png", encoded(3)[:-30], "cannot be read"),
          "no picture": ("00003.png", b"<html>", "no picture in"), "caption alone": ("00003.png", None, "no picture: a jpg"),
          "no caption": ("00003.json", None, "no caption"),
          "empty caption": ("00003.json", b'{"caption": " . "}', "empty caption"),
          "no text": ("00003.json", b'{"caption": ["x"]}', "not text"), "no JSON": ("00003.json", b"{", "not JSON"),
          "a list": ("00003.json", b"[1]", "no object"), "latin-1": ("00004.txt", b"caf\xe9", "not UTF-8"),
          "no key": ("00003.json", b'{"x": "y"}', "'text' for the caption")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_of_a_shard_is_named_and_left_out_only_on_request(tmp_path, name):
    member, data, expected = BROKEN[name]
    members = sample_members(0, 10) | {member: data}
    pack(tmp_path / "a.tar", {key: data for key, data in members.items() if data is not None})
    found = counted(tmp_path)
    assert found[0].samples == 10 and shards.steps_per_epoch(found, 3) == 3
    stream, said = streams(found, 1)[0], []
    faults = [(image, pair) for image, pair in stream if isinstance(image, DataError)]
    (error, pair), = faults
    assert all(part in str(error) for part in (expected, "a.tar", member[:5])) and len(str(error).splitlines()) == 1
    assert pair.name == member[:5]
    batches = iter(shards.batches_of(streamed(stream, 3, 0), 3, 3, lambda batch: {"texts": [p.text for _, p in batch]}))
    with pytest.raises(loaders.LoaderError, match="a.tar.*--skip-broken"):
        for _ in range(4):
            loaders.next_batch(batches, "cpu")
    batches = list(shards.batches_of(streamed(stream, 3, 0), 3, 3, list, True, said.append))
    texts = [pair.text for batch in batches for _, pair in batch]
    assert len(set(texts)) == len(texts) == 9 and any(expected in line for line in said)


def test_too_many_broken_samples_of_a_shard_still_give_every_process_its_steps(tmp_path):
    members = sample_members(0, 12) | {f"{n:05}.{'png' if n % 2 else 'JPG'}": b"broken" for n in range(3, 12)}
    pack(tmp_path / "a.tar", members)
    found, said = counted(tmp_path), []
    stream = streams(found, 1)[0]
    batches = list(shards.batches_of(streamed(stream, 2, 2), 2, 6, list, True, said.append))
    assert [len(batch) for batch in batches] == [2] * 6
    assert {pair.text for batch in batches for _, pair in batch} == {"number 0", "number 1", "number 2"}
    assert said[-1].startswith("9 broken")
    refusal("no batch of 4", call=lambda: list(shards.batches_of(streamed(stream, 4, 0), 4, 3, list, True, said.append)))


def test_a_shard_that_changes_under_way_is_named(tmp_path):
    make_shards(tmp_path, 2)
    found = counted(tmp_path)
    for spoil in (lambda path: pack(path, sample_members(0, 4)), lambda path: cut_at(path, 3000), os.unlink):
        spoil(tmp_path / "cc-000.tar")
        faults = [image for image, _ in streams(found, 1)[0] if isinstance(image, DataError)]
        assert len(faults) == 1 and "cc-000.tar: cannot be read after" in str(faults[0])


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_member_of_a_shard_is_unpickled_unpacked_or_taken_for_a_path(tmp_path):
    trap = pickle.dumps(Trap(str(tmp_path / "sprung")))
    members = {"first.pyd": trap, **sample_members(0, 1, "../../up/"), "trap.png": trap, "trap.txt": trap}
    for suffix in ("pyd", "pickle", "pkl", "pth", "npy", "cbor", "jpg.pyd"):
        members[f"../../up/00000.{suffix}"] = trap
    pack(tmp_path / "in/a.tar", members)
    with tarfile.open(tmp_path / "in/a.tar", "a") as tar:
        link = tarfile.TarInfo("secret.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    found = counted(tmp_path / "in")
    fault, (image, pair) = sorted(streams(found, 1)[0], key=lambda sample: sample[1].text)
    assert image.shape == (3, 8, 8) and pair.text == "number 0" and pair.image == "" and found[0].samples == 2
    assert isinstance(fault[0], DataError) and fault[1].name == "trap"
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path / "sprung").exists()


def test_a_member_of_a_shard_that_claims_to_be_huge_is_not_read(tmp_path):
    entry = tarfile.TarInfo("00000.jpg")
    entry.size = 2**40
    (tmp_path / "a.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    refusal("over 268,435,456", call=lambda: counted(tmp_path))


PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data import shards
found = shards.count_samples(shards.shard_files(sys.argv[2]), "cc", log=lambda line: None)
count = sum(1 for _ in shards.ShardStream(found, 8, 0, buffer=10, augment=False))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path, forker):
    """Shards of 4 MB each: if they stayed, twenty would take 60 MB more than five."""
    peaks = {}
    for count in (5, 20):
        folder = tmp_path / str(count)
        for k in range(count):
            pack(folder / f"{k:02}.tar", {f"{n}.{s}": d for n in range(4) for s, d in (
                ("png", encoded(n) + bytes(2**20)), ("txt", b"big"))})
        done, = forker.run(["-c", PEAK, ROOT, folder])
        assert done.returncode == 0, done.stderr[-2000:]
        seen_now, peaks[count] = map(int, done.stdout.split())
        assert seen_now == 4 * count
    assert peaks[20] - peaks[5] < 15, peaks


def test_check_reads_every_sample_of_the_shards(twenty, tmp_path):
    said = []
    assert shards.check({"cc": str(twenty[0])}, log=said.append) == 0 and f"{twenty[1]} of {twenty[1]} samples" in said[-1]
    pack(tmp_path / "a.tar", sample_members(0, 5) | {"00001.png": b"x"})
    assert shards.check({"cc": str(tmp_path)}, log=said.append) == 1 and "4 of 5 samples" in said[-1] and "'00001'" in said[-2]
    assert shards.check({"cc": str(tmp_path)}, True, said.append) == 0
    assert shards.check({"cc": str(tmp_path / "nowhere.tar")}, log=said.append) == 1 and "not there" in said[-1]


def test_shards_without_the_package_say_how_to_get_it(twenty, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    refusal("pip install webdataset", call=lambda: shards.count_samples([str(twenty[0] / "cc-000.tar")], "cc"))
