"""profiling.py: where the time of a training's steps goes, for --profile."""

import contextlib
import time
from collections import Counter

import torch

from engine import files

PHASES = ("waiting for data", "forward", "backward", "optimizer", "logging")
REST = "the rest of the step"
FILE = "profile.csv"  # in the run folder


class Profile:
    """Seconds of each phase, summed over all steps but the first, which is slower than all others. Off, it measures nothing.

    On a GPU every phase waits for what it has started: the shares are true, and a step takes longer than it does without."""

    def __init__(self, on):
        self.on, self.steps, self.sums, self.current = on, 0, Counter(), Counter()

    @contextlib.contextmanager
    def phase(self, name):
        """The time in this block is that of one of PHASES."""
        if not self.on:
            yield
            return
        start = _now()
        yield
        self.current[name] += _now() - start

    @contextlib.contextmanager
    def step(self):
        """A whole optimizer step; what of it is in no phase is REST."""
        if not self.on:
            yield
            return
        self.current = Counter()  # without what a rehearsal took
        start = _now()
        yield
        self.current[REST] = _now() - start - self.current.total()
        self.sums = self.current + (self.sums if self.steps > 1 else Counter())  # the second takes the first one's place
        self.steps += 1

    def rows(self):
        """[{"phase", "seconds", "ms a step", "share"}], the whole step as the last."""
        table = {**{name: self.sums[name] for name in (*PHASES, REST)}, "a step": self.sums.total()}
        return [{"phase": name, "seconds": round(seconds, 4), "ms a step": round(1000 * seconds / max(1, self.steps - 1), 3),
                 "share": round(seconds / table["a step"], 4)} for name, seconds in table.items()]

    def finish(self, folder, accelerator):
        """The table, printed, and kept as FILE in the run folder."""
        if self.on and self.steps and accelerator.is_main_process:
            accelerator.print(f"{f'of {self.steps} steps, but the first':34}{'ms a step':>12}{'share':>9}")
            for row in self.rows():
                accelerator.print(f"{row['phase']:34}{row['ms a step']:>12.1f}{row['share']:>9.1%}")
            files.write_csv(folder / FILE, self.rows())


def _now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
