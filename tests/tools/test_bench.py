"""bench.py on sizes of a few seconds: that both recipes compute the same, and that what is computed from shapes is what torch keeps.

No test looks at a time: machines are noisy, and bench.py itself prints ratios.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from engine import errors, loop
from engine.errors import DataError
from test_answering import Held
from tools import bench

SIZES = {"vision": {**bench.SMALL["vision"], "num_hidden_layers": 1, "image_size": 56}, "qformer": bench.SMALL["qformer"],
         "text": {**bench.SMALL["text"], "num_hidden_layers": 2}, "queries": 8}


@pytest.fixture
def task(tmp_path):
    bench.write_task(tmp_path, SIZES, pictures=4, questions=3)
    return tmp_path, bench.lean_run(tmp_path, batch_size=3)


def test_every_step_of_the_staircases_has_the_same_loss_and_answers(task):
    folder, lean = task
    plain, run = bench.Plain(folder, lean), lean.run
    before, losses, answers = {name: p.clone() for name, p in run.model.named_parameters()}, {}, {}
    for recipe in bench.training_recipes(lean, plain, losses).values():
        recipe()
    assert len(losses) == 9 and len(plain.losses) == 4
    assert all(loss == pytest.approx(losses["plain"], abs=1e-5) for loss in losses.values())
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())  # a learning rate of 0
    assert run.model.qformer.training and run.model.query_tokens.requires_grad  # frozen in one step alone
    for recipe in bench.answer_recipes(lean, plain, answers, 5).values():
        recipe()
    ranked = answers.pop(bench.RANKED)
    one, every = answers.pop("plain, one at a time"), bench.EVERY
    assert len(answers) == 7 and all(found == plain.answers and found[::every] == one for found in answers.values())
    assert len(set(plain.answers)) > 2 and set(ranked) <= {row.answer for row in lean.parts.train.rows}


def test_ours_is_the_default_recipe(task):
    args, parts = task[1].args, task[1].parts
    assert args.gating == "film" and parts.weights == {"hit_weight": 0.1, "kl_weight": 0.05} and parts.built_from["styles"]
    assert parts.train[0][0].keys() == {"image_embeds", "style_feature"}


def test_staircase_by_hand(monkeypatch):
    times = {"plain": [8.0, 4.0, 6.0], "a": [4.0, 2.0, 2.0], "b": [1.0, 2.0, 1.0]}
    assert bench.staircase(times) == [{"name": "plain", "per_second": 1 / 6, "factor": 1, "total": 1},
                                      {"name": "a", "per_second": 1 / 2, "factor": 2, "total": 2},
                                      {"name": "b", "per_second": 1, "factor": 2, "total": 6}]  # medians of 2 2 3, 4 1 2, 8 2 6
    calls = []
    monkeypatch.setattr(bench, "seconds", lambda function: function() or 6.0)
    found = bench.in_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "xy"}, 2)
    assert calls == list("xyxy") and found == {"x": [6.0, 2.0], "y": [3.0, 1.5]}


def test_operations_by_hand():
    layer, q = torch.nn.Linear(6, 5), torch.randn(1, 2, 4, 8, requires_grad=True)

    def function():
        layer(torch.randn(3, 6)).sum().backward()  # forward and the weights' gradient: the input has none
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        return 3
    linear, product = 2 * 3 * 6 * 5, 2 * 2 * 4 * 4 * 8  # of a product in attention: heads, rows, columns, width
    assert bench.operations(function) == (2 * linear + (2 + 5) * product) / 3  # backward: the scores again, and four gradients
    steps = [{"name": "plain", "per_second": 4.0}, {"name": "ours", "per_second": 10.0}]
    assert bench.with_operations(steps, {"plain": 6e9, "ours": 2e9}) == [
        {"name": "plain", "per_second": 4.0, "gflop": 6, "by_operations": 1, "gflops": 24},
        {"name": "ours", "per_second": 10.0, "gflop": 2, "by_operations": 3, "gflops": 20}]


def test_ours_has_less_to_do_in_every_step_but_that_of_the_gates(task):
    folder, lean = task
    recipes = bench.training_recipes(lean, bench.Plain(folder, lean), {})
    counted = {name: bench.operations(function) for name, function in recipes.items()}
    assert counted.pop(bench.FROZEN) < counted["+ both style terms: ours"] and counted.pop("+ film gates") > counted["+ no pads"]
    falling = list(counted.values())[:-1]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == len(falling) == 6


def test_the_plain_recipe_pays_for_everything(task):
    folder, lean = task
    plain, read = bench.Plain(folder, lean), lean.parts.train.rows
    inputs = plain.inputs(read[:4], bench.PADDED)
    assert inputs["input_ids"].shape == (4, SIZES["queries"] + bench.PADDED) and inputs["pixel_values"].shape == (4, 3, 56, 56)
    assert plain.model(**inputs).logits.shape[1] == SIZES["queries"] + bench.PADDED
    lengths = [len(row.question) for row in read]
    assert max(lengths) - min(lengths) > 30  # of mixed length


def test_activation_bytes_by_hand():
    layer = torch.nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    assert loop.activation_bytes(layer, lambda: layer(x)) == 0  # a frozen linear layer keeps nothing but its weight
    assert loop.activation_bytes(layer, lambda: torch.relu(layer(x))) == 3 * 5 * 4
    assert loop.activation_bytes(layer, lambda: torch.relu(layer(x)) * torch.relu(layer(x))) == 2 * 3 * 5 * 4


def test_plan_equals_what_a_real_step_keeps():
    """On the meta device as on the CPU, here with the sizes of the test."""
    real, meta = (bench.random_model(SIZES, device, torch.float32) for device in ("cpu", "meta"))
    kept = [loop.activation_bytes(m, lambda m=m: bench.shapes_of_a_step(m.train(), bench.random_batch(m, SIZES, 2))) for m in (real, meta)]
    batch = bench.random_batch(real, SIZES, 2)
    whole = loop.activation_bytes(real, lambda: real.train()(**batch))
    assert kept[0] == pytest.approx(whole, rel=0.05) and kept[1] == pytest.approx(kept[0], rel=0.15)


def test_full_size_on_paper(tmp_path, capsys):
    """Against the arithmetic of the shapes: OPT-2.7B in bf16 4.94 GiB, in nf4 1.46; the bars of the issue at batch 2."""
    bench.main(["--size", "full", "--plan", "--json", str(tmp_path / "plan.json")])
    found = json.loads((tmp_path / "plan.json").read_text())
    table = {(one["lm"], one["trained"], one["activations"]): one for one in found["rows"]}
    assert found["computed"] and len(table) == 12 and "computed from the shapes" in capsys.readouterr().out
    whole = {lm: table[lm, "Q-Former and gates", "keep"] for lm in ("bf16", "nf4")}
    assert whole["bf16"]["weights"] / 2**30 == pytest.approx(4.94, abs=0.01)
    assert whole["nf4"]["weights"] / 2**30 == pytest.approx(1.46, abs=0.01)
    assert whole["nf4"]["batch 2"] < 4 * 2**30 and whole["bf16"]["batch 2"] < 7.5 * 2**30
    samples = [table["bf16", "gates", how]["sample"] for how in ("keep", "bits", "recompute")]
    assert samples == sorted(samples, reverse=True)
    relu = 32 * 60 * 10240  # layers, tokens, width
    assert samples[0] - samples[1] == relu * 2 - relu / 8  # bf16 against one bit


def test_full_size_code_on_a_small_size(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bench.answering, "Recording", Held)
    monkeypatch.setattr(bench.answering, "record_steps", lambda lm: setattr(lm, "recorded_steps", {}))
    monkeypatch.setattr(bench.compiling, "compile_layers", lambda lm, accelerator: compiled.append(type(accelerator.autocast())))
    Held.made, compiled = 0, []
    found = bench.full(SimpleNamespace(repeats=1), SIZES, batches=(2,))
    assert [(one["trained"], one["lm"], one["option"]) for one in found["rows"]] == [
        ("Q-Former and gates" if train_qformer else "gates", lm, option) for train_qformer, lm, option in bench.WAYS]
    assert all(one["samples_per_second"] > 0 and one["answers_per_second"] > 0 for one in found["rows"])
    assert Held.made == 1 and compiled == [torch.autocast] and found["left_out"] == []


def test_full_size_stops_when_its_time_is_over(capsys):
    pytest.importorskip("bitsandbytes")
    found = bench.full(SimpleNamespace(repeats=1), SIZES, batches=(2, 8), minutes=0)
    assert found["rows"] == [] and len(found["left_out"]) == 2 * len(bench.WAYS)
    assert "left out: nf4, Q-Former and gates, as it is, batch 8" in capsys.readouterr().out


def test_operations_of_the_full_size():
    """0.642 TFLOP a sample with the Q-Former trained, by the shapes of BLIP-2 OPT-2.7B."""
    model = bench.random_model(bench.FULL, "meta", torch.bfloat16)
    assert bench.step_flops(bench.FULL, model) / 1e12 == pytest.approx(0.642, rel=0.01)


def test_gate_cost_is_the_share_of_what_differs(monkeypatch):
    """Seconds come from a clock that counts calls: 1 for every visual prompt without gates, 3 with, 2 an update, 10 a step."""
    real, seen = bench.core.Blip2OPTGated.visual_prompt, []
    monkeypatch.setattr(bench.core.Blip2OPTGated, "visual_prompt",
                        lambda self, *a, **k: seen.append(a[4] if len(a) > 4 else "step") or real(self, *a, **k))

    def counted(function):
        before = len(seen)
        function()
        return {False: 1, True: 3, "step": 10}[seen[-1]] if len(seen) > before else 2
    monkeypatch.setattr(bench, "seconds", counted)
    assert bench.gate_cost(3, SIZES) == (3 - 1 + 2) / 10


def test_full_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert errors.exit_code(bench.main, ["--size", "full"]) == 2
    assert "--plan" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--plan"])


def test_growth_measures_a_command_and_says_why_one_fails(tmp_path, monkeypatch):
    bench.write_task(tmp_path, SIZES, pictures=2, questions=8)
    seconds, peak = bench.command_cost(tmp_path, "first")
    assert seconds > 1 and 2**27 < peak < 2**35 and (tmp_path / "first/best.pt").is_file()
    (tmp_path / "train_gated.py").write_text("import sys; sys.exit('one line\\nerror: ' + sys.argv[-1] + ' already holds best.pt')")
    monkeypatch.setattr(bench.files, "PROJECT", tmp_path)  # one that fails at once
    with pytest.raises(DataError, match="failed: error: .*first already holds best.pt"):
        bench.command_cost(tmp_path, "first")
