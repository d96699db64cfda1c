"""retrieval.py: from the scores of a gallery's pictures (galleries.py) to recalls and to what is known of each query.

    recalls, mean_of    the recalls of a pool, and their mean over pools; chance, chance_text: those of a random order
    format_metrics      such numbers for the terminal
    shortcuts, keep_shortcuts, print_shortcuts    what the sentence alone and the picture alone find, beside both
    rank_queries        of each query the rank and score of its target, and the five best pictures
    write_results, write_report    pools with rank_queries, for a page; for the page of a checkpoint

Scores are cosines [N,G]: a row for each query of a pool, a column for each picture of its gallery.
"""

import json
import os
import pathlib
from dataclasses import asdict, replace

import numpy as np

import metrics
from data import cirr
from engine import environment, files, pages


# --- recalls ------------

def columns(pool):
    """The pool's queries as column numbers of its gallery: target [N], reference [N], members [N,6] (None in FashionIQ)."""
    place = {name: column for column, name in enumerate(pool.gallery)}
    target, reference = (np.array([place[getattr(q, side)] for q in pool.queries]) for side in ("target", "reference"))
    members = np.array([[place[name] for name in q.members] for q in pool.queries]) if pool.queries[0].members else None
    return target, reference, members


def table_of(scores, pool):
    """Scores of a pool as an array [N,G]. ValueError: another number of queries or pictures."""
    scores = np.asarray(scores)
    if scores.shape != (len(pool.queries), len(pool.gallery)) or not len(pool.queries):
        raise ValueError(f"scores {scores.shape} of {len(pool.queries)} queries and {len(pool.gallery)} pictures of {pool.name}: [N,G] is "
                         "wanted, with a query at least")
    return scores


def right_answers(pool):
    """The right answers of CIRCO's queries: [N,G] bool."""
    place = {name: column for column, name in enumerate(pool.gallery)}
    right = np.zeros((len(pool.queries), len(place)), bool)
    for n, query in enumerate(pool.queries):
        right[n, [place[name] for name in query.answers]] = True
    return right


def recalls(scores, pool, layout):
    """The recalls of one pool, in percent. scores: [N,G]; layout: cirr, fashioniq or circo."""
    scores = table_of(scores, pool)
    if layout not in FIRST:
        raise ValueError(f"layout must be one of {', '.join(FIRST)}, got {layout!r}")
    target, reference, members = columns(pool)
    if layout == "circo":
        return metrics.circo_scores(scores, right_answers(pool), target)
    return metrics.cirr_scores(scores, target, reference, members) if layout == "cirr" else metrics.fashioniq_scores(scores, target)


def mean_of(results):
    """Mean of each number over the pools (FashionIQ has three)."""
    return {name: float(np.mean([one[name] for one in results])) for name in results[0]}


def chance(pools, layout):
    """What a random order of the galleries scores, in the form of mean_of."""
    if layout == "circo":
        return mean_of([metrics.circo_chance(len(pool.gallery), [len(query.answers) for query in pool.queries]) for pool in pools])
    return mean_of([metrics.chance_level(len(pool.gallery), cirr.MEMBERS if layout == "cirr" else None) for pool in pools])


def chance_text(pool):
    """chance of one pool in a line."""
    if pool.name == "circo" and not pool.queries[0].answers:
        return "what its server alone knows"
    return format_metrics(chance([pool], pool.name))


def format_metrics(numbers):
    """Numbers for the terminal: recalls with two decimals."""
    return ", ".join(f"{name} {value:.4f}" if name in ("change", "temp") else f"{name} {value:.2f}" for name, value in numbers.items())


# --- shortcuts ------------

ALONE = ("text alone", "picture alone")
FIRST = {"cirr": 1, "fashioniq": 10, "circo": 10}  # a target up to this rank is found


def per_query(scores, pool, layout):
    """The layout's "mean" of each query in percent: (R@5 + Rs@1) / 2 of CIRR, (R@10 + R@50) / 2 of FashionIQ, AP@10 of CIRCO -> [N]."""
    scores = table_of(scores, pool)
    target, reference, members = columns(pool)
    if layout == "circo":
        return metrics.average_precision(scores, right_answers(pool), (10,))[10]
    ranks = metrics.target_ranks(scores, target, None if members is None else reference)
    if members is None:
        return 50.0 * (ranks <= 10) + 50.0 * (ranks <= 50)
    return 50.0 * (ranks <= 5) + 50.0 * (metrics.subset_ranks(scores, target, reference, members) <= 1)


def shortcuts(pool, scores, layout):
    """How much of a pool is found without composing. scores: {"text alone", "picture alone", "both": [N,G]}.

    -> {"rows": one for each of them and one for both on the queries that neither finds alone (rank up to FIRST): {"input", "queries",
    "recalls", "mean": metrics.Estimate over reference pictures, "both minus this": the same in pairs}, "ranks": {input: [N]}}."""
    target, reference, members = columns(pool)
    units, values = [query.reference for query in pool.queries], {name: per_query(table, pool, layout) for name, table in scores.items()}
    ranks = {name: metrics.target_ranks(table, target, None if members is None else reference) for name, table in scores.items()}
    rows = [{"input": name, "queries": len(units), "recalls": recalls(table, pool, layout), "mean": metrics.estimate(values[name], units),
             "both minus this": None if name == "both" else metrics.paired_difference(values["both"], values[name], units)}
            for name, table in scores.items()]
    hard = np.flatnonzero(np.all([ranks[name] > FIRST[layout] for name in ALONE], axis=0))
    if len(hard):
        few = replace(pool, queries=[pool.queries[n] for n in hard])
        rows.append({"input": f"both, of those that neither alone has in the best {FIRST[layout]}", "queries": len(hard),
                     "recalls": recalls(scores["both"][hard], few, layout), "both minus this": None,
                     "mean": metrics.estimate(values["both"][hard], [units[n] for n in hard])})
    return {"rows": rows, "ranks": {name: some.tolist() for name, some in ranks.items()}}


def print_shortcuts(pool, found, log):
    """The rows of shortcuts as a table."""
    names = list(found["rows"][0]["recalls"])[:-1]  # without mean, which has an interval
    width = max(len(row["input"]) for row in found["rows"])
    log(f"shortcuts of {pool.name}, recalls in %; 95 % intervals over reference pictures")
    log(f"{'':{width}}{'queries':>9}" + "".join(f"{name:>8}" for name in names) + f"{'mean':>24}{'both minus this':>24}")
    for row in found["rows"]:
        gap = "" if row["both minus this"] is None else format(row["both minus this"], "+.1f")
        log(f"{row['input']:{width}}{row['queries']:>9}" + "".join(f"{row['recalls'][name]:>8.1f}" for name in names)
            + f"{format(row['mean'], '.1f'):>24}{gap:>24}")


def keep_shortcuts(checkpoint, pools, scores, layout):
    """shortcuts of each pool, kept as shortcuts-LAYOUT.json beside the checkpoint with the rank of every query's target -> what they found.

    scores: of each pool, as galleries.evaluate gives them."""
    def plain(value):
        return value._asdict() if isinstance(value, metrics.Estimate) else value

    found = [shortcuts(pool, one, layout) for pool, one in zip(pools, scores)]
    with files.whole_file(pathlib.Path(checkpoint).with_name(f"shortcuts-{layout}.json")) as file:
        json.dump([{"pool": pool.name, "split": pool.split, "file": pool.file, "queries": [query.pairid for query in pool.queries],
                    "rows": [{name: plain(value) for name, value in row.items()} for row in one["rows"]], "ranks": one["ranks"]}
                   for pool, one in zip(pools, found)], file, indent=1)
    return found


# --- what is known of each query ------------

def rank_queries(pool, scores):
    """scores [N,G] -> N dicts: rank of the target, from 1, subset_rank in its image set (None in FashionIQ), score of the target,
    margin: how far it stands above the best of the others, best: names of the five best pictures.

    In CIRR the reference is left out of every ranking."""
    scores = table_of(scores, pool)
    (target, reference, members), names = columns(pool), list(pool.gallery)
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


def write_report(page, checkpoint, data, pools, scores, panels, figures=(), saw=None):
    """The results of a checkpoint on the validation pools of the folder `data` for the page of --report, with the curves of its training.

    scores: of each pool, as galleries.evaluate gives them; panels: of the curves, see Run; figures: paths, as of write_gate_maps;
    saw: how many of their pictures training saw, in words."""
    log = os.path.abspath(pathlib.Path(checkpoint).with_name("training_log.csv"))
    made = environment.provenance(checkpoint=checkpoint, data=f"{data}, val", **{"pictures that training saw": saw})
    write_results(page, f"{checkpoint}: val", pools, [one["both"] for one in scores], log=log, panels=panels, made=made, figures=figures)
