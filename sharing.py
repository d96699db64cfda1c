"""sharing.py: gates as others can use them: one line to load them, a folder to hand on, proof that both are the same model.

    load_gated       a run's folder, its best.pt or an exported folder -> model and processor (core.load_gated is this)
    export           an exported folder: gates.safetensors, gate_config.json, with LoRA peft's two files, README.md (the model card)
    scores, samples  what the model card tells of an evaluation
    verify           what was written, loaded into a fresh model, gives the same logits to the bit
    verify_saved     the tensors of a best.pt are those of the model, bit by bit; builds no model
    environment      what a bug report needs (python core.py --env), names and paths masked

Files from elsewhere are data: safetensors, JSON, and torch.load with weights_only=True. Any tensor that is missing, unknown or of
another shape or dtype, and any frozen part with another fingerprint, is a DataError.
"""

import contextlib
import copy
import getpass
import hashlib
import html
import importlib.metadata
import inspect
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import socket
import tempfile
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
import yaml
from PIL import Image

import core
import published
import report
import rows
import runfolder
from rows import DataError

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
    state: dict  # {name: tensor}, see runfolder.trainable_state
    config: dict  # of an exported folder, {} of a best.pt


def read(folder):
    """A run's folder, its best.pt, or an exported folder (which goes first where a folder is both) -> Saved."""
    path = pathlib.Path(runfolder.located(folder))
    if (path / CONFIG).is_file():
        return _read_export(path)
    path = runfolder.checkpoint_file(folder, "a folder that eval_gated.py --export wrote")
    best = runfolder.load_checkpoint(path, ("model_args", "state", "frozen"))
    if best.get("stage", "gated") != "gated":
        raise DataError(f"{path}: a checkpoint of another stage ({best['stage']}), not of train_gated.py")
    refuse_unknown(path, best["model_args"].keys() - _known_settings())
    return Saved(str(path), best["model_args"], best["frozen"], best["state"], {})


def _read_export(folder):
    config = _read_config(folder / CONFIG)
    gates = _read_tensors(folder / GATES, config["sha256"])
    adapter = {}
    if config["lora_rank"]:
        _read_bytes(folder / ADAPTER_CONFIG, config["sha256"])
        adapter = {_from_peft(name): tensor for name, tensor in _read_tensors(folder / ADAPTER, config["sha256"]).items()}
    if gates.keys() & adapter.keys():
        raise DataError(f"{folder}: {min(gates.keys() & adapter.keys())} stands in both {GATES} and {ADAPTER}")
    settings = {name: config[name] for name in config.keys() & _known_settings()} | {
        "blip2": config["base_model"]["name"], "efficientnet": config["style_classifier"], "styles": config["style_vocabulary"]}
    return Saved(str(folder), settings, config["fingerprints"], {**gates, **adapter}, config)


def _read_config(path):
    """gate_config.json with every field of FIELDS and none that is not known. DataError: damaged, newer, of another type."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise DataError(f"{path}: not written by eval_gated.py --export (no number under \"format\")")
    if config["format"] > FORMAT:
        raise DataError(f"{path}: format {config['format']}, of a newer version of this project; this one reads up to {FORMAT}")
    refuse_unknown(path, config.keys() - FIELDS.keys() - _known_settings())
    for name, kind in FIELDS.items():
        if name not in config:
            raise DataError(f"{path}: no {name!r} in it: export once more")
        if not isinstance(config[name], kind) or (isinstance(config[name], bool) and kind is not bool):
            raise DataError(f"{path}: {name}: {rows.shown(config[name])} will not do")
    if not isinstance(config["base_model"].get("name"), str):
        raise DataError(f"{path}: base_model: no name in it")
    return config


def _known_settings():
    """Names that Blip2OPTGated.build takes, but for those of how a model is loaded."""
    parameters = [*inspect.signature(core.Blip2OPTGated).parameters, *PLACES, "lm_precision"]
    return set(parameters) - {"tokenizer", "dtype", "safe", "tower"}


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


def _to_peft(name):
    """Name of a LoRA tensor of the model -> of peft's file, where the adapter's own name is left out."""
    return PREFIX + name.replace(".default.", ".")


def _from_peft(name):
    return re.sub(r"\.(lora_[AB])\.", r".\1.default.", name.removeprefix(PREFIX))


# --- loading ------------

class Processor:
    """Pictures -> [B,3,s,s] as the model takes them, on its device: a path, a PIL image, or a list of these (B of them).

    DataError: a picture that is missing, damaged, or of another kind."""

    def __init__(self, model):
        self.model = model

    def __call__(self, pictures):
        pictures = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        tensors = [rows.image_tensor(self._image(one), self.model.image_size) for one in pictures]
        return torch.stack(tensors).to(self.model.query_tokens.device)

    def _image(self, picture):
        if isinstance(picture, (str, os.PathLike)):
            return rows.load_image(picture)
        if not isinstance(picture, Image.Image):
            raise DataError(f"a picture's path or a PIL image is wanted, got {type(picture).__name__}")
        try:
            picture.load()
            return rows.to_rgb(picture)
        except OSError as error:  # Pillow reads no pixel before it must
            raise DataError(f"{getattr(picture, 'filename', '') or 'a PIL image'}: cannot be read ({error})") from None


def load_gated(folder, blip2=None, efficientnet=None, device="cpu", dtype=torch.float32, lm_precision=None, qformer=None,
               safe=True):
    """What was trained -> (Blip2OPTGated in eval mode, Processor).

    folder: runs/<name>/, its best.pt, or an exported folder. blip2, efficientnet, qformer: where these of the training lie now, if
    they moved. Every relative path, also those that the training was started with, counts from the working directory, and from the
    project's folder where it is not there. dtype: of the frozen towers; lm_precision: one of published.LM_PRECISIONS (default: as
    in training). safe=False: take a style classifier that only pickle can load, WHICH RUNS WHATEVER THE FILE HOLDS.

        model, processor = core.load_gated("runs/gated")
        model.predict_answers(processor("painting.jpg"), ["What style is this painting?"])

    DataError: see the head of this file.
    """
    saved = read(folder)
    moved = {"blip2": blip2, "efficientnet": efficientnet, "qformer": qformer, "lm_precision": lm_precision}
    places = _places(saved, {name: str(value) for name, value in moved.items() if value is not None})
    if places["lm_precision"] not in (None, *published.LM_PRECISIONS):
        raise DataError(f"lm_precision {places['lm_precision']!r} is none of {', '.join(published.LM_PRECISIONS)}")
    try:
        model = core.Blip2OPTGated.build(**places, dtype=dtype, safe=safe)
    except (TypeError, ValueError) as error:  # of a setting's value
        raise DataError(f"{saved.source}: no model can be built from its settings ({' '.join(str(error).split())[:160]})") from None
    _refuse_other_base(saved, places, model)
    _refuse_other_dtypes(saved, model)
    runfolder.load_trainable(model, saved.state, saved.source)
    return model.eval().to(device), Processor(model)


def _places(saved, moved):
    """The settings with names made into places, those in `moved` first. DataError: a local one that is not there."""
    from train_gated import resolved  # here, since train_gated imports this file
    is_local = saved.config.get("base_model", {}).get("kind") == "folder"
    if is_local and "blip2" not in moved and not os.path.exists(runfolder.located(saved.settings["blip2"])):
        raise DataError(f"{saved.source}: its base model was a folder called {saved.settings['blip2']!r} where it was trained: "
                        "pass blip2= (--blip2) with where it lies here")
    places = {"lm_precision": None, "qformer": None, **resolved({**saved.settings, **moved})}
    if places["gating"] != "none" and not pathlib.Path(places["efficientnet"]).is_file():
        raise DataError(f"{saved.source}: no style classifier at {places['efficientnet']}: pass efficientnet= (--efficientnet) "
                        "with the one of the training")
    if places["qformer"] and not pathlib.Path(places["qformer"]).exists():
        raise DataError(f"{saved.source}: no Q-Former at {places['qformer']}: pass qformer= with the one of the training")
    return places


def _refuse_other_base(saved, places, model):
    """DataError that names the frozen parts that are not those of the training, or a size that is not that of gate_config.json."""
    others = runfolder.other_parts(runfolder.fingerprint(model), saved.frozen)
    if not others:
        sizes = [f"{name} is {value}, {saved.config[name]} in {CONFIG}" for name, value in _sizes(model).items()
                 if saved.config and saved.config[name] != value]
        if sizes:
            raise DataError(f"{saved.source}: does not fit its base model: {'; '.join(sizes)}: copy or download the folder again")
        return
    was, now = saved.config.get("base_model", {}).get("revision"), revision_of(places["blip2"])
    told = f"; revision {was} there, {now} here" if was and now and was != now else ""
    raise DataError(f"{saved.source} was trained on another BLIP-2 or style classifier than {places['blip2']} and "
                    f"{places['efficientnet']} (other: {', '.join(others)}{told}): pass blip2= and efficientnet= of the training")


def _refuse_other_dtypes(saved, model):
    own = {name: p.dtype for name, p in model.named_parameters()}
    wrong = sorted(name for name, tensor in saved.state.items() if tensor.dtype != own.get(name, tensor.dtype))
    if wrong:
        raise DataError(f"{saved.source}: {len(wrong)} tensors are of another dtype than the model's, first {wrong[0]} "
                        f"({saved.state[wrong[0]].dtype}): what is trained is kept in full precision")


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


# --- proof ------------

def verify(source, model, batch, **loaded):
    """DataError unless `source` (see load_gated), loaded into a fresh model, is `model`: the same trained tensors, and the same
    logits at the answer positions of a batch, bit by bit.

    batch: of train_gated.Collate, with images, or with image_embeds and style_feature. loaded: the keywords of load_gated that
    `model` was made with (blip2, efficientnet, dtype, lm_precision, ...); the device is the model's. The fresh model stands beside
    the first one while this runs.
    """
    fresh, _ = load_gated(source, device=model.query_tokens.device, **loaded)
    _refuse_other_tensors(source, runfolder.trainable_state(fresh), runfolder.trainable_state(model))
    if fresh.styles != model.styles:
        raise DataError(f"{source}: another style vocabulary when it is loaded again: {fresh.styles[:5]}, was {model.styles[:5]}")
    again, first = logits(fresh, batch), logits(model, batch)  # [M,V]
    if not same_bits(again, first):
        raise DataError(f"{source}: other logits when it is loaded again: {(again != first).sum()} of {first.numel()} differ, "
                        f"by at most {(again - first).abs().max():.3g}: do not share it, and report this with python core.py --env")


def verify_saved(path, model):
    """DataError unless the tensors of the best.pt at `path` are those of the model, bit by bit. For use after each save_best:
    the file is read once (its check sums too), no model is built."""
    saved = read(path)
    _refuse_other_tensors(path, saved.state, runfolder.trainable_state(model))


def _refuse_other_tensors(source, found, wanted):
    wrong = sorted(name for name in found.keys() | wanted.keys()
                   if name not in found or name not in wanted or not same_bits(found[name], wanted[name]))
    if wrong:
        raise DataError(f"{source}: not the model that was to be saved: {len(wrong)} of {len(wanted)} trained tensors are missing, "
                        f"unknown or differ, first {wrong[:3]}")


def same_bits(a, b):
    """Same shape, dtype and bytes; unlike torch.equal it tells 0 from -0 and takes NaN for NaN."""
    def flat(x):
        return x.detach().contiguous().reshape(-1).view(torch.uint8)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(flat(a), flat(b))


@torch.no_grad()
def logits(model, batch):
    """Logits at the answer positions of a batch of train_gated.Collate, in eval mode: float [M,V]."""
    batch, training = core.to_device(batch, model.query_tokens.device), model.training
    model.eval()
    try:
        features = {name: batch[name] for name in ("image_embeds", "style_feature") if name in batch}
        features = {"style_feature": None, **(features or model.image_features(batch["images"]))}
        visual = model.visual_prompt(**features, input_ids=batch["input_ids"], prompt_mask=batch["prompt_mask"])  # [B,Q,D]
        return model._answer_logits(visual, batch["input_ids"], batch["attention_mask"], batch["labels"])[0].float()
    finally:
        model.train(training)


# --- exporting ------------

def refuse_target(folder):
    """DataError where `folder` cannot become an exported folder: it holds something, or cannot be written."""
    path = pathlib.Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"--export {folder}: is there already and not empty: choose another folder")
    runfolder.refuse_unwritable(path)


def export(folder, checkpoint, model, table, samples, command, batch, **loaded):
    """Write an exported folder, whole and verified or not at all.

    checkpoint: content of the best.pt; model: with its tensors put in. table, samples: of the functions of these names. command: the
    words of the evaluation's command line. batch, loaded: see verify. DataError: the folder is not empty, a full disk, or what
    was written is not the model.
    """
    folder = pathlib.Path(folder)
    refuse_target(folder)
    trained_from = {name: place for name, place in checkpoint["model_args"].items() if name in PLACES and place is not None}
    loaded = {**trained_from, **loaded}
    temporary = None
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        config = _write_tensors(temporary, checkpoint, model, loaded["blip2"])
        card = model_card(folder.name, config, checkpoint, table, samples, command)
        for name, text in ((CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n"), ("README.md", card)):
            with runfolder.whole_file(temporary / name) as file:
                file.write(text.encode("utf-8", "replace").decode())  # file names can hold bytes that are no UTF-8
        verify(temporary, model, batch, **loaded)
        temporary.chmod(0o755)  # mkdtemp's 0700 would stay
        os.rename(temporary, folder)  # onto an empty folder at most
    except OSError as error:
        raise DataError(f"--export {folder}: could not be written ({error.strerror or error}); nothing of it is left") from None
    except DataError as error:
        raise DataError(f"--export {folder}: not written: {str(error).replace(str(temporary), folder.name)}") from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)  # no longer there where it was renamed


def _write_tensors(folder, checkpoint, model, blip2):
    """gates.safetensors and, with LoRA, peft's two files -> the content of gate_config.json."""
    settings, state = checkpoint["model_args"], checkpoint["state"]
    base = base_model(settings["blip2"], blip2)
    lora = {_to_peft(name): tensor for name, tensor in state.items() if ".lora_" in name}
    files = {GATES: {name: tensor for name, tensor in state.items() if ".lora_" not in name}, **({ADAPTER: lora} if lora else {})}
    for name, tensors in files.items():
        with runfolder.whole_file(folder / name, "wb") as file:
            file.write(safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"format": "pt"}))
    if lora:
        adapter = copy.copy(model.qformer.peft_config["default"])
        adapter.base_model_name_or_path, adapter.revision, adapter.inference_mode = base["name"], base["revision"], True
        adapter.save_pretrained(folder)
    written = [*files, *([ADAPTER_CONFIG] if lora else [])]
    return {"format": FORMAT, "base_model": base, **_described(settings, model),
            "loss_weights": checkpoint["loss_weights"], "precision": checkpoint["args"].get("precision"),
            "fingerprints": checkpoint["frozen"], "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
                                                             for name in written},
            "versions": {name: checkpoint[name] for name in ("torch", "transformers") if name in checkpoint}}


def _described(settings, model):
    """The fields of gate_config.json that tell how the model is built."""
    own = {"gating": "film", "per": "head", "gate_scale": 1.0, "train_qformer": False, "lora_rank": 0, "style_head": True,
           "lm_precision": None}
    trained_whole = settings.get("train_qformer")  # then nothing of another Q-Former is left that is not in gates.safetensors
    return {"style_classifier": portable(settings["efficientnet"]),
            "qformer": None if trained_whole else portable(settings.get("qformer")),
            **own, **{name: value for name, value in settings.items() if name not in (*PLACES, "styles")},
            "style_vocabulary": model.styles, **_sizes(model)}


def _sizes(model):
    """The fields of gate_config.json that follow from the base model and the style classifier."""
    config = model.qformer.config
    return {"layers": model.qformer.cross_layers, "heads": config.num_attention_heads, "control_width": config.hidden_size,
            "style_dimension": model.efficientnet.width if model.efficientnet else None}


def base_model(name, place):
    """{"name", "revision", "kind"} of the BLIP-2 that a training knew as `name` and that lies at `place` now.

    kind: "hub", "folder", or "tiny", which ships with the project."""
    if name == "tiny":
        return {"name": name, "revision": None, "kind": "tiny"}
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not os.path.exists(runfolder.located(name))
    return {"name": portable(name), "revision": revision_of(str(place)), "kind": "hub" if is_id else "folder"}


def portable(name):
    """A path as it may be told: a relative one as it is, of another its last part. None stays."""
    if name is None:
        return None
    path = pathlib.PurePath(name)
    return path.name if path.is_absolute() or ".." in path.parts or name.startswith("~") else masked_names(str(name))


# --- the model card ------------

class Scores(NamedTuple):
    """An evaluation as the model card tells it."""
    file: str  # name of the table
    questions: int
    pictures: int
    lines: list  # (system, question type, questions, [report.Cell of every one of report.SCORES])


def scores(questions, systems):
    """questions: list of Row; systems: {name: what evaluate returns}, the trained one last -> Scores: every system over all
    questions, then the trained one by type; 95 % bootstrap intervals over pictures."""
    units = [report.picture_of(r) for r in questions]
    values = {system: report.answer_scores(questions, found) for system, found in systems.items()}  # [N,4]
    trained, kinds = list(systems)[-1], sorted({r.question_type for r in questions if r.question_type})
    wanted = [(system, "all") for system in systems] + [(trained, kind) for kind in kinds]
    lines = []
    for system, kind in wanted:
        chosen = [i for i, r in enumerate(questions) if kind in (r.question_type, "all")]
        means = report.resampled_means(values[system][chosen], [units[i] for i in chosen])
        lines.append((system, kind, len(chosen), report.with_intervals(values[system][chosen].mean(0), means)))
    return Scores(pathlib.PurePath(questions[0].file).name, len(questions), len(set(units)), lines)


def samples(questions, found, count=5):
    """(picture's name, question, answer wanted, answer given) of `count` questions, the same ones at every evaluation."""
    keys = [(r.name, r.question, r.question_id) for r in questions]
    return [(pathlib.PurePath(r.name).name, r.question, r.answer.strip(), found[i]["prediction"])
            for i in report.fixed_samples(keys, count) for r in [questions[i]]]


def model_card(name, config, checkpoint, table, samples, command):
    """README.md of an exported folder: front matter of the HuggingFace hub, then text. Texts from elsewhere are escaped."""
    base, data = config["base_model"], checkpoint["args"]
    front = {"library_name": "pytorch", **({"base_model": base["name"]} if base["kind"] == "hub" else {}),
             "pipeline_tag": "visual-question-answering", "tags": ["blip-2", "visual-question-answering", "art", "gating", *(
                 ["peft", "lora"] if config["lora_rank"] else [])]}
    facts = _facts(config, checkpoint)
    answers = [[plain(text) for text in one] for one in samples]
    metrics = [[plain(system), plain(kind), f"{count:,}", *(f"{c.text} ({c.small})" if c.small else c.text for c in cells)]
               for system, kind, count, cells in table.lines]
    return "\n".join([
        "---", "# license: fill in the licence under which you share these tensors", yaml.safe_dump(front, sort_keys=False) + "---",
        "", f"# {plain(name)}: gates that let art style steer BLIP-2", "", INTRODUCTION,
        "    import core", f"    model, processor = core.load_gated({name!r})", SNIPPET, "",
        "## What was trained", "", *markdown_table(("", ""), facts), "",
        "## Data", "", f"Questions about pictures, of the folder {plain(last_part(data['data']))}; styles from: "
                       f"{plain(data.get('style', 'column'))}. {CHOSEN.format(**_choice(checkpoint))}", "",
        "## Scores", "", f"{plain(table.file)}: {table.questions:,} questions about {table.pictures:,} pictures; in percent, with "
                         "95 % bootstrap intervals over the pictures, which do not cover what another seed of training would "
                         "change.",
        "",
        *markdown_table(("system", "question type", "questions", *report.SCORES), metrics), "",
        "## Commands", "", "    " + told_command(training_command(data)), "    " + told_command(["python", *command]), "",
        "Of paths outside the working folder only the last part is told.", "",
        "## Versions", "", *_versions(config), "", LIMITS, "",
        "## Sample answers", "", "Drawn by a hash of picture and question, not chosen.", "",
        *markdown_table(("picture", "question", "answer wanted", "answer given"), answers), ""])


INTRODUCTION = """\
Only what was trained is in this folder: gates on the cross-attention of BLIP-2's Q-Former, steered by a style classifier's view of
the painting and by the question. The frozen base model and the style classifier are loaded from where they lie; others than those
of the training are refused.
"""
SNIPPET = '    model.predict_answers(processor("painting.jpg"), ["What style is this painting?"])'
CHOSEN = "The epoch with the best validation {metric} was kept: {value} in epoch {epoch}."
LIMITS = """\
## Limits

- One run with one seed. The scores hold for the data above; on other pictures and other ways of asking they will differ.
- Drawn pictures and the tiny model show that the path works. They say nothing about paintings or about the base model.
- The style classifier knows the styles that it was trained on and errs on others; its errors, and the gaps and leanings of its
  training data, reach the answers. The style words of the loss are the style vocabulary of `gate_config.json` alone.
- Answers are short texts of a language model: they can be wrong while they sound sure, and repeat the base model's leanings. They
  are no ground for attribution, dating, valuation or identifying people.
- The licences of the base model, the style classifier and the data hold beside the one above."""


def _choice(checkpoint):
    value = checkpoint.get("value")
    return {"metric": {"em": "exact match"}.get(checkpoint.get("metric"), "loss"), "epoch": checkpoint.get("epoch", "not known"),
            "value": "not known" if value is None else f"{value:.4f}"}


def _facts(config, checkpoint):
    """Rows of the card's first table."""
    base = config["base_model"]
    trained = sum(tensor.numel() for tensor in checkpoint["state"].values())
    kind = {"tiny": " (ships with the project)", "folder": " (a local folder)", "hub": ""}[base["kind"]]
    layers = ", ".join(map(str, config["layers"]))
    gating = "none" if config["gating"] == "none" else f"{config['gating']}, per {config['per']}, in layers {layers}"
    rank, whole = config["lora_rank"], "W_K and W_V of the cross-attention"
    parts = {"gates and prompt mapper": config["gating"] != "none", "language projection": True,
             "style head": any(name.startswith("style_head.") for name in checkpoint["state"]),
             "Q-Former and its queries": config["train_qformer"], whole: config.get("own_kv"),
             f"LoRA of rank {rank} on {whole}": rank}
    weights = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in config["loss_weights"].items())
    facts = [("base model", plain(base["name"]) + kind), ("revision", base["revision"] or "not known"),
             ("style classifier", plain(config["style_classifier"] or "the project's own")), ("gating", gating),
             ("trained", ", ".join(name for name, there in parts.items() if there)), ("trained parameters", f"{trained:,}"),
             ("style vocabulary", plain(", ".join(config["style_vocabulary"]), 2000) or "none"),
             ("loss", weights), ("precision", f"{config['precision']}, language model {config['lm_precision'] or 'the same'}"),
             ("fingerprints of the frozen parts", "; ".join(f"{name}: {value}" for name, value in config["fingerprints"].items()))]
    return [fact for fact in facts if config["gating"] != "none" or fact[0] != "style classifier"]


def _versions(config):
    packages = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "timm", "peft", "safetensors"))
    trained = ", ".join(f"{name} {value}" for name, value in config["versions"].items()) or "not known"
    return [f"Training: {trained}. Evaluation and export: Python {platform.python_version()}, {packages}; this project at commit "
            f"{runfolder.project_version()}."]


def markdown_table(head, lines):
    """Lines of a Markdown table; the cells are escaped already."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def plain(text, limit=300):
    """A text as Markdown shows it letter by letter, in one line: neither markup, HTML, links nor mentions act."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    text = text if len(text) <= limit else text[:limit - 3] + "..."
    text = re.sub(r"([\\`*_{}\[\]#|~$:@])", r"\\\1", text)
    return re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + "\\.", html.escape(text, quote=False))


def training_command(args):
    """The words of the train_gated.py command that gives these settings: the flags that are not at their defaults."""
    from train_gated import get_args
    defaults, words = vars(get_args(["--data", ""])), ["python", "train_gated.py"]
    for name, value in args.items():
        if name in ("config", "resume") or value is None or value == defaults.get(name) or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return words


def told_command(words):
    """A command line in one line, masked."""
    return " ".join(shlex.join([masked(word) for word in words]).split())


# --- masks ------------

def masked(word):
    """A word of a command line or the value of a variable: of each path outside the working folder its last part, names hidden."""
    head, equals, tail = word.rpartition("=")
    if "://" in tail:  # may hold a password
        return masked_path(head) + equals + tail.partition("://")[0].rpartition(":")[-1] + "://..."
    pieces = re.split(r"(?<!^[A-Za-z]):", tail)  # a list of paths; C: is none
    return masked_path(head) + equals + ":".join(masked_path(piece) for piece in pieces)


def masked_path(path):
    """A path inside the working folder as it is; of another one the last part, after dots. Names are hidden."""
    parts = re.split(r"[/\\]", path)
    outside = path[:1] in ("/", "\\", "~") or ".." in parts or re.match(r"[A-Za-z]:[/\\]", path)
    return masked_names(".../" + last_part(path) if outside else path)


def last_part(path):
    """The last part of a path of any system; names are hidden."""
    return masked_names(re.split(r"[/\\]", path.rstrip("/\\"))[-1])


def masked_names(text):
    """The user's and the machine's name, where they stand as a word, as <user> and <host>."""
    for hidden, names in (("<user>", _user_names()), ("<host>", _host_names())):
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?i)(?<![A-Za-z0-9<]){re.escape(name)}(?![A-Za-z0-9])", hidden, text)
    return text


def _user_names():
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(Exception):  # a container's user may have no name: KeyError, OSError or ImportError
        names.add(getpass.getuser())
    with contextlib.suppress(RuntimeError):
        names.add(pathlib.Path.home().name)
    return names - {""}


def _host_names():
    names = {socket.gethostname(), platform.node()}
    return {part for name in names for part in (name, name.partition(".")[0])} - {"", "localhost"}


# --- environment ------------

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "timm", "peft", "bitsandbytes", "safetensors", "huggingface_hub",
            "numpy", "pillow")
VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS",
             "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF",
             "CUBLAS_WORKSPACE_CONFIG", "NCCL_P2P_DISABLE", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR")


def environment():
    """What a bug report needs, a line for each thing; user, host and paths are masked. What cannot be found out is said."""
    found = {"project": runfolder.project_version, "python": platform.python_version, "platform": platform.platform,
             "processors": _processors, "memory": _memory,
             "free disk, this folder": lambda: f"{shutil.disk_usage('.').free / 2**30:.1f} GiB", "cuda": _cuda,
             **{name: lambda name=name: installed(name) for name in PACKAGES}, "outside the tested versions": _untested,
             **{name: lambda name=name: masked(os.environ[name]) for name in VARIABLES if name in os.environ}}
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {masked_names(tried(look))}" for name, look in found.items())


def tried(look):
    """look() as one line of text, or what kept it from answering: a report on a broken installation must not break itself."""
    try:
        return " ".join(str(look()).split())
    except Exception as error:  # of any library
        return f"cannot be told ({type(error).__name__})"


def installed(name):
    """The version of a package, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processors():
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()}, {torch.get_num_threads()} threads in torch"


def _memory():
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _cuda():
    if not torch.cuda.is_available():
        return f"no GPU in use (torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'the CPU'})"
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}; " + ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)


def _untested():
    return "; ".join(note.removeprefix("note: ") for note in runfolder.note_versions()) or "none"
