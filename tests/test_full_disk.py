"""EVERY_WRITE=1 pytest tests/test_full_disk.py: a disk that is full, or read-only from then on, at each write of a run, and of what else
the project writes.

Behaviour-checked. `Disk` stands for the disk: at the n-th write below a folder it takes half of the bytes and is full from then on; or it
becomes read-only, as a disk with an error or a share does, and nothing can be made, renamed or removed either.
Of a run the n are the first, the middle and the last write of each file, each time it is written, and of the read-only disk the first;
with EVERY_WRITE=1 all, a minute or two.
What is asserted for every n: one line that names the file, nothing half written, what stood there before is still there, and loads.
Files that libraries write by themselves are tried on a real disk of a few hundred kB, where the system allows to make one.
"""

import ast
import builtins
import csv
import errno
import functools
import io
import itertools
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError

import train_gated
from conftest import ROOT
from data import rows, wikiart
from engine import cache, checkpoints, comparison, environment, errors, files, run, runfolder
from show import report
from test_run import make, same, train  # noqa: F401
from tools import compare_gated, drawing


FULL, READ_ONLY = errno.ENOSPC, errno.EROFS


class Counted:
    """A file whose writes are the disk's."""

    def __init__(self, file, disk, path):
        self.file, self.disk, self.path = file, disk, path

    def write(self, data):
        self.disk.take(self, data)
        return self.file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def truncate(self, size=None):
        self.disk.refuse(self.path)
        return self.file.truncate(size)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)


class Disk:
    """Writes below `folder`; the one of number `fails_at` finds the disk full or, as `fault` says, read-only, and so does every later
    one. On one that is read-only nothing else is changed either."""

    CHANGES = ("open", "unlink", "remove", "replace", "rename", "mkdir", "rmdir", "chmod", "truncate")  # of module os

    def __init__(self, folder, fails_at=None, fault=FULL):
        self.folder, self.fails_at, self.fault, self.writes, self.open = str(folder), fails_at, fault, [], io.open

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for module in (builtins, io):
            self.patch.setattr(module, "open", self.opened)
        for name in self.CHANGES:
            self.patch.setattr(os, name, self.guarded(name, getattr(os, name)))
        if before_3_11 := getattr(pathlib, "_NormalAccessor", None):  # has them by itself
            for name in {*self.CHANGES} & {*vars(before_3_11)}:
                self.patch.setattr(before_3_11, name, staticmethod(self.opened if name == "open" else getattr(os, name)))
        return self

    def guarded(self, name, change):
        def guard(path, *args, **more):
            if name != "open" or args and args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.refuse(path)
            return change(path, *args, **more)
        return guard

    def refuse(self, path):
        """OSError where the disk has become read-only and the path is on it."""
        failed = self.fails_at is not None and len(self.writes) > self.fails_at
        if failed and self.fault == READ_ONLY and not isinstance(path, int) and os.path.abspath(path).startswith(self.folder):
            raise OSError(self.fault, os.strerror(self.fault), str(path))

    def __exit__(self, *error):
        self.patch.undo()

    def opened(self, file, mode="r", *args, **settings):
        if set(mode) & set("wax+"):
            self.refuse(file)
        found = self.open(file, mode, *args, **settings)
        name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(file)
        return Counted(found, self, name) if set(mode) & set("wax+") and name.startswith(self.folder) else found

    def take(self, file, data):
        self.writes.append(file.path)
        if self.fails_at is not None and len(self.writes) > self.fails_at:
            if self.fault == FULL:
                file.file.write(data[:len(data) // 2])
            raise OSError(self.fault, os.strerror(self.fault))


def told(work, capsys):
    """Run what a script's main() would -> (its exit code, the lines of stderr)."""
    code = errors.exit_code(lambda argv: work() and None)
    return code, [line for line in capsys.readouterr().err.splitlines() if not line.startswith("steps from")]


def named(lines, name, fault=FULL):
    """The one line of an error about a full or read-only disk, which names the file, and says to make room only where that helps."""
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert name in lines[0].split(os.strerror(fault))[0] and os.strerror(fault) in lines[0], lines
    assert fault == FULL or "free" not in lines[0], lines
    return True


# --- a run ------------

def whole_events(path):
    """Every record of a file of TensorBoard's is whole: length, its check sum, the bytes, theirs."""
    data, place = path.read_bytes(), 0
    while place < len(data):
        place += 12 + struct.unpack_from("<Q", data, place)[0] + 4
    return place == len(data)


def check_folder(out, states, leftovers=False):
    """Every file that is there is whole. states: of the model after each epoch; leftovers: what could not be removed may be there."""
    for path in out.iterdir() if out.exists() else ():
        if path.name in (".lock", ".owner") or path.name.startswith("."):  # a read-only disk keeps them
            assert leftovers, path
        elif path.suffix == ".pt":
            held = checkpoints.load_checkpoint(path)
            assert any(same(held["state"], state) for state in states), path
        elif path.name == "args.yaml":
            assert yaml.safe_load(path.read_text()) == {"flag": 1}
        elif path.name == "training_log.csv":
            text = path.read_bytes().decode()
            assert text.endswith("\r\n") and all(None not in row and None not in row.values() for row in csv.DictReader(io.StringIO(text)))
        elif path.name.startswith("events.out"):
            assert whole_events(path)
        else:
            assert path.name == "curves.png" and path.read_bytes() == b"a picture", path


@pytest.fixture
def quick(monkeypatch):
    """curves.png in two writes, a row of the log every step, room for the check of free space. The disk behind `Disk` need not keep
    anything over a power cut, and the commit is asked for once."""
    def draw(log_path, png_path, *args):
        with files.whole_file(png_path, "wb") as file:
            file.write(b"a pic")
            file.write(b"ture")
    monkeypatch.setattr(runfolder, "draw_curves", draw)
    monkeypatch.setattr(run, "LOG_EVERY", 1)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    monkeypatch.setattr(environment, "project_version", functools.cache(environment.project_version))


def chosen(writes, fault):
    """Numbers of the first and, for a full disk, the middle and the last write of each file, each time it is opened."""
    groups = [[n for n, _ in group] for _, group in itertools.groupby(enumerate(writes), key=lambda pair: pair[1])]
    return sorted({n for group in groups for n in ((group[0], group[len(group) // 2], group[-1]) if fault == FULL else group[:1])})


@pytest.mark.parametrize("fault", [FULL, READ_ONLY], ids=os.strerror)
def test_a_run_at_every_write(make, quick, capsys, tmp_path, fault):  # noqa: F811
    settings = {"save_last": True, "epochs": 2}
    with Disk(tmp_path / "clean") as disk:
        after = train(make("clean", **settings))
    kinds = {pathlib.Path(name).name.lstrip(".").split(".")[0] for name in disk.writes}
    assert {"args", "training_log", "events", "last", "best", "curves", "owner"} <= kinds
    for number in range(len(disk.writes)) if os.environ.get("EVERY_WRITE") else chosen(disk.writes, fault):
        out = tmp_path / f"run{number}"
        with Disk(out, number, fault) as full:
            code, lines = told(lambda: train(make(out.name, **settings)), capsys)
        failing = pathlib.Path(full.writes[number]).name.lstrip(".")
        failing = out.name if failing.split(".")[0] in ("owner", "args") else failing if failing.startswith("events") else (
            ".".join(failing.split(".")[:2]))
        assert code == 2 and named(lines, failing, fault), (number, lines)
        check_folder(out, after, leftovers=fault == READ_ONLY)
        if (out / "last.pt").exists():  # some room again: it goes on as if nothing had been
            again = train(make(out.name, **settings), resumed=True)
            assert same((again or after)[-1], after[-1])
            check_folder(out, after)
            assert same(checkpoints.load_checkpoint(out / "best.pt")["state"], after[-1])
        shutil.rmtree(out, ignore_errors=True)


def test_the_best_of_before_stays_where_there_is_no_room_for_a_better_one(make, quick, capsys, tmp_path):  # noqa: F811
    with Disk(tmp_path / "clean") as disk:
        after = train(make("clean", epochs=2))
    best = [name for name in disk.writes if ".best.pt." in name]
    second = [n for n, name in enumerate(disk.writes) if name in best and name != best[0]]
    assert len(second) > 3
    for number in (second[0], second[len(second) // 2], second[-1]):
        out = tmp_path / f"run{number}"
        with Disk(out, number):
            code, lines = told(lambda: train(make(out.name, epochs=2)), capsys)
        assert code == 2 and named(lines, "best.pt") and "what stood there before is untouched" in lines[0]
        assert same(checkpoints.load_checkpoint(out / "best.pt")["state"], after[0])
        shutil.rmtree(out)


@pytest.mark.parametrize("place", ["below/a/file", "read-only"])
def test_a_run_folder_that_cannot_be_made_is_one_line(make, capsys, tmp_path, monkeypatch, place):  # noqa: F811
    (tmp_path / "below").write_text("")
    if place == "read-only":  # root may write everywhere
        def refuse(path, *args, **more):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    code, lines = told(lambda: train(make(place)), capsys)
    assert code == 2 and len(lines) == 1 and place in lines[0] and "cannot be written" in lines[0]


def test_tensorboard_reads_the_numbers_of_a_run_and_of_a_resumed_one(make, quick, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(make(epochs=2, save_last=True))
    train(make(epochs=3, save_last=True), resumed=True)
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    rows = runfolder.read_log(tmp_path / "run/training_log.csv")
    assert "epoch/loss" in board.Tags()["scalars"] and "step/loss" in board.Tags()["scalars"]
    for kind in ("step", "epoch"):
        wanted = [(int(row["step"]), float(row["loss"])) for row in rows if row["kind"] == kind]
        found = [(one.step, one.value) for one in board.Scalars(f"{kind}/loss")]
        assert len(wanted) >= 3 and found == [(step, pytest.approx(value, rel=1e-4)) for step, value in wanted]


# --- what else is written ------------

ANSWERS = [SimpleNamespace(file="val.csv", line=n + 2, name=f"{n}.jpg", question="Who?", answer="Rubens", question_type="who", style="")
           for n in range(3)]
SAID = [{"prediction": "Rubens", "confidence": -0.5}] * 3


def predictions(folder):
    comparison.write_predictions(folder / "p.json", [1, 2, 3], ANSWERS, SAID)


def features(folder):
    """A store of features of three pictures, a batch each."""
    def tensor_of(path):
        return torch.ones(3, 2, 2) * int(pathlib.Path(path).stem)
    store = cache.Store(folder, "vision", {"a": 1}, (2,), torch.float32)
    store.fill([folder.parent / f"{n}.png" for n in range(3)], tensor_of, lambda images: images[:, 0, 0, :], 1, 0, lambda line: None)


WRITERS = {  # what is written -> how, and the names of its files
    "predictions": (predictions, ("p.json", "p.csv")),
    "features": (features, ("vision-", cache.HASHES)),
    "page": (lambda folder: report.write(folder / "page.html", "A page", []), ("page.html",)),
    "sample picture": (lambda folder: drawing.write_then_rename(
        folder / "a.jpg", lambda path: Image.new("RGB", (400, 400)).save(path, "BMP")), ("a.jpg",)),
    "sample table": (lambda folder: drawing.write_text(folder / "a.json", "{}" * 9), ("a.json",)),
    "checkpoint": (lambda folder: checkpoints.save_checkpoint(folder / "best.pt", {"a": torch.ones(9)}), ("best.pt",))}


@pytest.mark.parametrize("fault", [FULL, READ_ONLY], ids=os.strerror)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("what", WRITERS)
def test_every_write_of_what_else_is_written(what, before, fault, tmp_path, capsys):
    """before: a whole one stands there already, and stays."""
    write, names = WRITERS[what]
    for n in range(3):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "clean").mkdir()
    with Disk(tmp_path / "clean") as disk:
        write(tmp_path / "clean")
    assert disk.writes
    for number in range(len(disk.writes)):
        folder = tmp_path / f"place{number}"
        folder.mkdir()
        if before and what != "features":
            write(folder)
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        with Disk(folder, number, fault):
            code, lines = told(lambda: write(folder), capsys)
        assert code == 2 and any(named(lines, name, fault) for name in names if name in lines[0]), (number, lines)
        if fault == READ_ONLY:  # which keeps what is begun, under a hidden name
            for path in folder.glob(".*"):
                path.unlink()
        left = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert kept.items() <= left.items() or what == "predictions"  # two files: the first of them may be new
        if what == "features":  # begun and not whole: the same command goes on
            write(folder)
            left = {path.name: path.read_bytes() for path in folder.iterdir()}
        whole = {path.name: path.read_bytes() for path in (tmp_path / "clean").iterdir()}
        assert left.keys() <= whole.keys() | {cache.HASHES}  # of pictures that have not been touched for two seconds
        for name in left:
            if what == "checkpoint":
                checkpoints.load_checkpoint(folder / name)
            elif name != cache.HASHES:
                assert left[name] == whole[name], (number, name)


@pytest.mark.parametrize("error, remedy", [
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "free some space"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free some space"), (OSError(errno.EDQUOT, "quota"), "free some space"),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), "can be written"), (OSError(errno.EFBIG, "File too large"), "free some space"),
    (SafetensorError("I/O error: Read-only file system (os error 30)"), "can be written")])
def test_a_folder_that_cannot_be_written_leaves_nothing_and_is_one_line(error, remedy, tmp_path, capsys):
    def work():
        with files.whole_folder(tmp_path / "model") as part:
            (part / "config.json").write_text("{}")
            raise error
    code, lines = told(work, capsys)
    assert code == 2 and len(lines) == 1 and error.args[-1] in lines[0] and not list(tmp_path.iterdir())
    assert remedy in files.remedy(error)


def test_what_cannot_be_listed_or_compared_is_said_before_hours_of_work(few, flags, tmp_path, monkeypatch, capsys):
    """--check-data of styles goes on, since nothing may be broken; a comparison does not begin."""
    def refuse(*args, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    verify = rows.verify_images
    monkeypatch.setattr(rows, "verify_images", lambda *args: print("decoding") or verify(*args))
    assert wikiart.check_data(str(few), 1) is None
    told = capsys.readouterr().out
    assert f"{few}/broken.txt: cannot be written (Read-only file system): what is broken" in told.split("decoding")[0]
    assert "training can start" in told and not (few / "broken.txt").exists()
    monkeypatch.setattr(train_gated, "prepare", lambda *args: pytest.fail("a run was begun"))
    with pytest.raises(errors.DataError, match="compare.json: cannot be written"):
        compare_gated.main(flags("--split", "val", "--out", str(tmp_path / "compare")))


# --- nothing writes in another way ------------

# functions of the project that write beside files.whole_file, files.append_whole and drawing.write_then_rename -> where a full disk
# is tried at each of their writes
OTHERS = {"files.whole_file": "above", "files.append_whole": "above", "files.digest": "reads", "files.write_csv": "above",
          "drawing.write_csv": "above", "drawing.write_text": "above", "runfolder.folder_lock": "above",
          "cache.hash_pictures": "test_cache.py", "cache.Store._cut": "test_cache.py", "cache.Store._build": "test_cache.py, and above",
          "folders.open_table": "test_folders.py", "picture_index.append": "test_gallery.py",
          "stage1.export": "test_retrieval_faults.py", "sharing._write_tensors": "test_sharing.py",
          **dict.fromkeys(("assemble.save_gated", "assemble.save_tokenizer", "make_small.convert_smollm2"), "in files.whole_folder, above"),
          **{f"make_tiny.{name}": "makes the models that ship: nobody's run" for name in (
              "make_tokenizer", "make_wordpiece", "save_captioner", "save_folder", "save_retrieval")}}
WRITES = ("write_text", "write_bytes", "touch", "save_pretrained", "save_file", "savez", "to_csv", "symlink_to")


def writing(tree, module):
    """Names of the functions with a call that opens a file for writing, or writes one by itself."""
    def visit(node, place):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            place = f"{place}.{node.name}"
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [one.value for one in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
                     if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            ours = ast.unparse(node.func) in ("write_text", "drawing.write_text")
            if (name in WRITES and not ours) or (name in ("open", "fdopen") and any(set(mode) <= set("rwabxt+") and set(mode) & set("wax+")
                                                                      for mode in modes)):
                yield place
        for child in ast.iter_child_nodes(node):
            yield from visit(child, place)
    return set(visit(tree, module))


def test_nothing_else_is_written_in_another_way():
    """What is new here: write through files.whole_file, or add it with the test of its full disk."""
    paths = [*ROOT.glob("*.py"), *(path for room in ("data", "engine", "show", "tools") for path in (ROOT / room).glob("*.py"))]
    found = set().union(*(writing(ast.parse(path.read_text(encoding="utf-8")), path.stem) for path in paths))
    assert found - OTHERS.keys() == set()
    assert {name for name, where in OTHERS.items() if "reads" not in where} - found <= {"files.whole_file"}


# --- a real disk ------------

@pytest.fixture
def small_disk(tmp_path):
    """Function: kB -> the place of a disk of this size."""
    made = []

    def make_disk(size):
        place = tmp_path / f"disk{size}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this system lets no one make a small disk: {done.stderr.strip()}")
        made.append(place)
        return place
    yield make_disk
    for place in made:
        subprocess.run(["umount", str(place)], check=True)


UNCHECKED = """
import sys
from engine import errors, files
files.refuse_full_disk = lambda *args: None  # the disk fills while the run is under way
import {script}
sys.exit(errors.exit_code({script}.main, sys.argv[1:]))
"""


def ran_full(forker, script, argv):
    """Lines of stderr of a command that finds no room; what libraries say of themselves is no part of it."""
    done = forker.run(["-c", UNCHECKED.format(script=script), *argv], cwd=ROOT)[0]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "No space left" in lines[0], done.stderr[-3000:]
    return lines[0]


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_a_training_on_a_small_disk(few, tiny, small_disk, forker):
    """It fills in best.pt or in last.pt."""
    place = small_disk(9000)
    error = ran_full(forker, "train_gated", [
        "--data", str(few), "--blip2", tiny[0], "--efficientnet", tiny[1], "--epochs", "2", "--batch-size", "8", "--accumulation", "1",
        "--workers", "0", "--precision", "no", "--save-last", "--patience", "0", "--out", str(place / "run")])
    assert error.startswith(f"error: {place}/run/") and error.split(":")[1].endswith(("best.pt", "last.pt"))
    for path in (place / "run").glob("*.pt"):
        checkpoints.load_checkpoint(path)
    assert not list((place / "run").glob(".*"))
