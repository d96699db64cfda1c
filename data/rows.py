"""Tables and images: reading them, checking them, and turning a picture into the tensor BLIP-2 wants.

What the training and evaluation scripts must agree on, as plain functions:

    read_split, describe_layout             a split in any of LAYOUTS -> rows; what it was understood as
    read_layout                             both of these from one reading; tables.py reads the files
    find_columns, alike                     columns by name, in whatever case
    draw_answer                             the answer of several that an epoch trains on
    join_semart                             styles from a column of SemArt's table
    find_pictures                           names in a list -> paths below a root, also where the folders differ
    unify_spelling, one_spelling            Pop Art and pop_art are one style
    resolve_image, load_image, image_tensor a name as it is written -> a path -> RGB pixels -> [3, size, size]
    refuse_other_pixels                     a batch that somebody made in another way
    check_rows, usable_rows, verify_images  which rows cannot be used, and why
    hold_out, copies                        a validation split of one table; the same picture under other names
    picture_digests, sizes_hash             which pictures these are, whatever they are called
    summary, shared_images                  what --check-data prints

Bad input raises DataError, whose text is one line that names the file, the row and what to do about it.
"""

import contextlib
import difflib
import filecmp
import hashlib
import os
import re
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from data import vqa
from data.tables import FRAME, SHEETS, cell, excerpt, locate, read_frame, read_json, read_sheet, read_table, read_text, unfold
from engine.errors import DataError

BLIP_MEAN, BLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

COLUMNS = {name: name for name in ("image", "question", "answer", "question_type", "style", "question_id")}  # our name: the file's
OPTIONAL = ("question_type", "style", "question_id", "context")  # context only where it is asked for
LAYOUTS = (("AQUA-like", "image question answer need_external_knowledge"),  # the first whose columns are all there
           ("ArtQuest-like", "image question answer question_type"), ("plain", "image question answer"),
           ("LLaVA conversations", "conversations"), ("messages and images", "messages"), ("ImageFolder", "file_name"))
TURNS_IN = {"LLaVA conversations": "conversations", "messages and images": "messages"}
METADATA = ("metadata.csv", "metadata.jsonl")  # of HuggingFace's ImageFolder
BRIGHTEST = 50  # more than any normalisation makes of white, less than any picture's brightest of 255
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF orientation (tag 0x0112): what brings the picture upright


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one picture; `fault` says why the picture's path was refused or not found ("" if fine)."""
    image: str  # absolute path, "" where fault is set
    name: str  # the picture as the table names it
    question: str
    answer: str
    question_type: str
    style: str
    line: int  # line of the file on which the row starts, 1 = the header; in a .json file the row's number
    file: str
    fault: str = ""
    question_id: str = ""  # as VQA evaluators know it; "" = `number`
    number: int | None = None  # of the row in its table from 0, whatever is left out or held out
    context: str = ""  # text that goes before the question
    answers: tuple = ()  # of all people who were asked, where there are several; `answer` is the commonest

    @property
    def people(self):
        """The answers of all people who were asked, or the one there is: for metrics.vqa_accuracy."""
        return self.answers or (self.answer.strip(),)

    @property
    def trained_on(self):
        """The answers that training draws from, each as often as people gave it, or the one there is; of several, no empty one."""
        return tuple(text.strip() for text in self.answers if text.strip()) or (self.answer,)

    @property
    def answers_differ(self):
        """Are there different answers among trained_on?"""
        return len(set(self.trained_on)) > 1


# --- splits ------------

def entries(folder):
    """The names in `folder`, none where it cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def metadata_names(split):
    """METADATA in the folder of a split, which HuggingFace calls validation, too."""
    return [f"{folder}/{name}" for folder in ((split, "validation") if split == "val" else (split,)) for name in METADATA]


def table_names(split):
    """Names that the table of a split may have in its folder.

    A metadata file in the folder itself holds the training split, as Hugging Face's ImageFolder has it."""
    names = [f"{split}.csv", f"{split}.tsv", f"artquest_{split}.csv", f"{split}.json", f"{split}.jsonl", *metadata_names(split),
             *(split + ending for ending in SHEETS), *vqa.table_names(split)]
    return names + (list(METADATA) if split == "train" else [])


def find_table(folder_or_file, split):
    """The file of a split: the one given, else the one of table_names that is in the folder. DataError: none, or more than one."""
    place = str(folder_or_file)
    if not os.path.isdir(place):
        if not os.path.exists(place):
            raise DataError(f"{place}: there is no such file or folder: check --data")
        return place
    wanted = table_names(split)
    found = [name for name in wanted if os.path.isfile(os.path.join(place, name))]
    if len(found) > 1:
        raise DataError(f"{place}: {' and '.join(found)} are there, and each could be the {split} split: move all but one away")
    if found:
        return os.path.join(place, found[0])
    there = sorted(entries(place))
    listed = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    raise DataError(f"{place}: none of {', '.join(wanted)} is there; it holds {listed or 'nothing'}: check --data")


def plain_name(column):
    return re.sub(r"[\s-]+", "_", column.strip().casefold())


def alike(path, column, columns, strict=False):
    """The file's column of this name: exactly, else the only one that differs in case and blanks alone (Excel's Question Type), else
    None. DataError: several; strict: also beside the exact one, where no --columns can tell them apart."""
    found = [one for one in columns if plain_name(one) == plain_name(column)]
    if len(found) > 1 and (strict or column not in columns):
        raise DataError(f"{path}: {excerpt(column)} could be any of the columns {excerpt(', '.join(found))}: rename all but one")
    return column if column in columns else found[0] if found else None


def find_columns(path, available, wanted):
    """{what it holds: the file's column} of `wanted`, {what it holds: its usual name}. DataError: as alike; names all that are missing."""
    found = {what: alike(path, column, available, strict=True) for what, column in wanted.items()}
    lacking = [f"no column {excerpt(wanted[what])} for the {what}" for what, column in found.items() if column is None]
    if lacking:
        raise DataError(f"{path}: {' and '.join(lacking)}; it has {excerpt(', '.join(available), 300)}: rename or add what is missing")
    return found


def told_columns(found, usual):
    """What is to be said of the columns that are not named as usual: ", column Image for the image", "" of none."""
    taken = [f"{column} for the {what}" for what, column in found.items() if column and column != usual[what]]
    return f", column {', '.join(taken)}" if taken else ""


def map_columns(path, available, columns):
    """Our column names -> the file's, None for an optional column that the file lacks. DataError: names all that must be there."""
    mapped = {**COLUMNS, **columns}
    unknown = sorted(set(mapped) - {*COLUMNS, *OPTIONAL})
    if unknown:
        raise DataError(f"{path}: --columns {unknown[0]}=... is unknown: the names are {', '.join(COLUMNS)}")
    found = {name: alike(path, column, available) for name, column in mapped.items()}
    # an optional column must exist only where it was asked for
    lacking = [name for name, column in found.items() if column is None and (name not in OPTIONAL or name in columns)]
    if lacking:
        told = " and ".join(f"no column {excerpt(mapped[name])} for the {name}" for name in lacking)
        raise DataError(f"{path}: {told}: pass --columns {' '.join(f'{name}=NAME' for name in lacking)}, NAME being one of "
                        f"{excerpt(', '.join(available), 300)}")
    return found


def recognise(keys):
    """The first of LAYOUTS whose keys are all among `there`, those of a first row and those renamed; else "plain"."""
    return next((name for name, needed in LAYOUTS if set(needed.split()) <= set(keys)), "plain")


def image_root(path, images, layout, first):
    """The folder that pictures are named from: `images`, else images/ beside the file, else the file's own folder.

    The last also in ImageFolder, and where the `first` name has images/ in it already."""
    folder = os.path.dirname(path) or "."
    inner = os.path.join(folder, "images")
    named_so = first.startswith("images/") and not os.path.isdir(os.path.join(inner, "images"))
    beside = layout.startswith("ImageFolder") or named_so or not os.path.isdir(inner)
    root = str(images) if images else folder if beside else inner
    if not os.path.isdir(root):
        raise DataError(f"{root}: there is no such image folder: check --images")
    return root


def read_file(path, encoding, separator):
    """(the kind of file, [(line, {column: value})])."""
    kind = path.rpartition(".")[2].lower()
    if kind == "json":
        text = read_text(path, encoding)
        if vqa.is_questions(text):
            other, table = vqa.read_pair(path, text, encoding)
            return f"VQAv2 with {os.path.basename(other)}", table
    if kind in ("json", "jsonl"):
        return read_json(path, encoding, vqa.unpack)
    if f".{kind}" in SHEETS:
        return read_sheet(path)
    return "TSV" if kind == "tsv" else "CSV", read_table(path, encoding, separator)


def read_cells(path, kind, table, columns):
    """(layout and kind of file, what else is to be said, [(line, {our name: text}, and under "answers" those of several people)]).
    kind, table: of read_file."""
    table = [(f"{path}, {locate(path, line)}", line, cells) for line, cells in table]
    layout = recognise([*columns, *table[0][2]])
    if layout in TURNS_IN:
        table = [(where, line, flat) for where, line, cells in table for flat in unfold(where, cells, TURNS_IN[layout])]
    if layout == "ImageFolder":
        columns = {"image": "file_name", **columns}
    answer = columns.get("answer", "answer")
    people = [vqa.answers_of(where, cells, answer) for where, _, cells in table]
    if any(people):
        table = [(where, line, vqa.single(cells, answers, answer)) for (where, line, cells), answers in zip(table, people)]
        if "answer_type" in table[0][2]:  # yes/no, number, other: by which VQAv2's tables are divided
            columns = {"question_type": "answer_type", **columns}
    mapped = map_columns(path, dict.fromkeys(key for _, _, cells in table for key in cells), columns)
    filled = [(line, {name: cell(where, cells, column, name, needed=name not in OPTIONAL, null="")
                      for name, column in mapped.items()} | {"answers": answers})
              for (where, line, cells), answers in zip(table, people)]
    said = "".join(f", no {name}" for name in ("question_type", "style") if mapped[name] is None)
    said += told_columns(mapped, {**COLUMNS, **columns}) + told_answers(people)
    return f"{layout} {kind}", said, filled


def told_answers(people):
    """What is to be said of tuples of answers, () where a row has one; "" where all have."""
    if not any(people):
        return ""
    counts, empty = sorted({len(answers) or 1 for answers in people}), sum(not text.strip() for answers in people for text in answers)
    return (f", {'-'.join(dict.fromkeys(map(str, (counts[0], counts[-1]))))} answers a question: each epoch of training draws one, by how "
            f"many gave it{f' ({empty} are empty and never drawn)' if empty else ''}; VQA accuracy is over all")


def is_frame(source):
    """Is it no path but the rows themselves, a DataFrame or a list of dicts?"""
    return not isinstance(source, (str, os.PathLike))


def read_layout(source, split, columns=None, images=None, encoding="utf-8", separator=None):
    """(read_split's rows, describe_layout's line) from one reading."""
    path = FRAME if is_frame(source) else find_table(source, split)
    kind, table = read_frame(source) if is_frame(source) else read_file(path, encoding, separator)
    kind, said, table = read_cells(path, kind, table, columns or {})
    root = image_root(path, images, kind, table[0][1]["image"])
    found, rows = find_pictures((values["image"] for _, values in table), root), []
    for line, values in table:
        name = values.pop("image")
        image, fault = found[name]
        rows.append(Row(image=image, name=name, line=line, file=path, fault=fault, number=len(rows), **values))
    return rows, f"{path}: {kind}, {len(rows)} rows{said}, images in {root}"


def read_split(source, split, columns=None, images=None, encoding="utf-8", separator=None):
    """Read one split as a list of Row. source: a folder, a file, a pandas DataFrame or a list of dicts; `columns` maps our names to
    the file's where they differ.

    Pictures are looked for under image_root; a path that is refused or not found becomes the row's `fault`, which
    check_rows reports. DataError: as read_table and read_json, and a missing split, column, key, root."""
    return read_layout(source, split, columns, images, encoding, separator)[0]


def describe_layout(source, split, columns=None, images=None, encoding="utf-8", separator=None):
    """What a split is understood as, in one line. DataError: as read_split."""
    return read_layout(source, split, columns, images, encoding, separator)[1]


def join_semart(rows, path, fields=None, encoding="latin-1", log=print):
    """(rows with `fields` (our name: SemArt's column; default style: SCHOOL) filled by image name, rows matched).

    Unmatched rows get "" there. DataError: as read_file and find_columns, a field that is not one, no match at all."""
    fields, path = fields or {"style": "SCHOOL"}, str(path)
    unknown = sorted(set(fields) - set(OPTIONAL))
    if unknown:
        raise DataError(f"{path}: {excerpt(unknown[0])} cannot be filled from it: choose from {', '.join(OPTIONAL)}")
    catalogue, wanted = read_file(path, encoding, None)[1], {"image": "IMAGE_FILE", **fields}
    columns = find_columns(path, catalogue[0][1], wanted)
    if columns != wanted:
        log(f"{path}: {told_columns(columns, wanted).removeprefix(', ')}")
    image, fields = columns.pop("image"), columns
    catalogue = [(line, {column: cell(f"{path}, {locate(path, line)}", cells, column, name) for name, column in
                         [("image", image), *fields.items()]}) for line, cells in catalogue]
    known = {folded(cells[image]): cells for _, cells in catalogue}
    found = [known.get(folded(re.split(r"[\\/]", row.name)[-1])) for row in rows]
    matches = sum(cells is not None for cells in found)
    if not matches:
        ours, theirs = [row.name for row in rows[:3]], [cells[image] for _, cells in catalogue[:3]]
        raise DataError(f"{path}: no picture of the rows ({excerpt(', '.join(ours), 200)} ...) is in its IMAGE_FILE "
                        f"({excerpt(', '.join(theirs), 200)} ...): give SemArt's table of the same split")
    return [replace(row, **{name: cells[column].strip() if cells else "" for name, column in fields.items()})
            for row, cells in zip(rows, found)], matches


# --- answers of several people ------------

def draw_answer(row, *seed):
    """The row with one of trained_on as its answer: a pure function of the row and of whole numbers.

    Each answer comes as often as people gave it. So the mean gradient is that of LAVIS's loss, which trains on every answer of a question,
    weighed by the share of the people who gave it, at the cost of one answer and with a batch of as many questions."""
    if not row.answers_differ:
        return row
    return replace(row, answer=row.trained_on[int(np.random.default_rng(seed).integers(len(row.trained_on)))])


# --- labels: styles and question types ------------

def label_key(name):
    """What is the same for all spellings of a style or a question type: Pop Art, pop art, Pop_Art, pop-art."""
    return re.sub(r"[\s_-]+", " ", folded(name))


def one_spelling(labels, known=(), log=print, what="styles"):
    """{spelling: the one that stands for it}, for those that change, among labels of one label_key.

    labels: of every row; one in `known` stays; the spelling there, else the commonest stands for all (ties: the first in the
    alphabet)."""
    exact, known = set(known), {label_key(name): name for name in known}
    spelled = {}
    for label, count in Counter(label.strip() for label in labels).items():
        spelled.setdefault(label_key(label), {})[label] = count
    chosen = {key: known.get(key) or min(counts, key=lambda label: (-counts[label], label)) for key, counts in spelled.items()}
    others = {label: chosen[key] for key, counts in spelled.items() for label in counts if label not in (chosen[key], *exact)}
    if others:
        log(f"{what} that differ by case, blanks, _ and - only are one: "
            + ", ".join(f"{label} is {others[label]}" for label in sorted(others)))
    return others


def unify_spelling(rows, known=(), log=print, field="style"):
    """The rows with one_spelling of each style, or of another field."""
    others = one_spelling([getattr(row, field) for row in rows], known, log, f"{field.replace('_', ' ')}s")
    chosen = [others.get(label, label) for label in (getattr(row, field).strip() for row in rows)]
    return [row if getattr(row, field) == label else replace(row, **{field: label}) for row, label in zip(rows, chosen)]


# --- paths ------------

class NotThere(DataError):
    """No picture has this path: it may have another one. Refused paths are plain DataErrors, and nothing else is tried for them."""


def folded(name):
    """`name` without what differs between systems: letter case, Unicode form (NFC/NFD), outer spaces."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())


def match_entry(folder, part, listings):
    """The entry of `folder` that is `part` exactly, else the only one equal but for folding, else None."""
    if os.path.lexists(os.path.join(folder, part)):
        return part
    if folder not in listings:
        listings[folder] = {}
        for entry in entries(folder):
            listings[folder].setdefault(folded(entry), []).append(entry)
    alike = listings[folder].get(folded(part), [])
    if len(alike) > 1:
        raise DataError(f"{excerpt(part)} could be any of {excerpt(sorted(alike))} in {folder}: name it exactly")
    return alike[0] if alike else None


def real_root(root, listings):
    """os.path.realpath of an image root, which asks the disk for every folder on the way, once for all its pictures."""
    if ("real", root) not in listings:
        listings["real", root] = os.path.realpath(root)
    return listings["real", root]


def parts_of(name):
    """Folders and file of a path of any system."""
    return [part for part in re.split(r"[\\/]", name) if part not in ("", ".")]


def resolve_image(root, name, listings=None, nearest=True):
    """The absolute path of picture `name` under folder `root`, which it may not leave, not even by a symlink.

    `listings` is a dict that keeps folder listings between calls. DataError: a path that leaves the root, a URL, NUL,
    no regular file, no match (NotThere) or several (names are also matched without case, Unicode form and outer spaces)."""
    listings = {} if listings is None else listings
    parts = parts_of(name)
    if not name.strip():
        raise DataError("empty image name")
    if "\0" in name or "://" in name or name.startswith("data:"):
        raise DataError(f"image {excerpt(name)} is a URL or holds a NUL: give a file name relative to --images")
    if re.match(r"\s*([\\/]|[A-Za-z]:[\\/])", name) or ".." in [part.strip() for part in parts]:
        raise DataError(f"image {excerpt(name)} is absolute or holds '..': give a file name relative to --images")
    path = root = real_root(root, listings)
    for part in parts:
        entry = match_entry(path, part, listings)
        if entry is None:
            close = difflib.get_close_matches(folded(part), listings[path], 1, 0.5) if nearest else []
            hint = f", nearest is {excerpt(listings[path][close[0]][0])}" if close else ""
            raise NotThere(f"image {excerpt(name)} is not there (no {excerpt(part)} in {path}{hint})")
        path = os.path.join(path, entry)
    real = os.path.realpath(path)
    if os.path.commonpath([root, real]) != root:
        raise DataError(f"image {excerpt(name)} is a link that leaves {root}: copy the file or point --images elsewhere")
    if not os.path.isfile(real):
        raise DataError(f"image {excerpt(name)} is not a regular file in {root}: a folder, device or broken link")
    return real


def files_below(root, listings):
    """{file name, folded: its paths relative to root}, read once; links to folders are not followed."""
    if ("below", root) not in listings:
        known = listings["below", root] = {}
        for folder, _, files in os.walk(root):
            for file in files:
                known.setdefault(folded(file), []).append(os.path.relpath(os.path.join(folder, file), root))
    return listings["below", root]


def is_folder(root, parts, listings):
    """Is there a folder of this path, matched as names are?"""
    for part in parts:
        entry = match_entry(root, part, listings)
        root = os.path.join(root, entry or "")
        if entry is None or not os.path.isdir(root):
            return False
    return True


def by_name(root, parts, spellings, listings):
    """The path relative to root of the only picture below it that has one of these file names, None without any.

    Of several the one whose own folder is named so as well counts. DataError: still several."""
    known = files_below(root, listings)
    found = [path for spelling in spellings for path in known.get(folded(spelling), [])]
    found = [path for path in found if os.path.basename(path) == parts[-1]] or found
    if len(found) > 1:
        found = [path for path in found if path.split(os.sep)[-2:-1] == parts[-2:-1] != []] or found
    if len(found) > 1:
        raise DataError(f"image {excerpt('/'.join(parts))} is not there, and could be any of {excerpt(', '.join(sorted(found)), 200)} in "
                        f"{root}: name its folder as it is, or point --images at the right one")
    return found[0] if found else None


def find_picture(root, name, listings, nearest=True, suffixes=(), anywhere=True):
    """(absolute path, whether it lies where the name says) of a picture that may lie in other folders than its name says.

    Looked for as it is written, then with leading folders dropped, then by its file name alone, which only one picture below the
    root may have; in another folder not where its own is there: what that lacks is missing, and the other folder's picture of this
    name is another picture. suffixes: others that the file may have; anywhere: whether all folders are searched. DataError: as
    resolve_image; in several folders."""
    try:
        return resolve_image(root, name, listings, False), True
    except NotThere:
        root, parts = real_root(root, listings), parts_of(name)
    spellings = list(dict.fromkeys([parts[-1], *(os.path.splitext(parts[-1])[0] + suffix for suffix in suffixes)]))
    homes = [parts[dropped:-1] for dropped in range(len(parts) - 1)]
    for home in [parts[:-1], *homes[1:]] + ([] if anywhere else [[]]):
        for spelling in spellings:
            try:
                return resolve_image(root, "/".join([*home, spelling]), listings, False), home == parts[:-1]
            except NotThere:
                pass
    path = by_name(root, parts, spellings, listings) if anywhere else None
    if path and os.sep in path and any(is_folder(root, home, listings) for home in homes):
        path = None
    return resolve_image(root, path or name, listings, nearest), False  # without a path: what is wrong with the name


def find_pictures(names, root, suffixes=(), find=find_picture):
    """{name: (absolute path, "") or ("", why there is none)} of the pictures that a list names, each as find_picture has it.

    What is found elsewhere than its name says is refused where another name of the list stands for the same file: one of the two
    pictures is missing then. find: a stage's own way, called like find_picture."""
    found, listings, homes, moved, missed = {}, {}, {}, [], 0
    for name in dict.fromkeys(names):
        try:  # the search for the nearest name is slow in a big folder, and five are shown
            path, as_written = find(root, name, listings, missed < 5, suffixes)
            found[name] = path, ""
            homes.setdefault(path, []).append(name)
            moved += [] if as_written else [name]
        except DataError as error:
            found[name], missed = ("", str(error)), missed + 1
    for name in moved:
        others = [other for other in homes[found[name][0]] if other != name]
        if others:
            found[name] = "", (f"image {excerpt(name)} is not there, and {excerpt(found[name][0])} has its file name but stands for "
                               f"{excerpt(others[0])} as well: name both as they lie")
    return found


# --- pixels ------------

def deep_to_grey(image):
    """16-bit, 32-bit or float grey -> 8-bit grey. 16-bit is divided by 257, so that white stays white.

    Float and 32-bit files do not say what white is: it is the first of 1 (float), 255 (float), 65535 that no value
    exceeds, else the largest value."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0)
    peaks = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((peak for peak in peaks if values.max() <= peak), values.max())
    return Image.fromarray(np.rint(values.clip(0) * (255 / white)).astype(np.uint8))


def to_rgb(image):
    """A decoded image of any mode -> a plain upright RGB image; transparent parts become white."""
    try:  # after load(): Pillow turns TIFF by itself then, and drops the tag
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # an unreadable EXIF block says nothing about the pixels
        turn = None
    if image.mode[:1] in ("I", "F"):
        image = deep_to_grey(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # the orientation tag has done its work: nobody shall turn the picture again
    return image


def load_image(path, max_pixels=178_956_970, file=None):
    """Decode the first frame of a picture as an upright RGB image, alpha on white, 16-bit scaled to 8.

    `max_pixels` is checked against the header before any pixel is decoded; above the default (about 0.5 GB as RGB)
    Pillow itself refuses. file: an open binary file that is read instead; then `path` is only its name in messages.
    DataError: missing, empty, no picture, cut off, too large."""
    try:
        if file is None and (not os.path.isfile(path) or os.path.getsize(path) == 0):
            raise DataError(f"{path}: is missing, empty (0 bytes) or no regular file: replace it")
        with Image.open(file or path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(f"{path}: {image.width} x {image.height} is over {max_pixels:,} pixels: scale it down")
            image.load()
            return to_rgb(image)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: too many pixels to be safe ({error}): scale it down") from error
    except Image.UnidentifiedImageError as error:
        with file or open(path, "rb") as opened:
            opened.seek(0)
            start = excerpt(opened.read(24))
        raise DataError(f"{path}: no picture in {', '.join(FORMATS)} (it starts with {start}): replace it") from error
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}): replace it") from error


PIXELS = 1  # raise it wherever load_image, image_tensor or cirr.prepare begin to give other pixels for the same file
RESAMPLING = Image.Resampling.BICUBIC


def preprocessing(size, fit="squashed"):
    """All that the pixels of a picture depend on beside its file, as plain values for a cache's key. fit: how it becomes a square."""
    return {"code": PIXELS, "size": size, "fit": fit, "resampling": RESAMPLING.name, "mean": BLIP_MEAN, "std": BLIP_STD,
            "Pillow": PIL.__version__}


def picture_tensor(path, size):
    """A picture's path -> float32 [3, size, size] as BLIP-2 and the style classifier take it. DataError: as load_image."""
    return image_tensor(load_image(path), size)


def image_tensor(image, size, mean=BLIP_MEAN, std=BLIP_STD):
    """RGB image -> float32 [3, size, size]: squashed to a square (bicubic, no crop), 0..1, normalised."""
    import torch  # not above: pages are drawn without it
    assert image.mode == "RGB", f"image_tensor wants RGB, got {image.mode}: use load_image"
    squashed = image.resize((size, size), RESAMPLING)
    pixels = torch.from_numpy(np.asarray(squashed, dtype=np.float32) / 255)  # [size, size, 3]
    pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)
    return pixels.permute(2, 0, 1).contiguous()  # [3, size, size]


def refuse_other_pixels(images, anywhere=True):
    """ValueError where these are certainly no pixels [B,3,h,w] in BLIP's normalisation: of another shape or kind, whole numbers, not
    finite, or 0 to 255. anywhere=False: values are looked at on a CPU alone, since on a GPU that waits for all that runs there."""
    import torch
    wanted = "images must be pixels [B,3,h,w] in BLIP's normalisation, which load_gated's processor makes of paths and pictures, got"
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"{wanted} {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"{wanted} a tensor {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{wanted} {images.dtype}")
    if images.device.type == "meta" or not anywhere and images.device.type != "cpu":
        return
    low, high = (value.item() for value in images.aminmax())
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{wanted} values that are not finite")
    if low >= 0 and high > BRIGHTEST:
        raise ValueError(f"{wanted} values from {low:g} to {high:g}, as a picture's file has them")


def tensor_image(pixels, mean=BLIP_MEAN, std=BLIP_STD):
    """The way back: float [3, h, w] normalised -> RGB image, for looking at what the model saw."""
    import torch
    colours = pixels.permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)  # [h, w, 3]
    return Image.fromarray((colours * 255).round().clamp(0, 255).byte().numpy())


# --- checks ------------

def check_rows(rows):
    """[(row, reason)] for the rows that cannot be trained on. Each picture is looked up once and none is decoded."""
    size, bad = {"": None}, []
    for row in rows:
        if row.image not in size:
            size[row.image] = os.path.getsize(row.image) if os.path.isfile(row.image) else -1
        reasons = [f"empty {name}" for name in ("question", "answer") if not getattr(row, name).strip()]
        if row.answer.strip() in ("nan", "NaN"):  # what a missing value becomes when a program writes it out
            reasons.append("the answer is NaN")
        if any(len(text.strip().splitlines()) > 1 for text in (row.answer, *row.answers)):
            reasons.append("the answer has several lines")
        if row.fault:
            reasons.append(row.fault)
        elif size[row.image] is None or size[row.image] <= 0:
            reasons.append(f"image {excerpt(row.name)} is missing or has 0 bytes")
        if reasons:
            bad.append((row, "; ".join(reasons)))
    return bad


def usable_rows(rows, skip_bad=0.0, broken=()):
    """(good rows, [(bad row, reason)]). broken: (path, reason) of pictures that verify_images found.

    DataError where more than the share skip_bad (0..1) of the rows is bad, or where none is good."""
    bad, broken = check_rows(rows), dict(broken)
    refused = {id(row) for row, _ in bad}
    bad += [(row, broken[row.image]) for row in rows if row.image in broken and id(row) not in refused]
    refused |= {id(row) for row, _ in bad}
    good = [row for row in rows if id(row) not in refused]
    if refused and (len(refused) > skip_bad * len(rows) or not good):
        firsts = {}  # one row for each different reason: a missing picture often has five questions
        for row, reason in bad:
            firsts.setdefault(reason, locate(row.file, row.line))
        listed = " | ".join(f"{where}: {reason}" for reason, where in list(firsts.items())[:5])
        advice = "mend them, check --images, or leave them out with --skip-bad" if good else "check --data and --images"
        if skip_bad and good:
            advice = (f"more than the {skip_bad:.1%} that --skip-bad allows; "
                      f"--skip-bad {len(refused) / len(rows) + 0.005:.2f} leaves them out")
        raise DataError(f"{bad[0][0].file}: {len(refused)} of {len(rows)} rows cannot be used: {listed}: {advice}")
    return good, bad


def verify_images(rows, workers=2):
    """Decode every distinct picture in `workers` threads; [(path, reason)] of the broken, in the rows' order."""
    def fault(path):
        try:
            load_image(path)
        except DataError as error:
            return str(error)

    paths = list(dict.fromkeys(row.image for row in rows if row.image))
    with ThreadPoolExecutor(workers) as pool:
        faults = list(tqdm(pool.map(fault, paths), total=len(paths), desc="decoding", unit="image", disable=None))
    return [(path, reason) for path, reason in zip(paths, faults) if reason]


def hold_out(rows, share, validation, log=print, same=None):
    """The rows of the pictures that are held out (validation), or of the others: a picture never stands on both sides, however often and
    by whichever names (a.jpg, ./a.jpg) the table has it, nor does a copy of it.

    The first `share` (0..1, at least one) of the pictures in the order of the hashes of their first names: no seed, no dependence
    on the order of the rows. same: `copies` of the rows, where they have been looked for. DataError: fewer than two pictures."""
    same = copies((row.image for row in rows), log) if same is None else same
    firsts = {}  # picture: the first of its names
    for row in rows:
        picture = same.get(row.image, row.image) or row.name
        firsts[picture] = min(row.name, firsts.get(picture, row.name))
    names = sorted(set(firsts.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(names) < 2:
        raise DataError(f"{rows[0].file}: all rows are about one picture: nothing can be held out for validation")
    out = set(names[:min(len(names) - 1, max(1, round(share * len(names))))])
    return [row for row in rows if (firsts[same.get(row.image, row.image) or row.name] in out) is validation]


def copies(paths, log=print):
    """{path: the path of the picture that it is a copy of}, byte by byte; how many is said.

    Few files have the size of another one, so that few are opened, and few of those have its digest, so that hardly one is read whole
    that is no copy. What is empty or cannot be read is none: others say so."""
    sizes, originals, found = {}, {}, {}
    for path in sorted(set(paths) - {""}):
        with contextlib.suppress(OSError):
            sizes.setdefault(os.path.getsize(path), []).append(path)
    for path in (path for size, alike in sizes.items() if size and len(alike) > 1 for path in alike):
        with contextlib.suppress(DataError, OSError):
            known = originals.setdefault(picture_digest(path), [])
            original = next((one for one in known if filecmp.cmp(one, path, shallow=False)), None)
            if original is None:
                known.append(path)
            else:
                found[path] = original
    if found:
        path, original = next(iter(found.items()))
        log(f"{len(found)} pictures are copies of others under another name, such as {path} of {original}: each stays on the side of the "
            "other")
    return found


ENDS = 2**16  # bytes; see picture_digest


def picture_digest(path):
    """16 hex digits of a picture's file: its size, first and last 64 KiB. DataError: unreadable.

    Bytes and not names, since a name says little in another folder: 0001.jpg is there in every data set, and a picture may be
    called otherwise in a second table. The two ends and not the whole, since a training shall not read a hundred GB before its
    first step; what is compressed differs there as soon as anything does. A picture that was saved anew is another one."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.sha256(f"{size} ".encode() + file.read(ENDS))
            file.seek(max(0, size - ENDS))
            found.update(file.read(ENDS))
    except OSError as error:
        raise DataError(f"{excerpt(path, 300)}: cannot be read ({error.strerror}): replace it") from None
    return found.hexdigest()[:16]


def picture_digests(paths, workers=2):
    """{path: picture_digest} of the distinct paths."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = tqdm(pool.map(picture_digest, paths), total=len(paths), desc="which pictures", unit="image", leave=False, disable=None)
        return dict(zip(paths, found))


def fingerprint(rows):
    """Short hash of everything in the rows but where they stand: tells whether a run is resumed on other data."""
    digest = hashlib.sha256()
    for r in rows:
        digest.update("\0".join((r.name, r.question, r.answer, r.question_type, r.style, r.context, *r.answers, "\n")).encode())
    return digest.hexdigest()[:16]


def sizes_hash(paths):
    """Short hash of the sizes of some pictures: tells, without reading any, whether others of the same names are taken now, be it by
    another --images or because a folder has come that goes before. DataError: one is not there."""
    digest = hashlib.sha256()
    for path in dict.fromkeys(paths):
        try:
            digest.update(f"{os.path.getsize(path)} ".encode())
        except OSError as error:
            raise DataError(f"{excerpt(path, 300)}: cannot be read ({error.strerror}): replace it") from None
    return digest.hexdigest()[:16]


def histogram(values, top=5):
    """'Baroque 40, Cubism 12, ... (23 more)': the commonest values and their counts."""
    counts = Counter(values).most_common()
    listed = ", ".join(f"{value or '(none)'} {count}" for value, count in counts[:top])
    return listed + (f", ... ({len(counts) - top} more)" if len(counts) > top else "")


def summary(rows):
    """Lines for --check-data: rows, pictures, styles; per question type the answers and a constant answer's score."""
    used = Counter(row.image or row.name for row in rows)
    lines = [f"{len(rows)} rows, {len(used)} distinct images, {len(rows) / max(len(used), 1):.1f} rows per image"]
    kinds = {}
    for row in rows:
        kinds.setdefault(row.question_type, []).append(row.answer.strip())
    for kind, answers in sorted(kinds.items()):
        best, count = Counter(answers).most_common(1)[0]
        share = 100 * count / len(answers)
        lines.append(f"{kind or '(no type)'}: {len(answers)} rows, {len(set(answers))} answers, "
                     f"constant {best!r} scores {share:.1f} % ({histogram(answers)})")
    styles = {row.style for row in rows}
    counted = f"{len(styles)} styles: {histogram((row.style for row in rows), 30)}"
    return lines + ["no style column" if styles == {""} else counted]


def verdict(failed, absent="", log=print):
    """The end of every --check-data -> its exit code: 1 where training would fail. absent: what is missing beside the data, and the ways
    to it, "" where nothing is."""
    if absent:
        log(f"error: {absent}")
    failed = failed or bool(absent)
    log("training would fail" if failed else "training can start")
    return int(failed)


def shared_images(splits):
    """{picture's path: [splits]} for the pictures that stand in more than one of `splits` = {split: rows}, as the same file or a copy."""
    homes, same = {}, copies((row.image for rows in splits.values() for row in rows), lambda line: None)
    for split, rows in splits.items():
        for image in {same.get(row.image, row.image) for row in rows if row.image}:
            homes.setdefault(image, []).append(split)
    return {image: names for image, names in sorted(homes.items()) if len(names) > 1}
