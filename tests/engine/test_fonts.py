"""pytest tests/engine/test_fonts.py: figures whose names and titles are Chinese.

Behaviour-checked: a font of this machine that has the letters is taken, also one that matplotlib's list lacks; without any,
it is said once.
"""

import types
import warnings

import pytest
from PIL import Image

from engine import fonts, runfolder

CHINESE = "\u6d6e\u4e16\u7ed8"


@pytest.fixture(autouse=True)
def forgotten():
    """What was found before is looked for again."""
    fonts.families_for.cache_clear()
    yield
    fonts.families_for.cache_clear()


def test_a_text_of_latin_letters_needs_no_other_font():
    assert fonts.families_for("Cubism") == ([fonts.BASE], set())


def test_a_font_that_has_the_letters_is_taken_though_matplotlib_lists_it_not(monkeypatch):
    """matplotlib keeps its list in a file: a font that was installed later is not on it."""
    from matplotlib import font_manager
    base = font_manager.findfont(fonts.BASE)
    glyphs = {base: "", "/plain.ttf": "", "/new Sans-Bold.otf": CHINESE, "/new Sans-Regular.otf": CHINESE, "/broken.ttf": None}
    added = []

    def open_font(path):
        if glyphs[path] is None:
            raise RuntimeError("no font")
        return types.SimpleNamespace(get_char_index=lambda code: int(chr(code) in glyphs[path]))

    listed = [types.SimpleNamespace(fname=base, name=fonts.BASE), types.SimpleNamespace(fname="/plain.ttf", name="Plain")]

    def add(path):
        added.append(path)
        listed.append(types.SimpleNamespace(fname=path, name="New"))

    monkeypatch.setattr(font_manager, "get_font", open_font)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [*glyphs][1:])
    monkeypatch.setattr(font_manager, "fontManager", types.SimpleNamespace(ttflist=listed, addfont=add))
    monkeypatch.setattr(font_manager, "findfont", lambda name: base)
    assert fonts.families_for(CHINESE) == ([fonts.BASE, "New"], set()) and added == ["/new Sans-Regular.otf"]


def test_curves_of_a_run_with_a_chinese_name(tmp_path, monkeypatch):
    """No warning for each letter; where no font has it, the figure says so in a line."""
    (tmp_path / "log.csv").write_text("kind,step,loss,kl\nstep,1,2.0,\nstep,2,1.5,\nepoch,2,1.75,0.5\n")
    panels = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]), ("KL", [("epoch", "kl", "KL")]),
              ("none", [("epoch", "x", "x")])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runfolder.draw_curves(tmp_path / "log.csv", tmp_path / "curves.png", panels, CHINESE)
    with Image.open(tmp_path / "curves.png") as drawn:
        assert drawn.width == pytest.approx(2 * 4.6 * 130, abs=2)  # the panel without values is left out
    with fonts.fonts_for("\U000e0041") as note:
        assert note == fonts.NOTE
