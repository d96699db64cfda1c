"""missing.py: what a training on questions needs and what is not there: lines that say what, and the ways to it. Loads nothing.

    missing_tables        its tables
    missing_classifier    its style classifier (its models: published.missing_model)
    shortest_way          from there to a first training
"""

import os

from data import rows
from engine import published


def missing_tables(data, lacking):
    """[] where no split of --data is `lacking`, else lines: the fault, then the ways to a data set."""
    if not lacking:
        return []
    there = sorted(rows.entries(data))
    fault = f"{data}: no such file or folder"
    if os.path.isdir(data):
        listed = ", ".join(there[:4]) + (f" and {len(there) - 4} more" if len(there) > 4 else "")
        fault = f"{data}: no {' and no '.join(f'{split}.csv' for split in lacking)} in it, only {listed or 'nothing'}"
    ways = ["python tools/make_sample.py draws a small set into data/artquest",
            "--data DIR takes your own: train.csv and val.csv with the columns image, question, answer;",
            "  pictures in DIR/images; other layouts, names and columns: data/README.md"]
    if lacking == ["val"]:
        ways.insert(0, "--data FILE takes the training table alone, of which a tenth is held out for validation")
    return [fault, *ways]


def missing_classifier(given):
    """[] where the style classifier of --efficientnet (None: the default, not tiny's own) is there, else lines as above."""
    place = published.classifier_place(None, given)
    if os.path.isfile(place):
        return []
    return [f"{place}: no such file",
            "--blip2 tiny has its own",
            "python efficientnet_pretrain.py --data wikiart --pretrained trains one; its data: data/README.md",
            "--efficientnet FILE takes one from elsewhere",
            "--gating none trains without gates and needs none"]


def shortest_way(data, blip2, missing):
    """The commands from what is missing, {thing: lines}, to a first training; "" where one of the lines says as much."""
    if set(missing) <= {"data"} or blip2 == "tiny":
        return ""
    data, drawn = ("data/artquest", "python tools/make_sample.py, then ") if "data" in missing else (data, "")
    return f"the shortest way: {drawn}python train_gated.py --data {data} --blip2 tiny"
