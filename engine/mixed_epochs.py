"""mixed_epochs.py: epochs of caption pairs on disk and of tar files: the steps of both, mixed, and their batches.

    epoch_plan    who sees which pair, and tar files, in which step
    load_epoch    the batches of the steps that are left

pairs: a data.pairs.Captioned; stream: a data.shards.ShardStream, which knows the process. A step is one batch on each process.
"""

import itertools

import numpy as np

from data import shards
from engine import loaders, loop


def tar_steps(stream, batch_size):
    """Optimizer steps of an epoch that read tar files."""
    return shards.steps_per_epoch(stream.shards, batch_size, stream.processes) if stream.shards else 0


def epoch_plan(pairs, stream, batch_size, seed, epoch):
    """The optimizer steps of an epoch as loop.epoch_plan gives them, with one batch each, as many pairs on each process, and those of
    the tar files among them: mixed in an order drawn from seed and epoch. A key is the number of a pair; len(pairs) stands for a
    sample of the tar files."""
    rank, count, tars = stream.rank, stream.processes, len(pairs)
    steps = loop.epoch_plan(tars, batch_size, 1, seed, epoch, rank, count)
    steps = [(group[:len(group) // count * count], [(rank, share[0][1][:len(group) // count])]) for group, share in steps]
    steps += [([tars] * batch_size * count, [(rank, [tars] * batch_size)])] * tar_steps(stream, batch_size)
    return [steps[i] for i in np.random.default_rng([seed, epoch, 1]).permutation(len(steps))]


def load_epoch(pairs, stream, collate, batch_size, epoch, left, workers, skip_broken=False, log=print):
    """This process's batches of the steps of an epoch that are left; tar files are read from the epoch's start to get there."""
    mine = loop.keys_of(left)
    of_tars = [keys[0] == len(pairs) for keys in mine]
    chosen = [[(epoch, n) for n in keys] for keys, of_tar in zip(mine, of_tars) if not of_tar]
    from_pairs = iter(loaders.load_batches(pairs, collate, chosen, workers))
    stream.set_epoch(epoch)
    streamed, steps = loaders.load_stream(stream, shards.packed, batch_size, workers), tar_steps(stream, batch_size)
    from_tars = shards.batches_of(streamed, batch_size, steps, collate, skip_broken, log)
    from_tars = itertools.islice(from_tars, steps - sum(of_tars), None)
    return (next(from_tars if of_tar else from_pairs) for of_tar in of_tars)
