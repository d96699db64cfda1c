"""pytest tests/test_gated_data.py: where train_gated.py and eval_gated.py take style, context and validation rows from, and what
--check-data says. Behaviour-checked; the VQA score of the predictions against an evaluator of its own in this file."""

import csv
import hashlib
import json
import re
import shutil
import string
from dataclasses import replace

import pytest
import torch

import core
import eval_gated
import metrics
import train_gated
from data import rows, wikiart
from data.questions import read_questions
from conftest import prepared
from engine import checkpoints, comparison, errors, evaluation, loop, runfolder
from engine.text import text_of
from tools import compare_gated, make_tiny


@pytest.fixture
def artquest(few, tmp_path):
    """ArtQuest as published: artquest_*.csv without a style column, SemArt's tables (latin-1, tabs) beside it."""
    folder = tmp_path / "artquest"
    (folder / "SemArt").mkdir(parents=True)
    for split in ("train", "val", "test"):
        with (few / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        with (folder / f"artquest_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["image", "question", "answer", "question_type"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(table)
        with (folder / "SemArt" / f"semart_{split}.csv").open("w", encoding="latin-1", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["IMAGE_FILE", "DESCRIPTION", "SCHOOL"])
            writer.writerows((r["image"].upper(), f"Un tableau peint à {r['style']}", r["style"] + " school") for r in table)
    return folder


@pytest.fixture
def published(artquest, few, flags):
    """Command line for that folder."""
    return lambda *more, **out: flags("--data", str(artquest), "--images", str(few / "images"), "--epochs", "1", *more, **out)


def read(argv, split="train"):
    return train_gated.read_data(train_gated.get_args(argv), split)


# --- style and context ------------

def test_without_a_style_column_both_terms_are_off_and_said_so(published, tmp_path, capsys):
    train_gated.main(published())
    assert "no style in the training rows: both style terms are off" in capsys.readouterr().out
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert best["loss_weights"] == {"hit_weight": 0.0, "kl_weight": 0.0} and best["model_args"]["styles"] == []


def test_style_and_context_of_semart(published, artquest, tmp_path, capsys):
    more = ("--semart", str(artquest / "SemArt"), "--style", "SCHOOL", "--context", "DESCRIPTION")
    found = read(published(*more))
    assert all(row.style.endswith(" school") and row.context == f"Un tableau peint à {row.style[:-7]}" for row in found)
    assert "40 of 40 rows" in capsys.readouterr().out
    only_context = read(published("--semart", str(artquest / "SemArt"), "--style", "none", "--context", "DESCRIPTION"))
    assert {row.style for row in only_context} == {""} and all(row.context for row in only_context)
    train_gated.main(published(*more))
    assert len(checkpoints.load_checkpoint(tmp_path / "run/best.pt")["model_args"]["styles"]) == 8
    eval_gated.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--no-baselines", "--workers", "0", "--beams", "1", "--split", "test"])
    assert "semart_test.csv" in capsys.readouterr().out


def test_context_is_a_column_of_the_table_without_semart(sample, flags):
    found = read(flags("--context", "style", "--style", "none"))
    assert all(row.context for row in found) and {row.style for row in found} == {""}
    with pytest.raises(rows.DataError, match="no column 'caption' for the context"):
        read(flags("--context", "caption"))


def test_a_style_of_semart_needs_its_table(flags, artquest):
    with pytest.raises(rows.DataError, match="pass --semart"):
        read(flags("--style", "SCHOOL"))
    with pytest.raises(rows.DataError, match="no column 'PERIOD'"):
        read(flags("--style", "PERIOD", "--semart", str(artquest / "SemArt")))


def test_style_predicted_by_the_classifier(published, tiny, tmp_path, capsys):
    train_gated.main(published("--style", "efficientnet"))
    assert "style of 11 pictures predicted by" in capsys.readouterr().out
    styles = checkpoints.load_checkpoint(tmp_path / "run/best.pt")["model_args"]["styles"]
    args = train_gated.get_args(published())
    net = core.EfficientNet28.from_checkpoint(tiny[1]).eval()
    found = train_gated.read_data(args, "train")
    expected = set()
    with torch.no_grad():
        for path in {row.image for row in found}:
            image = rows.image_tensor(rows.load_image(path), make_tiny.RANDOM_SIZE)[None]
            expected.add(net.style_names()[net.logits(net(image)).argmax()])
    assert set(styles) == expected
    assert eval_gated.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--no-baselines", "--workers", "0", "--beams", "1"]) is None
    assert "predicted by" in capsys.readouterr().out


def test_style_names_of_a_checkpoint():
    net = core.EfficientNet28(27, "test_efficientnet")
    assert net.style_names() == wikiart.WIKIART[:27]
    assert core.EfficientNet28(2, "test_efficientnet", ["Pop_Art", "x"]).style_names() == ["Pop Art", "x"]
    for odd in (core.EfficientNet28(5, "test_efficientnet", ["a", "b"]), core.EfficientNet28(40, "test_efficientnet")):
        with pytest.raises(rows.DataError, match="cannot be taken from its prediction"):
            odd.style_names()


def test_context_stands_before_the_question_and_is_cut_by_itself(build):
    tokenizer = build(gating="none").tokenizer
    question, context = "Which style?", "A quiet picture. " * 100
    ids = core.prompt_ids(tokenizer, question, context, max_context=20)
    plain = core.prompt_ids(tokenizer, question)
    assert ids[0] == plain[0] and ids[21:] == tokenizer(" " + core.PROMPT.format(question), add_special_tokens=False).input_ids
    assert re.match(r"Context: A quiet pic\S* Question: Which style\? Answer:$", tokenizer.decode(ids[1:]))
    assert core.prompt_ids(tokenizer, question, "  ") == plain
    batch = core.encode_training(tokenizer, [question, question], ["red", "red"], contexts=["", "A boat."])
    assert (batch["labels"] != -100).sum(1).tolist() == [len(core.answer_ids(tokenizer, "red"))] * 2  # never trained on the context


def test_context_and_question_are_tokens_of_one_text(tmp_path):
    """No blank stands alone before "Question": the whole prompt has the ids that the tokenizer gives it in one piece."""
    tokenizer = make_tiny.make_tokenizer([core.CONTEXT.format("A boat.") + core.PROMPT.format("Which style?")] * 9, tmp_path)
    assert len(tokenizer(" Question", add_special_tokens=False).input_ids) == 1  # as in OPT's own
    for context in ("A boat.", "  A quiet picture of two boats\n"):
        whole = core.CONTEXT.format(context.strip()) + core.PROMPT.format("Which style?")
        ids = core.prompt_ids(tokenizer, "Which style?", context)
        assert ids == [tokenizer.bos_token_id] + tokenizer(whole, add_special_tokens=False).input_ids


def test_context_reaches_the_answer_scores(build, batch):
    model = build()
    features = model.image_features(batch["images"][:1])
    with_text, without = (model.score_answers(["Which style?"], ["red", "two"], **features, contexts=c) for c in (["A boat."], None))
    assert not torch.allclose(with_text, without)


# --- styles ------------

def test_styles_that_differ_by_case_are_one(few, flags, tmp_path, capsys):
    """The commonest spelling of training stands for all, in validation too."""
    (tmp_path / "data").mkdir()
    found = rows.read_split(few, "train")
    names = sorted({row.style for row in found})
    for split, spell in (("train", lambda n, style: style.lower() if n % 3 == 0 else style), ("val", lambda n, style: style.upper())):
        with (tmp_path / "data" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "question", "answer", "style"))
            writer.writerows((r.name, r.question, r.answer, spell(n, r.style)) for n, r in enumerate(rows.read_split(few, split)))
    run, parts = prepared(train_gated.get_args(flags("--data", str(tmp_path / "data"), "--images", str(few / "images"))))
    assert run.model.styles == names and {r.style for r in parts.train.rows} == set(names) >= {r.style for r in parts.val.rows}
    told = [line for line in capsys.readouterr().out.splitlines() if "differ by case" in line]
    assert [line.split(":")[0] for line in told] == ["train", "styles that differ by case, blanks, _ and - only are one"]
    assert "cubism is Cubism" in told[0] and "CUBISM is Cubism" in told[1]
    assert rows.one_spelling(["Pop Art", "pop art", " Pop Art", "b", "B"], log=lambda line: None) == {"pop art": "Pop Art", "b": "B"}


def test_styles_of_a_table_are_one_in_the_spellings_of_wikiarts_lists():
    """A folder's Pop_Art is the list's Pop Art; so are those of a table. The spelling that is known stands, else the commonest."""
    said = []
    named = rows.one_spelling(["Pop_Art", "Pop Art", "pop-art", "Pop Art", "Neo_X", "Rococo"], log=said.append)
    assert named == {"Pop_Art": "Pop Art", "pop-art": "Pop Art"} and len(said) == 1
    assert rows.one_spelling(["Pop Art", "Pop Art"], known={"Pop_Art"}, log=said.append) == {"Pop Art": "Pop_Art"}
    assert {wikiart.style_name(name) for name in ("Pop_Art", "Pop Art", "pop-art")} == {"Pop Art"}
    both = ["Pop_Art", "Pop Art"]  # of a best.pt of an earlier version, which knows them as two
    assert rows.one_spelling(both, known=both, log=said.append) == {}


def test_question_types_of_one_name_are_one_row_of_the_table(few, tmp_path):
    """Also where training spelled them otherwise, and in a file of answers of an earlier version."""
    kinds = ["Style", "style", "style ", "how_many", "How many"]
    (tmp_path / "val.csv").write_text("image,question,answer,question_type\n" + "".join(
        f"{row.name},What?,two,{kind}\n" for row, kind in zip(rows.read_split(few, "val"), kinds)))
    said = []
    read = read_questions(str(tmp_path / "val.csv"), "val", images=str(few / "images"), log=said.append)
    told = [line for line in said if "question types" in line]
    assert told == ["val: question types that differ by case, blanks, _ and - only are one: Style is style, how_many is How many"]
    table = evaluation.score_table(read, {"x": [{"prediction": "two"}] * 5})
    assert [(row["type"], row["n"]) for row in table] == [("How many", 2), ("style", 3), ("all", 5)]
    again = rows.unify_spelling(read, {"": "two", "STYLE": "two"}, said.append, "question_type")  # the keys of best.pt's "majority"
    assert [row.question_type for row in again] == ["STYLE"] * 3 + ["How many"] * 2
    ours = comparison.rows_of(range(5), read, [{"prediction": "two"}] * 5)
    theirs = [{**row, "question_type": kind} for row, kind in zip(ours, kinds)]
    assert comparison.in_order(ours, theirs, "a", "b") == theirs
    with pytest.raises(errors.DataError, match="question_type is"):
        comparison.in_order(ours, [{**row, "question_type": "colour"} for row in ours], "a", "b")


def test_wikiart_styles_that_differ_by_case_are_one(few, tmp_path, capsys):
    """In folders and in a table of subsets; WikiArt's own names are one in any spelling."""
    pictures = [row.image for row in rows.read_split(few, "train")][::5][:6]
    for number, (path, style) in enumerate(zip(pictures, ("My Style", "My Style", "my style", "Other", "Other", "Other"))):
        (tmp_path / "folders" / style).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "folders" / style / f"{number}.jpg")
    names = sorted(str(path.relative_to(tmp_path / "folders")) for path in (tmp_path / "folders").rglob("*.jpg"))
    subsets = "".join(f"{name},{'val' if n % 2 else 'train'}\n" for n, name in enumerate(names))
    for where, more in (("folders", {}), ("folders/classes.csv", {"images": str(tmp_path / "folders")})):
        if more:
            (tmp_path / where).write_text("filename,subset\n" + subsets)
        classes, splits = wikiart.read_data(str(tmp_path / where), **more)
        assert classes == ["My Style", "Other"] and sum(len(read) for read in splits.values()) == 6
        assert "my style is My Style" in capsys.readouterr().out


# --- one table for both splits ------------

def test_hold_out_by_picture(sample, tmp_path):
    found = rows.read_split(sample, "train")
    held, kept = (rows.hold_out(found, 0.25, side) for side in (True, False))
    assert not {r.name for r in held} & {r.name for r in kept} and len(held) + len(kept) == len(found)
    assert len({r.name for r in held}) == round(0.25 * len({r.name for r in found}))
    assert list(reversed(held)) == rows.hold_out(found[::-1], 0.25, True)  # does not depend on the order
    with pytest.raises(rows.DataError, match="one picture"):
        rows.hold_out(found[:2], 0.25, True)


def test_one_table_trains_and_evaluates_on_different_pictures(few, flags, tmp_path, capsys):
    more = ("--data", str(few / "train.csv"), "--val-share", "0.2", "--epochs", "1")
    args = train_gated.get_args(flags(*more))
    sides = [{row.image for row in train_gated.read_data(args, split)} for split in ("train", "val")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    train_gated.main(flags(*more))
    eval_gated.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--no-baselines", "--workers", "0", "--beams", "1"])
    assert f"all gated {5 * len(sides[1])}" in re.sub(" +", " ", capsys.readouterr().out)


def test_a_picture_under_two_names_stays_on_one_side(sample):
    found = rows.read_split(sample, "train")
    again = [replace(row, name=f"./{row.name}") for row in found]
    for share in (0.1, 0.5):
        held, kept = (rows.hold_out(found + again, share, side) for side in (True, False))
        assert not {r.image for r in held} & {r.image for r in kept} and len(held) + len(kept) == 2 * len(found)
    names = sorted({row.name for row in found}, key=lambda name: hashlib.sha256(name.encode()).digest())  # as it has always been
    assert {row.name for row in rows.hold_out(found, 0.25, True)} == set(names[:round(0.25 * len(names))])


def test_copies_of_a_picture_stay_on_one_side(sample, tmp_path):
    """Under whatever names, in rows of their own; all pictures that have none are divided as they would be without."""
    found, said = rows.read_split(sample, "train"), []
    held, kept = (rows.hold_out(found, 0.25, side, said.append) for side in (True, False))
    assert said == []
    twice = [held[0], kept[0], held[-1], kept[-1]]
    copied = [replace(row, image=shutil.copy(row.image, str(tmp_path / f"{n}.jpg")), name=f"zz/{n}.jpg") for n, row in enumerate(twice)]
    for side, before, more in ((True, held, copied[::2]), (False, kept, copied[1::2])):
        assert rows.hold_out(found + copied, 0.25, side, said.append) == before + more
    assert len(said) == 2 and all(line.startswith("4 pictures are copies of others under another name") for line in said)
    with pytest.raises(errors.DataError, match="one picture"):
        rows.hold_out([held[0], copied[0]], 0.5, True, said.append)
    shared = rows.shared_images({"train": kept, "val": [*held, copied[1]]})  # what --check-data says of two tables
    assert list(shared.values()) == [["train", "val"]] and len(said) == 3


def test_what_only_looks_like_a_copy_is_none(tmp_path):
    """Another byte in the middle, of uncompressed scans with white borders; empty files and such that are gone have no picture."""
    for name, middle in (("a", b"1"), ("b", b"2"), ("c", b"2"), ("d", b"12")):
        (tmp_path / name).write_bytes(b"w" * 2**17 + middle + b"w" * 2**17)
    for name in ("empty", "empty too"):
        (tmp_path / name).write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("c", "b", "a", "d", "empty", "empty too", "gone")]
    assert rows.copies([*paths, "", *paths], lambda line: None) == {str(tmp_path / "c"): str(tmp_path / "b")}


def test_a_run_that_validates_on_its_training_pictures_says_so(few, flags, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        shutil.copy(few / "train.csv", tmp_path / "data" / f"{split}.csv")
    args = train_gated.get_args(flags("--data", str(tmp_path / "data"), "--images", str(few / "images")))
    run, _ = prepared(args)
    capsys.readouterr()
    with run.open(False, vars(args), train_gated.__file__):
        said = capsys.readouterr().out
    assert said.startswith("8 of 8 validation pictures are trained on too, as the same file or a copy of it")
    assert run.digests == sorted({rows.picture_digest(str(path)) for path in {r.image for r in rows.read_split(few, "train")}})


@pytest.fixture
def one_table(few, flags, tmp_path, capsys):
    """(function: flags -> what eval_gated prints, its table) of a run on one table, of which some pictures were held out."""
    train_gated.main(flags("--data", str(few / "train.csv"), "--val-share", "0.2", "--epochs", "1"))
    capsys.readouterr()

    def score(*more):
        eval_gated.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--no-baselines", "--workers", "0", "--beams", "1", "--table",
                         str(tmp_path / "table.json"), *more])
        return capsys.readouterr().out, json.loads((tmp_path / "table.json").read_text())
    return score


def test_training_rows_are_never_scored_as_held_out_ones(few, one_table, tmp_path):
    with pytest.raises(errors.DataError, match="no test in it"):
        one_table("--split", "test")
    for more in ((), ("--data", str(few / "train.csv"))):  # the table of the training, named or not
        said, table = one_table(*more)
        assert "pictures that training saw: 0 of 10 rows\n" in said and {r["seen"] for r in table} == {0} and table[-1]["n"] == 10
    said, table = one_table("--split", "train")
    assert re.search(r"saw: (\d+) of \1 rows: these scores are not of held-out", said) and all(r["seen"] == r["n"] for r in table)
    (tmp_path / "copy/images").mkdir(parents=True)  # another table elsewhere, with other names of the same pictures
    read = rows.read_split(few, "train")[:10]
    for row in read:
        shutil.copy(row.image, tmp_path / "copy/images" / f"x{row.name}")
    (tmp_path / "copy/some.csv").write_text("image,question,answer,question_type\n" + "".join(f"x{r.name},What?,two,STYLE\n" for r in read))
    seen = {r.image for r in rows.hold_out(rows.read_split(few, "train"), 0.2, False)}
    count = sum(row.image in seen for row in read)
    said, table = one_table("--data", str(tmp_path / "copy/some.csv"), "--report", str(tmp_path / "page.html"))
    assert 0 < count and f"saw: {count} of 10 rows" in said and table[-1]["seen"] == count
    assert {r["type"] for r in table} == {"style", "all"}  # as training spells it
    assert f"{count} of 10 rows" in (tmp_path / "page.html").read_text()


def test_a_table_that_has_moved_is_still_divided_as_it_was(few, flags, tmp_path, capsys):
    """And a question's number is that of its row in the table, whatever is held out or left out."""
    data = shutil.copytree(few, tmp_path / "data")
    train_gated.main(flags("--data", str(data / "train.csv"), "--val-share", "0.2", "--epochs", "1"))
    data.rename(tmp_path / "moved")
    capsys.readouterr()
    eval_gated.main(["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "moved/train.csv"), "--no-baselines", "--workers",
                     "0", "--beams", "1", "--predictions", str(tmp_path / "p.json")])
    printed = capsys.readouterr().out
    assert "taken as the table of the training" in printed and "pictures that training saw: 0 of 10 rows\n" in printed
    table = list(csv.DictReader((few / "train.csv").open(encoding="utf-8")))
    for row in csv.DictReader((tmp_path / "p.csv").open(encoding="utf-8")):
        asked = table[int(row["question_id"])]
        assert (asked["image"], asked["question"], asked["answer"]) == (row["image"], row["question"], row["answer"])
    assert len(json.loads((tmp_path / "p.json").read_text())) == 10


def test_a_row_that_is_left_out_moves_no_number(sample, tmp_path):
    lines = (sample / "val.csv").read_text(encoding="utf-8").splitlines()
    image, question, _, *rest = next(csv.reader([lines[1]]))
    (tmp_path / "val.csv").write_text("\n".join([lines[0], ",".join([image, question, "", *rest]), *lines[2:]]) + "\n", encoding="utf-8")
    found = read_questions(str(tmp_path), "val", images=str(sample / "images"), skip_bad=0.5, workers=1, log=lambda line: None)
    assert comparison.question_ids(found)[:3] == [1, 2, 3]


def test_a_checkpoint_that_does_not_know_its_pictures_says_so(one_table, tmp_path):
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    del best["pictures"]
    checkpoints.save_checkpoint(tmp_path / "run/best.pt", best)
    said, table = one_table()
    assert "training saw: unknown" in said and "seen" not in table[-1]
    checkpoints.save_checkpoint(tmp_path / "run/best.pt", {**best, "args": {**best["args"], "val_share": 0.0}})
    with pytest.raises(errors.DataError, match="nothing in it was held out"):
        one_table()


def test_no_training_on_its_own_validation_rows(few, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_gated.main(flags("--data", str(few / "train.csv"), "--val-share", "0"))
    assert "--val-share 0 would validate on the rows that are trained on" in capsys.readouterr().err


def test_compare_gated_refuses_a_split_that_is_not_there_before_it_trains(few, flags, tmp_path):
    with pytest.raises(errors.DataError, match="no test in it"):
        compare_gated.main(flags("--data", str(few / "train.csv"), "--out", str(tmp_path / "compare")))
    assert not (tmp_path / "compare").exists()


# --- --check-data ------------

def test_check_data_says_what_the_language_model_gets(flags, capsys, monkeypatch):
    monkeypatch.setattr(core, "load_blip2", lambda *a: pytest.fail("a weight was loaded"))
    monkeypatch.setattr(core, "load_foreign", lambda *a: pytest.fail("a weight was loaded"))
    assert train_gated.main(flags("--check-data", "--max-answer", "3")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"train: \d+ of 40 answers are cut at 3 tokens, first \S+ \(line \d+\): '", printed)
    shown = re.findall(r"\(line \d+\): \[(.*)\] \|' ?(.*)\\n', (\d+) tokens are trained", printed)
    assert len(shown) == 3 and all("Question: " in prompt and prompt.endswith("Answer:") and int(n) <= 3 for prompt, _, n in shown)


def test_check_data_of_pictures_in_two_splits_and_a_missing_one(sample, flags, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    text = (sample / "train.csv").read_text(encoding="utf-8")
    (folder / "train.csv").write_text(text, encoding="utf-8")
    (folder / "val.csv").write_text("\n".join(text.splitlines()[:4]), encoding="utf-8")
    more = ("--check-data", "--data", str(folder), "--images", str(sample / "images"))
    assert train_gated.main(flags(*more)) == 0
    assert "in train and val: " in capsys.readouterr().out
    (folder / "val.csv").write_text(text.splitlines()[0] + "\nnowhere.jpg" + "," * text.splitlines()[0].count(","), encoding="utf-8")
    assert train_gated.main(flags(*more)) == 1
    assert "training would fail" in capsys.readouterr().out


# --- several answers a question ------------

LONG = "a much longer answer than all the others are"


@pytest.fixture
def several(few, tmp_path):
    """The training rows of `few` in LAVIS's layout, every third of them with three answers, one of which is long; val as it is."""
    with (few / "train.csv").open(encoding="utf-8", newline="") as file:
        table = [{**row, "answer": row["answer"] if n % 3 else [row["answer"], "another", LONG]}
                 for n, row in enumerate(csv.DictReader(file))]
    (tmp_path / "several").mkdir()
    (tmp_path / "several/vqa_train.json").write_text(json.dumps(table))
    shutil.copy(few / "val.csv", tmp_path / "several")
    return "--data", str(tmp_path / "several"), "--images", str(few / "images")


def trained_answers(run, parts, epoch, after=0):
    """{row: its answer as the labels of the batches of an epoch have it}, from some step of it on."""
    left, found = run.plan(epoch)[after:], {}
    for keys, batch in zip(loop.keys_of(left), run.batches(epoch, left)):
        found |= {n: text_of(run.model.tokenizer, labels[labels != -100]).strip() for n, labels in zip(keys, batch["labels"])}
    return found


def test_each_epoch_trains_on_one_of_several_answers(flags, several, capsys):
    run, parts = prepared(train_gated.get_args(flags(*several)))
    epochs, read = [trained_answers(run, parts, epoch) for epoch in range(6)], parts.train.rows
    for epoch, found in enumerate(epochs):
        assert found == {n: rows.draw_answer(read[n], 42, epoch, n).answer for n in found}
    drawn = {n: {found[n] for found in epochs if n in found} for n in epochs[0]}
    assert all(len(drawn[n]) == 1 for n in drawn if n % 3) and max(len(drawn[n]) for n in drawn) == 3
    left = trained_answers(run, parts, 3, after=1)
    assert left and left == {n: epochs[3][n] for n in left}  # as --resume goes on
    assert parts.collate.max_answer == len(core.answer_ids(run.model.tokenizer, LONG))
    assert "train: 0 of 68 answers are cut" in capsys.readouterr().out  # 26 rows of one answer, 14 of three
    assert run.best()["draws_answers"] and run.settings["training rows (hash)"].endswith(", answers drawn")


def test_one_answer_a_row_trains_as_it_did(flags):
    """The batches are those of the rows as they are, and a last.pt of an earlier version fits."""
    run, parts = prepared(train_gated.get_args(flags()))
    for left in (run.plan(0), run.plan(5)):
        for keys, batch in zip(loop.keys_of(left), run.batches(5, left)):
            wanted = parts.collate([parts.train[n] for n in keys])
            assert batch.keys() == wanted.keys() and all(torch.equal(batch[name], wanted[name]) for name in wanted)
    assert not run.best()["draws_answers"] and run.settings["training rows (hash)"] == rows.fingerprint(parts.train.rows)


def test_the_rehearsal_takes_the_longest_of_several_answers(flags, several, monkeypatch):
    run, parts = prepared(args := train_gated.get_args(flags(*several)))
    seen = []
    monkeypatch.setattr(train_gated, "train_step", lambda run, step, weights: seen.extend(step))
    monkeypatch.setattr(train_gated, "validate", lambda *everything: None)
    train_gated.rehearse(run, parts, args)
    (batch,), longest = seen, core.answer_ids(run.model.tokenizer, LONG)
    assert all(labels[labels != -100].tolist() == longest for labels in batch["labels"])


def test_a_run_on_the_commonest_answers_does_not_go_on_with_drawn_ones(flags, several):
    run, parts = prepared(train_gated.get_args(flags(*several)))
    before = {**run.settings, "training rows (hash)": rows.fingerprint(parts.train.rows)}  # of an earlier version
    with pytest.raises(errors.DataError, match="training rows .hash. is '.*, answers drawn', was"):
        runfolder.refuse_other_settings(run.settings, before, "last.pt")


# --- predictions, for other people's evaluators ------------

def official_accuracy(result_file, annotation_file):
    """VQAv2's evaluator, written from its description for this test and sharing nothing with metrics.py.

    Both files as the official tool takes them. Accuracy of a question: over every annotator, the share of min(1, equal
    answers of the others / 3); both sides are normalised unless all annotators agree."""
    results = {r["question_id"]: r["answer"] for r in json.loads(result_file.read_text())}
    annotations = json.loads(annotation_file.read_text())["annotations"]
    assert set(results) == {a["question_id"] for a in annotations}, "the tool refuses results that do not match the annotations"
    numbers = dict(zip("zero one two three four five six seven eight nine ten none".split(), [*map(str, range(11)), "0"]))

    def normal(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)  # enough for answers like ours
        return " ".join(numbers.get(word, word) for word in text.split() if word not in ("a", "an", "the"))

    total = 0
    for one in annotations:
        answers, given = [a["answer"] for a in one["answers"]], results[one["question_id"]]
        if len(set(answers)) > 1:
            answers, given = [normal(a) for a in answers], normal(given)
        total += sum(min(1, (answers[:i] + answers[i + 1:]).count(given) / 3) for i in range(len(answers))) / len(answers)
    return 100 * total / len(annotations)


def test_predictions_in_the_official_format(few, flags, tmp_path):
    """Real answers of eval_gated, half of them made right (in other case and with a mark), scored here and there."""
    with (few / "val.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        with (data / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*table[0], "question_id"])
            writer.writeheader()
            writer.writerows({**r, "question_id": 458752000 + 7 * i} for i, r in enumerate(table))
    more = ("--data", str(data), "--images", str(few / "images"), "--epochs", "1")
    train_gated.main(flags(*more))
    out = tmp_path / "p.json"
    eval_gated.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--no-baselines", "--workers", "0", "--beams", "1",
                     "--predictions", str(out)])
    results = json.loads(out.read_text())
    assert [r["question_id"] for r in results] == [458752000 + 7 * i for i in range(len(table))]
    for i, (one, row) in enumerate(zip(results, table)):
        if i % 2:
            one["answer"] = f"The {row['answer'].upper()}."
    (tmp_path / "p.json").write_text(json.dumps(results))
    annotators = [[r["answer"]] * 9 + ["something else"] for r in table]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [
        {"question_id": one["question_id"], "answers": [{"answer": a, "answer_id": k + 1} for k, a in enumerate(answers)]}
        for one, answers in zip(results, annotators)]}))
    theirs = official_accuracy(out, tmp_path / "a.json")
    ours = 100 * sum(metrics.vqa_accuracy(one["answer"], answers) for one, answers in zip(results, annotators)) / len(results)
    assert ours == pytest.approx(theirs, abs=1e-9) and theirs > 40
    table_score = evaluation.score([one["answer"] for one in results], [r["answer"] for r in table])["VQA"]
    assert table_score == pytest.approx(theirs, abs=1e-9)  # nine of ten annotators give the table's one answer


def test_a_question_id_that_stands_twice_is_refused(sample):
    found = rows.read_split(sample, "val", {"question_id": "question_type"})
    with pytest.raises(rows.DataError, match=r"line 2 and line \d+ share question_id"):
        comparison.question_ids(found)
    assert comparison.question_ids(rows.read_split(sample, "val"))[:3] == [0, 1, 2]


def test_question_ids_stay_as_they_are_written(sample):
    """GQA's 01827492 and 1827492 are two questions; what is no plain spelling of a whole number is a text."""
    written = ["01827492", "1827492", "0", "00", "-5", "1e5", "\u0663", "q7", " 8", ""]
    found = [replace(row, question_id=text) for row, text in zip(rows.read_split(sample, "val"), written)]
    assert comparison.question_ids(found) == ["01827492", 1827492, 0, "00", "-5", "1e5", "\u0663", "q7", " 8", 9]
