"""pretrain_stage2.py: BLIP-2 stage 2: Q-Former and projection learn to tell a frozen language model what a picture shows.

    python pretrain_stage2.py --data coco=data/coco --qformer runs/qformer/hf                  # OPT-2.7B, one GPU of 24-80 GB
    python pretrain_stage2.py --data drawn=data/artquest --blip2 tiny --lr 1e-3 --epochs 4     # laptop CPU
    python train_gated.py --data data/artquest --qformer runs/stage2/best.pt                   # what comes next
    python pretrain_stage2.py --data coco=data/coco --checkpoint runs/stage2                   # captions of the validation pictures

Language modelling on captions (Li et al. 2023, BLIP-2): the language model sees a picture through the queries alone and has to say its
caption; it and the vision tower stay as they are. Data flow: caption files -> Pair -> Captioned -> Collate -> Blip2OPTGated.forward ->
loss. Beside the captions of each epoch stand two baselines: one caption for all pictures, and another picture's.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device

import core
import metrics
from data import pairs, rows
from data.pairs import Captioned
from engine import checkpoints, environment, errors, files, flags, loaders, loop, memory, packing, prompts, published, runfolder, seen
from engine.errors import DataError
from engine.run import Run, resumes
from engine.text import text_of, texts_of

DEFAULT = published.DEFAULTS["blip2"]
SCORES = ("CIDEr-D", "ROUGE-L", "BLEU-4")  # of the captions, and of both baselines
GENERATION = {"beams": 5, "new_tokens": 30, "length_penalty": 1.0}
CONSTANT, OTHER = "one caption for all", "another picture's"  # the baselines
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "grad_norm", *SCORES, CONSTANT, OTHER)
PANELS = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),
          ("validation, CIDEr-D", [("epoch", "CIDEr-D", "captions"), ("epoch", CONSTANT, CONSTANT), ("epoch", OTHER, OTHER)])]


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", action="append", default=[], metavar="NAME=PLACE",
                      help="a set of caption pairs, any number of times: a folder or file as pretrain_qformer.py takes it; no tar files")
    data.add_argument("--images", metavar="DIR", help="image root of all sets (default: PLACE/images, else PLACE)")
    data.add_argument("--encoding", default="utf-8", help="of the caption files (default: utf-8)")
    data.add_argument("--val-share", type=flags.share, default=0.1, help="share of the pictures held out where no set has a "
                                                                             "validation file (default: 0.1)")
    data.add_argument("--skip-bad", type=flags.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                      help="leave missing or broken pictures out and list them, up to this share (0.01 where no number is given)")
    data.add_argument("--check-data", action="store_true", help="decode every picture, say what is there, and stop")
    data.add_argument("--dry-run", action="store_true", help="show what the model reads and the memory it takes, rehearse the "
                                                             "longest batch, and stop; nothing is written")
    data.add_argument("--workers", type=flags.whole, default=2, help="loader processes (default: 2)")
    model = parser.add_argument_group("model")
    model.add_argument("--blip2", metavar="ID|DIR|tiny",
                       help=f"vision tower and language model, and the Q-Former's start without --qformer (default: {DEFAULT})")
    model.add_argument("--qformer", metavar="DIR|FILE", help="the Q-Former of stage 1: OUT/hf of pretrain_qformer.py, or a LAVIS .pth")
    model.add_argument("--lm-precision", choices=tuple(published.LM_PRECISIONS), help="of the frozen language model (default: --precision)")
    model.add_argument("--activations", choices=("keep", "bits", "recompute"), default="keep",
                       help="of the frozen language model in training: bits (OPT) and recompute take less memory (default: keep)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=flags.positive, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=flags.positive, default=16, help="pairs of a micro-batch (default: 16)")
    run.add_argument("--accumulation", type=flags.positive, default=4, help="micro-batches an optimizer step (default: 4)")
    run.add_argument("--lr", type=flags.rate, default=1e-4, help="peak learning rate (default: 1e-4)")
    run.add_argument("--min-lr", type=flags.weight, default=1e-5, help="at the end of the cosine (default: 1e-5)")
    run.add_argument("--warmup", type=flags.whole, default=2000, metavar="STEPS",
                     help="steps of warm-up, at most a tenth of all (default: 2000)")
    run.add_argument("--weight-decay", type=flags.weight, default=0.05, help="not on biases and norms (default: 0.05)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--max-val", type=flags.positive, default=1000, help="validation pictures captioned (default: 1000)")
    run.add_argument("--patience", type=flags.whole, default=0, help="epochs without a lower loss before stopping; 0 = never (default: 0)")
    run.add_argument("--seed", type=flags.whole, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/stage2", metavar="DIR", help="run folder (default: runs/stage2)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--profile", action="store_true", help="time the phases of the steps: a table at the end, OUT/profile.csv")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    look = parser.add_argument_group("evaluation")
    look.add_argument("--checkpoint", metavar="DIR|FILE", help="a run folder or its best.pt: caption the validation pictures, score, stop")
    look.add_argument("--untrained", action="store_true", help="the same before any training of this stage")
    look.add_argument("--captions", metavar="FILE.json", help="write {file: caption} of the validation pictures (of the best epoch)")
    flags.put_first(parser, "--data", "--qformer", "--out", "--epochs", "--batch-size", "--lr")
    args = flags.parse_args(parser, argv)
    if not args.data:
        parser.error("--data NAME=PLACE is needed")
    if not args.checkpoint:
        args.blip2 = args.blip2 or DEFAULT
    if args.untrained and args.checkpoint:
        parser.error("--untrained is without --checkpoint")
    return args


# --- data: your own data set goes here ------------

class Split(NamedTuple):
    """The validation pictures: a Pair each, and all captions of each."""
    rows: list
    references: list


def read_data(args, log=print):
    """--data -> (training Pairs, Split of --max-val validation pictures); bad ones refused, with --skip-bad left out."""
    places = pairs.named_places(args.data)
    train, val = (pairs.read_sets(places, split, args.images, args.skip_bad, args.val_share, args.encoding, args.workers, log)
                  for split in ("train", "val"))
    by_picture = {}
    for pair in val:
        by_picture.setdefault(pair.image_id, []).append(pair)
    shown = pairs.first_pictures(val, args.max_val)
    if len(shown) < len(by_picture):
        log(f"val: {len(shown)} of its {len(by_picture)} pictures are captioned (--max-val)")
    references = [[pair.text for pair in by_picture[i]] for i in shown]
    metrics.log_characters((text for texts in references for text in texts), log)
    return train, Split([by_picture[i][0] for i in shown], references)


class Collate:
    """Samples of Captioned -> images [B,3,s,s] and encode_captions of their texts [B,L]."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, samples):
        if fault := loaders.fault_of(samples):
            return fault
        images, batch = zip(*samples)
        return {"images": torch.stack(images), **prompts.encode_captions(self.tokenizer, [pair.text for pair in batch], multiple=4)}


# --- evaluation ------------

@torch.no_grad()
def evaluate(model, split, accelerator, batch_size, workers):
    """Every validation picture captioned once, on however many processes -> (numbers of end_epoch, captions in the order of the rows)."""
    model.eval()
    data, mine = Captioned(split.rows, model.image_size), list(range(len(split.rows)))[accelerator.process_index::accelerator.num_processes]
    batches, found = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)], []
    loaded = iter(loaders.load_batches(data, Collate(model.tokenizer), [[(0, n) for n in numbers] for numbers in batches], workers))
    for numbers in batches:
        batch = loaders.next_batch(loaded, accelerator.device)
        with accelerator.autocast():
            embeds = model.image_features(batch.pop("images"))["image_embeds"]  # [B,P,W]
            losses = model(**batch, image_embeds=embeds)["lm"].tolist()
            found += zip(numbers, losses, describe(model, embeds))
    found = sorted(gather_object(found))
    captions = [caption for _, _, caption in found]
    return {"loss": sum(loss for _, loss, _ in found) / len(found), **scores(captions, split)}, captions


def describe(model, image_embeds):
    """image_embeds [B,P,W] -> B captions by beam search."""
    start = send_to_device(prompts.caption_prompts(model.tokenizer, len(image_embeds)), image_embeds.device)
    visual = model.visual_prompt(image_embeds, None, start["input_ids"], start["attention_mask"])  # [B,Q,D]
    ids = model.decoder.generate(visual, start, **GENERATION)
    return [text.split("\n")[0].strip() for text in texts_of(model.tokenizer, ids.tolist())]


def cider(captions, references):
    """CIDEr-D of raw captions and lists of raw references; None of one picture, whose words are all that there are."""
    if len(captions) == 1:
        return None
    references = [[metrics.tokenize(text) for text in refs] for refs in references]
    return metrics.cider_d([metrics.tokenize(text) for text in captions], references)[0]


def scores(captions, split):
    """SCORES of captions, and CIDEr-D of what tells whether they are about their picture: the caption of the next one."""
    numbers = metrics.score_captions(captions, split.references)["corpus"]
    return {**{name: numbers[name] for name in SCORES}, OTHER: cider(captions[1:] + captions[:1], split.references)}


def best_constant(train, split, seed, candidates=50, judges=500):
    """The training caption that suits other training pictures best, by CIDEr-D, and its CIDEr-D on the validation pictures."""
    order = np.random.default_rng(seed).permutation(len(train))
    texts = [train[n].text for n in order]
    judged = [[text] for text in texts[-judges:]]
    best = max(dict.fromkeys(texts[:candidates]), key=lambda text: cider([text] * len(judged), judged) or 0.0)
    return best, cider([best] * len(split.references), split.references)


def known(numbers):
    """Those that are there: one picture has no CIDEr-D."""
    return {name: value for name, value in numbers.items() if value is not None}


def format_metrics(numbers):
    """Numbers for the terminal: name value, with three decimals."""
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


# --- checkpoints ------------

def best_of(args, model, frozen, precision):
    """What best.pt holds: trained tensors and plain values only. train_gated.py --qformer takes it."""
    return {"state": checkpoints.trainable_state(model), "args": vars(args), "frozen": frozen, "precision": precision,
            "model_args": {"blip2": args.blip2, "qformer": args.qformer, "lm_precision": args.lm_precision}}


def settings(args, parts, accelerator):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ("out", "resume", "save_last", "profile", "config", "images", "data", "check_data", "dry_run", "skip_bad", "workers", "patience",
            "activations", "checkpoint", "untrained", "captions")
    return {**runfolder.settings_of(vars(args), free, precision=accelerator.mixed_precision),
            "pictures (sizes)": rows.sizes_hash(row.image for row in [*parts.train.rows, *parts.val.rows]),
            "training pairs (hash)": pairs.fingerprint(parts.train.rows),
            "validation pairs (hash)": pairs.fingerprint(parts.val.rows), "processes": accelerator.num_processes}


# --- the loop ------------

class Parts(NamedTuple):
    """What a run is made of beside the Run."""
    train: Captioned
    val: Split
    constant: tuple  # of best_constant


def train_step(run, step):
    """Forward and backward of one optimizer step, micro-batch by micro-batch."""
    for batch in step:
        with step.forward():
            loss = run.wrapped(**batch)["loss"]
        step.backward(loss)


def train(args):
    """The whole training -> its Run."""
    accelerator = start(args)
    resumed = resumes(accelerator, args.out, args.resume)
    run, parts = prepare(args, accelerator)
    with run.open(resumed, vars(args), __file__):
        accelerator.print(f"{len(parts.train)} training pairs, {len(parts.val.rows)} validation pictures; {run.total} steps of "
                          f"{len(run.plan(0)[0][0])} pairs, lr {args.lr:g}, precision {accelerator.mixed_precision}, {accelerator.device}")
        accelerator.print(f"{CONSTANT}: {parts.constant[0]!r} {format_metrics(known({'CIDEr-D': parts.constant[1]}))}")
        rehearse(run, parts, args)
        written = False
        for epoch in run.epochs(args.patience):
            run.wrapped.train()
            for step in run.steps(epoch):
                train_step(run, step)
                step.update()
            numbers, captions = evaluate(run.model, parts.val, accelerator, args.batch_size, args.workers)
            if run.end_epoch(known({**numbers, CONSTANT: parts.constant[1]})):
                run.save_best()
                write_captions(args, parts.val, captions, accelerator)
                written = True
    if args.captions and not written and not run.stop.number:
        raise DataError(f"{args.captions} is not written: no epoch was the best since it is asked for; --checkpoint {run.out} writes it")
    return run


def rehearse(run, parts, args):
    """The longest captions as a batch, and a validation batch, before anything is trained: memory that runs out shows now."""
    picked = sorted(range(len(parts.train)), key=lambda n: len(parts.train.rows[n].text))[-args.batch_size:]
    run.wrapped.train()
    step = run.rehearsal(Collate(run.model.tokenizer)([parts.train[0, n] for n in picked]), picked)
    train_step(run, step)
    step.update()
    few = Split(*(part[:args.batch_size] for part in parts.val))
    evaluate(run.model, few, run.accelerator, args.batch_size, args.workers)
    loop.print_gpu_memory(run.accelerator)


def start(args):
    """Refuse what cannot be trained -> Accelerator."""
    published.refuse_missing({"BLIP-2": published.missing_model(args.blip2, "blip2")})
    return loop.make_accelerator(args.precision)


def build(args, accelerator):
    """--blip2 and --qformer -> the model, whose Q-Former, queries and projection are trained."""
    places = published.resolve_paths({"blip2": args.blip2, "efficientnet": None, "qformer": args.qformer})
    with accelerator.main_process_first():  # one process fetches what the hub alone has, the others find it
        model = core.Blip2OPTGated.build(places["blip2"], None, [], "none", qformer=places["qformer"], lm_precision=args.lm_precision,
                                         dtype=core.DTYPES[accelerator.mixed_precision], train_qformer=True, log=accelerator.print)
    memory.save_activations(model.language_model, args.activations)
    packing.pack_samples(model.language_model, accelerator.print)
    return model


def prepare(args, accelerator):
    """Flags -> (Run at its first step, Parts): pairs, model, optimizer."""
    train_pairs, val = read_data(args, accelerator.print)
    loop.seed_everything(args.seed)
    model = build(args, accelerator)
    published.refuse_unknown_words(model.tokenizer, [pair.text for pair in train_pairs], args.blip2)
    parts = Parts(Captioned(train_pairs, model.image_size, args.seed), val, best_constant(train_pairs, val, args.seed))
    return make_run(args, accelerator, model, parts), parts


def make_run(args, accelerator, model, parts):
    """The Run of a model on its Parts."""
    if accelerator.is_main_process:
        checkpoints.print_parts(model)
    wrapped, optimizer = accelerator.prepare(model, loop.make_optimizer(model, args.lr, args.weight_decay))
    frozen = checkpoints.fingerprint(model)

    def plan(epoch):
        return loop.epoch_plan(len(parts.train), args.batch_size, args.accumulation, args.seed, epoch, accelerator.process_index,
                               accelerator.num_processes)

    def batches(epoch, left):
        keys = [[(epoch, n) for n in numbers] for numbers in loop.keys_of(left)]  # augmentation is another in every epoch
        return loaders.load_batches(parts.train, Collate(model.tokenizer), keys, args.workers)

    return Run("stage2", args.out, accelerator, model, wrapped, optimizer, rows=parts.train.rows, plan=plan, batches=batches,
               epochs=args.epochs, seed=args.seed, metric="loss", lowest=True, settings=settings(args, parts, accelerator), frozen=frozen,
               lr=lambda step, total: loop.cosine_lr(step, total, min(args.warmup, total // 10), args.lr, min(args.min_lr, args.lr)),
               best=lambda: best_of(args, model, frozen, accelerator.mixed_precision), columns=LOG_COLUMNS, panels=PANELS,
               title=f"{pathlib.Path(args.out).name}: {args.blip2}", unit="pairs", format_metrics=format_metrics, save_last=args.save_last,
               profile=args.profile, workers=args.workers,
               pictures=[[pair.image for pair in data.rows] for data in (parts.train, parts.val)])


def dry_run(args):
    """--dry-run: three pairs with [what is not trained] in brackets, memory; nothing is written."""
    run, parts = prepare(args, start(args))
    for pair in parts.train.rows[:3]:
        batch = prompts.encode_captions(run.model.tokenizer, [pair.text])
        ids, shown = batch["input_ids"][0], batch["prompt_mask"][0].bool()
        before, caption = (text_of(run.model.tokenizer, part, special=True) for part in (ids[shown], ids[~shown]))
        run.accelerator.print(f"{pair.name}: [picture {before}] |{caption!r}, {len(ids[~shown])} tokens are trained")
    loop.dry_run(run, lambda run: rehearse(run, parts, args))


# --- without training ------------

def write_captions(args, split, captions, accelerator):
    """--captions: {file: caption} as metrics.py reads it, {set/file: caption} of several sets."""
    if args.captions and accelerator.is_main_process:
        several = len({pair.source for pair in split.rows}) > 1  # sets may have pictures of the same name
        names = [f"{pair.source}/{pair.name}" if several else pair.name for pair in split.rows]
        with files.whole_file(args.captions) as file:
            json.dump(dict(zip(names, captions)), file, indent=1, ensure_ascii=False)


def score(args):
    """--checkpoint, --untrained: captions of the validation pictures and their scores, beside both baselines."""
    if args.checkpoint:
        args.checkpoint, saved = checkpoints.load_best(args.checkpoint, "stage2", ("state", "model_args", "frozen"))
        for name, value in saved["model_args"].items():  # what is given now wins: things move
            setattr(args, name, getattr(args, name) or value)
    accelerator = start(args)
    train_pairs, val = read_data(args, accelerator.print)
    model = build(args, accelerator)
    if args.checkpoint:
        others = checkpoints.other_parts(checkpoints.fingerprint(model), saved["frozen"])
        if others:
            raise DataError(f"{args.checkpoint} was trained on another BLIP-2 than lies at {args.blip2} now (other: {', '.join(others)})")
        checkpoints.load_trainable(model, saved["state"], args.checkpoint)
        seen.tell("val", saved, [[pair.image] for pair in val.rows], args.workers, accelerator.print)
    numbers, captions = evaluate(model.to(accelerator.device), val, accelerator, args.batch_size, args.workers)
    accelerator.print(format_metrics(known({**numbers, CONSTANT: best_constant(train_pairs, val, args.seed)[1]})))
    write_captions(args, val, captions, accelerator)


def main(argv=None):
    args = get_args(argv)
    for note in environment.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        return pairs.check(pairs.named_places(args.data), args.images, args.skip_bad, args.val_share, args.encoding, args.workers,
                           published.format_missing({"BLIP-2": published.missing_model(args.blip2, "blip2")}))
    if args.captions:
        files.refuse_unwritable(args.captions)
    if args.checkpoint or args.untrained:
        return score(args)
    with errors.batch_size_in_memory_errors(args.batch_size):
        if args.dry_run:
            return dry_run(args)
        run = train(args)
    return run.result("loss", __file__, argv)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
