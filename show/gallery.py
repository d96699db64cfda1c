"""gallery.py: pictures that were found, as a web page and as a figure.

    thumbnail       a picture inside a page
    write_page      what a search found
    draw_gate_map   what the gate changed in the reference, and what was found
    python -m show.gallery FILE    draws them from what train_cir.py --search or --gate-maps left (*.results.json)
"""

import argparse
import base64
import io
import sys
import textwrap
import unicodedata

import numpy as np

from data import cirr, rows
from engine import errors, files, fonts, pages
from engine.errors import DataError

RIGHT, WRONG = "#1a7f37", "#c62828"  # of a frame; the words stand beside it

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body{font:15px/1.45 system-ui,sans-serif;margin:1.2em auto;max-width:72em;padding:0 1em;color:#222;background:#fafafa}
h1{font-size:1.3em;margin:0 0 .8em;overflow-wrap:anywhere}
.query{display:flex;gap:1em;align-items:center;padding:.8em;background:#fff;border:1px solid #ddd;border-radius:6px}
.query img{flex:0 1 180px;min-width:90px;max-height:240px}.query p{flex:1;margin:0;font-size:1.2em;overflow-wrap:anywhere}
.all{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(42%,190px),1fr));gap:.8em}
figure{margin:0;padding:.6em;background:#fff;border:1px solid #ddd;border-radius:6px;overflow-wrap:anywhere}
img,.none{display:block;width:100%;object-fit:contain}figure img,.none{aspect-ratio:1;background:#f3f3f3}
.none{display:flex;align-items:center;justify-content:center}
figcaption{display:flex;justify-content:space-between;margin-top:.4em;font-variant-numeric:tabular-nums}
small,.none{color:#666}bdi{display:block}figure bdi{max-height:4.4em;overflow:auto}</style>
{% macro picture(uri) %}{% if uri %}<img src="{{ uri }}" alt="">{% else %}<span class="none">cannot be read</span>{% endif %}
{% endmacro %}<h1>{{ title }}</h1><div class="query">{{ picture(reference) }}<p><bdi>{{ text }}</bdi></p></div>
<p><small>{{ note }}</small></p><div class="all">{% for hit in hits %}<figure>{{ picture(hit.uri) }}
<figcaption><b>{{ loop.index }}</b><span>{{ "%.3f"|format(hit.score) }}</span></figcaption>
<small><bdi>{{ hit.name }}</bdi></small></figure>{% endfor %}</div></html>
"""


# --- what is shown ------------

def thumbnail(path, side=320):
    """A picture as the data URI of a small JPEG."""
    image, file = rows.load_image(path), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail_or_none(path):
    """gallery.thumbnail of at most 240 pixels, None where the picture cannot be read any more."""
    try:
        return thumbnail(path, 240)
    except DataError:
        return None


def write_page(path, title, reference, text, hits, note=""):
    """A page that needs no other file: the reference picture, the sentence, `note`, and a grid of what was found.

    reference: path; hits: (path, name, score) best first. Whatever the texts hold is shown as text."""
    import jinja2
    hits = [{"uri": thumbnail_or_none(picture), "name": name, "score": score} for picture, name, score in hits]
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(
        title=title, reference=thumbnail_or_none(reference), text=text, hits=hits, note=note)
    with files.whole_file(path) as file:
        file.write(page.encode("utf-8", "replace").decode())  # file names can hold bytes that are no UTF-8


def wrapped(text, columns=84, lines=3):
    """`text` without line breaks and control characters, wrapped, cut to `lines`; East Asian characters take two columns."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    made = textwrap.wrap("".join(c + "\0" * (unicodedata.east_asian_width(c) in "WF") for c in text), columns)
    if len(made) > lines:
        made[lines - 1:] = [made[lines - 1][:columns - 1] + "…"]
    return "\n".join(made).replace("\0", "")


def draw_gate_map(path, reference, heat, text, target, found):
    """One PNG: the reference, what the gate changed in it, the target and the five best pictures found, right or wrong.

    reference: PIL, square, as the model saw it; heat: [n,n], relative change of each patch's features by the gate, 0 = none;
    text: the sentence; target: path; found: (path, is it the target), best first. Where no font has a
    character, the figure says so; letters that join, as in Arabic, stand side by side. DataError: a broken picture."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox, TransformedBbox
    with fonts.fonts_for(wrapped(text)) as note:
        figure = Figure(figsize=(12, 7.5), facecolor="white")
        head = TransformedBbox(Bbox([[0.02, 0.88], [0.98, 0.98]]), figure.transFigure)  # wide letters, stacked accents
        figure.text(0.5, 0.93, wrapped(text) or "(no text)", ha="center", va="center", fontsize=14, parse_math=False,
                    clip_on=True, clip_box=head)
        figure.text(0.5, 0.99, note, ha="center", va="center", fontsize=8, color="#666")
        upper = figure.add_gridspec(1, 3, left=0.03, right=0.97, top=0.827, bottom=0.412, wspace=0.35)
        lower = figure.add_gridspec(1, 5, left=0.03, right=0.97, top=0.335, bottom=0.03, wspace=0.12)
        shapes = [upper[i] for i in range(3)] + [lower[i] for i in range(len(found[:5]))]
        axes = [figure.add_subplot(shape, xticks=[], yticks=[]) for shape in shapes]
        for axis, name, image in zip(axes, ("reference", "what the gate changed", "target"),
                                     (reference, reference.convert("L").convert("RGB"), rows.load_image(target))):
            axis.imshow(image)
            axis.set_title(name, fontsize=11)
        top = max(float(np.max(heat)), 1e-6)
        layer = axes[1].imshow(heat, cmap="inferno", alpha=0.6, vmin=0, vmax=top, interpolation="nearest",
                               extent=(-0.5, reference.width - 0.5, reference.height - 0.5, -0.5))
        bar = figure.colorbar(layer, cax=axes[1].inset_axes((1.04, 0, 0.05, 1)), format=lambda value, _: f"{100 * value:g} %")
        bar.set_label("relative change of the patch's features", fontsize=9)
        for rank, (axis, (picture, right)) in enumerate(zip(axes[3:], found), 1):
            image = rows.load_image(picture)
            image.thumbnail((480, 480))
            axis.imshow(image)
            axis.set_title(f"{rank}  {'✓ right' if right else '✗ wrong'}", fontsize=11, color=RIGHT if right else WRONG)
            axis.spines[:].set(color=RIGHT if right else WRONG, linewidth=4)
        with files.whole_file(path, "wb") as file:
            figure.savefig(file, format="png", dpi=100)


# --- from the files that train_cir.py leaves ------------

def draw_search(content):
    """The page of results of kind search: reference, text, hits and note of write_page."""
    write_page(content["page"], content["title"], content["reference"], content["text"], content["hits"], content["note"])


def draw_gate_maps(content):
    """The figures of results of kind gate maps: for each the arguments of draw_gate_map; the reference is prepared as for the model."""
    for one in content["maps"]:
        seen = rows.tensor_image(cirr.prepare(rows.load_image(one["reference"]), *content["preparation"]))
        draw_gate_map(content["page"].with_name(one["file"]), seen, np.array(one["heat"]), one["text"], one["target"], one["found"])


KINDS = {"search": draw_search, "gate maps": draw_gate_maps}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw what train_cir.py --search or --gate-maps has found, beside its results")
    parser.add_argument("results", metavar="FILE.results.json")
    content = pages.read_results(parser.parse_args(argv).results, KINDS)
    KINDS[content["kind"]](content)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
