"""flags.py: command lines: argparse with --config FILE.yaml, and the types of numbers."""

import argparse
import functools
import importlib.util
import math
import pathlib
import sys

import yaml

from engine.errors import DataError


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
        values = {name: _checked(actions[name], value, path) for name, value in settings.items()}
        # of a flag that may be given several times argparse would add the command line's values to the file's
        several = {name: values.pop(name) for name in settings if isinstance(actions[name], argparse._AppendAction)}
        parser.set_defaults(**values)
        for name in settings:
            actions[name].required = False
        args = parser.parse_args(argv)
        for name, value in several.items():
            setattr(args, name, getattr(args, name) or value)
        return args
    return parser.parse_args(argv)


@functools.cache
def load_script(path):
    """An edited copy of a script as a module, RUN ONCE. DataError where it is not there, or not Python."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or not pathlib.Path(path).is_file():
        raise DataError(f"--script {path}: there is no such Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # by name: loader processes may have to unpickle of it
    spec.loader.exec_module(module)
    return module


def positive(text):
    """argparse type: a whole number above 0."""
    return _bounded(int(text), 1)


def positive_or_auto(text):
    """argparse type: a whole number above 0, or auto: as many as fit."""
    return text if text == "auto" else positive(text)


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
