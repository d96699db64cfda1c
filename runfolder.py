"""runfolder.py: what a run leaves behind, and how it is written so that nothing is lost.

    runs/<name>/best.pt            trained tensors and plain values; loads with weights_only=True
    runs/<name>/last.pt            the same plus the optimizer, only with --save-last or after an interruption
    runs/<name>/args.yaml          the settings; serves as --config of another run
    runs/<name>/training_log.csv   a row every few steps and a row every epoch
    runs/<name>/events.out.*       the same numbers for TensorBoard
    runs/<name>/curves.png

Also here, since two scripts must not disagree on it: where relative paths are looked for, config files, argparse types, versions.
The loop's own tools are in loop.py.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.metadata
import math
import os
import pathlib
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib

import torch
import yaml
from torch import nn

from rows import DataError

PROJECT = pathlib.Path(__file__).resolve().parent

# --- files found ------------


def located(place):
    """A path from the working directory, else from the project's folder where it is there; absolute paths stay as they are."""
    own = os.path.join(PROJECT, place)
    return own if os.path.exists(own) and not os.path.exists(place) else str(place)


def checkpoint_file(place, or_else=""):
    """A run's folder or its best.pt -> path of the best.pt. or_else: what else may be given. DataError: there is none."""
    path = pathlib.Path(located(place))
    wanted = "the folder of a run (such as runs/gated)" + (f", its best.pt or {or_else}" if or_else else " or its best.pt")
    if path.is_dir():
        near = sorted({*path.glob("*/best.pt"), *path.parent.glob("*/best.pt")})[:3]
        there = f" (there is one in {', '.join(str(file.parent) for file in near)})" if near else ""
        path = path / "best.pt"
        if not path.is_file():
            raise DataError(f"{place}: no best.pt in this folder{there}: give {wanted}")
    if not path.is_file():
        raise DataError(f"{place}: no such checkpoint: give {wanted}")
    return path


# --- files written whole ------------


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """Open a temporary file beside `path`; when the block ends well it is flushed to disk and renamed to `path`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)  # mkstemp's 0600 would stay
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say what for
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a power cut may undo the rename
    finally:
        os.close(folder)


def save_checkpoint(path, content):
    """torch.save of tensors and plain values, whole or not at all. A failed write (disk full) is a DataError."""
    try:
        with whole_file(path, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        folder = pathlib.Path(path).parent
        free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MB are free on its disk" if folder.is_dir() else "no such folder"
        resume = " and use --resume" if (folder / "last.pt").exists() else " (with --save-last, --resume could go on from here)"
        raise DataError(f"{path}: could not be saved ({' '.join(str(error).split())}; {free}); what stood there before is "
                        f"untouched: free some space{resume}") from None


def load_checkpoint(path, needs=()):
    """Load one of our own checkpoints with weights_only=True: code in the file never runs. needs: keys it must hold."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as parts:  # torch.load itself never looks at the check sums
            changed = parts.testzip()
            # nor do check sums cover these two, which torch.save leaves at 0
            changed = changed or next((part.filename for part in parts.infolist() if part.external_attr or part.compress_type),
                                      None)
        if changed:
            raise ValueError(f"the bytes of {changed} have changed since they were written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: not one of this project's checkpoints, which hold tensors and plain values: it holds "
                        f"{forbidden(error)}, and nothing of it was run") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: damaged, incomplete or not one of this project's checkpoints ({reason})") from None
    missing = [key for key in needs if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"{path}: not a checkpoint of this stage (no {', '.join(missing)})")
    return as_written_today(content)


def as_written_today(content):
    """A checkpoint as this version writes it: float32 tensors where it was kept in half precision to be small, and the length of
    an answer among model_args, which was a flag alone once."""
    if isinstance(content, dict) and content.get("kept_in") == "float16":
        content["state"] = {name: tensor.float() for name, tensor in content["state"].items()}
    if isinstance(content, dict) and "max_answer" in content.get("args", ()) and "model_args" in content:
        content["model_args"].setdefault("max_answer", content["args"]["max_answer"])
    return content


def forbidden(error):
    """The class or function that the weights-only loader met, from its error."""
    reason = " ".join(str(error).split())
    return reason.split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in reason else "an object that is not allowed"


def refuse_unwritable(path):
    """DataError where a file cannot be written, before hours are spent on what goes into it."""
    folder = pathlib.Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


# --- what a checkpoint holds of a training ------------

def training_state(run):
    """What every last.pt has beside the weights: optimizer, loss scaler, step, marks."""
    scaler = run.accelerator.scaler
    return {"optimizer": run.optimizer.state_dict(), "scaler": None if scaler is None else scaler.state_dict(), "step": run.step,
            "marks": run.marks}


def restore_training(run, last):
    """Put training_state back."""
    run.optimizer.load_state_dict(last["optimizer"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(last["scaler"])
    run.step, run.marks = last["step"], last["marks"]


# --- what a checkpoint holds of a model ------------

LINEAR = "language_model, linear layers"  # a part of fingerprint


def parts_table(model):
    """Parameters by top-level part: list of (part, trainable, frozen), and the sum as the last row."""
    rows = []
    for name, part in [*model.named_children(), *model.named_parameters(recurse=False)]:
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        counts = [sum(p.numel() for p in parameters if p.requires_grad is wanted) for wanted in (True, False)]
        if sum(counts):
            rows.append((name, *counts))
    return rows + [("sum", sum(r[1] for r in rows), sum(r[2] for r in rows))]


def print_parts(model):
    """Print parts_table, one line a part."""
    print(f"{'part':22}{'trainable':>15}{'frozen':>17}")
    for name, trainable, frozen in parts_table(model):
        print(f"{name:22}{trainable:>15,}{frozen:>17,}")


def trainable_state(model):
    """{name: tensor on the CPU} of everything that is trained: what best.pt holds."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model, state, source):
    """Put trainable_state back, strictly: the same names and shapes, or a DataError that names the first that differ."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = list(own.keys() ^ state.keys()) + [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    if wrong:
        raise DataError(f"{source} does not fit this model: {len(wrong)} of {len(own)} tensors are missing, unknown or of "
                        f"another shape, first {sorted(wrong)[:3]}: was it trained on another model, "
                        "or with other flags (--gating, --per, --no-gate)?")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def fingerprint(model):
    """{part: short hash} of the frozen parts: shapes and a few values of every tensor, rounded to bf16 so that it does not depend
    on the dtype of loading. Tells the BLIP-2 a run was trained on from another one; it is not a checksum of all bytes.

    The linear layers of the language model are a part of their own, absent where their weights are packed (int8, nf4)."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, nn.Linear)
              and name.startswith("language_model.") and ".layers." in name}
    packed = any(not module.weight.is_floating_point() for module in linear.values())
    digests = {}
    for name, tensor in sorted(model.state_dict().items()):
        in_linear = name.startswith(tuple(linear))
        if name in trained or (in_linear and packed):
            continue
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16).float().cpu().numpy()
        digest = digests.setdefault(LINEAR if in_linear else name.partition(".")[0], hashlib.sha256())
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.tobytes())
    return {part: digest.hexdigest()[:16] for part, digest in digests.items()}


def other_parts(now, was):
    """The parts whose fingerprints differ. The language model's linear layers count only where neither side has packed them."""
    if not isinstance(was, dict):  # of an older version of this project
        return ["all"]
    packed = (LINEAR in now) != (LINEAR in was)
    return sorted(part for part in now.keys() | was.keys() if now.get(part) != was.get(part) and not (packed and part == LINEAR))


# --- settings ------------

def parse_args(parser, argv=None):
    """argparse with --config FILE.yaml: the file gives defaults, the command line wins, an unknown key is an error."""
    path = _config_path(argv)
    if path:
        try:
            settings = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"--config {path}: {' '.join(str(error).split())}") from None
        if not isinstance(settings, dict):
            raise DataError(f"--config {path}: must hold `name: value` lines")
        actions = {action.dest: action for action in parser._actions}
        unknown = sorted(set(settings) - set(actions))
        if unknown:
            raise DataError(f"--config {path}: unknown settings {', '.join(map(str, unknown))}")
        parser.set_defaults(**{name: _checked(actions[name], value, path) for name, value in settings.items()})
        for name in settings:
            actions[name].required = False
    return parser.parse_args(argv)


def positive(text):
    """argparse type: a whole number above 0."""
    return _bounded(int(text), 1)


def whole(text):
    """argparse type: a whole number, 0 or more."""
    return _bounded(int(text), 0)


def share(text):
    """argparse type: a number from 0 to 1."""
    return _bounded(float(text), 0, 1)


def rate(text):
    """argparse type: a number above 0."""
    return _bounded(float(text), sys.float_info.min)


def weight(text):
    """argparse type: a number, 0 or more."""
    return _bounded(float(text), 0)


def _bounded(value, low, high=math.inf):
    if not low <= value <= high or value == math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not " + (f"between {low} and {high}" if high < math.inf else
                                                              f"{low} or more" if low in (0, 1) else "above 0"))
    return value


def _config_path(argv):
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config


def _checked(action, value, path):
    """A YAML value as the flag's type (YAML reads 1e-4 as text)."""
    try:
        if isinstance(action.default, list) and not isinstance(value, list):
            value = [value]
        if value is not None and not isinstance(value, list) and not isinstance(action.default, bool):
            value = (action.type or str)(str(value))
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise DataError(f"--config {path}: {action.dest}: {value!r} will not do as {(action.type or str).__name__}") from None
    if isinstance(action.default, bool) and not isinstance(value, bool):
        raise DataError(f"--config {path}: {action.dest}: {value!r} is not true or false")
    if action.choices and value not in (*action.choices, action.default):
        raise DataError(f"--config {path}: {action.dest}: {value!r} is none of {', '.join(map(str, action.choices))}")
    return value


def note_versions():
    """Lines about installed packages that are outside the ranges of requirements.txt, in which everything was tested."""
    from packaging.requirements import Requirement
    notes = []
    for line in pathlib.Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line)
            try:
                found = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                found = None
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                notes.append(f"note: {wanted.name} {found or 'is not installed'}: tested with {wanted.specifier}")
    return notes


def project_version():
    """The commit of this project, and whether files have changed since."""
    def git(*words):
        here = str(pathlib.Path(__file__).parent)
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=30)

    try:
        commit, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return "not known (git cannot be run)"
    if commit.returncode:
        return "not known (no git checkout)"
    return commit.stdout.strip() + (", with changes that are not committed" if changes.stdout.strip() else "")


def ended(run, signal_number, what, script, argv):
    """The end of a training's main(): its exit code where a signal ended it, else its result and a line to cite. DataError: there
    is no result. what: the name of run.marks["value"]."""
    if signal_number:
        return 128 + signal_number
    if run.marks["value"] is None:
        raise DataError(f"the validation {what} was never finite: there is no best.pt; lower --lr")
    result = f"best {what} {run.marks['value']:.4g} in epoch {run.marks['epoch']}"
    run.accelerator.print(f"{result}: {run.args.out}/best.pt")
    run.accelerator.print(cited(script, argv, run.args.seed, result))


def cited(script, argv, seed, result):
    """One line about a finished run for a paper's appendix: result, seed, version, command. argv: flags, None = the process's."""
    command = shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])
    return f"to cite: {result}; seed {seed}; commit {project_version()}; {command}"


def refuse_overwrite(out, resume):
    """A folder that holds results is refused, unless the run goes on in it (from its last.pt)."""
    held = [name for name in ("best.pt", "last.pt") if (pathlib.Path(out) / name).exists()]
    if held and not resume:
        raise DataError(f"{out} already holds {' and '.join(held)}: choose another --out"
                        + (", or --resume" if "last.pt" in held else " (there is no last.pt to resume from)"))


def refuse_other_settings(now, was, path):
    """DataError that lists what would make a resumed run end otherwise. now, was: {name: value}, of this run and of last.pt."""
    other = [f"{name} is {now.get(name)!r}, was {value!r}" for name, value in was.items() if now.get(name) != value]
    if other:
        raise DataError(f"--resume with other settings than {path}: {'; '.join(other)}: give the former ones, or another --out")


@contextlib.contextmanager
def locked(out):
    """Make the run folder and hold it: two runs in one folder would overwrite each other's files.

    The lock is the operating system's, so it ends with the process, however that ends (with filelock before 3.31 not before
    its loader processes have ended too); .owner is only for the message.
    """
    from filelock import FileLock, Timeout
    out = pathlib.Path(out)
    lock, owner = FileLock(out / ".lock"), out / ".owner"
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
        raise DataError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        (out / ".lock").unlink(missing_ok=True)  # while it is held: a run that waits for the old file notices
        lock.release()
        with contextlib.suppress(OSError):
            out.rmdir()  # where nothing was written


@contextlib.contextmanager
def held(path, waiting, say=print):
    """Hold a lock file; a second process says `waiting` and waits until the first has ended, however that ends."""
    from filelock import FileLock, Timeout
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_full_disk(out, needed):
    """DataError where the disk of `out` has fewer than `needed` bytes free: better now than after the first epoch."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DataError(f"--out {out}: {needed / 2**20:,.0f} MB are needed for the checkpoints and {free / 2**20:,.0f} MB are free")


def start_run(out, args):
    """Write args.yaml."""
    try:
        with whole_file(pathlib.Path(out) / "args.yaml") as file:
            yaml.safe_dump(vars(args), file, sort_keys=False, allow_unicode=True)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror})") from None


# --- log ------------

class RunLog:
    """training_log.csv and TensorBoard. Every row has all `columns`, empty where it has no value."""

    def __init__(self, folder, columns, keep_until=None):
        """keep_until: on resume, drop the rows after this optimizer step (they are trained again)."""
        from torch.utils.tensorboard import SummaryWriter
        self.path, self.columns = pathlib.Path(folder) / "training_log.csv", columns
        kept = []
        if keep_until is not None and self.path.exists():  # a row that a kill cut short has no last column
            kept = [row for row in read_log(self.path) if row[columns[-1]] is not None and int(row["step"]) <= keep_until]
        with whole_file(self.path) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        self.board = SummaryWriter(str(folder), purge_step=None if keep_until is None else keep_until + 1)

    def write(self, kind, step, **values):
        """Append a row; kind is "step" or "epoch"."""
        row = {"kind": kind, "step": step, **{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self):
        self.board.close()


def read_log(path):
    """Rows of a training_log.csv as dicts of text."""
    with pathlib.Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def draw_curves(log_path, png_path, panels, title):
    """curves.png from training_log.csv. panels: [(heading, [(kind, column, label)])]; columns without values are left out."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = read_log(log_path)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (heading, lines) in zip(axes[0], panels):
        for kind, column, label in lines:
            points = [(int(r["step"]), float(r[column])) for r in rows if r["kind"] == kind and r.get(column)]
            if points:
                marker = "o" if kind == "epoch" else None
                axis.plot(*zip(*points), label=label, marker=marker, markersize=4, linewidth=1.6,
                          alpha=1.0 if marker else 0.75)
        axis.set_title(heading, fontsize=11, loc="left")
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    with whole_file(png_path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
