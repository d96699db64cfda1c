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
import pathlib
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import core
import metrics
import rows
import runfolder
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
    data.add_argument("--data", required=True, metavar="DIR", help="folder with train.csv and val.csv")
    data.add_argument("--images", metavar="DIR", help="image root (default: DATA/images, else DATA)")
    data.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN",
                      help="names of your columns, e.g. answer=label; names: image question answer question_type style")
    data.add_argument("--encoding", default="utf-8", help="of the CSV files (default: utf-8)")
    data.add_argument("--separator", help="of the CSV files, tab spelled out (default: told from the header)")
    data.add_argument("--skip-bad", action="store_true", help="leave bad rows and broken or missing images out, and list them")
    data.add_argument("--check-data", action="store_true", help="read everything, print what is there, and stop; loads no weight")
    data.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    model = parser.add_argument_group("model")
    model.add_argument("--blip2", default="Salesforce/blip2-opt-2.7b", metavar="ID|DIR|tiny",
                       help="HuggingFace id, local folder, or tiny (made on first use); default Salesforce/blip2-opt-2.7b, "
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
    model.add_argument("--gate-scale", type=float, default=1.0, help="start value of the learned gate scale (default: 1)")
    model.add_argument("--train-qformer", action="store_true", help="train the Q-Former and its queries too")
    model.add_argument("--lora-rank", type=int, default=0, help="LoRA on the cross-attention's W_K and W_V (default: 0 = off)")
    loss = parser.add_argument_group("loss (0 switches a term off)")
    loss.add_argument("--hit-weight", type=float, default=0.1, help="style words where the answer is a style (default: 0.1)")
    loss.add_argument("--kl-weight", type=float, default=0.05, help="image style against answer style (default: 0.05)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=runfolder.positive, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=runfolder.positive, default=16, help="questions a step and process (default: 16)")
    run.add_argument("--accumulation", type=runfolder.positive, default=2, help="batches an optimizer step (default: 2)")
    run.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: 1e-4)")
    run.add_argument("--warmup", type=float, default=0.05, help="share of all steps spent warming up (default: 0.05)")
    run.add_argument("--weight-decay", type=float, default=0.01, help="not on biases and norms (default: 0.01)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--max-answer", type=runfolder.positive, default=16,
                     help="answer tokens kept, with the end of line (default: 16)")
    run.add_argument("--select", choices=("loss", "em"), default="loss",
                     help="best.pt by lowest validation loss or highest exact match (default: loss)")
    run.add_argument("--patience", type=int, default=3,
                     help="epochs without a better value before stopping; 0 = never (default: 3)")
    run.add_argument("--seed", type=int, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/gated", metavar="DIR", help="run folder (default: runs/gated)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    return runfolder.parse_args(parser, argv)


# --- data: your own data set goes here ------------

def read_data(args, split):
    """Rows of a split, bad ones refused; with --skip-bad left out and listed, after every picture has been decoded once."""
    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    read, understood = rows.read_layout(args.data, split, columns, args.images, args.encoding, args.separator)
    print(f"{split}: {understood}")
    good, bad = rows.usable_rows(read, args.skip_bad)
    broken = dict(rows.verify_images(good, max(1, args.workers))) if args.skip_bad else {}
    bad += [(row, broken[row.image]) for row in good if row.image in broken]
    for row, reason in bad:
        print(f"left out: {row.file}, {rows.locate(row.file, row.line)}: {reason}")
    good = [row for row in good if row.image not in broken]
    if not good:
        raise DataError(f"{args.data}: no row of {split} can be used")
    return good


class Questions(Dataset):
    """Row number -> (image tensor [3,s,s] in BLIP's normalisation, or the DataError of a broken picture; Row).

    The error is handed on and not raised: one that comes out of a loader process would keep the others from ending.
    """

    def __init__(self, questions, image_size):
        self.rows, self.image_size = questions, image_size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        try:
            return rows.image_tensor(rows.load_image(self.rows[index].image), self.image_size), self.rows[index]
        except DataError as error:
            return error, self.rows[index]


class Collate:
    """Samples -> batch for Blip2OPTGated.forward. A class and not a closure, so that it also works where workers are spawned."""

    def __init__(self, tokenizer, styles, max_answer):
        self.tokenizer, self.styles, self.max_answer = tokenizer, [s.lower() for s in styles], max_answer

    def __call__(self, samples):
        images, group = zip(*samples)
        for image, row in samples:
            if isinstance(image, DataError):
                return {"fault": f"{row.file}, {rows.locate(row.file, row.line)}: {image}"}
        batch = core.encode_training(self.tokenizer, [r.question for r in group], [r.answer for r in group], self.max_answer)
        batch["images"] = torch.stack(images)  # [B,3,s,s]
        batch["style"] = torch.tensor([self._index(r.style) for r in group])  # [B], -1 = unknown
        batch["hit_rows"] = torch.tensor([self._index(r.answer) >= 0 for r in group])  # [B]
        return batch

    def _index(self, name):
        name = name.strip().lower()
        return self.styles.index(name) if name in self.styles else -1


def load_batches(data, collate, batches, workers):
    """A DataLoader over given lists of row numbers."""
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=runfolder.outlive_signals if workers else None)


def next_batch(batches, device):
    """The next batch on its device; a DataError where one of its pictures is broken."""
    batch = next(batches)
    if "fault" in batch:
        raise DataError(batch["fault"])
    return core.to_device(batch, device)


def check_data(args):
    """--check-data: print what is there; exit code 1 when training would fail."""
    splits, failed = {}, False
    for split in ("train", "val"):
        try:
            splits[split] = read_data(args, split)
        except DataError as error:
            print(f"{split}: error: {error}")
            failed = True
            continue
        print(f"--- {split}", *rows.summary(splits[split]), sep="\n")
        for path, reason in rows.verify_images(splits[split], max(1, args.workers)):
            print(f"broken image: {path}: {reason}")
            failed = True
    for image, names in rows.shared_images(splits).items():
        print(f"in {' and '.join(names)}: {image}")
    print("training would fail" if failed else "training can start")
    return int(failed)


# --- evaluation ------------

@torch.no_grad()
def evaluate(model, data, collate, accelerator, batch_size, workers, loss_weights, gated=True, answer=None):
    """Score every row exactly once, on however many processes.

    answer: None, or a function (model, questions, features) -> list of answers. Returns on every process a list of dicts
    in row order: loss, lm, hit, hard_hit, hit_rows, kl (those that are switched on), and prediction.
    """
    model.eval()
    mine = list(range(len(data)))[accelerator.process_index::accelerator.num_processes]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    found = []
    loaded = iter(load_batches(data, collate, batches, workers))
    for numbers in tqdm(batches, desc="evaluating", leave=False, mininterval=1,
                        disable=None if accelerator.is_main_process else True):
        batch = next_batch(loaded, accelerator.device)
        features = model.image_features(batch.pop("images"))
        with accelerator.autocast():
            parts = model(**batch, **features, **loss_weights, gated=gated)
        parts.pop("loss")
        table = {name: values.float().cpu().tolist() for name, values in parts.items()}
        if answer:
            table["prediction"] = answer(model, [data.rows[i].question for i in numbers], features)
        found += [{"row": i, **{name: values[k] for name, values in table.items()}} for k, i in enumerate(numbers)]
    return sorted(gather_object(found), key=lambda one: one["row"])


def mean(found, name, where=None):
    """Mean of a column of evaluate's result over all rows, or over those where column `where` is not 0; None without any."""
    values = [one[name] for one in found if name in one and (where is None or one[where])]
    return sum(values) / len(values) if values else None


def greedy_answers(model, questions, features):
    """The answers of --select em: no beams, since they are asked for in every epoch."""
    return model.predict_answers(None, questions, **features, beams=1)


def loss_summary(found):
    """The numbers that are logged of an evaluation; hits are over the rows whose answer is a style."""
    numbers = {"loss": mean(found, "total"), "lm": mean(found, "lm"), "hit": mean(found, "hit", "hit_rows"),
               "hard_hit": mean(found, "hard_hit", "hit_rows"), "kl": mean(found, "kl")}
    return {name: value for name, value in numbers.items() if value is not None}


# --- model ------------

def precision_of(args):
    """--precision -> accelerate's word for it."""
    if args.precision != "auto":
        return args.precision
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def model_args(args, train_rows):
    """Everything that is needed to build the model again without a command line; stored in best.pt."""
    styles = sorted({r.style.strip() for r in train_rows if r.style.strip()})
    return {"blip2": args.blip2, "qformer": args.qformer, "efficientnet": args.efficientnet, "gating": args.gating, "per": args.per,
            "gate_scale": args.gate_scale, "train_qformer": args.train_qformer, "lora_rank": args.lora_rank, "styles": styles}


def resolved(built_from):
    """model_args with names made into places: tiny is drawn and trained on first use, the default looks in models/ first."""
    blip2, efficientnet = built_from["blip2"], built_from["efficientnet"] or "runs/efficientnet-28/best.pt"
    if blip2 == "tiny":
        import make_tiny
        blip2, own = make_tiny.ensure()
        efficientnet = built_from["efficientnet"] or own
    elif blip2 == "Salesforce/blip2-opt-2.7b" and pathlib.Path("models/blip2-opt-2.7b").is_dir():
        blip2 = "models/blip2-opt-2.7b"
    return {**built_from, "blip2": blip2, "efficientnet": efficientnet}


def loss_weights(args, model, say):
    """Weights of the style terms that this model and data can have; what is off is said."""
    weights = {"hit_weight": args.hit_weight, "kl_weight": args.kl_weight}
    if not model.styles:
        say("no style in the training rows: both style terms are off")
        return {"hit_weight": 0.0, "kl_weight": 0.0}
    if model.style_head is None and args.kl_weight:
        say("no EfficientNet with --gating none: the KL term is off")
        weights["kl_weight"] = 0.0
    return weights


def make_optimizer(model, lr, weight_decay):
    """AdamW; no decay on biases, norms and scalars (everything with fewer than two dimensions)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
                              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}], lr=lr)


# --- checkpoints ------------

def best_content(model, args, built_from, weights, marks, train_rows):
    """What best.pt holds: trained tensors and plain values only."""
    import transformers
    return {"stage": "gated", "state": runfolder.trainable_state(model), "model_args": built_from, "args": vars(args), **marks,
            "loss_weights": weights, "majority": majority_answers(train_rows),
            "answers": sorted({r.answer.strip() for r in train_rows}), "frozen": runfolder.fingerprint(model),
            "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def majority_answers(train_rows):
    """The commonest training answer of every question type, and of all under "" (ties: the first in the file)."""
    answers = {"": Counter(r.answer.strip() for r in train_rows)}
    for row in train_rows:
        answers.setdefault(row.question_type, Counter())[row.answer.strip()] += row.question_type != ""
    return {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}


def save_last(out, model, optimizer, accelerator, args, step, marks):
    """Everything that --resume needs; order and randomness are functions of (seed, step), so a step count is enough."""
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    runfolder.save_checkpoint(out / "last.pt", {"stage": "gated", "state": runfolder.trainable_state(model), "step": step,
                                                "optimizer": optimizer.state_dict(), "scaler": scaler, "marks": marks,
                                                "frozen": runfolder.fingerprint(model), "args": vars(args)})


def load_last(args):
    """last.pt of --out for --resume, or None where there is none; settings that would change the result are refused."""
    path = pathlib.Path(args.out) / "last.pt"
    if not args.resume or not path.exists():
        return None
    last = runfolder.load_checkpoint(path, ("state", "optimizer", "step", "marks", "frozen", "args"))
    free = ("out", "resume", "save_last", "config", "workers", "images", "data", "check_data", "safe_load")
    other = [f"--{k.replace('_', '-')} is {v!r}, was {last['args'].get(k)!r}" for k, v in vars(args).items()
             if k not in free and v != last["args"].get(k)]
    if other:
        raise DataError(f"--resume with other settings than {path}: {'; '.join(other)}")
    return last


def restore(last, path, model, optimizer, accelerator):
    """Put last.pt back -> (step, marks)."""
    if last["frozen"] != runfolder.fingerprint(model):
        raise DataError(f"{path} was trained on another BLIP-2 or style classifier than the one given now")
    runfolder.load_trainable(model, last["state"], path)
    optimizer.load_state_dict(last["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(last["scaler"])
    return last["step"], last["marks"]


def bad_loss(what, step, group):
    """The message for a loss or gradient that is not finite."""
    names = ", ".join(f"{r.name} ({rows.locate(r.file, r.line)})" for r in group)
    return (f"{what} at step {step}; best.pt and last.pt are as they were; look at these rows, lower --lr, or use --precision "
            f"bf16 or no: {names}")


def is_better(value, marks):
    """Is this validation value better than the best so far? Never true of NaN."""
    if marks["value"] is None:
        return math.isfinite(value)
    return value > marks["value"] if marks["metric"] == "em" else value < marks["value"]


def stopped(accelerator, stop):
    """Has any process been told to stop? All of them must agree, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return bool(stop.number)
    return bool(accelerator.reduce(torch.tensor(stop.number, device=accelerator.device)).item())


# --- the loop ------------

def train_step(wrapped, batches, group, share, args, weights, accelerator, step):
    """Forward and backward of one optimizer step: this process's share of the group, in micro-batches.

    Returns this process's part of the mean losses. The gradient is that of the mean over the whole group, however it is
    split into micro-batches and processes.
    """
    sums = dict.fromkeys(("loss", "lm"), 0.0)
    for i, numbers in enumerate(share):
        # dropout is a pure function of (seed, step, micro-batch, process): exact resume depends on it
        runfolder.seed_everything(args.seed, step, i, accelerator.process_index)
        batch = next_batch(batches, accelerator.device)
        with nullcontext() if i == len(share) - 1 else accelerator.no_sync(wrapped), accelerator.autocast():
            parts = wrapped(**batch, **weights)
        if not torch.isfinite(parts["loss"]):
            raise FloatingPointError(f"loss is {parts['loss'].item()}", numbers)
        portion = len(numbers) * accelerator.num_processes / len(group)
        accelerator.backward(parts["loss"] * portion)
        for name in sums:
            sums[name] += parts[name].mean().item() * portion
    return sums


def train_epoch(wrapped, optimizer, data, collate, plan, args, weights, accelerator, schedule, step, log, stop):
    """The optimizer steps of `plan`; returns the number of the next step. Stops early when a signal has come."""
    batches = iter(load_batches(data, collate, [numbers for _, share in plan for numbers in share], args.workers))
    bar = tqdm(plan, desc=f"steps from {step}", mininterval=1, disable=None if log else True)  # None: only on a terminal
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    wrapped.train()
    for group, share in bar:
        lr = schedule(step)
        for settings in optimizer.param_groups:
            settings["lr"] = lr
        try:
            sums = train_step(wrapped, batches, group, share, args, weights, accelerator, step)
        except FloatingPointError as error:
            raise DataError(bad_loss(error.args[0], step, [data.rows[n] for n in error.args[1]])) from None
        norm = float(accelerator.clip_grad_norm_(trained, CLIP))
        if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            raise DataError(bad_loss(f"gradient is {norm}", step, [data.rows[n] for n in group]))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.set_postfix(loss=f"{sums['loss']:.3f}", lr=f"{lr:.1e}")
        if step % LOG_EVERY == 0:
            together = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
            sums = dict(zip(sums, together.tolist()))
            if log:
                log.write("step", step, lr=lr, grad_norm=norm, **sums)
        if stopped(accelerator, stop):
            break
    return step


def validate(model, data, collate, args, weights, accelerator):
    """The numbers of an epoch; exact match (greedy) only where best.pt is chosen by it."""
    answer = greedy_answers if args.select == "em" else None
    found = evaluate(model, data, collate, accelerator, args.batch_size, args.workers, weights, answer=answer)
    numbers = loss_summary(found)
    if answer:
        hits = [metrics.exact_match(one["prediction"], data.rows[one["row"]].answer.strip()) for one in found]
        numbers["em"] = sum(hits) / len(hits)
    return numbers


def main(argv=None):
    args = get_args(argv)
    if args.check_data:
        return check_data(args)
    accelerator = Accelerator(mixed_precision=precision_of(args), cpu=not torch.cuda.is_available())
    leader, say = accelerator.is_main_process, accelerator.print
    train_rows, val_rows = read_data(args, "train"), read_data(args, "val")
    out, last = pathlib.Path(args.out), load_last(args)
    runfolder.refuse_overwrite(out, bool(last))

    # model: frozen towers in the compute precision, everything that is trained in float32
    built_from = model_args(args, train_rows)
    with accelerator.main_process_first():  # one process makes the tiny model, the others find it
        places = resolved(built_from)
    runfolder.seed_everything(args.seed)
    model = core.Blip2OPTGated.build(**places, safe=args.safe_load, dtype=core.DTYPES[accelerator.mixed_precision])
    weights = loss_weights(args, model, say)
    if leader:
        runfolder.print_parts(model)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, args.lr, args.weight_decay))

    # data and schedule
    collate = Collate(model.tokenizer, model.styles, args.max_answer)
    train, val = Questions(train_rows, model.image_size), Questions(val_rows, model.image_size)
    plan_of = partial(runfolder.epoch_plan, len(train), args.batch_size, args.accumulation, args.seed,
                      rank=accelerator.process_index, processes=accelerator.num_processes)
    per_epoch, step = len(plan_of(0)), 0
    total = args.epochs * per_epoch
    schedule = partial(runfolder.cosine_lr, total=total, warmup=round(args.warmup * total), peak=args.lr)
    marks = {"metric": args.select, "value": None, "epoch": None, "stale": 0, "done": 0}  # done: epochs validated
    if last:
        step, marks = restore(last, out / "last.pt", model, optimizer, accelerator)
        say(f"resuming after step {step} of {total}")
    if leader:
        runfolder.start_run(out, args)
    log = runfolder.RunLog(out, LOG_COLUMNS, step if last else None) if leader else None
    say(f"{len(train)} training and {len(val)} validation questions, {len(model.styles)} styles; {total} steps of "
        f"{len(plan_of(0)[0][0])} questions, lr {args.lr:g}, precision {accelerator.mixed_precision}, {accelerator.device}")

    with runfolder.StopSignal() as stop:
        for epoch in range(marks["done"], args.epochs):
            if args.patience and marks["stale"] >= args.patience:
                say(f"no better {args.select} for {args.patience} epochs: stopping")
                break
            plan = plan_of(epoch)[step - epoch * per_epoch:]
            step = train_epoch(wrapped, optimizer, train, collate, plan, args, weights, accelerator, schedule, step, log, stop)
            if stopped(accelerator, stop):
                break
            numbers = validate(model, val, collate, args, weights, accelerator)
            value, better = numbers[args.select], is_better(numbers[args.select], marks)
            marks |= {"done": epoch + 1, "stale": marks["stale"] + 1}
            if better:
                marks |= {"value": value, "epoch": epoch + 1, "stale": 0}
            say(f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()) + (" *" if better else ""))
            if leader:
                if better:
                    runfolder.save_checkpoint(out / "best.pt", best_content(model, args, built_from, weights, marks, train_rows))
                log.write("epoch", step, epoch=epoch + 1, lr=schedule(step - 1), **numbers)
                runfolder.draw_curves(log.path, out / "curves.png", PANELS, f"{out.name}: gating {args.gating}, per {args.per}")
                if args.save_last:
                    save_last(out, model, optimizer, accelerator, args, step, marks)
        if stop.number and leader:
            save_last(out, model, optimizer, accelerator, args, step, marks)
            print(f"stopped after step {step}; {out / 'last.pt'} is there for --resume")
    if leader:
        log.close()
    accelerator.end_training()
    if stop.number:
        return 128 + stop.number
    if marks["value"] is None:
        raise DataError(f"the validation {args.select} was never finite: there is no best.pt; lower --lr")
    say(f"best {args.select} {marks['value']:.4f} in epoch {marks['epoch']}: {out / 'best.pt'}")


if __name__ == "__main__":
    sys.exit(runfolder.exit_code(main))
