"""Draw a small data set for composed image retrieval in CIRR's own files: make_sample.py --cirr.

A picture is five properties (kind, count, colour, ground, manner), different for every picture of the set.  Six of them
make an image set: three values of one property by two of another, all else the same and in the same places.  A query is
two pictures of a set and a sentence that says what changes and nothing of what stays: the reference is needed to know
the target, and no other picture fits.
"""
import json
import re
from itertools import permutations, product

import numpy as np

from tools.drawing import (COLOURS, COUNTS, GROUNDS, KINDS, PLACES, STYLES, TECHNIQUES, draw_scene, fill_scene, make_once,
                           plural, write_text, write_then_rename)

VERSION = 1  # raise it whenever the same seed would give other pictures or sentences
SIZE = 112
PROPERTIES = {"count": list(COUNTS), "kind": list(KINDS), "colour": list(COLOURS), "ground": list(GROUNDS),
              "manner": list(STYLES)}  # in the order of a sentence: "them" is about the new count
FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}
QUERIES = {"train": (8, 3), "val": (7, 3), "test1": (7, 3)}  # of a set, with one change and with two
JSON_FILES = ("captions/cap.rc2.{}.json", "image_splits/split.rc2.{}.json")
NAME = re.compile(r"\./(train/\d+|dev|test1)/(train|dev|test1)-\d+-[0-2]-img[01]\.jpg")  # a path as this script writes it
# {it} is it or them, {old} and {new} are values of the property, {diff} says by how much the count changes
WORDINGS = {
    "count": ["show {new} instead of {old}", "change the number from {old} to {new}", "make it {new}", "{diff}"],
    "kind": ["replace the {old_noun} with {new}", "swap the {old_noun} for {new}", "show {new} instead of {old}",
             "draw {new} and not {old}"],
    "colour": ["make {it} {new}", "turn {it} from {old} to {new}", "change the colour to {new}", "let {it} be {new}"],
    "ground": ["move {it} {new}", "put {it} {new}", "show {it} {new}", "set the scene {new}"],
    "manner": ["paint the scene {technique}", "repaint it {technique}", "use the style of {new}", "turn it into {new}"]}
ALONE = {  # more wordings where nothing else changes
    "count": ["{new} instead of {old}", "only the number is {new}"],
    "kind": ["{new} instead of {old}", "the same with {new}"],
    "colour": ["{new} instead of {old}", "the same in {new}"],
    "ground": ["the same {new}", "{new} now"],
    "manner": ["the same {technique}", "the same in the manner of {new}"]}


# ---- sentences

def noun(picture):
    return picture["kind"] if picture["count"] == 1 else plural(picture["kind"])


def things(picture):
    """boats, fish, an apple."""
    article = "" if picture["count"] > 1 else "an " if picture["kind"][0] in "aeiou" else "a "
    return article + noun(picture)


def words_for(name, old, new, rng):
    """The words of WORDINGS for a change of property `name`; old and new are whole pictures."""
    words = {"it": "it" if new["count"] == 1 else "them", "old": old[name], "new": new[name]}
    if name == "count":
        more = new["count"] - old["count"]
        words |= {"old": COUNTS[old["count"]], "new": COUNTS[new["count"]],
                  "diff": f"add {COUNTS[more]} more" if more > 0 else f"take {COUNTS[-more]} away"}
    elif name == "kind":
        words |= {"old": things(old), "new": things(new), "old_noun": noun(old)}
    elif name == "ground":
        words["new"] = PLACES[new["ground"]][rng.integers(3)]
    elif name == "manner":
        words["technique"] = TECHNIQUES[new["manner"]]
    return words


def sentence(old, new, rng):
    """What changes from picture `old` to picture `new`, such as "take one away and turn them from red to blue"."""
    changed, parts = [name for name in PROPERTIES if old[name] != new[name]], []
    for name in changed:
        forms = WORDINGS[name] + (ALONE[name] if len(changed) == 1 else [])
        parts.append(forms[rng.integers(len(forms))].format(**words_for(name, old, new, rng)))
    return " and ".join(parts)


# ---- image sets

def image_set(properties, taken, rng):
    """Six pictures, dicts of PROPERTIES, none in `taken`: three values of properties[0] by two of properties[1]."""
    while True:
        base = {name: values[rng.integers(len(values))] for name, values in PROPERTIES.items()}
        first, second = ([PROPERTIES[name][i] for i in rng.permutation(len(PROPERTIES[name]))] for name in properties)
        pictures = [base | {properties[0]: a, properties[1]: b} for a, b in product(first[:3], second[:2])]
        if not any(tuple(picture.values()) in taken for picture in pictures):
            taken |= {tuple(picture.values()) for picture in pictures}
            return [pictures[i] for i in rng.permutation(6)]


def queries_of(pictures, ones, twos, rng):
    """(reference, target) numbers: `ones` that differ in one property and `twos` that differ in two."""
    pairs = list(permutations(range(6), 2))
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    changes = [sum(pictures[a][name] != pictures[b][name] for name in PROPERTIES) for a, b in pairs]
    return ([pair for pair, count in zip(pairs, changes) if count == 1][:ones]
            + [pair for pair, count in zip(pairs, changes) if count == 2][:twos])


def row_of(pair, split, number, pictures, reference, target, rng):
    """A row of a captions file; pictures: {name: picture} of image set `number`."""
    row = {"pairid": pair, "reference": reference, "target_hard": target, "target_soft": {target: 1.0},
           "caption": sentence(pictures[reference], pictures[target], rng),
           "img_set": {"id": number, "members": list(pictures)}}
    return {key: value for key, value in row.items() if split != "test1" or not key.startswith("target")}


def design(sizes, seed):
    """sizes = {split: image sets} -> {split: ([{name: picture} of a set], [rows of the captions file])}."""
    rng, taken, designed, pair = np.random.default_rng([seed, 2]), set(), {}, 0
    kinds_of_set = list(permutations(PROPERTIES, 2))
    for split, count in sizes.items():
        designed[split] = sets, rows = [], []
        order = rng.permutation(len(kinds_of_set))
        for number in range(count):
            six = image_set(kinds_of_set[order[number % len(order)]], taken, rng)
            names = [f"{FOLDERS[split]}-{number}-{i // 2}-img{i % 2}" for i in range(6)]
            sets.append(dict(zip(names, six)))
            for a, b in queries_of(six, *QUERIES[split], rng):
                pair += 1
                rows.append(row_of(pair, split, number, sets[-1], names[a], names[b], rng))
    return designed


def draw(picture, seed, split, number):
    """A picture of set `number`: the sets' own seeds keep places, sizes and details where they are."""
    draws = [seed, 3, list(FOLDERS).index(split), number]
    scene = fill_scene(np.random.default_rng(draws), picture["kind"], picture["count"], picture["colour"], picture["ground"])
    return draw_scene(scene, picture["manner"], SIZE, int(np.random.default_rng(draws).integers(2 ** 31)))


# ---- the data set

def files(out):
    return [out / name.format(split) for split in FOLDERS for name in JSON_FILES]


def is_ours(names_file):
    """True if this script wrote the split file."""
    try:
        found = json.loads(names_file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and all(NAME.fullmatch(str(path)) for path in found.values())


def holds_other_data(out):
    """True if `out` has files of CIRR that this script did not write. Its captions come after its split files."""
    pairs = [[out / name.format(split) for name in JSON_FILES] for split in FOLDERS]
    return any(not is_ours(names) if names.exists() else captions.exists() for captions, names in pairs)


def is_complete(out, stamp):
    """True if the set described by `stamp` is in `out` already."""
    path = out / "sample.json"
    if not path.exists() or not all(name.exists() for name in files(out)) or json.loads(path.read_text()) != stamp:
        return False
    named = [p for split in FOLDERS for p in json.loads((out / JSON_FILES[1].format(split)).read_text()).values()]
    return all((out / "img_raw" / path).exists() for path in named)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content) + "\n")


def make_set(out, seed, sizes):
    """Draw sizes = {split: image sets} into `out`; returns {split: (pictures, queries)}."""
    drawn, named = {}, set()
    for split, (sets, rows) in design(sizes, seed).items():
        paths = {}
        for number, pictures in enumerate(sets):
            for name, picture in pictures.items():
                paths[name] = f"./train/{number % 10}/{name}.jpg" if split == "train" else f"./{FOLDERS[split]}/{name}.jpg"
                path, image = out / "img_raw" / paths[name], draw(picture, seed, split, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_then_rename(path, lambda p: image.save(p, "JPEG", quality=86))
        shuffled = [list(paths)[i] for i in np.random.default_rng([seed, 4]).permutation(len(paths))]
        write_json(out / JSON_FILES[1].format(split), {name: paths[name] for name in shuffled})  # no set stands together
        write_json(out / JSON_FILES[0].format(split), rows)
        drawn[split] = len(paths), len(rows)
        named |= set(paths.values())
    remove_leftovers(out, named)
    return drawn


def remove_leftovers(out, named):
    """Remove pictures of a set with another seed or size."""
    for path in (out / "img_raw").rglob("*.jpg"):
        relative = f"./{path.relative_to(out / 'img_raw').as_posix()}"
        if NAME.fullmatch(relative) and relative not in named:
            path.unlink()


def make(out, seed, pictures, refuse):
    """What make_sample.py --cirr does; `pictures` in training, a quarter as many in validation, an eighth in test1."""
    sets = pictures // 6
    sizes = {"train": sets, "val": max(1, sets // 4), "test1": max(1, sets // 8)}
    stamp = {"set": "cirr", "version": VERSION, "seed": seed, "pictures": pictures}
    drawn = make_once(out, stamp, is_complete, holds_other_data, lambda: make_set(out, seed, sizes), refuse)
    if drawn is None:
        return
    counts = "; ".join(f"{split} {pictures} pictures, {sizes[split]} image sets, {queries} queries"
                       for split, (pictures, queries) in drawn.items())
    print(f"{counts}.\nPictures: {out / 'img_raw'}\nFiles for each split in {out}: "
          f"{', '.join(name.format('train') for name in JSON_FILES)}")
