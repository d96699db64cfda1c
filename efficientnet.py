"""efficientnet.py: the style classifier, and loading weights that somebody else wrote without running what they hold."""

import pathlib
import pickle
import warnings
from argparse import Namespace

import numpy as np
import torch
from torch import nn

from engine.errors import DataError

from data.rows import BLIP_MEAN, BLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from engine.runfolder import forbidden


# WikiArt's 27 styles in the order of ArtGAN's style_class.txt, then photographs
WIKIART = ["Abstract Expressionism", "Action Painting", "Analytical Cubism", "Art Nouveau", "Baroque", "Color Field Painting",
           "Contemporary Realism", "Cubism", "Early Renaissance", "Expressionism", "Fauvism", "High Renaissance",
           "Impressionism", "Mannerism Late Renaissance", "Minimalism", "Naive Art Primitivism", "New Realism",
           "Northern Renaissance", "Pointillism", "Pop Art", "Post Impressionism", "Realism", "Rococo", "Romanticism",
           "Symbolism", "Synthetic Cubism", "Ukiyo-e", "Photograph"]


def _harmless_globals():
    """Classes that training scripts leave in checkpoints and that run nothing when they are rebuilt."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, n) for n in ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")]
    paths = [(getattr(pathlib, n), f"{module}.{n}") for n in ("PosixPath", "PurePosixPath")
             for module in ("pathlib", "pathlib._local")]  # Python 3.13 writes the second name
    return [Namespace, np.dtype, *dtypes, *paths,
            (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]


def load_foreign(path, safe, advice="drop --safe-load if you trust whoever made the file"):
    """Load a checkpoint that somebody else wrote, without running anything in it where that is possible.

    Tries torch's weights-only loader with argparse.Namespace, PosixPath and numpy scalars allowed. Only when the file needs
    another class: with safe=True a DataError; else a warning and weights_only=False, WHICH RUNS WHATEVER THE FILE HOLDS.
    A damaged file is a DataError and never reaches the second way.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint")
    with path.open("rb") as file:
        head = file.read(2)
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise DataError(f"{path}: not a PyTorch file ({path.stat().st_size} bytes; a web page or a git-lfs pointer saved "
                        "under this name?): download it again")
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = forbidden(error)
    except (EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: damaged or incomplete ({type(error).__name__}): download it again") from None
    if safe:
        raise DataError(f"{path}: holds {name}, which only the unsafe loader can rebuild; {advice}")
    warnings.warn(f"{path} holds {name}: loading it with weights_only=False, which runs whatever code the file holds. "
                  "--safe-load refuses this.", stacklevel=2)
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling foreign code may raise anything
        raise DataError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from None


def unwrap_state(loaded):
    """Find the state dict in a checkpoint: bare, or under ema / model / state_dict (EMA weights first); strip
    `module.` and `_orig_mod.` prefixes. Returns ({name: tensor}, where it stood)."""
    where = "the file itself"
    for key in ("ema", "state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict"):
        inner = loaded.get(key) if isinstance(loaded, dict) else None
        if inner is not None and (isinstance(inner, (dict, nn.Module))):
            loaded, where = inner, f"key {key!r}"
            break
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    state = {}
    for name, tensor in (loaded.items() if isinstance(loaded, dict) else ()):
        if isinstance(tensor, torch.Tensor):
            while name.startswith(("module.", "_orig_mod.")):
                name = name.split(".", 1)[1]
            state[name] = tensor
    return state, where


class EfficientNet28(nn.Module):
    """Style classifier: timm's EfficientNet-B3 with a head of 28 classes (27 WikiArt styles and photographs).

    forward takes images in BLIP's normalisation and at BLIP-2's size; the bridge to ImageNet's normalisation is inside.
    """

    def __init__(self, num_classes=28, arch="efficientnet_b3", classes=None):
        super().__init__()
        import timm
        self.net = timm.create_model(arch, num_classes=num_classes, pretrained=False)
        self.arch, self.num_classes, self.classes = arch, num_classes, classes
        for name, values in (("blip_mean", BLIP_MEAN), ("blip_std", BLIP_STD),
                             ("net_mean", IMAGENET_MEAN), ("net_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self):
        """Length of the pooled feature (1536 for B3)."""
        return self.net.num_features

    @classmethod
    def from_checkpoint(cls, path, safe=False):
        """Build the net with as many classes as the checkpoint holds, and load it strictly. `arch` and `classes` are
        taken from the file where it has them (ours do); other files are taken for an EfficientNet-B3."""
        loaded = load_foreign(path, safe)
        state, where = unwrap_state(loaded)
        if "classifier.weight" not in state:
            raise DataError(f"{path}: no timm EfficientNet in {where} (no classifier.weight among {len(state)} tensors, "
                            f"first {list(state)[:3]})")
        extra = loaded if isinstance(loaded, dict) else {}
        arch = extra.get("arch") if isinstance(extra.get("arch"), str) else "efficientnet_b3"
        try:
            net = cls(state["classifier.weight"].shape[0], arch, extra.get("classes"))
        except RuntimeError as error:  # timm, of a name that it does not know
            raise DataError(f"{path}: arch {arch!r} cannot be built ({' '.join(str(error).split())})") from None
        load_strictly(net.net, state, f"{path} ({where}) as {arch}")
        return net

    def style_names(self):
        """The classes' names: the checkpoint's own, else WikiArt's where their number fits. DataError: neither."""
        names = self.classes if isinstance(self.classes, (list, tuple)) else WIKIART[:self.num_classes]
        if len(names) != self.num_classes or not all(isinstance(name, str) for name in names):
            raise DataError(f"the style checkpoint names {len(names)} styles for its {self.num_classes} classes: a style cannot "
                            "be taken from its prediction")
        return [name.replace("_", " ") for name in names]

    def forward(self, images):
        """images [B,3,h,w] in BLIP's normalisation -> pooled feature [B,width]."""
        pixels = (images.float() * self.blip_std + self.blip_mean).clamp(0, 1)
        return self.net.forward_head(self.net.forward_features((pixels - self.net_mean) / self.net_std), pre_logits=True)

    def logits(self, feature):
        """Pooled feature [B,width] -> class scores [B,num_classes]."""
        return self.net.get_classifier()(feature)


def load_strictly(module, state, source, assign=False):
    """load_state_dict that says in one line what does not fit."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in own.keys() & state.keys()
              if own[n].shape != state[n].shape]
    if missing or unexpected or shapes:
        raise DataError(f"{source} does not fit: missing {missing[:5]} ({len(missing)}), unexpected {unexpected[:5]} "
                        f"({len(unexpected)}), other shapes {shapes[:5]} ({len(shapes)})")
    module.load_state_dict(state, assign=assign)
