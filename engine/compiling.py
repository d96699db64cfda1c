"""compiling.py: the frozen layers of a language model compiled by torch, once for all of them and for any number of tokens."""

import functools
import time

import torch

from engine import packing
from engine.memory import layers_of


def compile_layers(language_model, accelerator, backend="inductor"):
    """torch.compile of each layer in passes without pads (training and the validation loss); answers, which grow token by token, run as
    before. Prints what it costs to start, or, where it cannot be done, why not, and leaves everything as it was."""
    if language_model.config._attn_implementation != packing.NAME:
        accelerator.print("--compile: not for a language model that is trained on padded batches")
        return
    layers, start = layers_of(language_model), time.monotonic()
    before = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer.forward, torch.compile(layer.forward, dynamic=True, backend=backend))
    try:
        _try_out(language_model, accelerator)
    except Exception as error:  # of torch's many parts, and of the compiler behind them
        for layer, forward in zip(layers, before):
            layer.forward = forward
        accelerator.print(f"--compile: goes on uncompiled, {type(error).__name__}: "
                          + " ".join(str(error).split("\n\n")[0].split())[:160])  # behind the first paragraph comes what to set
        return
    accelerator.print(f"--compile: {len(layers)} layers compiled in {time.monotonic() - start:.0f} s")


def _forward(plain, compiled, *args, **kwargs):
    answers = kwargs.get("cache", kwargs.get("past_key_values")) is not None  # their keys are kept, and grow
    return (plain if answers or kwargs.get("packing") is None else compiled)(*args, **kwargs)


def _try_out(language_model, accelerator):
    """A forward and backward pass as in training, and one without gradients as in validation."""
    words = language_model.get_input_embeddings().weight
    for lengths in (23, 14), (17, 31, 11):
        mask = torch.arange(max(lengths), device=words.device) < torch.tensor(lengths, device=words.device)[:, None]  # [B,S]
        embeds = words.new_ones(*mask.shape, words.shape[1]).requires_grad_()  # [B,S,D]
        for grad in (True, False):
            with torch.set_grad_enabled(grad), accelerator.autocast():
                states = packing.Packing.of(mask).run(packing.body_of(language_model), embeds)
            if grad:
                states.float().sum().backward()
