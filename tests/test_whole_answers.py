"""pytest tests/test_whole_answers.py: no answer is cut without a word, and every way to ask generates equally far.

The model is the one that ships: its longest training answer, a technique, has more tokens than any default length of the libraries.
"""

import csv
import json
import shutil

import pytest
from accelerate import Accelerator

import core
import demo
import eval_gated
import train_gated
from data import rows
from engine import checkpoints, decoders, published
from tools import drawing

LONGEST = "in flat areas with thick outlines"


@pytest.fixture(scope="module")
def shipped():
    return core.load_gated(published.tiny("gated"))


@pytest.fixture(scope="module")
def asked(sample, shipped):
    """A row of the drawn sample whose answer is the longest."""
    model, processor = shipped
    read = [r for split in ("train", "val", "test") for r in rows.read_split(sample, split) if r.answer == LONGEST]
    answers = model.predict_answers(processor([r.image for r in read]), [r.question for r in read])
    return next(r for r, answer in zip(read, answers) if answer == LONGEST)


def test_no_row_of_the_sample_is_cut(sample, shipped):
    tokenizer = shipped[0].tokenizer
    read = [r for split in ("train", "val", "test") for r in rows.read_split(sample, split)]
    assert {LONGEST} == {r.answer for r in read} & {max(drawing.TECHNIQUES.values(), key=len)}
    batch = core.encode_training(tokenizer, [r.question for r in read], [r.answer for r in read], shipped[0].max_answer)
    told = [tokenizer.decode(ids[labels != -100]).strip() for ids, labels in zip(batch["input_ids"], batch["labels"])]
    assert told == [r.answer for r in read]


def test_five_ways_to_ask_give_the_same_answer(asked, shipped, tmp_path):
    model, processor = shipped
    best = published.tiny("gated") + "/best.pt"
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    shutil.copy(asked.image, data / "images/a.jpg")
    (data / "test.csv").write_text("image,question,answer,style,question_type\n"
                                   f"a.jpg,{asked.question},{asked.answer},{asked.style},technique\n")
    where = ["--checkpoint", best, "--workers", "0"]
    eval_gated.main([*where, "--data", str(data), "--split", "test", "--no-baselines", "--predictions",
                     str(tmp_path / "test.json")])
    eval_gated.main([*where, "--ask", asked.question, "--images", str(data / "images"), "--answers", str(tmp_path / "asked.csv")])
    with (tmp_path / "asked.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    features = model.image_features(processor(asked.image))
    ways = {"predict_answers": model.predict_answers(processor(asked.image), [asked.question])[0],
            "--select em": train_gated.greedy_answers(model, [asked], features)["prediction"][0],
            "eval_gated.py": json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))[0]["answer"], "--ask": table[0]["answer"],
            "demo.py": demo.answers_of(demo.Session(model), asked.image, asked.question)["gated"]["answer"]}
    assert ways == dict.fromkeys(ways, LONGEST)


def with_long_answers(few, folder, train, val):
    """Few pictures with these answers in the first rows of its tables -> the new folder."""
    shutil.copytree(few, folder)
    for split, answer in (("train", train), ("val", val)):
        with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            read = list(csv.DictReader(file))
        read[0]["answer"] = answer
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, read[0])
            writer.writeheader()
            writer.writerows(read)
    return folder


def test_the_length_follows_from_the_training_answers_and_travels(few, flags, tmp_path, capsys):
    data = with_long_answers(few, tmp_path / "data", "one " * 20, "one " * 24)
    command = flags("--data", str(data), "--epochs", "1", "--gating", "none")
    train_gated.main(command)
    tokenizer = published.load_tokenizer(command[command.index("--blip2") + 1])
    longest = len(core.answer_ids(tokenizer, "one " * 20))
    printed = capsys.readouterr().out
    assert longest > 16 and f"train: 0 of 40 answers are cut at {longest} tokens" in printed
    assert f"val: 1 of 15 answers are cut at {longest} tokens, first" in printed
    best = tmp_path / "run/best.pt"
    assert checkpoints.load_checkpoint(best)["model_args"]["max_answer"] == longest
    model, _ = core.load_gated(best)
    assert model.max_answer == longest
    args = eval_gated.get_args(["--checkpoint", str(best), "--workers", "0"])
    run = eval_gated.prepare(args, checkpoints.load_checkpoint(best), Accelerator(cpu=True))
    assert run.model.max_answer == run.collate.max_answer == longest
    assert "val: 1 of 15 answers are cut" in capsys.readouterr().out


def test_a_question_that_is_cut_is_said_wherever_it_is_asked(few, flags, tmp_path, capsys):
    """Of one that is not, nothing."""
    data, long = shutil.copytree(few, tmp_path / "data"), "Is it red or blue? " * 30
    with (data / "train.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    read[0]["question"] = read[1]["question"] = long
    with (data / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, read[0])
        writer.writeheader()
        writer.writerows(read)
    count = len({row["question"] for row in read})
    line = f"train: 1 of {count} different questions are cut at 64 tokens"
    for more in ("--check-data",), ("--epochs", "1", "--gating", "none"):
        train_gated.main(flags("--data", str(data), *more))
        printed = capsys.readouterr().out
        assert line in printed and "val: 1 of" not in printed.replace("answers", "")
    shared = ["--checkpoint", str(tmp_path / "run"), "--workers", "0", "--beams", "1", "--precision", "no"]
    eval_gated.main([*shared, "--split", "train", "--no-baselines"])
    assert line in capsys.readouterr().out
    eval_gated.main([*shared, "--images", str(few / "images"), "--answers", str(tmp_path / "a.csv"), "--ask", long, "How many?"])
    assert "--ask: 1 of 2 different questions are cut" in capsys.readouterr().out


def test_what_the_limit_cuts_is_said(few, flags, tmp_path, capsys):
    data = with_long_answers(few, tmp_path / "data", "one " * 90, "red")
    assert train_gated.main(flags("--data", str(data), "--check-data")) == 0
    assert f"train: 1 of 40 answers are cut at {core.MAX_ANSWER} tokens, first" in capsys.readouterr().out


def test_generation_goes_to_the_length_of_the_model(build, batch, monkeypatch):
    model, lengths = build(max_answer=23), []
    plain = decoders.Causal.generate

    def generate(self, visual, asked, beams, new_tokens, *settings):
        lengths.append(new_tokens)
        return plain(self, visual, asked, beams, new_tokens, *settings)
    monkeypatch.setattr(decoders.Causal, "generate", generate)
    for more in ({}, {"beams": 1}, {"best": 3}, {"max_new_tokens": 2}):
        model.predict_answers(batch["images"][:1], ["Which style?"], **more)
    assert lengths == [23, 23, 23, 2]


def test_the_best_of_the_beams_are_distinct_and_begin_with_the_answer(build, batch):
    model = build()
    together = model.predict_answers(batch["images"], ["Which style?", "How many?", "Colour?"], best=3)
    assert len(together) == 3 and all(1 <= len(texts) == len(set(texts)) <= 3 for texts in together)
    assert [texts[0] for texts in together] == model.predict_answers(batch["images"], ["Which style?", "How many?", "Colour?"])


def test_a_best_pt_from_before_keeps_its_length(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "best.pt", {"model_args": {"gating": "none"}, "args": {"max_answer": 12}, "state": {}})
    assert checkpoints.load_checkpoint(tmp_path / "best.pt")["model_args"] == {"gating": "none", "max_answer": 12}
