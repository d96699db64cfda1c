"""pages.py: what an evaluation has found, as a file from which show/ draws, and the start of the command that does.

    write_results    PAGE.html's results -> PAGE.results.json beside it; read_results reads one
    draw             starts `python -m show.report PAGE.results.json` (or show.gallery) in a process of its own

A training script draws nothing itself: a page that fails costs no run, and the same command draws it again whenever it is wanted.
"""

import json
import os
import pathlib
import subprocess
import sys

from engine import files
from engine.errors import DataError


def results_file(page):
    """Where the results of a page stand: page.html -> page.results.json beside it."""
    return pathlib.Path(page).with_suffix(".results.json")


def write_results(page, kind, title, **content):
    """The results that `page` is drawn from -> their file. kind: what they are, see show/; content: plain values, with the paths of
    pictures from the root, so that the page can be drawn from any folder."""
    path = results_file(page)
    with files.whole_file(path) as file:
        json.dump({"kind": kind, "title": title, "page": pathlib.Path(page).name, **content}, file)
    return path


def read_results(path, kinds):
    """The content of a results file of one of the `kinds`, "page" as a path beside it. DataError: it is none."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if content["kind"] in kinds:
            return {**content, "page": pathlib.Path(path).with_name(content["page"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no results of a training script ({type(error).__name__}: {error})") from None
    raise DataError(f"{path}: results of kind {content['kind']!r}: this command draws {', '.join(kinds)}")


def draw(room, page, done=None, log=print, of=None):
    """Draw a page whose results are written, by `python -m show.ROOM PAGE.results.json`.

    done: the line where it goes well ("report: PAGE"). of: the best.pt that the results must be of; None: of any. DataError: why not,
    with the command that draws it later."""
    there = results_file(page).is_file()
    if there and of:
        there = json.loads(results_file(page).read_text(encoding="utf-8")).get("title", "").startswith(f"{of}: ")
    if not there:
        raise DataError(f"{page} is not drawn: no epoch was the best since it is asked for; --checkpoint evaluates best.pt and draws it")
    command = ["-m", f"show.{room}", os.path.abspath(results_file(page))]
    process = subprocess.run([sys.executable, *command], cwd=files.PROJECT, capture_output=True, text=True, errors="replace")
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1].removeprefix("error: ")
        raise DataError(f"{page} is not drawn ({reason}), its results are kept: in {files.PROJECT}, python {' '.join(command)}")
    log(done or f"report: {page}")
