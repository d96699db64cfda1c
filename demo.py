r"""demo.py: a page on this machine to ask about a painting, with the style gate and without it.

    make look                      # installs gradio, which only this file needs, and opens the page; or
    python demo.py                 # then open http://127.0.0.1:7860; with a checkpoint of each stage all tabs are filled:
    python demo.py --checkpoint runs/demo/best.pt --captioner runs/demo-caption/best.pt --retrieval runs/demo-cir/best.pt \
        --gallery data/artquest/images --report runs/demo/report.html

Tabs: Ask (answers, confidence, attention; the same as if in another style), Caption, Find (a picture and a sentence over a folder),
Errors (a report). Only 127.0.0.1 is listened on; the page forbids the browser every other address; nothing is counted or shared.
What visitors type and upload is data: text is escaped, pictures are decoded by rows.load_image, uploads are deleted at the end.
"""

import argparse
import base64
import filecmp
import functools
import html
import io
import os
import pathlib
import sys
import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

import core
from data import rows
from engine import errors, flags, loop, picture_index, published
from engine.errors import DataError
from show import gallery, maps

BEST, TOP_STYLES, EXAMPLES, LONGEST = 3, 5, 8, 500  # candidates, styles shown, pictures a style, letters of a text
FIGURE = pathlib.Path(__file__).resolve().parent / "data/maps.png"
CHECKPOINTS = ("runs/demo/best.pt", "runs/gated/best.pt")  # the first that is there is the default, else the gates that ship
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'self'"
WORDS = {  # English, Chinese
    "title": ("What art style does to an answer", "艺术风格如何影响回答"),
    "ask": ("Ask", "提问"), "caption": ("Caption", "描述"), "find": ("Find", "检索"), "errors": ("Errors", "错例"),
    "painting": ("Painting", "画作"), "question": ("Question", "问题"), "style": ("As if painted in", "假设风格"), "own": ("its own style", "原有风格"),
    "mix": ("How far: 0 = its own style, 1 = that style", "程度：0 为原有风格，1 为所选风格"),
    "occlusion": ("Occlusion map (slower)", "遮挡图（较慢）"), "examples": ("Examples", "示例"),
    "gated": ("With the style gate", "有风格门控"), "closed": ("Without the gate", "无门控"), "confidence": ("Confidence, per token", "每词置信度"),
    "candidates": ("The three best: probability of the whole answer", "前三候选：整个回答的概率"),
    "styles": ("What the gate is told of style", "门控所得的风格"), "attention": ("Attention", "注意力"),
    "difference": ("Attention with the gate minus without", "注意力之差（有减无）"), "fall": ("Occlusion: fall without the patch", "遮挡：去掉该处后的下降"),
    "reference": ("Reference picture", "参考图"), "change": ("What should be different", "应有何不同"),
    "empty": ("Give a picture and a question.", "请给出图片和问题。"), "no_picture": ("Give a picture.", "请给出图片。"),
    "no_gates": ("This model was trained without gates: both sides are equal.", "该模型没有门控：两侧相同。"),
    "by_pictures": (f"A style is the mean of up to {EXAMPLES} example pictures.", f"每种风格取至多 {EXAMPLES} 幅示例画作的均值。"),
    "by_weights": ("A style is the classifier's weights for it: there are no example pictures (--data).", "风格取自分类器权重：没有示例画作（--data）。"),
    "loading": ("Loading the model: a few seconds for the tiny one.", "正在加载模型：小模型只需几秒。"),
    "soon": ("Meanwhile, a trained model on one question: where it looks with the gates and without, and what its answer rests on.",
             "请先看一个训练好的模型如何回答一个问题：有门控与无门控时看哪里，以及答案依据什么。"),
    "no_finder": ("Nothing to search with: pass --retrieval with a best.pt of train_cir.py, and --gallery with a folder of pictures.",
                  "无法检索：请用 --retrieval 给出 train_cir.py 的 best.pt，用 --gallery 给出图片文件夹。"),
    "no_report": ("No report: eval_gated.py writes one; pass it with --report FILE.html.", "没有报告：由 eval_gated.py 生成，用 --report FILE.html 给出。")}
STYLE = """.demo{overflow-wrap:anywhere;color:var(--body-text-color)}.demo h3{margin:0 0 .2em;font-size:1.1em}.demo p{margin:.2em 0}
.demo .answer{font-size:1.5em;font-weight:700;max-height:6em;overflow:auto}.demo h4{margin:.9em 0 .25em;font-size:.95em;font-weight:600}
.demo .bar{display:grid;grid-template-columns:minmax(0,11em) minmax(3em,1fr) 4.2em;gap:.6em;align-items:center;margin:.2em 0}
.demo .bar b{font-weight:400}.demo .bar i{display:block;height:.8em;border-radius:3px;background:#1f6feb}
.demo .track{background:rgba(128,128,128,.22);border-radius:3px}.demo .share{text-align:right;font-variant-numeric:tabular-nums}
.demo figure{margin:.9em 0 0}.demo figure img{display:block;width:100%;max-width:26em}.demo .soon{overflow-x:auto}.demo .soon img{max-width:56em;min-width:46em}.demo figcaption{font-size:.9em;margin-bottom:.25em}
.demo .scale{display:flex;gap:.5em;align-items:center;max-width:29em;font-size:.85em}.demo .scale i{flex:1;height:.6em;min-width:3em}
.demo .hits{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(44%,170px),1fr));gap:.8em}.demo .hits figure{margin:0}
.demo .hits img{aspect-ratio:1;object-fit:contain;background:rgba(128,128,128,.15)}.demo .fault{color:#c62828;font-weight:600}
.picture .image-container{padding-top:2em}
@media(max-width:480px){.tab-container button{padding:0 .4em!important;font-size:13px!important}}.dark .demo .fault{color:#ff8a80}.demo iframe{width:100%;height:80vh;border:1px solid #8888;background:#fff}"""


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="FILE|DIR|tiny",
                        help="best.pt or folder of train_gated.py, or tiny: the trained gates that ship with the project (default: "
                             f"the first there is of {', '.join(CHECKPOINTS)}, else tiny)")
    parser.add_argument("--blip2", metavar="ID|DIR", help="where the BLIP-2 of --checkpoint lies now, if it moved")
    parser.add_argument("--efficientnet", metavar="FILE", help="where its style classifier lies now, if it moved")
    parser.add_argument("--captioner", metavar="FILE|DIR", help="run folder or best.pt of train_blip_caption.py, or a BLIP folder "
                                                                "(default: the tiny one that ships)")
    parser.add_argument("--retrieval", metavar="FILE|DIR", help="run folder or best.pt of train_cir.py")
    parser.add_argument("--gallery", metavar="DIR", help="folder of pictures that tab Find looks through")
    parser.add_argument("--report", metavar="FILE.html", help="what tab Errors shows")
    parser.add_argument("--data", default="data/artquest", metavar="DIR",
                        help="training data with styles, for examples and for the styles to mix in "
                             "(default: data/artquest where it is)")
    parser.add_argument("--port", type=flags.positive, default=7860, help="(default: 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--lang", choices=("en", "zh", "both"), default="both", help="language of the labels (default: both)")
    args = flags.parse_args(parser, argv)
    args.checkpoint = args.checkpoint or next((path for path in CHECKPOINTS if os.path.isfile(path)), "tiny")
    args.captioner = args.captioner or published.tiny("blip")
    for path in (args.report, args.gallery, args.retrieval):
        if path and not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder")
    return args


def words_of(lang):
    """WORDS in one language, or in both: short ones side by side, sentences one after the other."""
    return {name: {"en": en, "zh": zh, "both": f"{en} {zh}"}[lang] for name, (en, zh) in WORDS.items()}


# --- answers ------------

@dataclass
class Session:
    """The model of tab Ask, what it chooses from, and what it has computed for the last picture."""
    model: core.Blip2OPTGated
    examples: dict = field(default_factory=dict)  # {style: paths of pictures}
    prototypes: dict = field(default_factory=dict)  # {style: [1,F]} of the examples
    last: dict = field(default_factory=dict)

    @property
    def styles(self):
        """Names that the style can be mixed with; none without gates."""
        return [] if self.model.gates is None else sorted(self.examples) or self.model.efficientnet.style_names()


@torch.no_grad()
def prototype(net, style, paths, own, size):
    """What pooled feature stands for a style -> [1,F].

    paths: pictures of that style, whose mean it is (the first EXAMPLES of them); without any, the classifier's row of weights
    for the style, as long as the features `own` [B,F] are on average. size: of the pictures. DataError: a broken picture."""
    if paths:
        pixels = torch.stack([rows.picture_tensor(path, size) for path in paths[:EXAMPLES]]).to(own.device)  # [n,3,s,s]
        return net(pixels).mean(0, keepdim=True)
    row = net.net.get_classifier().weight[[net.style_names().index(style)]]  # [1,F]
    return row / row.norm() * own.norm(dim=-1).mean()


def mix_features(own, other, share):
    """Style features [1,F]: own where share is 0, other where it is 1, both to the bit."""
    return (1 - share) * own + share * other


def style_feature(session, features, style, mix):
    """The style feature that steers the gates, [1,F] or None: the picture's own, mixed with that of `style` ("" = none)."""
    own, model = features["style_feature"], session.model
    if not style or not mix or own is None:
        return own
    if style not in session.styles:
        raise DataError(f"{style!r} is none of the styles {', '.join(session.styles)}")
    paths = session.examples.get(style, [])
    found = session.prototypes.get(style)
    if found is None:
        found = prototype(model.efficientnet, style, paths, own, model.image_size)
        if paths:  # one of weights is scaled to the picture at hand
            session.prototypes[style] = found
    return mix_features(own, found, mix)


@torch.no_grad()
def look(session, image):
    """Features of a picture's path, kept for the next question -> {"picture": PIL, "features", "closed": {}}."""
    key = (str(image), os.path.getmtime(image) if os.path.isfile(image) else None)
    if session.last.get("key") != key:
        picture = rows.load_image(image)
        pixels = rows.image_tensor(picture, session.model.image_size)[None].to(session.model.query_tokens.device)
        session.last = {"key": key, "picture": picture, "features": session.model.image_features(pixels), "closed": {}}
    return session.last


def side_of(session, features, question, gated):
    """One side of the page -> {"answer", "confidence", "candidates": [(text, probability)], "attention": [n,n], "on_cls"}."""
    model, asking = session.model, {**features, "gated": gated}
    texts = model.predict_answers(None, [question], **asking, best=BEST)[0]
    sums = model.score_answers([question], texts, **asking)[0]  # [A]
    answer = texts[0]  # what every other way to ask answers
    attention, on_cls = maps.mean_map(maps.attention_maps(model, features, question, gated=gated))
    return {"answer": answer, "confidence": model.confidence([question], [answer], **asking).exp().item(),
            "candidates": [(text, one.exp().item()) for text, one in zip(texts, sums)], "attention": attention, "on_cls": on_cls}


def answers_of(session, image, question, style="", mix=0.0, occluded=False):
    """Everything tab Ask shows of one question -> {"picture", "gated", "closed" (see side_of), "styles": [(name, p)],
    "occlusion": [n,n] or None}. The side without the gate is computed once a picture and question."""
    seen = look(session, image)
    features = {**seen["features"], "style_feature": style_feature(session, seen["features"], style, mix)}
    if question not in seen["closed"]:
        seen["closed"] = {question: side_of(session, seen["features"], question, gated=False)}
    found = {"picture": seen["picture"], "gated": side_of(session, features, question, gated=True),
             "closed": seen["closed"][question], "styles": [], "occlusion": None}
    if features["style_feature"] is not None:
        net = session.model.efficientnet
        shares = net.logits(features["style_feature"]).softmax(-1)[0]  # [S]
        found["styles"] = [(net.style_names()[i], shares[i].item()) for i in shares.argsort(descending=True)[:TOP_STYLES].tolist()]
    if occluded:
        found["occlusion"] = maps.occlusion(session.model, features, question, found["gated"]["answer"])
    return found


# --- loading: each model once, when its tab first needs it ------------

def load_session(checkpoint, data, blip2=None, efficientnet=None):
    """--checkpoint, and the pictures by style of --data where that is there -> Session. DataError: as core.load_gated."""
    examples = {}
    for row in rows.read_split(data, "train") if os.path.isdir(data) else []:
        if row.style.strip() and not row.fault:
            examples.setdefault(row.style.strip(), {})[row.image] = None
    examples = {style: list(paths) for style, paths in examples.items()}
    dtype = core.DTYPES[loop.precision_of("auto")]
    checkpoint = published.tiny("gated") if checkpoint == "tiny" else checkpoint
    model, _ = core.load_gated(checkpoint, blip2, efficientnet, device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)
    return Session(model, examples)


def load_captioner(place):
    """--captioner -> function: picture's path -> caption."""
    import train_blip_caption
    is_blip = not os.path.exists(place) or os.path.isfile(os.path.join(place, "config.json"))
    named = ["--blip" if is_blip else "--checkpoint", place]
    args = train_blip_caption.get_args(["--caption", place, *named, "--precision", loop.precision_of("auto")])
    model, tokenizer, accelerator, generation = train_blip_caption.ready(args)
    size = model.config.vision_config.image_size

    def caption(image):
        pixels = rows.picture_tensor(image, size)[None].to(accelerator.device)
        return train_blip_caption.describe(model, tokenizer, pixels, generation)[0]

    return caption


@torch.no_grad()
def load_finder(checkpoint, folder):
    """--retrieval and --gallery, indexed as train_cir.py --search does -> function: picture's path, sentence -> [(path, name, score)]."""
    import train_cir
    args = train_cir.get_args(["--checkpoint", checkpoint, "--gallery", folder, "--search", "", "--image", folder, "--precision",
                               loop.precision_of("auto")])
    best, model, accelerator = train_cir.load_best(args)
    opener = train_cir.Opener(model.image_size, args.transform, args.target_ratio)
    with torch.no_grad():
        names, features = train_cir.index_gallery(args, best, model, accelerator, opener)

    def find(image, text):
        vector = train_cir.query_vector(model, accelerator, opener(image), text)
        numbers, scores = picture_index.best(features, vector, args.top + 1)
        hits = [(os.path.join(folder, names[i]), names[i], float(score)) for i, score in zip(numbers, scores)]
        return [hit for hit in hits if not filecmp.cmp(hit[0], image, shallow=False)][:args.top]  # the reference itself, uploaded

    return find


# --- HTML: every text goes through html.escape ------------

def block(*parts):
    return f'<div class="demo">{"".join(parts)}</div>'


def lines_html(*lines):
    return block(*(f"<p>{html.escape(line)}</p>" for line in lines))


def fault_html(text):
    return block(f'<p class="fault">{html.escape(text)}</p>')


def bars_html(title, pairs):
    """(name, share from 0 to 1) as labelled bars."""
    bars = "".join(f'<div class="bar"><b>{html.escape(name or "(nothing)")}</b>'
                   f'<div class="track"><i style="width:{100 * share:.2f}%"></i></div>'
                   f'<span class="share">{100 * share:.1f} %</span></div>' for name, share in pairs)
    return f"<h4>{html.escape(title)}</h4>{bars}"


def data_uri(image):
    """PIL RGB -> the data URI of a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def colours(values, diverging):
    """Numbers from 0 to 1 (diverging: -1 to 1) -> uint8 [...,3]: black to yellow, or blue over white to red."""
    import matplotlib
    name = "RdBu_r" if diverging else "inferno"
    return matplotlib.colormaps[name]((values + 1) / 2 if diverging else values, bytes=True)[..., :3]


def overlay(picture, heat, top, diverging=False, side=420):
    """A map [n,n] over its picture -> PIL RGB with no side over `side`; `top` gets the strongest colour. The picture keeps its
    shape: the model squashed it to a square, and its patches with it."""
    shown = picture.copy()
    shown.thumbnail((side, side))
    layer = Image.fromarray(colours(heat / top, diverging)).resize(shown.size, Image.Resampling.NEAREST)
    grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None] / 255  # [h,w,1]
    layer = np.asarray(layer, dtype=np.float32)  # [h,w,3]
    both = layer * (0.6 + 0.4 * grey) if diverging else 0.6 * layer + 0.4 * 255 * grey  # multiplied: white stays white
    return Image.fromarray(both.astype(np.uint8))


def map_html(title, picture, heat, top, unit, diverging=False):
    """A map over its picture with its colour scale."""
    stops = ",".join("rgb({},{},{})".format(*rgb) for rgb in colours(np.linspace(-1 if diverging else 0, 1, 9), diverging))
    low = f"-{top:.3g}" if diverging else "0"
    return (f'<figure><figcaption>{html.escape(title)}</figcaption>'
            f'<img alt="" src="{data_uri(overlay(picture, heat, top, diverging))}">'
            f'<div class="scale">{low}<i style="background:linear-gradient(90deg,{stops})"></i>'
            f'{top:.3g} {html.escape(unit)}</div></figure>')


def side_html(side, title, words):
    """Answer, confidence and candidates of one side."""
    return (f'<h3>{html.escape(title)}</h3><p class="answer">{html.escape(side["answer"] or "(nothing)")}</p>'
            + bars_html(words["confidence"], [(side["answer"], side["confidence"])])
            + bars_html(words["candidates"], side["candidates"]))


def answers_html(results, words):
    """What answers_of found -> the HTML of the left side and of the right side."""
    picture, gated, closed = results["picture"], results["gated"], results["closed"]
    on, off = 100 * gated["attention"], 100 * closed["attention"]
    top, unit = maps.span(np.stack([on, off])), "%"
    left = [side_html(gated, words["gated"], words), map_html(words["attention"], picture, on, top, unit)]
    if results["styles"]:
        left.append(bars_html(words["styles"], results["styles"]))
    if results["occlusion"] is not None:
        left.append(map_html(words["fall"], picture, results["occlusion"], maps.span(results["occlusion"]), "nats", diverging=True))
    right = [side_html(closed, words["closed"], words), map_html(words["attention"], picture, off, top, unit),
             map_html(words["difference"], picture, on - off, maps.span(on - off, 0.01), "points", diverging=True)]
    return block(*left), block(*right)


def hits_html(hits):
    """(path, name, score) of the pictures found, best first, as a grid."""
    cells = []
    for rank, (path, name, score) in enumerate(hits, 1):
        uri = gallery.thumbnail_or_none(path)
        shown = f'<img alt="" src="{uri}">' if uri else "<p>(cannot be read)</p>"
        cells.append(f"<figure>{shown}<figcaption>{rank}. {score:.3f}<br>{html.escape(name)}</figcaption></figure>")
    return block('<div class="hits">', *cells, "</div>")


def report_html(path):
    """A report in a frame of its own, in which no script runs."""
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    return block(f'<iframe sandbox="" title="report" srcdoc="{html.escape(text)}"></iframe>')


def loading_html(words):
    """What stands there until the model is loaded: what is being done, and data/maps.png, so that there is something to look at."""
    uri = "data:image/png;base64," + base64.b64encode(FIGURE.read_bytes()).decode()
    return block(f'<p>{html.escape(words["loading"])}</p><figure class="soon"><figcaption>{html.escape(words["soon"])}</figcaption>'
                 f'<img alt="" src="{uri}"></figure>')


def status_html(session, words):
    """One line on what the model is, and where the styles come from."""
    if session.model.gates is None:
        return lines_html(words["no_gates"])
    return lines_html(words["by_pictures" if session.examples else "by_weights"])


def guarded(make, count, *inputs):
    """make(*inputs) -> what it shows in `count` places; a DataError as text, the folder of an upload left out of it."""
    try:
        return make(*inputs)
    except DataError as error:
        text = str(error)
        for path in (one for one in inputs if isinstance(one, str) and os.path.isabs(one)):
            text = text.replace(path, os.path.basename(path))
        return (fault_html(text), *[""] * (count - 1)) if count > 1 else fault_html(text)


# --- the page ------------

class Policy:
    """ASGI middleware: every answer of the server carries POLICY, with which the browser itself refuses other addresses."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def import_gradio(folder):
    """gradio, told before it is imported to count nothing, ask no hub, and keep uploads in `folder`."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "1"),
                      GRADIO_TEMP_DIR=folder)
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise DataError(f'{error}: only demo.py needs it: pip install "gradio>=6,<7"') from None
    return gradio


def examples_of(data):
    """[[picture's path, question]]: of the validation pictures one a style; without --data the ones that ship."""
    found = {}
    if os.path.isdir(data):
        for row in rows.read_split(data, "val"):
            if not row.fault:
                found.setdefault(row.style, [row.image, row.question])
        return list(found.values())[:4]
    shipped = sorted(pathlib.Path(published.tiny("gated"), "examples").iterdir())
    return [[str(path), "Which style is this painting?"] for path in shipped[:4]]


def ask_tab(gr, words, session, examples, on):
    """Tab Ask -> (where it says what the model is, the list of styles)."""
    status = gr.HTML(loading_html(words), elem_id="status")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = picture_of(gr, words["painting"])
            question = gr.Textbox(label=words["question"], value="Which style is this painting?", max_length=LONGEST,
                                  elem_id="question")
            button = gr.Button(words["ask"], variant="primary", elem_id="ask")
            style = gr.Dropdown([(words["own"], "")], value="", label=words["style"], elem_id="style")
            mix = gr.Slider(0, 1, value=1, step=0.05, label=words["mix"], elem_id="mix")
            occluded = gr.Checkbox(label=words["occlusion"])
        with gr.Column(scale=2, min_width=300):
            left = gr.HTML(elem_id="gated")
        with gr.Column(scale=2, min_width=300):
            right = gr.HTML(elem_id="closed")
    gr.Examples(examples, [image, question], label=words["examples"], examples_per_page=4)

    def ask(*inputs):
        if not inputs[0] or not inputs[1].strip():
            return fault_html(words["empty"]), ""
        return guarded(lambda *given: answers_html(answers_of(session(), *given), words), 2, *inputs)

    for event in (button.click, question.submit, style.input, mix.input, occluded.input):
        event(ask, [image, question, style, mix, occluded], [left, right], trigger_mode="always_last", **on)
    return status, style


def picture_of(gr, label):
    """Where a picture is dropped; what it holds is a path, decoded by rows.load_image alone."""
    image = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label=label, height=300, buttons=[],
                     elem_classes="picture")
    # gradio's own opens the file, and of a broken one says "Error" alone
    image.preprocess = lambda payload: payload and payload.path
    return image


def caption_tab(gr, words, args, on):
    captioner = functools.cache(lambda: load_captioner(args.captioner))
    image, button, out = (picture_of(gr, words["painting"]), gr.Button(words["caption"], variant="primary"),
                          gr.HTML(elem_id="caption"))

    def caption(image):
        return block(f'<p class="answer">{html.escape(captioner()(image) or "(nothing)")}</p>')

    button.click(lambda image: guarded(caption, 1, image) if image else fault_html(words["no_picture"]), image, out, **on)


def find_tab(gr, words, args, on):
    if not (args.retrieval and args.gallery):
        return gr.HTML(lines_html(words["no_finder"]))
    finder = functools.cache(lambda: load_finder(args.retrieval, args.gallery))
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image, text = picture_of(gr, words["reference"]), gr.Textbox(label=words["change"], max_length=LONGEST)
            button = gr.Button(words["find"], variant="primary")
        with gr.Column(scale=2, min_width=300):
            out = gr.HTML(elem_id="found")

    def find(image, text):
        return hits_html(finder()(image, text))

    button.click(lambda *given: guarded(find, 1, *given) if given[0] else fault_html(words["no_picture"]), [image, text], out, **on)


def build(gr, args):
    """The whole page as gr.Blocks. One event at a time: they share the models and the processor."""
    words, on = words_of(args.lang), {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
    session = functools.cache(lambda: load_session(args.checkpoint, args.data, args.blip2, args.efficientnet))
    with gr.Blocks(title=words["title"], analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(block(f'<h3>{html.escape(words["title"])}</h3>'))
        with gr.Tab(words["ask"]):
            status, style = ask_tab(gr, words, session, examples_of(args.data), on)
        with gr.Tab(words["caption"]):
            caption_tab(gr, words, args, on)
        with gr.Tab(words["find"]):
            find_tab(gr, words, args, on)
        with gr.Tab(words["errors"]) as errors:
            report = gr.HTML("" if args.report else lines_html(words["no_report"]), elem_id="report")

        def ready():
            return status_html(session(), words), gr.Dropdown([(words["own"], ""), *session().styles])

        page.load(lambda: guarded(ready, 2), None, [status, style], show_progress="hidden", **on)
        if args.report:
            errors.select(lambda: report_html(args.report), None, report, **on)
    return page


def main(argv=None):
    args = get_args(argv)
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        gr = import_gradio(folder)
        from starlette.middleware import Middleware
        # of this machine: none is fetched
        fonts = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
        build(gr, args).launch(
            server_name="127.0.0.1", server_port=args.port, share=False, ssr_mode=False, mcp_server=False, pwa=False,
            footer_links=[], max_file_size="64mb", inbrowser=args.open, app_kwargs={"middleware": [Middleware(Policy)]}, css=STYLE,
            theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]))


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
