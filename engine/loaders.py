"""loaders.py: DataLoaders, and what is said when a picture is broken or a loader process dies.

    load_batches   over given row numbers; load_stream: over tar files
    fault_of, next_batch    a batch in which a picture is broken; the next one on its device, LoaderError where it is such a one
    each_batch     all of them in turn, on their device, with a bar on the terminal
    dead_loaders_named, list_rows    which rows a loader died at
"""

import contextlib
import gc
import os
import re
import signal

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.tables import locate
from engine.errors import DEAD_LOADER, DataError, dead_loader


def load_batches(data, collate, batches, workers):
    """A DataLoader over given lists of row numbers."""
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=outlive_signals if workers else None, timeout=600 if workers else 0)


def load_stream(stream, collate, batch_size, workers):
    """A DataLoader over a stream of samples, each loader with its own part of it."""
    return DataLoader(stream, batch_size=batch_size, collate_fn=collate, num_workers=workers, timeout=600 if workers else 0,
                      worker_init_fn=outlive_signals if workers else None)


def fault_of(samples):
    """(what was read of a row, the row) of a batch -> {"fault": text}, as next_batch knows it, of the first DataError; else None."""
    for found, row in samples:
        if isinstance(found, DataError):
            return {"fault": f"{row.file}, {locate(row.file, row.line)}: {found}"}
    return None


class LoaderError(DataError):
    """A picture or a loader process failed between two steps: the model is as the last step left it."""


def next_batch(batches, device):
    """The next batch on its device; a LoaderError where one of its pictures is broken."""
    batch = next(batches)
    if "fault" in batch:
        raise LoaderError(batch["fault"])
    return send_to_device(batch, device, non_blocking=True)


def each_batch(data, collate, batches, accelerator, workers, what):
    """(row numbers, their batch on its device) for each of `batches`, lists of row numbers. what: the word before the bar."""
    loaded = iter(load_batches(data, collate, batches, workers))
    for numbers in tqdm(batches, desc=what, leave=False, mininterval=1, disable=None if accelerator.is_main_process else True):
        yield numbers, next_batch(loaded, accelerator.device)


@contextlib.contextmanager
def dead_loaders_named(group):
    """A loader process that dies within, which torch reports in the midst of anything, is a LoaderError with these rows."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(DEAD_LOADER, str(error)):
            raise
        raise LoaderError(f"{dead_loader(error)}; it was at {list_rows(group)}") from None


def list_rows(group):
    """Rows for a message: picture and place of the first few."""
    listed = [r.name + (f" ({locate(r.file, r.line)})" if r.line else "") for r in group]  # a folder has no lines
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def outlive_signals(worker):
    """worker_init_fn: the main process decides when to stop. Loaders do not hear Ctrl-C; after a SIGTERM, which a job
    scheduler sends to all, they go on for 30 s, so that the main process can finish its step. They must not ignore it for
    good: Python itself ends leftover loaders with SIGTERM at exit, and would wait for ever. They end with code 0: of one that a
    signal ends torch says so in the main process, after the error that was the reason.

    What the main process left for Python to clear is not cleared here: the loaders of an earlier iterator are no children of this one,
    and torch would print a traceback of it."""
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
