"""pytest tests/test_faults.py: what goes wrong for users costs them one line and nothing on the disk. Behaviour-checked.

FAULTS is one table: an entry puts one fault into a fresh copy of a small data folder, run folder or model, and says which
script meets it and which words the message must hold. What is asserted for all alike: faults.py.
COVERED names for every fault of classes A and B (numbers as in the collection of sixty) the tests that hold it down, here and in
the other files of this folder, or why these scripts cannot have it.
"""

import contextlib
import csv
import importlib.metadata
import os
import pathlib
import pickle
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

import core
import eval_gated
import train_gated
from conftest import prepared
from engine import checkpoints, environment, errors, loaders, loop, published, runfolder
from engine.run import Run
from faults import (ALLOCATOR, ERROR, MEMORY, POINTER, Fault, Hostile, World, cases, check, content_of, edited, exit_code, fails, flip,
                    half, hole, hostile, hostile_bin, in_use, json_of, no_rename, refuse_twins, refuse_unknown, small_files, spoil,
                    without_tensor)
from tools import make_tiny
from test_rows import bomb

HEAD = "question_id,image,question,answer,question_type,style\n"
SETTINGS = ("--epochs", "2", "--batch-size", "2", "--accumulation", "1", "--lr", "1e-3", "--precision", "no", "--workers", "0")
STEPS = 6  # of an epoch
# --- a small world: data, a run that was interrupted in its second epoch, models ------------

def make_data(folder):
    """Six training and two validation pictures, two questions each."""
    (folder / "images").mkdir(parents=True)
    for split, numbers in (("train", range(6)), ("val", range(6, 8))):
        lines = []
        for n in numbers:
            Image.new("RGB", (32, 32), (30 * n, 90, 200)).save(folder / f"images/p{n}.png")
            style = ("Cubism", "Pop Art")[n % 2]
            lines += [f"{2 * n},p{n}.png,What is painted here?,a boat,what,{style}\n",
                      f"{2 * n + 1},p{n}.png,Which style is this?,{style},style,{style}\n"]
        (folder / f"{split}.csv").write_text(HEAD + "".join(lines))
    return folder


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """One thread: the models here are so small that a second one costs more than it brings. No curves."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runfolder, "draw_curves", lambda *args: None)
        yield
    torch.set_num_threads(former)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """{Gated: folder with data/ and run/, which holds best.pt of epoch 1 and last.pt of step STEPS + 2}."""
    Gated.tiny = tiny
    folder, step, calls = tmp_path_factory.mktemp("faults"), train_gated.train_step, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 1 + STEPS + 2:  # the rehearsal is the first
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gated, "train_step", interrupt)
        code = train_gated.main(["--data", str(make_data(folder / "data")), "--blip2", tiny[0], "--efficientnet", tiny[1],
                                 *SETTINGS, "--save-last", "--out", str(folder / "run")])
    assert code == 130 and checkpoints.load_checkpoint(folder / "run/last.pt")["step"] == STEPS + 2
    return {Gated: folder}


class Gated(World):
    """The World of train_gated.py and eval_gated.py. tiny: (BLIP-2, style classifier), set by the fixture `finished`."""
    script, list_name, place, tiny = train_gated, "train.csv", ".png (line ", None

    def main(self, command):
        return eval_gated.main if command == "eval" else train_gated.main

    def begin(self, command):
        if command != "train":
            self.copy_run(last=command == "resume")

    def train(self, *more):
        return ["--data", str(self.data), "--blip2", self.tiny[0], "--efficientnet", self.tiny[1], *SETTINGS,
                "--out", str(self.run), *more]

    def eval(self, *more):
        return ["--checkpoint", str(self.best), "--data", str(self.data), "--workers", "0", "--beams", "1",
                "--max-new-tokens", "2", "--no-baselines", *more]

    def copy_run(self, last=True):
        """last: a last.pt that may be spoiled; else only a link to it, which spares a copy."""
        shutil.copytree(self.finished / "run", self.run, ignore=shutil.ignore_patterns("last.pt"))
        (shutil.copy if last else os.link)(self.finished / "run/last.pt", self.last)

    def copy_blip2(self):
        return pathlib.Path(shutil.copytree(self.tiny[0], self.folder / "blip2"))

    def cell(self, column, value, line=3, split="train"):
        """Put a value into the table; line 1 is the header."""
        path = self.data / f"{split}.csv"
        table = list(csv.reader(path.open(newline="", encoding="utf-8")))
        table[line - 1][table[0].index(column)] = value
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(table)

    def text(self, change, split="train", encoding="utf-8"):
        """Rewrite a table: change(text) -> text or bytes."""
        changed = change((self.data / f"{split}.csv").read_text(encoding="utf-8"))
        (self.data / f"{split}.csv").write_bytes(changed if isinstance(changed, bytes) else changed.encode(encoding))

    def picture(self, content):
        """Every training picture is `content`, so that it does not matter which is read first."""
        for n in range(6):
            (self.data / f"images/p{n}.png").write_bytes(content)


GATED = (Gated,)


# --- faults, each a function of the world; what it returns is added to the command ------------

def built_otherwise(**settings):
    return lambda w: edited(w.best, lambda content: content["model_args"].update(settings))


def spoiled_blip2(change):
    """--blip2 of a copy on which change(folder) was called."""
    def harm(world):
        folder = world.copy_blip2()
        change(folder)
        return ["--blip2", str(folder)]
    return harm


def other_network(world):
    """config.json of a BERT, in whose place transformers would make a BLIP-2 of its default size."""
    import transformers
    fails(transformers.Blip2ForConditionalGeneration, "__init__", AssertionError("made before its type was looked at"))(world)
    return spoiled_blip2(content_of("config.json", b'{"model_type": "bert"}'))(world)


def code_in_blip2(world):
    folder = world.copy_blip2()
    hostile_bin(world, folder)
    return ["--blip2", str(folder)]


def b0_checkpoint(world):
    import timm
    torch.save(timm.create_model(make_tiny.ARCH, num_classes=5).state_dict(), world.folder / "other.pt")
    return ["--efficientnet", str(world.folder / "other.pt")]


def unknown_arch(world):
    content = torch.load(world.tiny[1], weights_only=True)
    torch.save({**content, "arch": "no_such_net"}, world.folder / "other.pt")
    return ["--efficientnet", str(world.folder / "other.pt")]


def nan_gradient(world):
    forward = core.Blip2OPTGated.forward

    def poisoned(model, *args, **kwargs):
        parts = forward(model, *args, **kwargs)
        if parts["loss"].requires_grad:
            parts["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return parts
    world.patch.setattr(core.Blip2OPTGated, "forward", poisoned)


def nan_validation(world):
    world.patch.setattr(train_gated, "loss_summary", lambda found: {"loss": float("nan")})


def dying_loader(world):
    """The loader process of the validation is killed, as the kernel does when memory runs out."""
    read = train_gated.Questions.__getitem__

    def killed(questions, index):
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(questions, index)
    world.patch.setattr(train_gated.Questions, "__getitem__", killed)


def half_linked(world):
    """A picture that is a link to a file outside the root."""
    shutil.copy(world.data / "images/p0.png", world.folder / "secret.png")
    (world.data / "images/link.png").symlink_to("../../secret.png")
    world.cell("image", "link.png")


SEMART = b"IMAGE_FILE\tTITLE\tSCHOOL\tDESCRIPTION\n%s\tA boat\tDutch\tA boat on a river\n"


def semart(name):
    """--semart with a table that has the picture `name`."""
    return lambda world: ["--semart", world.beside("semart.csv", SEMART % name.encode())]


def wrong_flag(flag, value, *words, numbers="", command="train"):
    """A flag with a value that cannot be; words: of the message, the flag itself where there are none."""
    late = fails(core.Blip2OPTGated, "build", AssertionError("a model was built with it"))
    return Fault(f"{command} {flag} {value}", GATED, late, words or (flag,), command, (flag, value), numbers=numbers)


FAULTS = [
    # data
    Fault("data folder that is not there", GATED, lambda w: shutil.rmtree(w.data), ("data", "no such", "--data")),
    Fault("data folder of evaluation that is not there", GATED, lambda w: shutil.rmtree(w.data), ("data", "no such", "--data"),
          "eval"),
    Fault("table that is not there", GATED, lambda w: (w.data / "train.csv").unlink(), ("train.csv", "val.csv", "--data")),
    Fault("validation table that is not there", GATED, lambda w: (w.data / "val.csv").unlink(), ("val.csv", "--data")),
    Fault("split that is not there", GATED, None, ("test.csv", "val.csv"), "eval", ("--split", "test")),
    Fault("column that is not there", GATED, lambda w: w.text(lambda t: t.replace("answer", "label", 1)),
          ("train.csv", "'answer'", "--columns answer=NAME", "label"), numbers="22B"),
    Fault("column by a wrong name", GATED, None, ("train.csv", "'reply'", "--columns"), more=("--columns", "answer=reply"), numbers="22B"),
    Fault("--columns of an unknown name", GATED, None, ("--columns", "reply"), more=("--columns", "reply=answer")),
    Fault("image that is not there", GATED, lambda w: w.cell("image", "p11.png"),
          ("train.csv", "line 3", "'p11.png'", "nearest", "--images"), numbers="3A"),
    Fault("image of another machine", GATED, lambda w: w.cell("image", "/home/ann/p1.png"),
          ("line 3", "'/home/ann/p1.png'", "absolute"), numbers="3A"),
    Fault("image root that is not there", GATED, None, ("no/such", "--images"), more=("--images", "no/such"), numbers="3A"),
    Fault("0 bytes of table", GATED, lambda w: w.text(lambda t: ""), ("train.csv", "empty"), numbers="22B"),
    Fault("header without rows", GATED, lambda w: w.text(lambda t: HEAD), ("train.csv", "no rows"), numbers="22B"),
    Fault("validation table without rows", GATED, lambda w: w.text(lambda t: HEAD, "val"), ("val.csv", "no rows"), numbers="22B"),
    Fault("0 bytes of picture", GATED, lambda w: w.picture(b""), ("train.csv", "line 2", "'p0.png'", "0 bytes"), numbers="6A"),
    Fault("cut picture", GATED, lambda w: w.picture((w.data / "images/p0.png").read_bytes()[:60]),
          ("train.csv", "line", ".png", "replace it"), left="begun", numbers="6A"),
    Fault("page instead of a picture", GATED, lambda w: w.picture(b"<!DOCTYPE html>"),
          ("train.csv", "line", "<!DOCTYPE", "replace it"), left="begun", numbers="6A"),
    Fault("picture that is a bomb", GATED, lambda w: w.picture(bomb(w.folder / "b", 30_000, 30_000).read_bytes()),
          ("train.csv", "line", "900000000", "scale it down"), left="begun", numbers="54C"),
    Fault("cut picture in evaluation", GATED, lambda w: (w.data / "images/p6.png").write_bytes(b"\x89PNG\r\n"),
          ("val.csv", "line", "p6.png", "replace it"), "eval", numbers="6A"),
    Fault("picture above the root", GATED, lambda w: w.cell("image", "../secret.png"),
          ("line 3", "'../secret.png'", "'..'", "--images"), numbers="55C"),
    Fault("absolute picture", GATED, lambda w: w.cell("image", str(w.data / "images/p0.png")),
          ("line 3", "absolute", "--images"), numbers="55C"),
    Fault("picture that is a link out of the root", GATED, half_linked, ("line 3", "'link.png'", "leaves"), numbers="55C"),
    Fault("picture that is a URL", GATED, lambda w: w.cell("image", "https://example.org/p0.png"), ("line 3", "URL", "--images"),
          numbers="55C"),
    Fault("NUL in a name", GATED, lambda w: w.text(lambda t: t.replace("p0.png", "p0\0.png", 1)), ("train.csv", "line 2", "NUL"),
          numbers="55C"),
    Fault("device as picture", GATED, lambda w: os.symlink("/dev/zero", w.data / "images/p9.png") or w.cell("image", "p9.png"),
          ("line 3", "'p9.png'"), numbers="55C"),
    Fault("NaN as answer", GATED, lambda w: w.cell("answer", "nan"), ("train.csv", "line 3", "NaN", "--skip-bad"), numbers="23B"),
    Fault("empty answer", GATED, lambda w: w.cell("answer", "  "), ("train.csv", "line 3", "empty answer", "--skip-bad"), numbers="23B"),
    Fault("empty question", GATED, lambda w: w.cell("question", ""), ("train.csv", "line 3", "empty question"), numbers="23B"),
    Fault("empty answer in evaluation", GATED, lambda w: w.cell("answer", "", split="val"),
          ("val.csv", "line 3", "empty answer"), "eval", numbers="23B"),
    Fault("latin-1", GATED, lambda w: w.text(lambda t: t.replace("a boat", "Dürer", 1), encoding="latin-1"),
          ("train.csv", "line 2", "byte", "--encoding latin-1"), numbers="21B"),
    Fault("UTF-16", GATED, lambda w: w.text(lambda t: t, encoding="utf-16"), ("train.csv", "--encoding utf-16"), numbers="21B"),
    Fault("unknown encoding", GATED, None, ("klingon", "utf-8"), more=("--encoding", "klingon"), numbers="21B"),
    Fault("extra comma", GATED, lambda w: w.text(lambda t: t.replace("a boat", "a boat, red", 1)),
          ("line 2", "expected 6", "found 7"), numbers="22B"),
    Fault("open quote", GATED, lambda w: w.text(lambda t: t.replace("a boat", '"a boat', 1)), ("train.csv", "line 2", "quote"),
          numbers="22B"),
    Fault("column twice", GATED, lambda w: w.text(lambda t: t.replace("style\n", "answer\n", 1)),
          ("line 1", "'answer'", "twice"), numbers="22B"),
    Fault("wrong separator", GATED, None, ("train.csv", "image", "--columns"), more=("--separator", ";"), numbers="22B"),
    Fault("long separator", GATED, None, ("--separator", "one character"), more=("--separator", "::"), numbers="22B"),
    Fault("question_id twice", GATED, lambda w: w.cell("question_id", "12", split="val"),
          ("val.csv", "line 2", "line 3", "question_id 12"), "eval"),
    Fault("SemArt's column without SemArt", GATED, None, ("--style SCHOOL", "--semart"), more=("--style", "SCHOOL")),
    Fault("SemArt's column that is not there", GATED, semart("p0.png"), ("semart.csv", "'MOOD'", "SCHOOL"),
          more=("--style", "MOOD")),
    Fault("SemArt's table of other pictures", GATED, semart("other.jpg"), ("semart.csv", "IMAGE_FILE", "'other.jpg'", "same split"),
          more=("--style", "SCHOOL")),
    Fault("SemArt's table that is not there", GATED, None, ("semart_train.csv", "no such"),
          more=("--style", "SCHOOL", "--semart", ".")),
    Fault("context column that is not there", GATED, None, ("train.csv", "'wall_text'", "context"), more=("--context", "wall_text")),
    Fault("SemArt's context that is not there", GATED, semart("p0.png"), ("semart.csv", "'WALL'", "DESCRIPTION"),
          more=("--context", "WALL")),
    Fault("more bad rows than --skip-bad allows", GATED, lambda w: w.cell("answer", ""),
          ("train.csv", "1 of 12", "line 3", "1.0%", "--skip-bad 0.0"), more=("--skip-bad",), numbers="6A"),
    Fault("more broken pictures than --skip-bad allows", GATED, lambda w: (w.data / "images/p0.png").write_bytes(b"no picture"),
          ("train.csv", "2 of 12", "p0.png", "--skip-bad"), more=("--skip-bad", "0.1"), numbers="6A"),
    Fault("not one good row", GATED, lambda w: w.picture(b""), ("12 of 12", "0 bytes", "--images"), more=("--skip-bad", "1"), numbers="6A"),

    # BLIP-2, Q-Former, style classifier
    Fault("empty folder as BLIP-2", GATED, spoiled_blip2(lambda f: shutil.rmtree(f) or f.mkdir()),
          ("blip2", "config.json", "not a BLIP-2"), numbers="10A"),
    Fault("file as BLIP-2", GATED, lambda w: ["--blip2", w.beside("blip2", b"weights")], ("blip2", "folder"), numbers="10A"),
    Fault("BLIP-2 of another type", GATED, spoiled_blip2(json_of("config.json", lambda c: c.update(model_type="bert"))),
          ("blip2", "bert"), left="begun", numbers="10A"),
    Fault("folder of another network", GATED, other_network, ("blip2", "bert"), numbers="10A"),
    Fault("config.json is a page", GATED, spoiled_blip2(content_of("config.json", b"<!DOCTYPE html>")), ("blip2", "BLIP-2"), numbers="10A"),
    Fault("config.json with a number for its parts", GATED,
          spoiled_blip2(json_of("config.json", lambda c: c.update(vision_config=3))),
          ("blip2", "vision_config"), numbers="10A"),
    Fault("half of the weights", GATED, spoiled_blip2(lambda f: half(f / "model.safetensors")),
          ("model.safetensors", "incomplete", "of 2,0", "again"), numbers="10A"),
    Fault("LFS pointer as weights", GATED,
          spoiled_blip2(content_of("model.safetensors", POINTER)),
          ("model.safetensors", "git-lfs", "again"), numbers="10A"),
    Fault("page as weights", GATED, spoiled_blip2(content_of("model.safetensors", b"<!DOCTYPE html>")),
          ("model.safetensors", "web page", "again"), numbers="10A"),
    Fault("0 bytes of weights", GATED, spoiled_blip2(content_of("model.safetensors", b"")),
          ("model.safetensors", "0 bytes", "again"), numbers="10A"),
    Fault("no weights", GATED, spoiled_blip2(lambda f: (f / "model.safetensors").unlink()), ("blip2", "model.safetensors"), numbers="10A"),
    Fault("tensor that is missing", GATED, spoiled_blip2(without_tensor("qformer.layernorm.weight")),
          ("blip2", "1 tensors are missing", "qformer.layernorm.weight"), numbers="24B"),
    Fault("config of another width", GATED,
          spoiled_blip2(json_of("config.json", lambda c: c["qformer_config"].update(intermediate_size=64))),
          ("blip2", "intermediate_query"), numbers="24B"),
    Fault("tokenizer that is missing", GATED,
          spoiled_blip2(lambda f: [p.unlink() for p in f.iterdir() if p.suffix != ".safetensors"
                                                                     and p.name != "config.json"]), ("blip2",), numbers="10A"),
    Fault("tokenizer that is a page", GATED, spoiled_blip2(content_of("tokenizer.json", b"<!DOCTYPE html>")),
          ("blip2", "tokenizer"), numbers="10A"),
    Fault("BLIP-2 that is nowhere", GATED, None, ("no-such/model", "--blip2 tiny"), more=("--blip2", "no-such/model"), numbers="12A"),
    Fault("code in a BLIP-2 folder", GATED, code_in_blip2, ("blip2",), numbers="53C"),
    Fault("style classifier that is not there", GATED, None, ("nothing.pt", "no such"), more=("--efficientnet", "nothing.pt"),
          numbers="10A"),
    Fault("style classifier is a page", GATED, lambda w: ["--efficientnet", w.beside("e.pt", b"<!DOCTYPE html>")],
          ("e.pt", "web page", "again"), numbers="10A"),
    Fault("style classifier is cut", GATED,
          lambda w: ["--efficientnet", w.beside("e.pt", pathlib.Path(w.tiny[1]).read_bytes()[:200_000])],
          ("e.pt", "incomplete", "again"), numbers="10A"),
    Fault("style classifier of another network", GATED, b0_checkpoint, ("other.pt", "does not fit", "missing"), numbers="24B"),
    Fault("style classifier of an unknown network", GATED, unknown_arch, ("other.pt", "no_such_net"), numbers="24B"),
    Fault("code in a style classifier", GATED, lambda w: ["--efficientnet", hostile(w, w.folder / "e.pt")],
          ("e.pt", "mkdir", "--safe-load"),
          more=("--safe-load",), numbers="53C"),
    Fault("code in an old style classifier", GATED, lambda w: ["--efficientnet", hostile(w, w.folder / "e.pt", "old")],
          ("e.pt", "--safe-load"),
          more=("--safe-load",), numbers="53C"),
    Fault("code in a pickle as style classifier", GATED, lambda w: ["--efficientnet", hostile(w, w.folder / "e.pt", "pickle")],
          ("e.pt",),
          more=("--safe-load",), numbers="53C"),
    Fault("code in a style classifier in evaluation", GATED, lambda w: ["--efficientnet", hostile(w, w.folder / "e.pt")],
          ("e.pt", "--safe-load"), "eval", ("--safe-load",), numbers="53C"),
    Fault("code in a Q-Former", GATED, lambda w: ["--qformer", hostile(w, w.folder / "q.pth")], ("q.pth", "mkdir"), numbers="53C"),
    Fault("advice on code in a Q-Former", GATED, lambda w: ["--qformer", hostile(w, w.folder / "q.pth")],
          ("q.pth", "mkdir", "Q-Former"), numbers="53C"),
    Fault("Q-Former is a page", GATED, lambda w: ["--qformer", w.beside("q.pth", b"<!DOCTYPE html>")],
          ("q.pth", "web page", "again"), numbers="10A"),
    Fault("Q-Former from something else", GATED, lambda w: ["--qformer", w.tiny[1]],
          ("efficientnet.pt", "no Q-Former", "conv_stem"), numbers="24B"),
    Fault("Q-Former from a folder without one", GATED, lambda w: ["--qformer", str(w.data)], ("data", "no .safetensors"), numbers="24B"),

    # checkpoints of one's own
    Fault("checkpoint that is not there", GATED, lambda w: w.best.unlink(), ("best.pt", "no such checkpoint"), "eval"),
    *[Fault(f"{name} as best.pt", GATED, lambda w, content=content: w.best.write_bytes(content), ("best.pt", "damaged"), "eval",
          numbers="9A")
      for name, content in (("0 bytes", b""), ("page", b"<html>"), ("start of a zip file", b"PK\x03\x04"))],
    Fault("half of best.pt", GATED, lambda w: half(w.best), ("best.pt", "incomplete"), "eval", numbers="9A"),
    Fault("half of last.pt", GATED, lambda w: half(w.last), ("last.pt", "incomplete"), "resume", numbers="9A"),
    Fault("flipped bit in best.pt", GATED, lambda w: flip(w.best), ("best.pt", "changed"), "eval", numbers="52C"),
    Fault("flipped bit in last.pt", GATED, lambda w: flip(w.last), ("last.pt", "changed"), "resume", numbers="52C"),
    Fault("hole in best.pt", GATED, lambda w: hole(w.best), ("best.pt", "changed"), "eval", numbers="52C"),
    Fault("hole in last.pt", GATED, lambda w: hole(w.last), ("last.pt", "changed"), "resume", numbers="52C"),
    Fault("last.pt where best.pt belongs", GATED, lambda w: shutil.copy(w.last, w.best),
          ("best.pt", "not a checkpoint of this stage"), "eval", numbers="24B"),
    Fault("best.pt where last.pt belongs", GATED, lambda w: shutil.copy(w.best, w.last),
          ("last.pt", "not a checkpoint of this stage"), "resume", numbers="24B"),
    Fault("best.pt of other gates a head", GATED, built_otherwise(per="head"), ("best.pt", "does not fit", "--per"),
          "eval", numbers="24B"),
    Fault("best.pt of another gating", GATED, built_otherwise(gating="gate"), ("best.pt", "does not fit", "--gating"), "eval",
          numbers="24B"),
    Fault("best.pt of no gating", GATED, built_otherwise(gating="none", efficientnet=None), ("best.pt",), "eval", numbers="24B"),
    Fault("best.pt with LoRA that it has not", GATED, built_otherwise(lora_rank=2), ("best.pt",), "eval", numbers="24B"),
    Fault("best.pt of other styles", GATED, built_otherwise(styles=["Cubism"]), ("best.pt", "does not fit", "style_head"),
          "eval", numbers="24B"),
    Fault("best.pt of a version with other settings", GATED, built_otherwise(gate_depth=3), ("best.pt", "gate_depth"), "eval",
          numbers="24B"),
    Fault("--merge-lora without LoRA", GATED, None, ("--merge-lora", "--lora-rank"), "eval", ("--merge-lora", "merged.pt")),
    Fault("code in best.pt", GATED, lambda w: hostile(w, w.best) and None, ("best.pt", "mkdir"), "eval", numbers="53C"),
    *[Fault(f"code in best.pt ({kind})", GATED, lambda w, kind=kind: hostile(w, w.best, kind) and None, ("best.pt",), "eval", numbers="53C")
      for kind in ("old", "pickle")],
    *[Fault(f"code in last.pt ({kind})", GATED, lambda w, kind=kind: hostile(w, w.last, kind) and None, ("last.pt",), "resume",
          numbers="53C")
      for kind in ("zip", "old", "pickle")],
    Fault("resume with another gating", GATED, None, ("last.pt", "--gating is 'gate', was 'film'"), "resume",
          ("--gating", "gate"), numbers="41B"),
    Fault("resume with another batch size", GATED, None, ("--batch-size is 4, was 2", "another --out"), "resume",
          ("--batch-size", "4"), numbers="41B"),
    Fault("resume with another seed", GATED, None, ("--seed is 7, was 42", "another --out"), "resume", ("--seed", "7"), numbers="41B"),
    Fault("resume with several other settings", GATED, None, ("--seed is 7", "--epochs is 1"), "resume",
          ("--seed", "7", "--epochs", "1"), numbers="41B"),
    Fault("resume with another training row", GATED, lambda w: w.cell("answer", "a ship"), ("training rows", "another --out"),
          "resume", numbers="41B"),
    Fault("resume with another validation row", GATED, lambda w: w.cell("answer", "a ship", split="val"), ("validation rows",),
          "resume", numbers="41B"),
    Fault("resume with another style classifier", GATED,
          lambda w: edited(w.last, lambda content: content.update(frozen="0" * 16)),
          ("last.pt", "another BLIP-2 or style classifier"), "resume", numbers="41B"),

    # the run folder and the disk
    Fault("fresh run over old results", GATED, lambda w: w.copy_run(), ("run", "best.pt and last.pt", "--out", "--resume"), numbers="42B"),
    Fault("resume without last.pt over old results", GATED, lambda w: w.last.unlink(), ("run", "best.pt", "--out"), "resume",
          numbers="42B"),
    Fault("second run in a folder", GATED, in_use, ("run", f"process {os.getpid()}", "choose another"), numbers="42B"),
    Fault("run folder below a file", GATED, lambda w: ["--out", w.beside("file", b"") + "/run"],
          ("file/run", "cannot be written"), numbers="59C"),
    Fault("run folder is a file", GATED, lambda w: w.run.write_bytes(b"") and None, ("run", "cannot be written"), numbers="59C"),
    Fault("disk too small", GATED, lambda w: w.patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6)),
          ("run", "MB are needed", "1 MB are free"), left="begun", numbers="17A"),
    Fault("disk full at best.pt", GATED, no_rename("best.pt"),
          ("best.pt", "could not be saved", "No space left", "--save-last"), left="begun", numbers="17A"),
    Fault("disk full at last.pt of a resumed run", GATED, no_rename("last.pt"), ("last.pt", "could not be saved", "untouched"),
          "resume", left="begun", numbers="17A"),
    Fault("disk full within best.pt", GATED, small_files(300_000), ("best.pt", "could not be saved", "disk"), left="begun", numbers="17A"),
    Fault("disk full at the log", GATED,
          fails(runfolder.RunLog, "write", OSError(28, "No space left on device", "training_log.csv")),
          ("training_log.csv", "No space left"), left="begun", numbers="17A"),
    Fault("disk full at the predictions", GATED, lambda w: no_rename("p.json")(w) or ["--predictions", str(w.folder / "p.json")],
          ("p.json", "No space left"), "eval", numbers="17A"),
    Fault("predictions below a file", GATED, lambda w: ["--predictions", w.beside("file", b"") + "/p.json"], ("file/p.json",),
          "eval", numbers="59C"),
    Fault("table below a file", GATED, lambda w: ["--table", w.beside("file", b"") + "/t.json"], ("file/t.json",), "eval", numbers="59C"),
    Fault("predictions not in .json", GATED, None, ("--predictions p.csv", ".json"), "eval", ("--predictions", "p.csv")),

    # memory, numbers, processes
    Fault("GPU memory runs out", GATED,
          fails(core.Blip2OPTGated, "forward", MEMORY),
          ("out of memory", "Tried 2 GiB", "--batch-size 2", "--precision"), left="begun", numbers="1A"),
    Fault("memory runs out", GATED, fails(core.Blip2OPTGated, "forward", MemoryError()), ("out of memory", "--batch-size 2"),
          left="begun", numbers="1A"),
    Fault("the allocator of the CPU fails", GATED, fails(core.Blip2OPTGated, "forward", ALLOCATOR),
          ("out of memory", "9 bytes", "--batch-size 2"), left="begun", numbers="1A"),
    Fault("memory runs out in evaluation", GATED,
          fails(core.Blip2OPTGated, "predict_answers", torch.OutOfMemoryError("Tried 2 GiB")),
          ("out of memory", "--batch-size 64"), "eval", numbers="33B"),
    Fault("memory runs out while loading", GATED, fails(core.Blip2OPTGated, "build", MemoryError()), ("out of memory", "of this machine"),
          numbers="26B"),
    Fault("loss is NaN", GATED, None, ("loss is nan", "step 0", "line", "--lr"), more=("--hit-weight", "nan"), left="begun", numbers="5A"),
    Fault("gradient is NaN", GATED, nan_gradient, ("gradient is nan", "step 0", "line", "best.pt and last.pt are as they were"),
          left="begun", numbers="5A"),
    Fault("gradient is NaN in a resumed run", GATED, nan_gradient, ("gradient is nan", f"step {STEPS + 2}", "line"), "resume",
          left="begun", numbers="5A"),
    Fault("validation is NaN", GATED, nan_validation, ("validation loss was never finite", "--lr"), left="begun", numbers="45B"),
    Fault("loader process is killed", GATED, dying_loader, ("loader process", "--workers 0", "/dev/shm", ".png (line"),
          more=("--workers", "1"), left="begun", numbers="11A"),
    Fault("loader process is killed in evaluation", GATED, dying_loader, ("loader process", "--workers 0", "/dev/shm"), "eval",
          ("--workers", "1"), numbers="11A"),
    Fault("Ctrl-C before the first step", GATED, fails(core.Blip2OPTGated, "build", KeyboardInterrupt()), ("interrupted",),
          code=130, numbers="32B"),

    # flags
    *[wrong_flag(flag, "False", "unrecognized arguments: False", numbers="19A")  # argparse names the stray word, not the flag
      for flag in ("--train-qformer", "--save-last", "--resume", "--safe-load", "--check-data")],
    wrong_flag("--no-baselines", "False", "unrecognized arguments: False", numbers="19A", command="eval"),
    *[wrong_flag(flag, value, flag, value) for flag, value in (
        ("--gating", "tanh"), ("--epochs", "0"), ("--batch-size", "-4"), ("--batch-size", "many"), ("--lr", "fast"),
        ("--skip-bad", "3"), ("--accumulation", "1.5"), ("--max-answer", "0"), ("--precision", "int8"))],
    *[wrong_flag(flag, value)
      for flag, value in (
        ("--lr", "-1"), ("--lr", "nan"), ("--workers", "-1"), ("--seed", "-1"), ("--lora-rank", "-1"), ("--gate-scale", "0"))],
    *[wrong_flag(flag, value) for flag, value in (("--warmup", "-3"), ("--weight-decay", "-1"))],
    wrong_flag("--config", "nothing.yaml", "--config", "nothing.yaml"),
    wrong_flag("--beams", "0", command="eval"),
    wrong_flag("--workers", "-1", command="eval"),
]


def test_names_of_entries_are_distinct():
    refuse_twins(FAULTS)


@pytest.fixture
def world(make_world):
    """The World of one test, with the current folder in it."""
    return make_world(Gated)


@pytest.mark.parametrize("entry, kind", cases(FAULTS))
@pytest.mark.filterwarnings("ignore")
def test_fault(entry, kind, make_world, capsys):
    """One line, the right code, nothing run, nothing changed."""
    check(entry, make_world(kind), capsys)


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in FAULTS if entry.numbers == "53C"])
@pytest.mark.filterwarnings("ignore")
def test_code_never_runs(entry, world):
    """53C, whatever is said of it; the same code does run where pickle is let loose."""
    argv = spoil(entry, world)
    with contextlib.suppress(Exception):
        exit_code(entry, world, argv)
    assert not world.mark.exists()
    pickle.loads(pickle.dumps(Hostile(world.mark)))
    assert world.mark.exists()


# --- checkpoints: every bit ------------

def flips_refused(path, content, places):
    """How many of the flipped bits (byte, bit) are refused in one line; every other must leave what is loaded as it was."""
    whole, refused = path.read_bytes(), 0
    for byte, bit in places:
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ (1 << bit)]) + whole[byte + 1:])
        try:
            found = checkpoints.load_checkpoint(path)
            assert torch.equal(found.pop("tensor"), content["tensor"]) and found == {"step": 3}, (byte, bit)
        except errors.DataError as error:
            assert len(str(error).splitlines()) == 1 and path.name in str(error)
            refused += 1
    return refused


@pytest.fixture
def small_checkpoint(tmp_path):
    content = {"tensor": torch.arange(6.0), "step": 3}
    checkpoints.save_checkpoint(tmp_path / "best.pt", content)
    return tmp_path / "best.pt", content


def test_any_flipped_bit_is_refused_or_harmless(small_checkpoint):
    """52C. A checkpoint so small that each of its bytes can be tried."""
    path, content = small_checkpoint
    assert flips_refused(path, content, [(byte, byte % 8) for byte in range(0, path.stat().st_size, 2)]) > 100


def test_any_flipped_bit_of_the_directory_is_refused_or_harmless(small_checkpoint):
    """52C. Every bit of the 46 bytes in which the zip file describes the tensor."""
    path, content = small_checkpoint
    start = path.read_bytes().rfind(b"PK\1\2", 0, path.read_bytes().rfind(b"archive/data/0"))
    assert flips_refused(path, content, [(start + n // 8, n % 8) for n in range(46 * 8)]) > 100


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_is_trained_is_float32_and_small_steps_move_it(build, batch, precision):
    """15A and 44B."""
    model = build(dtype=core.DTYPES[precision], train_qformer=True, lora_rank=2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert next(model.language_model.parameters()).dtype == core.DTYPES[precision]
    model(**batch, hit_weight=0.1, kl_weight=0.05)["loss"].backward()
    before = {name: p.detach().clone() for name, p in trained.items() if p.grad.any()}
    loop.make_optimizer(model, 1e-5, 0.01).step()
    assert len(before) > 20 and [name for name, was in before.items() if torch.equal(was, trained[name])] == []


@pytest.mark.parametrize("more", [("--kl-weight", "0"), ("--kl-weight", "0", "--hit-weight", "0"), ("--gating", "none"),
                                  ("--gating", "gate"), ("--train-qformer",), ("--lora-rank", "2"), ("--style", "none")])
def test_every_trained_parameter_gets_a_gradient(world, more):
    """25B. None of them may be unused, or several processes would wait for each other."""
    run, parts = prepared(train_gated.get_args(world.train(*more)))
    train_gated.train_step(run, run.rehearsal(parts.collate([parts.train[n] for n in range(4)]), [0, 1, 2, 3]), parts.weights)
    assert [name for name, p in run.model.named_parameters() if p.requires_grad and p.grad is None] == []


# --- memory and processes ------------

def test_longest_batches_are_rehearsed_first(world, monkeypatch):
    """1A and 33B."""
    for split, line in (("train", 8), ("val", 4)):
        world.cell("question", "Which of the many boats is red? " * 9, line, split)
    seen = []
    monkeypatch.setattr(train_gated, "train_step", lambda run, step, weights: seen.append([r.line for r in run.rows_of(step.group)]))
    monkeypatch.setattr(train_gated, "validate", lambda run, parts, data, args: seen.append([row.line for row in data.rows]))
    monkeypatch.setattr(Run, "epochs", lambda *args: ())
    train_gated.train(train_gated.get_args(world.train("--eval-batch-size", "2")))
    assert len(seen) == 2 and 8 in seen[0] and 4 in seen[1] and len(seen[0]) == len(seen[1]) == 2


def loader_dies(world, slow):
    """Train with a loader process that dies at the fifth batch; slow: "loader", the main process waits for it then, or "step", it
    is within a step."""
    read, forward = train_gated.Questions.__getitem__, core.Blip2OPTGated.forward
    fifth = prepared(train_gated.get_args(world.train()))[0].plan(0)[4][0]

    def killed(questions, key):
        if get_worker_info() and len(questions) == 12 and key in [(0, n) for n in fifth]:  # (epoch, number)
            time.sleep(slow == "loader")
            os.kill(os.getpid(), signal.SIGKILL)
        return read(questions, key)

    def slow_forward(*args, **kwargs):
        until = time.monotonic() + 0.5 * (slow == "step")
        while time.monotonic() < until:
            time.sleep(0.01)
        return forward(*args, **kwargs)

    world.patch.setattr(train_gated.Questions, "__getitem__", killed)
    world.patch.setattr(core.Blip2OPTGated, "forward", slow_forward)
    return errors.exit_code(train_gated.main, world.train("--workers", "1"))


@pytest.mark.parametrize("slow", ["loader", "step"])
def test_loader_that_dies_is_one_line_and_the_steps_before_are_kept(world, capsys, slow):
    """11A: one line, and the state is saved."""
    assert loader_dies(world, slow) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if ERROR.match(line)] == lines[-1:] and "--workers 0" in lines[-1]
    assert 2 <= checkpoints.load_checkpoint(world.last)["step"] <= 4  # the loader reads two batches ahead


def test_second_signal_leaves_at_once():
    """32B."""
    child = os.fork()
    if child == 0:
        with loop.StopSignal():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_lock_of_a_killed_process_does_not_block(tmp_path):
    """42B."""
    child = os.fork()
    if child == 0:
        with runfolder.folder_lock(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run/.owner").exists()
    with runfolder.folder_lock(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run/.owner").read_text()
    assert not (tmp_path / "run").exists()  # nothing was written in it


def test_end_of_a_run_does_not_unlock_the_next(tmp_path, monkeypatch):
    """42B."""
    import filelock
    following, release = filelock.FileLock(tmp_path / ".lock"), filelock.FileLock.release

    def release_to_following(lock, *args, **kwargs):
        release(lock, *args, **kwargs)
        if lock is not following:
            following.acquire(timeout=0)

    with monkeypatch.context() as patch:
        patch.setattr(filelock.FileLock, "release", release_to_following)
        with runfolder.folder_lock(tmp_path):
            pass
    with contextlib.closing(SimpleNamespace(close=following.release)), pytest.raises(errors.DataError, match="in use"):
        with runfolder.folder_lock(tmp_path):
            pass


def test_loaders_can_be_spawned(finished, tiny):
    """40B: as on Windows and macOS."""
    data, collate = pickle.loads(pickle.dumps(questions_and_collate(finished, tiny)))
    loader = loaders.load_batches(data, collate, [[0, 5]], 1)
    loader.multiprocessing_context = "spawn"
    (batch,), expected = list(loader), collate([data[0], data[5]])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in expected)


def questions_and_collate(finished, tiny):
    args = train_gated.get_args(["--data", str(finished[Gated] / "data")])
    return (train_gated.Questions(train_gated.read_data(args, "train"), make_tiny.RANDOM_SIZE),
            train_gated.Collate(published.load_tokenizer(tiny[0]), ["Cubism", "Pop Art"], 16))


def test_pictures_leave_no_file_open(finished, tiny):
    """39B."""
    data, _ = questions_and_collate(finished, tiny)
    before = len(os.listdir("/proc/self/fd"))
    kept = [data[n] for n in range(len(data))]
    assert len(kept) == 12 and len(os.listdir("/proc/self/fd")) == before


# --- numbers and resuming ------------

def test_nan_is_never_better():
    """45B."""
    for lowest in (True, False):
        for best in (None, 0.5):
            assert not loop.is_better(float("nan"), {"value": best}, lowest)
    assert not loop.is_better(float("inf"), {"value": None}, lowest=True)
    assert loop.is_better(0.4, {"value": 0.5}, lowest=True) and not loop.is_better(0.6, {"value": 0.5}, lowest=True)
    assert loop.is_better(0.6, {"value": 0.5}) and not loop.is_better(0.4, {"value": 0.5})


def test_nan_epoch_leaves_best_as_it_was(world):
    """45B."""
    world.copy_run()
    before = world.best.read_bytes()
    nan_validation(world)
    assert errors.exit_code(train_gated.main, world.resume()) == 0
    assert world.best.read_bytes() == before and checkpoints.load_checkpoint(world.last)["marks"]["epoch"] == 1


def test_moved_run_goes_on_and_reads_only_what_is_left(finished, tiny, tmp_path, monkeypatch, capsys):
    """50B and 47B: data and run folder lie elsewhere than in training."""
    world = Gated(tmp_path / "elsewhere", finished[Gated], monkeypatch)
    world.copy_run()
    monkeypatch.chdir(tmp_path)
    reads, read = [], train_gated.Questions.__getitem__

    def counted(questions, index):
        reads.append(index) if len(questions) == 12 else None
        return read(questions, index)

    monkeypatch.setattr(train_gated.Questions, "__getitem__", counted)
    assert eval_gated.main(world.eval()) is None and "gated" in capsys.readouterr().out
    assert train_gated.main(world.resume("--out", "elsewhere/run", "--data", "elsewhere/data")) is None
    assert checkpoints.load_checkpoint(world.last)["step"] == 2 * STEPS
    assert len(reads) == 2 + (STEPS - 2) * 2  # the rehearsal, and the four steps that were left
    monkeypatch.setattr(train_gated.Questions, "__getitem__", read)
    plan = prepared(train_gated.get_args(world.train()))[0].plan(1)
    assert reads[2:] == [(1, n) for group, _ in plan[2:] for n in group]  # of the second epoch


def test_answers_stay_text(world, finished, tmp_path):
    """20A: to the very end, the table of predictions."""
    answers = ["None", "NA", "007", "True"]
    for line, answer in enumerate(answers, 2):
        world.cell("answer", answer, line, "val")
    argv = ["--checkpoint", str(finished[Gated] / "run/best.pt"), *world.eval("--predictions", str(tmp_path / "p.json"))[2:]]
    assert eval_gated.main(argv) is None
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == answers


def test_version_out_of_range_is_named_at_the_start(monkeypatch, capsys):
    """2A."""
    assert environment.note_versions() == []
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.13.1" if name == "torch" else version(name))
    assert errors.exit_code(train_gated.main, ["--data", "no/such"]) == 2
    assert "note: torch 1.13.1: tested with <3,>=2.9\n" in capsys.readouterr().err


# --- the sixty ------------

COVERED = {
    "1A": ["GPU memory runs out", "memory runs out", "the allocator of the CPU fails",
            "test_longest_batches_are_rehearsed_first"],
    "2A": ["test_version_out_of_range_is_named_at_the_start"],
    "3A": ["image that is not there", "image of another machine", "test_missing_image_names_the_nearest", "test_usable_rows"],
    "4A": ["test_run_folder"],
    "5A": ["loss is NaN", "gradient is NaN", "gradient is NaN in a resumed run", "test_non_finite_loss_stops_with_the_rows"],
    "6A": ["cut picture", "more broken pictures than --skip-bad allows", "test_check_data",
            "test_broken_image_is_one_line_or_skipped"],
    "7A": ["test_killed_and_resumed_equals_undisturbed", "test_interrupted_and_resumed_equals_undisturbed"],
    "8A": ["test_batched_answers_equal_one_at_a_time", "test_generation_equals_transformers_generate"],
    "9A": ["test_killed_and_resumed_equals_undisturbed", "half of best.pt", "half of last.pt"],
    "10A": ["half of the weights", "LFS pointer as weights", "page as weights", "style classifier is cut", "Q-Former is a page"],
    "11A": ["loader process is killed", "test_loader_that_dies_is_one_line_and_the_steps_before_are_kept"],
    "12A": ["BLIP-2 that is nowhere"],
    "13A": ["test_modes", "test_lossy_modes", "test_palette", "test_sixteen_bit_is_scaled_not_clipped",
            "test_first_frame_of_an_animation"],
    "14A": ["test_packed_precisions_need_bitsandbytes"],
    "15A": ["test_what_is_trained_is_float32_and_small_steps_move_it"],
    "16A": ["test_import_is_light", "test_longest_batches_are_rehearsed_first", "test_eval_needs_only_the_checkpoint"],
    "17A": ["disk too small", "disk full at best.pt", "disk full at last.pt of a resumed run", "disk full within best.pt",
            "test_failed_save_leaves_the_old_file"],
    "18A": ["test_two_processes_equal_one", "test_evaluation_scores_every_row_once_whatever_the_batch"],
    "19A": ["train --train-qformer False", "test_config_mistakes"],
    "20A": ["test_answers_stay_text", "test_values_stay_text"],
    "21B": ["latin-1", "UTF-16", "test_encodings_and_bom", "test_bad_table"],
    "22B": ["extra comma", "open quote", "column twice", "0 bytes of table", "header without rows", "test_bad_table"],
    "23B": ["empty answer", "NaN as answer", "test_long_questions_keep_the_end_of_the_prompt"],
    "24B": ["best.pt of other gates a head", "last.pt where best.pt belongs", "tensor that is missing",
            "test_known_shapes_load_without_running_anything"],
    "25B": ["test_every_trained_parameter_gets_a_gradient"],
    "26B": ["memory runs out while loading"],
    "27B": "bounded: rows are a list of small objects, at most one copy of it a loader process, and no epoch adds to it",
    "28B": "no loader draws a random number, and dropout is in the main process (test_epoch_plan_is_pure_and_complete)",
    "29B": ["test_frozen_parts_stay_frozen"],
    "30B": ["test_activations_are_smaller_and_gradients_the_same_to_the_bit"],
    "31B": ["test_interrupted_and_resumed_equals_undisturbed", "test_loader_processes_do_not_keep_a_failed_run_from_ending"],
    "32B": ["test_interrupted_and_resumed_equals_undisturbed", "test_second_signal_leaves_at_once",
            "Ctrl-C before the first step"],
    "33B": ["test_longest_batches_are_rehearsed_first", "memory runs out in evaluation"],
    "34B": ["test_a_changed_picture_is_made_again_and_only_that", "test_what_else_the_features_depend_on_is_another_store"],
    "35B": ["test_killed_while_writing", "test_killed_from_outside_with_loaders", "test_rows_cut_short"],
    "36B": "the stages with --cache have no augmentation, and that with augmentation (train_blip_caption.py) has no --cache",
    "37B": ["test_exif_rotation"],
    "38B": ["test_name_matches_but_for_case_form_and_spaces", "test_exact_name_wins_and_several_are_an_error"],
    "39B": ["test_pictures_leave_no_file_open"],
    "40B": ["test_loaders_can_be_spawned"],
    "41B": ["resume with another batch size", "resume with another seed", "resume with another training row",
            "resume with several other settings"],
    "42B": ["second run in a folder", "fresh run over old results", "test_lock_of_a_killed_process_does_not_block",
            "test_end_of_a_run_does_not_unlock_the_next"],
    "43B": "rank 0 alone only writes: seconds, and others wait 10 minutes; scoring is shared (test_two_processes_equal_one)",
    "44B": ["test_what_is_trained_is_float32_and_small_steps_move_it"],
    "45B": ["test_nan_is_never_better", "test_nan_epoch_leaves_best_as_it_was", "validation is NaN"],
    "46B": ["test_the_loss_sees_the_answer_and_only_the_answer", "test_prompt_equals_transformers_tokenisation",
            "test_check_data_says_what_the_language_model_gets"],
    "47B": ["test_moved_run_goes_on_and_reads_only_what_is_left"],
    "48B": ["test_interrupted_and_resumed_equals_undisturbed"],
    "49B": ["test_killed_and_resumed_equals_undisturbed"],
    "50B": ["test_moved_run_goes_on_and_reads_only_what_is_left"],
    "52C": ["flipped bit in best.pt", "hole in last.pt", "test_any_flipped_bit_is_refused_or_harmless",
            "test_any_flipped_bit_of_the_directory_is_refused_or_harmless"],
    "53C": ["test_code_never_runs", "code in best.pt", "code in last.pt (zip)", "code in a style classifier",
            "code in a Q-Former", "code in a BLIP-2 folder"],
    "54C": ["picture that is a bomb", "test_bomb_is_refused_from_the_header"],
    "55C": ["picture above the root", "absolute picture", "picture that is a link out of the root", "picture that is a URL",
            "NUL in a name",
            "device as picture", "test_path_is_refused"],
    "59C": ["run folder below a file", "run folder is a file", "predictions below a file"],
}


def test_every_fault_of_classes_a_and_b_is_covered():
    assert {f"{n}A" for n in range(1, 21)} | {f"{n}B" for n in range(21, 51)} <= set(COVERED)
    refuse_unknown(COVERED, FAULTS)
    numbered = {entry.numbers for entry in FAULTS} - {""}
    assert numbered <= set(COVERED) and {number for number in numbered if isinstance(COVERED[number], str)} == set()
