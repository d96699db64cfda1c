"""retrieval.py: the pictures of a gallery, and from their scores to recalls and to what is known of each query.

    Opener, Gallery, collate_gallery    a path as the model takes it; the pictures of a pool, as batches
    recalls, mean_of    the recalls of a pool, and their mean over pools; chance, chance_text: those of a random order
    shortcuts, print_shortcuts    what the sentence alone and the picture alone find, beside both
    rerank              the best by cosine, scored once more by matching
    rank_queries        of each query the rank and score of its target, and the five best pictures
    write_results       pools with rank_queries, for the page of --report

Scores are cosines [N,G]: a row for each query of a pool, a column for each picture of its gallery.
"""

import json
from dataclasses import asdict, replace

import numpy as np
import torch
from torch.utils.data import Dataset

import metrics
from data import cirr, rows
from engine import files, pages
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


def right_answers(pool):
    """The right answers of CIRCO's queries: [N,G] bool."""
    place = {name: column for column, name in enumerate(pool.gallery)}
    right = np.zeros((len(pool.queries), len(place)), bool)
    for n, query in enumerate(pool.queries):
        right[n, [place[name] for name in query.answers]] = True
    return right


def recalls(scores, pool, layout):
    """The recalls of one pool, in percent. scores: [N,G]; layout: cirr, fashioniq or circo."""
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
    return ", ".join(f"{name} {value:.2f}" for name, value in chance([pool], pool.name).items())


# --- shortcuts ------------

ALONE = ("text alone", "picture alone")
FIRST = {"cirr": 1, "fashioniq": 10, "circo": 10}  # a target up to this rank is found


def per_query(scores, pool, layout):
    """The layout's "mean" of each query in percent: (R@5 + Rs@1) / 2 of CIRR, (R@10 + R@50) / 2 of FashionIQ, AP@10 of CIRCO -> [N]."""
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


def write_shortcuts(path, pools, found):
    """What shortcuts found of each pool as JSON, with the rank of every query's target."""
    def plain(value):
        return value._asdict() if isinstance(value, metrics.Estimate) else value

    with files.whole_file(path) as file:
        json.dump([{"pool": pool.name, "split": pool.split, "file": pool.file, "queries": [query.pairid for query in pool.queries],
                    "rows": [{name: plain(value) for name, value in row.items()} for row in one["rows"]], "ranks": one["ranks"]}
                   for pool, one in zip(pools, found)], file, indent=1)


# --- the second of two steps ------------

@torch.no_grad()
def rerank(model, cosines, images, input_ids, attention_mask, k, chunk=64):
    """LAVIS's two-step retrieval: the k best by cosine are scored by ITM's "yes" + cosine, all others -100.

    cosines [T,G] of T texts and G images, on the CPU; images [G,P,W], text [T,L], `chunk` pairs at a time -> (scores [T,G] for
    finding the image of a text, scores [G,T] for finding the text of an image).
    """
    tables = []
    for by_text, table in ((True, cosines), (False, cosines.T)):
        best = table.topk(min(k, table.shape[1]), dim=1).indices  # [rows,k]
        row = torch.arange(len(table), device=best.device).repeat_interleave(best.shape[1])
        text, image = (row, best.flatten()) if by_text else (best.flatten(), row)
        scores = torch.full_like(table, -100.0)
        for t, i, r, c in zip(text.split(chunk), image.split(chunk), row.split(chunk), best.flatten().split(chunk)):
            yes = model.match(images[i].to(input_ids.device).float(), input_ids[t], attention_mask[t])[:, 1]
            scores[r, c] = yes.float().cpu() + table[r, c]
        tables.append(scores)
    return tables


# --- what is known of each query ------------

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
