"""pytest tests/test_recipes.py: each diff of docs/recipes.md is small, applies to the script as it is, trains and is evaluated."""

import pathlib
import re
import shutil
import subprocess

import pytest
import torch

from conftest import ROOT
import core
import eval_gated
import train_gated
from engine import checkpoints, errors, flags as engine_flags, gate_frames, runfolder

PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n.*?```diff\n(.*?)```", PAGE, re.S | re.M))


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Function: the name of a recipe -> (path of the edited copy, its module). Kinds of gates and ways that it adds are gone afterwards."""
    monkeypatch.setattr(core, "GATES", dict(core.GATES))
    monkeypatch.setattr(core, "WAYS", dict(core.WAYS))

    def apply(recipe):
        shutil.copy(ROOT / "train_gated.py", tmp_path)
        (tmp_path / "recipe.diff").write_text(RECIPES[recipe], encoding="utf-8")
        done = subprocess.run(["git", "apply", "-p0", "--recount", "recipe.diff"], cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": "/usr/bin:/bin:/usr/local/bin", "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
        assert not done.returncode, done.stderr
        path = (tmp_path / "train_gated.py").rename(tmp_path / f"edited_{abs(hash(recipe))}.py")
        assert path.read_text(encoding="utf-8") != (ROOT / "train_gated.py").read_text(encoding="utf-8")
        return str(path), engine_flags.load_script(str(path))
    return apply


def evaluated(run, script, capsys, *more):
    """What eval_gated.py prints of a run of an edited script."""
    capsys.readouterr()
    code = errors.exit_code(eval_gated.main, ["--checkpoint", str(run), "--workers", "0", "--script", script, *more])
    said = capsys.readouterr()
    assert not code, said.err
    return said.out


def test_the_page_has_five_small_recipes_in_one_file():
    assert list(RECIPES) == ["A new kind of gate", "A new way for style to come in", "A new loss term", "Another data set",
                             "Another vision feature"]
    for name, diff in RECIPES.items():
        lines = diff.splitlines()
        assert re.findall(r"^(?:---|\+\+\+) (.+)", diff, re.M) == ["train_gated.py"] * 2, name
        changed = [line for line in lines if re.match(r"[-+](?![-+])", line) and line[1:].strip()]
        assert len(changed) <= 15, (name, len(changed))


def test_a_new_kind_of_gate(edited, flags, tmp_path, capsys):
    script, module = edited("A new kind of gate")
    assert not module.main(flags("--gating", "additive", "--epochs", "1"))
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert best["model_args"]["gating"] == "additive" and {n.split(".")[2] for n in best["state"] if n.startswith("gates.")} == {
        "norm", "mlp", "shift", "scale"}
    assert f"# script: {script}\n# commit: " in (tmp_path / "run/args.yaml").read_text()
    assert f"python {script} --data" in capsys.readouterr().out.splitlines()[-1] and best["command"][0] == script
    frame, = gate_frames.read_frames(tmp_path / "run" / gate_frames.FILE)
    assert all(value == 1 for style in frame["styles"].values() for layer in style["key"]["mean"] for value in layer)
    assert any(t.abs().sum() for n, t in best["state"].items() if ".shift." in n)
    assert "gates closed" in evaluated(tmp_path / "run", script, capsys, "--maps", "1")  # maps draw a gate of plain numbers
    assert (tmp_path / "run/maps/001.png").stat().st_size > 1000
    del core.GATES["additive"]
    assert errors.exit_code(eval_gated.main, ["--checkpoint", str(tmp_path / "run"), "--workers", "0"]) == 2
    assert "gating 'additive' is not known here" in (told := capsys.readouterr().err) and "--script" in told


def test_a_new_way_for_style_to_come_in(edited, flags, tmp_path, capsys):
    script, module = edited("A new way for style to come in")
    assert not module.main(flags("--gating", "none", "--steer", "query-shift", "--epochs", "1"))
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert best["model_args"]["steer"] == ["query-shift"] and best["state"]["ways.0.project.weight"].abs().sum()
    assert "gates closed" in evaluated(tmp_path / "run", script, capsys)
    del core.WAYS["query-shift"]
    assert errors.exit_code(eval_gated.main, ["--checkpoint", str(tmp_path / "run"), "--workers", "0"]) == 2
    assert "'query-shift' is not known here" in (told := capsys.readouterr().err) and "--script" in told


def test_a_new_loss_term(edited, flags, tmp_path, capsys, no_curves, monkeypatch):
    script, module = edited("A new loss term")
    panels = []
    monkeypatch.setattr(runfolder, "draw_curves", lambda log, png, found, title: panels.append(found))
    monkeypatch.setattr("engine.run.LOG_EVERY", 1)
    assert not module.main(flags("--epochs", "2"))
    log = runfolder.read_log(tmp_path / "run/training_log.csv")
    assert all(row["opening"] for row in log) and float(log[-1]["opening"]) > 0
    epoch = log[-1]
    assert float(epoch["loss"]) == pytest.approx(
        float(epoch["lm"]) + 0.1 * float(epoch["opening"]) + 0.1 * (1 - float(epoch["hit"])) * 1, abs=1.0)
    assert [lines for heading, lines in panels[-1] if heading == "further terms"][0][0][:2] == ("step", "opening")
    assert evaluated(tmp_path / "run", script, capsys, "--no-baselines")


def test_another_data_set(edited, flags, few, tmp_path):
    _, module = edited("Another data set")
    for split in ("train", "val"):
        for style in ("Cubism", "Pop Art"):
            (tmp_path / "mine" / split / style).mkdir(parents=True)
            for n, path in enumerate(sorted((few / "images").iterdir())[:3]):
                shutil.copy(path, tmp_path / "mine" / split / style / f"{n}{path.suffix}")
    assert not module.main(flags("--epochs", "1", "--data", str(tmp_path / "mine")))
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert best["answers"] == best["model_args"]["styles"] == ["Cubism", "Pop Art"]


def test_another_vision_feature(edited, flags, tiny, tmp_path, capsys):
    script, module = edited("Another vision feature")
    assert not module.main(flags("--epochs", "1"))
    plain = core.EfficientNet28.from_checkpoint(tiny[1])
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert best["state"]["style_head.weight"].shape[1] == plain.width + 6
    images = torch.rand(2, 3, 32, 32)
    feature = module.ColourTower.from_checkpoint(tiny[1]).eval()(images)
    assert torch.equal(feature[:, -6:-3], images.mean((2, 3))) and feature.shape[1] == plain.width + 6
    assert evaluated(tmp_path / "run", script, capsys, "--no-baselines", "--export", str(tmp_path / "exported"))


def test_a_script_that_is_not_there_costs_one_line(capsys, tmp_path):
    with pytest.raises(errors.DataError, match="no such Python file"):
        engine_flags.load_script(str(tmp_path / "nothing.py"))
    assert pathlib.Path(train_gated.__file__).parent == ROOT
