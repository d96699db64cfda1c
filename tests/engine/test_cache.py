"""pytest tests/engine/test_cache.py: features of frozen towers on disk.

Reference-checked: what is read against what the tower gives, bit by bit, in float32 and bfloat16. Behaviour-checked: what is
computed again and what is not after changed pictures, kill -9 between any two steps of writing, damaged files, two processes
at once, full disks. What is killed here is a real process (forked).
"""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import core
from data import rows
from engine import cache, loaders, published
from engine.errors import DataError
from engine.features import style_features

SHAPE, BATCH, SIZE = (5, 8), 3, 16


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (18, 24, 3), dtype=np.uint8)).save(path, "PNG")
    return str(path)


def tensor_of(path):
    return rows.image_tensor(rows.load_image(path), SIZE)


def features_of(images):
    """[B,3,h,w] -> [B,*SHAPE], each picture for itself and without a sum: the same bits in any batch."""
    return images.flatten(1)[:, 100:100 + SHAPE[0] * SHAPE[1]].reshape(-1, *SHAPE) * 3


class Tower:
    """encode that notes how many pictures it saw, batch by batch."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        assert not torch.is_grad_enabled()
        self.seen.append(len(images))
        return features_of(images)


class Case:
    """A folder of pictures and a store of their features."""

    def __init__(self, folder, count=11):
        self.folder, self.said = folder / "features", []
        self.paths = [picture(folder / "pictures" / f"{number}.png", number) for number in range(count)]

    def store(self, dtype=torch.bfloat16, made_from=None, shape=SHAPE, kind="vision"):
        return cache.Store(self.folder, kind, made_from or {"weights": "w", "size": SIZE}, shape, dtype)

    def fill(self, store, paths=None, encode=None, **more):
        """(rows made, pictures that the tower saw)"""
        self.said, tower = [], Tower()
        made = store.fill(self.paths if paths is None else paths, more.pop("tensor_of", tensor_of), encode or tower, BATCH,
                          more.pop("workers", 0), self.said.append, **more)
        return made, sum(tower.seen)

    def check(self, store, paths=None):
        for path in self.paths if paths is None else paths:
            expected, found = features_of(tensor_of(path)[None])[0].to(store.dtype), store[path]
            assert found.dtype == store.dtype and torch.equal(found, expected), path


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


@pytest.fixture
def settled(monkeypatch):
    """As if the pictures had lain there for more than two seconds."""
    monkeypatch.setattr(cache, "SETTLED", -10**12)


@pytest.fixture
def hashes(monkeypatch):
    """The names of the pictures whose bytes are read for their hash."""
    read, plain = [], open

    def noted(path, *more, **options):
        if str(path).endswith(".png"):
            read.append(os.path.basename(path))
        return plain(path, *more, **options)

    monkeypatch.setattr(cache, "open", noted, raising=False)
    return read


def refused(call, *words):
    """The DataError of call(): one line that holds `words`."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def child(function):
    """Start function() in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


# --- what is stored ------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workers", [0, 2])
def test_round_trip(case, dtype, workers):
    store = case.store(dtype)
    assert store.missing(case.paths) == 11
    assert case.fill(store, workers=workers) == (11, 11)
    case.check(store)
    assert len(case.said) == 1 and "11 pictures, 11 distinct, 0 there, 11 to make" in case.said[0], case.said
    assert case.folder.name in case.said[0]
    again = case.store(dtype)
    assert again.missing(case.paths) == 0
    case.check(again)  # without fill
    assert case.fill(again, tensor_of=None, encode=int) == (0, 0)  # neither can be called
    assert "11 there, 0 to make" in case.said[0]
    assert store.rows.stat().st_size == 11 * store.size == 11 * 40 * dtype.itemsize and store.index.stat().st_size == 11 * 40
    about = json.loads(store.json.read_text())
    assert about["made_from"] == {"weights": "w", "size": SIZE} and about["shape"] == [5, 8] and about["dtype"] == str(dtype)


def test_where_all_is_there_nothing_is_locked_or_written(case, monkeypatch):
    """Another process may be busy with other pictures, the folder may be read-only."""
    case.fill(case.store())
    monkeypatch.setattr(cache.files, "file_lock", None)
    monkeypatch.setattr(cache, "write_all", None)
    assert case.fill(case.store()) == (0, 0)


def test_what_is_read_is_a_copy(case):
    store = case.store()
    case.fill(store)
    store[case.paths[0]].fill_(7)
    case.check(store)
    assert store[case.paths[0]].shape == SHAPE
    with pytest.raises(KeyError):
        store["other.png"]


def test_features_of_the_vision_tower(tmp_path):
    """As the tower gives them in the same batches."""
    from transformers import Blip2VisionConfig, Blip2VisionModel
    torch.manual_seed(0)
    config = Blip2VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56)
    Blip2VisionModel(config).save_pretrained(tmp_path / "tower")
    tower, config = published.load_vision(tmp_path / "tower")
    size, tower = config.image_size, tower.eval()
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(4)]

    def load(path):
        return rows.image_tensor(rows.load_image(path), size)

    with torch.no_grad():
        direct = torch.cat([tower(torch.stack([load(p) for p in paths[i:i + 2]])).last_hidden_state for i in (0, 2)])
    store = cache.Store(tmp_path / "f", "vision", {"weights": cache.weights_digest(tower)}, direct.shape[1:], torch.float32)
    assert store.fill(paths, load, lambda images: tower(images).last_hidden_state, 2, 0) == 4
    assert torch.equal(torch.stack([store[path] for path in paths]), direct)


def test_pictures_go_by_content(case):
    for i in (0, 4):
        shutil.copy(case.paths[i], case.paths[i] + ".copy")
    twice = [path + ".copy" for path in (case.paths[0], case.paths[4])]
    store = case.store()
    assert store.missing(case.paths + twice) == 11
    assert case.fill(store, case.paths[:4] + twice + case.paths[:2]) == (5, 5)  # a new name, and names given twice
    assert "6 pictures, 5 distinct" in case.said[0]
    case.check(store, twice)
    assert case.fill(store) == (6, 6)  # 4.png is there by its copy
    assert "11 distinct, 5 there, 6 to make" in case.said[0]
    case.check(store, case.paths + twice)


def test_two_data_sets_share_a_store(case):
    store = case.store()
    case.fill(store, case.paths[:6])
    case.fill(store, case.paths[4:])
    case.check(store)  # the first are still known


def test_a_changed_picture_is_made_again_and_only_that(case, settled, hashes):
    store = case.store()
    case.fill(store)
    path = case.paths[3]
    with open(picture(case.folder / "other.png", 99), "rb") as file:
        other = file.read()
    before = os.stat(path)
    assert len(other) <= before.st_size, "choose another seed"
    with open(path, "r+b") as file:  # in place: the same inode
        file.write(other + b"\0" * (before.st_size - len(other)))  # PNG readers stop at its end mark
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    hashes.clear()
    old = store[path]
    assert case.fill(store) == (1, 1)
    assert hashes == ["3.png"]
    case.check(store)
    assert not torch.equal(store[path], old)


def test_a_changed_picture_is_not_found_any_more(case):
    store = case.store()
    case.fill(store)
    picture(case.folder.parent / "pictures" / "3.png", 99)
    assert store.missing(case.paths) == 1
    with pytest.raises(KeyError):
        store[case.paths[3]]


@pytest.mark.parametrize("other", [dict(made_from={"weights": "v", "size": SIZE}), dict(made_from={"weights": "w", "size": 32}),
                                   dict(dtype=torch.float16), dict(shape=(8, 5)), dict(shape=(40,)), dict(kind="style")])
def test_what_else_the_features_depend_on_is_another_store(case, other):
    store = case.store()
    case.fill(store)
    second = case.store(**other)
    assert second.missing(case.paths) == 11
    shape = other.get("shape", SHAPE)
    assert case.fill(second, encode=lambda images: features_of(images).reshape(-1, *shape) + 1)[0] == 11
    case.check(store)
    assert torch.equal(second[case.paths[2]], (features_of(tensor_of(case.paths[2])[None]) + 1).reshape(shape).to(second.dtype))
    assert case.store(made_from={"size": SIZE, "weights": "w"}).rows == store.rows  # the order of the keys says nothing


def test_another_format_is_another_store(case, monkeypatch):
    name = case.store().rows
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert case.store().rows != name


class Weights(torch.nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_weights_digest():
    base = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    one = cache.weights_digest(Weights(a=base, b=torch.tensor(1.0)))
    assert one == cache.weights_digest(Weights(b=torch.tensor(1.0), a=base.clone())) and len(one) == 64
    assert one == cache.weights_digest(Weights(a=base.T.contiguous().T, b=torch.tensor(1.0)))  # strides are no content
    last = base.clone()
    last.view(torch.int16)[1, 2] ^= 1  # the lowest bit of the last number
    sign = base.clone()
    sign[1, 2] *= -1
    zero = base.clone()
    zero[0, 0] = -0.0
    values = (last, sign, zero, base.reshape(3, 2), base.view(torch.float16), torch.zeros(2, 0))
    others = [Weights(a=value, b=torch.tensor(1.0)) for value in values]
    others += [Weights(a=base, c=torch.tensor(1.0)), Weights(a=base, b=torch.tensor([1.0])), Weights(a=base)]
    assert len({one, *map(cache.weights_digest, others)}) == len(others) + 1


# --- what a key is made of ------------

def vision_tower(dtype=torch.float32, **settings):
    from transformers import Blip2VisionConfig, Blip2VisionModel
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 56}
    return Blip2VisionModel(Blip2VisionConfig(**{**small, **settings})).eval().to(dtype)


def vision_key(tmp_path, fit="squashed", **settings):
    tower = vision_tower(**settings)
    pixels = rows.preprocessing(tower.config.image_size, fit)
    return cache.vision_features(tmp_path, tower, [], None, pixels, 0, "cpu", lambda line: None).rows.name


def style_key(tmp_path, arch, size=56, tower=core.EfficientNet28):
    torch.manual_seed(0)
    net = tower(3, arch).eval()
    return style_features(tmp_path, net, [], size, Accelerator(cpu=True), 0).rows.name


def test_whatever_changes_a_vision_feature_changes_its_key(tmp_path):
    one = vision_key(tmp_path)
    others = [vision_key(tmp_path, **other) for other in (
        {"layer_norm_eps": 1e-2}, {"hidden_act": "relu"}, {"num_attention_heads": 8}, {"qkv_bias": False},
        {"image_size": 28, "patch_size": 7}, {"dtype": torch.bfloat16}, {"fit": "targetpad, 1.25"}, {"fit": "targetpad, 1.5"})]
    assert one == vision_key(tmp_path) and len({one, *others}) == len(others) + 1
    pixels = [torch.randn(1, 3, 56, 56)] * 2
    with torch.no_grad():  # the weights are the same, and the features are not
        towers = vision_tower(), vision_tower(layer_norm_eps=1e-2)
        features_seen = [tower(image).last_hidden_state for tower, image in zip(towers, pixels)]
    assert cache.weights_digest(towers[0]) == cache.weights_digest(towers[1]) and not torch.allclose(*features_seen, rtol=1e-3)


@pytest.mark.parametrize("change", [(rows, "BLIP_MEAN", (0.5, 0.5, 0.5)), (rows, "BLIP_STD", (0.5, 0.5, 0.5)), (rows, "PIXELS", 99),
                                    (rows, "RESAMPLING", Image.Resampling.BILINEAR), (rows.PIL, "__version__", "99.0")])
def test_other_pixels_are_another_key(tmp_path, monkeypatch, change):
    def keys():
        return vision_key(tmp_path), vision_key(tmp_path, "plain, 1"), style_key(tmp_path, "test_efficientnet")

    before = keys()
    monkeypatch.setattr(*change)
    assert not {*before} & {*keys()}


def test_the_key_of_a_style_feature_knows_the_architecture(tmp_path):
    """With the same weights the two lite0 differ by half: padding and the norms' epsilon."""
    class Other(core.EfficientNet28):
        def forward(self, images):
            return super().forward(images) * 2

    class OtherConstants(core.EfficientNet28):
        def __init__(self, *settings):
            super().__init__(*settings)
            self.net_mean += 0.1

    lite = "efficientnet_lite0"
    keys = [style_key(tmp_path, lite), style_key(tmp_path, f"tf_{lite}"), style_key(tmp_path, lite, 112),
            style_key(tmp_path, lite, tower=Other), style_key(tmp_path, lite, tower=OtherConstants)]
    assert len(set(keys)) == len(keys) and keys[0] == style_key(tmp_path, lite)


def test_features(case):
    vision, style = case.store(), case.store(kind="style", shape=(4,), dtype=torch.float32)
    case.fill(vision)
    case.fill(style, case.paths[2:5], encode=lambda images: features_of(images)[:, 0, :4])
    features = cache.Features(image_embeds=vision, style_feature=style)
    assert list(features) == case.paths[2:5] and len(features) == 3
    assert case.paths[2] in features and case.paths[0] not in features
    found = pickle.loads(pickle.dumps(features))[case.paths[4]]
    assert list(found) == ["image_embeds", "style_feature"] and torch.equal(found["image_embeds"], vision[case.paths[4]])
    assert torch.equal(found["style_feature"], features_of(tensor_of(case.paths[4])[None])[0, 0, :4])
    with pytest.raises(TypeError):
        features["x"] = found


# --- hashes of the pictures ------------

def test_hashes_are_remembered(case, settled, hashes):
    case.store().missing(case.paths * 3)  # as rows name them: several questions a picture
    assert len(hashes) == 11
    case.fill(case.store())
    assert len(hashes) == 11  # not read again
    with open(case.folder / cache.HASHES, "ab") as file:
        for broken in (b'["' + case.paths[0].encode() + b'", 1, 2, 3, 4, "ab', b"5", b'{"a": 1}', b"[]",
                       b'[["x"], 1, "' + b"00" * 32 + b'"]', b'["x", 1, 2]', b'"\xff', b"\0\0", b"[" * 100_000):
            file.write(b"\n" + broken)
    os.utime(case.paths[5])
    picture(case.folder.parent / "pictures" / "6.png", 99)
    hashes.clear()
    assert case.fill(case.store()) == (1, 1)
    assert sorted(hashes) == ["5.png", "6.png"]
    hashes.clear()
    assert case.fill(case.store()) == (0, 0)
    assert hashes == []


@pytest.mark.parametrize("cut", [1, 3, 40, 66])
def test_a_torn_line_is_hashed_again(case, settled, hashes, cut):
    store = case.store()
    case.fill(store, case.paths[:3])
    memory = case.folder / cache.HASHES
    os.truncate(memory, memory.stat().st_size - cut)
    hashes.clear()
    assert case.fill(store, case.paths[:4]) == (1, 1)
    assert sorted(hashes) == ["2.png", "3.png"]
    hashes.clear()
    assert store.missing(case.paths[:4]) == 0 and hashes == []
    case.check(store, case.paths[:4])


def test_a_short_hash_is_no_hash(case, settled, hashes):
    case.fill(case.store())
    memory = case.folder / cache.HASHES
    entries = [json.loads(line) for line in memory.read_text().split("\n")[1:]]
    memory.write_text("".join("\n" + json.dumps([*entry[:-1], entry[-1][:-2]]) for entry in entries))
    hashes.clear()
    assert case.fill(case.store()) == (0, 0) and len(hashes) == 11


@pytest.mark.parametrize("changed", range(4))
def test_a_hash_is_used_only_where_all_is_equal(case, settled, hashes, changed):
    case.fill(case.store())
    memory = case.folder / cache.HASHES
    entries = [json.loads(line) for line in memory.read_text().split("\n")[1:]]
    stat = os.stat(case.paths[7])
    assert entries[7][:5] == [case.paths[7], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entries[7][1 + changed] += 1
    memory.write_text("".join("\n" + json.dumps(entry) for entry in entries))
    hashes.clear()
    assert case.fill(case.store()) == (0, 0) and hashes == ["7.png"]


def test_a_young_file_is_hashed_again(case, hashes, monkeypatch):
    """Two changes within a clock tick leave the same stamp: until 2 s after the change no hash is remembered."""
    now = time.time_ns()
    monkeypatch.setattr(cache.time, "time_ns", lambda: now + 1_500_000_000)
    case.fill(case.store())
    assert case.store().missing(case.paths) == 0 and len(hashes) == 22
    monkeypatch.setattr(cache.time, "time_ns", lambda: now + 2_500_000_000)
    for _ in range(2):
        assert case.store().missing(case.paths) == 0 and len(hashes) == 33


def test_more_than_a_chunk_of_pictures(tmp_path, settled, hashes):
    paths = []
    for i in range(1003):
        paths.append(str(tmp_path / f"{i}.png"))
        (tmp_path / f"{i}.png").write_bytes(i.to_bytes(2, "big"))
    found = cache.hash_pictures(tmp_path, paths)
    assert len({digest for _, digest in found.values()}) == 1003 and len(cache.remembered(tmp_path / cache.HASHES)) == 1003
    assert cache.hash_pictures(tmp_path, paths) == found and len(hashes) == 1003


def test_all_bytes_are_hashed(tmp_path):
    data = random.Random(0).randbytes(600_000)
    (tmp_path / "a").write_bytes(data)
    assert cache.hash_picture(str(tmp_path / "a"), None)[1] == cache.hashlib.sha256(data).digest()


@pytest.mark.parametrize("name", ["line\nbreak", "quo\"te'\\", "画像 été", b"no-utf8-\xff\xfe", " ", "[1]"])
def test_hostile_names(case, settled, hashes, name):
    path = os.path.join(os.fsdecode(case.folder.parent), os.fsdecode(name) + ".png")
    shutil.copy(case.paths[0], path)
    store = case.store()
    assert case.fill(store, [path]) == (1, 1)
    case.check(store, [path])
    hashes.clear()
    assert case.fill(case.store(), [path]) == (0, 0) and hashes == []
    os.unlink(path)
    refused(lambda: store.missing([path]), "cannot be read (No such file")


# --- kill -9 ------------

def killing(call, how):
    """cache.write_all that ends the process at its `call`-th call: before, in the half of, after the write, or at its fsync."""
    write_all, fsync, calls = cache.write_all, os.fsync, []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write(file, data):
        calls.append(1)
        if len(calls) != call + 1 or how == "synced":
            return write_all(file, data)
        if how != "before":
            write_all(file, memoryview(data)[:len(data) // 2 if how == "half" else None])
        if how != "unsynced":
            die()

    def sync(number):
        if len(calls) == call + 1 and how == "unsynced":
            die()
        fsync(number)
        if len(calls) == call + 1:
            die()

    cache.write_all, cache.os.fsync = write, sync


# the write (even: rows of a batch, odd: its records), where it is killed, the rows that a resumed call finds
KILLS = [(0, "before", 0), (0, "half", 0), (0, "synced", 0), (1, "before", 0), (1, "half", 1), (1, "after", 3), (2, "half", 3),
         (3, "unsynced", 6), (4, "unsynced", 6), (5, "half", 7), (6, "after", 9), (7, "half", 10), (7, "synced", 11)]


@pytest.mark.parametrize("call, how, kept", KILLS)
def test_killed_while_writing(case, call, how, kept):
    def run():
        killing(call, how)
        case.fill(case.store())

    process = child(run)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = case.store()
    assert store.missing(case.paths) == 11 - kept
    case.check(store, case.paths[:kept])
    assert case.fill(store) == (11 - kept, 11 - kept)
    assert len(case.said) == 1  # it did not wait for the dead, nor is a torn record worth a note
    case.check(store)
    assert store.rows.stat().st_size == 11 * store.size and store.index.stat().st_size == 11 * 40


def test_killed_from_outside_with_loaders(case):
    """At times that nobody chose, soon after each new batch; nothing is made twice."""
    def encode(images):
        time.sleep(0.02)
        return features_of(images)

    generator, kept, kills = random.Random(5), 0, 0
    while kept < 11:
        store = case.store()
        process = child(lambda: case.fill(case.store(), encode=encode, workers=1 + kills % 2))
        for _ in range(2000):
            if not process.is_alive() or store.index.exists() and store.index.stat().st_size // 40 > kept:
                break
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.03))
        process.kill()
        process.join()  # with a time limit it would wait for the loaders too
        kills += 1
        assert process.exitcode in (0, -signal.SIGKILL)
        left = store.missing(case.paths)
        assert 11 - left > kept
        kept = 11 - left
        case.check(store, [path for path in case.paths if path in store.found])
    assert kills > 1


def test_stopped_by_ctrl_c(case):
    tower = Tower()

    def encode(images):
        if len(tower.seen) == 2:
            raise KeyboardInterrupt
        return tower(images)

    store = case.store()
    with pytest.raises(KeyboardInterrupt):
        case.fill(store, encode=encode)
    assert store.missing(case.paths) == 5 and case.fill(store) == (5, 5)
    case.check(store)


# --- damaged files ------------

def test_rows_cut_short(case):
    store = case.store()
    case.fill(store)
    for length, kept in ((11 * store.size - 1, 10), (7 * store.size, 7), (2 * store.size + 5, 2), (0, 0)):
        os.truncate(store.rows, length)
        second = case.store()
        assert second.missing(case.paths) == 11 - kept
        case.check(second, case.paths[:kept])
        assert case.fill(second) == (11 - kept, 11 - kept)
        assert f"{11 - kept} of 11 entries are damaged" in case.said[-1], case.said
        case.check(second)
    store.rows.unlink()
    assert case.fill(case.store()) == (11, 11)
    store.index.unlink()
    assert case.fill(store) == (11, 11)
    case.check(store)


def test_rows_cut_short_while_they_are_read(case):
    store = case.store()
    case.fill(store)
    store[case.paths[0]]
    os.truncate(store.rows, 5 * store.size + 3)
    case.check(store, case.paths[:5])
    refused(lambda: store[case.paths[5]], store.rows.name, "5.png", "has changed")
    fresh = pickle.loads(pickle.dumps(store))
    store.rows.unlink()
    refused(lambda: fresh[case.paths[0]], "cannot be read", "0.png")


def test_index_damaged_anywhere(case):
    """Every byte of the last two records: flipped, and cut off before it. Then rebuilt at some."""
    store = case.store()
    case.fill(store, case.paths[:6])
    whole, rows_whole = store.index.read_bytes(), store.rows.read_bytes()
    for offset in range(4 * 40, 6 * 40):
        for damaged in (whole[:offset], whole[:offset] + bytes([whole[offset] ^ 1 << offset % 8]) + whole[offset + 1:],
                        whole[:offset] + bytes(len(whole) - offset)):
            store.index.write_bytes(damaged)
            kept = next((i for i in range(240) if damaged[i:i + 1] != whole[i:i + 1]), 240) // 40  # some zeros were zeros before
            assert store.missing(case.paths[:6]) == 6 - kept, offset
            case.check(store, case.paths[:kept][-1:])
            if offset % 9 == 0:
                assert case.fill(store, case.paths[:6]) == (6 - kept, 6 - kept)
                assert store.index.read_bytes() == whole and store.rows.read_bytes() == rows_whole


@pytest.mark.parametrize("damage", [lambda w: w[:80] + w[120:160] + w[80:120] + w[160:], lambda w: w[:80] + w[120:],
                                    lambda w: w[:80] + w[40:80] + w[80:], lambda w: w[:80] + bytes(40) + w[120:]])
def test_records_in_another_place_are_none(case, damage):
    """Swapped, lost, doubled, a hole of zeros: all from there on is made again, and nothing is ever another picture's."""
    store = case.store()
    case.fill(store)
    store.index.write_bytes(damage(store.index.read_bytes()))
    second = case.store()
    assert second.missing(case.paths) == 9
    assert case.fill(second) == (9, 9) and "damaged" in case.said[-1]
    case.check(second)
    assert store.index.stat().st_size == 11 * 40


@pytest.mark.parametrize("damage", ["bit", "hole", "swap"])
def test_changed_rows_are_an_error(case, damage):
    store = case.store()
    case.fill(store)
    data, size = bytearray(store.rows.read_bytes()), store.size
    if damage == "bit":
        data[4 * size + 11] ^= 0x10
    elif damage == "hole":
        data[4 * size:5 * size] = bytes(size)
    else:
        data[4 * size:6 * size] = data[5 * size:6 * size] + data[4 * size:5 * size]
    store.rows.write_bytes(data)
    for reader in (store, pickle.loads(pickle.dumps(store)), case.store()):
        reader.missing(case.paths)
        for _ in range(2):  # not only the first time
            refused(lambda: reader[case.paths[4]], store.rows.name, store.index.name, "4.png", "delete", "start again")
        case.check(reader, case.paths[:4] + case.paths[6:])
    store.rows.unlink()
    store.index.unlink()
    assert case.fill(store) == (11, 11)
    case.check(store)


def test_rows_that_change_while_they_are_read(case):
    """Cut short under a run that has read them, and made again in another order by another run: never another's feature."""
    store = case.store()
    case.fill(store)
    case.check(store)
    os.truncate(store.rows, 4 * store.size)
    case.fill(case.store(), case.paths[::-1])
    case.check(store, case.paths[:4])
    for path in case.paths[4:7]:
        refused(lambda path=path: store[path], "has changed")
    assert store.missing(case.paths) == 0
    case.check(store)


def test_a_store_made_anew_in_another_order_is_noticed(case):
    """Someone deletes the files and makes them again while a run goes on: its loaders open the new ones with old numbers."""
    store = case.store()
    case.fill(store)
    case.check(store)
    store.rows.unlink()
    store.index.unlink()
    case.fill(case.store(), case.paths[::-1])
    case.check(store)  # still the old file
    refused(lambda: pickle.loads(pickle.dumps(store))[case.paths[0]], "has changed")
    assert store.missing(case.paths) == 0
    case.check(store)


# --- several processes ------------

def test_two_processes_at_once(case):
    """Three, in fact; the second also wants pictures of its own."""
    log, context = case.folder.parent / "seen", multiprocessing.get_context("fork")
    barrier = context.Barrier(3)

    def encode(images):
        time.sleep(0.05)
        with open(log, "ab", buffering=0) as file:
            file.write(b"x" * len(images))
        return features_of(images)

    def run(number):
        store, paths = case.store(), case.paths[:8] if number == 0 else case.paths[::-1]
        barrier.wait(30)
        case.fill(store, paths, encode=encode, workers=number % 2)
        case.check(store, paths)
        if len(case.said) > 1:
            assert len(case.said) == 2 and "waiting" in case.said[0]
        (case.folder.parent / f"said{number}").write_text(case.said[0])

    processes = [child(lambda number=number: run(number)) for number in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_bytes()) == 11
    assert sum("waiting" in (case.folder.parent / f"said{number}").read_text() for number in range(3)) == 2
    store = case.store()
    assert store.missing(case.paths) == 0
    case.check(store)


class Rows(torch.utils.data.Dataset):
    """As train_gated.Questions takes features."""

    def __init__(self, features, paths):
        self.features, self.paths = features, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.features[self.paths[index]]["image_embeds"], index


def test_read_through_loaders(case):
    store = case.store()
    case.fill(store)
    store[case.paths[0]]  # an open file goes through the fork
    data = Rows(cache.Features(image_embeds=store), case.paths)
    groups = [[3, 1, 4], [1, 5, 9, 2], [6, 10, 0, 8, 7]] * 3
    for loader in (loaders.load_batches(data, None, groups, 2),
                   torch.utils.data.DataLoader(data, batch_sampler=groups, num_workers=1, multiprocessing_context="spawn")):
        for group, (found, numbers) in zip(groups, loader, strict=True):
            expected = torch.stack([features_of(tensor_of(case.paths[i])[None])[0].bfloat16() for i in group])
            assert torch.equal(found, expected) and numbers.tolist() == group


def test_goes_to_loaders_without_its_data(case):
    store = case.store(shape=(50_000,), dtype=torch.float32)
    case.fill(store, encode=lambda images: images.flatten(1)[:, :1].expand(-1, 50_000))
    store[case.paths[0]]
    assert len(pickle.dumps(store)) < 5000


# --- what goes wrong ------------

def test_disk_too_small(case, monkeypatch):
    store, free = case.store(), 11 * (case.store().size + 40)
    usage = shutil.disk_usage(case.folder.parent)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=free - 1))
    refused(lambda: case.fill(store, tensor_of=None, encode=int), "disk is too small", "11 to make", str(case.folder))
    assert not store.rows.exists() or store.rows.stat().st_size == 0
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert case.fill(store) == (11, 11)


@pytest.mark.parametrize("end, kept", [("rows", 6), ("index", 6)])
def test_disk_full_in_the_midst(case, monkeypatch, end, kept):
    store, plain = case.store(), cache.write_all

    def full(file, data):
        if file.name == str(getattr(store, end)) and file.tell() >= kept * (store.size if end == "rows" else 40):
            plain(file, memoryview(data)[:len(data) // 2 - 7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(file, data)

    monkeypatch.setattr(cache, "write_all", full)
    refused(lambda: case.fill(store), "No space left", store.rows.name, f"the {kept} rows", "free some space")
    monkeypatch.setattr(cache, "write_all", plain)
    left = store.missing(case.paths)
    assert left == (5 if end == "rows" else 4)
    assert case.fill(store) == (left, left)
    case.check(store)


def test_a_write_that_takes_a_part_goes_on():
    class Slow:
        taken = b""

        def write(self, data):
            if len(self.taken) >= 10:
                raise OSError(errno.ENOSPC, "No space")
            self.taken += bytes(data[:2])
            return len(data[:2])

    slow = Slow()
    cache.write_all(slow, b"abcdefg")
    assert slow.taken == b"abcdefg"
    with pytest.raises(OSError):
        cache.write_all(slow, b"abcdefg")


def test_hashes_that_cannot_be_written(case, settled, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(cache, "write_all", full)
        refused(lambda: case.store().missing(case.paths), cache.HASHES, "No space left")
    shutil.rmtree(case.folder)
    case.folder.write_text("a file where the folder should be")
    refused(lambda: case.fill(case.store()), case.folder.name, "cannot be written")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_picture(case, workers):
    with open(case.paths[7], "r+b") as file:
        file.truncate(200)
    store = case.store()
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as caught:
        case.fill(store, workers=workers)
    assert set(multiprocessing.active_children()) <= before  # though `caught` still holds the error's frames
    assert "7.png: cannot be read" in str(caught.value) and "replace it" in str(caught.value) and "\n" not in str(caught.value)
    assert store.missing(case.paths) == 5  # two batches of three are there
    assert case.fill(store, case.paths[:7] + case.paths[8:]) == (4, 4)
    os.unlink(case.paths[7])
    refused(lambda: case.fill(store), "7.png", "cannot be read (No such file")


@pytest.mark.parametrize("how, workers", [("changed", 0), ("gone", 0), ("gone", 1)])
def test_a_picture_changed_after_it_was_hashed(case, how, workers):
    """Else the new picture's feature would stand under the old one's hash, and be read once the old one is back."""
    def load(path):
        if path == case.paths[4]:
            picture(case.folder.parent / "pictures" / "4.png", 77)
            if how == "gone":
                os.unlink(path)
                return torch.zeros(3, SIZE, SIZE)
        return tensor_of(path)

    store = case.store()
    word = "was changed meanwhile" if how == "changed" else "cannot be read"
    refused(lambda: case.fill(store, tensor_of=load, workers=workers), "4.png", word)
    picture(case.folder.parent / "pictures" / "4.png", 4)
    assert case.fill(store) == (8, 8)
    case.check(store)


@pytest.mark.parametrize("value, dtype", [("nan", torch.bfloat16), ("nan", torch.float32), ("inf", torch.float32),
                                          ("-inf", torch.bfloat16), ("1e6", torch.float16), ("-1e6", torch.float16)])
def test_what_is_not_finite_is_never_stored(case, value, dtype):
    def encode(images):
        features = features_of(images)
        features[1, 2, 3] = float(value)
        return features

    store = case.store(dtype)
    refused(lambda: case.fill(store, encode=encode), "1.png", "not finite", "--precision no")
    assert store.missing(case.paths) == 11 and case.fill(store) == (11, 11)
    case.check(store)


def test_a_tower_of_another_width(case):
    with pytest.raises(AssertionError, match="encode gave"):
        case.fill(case.store(), encode=lambda images: features_of(images).transpose(1, 2))


def test_a_loader_that_dies(case):
    def load(path):
        if path == case.paths[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensor_of(path)

    store = case.store()
    refused(lambda: case.fill(store, tensor_of=load, workers=1), "a loader process failed", "--workers 0", "1.png")
    assert case.fill(store) == (11, 11)
    case.check(store)
