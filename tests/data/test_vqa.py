"""pytest tests/data/test_vqa.py: questions with several answers, in the files of VQAv2, LAVIS, A-OKVQA, TextVQA and DocVQA, and which of
them an epoch draws; GQA's file; tables of Excel and Parquet; column names as Excel writes them.
"""

import json
from collections import Counter

import pytest
from PIL import Image

import metrics
from data import rows, tables
from engine import comparison, evaluation
from engine.errors import DataError
from show import report

TEN = ["blue"] * 4 + ["Green."] * 3 + ["red", "red", "yes"]
QUESTIONS = [{"image_id": 42, "question": "What colour?", "question_id": 42000},
             {"image_id": 9, "question": "How many?", "question_id": 9001}]
NOTES = [{"question_id": 9001, "image_id": 9, "question_type": "how many", "answer_type": "number", "multiple_choice_answer": "2",
          "answers": [{"answer": a, "answer_id": n, "answer_confidence": "yes"} for n, a in enumerate(["3"] * 5 + ["2"] * 5)]},
         {"question_id": 42000, "image_id": 42, "question_type": "what color", "answer_type": "other", "multiple_choice_answer": "blue",
          "answers": [{"answer": a, "answer_id": n, "answer_confidence": "yes"} for n, a in enumerate(TEN)]}]


def put(folder, files, pictures=()):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for name in pictures:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (90, 0, 0)).save(folder / "images" / name)
    return folder


def vqav2(split, questions=None, notes=None, **more):
    questions, notes = QUESTIONS if questions is None else questions, NOTES if notes is None else notes
    return {f"v2_OpenEnded_mscoco_{split}2014_questions.json": {"info": {}, **more, "questions": questions},
            f"v2_mscoco_{split}2014_annotations.json": {"annotations": notes}}


COCO = [f"val2014/COCO_val2014_{n:012}.jpg" for n in (42, 9)]


@pytest.mark.parametrize("more", [{}, {"data_subtype": "val2014", "task_type": "Open-Ended"}])
def test_vqav2_questions_with_their_annotations(tmp_path, more):
    put(tmp_path, vqav2("val", **more), COCO)
    for place in (tmp_path, tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"):
        found, said = rows.read_layout(place, "val")
        assert [(r.question_id, r.question, r.answer, r.question_type, r.line) for r in found] == [
            ("42000", "What colour?", "blue", "other", 1), ("9001", "How many?", "2", "number", 2)]
        assert [r.answers for r in found] == [tuple(TEN), ("3",) * 5 + ("2",) * 5]
        assert rows.check_rows(found) == [] and found[0].image == str(tmp_path / "images" / COCO[0])
        assert "VQAv2 with v2_mscoco_val2014_annotations.json" in said and "10 answers a question: each epoch of training draws one" in said
    assert [r.question_type for r in rows.read_split(tmp_path, "val", {"question_type": "question_type"})] == ["what color", "how many"]
    assert comparison.question_ids(found) == [42000, 9001]


def test_lavis_and_a_okvqa(tmp_path):
    lavis = [{"question_id": 42000, "question": "What colour?", "answer": TEN, "image": COCO[0], "dataset": "vqa"}]
    okvqa = [{"split": "val", "image_id": 9, "question_id": "22MexNkB", "question": "How many?", "choices": ["1", "2"],
              "correct_choice_idx": 1, "direct_answers": ["two", "2", "two"], "rationales": ["x"]}]
    put(tmp_path, {"vqa_train.json": lavis, "aokvqa_v1p0_val.json": okvqa}, [COCO[0], "val2017/000000000009.jpg"])
    row, = rows.read_split(tmp_path, "train")
    assert (row.answer, row.answers, row.question_id, row.fault) == ("blue", tuple(TEN), "42000", "")
    row, = rows.read_split(tmp_path, "val")
    assert (row.answer, row.answers, row.question_id, row.name) == ("two", ("two", "2", "two"), "22MexNkB", "000000000009.jpg")
    assert row.image == str(tmp_path / "images/val2017/000000000009.jpg")
    assert rows.fingerprint([row]) != rows.fingerprint([rows.replace(row, answers=("two",) * 3)])


def test_the_table_has_the_official_accuracy_over_all_answers(tmp_path):
    """3 of 10 said Green.: 0.9 by the official rule, of one answer it would be 0; the report says the same."""
    found = rows.read_split(put(tmp_path, vqav2("val"), COCO), "val")
    told = [{"prediction": "the green"}, {"prediction": "2"}]
    table = {row["type"]: row for row in evaluation.score_table(found, {"gated": told})}
    assert table["other"]["VQA"] == pytest.approx(100 * metrics.vqa_accuracy("the green", TEN)) == pytest.approx(90)
    assert table["number"]["VQA"] == 100 and table["other"]["EM"] == 0 and table["all"]["VQA"] == pytest.approx(95)
    assert report.answer_scores(found, told)[:, 1].tolist() == pytest.approx([90, 100])


@pytest.mark.parametrize("files, parts", [
    ({"val_questions.json": {"questions": QUESTIONS}}, ["no annotations", "val_annotations.json"]),
    (vqav2("val", notes=NOTES[:1]), ["1 of 2 questions have no annotation", "'42000'"]),
    (vqav2("val", questions=[*QUESTIONS, QUESTIONS[0]]), ["row 3", "'42000'", "twice"]),
    (vqav2("val", notes=[NOTES[0], {**NOTES[1], "answers": []}]), ["row 1", "no list of answers"]),
    (vqav2("val", notes=[]), ["annotations.json", "'annotations'"]),
    ({"vqa_val.json": [{"image": "a.jpg", "question": "q", "answer": "x"}, {"image": "a.jpg", "question": "q", "answer": []}]},
     ["row 2", "no list of answers"]),
    ({"val.json": {"7": {"imageId": "1", "question": "q", "answer": "x"}, "8": {"question": "q", "answer": "x"}}},
     ["row 2, question '8'", "no 'imageId'"]),
    ({"val.json": {"7": {"imageId": "1", "question": "q", "answer": "x"}, "8": ["q"]}}, ["row 2, question '8'", "no 'imageId'"]),
    ({"val.json": {"data": []}}, ["no list of objects under 'data'"]),
    ({"val.json": {"data": [{"question": "q", "answers": ["x"]}]}}, ["no column 'image' for the image"]),
    ({"val.json": {"data": [{"image_id": "a", "question": "q"}]}}, ["no column 'answer' for the answer"]),
    ({"vqa_val.json": [{"image": "a.jpg", "question": "q", "answer": ["x", None]}]}, ["row 1", "not text"])])
def test_damaged_vqa(tmp_path, files, parts):
    with pytest.raises(DataError) as caught:
        rows.read_split(put(tmp_path, files), "val")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value), caught.value


def test_gqas_questions_by_id(tmp_path):
    """As GQA publishes them: an object by id, whose zeros are part of it."""
    put(tmp_path, {"val_balanced_questions.json": {
        "01827492": {"imageId": "2354786", "question": "Is it blue?", "answer": "yes", "types": {"structural": "verify"}},
        "1827492": {"imageId": "n9", "question": "Who?", "answer": "girl", "isBalanced": True}}}, ["2354786.jpg", "n9.jpg"])
    found, said = rows.read_layout(tmp_path, "val")
    assert [(r.question_id, r.name, r.question, r.answer, r.answers, r.line, r.fault) for r in found] == [
        ("01827492", "2354786.jpg", "Is it blue?", "yes", (), 1, ""), ("1827492", "n9.jpg", "Who?", "girl", (), 2, "")]
    assert "JSON, GQA's questions by id, 2 rows" in said and "answers a question" not in said
    assert comparison.question_ids(found) == ["01827492", 1827492]


@pytest.mark.parametrize("name, row, image", [
    ("TextVQA_0.5.1_val.json", {"image_id": "003a8ae2ef43b901", "question_id": 34602, "image_classes": ["x"], "answers": TEN},
     "003a8ae2ef43b901.jpg"),
    ("val_v1.0_withQT.json", {"questionId": 34602, "image": "documents/pybv0228_81.png", "answers": TEN, "question_types": ["x"]},
     "documents/pybv0228_81.png"),
    ("infographicsVQA_val_v1.0_withQT.json", {"questionId": "34602", "image_local_name": "20471.jpeg", "answers": TEN}, "20471.jpeg"),
    ("val.json", {"question_id": 34602, "file_path": "coco-text/a.jpg", "answers": TEN}, "coco-text/a.jpg")])
def test_rows_under_data(tmp_path, name, row, image):
    """TextVQA, DocVQA, InfographicVQA, ST-VQA."""
    put(tmp_path, {name: {"dataset_name": "x", "data": [{**row, "question": "What colour?"}]}}, [f"train_images/{image.split('/')[-1]}"])
    (found,), said = rows.read_layout(tmp_path, "val")
    assert (found.question_id, found.name, found.answer, found.answers, found.fault) == ("34602", image, "blue", tuple(TEN), "")
    assert 'JSON, rows under "data", 1 rows' in said and "10 answers a question" in said


@pytest.mark.parametrize("order", [1, -1])
def test_rows_with_one_answer_among_rows_with_several(tmp_path, order):
    mixed = [{"image": "a.jpg", "question": "Who?", "answer": "Rubens"},
             {"image": "a.jpg", "question": "When?", "answer": ["1620", "1600", "1620"]}]
    found, said = rows.read_layout(put(tmp_path, {"train.json": mixed[::order]}, ["a.jpg"]), "train")
    assert [(r.answer, r.answers, r.people) for r in found][::order] == [
        ("Rubens", (), ("Rubens",)), ("1620", ("1620", "1600", "1620"), ("1620", "1600", "1620"))]
    assert "1-3 answers a question" in said and rows.check_rows(found) == []


# --- training on several answers ------------

def row_of(*answers):
    return rows.Row("a.jpg", "a.jpg", "What colour?", Counter(answers).most_common(1)[0][0], "", "", 1, "t.json", answers=answers)


def test_answers_are_drawn_as_often_as_people_gave_them():
    """LAVIS's weights: the count of an answer over that of the people, 6 : 3 : 1; three standard deviations of 3,000 draws are 0.027."""
    row, epochs = row_of(*["blue"] * 6, *["green"] * 3, "red"), 3000
    drawn = Counter(rows.draw_answer(row, 42, epoch, 7).answer for epoch in range(epochs))
    assert {text: count / epochs for text, count in drawn.items()} == pytest.approx({"blue": 0.6, "green": 0.3, "red": 0.1}, abs=0.027)
    other = [[rows.draw_answer(row, seed, epoch, number).answer for epoch in range(40)] for seed, number in ((42, 7), (42, 8), (43, 7))]
    assert other[0] != other[1] != other[2] != other[0]  # each question and each seed draws by itself
    assert other[0] == [rows.draw_answer(row, 42, epoch, 7).answer for epoch in range(40)]


def test_what_is_drawn_and_what_is_not():
    one = row_of("blue", "blue ")
    assert rows.draw_answer(one, 1, 2, 3) is one  # nothing to draw: to the bit as before
    plain = rows.replace(one, answer=" 007 ", answers=())
    assert rows.draw_answer(plain, 1, 2, 3) is plain and plain.trained_on == (" 007 ",)
    empty = row_of("blue", "blue", "", " ", "red")
    assert empty.trained_on == ("blue", "blue", "red") and {rows.draw_answer(empty, 1, n, 0).answer for n in range(30)} == {"blue", "red"}
    assert "2 are empty and never drawn" in rows.told_answers([empty.answers])
    (_, reason), = rows.check_rows([row_of("x", "x", "a\nb")])
    assert "the answer has several lines" in reason


# --- columns and tables of Excel ------------

def test_column_names_in_capitals_are_taken_and_it_is_said(tmp_path):
    put(tmp_path, {"val.csv": "Image,Question,ANSWER,Question Type,Style\na.jpg,Who?,007,artist,Cubism\n"}, ["a.jpg"])
    (row,), said = rows.read_layout(tmp_path, "val")
    assert (row.name, row.question, row.answer, row.question_type, row.style) == ("a.jpg", "Who?", "007", "artist", "Cubism")
    assert "column Image for the image, Question for the question, ANSWER for the answer, Question Type for the question_type" in said
    put(tmp_path, {"val.csv": "image,Image,question,answer\na.jpg,b.jpg,Who?,x\n"})
    (row,), said = rows.read_layout(tmp_path, "val")
    assert row.name == "a.jpg" and "for the image" not in said


@pytest.mark.parametrize("header, parts", [
    ("file,text,answer", ["no column 'image' for the image and no column 'question' for the question", "image=NAME question=NAME"]),
    ("file,text,label", ["'image'", "'question'", "'answer'", "--columns image=NAME question=NAME answer=NAME", "file, text, label"]),
    ("Image,IMAGE,question,answer", ["'image' could be any of the columns 'Image, IMAGE'"])])
def test_all_missing_columns_are_named_at_once(tmp_path, header, parts):
    put(tmp_path, {"val.csv": f"{header}\n{'x,' * header.count(',')}x\n"})
    with pytest.raises(DataError) as caught:
        rows.read_split(tmp_path, "val")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_excel_table_is_read_as_it_is_written(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    put(tmp_path, {}, ["a.jpg"])
    book = openpyxl.Workbook()
    for row in (["Image", "Question", "Answer", "question_id", None], ["a.jpg", "When?", 1500, 12, None], [None] * 5,
                ["a.jpg", "Who?", "007", "08", None], ["a.jpg", "Who?", "None", 3.0, None], ["a.jpg", "Half?", 1.5, 4, None]):
        book.active.append(row)
    book.create_sheet("more")
    book.save(tmp_path / "val.xlsx")
    for place in (tmp_path, tmp_path / "val.xlsx"):
        found, said = rows.read_layout(place, "val")
        assert [(r.answer, r.question_id, r.line, r.fault) for r in found] == [
            ("1500", "12", 2, ""), ("007", "08", 4, ""), ("None", "3", 5, ""), ("1.5", "4", 6, "")]
        assert "Excel, sheet Sheet of 2, 4 rows" in said
    (tmp_path / "val.xlsx").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="val.xlsx: cannot be read .*CSV"):
        rows.read_split(tmp_path, "val")


def test_a_parquet_table_is_read_as_it_is_written(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    import pandas
    put(tmp_path, {}, ["a.jpg"])
    whole = arrow.table({"image": ["a.jpg"] * 3, "question": ["q"] * 3, "answer": ["007", "None", "x"],
                         "question_id": [7, None, 2**53 + 1]})
    parquet.write_table(whole, tmp_path / "train.parquet")
    found, said = rows.read_layout(tmp_path, "train")
    assert [(r.answer, r.question_id) for r in found] == [("007", "7"), ("None", ""), ("x", str(2**53 + 1))] and "Parquet, 3 rows" in said
    pandas.DataFrame({"image": ["a.jpg"], "question": ["q"], "answer": [["x", "y", "y"]]}).to_parquet(tmp_path / "train.parquet")
    row, = rows.read_split(tmp_path, "train")
    assert (row.answer, row.answers) == ("y", ("x", "y", "y"))
    coded = {"image": [{"bytes": b"123", "path": "a.jpg"}], "question": ["q"], "answer": ["x"]}
    pandas.DataFrame(coded).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 1: 'image' is .*3 bytes.* and not text"):
        rows.read_split(tmp_path, "train")


@pytest.mark.parametrize("ending, package", tables.SHEETS.items())
def test_without_its_package_a_table_says_how_to_get_it(tmp_path, ending, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / f"train{ending}").write_bytes(b"x")
    with pytest.raises(DataError, match=f"train{ending}: .*pip install {package}, or save the table as CSV"):
        rows.read_split(tmp_path, "train")
