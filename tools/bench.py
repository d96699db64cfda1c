"""bench.py: what a run costs, recipes side by side in one run: they take turns, and the median of their ratios counts.

    python tools/bench.py                     # training and answering, from transformers' BLIP-2 as it comes to ours, step by step
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
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import nn
from torch.utils import flop_counter
from tqdm import tqdm

import core
import train_blip_caption
import train_cir
import train_gated
from data import rows
from engine import answering, checkpoints, compiling, errors, files, flags, loop, memory, packing, published
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
STYLES = 6  # of the small size's pictures
LOUD = 25  # times: the end of a line is so much likelier than other tokens of random weights, for answers of a few tokens
EVERY = 3  # question is asked of the slowest recipe, one at a time
CANDIDATES = 64  # answers of the closed list that is ranked
MINUTES = 8  # of --size full; what is not measured by then is left out, and named
ANSWER = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": 0.0, "do_sample": False}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=tuple(BENCHES), default="gated", help="(default: gated)")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="of gated (default: small)")
    parser.add_argument("--plan", action="store_true", help="with --size full: compute the memory from the shapes and run nothing")
    parser.add_argument("--batch-size", type=flags.positive, help="of training; answers: --answer-batch (default: gated 16, fusion 4, "
                                                                  "captions 32)")
    parser.add_argument("--answer-batch", type=flags.positive, default=memory.ANSWERS, help="of gated (default: 64)")
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


def in_turns(recipes, repeats):
    """Run functions of {name: function}, each of which returns how many samples it went through, in turns -> {name: [seconds a sample]}."""
    times = {name: [] for name in recipes}
    for _ in tqdm(range(repeats), desc="rounds", disable=None):
        for name, function in recipes.items():
            done = []
            times[name].append(seconds(lambda function=function, done=done: done.append(function())) / done[0])
    return times


def ratio(slow, fast):
    """Median of the ratios of two lists of seconds, round by round."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def staircase(times):
    """What in_turns measured of recipes that build on each other -> rows {name, per_second, factor: of this step, total: of all so far}."""
    names = list(times)
    return [{"name": name, "per_second": 1 / statistics.median(times[name]), "factor": ratio(times[before], times[name]),
             "total": ratio(times[names[0]], times[name])} for before, name in zip([names[0], *names], names)]


def with_operations(steps, counted):
    """Rows of a staircase with what each recipe has to do, {name: operations a sample}: `gflop` a sample, `by_operations`: how many times
    as fast as the first it would be at the first's rate, and `gflops`: its own rate."""
    first = counted[steps[0]["name"]]
    return [{**step, "gflop": counted[step["name"]] / 1e9, "by_operations": first / counted[step["name"]],
             "gflops": counted[step["name"]] * step["per_second"] / 1e9} for step in steps]


def operations(function):
    """Operations of the matrix products of a function (a multiply-add = 2), attention's too, a sample: it returns their number."""
    def forward(query, key, value, *args, **kwargs):
        return flop_counter.sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *args, **kwargs):
        return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    on_a_cpu = {aten._scaled_dot_product_flash_attention_for_cpu: forward,  # torch counts the kernels of GPUs alone
                aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with flop_counter.FlopCounterMode(display=False, custom_mapping=on_a_cpu) as counter:
        samples = function()
    return counter.get_total_flops() / samples


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
    and a mean over samples are the same. A third of them is the picture's style. Beside it a style classifier.
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
    model.language_model.get_output_embeddings().weight.data[core.newline_id(tokenizer)] *= LOUD
    make_tiny.save_folder(model, tokenizer, blip2)
    short = [word for word in words if len(tokenizer(" " + word, add_special_tokens=False).input_ids) == 1]
    draw = np.random.default_rng(seed)
    styles = list(dict.fromkeys(short))[:STYLES]
    net = core.EfficientNet28(STYLES, make_tiny.ARCH, styles)
    checkpoints.save_checkpoint(folder / "efficientnet.pt", {"model": net.net.state_dict(), "arch": make_tiny.ARCH, "classes": styles})
    for split in ("train", "val"):
        with files.whole_file(folder / f"{split}.csv") as file:
            table = csv.writer(file)
            table.writerow(("image", "question", "answer", "question_type", "style"))
            for number in range(pictures):
                pixels = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256))
                pixels.save(folder / "images" / f"{split}{number}.jpg")
                for n, length in enumerate(np.clip(draw.lognormal(2.0, 0.75, questions), 2, 40).astype(int)):
                    style = styles[number % STYLES]
                    table.writerow((f"{split}{number}.jpg", " ".join(draw.choice(short, length)) + "?",
                                    draw.choice(short) if n % 3 else style, "what", style))
    return tokenizer


class Lean(NamedTuple):
    """train_gated.py's run as `lean_run` prepares it."""
    run: Run
    parts: train_gated.Parts
    args: argparse.Namespace


def lean_run(folder, *more, batch_size=16):
    """train_gated.py on that task with its defaults, a cache and a Q-Former that is trained, at a learning rate of 0 -> Lean."""
    flags = ["--data", str(folder), "--blip2", str(folder / "blip2"), "--efficientnet", str(folder / "efficientnet.pt"),
             "--cache", str(folder / "cache"), "--train-qformer", "--batch-size", str(batch_size), "--workers", "0"]
    with contextlib.redirect_stdout(None):
        args = train_gated.get_args([*flags, *more])
        run, parts = train_gated.prepare(args, train_gated.start(args))
    run.lr = lambda step: 0.0  # the whole work of a step, but the weights stay, so that losses can be compared
    for group in run.optimizer.param_groups:  # half_epoch steps without Run
        group["lr"] = 0.0
    return Lean(run, parts, args)


class Plain:
    """The recipe of the textbooks: transformers' BLIP-2, the vision tower in each step, text padded to 64, logits at every place,
    AdamW as it comes; answers one at a time or in batches. cached: the tower's features come from the cache, the first step to ours."""

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
        self.tower, self.cached = self.model.vision_model, None
        self.losses, self.answers = [], []

    def features_from(self, data):
        """data: Questions whose features stand in for the vision tower; None: the tower works."""
        self.cached = data
        self.model.vision_model = self.tower if data is None else Kept(self.tower)

    def inputs(self, chosen, width=None):
        """Rows -> the processor's fields; width: text tokens, padded on the right, with labels; None: prompts alone."""
        Q, size = self.model.config.num_query_tokens, self.run.model.image_size
        if self.cached:
            pixels = torch.stack([self.cached.features[row.image]["image_embeds"] for row in chosen])  # [B,P,W]
        else:
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
    def answer(self, batch_size=1, by_length=False, every=1):
        """Answers to every so manieth validation question."""
        self.model.eval()
        asked, found = self.lean.parts.val.rows[::every], {}
        for picked in batches_of(asked, batch_size, by_length):
            inputs = self.inputs([asked[n] for n in picked])
            ids = self.model.generate(**inputs, **ANSWER, eos_token_id=core.newline_id(self.tokenizer),
                                      pad_token_id=self.tokenizer.pad_token_id)
            before = inputs["input_ids"].shape[1] if ids.shape[1] > ANSWER["max_new_tokens"] + 1 else 0  # some versions give the prompt too
            found |= zip(picked, (text_of(self.tokenizer, row[before:]).split("\n")[0].strip() for row in ids))
        self.answers = [found[n] for n in range(len(asked))]


class Kept(nn.Module):
    """In the place of a vision tower: its features pass."""

    def __init__(self, tower):
        super().__init__()
        self.config, self.dtype = tower.config, tower.dtype

    def forward(self, pixel_values, **kwargs):
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=pixel_values[:, 0])


def batches_of(asked, size, by_length):
    """Numbers of the rows in lists of `size`, as they come or by the length of their text."""
    order = sorted(range(len(asked)), key=lambda n: text_length(asked[n])) if by_length else range(len(asked))
    return [list(order[start:start + size]) for start in range(0, len(order), size)]


def lean_epoch(lean):
    """One pass over the training rows, with train_gated.py's own step -> mean loss of the answers, without the style terms."""
    losses, run = [], lean.run
    handle = run.model.register_forward_hook(lambda module, inputs, parts: losses.append(parts["lm"].mean().item()))
    run.step = 0
    run.wrapped.train()
    for step in run.steps(0):
        train_gated.train_step(run, step, lean.parts.weights)
        step.update()
    handle.remove()
    return statistics.mean(losses)


@contextlib.contextmanager
def padded(model):
    """A model whose language model runs on padded batches for a while."""
    model.language_model.set_attn_implementation("sdpa")
    yield
    packing.pack_samples(model.language_model)


def half_epoch(lean, multiple, by_length, gated=False, **weights):
    """lean_epoch on the way from the plain recipe: text padded to a multiple, batches sorted or not, gates and style terms or none."""
    run, train, losses = lean.run, lean.parts.train, []
    read, device = train.rows, run.accelerator.device
    lengths = [text_length(row) for row in read] if by_length else None
    run.wrapped.train()
    for _, share in loop.epoch_plan(len(read), lean.args.batch_size, lean.args.accumulation, 0, 0, lengths=lengths):
        for _, picked in share:
            batch = lean.parts.collate([train[n] for n in picked])
            batch |= core.encode_training(run.model.tokenizer, [read[n].question for n in picked], [read[n].answer for n in picked],
                                          run.model.max_answer, multiple=multiple)
            with run.accelerator.autocast():
                parts = run.wrapped(**send_to_device(batch, device), gated=gated, **weights)
            (parts["loss"] / len(share)).backward()
            losses.append(parts["lm"].mean().item())
        torch.nn.utils.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], CLIP)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return statistics.mean(losses)


@torch.no_grad()
def lean_answers(lean, batch_size, **how):
    """Answers to all validation questions in batches of about equal length, from the cache; how: see predict_answers."""
    run, val, found = lean.run, lean.parts.val, {}
    run.model.eval()
    for picked in batches_of(val.rows, batch_size, by_length=True):
        samples = [val[n][0] for n in picked]
        features = {name: torch.stack([one[name] for one in samples]).to(run.accelerator.device) for name in samples[0]}
        found |= zip(picked, run.model.predict_answers(None, [val.rows[n].question for n in picked], **features,
                                                       max_new_tokens=ANSWER["max_new_tokens"], batch_size=batch_size, **how))
    return [found[n] for n in range(len(val.rows))]


@contextlib.contextmanager
def switched(module, name, value):
    """A module's attribute at another value for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)


def gated(args):
    """The plain recipe against ours, the same weights and samples."""
    if args.size == "full":
        found = plan_table() if args.plan else full(args)
    else:
        with tempfile.TemporaryDirectory() as place:
            found = small(pathlib.Path(place), args.batch_size or 16, args.repeats or 3, args.answer_batch)
    if args.json:
        with files.whole_file(args.json) as file:
            json.dump(found, file, indent=1)


def small(folder, batch_size, repeats, answer_batch, pictures=32, questions=3, sizes=SMALL):
    write_task(folder, sizes, pictures, questions)
    building = time.perf_counter()
    lean = lean_run(folder, batch_size=batch_size)
    building, run, train = time.perf_counter() - building, lean.run, lean.parts.train
    plain, losses, answers = Plain(folder, lean), {}, {}
    texts = ([getattr(row, name) for row in train.rows] for name in ("question", "answer", "context"))
    lengths, count = core.text_lengths(run.model.tokenizer, *texts), sum(len(group) for group, _ in run.plan(0))
    print(f"{count} questions on {pictures} pictures, {statistics.mean(lengths):.0f} text tokens in the mean, "
          f"{max(lengths)} at most; batch {batch_size} x {lean.args.accumulation}, answers in batches of {answer_batch}, "
          f"{run.accelerator.device}, precision {run.accelerator.mixed_precision}, {torch.get_num_threads()} threads")
    recipes = training_recipes(lean, plain, losses)
    times = in_turns(recipes, repeats)
    frozen = times.pop(FROZEN)
    counted = {name: operations(function) for name, function in recipes.items()}
    steps = with_operations(staircase(times), counted)
    ours = list(times.values())[-1]
    answer_times = in_turns(answer_recipes(lean, plain, answers, answer_batch), repeats)
    ranked = answer_times.pop(RANKED)
    answer_steps, ours_answers = staircase(answer_times), list(answer_times.values())[-1]
    one, *others = [found for name, found in answers.items() if name != RANKED]
    found = {"train_speedup": steps[-1]["total"], "frozen_qformer_speedup": ratio(times["plain"], frozen),
             "frozen_qformer_by_operations": counted["plain"] / counted[FROZEN],
             "answer_speedup": answer_steps[-1]["total"], "batched_answer_speedup": ratio(answer_times["plain, in batches"], ours_answers),
             "loss_difference": max(abs(loss - losses["plain"]) for loss in losses.values()),
             "answers_equal": min(sum(map(str.__eq__, one, other[::EVERY])) for other in others) / len(one),
             "gate_cost": gate_cost(repeats), "training_steps": steps, "answer_steps": answer_steps, "training_seconds": times,
             "answer_seconds": answer_times, "ranked_per_second": 1 / statistics.median(ranked),
             "plain_samples_per_second": steps[0]["per_second"], "lean_samples_per_second": 1 / statistics.median(ours),
             "plain_answers_per_second": answer_steps[0]["per_second"], "lean_answers_per_second": answer_steps[-1]["per_second"],
             "matrix_product_flops": matrix_product_rate(run.accelerator.device.type, core.DTYPES[run.accelerator.mixed_precision]),
             "plain_loss": losses["plain"], "lean_loss": losses[list(times)[-1]], **kept_bytes(lean, plain),
             "answer_words": statistics.mean(len(answer.split()) for answer in one), "seconds_to_load_and_cache": building}
    report(found, len(one), answer_batch)
    return found


FROZEN, RANKED = "Q-Former frozen, as without --train-qformer", f"a list of {CANDIDATES} answers ranked"


def training_recipes(lean, plain, losses):
    """{name: function} from the plain recipe to train_gated.py's, each with all that those before it have; each leaves its loss in
    `losses`. The last is the default with its Q-Former frozen, which the plain recipe trains."""
    def plain_epoch(data):
        plain.features_from(data)
        plain.epoch()
        return statistics.mean(plain.losses)

    def with_pads(*how):
        with padded(run.model):
            return half_epoch(lean, *how)

    def frozen():
        run.model._freeze(train_qformer=False, own_kv=False)
        loss = lean_epoch(lean)
        run.model._freeze(train_qformer=True, own_kv=False)
        return loss

    run = lean.run
    recipes = {"plain": lambda: plain_epoch(None), "+ cache of the tower's features": lambda: plain_epoch(lean.parts.train),
               "+ logits of answers alone": lambda: with_pads(PADDED, False),
               "+ pads to the longest of a batch": lambda: with_pads(4, False),
               "+ a step's batches by length": lambda: with_pads(4, True),
               "+ no pads": lambda: half_epoch(lean, 4, True),
               "+ film gates": lambda: half_epoch(lean, 4, True, True),
               "+ both style terms: ours": lambda: lean_epoch(lean), FROZEN: frozen}

    def noted(name):
        losses[name] = recipes[name]()
        return len(lean.run.plan(0)) * len(lean.run.plan(0)[0][0])  # rows of an epoch
    return {name: lambda name=name: noted(name) for name in recipes}


def answer_recipes(lean, plain, answers, batch_size):
    """As training_recipes, of answering with 5 beams; each leaves its answers in `answers`."""
    def plain_answers(data, *how):
        plain.features_from(data)
        plain.answer(*how)
        return plain.answers

    def ours(leave, gated):
        with switched(answering, "LEAVE", leave):
            return lean_answers(lean, batch_size, gated=gated)

    def with_pads(leave):
        with padded(lean.run.model):
            return ours(leave, False)

    val, nobody = lean.parts.val, 2.0
    candidates = sorted({row.answer for row in lean.parts.train.rows})[:CANDIDATES]
    recipes = {"plain, one at a time": lambda: plain_answers(None, 1, False, EVERY),
               "plain, in batches": lambda: plain_answers(None, batch_size),
               "+ cache of the tower's features": lambda: plain_answers(val, batch_size),
               "+ sorted by length": lambda: plain_answers(val, batch_size, True),
               "+ a prompt once for all its beams": lambda: with_pads(nobody),
               "+ who is done leaves": lambda: with_pads(answering.LEAVE),
               "+ no pads": lambda: ours(answering.LEAVE, False),
               "+ film gates: ours": lambda: ours(answering.LEAVE, True),
               RANKED: lambda: lean_answers(lean, batch_size, method="rank", answers=candidates)}

    def noted(name):
        answers[name] = recipes[name]()
        return len(answers[name])
    return {name: lambda name=name: noted(name) for name in recipes}


def kept_bytes(lean, plain):
    """Bytes kept for the backward pass of the second batch of a step, whose questions are the longer ones."""
    run, train = lean.run, lean.parts.train
    longest = run.plan(0)[0][1][-1][1]
    batch = send_to_device(lean.parts.collate([train[n] for n in longest]), run.accelerator.device)
    plain.features_from(None)
    return {"plain_kept_bytes": loop.activation_bytes(
                plain.model, lambda: plain.model.train()(**plain.inputs([train.rows[n] for n in longest], PADDED))),
            "lean_kept_bytes": loop.activation_bytes(run.model, lambda: run.model.train()(**batch, **lean.parts.weights))}


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


def report(found, asked, answer_batch):
    """The two staircases and what they must not cost."""
    for heading, steps in (("training, samples/s", "training_steps"), (f"answers of 5 beams in batches of {answer_batch}, questions/s",
                                                                       "answer_steps")):
        counted = "gflop" in found[steps][0]
        print(f"\n{heading:52}{'rate':>9}{'this step':>11}{'together':>10}"
              + f"{'GFLOP':>8}{'by operations':>15}{'GFLOP/s':>9}" * counted)
        for step in found[steps]:
            print(f"{step['name']:52}{step['per_second']:>9.2f}{step['factor']:>11.2f}{step['total']:>10.2f}"
                  + (f"{step['gflop']:>8.2f}{step['by_operations']:>15.2f}{step['gflops']:>9.0f}" if counted else ""))
    print(f"\ntraining: {found['train_speedup']:.2f} times plain, the Q-Former trained in both; frozen in ours, the flags' default: "
          f"{found['frozen_qformer_speedup']:.2f} ({found['frozen_qformer_by_operations']:.2f} by operations); a large matrix "
          f"product runs at {found['matrix_product_flops'] / 1e9:.0f} GFLOP/s\n"
          f"answers: {found['answer_speedup']:.2f} times one at a time, {found['batched_answer_speedup']:.2f} times plain batches; "
          f"{RANKED}: {found['ranked_per_second']:.1f} questions/s\n"
          f"losses differ by {found['loss_difference']:.1e}; {found['answers_equal']:.1%} of {asked} answers are the same "
          f"({found['answer_words']:.1f} words in the mean)\n"
          f"kept for the backward pass, MiB: plain {found['plain_kept_bytes'] / 2**20:.1f}, ours {found['lean_kept_bytes'] / 2**20:.1f}\n"
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
    published.quiet_bitsandbytes()
    from bitsandbytes.nn import Linear4bit, Params4bit
    for module in list(layers.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                packed = Linear4bit(linear.in_features, linear.out_features, compute_dtype=dtype, quant_type="nf4",
                                    compress_statistics=True)
                packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
                packed.bias = linear.bias
                setattr(module, name, packed.to(device))
    published.keep_4bit_layout(layers)


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


def full(args, sizes=FULL, batches=(2, 8, 64), minutes=MINUTES):
    """Memory, rates and the share of the card's own matrix-product rate, for each precision of the language model, with gates alone
    trained and with the Q-Former; with the gates alone also with what is an option. What the time does not suffice for is named."""
    if not torch.cuda.is_available() and sizes is FULL:
        raise rows.DataError("--size full needs a GPU; --plan computes the memory from the shapes")
    device, end = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic() + 60 * minutes
    card, found, left_out = torch.cuda.get_device_name() if device == "cuda" else "a CPU", [], []
    rate = matrix_product_rate(device)
    print(f"{card}: {rate / 1e12:.3g} TFLOP/s in bf16 products of {PRODUCT[device]} x {PRODUCT[device]}\n\n"
          f"{'lm':5}{'trained':19}{'option':9}{'batch':>6}{'loaded':>8}{'forward':>9}{'training':>9}{'answers':>9}"
          f"{'samples/s':>11}{'TFLOP/s':>9}{'share':>7}{'answers/s':>11}")
    for train_qformer, lm, option in WAYS:
        if lm == "nf4" and not importlib.util.find_spec("bitsandbytes"):
            left_out.append("nf4 (pip install bitsandbytes)")
            continue
        model = None
        for batch_size in batches:
            way = f"{lm}, {'Q-Former and gates' if train_qformer else 'gates'}, {option or 'as it is'}, batch {batch_size}"
            if time.monotonic() > end:
                left_out.append(way)
                continue
            try:
                model = model or with_option(random_model(sizes, device, torch.bfloat16, lm, train_qformer), option)
                one = full_size_row(sizes, model, device, option, batch_size, rate, args.repeats or 10)
            except torch.OutOfMemoryError as error:
                print(f"{way}: out of memory: {str(error)[:60]}")
                torch.cuda.empty_cache()
                continue
            found.append({"card": card, "lm": lm, **one})
            memory = "".join(f"{one[name] / 2**30:>{width}.2f}"
                             for name, width in (("loaded", 8), ("forward", 9), ("training", 9), ("answering", 9)))
            print(f"{lm:5}{one['trained']:19}{option:9}{batch_size:>6}{memory}{one['samples_per_second']:>11.1f}{one['tflops']:>9.3g}"
                  f"{one['share']:>7.1%}{one['answers_per_second']:>11.1f}", flush=True)
        del model  # before the next is made
    print("memory in GiB, all of it: weights, gradients, optimizer, activations"
          + "".join(f"\nleft out: {way}" for way in left_out))
    return {"matrix_product_flops": rate, "rows": found, "left_out": left_out}


# is the Q-Former trained, the language model, and "graphs": answers by recorded steps, or "compile": of training; the most wanted first
WAYS = [(False, "bf16", ""), (False, "bf16", "graphs"), (False, "bf16", "compile"), (False, "nf4", ""), (True, "bf16", ""),
        (True, "nf4", "")]


def with_option(model, option):
    """A model as training has it, without pads, and with one of the options of WAYS."""
    packing.pack_samples(model.language_model)
    if option == "graphs":
        answering.record_steps(model.language_model)
    elif option == "compile":
        device = model.query_tokens.device.type
        compiling.compile_layers(model.language_model, types.SimpleNamespace(
            print=print, autocast=lambda: torch.autocast(device, torch.bfloat16)))
    return model


def full_size_row(sizes, model, device, option, batch_size, rate, repeats):
    """One row of the table of `full`."""
    batch = random_batch(model, sizes, batch_size)
    questions = ["a man in a blue coat and a dog"] * batch_size

    def answer():
        model.eval().predict_answers(None, questions, image_embeds=batch["image_embeds"], style_feature=batch["style_feature"],
                                     batch_size=batch_size, max_new_tokens=ANSWER["max_new_tokens"])

    loaded = peak_memory(lambda: None)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        forward = peak_memory(lambda: model.eval()(**batch))
    answer()  # a GPU's kernels are chosen, steps recorded
    answers = peak_memory(answer)
    step = train_step_of(model, batch, "bf16")
    step()
    training = peak_memory(step)
    per_step = statistics.median(seconds(step) for _ in range(repeats))
    per_answer = statistics.median(seconds(answer) for _ in range(min(3, repeats))) / batch_size
    flops = step_flops(sizes, model) * batch_size
    return {"trained": "Q-Former and gates" if model.query_tokens.requires_grad else "gates", "option": option, "batch": batch_size,
            "loaded": loaded, "forward": forward, "training": training, "answering": answers,
            "samples_per_second": batch_size / per_step, "tflops": flops / per_step / 1e12, "share": flops / per_step / rate,
            "answers_per_second": 1 / per_answer}


PRODUCT = {"cuda": 8192, "cpu": 512}  # width of the matrices whose product tells a machine's rate


def matrix_product_rate(device, dtype=torch.bfloat16):
    """Operations a second of a large matrix product: what this card can do at best."""
    size = PRODUCT[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
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
