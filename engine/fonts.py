"""fonts.py: fonts in which matplotlib can write any name, for curves.png and for the figures of show/."""

import contextlib
import functools
import pathlib
import warnings

NOTE = "no font on this machine has all of these characters: install Noto Sans CJK"
BASE = "DejaVu Sans"  # matplotlib's own


def lacking(text, font):
    """The characters of `text` that a font, a FT2Font, has no glyph for."""
    return {c for c in text if not c.isspace() and not font.get_char_index(ord(c))}


@functools.lru_cache(64)
def families_for(characters):
    """Families that together have a glyph for these characters (a sorted text), as far as fonts of this machine do -> (families, those
    that none has). Fonts that were installed after matplotlib made its list are looked at too."""
    from matplotlib import font_manager
    families, left = [BASE], lacking(characters, font_manager.get_font(font_manager.findfont(BASE)))
    if not left:
        return families, left
    known = {entry.fname: entry.name for entry in font_manager.fontManager.ttflist}
    boxes = {path for path in known if "LastResort" in path}  # matplotlib's own: a box with a name for every character

    def plainest(path):  # regular before bold, sans before serif
        name = pathlib.Path(path).name
        return "Regular" not in name, "Sans" not in name and "Hei" not in name, len(name), name

    for path in sorted({*known, *font_manager.findSystemFonts()} - boxes, key=plainest):
        try:
            found = left - lacking("".join(left), font_manager.get_font(path))
            if found and path not in known:
                font_manager.fontManager.addfont(path)
                known[path] = font_manager.fontManager.ttflist[-1].name
        except (OSError, RuntimeError):  # a file that FreeType cannot read
            continue
        if found:
            families.append(known[path])
            left -= found
        if not left:
            break
    return families, left


@contextlib.contextmanager
def fonts_for(text):
    """Figures that are made and saved within have fonts for `text`, which is never TeX -> NOTE where no font has all of it, else ""."""
    import matplotlib
    families, left = families_for("".join(sorted(set(text))))
    with matplotlib.rc_context({"font.family": families, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield NOTE if left else ""
