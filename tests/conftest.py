"""Shared by all tests: random tiny weights in the published formats, a small drawn data set, all of it offline."""

import contextlib
import copy
import csv
import functools
import gc
import importlib.metadata
import json
import logging
import os
import pathlib
import shutil
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = pathlib.Path(__file__).resolve().parent.parent
# tests take helpers from each other, whichever room they are in
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), *(str(ROOT / "tests" / room) for room in ("data", "engine", "show", "tools"))]

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

pytest.register_assert_rewrite("faults")

import loaded  # noqa: E402, F401  (before core, which takes load_published by its name)
import core  # noqa: E402
import forked  # noqa: E402
from engine import decoders, loop, published, runfolder  # noqa: E402
from tools import assemble, make_sample, make_tiny  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

# every run asks for the versions of twenty packages, and every answer means reading a file of thousands of lines again
importlib.metadata.version = functools.cache(importlib.metadata.version)

# each look for cycles goes through what torch and transformers hold, and a run makes enough objects for fifty of them
gc.set_threshold(20_000, 20, 10)
gc.freeze()  # and what is imported by now stays anyway

# files that take long, the longest first: begun last, one of them would keep one process busy while the others have nothing left
LONG = ("test_scripts.py", "test_decoders.py", "test_retrieval_faults.py", "test_qformer.py", "test_cir.py", "test_converted_folders.py",
        "test_kill.py", "test_faults.py", "test_blip_caption.py", "test_readme.py", "test_efficientnet_pretrain.py", "test_demo.py",
        "test_bench.py", "test_sharing.py", "test_other_faults.py", "test_assemble.py", "test_tiny.py", "test_lean.py", "test_maps.py",
        "test_core.py", "test_cache.py", "test_towers.py", "test_missing.py", "test_golden.py")


def pytest_configure(config):
    config.option.loadscopereorder = False  # else xdist begins with the files of the most tests, and ends with those that take long


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A drawn ArtQuest-like folder of 64 pictures."""
    folder = tmp_path_factory.mktemp("sample") / "artquest"
    make_sample.main(["--out", str(folder), "--pictures", "64"])
    return folder


@pytest.fixture(scope="session")
def few(sample, tmp_path_factory):
    """A fifth of the sample, in which every style is trained: runs cost as much less, and do the same."""
    folder = tmp_path_factory.mktemp("few") / "artquest"
    (folder / "images").mkdir(parents=True)
    shutil.copy(sample / "style_class.txt", folder)
    for split, pictures in (("train", 8), ("val", 3), ("test", 3)):
        with (sample / f"{split}.csv").open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        one_of_each = {row["style"]: row["image"] for row in reversed(table)}.values()
        names = list(dict.fromkeys([*one_of_each, *(row["image"] for row in table)]))[:pictures]
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(row for row in table if row["image"] in names)
        captions = json.loads((sample / f"{split}_captions.json").read_text(encoding="utf-8"))
        (folder / f"{split}_captions.json").write_text(json.dumps({name: captions[name] for name in captions if name in names}))
        lines = (sample / f"style_{split}.csv").read_text().splitlines(keepends=True)
        (folder / f"style_{split}.csv").write_text("".join(line for line in lines if pathlib.PurePath(line.split(",")[0]).name in names))
        for name in names:
            shutil.copy(sample / "images" / name, folder / "images")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(BLIP-2 folder, EfficientNet checkpoint) with random weights."""
    return random_models(tmp_path_factory.mktemp("tiny"))


def random_models(folder, **sizes):
    """(BLIP-2 folder, EfficientNet checkpoint) with random weights; sizes: of make_tiny.save_random, where others are needed."""
    loop.seed_everything(0)
    texts = [core.PROMPT.format(q) + f" {a}\n" for _, q, a in make_tiny.style_sentences()]
    return make_tiny.save_random(folder, texts, **sizes)


@pytest.fixture(scope="session")
def forker():
    """Runs a script of the project in a process of its own: forker.run([script, argument, ...]) -> CompletedProcess."""
    one = forked.Forker()
    yield one
    one.close()


def random_weights(arch, folder):
    """A file of timm's random weights of a net, at the size of its pretraining; a batch norm's statistics are no longer 0 and 1."""
    import timm
    path = pathlib.Path(folder) / f"{arch}.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        state = timm.create_model(arch).state_dict()
        for name, tensor in state.items():
            if name.endswith(("running_mean", "running_var")):
                tensor.add_(torch.rand(tensor.shape, generator=generator))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="session")
def lm_folder(tiny, tmp_path_factory):
    """The tiny BLIP-2's OPT by itself."""
    folder = tmp_path_factory.mktemp("lm") / "opt"
    model, tokenizer = published.load_blip2(tiny[0])
    model.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    from test_readme import save_bert
    folder = tmp_path_factory.mktemp("bert") / "bert"
    torch.manual_seed(0)
    save_bert(published.tiny("blip2-itm"), folder)
    return str(folder)


@pytest.fixture(scope="session")
def assembled(lm_folder, bert_folder, tmp_path_factory):
    """Function that assembles a folder with a timm tower of random weights, once each."""
    place, made = tmp_path_factory.mktemp("assembled"), {}

    def make(arch="test_efficientnet"):
        if arch not in made:
            assemble.main(["--vision", f"timm:{arch}", "--vision-weights", str(random_weights(arch, place)), "--lm", lm_folder,
                           "--qformer", bert_folder, "--queries", "4", "--out", str(place / f"blip2-{arch}")])
            made[arch] = str(place / f"blip2-{arch}")
        return made[arch]
    return make


BEFORE_5 = decoders.BEFORE_5
BUILT = {}  # arguments of `build` -> (model, torch's random state after building it)


@pytest.fixture
def build(tiny):
    """Function that builds a Blip2OPTGated from the random tiny weights, in eval mode. Reading them takes a second, a copy of what
    was built before none; the random numbers that follow are those that follow building."""
    def build_model(styles=("Cubism", "Pointillism", "Pop Art"), **settings):
        loop.seed_everything(1)
        key = (*sorted(styles), *sorted(settings.items()))
        if key not in BUILT:
            BUILT[key] = core.Blip2OPTGated.build(*tiny, sorted(styles), **settings).eval(), torch.get_rng_state()
        model, state = BUILT[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)
    return build_model


@pytest.fixture
def no_warning(monkeypatch):
    """Until the test ends a warning is an error: Python's, torch's that are said once a process, and what any library logs."""
    class Refusing(logging.Handler):
        def emit(self, record):
            raise AssertionError(f"{record.name} logs: {record.getMessage()}")

    refusing, loggers = Refusing(logging.WARNING), [logging.getLogger(), transformers.logging.get_logger()]  # its own ends there
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning)  # else one of an earlier test is not said again
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    for logger in loggers:
        logger.addHandler(refusing)
    gc.collect()  # files that earlier tests have left open are told now
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    for logger in loggers:
        logger.removeHandler(refusing)
    torch.set_warn_always(always)


@pytest.fixture
def batch(build):
    """Three questions of different length with random images, ready for forward."""
    generator = torch.Generator().manual_seed(3)
    tokenizer = build(gating="none").tokenizer
    encoded = core.encode_training(tokenizer, ["Which style is this painting?", "How many boats can be seen in the water?", "Colour?"],
                                   ["Pop Art", "three", "red"])
    return {**encoded, "images": torch.randn(3, 3, make_tiny.RANDOM_SIZE, make_tiny.RANDOM_SIZE, generator=generator),
            "style": torch.tensor([2, 0, -1]), "hit_rows": torch.tensor([True, False, False])}


@pytest.fixture
def no_curves(monkeypatch):
    """curves.png takes longer to draw than such a run to train. -> what draws it"""
    draw_curves = runfolder.draw_curves
    monkeypatch.setattr(runfolder, "draw_curves", lambda *args: None)
    return draw_curves


@pytest.fixture
def flags(few, tiny, tmp_path, no_curves):
    """Command line of a short run; add your own after it."""
    def make(*more, out="run"):
        return ["--data", str(few), "--blip2", tiny[0], "--efficientnet", tiny[1], "--epochs", "2", "--batch-size", "4",
                "--accumulation", "2", "--lr", "1e-3", "--workers", "0", "--precision", "no", "--out", str(tmp_path / out), *more]
    return make


def prepared(args):
    """(Run, Parts) of train_gated.py at the first step of a training with these flags."""
    import train_gated
    return train_gated.prepare(args, train_gated.start(args))


@pytest.fixture
def make_world(finished, tmp_path, monkeypatch):
    """Function that makes the World of one entry of faults.py, with the current folder in it. finished: {kind of World: its folder}."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with contextlib.ExitStack() as cleanup:
        def make(kind):
            world = kind(tmp_path, finished[kind], monkeypatch)
            world.cleanup, world.others = cleanup, finished
            return world
        yield make
