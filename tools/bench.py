"""bench.py: what a run costs, two recipes side by side in one run: interleaved pairs, the median of their ratios.

    python tools/bench.py                     # training and answering: transformers' BLIP-2 as it comes against ours, a minute
    python tools/bench.py --size full         # BLIP-2 OPT-2.7B's shapes with random weights on a GPU: memory, samples/s, TFLOP/s
    python tools/bench.py --size full --plan  # the same table computed from the shapes, without a GPU
    python tools/bench.py growth              # the cache and training at 1x, 4x and 16x the pictures, and in two processes
    python tools/bench.py fusion              # train_cir.py's step with and without gated fusion, at BLIP-2's widths
    python tools/bench.py captions            # the tiny BLIP's captions one by one and in batches: the same captions?

Absolute times depend on the machine and on what else it does; a ratio of neighbours in time does not.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import nn
from tqdm import tqdm

import core
import train_blip_caption
import train_cir
import train_gated
from data import rows
from engine import errors, files, flags, loop, memory
from engine.evaluation import text_length
from engine.run import CLIP, Run
from engine.text import text_of
from tools import make_tiny

# BLIP-2 OPT-2.7B, and one in which vision tower, language model, Q-Former and word head have about the same shares of the work
FULL = {"vision": {},  # ViT-g: transformers' defaults
        "qformer": {"vocab_size": 30523, "encoder_hidden_size": 1408},
        "text": {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "vocab_size": 50304, "max_position_embeddings": 2048, "dropout": 0.0}, "queries": 32}
SMALL = {"vision": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 6,
                    "image_size": 224, "patch_size": 14},
         "qformer": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6,
                     "encoder_hidden_size": 192, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                     "max_position_embeddings": 64},
         "text": {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
                  "vocab_size": 1256, "max_position_embeddings": 256, "dropout": 0.0}, "queries": 32}
PADDED = 64  # text tokens of the plain recipe
POOL = 16  # --length-pool beside the default of 1
ANSWER = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": 0.0, "do_sample": False}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=tuple(BENCHES), default="gated", help="(default: gated)")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="of gated (default: small)")
    parser.add_argument("--plan", action="store_true", help="with --size full: compute the memory from the shapes and run nothing")
    parser.add_argument("--batch-size", type=flags.positive, help="(default: gated 16, fusion 4, captions 32)")
    parser.add_argument("--data", default="data/artquest", metavar="DIR", help="of captions (default: data/artquest)")
    parser.add_argument("--cached", action="store_true", help="fusion: without the vision tower, as with a cache of its features")
    parser.add_argument("--repeats", type=flags.positive, help="pairs (default: gated 3, others 10)")
    parser.add_argument("--json", metavar="FILE", help="the figures of gated")
    args = parser.parse_args(argv)
    if args.plan and args.size != "full":
        parser.error("--plan is for --size full")
    return args


# --- measuring ------------

def seconds(function):
    """Seconds that a function takes, with everything that it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(first, second, repeats):
    """Run two functions in turns -> (median seconds of the first, of the second, median of second / first)."""
    first(), second()  # warm up
    pairs = [(seconds(first), seconds(second)) for _ in tqdm(range(repeats), desc="pairs", disable=None)]
    return *(statistics.median(side) for side in zip(*pairs)), statistics.median(b / a for a, b in pairs)


def peak_memory(function):
    """Bytes of GPU memory that a function needs at most, with what is held before it; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated()


# --- gated: a task with random weights in the files that the scripts read ------------

def config_of(sizes, tokenizer=None):
    """A transformers Blip2Config of these sizes."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")} if tokenizer else {}
    image = tokenizer.convert_tokens_to_ids("<image>") if tokenizer else 50265
    return Blip2Config(vision_config=Blip2VisionConfig(**sizes["vision"]).to_dict(),
                       qformer_config=Blip2QFormerConfig(**sizes["qformer"]).to_dict(),
                       text_config=OPTConfig(**sizes["text"], **ids).to_dict(), num_query_tokens=sizes["queries"],
                       image_token_index=image)


def write_task(folder, sizes, pictures, questions, seed=0):
    """A BLIP-2 of these sizes with random weights, and `questions` questions of mixed length on each of the pictures, as files.

    Texts have about 10 to 60 tokens with the answer, 20 in the mean; answers have one token each, so that a mean over tokens
    and a mean over samples are the same.
    """
    from transformers import Blip2ForConditionalGeneration
    loop.seed_everything(seed)
    words, blip2 = make_tiny.PHOTO_WORDS.split(), folder / "blip2"
    (folder / "images").mkdir(parents=True)
    blip2.mkdir()
    tokenizer = make_tiny.make_tokenizer([core.PROMPT.format(" ".join(words)) + " " + " ".join(words) + "\n"] * 3, blip2)
    model = Blip2ForConditionalGeneration(config_of({**sizes, "qformer": {**sizes["qformer"], "vocab_size": len(tokenizer)}},
                                                    tokenizer))
    for module in model.modules():  # the library's std of 0.02 makes all answers about equally likely at such widths
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 * module.weight.shape[1] ** -0.5)
    nn.init.normal_(model.query_tokens)
    model.language_model.tie_weights()
    make_tiny.save_folder(model, tokenizer, blip2)
    short = [word for word in words if len(tokenizer(" " + word, add_special_tokens=False).input_ids) == 1]
    draw = np.random.default_rng(seed)
    for split in ("train", "val"):
        with files.whole_file(folder / f"{split}.csv") as file:
            table = csv.writer(file)
            table.writerow(("image", "question", "answer", "question_type"))
            for number in range(pictures):
                pixels = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256))
                pixels.save(folder / "images" / f"{split}{number}.jpg")
                for length in np.clip(draw.lognormal(2.0, 0.75, questions), 2, 40).astype(int):
                    table.writerow((f"{split}{number}.jpg", " ".join(draw.choice(short, length)) + "?", draw.choice(short), "what"))
    return tokenizer


class Lean(NamedTuple):
    """train_gated.py's run as `lean_run` prepares it."""
    run: Run
    parts: train_gated.Parts
    args: argparse.Namespace


def lean_run(folder, *more, batch_size=16):
    """train_gated.py on that task, with a cache and a Q-Former that is trained, at a learning rate of 0 -> Lean."""
    flags = ["--data", str(folder), "--blip2", str(folder / "blip2"), "--cache", str(folder / "cache"), "--train-qformer",
             "--gating", "none", "--hit-weight", "0", "--kl-weight", "0", "--batch-size", str(batch_size), "--workers", "0",
             "--style", "none"]
    with contextlib.redirect_stdout(None):
        args = train_gated.get_args([*flags, *more])
        run, parts = train_gated.prepare(args, train_gated.start(args))
    run.lr = lambda step: 0.0  # the whole work of a step, but the weights stay, so that losses can be compared
    return Lean(run, parts, args)


class Plain:
    """The recipe of the textbooks: transformers' BLIP-2, the vision tower in each step, text padded to 64, logits at every place,
    AdamW as it comes; answers one at a time."""

    def __init__(self, folder, lean):
        from transformers import Blip2ForConditionalGeneration
        run, self.lean = lean.run, lean
        self.run, self.device, self.rows = run, run.accelerator.device, lean.parts.train.rows
        dtype = core.DTYPES[run.accelerator.mixed_precision]
        self.model = Blip2ForConditionalGeneration.from_pretrained(folder / "blip2", dtype=dtype).to(self.device)
        self.model.requires_grad_(False)
        for part in (self.model.qformer, self.model.language_projection):
            part.float().requires_grad_(True)
        self.model.query_tokens.data = self.model.query_tokens.data.float()
        self.model.query_tokens.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0)
        self.tokenizer, self.image_id = run.model.tokenizer, self.model.config.image_token_index
        self.losses, self.answers = [], []

    def inputs(self, chosen, width=None):
        """Rows -> the processor's fields; width: text tokens, padded on the right, with labels; None: prompts alone."""
        Q, size = self.model.config.num_query_tokens, self.run.model.image_size
        pixels = torch.stack([rows.picture_tensor(row.image, size) for row in chosen])  # [B,3,s,s]
        if width is None:
            text = core.encode_prompts(self.tokenizer, [row.question for row in chosen])
        else:
            text = core.encode_training(self.tokenizer, [row.question for row in chosen], [row.answer for row in chosen],
                                        multiple=width)
            text["labels"] = torch.cat([torch.full((len(chosen), Q), -100), text["labels"]], 1)
            text.pop("prompt_mask")
        B = len(chosen)
        text["input_ids"] = torch.cat([torch.full((B, Q), self.image_id), text["input_ids"]], 1)  # [B,Q+L]
        text["attention_mask"] = torch.cat([torch.ones(B, Q, dtype=torch.long), text["attention_mask"]], 1)
        return send_to_device({"pixel_values": pixels, **text}, self.device)

    def epoch(self):
        """One pass over the training rows, in random order, with as many batches a step as ours has."""
        self.model.train()
        losses, args = [], self.lean.args
        for _, share in loop.epoch_plan(len(self.rows), args.batch_size, args.accumulation, 0, 0):
            for _, picked in share:
                with self.run.accelerator.autocast():
                    loss = self.model(**self.inputs([self.rows[n] for n in picked], PADDED)).loss
                (loss / len(share)).backward()
                losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses = losses

    @torch.no_grad()
    def answer(self, count):
        """Answers to the first validation questions, one at a time."""
        self.model.eval()
        newline = core.newline_id(self.tokenizer)
        self.answers = []
        for row in self.lean.parts.val.rows[:count]:
            inputs = self.inputs([row])
            ids = self.model.generate(**inputs, **ANSWER, eos_token_id=newline, pad_token_id=self.tokenizer.pad_token_id)[0]
            new = ids[inputs["input_ids"].shape[1]:] if len(ids) > ANSWER["max_new_tokens"] + 1 else ids
            self.answers.append(text_of(self.tokenizer, new).split("\n")[0].strip())


def lean_epoch(lean):
    """One pass over the training rows, with train_gated.py's own step -> mean loss."""
    losses, run = [], lean.run
    handle = run.model.register_forward_hook(lambda module, inputs, parts: losses.append(parts["loss"].item()))
    run.step = 0
    run.wrapped.train()
    for step in run.steps(0):
        train_gated.train_step(run, step, lean.parts.weights)
        step.update()
    handle.remove()
    return statistics.mean(losses)


@torch.no_grad()
def lean_answers(lean, count, batch_size):
    """Answers to the first validation questions in batches of about equal length, from the cache."""
    run, val = lean.run, lean.parts.val
    run.model.eval()
    read, found = val.rows[:count], {}
    order = sorted(range(count), key=lambda n: text_length(read[n]))
    for start in range(0, count, batch_size):
        picked = order[start:start + batch_size]
        features = [val[n][0]["image_embeds"] for n in picked]
        embeds = torch.stack(features).to(run.accelerator.device)  # [B,P,W]
        found |= zip(picked, run.model.predict_answers(None, [read[n].question for n in picked], image_embeds=embeds,
                                                       max_new_tokens=ANSWER["max_new_tokens"]))
    return [found[n] for n in range(count)]


def gated(args):
    """The plain recipe against ours, the same weights and samples."""
    if args.size == "full":
        found = plan_table() if args.plan else full(args)
    else:
        with tempfile.TemporaryDirectory() as place:
            found = small(pathlib.Path(place), args.batch_size or 16, args.repeats or 3)
    if args.json:
        with files.whole_file(args.json) as file:
            json.dump(found, file, indent=1)


def small(folder, batch_size, repeats, pictures=32, questions=3, asked=32):
    write_task(folder, SMALL, pictures, questions)
    building = time.perf_counter()
    lean = lean_run(folder, batch_size=batch_size)
    building, run, train = time.perf_counter() - building, lean.run, lean.parts.train
    plain, results = Plain(folder, lean), {}
    texts = ([getattr(row, name) for row in train.rows] for name in ("question", "answer", "context"))
    lengths, count = core.text_lengths(run.model.tokenizer, *texts), sum(len(group) for group, _ in run.plan(0))
    print(f"{count} questions on {pictures} pictures, {statistics.mean(lengths):.0f} text tokens in the mean, "
          f"{max(lengths)} at most; batch {batch_size} x {lean.args.accumulation}, {run.accelerator.device}, "
          f"precision {run.accelerator.mixed_precision}, {torch.get_num_threads()} threads")

    def ours(pool=1):
        lean.args.length_pool = pool
        results["loss"] = lean_epoch(lean)

    def ours_answers():
        results["answers"] = lean_answers(lean, asked, 32)

    lean_s, plain_s, train_speedup = paired(ours, plain.epoch, repeats)
    _, _, pooled = paired(lambda: ours(POOL), ours, repeats)
    lean_a, plain_a, answer_speedup = paired(ours_answers, lambda: plain.answer(asked), repeats)
    equal = sum(a == b for a, b in zip(results["answers"], plain.answers))
    _, longest = run.plan(0)[0][1][-1]  # the second batch of a step, whose questions are the longer ones
    batch = send_to_device(lean.parts.collate([train[n] for n in longest]), run.accelerator.device)
    memory = {"plain": loop.activation_bytes(plain.model,
                                       lambda: plain.model.train()(**plain.inputs([train.rows[n] for n in longest], PADDED))),
              "lean": loop.activation_bytes(run.model, lambda: run.model.train()(**batch))}
    found = {"train_speedup": train_speedup, "pooled_speedup": train_speedup * pooled, "answer_speedup": answer_speedup,
             "loss_difference": abs(statistics.mean(plain.losses) - results["loss"]),
             "answers_equal": equal / asked, "gate_cost": gate_cost(repeats), "plain_samples_per_second": count / plain_s,
             "lean_samples_per_second": count / lean_s, "plain_answers_per_second": asked / plain_a,
             "lean_answers_per_second": asked / lean_a,
             "plain_loss": statistics.mean(plain.losses), "lean_loss": results["loss"], "plain_kept_bytes": memory["plain"],
             "lean_kept_bytes": memory["lean"], "seconds_to_load_and_cache": building}
    report(found, asked)
    return found


def gate_cost(repeats, sizes=None, batch_size=2):
    """Share of a training step that the gates take, at BLIP-2's widths with 4 of OPT's 32 layers: in the whole model it is less. The
    small sizes would not tell, since the gates' own widths do not shrink with them.

    What differs is timed apart, in pairs: the visual prompt with its backward pass, and the optimizer on the gates' parameters. Of
    whole steps the difference would drown in the noise of a shared machine."""
    sizes = sizes or {**FULL, "text": {**FULL["text"], "num_hidden_layers": 4}}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(sizes, device, torch.bfloat16 if device == "cuda" else torch.float32).train()
    batch = random_batch(model, sizes, batch_size)
    own = [p for part in (model.gates, model.mapper) for p in part.parameters()]
    optimizer = torch.optim.AdamW(own, lr=0.0, fused=True)

    def visual(gated):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model.visual_prompt(batch["image_embeds"], batch["style_feature"], batch["input_ids"], batch["prompt_mask"],
                                gated).sum().backward()

    visual(False), visual(True)  # warm up
    pairs = [(seconds(lambda: visual(False)), seconds(lambda: visual(True))) for _ in range(2 * repeats)]
    optimizer.step()
    update = statistics.median(seconds(lambda: (torch.nn.utils.clip_grad_norm_(own, CLIP), optimizer.step()))
                               for _ in range(repeats))
    step = train_step_of(model, batch, "bf16" if device == "cuda" else "no")
    step()
    return (statistics.median(b - a for a, b in pairs) + update) / statistics.median(seconds(step) for _ in range(repeats))


def report(found, asked):
    """The two columns."""
    print(f"\n{'':34}{'plain':>12}{'ours':>12}{'ratio':>9}")
    for name, unit, key, ratio in (("training, samples/s", 1, "samples_per_second", found["train_speedup"]),
                                   ("answers of 5 beams, questions/s", 1, "answers_per_second", found["answer_speedup"]),
                                   ("kept for the backward pass, MiB", 2**20, "kept_bytes", None), ("loss", 1, "loss", None)):
        plain, lean = found[f"plain_{key}"], found[f"lean_{key}"]
        print(f"{name:34}{plain / unit:>12.3f}{lean / unit:>12.3f}{ratio or plain / lean:>9.2f}")
    print(f"training with --length-pool {POOL}: {found['pooled_speedup']:.2f} times plain")
    print(f"losses differ by {found['loss_difference']:.1e}; {found['answers_equal']:.1%} of {asked} answers are the same; "
          f"the gates cost {found['gate_cost']:.1%} of a training step (BLIP-2's widths, 4 of 32 language model layers)")


# --- gated, full size ------------

def random_model(sizes, device, dtype, lm="bf16", train_qformer=True, gating="film"):
    """Blip2OPTGated of these sizes with random weights, without a vision tower: features come from a cache. lm: bf16 or nf4."""
    from transformers import Blip2ForConditionalGeneration
    config = config_of(sizes)
    width = config.vision_config.hidden_size
    config.vision_config.num_hidden_layers = 0
    with tempfile.TemporaryDirectory() as place, torch.device("cpu"):
        tokenizer = make_tiny.make_tokenizer(["Question: Answer: " + make_tiny.PHOTO_WORDS] * 3, pathlib.Path(place))
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            blip2 = Blip2ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    blip2.vision_model = None
    if lm == "nf4":
        pack(blip2.language_model.model.decoder.layers, device, dtype)
    style = nn.Identity()
    style.width = 1536  # EfficientNet-B3's
    model = core.Blip2OPTGated(blip2, tokenizer, style, [], gating, train_qformer=train_qformer).to(device)
    assert model.qformer.config.encoder_hidden_size == width
    return model


def pack(layers, device, dtype):
    """Put the linear layers into nf4 with double quantisation, as load_blip2 does."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    for module in list(layers.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                packed = Linear4bit(linear.in_features, linear.out_features, compute_dtype=dtype, quant_type="nf4",
                                    compress_statistics=True)
                packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
                packed.bias = linear.bias
                setattr(module, name, packed.to(device))


def random_batch(model, sizes, batch_size, words=28, labels=4):
    """A batch of collate's fields with features in place of pictures: `words` text tokens, the last `labels` of them the answer."""
    device, vocabulary = model.query_tokens.device, sizes["text"]["vocab_size"]
    patches = (sizes["vision"].get("image_size", 224) // sizes["vision"].get("patch_size", 14)) ** 2 + 1
    width = model.qformer.config.encoder_hidden_size
    ids = torch.randint(5, vocabulary, (batch_size, words), device=device)
    is_prompt = (torch.arange(words, device=device) < words - labels).expand(batch_size, -1)
    dtype = model.language_model.get_input_embeddings().weight.dtype
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_mask": is_prompt.long(),
            "labels": ids.masked_fill(is_prompt, -100),
            "image_embeds": torch.randn(batch_size, patches, width, device=device).to(dtype),
            "style_feature": torch.randn(batch_size, 1536, device=device)}


def step_flops(sizes, model, words=28, labels=4):
    """Operations of a training step a sample (one multiply-add = 2): the frozen language model forward and its input gradient, the
    head at label rows, the Q-Former; norms, softmax and the optimizer left out."""
    text, Q = sizes["text"], sizes["queries"]
    d, L, S = text["hidden_size"], text["num_hidden_layers"], sizes["queries"] + words
    linear = L * (4 * d * d + 2 * d * text["ffn_dim"])
    language = 2 * (2 * linear * S) + 3 * (4 * S * S * d * L) + 2 * (2 * labels * d * text["vocab_size"])
    cross = [a for layer in model.qformer.encoder.layer if layer.has_cross
             for a in (layer.crossattention.attention.key, layer.crossattention.attention.value)]
    image = sum(linear.weight.numel() for linear in cross) * ((224 // 14) ** 2 + 1)
    queries = (sum(p.numel() for p in model.qformer.parameters() if p.ndim == 2)
               - sum(linear.weight.numel() for linear in cross)) * Q
    trained = model.query_tokens.requires_grad
    # backward: the gradient of the queries, and with a trained Q-Former that of all its weights; the image's features need none
    return language + 2 * (queries + image) + 2 * queries * (2 if trained else 1) + (2 * image if trained else 0)


def train_step_of(model, batch, precision):
    """Function that does a whole training step on this batch."""
    optimizer = loop.make_optimizer(model, 0.0, 0.01, fused=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    device = model.query_tokens.device.type

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model.train()(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return step


def full(args, sizes=FULL, batches=(2, 16, 64, 128), asked=256):
    """Memory, rates and the share of the card's own matrix-product rate, for each precision of the language model."""
    if not torch.cuda.is_available() and sizes is FULL:
        raise rows.DataError("--size full needs a GPU; --plan computes the memory from the shapes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card, found = torch.cuda.get_device_name() if device == "cuda" else "a CPU", []
    rate = matrix_product_rate(device)
    print(f"{card}: {rate / 1e12:.0f} TFLOP/s in bf16 products of 8192 x 8192\n\n"
          f"{'language model':16}{'trained':20}{'batch':>6}{'loaded':>8}{'forward':>9}"
          f"{'training':>9}{'answers':>9}{'samples/s':>11}{'TFLOP/s':>9}{'share':>7}{'answers/s':>11}")
    for lm, train_qformer in itertools.product(("bf16", "nf4"), (True, False)):
        for batch_size in batches:
            torch.cuda.empty_cache()
            try:
                one = full_size_row(sizes, device, lm, train_qformer, batch_size, rate, args.repeats or 10)
            except torch.OutOfMemoryError as error:
                print(f"{lm:16}{'Q-Former and gates' if train_qformer else 'gates':20}{batch_size:>6}  "
                      f"out of memory: {str(error)[:60]}")
                continue
            found.append({"card": card, **one})
            memory = "".join(f"{one[name] / 2**30:>{width}.2f}"
                             for name, width in (("loaded", 8), ("forward", 9), ("training", 9), ("answering", 9)))
            print(f"{lm:16}{one['trained']:20}{batch_size:>6}{memory}{one['samples_per_second']:>11.1f}{one['tflops']:>9.1f}"
                  f"{one['share']:>7.1%}{one['answers_per_second']:>11.1f}")
    print("memory in GiB, all of it: weights, gradients, optimizer, activations")
    return {"matrix_product_flops": rate, "rows": found}


def full_size_row(sizes, device, lm, train_qformer, batch_size, rate, repeats):
    model = random_model(sizes, device, torch.bfloat16, lm, train_qformer)
    batch = random_batch(model, sizes, batch_size)
    questions = ["a man in a blue coat and a dog"] * batch_size

    def answer():
        with torch.autocast(device, torch.bfloat16):
            model.eval().predict_answers(None, questions, image_embeds=batch["image_embeds"], style_feature=batch["style_feature"])

    loaded = peak_memory(lambda: None)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        forward = peak_memory(lambda: model.eval()(**batch))
    answering = peak_memory(answer)
    step = train_step_of(model, batch, "bf16")
    step()
    training = peak_memory(step)
    per_step = statistics.median(seconds(step) for _ in range(repeats))
    per_answer = statistics.median(seconds(answer) for _ in range(3)) / batch_size
    flops = step_flops(sizes, model) * batch_size
    return {"lm": lm, "trained": "Q-Former and gates" if train_qformer else "gates", "batch": batch_size, "loaded": loaded,
            "forward": forward, "training": training, "answering": answering, "samples_per_second": batch_size / per_step,
            "tflops": flops / per_step / 1e12, "share": flops / per_step / rate, "answers_per_second": 1 / per_answer}


def matrix_product_rate(device, size=8192):
    """Operations a second of a large bf16 matrix product: what this card can do at best."""
    size = size if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size ** 3 / statistics.median(seconds(lambda: a @ b) for _ in range(10))


# --- gated, full size, on paper ------------

NF4_BITS = 4.127  # a weight, with double quantisation (QLoRA, 2023)


def plan_table(sizes=FULL, batches=(2, 8, 64)):
    """The memory of training computed from the shapes: weights, gradients, optimizer, activations."""
    print(f"{'language model':16}{'trained':20}{'activations':13}{'weights':>9}{'trained x 16 B':>16}"
          + "".join(f"{f'batch {b}':>10}" for b in batches))
    found = []
    for train_qformer, how in itertools.product((True, False), ("keep", "bits", "recompute")):
        model = random_model(sizes, "meta", torch.bfloat16, train_qformer=train_qformer)
        memory.save_activations(model.language_model, how)
        sample = loop.activation_bytes(model, lambda: shapes_of_a_step(model.train(), random_batch(model, sizes, 2))) / 2
        for lm in ("bf16", "nf4"):
            weights, trained = planned_weights(model, lm)
            found.append({"lm": lm, "trained": "Q-Former and gates" if train_qformer else "gates", "activations": how,
                          "weights": weights, "trained_bytes": trained, "sample": sample,
                          **{f"batch {b}": weights + trained + sample * b for b in batches}})
    for one in sorted(found, key=lambda one: one["lm"]):
        print(f"{one['lm']:16}{one['trained']:20}{one['activations']:13}{one['weights'] / 2**30:>9.2f}"
              f"{one['trained_bytes'] / 2**30:>16.2f}"
              + "".join(f"{one[f'batch {b}'] / 2**30:>10.2f}" for b in batches))
    print("computed from the shapes, GiB, torch's own peak: 32 queries + 28 text tokens, 4 label rows, features from a cache; "
          "the context of CUDA (about 0.5) comes on top")
    return {"computed": True, "rows": found}


def shapes_of_a_step(model, batch, labels=4):
    """Blip2OPTGated.forward where no label can be looked at: the answer is the last `labels` tokens of every row."""
    visual = model.visual_prompt(batch["image_embeds"], batch["style_feature"], batch["input_ids"], batch["prompt_mask"])
    inputs = model.decoder.inputs(visual, batch["input_ids"], batch["attention_mask"])["inputs_embeds"]  # [B,Q+L,D]
    model_inputs, (B, S, _) = {"inputs_embeds": inputs}, inputs.shape
    if hasattr(model.language_model.model.decoder, "_update_causal_mask"):  # before transformers 5 OPT makes a mask and looks at its
        # values: of one on the CPU it can; the positions are then given too, where it would compute them from the mask
        model_inputs |= {"attention_mask": torch.ones(B, S), "position_ids": torch.arange(S, device=inputs.device).expand(B, S)}  # [B,S]
    states = model.language_model.model(**model_inputs, use_cache=False).last_hidden_state
    logits = model.language_model.lm_head(states[:, -labels - 1:-1]).float()  # [B,labels,V]
    nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -labels:].flatten())


def planned_weights(model, lm):
    """(bytes of the frozen weights, bytes of what is trained: weight, gradient and AdamW's two moments in float32)."""
    linear = {id(m.weight) for m in model.language_model.model.decoder.layers.modules() if isinstance(m, nn.Linear)}
    frozen = trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += 16 * parameter.numel()
        else:
            frozen += parameter.numel() * (NF4_BITS / 8 if lm == "nf4" and id(parameter) in linear else parameter.element_size())
    return frozen, trained


# --- growth ------------

GROWTH = (16, 64, 256)  # training pictures, and as many for validation


def growth(args):
    """Time and memory of one epoch of train_gated.py on 1x, 4x and 16x the pictures, in one process and in two -> table, OUT.png."""
    found = []
    for pictures in GROWTH:
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            write_task(folder, SMALL, pictures, 3)
            first, peak = command_cost(folder, "first")
            again, peak_again = command_cost(folder, "again")
            size = sum(file.stat().st_size for file in (folder / "cache").glob("*.rows"))
            two, peak_two = command_cost(folder, "two", processes=2)
        found.append({"pictures": 2 * pictures, "questions": 3 * pictures, "cache_bytes": size, "first_seconds": first,
                      "seconds": again, "peak_bytes": max(peak, peak_again), "two_seconds": two, "two_peak_bytes": peak_two})
    print(f"\n{'pictures':>9}{'questions':>11}{'cache, MB':>11}{'first run, s':>14}{'again, s':>10}"
          f"{'peak, GiB':>11}{'two processes, s':>18}{'peak of each':>14}")
    for one in found:
        print(f"{one['pictures']:>9}{one['questions']:>11}{one['cache_bytes'] / 2**20:>11.0f}{one['first_seconds']:>14.0f}"
              f"{one['seconds']:>10.0f}"
              f"{one['peak_bytes'] / 2**30:>11.2f}{one['two_seconds']:>18.0f}{one['two_peak_bytes'] / 2**30:>14.2f}")
    if args.json:
        with files.whole_file(args.json) as file:
            json.dump(found, file, indent=1)
        draw_growth(found, pathlib.Path(args.json).with_suffix(".png"))


def command_cost(folder, out, processes=1):
    """(seconds, peak resident bytes of the largest process) of an epoch of train_gated.py, as a command of its own."""
    script = str(files.PROJECT / "train_gated.py")
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    flags = ["--data", folder, "--blip2", folder / "blip2", "--cache", folder / "cache", "--gating", "none", "--train-qformer",
             "--style", "none", "--epochs", 1, "--batch-size", 16 // processes, "--accumulation", 1, "--workers", 0,
             "--out", folder / out]
    began = time.perf_counter()
    threads = str(max(1, torch.get_num_threads() // processes))
    done = subprocess.Popen([*start, script, *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": threads})
    error = done.stderr.read()
    _, status, used = os.wait4(done.pid, 0)
    if status:
        raise rows.DataError(f"{script} failed: {error.strip().splitlines()[-1]}")
    return time.perf_counter() - began, used.ru_maxrss * 1024


def draw_growth(found, path):
    """Seconds and memory over the number of pictures."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    pictures = [one["pictures"] for one in found]
    for label, key, colour in (("first run: cache and epoch", "first_seconds", "C0"), ("again, from the cache", "seconds", "C1"),
                               ("again, two processes", "two_seconds", "C2")):
        axes[0].plot(pictures, [one[key] for one in found], "o-", label=label, color=colour)
    axes[1].plot(pictures, [one["peak_bytes"] / 2**30 for one in found], "o-", label="peak memory of the process", color="C0")
    axes[1].plot(pictures, [one["two_peak_bytes"] / 2**30 for one in found], "o-", label="each of two processes", color="C2")
    axes[1].plot(pictures, [one["cache_bytes"] / 2**30 for one in found], "o--", label="cache on disk", color="C7")
    for axis, heading in zip(axes, ("seconds", "GiB")):
        axis.set_title(heading, loc="left", fontsize=11)
        axis.set_xlabel("pictures")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    with files.whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


# --- parts of other stages ------------

def fusion(args):
    """A training step of SPRC, without and with the fusion: EVA-ViT-g, 257 patches of 1408, Q-Former of BERT-base's size, 32
    queries, sentences of 16 tokens. --cached: the features are there, so that the vision tower does not hide the gate."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionModel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Blip2Config(qformer_config=Blip2QFormerConfig(vocab_size=30523, use_qformer_text_input=True).to_dict(),
                         num_query_tokens=32)
    B, L, dtype = args.batch_size or 4, 16, torch.bfloat16 if device == "cuda" else torch.float32
    tower = torch.nn.Identity() if args.cached else Blip2VisionModel(config.vision_config).to(device, dtype)
    images = torch.randn(2 * B, 3, 224, 224, device=device)
    kept = torch.randn(2 * B, 257, 1408, device=device)
    text = {"input_ids": torch.randint(1000, 30000, (B, L), device=device),
            "attention_mask": torch.ones(B, L, dtype=torch.long, device=device)}

    def step_of(gated):
        loop.seed_everything(0)
        model = train_cir.Sprc(tower, config, None, gate=gated).to(device).train()
        optimizer = train_cir.make_optimizer(model, 1e-5, 0.05)

        def step():
            embeds = kept if args.cached else model.image_embeds(images)  # [2B,P,W]
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                model(embeds[:B], embeds[B:], **text)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    plain, gated, ratio = paired(step_of(False), step_of(True), args.repeats or 10)
    print(f"training step of {B} triplets on {device}: {plain:.3f} s without the gate, {gated:.3f} s with it, ratio {ratio:.3f}")


def captions(args):
    """Beam search of the tiny BLIP over the validation pictures of --data, one by one and in batches."""
    flags = train_blip_caption.get_args(["--data", args.data, "--blip", "tiny"])
    model, tokenizer = train_blip_caption.load_blip(flags.blip)
    data = train_blip_caption.Captions(train_blip_caption.read_data(flags, "val"), model.config.vision_config.image_size, tokenizer)
    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    model.eval().to(device)
    pixels = torch.stack([data[i][0]["pixel_values"] for i in range(len(data))]).to(device)

    def captioned(size):
        found[size] = [text for part in pixels.split(size)
                       for text in train_blip_caption.describe(model, tokenizer, part, train_blip_caption.GENERATION)]

    size = args.batch_size or 32
    batched, single, ratio = paired(lambda: captioned(size), lambda: captioned(1), args.repeats or 10)
    same = sum(a == b for a, b in zip(found[size], found[1]))
    print(f"{len(pixels)} captions, 5 beams, on {device}: {single:.2f} s one by one, {batched:.2f} s in batches of {size}, "
          f"ratio {ratio:.1f}; {same} of {len(pixels)} are the same")


BENCHES = {"gated": gated, "growth": growth, "fusion": fusion, "captions": captions}


def main(argv=None):
    args = get_args(argv)
    with errors.batch_size_in_memory_errors(args.batch_size or "of its default"):
        BENCHES[args.what](args)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
