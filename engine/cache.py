"""cache.py: features of frozen towers on disk: each picture goes through its tower once, and not once an epoch.

    Store            rows of one shape and dtype, one for each distinct picture: fill makes those that lack, store[path] reads
    Features         several of them as path -> {name: feature}
    vision_features  the Store of a BLIP-2 vision tower
    made_from        all that a tower's features depend on: what the key of every store and of every gallery's index is made of
    weights_digest   sha256 of a module's weights, a part of it

A store is three files <kind>-<hash of what the features depend on>, so that other weights, preprocessing, shape or dtype are
another store; .json says in words what is hashed. .rows is the bare rows one after another. .index holds a record of 40 bytes
for each row in the same order: the sha256 of the picture's file, the crc32 of the row, the crc32 of these 36 bytes and the
record's number. A row is safe on disk before its record is written: after a kill at any instant, the records that are whole
and whose rows are there are a valid beginning; the next fill cuts off what follows and goes on from there. Pictures go by
content: a name, a copy or a second data set costs nothing, a changed picture is a new one. pictures.jsonl remembers the
sha256 of files that have not been touched since: [path, size, mtime_ns, ctime_ns, inode, sha256] a line, added by all stores
of the folder. crc32 because it finds every flipped bit, zeroed block or row of another picture (but one in 2**32) and costs
half of a sha256; a row is checked whenever it is read, and what does not fit is an error and never a feature.
"""

import collections.abc
import contextlib
import hashlib
import inspect
import json
import math
import os
import pathlib
import shutil
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from data.tables import excerpt
from engine import files, loaders, vision
from engine.errors import DataError
from engine.files import write_all

FORMAT = 1  # part of every file name: another layout is another store
RECORD = 40  # bytes
BATCH = 32  # pictures at a time through a tower
HASHES = "pictures.jsonl"
ABSENT = FileNotFoundError, NotADirectoryError
SETTLED = 2 * 10**9  # ns; a file changed twice within a clock tick looks unchanged, so what is younger is hashed again


def weights_digest(module):
    """sha256 (hex) over names, dtypes, shapes and all bytes of a module's state dict. Settings are not in it, see made_from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# of a transformers config: what changes the output and is neither a weight nor always seen in a module's repr
SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size", "qkv_bias", "cross_attention_frequency",
            "num_query_tokens")


def made_from(tower, pixels, weights=None):
    """All that a tower's features depend on beside the picture's file, as plain values: the one place that says so.

    Weights are not enough: two EfficientNets may share them all and differ in padding or in a norm's epsilon (tf_efficientnet_lite0
    and efficientnet_lite0), and a config may give other heads. tower: any module, also one of an edited script; pixels:
    rows.preprocessing; weights: text that stands for the tower's and its precision, where a digest of them is known already."""
    config = getattr(tower, "config", None)
    parts = [part for part in (config, *(getattr(config, f"{name}_config", None) for name in ("vision", "qformer"))) if part is not None]
    saved = tower.state_dict()
    return {"weights": weights or weights_digest(tower),
            "layers": hashlib.sha256(repr(tower).encode()).hexdigest(),  # their kinds, sizes, epsilons, paddings
            "forward": hashlib.sha256(inspect.getsource(type(tower).forward).encode()).hexdigest(),
            "constants": {name: buffer.tolist() for name, buffer in tower.named_buffers() if name not in saved},
            "settings": [{name: getattr(part, name, None) for name in SETTINGS} for part in parts], "pixels": pixels,
            **vision.timm_settings(tower)}


# --- content of pictures ------------

def stamp_of(stat):
    """What changes when a file is written, replaced or set back to an old date."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def remembered(path):
    """{picture's path: (stamp, sha256)} from pictures.jsonl; lines that a kill cut short are passed over."""
    known = {}
    with contextlib.suppress(*ABSENT), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                name, *stamp, digest = json.loads(line)
                if len(bytes.fromhex(digest)) == 32:
                    known[name] = tuple(stamp), bytes.fromhex(digest)
    return known


def hash_picture(path, known):
    """(stamp, sha256 of the file's bytes, is it worth remembering) of a picture; `known`: from remembered."""
    try:
        stamp, now = stamp_of(os.stat(path)), time.time_ns()
        if known and known[0] == stamp:
            return stamp, known[1], False
        digest, buffer = hashlib.sha256(), memoryview(bytearray(2**18))
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        return stamp, digest.digest(), stamp[2] < now - SETTLED
    except OSError as error:
        raise DataError(f"{excerpt(path, 300)}: cannot be read ({error.strerror}): replace it") from None


def hash_pictures(folder, paths):
    """{path: (stamp, sha256)} of distinct paths; what is new is added to pictures.jsonl a thousand at a time."""
    file, found = folder / HASHES, {}
    known = remembered(file)
    with (ThreadPoolExecutor() as pool,
          tqdm(total=len(paths), desc="hashing", unit="image", leave=False, mininterval=1, disable=None) as bar):
        for start in range(0, len(paths), 1000):
            chunk = paths[start:start + 1000]
            hashed = list(pool.map(lambda path: hash_picture(path, known.get(os.path.abspath(path))), chunk))
            found |= {path: (stamp, digest) for path, (stamp, digest, _) in zip(chunk, hashed)}
            # a line break before each: whatever a kill left of the line before, this one stands alone
            lines = "".join("\n" + json.dumps([os.path.abspath(path), *stamp, digest.hex()])
                            for path, (stamp, digest, new) in zip(chunk, hashed) if new)
            if lines:
                with errors_named(file):
                    folder.mkdir(parents=True, exist_ok=True)
                    with open(file, "ab", buffering=0) as memory:
                        write_all(memory, lines.encode())
            bar.update(len(chunk))
    return found


# --- the loader ------------

class Pictures(torch.utils.data.Dataset):
    """Number -> tensor_of(path), or its DataError, handed on and not raised: see questions.Questions."""

    def __init__(self, paths, stamps, tensor_of):
        self.paths, self.stamps, self.tensor_of = paths, stamps, tensor_of

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            pixels = self.tensor_of(path)
            if stamp_of(os.stat(path)) != self.stamps[index]:  # else the new picture's feature would go by the old one's hash
                raise DataError(f"{excerpt(path, 300)}: was changed meanwhile: start again")
            return pixels
        except DataError as error:
            return error
        except OSError as error:
            return DataError(f"{excerpt(path, 300)}: cannot be read ({error.strerror}): replace it")


def stacked(samples):
    """Tensors [3,h,w] -> {"images": [B,3,h,w]}; the first DataError among them -> {"fault": its text}."""
    faults = [str(one) for one in samples if isinstance(one, DataError)]
    return {"fault": faults[0]} if faults else {"images": torch.stack(samples)}


# --- the store ------------

@contextlib.contextmanager
def errors_named(path, note=""):
    """An OSError within is a DataError of one line. note: what stays, for the message."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}){note}: {files.remedy(error)}, or give another folder, "
                        "and start again") from None


def record_of(picture, row, number):
    """The record of row `number` from its picture's sha256 and its own crc32; in another place it would be none."""
    content = picture + row.to_bytes(4, "little")
    return content + zlib.crc32(content, number).to_bytes(4, "little")


class Store:
    """Features of one frozen tower, on disk in `folder`, which several stores and data sets may share.

    kind: begin of the files' names; made_from: plain values, all that the features depend on (the function of that name); shape,
    dtype: of one feature. A store goes to loader processes, forked or spawned, without its data, and only what is asked for is
    ever read into memory.
    """

    def __init__(self, folder, kind, made_from, shape, dtype):
        self.folder, self.kind, self.shape, self.dtype = pathlib.Path(folder), kind, tuple(shape), dtype
        self.about = {"format": FORMAT, "made_from": made_from, "shape": list(self.shape), "dtype": str(dtype)}
        key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.rows, self.index, self.json, self.lock = (self.folder / f"{kind}-{key}.{what}"
                                                       for what in ("rows", "index", "json", "lock"))
        self.size = math.prod(self.shape) * dtype.itemsize  # bytes of a row
        self.found = {}  # path: (number, crc32) of its row
        self.file = None  # opened by the process that reads

    def __getstate__(self):
        return {**self.__dict__, "file": None}

    def __getitem__(self, path):
        """The feature of a picture that fill or missing has seen in this process, a tensor of its own. DataError: the file was
        changed; KeyError: a picture that was not looked up, or has no row."""
        number, checksum = self.found[os.fspath(path)]
        row = torch.empty(self.size, dtype=torch.uint8)  # [size]
        try:
            self.file = self.file or open(self.rows, "rb", buffering=0)
            # not a memory map: it ends the process (SIGBUS) where the file was cut short, which here leaves bytes that do not
            # fit; not seek and read: forked processes share the file's position
            os.preadv(self.file.fileno(), [row.numpy()], number * self.size)
        except OSError as error:
            raise DataError(f"{self.rows}: the feature of {excerpt(path, 300)} cannot be read ({error.strerror}): start "
                            "again") from None
        if zlib.crc32(row.numpy()) != checksum:
            raise DataError(f"{self.rows}: the feature of {excerpt(path, 300)} has changed since it was written: delete this "
                            f"file and {self.index.name} beside it, and start again")
        return row.view(self.dtype).reshape(self.shape)  # [*shape]

    def missing(self, paths):
        """How many rows fill would make. Reads the pictures' bytes where they are new, decodes none. DataError: as fill."""
        return len(self._locate(self._hash(paths)))

    def fill(self, paths, tensor_of, encode, batch_size, workers, log=print, device="cpu"):
        """Make sure that every picture has a row -> how many were made; neither function is called where all are there.

        tensor_of: path -> float [3,h,w], in loader processes, DataError where the picture is broken; encode: [B,3,h,w] on
        `device` -> [B,*shape]. What was made before an error, Ctrl-C or a kill stays. A second process waits for the first.
        DataError: a picture that is missing, broken or changed meanwhile, a feature that is not finite, a full disk."""
        pictures = self._hash(paths)
        if not self._locate(pictures):
            self._announce(pictures, 0, log)
            return 0
        files.refuse_unwritable(self.rows)
        with files.file_lock(self.lock, f"{self.lock}: another process is making these features; waiting for it", log):
            todo = self._locate(pictures)  # another process may have made some
            self._announce(pictures, len(todo), log)
            if todo:
                with errors_named(self.json), files.whole_file(self.json) as file:
                    json.dump({**self.about, "bytes of a row": self.size}, file, indent=1)
                start = self._cut(log)
                data = Pictures(todo, [pictures[path][0] for path in todo], tensor_of)
                self._build(data, [pictures[path][1] for path in todo], start, encode, batch_size, workers, device)
        self._locate(pictures)
        return len(todo)

    def _hash(self, paths):
        return hash_pictures(self.folder, list(dict.fromkeys(os.fspath(path) for path in paths)))

    def _read_index(self):
        """([(sha256, crc32)] of the rows that are there, how many whole records follow that are of no use)."""
        data, there, entries = b"", 0, []
        with contextlib.suppress(*ABSENT):
            data = self.index.read_bytes()  # before the size of .rows: both may be growing
            there = self.rows.stat().st_size // self.size
        records = [data[i:i + RECORD] for i in range(0, len(data) - RECORD + 1, RECORD)]
        for number, record in enumerate(records[:there]):
            picture, row = record[:32], int.from_bytes(record[32:36], "little")
            if record != record_of(picture, row, number):
                break
            entries.append((picture, row))
        return entries, len(records) - len(entries)

    def _locate(self, pictures):
        """Note where the rows of {path: (stamp, sha256)} are -> the paths, one for each content, that have none."""
        where = {picture: (number, row) for number, (picture, row) in enumerate(self._read_index()[0])}
        self.file, lacking = None, {}  # the files may have been made anew since
        for path, (_, picture) in pictures.items():
            self.found.pop(path, None)
            if picture in where:
                self.found[path] = where[picture]
            else:
                lacking.setdefault(picture, path)
        return list(lacking.values())

    def _cut(self, log):
        """Cut the index after its last valid record -> the number of the next row."""
        entries, lost = self._read_index()
        if lost:
            log(f"note: {self.index}: {lost} of {len(entries) + lost} entries are damaged or have lost their rows: "
                "what is needed of them is made again")
        with open(self.index, "ab") as index:
            index.truncate(len(entries) * RECORD)
        return len(entries)

    def _announce(self, pictures, lacking, log):
        """One line before anything is computed; a DataError where the disk is too small."""
        distinct, needed = len({picture for _, picture in pictures.values()}), lacking * (self.size + RECORD)
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        line = (f"{self.kind} features: {len(pictures)} pictures, {distinct} distinct, {distinct - lacking} there, {lacking} to "
                f"make: {needed / 2**20:,.1f} MB of {free / 2**20:,.0f} MB free, in {self.folder}")
        if free < needed:
            raise DataError(f"{line}: the disk is too small: free some space, or give another folder")
        log(line)

    @torch.no_grad()
    def _build(self, data, hashes, start, encode, batch_size, workers, device):
        """Encode `data` batch by batch into the rows from number `start` on."""
        groups = [list(range(i, min(i + batch_size, len(data)))) for i in range(0, len(data), batch_size)]
        self.rows.touch()
        batches = iter(loaders.load_batches(data, stacked, groups, workers))
        try:
            with (open(self.rows, "r+b", buffering=0) as rows_file, open(self.index, "ab", buffering=0) as index,
                  tqdm(total=len(data), desc=self.kind, unit="image", mininterval=1, disable=None) as bar):
                rows_file.seek(start * self.size)
                for group in groups:
                    paths = [data.paths[i] for i in group]
                    with loaders.dead_loaders_named([types.SimpleNamespace(name=excerpt(path), line=0) for path in paths]):
                        batch = next(batches)
                    if "fault" in batch:
                        raise DataError(batch["fault"])
                    made = self._bytes_of(encode(batch["images"].to(device, non_blocking=True)), paths)  # [B,size]
                    records = b"".join(record_of(hashes[i], zlib.crc32(row), start + i) for i, row in zip(group, made))
                    with errors_named(self.rows, f"; the {group[0]} rows that were made in this run stay"):
                        write_all(rows_file, made.reshape(-1))
                        os.fsync(rows_file.fileno())
                        write_all(index, records)
                        os.fsync(index.fileno())
                    bar.update(len(group))
        finally:
            del batches  # ends the loaders now; the error may keep this frame, and the garbage collector needs half a minute

    def _bytes_of(self, features, paths):
        """Features [B,*shape] -> their bytes, uint8 [B,size], in the store's dtype. DataError: one is not finite."""
        wanted = len(paths), *self.shape
        assert features.shape == wanted, f"encode gave {tuple(features.shape)} for {wanted}"
        features = features.to(self.dtype).reshape(len(paths), -1)  # [B,N]
        ends = torch.stack((features.amax(1), features.amin(1)))  # [2,B]; NaN shows in them; a tenth of the time of isfinite
        finite = torch.isfinite(ends).all(0).tolist()
        if not all(finite):
            raise DataError(f"{excerpt(paths[finite.index(False)], 300)}: its {self.kind} features are not finite: use "
                            "--precision no")
        return features.cpu().contiguous().view(torch.uint8).numpy()


def vision_features(folder, tower, paths, open_picture, pixels, workers, device, log=print):
    """The Store of a frozen vision tower's [P,W] for these pictures, in the tower's own dtype; made where they are missing.

    tower: a Blip2VisionModel or TimmTower, moved to `device` only where something is to be made; open_picture: path -> [3,h,w];
    pixels: rows.preprocessing of that. DataError: as Store.fill."""
    dtype, shape = next(tower.parameters()).dtype, (vision.token_count(tower), tower.config.hidden_size)  # [P,W]
    store = Store(folder, "vision", made_from(tower, pixels), shape, dtype)
    if store.missing(paths):
        tower.eval().to(device)
    store.fill(paths, open_picture, lambda images: tower(pixel_values=images).last_hidden_state, BATCH, workers, log, device)
    return store


class Features(collections.abc.Mapping):
    """Path -> {name: store[path]} of the pictures that all of `stores` have: what questions.Questions takes as `features`."""

    def __init__(self, **stores):
        self.stores = stores

    def __getitem__(self, path):
        return {name: store[path] for name, store in self.stores.items()}

    def __iter__(self):
        first, *others = (store.found for store in self.stores.values())
        return (path for path in first if all(path in found for found in others))

    def __len__(self):
        return sum(1 for _ in self)
