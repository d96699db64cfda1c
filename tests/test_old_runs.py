"""pytest tests/test_old_runs.py: what an earlier version of the project left in a run folder is loaded and resumed to the same end."""

import csv
import pathlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import ROOT
import efficientnet_pretrain
import eval_gated
import pretrain_qformer
import pretrain_stage2
import train_blip_caption
import train_cir
import train_gated
from engine import checkpoints, errors, runfolder

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
    train_gated.main([*resume_arguments(data, tmp_path / "run"), "--precision", "no"])
    now, then = (checkpoints.load_checkpoint(path) for path in (tmp_path / "run/best.pt", OLD / "whole.pt"))
    assert now["epoch"] == then["epoch"] == 2 and now["value"] == pytest.approx(then["value"], rel=1e-4)
    before = checkpoints.load_checkpoint(OLD / "last.pt")["state"]
    for name, tensor in then["state"].items():
        moved = (tensor - before[name]).abs().max()  # in the step that is resumed
        assert (now["state"][name] - tensor).abs().max() < 0.01 * moved, name


@pytest.mark.parametrize("script", [efficientnet_pretrain, pretrain_qformer, pretrain_stage2, train_blip_caption, train_cir, train_gated])
def test_what_a_resumed_run_is_compared_by_is_what_auto_became(script):
    """Typed alike on two machines, or without and with a new accelerate config, the runs would end differently."""
    nothing = SimpleNamespace(rows=[], paths={})
    parts = SimpleNamespace(train=nothing, val=[] if script is train_cir else nothing, classes=[],
                            stream=SimpleNamespace(shards=[], processes=1))
    args = script.get_args(["--data", "a=b", "--precision", "auto"])
    kept = {became: script.settings(args, parts, SimpleNamespace(mixed_precision=became, num_processes=1)) for became in ("no", "bf16")}
    with pytest.raises(errors.DataError, match="--precision is 'bf16', was 'no'"):
        runfolder.refuse_other_settings(kept["bf16"], kept["no"], "last.pt")
    runfolder.refuse_other_settings(kept["no"], {**kept["no"], "--precision": "auto"}, "last.pt")  # of an earlier version


def resume_arguments(data, out):
    return ["--data", data, "--blip2", "tiny", "--gating", "none", "--epochs", "2", "--batch-size", "4", "--accumulation", "1", "--lr",
            "1e-2", "--workers", "0", "--save-last", "--out", str(out), "--resume", "--per", "head"]  # the default of then


def test_an_old_last_pt_with_the_word_auto_is_resumed(data, tmp_path, no_curves):
    shutil.copytree(OLD, tmp_path / "run")
    last = torch.load(OLD / "last.pt", weights_only=True)
    checkpoints.save_checkpoint(tmp_path / "run/last.pt", {**last, "settings": {**last["settings"], "--precision": "auto"}})
    assert train_gated.main(resume_arguments(data, tmp_path / "run")) is None
    now = checkpoints.load_checkpoint(tmp_path / "run/last.pt")["settings"]
    assert now["--precision"] == ("no" if not torch.cuda.is_available() else now["--precision"]) != "auto"


def test_a_run_is_not_resumed_on_other_pictures_of_the_same_names(data, tmp_path, no_curves, capsys):
    """--images may differ, since data moves; what lies there may not."""
    arguments = resume_arguments(data, tmp_path / "run")
    assert train_gated.main([*arguments, "--epochs", "1"]) is None
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    Image.new("RGB", (64, 8), "white").save(tmp_path / "moved/images/train3.png")
    elsewhere = [*arguments, "--epochs", "1", "--images", str(tmp_path / "moved/images")]
    assert errors.exit_code(train_gated.main, elsewhere) == 2
    assert "pictures (sizes)" in capsys.readouterr().err
    shutil.copy(tmp_path / "data/images/train3.png", tmp_path / "moved/images")
    assert train_gated.main(elsewhere) is None


def test_an_old_best_pt_is_evaluated_and_an_unknown_one_refused(data, tmp_path, capsys):
    shutil.copy(OLD / "best.pt", tmp_path)
    assert not eval_gated.main(["--checkpoint", str(tmp_path / "best.pt"), "--data", data, "--workers", "0", "--no-baselines"])
    assert "trained, no gates" in capsys.readouterr().out
    content = torch.load(OLD / "best.pt", weights_only=True)
    torch.save({**content, "model_args": {**content["model_args"], "of_the_future": 1}}, tmp_path / "best.pt")
    code = errors.exit_code(eval_gated.main, ["--checkpoint", str(tmp_path / "best.pt"), "--data", data, "--workers", "0"])
    assert code == 2 and pathlib.Path("best.pt").name in capsys.readouterr().err
