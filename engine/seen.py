"""seen.py: which pictures a training saw: what its best.pt keeps of them, and what every stage's evaluation says.

    digests                            which pictures these are, whatever they are called; each process reads a share
    format_shared                      how many pictures of its own validation a run trains on
    training_overlap, format_overlap   which of the rows that are scored show a picture that training saw
    tell                               both of these, said
"""

from accelerate.utils import gather_object

from data import rows


def digests(accelerator, paths, workers=2):
    """{path: rows.picture_digest} of the distinct paths, on every process. DataError: one is unreadable."""
    mine = list(dict.fromkeys(paths))[accelerator.process_index::accelerator.num_processes]
    return dict(gather_object(list(rows.picture_digests(mine, workers).items())))


def format_shared(train, val):
    """The warning of a run that validates on what it trains on, "" where it does not. train, val: sets of digests."""
    shared = len(train & val)
    return f"{shared} of {len(val)} validation pictures are trained on too, as the same file or a copy of it: what validation scores " \
           "is not of held-out pictures" if shared else ""


def training_overlap(pictures, shown, workers):
    """Of each row: did training see a picture of it? shown: of each row the paths of its pictures. pictures: digests of those of
    training; None where a checkpoint of an earlier version does not say, then so here."""
    if pictures is None:
        return None
    pictures, found = set(pictures), rows.picture_digests((path for paths in shown for path in paths), workers)
    return [any(found[path] in pictures for path in paths) for paths in shown]


def format_overlap(overlap):
    """training_overlap in words."""
    if overlap is None:
        return "unknown, since this checkpoint of an earlier version does not say which pictures were trained on"
    return f"{sum(overlap)} of {len(overlap)} rows" + (": these scores are not of held-out pictures" if any(overlap) else "")


def tell(what, best, shown, workers, log=print):
    """Say of the rows `what` (a split, a pool) how many of them a best.pt was trained on -> their training_overlap."""
    overlap = training_overlap(best.get("pictures"), shown, workers)
    log(f"{what}: pictures that training saw: {format_overlap(overlap)}")
    return overlap
