"""train_gated.py: gates that let art style steer BLIP-2's Q-Former, trained on questions about paintings.

    python train_gated.py --data data/artquest                                    # BLIP-2 OPT-2.7B, one GPU of 24-80 GB
    python train_gated.py --data data/artquest --blip2 tiny --lr 1e-3 --epochs 5  # laptop CPU
    python eval_gated.py --checkpoint runs/gated/best.pt                          # then look at the numbers
    accelerate launch train_gated.py --data data/artquest                         # several GPUs

Frozen: vision tower, language model, EfficientNet (and the Q-Former without --train-qformer). Trained: gates, PromptMapper, projection.
Data flow: CSV row -> Questions -> collate -> Blip2OPTGated.forward -> loss -> log. Copy this file and edit it.
"""

import math
import os
import pathlib
import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import core
import metrics
from data import rows
from data.questions import Questions, read_questions
from engine import (checkpoints, compiling, environment, errors, files, flags, gate_frames, loaders, loop, memory, packing, published,
                    runfolder)
from engine.errors import DataError
from engine.evaluation import PANELS, evaluate, loss_summary, text_length
from engine.features import cached_features, predicted_styles
from engine.missing import missing_classifier, missing_tables, shortest_way
from engine.prompts import Collate, answer_length, log_cut_answers, log_cut_questions
from engine.run import Run, resumes
from engine.saved import sees_style
from engine.text import text_of

LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "lm", "hit", "hard_hit", "kl", "grad_norm", "em")
# what the model returns and training_log.csv has of validation alone: a step has too few questions on style; a new term is logged
UNLOGGED = ("loss", "total", "hit", "hard_hit", "hit_rows", "kl", "style_ce")

Model = core.Blip2OPTGated  # a subclass of your own goes here: eval_gated.py --script takes it from the edited file


def get_parser():
    parser = flags.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DIR|FILE", help="folder with train.csv and val.csv, or one table")
    data.add_argument("--val-share", type=flags.share, default=0.1,
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
    data.add_argument("--context", metavar="SOURCE",
                      help="text put before the question: a column of the table, with --semart of SemArt's (DESCRIPTION), or "
                           "efficientnet, the style that the classifier predicts (default: none)")
    data.add_argument("--skip-bad", type=flags.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                      help="leave bad rows and broken or missing images out and list them, up to this share of a split "
                           "(0.01 where no number is given)")
    data.add_argument("--check-data", action="store_true", help="read everything, print what is there, and stop; loads no weight")
    data.add_argument("--dry-run", action="store_true", help="show what the model reads and the memory it takes, rehearse the "
                                                             "longest batch, and stop; nothing is written")
    data.add_argument("--workers", type=flags.whole, default=2, help="loader processes (default: 2)")
    data.add_argument("--cache", metavar="DIR", help="keep the frozen towers' features there, computed once: 0.7 MB a picture in "
                                                     "bf16 (default: none, the towers run in every step)")
    model = parser.add_argument_group("model")
    model.add_argument("--blip2", default=published.DEFAULTS["blip2"], metavar="ID|DIR|tiny",
                       help="HuggingFace id, local folder, or tiny (ships with the project); default Salesforce/blip2-opt-2.7b, "
                            "taken from models/blip2-opt-2.7b where that folder exists")
    model.add_argument("--qformer", metavar="DIR|FILE",
                       help="Q-Former from elsewhere: an HF folder or best.pt, a LAVIS .pth")
    model.add_argument("--efficientnet", metavar="FILE", help="style classifier (default: runs/efficientnet-28/best.pt; "
                                                              "with --blip2 tiny its own)")
    model.add_argument("--safe-load", action="store_true", help="refuse a style checkpoint that only pickle can load")
    model.add_argument("--gating", choices=(*core.GATES, "none"), default="film",
                       help="film: scale K, scale and shift V; film-key, film-value: only one of them; gate: 2 sigmoid on K and V; "
                            "none: no gates (default: film)")
    model.add_argument("--per", choices=("head", "channel"), default="channel",
                       help="one gate value a channel or a head (default: channel)")
    model.add_argument("--gate-scale", type=flags.rate, default=1.0, help="start value of the learned gate scale (default: 1)")
    model.add_argument("--steer", choices=tuple(core.WAYS), nargs="+", default=[], metavar="WAY",
                       help="further ways for style to come in, with --gating none instead of the gates. soft-prompt: tokens of the "
                            "language model; patches: for the queries to look at; queries: beside the others; fusion: into every "
                            "patch (default: none)")
    model.add_argument("--control-tokens", type=flags.positive, default=4, metavar="N",
                       help="--steer adds so many; the gates take their mean (default: 4)")
    model.add_argument("--control-from", choices=("style+question", "style"), default="style+question", metavar="SOURCE",
                       help="style+question or style (default: style+question)")
    model.add_argument("--instruct", action="store_true", help="the Q-Former reads the question too; needs a --qformer")
    model.add_argument("--train-qformer", action="store_true", help="train the Q-Former and its queries too")
    model.add_argument("--lora-rank", type=flags.whole, default=0,
                       help="LoRA on the cross-attention's W_K and W_V (default: 0 = off)")
    loss = parser.add_argument_group("loss (0 switches a term off)")
    loss.add_argument("--hit-weight", type=float, default=0.1, help="style words where the answer is a style (default: 0.1)")
    loss.add_argument("--kl-weight", type=float, default=0.05, help="image style against answer style (default: 0.05)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=flags.positive, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=flags.positive, default=16, help="questions a step and process (default: 16)")
    run.add_argument("--eval-batch-size", type=flags.positive_or_auto, default=memory.ANSWERS, metavar="N|auto",
                     help="questions at a time in validation; auto: as many as the GPU's memory holds (default: 64)")
    run.add_argument("--accumulation", type=flags.positive, default=2, help="batches an optimizer step (default: 2)")
    run.add_argument("--lr", type=flags.rate, default=1e-4, help="peak learning rate (default: 1e-4)")
    run.add_argument("--warmup", type=flags.share, default=0.05, help="share of all steps spent warming up (default: 0.05)")
    run.add_argument("--weight-decay", type=flags.weight, default=0.01, help="not on biases and norms (default: 0.01)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--lm-precision", choices=tuple(published.LM_PRECISIONS),
                     help="of the frozen language model; int8 and nf4 need bitsandbytes (default: as --precision)")
    run.add_argument("--activations", choices=("keep", "bits", "recompute"), default="keep",
                     help="of the language model for the backward pass. bits: of each ReLU its signs; recompute: only each layer's "
                          "input. Less memory, more time, the same gradients (default: keep)")
    run.add_argument("--compile", action="store_true",
                     help="torch.compile of the language model: minutes to start (default: off)")
    run.add_argument("--max-answer", type=flags.positive, default=core.MAX_ANSWER, metavar="N",
                     help="an answer has as many tokens as the longest of training, end of line included, and never more than N "
                          f"(default: {core.MAX_ANSWER})")
    run.add_argument("--select", choices=("loss", "em"), default="loss",
                     help="best.pt by lowest validation loss or highest exact match (default: loss)")
    run.add_argument("--patience", type=flags.whole, default=3,
                     help="epochs without a better value before stopping; 0 = never (default: 3)")
    run.add_argument("--seed", type=flags.whole, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/gated", metavar="DIR", help="run folder (default: runs/gated)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--profile", action="store_true", help="time the phases of the steps: a table at the end, OUT/profile.csv")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    flags.put_first(parser, "--data", "--blip2", "--out", "--epochs", "--batch-size", "--lr")
    return parser


def get_args(argv=None):
    parser = get_parser()
    args = flags.parse_args(parser, argv)
    if os.path.isfile(args.data) and not args.val_share:
        parser.error(f"--val-share 0 would validate on the rows that are trained on, since {args.data} is one table: hold some out, or "
                     "give --data a folder with train.csv and val.csv")
    if args.instruct and not args.qformer:
        parser.error("--instruct needs a --qformer of stage 1, whose text path reads the question: OUT/hf of pretrain_qformer.py")
    return args


# --- what is missing ------------

def missing(args):
    """{thing: lines, see published.missing_model} of all that a training needs and that is not there. Loads nothing."""
    found = {"data": missing_tables(args.data, missing_splits(args)), "BLIP-2": published.missing_model(args.blip2, "blip2")}
    means_tiny = args.blip2 == "tiny" or (found["BLIP-2"] and "tiny" in published.alike(args.blip2, "blip2"))
    if args.blip2 == "tiny" and not args.efficientnet:
        found["BLIP-2"] = published.missing_tiny("blip2", "efficientnet-28.pt")
    elif (args.efficientnet or not means_tiny) and (sees_style(vars(args)) or "efficientnet" in (args.style, args.context)):
        found["style classifier"] = missing_classifier(args.efficientnet)
    if args.qformer and not os.path.exists(files.located(args.qformer)):
        found["Q-Former"] = [f"{args.qformer}: no such file or folder: check --qformer"]
    return {thing: lines for thing, lines in found.items() if lines}


# --- data: your own data set goes here ------------

def missing_splits(args):
    """Those of train and val that have no table."""
    return [split for split in ("train", "val") if not os.path.isfile(args.data)
            and not any(os.path.isfile(os.path.join(args.data, name)) for name in rows.table_names(split))]


def read_data(args, split, log=print):
    """The rows of a split as the flags about data have it."""
    return read_questions(args.data, split, args.columns, args.images, args.encoding, args.separator, args.style, args.semart,
                          args.context, args.val_share, args.skip_bad, args.workers, log)


def check_data(args):
    """--check-data: print what is there; exit code 1 when training would fail. No weight is loaded."""
    absent = missing(args)
    splits, failed = {}, False
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
    return rows.verdict(failed, absent and published.format_missing(absent, shortest_way(args.data, args.blip2, absent)))


def check_tokens(args, splits):
    """What the language model will read: answers that are cut, and three rows with the masked tokens in brackets."""
    places = published.resolve_paths({"blip2": args.blip2, "efficientnet": args.efficientnet})
    try:
        tokenizer = published.load_tokenizer(places["blip2"])
    except DataError as error:
        print(f"tokens not checked: {error}")
        return
    if "train" in splits:
        longest = answer_length(tokenizer, splits["train"], args.max_answer)
        log_cut_answers(tokenizer, splits, longest)
        log_cut_questions(tokenizer, {split: [row.question for row in read] for split, read in splits.items()})
        show_rows(tokenizer, splits["train"][:3], longest)


def show_rows(tokenizer, some, max_answer):
    """Rows as the language model reads them, with what the loss does not see in brackets."""
    print("--- prompt | target, as the model gets it; [tokens in brackets] are masked in the loss")
    for row in some:
        batch = core.encode_training(tokenizer, [row.question], [row.answer], max_answer, [row.context])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        masked, target = (text_of(tokenizer, ids[where], special=True) for where in (labels == -100, labels != -100))
        print(f"{row.name} ({rows.locate(row.file, row.line)}): [{masked}] |{target!r}, "
              f"{(labels != -100).sum()} tokens are trained")


# --- evaluation ------------

def greedy_answers(model, group, features):
    """The answers of --select em: no beams, since they are asked for in every epoch."""
    return {"prediction": model.predict_answers(None, [r.question for r in group], [r.context for r in group], **features, beams=1)}


# --- model ------------

def model_args(args, train_rows, max_answer):
    """Everything that is needed to build the model again without a command line; stored in best.pt."""
    styles = sorted({r.style.strip() for r in train_rows if r.style.strip()})
    return {"blip2": args.blip2, "qformer": args.qformer, "efficientnet": args.efficientnet, "gating": args.gating, "per": args.per,
            "gate_scale": args.gate_scale, "train_qformer": args.train_qformer, "lora_rank": args.lora_rank,
            "style_head": args.kl_weight != 0, "styles": styles, "lm_precision": args.lm_precision, "max_answer": max_answer,
            "steer": args.steer, "control_tokens": args.control_tokens, "control_from": args.control_from,
            "instruct": args.instruct}


def loss_weights(args, model, log):
    """Weights of the style terms that this model and data can have; what is off is said."""
    weights = {"hit_weight": args.hit_weight, "kl_weight": args.kl_weight}
    if not model.styles:
        log("no style in the training rows: both style terms are off (--style names other places to take it from)")
        return {"hit_weight": 0.0, "kl_weight": 0.0}
    if model.style_head is None and args.kl_weight:
        log("no EfficientNet with --gating none and no --steer: the KL term is off")
        weights["kl_weight"] = 0.0
    return weights


# --- checkpoints ------------

def best_of(args, model, parts, frozen, command, precision):
    """What best.pt holds: trained tensors and plain values only. precision: what --precision became."""
    read = parts.train.rows
    return {"state": checkpoints.trainable_state(model), "model_args": parts.built_from, "args": vars(args), "command": list(command),
            "loss_weights": parts.weights, "majority": majority_answers(read), "answers": sorted({r.answer.strip() for r in read}),
            "frozen": frozen, "precision": precision, "draws_answers": draws_answers(read)}


def draws_answers(train_rows):
    """Have people given different answers to a question, of which each epoch draws one?"""
    return any(row.answers_differ for row in train_rows)


def majority_answers(train_rows):
    """The commonest training answer of every question type, and of all under "" (ties: the first in the file)."""
    answers = {"": Counter(r.answer.strip() for r in train_rows)}
    for row in train_rows:
        answers.setdefault(row.question_type, Counter())[row.answer.strip()] += row.question_type != ""
    return {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}


def settings(args, parts, accelerator):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ("out", "resume", "save_last", "profile", "config", "workers", "images", "data", "check_data", "dry_run", "safe_load",
            "skip_bad", "semart", "cache", "activations", "eval_batch_size")
    return {**runfolder.settings_of(vars(args), free, precision=accelerator.mixed_precision),
            "--length-pool": 1,  # what it has come to: an earlier version's last.pt with another one had its rows in another order
            "pictures (sizes)": rows.sizes_hash(row.image for row in [*parts.train.rows, *parts.val.rows]),
            "a cache of features": args.cache is not None,
            # an earlier version trained on the commonest of several answers: such a run does not go on as another
            "training rows (hash)": rows.fingerprint(parts.train.rows) + ", answers drawn" * draws_answers(parts.train.rows),
            "validation rows (hash)": rows.fingerprint(parts.val.rows), "processes": accelerator.num_processes}


# --- the loop ------------

class Parts(NamedTuple):
    """What a run is made of beside the Run."""
    train: Questions
    val: Questions
    collate: Collate
    weights: dict  # of the style terms, see loss_weights
    built_from: dict  # see model_args


def train_step(run, step, weights):
    """Forward and backward of one optimizer step, micro-batch by micro-batch."""
    for batch in step:
        with step.forward():
            parts = run.wrapped(**batch, **weights)
        step.backward(parts["loss"], **{name: part for name, part in parts.items() if name not in UNLOGGED})


def train(args, command=()):
    """The whole training -> its Run. command: the words that were typed, for best.pt."""
    accelerator = start(args)
    resumed = resumes(accelerator, args.out, args.resume)
    run, parts = prepare(args, accelerator, command)
    with run.open(resumed, vars(args), __file__):
        if accelerator.is_main_process and not resumed:
            (run.out / gate_frames.FILE).unlink(missing_ok=True)  # of a run that ended before its first best.pt
        accelerator.print(f"{len(parts.train)} training and {len(parts.val)} validation questions, {len(run.model.styles)} styles; "
                          f"{run.total} steps of {len(run.plan(0)[0][0])} questions, lr {args.lr:g}, "
                          f"precision {accelerator.mixed_precision}, {accelerator.device}")
        rehearse(run, parts, args)
        for epoch in run.epochs(args.patience):
            run.wrapped.train()
            for step in run.steps(epoch):
                train_step(run, step, parts.weights)
                step.update()
            numbers, gates = validate(run, parts, parts.val, args)
            if run.end_epoch(numbers):
                run.save_best()
            if gates and math.isfinite(numbers[args.select]) and accelerator.is_main_process:
                gate_frames.append_frame(run.out / gate_frames.FILE, run.step, gates)
    return run


def validate(run, parts, data, args):
    """The numbers of an epoch, exact match (greedy) only where best.pt is chosen by it; and the gates by style, None without gates."""
    answer = greedy_answers if args.select == "em" else None
    batch_size = memory.answer_batch(args.eval_batch_size, run.model.language_model, 1, run.model.max_answer)
    with errors.batch_size_in_memory_errors(batch_size, "--eval-batch-size"):
        found = evaluate(run.model, data, parts.collate, run.accelerator, batch_size, args.workers, parts.weights, answer, gates=True)
    numbers = loss_summary(found)
    if answer:
        hits = [metrics.exact_match(one["prediction"], data.rows[one["row"]].answer.strip()) for one in found]
        numbers["em"] = sum(hits) / len(hits)
    return numbers, gate_frames.summarize_gates(run.model, found, data.rows)


def rehearse(run, parts, args):
    """The longest training batch and the longest validation batch, before anything is trained: memory that runs out, or a
    score that fails, shows now and not in the night."""
    def longest(data, count):
        return sorted(range(len(data)), key=lambda n: text_length(data.rows[n]))[-count:]

    whole = [replace(row, answer=max(row.trained_on, key=len)) if row.answers_differ else row for row in parts.train.rows]
    train = Questions(whole, parts.train.image_size, parts.train.features)
    picked = longest(train, args.batch_size)
    run.wrapped.train()
    step = run.rehearsal(parts.collate([train[n] for n in picked]), picked)
    train_step(run, step, parts.weights)
    step.update()
    count = memory.answer_batch(args.eval_batch_size, run.model.language_model, 1, run.model.max_answer)
    asked = [parts.val.rows[n] for n in longest(parts.val, count)]
    validate(run, parts, Questions(asked, parts.val.image_size, parts.val.features), args)
    loop.print_gpu_memory(run.accelerator)


def start(args):
    """Refuse what cannot be trained -> Accelerator."""
    absent = missing(args)
    published.refuse_missing(absent, shortest_way(args.data, args.blip2, absent))
    return loop.make_accelerator(args.precision)


def prepare(args, accelerator, command=()):
    """Flags -> (Run at its first step, Parts): rows, features, model, optimizer."""
    splits = [read_data(args, split, accelerator.print) for split in ("train", "val")]
    places = published.resolve_paths({"blip2": args.blip2, "efficientnet": args.efficientnet, "qformer": args.qformer})

    def load_style():
        return Model.style_tower.from_checkpoint(places["efficientnet"], args.safe_load).eval()

    for field in (name for name in ("style", "context") if getattr(args, name) == "efficientnet"):
        splits = predicted_styles(load_style().to(accelerator.device), published.image_size_of(places["blip2"]),
                                  places["efficientnet"], splits, args.workers, accelerator.device, accelerator.print, field)
    train_rows, val_rows = splits
    val_rows = rows.unify_spelling(val_rows, {r.style.strip() for r in train_rows}, accelerator.print)  # as they are trained
    tokenizer = published.load_tokenizer(places["blip2"])
    texts = [text for row in train_rows + val_rows for text in (row.question, *row.trained_on)]
    published.refuse_unknown_words(tokenizer, texts, places["blip2"])
    built_from = model_args(args, train_rows, answer_length(tokenizer, train_rows, args.max_answer))
    log_cut_answers(tokenizer, {"train": train_rows, "val": val_rows}, built_from["max_answer"], accelerator.print)
    log_cut_questions(tokenizer, {"train": [r.question for r in train_rows], "val": [r.question for r in val_rows]}, accelerator.print)
    dtype = core.DTYPES[accelerator.mixed_precision]  # of the frozen towers; everything that is trained is in float32
    features, towers = cached_features(args.cache, places["blip2"], places["qformer"], load_style if sees_style(built_from) else None,
                                       train_rows + val_rows, accelerator, dtype, args.workers)
    loop.seed_everything(args.seed)
    model = Model.build(**{**built_from, **places}, safe=args.safe_load, dtype=dtype, tower=features is None, log=accelerator.print)
    if args.instruct:
        published.refuse_unknown_words(model.instruction.tokenizer, [row.question for row in train_rows + val_rows], args.qformer)
    memory.save_activations(model.language_model, args.activations)
    packing.pack_samples(model.language_model, accelerator.print)
    parts = Parts(Questions(train_rows, model.image_size, features, args.seed), Questions(val_rows, model.image_size, features),
                  Collate(model.tokenizer, model.styles, model.max_answer), loss_weights(args, model, accelerator.print), built_from)
    return make_run(args, accelerator, model, parts, {**checkpoints.fingerprint(model), **towers}, command), parts


def make_run(args, accelerator, model, parts, frozen, command=()):
    """The Run of a model on its Parts. frozen: fingerprint of everything that is not trained, with the towers of a cache."""
    if accelerator.is_main_process:
        checkpoints.print_parts(model)
    wrapped, optimizer = accelerator.prepare(model, loop.make_optimizer(model, args.lr, args.weight_decay, fused=True))
    if args.compile:
        compiling.compile_layers(model.language_model, accelerator)
    read = parts.train.rows
    lengths = core.text_lengths(model.tokenizer, *([getattr(r, name) for r in read] for name in ("question", "answer", "context")))

    def plan(epoch):
        return loop.epoch_plan(len(read), args.batch_size, args.accumulation, args.seed, epoch, accelerator.process_index,
                               accelerator.num_processes, lengths)

    return Run("gated", args.out, accelerator, model, wrapped, optimizer, rows=read, plan=plan, epochs=args.epochs, seed=args.seed,
               batches=lambda epoch, left: loaders.load_batches(
                   parts.train, parts.collate, [[(epoch, n) for n in keys] for keys in loop.keys_of(left)], args.workers),
               lr=lambda step, total: loop.cosine_lr(step, total, round(args.warmup * total), args.lr),
               metric=args.select, lowest=args.select == "loss", settings=settings(args, parts, accelerator),
               frozen=frozen, base=("BLIP-2 or style classifier", "--blip2 and --efficientnet"),
               best=lambda: best_of(args, model, parts, frozen, command, accelerator.mixed_precision),
               columns=LOG_COLUMNS, panels=PANELS,
               title=f"{pathlib.Path(args.out).name}: {' and '.join([f'gating {args.gating}, per {args.per}', *args.steer])}",
               unit="questions", save_last=args.save_last, profile=args.profile, workers=args.workers,
               pictures=[[row.image for row in data.rows] for data in (parts.train, parts.val)])


def dry_run(args):
    """--dry-run: three rows, the table of parts (make_run prints it), memory; nothing is written but a cache."""
    run, parts = prepare(args, start(args))
    if run.accelerator.is_main_process:
        show_rows(run.model.tokenizer, parts.train.rows[:3], run.model.max_answer)
    loop.dry_run(run, lambda run: rehearse(run, parts, args), parts.train.features.stores.values() if parts.train.features else ())


def main(argv=None):
    args = get_args(argv)
    for note in environment.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        return check_data(args)
    with errors.batch_size_in_memory_errors(args.batch_size):
        if args.dry_run:
            return dry_run(args)
        run = train(args, [runfolder.script_name(__file__), *(sys.argv[1:] if argv is None else argv)])
    return run.result(args.select, __file__, argv)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
