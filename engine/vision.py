"""vision.py: any timm model as the frozen vision tower of a BLIP-2.

    TimmTower    a ViT's tokens, or a CNN's last feature map as tokens, called as transformers' Blip2VisionModel is
    make_tower   one with its pretrained weights, by timm's name
    build_tower  a tower of either kind from its config, without weights; token_count of one; patch_grid of so many tokens
    is_timm, without_tower   what published.py needs to load a folder with such a tower

A folder with a timm tower is one in HuggingFace's format whose vision_config has one entry more, "timm" (SETTINGS); hidden_size and
image_size say what they always say, and num_hidden_layers is 0, since transformers' own tower is not built. The tower's tensors
are vision_model.net.* under timm's own names. Folders without that entry are never touched by this.
"""

import json
import math
import pathlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from data.rows import BLIP_MEAN, BLIP_STD
from engine.errors import DataError, said

SETTINGS = ("arch", "mean", "std", "prefix", "grid")  # timm's name; of its pixels; tokens before the patches; their [rows, columns]
# and "norm" where it is true: a LayerNorm without weights follows. A CNN's map comes out of an activation, while every ViT ends in a
# norm and BLIP-2's tower in ln_vision; a Q-Former behind EfficientNet-Lite2 learns faster with it (docs/small.md)


class TimmTower(nn.Module):
    """config: a Blip2VisionConfig with .timm. Weights are random: published.load_vision and make_tower put them in.

    Always in eval mode: batch norms and drop-path of a frozen tower stay as they are trained."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # timm computes with numbers of its layers, which "meta" has not; its random weights must not move what is drawn after them
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            self.net = build_net(config.timm["arch"], config.image_size)
        self.train(False)

    @property
    def settings(self):
        """What the tokens depend on beside weights and code: of a cache's key and of a fingerprint."""
        norm = {"norm": True} if self.config.timm.get("norm") else {}
        return {**{name: self.config.timm[name] for name in ("arch", "mean", "std")}, **norm, "image_size": self.config.image_size}

    @property
    def tokens(self):
        """P of [B,P,W]."""
        rows, columns = self.config.timm["grid"]
        return self.config.timm["prefix"] + rows * columns

    def train(self, mode=True):
        return super().train(False)

    def forward(self, pixel_values):
        """pixel_values [B,3,s,s] in BLIP's normalisation -> .last_hidden_state [B,P,W] in the tower's dtype.

        CLS and registers stand first where the net has them; the patches follow row by row."""
        def of_channels(values):
            return torch.tensor(values, device=pixel_values.device).view(1, 3, 1, 1)

        pixels = (pixel_values.float() * of_channels(BLIP_STD) + of_channels(BLIP_MEAN)).clamp(0, 1)
        pixels = (pixels - of_channels(self.config.timm["mean"])) / of_channels(self.config.timm["std"])
        tokens = as_tokens(self.net, self.net.forward_features(pixels.to(next(self.net.parameters()).dtype)))
        if self.config.timm.get("norm"):
            tokens = F.layer_norm(tokens, tokens.shape[-1:])
        return SimpleNamespace(last_hidden_state=tokens)


def build_net(arch, size, **loading):
    """timm.create_model without its head. DataError: a name that timm does not know, a size that the net cannot have."""
    import timm
    try:
        # a net whose layers know the picture's size must be told it; others take any
        sized = {"img_size": size} if size and timm.models.get_pretrained_cfg(arch).fixed_input_size else {}
        net = timm.create_model(arch, **sized, **{"pretrained": False, **loading})
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, OSError) as error:
        raise DataError(f"timm:{arch}: cannot be built{' at ' + str(size) + ' pixels' if size else ''} "
                        f"({said(error)})") from None
    net.reset_classifier(0, "")  # no class scores and no attention pooling, which would be weights that nothing uses
    return net


def as_tokens(net, found):
    """What timm's forward_features gives, [B,P,W], [B,W,h,w] or [B,h,w,W] -> [B,P,W]."""
    if found.ndim == 3:
        return found
    if getattr(net, "output_fmt", "NCHW") == "NHWC":  # Swin and its kind
        return found.flatten(1, 2)
    return found.flatten(2).transpose(1, 2)


def make_tower(arch, weights=None, size=None, log=print):
    """timm's name -> TimmTower with pretrained weights. weights: a file in the names of timm or of the original publisher (None: timm
    fetches its own); size: side of the pictures (None: that of the pretraining). DataError: file and net do not fit."""
    import timm
    from transformers import Blip2VisionConfig
    overlay = {"pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    net = build_net(arch, size, pretrained=True, **overlay)
    told = timm.data.resolve_model_data_config(net)
    size = size or told["input_size"][-1]
    try:
        with torch.no_grad():
            found = net.eval().forward_features(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"timm:{arch}: takes no pictures of {size} pixels ({said(error)}): another --image-size") from None
    prefix = getattr(net, "num_prefix_tokens", 0) if found.ndim == 3 else 0
    grid = grid_of(net, found, prefix)
    width = as_tokens(net, found).shape[-1]
    config = Blip2VisionConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=0, num_attention_heads=1, image_size=size,
                               timm={"arch": arch, "mean": list(told["mean"]), "std": list(told["std"]), "prefix": prefix, "grid": grid,
                                     **({"norm": True} if is_map(net, found) else {})})
    tower = TimmTower(config)
    tower.net.load_state_dict(net.state_dict())
    log(f"timm:{arch}: {tower.tokens} tokens of {width} at {size} pixels")
    return tower


def is_map(net, found):
    """Is what forward_features gave a CNN's map [B,W,h,w]?"""
    return found.ndim == 4 and getattr(net, "output_fmt", "NCHW") != "NHWC"


def grid_of(net, found, prefix):
    """[rows, columns] of the patches in what forward_features gave of a square picture."""
    if found.ndim == 3:
        count = found.shape[1] - prefix
        side = round(count ** 0.5)
        return [side, side] if side * side == count else [1, count]
    return list(found.shape[1:3] if getattr(net, "output_fmt", "NCHW") == "NHWC" else found.shape[2:])


def build_tower(config):
    """A Blip2VisionConfig -> its tower with weights to be loaded: TimmTower, or transformers' own on the current device."""
    from transformers import Blip2VisionModel
    return TimmTower(config) if getattr(config, "timm", None) else Blip2VisionModel(config)


def token_count(tower):
    """P of [B,P,W] that a tower gives."""
    if isinstance(tower, TimmTower):
        return tower.tokens
    return (tower.config.image_size // tower.config.patch_size) ** 2 + 1


def patch_grid(count):
    """P tokens -> (how many stand before the patches: none, CLS, or CLS and four registers; patches along a side).

    The fewest that leave a square: no two fit, but for 9 tokens. ValueError: none does."""
    for prefix in (0, 1, 5):
        side = math.isqrt(max(count - prefix, 0))
        if side and side * side == count - prefix:
            return prefix, side
    raise ValueError(f"{count} tokens are no square of patches, alone or behind CLS and registers: no map can be drawn of them")


def timm_settings(model):
    """What a cache's key says of a timm tower, or of a model with one, beside weights and layers; {} of any other. timm's version
    stands for its code."""
    towers = [module for module in model.modules() if isinstance(module, TimmTower)]
    if not towers:
        return {}
    import timm
    return {"timm": {**towers[0].settings, "version": timm.__version__}}


def is_timm(folder):
    """Is this a local folder whose tower is timm's? DataError: its entry is not as it must be."""
    try:
        config = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a hub's ID, or a fault that is told where the folder is read
    config = config if isinstance(config, dict) else {}
    vision = config.get("vision_config", config)
    entry = vision.get("timm") if isinstance(vision, dict) else None
    if entry is not None and (not isinstance(entry, dict) or set(SETTINGS) - entry.keys()):
        raise DataError(f"{folder}: its config.json has a vision_config.timm without {', '.join(SETTINGS)}: give the folder that "
                        "tools/assemble.py wrote")
    return entry is not None


def without_tower(model_class):
    """A transformers BLIP-2 class with an empty module for its tower: what is left of a folder whose tower is loaded by itself."""
    class WithoutTower(model_class):
        _keys_to_ignore_on_load_unexpected = [r"^vision_model\."]  # else a table of every layer that is left out

        def __init__(self, config):
            super().__init__(config)
            self.vision_model = nn.Module()
    return WithoutTower
