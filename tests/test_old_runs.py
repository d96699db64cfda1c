"""pytest tests/test_old_runs.py: what an earlier version of the project left in a run folder is loaded and resumed to the same end."""

import csv
import pathlib
import shutil

import pytest
import torch
from PIL import Image

from conftest import ROOT
import eval_gated
import train_gated
from engine import checkpoints, errors

OLD = ROOT / "tests/old"


@pytest.fixture
def data(tmp_path):
    """The tables and pictures that the old run saw."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 2)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "question", "answer", "style"])
            for n in range(count):
                Image.new("RGB", (8, 8), (30 * n, 255 - 30 * n, 90)).save(folder / "images" / f"{split}{n}.png")
                writer.writerow([f"{split}{n}.png", "What colour is it?", ["red", "green"][n % 2], ["Cubism", "Pop Art"][n % 2]])
    return str(folder)


def test_an_old_last_pt_is_resumed_to_the_same_end(data, tmp_path, no_curves):
    """To the bit on the machine that made it; elsewhere to the rounding of another processor."""
    shutil.copytree(OLD, tmp_path / "run")
    arguments = ["--data", data, "--blip2", "tiny", "--gating", "none", "--epochs", "2", "--batch-size", "4", "--accumulation", "1", "--lr",
                 "1e-2", "--workers", "0", "--precision", "no", "--save-last", "--out", str(tmp_path / "run"), "--resume"]
    train_gated.main(arguments)
    now, then = (checkpoints.load_checkpoint(path) for path in (tmp_path / "run/best.pt", OLD / "whole.pt"))
    assert now["epoch"] == then["epoch"] == 2 and now["value"] == pytest.approx(then["value"], rel=1e-4)
    before = checkpoints.load_checkpoint(OLD / "last.pt")["state"]
    for name, tensor in then["state"].items():
        moved = (tensor - before[name]).abs().max()  # in the step that is resumed
        assert (now["state"][name] - tensor).abs().max() < 0.01 * moved, name


def test_an_old_best_pt_is_evaluated_and_an_unknown_one_refused(data, tmp_path, capsys):
    shutil.copy(OLD / "best.pt", tmp_path)
    assert not eval_gated.main(["--checkpoint", str(tmp_path / "best.pt"), "--data", data, "--workers", "0", "--no-baselines"])
    assert "trained, no gates" in capsys.readouterr().out
    content = torch.load(OLD / "best.pt", weights_only=True)
    torch.save({**content, "model_args": {**content["model_args"], "of_the_future": 1}}, tmp_path / "best.pt")
    code = errors.exit_code(eval_gated.main, ["--checkpoint", str(tmp_path / "best.pt"), "--data", data, "--workers", "0"])
    assert code == 2 and pathlib.Path("best.pt").name in capsys.readouterr().err
