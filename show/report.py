"""report.py: an evaluation as one web page that needs no other file and runs no script.

    write                           parts (Bars, Table, Charts, Cards, Figures, Note) -> a page; whatever a text holds is shown as text
    gated, captions, retrieval      what a stage has found -> its parts: write(path, title, gated(...))
    outcome                         what came out in a line, for the title: exact match with the gates and without, the difference
    about                           lines on how it was made: command, version of this project, packages, date
    python -m show.report FILE      the page of the results that a training script left (PAGE.results.json): it draws nothing itself
    expected_calibration_error      computed here and nowhere else

Intervals are those of metrics.resampled_means over pictures: what is asked about one picture is not independent.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import math
import pathlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import numpy as np

import metrics
from data import cirr
from data.rows import load_image
from engine import environment, errors, files, pages, runfolder
from engine.errors import DataError
from show.gallery import thumbnail

LISTED, FIXED = 40, 12  # cards of a list, and of the samples that are the same at every evaluation
SCORES = ("EM", "VQA", "BLEU", "ROUGE-L")  # of metrics.answer_scores, in percent
UNGATED, CLOSED = "BLIP-2, no gates", "gates closed"  # systems of eval_gated
FIGURE_SIDE = 1400
SIDE, SMALLEST, BYTES = 240, 48, 6_000_000  # pixels of a picture; where all together have more bytes, they are made smaller
POINTS = 400  # of a line; a longer one is thinned
WIDTH, HEIGHT, LEFT, BOTTOM = 360, 220, 46, 26  # of a chart, and of the room for its numbers
RECALLS = {"R@1": 1, "R@5": 5, "R@10": 10, "R@50": 50}, {"Rs@1": 1, "Rs@2": 2, "Rs@3": 3}  # of all pictures, of the image set

PAGE = """
{%- macro say(text) %}<bdi>{{ text|string|truncate(600, true, "…", 0) }}</bdi>{% endmacro -%}
{%- macro verdict(mark) %}{% if mark %} <b class="{{ mark }}">{{ "✓" if mark == "right" else "✗" }}</b>{% endif %}
{%- endmacro -%}
{%- macro note(part) %}{% if part.note %}<p><small>{{ part.note }}</small></p>{% endif %}{% endmacro -%}
{%- macro cell(tag, value) %}{% if value is string %}<{{ tag }}>{{ say(value) }}{% else %}
{%- if value.shade %}<{{ tag }} class="s{{ value.shade }}">{% else %}<{{ tag }}>{% endif %}{{ say(value.text) }}
{%- if value.small %}<small>{{ value.small }}</small>{% endif %}{% endif %}</{{ tag }}>{% endmacro -%}
{%- macro picture(path, name) %}{% if path in numbers -%}
<div class="pic p{{ numbers[path] }}" role="img" aria-label="{{ name }}"></div>
{%- else %}<div class="pic none">cannot be read</div>{% endif %}{% endmacro -%}
{%- macro table(part) %}{{ note(part) }}<div class="wide">
<table class="{{ "upright" if part.upright else "scores" if part.head else "pairs" }}">
{%- if part.head %}<tr>{% for name in part.head %}<th>{{ say(name) }}</th>{% endfor %}</tr>{% endif %}
{% for row in part.rows %}<tr>{{ cell("th", row[0]) }}{% for value in row[1:] %}{{ cell("td", value) }}{% endfor %}</tr>
{% else %}<tr><td>(nothing)</td></tr>{% endfor %}</table></div>{% endmacro -%}
{%- macro chart(one) %}<figure><p><b>{{ one.heading }}</b></p>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ one.heading }}">
{% for place, label in one.yticks %}<path class="grid" d="M{{ left }} {{ place }}H{{ width }}"/>
<text x="{{ left - 6 }}" y="{{ place + 4 }}" text-anchor="end">{{ label }}</text>{% endfor %}
{% for place, label in one.xticks %}<text x="{{ place }}" y="{{ height - 6 }}" text-anchor="middle">{{ label }}</text>{% endfor %}
{% for x, y, w, h, _ in one.bars %}<rect x="{{ x }}" y="{{ y }}" width="{{ w }}" height="{{ h }}"/>{% endfor %}
{% for line in one.lines %}{% set colour = "c%d" % (loop.index0 % 6) %}
<polyline class="{{ colour }}" points="{% for x, y in line.places %}{{ x }},{{ y }} {% endfor %}"/>
{% for x, y in line.places if line.dots %}<circle class="{{ colour }}" cx="{{ x }}" cy="{{ y }}" r="3"/>{% endfor %}
{% endfor %}{% for x, y, w, h, label in one.bars %}
<text class="on" x="{{ x + w / 2 }}" y="{{ y - 4 if y > 30 else y + 14 }}" text-anchor="middle">{{ label }}</text>
{%- endfor %}</svg>
<p class="key">{% for line in one.lines %}<span><i class="c{{ loop.index0 % 6 }}"></i>{{ say(line.label) }}</span>
{% endfor %}</p>{% if one.axis %}<small>{{ one.axis }}</small>{% endif %}</figure>{% endmacro -%}
{%- macro charts(part) %}{{ note(part) }}<div class="all">{% for one in part.charts %}{{ chart(one) }}{% endfor %}</div>
{%- endmacro -%}
{%- macro cards(part) %}{{ note(part) }}<div class="all">{% for card in part.cards %}<figure>
{%- if card.pictures|length == 1 %}{{ picture(card.pictures[0].path, card.small) }}{% else %}<div class="row">
{%- for one in card.pictures %}<div>{{ picture(one.path, one.label) }}<small>{{ one.label }}{{ verdict(one.mark) }}</small></div>
{%- endfor %}
</div>{% endif %}{% if card.head %}<p class="head">{{ say(card.head) }}</p>{% endif %}
{% for line in card.lines %}<p><small>{{ say(line.label) }}</small> {{ say(line.text or "(nothing)") }}{{ verdict(line.mark) }}</p>
{% endfor %}<small>{{ say(card.small) }}</small></figure>{% else %}<p>(none)</p>{% endfor %}</div>{% endmacro -%}
{%- macro bars(part) %}<figure class="bars">{% for row in part.rows %}<p><span>{{ say(row.label) }}</span>
<span><b>{{ row.text }}</b> <small>{{ row.small }}</small></span></p>
<svg viewBox="0 0 {{ width }} 14" preserveAspectRatio="none" aria-hidden="true"><rect class="track" width="{{ width }}" height="14"/>
<rect class="{{ "own" if loop.last }}" width="{{ row.value }}" height="14"/>{% if row.ends -%}
<path class="ends" d="M{{ row.ends[0] }} 7H{{ row.ends[1] }}M{{ row.ends[0] }} 3V11M{{ row.ends[1] }} 3V11"/>{% endif %}</svg>
{% endfor %}</figure>{{ note(part) }}{% endmacro -%}
{%- macro figures(part) %}{{ note(part) }}{% for one in part.figures %}<div class="wide">
{%- if one.path in numbers %}<div class="drawn p{{ numbers[one.path] }}" role="img" aria-label="{{ one.label }}"></div>
{%- else %}<p>cannot be read</p>{% endif %}</div><p><small>{{ say(one.label) }}</small></p>{% endfor %}{% endmacro -%}
{%- macro notes(part) %}{% for line in part.lines %}<p>{{ say(line) }}</p>{% endfor %}{% endmacro -%}
{%- set show = {"table": table, "charts": charts, "cards": cards, "notes": notes, "bars": bars, "figures": figures} -%}
<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<style>:root{--page:#fafafa;--box:#fff;--ink:#222;--faint:#666;--line:#ddd;--good:#1a7f37;--bad:#c62828;--shade:31,111,235}
@media(prefers-color-scheme:dark){:root{--page:#16181c;--box:#1f2227;--ink:#e6e6e6;--faint:#a3a8b0;--line:#3a3f47;
--good:#5fcf80;--bad:#ff8a80;--shade:77,144,254}}
body{font:15px/1.45 system-ui,sans-serif;margin:1.2em auto;max-width:80em;padding:0 1em;color:var(--ink);background:var(--page)}
h1{font-size:1.4em}h2{font-size:1.15em}h1,p,figure,summary{overflow-wrap:anywhere}p{margin:.3em 0}
small{color:var(--faint);font-size:.85em}
section{margin:1.8em 0}h2,summary{margin:0 0 .5em}summary{font-size:1.15em;font-weight:bold;cursor:pointer}
.all{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17em),1fr));gap:.8em}
figure{margin:0;padding:.7em;background:var(--box);border:1px solid var(--line);border-radius:6px;min-width:0}
.pic{height:11em;margin-bottom:.5em;background:center/contain no-repeat;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.none{display:flex;align-items:center;justify-content:center;text-align:center;color:var(--faint);border:1px dashed var(--line)}
.row{display:grid;grid-template-columns:repeat(10,1fr);gap:.4em .2em;text-align:center;margin-bottom:.5em}
.row>*{grid-column:span 2;min-width:0}
.row>:nth-child(-n+2){grid-column:span 5}.row .pic{height:4em;margin:0;font-size:.85em}.row>:nth-child(-n+2) .pic{height:9em}
.head{font-weight:600}.right{color:var(--good)}.wrong{color:var(--bad)}
.wide{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3em .9em .3em 0;text-align:left;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--line)}
th small,td small{display:block;font-weight:normal}tr:first-child th{white-space:normal;min-width:4em;vertical-align:bottom}
tr>th:first-child{white-space:normal;min-width:5.5em;max-width:14em;position:sticky;left:0;background:var(--page)}
.pairs td{white-space:normal;overflow-wrap:anywhere}
.upright td{text-align:center;padding:.3em .5em}
.upright tr:first-child th:not(:first-child){min-width:0;white-space:nowrap;padding:.4em 0;
writing-mode:vertical-rl;transform:rotate(180deg)}
{% for n in range(1, 11) %}.s{{ n }}{background:rgba(var(--shade),{{ n * 0.06 }})}{% endfor %}

svg{display:block;width:100%;max-width:32em}svg text{font-size:12px;fill:var(--faint)}
svg .on{font-size:10px;fill:var(--ink);stroke:var(--box);stroke-width:3px;paint-order:stroke}
.grid{stroke:var(--line)}rect{fill:rgba(var(--shade),.45)}polyline{fill:none;stroke-width:2}circle{stroke:none}
{% for colour in ("#1f6feb", "#d9822b", "#2e9e5b", "#a14fc4", "#c2455e", "#7d8590") %}
polyline.c{{ loop.index0 }}{stroke:{{ colour }}}
circle.c{{ loop.index0 }}{fill:{{ colour }}}i.c{{ loop.index0 }}{background:{{ colour }}}{% endfor %}

.bars{max-width:46em}.bars p{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1em;margin:.6em 0 .15em}
.bars p:first-child{margin-top:0}.bars svg{max-width:none;height:.9em}.bars .track{fill:var(--line);opacity:.5}
.bars .own{fill:rgba(var(--shade),.95)}
.ends{stroke:var(--ink);stroke-width:1.5;fill:none;vector-effect:non-scaling-stroke}
.drawn{background:center/100% 100% no-repeat;min-width:44em;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.key{display:flex;flex-wrap:wrap;gap:.2em 1em}
.key i{display:inline-block;width:1.2em;height:.25em;margin-right:.4em;vertical-align:middle}
{% for uri in uris %}.p{{ loop.index0 }}{background-image:url({{ uri }})}
{% endfor %}{% for n, ratio in ratios.items() %}.drawn.p{{ n }}{aspect-ratio:{{ ratio }}}{% endfor %}</style><h1>{{ say(title) }}</h1>
{% for part in parts %}<section>{% if part.folded is none %}<h2>{{ say(part.heading) }}</h2>{{ show[part.kind](part) }}
{%- else %}<details{% if not part.folded %} open{% endif %}><summary>{{ say(part.heading) }}</summary>
{{ show[part.kind](part) }}</details>{% endif %}</section>
{% endfor %}</html>
"""


# --- what a page is made of ------------

class Cell(NamedTuple):
    text: str
    small: str = ""  # below it
    shade: int = 0  # 0 to 10


class Picture(NamedTuple):
    path: str
    label: str = ""
    mark: str = ""  # "", "right" or "wrong"


class Line(NamedTuple):
    label: str
    text: str
    mark: str = ""


class Card(NamedTuple):
    pictures: list  # of Picture
    head: str
    lines: list  # of Line
    small: str


class Curve(NamedTuple):
    label: str
    places: list  # (x, y)
    dots: bool


class Chart(NamedTuple):
    """A chart in the units of its SVG, see line_chart and reliability_chart."""
    heading: str
    xticks: list  # (place, label)
    yticks: list
    lines: list  # of Curve
    bars: tuple = ()  # (x, y, width, height, label)
    axis: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of texts and Cells; the first of a row names it. folded: True or False make it a part that opens and closes."""
    kind: ClassVar = "table"
    heading: str
    head: list
    rows: list
    note: str = ""
    folded: bool | None = None
    upright: bool = False  # column names that stand upright, for narrow columns


@dataclass(frozen=True)
class Charts:
    kind: ClassVar = "charts"
    heading: str
    charts: list
    note: str = ""
    folded: bool | None = None


class Bar(NamedTuple):
    """A system's score: value and the two ends of its interval in the chart's units, None without any; text and small as in a Cell."""
    label: str
    text: str
    small: str
    value: float
    ends: tuple | None


@dataclass(frozen=True)
class Bars:
    """A bar for each system, the trained one last; see score_bars."""
    kind: ClassVar = "bars"
    heading: str
    rows: list  # of Bar
    note: str = ""
    folded: bool | None = None


@dataclass(frozen=True)
class Figures:
    """Figures drawn elsewhere, each as wide as the page: Pictures with a label."""
    kind: ClassVar = "figures"
    heading: str
    figures: list
    note: str = ""
    folded: bool | None = None


@dataclass(frozen=True)
class Cards:
    kind: ClassVar = "cards"
    heading: str
    cards: list
    note: str = ""
    folded: bool | None = True


@dataclass(frozen=True)
class Note:
    kind: ClassVar = "notes"
    heading: str
    lines: list
    folded: bool | None = None


def thumbnails(paths, side=SIDE):
    """{path: data URI} of the pictures that can be read, of at most BYTES together (or SMALLEST pixels each)."""
    def attempt(path):
        try:
            return thumbnail(path, side)
        except DataError:
            return None

    with ThreadPoolExecutor(4) as pool:
        uris = {path: uri for path, uri in zip(paths, pool.map(attempt, paths)) if uri}
    size = sum(map(len, uris.values()))
    if size <= BYTES or side <= SMALLEST:
        return uris
    return thumbnails(paths, max(SMALLEST, int(0.85 * side * math.sqrt(BYTES / size))))  # a small picture has more bytes a pixel


@functools.cache
def template():
    """PAGE, compiled once for all pages of a process."""
    import jinja2
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)


def drawings(paths):
    """Figures as thumbnails of FIGURE_SIDE pixels -> ({path: data URI}, {path: width / height}) of those that can be read."""
    uris, ratios = {}, {}
    for path in paths:
        with contextlib.suppress(DataError):
            uris[path] = thumbnail(path, FIGURE_SIDE)
            ratios[path] = round(np.divide(*load_image(path).size), 4)
    return uris, ratios


def write(path, title, parts):
    """A page of `parts`. Every picture stands in the file once; one that cannot be read is a box that says so."""
    wanted = dict.fromkeys(one.path for part in parts if part.kind == "cards" for card in part.cards for one in card.pictures)
    drawn, ratios = drawings(dict.fromkeys(one.path for part in parts if part.kind == "figures" for one in part.figures))
    uris = thumbnails(list(wanted)) | drawn
    numbers = {name: n for n, name in enumerate(uris)}
    page = template().render(title=title, parts=parts, uris=list(uris.values()), numbers=numbers, width=WIDTH, height=HEIGHT, left=LEFT,
                             ratios={numbers[name]: ratio for name, ratio in ratios.items()})
    with files.whole_file(path) as file:
        file.write(page.encode("utf-8", "replace").decode())  # file names can hold bytes that are no UTF-8


def about(**lines):
    """How a result was made, see environment.provenance: the last part of a page."""
    return made_table(environment.provenance(**lines))


def made_table(lines):
    """The part of the lines [(name, text)] of environment.provenance."""
    return Table("How this was made", (), [tuple(line) for line in lines], folded=True)


# --- numbers ------------

def with_interval(value, means, digits=1, sign=""):
    """A Cell of a value and its 95 % interval from its resampled means [R]; no interval where these are NaN."""
    if np.isnan(means).any():
        return Cell(f"{value:{sign}.{digits}f}")
    low, high = np.percentile(means, [2.5, 97.5])
    return Cell(f"{value:{sign}.{digits}f}", f"{low:{sign}.{digits}f} to {high:{sign}.{digits}f}")


def with_intervals(values, means, digits=1):
    """Cells of values [K] and their resampled means [R,K]."""
    return [with_interval(value, means[:, k], digits) for k, value in enumerate(values)]


def calibration_bins(confidence, correct, bins=10):
    """Rows of `bins` bins of equal width, those that are not empty: (number, rows, mean confidence, share that is right).

    confidence: [N] in 0..1; correct: [N] in 0..1. A bin holds its upper edge. ValueError: a confidence outside 0..1."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(confidence) or not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidences between 0 and 1 wanted, got {confidence[:5]}")
    number = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)  # [N]
    return [(n, int(here.sum()), float(confidence[here].mean()), float(correct[here].mean()))
            for n in range(bins) for here in [number == n] if here.any()]


def expected_calibration_error(confidence, correct, bins=10):
    """Guo et al. 2017, equation 3: sum over the bins of (rows / all rows) |share that is right - mean confidence|, 0..1."""
    found = calibration_bins(confidence, correct, bins)
    return sum(count * abs(right - sure) for _, count, sure, right in found) / len(confidence)


def fixed_samples(keys, count=FIXED):
    """The numbers of the `count` keys (picture, text, ...) whose hashes come first: the same ones in any order of the rows."""
    def place(number):
        return hashlib.sha256("\0".join(keys[number]).encode("utf-8", "surrogatepass")).digest()
    return sorted(range(len(keys)), key=place)[:count]


def interval_note(count, what):
    """What the figures below a value are, in a line."""
    if count == 1:
        return f"One of the {what} only: no interval can be given."
    return (f"Below each value: 95 % bootstrap interval from {metrics.RESAMPLES:,} draws of the {count:,} {what} with replacement, all "
            "that belongs to a drawn one together. It does not cover what another seed of training would change.")


# --- charts ------------

def ticks(low, high):
    """Three to seven round numbers within low..high, low < high."""
    raw = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def scale(low, high, start, end):
    """The function that takes low..high to start..end."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def spread(values, room=0.0):
    """(low, high) of the values with `room` (share of the width) on both sides; never of no width."""
    low, high = min(values), max(values)
    room = room * (high - low) if high > low else max(abs(low), 1) / 2
    return low - room, high + room


def line_chart(heading, lines, axis=""):
    """Chart of lines [(label, [(x, y)], with dots?)]; what is not finite is left out, None without any point."""
    lines = [(label, [p for p in points if all(map(math.isfinite, p))], dots) for label, points, dots in lines]
    lines = [(label, points[::math.ceil(len(points) / POINTS)], dots) for label, points, dots in lines if points]
    if not lines:
        return None
    xs, ys = zip(*(point for _, points, _ in lines for point in points))
    (left, right), (low, high) = spread(xs), spread(ys, 0.05)
    across, up = scale(left, right, LEFT + 8, WIDTH - 14), scale(low, high, HEIGHT - BOTTOM, 8)
    drawn = [Curve(label, [(across(x), up(y)) for x, y in points], dots or len(points) == 1) for label, points, dots in lines]
    xticks, yticks = ([(place(v), f"{v:g}") for v in ticks(*ends)] for place, ends in ((across, (left, right)), (up, (low, high))))
    return Chart(heading, xticks, yticks, drawn, axis=axis)


def read_lines(log_path, panels):
    """training_log.csv -> [(heading, lines for line_chart)]; panels as in runfolder.draw_curves."""
    table = runfolder.read_log(log_path)
    return [(heading, [(label, [(float(r["step"]), float(r[column])) for r in table if r["kind"] == kind and r.get(column)],
                        kind == "epoch") for kind, column, label in lines]) for heading, lines in panels]


def curves(log_path, panels):
    """The part with training_log.csv as charts, or with why there are none: what was evaluated is not lost for that."""
    if log_path is None or not pathlib.Path(log_path).is_file():
        return Note("Training", ["There is no training_log.csv beside this checkpoint."])
    try:
        drawn = [line_chart(heading, lines, "optimizer step") for heading, lines in read_lines(log_path, panels)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        return Note("Training", [f"{log_path} cannot be drawn: {type(error).__name__}: {error}"])
    return Charts("Training", [chart for chart in drawn if chart])


def reliability_chart(bins):
    """Chart of calibration_bins: a bar is how often the answers of its confidence are right, the line where both are equal."""
    across, up = scale(0, 1, LEFT + 8, WIDTH - 14), scale(0, 1, HEIGHT - BOTTOM, 8)
    step = across(0.1) - across(0)
    bars = [(round(across(n / 10) + 1, 1), up(right), round(step - 2, 1), round(up(0) - up(right), 1), count)
            for n, count, _, right in bins]
    line = Curve("as often right as it is sure", [(across(0), up(0)), (across(1), up(1))], False)
    marks = [n / 5 for n in range(6)]
    return Chart("Share that is right", [(across(v), f"{v:g}") for v in marks], [(up(v), f"{v:g}") for v in marks], [line], bars,
                 "confidence of the answer; on a bar: how many answers")


# --- answers: eval_gated ------------

def probability(one):
    """Geometric mean of the answer's token probabilities, 0..1; None where there is no "confidence"."""
    return math.exp(one["confidence"]) if one.get("confidence") is not None else None


def picture_of(row):
    return row.image or row.name


def exact_matches(questions, results):
    """Exact match of every answer in percent: [N]."""
    return 100 * np.array([float(metrics.exact_match(one["prediction"], r.answer.strip())) for r, one in zip(questions, results)])


def answer_scores(questions, results):
    """SCORES of every answer in percent: [N,4]."""
    scores = [metrics.answer_scores(one["prediction"], r.answer.strip(), r.people) for r, one in zip(questions, results)]
    return 100 * np.array([[one[name] for name in SCORES] for one in scores])


def headline(values, names, units, unit, digits=1):
    """The first table. values: {system: [N,K]}, the trained system last; names: of the K scores; units: the N pictures.

    unit: what they are called. Beside the first score stands by how much the trained system is better in it."""
    systems, averages, rows = list(values), {name: found.mean(0) for name, found in values.items()}, []
    means = metrics.resampled_means(np.concatenate(list(values.values()), axis=1), units).reshape(-1, len(systems), len(names))
    for s, system in enumerate(systems):
        row = [system, *with_intervals(averages[system], means[:, s], digits)]
        if len(systems) > 1:
            gap = averages[systems[-1]][0] - averages[system][0]
            row.insert(2, "" if system == systems[-1] else with_interval(gap, means[:, -1, 0] - means[:, s, 0], digits, "+"))
        rows.append(row)
    head = ["system", names[0], *([f"{systems[-1]} minus this"] if len(systems) > 1 else []), *names[1:]]
    note = " A difference is of the same draws." if len(systems) > 1 else ""
    return Table("Scores", head, rows, interval_note(len(set(units)), unit) + note)


def score_bars(values, units, name, digits=1, top=100.0):
    """The first chart: the score `name` of every system with its interval. values: {system: [N]}; top: what the bar's full width is."""
    means = metrics.resampled_means(np.column_stack(list(values.values())), units)
    rows, across = [], scale(0, top, 0, WIDTH)
    for s, (system, found) in enumerate(values.items()):
        cell = with_interval(found.mean(), means[:, s], digits)
        ends = None if np.isnan(means).any() else tuple(across(end) for end in np.percentile(means[:, s], [2.5, 97.5]))
        rows.append(Bar(system, cell.text, cell.small, across(found.mean()), ends))
    return Bars(name, rows, "The line on a bar is its 95 % interval." if rows[0].ends else "")


def told_outcome(values, units, name, digits=1, base=None, called="", unit=""):
    """"71.1 % exact match, ungated 48.6 %, +22.5 [18.9, 26.0]": the last system, and beside it `base`. values: {system: [N]}."""
    own = list(values)[-1]
    told = f"{values[own].mean():.{digits}f}{unit} {name}"
    if base is None:
        return told
    means = metrics.resampled_means(np.column_stack([values[own], values[base]]), units)
    gap = values[own].mean() - values[base].mean()
    told += f", {called} {values[base].mean():.{digits}f}{unit}, {gap:+.{digits}f}"
    if np.isnan(means).any():
        return told
    low, high = np.percentile(means[:, 0] - means[:, 1], [2.5, 97.5])
    return f"{told} [{low:.{digits}f}, {high:.{digits}f}]"


def outcome(what, questions, systems):
    """The title of a page of gated(): `what`, and the exact match of the trained system beside that without gates or with closed ones."""
    values = {name: exact_matches(questions, found) for name, found in systems.items()}
    base = next((name for name in (UNGATED, CLOSED) if name in systems and name != list(systems)[-1]), None)
    called = "ungated" if base == UNGATED else CLOSED
    return f"{what}: {told_outcome(values, [picture_of(r) for r in questions], 'exact match', 1, base, called, ' %')}"


def by_type(questions, scores):
    """Exact match of every question type and system with its interval; scores: {system: [N,4]}."""
    kinds, systems, rows = sorted({r.question_type for r in questions if r.question_type}), list(scores), []
    systems = systems[-1:] + systems[:-1]  # a phone shows the first
    for kind in kinds:
        chosen = [i for i, r in enumerate(questions) if r.question_type == kind]
        units = [picture_of(questions[i]) for i in chosen]
        values = np.column_stack([scores[name][chosen, 0] for name in systems])  # [n,S]
        means = metrics.resampled_means(values, units)
        rows.append([Cell(kind, f"{len(chosen):,} questions")] + with_intervals(values.mean(0), means))
    return Table("Exact match by question type", ["type", *systems], rows)


def full_table(table):
    """The rows of evaluation.score_table as they are."""
    names = [name for name in dict.fromkeys(name for row in table for name in row) if name not in ("type", "system")]

    def format_cell(row, name):
        value = row.get(name, "")
        if isinstance(value, float):
            return f"{value:.{1 if name in (*SCORES, 'BLEU-AQ') else 3}f}"
        return f"{value:,}" if isinstance(value, int) else value

    return Table("All scores by question type", ["type", "system", *names],
                 [[row["type"], row["system"], *(format_cell(row, name) for name in names)] for row in table], folded=True)


def style_names(questions, systems, styles):
    """{name in lower case: name} of the styles: those given, of the rows, and the answers that the model took for one."""
    hits = [r.answer for found in systems.values() for r, one in zip(questions, found) if one.get("hit_rows")]
    names = sorted({text.strip() for text in (*styles, *(r.style for r in questions), *hits) if text.strip()})
    return {name.lower(): name for name in names}


def confusion(questions, results, names, system):
    """Reference by prediction of the questions whose answer is a style; what is no style is in the column "other"."""
    pairs = Counter((r.answer.strip().lower(), one["prediction"].strip().lower()) for r, one in zip(questions, results))
    pairs = Counter({pair: n for pair, n in pairs.items() if pair[0] in names})
    there = sorted({name for pair in pairs for name in pair if name in names})
    rows = []
    for name in there:
        counts = [pairs[name, other] for other in there]
        total = sum(n for pair, n in pairs.items() if pair[0] == name)
        counts.append(total - sum(counts))
        share = f"{100 * pairs[name, name] / total:.0f}" if total else ""
        cells = [Cell(str(n) if n else "·", shade=math.ceil(10 * n / max(total, 1))) for n in counts]
        rows.append([names[name], *cells, str(total), share])
    return Table(f"Style confusion of {system}", ["style", *(names[name] for name in there), "other", "all", "right, %"], rows,
                 "A row: questions whose answer is this style; a column: what was answered. The stronger the colour, the larger "
                 "the share of its row.", False, True)


class Answers:
    """Questions and what the systems say, as cards."""

    def __init__(self, questions, systems, names):
        self.questions, self.systems, self.names, self.trained = questions, systems, names, list(systems)[-1]
        self.beside = [name for name in (UNGATED, CLOSED) if name in systems and name != self.trained]
        self.base = next(iter(self.beside), None)

    def right(self, i, system):
        return bool(metrics.exact_match(self.systems[system][i]["prediction"], self.questions[i].answer.strip()))

    def mark(self, i, system):
        return "right" if self.right(i, system) else "wrong"

    def is_style(self, i):
        return self.questions[i].answer.strip().lower() in self.names

    def card(self, i):
        row, confidence = self.questions[i], probability(self.systems[self.trained][i])
        lines = [Line("reference", row.answer)] + [Line(name, self.systems[name][i]["prediction"], self.mark(i, name))
                                                   for name in (self.trained, *self.beside)]
        lines += [Line("confidence", f"{confidence:.2f}")] if confidence is not None else []
        return Card([Picture(row.image)], row.question, lines, " · ".join(filter(None, (row.question_type, row.style, row.name))))

    def picture_card(self, numbers):
        first, lines = self.questions[numbers[0]], []
        for i in numbers:
            said = self.systems[self.trained][i]["prediction"] or "(nothing)"
            wanted = "" if self.right(i, self.trained) else f" (reference: {self.questions[i].answer})"
            lines.append(Line(self.questions[i].question, said + wanted, self.mark(i, self.trained)))
        return Card([Picture(first.image)], "", lines, " · ".join(filter(None, (first.style, first.name))))

    def order(self, scores):
        """Numbers from worst to best: by EM, then VQA accuracy and ROUGE-L, then by what shows that the model was far from it."""
        results = self.systems[self.trained]

        def place(i):
            exact, vqa, _, rouge = scores[i]
            confidence = probability(results[i]) or 0.0
            return exact, vqa, rouge, confidence if exact else -confidence, -results[i].get("lm", 0.0)
        return sorted(range(len(results)), key=place)

    def compared(self):
        """The table of gated beside ungated answers, and the lists "helped" and "hurt"."""
        name, base = self.trained, self.base
        if base is None:
            return [Note("Gated beside ungated", [f"There are no answers of “{UNGATED}” (--no-baselines)."])]
        groups = {}  # (is it right, is the base right): numbers
        for i in range(len(self.questions)):
            groups.setdefault((self.right(i, name), self.right(i, base)), []).append(i)
        rows = [[f"{name}: {word}", *(f"{len(groups.get((a, b), ())):,}" for b in (True, False))]
                for word, a in (("right", True), ("wrong", False))]
        what = "Gate" if name == "gated" else "Training"
        helped, hurt = groups.get((True, False), []), groups.get((False, True), [])
        return [Table(f"{name} beside {base}", ["", f"{base}: right", f"{base}: wrong"], rows, "Questions by exact match."),
                card_list(f"{what} helped", helped, self.card, f"Exact match: {name} is right and {base} is wrong."),
                card_list(f"{what} hurt", hurt, self.card, f"Exact match: {name} is wrong and {base} is right.")]

    def style_and_thing(self):
        """The lists "right style, wrong thing" and "right thing, wrong style", by picture."""
        pictures = {}
        for i, row in enumerate(self.questions):
            pictures.setdefault(picture_of(row), ([], []))[not self.is_style(i)].append(i)
        both, groups = [one for one in pictures.values() if all(one)], {}  # (style right, thing right): numbers of each picture
        for style, thing in both:
            right = [all(self.right(i, self.trained) for i in numbers) for numbers in (style, thing)]
            groups.setdefault(tuple(right), []).append(sorted(style + thing))
        rule = ("A style question is one whose answer is the name of a style; every other question is about the thing. "
                f"{len(both):,} of {len(pictures):,} pictures have both kinds. Here: ")
        return [card_list("Right style, wrong thing", groups.get((True, False), []), self.picture_card,
                       rule + "all style questions of the picture are right, and at least one other is wrong."),
                card_list("Right thing, wrong style", groups.get((False, True), []), self.picture_card,
                       rule + "all other questions of the picture are right, and at least one style question is wrong.")]

    def calibration(self):
        """The reliability diagram of the trained system, and the ECE of every system that has a confidence."""
        found = {}
        for name, answers in self.systems.items():
            pairs = [(probability(one), self.right(i, name)) for i, one in enumerate(answers)]
            if any(confidence is not None for confidence, _ in pairs):
                found[name] = tuple(zip(*((confidence, right) for confidence, right in pairs if confidence is not None)))
        if not found:
            return Note("Confidence", ["This evaluation has no confidence of its answers: no reliability diagram."])
        errors = "; ".join(f"{name} {100 * expected_calibration_error(*pairs):.1f} %" for name, pairs in found.items())
        note = ("Confidence: geometric mean of the probabilities of the answer's tokens; right: exact match. Ten bins of equal "
                "width. Expected calibration error (Guo et al. 2017), the mean distance between confidence and the share that is "
                f"right: {errors}.")
        charts = [reliability_chart(calibration_bins(*found[self.trained]))] if self.trained in found else []
        return Charts("Confidence", charts, note)


def map_figures(paths):
    """The part with figures that a run drew, where it drew any."""
    return [Figures("Maps", [Picture(str(path), pathlib.Path(path).name) for path in paths])] if paths else []


def card_list(heading, members, card, note):
    """Cards of the first LISTED members."""
    few = f"{min(LISTED, len(members))} of {len(members):,}" if len(members) > LISTED else f"{len(members):,}"
    return Cards(f"{heading} ({few})", [card(one) for one in members[:LISTED]], note)


def extremes(order, card, note, count=LISTED):
    """The worst and the best. order: numbers from worst to best."""
    count = min(count, max(1, len(order) // 2))  # none is on both sides
    return [Cards(f"The {count} worst of {len(order):,}", list(map(card, order[:count])), note),
            Cards(f"The {count} best of {len(order):,}", list(map(card, order[::-1][:count])), note)]


def samples(order, keys, card, note, seed=0):
    """The fixed samples, the worst, the best and random ones. order: see extremes; keys: see fixed_samples."""
    drawn = sorted(np.random.default_rng(seed).choice(len(order), min(LISTED, len(order)), replace=False).tolist())
    fixed = fixed_samples(keys)
    return [Cards(f"{len(fixed)} samples, the same at every evaluation of these data", list(map(card, fixed)), "", False),
            *extremes(order, card, note), Cards(f"{len(drawn)} random ones", list(map(card, drawn)), f"Drawn with seed {seed}.")]


def gated(questions, systems, table=(), log_path=None, panels=(), styles=(), last=(), figures=()):
    """Parts of the page of eval_gated.

    questions: N Rows; systems: {name: N dicts as evaluation.evaluate returns them, at least "prediction"}, the trained system
    last; "confidence": mean log-probability of the answer's tokens. table: of evaluation.score_table. log_path, panels: see
    curves. styles: names beside those in the rows. last: further parts, such as about(). figures: paths of drawn maps."""
    names = style_names(questions, systems, styles)
    scores = {name: answer_scores(questions, found) for name, found in systems.items()}
    answers = Answers(questions, systems, names)
    order = answers.order(scores[answers.trained])
    note = ("By exact match, then VQA accuracy and ROUGE-L, then confidence (the surest of the wrong are the worst, of the right "
            "the best), then the loss of the reference.")
    units = [picture_of(r) for r in questions]
    parts = [score_bars({name: found[:, 0] for name, found in scores.items()}, units, "Exact match, percent"),
             headline(scores, SCORES, units, "pictures"), by_type(questions, scores)]
    parts += [full_table(table)] if table else []
    parts += map_figures(figures)
    parts += [curves(log_path, panels), answers.calibration()]
    if any(answers.is_style(i) for i in range(len(questions))):
        parts += [confusion(questions, systems[name], names, name) for name in filter(None, (answers.trained, answers.base))]
    parts += samples(order, [(r.name, r.question) for r in questions], answers.card, note)
    return [*parts, *answers.compared(), *answers.style_and_thing(), *last]


# --- captions: train_blip_caption ------------

class Captioned:
    """Pictures and what the systems say of them, with its scores, as cards. See captions()."""

    def __init__(self, pictures, systems):
        self.pictures, self.systems, self.trained = pictures, systems, list(systems)[-1]
        references = [list(p.captions) for p in pictures]
        self.scores = {name: metrics.score_captions([one["caption"] for one in found], references)
                       for name, found in systems.items()}
        three = (metrics.meteor_name(), "ROUGE-L", "CIDEr-D")
        self.names = [name for name in three if len(pictures) > 1 or name != "CIDEr-D"]  # it has no value for a single picture
        self.values = {name: np.column_stack([found["per_item"][score] for score in self.names])
                       for name, found in self.scores.items()}  # [N,3]
        self.order = np.argsort(self.values[self.trained].mean(1), kind="stable").tolist()
        self.note = f"By the mean of {', '.join(self.names)}. In bold: what {self.trained} says."

    def card(self, i):
        picture, said = self.pictures[i], {name: found[i] for name, found in self.systems.items()}
        one, confidence = said.pop(self.trained), probability(self.systems[self.trained][i])
        lines = [Line(name, other["caption"]) for name, other in said.items()]
        lines += [Line("reference", text) for text in picture.captions]
        lines += [Line("confidence", f"{confidence:.2f}")] if confidence is not None else []
        told = ", ".join(f"{name} {value:.3f}" for name, value in zip(self.names, self.values[self.trained][i]))
        return Card([Picture(picture.image)], one["caption"] or "(nothing)", lines, f"{told} · {picture.name}")

    def corpus(self):
        """The table of all scores."""
        rows = [[name, *("-" if value is None else f"{value:.3f}" for value in found["corpus"].values())]
                for name, found in self.scores.items()]
        return Table("All scores", ["system", *self.scores[self.trained]["corpus"]], rows)


def captions(pictures, systems, log_path=None, panels=(), last=()):
    """Parts of the page of train_blip_caption.

    pictures: N captions.Picture; systems: {name: N dicts as its evaluate returns them, at least "caption"}, the trained system
    last; "confidence" and the others as in gated()."""
    all_of_them = Captioned(pictures, systems)
    table = headline(all_of_them.values, all_of_them.names, [picture_of(p) for p in pictures], "pictures", 3)
    note = " In the intervals of CIDEr-D the words weigh what they do in all pictures." if "CIDEr-D" in all_of_them.names else ""
    name, units = all_of_them.names[-1], [picture_of(p) for p in pictures]
    best = {system: found[:, -1] for system, found in all_of_them.values.items()}
    top = max(1.0, *(found.mean() for found in best.values())) * 1.25
    return [score_bars(best, units, name, 3, top), replace(table, note=table.note + note), all_of_them.corpus(), curves(log_path, panels),
            *samples(all_of_them.order, [(p.name,) for p in pictures], all_of_them.card, all_of_them.note), *last]


def caption_cases(pictures, captions, count):
    """Parts of the page of --cases: the `count` worst and best of the `captions`, and all scores."""
    cases = Captioned(pictures, {"the model": [{"caption": text} for text in captions]})
    return [*(replace(part, folded=False) for part in extremes(cases.order, cases.card, cases.note, count)), cases.corpus()]


def caption_outcome(pictures, systems):
    """What came out in a line, for the title of captions() and caption_cases()."""
    found = Captioned(pictures, systems)
    name, first = found.names[-1], list(systems)[0]
    return told_outcome({system: values[:, -1] for system, values in found.values.items()}, [picture_of(p) for p in pictures], name, 3,
                        first if len(systems) > 1 else None, first)


# --- retrieval: train_cir ------------

class Ranked:
    """A pool with engine.retrieval.rank_queries of it: its recalls, and its queries as cards. See retrieval()."""

    def __init__(self, pool, results):
        self.pool, self.results, self.ranks = pool, results, np.array([one["rank"] for one in results])
        self.inner = None if results[0]["subset_rank"] is None else np.array([one["subset_rank"] for one in results])
        self.candidates = len(pool.gallery) - (self.inner is not None)
        self.units = [f"{pool.name}/{query.reference}" for query in pool.queries]

    def hits(self):
        """({name of the recall: [N], 100 where the query counts}), as metrics.cirr_scores and fashioniq_scores."""
        wide, narrow = RECALLS
        if self.inner is None:
            found = {name: self.ranks <= wide[name] for name in ("R@10", "R@50")}
        else:
            found = {name: self.ranks <= k for name, k in wide.items()} | {name: self.inner <= k for name, k in narrow.items()}
        found = {name: 100.0 * hit for name, hit in found.items()}
        first, second = ("R@5", "Rs@1") if self.inner is not None else ("R@10", "R@50")
        return found | {"mean": (found[first] + found[second]) / 2}

    def card(self, n):
        query, one, paths = self.pool.queries[n], self.results[n], self.pool.gallery
        pictures = [Picture(paths[query.reference], "reference"), Picture(paths[query.target], "target")]
        pictures += [Picture(paths[name], str(place), "right" if name == query.target else "wrong")
                     for place, name in enumerate(one["best"], 1)]
        rank = f"{one['rank']} of {self.candidates:,}"
        rank += "" if self.inner is None else f"; in its image set {one['subset_rank']} of 5"
        lines = [Line("rank of the target", rank, "right" if one["rank"] == 1 else ""),
                 Line("score of the target", f"{one['score']:.3f}")]
        small = f"{self.pool.name} {query.pairid}: {query.reference} to {query.target}"
        return Card(pictures, " / ".join(query.captions), lines, small)


def recall_table(pools):
    """Recalls of every pool with their intervals, their mean over the pools, and those of a random order."""
    hits = [pool.hits() for pool in pools]
    names, rows, means, values = list(hits[0]), [], [], []
    for number, (pool, found) in enumerate(zip(pools, hits)):
        table = np.column_stack(list(found.values()))  # [N,K]
        values.append(table.mean(0))
        means.append(metrics.resampled_means(table, pool.units, seed=number))
        rows.append([Cell(pool.pool.name, f"{len(table):,} queries")] + with_intervals(values[-1], means[-1]))
    if len(pools) > 1:
        rows.append(["mean of them"] + with_intervals(np.mean(values, axis=0), np.mean(means, axis=0)))
    luck = [metrics.chance_level(len(pool.pool.gallery), 6 if pool.inner is not None else None) for pool in pools]
    rows.append(["a random order"] + [f"{np.mean([one[name] for one in luck]):.1f}" for name in names])
    return Table("Recall, percent", ["pool", *names], rows,
                 interval_note(len({name for pool in pools for name in pool.units}), "reference pictures"))


def recall_bars(pools):
    """The first chart: all recalls of a pool, or the mean recall of several."""
    if len(pools) == 1:
        return score_bars(pools[0].hits(), pools[0].units, "Targets found, percent")
    of_pools = [score_bars({pool.pool.name: pool.hits()["mean"]}, pool.units, "Mean recall, percent") for pool in pools]
    return replace(of_pools[0], rows=[row for part in of_pools for row in part.rows])


def retrieval_outcome(pools):
    """What came out in a line, for the title of retrieval(): the recalls, as a mean over the pools."""
    hits = [Ranked(*one).hits() for one in pools]
    told = {name: np.mean([found[name].mean() for found in hits]) for name in hits[0]}
    return ", ".join(f"{'mean recall' if name == 'mean' else name} {told[name]:.1f} %" for name in (list(told)[0], "mean"))


def retrieval(pools, log_path=None, panels=(), last=(), figures=()):
    """Parts of the page of train_cir. pools: [(cirr.Pool, engine.retrieval.rank_queries of it)]; figures: of draw_gate_map."""
    pools = [Ranked(*one) for one in pools]
    where = [(pool, n) for pool in pools for n in range(len(pool.ranks))]
    order = sorted(range(len(where)), key=lambda i: (-where[i][0].ranks[where[i][1]], where[i][0].results[where[i][1]]["margin"]))
    queries = [(pool.pool.name, pool.pool.queries[n]) for pool, n in where]
    keys = [(name, query.reference, query.target, *query.captions) for name, query in queries]
    return [recall_bars(pools), recall_table(pools), *map_figures(figures), curves(log_path, panels),
            *samples(order, keys, lambda i: where[i][0].card(where[i][1]),
                     "By the rank of the target, then by how far its score stands above the best of the others."), *last]


# --- pages from the files that a training script leaves ------------

def caption_page(content):
    """Title and parts of results of kind captions, see engine.captioning.write_results."""
    pictures, systems = [SimpleNamespace(**picture) for picture in content["pictures"]], content["systems"]
    title = f"{content['title']}: {caption_outcome(pictures, systems)}"
    if content["cases"]:
        (system,) = systems.values()
        return title, caption_cases(pictures, [one["caption"] for one in system], content["cases"])
    return title, captions(pictures, systems, content["log"], content["panels"], [made_table(content["made"])])


def retrieval_page(content):
    """Title and parts of results of kind retrieval, see engine.retrieval.write_results."""
    pools = [(cirr.Pool(one["name"], [cirr.Query(**query) for query in one["queries"]], one["gallery"], one["split"], one["file"]),
              one["results"]) for one in content["pools"]]
    parts = retrieval(pools, content["log"], content["panels"], [made_table(content["made"])], content.get("figures", ()))
    return f"{content['title']}: {retrieval_outcome(pools)}", parts


KINDS = {"captions": caption_page, "retrieval": retrieval_page}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw a page from the results that train_blip_caption.py or train_cir.py left beside it")
    parser.add_argument("results", metavar="PAGE.results.json", help="PAGE.html is written beside it")
    content = pages.read_results(parser.parse_args(argv).results, KINDS)
    write(content["page"], *KINDS[content["kind"]](content))
    print(content["page"])


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
