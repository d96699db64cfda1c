"""shards.py: caption pairs in WebDataset tar files, read as a stream: nothing is unpacked to disk, unpickled or kept.

    is_shards, shard_files     whether a PLACE is tar files: a folder of .tar, a .tar, a brace pattern; which
    count_samples              tar files -> [Shard], counted from their headers, which also shows damage
    ShardStream                an epoch of them as samples, shared out over processes and loader workers, each to exactly one
    steps_per_epoch, packed, batches_of    as many full batches for every process
    check                      what --check-data prints of them

A sample is KEY.jpg (or another of PICTURES) beside KEY.txt, or KEY.json with "caption" or "text". Other members are passed
over. Bad input raises DataError, whose text is one line that names the shard and the sample.
"""

import io
import itertools
import json
import os
import re
import tarfile
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from data import pairs, rows
from data.cirr import clean_text
from data.pairs import Pair
from data.tables import cell, parse_json, excerpt
from engine import files
from engine.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")
MEMBER = re.compile(rf"(?!__[^/]*__(/|$))(.*/)?[^./][^.]*\.({'|'.join(PICTURES + TEXTS)})", re.IGNORECASE | re.DOTALL)
MAX_BYTES = 2**28  # of a member, which is read whole
BUFFER = 1000  # samples that a loader worker shuffles among, compressed
LISTED = 20  # broken samples that are named one by one in an epoch


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file of the set `source` with this many samples."""
    path: str
    source: str
    samples: int


def reader():
    """The package that reads tar files. Its decoders, some of which unpickle, are not used."""
    try:
        import webdataset.shardlists
        import webdataset.tariterators
    except ModuleNotFoundError as error:
        raise DataError(f"sets of tar files need webdataset ({error}): pip install webdataset") from None
    return webdataset


# --- which files, how many samples ------------

def is_shards(place):
    """Whether a PLACE stands for tar files."""
    return "{" in place or re.search(r"\.(tar|tgz|tar\.\w+)$", place) is not None or (
        os.path.isdir(place) and any(name.endswith(".tar") for name in rows.entries(place)))


def shard_files(place):
    """The tar files of a PLACE. DataError: a URL or command, files that are not there, none."""
    if re.match(r"\w+:", place):
        raise DataError(f"{place}: shards are read from disk: download them, then give a folder or cc/{{000..331}}.tar")
    if os.path.isdir(place):
        paths = [os.path.join(place, name) for name in sorted(rows.entries(place)) if name.endswith(".tar")]
    else:
        try:
            paths = reader().shardlists.expand_urls(place)
        except ValueError as error:  # of braceexpand
            raise DataError(f"{place}: no brace pattern ({error}): give one such as cc/{{000..331}}.tar") from None
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        listed = ", ".join(missing[:3])
        raise DataError(f"{place}: {len(missing)} of {len(paths)} shards are not there ({listed}): check --data")
    return [os.path.realpath(path) for path in dict.fromkeys(paths)]


def is_member(name):
    """Whether a member is a picture or text of a sample. The key ends at the first dot, as in webdataset."""
    return MEMBER.fullmatch(name) is not None


def grouped(members, path):
    """Members {"fname", "data"} -> samples {"__key__", suffix: data}: neighbours of the same key, as webdataset has it."""
    return reader().tariterators.group_by_keys({**member, "__url__": path} for member in members)


def headers(tar):
    """The members of samples without their data."""
    while (member := tar.next()) is not None:
        tar.members = []  # it would keep all of them
        if member.isreg() and is_member(member.name):
            if member.size > MAX_BYTES:
                raise ValueError(f"{excerpt(member.name)} has {member.size:,} bytes, over {MAX_BYTES:,}")
            yield {"fname": member.name, "data": b""}


def count(path):
    """The number of samples in a tar file, from its headers. DataError: no tar file, damaged, cut off, no sample in it.

    tarfile takes a damaged header, and a file cut between two members, for the end. The true end is a block of zeros."""
    samples, end = 0, bytes(tarfile.BLOCKSIZE)
    try:
        with tarfile.open(path) as tar:
            samples = sum(1 for _ in grouped(headers(tar), path))
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(len(end)) != end:
                raise ValueError(f"cut off or damaged at byte {tar.offset:,}, after {samples} samples")
    except DataError:
        raise
    except Exception as error:  # on damaged files tarfile raises its own errors, OSError, EOFError, zlib.error and more
        raise DataError(f"{path}: not a whole tar file ({reason(error)}): download it again") from error
    if not samples:
        raise DataError(f"{path}: no sample in it: give KEY.jpg, .jpeg, .png or .webp with KEY.txt or KEY.json, no other dot")
    return samples


def reason(error):
    return " ".join(str(error).split()) or type(error).__name__


def remembered(cache):
    """{path: [size, mtime, samples]} of an earlier count; {} where there is none that can be read."""
    try:
        with open(cache, encoding="utf-8") as file:
            known = json.load(file)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def count_samples(paths, source, cache=None, skip_broken=False, log=print):
    """Tar files -> [Shard]. cache: a JSON file that keeps the counts of files whose size and time of change stay the same.

    DataError: as count; with skip_broken the shard is left out and said, unless that is all of them."""
    known, shards, counted = remembered(cache) if cache else {}, [], {}
    for path in tqdm(paths, desc="counting", unit="shard", disable=None):
        stamp = [os.path.getsize(path), os.stat(path).st_mtime_ns]
        try:
            entry = known.get(path)
            samples = entry[2] if isinstance(entry, list) and entry[:2] == stamp and len(entry) == 3 else count(path)
        except DataError as error:
            if not skip_broken:
                raise DataError(f"{error}, or leave it out with --skip-broken") from error
            log(f"left out: {error}")
            continue
        shards.append(Shard(path, source, samples))
        counted[path] = [*stamp, samples]
    if not shards:
        raise DataError(f"{source}: all of the {len(paths)} shards are broken: check --data")
    if cache and any(known.get(path) != entry for path, entry in counted.items()):
        with files.whole_file(cache) as file:
            json.dump(known | counted, file)
    log(f"{source}: {len(shards)} shards of {sum(shard.samples for shard in shards)} samples in {os.path.dirname(paths[0])}")
    return shards


# --- one epoch ------------

def shared_out(shards, seed, epoch, part, parts):
    """[(shard, first sample, one after the last)] of part number `part`: the shards in an order drawn from seed and epoch, all
    their samples laid end to end and cut into `parts` runs that differ by at most one in length. At most parts - 1 shards are
    cut, and it does not matter how many there are."""
    order = np.random.default_rng([seed, epoch]).permutation(len(shards))
    total = sum(shard.samples for shard in shards)
    start, stop, position, found = part * total // parts, (part + 1) * total // parts, 0, []
    for shard in (shards[number] for number in order):
        first, last = max(start - position, 0), min(stop - position, shard.samples)
        if first < last:
            found.append((shard, first, last))
        position += shard.samples
    return found


def read_samples(shard, first, last):
    """Samples {"__key__", suffix: bytes} number first to last - 1 of a shard; then, where it ends too early, a DataError."""
    done = first
    try:
        with open(shard.path, "rb") as file:
            members = reader().tariterators.tar_file_iterator(file, select_files=is_member)
            for sample in itertools.islice(grouped(members, shard.path), first, last):
                yield sample
                done += 1
        what = "it has changed since it was counted" if done < last else ""
    except DataError:
        raise
    except Exception as error:  # as in count
        what = reason(error)
    if what:
        yield DataError(f"{shard.path}: cannot be read after {done} of {shard.samples} samples ({what}): mend it, start again")


def shuffled(samples, size, rng):
    """The samples in another order, none more than held back among `size` of them at a time."""
    held = []
    for sample in samples:
        held.append(sample)
        if len(held) > size:
            number = int(rng.integers(len(held)))
            held[number], held[-1] = held[-1], held[number]
            yield held.pop()
    for number in rng.permutation(len(held)):
        yield held[number]


def caption_of(where, sample):
    """The cleaned caption of a sample. DataError: none, not text, empty."""
    text = next((sample[suffix] for suffix in TEXTS if suffix in sample), None)
    if text is None:
        raise DataError(f"{where}: no caption: {' or '.join(TEXTS)} must stand beside the picture under the same name")
    try:
        text = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the caption is not UTF-8 (byte {error.start}): mend it") from None
    if "txt" not in sample:
        cells = parse_json(where, text)
        if not isinstance(cells, dict):
            raise DataError(f"{where}: the caption is no object {{\"caption\": ...}}: mend it")
        text = cell(where, cells, "caption" if "caption" in cells else "text", "caption")
    if not clean_text(text):
        raise DataError(f"{where}: empty caption")
    return clean_text(text)


class ShardStream(IterableDataset):
    """The samples of [Shard] that fall to one process, as (picture [3,s,s], Pair), or (the DataError of a broken one, Pair).

    A pure function of seed, epoch, process and loader worker. Each sample comes exactly once in an epoch over all processes
    and workers. In memory: the shuffle buffer, and one sample of a tar file. augment: pairs.train_view as Pair.strong says,
    else the evaluation's view."""

    def __init__(self, shards, size, seed=0, rank=0, processes=1, augment=True, buffer=BUFFER):
        self.shards, self.size, self.seed, self.augment, self.buffer = shards, size, seed, augment, buffer
        self.rank, self.processes, self.epoch = rank, processes, 0

    def set_epoch(self, epoch):
        """Before iter() of the DataLoader: another order, other views."""
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part = self.rank * workers + number
        parts = shared_out(self.shards, self.seed, self.epoch, part, self.processes * workers)
        samples = ((shard, sample) for shard, first, last in parts for sample in read_samples(shard, first, last))
        for shard, sample in shuffled(samples, self.buffer, np.random.default_rng([self.seed, self.epoch, 1, part])):
            yield self.viewed(shard, sample)

    def viewed(self, shard, sample):
        """A sample of read_samples as __iter__ yields it."""
        if isinstance(sample, DataError):
            return sample, Pair("", os.path.basename(shard.path), "", 0, shard.source, shard.path, 0, str(sample))
        key = sample["__key__"]
        where = f"{shard.path}, sample {excerpt(key)}"
        pair = Pair("", key, "", pairs.image_number(f"{shard.source}\0{os.path.basename(shard.path)}\0{key}"), shard.source, shard.path, 0)
        try:
            suffix = next((suffix for suffix in PICTURES if suffix in sample), None)
            if suffix is None:
                raise DataError(f"{where}: no picture: a {', '.join(PICTURES)} must stand beside its caption")
            pair = replace(pair, text=caption_of(where, sample))
            image = rows.load_image(f"{where}, {suffix}", file=io.BytesIO(sample[suffix]))
        except DataError as error:
            return error, pair
        if not self.augment:
            return rows.image_tensor(image, self.size), pair
        rng = np.random.default_rng([self.seed, self.epoch, pair.image_id])
        return pairs.train_view(image, self.size, rng, pair.text, pair.strong), pair


# --- batches ------------

def steps_per_epoch(shards, batch_size, processes=1):
    """Full batches that every process gets in an epoch: the processes' shares differ by one sample at most, and the smallest
    decides. Independent of the number of workers. DataError: not one."""
    total = sum(shard.samples for shard in shards)
    if total // processes < batch_size:
        raise DataError(f"{total} samples are no batch of {batch_size} for each of {processes} processes: lower --batch-size")
    return total // processes // batch_size


def packed(samples):
    """Samples of ShardStream -> (pictures [n,3,s,s] or None, their Pairs, [DataErrors]): one tensor travels between processes
    instead of n, each of which would hold a file open."""
    good = [(image, pair) for image, pair in samples if not isinstance(image, DataError)]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, [pair for _, pair in good], [found for found, _ in samples if isinstance(found, DataError)]


def batches_of(loaded, batch_size, steps, collate, skip_broken=False, log=print):
    """Exactly `steps` batches: collate of batch_size samples (picture [3,s,s], Pair).

    A broken sample becomes the batch {"fault": ...}, of which loaders.next_batch makes a LoaderError; with skip_broken it is left
    out and said. Where too few are left at the end for as many batches as the other processes have, the last samples come
    again. DataError: not one good batch."""
    waiting, last, left_out = [], [], 0
    for images, found, faults in loaded:
        for error in faults:
            left_out += 1
            if not skip_broken:
                yield {"fault": f"{error}, or leave it out with --skip-broken"}
            elif left_out <= LISTED:
                log(f"left out: {error}")
        waiting += zip(images, found) if found else ()
        while len(waiting) >= batch_size and steps:
            last, waiting, steps = waiting[:batch_size], waiting[batch_size:], steps - 1
            yield collate(last)
        if not steps:
            break
    if left_out:
        log(f"{left_out} broken samples or shards left out in this epoch")
    if steps and not last:
        raise DataError(f"{left_out} samples are broken and the others are no batch of {batch_size}: check --data")
    while steps:
        last, waiting, steps = (waiting + last)[:batch_size], [], steps - 1
        yield collate(last)


# --- --check-data ------------

def check(places, skip_broken=False, log=print):
    """--check-data of {name: place}: read every sample, name the broken ones; exit code 1 where training would fail."""
    failed = False
    for name, place in places.items():
        try:
            shards = count_samples(shard_files(place), name, None, skip_broken, log)
        except DataError as error:
            log(f"{name}: error: {error}")
            failed = True
            continue
        broken, total = 0, sum(shard.samples for shard in shards)
        for image, _ in tqdm(ShardStream(shards, 8, augment=False, buffer=0), total=total, desc="decoding", disable=None):
            if isinstance(image, DataError):
                broken += 1
                if broken <= LISTED:
                    log(f"broken: {image}")
        log(f"{name}: {total - broken} of {total} samples can be read")
        failed = failed or broken == total or (broken > 0 and not skip_broken)
    return int(failed)
