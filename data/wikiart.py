"""wikiart.py: styles of paintings as people keep them: which pictures there are, and of which style each is.

    read_data      --data in any of the layouts -> (classes, {"train": rows, "val": rows}); refuses a picture that is missing
    check_data     --check-data: decodes every picture and lists the broken ones in broken.txt, which read_data leaves out
    style_name, find_image   folders and names as lists and unpackers write them, brought together

Layouts: ArtGAN's lists (read_artgan), a classes.csv (read_subsets), STYLE/ folders, with train/ and val/ above them or without
(list_pictures). An entry is (name of the picture, style, file, line); make_rows looks for its picture and makes it a rows.Row.
"""

import functools
import hashlib
import os
import pathlib
import re
import unicodedata
from collections import Counter
from dataclasses import replace

from data import rows, tables
from engine import files
from engine.errors import DataError

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}  # folders and subsets, the first that is there
CLASSES = ("classes.csv", *(f"classes{ending}" for ending in tables.SHEETS))  # names of the table of subsets
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
PHOTOGRAPH, PER_PHOTO = "Photograph", 27  # one photograph for so many paintings
# WikiArt's 27 styles in the order of ArtGAN's style_class.txt, then photographs
WIKIART = ["Abstract Expressionism", "Action Painting", "Analytical Cubism", "Art Nouveau", "Baroque", "Color Field Painting",
           "Contemporary Realism", "Cubism", "Early Renaissance", "Expressionism", "Fauvism", "High Renaissance",
           "Impressionism", "Mannerism Late Renaissance", "Minimalism", "Naive Art Primitivism", "New Realism",
           "Northern Renaissance", "Pointillism", "Pop Art", "Post Impressionism", "Realism", "Rococo", "Romanticism",
           "Symbolism", "Synthetic Cubism", "Ukiyo-e", "Photograph"]


# --- names of styles ------------

KNOWN = {rows.label_key(name): name for name in WIKIART} | {"art nouveau modern": "Art Nouveau"}  # folder, list


def style_name(name):
    """A folder's or a list's name of a style as it is shown: 'Art_Nouveau_Modern' -> 'Art Nouveau', 'Ukiyo_e' -> 'Ukiyo-e'."""
    return KNOWN.get(rows.label_key(name)) or " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


# --- layouts ------------

def read_artgan(data, encoding="utf-8", separator=None):
    """style_class.txt ('index name' a line), style_SPLIT.csv ('path,index' a line, no header) -> (classes, {split: entries})."""
    path, names, found = os.path.join(data, "style_class.txt"), {}, {}
    for number, text in enumerate(tables.read_text(path, encoding).splitlines(), 1):
        match = re.fullmatch(r"\s*([0-9]+)[\s,]+(\S.*)", text)
        if match is None and text.strip() or match and int(match[1]) in names:
            raise DataError(f"{path}, line {number}: {tables.excerpt(text)} is not 'index name' with an index of its own")
        if match:
            names[int(match[1])] = style_name(match[2])
    if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
        raise DataError(f"{path}: the indices must be 0 to {len(names) - 1} and the names all different")
    classes = [names[index] for index in range(len(names))]
    for split in SPLITS:
        path, found[split] = os.path.join(data, f"style_{split}.csv"), []
        text = tables.read_text(path, encoding)
        for line, values in tables.split_lines(path, text, tables.pick_separator(path, text, separator)):
            index = values[-1].strip()
            if len(values) != 2 or not re.fullmatch("[0-9]+", index):
                raise DataError(f"{path}, line {line}: {tables.excerpt(values)} is not 'path,index of the class'")
            if int(index) >= len(classes):
                raise DataError(f"{path}, line {line}: class {index}, but style_class.txt ends at {len(classes) - 1}")
            found[split].append((values[0].strip(), classes[int(index)], path, line))
    return classes, found


def read_subsets(path, encoding, separator, log):
    """A classes.csv, .xlsx ... with the columns filename and subset -> (classes, {split: entries}); other subsets are left out."""
    (kind, table), found, wanted = rows.read_file(path, encoding, separator), {}, {"picture": "filename", "split": "subset"}
    columns = rows.find_columns(path, table[0][1], wanted)
    if columns != wanted:
        log(f"{path}: {kind}{rows.told_columns(columns, wanted)}")
    table = [(line, {wanted[what]: tables.cell(f"{path}, {tables.locate(path, line)}", cells, column, what)
                     for what, column in columns.items()}) for line, cells in table]
    count = Counter(cells["subset"].strip() for _, cells in table)
    for split, wanted in SPLITS.items():
        subset = next((name for name in wanted if count[name]), None)
        if subset is None:
            raise DataError(f"{path}: no row of the subset {' or '.join(wanted)}; it has {tables.excerpt(', '.join(count), 300)}")
        chosen = [(line, cells["filename"].strip()) for line, cells in table if cells["subset"].strip() == subset]
        for line, name in chosen:
            if not re.search(r"[^\\/][\\/]", name):
                raise DataError(f"{path}, {tables.locate(path, line)}: {tables.excerpt(name)} has no folder, which names the style")
        found[split] = [(name, style_name(re.split(r"[\\/]", name)[0]), path, line) for line, name in chosen]
        del count[subset]
    if count:
        log(f"{path}: left out the subsets {rows.histogram(count.elements())}")
    return sorted({style for entries in found.values() for _, style, _, _ in entries}), found


def is_picture(place, name):
    """Does this file have a picture's name? DataError: it is not UTF-8, so that it can be neither printed nor listed."""
    if not name.lower().endswith(SUFFIXES) or name.startswith("."):
        return False
    path = os.path.join(place, name)
    if re.search("[\ud800-\udfff]", path):
        raise DataError(f"{tables.excerpt(path, 300)}: this name is not UTF-8: rename it")
    return True


def list_pictures(root, folder=""):
    """Entries of the pictures in root/folder/STYLE/, named from root."""
    found = []
    for style in sorted(rows.entries(os.path.join(root, folder))):
        place = os.path.join(root, folder, style)
        names = sorted(name for name in rows.entries(place) if is_picture(place, name))
        # composed accents, so that the split by hash is the same on every system
        found += [(unicodedata.normalize("NFC", os.path.join(folder, style, name)), style_name(style), root, 0) for name in names]
    if not found:
        raise DataError(f"{os.path.join(root, folder)}: no STYLE/ folder with pictures in it ({', '.join(SUFFIXES)}), no "
                        "style_train.csv and no classes.csv: check --data")
    return found


# --- pictures ------------

def spellings(name):
    """What is left of a file name when accents are taken off, and when they are dropped since they were garbled (grã©goire).

    Letters that are not Latin stay: two Chinese names must not become the same nothing."""
    name = re.sub(r"#U([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), name)  # what Info-ZIP's unzip makes of them
    # dropped: Latin beyond a to z, punctuation, symbols, U+FFFD; kept: Greek, Cyrillic, ..., Chinese, ...
    dropped = r"[^a-z0-9.\u0370-\u1fff\u2e80-\ud7ff\uf900-\ufeff\U00010000-\U0010ffff]"
    return {re.sub(dropped, "", unicodedata.normalize(form, name).casefold()) for form in ("NFKD", "NFC")}


def find_image(root, name, listings, nearest, suffixes=(), homes=None):
    """rows.find_picture, but before other folders are searched, once more in the folder of the style's other name and without
    accents. homes: {style_name: folder}."""
    try:
        return rows.resolve_image(root, name, listings, nearest), True
    except DataError:
        *folders, file = re.split(r"[\\/]", name)
        folders[:1] = [homes.get(style_name(first), first) for first in folders[:1]]
        place = os.path.join(root, *folders)
        if ("accents", place) not in listings:
            known = listings["accents", place] = {}
            for entry in rows.entries(place):
                for spelling in spellings(entry):
                    known.setdefault(spelling, set()).add(entry)
        close = set().union(*(listings["accents", place].get(s, ()) for s in spellings(file)))
        for entry in [file, *close] if len(close) < 2 else [file]:
            try:
                return rows.resolve_image(root, "/".join([*folders, entry]), listings, False), True
            except DataError:
                pass
        return rows.find_picture(root, name, listings, nearest, suffixes, anywhere=not (folders and os.path.isdir(place)))


def make_rows(entries, root):
    """Entries (name, style, file, line) -> rows.Row whose style is the class; question and answer stay empty."""
    homes, made = {style_name(entry): entry for entry in sorted(rows.entries(root))}, []
    found = rows.find_pictures((name for name, *_ in entries), root, find=functools.partial(find_image, homes=homes))
    for name, style, file, line in entries:
        image, fault = found[name]
        if image and not os.path.getsize(image):
            fault = f"image {tables.excerpt(name)} has 0 bytes"
        made.append(rows.Row(image, name, "", "", "", style, line, file, fault))
    return made


def hold_out(read, share, validation, same):
    """rows.hold_out within each style, so that the rarest have validation pictures too; a style's only picture is trained on. A copy of a
    picture, be it one of another style, goes where the first of their names goes. same: rows.copies of them."""
    firsts, styles = {}, {}

    def picture(row):
        return same.get(row.image, row.image) or row.name

    for row in read:
        styles.setdefault(row.style, [])
        firsts[picture(row)] = min(row, firsts.get(picture(row), row), key=lambda one: one.name)
    for row in firsts.values():
        styles[row.style].append(row)
    chosen = {picture(row) for group in styles.values()
              for row in (rows.hold_out(group, share, validation, same={}) if len(group) > 1 else group[validation:])}
    place = {style: number for number, style in enumerate(styles)}
    return [row for row in sorted(read, key=lambda row: place[row.style]) if picture(row) in chosen]


def add_photos(folder, classes, splits, log):
    """The class Photograph: one for 27 paintings of a split, in the order of their names' hashes, none in both."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: there is no such folder: check --photos")
    names = [os.path.relpath(os.path.join(place, name), folder) for place, _, files in os.walk(folder) for name in files
             if is_picture(place, name)]
    names.sort(key=lambda name: hashlib.sha256(unicodedata.normalize("NFC", name).encode()).digest())
    wanted = {split: max(1, round(len(read) / PER_PHOTO)) for split, read in splits.items()}
    if len(names) < sum(wanted.values()):
        raise DataError(f"{folder}: {len(names)} photographs where {sum(wanted.values())} are wanted, one for {PER_PHOTO} "
                        "paintings: check --photos")
    for split, count in wanted.items():
        chosen, names = names[:count], names[count:]
        read = make_rows([(name, PHOTOGRAPH, folder, 0) for name in chosen], folder)
        splits[split] = splits[split] + [replace(row, name=f"{PHOTOGRAPH}/{row.name}") for row in read]
        log(f"{split}: {count} photographs of {folder}")
    return classes if PHOTOGRAPH in classes else [*classes, PHOTOGRAPH]


# --- both splits ------------

def table_of(place):
    """The table of subsets: `place` itself or one of CLASSES in it, "" without any. DataError: several."""
    found = [path for path in (os.path.join(place, name) for name in CLASSES) if os.path.isfile(path)]
    if len(found) > 1:
        raise DataError(f"{place}: {' and '.join(found)} are there, and each could be the table: move all but one away")
    return place if os.path.isfile(place) else "".join(found)


def read_lists(place, images=None, encoding="utf-8", separator=None, val_share=0.1, photos=None, log=print):
    """(classes, {split: rows}) in whichever layout `place` (--data) is; faults of single pictures stay in the rows."""
    if not os.path.exists(place):
        raise DataError(f"{place}: there is no such file or folder: check --data")
    if {"style_train.csv", "style_val.csv", "style_class.txt"} & set(rows.entries(place)):
        layout, table = "ArtGAN's lists", os.path.join(place, "style_train.csv")
        classes, found = read_artgan(place, encoding, separator)
    elif table := table_of(place):
        layout, (classes, found) = "a table of subsets", read_subsets(table, encoding, separator, log)
    else:
        there = {name.lower(): name for name in rows.entries(place) if os.path.isdir(os.path.join(place, name))}  # Train/, too
        folders = {split: next((there[name] for name in names if name in there), "") for split, names in SPLITS.items()}
        if bool(folders["train"]) != bool(folders["val"]):
            raise DataError(f"{place}: only one of train/ and val/ is there")
        layout, table = "a folder per style", None
        found = {split: list_pictures(place, folder) for split, folder in folders.items()}
        classes = sorted({style for entries in found.values() for _, style, _, _ in entries})
    others = rows.one_spelling([style for entries in found.values() for _, style, _, _ in entries], log=log)
    classes = [name for name in classes if name not in others]
    found = {split: [(name, others.get(style, style), *where) for name, style, *where in entries] for split, entries in found.items()}
    if not found["train"] or not found["val"]:
        raise DataError(f"{place}: no training or no validation rows")
    if images and table is None:
        raise DataError(f"--images {images}: {place} has a folder per style with its pictures: leave --images out")
    root = rows.image_root(table, images, "", found["train"][0][0]) if table else place
    if table is None and not folders["train"]:
        read = make_rows(found["train"], root)
        same = rows.copies((row.image for row in read), log)
        splits = {split: hold_out(read, val_share, split == "val", same) for split in ("train", "val")}
        if not splits["val"]:
            raise DataError(f"{place}: no style has a second picture: nothing can be held out for validation")
    else:
        read = make_rows(found["train"] + found["val"], root)  # at once: one file cannot be the picture of two styles
        splits = {"train": read[:len(found["train"])], "val": read[len(found["train"]):]}
    log(f"{place}: {layout}, pictures in {root}")
    return (add_photos(photos, classes, splits, log) if photos else classes), splits


def broken_list(data):
    """The file that --check-data writes: a name, a tab and the reason on each line."""
    return pathlib.Path(data if os.path.isdir(data) else os.path.dirname(data) or ".") / "broken.txt"


def read_data(data, log=print, **reading):
    """(classes, {split: rows}), without the pictures that broken.txt names. DataError for any other that is missing or empty.

    reading: as for read_lists."""
    classes, splits = read_lists(data, log=log, **reading)
    path = broken_list(data)
    try:
        listed = {line.split("\t")[0] for line in path.read_text("utf-8-sig").splitlines()} if path.exists() else set()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8: write it anew with --check-data") from None
    for split, read in splits.items():
        left_out = [row.name for row in read if row.name in listed]
        good = splits[split] = [row for row in read if row.name not in listed]
        if left_out:
            log(f"{split}: {len(left_out)} of {len(read)} pictures left out, {path} lists them: {', '.join(left_out[:10])}"
                + (" ..." if len(left_out) > 10 else ""))
        faults = [f"{rows.locate(row.file, row.line) + ': ' if row.line else ''}{row.fault}" for row in good if row.fault]
        if faults or not good:
            listed_all = f"all are listed in {path}"
            raise DataError(f"{read[0].file}: {len(faults) or len(read)} of {len(read)} pictures cannot be used: "
                            f"{' | '.join(faults[:5]) or listed_all}: mend them, check --images, or let --check-data list them: "
                            "training will leave them out")
        none = [name for name in classes if not any(row.style == name for row in good)]
        log(f"{split}: {len(good)} pictures, {len(classes) - len(none)} of {len(classes)} classes"
            + (f"; none of {', '.join(none)}" if none else ""))
    return classes, splits


def check_data(data, workers, **reading):
    """--check-data: decode everything, write broken.txt, print what is there. No weight is loaded."""
    classes, splits = read_lists(data, **reading)
    path, faults = broken_list(data), {}
    try:
        files.refuse_unwritable(path)  # now, and not after an hour of decoding; where nothing is broken, nothing is written
    except DataError as error:
        print(f"{error}: what is broken can be named here alone, and training will not know of it")
    for split, read in splits.items():
        decoded = dict(rows.verify_images([row for row in read if not row.fault], max(1, workers)))
        faults |= {row.name: row.fault or decoded[row.image] for row in read if row.fault or row.image in decoded}
        good = [row for row in read if row.name not in faults]
        if not good:
            raise DataError(f"{split}: none of {len(read)} pictures can be read, first {faults[read[0].name]}: check --data and "
                            "--images")
        print(f"{split}: {len(good)} of {len(read)} pictures can be read: {rows.histogram((row.style for row in good), 30)}")
    for name, reason in faults.items():
        print(f"broken: {name}: {reason}")
    for image, names in list(rows.shared_images(splits).items())[:10]:
        print(f"in {' and '.join(names)}: {image}")
    if faults or path.exists() and path.read_bytes():
        with files.whole_file(path) as file:
            file.writelines(f"{name}\t{' '.join(reason.split())}\n" for name, reason in faults.items())
        print(f"{len(faults)} broken pictures listed in {path}: training leaves them out")
    print("training can start")
