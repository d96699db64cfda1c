"""towers.py: the frozen parts that a Q-Former from elsewhere is put between.

    join          the ln_vision that was trained with the Q-Former goes into the tower; another tower is refused, or said
    refuse_other_reader    the language model that its projection speaks to; another one is refused
    differing     two towers, tensor by tensor

LAVIS trains ln_vision, the norm between tower and Q-Former, together with the Q-Former and leaves the tower frozen. HuggingFace's
format counts it to the tower, as post_layernorm. A timm tower (vision.py) has no such norm, neither in its own place nor trained: its
Q-Former reads the tokens as timm gives them, and a Q-Former that brings an ln_vision was trained behind another tower.
"""

import pathlib

import torch
from torch import nn

from engine import checkpoints, published, vision
from engine.errors import DataError

NORM = "post_layernorm."
# LAVIS's name of a tower's tensor -> HuggingFace's, applied in this order (its q_bias and v_bias are one tensor there: not compared)
LAVIS_TOWER = (("visual_encoder.", ""), ("blocks.", "encoder.layers."), (".norm", ".layer_norm"),
               (".attn.proj.", ".self_attn.projection."), (".attn.", ".self_attn."), ("cls_token", "embeddings.class_embedding"),
               ("pos_embed", "embeddings.position_embedding"), ("patch_embed.proj.", "embeddings.patch_embedding."))
TOWER, READER = "vision_model", "language_model"  # parts, as HuggingFace calls them
ROUNDED = " (float16 then or now rounds its values otherwise)"
ROUNDING = 2 ** -7  # relative; of bfloat16, the coarsest that a tower is kept in


def join(tower, source, name, log=print, strict=True):
    """Before the Q-Former of `source` goes behind `tower`: the ln_vision that was trained with it replaces the tower's own.

    tower: the Blip2VisionModel or TimmTower of `name`; source: a folder in HuggingFace's format, a .pth or .bin file, a best.pt. One
    line says what was found. -> {"weight": [W], "bias": [W]} as the source has them, {} where it has none.
    DataError: the source holds, or names by its fingerprint, another tower; without `strict` it is said, and the tower stays as it is.
    """
    found = _tower_of(pathlib.Path(source))
    of_timm = isinstance(tower, vision.TimmTower)
    own, norm = nn.Module() if of_timm else tower.post_layernorm, found["norm"]
    before = {n: tensor.clone() for n, tensor in own.state_dict().items()}
    if of_timm:  # LAVIS's tower is never compared to it name by name: they have none in common
        other = differing(tower, found["held"]) if found["held"] else ["ln_vision"] if norm else []
    else:
        checkpoints.load_strictly(own, norm or before, f"ln_vision of {source}")
        other = differing(tower, found["held"], found["of_lavis"]) if found["held"] else []
    alike = not found["frozen"] or checkpoints.is_part(tower, TOWER, found["frozen"], found["precision"])
    if alike is False:
        other = ["its fingerprint"]
    if other and (of_timm or not found["of_lavis"]):
        told = f"its Q-Former was trained behind another vision tower than that of {name} ({len(other)} differ, first {other[0]})"
        if strict:
            raise DataError(f"{source}: {told}: give --blip2 with the tower of that training")
        own.load_state_dict(before)
        log(f"note: {source}: {told}; the tower and its ln_vision are those of {name}")
        return {}
    kept = "which a timm tower has not" if of_timm else "that of the tower stays"
    told = ["with its ln_vision" if norm else f"without an ln_vision, {kept}"]
    if found["of_lavis"]:
        told += [f"its visual_encoder is left out, {len(found['held'])} tensors, "
                 + (f"though {len(other)} of them are other than those of {name} (fine-tuned?)" if other else f"the same as {name}")]
    elif alike is None or not found["held"] and not found["frozen"]:
        told += [f"which vision tower it was trained behind cannot be told{ROUNDED if alike is None else ''}, that of {name} is taken"]
    log(f"Q-Former of {source}: {'; '.join(told)}")
    return norm


def refuse_other_reader(language_model, source, name, log=print):
    """Before the Q-Former of `source`, which brings its projection, speaks to `language_model`, that of `name` (in any precision, packed or
    not): DataError where the source holds another one, or names it by its fingerprint. One line says what was found."""
    path, alike, other = pathlib.Path(source), None, ["its fingerprint"]
    loaded = {} if path.is_dir() else published.load_qformer_file(path)
    frozen = loaded.get("frozen") if isinstance(loaded, dict) else None
    if path.is_dir():
        own = {n: sampled(t) for n, t in language_model.state_dict().items() if t.is_floating_point()}  # packed ones are in whole numbers
        held = {n.removeprefix(f"{READER}."): sampled(tensor) for n, tensor in _tensors_in(path, f"{READER}.")}
        both = [n for n in own.keys() & held.keys() if own[n][0] == held[n][0]]  # a table of words may have been given more rows
        other = sorted(n for n in both if not close(own[n], held[n]))
        alike = not other if both else None
    elif isinstance(frozen, dict) and READER in frozen:
        built = loaded.get("model_args") or {}
        precision = built.get("lm_precision") if built.get("lm_precision") in checkpoints.PRECISIONS else loaded.get("precision")
        alike = checkpoints.is_part(language_model, READER, frozen, precision)
    if alike is False:
        raise DataError(f"{source}: its Q-Former was trained with another language model than that of {name} ({len(other)} differ, first "
                        f"{other[0]}): give --blip2 with the language model of that training, or a Q-Former of stage 1, which has spoken "
                        "to none")
    log(f"Q-Former of {source}: with its projection to the language model; " + (
        f"which one it was trained with cannot be told{ROUNDED if frozen else ''}, that of {name} is taken" if alike is None else
        f"that of {name} is the one it was trained with"))


def fingerprint(tower):
    """checkpoints.fingerprint of a tower, which is frozen by this."""
    return checkpoints.fingerprint(nn.ModuleDict({TOWER: tower.requires_grad_(False)}))[TOWER]


def sampled(tensor):
    """(shape, about 64 values in float32) of a tensor: enough to tell a trained one from another."""
    flat = tensor.detach().flatten()
    return tuple(tensor.shape), flat[::max(1, flat.numel() // 64)].float().cpu()


def differing(tower, other, common=False):
    """Names of a tower's tensors that are other ones in `other`, {name: sampled}, ln_vision left out. common: those alone count that
    both have. Two precisions of the same values do not differ."""
    own = {n: sampled(tensor) for n, tensor in tower.state_dict().items() if not n.startswith(NORM)}
    other = {n: values for n, values in other.items() if not n.startswith(NORM)}
    names = own.keys() & other.keys() if common else own.keys() | other.keys()
    return sorted(n for n in names if n not in own or n not in other or own[n][0] != other[n][0] or not close(own[n], other[n]))


def close(one, other):
    """Are two of `sampled`, of one shape, the same but for the precision that they are kept in?"""
    return torch.allclose(one[1], other[1], rtol=ROUNDING, atol=1e-7)


def _tower_of(path):
    """What a source knows of its tower: held {name: sampled}, of_lavis: is it LAVIS's visual_encoder?, norm {name: tensor}, frozen and
    precision: the fingerprints in a best.pt, {} where none is of a tower, and what the tower was loaded in."""
    held, norm, loaded = {}, {}, {}
    if path.is_dir():
        tensors = _tensors_in(path, f"{TOWER}.")
    else:
        loaded = published.load_qformer_file(path)
        tensors = checkpoints.unwrap_state(loaded, path)[0].items()
    of_lavis = False
    for name, tensor in tensors:
        inner = name.removeprefix("vision_model.").replace("ln_vision.", NORM)
        if inner.startswith(NORM):
            norm[inner.removeprefix(NORM)] = tensor.clone()
        elif name.startswith("visual_encoder."):
            of_lavis = True
            for old, new in LAVIS_TOWER:
                inner = inner.replace(old, new)
            held[inner] = sampled(tensor)
        elif inner != name:
            held[inner] = sampled(tensor)
    own = loaded if isinstance(loaded, dict) and isinstance(loaded.get("frozen"), dict) else {}  # one of this project's
    return {"held": held, "of_lavis": of_lavis, "norm": norm or own.get("ln_vision", {}),
            "frozen": own["frozen"] if TOWER in own.get("frozen", ()) else {}, "precision": own.get("precision")}


def _tensors_in(folder, prefix):
    """(name, tensor) of the names with this prefix in a folder's .safetensors files, one at a time."""
    from safetensors import safe_open
    for file in sorted(folder.glob("*.safetensors")):
        published.refuse_incomplete(file)
        with safe_open(file, "pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys() if name.startswith(prefix))
