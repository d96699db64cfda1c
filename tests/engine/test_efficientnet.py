"""pytest tests/engine/test_efficientnet.py: style checkpoints of every shape that is around, and hostile ones. Behaviour-checked."""

import argparse
import json
import pathlib
import shutil
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import core
import train_gated
from conftest import prepared
from data import rows
from engine import checkpoints, published
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
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "renamed.pt")
    for name in ("model.safetensors", "renamed.pt"):
        found, _ = checkpoints.unwrap_state(checkpoints.load_foreign(tmp_path / name, True), name)
        assert found.keys() == state.keys()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2)), tmp_path / "traced.pt")
    with pytest.raises(DataError, match="TorchScript.*state_dict"):
        checkpoints.load_foreign(tmp_path / "traced.pt", False)


def test_a_timm_file_of_another_size_does_not_fit_and_is_not_called_broken(tmp_path):
    save_file(timm.create_model("efficientnet_b0", num_classes=27).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="does not fit"):
        core.EfficientNet28.from_checkpoint(tmp_path / "model.safetensors")


# --- which net a file is of ------------

TF = "tf_efficientnet_lite0"  # the tensors of efficientnet_lite0, other paddings and epsilon, and pixels around 0.5
HALF = [0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """(file of a tf_ net's weights as timm leaves them, without its name; the net)"""
    torch.manual_seed(0)
    net = timm.create_model(TF, num_classes=3).eval()
    file = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(net.state_dict(), file)
    return file, net


def beside(lite, folder, config):
    """A copy of the file with this config.json beside it."""
    shutil.copy(lite[0], folder)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / lite[0].name


CONFIGS = {"timm": {"architecture": TF, "num_classes": 3, "pretrained_cfg": {"mean": HALF, "std": HALF, "input_size": [3, 224, 224]}},
           "older timm": {"architecture": TF, "mean": HALF, "std": HALF}}


class Holder(nn.Module):
    """The part of a model that is asked for here."""

    def __init__(self, net):
        super().__init__()
        self.efficientnet = net


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_timms_config_beside_a_file_names_its_net(lite, tmp_path, config):
    net = core.EfficientNet28.from_checkpoint(beside(lite, tmp_path, CONFIGS[config])).eval()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (rows.BLIP_MEAN, rows.BLIP_STD))
    wanted = lite[1]((pixels - 0.5) / 0.5)
    assert torch.allclose(net.logits(net((pixels - mean) / std)), wanted, rtol=1e-3, atol=1e-4)
    assert net.note.endswith("as its config.json says") and f"arch {TF}, mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in net.note
    (tmp_path / "config.json").write_text(json.dumps({"architecture": TF.removeprefix("tf_"), "mean": HALF, "std": HALF}))
    other = core.EfficientNet28.from_checkpoint(tmp_path / lite[0].name).eval()
    assert not torch.allclose(other.logits(other((pixels - mean) / std)), wanted, rtol=0.05)  # loads as well: nothing else would tell
    frozen = [checkpoints.fingerprint(Holder(one).requires_grad_(False)) for one in (net, other)]
    assert frozen[0]["efficientnet"] == frozen[1]["efficientnet"]
    assert checkpoints.other_parts(*frozen) == [checkpoints.ARCHITECTURE]
    del frozen[0][checkpoints.ARCHITECTURE]  # of an earlier version
    assert checkpoints.other_parts(*frozen) == []


def test_what_a_file_without_a_name_was_taken_for_is_said(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("tf_efficientnet_b3", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    note = core.EfficientNet28.from_checkpoint(tmp_path / "model.safetensors").note
    assert "model.safetensors: taken for arch efficientnet_b3, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, for want" in note
    assert "config.json beside it" in note and "\n" not in note


def test_a_training_says_what_it_took_and_keeps_it(flags, tiny, tmp_path, capsys):
    held = torch.load(tiny[1])
    arch = held.pop("arch")
    torch.save(held, tmp_path / "net.pt")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": arch, "mean": HALF, "std": HALF}))
    run, _ = prepared(train_gated.get_args(flags("--efficientnet", str(tmp_path / "net.pt"))))
    assert capsys.readouterr().out.count(f"net.pt: taken for arch {arch}, mean 0.5 0.5 0.5, std 0.5 0.5 0.5, as its config.json says") == 1
    assert run.frozen[checkpoints.ARCHITECTURE] == f"arch {arch}, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"


def test_only_what_the_file_leaves_open_is_said(lite, tmp_path):
    state = lite[1].state_dict()
    for content, wanted in (({"arch": TF, "mean": HALF, "std": HALF}, ""), ({"arch": TF}, "mean 0.485")):  # lite0's are others
        torch.save({"model": state, **content}, tmp_path / "best.pt")
        note = core.EfficientNet28.from_checkpoint(tmp_path / "best.pt").note
        assert (wanted in note) if wanted else not note
    assert core.EfficientNet28.from_checkpoint(published.tiny("efficientnet-28.pt")).note == ""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "efficientnet_b3"}))  # of another file there
    assert core.EfficientNet28.from_checkpoint(tmp_path / "best.pt").arch == TF


def test_a_config_of_another_library_says_nothing_and_a_broken_one_is_named(lite, tmp_path):
    with pytest.raises(DataError, match="as efficientnet_b3 does not fit"):
        core.EfficientNet28.from_checkpoint(beside(lite, tmp_path, {"model_type": "blip-2"}))
    with pytest.raises(DataError, match="config.json: cannot be read"):
        core.EfficientNet28.from_checkpoint(beside(lite, tmp_path, "{"))


def test_a_start_from_another_nets_weights_is_refused(lite, tmp_path):
    file, said = beside(lite, tmp_path, CONFIGS["timm"]), []
    head = ("classifier.weight", "classifier.bias")
    with pytest.raises(DataError, match=f"model.safetensors: weights of {TF}.*give --arch {TF}"):
        checkpoints.start_from(timm.create_model("efficientnet_lite0", num_classes=3), file, head, "efficientnet_lite0", said.append)
    net = timm.create_model(TF, num_classes=3)
    checkpoints.start_from(net, file, head, f"{TF}.in1k", said.append)
    assert not said and torch.equal(net.conv_stem.weight, lite[1].conv_stem.weight)
    (tmp_path / "config.json").unlink()
    checkpoints.start_from(net, file, head, TF, said.append)
    assert len(said) == 1 and f"taken for {TF} (--arch)" in said[0]
