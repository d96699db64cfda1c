"""pytest tests/test_efficientnet_pretrain.py: the style classifier's data layouts, sampling, scores, checkpoints, resume, faults.

Scores and sampling are checked against values computed by hand, the rest by behaviour. Pictures are 32 px patches of one colour.
"""

import argparse
import csv
import os
import pathlib
import re
import shutil
import signal
import sys
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

import conftest  # noqa: F401  (sets the import path)
import core
import efficientnet_pretrain as pretrain
import engine.confusion
import engine.probe
import engine.run
from data import rows, wikiart
from engine import checkpoints, errors, loaders, loop, runfolder
from engine.confusion import class_table, draw_confusion, per_class
from engine.errors import DataError
from engine.probe import PENALTIES, best_penalty, fit_logistic
from engine.run import Step
from timm.utils import ModelEmaV3
from test_cir import draw_curves_once

ARCH = "test_efficientnet"
STYLES = {"Cubism": (200, 40, 40), "Pop_Art": (40, 200, 40), "Ukiyo_e": (40, 40, 200)}  # folder: colour
COUNTS = {"Cubism": 8, "Pop_Art": 4, "Ukiyo_e": 2}  # training pictures; two each for validation
WIKIART = pathlib.Path(__file__).resolve().parents[2] / "shared/data/wikiart_csv"


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """One thread, since the net is so small that a second costs more than it brings; a row of the log every second step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.run, "LOG_EVERY", 2)
        yield
    torch.set_num_threads(threads)


def picture(path, colour=(90, 90, 90), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-30, 30, (32, 32, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_artgan(folder):
    """ArtGAN's layout: 14 training and 6 validation pictures of three styles."""
    tables = {"train": [], "val": []}
    for index, (style, colour) in enumerate(STYLES.items()):
        for n in range(COUNTS[style] + 2):
            picture(folder / style / f"p{n}.jpg", colour, seed=100 * index + n)
            tables["train" if n < COUNTS[style] else "val"].append(f"{style}/p{n}.jpg,{index}\n")
    for split, lines in tables.items():
        (folder / f"style_{split}.csv").write_text("".join(lines))
    (folder / "style_class.txt").write_text("".join(f"{i} {style}\n" for i, style in enumerate(STYLES)))
    return folder


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """curves.png and confusion.png take longer to draw than such a run to train: only `finished` has them."""
    monkeypatch.setattr(runfolder, "draw_curves", lambda *args: None)
    monkeypatch.setattr(engine.confusion, "draw_confusion", lambda confusion, classes, path, title: path.write_bytes(b"not drawn here"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_artgan(tmp_path_factory.mktemp("artgan") / "data")


@pytest.fixture
def data(source, tmp_path):
    """A copy that may be spoiled."""
    return pathlib.Path(shutil.copytree(source, tmp_path / "data"))


def flags(data, out="run", *more):
    return ["--data", str(data), "--arch", ARCH, "--size", "32", "--epochs", "2", "--batch-size", "2", "--lr", "1e-3",
            "--workers", "0", "--precision", "no", "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """(Run, Parts, folder) of an undisturbed run with everything random switched on."""
    out, prepare, made = tmp_path_factory.mktemp("runs") / "whole", pretrain.prepare, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "prepare", lambda *args: made.append(prepare(*args)) or made[0])
        draw_curves_once(patch)
        run = pretrain.train(pretrain.get_args(flags(source, out, "--save-last", "--accumulation", "2", "--mixup", "0.3")))
    assert run is made[0][0] and not run.stop.number
    return *made[0], out


def read(data, *more):
    said = []
    classes, splits = pretrain.read_data(pretrain.get_args(flags(data, "x", *more)), said.append)
    return classes, splits, "\n".join(said)


# --- data ------------

def test_artgan(data):
    classes, splits, said = read(data)
    assert classes == ["Cubism", "Pop Art", "Ukiyo-e"]
    assert [len(splits[s]) for s in ("train", "val")] == [14, 6]
    assert Counter(r.style for r in splits["train"]) == {"Cubism": 8, "Pop Art": 4, "Ukiyo-e": 2}
    assert all(pathlib.Path(r.image).parent.name == {v: k for k, v in zip(STYLES, classes)}[r.style] for r in splits["train"])
    assert splits["train"][3].line == 4 and "3 of 3 classes" in said


@pytest.mark.skipif(not WIKIART.is_dir(), reason="ArtGAN's own lists are not here")
def test_artgans_own_lists_have_our_classes_in_our_order():
    classes, found = wikiart.read_artgan(str(WIKIART))
    assert classes == wikiart.WIKIART[:27]
    assert [len(found[s]) for s in ("train", "val")] == [57025, 24421]
    assert Counter(style for _, style, _, _ in found["train"])["Action Painting"] == 69


@pytest.mark.parametrize("listed, there", [
    ("Art_Nouveau/a.jpg", "Art_Nouveau_Modern/a.jpg"), ("Art_Nouveau_Modern/a.jpg", "Art_Nouveau/a.jpg"),
    ("Ukiyo-e/a.jpg", "Ukiyo_e/a.jpg"), ("Art_Nouveau/caf\u00e9.jpg", "Art_Nouveau_Modern/cafe.jpg"),
    ("Cubism/caf\u00e9.jpg", "Cubism/cafe\u0301.jpg"), ("Cubism/cafe\u0301.jpg", "Cubism/caf\u00e9.jpg"),
    ("Cubism/caf\u00e9.jpg", "Cubism/cafe.jpg"), ("Cubism/cafe.jpg", "Cubism/caf\u00e9.jpg"),
    ("Cubism/caf\u00e3\u00a9.jpg", "Cubism/caf\u00e9.jpg"), ("Cubism/caf\u00e3\u00a9.jpg", "Cubism/caf#U00e3#U00a9.jpg")])
def test_folders_and_names_that_differ(tmp_path, listed, there):
    picture(tmp_path / there)
    picture(tmp_path / "Cubism/other.jpg")
    row, = wikiart.make_rows([(listed, "x", "list.csv", 1)], str(tmp_path))
    assert not row.fault and os.path.samefile(row.image, tmp_path / there)


def test_a_name_that_could_be_two_pictures_is_a_fault(tmp_path):
    for name in ("caf\u00e8.jpg", "caf\u00e9.jpg"):
        picture(tmp_path / "Cubism" / name)
    row, = wikiart.make_rows([("Cubism/cafe.jpg", "x", "list.csv", 1)], str(tmp_path))
    assert "not there" in row.fault and not row.image


def test_folders_with_train_and_val(tmp_path):
    for n, place in enumerate(("train/Art_Nouveau_Modern", "train/My_Style", "valid/Art_Nouveau_Modern", "valid/My_Style")):
        picture(tmp_path / place / f"{n}.png")
    (tmp_path / "train/My_Style/notes.txt").write_text("no picture")
    classes, splits, _ = read(tmp_path)
    assert classes == ["Art Nouveau", "My Style"]
    assert {s: [(r.name, r.style) for r in found] for s, found in splits.items()} == {
        "train": [("train/Art_Nouveau_Modern/0.png", "Art Nouveau"), ("train/My_Style/1.png", "My Style")],
        "val": [("valid/Art_Nouveau_Modern/2.png", "Art Nouveau"), ("valid/My_Style/3.png", "My Style")]}
    shutil.rmtree(tmp_path / "valid")
    with pytest.raises(DataError, match="only one of train/ and val/"):
        read(tmp_path)


@pytest.mark.parametrize("train, val", [("train", "val"), ("Train", "Val"), ("TRAIN", "Validation"), ("Train", "test")])
def test_folders_of_splits_in_any_case(tmp_path, train, val):
    for n, folder in enumerate((train, val)):
        for style in ("A", "B"):
            picture(tmp_path / folder / style / "1.png", seed=10 * n + (style == "B"))
    _, splits, _ = read(tmp_path)
    assert {side: sorted(r.name for r in found) for side, found in splits.items()} == {
        "train": [f"{train}/A/1.png", f"{train}/B/1.png"], "val": [f"{val}/A/1.png", f"{val}/B/1.png"]}


def test_plain_folders_are_split_by_hash_within_each_style(tmp_path):
    for style, count in (("Big", 20), ("Pair", 2), ("Single", 1)):
        for n in range(count):
            picture(tmp_path / style / f"{n}.png", seed=100 * len(style) + n)
    _, splits, said = read(tmp_path, "--val-share", "0.2")
    assert "copies" not in said
    names = {s: {r.name for r in found} for s, found in splits.items()}
    assert not names["train"] & names["val"] and len(names["train"] | names["val"]) == 23
    counts = {split: Counter(r.style for r in found) for split, found in splits.items()}
    assert counts == {"train": {"Big": 16, "Pair": 1, "Single": 1}, "val": {"Big": 4, "Pair": 1}}
    shutil.rmtree(tmp_path / "Single")
    assert {r.name for r in read(tmp_path, "--val-share", "0.2")[1]["val"]} == names["val"]


def test_a_copy_stays_on_the_side_of_its_picture_in_another_style_too(tmp_path):
    """The pictures that have no copy are split as without any; of a style that has nothing but copies they follow theirs."""
    for style in ("A", "B"):
        for n in range(20):
            picture(tmp_path / style / f"{n}.png", seed=n + 100 * (style == "B"))
    names = {side: {r.name for r in found} for side, found in read(tmp_path, "--val-share", "0.2")[1].items()}
    assert len(names["val"]) == 8
    twice = [min(names["val"]), min(names["train"]), max(names["val"]), max(names["train"])]
    for number, name in enumerate(twice):
        for other in ("B", "C"):  # after all other names of B, and alone in C
            (tmp_path / other).mkdir(exist_ok=True)
            shutil.copy(tmp_path / name, tmp_path / other / f"z{number}.png")
    _, splits, said = read(tmp_path, "--val-share", "0.2")
    assert said.count("8 pictures are copies of others under another name, such as") == 1
    for side, found in splits.items():
        copied = {f"{other}/z{number}.png" for number, name in enumerate(twice) if name in names[side] for other in ("B", "C")}
        assert copied and {r.name for r in found} == names[side] | copied, side


def test_table_of_subsets(data):
    lines = ["artist,filename,subset"] + [f"x,{style}/p{n}.jpg,{('train', 'test', 'uncertain artist')[n % 3]}"
                                          for style in STYLES for n in range(4)]
    (data / "classes.csv").write_text("\n".join(lines))
    for name in ("style_train.csv", "style_val.csv", "style_class.txt"):
        (data / name).unlink()
    for place in (data, data / "classes.csv"):
        classes, splits, said = read(place)
        assert classes == ["Cubism", "Pop Art", "Ukiyo-e"] and [len(splits[s]) for s in ("train", "val")] == [6, 3]
        assert "left out the subsets uncertain artist 3" in said


@pytest.mark.parametrize("ending", [".csv", ".xlsx", ".parquet"])
def test_a_table_of_subsets_in_capitals_or_of_excel(data, ending):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"File Name": "x", "FileName": f"{style}/p{n}.jpg", "SUBSET": ("train", "test")[n % 2]}
                              for style in STYLES for n in range(4)])
    for name in ("style_train.csv", "style_val.csv", "style_class.txt"):
        (data / name).unlink()
    path = data / f"classes{ending}"
    writers = {".csv": frame.to_csv, ".xlsx": frame.to_excel, ".parquet": frame.to_parquet}
    writers[ending](path, index=False)
    for place in (data, path):
        classes, splits, said = read(place)
        assert classes == ["Cubism", "Pop Art", "Ukiyo-e"] and [len(splits[s]) for s in ("train", "val")] == [6, 6]
        assert "column FileName for the picture, SUBSET for the split" in said
    (data / f"classes{'.csv' if ending != '.csv' else '.xlsx'}").write_text("x")
    with pytest.raises(errors.DataError, match="classes.csv and .*could be the table: move all but one away"):
        read(data)


def test_photographs_are_a_class_of_their_own(data, tmp_path):
    for n in range(6):
        picture(tmp_path / f"photos/sub/{n}.jpg")
    table = data / "style_train.csv"
    table.write_text(table.read_text() * 4)  # 56 rows: two photographs; 6: one
    classes, splits, said = read(data, "--photos", str(tmp_path / "photos"))
    assert classes == ["Cubism", "Pop Art", "Ukiyo-e", "Photograph"] and "train: 2 photographs" in said
    photos = {s: [r.name for r in found if r.style == "Photograph"] for s, found in splits.items()}
    assert [len(photos[s]) for s in ("train", "val")] == [2, 1] and not set(photos["train"]) & set(photos["val"])
    assert read(data, "--photos", str(tmp_path / "photos"))[1]["train"] == splits["train"]
    for n in range(4):
        (tmp_path / f"photos/sub/{n}.jpg").unlink()
    with pytest.raises(DataError, match="2 photographs where 3 are wanted"):
        read(data, "--photos", str(tmp_path / "photos"))


def test_broken_pictures_are_listed_and_left_out(data, tmp_path, capsys):
    whole = (data / "Cubism/p1.jpg").read_bytes()
    (data / "Cubism/p1.jpg").write_bytes(whole[:len(whole) // 2])
    (data / "Cubism/p2.jpg").write_bytes(b"")
    (data / "Pop_Art/p4.jpg").unlink()  # of the validation split
    assert errors.exit_code(pretrain.main, flags(data, tmp_path / "run")) == 2
    assert "Cubism/p2.jpg" in capsys.readouterr().err  # the cut one shows only when it is decoded
    assert not pretrain.main(flags(data, tmp_path / "run", "--check-data")) and not (tmp_path / "run").exists()
    assert "3 broken pictures listed" in capsys.readouterr().out
    listed = [line.split("\t") for line in (data / "broken.txt").read_text().splitlines()]
    assert [name for name, _ in listed] == ["Cubism/p1.jpg", "Cubism/p2.jpg", "Pop_Art/p4.jpg"]
    assert all(reason for _, reason in listed)
    _, splits, said = read(data)
    assert [len(splits[s]) for s in ("train", "val")] == [12, 5]
    assert "train: 2 of 14 pictures left out" in said and "Cubism/p1.jpg, Cubism/p2.jpg" in said and "val: 1 of 6" in said
    (data / "Cubism/p1.jpg").write_bytes(whole)  # mended: the next check takes it off the list
    pretrain.main(flags(data, tmp_path / "run", "--check-data"))
    assert len(read(data)[1]["train"]) == 13
    for name in ("Cubism/p2.jpg", "Pop_Art/p4.jpg"):
        (data / name).write_bytes(whole)
    pretrain.main(flags(data, tmp_path / "run", "--check-data"))
    assert not (data / "broken.txt").read_text() and len(read(data)[1]["train"]) == 14


# --- sampling and augmentation ------------

def test_balanced_sampling():
    labels = [0] * 132 + [2] * 66 + [3] * 2  # no row of class 1
    for power, wanted in ((0.0, [132, 0, 66, 2]), (1.0, [67, 0, 66, 67]), (0.5, [104, 0, 73, 13])):
        # 0.5: 200 * (11.489, 8.124, 1.414) / 21.027 = 109.28, 77.27, 13.45, filled in below
        drawn = pretrain.balance_classes(labels, power, 7, 3)
        if power == 0.5:
            wanted = [109, 0, 78, 13]
        assert np.bincount(np.array(labels)[drawn], minlength=4).tolist() == pytest.approx(wanted, abs=1) and len(drawn) == 200
        times = np.bincount(drawn, minlength=200)
        for label in (0, 2, 3):  # within a class each row as often as any other, but for one
            of_class = times[np.array(labels) == label]
            assert of_class.max() - of_class.min() <= 1
    assert sorted(pretrain.balance_classes(labels, 0.0, 7, 3)) == list(range(200))
    same, other, seed = (pretrain.balance_classes(labels, 1.0, *numbers).tolist() for numbers in ((7, 3), (7, 4), (8, 3)))
    assert same == pretrain.balance_classes(labels, 1.0, 7, 3).tolist() and same != other and same != seed


def test_an_epoch_shows_every_style_equally_often(finished):
    run, parts, _ = finished
    for epoch in range(2):
        keys = [key for group, _ in run.plan(epoch) for key in group]
        assert all(when == epoch for _, when, _ in keys) and len({place for _, _, place in keys}) == len(keys)
    drawn = pretrain.balance_classes(parts.train.labels, 1.0, 42, 0)
    assert sorted(Counter(parts.train.labels[n] for n in drawn).values()) == [4, 5, 5]
    group, share = run.plan(0)[0]
    assert [key for _, keys in share for key in keys] == group and all(drawn[place] == n for n, _, place in group)


def test_a_picture_is_a_pure_function_of_seed_epoch_and_place(data):
    classes, splits, _ = read(data)
    paintings = pretrain.Paintings(splits["train"], classes, 32, 0.5, seed=3)
    first = paintings[(5, 0, 9)][0]
    torch.rand(7)
    assert torch.equal(paintings[(5, 0, 9)][0], first) and first.shape == (3, 32, 32) and first.dtype == torch.float32
    reseeded = pretrain.Paintings(splits["train"], classes, 32, 0.5, seed=4)
    for other in (paintings[(5, 1, 9)], paintings[(5, 0, 8)], reseeded[(5, 0, 9)]):
        assert not torch.equal(other[0], first)
    plain, label, row = paintings[5]
    assert torch.equal(plain, rows.image_tensor(rows.load_image(row.image), 32, rows.IMAGENET_MEAN, rows.IMAGENET_STD))
    assert label == classes.index(row.style)
    keys = [[(n, 0, n) for n in range(4)], [(n, 0, n) for n in range(4, 8)]]
    here, there = (list(loaders.load_batches(paintings, pretrain.collate, keys, workers)) for workers in (0, 2))
    assert all(torch.equal(a["images"], b["images"]) and torch.equal(a["labels"], b["labels"]) for a, b in zip(here, there))


def test_training_pixels_are_in_imagenets_normalisation(tmp_path):
    picture(tmp_path / "Cubism/a.png", (128, 128, 128))
    row, = wikiart.make_rows([("Cubism/a.png", "Cubism", "", 0)], str(tmp_path))
    pixels = pretrain.Paintings([row], ["Cubism"], 32, 0.75)
    augmented, plain = (torch.stack([pixels[key][0] for key in keys]).mean() for keys in ([(0, 0, p) for p in range(20)], [0]))
    assert augmented == pytest.approx(plain.item(), abs=0.1)


def test_mixing():
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous(), torch.tensor([0, 1, 2, 1])
    same, targets = pretrain.mix_batch(images, labels, 4, 0.0, 0.0)
    assert torch.equal(same, images) and torch.equal(targets, F.one_hot(labels, 4).float())
    for cutmix, mixup in ((1.0, 0.0), (0.0, 1.0)):
        loop.seed_everything(1)
        pixels, targets = pretrain.mix_batch(images, labels, 4, cutmix, mixup)
        assert torch.allclose(targets.sum(1), torch.ones(4)) and not torch.equal(pixels, images)
        own = targets[0, 0].item()  # the share that picture 0 keeps; the rest is picture 3's
        assert 0 < own < 1 and pixels[0].mean().item() == pytest.approx(3 * (1 - own), abs=1e-4)
        whole = set(pixels[0].unique().tolist()) <= {0.0, 3.0}
        assert whole if cutmix else not whole
    loop.seed_everything(1)
    kinds = [torch.equal(pretrain.mix_batch(images, labels, 4, 0.25, 0.25)[0], images) for _ in range(200)]
    assert 70 < sum(kinds) < 130


# --- scores ------------

def found(confusion):
    """evaluate's list for a confusion matrix; the rest of `best` is the classes in order."""
    cells = [(i, j) for i, line in enumerate(confusion) for j, count in enumerate(line) for _ in range(count)]
    return [{"row": n, "label": i, "loss": float(n), "best": [j, *(k for k in range(7) if k != j)][:5]}
            for n, (i, j) in enumerate(cells)]


def test_scores_by_hand():
    # classes 0, 1, 2 have 4, 2, 2 pictures; 3 to 6 none, but one picture is taken for 6
    confusion = [[3, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1], *[[0] * 7] * 4]
    numbers, matrix = pretrain.summary(found(confusion), 7)
    assert matrix.tolist() == confusion
    precision, recall, f1 = per_class(matrix)
    assert precision[:3] == pytest.approx([3 / 4, 1 / 3, 0]) and recall[:3] == pytest.approx([3 / 4, 1 / 2, 0])
    assert f1[:3] == pytest.approx([3 / 4, 2 / 5, 0])
    assert numbers == pytest.approx({"loss": 3.5, "top1": 4 / 8, "top5": 1.0, "f1": (3 / 4 + 2 / 5) / 3,
                                     "balanced": (3 / 4 + 1 / 2) / 3})
    for label, hit in ((6, 0.0), (4, 1.0)):
        one = [{"row": 0, "label": label, "loss": 1.0, "best": [0, 1, 2, 3, 4]}]
        assert pretrain.summary(one, 7)[0]["top5"] == hit
    table = class_table(matrix, list("ABCDEFG"), dict.fromkeys("ABCDEFG", 5))
    assert table[1] == ("A", 5, 4, "0.750", "0.750", "0.750", "B (1)") and table[4] == ("D", 5, 0, "0.000", "0.000", "0.000", "")


def test_confusion_picture_of_28_classes(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    confusion = np.diag(np.arange(28) + 1) + 27 * np.roll(np.eye(28, dtype=int), 1, 1)
    draw_confusion(confusion, wikiart.WIKIART, tmp_path / "confusion.png", "title")
    axis, = drawn[0].axes
    assert [t.get_text() for t in axis.get_xticklabels()] == wikiart.WIKIART
    assert axis.get_yticklabels()[1].get_text() == "Action Painting (29)"
    share = axis.images[0].get_array()
    assert np.allclose(share.sum(1), 1) and share[3, 3] == pytest.approx(4 / 31)
    assert "13" in {t.get_text() for t in axis.texts} and axis.get_ylabel().startswith("true")
    assert min(Image.open(tmp_path / "confusion.png").size) > 1000


# --- model and weights ------------

def test_average_follows_the_weights(finished):
    run, parts, _ = finished
    torch.manual_seed(0)
    net = timm.create_model(ARCH, num_classes=3)
    for decay, wanted in ((0.9999, 1 - 8 ** (-2 / 3)), (0.0, 0.0), (0.5, 0.5)):
        average = ModelEmaV3(net, decay=decay, use_warmup=True)
        before = average.module.classifier.bias.clone()
        with torch.no_grad():
            net.classifier.bias += 1
        average.update(net, 8)  # step 8: the warmed-up decay is 1 - 8^(-2/3)
        assert torch.allclose(average.module.classifier.bias, wanted * before + (1 - wanted) * net.classifier.bias)
    weights, averaged = run.model.state_dict(), parts.ema.module.state_dict()
    assert not torch.equal(weights["classifier.weight"], averaged["classifier.weight"])
    assert not torch.equal(weights["bn1.running_mean"], averaged["bn1.running_mean"]) and not parts.ema.module.training


def bare_run(data, *more):
    """(Run, Parts, args) before the first step, without noise: no dropout, drop-path, mixing, smoothing."""
    args = pretrain.get_args(flags(data, "x", "--dropout", "0", "--drop-path", "0", "--cutmix", "0", "--smoothing", "0", *more))
    run, parts = pretrain.prepare(args, Accelerator(cpu=True))
    pretrain.train_mode(run, args.freeze_bn)
    return run, parts, args


def step_on(run, parts, args, share):
    """The loss of one optimizer step without its update, on these micro-batches: [(number, keys)]."""
    group = [key for _, keys in share for key in keys]
    step = Step(run, 0, group, share, iter(loaders.load_batches(parts.train, pretrain.collate, [keys for _, keys in share], 0)))
    pretrain.train_step(run, step, args)
    return step.means()["loss"]


def test_overfits_a_batch(data):
    run, parts, args = bare_run(data, "--crop", "1", "--epochs", "10", "--lr", "1e-2", "--batch-size", "14", "--ema", "0")
    share = run.plan(0)[0][1]
    assert step_on(run, parts, args, share) == pytest.approx(np.log(3), abs=0.1)
    for _ in range(10):
        run.optimizer.zero_grad()
        last = step_on(run, parts, args, share)
        run.optimizer.step()
    assert last < 0.05


def test_accumulation_equals_the_large_batch(data):
    def gradients(sizes):
        run, parts, args = bare_run(data, "--freeze-bn")
        keys = iter([(n, 0, n) for n in range(12)])
        loss = step_on(run, parts, args, [(i, [next(keys) for _ in range(size)]) for i, size in enumerate(sizes)])
        return loss, [p.grad for p in run.model.parameters()]

    (loss, whole), (split_loss, split) = gradients((12,)), gradients((5, 5, 2))
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(whole, split))


def test_smoothing_and_dropout_are_used(data):
    for more in (["--smoothing", "0.5"], ["--dropout", "0.9"], ["--cutmix", "1"]):
        losses = []
        for extra in ([], more):
            run, parts, args = bare_run(data, *extra)
            losses.append(step_on(run, parts, args, run.plan(0)[0][1]))
        assert losses[0] != losses[1], more
    args = pretrain.get_args(flags("x", "x", "--arch", "tf_efficientnet_lite0", "--drop-path", "0.3"))
    net = pretrain.build(args, ["a"] * 5, print)
    assert 0.2 < max(getattr(module, "drop_prob", 0.0) for module in net.modules()) < 0.3


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm(data, frozen):
    run, parts, args = bare_run(data, *["--freeze-bn"][:frozen])
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    pretrain.rehearse(run, parts, args)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items()), "a rehearsal changes nothing"
    assert not any(p.grad is not None and p.grad.any() for p in run.model.parameters()) and run.step == 0
    step = next(run.steps(0))
    pretrain.train_step(run, step, args)
    step.update()
    parts.ema.update(run.model, run.step)
    after = run.model.state_dict()
    assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"]) is frozen
    assert not torch.equal(after["bn1.weight"], before["bn1.weight"])
    averaged = parts.ema.module.state_dict()  # the first step's decay is 0: a copy
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in after.items())


def test_init(tmp_path):
    torch.manual_seed(1)
    state = timm.create_model(ARCH, num_classes=5).state_dict()
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        for classes, kept in ((5, True), (3, False)):
            said = []
            args = pretrain.get_args(flags("x", "x", "--init", str(tmp_path / name)))
            net = pretrain.build(args, [str(n) for n in range(classes)], said.append)
            own = net.state_dict()
            assert all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith("classifier"))
            assert (own["classifier.weight"].shape == state["classifier.weight"].shape
                    and torch.equal(own["classifier.weight"], state["classifier.weight"])) is kept
            assert ("head of 5 classes is left out, the new one has 3" in "".join(said)) is not kept


# --- the probe ------------

def test_logistic_regression_is_at_its_minimum():
    """Two classes of 9 and 3 rows, weighed to equal shares: the gradient of the stated loss, written out here, is zero, and a
    feature's unit does not matter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 9 + [1] * 3)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64) + labels[:, None]
    weight, bias = fit_logistic(x, labels, 2, 1.0, 0.1)
    shares = torch.tensor([1 / 18] * 9 + [1 / 6] * 3, dtype=torch.float64)  # each class half of the loss
    wrong = shares[:, None] * ((x @ weight.T + bias).softmax(1) - F.one_hot(labels))  # [N,K]
    spread = x.std(0, correction=0)
    standardised = (x - x.mean(0)) / spread
    assert torch.allclose(wrong.T @ standardised + 0.1 * weight * spread, torch.zeros(2, 4, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(wrong.sum(0), torch.zeros(2, dtype=torch.float64), atol=1e-5)
    scaled, _ = fit_logistic(x * 1000 + 7, labels, 2, 1.0, 0.1)
    assert torch.allclose(scaled * 1000, weight, rtol=1e-3, atol=1e-5)


def test_penalty_follows_the_features(monkeypatch):
    """Features of pure noise want the heaviest penalty; a class told by one clear feature wants less."""
    monkeypatch.setattr(engine.probe, "FOLDS", 3)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert best_penalty(noise, labels, 3, 1.0, 42) == max(PENALTIES)
    assert best_penalty(noise + 8 * F.one_hot(labels, 20), labels, 3, 1.0, 42) < max(PENALTIES)


def test_probe_trains_the_head_alone(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine.probe, "FOLDS", 2)
    torch.manual_seed(1)
    state = timm.create_model(ARCH, num_classes=5).state_dict()
    save_file(state, tmp_path / "first.safetensors")
    run = pretrain.train(pretrain.get_args(flags(source, tmp_path / "run", "--probe", "--init", str(tmp_path / "first.safetensors"))))
    assert "logistic regression on features [14, 256]" in capsys.readouterr().out and run.progress["epoch"] == 1
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)["model"]
    assert all(torch.equal(best[n], t) for n, t in state.items() if not n.startswith("classifier"))
    net = core.EfficientNet28.from_checkpoint(tmp_path / "run/best.pt", safe=True).eval()
    classes, splits, _ = read(source)
    data = pretrain.Paintings(splits["train"], classes, 32)
    features = net.net.forward_head(net.net.forward_features(torch.stack([data[n][0] for n in range(len(data))])), pre_logits=True)
    guess = net.logits(features).argmax(1)
    assert (guess == torch.tensor(data.labels)).float().mean() > 0.9, "three colours are told apart"
    assert (tmp_path / "run/per_class.csv").exists() and (tmp_path / "run/confusion.png").exists()


def test_probe_needs_weights(capsys):
    with pytest.raises(SystemExit):
        pretrain.get_args(flags("x", "x", "--probe"))
    assert "--pretrained or --init" in capsys.readouterr().err


# --- runs ------------

@torch.no_grad()
def test_pixels_are_in_the_nets_own_normalisation(source, tmp_path):
    """timm feeds its tf_ and Lite nets with mean and std of 0.5: white is 1, in training, in validation and behind BLIP's pixels."""
    args = pretrain.get_args(flags(source, tmp_path / "run", "--arch", "tf_efficientnet_lite0"))
    run, parts = pretrain.prepare(args, Accelerator(cpu=True))
    white = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(white)
    for paintings in (parts.train, parts.val):
        paintings.rows = [rows.Row(str(white), "white.png", "", "", "", "Cubism", 1, "f")]
        assert torch.allclose(paintings[0][0], torch.ones(3, 32, 32), atol=1e-6)
    torch.save(pretrain.best_of(args, parts), tmp_path / "best.pt")
    net = core.EfficientNet28.from_checkpoint(tmp_path / "best.pt", safe=True)
    seen = []
    net.net.forward_features = lambda pixels: seen.append(pixels) or torch.zeros(1, net.width, 1, 1)
    blip = rows.image_tensor(Image.open(white), 32, rows.BLIP_MEAN, rows.BLIP_STD)
    net(blip[None])
    assert torch.allclose(seen[0], torch.ones(1, 3, 32, 32), atol=1e-5)
    torch.save({**pretrain.best_of(args, parts), "mean": "none"}, tmp_path / "odd.pt")
    with pytest.raises(DataError, match="odd.pt"):
        core.EfficientNet28.from_checkpoint(tmp_path / "odd.pt", safe=True)


def test_run_folder(finished):
    run, parts, out = finished
    held = {p.name for p in out.iterdir()}
    assert {"best.pt", "last.pt", "args.yaml", "training_log.csv", "curves.png", "confusion.png", "per_class.csv"} <= held
    assert not any(name.startswith(".") for name in held)
    best = torch.load(out / "best.pt", weights_only=True)
    assert len(best["pictures"]) == 14 and best["pictures"] == sorted(map(rows.picture_digest, (r.image for r in parts.train.rows)))
    assert {"model", "arch", "classes", "size", "mean", "std", "args", "metric", "value", "epoch", "torch", "timm"} <= best.keys()
    assert best["stage"] == "efficientnet" and best["metric"] == "f1" and best["classes"] == parts.classes
    assert best["mean"] == list(rows.IMAGENET_MEAN) and best["std"] == list(rows.IMAGENET_STD)
    assert best["args"]["size"] == best["size"] == 32 and best["arch"] == ARCH
    log = runfolder.read_log(out / "training_log.csv")
    steps = [r for r in log if r["kind"] == "step"]
    assert [(r["step"], r["epoch"]) for r in steps] == [("2", "1"), ("4", "2"), ("6", "2")]
    assert all(0.3 < float(r["loss"]) < 3 and float(r["grad_norm"]) > 0 for r in steps)
    assert float(steps[0]["lr"]) == pytest.approx(run.lr(1), rel=1e-4)
    log = [r for r in log if r["kind"] == "epoch"]
    assert [r["epoch"] for r in log] == ["1", "2"] and best["value"] == pytest.approx(max(float(r["f1"]) for r in log), rel=1e-4)
    assert float(log[best["epoch"] - 1]["f1"]) == pytest.approx(best["value"], rel=1e-4)
    assert all(0 <= float(r[name]) <= 1 for r in log for name in ("top1", "top5", "balanced"))
    with (out / "per_class.csv").open() as file:
        table = list(csv.DictReader(file))
    counts = [(r["class"], r["train"], r["val"]) for r in table]
    assert counts == [("Cubism", "8", "2"), ("Pop Art", "4", "2"), ("Ukiyo-e", "2", "2")]
    assert np.mean([float(r["f1"]) for r in table]) == pytest.approx(best["value"], abs=1e-3)


@torch.no_grad()
def test_best_pt_is_what_the_style_classifier_loads(finished):
    _, parts, out = finished
    net = core.EfficientNet28.from_checkpoint(out / "best.pt", safe=True).eval()
    assert net.arch == ARCH and net.num_classes == 3 and net.style_names() == ["Cubism", "Pop Art", "Ukiyo-e"]
    content = torch.load(out / "best.pt", weights_only=True)
    own = timm.create_model(ARCH, num_classes=3).eval()
    own.load_state_dict(content["model"])
    images = [rows.load_image(row.image) for row in parts.val.rows]
    ours = own(torch.stack([parts.val[n][0] for n in range(len(images))]))
    theirs = net.logits(net(torch.stack([rows.image_tensor(image, 32) for image in images])))  # BLIP's normalisation
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_averaged_weights_are_scored_and_saved(finished, tmp_path, monkeypatch):
    run, parts, out = finished
    scores = [pretrain.summary(pretrain.evaluate(net, parts.val, run.accelerator, 4, 0), 3)[0]
              for net in (run.model, parts.ema.module)]
    args = argparse.Namespace(batch_size=4, workers=0)
    assert pretrain.validate(run, parts, parts.val, args)[0] == scores[1] and scores[0]["loss"] != scores[1]["loss"]
    log = runfolder.read_log(out / "training_log.csv")
    assert float(log[-1]["loss"]) == pytest.approx(scores[1]["loss"], rel=1e-4)
    monkeypatch.setattr(run, "out", tmp_path)
    run.save_best()
    saved, weights = checkpoints.load_checkpoint(tmp_path / "best.pt")["model"], run.model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in parts.ema.module.state_dict().items())
    assert not torch.equal(saved["conv_stem.weight"], weights["conv_stem.weight"])


def test_best_pt_is_of_the_best_macro_f1(source, tmp_path, monkeypatch):
    values = iter([0.4, 0.6, 0.5, float("nan")])  # top-1 and loss get better all the time

    def validate(run, parts, data, args):
        value = next(values)
        return {"loss": 1 - run.step / 100, "top1": run.step / 100, "f1": value}, np.full((3, 3), run.step)

    monkeypatch.setattr(pretrain, "validate", validate)
    kept, save_best = [], engine.run.Run.save_best
    monkeypatch.setattr(engine.run.Run, "save_best", lambda run: (kept.append(run.model.classifier.bias.clone()), save_best(run)))
    arguments = flags(source, tmp_path / "run", "--epochs", "4", "--ema", "0")  # no average: the weights themselves are saved
    run = pretrain.train(pretrain.get_args(arguments))
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert torch.equal(best["model"]["classifier.bias"], kept[1]) and not torch.equal(kept[1], run.model.classifier.bias)
    assert (best["epoch"], best["value"], best["metric"]) == (2, 0.6, "f1") and best["confusion"][0][0] == 2 * run.per_epoch


def same(a, b):
    a, b = (checkpoints.load_checkpoint(path) for path in (a, b))
    return all(torch.equal(a[key][n], b[key][n]) for key in ("model", "state", "ema") if key in a for n in a[key])


@pytest.mark.parametrize("number, code, workers, at", [(signal.SIGINT, 130, "0", 4), (signal.SIGTERM, 143, "2", 2)])
def test_interrupted_and_resumed_equals_undisturbed(source, finished, tmp_path, monkeypatch, number, code, workers, at):
    *_, whole = finished
    arguments = flags(source, tmp_path / "cut", "--save-last", "--accumulation", "2", "--mixup", "0.3", "--workers", workers)
    step, calls = pretrain.train_step, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 1 + at:  # the rehearsal is the first
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(pretrain, "train_step", interrupt)
    assert pretrain.main(arguments) == code
    assert checkpoints.load_checkpoint(tmp_path / "cut/last.pt")["step"] == at and not (tmp_path / "cut/confusion.png").exists()
    monkeypatch.setattr(pretrain, "train_step", step)
    assert pretrain.main([*arguments, "--resume"]) is None
    assert same(whole / "best.pt", tmp_path / "cut/best.pt") and same(whole / "last.pt", tmp_path / "cut/last.pt")
    for name in ("training_log.csv", "per_class.csv"):
        assert (whole / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


TWO = """
import os, signal, sys
sys.path[:0] = {path!r}
import efficientnet_pretrain as script
def interrupted(run, *args):
    if os.environ["RANK"] == "0" and run.step == 1 and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGINT)
    return step(run, *args)
step, script.train_step = script.train_step, interrupted
sys.exit(script.errors.exit_code(script.main))
"""


def test_two_machines_without_a_shared_disk_resume_as_one(source, tmp_path, forker):
    """Ctrl-C on the first, whose disk alone has last.pt; then both go on, to what one process trains; batch norm frozen, dropout on.
    The variables are those that torchrun --nnodes 2 sets."""
    common = flags(source, "run", "--save-last", "--freeze-bn", "--mixup", "0.3", "--batch-size", "3")
    whole = pretrain.train(pretrain.get_args([*common, "--accumulation", "2", "--out", str(tmp_path / "whole")]))
    (tmp_path / "two.py").write_text(TWO.format(path=[p for p in sys.path if p]))
    machines = [tmp_path / rank for rank in "01"]
    for machine in machines:
        machine.mkdir()
    for more, code in ((), 130), (("--resume",), 0):
        done = forker.together([tmp_path / "two.py", *common, *more], machines=2, cwds=machines)
        assert [one.returncode for one in done] == [code, code], done
        assert (tmp_path / "0/run/last.pt").exists() and not (tmp_path / "1/run/last.pt").exists()
    assert "resuming after step 2 of" in done[0].stdout
    one, two = (checkpoints.load_checkpoint(place / "best.pt") for place in (whole.out, tmp_path / "0/run"))
    assert one["epoch"] == two["epoch"] and all(torch.allclose(one["model"][n], two["model"][n], atol=1e-4) for n in one["model"])


def test_resume_refuses_other_settings_and_data(data, tmp_path, capsys):
    arguments = flags(data, tmp_path / "run", "--save-last", "--epochs", "1")
    pretrain.main(arguments)
    capsys.readouterr()
    assert errors.exit_code(pretrain.main, arguments) == 2 and "already holds" in capsys.readouterr().err
    assert errors.exit_code(pretrain.main, [*arguments, "--resume", "--cutmix", "1"]) == 2
    assert "--cutmix is 1.0, was 0.5" in capsys.readouterr().err
    (data / "broken.txt").write_text("Cubism/p0.jpg\tbroken\n")
    assert errors.exit_code(pretrain.main, [*arguments, "--resume"]) == 2
    assert "training rows (hash)" in capsys.readouterr().err


def test_a_picture_that_breaks_during_training_is_named_and_nothing_is_lost(data, tmp_path, capsys, monkeypatch):
    step, calls = pretrain.train_step, []

    def spoil(*args):
        calls.append(1)
        if len(calls) == 3:
            for path in (data / "Ukiyo_e").glob("*.jpg"):
                path.write_bytes(b"no picture")
        return step(*args)

    monkeypatch.setattr(pretrain, "train_step", spoil)
    assert errors.exit_code(pretrain.main, flags(data, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "Ukiyo_e/p" in error and "--check-data" in error and "Traceback" not in error
    assert checkpoints.load_checkpoint(tmp_path / "run/last.pt")["step"] >= 1


# --- bad input: one line, exit code 2 ------------

def rewrite(name, change):
    return lambda data: (data / name).write_text(change((data / name).read_text()))


class Hostile:
    """Unpickling this makes a folder: stands for code in a foreign file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def other_net(data):
    torch.save({"fc.weight": torch.zeros(3, 4)}, data / "resnet.pt")
    return ["--init", str(data / "resnet.pt")]


def hostile(data):
    torch.save({"model": timm.create_model(ARCH, num_classes=3).state_dict(), "x": Hostile(data / "mark")}, data / "hostile.pt")
    return ["--init", str(data / "hostile.pt")]


def web_page(suffix):
    def write(data):
        (data / f"page{suffix}").write_text("<!DOCTYPE html><html>")
        return ["--init", str(data / f"page{suffix}")]
    return write


def table(text):
    """--data is a table of subsets with this text."""
    def write(data):
        (data / "t.csv").write_text(text)
        return ["--data", str(data / "t.csv")]
    return write


def list_all(data):
    (data / "broken.txt").write_text("".join(f"{style}/p{n}.jpg\tx\n" for style in STYLES for n in range(10)))


BAD = {  # what is spoiled: a function of the data folder that may return flags -> words of the message
    "missing folder": (lambda d: ["--data", str(d / "nowhere")], "there is no such file or folder"),
    "empty folder": (lambda d: ["--data", str((d / "empty").mkdir() or d / "empty")], "no STYLE/ folder with pictures"),
    "no training list": (lambda d: (d / "style_train.csv").unlink(), "style_train.csv"),
    "no validation list": (lambda d: (d / "style_val.csv").unlink(), "style_val.csv"),
    "empty list": (rewrite("style_train.csv", lambda t: ""), "style_train.csv: the file is empty"),
    "no class list": (lambda d: (d / "style_class.txt").unlink(), "style_class.txt"),
    "class list without index": (rewrite("style_class.txt", lambda t: t.replace("1 ", "")), "line 2: 'Pop_Art' is not"),
    "index twice": (rewrite("style_class.txt", lambda t: t.replace("1 ", "0 ")), "style_class.txt, line 2"),
    "index left out": (rewrite("style_class.txt", lambda t: t.replace("1 ", "7 ")), "indices must be 0 to 2"),
    "name twice": (rewrite("style_class.txt", lambda t: t.replace("Pop_Art", "cubism")), "names all different"),
    "index out of range": (rewrite("style_train.csv", lambda t: t.replace("p2.jpg,0", "p2.jpg,3")), "line 3: class 3, but"),
    "index is no number": (rewrite("style_train.csv", lambda t: t.replace("p2.jpg,0", "p2.jpg,-1")), "style_train.csv, line 3"),
    "no index": (rewrite("style_val.csv", lambda t: t.replace("p8.jpg,0", "p8.jpg")), "style_val.csv, line 1"),
    "header": (rewrite("style_train.csv", lambda t: "path,class\n" + t), "style_train.csv, line 1"),
    "missing picture": (lambda d: (d / "Cubism/p2.jpg").unlink(), "line 3: image 'Cubism/p2.jpg' is not there"),
    "picture of 0 bytes": (lambda d: (d / "Cubism/p2.jpg").write_bytes(b""), "'Cubism/p2.jpg' has 0 bytes"),
    "leaves the root": (rewrite("style_train.csv", lambda t: t.replace("Cubism/p2", "../p2")), "line 3: image '../p2.jpg'"),
    "all listed as broken": (list_all, "all are listed in"),
    "wrong image root": (lambda d: ["--images", str(d / "nowhere")], "check --images"),
    "no photographs": (lambda d: ["--photos", str(d / "nowhere")], "check --photos"),
    "table without subset": (table("filename\nA/b.jpg\n"), "no column 'subset'"),
    "table without any column": (table("file,split\nA/b.jpg,train\n"),
                                 "no column 'filename' for the picture and no column 'subset' for the split; it has 'file, split'"),
    "table with twin columns": (table("filename,Filename,subset\nA/b.jpg,A/c.jpg,train\n"), "'filename' could be any of the columns"),
    "table without training rows": (table("filename,subset\nA/b.jpg,test\n"), "no row of the subset train"),
    "table without folder": (table("filename,subset\nb.jpg,train\nA/b.jpg,val\n"), "line 2: 'b.jpg' has no folder"),
    "unknown arch": (lambda d: ["--arch", "efficientnet_b33"], "--arch efficientnet_b33 cannot be built"),
    "other arch": (lambda d: ["--arch", "test_resnet", "--drop-path", "0"], "not one of timm's EfficientNets"),
    "no init": (lambda d: ["--init", str(d / "nowhere.pt")], "nowhere.pt: no such checkpoint"),
    "init of another net": (other_net, "resnet.pt .* does not fit"),
    "hostile init": (hostile, "hostile.pt: holds .*mkdir.*save its state dict"),
    "init is a web page": (web_page(".pt"), "not a PyTorch file"),
    "safetensors is a web page": (web_page(".safetensors"), "cannot be read as safetensors"),
    "no network": (lambda d: ["--pretrained"], "--pretrained: no weights of test_efficientnet"),
    "unwritable out": (lambda d: ["--out", "/proc/x"], "cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_costs_one_line(data, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spoil, words = BAD[name]
    more = spoil(data)
    code = errors.exit_code(pretrain.main, flags(data, tmp_path / "run", *(more if isinstance(more, list) else [])))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in error
    assert re.search(words, lines[0]), lines[0]
    assert not (tmp_path / "run").exists() and not (data / "mark").exists()


def test_pictures_without_their_folders_are_found_but_never_for_two_styles(data, tmp_path):
    """All in one folder, where Ukiyo_e/p2.jpg (validation) would be the p2.jpg of a style in training."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for place in data.glob("*/*.jpg"):
        shutil.copy(place, flat / place.name)
    _, splits = wikiart.read_lists(str(data), images=str(flat), log=print)
    twice = {f"p{n}.jpg" for n in range(6)}
    for row in splits["train"] + splits["val"]:
        name = pathlib.Path(row.name).name
        assert ("as well" in row.fault and not row.image) if name in twice else row.image == str(flat / name), row


def test_check_data_refuses_where_nothing_can_be_read(data, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert errors.exit_code(pretrain.main, flags(data, "x", "--check-data", "--images", str(tmp_path / "nothing"))) == 2
    assert "none of 14 pictures can be read" in capsys.readouterr().err and not (data / "broken.txt").exists()


def test_dry_run_writes_nothing(data, tmp_path, capsys):
    assert pretrain.main(flags(data, tmp_path / "run", "--dry-run")) is None and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert printed.count(" -> ") == 3 and "sum, computed" in printed and "measured" in printed
