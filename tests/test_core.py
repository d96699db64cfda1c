"""pytest tests/test_core.py: the models.

Reference-checked: the Q-Former and the whole ungated system against transformers' BLIP-2 on the same weights.
Behaviour-checked: identity at start, gradients, invariances, style terms, prompts, generation, counts of the full-size model.
"""

import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Blip2ForConditionalGeneration, Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

import core
from data import rows
from engine import checkpoints, published
from engine.errors import DataError
from tools import make_tiny

KINDS = [("film", "head"), ("film", "channel"), ("gate", "head"), ("gate", "channel")]


def small_config(**changes):
    return Blip2QFormerConfig(**{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                                 "intermediate_size": 48, "encoder_hidden_size": 24, "max_position_embeddings": 40,
                                 "use_qformer_text_input": True, **changes})


def twins(config):
    """transformers' Q-Former and ours with the same random weights."""
    torch.manual_seed(0)
    theirs, ours = Blip2QFormerModel(config).eval(), core.QFormer(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


# --- Q-Former against transformers ------------

def test_query_path_equals_transformers():
    theirs, ours = twins(small_config(use_qformer_text_input=False))
    queries, image = torch.randn(2, 5, 32), torch.randn(2, 7, 24)
    expected = theirs(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    assert torch.allclose(ours(queries, image), expected, atol=1e-5)


def test_text_and_image_path_equals_transformers():
    theirs, ours = twins(small_config())
    embeds, image = torch.randn(2, 5 + 6, 32), torch.randn(2, 7, 24)
    text_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    mask_2d = torch.cat([torch.ones(2, 5, dtype=torch.long), text_mask], 1)
    expected = theirs(query_embeds=embeds, query_length=5, attention_mask=mask_2d, encoder_hidden_states=image).last_hidden_state
    found = ours(embeds, image, core.padding_mask(text_mask, 5), query_length=5)
    real = mask_2d.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)


def test_text_only_pass_equals_transformers():
    theirs, ours = twins(small_config())
    embeds = torch.randn(2, 6, 32)
    expected = theirs(query_embeds=embeds, query_length=0).last_hidden_state
    assert torch.allclose(ours(embeds), expected, atol=1e-5)


def test_text_embeddings_equal_transformers():
    config = small_config()
    theirs, ours = Blip2TextEmbeddings(config), core.TextEmbeddings(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = torch.randint(0, 50, (2, 9))
    assert torch.equal(ours(ids), theirs(ids))


def test_queries_without_image_are_refused():
    with pytest.raises(ValueError, match="image_embeds"):
        core.QFormer(small_config())(torch.randn(1, 5, 32), query_length=5)
    with pytest.raises(ValueError, match="no text path"):
        core.QFormer(small_config(use_qformer_text_input=False))(torch.randn(1, 5, 32))


def leaks(mask_function):
    """Does a later word change an earlier text position, or any word a query?"""
    _, ours = twins(small_config())
    embeds, image, text_mask = torch.randn(1, 5 + 6, 32), torch.randn(1, 7, 24), torch.ones(1, 6)
    changed = embeds.clone()
    changed[0, -1] += 1
    a, b = (ours(x, image, mask_function(text_mask, 5), query_length=5) for x in (embeds, changed))
    return not torch.equal(a[:, :-1], b[:, :-1])


def test_unilm_mask_does_not_leak_and_the_check_sees_a_leak():
    assert not leaks(core.unilm_mask)
    assert leaks(core.padding_mask)  # the leaky mask: plain padding in its place


def test_unimodal_mask_separates_text_and_queries():
    _, ours = twins(small_config())
    embeds, image, text_mask = torch.randn(2, 5 + 6, 32), torch.randn(2, 7, 24), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    both = ours(embeds, image, core.unimodal_mask(text_mask, 5), query_length=5)
    assert torch.allclose(both[:, :5], ours(embeds[:, :5], image), atol=1e-5)
    text = ours(embeds[:, 5:], mask=core.padding_mask(text_mask))
    assert torch.allclose(both[:, 5:][text_mask.bool()], text[text_mask.bool()], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_work_in_half_precision(dtype):
    _, ours = twins(small_config())
    embeds, mask = torch.randn(1, 6, 32), core.padding_mask(torch.zeros(1, 6))  # nothing to see at all: an even look at everything
    expected = ours(embeds, mask=mask)
    assert torch.allclose(ours.to(dtype)(embeds.to(dtype), mask=mask).float(), expected, atol=0.15)


# --- weights by name ------------

def as_lavis(state):
    """HF names back to LAVIS names (the inverse of core's map, written independently)."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("attention.attention.", "attention.self.")
        for new, old in (("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"), ("embeddings.", "Qformer.bert.embeddings."),
                         ("qformer.", "Qformer.bert."), ("language_projection", "opt_proj")):
            if name.startswith(new):
                name = old + name[len(new):]
                break
        renamed[name] = tensor
    return {**renamed, "Qformer.bert.embeddings.position_ids": torch.arange(40)[None], "temp": torch.tensor(0.07)}


def test_qformer_from_lavis_file_and_from_hf_folder(build, tiny, tmp_path):
    donor = build(gating="none")
    for parameter in donor.qformer.parameters():
        nn.init.normal_(parameter, std=0.1)
    nn.init.normal_(donor.query_tokens)
    state = {f"qformer.{n}": p for n, p in donor.qformer.state_dict().items()}
    state |= {"query_tokens": donor.query_tokens.data, "qformer.encoder.layer.0.intermediate.dense.weight": torch.zeros(2, 2)}
    torch.save({"model": as_lavis(state)}, tmp_path / "stage1.pth")
    for source in (tmp_path / "stage1.pth", save_hf(tiny, donor, tmp_path / "hf")):
        model = build(gating="none", qformer=str(source))
        assert torch.equal(model.query_tokens, donor.query_tokens)
        assert all(torch.equal(a, b) for a, b in zip(model.qformer.state_dict().values(), donor.qformer.state_dict().values()))


@pytest.mark.parametrize("name, message", [("t5_proj", "another language model .t5, here opt."), (None, "without a projection")])
def test_the_projection_of_a_lavis_file_is_never_left_out_in_silence(build, tmp_path, capsys, name, message):
    """That of Flan-T5 has the shape of any other of its width."""
    donor = build(gating="none")
    state = {f"qformer.{n}": p for n, p in donor.qformer.state_dict().items()} | {"query_tokens": donor.query_tokens.data}
    projection = {f"{name}.{n}": p for n, p in donor.language_projection.state_dict().items()} if name else {}
    torch.save({"model": as_lavis(state) | projection}, tmp_path / "stage2.pth")
    try:
        build(gating="none", qformer=str(tmp_path / "stage2.pth"))
        said = capsys.readouterr().out
    except DataError as error:
        said = str(error)
    assert re.search(f"stage2.pth: .*{message}", said)


def save_hf(tiny, donor, folder):
    blip2 = Blip2ForConditionalGeneration.from_pretrained(tiny[0])
    blip2.qformer.load_state_dict(donor.qformer.state_dict())
    blip2.query_tokens.data.copy_(donor.query_tokens.data)
    blip2.save_pretrained(folder)
    return folder


def damaged(tiny, folder, harm):
    shutil.copytree(tiny[0], folder)
    harm(folder / "model.safetensors")
    return str(folder)


def drop_a_tensor(file):
    state = load_file(file)
    state.pop("qformer.layernorm.weight")
    save_file(state, file, metadata={"format": "pt"})


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


@pytest.mark.parametrize("harm, message", [(drop_a_tensor, "1 tensors are missing.*qformer.layernorm.weight"),
                                           (cut_in_half, "incomplete")])
def test_incomplete_blip2_folder_is_refused(tiny, tmp_path, harm, message):
    with pytest.raises(DataError, match=message):
        published.load_blip2(damaged(tiny, tmp_path / "blip2", harm))


def test_qformer_from_elsewhere_together_with_lora(build, tiny):
    assert build(qformer=tiny[0], lora_rank=2).qformer is not None


def test_qformer_of_another_shape_is_refused(build, tmp_path):
    torch.save({f"qformer.{n}": p for n, p in core.QFormer(small_config()).state_dict().items()}, tmp_path / "other.pth")
    with pytest.raises(DataError, match="does not fit"):
        build(gating="none", qformer=str(tmp_path / "other.pth"))


# --- gates: identity at start ------------

def all_logits(model, batch, gated):
    """Logits at every text position [B,L,V]."""
    features = model.image_features(batch["images"])
    visual = model.visual_prompt(**features, input_ids=batch["input_ids"], prompt_mask=batch["prompt_mask"], gated=gated)
    out = model.language_model(**model.decoder.inputs(visual, batch["input_ids"], batch["attention_mask"]))
    return out.logits[:, visual.shape[1]:]


@pytest.mark.parametrize("gating, per", KINDS)
@torch.no_grad()
def test_fresh_gates_are_the_identity_to_the_bit(build, batch, gating, per):
    model = build(gating=gating, per=per)
    assert torch.equal(all_logits(model, batch, True), all_logits(model, batch, False))
    nn.init.normal_(model.gates[0].value.weight, std=0.1)  # and an open gate is not
    assert not torch.equal(all_logits(model, batch, True), all_logits(model, batch, False))


@pytest.mark.parametrize("per", ["head", "channel"])
@torch.no_grad()
def test_an_open_gate_is_key_times_k_and_value_times_v_plus_shift(build, per):
    """By the definition, each row of K and V by itself, in float64."""
    model = build(per=per)
    module = model.qformer.encoder.layer[model.qformer.cross_layers[0]].crossattention.double()
    heads, H = module.heads, module.attention["query"].in_features
    x, source = (torch.randn(2, rows, width).double() for rows, width in ((3, H), (7, module.attention["key"].in_features)))
    key, value, shift = torch.randn(3, 2, heads, 1, H // heads if per == "channel" else 1).double()
    q, k, v = (module.attention[name](of).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B,heads,rows,H/heads]
               for name, of in (("query", x), ("key", source), ("value", source)))
    attention = (q @ (key * k).transpose(2, 3) / (H // heads) ** 0.5).softmax(-1)  # [B,heads,3,7]
    read = (attention @ (value * v + shift)).transpose(1, 2).flatten(2)  # [B,3,H]
    wanted = module.output.LayerNorm(module.output.dense(read) + x)
    assert torch.allclose(module.eval()(x, source, gate=core.Gate(key, value, shift)), wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_attention_dropout_spares_the_shift_of_a_gate(build):
    """In training with a trained Q-Former: what is read, value * D(a) V + shift, for the same draw D."""
    module, read = build().qformer.encoder.layer[0].crossattention.train(), []
    module.attention_dropout = 0.5
    module.output.dense.register_forward_pre_hook(lambda linear, given: read.append(given[0]))
    heads, H = module.heads, module.attention["query"].in_features
    x, source = torch.randn(2, 3, H), torch.randn(2, 7, module.attention["key"].in_features)
    value, shift = torch.randn(2, 2, heads, 1, H // heads)
    for gate in (None, None, core.Gate(1.0, value, shift)):
        torch.manual_seed(len(read) == 0)
        module(x, source, gate=gate)
    first, plain, gated = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in read)  # [B,heads,3,H/heads]
    assert not torch.allclose(first, plain) and torch.allclose(gated, value * plain + shift, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fresh_gated_model_equals_transformers_blip2(build, batch, tiny):
    model, theirs = build(lora_rank=2), Blip2ForConditionalGeneration.from_pretrained(tiny[0]).eval()
    image_ids = torch.full((3, make_tiny.QUERIES), theirs.config.image_token_index)
    mask = torch.cat([torch.ones_like(image_ids), batch["attention_mask"]], 1)
    expected = theirs(batch["images"], torch.cat([image_ids, batch["input_ids"]], 1), mask).logits[:, make_tiny.QUERIES:]
    real = batch["attention_mask"].bool()
    assert torch.allclose(all_logits(model, batch, True)[real], expected[real], atol=1e-5)
    labels = torch.cat([torch.full_like(image_ids, -100), batch["labels"]], 1)
    for i in range(3):  # transformers averages over tokens, we over samples: equal one by one
        one = theirs(batch["images"][i:i + 1], torch.cat([image_ids, batch["input_ids"]], 1)[i:i + 1], mask[i:i + 1],
                     labels=labels[i:i + 1])
        assert model(**batch)["lm"][i].item() == pytest.approx(one.loss.item(), abs=1e-5)


@torch.no_grad()
def test_gates_of_1_003_act_under_autocast(build, batch):
    """bf16 has 8 bits: the gate itself must be in float32, or a small one never opens."""
    model, seen = build(), []
    for gate in model.gates:
        gate.key.bias.fill_(0.003)
        gate.value.bias.fill_(0.003)
        gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        opened, closed = all_logits(model, batch, True), all_logits(model, batch, False)
    assert all(part.dtype == torch.float32 and torch.allclose(part, torch.tensor(1.003), atol=1e-6) for g in seen for part in g[:2])
    assert seen and not torch.equal(opened, closed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_trained_starts_from_the_values_of_the_file(tiny, tmp_path, dtype):
    """The towers may be in half precision; Q-Former, queries, projection and heads are those of the file to the bit."""
    file = load_file(f"{tiny[0]}/model.safetensors")
    model = core.Blip2OPTGated.build(*tiny, ["Cubism"], dtype=dtype, train_qformer=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and name in file}
    assert len(trained) > 50 and all(torch.equal(p, file[name]) for name, p in trained.items())
    assert {p.dtype for p in model.vision_model.parameters()} == {p.dtype for p in model.language_model.parameters()} == {dtype}
    folder = make_tiny.save_random_retrieval(tmp_path)
    file, model = load_file(f"{folder}/model.safetensors"), core.Blip2Retrieval.load(folder, dtype=dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and name in file}
    assert len(trained) > 50 and all(torch.equal(p, file[name]) for name, p in trained.items())
    assert {p.dtype for p in model.vision_model.parameters()} == {dtype}


def test_gate_scale_zero_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="never opens"):
        core.FilmGate(8, 2, 4, scale=0)
    with pytest.raises(ValueError, match="head or channel"):
        core.FilmGate(8, 2, 4, per="layer")


def test_key_shift_would_cancel():
    """Why film has no shift on K: a constant added to all keys leaves the attention as it is."""
    attention = core.QFormerAttention(small_config(), 24).eval()
    x, source, shift = torch.randn(2, 5, 32), torch.randn(2, 7, 24), torch.randn(32)
    before = attention(x, source)
    attention.attention.key.bias.data += shift
    assert torch.allclose(attention(x, source), before, atol=1e-5)


# --- gradients: no dead gate ------------

def dead_after_two_steps(model, batch):
    """Names of trainable tensors that got no gradient in either of two steps."""
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    alive, optimizer = set(), torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, hit_weight=0.1, kl_weight=0.05)["loss"].backward()
        alive |= {n for n, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    return trained.keys() - alive


# adding a constant to all keys cancels in the softmax, so key biases have no gradient but rounding noise; those are exempt
def named_dead(names):
    return {n for n in names if not n.endswith("attention.key.bias")}


@pytest.mark.parametrize("gating, per", KINDS)
def test_every_trained_tensor_gets_a_gradient_within_two_steps(build, batch, gating, per):
    assert not named_dead(dead_after_two_steps(build(gating=gating, per=per, train_qformer=True, lora_rank=2), batch))


def test_the_check_sees_a_planted_dead_gate(build, batch):
    model = build()
    for linear in (*model.gates[0].mlp, model.gates[0].key):
        if isinstance(linear, nn.Linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)  # two zeroed layers in a row: no gradient for ever
    assert "gates.0.key.weight" in dead_after_two_steps(model, batch)


def test_frozen_parts_stay_frozen(build, batch):
    model = build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    assert not any(m.training for name in model.frozen_parts for m in getattr(model, name).modules())
    assert model.mapper.training and model.gates.training
    images = batch["images"]
    first, second = model.image_features(images), model.image_features(images)
    assert all(torch.equal(first[k], second[k]) for k in first)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch, hit_weight=0.1, kl_weight=0.05)["loss"].backward()
    optimizer.step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and changed <= trained
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)


@pytest.mark.parametrize("train_qformer, trained", [(False, False), (True, True)])
def test_what_is_trained(build, train_qformer, trained):
    model = build(train_qformer=train_qformer)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("qformer.") for n in names) is trained and ("query_tokens" in names) is trained
    assert {n.split(".")[0] for n in names} - {"qformer", "query_tokens"} == {"gates", "mapper", "style_head", "language_projection"}


def test_one_batch_is_overfitted(sample):
    """Gates and mapper alone (Q-Former and towers frozen) learn the styles of six pictures by heart."""
    chosen = [r for r in rows.read_split(sample, "train") if r.question_type == "style"]
    chosen = list({r.answer: r for r in chosen}.values())[:6]
    places = published.tiny("blip2"), published.tiny("efficientnet-28.pt")
    model = core.Blip2OPTGated.build(*places, sorted(r.answer for r in chosen)).train()
    features = model.image_features(torch.stack([rows.image_tensor(rows.load_image(r.image), model.image_size) for r in chosen]))
    batch = core.encode_training(model.tokenizer, [r.question for r in chosen], [r.answer for r in chosen])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(200):
        loss = model(**batch, **features)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.03:  # it falls on
            break
    assert loss.item() < 0.1
    answers = model.eval().predict_answers(None, [r.question for r in chosen], **features)
    assert answers == [r.answer for r in chosen]


# --- mapper and fusion ------------

@torch.no_grad()
def test_mapper_tokens_are_distinct_and_pads_change_nothing():
    mapper = core.PromptMapper(16, 8, width=12, tokens=4, hidden=20).eval()
    image, text, mask = torch.randn(2, 16), torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    out = mapper(image, text, mask)
    assert out.shape == (2, 4, 12)
    assert all((out[:, i] - out[:, j]).abs().max() > 0.1 for i in range(4) for j in range(i))
    garbage = text.masked_fill(mask[..., None] == 0, 1e3)
    assert torch.equal(mapper(image, garbage, mask), out)
    assert torch.allclose(mapper(image[1:], text[1:, :2], mask[1:, :2]), out[1:], atol=1e-6)


def test_gated_fusion_is_exact():
    module = core.GatedFusionModule(768).eval()
    assert sum(p.numel() for p in module.parameters()) == 2_952_193
    small = core.GatedFusionModule(16).eval()
    image, text, mask = torch.randn(2, 5, 16), torch.randn(2, 3, 16), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(small(image, torch.zeros_like(text)), image)  # zero text changes nothing at all
    assert (small(image, text) - image).abs().mean() > 1e-3
    assert torch.allclose(small(image[:1], text[:1, :2]), small(image, text, mask)[:1], atol=1e-6)
    small(image, text).sum().backward()
    assert small.alpha.grad.abs() > 0


# --- padding, batches, leaks ------------

@torch.no_grad()
def test_loss_does_not_depend_on_the_batch(build, batch):
    model = build()
    nn.init.normal_(model.gates[0].value.weight, std=0.5)
    weights = {"hit_weight": 0.1, "kl_weight": 0.05}
    together = model(**batch, **weights)
    for i, (question, answer) in enumerate([("Which style is this painting?", "Pop Art"), ("Colour?", "red")]):
        row = 2 * i
        alone = core.encode_training(model.tokenizer, [question], [answer])
        alone |= {k: batch[k][row:row + 1] for k in ("images", "style", "hit_rows")}
        out = model(**alone, **weights)
        for name in ("lm", "hit", "kl", "total"):
            assert out[name].item() == pytest.approx(together[name][row].item(), abs=1e-5), name


@torch.no_grad()
def test_features_computed_before_give_the_same(build, batch):
    model = build()
    features = model.image_features(batch["images"])
    rest = {k: v for k, v in batch.items() if k != "images"}
    assert torch.equal(model(**rest, **features)["lm"], model(**batch)["lm"])


@torch.no_grad()
def test_the_loss_sees_the_answer_and_only_the_answer(build, batch):
    model = build()
    nn.init.normal_(model.gates[0].value.weight, std=0.5)
    labels = batch["labels"]
    assert (labels[batch["prompt_mask"] == 1] == -100).all() and (labels[batch["attention_mask"] == 0] == -100).all()
    assert [model.tokenizer.decode(row[row != -100]) for row in labels] == [" Pop Art\n", " three\n", " red\n"]
    features = model.image_features(batch["images"])
    other = core.encode_training(model.tokenizer, ["Which style is this painting?"] * 2, ["Pop Art", "Cubism"])
    visual = model.visual_prompt(features["image_embeds"][[0, 0]], features["style_feature"][[0, 0]], other["input_ids"],
                                 other["prompt_mask"])
    assert torch.equal(visual[0], visual[1])  # the gates never see the answer
    assert not torch.equal(*model(**other, images=batch["images"][[0, 0]])["lm"])


# --- style terms ------------

class Words:
    """A tokenizer of single letters, for arithmetic by hand: id of "a" is 0; spaces vanish."""
    bos_token = bos_token_id = eos_token_id = None

    def convert_ids_to_tokens(self, ids):
        return [chr(ord("a") + i) for i in ids]

    def __len__(self):
        return 6

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [ord(c) - ord("a") for c in text if c != " "]})


def test_style_vocabulary_shares_pieces():
    names, pieces = core.style_vocabulary(["b", "ab", "ab ", ""], Words())
    assert names == ["ab", "b"]
    assert torch.equal(pieces, torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 1.0, 0, 0, 0, 0]]))  # "b" belongs to both


def test_style_hit_by_hand():
    _, pieces = core.style_vocabulary(["ab"], Words())
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3, 1e-9, 1e-9, 1e-9], [0.1, 0.1, 0.8, 1e-9, 1e-9, 1e-9]])).requires_grad_()
    mass, hard = core.style_hit(logits, torch.tensor([[0.5, 0.5]]), pieces)
    assert mass.item() == pytest.approx((0.7 + 0.2) / 2, abs=1e-5) and hard.item() == 0.5
    mass.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_style_kl_by_hand():
    _, pieces = core.style_vocabulary(["ab", "b"], Words())
    probabilities = torch.tensor([[0.4, 0.1, 0.2, 0.1, 0.1, 0.1]])
    scores = [0.5 * (math.log(0.4) + math.log(0.1)), math.log(0.1)]
    q = torch.tensor(scores).softmax(0)
    p = torch.tensor([2.0, -1.0]).softmax(0)
    expected = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    found = core.style_kl(torch.tensor([[2.0, -1.0]]), probabilities.log(), torch.ones(1, 1), pieces)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert core.style_kl(q.log()[None], probabilities.log(), torch.ones(1, 1), pieces).item() == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_hit_term_leaves_content_questions_alone(build, batch):
    out = build()(**batch, hit_weight=1.0)
    assert torch.allclose(out["total"][1:], out["lm"][1:]) and out["total"][0] > out["lm"][0]


def test_zero_weights_switch_the_terms_off(build, batch):
    assert set(build()(**batch)) == {"loss", "lm", "total"}


# --- prompts and answers ------------

def test_long_questions_keep_the_end_of_the_prompt(build):
    tokenizer = build(gating="none").tokenizer
    ids = core.prompt_ids(tokenizer, "word " * 500)
    assert len(ids) == 64 and tokenizer.decode(ids).endswith(" Answer:") and ids[0] == tokenizer.bos_token_id
    ids = core.answer_ids(tokenizer, "word " * 500, 8)
    assert len(ids) == 8 and ids[-1] == core.newline_id(tokenizer)


def test_prompt_equals_transformers_tokenisation(build):
    tokenizer = build(gating="none").tokenizer
    whole = tokenizer(core.PROMPT.format("What is shown?"), add_special_tokens=False).input_ids
    assert core.prompt_ids(tokenizer, "What is shown?") == [tokenizer.bos_token_id] + whole


@pytest.mark.parametrize("text", ["naïve Café", "鹳鸟踟蹰", "Ukiyo-e, 1830", "\t odd  spaces"])
def test_any_text_can_be_encoded(build, text):
    tokenizer = build(gating="none").tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


QUESTIONS = ["Which style is this painting?", "How many?", "What colour are the very many boats on the water?"]


@pytest.mark.parametrize("beams", [1, 3])
def test_batched_answers_equal_one_at_a_time(build, batch, beams):
    model = build()
    nn.init.normal_(model.gates[0].value.weight, std=0.5)
    together = model.predict_answers(batch["images"], QUESTIONS, beams=beams)
    alone = [model.predict_answers(batch["images"][i:i + 1], [q], beams=beams)[0] for i, q in enumerate(QUESTIONS)]
    assert together == alone
    assert not any("Question" in a or "\n" in a for a in together)


def test_generation_equals_transformers_generate(build, batch, tiny):
    model, theirs = build(), Blip2ForConditionalGeneration.from_pretrained(tiny[0]).eval()
    ids = torch.tensor([[theirs.config.image_token_index] * make_tiny.QUERIES + core.prompt_ids(model.tokenizer, QUESTIONS[0])])
    expected = theirs.generate(batch["images"][:1], ids, max_new_tokens=model.max_answer, num_beams=1, do_sample=False,
                               eos_token_id=core.newline_id(model.tokenizer))
    text = model.tokenizer.batch_decode(expected, skip_special_tokens=True)[0].split("Answer:")[-1].split("\n")[0].strip()
    assert model.predict_answers(batch["images"][:1], QUESTIONS[:1], beams=1) == [text]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_towers_with_float32_gates(build, batch, dtype):
    model = build(dtype=dtype)
    assert model.language_model.dtype == dtype
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out = model(**batch, hit_weight=0.1, kl_weight=0.1)
    out["loss"].backward()
    assert torch.isfinite(out["loss"]) and torch.isfinite(model.gates[0].value.weight.grad).all()
    assert len(model.predict_answers(batch["images"], QUESTIONS)) == 3
    with torch.autocast("cpu", dtype):
        assert len(model.predict_answers(batch["images"], QUESTIONS, beams=2)) == 3


@torch.no_grad()
def test_rank_takes_the_likeliest_answer(build, batch):
    model = build()
    answers = ["red", "Pop Art", "three hundred and one"]
    features = model.image_features(batch["images"])
    scores = model.score_answers(QUESTIONS, answers, **features, chunk=4)
    assert scores.shape == (3, 3)
    one = core.encode_training(model.tokenizer, [QUESTIONS[1]], [answers[2]])
    lm = model(**one, images=batch["images"][1:2])["lm"].item()
    tokens = int((one["labels"] != -100).sum())
    assert scores[1, 2].item() == pytest.approx(-lm * tokens, rel=1e-4)
    picked = model.predict_answers(batch["images"], QUESTIONS, method="rank", answers=answers)
    assert picked == [answers[i] for i in scores.argmax(1)]


def test_prediction_in_training_mode_is_refused(build, batch):
    with pytest.raises(RuntimeError, match="eval"):
        build().train().predict_answers(batch["images"], QUESTIONS)


# --- saving, accounting ------------

def test_trained_tensors_round_trip_and_misfits_are_named(build, tmp_path):
    model, other = build(), build()
    nn.init.normal_(model.gates[0].key.weight)
    checkpoints.save_checkpoint(tmp_path / "best.pt", {"state": checkpoints.trainable_state(model)})
    state = checkpoints.load_checkpoint(tmp_path / "best.pt")["state"]
    checkpoints.load_trainable(other, state, "best.pt")
    assert torch.equal(other.gates[0].key.weight, model.gates[0].key.weight)
    with pytest.raises(DataError, match="does not fit this model"):
        checkpoints.load_trainable(build(per="channel"), state, "best.pt")
    with pytest.raises(DataError, match="does not fit this model"):
        checkpoints.load_trainable(build(gating="none"), state, "best.pt")


def test_fingerprint_sees_other_frozen_weights_but_not_gates_or_dtype(build):
    model, other = build(), build()
    nn.init.normal_(other.gates[0].key.weight)
    assert checkpoints.fingerprint(model) == checkpoints.fingerprint(other) == checkpoints.fingerprint(build(dtype=torch.bfloat16))
    nn.init.normal_(other.language_model.model.decoder.layers[0].fc1.weight)
    assert checkpoints.fingerprint(model) != checkpoints.fingerprint(other)


def full_size(**settings):
    """Gated BLIP-2 OPT-2.7B with EfficientNet-B3, on the meta device: shapes without memory."""
    from transformers import Blip2Config, OPTConfig
    text = OPTConfig(vocab_size=50272, hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32,
                     word_embed_proj_dim=2560)
    with torch.device("meta"):
        return core.Blip2OPTGated(Blip2ForConditionalGeneration(Blip2Config(text_config=text.to_dict())), None,
                                  core.EfficientNet28(27), **settings)


def test_full_size_counts_and_file_size():
    model = full_size()
    parts = {name: (trainable, frozen) for name, trainable, frozen in checkpoints.parts_table(model)}
    assert parts["vision_model"] == (0, 985_952_256)
    assert parts["qformer"] == (0, 105_137_664)
    assert parts["query_tokens"] == (0, 24_576)
    assert parts["language_projection"] == (1_968_640, 0)
    assert parts["language_model"] == (0, 2_651_596_800)
    assert parts["efficientnet"] == (0, 10_737_731)
    # a gate: LN 1,536 + MLP 393,728 + 262,656 as in the original, three heads of 6,156 (K scale, V scale, V shift), one scale
    assert parts["gates"] == (6 * (1_536 + 393_728 + 262_656 + 3 * 6_156 + 1), 0)
    # mapper: EfficientNet projection 1,180,416 as in the original; image MLP to 4 distinct tokens, text projection and MLP,
    # LN at the end, and LN on both inputs
    assert parts["mapper"] == (1_180_416 + 3_936_256 + 1_966_848 + 1_574_656 + 1_536 + 2 * (1_536 + 2_560), 0)
    assert core.EfficientNet28(28, "efficientnet_b3").width == 1536


@pytest.mark.parametrize("train_qformer, limit", [(False, 60e6), (True, 500e6)])
def test_full_size_best_pt(tmp_path, train_qformer, limit):
    model = full_size(train_qformer=train_qformer)
    model.style_head = nn.Linear(1536, 27)  # a vocabulary of 27 styles
    state = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    checkpoints.save_checkpoint(tmp_path / "best.pt", {"state": state})
    assert 0.9 * limit < (tmp_path / "best.pt").stat().st_size < limit
    assert checkpoints.load_checkpoint(tmp_path / "best.pt")["state"].keys() == state.keys()


def test_full_size_other_gates():
    gates = {per: sum(p.numel() for p in full_size(per=per).gates.parameters()) for per in ("head", "channel")}
    assert gates["channel"] - gates["head"] == 6 * 3 * (768 - 12) * 513


def test_blind_is_the_language_model_alone(build, batch):
    """blind=True: nothing of the image, the same loss as transformers' OPT on the tokens."""
    model = build()
    parts = [{k: v for k, v in batch.items() if k != "images"} for _ in range(2)]
    seen = [model(**part, images=images, blind=True)["lm"] for part, images in zip(parts, (batch["images"], -batch["images"]))]
    assert torch.equal(*seen)
    for i in range(3):
        real = batch["attention_mask"][i].bool()
        alone = model.language_model(batch["input_ids"][i][real][None], labels=batch["labels"][i][real][None]).loss
        assert torch.allclose(seen[0][i], alone, atol=1e-5)
    questions = ["Which style is this painting?", "Colour?"]
    answers = [model.predict_answers(images[:2], questions, blind=True, beams=2) for images in (batch["images"], -batch["images"])]
    assert answers[0] == answers[1]


def test_lora_merges_to_the_same_function(build, batch):
    model = build(lora_rank=2)
    for name, parameter in model.qformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = model(**batch)["lm"]
    assert not torch.allclose(before, build()(**batch)["lm"], atol=1e-3)
    model.merge_lora()
    assert torch.allclose(model(**batch)["lm"], before, atol=1e-4)
    names = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("qformer.")}
    assert names == {name for name, p in build(own_kv=True).named_parameters() if p.requires_grad and name.startswith("qformer.")}


def test_the_losses_are_means_in_float32_under_autocast(build, batch):
    """As the log has them: a mean over tokens that is taken in bf16 has three digits."""
    model = build()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = model.visual_prompt(**model.image_features(batch["images"]), input_ids=batch["input_ids"], prompt_mask=batch["prompt_mask"])
        logits, targets, owner = model.decoder.answer_logits(seen, *(batch[name] for name in ("input_ids", "attention_mask", "labels")))
        parts = model(**batch, hit_weight=0.1, kl_weight=0.05)
    assert {part.dtype for part in parts.values()} == {torch.float32}
    nll = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")  # [M]
    for row, loss in enumerate(parts["lm"]):
        assert loss.item() == pytest.approx(nll[owner == row].mean().item(), rel=1e-5)
