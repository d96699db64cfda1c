"""pretrain_qformer.py: BLIP-2 stage 1: a Q-Former learns what of a picture belongs to a text, from caption pairs.

    python pretrain_qformer.py --data coco=data/coco --data vg=data/vg                 # ViT-g and bert-base, GPUs of 40 GB
    python pretrain_qformer.py --data drawn=data/artquest --blip2 tiny --lr 1e-3 --epochs 8   # laptop CPU
    python pretrain_qformer.py --convert blip2_pretrained.pth --out runs/lavis         # LAVIS stage 1 -> HuggingFace's format
    python train_cir.py --data data/cirr --qformer runs/qformer/hf                     # or train_gated.py --qformer runs/qformer/hf

Three losses on one Q-Former (Li et al. 2023, BLIP-2): image-text contrast (ITC), matching with hard negatives (ITM), and
captioning that sees the picture through the queries alone (ITG). Frozen: the vision tower. Data flow: caption files -> Pair ->
Captioned -> Collate -> Stage1.forward -> losses; the best weights end in OUT/hf, which transformers loads. Copy and edit it.
"""

import argparse
import itertools
import math
import pathlib
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import core
import metrics
from data import pairs, rows, shards
from engine import checkpoints, environment, errors, files, flags, loaders, loop, published, runfolder
from engine.errors import DataError

DEFAULT, BERT = published.DEFAULTS["blip2-itm"], "bert-base-uncased"
NEXT = "transformers' Blip2ForImageTextRetrieval, train_cir.py --blip2 and train_gated.py --qformer"  # what takes OUT/hf
SMOOTHING = 0.1  # of ITC's targets and of ITG's, as in LAVIS
CLIP = 1.0  # gradient norm
LOG_EVERY = 10  # optimizer steps between two rows of training_log.csv
RECALLS = tuple(f"{side} R@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10))
LOG_COLUMNS = ("kind", "step", "epoch", "lr", "loss", "itc", "itc chance", "itm", "itm chance", "itg", "itg chance", "temp",
               "grad_norm", *RECALLS, "mean",
               *(f"reranked {name}" for name in RECALLS), "reranked mean", "itm_accuracy")
PANELS = [("losses", [("step", name, name) for name in ("itc", "itc chance", "itm", "itm chance", "itg")]),
          ("validation, recall in %", [("epoch", "mean", "ITC"), ("epoch", "reranked mean", "re-ranked by ITM"),
                                       ("epoch", "t2i R@1", "t2i R@1"), ("epoch", "i2t R@1", "i2t R@1")]),
          ("learning", [("step", "grad_norm", "gradient norm"), ("epoch", "itg", "validation ITG")])]


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
                            f"random (default: {BERT}; with --blip2 tiny random)")
    run = parser.add_argument_group("training")
    run.add_argument("--epochs", type=flags.positive, default=10, help="(default: 10)")
    run.add_argument("--batch-size", type=flags.positive, default=100, help="pairs a step and process (default: 100)")
    run.add_argument("--lr", type=flags.rate, default=1e-4, help="peak learning rate (default: 1e-4)")
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
    run.add_argument("--config", metavar="YAML", help="file with defaults, e.g. the args.yaml of a run; the command line wins")
    other = parser.add_argument_group("without training")
    other.add_argument("--convert", metavar="FILE", help="write OUT/hf of this LAVIS stage-1 .pth or best.pt, with the tower "
                                                              "of --blip2, and stop")
    args = flags.parse_args(parser, argv)
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--data", action="append")
    args.data = own.parse_known_args(argv)[0].data or args.data  # argparse would add them to those of --config
    if not args.data and (args.check_data or not args.convert):
        parser.error("--data NAME=PLACE is needed, but for --convert")
    if not args.init:
        args.init = "random" if args.blip2 == "tiny" else BERT
    return args


# --- data: your own data set goes here ------------

def places_of(args):
    """--data -> ({name: place} of caption files, {name: place} of tar files)."""
    places = pairs.named_places(args.data)
    tars = {name: place for name, place in places.items() if shards.is_shards(place)}
    files = {name: place for name, place in places.items() if name not in tars}
    if not files:
        raise DataError("--data: only sets of tar files: add one with pictures in a folder, of which a part is held out "
                        "for validation")
    return files, tars


def read_data(args, say=print):
    """--data -> (training Pairs, validation Pairs of --max-val pictures, [Shard]); bad ones refused, with --skip-bad left out."""
    files, tars = places_of(args)
    train, val = (pairs.read_sets(files, split, args.images, args.skip_bad, args.val_share, args.encoding, args.workers, say)
                  for split in ("train", "val"))
    shown = sorted({pair.image_id for pair in val})[:args.max_val]  # by their hash
    if len(shown) < len({pair.image_id for pair in val}):
        say(f"val: {len(shown)} of its pictures are scored (--max-val)")
    streamed = [shard for name, place in tars.items() for shard in
                shards.count_samples(shards.shard_files(place), name, pathlib.Path(args.out) / "shards.json", args.skip_broken,
                                     say)]
    return train, [pair for pair in val if pair.image_id in set(shown)], streamed


def check_data(args):
    """--check-data: print what is there; exit code 1 when training would fail. No weight is loaded."""
    files, tars = places_of(args)
    failed = pairs.check(files, args.images, args.skip_bad, args.val_share, args.encoding, args.workers)
    if shards.check(tars, args.skip_broken):
        print("training would fail at the tar files")
        failed = 1
    return failed


class Captioned(Dataset):
    """(epoch, number) -> (picture [3,s,s], Pair), augmented in training; or (the DataError of a broken picture, Pair)."""

    def __init__(self, found, size, seed=None):
        """seed: of the augmentation; None = the evaluation's view."""
        self.rows, self.size, self.seed = found, size, seed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, number = key
        pair = self.rows[number]
        try:
            image = rows.load_image(pair.image)
            if self.seed is None:
                return rows.image_tensor(image, self.size), pair
            rng = np.random.default_rng([self.seed, epoch, number])
            return pairs.train_view(image, self.size, rng, pair.text, strong=pair.strong), pair
        except DataError as error:
            return error, pair


class Collate:
    """Samples of Captioned or of a ShardStream -> batch: images [B,3,s,s], input_ids, attention_mask [B,L], image_ids [B], and
    the Pairs themselves for messages."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, samples):
        for found, pair in samples:
            if isinstance(found, DataError):
                return {"fault": f"{pair.file}, {rows.locate(pair.file, pair.line)}: {found}"}
        images, found = zip(*samples)
        return {"images": torch.stack(images), **core.text_ids(self.tokenizer, [pair.text for pair in found]),
                "image_ids": torch.tensor([pair.image_id for pair in found]), "pairs": found}


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
        pairs of an image. Features are gathered over all processes, with gradient: two processes train as one with the
        whole batch. negatives: (image of each text, text of each image), [B] each, instead of drawing them.
        Returns {"loss", "itc", "itm", "itg"}: scalars.
        """
        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = self.dec
        # under this mask queries see no text, so that one pass gives ITC's queries and ITG's text
        states = self.joint(image_embeds, decoder_ids, attention_mask, core.unilm_mask)  # [B,Q+L,H]
        Q = self.query_tokens.shape[1]
        images = F.normalize(self.vision_projection(states[:, :Q]), dim=-1)  # [B,Q,E]
        texts = self.text_features(input_ids, attention_mask)  # [B,E]
        everyone = gathered(image_ids)  # [N]
        t2i = core.max_similarity(texts, gathered(images)) / self.temp  # [B,N]
        i2t = core.max_similarity(gathered(texts), images).T / self.temp  # [B,N]
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
        all_images, all_ids, all_masks = gathered(image_embeds), gathered_text(input_ids), gathered_text(attention_mask)
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


class Gather(torch.autograd.Function):
    """The rows of all processes, in their order; the gradient of every process comes back to the rows' owner."""

    @staticmethod
    def forward(context, rows_here):
        parts = [torch.empty_like(rows_here) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows_here.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        count = len(gradient) // torch.distributed.get_world_size()
        return gradient[torch.distributed.get_rank() * count:][:count]


def gathered(rows_here):
    """[B,..] -> [N,..] of all processes; with one process nothing is called."""
    one = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    return rows_here if one else Gather.apply(rows_here)


def gathered_text(ids):
    """gathered of [B,L], whose L may differ between processes: padded with 0 to the longest caption that there can be."""
    one = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    return ids if one else Gather.apply(F.pad(ids, (0, core.MAX_TEXT - ids.shape[1])))


def draw_negatives(logits, other):
    """One column for each row, drawn by softmax of the logits [B,N] among those that are `other` images (any, where none is)."""
    weights = logits.detach().float().masked_fill(~other, -torch.inf)
    weights = weights.masked_fill(~other.any(1, keepdim=True), 0.0).softmax(1)
    return torch.multinomial(weights, 1)[:, 0]


# --- where weights come from, and where they go ------------

def load_model(args, dtype, say=print):
    """--blip2 (vision tower) and --init (Q-Former, tokenizer) -> Stage1. A hub's ID is looked for in models/ first. Says what
    starts fresh."""
    name, init = published.in_models(args.blip2, "blip2-itm"), published.in_models(args.init)
    vision, config = published.load_vision(name, dtype)
    kind = published.load_config(init).model_type if init != "random" and not pathlib.Path(init).is_file() else None
    if kind == "bert":
        config, tokenizer = bert_config(config, published.load_config(init)), published.load_tokenizer(init)
    else:
        source = init if kind else name  # a LAVIS file and a random start take form and tokenizer from --blip2
        own, tokenizer = published.load_config(source), published.load_tokenizer(source)
        if not getattr(getattr(own, "qformer_config", None), "use_qformer_text_input", False):
            raise DataError(f"{source}: no BLIP-2 in image-text-retrieval format, whose Q-Former reads text: give such a folder, "
                            f"or start from a BERT with --init {BERT}")
        own.vision_config, own.qformer_config.encoder_hidden_size = vision.config, vision.config.hidden_size
        config = own
    published.refuse_other_tokenizer(tokenizer, config.qformer_config.vocab_size, init if kind else name)
    model = Stage1(vision, config, tokenizer)
    if kind == "bert":
        absent = start_from_bert(model, published.load_bert(init), init)
    elif init == "random":
        absent = start_at_random(model)
    else:
        weights = published.read_weights(published.local_folder(init) if kind else init)
        parts = published.qformer_weights(weights, text_path=True, source=init)
        model.load_parts(parts, init)
        absent = [part for part in ("temp", "lm_head") if part not in parts]
    say(f"Q-Former: {init}; fresh: {', '.join(absent) or 'nothing'}")
    return model


def bert_config(config, bert):
    """A BERT's sizes as a Q-Former's: cross-attention in every second layer, one word more ([DEC]), 32 queries."""
    from transformers import Blip2Config, Blip2QFormerConfig
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
             "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps", "pad_token_id")
    qformer = Blip2QFormerConfig(vocab_size=bert.vocab_size + 1, use_qformer_text_input=True,
                                 **{name: getattr(bert, name) for name in names})
    vision = getattr(config, "vision_config", config)
    return Blip2Config(vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), num_query_tokens=32,
                       image_text_hidden_size=256)


def start_from_bert(model, state, source):
    """BLIP-2's start: BERT's layers and word head; the query branch is a copy of the text branch; cross-attention, queries,
    projections and [DEC] are new, N(0, 0.02). state: of transformers' BertForMaskedLM. -> names of what is new."""
    def fresh(shape):
        return torch.randn(shape) * 0.02

    state = {name.removeprefix("bert."): tensor.float() for name, tensor in state.items()}
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("vision_model.")}
    renamed = (("qformer.layernorm.", "embeddings.LayerNorm."), ("qformer.", ""), ("attention.attention.", "attention.self."),
               ("_query.", "."), ("lm_head.", "cls.predictions."))
    new = set()
    for name, tensor in own.items():
        theirs = name
        for ours, other in renamed:
            theirs = theirs.replace(ours, other)
        if name in ("embeddings.word_embeddings.weight", "lm_head.bias"):  # one word more: [DEC]
            start = fresh(tensor.shape) if tensor.ndim > 1 else torch.zeros_like(tensor)
            own[name] = torch.cat([state[theirs], start[len(state[theirs]):]])
        elif "crossattention" not in name and theirs in state:
            if state[theirs].shape != tensor.shape:
                raise DataError(f"{source}: {theirs} is {tuple(state[theirs].shape)}, {tuple(tensor.shape)} is wanted: "
                                "not the BERT of its config")
            own[name] = state[theirs]
        elif tensor.ndim > 1:
            own[name] = fresh(tensor.shape)
            new.add("cross-attention" if "crossattention" in name else name.split(".")[0])
        elif "crossattention" in name and name.endswith(".bias"):
            own[name] = torch.zeros_like(tensor)
    model.load_state_dict(own, strict=False)
    return [*sorted(new), "[DEC]"]


def start_at_random(model):
    """Weights by fan-in, which small widths need (the library's 0.02 sits on a plateau there). -> names of what is new."""
    for name, part in model.named_children():
        for module in part.modules() if name != "vision_model" else ():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5 if name == "embeddings" else 0.02)
    nn.init.normal_(model.query_tokens)
    return ["everything"]


def export(model, folder):
    """A folder that transformers' Blip2ForImageTextRetrieval, train_cir.py and train_gated.py --qformer load.

    temp and the captioning head, which that class does not have, go into stage1.safetensors beside."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import Blip2ForImageTextRetrieval, Blip2Processor, BlipImageProcessor
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    extra = {name: state.pop(name) for name in list(state) if name == "temp" or name.startswith("lm_head.")}
    with torch.device("meta"):
        theirs = Blip2ForImageTextRetrieval(model.config)
    theirs.load_state_dict(state, strict=True, assign=True)
    size = {"height": model.image_size, "width": model.image_size}
    pixels = BlipImageProcessor(size=size, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        theirs.save_pretrained(part)
        save_file(extra, part / "stage1.safetensors")
        Blip2Processor(pixels, model.tokenizer).save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise DataError(f"{folder}: could not be written ({' '.join(str(error).split())}): free some space; --convert "
                        "writes it from a best.pt") from None


# --- evaluation ------------

@torch.no_grad()
def evaluate(model, data, collate, accelerator, batch_size, workers, rerank):
    """Recalls in percent, ITM accuracy and ITG loss over the pairs of `data`. Every process does all of it.

    Each picture goes through the tower once. ITM accuracy: each text with its image, and with the wrong image nearest to it.
    """
    model.eval()
    ids = [pair.image_id for pair in data.rows]
    first = {image_id: number for number, image_id in reversed(list(enumerate(ids)))}  # the first pair of each picture
    shown = list(dict.fromkeys(ids))
    batches = [[(0, first[i]) for i in shown[start:start + batch_size]] for start in range(0, len(shown), batch_size)]
    loaded, kept, images = iter(loaders.load_batches(data, collate, batches, workers)), [], []
    for _ in tqdm(batches, desc="encoding", leave=False, mininterval=1, disable=None if accelerator.is_main_process else True):
        embeds = model.image_embeds(loaders.next_batch(loaded, accelerator.device)["images"])
        kept.append(embeds.to(next(model.vision_model.parameters()).dtype).cpu())  # [B,P,W]; half precision where the tower has it
        with accelerator.autocast():
            images.append(model.image_features(embeds).float())
    kept, images = torch.cat(kept), torch.cat(images)
    text = send_to_device(core.text_ids(model.tokenizer, [pair.text for pair in data.rows]), accelerator.device)
    owner = torch.tensor([shown.index(image_id) for image_id in ids])  # [T]
    texts, itg, right = [], [], []
    with accelerator.autocast():
        for numbers in torch.arange(len(ids)).split(batch_size):
            part = {name: tensor[numbers.to(tensor.device)] for name, tensor in text.items()}
            texts.append(model.text_features(**part).float())
            itg += [model.caption_loss(kept[owner[numbers]].to(accelerator.device).float(), **part).item()] * len(numbers)
        cosines = core.max_similarity(torch.cat(texts), images).cpu()  # [T,G]
        wrong = cosines.scatter(1, owner[:, None], -2.0).argmax(1)  # [T]
        for numbers in torch.arange(len(ids)).split(batch_size) if len(shown) > 1 else ():
            part = {name: tensor[numbers.to(tensor.device)] for name, tensor in text.items()}
            for picture, label in ((owner, 1), (wrong, 0)):
                said = model.match(kept[picture[numbers]].to(accelerator.device).float(), **part).argmax(1)
                right += (said == label).tolist()
        found = recalls(cosines.numpy(), cosines.T.numpy(), owner.numpy())
        if rerank:
            again = [scores.numpy() for scores in reranked(model, cosines, kept, **text, k=rerank, chunk=batch_size)]
            found |= {f"reranked {name}": value for name, value in recalls(*again, owner.numpy()).items()}
    return {**found, "itm_accuracy": 100 * float(np.mean(right or [math.nan])), "itg": float(np.mean(itg))}


def recalls(t2i, i2t, owner):
    """Recall@1, 5, 10 in percent both ways, and their mean. t2i [T,G], i2t [G,T] scores, owner [T] = the image of each text."""
    ranks = {"i2t": metrics.best_ranks(i2t, owner[None] == np.arange(len(i2t))[:, None]), "t2i": metrics.target_ranks(t2i, owner)}
    found = {f"{side} R@{k}": metrics.recall_at(ranks[side], k) for side in ranks for k in (1, 5, 10)}
    return {**found, "mean": float(np.mean(list(found.values())))}


def chance(texts, images):
    """What a random order scores, in the form of recalls (where pictures have several captions: nearly)."""
    found = {f"{side} R@{k}": 100 * min(1.0, k / count * more) for side, count, more in
             (("i2t", texts, texts / images), ("t2i", images, 1)) for k in (1, 5, 10)}
    return {**found, "mean": float(np.mean(list(found.values())))}


@torch.no_grad()
def reranked(model, cosines, images, input_ids, attention_mask, k, chunk=64):
    """LAVIS's two-step retrieval: the k best by cosine are scored by ITM's "yes" + cosine, all others -100.

    cosines [T,G] of T texts and G images, on the CPU; images [G,P,W], text [T,L], `chunk` pairs at a time -> (scores [T,G] for
    finding the image of a text, scores [G,T] for finding the text of an image).
    """
    found = []
    for by_text, table in ((True, cosines), (False, cosines.T)):
        best = table.topk(min(k, table.shape[1]), dim=1).indices  # [rows,k]
        row = torch.arange(len(table), device=best.device).repeat_interleave(best.shape[1])
        text, image = (row, best.flatten()) if by_text else (best.flatten(), row)
        scores = torch.full_like(table, -100.0)
        for t, i, r, c in zip(text.split(chunk), image.split(chunk), row.split(chunk), best.flatten().split(chunk)):
            yes = model.match(images[i].to(input_ids.device).float(), input_ids[t], attention_mask[t])[:, 1]
            scores[r, c] = yes.float().cpu() + table[r, c]
        found.append(scores)
    return found


# --- one run: what the functions of the loop share ------------

@dataclass
class Run:
    """A run under way. `model` is the Stage1; `wrapped` the same as accelerate trains it."""
    args: argparse.Namespace
    accelerator: Accelerator
    model: Stage1
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    collate: Collate
    train: Captioned
    val: Captioned
    stream: shards.ShardStream
    step: int = 0  # optimizer steps done
    log: runfolder.RunLog | None = None  # only where files are written

    def __post_init__(self):
        self.pace = loop.Pace(self, "pairs")
        self.marks = {"metric": "mean", "value": None, "epoch": None, "done": 0}  # done: epochs validated
        self.per_epoch = len(self.plan(0))
        self.total = self.args.epochs * self.per_epoch

    def plan(self, epoch):
        """The optimizer steps of an epoch: this process's pairs, as many for each process, or None for a batch of the tar files,
        mixed in an order drawn from seed and epoch."""
        count, args = self.accelerator.num_processes, self.args
        steps = loop.epoch_plan(len(self.train), args.batch_size, 1, args.seed, epoch, self.accelerator.process_index, count)
        steps = [share[0][1][:len(group) // count] for group, share in steps]
        if self.stream.shards:
            steps += [None] * shards.steps_per_epoch(self.stream.shards, args.batch_size, count)
        return [steps[i] for i in np.random.default_rng([args.seed, epoch, 1]).permutation(len(steps))]

    def batches(self, epoch, done):
        """The batches of an epoch's plan after the first `done`; tar files are read from the epoch's start to get there."""
        plan, args = self.plan(epoch), self.args
        chosen = [[(epoch, n) for n in mine] for mine in plan[done:] if mine is not None]
        of_pairs = iter(loaders.load_batches(self.train, self.collate, chosen, args.workers))
        self.stream.set_epoch(epoch)
        streamed = loaders.load_stream(self.stream, shards.packed, args.batch_size, args.workers)
        of_stream = shards.batches_of(streamed, args.batch_size, plan.count(None), self.collate, args.skip_broken,
                                      self.accelerator.print)
        of_stream = itertools.islice(of_stream, plan[:done].count(None), None)
        return (next(of_stream if mine is None else of_pairs) for mine in plan[done:])

    def lr(self, step):
        return loop.cosine_lr(step, self.total, min(self.args.warmup, self.total // 10), self.args.lr,
                              min(self.args.min_lr, self.args.lr))

    def chance(self):
        """Losses of a model that knows nothing: ITC of equal logits, ITM of the share of right pairs alone, ITG of equal words."""
        B = self.args.batch_size * self.accelerator.num_processes
        return {"itc": math.log(B), "itm": math.log(3) - 2 / 3 * math.log(2), "itg": math.log(self.model.dec + 1)}


# --- checkpoints ------------

def save_best(run, out):
    """best.pt: trained tensors and plain values only."""
    import transformers
    checkpoints.save_checkpoint(out / "best.pt", {
        "stage": "qformer", "state": checkpoints.trainable_state(run.model),
        "model_args": {"blip2": run.args.blip2, "init": run.args.init}, "args": vars(run.args), **run.marks,
        "frozen": checkpoints.fingerprint(run.model), "precision": run.accelerator.mixed_precision,
        "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__})


def save_last(run, out):
    """Everything that --resume needs; order and randomness are functions of (seed, step), so a step count is enough."""
    checkpoints.save_checkpoint(out / "last.pt", {
        "stage": "qformer", "state": checkpoints.trainable_state(run.model), "frozen": checkpoints.fingerprint(run.model),
        "settings": settings(run), **runfolder.training_state(run)})


def settings(run):
    """What must be the same on --resume: the flags that change the result, the data, the number of processes."""
    free = ["out", "resume", "save_last", "config", "images", "data", "check_data", "dry_run", "skip_bad", "skip_broken", "convert"]
    if not run.stream.shards:
        free.append("workers")  # which of them reads what of a tar file decides the order
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(run.args).items() if name not in free}
    return {**flags, "training pairs (hash)": pairs.fingerprint(run.train.rows),
            "validation pairs (hash)": pairs.fingerprint(run.val.rows),
            "tar files": [[pathlib.Path(shard.path).name, shard.samples] for shard in run.stream.shards],
            "processes": run.accelerator.num_processes}


def restore(run, path):
    """Put last.pt back. DataError where anything differs that would change the result."""
    last = checkpoints.load_checkpoint(path, ("state", "optimizer", "step", "marks", "frozen", "settings"))
    if last.get("stage") != "qformer":
        raise DataError(f"{path}: a checkpoint of another stage ({last.get('stage')}) and not of this one")
    runfolder.refuse_other_settings(settings(run), last["settings"], path)
    if last["frozen"] != checkpoints.fingerprint(run.model):
        raise DataError(f"{path} was trained on another vision tower than the one given now: "
                        "pass the same --blip2, or another --out")
    checkpoints.load_trainable(run.model, last["state"], path)
    runfolder.restore_training(run, last)


# --- the loop ------------

def train_step(run, batch):
    """Forward and backward of one optimizer step on this process's pairs -> its losses."""
    # dropout and negatives are a pure function of (seed, step, process): exact resume depends on it
    loop.seed_everything(run.args.seed, run.step, run.accelerator.process_index)
    found, embeds = batch.pop("pairs"), run.model.image_embeds(batch.pop("images"))  # [B,P,W]
    with run.accelerator.autocast():
        parts = run.wrapped(embeds, **batch)
    if not torch.isfinite(parts["loss"]):
        raise DataError(loop.bad_loss(f"loss is {parts['loss'].item()}", run.step, found))
    run.accelerator.backward(parts["loss"])
    return {name: part.item() for name, part in parts.items()}


def train_epoch(run, epoch, stop):
    """The epoch's optimizer steps that are left. Ends early when a signal has come."""
    accelerator, chance_of, done = run.accelerator, run.chance(), run.step - epoch * run.per_epoch
    batches, plan = run.batches(epoch, done), run.plan(epoch)[done:]
    bar = tqdm(plan, desc=f"steps from {run.step}", mininterval=1, disable=None if run.log else True)  # None: only on a terminal
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.wrapped.train()
    for mine in bar:
        lr = run.lr(run.step)
        for part in run.optimizer.param_groups:
            part["lr"] = lr
        of_tars = [SimpleNamespace(name="the tar files", line=0)]
        with loaders.dead_loaders_named([run.train.rows[n] for n in mine] if mine else of_tars):
            batch = loaders.next_batch(batches, accelerator.device)
        found = batch["pairs"]
        sums = train_step(run, batch)
        norm = float(accelerator.clip_grad_norm_(trained, CLIP))
        if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            raise DataError(loop.bad_loss(f"gradient is {norm}", run.step, found))
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        run.pace.step(len(found) * run.accelerator.num_processes)
        bar.set_postfix(**{name: f"{value:.2f}" for name, value in sums.items()})
        if run.step % LOG_EVERY == 0:
            together = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
            if run.log:
                run.log.write("step", run.step, epoch=epoch + 1, lr=lr, grad_norm=norm, temp=run.model.temp.item(),
                              **dict(zip(sums, together.tolist())),
                              **{f"{name} chance": value for name, value in chance_of.items()})
        if loop.stopped(accelerator, stop):
            break


def validate(run):
    """evaluate() of the validation pairs; the first process's numbers count, so that all decide alike."""
    numbers = evaluate(run.model, run.val, run.collate, run.accelerator, run.args.batch_size, run.args.workers, run.args.rerank)
    told = broadcast(torch.tensor(list(numbers.values()), dtype=torch.float64, device=run.accelerator.device))
    return dict(zip(numbers, told.tolist()))


def rehearse(run):
    """The longest captions as a batch, and a validation batch, before anything is trained: memory that runs out shows now."""
    count = min(run.args.batch_size, len(run.train) // run.accelerator.num_processes)  # the same on each process
    picked = sorted(range(len(run.train)), key=lambda n: len(run.train.rows[n].text))[-count:]
    run.wrapped.train()
    train_step(run, loaders.next_batch(iter([run.collate([run.train[0, n] for n in picked])]), run.accelerator.device))
    run.optimizer.zero_grad()
    few = Captioned(run.val.rows[:run.args.batch_size], run.val.size)
    evaluate(run.model, few, run.collate, run.accelerator, run.args.batch_size, run.args.workers, run.args.rerank)
    loop.print_gpu_memory(run.accelerator)


def prepare(args):
    """Flags -> a Run at its first step: pairs, model, optimizer."""
    published.refuse_missing({"BLIP-2": published.missing_model(args.blip2, "blip2-itm")})
    accelerator = Accelerator(mixed_precision=loop.precision_of(args.precision), cpu=not torch.cuda.is_available())
    with accelerator.main_process_first():  # one counts the tar files' samples, the others find the counts
        train, val, streamed = read_data(args, accelerator.print)
    loop.seed_everything(args.seed)
    with accelerator.main_process_first():  # one process fetches what the hub alone has, the others find it
        model = load_model(args, core.DTYPES[accelerator.mixed_precision], accelerator.print)
    if accelerator.is_main_process:
        checkpoints.print_parts(model)
    wrapped, optimizer = accelerator.prepare(model, loop.make_optimizer(model, args.lr, args.weight_decay))
    stream = shards.ShardStream(streamed, model.image_size, args.seed, accelerator.process_index, accelerator.num_processes)
    return Run(args, accelerator, model, wrapped, optimizer, Collate(model.tokenizer),
               Captioned(train, model.image_size, args.seed), Captioned(val, model.image_size), stream)


def train(run, out, stop):
    """The epochs that are left. Returns early, with a last.pt, when a signal has come."""
    args, leader, say = run.args, run.accelerator.is_main_process, run.accelerator.print
    for epoch in range(run.marks["done"], args.epochs):
        try:
            train_epoch(run, epoch, stop)
            if loop.stopped(run.accelerator, stop):
                break
            numbers = validate(run)
        except loaders.LoaderError:
            if leader and run.step:
                save_last(run, out)
            raise
        better = loop.is_better(numbers["mean"], run.marks)
        run.marks |= {"done": epoch + 1}
        if better:
            run.marks |= {"value": numbers["mean"], "epoch": epoch + 1}
        say(f"epoch {epoch + 1}: {told(numbers)}" + (" *" if better else ""))
        if leader:
            run.log.write("epoch", run.step, epoch=epoch + 1, lr=run.lr(run.step - 1), temp=run.model.temp.item(), **numbers)
            if args.save_last:  # before best.pt: begin() makes up a best.pt that a kill between the two has left behind
                save_last(run, out)
            if better:
                save_best(run, out)
            draw(run, out)
    if stop.number and leader:
        save_last(run, out)
        say(f"stopped after step {run.step}; {out / 'last.pt'} is there for --resume")


def told(numbers):
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())


def draw(run, out):
    """curves.png of the log so far."""
    runfolder.draw_curves(run.log.path, out / "curves.png", PANELS, f"{out.name}: {run.args.blip2}, Q-Former from {run.args.init}")


def begin(run, out, resumed):
    """The run folder, and what --resume finds in it."""
    args, leader = run.args, run.accelerator.is_main_process
    if resumed:
        restore(run, out / "last.pt")
        run.accelerator.print(f"resuming after step {run.step} of {run.total}")
    if leader:
        size = sum(t.nbytes for t in checkpoints.trainable_state(run.model).values())
        tower = sum(t.nbytes for t in run.model.vision_model.state_dict().values())
        # AdamW keeps twice the weights; old and new file; at the end OUT/hf
        files.refuse_full_disk(out, size * (9 if args.save_last else 3) + tower)
        runfolder.start_run(out, vars(args))
        run.log = runfolder.RunLog(out, LOG_COLUMNS, run.step if resumed else None)
        if resumed and run.marks["epoch"] and run.step == run.marks["epoch"] * run.per_epoch:
            save_best(run, out)
        if resumed:
            draw(run, out)


def dry_run(args):
    """--dry-run: three pairs, the table of parts (prepare prints it), memory; nothing is written."""
    run = prepare(args)
    for pair in run.train.rows[:3]:
        ids = core.text_ids(run.model.tokenizer, [pair.text])["input_ids"][0]
        run.accelerator.print(f"{pair.name}: {run.model.tokenizer.decode(ids)!r}; picture {pair.image_id}")
    loop.dry_run(run, rehearse)


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
        images = len({pair.image_id for pair in run.val.rows})
        streamed = sum(shard.samples for shard in run.stream.shards)
        say(f"{len(run.train)} training pairs and {streamed} in tar files, {len(run.val)} validation pairs of {images} pictures; "
            f"{run.total} steps of {min(len(run.train), run.args.batch_size * run.accelerator.num_processes)}, lr {args.lr:g}, "
            f"precision {run.accelerator.mixed_precision}, {run.accelerator.device}")
        say(f"a model that knows nothing: {told(run.chance())}; recall of a random order: {told(chance(len(run.val), images))}")
        rehearse(run)
        train(run, out, stop)
        if run.log:
            run.log.close()
            if not stop.number and run.marks["value"] is not None:
                checkpoints.load_trainable(run.model, checkpoints.load_checkpoint(out / "best.pt")["state"], out / "best.pt")
                export(run.model, out / "hf")
                say(f"{out / 'hf'}: for {NEXT}")
    run.accelerator.end_training()
    return run, stop.number


def convert(args):
    """--convert: a LAVIS stage-1 .pth or a best.pt as a folder in HuggingFace's format."""
    folder = pathlib.Path(args.out) / "hf"
    if folder.exists():
        raise DataError(f"{folder} is there already: choose another --out")
    files.refuse_unwritable(folder)
    args.init = args.convert
    published.refuse_missing({"BLIP-2": published.missing_model(args.blip2, "blip2-itm")})
    export(load_model(args, core.DTYPES["fp16"]), folder)
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
        run, signal_number = fit(args)
    return runfolder.ended(run, signal_number, "mean recall", "pretrain_qformer.py", argv)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
