"""pytest tests/data/test_frames.py: a DataFrame or a list of dicts where Python is used; tables that are written for people."""

import csv
import io
from dataclasses import replace

import numpy as np
import pandas
import pytest
from PIL import Image

from data import questions, rows
from engine import files
from engine.errors import DataError

TABLE = ("image,question,answer,question_type,style\n"
         'a.png,"What, is it?",007,what,Cubism\n'
         "b.png,Which style?,None,style,NA\n"
         'a.png,"Two\nlines?",,what,\n')


@pytest.fixture
def place(tmp_path):
    """Folder with train.csv and its two pictures."""
    (tmp_path / "images").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"images/{name}.png")
    (tmp_path / "train.csv").write_text(TABLE)
    return tmp_path


def quiet(*words):
    """In place of print."""


def frame():
    return pandas.read_csv(io.StringIO(TABLE), dtype=str, keep_default_na=False)


def unplaced(found):
    """Rows without where they stand."""
    return [replace(row, file="", line=0) for row in found]


@pytest.mark.parametrize("kind, table", [("DataFrame", frame()), ("list of dicts", frame().to_dict("records"))])
def test_the_rows_are_those_of_the_csv(place, kind, table):
    found, wanted = rows.read_split(table, "train", images=place / "images"), rows.read_split(place, "train")
    assert len(found) == 3 and unplaced(found) == unplaced(wanted)
    assert found[0].answer == "007" and found[1].answer == "None" and found[2].question == "Two\nlines?"
    assert [(row.file, row.line) for row in found] == [("the table", 1), ("the table", 2), ("the table", 3)]
    assert rows.describe_layout(table, "train", images=place / "images").startswith(f"the table: ArtQuest-like {kind}, 3 rows")


def test_numbers_are_text_and_what_is_missing_is_empty(place):
    wanted = [("3", "1"), ("", "2"), ("true", "3")]
    for missing in (None, float("nan"), pandas.NA, np.float64("nan")):
        table = [{"image": "a.png", "question": "q", "answer": answer, "question_id": number}
                 for answer, number in ((np.int64(3), 1), (missing, np.int64(2)), (True, 3))]
        for source in (pandas.DataFrame(table), table if missing is not pandas.NA else pandas.DataFrame(table)):
            assert [(row.answer, row.question_id) for row in rows.read_split(source, "train", images=place / "images")] == wanted


def test_questions_are_read_from_a_frame_as_from_its_csv(place):
    table = frame().iloc[:2]
    (place / "train.csv").write_text(TABLE[:TABLE.index("a.png,\"Two")])
    found = questions.read_questions(table, "train", images=place / "images", log=quiet)
    assert unplaced(found) == unplaced(questions.read_questions(place, "train", log=quiet)) and len(found) == 2
    held = [questions.read_questions(table, split, images=place / "images", val_share=0.5, log=quiet)
            for split in ("train", "val")]
    assert [len(part) for part in held] == [1, 1]
    with pytest.raises(DataError, match="the table is one table, of which 50% of the pictures"):
        questions.read_questions(table, "test", images=place / "images", val_share=0.5, log=quiet)


@pytest.mark.parametrize("table, words", [
    (frame().drop(columns="answer"), "the table: no column 'answer' for the answer"),
    (frame().drop(columns="answer").to_dict("records"), "the table: no column 'answer' for the answer"),
    ([{"image": "a.png", "question": "q", "answer": "a"}, {"image": "a.png", "question": "q"}], "the table, row 2: no 'answer'"),
    ([{"image": "a.png", "question": "q", "answer": {"b": "c"}}], "the table, row 1: 'answer' is"),
    (pandas.DataFrame([["a.png", "q", "x", "y"]], columns=["image", "question", "answer", "answer"]), "'answer' stands there twice"),
    ([], "the table: no rows"), (frame().iloc[:0], "the table: no rows"), ({"image": ["a.png"]}, "the table: dict where"),
    ([["a.png", "q"]], "the table: list where"), (7, "the table: int where")])
def test_a_bad_table_is_one_error(place, table, words):
    with pytest.raises(DataError) as error:
        rows.read_split(table, "train", images=place / "images")
    assert str(error.value).startswith(words) or words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_for_people_is_what_csv_writes(tmp_path):
    table = [{"id": 1, "text": 'a "quoted", one', "n": "007"}, {"id": "x2", "text": "None", "n": "NA"},
             {"id": 3, "text": "two\nlines", "n": ""}]
    files.write_csv(tmp_path / "t.csv", table)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "text", "n"])
    writer.writeheader()
    writer.writerows(table)
    assert (tmp_path / "t.csv").read_bytes() == text.getvalue().encode()
    files.write_csv(tmp_path / "t.csv", [{"answer": "a\0b", "n": 1}])  # Python 3.10 refuses to write it
    assert (tmp_path / "t.csv").read_bytes() == "answer,n\r\na\ufffdb,1\r\n".encode()


def test_no_start_pays_for_pandas(forker):
    """What a table is written or read with is imported when that happens."""
    program = "import sys, engine.files, data.questions, data.rows, data.tables; sys.exit('pandas' in sys.modules)"
    assert forker.run(["-c", program], cwd=files.PROJECT)[0].returncode == 0
