"""GOLDEN=folder pytest tests/test_golden.py   (default ../shared/golden)

Everything here is reference-checked against outputs of the original public code, for whatever cases the folder holds: the
Q-Former's passes (LAVIS, SPRC), the official VQAv2 evaluator, ArtQuest's metrics, COCO's caption tools. The folder may hold a
part of the kinds; what is absent is skipped, and says so.
"""

import gzip
import importlib.util
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Blip2Config, Blip2QFormerConfig

import core
import metrics
from metrics import (bleu, cider_d, coco_meteor, exact_match, meteor, normalise_answer, rouge_l, sentence_bleu, strip_punctuation,
                     tokenize, vqa_accuracy)
import pretrain_qformer
import train_cir
from engine import captioning, galleries, published

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(os.environ.get("GOLDEN") or ROOT / "../shared/golden")
VQA, CAPTIONS = GOLDEN / "vqa_eval", GOLDEN / "caption_metrics"
CASES = {**dict.fromkeys(("qformer_stage1", "qformer_tasks", "sprc", "blip_captioning"), "*/config.json"),
         "cirr_metrics": "*/names.json", "caption_metrics": "*_inputs.json.gz", "vqa_eval": "*.json"}  # kind -> its cases' files


def cases(kind):
    """The cases of a kind: folders, or the corpora's names."""
    found = sorted(GOLDEN.glob(f"{kind}/{CASES[kind]}"))
    return [p.name.removesuffix("_inputs.json.gz") for p in found] if kind == "caption_metrics" else [p.parent for p in found]


def missing_reason(kind):
    """The reason for skipping what needs this kind."""
    others = "" if any(map(cases, CASES)) else ", nor any other golden values"
    return f"no {kind} in {GOLDEN}{others} (set GOLDEN)"


def needs(kind):
    return pytest.mark.skipif(not cases(kind), reason=missing_reason(kind))


def each_case(kind):
    """Parametrise a test over a kind's cases; without any, the test is skipped and says so."""
    found = cases(kind) or [pytest.param(None, marks=needs(kind))]
    return pytest.mark.parametrize("case", found, ids=lambda case: f"{kind}-{getattr(case, 'name', case)}")


@pytest.mark.parametrize("kind", CASES)
def test_a_kind_that_is_there_holds_cases(kind):
    if not (GOLDEN / kind).is_dir():
        pytest.skip(missing_reason(kind))
    assert len(cases(kind)) >= (2 if kind == "cirr_metrics" else 1), f"cases are missing in {GOLDEN / kind}"


# --- Q-Former ------------

def qformer_config(c):
    """A case's config.json -> transformers' Blip2QFormerConfig."""
    return Blip2QFormerConfig(vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], layer_norm_eps=c["layer_norm_eps"],
                              num_hidden_layers=c["num_hidden_layers"], num_attention_heads=c["num_attention_heads"],
                              intermediate_size=c["intermediate_size"], cross_attention_frequency=c["cross_attention_freq"],
                              encoder_hidden_size=c["encoder_width"], max_position_embeddings=c["max_position_embeddings"],
                              hidden_dropout_prob=c["dropout"], attention_probs_dropout_prob=c["dropout"],
                              pad_token_id=c["pad_token_id"], use_qformer_text_input=True)


class Stage1:
    """Q-Former, embeddings and heads of a case, loaded from the LAVIS or the HF file."""

    def __init__(self, weights_folder, source):
        self.config = json.loads((weights_folder / "config.json").read_text())
        state = load_file(weights_folder / f"weights_{source}.safetensors")
        parts = published.qformer_weights(state, text_path=True)
        c = self.config
        config = qformer_config(c)
        self.qformer, self.embeddings = core.QFormer(config).eval(), core.TextEmbeddings(config).eval()
        self.qformer.load_state_dict(parts["qformer"], strict=True)
        self.embeddings.load_state_dict(parts["embeddings"], strict=True)
        self.queries, self.Q = parts["query_tokens"][""], c["num_query_tokens"]
        self.state = published.lavis_to_hf(state)

    def head(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def image(self, image_embeds):
        return self.qformer(self.queries.expand(len(image_embeds), -1, -1), image_embeds)

    def text(self, ids, mask):
        return self.qformer(self.embeddings(ids), mask=core.padding_mask(mask))

    def both(self, image_embeds, ids, mask, mask_function=core.padding_mask):
        embeds = torch.cat([self.queries.expand(len(ids), -1, -1), self.embeddings(ids)], 1)
        return self.qformer(embeds, image_embeds, mask_function(mask, self.Q), query_length=self.Q)


FORWARD, GRADIENT = 1e-4, 5e-4  # float32 after some layers: processors differ by up to 5e-5, in gradients by up to 2e-4


def close(found, expected, tolerance=FORWARD):
    """Every value is right to `tolerance` of its own size, or of a typical one where it is smaller than that.

    Rounding errors of a sum are as large as its terms, so that small values have those of large ones. Typical is the root mean
    square of the values that are not zero: most rows of an embedding's gradient are.
    """
    assert found.shape == expected.shape
    typical = expected[expected != 0].square().mean().sqrt()
    error = ((found - expected).abs() / expected.abs().clamp(min=typical)).max()
    assert error <= tolerance, f"largest error {error:.2e}"


def near(expected):
    """A single float32 value after some layers, a loss for instance."""
    return pytest.approx(expected, rel=FORWARD, abs=0)


@pytest.mark.parametrize("size", [1e-6, 1, 1e4])
def test_close_sees_one_percent(size):
    expected = size * torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    close(expected * (1 + 5e-5), expected)
    for wrong in (expected * 1.01, expected * 0.99, expected.T, expected[:1], torch.full_like(expected, float("nan"))):
        with pytest.raises(AssertionError):
            close(wrong, expected)
    for place in (expected.abs() > 0.01 * size).nonzero():  # also where a single value of a hundredth of the typical size is off
        wrong = expected.clone()
        wrong[tuple(place)] *= 1.012
        with pytest.raises(AssertionError):
            close(wrong, expected)
    sparse = torch.cat([expected, torch.zeros(1000, 12)])
    close(sparse * (1 + 5e-5), sparse)
    sparse[-1, 0] = 1e-3 * size
    with pytest.raises(AssertionError):
        close(torch.cat([expected, torch.zeros(1000, 12)]), sparse)


@pytest.mark.parametrize("source", ["lavis", "hf"])
@each_case("qformer_stage1")
@torch.no_grad()
def test_stage1_passes(case, source):
    model, x, expected = Stage1(case, source), load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    ids, mask, image = x["input_ids"], x["attention_mask"], x["image_embeds"]
    real = mask.bool()
    queries, text = model.image(image), model.text(ids, mask)
    close(queries, expected["query_output"])
    close(text[real], expected["text_output"][real])
    close(F.normalize(model.head("vision_projection", queries), dim=-1), expected["image_feats"])
    close(F.normalize(model.head("text_projection", text[:, 0]), dim=-1), expected["text_feat"])
    joint = model.both(image, ids, mask, core.unimodal_mask)  # one pass for both sides of ITC
    close(joint[:, :model.Q], expected["query_output"])
    close(joint[:, model.Q:][real], expected["text_output"][real])
    negative_images, negative_texts = expected["neg_image_idx"].long(), expected["neg_text_idx"].long()
    itm = model.both(torch.cat([image, image[negative_images], image]), torch.cat([ids, ids, ids[negative_texts]]),
                     torch.cat([mask, mask, mask[negative_texts]]))[:, :model.Q]
    close(itm, expected["itm_query_hidden"])
    close(model.head("itm_head", itm).mean(1), expected["itm_logits"])
    lm = model.both(image, expected["lm_decoder_input_ids"].long(), mask, core.unilm_mask)
    close(lm[:, :model.Q], expected["query_output"])
    close(lm[:, model.Q:][real], expected["lm_hidden"][real])


@pytest.mark.parametrize("name", ["query_output", "text_output", "image_feats", "text_feat", "itm_query_hidden", "itm_logits",
                                  "lm_hidden"])
@each_case("qformer_stage1")
def test_stage1_passes_see_one_percent(case, name, monkeypatch):
    def spoilt(path):
        return {n: t * 1.01 if n == name else t for n, t in safetensors.torch.load_file(path).items()}
    monkeypatch.setitem(globals(), "load_file", spoilt)
    with pytest.raises(AssertionError, match="largest error"):
        test_stage1_passes(case, "hf")


@each_case("qformer_stage1")
def test_unilm_mask_is_the_stored_one(case):
    x, expected = load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    Q = json.loads((case / "config.json").read_text())["num_query_tokens"]
    found = core.unilm_mask(x["attention_mask"], Q)[:, 0] == 0
    assert torch.equal(found.float(), expected["itg_mask_3d"])


def stage1_model(case):
    """Our Stage1 with the case's weights, in eval mode."""
    c, state = read(case / "config.json"), load_file(case / "weights_lavis.safetensors")
    config = Blip2Config(vision_config={"hidden_size": c["encoder_width"]}, qformer_config=qformer_config(c).to_dict(),
                         num_query_tokens=c["num_query_tokens"], image_text_hidden_size=c["embed_dim"])
    model = pretrain_qformer.Stage1(torch.nn.Identity(), config, None).eval()
    model.load_parts(published.qformer_weights(state, text_path=True), case)
    return model


@pytest.mark.parametrize("ids", ["", "imageid_"])
@each_case("qformer_stage1")
def test_stage1_losses_and_gradients(case, ids):
    model, x, expected = stage1_model(case), load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    values = read(case / "expected.json")
    image = x["image_embeds"].requires_grad_()
    image_ids = x["image_id"] if ids else torch.arange(len(image))
    drawn = tuple(expected[f"{ids}neg_{side}_idx"].long() for side in ("image", "text"))
    parts = model(image, x["input_ids"], x["attention_mask"], image_ids, negatives=drawn)
    for name, theirs in (("itc", "loss_itc"), ("itm", "loss_itm"), ("itg", "loss_lm"), ("loss", "loss")):
        assert parts[name].item() == near(values[ids + theirs]), name
    if ids:
        return
    parts["loss"].backward()
    own, start = {**dict(model.named_parameters()), "image_embeds": image}, "grad_full."
    wanted = {n.removeprefix(start): g for n, g in expected.items() if n.startswith(start)}
    for name, gradient in published.lavis_to_hf(wanted).items():
        close(own[name].grad, gradient, GRADIENT)
    assert len(wanted) >= 10


@pytest.mark.parametrize("ids", ["", "imageid_"])
@each_case("qformer_stage1")
def test_stage1_negatives_are_drawn_with_those_weights(case, ids, monkeypatch):
    expected, x = load_file(case / "expected.safetensors"), load_file(case / "inputs.safetensors")
    image_ids = x["image_id"] if ids else torch.arange(len(x["image_embeds"]))
    seen = []
    monkeypatch.setattr(torch, "multinomial", lambda weights, count: seen.append(weights) or torch.zeros(len(weights), count))
    for side in ("t2i", "i2t"):
        pretrain_qformer.draw_negatives(expected[f"sim_{side}"], image_ids[:, None] != image_ids[None])
        weights = expected[f"{ids}weights_{side}"]  # one softmax of stored values: right to a small part of each
        torch.testing.assert_close(seen[-1], weights, rtol=1e-5, atol=0)


@needs("qformer_stage1")  # whose weights are used
@each_case("qformer_tasks")
@torch.no_grad()
def test_score_matrices(case):
    model = stage1_model(GOLDEN / "qformer_stage1" / case.name)
    x, expected = load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    images, text = x["image_embeds"], (x["input_ids"], x["attention_mask"])
    cosines = core.max_similarity(model.text_features(*text), model.image_features(images))  # [texts, images]
    k = read(case / "expected.json")["k_test"]
    for found, name in zip(galleries.rerank(model, cosines, images, *text, k, chunk=3), ("t2i", "i2t")):
        scores = expected[f"score_matrix_{name}"]
        assert torch.equal(found == -100, scores == -100)  # outside the first k; apart, for a typical score is not of that size
        close(found[scores != -100], scores[scores != -100])
    pairs = x["pair_image_idx"].long(), x["pair_text_idx"].long()
    logits = model.match(images[pairs[0]], *(t[pairs[1]] for t in text))
    close(logits, expected["itm_head_logits"])


@needs("qformer_stage1")  # whose weights are used
@each_case("qformer_tasks")
@torch.no_grad()
def test_tasks(case):
    model = Stage1(GOLDEN / "qformer_stage1" / case.name, "hf")
    x, expected = load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    ids, mask, image = x["input_ids"], x["attention_mask"], x["image_embeds"]
    queries, text = model.image(image), model.text(ids, mask)
    close(queries, expected["forward_image"])
    close(text[:, 0], expected["forward_text"])
    pairs = x["pair_image_idx"].long(), x["pair_text_idx"].long()
    multimodal = model.both(image[pairs[0]], ids[pairs[1]], mask[pairs[1]])[:, :model.Q]
    close(model.head("itm_head", multimodal).mean(1), expected["itm_head_logits"])
    close(model.head("itm_head", multimodal).mean(1)[:, 1], expected["compute_itm"].flatten())
    images = F.normalize(model.head("vision_projection", queries), dim=-1)
    texts = F.normalize(model.head("text_projection", text), dim=-1)
    close(images, expected["extract_features_image_proj"])
    close(texts[mask.bool()], expected["extract_features_text_proj"][mask.bool()])
    similarity = (images[pairs[0]] @ texts[pairs[1], 0][..., None]).amax(1)
    close(similarity, expected["itc_head_sim"].view_as(similarity))


@pytest.mark.parametrize("source", ["lavis", "hf"])
@each_case("sprc")
@torch.no_grad()
def test_sprc_passes(case, source):
    model, x, expected = Stage1(case, source), load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    ids, mask = x["input_ids"], x["attention_mask"]
    first = model.both(x["reference_embeds"], ids, mask)
    seen = core.padding_mask(mask, model.Q)
    second = model.qformer(torch.cat([first[:, :model.Q], model.embeddings(ids)], 1), mask=seen)
    real = seen[:, 0, 0] == 0
    close(first[real], expected["fusion_pass_hidden"][real])
    close(second[real], expected["second_pass_hidden"][real])
    feats = F.normalize(model.head("text_projection", second[:, model.Q]), dim=-1)
    close(feats, expected["fusion_feats"])
    target = model.image(x["target_embeds"])
    close(target, expected["target_pass_hidden"])
    close(F.normalize(model.head("vision_projection", target), dim=-1), expected["target_feats"])
    # the prompt pass: [CLS], prompts, rest of the text; positions are added to the whole sequence
    words = model.embeddings.word_embeddings(ids)
    prompts = model.state["prompt_tokens"].expand(len(ids), -1, -1)
    whole = torch.cat([words[:, :1], prompts, words[:, 1:]], 1)
    whole = whole + model.embeddings.position_embeddings(torch.arange(whole.shape[1]))
    out = model.qformer(whole, mask=seen)
    close(out[real], expected["prompt_pass_hidden"][real])
    close(F.normalize(model.head("text_projection", out[:, 0]), dim=-1), expected["text_only_feat"])


def sprc_case(case):
    """train_cir.Sprc without gate and with the case's weights, in eval mode; inputs; expected tensors; expected values."""
    c, state = read(case / "config.json"), load_file(case / "weights_lavis.safetensors")
    config = Blip2Config(vision_config={"hidden_size": c["encoder_width"]}, qformer_config=qformer_config(c).to_dict(),
                         num_query_tokens=c["num_query_tokens"], image_text_hidden_size=c["embed_dim"])
    model = train_cir.Sprc(torch.nn.Identity(), config, None, gate=False).eval()
    model.load_parts(published.qformer_weights(state, text_path=True), case)
    model.prompt_tokens.data.copy_(state["prompt_tokens"])
    return model, load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors"), read(case / "expected.json")


@each_case("sprc")
def test_sprc_losses_and_gradients(case):
    model, x, expected, values = sprc_case(case)
    images = {name: x[f"{name}_embeds"].requires_grad_() for name in ("reference", "target")}
    parts = model(**images, input_ids=x["input_ids"], attention_mask=x["attention_mask"], rtc=0.4, align=0.4)
    for name in ("itc", "rtc", "align"):
        assert parts[name].item() == near(values[f"loss_{name}"])
    assert parts["loss"].item() == near(values["total_loss_rtc0.4_align0.4"])
    parts["loss"].backward()
    own = {**dict(model.named_parameters()), **{f"{name}_embeds": tensor for name, tensor in images.items()}}
    start, checked = "grad_total_rtc0.4_align0.4.", 0
    wanted = {n.removeprefix(start): g for n, g in expected.items() if n.startswith(start)}
    for name, gradient in published.lavis_to_hf(wanted).items():
        close(own[name].grad, gradient, GRADIENT)
        checked += 1
    assert checked >= 10


@each_case("sprc")
@torch.no_grad()
def test_sprc_inference(case):
    model, x, expected, _ = sprc_case(case)
    text = {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
    prompt, query = model.query(x["reference_embeds"], **text)
    features = model.image_features(x["gallery_embeds"])
    close(prompt, expected["fusion_pass_hidden"][:, :prompt.shape[1]])
    close(query, expected["fusion_feats"])
    close(model.prompted(**text), expected["text_only_feat"])
    close(features, expected["gallery_feats"])
    close(torch.from_numpy(galleries.score_gallery(query, features, chunk=4)), expected["inference_sim"])


# --- answers ------------

def read(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def mean(values):
    return sum(values) / len(values)


@needs("vqa_eval")
def test_normalisation():
    cases = read(VQA / "normalisation.json")
    assert cases
    for case in cases:
        assert strip_punctuation(case["raw"]) == case["after_processPunctuation"], case
        assert normalise_answer(case["raw"]) == case["normalised"], case


@needs("vqa_eval")
def test_vqa_accuracy():
    golden = read(VQA / "accuracy.json")
    scores = [100 * vqa_accuracy(q["prediction"], q["answers"]) for q in golden["questions"]]
    for question, score in zip(golden["questions"], scores):
        assert round(score, 2) == question["accuracy_percent_official"], question
    assert round(mean(scores), 2) == golden["official"]["overall"]
    for field, key in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
        for kind, expected in golden["official"][key].items():
            of_kind = [s for q, s in zip(golden["questions"], scores) if q[field] == kind]
            assert round(mean(of_kind), 2) == expected, (key, kind)


@needs("vqa_eval")
def test_artquest():
    golden = read(VQA / "artquest.json")
    items, original = golden["items"], golden["original_code"]
    for item in items:
        answer, prediction = item["answer"], item["prediction"]
        item["em"] = exact_match(prediction, answer)
        item["swapped"], item["usual"] = sentence_bleu(answer, prediction), sentence_bleu(prediction, answer)
        assert item["em"] == item["exact_match"], item
        assert item["swapped"] == pytest.approx(item["bleu"], abs=1e-12), item
        assert item["usual"] == pytest.approx(item["bleu_with_the_arguments_in_the_usual_order"], abs=1e-12), item
    for key, mine in (("em", "em"), ("bleu", "swapped")):
        assert mean([item[mine] for item in items]) == pytest.approx(original[key], abs=1e-12)
    usual = mean([item["usual"] for item in items])
    assert usual == pytest.approx(golden["bleu_with_the_arguments_in_the_usual_order"], abs=1e-12)


@needs("vqa_eval")
def test_artquest_per_type():
    golden = read(VQA / "artquest.json")
    for kind, em in golden["original_code"]["em_per_type"].items():
        pairs = [(i["answer"], i["prediction"]) for i in golden["items"] if i["question_type"] == kind]
        assert mean([exact_match(p, a) for a, p in pairs]) == pytest.approx(em, abs=1e-12), kind
        expected = golden["original_code"]["bleu_per_type"][kind]
        assert mean([sentence_bleu(a, p) for a, p in pairs]) == pytest.approx(expected, abs=1e-12), kind


# --- captions ------------

@each_case("caption_metrics")
def test_bleu_rouge_l_and_cider_d(case):
    items = read(CAPTIONS / f"{case}_inputs.json.gz")
    hypotheses, references = [i["hypothesis"] for i in items], [i["references"] for i in items]
    corpus_golden, item_golden = read(CAPTIONS / f"{case}_corpus.json"), np.load(CAPTIONS / f"{case}_per_item.npz")
    corpus, per_item = bleu(hypotheses, references)
    for k in range(4):
        np.testing.assert_allclose(per_item[k], item_golden[f"Bleu_{k + 1}"], rtol=1e-6, atol=1e-15)
        assert corpus[k] == pytest.approx(corpus_golden[f"Bleu_{k + 1}"], rel=1e-6)
    rouge = [rouge_l(h, r) for h, r in zip(hypotheses, references)]
    np.testing.assert_allclose(rouge, item_golden["ROUGE_L"], rtol=0, atol=1e-6)
    assert mean(rouge) == pytest.approx(corpus_golden["ROUGE_L"], abs=1e-6)
    cider, cider_items = cider_d(hypotheses, references)
    np.testing.assert_allclose(cider_items, item_golden["CIDEr"], rtol=0, atol=1e-6)
    assert cider == pytest.approx(corpus_golden["CIDEr"], abs=1e-6)


@pytest.fixture(scope="module")
def wordnet():
    """Skips where NLTK has no WordNet, in its own places or in ../shared/data/nltk_data."""
    nltk = pytest.importorskip("nltk")
    shared = str(ROOT / "../shared/data/nltk_data")
    nltk.data.path.append(shared)
    metrics._wordnet.cache_clear()
    metrics._meteor_helpers.cache_clear()
    if metrics.meteor_name() != "METEOR":
        pytest.skip("no WordNet (python -m nltk.downloader wordnet)")
    yield
    nltk.data.path.remove(shared)
    metrics._wordnet.cache_clear()
    metrics._meteor_helpers.cache_clear()


@each_case("caption_metrics")
def test_meteor_of_nltk(case, wordnet):
    expected = np.load(CAPTIONS / f"{case}_per_item.npz")["METEOR_nltk"]  # of the first 500
    items = read(CAPTIONS / f"{case}_inputs.json.gz")[:len(expected)]
    found = [meteor(i["hypothesis"], i["references"]) for i in items]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    corpus = read(CAPTIONS / f"{case}_corpus.json")[f"mean_METEOR_nltk_first_{len(expected)}"]
    assert mean(found) == pytest.approx(corpus, abs=1e-6)


@needs("caption_metrics")
@pytest.mark.skipif(not importlib.util.find_spec("pycocoevalcap") or not shutil.which("java"), reason="needs pycocoevalcap, Java")
def test_meteor_1_5():
    name = min(cases("caption_metrics"), key=lambda name: (name != "edge", name))  # the smallest: Java is slow
    items = read(CAPTIONS / f"{name}_inputs.json.gz")
    corpus, per_item = coco_meteor([i["hypothesis"] for i in items], [i["references"] for i in items])
    np.testing.assert_allclose(per_item, np.load(CAPTIONS / f"{name}_per_item.npz")["METEOR_java_1_5"], rtol=0, atol=1e-6)
    assert corpus == pytest.approx(read(CAPTIONS / f"{name}_corpus.json")["METEOR_java_1_5"], abs=1e-6)


@needs("caption_metrics")
def test_bleu_and_cider_d_of_tiny_corpora():
    path = CAPTIONS / "tiny_corpora.json"
    if not path.exists():
        pytest.skip(f"no file {path}")
    edge = {int(item["id"]): item for item in read(CAPTIONS / "edge_inputs.json.gz")}
    for case in read(path):
        items = [edge[i] for i in case["edge_ids"]]
        corpus, per_item = bleu([i["hypothesis"] for i in items], [i["references"] for i in items])
        np.testing.assert_allclose(corpus, case["Bleu"], rtol=1e-6)
        np.testing.assert_allclose(per_item, case["Bleu_per_item"], rtol=1e-6, atol=1e-15)
        cider, cider_items = cider_d([i["hypothesis"] for i in items], [i["references"] for i in items])
        assert cider == pytest.approx(case["CIDEr"], abs=1e-6)
        np.testing.assert_allclose(cider_items, case["CIDEr_per_item"], rtol=0, atol=1e-6)


def raw_pairs():
    """(raw, tokenised) of ptb_pairs and of every corpus that also stores the raw strings."""
    path = CAPTIONS / "ptb_pairs.json.gz"
    if path.exists():
        yield path.name, [(pair["raw"], pair["tokenised"]) for pair in read(path)]
    for name in cases("caption_metrics"):
        items = [i for i in read(CAPTIONS / f"{name}_inputs.json.gz") if "raw_hypothesis" in i]
        yield name, [pair for i in items for pair in zip([i["raw_hypothesis"], *i["raw_references"]],
                                                         [i["hypothesis"], *i["references"]])]


@needs("caption_metrics")
def test_tokenizer_agreement():
    for name, pairs in raw_pairs():
        if pairs:
            agreement = mean([tokenize(raw) == expected for raw, expected in pairs])
            print(f"{name}: {agreement:.4f} of {len(pairs)}")
            wanted = 0.99 if name.startswith("ptb") else 0.95  # small files of made-up oddities may hold more misses
            assert agreement >= wanted, (name, [p for p in pairs if tokenize(p[0]) != p[1]][:5])


# --- BLIP's captioner ------------

def blip_case(case):
    """(BlipForConditionalGeneration, inputs, stored losses) of a case, and the stored outputs."""
    from transformers import BlipConfig, BlipForConditionalGeneration
    config = json.loads((case / "config.json").read_text())
    config = BlipConfig(text_config=config["text_config"], vision_config=config["vision_config"])
    model = BlipForConditionalGeneration(config).eval()
    found = model.load_state_dict(load_file(case / "weights.safetensors"), strict=False)
    tied = {"text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias"}
    assert set(found.missing_keys) <= tied and all("position_ids" in key for key in found.unexpected_keys)
    return model, load_file(case / "inputs.safetensors"), read(case / "expected.json"), load_file(case / "expected.safetensors")


@each_case("blip_captioning")
@torch.no_grad()
def test_blip_losses_of_three_recipes(case):
    model, x, expected, tensors = blip_case(case)
    ids, mask, pixels = x["input_ids"].long(), x["attention_mask"].long(), x["pixel_values"]
    inputs = captioning.decoder_inputs(ids, mask, model.config.text_config.bos_token_id)
    assert torch.equal(inputs["labels"][:, 1:], tensors["labels_masked"].long()[:, 1:])

    def loss(input_ids, labels, smoothing):
        captioning.set_smoothing(model, smoothing)
        return model(pixel_values=pixels, input_ids=input_ids, attention_mask=mask, labels=labels).loss.item()

    close(model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits[mask.bool()], tensors["logits"][mask.bool()])
    assert loss(ids, ids, 0.0) == near(expected["loss_labels_eq_input_ids"])  # pads are targets
    assert loss(ids, inputs["labels"], 0.0) == near(expected["loss_pad_masked"])
    assert loss(inputs["input_ids"], inputs["labels"], 0.0) == near(expected["loss_pad_masked_bos_first"])
    ours = loss(inputs["input_ids"], inputs["labels"], captioning.SMOOTHING)
    assert ours == near(expected["original_salesforce_blip"]["loss"])


@each_case("blip_captioning")
def test_blip_collate_gives_those_inputs(case):
    model, x, _, _ = blip_case(case)
    text, samples = model.config.text_config, []
    for pixels, ids, mask in zip(x["pixel_values"], x["input_ids"].long(), x["attention_mask"].bool()):
        samples.append(({"pixel_values": pixels, "ids": ids[mask].tolist()}, None))
    batch = captioning.Collate(text.pad_token_id, text.bos_token_id)(samples)
    length = x["attention_mask"].sum(1).max()
    expected = captioning.decoder_inputs(x["input_ids"].long(), x["attention_mask"].long(), text.bos_token_id)
    assert all(torch.equal(batch[name], expected[name][:, :length]) for name in expected)


# --- composed image retrieval ------------

@each_case("cirr_metrics")
def test_cirr_recalls(case):
    names, expected = read(case / "names.json"), read(case / "expected.json")
    scores = np.load(case / "inputs.npz")["similarity"]
    column = {name: number for number, name in enumerate(names["gallery_names"])}
    target, reference = ([column[q[what]] for q in names["queries"]] for what in ("target", "reference"))
    members = [[column[name] for name in q["members"]] for q in names["queries"]]
    assert metrics.target_ranks(scores, target, reference).tolist() == expected["target_rank"]
    assert metrics.subset_ranks(scores, target, reference, members).tolist() == expected["target_rank_in_subset"]
    found = metrics.cirr_scores(scores, target, reference, members)
    wanted = {f"R@{k}": expected[f"recall_at{k}"] for k in (1, 5, 10, 50)}
    wanted |= {f"Rs@{k}": expected[f"group_recall_at{k}"] for k in (1, 2, 3)} | {"mean": expected["mean_R@5_and_Rs@1"]}
    assert found == pytest.approx(wanted, abs=1e-4)  # SPRC's are float32
    found, kept = metrics.fashioniq_scores(scores, target), metrics.target_ranks(scores, target)
    assert [found["R@10"], found["R@50"]] == pytest.approx([expected[f"fashioniq_recall_at{k}"] for k in (10, 50)], abs=1e-4)
    for name, recall in expected["if_reference_were_not_removed"].items():
        assert metrics.recall_at(kept, int(name.removeprefix("recall_at"))) == pytest.approx(recall, abs=1e-4)


@each_case("cirr_metrics")
def test_cirr_submission_files(case, tmp_path):
    from data import cirr
    names = read(case / "test_names.json")
    queries = [cirr.Query(str(q["pairid"]), q["reference"], "", ("",), tuple(q["members"]), "", 0) for q in names["queries"]]
    gallery = dict.fromkeys(names["gallery_names"], "")
    cirr.write_submission(tmp_path, queries, gallery, np.load(case / "test_inputs.npz")["similarity"])
    for name in ("recall_submission.json", "recall_subset_submission.json"):
        assert list(read(tmp_path / name).items()) == list(read(case / f"test1_{name}").items())
