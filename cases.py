"""cases.py: how good captions are: the numbers of an evaluation, and a page of the worst and best cases.

    numbers_of     what is logged of an evaluation; mean_of_three is what best.pt is chosen by
    write_cases    cases.html: one file that needs no other, with the pictures in it; whatever a caption holds is shown as text
"""

import base64
import io

import metrics
import rows
import runfolder

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222;background:#fafafa}
.all{display:grid;grid-template-columns:repeat(auto-fill,minmax(20em,1fr));gap:1em}
figure{margin:0;padding:.8em;background:#fff;border:1px solid #ddd;border-radius:6px;overflow-wrap:anywhere}
img{display:block;max-width:100%;height:12em;object-fit:contain;margin:0 auto .6em}
small{color:#666}p{margin:.3em 0}.said{font-weight:600}td,th{padding:.1em .8em .1em 0;text-align:left}
table{display:block;overflow-x:auto;white-space:nowrap}</style>
<h1>{{ title }}</h1><table><tr>{% for name in corpus %}<th>{{ name }}</th>{% endfor %}</tr>
<tr>{% for value in corpus.values() %}<td>{{ value }}</td>{% endfor %}</tr></table>
<p><small>Bold: what the model says. Below it: what people say.</small></p>
{% for heading, cases in parts %}<h2>{{ heading }}</h2><div class="all">{% for case in cases %}<figure>
<img src="{{ case.thumbnail }}" alt=""><p class="said">{{ case.caption or "(nothing)" }}</p>
{% for text in case.references %}<p>{{ text }}</p>{% endfor %}
<small>{{ case.scores }}<br>{{ case.name }}</small></figure>{% endfor %}</div>{% endfor %}</html>
"""


def mean_of_three(scores):
    """Mean of METEOR, ROUGE-L and CIDEr-D: what best.pt is chosen by. CIDEr-D has no value for a single picture."""
    values = [scores[name] for name in (metrics.meteor_name(), "ROUGE-L", "CIDEr-D") if scores[name] is not None]
    return sum(values) / len(values)


def numbers_of(found, data):
    """The numbers of an evaluation that are logged, over the rows of `data` with all their captions as references."""
    corpus = metrics.score_captions([one["caption"] for one in found], [list(p.captions) for p in data.rows])["corpus"]
    numbers = {"images": len(found), "loss": sum(one["loss"] for one in found) / sum(one["tokens"] for one in found),
               "meteor": corpus[metrics.meteor_name()], "rouge_l": corpus["ROUGE-L"], "cider_d": corpus["CIDEr-D"],
               "bleu_4": corpus["BLEU-4"], "score": mean_of_three(corpus)}
    return {name: value for name, value in numbers.items() if value is not None}


def told(numbers):
    """Numbers for the terminal."""
    line = ", ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items())
    return line + ("" if metrics.meteor_name() == "METEOR" else f" ({metrics.meteor_name()})")


# --- the page ------------

def thumbnail(path, side=320):
    """A picture as the data URI of a small JPEG."""
    image, file = rows.load_image(path), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_cases(path, data, captions, count, title):
    """A page of its own with the `count` worst and best rows by mean_of_three: what was said in bold, then the references."""
    import jinja2

    def shown(value):
        return "-" if value is None else f"{value:.3f}"

    scores = metrics.score_captions(captions, [list(p.captions) for p in data.rows])
    each = [dict(zip(scores["per_item"], values)) for values in zip(*scores["per_item"].values())]
    order = sorted(range(len(each)), key=lambda i: mean_of_three(each[i]))
    count = min(count, max(1, len(order) // 2))  # no picture on both sides
    three = (metrics.meteor_name(), "ROUGE-L", "CIDEr-D")

    def case(i):
        return {"thumbnail": thumbnail(data.rows[i].image), "caption": captions[i], "references": data.rows[i].captions,
                "name": data.rows[i].name, "scores": ", ".join(f"{name} {shown(each[i][name])}" for name in three)}

    parts = [(f"The {count} worst of {len(order)}", map(case, order[:count])),
             (f"The {count} best", map(case, order[:-count - 1:-1]))]
    corpus = {name: shown(value) for name, value in scores["corpus"].items()}
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(title=title, corpus=corpus, parts=parts)
    with runfolder.whole_file(path) as file:
        file.write(page)
