"""memory.py: what the frozen language model keeps in memory: activations in training, keys and values while it answers.

    save_activations, PackedReLU    training keeps a bit a number, or nothing, in place of OPT's ReLU outputs
    answer_batch                    how many questions are answered together
    cache_rows                      keys and values of a prompt, for each of its given answers

Capitals in shape comments: B prompts, P tokens of a prompt, D width, N numbers.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.errors import DataError

ANSWERS = 64  # questions that are answered together where nothing else is asked for
PROMPT = 160  # tokens of a long prompt with what stands for the picture


# --- activations, in training ------------

class PackedReLU(torch.autograd.Function):
    """ReLU that keeps one bit a number for the backward pass, not its output: the same values and gradients to the bit.

    Of a frozen OPT the ReLU outputs are the largest thing that training keeps: the linear layer behind them, whose weight gets no
    gradient, needs no input."""

    @staticmethod
    def forward(ctx, x):
        """x of any shape with a multiple of 8 numbers."""
        out = F.relu(x)
        bits = (out > 0).view(-1, 8) * _powers(x.device)  # [N/8,8]
        ctx.save_for_backward(bits.sum(-1, dtype=torch.uint8))  # [N/8]
        return out

    @staticmethod
    def backward(ctx, gradient):
        packed, = ctx.saved_tensors
        positive = packed[:, None].bitwise_and(_powers(packed.device)).ne(0)  # [N/8,8]
        return gradient * positive.view_as(gradient)


def _powers(device):
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


class BitReLU(nn.Module):
    """PackedReLU as a module."""

    def forward(self, x):
        return PackedReLU.apply(x)


def layers_of(language_model):
    """The layers of a transformers model, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    return [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def save_activations(language_model, how):
    """How training keeps the activations of a frozen language model: "keep" as they are; "bits": PackedReLU for OPT's; "recompute":
    each layer's input alone, the rest is computed again in the backward pass (Chen et al. 2016). Gradients are the same."""
    for layer in layers_of(language_model) if how != "keep" else ():
        if how == "bits":
            acts = [(parent, name) for parent in layer.modules() for name, _ in parent.named_children() if name.startswith("act")]
            others = {type(getattr(*act)).__name__ for act in acts} - {"ReLU"}
            if others or not acts:
                raise DataError(f"--activations bits is for ReLU, which OPT has; this language model has {', '.join(others) or 'none'}: "
                                "take recompute")
            for parent, name in acts:
                setattr(parent, name, BitReLU())
        elif how == "recompute":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# --- keys and values, while it answers ------------

def answer_batch(wanted, language_model, beams, new_tokens, most=512):
    """Questions that are answered together: `wanted`, or where that is "auto" what fits into three quarters of the memory that is free on
    the model's GPU, `most` at most; on a CPU, where more at once gains nothing, ANSWERS.

    Counted of a question are its keys and values, twice (some of those that are done may stay while the others are copied), its prompt's
    widest layer and the logits of its beams in float32, thrice."""
    if wanted != "auto":
        return wanted
    words = language_model.get_input_embeddings().weight
    if words.device.type != "cuda":
        return ANSWERS
    config = language_model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    keys = 2 * layers * width * (PROMPT + beams * new_tokens) * words.element_size()  # grouped heads take less
    one = 2 * keys + 16 * width * PROMPT * words.element_size() + 3 * 4 * beams * words.shape[0]
    reserved = torch.cuda.memory_reserved(words.device) - torch.cuda.memory_allocated(words.device)
    free = torch.cuda.mem_get_info(words.device)[0] + reserved
    return max(1, min(most, int(0.75 * free) // one))


def cache_rows(cache, rows):
    """Rows of a DynamicCache as a new one; the cache itself stays, since only its layers' tensors are ever replaced."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
