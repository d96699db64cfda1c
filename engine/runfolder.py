"""runfolder.py: what a run leaves behind, and how it is written so that nothing is lost.

    runs/<name>/best.pt            trained tensors and plain values; loads with weights_only=True
    runs/<name>/last.pt            the same plus the optimizer, only with --save-last or after an interruption
    runs/<name>/args.yaml          the settings; serves as --config of another run
    runs/<name>/training_log.csv   a row every few steps and a row every epoch
    runs/<name>/events.out.*       the same numbers for TensorBoard
    runs/<name>/curves.png

What stands in a checkpoint is checkpoints.py's, command lines are flags.py's, the loop's own tools are in loop.py.
"""

import contextlib
import csv
import io
import math
import os
import pathlib
import shlex
import socket
import sys
import time

import yaml

from engine import environment, files, fonts
from engine.errors import DataError


# --- settings ------------

def command_line(script, argv):
    """The command as it was typed. script: __file__ of the script that runs; argv: its flags, None = the process's."""
    return shlex.join(["python", script_name(script), *(sys.argv[1:] if argv is None else argv)])


def script_name(script):
    """A script's path from the working directory where it lies below it, else from the project's folder, else whole."""
    path = pathlib.Path(script).resolve()
    for root in (pathlib.Path.cwd(), environment.PROJECT):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def citation(script, argv, seed, result):
    """One line about a finished run for a paper's appendix: result, seed, version, command."""
    return f"to cite: {result}; seed {seed}; commit {environment.project_version()}; {command_line(script, argv)}"


def refuse_overwrite(out, resume):
    """A folder that holds results is refused, unless the run goes on in it (from its last.pt)."""
    held = [name for name in ("best.pt", "last.pt") if (pathlib.Path(out) / name).exists()]
    if held and not resume:
        raise DataError(f"{out} already holds {' and '.join(held)}: choose another --out"
                        + (", or --resume" if "last.pt" in held else " (there is no last.pt to resume from)"))


def settings_of(flags, free, **became):
    """{--name: value} of the flags that must be the same on --resume. flags: {name: value} as typed; free: names of those that may
    differ; became: what a flag came to mean in this run, as "auto" does, which means something else on another machine."""
    return {f"--{name.replace('_', '-')}": value for name, value in {**flags, **became}.items() if name not in free}


def other_settings(now, was):
    """["NAME is VALUE, was VALUE"] of what would make a run end otherwise. now, was: {name: value}, as settings_of gives them.

    An earlier version kept the word "auto": what it came to mean then cannot be told, and is not compared."""
    return [f"{name} is {now.get(name)!r}, was {value!r}" for name, value in was.items() if now.get(name) != value and value != "auto"]


def refuse_other_settings(now, was, path):
    """DataError that lists the other_settings of a resumed run. now, was: of this run and of the last.pt at `path`."""
    other = other_settings(now, was)
    if other:
        raise DataError(f"--resume with other settings than {path}: {'; '.join(other)}: give the former ones, or another --out")


@contextlib.contextmanager
def folder_lock(out):
    """Make the run folder and hold it: two runs in one folder would overwrite each other's files.

    The lock is the operating system's, so it ends with the process, however that ends (with filelock before 3.31 not before
    its loader processes have ended too); .owner is only for the message.
    """
    from filelock import FileLock, Timeout
    out = pathlib.Path(out)
    lock, owner = FileLock(out / ".lock"), out / ".owner"

    def leave():
        for path in (owner, out / ".lock"):  # while it is held: a run that waits for the old file notices
            with contextlib.suppress(OSError):  # of a disk that is read-only by now; another run takes them for what they are
                path.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            out.rmdir()  # where nothing was written

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        for left in out.glob(".*.*.*"):  # whole_file's temporary names: a kill -9 in the midst of writing leaves them
            if left.is_file():
                left.unlink()
    except Timeout:
        who = owner.read_text() if owner.exists() else "another process"
        raise DataError(f"--out {out} is in use by {who}: choose another folder, or wait for it") from None
    except OSError as error:
        if lock.is_locked:
            leave()
        raise DataError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        leave()


def start_run(out, settings, script):
    """Write args.yaml: the settings that would make the run again, so without --resume and --config, and above them as remarks the
    script and the commit. script: its __file__."""
    settings = {name: value for name, value in settings.items() if name not in ("resume", "config")}
    try:
        with files.whole_file(pathlib.Path(out) / "args.yaml") as file:
            file.write(f"# script: {script_name(script)}\n# commit: {environment.project_version()}\n")
            yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror})") from None


# --- log ------------

class RunLog:
    """training_log.csv and TensorBoard. Every row has all `columns`, empty where it has no value; a value under a new name is a
    column more, which `added` lists."""

    def __init__(self, folder, columns, keep_until=None):
        """keep_until: on resume, drop the rows after this optimizer step (they are trained again)."""
        self.path, self.columns, self.added, kept = pathlib.Path(folder) / "training_log.csv", list(columns), [], []
        if keep_until is not None and self.path.exists():
            read = read_log(self.path)
            self.added = [name for name in (read[0] if read else ()) if name not in columns]
            self.columns += self.added  # a row that a kill cut short has no last column
            kept = [row for row in read if row.get(self.columns[-1]) is not None and int(row["step"]) <= keep_until]
        self._write_whole(kept)
        self.board = Board(folder, keep_until)

    def _write_whole(self, rows):
        with files.whole_file(self.path) as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, kind, step, **values):
        """Append a row; kind is "step" or "epoch"."""
        row = {"kind": kind, "step": step, **{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}}
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self.added += new
            self._write_whole(read_log(self.path))
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerow(row)
        files.append_whole(self.path, text.getvalue().encode())
        self.board.write(step, {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))})


class Board:
    """A file of TensorBoard's, written at once and not by a thread, whose errors would be a traceback beside the run's."""

    def __init__(self, folder, keep_until=None):
        """keep_until: on resume, what older files have after this step is not shown."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path, self.event, self.scalar, self.record_writer = pathlib.Path(folder) / name, Event, scalar, RecordWriter
        begun = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if keep_until is not None:
            begun.append(Event(wall_time=time.time(), step=keep_until + 1, session_log=SessionLog(status=SessionLog.START)))
        self._append(begun)

    def write(self, step, numbers):
        """{tag: number} of a step."""
        self._append([self.event(wall_time=time.time(), step=step, summary=self.scalar(name, value)) for name, value in numbers.items()])

    def _append(self, events):
        data = io.BytesIO()
        for event in events:
            self.record_writer(data).write(event.SerializeToString())
        files.append_whole(self.path, data.getvalue())


def read_log(path):
    """Rows of a training_log.csv as dicts of text."""
    with pathlib.Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def draw_curves(log_path, png_path, panels, title):
    """curves.png from training_log.csv. panels: [(heading, [(kind, column, label)])]; what has no values is left out."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = read_log(log_path)
    drawn = [(heading, [(kind, label, points) for kind, column, label in lines
                        if (points := [(int(r["step"]), float(r[column])) for r in rows if r["kind"] == kind and r.get(column)])])
             for heading, lines in panels]
    drawn = [(heading, lines) for heading, lines in drawn if lines] or [("no values yet", [])]
    across = math.ceil(len(drawn) / math.ceil(len(drawn) / 3))  # of five panels three, of four two
    down = math.ceil(len(drawn) / across)
    with fonts.fonts_for(title) as note:
        figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.4 * down + 0.2), layout="constrained", squeeze=False)
        for axis in axes.flat[len(drawn):]:
            axis.axis("off")
        for axis, (heading, lines) in zip(axes.flat, drawn):
            for kind, label, points in lines:
                marker = "o" if kind == "epoch" else None
                axis.plot(*zip(*points), label=label, marker=marker, markersize=4, linewidth=1.6, alpha=1.0 if marker else 0.75)
            axis.set_title(heading, fontsize=11, loc="left")
            axis.set_xlabel("optimizer step")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.lines:
                axis.legend(frameon=False, fontsize=9)
        figure.suptitle("\n".join(filter(None, (title, note))), fontsize=12, x=0.01, ha="left", parse_math=False)
        with files.whole_file(png_path, "wb") as file:
            figure.savefig(file, format="png", dpi=130)
        plt.close(figure)
