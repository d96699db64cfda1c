"""flags.py: command lines: argparse with a help of two screens and --config FILE.yaml, and the types of numbers."""

import argparse
import functools
import importlib.util
import math
import pathlib
import shutil
import sys

import yaml

from engine.errors import DataError


class Help(argparse.RawDescriptionHelpFormatter):
    """A short --help: one line of usage, N and X for whole and other numbers, as wide as the terminal (120 columns in a file)."""

    def __init__(self, prog, **others):
        super().__init__(prog, max_help_position=27, width=min(shutil.get_terminal_size((120, 40)).columns, 142) - 2, **others)

    def _get_default_metavar_for_optional(self, action):
        return {positive: "N", whole: "N", int: "N", share: "X", rate: "X", weight: "X", float: "X"}.get(action.type, "TEXT")


def make_parser(doc):
    """An ArgumentParser for a script whose docstring is `doc`."""
    return argparse.ArgumentParser(description=doc, formatter_class=Help, usage="%(prog)s [flags]")


def put_first(parser, *names):
    """Show these flags first in --help, in this order, as those that everyone needs; all others stay in their groups."""
    taken = [parser._option_string_actions[name] for name in (*names, "--help")]
    for group in parser._action_groups:
        group._group_actions[:] = [action for action in group._group_actions if action not in taken]
    first = parser.add_argument_group("what everyone needs")
    first._group_actions.extend(taken)
    parser._action_groups.insert(0, parser._action_groups.pop())
    needed = "".join(f" {action.option_strings[0]} {action.metavar}" for action in parser._actions if action.required)
    parser.usage = f"%(prog)s{needed} [flags]"


def show_passed_on(parser, title, others, *names):
    """Show flags of another script's parser in this one's --help, which leaves them alone (parse_known_args)."""
    parser.add_argument_group(title)._group_actions.extend(others._option_string_actions[name] for name in names)


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
