"""python -m pytest -q tests/data/test_rows.py

Reference-checked: image_tensor against transformers' BLIP processor. Everything else is checked by behaviour: every
fault is built in a temporary folder, and every message must be one line that names the file, the row and what to do.
"""

import os
import pickle
import resource
import runpy
import struct
import sys
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import rows
from data.rows import load_image, read_split, read_table, resolve_image
from engine.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared"
HEAD = "image,question,answer,question_type,style\n"
GOOD = HEAD + "a.jpg,Which style?,Baroque,style,Baroque\n"


def refusal(*parts, call):
    """The text of the DataError that `call` raises; it must be one line and hold every one of `parts`."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable(), text
    for part in parts:
        assert str(part) in text, (part, text)
    return text


def write(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def picture(path, color=(200, 30, 30), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def data(tmp_path):
    """A good folder: train.csv with two rows, images/a.jpg and images/sub/b.png."""
    picture(tmp_path / "images/a.jpg")
    picture(tmp_path / "images/sub/b.png")
    write(tmp_path / "train.csv", GOOD + "sub/b.png,Who?,Rubens,artist,Baroque\n")
    return tmp_path


# --- tables that are fine -------------------------------------------------------------------------------------------

ODD = ["None", "NA", "N/A", "null", "nan", "", "007", "1500", "True", "1e5", " padded ", "-", "a,b", 'say "x"',
       "é ü 漢"]


def test_values_stay_text(tmp_path):
    quoted = [value.replace('"', '""') for value in ODD]
    write(tmp_path / "t.csv", "id,answer\n" + "".join(f'{n},"{value}"\n' for n, value in enumerate(quoted)))
    table = read_table(tmp_path / "t.csv")
    assert [cells["answer"] for _, cells in table] == ODD
    assert [line for line, _ in table] == list(range(2, len(ODD) + 2))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark, name",
                         [(",", "t.csv"), (";", "t.csv"), ("\t", "t.csv"), ("\t", "t.tsv"), ("|", "t.csv")])
def test_separators_and_line_ends(tmp_path, mark, name, ending):
    write(tmp_path / name, f'image{mark}answer{ending}a.jpg{mark}"oil, dry; old"')
    found = read_table(tmp_path / name, separator="|" if mark == "|" else None)
    assert found == [(2, {"image": "a.jpg", "answer": "oil, dry; old"})]


def test_tab_by_name_and_tsv_with_commas_in_the_header(tmp_path):
    write(tmp_path / "t.txt", "a,1\tb\nx\ty\n")
    assert read_table(tmp_path / "t.txt", separator="tab")[0][1] == {"a,1": "x", "b": "y"}
    write(tmp_path / "t.tsv", "a,1,2\tb\nx\ty\n")
    assert read_table(tmp_path / "t.tsv")[0][1] == {"a,1,2": "x", "b": "y"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
def test_encodings_and_bom(tmp_path, encoding):
    write(tmp_path / "t.csv", "answer,x\nDürer,1\n", encoding)
    asked = "utf-8" if encoding == "utf-8-sig" else encoding
    assert read_table(tmp_path / "t.csv", asked) == [(2, {"answer": "Dürer", "x": "1"})]


def test_line_numbers_with_blank_lines_and_line_breaks_in_values(tmp_path):
    write(tmp_path / "t.csv", '\nq,a\n\n"two\nlines",x\n   \nlast,y\n')
    assert read_table(tmp_path / "t.csv") == [(4, {"q": "two\nlines", "a": "x"}), (7, {"q": "last", "a": "y"})]


def test_long_text_with_line_breaks_is_not_taken_for_swallowed_rows(tmp_path):
    text = '"Is it a still life.\nOil, canvas, glass, and gold: which of Mr. Smith\'s, then?"'
    write(tmp_path / "t.csv", GOOD + f"b.jpg,{text},Oil,type,Baroque\n")
    assert read_table(tmp_path / "t.csv")[1][1]["question"] == text.strip('"')


# --- tables that are not --------------------------------------------------------------------------------------------

BAD_TABLES = {
    "one field too many": (GOOD + "b.jpg,What, really?,x,y,z\n", ["line 3", "expected 5", "found 6", "--separator"]),
    "too many in the first row": (HEAD + "a.jpg,q,a,t,s,more\n", ["line 2", "expected 5", "found 6"]),
    "one field too few": (GOOD + "b.jpg,Who?,Rubens,artist\n", ["line 3", "expected 5", "found 4"]),
    "open quote to the end": (GOOD + 'b.jpg,"Who?,x,y,z\nc.jpg,Who?,x,y,z\n', ["line 3", "quote", "line 4"]),
    "open quote closed inside": (GOOD + 'b.jpg,"Who?,x,y,z\nc.jpg,"Who?",x,y,z\n', ["line 3", "quote"]),
    "open quote that swallows": (GOOD + 'b.jpg,Who?,x,y,"z\nc.jpg,Who?,x,y,z\nd.jpg,Who?,x,y,z"\n',
                                 ["line 3", "swallows"]),
    "duplicate header": ("image,question,answer,answer\na,b,c,d\n", ["line 1", "'answer'", "rename"]),
    "empty": ("", ["empty", "header"]),
    "blank": (" \n\n", ["empty"]),
    "byte-order mark only": (b"\xef\xbb\xbf", ["empty"]),
    "header only": (HEAD, ["no rows"]),
    "NUL": (GOOD + "b.jpg,Wh\0o?,x,y,z\n", ["line 3", f"byte {len(GOOD) + 8}", "NUL"]),
    "latin-1": ((GOOD + "b.jpg,Who?,D\xfcrer,y,z\n").encode("latin-1"),
                ["line 3", f"byte {len(GOOD) + 12}", "--encoding latin-1"]),
    "cp1252": ((GOOD + "b.jpg,Who’s?,D\xfcrer,y,z\n").encode("cp1252"), ["line 3", "--encoding cp1252"]),
    "utf-16": (GOOD.encode("utf-16"), ["line 1", "byte 0", "--encoding utf-16"]),
    "utf-16 without mark": (GOOD.encode("utf-16-le"), ["line 1", "--encoding utf-16"]),
    "one damaged line": ("a,b\nü,1\n".encode() + b"\xff,2\n", ["line 3", "byte 9", "mend that line"]),
    "spreadsheet": (b"PK\x03\x04\x14\0\0\0\xb5\xff\x9d" + bytes(range(1, 90)), ["line 1", "save the table as CSV"]),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table(tmp_path, name):
    text, parts = BAD_TABLES[name]
    path = write(tmp_path / "train.csv", text)
    refusal(path, *parts, call=lambda: read_table(path))


def test_bad_encoding_or_separator_argument_or_place(tmp_path):
    path = write(tmp_path / "t.csv", "Jürgen,b\n1,2\n")
    refusal(path, "unknown encoding 'klingon'", call=lambda: read_table(path, "klingon"))
    refusal(path, "unknown encoding 'hex'", call=lambda: read_table(path, "hex"))
    refusal(path, "line 1", "byte 1", "--encoding utf-8", call=lambda: read_table(path, "ascii"))
    for separator in ("", ",,", '"', "\n"):
        refusal(path, "--separator", call=lambda: read_table(path, separator=separator))
    refusal(tmp_path / "no.csv", "no such file", call=lambda: read_table(tmp_path / "no.csv"))
    refusal(tmp_path, "no such file", call=lambda: read_table(tmp_path))
    os.mkfifo(tmp_path / "pipe.csv")  # opening it would wait for ever
    refusal("pipe.csv", call=lambda: read_table(tmp_path / "pipe.csv"))


# --- splits ---------------------------------------------------------------------------------------------------------

def test_split_rows(data):
    first, second = read_split(data, "train")
    assert first == rows.Row(str(data / "images/a.jpg"), "a.jpg", "Which style?", "Baroque", "style", "Baroque", 2,
                             str(data / "train.csv"), number=0)
    assert second.image == str(data / "images/sub/b.png") and second.line == 3 and second.fault == ""
    assert pickle.loads(pickle.dumps(first)) == first  # loaders' workers may be spawned
    with pytest.raises(AttributeError):
        first.answer = "x"


@pytest.mark.parametrize("name", ["val.csv", "val.tsv", "artquest_val.csv"])
def test_split_names_and_a_file_itself(data, name):
    write(data / name, GOOD.replace(",", "\t") if name.endswith("tsv") else GOOD)
    assert read_split(data, "val") == read_split(data / name, "ignored")
    assert read_split(data, "val")[0].file == str(data / name)


def test_two_tables_for_a_split_are_refused(data):
    """A drawn train.csv beside ArtQuest's own files must not be trained on in their place."""
    write(data / "artquest_train.csv", GOOD)
    refusal(data, "train.csv and artquest_train.csv", "move", call=lambda: read_split(data, "train"))
    assert read_split(data / "artquest_train.csv", "train")


def test_image_root(data, tmp_path):
    other = tmp_path / "other"
    picture(other / "a.jpg")
    write(other / "train.csv", GOOD)
    assert read_split(other, "train")[0].image == str(other / "a.jpg")  # no images/ there: the folder itself
    assert read_split(data / "train.csv", "train", images=other)[0].image == str(other / "a.jpg")
    refusal(tmp_path / "nowhere", "--images", call=lambda: read_split(data, "train", images=tmp_path / "nowhere"))


def test_relative_folder_gives_absolute_paths(data, monkeypatch):
    monkeypatch.chdir(data)
    assert read_split("train.csv", "train")[0].image == read_split(".", "train")[0].image == str(data / "images/a.jpg")


def test_columns(data):
    write(data / "val.csv", "file,question,reply,school\na.jpg,Who?,Rubens,Flemish\n")
    row, = read_split(data, "val", {"image": "file", "answer": "reply", "style": "school"})
    assert (row.name, row.answer, row.style, row.question_type) == ("a.jpg", "Rubens", "Flemish", "")
    refusal("val.csv", "'image'", "--columns image=NAME", "file, question, reply, school",
            call=lambda: read_split(data, "val", {"answer": "reply"}))
    refusal("'movement'", "--columns style=NAME",  # optional, but asked for by name
            call=lambda: read_split(data, "val", {"image": "file", "answer": "reply", "style": "movement"}))
    refusal("--columns reply", call=lambda: read_split(data, "val", {"reply": "answer"}))


def test_missing_split_lists_what_is_there(data):
    refusal(data, "test.csv", "artquest_test.csv", "images, train.csv", call=lambda: read_split(data, "test"))
    refusal("no such", "--data", call=lambda: read_split(data / "gone", "test"))


# --- paths ----------------------------------------------------------------------------------------------------------

# path in the table: what the refusal says
ESCAPES = dict.fromkeys((
    "../secret.jpg", "sub/../../secret.jpg", "sub/.. /a.jpg", "..", "..\\secret.jpg", "/etc/hostname", " /etc/hostname",
    "\\\\host\\share\\a.jpg", "C:\\pictures\\a.jpg"), "'..'")
ESCAPES |= dict.fromkeys((
    "https://example.org/a.jpg", "file:///etc/hostname", "data:image/png;base64,AAAA", "a.jpg\0.png", "\0"), "URL")
ESCAPES |= dict.fromkeys(("out.jpg", "outdir/secret.jpg", "null.jpg", "twin/secret.jpg"), "leaves")
ESCAPES |= dict.fromkeys(("loop.jpg", "pipe.jpg", "sub", ".", "broken.jpg"), "not a regular file")
ESCAPES |= {"": "empty", "  ": "empty", "a.jpg/x.jpg": "not there", "x" * 5000: "not there"}


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: repr(name)[:20])
def test_path_is_refused(data, name):
    images = data / "images"
    picture(data / "secret.jpg")
    picture(data / "images-2/secret.jpg")  # its path starts with the root's, letter for letter
    os.symlink("../images-2", images / "twin")
    os.symlink("../secret.jpg", images / "out.jpg")
    os.symlink("..", images / "outdir")
    os.symlink("loop.jpg", images / "loop.jpg")
    os.symlink("gone.jpg", images / "broken.jpg")
    os.symlink("/dev/null", images / "null.jpg")
    os.mkfifo(images / "pipe.jpg")
    text = refusal("image", ESCAPES[name], call=lambda: resolve_image(images, name))
    assert len(text) < 400


def test_escape_in_a_table_never_becomes_a_path(data):
    picture(data / "secret.jpg")
    write(data / "val.csv", GOOD + "../secret.jpg,Who?,x,y,z\n")
    bad = read_split(data, "val")[1]
    assert bad.image == "" and ".." in bad.fault
    found = read_split(data, "val")
    refusal("val.csv", "line 3", "'../secret.jpg'", "--skip-bad", call=lambda: rows.usable_rows(found))


def test_links_inside_the_root_and_a_linked_root(data):
    os.symlink("a.jpg", data / "images/link.jpg")
    os.symlink("images", data / "linked")
    assert resolve_image(data / "images", "link.jpg") == str(data / "images/a.jpg")
    assert resolve_image(data / "linked", "./sub//b.png") == str(data / "images/sub/b.png")


@pytest.mark.parametrize("asked", ["Dürer.jpg", "dürer.JPG", " Dürer.jpg ", "DÜRER.jpg"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_name_matches_but_for_case_form_and_spaces(tmp_path, asked, form):
    stored = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "Dürer.jpg")
    picture(tmp_path / "Old Masters" / stored)
    name = unicodedata.normalize(form, asked)
    expected = str(tmp_path / "Old Masters" / stored)
    assert resolve_image(tmp_path, "Old Masters/" + name) == expected
    assert resolve_image(tmp_path, "old masters\\" + name, {}) == expected


def test_exact_name_wins_and_several_are_an_error(tmp_path):
    picture(tmp_path / "A.jpg"), picture(tmp_path / "a.jpg")
    assert resolve_image(tmp_path, "a.jpg") == str(tmp_path / "a.jpg")
    refusal("'a.JPG'", "'A.jpg', 'a.jpg'", "exactly", call=lambda: resolve_image(tmp_path, "a.JPG"))


def test_missing_image_names_the_nearest(data):
    picture(data / "images/sub/portrait-of-a-man.jpg")
    refusal("'sub/portrait-of-man.jpg'", "nearest is 'portrait-of-a-man.jpg'",
            call=lambda: resolve_image(data / "images", "sub/portrait-of-man.jpg"))
    refusal("no 'sup' in", "nearest is 'sub'", call=lambda: resolve_image(data / "images", "sup/b.png"))


def test_listings_are_read_once(data, monkeypatch):
    calls, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: calls.append(folder) or listdir(folder))
    write(data / "val.csv", HEAD + "".join(f"gone{n}.jpg,q,a,t,s\n" for n in range(30)))
    found = read_split(data, "val")
    assert len(calls) == 1 and all(row.fault for row in found)


def test_nearest_name_is_searched_five_times_only(data, monkeypatch):
    calls, search = [], rows.difflib.get_close_matches
    monkeypatch.setattr(rows.difflib, "get_close_matches", lambda *args: calls.append(args) or search(*args))
    write(data / "val.csv", HEAD + "".join(f"gone{n}.jpg,q,a,t,s\n" for n in range(30)))
    read_split(data, "val")
    assert len(calls) == 5


# --- pictures in other folders ---

def found_in(root, *names, **more):
    """{name: its path relative to root, or why there is none}"""
    return {name: os.path.relpath(path, os.path.realpath(root)) if path else fault
            for name, (path, fault) in rows.find_pictures(names, root, **more).items()}


def test_pictures_are_found_with_folders_dropped_and_by_name(tmp_path):
    """COCO's val2014/ over a flat folder, CIRR's train/34/ where the download has train/, bare names over val2014/."""
    for name in ("flat.jpg", "train/n1.png", "dev/n2.png", "b/c.jpg", "deep/er/Dürer.JPG"):
        picture(tmp_path / name)
    wanted = {"val2014/flat.jpg": "flat.jpg", "./train/34/n1.png": "train/n1.png", "dev/n2.png": "dev/n2.png", "a/b/c.jpg": "b/c.jpg",
              "dürer.jpg": "deep/er/Dürer.JPG"}
    assert found_in(tmp_path, *wanted) == wanted
    assert found_in(tmp_path, "x/flat.png", suffixes=(".jpg",)) == {"x/flat.png": "flat.jpg"}
    assert "is not there" in found_in(tmp_path, "x/flat.png")["x/flat.png"]


def test_a_picture_in_two_folders_is_not_guessed(tmp_path):
    picture(tmp_path / "train/n.png"), picture(tmp_path / "dev/n.png"), picture(tmp_path / "in/VG_100K/7.jpg")
    picture(tmp_path / "in/VG_100K_2/7.jpg")
    fault = found_in(tmp_path, "train/34/n.png")["train/34/n.png"]
    assert "'dev/n.png, train/n.png'" in fault
    assert found_in(tmp_path, "there/VG_100K_2/7.jpg") == {"there/VG_100K_2/7.jpg": "in/VG_100K_2/7.jpg"}
    assert found_in(tmp_path, "train/n.png") == {"train/n.png": "train/n.png"}


def test_another_folders_picture_of_that_name_is_another_picture(tmp_path):
    """cat/ lacks its 1.jpg: dog/1.jpg is not it. One flat 1.jpg for two names: one of the two is missing, and none is guessed."""
    picture(tmp_path / "pets/dog/1.jpg"), picture(tmp_path / "pets/cat/2.jpg"), picture(tmp_path / "flat/1.jpg")
    assert "'cat/1.jpg' is not there (no '1.jpg' in" in found_in(tmp_path / "pets", "cat/1.jpg")["cat/1.jpg"]
    faults = found_in(tmp_path / "flat", "cat/1.jpg", "dog/1.jpg")
    assert "'dog/1.jpg' as well" in faults["cat/1.jpg"] and "'cat/1.jpg' as well" in faults["dog/1.jpg"]
    faults = found_in(tmp_path / "flat", "cat/1.jpg", "1.jpg")
    assert faults["1.jpg"] == "1.jpg" and "'1.jpg' as well" in faults["cat/1.jpg"]


def test_a_search_by_name_does_not_leave_the_root(tmp_path):
    picture(tmp_path / "secret.jpg"), picture(tmp_path / "images/a.jpg")
    os.symlink("../secret.jpg", tmp_path / "images/out.jpg")
    os.symlink("..", tmp_path / "images/outdir")
    faults = found_in(tmp_path / "images", "gone/secret.jpg", "../gone/a.jpg", "/gone/a.jpg", "gone/out.jpg")
    assert "not there" in faults["gone/secret.jpg"] and "leaves" in faults["gone/out.jpg"]
    assert "'..'" in faults["../gone/a.jpg"] and "'..'" in faults["/gone/a.jpg"]


# --- rows -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def faulty(data):
    """val.csv: rows 2 and 9 good, 3 to 8 each with one fault."""
    write(data / "images/zero.jpg", b"")
    write(data / "val.csv", GOOD + 'a.jpg, ,x,t,s\na.jpg,q,"  ",t,s\n,q,x,t,s\ngone.jpg,q,x,t,s\nzero.jpg,q,x,t,s\n'
          "a.jpg,q,nan,t,s\n" + "a.jpg,Who?,None,t,s\n")
    return data


def test_check_rows(faulty):
    bad = rows.check_rows(read_split(faulty, "val"))
    wanted = {3: "empty question", 4: "empty answer", 5: "empty image", 6: "gone.jpg", 7: "0 bytes", 8: "NaN"}
    assert [row.line for row, _ in bad] == list(wanted)
    for row, reason in bad:
        assert wanted[row.line] in reason
    several = read_split(faulty, "train")[0]
    broken = rows.Row(**{name: getattr(several, name) for name in rows.Row.__slots__} | {"answer": "a\nb"})
    assert "several lines" in rows.check_rows([broken])[0][1]


def test_check_rows_looks_once_and_decodes_nothing(data, monkeypatch):
    good = read_split(data, "train") * 50
    calls, getsize = [], os.path.getsize
    monkeypatch.setattr(os.path, "getsize", lambda path: calls.append(path) or getsize(path))
    monkeypatch.setattr(rows, "load_image", None)
    assert rows.check_rows(good) == [] and len(calls) == 2
    os.remove(good[0].image)
    assert len(rows.check_rows(good)) == 50


def test_usable_rows(faulty):
    found = read_split(faulty, "val")
    text = refusal("val.csv", "6 of 8 rows", "line 3: empty question", "line 7", "--skip-bad",
                   call=lambda: rows.usable_rows(found))
    assert "line 8" not in text  # the first five
    good, bad = rows.usable_rows(found, skip_bad=True)
    assert [row.line for row in good] == [2, 9] and len(bad) == 6
    assert rows.usable_rows(good) == (good, [])
    refusal("6 of 6", "--images", call=lambda: rows.usable_rows([row for row, _ in bad], skip_bad=True))


def test_same_reason_is_told_once(data):
    write(data / "val.csv", GOOD + "gone.jpg,q,a,t,s\n" * 9 + "lost.jpg,q,a,t,s\n")
    text = refusal("10 of 11", "line 3", "line 12", call=lambda: rows.usable_rows(read_split(data, "val")))
    assert "line 4" not in text


# --- pixels ---------------------------------------------------------------------------------------------------------

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixel(path, at=(0, 0)):
    image = load_image(path)
    assert type(image) is Image.Image and image.mode == "RGB" and image.info == {}
    return image.getpixel(at)


@pytest.mark.parametrize("mode, color, name, expected", [
    ("RGB", (10, 20, 30), "x.png", (10, 20, 30)), ("RGB", (10, 20, 30), "x.bmp", (10, 20, 30)),
    ("RGB", (10, 20, 30), "x.ppm", (10, 20, 30)), ("L", 77, "x.png", (77,) * 3), ("L", 77, "x.pgm", (77,) * 3),
    ("1", 1, "x.png", WHITE), ("1", 0, "x.tif", (0, 0, 0)), ("CMYK", (0, 255, 255, 0), "x.tif", RED),
    ("CMYK", (0, 0, 0, 255), "x.tif", (0, 0, 0)), ("RGBA", (255, 0, 0, 255), "x.png", RED),
    ("RGBA", (255, 0, 0, 0), "x.png", WHITE), ("RGBA", (0, 0, 0, 128), "x.png", (127,) * 3),
    ("RGBA", (0, 0, 0, 0), "x.tif", WHITE), ("RGBA", (0, 0, 0, 0), "x.webp", WHITE),
    ("LA", (0, 0), "x.png", WHITE), ("LA", (0, 255), "x.png", (0, 0, 0)), ("LA", (0, 51), "x.png", (204,) * 3)])
def test_modes(tmp_path, mode, color, name, expected):
    Image.new(mode, (5, 4), color).save(tmp_path / name)
    assert pixel(tmp_path / name) == expected
    assert load_image(tmp_path / name).size == (5, 4)


def test_lossy_modes(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("YCbCr", (16, 16), (76, 85, 255)).save(tmp_path / "ycc.jpg")
    Image.new("LAB", (16, 16), (136, 208, 195)).save(tmp_path / "lab.tif")  # L 53, a +80, b +67: red
    for name, tolerance in (("cmyk.jpg", 4), ("ycc.jpg", 4), ("lab.tif", 12)):
        assert np.abs(np.subtract(pixel(tmp_path / name), RED)).max() <= tolerance, name


@pytest.mark.parametrize("kind, name", [("uint16", "x.png"), ("uint16", "x.tif"), (">u2", "x.tif"), ("uint16", "x.pgm"),
                                        ("int32", "x.tif")])
def test_sixteen_bit_is_scaled_not_clipped(tmp_path, kind, name):
    ramp = np.array([[0, 128, 129, 257, 1000, 32768, 65534, 65535]])
    if name.endswith("pgm"):
        write(tmp_path / name, b"P5 8 1 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp.astype(kind)).save(tmp_path / name)
    greys = [grey for grey, *_ in np.asarray(load_image(tmp_path / name))[0]]
    assert greys == [0, 0, 1, 1, 4, 128, 255, 255]


@pytest.mark.parametrize("name", ["x.tif", "x.pgm"])
def test_dark_sixteen_bit_stays_dark(tmp_path, name):
    write(tmp_path / "x.pgm", b"P5 2 1 65535\n\0\xff\0\x00")
    Image.fromarray(np.array([[255, 0]], np.uint16)).save(tmp_path / "x.tif")
    assert pixel(tmp_path / name) == (1, 1, 1)


@pytest.mark.parametrize("values, expected", [
    ([0, 0.5, 1], [0, 128, 255]), ([0, 100, 255], [0, 100, 255]), ([0, 257, 65535], [0, 1, 255]),
    ([0, 6e5, 1e6], [0, 153, 255]), ([float("nan"), -3, 1], [0, 0, 255])])
def test_float_image(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "x.tif")
    assert [int(pixel[0]) for pixel in np.asarray(load_image(tmp_path / "x.tif"))[0]] == expected


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "clear.gif", transparency=1)
    image.save(tmp_path / "half.png", transparency=bytes([255, 51]))
    assert pixel(tmp_path / "plain.png") == RED and pixel(tmp_path / "plain.png", (1, 0)) == (0, 0, 255)
    for name in ("clear.png", "clear.gif"):
        assert pixel(tmp_path / name) == RED and pixel(tmp_path / name, (1, 0)) == WHITE
    assert pixel(tmp_path / "half.png", (1, 0)) == (204, 204, 255)
    Image.new("RGB", (2, 1), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixel(tmp_path / "key.png") == WHITE


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert pixel(tmp_path / name) == RED


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_rotation(tmp_path, name, tag):
    """The upright picture is wide, red left of green, white right below; each tag's stored form must come back."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:, :24] = RED
    upright[:, 24:, 1] = 255
    upright[16:, 24:] = 255
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2),
              8: np.rot90(upright, -1)}[tag]
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"x.jpg": {"quality": 95, "subsampling": 0}, "x.webp": {"lossless": True}}.get(name, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **options)
    loaded = load_image(tmp_path / name)
    assert loaded.size == (48, 32) and not loaded.getexif()
    assert np.abs(np.asarray(loaded).astype(int) - upright).max() <= 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\0\0II*\0\xff\xff\xff\xff broken", b"Exif\0\0no tags at all"])
def test_unreadable_exif_is_no_fault_of_the_pixels(tmp_path, block):
    Image.new("RGB", (16, 16), RED).save(tmp_path / "x.png", exif=block)
    assert pixel(tmp_path / "x.png") == RED


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.bmp", "x.tif", "x.gif", "x.ppm"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = tmp_path / name
    Image.fromarray(noise).save(whole)
    load_image(whole)
    data = whole.read_bytes()
    cut = write(tmp_path / f"cut-{name}", data[:int(len(data) * share)])
    refusal(cut, "replace it", call=lambda: load_image(cut))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged tags
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.bmp", "x.tif", "x.gif", "x.ppm"])
def test_flipped_bytes_never_end_in_another_error(tmp_path, name):
    generator = np.random.default_rng(1)
    Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / name)
    whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
    refused = 0
    for _ in range(100):
        data = whole.copy()
        data[generator.integers(0, min(len(data), 400), 4)] = generator.integers(0, 256, 4)
        write(tmp_path / name, data.tobytes())
        try:
            load_image(tmp_path / name, max_pixels=10_000)
        except DataError as error:
            assert len(str(error).splitlines()) == 1 and name in str(error)
            refused += 1
    assert refused


def test_no_picture(tmp_path):
    page = write(tmp_path / "page.jpg", b"<!DOCTYPE html>\n<html>404</html>")
    refusal(page, "<!DOCTYPE html>", "replace it", call=lambda: load_image(page))
    zero = write(tmp_path / "zero.jpg", b"")
    refusal(zero, "0 bytes", call=lambda: load_image(zero))
    refusal("gone.jpg", "missing", call=lambda: load_image(tmp_path / "gone.jpg"))
    refusal(tmp_path, call=lambda: load_image(tmp_path))
    refusal("is missing", call=lambda: load_image(""))
    os.mkfifo(tmp_path / "pipe.jpg")
    refusal("pipe.jpg", call=lambda: load_image(tmp_path / "pipe.jpg"))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.ico")  # Pillow could read it; the list of formats is closed
    refusal("x.ico", "JPEG, PNG", call=lambda: load_image(tmp_path / "x.ico"))


def bomb(path, width, height):
    """A PNG whose header says width x height, with next to no data behind it."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return write(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000)))
                 + chunk(b"IEND", b""))


def test_bomb_is_refused_from_the_header(tmp_path):
    path = bomb(tmp_path / "bomb.png", 30_000, 30_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(path, "900000000", "scale it down", call=lambda: load_image(path))
    middle = bomb(tmp_path / "middle.png", 9_000, 9_000)
    refusal(middle, "9000 x 9000", "50,000,000", call=lambda: load_image(middle, max_pixels=50_000_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_size_warning_made_an_error_is_a_data_error(tmp_path):
    path = bomb(tmp_path / "large.png", 10_000, 10_000)
    refusal(path, "scale it down", call=lambda: load_image(path))


def test_limit_is_inclusive(tmp_path):
    path = picture(tmp_path / "x.png", size=(10, 10))
    assert load_image(path, max_pixels=100).size == (10, 10)
    refusal("10 x 10", call=lambda: load_image(path, max_pixels=99))


# --- tensors --------------------------------------------------------------------------------------------------------

def sample_image(width, height):
    noise = np.random.default_rng(width).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", [(320, 427), (224, 224), (50, 30)])
@pytest.mark.parametrize("variant, tolerance", [("BlipImageProcessorPil", 1e-6), ("BlipImageProcessor", 0.035)])
def test_image_tensor_is_what_blip_does(size, variant, tolerance):
    """Exact against the PIL variant; torchvision's bicubic is a level of 255 off here (up to seven on paintings)."""
    transformers = pytest.importorskip("transformers")
    image = sample_image(*size)
    try:
        processor = getattr(transformers, variant)(size={"height": 224, "width": 224}, image_mean=list(rows.BLIP_MEAN),
                                                   image_std=list(rows.BLIP_STD))
    except (AttributeError, ImportError) as error:
        pytest.skip(f"this transformers has no {variant}: {error}")
    default = getattr(transformers, variant)()
    assert (tuple(default.image_mean), tuple(default.image_std)) == (rows.BLIP_MEAN, rows.BLIP_STD)
    wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = rows.image_tensor(image, 224)
    assert ours.shape == (3, 224, 224) and ours.dtype == torch.float32 and ours.is_contiguous()
    assert (ours - wanted).abs().max() <= tolerance


def test_image_tensor_plain():
    white = rows.image_tensor(Image.new("RGB", (40, 20), (255, 0, 51)), 7, (0.5, 0.5, 0.0), (0.5, 0.25, 2.0))
    assert torch.allclose(white[:, 3, 3], torch.tensor([1.0, -2.0, 0.1])) and white.shape == (3, 7, 7)
    with pytest.raises(AssertionError, match="RGB"):
        rows.image_tensor(Image.new("L", (4, 4)), 7)


# --- reports --------------------------------------------------------------------------------------------------------

def row(image="/p/a.jpg", answer="x", kind="style", style="s", **more):
    return rows.Row(image, os.path.basename(image), "q", answer, kind, style, 2, "t.csv", **more)


def test_summary():
    found = [row(answer="Baroque")] * 3 + [row("/p/b.jpg", answer="Cubism", style=""), row(answer="Rubens ", kind="")]
    assert rows.summary(found) == [
        "5 rows, 2 distinct images, 2.5 rows per image",
        "(no type): 1 rows, 1 answers, constant 'Rubens' scores 100.0 % (Rubens 1)",
        "style: 4 rows, 2 answers, constant 'Baroque' scores 75.0 % (Baroque 3, Cubism 1)",
        "2 styles: s 4, (none) 1"]
    assert rows.summary([row(style="")])[-1] == "no style column"
    many = rows.summary([row(answer=str(n)) for n in range(9)])
    assert many[1].endswith("(0 1, 1 1, 2 1, 3 1, 4 1, ... (4 more))")


def test_shared_images():
    splits = {"train": [row(), row(), row("/p/b.jpg")], "val": [row()], "test": [row("/p/c.jpg"), row("")],
              "extra": [row("")]}
    assert rows.shared_images(splits) == {"/p/a.jpg": ["train", "val"]}


@pytest.mark.parametrize("workers", [1, 3])
def test_verify_images(data, workers):
    html = write(data / "images/page.jpg", b"<html>")
    write(data / "val.csv", GOOD + "page.jpg,q,a,t,s\n" * 3 + "gone.jpg,q,a,t,s\n" + "sub/b.png,q,a,t,s\n")
    (path, reason), = rows.verify_images(read_split(data, "val"), workers)
    assert path == str(html) and "<html>" in reason


# --- real data, import ----------------------------------------------------------------------------------------------

@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the reference data is not beside this checkout")
def test_real_tables():
    folder, images = SHARED / "data/artquest_mini", SHARED / "data/wikiart_mini"
    splits = {split: read_split(folder, split, images=images) for split in ("train", "val")}
    assert [len(splits[split]) for split in ("train", "val")] == [841, 864]
    assert all(rows.check_rows(found) == [] for found in splits.values())
    assert rows.shared_images(splits) == {}
    assert rows.verify_images(splits["train"][:60], 1) == []
    semart = SHARED / "data/semart/semart_val.csv"
    table = read_table(semart, "latin-1")
    assert len(table) == 1069 and table[0][1]["TECHNIQUE"] == "Oil on canvas, 105 x 184 cm"
    refusal(semart, "--encoding latin-1", call=lambda: read_table(semart))


def test_import_does_nothing(capfd):
    """Pillow's limits and the warning filters are as they were, and nothing is printed."""
    was = warnings.filters[:], Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    runpy.run_path(rows.__file__)
    assert was == (warnings.filters[:], Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert capfd.readouterr() == ("", "")
