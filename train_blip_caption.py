"""train_blip_caption.py: fine-tune BLIP so that it captions your pictures in the manner of your captions.

    python train_blip_caption.py --data data/captions                                    # BLIP base, one GPU of 12 GB or more
    python train_blip_caption.py --data data/artquest --blip tiny --lr 1e-3 --epochs 6   # laptop CPU
    python train_blip_caption.py --data data/captions --zero-shot                        # what the weights can do untrained
    python train_blip_caption.py --data data/captions --checkpoint runs/blip/best.pt --cases 20   # look at the mistakes
    python train_blip_caption.py --caption photo.jpg folder/ --checkpoint runs/blip/best.pt
    python train_blip_caption.py --caption folder/ --captions out.csv --checkpoint runs/blip/best.pt   # goes on where it stopped

Trained: the text decoder and the last layers of the vision tower (--unfreeze, --unfreeze-schedule). Data flow: {file: caption}
-> captions.Picture -> Captions -> Collate -> BLIP's loss; validation, evaluation and --caption generate through describe() alone.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import Dataset
from tqdm import tqdm

import core
import metrics
from data import captions, rows
from data.captions import LONGEST, MAX_LENGTH, augmented, fingerprint, pictures_in, token_ids
from engine import checkpoints, environment, errors, files, flags, folders, loaders, loop, published, runfolder
from engine.errors import DataError
from show import report
from show.report import write_cases

DEFAULT = published.DEFAULTS["blip"]
# conservative: what the analysis of the first runs recommends; original: what was run
RECIPES = {"conservative": {"unfreeze": 1, "lr": 1e-5, "vision_lr": 0.05, "weight_decay": 0.05, "patience": 3},
           "original": {"unfreeze": 3, "lr": 3e-5, "vision_lr": 0.1, "weight_decay": 0.01, "patience": 5}}
GENERATION = {"max_length": MAX_LENGTH, "num_beams": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.1,
              "length_penalty": 1.0, "early_stopping": False, "do_sample": False}
# early_stopping True, as first run, ends a search with the fifth caption that ends, however bad: the end of good ones is lost
SMOOTHING = 0.1  # BLIP's own (med.py); transformers had it up to 4.37 and has 0 since
CLIP = 2.0  # gradient norm
LOG_EVERY = 10  # optimizer steps between two rows of training_log.csv
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "grad_norm", "layers", "images", "meteor", "rouge_l", "cider_d", "bleu_4",
               "score")
PANELS = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),
          ("validation", [("epoch", "score", "mean of the three"), ("epoch", "meteor", "METEOR"), ("epoch", "rouge_l", "ROUGE-L"),
                          ("epoch", "cider_d", "CIDEr-D")]),
          ("learning", [("step", "grad_norm", "gradient norm"), ("epoch", "layers", "open vision layers")])]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="folder with train_captions.json, val_captions.json and, if you like, "
                                                    "test_captions.json: {file: caption or list of captions}")
    data.add_argument("--images", metavar="DIR", help="image root (default: DATA/images, else DATA)")
    data.add_argument("--encoding", default="utf-8", help="of the files of captions (default: utf-8)")
    data.add_argument("--shots", type=flags.positive, metavar="N", help="train on N pictures only, picked by --seed")
    data.add_argument("--train-texts-clean", action="store_true",
                      help=f"remove empty, duplicate (twice on a picture) and absurdly long (over {LONGEST} words) captions")
    data.add_argument("--augment", action="store_true", help="mirror (not where the caption says left or right), brightness, "
                                                             "contrast, rotation by up to 10 degrees")
    data.add_argument("--skip-bad", type=flags.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                      help="leave bad or missing pictures out and list them, up to this share (0.01 where no number is given)")
    data.add_argument("--check-data", action="store_true", help="read everything, print what is there, and stop; loads no weight")
    data.add_argument("--dry-run", action="store_true", help="show what the model reads and the memory it takes, rehearse the "
                                                             "longest batch, and stop; nothing is written")
    data.add_argument("--workers", type=flags.whole, default=2, help="loader processes (default: 2)")
    model = parser.add_argument_group("model")
    model.add_argument("--blip", metavar="ID|DIR|tiny", help="HuggingFace id, local folder, or tiny (ships with the project); default "
                                                             f"{DEFAULT}, or what --checkpoint was trained on")
    model.add_argument("--recipe", choices=tuple(RECIPES), default="conservative",
                       help="defaults of the flags marked (recipe): " + "; ".join(
                           f"{name}: {', '.join(f'{k} {v:g}' for k, v in preset.items())}" for name, preset in RECIPES.items()))
    model.add_argument("--unfreeze", type=flags.whole, metavar="LAYERS", help="vision layers trained, from the last (recipe)")
    model.add_argument("--unfreeze-schedule", nargs="+", default=[], metavar="EPOCH:LAYERS",
                       help="open more as epochs go by: 3:2 5:4 trains 2 layers from the third epoch on, 4 from the fifth")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=flags.positive, default=15, help="(default: 15)")
    run.add_argument("--batch-size", type=flags.positive, default=6, help="captions a step and process (default: 6)")
    run.add_argument("--accumulation", type=flags.positive, default=1, help="batches an optimizer step (default: 1)")
    run.add_argument("--lr", type=flags.rate, help="peak learning rate of the text decoder (recipe)")
    run.add_argument("--vision-lr", type=flags.weight, help="that of the vision tower as a multiple of --lr (recipe)")
    run.add_argument("--warmup", type=flags.whole, default=1000, metavar="STEPS",
                     help="steps of warm-up, at most a tenth of all (default: 1000)")
    run.add_argument("--weight-decay", type=flags.weight, help="not on biases and norms (recipe)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--patience", type=flags.whole, help="epochs without a better score before stopping; 0 = never (recipe)")
    run.add_argument("--seed", type=flags.whole, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/blip", metavar="DIR", help="run folder (default: runs/blip)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    look = parser.add_argument_group("evaluation")
    look.add_argument("--max-val", type=flags.positive, metavar="N", help="score N pictures only (default: the whole split)")
    look.add_argument("--val-batch", type=flags.positive, default=32, help="pictures captioned at once (default: 32)")
    look.add_argument("--zero-shot", action="store_true", help="score the untrained weights and stop")
    look.add_argument("--checkpoint", metavar="DIR|FILE",
                      help="a run folder or its best.pt: score it and stop, or use it for --caption")
    look.add_argument("--caption", nargs="+", metavar="PATH", help="caption these pictures and folders of pictures and stop")
    look.add_argument("--captions", metavar="FILE.csv",
                      help="with --caption DIR: image, caption of every picture in the folder and in those below; goes on where it "
                           "stopped, FILE.csv.json says what it was made with")
    look.add_argument("--report", metavar="FILE.html", help="a page with scores and their intervals, curves and samples, in "
                                                            "training of the best epoch; that of the test split is FILE_test.html")
    look.add_argument("--json", action="store_true", help="print captions and scores as JSON")
    look.add_argument("--cases", type=flags.whole, default=0, metavar="N",
                      help="write OUT/cases.html: the N worst and the N best validation pictures")
    args = flags.parse_args(parser, argv)
    if not args.data and (args.check_data or not args.caption):
        parser.error("--data is needed, but for --caption")
    if args.zero_shot and args.checkpoint:
        parser.error("--zero-shot is without --checkpoint")
    if args.report and args.caption:
        parser.error("--report is of an evaluation: leave --caption out")
    if args.captions and (args.json or len(args.caption or ()) != 1):
        parser.error("--captions takes one folder in --caption, and is without --json")
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    steps = args.unfreeze_schedule or []
    args.unfreeze_schedule = steps if isinstance(steps, list) else [steps]  # of a --config
    for step in args.unfreeze_schedule:  # YAML takes 3:2 for 182
        if not re.fullmatch(r"[1-9]\d*:\d+", str(step)):
            parser.error(f"--unfreeze-schedule: {step} is not EPOCH:LAYERS, such as 3:2 (in a file in quotes)")
    if args.check_data or not args.checkpoint:
        args.blip = args.blip or DEFAULT
    return args


# --- data: your own data set goes here ------------

def reading(args):
    """The flags about data, by the names that captions.read_data takes."""
    return {"images": args.images, "encoding": args.encoding, "texts_clean": args.train_texts_clean, "skip_bad": args.skip_bad,
            "shots": args.shots, "seed": args.seed}


def read_data(args, split, say=print):
    """The Pictures of a split, see captions.read_data."""
    return captions.read_data(args.data, split, workers=args.workers, say=say, **reading(args))


class Captions(Dataset):
    """Number, or (epoch, number) in training -> (sample, Picture); (the DataError of a broken picture, Picture), see train_gated.

    sample: pixel_values [3,s,s] in BLIP's normalisation, and with a tokenizer ids, the caption's tokens. every: one row for
    each caption; else one for each picture, with its first caption. augment: the seed, or None.
    """

    def __init__(self, pictures, image_size, tokenizer=None, every=False, augment=None):
        pairs = [(p, text) for p in pictures for text in (p.captions if every else p.captions[:1] or ("",))]
        self.rows, self.texts, self.image_size, self.augment = [p for p, _ in pairs], [t for _, t in pairs], image_size, augment
        self.ids = token_ids(tokenizer, self.texts) if tokenizer else None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        epoch, number = index if isinstance(index, tuple) else (None, index)
        picture = self.rows[number]
        try:
            image = rows.load_image(picture.image)
        except DataError as error:
            return error, picture
        if self.augment is not None and epoch is not None:
            image = augmented(image, self.texts[number], np.random.default_rng([self.augment, epoch, number]))
        sample = {"pixel_values": rows.image_tensor(image, self.image_size)}  # [3,s,s]
        return ({**sample, "ids": self.ids[number]} if self.ids else sample), picture


def decoder_inputs(ids, mask, bos):
    """Token ids [B,L] as the tokenizer gives them ([CLS] ... [SEP] pads) and their mask -> what BLIP's decoder is trained on.

    Position 0 is bos, [DEC], since generation starts with it and the library's forward does not put it there; the labels of pads
    are -100, since it would train on them. Labels stand under their own tokens: the library shifts them. (models/blip.py)
    """
    ids = ids.clone()
    ids[:, 0] = bos
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Collate:
    """Samples -> pixel_values [B,3,s,s] and, where they have tokens, decoder_inputs [B,L]."""

    def __init__(self, pad, bos):
        self.pad, self.bos = pad, bos

    def __call__(self, samples):
        for found, picture in samples:
            if isinstance(found, DataError):
                return {"fault": f"{picture.file}, {rows.locate(picture.file, picture.line)}: {found}"}
        batch = {"pixel_values": torch.stack([found["pixel_values"] for found, _ in samples])}
        if "ids" in samples[0][0]:
            batch |= self.inputs([found["ids"] for found, _ in samples])
        return batch

    def inputs(self, ids):
        """Token ids of B texts -> decoder_inputs [B,L]."""
        return decoder_inputs(core.pad_ids(ids, self.pad), core.pad_ids([[1] * len(i) for i in ids], 0), self.bos)


# --- model ------------

def load_blip(name):
    """HuggingFace id, folder or tiny -> (BlipForConditionalGeneration with label smoothing, tokenizer), see published.load_blip2."""
    from transformers import BlipForConditionalGeneration
    name = published.in_models(name, "blip")
    model, tokenizer = published.load_published(BlipForConditionalGeneration, "BLIP", name)
    text = model.config.text_config
    ours, wanted = ((len(tokenizer), tokenizer.pad_token_id, tokenizer.sep_token_id),
                    (text.vocab_size, text.pad_token_id, text.sep_token_id))
    if ours[0] > wanted[0] or ours[1:] != wanted[1:]:
        raise DataError(f"{name}: tokenizer and decoder do not belong together (tokens, pad and sep are {ours} and {wanted})")
    if tokenizer("a").input_ids[-1] != text.sep_token_id:
        raise DataError(f"{name}: its tokenizer does not end a text with [SEP], so no caption would ever end")
    set_smoothing(model)
    return model, tokenizer


def set_smoothing(model, value=SMOOTHING):
    """Label smoothing of the loss, where the config keeps it and where the decoder took it from."""
    model.config.text_config.label_smoothing = model.text_decoder.label_smoothing = value


def open_layers(model, layers):
    """Trained: the text decoder and the last `layers` layers of the vision tower. Frozen: all else."""
    tower = model.vision_model.encoder.layers
    if layers > len(tower):
        raise DataError(f"--unfreeze or --unfreeze-schedule asks for {layers} vision layers and this BLIP has {len(tower)}")
    model.requires_grad_(False)
    model.text_decoder.requires_grad_(True)
    tower[len(tower) - layers:].requires_grad_(True)


def layers_at(args, epoch):
    """Vision layers that are open in an epoch (from 0): --unfreeze, then what the schedule says; never fewer than before."""
    steps = [tuple(map(int, step.split(":"))) for step in args.unfreeze_schedule]
    return max([args.unfreeze, *(layers for start, layers in steps if start <= epoch + 1)])


def train_mode(run):
    """Dropout in the trained parts only."""
    run.wrapped.train()
    run.model.vision_model.eval()
    for layer in run.model.vision_model.encoder.layers:
        layer.train(next(layer.parameters()).requires_grad)


def parameter_groups(model, args):
    """The trained parameters, each in exactly one group: vision and text with their own rate ("scale" times the step's), with
    and, for biases and norms (fewer than two dimensions), without weight decay."""
    groups = {}
    for name, parameter in model.named_parameters():  # tied weights are named once
        if parameter.requires_grad:
            key = ("vision" if name.startswith("vision_model.") else "text", parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    scale = {"vision": args.vision_lr, "text": 1.0}
    return [{"params": found, "scale": scale[part], "weight_decay": args.weight_decay if decays else 0.0}
            for (part, decays), found in groups.items()]


# --- captions and their scores ------------

@torch.no_grad()
def describe(model, tokenizer, pixels, settings):
    """Pixels [B,3,s,s] -> B captions. The one way here from a picture to a caption."""
    ids = model.generate(pixel_values=pixels, **settings)  # [B,up to max_length]
    texts = tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)  # [DEC] is no token of the tokenizer
    return [" ".join(text.split()) for text in texts]


def token_losses(model, pixels, inputs, smoothing=0.0):
    """Cross-entropy of every label of decoder_inputs -> [B,L-1], 0 at pads."""
    logits = model(pixel_values=pixels, **inputs).logits[:, :-1].float()  # [B,L-1,V]
    return F.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none", label_smoothing=smoothing)


@torch.no_grad()
def confidence(model, tokenizer, collate, pixels, captions):
    """Mean log-probability of a caption's tokens, its end among them, without the search's penalties: [B,3,s,s], B texts -> [B]."""
    ids = token_ids(tokenizer, captions)
    inputs = send_to_device(collate.inputs(ids), pixels.device)
    return -token_losses(model, pixels, inputs).sum(1) / torch.tensor([len(i) - 1 for i in ids], device=pixels.device)


@torch.no_grad()
def evaluate(model, tokenizer, data, collate, accelerator, settings, batch_size, workers, sure=False):
    """Caption every row exactly once, on however many processes.

    Returns on every process a list of dicts in row order: row, caption, where `sure` confidence and, where the rows have tokens,
    loss (sum over the caption's tokens, smoothed as in training) and tokens.
    """
    model.eval()
    mine = list(range(len(data)))[accelerator.process_index::accelerator.num_processes]
    batches, found = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)], []
    loaded = iter(loaders.load_batches(data, collate, batches, workers))
    for numbers in tqdm(batches, desc="captioning", leave=False, mininterval=1,
                        disable=None if accelerator.is_main_process else True):
        batch = loaders.next_batch(loaded, accelerator.device)
        pixels, table = batch.pop("pixel_values"), {}
        with errors.batch_size_in_memory_errors(batch_size, "--val-batch"), accelerator.autocast():
            table["caption"] = describe(model, tokenizer, pixels, settings)
            if sure:
                table["confidence"] = confidence(model, tokenizer, collate, pixels, table["caption"]).tolist()
            if batch:
                table |= {"loss": token_losses(model, pixels, batch, SMOOTHING).sum(1).tolist(),
                          "tokens": (batch["labels"][:, 1:] != -100).sum(1).tolist()}
        found += [{"row": i, **{name: values[k] for name, values in table.items()}} for k, i in enumerate(numbers)]
    return sorted(gather_object(found), key=lambda one: one["row"])


def mean_of_three(scores):
    """Mean of METEOR, ROUGE-L and CIDEr-D: what best.pt is chosen by. CIDEr-D has no value for a single picture."""
    values = [scores[name] for name in (metrics.meteor_name(), "ROUGE-L", "CIDEr-D") if scores[name] is not None]
    return sum(values) / len(values)


def numbers_of(found, data):
    """The numbers of an evaluation that are logged, over the rows of `data` with all their captions as references."""
    corpus = metrics.score_captions([one["caption"] for one in found], [list(p.captions) for p in data.rows])["corpus"]
    numbers = {"images": len(found), "loss": sum(one["loss"] for one in found) / sum(one["tokens"] for one in found),
               "meteor": corpus[metrics.meteor_name()], "rouge_l": corpus["ROUGE-L"], "cider_d": corpus["CIDEr-D"],
               "bleu_4": corpus["BLEU-4"], "score": mean_of_three(corpus)}
    return {name: value for name, value in numbers.items() if value is not None}


def told(numbers):
    """Numbers for the terminal."""
    line = ", ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items())
    return line + ("" if metrics.meteor_name() == "METEOR" else f" ({metrics.meteor_name()})")


# --- one run: what the functions of the loop share ------------

@dataclass
class Run:
    """A run under way. `model` is the BlipForConditionalGeneration; `wrapped` the same as accelerate trains it."""
    args: argparse.Namespace
    accelerator: Accelerator
    model: torch.nn.Module
    tokenizer: object
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    collate: Collate
    train: Captions
    val: Captions
    step: int = 0  # optimizer steps done
    log: runfolder.RunLog | None = None  # only where files are written

    def __post_init__(self):
        self.pace = loop.Pace(self, "pictures")
        self.marks = {"metric": "score", "value": None, "epoch": None, "stale": 0, "done": 0}  # done: epochs validated
        self.per_epoch = len(self.plan(0))
        self.total = self.args.epochs * self.per_epoch
        self.open = layers_at(self.args, 0)

    def plan(self, epoch):
        """The optimizer steps of an epoch, see loop.epoch_plan."""
        return loop.epoch_plan(len(self.train), self.args.batch_size, self.args.accumulation, self.args.seed, epoch,
                               self.accelerator.process_index, self.accelerator.num_processes)

    def lr(self, step):
        """Linear warm-up, then cosine to 0 at the last step of the run."""
        return loop.cosine_lr(step, self.total, min(self.args.warmup, self.total // 10), self.args.lr)

    def open_up(self, layers):
        open_layers(self.model, layers)
        self.open = layers


# --- checkpoints ------------

def save_best(run, out):
    """best.pt: trained tensors and plain values only, with the settings of generation."""
    import transformers
    checkpoints.save_checkpoint(out / "best.pt", {
        "stage": "blip", "state": checkpoints.trainable_state(run.model), "model_args": {"blip": run.args.blip}, "open": run.open,
        "generation": GENERATION, "precision": run.accelerator.mixed_precision, "args": vars(run.args), **run.marks,
        "meteor": metrics.meteor_name(), "frozen": checkpoints.fingerprint(run.model.vision_model),
        "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__})


def save_last(run, out):
    """Everything that --resume needs; order and randomness are functions of (seed, step), so a step count is enough."""
    checkpoints.save_checkpoint(out / "last.pt", {
        "stage": "blip", "state": checkpoints.trainable_state(run.model), "open": run.open,
        "frozen": checkpoints.fingerprint(run.model.vision_model), "settings": settings(run), **runfolder.training_state(run)})


def settings(run):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ("out", "resume", "save_last", "config", "workers", "images", "data", "check_data", "dry_run", "skip_bad", "cases",
            "json", "val_batch", "checkpoint", "caption", "captions", "report", "zero_shot")
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(run.args).items() if name not in free}
    return {**flags, "training pictures (hash)": fingerprint(run.train.rows),
            "validation pictures (hash)": fingerprint(run.val.rows), "METEOR": metrics.meteor_name(),
            "processes": run.accelerator.num_processes}


def restore(run, path):
    """Put last.pt back. DataError where anything differs that would change the result."""
    last = checkpoints.load_checkpoint(path, ("state", "open", "optimizer", "step", "marks", "frozen", "settings"))
    runfolder.refuse_other_settings(settings(run), last["settings"], path)
    run.open_up(last["open"])
    load_weights(run.model, last, path)
    runfolder.restore_training(run, last)


def load_trained(name, best, path):
    """(model, tokenizer) of a best.pt, on the BLIP it was trained on, or on the one named."""
    model, tokenizer = load_blip(name or best["model_args"]["blip"])
    open_layers(model, best["open"])
    load_weights(model, best, path)
    return model, tokenizer


def load_weights(model, content, path):
    """The trained tensors of a checkpoint into a model with as many open layers. DataError: trained on another BLIP."""
    if content["frozen"] != checkpoints.fingerprint(model.vision_model):
        raise DataError(f"{path} was trained on another BLIP than the one given now: pass the same --blip")
    checkpoints.load_trainable(model, content["state"], path)


# --- the loop ------------

def train_step(run, batches, group, share):
    """Forward and backward of one optimizer step: this process's share of the group, in micro-batches.

    Returns this process's part of the mean loss over the tokens of the whole group; the gradient is that of this mean, however
    the group is split into micro-batches and processes.
    """
    def targets(numbers):
        return sum(len(run.train.ids[n]) - 1 for n in numbers)

    total = 0.0
    for i, (number, picked) in enumerate(share):
        # dropout is a pure function of (seed, step, micro-batch): exact resume and equal processes depend on it
        loop.seed_everything(run.args.seed, run.step, number)
        batch = loaders.next_batch(batches, run.accelerator.device)
        with nullcontext() if i == len(share) - 1 else run.accelerator.no_sync(run.wrapped), run.accelerator.autocast():
            loss = run.wrapped(**batch).loss
        if not torch.isfinite(loss):
            raise DataError(loop.bad_loss(f"loss is {loss.item()}", run.step, [run.train.rows[n] for n in picked]))
        portion = targets(picked) * run.accelerator.num_processes / targets(group)
        run.accelerator.backward(loss * portion)
        total += loss.item() * portion
    return total


def train_epoch(run, epoch, plan, stop):
    """The optimizer steps of `plan`, a part of the epoch's. Ends early when a signal has come."""
    accelerator = run.accelerator
    picked = [[(epoch, n) for n in numbers] for _, share in plan for _, numbers in share]
    batches = iter(loaders.load_batches(run.train, run.collate, picked, run.args.workers))
    bar = tqdm(plan, desc=f"steps from {run.step}", mininterval=1, disable=None if run.log else True)  # None: only on a terminal
    run.open_up(layers_at(run.args, epoch))
    trained = [p for p in run.model.parameters() if p.requires_grad]
    train_mode(run)
    for group, share in bar:
        lr = run.lr(run.step)
        for part in run.optimizer.param_groups:
            part["lr"] = lr * part["scale"]
        with loaders.dead_loaders_named([run.train.rows[n] for n in group]):
            loss = train_step(run, batches, group, share)
        norm = float(accelerator.clip_grad_norm_(trained, CLIP))
        if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            raise DataError(loop.bad_loss(f"gradient is {norm}", run.step, [run.train.rows[n] for n in group]))
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        run.pace.step(len(group))
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
        if run.step % LOG_EVERY == 0:
            loss = accelerator.reduce(torch.tensor(loss, device=accelerator.device), "mean").item()
            if run.log:
                run.log.write("step", run.step, epoch=epoch + 1, lr=lr, loss=loss, grad_norm=norm)
        if loop.stopped(accelerator, stop):
            break


def validate(run, data):
    """(numbers of an evaluation, what evaluate found)."""
    args = run.args
    found = evaluate(run.model, run.tokenizer, data, run.collate, run.accelerator, GENERATION, args.val_batch, args.workers,
                     bool(args.report))
    return numbers_of(found, data), found


def rehearse(run):
    """The longest training batch with all layers open that ever will be, and a validation batch, before anything is trained:
    memory that runs out, or a score that fails, shows now and not in the night."""
    picked = sorted(range(len(run.train)), key=lambda n: len(run.train.ids[n]))[-run.args.batch_size:]
    run.open_up(layers_at(run.args, run.args.epochs))
    train_mode(run)
    train_step(run, iter([run.collate([run.train[n] for n in picked])]), picked, [(0, picked)])
    run.optimizer.zero_grad()
    validate(run, Captions(run.val.rows[:run.args.val_batch], run.val.image_size, run.tokenizer))
    loop.print_gpu_memory(run.accelerator)


def prepare(args):
    """Flags -> a Run at its first step: pictures, model, optimizer."""
    published.refuse_missing({"BLIP": published.missing_model(args.blip, "blip")})
    # with a schedule DDP meets parameters that are still frozen
    scattered = [DistributedDataParallelKwargs(find_unused_parameters=True)] if args.unfreeze_schedule else []
    accelerator = Accelerator(mixed_precision=loop.precision_of(args.precision), cpu=not torch.cuda.is_available(),
                              kwargs_handlers=scattered)
    train, val = (read_data(args, split, accelerator.print) for split in ("train", "val"))
    loop.seed_everything(args.seed)
    with accelerator.main_process_first():  # one process fetches what the hub alone has, the others find it
        model, tokenizer = load_blip(args.blip)
    open_layers(model, layers_at(args, args.epochs))  # all that will ever be trained
    if accelerator.is_main_process:
        checkpoints.print_parts(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.lr)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    text, size = model.config.text_config, model.config.vision_config.image_size
    return Run(args, accelerator, model, tokenizer, wrapped, optimizer, Collate(text.pad_token_id, text.bos_token_id),
               Captions(train, size, tokenizer, every=True, augment=args.seed if args.augment else None),
               Captions(captions.limited(val, args.max_val, "val", accelerator.print), size, tokenizer))


def train(run, out, stop):
    """The epochs that are left. Returns early, with a last.pt, when a signal has come."""
    args, leader, say = run.args, run.accelerator.is_main_process, run.accelerator.print
    for epoch in range(run.marks["done"], args.epochs):
        if args.patience and run.marks["stale"] >= args.patience:
            say(f"no better score for {args.patience} epochs: stopping")
            break
        try:
            train_epoch(run, epoch, run.plan(epoch)[run.step - epoch * run.per_epoch:], stop)
        except loaders.LoaderError:
            if leader and run.step:
                save_last(run, out)
            raise
        if loop.stopped(run.accelerator, stop):
            break
        numbers, found = validate(run, run.val)
        better = loop.is_better(numbers["score"], run.marks)
        run.marks |= {"done": epoch + 1, "stale": run.marks["stale"] + 1}
        if better:
            run.marks |= {"value": numbers["score"], "epoch": epoch + 1, "stale": 0}
        say(f"epoch {epoch + 1}: {told(numbers)}" + (" *" if better else ""))
        if leader:
            run.log.write("epoch", run.step, epoch=epoch + 1, lr=run.lr(run.step - 1), layers=run.open, **numbers)
            if better:
                write_captions(out / "val.json", run.val, found)
            if args.save_last:  # before best.pt: begin() makes up a best.pt that a kill between the two has left behind
                save_last(run, out)
            if better:
                save_best(run, out)
            if better and args.report:
                say(f"report: {write_report(args, out / 'best.pt', 'val', run.val, found)}")
            draw(run, out)
    if stop.number and leader:
        save_last(run, out)
        say(f"stopped after step {run.step}; {out / 'last.pt'} is there for --resume")


def write_captions(path, data, found):
    """{file: caption}, as metrics.py reads it; found: of evaluate."""
    with files.whole_file(path) as file:
        json.dump(captions_of(data, found), file, indent=1, ensure_ascii=False)


def captions_of(data, found):
    """{file: caption} of what evaluate found."""
    return {p.name: one["caption"] for p, one in zip(data.rows, found)}


def draw(run, out):
    """curves.png of the log so far."""
    runfolder.draw_curves(run.log.path, out / "curves.png", PANELS, f"{out.name}: {run.args.blip}, {run.args.recipe}")


def begin(run, out, resumed):
    """The run folder, and what --resume finds in it."""
    args, leader = run.args, run.accelerator.is_main_process
    if resumed:
        restore(run, out / "last.pt")
        run.accelerator.print(f"resuming after step {run.step} of {run.total}")
    if leader:
        size = sum(t.nbytes for t in checkpoints.trainable_state(run.model).values())
        files.refuse_full_disk(out, size * (8 if args.save_last else 2))  # AdamW keeps twice the weights; old and new file
        runfolder.start_run(out, vars(args))
        run.log = runfolder.RunLog(out, LOG_COLUMNS, run.step if resumed else None)
        if resumed and run.marks["epoch"] and run.step == run.marks["epoch"] * run.per_epoch:
            save_best(run, out)
        if resumed:
            draw(run, out)


def finish(run, out):
    """After the last epoch: the page of cases, and the test split, where there is one, by best.pt."""
    args, say = run.args, run.accelerator.print
    if args.cases and run.accelerator.is_main_process:
        told_then = json.loads((out / "val.json").read_text(encoding="utf-8"))
        write_cases(out / "cases.html", run.val, [told_then[p.name] for p in run.val.rows], args.cases, f"{out.name}: best epoch")
        say(f"{out / 'cases.html'}: {args.cases} worst and best")
    if captions.split_file(args.data, "test").is_file():
        # into a fresh model: layers that were opened after the best epoch are no longer what they were then
        best = out / "best.pt"
        run.model = load_trained(None, checkpoints.load_checkpoint(best), best)[0].to(run.accelerator.device)
        pictures = captions.limited(read_data(args, "test", say), args.max_val, "test", say)
        data = Captions(pictures, run.val.image_size, run.tokenizer)
        numbers, found = validate(run, data)
        say(f"test: {told(numbers)}")
        if run.accelerator.is_main_process:
            write_captions(out / "test.json", data, found)
            if args.report:
                say(f"report: {write_report(args, out / 'best.pt', 'test', data, found)}")


def dry_run(args):
    """--dry-run: three captions with [what the loss does not see] in brackets, memory; nothing is written."""
    run = prepare(args)
    for number in range(min(3, len(run.train))):
        first, *others = run.train.ids[number]
        run.accelerator.print(f"{run.train.rows[number].name}: [{run.tokenizer.decode([first])}] |"
                              f"{run.tokenizer.decode(others)!r}, {len(others)} tokens are trained")
    loop.dry_run(run, rehearse)


def fit(args):
    """The whole run -> (Run, number of the signal that ended it or 0)."""
    out = pathlib.Path(args.out)
    resumed = args.resume and (out / "last.pt").exists()
    runfolder.refuse_overwrite(out, resumed)
    if args.report:
        files.refuse_unwritable(args.report)
    run = prepare(args)
    say = run.accelerator.print
    with runfolder.locked(out) if run.accelerator.is_main_process else nullcontext(), loop.StopSignal() as stop:
        runfolder.refuse_overwrite(out, resumed)  # once more: another run may have ended meanwhile
        begin(run, out, resumed)
        say(f"{len(run.train)} training captions, {len(run.val)} validation pictures; {run.total} steps of "
            f"{len(run.plan(0)[0][0])} captions, lr {args.lr:g}, precision {run.accelerator.mixed_precision}, "
            f"{run.accelerator.device}")
        rehearse(run)
        train(run, out, stop)
        if run.log:
            run.log.close()
        if not stop.number and run.marks["value"] is not None:
            finish(run, out)
    run.accelerator.end_training()
    return run, stop.number


# --- without training ------------

def ready(args):
    """What generates without training -> (model in eval mode, tokenizer, Collate, Accelerator, generation settings)."""
    best = {"generation": GENERATION}
    if args.checkpoint:
        args.checkpoint = str(checkpoints.checkpoint_file(args.checkpoint))  # the report's curves go by its folder
        best = checkpoints.load_checkpoint(args.checkpoint, ("state", "model_args", "open", "frozen", "generation", "precision"))
        if best.get("stage") != "blip":
            raise DataError(f"{args.checkpoint}: a checkpoint of another stage ({best.get('stage')}) and not of this one")
    name = args.blip or best["model_args"]["blip"]
    published.refuse_missing({"BLIP": published.missing_model(name, "blip")})
    if args.checkpoint and args.precision == "auto" and torch.cuda.is_available():
        args.precision = best["precision"]  # as in training: rounding can change a caption
    accelerator = Accelerator(mixed_precision=loop.precision_of(args.precision), cpu=not torch.cuda.is_available())
    with accelerator.main_process_first():
        model, tokenizer = load_trained(name, best, args.checkpoint) if args.checkpoint else load_blip(name)
    collate = Collate(model.config.text_config.pad_token_id, model.config.text_config.bos_token_id)
    return model.eval().to(accelerator.device), tokenizer, collate, accelerator, best["generation"]


def score(args):
    """--zero-shot and --checkpoint: scores of the validation and test split."""
    def say(*words):
        accelerator.print(*words, file=sys.stderr if args.json else sys.stdout)

    page = pathlib.Path(args.out) / "cases.html"
    for path in filter(None, (args.cases and page, args.report)):
        files.refuse_unwritable(path)
    model, tokenizer, collate, accelerator, generation = ready(args)
    result = {}
    for split in ["val"] + ["test"] * captions.split_file(args.data, "test").is_file():
        pictures = captions.limited(read_data(args, split, say), args.max_val, split, say)
        data = Captions(pictures, model.config.vision_config.image_size, tokenizer)
        found = evaluate(model, tokenizer, data, collate, accelerator, generation, args.val_batch, args.workers, bool(args.report))
        numbers = numbers_of(found, data)
        say(f"{split}: {told(numbers)}")
        result[split] = {"scores": numbers, "captions": captions_of(data, found)}
        if args.cases and split == "val" and accelerator.is_main_process:
            write_cases(page, data, list(result[split]["captions"].values()), args.cases,
                        f"{args.checkpoint or args.blip}: {split}")
            say(f"{page}: {args.cases} worst and best")
        if args.report and accelerator.is_main_process:
            say(f"report: {write_report(args, args.checkpoint, split, data, found)}")
    if args.json:
        accelerator.print(json.dumps(result, indent=1, ensure_ascii=False))


def write_report(args, checkpoint, split, data, found):
    """--report: the page of a split -> its path. checkpoint: None = untrained; found: of evaluate."""
    page = pathlib.Path(args.report)
    page = page if split == "val" else page.with_name(f"{page.stem}_{split}{page.suffix}")
    log = pathlib.Path(checkpoint).with_name("training_log.csv") if checkpoint else None
    made = report.about(checkpoint=checkpoint, blip=args.blip, data=f"{args.data}, {split}")
    system = "trained" if checkpoint else "untrained"
    report.write(page, f"{checkpoint or args.blip}: {split}", report.captions(data.rows, {system: found}, log, PANELS, [made]))
    return page


def caption_folder(args):
    """--captions: a row for each picture of the folder and those below, but for those that are there, see folders.py."""
    folder, = args.caption
    names = folders.pictures_in(folder)
    files.refuse_unwritable(args.captions)
    model, tokenizer, _, accelerator, generation = ready(args)
    if accelerator.num_processes > 1:
        raise DataError("--captions writes one file from one process: start it without accelerate launch")
    trained = files.digest(args.checkpoint) if args.checkpoint else None
    made_with = {"checkpoint (sha256)": trained, "--blip": None if trained else args.blip, "--caption": os.path.realpath(folder),
                 "precision": accelerator.mixed_precision, **generation}

    @torch.no_grad()
    def tell(images, keys):
        with accelerator.autocast():
            return [key for key, in keys], [(text,) for text in describe(model, tokenizer, images, generation)]

    with (folders.opened(args.captions, ("image", "caption"), 1, made_with) as table,
          errors.batch_size_in_memory_errors(args.val_batch, "--val-batch")):
        folders.fill(table, folder, table.lacking(names, [()]), tell, model.config.vision_config.image_size, args.val_batch,
                     args.workers, accelerator.device)


def caption(args):
    """--caption: a line for each picture, or JSON. Folders stand for the pictures in them. Exit code 2 where one is broken."""
    found = pictures_in(args.caption)
    broken = dict(rows.verify_images(found, max(1, args.workers)))
    for reason in broken.values():
        print(f"error: {reason}", file=sys.stderr)
    found = [p for p in found if p.image not in broken]
    if found:
        model, tokenizer, collate, accelerator, generation = ready(args)
        data = Captions(found, model.config.vision_config.image_size)
        told_now = evaluate(model, tokenizer, data, collate, accelerator, generation, args.val_batch, args.workers)
        captions = {p.name: one["caption"] for p, one in zip(found, told_now)}
        accelerator.print(json.dumps(captions, indent=1, ensure_ascii=False) if args.json else
                          "\n".join(f"{name}: {text}" for name, text in captions.items()))
    return 2 * bool(broken)


def main(argv=None):
    args = get_args(argv)
    for note in environment.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        return captions.check_data(args.data, lambda: published.load_tokenizer(published.in_models(args.blip, "blip")),
                                   workers=args.workers, **reading(args))
    if args.captions:
        return caption_folder(args)
    if args.caption or args.zero_shot or args.checkpoint:
        return caption(args) if args.caption else score(args)
    with errors.batch_size_in_memory_errors(args.batch_size):
        if args.dry_run:
            return dry_run(args)
        run, signal_number = fit(args)
    return runfolder.ended(run, signal_number, "score", "train_blip_caption.py", argv)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
