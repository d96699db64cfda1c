"""pytest tests/test_loaded.py: what loaded.py keeps is what the folder holds now, and nobody's to change. Behaviour-checked."""

import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load

import loaded
from conftest import BEFORE_5
from engine import published
from engine.errors import DataError

pytestmark = pytest.mark.skipif(BEFORE_5, reason="before transformers 5 loading draws numbers: nothing is kept")


@pytest.fixture
def asked(monkeypatch):
    """The folders that are really read."""
    names = []
    plain = published.load_published.__wrapped__
    monkeypatch.setattr(loaded, "READ", type(loaded.READ)())
    monkeypatch.setattr(published, "load_published", loaded.once(lambda kind, what, name, *more, **named: names.append(name) or plain(
        kind, what, name, *more, **named)))
    return names


def test_a_folder_is_read_once_and_again_after_any_change(tiny, tmp_path, asked):
    folder = shutil.copytree(tiny[0], tmp_path / "blip2")
    weights = pathlib.Path(folder, "model.safetensors")
    (one, words), (two, others) = (published.load_blip2(str(folder)) for _ in range(2))
    assert len(asked) == 1 and words is not others and words("a boat").input_ids == others("a boat").input_ids
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert two.language_model.lm_head.weight is two.language_model.get_input_embeddings().weight  # tied as what was read
    with torch.no_grad():
        one.query_tokens.fill_(7)
    assert not torch.equal(published.load_blip2(str(folder))[0].query_tokens, one.query_tokens) and len(asked) == 1
    stamp = weights.stat()
    whole, kept = weights.read_bytes(), load(weights.read_bytes())["query_tokens"]
    weights.write_bytes(whole.replace(kept.numpy().tobytes(), (kept + 1).numpy().tobytes()))
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size and time, even so
    assert torch.equal(published.load_blip2(str(folder))[0].query_tokens, two.query_tokens + 1) and len(asked) == 2
    published.load_blip2(str(folder), torch.bfloat16)
    assert len(asked) == 3
    weights.unlink()
    for _ in range(2):
        with pytest.raises(DataError):
            published.load_blip2(str(folder))
    assert len(asked) == 5


def test_what_was_asked_for_last_is_kept_as_far_as_it_fits(tiny, tmp_path, asked, monkeypatch):
    one, two = (str(shutil.copytree(tiny[0], tmp_path / name)) for name in ("one", "two"))
    size, order = loaded.size_of(published.load_blip2(one)), [one, one, two, two, one]
    for kept, wanted in ((2.5, [one, two]), (1.5, [one, two, one]), (0.5, order)):
        monkeypatch.setattr(loaded, "KEPT", kept * size)
        loaded.READ.clear()
        asked.clear()
        for folder in order:
            published.load_blip2(folder)
        assert asked == wanted
    assert not loaded.READ
