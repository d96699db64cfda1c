"""pytest tests/test_answers.py: answers with the prompt run once.

Reference-checked: generation against plain generate on the same inputs, scores against one forward for each pair, without a cache
and without a pad. Behaviour-checked: what the language model is really asked to run, positions, chunks, the kept cache.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import core
from conftest import BEFORE_5
from data import rows
from engine import captioning, decoders, prompts, published
from engine.errors import DataError

QUESTIONS = ["Which style is this painting?", "How many?", "What colour are the very many boats on the water of this lake?", "Colour?"]
CONTEXTS = ["", "A boat.", "", "Three large red boats lie in the sun, one of them is old."]
ANSWERS = ["red", "Pop Art", "", "three hundred and one boats on the water", "two", "a"]
SEEING = {"gates": {}, "closed": {"gated": False}, "context": {"contexts": CONTEXTS}, "blind": {"blind": True},
          "blind with context": {"blind": True, "contexts": CONTEXTS}}


def decisive(model):
    """Gates that do something, and an output layer of its own whose logits lie far from each other: those of random weights are
    so near that rounding would choose, and repeat one token for ever. The newline is loud, so that answers differ in length."""
    torch.manual_seed(4)
    for gate in model.gates:
        nn.init.normal_(gate.value.weight, std=0.1)
    head = model.language_model.lm_head
    weight = torch.randn(head.weight.shape) * 0.3
    weight[core.newline_id(model.tokenizer)] *= 4
    head.weight = nn.Parameter(weight.to(head.weight.dtype), requires_grad=False)
    return model


@pytest.fixture(scope="module")
def model(tiny):
    """One for all tests, which leave it as it is."""
    torch.manual_seed(1)
    return decisive(core.Blip2OPTGated.build(*tiny, []).eval())


@pytest.fixture(scope="module")
def features(model):
    return pictures(model)


@pytest.fixture
def watch():
    """Function (module, read) -> list that grows by `read(args, kwargs)` of every call of the module."""
    hooks = []

    def start(module, read):
        found = []
        hooks.append(module.register_forward_pre_hook(lambda _, args, kwargs: found.append(read(args, kwargs)), with_kwargs=True))
        return found

    yield start
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def pictures(model):
    return model.image_features(torch.randn(4, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(3)))


@torch.no_grad()
def lm_inputs(model, questions, features, contexts=None, gated=True, blind=False):
    batch = core.encode_prompts(model.tokenizer, questions, contexts)
    visual = model.visual_prompt(**features, input_ids=batch["input_ids"], prompt_mask=batch["attention_mask"], gated=gated, blind=blind)
    return model.decoder.inputs(visual, **batch)


@torch.no_grad()
def plain_generate(model, questions, features, beams, length_penalty=0.0, **seeing):
    """predict_answers as transformers does it alone: the prompt repeated for every beam."""
    ids = model.language_model.generate(
        **lm_inputs(model, questions, features, **seeing), num_beams=beams, do_sample=False, max_new_tokens=model.max_answer,
        min_new_tokens=1, length_penalty=length_penalty if beams > 1 else None, eos_token_id=core.newline_id(model.tokenizer),
        pad_token_id=model.tokenizer.pad_token_id)
    return [text.split("\n")[0].strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def one_by_one(model, question, answer, features, b, contexts=None, **seeing):
    """Log-probabilities of the answer's tokens [n]: one row, the whole of it in one forward, no cache and no pad."""
    alone = lm_inputs(model, [question], row(features, b), contexts and [contexts[b]], **seeing)
    target = torch.tensor(core.answer_ids(model.tokenizer, answer))
    words = model.language_model.get_input_embeddings()(target[None])
    logits = model.language_model(inputs_embeds=torch.cat([alone["inputs_embeds"], words], 1)).logits[0]  # [Q+L+n,V]
    return logits[-len(target) - 1:-1].float().log_softmax(-1)[range(len(target)), target]


def row(features, b):
    return {name: x[b:b + 1] for name, x in features.items()}


def shape(args, kwargs):
    """(rows, positions) of a call of the language model."""
    return tuple(next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None).shape[:2])


def position_ids(args, kwargs):
    return kwargs["position_ids"].clone()


# --- generation ------------

@pytest.mark.parametrize("seeing", SEEING.values(), ids=SEEING)
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_answers_are_those_of_plain_generate(model, features, beams, seeing):
    found = model.predict_answers(None, QUESTIONS, **features, beams=beams, **seeing)
    assert found == plain_generate(model, QUESTIONS, features, beams, **seeing)
    assert len(set(found)) > 1


def test_settings_of_the_search_arrive(model, features, watch):
    found = {penalty: model.predict_answers(None, QUESTIONS, **features, length_penalty=penalty) for penalty in (-4.0, 4.0)}
    assert found[-4.0] != found[4.0]
    assert all(found[p] == plain_generate(model, QUESTIONS, features, 5, p) for p in found)
    calls = watch(model.language_model.model.decoder, shape)
    model.predict_answers(None, QUESTIONS, **features, max_new_tokens=2)
    assert len(calls) == 2  # the prompt, whose last state gives the first token, and the first token


@pytest.mark.parametrize("beams", [1, 5])
def test_trained_model_answers_as_plain_generate(beams):
    torch.manual_seed(1)
    model = core.Blip2OPTGated.build(published.tiny("blip2"), published.tiny("efficientnet-28.pt"), []).eval()
    features = pictures(model)
    found = model.predict_answers(None, QUESTIONS, **features, beams=beams)
    assert found == plain_generate(model, QUESTIONS, features, beams)
    assert found == [model.predict_answers(None, [q], **row(features, b), beams=beams)[0] for b, q in enumerate(QUESTIONS)]


@pytest.mark.parametrize("seeing", SEEING.values(), ids=SEEING)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_question_alone_gets_its_answer_in_the_batch(model, features, beams, seeing):
    together = model.predict_answers(None, QUESTIONS, **features, beams=beams, **seeing)
    for b, question in enumerate(QUESTIONS):
        own = {**seeing, **({"contexts": [CONTEXTS[b]]} if "contexts" in seeing else {})}
        assert model.predict_answers(None, [question], **row(features, b), beams=beams, **own) == [together[b]]


@pytest.mark.parametrize("beams", [1, 4])
def test_prompt_runs_once_and_then_a_token_a_beam(model, features, beams, watch):
    inputs, calls = lm_inputs(model, QUESTIONS, features), watch(model.language_model.model.decoder, shape)
    B, L = inputs["attention_mask"].shape
    model.predict_answers(None, QUESTIONS, **features, beams=beams)
    assert calls[0] == (B, L) and 2 <= len(calls) <= model.max_answer
    assert all(tokens == beams and rows <= before for (rows, tokens), (before, _) in zip(calls[1:], calls)) and calls[-1][0] >= 1
    calls.clear()
    plain_generate(model, QUESTIONS, features, beams)  # the count sees the prompt repeated where it is
    assert calls[0] == (B * beams, L)


def test_positions_count_real_tokens_only(model, features, watch):
    lengths = lm_inputs(model, QUESTIONS, features)["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3
    positions = watch(model.language_model.model.decoder.embed_positions, position_ids)
    model.predict_answers(None, QUESTIONS, **features, beams=3)
    assert positions[0].tolist() == [list(range(lengths.max()))]  # pads are moved behind the prompt, where no token looks
    assert positions[1].tolist() == [[n] * 3 for n in lengths]
    for step, found in enumerate(positions[1:]):  # of those that are left
        assert found.shape[1] == 3 and {row[0] for row in found.tolist()} <= {n + step for n in lengths.tolist()}
        assert all(len(set(row)) == 1 for row in found.tolist())


def test_prompt_of_one_token(model, features, monkeypatch, watch):
    monkeypatch.setattr(prompts, "prompt_ids", lambda tokenizer, *args: [tokenizer.bos_token_id])
    calls = watch(model.language_model.model.decoder, shape)
    found = {beams: model.predict_answers(None, QUESTIONS, **features, blind=True, beams=beams) for beams in (1, 3)}
    scores = model.score_answers(QUESTIONS, ANSWERS, **features, blind=True)
    assert all(0 not in shape for shape in calls)
    assert torch.allclose(scores, all_scores(model, features, blind=True), rtol=1e-5, atol=1e-5)
    assert found[1] == [greedy(model)] * len(QUESTIONS)
    if not BEFORE_5:  # whose generate reads a batch of such prompts wrongly: it is not the greedy one
        assert all(found[beams] == plain_generate(model, QUESTIONS, features, beams, blind=True) for beams in found)


@torch.no_grad()
def greedy(model):
    """The answer to nothing but the first token, with the whole row in each forward."""
    ids = [model.tokenizer.bos_token_id]
    for n in range(model.max_answer):
        words = model.language_model.get_input_embeddings()(torch.tensor([ids]))
        logits = model.language_model(inputs_embeds=words).logits[0, -1].clone()
        if n == 0:
            logits[core.newline_id(model.tokenizer)] = -torch.inf
        ids.append(logits.argmax().item())
        if ids[-1] == core.newline_id(model.tokenizer):
            break
    return model.tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip()


# --- scores ------------

def all_scores(model, features, **seeing):
    return torch.stack([torch.stack([one_by_one(model, q, a, features, b, **seeing).sum() for a in ANSWERS])
                        for b, q in enumerate(QUESTIONS)])


@pytest.mark.parametrize("seeing", SEEING.values(), ids=SEEING)
def test_scores_are_those_of_every_pair_alone(model, features, seeing):
    scores, expected = model.score_answers(QUESTIONS, ANSWERS, **features, **seeing, chunk=5), all_scores(model, features, **seeing)
    assert scores.shape == (4, 6) and scores.dtype == torch.float32
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    picked = model.predict_answers(None, QUESTIONS, **features, method="rank", answers=ANSWERS, **seeing)
    assert picked == [ANSWERS[i] for i in expected.argmax(1)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 23, 24, 1000])
def test_scores_do_not_depend_on_the_chunk(model, features, chunk):
    expected = model.score_answers(QUESTIONS, ANSWERS, **features)
    assert torch.allclose(model.score_answers(QUESTIONS, ANSWERS, **features, chunk=chunk), expected, rtol=1e-5, atol=1e-5)


def test_ranking_runs_the_prompt_once_and_then_answers_alone(model, features, watch):
    inputs, calls = lm_inputs(model, QUESTIONS, features), watch(model.language_model.model.decoder, shape)
    heads = watch(model.language_model.lm_head, lambda args, kwargs: tuple(args[0].shape[:-1]))
    model.score_answers(QUESTIONS, ANSWERS, **features, chunk=4)
    lengths = sorted(len(core.answer_ids(model.tokenizer, a)) for a in ANSWERS)
    assert len(set(lengths)) > 2
    assert calls == [(4, inputs["attention_mask"].shape[1] - 1)] + [(4, n) for n in lengths]  # like lengths share a chunk: no pads
    assert sum(n for n, in heads) == 4 * sum(lengths)


def test_pads_of_an_answer_take_no_position(model, features, watch):
    """A long prompt beside a long answer must not run over the table of positions: together they are no row."""
    real = int(lm_inputs(model, QUESTIONS, features)["attention_mask"].sum(1).max())
    positions = watch(model.language_model.model.decoder.embed_positions, position_ids)
    model.confidence(QUESTIONS, ["two", ANSWERS[3], "two", "two"], **features)
    longest = len(core.answer_ids(model.tokenizer, ANSWERS[3]))
    assert positions[1].shape == (4, longest) and longest > 4
    assert positions[1].max() < real - 1 + longest - 1


def test_kept_cache_stays_as_it_was(model, features, monkeypatch):
    kept, cached = [], decoders.Causal._cached

    def keep(decoder, inputs):
        cache = cached(decoder, inputs)
        kept.append((cache, [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]))
        return cache

    monkeypatch.setattr(decoders.Causal, "_cached", keep)
    model.score_answers(QUESTIONS, ANSWERS, **features, chunk=4)
    (cache, before), = kept
    assert len(before) == model.language_model.config.num_hidden_layers == 2
    assert all(torch.equal(layer.keys, k) and torch.equal(layer.values, v) for layer, (k, v) in zip(cache.layers, before))


# --- confidence ------------

@pytest.mark.parametrize("seeing", SEEING.values(), ids=SEEING)
def test_confidence_is_the_mean_over_the_answers_tokens(model, features, seeing):
    answers = ["red", "", "three hundred and one boats on the water", "Pop Art"]
    expected = torch.stack([one_by_one(model, q, a, features, b, **seeing).mean() for b, (q, a) in enumerate(zip(QUESTIONS, answers))])
    for chunk in (1, 3, 64):
        found = model.confidence(QUESTIONS, answers, **features, **seeing, chunk=chunk)
        assert found.shape == (4,) and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (found < 0).all()


def test_long_answers_are_scored_whole(model, features):
    answers = ["Art " * n + last for n in (62, 63) for last in ("Pop", "Cubism")]
    assert [len(core.answer_ids(model.tokenizer, answer)) for answer in answers] == [64, 64, 65, 65]
    found = model.confidence(QUESTIONS, answers, **features)
    assert torch.allclose(found[2], one_by_one(model, QUESTIONS[2], answers[2], features, 2).mean(), rtol=1e-5)
    scores = model.score_answers(QUESTIONS[:1], answers, **row(features, 0))[0].tolist()
    assert scores[2] != pytest.approx(scores[3], rel=1e-4) and scores[0] != pytest.approx(scores[1], rel=1e-4)



# --- half precision, refusals ------------

def test_half_precision(build):
    model, exact = decisive(build(dtype=torch.bfloat16)), decisive(build())
    features = pictures(model)
    assert len(model.predict_answers(None, QUESTIONS, **features, beams=3)) == 4
    assert len(model.predict_answers(None, QUESTIONS, **features, blind=True, method="rank", answers=ANSWERS)) == 4
    scores, expected = (m.score_answers(QUESTIONS, ANSWERS, **pictures(m)) for m in (model, exact))
    assert scores.dtype == torch.float32 and torch.allclose(scores, expected, rtol=0.1, atol=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(exact.confidence(QUESTIONS, ANSWERS[:4], **pictures(exact))).all()


@pytest.mark.parametrize("beams, precision", [(1, None), (5, None), (5, "nf4"), (5, "int8")])
def test_no_step_and_no_answer_warns(build, batch, beams, precision, no_warning):
    """Neither end of the supported versions of transformers has a word to say about how it is called."""
    if precision and not importlib.util.find_spec("bitsandbytes"):  # importing it is a part of what must not warn
        pytest.skip("needs bitsandbytes")
    model = decisive(build(lm_precision=precision)).train()
    model(**batch, hit_weight=0.1, kl_weight=0.05)["loss"].backward()
    model.eval()
    seen = model.image_features(batch["images"])
    answers = model.predict_answers(None, QUESTIONS[:3], **seen, beams=beams)
    model.score_answers(QUESTIONS[:3], ANSWERS, **seen)
    model.confidence(QUESTIONS[:3], answers, **seen)
    model.predict_answers(batch["images"], QUESTIONS[:3], method="rank", answers=ANSWERS)


def test_refusals(model, features, build):
    with pytest.raises(ValueError, match="generate or rank, got 'beam'"):
        model.predict_answers(None, QUESTIONS, **features, method="beam")
    with pytest.raises(RuntimeError, match="eval"):
        build().train().predict_answers(None, QUESTIONS, **features)


# --- what the functions are given ------------

@pytest.mark.parametrize("method", ["generate", "rank"])
def test_a_single_question_context_or_picture_stands_for_all_others(build, batch, method):
    model, images = decisive(build()), batch["images"]
    more = {"method": method, "answers": ANSWERS if method == "rank" else None}

    def answers(*asked, **also):
        return model.predict_answers(*asked, **more, **also)

    one = answers(images[:1], ["How many?"])
    assert answers(images[:1], "How many?") == one and len(one) == 1
    assert answers(images[:2], "How many?") == answers(images[:2], ["How many?"]) == answers(images[:2], ["How many?"] * 2)
    two = ["How many?", "Which style?"]
    assert answers(images[:1], two) == answers(images[:1].expand(2, -1, -1, -1), two)
    assert answers(images[:2], two, "A boat.") == answers(images[:2], two, ["A boat."] * 2)


def test_what_does_not_go_together_is_one_clear_error(build, batch):
    model, images = build(), batch["images"]
    features = model.image_features(images)
    for asked, wanted in (((images, ["a", "b"]), "3 pictures, 2 questions"), ((images[:2], ["a", "b"], ["c"] * 3), "3 contexts"),
                          (("painting.jpg", "a"), r"processor.*got str"), ((["painting.jpg"], ["a"]), "processor.*got list"),
                          ((images[0], "a"), r"B,3,h,w.*got a tensor \[3, "), ((None, "a"), "got NoneType"),
                          ((images, []), "questions.*at least one"),
                          ((images, None), "questions must be a list"), ((images, [1, 2, 3]), "questions must be a list")):
        with pytest.raises(ValueError, match=wanted):
            model.predict_answers(*asked)
    for answers in ("red", None, [], [3]):
        with pytest.raises(ValueError, match="answers must be a list"):
            model.predict_answers(images, "a", method="rank", answers=answers)
        with pytest.raises(ValueError, match="answers must be a list"):
            model.score_answers(["a"], answers, **features)
    with pytest.raises(ValueError, match="2 answers to 3 questions"):
        model.confidence(["a"], ["x", "y"], **features)
    with pytest.raises(ValueError, match="style_feature"):
        model.predict_answers(None, "a", image_embeds=features["image_embeds"])
    with pytest.raises(ValueError, match="as many of each"):
        model.predict_answers(None, "a", image_embeds=features["image_embeds"], style_feature=features["style_feature"][:2])
    with pytest.raises(ValueError, match="image_embeds must be"):
        model.score_answers(["a"], ["x"], images)


def test_what_would_be_left_out_in_silence_is_refused(model, features):
    images, embeds = torch.randn(1, 3, model.image_size, model.image_size), features["image_embeds"][:1]
    for more in ({"image_embeds": embeds}, {"style_feature": features["style_feature"][:1]}):
        with pytest.raises(ValueError, match="give pictures or what image_features made of them"):
            model.predict_answers(images, "a", **more)
    batch = core.encode_training(model.tokenizer, ["a"], ["b"])
    with pytest.raises(ValueError, match="give pictures or what"):
        model(**batch, images=images, image_embeds=embeds)
    with pytest.raises(ValueError, match='for method="rank"'):
        model.predict_answers(images, "a", answers=ANSWERS)
    with pytest.raises(ValueError, match='of the beams of method="generate"'):
        model.predict_answers(images, "a", method="rank", answers=ANSWERS, best=2)
    wide = torch.zeros(1, 5, embeds.shape[2] + 1)
    with pytest.raises(ValueError, match=rf"image_embeds must be .B,P,{embeds.shape[2]}."):
        model.predict_answers(None, "a", image_embeds=wide, style_feature=features["style_feature"][:1])
    with pytest.raises(ValueError, match=rf"style_feature must be .B,{model.efficientnet.width}.*got a tensor .1, 3."):
        model.predict_answers(None, "a", image_embeds=embeds, style_feature=torch.zeros(1, 3))


@pytest.mark.parametrize("more, wanted", [
    ({"beams": 0}, "beams must be a whole number from 1 on, got 0"), ({"beams": 2.0}, "beams.*got 2.0"), ({"beams": -1}, "beams"),
    ({"max_new_tokens": 0}, "max_new_tokens.*got 0"), ({"max_new_tokens": -3}, "max_new_tokens.*got -3"), ({"best": 0}, "best.*got 0"),
    ({"best": 6}, "best=6 of beams=5"), ({"best": 2, "beams": 1}, "best=2 of beams=1"), ({"batch_size": 0}, "batch_size.*got 0"),
    ({"batch_size": "all"}, "batch_size.*got 'all'")])
def test_settings_of_the_search_that_cannot_be_are_one_clear_error(model, features, more, wanted):
    with pytest.raises(ValueError, match=wanted):
        model.predict_answers(None, QUESTIONS, **features, **more)


def test_no_chunk_is_empty(model, features):
    for ask in (model.score_answers, model.confidence):
        with pytest.raises(ValueError, match="chunk must be a whole number from 1 on, got 0"):
            ask(QUESTIONS, ANSWERS[:4], **features, chunk=0)


def wrong_pixels(size):
    """name -> (what is no batch of pixels in BLIP's normalisation, what the error says)"""
    torch.manual_seed(0)
    whole, nan = torch.randint(0, 256, (2, 3, size, size)), torch.full((1, 3, size, size), torch.nan)
    return {"uint8": (whole.byte(), "got torch.uint8"), "int64": (whole, "got torch.int64"), "0 to 255": (whole.float(), "got values from"),
            "half precision": (whole.half(), "got values from"), "NaN": (nan, "not finite"), "none": (torch.randn(0, 3, 4, 4), "got"),
            "channels last": (torch.randn(1, size, size, 3), rf"got a tensor .1, {size}, {size}, 3.")}


@pytest.mark.parametrize("kind", wrong_pixels(8))
def test_what_is_no_normalised_picture_is_refused_by_all_that_take_pixels(model, kind):
    images, wanted = wrong_pixels(model.image_size)[kind]
    for take in (lambda: model.predict_answers(images, "a"), lambda: model.image_features(images), lambda: model.efficientnet(images),
                 lambda: model.efficientnet(images=images), lambda: core.Blip2Retrieval.image_embeds(None, images),
                 lambda: captioning.confidence(None, None, images, ["a"])):
        with pytest.raises(ValueError, match=f"images must be pixels .*{wanted}"):
            take()


def test_every_normalised_picture_is_taken(model):
    """White, black, and a picture between 0 and 1, which may be a bright one."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (rows.BLIP_MEAN, rows.BLIP_STD))
    one = torch.ones(3, model.image_size, model.image_size)
    pictures = torch.stack([(one - mean) / std, (0 * one - mean) / std, torch.rand_like(one)])
    for dtype in (torch.float32, torch.bfloat16):
        rows.refuse_other_pixels(pictures.to(dtype))
    assert len(model.predict_answers(pictures, "a", beams=1)) == 3


def test_no_picture_is_one_clear_error(model):
    for nothing in ([], ()):
        with pytest.raises(DataError, match="empty list of pictures"):
            core.Processor(model)(nothing)


def test_captions_are_one_for_each_picture():
    for captions in ("a dog", ["a"], []):
        with pytest.raises(ValueError, match="a list of 2 captions is wanted"):
            captioning.confidence(None, None, torch.randn(2, 3, 8, 8), captions)


def test_retrieval_tells_pixels_from_what_the_tower_sees():
    model = SimpleNamespace(qformer=SimpleNamespace(config=SimpleNamespace(encoder_hidden_size=64)))
    for given in (torch.randn(1, 3, 8, 8), torch.randn(1, 5, 32)):
        with pytest.raises(ValueError, match=r"image_embeds must be .B,P,64.*got a tensor .1, "):
            core.Blip2Retrieval.image_features(model, given)
