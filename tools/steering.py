"""steering.py: README's picture: one painting, one question, and what style the gates are told.

    python tools/steering.py                                       # writes docs/steering.png; the tiny model as it ships
    python tools/steering.py --checkpoint runs/gated/best.pt --painting a.jpg --others b.jpg c.jpg --out mine.png

Columns: gates closed, gates open, and open as if the painting were in the style of each of --others, whose picture the style classifier
sees in its place; the vision tower sees the same painting in all of them. Rows: a question about style, one about content.
"""

import io
import pathlib
import sys
import textwrap

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import torch
from PIL import Image

import core
from data import rows
from engine import errors, files, flags, published
from show import maps

STYLE, CONTENT = "What style is this painting?", "What has been painted here?"
EXAMPLES = "models/tiny/gated/examples/"  # test pictures of the drawn sample
GREY, INK, BLUE, RED = "#8a8a8a", "#222222", "#1f5a94", "#b3261e"


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--checkpoint", metavar="DIR|FILE", help="of train_gated.py (default: the gates that ship)")
    parser.add_argument("--painting", default=EXAMPLES + "0409_one-orange-house.jpg", metavar="FILE")
    parser.add_argument("--others", nargs="+", default=[EXAMPLES + "0418_three-purple-birds.jpg", EXAMPLES + "0438_four-purple-houses.jpg"],
                        metavar="FILE", help="paintings in other styles")
    parser.add_argument("--questions", nargs="+", default=[STYLE, CONTENT], metavar="QUESTION", help=f"(default: {STYLE} {CONTENT})")
    parser.add_argument("--out", default="docs/steering.png", metavar="FILE.png", help="(default: docs/steering.png)")
    return flags.parse_args(parser, argv)


@torch.no_grad()
def answers(model, painting, others, questions):
    """[(title, picture that the style classifier sees or None, its likeliest style, gates [layers,heads] of V for the first question or
    None, [(answer, confidence) of each question])], a column each. painting: path; others: paths."""
    def seen(path):
        return model.image_features(rows.picture_tensor(path, model.image_size)[None].to(model.query_tokens.device))

    own, net = seen(painting), model.efficientnet
    told = [("gates closed", None, own, False), ("gates open", painting, own, True)]
    told += [("style taken from this", path, {**own, "style_feature": seen(path)["style_feature"]}, True) for path in others]
    columns = []
    for title, picture, features, gated in told:
        found = [model.predict_answers(None, [question], **features, gated=gated)[0] for question in questions]
        sure = [model.confidence([question], [answer], **features, gated=gated).exp().item() for question, answer in zip(questions, found)]
        style = net.style_names()[net.logits(features["style_feature"])[0].argmax()]
        gates = maps.gate_values(model, features, questions[0]).value if gated else None
        columns.append((title, picture, style, gates, list(zip(found, sure))))
    return columns


def draw(path, painting, questions, columns):
    """The figure: the painting at the left, a column for each of `answers`."""
    import matplotlib
    from matplotlib.figure import Figure
    n = len(columns)
    figure = Figure(figsize=(3.1 + 2.25 * n, 3.6 + 0.7 * len(questions)))
    heights = [2.3, 0.9, *[0.55] * len(questions)]
    grid = figure.add_gridspec(len(heights), n + 1, width_ratios=[1.35, *[1] * n], height_ratios=heights, left=0.01, right=0.99,
                               top=0.9, bottom=0.02, wspace=0.12, hspace=0.16)
    cells = [[figure.add_subplot(grid[row, column]) for column in range(n + 1)] for row in range(len(heights))]
    for axis in (axis for line in cells for axis in line):
        axis.set_anchor("N")
        axis.set_axis_off()
    cells[0][0].imshow(rows.load_image(painting))
    cells[0][0].set_title("the vision tower sees", fontsize=12)
    cells[0][0].text(1.08, 0.5, "the style\nclassifier\nsees", fontsize=10, color=GREY, transform=cells[0][0].transAxes, va="center")
    cells[1][0].text(1, 0.5, "gates on V for the first question,\nlayers x heads, blue: less, red: more", ha="right", va="center",
                     fontsize=9.5, color=GREY)
    for row, question in enumerate(questions, 2):
        cells[row][0].text(1, 0.5, "\n".join(textwrap.wrap(question, 24)), ha="right", va="center", fontsize=12)
    top = max(abs(gates - 1).max() for *_, gates, _ in columns if gates is not None)
    for column, (title, picture, style, gates, found) in enumerate(columns, 1):
        image, heat, *cards = (line[column] for line in cells)
        image.set_title(title, fontsize=12, fontweight="bold")
        if picture is None:
            image.text(0.5, 0.5, "its input\nis ignored", ha="center", va="center", fontsize=10.5, color=GREY,
                       transform=image.transAxes)
            heat.text(0.5, 0.5, "all 1: BLIP-2 as it is", ha="center", va="center", fontsize=9.5, color=GREY)
        else:
            image.imshow(rows.load_image(picture))
            image.text(0.5, -0.02, f"classifier: {style}", ha="center", va="top", fontsize=10, transform=image.transAxes)
            heat.imshow(gates - 1, cmap=matplotlib.colormaps["RdBu_r"], vmin=-top, vmax=top, aspect="auto")
        for number, (card, (answer, sure)) in enumerate(zip(cards, found)):
            colour = INK if number or picture is None else RED if picture != painting else BLUE
            card.text(0.5, 0.62, answer or "(nothing)", ha="center", va="center", fontsize=13 if len(answer) < 16 else 10.5,
                      fontweight="bold", color=colour)
            card.text(0.5, 0.12, f"{100 * sure:.0f} % sure", ha="center", va="center", fontsize=9, color=GREY)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    with files.whole_file(path, "wb") as file:  # 192 colours: a third of the bytes
        Image.open(image).convert("RGB").quantize(192).save(file, "PNG", optimize=True)


def main(argv=None):
    args = get_args(argv)
    model, _ = core.load_gated(args.checkpoint or published.tiny("gated"), device="cpu", dtype=torch.float32)
    if model.gates is None:
        raise errors.DataError(f"{args.checkpoint}: trained without gates: there is nothing to open")
    columns = answers(model, args.painting, args.others, args.questions)
    draw(args.out, args.painting, args.questions, columns)
    for title, picture, style, _, found in columns:
        print(f"{title} ({style if picture else 'no style'}): " + "; ".join(f"{answer}, {100 * sure:.0f} %" for answer, sure in found))


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
