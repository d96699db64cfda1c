"""answering.py against transformers' own generate, token by token: every kind of language model, ragged prompts, answers that end at
different steps. test_answers.py and test_decoders.py look at the answers as texts."""

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from engine import answering, decoders, packing, prompts, published
from engine.errors import DataError
from tests import decoder_kinds
from tests.decoder_kinds import KINDS

NEW = 8
QUESTIONS = ["What style is this painting?", "How many?", "What colour are the very many boats on the water?", "Colour?", "Pop Art?",
             "How many boats are old, how many are large, and how many are red?"]


@pytest.fixture(scope="module", params=KINDS)
def asked(request, tmp_path_factory):
    """(Decoder of a random model whose ends are loud, visual [6,4,D], prompts of ragged lengths)."""
    folder = decoder_kinds.make_folder(request.param, tmp_path_factory.mktemp("kinds") / request.param)
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval().language_model
    decoder = decoders.decoder_of(model, published.load_tokenizer(folder))
    head, ends = model.get_output_embeddings(), prompts.stop_ids(decoder.tokenizer)
    quiet = head.weight.detach().clone()
    torch.manual_seed(5)
    visual = torch.randn(len(QUESTIONS), 4, decoder_kinds.W)
    batch = prompts.encode_prompts(decoder.tokenizer, QUESTIONS, left=decoder.left)
    for loud in (1.5, 2, 2.5, 4, 6, 10, 20):  # until the texts end at different steps; how loud that is depends on random weights
        head.weight = nn.Parameter(quiet.clone(), requires_grad=False)
        head.weight[ends] *= loud
        if all(len({len(ids) for ids in plain(decoder, visual, batch, beams)}) > 1 for beams in (1, 3)):
            return decoder, visual, batch
    raise AssertionError("no loudness of the ends makes the texts end at different steps")


@torch.no_grad()
def plain(decoder, visual, batch, beams, best=1, length_penalty=0.0):
    """New ids of transformers' generate, each question for itself -> lists without pads."""
    found = []
    for b in range(len(visual)):
        real = batch["attention_mask"][b].bool()
        inputs = decoder.inputs(visual[b:b + 1], batch["input_ids"][b:b + 1, real], batch["attention_mask"][b:b + 1, real])
        ids = decoder.language_model.generate(
            **inputs, num_beams=beams, num_return_sequences=best, do_sample=False, max_new_tokens=NEW, min_new_tokens=1,
            eos_token_id=prompts.stop_ids(decoder.tokenizer), pad_token_id=decoder.tokenizer.pad_token_id,
            **({"length_penalty": length_penalty} if beams > 1 else {}))
        found += without_pads(decoder, ids[:, 1:] if not decoder.left else ids)
    return found


def without_pads(decoder, ids):
    """Up to the first end."""
    ends = prompts.stop_ids(decoder.tokenizer)
    return [row[:next((n + 1 for n, i in enumerate(row) if i in ends), len(row))] for row in ids.tolist()]


def ours(decoder, visual, batch, beams, best=1, length_penalty=0.0):
    with torch.no_grad():
        return without_pads(decoder, decoder.generate(visual, batch, beams, NEW, length_penalty, best))


@pytest.fixture(params=[False, True], ids=["padded", "without pads"])
def packed(request, asked):
    """Do the prompts run without pads?"""
    if request.param:
        packing.pack_samples(asked[0].language_model)
    yield request.param
    asked[0].language_model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("beams, best, penalty", [(1, 1, 0.0), (3, 1, 0.0), (3, 2, 1.0), (3, 1, -1.0)])
def test_every_token_is_that_of_generate(asked, monkeypatch, beams, best, penalty, packed):
    """Whether rows leave one by one, by halves, or not at all."""
    expected = plain(*asked, beams, best, penalty)
    for share in (0.01, 0.5, 2.0):
        monkeypatch.setattr(answering, "LEAVE", share)
        assert ours(*asked, beams, best, penalty) == expected


def watched(monkeypatch, state):
    """Rows of every step of a Tree or Rows."""
    rows, step = [], state.step
    monkeypatch.setattr(state, "step", lambda self, tokens: rows.append(len(tokens)) or step(self, tokens))
    return rows


def test_who_is_done_is_asked_no_more(asked, monkeypatch):
    """One beam: a question is asked until its text ends. With beams it is done when no running one can win, which depends on the random
    weights: test_every_token_is_that_of_generate sees that whoever leaves has the right text."""
    decoder, visual, batch = asked
    monkeypatch.setattr(answering, "LEAVE", 0.01)
    rows = watched(monkeypatch, answering.Tree if decoder.left else answering.Rows)
    lengths = [len(ids) for ids in ours(*asked, 1)]
    assert rows == [sum(length > n for length in lengths) for n in range(1, max(lengths))] and rows[-1] < len(QUESTIONS)


@pytest.mark.parametrize("beams", [1, 3])
def test_all_done_at_once_ends_the_search(asked, monkeypatch, beams):
    decoder, visual, batch = asked
    ends = prompts.stop_ids(decoder.tokenizer)[:1]

    def louder(head, args, logits):
        logits[..., ends] += 100
        return logits

    hook = decoder.language_model.get_output_embeddings().register_forward_hook(louder)
    rows = watched(monkeypatch, answering.Tree if decoder.left else answering.Rows)
    found, expected = ours(*asked, beams), plain(*asked, beams)
    hook.remove()
    assert found == expected and rows == [6] and {len(ids) for ids in found} == {2}


def test_beams_share_the_keys_of_their_prompt(asked):
    decoder, visual, batch = asked
    if not decoder.left:
        pytest.skip("an encoder-decoder has a row a beam")
    state = answering.Tree(decoder, decoder.inputs(visual, **batch), 3, NEW)
    with torch.no_grad():
        state.start()
        length = visual.shape[1] + batch["input_ids"].shape[1]
        shapes = []
        for _ in range(2):
            state.choose(torch.zeros(6, 3, dtype=torch.long))
            state.step(torch.full((6, 3), 5))
            shapes += [layer.keys.shape for layer in state.cache.layers]
    assert {(shape[0], shape[2]) for shape in shapes} == {(6, length + 3 * (NEW - 1))}  # of every step the same


class Held:
    """answering.Recording without a GPU: it computes where its inputs lay when it was made, whatever it is called with."""

    def __init__(self, function, inputs):
        self.function, self.inputs, Held.made = function, inputs, Held.made + 1
        self.output = function(*inputs)

    def __call__(self, *inputs):
        for held, x in zip(self.inputs, inputs):
            held.copy_(x)
        self.output.copy_(self.function(*self.inputs))
        return self.output


@pytest.mark.parametrize("beams", [1, 3])
def test_recorded_steps_give_the_same_tokens(asked, monkeypatch, beams):
    """The second batch runs on what the first recorded, prompts of other lengths among them; another size records anew."""
    decoder, visual, batch = asked
    if not decoder.left:
        pytest.skip("an encoder-decoder's steps are not recorded")
    monkeypatch.setattr(answering, "Recording", Held)
    monkeypatch.setattr(decoder.language_model, "recorded_steps", {}, raising=False)
    Held.made = 0
    other = {name: x.roll(1, 0) for name, x in batch.items()}
    expected = {"first": ours(decoder, visual, batch, beams), "second": ours(decoder, visual, other, beams)}
    assert Held.made == 1
    few = ours(decoder, visual[:2], {name: x[:2] for name, x in batch.items()}, beams)
    assert Held.made == 2 and len(decoder.language_model.recorded_steps) == 1
    monkeypatch.undo()
    assert expected["first"] == ours(decoder, visual, batch, beams) and few == expected["first"][:2]
    assert expected["second"] == ours(decoder, visual, other, beams) != expected["first"]


def test_steps_are_recorded_on_a_gpu_alone(asked):
    with pytest.raises(DataError, match="leave it out"):
        answering.record_steps(asked[0].language_model)


def test_a_model_that_counts_positions_itself_answers_by_generate(tmp_path):
    """Bloom: its attention takes a key's place for its position."""
    from transformers import BloomConfig, BloomForCausalLM
    folder = decoder_kinds.make_folder("opt", tmp_path / "opt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=decoder_kinds.W, n_layer=2, n_head=4, pad_token_id=tokenizer.pad_token_id)
    decoder = decoders.decoder_of(BloomForCausalLM(config).eval(), tokenizer)
    batch, visual = prompts.encode_prompts(tokenizer, QUESTIONS), torch.randn(6, 4, decoder_kinds.W)
    assert ours(decoder, visual, batch, 3) == plain(decoder, visual, batch, 3)
