"""pytest tests/test_retrieval_faults.py: test_faults.py's question put to train_cir.py and pretrain_qformer.py.

What goes wrong for users costs them one line and nothing on the disk. Behaviour-checked. FAULTS is one table, run by faults.py;
COVERED names for every kind of bad input where it is tested for these two scripts.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import get_worker_info

import pretrain_qformer
import train_cir
from engine import checkpoints, errors, galleries, published, runfolder
import test_cir
from faults import (ALLOCATOR, FULL_AT, MEMORY, POINTER, WITHOUT_JINJA2, Fault, World, cases, check, configs, content_of, edited, fails,
                    flip, half, hole, hostile, in_the_drawing, in_use, json_of, link, no_rename, on_script, other_checkpoint,
                    refuse_twins, refuse_unknown, small_files, without_module, without_tensor, wrong_flag)
from test_pairs import pack, sample_members
from test_rows import bomb

# --- a small world for each script: data, a run that was interrupted in its second epoch ------------

def draw(folder, names):
    """Pictures of random pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / name)


def make_cirr(folder):
    """Two image sets to train on, one for each other split; three queries in each."""
    for place in ("captions", "image_splits"):
        (folder / place).mkdir(parents=True)
    for split, sets in (("train", 2), ("val", 1), ("test1", 1)):
        names = [f"{split}{n}" for n in range(6 * sets)]
        draw(folder / "img_raw" / split, [f"{name}.png" for name in names])
        queries = [{"pairid": n, "reference": names[n], "target_hard": names[n + 1], "caption": f"make it red and number {n}",
                    "img_set": {"members": names[n // 6 * 6:][:6]}} for k in range(sets) for n in range(6 * k, 6 * k + 3)]
        for query in queries if split == "test1" else ():
            query.pop("target_hard")
        (folder / f"captions/cap.rc2.{split}.json").write_text(json.dumps(queries))
        paths = {name: f"./{split}/{name}.png" for name in names}
        (folder / f"image_splits/split.rc2.{split}.json").write_text(json.dumps(paths))


def make_pairs(folder):
    """Six pictures to train on, three to validate."""
    draw(folder / "images", [f"{kind}{n}.png" for kind, count in (("t", 6), ("v", 3)) for n in range(count)])
    for split, kind, count in (("train", "t", 6), ("val", "v", 3)):
        table = {f"{kind}{n}.png": f"a red boat number {n}" for n in range(count)}
        (folder / f"{split}_captions.json").write_text(json.dumps(table))


class Cir(World):
    script, list_name, first_name, ending, place = train_cir, "captions/cap.rc2.train.json", "train0", "png", "(row "

    @property
    def picture(self):
        return self.data / "img_raw/train/train0.png"

    def train(self, *more):
        return ["--data", str(self.data), "--blip2", str(self.finished / "blip2"), "--epochs", "2", "--batch-size", "3",
                "--lr",
                "1e-3", "--workers", "0", "--precision", "no", "--out", str(self.run), *more]

    def score(self, *more):
        return ["--data", str(self.data), "--checkpoint", str(self.best), "--workers", "0", *more]

    def search(self, *more):
        return ["--search", "make it red", "--image", str(self.picture), "--gallery", str(self.data / "img_raw"),
                "--checkpoint",
                str(self.best), "--workers", "0", "--out", str(self.folder / "found"), *more]


class Qformer(World):
    script, list_name, first_name, ending, place = pretrain_qformer, "train_captions.json", "t0.png", "png", ".png (row "

    @property
    def picture(self):
        return self.data / "images/t0.png"

    def train(self, *more):
        return ["--data", f"drawn={self.data}", "--blip2", str(self.finished / "blip2"), "--init", "random", "--epochs", "2",
                "--batch-size", "3", "--lr", "1e-3", "--workers", "0", "--precision", "no", "--out", str(self.run), *more]

    def convert(self, *more):
        return ["--convert", str(self.best), "--blip2", str(self.finished / "blip2"), "--out", str(self.folder / "converted"),
                *more]


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """One thread, no curves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runfolder, "draw_curves", lambda *args: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{kind of World: folder with data/, run/ and blip2/}; runs that were interrupted after the second epoch's first step."""
    folders = {kind: tmp_path_factory.mktemp(kind.__name__) for kind in BOTH}
    make_cirr(folders[Cir] / "data")
    make_pairs(folders[Qformer] / "data")
    for kind, folder in folders.items():
        shutil.move(test_cir.random_retrieval(folder / "m"), folder / "blip2")
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

BOTH, CIR, QFORMER = (Cir, Qformer), (Cir,), (Qformer,)


def table(content):
    """The list of training rows holds this."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda world: world.list.write_bytes(data) and None


def called(name):
    """The first training picture is called otherwise where its path stands."""
    def harm(world):
        path = world.data / "image_splits/split.rc2.train.json" if isinstance(world, Cir) else world.list
        old = "./train/train0.png" if isinstance(world, Cir) else world.first_name
        path.write_text(path.read_text().replace(old, name))
    return harm


def spoiled(change, flag="--blip2"):
    """`flag` with a copy of the model on which change(folder) was called."""
    def harm(world):
        folder = pathlib.Path(shutil.copytree(world.finished / "blip2", world.folder / "blip2"))
        change(folder)
        return [flag, str(folder)]
    return harm


def cut_tensor(name):
    """A tensor with one row less."""
    def change(folder):
        state = load_file(folder / "model.safetensors")
        state[name] = state[name][:-1].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return change


def without_tokenizer(folder):
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            path.unlink()


def large_tokenizer(folder):
    """A tokenizer of more words than the Q-Former has."""
    tokenizer = published.load_tokenizer(str(folder))
    tokenizer.add_tokens([f"word{n}" for n in range(9)])
    tokenizer.save_pretrained(folder)


def headless_tokenizer(folder):
    """A tokenizer that puts no [CLS] before a text."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def opt_blip2(flag):
    """A BLIP-2 with OPT, whose Q-Former reads no text."""
    def harm(world):
        from tools import make_tiny
        return [flag, make_tiny.save_random(world.folder / "opt")[0]]
    return harm


def foreign(flag, name, content):
    return lambda world: [flag, world.beside(name, content)]


def not_finite(what):
    """The loss or the gradient is NaN."""
    def harm(world):
        net = train_cir.Sprc if isinstance(world, Cir) else pretrain_qformer.Stage1
        forward = net.forward

        def poisoned(model, *args, **kwargs):
            found = forward(model, *args, **kwargs)
            if what == "loss":
                found["loss"].data.fill_(float("nan"))
            else:
                found["loss"].register_hook(lambda gradient: gradient * float("nan"))
            return found
        world.patch.setattr(net, "forward", poisoned)
    return harm


def forward_fails(error):
    def harm(world):
        fails(train_cir.Sprc if isinstance(world, Cir) else pretrain_qformer.Stage1, "forward", error)(world)
    return harm


def nan_validation(world):
    validate = world.script.validate

    def without_a_mean(*args):  # train_cir's gives the scores with it
        numbers, *scores = validate(*args) if isinstance(world, Cir) else (validate(*args),)
        numbers = {**numbers, "mean": float("nan")}
        return (numbers, *scores) if scores else numbers

    world.patch.setattr(world.script, "validate", without_a_mean)


def dying_loader(world):
    """The loader process is killed, as the kernel does when memory runs out."""
    data = train_cir.Triplets if isinstance(world, Cir) else pretrain_qformer.Captioned
    read = data.__getitem__

    def killed(self, index):
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)
    world.patch.setattr(data, "__getitem__", killed)


def closed(name):
    """A file stands where a folder is to be written -> its name."""
    return lambda world: world.beside(name, b"") and None


def shard(change=lambda path: None, *more):
    """A set of one tar file, spoiled."""
    def harm(world):
        pytest.importorskip("webdataset")
        change(pack(world.folder / "tars/cc.tar", sample_members(0, 6)))
        return ["--data", f"cc={world.folder / 'tars'}", *more]
    return harm


def full_at(name):
    """The disk is full when the function of safetensors or transformers writes the folder."""
    def harm(world):
        import safetensors
        from transformers import Blip2ForImageTextRetrieval
        error = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        fails(Blip2ForImageTextRetrieval, "save_pretrained", error)(world)
    return harm


def best_without(key):
    return lambda world: edited(world.best, lambda content: content.pop(key))


FAULTS = [
    # annotations
    Fault("missing folder", BOTH, lambda w: shutil.rmtree(w.data), ("data", "--data")),
    Fault("missing list", BOTH, lambda w: w.list.unlink(), ("LIST", "--data")),
    Fault("empty list", BOTH, table(b""), ("LIST", "empty")),
    Fault("list without rows", BOTH, table([]), ("LIST",)),
    Fault("list is a page", BOTH, table(b"<!DOCTYPE html>"), ("LIST",)),
    Fault("list is no text", BOTH, table(bytes(range(256))), ("LIST", "byte")),
    Fault("latin-1", CIR, lambda w: w.text(lambda t: t.replace("red", "D\u00fcrer", 1), "latin-1"),
          ("LIST", "not UTF-8", "save it")),
    Fault("latin-1 captions", QFORMER, lambda w: w.text(lambda t: t.replace("red", "D\u00fcrer", 1), "latin-1"),
          ("LIST", "--encoding latin-1")),
    Fault("half a list", BOTH, lambda w: half(w.list), ("LIST", "not JSON")),
    Fault("rows that are numbers", BOTH, table([1, 2]), ("LIST", "row 1")),
    Fault("caption that is an object", QFORMER, table({"t0.png": {"a": 1}}), ("LIST", "t0.png")),
    Fault("empty caption", QFORMER, table({"t0.png": " . ", "t1.png": "a boat"}), ("LIST", "empty caption")),
    Fault("split file is missing", CIR, lambda w: (w.data / "image_splits/split.rc2.val.json").unlink(),
          ("split.rc2.val.json", "no such file")),
    Fault("split file is empty", CIR, lambda w: (w.data / "image_splits/split.rc2.val.json").write_bytes(b"{}"),
          ("split.rc2.val.json", "download")),
    Fault("split file is no text", CIR, lambda w: (w.data / "image_splits/split.rc2.val.json").write_bytes(b"\xff\xfe{}"),
          ("split.rc2.val.json", "byte 0 is not UTF-8")),
    Fault("--format of the other", CIR, None, ("cap.dress.train.json", "no such file"), more=("--format", "fashioniq")),
    Fault("folder without a training file", QFORMER, lambda w: (w.list.rename(w.data / "x.json")) and None,
          ("data", "x.json", "--data")),
    Fault("--data without a name", QFORMER, lambda w: ["--data", str(w.data)], ("--data", "NAME=")),
    Fault("a name twice", QFORMER, lambda w: ["--data", f"drawn={w.folder}"], ("drawn", "name of its own")),
    Fault("no validation pictures", QFORMER, lambda w: (w.data / "val_captions.json").unlink() or ["--val-share", "0"],
          ("no set has a validation file", "--val-share")),
    Fault("fewer rows than processes", QFORMER, table({}), ("LIST",)),

    # tar files
    Fault("tar files alone", QFORMER, lambda w: shard()(w) and ["--data", f"drawn={w.folder / 'tars'}"], ("give each",)),
    Fault("shards that are not there", QFORMER, lambda w: ["--data", f"cc={w.folder}/{{0..3}}.tar"],
          ("0..3", "4 of 4", "--data")),
    Fault("open brace", QFORMER, lambda w: ["--data", f"cc={w.folder}/{{0..3"], ("brace pattern", "000..331")),
    Fault("shards by URL", QFORMER, None, ("https://x/cc.tar", "download"), more=("--data", "cc=https://x/cc.tar")),
    Fault("half a shard", QFORMER, shard(half), ("cc.tar", "--skip-broken", "download it again")),
    Fault("every shard is broken", QFORMER, shard(half, "--skip-broken"), ("cc", "all of the 1 shards")),
    Fault("fewer samples than a batch", QFORMER, shard(lambda path: pack(path, sample_members(0, 2))),
          ("2 samples", "--batch-size"), left="any"),
    Fault("broken picture in a shard", QFORMER, shard(lambda path: pack(path, sample_members(0, 6) | {
        f"{n:05}.{'png' if n % 2 else 'JPG'}": b"<html>" for n in range(6)})), ("cc.tar", "sample", "--skip-broken"),
          left="any"),
    Fault("nothing good in a shard", QFORMER, shard(lambda path: pack(path, sample_members(0, 6) | {
        f"{n:05}.{'png' if n % 2 else 'JPG'}": b"<html>" for n in range(6)}), "--skip-broken"), ("broken", "--data"),
          left="any"),
    Fault("package for tar files is missing", QFORMER, lambda w: [shard()(w), without_module("webdataset.shardlists")(w)][0],
          ("webdataset", "pip install")),

    # pictures
    Fault("missing picture", BOTH, lambda w: w.picture.unlink(), ("0.png", "--images")),
    Fault("picture of 0 bytes", QFORMER, lambda w: w.picture.write_bytes(b"") and None, ("t0.png", "0 bytes")),
    Fault("pictures of 0 bytes", CIR, lambda w: w.pictures(b""), ("0 bytes", "replace it"), left="any"),
    Fault("cut pictures", BOTH, lambda w: w.pictures(w.picture.read_bytes()[:200]), ("LIST", "row", "replace it"),
          left="begun"),
    Fault("pages instead of pictures", BOTH, lambda w: w.pictures(b"<!DOCTYPE html>"), ("LIST", "<!DOCTYPE", "replace it"),
          left="begun"),
    Fault("pictures that are bombs", BOTH, lambda w: w.pictures(bomb(w.folder / "b", 30_000, 30_000).read_bytes()),
          ("LIST", "900000000", "scale it down"), left="begun"),
    Fault("picture in no image root", BOTH, None, ("nowhere", "--images"), more=("--images", "nowhere")),
    Fault("picture out of the root", BOTH, called("../../../secret.png"), ("secret.png", "holds '..'")),
    Fault("absolute picture", CIR, called("/tmp/x.png"), ("/tmp/x.png", "absolute")),
    Fault("picture that is a URL", BOTH, called("https://example.org/a.png"), ("URL",)),
    Fault("picture that is a link out of the root", BOTH, link(lambda w: w.beside("secret.png", b"x")), ("leaves",)),
    Fault("device as picture", BOTH, link(lambda w: "/dev/zero"), ("leaves",)),
    Fault("too many bad pictures", BOTH, lambda w: [p.unlink() for p in w.picture.parent.glob("*[0-3].png")] and None,
          ("--skip-bad",), more=("--skip-bad", "0.1")),
    Fault("broken picture with --skip-bad", BOTH, lambda w: half(w.picture), ("0.png", "--skip-bad 0."),
          more=("--skip-bad", "0.01")),
    Fault("validation pictures that are broken", BOTH, lambda w: [half(p) for p in w.data.rglob("v*.png")] and None,
          ("replace it",), left="any"),

    # models
    Fault("empty folder as model", BOTH, spoiled(lambda f: shutil.rmtree(f) or f.mkdir()), ("blip2", "config.json")),
    Fault("file as model", BOTH, foreign("--blip2", "b", b"weights"), ("b", "folder")),
    Fault("model of another type", CIR, spoiled(json_of("config.json", lambda c: c.update(model_type="bert"))),
          ("blip2", "bert")),
    Fault("tower of another type", QFORMER, spoiled(json_of("config.json", lambda c: c.update(model_type="bert"))),
          ("blip2", "a bert model", "vision tower")),
    Fault("config.json is a page", BOTH, spoiled(content_of("config.json", b"<!DOCTYPE html>")), ("blip2", "config.json")),
    Fault("half of the weights", BOTH, spoiled(lambda f: half(f / "model.safetensors")), ("model.safetensors", "incomplete")),
    Fault("LFS pointer as weights", BOTH, spoiled(content_of("model.safetensors", POINTER)), ("model.safetensors", "git-lfs")),
    Fault("no weights", BOTH, spoiled(lambda f: (f / "model.safetensors").unlink()), ("blip2",)),
    Fault("tensor of the tower is missing", BOTH, spoiled(without_tensor("vision_model.post_layernorm.weight")),
          ("blip2", "missing", "post_layernorm")),
    Fault("query tokens are missing", CIR, spoiled(without_tensor("query_tokens")), ("blip2", "missing", "query_tokens")),
    Fault("query tokens of --init are missing", QFORMER, spoiled(without_tensor("query_tokens"), "--init"),
          ("blip2", "no query_tokens")),
    Fault("BLIP-2 with OPT", CIR, opt_blip2("--blip2"), ("blip2", "not one for image-text retrieval", "blip2-itm-vit-g")),
    Fault("BLIP-2 with OPT as tower", QFORMER, opt_blip2("--blip2"), ("blip2", "image-text-retrieval", "--init")),
    Fault("BLIP-2 with OPT as --init", QFORMER, opt_blip2("--init"), ("blip2", "image-text-retrieval", "--init")),
    Fault("BLIP-2 with OPT as --qformer", CIR, opt_blip2("--qformer"), ("blip2", "image-text-retrieval folder")),
    *[Fault(f"{flag} of other sizes", (kind,), spoiled(cut_tensor("embeddings.word_embeddings.weight"), flag),
            ("blip2", "does not fit", "word_embeddings")) for kind, flag in ((Cir, "--qformer"), (Qformer, "--init"))],
    Fault("tokenizer that is missing", BOTH, spoiled(without_tokenizer), ("blip2", "no tokenizer files")),
    Fault("tokenizer that is a page", BOTH, spoiled(content_of("tokenizer.json", b"<!DOCTYPE html>")), ("blip2", "tokenizer")),
    Fault("tokenizer of more words", BOTH, spoiled(large_tokenizer), ("blip2", "tokens", "do not belong together")),
    Fault("tokenizer without [CLS]", BOTH, spoiled(headless_tokenizer), ("blip2", "[CLS]")),
    Fault("no such id", BOTH, None, ("no/such", "local folder"), more=("--blip2", "no/such")),
    Fault("no such --init", QFORMER, None, ("no/such", "local folder"), more=("--init", "no/such")),
    Fault("no such --qformer", CIR, None, ("nothing.pth", "no such"), more=("--qformer", "nothing.pth")),
    *[Fault(f"{what} as {flag}", (kind,), foreign(flag, "q.pth", content), ("q.pth",))
      for kind, flag in ((Cir, "--qformer"), (Qformer, "--init"))
      for what, content in (("0 bytes", b""), ("pointer", POINTER), ("start of a zip file", b"PK\x03\x04"))],
    *[Fault(f"code in {flag} ({how})", (kind,), lambda w, flag=flag, how=how: [flag, hostile(w, w.folder / "q.pth", how)],
            ("q.pth",))
      for kind, flag in ((Cir, "--qformer"), (Qformer, "--init")) for how in ("zip", "old", "pickle")],
    *[Fault(f"code in --convert ({how})", QFORMER, lambda w, how=how: ["--convert", hostile(w, w.folder / "q.pth", how)],
            ("q.pth",),
            "convert", left="any") for how in ("zip", "old", "pickle")],
    Fault("code in a model folder", BOTH, lambda w: spoiled(lambda f: (f / "model.safetensors").unlink() or hostile(
        w, f / "pytorch_model.bin"))(w), ("blip2",)),
    Fault("code in the folder of --init", QFORMER, lambda w: spoiled(lambda f: (f / "model.safetensors").unlink() or hostile(
        w, f / "pytorch_model.bin"), "--init")(w), ("blip2",)),
    Fault("BERT without weights", QFORMER, spoiled(lambda f: json_of("config.json", lambda c: c.update(model_type="bert"))(f)
                                                   or (f / "model.safetensors").unlink(), "--init"), ("blip2", "BERT")),
    Fault("code in a BERT", QFORMER, lambda w: spoiled(lambda f: json_of("config.json",
                                                                         lambda c: c.update(model_type="bert"))(f) or (
        f / "model.safetensors").unlink() or hostile(w, f / "pytorch_model.bin"), "--init")(w), ("blip2", "BERT")),

    # checkpoints of one's own
    *[Fault(f"{name} as best.pt", CIR, lambda w, content=content: w.best.write_bytes(content) and None, ("best.pt", "damaged"),
            "score")
      for name, content in (("0 bytes", b""), ("page", b"<html>"), ("start of a zip file", b"PK\x03\x04"))],
    Fault("half of best.pt", CIR, lambda w: half(w.best), ("best.pt", "incomplete"), "search"),
    Fault("flipped bit in best.pt", CIR, lambda w: flip(w.best), ("best.pt", "changed"), "score"),
    Fault("hole in best.pt", CIR, lambda w: hole(w.best), ("best.pt", "changed"), "score"),
    Fault("half of best.pt to be converted", QFORMER, lambda w: half(w.best), ("best.pt", "damaged"), "convert", left="any"),
    Fault("last.pt as best.pt", CIR, lambda w: shutil.copy(w.last, w.best) and None,
          ("best.pt", "not a checkpoint of this stage"), "score"),
    Fault("stage 1 as best.pt", CIR, other_checkpoint("best.pt", "best"), ("best.pt", "another stage (qformer)"), "score"),
    Fault("retrieval's best.pt to be converted", QFORMER, other_checkpoint("best.pt", "best"), ("best.pt", "no itm_head"),
          "convert",
          left="any"),
    Fault("best.pt without a tensor", CIR, lambda w: edited(w.best, lambda c: c["state"].popitem()),
          ("best.pt", "does not fit"), "score"),
    Fault("best.pt with another --blip2", CIR, lambda w: spoiled(lambda f: shift(f, "vision_model.post_layernorm.bias"))(w),
          ("best.pt", "another vision tower", "--blip2"), "score"),
    Fault("resume with another --blip2 inside", BOTH, lambda w: edited(w.last, lambda c: c.update(frozen="0" * 16)),
          ("last.pt", "--blip2"), "resume"),
    *[Fault(f"code in best.pt ({how})", CIR, lambda w, how=how: hostile(w, w.best, how) and None, ("best.pt",), "score")
      for how in ("zip", "old", "pickle")],
    *[Fault(f"code in last.pt ({how})", BOTH, lambda w, how=how: hostile(w, w.last, how) and None, ("last.pt",), "resume")
      for how in ("zip", "old", "pickle")],
    Fault("0 bytes as last.pt", BOTH, lambda w: w.last.write_bytes(b"") and None, ("last.pt", "damaged"), "resume"),
    Fault("half of last.pt", BOTH, lambda w: half(w.last), ("last.pt", "incomplete"), "resume"),
    Fault("flipped bit in last.pt", BOTH, lambda w: flip(w.last), ("last.pt", "changed"), "resume"),
    Fault("hole in last.pt", BOTH, lambda w: hole(w.last), ("last.pt", "changed"), "resume"),
    Fault("best.pt as last.pt", BOTH, lambda w: shutil.copy(w.best, w.last) and None,
          ("last.pt", "not a checkpoint of this stage"), "resume"),
    Fault("last.pt of another script", BOTH, other_checkpoint("last.pt", "last"), ("last.pt", "another stage"), "resume"),
    Fault("resume with another batch size", BOTH, None, ("--batch-size is 2, was 3", "another --out"), "resume",
          ("--batch-size", "2")),
    Fault("resume with several other settings", BOTH, None, ("--seed is 7, was 42", "--epochs is 1, was 2"), "resume",
          ("--seed", "7", "--epochs", "1")),
    Fault("resume with another training row", BOTH, lambda w: w.text(lambda t: t.replace("red", "blue", 1)),
          ("last.pt", "training"),
          "resume"),
    Fault("resume with other flags of the model", CIR, None, ("--no-gate is True",), "resume", ("--no-gate",)),
    Fault("resume with tar files", QFORMER, shard(), ("tar files is",), "resume", left="any"),

    # the run folder and the disk
    Fault("folder of results", BOTH, lambda w: shutil.copytree(w.finished / "run", w.run) and None,
          ("run", "best.pt and last.pt", "--resume")),
    Fault("resume without last.pt over old results", BOTH, lambda w: w.last.unlink(), ("run", "best.pt", "--out"), "resume"),
    Fault("second run in a folder", BOTH, in_use, ("run", f"process {os.getpid()}", "choose another")),
    Fault("run folder below a file", BOTH, lambda w: ["--out", w.beside("file", b"") + "/run"],
          ("file/run", "cannot be written")),
    Fault("run folder is a file", BOTH, lambda w: w.run.write_bytes(b"") and None, ("run", "cannot be written")),
    Fault("converted below a file", QFORMER, closed("converted"), ("converted/hf", "cannot be written"), "convert"),
    Fault("counts below a file", QFORMER, lambda w: [*shard()(w), "--out", w.beside("file", b"") + "/run"], ("file/run",)),
    Fault("disk too small", BOTH, lambda w: w.patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**5)),
          ("run", "MB are needed", "0 MB are free"), left="begun"),
    Fault("disk full at best.pt", BOTH, no_rename("best.pt"), ("best.pt", "could not be saved", "No space left",
                                                               "--save-last"),
          left="any"),
    Fault("disk full at last.pt of a resumed run", BOTH, no_rename("last.pt"), ("last.pt", "could not be saved", "untouched"),
          "resume", left="any"),
    Fault("disk full within best.pt", BOTH, small_files(60_000), ("best.pt", "could not be saved", "disk"), left="any"),
    Fault("disk full at the log", BOTH, no_rename("training_log.csv"), ("training_log.csv", "No space left"), left="any"),
    Fault("disk full at args.yaml", BOTH, no_rename("args.yaml"), ("run", "cannot be written (No space left"), left="begun"),
    Fault("disk full at hf", QFORMER, full_at("hf"), ("run/hf", "could not be written", "No space left", "--convert"),
          left="any"),
    Fault("disk full at the converted folder", QFORMER, full_at("hf"), ("converted/hf", "could not be written"), "convert",
          left="any"),
    Fault("disk full at the counts", QFORMER, lambda w: no_rename("shards.json")(w) or shard()(w),
          ("shards.json", "No space left"),
          left="any"),
    Fault("disk full at the submission", CIR, no_rename("recall_submission.json"), ("recall_submission.json", "No space left"),
          "score",
          ("--submit", "submission"), "any"),

    # without training
    Fault("--submit without test1", CIR, lambda w: (w.data / "captions/cap.rc2.test1.json").unlink() or no_encoding(w),
          ("cap.rc2.test1.json", "no such file"), "score", ("--submit", "submission")),
    Fault("--submit below a file", CIR, lambda w: no_encoding(w) or ["--submit", w.beside("file", b"") + "/s"],
          ("file/s", "cannot be written"), "score"),
    Fault("--gate-maps below a file", CIR, lambda w: no_encoding(w) or ["--gate-maps", w.beside("file", b"") + "/s"],
          ("file/s", "cannot be written"), "score"),
    Fault("cut pictures to be scored", CIR, lambda w: w.pictures(w.picture.read_bytes()[:200]), ("val", "replace it"),
          "score"),
    Fault("--image that is missing", CIR, lambda w: no_index(w) or ["--image", "nothing.png"], ("nothing.png", "missing"),
          "search"),
    Fault("--image that is broken", CIR, lambda w: no_index(w) or half(w.picture), ("train0.png", "replace it"), "search"),
    Fault("--image that is a bomb", CIR, lambda w: no_index(w) or ["--image", str(bomb(w.folder / "b.png", 30_000, 30_000))],
          ("b.png", "scale it down"), "search"),
    Fault("--gallery that is missing", CIR, None, ("nowhere", "no such folder"), "search", ("--gallery", "nowhere"), "any"),
    Fault("--gallery without pictures", CIR, None, ("captions", "no picture"), "search", ("--gallery", "data/captions"),
          "any"),
    Fault("--gallery of broken pictures", CIR, lambda w: [half(p) for p in (w.data / "img_raw/val").iterdir()] and
          ["--gallery", str(w.data / "img_raw/val")], ("img_raw/val", "not one"), "search", left="any"),
    Fault("page below a file", CIR, lambda w: no_index(w) or ["--out", w.beside("file", b"") + "/x"],
          ("file/x/search.html", "cannot be written"), "search"),
    Fault("index below a file", CIR, lambda w: (w.run / "galleries").write_bytes(b"") and None,
          ("galleries", "cannot be written"), "search",
          left="any"),
    Fault("disk full at the page", CIR, in_the_drawing("sitecustomize.py", FULL_AT.format("search.html")),
          ("search.html", "No space left", "python -m show.gallery"), "search", left="any"),
    Fault("package for the page is missing", CIR, in_the_drawing("jinja2.py", WITHOUT_JINJA2),
          ("jinja2", "requirements.txt", "python -m show.gallery"), "search", left="any"),

    # memory, numbers, processes
    *[Fault(f"memory runs out ({name})", BOTH, forward_fails(error), ("out of memory", "--batch-size 3"), left="begun")
      for name, error in (("GPU", MEMORY), ("machine", MemoryError()), ("allocator", ALLOCATOR))],
    Fault("memory runs out in validation", BOTH, on_script("validate", MEMORY), ("out of memory", "--batch-size 3"),
          left="begun"),
    Fault("memory runs out in scoring", CIR, fails(galleries, "encode", MEMORY), ("out of memory", "--batch-size 64"), "score"),
    Fault("memory runs out while loading", BOTH, on_script("load_model", MemoryError()), ("out of memory", "of this machine")),
    Fault("loss is NaN", BOTH, not_finite("loss"), ("loss is nan", "step 0", "--lr", "PLACE"), left="begun"),
    Fault("gradient is NaN", BOTH, not_finite("gradient"), ("gradient is nan", "step 0", "PLACE",
                                                            "best.pt and last.pt are as they were"),
          left="begun"),
    Fault("validation is NaN", BOTH, nan_validation, ("never finite", "--lr"), left="begun"),
    Fault("loader process is killed", BOTH, dying_loader, ("loader process", "--workers 0", "/dev/shm"),
          more=("--workers", "1"),
          left="begun"),
    Fault("Ctrl-C before the first step", BOTH, on_script("prepare", KeyboardInterrupt()), ("interrupted",), code=130),
    Fault("package for the log is missing", BOTH, without_module("tensorboard.summary.writer.record_writer"),
          ("tensorboard", "requirements.txt"), left="begun"),

    # flags
    Fault("unknown flag", BOTH, None, ("unrecognized arguments: --epoch-count",), more=("--epoch-count", "3")),
    *[wrong_flag(BOTH, flag, "False", "unrecognized arguments: False")
      for flag in ("--save-last", "--resume", "--check-data")],
    *[wrong_flag(BOTH, flag, value) for flag, value in (
        ("--epochs", "0"), ("--batch-size", "many"), ("--lr", "nan"), ("--lr", "-1"), ("--lr", "inf"), ("--workers", "-1"),
        ("--seed", "-1"),
        ("--precision", "int8"), ("--weight-decay", "-1"), ("--config", "nothing.yaml"), ("--skip-bad", "3"))],
    *[wrong_flag(CIR, flag, value) for flag, value in (
        ("--format", "coco"), ("--transform", "crop"), ("--target-ratio", "0"), ("--hard-set", "-1"), ("--hard-set", "7"),
        ("--hard-batch", "-1"),
        ("--loss-rtc", "nan"), ("--warmup", "3"), ("--validation-frequency", "0"), ("--top", "0"))],
    Fault("--submit of FashionIQ", CIR, None, ("--submit", "FashionIQ"), "score", ("--submit", "x", "--format", "fashioniq")),
    Fault("no --data", CIR, lambda w: ["--data", ""], ("--data is needed",)),
    *[wrong_flag(QFORMER, flag, value) for flag, value in (
        ("--val-share", "2"), ("--min-lr", "-1"), ("--warmup", "0.5"), ("--max-val", "0"), ("--rerank", "-1"))],
    wrong_flag(QFORMER, "--encoding", "klingon", "klingon", "utf-8"),
    *configs(BOTH),
]


def shift(folder, name):
    """Another value in this tensor."""
    state = load_file(folder / "model.safetensors")
    state[name] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def no_encoding(world):
    """What is wrong is to be found before anything is encoded."""
    fails(galleries, "encode", AssertionError("too late"))(world)


def no_index(world):
    fails(train_cir.picture_index, "open_index", AssertionError("too late"))(world)


def test_names_of_entries_are_distinct():
    refuse_twins(FAULTS)


@pytest.mark.parametrize("entry, kind", cases(FAULTS))
@pytest.mark.filterwarnings("ignore")
def test_fault(entry, kind, make_world, capsys):
    """One line, the right code, nothing run, nothing changed."""
    check(entry, make_world(kind), capsys)


# --- signals, and what looks bad and is good ------------

def make(finished, kind, folder, patch):
    """A World without the helpers of the table."""
    return kind(folder, finished[kind], patch)


@pytest.mark.parametrize("kind", CIR)  # loop.StopSignal is that of both
def test_second_signal_leaves_at_once(finished, kind, tmp_path, monkeypatch, forker):
    world = make(finished, kind, tmp_path, monkeypatch)
    shutil.copytree(world.finished / "run", world.run)
    program = f"""
import os, signal, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
import {kind.script.__name__} as script
def interrupted(run, *args):
    if run.step:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return step(run, *args)
step, script.train_step = script.train_step, interrupted
sys.exit(script.errors.exit_code(script.main, {world.resume()!r}))
"""
    before = {path.name: path.read_bytes() for path in world.run.glob("*.pt")}
    done, = forker.run(["-c", program])
    assert done.returncode == 130 and "once more to leave at once" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in world.run.glob("*.pt")} == before


@pytest.mark.parametrize("kind", BOTH)
def test_broken_validation_picture_leaves_a_last_pt(finished, kind, tmp_path, monkeypatch, capsys):
    """It is met after an epoch of training, which must not be lost; the repaired run ends as the undisturbed one."""
    world = make(finished, kind, tmp_path, monkeypatch)
    path = sorted(world.data.rglob("v*.png"))[-1]
    content, rehearse = path.read_bytes(), world.script.rehearse
    monkeypatch.setattr(world.script, "rehearse", lambda *args: rehearse(*args) or half(path))
    assert errors.exit_code(world.script.main, world.train()) == 2
    assert path.name in capsys.readouterr().err and (world.run / "last.pt").exists() and not world.best.exists()
    path.write_bytes(content)
    monkeypatch.setattr(world.script, "rehearse", rehearse)
    assert errors.exit_code(world.script.main, world.train("--resume")) == 0
    epochs = [row for row in runfolder.read_log(world.run / "training_log.csv") if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert errors.exit_code(world.script.main, world.train("--out", str(tmp_path / "whole"))) == 0
    whole, own = (checkpoints.load_checkpoint(place / "best.pt") for place in (tmp_path / "whole", world.run))
    assert whole["value"] == own["value"] and all(torch.equal(whole["state"][n], own["state"][n]) for n in whole["state"])


def test_config_of_a_run_serves_again(finished, tmp_path, monkeypatch):
    """args.yaml of a run gives the same settings, lists among them."""
    for kind in BOTH:
        place = tmp_path / kind.__name__
        place.mkdir()
        world = make(finished, kind, place, monkeypatch)
        world.run.mkdir()
        args = kind.script.get_args(world.train())
        runfolder.start_run(world.run, vars(args), __file__)
        again = kind.script.get_args(["--config", str(world.run / "args.yaml")])
        assert {**vars(again), "config": None} == vars(args)


def test_best_pt_becomes_a_folder(finished, tmp_path, monkeypatch):
    """--convert of one's own best.pt: what a full disk or a kill left undone."""
    world = make(finished, Qformer, tmp_path, monkeypatch)
    shutil.copytree(world.finished / "run", world.run)
    assert pretrain_qformer.main(world.convert()) is None
    written, state = published.read_weights(tmp_path / "converted/hf"), checkpoints.load_checkpoint(world.best)["state"]
    assert written.keys() == state.keys() and all(torch.equal(written[name], tensor) for name, tensor in state.items())


# --- what is tested elsewhere ------------

COVERED = {  # kind of bad input of the other scripts: entries of FAULTS, tests
    "list or folder missing": ["missing folder", "missing list", "split file is missing", "folder without a training file"],
    "empty list": ["empty list", "list without rows", "split file is empty"],
    "wrong columns or fields": ["rows that are numbers", "caption that is an object", "test_damaged_annotations",
                                "test_bad_fashioniq_rows",
                                "test_a_row_that_cannot_be_read_is_named"],
    "encoding": ["latin-1", "latin-1 captions", "list is no text", "split file is no text"],
    "empty caption": ["empty caption", "test_missing_pictures_and_empty_captions_stop_the_run_unless_they_are_few"],
    "missing picture": ["missing picture", "picture in no image root", "too many bad pictures"],
    "path out of the root": ["picture out of the root", "absolute picture", "picture that is a link out of the root",
                             "picture that is a URL",
                             "test_a_path_cannot_leave_the_root"],
    "broken picture": ["picture of 0 bytes", "cut pictures", "pages instead of pictures", "pictures that are bombs",
                       "cut pictures to be scored",
                       "test_a_broken_picture_stops_the_run_with_its_row", "test_broken_validation_picture_leaves_a_last_pt"],
    "tar files": ["half a shard", "broken picture in a shard", "open brace",
                  "test_a_broken_shard_is_named_and_left_out_only_on_request",
                  "test_no_member_of_a_shard_is_unpickled_unpacked_or_taken_for_a_path"],
    "no validation": ["no validation pictures", "tar files alone"],
    "model folder": ["empty folder as model", "model of another type", "half of the weights", "BLIP-2 with OPT",
                     "BLIP-2 with OPT as --init",
                     "--init of other sizes", "test_checkpoints_of_others_are_refused"],
    "tokenizer": ["tokenizer that is missing", "tokenizer of more words", "tokenizer without [CLS]"],
    "code in a file": ["code in --qformer (pickle)", "code in --init (zip)", "code in --convert (old)",
                       "code in best.pt (zip)",
                       "code in last.pt (pickle)", "code in a model folder", "code in a BERT"],
    "damaged checkpoint": ["half of best.pt", "half of last.pt", "flipped bit in last.pt", "hole in best.pt"],
    "checkpoint of another stage": ["stage 1 as best.pt", "last.pt of another script", "retrieval's best.pt to be converted"],
    "resume with other settings": ["resume with another batch size", "resume with another training row",
                                   "resume with tar files",
                                   "test_resume_refuses_other_settings_and_other_data"],
    "--out": ["folder of results", "run folder below a file", "second run in a folder", "page below a file",
              "converted below a file"],
    "full disk": ["disk too small", "disk full at best.pt", "disk full at hf", "disk full at the counts", "test_small_disk"],
    "config": ["config 'epochs_count: 3'", "config 'epochs: many'", "--config nothing.yaml", "test_defaults_of_init_and_data"],
    "NaN": ["loss is NaN", "gradient is NaN", "validation is NaN", "test_features_that_are_not_finite"],
    "loader process killed": ["loader process is killed"],
    "signals": ["Ctrl-C before the first step", "test_interrupted_and_resumed_equals_undisturbed",
                "test_second_signal_leaves_at_once"],
    "memory": ["memory runs out (GPU)", "memory runs out in scoring", "memory runs out while loading"],
    "search": ["--image that is missing", "--image that is a bomb", "--gallery without pictures", "test_all_broken"],
    "submission": ["--submit without test1", "--submit below a file", "test_check_submission_refuses"],
    "flags": ["unknown flag", "--lr nan", "--hard-set 7", "test_flags_that_do_not_go_together"],
    "packages": ["package for the log is missing", "package for tar files is missing",
                 "test_shards_without_the_package_say_how_to_get_it"],
}


def test_every_kind_is_covered():
    refuse_unknown(COVERED, FAULTS)
