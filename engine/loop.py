"""loop.py: what every training loop shares: order, seeds, learning rate, stopping.

    epoch_plan, seed_everything, cosine_lr  who sees which row when, and with which dropout: pure functions of whole numbers
    is_better, bad_loss                     whether best.pt is to be written; a loss that is no number, with its rows
    dry_run, activation_bytes, Pace         memory before a run, time to its end
    StopSignal, stop_requested              Ctrl-C, SIGTERM
"""

import math
import os
import random
import signal
import sys
import time

import numpy as np
import torch
from accelerate import Accelerator

from engine import loaders
from engine.errors import DataError


def bad_loss(what, step, group):
    """The message for a loss or gradient that is not finite."""
    return (f"{what} at step {step}; best.pt and last.pt are as they were; look at these rows, lower --lr, or use --precision "
            f"bf16 or no: {loaders.list_rows(group)}")


# --- stopping ------------

class StopSignal:
    """Ctrl-C or SIGTERM: the first sets .number, which the loop looks at between two steps; the second leaves at once."""

    number = 0  # of no signal: before and outside of `with` nobody stops a run

    def __enter__(self):
        self.number = 0
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
        print("\nstopping after this step; once more to leave at once", file=sys.stderr)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stop_requested(accelerator, stop):
    """Has any process been told to stop? All of them must agree, or the others would wait for ever; each then has the number."""
    if accelerator.num_processes > 1:
        numbers = accelerator.gather(torch.tensor([stop.number], device=accelerator.device))  # [processes]
        stop.number = stop.number or int(numbers.max())
    return bool(stop.number)


# --- memory and time, before and while a run goes on ------------

def activation_bytes(model, function):
    """Bytes of activations that a forward pass keeps for the backward one, the weights aside: what grows with the batch. Works on
    the meta device too, where nothing is computed."""
    weights, seen, held = {p.untyped_storage()._cdata for p in model.parameters()}, {}, []

    def note(tensor):
        held.append(tensor.untyped_storage())  # held, so that no storage's address is used twice
        seen[held[-1]._cdata] = held[-1].nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(size for place, size in seen.items() if place not in weights)


def dry_run(run, rehearse, cached=()):
    """--dry-run: the memory of a run, computed part by part, and what a rehearsal with the optimizer's moments really took.

    cached: cache.Stores that the run reads. Nothing is written."""
    trained = [p for p in run.model.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    kept = activation_bytes(run.model, lambda: rehearse(run))
    table = [("frozen weights", sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)), ("trained weights", size),
             ("their gradients", size), ("AdamW's moments", 2 * size), ("kept for the backward pass, longest batch", kept)]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.optimizer.zero_grad()
    rehearse(run)
    log = run.accelerator.print
    for what, needed in [*table, ("sum, computed", sum(needed for _, needed in table))]:
        log(f"{what:44}{needed / 2**20:>12,.1f} MiB")
    most, what = peak_memory()
    log(f"{what:44}{most / 2**20:>12,.1f} MiB")
    for store in cached:
        log(f"{f'on disk: {store.rows.name}':44}{store.rows.stat().st_size / 2**20:>12,.1f} MiB")


def peak_memory():
    """(bytes, in words): the most that this process has held on its GPU, without one in all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "measured, GPU"
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "measured, the whole process with Python"


def print_gpu_memory(accelerator):
    """After a rehearsal: what it took of the GPU, where there is one."""
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_allocated() / 2**30
        accelerator.print(f"most GPU memory in a rehearsal of the longest batches: {used:.1f} GiB")


class Pace:
    """Says once, PACE steps after the first, how fast a run is and when it will end; the first step is slower than all others."""

    def __init__(self, run, unit):
        self.run, self.unit, self.first, self.seen = run, unit, None, 0

    def step(self, count):
        """After an optimizer step on `count` samples of all processes together."""
        now = time.monotonic()
        if self.first is None:
            self.first = now, self.run.step
            return
        self.seen += count
        done = self.run.step - self.first[1]
        if done == PACE:
            each = (now - self.first[0]) / done
            left = (self.run.total - self.run.step) * each
            self.run.accelerator.print(f"{self.seen / (now - self.first[0]):.1f} {self.unit}/s; about {format_duration(left)} to the end, "
                                       "validation not counted")


def format_duration(seconds):
    """1 h 05 min, 12 min, 40 s."""
    minutes, hours = round(seconds / 60), round(seconds / 60) // 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min"


# --- numbers ------------

PACE = 20  # steps, see Pace


def cosine_lr(step, total, warmup, peak, floor=0.0):
    """Learning rate of optimizer step `step` (from 0): linear to peak over `warmup` steps, then cosine to floor at total.

    The first step already moves (peak / warmup); a warm-up longer than the run is cut to the run.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def seed_everything(*numbers):
    """Seed Python, numpy and torch from whole numbers, e.g. (seed, epoch, step): a pure function of them, so that a resumed
    run draws what the undisturbed one would have drawn."""
    state = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def epoch_plan(count, batch_size, accumulation, seed, epoch, rank=0, processes=1, lengths=None):
    """Who sees which row when: a pure function of its arguments.

    Returns for every optimizer step (group, micro-batches): group = row numbers of the whole effective batch
    (batch_size * accumulation * processes), micro-batches = this process's share as (number, row numbers), at most
    batch_size rows each. The micro-batches of a step are the same however many processes share them, and their number
    seeds dropout: 1 process with accumulation 2 trains to the same weights as 2 processes with accumulation 1. An
    incomplete last group is left out, unless it is the only one, which is then split evenly.

    lengths: tokens of every row. The rows of a group, which stay those of a random order, are then sorted by length: those of a
    micro-batch are about equally long.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    size = batch_size * accumulation * processes
    order = order[:max(count - count % size, min(count, size))]  # before the sorting, which would always leave out the longest
    groups = [order[i:i + size].tolist() for i in range(0, len(order), size)]
    if lengths is not None:
        groups = [sorted(group, key=lambda n: lengths[n]) for group in groups]
    if groups and len(groups[0]) < processes:
        raise DataError(f"{count} training rows are fewer than the {processes} processes")
    plan = []
    for group in groups:
        parts = math.ceil(len(group) / (batch_size * processes)) * processes  # as many for each process
        micro = [(k, part.tolist()) for k, part in enumerate(np.array_split(group, parts))]
        plan.append((group, micro[rank::processes]))
    return plan


def keys_of(steps):
    """The keys of each micro-batch of this process in some steps of epoch_plan, in order: what load_batches takes."""
    return [keys for _, share in steps for _, keys in share]


def format_metrics(numbers):
    """Numbers for the terminal: name value, with four decimals where it is not a whole number."""
    return ", ".join(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4f}" for name, value in numbers.items())


def make_optimizer(model, lr, weight_decay, scale_of=None, **more):
    """AdamW on what is trained; no decay on biases, norms and scalars (everything with fewer than two dimensions). scale_of: name of a
    parameter -> its rate as a multiple of each step's, see Run.steps."""
    groups = {(True, 1.0): [], (False, 1.0): []}  # these two always, in this order: an older last.pt has them
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, scale_of(name) if scale_of else 1.0), []).append(parameter)
    return torch.optim.AdamW([{"params": found, "weight_decay": weight_decay if decays else 0.0, **({"scale": scale} if scale != 1 else {})}
                              for (decays, scale), found in groups.items()], lr=lr, **more)


def is_better(value, progress, lowest=False):
    """Is this number above (lowest: below) the best so far, progress["value"] (None: there is none yet)? Never true of NaN."""
    best = progress["value"]
    return math.isfinite(value) and (best is None or (value < best if lowest else value > best))


def make_accelerator(precision, **more):
    """accelerate's Accelerator of a --precision, on the CPU where there is no GPU. more: its other arguments."""
    return Accelerator(mixed_precision=precision_of(precision), cpu=not torch.cuda.is_available(), **more)


def precision_of(precision):
    """--precision -> accelerate's word for it."""
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
