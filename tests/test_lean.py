"""The lean training step and the cache in the scripts: the same numbers with less work and less memory.

Against a reference: no padding mask, PackedReLU and recomputing against the plain pass, to the bit; features from a cache against
the towers in every step. Behaviour: batches of about equal length, precisions of the language model, what is refused on resume.
"""

import gc
import importlib.util
import json
import logging
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Blip2VisionModel

import core
import eval_gated
import train_gated
from conftest import prepared
from engine import checkpoints, errors, loop, memory, packing, published
from engine.errors import DataError

WEIGHTS = {"hit_weight": 0.1, "kl_weight": 0.05}


def gradients(model, batch):
    """Loss and gradients of a step without dropout."""
    model.zero_grad()
    parts = model.eval()(**batch, **WEIGHTS)
    parts["loss"].backward()
    return parts["loss"], {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def opened(build, **settings):
    """A model whose gates are open, so that gradients reach everything."""
    model = build(**settings)
    for gate in model.gates:
        torch.nn.init.normal_(gate.value.weight, std=0.1)
    return model


# --- the step ------------

def test_without_a_mask_the_loss_is_the_same_to_the_bit(build, batch):
    model, seen = opened(build), []
    decoder = model.language_model.model
    decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    lean = model(**batch)["lm"]
    assert seen[0]["attention_mask"] is None and seen[0]["use_cache"] is False
    mask = torch.cat([torch.ones(3, model.query_tokens.shape[1], dtype=torch.long), batch["attention_mask"]], 1)  # [B,S]
    assert not mask.all()  # there are pads
    decoder.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True)
    assert torch.equal(model(**batch)["lm"], lean)


def test_padding_to_a_multiple_changes_nothing(build, batch):
    model = opened(build)
    texts = ["Which style is this painting?", "Colour?"], ["Pop Art", "red"]
    plain, padded = (core.encode_training(model.tokenizer, *texts, multiple=m) for m in (1, 32))
    assert padded["input_ids"].shape[1] == 32 != plain["input_ids"].shape[1]
    for name, value in plain.items():
        assert torch.equal(padded[name][:, :value.shape[1]], value), name
    images = batch["images"][:2]
    assert torch.allclose(model(**plain, images=images)["lm"], model(**padded, images=images)["lm"], rtol=1e-5)


@pytest.mark.parametrize("how", ["bits", "recompute"])
def test_activations_are_smaller_and_gradients_the_same_to_the_bit(build, batch, how):
    def kept(model):
        """Bytes that a forward pass keeps for the backward one, the weights aside."""
        seen, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor
        held = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch, **WEIGHTS)
        return sum(size for place, size in seen.items() if place not in weights)

    plain, lean = opened(build), opened(build)
    memory.save_activations(lean.language_model, how)
    (loss, expected), (other, found) = gradients(plain, batch), gradients(lean, batch)
    assert torch.equal(loss, other) and expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert kept(lean) < 0.95 * kept(plain)
    answers = [model.predict_answers(batch["images"], ["Which style?"] * 3) for model in (plain, lean)]
    assert answers[0] == answers[1]


def test_packed_relu_in_every_dtype_and_shape():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 5, 16, dtype=dtype)
        x[0, 0, :3] = torch.tensor([0.0, -0.0, float("inf")])
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        upstream = torch.randn(3, 5, 16).to(dtype)
        memory.PackedReLU.apply(ours).backward(upstream)
        torch.relu(theirs).backward(upstream)
        assert torch.equal(ours.grad, theirs.grad) and torch.equal(memory.PackedReLU.apply(x), torch.relu(x))


def test_bits_are_refused_where_there_is_no_relu(build):
    model = build(gating="none")
    model.language_model.model.decoder.layers[0].activation_fn = torch.nn.GELU()
    with pytest.raises(DataError, match="GELU"):
        memory.save_activations(model.language_model, "bits")


def test_no_graph_below_the_first_trained_part(build, batch):
    model = opened(build)
    features = model.image_features(batch["images"])
    assert not any(tensor.requires_grad for tensor in features.values())
    seen = []
    model.qformer.encoder.layer[0].attention.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    model.qformer.encoder.layer[0].crossattention.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    gradients(model, batch)
    assert seen == [False, True]  # frozen queries need none; behind the first gate everything does


def test_training_runs_without_pads_and_is_compiled_where_asked(flags, monkeypatch):
    """What that means for loss, gradients and memory: test_decoders.py, for every kind of language model."""
    compiled = []
    monkeypatch.setattr(train_gated.compiling, "compile_layers", lambda model, accelerator: compiled.append(model))
    for more in ([], ["--compile"]):
        run, _ = prepared(train_gated.get_args(flags(*more)))
        assert run.model.language_model.config._attn_implementation == packing.NAME
        assert compiled == [run.model.language_model] * len(more)


# --- batches of about equal length ------------

def spread(plan, lengths):
    """Mean share of pads in the batches of a plan."""
    return np.mean([1 - np.mean([lengths[n] for n in numbers]) / max(lengths[n] for n in numbers)
                    for _, share in plan for _, numbers in share])


def test_sorted_by_length_every_step_has_the_rows_of_a_random_order():
    """The gradient of a step is that of plain batches, of every row once; only which rows share a micro-batch depends on their lengths."""
    lengths = np.random.default_rng(0).integers(5, 40, 1000)
    plain, sorted_, again, other = (loop.epoch_plan(1000, 8, 4, 3, epoch, lengths=order)
                                    for epoch, order in ((0, None), (0, lengths), (0, lengths), (1, lengths)))
    assert sorted_ == again != other
    assert [set(group) for group, _ in plain] == [set(group) for group, _ in sorted_]
    assert spread(sorted_, lengths) < 0.5 * spread(plain, lengths)
    assert all(np.ptp(lengths[numbers]) <= np.ptp(lengths[group]) / 2 for group, share in sorted_ for _, numbers in share[1:3])
    assert sorted(n for group, _ in loop.epoch_plan(992, 8, 4, 3, 0, lengths=lengths) for n in group) == list(range(992))
    few = loop.epoch_plan(20, 8, 4, 3, 0, lengths=lengths)  # fewer rows than a step has
    assert [sorted(group) for group, _ in few] == [list(range(20))]


def test_a_plan_sorted_by_length_leaves_no_length_out():
    """403 rows, 3 are left out an epoch: over the epochs not always the longest."""
    lengths = np.arange(403)
    out = [set(range(403)) - {n for group, _ in loop.epoch_plan(403, 8, 1, 3, epoch, lengths=lengths) for n in group}
           for epoch in range(30)]
    assert all(len(one) == 3 for one in out) and np.mean([n for one in out for n in one]) < 300


def test_a_plan_sorted_by_length_is_the_same_for_two_processes():
    lengths = np.random.default_rng(1).integers(5, 40, 100)
    one = loop.epoch_plan(100, 4, 2, 5, 0, lengths=lengths)
    two = [loop.epoch_plan(100, 4, 1, 5, 0, rank, 2, lengths=lengths) for rank in (0, 1)]
    assert [group for group, _ in one] == [group for group, _ in two[0]]
    for (_, whole), (_, first), (_, second) in zip(one, *two):
        assert sorted(first + second) == whole


def test_text_lengths_are_those_of_the_batches(build):
    tokenizer = build(gating="none").tokenizer
    texts = (["Which style is this?", "How many boats can be seen in the water?", "Colour?"], ["Pop Art", "three", "red"],
             ["", "A boat.", ""])
    masks = core.encode_training(tokenizer, *texts[:2], contexts=texts[2])["attention_mask"]
    guessed = core.text_lengths(tokenizer, *texts)
    assert [a - b for a, b in zip(masks.sum(1).tolist(), guessed)] == [2, 2, 2]  # BOS and the newline


# --- the cache in the scripts ------------

def test_a_cache_trains_to_the_same_weights(flags, tmp_path):
    """In float32, with batches of the cache's size: to the bit."""
    train_gated.train(train_gated.get_args(flags("--epochs", "1")))
    run = train_gated.train(train_gated.get_args(flags("--epochs", "1", "--cache", str(tmp_path / "cache"), out="kept")))
    assert run.model.vision_model is None
    plain, kept = (checkpoints.load_checkpoint(tmp_path / out / "best.pt") for out in ("run", "kept"))
    assert plain["frozen"] == kept["frozen"] and plain["value"] == pytest.approx(kept["value"], rel=1e-5)
    for name, tensor in plain["state"].items():
        assert torch.allclose(kept["state"][name], tensor, atol=1e-5), name
    tables = []
    for more in ([], ["--cache", str(tmp_path / "cache")]):  # either checkpoint goes with and without a cache
        table = tmp_path / "table.json"
        eval_gated.main(["--checkpoint", str(tmp_path / "run/best.pt"), "--workers", "0", "--table", str(table), "--shuffle-style", *more])
        tables.append(json.loads(table.read_text()))
    for a, b in zip(*tables, strict=True):
        assert a == {name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for name, value in b.items()}
    eval_gated.main(["--checkpoint", str(tmp_path / "kept/best.pt"), "--workers", "0", "--no-baselines"])


def test_the_tower_is_gone_when_the_language_model_is_loaded(flags, tmp_path, monkeypatch):
    load, held = published.load_blip2, []
    before = [m for m in gc.get_objects() if type(m) is Blip2VisionModel]  # of other tests

    def counted(*args):
        gc.collect()
        held.extend(m for m in gc.get_objects() if type(m) is Blip2VisionModel and not any(m is one for one in before))
        return load(*args)
    monkeypatch.setattr(core, "load_blip2", counted)
    run, _ = prepared(train_gated.get_args(flags("--cache", str(tmp_path / "cache"))))
    assert held == [] and run.model.vision_model is None
    with pytest.raises(RuntimeError, match="without the vision tower"):
        run.model.image_features(torch.zeros(1, 3, run.model.image_size, run.model.image_size))


def test_a_second_run_computes_no_feature(flags, tmp_path, monkeypatch, capsys):
    cached = flags("--cache", str(tmp_path / "cache"))
    prepared(train_gated.get_args(cached))

    def opened(path, size):
        raise AssertionError(path)
    monkeypatch.setattr(train_gated.rows, "picture_tensor", opened)
    _, parts = prepared(train_gated.get_args(cached))
    assert parts.train[0][0]["image_embeds"].ndim == 2
    assert "0 to make" in capsys.readouterr().out


def test_a_damaged_cache_is_one_line(flags, tmp_path, capsys):
    prepared(train_gated.get_args(flags("--cache", str(tmp_path / "cache"))))
    for path in (tmp_path / "cache").glob("vision-*.rows"):
        path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    assert errors.exit_code(train_gated.main, flags("--cache", str(tmp_path / "cache"))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "has changed since it was written" in error
    assert not (tmp_path / "run/best.pt").exists()


def test_resume_refuses_a_change_that_changes_the_result(flags, tmp_path, capsys):
    train_gated.main(flags("--epochs", "1", "--save-last"))
    for more, name in ((("--lm-precision", "bf16"), "--lm-precision"), (("--cache", str(tmp_path / "cache")), "a cache of features")):
        assert errors.exit_code(train_gated.main, flags("--epochs", "1", "--save-last", "--resume", *more)) == 2
        assert name in capsys.readouterr().err
    assert errors.exit_code(train_gated.main, flags("--epochs", "1", "--save-last", "--resume", "--activations", "bits")) == 0


# --- precision of the language model ------------

@pytest.mark.parametrize("name, far", [("bf16", 0.02), ("fp16", 0.02), ("int8", 0.05), ("nf4", 0.5)])
def test_language_model_in_another_precision(build, batch, name, far):
    if name in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    plain, small = opened(build), opened(build, lm_precision=name)
    assert small.vision_model.post_layernorm.weight.dtype == small.query_tokens.dtype == torch.float32
    held = small.language_model.model.decoder.layers[0].fc1.weight
    assert held.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, "nf4": torch.uint8}[name]
    expected, found = plain(**batch)["lm"], small(**batch)["lm"]
    assert not torch.equal(expected, found) and (expected - found).abs().max() < far
    loss, grads = gradients(small, batch)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads.values()) and len(grads) > 20
    was, now = checkpoints.fingerprint(plain), checkpoints.fingerprint(small)
    if name != "fp16":  # float32 weights that are rounded twice; published ones are in half precision anyway
        assert checkpoints.other_parts(now, was) == []
    assert (checkpoints.LINEAR in now) is (name in ("bf16", "fp16"))


def test_other_parts_names_what_differs(build):
    plain, other = checkpoints.fingerprint(build()), build()
    torch.nn.init.normal_(other.language_model.model.decoder.layers[0].fc1.weight)
    torch.nn.init.normal_(other.vision_model.embeddings.class_embedding)
    assert checkpoints.other_parts(checkpoints.fingerprint(other), plain) == [checkpoints.LINEAR, "vision_model"]
    assert checkpoints.other_parts(plain, "0123456789abcdef") == ["all"]


def test_training_and_evaluation_in_nf4(flags, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    train_gated.main(flags("--epochs", "1", "--lm-precision", "nf4", "--cache", str(tmp_path / "cache")))
    best = str(tmp_path / "run/best.pt")
    values = []
    for more in ([], ["--lm-precision", "fp32"]):
        capsys.readouterr()
        table = tmp_path / "table.json"
        eval_gated.main(["--checkpoint", best, "--workers", "0", "--no-baselines", "--beams", "1", "--table", str(table), *more])
        values.append(json.loads(table.read_text())[-1]["loss"])
        assert ("in training it was in nf4" in capsys.readouterr().out) is bool(more)
    assert values[0] == pytest.approx(checkpoints.load_checkpoint(best)["value"], rel=1e-4) and values[0] != values[1]


def test_nf4_trains_after_a_pass_without_gradient_on_every_cpu(build, batch, monkeypatch):
    """bitsandbytes 0.49 and newer repack 4-bit layers for inference on CPUs with avx512_bf16: here on any CPU, as they would there."""
    layers = pytest.importorskip("bitsandbytes").nn.modules
    if not hasattr(layers, "has_avx512bf16"):
        pytest.skip("this bitsandbytes never repacks")
    expected, expected_grads = gradients(opened(build, lm_precision="nf4"), batch)
    monkeypatch.setattr(layers, "has_avx512bf16", lambda: True)
    model = opened(build, lm_precision="nf4")
    was = {name: value.clone() for name, value in model.language_model.state_dict().items()}
    with torch.no_grad():
        model(**batch)
    loss, grads = gradients(model, batch)
    assert torch.equal(loss, expected) and grads.keys() == expected_grads.keys()
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())
    for name, value in model.language_model.state_dict().items():  # repacking would round the scales
        assert torch.equal(value, was[name]), name


@pytest.mark.parametrize("used", [
    lambda tiny: published.quantization("nf4", torch.float32), lambda tiny: core.Blip2OPTGated.build(*tiny, [], lora_rank=2)])
def test_bitsandbytes_asks_nobody_for_a_kernel(tiny, used, monkeypatch, caplog):
    """What it logs at its import on a CPU with avx512_bf16, whichever CPU this is; of other things it goes on to speak."""
    if not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("needs bitsandbytes")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(log, "filters", [])
    used(tiny)
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "none")
    log.warning("no such device")
    assert caplog.messages[-1:] == ["no such device"] and not [line for line in caplog.messages if "kernels" in line]


def test_packed_precisions_need_bitsandbytes(flags, monkeypatch, capsys):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    assert errors.exit_code(train_gated.main, flags("--lm-precision", "nf4")) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


# --- before and while a run goes on ------------

def test_dry_run_shows_what_the_model_reads_and_needs_and_writes_nothing(flags, tmp_path, capsys):
    cached = flags("--cache", str(tmp_path / "cache"), "--dry-run")
    assert train_gated.main(cached) is None and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert printed.count("Answer:] |") == 3 and "tokens are trained" in printed and "language_projection" in printed
    table = {line[:44].strip(): float(line[44:].split()[0].replace(",", "")) for line in printed.splitlines() if line.endswith(" MiB")}
    assert sum(table[name] for name in list(table)[:5]) == pytest.approx(table["sum, computed"], abs=0.4)
    assert table["AdamW's moments"] == pytest.approx(2 * table["trained weights"], abs=0.1)
    assert table["their gradients"] == table["trained weights"]
    assert table["measured, the whole process with Python"] > table["sum, computed"]
    stored = {path.name: path.stat().st_size / 2**20 for path in (tmp_path / "cache").glob("*.rows")}
    assert len(stored) == 2 and all(table[f"on disk: {name}"] == pytest.approx(size, abs=0.06) for name, size in stored.items())


def test_pace_is_said_once_and_without_the_first_step(monkeypatch):
    clock, said = iter([100.0, *(110.0 + n for n in range(1, 60))]), []
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    run = SimpleNamespace(step=0, total=4000, accelerator=SimpleNamespace(print=said.append))
    pace = loop.Pace(run, "questions")
    for _ in range(40):
        run.step += 1
        pace.step(32)
    # 20 steps after the first, from second 100 to 130, 32 questions each; 3,979 are left of 1.5 s each
    assert said == ["21.3 questions/s; about 1 h 39 min to the end, validation not counted"]
    assert [loop.format_duration(s) for s in (40, 99.4, 720, 3600, 3900)] == ["40 s", "99 s", "12 min", "1 h 00 min", "1 h 05 min"]


def test_the_last_line_can_be_cited(flags, capsys):
    command = flags("--epochs", "1", "--seed", "7")
    train_gated.main(command)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("to cite: best loss ") and "; seed 7; commit " in line
    assert line.endswith(shlex.join(["python", "train_gated.py", *command]))
