"""pytest tests/engine/test_vision.py: timm models as the frozen vision tower. Random small weights; timm's own nets are the judge."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import core
from conftest import random_weights
from data import rows
from engine import cache, published, towers, vision
from engine.errors import DataError
from test_towers import as_lavis
from test_towers import folder as retrieval  # noqa: F401

# name, size, [P,W] by hand: 160 / 16 = 10 patches a side and CLS; 160 / 32 = 5; ViT of patch 32 at 64 pixels; a small Lite2's 81 at 288
KINDS = {"test_vit": (160, (101, 64)), "test_efficientnet": (160, (25, 256)), "tf_efficientnet_lite2": (288, (81, 1280)),
         "test_convnext": (96, (9, 64)), "vit_tiny_patch16_224": (64, (17, 192)), "test_vit2": (160, (101, 64)),
         "swin_tiny_patch4_window7_224": (224, (49, 768))}


def tower_of(arch, tmp_path, size=None):
    return vision.make_tower(arch, random_weights(arch, tmp_path), size, log=lambda line: None)


def pixels(size, count=2):
    """Pictures in 0..1, and the same in BLIP's normalisation."""
    plain = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(4))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (rows.BLIP_MEAN, rows.BLIP_STD))
    return plain, (plain - mean) / std


# --- tokens ------------

@pytest.mark.parametrize("arch", KINDS)
@torch.no_grad()
def test_tokens_are_those_of_timm_on_timm_s_own_pixels(arch, tmp_path):
    import timm
    size, shape = KINDS[arch]
    tower = tower_of(arch, tmp_path, size)
    plain, images = pixels(size)
    found = tower(pixel_values=images).last_hidden_state
    assert tuple(found.shape[1:]) == shape == (vision.token_count(tower), tower.config.hidden_size)
    sized = {"img_size": size} if arch.startswith(("test_vit", "vit", "swin")) else {}
    net = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay={"file": str(random_weights(arch, tmp_path))}, **sized).eval()
    told = timm.data.resolve_model_data_config(net)
    mean, std = (torch.tensor(told[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    theirs = net.forward_features((plain - mean) / std)
    if arch.startswith("swin"):
        theirs = theirs.flatten(1, 2)
    elif theirs.ndim == 4:
        theirs = theirs.flatten(2).transpose(1, 2)  # row by row
        theirs = (theirs - theirs.mean(-1, keepdim=True)) / (theirs.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert tower.config.timm.get("norm", False) is not arch.startswith(("swin", "vit", "test_vit"))  # of a CNN's map alone
    assert (found - theirs).abs().max() < 1e-4 * theirs.abs().max() and theirs.std() > 0


@torch.no_grad()
def test_a_tower_in_half_precision_has_its_own_tables_in_it_too(tmp_path):
    """Of positions, which no file holds: timm makes them, in float32."""
    tower = tower_of("eva02_tiny_patch14_224", tmp_path, 56)
    tower.config.save_pretrained(tmp_path / "folder")
    save_file({f"{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}, tmp_path / "folder/model.safetensors")
    found = published.load_vision(str(tmp_path / "folder"), torch.bfloat16)[0](pixel_values=pixels(56)[1].bfloat16()).last_hidden_state
    expected = tower(pixel_values=pixels(56)[1]).last_hidden_state
    assert found.dtype == torch.bfloat16 and (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@torch.no_grad()
def test_patches_stand_row_by_row(tmp_path):
    """A CNN's token 1 lies beside token 0 and not below it: what changes with the upper right corner is the end of the first row."""
    tower = tower_of("test_efficientnet", tmp_path, 320)  # 10 x 10
    _, images = pixels(320, 1)
    changed = images.clone()
    changed[..., :32, -32:] += 3
    moved = (tower(pixel_values=images).last_hidden_state - tower(pixel_values=changed).last_hidden_state).abs().sum(-1).view(10, 10)
    assert moved.argmax() == 9 or moved[:3, 7:].sum() > 5 * moved[7:, :3].sum()


def test_registers_are_counted(tmp_path):
    tower = tower_of("vit_small_patch14_reg4_dinov2", tmp_path, 56)
    assert tower.config.timm["prefix"] == 5 and tower.config.timm["grid"] == [4, 4] and tower.tokens == 21
    assert tower(pixel_values=pixels(56)[1]).last_hidden_state.shape == (2, 21, 384)


def test_a_net_s_head_is_no_part_of_the_tower(tmp_path):
    """SigLIP's attention pooling and a classifier would be millions of weights that nothing reads."""
    import timm
    tower, whole = tower_of("test_vit3", tmp_path), timm.create_model("test_vit3")
    assert whole.attn_pool is not None and not any("attn_pool" in name or name.startswith("head") for name in tower.net.state_dict())
    assert not any(name.startswith("classifier") for name in tower_of("test_efficientnet", tmp_path).net.state_dict())


@torch.no_grad()
def test_a_frozen_tower_stays_as_it_is(tmp_path):
    """Batch norm's running mean would move, and drop-path would drop, in train mode."""
    tower = tower_of("test_efficientnet", tmp_path)
    before, images = {n: t.clone() for n, t in tower.state_dict().items()}, pixels(160)[1]
    first = tower(pixel_values=images).last_hidden_state
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert torch.equal(tower(pixel_values=images).last_hidden_state, first)
    assert all(torch.equal(t, before[n]) for n, t in tower.state_dict().items())


@torch.no_grad()
def test_half_precision_follows_the_weights(tmp_path):
    for arch in ("test_vit", "test_efficientnet"):
        tower, images = tower_of(arch, tmp_path), pixels(160)[1]
        plain, half = tower(pixel_values=images).last_hidden_state, tower.to(torch.bfloat16)(pixel_values=images).last_hidden_state
        assert half.dtype == torch.bfloat16 and 0 < (plain - half.float()).abs().mean() < 0.02 * plain.abs().mean().clamp(min=1)


def test_a_name_that_timm_does_not_know_is_one_line():
    with pytest.raises(DataError, match="timm:no_such_net"):
        vision.build_net("no_such_net", 160)


def test_weights_of_another_net_are_refused(tmp_path):
    with pytest.raises(DataError, match="test_vit"):
        vision.make_tower("test_vit", random_weights("test_efficientnet", tmp_path))


# --- a folder ------------

@pytest.mark.parametrize("arch", ["test_vit", "test_efficientnet"])
@torch.no_grad()
def test_a_folder_is_loaded_with_its_tower(assembled, tmp_path, arch):
    folder = assembled(arch)
    tower, images = tower_of(arch, tmp_path), pixels(160)[1]
    expected = tower(pixel_values=images).last_hidden_state
    for dtype in (torch.float32, torch.bfloat16):  # last, since it rounds `tower`
        whole, _ = published.load_blip2(folder, dtype)
        alone, config = published.load_vision(folder, dtype)
        assert isinstance(whole.vision_model, vision.TimmTower) and config.vision_config.timm["arch"] == arch
        for one in (whole.vision_model, alone):
            found = one(pixel_values=images).last_hidden_state
            assert found.dtype == dtype and (found.float() - expected).abs().mean() < (1e-6 if dtype == torch.float32 else 0.02)
            wanted = tower.to(dtype).state_dict()
            assert all(torch.equal(t, wanted[n]) and t.dtype == wanted[n].dtype for n, t in one.state_dict().items())
    retrieval = core.Blip2Retrieval.load(f"{folder}/qformer")  # noqa: F811
    assert (retrieval.image_embeds(images) - expected).abs().max() < 1e-4
    without, _ = published.load_blip2(folder, tower=False)
    assert not list(without.vision_model.parameters())


@pytest.mark.parametrize("harm", ["a tensor is missing", "one is too many", "another shape", "half an entry"])
def test_a_damaged_tower_is_refused(assembled, tmp_path, harm):
    place = shutil.copytree(assembled("test_efficientnet"), tmp_path / "damaged")
    state, name = load_file(place / "model.safetensors"), "vision_model.net.bn1.weight"
    if harm == "a tensor is missing":
        del state[name]
    elif harm == "one is too many":
        state["vision_model.net.bn9.weight"] = state[name].clone()
    elif harm == "another shape":
        state[name] = state[name][1:].clone()
    else:
        config = (place / "config.json").read_text()
        (place / "config.json").write_text(config.replace('"mean"', '"meant"'))
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="mean" if harm == "half an entry" else "does not fit"):
        published.load_blip2(str(place))


def test_other_folders_are_never_touched(tiny):
    from transformers import Blip2VisionModel
    model, _ = published.load_blip2(tiny[0])
    assert type(model.vision_model) is Blip2VisionModel and not vision.is_timm(tiny[0]) and vision.timm_settings(model) == {}
    assert vision.token_count(model.vision_model) == 65 and not vision.is_timm("Salesforce/blip2-opt-2.7b")


# --- keys ------------

def test_the_cache_gives_what_the_tower_gives(assembled, few, tmp_path):
    from functools import partial
    tower, _ = published.load_vision(assembled("test_efficientnet"))
    paths = [str(path) for path in sorted((few / "images").iterdir())[:3]]
    opened = partial(rows.picture_tensor, size=160)
    store = cache.vision_features(tmp_path, tower, paths, opened, rows.preprocessing(160), 0, "cpu", lambda line: None)
    with torch.no_grad():
        live = tower(pixel_values=torch.stack([opened(path) for path in paths])).last_hidden_state
    assert store.shape == (25, 256) and all(torch.equal(store[path], one) for path, one in zip(paths, live))


def test_another_mean_std_name_or_version_is_another_key_and_another_tower(assembled, monkeypatch):
    import timm
    tower, _ = published.load_vision(assembled("test_efficientnet"))
    pixels_of = rows.preprocessing(160)

    def keys():
        return str(cache.made_from(tower, pixels_of)), towers.fingerprint(tower)

    seen = [keys()]
    assert seen[0] == keys()
    for name, value in (("mean", [0.5, 0.5, 0.5]), ("std", [0.5, 0.5, 0.4]), ("arch", "tf_efficientnet_b0")):
        monkeypatch.setitem(tower.config.timm, name, value)
        seen.append(keys())
    monkeypatch.setattr(tower.config, "image_size", 192)
    seen.append(keys())
    assert len({key for key, _ in seen}) == len({print_ for _, print_ in seen}) == 5
    monkeypatch.setattr(timm, "__version__", "99.0")
    assert keys()[0] not in {key for key, _ in seen} and keys()[1] == seen[-1][1]


# --- a Q-Former from elsewhere ------------

def test_a_qformer_of_another_tower_is_told(assembled, retrieval, tmp_path, capsys):  # noqa: F811
    """A timm tower has no ln_vision: a source that brings one, or another tower, was trained behind another."""
    folder = assembled("test_efficientnet")
    tower, _ = published.load_vision(folder)
    assert towers.join(tower, f"{folder}/qformer", folder) == {}
    assert "which a timm tower has not" in capsys.readouterr().out
    sources = [retrieval, f"{assembled('test_vit')}/qformer", as_lavis(retrieval, tmp_path / "lavis.pth"),
               as_lavis(retrieval, tmp_path / "tower.pth", lambda name, tensor: tensor)]
    for source in sources:
        with pytest.raises(DataError, match="another vision tower"):
            towers.join(tower, source, folder)
        before = towers.fingerprint(tower)
        assert towers.join(tower, source, folder, strict=False) == {} and towers.fingerprint(tower) == before
    blip, _ = published.load_vision(retrieval)
    with pytest.raises(DataError, match="another vision tower"):
        towers.join(blip, f"{folder}/qformer", retrieval)
