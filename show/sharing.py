"""sharing.py: gates as others can use them: a folder to hand on, proof that both are the same model.

    export           an exported folder: gates.safetensors, gate_config.json, with LoRA peft's two files, README.md (the model card)
    scores, samples  what the model card tells of an evaluation
    verify           what was written, loaded into a fresh model, gives the same logits to the bit

Reading such a folder is engine/saved.py's and core.load_gated's.
"""

import copy
import hashlib
import html
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import tempfile
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
import yaml
from accelerate.utils import send_to_device

import core
import metrics
from engine import checkpoints, environment, files
from engine.errors import DataError
from engine.saved import ADAPTER, ADAPTER_CONFIG, CONFIG, FORMAT, GATES, PLACES, revision_of, sizes_of, to_peft
from show import report


# --- proof ------------

def verify(source, model, batch, **loaded):
    """DataError unless `source` (see load_gated), loaded into a fresh model, is `model`: the same trained tensors, and the same
    logits at the answer positions of a batch, bit by bit.

    batch: of prompts.Collate, with images, or with image_embeds and style_feature. loaded: the keywords of load_gated that
    `model` was made with (blip2, efficientnet, dtype, lm_precision, ...); the device is the model's. The fresh model stands beside
    the first one while this runs.
    """
    fresh, _ = core.load_gated(source, device=model.query_tokens.device, **loaded)
    checkpoints.refuse_other_tensors(source, checkpoints.trainable_state(fresh), checkpoints.trainable_state(model))
    if fresh.styles != model.styles:
        raise DataError(f"{source}: another style vocabulary when it is loaded again: {fresh.styles[:5]}, was {model.styles[:5]}")
    again, first = logits(fresh, batch), logits(model, batch)  # [M,V]
    if not checkpoints.same_bits(again, first):
        raise DataError(f"{source}: other logits when it is loaded again: {(again != first).sum()} of {first.numel()} differ, "
                        f"by at most {(again - first).abs().max():.3g}: do not share it, and report this with python core.py --env")


@torch.no_grad()
def logits(model, batch):
    """Logits at the answer positions of a batch of prompts.Collate, in eval mode: float [M,V]."""
    batch, training = send_to_device(batch, model.query_tokens.device), model.training
    model.eval()
    try:
        features = {name: batch[name] for name in ("image_embeds", "style_feature") if name in batch}
        features = {"style_feature": None, **(features or model.image_features(batch["images"]))}
        visual = model.visual_prompt(**features, input_ids=batch["input_ids"], prompt_mask=batch["prompt_mask"])  # [B,Q,D]
        return model.decoder.answer_logits(visual, batch["input_ids"], batch["attention_mask"], batch["labels"])[0].float()
    finally:
        model.train(training)


# --- exporting ------------

def refuse_target(folder):
    """DataError where `folder` cannot become an exported folder: it holds something, or cannot be written."""
    path = pathlib.Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"--export {folder}: is there already and not empty: choose another folder")
    files.refuse_unwritable(path)


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
            with files.whole_file(temporary / name) as file:
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
    lora = {to_peft(name): tensor for name, tensor in state.items() if ".lora_" in name}
    parts = {GATES: {name: tensor for name, tensor in state.items() if ".lora_" not in name}, **({ADAPTER: lora} if lora else {})}
    for name, tensors in parts.items():
        with files.whole_file(folder / name, "wb") as file:
            file.write(safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"format": "pt"}))
    if lora:
        adapter = copy.copy(model.qformer.peft_config["default"])
        adapter.base_model_name_or_path, adapter.revision, adapter.inference_mode = base["name"], base["revision"], True
        adapter.save_pretrained(folder)
    written = [*parts, *([ADAPTER_CONFIG] if lora else [])]
    return {"format": FORMAT, "base_model": base, **_described(settings, model),
            **({"context": context} if (context := checkpoint["args"].get("context")) else {}),
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
            "style_vocabulary": model.styles, **sizes_of(model)}


def base_model(name, place):
    """{"name", "revision", "kind"} of the BLIP-2 that a training knew as `name` and that lies at `place` now.

    kind: "hub", "folder", or "tiny", which ships with the project."""
    if name == "tiny":
        return {"name": name, "revision": None, "kind": "tiny"}
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not os.path.exists(files.located(name))
    return {"name": portable(name), "revision": revision_of(str(place)), "kind": "hub" if is_id else "folder"}


def portable(name):
    """A path as it may be told: a relative one as it is, of another its last part. None stays."""
    if name is None:
        return None
    path = pathlib.PurePath(name)
    return path.name if path.is_absolute() or ".." in path.parts or name.startswith("~") else environment.masked_names(str(name))


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
        means = metrics.resampled_means(values[system][chosen], [units[i] for i in chosen])
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
        "## Data", "", f"Questions about pictures, of the folder {plain(environment.last_part(data['data']))}; styles from: "
                       f"{plain(data.get('style', 'column'))}. {CHOSEN.format(**_choice(checkpoint))}", "",
        "## Scores", "", f"{plain(table.file)}: {table.questions:,} questions about {table.pictures:,} pictures; in percent, with "
                         "95 % bootstrap intervals over the pictures, which do not cover what another seed of training would "
                         "change.",
        "",
        *markdown_table(("system", "question type", "questions", *report.SCORES), metrics), "",
        "## Commands", "", "    " + format_command(training_command(data, checkpoint.get("command"))),
        "    " + format_command(["python", *command]), "",
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
    steer = config.get("steer") or []
    parts = {"gates": config["gating"] != "none", "prompt mapper": config["gating"] != "none" or steer, ", ".join(steer): steer,
             "language projection": True,
             "style head": any(name.startswith("style_head.") for name in checkpoint["state"]),
             "Q-Former and its queries": config["train_qformer"], whole: config.get("own_kv"),
             f"LoRA of rank {rank} on {whole}": rank}
    weights = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in config["loss_weights"].items())
    facts = [("base model", plain(base["name"]) + kind), ("revision", base["revision"] or "not known"),
             ("style classifier", plain(config["style_classifier"] or "the project's own")), ("gating", gating),
             *([("further ways for style to come in", ", ".join(steer))] if steer else []),
             ("trained", ", ".join(name for name, there in parts.items() if there)), ("trained parameters", f"{trained:,}"),
             ("style vocabulary", plain(", ".join(config["style_vocabulary"]), 2000) or "none"),
             *([("before each question", f"a text, --context {plain(context)}: give predict_answers contexts=[...]")]
               if (context := config.get("context")) else []),
             ("loss", weights), ("precision", f"{config['precision']}, language model {config['lm_precision'] or 'the same'}"),
             ("fingerprints of the frozen parts", "; ".join(f"{name}: {value}" for name, value in config["fingerprints"].items()))]
    return [fact for fact in facts if config["gating"] != "none" or steer or fact[0] != "style classifier"]


def _versions(config):
    names = ("torch", "transformers", "timm", "peft", "safetensors")
    packages = ", ".join(f"{name} {environment.installed(name)}" for name in names)
    trained = ", ".join(f"{name} {value}" for name, value in config["versions"].items()) or "not known"
    return [f"Training: {trained}. Evaluation and export: Python {platform.python_version()}, {packages}; this project at commit "
            f"{environment.project_version()}."]


def markdown_table(head, lines):
    """Lines of a Markdown table; the cells are escaped already."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def plain(text, limit=300):
    """A text as Markdown shows it letter by letter, in one line: neither markup, HTML, links nor mentions act."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    text = text if len(text) <= limit else text[:limit - 3] + "..."
    text = re.sub(r"([\\`*_{}\[\]#|~$:@])", r"\\\1", text)
    return re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + "\\.", html.escape(text, quote=False))


def training_command(settings, typed=None):
    """The words of the train_gated.py command: as it was typed, which a best.pt of this version holds, else all settings."""
    words = ["python", *(typed or ["train_gated.py"])]
    for name, value in {} if typed else settings.items():
        if name in ("config", "resume") or value is None or value is False or value == []:
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return words


def format_command(words):
    """A command line in one line, masked."""
    return " ".join(shlex.join([environment.masked(word) for word in words]).split())
