"""train_gated.py: gates that let art style steer BLIP-2's Q-Former, trained on questions about paintings.

    python train_gated.py --data data/artquest                                    # BLIP-2 OPT-2.7B, one GPU of 24-80 GB
    python train_gated.py --data data/artquest --blip2 tiny --lr 1e-3 --epochs 5  # laptop CPU
    python eval_gated.py --checkpoint runs/gated/best.pt                          # then look at the numbers
    accelerate launch train_gated.py --data data/artquest                         # several GPUs

Frozen: vision tower, OPT, EfficientNet (and the Q-Former without --train-qformer). Trained: gates, PromptMapper, projection.
Data flow: CSV row -> Questions -> collate -> Blip2OPTGated.forward -> loss -> log. Copy this file and edit it.
"""

import argparse
import math
import os
import pathlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

import cache
import core
import efficientnet
import loop
import maps
import metrics
import published
import rows
import runfolder
import sharing
from rows import DataError

LOG_EVERY = 10  # optimizer steps between two rows of training_log.csv
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "lm", "hit", "hard_hit", "kl", "grad_norm", "em")
CLIP = 1.0  # gradient norm
PANELS = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),
          ("style", [("epoch", "hit", "mass on style words"), ("epoch", "hard_hit", "style word first"),
                     ("epoch", "kl", "symmetric KL")]),
          ("learning", [("step", "grad_norm", "gradient norm"), ("epoch", "em", "exact match")])]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DIR|FILE", help="folder with train.csv and val.csv, or one table")
    data.add_argument("--val-share", type=runfolder.share, default=0.1,
                      help="share of the pictures held out for validation where --data is one table (default: 0.1)")
    data.add_argument("--images", metavar="DIR", help="image root (default: DATA/images, else DATA)")
    data.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN",
                      help="names of your columns, e.g. answer=label; names: image question answer question_type style")
    data.add_argument("--encoding", default="utf-8", help="of the CSV files (default: utf-8)")
    data.add_argument("--separator", help="of the CSV files, tab spelled out (default: told from the header)")
    data.add_argument("--style", default="column", metavar="SOURCE",
                      help="where a picture's style comes from: column (style, of the table), efficientnet (its prediction), a "
                           "column of --semart (SCHOOL, TYPE, TIMEFRAME), or none (default: column)")
    data.add_argument("--semart", metavar="DIR|FILE", help="SemArt's table, or the folder with semart_train.csv ...; joined by "
                                                           "picture name")
    data.add_argument("--context", metavar="COLUMN", help="text put before the question: a column of the table, with --semart "
                                                          "of SemArt's (DESCRIPTION) (default: none)")
    data.add_argument("--skip-bad", type=runfolder.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                      help="leave bad rows and broken or missing images out and list them, up to this share of a split "
                           "(0.01 where no number is given)")
    data.add_argument("--check-data", action="store_true", help="read everything, print what is there, and stop; loads no weight")
    data.add_argument("--dry-run", action="store_true", help="show what the model reads and the memory it takes, rehearse the "
                                                             "longest batch, and stop; nothing is written")
    data.add_argument("--workers", type=runfolder.whole, default=2, help="loader processes (default: 2)")
    data.add_argument("--cache", metavar="DIR", help="keep the frozen towers' features there, computed once: 0.7 MB a picture in "
                                                     "bf16 (default: none, the towers run in every step)")
    model = parser.add_argument_group("model")
    model.add_argument("--blip2", default=published.DEFAULTS["blip2"], metavar="ID|DIR|tiny",
                       help="HuggingFace id, local folder, or tiny (ships with the project); default Salesforce/blip2-opt-2.7b, "
                            "taken from models/blip2-opt-2.7b where that folder exists")
    model.add_argument("--qformer", metavar="DIR|FILE", help="Q-Former from elsewhere: an HF BLIP-2 or image-text-retrieval "
                                                             "folder, or a LAVIS .pth")
    model.add_argument("--efficientnet", metavar="FILE", help="style classifier (default: runs/efficientnet-28/best.pt; "
                                                              "with --blip2 tiny its own)")
    model.add_argument("--safe-load", action="store_true", help="refuse a style checkpoint that only pickle can load")
    model.add_argument("--gating", choices=("film", "gate", "none"), default="film",
                       help="film: scale K, scale and shift V; gate: 2 sigmoid on K and V; none: BLIP-2 as it is (default: film)")
    model.add_argument("--per", choices=("head", "channel"), default="head",
                       help="one gate value a head or a channel (default: head)")
    model.add_argument("--gate-scale", type=runfolder.rate, default=1.0, help="start value of the learned gate scale (default: 1)")
    model.add_argument("--train-qformer", action="store_true", help="train the Q-Former and its queries too")
    model.add_argument("--lora-rank", type=runfolder.whole, default=0,
                       help="LoRA on the cross-attention's W_K and W_V (default: 0 = off)")
    loss = parser.add_argument_group("loss (0 switches a term off)")
    loss.add_argument("--hit-weight", type=float, default=0.1, help="style words where the answer is a style (default: 0.1)")
    loss.add_argument("--kl-weight", type=float, default=0.05, help="image style against answer style (default: 0.05)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=runfolder.positive, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=runfolder.positive, default=16, help="questions a step and process (default: 16)")
    run.add_argument("--accumulation", type=runfolder.positive, default=2, help="batches an optimizer step (default: 2)")
    run.add_argument("--length-pool", type=runfolder.positive, default=1, metavar="N",
                     help="optimizer steps whose questions are sorted by length together: more saves pads, but makes batches of "
                          "one kind of question (default: 1, the batches of a step alone)")
    run.add_argument("--lr", type=runfolder.rate, default=1e-4, help="peak learning rate (default: 1e-4)")
    run.add_argument("--warmup", type=runfolder.share, default=0.05, help="share of all steps spent warming up (default: 0.05)")
    run.add_argument("--weight-decay", type=runfolder.weight, default=0.01, help="not on biases and norms (default: 0.01)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--lm-precision", choices=tuple(published.LM_PRECISIONS),
                     help="of the frozen language model; int8 and nf4 need bitsandbytes (default: as --precision)")
    run.add_argument("--activations", choices=("keep", "bits", "recompute"), default="keep",
                     help="of the language model for the backward pass. bits: of each ReLU its signs; recompute: only each layer's "
                          "input. Less memory, more time, the same gradients (default: keep)")
    run.add_argument("--max-answer", type=runfolder.positive, default=core.MAX_ANSWER, metavar="N",
                     help="an answer has as many tokens as the longest of training, end of line included, and never more than N "
                          f"(default: {core.MAX_ANSWER})")
    run.add_argument("--select", choices=("loss", "em"), default="loss",
                     help="best.pt by lowest validation loss or highest exact match (default: loss)")
    run.add_argument("--patience", type=runfolder.whole, default=3,
                     help="epochs without a better value before stopping; 0 = never (default: 3)")
    run.add_argument("--seed", type=runfolder.whole, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/gated", metavar="DIR", help="run folder (default: runs/gated)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    return runfolder.parse_args(parser, argv)


# --- what is missing ------------

def missing(args):
    """{thing: lines, see published.missing_model} of all that a training needs and that is not there. Loads nothing."""
    found = {"data": missing_data(args), "BLIP-2": published.missing_model(args.blip2, "blip2")}
    means_tiny = args.blip2 == "tiny" or (found["BLIP-2"] and "tiny" in published.alike(args.blip2, "blip2"))
    if args.blip2 == "tiny" and not args.efficientnet:
        found["BLIP-2"] = published.missing_tiny("blip2", "efficientnet-28.pt")
    elif args.efficientnet or not means_tiny:
        found["style classifier"] = missing_classifier(args)
    if args.qformer and not os.path.exists(runfolder.located(args.qformer)):
        found["Q-Former"] = [f"{args.qformer}: no such file or folder: check --qformer"]
    return {thing: lines for thing, lines in found.items() if lines}


def missing_splits(args):
    """Those of train and val that have no table."""
    return [split for split in ("train", "val") if not os.path.isfile(args.data)
            and not any(os.path.isfile(os.path.join(args.data, name)) for name in rows.table_names(split))]


def missing_data(args):
    """Lines about --data, see `missing`."""
    lacking = missing_splits(args)
    if not lacking:
        return []
    there = sorted(rows.entries(args.data))
    fault = f"{args.data}: no such file or folder"
    if os.path.isdir(args.data):
        listed = ", ".join(there[:4]) + (f" and {len(there) - 4} more" if len(there) > 4 else "")
        fault = f"{args.data}: no {' and no '.join(f'{split}.csv' for split in lacking)} in it, only {listed or 'nothing'}"
    ways = ["python data/make_sample.py draws a small set into data/artquest",
            "--data DIR takes your own: train.csv and val.csv with the columns image, question, answer;",
            "  pictures in DIR/images; other layouts, names and columns: data/README.md"]
    if lacking == ["val"]:
        ways.insert(0, "--data FILE takes the training table alone, of which a tenth is held out for validation")
    return [fault, *ways]


def missing_classifier(args):
    """Lines about a style classifier that is not tiny's own, see `missing`."""
    place = classifier_place(None, args.efficientnet)
    if os.path.isfile(place) or (args.gating == "none" and args.style != "efficientnet"):
        return []
    return [f"{place}: no such file",
            "--blip2 tiny has its own",
            "python efficientnet_pretrain.py --data wikiart --pretrained trains one; its data: data/README.md",
            "--efficientnet FILE takes one from elsewhere",
            "--gating none trains without gates and needs none"]


def shortest_way(args, absent):
    """The commands from what `missing` found to a first training, "" where one of its own lines says as much."""
    if set(absent) <= {"data"} or args.blip2 == "tiny":
        return ""
    data, drawn = ("data/artquest", "python data/make_sample.py, then ") if "data" in absent else (args.data, "")
    return f"the shortest way: {drawn}python train_gated.py --data {data} --blip2 tiny"


# --- data: your own data set goes here ------------

def read_data(args, split, say=print):
    """Rows of a split, bad ones refused; with --skip-bad left out and listed, after every picture has been decoded once."""
    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    if args.context and not args.semart:
        columns["context"] = args.context
    read, understood = rows.read_layout(args.data, split, columns, args.images, args.encoding, args.separator)
    say(f"{split}: {understood}")
    if os.path.isfile(args.data) and args.val_share and split in ("train", "val"):
        read = rows.hold_out(read, args.val_share, split == "val")
        say(f"{split}: one table for both: {len(read)} rows, {args.val_share:.0%} of the pictures are held out for validation")
    read = joined(args, split, read, say)
    broken = rows.verify_images(read, max(1, args.workers)) if args.skip_bad else []
    good, bad = rows.usable_rows(read, args.skip_bad, broken)
    for row, reason in bad:
        say(f"left out: {row.file}, {rows.locate(row.file, row.line)}: {reason}")
    if bad:
        say(f"{split}: {len(bad)} of {len(read)} rows left out ({len(bad) / len(read):.1%})")
    return good


def joined(args, split, read, say):
    """The rows with style and context from where --style and --context say."""
    if args.style == "none":
        read = [replace(row, style="") for row in read]
    fields = {"style": args.style} if args.style not in ("column", "efficientnet", "none") else {}
    if args.context and args.semart:
        fields["context"] = args.context
    if fields and not args.semart:
        raise DataError(f"--style {args.style} is a column of SemArt's table: pass --semart, or one of column, efficientnet, none")
    if not fields:
        return read
    place = pathlib.Path(args.semart)
    table = place / f"semart_{split}.csv" if place.is_dir() else place
    read, matched = rows.join_semart(read, table, fields)
    say(f"{split}: {', '.join(f'{name} from {column}' for name, column in fields.items())} of {table}, "
        f"{matched} of {len(read)} rows")
    return read


@torch.no_grad()
def predicted_styles(args, blip2, checkpoint, splits, device, say=print):
    """--style efficientnet: the rows of every split with the classifier's likeliest style of their picture."""
    net = efficientnet.EfficientNet28.from_checkpoint(checkpoint, args.safe_load).eval().to(device)
    names, size = net.style_names(), published.image_size_of(blip2)
    paths = list(dict.fromkeys(row.image for read in splits for row in read))
    style = {}
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        for start in tqdm(range(0, len(paths), 32), desc="styles", leave=False, mininterval=1, disable=None):
            chunk = paths[start:start + 32]
            images = torch.stack(list(pool.map(lambda path: rows.picture_tensor(path, size), chunk)))
            best = net.logits(net(images.to(device))).argmax(-1).tolist()
            style |= {path: names[index] for path, index in zip(chunk, best)}
    say(f"style of {len(paths)} pictures predicted by {checkpoint}: {rows.histogram(style.values(), 30)}")
    return [[replace(row, style=style[row.image]) for row in read] for read in splits]


class Questions(Dataset):
    """Row number -> ({"images": tensor [3,s,s] in BLIP's normalisation}, Row), or (the DataError of a broken picture, Row).

    The error is handed on and not raised: one that comes out of a loader process would keep the others from ending.
    features: None, or {path: {"image_embeds": [P,W], "style_feature": [F]}} of a cache, taken in place of the pictures.
    """

    def __init__(self, questions, image_size, features=None):
        self.rows, self.image_size, self.features = questions, image_size, features

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        try:
            if self.features is not None:
                return self.features[row.image], row
            return {"images": rows.picture_tensor(row.image, self.image_size)}, row
        except DataError as error:
            return error, row


class Collate:
    """Samples -> batch for Blip2OPTGated.forward. A class and not a closure, so that it also works where workers are spawned.

    max_answer: see answer_length."""

    def __init__(self, tokenizer, styles, max_answer):
        self.tokenizer, self.styles, self.max_answer = tokenizer, [s.lower() for s in styles], max_answer

    def __call__(self, samples):
        features, group = zip(*samples)
        for found, row in samples:
            if isinstance(found, DataError):
                return {"fault": f"{row.file}, {rows.locate(row.file, row.line)}: {found}"}
        batch = core.encode_training(self.tokenizer, [r.question for r in group], [r.answer for r in group], self.max_answer,
                                     [r.context for r in group], multiple=4)  # few distinct lengths
        batch |= default_collate(features)  # images [B,3,s,s], or image_embeds [B,P,W] and style_feature [B,F]
        batch["style"] = torch.tensor([self._index(r.style) for r in group])  # [B], -1 = unknown
        batch["hit_rows"] = torch.tensor([self._index(r.answer) >= 0 for r in group])  # [B]
        return batch

    def _index(self, name):
        name = name.strip().lower()
        return self.styles.index(name) if name in self.styles else -1


def check_data(args):
    """--check-data: print what is there; exit code 1 when training would fail. No weight is loaded."""
    absent = missing(args)
    splits, failed = {}, bool(absent)
    for split in sorted({"train", "val"} - set(missing_splits(args))):
        try:
            splits[split] = read_data(args, split)
        except DataError as error:
            print(f"{split}: error: {error}")
            failed = True
            continue
        print(f"--- {split}", *rows.summary(splits[split]), sep="\n")
        for path, reason in rows.verify_images(splits[split], max(1, args.workers)) if not args.skip_bad else []:
            print(f"broken image: {path}: {reason}")
            failed = True
    shared = rows.shared_images(splits)
    for image, names in list(shared.items())[:10]:
        print(f"in {' and '.join(names)}: {image}")
    if len(shared) > 10:
        print(f"... {len(shared)} pictures stand in more than one split")
    if "BLIP-2" not in absent:
        check_tokens(args, splits)
    if absent:
        print(f"error: {published.told_missing(absent, shortest_way(args, absent))}")
    print("training would fail" if failed else "training can start")
    return int(failed)


def check_tokens(args, splits):
    """What the language model will read: answers that are cut, and three rows with the masked tokens in brackets."""
    places = resolved({"blip2": args.blip2, "efficientnet": args.efficientnet})
    try:
        tokenizer = published.load_tokenizer(places["blip2"])
    except DataError as error:
        print(f"tokens not checked: {error}")
        return
    if "train" in splits:
        longest = answer_length(tokenizer, splits["train"], args.max_answer)
        say_cut(tokenizer, splits, longest)
        show_rows(tokenizer, splits["train"][:3], longest)


def answer_length(tokenizer, train_rows, limit):
    """Tokens of the longest training answer with its end of line, `limit` at most: what is trained and what is generated."""
    return min(limit, max(core.answer_lengths(tokenizer, [r.answer for r in train_rows])))


def say_cut(tokenizer, splits, longest, say=print):
    """Say of every split {name: rows} how many answers have more than `longest` tokens; only those are not trained or scored whole."""
    for split, read in splits.items():
        cut = [r for r, n in zip(read, core.answer_lengths(tokenizer, [r.answer for r in read])) if n > longest]
        first = f", first {loop.named(cut[:1])}: {cut[0].answer!r}" if cut else ""
        say(f"{split}: {len(cut)} of {len(read)} answers are cut at {longest} tokens{first}")


def show_rows(tokenizer, some, max_answer):
    """Rows as the language model reads them, with what the loss does not see in brackets."""
    print("--- prompt | target, as the model gets it; [tokens in brackets] are masked in the loss")
    for row in some:
        batch = core.encode_training(tokenizer, [row.question], [row.answer], max_answer, [row.context])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        masked, target = (tokenizer.decode(ids[where]) for where in (labels == -100, labels != -100))
        print(f"{row.name} ({rows.locate(row.file, row.line)}): [{masked}] |{target!r}, "
              f"{(labels != -100).sum()} tokens are trained")


# --- evaluation ------------

@torch.no_grad()
def evaluate(model, data, collate, accelerator, batch_size, workers, loss_weights, answer=None, gates=False, **seeing):
    """Score every row exactly once, on however many processes.

    answer: None, or a function (model, rows, features) -> {column: a value for each row}, "prediction" among them. seeing:
    gated=False or blind=True, see Blip2OPTGated.forward. Returns on every process a list of dicts in row order: row, total, lm,
    hit, hard_hit, hit_rows, kl (those that are switched on), the columns of `answer`, and with gates=True the gates of a model that has any
    (maps.gate_rows).
    """
    model.eval()
    by_length = sorted(range(len(data)), key=lambda i: text_length(data.rows[i]))  # few pads
    mine = by_length[accelerator.process_index::accelerator.num_processes]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    found = []
    loaded = iter(loop.load_batches(data, collate, batches, workers))
    for numbers in tqdm(batches, desc="evaluating", leave=False, mininterval=1,
                        disable=None if accelerator.is_main_process else True):
        with loop.dead_loaders_named([data.rows[i] for i in numbers]):
            batch = loop.next_batch(loaded, accelerator.device)
        features = {name: batch.pop(name) for name in ("image_embeds", "style_feature") if name in batch}
        features = features or model.image_features(batch.pop("images"), batch.pop("style_images", None))
        with accelerator.autocast():
            parts = model(**batch, **features, **loss_weights, **seeing)
        parts.pop("loss")
        table = {name: values.float().cpu().tolist() for name, values in parts.items()}
        if answer:
            table |= answer(model, [data.rows[i] for i in numbers], features)
        if gates and model.gates is not None:
            table["gates"] = maps.gate_rows(model, features["style_feature"], batch["input_ids"], batch["prompt_mask"])
        found += [{"row": i, **{name: values[k] for name, values in table.items()}} for k, i in enumerate(numbers)]
    return sorted(gather_object(found), key=lambda one: one["row"])


def text_length(row):
    """Letters that the language model reads of a row."""
    return len(row.question) + len(row.answer) + len(row.context)


def mean(found, name, where=None):
    """Mean of a column of evaluate's result over all rows, or over those where column `where` is not 0; None without any."""
    values = [one[name] for one in found if name in one and (where is None or one[where])]
    return sum(values) / len(values) if values else None


def greedy_answers(model, group, features):
    """The answers of --select em: no beams, since they are asked for in every epoch."""
    return {"prediction": model.predict_answers(None, [r.question for r in group], [r.context for r in group], **features, beams=1)}


def loss_summary(found):
    """The numbers that are logged of an evaluation; hits are over the rows whose answer is a style."""
    numbers = {"loss": mean(found, "total"), "lm": mean(found, "lm"), "hit": mean(found, "hit", "hit_rows"),
               "hard_hit": mean(found, "hard_hit", "hit_rows"), "kl": mean(found, "kl")}
    return {name: value for name, value in numbers.items() if value is not None}


# --- features of the frozen towers ------------

@torch.no_grad()
def cached_features(args, built_from, questions, accelerator, dtype):
    """--cache: (cache.Features of the rows' pictures, {"vision_model": its fingerprint}); without it (None, {}).

    The towers come in turns: the vision tower is gone again when the classifier is loaded, both when the language model is, so
    that memory holds the largest and not the sum.
    """
    if args.cache is None:
        return None, {}
    paths = list(dict.fromkeys(row.image for row in questions))
    tower, _ = published.load_vision(built_from["blip2"], dtype)
    tower.requires_grad_(False)
    size, kept = tower.config.image_size, {}
    with accelerator.main_process_first():  # the others find everything there
        kept["image_embeds"] = cache.vision_features(args.cache, tower, paths, partial(rows.picture_tensor, size=size),
                                                     rows.PREPROCESSING, args.workers, accelerator.device, accelerator.print)
        towers = runfolder.fingerprint(torch.nn.ModuleDict({"vision_model": tower}))
        del tower
        if built_from["gating"] != "none":
            kept["style_feature"] = style_features(args, built_from["efficientnet"], paths, size, accelerator)
    return cache.Features(**kept), towers


def style_features(args, checkpoint, paths, size, accelerator):
    """cache.Store of the style classifier's pooled feature [F], in float32."""
    net = efficientnet.EfficientNet28.from_checkpoint(checkpoint, args.safe_load).eval().to(accelerator.device)
    store = cache.Store(args.cache, "style", {"weights": cache.weights_digest(net), "size": size, "pixels": rows.PREPROCESSING},
                        (net.width,), torch.float32)
    store.fill(paths, partial(rows.picture_tensor, size=size), net, cache.BATCH, args.workers, accelerator.print,
               accelerator.device)
    return store


# --- model ------------

def model_args(args, train_rows, max_answer):
    """Everything that is needed to build the model again without a command line; stored in best.pt."""
    styles = sorted({r.style.strip() for r in train_rows if r.style.strip()})
    return {"blip2": args.blip2, "qformer": args.qformer, "efficientnet": args.efficientnet, "gating": args.gating, "per": args.per,
            "gate_scale": args.gate_scale, "train_qformer": args.train_qformer, "lora_rank": args.lora_rank,
            "style_head": args.kl_weight != 0, "styles": styles, "lm_precision": args.lm_precision, "max_answer": max_answer}


def resolved(built_from):
    """model_args with names made into places: tiny's own files; a hub's ID is looked for in models/ first. Relative paths are
    looked for as runfolder.located does."""
    places = {**built_from, "blip2": published.in_models(built_from["blip2"], "blip2"),
              "efficientnet": classifier_place(built_from["blip2"], built_from["efficientnet"])}
    if places.get("qformer"):
        places["qformer"] = runfolder.located(places["qformer"])
    return places


def classifier_place(blip2, given):
    """The style classifier's file: the one given, or that of the run folder given; else tiny's own or the default."""
    own = published.tiny("efficientnet-28.pt") if blip2 == "tiny" and not given else "runs/efficientnet-28/best.pt"
    place = runfolder.located(given or own)
    return os.path.join(place, "best.pt") if os.path.isdir(place) else place


def loss_weights(args, model, say):
    """Weights of the style terms that this model and data can have; what is off is said."""
    weights = {"hit_weight": args.hit_weight, "kl_weight": args.kl_weight}
    if not model.styles:
        say("no style in the training rows: both style terms are off (--style names other places to take it from)")
        return {"hit_weight": 0.0, "kl_weight": 0.0}
    if model.style_head is None and args.kl_weight:
        say("no EfficientNet with --gating none: the KL term is off")
        weights["kl_weight"] = 0.0
    return weights


def make_optimizer(model, lr, weight_decay):
    """AdamW; no decay on biases, norms and scalars (everything with fewer than two dimensions)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
                              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}], lr=lr, fused=True)


# --- one run: what the functions of the loop share ------------

@dataclass
class Run:
    """A run under way. `model` is the Blip2OPTGated; `wrapped` the same as accelerate trains it."""
    args: argparse.Namespace
    accelerator: Accelerator
    model: core.Blip2OPTGated
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    collate: Collate
    train: Questions
    val: Questions
    weights: dict  # of the style terms, see loss_weights
    built_from: dict  # see model_args
    frozen: dict  # fingerprint of everything that is not trained, with the towers that a cache stands for
    step: int = 0  # optimizer steps done
    log: runfolder.RunLog | None = None  # only where files are written

    def __post_init__(self):
        self.pace = loop.Pace(self, "questions")
        self.marks = {"metric": self.args.select, "value": None, "epoch": None, "stale": 0, "done": 0}  # done: epochs validated
        read = self.train.rows
        self.lengths = core.text_lengths(self.model.tokenizer,
                                         *([getattr(r, n) for r in read] for n in ("question", "answer", "context")))
        self.per_epoch = len(self.plan(0))
        self.total = self.args.epochs * self.per_epoch

    def plan(self, epoch):
        """The optimizer steps of an epoch, see loop.epoch_plan."""
        return loop.epoch_plan(len(self.train), self.args.batch_size, self.args.accumulation, self.args.seed, epoch,
                               self.accelerator.process_index, self.accelerator.num_processes, self.lengths,
                               self.args.length_pool)

    def lr(self, step):
        return loop.cosine_lr(step, self.total, round(self.args.warmup * self.total), self.args.lr)


# --- checkpoints ------------

def save_best(run, out):
    """best.pt: trained tensors and plain values only."""
    import transformers
    read = run.train.rows
    runfolder.save_checkpoint(out / "best.pt", {
        "stage": "gated", "state": runfolder.trainable_state(run.model), "model_args": run.built_from, "args": vars(run.args),
        **run.marks, "loss_weights": run.weights, "majority": majority_answers(read),
        "answers": sorted({r.answer.strip() for r in read}), "frozen": run.frozen,
        "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__})
    sharing.verify_saved(out / "best.pt", run.model)


def majority_answers(train_rows):
    """The commonest training answer of every question type, and of all under "" (ties: the first in the file)."""
    answers = {"": Counter(r.answer.strip() for r in train_rows)}
    for row in train_rows:
        answers.setdefault(row.question_type, Counter())[row.answer.strip()] += row.question_type != ""
    return {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}


def save_last(run, out):
    """Everything that --resume needs; order and randomness are functions of (seed, step), so a step count is enough."""
    runfolder.save_checkpoint(out / "last.pt", {
        "stage": "gated", "state": runfolder.trainable_state(run.model), "frozen": run.frozen, "settings": settings(run),
        **runfolder.training_state(run)})


def settings(run):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ("out", "resume", "save_last", "config", "workers", "images", "data", "check_data", "dry_run", "safe_load", "skip_bad",
            "semart", "cache", "activations")
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(run.args).items() if name not in free}
    return {**flags, "a cache of features": run.args.cache is not None, "training rows (hash)": rows.fingerprint(run.train.rows),
            "validation rows (hash)": rows.fingerprint(run.val.rows), "processes": run.accelerator.num_processes}


def restore(run, path):
    """Put last.pt back. DataError where anything differs that would change the result."""
    last = runfolder.load_checkpoint(path, ("state", "optimizer", "step", "marks", "frozen", "settings"))
    runfolder.refuse_other_settings(settings(run), last["settings"], path)
    others = runfolder.other_parts(run.frozen, last["frozen"])
    if others:
        raise DataError(f"{path} was trained on another BLIP-2 or style classifier than the one given now "
                        f"(other: {', '.join(others)}): pass the same --blip2 and --efficientnet, or another --out")
    runfolder.load_trainable(run.model, last["state"], path)
    runfolder.restore_training(run, last)


def is_better(value, marks):
    """Is this validation value better than the best so far? Never true of NaN."""
    if marks["value"] is None:
        return math.isfinite(value)
    return value > marks["value"] if marks["metric"] == "em" else value < marks["value"]


# --- the loop ------------

def train_step(run, batches, group, share):
    """Forward and backward of one optimizer step: this process's share of the group, in micro-batches.

    Returns this process's part of the mean losses. The gradient is that of the mean over the whole group, however it is
    split into micro-batches and processes.
    """
    sums = dict.fromkeys(("loss", "lm"), 0.0)
    for i, (number, picked) in enumerate(share):
        # dropout is a pure function of (seed, step, micro-batch): exact resume and equal processes depend on it
        loop.seed_everything(run.args.seed, run.step, number)
        batch = loop.next_batch(batches, run.accelerator.device)
        with nullcontext() if i == len(share) - 1 else run.accelerator.no_sync(run.wrapped), run.accelerator.autocast():
            parts = run.wrapped(**batch, **run.weights)
        if not torch.isfinite(parts["loss"]):
            raise DataError(loop.bad_loss(f"loss is {parts['loss'].item()}", run.step, [run.train.rows[n] for n in picked]))
        portion = len(picked) * run.accelerator.num_processes / len(group)
        run.accelerator.backward(parts["loss"] * portion)
        for name in sums:
            sums[name] += parts[name].mean().item() * portion
    return sums


def train_epoch(run, plan, stop):
    """The optimizer steps of `plan`. Ends early when a signal has come."""
    accelerator = run.accelerator
    batches = iter(loop.load_batches(run.train, run.collate, [numbers for _, share in plan for _, numbers in share],
                                     run.args.workers))
    bar = tqdm(plan, desc=f"steps from {run.step}", mininterval=1, disable=None if run.log else True)  # None: only on a terminal
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.wrapped.train()
    for group, share in bar:
        lr = run.lr(run.step)
        for group_of_parameters in run.optimizer.param_groups:
            group_of_parameters["lr"] = lr
        with loop.dead_loaders_named([run.train.rows[n] for n in group]):
            sums = train_step(run, batches, group, share)
        norm = float(accelerator.clip_grad_norm_(trained, CLIP))
        if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            raise DataError(loop.bad_loss(f"gradient is {norm}", run.step, [run.train.rows[n] for n in group]))
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        run.pace.step(len(group))
        bar.set_postfix(loss=f"{sums['loss']:.3f}", lr=f"{lr:.1e}")
        if run.step % LOG_EVERY == 0:
            together = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
            if run.log:
                run.log.write("step", run.step, epoch=(run.step - 1) // run.per_epoch + 1, lr=lr, grad_norm=norm,
                              **dict(zip(sums, together.tolist())))
        if loop.stopped(accelerator, stop):
            break


def validate(run, data):
    """The numbers of an epoch, exact match (greedy) only where best.pt is chosen by it; and the gates by style, None without gates."""
    answer = greedy_answers if run.args.select == "em" else None
    found = evaluate(run.model, data, run.collate, run.accelerator, run.args.batch_size, run.args.workers, run.weights, answer,
                     gates=True)
    numbers = loss_summary(found)
    if answer:
        hits = [metrics.exact_match(one["prediction"], data.rows[one["row"]].answer.strip()) for one in found]
        numbers["em"] = sum(hits) / len(hits)
    return numbers, maps.found_gates(run.model, found, data.rows)


def rehearse(run):
    """The longest training batch and the longest validation batch, before anything is trained: memory that runs out, or a
    score that fails, shows now and not in the night."""
    def longest(data):
        return sorted(range(len(data)), key=lambda n: text_length(data.rows[n]))[-run.args.batch_size:]

    picked = longest(run.train)
    run.wrapped.train()
    train_step(run, iter([run.collate([run.train[n] for n in picked])]), picked, [(0, picked)])
    run.optimizer.zero_grad()
    validate(run, Questions([run.val.rows[n] for n in longest(run.val)], run.val.image_size, run.val.features))
    if torch.cuda.is_available():
        run.accelerator.print("most GPU memory in a rehearsal of the longest batches: "
                              f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def prepare(args):
    """Flags -> a Run at its first step: rows, features, model, optimizer."""
    absent = missing(args)
    published.refuse_missing(absent, shortest_way(args, absent))
    accelerator = Accelerator(mixed_precision=loop.precision_of(args.precision), cpu=not torch.cuda.is_available())
    splits = [read_data(args, split, accelerator.print) for split in ("train", "val")]
    places = resolved({"blip2": args.blip2, "efficientnet": args.efficientnet, "qformer": args.qformer})
    if args.style == "efficientnet":
        splits = predicted_styles(args, places["blip2"], places["efficientnet"], splits, accelerator.device, accelerator.print)
    train_rows, val_rows = splits
    tokenizer = published.load_tokenizer(places["blip2"])
    built_from = model_args(args, train_rows, answer_length(tokenizer, train_rows, args.max_answer))
    say_cut(tokenizer, {"train": train_rows, "val": val_rows}, built_from["max_answer"], accelerator.print)
    dtype = core.DTYPES[accelerator.mixed_precision]  # of the frozen towers; everything that is trained is in float32
    features, towers = cached_features(args, {**built_from, **places}, train_rows + val_rows, accelerator, dtype)
    loop.seed_everything(args.seed)
    model = core.Blip2OPTGated.build(**{**built_from, **places}, safe=args.safe_load, dtype=dtype, tower=features is None)
    core.save_activations(model.language_model, args.activations)
    weights = loss_weights(args, model, accelerator.print)
    if accelerator.is_main_process:
        runfolder.print_parts(model)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, args.lr, args.weight_decay))
    return Run(args, accelerator, model, wrapped, optimizer, Collate(model.tokenizer, model.styles, model.max_answer),
               Questions(train_rows, model.image_size, features), Questions(val_rows, model.image_size, features), weights,
               built_from, {**runfolder.fingerprint(model), **towers})


def train(run, out, stop):
    """The epochs that are left. Returns early, with a last.pt, when a signal has come."""
    args, leader, say = run.args, run.accelerator.is_main_process, run.accelerator.print
    for epoch in range(run.marks["done"], args.epochs):
        if args.patience and run.marks["stale"] >= args.patience:
            say(f"no better {args.select} for {args.patience} epochs: stopping")
            break
        try:
            train_epoch(run, run.plan(epoch)[run.step - epoch * run.per_epoch:], stop)
        except loop.LoaderError:
            if leader and run.step:
                save_last(run, out)
            raise
        if loop.stopped(run.accelerator, stop):
            break
        numbers, gates = validate(run, run.val)
        better = is_better(numbers[args.select], run.marks)
        run.marks |= {"done": epoch + 1, "stale": run.marks["stale"] + 1}
        if better:
            run.marks |= {"value": numbers[args.select], "epoch": epoch + 1, "stale": 0}
        say(f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()) + (" *" if better else ""))
        if leader:
            run.log.write("epoch", run.step, epoch=epoch + 1, lr=run.lr(run.step - 1), **numbers)
            if args.save_last:  # before best.pt: begin() makes up a best.pt that a kill between the two has left behind
                save_last(run, out)
            if better:
                save_best(run, out)
            draw(run, out)
            if gates and math.isfinite(numbers[args.select]):
                maps.append_frame(out / maps.FILE, run.step, gates)
    if stop.number and leader:
        save_last(run, out)
        say(f"stopped after step {run.step}; {out / 'last.pt'} is there for --resume")


def draw(run, out):
    """curves.png of the log so far."""
    runfolder.draw_curves(run.log.path, out / "curves.png", PANELS, f"{out.name}: gating {run.args.gating}, per {run.args.per}")


def begin(run, out, resumed):
    """The run folder, and what --resume finds in it."""
    args, leader = run.args, run.accelerator.is_main_process
    if resumed:
        restore(run, out / "last.pt")
        run.accelerator.print(f"resuming after step {run.step} of {run.total}")
    if leader:
        size = sum(t.nbytes for t in runfolder.trainable_state(run.model).values())
        runfolder.refuse_full_disk(out, size * (8 if args.save_last else 2))  # AdamW keeps twice the weights; old and new file
        runfolder.start_run(out, args)
        if not resumed:
            (out / maps.FILE).unlink(missing_ok=True)  # of a run that ended before its first best.pt
        run.log = runfolder.RunLog(out, LOG_COLUMNS, run.step if resumed else None)
        if resumed and run.marks["epoch"] and run.step == run.marks["epoch"] * run.per_epoch:
            save_best(run, out)
        if resumed:
            draw(run, out)


def dry_run(args):
    """--dry-run: three rows, the table of parts (prepare prints it), memory; nothing is written but a cache."""
    run = prepare(args)
    if run.accelerator.is_main_process:
        show_rows(run.model.tokenizer, run.train.rows[:3], run.model.max_answer)
    loop.dry_run(run, rehearse, run.train.features.stores.values() if run.train.features else ())


def fit(args):
    """The whole run -> (Run, number of the signal that ended it or 0)."""
    out = pathlib.Path(args.out)
    resumed = args.resume and (out / "last.pt").exists()
    runfolder.refuse_overwrite(out, resumed)
    run = prepare(args)
    say = run.accelerator.print
    with runfolder.locked(out) if run.accelerator.is_main_process else nullcontext(), loop.StopSignal() as stop:
        runfolder.refuse_overwrite(out, resumed)  # once more: another run may have ended meanwhile
        begin(run, out, resumed)
        say(f"{len(run.train)} training and {len(run.val)} validation questions, {len(run.model.styles)} styles; "
            f"{run.total} steps of {len(run.plan(0)[0][0])} questions, lr {args.lr:g}, "
            f"precision {run.accelerator.mixed_precision}, {run.accelerator.device}")
        rehearse(run)
        train(run, out, stop)
        if run.log:
            run.log.close()
    run.accelerator.end_training()
    return run, stop.number


def main(argv=None):
    args = get_args(argv)
    for note in runfolder.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        return check_data(args)
    with loop.batch_size_in_memory_errors(args.batch_size):
        if args.dry_run:
            return dry_run(args)
        run, signal_number = fit(args)
    return runfolder.ended(run, signal_number, args.select, "train_gated.py", argv)


if __name__ == "__main__":
    sys.exit(loop.exit_code(main))
