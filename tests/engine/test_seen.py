"""pytest tests/engine/test_seen.py: what an evaluation says of the pictures that training saw. Checked by hand."""

import hashlib

import pytest

from data import rows
from data.cirr import Query, pictures_of
from engine import seen


@pytest.fixture
def paths(tmp_path):
    """Four pictures; the last is a copy of the first."""
    for number, text in enumerate((b"a", b"b", b"c", b"a")):
        (tmp_path / f"{number}.jpg").write_bytes(text * 100_000)
    return [str(tmp_path / f"{number}.jpg") for number in range(4)]


def test_a_digest_is_of_the_size_and_both_ends_of_a_file(paths):
    ends = b"100000 " + b"a" * 2**16 + b"a" * 2**16
    assert rows.picture_digests(paths[:1]) == {paths[0]: hashlib.sha256(ends).hexdigest()[:16]}


def test_a_row_is_seen_where_any_of_its_pictures_is(paths):
    known = [rows.picture_digest(paths[0])]
    shown = [[paths[1], paths[2]], [paths[1], paths[3]], [paths[0]], []]
    assert seen.training_overlap(known, shown, 0) == [False, True, True, False]
    said = []
    assert seen.tell("val", {"pictures": known}, shown[:2], 0, said.append) == [False, True]
    assert seen.tell("test", {"pictures": known}, shown[:1], 0, said.append) == [False]
    assert seen.tell("test", {"of an earlier version": 1}, shown, 0, said.append) is None
    assert said == ["val: pictures that training saw: 1 of 2 rows: these scores are not of held-out pictures",
                    "test: pictures that training saw: 0 of 1 rows",
                    "test: pictures that training saw: unknown, since this checkpoint of an earlier version does not say which "
                    "pictures were trained on"]


def test_a_query_is_about_its_reference_and_its_targets():
    gallery = {name: f"/{name}" for name in "abcdef"}
    queries = [Query("1", "a", "b", ("x",), tuple("abcdef"), "f", 1), Query("2", "c", "", ("x",), (), "f", 2),
               Query("3", "d", "e", ("x",), (), "f", 3, answers=("e", "f"))]
    assert pictures_of(queries, gallery) == [["/a", "/b"], ["/c"], ["/d", "/e", "/f"]]  # test1 has no target, CIRCO several
    assert pictures_of(queries[:1], gallery, members=True) == [[f"/{name}" for name in "abcdef"]]  # --hard-set shows them all
