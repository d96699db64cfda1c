"""pairs.py: pictures and captions of any number of sets, a row for each caption, as BLIP-2's first stage learns from them.

    named_places          --data NAME=PLACE ... -> {name: place}
    read_set, read_sets   the Pairs of a split of one set, of all; DataError for what cannot be used
    image_number          what is the same for all captions of a picture and for no other picture
    train_view            a picture cropped, mirrored and, in LAVIS's stronger form, turned and sheared
    Captioned             the Pairs as a data set of pictures
    check                 what --check-data prints

A PLACE is a folder with one file of captions for each split, in it or in annotations/ (captions.files_of), or one file, which is a
training set unless it names its splits. Layouts: captions.read_entries. Sets of tar files: shards.py.
Bad input raises DataError, whose text is one line that says what to do about it.
"""

import hashlib
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from data import captions, rows
from data.captions import LEFT_RIGHT
from data.cirr import clean_text
from data.tables import locate, excerpt
from engine.errors import DataError
from engine.text import unit_of, words_of

FILES = {split: captions.file_names(split) for split in ("train", "val")}
LISTED = 20  # faults that --check-data and --skip-bad name one by one
GREY = (128, 128, 128)  # what a turned picture leaves open
# LAVIS's ten for Visual Genome, two at a time, each applied every second time, at magnitude 5 of 10: shear by 0.15, shift by 5
# pixels, turn by 15 degrees. At 5 its Brightness and Sharpness multiply by 1, so that they leave a picture as it is.
OPERATIONS = ("Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize", "ShearX", "ShearY", "TranslateX",
              "TranslateY", "Rotate")


@dataclass(frozen=True, slots=True)
class Pair:
    """One caption of one picture; `fault` says why it cannot be used ("" if it can)."""
    image: str  # absolute path, "" where it was not found and in a tar file
    name: str  # as the file has it
    text: str  # the caption, cleaned
    image_id: int  # the same for all captions of a picture and for no other picture, over all sets: image_number
    source: str  # name of the set
    file: str
    line: int  # number of the row in the file, from 1
    fault: str = ""

    @property
    def strong(self):
        """Whether train_view is the stronger one, as LAVIS has it for Visual Genome: in a set that is named vg."""
        return self.source == "vg"


# --- one set ------------

def named_places(specs):
    """["NAME=PLACE", ...] -> {name: place}. DataError: another form, a name twice."""
    places = {}
    for spec in specs:
        name, equals, place = str(spec).partition("=")  # a config file may hold a number
        if not (name and equals and place):
            raise DataError(f"--data {spec}: give NAME=PLACE, such as coco=data/coco")
        if name in places:
            raise DataError(f"--data: {name} stands for {places[name]} and {place}: give each set a name of its own")
        places[name] = place
    return places


def split_file(place, split):
    """The file of a split, "" where a set has no validation file. DataError: no such place, no training file, several."""
    if os.path.isfile(place):
        return place if split == "train" or captions.names_splits(place) else ""
    if not os.path.isdir(place):
        raise DataError(f"{place}: there is no such file or folder: check --data; python tools/make_sample.py draws a set for "
                        "--data drawn=data/artquest")
    found = captions.files_of(place, split)
    if len(found) > 1:
        raise DataError(f"{place}: {' and '.join(found)} are both there: give each set a folder or pass the files themselves")
    if not found and split == "train":
        there = excerpt(", ".join(sorted(rows.entries(place))[:10]) or "nothing", 300)
        raise DataError(f"{place}: none of {', '.join((*FILES[split], *captions.WHOLE))} is there; it holds {there}: check --data")
    return found[0] if found and not (split == "val" and captions.is_whole(place, found[0])) else ""


def is_absolute(name):
    return re.match(r"[\\/]|[A-Za-z]:[\\/]", name) is not None


def find_image(root, name, listings, nearest, suffixes=()):
    """rows.find_picture; a place on another disk is looked for under the root, its leading folders dropped."""
    if not is_absolute(name):
        return rows.find_picture(root, name, listings, nearest, suffixes)
    return rows.find_picture(root, re.sub(r"^([A-Za-z]:)?[\\/]+", "", name), listings, nearest, suffixes)


def find_images(names, root):
    """{name: (absolute path, "") or ("", why there is none)} of the pictures under `root`."""
    found = rows.find_pictures(names, root, find=find_image)
    return {name: (path, fault) if fault or os.path.getsize(path) else ("", f"image {excerpt(name)} has 0 bytes")
            for name, (path, fault) in found.items()}


def image_number(text):
    """A whole number of 63 bits for a picture's path: two pictures in a billion share one with probability 0.05."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "big") >> 1


def first_pictures(found, count):
    """The image_id of `count` of the pictures of Pairs, and their order: by a hash of set and name, so the same wherever the data lies."""
    order = {pair.image_id: image_number(f"{pair.source}\0{pair.name}") for pair in reversed(found)}
    return sorted(order, key=order.get)[:count]


def read_set(name, place, split, images=None, encoding="utf-8", log=print):
    """The Pairs of a split, those that cannot be used with their fault; [] where the set has no validation file.

    DataError: as split_file and captions.read_entries, no image root."""
    path = split_file(place, split)
    if not path:
        return []
    form, entries = captions.read_entries(path, encoding, split)
    root = captions.image_root(place, path, images, entries[0].name)
    names = dict.fromkeys(one.name for one in entries)
    found = find_images(names, root)
    numbers = {picture: image_number(image or picture) for picture, (image, _) in found.items()}
    pairs = []
    for one in entries:
        image, fault = found[one.name]
        for text in map(clean_text, one.captions):
            empty = "" if text else "empty caption"
            pairs.append(Pair(image, one.name, text, numbers[one.name], name, path, one.line, fault or empty))
    elsewhere = ", found by their file names" if any(map(is_absolute, names)) else ""
    log(f"{split}: {name}: {path}: {form}, {len(pairs)} captions of {len(names)} pictures, images in {root}{elsewhere}")
    return pairs


# --- all sets ------------

def of_split(places, split, images, val_share, encoding, log):
    """The Pairs of all sets, with faults. Where no set has a validation file, val_share of all pictures is held out, by the
    hash of their names; where one has, the others are for training alone."""
    def root_of(name):
        return images.get(name) if isinstance(images, dict) else images

    without = [name for name, place in places.items() if not split_file(place, "val")]
    divided = len(without) == len(places)
    if divided and split == "val" and not val_share:
        raise DataError(f"no set has a validation file ({', '.join(FILES['val'])}): add one or pass --val-share")
    source = "train" if divided else split
    found = [pair for name, place in places.items() for pair in read_set(name, place, source, root_of(name), encoding, log)]
    if divided and val_share:
        kept = hold_out(found, val_share, split == "val", lambda line: log(f"{split}: {line}"))
        log(f"{split}: no set has a validation file: {len({pair.image_id for pair in kept})} of "
            f"{len({pair.image_id for pair in found})} pictures, divided by the hash of their names")
        return kept
    if split == "val" and without:
        log(f"val: no validation file in {', '.join(without)}: for training alone")
    return found


def hold_out(pairs, share, validation, log=print):
    """As rows.hold_out, but that a picture which two sets name differently stays on one side, with the first of its names."""
    firsts = {}
    for pair in pairs:
        if pair.image_id not in firsts or pair.name < firsts[pair.image_id].name:
            firsts[pair.image_id] = pair
    chosen = {pair.image_id for pair in rows.hold_out(list(firsts.values()), share, validation, log)} if pairs else set()
    return [pair for pair in pairs if pair.image_id in chosen]


def with_broken(pairs, workers):
    """The Pairs, each picture decoded, with the faults that shows."""
    broken = dict(rows.verify_images([pair for pair in pairs if not pair.fault], max(1, workers)))
    return [replace(pair, fault=broken[pair.image]) if pair.image in broken and not pair.fault else pair for pair in pairs]


def usable(pairs, skip_bad, split, log):
    """The Pairs without fault; says what is left out. DataError where more than the share skip_bad has one, or all have."""
    good, bad = [pair for pair in pairs if not pair.fault], [pair for pair in pairs if pair.fault]
    firsts = {}  # a missing picture has five captions
    for pair in bad:
        firsts.setdefault((pair.name, pair.fault), pair)
    firsts = list(firsts.values())
    pictures = len({pair.image_id for pair in bad})
    counted = f"{len(bad)} of {len(pairs)} {split} captions ({pictures} pictures)"
    if bad and (len(bad) > skip_bad * len(pairs) or not good):
        listed = " | ".join(f"{p.file}, {locate(p.file, p.line)}: {p.fault}" for p in firsts[:5])
        advice = f", or leave them out with --skip-bad {min(1, len(bad) / len(pairs) + 0.005):.2f}" if good else ""
        raise DataError(f"{counted} cannot be used: {listed}: mend them, check --images, list them with --check-data{advice}")
    for pair in firsts[:LISTED]:
        log(f"left out: {pair.file}, {locate(pair.file, pair.line)}: {pair.fault}")
    if bad:
        log(f"left out (--skip-bad): {counted}")
    return good


def read_sets(places, split, images=None, skip_bad=0.0, val_share=0.1, encoding="utf-8", workers=2, log=print):
    """The Pairs of a split ("train" or "val") of all sets, in their order.

    places: {name: place}. images: an image root for all sets, or {name: root}. skip_bad: the share of the captions that may be
    left out because of their picture, each of which is then decoded, or because they are empty. DataError: more than that; as
    read_set."""
    found = of_split(places, split, images, val_share, encoding, log)
    if not found:
        raise DataError(f"{split}: no caption in {', '.join(places.values())}: check --data")
    return usable(with_broken(found, workers) if skip_bad else found, skip_bad, split, log)


def fingerprint(pairs):
    """Short hash of everything in the Pairs but where they stand: tells whether a run is resumed on other data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update("\0".join((pair.source, pair.name, pair.text, "\n")).encode())
    return digest.hexdigest()[:16]


# --- pixels ------------

def crop_box(width, height, rng):
    """(left, top, right, bottom) of a random part, half to all of the area, sides 3:4 to 4:3; after ten misses the middle."""
    for _ in range(10):
        area, ratio = width * height * rng.uniform(0.5, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def changed(image, operation, sign):
    """An image after one of OPERATIONS; sign: 1 or -1, the direction."""
    if operation == "AutoContrast":
        return ImageOps.autocontrast(image)
    if operation == "Equalize":
        return ImageOps.equalize(image)
    if operation == "Rotate":
        return image.rotate(15 * sign, Image.Resampling.BILINEAR, fillcolor=GREY)
    moves = {"ShearX": (1, 0.15 * sign, 0, 0, 1, 0), "ShearY": (1, 0, 0, 0.15 * sign, 1, 0),
             "TranslateX": (1, 0, 5 * sign, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, 5 * sign)}
    if operation not in moves:
        return image
    return image.transform(image.size, Image.Transform.AFFINE, moves[operation], Image.Resampling.BILINEAR, fillcolor=GREY)


def train_view(image, size, rng, caption="", strong=False):
    """RGB image -> float32 [3, size, size] in BLIP's normalisation: a random part, mirrored every second time (not where the
    caption says left or right), if `strong` with two of OPERATIONS. A pure function of its arguments; rng: numpy's."""
    image = image.crop(crop_box(*image.size, rng)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5 and not LEFT_RIGHT.search(caption):
        image = ImageOps.mirror(image)
    for operation in rng.choice(OPERATIONS, 2) if strong else ():
        applied, sign = rng.random() < 0.5, 1 if rng.random() < 0.5 else -1
        image = changed(image, operation, sign) if applied else image
    return rows.image_tensor(image, size)


class Captioned(Dataset):
    """(epoch, number) -> (picture [3,s,s], Pair), augmented in training; or (the DataError of a broken picture, Pair)."""

    def __init__(self, pairs, size, seed=None):
        """seed: of the augmentation; None = the evaluation's view."""
        self.rows, self.size, self.seed = pairs, size, seed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, number = key
        pair = self.rows[number]
        try:
            image = rows.load_image(pair.image)
            if self.seed is None:
                return rows.image_tensor(image, self.size), pair
            rng = np.random.default_rng([self.seed, epoch, number])
            return train_view(image, self.size, rng, pair.text, strong=pair.strong), pair
        except DataError as error:
            return error, pair


# --- --check-data ------------

def check(places, images=None, skip_bad=0.0, val_share=0.1, encoding="utf-8", workers=2, absent="", log=print):
    """--check-data: say what is there and decode every picture; exit code 1 where training would fail, 0 where not. absent: what else
    is missing, and the ways to it."""
    splits, failed = {}, False
    for split in FILES:
        try:
            found = with_broken(of_split(places, split, images, val_share, encoding, log), workers)
            splits[split] = found
            for source in places:
                describe([pair for pair in found if pair.source == source], f"{split}: {source}", log)
            usable(found, skip_bad, split, lambda line: None)
        except DataError as error:
            log(f"{split}: error: {error}")
            failed = True
    shared = rows.shared_images(splits)
    for image, homes in list(shared.items())[:LISTED]:
        log(f"in {' and '.join(homes)}: {image}")
    if shared:
        log(f"{len(shared)} pictures stand in more than one split: recall on them is no measure")
    return rows.verdict(failed, absent, log)


def describe(pairs, label, log):
    """Say what a split of a set holds, and its faults."""
    if not pairs:
        return
    each = Counter(Counter(pair.image_id for pair in pairs).values())
    lengths, unit = sorted(len(words_of(pair.text)) for pair in pairs), unit_of(pair.text for pair in pairs)
    per_picture = ", ".join(f"{count} with {number}" for number, count in sorted(each.items())[:8])
    log(f"{label}: {len(pairs)} captions of {sum(each.values())} pictures ({per_picture}{' ...' if len(each) > 8 else ''}); "
        f"{len({pair.text for pair in pairs})} different ones of {lengths[0]} to {lengths[-1]} {unit}, half up to "
        f"{lengths[len(lengths) // 2]}; {sum(bool(LEFT_RIGHT.search(pair.text)) for pair in pairs)} say left or right")
    reasons = dict.fromkeys((pair.name, pair.fault) for pair in pairs if pair.fault)
    for name, reason in list(reasons)[:LISTED]:
        log(f"bad: {name}: {reason}")
    if reasons:
        missing = len({pair.image_id for pair in pairs if not pair.image})
        broken = len({pair.image_id for pair in pairs if pair.image and pair.fault and pair.fault != "empty caption"})
        log(f"{label}: {missing} pictures missing, {broken} broken, {sum(not pair.text for pair in pairs)} captions empty")
