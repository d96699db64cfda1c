"""train_gated.py: gates that let art style steer BLIP-2's Q-Former, trained on questions about paintings.

    python train_gated.py --data data/artquest                                    # BLIP-2 OPT-2.7B, one GPU of 24-80 GB
    python train_gated.py --data data/artquest --blip2 tiny --lr 2e-3 --epochs 8  # laptop CPU, two minutes
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

LOG_EVERY = 20  # optimizer steps between two rows of training_log.csv
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "lm", "hit", "hard_hit", "kl", "grad_norm", "em")
CLIP = 1.0  # gradient norm
PANELS = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),
          ("style", [("epoch", "hit", "mass on style words"), ("epoch", "hard_hit", "style word first"), ("epoch", "kl", "symmetric KL")]),
          ("learning", [("step", "grad_norm", "gradient norm"), ("epoch", "em", "exact match")])]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DIR", help="folder with train.csv and val.csv")
    data.add_argument("--images", metavar="DIR", help="image root (default: DATA/images, else DATA)")
    data.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN",
                      help="names of your columns, e.g. answer=label; names: image question answer question_type style")
    data.add_argument("--encoding", default="utf-8", help="of the CSV files (default: utf-8)")
    data.add_argument("--skip-bad", action="store_true", help="leave bad rows and missing images out, counted and listed")
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
    model.add_argument("--per", choices=("head", "channel"), default="head", help="one gate value a head or a channel (default: head)")
    model.add_argument("--gate-scale", type=float, default=1.0, help="start value of the learned gate scale (default: 1)")
    model.add_argument("--train-qformer", action="store_true", help="train the Q-Former and its queries too")
    model.add_argument("--lora-rank", type=int, default=0, help="LoRA on the cross-attention's W_K and W_V (default: 0 = off)")
    loss = parser.add_argument_group("loss (0 switches a term off)")
    loss.add_argument("--hit-weight", type=float, default=0.1, help="style words where the answer is a style (default: 0.1)")
    loss.add_argument("--kl-weight", type=float, default=0.05, help="image style against answer style (default: 0.05)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=int, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=int, default=16, help="questions a step and process (default: 16)")
    run.add_argument("--accumulation", type=int, default=2, help="batches an optimizer step (default: 2)")
    run.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: 1e-4)")
    run.add_argument("--warmup", type=float, default=0.05, help="share of all steps spent warming up (default: 0.05)")
    run.add_argument("--weight-decay", type=float, default=0.01, help="not on biases and norms (default: 0.01)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--max-answer", type=int, default=16, help="answer tokens kept, with the end of line (default: 16)")
    run.add_argument("--select", choices=("loss", "em"), default="loss",
                     help="best.pt by lowest validation loss or highest exact match (default: loss)")
    run.add_argument("--patience", type=int, default=3, help="epochs without a better value before stopping; 0 = never (default: 3)")
    run.add_argument("--seed", type=int, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/gated", metavar="DIR", help="run folder (default: runs/gated)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    return runfolder.parse_args(parser, argv)


# --- data: your own data set goes here ------------------------------------------------------------------------------------------

def read_data(args, split):
    """Rows of a split, bad ones refused or left out."""
    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    read = rows.read_split(args.data, split, {**rows.COLUMNS, **columns}, args.images, args.encoding)
    good, bad = rows.usable_rows(read, args.skip_bad)
    for row, reason in bad:
        print(f"left out: {row.file}, line {row.line}: {reason}")
    return good


class Questions(Dataset):
    """Row number -> (image tensor [3,s,s] in BLIP's normalisation, Row)."""

    def __init__(self, questions, image_size):
        self.rows, self.image_size = questions, image_size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return rows.image_tensor(rows.load_image(self.rows[index].image), self.image_size), self.rows[index]


class Collate:
    """Samples -> batch for Blip2OPTGated.forward. A class and not a closure, so that it also works where workers are spawned."""

    def __init__(self, tokenizer, styles, max_answer):
        self.tokenizer, self.styles, self.max_answer = tokenizer, [s.lower() for s in styles], max_answer

    def __call__(self, samples):
        images, group = zip(*samples)
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
                      worker_init_fn=runfolder.ignore_signals if workers else None)


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


# --- evaluation -------------------------------------------------------------------------------------------------------------------

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
    bar = tqdm(load_batches(data, collate, batches, workers), desc="evaluating", leave=False, mininterval=1,
               disable=not accelerator.is_main_process)
    for numbers, batch in zip(batches, bar):
        batch = core.to_device(batch, accelerator.device)
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
    return model.predict_answers(questions, **features, beams=1)


def loss_summary(found):
    """The numbers that are logged of an evaluation; hits are over the rows whose answer is a style."""
    numbers = {"loss": mean(found, "total"), "lm": mean(found, "lm"), "hit": mean(found, "hit", "hit_rows"),
               "hard_hit": mean(found, "hard_hit", "hit_rows"), "kl": mean(found, "kl")}
    return {name: value for name, value in numbers.items() if value is not None}


# --- model ------------------------------------------------------------------------------------------------------------------------

def precision_of(args):
    """--precision -> accelerate's word for it."""
    if args.precision != "auto":
        return args.precision
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def model_args(args, train_rows):
    """Everything that is needed to build the model again without a command line; stored in best.pt."""
    blip2, efficientnet = args.blip2, args.efficientnet
    if blip2 == "tiny":
        import make_tiny  # draws and trains it on first use
        blip2, own = make_tiny.ensure()
        efficientnet = efficientnet or own
    elif blip2 == "Salesforce/blip2-opt-2.7b" and pathlib.Path("models/blip2-opt-2.7b").is_dir():
        blip2 = "models/blip2-opt-2.7b"
    styles = sorted({r.style.strip() for r in train_rows if r.style.strip()})
    return {"blip2": blip2, "qformer": args.qformer, "efficientnet": efficientnet or "runs/efficientnet-28/best.pt",
            "gating": args.gating, "per": args.per, "gate_scale": args.gate_scale, "train_qformer": args.train_qformer,
            "lora_rank": args.lora_rank, "styles": styles}


def loss_weights(args, model):
    """Weights of the style terms that this model and data can have; what is off is said."""
    weights = {"hit_weight": args.hit_weight, "kl_weight": args.kl_weight}
    if not model.styles:
        print("no style column in the training rows: both style terms are off")
        return {"hit_weight": 0.0, "kl_weight": 0.0}
    if model.style_head is None and args.kl_weight:
        print("no EfficientNet with --gating none: the KL term is off")
        weights["kl_weight"] = 0.0
    return weights


def make_optimizer(model, lr, weight_decay):
    """AdamW; no decay on biases, norms and scalars (everything with fewer than two dimensions)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
                              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}], lr=lr)


# --- checkpoints ------------------------------------------------------------------------------------------------------------------

def best_content(model, args, built_from, weights, marks, train_rows):
    """What best.pt holds: trained tensors and plain values only."""
    import transformers
    return {"stage": "gated", "state": core.trainable_state(model), "model_args": built_from, "args": vars(args), **marks,
            "loss_weights": weights, "majority": majority_answers(train_rows),
            "answers": sorted({r.answer.strip() for r in train_rows}), "frozen": core.fingerprint(model), "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__}


def majority_answers(train_rows):
    """The commonest training answer of every question type, and of all under "" (ties: the first in the file)."""
    answers = {"": Counter(r.answer.strip() for r in train_rows)}
    for row in train_rows:
        answers.setdefault(row.question_type, Counter())[row.answer.strip()] += row.question_type != ""
    return {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}


def load_last(args):
    """last.pt of --out for --resume, or None where there is none; settings that would change the result are refused."""
    path = pathlib.Path(args.out) / "last.pt"
    if not args.resume or not path.exists():
        return None
    last = runfolder.load_checkpoint(path, ("state", "optimizer", "step", "args"))
    free = ("out", "resume", "save_last", "config", "workers", "images", "data", "check_data", "safe_load")
    other = [f"--{k.replace('_', '-')} {v!r} was {last['args'].get(k)!r}" for k, v in vars(args).items()
             if k not in free and v != last["args"].get(k)]
    if other:
        raise DataError(f"--resume with other settings than {path}: {'; '.join(other)}")
    return last


def bad_loss(value, step, group):
    """The message for a loss that is not finite."""
    names = ", ".join(f"{r.name} (line {r.line})" for r in group)
    return (f"loss is {value} at step {step}; best.pt and last.pt are as they were; rows of this batch: {names}: look at them, "
            "lower --lr, or use --precision bf16 or no")


def stopped(accelerator, stop):
    """Has any process been told to stop? All of them must agree, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return bool(stop.number)
    return bool(accelerator.reduce(torch.tensor(stop.number, device=accelerator.device)).item())


# --- main -------------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = get_args(argv)
    if args.check_data:
        return check_data(args)
    accelerator = Accelerator(mixed_precision=precision_of(args), cpu=not torch.cuda.is_available())
    main_process, say = accelerator.is_main_process, accelerator.print
    train_rows, val_rows = read_data(args, "train"), read_data(args, "val")
    last = load_last(args)
    out = pathlib.Path(args.out)
    if main_process:
        runfolder.start_run(out, args, bool(last))

    # model: frozen towers in the compute precision, everything trained in float32
    with accelerator.main_process_first():  # one process makes the tiny model, the others find it
        built_from = model_args(args, train_rows)
    runfolder.seed_everything(args.seed)
    model = core.Blip2OPTGated.build(**built_from, safe=args.safe_load, dtype=core.DTYPES[accelerator.mixed_precision])
    weights = loss_weights(args, model)
    if last:
        core.load_trainable(model, last["state"], out / "last.pt")
    if main_process:
        core.print_parts(model)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]

    # data and schedule
    collate = Collate(model.tokenizer, model.styles, args.max_answer)
    train, val = Questions(train_rows, model.image_size), Questions(val_rows, model.image_size)
    plan = runfolder.epoch_plan(len(train), args.batch_size, args.accumulation, args.seed, 0,
                                accelerator.process_index, accelerator.num_processes)
    steps_an_epoch, step = len(plan), 0
    total_steps = args.epochs * steps_an_epoch
    warmup = round(args.warmup * total_steps)
    marks = {"metric": args.select, "value": None, "epoch": None, "stale": 0}
    if last:
        optimizer.load_state_dict(last["optimizer"])
        step, marks = last["step"], last["marks"]
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(last["scaler"])
        say(f"resuming at step {step} of {total_steps}")
    log = runfolder.RunLog(out, LOG_COLUMNS, step if last else None) if main_process else None
    say(f"{len(train)} training and {len(val)} validation questions, {len(model.styles)} styles, {total_steps} steps of "
        f"{len(plan[0][0])} questions, lr {args.lr:g}, precision {accelerator.mixed_precision}, {accelerator.device}")

    def save_last():
        if main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            runfolder.save_checkpoint(out / "last.pt", {"stage": "gated", "state": core.trainable_state(model), "step": step,
                                                        "optimizer": optimizer.state_dict(), "scaler": scaler, "marks": marks,
                                                        "args": vars(args)})

    with runfolder.StopSignal() as stop:
        for epoch in range(step // steps_an_epoch, args.epochs):
            if args.patience and marks["stale"] >= args.patience:
                break
            plan = runfolder.epoch_plan(len(train), args.batch_size, args.accumulation, args.seed, epoch,
                                        accelerator.process_index, accelerator.num_processes)[step % steps_an_epoch:]
            batches = iter(load_batches(train, collate, [micro for _, share in plan for micro in share], args.workers))
            bar = tqdm(plan, desc=f"epoch {epoch + 1}/{args.epochs}", mininterval=1, disable=not main_process)
            wrapped.train()
            for group, share in bar:
                lr = runfolder.cosine_lr(step, total_steps, warmup, args.lr)
                for settings in optimizer.param_groups:
                    settings["lr"] = lr
                sums = dict.fromkeys(("loss", "lm"), 0.0)  # of this process
                for i, numbers in enumerate(share):
                    # dropout is a pure function of (seed, step, micro-batch, process): exact resume depends on it
                    runfolder.seed_everything(args.seed, step, i, accelerator.process_index)
                    batch = core.to_device(next(batches), accelerator.device)
                    last_share = i == len(share) - 1
                    with nullcontext() if last_share else accelerator.no_sync(wrapped):
                        with accelerator.autocast():
                            parts = wrapped(**batch, **weights)
                        # the mean over the whole group, however it is split into micro-batches and processes
                        share_of_group = len(numbers) * accelerator.num_processes / len(group)
                        if not torch.isfinite(parts["loss"]):
                            raise DataError(bad_loss(parts["loss"].item(), step, [train.rows[n] for n in numbers]))
                        accelerator.backward(parts["loss"] * share_of_group)
                    for name in sums:
                        sums[name] += parts[name].mean().item() * share_of_group
                norm = float(accelerator.clip_grad_norm_(trained, CLIP))
                if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
                    raise DataError(f"gradient is {norm} at step {step}: lower --lr; best.pt and last.pt are as they were")
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.set_postfix(loss=f"{sums['loss']:.3f}", lr=f"{lr:.1e}")
                if main_process and (step % LOG_EVERY == 0 or step == 1):
                    log.write("step", step, epoch=epoch + 1, lr=lr, grad_norm=norm, **sums)
                if stopped(accelerator, stop):
                    break
            if stopped(accelerator, stop) and step % steps_an_epoch:
                break

            # validation, best.pt, log
            answer = greedy_answers if args.select == "em" else None
            found = evaluate(model, val, collate, accelerator, args.batch_size, args.workers, weights, answer=answer)
            numbers = loss_summary(found)
            if answer:
                numbers["em"] = sum(metrics.exact_match(one["prediction"], val.rows[one["row"]].answer.strip())
                                    for one in found) / len(found)
            value = numbers[args.select]
            better = marks["value"] is None or (value > marks["value"] if args.select == "em" else value < marks["value"])
            marks = {**marks, "stale": 0 if better else marks["stale"] + 1}
            if better:
                marks |= {"value": value, "epoch": epoch + 1}
            if main_process:
                if better:
                    runfolder.save_checkpoint(out / "best.pt", best_content(model, args, built_from, weights, marks, train_rows))
                log.write("epoch", step, epoch=epoch + 1, lr=lr, **numbers)
                runfolder.draw_curves(log.path, out / "curves.png", PANELS, f"{out.name}: {args.gating} gates per {args.per}")
            say(f"epoch {epoch + 1}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items())
                + (f"  -> {out / 'best.pt'}" if better else ""))
            if args.save_last:
                save_last()
            if stopped(accelerator, stop):
                break
        if stop.number:
            save_last()
            say(f"stopped at step {step}; go on with --resume")
    if main_process:
        log.close()
    accelerator.end_training()
    if not stop.number:
        say(f"best {args.select} {marks['value']:.4f} in epoch {marks['epoch']}: {out / 'best.pt'}")
    return 128 + stop.number if stop.number else 0


if __name__ == "__main__":
    sys.exit(runfolder.exit_code(main))
