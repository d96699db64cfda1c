"""pytest tests/engine/test_other_decoders.py: causal language models beyond those of test_decoders.py, each with a habit of its own.

Reference-checked: logits of a batch, with pads and without, against each row alone; answers against transformers' own generate of each
question alone; scores of answers against one forward for each. Random small models, no folder.
"""

import pytest
import torch
import transformers
from torch.nn import functional as F

from conftest import BEFORE_5
from engine import decoders, packing
from tests.decoder_kinds import tokenizer_of

SIZES = {"vocab_size": 340, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
KINDS = {
    "gpt2: says that nothing is causal": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 340}),
    "gpt_neo: every other layer looks back a little": ("GPTNeoForCausalLM", {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 340, "window_size": 24,
        "attention_types": [[["global", "local"], 1]]}),
    "mistral: looks back a little": ("MistralForCausalLM", {**SIZES, "num_key_value_heads": 2, "sliding_window": 24}),
    "gemma 3: two kinds of angles, layers by another name": ("Gemma3ForCausalLM", {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "mpt: columns are positions": ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 340, "max_seq_len": 512}),
    "bloom: biases from the mask": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 340}),
    "falcon: biases, though it takes positions": ("FalconForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 340, "alibi": True,
        "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}),
    "nemotron": ("NemotronForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "stablelm": ("StableLmForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "phi": ("PhiForCausalLM", SIZES),
    "xglm": ("XGLMForCausalLM", {"vocab_size": 340, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
                      "max_position_embeddings": 512}),
}
LENGTHS = (9, 4, 13)  # tokens of the prompts
Q, NEW = 3, 12


@pytest.fixture(params=KINDS)
def decoder(request):
    """decoders.Causal on random weights large enough for answers to differ."""
    if BEFORE_5 and request.param in decoders.NEEDS_5:
        pytest.skip("refused before transformers 5")
    name, settings = KINDS[request.param]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    backend, marks = tokenizer_of("opt")
    return decoders.Causal(model, transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks))


def prompts():
    """visual [B,Q,D], then input_ids and attention_mask [B,L] with pads on the left."""
    generator, columns = torch.Generator().manual_seed(5), max(LENGTHS)
    visual = torch.randn(len(LENGTHS), Q, 32, generator=generator)
    ids = torch.randint(4, 340, (len(LENGTHS), columns), generator=generator)
    mask = (torch.arange(columns) >= columns - torch.tensor(LENGTHS)[:, None]).long()
    return visual, ids.where(mask.bool(), torch.tensor(1)), mask


def training():
    """visual and a batch of encode_training: pads on the right, the last three tokens of each row are its answer."""
    visual, ids, mask = prompts()
    order = mask.argsort(dim=1, descending=True, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    place = torch.arange(ids.shape[1])
    answer = (place < mask.sum(1, keepdim=True)) & (place >= mask.sum(1, keepdim=True) - 3)
    return visual, {"input_ids": ids, "attention_mask": mask, "labels": ids.where(answer, torch.tensor(-100))}


@pytest.mark.parametrize("pads", [True, False])
@torch.no_grad()
def test_a_row_s_logits_are_those_of_the_row_alone_and_know_no_later_word(decoder, pads):
    visual, batch = training()
    alone = torch.cat([decoder.answer_logits(visual[b:b + 1], *(batch[name][b:b + 1, :length] for name in (
        "input_ids", "attention_mask", "labels")))[0] for b, length in enumerate(LENGTHS)])
    if not pads:
        packing.pack_samples(decoder.language_model, log=lambda words: None)
    found, _, owner = decoder.answer_logits(visual, **batch)
    assert torch.allclose(found, alone, atol=1e-4, rtol=1e-4)
    batch["input_ids"][range(len(LENGTHS)), [n - 1 for n in LENGTHS]] = 7  # the last word of each, which predicts nothing
    assert torch.equal(decoder.answer_logits(visual, **batch)[0], found) and owner.tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_answers_are_those_of_generate_for_each_question_alone(decoder, beams):
    visual, ids, mask = prompts()
    found = decoder.generate(visual, {"input_ids": ids, "attention_mask": mask}, beams, NEW, 0.0).tolist()
    for b, length in enumerate(LENGTHS):
        embeds = torch.cat([visual[b:b + 1], decoder.language_model.get_input_embeddings()(ids[b:b + 1, -length:])], 1)
        more = {"length_penalty": 0.0} if beams > 1 else {}
        expected = decoder.language_model.generate(
            inputs_embeds=embeds, attention_mask=embeds.new_ones(1, Q + length), num_beams=beams, do_sample=False, max_new_tokens=NEW,
            min_new_tokens=1, eos_token_id=decoders.stop_ids(decoder.tokenizer), pad_token_id=1, **more)[0].tolist()
        assert found[b][:len(expected)] == expected and set(found[b][len(expected):]) <= {1}


@torch.no_grad()
def test_scores_are_those_of_one_forward_each(decoder):
    visual, ids, mask = prompts()
    pairs = [(b, answer) for b in range(len(LENGTHS)) for answer in ([5, 6, 7], [9], [11, 12])]
    found = decoder.log_likelihoods(visual, {"input_ids": ids, "attention_mask": mask}, pairs, chunk=4)
    for score, (b, answer) in zip(found, pairs):
        words = decoder.language_model.get_input_embeddings()(torch.tensor([*ids[b, -LENGTHS[b]:].tolist(), *answer]))
        logits = decoder.language_model(inputs_embeds=torch.cat([visual[b], words])[None]).logits[0, -len(answer) - 1:-1]
        assert score.item() == pytest.approx(-F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item(), rel=1e-4)
