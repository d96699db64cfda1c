"""similarity.py: cosines of unit vectors, in float32 under autocast too: rounded to bf16, near scores would tie.

    cosines           einsum of unit vectors
    max_similarity    a vector and the Q vectors of a picture: the largest of their cosines
    no_rounding       the context in which autocast is off
"""

import contextlib

import torch


def max_similarity(vectors, images):
    """vectors [A,E], images [B,Q,E], all of unit length -> cosines [A,B], the largest over the Q queries of an image."""
    return cosines("ae,bqe->abq", vectors, images).amax(-1)


def cosines(equation, *vectors):
    """torch.einsum of unit vectors in float32."""
    with no_rounding(vectors[0].device):
        return torch.einsum(equation, *(x.float() for x in vectors))


def no_rounding(device):
    """Context in which autocast is off. On the meta device, where nothing is computed, there is none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
