"""pytest tests/test_qformer.py: pretrain_qformer.py on random tiny weights. Behaviour-checked; its losses, negatives and score
matrices are checked against LAVIS's in test_golden.py, its data in test_pairs.py."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import core
import loop
import make_tiny
import metrics
import pretrain_qformer
import published
import runfolder
import train_cir
from conftest import ROOT
from rows import DataError

TEXTS = ["three red boats on the water", "a house", "at night, two blue stars all over the sky", "an orange fish", "one tree in a meadow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny BLIP-2 in the image-text-retrieval format."""
    loop.seed_everything(0)
    return make_tiny.save_random_retrieval(tmp_path_factory.mktemp("models"))


@pytest.fixture
def build(folder):
    """Function that builds a Stage1 from the random tiny weights, in eval mode."""
    def build_model():
        loop.seed_everything(1)
        args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", folder, "--init", "random"])
        return pretrain_qformer.load_model(args, torch.float32, lambda *words: None).eval()
    return build_model


def make_batch(model, count=5, ids=None):
    """Random image features and sentences of different length."""
    image = torch.randn(count, 17, model.vision_model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    text = core.text_ids(model.tokenizer, (TEXTS * 4)[:count])
    return {"image_embeds": image, **text, "image_ids": torch.arange(count) if ids is None else torch.tensor(ids)}


# --- losses ------------

def test_no_word_is_predicted_from_a_later_one_and_all_from_the_image(build):
    model = build()
    batch = make_batch(model, 1)
    ids, mask, image = batch["input_ids"], batch["attention_mask"], batch["image_embeds"]

    def logits(ids, image):
        states = model.joint(image, ids, mask, core.unilm_mask)[:, model.query_tokens.shape[1]:]
        return model.lm_head(states, model.embeddings.word_embeddings.weight)[0]  # [L,V]

    whole = logits(ids, image)
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 7) % 100 + 10
        difference = (logits(changed, image) - whole).abs().amax(-1)  # [L]
        assert difference[:place].max() == 0 and difference[place] > 1e-4
    assert ((logits(ids, image + 0.5 * torch.randn_like(image)) - whole).abs().amax(-1) > 1e-5).all()


def test_one_batch_is_overfitted(build):
    model = build().train()
    batch = make_batch(model)
    optimizer = pretrain_qformer.make_optimizer(model, 2e-3, 0.0)
    for step in range(150):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    parts = model.eval()(**batch)
    # floors of smoothed targets: the entropy of the targets
    V, B, s = model.dec + 1, 5, pretrain_qformer.SMOOTHING

    def floor(classes):
        high, low = 1 - s + s / classes, s / classes
        return -high * math.log(high) - (classes - 1) * low * math.log(low)

    assert parts["itc"] < floor(B) + 0.1 and parts["itm"] < 0.1 and parts["itg"] < floor(V) + 0.3
    assert model.temp.item() != pytest.approx(0.07)


def test_every_trained_tensor_gets_a_gradient(build):
    model = build()
    model(**make_batch(model))["loss"].backward()
    dead = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().sum() == 0)}
    assert not {n for n in dead if not n.endswith("key.bias")}  # a bias on keys cancels in the softmax


@pytest.mark.parametrize("ids", [[0], [3, 3, 3]])
def test_without_any_negative_the_losses_are_finite(build, ids):
    model = build()
    parts = model(**make_batch(model, len(ids), ids))
    parts["loss"].backward()
    assert all(torch.isfinite(part) for part in parts.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    lone = make_batch(model, 1)
    alone = model.match(lone["image_embeds"], lone["input_ids"], lone["attention_mask"])
    if len(ids) == 1:  # only the right pair is left
        assert parts["itm"].item() == pytest.approx(F.cross_entropy(alone, torch.tensor([1])).item(), rel=1e-5)


def test_pairs_of_one_image_are_never_negatives():
    torch.manual_seed(0)
    ids = torch.tensor([0, 0, 1, 2, 1, 0])
    other = ids[:, None] != ids[None]
    for _ in range(50):
        drawn = pretrain_qformer.draw_negatives(torch.randn(6, 6) * 20, other)
        assert (ids[drawn] != ids).all()
    targets = core.itc_targets(ids, ids, 0.1)
    assert torch.allclose(targets.sum(1), torch.ones(6)) and targets[0, 1] == targets[0, 0] == pytest.approx(0.3 + 0.1 / 6)


def test_itc_of_distinct_ids_is_smoothed_cross_entropy():
    i2t, t2i, ids = torch.randn(4, 4), torch.randn(4, 4), torch.arange(4)
    wanted = sum(F.cross_entropy(x, ids, label_smoothing=0.1) for x in (i2t, t2i)) / 2
    assert core.itc_loss(i2t, t2i, core.itc_targets(ids, ids)).mean() == pytest.approx(wanted.item(), rel=1e-6)


TWO = """
    import sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    import test_qformer, pretrain_qformer, core, loop
    from accelerate import Accelerator
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    loop.seed_everything(1)
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", {folder!r}, "--init", "random"])
    model = pretrain_qformer.load_model(args, torch.float32, lambda *words: None).eval()
    batch = test_qformer.make_batch(model, 6, [0, 1, 2, 3, 1, 5])
    rank, count = accelerator.process_index, accelerator.num_processes
    share = {{name: value[rank * 6 // count:(rank + 1) * 6 // count] for name, value in batch.items()}}
    if rank:  # lengths may differ between processes
        share["input_ids"], share["attention_mask"] = (torch.nn.functional.pad(share[n], (0, 3)) for n in ("input_ids", "attention_mask"))
    wrapped = accelerator.prepare(model)
    # always the same negatives, as numbers of the whole batch
    drawn = torch.tensor([5, 4, 3, 2, 0, 1])[rank * 6 // count:(rank + 1) * 6 // count]
    parts = wrapped(**share, negatives=(drawn, drawn))
    parts["loss"].backward()
    losses = accelerator.reduce(torch.stack([parts[n] for n in ("itc", "itm", "itg")]), "mean")
    if accelerator.is_main_process:
        torch.save([losses, {{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}], sys.argv[1])
"""


def test_two_processes_equal_one_with_the_whole_batch(folder, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=folder)))
    found = []
    for count in (1, 2):
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command = [sys.executable, *(launch if count == 2 else []), str(script), str(tmp_path / "x.pt")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / "x.pt", weights_only=True))
    (one_losses, one), (two_losses, two) = found
    assert torch.allclose(one_losses[:2], two_losses[:2], rtol=1e-5)  # ITC and ITM; ITG is a mean over words, of each process
    assert one.keys() == two.keys()
    for name in ("vision_projection.weight", "text_projection.weight", "temp", "itm_head.weight"):  # no ITG in these
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6), name


# --- evaluation ------------

def test_recalls_by_brute_force():
    rng = np.random.default_rng(0)
    owner = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    for scores in (rng.integers(0, 4, (8, 5)).astype(float), np.zeros((8, 5)), np.full((8, 5), np.nan)):
        i2t = scores.T
        found = pretrain_qformer.recalls(scores, i2t, owner)
        for k in (1, 5):
            hits = [sum(not scores[t, g] < scores[t, owner[t]] for g in range(5) if g != owner[t]) < k for t in range(8)]
            assert found[f"t2i R@{k}"] == pytest.approx(100 * np.mean(hits))
            wrong = [min(sum(not i2t[g, t] < i2t[g, right] for t in range(8) if owner[t] != g) for right in np.flatnonzero(owner == g))
                     for g in range(5)]
            assert found[f"i2t R@{k}"] == pytest.approx(100 * np.mean([w < k for w in wrong]))


def test_best_ranks_with_one_right_column_are_target_ranks():
    scores, target = np.random.default_rng(1).integers(0, 5, (30, 12)), np.arange(30) % 12
    right = target[:, None] == np.arange(12)
    assert (metrics.best_ranks(scores, right) == metrics.target_ranks(scores, target)).all()


# --- weights ------------

def test_start_from_bert(tmp_path, folder):
    from transformers import BertConfig, BertForMaskedLM
    bert_folder = tmp_path / "bert"
    tokenizer = published.load_tokenizer(folder)
    bert = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                      intermediate_size=64, max_position_embeddings=48)).eval()
    for module in bert.modules():
        if hasattr(module, "bias") and isinstance(module.bias, torch.nn.Parameter):
            torch.nn.init.normal_(module.bias, std=0.3)
    torch.nn.init.zeros_(bert.bert.embeddings.token_type_embeddings.weight)  # BLIP-2 has none
    bert.save_pretrained(bert_folder)
    tokenizer.save_pretrained(bert_folder)
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", folder, "--init", str(bert_folder)])
    said = []
    model = pretrain_qformer.load_model(args, torch.float32, said.append).eval()
    text = core.text_ids(tokenizer, TEXTS)
    with torch.no_grad():
        wanted = bert.bert(**text).last_hidden_state
        states = model.qformer(model.embeddings(text["input_ids"]), mask=core.padding_mask(text["attention_mask"]))
        real = text["attention_mask"].bool()
        assert torch.allclose(states[real], wanted[real], atol=1e-5)
        logits = model.lm_head(states, model.embeddings.word_embeddings.weight)
        assert torch.allclose(logits[real][:, :-1], bert(**text).logits[real], atol=1e-4)
    layer = model.qformer.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(layer.output_query.LayerNorm.bias, layer.output.LayerNorm.bias)
    assert model.query_tokens.shape == (1, 32, 32) and model.query_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert "cross-attention" in said[-1] and "[DEC]" in said[-1] and "qformer" not in said[-1]
    assert model.config.image_text_hidden_size == 256 and model.dec == len(tokenizer)


def test_export_loads_in_transformers_and_in_the_next_stages(build, tmp_path):
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval
    model = build()
    with torch.no_grad():
        model.temp.fill_(0.05)
    pretrain_qformer.export(model, tmp_path / "hf")
    theirs, found = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    images, text = torch.randn(2, 3, 112, 112), core.text_ids(model.tokenizer, TEXTS[:2])
    with torch.no_grad():
        wanted = theirs.eval()(pixel_values=images, **text, use_image_text_matching_head=False).logits_per_image
        ours = core.max_similarity(model.text_features(**text), model.image_features(model.image_embeds(images))).T
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer("a house").input_ids == model.tokenizer("a house").input_ids
    again = pretrain_qformer.load_model(pretrain_qformer.get_args(["--data", "x=y", "--blip2", str(tmp_path / "hf"), "--init", str(tmp_path / "hf")]),
                                        torch.float32, lambda *words: None)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())  # temp and lm_head too
    cir = train_cir.Sprc.load(str(tmp_path / "hf"))
    assert cir.temp.item() == pytest.approx(0.05) and torch.equal(cir.text_projection.weight, model.text_projection.weight)


def test_train_gated_takes_the_exported_qformer(tiny, tmp_path):
    """A stage-1 Q-Former of the tiny BLIP-2's sizes."""
    blip2, tokenizer = published.load_blip2(tiny[0])
    qformer = blip2.config.qformer_config
    qformer.use_qformer_text_input, blip2.config.image_text_hidden_size = True, 32
    model = pretrain_qformer.Stage1(blip2.vision_model, blip2.config, tokenizer)
    pretrain_qformer.start_at_random(model)
    pretrain_qformer.export(model, tmp_path / "hf")
    gated = core.Blip2OPTGated.build(*tiny, [], gating="none", qformer=str(tmp_path / "hf"))
    theirs, own = gated.qformer.state_dict(), model.qformer.state_dict()
    assert all(torch.equal(theirs[name], own[name]) for name in theirs) and torch.equal(gated.query_tokens, model.query_tokens)


def test_convert_of_a_lavis_checkpoint(build, folder, tmp_path, capsys):
    from test_cir import to_lavis
    model = build()
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("vision_model.")}
    lavis = {n.replace("lm_head.", "Qformer.cls.predictions."): t for n, t in to_lavis(state).items()}
    lavis["Qformer.cls.predictions.decoder.weight"] = state["embeddings.word_embeddings.weight"]
    torch.save({"model": lavis}, tmp_path / "stage1.pth")
    pretrain_qformer.main(["--convert", str(tmp_path / "stage1.pth"), "--blip2", folder, "--out", str(tmp_path / "run")])
    loaded = published.read_weights(tmp_path / "run/hf")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items()) and loaded.keys() == state.keys()
    code = loop.exit_code(pretrain_qformer.main, ["--convert", str(tmp_path / "stage1.pth"), "--blip2", folder, "--out", str(tmp_path / "run")])
    assert code == 2 and "is there already" in capsys.readouterr().err


def test_the_vision_tower_of_other_folders(folder, tiny, tmp_path):
    whole, _ = published.load_vision(folder)
    whole.save_pretrained(tmp_path / "vision")
    alone, config = published.load_vision(str(tmp_path / "vision"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), alone.state_dict().values()))
    opt, _ = published.load_vision(tiny[0], torch.bfloat16)
    assert next(opt.parameters()).dtype == torch.bfloat16
    with pytest.raises(DataError, match="no readable config"):
        published.load_vision(str(tmp_path))
