"""pytest tests/test_other_faults.py: test_faults.py's question put to efficientnet_pretrain.py and train_blip_caption.py.

What goes wrong for users costs them one line and nothing on the disk. Behaviour-checked. FAULTS is one table, run by faults.py,
and COVERED names for every kind of bad input that the gated stage refuses where it is tested
for these two scripts: here, in their own files, or in a file of what they share.
"""

import json
import os
import pathlib
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import get_worker_info

import conftest  # noqa: F401  (sets the import path)
import efficientnet_pretrain as pretrain
import metrics
import train_blip_caption as blip
from data import rows, wikiart
from engine import captioning, checkpoints, loop, runfolder
from tools import make_tiny
import test_blip_caption
import test_efficientnet_pretrain
from faults import (ALLOCATOR, MEMORY, POINTER, WITHOUT_JINJA2, Fault, World, cases, check, configs, content_of, edited, fails, flip,
                    half, hole, hostile, hostile_bin, in_the_drawing, in_use, json_of, link, no_rename, on_script, other_checkpoint,
                    refuse_twins, refuse_unknown, small_files, without_module, without_tensor, wrong_flag)
from test_rows import bomb

# --- a small world for each script: data, a run that was interrupted in its second epoch ------------

class Styles(World):
    script, list_name, first_name, ending, place = pretrain, "style_train.csv", "Cubism/p0.jpg", "jpg", ".jpg (line "

    @property
    def picture(self):
        return self.data / self.first_name

    def train(self, *more):
        return test_efficientnet_pretrain.flags(self.data, self.run, *more)


class Captioning(World):
    script, list_name, first_name, ending, place = blip, "train_captions.json", "t0.png", "png", ".png (row "

    @property
    def picture(self):
        return self.data / "images" / self.first_name

    def train(self, *more):
        return ["--data", str(self.data), "--blip", str(self.finished / "blip"), "--epochs", "2", "--batch-size", "2", "--lr",
                "1e-3", "--workers", "0", "--precision", "no", "--out", str(self.run), *more]

    def score(self, *more):
        return ["--data", str(self.data), "--checkpoint", str(self.best), "--workers", "0", *more]

    def zero(self, *more):
        return self.train("--zero-shot", *more)

    def caption(self, *more):
        return ["--caption", str(self.data / "images/v0.png"), "--checkpoint", str(self.best), "--workers", "0", *more]


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """One thread; captions of at most six tokens (random weights never end one); no WordNet, no curves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_wordnet", lambda: None)
        metrics._meteor_helpers.cache_clear()
        patch.setitem(blip.GENERATION, "max_length", 6)
        patch.setitem(blip.GENERATION, "num_beams", 1)
        patch.setattr(runfolder, "draw_curves", lambda *args: None)
        yield
    metrics._meteor_helpers.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{kind of World: folder with data/ and run/}; runs that were interrupted after the first step of the second epoch."""
    folders = {kind: tmp_path_factory.mktemp(kind.__name__) for kind in (Styles, Captioning)}
    test_efficientnet_pretrain.make_artgan(folders[Styles] / "data")
    test_blip_caption.make_data(folders[Captioning] / "data")
    loop.seed_everything(0)
    shutil.move(make_tiny.save_random_captioner(folders[Captioning] / "m", test_blip_caption.TEXTS),
                folders[Captioning] / "blip")
    for kind, folder in folders.items():
        with pytest.MonkeyPatch.context() as patch:
            world = SimpleNamespace(data=folder / "data", run=folder / "run", finished=folder)
            step = kind.script.train_step

            def interrupt(run, *args, step=step):
                if run.step == run.per_epoch:
                    os.kill(os.getpid(), signal.SIGINT)
                return step(run, *args)

            patch.setattr(kind.script, "train_step", interrupt)
            assert kind.script.main(kind.train(world, "--save-last")) == 130
        assert checkpoints.load_checkpoint(folder / "run/last.pt")["marks"]["done"] == 1 and (folder / "run/best.pt").exists()
    return folders


# --- faults, each a function of the world; what it returns is added to the command ------------

BOTH, STYLES, CAPTIONS = (Styles, Captioning), (Styles,), (Captioning,)


def two_alike(world):
    """Two files whose names differ in case only; the list names neither exactly."""
    shutil.copy(world.picture, world.picture.with_name("Z0." + world.ending))
    world.picture.rename(world.picture.with_name("z0." + world.ending.upper()))
    world.first(world.first_name.replace(world.picture.name, "z0." + world.ending))


def plain_folders(world, name="one.jpg"):
    """--data with two STYLE/ folders alone, each of a single picture."""
    for n in range(2):
        test_efficientnet_pretrain.picture(world.folder / f"plain/S{n}" / "0.jpg")
        os.rename(world.folder / f"plain/S{n}/0.jpg",
                  os.path.join(os.fsencode(world.folder / f"plain/S{n}"), os.fsencode(name)))
    return ["--data", str(world.folder / "plain")]


def table(text):
    """--data is a table of subsets."""
    return lambda world: ["--data", world.beside("classes.csv", text.encode())]


def captions(content, split="train"):
    """A file of captions that holds this."""
    def harm(world):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (world.data / f"{split}_captions.json").write_bytes(text)
    return harm


def init(name, content):
    return lambda world: ["--init", world.beside(name, content)]


def init_of(arch, name="i.pt", spoil=lambda path: None):
    """--init with the weights of this net, spoiled."""
    def harm(world):
        import timm
        state = timm.create_model(arch, num_classes=3).state_dict()
        (save_file if name.endswith("safetensors") else torch.save)(state, world.folder / name)
        spoil(world.folder / name)
        return ["--init", str(world.folder / name)]
    return harm


def spoiled_blip(change):
    """--blip of a copy on which change(folder) was called."""
    def harm(world):
        folder = pathlib.Path(shutil.copytree(world.finished / "blip", world.folder / "blip"))
        change(folder)
        return ["--blip", str(folder)]
    return harm


def code_in_blip(world):
    return spoiled_blip(lambda folder: hostile_bin(world, folder))(world)


def of_style(place):
    return lambda world: shutil.copy(world.others[Styles] / "run/best.pt", getattr(world, place))


def forward_fails(error):
    """The model's forward pass raises `error`."""
    def harm(world):
        from transformers import BlipForConditionalGeneration
        import timm
        net = timm.models.EfficientNet if isinstance(world, Styles) else BlipForConditionalGeneration
        fails(net, "forward", error)(world)
    return harm


def not_finite(what):
    """The loss or the gradient is NaN."""
    def harm(world):
        from transformers import BlipForConditionalGeneration
        import timm
        net = timm.models.EfficientNet if isinstance(world, Styles) else BlipForConditionalGeneration
        forward = net.forward

        def poisoned(model, *args, **kwargs):
            found = forward(model, *args, **kwargs)
            value = found if isinstance(world, Styles) else found.loss
            if what == "loss":
                value.data.fill_(float("nan"))
            elif torch.is_grad_enabled():
                value.register_hook(lambda gradient: gradient * float("nan"))
            return found
        world.patch.setattr(net, "forward", poisoned)
    return harm


def nan_validation(world):
    if isinstance(world, Styles):
        validate = pretrain.validate
        def no_number(*args):
            numbers, confusion = validate(*args)
            return {**numbers, "f1": float("nan")}, confusion
        world.patch.setattr(pretrain, "validate", no_number)
    else:
        world.patch.setattr(blip, "summarize", lambda results, data: {"score": float("nan")})


def dying_loader(world):
    """The loader process is killed, as the kernel does when memory runs out."""
    data = pretrain.Paintings if isinstance(world, Styles) else blip.Captions
    read = data.__getitem__

    def killed(self, index):
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)
    world.patch.setattr(data, "__getitem__", killed)


FAULTS = [
    # data
    Fault("data folder that is not there", CAPTIONS, lambda w: shutil.rmtree(w.data), ("data", "--data")),
    Fault("captions that are not there", CAPTIONS, lambda w: w.list.unlink(), ("train_captions.json", "--data")),
    Fault("0 bytes of a list", BOTH, lambda w: w.text(lambda t: ""), ("LIST", "empty")),
    Fault("blank list", STYLES, lambda w: w.text(lambda t: "\n \n"), ("style_train.csv", "empty")),
    Fault("validation list without rows", STYLES, lambda w: (w.data / "style_val.csv").write_bytes(b"\n"),
          ("style_val.csv", "empty")),
    Fault("no validation captions", CAPTIONS, captions({}, "val"), ("val_captions.json", "no captions")),
    Fault("validation folder without pictures", STYLES,
          lambda w: plain_folders(w) and [(w.folder / f"t/{s}/A").mkdir(parents=True) for s in ("train", "val")]
          and shutil.copy(w.data / w.first_name, w.folder / "t/train/A") and ["--data", str(w.folder / "t")],
          ("t/val", "no STYLE/ folder", "--data")),
    Fault("no style with a second picture", STYLES, plain_folders, ("plain", "nothing can be held out")),
    Fault("--images with a folder per style", STYLES, plain_folders, ("plain", "--images", "leave"),
          more=("--images", ".")),
    Fault("file name that is not UTF-8", STYLES, lambda w: plain_folders(w, b"caf\xe9.jpg"),
          ("plain/S0", r"caf\udce9.jpg", "rename")),
    Fault("folder name that is not UTF-8", STYLES, lambda w: plain_folders(w)
          + [os.rename(w.folder / "plain/S0", os.fsencode(w.folder / "plain") + b"/S\xe9")][:0], (r"plain/S\udce9", "rename")),
    Fault("photograph whose name is not UTF-8", STYLES,
          lambda w: plain_folders(w, b"caf\xe9.jpg") and ["--photos", str(w.folder / "plain")],
          ("plain/S", r"caf\udce9.jpg", "rename")),
    Fault("broken.txt that is not UTF-8", STYLES, lambda w: (w.data / "broken.txt").write_bytes(b"caf\xe9.jpg\tx\n"),
          ("broken.txt", "--check-data")),
    Fault("three fields", STYLES, lambda w: w.text(lambda t: t.replace(",0", ",0,0", 1)), ("style_train.csv", "line 1")),
    Fault("ragged row", STYLES, table("filename,subset\nA/b.jpg,train\nA/c.jpg\n"), ("classes.csv", "line 3", "expected 2")),
    Fault("open quote", STYLES, lambda w: w.text(lambda t: '"' + t), ("style_train.csv", "line 1", "quote")),
    Fault("wrong separator", STYLES, table("filename,subset\nA/b.jpg,train\n"), ("classes.csv", "'filename'"),
          more=("--separator", ";")),
    Fault("long separator", STYLES, None, ("--separator", "one character"), more=("--separator", "::")),
    Fault("rows without image_id", CAPTIONS, captions([{"file": "t0.png", "caption": "a"}]), ("train_captions.json",)),
    Fault("captions of another form", CAPTIONS, captions({"annotations": 3}), ("train_captions.json",)),
    Fault("key twice", CAPTIONS, captions(b'{"t0.png": "a", "t0.png": "b"}'), ("train_captions.json", "'t0.png'", "twice")),
    Fault("half a character", CAPTIONS, captions(b'{"t0.png": "\\ud83d"}'),
          ("train_captions.json", "t0.png", "half a character")),
    Fault("latin-1", BOTH, lambda w: w.text(lambda t: t.replace(w.first_name, "D\u00fcrer.jpg", 1), "latin-1"),
          ("LIST", "line 1", "byte", "--encoding latin-1")),
    Fault("UTF-16", BOTH, lambda w: w.text(lambda t: t, "utf-16"), ("LIST", "--encoding utf-16")),
    Fault("unknown encoding", BOTH, None, ("klingon", "utf-8"), more=("--encoding", "klingon")),
    Fault("more shots than pictures", CAPTIONS, None, ("train_captions.json", "--shots 10 of 9"), more=("--shots", "10")),

    # pictures
    Fault("absolute picture", BOTH, lambda w: w.first("/tmp/x.png"), ("LIST", "'/tmp/x.png'", "absolute", "--images")),
    Fault("picture that is a URL", BOTH, lambda w: w.first("https://example.org/a.png"), ("LIST", "URL", "--images")),
    Fault("NUL in a name", STYLES, lambda w: w.first("Cubism/p\0.jpg"), ("style_train.csv", "line 1", "NUL")),
    Fault("NUL in a key", CAPTIONS, lambda w: w.first(r"p\u0000.png"), ("train_captions.json", "row 1", "NUL")),
    Fault("picture that is a link out of the root", BOTH, link(lambda w: w.beside("secret.png", b"x")), ("LIST", "leaves")),
    Fault("device as picture", BOTH, link(lambda w: "/dev/zero"), ("LIST", "leaves")),
    Fault("folder as picture", BOTH, lambda w: w.first(str(pathlib.Path(w.first_name).parent) + "/.") if isinstance(w, Styles)
          else (w.data / "images/d").mkdir() or w.first("d"), ("LIST", "regular file")),
    Fault("two pictures of almost one name", BOTH, two_alike, ("LIST", "z0.", "name it exactly")),
    Fault("cut pictures", BOTH, lambda w: w.pictures(next(w.data.rglob("*.*g")).read_bytes()[:200]), ("LIST", "replace it"),
          left="begun"),
    Fault("pages instead of pictures", BOTH, lambda w: w.pictures(b"<!DOCTYPE html>"), ("LIST", "<!DOCTYPE", "replace it"),
          left="begun"),
    Fault("pictures that are bombs", BOTH, lambda w: w.pictures(bomb(w.folder / "b", 30_000, 30_000).read_bytes()),
          ("LIST", "900000000", "scale it down"), left="begun"),
    Fault("cut picture that is to be captioned", CAPTIONS, lambda w: half(w.data / "images/v0.png"), ("v0.png", "replace it"),
          "caption"),
    Fault("folder without a picture to caption", CAPTIONS, lambda w: ["--caption", str(w.run)], ("run", "no picture in"),
          "caption"),

    # models
    *[Fault(f"code in --init ({kind})", STYLES, lambda w, kind=kind: ["--init", hostile(w, w.folder / "i.pt", kind)],
            ("i.pt",))
      for kind in ("zip", "old", "pickle")],
    Fault("half of --init", STYLES, init_of(test_efficientnet_pretrain.ARCH, spoil=half), ("i.pt", "again")),
    Fault("half of --init in safetensors", STYLES, init_of(test_efficientnet_pretrain.ARCH, "i.safetensors", half),
          ("i.safetensors",)),
    Fault("0 bytes of --init", STYLES, init("i.pt", b""), ("i.pt", "0 bytes", "again")),
    Fault("git-lfs pointer as --init", STYLES, init("i.pt", POINTER), ("i.pt", "git-lfs", "again")),
    Fault("--init of another EfficientNet", STYLES, init_of("efficientnet_lite0"), ("i.pt", "does not fit", "missing")),
    Fault("--init is a folder", STYLES, lambda w: ["--init", str(w.data)], ("data", "no such")),
    Fault("--init with a head of another form", STYLES, init_of(test_efficientnet_pretrain.ARCH, spoil=lambda path: edited(
        path, lambda state: state.update({"classifier.weight": torch.tensor(1.0)}))), ("i.pt", "classifier.weight")),
    Fault("--arch from the hub", STYLES, None, ("--arch hf-hub:no/such",), more=("--arch", "hf-hub:no/such")),
    Fault("empty folder as BLIP", CAPTIONS, spoiled_blip(lambda f: shutil.rmtree(f) or f.mkdir()),
          ("blip", "config.json", "not a BLIP")),
    Fault("file as BLIP", CAPTIONS, lambda w: ["--blip", w.beside("b", b"weights")], ("b", "folder")),
    Fault("BLIP of another type", CAPTIONS, spoiled_blip(json_of("config.json", lambda c: c.update(model_type="bert"))),
          ("blip", "bert")),
    Fault("config.json is a page", CAPTIONS, spoiled_blip(content_of("config.json", b"<!DOCTYPE html>")), ("blip", "BLIP")),
    Fault("half of the weights", CAPTIONS, spoiled_blip(lambda f: half(f / "model.safetensors")),
          ("model.safetensors", "incomplete")),
    Fault("LFS pointer as weights", CAPTIONS, spoiled_blip(content_of("model.safetensors", POINTER)),
          ("model.safetensors", "git-lfs")),
    Fault("no weights", CAPTIONS, spoiled_blip(lambda f: (f / "model.safetensors").unlink()), ("blip", "model.safetensors")),
    Fault("tensor that is missing", CAPTIONS, spoiled_blip(without_tensor("vision_model.post_layernorm.weight")),
          ("blip", "1 tensors are missing", "post_layernorm")),
    Fault("tokenizer that is missing", CAPTIONS, spoiled_blip(
        lambda f: [p.unlink() for p in f.iterdir() if p.suffix != ".safetensors" and p.name != "config.json"]),
          ("blip", "no tokenizer files")),
    Fault("tokenizer that is a page", CAPTIONS, spoiled_blip(content_of("tokenizer.json", b"<!DOCTYPE html>")),
          ("blip", "tokenizer")),
    Fault("code in a BLIP folder", CAPTIONS, code_in_blip, ("blip",)),

    # checkpoints of one's own
    *[Fault(f"{name} as best.pt", CAPTIONS, lambda w, content=content: w.best.write_bytes(content), ("best.pt", "damaged"),
            "score")
      for name, content in (("0 bytes", b""), ("page", b"<html>"), ("start of a zip file", b"PK\x03\x04"))],
    Fault("half of best.pt", CAPTIONS, lambda w: half(w.best), ("best.pt", "incomplete"), "caption"),
    Fault("flipped bit in best.pt", CAPTIONS, lambda w: flip(w.best), ("best.pt", "changed"), "score"),
    Fault("hole in best.pt", CAPTIONS, lambda w: hole(w.best), ("best.pt", "changed"), "score"),
    Fault("last.pt as best.pt", CAPTIONS, lambda w: shutil.copy(w.last, w.best), ("best.pt", "not a checkpoint of this stage"),
          "score"),
    Fault("classifier as best.pt", CAPTIONS, of_style("best"), ("best.pt", "not a checkpoint of this stage"), "caption"),
    Fault("best.pt of a deeper tower", CAPTIONS, lambda w: edited(w.best, lambda c: c.update(open=9)), ("9 vision layers",),
          "score"),
    Fault("best.pt without a tensor", CAPTIONS, lambda w: edited(w.best, lambda c: c["state"].popitem()),
          ("best.pt", "does not fit"), "score"),
    *[Fault(f"code in best.pt ({kind})", CAPTIONS, lambda w, kind=kind: hostile(w, w.best, kind) and None, ("best.pt",),
            "score")
      for kind in ("zip", "old", "pickle")],
    *[Fault(f"code in last.pt ({kind})", BOTH, lambda w, kind=kind: hostile(w, w.last, kind) and None, ("last.pt",), "resume")
      for kind in ("zip", "old", "pickle")],
    Fault("0 bytes as last.pt", BOTH, lambda w: w.last.write_bytes(b""), ("last.pt", "damaged"), "resume"),
    Fault("half of last.pt", BOTH, lambda w: half(w.last), ("last.pt", "incomplete"), "resume"),
    Fault("flipped bit in last.pt", BOTH, lambda w: flip(w.last), ("last.pt", "changed"), "resume"),
    Fault("hole in last.pt", BOTH, lambda w: hole(w.last), ("last.pt", "changed"), "resume"),
    Fault("best.pt as last.pt", BOTH, lambda w: shutil.copy(w.best, w.last), ("last.pt", "not a checkpoint of this stage"),
          "resume"),
    Fault("last.pt of another script", BOTH, other_checkpoint("last.pt", "last"),
          ("last.pt: a checkpoint of another stage",), "resume"),
    Fault("resume with another batch size", BOTH, None, ("--batch-size is 4, was 2", "another --out"), "resume",
          ("--batch-size", "4")),
    Fault("resume with several other settings", BOTH, None, ("--seed is 7, was 42", "--epochs is 1, was 2"), "resume",
          ("--seed", "7", "--epochs", "1")),
    Fault("resume with another training row", BOTH,
          lambda w: w.text(lambda t: t.replace("p1.jpg", "p0.jpg").replace("a red", "a blue")),
          ("last.pt", "training"), "resume"),
    Fault("resume with another network", STYLES, None, ("--arch is",), "resume", ("--arch", "efficientnet_b0")),
    Fault("resume with another BLIP", CAPTIONS, lambda w: edited(w.last, lambda c: c.update(frozen="0" * 16)),
          ("last.pt", "--blip"), "resume"),

    # the run folder and the disk
    Fault("resume without last.pt over old results", BOTH, lambda w: w.last.unlink(), ("run", "best.pt", "--out"), "resume"),
    Fault("second run in a folder", STYLES, in_use, ("run", f"process {os.getpid()}", "choose another")),
    Fault("run folder below a file", BOTH, lambda w: ["--out", w.beside("file", b"") + "/run"],
          ("file/run", "cannot be written")),
    Fault("run folder is a file", BOTH, lambda w: w.run.write_bytes(b"") and None, ("run", "cannot be written")),
    Fault("cases below a file", CAPTIONS, lambda w: on_script("load_blip", AssertionError("too late"))(w)
          or ["--out", w.beside("file", b"") + "/run"], ("file/run/cases.html", "cannot be written"), "zero",
          ("--cases", "1")),
    Fault("disk too small", BOTH, lambda w: w.patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**5)),
          ("run", "MB are needed", "0 MB are free"), left="begun"),
    Fault("disk full at best.pt", BOTH, no_rename("best.pt"),
          ("best.pt", "could not be saved", "No space left", "--save-last"), left="any"),
    Fault("disk full at last.pt of a resumed run", BOTH, no_rename("last.pt"), ("last.pt", "could not be saved", "untouched"),
          "resume", left="any"),
    Fault("disk full within best.pt", BOTH, small_files(60_000), ("best.pt", "could not be saved", "disk"), left="any"),
    *[Fault("disk full at the log", kinds,
            fails(runfolder.RunLog, "write", OSError(28, "No space left on device", "training_log.csv")),
            ("training_log.csv", "No space left"), left=left) for kinds, left in ((STYLES, "begun"), (CAPTIONS, "val.json"))],
    Fault("disk full at per_class.csv", STYLES, no_rename("per_class.csv"), ("per_class.csv", "No space left"), "resume",
          left="any"),
    Fault("disk full at val.json", CAPTIONS, no_rename("val.json"), ("val.json", "No space left"), left="begun"),
    Fault("disk full at broken.txt", STYLES, lambda w: (w.data / "Cubism/p0.jpg").unlink() or no_rename("broken.txt")(w),
          ("broken.txt", "No space left"), more=("--check-data",)),

    # memory, numbers, processes
    *[Fault(f"memory runs out ({name})", BOTH, forward_fails(error), ("out of memory", "--batch-size 2 (", "--accumulation"),
            left="begun")
      for name, error in (("GPU", MEMORY), ("machine", MemoryError()), ("allocator", ALLOCATOR))],
    Fault("memory runs out in validation", STYLES, on_script("evaluate", MEMORY), ("out of memory", "--batch-size 2"),
          left="begun"),
    Fault("memory runs out in generation", CAPTIONS, fails(captioning, "describe", MEMORY), ("out of memory", "--val-batch 32,"),
          left="begun"),
    Fault("memory runs out in scoring", CAPTIONS, fails(captioning, "describe", MEMORY), ("out of memory", "--val-batch 4,"), "zero",
          ("--val-batch", "4")),
    Fault("memory runs out in captioning", CAPTIONS, fails(captioning, "describe", MEMORY), ("out of memory", "--val-batch 32,"),
          "caption"),
    Fault("memory runs out while loading", BOTH,
          lambda w: on_script("build" if isinstance(w, Styles) else "load_blip", MemoryError())(w),
          ("out of memory", "of this machine")),
    Fault("loss is NaN", BOTH, not_finite("loss"), ("loss is nan", "step 0", "--lr", "PLACE"), left="begun"),
    Fault("gradient is NaN", BOTH, not_finite("gradient"),
          ("gradient is nan", "step 0", "PLACE", "best.pt and last.pt are as they were"),
          left="begun"),
    Fault("validation is NaN", BOTH, nan_validation, ("never finite", "--lr"), left="begun"),
    Fault("one pixel a channel", STYLES, None, ("--batch-size 1", "--size"), more=("--batch-size", "1", "--size", "16"),
          left="begun"),
    Fault("loader process is killed", BOTH, dying_loader, ("loader process", "--workers 0", "/dev/shm"),
          more=("--workers", "1"), left="begun"),
    Fault("loader process is killed in scoring", CAPTIONS, dying_loader, ("loader process", "--workers 0"), "zero",
          ("--workers", "1")),
    Fault("Ctrl-C before the first step", BOTH, on_script("prepare", KeyboardInterrupt()), ("interrupted",), code=130),
    Fault("package for the log is missing", BOTH, without_module("tensorboard.summary.writer.record_writer"),
          ("tensorboard", "requirements.txt"), left="begun"),
    Fault("package for the page is missing", CAPTIONS, in_the_drawing("jinja2.py", WITHOUT_JINJA2),
          ("jinja2", "requirements.txt", "python -m show.report", "run/cases.results.json"), "zero", ("--cases", "1"),
          left="cases.results.json"),

    # flags
    Fault("unknown flag", BOTH, None, ("unrecognized arguments: --epoch-count",), more=("--epoch-count", "3")),
    *[wrong_flag(BOTH, flag, "False", "unrecognized arguments: False") for flag in ("--save-last", "--resume",
                                                                                    "--check-data")],
    *[wrong_flag(BOTH, flag, value) for flag, value in (
        ("--epochs", "0"), ("--batch-size", "many"), ("--accumulation", "1.5"), ("--lr", "nan"), ("--lr", "-1"),
        ("--workers", "-1"),
        ("--seed", "-1"), ("--precision", "int8"), ("--weight-decay", "-1"), ("--config", "nothing.yaml"))],
    *[wrong_flag(STYLES, flag, value) for flag, value in (
        ("--size", "0"), ("--cutmix", "2"), ("--mixup", "-1"), ("--ema", "1.5"), ("--crop", "nan"), ("--val-share", "3"),
        ("--warmup", "-3"))],
    Fault("more than all batches mixed", STYLES, None, ("--cutmix 0.7", "--mixup 0.5", "more than 1"),
          more=("--cutmix", "0.7", "--mixup", "0.5")),
    *[wrong_flag(CAPTIONS, flag, value) for flag, value in (
        ("--skip-bad", "3"), ("--unfreeze", "-1"), ("--max-val", "0"), ("--val-batch", "0"), ("--cases", "-1"),
        ("--warmup", "0.5"))],
    Fault("--check-data without --data", CAPTIONS, lambda w: ["--data", "", "--caption", "x.png"], ("--data is needed",),
          more=("--check-data",)),
    *configs(BOTH),
    *[Fault(f"config {text!r}", CAPTIONS, lambda w, text=text: ["--config", w.beside("c.yaml", text.encode())],
            ("--unfreeze-schedule", "182", "quotes"))
      for text in ("unfreeze_schedule: [3:2]", "unfreeze_schedule: 3:2")],
]


def test_names_of_entries_are_distinct():
    refuse_twins(FAULTS)


@pytest.mark.parametrize("entry, kind", cases(FAULTS))
@pytest.mark.filterwarnings("ignore")
def test_fault(entry, kind, make_world, capsys):
    """One line, the right code, nothing run, nothing changed."""
    check(entry, make_world(kind), capsys)


# --- what looks bad and is good ------------

def odd_pictures(folder):
    """Pictures of every kind that Pillow reads otherwise than as RGB -> their names."""
    grey, rgb = Image.new("L", (40, 30), 120), Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {"cmyk.jpg": rgb.convert("CMYK"), "deep.png": Image.new("I;16", (40, 30), 40_000), "palette.png": rgb.quantize(8),
             "clear.png": rgb.convert("RGBA"), "grey.jpg": grey, "turned.jpg": rgb, "still.gif": rgb.quantize(8)}
    for name, image in kinds.items():
        more = {"exif": turned} if name == "turned.jpg" else {}
        image.save(folder / name, format="GIF" if name.endswith("gif") else "JPEG" if name.endswith("jpg") else "PNG", **more)
    return list(kinds)


def test_odd_pictures_are_trained_on(tmp_path):
    """CMYK, 16 bits, palette, transparency, grey, EXIF: both scripts see what rows.load_image sees."""
    names = odd_pictures(tmp_path)
    paths = [str(tmp_path / name) for name in names]
    paintings = pretrain.Paintings([rows.Row(p, p, "", "", "", "A", 1, "f") for p in paths], ["A"], 32)
    pictures = blip.Captions(blip.pictures_in(paths), 32)
    for n, path in enumerate(paths):
        image = rows.load_image(path)
        assert image.size == ((30, 40) if "turned" in path else (40, 30))
        assert torch.equal(paintings[n][0], rows.image_tensor(image, 32, rows.IMAGENET_MEAN, rows.IMAGENET_STD))
        assert torch.equal(pictures[n][0]["pixel_values"], rows.image_tensor(image, 32))
        assert paintings[(n, 0, n)][0].shape == (3, 32, 32)


@pytest.mark.parametrize("kind", BOTH)
def test_byte_order_mark_is_no_part_of_a_list(make_world, kind):
    world = make_world(kind)
    read = {Styles: lambda args: pretrain.read_data(args, str)[1]["train"],
            Captioning: lambda args: blip.read_data(args, "train", str)}
    args = kind.script.get_args(world.train())
    before = read[kind](args)
    for path in [world.list, *world.data.glob("*class.txt")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read[kind](args) == before


def test_captions_in_another_encoding(make_world):
    world = make_world(Captioning)
    captions('{"t0.png": "ein gr\u00fcnes Haus"}'.encode("latin-1"))(world)
    picture, = blip.read_data(blip.get_args(world.train("--encoding", "latin-1")), "train", str)
    assert picture.captions == ("ein gr\u00fcnes Haus",)


def test_missing_picture_with_a_chinese_name_is_not_another_one(tmp_path):
    test_efficientnet_pretrain.picture(tmp_path / "Cubism/花鸟.jpg")
    there, missing = wikiart.make_rows([("Cubism/花鸟.jpg", "x", "list.csv", 1), ("Cubism/山水.jpg", "x", "list.csv", 2)],
                                       str(tmp_path))
    assert not there.fault and "not there" in missing.fault and not missing.image


def test_pictures_of_coco_in_a_folder_that_is_named(make_world):
    """file_name may hold images/ already: the root is then the folder above."""
    world = make_world(Captioning)
    captions({"images": [{"id": 7, "file_name": "images/t0.png"}],
              "annotations": [{"image_id": 7, "caption": "a red square"}]})(world)
    picture, = blip.read_data(blip.get_args(world.train()), "train", str)
    assert (picture.name, picture.captions) == ("images/t0.png", ("a red square",)) and os.path.samefile(picture.image,
                                                                                                         world.picture)


def test_data_of_a_checkpoint_can_be_checked(make_world, capsys):
    """--check-data beside --checkpoint, which leaves --blip open."""
    world = make_world(Captioning)
    assert blip.main(["--data", str(world.data), "--checkpoint", "x.pt", "--check-data", "--workers", "0"]) == 0
    assert "training can start" in capsys.readouterr().out


# --- what is tested elsewhere ------------

COVERED = {  # kind of bad input of the gated stage: entries of FAULTS, of BAD in test_efficientnet_pretrain.py, tests
    "list or folder missing": ["missing folder", "no training list", "data folder that is not there",
                               "captions that are not there"],
    "empty list": ["empty list", "0 bytes of a list", "blank list"],
    "wrong columns or fields": ["table without subset", "index is no number", "header", "rows without image_id",
                                "test_bad_input_is_one_line"],
    "ragged line": ["no index", "three fields", "ragged row", "open quote"],
    "encoding": ["latin-1", "UTF-16", "unknown encoding", "test_captions_in_another_encoding",
                 "test_byte_order_mark_is_no_part_of_a_list"],
    "empty caption": ["test_bad_input_is_one_line", "test_clean_removes_and_counts"],
    "missing picture": ["missing picture", "test_bad_input_is_one_line", "wrong image root"],
    "path out of the root": ["leaves the root", "absolute picture", "picture that is a link out of the root",
                             "picture that is a URL"],
    "broken picture": ["picture of 0 bytes", "cut pictures", "pages instead of pictures", "pictures that are bombs",
                       "test_broken_pictures_are_listed_and_left_out", "test_broken_training_picture_leaves_a_last_pt"],
    "odd picture": ["test_odd_pictures_are_trained_on", "test_exif_rotation", "test_modes"],
    "names twice": ["key twice", "two pictures of almost one name", "test_a_name_that_could_be_two_pictures_is_a_fault"],
    "no validation": ["no validation list", "no validation captions", "validation folder without pictures",
                      "no style with a second picture"],
    "too few rows": ["more shots than pictures", "test_shots_are_a_function_of_names_and_seed"],
    "model folder": ["empty folder as BLIP", "BLIP of another type", "tensor that is missing", "unknown arch", "other arch",
                     "no init"],
    "code in a file": ["hostile init", "code in --init (pickle)", "code in last.pt (zip)", "code in best.pt (old)",
                       "code in a BLIP folder",
                       "test_hostile_checkpoint_never_runs"],
    "damaged checkpoint": ["half of best.pt", "half of last.pt", "flipped bit in last.pt", "hole in best.pt"],
    "checkpoint of another stage": ["classifier as best.pt", "last.pt of another script",
                                    "test_other_folders_and_checkpoints_are_refused"],
    "resume with other settings": ["resume with another batch size", "test_resume_refuses_other_settings_and_data"],
    "--out": ["run folder below a file", "unwritable out", "second run in a folder",
              "test_other_folders_and_checkpoints_are_refused",
              "test_resume_refuses_other_settings_and_data", "resume without last.pt over old results"],
    "full disk": ["disk too small", "disk full at best.pt", "disk full within best.pt",
                  "disk full at last.pt of a resumed run"],
    "config": ["config 'epochs_count: 3'", "config 'epochs: many'", "--config nothing.yaml",
               "config 'unfreeze_schedule: [3:2]'"],
    "NaN": ["loss is NaN", "gradient is NaN", "validation is NaN", "test_better_and_patience",
            "test_best_pt_is_of_the_best_macro_f1"],
    "loader process killed": ["loader process is killed", "loader process is killed in scoring"],
    "signals": ["Ctrl-C before the first step", "test_interrupted_and_resumed_equals_undisturbed",
                "test_second_signal_leaves_at_once"],
    "memory": ["memory runs out (GPU)", "memory runs out in generation", "memory runs out while loading"],
    "flags": ["unknown flag", "--lr nan", "more than all batches mixed", "test_bad_flags"],
    "packages": ["package for the log is missing", "package for the page is missing",
                 "test_version_out_of_range_is_named_at_the_start"],
}


def test_every_kind_is_covered():
    refuse_unknown(COVERED, FAULTS, test_efficientnet_pretrain.BAD)
