"""retrieval.py: from the scores of a gallery to recalls, and to what is known of each query.

    recalls, mean_of    the recalls of a pool, and their mean over pools; chance, chance_text: those of a random order
    rank_queries        of each query the rank and score of its target, and the five best pictures
    write_results       pools with rank_queries, for the page of --report

Scores are cosines [N,G]: a row for each query of a pool, a column for each picture of its gallery.
"""

from dataclasses import asdict

import numpy as np

import metrics
from data import cirr
from engine import pages


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
