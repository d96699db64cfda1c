"""captions.py: pictures and their captions: reading and checking them, as tokens, augmented.

    read_data      the Pictures of a split; DataError for what cannot be used, --skip-bad leaves it out
    limited        --max-val of them; pictures_in: what --caption names
    token_ids      captions -> tokens, at most MAX_LENGTH
    augmented      a picture mirrored, brightened, turned: a pure function of its arguments
    Captions       the data set that the Pictures become
    check_data     --check-data: what is there; check_tokens: what the decoder will read of it
    read_entries   a file in any of the forms that captions come in -> what it was taken for, and its Entries; grouped by picture

A split is DATA/SPLIT_captions.json, or another file of file_names and WHOLE.
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
from data.tables import SHEETS, cell, locate, parse_json, read_json, read_sheet, read_table, read_text, excerpt
from engine.errors import DataError
from engine.text import unit_of, words_of

MAX_LENGTH = 60  # tokens of a caption, [DEC] among them, in training and in generation
LONGEST = 100  # words of engine.text; what is longer is no caption
LEFT_RIGHT = re.compile(r"\b(left|right)|左|右", re.IGNORECASE)  # also leftmost, right-hand


# --- files of captions ------------

@dataclass(frozen=True, slots=True)
class Entry:
    """What a row of a file of captions says of a picture, or all of its rows in the forms that keep them together."""
    line: int  # number of the row or line, from 1
    name: str  # the picture's file as it is written there; its id where there is no file name
    captions: tuple
    ident: str = ""  # the picture's id, "" where it has none


KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}  # BLIP's coco_karpathy_train.json has restval too
TOKEN = re.compile(r"([^\t]*\S)#[0-9]+\t(.*)")  # name#0<TAB>caption
COMMENTS = re.compile(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*(\n|$)")  # the header of Kaggle's Flickr30k,
COMMENT = re.compile(r"([^|]*\S)\s*\|\s*[0-9]+(?:\s*\||\s)\s*(.*)")  # and its rows; in line 20,001 as published the second | is missing
COLUMNS = {"image": ("image", "file_name", "filename", "image_path", "image_name", "image_id"),  # the first that is there
           "caption": ("caption", "captions", "text", "comment", "caption_str")}
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
# one file for all splits, which it names itself, which LISTS beside it name, or of which a share of the pictures is held out
WHOLE = ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json", "dataset.json", "captions.txt", "Flickr8k.token.txt",
         "results.csv", "captions.csv", "captions.tsv", *(f"captions{ending}" for ending in SHEETS), *rows.METADATA)
HELD_OUT = 0.1  # share of the pictures


def file_names(split):
    """Names that the file of captions of one split may have."""
    return (f"coco_karpathy_{split}.json", *(["vg_caption.json"] if split == "train" else []), f"{split}_captions.json",
            f"{split}_captions.csv", f"{split}_captions.tsv", *(f"{split}_captions{ending}" for ending in SHEETS),
            f"captions_{split}2014.json", f"captions_{split}2017.json", f"TextCaps_0.1_{split}.json")


def files_of(place, split):
    """Files of a split in folder `place` and annotations/ in it: those of the split alone, else those of all splits."""
    def existing(names):
        paths = [os.path.join(place, inner, name) for inner in ("", "annotations") for name in names]
        return [path for path in paths if os.path.isfile(path)]

    tables = [path for path in existing((f"{split}.csv", f"{split}.tsv", *rows.metadata_names(split))) if caption_table(path)]
    whole = [path for path in existing(WHOLE) if holds_captions(path) and (split != "test" or names_splits(path))]
    return existing(file_names(split)) or tables or whole or existing(split + ending for ending in SHEETS)


def caption_table(path):
    """Has this table a caption and no question in its header, or in its first object? Questions are kept in train.csv, too."""
    with open(path, "rb") as file:
        line = file.readline(100_000).decode("utf-8-sig", "replace")
    keys = re.findall(r'"([^"]*)"\s*:', line) if line.lstrip().startswith("{") else re.split('[,;\t"]', line)
    keys = {rows.plain_name(key) for key in keys}
    return not keys.isdisjoint(COLUMNS["caption"]) and "question" not in keys


def holds_captions(path):
    """Are there captions in a file of WHOLE, whose name others may have given to something else?"""
    name = os.path.basename(path)
    if name == "results.csv":
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return COMMENTS.match(file.readline(1_000)) is not None
    return names_splits(path) if name == "dataset.json" else caption_table(path) if name in rows.METADATA else True


def is_whole(place, path):
    """Is `path`, of `place` or the place itself, for training and validation alike without saying which picture is in which?"""
    both = [map(os.path.realpath, files_of(place, split)) for split in ("train", "val")]
    return not names_splits(path) and (os.path.isfile(place) or all(os.path.realpath(path) in found for found in both))


def names_splits(path):
    """Does a file that holds all splits say which picture is in which, as Karpathy's do, or lists beside it?"""
    if path.lower().endswith(".json"):
        with open(path, "rb") as file:
            return re.match(rb'\s*\{.*"sentences"\s*:', file.read(10_000), re.DOTALL) is not None
    return path.lower().endswith(".txt") and all(os.path.isfile(os.path.join(os.path.dirname(path), name)) for name in LISTS.values())


def captions_in(where, cells, key="caption"):
    """The caption of a row, or its list of them."""
    texts = cells.get(key)
    texts = [{key: text} for text in texts] if isinstance(texts, list) else [cells]
    return tuple(cell(where, one, key, "caption") for one in texts)


def columns_of(where, keys):
    """{"image", "caption": the first of COLUMNS that is among the keys of a row, in whatever case}. DataError: none, a name twice."""
    found = {what: next(filter(None, (rows.alike(where, name, keys, strict=True) for name in names)), None)
             for what, names in COLUMNS.items()}
    lacking = [f"no column {' or '.join(COLUMNS[what])}" for what, column in found.items() if column is None]
    if lacking:
        raise DataError(f"{where}: {' and '.join(lacking)}; it has {excerpt(', '.join(keys), 300)}: rename or add what is missing")
    return found


def read_rows(path, table, header=False):
    """(columns_of the first row, [Entry]) of rows [(number, {column: text, of captions also a list})]: of BLIP's authors, HuggingFace,
    TextCaps; COCO's results have image_id alone. header: all rows have the same columns, those of a table."""
    known, found = {}, []
    for number, row in table:
        where = f"{path}, {locate(path, number)}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: {excerpt(json.dumps(row))} where an object with image_id and caption belongs: mend it")
        keys = tuple(row)
        if keys not in known:
            known[keys] = columns_of(path if header else where, keys)
        columns, ident = known[keys], cell(where, row, "image_id", "image", needed=False)
        found.append(Entry(number, cell(where, row, columns["image"], "image"), captions_in(where, row, columns["caption"]), ident))
    return next(iter(known.values()), {}), found


def told(columns):
    """What is to be said of columns_of, "" of image and caption."""
    return rows.told_columns(columns, {"image": "image", "caption": "caption"})


def read_annotations(path, content):
    """COCO's annotations: the captions of each image id, with its file name where the file has one."""
    images = content.get("images") if isinstance(content.get("images"), list) else []
    images = [row for row in images if isinstance(row, dict) and "file_name" in row]
    names = {cell(path, row, "id", "image"): cell(path, row, "file_name", "file name") for row in images}
    found = grouped(read_rows(path, enumerate(content["annotations"], 1))[1])
    return [Entry(number, names.get(one.name, one.name), one.captions, one.name) for number, one in enumerate(found, 1)]


def read_karpathy(path, images, split):
    """Karpathy's dataset_coco.json, dataset_flickr8k.json: the pictures of a split, "" for all."""
    for number, row in enumerate(images, 1):
        where = f"{path}, image {number}"
        if not isinstance(row, dict) or not isinstance(row.get("sentences"), list):
            raise DataError(f"{where}: no list of sentences: download the file again")
        own = cell(where, row, "split", "split")
        if not split or own in KARPATHY[split]:
            folder, name = cell(where, row, "filepath", "folder", needed=False), cell(where, row, "filename", "image")
            texts = [one if isinstance(one, dict) else {} for one in row["sentences"]]
            yield Entry(number, f"{folder}/{name}" if folder else name, tuple(cell(where, one, "raw", "caption") for one in texts),
                        cell(where, row, "cocoid", "image", needed=False))


def read_tokens(path, text):
    """Flickr8k.token.txt: name#0<TAB>caption. Quotes mean nothing there."""
    for number, line in enumerate(text.split("\n"), 1):
        match = TOKEN.fullmatch(line.rstrip("\r"))
        if match:
            yield Entry(number, match[1], (match[2],))
        elif line.strip():
            raise DataError(f"{path}, line {number}: {excerpt(line)} is not name#number, a tab and a caption: mend the line")


def read_comments(path, text):
    """Kaggle's Flickr30k, results.csv: name| number| caption under a header. Quotes mean nothing there."""
    for number, line in list(enumerate(text.split("\n"), 1))[1:]:
        match = COMMENT.fullmatch(line.rstrip("\r"))
        if match:
            yield Entry(number, match[1], (match[2],))
        elif line.strip():
            raise DataError(f"{path}, line {number}: {excerpt(line)} is not name| number| caption: mend the line")


def read_lines(path, text, encoding):
    """read_entries of a text file: Flickr8k's tokens, Kaggle's Flickr30k, else a table; in captions.txt commas in captions may stand
    unquoted."""
    kind = os.path.splitext(path)[1].lower()
    if TOKEN.match(text.lstrip()):
        return "Flickr8k's tokens", list(read_tokens(path, text))
    if COMMENTS.match(text):
        return "Flickr30k's results.csv", list(read_comments(path, text))
    columns, found = read_rows(path, read_table(path, encoding, join_rest=kind == ".txt"), header=True)
    return ("Flickr8k's captions.txt" if kind == ".txt" else kind[1:].upper()) + told(columns), found


def in_split_list(path, entries, split):
    """The entries of the pictures that the list of a split beside the file names."""
    names = {line.strip() for line in read_text(os.path.join(os.path.dirname(path), LISTS[split]), "utf-8").splitlines()}
    return [one for one in entries if one.name in names]


def read_entries(path, encoding="utf-8", split=""):
    """(what the file was taken for, [Entry]) of a file of captions; split: of a file that says which picture is in which.

    JSON: {image: caption or captions}; rows of image and caption or captions, named as in COLUMNS, in a list (BLIP's coco_karpathy_*.json,
    COCO's results) or under "data" (TextCaps); COCO's annotations; Karpathy's dataset_*.json. The same rows as JSON Lines (HuggingFace's
    metadata.jsonl), CSV, TSV, Excel, Parquet; Flickr8k's captions.txt and Flickr8k.token.txt, Kaggle's results.csv of Flickr30k.
    DataError: unreadable, another form, no captions, a key or column twice."""
    path, kind = str(path), os.path.splitext(path)[1].lower()
    if kind in (".csv", ".tsv", ".txt"):
        form, found = read_lines(path, read_text(path, encoding), encoding)
        if split and kind == ".txt" and names_splits(path):
            form, found = f"{form}, {LISTS[split]}", in_split_list(path, found, split)
    elif kind == ".jsonl" or kind in SHEETS:
        form, table = read_json(path, encoding) if kind == ".jsonl" else read_sheet(path)
        columns, found = read_rows(path, table, header=kind in SHEETS)
        form += told(columns)
    else:
        form, found = read_content(path, parse_json(path, read_text(path, encoding)), split)
    if not found:
        raise DataError(f"{path}: it holds no captions{f' of the split {split}' if split else ''} (empty)")
    return (f"HuggingFace's metadata, {form}" if os.path.basename(path) in rows.METADATA else form), found


def read_content(path, content, split):
    """read_entries of a JSON file's content."""
    if isinstance(content, list):
        columns, found = read_rows(path, enumerate(content, 1))
        image, caption = columns.values() if columns else ("image_id", "caption")
        return f"rows of {image} and {caption}" + ", as coco_karpathy_*.json" * (image == "image" and caption == "caption"), found
    if isinstance(content, dict) and isinstance(content.get("data"), list) and any(isinstance(row, dict) for row in content["data"]):
        columns, found = read_rows(path, enumerate(content["data"], 1))
        return f'rows under "data", as TextCaps{told(columns)}', found
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        return f"Karpathy's file, {' and '.join(KARPATHY[split]) if split else 'all splits'}", list(read_karpathy(path, images, split))
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return "COCO's annotations", read_annotations(path, content)
    if not isinstance(content, dict) or "annotations" in content:
        raise DataError(f"{path}: neither {{image: captions}} nor COCO's annotations or results, nor Karpathy's: see data/README.md")
    return "captions by file name", [Entry(number, image, captions_in(f"{path}, {excerpt(image)}", {"caption": texts}))
                                     for number, (image, texts) in enumerate(content.items(), 1)]


def grouped(entries):
    """The entries with all captions of a picture in one, where it stands first; two ids of one file name are two pictures."""
    found = {}
    for one in entries:
        found.setdefault((one.name, one.ident), [one, []])[1].extend(one.captions)
    return [replace(first, captions=tuple(texts)) for first, texts in found.values()]


def image_root(place, path, images, first):
    """The folder that pictures are named from: `images`, else PLACE/images, else PLACE; a file is placed in its folder, or
    above that where it is called annotations. first: a name, which may have images/ in it already."""
    if os.path.basename(path) in rows.METADATA:  # its pictures are beside it
        return rows.image_root(path, images, "ImageFolder", first)
    folder = place if os.path.isdir(place) else os.path.dirname(path) or "."
    if folder != place and os.path.basename(os.path.abspath(folder)) == "annotations":
        folder = os.path.dirname(os.path.abspath(folder))
    return rows.image_root(os.path.join(folder, os.path.basename(path)), images, "", first)


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
    """The file of a split: `data` itself, or of files_of in it; DATA/SPLIT_captions.json goes before others, and where there is
    none. DataError: several others."""
    own = pathlib.Path(data) / f"{split}_captions.json"
    if os.path.isfile(data):
        return pathlib.Path(data) if split != "test" or names_splits(str(data)) else own
    found = [own] if own.is_file() else files_of(data, split)
    if len(found) > 1:
        raise DataError(f"{data}: {' and '.join(found)} are there, and each could be the {split} split: move all but one away")
    return pathlib.Path(found[0]) if found else own


def read_data(data, split, images=None, encoding="utf-8", texts_clean=False, skip_bad=0.0, shots=None, seed=0, workers=2,
              log=print):
    """Pictures of a split, bad ones refused, with skip_bad left out and listed; training captions cleaned if asked for."""
    path = str(split_file(data, split))
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file: --data is a folder with train_captions.json and val_captions.json, or in "
                        "another layout of data/README.md; python tools/make_sample.py draws one, data/artquest")
    form, entries = read_entries(path, encoding, split)
    entries = grouped(entries)
    root = image_root(str(data), path, images, entries[0].name)
    found, pictures = [], rows.find_pictures((one.name for one in entries), root)
    for one in entries:
        image, fault = pictures[one.name]
        fault = fault or ("" if os.path.getsize(image) else f"image {excerpt(one.name)} has 0 bytes")
        found.append(Picture(image, one.name, tuple(" ".join(text.split()) for text in one.captions), one.line, path, fault))
    if is_whole(data, path):
        found = rows.hold_out(found, HELD_OUT, split == "val", lambda line: log(f"{split}: {line}"))
        form = f"{form}, one file for both: {HELD_OUT:.0%} of the pictures are held out for validation"
    if split == "train" and texts_clean:
        found = clean(found, log)
    log(f"{split}: {path}: {form}, {len(found)} pictures, {sum(len(p.captions) for p in found)} captions, images in {root}")
    empty = "an empty caption (--train-texts-clean removes those of the training file)"
    found = [p if p.fault or (p.captions and all(p.captions)) else replace(p, fault=empty) for p in found]
    if skip_bad:
        broken = dict(rows.verify_images([p for p in found if not p.fault], max(1, workers)))
        found = [replace(p, fault=broken.get(p.image, p.fault)) for p in found]
    good = usable(found, skip_bad, log)
    return choose(good, shots, seed, path) if split == "train" and shots else good


def usable(pictures, skip_bad, log):
    """The pictures without fault. DataError where more than the share skip_bad has one, or all have."""
    bad = [p for p in pictures if p.fault]
    good = [p for p in pictures if not p.fault]
    if bad and (len(bad) > skip_bad * len(pictures) or not good):
        in_split_list = " | ".join(f"{rows.locate(p.file, p.line)}: {p.fault}" for p in bad[:5])
        raise DataError(f"{bad[0].file}: {len(bad)} of {len(pictures)} pictures cannot be used: {in_split_list}: mend them, check "
                        f"--images, or leave them out with --skip-bad {min(1, len(bad) / len(pictures) + 0.005):.2f}")
    for p in bad:
        log(f"left out: {p.file}, {rows.locate(p.file, p.line)}: {p.fault}")
    return good


def clean(pictures, log):
    """--train-texts-clean: the pictures with the captions worth training on; says what was removed."""
    empty = twice = long = 0
    kept = []
    for picture in pictures:
        texts = {}  # by what counts as the same
        for text in picture.captions:
            same, length = text.lower().rstrip(" ."), len(words_of(text))
            empty, twice, long = empty + (not same), twice + (same in texts), long + (length > LONGEST)
            if same and length <= LONGEST:
                texts.setdefault(same, text)
        if texts:
            kept.append(replace(picture, captions=tuple(texts.values())))
    log(f"--train-texts-clean: {empty} empty, {twice} duplicate and {long} absurdly long captions removed, and "
        f"{len(pictures) - len(kept)} pictures that have no other")
    if not kept:
        raise DataError(f"{pictures[0].file}: --train-texts-clean leaves no caption")
    return kept


def choose(pictures, count, seed, path):
    """`count` of the pictures, in their order: a pure function of their names and the seed."""
    if count > len(pictures):
        raise DataError(f"{path}: --shots {count} of {len(pictures)} pictures: ask for fewer")
    order = sorted(pictures, key=lambda p: hashlib.sha256(f"{seed} {p.name}".encode()).digest())
    picked = {p.name for p in order[:count]}
    return [p for p in pictures if p.name in picked]


def limit(pictures, max_val, split, log=print):
    """The pictures that are scored: all, or with --max-val so many, which is said."""
    if not max_val or max_val >= len(pictures):
        return pictures
    log(f"{split}: {max_val} of {len(pictures)} pictures are scored (--max-val): not comparable with the whole split")
    return choose(pictures, max_val, 0, "")


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


def augment(image, caption, rng):
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
            image = augment(image, self.texts[number], np.random.default_rng([self.augment, epoch, number]))
        sample = {"pixel_values": rows.image_tensor(image, self.image_size)}  # [3,s,s]
        return ({**sample, "ids": self.ids[number]} if self.ids else sample), picture


# --- --check-data ------------

def check_data(data, load_tokenizer, absent="", skip_bad=0.0, workers=2, **reading):
    """--check-data: print what is there; exit code 1 when training would fail. No weight is loaded.

    load_tokenizer: function that gives the tokenizer, which says what is cut; absent: what else is missing, and the ways to it, "" where
    nothing is; reading: as for read_data."""
    splits, failed = {}, False
    for split in [s for s in ("train", "val", "test") if s != "test" or split_file(data, s).is_file()]:
        try:
            splits[split] = read_data(data, split, skip_bad=skip_bad, workers=workers, **reading)
        except DataError as error:
            print(f"{split}: error: {error}")
            failed = True
            continue
        texts = [text for p in splits[split] for text in p.captions]
        lengths = sorted(len(words_of(text)) for text in texts)
        print(f"{split}: {len(set(texts))} different captions of {lengths[0]} to {lengths[-1]} {unit_of(texts)}, half up to "
              f"{lengths[len(lengths) // 2]}; {sum(bool(LEFT_RIGHT.search(t)) for t in texts)} say left or right")
        for path, reason in rows.verify_images(splits[split], max(1, workers)) if not skip_bad else []:
            print(f"broken image: {path}: {reason}")
            failed = True
    shared = rows.shared_images(splits)
    for image, homes in list(shared.items())[:10]:
        print(f"in {' and '.join(homes)}: {image}")
    if len(shared) > 10:
        print(f"... {len(shared)} pictures stand in more than one split")
    if not absent:
        check_tokens(load_tokenizer, splits)
    return rows.verdict(failed, absent)


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
