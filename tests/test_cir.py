"""pytest tests/test_cir.py: train_cir.py on random tiny weights and a small drawn set. Behaviour-checked; the losses and
scores of SPRC are checked against the original's in test_golden.py, recalls in test_cirr.py."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
from dataclasses import replace
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import core
import metrics
import train_cir
from data import cirr
from data.rows import picture_digest
from engine import checkpoints, errors, galleries, loop, pages, published, runfolder
from engine.errors import DataError
from tools import make_sample, make_tiny
from test_cirr import circo
from test_pages import draw_here  # noqa: F401
from test_report import Page, check_safe

pytestmark = pytest.mark.usefixtures("draw_here")


BATCH = 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A drawn CIRR-like folder: 60 training pictures, and a third of their queries, which fill three steps of BATCH."""
    folder = tmp_path_factory.mktemp("cir") / "cirr"
    make_sample.main(["--cirr", "--out", str(folder), "--pictures", "64"])
    queries = folder / "captions/cap.rc2.train.json"
    queries.write_text(json.dumps(json.loads(queries.read_text())[:3 * BATCH]))
    return folder


def random_retrieval(place):
    """A random tiny BLIP-2 in the image-text-retrieval format."""
    loop.seed_everything(0)
    return make_tiny.save_random_retrieval(place, width=64)  # half of the tiny one's: a step costs a third


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_retrieval(tmp_path_factory.mktemp("models"))


@pytest.fixture
def build(folder):
    """Function that builds an Sprc from the random tiny weights, in eval mode."""
    def build_model(**settings):
        loop.seed_everything(1)
        return train_cir.Sprc.load(folder, **settings).eval()
    return build_model


def flags(data, folder, out, *more):
    return ["--data", str(data), "--blip2", str(folder), "--epochs", "2", "--batch-size", str(BATCH), "--lr", "1e-3", "--workers",
            "0",
            "--precision", "no", "--out", str(out), *more]


@pytest.fixture
def command(drawn, folder, tmp_path):
    """Command line of a short run; add your own after it."""
    return lambda *more, out="run": flags(drawn, folder, tmp_path / out, *more)


MORE = ("--save-last", "--hard-set", "1", "--hard-batch", "1", "--loss-patch", "0.1", "--spatial-attention")


def draw_curves_once(patch):
    """The first curves.png is drawn, and no other: each takes longer than an epoch here."""
    def first(*args, draw=runfolder.draw_curves):
        draw(*args)
        patch.setattr(runfolder, "draw_curves", lambda *args: None)
    patch.setattr(runfolder, "draw_curves", first)


@pytest.fixture(scope="module")
def trained(drawn, folder, tmp_path_factory):
    """(run folder of an undisturbed run with MORE, what it printed), not to be written to."""
    out, printed = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        draw_curves_once(patch)
        assert train_cir.main(flags(drawn, folder, out, *MORE)) is None
    return out, printed.getvalue()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They are drawn in `trained` alone, which is made before."""
    monkeypatch.setattr(runfolder, "draw_curves", lambda *args: None)


def make_batch(model, count=5, negatives=0):
    """Random features and sentences of different length, as Sprc.forward takes them."""
    generator = torch.Generator().manual_seed(2)
    patches, width = 17, model.vision_model.config.hidden_size
    sentences = ["make it red", "show two instead of three and paint it in small dots", "at night", "a", "blue now",
                 "on the sand"]
    reference, target = torch.randn(2, count, patches, width, generator=generator)
    batch = {"reference": reference, "target": target, **core.text_ids(model.tokenizer, sentences[:count])}
    if negatives:
        batch["negatives"] = torch.randn(count, negatives, patches, width, generator=generator)
    return batch


def opened(model):
    """Move the fusion off its start, so that it does something."""
    torch.nn.init.normal_(model.fusion.up.weight, std=0.3)
    if model.fusion.ask is not None:
        torch.nn.init.normal_(model.fusion.ask.weight, std=0.3)
    return model


def state_of(path):
    return checkpoints.load_checkpoint(path)["state"]


# --- the model ------------

@pytest.mark.parametrize("spatial", [False, True])
def test_fresh_fusion_is_the_identity(build, spatial):
    model, plain = build(spatial=spatial), build(gate=False)
    batch = make_batch(model)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.fused(batch["reference"], **text), batch["reference"])
    assert torch.equal(model.query(batch["reference"], **text)[1], plain.query(batch["reference"], **text)[1])


@pytest.mark.parametrize("settings", [{}, {"spatial": True}, {"gate": False}])
def test_every_trained_tensor_gets_a_gradient_within_two_steps(build, settings):
    model = build(**settings)
    batch, seen = make_batch(model, negatives=2), set()
    optimizer = train_cir.make_optimizer(model, 1e-3, 0.05)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, patch=0.1, hard_batch=1.0)["loss"].backward()
        seen |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    missing = {n for n in trained - seen if not n.endswith("key.bias")}  # a bias on keys cancels in the softmax
    assert not missing and not any(n.startswith(("vision_model", "itm_head")) for n in seen | trained)


def test_padding_and_company_change_nothing(build):
    model = opened(build(spatial=True))
    batch = make_batch(model)
    alone = model.query(batch["reference"][:1], **core.text_ids(model.tokenizer, ["make it red"]))[1]
    together = model.query(batch["reference"], batch["input_ids"], batch["attention_mask"])[1]
    assert batch["input_ids"].shape[1] > 8 and torch.allclose(alone[0], together[0], atol=1e-5)
    text = core.text_ids(model.tokenizer, ["make it red"])
    prompted = model.prompted(batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(model.prompted(**text)[0], prompted[0], atol=1e-5)


def test_the_sentence_and_the_reference_both_count(build):
    model = opened(build())
    batch = make_batch(model)
    one, other = (model.query(batch["reference"][:1], **core.text_ids(model.tokenizer, [text]))[1]
                  for text in ("make it red", "two"))
    swapped = model.query(batch["reference"][1:2], **core.text_ids(model.tokenizer, ["make it red"]))[1]
    assert (one - other).abs().max() > 1e-3 and (one - swapped).abs().max() > 1e-3


def test_spatial_attention_weighs_the_change_with_mean_one(build):
    model = opened(build(spatial=True))
    image, batch = make_batch(model)["reference"], make_batch(model)
    words, mask = model.qformer.layernorm(model.embeddings(batch["input_ids"])), batch["attention_mask"]
    weighed = model.fusion(image, words, mask) - image
    low, ask = model.fusion.down(image), model.fusion.ask
    model.fusion.ask = None
    plain = model.fusion(image, words, mask) - image
    ratio = ((weighed - model.fusion.up.bias) / (plain - model.fusion.up.bias)).median(-1).values  # [B,P]
    wanted = (low @ ask(core.masked_mean(words, mask))[:, :, None] / low.shape[-1] ** 0.5).softmax(1)[..., 0] * image.shape[1]
    assert torch.allclose(ratio, wanted, rtol=1e-3) and torch.allclose(ratio.mean(1), torch.ones(len(ratio)), atol=1e-3)
    assert ratio.std() > 0.1


def test_without_a_gate_nothing_changes_and_the_words_come_as_the_qformer_takes_them(build):
    model, seen = opened(build()), []
    image, batch = make_batch(model)["reference"], make_batch(model)
    with torch.no_grad():
        model.fusion.module.alpha.zero_()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.allclose(model.fused(image, **text), image + model.fusion.up.bias, atol=1e-6)
    model.qformer.layernorm.bias.data.fill_(0.7)
    model.fusion.module.register_forward_hook(lambda module, given, found: seen.append(given))
    model.fused(image, **text)
    assert seen[0][1].mean(-1).sub(0.7).abs().max() < 1e-5 and torch.equal(seen[0][2], batch["attention_mask"])


def test_query_prompts_and_alignment_by_hand(build):
    model = opened(build())
    batch = make_batch(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    Q, words = model.query_tokens.shape[1], model.embeddings(ids)
    long = torch.cat([torch.ones(len(ids), Q), mask], 1)
    prompt = model.joint(model.fused(batch["reference"], ids, mask), ids, mask)[:, :Q]
    states = model.qformer(torch.cat([prompt, words], 1), mask=core.padding_mask(long))
    wanted = F.normalize(model.text_projection(states[torch.arange(len(ids)), [Q] * len(ids)]), dim=-1)
    found_prompt, found = model.query(batch["reference"], ids, mask)
    assert torch.allclose(found_prompt, prompt, atol=1e-6) and torch.allclose(found, wanted, atol=1e-6)
    plain = model.embeddings.word_embeddings(ids)
    row = torch.stack([torch.cat([plain[i, :1], model.prompt_tokens[0], plain[i, 1:]]) for i in range(len(ids))])
    row = row + model.embeddings.position_embeddings.weight[:row.shape[1]]
    wanted = F.normalize(model.text_projection(model.qformer(row, mask=core.padding_mask(long))[:, 0]), dim=-1)
    assert torch.allclose(model.prompted(ids, mask), wanted, atol=1e-6)
    parts = model(**batch, rtc=0, align=1.0)
    apart = (prompt.mean(1) - model.prompt_tokens.mean(1)).square().mean()
    assert parts["align"].item() == pytest.approx(apart.item(), rel=1e-5)
    parts["loss"].backward()
    assert model.prompt_tokens.grad is None  # they learn from rtc only


def test_optimizer_is_that_of_sprc(build):
    model = build()
    optimizer = train_cir.make_optimizer(model, 1e-3, 0.05)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"], decayed["eps"]) == (0.05, 0.0, (0.9, 0.98),
                                                                                                   1e-7)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim < 2 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == sum(p.requires_grad for p in model.parameters())


def test_frozen_tower_stays_frozen(build):
    model = build().train()
    assert not model.vision_model.training and model.qformer.training
    assert not any(p.requires_grad for p in model.vision_model.parameters())


# --- losses ------------

def test_contrastive_loss_by_hand():
    similarity, temp = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.4, 0.1]]).requires_grad_(), 0.5
    none = torch.zeros(2, 2, dtype=torch.bool)
    rows = [[0.5, 0.1, 0.3], [0.4, 0.2, 0.1]]  # the right one first
    plain = np.mean([-np.log(np.exp(r[0] / temp) / sum(np.exp(np.array(r) / temp))) for r in rows])
    assert train_cir.contrastive_loss(similarity, temp, none).item() == pytest.approx(plain, rel=1e-5)
    weighed = []
    for r in rows:
        weight = np.exp(3.0 * np.array(r[1:]))
        weight = weight / weight.mean()
        weighed.append(-np.log(np.exp(r[0] / temp) / (np.exp(r[0] / temp) + (weight * np.exp(np.array(r[1:]) / temp)).sum())))
    assert train_cir.contrastive_loss(similarity, temp, none, 3.0).item() == pytest.approx(np.mean(weighed), rel=1e-5)
    same = torch.tensor([[False, True], [True, False]])  # both queries want the same picture: only the third column is wrong
    left = np.mean([-np.log(np.exp(r[0] / temp) / sum(np.exp(np.array([r[0], r[2]]) / temp))) for r in rows])
    for beta in (0.0, 3.0):  # one negative is left, whose weight is 1
        assert train_cir.contrastive_loss(similarity, temp, same, beta).item() == pytest.approx(left, rel=1e-5)
    train_cir.contrastive_loss(similarity, temp, same, 3.0).backward()
    assert torch.isfinite(similarity.grad).all()
    similarity.grad = None
    train_cir.contrastive_loss(similarity, temp, none, 3.0).backward()
    given = torch.tensor(rows).requires_grad_()
    weights = F.softmax(3.0 * given.detach()[:, 1:], 1) * 2  # mean 1, and no gradient through them
    (F.cross_entropy(torch.cat([given[:, :1], given[:, 1:] + temp * weights.log()], 1) / temp,
                     torch.zeros(2, dtype=torch.long))).backward()
    assert torch.allclose(similarity.grad[[0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 2, 2]],
                          given.grad[[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]], atol=1e-6)


def test_late_interaction_by_hand():
    tokens, images = torch.randn(3, 2, 4), torch.randn(3, 5, 4)
    wanted = [[np.mean([max(float(q @ v) for v in images[j]) for q in tokens[i]]) for j in range(3)] for i in range(3)]
    assert torch.allclose(train_cir.late_interaction(tokens, images), torch.tensor(wanted, dtype=torch.float32), atol=1e-5)


def test_similarities_are_in_float32_under_autocast():
    """Near scores would tie in bf16: a cosine near 1 has steps of 0.004 there."""
    torch.manual_seed(0)
    query, tokens, images, own = (F.normalize(torch.randn(shape), dim=-1).bfloat16() for shape in
                                  ((4, 64), (4, 5, 64), (4, 5, 64), (4, 2, 5, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        found = [core.max_similarity(query, images), train_cir.similarities(query, images, own), train_cir.late_interaction(tokens, images)]
    q, t, i, o = (x.double() for x in (query, tokens, images, own))
    alone = torch.einsum("ae,bqe->abq", q, i).amax(-1)  # [A,B]
    wanted = [alone, torch.cat([alone, torch.einsum("be,bnqe->bnq", q, o).amax(-1)], 1),
              torch.einsum("ike,jle->ijkl", t, i).amax(-1).mean(-1)]
    for one, other in zip(found, wanted):
        assert one.dtype == torch.float32 and torch.allclose(one.double(), other, atol=1e-6)


def test_negatives_are_wrong_for_their_own_query_alone(build):
    model = build()
    batch = make_batch(model, negatives=2)
    few = model(**{**batch, "negatives": None})
    more = model(**batch)
    assert more["itc"] > few["itc"] and more["rtc"] > few["rtc"] and more["align"] == few["align"]
    query, images = model.query(batch["reference"], batch["input_ids"],
                                batch["attention_mask"])[1], model.image_features(batch["target"])
    own = torch.stack([model.image_features(one) for one in batch["negatives"]])  # [B,N,Q,E]
    wanted = torch.cat([core.max_similarity(query, images),
                        torch.stack([core.max_similarity(query[i:i + 1], own[i])[0] for i in range(len(query))])], 1)
    assert torch.allclose(train_cir.similarities(query, images, own), wanted, atol=1e-6)


def test_weights_switch_terms(build):
    model = build()
    batch = make_batch(model)
    parts = model(**batch, rtc=0.4, align=0.3, patch=0.2)
    total = parts["itc"] + 0.4 * parts["rtc"] + 0.3 * parts["align"] + 0.2 * parts["patch"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    alone = model(**batch, rtc=0, align=0)
    assert alone.keys() == {"loss", "itc"} and torch.equal(alone["loss"], alone["itc"])


def test_two_queries_of_one_target_are_no_negatives(build):
    model = build()
    batch = make_batch(model, 4)
    batch["target"] = batch["target"][[0, 1, 2, 0]]
    apart, together = (model(**batch, target_ids=torch.tensor(ids))["itc"] for ids in ([0, 1, 2, 3], [0, 1, 2, 0]))
    assert together < apart


def test_one_batch_is_overfitted(build):
    model = build().train()
    batch = make_batch(model, 3, negatives=1)
    optimizer = train_cir.make_optimizer(model, 2e-3, 0.0)
    before = model(**batch)
    for _ in range(40):
        optimizer.zero_grad()
        parts = model(**batch, align=3.0)
        parts["loss"].backward()
        optimizer.step()
    parts = model.eval()(**batch)
    assert parts["itc"] < 0.05 and parts["rtc"] < 0.05 and parts["align"] < before["align"]


# --- weights ------------

def test_same_scores_as_transformers(folder):
    from transformers import Blip2ForImageTextRetrieval
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    model, images = core.Blip2Retrieval.load(folder).eval(), torch.randn(3, 3, make_tiny.SIZE, make_tiny.SIZE,
                                                                         generator=torch.Generator().manual_seed(0))
    text = core.text_ids(model.tokenizer, ["two red boats", "at night, three stars on the water", "a fish"])
    with torch.no_grad():
        wanted = theirs(pixel_values=images, **text, use_image_text_matching_head=False).logits_per_image  # [3,3]
        embeds = model.image_embeds(images)
        found = core.max_similarity(model.text_features(**text), model.image_features(embeds))  # [texts, images]
        matched = theirs(pixel_values=images, **text, use_image_text_matching_head=True).logits_per_image
        own = model.itm_head(model.joint(embeds, **text)[:, :model.query_tokens.shape[1]]).mean(1)
    assert torch.allclose(found.T, wanted, atol=1e-5) and torch.allclose(own, matched, atol=1e-5)


def to_lavis(state):
    """HuggingFace names -> LAVIS's, the other way round than published.lavis_to_hf."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in reversed(published.LAVIS_KEYS):
            name = name.replace(new, old) if name.startswith(new) or new.startswith("attention.") else name
        renamed[name] = tensor
    return renamed


def test_a_lavis_checkpoint_takes_its_place(build, folder, tmp_path):
    other = core.Blip2Retrieval.load(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1
    kept = {n: p for n, p in other.state_dict().items() if not n.startswith("vision_model")}
    lavis = to_lavis(kept)
    assert "Qformer.bert.encoder.layer.0.attention.self.query.weight" in lavis and "text_proj.weight" in lavis
    torch.save({"model": lavis}, tmp_path / "stage1.pth")
    loaded = build(qformer=str(tmp_path / "stage1.pth"))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in kept.items()
               if not name.startswith("itm_head"))
    assert loaded.temp.item() == pytest.approx(0.17)
    del lavis["text_proj.weight"], lavis["text_proj.bias"]
    torch.save(lavis, tmp_path / "no_head.pth")
    with pytest.raises(DataError, match="no text_projection"):
        build(qformer=str(tmp_path / "no_head.pth"))


# --- data ------------

def test_triplets_are_a_pure_function_of_epoch_and_number(drawn):
    pools = cirr.read_split(drawn, "cirr", "train", log=lambda *words: None)
    data = train_cir.Triplets(pools, train_cir.Opener(28, "targetpad", 1.25), negatives=3, seed=5)
    (images, query, text), again = data[0, 2], data[0, 2]
    assert images.shape == (5, 3, 28, 28) and torch.equal(images, again[0]) and text == query.captions[0]
    assert torch.equal(images[0], data.open(data.paths[query.reference])) and torch.equal(images[1],
                                                                                          data.open(data.paths[query.target]))
    allowed = [data.open(data.paths[name]) for name in query.members if name not in (query.reference, query.target)]
    for epoch in range(6):
        assert all(any(torch.equal(image, other) for other in allowed) for image in data[epoch, 2][0][2:])
    assert any(not torch.equal(images[2:], data[epoch, 2][0][2:]) for epoch in range(1, 6))


def test_equal_targets_have_equal_numbers_in_a_batch(build, drawn):
    pools = cirr.read_split(drawn, "cirr", "train", log=lambda *words: None)
    data = train_cir.Triplets(pools, train_cir.Opener(28, "targetpad", 1.25))
    by_target = {}
    for number, query in enumerate(data.rows):
        by_target.setdefault(query.target, []).append(number)
    one, other = next(pair for pair in by_target.values() if len(pair) > 1)[:2]
    apart = next(number for number in range(len(data)) if data.rows[number].target != data.rows[one].target)
    ids = train_cir.Collate(build().tokenizer)([data[0, number] for number in (one, apart, other)])["target_ids"]
    assert ids[0] == ids[2] != ids[1]


def test_a_broken_picture_stops_the_run_with_its_row(command, drawn, folder, tmp_path, capsys):
    name = json.loads((drawn / "captions/cap.rc2.train.json").read_text())[0]["reference"]
    path = drawn / "img_raw" / json.loads((drawn / "image_splits/split.rc2.train.json").read_text())[name]
    content = path.read_bytes()
    try:
        path.write_bytes(content[:400])
        assert errors.exit_code(train_cir.main, command()) == 2
    finally:
        path.write_bytes(content)
    told = capsys.readouterr().err
    assert told.count("error:") == 1 and path.name in told and "row" in told and "Traceback" not in told


# --- evaluation ------------

def test_encoding_equals_one_at_a_time_and_fuses(build, drawn):
    model = opened(build())
    pool, = cirr.read_split(drawn, "cirr", "val", log=lambda *words: None)
    opener, accelerator = train_cir.Opener(model.image_size, "targetpad", 1.25), Accelerator(cpu=True)
    features, vectors, change = galleries.encode(model, pool, opener, accelerator, 7, 0)
    assert features.shape[0] == len(pool.gallery) and vectors.shape[0] == len(pool.queries) and change > 0
    with torch.no_grad():
        for number in (0, len(pool.queries) - 1):
            query = pool.queries[number]
            embeds = model.image_embeds(opener(pool.gallery[query.reference])[None])
            text = core.text_ids(model.tokenizer, [cirr.text_of(query)])
            assert torch.allclose(vectors[number], model.query(embeds, **text)[1][0], atol=1e-5)
            place = list(pool.gallery).index(query.reference)
            assert torch.allclose(features[place], model.image_features(embeds)[0], atol=1e-5)
    model.fusion = None
    assert (galleries.encode(model, pool, opener, accelerator, 7, 0)[1] - vectors).abs().max() > 1e-3


def test_training_writes_what_it_says(trained):
    out, printed = trained
    assert {p.name for p in out.iterdir()} >= {"best.pt", "args.yaml", "training_log.csv", "curves.png"}
    assert "a random order scores R@1" in printed
    log = runfolder.read_log(out / "training_log.csv")
    epochs = [row for row in log if row["kind"] == "epoch"]
    assert len(epochs) == 2 and all(float(row["mean"]) >= 0 and float(row["change"]) > 0 for row in epochs)
    best = checkpoints.load_checkpoint(out / "best.pt")
    assert best["metric"] == "mean" and not any(name.startswith("vision_model") for name in best["state"])
    assert best["value"] == pytest.approx(max(float(row["mean"]) for row in epochs), abs=1e-3)


def test_training_pictures_are_references_targets_and_the_negatives_that_are_shown():
    query, asked = cirr.Query("1", "a", "b", ("x",), tuple("abcdef"), "f", 1), cirr.Query("2", "g", "h", ("x",), (), "f", 1)
    parts = SimpleNamespace(train=SimpleNamespace(rows=[query], paths={name: f"/{name}" for name in "abcdef"}),
                            val=[cirr.Pool("cirr", [asked], {name: f"/{name}" for name in "ghi"}, "val", "f")])
    for negatives, trained in ((0, "ab"), (2, "abcdef")):
        found = train_cir.training_and_validation(parts, SimpleNamespace(hard_set=negatives))
        assert found == [[f"/{name}" for name in trained], ["/g", "/h"]]


def test_checkpoint_scores_what_training_said_and_submits(trained, drawn, tmp_path, capsys):
    best = checkpoints.load_checkpoint(trained[0] / "best.pt")
    train, = cirr.read_split(drawn, "cirr", "train", log=lambda *words: None)
    shown = {name for query in train.queries for name in (query.reference, query.target, *query.members)}  # with --hard-set
    assert best["pictures"] == sorted({picture_digest(train.gallery[name]) for name in shown})
    val, = cirr.read_split(drawn, "cirr", "val", log=lambda *words: None)
    met = val.queries[3].target  # as if it had been trained on
    checkpoints.save_checkpoint(tmp_path / "best.pt", {**best, "pictures": [*best["pictures"], picture_digest(val.gallery[met])]})
    count = sum(met in (query.reference, query.target) for query in val.queries)
    train_cir.main(["--data", str(drawn), "--checkpoint", str(tmp_path / "best.pt"), "--workers", "0",
                    "--submit", str(tmp_path / "submission")])
    printed = capsys.readouterr().out
    assert f"mean {best['value']:.2f}" in printed and re.search(r"cirr test1: pictures that training saw: 0 of \d+ rows\n", printed)
    assert f"cirr val: pictures that training saw: {count} of {len(val.queries)} rows: these scores are not" in printed
    pool, = cirr.read_split(drawn, "cirr", "test1", log=lambda *words: None)
    for metric in ("recall", "recall_subset"):
        content = json.loads((tmp_path / f"submission/{metric}_submission.json").read_text())
        cirr.check_submission(content, pool.queries, pool.gallery)


def test_shortcuts_of_the_best_epoch_are_kept_and_told_again(trained, drawn, tmp_path, capsys):
    kept = json.loads((trained[0] / "shortcuts-cirr.json").read_text())
    pool, = cirr.read_split(drawn, "cirr", "val", log=lambda *words: None)
    rows = {row["input"]: row for row in kept[0]["rows"]}
    assert kept[0]["queries"] == [query.pairid for query in pool.queries]
    assert set(kept[0]["ranks"]) == {"text alone", "picture alone", "both"}
    assert rows["both"]["mean"]["value"] == pytest.approx(checkpoints.load_checkpoint(trained[0] / "best.pt")["value"])
    shutil.copy(trained[0] / "best.pt", tmp_path)
    train_cir.main(["--data", str(drawn), "--checkpoint", str(tmp_path / "best.pt"), "--workers", "0"])
    again = json.loads((tmp_path / "shortcuts-cirr.json").read_text())
    assert again[0]["ranks"] == kept[0]["ranks"] and again[0]["rows"] == kept[0]["rows"]
    printed = capsys.readouterr().out
    assert re.search(rf"text alone +{len(pool.queries)} ", printed) and "both, of those that neither alone" in printed


def test_circo_is_scored_by_a_checkpoint_and_submitted(trained, tmp_path, capsys):
    shutil.copy(trained[0] / "best.pt", tmp_path)
    data = circo(tmp_path / "circo")
    assert train_cir.main(["--data", str(data), "--format", "circo", "--checkpoint", str(tmp_path / "best.pt"), "--workers", "0",
                           "--submit", str(tmp_path / "out")]) is None
    printed = capsys.readouterr().out
    assert all(f"mAP@{k}" in printed for k in (5, 10, 25, 50)) and "shortcuts of circo" in printed
    listed = json.loads((tmp_path / "out/circo_submission.json").read_text())
    assert list(listed) == ["0"] and sorted(listed["0"]) == list(range(10, 17))
    assert train_cir.main(["--data", str(data), "--format", "circo", "--check-data"]) == 0
    for more in (["--out", "x"], ["--checkpoint", str(tmp_path / "best.pt"), "--report", "r.html"]):
        with pytest.raises(SystemExit):
            train_cir.main(["--data", str(data), "--format", "circo", *more])


def test_check_data_knows_whether_the_model_is_there(drawn, capsys):
    check = ["--data", str(drawn), "--check-data", "--workers", "0", "--blip2"]
    assert train_cir.main([*check, "tiny"]) == 0 and "training can start" in capsys.readouterr().out
    assert train_cir.main([*check, "tinny"]) == 1
    out = capsys.readouterr().out
    assert "error: BLIP-2:" in out and "did you mean tiny" in out and out.splitlines()[-1] == "training would fail"


def test_report_of_an_evaluation(trained, drawn, tmp_path, capsys):
    path = tmp_path / "new/report.html"
    train_cir.main(["--data", str(drawn), "--checkpoint", str(trained[0] / "best.pt"), "--workers", "0", "--report", str(path)])
    out, page = capsys.readouterr().out, Page(path)
    check_safe(page)
    assert f"report: {path}" in out
    row = page.part("Recall, percent").split("a random order")[0]
    for name, value in re.findall(r"(R@\d+|Rs@\d|mean) ([\d.]+)", out.split("random order scores")[1].splitlines()[1]):
        assert f"<bdi>{name}</bdi>" in row and f"<bdi>{float(value):.1f}</bdi>" in row, name
    assert re.search(r"pictures that training saw\D*0 of \d+ rows", page.part("How this was made"))
    assert page.part("Training").count("<svg") == 2 and "best.pt" in page.part("How this was made")  # too short a run for a logged loss


def test_training_writes_the_report_of_its_best_epoch(command, tmp_path, capsys, monkeypatch):
    """The recall falls after the first epoch: the page stays that of the first, and equals that of --checkpoint."""
    validate, left = train_cir.validate, iter([50.0, 20.0])

    def falling(*args):
        numbers, scores = validate(*args)
        return {**numbers, "mean": next(left)}, scores

    monkeypatch.setattr(train_cir, "validate", falling)
    train_cir.main(command("--epochs", "2", "--report", str(tmp_path / "r.html")))
    best, out = str(tmp_path / "run/best.pt"), capsys.readouterr().out
    assert out.count(f"report: {tmp_path / 'r.html'}") == 1
    train_cir.main([*command()[:2], "--checkpoint", best, "--workers", "0", "--report", str(tmp_path / "again.html")])
    page, again = Page(tmp_path / "r.html"), Page(tmp_path / "again.html")
    check_safe(page)
    assert page.part("Recall, percent") == again.part("Recall, percent") and best in page.text
    assert page.part("12 samples") == again.part("12 samples")


def test_validation_frequency_validates_the_last_epoch_too(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cir, "train_step", lambda *args: None)
    train_cir.main(command("--epochs", "3", "--validation-frequency", "2"))
    epochs = [row["epoch"] for row in runfolder.read_log(tmp_path / "run/training_log.csv") if row["kind"] == "epoch"]
    assert epochs == ["2", "3"]


def test_a_step_takes_what_the_flags_say(command, monkeypatch):
    seen = {}

    def forward(model, *args, **kwargs):
        seen.update(kwargs)
        return true_forward(model, *args, **kwargs)

    def clip(accelerator, parameters, limit):
        seen["limit"] = limit
        raise KeyboardInterrupt

    true_forward = train_cir.Sprc.forward
    monkeypatch.setattr(train_cir.Sprc, "forward", forward)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    assert errors.exit_code(train_cir.main, command("--hard-set", "2", "--hard-batch", "3", "--loss-rtc", "0.5", "--loss-align",
                                                  "0.6",
                                                  "--loss-patch", "0.7")) == 130
    assert {name: seen[name] for name in ("rtc", "align", "patch", "hard_batch", "limit")} == {
        "rtc": 0.5, "align": 0.6, "patch": 0.7, "hard_batch": 3.0, "limit": 1.0}
    assert seen["negatives"].shape[:2] == (BATCH, 2) and seen["target_ids"].shape == (BATCH,)
    args = train_cir.get_args(command("--warmup", "0.1", "--lr", "1"))
    run, _ = train_cir.prepare(args, train_cir.start(args))
    run.total = 100
    assert run.lr(4) == pytest.approx(0.5) and run.lr(10) == 1.0


def test_interrupted_and_resumed_equals_undisturbed(trained, command, tmp_path, monkeypatch):
    """By Ctrl-C in the first epoch, and by SIGTERM in the second."""
    step, epochs, read = train_cir.train_step, set(), train_cir.Triplets.__getitem__
    monkeypatch.setattr(train_cir.Triplets, "__getitem__", lambda data, key: epochs.add(key[0]) or read(data, key))
    done = 0
    for number, code, stop in ((signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 4)):
        calls = []

        def interrupt(run, *args):
            calls.append(1)
            if len(calls) > 1:  # the rehearsal is the first
                assert run.wrapped.training and run.optimizer.param_groups[0]["lr"] == run.lr(run.step)
            if len(calls) == 1 + stop - done:
                os.kill(os.getpid(), number)
            return step(run, *args)

        monkeypatch.setattr(train_cir, "train_step", interrupt)
        assert train_cir.main(command(*MORE, "--resume", out="cut")) == code
        done = checkpoints.load_checkpoint(tmp_path / "cut/last.pt")["step"]
        assert done == stop and epochs == ({0} if stop == 1 else {0, 1})
    monkeypatch.setattr(train_cir, "train_step", step)
    train_cir.main(command(*MORE, "--resume", out="cut"))
    for name in ("best.pt", "last.pt"):
        whole, cut = (state_of(place / name) for place in (trained[0], tmp_path / "cut"))
        assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole), name
    assert (trained[0] / "training_log.csv").read_bytes() == (tmp_path / "cut/training_log.csv").read_bytes()


def test_resume_refuses_other_settings_and_other_data(trained, command, drawn, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    assert errors.exit_code(train_cir.main, command(*MORE, "--resume", "--lr", "5e-4")) == 2
    assert "--lr is 0.0005, was 0.001" in capsys.readouterr().err
    path = drawn / "captions/cap.rc2.train.json"
    content = path.read_text()
    try:
        changed = json.loads(content)
        changed[0]["caption"] += " now"
        path.write_text(json.dumps(changed))
        assert errors.exit_code(train_cir.main, command(*MORE, "--resume")) == 2
    finally:
        path.write_text(content)
    assert "training queries (hash)" in capsys.readouterr().err


@pytest.mark.parametrize("more, wanted", [
    (["--submit", "x"], "need --checkpoint"), (["--hard-set", "5"], "at most 4"), (["--target-ratio", "0.5"], "1 or more"),
    (["--format", "fashioniq", "--hard-set", "1"], "FashionIQ has none"),
    (["--spatial-attention", "--no-gate"], "leave --no-gate out"),
    (["--search", "red", "--image", "a", "--gallery", "b", "--checkpoint", "c", "--report", "r.html"], "leave --search out"),
    (["--search", "red"], "--search needs"), (["--unknown"], "unrecognized")])
def test_flags_that_do_not_go_together(command, capsys, more, wanted):
    with pytest.raises(SystemExit) as stop:
        train_cir.get_args(command(*more))
    assert stop.value.code == 2 and wanted in capsys.readouterr().err


def test_checkpoints_of_others_are_refused(trained, command, drawn, tiny, tmp_path, capsys):
    best = checkpoints.load_checkpoint(trained[0] / "best.pt")
    checkpoints.save_checkpoint(tmp_path / "gated.pt", {**best, "stage": "gated"})
    checkpoints.save_checkpoint(tmp_path / "other.pt", {**best, "frozen": "0" * 16})
    checkpoints.save_checkpoint(tmp_path / "short.pt", {**best, "state": dict(list(best["state"].items())[:-1])})
    capsys.readouterr()
    for name, wanted in (("gated", "another stage (gated)"), ("other", "another vision tower"), ("short", "does not fit"),
                         ("absent", "no such checkpoint")):
        code = errors.exit_code(train_cir.main, ["--data", str(drawn), "--checkpoint", str(tmp_path / f"{name}.pt"), "--workers",
                                               "0"])
        told = capsys.readouterr().err
        assert code == 2 and wanted in told and told.count("error:") == 1, (name, told)
    assert errors.exit_code(train_cir.main, command("--blip2", tiny[0], out="wrong")) == 2  # a BLIP-2 with OPT has no text path
    assert "not one for image-text retrieval" in capsys.readouterr().err


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of the trained best.pt: an index is kept beside it."""
    return shutil.copy(trained[0] / "best.pt", tmp_path / "best.pt")


def loaded(path):
    args = train_cir.get_args(["--data", "x", "--checkpoint", str(path)])
    model = train_cir.load_best(args)[1]
    return model, train_cir.Opener(model.image_size, args.transform, args.target_ratio)


def test_search_ranks_by_the_fused_query_without_the_picture_itself(checkpoint, drawn, tmp_path, capsys):
    shelf = sorted((drawn / "img_raw/dev").rglob("*.*g"))
    image, names = shelf[1], [str(path.relative_to(drawn / "img_raw/dev")) for path in shelf]
    command = ["--search", "At night!", "--image", str(image), "--gallery", str(drawn / "img_raw/dev"), "--checkpoint",
               str(checkpoint),
               "--workers", "0", "--top", "5", "--out", str(tmp_path / "found")]
    assert train_cir.main(command) is None
    printed = capsys.readouterr().out
    model, opener = loaded(checkpoint)
    with torch.no_grad():
        text = core.text_ids(model.tokenizer, ["at night"])
        vector = model.query(model.image_embeds(opener(image)[None]), **text)[1]
        scores = core.max_similarity(vector, model.image_features(model.image_embeds(torch.stack([opener(p)
                                                                                                  for p in shelf]))))[0]
    scores[1] = -2
    told = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    assert [float(line[1]) for line in told] == pytest.approx(sorted(scores.tolist(), reverse=True)[:5],
                                                              abs=2e-3) and len(told) == 5
    assert all(scores[shelf.index(pathlib.Path(line[2]))].item() == pytest.approx(float(line[1]), abs=2e-3) for line in told)
    page = (tmp_path / "found/search.html").read_text()
    assert "At night!" in page and sum(name in page for name in names) == 5
    train_cir.main(command)
    assert f"{len(shelf)} of them indexed before" in capsys.readouterr().out


def test_gate_maps_show_the_change_of_each_patch_and_what_was_found(checkpoint, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(galleries, "MAPS", 3)
    folder = tmp_path / "maps"
    train_cir.main(["--data", str(drawn), "--checkpoint", str(checkpoint), "--workers", "0", "--gate-maps", str(folder)])
    content = pages.read_results(folder / "cirr_maps.results.json", ["gate maps"])
    drawings, (size, *fit) = content["maps"], content["preparation"]
    pool, = cirr.read_split(drawn, "cirr", "val", log=lambda *words: None)
    model, opener = loaded(checkpoint)
    features, vectors, _ = galleries.encode(model, pool, opener, Accelerator(cpu=True), 8, 0)
    scores, names = galleries.score_gallery(vectors, features), list(pool.gallery)
    assert len(drawings) == galleries.MAPS and drawings[0]["file"] == f"{pool.queries[0].pairid}.png"
    assert {path.name for path in folder.glob("*.png")} == {one["file"] for one in drawings} and fit == ["targetpad", 1.25]
    for one, number in ((drawings[0], 0), (drawings[-1], len(pool.queries) - 1)):
        query = pool.queries[number]
        assert (one["text"], one["target"]) == (cirr.text_of(query), pool.gallery[query.target])
        assert one["reference"] == pool.gallery[query.reference] and size == model.image_size
        with torch.no_grad():
            embeds = model.image_embeds(opener(pool.gallery[query.reference])[None])
            fused = model.fused(embeds, **core.text_ids(model.tokenizer, [one["text"]]))
        wanted = ((fused - embeds)[0].norm(dim=-1) / embeds[0].norm(dim=-1))[1:]  # without [CLS]
        heat = np.array(one["heat"])
        assert np.allclose(heat.flatten(), wanted, rtol=1e-3) and heat.shape == (4, 4)
        best = [n for n in next(cirr.ranking(scores[[number]], names)) if n != query.reference][:5]
        assert one["found"] == [[pool.gallery[n], n == query.target] for n in best]


@pytest.mark.parametrize("more, message", [(("--batch-size", "1"), "no negatives"), (("--loss-rtc", "0"), "add --loss-align 0")])
def test_a_training_without_a_negative_or_towards_nothing_is_refused(command, capsys, more, message):
    with pytest.raises(SystemExit):
        train_cir.get_args(command(*more))
    assert message in capsys.readouterr().err
    assert train_cir.get_args(command("--batch-size", "1", "--hard-set", "2")).batch_size == 1


def test_every_right_answer_of_a_query_is_one_in_its_map(checkpoint, drawn, tmp_path):
    """CIRCO has several, and ranks the reference too."""
    pool, = cirr.read_split(drawn, "cirr", "val", log=lambda *words: None)
    model, opener = loaded(checkpoint)
    names, query = list(pool.gallery), pool.queries[0]
    best = [query.reference, *[name for name in names if name not in (query.reference, query.target)][:2]]
    scores = torch.zeros(1, len(names))
    scores[0, [names.index(name) for name in best]] = torch.tensor([3.0, 2.0, 1.0])
    for answers, members, expected in (((best[2], query.target), (), [False, False, True]), ((), query.members, [False, False])):
        one = replace(query, answers=answers, members=members)
        galleries.write_gate_maps(str(tmp_path / "page.html"), str(checkpoint), model, replace(pool, queries=[one]), scores, opener,
                                  [model.image_size, "targetpad", 1.25])
        found = pages.read_results(tmp_path / "page.results.json", ["gate maps"])["maps"][0]["found"]
        assert [right for _, right in found][:len(expected)] == expected
        assert (found[0][0] == pool.gallery[query.reference]) is not members


def test_losses_of_weight_zero_leave_no_parameter_without_a_gradient(command, folder):
    for more in (("--loss-rtc", "0", "--loss-align", "0"), ("--loss-align", "0"), ("--no-gate",), ()):
        args = train_cir.get_args(command(*more))
        model = train_cir.load_model(args, torch.float32).train()
        for _ in range(2):  # a fresh fusion passes nothing on before its first step
            model(**make_batch(model), rtc=args.loss_rtc, align=args.loss_align)["loss"].backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None], more


def test_chance_is_what_a_random_model_scores():
    rng, queries, gallery = np.random.default_rng(0), 4000, 61
    scores = rng.random((queries, gallery))
    members = np.stack([rng.permutation(gallery)[:6] for _ in range(queries)])
    found = metrics.cirr_scores(scores, members[:, 0], members[:, 1], members)
    for name, value in metrics.chance_level(gallery, 6).items():
        assert found[name] == pytest.approx(value, abs=3), name


def test_fashioniq_trains_and_scores_each_category(folder, tmp_path, capsys):
    rng, data = np.random.default_rng(0), tmp_path / "fiq"
    for place in ("captions", "image_splits", "images"):
        (data / place).mkdir(parents=True)
    from PIL import Image
    for category in cirr.CATEGORIES:
        for split in ("train", "val"):
            names = [f"{category}{split}{n}" for n in range(6)]
            for name in names:
                Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(data / "images" / f"{name}.png")
            rows = [{"candidate": names[n], "target": names[n + 1], "captions": ["is red.", "has long sleeves"]}
                    for n in range(4)]
            (data / f"captions/cap.{category}.{split}.json").write_text(json.dumps(rows))
            (data / f"image_splits/split.{category}.{split}.json").write_text(json.dumps(names))
    pools = cirr.read_split(data, "fashioniq", "train", log=lambda *words: None)
    triplets = train_cir.Triplets(pools, train_cir.Opener(28, "targetpad", 1.25))
    assert len({triplets[epoch, 0][2] for epoch in range(30)}) == 4  # both captions, either first, or one alone
    train_cir.main(["--data", str(data), "--format", "fashioniq", "--blip2", folder, "--epochs", "1", "--batch-size", "4",
                    "--lr", "1e-3",
                    "--workers", "0", "--out", str(tmp_path / "run"), "--precision", "no"])
    log = runfolder.read_log(tmp_path / "run/training_log.csv")
    assert log[-1]["kind"] == "epoch" and float(log[-1]["R@10"]) == 100 and not log[-1]["R@1"]
    assert "6 + 6 + 6" in capsys.readouterr().out


def test_dry_run_writes_nothing_and_a_cache_gives_the_same_scores(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(galleries, "MAPS", 1)
    assert train_cir.main(command("--dry-run")) is None and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert printed.count(" -> ") == 3 and "sum, computed" in printed and "measured" in printed
    values = []
    for out, more in (("run", ()), ("kept", ("--cache", str(tmp_path / "cache")))):
        train_cir.main(command("--epochs", "1", *more, out=out))
        best = checkpoints.load_checkpoint(tmp_path / out / "best.pt")
        values.append((best["frozen"], best["value"], best["state"]))
    assert values[0][0] == values[1][0] and values[0][1] == values[1][1]
    for name, tensor in values[0][2].items():
        assert torch.allclose(tensor, values[1][2][name], atol=1e-5), name
    capsys.readouterr()
    maps = tmp_path / "maps"
    train_cir.main(["--data", command()[1], "--checkpoint", str(tmp_path / "run/best.pt"), "--cache", str(tmp_path / "cache"),
                    "--workers", "0",
                    "--gate-maps", str(maps)])
    printed = capsys.readouterr().out
    assert f"mean {values[0][1]:.2f}" in printed and "0 to make" in printed and len(list(maps.glob("*.png"))) == 1
