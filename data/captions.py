"""captions.py: pictures and their captions: reading and checking them, as tokens, augmented.

    read_data      the Pictures of a split; DataError for what cannot be used, --skip-bad leaves it out
    limited        --max-val of them; pictures_in: what --caption names
    token_ids      captions -> tokens, at most MAX_LENGTH
    augmented      a picture mirrored, brightened, turned: a pure function of its arguments
    Captions       the data set that the Pictures become
    check_data     --check-data: what is there; check_tokens: what the decoder will read of it
    read_captions  a JSON file in any of the forms that captions come in

A split is DATA/SPLIT_captions.json, {file: caption or list of captions}, or COCO's annotations (read_captions).
"""

import hashlib
import json
import os
import pathlib
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import Dataset

from data import rows
from data.tables import cell, parse_json, read_text, shown
from engine.errors import DataError

MAX_LENGTH = 60  # tokens of a caption, [DEC] among them, in training and in generation
LONGEST = 100  # words; what is longer is no caption
LEFT_RIGHT = re.compile(r"\b(left|right)|左|右", re.IGNORECASE)  # also leftmost, right-hand


# --- files of captions ------------

def _coco_rows(path, rows):
    """COCO's rows of image_id and caption -> {image: [captions]}, ids as text."""
    found = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: {shown(json.dumps(row))} where an object with image_id and caption belongs: mend it")
        found.setdefault(cell(where, row, "image_id", "image"), []).append(cell(where, row, "caption", "caption"))
    return found


def _file_names(path, content):
    """{image: file name} of a COCO annotation file, {} of any other."""
    images = content.get("images") if isinstance(content, dict) and "annotations" in content else None
    rows = [row for row in images if isinstance(row, dict)] if isinstance(images, list) else []
    return {cell(path, row, "id", "image"): cell(path, row, "file_name", "file name") for row in rows if "file_name" in row}


def read_captions(path, encoding="utf-8"):
    """({image: [captions]}, {image: file name}) of a JSON file; the second is empty but for COCO's annotation files.

    Forms: {image: [captions]}, {image: caption}, COCO's annotations {"images": .., "annotations": [rows]} and results
    [rows], rows being {"image_id": .., "caption": ..}. DataError: unreadable, another form, no captions, a key twice.
    """
    content = parse_json(path, read_text(path, encoding))
    rows = content.get("annotations", content) if isinstance(content, dict) else content
    if isinstance(rows, list):
        found = _coco_rows(path, rows)
    elif isinstance(content, dict) and rows is content:
        lists = {image: captions if isinstance(captions, list) else [captions] for image, captions in content.items()}
        found = {image: [cell(f"{path}, {shown(image)}", {"caption": text}, "caption", "caption") for text in captions]
                 for image, captions in lists.items()}
    else:
        raise DataError(f"{path}: neither {{image: captions}} nor COCO's annotations or results: see metrics.py --help")
    if not found:
        raise DataError(f"{path}: it holds no captions: nothing to score")
    return found, _file_names(path, content)


# --- reading ------------

@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its captions; `fault` says why it cannot be used ("" if it can)."""
    image: str  # absolute path, "" where it was not found
    name: str  # as the file of captions has it
    captions: tuple
    line: int  # number in that file, from 1
    file: str
    fault: str = ""


def split_file(data, split):
    return pathlib.Path(data) / f"{split}_captions.json"


def read_data(data, split, images=None, encoding="utf-8", texts_clean=False, skip_bad=0.0, shots=None, seed=0, workers=2,
              say=print):
    """Pictures of a split, bad ones refused, with skip_bad left out and listed; training captions cleaned if asked for."""
    path = str(split_file(data, split))
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file: --data is a folder with train_captions.json and val_captions.json; "
                        "python tools/make_sample.py draws one, data/artquest")
    captions, names = read_captions(path, encoding)
    named = [(names.get(key, key), texts) for key, texts in captions.items()]  # COCO's keys are numbers
    root, listings, missed, found = rows.image_root(path, images, "", named[0][0]), {}, 0, []
    for number, (name, texts) in enumerate(named, 1):
        image, fault = "", ""
        try:  # the search for the nearest name is slow in a big folder, and five are shown
            image = rows.resolve_image(root, name, listings, nearest=missed < 5)
            fault = "" if os.path.getsize(image) else f"image {rows.shown(name)} has 0 bytes"
        except DataError as error:
            fault, missed = str(error), missed + 1
        found.append(Picture(image, name, tuple(" ".join(text.split()) for text in texts), number, path, fault))
    if split == "train" and texts_clean:
        found = clean(found, say)
    say(f"{split}: {path}: {len(found)} pictures, {sum(len(p.captions) for p in found)} captions, images in {root}")
    empty = "an empty caption (--train-texts-clean removes those of the training file)"
    found = [p if p.fault or (p.captions and all(p.captions)) else replace(p, fault=empty) for p in found]
    if skip_bad:
        broken = dict(rows.verify_images([p for p in found if not p.fault], max(1, workers)))
        found = [replace(p, fault=broken.get(p.image, p.fault)) for p in found]
    good = usable(found, skip_bad, say)
    return chosen(good, shots, seed, path) if split == "train" and shots else good


def usable(found, skip_bad, say):
    """The pictures without fault. DataError where more than the share skip_bad has one, or all have."""
    bad = [p for p in found if p.fault]
    good = [p for p in found if not p.fault]
    if bad and (len(bad) > skip_bad * len(found) or not good):
        listed = " | ".join(f"{rows.locate(p.file, p.line)}: {p.fault}" for p in bad[:5])
        raise DataError(f"{bad[0].file}: {len(bad)} of {len(found)} pictures cannot be used: {listed}: mend them, check "
                        f"--images, or leave them out with --skip-bad {min(1, len(bad) / len(found) + 0.005):.2f}")
    for p in bad:
        say(f"left out: {p.file}, {rows.locate(p.file, p.line)}: {p.fault}")
    return good


def clean(found, say):
    """--train-texts-clean: the pictures with the captions worth training on; says what was removed."""
    empty = twice = long = 0
    kept = []
    for picture in found:
        texts = {}  # by what counts as the same
        for text in picture.captions:
            same = text.lower().rstrip(" .")
            empty, twice, long = empty + (not same), twice + (same in texts), long + (len(text.split()) > LONGEST)
            if same and len(text.split()) <= LONGEST:
                texts.setdefault(same, text)
        if texts:
            kept.append(replace(picture, captions=tuple(texts.values())))
    say(f"--train-texts-clean: {empty} empty, {twice} duplicate and {long} absurdly long captions removed, and "
        f"{len(found) - len(kept)} pictures that have no other")
    if not kept:
        raise DataError(f"{found[0].file}: --train-texts-clean leaves no caption")
    return kept


def chosen(pictures, count, seed, path):
    """`count` of the pictures, in their order: a pure function of their names and the seed."""
    if count > len(pictures):
        raise DataError(f"{path}: --shots {count} of {len(pictures)} pictures: ask for fewer")
    order = sorted(pictures, key=lambda p: hashlib.sha256(f"{seed} {p.name}".encode()).digest())
    picked = {p.name for p in order[:count]}
    return [p for p in pictures if p.name in picked]


def limited(pictures, max_val, split, say=print):
    """The pictures that are scored: all, or with --max-val so many, which is said."""
    if not max_val or max_val >= len(pictures):
        return pictures
    say(f"{split}: {max_val} of {len(pictures)} pictures are scored (--max-val): not comparable with the whole split")
    return chosen(pictures, max_val, 0, "")


def fingerprint(pictures):
    """Short hash of names and captions: tells whether a run is resumed on other data."""
    return hashlib.sha256(json.dumps([(p.name, p.captions) for p in pictures]).encode()).hexdigest()[:16]


def pictures_in(places):
    """--caption: files, and folders that stand for the pictures in them -> Pictures without captions."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in rows.FORMATS}
    found = []
    for place in map(pathlib.Path, places):
        if not place.exists():
            raise DataError(f"--caption {place}: there is no such picture or folder")
        inside = sorted(p for p in place.iterdir() if p.suffix.lower() in known) if place.is_dir() else [place]
        if not inside:
            raise DataError(f"--caption {place}: no picture in this folder")
        found += [Picture(str(path), str(path), (), n, str(place)) for n, path in enumerate(inside, 1)]
    return found


# --- tokens and pixels ------------

def token_ids(tokenizer, texts):
    """[CLS] words [SEP] of each text. One that is too long loses its end, [SEP] too: nobody shall learn to stop there."""
    return [ids[:MAX_LENGTH] for ids in tokenizer(list(texts), verbose=False).input_ids] if len(texts) else []


def augmented(image, caption, rng):
    """Mirrored, brighter or darker, more or less contrast, turned by up to 10 degrees: a pure function of its arguments."""
    mirror, bright, contrast, turn = rng.random(), *rng.uniform(0.8, 1.2, 2), rng.uniform(-10, 10)
    if mirror < 0.5 and not LEFT_RIGHT.search(caption):
        image = ImageOps.mirror(image)
    image = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(bright)).enhance(contrast)
    return image.rotate(turn, Image.Resampling.BICUBIC, fillcolor=tuple(round(255 * m) for m in rows.BLIP_MEAN))


# --- the data set ------------

class Captions(Dataset):
    """Number, or (epoch, number) in training -> (sample, Picture); (the DataError of a broken picture, Picture), as questions.Questions.

    sample: pixel_values [3,s,s] in BLIP's normalisation, and with a tokenizer ids, the caption's tokens. every: one row for
    each caption; else one for each picture, with its first caption. augment: the seed, or None.
    """

    def __init__(self, pictures, image_size, tokenizer=None, every=False, augment=None):
        pairs = [(p, text) for p in pictures for text in (p.captions if every else p.captions[:1] or ("",))]
        self.rows, self.texts, self.image_size, self.augment = [p for p, _ in pairs], [t for _, t in pairs], image_size, augment
        self.ids = token_ids(tokenizer, self.texts) if tokenizer else None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        epoch, number = index if isinstance(index, tuple) else (None, index)
        picture = self.rows[number]
        try:
            image = rows.load_image(picture.image)
        except DataError as error:
            return error, picture
        if self.augment is not None and epoch is not None:
            image = augmented(image, self.texts[number], np.random.default_rng([self.augment, epoch, number]))
        sample = {"pixel_values": rows.image_tensor(image, self.image_size)}  # [3,s,s]
        return ({**sample, "ids": self.ids[number]} if self.ids else sample), picture


# --- --check-data ------------

def check_data(data, load_tokenizer, skip_bad=0.0, workers=2, **reading):
    """--check-data: print what is there; exit code 1 when training would fail. No weight is loaded.

    load_tokenizer: function that gives the tokenizer, which says what is cut, or raises DataError; reading: as for read_data."""
    splits, failed = {}, False
    for split in [s for s in ("train", "val", "test") if s != "test" or split_file(data, s).is_file()]:
        try:
            splits[split] = read_data(data, split, skip_bad=skip_bad, workers=workers, **reading)
        except DataError as error:
            print(f"{split}: error: {error}")
            failed = True
            continue
        texts = [text for p in splits[split] for text in p.captions]
        lengths = sorted(len(text.split()) for text in texts)
        print(f"{split}: {len(set(texts))} different captions of {lengths[0]} to {lengths[-1]} words, half up to "
              f"{lengths[len(lengths) // 2]}; {sum(bool(LEFT_RIGHT.search(t)) for t in texts)} say left or right")
        for path, reason in rows.verify_images(splits[split], max(1, workers)) if not skip_bad else []:
            print(f"broken image: {path}: {reason}")
            failed = True
    shared = rows.shared_images(splits)
    for image, homes in list(shared.items())[:10]:
        print(f"in {' and '.join(homes)}: {image}")
    if len(shared) > 10:
        print(f"... {len(shared)} pictures stand in more than one split")
    check_tokens(load_tokenizer, splits)
    print("training would fail" if failed else "training can start")
    return int(failed)


def check_tokens(load_tokenizer, splits):
    """What the decoder will read: captions that are cut, and three of them piece by piece."""
    try:
        tokenizer = load_tokenizer()
    except DataError as error:
        print(f"tokens not checked: {error}")
        return
    for split, pictures in splits.items():
        texts = [text for p in pictures for text in p.captions]
        cut = sum(len(ids) > MAX_LENGTH for ids in tokenizer(texts, verbose=False).input_ids)
        print(f"{split}: {cut} of {len(texts)} captions are cut at {MAX_LENGTH} tokens")
    for picture in splits.get("train", [])[:3]:
        pieces = tokenizer.convert_ids_to_tokens(token_ids(tokenizer, picture.captions[:1])[0])
        print(f"{picture.name}: [DEC] {' '.join(pieces[1:])}")
