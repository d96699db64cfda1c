"""faults.py: the harness of the tables of bad input (test_faults.py, test_other_faults.py, test_retrieval_faults.py).

    Fault, World, cases, check     an entry of a table, the small world that it spoils, the entries as cases, what must hold for each
    wrong_flag, config             entries of one kind
    hostile, edited, half, ...     faults, each a function of the world or of a path; what it returns is added to the command

What goes wrong for users costs them one line and nothing on the disk: check asserts, for every entry alike, the exit code, one line
that starts with `error: ` and is the last, nothing that ran out of a hostile file, and the disk as it was.
"""

import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import stat
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import errors, runfolder

STARTED = re.compile(r"args\.yaml|training_log\.csv|curves\.png|events\.out\..*")  # what a run that has begun may leave behind
ERROR = re.compile(r"(\S+: )?error: ")  # argparse puts the script's name before it
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore")
ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
POINTER = b"version https://git-lfs.github.com/spec/v1\n"


# --- tables ------------

@dataclass
class Fault:
    """One entry: `harm` is done to a World, then `command` (a method of World) is run with the flags `more`.

    kinds: the Worlds in which it is tried; words: of the message, LIST and PLACE standing for the World's list_name and place.
    left: "nothing" is written, anywhere. "begun": the fault can show only in the rehearsal or later, when the run folder is made;
    it may then hold settings, log and curves (STARTED), and still no checkpoint that was not there, and no hidden file. The name of
    a .json file: that one too. "any": whatever has no hidden name.
    numbers: of the collection of sixty in test_faults.py, "" where it is none of them.
    """
    name: str
    kinds: tuple
    harm: object
    words: tuple
    command: str = "train"
    more: tuple = ()
    left: str = "nothing"
    code: int = 2
    numbers: str = ""


class World:
    """A fresh copy of everything that an entry may spoil; `finished` has data/ and run/ with best.pt and last.pt."""

    def __init__(self, folder, finished, patch):
        self.folder, self.finished, self.patch = folder, finished, patch
        self.data = shutil.copytree(finished / "data", folder / "data")
        self.run, self.mark = folder / "run", folder / "ran"
        self.best, self.last = self.run / "best.pt", self.run / "last.pt"

    def begin(self, command):
        """The run folder that a command finds."""
        if command not in ("train", "zero"):
            shutil.copytree(self.finished / "run", self.run)

    def main(self, command):
        """The main() that a command is of."""
        return self.script.main

    @property
    def list(self):
        return self.data / self.list_name

    def resume(self, *more):
        return self.train("--save-last", "--resume", *more)

    def beside(self, name, content):
        """A file outside the data -> its name."""
        (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def text(self, change, encoding="utf-8"):
        """Rewrite the list of training pictures: change(text) -> text or bytes."""
        changed = change(self.list.read_text(encoding="utf-8"))
        self.list.write_bytes(changed if isinstance(changed, bytes) else changed.encode(encoding))

    def first(self, name):
        """The list's first picture is called otherwise in it."""
        self.text(lambda text: text.replace(self.first_name, name, 1))

    def pictures(self, content):
        """Every picture is `content`, so that it does not matter which is read first."""
        for path in self.data.rglob("*.*g"):
            path.write_bytes(content)


def cases(table):
    """The entries of a table in each of their Worlds, as parameters of check."""
    return [pytest.param(entry, kind, id=f"{entry.name}-{kind.__name__}") for entry in table for kind in entry.kinds]


def refuse_twins(table):
    """No two cases of a table have one name."""
    names = [case.id for case in cases(table)]
    assert len(set(names)) == len(names)


def refuse_unknown(covered, table, more=()):
    """Every name in {kind of bad input: names} is a test of this folder, an entry of the table or one of `more`."""
    texts = "".join(path.read_text(encoding="utf-8") for path in pathlib.Path(__file__).parent.rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)\(", texts, re.MULTILINE)) | {entry.name for entry in table} | set(more)
    named = [name for names in covered.values() for name in (re.findall(r"test_\w+", names) if isinstance(names, str) else names)]
    assert [name for name in named if name not in there] == []


# --- the harness ------------

def the_error(text):
    """What was printed -> its one error, which comes last: a line, and perhaps indented ones below it."""
    lines = text.splitlines()
    first, = [number for number, line in enumerate(lines) if ERROR.match(line)]
    assert all(line.startswith("  ") for line in lines[first + 1:]) and "Traceback" not in text, text
    return "\n".join(lines[first:])


def snapshot(world, begun):
    """{name: what changes when it is written} of everything; begun: without what a run that has begun may write."""
    found = {}
    for path in sorted(world.folder.rglob("*")):
        if begun and (path == world.run or path.parent == world.run and STARTED.fullmatch(path.name)):
            continue
        status = path.lstat()
        written = (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else ()
        found[str(path.relative_to(world.folder))] = (status.st_mode, status.st_ino, *written)
    return found


def spoil(entry, world):
    """Do the harm of an entry -> its command line."""
    world.begin(entry.command)
    more = entry.harm(world) if entry.harm else None
    return getattr(world, entry.command)(*entry.more, *(more if isinstance(more, list) else []))


def exit_code(entry, world, argv):
    """What the entry's script ends with."""
    try:
        return errors.exit_code(world.main(entry.command), argv)
    except SystemExit as stop:  # argparse
        return stop.code


def check(entry, world, capsys):
    """One line, the right code, nothing run, nothing changed."""
    argv, begun = spoil(entry, world), entry.left != "nothing"
    before = snapshot(world, begun)
    capsys.readouterr()
    code = exit_code(entry, world, argv)
    after = snapshot(world, begun)
    world.cleanup.close()
    message = the_error(capsys.readouterr().err).replace(f"{world.folder}/", "")  # pytest names the folder after the entry
    assert code == entry.code
    words = [word.replace("LIST", world.list_name).replace("PLACE", world.place) for word in entry.words]
    assert [word for word in words if word not in message] == [], message
    assert not world.mark.exists()
    if entry.left == "any":
        assert not [path for path in world.run.iterdir() if path.name.startswith(".")]
    else:
        if entry.left.endswith(".json"):  # val.json is written before the row of its epoch, results before what is drawn from them
            assert after.pop(f"run/{entry.left}")
        assert after == before


# --- entries of one kind ------------

def wrong_flag(kinds, flag, value, *words):
    """A flag with a value that cannot be; words: of the message, the flag itself where there are none."""
    return Fault(f"{flag} {value}", kinds, None, words or (flag,), more=(flag, value))


def config(kinds, text, *words):
    """--config with this text."""
    return Fault(f"config {text!r}", kinds, lambda w: ["--config", w.beside("c.yaml", text.encode())], ("c.yaml", *words))


def configs(kinds):
    """--config with what no script takes."""
    return [config(kinds, "epochs_count: 3", "epochs_count"), config(kinds, "- epochs", "name: value"),
            config(kinds, "epochs: [3", "c.yaml"), config(kinds, "epochs: many", "epochs", "'many'"),
            config(kinds, "save_last: 1", "save_last", "true or false"), config(kinds, "precision: int8", "int8")]


# --- files ------------

class Hostile:
    """Unpickling this makes a folder: stands for code in a foreign file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def hostile(world, path, kind="zip"):
    """A checkpoint with code in it, as torch's new or old format or a bare pickle."""
    content = {"state": Hostile(world.mark), "model": {"classifier.weight": torch.zeros(2, 2)}}
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    if kind == "pickle":
        pathlib.Path(path).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return str(path)


def hostile_bin(world, folder):
    """A model's folder whose weights are pickled, with code in them."""
    (folder / "model.safetensors").unlink()
    hostile(world, folder / "pytorch_model.bin")


def edited(path, change):
    """Change the content of a checkpoint and save it well."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def flip(path, share=0.5):
    """One bit of the file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 4
    path.write_bytes(data)


def hole(path):
    """A page of zeros in the middle, as a lost disk block leaves it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2:len(data) // 2 + 4096] = bytes(4096)
    path.write_bytes(data)


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def content_of(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def json_of(name, change):
    """Change an entry of a JSON file of the folder."""
    def harm(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return harm


def without_tensor(name):
    """A model's folder without one of its tensors."""
    def change(folder):
        state = load_file(folder / "model.safetensors")
        state.pop(name)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return change


def link(target):
    """The first picture is a link."""
    def harm(world):
        world.picture.unlink()
        world.picture.symlink_to(target(world))
    return harm


def other_checkpoint(name, place):
    """A checkpoint of the table's other script, or of this one, lies where `place` belongs."""
    def harm(world):
        other, = [kind for kind in world.others if kind is not type(world)]
        shutil.copy(world.others[other] / "run" / name, getattr(world, place))
    return harm


# --- what fails while a script runs ------------

def fails(place, name, error):
    """The function place.name raises `error` instead."""
    def harm(world):
        def failing(*args, **kwargs):
            raise error
        world.patch.setattr(place, name, failing)
    return harm


def on_script(name, error):
    """The function `name` of the script raises `error`."""
    return lambda world: fails(world.script, name, error)(world)


def no_rename(to):
    """The disk is full when the file `to` is to be renamed into place."""
    def harm(world):
        replace = os.replace

        def full(source, target):
            if pathlib.Path(target).name == to:
                raise OSError(28, "No space left on device")
            return replace(source, target)
        world.patch.setattr(os, "replace", full)
    return harm


def small_files(limit):
    """No file may grow beyond `limit` bytes: RLIMIT_FSIZE stands for a full disk."""
    def harm(world):
        former = resource.getrlimit(resource.RLIMIT_FSIZE)
        world.cleanup.callback(resource.setrlimit, resource.RLIMIT_FSIZE, former)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    return harm


def in_use(world):
    """Another process is at work in the run folder."""
    world.cleanup.enter_context(runfolder.folder_lock(world.run))


def without_module(name):
    return lambda world: world.patch.setitem(sys.modules, name, None)


# --- what fails in the process that draws a page: modules that it finds first ------------

WITHOUT_JINJA2 = "raise ModuleNotFoundError(\"No module named 'jinja2'\", name='jinja2')"
FULL_AT = """import os
replace = os.replace
def full(source, target):
    if os.path.basename(target) == {0!r}:
        raise OSError(28, "No space left on device")
    return replace(source, target)
os.replace = full
"""


def in_the_drawing(name, text):
    """The process that draws a page imports this module in place of its own."""
    return lambda world: world.patch.setenv("PYTHONPATH", os.path.dirname(world.beside(name, text.encode())))
