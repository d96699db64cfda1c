"""cases.py: how good captions are: the numbers of an evaluation, and a page of the worst and best cases.

    numbers_of     what is logged of an evaluation; mean_of_three is what best.pt is chosen by
    write_cases    cases.html: one file that needs no other, with the pictures in it; whatever a caption holds is shown as text
"""

import base64
import io

import metrics
from data import rows


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
    """A page of its own with the `count` worst and best rows by mean_of_three, see report.caption_cases."""
    from show import report  # not above: it takes thumbnail from here
    report.write(path, title, report.caption_cases(data.rows, captions, count))
