"""pytest tests/test_house.py: the rooms of the project, and that imports run downwards only.

    python -m tests.test_house     # every module on its floor, and what it imports

A module may import what stands on a lower floor, and on its own floor what does not lead back to it. All imports count, also
those inside functions. The checker reads source texts alone; each rule is seen to fail on a fault that is planted in a copy.
"""

import ast
import functools
import pathlib
import re
import shutil
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("data", "engine", "show", "tools")
TRAINING = ("train_gated", "efficientnet_pretrain", "train_blip_caption", "train_cir", "pretrain_qformer", "pretrain_stage2")
FLOORS = (("engine.errors", "engine.files", "engine.text"), ("data.*",), ("metrics",), ("engine.*",), ("core",),
          ("show.*",), (*TRAINING, "eval_gated", "demo", "test_gated_fusion"), ("tools.*",))
DEMONSTRATES = "demo"  # the one stage that imports training scripts
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml"}  # names of imports that are not those in requirements.txt
COME_WITH = {"huggingface_hub": "transformers", "tokenizers": "transformers", "packaging": "transformers"}
ON_DEMAND = ("gradio", "starlette", "faiss", "gguf", "openpyxl", "pyarrow", "pycocoevalcap")  # a message or the Makefile brings them


# --- reading ------------

def modules(root):
    """{dotted name: path} of everything but the tests."""
    paths = [*root.glob("*.py"), *(path for room in ROOMS for path in (root / room).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(paths) if path.name != "__init__.py"}


@functools.cache
def parsed(text):
    return ast.parse(text)


def called(node):
    """The name of what is called, without what stands before its last dot."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


@functools.cache
def asked_for(text, name):
    """The set of names that named_in finds."""
    return frozenset(named_in(parsed(text), name))


def named_in(tree, name):
    """Every dotted name that some import in a module asks for; a name taken out of a module counts as well as the module."""
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" if base else alias.name for alias in node.names))
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield from (one.value for one in node.args[:1] if isinstance(one, ast.Constant) and isinstance(one.value, str))


def imports(root):
    """{module: the modules of the project that it imports}."""
    known = modules(root)
    return {name: {one for one in asked_for(path.read_text(encoding="utf-8"), name) if one in known and one != name}
            for name, path in known.items()}


def floor_of(name):
    """Its number from the ground, None where it has no place yet. A name of its own goes before a whole room."""
    room = f"{name.split('.')[0]}.*" if "." in name else None
    return next((number for wanted in (name, room) for number, names in enumerate(FLOORS) if wanted in names), None)


# --- rules: each gives a line for every fault ------------

def upward(graph):
    for name, used in graph.items():
        if floor_of(name) is None:
            yield f"{name} has no floor: give it one in tests/test_house.py"
        for other in used:
            if None not in (floor_of(name), floor_of(other)) and floor_of(other) > floor_of(name):
                yield f"{name} (floor {floor_of(name)}) imports {other} (floor {floor_of(other)})"


def circles(graph):
    """One line for each module from which imports lead back to itself."""
    for name in graph:
        seen, waiting = set(), list(graph[name])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += graph.get(other, ())
        if name in seen:
            yield f"{name} imports itself over {', '.join(sorted(one for one in seen if name in graph.get(one, ())))}"


def show_in_training(graph):
    for name in TRAINING:
        yield from (f"{name} trains and imports {other}" for other in graph.get(name, ())
                    if other.startswith("show."))


def tools_imported(graph):
    yield from (f"{name} imports {other}" for name, used in graph.items() for other in used
                if other.startswith("tools.") and not name.startswith("tools."))


def training_imported(graph):
    yield from (f"{name} imports the training script {other}" for name, used in graph.items() for other in used
                if other in TRAINING and name != DEMONSTRATES and not name.startswith("tools."))


def namespaces(root):
    """Functions below the scripts that take argparse's Namespace: what lies there takes values by name."""
    for name, path in modules(root).items():
        if name.split(".")[0] not in ("data", "engine", "show", "core", "metrics"):
            continue
        for line in takers(path.read_text(encoding="utf-8")):
            yield f"{name}, line {line}: a function takes argparse's Namespace"


@functools.cache
def takers(text):
    """The lines of the functions that take it."""
    lines = []
    for node in ast.walk(parsed(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any(one.arg == "args" or one.annotation and "Namespace" in ast.unparse(one.annotation) for one in taken):
                lines.append(node.lineno)
    return lines


def packages(root):
    """Packages of others that are imported and that requirements.txt does not bring: a new user has not got them."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    brought = {re.split("[<>=]", line)[0] for line in lines if line and not line.startswith("#")}
    inside = {*sys.stdlib_module_names, *ROOMS, *(name.split(".")[0] for name in modules(root)), *ON_DEMAND, ""}
    for name, path in modules(root).items():
        for other in sorted({one.split(".")[0] for one in asked_for(path.read_text(encoding="utf-8"), name)} - inside):
            if COME_WITH.get(other, PACKAGES.get(other, other)) not in brought:
                yield f"{name} imports the package {other}, which requirements.txt does not bring"


def faults(root):
    graph = imports(root)
    rules = (upward, circles, show_in_training, tools_imported, training_imported)
    return [*(fault for rule in rules for fault in rule(graph)), *namespaces(root), *packages(root)]


# --- the house, and planted faults ------------

def test_imports_run_downwards():
    assert faults(ROOT) == []


@pytest.fixture
def copy(tmp_path):
    """Function that adds lines to a module of a copy of the project -> the faults that are found then."""
    for path in modules(ROOT).values():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)

    def plant(module, text):
        with (tmp_path / (module.replace(".", "/") + ".py")).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{text}\n")
        return faults(tmp_path)

    return plant


@pytest.mark.parametrize("module, text, wanted", [
    ("engine.loaders", "import engine.loop", "engine.loaders imports itself over engine.loop"),  # loop has loaders
    ("data.tables", "def late():\n    from data import captions", "data.tables imports itself over data."),
    ("engine.loop", "def late():\n    from core import EfficientNet28", "engine.loop (floor 3) imports core (floor 4)"),
    ("metrics", "def late():\n    import importlib\n    return importlib.import_module('engine.cache')",
     "metrics (floor 2) imports engine.cache"),
    ("data.rows", "from . import shards\nfrom ..engine import cache", "data.rows (floor 1) imports engine.cache (floor 3)"),
    ("core", "if True:\n    import show.report", "core (floor 4) imports show.report (floor 5)"),
    ("train_gated", "from show import maps", "train_gated trains and imports show.maps"),
    ("train_gated", "def late():\n    from show.report import write", "train_gated trains and imports show.report"),
    ("pretrain_qformer", "def late():\n    import show.sharing as told", "pretrain_qformer trains and imports show.sharing"),
    ("eval_gated", "def late():\n    from tools import bench", "eval_gated imports tools.bench"),
    ("data.rows", "from tools.drawing import STYLES", "data.rows imports tools.drawing"),
    ("eval_gated", "from train_gated import get_args", "eval_gated imports the training script train_gated"),
    ("train_cir", "def late():\n    __import__('pretrain_qformer')", "train_cir imports the training script pretrain_qformer"),
    ("show.maps", "def drawn(model, args):\n    return args.maps", "show.maps, line"),
    ("engine.cache", "import argparse\n\n\ndef kept(flags: argparse.Namespace):\n    return flags", "engine.cache, line"),
    ("engine.files", "def late():\n    import polars", "engine.files imports the package polars"),
    ("another_stage", "import core", "another_stage has no floor")])
def test_a_planted_fault_is_found(copy, module, text, wanted):
    assert [fault for fault in copy(module, text) if fault.startswith(wanted)], wanted


def main():
    """The import graph by floors, from the ground, and its faults."""
    graph = imports(ROOT)
    for number in range(len(FLOORS)):
        print(f"floor {number}")
        for name in (name for name in graph if floor_of(name) == number):
            print(f"    {name:24} {', '.join(sorted(graph[name])) or '-'}")
    found = faults(ROOT)
    print(*(found or ["no fault"]), sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
