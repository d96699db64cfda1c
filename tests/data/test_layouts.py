"""python -m pytest -q tests/data/test_layouts.py

Reference-checked: the counts and values of real files in ../shared against the same files read with json and csv alone.
Everything else is checked by behaviour: each layout is built in a temporary folder, and every refusal must be one line
that names the file, the row and what to do.
"""

import csv
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import rows
from data.rows import describe_layout, join_semart, read_layout, read_split
from engine.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the reference data is not beside this checkout")
PLAIN = {"image": "a.jpg", "question": "Who?", "answer": "Rubens"}
HEAD = "IMAGE_FILE\tDESCRIPTION\tAUTHOR\tTITLE\tTECHNIQUE\tDATE\tTYPE\tSCHOOL\tTIMEFRAME\n"


def refusal(*parts, call):
    """The text of the DataError that `call` raises; it must be one line and hold every one of `parts`."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable() and len(text) < 700, text
    for part in parts:
        assert str(part) in text, (part, text)


def write(path, content, encoding="utf-8"):
    """Text or bytes as they are; a list as JSON, or as JSON Lines where the name ends in .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        lines = path.name.endswith(".jsonl")
        content = "".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path)
    return path


@pytest.fixture
def data(tmp_path):
    """A folder with images/a.jpg and images/b.jpg."""
    picture(tmp_path / "images/a.jpg"), picture(tmp_path / "images/b.jpg")
    return tmp_path


def told(found):
    """(picture, question, answer) of every row; each picture must have been found."""
    assert rows.check_rows(found) == []
    return [(row.name, row.question, row.answer) for row in found]


def llava(*turns, **more):
    return {"id": "1", "image": "a.jpg", "conversations": [{"from": who, "value": text} for who, text in turns], **more}


def chat(*turns, **more):
    return {"messages": [{"role": who, "content": text} for who, text in turns], "images": ["a.jpg"], **more}


# --- layouts --------------------------------------------------------------------------------------------------------

TALK = [("system", "Be short."), ("human", "<image>\nWho?"), ("gpt", "Rubens"), ("human", "When? "), ("gpt", "1620")]
CHAT = [("system", "Be short."), ("user", "<image>Who?"), ("assistant", "Rubens"), ("user", "When?"), ("assistant", "1620")]
PARTS = [("user", [{"type": "image"}, {"type": "text", "text": "Who?"}]),
         ("assistant", [{"type": "text", "text": "Rubens"}])]
ONE = [("a.jpg", "Who?", "Rubens")]
TWO = [*ONE, ("a.jpg", "When?", "1620")]
MORE = {"question_type": "artist", "style": "Baroque", "other": [1, {}]}
FILE = {"file_name": "a.jpg", "question": "Who?", "answer": "Rubens"}
# file name: (content, (picture, question, answer) of its rows, what the description says)
FILES = {
    "train.json": ([{**PLAIN, "need_external_knowledge": True}], ONE, "AQUA-like JSON list, 1 rows, no question_type"),
    "train.jsonl": ([PLAIN, {**PLAIN, "question": "When?", "answer": 1620}], TWO, "plain JSON Lines, 2 rows"),
    "any.json": ([{**PLAIN, **MORE}], ONE, "ArtQuest-like JSON list, 1 rows, images in"),
    "lines/train.json": (json.dumps(PLAIN) + "\r\n\r\n" + json.dumps(PLAIN), ONE * 2, "plain JSON Lines, 2 rows"),
    "artquest_train.csv": ("image,question,answer,question_type\na.jpg,Who?,Rubens,artist\n", ONE,
                           "ArtQuest-like CSV, 1 rows, no style"),
    "train.tsv": ("image\tquestion\tanswer\na.jpg\tWho?\tRubens\n", ONE, "plain TSV, 1 rows, no question_type, no style"),
    "llava.json": ([llava(*TALK), llava(*TALK[1:3])], TWO + ONE, "LLaVA conversations JSON list, 3 rows"),
    "llava.jsonl": ([llava(*TALK)], TWO, "LLaVA conversations JSON Lines, 2 rows"),
    "chat.jsonl": ([chat(*CHAT), chat(*PARTS)], TWO + ONE, "messages and images JSON Lines, 3 rows"),
    "chat.json": ([chat(*CHAT)], TWO, "messages and images JSON list, 2 rows"),
    "train/metadata.csv": ("file_name,question,answer\na.jpg,Who?,Rubens\n", ONE, "ImageFolder CSV, 1 rows"),
    "train/metadata.jsonl": ([FILE], ONE, "ImageFolder JSON Lines, 1 rows"),
    "metadata.csv": ("file_name,question,answer\nimages/a.jpg,Who?,Rubens\n", [("images/a.jpg", "Who?", "Rubens")],
                     "ImageFolder CSV, 1 rows"),
}


@pytest.mark.parametrize("name", FILES)
def test_layout_is_read_and_described(data, name):
    content, expected, described = FILES[name]
    path = write(data / name, content)
    if "/" in name:
        picture(path.parent / "a.jpg")
    found, line = read_layout(path, "train")
    assert told(found) == expected and found == read_split(path, "train")
    assert line.startswith(f"{path}: {described}") and line == describe_layout(path, "train")
    assert all(row.file == str(path) for row in found)
    if name == "lines/train.json":
        assert [row.line for row in found] == [1, 2]  # in .json the row's number, whatever the blank lines
    assert line.endswith(f", images in {Path(found[0].image).parents[found[0].name.count('/')]}")


@pytest.mark.parametrize("name", [name for name in FILES if "train" in name or name == "metadata.csv"])
def test_layout_is_found_in_its_folder(data, name):
    path = write(data / name, FILES[name][0])
    folder = path.parent if name == "lines/train.json" else data
    assert [row.file for row in read_split(folder, "train")] == [str(path)] * len(FILES[name][1])


def test_flat_metadata_is_the_training_split_only(data):
    write(data / "metadata.csv", FILES["metadata.csv"][0])
    refusal(data, "val.jsonl", "val/metadata.csv", "it holds images, metadata.csv", call=lambda: read_split(data, "val"))


def test_optional_keys_numbers_and_spoken_types(data):
    """Numbers stay as written; an optional key may stand in some rows only; true is true."""
    path = write(data / "x.json", '[{"image":"a.jpg","question":"q","answer":1500},{"image":"b.jpg","question":"q","answer":'
                 '1.50,"style":"Baroque"},{"image":"b.jpg","question":"q","answer":1e5,"known":true},'
                 '{"image":"b.jpg","question":"q","answer":"007"},{"image":"b.jpg","question":"q","answer":NaN}]')
    found = read_split(path, "x", {"question_type": "known"})
    assert [row.answer for row in found] == ["1500", "1.50", "1e5", "007", "NaN"]
    assert [row.style for row in found] == ["", "Baroque", "", "", ""]
    assert [row.question_type for row in found] == ["", "", "true", "", ""]
    (bad, reason), = rows.check_rows(found)
    assert bad.line == 5 and "NaN" in reason
    refusal(path, "row 5: the answer is NaN", call=lambda: rows.usable_rows(found))


def test_keys_of_a_talk_and_columns_by_name(data):
    path = write(data / "x.jsonl", [llava(*TALK, style="Baroque", kind="who"), llava(*TALK[1:3], image="b.jpg")])
    found = read_split(path, "x", {"question_type": "kind"})
    assert [(row.name, row.style, row.question_type, row.line) for row in found] == [
        ("a.jpg", "Baroque", "who", 1), ("a.jpg", "Baroque", "who", 1), ("b.jpg", "", "", 2)]
    path = write(data / "y.json", [{"picture": "a.jpg", "q": "Who?", "a": "Rubens", "file_name": "gone.jpg"}])
    named = {"image": "picture", "question": "q", "answer": "a"}
    assert told(read_split(path, "y", named)) == ONE and ": plain JSON list" in describe_layout(path, "y", named)


def test_tables_that_were_read_before_are_read_as_before(data):
    """A column named like another layout's key changes nothing where image, question and answer are there."""
    path = write(data / "x.csv", "file_name,messages,conversations,image,question,answer\nz,1,2,a.jpg,Who?,Rubens\n")
    found, line = read_layout(path, "x")
    assert told(found) == ONE and ": plain CSV, 1 rows" in line and found[0].line == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_json_encodings_and_bom(data, encoding):
    text = json.dumps([{**PLAIN, "answer": "Dürer"}], ensure_ascii=False)
    path = write(data / "x.json", text, encoding)
    asked = "utf-8" if encoding == "utf-8-sig" else encoding
    assert read_split(path, "x", encoding=asked)[0].answer == "Dürer"
    if encoding != "utf-8-sig":
        refusal(path, "line 1", "byte", f"--encoding {encoding}", call=lambda: read_split(path, "x"))


def test_image_root(data):
    """images/ beside the file; the file's folder where the names say images/ themselves; --images wins."""
    path = write(data / "x.jsonl", [{**chat(*PARTS), "images": ["images/a.jpg"]}])
    assert read_split(path, "x")[0].image == str(data / "images/a.jpg")
    picture(data / "images/images/a.jpg")
    assert read_split(path, "x")[0].image == str(data / "images/images/a.jpg")
    path = write(data / "metadata.jsonl", [FILE])
    assert "'a.jpg' is not there" in read_split(path, "x")[0].fault
    assert read_split(path, "x", images=data / "images")[0].image == str(data / "images/a.jpg")
    refusal(data / "none", "--images", call=lambda: read_split(path, "x", images=data / "none"))


def test_escape_in_json_never_becomes_a_path(data):
    picture(data / "secret.jpg")
    path = write(data / "x.json", [PLAIN, {**PLAIN, "image": "../secret.jpg"}])
    found = read_split(path, "x")
    assert found[1].image == "" and ".." in found[1].fault
    refusal(path, "row 2", "'../secret.jpg'", "--skip-bad", call=lambda: rows.usable_rows(found))


# --- bad JSON -------------------------------------------------------------------------------------------------------

GOOD = json.dumps(PLAIN)


def spoiled(**more):
    return [PLAIN, {**PLAIN, **more}]


# content (of x.json; of x.jsonl where the name starts with "lines"): what the refusal says
BAD = {
    "cut off": ('[\n{"image": "a.jpg", "question": "Wh', ["line 2", "character 32", "not JSON", "download"]),
    "trailing comma": (f"[{GOOD},]", ["line 1", "not JSON", "mend"]),
    "web page": ("<!DOCTYPE html>\n<html>", ["line 1, character 1", "not JSON"]),
    "git lfs pointer": ("version https://git-lfs.github.com/spec/v1\n", ["line 1", "not JSON", "download"]),
    "empty": ("", ["empty"]),
    "byte-order mark only": (b"\xef\xbb\xbf", ["empty"]),
    "no rows": ("[]", ["list is empty", "needs rows"]),
    "object": ('{"version": 1, "rows": [' + GOOD + "]}", ["no list", "'version, rows'", "save the list"]),
    "pretty object": (json.dumps({"rows": [PLAIN]}, indent=1), ["no list", "'rows'"]),
    "text": ('"rows"', ["no list"]),
    "lists": (f"[{GOOD}, [1]]", ["row 2", "object", '["1"]']),
    "deep": ("[" * 100_000, ["nested"]),
    "latin-1": ('[{"answer": "Dürer"}]'.encode("latin-1"), ["line 1", "byte 14", "--encoding latin-1"]),
    "NUL": (f"[\n\0{GOOD}]", ["line 2", "byte 2", "NUL"]),
    "key twice": ('[{"image": "a.jpg", "answer": "x", "answer": "y"}]', ["'answer'", "twice", "a.jpg"]),
    "no such key": ([{"image": "a.jpg", "question": "q"}], ["'answer'", "--columns answer=NAME", "image, question"]),
    "key missing in one": ([PLAIN, {"image": "a.jpg", "question": "q"}], ["row 2", "no 'answer'", "leave the row out"]),
    "list": (spoiled(question=["x", "y"]), ["row 2", "'question' is", '["x", "y"]', "as text"]),
    "object as image": (spoiled(image={"path": "a.jpg"}), ["row 2", "'image' is"]),
    "NUL in a value": (spoiled(question="a\0b"), ["row 2", "'question'", r"a\x00b", "mend"]),
    "half a character": (spoiled(answer="\ud83d"), ["row 2", "'answer'", "half a character"]),
    "lines with a list": ([PLAIN, ["x"]], ["line 2", "object", '["x"]']),
    "lines cut off": (f'{GOOD}\n\n{GOOD[:20]}\n', ["line 3", "character", "not JSON"]),
    "lines that are a list": (json.dumps([PLAIN]), ["JSON list", ".json"]),
    "lines key missing": (f'\n{GOOD}\n\n{{"image": "a.jpg"}}\n', ["line 4", "no 'question'"]),
    "talk without turns": ([llava(*TALK), llava()], ["row 2", "question, answer", "mend"]),
    "talk with text for turns": ([llava(*TALK), {"conversations": "x"}], ["row 2", "no list of turns"]),
    "talk missing": ([llava(*TALK), {"image": "a.jpg"}], ["row 2", "no list of turns", "leave the row out"]),
    "talk without an answer": ([llava(*TALK[:4])], ["row 1", "question, answer"]),
    "talk that starts with an answer": ([llava(*TALK[2:])], ["row 1", "question, answer"]),
    "talk with two questions": ([llava(*TALK[1:2] * 2, *TALK[2:3] * 2)], ["row 1", "question, answer"]),
    "talk of a stranger": ([llava(("bot", "x"))], ["row 1", "no turn", '"bot"', "human, user, gpt"]),
    "talk with null": ([llava(("human", None), ("gpt", "x"))], ["row 1", "no turn", "null"]),
    "talk with a broken part": ([chat(("user", [{"type": "text", "text": None}]))], ["row 1", "no turn"]),
    "talk with a number for a turn": ([{"image": "a.jpg", "conversations": [7]}], ["row 1", "no turn", "7"]),
    "talk without a picture": ([llava(*TALK), {"conversations": llava(*TALK)["conversations"]}], ["row 2", "no 'image'"]),
    "lines talk with two pictures": ([chat(*CHAT, images=["a.jpg", "b.jpg"])], ["line 1", "2 images", "leave the row out"]),
    "lines talk with no picture": ([chat(*CHAT, images=[])], ["line 1", "0 images"]),
    "lines talk with a coded picture": ([chat(*CHAT, images=[{"bytes": "QUJD"}])], ["line 1", "'image' is", "QUJD"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json(data, name):
    content, parts = BAD[name]
    path = write(data / ("x.jsonl" if name.startswith("lines") else "x.json"), content)
    refusal(path, *parts, call=lambda: read_split(path, "x"))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_null_is_an_empty_cell(data, name):
    """pandas writes so what is missing; a CSV of the same table has an empty cell there."""
    first, second = read_split(write(data / name, spoiled(answer=None, style=None)), "x")
    assert (second.answer, second.style) == ("", "") and first.answer
    with pytest.raises(DataError, match="2: .*empty answer"):
        rows.usable_rows([first, second], 0.0, [])
    assert rows.usable_rows([first, second], 0.5, [])[0] == [first]


def test_image_folder_without_its_columns(data):
    path = write(data / "metadata.csv", "file_name,text\na.jpg,A man\n")
    refusal(path, "'question'", "--columns question=NAME", "file_name, text", call=lambda: read_split(path, "x"))


# --- SemArt ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def catalogue(data):
    return write(data / "semart.csv", HEAD + "a.jpg\tA “man”\tDÜRER\tMan\tOil\t1500\tportrait\tGerman \t1451-1500\n"
                 "z.jpg\tNone\tBRIL\tLand\tOil\t1600\tlandscape\tFlemish\t1551-1600\n", "cp1252")


def test_join(data, catalogue):
    found = read_split(write(data / "x.json", [{**PLAIN, "style": "old"}, {**PLAIN, "image": "images/A.JPG"},
                                               {**PLAIN, "image": "b.jpg", "style": "old"}]), "x", images=data)
    joined, matches = join_semart(found, catalogue)
    assert matches == 2 and [row.style for row in joined] == ["German", "German", ""]
    joined, matches = join_semart(found, str(catalogue), {"style": "TIMEFRAME", "question_type": "TYPE"})
    assert [(row.style, row.question_type) for row in joined] == [("1451-1500", "portrait")] * 2 + [("", "")]
    for was, now in zip(found, joined):
        assert (was.image, was.name, was.question, was.answer, was.line) == (
            now.image, now.name, now.question, now.answer, now.line)
    assert [row.style for row in found] == ["old", "", "old"]


def test_semarts_columns_in_other_case_and_as_excel(data, catalogue):
    found, said = read_split(write(data / "x.json", [PLAIN]), "x"), []
    lower = write(data / "lower.csv", "Image File\tschool\tType\na.jpg\tGerman\tportrait\n")
    joined, matches = join_semart(found, lower, {"style": "SCHOOL", "context": "TYPE"}, log=said.append)
    assert matches == 1 and (joined[0].style, joined[0].context) == ("German", "portrait")
    assert said == [f"{lower}: column Image File for the image, school for the style, Type for the context"]
    join_semart(found, catalogue, log=said.append)
    assert len(said) == 1  # nothing is said of SemArt's own names
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    pandas.DataFrame([{"IMAGE_FILE": "a.jpg", "SCHOOL": "Dutch"}]).to_excel(data / "s.xlsx", index=False)
    assert join_semart(found, data / "s.xlsx")[0][0].style == "Dutch"


@pytest.mark.parametrize("head, parts", [
    ("file\tauthor", ["no column 'IMAGE_FILE' for the image and no column 'SCHOOL' for the style", "'file, author'"]),
    ("IMAGE_FILE\tSchool\tSCHOOL", ["'SCHOOL' could be any of the columns 'School, SCHOOL'"])])
def test_all_that_semart_lacks_is_named_at_once(data, head, parts):
    found = read_split(write(data / "x.json", [PLAIN]), "x")
    table = write(data / "s.csv", head + "\n" + "\t".join("x" for _ in head.split("\t")) + "\n")
    refusal(table, *parts, call=lambda: join_semart(found, table))


def test_join_that_cannot_be(data, catalogue):
    found = read_split(write(data / "x.json", [{**PLAIN, "image": f"{n}.jpg"} for n in range(5)]), "x")
    refusal(catalogue, "0.jpg, 1.jpg, 2.jpg'", "a.jpg, z.jpg", "same split", call=lambda: join_semart(found, catalogue))
    refusal(catalogue, "'STYLE'", "IMAGE_FILE, DESCRIPTION", "TIMEFRAME",
            call=lambda: join_semart(found, catalogue, {"style": "STYLE"}))
    refusal(catalogue, "'school'", "question_type, style", call=lambda: join_semart(found, catalogue, {"school": "SCHOOL"}))
    other = write(data / "other.csv", "image,question,answer\na.jpg,q,a\n")
    refusal(other, "'IMAGE_FILE'", "image, question", call=lambda: join_semart(found, other))
    refusal(data / "gone.csv", "no such file", call=lambda: join_semart(found, data / "gone.csv"))
    refusal(catalogue, "utf-8", "line 2", call=lambda: join_semart(found, catalogue, encoding="utf-8"))


# --- real data ------------------------------------------------------------------------------------------------------

@needs_shared
def test_real_aqua():
    path = SHARED / "data/aqua/pictured.json"
    found, line = read_layout(path, "ignored")
    raw = json.loads(path.read_text())
    assert told(found) == [(one["image"], one["question"], one["answer"]) for one in raw] and len(found) == 91
    assert line == (f"{path}: AQUA-like JSON list, 91 rows, no question_type, no style, images in {path.parent / 'images'}")
    assert rows.verify_images(found, 1) == [] and len({row.image for row in found}) == 20
    kinds = read_split(path, "x", {"question_type": "need_external_knowledge"})
    assert Counter(row.question_type == "true" for row in kinds) == Counter(one["need_external_knowledge"] for one in raw)
    for split, count in (("val", 5124), ("test", 4912)):  # one long line each, and most pictures are not there
        whole = read_split(path.parent, split)
        assert len(whole) == count and whole[-1].line == count


@needs_shared
def test_real_artquest_mini():
    folder, images = SHARED / "data/artquest_mini", SHARED / "data/wikiart_mini"
    for split, count in (("train", 841), ("val", 864)):
        found, line = read_layout(folder, split, images=images)
        with open(folder / f"{split}.csv", encoding="utf-8", newline="") as file:
            assert told(found) == [(one["image"], one["question"], one["answer"]) for one in csv.DictReader(file)]
        assert line == f"{folder / split}.csv: ArtQuest-like CSV, {count} rows, images in {images}"


@pytest.fixture
def published(tmp_path):
    """ArtQuest as published, made of 20 real paintings: no style column, pictures under SemArt's names in its folder."""
    catalogue = json.loads((SHARED / "data/semart/pictured.json").read_text())
    (tmp_path / "SemArt/Images").mkdir(parents=True)
    (tmp_path / "artquest").mkdir()
    for one in catalogue:
        shutil.copy(SHARED / "data/aqua/images" / one["picture"], tmp_path / "SemArt/Images" / one["image"])
    for split, source in (("train", "val"), ("val", "test")):
        with open(tmp_path / f"artquest/artquest_{split}.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "question", "answer", "question_type"])
            table.writerows([one["image"], f"What is the {kind.lower()}?", one[kind], kind.lower()]
                            for one in catalogue if one["split"] == source for kind in ("SCHOOL", "TYPE", "TIMEFRAME"))
    return tmp_path


@needs_shared
@pytest.mark.parametrize("split, source", [("train", "val"), ("val", "test")])
def test_real_semart_joined_with_published_artquest(published, split, source):
    images, semart = published / "SemArt/Images", SHARED / f"data/semart/semart_{source}.csv"
    found, line = read_layout(published / "artquest", split, images=images)
    assert f"artquest_{split}.csv: ArtQuest-like CSV, {len(found)} rows, no style, images in" in line
    assert rows.check_rows(found) == [] and found[0].question_type == "school"
    for column in ("SCHOOL", "TYPE", "TIMEFRAME"):
        joined, matches = join_semart(found, semart, {"style": column})
        assert matches == len(found)
        asked = [row for row in joined if row.question_type == column.lower()]
        assert asked and all(row.style == row.answer for row in asked)
    other = SHARED / f"data/semart/semart_{'test' if source == 'val' else 'val'}.csv"
    refusal(other, found[0].name, "same split", call=lambda: join_semart(found, other))
