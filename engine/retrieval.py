"""retrieval.py: the pictures of a gallery, and from their scores to recalls and to what is known of each query.

    Opener, Gallery, collate_gallery    a path as the model takes it; the pictures of a pool, as batches
    recalls, mean_of    the recalls of a pool, and their mean over pools; chance, chance_text: those of a random order
    rank_queries        of each query the rank and score of its target, and the five best pictures
    write_results       pools with rank_queries, for the page of --report

Scores are cosines [N,G]: a row for each query of a pool, a column for each picture of its gallery.
"""

from dataclasses import asdict

import numpy as np
import torch
from torch.utils.data import Dataset

import metrics
from data import cirr, rows
from engine import pages
from engine.errors import DataError


# --- the pictures of a gallery ------------

class Opener:
    """Path -> picture [3,s,s] as --transform wants it. A class and not a closure: it also works where loaders are spawned."""

    def __init__(self, size, transform, ratio):
        self.size, self.transform, self.ratio = size, transform, ratio

    def __call__(self, path):
        return cirr.prepare(rows.load_image(path), self.size, self.transform, self.ratio)

    def preprocessing(self):
        """What the pixels depend on, for a cache's key."""
        return rows.preprocessing(self.size, f"{self.transform}, {self.ratio}")


class Gallery(Dataset):
    """Number -> (picture [3,s,s], its name), or (the DataError of a broken picture, its name)."""

    def __init__(self, paths, open_picture):
        self.names, self.paths, self.open = list(paths), paths, open_picture

    def __len__(self):
        return len(self.names)

    def __getitem__(self, number):
        name = self.names[number]
        try:
            return self.open(self.paths[name]), name
        except DataError as error:
            return error, name


def collate_gallery(samples):
    """Samples of Gallery -> {"images": [B,3,s,s]}."""
    for found, _ in samples:
        if isinstance(found, DataError):
            return {"fault": str(found)}
    return {"images": torch.stack([image for image, _ in samples])}


# --- recalls ------------


def columns(pool):
    """The pool's queries as column numbers of its gallery: target [N], reference [N], members [N,6] (None in FashionIQ)."""
    place = {name: column for column, name in enumerate(pool.gallery)}
    target, reference = (np.array([place[getattr(q, side)] for q in pool.queries]) for side in ("target", "reference"))
    members = np.array([[place[name] for name in q.members] for q in pool.queries]) if pool.queries[0].members else None
    return target, reference, members


def recalls(scores, pool, layout):
    """The recalls of one pool, in percent. scores: [N,G]; layout: cirr or fashioniq."""
    target, reference, members = columns(pool)
    return metrics.cirr_scores(scores, target, reference, members) if layout == "cirr" else metrics.fashioniq_scores(scores, target)


def mean_of(results):
    """Mean of each number over the pools (FashionIQ has three)."""
    return {name: float(np.mean([one[name] for one in results])) for name in results[0]}


def chance(pools, layout):
    """What a random order of the galleries scores, in the form of mean_of."""
    return mean_of([metrics.chance_level(len(pool.gallery), cirr.MEMBERS if layout == "cirr" else None) for pool in pools])


def chance_text(pool):
    """chance of one pool in a line."""
    return ", ".join(f"{name} {value:.2f}" for name, value in chance([pool], pool.name).items())


def rank_queries(pool, scores):
    """scores [N,G] -> N dicts: rank of the target, from 1, subset_rank in its image set (None in FashionIQ), score of the target,
    margin: how far it stands above the best of the others, best: names of the five best pictures.

    In CIRR the reference is left out of every ranking."""
    (target, reference, members), scores, names = columns(pool), np.asarray(scores), list(pool.gallery)
    ranks = metrics.target_ranks(scores, target, None if members is None else reference)
    inner = None if members is None else metrics.subset_ranks(scores, target, reference, members)
    results = []
    for n, query in enumerate(pool.queries):
        others = scores[n].copy()
        others[[target[n]] + ([] if members is None else [reference[n]])] = -np.inf
        best = [name for name in next(cirr.ranking(scores[[n]], names)) if members is None or name != query.reference][:5]
        results.append({"rank": int(ranks[n]), "subset_rank": None if inner is None else int(inner[n]), "best": best,
                        "score": float(scores[n, target[n]]), "margin": float(np.nan_to_num(scores[n, target[n]] - others.max()))})
    return results


def write_results(page, title, pools, scores, **content):
    """The results of the pools for a page, see pages.write_results. scores: [N,G] of each pool."""
    return pages.write_results(page, "retrieval", title, **content, pools=[
        {"name": pool.name, "split": pool.split, "file": pool.file, "gallery": pool.gallery,
         "queries": [asdict(query) for query in pool.queries], "results": rank_queries(pool, table)}
        for pool, table in zip(pools, scores)])
