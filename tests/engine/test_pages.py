"""pytest tests/engine/test_pages.py: results files and the commands of show/ that draw from them."""

import contextlib
import importlib
import io
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import cirr
from data.captions import Picture
from engine import captioning, errors, pages, retrieval
from engine.errors import DataError
from show import gallery, report

PANELS = [("loss", [("step", "loss", "training")])]
MADE = [("checkpoint", "best.pt"), ("date", "today")]


@pytest.fixture
def draw_here(monkeypatch):
    """For tests of what is drawn: `pages.draw` runs its command in this process, since one of its own imports for seconds. The process
    itself is tested below."""
    def run(command, **how):
        python, module, name, *argv = command
        assert (python, module) == (sys.executable, "-m") and os.path.isabs(argv[0])  # else its working directory would count
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = errors.exit_code(importlib.import_module(name).main, argv)
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(pages, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def pictures(tmp_path):
    """Paths of four pictures, one of them with a name that is no UTF-8."""
    paths = [os.path.join(tmp_path, name) for name in ("0.png", "1.png", "2.png", os.fsdecode(b"\xff3.png"))]
    for number, path in enumerate(paths):
        Image.new("RGB", (40, 30), (60 * number, 90, 200)).save(path)
    return paths


@pytest.fixture
def log(tmp_path):
    (tmp_path / "training_log.csv").write_text("kind,step,loss\nstep,1,3.5\nstep,2,2.25\n")
    return str(tmp_path / "training_log.csv")


def same_page(tmp_path, parts, title):
    """The page that the command draws is that of the parts, to the byte. But for one name: once a test has loaded WordNet, this process
    keeps it, and the command's never had it."""
    report.write(tmp_path / "direct.html", title, parts)
    drawn, direct = ((tmp_path / name).read_bytes().replace(b"METEOR (no WordNet)", b"METEOR") for name in ("page.html", "direct.html"))
    assert drawn == direct


def test_the_page_of_captions_is_that_of_their_results(tmp_path, pictures, log, capsys):
    rows = [Picture(path, f"{n}.png", (f"a <b>cat</b> number {n}", "an animal"), n, "f") for n, path in enumerate(pictures)]
    systems = {"untrained": [{"caption": ""}] * 4,
               "trained": [{"row": n, "caption": f"a cat number {n} \udcff", "confidence": -0.1 * n} for n in range(4)]}
    file = captioning.write_results(tmp_path / "page.html", "a title", rows, systems, log=log, panels=PANELS, made=MADE)
    assert file == tmp_path / "page.results.json"
    pages.draw("report", tmp_path / "page.html")
    assert capsys.readouterr().out == f"report: {tmp_path / 'page.html'}\n"
    same_page(tmp_path, report.captions(rows, systems, log, PANELS, [report.made_table(MADE)]),
              f"a title: {report.caption_outcome(rows, systems)}")
    captioning.write_results(tmp_path / "page.html", "cases", rows, {"the model": systems["trained"]}, 1)
    assert report.main([str(file)]) is None
    same_page(tmp_path, report.caption_cases(rows, [one["caption"] for one in systems["trained"]], 1),
              f"cases: {report.caption_outcome(rows, {'the model': systems['trained']})}")


@pytest.mark.parametrize("members", (("a", "b", "c", "d"), ()))
def test_the_page_of_retrieval_is_that_of_its_results(tmp_path, pictures, log, members):
    shelf = dict(zip("abcdefg", [*pictures, *pictures[:3]]))
    inner = (*members, "e", "f") if members else ()
    queries = [cirr.Query(str(n), one, other, (f"change <i>{n}", "too"), inner, "f", n) for n, (one, other) in enumerate(("ab", "cd"))]
    pool = cirr.Pool("cirr" if members else "dress", queries, shelf, "val", "f")
    scores = np.random.default_rng(0).random((2, 7), np.float32)
    retrieval.write_results(tmp_path / "page.html", "a title", [pool], [scores], log=log, panels=PANELS, made=MADE)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [sys.executable, "-m", "show.report", str(tmp_path / "page.results.json")]
    there = {**os.environ, "PYTHONPATH": str(pages.files.PROJECT)}
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=there)
    assert process.returncode == 0 and process.stdout == f"{tmp_path / 'page.html'}\n", process.stderr
    found = [(pool, retrieval.rank_queries(pool, scores))]
    same_page(tmp_path, report.retrieval(found, log, PANELS, [report.made_table(MADE)]), f"a title: {report.retrieval_outcome(found)}")


def test_queries_are_ranked_without_their_reference_in_cirr_alone():
    """Worked out by hand: the reference a scores best of all, the target c comes after b."""
    for name, members, wanted in (("cirr", tuple("abcdef"), {"rank": 2, "subset_rank": 2, "best": list("bcdef"), "margin": -0.25}),
                                  ("dress", (), {"rank": 3, "subset_rank": None, "best": list("abcde"), "margin": -0.5})):
        pool = cirr.Pool(name, [cirr.Query("1", "a", "c", ("x",), members, "f", 1)], dict.fromkeys("abcdef", "p"), "val", "f")
        one, = retrieval.rank_queries(pool, np.array([[1.0, 0.75, 0.5, 0.25, 0.125, 0.0]], np.float32))
        assert one == {**wanted, "score": 0.5}


def test_what_a_search_found_is_drawn_from_its_results(tmp_path, pictures):
    hits, page = [(path, os.path.basename(path), 0.5) for path in pictures], tmp_path / "search.html"
    pages.write_results(page, "search", "title", reference=pictures[0], text="<b>red</b>", hits=hits, note="4 pictures")
    pages.draw("gallery", page)
    gallery.write_page(tmp_path / "direct.html", "title", pictures[0], "<b>red</b>", hits, "4 pictures")
    assert page.read_bytes() == (tmp_path / "direct.html").read_bytes()


def test_gate_maps_are_drawn_from_their_results(tmp_path, pictures):
    heat = np.array([[0.0, 0.5], [0.25, 1.0]], np.float32)
    one = {"file": "7.png", "reference": pictures[0], "heat": heat.tolist(), "text": "red", "target": pictures[1],
           "found": [(pictures[2], False), (pictures[1], True)]}
    folder = tmp_path / "maps"
    pages.write_results(folder / "cirr.png", "gate maps", "t", preparation=(28, "targetpad", 1.25), maps=[one])
    assert gallery.main([str(folder / "cirr.results.json")]) is None
    seen = gallery.rows.tensor_image(cirr.prepare(gallery.rows.load_image(pictures[0]), 28, "targetpad", 1.25))
    gallery.draw_gate_map(tmp_path / "direct.png", seen, heat, "red", pictures[1], one["found"])
    assert (np.asarray(Image.open(folder / "7.png")) == np.asarray(Image.open(tmp_path / "direct.png"))).all()


def test_a_page_that_fails_is_one_error_with_the_command_and_keeps_the_results(tmp_path):
    page = tmp_path / "p.html"
    file = pages.write_results(page, "search", "t", reference="x", text="", hits=[], note="")
    page.mkdir()  # what is drawn cannot take its place
    with pytest.raises(DataError) as error:
        pages.draw("gallery", page)
    told = str(error.value)
    assert told.startswith(f"{page} is not drawn (") and told.endswith(f"python -m show.gallery {file}") and "\n" not in told
    assert file.is_file()
    with pytest.raises(DataError, match="draws captions, retrieval"):  # of another command
        pages.draw("report", page)
    with pytest.raises(DataError, match="none.html is not drawn: no epoch"):
        pages.draw("report", tmp_path / "none.html")
    pages.write_results(page, "retrieval", "runs/a/best.pt: val", pools=[])
    with pytest.raises(DataError, match="is not drawn: no epoch was the best since"):  # what lies there is of another run
        pages.draw("report", page, of="runs/b/best.pt")


@pytest.mark.parametrize("text, reason", [
    ("", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"), (json.dumps({"kind": "poem", "page": "p.html"}), "'poem'")])
def test_what_is_no_results_file_is_one_error(tmp_path, text, reason, capsys):
    path = tmp_path / "x.results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        pages.read_results(path, ["search"])
    assert errors.exit_code(gallery.main, [str(path)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_numbers_come_back_as_they_were(tmp_path):
    values = [0.1, 1 / 3, float(np.float32(0.1)), math.inf]
    path = pages.write_results(tmp_path / "p.html", "search", "t", values=values)
    assert pages.read_results(path, ["search"])["values"] == values
