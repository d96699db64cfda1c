"""pytest tests/engine/test_folders.py: a folder of pictures in, a table out: kills, names, damage, broken pictures. Behaviour-checked.

The scripts that use it are tested in test_scripts.py (--ask) and test_blip_caption.py (--captions)."""

import csv
import os
import shutil

import pytest
import torch
from filelock import FileLock
from PIL import Image

from data import rows
from engine import cache, files, folders
from engine.errors import DataError

COLUMNS = ("image", "question", "answer", "confidence")
MADE_WITH = {"checkpoint (sha256)": "ab", "beams": 5, "--abstain-below": None, "layers": (1, 2)}
NAMES = ["plain.jpg", "=cmd|' -C calc'!A0.jpg", "+1.jpg", "@a.jpg", "-a.jpg", 'a,"b"\r\nc".jpg', "\r.jpg", "\n.jpg", " lead.jpg",
         "Öl 画.jpg", "''.jpg"]
ASKED = [("Which style, \"this\"?",), ("What\nis it?",)]
KEYS = [(name, *question) for name in NAMES for question in ASKED]


def opened(path, made_with=MADE_WITH):
    return folders.open_table(path, COLUMNS, 2, made_with)


def written(path, keys):
    """A table of these keys, a batch of three at a time -> its bytes."""
    with opened(path) as table:
        for start in range(0, len(keys), 3):
            some = keys[start:start + 3]
            table.append(some, [(f"=answer {key[0]}\n", "0.5") for key in some])
    return path.read_bytes()


def test_a_table_is_a_csv_and_its_name_says_so(tmp_path):
    with pytest.raises(DataError, match="a.xlsx: a table is written as CSV: let its name end in .csv"), opened(tmp_path / "a.xlsx"):
        pass
    assert not list(tmp_path.iterdir())


def cells(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture
def pictures(tmp_path):
    """A folder of six pictures of one colour each, one of them below."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for n, name in enumerate(["a.png", "b.png", "c.png", "d.png", "e.png", "below/f.png"]):
        Image.new("RGB", (20, 20), (40 * n, 10, 10)).save(folder / name)
    return folder


def fill(table, folder, batch_size=2, workers=0, tell=None, asked=ASKED):
    def colour(images, keys):
        assert len(images) == len(keys) <= batch_size
        told = [(f"{float(image[0].mean()):.4f}", "1") for image in images]
        return [key for own in keys for key in own], [cell for own, cell in zip(keys, told) for _ in own]

    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    folders.fill(table, str(folder), table.missing(names, asked), tell or colour, 8, batch_size, workers, torch.device("cpu"))


# --- the table ------------

@pytest.mark.parametrize("data, end", [
    (b"", 0), (b"a", 0), (b"a\r", 0), (b"a\r\n", 3), (b"a\r\nb,\"c\r\n", 3), (b"a\r\n\"b\r\n\"\r\n", 10), (b"a\r\n\"b\"\"\r\n", 3),
    (b"a\r\n\"\"\"\"\r\nx", 9), (b"a\r\n\xc3", 3), (b"a\n\"\n\"", 2)])
def test_whole_rows_end_at_a_line_break_outside_quotes(data, end):
    assert folders.whole_rows(data) == end


def test_names_and_texts_come_back_letter_by_letter(tmp_path):
    written(tmp_path / "out.csv", KEYS)
    assert cells(tmp_path / "out.csv") == [list(COLUMNS), *([*key, f"=answer {key[0]}\n", "0.5"] for key in KEYS)]
    with opened(tmp_path / "out.csv") as table:
        assert table.done == set(KEYS) and table.missing([*NAMES, "new.jpg"], ASKED) == {"new.jpg": [("new.jpg", *q) for q in ASKED]}
        assert table.missing(NAMES[:1], [*ASKED, ("More?",)]) == {NAMES[0]: [(NAMES[0], "More?")]}


def test_a_kill_at_any_byte_costs_the_torn_row_alone(tmp_path):
    """Cut anywhere after its head, the table goes on to the same bytes."""
    path = tmp_path / "out.csv"
    whole = written(path, KEYS)
    for end in range(len(",".join(COLUMNS)) + 2, len(whole)):
        path.write_bytes(whole[:end])
        with opened(path) as table:
            kept = path.read_bytes()
            assert whole.startswith(kept) and len(kept) <= end
            assert table.done == set(KEYS[:len(table.done)])
            left = KEYS[len(table.done):]
            table.append(left, [(f"=answer {key[0]}\n", "0.5") for key in left])
        assert path.read_bytes() == whole, end


def test_rows_are_on_disk_when_append_returns(tmp_path, monkeypatch):
    safe, real = [], os.fsync

    def fsync(number):
        real(number)
        safe.append(os.fstat(number).st_size)

    with opened(tmp_path / "out.csv") as table:
        monkeypatch.setattr(os, "fsync", fsync)
        table.append(KEYS[:2], [("a", "1")] * 2)
        assert safe == [(tmp_path / "out.csv").stat().st_size]
        assert cells(tmp_path / "out.csv")[1:] == [[*key, "a", "1"] for key in KEYS[:2]] and table.done == set(KEYS[:2])


def test_a_full_disk_is_one_line_and_the_rows_before_stay(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    before = written(path, KEYS[:3])

    def full(file, data):
        file.write(data[:5])
        raise OSError(28, "No space left on device")

    words = r"out\.csv: cannot be written \(No space left on device\); the rows before stay"
    with pytest.raises(DataError, match=words) as error, opened(path) as table:
        monkeypatch.setattr(cache, "write_all", full)
        table.append(KEYS[3:4], [("a", "1")])
    assert "\n" not in str(error.value) and path.read_bytes()[:-5] == before
    monkeypatch.undo()
    with opened(path) as table:
        assert table.done == set(KEYS[:3]) and path.read_bytes() == before


@pytest.mark.parametrize("now, words", [
    ({**MADE_WITH, "checkpoint (sha256)": "cd"}, r"checkpoint \(sha256\) is 'cd', was 'ab'"),
    ({**MADE_WITH, "beams": 1}, "beams is 1, was 5"),
    ({**MADE_WITH, "more": 0}, "more is 0, was None"),
    ({k: v for k, v in MADE_WITH.items() if k != "--abstain-below"}, "--abstain-below is None")])
def test_rows_of_other_settings_are_refused(tmp_path, now, words):
    before = written(tmp_path / "out.csv", KEYS[:3])
    with pytest.raises(DataError, match=rf"out\.csv: its rows were made with something else.*{words}"), opened(tmp_path / "out.csv", now):
        pass
    assert (tmp_path / "out.csv").read_bytes() == before


@pytest.mark.parametrize("spoil, words", [
    (lambda path: (path.parent / "out.csv.json").unlink(), "what it was made with cannot be read"),
    (lambda path: (path.parent / "out.csv.json").write_text("{"), "what it was made with cannot be read"),
    (lambda path: (path.parent / "out.csv.json").write_text("[1]"), "made with something else"),
    (lambda path: path.write_bytes(b""), "its first line is not image,question"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b"answer,confidence", b"reply,confidence")), "its first line is not"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\xff,b,c,d\r\n"), "damaged"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\"a\"b,c,d,e\r\n"), "damaged"),
    (lambda path: path.write_bytes(path.read_bytes() + b"a,b\r\n"), "row 4 has 2 cells, not 4")])
def test_what_is_no_such_table_is_refused_and_left_as_it_is(tmp_path, spoil, words):
    path = tmp_path / "out.csv"
    written(path, KEYS[:3])
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=words) as error, opened(path):
        pass
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value) and path.read_bytes() == before


def test_a_table_belongs_to_one_process(tmp_path):
    refused = pytest.raises(DataError, match="another process is writing it")
    with FileLock(tmp_path / ".out.csv.lock"), refused, opened(tmp_path / "out.csv"):
        pass
    written(tmp_path / "out.csv", KEYS[:1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.csv.json"]


def test_a_table_that_has_gone_is_begun_with_the_settings_of_now(tmp_path):
    path = tmp_path / "out.csv"
    written(path, KEYS[:1])
    path.unlink()
    with opened(path, {"beams": 1}) as table:
        assert not table.done
    with opened(path, {"beams": 1}):
        pass


def test_digest_is_of_all_bytes(tmp_path):
    import hashlib
    data = os.urandom(2**18 + 5)
    (tmp_path / "a").write_bytes(data)
    assert files.digest(tmp_path / "a") == hashlib.sha256(data).hexdigest()


# --- pictures ------------

@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 0), (100, 0), (2, 2)])
def test_every_picture_is_told_once_as_itself(tmp_path, pictures, capsys, batch_size, workers):
    with opened(tmp_path / "out.csv") as table:
        fill(table, pictures, batch_size, workers)
    table = cells(tmp_path / "out.csv")[1:]
    names = sorted(["a.png", "b.png", "c.png", "d.png", "e.png", "below/f.png"])
    assert [(r[0], r[1]) for r in table] == [(name, *q) for name in names for q in ASKED]
    for name, _, told, _ in table:
        assert float(told) == pytest.approx(rows.picture_tensor(pictures / name, 8)[0].mean().item(), abs=1e-4)
    assert "12 rows, 12 of them new; 0 of 6 pictures could not be read\n" in capsys.readouterr().out


def test_bad_pictures_are_listed_at_the_end_and_tried_again(tmp_path, pictures, capsys):
    whole = (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes(whole[:60])
    (pictures / "b.png").write_bytes(b"")
    (pictures / "c\n.png").write_bytes(b"<html>")
    bad = os.fsdecode(b"\xff.png")
    shutil.copy(pictures / "d.png", pictures / bad)
    with opened(tmp_path / "out.csv") as table:
        fill(table, pictures, 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines[:-1]] == [["left out", "'a.png'"], ["left out", "'b.png'"], ["left out", r"'c\n.png'"],
                                                              ["left out", r"'\udcff.png'"]]
    assert "0 bytes" in lines[1] and "no picture in" in lines[2] and "not UTF-8" in lines[3] and str(pictures) not in "".join(lines)
    assert lines[-1].endswith("8 rows, 8 of them new; 4 of 8 pictures could not be read: the same command tries them again")
    (pictures / "a.png").write_bytes(whole)
    with opened(tmp_path / "out.csv") as table:
        fill(table, pictures, 2)
    assert "10 rows, 2 of them new; 3 of 4 pictures could not be read" in capsys.readouterr().out
    assert [row[0] for row in cells(tmp_path / "out.csv")[-2:]] == ["a.png"] * 2


def test_an_interruption_loses_one_batch(tmp_path, pictures):
    calls = []

    def tell(images, keys):
        calls.append(keys)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [key for own in keys for key in own], [("x", "1") for own in keys for _ in own]

    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "out.csv") as table:
        fill(table, pictures, 2, tell=tell)
    assert len(cells(tmp_path / "out.csv")) == 1 + 2 * 2 * 2
    with opened(tmp_path / "out.csv") as table:
        fill(table, pictures, 2, tell=tell)
    assert len(calls) == 4 and calls[3] == calls[2] and len(cells(tmp_path / "out.csv")) == 1 + 12
