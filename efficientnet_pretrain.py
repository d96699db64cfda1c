"""efficientnet_pretrain.py: EfficientNet-B3 style classifier on WikiArt, 27 styles and with --photos a 28th class of photographs.

    python efficientnet_pretrain.py --data wikiart --check-data     # once: lists the broken pictures in broken.txt
    python efficientnet_pretrain.py --data wikiart --pretrained     # the recipe; one GPU
    python efficientnet_pretrain.py --data data/artquest --arch test_efficientnet --size 112 --epochs 15 --batch-size 16 \\
        --lr 1e-2 --cutmix 0 --dropout 0                            # the drawn sample, random weights, laptop CPU
    accelerate launch efficientnet_pretrain.py --data wikiart --pretrained      # several GPUs
    python efficientnet_pretrain.py --data wikiart --pretrained --probe         # few pictures, or a first look: the head alone

--data: ArtGAN's folder (style_train.csv, style_val.csv, style_class.txt), a folder with train/STYLE/ and val/STYLE/, one with
STYLE/ alone (a tenth of each is held out), or a classes.csv (filename, subset; the style is the first folder of filename).

The recipe. The original's README (RMSprop, AutoAugment, EMA 0.9999, 100 epochs) and its code (AdamW 3e-4, CutMix, balanced
classes, 30 epochs) disagree. Taken here: the code's, which its checkpoint should come from; the README's EMA; CutMix on half of
the batches only, so that whole pictures are seen too. No AutoAugment or RandAugment: a posterised or sheared painting is of
another style. Flow: list -> rows (wikiart.py) -> Paintings -> collate -> CutMix -> timm's EfficientNet -> loss; the averaged
weights are scored.
"""

import pathlib
import random
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, gather_object
from torch.utils.data import Dataset

from data import rows, wikiart
from data.rows import IMAGENET_MEAN, IMAGENET_STD
from engine import checkpoints, environment, errors, flags, loaders, loop, runfolder
from engine.confusion import per_class, write_report
from engine.errors import DataError
from engine.probe import FOLDS, PENALTIES, best_penalty, fit_logistic
from engine.run import Run, resumes

LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "grad_norm", "top1", "top5", "f1", "balanced")
CLIP = 5.0  # gradient norm: only spikes are cut
PANELS = [("loss", [("step", "loss", "training (smoothed, mixed)"), ("epoch", "loss", "validation")]),
          ("validation", [("epoch", "f1", "macro F1"), ("epoch", "balanced", "balanced accuracy"), ("epoch", "top1", "top-1"),
                          ("epoch", "top5", "top-5")]),
          ("learning", [("step", "grad_norm", "gradient norm")])]


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DIR|FILE", help="ArtGAN's folder, a folder per style, or a classes.csv")
    data.add_argument("--images", metavar="DIR", help="image root of a table (default: DATA/images, else DATA)")
    data.add_argument("--val-share", type=flags.share, default=0.1, help="share of each style held out for validation where "
                                                                             "--data is STYLE/ folders alone (default: 0.1)")
    data.add_argument("--photos", metavar="DIR", help="photographs of anything, e.g. COCO's: a class of their own, one for "
                                                      f"{wikiart.PER_PHOTO} paintings (default: none)")
    data.add_argument("--encoding", default="utf-8", help="of the tables (default: utf-8)")
    data.add_argument("--separator", help="of the tables, tab spelled out (default: told from the first line)")
    data.add_argument("--check-data", action="store_true", help="decode every picture, list the broken ones in DATA/broken.txt, "
                                                                "which training leaves out, and stop; loads no weight")
    data.add_argument("--dry-run", action="store_true", help="show what the model reads and the memory it takes, rehearse the "
                                                             "longest batch, and stop; nothing is written")
    data.add_argument("--workers", type=flags.whole, default=2, help="loader processes (default: 2)")
    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="efficientnet_b3", help="timm's name of an EfficientNet (default: efficientnet_b3)")
    model.add_argument("--size", type=flags.positive, default=300, help="pixels a side (default: 300)")
    model.add_argument("--pretrained", action="store_true", help="start from timm's ImageNet weights (downloaded on first use)")
    model.add_argument("--init", metavar="FILE", help="start from this state dict (.pt, .pth, .safetensors)")
    model.add_argument("--dropout", type=flags.share, default=0.3, help="before the classifier (default: 0.3)")
    model.add_argument("--drop-path", type=flags.share, default=0.2, help="of the deepest block, less above (default: 0.2)")
    model.add_argument("--freeze-bn", action="store_true", help="leave the batch-norm statistics as the first weights have "
                                                                "them; scale and shift are trained")
    run = parser.add_argument_group("training")
    run.add_argument("--probe", action="store_true", help="train the classifier alone, by logistic regression on the features of "
                                                          "--pretrained or --init; only --balance, --seed and --batch-size count")
    run.add_argument("--epochs", type=flags.positive, default=30, help="(default: 30)")
    run.add_argument("--batch-size", type=flags.positive, default=32, help="pictures a step and process (default: 32)")
    run.add_argument("--accumulation", type=flags.positive, default=1, help="batches an optimizer step (default: 1)")
    run.add_argument("--lr", type=flags.rate, default=3e-4, help="peak learning rate (default: 3e-4)")
    run.add_argument("--warmup", type=flags.share, default=0.05, help="share of all steps spent warming up (default: 0.05)")
    run.add_argument("--weight-decay", type=flags.weight, default=1e-3, help="not on biases and norms (default: 1e-3)")
    run.add_argument("--balance", type=flags.share, default=1.0, help="1: every style equally often; 0: as in the data "
                                                                          "(default: 1)")
    run.add_argument("--smoothing", type=flags.share, default=0.1, help="of the labels (default: 0.1)")
    run.add_argument("--cutmix", type=flags.share, default=0.5, help="share of the batches with CutMix (default: 0.5)")
    run.add_argument("--mixup", type=flags.share, default=0.0, help="share of the batches with MixUp (default: 0)")
    run.add_argument("--crop", type=flags.share, default=0.75, help="smallest share of a picture that a crop may keep "
                                                                        "(default: 0.75)")
    run.add_argument("--ema", type=flags.share, default=0.9999, help="greatest decay of the averaged weights; 0 = no average "
                                                                         "(default: 0.9999)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--seed", type=flags.whole, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/efficientnet-28", metavar="DIR", help="run folder (default: runs/efficientnet-28)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--profile", action="store_true", help="time the phases of the steps: a table at the end, OUT/profile.csv")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    flags.put_first(parser, "--data", "--pretrained", "--out", "--epochs", "--batch-size", "--lr")
    args = flags.parse_args(parser, argv)
    if args.probe and not (args.pretrained or args.init):
        parser.error("--probe needs weights that have seen pictures: --pretrained or --init FILE")
    if args.probe:
        args.epochs = 1
    if args.cutmix + args.mixup > 1:
        parser.error(f"--cutmix {args.cutmix:g} and --mixup {args.mixup:g} are shares of the same batches: more than 1 in all")
    return args


# --- data: your own data set goes here ------------

def reading(args):
    """The flags about data, by the names that wikiart.read_lists takes."""
    return {name: getattr(args, name) for name in ("images", "encoding", "separator", "val_share", "photos")}


def read_data(args, log=print):
    """(classes, {split: rows}), see wikiart.read_data."""
    return wikiart.read_data(args.data, log, **reading(args))


def balance_classes(labels, power, seed, epoch):
    """Row numbers of an epoch [N] from labels [N]: class c, of n_c rows, has n_c^(1-power) / sum_k n_k^(1-power) of the N places.

    power 0: the data as it is; 1: every class equally often. Within a class the rows take turns, so that each comes up equally
    often but for one; whole rounds are shuffled. A pure function of (seed, epoch)."""
    rng, labels = np.random.default_rng([seed, epoch, 1]), np.asarray(labels)
    counts = np.bincount(labels)
    share = np.where(counts > 0, np.maximum(counts, 1) ** (1.0 - power), 0)
    ends = np.rint(np.cumsum(share) / share.sum() * len(labels)).astype(int)  # rounded sums: the parts add up to N
    drawn = []
    for label, places in enumerate(np.diff(ends, prepend=0)):
        members = np.flatnonzero(labels == label)
        rounds, rest = divmod(int(places), max(1, len(members)))
        drawn += [rng.permutation(members) for _ in range(rounds)] + [rng.permutation(members)[:rest]]
    return np.concatenate(drawn)


class Paintings(Dataset):
    """(row number, epoch, place in the epoch), or a row number -> (pixels [3,s,s] in the net's normalisation, label, Row).

    With an epoch the picture is cropped, mirrored and tinted: a pure function of (seed, epoch, place), whichever process does it.
    Without, it is squashed to a square as Gated BLIP-2 does it for its classifier, but at --size: BLIP-2 shows its classifier pictures
    of its own size, 224 pixels, and --size 224 validates on what that will see.
    A broken picture's DataError is handed on in place of the pixels: raised in a loader it would keep the others from ending.
    """

    def __init__(self, read, classes, size, crop=1.0, seed=0, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        from torchvision.transforms import v2  # not above, as timm below: each takes as long as torch, and --help needs neither
        self.rows, self.size, self.seed, self.mean, self.std = read, size, seed, mean, std
        self.labels = [classes.index(row.style) for row in read]
        jitter = v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02)  # light: colour is part of a style
        self.augment = v2.Compose([
            v2.RandomResizedCrop(size, scale=(max(crop, 0.01), 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(), v2.RandomApply([jitter], p=0.3), v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        number, *when = key if isinstance(key, tuple) else (key,)
        row = self.rows[number]
        try:
            image = rows.load_image(row.image)
        except DataError as error:
            return error, self.labels[number], row
        if not when:
            return rows.image_tensor(image, self.size, self.mean, self.std), self.labels[number], row
        loop.seed_everything(self.seed, *when, 1)  # 1: not the numbers that seed dropout
        return self.augment(image), self.labels[number], row


def collate(samples):
    """Samples -> {"images": [B,3,s,s], "labels": [B]}, or {"fault": message}."""
    for pixels, _, row in samples:
        if isinstance(pixels, DataError):
            return {"fault": f"{row.file}, {loaders.list_rows([row])}: {pixels}: --check-data lists such files, and training leaves "
                             "them out"}
    pixels, labels, _ = zip(*samples)
    return {"images": torch.stack(pixels), "labels": torch.tensor(labels)}


def channels_last(images):
    """[B,3,s,s] as it was, NHWC in memory: what convolutions on tensor cores want."""
    return images.to(memory_format=torch.channels_last)


# --- scores ------------

def summary(results, classes):
    """evaluate's list -> ({loss, top1, top5, f1, balanced}, confusion [K,K]). f1 (macro) and balanced accuracy (mean recall) are
    means over the classes that have validation pictures: of the others nothing is known."""
    confusion = np.zeros((classes, classes), int)
    for one in results:
        confusion[one["label"], one["best"][0]] += 1
    _, recall, f1 = per_class(confusion)
    present = confusion.sum(1) > 0  # [K]
    hits = {k: sum(one["label"] in one["best"][:k] for one in results) / len(results) for k in (1, 5)}
    return {"loss": sum(one["loss"] for one in results) / len(results), "top1": hits[1], "top5": hits[5],
            "f1": float(f1[present].mean()), "balanced": float(recall[present].mean())}, confusion


def outputs(forward, data, numbers, accelerator, batch_size, workers, what):
    """(row numbers, labels [B], forward(pictures [B,3,s,s])) of the rows `numbers`, batch by batch."""
    batches = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    for few, batch in loaders.each_batch(data, collate, batches, accelerator, workers, what):
        with accelerator.autocast():
            found = forward(channels_last(batch["images"]))
        yield few, batch["labels"], found


@torch.no_grad()
def evaluate(net, data, accelerator, batch_size, workers):
    """Every row once, on however many processes -> list of {row, label, loss (plain cross-entropy), best: five classes}."""
    net.eval()
    mine = list(range(len(data)))[accelerator.process_index::accelerator.num_processes]
    found = []
    for numbers, labels, logits in outputs(net, data, mine, accelerator, batch_size, workers, "evaluating"):
        logits = logits.float()  # [B,K]
        losses = F.cross_entropy(logits, labels, reduction="none").tolist()
        best = logits.topk(min(5, logits.shape[1])).indices.tolist()  # [B,5]
        found += [dict(zip(("row", "label", "loss", "best"), one)) for one in zip(numbers, labels.tolist(), losses, best)]
    return sorted(gather_object(found), key=lambda one: one["row"])


@torch.no_grad()
def pooled_features(net, data, accelerator, batch_size, workers):
    """Every row as validation sees it -> float64 [N,F] on the CPU, in their order; every process computes all."""
    def pooled(images):  # [B,3,s,s] -> [B,F]
        return net.forward_head(net.forward_features(images), pre_logits=True)

    net.eval()
    found = outputs(pooled, data, list(range(len(data))), accelerator, batch_size, workers, "features")
    return torch.cat([features.double().cpu() for _, _, features in found])


# --- model ------------

def build(args, classes, log, blank=False):
    """timm's net with a head of len(classes), from --pretrained or --init. blank: weights are put in later (--resume)."""
    import timm
    wanted = {"num_classes": len(classes), "drop_rate": args.dropout, "drop_path_rate": args.drop_path}
    try:
        net = timm.create_model(args.arch, **wanted)
    except (RuntimeError, TypeError, ValueError, OSError) as error:  # unknown to timm or the hub, a net without drop-path
        raise DataError(f"--arch {args.arch} cannot be built ({' '.join(str(error).split())[:200]})") from None
    if "classifier.weight" not in net.state_dict():
        raise DataError(f"--arch {args.arch} is not one of timm's EfficientNets")
    if args.pretrained and not args.init and not blank:
        try:
            net = timm.create_model(args.arch, pretrained=True, **wanted)
        except Exception as error:  # whatever the hub's client raises without a network
            raise DataError(f"--pretrained: no weights of {args.arch} ({' '.join(str(error).split())[:160]}): give a file of "
                            "them as --init FILE") from None
    torch.nn.init.normal_(net.classifier.weight, std=0.01)  # timm's start is so wide that a first loss of ln 27 = 3.3 becomes 4.6
    if args.init and not blank:
        checkpoints.start_from(net, args.init, ("classifier.weight", "classifier.bias"), args.arch, log)  # no head of another size
    elif not args.pretrained and not blank:
        log("random weights: --pretrained or --init start from ImageNet's, which takes far fewer pictures")
    if args.probe:
        net.requires_grad_(False)
        net.classifier.requires_grad_(True)
    return net.to(memory_format=torch.channels_last)


def mix_batch(images, labels, classes, cutmix, mixup):
    """images [B,3,s,s], labels [B] -> (images, targets [B,K]); CutMix (alpha 1), MixUp (alpha 0.2) in their share of batches."""
    from torchvision.transforms import v2
    draw = random.random()
    if draw < cutmix:
        return v2.CutMix(num_classes=classes, alpha=1.0)(images, labels)
    if draw < cutmix + mixup:
        return v2.MixUp(num_classes=classes, alpha=0.2)(images, labels)
    return images, F.one_hot(labels, classes).float()


# --- checkpoints ------------

def best_of(args, parts):
    """What best.pt holds: the averaged weights and plain values; core.EfficientNet28.from_checkpoint takes it as it is."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.ema.module.state_dict().items()}
    return {"model": state, "arch": args.arch, "classes": parts.classes, "size": args.size, "mean": list(parts.train.mean),
            "std": list(parts.train.std), "args": vars(args)}


def settings(args, parts, accelerator):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ("out", "resume", "save_last", "profile", "config", "workers", "images", "data", "photos", "check_data", "dry_run", "pretrained",
            "init")
    return {**runfolder.settings_of(vars(args), free, precision=accelerator.mixed_precision),
            "pictures (sizes)": rows.sizes_hash(row.image for row in [*parts.train.rows, *parts.val.rows]),
            "classes": parts.classes, "training rows (hash)": rows.fingerprint(parts.train.rows),
            "validation rows (hash)": rows.fingerprint(parts.val.rows), "processes": accelerator.num_processes}


# --- the loop ------------

class Parts(NamedTuple):
    """What a run is made of beside the Run."""
    classes: list
    train: Paintings
    val: Paintings
    ema: torch.nn.Module  # timm's ModelEmaV3: the average of the weights, which is scored and saved


def train_mode(run, freeze_bn):
    """Training mode; with --freeze-bn the norms stay in evaluation mode, but their scale and shift are trained.

    Batch norm and small batches: a picture brings many positions, so that the statistics of 16 pictures serve; of a few they are
    noisy. Several GPUs: each has its own, the first one's running statistics are kept."""
    run.wrapped.train()
    for module in run.model.modules():
        if freeze_bn and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def train_step(run, step, args):
    """Forward and backward of one optimizer step, micro-batch by micro-batch."""
    for batch in step:
        images, targets = mix_batch(channels_last(batch["images"]), batch["labels"], run.model.num_classes, args.cutmix, args.mixup)
        with step.forward():
            loss = F.cross_entropy(run.wrapped(images).float(), targets, label_smoothing=args.smoothing)  # logits, targets [B,K]
        step.backward(loss)


def train(args):
    """The whole training -> its Run."""
    accelerator = loop.make_accelerator(args.precision)
    resumed = resumes(accelerator, args.out, args.resume)
    run, parts = prepare(args, accelerator, resumed)
    with run.open(resumed, vars(args), __file__):
        how = "a probe" if args.probe else f"{run.total} steps of {len(run.plan(0)[0][0])}, lr {args.lr:g}"
        accelerator.print(f"{len(parts.train)} training and {len(parts.val)} validation pictures, {len(parts.classes)} classes; {how}, "
                          f"precision {accelerator.mixed_precision}, {accelerator.device}")
        if not args.probe:
            rehearse(run, parts, args)
        for epoch in run.epochs():
            if args.probe:
                probe(run, parts, args)
            else:
                train_epoch(run, parts, epoch, args)
            numbers, confusion = validate(run, parts, parts.val, args)
            if run.end_epoch(numbers, confusion=confusion.tolist()):
                run.save_best()
        if accelerator.is_main_process and run.progress["value"] is not None:
            report(run, parts)
    return run


def train_epoch(run, parts, epoch, args):
    """The steps of an epoch and the average of the weights."""
    train_mode(run, args.freeze_bn)
    for step in run.steps(epoch):
        train_step(run, step, args)
        step.update()
        parts.ema.update(run.model, run.step)


def probe(run, parts, args):
    """--probe: the head of the averaged weights, which are still the first ones, fitted to the training pictures uncropped."""
    net = parts.ema.module
    features = pooled_features(net, parts.train, run.accelerator, args.batch_size, args.workers)  # [N,F]
    labels = torch.tensor(parts.train.labels)
    penalty = best_penalty(features, labels, len(parts.classes), args.balance, args.seed)
    weight, bias = fit_logistic(features, labels, len(parts.classes), args.balance, penalty)
    run.accelerator.print(f"logistic regression on features {list(features.shape)}, penalty {penalty:g}: of {PENALTIES} the one with the "
                          f"lowest loss on {FOLDS} folds of the training pictures")
    with torch.no_grad():
        net.classifier.weight.copy_(weight)
        net.classifier.bias.copy_(bias)
    run.step = run.per_epoch  # it stands for the steps of its epoch


def validate(run, parts, data, args):
    """The numbers of an epoch and the confusion [K,K], of the averaged weights."""
    if run.accelerator.num_processes > 1:
        broadcast(list(parts.ema.module.buffers()))  # batch-norm statistics differ between processes: the first one's count
    return summary(evaluate(parts.ema.module, data, run.accelerator, args.batch_size, args.workers), len(parts.classes))


def rehearse(run, parts, args):
    """A training step and a validation batch before anything is trained: memory that runs out shows now and not in the night."""
    before = [buffer.clone() for buffer in run.model.buffers()]  # batch norm's statistics, which a step changes
    _, keys = run.plan(0)[0][1][0]
    train_mode(run, args.freeze_bn)
    step = run.rehearsal(collate([parts.train[key] for key in keys]), keys)
    try:
        train_step(run, step, args)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(f"--batch-size {args.batch_size} with --size {args.size}: a single picture comes down to one pixel, which "
                        "has no spread for batch norm: give a greater one, or --freeze-bn") from None
    step.update()
    for buffer, value in zip(run.model.buffers(), before):
        buffer.copy_(value)
    few = Paintings(parts.val.rows[:args.batch_size], parts.classes, args.size, mean=parts.val.mean, std=parts.val.std)
    evaluate(parts.ema.module, few, run.accelerator, args.batch_size, 0)
    loop.print_gpu_memory(run.accelerator)


def prepare(args, accelerator, resumed=False):
    """Flags -> (Run at its first step, Parts): rows, model, average, optimizer."""
    from timm.utils import ModelEmaV3
    classes, splits = read_data(args, accelerator.print)
    loop.seed_everything(args.seed)
    with accelerator.main_process_first():  # one downloads, the others find it
        model = build(args, classes, accelerator.print, blank=resumed).to(accelerator.device)
    if accelerator.is_main_process:
        checkpoints.print_parts(model)
    # before prepare, which ties forward to this very object. Warm-up: the decay of step t is 1 - t^(-2/3), so that the average
    # spans t^(2/3) steps and a run of 200 steps has a useful one too
    ema = ModelEmaV3(model, decay=args.ema, use_warmup=True)
    wrapped, optimizer = accelerator.prepare(model, loop.make_optimizer(model, args.lr, args.weight_decay))
    pixels = {name: tuple(model.pretrained_cfg[name]) for name in ("mean", "std")}  # what timm says that its weights are fed with
    parts = Parts(classes, *(Paintings(splits[split], classes, args.size, args.crop, args.seed, **pixels) for split in ("train", "val")),
                  ema)

    def plan(epoch):
        """The steps of loop.epoch_plan, with Paintings' keys as the numbers."""
        drawn = balance_classes(parts.train.labels, args.balance, args.seed, epoch).tolist()
        steps = loop.epoch_plan(len(drawn), args.batch_size, args.accumulation, args.seed, epoch, accelerator.process_index,
                                accelerator.num_processes)

        def keys(places):
            return [(drawn[place], epoch, place) for place in places]
        return [(keys(group), [(number, keys(places)) for number, places in share]) for group, share in steps]

    def load_state(last):
        for net, name in ((model, "state"), (ema.module, "ema")):
            checkpoints.load_strictly(net, last[name], f"{args.out}/last.pt")

    return Run("efficientnet", args.out, accelerator, model, wrapped, optimizer, rows=parts.train.rows, plan=plan,
               batches=lambda epoch, left: loaders.load_batches(parts.train, collate, loop.keys_of(left), args.workers),
               epochs=args.epochs, lr=lambda step, total: loop.cosine_lr(step, total, round(args.warmup * total), args.lr),
               seed=args.seed, metric="f1", settings=settings(args, parts, accelerator),
               best=lambda: best_of(args, parts), state=lambda: {"state": model.state_dict(), "ema": ema.module.state_dict()},
               load_state=load_state, clip=CLIP, columns=LOG_COLUMNS, panels=PANELS, unit="pictures", save_last=args.save_last,
               profile=args.profile, title=f"{pathlib.Path(args.out).name}: {args.arch}, {args.size} px", workers=args.workers,
               pictures=[[row.image for row in data.rows] for data in (parts.train, parts.val)],
               # best.pt; last.pt with weights, average and AdamW's two; of each the old and the new file
               disk=sum(t.nbytes for t in model.state_dict().values()) * (10 if args.save_last else 2)), parts


def report(run, parts):
    """confusion.png, per_class.csv and the printed table, all of the best epoch."""
    best = run.progress
    write_report(run.out, np.array(best["confusion"]), parts.classes, Counter(row.style for row in parts.train.rows),
                 f"{run.out.name}, epoch {best['epoch']}: macro F1 {best['value']:.3f}; per cent of each row")


def dry_run(args):
    """--dry-run: three rows, the table of parts, memory; nothing is written."""
    accelerator = loop.make_accelerator(args.precision)
    run, parts = prepare(args, accelerator)
    for number in range(min(3, len(parts.train))):
        row = parts.train.rows[number]
        accelerator.print(f"{row.name} -> {parts.classes[parts.train.labels[number]]}")
    loop.dry_run(run, lambda run: rehearse(run, parts, args))


def main(argv=None):
    args = get_args(argv)
    for note in environment.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        return wikiart.check_data(args.data, args.workers, **reading(args))
    with errors.batch_size_in_memory_errors(args.batch_size):
        if args.dry_run:
            return dry_run(args)
        run = train(args)
    return run.result("macro F1", __file__, argv)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
