"""pytest tests/engine/test_efficientnet.py: style checkpoints of every shape that is around, and hostile ones. Behaviour-checked."""

import argparse
import pathlib
import shutil
import warnings

import numpy as np
import pytest
import timm
import torch

import core
from data import rows
from engine import checkpoints
from engine.errors import DataError
from tools import make_tiny

ARCH = make_tiny.ARCH


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model(ARCH, num_classes=27).state_dict()


def shapes(state):
    """Name -> content of the kinds of file that people have."""
    prefixed = {f"module.{n}": t for n, t in state.items()}
    compiled = {f"_orig_mod.{n}": t for n, t in state.items()}
    args = argparse.Namespace(lr=1e-3, out=pathlib.PosixPath("runs/x"), data="wikiart")
    return {"bare": state, "model": {"model": state}, "state_dict": {"state_dict": state, "epoch": 3}, "ema": {"ema": state, "model": {}},
            "module": {"state_dict": prefixed}, "compiled": {"model": compiled},
            "both prefixes": {f"module._orig_mod.{n}": t for n, t in state.items()},
            "namespace": {"model": state, "args": args}, "path": {"model": state, "best": pathlib.PosixPath("runs/best.pt")},
            "numpy": {"model": state, "acc": np.float64(0.61), "epoch": np.int64(3), "flag": np.bool_(True)}}


@pytest.mark.parametrize("kind", ["bare", "model", "state_dict", "ema", "module", "compiled", "both prefixes", "namespace",
                                  "path", "numpy"])
def test_known_shapes_load_without_running_anything(state, tmp_path, kind):
    file = tmp_path / "best.pt"
    torch.save(shapes(state)[kind] if kind != "bare" else dict(state, arch_free=torch.zeros(1)), file)
    if kind == "bare":  # a stray tensor is named, not ignored
        with pytest.raises(DataError, match="arch_free"):
            load(file)
        torch.save(state, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = load(file)
    assert net.num_classes == 27
    assert all(torch.equal(t, state[n]) for n, t in net.net.state_dict().items())


def load(file, safe=True):
    """from_checkpoint for the tests' small architecture: foreign files do not name theirs."""
    content = checkpoints.load_foreign(file, safe)
    if "arch" not in content:
        inner = content if any(isinstance(v, torch.Tensor) for v in content.values()) else {**content}
        torch.save({**({"model": inner} if inner is content else inner), "arch": ARCH}, file)
    return core.EfficientNet28.from_checkpoint(file, safe)


def test_real_b3_in_its_default_form(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("efficientnet_b3", num_classes=28).state_dict(), tmp_path / "b3.pt")
    net = core.EfficientNet28.from_checkpoint(tmp_path / "b3.pt", safe=True).eval()
    assert net.num_classes == 28 and net.width == 1536
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 64)).shape == (1, 1536)


class Marker:
    """Unpickling this writes a file: stands for hostile code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.write_text, (pathlib.Path(self.path), "code ran"))


class Config:
    """A harmless class of somebody's training script, unknown to torch's safe loader."""


def test_unknown_class_needs_the_unsafe_loader_and_says_so(state, tmp_path):
    torch.save({"model": state, "arch": ARCH, "config": Config()}, tmp_path / "best.pt")
    with pytest.raises(DataError, match="Config.*--safe-load"):
        core.EfficientNet28.from_checkpoint(tmp_path / "best.pt", safe=True)
    with pytest.warns(UserWarning, match=r"best.pt.*Config.*weights_only=False"):
        net = core.EfficientNet28.from_checkpoint(tmp_path / "best.pt", safe=False)
    assert torch.equal(net.net.classifier.weight, state["classifier.weight"])


def test_hostile_code_does_not_run_with_safe_load(state, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"model": state, "arch": ARCH, "x": Marker(str(mark))}, tmp_path / "best.pt")
    with pytest.raises(DataError):
        core.EfficientNet28.from_checkpoint(tmp_path / "best.pt", safe=True)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04cut"])
@pytest.mark.parametrize("safe", [True, False])
def test_damaged_files_never_reach_the_unsafe_loader(tmp_path, content, safe):
    (tmp_path / "best.pt").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="download it again"):
            checkpoints.load_foreign(tmp_path / "best.pt", safe)


def test_cut_file_is_named(state, tmp_path):
    torch.save(state, tmp_path / "best.pt")
    whole = (tmp_path / "best.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match="best.pt.*incomplete"):
        checkpoints.load_foreign(tmp_path / "best.pt", safe=False)


def test_other_networks_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 4)}, tmp_path / "resnet.pt")
    with pytest.raises(DataError, match="no timm EfficientNet"):
        core.EfficientNet28.from_checkpoint(tmp_path / "resnet.pt", safe=True)


@torch.no_grad()
def test_normalisation_bridge(state):
    net = core.EfficientNet28(27, ARCH).eval()
    net.net.load_state_dict(state)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (rows.BLIP_MEAN, rows.BLIP_STD))
    net_mean, net_std = (torch.tensor(v).view(1, 3, 1, 1) for v in (rows.IMAGENET_MEAN, rows.IMAGENET_STD))
    expected = net.net((pixels - net_mean) / net_std)
    assert torch.allclose(net.logits(net((pixels - mean) / std)), expected, atol=1e-4)
    outside = (torch.full((1, 3, 32, 32), 1.7) - mean) / std  # beyond white: clamped
    white = (torch.ones(1, 3, 32, 32) - mean) / std
    assert torch.allclose(net(outside), net(white), atol=1e-5)


# --- whatever a training script has saved: one function for all stages ------------

WRAPPED = {  # name -> content around a state
    "SPRC's class name": lambda s: {"epoch": 3, "Blip2QformerCirAlignPrompt": s}, "net": lambda s: {"net": s, "epoch": 3},
    "model_state": lambda s: {"model_state": s, "optimizer": {"state": {0: {"exp_avg": s["a.bias"]}}, "param_groups": [{"lr": 1}]}},
    "Lightning": lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}, "pytorch-lightning_version": "2.4"},
    "Lightning, compiled, on several GPUs": lambda s: {"state_dict": {f"model._orig_mod.module.{n}": t for n, t in s.items()}},
    "AveragedModel": lambda s: {"model_ema": {"n_averaged": torch.tensor(7), **{f"module.{n}": t for n, t in s.items()}}},
    "average and model": lambda s: {"model": {n: t + 1 for n, t in s.items()}, "model_ema": s}}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_state_is_found_in_every_wrapping(tmp_path, wrapping):
    state = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    torch.save(WRAPPED[wrapping](state), tmp_path / "x.pth")
    found, where = checkpoints.unwrap_state(checkpoints.load_foreign(tmp_path / "x.pth", True), "x.pth")
    assert found.keys() == state.keys() and all(torch.equal(found[n], t) for n, t in state.items())
    assert where.startswith("key ")


@pytest.mark.parametrize("content, named", [
    ({"generator": {"a": torch.zeros(1)}, "critic": {"a": torch.ones(1)}}, "'critic', 'generator'"),
    ({"epoch": 3, "history": [1, 2]}, "'epoch', 'history'"), ([torch.zeros(1)], "list")])
def test_where_no_state_can_be_told_the_keys_are_named(content, named):
    with pytest.raises(DataError, match=f"x.pth: no state dict.*{named}.*torch.save"):
        checkpoints.unwrap_state(content, "x.pth")


def test_safetensors_and_torchscript(state, tmp_path):
    from safetensors.torch import save_file
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "renamed.pt")
    for name in ("model.safetensors", "renamed.pt"):
        found, _ = checkpoints.unwrap_state(checkpoints.load_foreign(tmp_path / name, True), name)
        assert found.keys() == state.keys()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2)), tmp_path / "traced.pt")
    with pytest.raises(DataError, match="TorchScript.*state_dict"):
        checkpoints.load_foreign(tmp_path / "traced.pt", False)


def test_a_timm_file_of_another_size_does_not_fit_and_is_not_called_broken(tmp_path):
    from safetensors.torch import save_file
    save_file(timm.create_model("efficientnet_b0", num_classes=27).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="does not fit"):
        core.EfficientNet28.from_checkpoint(tmp_path / "model.safetensors")
