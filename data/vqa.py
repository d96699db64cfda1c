"""vqa.py: questions that several people have answered: VQAv2's files and OK-VQA's, LAVIS's vqa_*.json, A-OKVQA's, TextVQA's, DocVQA's;
and GQA's, that have one answer.

    is_questions, read_pair   VQAv2's questions with the annotations beside them -> rows as LAVIS writes them
    unpack                    rows in an object: GQA's by their ids, TextVQA's and DocVQA's under "data"
    answers_of                the list of answers of a row
    single                    the same row with the one answer that stands for them

The official accuracy over all answers is metrics.vqa_accuracy. Bad input raises DataError, one line that names file and row.
"""

import os
import re
from collections import Counter

from data.tables import cell, parse_json, read_text, excerpt
from engine.errors import DataError

KEYS = ("direct_answers", "answers", "answer")  # of a list of answers; the first is A-OKVQA's, the last LAVIS's
IMAGES = ("image", "image_local_name", "file_path")  # of a picture under "data": DocVQA's, InfographicVQA's, ST-VQA's


def table_names(split):
    """Names under which these files are published."""
    return [f"vqa_{split}.json", f"aokvqa_v1p0_{split}.json", f"v2_OpenEnded_mscoco_{split}2014_questions.json",
            f"OpenEnded_mscoco_{split}2014_questions.json", f"{split}_questions.json", f"{split}_balanced_questions.json",
            f"TextVQA_0.5.1_{split}.json", *(f"{start}{split}_v1.0{end}.json" for start in ("", "infographicsVQA_")
                                             for end in ("", "_withQT"))]


def is_questions(text):
    """Is this text VQAv2's file of questions, an object with a list of them?"""
    return re.match(r"\s*\{", text) is not None and re.search(r'"questions"\s*:\s*\[', text) is not None


def annotation_file(path):
    """The file of annotations beside one of questions. DataError: none."""
    folder, name = os.path.split(path)
    names = [name.replace("OpenEnded_", "").replace("questions", "annotations"), name.replace("questions", "annotations")]
    for wanted in names:
        if wanted != name and os.path.isfile(os.path.join(folder, wanted)):
            return os.path.join(folder, wanted)
    raise DataError(f"{path}: VQAv2's questions, but no annotations with their answers beside it ({' or '.join(dict.fromkeys(names))}): "
                    "put them there")


def objects(path, content, key):
    """[(number from 1, object)] of the list under `key` of a file's content."""
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise DataError(f"{path}: no list of objects under {excerpt(key)}: download the file again")
    return list(enumerate(found, 1))


def by_question(path, numbered):
    """{question_id: object}. DataError: one twice."""
    found = {}
    for number, one in numbered:
        ident = cell(f"{path}, row {number}", one, "question_id", "question_id")
        if ident in found:
            raise DataError(f"{path}, row {number}: question_id {excerpt(ident)} stands there twice: remove one")
        found[ident] = one
    return found


def read_pair(path, text, encoding="utf-8"):
    """VQAv2's questions, `text` of file `path`, with their annotations -> (file of those, [(row, object as in LAVIS's files)]).

    A picture is called as COCO calls it, COCO_val2014_000000000042.jpg, after the file's data_subtype or the name of the file."""
    content, other = parse_json(path, text), annotation_file(path)
    told = by_question(other, objects(other, parse_json(other, read_text(other, encoding)), "annotations"))
    numbered = objects(path, content, "questions")
    asked = by_question(path, numbered)
    lacking = [ident for ident in asked if ident not in told]
    if lacking:
        raise DataError(f"{path}: {len(lacking)} of {len(asked)} questions have no annotation in {other}, first {excerpt(lacking[0])}: "
                        "take both files of one split")
    year = re.search(r"(train|val|test)20\d\d", os.path.basename(path))
    subset = cell(path, content, "data_subtype", "split", needed=False) or (year[0] if year else "")
    rows = []
    for number, one in numbered:
        where = f"{path}, row {number}"
        image = cell(where, one, "image_id", "image")
        named = f"COCO_{subset}_{image:0>12}.jpg" if subset else f"{image:0>12}.jpg"
        rows.append((number, {"image": named, **told[one["question_id"]], **one}))
    return other, rows


def unpack(path, content):
    """The rows in a JSON file that is one object -> (its kind, [(number from 1, object)]), None where it is neither of these:
    {"data": [rows]} of TextVQA, DocVQA, ST-VQA; {question id: row} of GQA. DataError: a row that is no object, without a picture."""
    if isinstance(content.get("data"), list):
        return 'JSON, rows under "data"', [(number, named(row)) for number, row in objects(path, content, "data")]
    first = next(iter(content.values()), None)
    if not isinstance(first, dict) or "imageId" not in first:
        return None
    rows = []
    for number, (ident, row) in enumerate(content.items(), 1):
        where = f"{path}, row {number}, question {excerpt(ident)}"
        image = cell(where, row if isinstance(row, dict) else {}, "imageId", "image")
        rows.append((number, {**row, "question_id": ident, "image": f"{image}.jpg"}))
    return "JSON, GQA's questions by id", rows


def named(row):
    """A row that stood under "data", with image and question_id; a picture that has an id alone is ID.jpg (TextVQA)."""
    image = next((row[key] for key in IMAGES if key in row), None)
    if image is None and isinstance(row.get("image_id"), str):
        image = row["image_id"] if re.search(r"\.\w{2,5}$", row["image_id"]) else f"{row['image_id']}.jpg"
    return {**row, **({} if image is None else {"image": image}),
            **({"question_id": row["questionId"]} if "questionId" in row and "question_id" not in row else {})}


def answers_of(where, cells, answer="answer"):
    """The texts of the list of answers that a row has under one of KEYS or `answer`: texts, or VQAv2's objects with "answer"; () where it
    has no list but, it may be, one answer. DataError: none in the list, not text."""
    key = next((key for key in dict.fromkeys((*KEYS, answer)) if isinstance(cells.get(key), list)), None)
    if key is not None and not cells[key]:
        raise DataError(f"{where}: {excerpt(key)} is [] and no list of answers: mend the row or leave it out")
    return tuple(cell(where, one if isinstance(one, dict) else {"answer": one}, "answer", "answer") for one in cells[key]) if key else ()


def single(cells, answers, answer="answer"):
    """A row with the answer that stands for all of them under `answer`: VQAv2's multiple_choice_answer, else the commonest of the list,
    of equally common ones the first; without a list as it is. A picture that has a number alone is called as COCO 2017 calls it
    (A-OKVQA)."""
    common = Counter(text.strip() for text in answers).most_common(1)
    image = cells["image_id"] if isinstance(cells.get("image_id"), str) else ""
    picture = {"image": f"{image:0>12}.jpg" if image.isdecimal() else image} if image and "image" not in cells else {}
    return {**cells, **picture, **({answer: cells.get("multiple_choice_answer") or common[0][0]} if common else {})}
