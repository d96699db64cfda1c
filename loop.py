"""loop.py: what every training loop shares: loaders, order, seeds, learning rate, stopping, exit codes.

    load_batches, next_batch, LoaderError   a DataLoader over given row numbers, and what it says when it fails
    epoch_plan, seed_everything, cosine_lr  who sees which row when, and with which dropout: pure functions of whole numbers
    batch_size_in_memory_errors, is_better  which batch size was too large; whether best.pt is to be written
    dry_run, kept_bytes, Pace               memory before a run, time to its end
    StopSignal, stopped, exit_code          Ctrl-C, SIGTERM; an error that a user can mend is one line
"""

import contextlib
import math
import os
import random
import re
import signal
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader

import rows
from core import to_device
from rows import DataError

# --- loaders ------------

def load_batches(data, collate, batches, workers):
    """A DataLoader over given lists of row numbers."""
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=outlive_signals if workers else None, timeout=600 if workers else 0)


class LoaderError(DataError):
    """A picture or a loader process failed between two steps: the model is as the last step left it."""


def next_batch(batches, device):
    """The next batch on its device; a LoaderError where one of its pictures is broken."""
    batch = next(batches)
    if "fault" in batch:
        raise LoaderError(batch["fault"])
    return to_device(batch, device)


@contextlib.contextmanager
def dead_loaders_named(group):
    """A loader process that dies within, which torch reports in the midst of anything, is a LoaderError with these rows."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(DEAD_LOADER, str(error)):
            raise
        raise LoaderError(f"{dead_loader(error)}; it was at {named(group)}") from None


def named(group):
    """Rows for a message: picture and place of the first few."""
    listed = [r.name + (f" ({rows.locate(r.file, r.line)})" if r.line else "") for r in group]  # a folder has no lines
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


DEAD_LOADER = r"DataLoader (worker \(pid|timed out)"  # what torch says of a loader process that died or hangs


def dead_loader(error):
    """The message for a loader process that was killed or hangs."""
    return (f"a loader process failed ({' '.join(str(error).split())[:160]}): use --workers 0, or give it more shared memory "
            "(/dev/shm); a hanging one often waits for a network disk")


def bad_loss(what, step, group):
    """The message for a loss or gradient that is not finite."""
    return (f"{what} at step {step}; best.pt and last.pt are as they were; look at these rows, lower --lr, or use --precision "
            f"bf16 or no: {named(group)}")


# --- stopping ------------

class StopSignal:
    """Ctrl-C or SIGTERM: the first sets .number, which the loop looks at between two steps; the second leaves at once."""

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


def outlive_signals(worker):
    """worker_init_fn: the main process decides when to stop. Loaders do not hear Ctrl-C; after a SIGTERM, which a job
    scheduler sends to all, they go on for 30 s, so that the main process can finish its step. They must not ignore it for
    good: Python itself ends leftover loaders with SIGTERM at exit, and would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def exit_code(main, argv=None):
    """Run main(argv) and turn what a user can mend into one error and an exit code: 2 bad input, 130 Ctrl-C."""
    try:
        return main(argv) or 0
    except DataError as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except OSError as error:  # a full disk, a folder without rights
        message, code = f"{error.filename or 'a file'}: {error.strerror or error}", 2
    except ModuleNotFoundError as error:  # of those that are imported where they are needed
        message, code = f"{error}: pip install -r requirements.txt", 2
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            message, code = out_of_memory(error, "--batch-size"), 2
        elif re.search(DEAD_LOADER, str(error)):
            message, code = dead_loader(error), 2
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    return code


def ran_out_of_memory(error):
    """Is this what torch or Python raises where a GPU or the machine is too small?"""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def batch_size_in_memory_errors(batch_size, flag="--batch-size"):
    """Memory that runs out within is a DataError that says the batch size and the flag for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise DataError(out_of_memory(error, f"{flag} {batch_size}")) from None


def out_of_memory(error, batch_size):
    """The message for a GPU or a machine that is too small, with what was used where that is known. batch_size: the flag."""
    used = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB were in use" if torch.cuda.is_initialized() else ""
    what = f"{' '.join(str(error).split())[:160]}{used}" or "of this machine, not of a GPU"
    same = " (in training double --accumulation: the result is the same)" if batch_size.startswith("--batch-size") else ""
    return f"out of memory ({what}): halve {batch_size}{same}, use --precision bf16, or train fewer parts"


def stopped(accelerator, stop):
    """Has any process been told to stop? All of them must agree, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return bool(stop.number)
    return bool(accelerator.reduce(torch.tensor(stop.number, device=accelerator.device)).item())


# --- memory and time, before and while a run goes on ------------

def kept_bytes(model, function):
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
    kept = kept_bytes(run.model, lambda: rehearse(run))
    table = [("frozen weights", sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)), ("trained weights", size),
             ("their gradients", size), ("AdamW's moments", 2 * size), ("kept for the backward pass, longest batch", kept)]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.optimizer.zero_grad()
    rehearse(run)
    say = run.accelerator.print
    for what, needed in [*table, ("sum, computed", sum(needed for _, needed in table))]:
        say(f"{what:44}{needed / 2**20:>12,.1f} MiB")
    most, what = peak_memory()
    say(f"{what:44}{most / 2**20:>12,.1f} MiB")
    for store in cached:
        say(f"{f'on disk: {store.rows.name}':44}{store.rows.stat().st_size / 2**20:>12,.1f} MiB")


def peak_memory():
    """(bytes, in words): the most that this process has held on its GPU, without one in all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "measured, GPU"
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "measured, the whole process with Python"


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
            self.run.accelerator.print(f"{self.seen / (now - self.first[0]):.1f} {self.unit}/s; about {spoken(left)} to the end, "
                                       "validation not counted")


def spoken(seconds):
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


def epoch_plan(count, batch_size, accumulation, seed, epoch, rank=0, processes=1, lengths=None, pool=1):
    """Who sees which row when: a pure function of its arguments.

    Returns for every optimizer step (group, micro-batches): group = row numbers of the whole effective batch
    (batch_size * accumulation * processes), micro-batches = this process's share as (number, row numbers), at most
    batch_size rows each. The micro-batches of a step are the same however many processes share them, and their number
    seeds dropout: 1 process with accumulation 2 trains to the same weights as 2 processes with accumulation 1. An
    incomplete last group is left out, unless it is the only one, which is then split evenly.

    lengths: tokens of every row. The rows of `pool` groups are then sorted by length, so that those of a micro-batch are about
    equally long and few pads are computed. With a pool of 1 the groups are those of a random order, only sorted within; with
    more, groups are put together anew from whole micro-batches.
    """
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(count)
    size = batch_size * accumulation * processes
    order = order[:max(count - count % size, min(count, size))]  # before the sorting, which would always leave out the longest
    if lengths is not None:
        lengths = np.asarray(lengths)
        parts = [order[i:i + pool * size] for i in range(0, len(order), pool * size)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        if pool > 1 and len(order) >= size:
            order = draw.permutation(order.reshape(-1, batch_size)).reshape(-1)
    groups = [order[i:i + size].tolist() for i in range(0, len(order), size)]
    if groups and len(groups[0]) < processes:
        raise DataError(f"{count} training rows are fewer than the {processes} processes")
    plan = []
    for group in groups:
        parts = math.ceil(len(group) / (batch_size * processes)) * processes  # as many for each process
        micro = [(k, part.tolist()) for k, part in enumerate(np.array_split(group, parts))]
        plan.append((group, micro[rank::processes]))
    return plan


def is_better(value, marks):
    """Is this score above the best so far, marks["value"] (None: there is none yet)? Never true of NaN."""
    return math.isfinite(value) and (marks["value"] is None or value > marks["value"])


def precision_of(precision):
    """--precision -> accelerate's word for it."""
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
