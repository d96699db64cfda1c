"""packing.py: a frozen language model on the real tokens of a batch alone, laid end to end in one row: no pad is computed or kept.

    pack_samples       makes a language model run so, where it can
    Packing            where the real tokens of a padded batch stand: to the row, and back
    body_of            its layers without the word head
    packed_attention   the only part in which tokens meet: here each sample is by itself

Linear layers, norms and activations take a token at a time and need no samples.

Capitals in shape comments: B samples, S tokens of the longest of them, T real tokens of all, D width.
"""

import inspect
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from engine.errors import DataError, said

NAME = "packed"  # among transformers' kinds of attention; language_model.set_attn_implementation("sdpa") gives the padded pass back


class Gather(torch.autograd.Function):
    """x [N,...] -> its rows at `places` [T], each of which is another. torch's own backward pass would add up where nothing meets."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.N = len(x)
        ctx.save_for_backward(places)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient):
        return Scatter.apply(gradient, *ctx.saved_tensors, ctx.N), None


class Scatter(torch.autograd.Function):
    """x [T,...] -> [N,...] with these rows at `places`, zeros elsewhere. torch's own would keep x."""

    @staticmethod
    def forward(ctx, x, places, N):
        ctx.save_for_backward(places)
        return x.new_zeros(N, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx, gradient):
        return Gather.apply(gradient, *ctx.saved_tensors), None, None


class Packing(NamedTuple):
    """Where the T real tokens of a padded batch [B,S] stand."""
    places: torch.Tensor  # [T], in the flattened batch
    B: int
    S: int

    @classmethod
    def of(cls, mask):
        """mask [B,S], 1 = real, pads on the right."""
        return cls(mask.flatten().nonzero()[:, 0], *mask.shape)

    def pack(self, x):
        """x [B,S,...] -> [1,T,...]."""
        return Gather.apply(x.flatten(0, 1), self.places)[None]

    def unpack(self, x):
        """x [1,T,...] -> [B,S,...], zeros where pads stand."""
        return Scatter.apply(x[0], self.places, self.B * self.S).unflatten(0, (self.B, self.S))

    def run(self, body, embeds, **cache):
        """The layers of a language model on its real tokens: embeds [B,S,D] -> states [B,S,D], zeros where pads stand. cache: by the name
        that the model has for it; it gets keys and values of one row, [1,heads,T,D/heads]."""
        states = body(inputs_embeds=self.pack(embeds), position_ids=self.places[None] % self.S, use_cache=False, packing=self, **cache,
                      attention_mask=embeds.new_empty(1, 1, 0, 0))  # of four axes: taken as it is, else a mask [T,T] would be made
        return self.unpack(states.last_hidden_state)


def packed_attention(module, query, key, value, attention_mask, packing=None, **kwargs):
    """An attention function of transformers: causal SDPA, of a Packing's row for each sample by itself. Without one it is SDPA.

    query [1,heads,T,D/heads], key and value too, maybe of fewer heads -> [1,T,heads,D/heads]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if (kwargs.get("sliding_window") or packing.S) < packing.S:
        raise DataError(f"texts of {packing.S} tokens, of which the language model looks back {kwargs['sliding_window']} only: this is not "
                        "built in here")

    def attend(*rows):
        apart = (packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in rows)  # [B,heads,S,D/heads]
        # causal whatever the model says: it may believe in the mask that Packing.run gave it (GPT-2 before transformers 5)
        return packing.pack(sdpa_attention_forward(module, *apart, None, **{**kwargs, "is_causal": True})[0])

    if not (saves_memory(query) and torch.is_grad_enabled()):
        return attend(query, key, value), None
    return checkpoint(attend, query, key, value, use_reentrant=False, preserve_rng_state=False), None


def body_of(language_model):
    """The layers of a causal language model without its word head."""
    body = language_model.base_model
    return language_model.get_decoder() if body is language_model else body  # Gemma 3 before transformers 5


def saves_memory(x):
    """Are the rows alone to be kept for the backward pass, and SDPA to run again there? It would keep all pads, and its output too.
    On a GPU, where memory is short and attention 0.4 % of a step; on a CPU it is more."""
    return x.is_cuda


def pack_samples(language_model, log=print):
    """Make a language model run without pads in training; where it cannot, say why, and leave it as it is."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    if why := _needs_pads(language_model):
        log(f"{language_model.config.model_type} is trained on padded batches: {why}")
        return
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation(NAME)
    try:
        _try_out(language_model)
    except Exception as error:  # whatever another model's own code makes of a mask that is none
        language_model.set_attn_implementation(before)
        log(f"{language_model.config.model_type} is trained on padded batches: {said(error)}")


@torch.no_grad()
def _try_out(language_model):
    """A pass over two samples of two tokens and one."""
    words = language_model.get_input_embeddings().weight
    mask = torch.tensor([[1, 1], [1, 0]], device=words.device)
    Packing.of(mask).run(body_of(language_model), words[:1].expand(2, 2, -1))


def _needs_pads(language_model):
    """Why a language model cannot run without pads, None where it can."""
    config = language_model.config
    if config.is_encoder_decoder:
        return "an encoder-decoder, whose attention has biases of its own"
    if not language_model._supports_attention_backend or config._attn_implementation not in ("sdpa", NAME):
        return "its attention cannot be replaced"
    if "position_ids" not in inspect.signature(type(body_of(language_model)).forward).parameters:
        return "it counts positions by itself"
    if language_model._is_stateful or set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return "its tokens meet outside of attention too"
    return None
