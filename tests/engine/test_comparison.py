"""pytest tests/engine/test_comparison.py: two evaluations of the same questions, compared in pairs."""

import json
import shutil

import pytest

import eval_gated
import metrics
from engine import comparison, errors

# three pictures; the third has one question, the others two
ROWS = [{"question_id": str(n), "image": image, "question": "style?", "answer": answer, "prediction": answer, "question_type": kind,
         "style": ""} for n, (image, answer, kind) in enumerate([("a.jpg", "Cubism", "style"), ("a.jpg", "two", "count"),
                                                                 ("b.jpg", "Pop Art", "style"), ("b.jpg", "one", "count"),
                                                                 ("c.jpg", "Cubism", "style")])]


def said(*predictions, rows=ROWS):
    return [{**row, "prediction": text} for row, text in zip(rows, predictions)]


def write(path, rows, csv=True):
    """The files of --predictions."""
    path.write_text(json.dumps([{"question_id": int(r["question_id"]), "answer": r["prediction"]} for r in rows]))
    if csv:
        comparison.files.write_csv(path.with_suffix(".csv"), [{**r, "confidence": "0.5"} for r in rows])
    return str(path)


def test_the_difference_is_paired_and_drawn_by_picture():
    ours, theirs = said("Cubism", "two", "Pop Art", "one", "wrong"), said("Cubism", "two", "wrong", "wrong", "wrong")
    found = comparison.compare(ROWS, comparison.hits(ours), comparison.hits(theirs))
    assert list(found) == ["count", "style", "all"]
    assert {kind: (one["n"], one["pictures"]) for kind, one in found.items()} == {"count": (2, 2), "style": (3, 3), "all": (5, 3)}
    assert [found["all"][side].value for side in ("ours", "theirs", "difference")] == [80, 40, 40]
    assert found["all"]["difference"] == metrics.paired_difference([100, 100, 100, 100, 0], [100, 100, 0, 0, 0], list("aabbc"))
    # b alone differs: a draw without it has no difference at all, one of b alone has 100
    assert (found["all"]["difference"].low, found["all"]["difference"].high) == (0, 100)
    own = comparison.compare(ROWS, [[100, 0]] * 5, [[0, 0]] * 5, {"first": [0, 1]})  # two seeds, own groups
    assert list(own) == ["first"] and own["first"]["difference"].value == 50 and own["first"]["pictures"] == 1


def test_rows_that_changed_are_listed_short_and_written_whole(tmp_path):
    ours, theirs, lines = said("Cubism", "three", "Pop Art", "two", "x"), said("x", "two", "Pop Art", "seven", "x"), []
    comparison.report(ours, theirs, "runs/a", "runs/b", tmp_path / "test.against", lines.append)
    told = "\n".join(lines)
    assert "3 of 5 answers differ: 1 gained, 1 lost, 1 neither" in told and "gained a.jpg: style? 'Cubism': 'Cubism', there 'x'" in told
    assert "lost   a.jpg: style? 'two': 'three', there 'two'" in told and "seven" not in told
    whole = comparison.read_table(tmp_path / "test.against.csv")
    assert [(r["change"], r["prediction"], r["other"]) for _, r in whole] == [
        ("gained", "Cubism", "x"), ("lost", "three", "two"), ("same", "Pop Art", "Pop Art"), ("neither", "two", "seven"),
        ("same", "x", "x")]
    numbers = json.loads((tmp_path / "test.against.json").read_text())
    assert numbers["exact match in percent"]["style"]["ours"]["value"] == pytest.approx(200 / 3) and numbers["theirs"] == "runs/b"


def test_files_are_read_whatever_their_order_and_other_questions_are_refused_in_a_line(tmp_path, capsys):
    one, other = write(tmp_path / "a.json", ROWS), write(tmp_path / "b.json", said("x", "two", "Pop Art", "one", "x")[::-1])
    bare = write(tmp_path / "bare.json", said("x", "two", "Pop Art", "one", "x"), csv=False)
    for theirs in (other, other.replace(".json", ".csv"), bare):
        assert not errors.exit_code(eval_gated.main, ["--predictions", one, "--against", theirs])
        assert "2 of 5 answers differ: 2 gained, 0 lost" in capsys.readouterr().out
    assert (tmp_path / "a.against.csv").is_file()
    assert not errors.exit_code(eval_gated.main, ["--predictions", bare, "--against", one])  # right answers on the other side alone
    assert "2 of 5 answers differ: 0 gained, 2 lost" in capsys.readouterr().out
    assert errors.exit_code(eval_gated.main, ["--predictions", bare, "--against", str(shutil.copy(bare, tmp_path / "c.json"))]) == 2
    assert "have no right answers: keep the FILE.csv" in capsys.readouterr().err
    spoilt = {"question_id 4 is not: compare": ROWS[:4],
              "question_id 2: question is": [*ROWS[:2], {**ROWS[2], "question": "who?"}, *ROWS[3:]],
              "question_id 0: image is": [{**ROWS[0], "image": "z.jpg"}, *ROWS[1:]],
              "question_id stands there twice": [*ROWS, ROWS[0]]}
    for wanted, rows in spoilt.items():
        write(tmp_path / "other.json", rows)
        assert errors.exit_code(eval_gated.main, ["--predictions", one, "--against", str(tmp_path / "other.json")]) == 2
        told = capsys.readouterr().err
        assert wanted in told and told.count("\n") == 1
    write(tmp_path / "other.json", said("y", "y", "y", "y", "y"), csv=False)  # its CSV is still of the evaluation before
    assert errors.exit_code(eval_gated.main, ["--predictions", one, "--against", str(tmp_path / "other.json")]) == 2
    assert "are of different evaluations" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--predictions", "a.json"], ["--against", "b.json"], ["--predictions", "a.json", "--against", "runs/b"],
                                  ["--predictions", "a.json", "--against", "b.json", "--report", "r.html"]])
def test_without_a_checkpoint_two_files_are_needed_and_nothing_else(argv, capsys):
    with pytest.raises(SystemExit):
        eval_gated.main(argv)
    assert "--checkpoint" in capsys.readouterr().err
