"""The pages of report.py: what stands on them, that texts stay texts, and the numbers that are computed for them."""

import base64
import importlib.util
import io
import math
import re
import subprocess
import shutil
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import metrics
import train_gated
from data import cirr
from data.captions import Picture
from data.rows import Row
from engine import environment, retrieval
from show import report

HOSTILE = ["<script>alert(1)</script>", "\" onmouseover=\"x()\" a=\"", "' onerror='x()", "javascript:alert(1)",
           "]]></style></title><b>", "\u202eevil\u202c \u2066", "../../../etc/passwd\0.png", "{{ 7*7 }} {% raw %}",
           "&lt;b&gt; &amp;", "\udcff\udc80", "--><!-- <![CDATA[", "https://example.org/x.png", "url(https://example.org/x)", "x" * 5000]
VOID = {"meta", "br", "img"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Tags with their attributes, the texts outside <style>, and that every tag is closed in its order."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source, self.tags, self.texts, self.open = path.read_text(encoding="utf-8"), [], [], []
        self.feed(self.source)
        self.close()
        self.text = "\n".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.texts.append(data.strip())

    def part(self, heading):
        """The source of the section whose heading starts so."""
        found = [s for s in self.source.split("<section>")[1:] if re.search(r"<(?:h2|summary)><bdi>" + re.escape(heading), s)]
        assert len(found) == 1, (heading, len(found))
        return found[0]


def check_safe(page):
    assert page.open in ([], ["html"])
    known = set("html meta title style h1 h2 section details summary p small b i bdi div span table tr th td figure svg path text "
                "rect polyline circle".split())
    loading = {"src", "href", "style", "srcset", "action", "background"}
    assert {tag for tag, _ in page.tags} <= known
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in loading for name in attributes), tag
    styles = re.findall(r"<style>(.*?)</style>", page.source, re.S)
    assert len(styles) == 1 and "@import" not in styles[0]
    assert all(link.startswith("data:image/jpeg;base64,") for link in re.findall(r"url\(([^)]*)\)", styles[0]))
    policy, = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script" not in policy and "http" not in policy


def pictures(folder, count, side=32):
    for number in range(count):
        Image.new("RGB", (side, side), (number * 20 % 256, 90, 200)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(count)]


def row(image, question, answer, kind="what", style="Cubism", name=None):
    return Row(image, image.split("/")[-1] if name is None else name, question, answer, kind, style, 2, "val.csv")


def said(*texts, **more):
    return [{"prediction": text, **{name: values[i] for name, values in more.items()}} for i, text in enumerate(texts)]


@pytest.fixture
def small(tmp_path):
    """Three pictures with a style and a thing question each: (questions, systems). The gated one: all right on 0, style right and
    thing wrong on 1, thing right and style wrong on 2."""
    paths = pictures(tmp_path, 3)
    questions = [row(paths[n], question, answer, kind, style) for n, (style, thing) in
                 enumerate((("Cubism", "boat"), ("Pop Art", "tree"), ("Ukiyo-e", "fish")))
                 for question, answer, kind in ((f"Style {n}?", style, "style"), (f"Thing {n}?", thing, "what"))]
    return questions, {"majority answer": said(*["Cubism"] * 6),
                       report.UNGATED: said("Cubism", "house", "tree", "tree", "Cubism", "bird"),
                       "gated": said("cubism", "boat", "Pop Art", "house", "Pop Art", "fish")}


def written(tmp_path, parts, title="title"):
    report.write(tmp_path / "report.html", title, parts)
    page = Page(tmp_path / "report.html")
    check_safe(page)
    return page


def names(source):
    """The pictures of a section's cards, in order."""
    return re.findall(r"(\d+\.png)</bdi></small></figure>", source)


# --- text stays text ------------

@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path, text):
    image, = pictures(tmp_path, 1)
    questions = [row(image, text, text, text, text, text), row("", text, text, text, "", text),
                 row(image, "q", text, "", text, "n")]
    systems = {report.UNGATED: said(text, "x", text),
               text: said(text, text, "wrong", confidence=[-0.1, -0.2, -3.0], hit_rows=[1.0, 0.0, 1.0])}
    table = [{"type": text, "system": text, "n": 3, "EM": 50.0}]
    page = written(tmp_path, report.gated(questions, systems, table, tmp_path / text.replace("/", "").replace("\0", "")[:50],
                                          styles=[text], last=[report.about(data=text)]), text)
    shown = text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")[:599]
    told = page.text.replace("\0", "\ufffd")
    assert told.count(shown) > 20 and page.tags[0][0] == "html"
    assert len(page.source) < 200_000  # a long text is cut


def test_every_hostile_text_is_isolated_from_the_text_around_it(tmp_path):
    image, = pictures(tmp_path, 1)
    turned = "\u202eturned"
    page = written(tmp_path, report.gated([row(image, turned, turned, turned, turned, turned)], {turned: said(turned)},
                                          last=[report.about(data=turned)]), turned)
    outside = re.sub(r"<title>.*?</title>| aria-label=\"[^\"]*\"", "", re.sub(r"<bdi>[^<]*</bdi>", "", page.source))
    assert turned in page.text and turned not in outside


@pytest.mark.skipif(not (CHROMIUM and importlib.util.find_spec("playwright")), reason="needs playwright and chromium")
def test_hostile_texts_in_a_browser(tmp_path):
    """All of them on one page: nothing runs, nothing is asked of another place, nothing is wider than a phone or hidden."""
    from playwright.sync_api import sync_playwright
    folder = tmp_path / "<img src=x onerror=alert(6)>' %2e%2e"
    folder.mkdir()
    image, = pictures(folder, 1)
    named = folder / "<svg onload=alert(7)>.png"
    shutil.copy(image, named)
    questions = [row(str(named), text, text, text, text, text) for text in HOSTILE]
    systems = {report.UNGATED: said(*HOSTILE[::-1]), HOSTILE[0]: said(*HOSTILE, confidence=[-0.1] * len(HOSTILE))}
    table = [{"type": text, "system": text, "n": 3, "EM": 50.0} for text in HOSTILE]
    written(tmp_path, report.gated(questions, systems, table, styles=HOSTILE, last=[report.about(data=HOSTILE[1])]), HOSTILE[0])
    seen, page_of = [], (tmp_path / "report.html").as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width in (390, 1440):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: request.url.startswith(("data:", page_of)) or seen.append(request.url))
            page.on("console", lambda message: seen.append(message.text))
            page.on("pageerror", lambda error: seen.append(str(error)))
            page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
            page.goto(page_of)
            page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
            page.mouse.move(width / 2, 400)
            assert page.title() == HOSTILE[0] and page.evaluate("document.documentElement.scrollWidth") <= width
            shown = page.inner_text("body")
            assert all(shown.count(text) > 3 for text in (HOSTILE[0], HOSTILE[1], HOSTILE[7])) and str(named.name) not in page.content()
            assert page.evaluate("[...document.querySelectorAll('figure')].every(one => one.scrollWidth <= one.clientWidth + 1)")
        browser.close()
    assert seen == []


def test_hostile_captions_and_queries(tmp_path):
    image, other = pictures(tmp_path, 2)
    for text in HOSTILE[:6]:
        many = [Picture(image, text, (text, "a cat"), 1, text), Picture(other, text + "2", ("a dog",), 2, text)]
        page = written(tmp_path, report.captions(many, {text: [{"caption": text}, {"caption": "a dog"}]}))
        assert page.text.count(text) > 3
        pool = cirr.Pool(text, [cirr.Query(text, text, "b", (text,), (), text, 1)], {text: image, "b": other}, "val", text)
        page = written(tmp_path, report.retrieval([(pool, retrieval.rank_queries(pool, [[0.1, 0.2]]))]))
        assert page.text.count(text) > 3


# --- numbers ------------

def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(5, 2, (400, 1))
    low, high = np.percentile(metrics.resampled_means(values, [str(n) for n in range(400)]), [2.5, 97.5])
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_pictures_are_the_unit_of_the_interval():
    values, units = np.random.default_rng(2).random((60, 1)), [f"{n}.jpg" for n in range(60)]
    once = metrics.resampled_means(values, units)
    assert np.allclose(metrics.resampled_means(np.repeat(values, 5, 0), [u for u in units for _ in range(5)]), once)
    shuffled = np.random.default_rng(3).permutation(60)
    assert np.allclose(metrics.resampled_means(values[shuffled], [units[i] for i in shuffled]), once)
    assert np.ptp(metrics.resampled_means(np.repeat(values, 5, 0), [str(n) for n in range(300)])) < 0.7 * np.ptp(once)


def test_a_resample_weighs_every_row_alike():
    drawn = metrics.resampled_means([[0.0], [1.0], [1.0], [1.0]], ["a", "b", "b", "b"])
    assert set(np.unique(drawn)) == {0.0, 0.75, 1.0} and (drawn == 0.75).mean() == pytest.approx(0.5, abs=0.06)
    assert np.array_equal(drawn, metrics.resampled_means([[0.0], [1.0], [1.0], [1.0]], ["a", "b", "b", "b"]))


def test_an_estimate_of_one_seed_is_its_mean_between_the_ends_of_the_draws():
    values, units = np.random.default_rng(5).random(40), [f"{n // 2}.jpg" for n in range(40)]
    found = metrics.estimate(values, units)
    assert found == (values.mean(), *np.percentile(metrics.resampled_means(values[:, None], units), [2.5, 97.5]))
    assert f"{metrics.Estimate(74.26, 71.0, 77.04):.1f}" == "74.3 [71.0, 77.0]"
    assert f"{metrics.Estimate(1.0, -0.5, 2.0):+.2f}" == "+1.00 [-0.50, +2.00]" and f"{metrics.Estimate(2.0, None, None)}" == "2.0"


def test_an_estimate_of_several_seeds_draws_one_seed_fewer_than_there_are():
    """Pictures all alike, so that only the seeds differ: three draws of (0, 0, 0, 4), of which 3 fours come once in 64."""
    values, units = np.tile([0.0, 0.0, 0.0, 4.0], (6, 1)), [f"{n}.jpg" for n in range(6)]
    assert metrics.estimate(values, units, 20_000) == (1.0, 0.0, pytest.approx(8 / 3))
    pictures = np.repeat(np.random.default_rng(6).random((50, 1)), 3, axis=1)  # seeds all alike: the pictures alone differ
    assert metrics.estimate(pictures, range(50)) == pytest.approx(metrics.estimate(pictures[:, 0], range(50)))


def test_pictures_and_seeds_together_are_wider_than_either():
    rng = np.random.default_rng(7)
    of_pictures, of_seeds = rng.normal(0, 1, (200, 1)), rng.normal(0, 0.1, (1, 5))
    widths = [np.ptp(metrics.estimate(np.broadcast_to(table, (200, 5)), range(200))[1:])
              for table in (of_pictures, of_seeds, of_pictures + of_seeds)]
    assert widths[2] == pytest.approx(math.hypot(*widths[:2]), rel=0.15)


def test_a_paired_difference_is_of_the_same_rows_and_seeds():
    ours, units = np.random.default_rng(8).random((60, 3)), [f"{n // 3}.jpg" for n in range(60)]
    assert metrics.paired_difference(ours, ours - 0.25, units) == pytest.approx((0.25, 0.25, 0.25))
    assert metrics.paired_difference(ours, ours[:, 0], units) == metrics.estimate(ours - ours[:, :1], units)
    for other in (ours[:, :2], ours[:59]):
        with pytest.raises(ValueError, match="no pairs"):
            metrics.paired_difference(ours, other, units)
    with pytest.raises(ValueError, match="0 values"):
        metrics.estimate([], [])


def test_the_difference_of_two_systems_is_paired():
    worse = np.random.default_rng(4).random((50, 1))
    values = {"base": worse, "gated": worse + 0.25}
    table = report.headline(values, ["EM"], [str(n) for n in range(50)], "pictures", 2)
    assert table.rows[0][2] == report.Cell("+0.25", "+0.25 to +0.25") and table.rows[1][2] == ""
    assert table.rows[0][1].small != table.rows[0][1].text and "50 pictures" in table.note and "gated minus this" in table.head
    assert [row[1].text for row in table.rows] == [f"{v.mean():.2f}" for v in values.values()]


def test_the_first_chart_and_the_title_say_what_came_out(tmp_path, small):
    """Both of the numbers of the table: 4 of 6 right with the gates, 1 without; the difference is of the same draws."""
    questions, systems = small
    parts = report.gated(questions, systems)
    line, values = report.outcome("Gated BLIP-2 on x val", questions, systems), {name: report.exact_matches(questions, systems[name])
                                                                                for name in (report.UNGATED, "gated")}
    drawn = metrics.resampled_means(np.column_stack([values["gated"], values[report.UNGATED]]), [r.image for r in questions])
    low, high = np.percentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5])
    assert line == f"Gated BLIP-2 on x val: 66.7 % exact match, ungated 33.3 %, +33.3 [{low:.1f}, {high:.1f}]"
    assert parts[0].kind == "bars" and [(row.label, row.text, row.small) for row in parts[0].rows] == [
        (row[0], row[1].text, row[1].small) for row in parts[1].rows]
    assert [row.value for row in parts[0].rows] == pytest.approx([float(row.text) / 100 * report.WIDTH for row in parts[0].rows], abs=0.3)
    page = written(tmp_path, parts, line)
    assert page.source.index("class=\"bars\"") < page.source.index("<table") and f"<h1><bdi>{line}" in page.source.replace("&#43;", "+")
    closed = {report.CLOSED: systems[report.UNGATED], "gated": systems["gated"]}
    assert "gates closed 33.3 %" in report.outcome("x", questions, closed)
    assert report.outcome("x", questions, {"gated": systems["gated"]}) == "x: 66.7 % exact match"


def test_maps_that_were_drawn_are_in_the_page_as_wide_as_it_is(tmp_path, small):
    Image.new("RGB", (1500, 1000), "red").save(tmp_path / "001.png")
    figures = [tmp_path / "001.png", tmp_path / "gone.png"]
    page = written(tmp_path, report.gated(*small, figures=figures))
    part = page.part("Maps")
    number = re.search(r'class="drawn p(\d+)" role="img" aria-label="001.png"', part)[1]
    uri = page.source.split(f".p{number}{{background-image:url(data:image/jpeg;base64,")[1].split(")")[0]
    with Image.open(io.BytesIO(base64.b64decode(uri))) as shown:
        assert shown.width == report.FIGURE_SIDE
    assert f".drawn.p{number}{{aspect-ratio:1.5}}" in page.source and part.count("cannot be read") == 1
    assert "Maps" not in written(tmp_path, report.gated(*small)).text


def test_interval_stands_on_both_sides_of_the_value():
    low, high = map(float, report.with_interval(50.0, np.arange(1001) / 10).small.split(" to "))
    assert (low, high) == (2.5, 97.5)


def test_pictures_are_told_apart_by_their_files_or_else_by_their_names():
    places = (("/a/1", "1"), ("/b/1", "1"), ("", "2"), ("", "3"), ("", "3"))
    questions = [row(image, "q?", " yes ", name=name) for image, name in places]
    headline = report.gated(questions, {"gated": said(*["yes"] * 5)})[1]
    assert "the 4 pictures" in headline.note and headline.rows[0][1].text == "100.0"  # spaces around an answer do not count


def test_one_picture_has_no_interval(tmp_path):
    image, = pictures(tmp_path, 1)
    questions = [row(image, "a?", "x"), row(image, "b?", "y")]
    systems = {"majority answer": said("x", "x"), "gated": said("x", "y")}
    bars, table = report.gated(questions, systems)[:2]
    assert bars.rows[1].text == "100.0" and bars.rows[1].ends is None
    assert report.outcome("x", questions, systems) == "x: 100.0 % exact match"
    assert table.rows[1][1] == report.Cell("100.0") and table.rows[0][2] == report.Cell("+50.0") and "no interval" in table.note
    assert "nan" not in written(tmp_path, report.gated(questions, systems)).text


def test_calibration_error_against_a_value_worked_out_by_hand():
    # bins (0.2, 0.3]: 2 rows, sure 0.275, right 0.5; (0.8, 0.9]: 3 rows, sure 0.86, right 2/3; (0.9, 1]: 1 row, sure 1, right 1
    sure, right = [0.25, 0.3, 0.84, 0.84, 0.9, 1.0], [1, 0, 1, 1, 0, 1]
    assert report.expected_calibration_error(sure, right) == pytest.approx((2 * 0.225 + 3 * (0.86 - 2 / 3)) / 6)
    assert [(n, count) for n, count, _, _ in report.calibration_bins(sure, right)] == [(2, 2), (8, 3), (9, 1)]
    assert report.expected_calibration_error([0.0, 1.0], [0, 1]) == 0
    assert report.expected_calibration_error([1.0] * 3, [0] * 3) == 1
    assert report.expected_calibration_error(sure, right, 1) == pytest.approx(abs(np.mean(sure) - np.mean(right)))


@pytest.mark.parametrize("sure", [[1.1], [-0.1], [math.nan], []])
def test_what_is_no_confidence_is_refused(sure):
    with pytest.raises(ValueError, match="between 0 and 1"):
        report.expected_calibration_error(sure, [1] * len(sure))


@pytest.mark.parametrize("low, high", [(0, 1), (0.031, 0.0315), (3, 12000), (-5, 5), (1e-7, 3e-7), (6.4, 8.7), (0, 7)])
def test_ticks_are_few_round_and_inside(low, high):
    found = report.ticks(low, high)
    assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high and len({f"{v:g}" for v in found}) == len(found)
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_a_line_lies_where_its_numbers_are():
    lines = [("a", [(0, 1.0), (10, 3.0), (5, math.nan)], False), ("b", [(5, 2.0)], False), ("c", [], True)]
    chart = report.line_chart("loss", lines)
    (left, bottom), (right, top) = chart.lines[0].places
    (x, y), = chart.lines[1].places
    assert x == (left + right) / 2 and y == pytest.approx((bottom + top) / 2) and top < bottom and left < right
    assert {label: place for place, label in chart.yticks}["2"] == pytest.approx(y)
    assert [line.dots for line in chart.lines] == [False, True]
    assert all(0 <= v <= report.HEIGHT for v in (top, bottom)) and all(report.LEFT <= v <= report.WIDTH for v in (left, right))
    assert report.line_chart("loss", [("a", [(1, math.inf)], False)]) is None
    assert len(report.line_chart("l", [("a", [(n, n) for n in range(10_000)], False)]).lines[0].places) <= report.POINTS


def test_a_bar_is_as_high_as_the_share_that_is_right():
    chart = report.reliability_chart([(0, 3, 0.05, 0.0), (7, 5, 0.75, 0.5), (9, 2, 1.0, 1.0)])
    (x0, y0), (x1, y1) = chart.lines[0].places
    heights = [bar[3] for bar in chart.bars]
    assert heights == pytest.approx([0, (y0 - y1) / 2, y0 - y1], abs=0.2) and [bar[4] for bar in chart.bars] == [3, 5, 2]
    middle = [bar[0] + bar[2] / 2 for bar in chart.bars]
    assert middle == pytest.approx([x0 + (x1 - x0) * share for share in (0.05, 0.75, 0.95)], abs=0.6)
    assert all(bar[1] + bar[3] == pytest.approx(y0) for bar in chart.bars)


# --- which samples ------------

def test_fixed_samples_do_not_depend_on_the_order_or_on_the_answers():
    keys = [(f"{n // 3}.jpg", f"question {n % 3}") for n in range(300)]
    shuffled = [keys[i] for i in np.random.default_rng(0).permutation(300)]
    first = [keys[i] for i in report.fixed_samples(keys)]
    assert len(set(first)) == 12 and first == [shuffled[i] for i in report.fixed_samples(shuffled)]
    assert len({picture for picture, _ in first}) > 6 and report.fixed_samples(keys[:1]) == [0]
    assert first[:2] == [("97.jpg", "question 0"), ("42.jpg", "question 0")]  # in every process


def test_fixed_samples_of_a_page_stay_when_rows_are_shuffled(tmp_path):
    paths = pictures(tmp_path, 30)
    questions = [row(path, f"q{n}?", "yes") for path in paths for n in range(2)]

    def fixed(order, answer):
        page = written(tmp_path, report.gated([questions[i] for i in order], {"gated": said(*[answer] * 60)}))
        return re.findall(r'class="head"><bdi>(.*?)</bdi>', page.part("12 samples")), names(page.part("12 samples"))

    once = fixed(range(60), "yes")
    assert len(once[0]) == 12 and fixed(np.random.default_rng(1).permutation(60), "no") == once


def test_worst_and_best_come_by_score_then_confidence(tmp_path):
    paths = pictures(tmp_path, 6)
    questions = [row(path, "q?", "red boat") for path in paths]
    found = said("red boat", "green", "blue boat", "green", "red boat", "The red boat.",
                 confidence=[-0.5, -0.1, -1.0, -2.0, -0.1, -1.0])
    page = written(tmp_path, report.gated(questions, {"gated": found}))
    assert names(page.part("The 3 worst of 6")) == ["1.png", "3.png", "2.png"]
    assert names(page.part("The 3 best of 6")) == ["4.png", "0.png", "5.png"]
    assert len(names(page.part("6 random ones"))) == 6
    losses = said("green", "green", lm=[1.0, 7.0])
    assert names(written(tmp_path, report.gated(questions[:2], {"gated": losses})).part("The 1 worst")) == ["1.png"]


def test_lists_are_cut_at_forty_and_say_of_how_many(tmp_path):
    paths = pictures(tmp_path, 10)
    questions = [row(paths[n % 10], f"q{n}?", "yes") for n in range(100)]
    systems = {report.UNGATED: said(*["no"] * 100), "gated": said(*["yes"] * 99, "no")}
    page = written(tmp_path, report.gated(questions, systems))
    for heading in ("The 40 worst of 100", "The 40 best of 100", "40 random ones", "Gate helped (40 of 99)"):
        assert len(names(page.part(heading))) == 40
    assert page.source.count("data:image/jpeg") == 10  # each picture once
    random = re.findall(r'class="head"><bdi>(.*?)</bdi>', page.part("40 random ones"))
    assert len(set(random)) == 40 and random != [f"q{n}?" for n in range(40)]


def test_a_list_says_of_how_many_only_where_it_is_cut():
    card = report.Card([], "", [], "")
    assert report.card_list("x", list(range(41)), lambda i: card, "").heading == "x (40 of 41)"
    assert report.card_list("x", list(range(40)), lambda i: card, "").heading == "x (40)"


def test_right_but_for_an_article_is_better_than_right_but_for_a_mark(tmp_path):
    questions = [row(path, "q?", "red boat") for path in pictures(tmp_path, 2)]  # VQA accuracy 1, ROUGE-L below 1; 0 and 1
    page = written(tmp_path, report.gated(questions, {"gated": said("The red boat.", "red boat:")}))
    assert names(page.part("The 1 worst")) == ["1.png"] and names(page.part("The 1 best")) == ["0.png"]


def test_every_card_shows_its_own_picture(tmp_path):
    paths = [str(tmp_path / f"{n}.png") for n in range(6)]
    for n, path in enumerate(paths):
        Image.new("RGB", (20, 20), (40 * n, 0, 0)).save(path)
    page = written(tmp_path, report.gated([row(path, "q?", "yes") for path in paths], {"gated": said(*["yes"] * 6)}))
    uris = dict(re.findall(r"\.p(\d+){background-image:url\(data:image/jpeg;base64,(.*?)\)}", page.source))
    cards = re.findall(r'class="pic p(\d+)".*?(\d)\.png</bdi></small></figure>', page.part("6 samples"), re.S)
    assert len(cards) == 6 == len(uris)
    for number, name in cards:
        red = Image.open(io.BytesIO(base64.b64decode(uris[number]))).getpixel((10, 10))[0]
        assert abs(red - 40 * int(name)) < 8


# --- the four lists, confusion, types ------------

def test_the_four_lists(tmp_path, small):
    page = written(tmp_path, report.gated(*small))
    helped, hurt = page.part("Gate helped (3)"), page.part("Gate hurt (1)")
    assert re.findall(r'class="head"><bdi>(.*?)</bdi>', helped) == ["Thing 0?", "Style 1?", "Thing 2?"]
    assert re.findall(r'class="head"><bdi>(.*?)</bdi>', hurt) == ["Thing 1?"]
    wrong_thing, wrong_style = page.part("Right style, wrong thing (1)"), page.part("Right thing, wrong style (1)")
    assert names(wrong_thing) == ["1.png"] and names(wrong_style) == ["2.png"] and "3 of 3 pictures have both kinds" in wrong_thing
    assert "house (reference: tree)" in wrong_thing
    assert "Pop Art (reference: Ukiyo-e)" in wrong_style and "(reference: fish)" not in wrong_style
    assert page.part("gated beside BLIP-2, no gates").count("<td>") == 4
    cells = re.findall(r"<td><bdi>(\d)</bdi></td>", page.part("gated beside BLIP-2, no gates"))
    assert cells == ["1", "3", "1", "1"]  # both right, gate helped, gate hurt, both wrong


def test_pictures_with_one_kind_of_question_are_in_neither_list(tmp_path):
    paths = pictures(tmp_path, 2)
    questions = [row(paths[0], "s?", "Cubism"), row(paths[1], "t?", "boat")]
    page = written(tmp_path, report.gated(questions, {"gated": said("Cubism", "x")}))
    assert "(none)" in page.part("Right style, wrong thing (0)")
    assert "0 of 2 pictures have both" in page.part("Right thing, wrong style (0)")


def test_all_style_questions_must_be_right(tmp_path):
    image, = pictures(tmp_path, 1)
    questions = [row(image, "s?", "Cubism"), row(image, "s2?", " cubism "), row(image, "t?", "boat"), row(image, "t2?", "sea")]
    def heads(*answers):
        return [part.heading for part in report.gated(questions, {"gated": said(*answers)})[-2:]]
    lists = report.gated(questions[::-1], {"gated": said("x", "boat", "cubism", "Cubism")})
    assert [line.label for line in lists[-2].cards[0].lines] == ["t2?", "t?", "s2?", "s?"]  # as in the data
    assert heads("Cubism", "cubism", "boat", "x") == ["Right style, wrong thing (1)", "Right thing, wrong style (0)"]
    assert heads("Cubism", "x", "boat", "x") == ["Right style, wrong thing (0)", "Right thing, wrong style (0)"]
    assert heads("Cubism", "x", "boat", "sea") == ["Right style, wrong thing (0)", "Right thing, wrong style (1)"]
    assert heads("Cubism", "cubism", "boat", "sea") == ["Right style, wrong thing (0)", "Right thing, wrong style (0)"]


def test_gated_stands_beside_ungated_on_every_card(tmp_path, small):
    questions, systems = small
    systems = {**systems, report.CLOSED: said(*"abcdef"), "gated": systems["gated"]}
    systems["gated"] = systems.pop("gated")
    card = written(tmp_path, report.gated(questions, systems)).part("6 samples").split("<figure>")[1:]
    one, = [c for c in card if "Thing 1?" in c]
    lines = re.findall(r"<small><bdi>(.*?)</bdi></small> <bdi>(.*?)</bdi>(?: <b class=\"(\w+\">.)</b>)?", one)
    assert lines == [("reference", "tree", ""), ("gated", "house", 'wrong">✗'), (report.UNGATED, "tree", 'right">✓'),
                     (report.CLOSED, "d", 'wrong">✗')]


def test_confusion_counts_and_shades():
    questions = [row("", "s?", answer) for answer in ("Cubism", "Cubism", "cubism", "Pop Art", "boat")]
    found = said("cubism", "Pop Art", "a boat", "POP ART ", "Cubism")
    table = report.confusion(questions, found, {"cubism": "Cubism", "pop art": "Pop Art", "rococo": "Rococo"}, "gated")
    assert table.head == ["style", "Cubism", "Pop Art", "other", "all", "right, %"]
    assert [[c if isinstance(c, str) else (c.text, c.shade) for c in line] for line in table.rows] == [
        ["Cubism", ("1", 4), ("1", 4), ("1", 4), "3", "33"], ["Pop Art", ("·", 0), ("1", 10), ("·", 0), "1", "100"]]


def test_answers_that_the_model_took_for_a_style_are_styles(tmp_path):
    image, = pictures(tmp_path, 1)
    questions = [row(image, "s?", "Rococo", style=""), row(image, "t?", "boat", style="")]
    page = written(tmp_path, report.gated(questions, {"gated": said("Rococo", "x", hit_rows=[1.0, 0.0])}))
    assert "Rococo" in page.part("Style confusion of gated") and '<td class="s10"><bdi>1</bdi></td>' in page.source
    assert "(1)" in page.part("Right style, wrong thing")
    systems = {"gated": said("a", "b")}
    assert "Rococo" in written(tmp_path, report.gated(questions, systems, styles=["Rococo"])).part("Style confusion")
    assert "Style confusion" not in written(tmp_path, report.gated(questions, systems)).source


def test_types_stand_beside_the_baselines(small):
    table = next(part for part in report.gated(*small) if part.heading == "Exact match by question type")
    assert table.head == ["type", "gated", "majority answer", report.UNGATED]
    assert [[cell.text for cell in line] for line in table.rows] == [["style", "66.7", "33.3", "33.3"],
                                                                     ["what", "66.7", "0.0", "33.3"]]
    assert table.rows[0][0].small == "3 questions"


def test_every_interval_belongs_to_its_value(small):
    questions, _ = small
    systems = {"wrong": said(*["x"] * 6), "gated": said(*(r.answer for r in questions))}
    _, headline, types = report.gated(questions, systems)[:3]
    assert [line[1] for line in headline.rows] == [("0.0", "0.0 to 0.0", 0), ("100.0", "100.0 to 100.0", 0)]
    assert types.rows[1][1:] == [("100.0", "100.0 to 100.0", 0), ("0.0", "0.0 to 0.0", 0)]


def test_headline_is_the_table_of_eval_gated(small):
    from engine import evaluation
    scores = {r["system"]: r for r in evaluation.score_table(*small) if r["type"] == "all"}
    headline = report.gated(*small)[1]
    for line in headline.rows:
        assert [cell.text for cell in line[1:2] + line[3:]] == [f"{scores[line[0]][name]:.1f}" for name in report.SCORES]


def test_table_of_eval_gated_is_there_as_it_is(tmp_path, small):
    table = [{"type": "all", "system": "gated", "n": 1234, "loss": 0.5, "EM": 12.345},
             {"type": "all", "system": "x", "n": 6, "EM": 1.0}]
    part = written(tmp_path, report.gated(*small, table)).part("All scores by question type")
    assert re.findall(r"<t[hd]><bdi>(.*?)</bdi>", part) == [
        "type", "system", "n", "loss", "EM", "all", "gated", "1,234", "0.500", "12.3", "all", "x", "6", "", "1.0"]


# --- what may be missing ------------

def test_the_trained_system_alone(tmp_path, small):
    questions, systems = small
    page = written(tmp_path, report.gated(questions, {"gated": systems["gated"]}))
    assert "(--no-baselines)" in page.text and "Gate helped" not in page.text and "minus this" not in page.text
    unfolded = [heading for heading in ("6 samples", "Style confusion") if "<details open>" in page.part(heading)]
    assert len(unfolded) == 2 == page.source.count("<details open>")
    assert "no confidence" in page.part("Confidence") and "no training_log.csv" in page.part("Training")


def test_without_gates_it_is_training_that_helped(tmp_path, small):
    questions, systems = small
    systems = {report.UNGATED: systems[report.UNGATED], "trained, no gates": systems["gated"]}
    page = written(tmp_path, report.gated(questions, systems))
    assert "Training helped (3)" in page.text and "Gate helped" not in page.text


def test_one_row_without_type_or_style(tmp_path):
    image, = pictures(tmp_path, 1)
    page = written(tmp_path, report.gated([row(image, "q?", "yes", "", "")], {"gated": said("", confidence=[-0.5])}))
    assert "(nothing)" in page.text and "0.61" in page.text and "The 1 worst of 1" in page.text


def test_a_broken_picture_has_a_card_that_says_so(tmp_path):
    good, = pictures(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"gone bad")
    questions = [row(path, "q?", "yes", name=name) for path, name in ((good, "0.png"), (str(tmp_path / "broken.png"), "1.png"),
                                                                      (str(tmp_path / "gone.png"), "2.png"), ("", "3.png"))]
    page = written(tmp_path, report.gated(questions, {"gated": said(*["yes"] * 4)}))
    cards = page.part("4 samples").split("<figure>")[1:]
    assert all(">✓<" in card and ">✗<" not in card for card in cards)
    broken = {names(card)[0] for card in cards if "cannot be read" in card}
    assert broken == {"1.png", "2.png", "3.png"} and str(tmp_path) not in page.source


def test_confidence_is_on_cards_and_in_the_diagram(tmp_path, small):
    questions, systems = small
    systems["gated"] = [{**one, "confidence": math.log(0.8)} for one in systems["gated"]]
    page = written(tmp_path, report.gated(questions, systems))
    part = page.part("Confidence")
    assert "gated 13.3 %" in part and f"{report.UNGATED} " not in part and part.count("<rect") == 1  # 4 of 6 are right
    assert page.part("6 samples").count("<bdi>confidence</bdi></small> <bdi>0.80</bdi>") == 6


def test_an_answer_without_confidence_is_not_in_the_diagram(tmp_path, small):
    questions, systems = small
    systems["gated"] = [{**one, "confidence": None if n == 2 else math.log(0.6)} for n, one in enumerate(systems["gated"])]
    page = written(tmp_path, report.gated(questions, systems))  # of the other five three are right
    assert "gated 0.0 %" in page.part("Confidence") and page.part("6 samples").count("<bdi>0.60</bdi>") == 5


def test_curves_of_a_log(tmp_path, small):
    log = tmp_path / "training_log.csv"
    log.write_text("kind,step,loss,hit\nstep,10,3.5,\nepoch,20,3.0,0.5\nstep,20,2.5,\nepoch,40,2.0,0.75\nstep,30\n")
    part = written(tmp_path, report.gated(*small, log_path=log, panels=train_gated.PANELS)).part("Training")
    assert part.count("<svg") == 2 and part.count("<polyline") == 3 and "validation" in part and "mass on style words" in part
    assert part.count("<circle") == 4 and "learning" not in part  # epochs have dots; a chart without values is left out


@pytest.mark.parametrize("content", [b"kind,step,loss\nstep,ten,2\n", b"\xff\xfe\x00", b"kind,loss\nstep,2\n",
                                     b"kind,step,loss\nstep"])
def test_a_log_that_cannot_be_drawn_does_not_cost_the_page(tmp_path, small, content):
    log = tmp_path / "training_log.csv"
    log.write_bytes(content)
    part = written(tmp_path, report.gated(*small, log_path=log, panels=train_gated.PANELS)).part("Training")
    assert "<svg" not in part and ("cannot be drawn" in part or content.endswith(b"step"))


def test_about_names_command_versions_and_what_it_is_told():
    rows = dict(report.about(checkpoint="best.pt", seed=3, log=None).rows)
    assert list(rows)[:2] == ["checkpoint", "seed"] and rows["seed"] == "3" and "log" not in rows
    assert "torch" in rows["versions"] and re.match(r"20\d\d-\d\d-\d\d", rows["date"]) and rows["command"] and rows["commit"]


def test_the_commit_says_what_is_not_in_it(monkeypatch, tmp_path):
    """Changed files and code that git does not know; notes and pictures are no code."""
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    (tmp_path / "core.py").write_text("x = 1")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(*words)
    assert re.fullmatch(r"[0-9a-f]{12}", environment.project_version())
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/my_gated.py").write_text("x = 2")
    assert re.fullmatch(r"[0-9a-f]{12}, with code that is not in it \(mine/my_gated.py\)", environment.project_version())
    (tmp_path / "core.py").write_text("x = 3")
    assert re.fullmatch(r"[0-9a-f]{12}, with changes that are not committed, with code .*my_gated.py\)", environment.project_version())


def test_commit_without_git_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    assert environment.project_version() == "not known (no git checkout)"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.project_version() == "not known (git cannot be run)"


def test_the_file_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BYTES", 400_000)
    paths = [str(tmp_path / f"{n}.png") for n in range(20)]
    for n, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (256, 300, 3), dtype=np.uint8)).save(path)
    uris = report.thumbnails(paths)
    assert list(uris) == paths and 200_000 < sum(map(len, uris.values())) <= 400_000
    assert sum(map(len, report.thumbnails(paths[:2]).values())) < 400_000 and len(report.thumbnails(paths[:1])[paths[0]]) > 30_000
    monkeypatch.setattr(report, "BYTES", 10)
    assert len(report.thumbnails(paths[:3])) == 3  # an end is found


def test_a_failed_write_leaves_the_old_page(tmp_path, small):
    page = tmp_path / "report.html"
    page.write_text("old")
    with pytest.raises(Exception, match="thing"):
        report.write(page, "t", [types.SimpleNamespace(kind="thing", heading="x", folded=None)])
    assert page.read_text() == "old"


# --- captions and retrieval ------------

def test_captions_page(tmp_path):
    paths = pictures(tmp_path, 4)
    many = [Picture(path, f"{n}.png", (f"a cat number {n} sits", "an animal"), n, "f") for n, path in enumerate(paths)]
    found = {"untrained": [{"caption": ""}] * 4, "trained": [{"caption": text, "confidence": math.log(0.5)} for text in
                                                          ("a cat number 0 sits", "dog", "an animal", "a cat number 9 sits")]}
    page = written(tmp_path, report.captions(many, found))
    score = metrics.score_captions([one["caption"] for one in found["trained"]], [list(p.captions) for p in many])["corpus"]
    headline = page.part("Scores")
    assert f"<bdi>{score['ROUGE-L']:.3f}</bdi>" in headline and "trained minus this" in headline
    assert f"{score['BLEU-4']:.3f}" in page.part("All scores")
    card, = [c for c in page.part("4 samples").split("<figure>")[1:] if names(c) == ["0.png"]]
    lines = re.findall(r"<small><bdi>(.*?)</bdi></small> <bdi>(.*?)</bdi>", card)
    assert lines == [("untrained", "(nothing)"), ("reference", "a cat number 0 sits"), ("reference", "an animal"),
                     ("confidence", "0.50")]
    assert 'class="head"><bdi>a cat number 0 sits' in card and names(page.part("The 2 worst"))[0] == "1.png"
    assert names(page.part("The 2 best"))[0] == "0.png"


def test_caption_cases(tmp_path):
    many = [Picture(path, f"{n}.png", (f"picture number {n}",), n, "f") for n, path in enumerate(pictures(tmp_path, 5))]
    page = written(tmp_path, report.caption_cases(many, ["a dog", *(f"picture number {n}" for n in range(1, 5))], 9))
    assert names(page.part("The 2 worst of 5"))[0] == "0.png" and "0.png" not in page.part("The 2 best of 5")
    headings = re.findall(r"<(?:h2|summary)><bdi>(.*?)</bdi>", page.source)
    assert headings == ["The 2 worst of 5", "The 2 best of 5", "All scores"] and page.source.count("<details open>") == 2
    assert page.source.count("<figure>") == 4 and "BLEU-4" in page.part("All scores") and "what the model says" in page.text
    assert names(written(tmp_path, report.caption_cases(many, ["a dog"] * 5, 1)).part("The 1 worst of 5")) == ["0.png"]


def test_one_caption_has_no_cider(tmp_path):
    image, = pictures(tmp_path, 1)
    page = written(tmp_path, report.captions([Picture(image, "0.png", ("a cat",), 1, "f")], {"trained": [{"caption": "a cat"}]}))
    assert "CIDEr-D" not in page.part("Scores") and "<bdi>-</bdi>" in page.part("All scores")


def pool_of(paths, queries, name="cirr", members=6):
    gallery = {f"g{n}": path for n, path in enumerate(paths)}
    inner = tuple(gallery)[:6] if members else ()
    made = [cirr.Query(str(n), f"g{reference}", f"g{target}", (f"change {n}",), inner, "f", n)
            for n, (reference, target) in enumerate(queries)]
    reference, target = np.array(queries).T
    return (cirr.Pool(name, made, gallery, "val", "f"), target, reference,
            np.tile(np.arange(6), (len(queries), 1)) if members else None)


def test_retrieval_page(tmp_path):
    paths = pictures(tmp_path, 8)
    pool, target, reference, members = pool_of(paths, [(0, 1), (0, 2), (3, 4)])
    scores = np.array([[0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # the reference itself is best: left out, so the target is
                       [0.0, 0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.3, 0.0, 0.5, 0.4, 0.6, 0.45]], np.float32)
    results = retrieval.rank_queries(pool, scores)
    assert results[0]["margin"] == pytest.approx(0.2)
    page, wanted = written(tmp_path, report.retrieval([(pool, results)])), metrics.cirr_scores(scores, target, reference, members)
    shown = re.findall(r'<bdi>([\d.]+)</bdi>', page.part("Recall").split("a random order")[0])
    assert shown == [f"{wanted[name]:.1f}" for name in ("R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3", "mean")]
    assert "2 reference pictures" in page.part("Recall") and "14.3" in page.part("Recall").split("a random order")[1]
    cards = {re.search(r"change (\d)", c)[1]: c for c in page.part("3 samples").split("<figure>")[1:]}
    ranks = {n: re.search(r"rank of the target</bdi></small> <bdi>(.*?)</bdi>", c)[1] for n, c in cards.items()}
    assert ranks == {"0": "1 of 7; in its image set 1 of 5", "1": "7 of 7; in its image set 5 of 5",
                     "2": "2 of 7; in its image set 1 of 5"}
    marks = re.findall(r'<small>(\w+)(?: <b class="(\w+)">.</b>)?</small></div>', cards["2"])
    assert marks == [("reference", ""), ("target", ""), ("1", "wrong"), ("2", "right"), ("3", "wrong"), ("4", "wrong"),
                     ("5", "wrong")]
    assert "change 1" in page.part("The 1 worst of 3") and "change 0" in page.part("The 1 best of 3")
    shown = re.findall(r'pic p(\d+)" role="img" aria-label="(\w+)"', cards["0"])
    assert [label for _, label in shown] == ["reference", "target", "1", "2", "3", "4", "5"]
    assert shown[1][0] == shown[2][0] != shown[0][0]  # the target itself is found first


def test_retrieval_over_categories(tmp_path):
    paths = pictures(tmp_path, 12)
    rng, found = np.random.default_rng(0), []
    for name in ("dress", "shirt"):
        pool, target, reference, members = pool_of(paths, [(n, n + 1) for n in range(6)], name, 0)
        found.append((pool, rng.random((6, 12)), target))
    page = written(tmp_path, report.retrieval([(pool, retrieval.rank_queries(pool, scores)) for pool, scores, _ in found]))
    wanted = [metrics.fashioniq_scores(scores, target) for _, scores, target in found]
    lines = page.part("Recall").split("<tr>")[2:]
    for line, values in zip(lines, [*wanted, {name: np.mean([w[name] for w in wanted]) for name in wanted[0]}]):
        assert re.findall(r"<bdi>([\d.]+)</bdi>", line) == [f"{values[name]:.1f}" for name in ("R@10", "R@50", "mean")]
    assert "mean of them" in lines[2] and "a random order" in lines[3] and "of 12" in page.part("12 samples")
    assert re.findall(r"<bdi>([\d.]+)</bdi>", lines[3]) == ["83.3", "100.0", "91.7"]  # 10 and 50 of 12


def test_the_mean_of_two_pools_is_surer_than_each():
    found, scores = [], np.random.default_rng(1).random((50, 60))
    scores[np.arange(50), np.arange(1, 51)] += 0.35
    for name in ("dress", "shirt"):  # the same scores: with the same draws, their mean would be no surer
        pool, target, reference, _ = pool_of(["x"] * 60, [(n, n + 1) for n in range(50)], name, 0)
        found.append(report.Ranked(pool, retrieval.rank_queries(pool, scores)))
    table = report.recall_table(found)
    widths = []
    for line in table.rows[:3]:
        ends = [[float(end) for end in cell.small.split(" to ")] for cell in line[1:]]
        assert all(low <= float(cell.text) <= high for (low, high), cell in zip(ends, line[1:]))
        widths.append(ends[0][1] - ends[0][0])
    assert widths[2] == pytest.approx(np.mean(widths[:2]) / math.sqrt(2), rel=0.12) and "100 reference pictures" in table.note


def test_margin_orders_what_has_the_same_rank(tmp_path):
    pool, target, reference, _ = pool_of(pictures(tmp_path, 3), [(0, 1), (2, 1)], members=0)
    ranked = retrieval.rank_queries(pool, [[0.2, 0.5, 0.1], [0.0, 0.9, 0.8]])
    assert [one["margin"] for one in ranked] == pytest.approx([0.3, 0.1])
    behind = retrieval.rank_queries(pool, [[0.9, 0.5, 0.1], [0.0, 0.9, 0.8]])
    assert behind[0]["margin"] == pytest.approx(-0.4)
    page = written(tmp_path, report.retrieval([(pool, ranked)]))
    assert "change 1" in page.part("The 1 worst") and "change 0" in page.part("The 1 best")
