"""folders.py: a folder of pictures in, a table out: eval_gated.py --ask and train_blip_caption.py --captions.

    opened         a Table: a CSV file that goes on where it stopped
    fill           what a model says of the pictures that the table lacks, batch by batch
    answer_pictures    what it answers to questions about them
    pictures_in    the pictures in a folder and below

The file grows by whole batches, each safe on disk before the next begins: a kill at any instant loses one batch at most, and the row
that it cut short is cut off at the next start. FILE.json beside it says what the rows were made with, so that rows of two
checkpoints or settings never stand in one file. A picture counts by its name: one that is changed later keeps its rows.

Names and texts stand in the cells letter by letter, as RFC 4180 has it. A spreadsheet takes a cell that begins with = + - or @ for a
formula, also in quotes; a sign before it would keep the names from being found again, so import the columns as text.
"""

import contextlib
import csv
import io
import json
import math
import os
import pathlib
import types

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from data import rows
from data.tables import excerpt
from engine import cache, files, loaders
from engine.errors import DataError, said

ANSWERS = ("image", "question", "answer", "confidence")  # columns of a table of answer_pictures


# --- the table ------------

class Table:
    """A CSV file under way; done: {first cells of its rows}, as many as make a key (image, or image and question)."""

    def __init__(self, path, file, done):
        self.path, self.file, self.done = path, file, done

    def missing(self, names, asked):
        """{picture's name: its keys that are not in the table}, without pictures that have them all. asked: list of the tuples
        that make a key with a name; [()] where a name alone is one."""
        found = {name: [(name, *one) for one in asked if (name, *one) not in self.done] for name in names}
        return {name: keys for name, keys in found.items() if keys}

    def append(self, keys, cells):
        """Rows key + cells; they are on disk when this returns."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows((*key, *own) for key, own in zip(keys, cells, strict=True))
        with cache.errors_named(self.path, "; the rows before stay, and the same command goes on from there"):
            cache.write_all(self.file, text.getvalue().encode())
            os.fsync(self.file.fileno())
        self.done.update(keys)


@contextlib.contextmanager
def open_table(path, columns, keys, made_with):
    """The Table at `path`, begun where it is not there, else read and cut after its last whole row.

    columns: its head; keys: how many of them make a key; made_with: {name: plain value}, what its rows depend on. DataError: it was
    made with something else, is no such table, is damaged, or another process writes it."""
    path = pathlib.Path(path)
    if path.suffix.lower() != ".csv":
        raise DataError(f"{path}: a table is written as CSV: let its name end in .csv")
    with _lock(path):
        made_with = json.loads(json.dumps(made_with))  # as it comes back: lists, no tuples
        if path.exists():
            _refuse_other(path, made_with)
            done = _read(path, columns, keys)
        else:
            with files.whole_file(_about(path)) as file:  # first: a table without it is never taken up again
                json.dump(made_with, file, indent=1)
            with files.whole_file(path) as file:
                csv.writer(file).writerow(columns)
            done = set()
        with open(path, "ab", buffering=0) as file:
            yield Table(path, file, done)


def _about(path):
    return path.with_name(path.name + ".json")


@contextlib.contextmanager
def _lock(path):
    """Two processes that append to one file would ask everything twice."""
    from filelock import FileLock, Timeout
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"{path}: another process is writing it: wait for it, or give another file") from None
    try:
        yield
    finally:
        pathlib.Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: a run that waits for the old file notices
        lock.release()


def _refuse_other(path, made_with):
    """DataError where FILE.json does not say the same."""
    try:
        was = json.loads(_about(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is there, but what it was made with cannot be read ({_about(path).name}: "
                        f"{said(error)}): give another file") from None
    was = was if isinstance(was, dict) else {}
    other = [f"{name} is {made_with.get(name)!r}, was {was.get(name)!r}" for name in {**was, **made_with}
             if name not in was or name not in made_with or was[name] != made_with[name]]
    if other:
        raise DataError(f"{path}: its rows were made with something else ({'; '.join(other)}): give another file, or what was "
                        "given before")


def _read(path, columns, keys):
    """Cut the file after its last whole row -> the keys of its rows."""
    data = path.read_bytes()
    end = whole_rows(data)
    try:
        table = list(csv.reader(io.StringIO(data[:end].decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: damaged ({error}): give another file") from None
    if not table or table[0] != list(columns):
        raise DataError(f"{path}: its first line is not {','.join(columns)}: give another file")
    for number, row in enumerate(table[1:], 1):
        if len(row) != len(columns):
            raise DataError(f"{path}: row {number} has {len(row)} cells, not {len(columns)}: mend it, or give another file")
    os.truncate(path, end)
    return {tuple(row[:keys]) for row in table[1:]}


def whole_rows(data):
    """How many bytes of a CSV file are whole rows: up to the last line break that is not between quotes."""
    end = read = quotes = 0
    for line in io.BytesIO(data):
        read, quotes = read + len(line), quotes + line.count(b'"')
        if line.endswith(b"\n") and quotes % 2 == 0:  # a quote within quotes is doubled
            end = read
    return end


# --- pictures ------------

def pictures_in(folder, log=print):
    """The pictures in `folder` and below, as sorted names relative to it; what leads out of it is left out with a note.

    Links to folders are not followed: what they lead to within `folder` is found where it stands.
    DataError: no such folder, no picture in it."""
    root, names, left_out = os.path.realpath(folder), [], []
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in rows.FORMATS}
    if not os.path.isdir(root):
        raise DataError(f"{folder}: there is no such folder of pictures" if not os.path.exists(root) else
                        f"{folder}: a file and no folder of pictures: give the folder that it is in")
    for place, inner, found in os.walk(root, onerror=lambda error: left_out.append(error.filename)):
        for path in (os.path.join(place, name) for name in inner + found):
            if os.path.islink(path) and os.path.commonpath([root, os.path.realpath(path)]) != root:
                left_out.append(path)
            elif os.path.splitext(path)[1].lower() in known and os.path.isfile(path):
                names.append(os.path.relpath(path, root).replace(os.sep, "/"))
    if left_out:
        log(f"note: {folder}: {len(left_out)} links that leave it or folders that cannot be listed are left out, first "
            f"{excerpt(os.path.relpath(left_out[0], root))}")
    if not names:
        raise DataError(f"{folder}: no picture in it ({', '.join(rows.FORMATS)})")
    return sorted(names)


class Pictures(Dataset):
    """Number -> (picture [3,s,s] in BLIP's normalisation, its name), or (the DataError that keeps it out, its name)."""

    def __init__(self, folder, names, image_size):
        self.folder, self.names, self.image_size = folder, names, image_size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, number):
        name = self.names[number]
        path = os.path.join(self.folder, name)
        try:
            name.encode()  # a file name may be any bytes, the table is UTF-8
            return rows.picture_tensor(path, self.image_size), name
        except UnicodeEncodeError:
            return DataError("its name is not UTF-8: rename it"), name
        except DataError as error:
            return DataError(str(error).removeprefix(f"{path}: ")), name


def collate(samples):
    """Samples of Pictures -> images [B,3,s,s] of those that can be read (None: no one) and their names; bad: {name: reason}."""
    good = [(found, name) for found, name in samples if not isinstance(found, DataError)]
    return {"images": torch.stack([found for found, _ in good]) if good else None, "names": [name for _, name in good],
            "bad": {name: str(found) for found, name in samples if isinstance(found, DataError)}}


def fill(table, folder, todo, tell, image_size, batch_size, workers, device):
    """Put what `tell` says of the pictures in `todo` (see Table.lacking) into the table; list those that cannot be read at the end.

    tell(images [B,3,s,s], keys) -> (N keys, N tuples of cells); keys: B lists, of each picture. batch_size: pictures at a time."""
    names, before, bad = list(todo), len(table.done), {}
    groups = [list(range(i, min(i + batch_size, len(names)))) for i in range(0, len(names), batch_size)]
    batches = iter(loaders.load_batches(Pictures(folder, names, image_size), collate, groups, workers))
    with tqdm(total=len(names), desc="pictures", unit="image", mininterval=1, disable=None) as bar:
        for group in groups:
            with loaders.dead_loaders_named([types.SimpleNamespace(name=excerpt(names[n]), line=0) for n in group]):
                batch = loaders.next_batch(batches, device)
            bad |= batch["bad"]
            if batch["names"]:
                table.append(*tell(batch["images"], [todo[name] for name in batch["names"]]))
            bar.update(len(group))
    for name, reason in bad.items():
        print(f"left out: {excerpt(name, 200)}: {reason}")
    print(f"{table.path}: {len(table.done)} rows, {len(table.done) - before} of them new; {len(bad)} of {len(names)} pictures "
          "could not be read" + (": the same command tries them again" if bad else ""))


def answer_pictures(keys, features, labels, answer, batch_size, least=0.0):
    """Questions about a batch of pictures, each on its own -> (N keys, N (answer, confidence)), what `fill` takes.

    keys: B lists, of each picture (name, question); features: {name: [B,...], or None}; labels: None, or B texts to stand before the
    questions. answer(questions, contexts, features) -> {"prediction": texts, "confidence": mean log-probabilities}, at most batch_size at
    a time. least: the confidence (0 to 1) below which the answer stays empty."""
    asked, cells = [(n, key) for n, own in enumerate(keys) for key in own], []
    for part in (asked[start:start + batch_size] for start in range(0, len(asked), batch_size)):
        numbers = [n for n, _ in part]
        own = {name: x if x is None else x[numbers] for name, x in features.items()}  # [n,P,W] and [n,F]
        found = answer([question for _, (_, question) in part], [labels[n] for n in numbers] if labels else None, own)
        sure = [math.exp(value) for value in found["confidence"]]
        cells += [(text if value >= least else "", f"{value:.4f}") for text, value in zip(found["prediction"], sure)]
    return [key for _, key in asked], cells
