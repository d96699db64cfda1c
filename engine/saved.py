"""saved.py: what a training of gates left, as it is read again: a best.pt, or a folder that eval_gated.py --export wrote.

    read                                       either -> Saved
    sees_style, part_paths, refuse_other_base, refuse_other_dtypes    what must be there, and fit, before the tensors go into a model
    to_peft, from_peft, sizes_of, revision_of   what writing such a folder needs as well

Files from elsewhere are data: safetensors, JSON, and torch.load with weights_only=True. Any tensor that is missing, unknown or of
another shape or dtype, and any frozen part with another fingerprint, is a DataError.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from typing import NamedTuple

import safetensors
import safetensors.torch

from data.tables import excerpt
from engine import checkpoints, published
from engine.errors import DataError, said
from engine.files import located

FORMAT = 1  # of gate_config.json; a file of a higher one is refused
CONFIG, GATES, ADAPTER, ADAPTER_CONFIG = "gate_config.json", "gates.safetensors", "adapter_model.safetensors", "adapter_config.json"
PLACES = ("blip2", "qformer", "efficientnet")  # the settings that name files
PREFIX = "base_model.model."  # of every name in peft's files
TEXT, NUMBER, NONE = str, (int, float), type(None)
FIELDS = {"format": int, "base_model": dict, "style_classifier": (TEXT, NONE), "qformer": (TEXT, NONE), "gating": TEXT, "per": TEXT,
          "gate_scale": NUMBER, "train_qformer": bool, "lora_rank": int, "style_head": bool, "lm_precision": (TEXT, NONE),
          "style_vocabulary": list, "layers": list, "heads": int, "control_width": int, "style_dimension": (int, NONE),
          "loss_weights": dict, "precision": (TEXT, NONE), "fingerprints": dict, "sha256": dict, "versions": dict}


# --- reading ------------

class Saved(NamedTuple):
    """What a best.pt and an exported folder have in common."""
    source: str
    settings: dict  # of Blip2OPTGated.build
    frozen: dict  # fingerprints
    state: dict  # {name: tensor}, see checkpoints.trainable_state
    config: dict  # of an exported folder, {} of a best.pt
    context: str | None = None  # --context of the training: the text that it put before each question


def read(folder, known):
    """A run's folder, its best.pt, or an exported folder (which goes first where a folder is both) -> Saved.

    known: names of the settings that this version's model takes."""
    path = pathlib.Path(located(folder))
    if (path / CONFIG).is_file():
        return _read_export(path, known)
    path = checkpoints.checkpoint_file(folder, "a folder that eval_gated.py --export wrote")
    best = checkpoints.load_checkpoint(path, ("model_args", "state", "frozen"))
    if best.get("stage", "gated") != "gated":
        raise DataError(f"{path}: a checkpoint of another stage ({best['stage']}), not of train_gated.py")
    refuse_unknown(path, best["model_args"].keys() - known)
    return Saved(str(path), best["model_args"], best["frozen"], best["state"], {}, best.get("args", {}).get("context"))


def _read_export(folder, known):
    config = _read_config(folder / CONFIG, known)
    gates = _read_tensors(folder / GATES, config["sha256"])
    adapter = {}
    if config["lora_rank"]:
        _read_bytes(folder / ADAPTER_CONFIG, config["sha256"])
        adapter = {from_peft(name): tensor for name, tensor in _read_tensors(folder / ADAPTER, config["sha256"]).items()}
    if gates.keys() & adapter.keys():
        raise DataError(f"{folder}: {min(gates.keys() & adapter.keys())} stands in both {GATES} and {ADAPTER}")
    settings = {name: config[name] for name in config.keys() & known} | {
        "blip2": config["base_model"]["name"], "efficientnet": config["style_classifier"], "styles": config["style_vocabulary"]}
    return Saved(str(folder), settings, config["fingerprints"], {**gates, **adapter}, config, config.get("context"))


def _read_config(path, known):
    """gate_config.json with every field of FIELDS and none that is not known. DataError: damaged, newer, of another type."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path}: cannot be read ({said(error)})") from None
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise DataError(f"{path}: not written by eval_gated.py --export (no number under \"format\")")
    if config["format"] > FORMAT:
        raise DataError(f"{path}: format {config['format']}, of a newer version of this project; this one reads up to {FORMAT}")
    refuse_unknown(path, config.keys() - FIELDS.keys() - known - {"context"})
    for name, kind in FIELDS.items():
        if name not in config:
            raise DataError(f"{path}: no {name!r} in it: export once more")
        if not isinstance(config[name], kind) or (isinstance(config[name], bool) and kind is not bool):
            raise DataError(f"{path}: {name}: {excerpt(config[name])} will not do")
    if not isinstance(config["base_model"].get("name"), str):
        raise DataError(f"{path}: base_model: no name in it")
    return config


def refuse_unknown(path, names):
    """DataError for settings that this version does not know."""
    if names:
        raise DataError(f"{path}: written by another version of this project (unknown: {', '.join(sorted(names))})")


def _read_bytes(path, digests):
    """The bytes of a file whose sha256 is the one of gate_config.json."""
    if not path.is_file():
        raise DataError(f"{path}: missing: copy the whole folder")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digests.get(path.name):
        raise DataError(f"{path}: its bytes are not those that were exported (sha256 in {CONFIG}): copy or download it again")
    return data


def _read_tensors(path, digests):
    if path.is_file():
        published.refuse_incomplete(path)
    try:
        return safetensors.torch.load(_read_bytes(path, digests))
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: not a safetensors file ({error})") from None


def to_peft(name):
    """Name of a LoRA tensor of the model -> of peft's file, where the adapter's own name is left out."""
    return PREFIX + name.replace(".default.", ".")


def from_peft(name):
    return re.sub(r"\.(lora_[AB])\.", r".\1.default.", name.removeprefix(PREFIX))


# --- fitting ------------

def sees_style(settings):
    """Does a model of these settings (best.pt's model_args) have a style classifier?"""
    return settings["gating"] != "none" or bool(settings.get("steer"))


def part_paths(saved, overrides):
    """The settings with names made into places, those in `overrides` first. DataError: a local one that is not there."""
    is_local = saved.config.get("base_model", {}).get("kind") == "folder"
    if is_local and "blip2" not in overrides and not os.path.exists(located(saved.settings["blip2"])):
        raise DataError(f"{saved.source}: its base model was a folder called {saved.settings['blip2']!r} where it was trained: "
                        "pass blip2= (--blip2) with where it lies here")
    places = {"lm_precision": None, "qformer": None, **published.resolve_paths({**saved.settings, **overrides})}
    if sees_style(places) and not pathlib.Path(places["efficientnet"]).is_file():
        raise DataError(f"{saved.source}: no style classifier at {places['efficientnet']}: pass efficientnet= (--efficientnet) "
                        "with the one of the training")
    if places["qformer"] and not pathlib.Path(places["qformer"]).exists():
        raise DataError(f"{saved.source}: no Q-Former at {places['qformer']}: pass qformer= with the one of the training")
    return places


def refuse_other_base(saved, places, model):
    """DataError that names the frozen parts that are not those of the training, or a size that is not that of gate_config.json."""
    others = checkpoints.other_parts(checkpoints.fingerprint(model), saved.frozen)
    if not others:
        sizes = [f"{name} is {value}, {saved.config[name]} in {CONFIG}" for name, value in sizes_of(model).items()
                 if saved.config and saved.config[name] != value]
        if sizes:
            raise DataError(f"{saved.source}: does not fit its base model: {'; '.join(sizes)}: copy or download the folder again")
        return
    was, now = saved.config.get("base_model", {}).get("revision"), revision_of(places["blip2"])
    told = f"; revision {was} there, {now} here" if was and now and was != now else ""
    if others == ["vision_model"] and places["qformer"]:
        told += "; or by a version of this project that left the ln_vision of its Q-Former out"
    raise DataError(f"{saved.source} was trained on another BLIP-2 or style classifier than {places['blip2']} and "
                    f"{places['efficientnet']} (other: {', '.join(others)}{told}): pass blip2= and efficientnet= of the training")


def refuse_other_dtypes(saved, model):
    own = {name: p.dtype for name, p in model.named_parameters()}
    wrong = sorted(name for name, tensor in saved.state.items() if tensor.dtype != own.get(name, tensor.dtype))
    if wrong:
        raise DataError(f"{saved.source}: {len(wrong)} tensors are of another dtype than the model's, first {wrong[0]} "
                        f"({saved.state[wrong[0]].dtype}): what is trained is kept in full precision")


def sizes_of(model):
    """The fields of gate_config.json that follow from the base model and the style classifier."""
    config = model.qformer.config
    return {"layers": model.qformer.cross_layers, "heads": config.num_attention_heads, "control_width": config.hidden_size,
            "style_dimension": model.efficientnet.width if model.efficientnet else None}


def revision_of(name):
    """Commit of a HuggingFace id in the local cache, or of a folder in such a cache; None where it cannot be told."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    path = os.path.abspath(name) if os.path.exists(name) else None
    if path is None:
        with contextlib.suppress(HFValidationError):
            path = try_to_load_from_cache(name, "config.json")
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)", path) if isinstance(path, str) else None
    return found[1] if found else None
