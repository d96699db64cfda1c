"""gathering.py: the rows of all processes on each of them, with their gradient: a contrast between all pairs of a step needs them.

    gather, gather_text    [B,..] -> [N,..] of all processes in their order; with one process nothing is called
"""

import torch
import torch.nn.functional as F

from engine.prompts import MAX_TEXT


class Gather(torch.autograd.Function):
    """The rows of all processes, in their order; the gradient of every process comes back to the rows' owner."""

    @staticmethod
    def forward(context, rows_here):
        parts = [torch.empty_like(rows_here) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows_here.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        count = len(gradient) // torch.distributed.get_world_size()
        return gradient[torch.distributed.get_rank() * count:][:count]


def is_alone():
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def gather(rows_here):
    """[B,..] -> [N,..]."""
    return rows_here if is_alone() else Gather.apply(rows_here)


def gather_text(ids):
    """gather of [B,L], whose L may differ between processes: padded with 0 to the longest text that there can be."""
    return ids if is_alone() else Gather.apply(F.pad(ids, (0, MAX_TEXT - ids.shape[1])))
