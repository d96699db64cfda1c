"""pretrain_qformer.py: BLIP-2 stage 1: a Q-Former learns what of a picture belongs to a text, from caption pairs.

    python pretrain_qformer.py --data coco=data/coco --data vg=data/vg                 # ViT-g and bert-base, GPUs of 40 GB
    python pretrain_qformer.py --data drawn=data/artquest --blip2 tiny --lr 1e-3 --epochs 8   # laptop CPU
    python pretrain_qformer.py --convert blip2_pretrained.pth --out runs/lavis         # LAVIS stage 1 -> HuggingFace's format
    python train_cir.py --data data/cirr --qformer runs/qformer/hf                     # or train_gated.py --qformer runs/qformer/hf

Three losses on one Q-Former (Li et al. 2023, BLIP-2): image-text contrast (ITC), matching with hard negatives (ITM), and
captioning that sees the picture through the queries alone (ITG). Frozen: the vision tower. Data flow: caption files -> Pair ->
Captioned -> Collate -> Stage1.forward -> losses; the best weights end in OUT/hf, which transformers loads. Copy and edit it.
"""

import math
import pathlib
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, send_to_device
from torch import nn

import core
import metrics
from data import pairs, rows, shards
from data.pairs import Captioned
from engine import checkpoints, environment, errors, files, flags, loaders, loop, mixed_epochs, published, runfolder, stage1
from engine.errors import DataError
from engine.galleries import rerank
from engine.gathering import gather, gather_text
from engine.run import Run, resumes
from engine.stage1 import BERT
from engine.text import text_of

DEFAULT = published.DEFAULTS["blip2-itm"]
NEXT = "transformers' Blip2ForImageTextRetrieval, train_cir.py --blip2 and train_gated.py --qformer"  # what takes OUT/hf
SMOOTHING = 0.1  # of ITC's targets and of ITG's, as in LAVIS
RECALLS = tuple(f"{side} R@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10))
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "itc", "itc chance", "itm", "itm chance", "itg", "itg chance", "temp",
               "grad_norm", *RECALLS, "mean",
               *(f"reranked {name}" for name in RECALLS), "reranked mean", "itm_accuracy")
PANELS = [("losses", [("step", name, name) for name in ("itc", "itc chance", "itm", "itm chance", "itg")]),
          ("validation, recall in %", [("epoch", "mean", "ITC"), ("epoch", "reranked mean", "re-ranked by ITM"),
                                       ("epoch", "t2i R@1", "t2i R@1"), ("epoch", "i2t R@1", "i2t R@1")]),
          ("validation ITG", [("epoch", "itg", "validation ITG")]),
          ("gradient norm", [("step", "grad_norm", "gradient norm")])]


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", action="append", default=[], metavar="NAME=PLACE",
                      help="a set of caption pairs, any number of times: a folder or JSON file of COCO's (Karpathy), Visual "
                           "Genome's or the plain {file: captions} kind, or WebDataset shards (folder of .tar, or a brace pattern)")
    data.add_argument("--images", metavar="DIR", help="image root of all sets (default: PLACE/images, else PLACE)")
    data.add_argument("--encoding", default="utf-8", help="of the caption files (default: utf-8)")
    data.add_argument("--val-share", type=flags.share, default=0.1, help="share of the pictures held out where no set has a "
                                                                             "validation file (default: 0.1)")
    data.add_argument("--skip-bad", type=flags.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                      help="leave missing or broken pictures out and list them, up to this share (0.01 where no number is given)")
    data.add_argument("--skip-broken", action="store_true",
                      help="leave broken samples and shards of WebDataset sets out and list them")
    data.add_argument("--check-data", action="store_true", help="read everything, print what is there, and stop; loads no weight")
    data.add_argument("--dry-run", action="store_true", help="show what the model reads and the memory it takes, rehearse the "
                                                             "longest batch, and stop; nothing is written")
    data.add_argument("--workers", type=flags.whole, default=2, help="loader processes (default: 2)")
    model = parser.add_argument_group("model")
    model.add_argument("--blip2", default=DEFAULT, metavar="ID|DIR|tiny",
                       help="whose vision tower: any BLIP-2 in HuggingFace's format, or its vision part alone; tiny ships with "
                            f"the project (default: {DEFAULT})")
    model.add_argument("--init", metavar="ID|DIR|FILE|random",
                       help="where the Q-Former starts: a BERT, a BLIP-2 in image-text-retrieval format, a LAVIS stage-1 .pth, or "
                            f"random (default: {BERT}; of a folder of tools/assemble.py its own; with --blip2 tiny random)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=flags.positive, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=flags.positive, default=100, help="pairs a step and process (default: 100)")
    run.add_argument("--lr", type=flags.rate, default=1e-4, help="peak learning rate (default: 1e-4)")
    run.add_argument("--text-lr", type=flags.weight, default=1.0, metavar="SCALE",
                     help="rate of the text path that --init has trained already, as a multiple of --lr: with few pictures a small one "
                          "keeps what it knows (default: 1, as LAVIS)")
    run.add_argument("--min-lr", type=flags.weight, default=1e-5, help="at the end of the cosine (default: 1e-5)")
    run.add_argument("--warmup", type=flags.whole, default=5000, metavar="STEPS",
                     help="steps of warm-up, at most a tenth of all (default: 5000)")
    run.add_argument("--weight-decay", type=flags.weight, default=0.05, help="not on biases and norms (default: 0.05)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--max-val", type=flags.positive, default=1000, help="validation pictures scored (default: 1000)")
    run.add_argument("--rerank", type=flags.whole, default=16, metavar="K",
                     help="matches re-ranked by ITM; 0 = none (default: 16)")
    run.add_argument("--seed", type=flags.whole, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/qformer", metavar="DIR", help="run folder (default: runs/qformer)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--profile", action="store_true", help="time the phases of the steps: a table at the end, OUT/profile.csv")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    other = parser.add_argument_group("without training")
    other.add_argument("--convert", metavar="FILE", help="write OUT/hf of this LAVIS stage-1 .pth or best.pt, with the tower "
                                                              "of --blip2, and stop")
    flags.put_first(parser, "--data", "--blip2", "--out", "--epochs", "--batch-size", "--lr")
    args = flags.parse_args(parser, argv)
    if not args.data and (args.check_data or not args.convert):
        parser.error("--data NAME=PLACE is needed, but for --convert")
    if not args.init:
        own = published.in_models(args.blip2)
        args.init = "random" if args.blip2 == "tiny" else args.blip2 if published.with_text(own) != own else BERT
    return args


# --- data: your own data set goes here ------------

def data_places(args):
    """--data -> ({name: place} of caption files, {name: place} of tar files)."""
    places = pairs.named_places(args.data)
    tars = {name: place for name, place in places.items() if shards.is_shards(place)}
    files = {name: place for name, place in places.items() if name not in tars}
    if not files:
        raise DataError("--data: only sets of tar files: add one with pictures in a folder, of which a part is held out "
                        "for validation")
    return files, tars


def read_data(args, log=print):
    """--data -> (training Pairs, validation Pairs of --max-val pictures, [Shard]); bad ones refused, with --skip-bad left out."""
    files, tars = data_places(args)
    train, val = (pairs.read_sets(files, split, args.images, args.skip_bad, args.val_share, args.encoding, args.workers, log)
                  for split in ("train", "val"))
    shown = set(pairs.first_pictures(val, args.max_val))
    if len(shown) < len({pair.image_id for pair in val}):
        log(f"val: {len(shown)} of its pictures are scored (--max-val)")
    streamed = [shard for name, place in tars.items() for shard in
                shards.count_samples(shards.shard_files(place), name, pathlib.Path(args.out) / "shards.json", args.skip_broken,
                                     log)]
    return train, [pair for pair in val if pair.image_id in shown], streamed


def check_data(args):
    """--check-data: print what is there; exit code 1 when training would fail. No weight is loaded."""
    files, tars = data_places(args)
    absent = published.format_missing({"BLIP-2": published.missing_model(args.blip2, "blip2-itm")})
    failed = pairs.check(files, args.images, args.skip_bad, args.val_share, args.encoding, args.workers, absent)
    if shards.check(tars, args.skip_broken):
        print("training would fail at the tar files")
        failed = 1
    return failed


class Collate:
    """Samples of Captioned or of a ShardStream -> batch: images [B,3,s,s], input_ids, attention_mask [B,L], image_ids [B], and
    the Pairs themselves for messages."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, samples):
        if fault := loaders.fault_of(samples):
            return fault
        images, batch = zip(*samples)
        return {"images": torch.stack(images), **core.text_ids(self.tokenizer, [pair.text for pair in batch]),
                "image_ids": torch.tensor([pair.image_id for pair in batch]), "pairs": batch}


# --- model ------------

class CaptionHead(nn.Module):
    """BERT's masked-language-model head: [.., H] -> logits over words, whose embeddings are the output weights (tied)."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.transform = nn.ModuleDict({"dense": nn.Linear(H, H), "LayerNorm": nn.LayerNorm(H, eps=config.layer_norm_eps)})
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states, words):
        """states [..,H], words [V,H] -> [..,V]."""
        return F.linear(self.transform.LayerNorm(F.gelu(self.transform.dense(states))), words, self.bias)


class Stage1(core.Blip2Retrieval):
    """Blip2Retrieval with the captioning head and the three losses of stage 1."""

    def __init__(self, vision_model, config, tokenizer):
        super().__init__(vision_model, config, tokenizer)
        self.lm_head = CaptionHead(config.qformer_config)
        # [DEC] starts a caption that is generated; in BLIP-2's vocabulary it is the last of 30,523
        self.dec = config.qformer_config.vocab_size - 1

    def forward(self, image_embeds, input_ids, attention_mask, image_ids, negatives=None):
        """Losses of a batch of pairs: image_embeds [B,P,W] of the vision tower, text [B,L], image_ids [B]: one number for all
        pairs of an image. Features are gathered over all processes, with gradient: the ITC of two processes is that of one with the
        whole batch, and so is ITM but for the negatives drawn; ITG is the mean over each process's own words, which weighs words of short
        captions a little otherwise. negatives: (image of each text, text of each image), [B] each, instead of drawing them.
        Returns {"loss", "itc", "itm", "itg"}: scalars.
        """
        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = self.dec
        # under this mask queries see no text, so that one pass gives ITC's queries and ITG's text
        states = self.joint(image_embeds, decoder_ids, attention_mask, core.unilm_mask)  # [B,Q+L,H]
        Q = self.query_tokens.shape[1]
        images = F.normalize(self.vision_projection(states[:, :Q]), dim=-1)  # [B,Q,E]
        texts = self.text_features(input_ids, attention_mask)  # [B,E]
        everyone = gather(image_ids)  # [N]
        t2i = core.max_similarity(texts, gather(images)) / self.temp  # [B,N]
        i2t = core.max_similarity(gather(texts), images).T / self.temp  # [B,N]
        targets = core.itc_targets(image_ids, everyone, SMOOTHING)
        parts = {"itc": core.itc_loss(i2t, t2i, targets).mean(),
                 "itm": self.matching(image_embeds, input_ids, attention_mask, i2t, t2i, image_ids, everyone, negatives),
                 "itg": self.captioning(states[:, Q:], decoder_ids, attention_mask)}
        return {"loss": sum(parts.values()), **{name: part.detach() for name, part in parts.items()}}

    def matching(self, image_embeds, input_ids, attention_mask, i2t, t2i, image_ids, everyone, negatives=None):
        """ITM: does the text belong to the image? Each text meets a hard negative image and each image a hard negative text.

        A text whose batch holds no other image has no negative, and its two rows are left out."""
        other = image_ids[:, None] != everyone[None]  # [B,N]
        image_of, text_of = negatives or (draw_negatives(t2i, other), draw_negatives(i2t, other))
        all_images, all_ids, all_masks = gather(image_embeds), gather_text(input_ids), gather_text(attention_mask)
        own_ids, own_mask = (F.pad(x, (0, all_ids.shape[1] - x.shape[1])) for x in (input_ids, attention_mask))
        logits = self.match(torch.cat([image_embeds, all_images[image_of], image_embeds]),
                            torch.cat([own_ids, own_ids, all_ids[text_of]]), torch.cat([own_mask, own_mask, all_masks[text_of]]))
        wrong = torch.zeros_like(image_ids).masked_fill(~other.any(1), -100)
        return F.cross_entropy(logits, torch.cat([torch.ones_like(image_ids), wrong, wrong]), ignore_index=-100)

    def match(self, image_embeds, input_ids, attention_mask):
        """ITM logits [B,2] (no, yes): the mean over the queries, which see image and text."""
        states = self.joint(image_embeds, input_ids, attention_mask)[:, :self.query_tokens.shape[1]]
        return self.itm_head(states).mean(1)

    def caption_loss(self, image_embeds, input_ids, attention_mask):
        """ITG alone, as in forward."""
        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = self.dec
        states = self.joint(image_embeds, decoder_ids, attention_mask, core.unilm_mask)
        return self.captioning(states[:, self.query_tokens.shape[1]:], decoder_ids, attention_mask)

    def captioning(self, states, decoder_ids, attention_mask):
        """ITG: next-word cross-entropy. states [B,L,H] of the text under unilm_mask."""
        logits = self.lm_head(states[:, :-1], self.embeddings.word_embeddings.weight)  # [B,L-1,V]
        labels = decoder_ids.masked_fill(attention_mask == 0, -100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, label_smoothing=SMOOTHING)


def draw_negatives(logits, other):
    """One column for each row, drawn by softmax of the logits [B,N] among those that are `other` images (any, where none is)."""
    weights = logits.detach().float().masked_fill(~other, -torch.inf)
    weights = weights.masked_fill(~other.any(1, keepdim=True), 0.0).softmax(1)
    return torch.multinomial(weights, 1)[:, 0]


def is_text(name):
    """Does a parameter of Stage1 belong to the text path, which a BERT or an earlier stage 1 has trained? Its self-attention and norm
    serve the queries too; theirs alone are cross-attention, query feed-forwards and heads."""
    return name.startswith(("embeddings.", "qformer.")) and "crossattention" not in name and "_query." not in name


def load_model(args, dtype, log=print):
    """--blip2 (vision tower) and --init (Q-Former, tokenizer) -> Stage1. A Q-Former that is converted may not come from behind another
    tower."""
    return stage1.load(Stage1, args.blip2, args.init, dtype, strict=bool(args.convert), log=log)


# --- evaluation ------------

@torch.no_grad()
def evaluate(model, data, collate, accelerator, batch_size, workers, rerank_best):
    """Recalls in percent, ITM accuracy and ITG loss over the pairs of `data`. Every process does all of it.

    Each picture goes through the tower once. ITM accuracy: each text with its image, and with the wrong image nearest to it.
    rerank_best: matches that ITM re-ranks, 0 = none.
    """
    model.eval()
    ids = [pair.image_id for pair in data.rows]
    first = {image_id: number for number, image_id in reversed(list(enumerate(ids)))}  # the first pair of each picture
    pictures = list(dict.fromkeys(ids))
    batches = [[(0, first[i]) for i in pictures[start:start + batch_size]] for start in range(0, len(pictures), batch_size)]
    kept, images = [], []
    for _, batch in loaders.each_batch(data, collate, batches, accelerator, workers, "encoding"):
        embeds = model.image_embeds(batch["images"])
        kept.append(embeds.to(next(model.vision_model.parameters()).dtype).cpu())  # [B,P,W]; half precision where the tower has it
        with accelerator.autocast():
            images.append(model.image_features(embeds).float())
    kept, images = torch.cat(kept), torch.cat(images)  # [G,P,W], [G,Q,E]
    text = send_to_device(core.text_ids(model.tokenizer, [pair.text for pair in data.rows]), accelerator.device)
    owner = torch.tensor([pictures.index(image_id) for image_id in ids])  # [T]
    shares = [(numbers, {name: tensor[numbers.to(tensor.device)] for name, tensor in text.items()})
              for numbers in torch.arange(len(ids)).split(batch_size)]
    texts, itg, right = [], [], []
    with accelerator.autocast():
        for numbers, part in shares:
            texts.append(model.text_features(**part).float())
            itg += [model.caption_loss(kept[owner[numbers]].to(accelerator.device).float(), **part).item()] * len(numbers)
        cosines = core.max_similarity(torch.cat(texts), images).cpu()  # [T,G]
        wrong = cosines.scatter(1, owner[:, None], -2.0).argmax(1)  # [T]
        for numbers, part in shares if len(pictures) > 1 else ():
            for picture, label in ((owner, 1), (wrong, 0)):
                answers = model.match(kept[picture[numbers]].to(accelerator.device).float(), **part).argmax(1)
                right += (answers == label).tolist()
        results = metrics.retrieval_scores(cosines.numpy(), cosines.T.numpy(), owner.numpy())
        if rerank_best:
            tables = [scores.numpy() for scores in rerank(model, cosines, kept, **text, k=rerank_best, chunk=batch_size)]
            results |= {f"reranked {name}": value for name, value in metrics.retrieval_scores(*tables, owner.numpy()).items()}
    return {**results, "itm_accuracy": 100 * float(np.mean(right or [math.nan])), "itg": float(np.mean(itg))}


def chance_losses(model, pairs_of_step):
    """Losses of a model that knows nothing: ITC of equal logits, ITM of the share of right pairs alone, ITG of equal words."""
    return {"itc": math.log(pairs_of_step), "itm": math.log(3) - 2 / 3 * math.log(2), "itg": math.log(model.dec + 1)}


def format_metrics(numbers):
    """Numbers for the terminal: name value, with two decimals."""
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())


# --- checkpoints ------------

def best_of(args, model, frozen, precision):
    """What best.pt holds: trained tensors and plain values only."""
    return {"state": checkpoints.trainable_state(model), "model_args": {"blip2": args.blip2, "init": args.init}, "args": vars(args),
            "frozen": frozen, "precision": precision, "ln_vision": model.ln_vision}


def settings(args, parts, accelerator):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ["out", "resume", "save_last", "profile", "config", "images", "data", "check_data", "dry_run", "skip_bad", "skip_broken",
            "convert"]
    if not parts.stream.shards:
        free.append("workers")  # which of them reads what of a tar file decides the order
    return {**runfolder.settings_of(vars(args), free, precision=accelerator.mixed_precision),
            "pictures (sizes)": rows.sizes_hash(row.image for row in [*parts.train.rows, *parts.val.rows]),
            "training pairs (hash)": pairs.fingerprint(parts.train.rows),
            "validation pairs (hash)": pairs.fingerprint(parts.val.rows),
            "tar files": [[pathlib.Path(shard.path).name, shard.samples] for shard in parts.stream.shards],
            "processes": parts.stream.processes}


def export_best(run, args):
    """OUT/hf: the weights of the best epoch, which need not be the last, and the tower as its source keeps it."""
    if run.accelerator.is_main_process and run.progress["value"] is not None:
        path = run.out / "best.pt"
        checkpoints.load_trainable(run.model, checkpoints.load_checkpoint(path)["state"], path)
        stage1.export_trained(run.model, run.out / "hf", args.blip2, path)
        print(f"{run.out / 'hf'}: for {NEXT}")


# --- the loop ------------

class Parts(NamedTuple):
    """What a run is made of beside the Run."""
    train: Captioned
    val: Captioned
    stream: shards.ShardStream
    collate: Collate


def train_step(run, step):
    """Forward and backward of one optimizer step: a single batch, since the contrast is between all pairs of a step."""
    for batch in step:
        step.rows = batch.pop("pairs")
        embeds = run.model.image_embeds(batch.pop("images"))  # [B,P,W]
        with step.forward():
            parts = run.wrapped(embeds, **batch)
        step.backward(**parts)


def train(args):
    """The whole training -> its Run."""
    accelerator = start(args)
    resumed = resumes(accelerator, args.out, args.resume)
    run, parts = prepare(args, accelerator)
    with run.open(resumed, vars(args), __file__):
        by_chance = chance_losses(run.model, len(run.plan(0)[0][0]))
        print_start(run, parts, args, by_chance)
        rehearse(run, parts, args)
        for epoch in run.epochs():
            run.wrapped.train()
            for step in run.steps(epoch):
                train_step(run, step)
                step.update(temp=run.model.temp, **{f"{name} chance": value for name, value in by_chance.items()})
            numbers = validate(run, parts, parts.val, args)
            if run.end_epoch({**numbers, "temp": run.model.temp.item()}):
                run.save_best()
        export_best(run, args)
    return run


def validate(run, parts, data, args):
    """evaluate() of `data`; the first process's numbers count, so that all decide alike."""
    numbers = evaluate(run.model, data, parts.collate, run.accelerator, args.batch_size, args.workers, args.rerank)
    of_first = broadcast(torch.tensor(list(numbers.values()), dtype=torch.float64, device=run.accelerator.device))
    return dict(zip(numbers, of_first.tolist()))


def rehearse(run, parts, args):
    """The longest captions as a batch, and a validation batch, before anything is trained: memory that runs out shows now."""
    count = min(args.batch_size, len(parts.train) // run.accelerator.num_processes)  # the same on each process
    picked = sorted(range(len(parts.train)), key=lambda n: len(parts.train.rows[n].text))[-count:]
    run.wrapped.train()
    step = run.rehearsal(parts.collate([parts.train[0, n] for n in picked]), picked)
    train_step(run, step)
    step.update()
    validate(run, parts, Captioned(parts.val.rows[:args.batch_size], parts.val.size), args)
    loop.print_gpu_memory(run.accelerator)


def print_start(run, parts, args, by_chance):
    """What is trained on, and what a model that knows nothing would score (by_chance: see chance_losses)."""
    images, streamed = len({pair.image_id for pair in parts.val.rows}), sum(shard.samples for shard in parts.stream.shards)
    batch = args.batch_size * run.accelerator.num_processes
    run.accelerator.print(f"{len(parts.train)} training pairs and {streamed} in tar files, {len(parts.val)} validation pairs of {images} "
                          f"pictures; {run.total} steps of {min(len(parts.train), batch)}, lr {args.lr:g}, "
                          f"precision {run.accelerator.mixed_precision}, {run.accelerator.device}")
    if streamed:
        run.accelerator.print("the pictures of the tar files are not among those that best.pt knows, nor looked for in the validation")
    by_luck = metrics.retrieval_chance([pair.image_id for pair in parts.val.rows])
    run.accelerator.print(f"a model that knows nothing: {format_metrics(by_chance)}; recall of a random order: {format_metrics(by_luck)}")


def start(args):
    """Refuse what cannot be trained -> Accelerator."""
    published.refuse_missing({"BLIP-2": published.missing_model(args.blip2, "blip2-itm")})
    return loop.make_accelerator(args.precision)


def prepare(args, accelerator):
    """Flags -> (Run at its first step, Parts): pairs, model, optimizer."""
    with accelerator.main_process_first():  # one counts the tar files' samples, the others find the counts
        train_pairs, val_pairs, streamed = read_data(args, accelerator.print)
    loop.seed_everything(args.seed)
    with accelerator.main_process_first():  # one process fetches what the hub alone has, the others find it
        model = load_model(args, core.DTYPES[accelerator.mixed_precision], accelerator.print)
    published.refuse_unknown_words(model.tokenizer, [pair.text for pair in [*train_pairs, *val_pairs]], args.init)
    parts = Parts(Captioned(train_pairs, model.image_size, args.seed), Captioned(val_pairs, model.image_size),
                  shards.ShardStream(streamed, model.image_size, args.seed, accelerator.process_index, accelerator.num_processes),
                  Collate(model.tokenizer))
    return make_run(args, accelerator, model, parts), parts


def make_run(args, accelerator, model, parts):
    """The Run of a model on its Parts."""
    if accelerator.is_main_process:
        checkpoints.print_parts(model)

    def scale_of(name):
        return args.text_lr if is_text(name) else 1.0

    wrapped, optimizer = accelerator.prepare(model, loop.make_optimizer(model, args.lr, args.weight_decay, scale_of))
    frozen = checkpoints.fingerprint(model)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    tower = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)  # at most: as its source keeps it
    return Run("qformer", args.out, accelerator, model, wrapped, optimizer, epochs=args.epochs, seed=args.seed, metric="mean",
               rows=[*parts.train.rows, SimpleNamespace(name="the tar files", line=0)],
               plan=lambda epoch: mixed_epochs.epoch_plan(parts.train, parts.stream, args.batch_size, args.seed, epoch),
               batches=lambda epoch, left: mixed_epochs.load_epoch(parts.train, parts.stream, parts.collate, args.batch_size, epoch, left,
                                                                   args.workers, args.skip_broken, accelerator.print),
               lr=lambda step, total: loop.cosine_lr(step, total, min(args.warmup, total // 10), args.lr, min(args.min_lr, args.lr)),
               settings=settings(args, parts, accelerator), frozen=frozen, base=("vision tower", "--blip2"),
               best=lambda: best_of(args, model, frozen, accelerator.mixed_precision),
               # AdamW keeps twice the weights; old and new file; at the end OUT/hf
               disk=trained * (9 if args.save_last else 3) + tower, save_last=args.save_last, profile=args.profile, unit="pairs",
               workers=args.workers, pictures=[[pair.image for pair in data.rows] for data in (parts.train, parts.val)],
               columns=LOG_COLUMNS, panels=PANELS, title=f"{pathlib.Path(args.out).name}: {args.blip2}, Q-Former from {args.init}",
               format_metrics=lambda numbers: format_metrics({name: value for name, value in numbers.items() if name != "temp"}))


def dry_run(args):
    """--dry-run: three pairs, the table of parts (make_run prints it), memory; nothing is written."""
    run, parts = prepare(args, start(args))
    for pair in parts.train.rows[:3]:
        ids = core.text_ids(run.model.tokenizer, [pair.text])["input_ids"][0]
        run.accelerator.print(f"{pair.name}: {text_of(run.model.tokenizer, ids, special=True)!r}; picture {pair.image_id}")
    loop.dry_run(run, lambda run: rehearse(run, parts, args))


def convert(args):
    """--convert: a LAVIS stage-1 .pth or a best.pt as a folder in HuggingFace's format."""
    folder = pathlib.Path(args.out) / "hf"
    if folder.exists():
        raise DataError(f"{folder} is there already: choose another --out")
    files.refuse_unwritable(folder)
    args.init = args.convert
    published.refuse_missing({"BLIP-2": published.missing_model(args.blip2, "blip2-itm")})
    model = load_model(args, None)
    stage1.export(model, folder, model.vision_model, model.ln_vision)
    print(f"{folder}: for {NEXT}")


def main(argv=None):
    args = get_args(argv)
    for note in environment.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        return check_data(args)
    if args.convert:
        return convert(args)
    with errors.batch_size_in_memory_errors(args.batch_size, "the --batch-size"):  # there is no --accumulation here
        if args.dry_run:
            return dry_run(args)
        run = train(args)
    return run.result("mean recall", __file__, argv)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
