"""checkpoints.py: tensors on disk: our own best.pt and last.pt, and what others wrote, without running what it holds.

    checkpoint_file, save_checkpoint, load_checkpoint    our own; code in a file never runs; load_best: a stage's best.pt
    trainable_state, load_trainable, fingerprint, other_parts, is_part, parts_table    what one holds of a model
    write_merged                                the same without LoRA
    verify_saved, refuse_other_tensors          proof that it holds the model, bit by bit
    load_foreign, unwrap_state, stated_net, load_strictly, start_from   somebody else's
"""

import hashlib
import json
import pathlib
import pickle
import shutil
import warnings
import zipfile
import zlib
from argparse import Namespace

import numpy as np
import torch
from torch import nn

from engine import files, vision
from engine.errors import DataError, said


# --- our own ------------

def checkpoint_file(place, or_else=""):
    """A run's folder or its best.pt -> path of the best.pt. or_else: what else may be given. DataError: there is none."""
    path = pathlib.Path(files.located(place))
    wanted = "the folder of a run (such as runs/gated)" + (f", its best.pt or {or_else}" if or_else else " or its best.pt")
    if path.is_dir():
        near = sorted({*path.glob("*/best.pt"), *path.parent.glob("*/best.pt")})[:3]
        there = f" (there is one in {', '.join(str(file.parent) for file in near)})" if near else ""
        path = path / "best.pt"
        if not path.is_file():
            raise DataError(f"{place}: no best.pt in this folder{there}: give {wanted}")
    if not path.is_file():
        raise DataError(f"{place}: no such checkpoint: give {wanted}")
    return path


def save_checkpoint(path, content):
    """torch.save of tensors and plain values, whole or not at all. A failed write (disk full) is a DataError."""
    try:
        with files.whole_file(path, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        while not isinstance(error, OSError) and error.__context__:  # torch tells of its own place in the file, and not why
            error = error.__context__
        folder = pathlib.Path(path).parent
        advice = files.remedy(error)
        free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MB are free on its disk" if folder.is_dir() else "no such folder"
        free = f"; {free}" if advice == "free some space" else ""
        resume = " and use --resume" if (folder / "last.pt").exists() else " (with --save-last, --resume could go on from here)"
        raise DataError(f"{path}: could not be saved ({' '.join(str(error).split())}{free}); what stood there before is "
                        f"untouched: {advice}{resume}") from None


def load_checkpoint(path, needs=()):
    """Load one of our own checkpoints with weights_only=True: code in the file never runs. needs: keys it must hold."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as parts:  # torch.load itself never looks at the check sums
            changed = parts.testzip()
            # nor do check sums cover these two, which torch.save leaves at 0
            changed = changed or next((part.filename for part in parts.infolist() if part.external_attr or part.compress_type),
                                      None)
        if changed:
            raise ValueError(f"the bytes of {changed} have changed since they were written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: not one of this project's checkpoints, which hold tensors and plain values: it holds "
                        f"{forbidden(error)}, and nothing of it was run") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = said(error)
        raise DataError(f"{path}: damaged, incomplete or not one of this project's checkpoints ({reason})") from None
    missing = [key for key in needs if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"{path}: not a checkpoint of this stage (no {', '.join(missing)})")
    return as_written_today(content)


def load_best(place, stage, needs):
    """A run's folder or its best.pt -> (path of the best.pt as text, its content). DataError: also where it is of another stage."""
    path = checkpoint_file(place)
    content = load_checkpoint(path, needs)
    if content.get("stage") != stage:
        raise DataError(f"{path}: a checkpoint of another stage ({content.get('stage')}) and not of this one")
    return str(path), content


def as_written_today(content):
    """A checkpoint as this version writes it: float32 tensors where it was kept in half precision to be small, and the length of
    an answer among model_args, which was a flag alone once."""
    if isinstance(content, dict) and content.get("kept_in") == "float16":
        content["state"] = {name: tensor.float() for name, tensor in content["state"].items()}
    if isinstance(content, dict) and "max_answer" in content.get("args", ()) and "model_args" in content:
        content["model_args"].setdefault("max_answer", content["args"]["max_answer"])
    return content


def forbidden(error):
    """The class or function that the weights-only loader met, from its error."""
    reason = " ".join(str(error).split())
    return reason.split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in reason else "an object that is not allowed"


# --- what one holds of a model ------------

LINEAR = "language_model, linear layers"  # a part of fingerprint
ARCHITECTURE = "efficientnet, architecture"  # another: not a hash but what its `settings` say
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parts_table(model):
    """Parameters by top-level part: list of (part, trainable, frozen), and the sum as the last row."""
    rows = []
    for name, part in [*model.named_children(), *model.named_parameters(recurse=False)]:
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        counts = [sum(p.numel() for p in parameters if p.requires_grad is wanted) for wanted in (True, False)]
        if sum(counts):
            rows.append((name, *counts))
    return rows + [("sum", sum(r[1] for r in rows), sum(r[2] for r in rows))]


def print_parts(model):
    """Print parts_table, one line a part."""
    print(f"{'part':22}{'trainable':>15}{'frozen':>17}")
    for name, trainable, frozen in parts_table(model):
        print(f"{name:22}{trainable:>15,}{frozen:>17,}")


def trainable_state(model):
    """{name: tensor on the CPU} of everything that is trained: what best.pt holds."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model, state, source):
    """Put trainable_state back, strictly: the same names and shapes, or a DataError that names the first that differ."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = list(own.keys() ^ state.keys()) + [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    if wrong:
        raise DataError(f"{source} does not fit this model: {len(wrong)} of {len(own)} tensors are missing, unknown or of "
                        f"another shape, first {sorted(wrong)[:3]}: was it trained on another model, "
                        "or with other flags (--gating, --per, --steer, --no-gate)?")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def fingerprint(model, dtype=None):
    """{part: short hash} of the frozen parts: shapes and a few values of every tensor, rounded to bf16 so that it does not depend
    on the dtype of loading. Tells the BLIP-2 a run was trained on from another one; it is not a checksum of all bytes.
    dtype: as of a model loaded in it, for float16, whose values round to bf16 in another way at times (None: as it is).

    The linear layers of the language model are a part of their own, absent where their weights are packed (int8, nf4); so is what
    architecture the style classifier's tensors were put into, which other architectures have too."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, nn.Linear)
              and name.startswith("language_model.") and (".layers." in name or ".block." in name)}  # T5's layers are blocks
    packed = any(not module.weight.is_floating_point() for module in linear.values())
    digests = {}
    for name, tensor in sorted(model.state_dict().items()):
        in_linear = name.startswith(tuple(linear))
        if name in trained or (in_linear and packed):
            continue
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)].to(dtype or flat.dtype).to(torch.bfloat16).float().cpu().numpy()
        digest = digests.setdefault(LINEAR if in_linear else name.partition(".")[0], hashlib.sha256())
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.tobytes())
    for name, part in model.named_children():
        if isinstance(part, vision.TimmTower):  # the same weights with another mean and std are another tower
            digests[name].update(repr(part.settings).encode())
    style = getattr(getattr(model, "efficientnet", None), "settings", None)
    described = {ARCHITECTURE: ", ".join(f"{name} {value}" for name, value in style.items())} if style else {}
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()} | described


def other_parts(now, was):
    """The parts whose fingerprints differ. The language model's linear layers count only where neither side has packed them, the style
    classifier's architecture only where both name it (earlier versions did not)."""
    if not isinstance(was, dict):  # of an older version of this project
        return ["all"]
    return sorted(part for part in now.keys() | was.keys() if now.get(part) != was.get(part)
                  and not (part in (LINEAR, ARCHITECTURE) and (part in now) != (part in was)))


def is_part(module, part, frozen, precision=None):
    """Is a module, frozen by this, the `part` of a training? frozen: the fingerprints of that; precision: the name of what it was loaded
    in there (None: not known). -> True, False, or None where float16 on one side alone rounds otherwise, so that it cannot be told."""
    asked = nn.ModuleDict({part: module.requires_grad_(False)})
    was, then = {name: value for name, value in frozen.items() if name.startswith(part)}, PRECISIONS.get(precision)
    if any(not other_parts(fingerprint(asked, dtype), was) for dtype in (None, then or torch.float16)):
        return True
    now = next(p.dtype for p in module.parameters() if p.is_floating_point())
    lost = now is torch.float16 and then is not torch.float16 or then is torch.float16 and now is torch.bfloat16
    return None if lost else False


def write_merged(path, model, checkpoint):
    """--merge-lora: a best.pt of train_gated.py, whose tensors are in `model`, without LoRA: read like any other, and peft is no longer
    needed. DataError: there is no LoRA in it."""
    if not checkpoint["model_args"]["lora_rank"]:
        raise DataError("--merge-lora: this checkpoint was trained without --lora-rank")
    model.merge_lora()
    settings = {**checkpoint["model_args"], "lora_rank": 0, "own_kv": True}
    save_checkpoint(path, {**checkpoint, "state": trainable_state(model), "model_args": settings, "frozen": fingerprint(model)})
    print(f"merged: {path}")


# --- proof ------------

def verify_saved(path, model):
    """DataError unless the tensors of the best.pt at `path` are those of the model, bit by bit. For use after each save_best:
    the file is read once (its check sums too), no model is built."""
    refuse_other_tensors(path, load_checkpoint(path, ("state",))["state"], trainable_state(model))


def state_digest(state):
    """Hash of all bytes of {name: tensor}."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_other_tensors(source, found, expected):
    """DataError where two {name: tensor} differ in a name or a bit."""
    wrong = sorted(name for name in found.keys() | expected.keys()
                   if name not in found or name not in expected or not same_bits(found[name], expected[name]))
    if wrong:
        raise DataError(f"{source}: not the model that was to be saved: {len(wrong)} of {len(expected)} trained tensors are missing, "
                        f"unknown or differ, first {wrong[:3]}")


def same_bits(a, b):
    """Same shape, dtype and bytes; unlike torch.equal it tells 0 from -0 and takes NaN for NaN."""
    def flat(x):
        return x.detach().contiguous().reshape(-1).view(torch.uint8)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(flat(a), flat(b))


# --- somebody else's ------------

def _harmless_globals():
    """Classes that training scripts leave in checkpoints and that run nothing when they are rebuilt."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, n) for n in ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")]
    paths = [(getattr(pathlib, n), f"{module}.{n}") for n in ("PosixPath", "PurePosixPath")
             for module in ("pathlib", "pathlib._local")]  # Python 3.13 writes the second name
    return [Namespace, np.dtype, *dtypes, *paths,
            (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]


def _load_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({said(error)}): download it again") from None


def _is_torchscript(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False  # damaged: torch.load says so


def load_foreign(path, safe, advice="drop --safe-load if you trust whoever made the file", mapped=False):
    """Load a checkpoint that somebody else wrote, without running anything in it where that is possible.

    Tries torch's weights-only loader with argparse.Namespace, PosixPath and numpy scalars allowed. Only when the file needs
    another class: with safe=True a DataError; else a warning and weights_only=False, WHICH RUNS WHATEVER THE FILE HOLDS.
    A damaged file is a DataError and never reaches the second way. mapped: tensors are read from the disk where they are used, for
    files of which little is; the file must stay as it is until then.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint")
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return _load_safetensors(path)
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise DataError(f"{path}: not a PyTorch file ({path.stat().st_size} bytes; a web page or a git-lfs pointer saved "
                        "under this name?): download it again")
    if head[:2] == b"PK" and _is_torchscript(path):
        raise DataError(f"{path}: a TorchScript archive, code and weights together: save the weights alone, "
                        "torch.save(torch.jit.load(FILE).state_dict(), OTHER)")
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            zipped = head[:2] == b"PK"  # torch before 1.6 wrote no archives, and those cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
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


EMA = ("ema", "state_dict_ema", "model_ema", "ema_state_dict")  # averaged weights: taken first where a file holds both
STATES = ("model", "state_dict", "model_state_dict", "model_state", "net", "state")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


def unwrap_state(loaded, source):
    """The state dict in whatever a training script has saved -> ({name: tensor}, where it stood).

    It is the file itself, what stands under one of EMA or STATES, or the one value that is a dict of tensors ({"epoch": 3,
    "Blip2Retrieval": {...}}). Prefixes of DataParallel, of torch.compile and of Lightning's one module ("model.") go. DataError:
    there is none, or several under names that do not tell."""
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    where = "the file itself"
    if not _is_state(loaded):
        held = {key: value.state_dict() if isinstance(value, nn.Module) else value
                for key, value in (loaded.items() if isinstance(loaded, dict) else ())}
        states = [key for key, value in held.items() if _is_state(value)]
        known = [key for key in (*EMA, *STATES) if key in states]
        if not known and len(states) != 1:
            raise DataError(f"{source}: no state dict, or more than one, stands in it: " + (
                f"its keys are {', '.join(sorted(map(repr, held))[:8])}" if held else f"it holds a {type(loaded).__name__}")
                + "; save the right one alone: torch.save(model.state_dict(), FILE)")
        key = (known or states)[0]
        loaded, where = held[key], f"key {key!r}"
    state = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor) and name != "n_averaged"}
    while (bare := _without_prefixes(state)).keys() != state.keys():  # one wrapper may stand in another: model._orig_mod.module.
        state = bare
    return state, where


def _without_prefixes(state):
    """One round of prefixes less: those of PREFIXES, and "model." where every name has it, which is Lightning's one module."""
    state = {name.split(".", 1)[1] if name.startswith(PREFIXES) else name: tensor for name, tensor in state.items()}
    if state and all(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return state


def _is_state(value):
    """A non-empty dict whose values are tensors, but for plain entries such as BERT's _metadata or a step count."""
    return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()) and not any(
        isinstance(v, (dict, nn.Module)) and v for k, v in value.items() if k != "_metadata")


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


def stated_net(loaded, path):
    """What is said of the net whose weights were `loaded` from a file: {"arch", "mean", "std"}, those that are named in the file, else in
    the config.json that timm writes beside it. DataError: that cannot be read."""
    own = {name: loaded[name] for name in ("arch", "mean", "std") if isinstance(loaded, dict) and name in loaded}
    beside = pathlib.Path(path).with_name("config.json")
    if isinstance(own.get("arch"), str):
        return own
    own.pop("arch", None)  # of somebody else's making: a module, say
    if not beside.is_file():
        return own
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{beside}: cannot be read ({said(error)}): it should say which net {path} is of") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return own  # of another library
    pixels = config["pretrained_cfg"] if isinstance(config.get("pretrained_cfg"), dict) else config
    return {"arch": config["architecture"], **{name: pixels[name] for name in ("mean", "std") if name in pixels}, **own}


def refuse_other_net(net, arch, stated, path):
    """DataError where a file's weights are of another of timm's nets (see stated_net) than `net`, which `arch` names. Their tensors may
    have the same names and shapes."""
    import timm
    named = stated.get("arch", arch)
    known = timm.models.get_pretrained_cfg(named)  # None of a name that timm has given up
    if (known.architecture != net.pretrained_cfg["architecture"]) if known else named != arch:
        raise DataError(f"--init {path}: weights of {named}, and not of {arch}, whose layers compute otherwise: give --arch {named}")


def start_from(net, path, head, arch, log=print):
    """--init of a classifier: every weight of a file, strictly, but a head of another number of classes; code in it never runs.

    head: the names of the head's tensors; arch: timm's name of the net."""
    advice = "save its state dict alone: torch.save(model.state_dict(), FILE)"
    loaded = load_foreign(path, True, advice)
    (state, where), stated = unwrap_state(loaded, path), stated_net(loaded, path)
    refuse_other_net(net, arch, stated, path)
    if "arch" not in stated:
        log(f"{path}: taken for {arch} (--arch): neither the file nor a config.json beside it names its net")
    own = net.state_dict()
    other = [n for n in head if n in state and state[n].shape[:1] != own[n].shape[:1] and state[n].ndim == own[n].ndim]
    if other:
        log(f"{path}: its classifier head of {len(state[other[0]])} classes is left out, the new one has {len(own[other[0]])}")
        state = {**state, **{name: own[name] for name in head}}
    load_strictly(net, state, f"--init {path} ({where})")
