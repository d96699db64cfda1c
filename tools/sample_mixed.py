"""Draw a set in which style must change what is seen, and is not only named: make_sample.py --mixed, in ArtQuest's files.

Every second picture holds two things, its left half in one manner and its right half in another, and is asked twice: "What is
painted in small dots?" (`which`). Who sees both things and no manner is right every second time.
The others are of one manner and hold one to four things of one kind and colour, and are asked "What counts in this painting?"
(`about`): the kind where the paint stands in marks (dots, dabs, strokes, hatching), the colour where it lies in areas. Who sees kind
and colour and no manner, is right every second time as well; and no answer names a style. Their second question, on kind or colour
by turns (`what`, `colour`), is the control: style has no say in it.
"""
import json
import re
from collections import Counter

import numpy as np
from PIL import Image

from tools import drawing
from tools.drawing import (COLOURS, COUNTS, GROUNDS, KINDS, PICTURE_SIZE, SPLITS, STYLES, TECHNIQUES, WORDINGS, draw_scene, fill_scene,
                           make_once, plural, split_pattern, write_csv, write_then_rename)

VERSION = 1  # raise it whenever the same seed would give other pictures or questions
MARKS = ("Pointillism", "Impressionism", "Expressionism", "Northern Renaissance")  # in these the kind counts, in the others the colour
PLACES = ((.26, .57, .21), (.74, .57, .21))  # x, y, radius of the left and of the right thing
NAME = re.compile(r"\d{4,}_(two|one)-[a-z-]+\.jpg")
KINDS_OF_QUESTION = ("which", "about", "what", "colour")
ABOUT = ["What counts in this painting?", "What matters in this painting?"]


def two_things(rng, ground, kinds, colours):
    """Two scenes of the same ground, the left thing in the first and the right one in the second."""
    first = fill_scene(rng, kinds[0], 1, colours[0], ground)
    scenes = []
    for (x, y, radius), kind, colour in zip(PLACES, kinds, colours):
        thing = {**first["things"][0], "x": x + rng.uniform(-.015, .015), "y": y + rng.uniform(-.06, .06),
                 "radius": radius * rng.uniform(.93, 1.04), "flip": bool(rng.random() < .5)}
        scenes.append({**first, "kind": kind, "colour": colour, "things": [thing]})
    return scenes


def draw_halves(scenes, styles, size, seed):
    """The left half of scenes[0] in styles[0] beside the right half of scenes[1] in styles[1]: PIL RGB (size, size)."""
    left, right = (draw_scene(scene, style, size, seed) for scene, style in zip(scenes, styles))
    seam = np.clip((np.arange(size) - size / 2) / (.04 * size) + .5, 0, 1)  # 0 left, 1 right
    mask = Image.fromarray(np.broadcast_to((255 * seam).astype(np.uint8), (size, size)).copy())
    return Image.composite(right, left, mask)


def pairs_of(values, count, rng):
    """`count` ordered pairs of different values, every pair about as often."""
    pairs = [(a, b) for a in values for b in values if a != b]
    return [pairs[i] for start in range(0, count, len(pairs)) for i in rng.permutation(len(pairs))][:count]


def draw_picture(index, row, seed, images):
    """Draw one picture into `images`: returns its CSV rows."""
    rng = np.random.default_rng([seed, 5, index])
    if row["two"]:
        scenes = two_things(rng, row["ground"], row["kinds"], row["colours"])
        picture = draw_halves(scenes, row["styles"], PICTURE_SIZE, int(rng.integers(2 ** 31)))
        name, style = f"{index:04d}_two-{'-'.join(row['kinds'])}.jpg", ""
        asked = [(f"What is painted {TECHNIQUES[style]}?", kind, "which") for style, kind in zip(row["styles"], row["kinds"])]
    else:
        kind, colour, style = row["kinds"][0], row["colours"][0], row["styles"][0]
        scene = fill_scene(rng, kind, list(COUNTS)[rng.integers(len(COUNTS))], colour, row["ground"])
        picture = draw_scene(scene, style, PICTURE_SIZE, int(rng.integers(2 ** 31)))
        name = f"{index:04d}_one-{colour}-{kind}.jpg"
        control, answer = (("what", kind), ("colour", colour))[row["control"]]
        wording = WORDINGS[control][rng.integers(len(WORDINGS[control]))].format(thing=plural(kind))
        asked = [(ABOUT[rng.integers(2)], kind if style in MARKS else colour, "about"), (wording, answer, control)]
    write_then_rename(images / name, lambda p: picture.save(p, "JPEG", quality=86))
    return [[name, *qa, style] for qa in asked]


def design(pictures, seed):
    """A list of dicts split, two, styles, kinds, colours, ground, control."""
    rng, rows = np.random.default_rng([seed, 5]), []
    for two in (True, False):
        count = pictures // 2 if two else pictures - pictures // 2
        drawn = [pairs_of(list(values), count, rng) for values in (STYLES, KINDS, COLOURS)]
        splits = split_pattern(count, rng)
        rows += [{"split": splits[i], "two": two, "styles": drawn[0][i], "kinds": drawn[1][i], "colours": drawn[2][i],
                  "ground": list(GROUNDS)[rng.integers(len(GROUNDS))], "control": i % 2} for i in range(count)]
    return [rows[i] for i in rng.permutation(len(rows))]


def holds_other_data(out):
    """True if `out` holds another drawn set, ArtQuest's own files, or a train.csv whose pictures this script did not name."""
    stamp = out / "sample.json"
    other = stamp.exists() and json.loads(stamp.read_text()).get("set") != "mixed"
    return other or drawing.holds_other_data(out, NAME)


def is_complete(out, stamp):
    """True if the set described by `stamp` is in `out` already."""
    path = out / "sample.json"
    there = path.exists() and all((out / f"{split}.csv").exists() for split in SPLITS)
    return there and json.loads(path.read_text()) == stamp and len(list((out / "images").glob("*.jpg"))) == stamp["pictures"]


def make_set(out, seed, pictures):
    """Draw the whole set into `out`; returns {split: number of pictures}."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows, designed = {split: [] for split in SPLITS}, design(pictures, seed)
    for index, row in enumerate(designed, start=1):
        rows[row["split"]] += draw_picture(index, row, seed, images)
    named = {row[0] for asked in rows.values() for row in asked}
    for path in images.glob("*.jpg"):
        if NAME.fullmatch(path.name) and path.name not in named:
            path.unlink()  # left over from a set with another seed
    for split in SPLITS:
        write_then_rename(out / f"{split}.csv", lambda p: write_csv(p, rows[split]))
    return Counter(row["split"] for row in designed)


def make(out, seed, pictures, refuse):
    """What make_sample.py --mixed does."""
    stamp = {"set": "mixed", "version": VERSION, "seed": seed, "pictures": pictures}
    sizes = make_once(out, stamp, is_complete, holds_other_data, lambda: make_set(out, seed, pictures), refuse)
    if sizes is None:
        return
    print(f"{pictures} pictures ({', '.join(f'{split} {sizes[split]}' for split in SPLITS)}), two questions each, of the types "
          f"{', '.join(KINDS_OF_QUESTION)}.\nOf `which` and `about`, who sees what is there and no manner is right in 50 %.\n"
          f"Pictures: {out / 'images'}\nTables in {out}: {', '.join(f'{split}.csv' for split in SPLITS)}")
