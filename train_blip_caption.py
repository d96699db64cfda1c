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

import json
import math
import os
import pathlib
import re
import sys
from typing import NamedTuple

import torch
from accelerate import DistributedDataParallelKwargs

import metrics
from data import captions, rows
from data.captions import LONGEST, MAX_LENGTH, Captions, fingerprint, pictures_in
from engine import checkpoints, environment, errors, files, flags, folders, loaders, loop, pages, published, runfolder, seen
from engine.captioning import Collate, captions_of, describe, evaluate, load_blip, summarize, write_captions, write_results
from engine.errors import DataError
from engine.run import Run, first_decides, resumes
from engine.text import text_of

DEFAULT = published.DEFAULTS["blip"]
# conservative: what the analysis of the first runs recommends; original: what was run
RECIPES = {"conservative": {"unfreeze": 1, "lr": 1e-5, "vision_lr": 0.05, "weight_decay": 0.05, "patience": 3},
           "original": {"unfreeze": 3, "lr": 3e-5, "vision_lr": 0.1, "weight_decay": 0.01, "patience": 5}}
GENERATION = {"max_length": MAX_LENGTH, "num_beams": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.1,
              "length_penalty": 1.0, "early_stopping": False, "do_sample": False}
# early_stopping True, as first run, ends a search with the fifth caption that ends, however bad: the end of good ones is lost
CLIP = 2.0  # gradient norm
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "grad_norm", "layers", "images", "meteor", "rouge_l", "cider_d", "bleu_4",
               "score")
PANELS = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),
          ("validation", [("epoch", "score", "mean of the three"), ("epoch", "meteor", "METEOR"), ("epoch", "rouge_l", "ROUGE-L"),
                          ("epoch", "cider_d", "CIDEr-D")]),
          ("gradient norm", [("step", "grad_norm", "gradient norm")]),
          ("open vision layers", [("epoch", "layers", "open vision layers")])]


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="folder with captions of train, val and, if you like, test, in it or in annotations/: "
                                                    "train_captions.json ... of {file: caption or captions}; COCO's or Karpathy's "
                                                    "JSON; Flickr8k's captions.txt or token file; CSV or TSV: data/README.md")
    data.add_argument("--images", metavar="DIR", help="image root (default: DATA/images, else DATA)")
    data.add_argument("--encoding", default="utf-8", help="of the files of captions (default: utf-8)")
    data.add_argument("--shots", type=flags.positive, metavar="N", help="train on N pictures only, picked by --seed")
    data.add_argument("--train-texts-clean", action="store_true",
                      help=f"remove empty, duplicate (twice on a picture) and absurdly long (over {LONGEST} words; "
                           "in Chinese and the like characters) captions")
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
    run.add_argument("--profile", action="store_true", help="time the phases of the steps: a table at the end, OUT/profile.csv")
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
    look.add_argument("--report", metavar="FILE.html", help="a page with scores and their intervals, curves and samples, after a "
                                                            "training of its best epoch; that of the test split is FILE_test.html")
    look.add_argument("--json", action="store_true", help="print captions and scores as JSON")
    look.add_argument("--cases", type=flags.whole, default=0, metavar="N",
                      help="write OUT/cases.html: the N worst and the N best validation pictures")
    flags.put_first(parser, "--data", "--blip", "--out", "--epochs", "--batch-size", "--lr")
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


def read_data(args, split, log=print):
    """The Pictures of a split, see captions.read_data."""
    return captions.read_data(args.data, split, workers=args.workers, log=log, **reading(args))


def read_scored(args, split, log=print):
    """The Pictures of a split that are scored: all of them, or --max-val."""
    pictures = captions.limit(read_data(args, split, log), args.max_val, split, log)
    metrics.log_characters((caption for picture in pictures for caption in picture.captions), log)
    return pictures


def splits(args):
    """The splits that are scored."""
    return ["val"] + ["test"] * captions.split_file(args.data, "test").is_file()


# --- model ------------

def open_layers(model, layers):
    """Trained: the text decoder and the last `layers` layers of the vision tower. Frozen: all else."""
    tower = model.vision_model.encoder.layers
    if layers > len(tower):
        raise DataError(f"--unfreeze or --unfreeze-schedule asks for {layers} vision layers and this BLIP has {len(tower)}")
    model.requires_grad_(False)
    model.text_decoder.requires_grad_(True)
    tower[len(tower) - layers:].requires_grad_(True)


def trained_layers(model):
    """The vision layers that are trained now."""
    return [layer for layer in model.vision_model.encoder.layers if next(layer.parameters()).requires_grad]


def layers_at(args, epoch):
    """Vision layers that are open in an epoch (from 0): --unfreeze, then what the schedule says; never fewer than before."""
    steps = [tuple(map(int, step.split(":"))) for step in args.unfreeze_schedule]
    return max([args.unfreeze, *(layers for start, layers in steps if start <= epoch + 1)])


def train_mode(run):
    """Dropout in the trained parts only."""
    run.wrapped.train()
    run.model.vision_model.eval()
    for layer in trained_layers(run.model):
        layer.train()


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


# --- checkpoints ------------

def best_of(args, model, precision):
    """What best.pt holds: trained tensors and plain values only, with the settings of generation."""
    return {**trained_of(model), "model_args": {"blip": args.blip}, "generation": GENERATION, "precision": precision,
            "args": vars(args), "meteor": metrics.meteor_name()}


def trained_of(model):
    """What is trained, how many vision layers are open, and the fingerprint of the rest of the tower."""
    return {"state": checkpoints.trainable_state(model), "open": len(trained_layers(model)),
            "frozen": checkpoints.fingerprint(model.vision_model)}


def put_back(model, content, path):
    """trained_of a checkpoint into a model. DataError: it was trained on another BLIP."""
    open_layers(model, content["open"])
    if content["frozen"] != checkpoints.fingerprint(model.vision_model):
        raise DataError(f"{path} was trained on another BLIP than the one given now: pass the same --blip")
    checkpoints.load_trainable(model, content["state"], path)


def load_trained(name, best, path):
    """(model, tokenizer) of a best.pt, on the BLIP it was trained on, or on the one named."""
    model, tokenizer = load_blip(name or best["model_args"]["blip"])
    put_back(model, best, path)
    return model, tokenizer


def settings(args, parts, accelerator):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ("out", "resume", "save_last", "profile", "config", "workers", "images", "data", "check_data", "dry_run", "skip_bad", "cases",
            "json", "val_batch", "checkpoint", "caption", "captions", "report", "zero_shot")
    return {**runfolder.settings_of(vars(args), free, precision=accelerator.mixed_precision),
            "pictures (sizes)": rows.sizes_hash(row.image for row in [*parts.train.rows, *parts.val.rows]),
            "training pictures (hash)": fingerprint(parts.train.rows),
            "validation pictures (hash)": fingerprint(parts.val.rows),
            "METEOR": metrics.meteor_name(), "processes": accelerator.num_processes}


# --- the loop ------------

class Parts(NamedTuple):
    """What a run is made of beside the Run."""
    train: Captions
    val: Captions
    collate: Collate
    tokenizer: object


def train_step(run, step):
    """Forward and backward of one optimizer step, micro-batch by micro-batch."""
    for batch in step:
        with step.forward():
            loss = run.wrapped(**batch).loss  # mean over the tokens of the micro-batch, smoothed
        step.backward(loss)


def train(args):
    """The whole training -> its Run."""
    accelerator = start(args)
    resumed = resumes(accelerator, args.out, args.resume)
    if args.report:
        files.refuse_unwritable(args.report)
    run, parts = prepare(args, accelerator)
    with run.open(resumed, vars(args), __file__):
        accelerator.print(f"{len(parts.train)} training captions, {len(parts.val)} validation pictures; {run.total} steps of "
                          f"{len(run.plan(0)[0][0])} captions, lr {args.lr:g}, precision {accelerator.mixed_precision}, "
                          f"{accelerator.device}")
        rehearse(run, parts, args)
        for epoch in run.epochs(args.patience):
            open_layers(run.model, layers_at(args, epoch))
            train_mode(run)
            for step in run.steps(epoch):
                train_step(run, step)
                step.update()
            numbers, results = validate(run.model, parts.tokenizer, parts.val, accelerator, args)
            if loop.is_better(numbers["score"], run.progress) and accelerator.is_main_process:
                write_captions(run.out / "val.json", parts.val, results)  # before last.pt: --resume makes up for best.pt alone
            if run.end_epoch({"layers": len(trained_layers(run.model)), **numbers}):
                run.save_best()
                if args.report and accelerator.is_main_process:
                    report_results(args, run.out / "best.pt", "val", parts.val, results)
        if run.progress["value"] is not None:
            finish(run, parts, args)
    return run


def validate(model, tokenizer, data, accelerator, args, generation=GENERATION):
    """(numbers of an evaluation, its results, see captioning.evaluate)."""
    results = evaluate(model, tokenizer, data, accelerator, generation, args.val_batch, args.workers, with_confidence=bool(args.report))
    return summarize(results, data), results


def format_metrics(numbers):
    """Numbers for the terminal; a METEOR without WordNet says so."""
    note = "" if metrics.meteor_name() == "METEOR" else f" ({metrics.meteor_name()})"
    return loop.format_metrics({name: value for name, value in numbers.items() if name != "layers"}) + note


def finish(run, parts, args):
    """After the last epoch: the page of cases, and the test split, where there is one, by best.pt."""
    accelerator, best = run.accelerator, run.out / "best.pt"
    if args.cases and accelerator.is_main_process:
        kept = json.loads((run.out / "val.json").read_text(encoding="utf-8"))
        case_results(args, parts.val, [kept[p.name] for p in parts.val.rows], f"{run.out.name}: best epoch")
    if "test" in splits(args):
        # into a fresh model: layers that were opened after the best epoch are no longer what they were then
        content = first_decides(accelerator, lambda: checkpoints.load_checkpoint(best))  # the others would come before it is written
        model = load_trained(None, content, best)[0].to(accelerator.device)
        data = Captions(read_scored(args, "test", accelerator.print), parts.val.image_size, parts.tokenizer)
        overlap = tell_seen("test", content, data, args, accelerator.print)
        numbers, results = validate(model, parts.tokenizer, data, accelerator, args)
        accelerator.print(f"test: {format_metrics(numbers)}")
        if accelerator.is_main_process:
            write_captions(run.out / "test.json", data, results)
            if args.report:
                report_results(args, best, "test", data, results, seen.format_overlap(overlap))


def rehearse(run, parts, args):
    """The longest training batch with all layers open that ever will be, and a validation batch, before anything is trained:
    memory that runs out, or a score that fails, shows now and not in the night."""
    picked = sorted(range(len(parts.train)), key=lambda n: len(parts.train.ids[n]))[-args.batch_size:]
    open_layers(run.model, layers_at(args, args.epochs - 1))
    train_mode(run)
    step = run.rehearsal(parts.collate([parts.train[n] for n in picked]), picked)
    train_step(run, step)
    step.update()
    few = Captions(parts.val.rows[:args.val_batch], parts.val.image_size, parts.tokenizer)
    validate(run.model, parts.tokenizer, few, run.accelerator, args)
    loop.print_gpu_memory(run.accelerator)


def start(args):
    """Refuse what cannot be trained -> Accelerator."""
    published.refuse_missing({"BLIP": published.missing_model(args.blip, "blip")})
    # with a schedule DDP meets parameters that are still frozen
    scattered = [DistributedDataParallelKwargs(find_unused_parameters=True)] if args.unfreeze_schedule else []
    return loop.make_accelerator(args.precision, kwargs_handlers=scattered)


def prepare(args, accelerator):
    """Flags -> (Run at its first step, Parts): pictures, model, optimizer."""
    train_pictures, val_pictures = read_data(args, "train", accelerator.print), read_scored(args, "val", accelerator.print)
    loop.seed_everything(args.seed)
    with accelerator.main_process_first():  # one process fetches what the hub alone has, the others find it
        model, tokenizer = load_blip(args.blip)
    captions_read = [caption for picture in train_pictures + val_pictures for caption in picture.captions]
    published.refuse_unknown_words(tokenizer, captions_read, args.blip)
    size = model.config.vision_config.image_size
    parts = Parts(Captions(train_pictures, size, tokenizer, every=True, augment=args.seed if args.augment else None),
                  Captions(val_pictures, size, tokenizer), Collate.of(model), tokenizer)
    return make_run(args, accelerator, model, parts), parts


def make_run(args, accelerator, model, parts):
    """The Run of a model on its Parts."""
    open_layers(model, layers_at(args, math.inf))  # those of the whole schedule, so that a longer run may go on from this one
    groups = parameter_groups(model, args)
    open_layers(model, layers_at(args, args.epochs - 1))  # all that this run will ever train
    if accelerator.is_main_process:
        checkpoints.print_parts(model)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=args.lr))

    def plan(epoch):
        return loop.epoch_plan(len(parts.train), args.batch_size, args.accumulation, args.seed, epoch, accelerator.process_index,
                               accelerator.num_processes)

    def batches(epoch, left):
        keys = [[(epoch, n) for n in numbers] for numbers in loop.keys_of(left)]  # augmentation is another in every epoch
        return loaders.load_batches(parts.train, parts.collate, keys, args.workers)

    return Run("blip", args.out, accelerator, model, wrapped, optimizer, rows=parts.train.rows, plan=plan, batches=batches,
               epochs=args.epochs, seed=args.seed, clip=CLIP, metric="score",
               weigh=lambda numbers: sum(len(parts.train.ids[n]) - 1 for n in numbers),  # a step's loss is the mean over its tokens
               lr=lambda step, total: loop.cosine_lr(step, total, min(args.warmup, total // 10), args.lr),
               settings=settings(args, parts, accelerator), state=lambda: trained_of(model),
               load_state=lambda last: put_back(model, last, pathlib.Path(args.out) / "last.pt"),
               best=lambda: best_of(args, model, accelerator.mixed_precision), columns=LOG_COLUMNS, panels=PANELS,
               title=f"{pathlib.Path(args.out).name}: {args.blip}, {args.recipe}", unit="pictures", format_metrics=format_metrics,
               save_last=args.save_last, profile=args.profile, workers=args.workers,
               pictures=[[picture.image for picture in data.rows] for data in (parts.train, parts.val)])


def dry_run(args):
    """--dry-run: three captions with [what the loss does not see] in brackets, memory; nothing is written."""
    run, parts = prepare(args, start(args))
    for number in range(min(3, len(parts.train))):
        first, *others = parts.train.ids[number]
        run.accelerator.print(f"{parts.train.rows[number].name}: [{text_of(parts.tokenizer, [first], special=True)}] |"
                              f"{text_of(parts.tokenizer, others, special=True)!r}, {len(others)} tokens are trained")
    loop.dry_run(run, lambda run: rehearse(run, parts, args))


# --- without training ------------

def ready(args):
    """What generates without training -> (model in eval mode, tokenizer, Accelerator, what best.pt holds, at least "generation")."""
    best = {"generation": GENERATION}
    if args.checkpoint:
        needs = ("state", "model_args", "open", "frozen", "generation", "precision")
        args.checkpoint, best = checkpoints.load_best(args.checkpoint, "blip", needs)  # a file: the report's curves go by its folder
    name = args.blip or best["model_args"]["blip"]
    published.refuse_missing({"BLIP": published.missing_model(name, "blip")})
    if args.checkpoint and args.precision == "auto" and torch.cuda.is_available():
        args.precision = best["precision"]  # as in training: rounding can change a caption
    accelerator = loop.make_accelerator(args.precision)
    with accelerator.main_process_first():
        model, tokenizer = load_trained(name, best, args.checkpoint) if args.checkpoint else load_blip(name)
    return model.eval().to(accelerator.device), tokenizer, accelerator, best


def tell_seen(split, best, data, args, log):
    """seen.tell of the pictures of a split."""
    return seen.tell(split, best, [[picture.image] for picture in data.rows], args.workers, log)


def score(args):
    """--zero-shot and --checkpoint: scores of the validation and test split."""
    def log(*words):
        accelerator.print(*words, file=sys.stderr if args.json else sys.stdout)

    for path in filter(None, (args.cases and cases_page(args), args.report)):
        files.refuse_unwritable(path)
    model, tokenizer, accelerator, best = ready(args)
    scored = {}
    for split in splits(args):
        data = Captions(read_scored(args, split, log), model.config.vision_config.image_size, tokenizer)
        overlap = tell_seen(split, best, data, args, log) if args.checkpoint else None
        numbers, results = validate(model, tokenizer, data, accelerator, args, best["generation"])
        log(f"{split}: {format_metrics(numbers)}")
        scored[split] = {"scores": numbers, "captions": captions_of(data, results), **({"seen": sum(overlap)} if overlap else {})}
        if args.cases and split == "val" and accelerator.is_main_process:
            case_results(args, data, list(scored[split]["captions"].values()), f"{args.checkpoint or args.blip}: {split}")
        if args.report and accelerator.is_main_process:
            report_results(args, args.checkpoint, split, data, results, seen.format_overlap(overlap) if args.checkpoint else None)
    if args.json:
        accelerator.print(json.dumps(scored, indent=1, ensure_ascii=False))
    if accelerator.is_main_process:
        draw_pages(args, scored, log)


def report_page(args, split):
    """Where the page of --report of a split goes."""
    page = pathlib.Path(args.report)
    return page if split == "val" else page.with_name(f"{page.stem}_{split}{page.suffix}")


def report_results(args, checkpoint, split, data, results, saw=None):
    """What --report draws of a split, as a file. checkpoint: None = untrained; results: of evaluate; saw: of seen.format_overlap."""
    log = checkpoint and os.path.abspath(pathlib.Path(checkpoint).with_name("training_log.csv"))
    made = environment.provenance(checkpoint=checkpoint, blip=args.blip, data=f"{args.data}, {split}",
                                  **{"pictures that training saw": saw})
    write_results(report_page(args, split), f"{checkpoint or args.blip}: {split}", data.rows,
                  {"trained" if checkpoint else "untrained": results}, log=log, panels=PANELS, made=made)


def cases_page(args):
    return pathlib.Path(args.out) / "cases.html"


def case_results(args, data, texts, title):
    """What --cases draws, as a file. texts: the captions of all rows."""
    write_results(cases_page(args), title, data.rows, {"the model": [{"caption": text} for text in texts]}, args.cases)


def draw_pages(args, splits, log=print, of=None):
    """The pages of --cases and --report whose results are written. splits: those that were scored; of: see pages.draw."""
    if args.cases:
        pages.draw("report", cases_page(args), f"{cases_page(args)}: {args.cases} worst and best", log)
    for split in splits if args.report else ():
        pages.draw("report", report_page(args, split), log=log, of=of)


def caption_folder(args):
    """--captions: a row for each picture of the folder and those below, but for those that are there, see folders.py."""
    folder, = args.caption
    names = folders.pictures_in(folder)
    files.refuse_unwritable(args.captions)
    model, tokenizer, accelerator, best = ready(args)
    generation = best["generation"]
    if accelerator.num_processes > 1:
        raise DataError("--captions writes one file from one process: start it without accelerate launch")
    trained = files.digest(args.checkpoint) if args.checkpoint else None
    made_with = {"checkpoint (sha256)": trained, "--blip": None if trained else args.blip, "--caption": os.path.realpath(folder),
                 "precision": accelerator.mixed_precision, **generation}

    @torch.no_grad()
    def rows_of(images, keys):
        with accelerator.autocast():
            return [key for key, in keys], [(text,) for text in describe(model, tokenizer, images, generation)]

    with (folders.open_table(args.captions, ("image", "caption"), 1, made_with) as table,
          errors.batch_size_in_memory_errors(args.val_batch, "--val-batch")):
        folders.fill(table, folder, table.missing(names, [()]), rows_of, model.config.vision_config.image_size, args.val_batch,
                     args.workers, accelerator.device)


def caption(args):
    """--caption: a line for each picture, or JSON. Folders stand for the pictures in them. Exit code 2 where one is broken."""
    pictures = pictures_in(args.caption)
    broken = dict(rows.verify_images(pictures, max(1, args.workers)))
    for reason in broken.values():
        print(f"error: {reason}", file=sys.stderr)
    pictures = [p for p in pictures if p.image not in broken]
    if pictures:
        model, tokenizer, accelerator, best = ready(args)
        data = Captions(pictures, model.config.vision_config.image_size)
        said = captions_of(data, evaluate(model, tokenizer, data, accelerator, best["generation"], args.val_batch, args.workers))
        accelerator.print(json.dumps(said, indent=1, ensure_ascii=False) if args.json else
                          "\n".join(f"{name}: {text}" for name, text in said.items()))
    return 2 * bool(broken)


def main(argv=None):
    args = get_args(argv)
    for note in environment.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        absent = {} if args.checkpoint else {"BLIP": published.missing_model(args.blip, "blip")}
        return captions.check_data(args.data, lambda: published.load_tokenizer(published.in_models(args.blip, "blip")),
                                   published.format_missing(absent), workers=args.workers, **reading(args))
    if args.captions:
        return caption_folder(args)
    if args.caption or args.zero_shot or args.checkpoint:
        return caption(args) if args.caption else score(args)
    with errors.batch_size_in_memory_errors(args.batch_size):
        if args.dry_run:
            return dry_run(args)
        run = train(args)
    code = run.result("score", __file__, argv)
    if run.accelerator.is_main_process and not code:  # an interrupted run draws when it has been resumed
        draw_pages(args, splits(args), of=run.out / "best.pt")
    return code


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
