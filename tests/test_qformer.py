"""pytest tests/test_qformer.py: pretrain_qformer.py on random tiny weights. Behaviour-checked; its losses, negatives and score
matrices are checked against LAVIS's in test_golden.py, its data in test_pairs.py."""

import json
import math
import os
import shutil
import signal
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageDraw

import core
import metrics
import pretrain_qformer
import train_cir
from data import pairs, rows
from engine import checkpoints, errors, loop, mixed_epochs, published, run, runfolder, stage1
from engine.errors import DataError
from conftest import ROOT
from test_cir import draw_curves_once, random_retrieval, to_lavis
from test_pairs import pack, sample_members

TEXTS = ["three red boats on the water", "a house", "at night, two blue stars all over the sky", "an orange fish",
         "one tree in a meadow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_retrieval(tmp_path_factory.mktemp("models"))


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


def test_losses_by_hand(build, monkeypatch):
    """One picture and one unpadded text at a time."""
    model, ids = build(), [0, 1, 2, 1, 3]
    batch, B, Q = make_batch(model, 5, ids), 5, model.query_tokens.shape[1]
    images = [batch["image_embeds"][i:i + 1] for i in range(B)]
    texts = [core.text_ids(model.tokenizer, [text]) for text in TEXTS]
    image_of, text_of = torch.tensor([1, 0, 4, 2, 2]), torch.tensor([4, 2, 1, 0, 3])
    with torch.no_grad():
        model.temp.fill_(0.05)  # not the value that it starts with
    parts = model(**batch, negatives=(image_of, text_of))
    shown = [model.image_features(image)[0] for image in images]
    t2i = torch.stack([(model.text_features(**text) @ torch.stack(shown).transpose(1, 2)).amax((1, 2))
                       for text in texts]) / model.temp
    targets = torch.tensor([[0.02 + 0.9 * (a == b) / ids.count(a) for b in ids] for a in ids])
    itc = -(targets * (t2i.log_softmax(1) + t2i.T.log_softmax(1))).sum(1).mean() / 2
    assert parts["itc"].item() == pytest.approx(itc.item(), rel=1e-4)
    pairs = [(i, i, 1) for i in range(B)] + [(image_of[i], i, 0) for i in range(B)] + [(i, text_of[i], 0) for i in range(B)]
    yes = [F.cross_entropy(model.itm_head(model.joint(images[i], **texts[t])[0, :Q]).mean(0), torch.tensor(label)) for i, t,
           label in pairs]
    assert parts["itm"].item() == pytest.approx(torch.stack(yes).mean().item(), rel=1e-4)
    words = []
    for image, text in zip(images, texts):
        said = text["input_ids"].clone()
        said[0, 0] = model.config.qformer_config.vocab_size - 1  # [DEC]
        states = model.joint(image, said, text["attention_mask"], core.unilm_mask)[0, Q:]
        logits = model.lm_head(states, model.embeddings.word_embeddings.weight).log_softmax(-1)
        words += [-0.9 * logits[k, said[0, k + 1]] - 0.1 * logits[k].mean() for k in range(len(logits) - 1)]
    assert parts["itg"].item() == pytest.approx(torch.stack(words).mean().item(), rel=1e-4)
    asked = []
    monkeypatch.setattr(pretrain_qformer, "draw_negatives", lambda *args: asked.append(args) or image_of)
    model(**batch)
    apart = torch.tensor([[a != b for b in ids] for a in ids])
    for (logits, other), wanted in zip(asked, (t2i, t2i.T), strict=True):
        assert torch.allclose(logits, wanted, atol=1e-3) and torch.equal(other, apart)
    model.image_features(images[0]).sum().backward()
    assert model.query_tokens.grad.abs().sum() > 0


def test_negatives_are_drawn_by_likeness_and_long_texts_keep_their_end(build):
    logits, other = torch.tensor([[9.0, 0.0, 5.0]]).expand(200, 3), torch.tensor([[False, True, True]]).expand(200, 3)
    torch.manual_seed(0)
    assert (pretrain_qformer.draw_negatives(logits, other) == 2).sum() > 190
    tokenizer = build().tokenizer
    ids = core.text_ids(tokenizer, ["red " * 60])["input_ids"][0]
    assert len(ids) == core.MAX_TEXT and (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_one_batch_is_overfitted(build):
    model = build().train()
    batch = make_batch(model)
    optimizer = loop.make_optimizer(model, 8e-3, 0.0)
    for step in range(45):
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


def whole_batch(folder, path):
    """Losses and gradients of one batch of six, shared out over all processes, go to `path`."""
    accelerator = Accelerator(cpu=True)
    loop.seed_everything(1)
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", folder, "--init", "random"])
    model = pretrain_qformer.load_model(args, torch.float32, lambda *words: None).eval()
    batch = make_batch(model, 6, [0, 1, 2, 3, 1, 5])
    rank, count = accelerator.process_index, accelerator.num_processes
    mine = slice(rank * 6 // count, (rank + 1) * 6 // count)
    share = {name: value[mine] for name, value in batch.items()}
    if rank:  # lengths may differ between processes
        share |= {name: F.pad(share[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    drawn = torch.tensor([5, 4, 3, 2, 0, 1])[mine]  # always the same negatives, as numbers of the whole batch
    wrapped = accelerator.prepare(model)
    parts = wrapped(**share, negatives=(drawn, drawn))
    parts["loss"].backward()
    losses = accelerator.reduce(torch.stack([parts[n] for n in ("itc", "itm", "itg")]), "mean")
    if accelerator.is_main_process:
        torch.save([losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}], path)


def test_two_processes_equal_one_with_the_whole_batch(two_processes, folder, tmp_path):
    whole_batch(folder, tmp_path / "x.pt")
    (one_losses, one), (two_losses, two) = (torch.load(path, weights_only=True)
                                            for path in (tmp_path / "x.pt", two_processes[0] / "x.pt"))
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
        found = metrics.retrieval_scores(scores, i2t, owner)
        for k in (1, 5):
            hits = [sum(not scores[t, g] < scores[t, owner[t]] for g in range(5) if g != owner[t]) < k for t in range(8)]
            assert found[f"t2i R@{k}"] == pytest.approx(100 * np.mean(hits))
            wrong = [min(sum(not i2t[g, t] < i2t[g, right] for t in range(8) if owner[t] != g)
                         for right in np.flatnonzero(owner == g))
                     for g in range(5)]
            assert found[f"i2t R@{k}"] == pytest.approx(100 * np.mean([w < k for w in wrong]))


def test_evaluation_by_hand(build, sets):
    """Two captions a picture, pictures shuffled: against one at a time, in eval mode."""
    model, found = build().train(), pretrain_qformer.pairs.read_sets({"drawn": str(sets[0])}, "train", log=lambda *words: None)
    found = [found[n] for n in np.random.default_rng(0).permutation(len(found))]
    data = pretrain_qformer.Captioned(found, model.image_size)
    shown = list(dict.fromkeys(pair.image_id for pair in found))
    owner = np.array([shown.index(pair.image_id) for pair in found])
    torch.nn.init.normal_(model.itm_head.weight, std=3.0)
    with torch.no_grad():
        model.eval()
        embeds = [model.image_embeds(data[0, list(owner).index(i)][0][None]) for i in range(len(shown))]
        texts = [core.text_ids(model.tokenizer, [pair.text]) for pair in found]
        cosines = core.max_similarity(torch.cat([model.text_features(**text) for text in texts]),
                                      torch.cat([model.image_features(image) for image in embeds]))
        nearest = [max((k for k in range(len(shown)) if k != i), key=lambda k: cosines[number, k]) for number, i in enumerate(owner)]
        margins = [torch.cat([model.match(embeds[i], **text) for i, text in zip(picked, texts)]).diff(dim=1) for picked in (owner, nearest)]
        # some of the own and some of the wrong pictures match, else all are judged alike
        model.itm_head.bias[1] -= (max(m.min() for m in margins) + min(m.max() for m in margins)) / 2
        told = pretrain_qformer.evaluate(model.train(), data, pretrain_qformer.Collate(model.tokenizer), Accelerator(cpu=True), 5, 0, 3)
        assert not model.training
        itg = [model.caption_loss(embeds[i], **text).item() for i, text in zip(owner, texts)]
        right = []
        for i, wrong, text in zip(owner, nearest, texts):
            right += [model.match(embeds[i], **text).argmax().item() == 1,
                      model.match(embeds[wrong], **text).argmax().item() == 0]
        assert len(set(right[::2])) == len(set(right[1::2])) == 2
        scores, tables = torch.full_like(cosines, -100), []
        for table in (cosines, cosines.T):
            scores = torch.full_like(table, -100)
            for r in range(len(table)):
                for c in table[r].topk(3).indices:
                    t, i = (r, c) if table is cosines else (c, r)
                    scores[r, c] = table[r, c] + model.match(embeds[i], **texts[t])[0, 1]
            tables.append(scores.numpy())
    wanted = metrics.retrieval_scores(cosines.numpy(), cosines.T.numpy(), owner)
    wanted |= {f"reranked {name}": value for name, value in metrics.retrieval_scores(*tables, owner).items()}
    wanted |= {"itm_accuracy": 100 * np.mean(right)}
    assert told.pop("itg") == pytest.approx(np.mean(itg), rel=0.02)  # there a mean over the words of a batch
    assert told == {name: pytest.approx(value, abs=0.06) for name, value in wanted.items()}


def test_the_wrong_picture_of_the_matching_accuracy_is_never_the_own(build, sets, monkeypatch):
    """Own pictures are the nearest here, and matching knows each pair: it is right every time."""
    model, found = build(), pretrain_qformer.pairs.read_sets({"drawn": str(sets[0])}, "train", log=lambda *words: None)
    found = list({pair.text: pair for pair in found}.values())
    data, shown = pretrain_qformer.Captioned(found, model.image_size), list(dict.fromkeys(pair.image_id for pair in found))
    owner = torch.tensor([shown.index(pair.image_id) for pair in found])
    with torch.no_grad():
        embeds = torch.cat([model.image_embeds(data[0, owner.tolist().index(i)][0][None]) for i in range(len(shown))])  # [G,P,W]
    texts = model.tokenizer([pair.text for pair in found]).input_ids
    near = torch.rand(len(found), len(shown)).scatter(1, owner[:, None], 1.5)

    def match(image, input_ids, attention_mask):
        pictures = (image[:, None] - embeds).abs().flatten(2).amax(2).argmin(1)  # [B]
        asked = [texts.index(ids[real.bool()].tolist()) for ids, real in zip(input_ids, attention_mask)]
        return F.one_hot((owner[asked] == pictures).long(), 2).float()

    monkeypatch.setattr(core, "max_similarity", lambda *features: near)
    monkeypatch.setattr(model, "match", match)
    told = pretrain_qformer.evaluate(model, data, pretrain_qformer.Collate(model.tokenizer), Accelerator(cpu=True), 5, 0, 0)
    assert told["itm_accuracy"] == 100 and told["i2t R@1"] == 100


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
    assert model.embeddings.word_embeddings.weight[-1].std().item() == pytest.approx(0.02, rel=0.5)  # [DEC]
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
    stage1.export(model, tmp_path / "hf")
    theirs, found = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    images, text = torch.randn(2, 3, 112, 112), core.text_ids(model.tokenizer, TEXTS[:2])
    with torch.no_grad():
        wanted = theirs.eval()(pixel_values=images, **text, use_image_text_matching_head=False).logits_per_image
        ours = core.max_similarity(model.text_features(**text), model.image_features(model.image_embeds(images))).T
    assert torch.allclose(ours, wanted, atol=1e-5)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.tokenizer("a house").input_ids == model.tokenizer("a house").input_ids
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(pixels, rows.image_tensor(picture, 112), atol=1e-5)
    again = pretrain_qformer.load_model(pretrain_qformer.get_args(["--data", "x=y", "--blip2", str(tmp_path / "hf"), "--init",
                                                                   str(tmp_path / "hf")]),
                                        torch.float32, lambda *words: None)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name,
               tensor in model.state_dict().items())  # temp and lm_head too
    cir = train_cir.Sprc.load(str(tmp_path / "hf"))
    assert cir.temp.item() == pytest.approx(0.05) and torch.equal(cir.text_projection.weight, model.text_projection.weight)


def test_train_gated_takes_the_exported_qformer(tiny, tmp_path):
    """A stage-1 Q-Former of the tiny BLIP-2's sizes."""
    blip2, tokenizer = published.load_blip2(tiny[0])
    qformer = blip2.config.qformer_config
    qformer.use_qformer_text_input, blip2.config.image_text_hidden_size = True, 32
    model = pretrain_qformer.Stage1(blip2.vision_model, blip2.config, tokenizer)
    stage1.start_at_random(model)
    stage1.export(model, tmp_path / "hf")
    gated = core.Blip2OPTGated.build(*tiny, [], gating="none", qformer=str(tmp_path / "hf"))
    theirs, own = gated.qformer.state_dict(), model.qformer.state_dict()
    assert all(torch.equal(theirs[name], own[name]) for name in theirs) and torch.equal(gated.query_tokens, model.query_tokens)


def save_lavis(model, path):
    """A Stage1 as LAVIS's stage-1 file, without the vision tower -> its state dict by our names."""
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("vision_model.")}
    lavis = {n.replace("lm_head.", "Qformer.cls.predictions."): t for n, t in to_lavis(state).items()}
    lavis["Qformer.cls.predictions.decoder.weight"] = state["embeddings.word_embeddings.weight"]
    torch.save({"model": lavis}, path)
    return state


def test_convert_of_a_lavis_checkpoint(build, folder, tmp_path, capsys):
    state = save_lavis(build(), tmp_path / "stage1.pth")
    pretrain_qformer.main(["--convert", str(tmp_path / "stage1.pth"), "--blip2", folder, "--out", str(tmp_path / "run")])
    loaded = published.read_weights(tmp_path / "run/hf")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items()) and loaded.keys() == state.keys()
    code = errors.exit_code(pretrain_qformer.main, ["--convert", str(tmp_path / "stage1.pth"), "--blip2", folder, "--out",
                                                  str(tmp_path / "run")])
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


# --- the script ------------

STEP_ROWS = 2  # instead of LOG_EVERY


def draw_pairs(folder):
    """Twelve pictures with two captions each to train on, four with one to validate."""
    (folder / "images").mkdir(parents=True)
    colours = ("red", "green", "blue", "orange")
    for split, count in (("train", 12), ("val", 4)):
        table = {}
        for n in range(count):
            picture, (kind, colour) = Image.new("RGB", (60, 48), "white"), (divmod(n, 4)[0], colours[n % 4])
            shape = ImageDraw.Draw(picture)
            (shape.ellipse, shape.rectangle, shape.line)[kind]((6 + n, 6, 40 + n, 40), fill=colour)
            picture.save(folder / f"images/{split}{n}.png")
            texts = [f"a {colour} {('disc', 'box', 'line')[kind]}", f"{colour} on white, picture {n}"]
            table[f"{split}{n}.png"] = texts[:1 if split == "val" else 2]
        (folder / f"{split}_captions.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(folder of pairs, folder of two tar files of eight samples), not to be written to."""
    folder = tmp_path_factory.mktemp("sets")
    for k in range(2):
        pack(folder / f"tars/cc-{k}.tar", sample_members(8 * k, 8))
    return draw_pairs(folder / "drawn"), folder / "tars"


def flags(folder, data, out, *more):
    return ["--data", f"drawn={data}", "--blip2", folder, "--init", "random", "--epochs", "2", "--batch-size", "8", "--lr",
            "1e-3",
            "--workers", "0", "--precision", "no", "--out", str(out), *more]


@pytest.fixture
def command(folder, sets, tmp_path):
    """Command line of a short run; add your own after it."""
    return lambda *more, out="run": flags(folder, sets[0], tmp_path / out, *more)


@pytest.fixture(scope="module")
def more(sets):
    """{name of a run: flags}."""
    return {"pairs": ("--save-last",), "shards": ("--save-last", "--data", f"cc={sets[1]}", "--workers", "2")}


@pytest.fixture(scope="module")
def trained(folder, sets, more, tmp_path_factory):
    """{name: folder of an undisturbed run}, not to be written to."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LOG_EVERY", STEP_ROWS)
        draw_curves_once(patch)
        for name in more:
            found[name] = tmp_path_factory.mktemp("trained") / name
            assert pretrain_qformer.main(flags(folder, sets[0], found[name], *more[name])) is None
    return found


@pytest.fixture
def short(monkeypatch):
    """No curves."""
    monkeypatch.setattr(run, "LOG_EVERY", STEP_ROWS)
    monkeypatch.setattr(runfolder, "draw_curves", lambda *args: None)


def test_training_writes_what_it_says(trained, sets):
    out = trained["pairs"]
    assert {p.name for p in out.iterdir()} >= {"best.pt", "last.pt", "args.yaml", "training_log.csv", "curves.png", "hf"}
    log = runfolder.read_log(out / "training_log.csv")
    steps, epochs = ([row for row in log if row["kind"] == kind] for kind in ("step", "epoch"))
    assert [int(row["step"]) for row in steps] == [2, 4, 6] and [row["epoch"] for row in epochs] == ["1", "2"]
    words = checkpoints.load_checkpoint(out / "best.pt")["state"]["embeddings.word_embeddings.weight"].shape[0]
    for row in steps:
        assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in ("itc", "itm", "itg")), abs=1e-3)
        assert [float(row[f"{name} chance"]) for name in ("itc", "itm", "itg")] == pytest.approx(
            [math.log(8), -math.log(1 / 3) / 3 - 2 * math.log(2 / 3) / 3, math.log(words)], abs=1e-4)
    best = checkpoints.load_checkpoint(out / "best.pt")
    assert best["value"] == pytest.approx(max(float(row["mean"]) for row in epochs), abs=1e-3)
    read = pairs.read_sets({"drawn": str(sets[0])}, "train", log=lambda *words: None)
    assert best["pictures"] == sorted({rows.picture_digest(pair.image) for pair in read}) and len(best["pictures"]) > 5
    assert all(0 <= float(row[name]) <= 100 for row in epochs for name in (*pretrain_qformer.RECALLS, "reranked mean",
                                                                           "itm_accuracy"))
    exported = published.read_weights(out / "hf")
    assert exported.keys() == best["state"].keys() and all(torch.equal(exported[n], tensor) for n,
                                                           tensor in best["state"].items())


@pytest.mark.parametrize("name, number, code", [("pairs", signal.SIGINT, 130), ("shards", signal.SIGTERM, 143)])
def test_interrupted_and_resumed_equals_undisturbed(trained, more, command, short, tmp_path, monkeypatch, name, number, code):
    if name == "shards":
        pytest.importorskip("webdataset")
    per_epoch = 3 if name == "pairs" else 5
    step, stop = pretrain_qformer.train_step, per_epoch + 2  # in the second epoch

    epochs, read = set(), pretrain_qformer.Captioned.__getitem__
    if name == "pairs":  # no loader processes
        monkeypatch.setattr(pretrain_qformer.Captioned, "__getitem__", lambda data, key: epochs.add((data.seed, key[0]))
                            or read(data, key))

    def interrupt(run, *args):
        if run.step:
            assert run.wrapped.training and run.optimizer.param_groups[0]["lr"] == run.lr(run.step)
        if run.step == stop - 1:
            os.kill(os.getpid(), number)
        return step(run, *args)

    monkeypatch.setattr(pretrain_qformer, "train_step", interrupt)
    assert pretrain_qformer.main(command(*more[name], out="cut")) == code
    last = checkpoints.load_checkpoint(tmp_path / "cut/last.pt")
    assert last["step"] == stop and last["marks"]["done"] == 1
    assert epochs in ({(42, 0), (42, 1), (None, 0)}, set())  # another view in every epoch, one in validation
    monkeypatch.setattr(pretrain_qformer, "train_step", step)
    pretrain_qformer.main(command(*more[name], "--resume", out="cut"))
    for file in ("best.pt", "last.pt"):
        whole, cut = (checkpoints.load_checkpoint(place / file)["state"] for place in (trained[name], tmp_path / "cut"))
        assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole), file
    assert (trained[name] / "training_log.csv").read_bytes() == (tmp_path / "cut/training_log.csv").read_bytes()


# --- the loop ------------

@pytest.fixture
def prepare(command, short):
    """Function that gives (Run, Parts, args) at the first step of a short training; add your own flags."""
    def make(*more, out="run"):
        args = pretrain_qformer.get_args(command(*more, out=out))
        return *pretrain_qformer.prepare(args, pretrain_qformer.start(args)), args
    return make


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def modes(model):
    """(modes of the tower's modules, of the Q-Former's dropouts)."""
    dropouts = [module for module in model.qformer.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    assert dropouts
    return {module.training for module in model.vision_model.modules()}, {module.training for module in dropouts}


def test_the_tower_is_in_eval_mode_without_gradient_and_dropout_is_on_in_steps_and_off_in_validation(prepare, monkeypatch):
    """Of each step and of each validation, those after a validation too: two passes over one batch differ where dropout is on."""
    args, seen = prepare()[2], []
    forward, evaluate = pretrain_qformer.Stage1.forward, pretrain_qformer.evaluate

    def step(model, image_embeds, input_ids, attention_mask, **more):
        vectors = [model.text_features(input_ids, attention_mask) for _ in range(2)]
        seen.append(("step", modes(model), not torch.equal(*vectors), vectors[0].requires_grad, image_embeds.requires_grad))
        return forward(model, image_embeds, input_ids, attention_mask, **more)

    def text_features(model, **text):
        vectors = [core.Blip2Retrieval.text_features(model, **text) for _ in range(2)]
        seen.append(("validation", modes(model), not torch.equal(*vectors), vectors[0].requires_grad, False))
        return vectors[0]

    def evaluate_watched(model, *more):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain_qformer.Stage1, "text_features", text_features)
            return evaluate(model, *more)

    monkeypatch.setattr(pretrain_qformer.Stage1, "forward", step)
    monkeypatch.setattr(pretrain_qformer, "evaluate", evaluate_watched)
    before = {name: p.detach().clone() for name, p in prepare()[0].model.vision_model.named_parameters()}
    run = pretrain_qformer.train(args)
    #                  kind, (tower, dropout), two passes differ, gradient of texts, of the tower's features
    assert [kind for kind, *_ in seen] == ["step", "validation", *(["step"] * 3 + ["validation"]) * 2]  # the rehearsal, two epochs
    for one in seen:
        assert one in (("step", ({False}, {True}), True, True, False), ("validation", ({False}, {False}), False, False, False))
    assert all(p.grad is None and not p.requires_grad and torch.equal(p, before[name])
               for name, p in run.model.vision_model.named_parameters())


def test_chance_is_that_of_the_pairs_of_a_step(prepare, monkeypatch):
    """Of which there may be fewer than --batch-size."""
    _, parts, args = prepare("--batch-size", "100", "--epochs", "1")
    asked, losses = [], pretrain_qformer.chance_losses
    monkeypatch.setattr(pretrain_qformer, "chance_losses", lambda model, pairs_of_step: asked.append(pairs_of_step) or losses(
        model, pairs_of_step))
    pretrain_qformer.train(args)
    assert asked == [len(parts.train)] and asked[0] < 100


def test_the_rehearsal_leaves_no_gradient_and_no_changed_weight(prepare, monkeypatch):
    run, parts, args = prepare()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    backward, gradients = run.accelerator.backward, []

    def look(loss):
        backward(loss)
        gradients.append(sum(p.grad.abs().sum().item() for p in run.model.parameters() if p.grad is not None))
    monkeypatch.setattr(run.accelerator, "backward", look)
    pretrain_qformer.rehearse(run, parts, args)
    assert len(gradients) == 1 and gradients[0] > 0
    assert same(run.model.state_dict(), before) and run.step == 0 and not run.optimizer.state_dict()["state"]
    assert not any(p.grad is not None and p.grad.any() for p in run.model.parameters())
    longest = [pair.text for pair in sorted(parts.train.rows, key=lambda pair: len(pair.text))[-8:]]
    with monkeypatch.context() as patch:
        read = []
        patch.setattr(pretrain_qformer, "train_step", lambda run, step: read.extend(pair.text for b in step for pair in b["pairs"]))
        pretrain_qformer.rehearse(run, parts, args)
    assert sorted(read) == sorted(longest)


@pytest.mark.parametrize("means, best", [((2.0, 1.0, 1.5), 1), ((1.0, 2.0, math.nan), 2), ((1.0, 1.0, 3.0), 3)])
def test_best_pt_and_the_exported_folder_hold_the_best_epochs_weights(prepare, monkeypatch, means, best):
    _, _, args = prepare("--epochs", "3", "--save-last")
    after, numbers = [], iter(means)

    def validate(run, *more):
        if not run.step:  # the rehearsal
            return {}
        after.append(checkpoints.trainable_state(run.model))
        return {"mean": next(numbers), "reranked mean": 5.0 - means[len(after) - 1], "itg": 0.0}
    monkeypatch.setattr(pretrain_qformer, "validate", validate)
    run = pretrain_qformer.train(args)
    held, exported = checkpoints.load_checkpoint(run.out / "best.pt"), published.read_weights(run.out / "hf")
    assert held["epoch"] == best and held["value"] == means[best - 1] and held["metric"] == "mean"
    assert same(held["state"], after[best - 1]) and same(exported, after[best - 1])
    assert same(checkpoints.load_checkpoint(run.out / "last.pt")["state"], after[2])
    assert not any(same(a, b) for a, b in zip(after, after[1:]))


def test_the_text_path_learns_at_a_rate_of_its_own(prepare):
    """The first step of AdamW moves each number by its group's rate: the text path by a tenth of what the queries' own parts move."""
    training, _, args = prepare("--text-lr", "0.1", "--warmup", "0", "--weight-decay", "0", "--lr", "1e-3")
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    with training.open(False, vars(args), __file__):
        training.wrapped.train()
        step = next(training.steps(0))
        pretrain_qformer.train_step(training, step)
        step.update()
    rate = training.lr(0)
    far = {name: (p.detach() - before[name]).abs().max().item() for name, p in training.model.named_parameters() if p.requires_grad}
    for name in ("embeddings.position_embeddings.weight", "qformer.layernorm.weight", "qformer.encoder.layer.1.output.dense.weight",
                 "qformer.encoder.layer.0.attention.attention.key.weight"):
        assert far[name] == pytest.approx(0.1 * rate, rel=1e-2), name
    for name in ("qformer.encoder.layer.0.crossattention.attention.key.weight", "qformer.encoder.layer.1.output_query.dense.weight",
                 "vision_projection.weight", "query_tokens", "itm_head.weight"):
        assert far[name] == pytest.approx(rate, rel=1e-2), name


def test_gradients_are_clipped_at_one_and_only_matrices_decay(prepare, monkeypatch):
    run, parts, args = prepare("--weight-decay", "0.5")
    clip, step, norms, ways = run.accelerator.clip_grad_norm_, torch.optim.AdamW.step, [], []

    def length():
        return math.sqrt(sum(p.grad.square().sum().item() for p in run.model.parameters() if p.grad is not None))
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *given: norms.append(length()) or clip(*given))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: ways.append(length()) or step(*given))
    with run.open(False, {}, __file__):
        run.wrapped.train()
        for one in run.steps(0):
            pretrain_qformer.train_step(run, one)
            one.update()
    assert len(ways) == 3 and max(norms) > 1.0 and ways == [pytest.approx(min(norm, 1.0), rel=1e-3) for norm in norms]
    run.optimizer.optimizer.state.clear()  # AdamW's moments
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.1
    run.optimizer.step()
    for name, p in run.model.named_parameters():
        decays = p.requires_grad and p.ndim > 1
        assert torch.equal(p, before[name]) is not (decays and bool(before[name].any())), name
        assert torch.allclose(p, before[name] * (1 - 0.1 * 0.5 if decays else 1)), name
    assert {"temp", "query_tokens", "vision_projection.bias"} <= before.keys()


def test_the_learning_rate_warms_up_for_a_tenth_at_most_and_ends_at_min_lr(prepare):
    run, *_ = prepare("--epochs", "10", "--lr", "1e-3", "--min-lr", "1e-4")  # 30 steps: --warmup's 5000 are cut to 3
    assert run.total == 30
    for step, wanted in ((0, 1e-3 / 3), (1, 2e-3 / 3), (2, 1e-3), (3, 1e-3), (29, 1e-4 + 9e-4 * (1 + math.cos(math.pi * 26 / 27)) / 2)):
        assert run.lr(step) == pytest.approx(wanted), step
    few = prepare("--epochs", "10", "--lr", "1e-5", "--min-lr", "1e-4", "--warmup", "2", out="few")[0]
    assert [few.lr(step) for step in (0, 1, 29)] == pytest.approx([0.5e-5, 1e-5, 1e-5])  # never above --lr


def test_processes_share_out_the_pairs_of_a_step_and_draw_differently(prepare):
    """Two processes of 3 pairs a step, 12 pictures of 2: each pair once, tar files at the same steps, the number of the process as
    what seeds dropout and negatives."""
    _, parts, args = prepare("--batch-size", "3")
    shard = pretrain_qformer.shards.Shard("cc-0.tar", "cc", 14)
    tars = len(parts.train)
    plans = [[mixed_epochs.epoch_plan(parts.train, pretrain_qformer.shards.ShardStream([shard], 8, 42, rank, 2), 3, args.seed, epoch)
              for rank in (0, 1)] for epoch in (0, 1)]
    for one, two in plans:
        assert [group for group, _ in one] == [group for group, _ in two] and len(one) == 4 + 2
        for (group, ((first, own),)), (_, ((second, others),)) in zip(one, two):
            assert (first, second) == (0, 1) and len(own) == len(others) == 3
            assert sorted(group) == sorted(own + others) and (tars in group) is (set(group) == {tars})
        assert sorted(n for group, _ in one for n in group if n != tars) == list(range(tars))
    places = [[n for n, (group, _) in enumerate(one) if tars in group] for one, _ in plans]
    assert places[0] != places[1]  # tar files are mixed among the pairs, anew in each epoch
    few = parts.train.__class__(parts.train.rows[:5], 8, 42)
    shares = [mixed_epochs.epoch_plan(few, pretrain_qformer.shards.ShardStream([], 8, 42, rank, 2), 3, args.seed, 0) for rank in (0, 1)]
    assert [len(keys) for ((_, ((_, keys),)),) in shares] == [2, 2]  # as many, where a step is not full


def test_the_first_processs_validation_counts_on_all(prepare, monkeypatch):
    """Rounding differs between machines; all must agree on what is best."""
    run, parts, args = prepare()
    monkeypatch.setattr(pretrain_qformer, "evaluate", lambda *given: {"mean": 1.0, "itg": 2.0})
    monkeypatch.setattr(pretrain_qformer, "broadcast", lambda numbers: numbers + 0.5)  # what the first process has
    assert pretrain_qformer.validate(run, parts, parts.val, args) == {"mean": 1.5, "itg": 2.5}


def test_a_step_is_a_function_of_seed_step_and_process(prepare):
    """Dropout and negatives: the same loss again, another one for another number."""
    run, parts, _ = prepare()
    batch = parts.collate([parts.train[0, n] for n in range(8)])
    run.wrapped.train()

    def loss(number, process):
        run.step = number
        step = pretrain_qformer.Run.rehearsal(run, dict(batch), list(range(8)))
        step.share = [(process, list(range(8)))]
        pretrain_qformer.train_step(run, step)
        return step.means()["loss"]
    assert loss(0, 0) == loss(0, 0) and len({loss(s, p) for s in (0, 1) for p in (0, 1)}) == 4


def test_a_signal_in_the_last_validation_leaves_a_last_pt_that_ends_as_the_undisturbed_run(trained, command, short, tmp_path, monkeypatch):
    validate = pretrain_qformer.validate

    def interrupt(run, *more):
        if run.step == run.total:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(run, *more)
    monkeypatch.setattr(pretrain_qformer, "validate", interrupt)
    assert pretrain_qformer.main(command()) == 143
    assert checkpoints.load_checkpoint(tmp_path / "run/last.pt")["marks"]["done"] == 2 and not (tmp_path / "run/hf").exists()
    monkeypatch.setattr(pretrain_qformer, "validate", validate)
    assert pretrain_qformer.main(command("--resume")) is None
    assert same(published.read_weights(tmp_path / "run/hf"), published.read_weights(trained["pairs"] / "hf"))


def test_a_loss_that_is_no_number_names_what_came_from_a_tar_file(prepare, sets, monkeypatch):
    pytest.importorskip("webdataset")
    run, parts, args = prepare("--data", f"cc={sets[1]}", "--epochs", "1")
    forward = pretrain_qformer.Stage1.forward

    def poisoned(model, *given, **more):
        losses = forward(model, *given, **more)
        if run.group[0] == len(parts.train):
            losses["loss"].data.fill_(math.nan)
        return losses
    monkeypatch.setattr(pretrain_qformer.Stage1, "forward", poisoned)
    with pytest.raises(DataError, match=r"loss is nan at step \d.*: 000\d\d, 000\d\d"), run.open(False, {}, __file__):
        for step in run.steps(0):
            pretrain_qformer.train_step(run, step)
            step.update()
    assert [row.name for row in run.rows_of([len(parts.train)] * 8)] == ["the tar files"]


def test_resume_refuses_other_settings_and_other_data(trained, folder, sets, more, command, tmp_path, capsys):
    shutil.copytree(trained["pairs"], tmp_path / "run")
    for flag, value, wanted in (("--lr", "5e-4", "--lr is 0.0005, was 0.001"), ("--init", folder, "--init is"),
                                ("--max-val", "3", "validation pairs"),
                                ("--data", f"cc={sets[1]}", "tar files is [[")):
        assert errors.exit_code(pretrain_qformer.main, command("--save-last", "--resume", flag, value)) == 2, flag
        assert wanted in capsys.readouterr().err, flag
    data = tmp_path / "data"
    shutil.copytree(sets[0], data)
    (data / "train_captions.json").write_text((data / "train_captions.json").read_text().replace("red", "pink", 1))
    assert errors.exit_code(pretrain_qformer.main, flags(folder, data, tmp_path / "run", "--save-last", "--resume")) == 2
    assert "training pairs (hash)" in capsys.readouterr().err
    assert errors.exit_code(pretrain_qformer.main, command("--save-last")) == 2
    assert "already holds best.pt and last.pt" in capsys.readouterr().err


@pytest.mark.parametrize("more, wanted", [
    ([], "--data NAME=PLACE is needed"), (["--check-data", "--convert", "x"], "--data NAME=PLACE is needed"),
    (["--unknown"], "unrecognized"),
    (["--data", "a=b", "--val-share", "2"], "between 0 and 1"), (["--data"], "expected one argument")])
def test_flags_that_do_not_go_together(capsys, more, wanted):
    with pytest.raises(SystemExit) as stop:
        pretrain_qformer.get_args(more)
    assert stop.value.code == 2 and wanted in capsys.readouterr().err


def test_defaults_of_init_and_data(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: 3\nblip2: tiny")
    assert errors.exit_code(pretrain_qformer.main, ["--config", str(tmp_path / "c.yaml")]) == 2
    assert "error: --data 3: give NAME=PLACE" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("data: [a=b, c=d]")
    assert pretrain_qformer.get_args(["--config", str(tmp_path / "c.yaml")]).data == ["a=b", "c=d"]
    given = pretrain_qformer.get_args(["--config", str(tmp_path / "c.yaml"), "--data", "a=x", "--data", "y=z"])
    assert given.data == ["a=x", "y=z"] and given.init == pretrain_qformer.BERT  # the command line wins
    assert pretrain_qformer.get_args(["--data", "a=b", "--blip2", "tiny"]).init == "random"


def test_check_data_says_whether_training_can_start(folder, sets, tmp_path, capsys):
    pytest.importorskip("webdataset")
    data, tars = (shutil.copytree(place, tmp_path / place.name) for place in sets)
    check = ["--data", f"drawn={data}", "--data", f"cc={tars}", "--check-data", "--workers", "0"]
    assert pretrain_qformer.main(check) == 1
    told = capsys.readouterr().out
    assert "error: BLIP-2:" in told and "training would fail" in told
    check += ["--blip2", folder]
    assert pretrain_qformer.main(check) == 0
    told = capsys.readouterr().out
    assert "training can start" in told and "24 captions of 12 pictures" in told and "16 of 16 samples" in told
    (tars / "cc-1.tar").write_bytes((tars / "cc-1.tar").read_bytes()[:700])
    assert pretrain_qformer.main(check) == 1 and "would fail at the tar files" in capsys.readouterr().out
    assert pretrain_qformer.main([*check, "--skip-broken"]) == 0
    (data / "images/train3.png").write_bytes(b"broken")
    assert pretrain_qformer.main([*check, "--skip-broken"]) == 1
    assert "bad: train3.png" in capsys.readouterr().out
    assert pretrain_qformer.main([*check, "--skip-broken", "--skip-bad", "0.1"]) == 0
    assert errors.exit_code(pretrain_qformer.main, ["--data", f"cc={tars}", "--check-data"]) == 2  # nothing to validate on
    assert "only sets of tar files" in capsys.readouterr().err


def test_what_is_broken_stops_the_run_or_is_left_out_and_said(folder, sets, short, tmp_path, capsys):
    pytest.importorskip("webdataset")
    data, tars = (shutil.copytree(place, tmp_path / place.name) for place in sets)
    command = flags(folder, data, tmp_path / "run", "--data", f"cc={tars}", "--epochs", "1")
    (data / "images/train3.png").write_bytes(b"broken")
    pack(tars / "cc-0.tar", sample_members(0, 8) | {"00003.png": b"broken"})
    pack(tars / "cc-2.tar", {}).write_bytes(b"broken")
    for more, wanted in (((), ("cc-2.tar", "--skip-broken")), (("--skip-broken",), ("train3.png", "row 4", "replace it")),
                         (("--skip-broken", "--skip-bad", "0.01"), ("train3.png", "--skip-bad 0.09"))):
        assert errors.exit_code(pretrain_qformer.main, [*command, *more]) == 2
        told = capsys.readouterr().err
        assert told.count("error:") == 1 and "Traceback" not in told and all(word in told for word in wanted), told
    assert errors.exit_code(pretrain_qformer.main, [*command, "--skip-broken", "--skip-bad", "0.1"]) == 0
    told = capsys.readouterr().out
    assert "left out (--skip-bad): 2 of 24 train captions (1 pictures)" in told and "22 training pairs and 16 in tar files" in told
    assert all(f"left out: {tars.resolve() / name}" in told for name in ("cc-2.tar",
                                                                         "cc-0.tar")) and "1 broken samples" in told


def recorded_run(folder):
    """The script, with sys.argv; what each process saw and ended with goes to FOLDER/RANK.pt."""
    names, train_step, train = [], pretrain_qformer.train_step, pretrain_qformer.train

    def recorded(run, step):
        train_step(run, step)
        names.append([pair.name for pair in step.rows if not pair.image])

    def recorded_train(args):
        run = train(args)
        content = {"state": checkpoints.trainable_state(run.model), "names": names[1:], "writes": run.log is not None,
                   "step": run.step}
        torch.save(content, f"{folder}/{run.accelerator.process_index}.pt")
        return run

    pretrain_qformer.train_step, pretrain_qformer.train = recorded, recorded_train
    return errors.exit_code(pretrain_qformer.main)


@pytest.fixture(scope="module")
def two_processes(folder, sets, tmp_path_factory, forker):
    """(folder, printed) of whole_batch and of recorded_run in two processes, in one go since they start slowly."""
    pytest.importorskip("webdataset")
    if sys.version_info < (3, 11):
        pytest.skip("os.fork of Python 3.10 can hang in a process with threads: in its child it waits for a lock that nobody holds")
    place = tmp_path_factory.mktemp("two")
    (place / "two.py").write_text(textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
        import conftest, torch, test_qformer
        torch.set_num_threads(1)
        test_qformer.whole_batch({folder!r}, {str(place / "x.pt")!r})
        sys.exit(test_qformer.recorded_run({str(place)!r}))
    """))
    done = forker.together([place / "two.py", *flags(folder, sets[0], place / "run", "--data", f"cc={sets[1]}", "--workers", "2",
                                                     "--epochs", "1", "--batch-size", "4")])
    assert not any(one.returncode for one in done), done
    return place, "".join(one.stdout for one in done)


def test_two_processes_with_two_loaders_each_see_every_shard_sample_once(two_processes):
    place, printed = two_processes
    one, two = (torch.load(place / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["step"] == two["step"] == 3 + 2 and (one["writes"], two["writes"]) == (True, False)
    assert all(torch.equal(tensor, two["state"][name]) for name, tensor in one["state"].items())
    assert [len(n) for n in one["names"]] == [len(n) for n in two["names"]]  # both take from the tar files at the same steps
    assert sorted(sum(one["names"] + two["names"], [])) == sorted(f"{n:05}" for n in range(16))
    assert (place / "run/hf/config.json").exists() and printed.count("epoch 1: i2t") == 1


def test_dry_run_writes_nothing(command, tmp_path, capsys):
    assert pretrain_qformer.main(command("--dry-run")) is None and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert printed.count("; picture ") == 3 and "sum, computed" in printed and "measured" in printed
