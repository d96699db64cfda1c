"""pytest tests/test_evaluation.py: what an evaluation says of a system is true of that system.

Each test is named for a fault that once went unnoticed, and asserts what must be, by another way than the code takes: pictures that
are exchanged, gates that are zeroed by hand, distributions that are known. Random tiny models, features in place of pictures.
"""

import argparse
import copy
import json
import types
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import core
import efficientnet_pretrain
import eval_gated
import metrics
import train_blip_caption
import train_cir
import train_gated
from data import cirr, rows, wikiart
from data.questions import Questions
from data.rows import Row
from engine import cache, captioning, checkpoints, comparison, errors, evaluation, galleries, loop, picture_index, published, retrieval
from engine.prompts import Collate
from test_cir import random_retrieval
from tools import compare_gated

STYLES = ["Cubism", "Pop Art"]
WEIGHTS = {"hit_weight": 0.1, "kl_weight": 0.05}
ASKED = [Row(image, image, question, answer, kind, "Cubism", 2, "val.csv") for image in ("a", "b") for question, answer, kind in
         (("Which style is this painting?", "Cubism", "style"), ("How many boats can be seen in the water?", "three", "count"),
          ("Colour?", "red", "colour"))]


# --- the systems of eval_gated.py ------------

class World:
    """Two pictures, three questions about each, and a model before and after its training, as eval_gated.py has them."""

    def __init__(self, tiny):
        torch.manual_seed(1)
        self.before = core.Blip2OPTGated.build(*tiny, STYLES, max_answer=4).eval()
        self.after = copy.deepcopy(self.before)
        for gate in self.after.gates:
            nn.init.normal_(gate.value.weight, std=0.5)
        with torch.no_grad():
            self.after.language_projection.weight.mul_(1.5)
        width = self.before.vision_model.config.hidden_size
        generator = torch.Generator().manual_seed(2)
        self.features = {name: {"image_embeds": torch.randn(17, width, generator=generator),
                                "style_feature": 3 * torch.rand(self.before.efficientnet.width, generator=generator)} for name in "ab"}
        self.collate = Collate(self.before.tokenizer, STYLES, 4)

    def other(self, *names):
        """The features with these of one picture given to the other."""
        return {name: {**self.features[name], **{part: self.features["ba"["ab".index(name)]][part] for part in names}} for name in "ab"}

    def losses(self, model, features=None, **ablation):
        """The loss of each question's answer [N], by the model's own forward."""
        data = Questions(ASKED, model.image_size, features or self.features)
        found = evaluation.evaluate(model, data, self.collate, Accelerator(cpu=True), 6, 0, WEIGHTS, **ablation)
        return torch.tensor([one["lm"] for one in found])

    def systems(self, features=None):
        """What eval_gated.py finds of each system: {name: losses [N]}, and the answers {name: N texts}."""
        args = argparse.Namespace(no_baselines=False, shuffle_style=True, predictions=None, abstain_below=None, report=None, workers=0,
                                  method="generate", beams=1, max_new_tokens=3, batch_size=6, checkpoint="best.pt")
        checkpoint = {"state": checkpoints.trainable_state(self.after), "loss_weights": WEIGHTS, "answers": ["red", "Cubism"],
                      "majority": {"": "three", "style": "Pop Art", "colour": "red"}}
        run = types.SimpleNamespace(args=args, checkpoint=checkpoint, accelerator=Accelerator(cpu=True), model=copy.deepcopy(self.before),
                                    questions=ASKED, data=Questions(ASKED, self.before.image_size, features or self.features),
                                    collate=self.collate)
        run.answer = types.MethodType(eval_gated.Evaluation.answer, run)
        found = eval_gated.answers_of_systems(run)
        return ({name: torch.tensor([one["lm"] for one in results]) for name, results in found.items() if "lm" in results[0]},
                {name: [one["prediction"] for one in results] for name, results in found.items()})


@pytest.fixture(scope="module")
def world(tiny):
    return World(tiny)


@pytest.fixture(scope="module")
def systems(world):
    return world.systems()


def apart(one, other):
    return (one - other).abs().max() > 1e-3


def test_no_image_sees_none(world, systems):
    """With all that is seen of the pictures exchanged nothing of it changes, while every other system's losses do."""
    exchanged, _ = world.systems(world.other("image_embeds", "style_feature"))
    assert torch.equal(systems[0]["no image"], exchanged["no image"])
    assert all(apart(systems[0][name], exchanged[name]) for name in ("BLIP-2, no gates", "gates closed", "gated"))


def test_the_ungated_blip2_is_untrained_and_has_no_gates(world, systems):
    assert torch.allclose(systems[0]["BLIP-2, no gates"], world.losses(world.before, gated=False), atol=1e-5)
    assert apart(systems[0]["BLIP-2, no gates"], systems[0]["gates closed"])


def test_closed_gates_are_closed(world, systems):
    """Closed gates are gates whose last layer is zero, by hand; what else was trained stays."""
    closed = copy.deepcopy(world.after)
    for gate in closed.gates:
        for parameter in gate.value.parameters():
            nn.init.zeros_(parameter)
    assert torch.allclose(systems[0]["gates closed"], world.losses(closed), atol=1e-5)
    assert apart(systems[0]["gates closed"], systems[0]["gated"])
    assert torch.allclose(systems[0]["gated"], world.losses(world.after), atol=1e-5)


def test_anothers_style_is_that_of_the_other_picture_and_nothing_else_is(world, systems):
    assert torch.allclose(systems[0]["another's style"], world.losses(world.after, world.other("style_feature")), atol=1e-5)
    assert apart(systems[0]["another's style"], systems[0]["gated"])


def test_the_majority_answer_is_that_of_the_type_and_else_of_all(systems):
    assert systems[1]["majority answer"] == ["Pop Art", "three", "red"] * 2


def test_a_row_keeps_its_own_numbers_and_an_evaluation_has_no_dropout(world):
    model = copy.deepcopy(world.after).train()
    data = Questions(ASKED, model.image_size, world.features)
    named = evaluation.evaluate(model, data, world.collate, Accelerator(cpu=True), 2, 0, WEIGHTS,
                                lambda model, rows, features: {"question": [(row.image, row.question) for row in rows]})
    assert [one["question"] for one in named] == [(row.image, row.question) for row in ASKED]
    assert not model.training and torch.allclose(torch.tensor([one["lm"] for one in named]), world.losses(world.after), atol=1e-4)


def test_hits_are_means_over_the_questions_about_style_alone():
    found = [{"row": n, "total": 1.0, "lm": float(n), "hit": hit, "hard_hit": hit, "hit_rows": rows}
             for n, (hit, rows) in enumerate([(0.5, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0)])]
    assert evaluation.loss_summary(found) == {"loss": 1.0, "lm": 1.5, "hit": 0.75, "hard_hit": 0.75}


def test_bleu_takes_the_prediction_as_hypothesis_and_every_persons_answer_counts():
    prediction, answer = "red", "a red boat on the water"
    scores = evaluation.score([prediction], [answer], [["blue"] * 5 + ["red"] * 5])
    assert scores["BLEU"] == pytest.approx(100 * metrics.sentence_bleu(prediction, answer))
    assert scores["BLEU-AQ"] == pytest.approx(100 * metrics.sentence_bleu(answer, prediction)) and scores["BLEU"] != scores["BLEU-AQ"]
    assert scores["VQA"] == 100 and scores["EM"] == 0


def test_a_type_counts_its_own_rows_and_those_that_training_saw():
    table = evaluation.score_table(ASKED, {"x": [{"prediction": row.answer} for row in ASKED]}, [True, False, False, False, False, False])
    assert {r["type"]: (r["n"], r["seen"]) for r in table} == {"colour": (2, 0), "count": (2, 0), "style": (2, 1), "all": (6, 1)}


# --- what best.pt and its choice come from ------------

def test_the_commonest_answer_and_the_candidates_are_the_trainings(world):
    train = [replace(row, answer="Pop Art" if row.question_type == "style" else "two") for row in ASKED]
    parts = types.SimpleNamespace(train=types.SimpleNamespace(rows=train), val=types.SimpleNamespace(rows=ASKED), built_from={},
                                  weights=WEIGHTS)
    held = train_gated.best_of(argparse.Namespace(), world.before, parts, {}, (), "no")
    assert held["answers"] == ["Pop Art", "two"] and held["majority"] == {"": "two", "style": "Pop Art", "count": "two", "colour": "two"}


def test_exact_match_in_training_is_of_answers_that_read_the_context(world):
    contexts = ["A boat.", "Two cats lie on a red bed in the very early morning.", ""] * 2
    group = [replace(row, context=text) for row, text in zip(ASKED, contexts)]
    features = {name: torch.stack([world.features[row.image][name] for row in ASKED]) for name in ("image_embeds", "style_feature")}
    asked = []
    model = types.SimpleNamespace(predict_answers=lambda *args, **more: asked.append((args, more)) or ["x"] * len(group))
    train_gated.greedy_answers(model, group, features)
    (_, questions, said), more = asked[0]
    assert list(said) == contexts and list(questions) == [row.question for row in group] and more["beams"] == 1


def test_the_projection_comes_with_its_qformer(tiny, tmp_path):
    other, _ = published.load_blip2(tiny[0])
    for part in (other.qformer, other.language_projection):
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    other.save_pretrained(tmp_path)
    gated = core.Blip2OPTGated.build(*tiny, [], gating="none", qformer=str(tmp_path))
    assert torch.equal(gated.language_projection.weight, other.language_projection.weight.float())
    assert torch.equal(gated.language_projection.bias, other.language_projection.bias.float())


def test_a_fingerprint_reads_more_than_one_value_of_a_tensor():
    """Of a model in half precision, as published; a tensor that is the same in its first and its last value alone is another one."""
    one = nn.ModuleDict({"vision_model": nn.Linear(40, 30)}).requires_grad_(False)
    for keep in (1, 600):
        other = copy.deepcopy(one)
        other["vision_model"].weight.flatten()[keep:-1].neg_()
        assert checkpoints.other_parts(checkpoints.fingerprint(other), checkpoints.fingerprint(one)) == ["vision_model"], keep


# --- compare_gated.py ------------

@pytest.fixture
def compared(tmp_path, monkeypatch):
    """compare_gated.main without training: validation losses by learning rate, answers by seed -> (compare.json, runs asked for)."""
    asked = []

    def one_run(args, others, system, lr, seed):
        asked.append((system, lr, seed))
        folder = tmp_path / f"{len(asked)}"
        folder.mkdir()
        right = 0 if system.startswith("ungated") else seed  # of the six questions
        said = [{"prediction": row.answer if n < right else "wrong"} for n, row in enumerate(ASKED)]
        rows = comparison.rows_of(range(len(ASKED)), ASKED, said)
        comparison.files.write_csv(folder / "test-answers.csv", rows)
        (folder / "test-answers.json").write_text(json.dumps([{"question_id": r["question_id"], "answer": r["prediction"]} for r in rows]))
        return {"flags": [], "value": {3e-4: 2.0, 1e-3: 1.0, 3e-3: None}[lr], "trained": 5, "steps": 7}, folder

    monkeypatch.setattr(compare_gated, "one_run", one_run)
    monkeypatch.setattr(compare_gated.train_gated, "read_data", lambda *args: [])
    monkeypatch.setattr(compare_gated, "step_seconds", lambda others, system: 0.5)
    monkeypatch.setattr(compare_gated, "scores", lambda args, others, folder: [
        {"type": kind, "system": "gated", "n": 2, "EM": 50.0} for kind in ("style", "colour")])
    compare_gated.main(["--data", "x", "--out", str(tmp_path / "out")])
    return json.loads((tmp_path / "out/compare.json").read_text()), asked


def test_every_system_has_its_best_learning_rate_and_all_seeds(compared):
    result, asked = compared
    assert set(result["rates"].values()) == {1e-3}
    for system in compare_gated.SYSTEMS:
        runs = [(lr, seed) for name, lr, seed in asked if name == system]
        assert runs[:3] == [(3e-4, 1), (1e-3, 1), (3e-3, 1)] and runs[3:] == [(1e-3, 1), (1e-3, 2), (1e-3, 3)]


def test_differences_are_of_the_same_questions_and_seeds(compared):
    found = compared[0]["compared"]["gated, Q-Former frozen"]["style"]  # rows 0 and 3: seeds 1, 2, 3 have 1, 1, 1 of them right
    assert found["ours"]["value"] == found["difference"]["value"] == 50 and found["theirs"]["value"] == 0 and found["n"] == 2
    assert found["pictures"] == 2 and (found["difference"]["low"], found["difference"]["high"]) == (0, 100)
    content = compared[0]["compared"]["gated, Q-Former frozen"]["content"]["ours"]["value"]
    assert content == pytest.approx(100 * (0 + 1 + 2) / 3 / 4)  # rows 1, 2, 4, 5
    assert compared[0]["compared"]["ungated, Q-Former frozen"]["style"]["difference"] == {"value": 0, "low": 0, "high": 0}


def test_the_spread_over_seeds_is_the_samples_standard_deviation():
    assert compare_gated.spread([1.0, 2.0, 3.0]) == "2.0 +- 1.0" and compare_gated.spread([4.0]) == "4.0 +- 0.0"


def finished_run(folder, last=None, **content):
    """run.json of a finished run of these flags, and its last.pt with `last` as settings."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"flags": ["--data", "x"], "value": 1.0, "trained": 5, "steps": 7, **content}))
    if last:
        checkpoints.save_checkpoint(folder / "last.pt", {"settings": last})
    return folder / "run.json"


def test_a_finished_run_is_compared_by_what_its_settings_became(tmp_path, monkeypatch, capsys):
    """Typed alike, on a machine where auto was bf16, of other rows, or by a version with another default: none stands beside new runs."""
    args = train_gated.get_args(["--data", "x"])
    kept = {}
    for became in ("no", "bf16"):
        monkeypatch.setattr(compare_gated.loop, "make_accelerator", lambda precision: types.SimpleNamespace(
            mixed_precision=became, num_processes=1))
        kept[became] = compare_gated.made_with(args, {"train": [], "val": []})
    now = kept["no"]
    assert compare_gated.held_of(finished_run(tmp_path / "same", settings=now), ["--data", "x"], now).keys() == {
        "flags", "value", "trained", "steps"}
    others = {"machine": kept["bf16"], "data": {**now, "training rows (hash)": "0"}, "version": {**now, "--per": "head"}}
    for name, was in others.items():
        wanted = {"machine": "--precision is 'no', was 'bf16'", "data": "training rows", "version": "--per is 'channel', was 'head'"}[name]
        with pytest.raises(errors.DataError, match=f"{name}/run.json: .*{wanted}.*choose another --out, or delete .*{name} to train"):
            compare_gated.held_of(finished_run(tmp_path / name, settings=was), ["--data", "x"], now)
    for name, precision in (("older", "no"), ("of the word", "auto")):
        run = finished_run(tmp_path / name, last={**now, "--precision": precision, "training rows (hash)": "0"})
        compare_gated.held_of(run, ["--data", "x"], now)
        with pytest.raises(errors.DataError, match="--per"):
            compare_gated.held_of(run, ["--data", "x"], {**now, "--per": "head"})
    with pytest.raises(errors.DataError, match="--precision is 'bf16', was 'no'"):
        compare_gated.held_of(tmp_path / "older/run.json", ["--data", "x"], kept["bf16"])
    assert not capsys.readouterr().out
    compare_gated.held_of(finished_run(tmp_path / "untrained"), ["--data", "x"], now)
    assert capsys.readouterr().out.startswith(f"note: {tmp_path / 'untrained/run.json'}: of an earlier version")


def test_the_seconds_are_of_one_model_at_a_time_and_come_after_the_table(few, tiny, tmp_path, monkeypatch):
    built, prepare, seconds = [], compare_gated.train_gated.prepare, compare_gated.step_seconds

    def watched(*args):
        written = json.loads((tmp_path / "out/compare.json").read_text())  # what cost hours is there
        assert len(written["results"]) == 2 and len(written["seconds_per_step"]) == len(built)
        assert not [one for one in built if one() is not None]
        run, parts = prepare(*args)
        built.append(weakref.ref(run.model))
        return run, parts

    held = {"flags": [], "value": 1.0, "trained": 5, "steps": 7, "style": 50.0, "content": 50.0}
    held |= {kind + seen: None for seen in list(compare_gated.SEEN)[1:] for kind in ("style", "content")}
    monkeypatch.setattr(compare_gated.train_gated, "prepare", watched)
    monkeypatch.setattr(compare_gated, "chosen_rates", lambda args, others: dict.fromkeys(args.systems, 1e-3))
    monkeypatch.setattr(compare_gated, "run_all", lambda args, others, rates: ({name: [held] for name in args.systems}, {}))
    monkeypatch.setattr(compare_gated, "differences", lambda args, folders: {})
    monkeypatch.setattr(compare_gated, "print_differences", lambda *args: None)
    monkeypatch.setattr(compare_gated, "step_seconds", lambda others, system: seconds(others, system, rounds=1, steps=1))
    compare_gated.main(["--systems", *compare_gated.SYSTEMS][:3] + [
        "--data", str(few), "--blip2", tiny[0], "--efficientnet", tiny[1], "--batch-size", "2", "--accumulation", "1", "--precision", "no",
        "--split", "val", "--out", str(tmp_path / "out")])
    assert len(built) == 2 and not [one for one in built if one() is not None]
    assert len(json.loads((tmp_path / "out/compare.json").read_text())["seconds_per_step"]) == 2


# --- retrieval ------------

MEMBERS = tuple(f"p{n}" for n in range(6))


def pool_of(queries, gallery=10):
    return cirr.Pool("cirr", queries, {f"p{n}": f"p{n}.png" for n in range(gallery)}, "val", "split.json")


def query(reference, target, members=MEMBERS):
    return cirr.Query("1", reference, target, ("bluer",), members, "cap.json", 1)


def test_negatives_of_a_step_are_neither_target_nor_reference(monkeypatch):
    """The pictures of a query are reference, target and N others, which alone are its negatives."""
    seen, images = {}, torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 1, 1, 1)
    model = types.SimpleNamespace(image_embeds=lambda pixels: pixels.flatten(1)[:, None])  # [B,1,1]

    def wrapped(reference, target, **more):
        seen.update(more, reference=reference, target=target)
        return {"loss": torch.zeros(())}

    class Step(list):
        forward, backward = torch.no_grad, staticmethod(lambda **parts: None)

    args = argparse.Namespace(hard_set=3, loss_rtc=0.4, loss_align=0.4, loss_patch=0.0, hard_batch=0.0)
    train_cir.train_step(types.SimpleNamespace(model=model, wrapped=wrapped), Step([{"images": images.clone()}]), args)
    assert seen["reference"].flatten().tolist() == [0, 0] and seen["target"].flatten().tolist() == [1, 1]
    assert seen["negatives"].flatten(1).tolist() == [[2, 3, 4]] * 2


def test_ranks_are_of_the_target_with_the_reference_left_out():
    pool = pool_of([query("p0", "p2"), query("p5", "p1")])
    scores = np.array([[9, 1, 5, 7, 2, 3, 8, 0, 0, 0], [4, 3, 5, 1, 2, 9, 8, 0, 0, 0]], float)
    first, second = retrieval.rank_queries(pool, scores)
    assert (first["rank"], first["subset_rank"], second["rank"], second["subset_rank"]) == (3, 2, 4, 3)
    assert first["best"] == ["p6", "p3", "p2", "p5", "p4"] and (first["score"], first["margin"]) == (5, -3)
    found = retrieval.recalls(scores, pool, "cirr")
    assert (found["R@1"], found["R@5"], found["Rs@1"], found["Rs@2"], found["Rs@3"]) == (0, 100, 0, 50, 100) and found["mean"] == 50
    assert retrieval.mean_of([{"R@10": 10.0}, {"R@10": 40.0}]) == {"R@10": 25.0}


def test_scores_of_another_pool_are_refused():
    """More columns than the gallery has pictures would be ranked as well."""
    pool = pool_of([query("p0", "p2"), query("p5", "p1")])
    for scores in (np.zeros((2, 11)), np.zeros((1, 10)), np.zeros(10), []):
        for rank in (lambda: retrieval.recalls(scores, pool, "cirr"), lambda: retrieval.rank_queries(pool, scores)):
            with pytest.raises(ValueError, match="of 2 queries and 10 pictures of cirr"):
                rank()
    with pytest.raises(ValueError, match="layout must be one of cirr, fashioniq, circo, got 'CIRR'"):
        retrieval.recalls(np.zeros((2, 10)), pool, "CIRR")
    with pytest.raises(ValueError, match="with a query at least"):
        retrieval.recalls(np.zeros((0, 10)), pool_of([]), "cirr")


def test_every_right_answer_of_circo_counts_and_the_reference_is_ranked():
    asked = cirr.Query("0", "p0", "p2", ("bluer",), (), "val.json", 1, answers=("p2", "p4"))
    pool = cirr.Pool("circo", [asked], {f"p{n}": f"p{n}.png" for n in range(6)}, "val", "list.json")
    found = retrieval.recalls(np.array([[0.8, 0.1, 0.7, 0.0, 0.9, 0.2]]), pool, "circo")  # p4, p0, p2: right, the reference, right
    assert found["mAP@5"] == pytest.approx(100 * (1 + 2 / 3) / 2) == found["mean"] and found["R@5"] == 100


def test_shortcuts_are_told_beside_both_and_what_neither_finds_apart():
    """Four queries: the sentence alone finds the first, the picture alone the second, both all but the last."""
    pool = pool_of([query("p0", f"p{n}") for n in (1, 2, 3, 4)])

    def table(*first):  # the picture that stands first for each query, all others alike
        scores = np.zeros((4, 10))
        scores[range(4), first] = 1
        return scores

    scores = {"text alone": table(1, 9, 9, 9), "picture alone": table(9, 2, 9, 9), "both": table(1, 2, 3, 9)}
    found = retrieval.shortcuts(pool, scores, "cirr")
    text, picture, both, hard = found["rows"]
    assert [(row["queries"], row["recalls"]["R@1"]) for row in found["rows"]] == [(4, 25), (4, 25), (4, 75), (2, 50)]
    assert "neither alone" in hard["input"] and found["ranks"]["both"] == [1, 1, 1, 9]
    assert both["mean"].value == pytest.approx(both["recalls"]["mean"]) and text["both minus this"].value == pytest.approx(
        both["recalls"]["mean"] - text["recalls"]["mean"])
    lines = []
    retrieval.print_shortcuts(pool, found, lines.append)
    assert len(lines) == 6 and lines[3].startswith("picture alone") and "25.0" in lines[3]


def test_each_half_of_a_query_is_scored_without_the_other(tmp_path_factory):
    """Other sentences change what the text alone finds and nothing of the picture, another reference the other way round."""
    model = train_cir.Sprc.load(random_retrieval(tmp_path_factory.mktemp("retrieval"))).eval()
    features = torch.nn.functional.normalize(torch.randn(10, 4, model.vision_projection.out_features,
                                                         generator=torch.Generator().manual_seed(1)), dim=-1)
    asked = [query("p0", "p1"), query("p2", "p3")]

    def scores(queries):
        return galleries.score_alone(model, pool_of(queries), features, Accelerator(cpu=True), 1)

    plain = scores(asked)
    other_text = scores([replace(one, captions=("two red boats on the water",)) for one in asked])
    other_picture = scores([replace(one, reference="p5") for one in asked])
    assert np.array_equal(plain["picture alone"], other_text["picture alone"])
    assert apart_arrays(plain["text alone"], other_text["text alone"])
    assert np.array_equal(plain["text alone"], other_picture["text alone"])
    assert apart_arrays(plain["picture alone"], other_picture["picture alone"])
    assert plain["picture alone"][0].argmax() == 0  # of all pictures the reference is the most like itself, and recalls leave it out


def apart_arrays(one, other):
    return np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("other", [(28, "plain", 1.25), (28, "targetpad", 1.5), (56, "targetpad", 1.25), (28, "squarepad", 1.25)])
def test_another_transform_is_another_feature(other):
    assert train_cir.Opener(28, "targetpad", 1.25).preprocessing() != train_cir.Opener(*other).preprocessing()


def test_an_index_is_of_its_weights_tower_and_pixels(monkeypatch):
    """The key under which --search keeps a gallery's vectors."""
    keys = []
    monkeypatch.setattr(picture_index, "open_index", lambda gallery, store, key, *more: keys.append(key))
    accelerator = types.SimpleNamespace(mixed_precision="no")
    model = nn.Linear(2, 2)
    model.query_tokens, model.vision_projection, args = torch.zeros(1, 4, 2), nn.Linear(2, 3), argparse.Namespace(
        gallery="photos", checkpoint="runs/cir/best.pt", workers=0, batch_size=4)
    best, opener = {"state": {"w": torch.zeros(3)}, "frozen": {"vision_model": "1"}}, train_cir.Opener(28, "targetpad", 1.25)
    for changed in ({}, {"state": {"w": torch.tensor([0.0, 0.0, 1.0])}}, {"frozen": {"vision_model": "2"}}):
        train_cir.index_gallery(args, {**best, **changed}, model, accelerator, opener)
    train_cir.index_gallery(args, best, model, accelerator, train_cir.Opener(28, "plain", 1.25))
    train_cir.index_gallery(args, best, model, types.SimpleNamespace(mixed_precision="bf16"), opener)
    assert len(set(keys)) == len(keys) == 5


def test_a_cache_of_other_weights_is_another_one():
    """One value of one weight."""
    one = nn.Linear(3, 2)
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.weight[1, 2] += 1e-3
    assert cache.made_from(one, {}) != cache.made_from(other, {}) and cache.made_from(one, {}) == cache.made_from(copy.deepcopy(one), {})


# --- captions ------------

def test_captions_are_searched_with_five_beams_and_never_say_two_words_twice():
    """The search is part of every figure: what makes one caption must not change unnoticed, nor be lost for --zero-shot."""
    wanted = {"num_beams": 5, "no_repeat_ngram_size": 2, "do_sample": False, "repetition_penalty": 1.1, "length_penalty": 1.0}
    assert wanted.items() <= train_blip_caption.GENERATION.items()


def test_the_loss_of_a_split_is_per_token_and_all_references_count(monkeypatch):
    monkeypatch.setattr(metrics, "_wordnet", lambda: None)
    pictures = types.SimpleNamespace(rows=[types.SimpleNamespace(captions=("a red boat", "two cats lie on a bed")),
                                           types.SimpleNamespace(captions=("a tree", "green leaves"))])
    results = [{"caption": "two cats lie on a bed", "loss": 1.0, "tokens": 1}, {"caption": "green leaves", "loss": 2.0, "tokens": 5}]
    found = captioning.summarize(results, pictures)
    assert found["loss"] == 0.5 and found["rouge_l"] == 1.0 and found["bleu_4"] == pytest.approx(1.0, abs=1e-3)
    assert found["score"] == pytest.approx((found["meteor"] + found["rouge_l"] + found["cider_d"]) / 3)


# --- the style classifier ------------

def test_mixup_leaves_most_of_one_picture():
    """Beta(0.2, 0.2), as Zhang et al. 2018 have it on ImageNet: the smaller share is small on average; of Beta(1, 1) it would be 0.25."""
    images, labels = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
    loop.seed_everything(1)
    shares = [efficientnet_pretrain.mix_batch(images, labels, 2, 0.0, 1.0)[1][0].min().item() for _ in range(400)]
    wanted = np.minimum(*(lambda share: (share, 1 - share))(np.random.default_rng(1).beta(0.2, 0.2, 20_000))).mean()
    assert np.mean(shares) == pytest.approx(wanted, abs=0.025)
    shares = [efficientnet_pretrain.mix_batch(torch.zeros(2, 3, 32, 32), labels, 2, 1.0, 0.0)[1][0].min().item() for _ in range(400)]
    assert 0.15 < np.mean(shares) < 0.3  # CutMix draws its share evenly, and loses a little at the borders


def test_half_of_the_training_pictures_are_mirrored_and_none_in_validation(tmp_path):
    (tmp_path / "Cubism").mkdir()
    Image.fromarray(np.repeat([[0] * 16 + [255] * 16], 32, 0).astype(np.uint8)).convert("RGB").save(tmp_path / "Cubism/a.png")
    row, = wikiart.make_rows([("Cubism/a.png", "Cubism", "", 0)], str(tmp_path))
    data = efficientnet_pretrain.Paintings([row], ["Cubism"], 16, 0.9)
    light = [pixels[:, :, :4].mean() > pixels[:, :, -4:].mean() for pixels in (data[0, 0, place][0] for place in range(60))]
    assert 18 < sum(light) < 42 and data[0][0][:, :, :4].mean() < data[0][0][:, :, -4:].mean()


@torch.no_grad()
def test_a_net_is_fed_in_the_normalisation_that_timm_states_and_its_file_says_so(tmp_path):
    """Google's Lite0 was trained on pixels around 0.5, B3 around ImageNet's mean; the classifier in Gated BLIP-2 follows the file."""
    import timm
    assert timm.create_model("efficientnet_b3", num_classes=2).pretrained_cfg["mean"] == rows.IMAGENET_MEAN
    net = timm.create_model("tf_efficientnet_lite0", num_classes=2).eval()
    half = net.pretrained_cfg["mean"]
    assert half == (0.5, 0.5, 0.5)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    row, = wikiart.make_rows([("a.png", "Cubism", "", 0)], str(tmp_path))
    data = efficientnet_pretrain.Paintings([row], ["Cubism"], 32, mean=half, std=half)
    assert data[0][0].min() < -0.9 and data[0][0].max() > 0.9
    parts = types.SimpleNamespace(ema=types.SimpleNamespace(module=net), classes=["Cubism", "Pop Art"], train=data)
    held = efficientnet_pretrain.best_of(argparse.Namespace(arch="tf_efficientnet_lite0", size=32), parts)
    checkpoints.save_checkpoint(tmp_path / "best.pt", held)
    classifier = core.EfficientNet28.from_checkpoint(tmp_path / "best.pt", safe=True).eval()
    assert torch.allclose(classifier.logits(classifier(rows.image_tensor(image, 32)[None])), net(data[0][0][None]), atol=1e-4)
