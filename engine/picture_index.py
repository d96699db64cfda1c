"""picture_index.py: finding pictures in a folder: index it once, search it within little memory.

    open_index                             a folder -> features on disk; only what is new or changed is encoded
    best, best_matches, faiss_matches      the pictures nearest to a query vector; best says which of the two it takes
    matches                                the same as paths

A picture has Q unit vectors of E numbers, a query has one: score(query, picture) = the largest of the Q dot products.

An index is two files of one folder. features-<id>.bin holds a row [Q,E] of float16 for each picture and only ever grows at
its end, so that another process may read it meanwhile. index.jsonl names it, then a line for each picture in the order of the
rows; a line is written after its row is safe on disk, so that a row without a line is one that was never finished.
"""

import contextlib
import errno
import importlib.util
import json
import math
import os
import pathlib
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data.tables import excerpt
from engine import files, folders
from engine.errors import DataError

INDEX = "index.jsonl"
LARGE = 100_000  # pictures; above it an index of faiss is used where faiss is installed
PROBES = 0.05  # share of the lists of the faiss index that a query looks into: found all of the best 10 where 0.01 found 8


# --- the index ------------

def index_lock(store, log):
    """Hold the store; a second process waits until the first has ended, and finds its work done."""
    return files.file_lock(store / ".lock", f"{store}: another process is at work on this index; waiting for it", log)


def refuse_small_disk(store, needed, what):
    """DataError where the disk of `store` has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(store).free
    if free < needed:
        raise DataError(f"{store}: {what} takes {needed / 2**20:,.1f} MB and {free / 2**20:,.1f} MB are free on its disk: "
                        "free some space, or put the index elsewhere")


def read_index(store, key, width):
    """-> (features file or None, {name: (size, mtime_ns, fault)}) for this key and width; a row for each without a fault.

    Reading ends at the first line that a kill cut short, and at the last row that the features file has."""
    file, known = None, {}
    unusable = contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError)
    with unusable, open(store / INDEX, encoding="utf-8") as lines:
        head = json.loads(next(lines, ""))
        there = (store / head["features"]).stat().st_size // (math.prod(width) * 2)
        if (head["key"], head["width"]) == (key, list(width)):
            file = store / head["features"]
            for line in lines:
                name, size, changed, fault = json.loads(line)
                if not fault and not there:
                    break
                there -= not fault
                known[name] = size, changed, fault
    return file, known


def write_index(store, key, width, file, entries):
    """index.jsonl from {name: (size, mtime_ns, fault)}."""
    with files.whole_file(store / INDEX) as lines:
        lines.write(json.dumps({"key": key, "width": list(width), "features": file.name}) + "\n")
        lines.writelines(json.dumps([name, *entry]) + "\n" for name, entry in entries.items())


def copy_rows(file, numbers, size, target):
    """The rows `numbers`, of `size` bytes each, of a features file as a new one."""
    with files.whole_file(target, "wb") as new, open(file, "rb") if numbers else contextlib.nullcontext() as old:
        for number in numbers:
            old.seek(number * size)
            new.write(old.read(size))


def load_batches(paths, load, workers, batch_size):
    """[what `load` makes of a path, or its DataError] batch by batch; threads open the next batch meanwhile."""
    def attempt(path):
        try:
            return load(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(1, workers)) as pool:
        ahead = pool.map(attempt, paths[:batch_size])
        for start in range(0, len(paths), batch_size):
            now, ahead = ahead, pool.map(attempt, paths[start + batch_size:start + 2 * batch_size])
            yield list(now)


def encode_folder(folder, names, width, load, encode, workers, batch_size):
    """Batch by batch ({name: fault, "" for a good picture}, float16 [good pictures,Q,E])."""
    batches = load_batches([os.path.join(folder, name) for name in names], load, workers, batch_size)
    for start, found in zip(range(0, len(names), batch_size), batches):
        faults = {name: str(one) if isinstance(one, DataError) else ""
                  for name, one in zip(names[start:start + batch_size], found)}
        good = [one for one in found if not isinstance(one, DataError)]
        block = encode(good).float().cpu().numpy() if good else np.empty((0, *width))
        assert block.shape == (len(good), *width), f"encode gave {block.shape} for {len(good)} pictures of {width}"
        if not np.isfinite(block).all():
            raise DataError(f"{folder}: features that are not finite, at {excerpt(list(faults))}: use --precision no")
        yield faults, block.astype(np.float16)


def write_through(file, data):
    """All of `data` to an unbuffered file and on to the disk."""
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(file.fileno())


def append(store, file, row, batches, stamps):
    """Write what `encoded` gives from row number `row` on -> {name: (size, mtime_ns, fault)}.

    An interruption loses the batch that is under way. DataError: the disk is full."""
    made = {}
    with (open(file, "r+b", buffering=0) as features, open(store / INDEX, "ab", buffering=0) as lines,
          tqdm(total=len(stamps), desc="indexing", unit="image", disable=None) as bar):
        features.seek(row)
        for faults, block in batches:
            entries = {name: (*stamps[name], fault) for name, fault in faults.items()}
            try:
                write_through(features, block.tobytes())
                write_through(lines, "".join(json.dumps([name, *entry]) + "\n" for name, entry in entries.items()).encode())
            except OSError as error:
                raise DataError(f"{store}: cannot be written ({error.strerror}); the {len(made)} pictures indexed in this run "
                                f"stay: {files.remedy(error)} and start again") from None
            made |= entries
            bar.update(len(faults))
    return made


def open_index(folder, store, key, width, load, encode, workers=2, batch_size=32, log=print):
    """Index the pictures in `folder` in the folder `store` -> (names, features): memmap float16 [G,Q,E], names in its order.

    key: short text of all that features depend on (weights, preprocessing): where it differs from the store's, all is built
    anew; width: (Q,E); load: path -> anything, in threads, DataError where a picture is broken; encode: list of what load
    gave -> tensor [n,Q,E]. A picture of the same name, size and time of change is not encoded again; broken ones are left out
    and not tried again until they change. An interrupted call goes on where it stopped. Pictures that left or changed make
    the features be copied once; new ones go to the end: ties are then in the order of indexing.
    DataError: as pictures_in, all pictures broken, a store that cannot be written, a disk that is too small."""
    store, row = pathlib.Path(store), math.prod(width) * 2
    files.refuse_unwritable(store / INDEX)
    names = folders.pictures_in(folder, log)
    with index_lock(store, log):
        file, known = read_index(store, key, width)
        stamps = {name: (stat.st_size, stat.st_mtime_ns) for name in names for stat in [os.stat(os.path.join(folder, name))]}
        entries = {name: entry for name, entry in known.items() if stamps.get(name) == entry[:2]}
        new = {name: stamp for name, stamp in stamps.items() if name not in entries}
        had = [name for name, entry in known.items() if not entry[2]]
        rows_kept = [number for number, name in enumerate(had) if name in entries]
        copied = file is None or len(rows_kept) < len(had)
        log(f"{folder}: {len(names)} pictures, {len(entries)} of them indexed before; the index takes "
            f"{(len(rows_kept) + len(new)) * row / 2**20:,.1f} MB in {store}")
        if new or copied or len(entries) < len(known):
            old = [path for path in store.iterdir() if path.name.startswith(("features-", ".features-", f".{INDEX}."))]
            kept = len(rows_kept) * row * copied  # the old file goes when it has been copied, before anything is encoded
            freed = sum(path.stat().st_size for path in old) * copied
            refuse_small_disk(store, max(kept, kept + len(new) * row - freed), "the index")
            if copied:
                file, source = store / f"features-{secrets.token_hex(4)}.bin", file
                copy_rows(source, rows_kept, row, file)
            write_index(store, key, width, file, entries)
            for path in old:
                if not path.name.startswith(file.name):
                    path.unlink()
            batches = encode_folder(folder, list(new), width, load, encode, workers, batch_size)
            entries |= append(store, file, len(rows_kept) * row, batches, new)
        faults = [fault for *_, fault in entries.values() if fault]
        names = [name for name, entry in entries.items() if not entry[2]]
        if faults:
            log(f"note: {len(faults)} broken pictures are left out: " + "; ".join(faults[:10])
                + (f"; and {len(faults) - 10} more, see {store / INDEX}" if len(faults) > 10 else ""))
        if not names:
            raise DataError(f"{folder}: not one of its {len(faults)} pictures can be read: give another folder")
        return names, np.memmap(file, np.float16, "r", shape=(len(names), *width))


# --- the search ------------

def best_matches(features, query, top, excluded=(), chunk=256):
    """The `top` pictures with the highest scores but for the numbers `excluded` -> (numbers, scores), best first.

    features: [G,Q,E]; query: [E]. Exact in float32; ties in the order of `features`. Memory: a chunk of pictures in float32
    and one number a picture (a chunk of 256 is also faster than one of 4096: it stays in the processor's cache)."""
    query, scores = np.asarray(query, np.float32), np.empty(len(features), np.float32)
    for start in range(0, len(features), chunk):
        block = features[start:start + chunk].astype(np.float32)
        # einsum: every dot product is summed alike, wherever it stands; BLAS may make ties differ in the last bit
        scores[start:start + chunk] = np.einsum("gqe,e->gq", block, query).max(1)
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isin(order, list(excluded))][:top]
    return order, scores[order]


def faiss_index(features, log=print):
    """The faiss index of features [G,Q,E] from open_index, made on first use and kept beside them.

    IVF,SQ8: the G*Q vectors in 8 bits a number, in sqrt(G*Q) lists of near ones. A flat index would be no smaller than the
    features and no faster than best_matches; PQ codes train a hundred times as long. Building holds the index in memory
    (8 GB for a million pictures of 32 x 256), searching maps the file."""
    import faiss
    (count, queries, size), features_file = features.shape, pathlib.Path(features.filename)
    path = features_file.with_name(f"{features_file.name}.{count}.faiss")  # rows never change within a features file
    with index_lock(path.parent, log):
        if not path.exists():
            lists, vectors = math.isqrt(count * queries), features.reshape(-1, size)
            needed = count * queries * (size + 8)
            log(f"{path}: building an index of {needed / 2**20:,.0f} MB")
            refuse_small_disk(path.parent, needed, "the index of faiss")
            index = faiss.index_factory(size, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
            sample = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 40 * lists), replace=False)
            index.train(vectors[np.sort(sample)].astype(np.float32))
            for start in tqdm(range(0, len(vectors), 2**17), desc="faiss", disable=None):
                index.add(vectors[start:start + 2**17].astype(np.float32))
            for stale in path.parent.glob("*.faiss"):
                stale.unlink()
            with files.whole_file(path, "wb") as file:
                faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)


def faiss_matches(features, query, top, excluded=(), probes=PROBES, log=print):
    """best_matches by a faiss index: candidates from a share `probes` of its lists, scored exactly from `features`.

    Not exact: a picture none of whose vectors is in those lists or among the best candidates is missed; the scores of the
    pictures that are found are exact. With probes 1 only the 8-bit rounding remains."""
    index, excluded = faiss_index(features, log), list(excluded)
    vectors, query = features.shape[0] * features.shape[1], np.asarray(query, np.float32)
    wanted = min(top, len(features) - len(set(excluded)))
    # a picture can take Q places
    depth, index.nprobe = 4 * (top + len(excluded)) * features.shape[1], max(1, round(probes * index.nlist))
    while True:
        found = index.search(query[None], min(depth, vectors))[1]
        candidates = np.setdiff1d(found[found >= 0] // features.shape[1], excluded)
        if len(candidates) >= wanted:
            break
        depth, index.nprobe = 4 * depth, 4 * index.nprobe
    order, scores = best_matches(features[candidates], query, top)
    return candidates[order], scores


def best(features, query, top, excluded=(), large=LARGE, log=print):
    """(numbers, scores) of the best pictures: exactly, or above `large` pictures with faiss where that is installed.

    features: from open_index, which knows where the index of faiss is kept. Says which of the two it takes."""
    if len(features) > large and importlib.util.find_spec("faiss"):
        log(f"search by faiss over {len(features):,} pictures ({PROBES:.0%} of its lists, scores exact)")
        return faiss_matches(features, query, top, excluded, log=log)
    log(f"exact search over {len(features):,} pictures"
        + ("; pip install faiss-cpu makes it faster" if len(features) > large else ""))
    return best_matches(features, query, top, excluded)


def matches(folder, names, features, query, top, reference=None):
    """The best pictures of an indexed folder but for the file `reference` itself -> [(path, name, score)], see best."""
    paths = [os.path.join(folder, name) for name in names]
    itself = [number for number, path in enumerate(paths) if reference is not None and os.path.samefile(path, reference)]
    return [(paths[number], names[number], float(score)) for number, score in zip(*best(features, query, top, itself))]
