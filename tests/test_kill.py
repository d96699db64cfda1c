"""pytest tests/test_kill.py: train_gated.py --save-last --resume under kill -9.

Checked: a run that is killed with SIGKILL while it steps, evaluates or logs, before, within and after every stage of writing a
file, and at a random time from outside, (a) never leaves a last.pt or best.pt that does not load, and (b) started again with
the same command ends with the best.pt, last.pt, training_log.csv and answers of the undisturbed run, to the bit. The lock of
a killed run never blocks the restart, its loader processes end by themselves, and no temporary file is left.

Two configurations with three kills each; KILLS=30 spreads 30 kills over four configurations. -s shows every kill.

Importing torch and transformers takes seconds, so one process (serve, below) imports them once and forks every command.
"""

import collections
import contextlib
import csv
import io
import itertools
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch
from matplotlib.figure import Figure

import conftest  # noqa: F401  (sets the import path)
import eval_gated
import forked
import train_gated
from engine import checkpoints, errors, run, runfolder

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")

KILLS = int(os.environ.get("KILLS", "0"))  # 0: the short form
EPOCHS, BATCH, TRAIN_ROWS, VAL_ROWS, LOG_EVERY = 3 if KILLS else 2, 4, 24, 6, 2
MORE = {1: [], 3: ["--train-qformer"]}  # accumulation -> flags; dropout is on in either (PromptMapper, Q-Former)

# (point, file): where a kill can fall, see HOOKS; outside is a time
POINTS = [("step", ""), ("outside", ""), ("half", "last.pt"), ("evaluate", ""), ("renamed", "last.pt"), ("unsynced", "best.pt"),
          ("logged", ""), ("synced", "last.pt"), ("before best", ""), ("unsynced", "training_log.csv"), ("outside", ""),
          ("half", "best.pt"), ("torn", ""), ("unsynced", "last.pt"), ("synced", "best.pt"), ("unsynced", "curves.png"),
          ("optimizer", ""), ("renamed", "best.pt"), ("synced", "training_log.csv"), ("synced", "args.yaml")]

# (workers, accumulation) -> kills of the short form: point, file, how far into what is left of the run (0 to 1)
SHORT = {(0, 3): [("unsynced", "last.pt", 0.5), ("step", "", 0.6), ("before best", "", 0.9)],
         (2, 1): [("half", "last.pt", 0.0), ("evaluate", "", 0.75), ("outside", "", 0.4)]}
CONFIGURATIONS = [(0, 3), (2, 1), (0, 1), (2, 3)] if KILLS else list(SHORT)


# --- in the forked process: where to kill ------------

def kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def save_half(content, file, save=torch.save):
    """Write the first half of what torch.save would write, and kill."""
    whole = io.BytesIO()
    save(content, whole)
    with contextlib.nullcontext(file) if hasattr(file, "write") else open(file, "wb") as target:
        target.write(whole.getvalue()[:whole.tell() // 2])
        target.flush()
        kill_self()


def tear(log, *_):
    """Cut the last row of the log in half, and kill."""
    lines = log.path.read_bytes().splitlines(keepends=True)
    os.truncate(log.path, sum(map(len, lines)) - len(lines[-1]) // 2)
    kill_self()


def is_file(name, *args):
    """Is the last argument the path, open file or file number of `name`, or of whole_file's temporary for it?"""
    target = args[-1].fileno() if hasattr(args[-1], "fileno") else args[-1]
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
    return pathlib.Path(path).name.lstrip(".").startswith(name)


HOOKS = {  # point -> what is called there, before or after the call, what is then done
    "step": (train_gated, "train_step", "before", kill_self),
    "optimizer": (torch.optim.AdamW, "step", "after", kill_self),
    "evaluate": (train_gated.core.Blip2OPTGated, "forward", "before", kill_self),
    "logged": (runfolder.RunLog, "write", "after", kill_self),
    "torn": (runfolder.RunLog, "write", "after", tear),
    "before best": (run.Run, "save_best", "before", kill_self),
    "half": (torch, "save", "before", save_half),
    "unsynced": (os, "fsync", "before", kill_self),
    "synced": (os, "replace", "before", kill_self),
    "renamed": (os, "replace", "after", kill_self),
}


def arm(point, file, nth):
    """Let the nth call of a point, of those for this file, end the process."""
    owner, name, when, act = HOOKS[point]
    original, calls = getattr(owner, name), itertools.count(1)

    def hooked(*args, **named):
        counts = is_file(file, *args) if file else point != "evaluate" or not args[0].training
        last = counts and next(calls) == nth
        if last and when == "before":
            act(*args)
        result = original(*args, **named)
        if last:
            act(*args)
        return result
    setattr(owner, name, hooked)


def obey(order):
    """In the forked process: run one command, in a session of its own so that its loader processes can be found."""
    os.setsid()
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run.LOG_EVERY, train_gated.PANELS = LOG_EVERY, train_gated.PANELS[:1]
    Figure.savefig = lambda figure, file, **named: file.write(b"a picture")  # all but the pixels, which took a third of a run
    try:
        if order["point"] in HOOKS:
            arm(order["point"], order["file"], order["nth"])
        code = errors.exit_code({"train": train_gated, "eval": eval_gated}[order["script"]].main, order["argv"])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve():
    """Fork a process for every line of stdin (JSON, see Zygote.run), and answer with a line of JSON when it has ended.

    Nothing here may compute: a fork of a process whose OpenMP threads run can hang.
    """
    torch.set_num_threads(1)
    forked.prepare()
    for line in sys.stdin:
        order = json.loads(line)
        started, child = time.monotonic(), os.fork()
        if not child:
            obey(order)
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended:
            time.sleep(0.005)
            if time.monotonic() - started > order["seconds"]:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
        answer = {"code": os.waitstatus_to_exitcode(status), "group": child, "seconds": time.monotonic() - started}
        print(json.dumps(answer), flush=True)


# --- in pytest ------------

class Zygote:
    """The process that forks the commands; remembers their process groups."""

    def __init__(self):
        self.groups = []
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def run(self, script, argv, output, point=None, file="", nth=0, seconds=300.0):
        """Run a script's main(argv) to its end, to the kill at the nth time of a point, or until it is killed after `seconds`."""
        order = {"script": script, "argv": argv, "output": str(output), "point": point, "file": file, "nth": nth,
                 "seconds": seconds}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.groups.append(answer["group"])
        return answer

    def alive(self):
        """The process groups of ended commands that still have a process, i.e. loaders of a killed run."""
        return [group for group in self.groups if has_process(group)]

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        for group in self.alive():
            os.killpg(group, signal.SIGKILL)


def has_process(group):
    """Has this process group a process that is not a zombie?"""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False


@pytest.fixture(scope="module")
def zygote():
    forker = Zygote()
    yield forker
    forker.close()


@pytest.fixture(scope="module")
def small(sample, tmp_path_factory):
    """The first rows of the sample."""
    folder = tmp_path_factory.mktemp("small")
    for split, count in (("train", TRAIN_ROWS), ("val", VAL_ROWS)):
        lines = (sample / f"{split}.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.csv").write_text("".join(lines[:count + 1]), encoding="utf-8")
    return ["--data", str(folder), "--images", str(sample / "images")]


class Trial:
    """One configuration: its command, its undisturbed run, and folders in which runs are killed."""

    def __init__(self, zygote, small, tiny, folder, workers, accumulation):
        self.zygote, self.folder, self.accumulation, self.workers = zygote, folder, accumulation, workers
        self.flags = [*small, "--blip2", tiny[0], "--efficientnet", tiny[1], "--epochs", str(EPOCHS), "--batch-size", str(BATCH),
                      "--eval-batch-size", str(BATCH), "--accumulation", str(accumulation), "--lr", "3e-3",
                      "--workers", str(workers), "--precision", "no",
                      "--save-last", "--resume", *MORE[accumulation]]
        self.per_epoch = TRAIN_ROWS // (BATCH * accumulation)
        self.whole = folder / "whole"
        self.seconds = self.start(self.whole)["seconds"]
        self.answers = self.ask(self.whole)

    def start(self, out, **kill):
        """The command, to its end or its kill; any other end is an error."""
        output = self.folder / f"{out.name}.txt"
        answer = self.zygote.run("train", [*self.flags, "--out", str(out)], output, **kill)
        assert answer["code"] in ((0, -signal.SIGKILL) if kill else (0,)), (kill, answer, output.read_text()[-3000:])
        return answer

    def ask(self, out):
        """The bytes of eval_gated.py's answers."""
        answers, output = self.folder / f"{out.name}.json", self.folder / f"{out.name}.eval.txt"
        answer = self.zygote.run("eval", ["--checkpoint", str(out / "best.pt"), "--predictions", str(answers), "--no-baselines",
                                          "--workers", "0", "--beams", "2"], output)
        assert answer["code"] == 0, output.read_text()[-3000:]
        return answers.read_bytes()

    def kill(self, out, point, file, share):
        """Start the command with a kill at `share` of what is left of the run. The kill, or None where it came too late."""
        last = out / "last.pt"
        epochs = EPOCHS - (checkpoints.load_checkpoint(last)["marks"]["done"] if last.exists() else 0)
        if point == "outside":
            kill = {"point": point, "seconds": share * self.seconds * (epochs + 1) / (EPOCHS + 1)}
        else:
            kill = {"point": point, "file": file, "nth": 1 + int(share * self.calls(point, file, epochs))}
        if self.start(out, **kill)["code"] == 0:
            return None
        for path in (last, out / "best.pt"):
            if path.exists():
                checkpoints.load_checkpoint(path)
        return kill

    def calls(self, point, file, epochs):
        """How often a point is passed in so many epochs, and before them in the rehearsal."""
        if file in ("args.yaml", "training_log.csv"):
            return 1
        in_epoch = {"step": self.per_epoch, "optimizer": self.per_epoch, "evaluate": math.ceil(VAL_ROWS / BATCH),
                    "logged": self.per_epoch // LOG_EVERY + 1, "torn": self.per_epoch // LOG_EVERY + 1}
        return epochs * in_epoch.get(point, 1) + (point in ("step", "evaluate"))

    def check(self, out):
        """A finished folder against the undisturbed one: the same results, and nothing left of what kills had left."""
        for name, keys in (("best.pt", ("state", "epoch", "value", "done", "stale", "model_args", "answers")),
                           ("last.pt", ("state", "optimizer", "step", "marks", "settings"))):
            mine, other = (checkpoints.load_checkpoint(folder / name, keys) for folder in (out, self.whole))
            assert [key for key in keys if not same(mine[key], other[key])] == [], (out.name, name)
        assert (out / "training_log.csv").read_bytes() == (self.whole / "training_log.csv").read_bytes(), out.name
        assert self.ask(out) == self.answers, out.name
        assert not hidden(out) and (out / "curves.png").exists(), hidden(out)


def same(a, b):
    """Equal to the bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def hidden(folder):
    return {path.name for path in folder.glob(".*")}


def planned_kills(workers, accumulation):
    """(point, file, share) without end."""
    if not KILLS:
        return iter(SHORT[workers, accumulation])
    rng, start = random.Random(10 * workers + accumulation), CONFIGURATIONS.index((workers, accumulation)) * len(POINTS) // 4
    return ((*point, rng.random()) for point in itertools.cycle(POINTS[start:] + POINTS[:start]))


def wanted_kills(workers, accumulation):
    each, rest = divmod(KILLS, len(CONFIGURATIONS))
    return each + (CONFIGURATIONS.index((workers, accumulation)) < rest) if KILLS else len(SHORT[workers, accumulation])


@pytest.mark.parametrize("workers, accumulation", CONFIGURATIONS)
def test_killed_and_resumed_equals_undisturbed(zygote, small, tiny, tmp_path, workers, accumulation):
    trial = Trial(zygote, small, tiny, tmp_path, workers, accumulation)
    assert not hidden(trial.whole)
    wanted, kills, outs = wanted_kills(workers, accumulation), [], (tmp_path / f"cut{n}" for n in itertools.count())
    out = next(outs)
    for point, file, share in planned_kills(workers, accumulation):
        kill = trial.kill(out, point, file, share)
        print(f"workers {workers}, accumulation {accumulation}, {out.name}:", kill or f"{point} {file} came too late: complete")
        if kill:
            kills.append(kill)
        else:  # the run has ended: it counts as resumed and not as killed
            assert KILLS or point == "outside", f"{point} {file} was not reached"
            trial.check(out)
            out = next(outs)
        if len(kills) == wanted:
            break
    trial.start(out)
    trial.check(out)
    print(dict(collections.Counter(f"{kill['point']} {kill.get('file', '')}".strip() for kill in kills)))


def test_lock_of_a_killed_run_does_not_block_and_its_loaders_end(zygote, small, tiny, tmp_path):
    argv = [*small, "--blip2", tiny[0], "--efficientnet", tiny[1], "--epochs", "1", "--batch-size", "6", "--workers", "2",
            "--precision", "no", "--save-last", "--resume", "--out", str(tmp_path / "run")]
    assert zygote.run("train", argv, tmp_path / "1.txt", "step", "", 3)["code"] == -signal.SIGKILL
    assert {".lock", ".owner"} <= hidden(tmp_path / "run")
    assert zygote.run("train", argv, tmp_path / "2.txt")["code"] == 0, (tmp_path / "2.txt").read_text()[-3000:]
    assert not hidden(tmp_path / "run")
    deadline = time.monotonic() + 20  # a loader looks for its parent every 5 s
    while zygote.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not zygote.alive()


def test_torn_last_row_is_dropped_on_resume(tmp_path):
    columns = train_gated.LOG_COLUMNS
    log = runfolder.RunLog(tmp_path, columns)
    for step in (9, 10, 12):
        log.write("step", step, epoch=1, lr=0.1, loss=1.5, lm=1.25, grad_norm=0.5)
    whole = log.path.read_bytes()
    kept, last = whole[:whole.index(b"step,12")], whole[whole.index(b"step,12"):]
    for cut in range(len(last)):  # step 10 was the last checkpoint; "12" may be torn to "1", which is before it
        log.path.write_bytes(kept + last[:cut])
        runfolder.RunLog(tmp_path, columns, keep_until=10)
        assert log.path.read_bytes() == kept, last[:cut]
    with log.path.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["9", "10"]


if __name__ == "__main__" and sys.argv[1:] == ["--serve"]:
    serve()
