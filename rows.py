"""Tables and images: reading them, checking them, and turning a picture into the tensor BLIP-2 wants.

What the training and evaluation scripts must agree on, as plain functions:

    read_table, read_split                  a CSV or TSV file -> rows, every value kept as text
    resolve_image, load_image, image_tensor a name in a table -> a path -> RGB pixels -> [3, size, size]
    check_rows, usable_rows, verify_images  which rows cannot be used, and why
    summary, shared_images                  what --check-data prints

Bad input raises DataError, whose text is one line that names the file, the row and what to do about it.
"""

import csv
import difflib
import io
import os
import re
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

BLIP_MEAN, BLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

COLUMNS = {name: name for name in ("image", "question", "answer", "question_type", "style")}  # our name: the file's
OPTIONAL = ("question_type", "style")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SEPARATORS = {"tab": "\t", "\\t": "\t"}  # a real tab is hard to type in a shell
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF orientation (tag 0x0112): what brings the picture upright


class DataError(Exception):
    """Bad input. Scripts print it as `error: <text>` and exit with code 2."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one picture; `fault` says why the picture's path was refused or not found ("" if fine)."""
    image: str  # absolute path, "" where fault is set
    name: str  # the picture as the table names it
    question: str
    answer: str
    question_type: str
    style: str
    line: int  # line of the file on which the row starts, 1 = the header
    file: str
    fault: str = ""


# --- tables ------------

def shown(text, limit=100):
    """`text` quoted for a one-line message: line breaks, NUL and the like escaped, a long one cut in the middle."""
    quoted = repr(str(text))
    return quoted if len(quoted) <= limit else f"{quoted[:limit - 20]}...{quoted[-17:]}"


def entries(folder):
    """The names in `folder`, none where it cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def likely_encoding(data):
    """The encoding that the bytes `data` are probably in, or None where they are no text."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data.count(0) > len(data) // 4:
        return "utf-16"
    if b"\0" in data:
        return None
    try:
        data.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:  # cp1252 is latin-1 with curly quotes and dashes at 80-9f, five of them undefined
        windows = re.search(rb"[\x80-\x9f]", data) and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", data)
        return "cp1252" if windows else "latin-1"


def read_text(path, encoding):
    """The whole file as text without its byte-order mark. DataError: not a file, not `encoding`, NUL, empty."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file: give a CSV or TSV file")
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = data.decode(encoding).removeprefix("\ufeff")
        place = data.find(b"\0") if "\0" in text else -1
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check its rights") from error
    except LookupError as error:
        raise DataError(f"{path}: unknown encoding {shown(encoding)}: try utf-8, cp1252, latin-1 or utf-16") from error
    except UnicodeDecodeError as error:
        place = error.start
    if place >= 0:
        likely = likely_encoding(data)
        advice = f"the file looks like {likely}: pass --encoding {likely}"
        if likely is None:
            advice = "NUL bytes do not belong in text: save the table as CSV in UTF-8"
        elif likely == encoding or (encoding.startswith("utf-8") and not data[:place].isascii()):
            advice = f"the text before it is good {encoding}: mend that line"
        line = data.count(b"\n", 0, place) + 1
        raise DataError(f"{path}, line {line}: byte {place} is not {encoding} text: {advice}")
    if not text.strip():
        raise DataError(f"{path}: the file is empty: it needs a header line and rows")
    return text


def pick_separator(path, text, separator):
    """The separator: the one given, else a tab for .tsv, else whichever of , ; and tab cuts the header most often."""
    separator = SEPARATORS.get(separator, separator)
    if separator is None:
        header = next(line for line in io.StringIO(text, newline=None) if line.strip())
        cuts = {mark: len(next(csv.reader([header], delimiter=mark))) for mark in ",;\t"}
        return "\t" if path.lower().endswith(".tsv") else max(cuts, key=cuts.get)
    if len(separator) != 1 or separator in '"\r\n':
        raise DataError(f"{path}: --separator {shown(separator)} is not one character: pass , ; | or tab")
    return separator


def split_lines(path, text, separator):
    """Yield (line, values) for every row that is not blank; `line` is the one on which the row starts."""
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 1
    try:
        for values in reader:
            if len(values) > 1 or any(value.strip() for value in values):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: a quote opened in this row is not closed properly (noticed on line "
                        f"{reader.line_num}: {error}): remove it or double it") from error


def swallowed_row(values, separator):
    """Whether a value holds a whole further row: as many fields, with a file name like .jpg where this row has one.

    That is what a forgotten quote leaves behind when a later quote happens to close it."""
    def ending(value):
        return re.search(r"\.\w{2,5}$|$", value.strip()).group().lower()

    inner = (line.split(separator) for value in values for line in value.splitlines()[1:])
    return any(len(cells) == len(values) and any(ending(a) and ending(a) == ending(b) for a, b in zip(values, cells))
               for cells in inner)


def read_table(path, encoding="utf-8", separator=None):
    """Read a CSV or TSV file with a header as a list of (line, {column: text}); no value is converted or dropped.

    DataError: unreadable, wrong encoding, NUL, empty, no rows, a column named twice, a row with too many or too few
    fields, an open quote."""
    path = str(path)
    text = read_text(path, encoding)
    separator = pick_separator(path, text, separator)
    lines = split_lines(path, text, separator)
    header = [name.strip() for name in next(lines)[1]]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"{path}, line 1: column {shown(twice[0])} stands there twice: rename one of them")
    table = []
    for line, values in lines:
        if len(values) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} fields as in the header, found {len(values)} "
                            f"(separator {separator!r}): quote values that hold the separator, or pass --separator")
        if swallowed_row(values, separator):
            raise DataError(f"{path}, line {line}: a quote opened in this row swallows the next row: close it")
        table.append((line, dict(zip(header, values))))
    if not table:
        raise DataError(f"{path}: a header but no rows: nothing to read")
    return table


def find_table(folder_or_file, split):
    """The table of a split: the file itself, or <split>.csv, <split>.tsv or artquest_<split>.csv in the folder."""
    place = str(folder_or_file)
    if not os.path.isdir(place):
        if not os.path.exists(place):
            raise DataError(f"{place}: there is no such file or folder: check --data")
        return place
    wanted = [f"{split}.csv", f"{split}.tsv", f"artquest_{split}.csv"]
    for name in wanted:
        if os.path.isfile(os.path.join(place, name)):
            return os.path.join(place, name)
    there = sorted(entries(place))
    listed = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    raise DataError(f"{place}: none of {', '.join(wanted)} is there; it holds {listed or 'nothing'}: check --data")


def map_columns(path, there, columns):
    """Our column names -> the file's, None for an optional column that the file lacks."""
    mapped = {**COLUMNS, **(columns or {})}
    unknown = sorted(set(mapped) - set(COLUMNS))
    if unknown:
        raise DataError(f"{path}: --columns {unknown[0]}=... is unknown: the names are {', '.join(COLUMNS)}")
    for name, column in mapped.items():
        if column not in there:
            # an optional column that was renamed on purpose must exist; one left at its default need not
            if name not in OPTIONAL or column != name:
                columns_there = shown(", ".join(there), 300)
                raise DataError(f"{path}: no column {shown(column)} for the {name}: pass --columns {name}=NAME, "
                                f"NAME being one of {columns_there}")
            mapped[name] = None
    return mapped


def read_split(folder_or_file, split, columns=None, images=None, encoding="utf-8", separator=None):
    """Read one split as a list of Row. `columns` maps our names to the file's where they differ.

    Pictures are looked for under `images`, else <folder>/images, else the folder; a path that is refused or not found
    becomes the row's `fault`, which check_rows reports. DataError: as read_table, and a missing split, column, root."""
    path = find_table(folder_or_file, split)
    folder = os.path.dirname(path) or "."
    inner = os.path.join(folder, "images")
    root = str(images) if images else inner if os.path.isdir(inner) else folder
    if not os.path.isdir(root):
        raise DataError(f"{root}: there is no such image folder: check --images")
    table = read_table(path, encoding, separator)
    mapped = map_columns(path, list(table[0][1]), columns)
    found, listings, missed, rows = {}, {}, 0, []
    for line, cells in table:
        values = {ours: cells[column] if column else "" for ours, column in mapped.items()}
        name = values.pop("image")
        if name not in found:
            try:  # the search for the nearest name is slow in a big folder, and five are shown
                found[name] = resolve_image(root, name, listings, nearest=missed < 5), ""
            except DataError as error:
                found[name], missed = ("", str(error)), missed + 1
        image, fault = found[name]
        rows.append(Row(image=image, name=name, line=line, file=path, fault=fault, **values))
    return rows


# --- paths ------------

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
        raise DataError(f"{shown(part)} could be any of {shown(sorted(alike))} in {folder}: name it exactly")
    return alike[0] if alike else None


def resolve_image(root, name, listings=None, nearest=True):
    """The absolute path of picture `name` under folder `root`, which it may not leave, not even by a symlink.

    `listings` is a dict that keeps folder listings between calls. DataError: a path that leaves the root, a URL, NUL,
    no regular file, no match or several (names are also matched without case, Unicode form and outer spaces)."""
    listings = {} if listings is None else listings
    parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".")]
    if not name.strip():
        raise DataError("empty image name")
    if "\0" in name or "://" in name or name.startswith("data:"):
        raise DataError(f"image {shown(name)} is a URL or holds a NUL: give a file name relative to --images")
    if re.match(r"\s*([\\/]|[A-Za-z]:[\\/])", name) or ".." in [part.strip() for part in parts]:
        raise DataError(f"image {shown(name)} is absolute or holds '..': give a file name relative to --images")
    root = os.path.realpath(root)
    path = root
    for part in parts:
        entry = match_entry(path, part, listings)
        if entry is None:
            close = difflib.get_close_matches(folded(part), listings[path], 1, 0.5) if nearest else []
            hint = f", nearest is {shown(listings[path][close[0]][0])}" if close else ""
            raise DataError(f"image {shown(name)} is not there (no {shown(part)} in {path}{hint})")
        path = os.path.join(path, entry)
    real = os.path.realpath(path)
    if os.path.commonpath([root, real]) != root:
        raise DataError(f"image {shown(name)} is a link that leaves {root}: copy the file or point --images elsewhere")
    if not os.path.isfile(real):
        raise DataError(f"image {shown(name)} is not a regular file in {root}: a folder, device or broken link")
    return real


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


def load_image(path, max_pixels=178_956_970):
    """Decode the first frame of a picture as an upright RGB image, alpha on white, 16-bit scaled to 8.

    `max_pixels` is checked against the header before any pixel is decoded; above the default (about 0.5 GB as RGB)
    Pillow itself refuses. DataError: missing, empty, no picture, cut off, too large."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) == 0:
            raise DataError(f"{path}: is missing, empty (0 bytes) or no regular file: replace it")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(f"{path}: {image.width} x {image.height} is over {max_pixels:,} pixels: scale it down")
            image.load()
            return to_rgb(image)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: too many pixels to be safe ({error}): scale it down") from error
    except Image.UnidentifiedImageError as error:
        with open(path, "rb") as file:
            start = shown(file.read(24))
        raise DataError(f"{path}: no picture in {', '.join(FORMATS)} (it starts with {start}): replace it") from error
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}): replace it") from error


def image_tensor(image, size, mean=BLIP_MEAN, std=BLIP_STD):
    """RGB image -> float32 [3, size, size]: squashed to a square (bicubic, no crop), 0..1, normalised."""
    assert image.mode == "RGB", f"image_tensor wants RGB, got {image.mode}: use load_image"
    squashed = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(squashed, dtype=np.float32) / 255)  # [size, size, 3]
    pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)
    return pixels.permute(2, 0, 1).contiguous()  # [3, size, size]


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
        if len(row.answer.strip().splitlines()) > 1:
            reasons.append("the answer has several lines")
        if row.fault:
            reasons.append(row.fault)
        elif size[row.image] is None or size[row.image] <= 0:
            reasons.append(f"image {shown(row.name)} is missing or has 0 bytes")
        if reasons:
            bad.append((row, "; ".join(reasons)))
    return bad


def usable_rows(rows, skip_bad=False):
    """(good rows, [(bad row, reason)]). DataError where rows are bad and skip_bad is off, or where none is good."""
    bad = check_rows(rows)
    refused = {id(row) for row, _ in bad}
    good = [row for row in rows if id(row) not in refused]
    if bad and not (skip_bad and good):
        firsts = {}  # one row for each different reason: a missing picture often has five questions
        for row, reason in bad:
            firsts.setdefault(reason, row.line)
        listed = " | ".join(f"line {line}: {reason}" for reason, line in list(firsts.items())[:5])
        advice = "mend them, check --images, or leave them out with --skip-bad" if good else "check --data and --images"
        raise DataError(f"{bad[0][0].file}: {len(bad)} of {len(rows)} rows cannot be used: {listed}: {advice}")
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


def shared_images(splits):
    """{picture's path: [splits]} for the pictures that stand in more than one of `splits` = {split: rows}."""
    homes = {}
    for split, rows in splits.items():
        for image in {row.image for row in rows if row.image}:
            homes.setdefault(image, []).append(split)
    return {image: names for image, names in sorted(homes.items()) if len(names) > 1}
