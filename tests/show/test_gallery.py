"""pytest tests/show/test_gallery.py: the index of a folder, the search in it, the page and the figure.

Reference-checked: the chunked search against a plain one, faiss against the exact search, a resumed index against an
undisturbed one. Behaviour-checked: what is encoded again and what is not, full disks, two processes, hostile texts.
"""

import collections
import importlib.util
import os
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from data import rows
from engine import folders, picture_index
from engine.errors import DataError
from show import gallery

WIDTH = (4, 16)
HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }} $x^{$ \u202e"


def picture(path, seed, size=(24, 18)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def features_of(image):
    """Something that depends on every pixel: [Q,E]."""
    return torch.from_numpy(np.random.default_rng(np.asarray(image).sum()).standard_normal(WIDTH, dtype=np.float32))


class Shelf:
    """A folder of pictures and its index; .loaded and .encoded say what the last call worked on."""

    def __init__(self, folder, count=9):
        self.folder, self.store, self.said = folder / "pictures", folder / "store", []
        for number in range(count):
            picture(self.folder / f"{number}.png", number)

    def open(self, key="k", encode=None, **more):
        self.loaded, self.encoded = [], []

        def load(path):
            self.loaded.append(os.path.relpath(path, self.folder))
            return rows.load_image(path)

        def plain(images):
            self.encoded.append(len(images))
            return torch.stack([features_of(image) for image in images])

        return picture_index.open_index(self.folder, self.store, key, WIDTH, load, encode or plain,
                                  **{"workers": 2, "batch_size": 2, "log": self.said.append, **more})

    def check(self, opened):
        """Every picture has its own features; -> {name: features}."""
        names, features = opened
        assert features.dtype == np.float16 and features.shape == (len(names), *WIDTH)
        for name, row in zip(names, features):
            expected = features_of(rows.load_image(self.folder / name)).numpy().astype(np.float16)
            assert np.array_equal(row, expected), name
        return names


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


# --- the folder ------------

def test_pictures_in(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("b.png", "a.JPG", "below/deep/c.webp", "with space.jpeg", os.fsdecode(b"\xff.png")):
        picture(root / name, 0)
    picture(outside / "secret.png", 0)
    (root / "notes.txt").write_text("no picture")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "alias.png").symlink_to(root / "b.png")
    (root / "round").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    said = []
    assert folders.pictures_in(root, said.append) == ["a.JPG", "alias.png", "b.png", "below/deep/c.webp", "with space.jpeg",
                                                      os.fsdecode(b"\xff.png")]
    assert len(said) == 1 and "2 links that leave it" in said[0]


def test_pictures_in_nothing(tmp_path):
    with pytest.raises(DataError, match="no picture in it"):
        folders.pictures_in(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        folders.pictures_in(tmp_path / "missing")


# --- the index ------------

def test_index_is_reused(shelf):
    first = shelf.check(shelf.open())
    assert first == sorted(first) and sum(shelf.encoded) == 9 and max(shelf.encoded) == 2
    assert shelf.check(shelf.open()) == first and not shelf.loaded and not shelf.encoded
    assert "9 pictures, 9 of them indexed before" in shelf.said[-1]


def test_added_changed_removed(shelf):
    before = shelf.open()
    picture(shelf.folder / "00.png", 77)
    assert shelf.check(shelf.open())[-1] == "00.png" and shelf.loaded == ["00.png"]
    assert before[1].filename == shelf.open()[1].filename  # what is new went to its end
    picture(shelf.folder / "3.png", 78, (20, 20))
    (shelf.folder / "5.png").unlink()
    names = shelf.check(shelf.open())
    assert shelf.loaded == ["3.png"] and "5.png" not in names and len(names) == 9
    assert [path.name for path in shelf.store.glob("features-*")] == [os.path.basename(shelf.open()[1].filename)]
    (shelf.folder / "00.png").unlink()
    assert len(shelf.check(shelf.open())) == 8 and not shelf.loaded
    assert before[1].shape == (9, *WIDTH) and np.array_equal(before[1][0], shelf.open()[1][0])  # still mapped by its reader


def test_same_size_other_time_is_encoded_again(shelf):
    shelf.open()
    os.utime(shelf.folder / "4.png", ns=(1, 1))
    shelf.check(shelf.open())
    assert shelf.loaded == ["4.png"]


@pytest.mark.parametrize("width, key", [(WIDTH, "other"), ((8, 8), "k")])
def test_other_key_or_width_rebuilds(shelf, width, key):
    shelf.open()
    calls = []

    def encode(images):
        calls.extend(images)
        return torch.zeros(len(images), *width)

    features = picture_index.open_index(shelf.folder, shelf.store, key, width, rows.load_image, encode, log=shelf.said.append)[1]
    assert len(calls) == 9 and features.shape == (9, *width) and not features.any()
    assert len(list(shelf.store.glob("features-*"))) == 1


def test_broken_pictures(shelf):
    (shelf.folder / "2.png").write_bytes(b"no picture")
    (shelf.folder / "6.png").write_bytes((shelf.folder / "6.png").read_bytes()[:200])
    names = shelf.check(shelf.open())
    assert names == [f"{n}.png" for n in (0, 1, 3, 4, 5, 7, 8)]
    assert "2 broken pictures" in shelf.said[-1] and "2.png" in shelf.said[-1] and "6.png" in shelf.said[-1]
    assert shelf.check(shelf.open()) == names and not shelf.loaded  # remembered
    assert "2 broken pictures" in shelf.said[-1]
    picture(shelf.folder / "6.png", 6)
    assert shelf.check(shelf.open()) == names + ["6.png"] and shelf.loaded == ["6.png"]


def test_all_broken(shelf):
    for path in shelf.folder.iterdir():
        path.write_bytes(b"no")
    with pytest.raises(DataError, match="not one of its 9 pictures"):
        shelf.open()
    picture(shelf.folder / "1.png", 1)
    assert shelf.check(shelf.open()) == ["1.png"]


def test_interrupted_by_an_error(shelf, tmp_path):
    whole = Shelf(tmp_path / "undisturbed").open()
    calls = []

    def encode(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.stack([features_of(image) for image in images])

    with pytest.raises(KeyboardInterrupt):
        shelf.open(encode=encode)
    names, features = shelf.open()
    assert sum(shelf.encoded) == 5 and "4 of them indexed before" in shelf.said[-1]
    assert names == whole[0] and np.array_equal(features, whole[1])


@pytest.mark.parametrize("moment", ["row", "half a row", "line", "half a line", "copy", "between"])
def test_killed(shelf, tmp_path, moment):
    """kill -9 in the third batch: after its rows, in the midst of them, after its lines, in the midst of them; and while the
    index is rebuilt for other weights: before and after the new features file."""
    whole = Shelf(tmp_path / "undisturbed").open()
    if moment in ("copy", "between"):
        shelf.open("older")
    calls, write, process = [], picture_index.write_through, os.fork()
    if not process:
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def dying(file, data):
            calls.append(data)
            if len(calls) == (5 if "row" in moment else 6):
                write(file, data[:len(data) // 2 + 3] if "half" in moment else data)
                die()
            write(file, data)

        if moment == "copy":
            os.replace = die
        elif moment == "between":
            picture_index.write_index = die
        else:
            picture_index.write_through = dying
        shelf.open()
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    names, features = shelf.open()
    finished = {"row": 4, "half a row": 4, "line": 6, "half a line": 5}.get(moment, 0)
    assert f"{finished} of them indexed before" in shelf.said[-1] and sum(shelf.encoded) == 9 - finished
    assert names == whole[0] and np.array_equal(features, whole[1])
    assert shelf.open()[0] == names and not shelf.encoded
    left = {path.name for path in shelf.store.iterdir()} - {".lock"}
    assert left == {picture_index.INDEX, os.path.basename(features.filename)}


def test_features_cut_short(shelf):
    whole = shelf.open()
    expected = np.array(whole[1])
    with open(whole[1].filename, "r+b") as file:
        file.truncate(5 * 128 + 60)
    names, features = shelf.open()
    assert sum(shelf.encoded) == 4 and names == whole[0] and np.array_equal(features, expected)


@pytest.mark.parametrize("content", ["", "5\n", "null\n", "{}\n", "[]\n", '{"key": "k"}\n', "\0\0", '{"key": "k", "width"'])
def test_damaged_index_is_built_anew(shelf, content):
    shelf.open()
    (shelf.store / picture_index.INDEX).write_text(content)
    shelf.check(shelf.open())
    assert sum(shelf.encoded) == 9


def test_small_disk(shelf, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(picture_index.shutil, "disk_usage", lambda path: usage(0, 0, 9 * 128 - 1))
    with pytest.raises(DataError, match="MB are free on its disk"):
        shelf.open()
    assert not shelf.loaded
    monkeypatch.setattr(picture_index.shutil, "disk_usage", lambda path: usage(0, 0, 9 * 128))
    shelf.open()
    monkeypatch.setattr(picture_index.shutil, "disk_usage", lambda path: usage(0, 0, 0))
    shelf.check(shelf.open("other"))  # takes the place of the old one


def test_disk_runs_full(shelf, monkeypatch):
    calls, write = [], picture_index.write_through

    def full(file, data):
        calls.append(data)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(picture_index, "write_through", full)
    with pytest.raises(DataError, match="No space left on device.*the 4 pictures indexed in this run stay"):
        shelf.open()
    monkeypatch.undo()
    shelf.check(shelf.open())
    assert sum(shelf.encoded) == 5


def test_short_write_is_an_error():
    class Full:
        def write(self, data):
            return len(data) - 1
    with pytest.raises(OSError, match="No space"):
        picture_index.write_through(Full(), b"1234")


def test_features_that_are_not_finite(shelf):
    with pytest.raises(DataError, match="not finite"):
        shelf.open(encode=lambda images: torch.full((len(images), *WIDTH), float("nan")))


def test_two_processes(shelf):
    """The second waits for the first, and then holds the index itself."""
    from filelock import FileLock, Timeout
    shelf.open()
    lock = FileLock(shelf.store / ".lock")
    lock.acquire()

    def log(text):
        shelf.said.append(text)
        if "another process" in text:
            lock.release()

    def encode(images):
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        return torch.stack([features_of(image) for image in images])

    picture(shelf.folder / "new.png", 5)
    shelf.check(shelf.open(log=log, encode=encode))
    assert any("waiting for it" in text for text in shelf.said) and shelf.loaded == ["new.png"]
    lock.acquire(timeout=0)
    lock.release()


def test_odd_names(shelf):
    for name in (os.fsdecode(b"\xfe.png"), "new\nline.png", HOSTILE.replace("/", "") + ".png", "猫.png"):
        picture(shelf.folder / name, len(name))
    shelf.check(shelf.open())
    shelf.check(shelf.open())
    assert not shelf.encoded


# --- the search ------------

def scene(count, seed=0, width=WIDTH):
    features = np.random.default_rng(seed).standard_normal((count, *width), dtype=np.float32)
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float16)


def brute_force(features, query, top, excluded=()):
    scores = [max(sum(float(a) * float(b) for a, b in zip(vector, query)) for vector in picture) for picture in features]
    order = sorted((i for i in range(len(scores)) if i not in excluded), key=lambda i: (-scores[i], i))[:top]
    return order, [scores[i] for i in order]


@pytest.mark.parametrize("chunk", [1, 7, 64, 97, 98, 4096])
def test_search_is_brute_force(chunk):
    features, query = scene(97), scene(1, 5)[0, 0].astype(np.float32)
    features[[11, 50, 96]] = features[30]  # ties, over the borders of chunks
    best = brute_force(features, query, 3)[0]
    for top, excluded in ((5, ()), (5, best), (97, (3, 30)), (200, range(90))):
        numbers, scores = picture_index.best_matches(features, query, top, excluded, chunk)
        expected = brute_force(features, query, top, excluded)
        assert numbers.tolist() == expected[0] and np.allclose(scores, expected[1], atol=1e-6)


def test_search_takes_a_tensor():
    features, query = scene(20), torch.from_numpy(scene(1, 5)[0, 0]).float()
    assert picture_index.best_matches(features, query, 3)[0].tolist() == brute_force(features, query.numpy(), 3)[0]


def test_memory_of_the_search(tmp_path):
    """200,000 pictures of 4 x 16, 25.6 MB on disk: a chunk of 1,000 and a few numbers a picture, 8 MB at most."""
    path = tmp_path / "features.bin"
    scene(200_000).tofile(path)
    features = np.memmap(path, np.float16, "r", shape=(200_000, *WIDTH))
    query = scene(1, 5)[0, 0].astype(np.float32)
    picture_index.best_matches(features[:10], query, 1)
    tracemalloc.start()
    numbers, _ = picture_index.best_matches(features, query, 10, (), 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, peak
    assert numbers.tolist() == np.argsort(-(features.astype(np.float32) @ query).max(1), kind="stable")[:10].tolist()


needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


@pytest.fixture
def mapped(tmp_path):
    """Function: random features as open_index returns them."""
    def make(count, seed=0):
        path = tmp_path / f"features-{seed}.bin"
        scene(count, seed).tofile(path)
        return np.memmap(path, np.float16, "r", shape=(count, *WIDTH))
    return make


@needs_faiss
def test_faiss_is_exact_where_all_lists_are_read(mapped):
    features = mapped(3000)
    for seed, (top, excluded) in enumerate([(1, ()), (10, ()), (50, (1, 2, 3)), (3000, (7,)), (2, range(2, 2998))]):
        query = scene(1, 100 + seed)[0, 0].astype(np.float32)
        numbers, scores = picture_index.faiss_matches(features, query, top, excluded, probes=1, log=lambda text: None)
        exact = picture_index.best_matches(features, query, top, excluded)
        assert numbers.tolist() == exact[0].tolist() and np.array_equal(scores, exact[1])


@needs_faiss
def test_faiss_searches_on_where_lists_hold_too_few(mapped):
    features = mapped(500)
    numbers, _ = picture_index.faiss_matches(features, scene(1, 9)[0, 0], 500, (4,), probes=0, log=lambda text: None)
    assert sorted(numbers) == [n for n in range(500) if n != 4]


@needs_faiss
def test_faiss_index_is_kept_and_follows_the_features(mapped, tmp_path):
    features, said = mapped(300), []
    picture_index.faiss_matches(features, scene(1, 9)[0, 0], 3, log=said.append)
    picture_index.faiss_matches(features, scene(1, 9)[0, 0], 3, log=said.append)
    assert sum("building" in text for text in said) == 1
    for changed in (features[:200], mapped(300, 1)):  # fewer or more rows; another file
        picture_index.faiss_matches(changed, scene(1, 9)[0, 0], 3, log=said.append)
        assert len(list(tmp_path.glob("*.faiss"))) == 1
    assert sum("building" in text for text in said) == 3
    query = features[5, 0].astype(np.float32)
    assert picture_index.faiss_matches(features, query, 1, log=said.append)[0].tolist() == [5]


@needs_faiss
def test_best_says_what_it_takes(mapped):
    features, query, said = mapped(300), scene(1, 9)[0, 0], []
    picture_index.best(features, query, 3, log=said.append)
    assert said == ["exact search over 300 pictures"]
    picture_index.best(features, query, 3, large=299, log=said.append)
    assert said[1].startswith("search by faiss over 300 pictures")


def test_best_without_faiss(mapped, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    features, query, said = mapped(300), scene(1, 9)[0, 0], []
    numbers, _ = picture_index.best(features, query, 3, large=299, log=said.append)
    assert "exact" in said[0] and "pip install faiss-cpu" in said[0]
    assert numbers.tolist() == picture_index.best_matches(features, query, 3)[0].tolist()


@needs_faiss
def test_index_clears_old_faiss(shelf):
    features = shelf.open()[1]
    picture_index.faiss_matches(features, scene(1, 9)[0, 0], 3, log=shelf.said.append)
    (shelf.folder / "1.png").unlink()
    shelf.open()
    assert not list(shelf.store.glob("*.faiss"))


# --- what is shown ------------

def test_page_shows_hostile_text_as_text(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png", number, (900, 600))
    (tmp_path / "2.png").write_bytes(b"gone bad")
    hits = [(tmp_path / f"{n}.png", name, 0.5 - n) for n, name in enumerate((HOSTILE, os.fsdecode(b"\xff.png"), "猫.png"))]
    page = tmp_path / "page.html"
    gallery.write_page(page, HOSTILE, tmp_path / "0.png", HOSTILE, hits, HOSTILE)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;") == 5 and "{{ 7*7 }}" in text
    assert text.count("data:image/jpeg") == 3 and text.count("cannot be read") == 1 and "猫.png" in text
    assert "http" not in text.replace("http-equiv", "") and 'name="viewport"' in text
    assert text.index("0.500") < text.index("-0.500") < text.index("-1.500")


def drawn(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture
def draw(tmp_path):
    """Function: draw_gate_map of random pictures -> pixels."""
    for number in range(6):
        picture(tmp_path / f"{number}.png", number, (40, 30))
    reference = Image.new("RGB", (64, 64), "grey")

    def make(text="bigger and red", heat=None, right=1, count=5):
        heat = np.linspace(0, 0.3, 16).reshape(4, 4) if heat is None else heat
        found = [(tmp_path / f"{n}.png", n == right) for n in range(count)]
        gallery.draw_gate_map(tmp_path / "map.png", reference, heat, text, tmp_path / "5.png", found)
        return drawn(tmp_path / "map.png")
    return make


def share_of(pixels, colour):
    wanted = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - wanted).max(-1) <= 2).sum()


def test_gate_map_frames(draw):
    right, none = draw(), draw(right=None)
    assert share_of(right, gallery.RIGHT) > share_of(none, gallery.RIGHT) + 1000  # random pictures have a few by chance
    assert share_of(none, gallery.WRONG) > share_of(right, gallery.WRONG) + 1000


def test_gate_map_heat_is_on_its_patch(draw):
    """One hot patch of 4 x 4, second row, third column: what changes in the figure is one square of its size and place."""
    heat = np.full((4, 4), 0.1)
    heat[0, 0] = 0.4  # the colour bar stays
    cold = draw(heat=heat)
    heat[1, 2] = 0.4
    changed = np.argwhere((draw(heat=heat) != cold).any(-1))
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    heat[1, 2], heat[0, 0] = 0.1, 0.1
    heat[3, 3] = 0.4
    both = np.argwhere((draw(heat=heat) != cold).any(-1))
    (map_top, map_left), side = both.min(0), (both[:, 0].max() - both[:, 0].min()) / 4
    assert np.allclose([top - map_top, left - map_left, bottom - top, right - left], [side, 2 * side, side, side], atol=2)


def test_gate_map_text_does_not_move_the_layout(draw, recwarn):
    plain = draw()
    assert plain.shape == (750, 1200, 3)
    for text in ("", HOSTILE, "$\\frac{", "把狗放到草地上，" * 60, "long " * 300, "x" * 3000, "W" * 999, "a\nb\0c\td",
                 "e" + "\u0301" * 40, "\ud800 \ue000", "שלום", "\\" * 90, "_^%#"):
        other = draw(text)
        assert other.shape == plain.shape and np.array_equal(plain[95:], other[95:]), text  # below the title nothing moves
        assert (other[:, [0, -1]] == 255).all() and (other[0] == 255).all(), text  # nothing is cut off at the border
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@pytest.mark.parametrize("heat", [np.zeros((4, 4)), np.full((1, 1), 0.2), np.full((16, 16), 40.0)])
def test_gate_map_of_any_heat(draw, heat):
    draw(heat=heat, count=2)


def test_wrapped():
    assert gallery.wrapped("a  b\n\tc\0d") == "a b c d"
    assert all(len(line) <= 10 for line in gallery.wrapped("word " * 50, 10).split("\n"))
    assert len(gallery.wrapped("x" * 500, 10).split("\n")) == 3 and gallery.wrapped("x" * 500, 10).endswith("…")
    assert [len(line) for line in gallery.wrapped("猫" * 25 + "x" * 30, 20, 9).split("\n")] == [10, 10, 15, 20]
    assert gallery.wrapped("") == ""
