"""train_cir.py: composed image retrieval: a reference picture and a sentence ("the same dog, but lying on grass") find the target.

    python train_cir.py --data data/cirr                                        # BLIP-2 ViT-g, one GPU of 24-80 GB
    python train_cir.py --data data/cirr --blip2 tiny --lr 1e-3 --epochs 8      # the drawn set, laptop CPU
    python train_cir.py --data data/cirr --checkpoint runs/cir/best.pt --submit submission --gate-maps maps
    python train_cir.py --search "on the grass" --image dog.jpg --gallery photos --checkpoint runs/cir/best.pt

The system is SPRC (Bai et al. 2024) with a gated fusion of the sentence into the reference picture's patches, before the Q-Former
looks at them. Trained: Q-Former, heads, prompts, fusion; frozen: the vision tower. Data flow: annotations -> Query -> Triplets ->
Collate -> Sprc.forward -> losses; validation, --submit, --gate-maps and --search all go through Sprc.query. Copy and edit it.
"""

import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import core
from data import cirr, rows
from engine import (checkpoints, environment, errors, files, flags, galleries, loaders, loop, pages, picture_index, published, retrieval,
                    runfolder, seen)
from engine.errors import DataError
from engine.galleries import Opener
from engine.retrieval import chance, chance_text, format_metrics, mean_of
from engine.run import Run, resumes
from engine.text import text_of

DEFAULT = published.DEFAULTS["blip2-itm"]
MODEL_ARGS = ("blip2", "no_gate", "spatial_attention", "transform", "target_ratio", "loss_rtc")  # kept in best.pt
FREE = ("out", "resume", "save_last", "profile", "config", "workers", "images", "data", "check_data", "dry_run", "skip_bad", "checkpoint",
        "submit", "gate_maps", "report", "search", "image", "gallery", "top", "cache")  # flags that may differ on --resume
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "itc", "rtc", "align", "patch", "temp", "grad_norm", "change", "R@1", "R@5", "R@10",
               "R@50", "Rs@1", "Rs@2", "Rs@3", "mean")
PANELS = [("loss", [("step", name, label) for name, label in (("loss", "sum"), ("itc", "itc"), ("rtc", "rtc"), ("align", "align"))]),
          ("validation", [("epoch", name, name) for name in ("mean", "R@1", "R@5", "R@10", "Rs@1")]),
          ("gradient norm", [("step", "grad_norm", "gradient norm")]),
          ("change by the gate", [("epoch", "change", "relative change of the patches")])]


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="folder with captions/ and image_splits/ of CIRR or FashionIQ")
    data.add_argument("--format", choices=tuple(cirr.SPLITS), default="cirr",
                      help="whose layout it is; circo, several right answers a query, is for --checkpoint alone (default: cirr)")
    data.add_argument("--images", metavar="DIR", help="image root (default: the first of DATA/img_raw, DATA/images, DATA that fits)")
    data.add_argument("--transform", choices=("targetpad", "squarepad", "plain"), default="targetpad",
                      help="pad to a ratio and crop, pad to a square, or squash (default: targetpad)")
    data.add_argument("--target-ratio", type=flags.rate, default=1.25, help="of targetpad, 1 or more (default: 1.25)")
    data.add_argument("--skip-bad", type=flags.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                      help="leave missing or broken pictures out and list them, up to this share (0.01 where no number is given); "
                           "recall is then over a smaller gallery")
    data.add_argument("--check-data", action="store_true", help="read everything, list missing pictures, and stop; loads no weight")
    data.add_argument("--dry-run", action="store_true",
                      help="show what the model reads and the memory it takes, rehearse the longest batch, and stop; nothing is written")
    data.add_argument("--workers", type=flags.whole, default=2, help="loader processes (default: 2)")
    data.add_argument("--cache", metavar="DIR", help="keep the vision tower's features there, computed once: 0.7 MB a picture in "
                                                     "bf16 (default: none, the tower runs in every step)")
    model = parser.add_argument_group("model")
    model.add_argument("--blip2", metavar="ID|DIR|tiny", help="HuggingFace id or folder in its image-text-retrieval format, or "
                                                              f"tiny (ships with the project); default {DEFAULT}")
    model.add_argument("--qformer", metavar="DIR|FILE",
                       help="Q-Former and heads from elsewhere: a folder of pretrain_qformer.py, or a LAVIS stage-1 .pth")
    model.add_argument("--no-gate", action="store_true", help="SPRC without the gated fusion, the baseline")
    model.add_argument("--spatial-attention", action="store_true", help="the sentence also says where in the picture the fusion acts")
    loss = parser.add_argument_group("loss (0 switches a term off)")
    loss.add_argument("--loss-rtc", type=flags.weight, default=0.4, help="learned prompts with the sentence find the target (default: 0.4)")
    loss.add_argument("--loss-align", type=flags.weight, default=0.4, help="the sentence-level prompt near the learned ones (default: 0.4)")
    loss.add_argument("--loss-patch", type=flags.weight, default=0.0,
                      help="late interaction of query tokens with target tokens (default: 0)")
    loss.add_argument("--hard-batch", type=flags.weight, default=0.0, metavar="BETA",
                      help="weigh the negatives of a batch by exp(BETA cosine) (default: 0)")
    loss.add_argument("--hard-set", type=flags.whole, default=0, metavar="N",
                      help="N more negatives from the query's own image set, at most 4 (default: 0)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=flags.positive, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=flags.positive, default=64,
                     help="queries a step and process, each the others' negative (default: 64)")
    run.add_argument("--lr", type=flags.rate, default=1e-5, help="peak learning rate (default: 1e-5)")
    run.add_argument("--warmup", type=flags.share, default=0.02, help="share of all steps spent warming up (default: 0.02)")
    run.add_argument("--weight-decay", type=flags.weight, default=0.05, help="not on biases and norms (default: 0.05)")
    run.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                     help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    run.add_argument("--validation-frequency", type=flags.positive, default=1, metavar="EPOCHS", help="(default: 1)")
    run.add_argument("--seed", type=flags.whole, default=42, help="(default: 42)")
    run.add_argument("--out", default="runs/cir", metavar="DIR", help="run folder (default: runs/cir)")
    run.add_argument("--save-last", action="store_true", help="write last.pt after every validation")
    run.add_argument("--resume", action="store_true", help="go on from OUT/last.pt where there is one, else start")
    run.add_argument("--profile", action="store_true", help="time the phases of the steps: a table at the end, OUT/profile.csv")
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    look = parser.add_argument_group("evaluation and search")
    look.add_argument("--checkpoint", metavar="DIR|FILE",
                      help="a run folder or its best.pt: score the validation split, or use it for --search")
    look.add_argument("--submit", metavar="DIR",
                      help="write the two files of CIRR's test server for the split test1, or the one of CIRCO's for test")
    look.add_argument("--gate-maps", metavar="DIR",
                      help="a picture for each of 8 validation queries: what the gate changed, what was found")
    look.add_argument("--report", metavar="FILE.html", help="a page with recalls and their intervals, curves and queries with what "
                                                            "was found; after a training of its best epoch")
    look.add_argument("--search", metavar="TEXT", help="find pictures of --gallery by --image and this text")
    look.add_argument("--image", metavar="FILE", help="reference picture of --search, whose matches go to OUT/search.html too")
    look.add_argument("--gallery", metavar="DIR", help="folder of pictures, indexed once")
    look.add_argument("--top", type=flags.positive, default=12, help="matches shown (default: 12)")
    flags.put_first(parser, "--data", "--blip2", "--out", "--epochs", "--batch-size", "--lr")
    args = flags.parse_args(parser, argv)
    if args.search is not None and not (args.image and args.gallery and args.checkpoint):
        parser.error("--search needs --image, --gallery and --checkpoint")
    if args.search is None and not args.data:
        parser.error("--data is needed, but for --search")
    if (args.submit or args.gate_maps) and not args.checkpoint:
        parser.error("--submit and --gate-maps need --checkpoint")
    if args.report and args.search is not None:
        parser.error("--report is of an evaluation: leave --search out")
    if args.submit and args.format not in cirr.UNSEEN:
        parser.error("--submit writes what CIRR's or CIRCO's test server wants: FashionIQ has none")
    if args.format == "circo" and (args.report or not (args.checkpoint or args.check_data)):
        parser.error("--format circo has no training split and more than one right answer: it goes with --checkpoint or --check-data, "
                     "without --report")
    if args.hard_set > (4 if args.format == "cirr" else 0):
        parser.error("--hard-set is at most 4, the other members of CIRR's image sets; FashionIQ has none, nor has CIRCO")
    if args.spatial_attention and args.no_gate:
        parser.error("--spatial-attention weighs the gated fusion: leave --no-gate out")
    trains = not args.checkpoint and not args.check_data
    if trains and args.batch_size == 1 and not args.hard_set:
        parser.error("--batch-size 1 has no negatives, since the queries of a batch are each other's: 2 or more, or --hard-set")
    if trains and not args.loss_rtc and args.loss_align:
        parser.error("--loss-rtc 0 leaves the prompts untrained, and --loss-align would pull towards nothing: add --loss-align 0")
    if args.target_ratio < 1:
        parser.error("--target-ratio is the longer side over the shorter one: 1 or more")
    return args


# --- data: your own data set goes here ------------

def read_data(args, split, log=print):
    """The pools of a split, every picture found; missing ones refused, with --skip-bad left out and listed."""
    return cirr.read_split(args.data, args.format, split, args.images, skip_bad=args.skip_bad, workers=max(1, args.workers), log=log)


class Triplets(Dataset):
    """(epoch, number) -> (images [2+N,3,s,s], Query, sentence), or (the DataError of a broken picture, Query, "").

    images: reference, target, and with --hard-set N other members of the image set, another choice in every epoch.
    """

    def __init__(self, pools, open_picture, negatives=0, seed=0):
        self.rows = [query for pool in pools for query in pool.queries]
        self.paths = {name: path for pool in pools for name, path in pool.gallery.items()}
        self.open, self.negatives, self.seed = open_picture, negatives, seed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, number = key
        query, rng = self.rows[number], np.random.default_rng([self.seed, epoch, number])
        others = rng.permutation([name for name in query.members if name not in (query.reference, query.target)])
        try:
            names = (query.reference, query.target, *others[:self.negatives])
            return torch.stack([self.open(self.paths[name]) for name in names]), query, cirr.text_of(query, rng.random())
        except DataError as error:
            return error, query, ""


class Collate:
    """Samples of Triplets -> batch: images [B,2+N,3,s,s], input_ids, attention_mask [B,L], target_ids [B]."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, samples):
        images, queries, texts = zip(*samples)
        if fault := loaders.fault_of((found, query) for found, query, _ in samples):
            return fault
        targets = [query.target for query in queries]
        return {"images": torch.stack(images), **core.text_ids(self.tokenizer, texts),
                "target_ids": torch.tensor([targets.index(name) for name in targets])}


# --- model ------------

class ResidualFusion(nn.Module):
    """GatedFusionModule at the Q-Former's width, between two projections: out = image + up(fused - down(image)).

    up starts at zero, so a fresh fusion is the identity to the bit, whatever the vision width (1408 in BLIP-2). spatial: an
    attention of the sentence over the patches, with mean 1, weighs the change; it starts uniform.
    """

    def __init__(self, vision_width, hidden, spatial=False):
        super().__init__()
        self.down, self.up = nn.Linear(vision_width, hidden), nn.Linear(hidden, vision_width)
        self.module = core.GatedFusionModule(hidden)
        self.ask = nn.Linear(hidden, hidden) if spatial else None
        for last in (self.up, self.ask):
            if last is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, image, text, text_mask):
        """image [B,P,W], text [B,L,H], text_mask [B,L] -> [B,P,W]."""
        low = self.down(image)  # [B,P,H]
        change = self.module(low, text, text_mask) - low
        if self.ask is not None:
            asked = self.ask(core.masked_mean(text, text_mask))[:, :, None]  # [B,H,1]
            attention = (low @ asked / low.shape[-1] ** 0.5).softmax(1)  # [B,P,1], sums to 1 over the patches
            change = change * attention * attention.shape[1]
        return image + self.up(change)


class Sprc(core.Blip2Retrieval):
    """SPRC on BLIP-2 (Bai et al. 2024, "Sentence-level prompts benefit composed image retrieval"), with a fusion before it.

    Differs from the original in what was a fault there: the fusion also runs in validation; the sentence is the mean over its
    real tokens; text is padded to the batch and not to 32; two queries of a batch with one target are no negatives.
    """

    def __init__(self, vision_model, config, tokenizer, gate=True, spatial=False):
        super().__init__(vision_model, config, tokenizer)
        self.prompt_tokens = nn.Parameter(torch.randn_like(self.query_tokens) * 0.02)  # [1,Q,H]
        width = config.qformer_config.hidden_size
        self.fusion = ResidualFusion(config.vision_config.hidden_size, width, spatial) if gate else None
        del self.itm_head  # no loss of this stage uses it

    def fused(self, image_embeds, input_ids, attention_mask):
        """Reference patches [B,P,W] with the sentence fused in -> [B,P,W]."""
        if self.fusion is None:
            return image_embeds
        words = self.qformer.layernorm(self.embeddings(input_ids))  # [B,L,H], as the Q-Former itself takes them in
        return self.fusion(image_embeds, words, attention_mask)

    def query(self, image_embeds, input_ids, attention_mask):
        """Reference image [B,P,W] and sentence [B,L] -> (sentence-level prompt [B,Q,H], unit vectors [B,E])."""
        fused = self.fused(image_embeds, input_ids, attention_mask)
        Q = self.query_tokens.shape[1]
        prompt = self.joint(fused, input_ids, attention_mask)[:, :Q]
        # second pass without the image: the prompt stands before the text, everything takes the text path
        states = self.qformer(torch.cat([prompt, self.embeddings(input_ids)], 1), mask=core.padding_mask(attention_mask, Q))
        return prompt, F.normalize(self.text_projection(states[:, Q]), dim=-1)  # at the text's [CLS]

    def prompted(self, input_ids, attention_mask):
        """[CLS], the learned prompts, the rest of the text, without any image -> unit vectors [B,E]."""
        words = self.embeddings.word_embeddings(input_ids)  # [B,L,H]
        whole = torch.cat([words[:, :1], self.prompt_tokens.expand(len(words), -1, -1), words[:, 1:]], 1)  # [B,Q+L,H]
        places = self.embeddings.position_embeddings(torch.arange(whole.shape[1], device=whole.device))
        states = self.qformer(whole + places, mask=core.padding_mask(attention_mask, self.prompt_tokens.shape[1]))
        return F.normalize(self.text_projection(states[:, 0]), dim=-1)

    def forward(self, reference, target, input_ids, attention_mask, target_ids=None, negatives=None, rtc=0.4, align=0.4,
                patch=0.0, hard_batch=0.0):
        """Losses of a batch of triplets.

        reference, target [B,P,W]: features of the vision tower, as image_embeds gives them. target_ids [B]: equal numbers for
        equal targets. negatives [B,N,P,W]: further pictures that are wrong for each query alone.
        Returns {"loss", "itc", "rtc", "align", "patch"}: scalars, those whose weight is not 0.
        """
        prompt, query = self.query(reference, input_ids, attention_mask)
        images = self.image_features(target)  # [B,Q,E]
        own = None if negatives is None else self.image_features(negatives.flatten(0, 1)).unflatten(0, negatives.shape[:2])
        ids = torch.arange(len(query), device=query.device) if target_ids is None else target_ids
        same = (ids[:, None] == ids[None]).fill_diagonal_(False)  # [B,B]

        def contrast(similarity):
            return contrastive_loss(similarity, self.temp, same, hard_batch)

        parts = {"itc": contrast(similarities(query, images, own))}
        if rtc:
            parts["rtc"] = contrast(similarities(self.prompted(input_ids, attention_mask), images, own))
        if align:  # the prompts learn from rtc only
            parts["align"] = F.mse_loss(prompt.mean(1), self.prompt_tokens.mean(1).detach().expand(len(prompt), -1))
        if patch:
            parts["patch"] = contrast(late_interaction(F.normalize(self.vision_projection(prompt), dim=-1), images))
        weights = {"itc": 1.0, "rtc": rtc, "align": align, "patch": patch}
        return {"loss": sum(weights[name] * part for name, part in parts.items()), **{n: p.detach() for n, p in parts.items()}}


def similarities(query, images, own=None):
    """query [B,E], images [B,Q,E], own [B,N,Q,E] or None -> cosines [B,B+N], the largest over the Q tokens of a picture."""
    scores = core.max_similarity(query, images)
    if own is None:
        return scores
    return torch.cat([scores, core.cosines("be,bnqe->bnq", query, own).amax(-1)], 1)


def late_interaction(tokens, images):
    """Each query token's best target token, averaged (as in ColBERT, FILIP): tokens, images [B,Q,E] -> [B,B]."""
    return core.cosines("ike,jle->ijkl", tokens, images).amax(-1).mean(-1)


def contrastive_loss(similarity, temp, same, hard_batch=0.0):
    """Cross-entropy of row i against column i. similarity [B,B+N] cosines; same [B,B]: other rows of the same target, left out.

    hard_batch: negatives are weighed by exp(hard_batch * cosine), with mean 1 (Robinson et al. 2021, without debiasing).
    """
    B, columns = similarity.shape
    same = F.pad(same, (0, columns - B))  # [B,B+N]
    logits = similarity / temp
    if hard_batch:
        negative = ~same & ~torch.eye(B, columns, dtype=torch.bool, device=same.device)
        weight = (hard_batch * similarity.detach()).masked_fill(~negative, -torch.inf)
        weight = weight - weight.logsumexp(1, keepdim=True) + negative.sum(1, keepdim=True).log()
        logits = logits + weight.masked_fill(~negative, 0.0)
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(B, device=logits.device))


def load_model(args, dtype, log=print):
    """--blip2 and --qformer -> Sprc. A hub's ID is looked for in models/ first."""
    name = published.in_models(args.blip2 or DEFAULT, "blip2-itm")
    model = Sprc.load(name, args.qformer, dtype, log, gate=not args.no_gate, spatial=args.spatial_attention)
    published.refuse_other_tokenizer(model.tokenizer, model.embeddings.word_embeddings.num_embeddings, name)
    if not args.loss_rtc:  # nothing trains the prompts, and a trained part without a gradient would hang several processes
        nn.init.zeros_(model.prompt_tokens.requires_grad_(False))
    return model


def picture_source(args, model, pools, accelerator):
    """What opens a picture for model.image_embeds: path -> pixels [3,s,s], or with --cache the tower's features [P,W]."""
    opener = Opener(model.image_size, args.transform, args.target_ratio)
    return opener if args.cache is None else galleries.kept_features(args.cache, model, opener, pools, accelerator, args.workers)


def make_optimizer(model, lr, weight_decay):
    """AdamW as SPRC has it: betas (0.9, 0.98), eps 1e-7; but no decay on biases, norms and scalars."""
    return loop.make_optimizer(model, lr, weight_decay, betas=(0.9, 0.98), eps=1e-7)


# --- checkpoints ------------

def best_of(args, model, frozen, precision):
    """What best.pt holds: trained tensors and plain values only."""
    return {"state": checkpoints.trainable_state(model), "model_args": {name: getattr(args, name) for name in MODEL_ARGS},
            "args": vars(args), "frozen": frozen, "precision": precision, "ln_vision": model.ln_vision}


def settings(args, parts, accelerator):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    paths = [*parts.train.paths.values(), *(path for pool in parts.val for path in pool.gallery.values())]
    return {**runfolder.settings_of(vars(args), FREE, precision=accelerator.mixed_precision), "pictures (sizes)": rows.sizes_hash(paths),
            "a cache of features": args.cache is not None, "training queries (hash)": cirr.fingerprint(parts.train.rows),
            "validation queries (hash)": cirr.fingerprint([query for pool in parts.val for query in pool.queries]),
            "processes": accelerator.num_processes}


def load_best(args):
    """--checkpoint -> (its content, Sprc in eval mode as it was trained, Accelerator). A --blip2 on the command line wins."""
    # from here on a file and no folder: galleries/ and the report's curves go by where it lies
    args.checkpoint, best = checkpoints.load_best(args.checkpoint, "cir", ("state", "model_args", "frozen", "precision"))
    for name in MODEL_ARGS:
        if name != "blip2" or not args.blip2:
            setattr(args, name, best["model_args"][name])
    if args.precision == "auto" and torch.cuda.is_available():
        args.precision = best["precision"]
    accelerator = start(args)
    with accelerator.main_process_first():
        model = load_model(args, core.DTYPES[accelerator.mixed_precision])
    if best.get("ln_vision"):  # of --qformer
        checkpoints.load_strictly(model.vision_model.post_layernorm, best["ln_vision"], f"ln_vision of {args.checkpoint}")
    if checkpoints.fingerprint(model) != best["frozen"]:
        raise DataError(f"{args.checkpoint} was trained on another vision tower than {args.blip2 or DEFAULT}: "
                        "pass --blip2 with its folder")
    checkpoints.load_trainable(model, best["state"], args.checkpoint)
    return best, model.eval().to(accelerator.device), accelerator


# --- the loop ------------

class Parts(NamedTuple):
    """What a run is made of beside the Run."""
    train: Triplets
    val: list  # of cirr.Pool
    opener: Callable  # see picture_source
    collate: Collate


def train_step(run, step, args):
    """Forward and backward of one optimizer step. The queries of a process are each other's negatives; nothing is gathered, as in
    SPRC."""
    for batch in step:
        images = batch.pop("images")  # [B,2+N,3,s,s]
        embeds = run.model.image_embeds(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # [B,2+N,P,W]
        with step.forward():
            parts = run.wrapped(embeds[:, 0], embeds[:, 1], **batch, negatives=embeds[:, 2:] if args.hard_set else None,
                                rtc=args.loss_rtc, align=args.loss_align, patch=args.loss_patch, hard_batch=args.hard_batch)
        step.backward(**parts)


def train(args):
    """The whole training -> its Run."""
    accelerator = start(args)
    resumed = resumes(accelerator, args.out, args.resume)
    if args.report:
        files.refuse_unwritable(args.report)
    run, parts = prepare(args, accelerator)
    with run.open(resumed, vars(args), __file__):
        print_start(run, parts, args)
        rehearse(run, parts, args)
        for epoch in run.epochs():
            run.wrapped.train()
            for step in run.steps(epoch):
                train_step(run, step, args)
                step.update(temp=run.model.temp)
            if (epoch + 1) % args.validation_frequency and epoch + 1 < args.epochs:
                run.skip_validation()
                continue
            numbers, scores = validate(run, parts, args)
            if run.end_epoch({**numbers, "temp": run.model.temp.item()}):
                run.save_best()
                if accelerator.is_main_process:
                    retrieval.keep_shortcuts(run.out / "best.pt", parts.val, scores, args.format)
                if args.report and accelerator.is_main_process:
                    retrieval.write_report(args.report, run.out / "best.pt", args.data, parts.val, scores, PANELS)
    return run


def print_start(run, parts, args):
    """What is trained on what, and what chance would score."""
    log = run.accelerator.print
    log(f"{len(parts.train)} training and {sum(len(pool.queries) for pool in parts.val)} validation queries, gallery of "
        f"{' + '.join(str(len(pool.gallery)) for pool in parts.val)}; {run.total} steps of {len(run.plan(0)[0][0])} queries, "
        f"lr {args.lr:g}, precision {run.accelerator.mixed_precision}, {run.accelerator.device}")
    log(f"a random order scores {format_metrics(chance(parts.val, args.format))}")


def validate(run, parts, args):
    """The validation pools -> (mean of what galleries.evaluate tells of them, scores of each)."""
    results, scores = zip(*galleries.evaluate(run.model, parts.val, parts.opener, run.accelerator, args.format, args.batch_size,
                                              args.workers))
    return mean_of(results), scores


def rehearse(run, parts, args):
    """The longest sentences as a batch, and a validation batch, before anything is trained: memory that runs out shows now."""
    train = parts.train
    picked = sorted(range(len(train)), key=lambda n: len(cirr.text_of(train.rows[n])))[-args.batch_size:]
    run.wrapped.train()
    step = run.rehearsal(parts.collate([train[0, n] for n in picked]), picked)
    train_step(run, step, args)
    step.update()
    few = galleries.beginning(parts.val[0], args.batch_size)
    galleries.encode(run.model, few, parts.opener, run.accelerator, args.batch_size, args.workers)
    loop.print_gpu_memory(run.accelerator)


def start(args):
    """DataError, before anything is read, where --blip2 is not here and cannot be fetched; else -> Accelerator."""
    published.refuse_missing({"BLIP-2": published.missing_model(args.blip2 or DEFAULT, "blip2-itm")})
    return loop.make_accelerator(args.precision)


def prepare(args, accelerator):
    """Flags -> (Run at its first step, Parts): annotations, model, optimizer."""
    train, val = (read_data(args, split, accelerator.print) for split in ("train", "val"))
    loop.seed_everything(args.seed)
    with accelerator.main_process_first():  # one process fetches what the hub alone has, the others find it
        model = load_model(args, core.DTYPES[accelerator.mixed_precision], accelerator.print)
    published.refuse_unknown_words(model.tokenizer, [cirr.text_of(query) for pool in [*train, *val] for query in pool.queries], args.blip2)
    if accelerator.is_main_process:
        checkpoints.print_parts(model)
    frozen, opener = checkpoints.fingerprint(model), picture_source(args, model, [*train, *val], accelerator)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, args.lr, args.weight_decay))
    parts = Parts(Triplets(train, opener, args.hard_set, args.seed), val, opener, Collate(model.tokenizer))

    def batches(epoch, left):
        keys = [[(epoch, n) for n in numbers] for numbers in loop.keys_of(left)]
        return loaders.load_batches(parts.train, parts.collate, keys, args.workers)

    return Run("cir", args.out, accelerator, model, wrapped, optimizer, rows=parts.train.rows, batches=batches,
               plan=lambda epoch: loop.epoch_plan(len(parts.train), args.batch_size, 1, args.seed, epoch,
                                                  accelerator.process_index, accelerator.num_processes),
               epochs=args.epochs, lr=lambda step, total: loop.cosine_lr(step, total, round(args.warmup * total), args.lr),
               seed=args.seed, metric="mean", settings=settings(args, parts, accelerator),
               best=lambda: best_of(args, model, frozen, accelerator.mixed_precision), frozen=frozen,
               base=("vision tower", "--blip2"), columns=LOG_COLUMNS, panels=PANELS, unit="queries", format_metrics=format_metrics,
               title=f"{pathlib.Path(args.out).name}: {'without gate' if args.no_gate else 'gated'}, {args.blip2 or DEFAULT}",
               save_last=args.save_last, profile=args.profile, workers=args.workers, pictures=training_and_validation(parts, args)), parts


def training_and_validation(parts, args):
    """Paths of the pictures that are trained on: references and targets and, as negatives of --hard-set, the rest of their image sets;
    and of the references and targets of the validation."""
    shown = cirr.pictures_of(parts.train.rows, parts.train.paths, members=args.hard_set > 0)
    asked = [paths for pool in parts.val for paths in cirr.pictures_of(pool.queries, pool.gallery)]
    return [[path for paths in some for path in paths] for some in (shown, asked)]


def dry_run(args):
    """--dry-run: three queries, the table of parts (prepare prints it), memory; nothing is written but a cache."""
    run, parts = prepare(args, start(args))
    for query in parts.train.rows[:3]:
        ids = core.text_ids(run.model.tokenizer, [cirr.text_of(query)])["input_ids"][0]
        run.accelerator.print(f"{query.reference} + {text_of(run.model.tokenizer, ids, special=True)!r} -> {query.target}")
    loop.dry_run(run, lambda run: rehearse(run, parts, args))


# --- without training ------------

def score(args):
    """--checkpoint: the recalls of the validation split; --submit, --gate-maps and --report."""
    best, model, accelerator = load_best(args)
    log, first = accelerator.print, accelerator.is_main_process
    pools = read_data(args, "val", log)
    unseen = read_data(args, cirr.UNSEEN[args.format], log) if args.submit else []
    for folder in filter(None, (args.submit, args.gate_maps)):  # now, and not after everything has been encoded
        files.refuse_unwritable(pathlib.Path(folder, "a file"))
    if args.report:
        files.refuse_unwritable(args.report)
    saw = [seen.tell(f"{pool.name} {pool.split}", best, cirr.pictures_of(pool.queries, pool.gallery), args.workers, log)
           for pool in [*pools, *unseen]][:len(pools)]
    opener = picture_source(args, model, [*pools, *unseen], accelerator)
    log(f"a random order scores {format_metrics(chance(pools, args.format))}")
    results, scores, maps = [], [], {}
    evaluated = galleries.evaluate(model, pools, opener, accelerator, args.format, args.batch_size, args.workers)
    for pool, (numbers, found) in zip(pools, evaluated):
        results.append(numbers)
        scores.append(found)
        log(f"{pool.name}: {format_metrics(numbers)}")
        if args.gate_maps and first:
            page = pathlib.Path(args.gate_maps, f"{pool.name}_maps.png")
            maps[page] = galleries.write_gate_maps(page, args.checkpoint, model, pool, found["both"], opener,
                                                   (model.image_size, args.transform, args.target_ratio))
    if len(results) > 1:
        log(f"mean: {format_metrics(mean_of(results))}")
    if first:
        for pool, found in zip(pools, retrieval.keep_shortcuts(args.checkpoint, pools, scores, args.format)):
            retrieval.print_shortcuts(pool, found, log)
    if args.report and first:
        figures = [path for drawn in maps.values() for path in drawn]
        overlap = None if None in saw else [one for some in saw for one in some]
        retrieval.write_report(args.report, args.checkpoint, args.data, pools, scores, PANELS, figures, seen.format_overlap(overlap))
    for pool in unseen:
        features, vectors, _ = galleries.encode(model, pool, opener, accelerator, args.batch_size, args.workers)
        if first:
            write = cirr.write_circo if args.format == "circo" else cirr.write_submission
            paths = write(args.submit, pool.queries, pool.gallery, galleries.score_gallery(vectors, features))
            log(f"for the test server: {', '.join(map(str, paths))}")
    for page, drawn in maps.items():
        pages.draw("gallery", page, f"{args.gate_maps}: gate maps of {len(drawn)} queries")
    if args.report and first:
        pages.draw("report", args.report)


def index_gallery(args, best, model, accelerator, opener, store=None):
    """--gallery, indexed once in `store`, or beside the checkpoint -> (names, features [G,Q,E])."""
    store = store or pathlib.Path(args.checkpoint).parent / "galleries"
    weights = f"{checkpoints.state_digest(best['state'])} {best['frozen']} {accelerator.mixed_precision}"
    return galleries.index_folder(args.gallery, store, model, opener, weights, accelerator, args.workers, args.batch_size)


@torch.no_grad()
def search(args):
    """--search: index --gallery (once, beside the checkpoint), print the best matches, draw OUT/search.html."""
    best, model, accelerator = load_best(args)
    opener = Opener(model.image_size, args.transform, args.target_ratio)
    reference, page = opener(args.image), pathlib.Path(args.out) / "search.html"
    files.refuse_unwritable(page)
    names, features = index_gallery(args, best, model, accelerator, opener)
    vector = galleries.query_vector(model, accelerator, reference, args.search)
    hits = picture_index.matches(args.gallery, names, features, vector, args.top, args.image)
    for rank, (path, _, similarity) in enumerate(hits, 1):
        print(f"{rank:3}  {similarity:.3f}  {path}")
    pages.write_results(page, "search", "Composed image retrieval", reference=os.path.abspath(args.image), text=args.search,
                        hits=[(os.path.abspath(path), name, similarity) for path, name, similarity in hits],
                        note=f"{len(names):,} pictures of {args.gallery}, model {args.checkpoint}")
    pages.draw("gallery", page, str(page))


def main(argv=None):
    args = get_args(argv)
    for note in environment.note_versions():
        print(note, file=sys.stderr)
    if args.check_data:
        trains = not args.checkpoint and args.format != "circo"
        absent = {"BLIP-2": published.missing_model(args.blip2 or DEFAULT, "blip2-itm")} if trains else {}
        return cirr.check(args.data, args.format, chance_text, args.images, workers=max(1, args.workers),
                          absent=published.format_missing(absent))
    with errors.batch_size_in_memory_errors(args.batch_size, "the --batch-size"):  # there is no --accumulation here
        if args.search is not None:
            return search(args)
        if args.checkpoint:
            return score(args)
        if args.dry_run:
            return dry_run(args)
        run = train(args)
    code = run.result("mean recall", __file__, argv)
    if args.report and run.accelerator.is_main_process and not code:  # an interrupted run draws when it has been resumed
        pages.draw("report", args.report, of=run.out / "best.pt")
    return code


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
