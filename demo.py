r"""demo.py: a page on this machine to ask about a painting, with the style gate and without it.

    make look                      # installs gradio, which only this file needs, and opens the page; or
    python demo.py                 # then open http://127.0.0.1:7860: every tab works with the models that ship; with yours:
    python demo.py --checkpoint runs/demo/best.pt --captioner runs/demo-caption/best.pt --retrieval runs/demo-cir/best.pt \
        --gallery data/artquest/images --report runs/demo/report.html

Tabs: Ask (answers with the gates and without, as if in other styles, maps), Caption, Find (a picture and a sentence over a folder),
Errors (a report: --report, or of the example pictures, made when the tab is opened). English or Chinese, as the browser asks for.
Only 127.0.0.1 is listened on; the page forbids the browser every other address; nothing is counted or shared.
What visitors type and upload is data: text is escaped, pictures are decoded by rows.load_image, uploads are deleted at the end.
"""

import argparse
import base64
import collections
import filecmp
import functools
import html
import io
import os
import pathlib
import re
import shutil
import sys
import tempfile
import unicodedata
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

import core
from data import rows, tables
from engine import errors, flags, folders, galleries, loop, picture_index, published
from engine.errors import DataError
from show import gallery, maps, report

BEST, TOP_STYLES, EXAMPLES, LONGEST = 3, 3, 8, 500  # candidates, styles shown, pictures a style, letters of a text
OTHERS, ASKED, SHOWN = 4, 80, 840  # styles to try at once, questions of the report that tab Errors makes, pixels of a picture under a map
UNREAD, SPELLED = 0.2, 0.6  # share of a question's letters, of a word's letters that are tokens of their own: from there on it is said
QUESTION = "Which style is this painting?"
FIGURE = pathlib.Path(__file__).resolve().parent / "data/maps.png"
DATA = "data/artquest"
CHECKPOINTS = ("runs/demo/best.pt", "runs/gated/best.pt")  # the first that is there is the default, else the gates that ship
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'self'"
WORDS = {  # English, Chinese
    "title": ("What art style does to an answer", "艺术风格如何影响回答"),
    "intro": ("A style classifier looks at the painting beside the question-answering model; what it sees opens or closes gates on what "
              "the model reads from the picture. Here both answers stand side by side: with these gates, and without.",
              "风格分类器与问答模型同时看画；它看到的风格控制一组门，门决定模型从画中读取什么。这里并排给出两个回答：有门控的和无门控的。"),
    "ask": ("Ask", "提问"), "caption": ("Caption", "描述"), "find": ("Find", "检索"), "errors": ("Errors", "错例"),
    "painting": ("Painting", "画作"), "question": ("Question", "问题"), "language": ("Language", "语言"),
    "style": ("As if painted in ... (more cards)", "假设以……风格绘成（另加卡片）"), "as_if": ("As if {}", "假设：{}"),
    "mix": ("How far towards it (1: all the way)", "靠近的程度（1 为完全）"),
    "maps": ("Maps", "热图"), "attention_map": ("where it looks", "模型看哪里"), "occlusion_map": ("what the answer rests on (slower)", "回答依据何处（较慢）"),
    "examples": ("Examples: click one", "示例：点击一幅"), "questions": ("Questions to try", "可试的问题"),
    "gated": ("With the style gate", "有风格门控"), "closed": ("Without the gate", "无门控"), "confidence": ("Confidence", "置信度"),
    "candidates": ("Its three best answers", "前三个候选回答"), "nothing": ("(nothing)", "（空）"),
    "seen": ("What the style classifier sees", "风格分类器看到的风格"), "why": ("what is this?", "这是什么？"),
    "attention_gated": ("Attention with the gate", "有门控的注意力"), "attention_closed": ("Attention without it", "无门控的注意力"),
    "difference": ("With the gate minus without", "有门控减无门控"), "fall": ("What the answer rests on", "回答的依据"),
    "percent": ("% of attention", "% 注意力"), "points": ("points", "百分点"), "nats": ("nats", "nats"),
    "reference": ("Reference picture", "参考图"), "change": ("What should be different", "应有何不同"), "unreadable": ("cannot be read", "无法读取"),
    "empty": ("Give a picture and a question.", "请给出图片和问题。"), "no_picture": ("Give a picture.", "请给出图片。"),
    "no_gates": ("This model was trained without gates: both cards are equal.", "该模型没有门控：两张卡片相同。"),
    "by_pictures": (f"A style to try is the mean of up to {EXAMPLES} example pictures.", f"所试的风格取至多 {EXAMPLES} 幅示例画作的均值。"),
    "by_weights": ("A style to try is the classifier's weights for it, for want of example pictures (--data).",
                   "没有示例画作（--data），所试的风格取自分类器权重。"),
    "loading": ("Loading the model: a few seconds for the tiny one. Meanwhile: where a trained model looks with the gates and without, and "
                "what its answer rests on.",
                "正在加载模型：小模型只需几秒。请先看一个训练好的模型在有门控与无门控时看哪里，以及回答依据什么。"),
    "wait": ("Being computed: a few seconds with the models that ship.", "正在计算：用自带的模型只需几秒。"),
    "outside": ("The model cannot read this question: its vocabulary has no token for {} % of the letters. The answers mean nothing.",
                "模型读不懂这个问题：{} % 的字符不在它的词表里。下面的回答没有意义；请用它训练时的语言（多为英文）提问。"),
    "spelled": ("Not in the model's vocabulary, read in pieces: {}. It has likely never been taught what that is.",
                "不在模型的词表里、只能拆开来读的词：{}。模型多半没有学过它们。"),
    "caption_intro": ("A second model, BLIP, describes the picture in a sentence.", "另一个模型 BLIP 用一句话描述图片。"),
    "caption_tiny": ("The one that ships is tiny and half trained, so that fine-tuning has something left to do: it is often wrong.",
                     "自带的模型很小，只训练了一半，留给微调去提高：它常常说错。"),
    "find_intro": ("Give a picture and say what should be different: the folder's pictures that fit best, with their scores, are shown. A gate "
                   "lets the sentence decide what is read from the picture.",
                   "给出一幅图并说明应有何不同：显示文件夹中最相符的图片及得分。门控让这句话决定从图中读取什么。"),
    "errors_intro": ("Where the model is right and wrong, with the gates and with them closed (the report itself is in English).",
                     "模型在哪里对、哪里错，有门控与关闭门控相比（报告本身为英文）。"),
    "about": ("How to read this page", "如何读懂本页"),
    "about_gate": ("A gate is a number that scales what an attention head, or one of its channels, reads from the picture. Where all are 1, "
                   "the model is the plain one: the card without the gate.",
                   "门是一个数，用来缩放一个注意力头（或它的一个通道）从画中读取的内容。全部为 1 时就是原来的模型，即“无门控”的卡片。"),
    "about_style": ("The bars: probabilities that the style classifier gives the painting. They, and the question, set the gates; 'as if' "
                    "puts another style in their place and changes nothing in the picture.",
                    "条形：风格分类器给这幅画的概率。门由它和问题共同决定；“假设”以另一种风格代替它，画面不变。"),
    "about_answer": ("Confidence: the probability of a token of the answer, on the (geometric) average. Below it: the probabilities of whole answers.",
                     "置信度：回答中每个词元概率的几何平均。其下为整个回答的概率。"),
    "about_attention": ("Attention: where the model's queries look, in percent of all they look at. It shows where, not why.",
                        "注意力：模型的查询看向何处，占全部注意力的百分比。它说明看哪里，不说明为什么。"),
    "about_difference": ("The difference: red where the gate makes the model look more, blue where less.",
                         "差：红色处门控使模型看得更多，蓝色处更少。"),
    "about_fall": ("What the answer rests on: each place is hidden in turn. Red: the answer becomes less likely without it; blue: more likely.",
                   "回答的依据：依次遮住每一处。红色：遮住后回答的概率下降；蓝色：上升。")}
ABOUT = ("gate", "style", "answer", "attention", "difference", "fall")  # of WORDS, in the order of the page
STYLE = """.demo{overflow-wrap:anywhere;color:var(--body-text-color)}.demo h3{margin:0 0 .2em!important;font-size:1em!important;font-weight:600}.demo p{margin:.2em 0}
.demo h1{font-size:1.35em!important;font-weight:700;margin:0!important}
.demo h4{margin:.7em 0 .2em!important;font-size:.9em!important;font-weight:600}.demo small,.demo .why{font-size:.85em}
.demo .cards{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.7em;margin:.6em 0}.demo .note{border-left:4px solid #d9822b;padding:.3em .7em}
.demo .card{border:1px solid var(--border-color-primary);border-radius:8px;padding:.7em .8em;background:var(--background-fill-primary)}
.demo .card.as-if{border-style:dashed}.demo .answer{font-size:1.5em;font-weight:700;line-height:1.25;max-height:6em;overflow:auto}
.demo .bar{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:0 .6em;margin:.3em 0;font-size:.9em}.demo .bar b{font-weight:400}
.demo .track{grid-column:1/-1;background:rgba(128,128,128,.22);border-radius:3px;height:.45em}.demo .bar i{display:block;height:100%;border-radius:3px;background:#1f6feb}
.demo .share{text-align:right;font-variant-numeric:tabular-nums}.demo .seen{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:0 1em}
.demo .seen .bar{margin:.1em 0!important}.demo a{color:#1f6feb;text-decoration:underline;white-space:nowrap}.dark .demo a{color:#79b8ff}
.demo .maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,15em),1fr));gap:1em;align-items:end}
.demo figure{margin:0}.demo figure img{display:block;width:100%}.demo .soon{overflow-x:auto}.demo .soon img{max-width:56em;min-width:40em}
.demo figcaption{font-size:.9em;margin-bottom:.25em}.demo .scale{display:flex;gap:.5em;align-items:center;font-size:.85em;margin-top:.2em}
.demo .scale i{flex:1;height:.6em;min-width:3em}.demo .hits{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(30%,150px),1fr));gap:.8em}
.demo .hits img{aspect-ratio:1;object-fit:contain;background:rgba(128,128,128,.15)}.demo .fault{color:#c62828;font-weight:600}
.demo .about p{max-width:60em}.dark .demo .fault{color:#ff8a80}.demo iframe{width:100%;height:80vh;border:1px solid #8888;background:#fff}
.top{flex-wrap:nowrap!important;align-items:start}.top>:last-child{flex:0 0 auto!important;min-width:0!important;width:auto}
.picture .image-container{padding-top:2em}.strip>.gallery{display:grid!important;grid-template-columns:repeat(8,minmax(0,1fr));gap:4px!important}
.strip .gallery-item{width:100%!important;min-width:0!important;aspect-ratio:1;overflow:hidden}
.strip .gallery-item *{display:block;width:100%!important;height:100%!important;max-width:none!important}
.strip img{object-fit:cover}#intro{margin-top:-1em}#maps:not(:has(.demo)){display:none}
@media(max-width:640px){.gradio-container .main{padding:8px!important}.gradio-container .column,.gradio-container .row{gap:8px!important}
.demo h1{font-size:.95em!important;padding-top:.3em}.demo h4{font-size:.8em!important}.demo h3{font-size:.9em!important}
.demo .intro{font-size:.8em;line-height:1.3}#language label{padding:.25em .5em!important;font-size:12px}
.tab-container button{padding:0 .5em!important;font-size:13px!important}.picture,.picture .image-container{height:140px!important;min-height:0!important}
.picture .image-container{padding-top:0}#intro{margin-top:-.4em}#question{padding:4px!important}.strip .label,#tries .label,#question label>span{display:none!important}
.demo .answer{font-size:1.1em;overflow-wrap:break-word}.demo .card{padding:.4em .5em}.demo .bar{font-size:.8em;gap:0 .2em}
.demo .seen{gap:0 .5em;grid-template-columns:repeat(2,minmax(0,1fr))}.demo .seen .bar:nth-child(n+3){display:none}
#tries>.gallery{flex-wrap:nowrap!important;overflow-x:auto}#tries .gallery-item{flex:none}.gradio-container .html-container{padding:0!important}}"""


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="FILE|DIR|tiny",
                        help="best.pt or folder of train_gated.py, or tiny: the trained gates that ship with the project (default: "
                             f"the first there is of {', '.join(CHECKPOINTS)}, else tiny)")
    parser.add_argument("--blip2", metavar="ID|DIR", help="where the BLIP-2 of --checkpoint lies now, if it moved")
    parser.add_argument("--efficientnet", metavar="FILE", help="where its style classifier lies now, if it moved")
    parser.add_argument("--captioner", metavar="FILE|DIR", help="run folder or best.pt of train_blip_caption.py, or a BLIP folder "
                                                                "(default: the tiny one that ships)")
    parser.add_argument("--retrieval", metavar="FILE|DIR", help="run folder or best.pt of train_cir.py (default: the tiny one that ships)")
    parser.add_argument("--gallery", metavar="DIR", help="folder of pictures that tab Find looks through (default: drawn ones that ship)")
    parser.add_argument("--report", metavar="FILE.html", help="what tab Errors shows (default: the example pictures' questions, answered "
                                                              "when the tab is opened)")
    parser.add_argument("--data", metavar="DIR", help="training data with styles, for examples and for the styles to try "
                                                      f"(default: {DATA} where it is)")
    parser.add_argument("--port", type=flags.positive, default=7860, help="(default: 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--lang", choices=("auto", "en", "zh"), default="auto",
                        help="language of the page; it has a switch (default: auto, as the browser asks for)")
    args = flags.parse_args(parser, argv)
    if args.data and not os.path.isdir(args.data):
        raise DataError(f"--data {args.data}: no such folder: give the one with the tables train and val")
    args.data = args.data or default_data()
    args.checkpoint = args.checkpoint or next((path for path in CHECKPOINTS if os.path.isfile(path)), "tiny")
    args.captioner = args.captioner or published.tiny("blip")
    for path in (args.report, args.gallery, args.retrieval):
        if path and not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder")
    if args.report and os.path.isdir(args.report):
        raise DataError(f"--report {args.report}: a folder: give the page in it")
    return args


def words_of(lang):
    """WORDS in one language, "en" or "zh"."""
    return {name: both[lang == "zh"] for name, both in WORDS.items()}


def language_of(header):
    """The language of a browser's Accept-Language header: "zh" where Chinese comes before English, else "en"."""
    weights = {}
    for entry in (header or "").lower().split(","):
        name, _, weight = entry.partition(";q=")
        try:
            weights.setdefault(name.strip()[:2], float(weight or 1))
        except ValueError:  # whoever wrote it is no browser
            continue
    return "zh" if weights.get("zh", 0) > weights.get("en", 0) else "en"


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
        return [] if self.model.mapper is None else sorted(self.examples) or self.model.efficientnet.style_names()


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
    """Features of a picture's path, kept for the next question -> {"picture": PIL, "features", "sides": {}}."""
    key = (str(image), os.path.getmtime(image) if os.path.isfile(image) else None)
    if session.last.get("key") != key:
        picture = rows.load_image(image)
        pixels = rows.image_tensor(picture, session.model.image_size)[None].to(session.model.query_tokens.device)
        picture.thumbnail((SHOWN, SHOWN))  # for the maps; every visitor's is kept
        session.last = {"key": key, "picture": picture, "features": session.model.image_features(pixels), "sides": {}}
    return session.last


def side_of(session, features, question, gated):
    """One card of the page -> {"answer", "confidence", "candidates": [(text, probability)], "attention": [n,n], "on_cls"}."""
    model, asking = session.model, {**features, "gated": gated}
    texts = model.predict_answers(None, [question], **asking, best=BEST)[0]
    sums = model.score_answers([question], texts, **asking)[0]  # [A]
    answer = texts[0]  # what every other way to ask answers
    attention, on_cls = maps.mean_map(maps.attention_maps(model, features, question, gated=gated))
    return {"answer": answer, "confidence": model.confidence([question], [answer], **asking).exp().item(),
            "candidates": [(text, one.exp().item()) for text, one in zip(texts, sums)], "attention": attention, "on_cls": on_cls}


def answers_of(session, image, question, styles=(), mix=1.0, wanted=()):
    """Everything tab Ask shows of one question -> {"picture", "gated", "closed" (see side_of), "others": [(style, side)] as if in these
    styles, "mix", "seen": [(name, p)] of the style classifier, "unread": see unread, "wanted", "occlusion": [n,n] or None}.

    styles: of Session.styles; mix: see mix_features; wanted: maps to show, "attention", "occlusion". A card is computed once a
    picture, question, style and mix."""
    seen, model = look(session, image), session.model
    if seen.get("question") != question:
        seen.update(question=question, sides={}, occlusion=None)

    def side(gated, style=""):
        key = (gated, style, style and mix)
        if key not in seen["sides"]:
            features = {**seen["features"], "style_feature": style_feature(session, seen["features"], style, mix)}
            seen["sides"][key] = side_of(session, features, question, gated)
        return seen["sides"][key]

    own = seen["features"]["style_feature"]
    found = {"picture": seen["picture"], "gated": side(True), "closed": side(False), "others": [(style, side(True, style)) for style in styles],
             "mix": mix, "seen": [], "unread": unread(model.tokenizer, question), "wanted": tuple(wanted)}
    if own is not None:
        net = model.efficientnet
        shares = net.logits(own).softmax(-1)[0]  # [S]
        found["seen"] = [(net.style_names()[i], shares[i].item()) for i in shares.argsort(descending=True)[:TOP_STYLES].tolist()]
    if "occlusion" in wanted and seen["occlusion"] is None:
        seen["occlusion"] = maps.occlusion(model, seen["features"], question, found["gated"]["answer"])
    return {**found, "occlusion": seen["occlusion"] if "occlusion" in wanted else None}


def unread(tokenizer, text):
    """What of a text a language model has no tokens for -> (share of its letters that are in no token, words read in pieces).

    A tokenizer of bytes takes Chinese apart into thirds of characters, one of words gives [UNK]; a word of Latin letters counts where
    more than SPELLED of its letters are tokens of their own."""
    def ids_of(part):
        return tokenizer(part, add_special_tokens=False).input_ids

    def folded(part):  # as a tokenizer without capitals and accents reads it
        return [c for c in unicodedata.normalize("NFD", part.casefold()) if not c.isspace() and not unicodedata.combining(c)]

    known, letters = set(folded("".join(tokenizer.decode([i]) for i in ids_of(text)))), folded(text)
    words = [word for word in dict.fromkeys(re.findall(r"[A-Za-z]{3,}", text))
             if min(len(ids_of(word)), len(ids_of(" " + word))) > SPELLED * len(word)]
    return sum(c not in known for c in letters) / max(1, len(letters)), words


# --- loading: each model once, when its tab first needs it ------------

def default_data():
    """The folder DATA where its tables are there, else "", and what ships is shown."""
    if os.path.isdir(DATA):
        try:
            for split in ("train", "val"):
                rows.find_table(DATA, split)
            return DATA
        except DataError as error:
            print(f"note: {error}; what ships is shown", file=sys.stderr)
    return ""


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


def example_rows(data):
    """The questions about EXAMPLES pictures, one a style first: of the validation pictures of --data, or else of those that ship."""
    found = [row for row in rows.read_split(data, "val") if not row.fault] if os.path.isdir(data) else []
    if not found:
        shipped = pathlib.Path(published.tiny("gated"))
        found = rows.read_split(str(shipped / "examples.csv"), "val", images=str(shipped / "examples"))
    of_styles = {row.style: row.image for row in reversed(found)}  # the first of each
    pictures = list(dict.fromkeys([*(image for _, image in sorted(of_styles.items())), *(row.image for row in found)]))[:EXAMPLES]
    return sorted((row for row in found if row.image in pictures), key=lambda row: pictures.index(row.image))


def example_queries(gallery_folder):
    """[(picture's path, sentence)] of tab Find: those of the gallery that ships, or the first pictures of a folder without a sentence."""
    if gallery_folder:
        return [(os.path.join(gallery_folder, name), "") for name in folders.pictures_in(gallery_folder)[:EXAMPLES]]
    shipped = pathlib.Path(published.tiny("cir"))
    table = [one for _, one in tables.read_table(shipped / "examples.csv")][:EXAMPLES]
    return [(str(shipped / "gallery" / one["reference"]), one["text"]) for one in table]


def load_captioner(place):
    """--captioner -> function: picture's path -> caption."""
    import train_blip_caption
    is_blip = not os.path.exists(place) or os.path.isfile(os.path.join(place, "config.json"))
    named = ["--blip" if is_blip else "--checkpoint", place]
    args = train_blip_caption.get_args(["--caption", place, *named, "--precision", loop.precision_of("auto")])
    model, tokenizer, accelerator, best = train_blip_caption.ready(args)
    size = model.config.vision_config.image_size

    def caption(image):
        pixels = rows.picture_tensor(image, size)[None].to(accelerator.device)
        return train_blip_caption.describe(model, tokenizer, pixels, best["generation"])[0]

    return caption


@torch.no_grad()
def load_finder(checkpoint, folder, store=None):
    """--retrieval and --gallery, indexed as train_cir.py --search does -> function: picture's path, sentence -> [(path, name, score)].

    store: folder for the index; None: beside the checkpoint."""
    import train_cir
    args = train_cir.get_args(["--checkpoint", checkpoint, "--gallery", folder, "--search", "", "--image", folder, "--precision",
                               loop.precision_of("auto")])
    best, model, accelerator = train_cir.load_best(args)
    opener = train_cir.Opener(model.image_size, args.transform, args.target_ratio)
    with torch.no_grad():
        names, features = train_cir.index_gallery(args, best, model, accelerator, opener, store)

    def find(image, text):
        vector = galleries.query_vector(model, accelerator, opener(image), text)
        hits = picture_index.matches(folder, names, features, vector, args.top + 1)
        return [hit for hit in hits if not filecmp.cmp(hit[0], image, shallow=False)][:args.top]  # the reference itself, uploaded

    return find


def make_report(session, examples, path):
    """Answer the example questions with the gates and without -> `path`, a page of show/report.py."""
    model, chosen = session.model, examples[:ASKED]
    names = [report.CLOSED, "gated"] if model.mapper is not None else ["trained, no gates"]
    systems = {name: [] for name in names}
    for start in range(0, len(chosen), 16):
        group = chosen[start:start + 16]
        pixels = torch.stack([rows.picture_tensor(row.image, model.image_size) for row in group])  # [B,3,s,s]
        features, questions = model.image_features(pixels.to(model.query_tokens.device)), [row.question for row in group]
        for name in names:
            asked = {"questions": questions, "contexts": [row.context for row in group], **features, "gated": name != report.CLOSED}
            answers = model.predict_answers(None, **asked)
            sure = model.confidence(answers=answers, **asked).tolist()
            systems[name] += [{"prediction": text, "confidence": value} for text, value in zip(answers, sure)]
    parts = report.gated(chosen, systems, last=[report.about(data=f"the demo's {len({row.image for row in chosen})} example pictures")])
    report.write(path, report.outcome("The demo's example pictures", chosen, systems), parts)
    return path


# --- HTML: every text goes through html.escape ------------

def block(*parts):
    return f'<div class="demo">{"".join(parts)}</div>'


def lines_html(*lines):
    return block(*(f"<p>{html.escape(line)}</p>" for line in lines))


def fault_html(text):
    return block(f'<p class="fault">{html.escape(text)}</p>')


def bars_html(pairs, words):
    """(name, share from 0 to 1) as labelled bars."""
    return "".join(f'<div class="bar"><b>{html.escape(name or words["nothing"])}</b><span class="share">{100 * share:.1f} %</span>'
                   f'<div class="track"><i style="width:{100 * share:.2f}%"></i></div></div>' for name, share in pairs)


def why(name, words):
    """The link from a picture to the line of about_html that explains it. name: of ABOUT."""
    return f'<a class="why" href="#about-{name}">{html.escape(words["why"])}</a>'


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


def map_html(title, picture, heat, top, unit, link, diverging=False):
    """A map over its picture with its colour scale. link: of why."""
    stops = ",".join("rgb({},{},{})".format(*rgb) for rgb in colours(np.linspace(-1 if diverging else 0, 1, 9), diverging))
    low = f"-{top:.3g}" if diverging else "0"
    return (f'<figure><figcaption>{html.escape(title)} {link}</figcaption>'
            f'<img alt="" src="{data_uri(overlay(picture, heat, top, diverging))}">'
            f'<div class="scale">{low}<i style="background:linear-gradient(90deg,{stops})"></i>'
            f'{top:.3g} {html.escape(unit)}</div></figure>')


def card_html(side, title, words, kind=""):
    """Answer, confidence and candidates of one side. kind: a further CSS class."""
    return (f'<div class="card {kind}"><h3>{html.escape(title)}</h3><p class="answer">{html.escape(side["answer"] or words["nothing"])}</p>'
            + bars_html([(words["confidence"], side["confidence"])], words)
            + f'<h4>{html.escape(words["candidates"])}</h4>{bars_html(side["candidates"], words)}</div>')


def notes_html(unread_share, spelled, words):
    """What to know before the answers are believed."""
    notes = []
    if unread_share > UNREAD:
        notes.append(words["outside"].format(f"{100 * unread_share:.0f}"))
    elif spelled:
        notes.append(words["spelled"].format(", ".join(spelled)))
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def cards_html(results, words):
    """What the style classifier sees, and the answers of answers_of as cards: with the gate, without, as if in other styles."""
    seen = (f'<h4>{html.escape(words["seen"])} {why("style", words)}</h4><div class="seen">{bars_html(results["seen"], words)}</div>'
            if results["seen"] else "")
    share = "" if results["mix"] == 1 else f" ({100 * results['mix']:.0f} %)"
    others = "".join(card_html(side, words["as_if"].format(style) + share, words, "as-if") for style, side in results["others"])
    return block(notes_html(*results["unread"], words), seen, '<div class="cards">', card_html(results["gated"], words["gated"], words, "gated"),
                 card_html(results["closed"], words["closed"], words, "closed"), others, "</div>", why("answer", words))


def maps_html(results, words):
    """The maps of answers_of that are wanted, as a grid."""
    picture, shown = results["picture"], []
    if "attention" in results["wanted"]:
        on, off = (100 * results[side]["attention"] for side in ("gated", "closed"))
        top = maps.span(np.stack([on, off]))
        shown += [map_html(words[f"attention_{name}"], picture, heat, top, words["percent"], why("attention", words))
                  for name, heat in (("gated", on), ("closed", off))]
        shown.append(map_html(words["difference"], picture, on - off, maps.span(on - off, 0.01), words["points"],
                              why("difference", words), diverging=True))
    if results["occlusion"] is not None:
        shown.append(map_html(words["fall"], picture, results["occlusion"], maps.span(results["occlusion"]), words["nats"],
                              why("fall", words), diverging=True))
    return block('<div class="maps">', *shown, "</div>") if shown else ""


def about_html(words):
    """What each picture of tab Ask means; why links here."""
    lines = "".join(f'<p id="about-{name}">{html.escape(words["about_" + name])}</p>' for name in ABOUT)
    return block(f'<div class="about"><h4>{html.escape(words["about"])}</h4>{lines}</div>')


def head_html(words):
    return block(f'<h1>{html.escape(words["title"])}</h1>')


def intro_html(words):
    return block(f'<p class="intro">{html.escape(words["intro"])} {why("gate", words)}</p>')


def hits_html(hits, words):
    """(path, name, score) of the pictures found, best first, as a grid."""
    cells = []
    for rank, (path, name, score) in enumerate(hits, 1):
        uri = gallery.thumbnail_or_none(path)
        shown = f'<img alt="" src="{uri}">' if uri else f"<p>{html.escape(words['unreadable'])}</p>"
        cells.append(f"<figure>{shown}<figcaption>{rank}. {score:.3f}<br>{html.escape(name)}</figcaption></figure>")
    return block('<div class="hits">', *cells, "</div>")


def report_html(path):
    """A report in a frame of its own, in which no script runs."""
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    return block(f'<iframe sandbox="" title="report" srcdoc="{html.escape(text)}"></iframe>')


def loading_html(words):
    """What stands there until the model is loaded: what is being done, and data/maps.png, so that there is something to look at."""
    uri = "data:image/png;base64," + base64.b64encode(FIGURE.read_bytes()).decode()
    return block(f'<p>{html.escape(words["loading"])}</p><div class="soon"><img alt="" src="{uri}"></div>')


def status(session, words):
    """One line on what the model is, and where the styles to try come from."""
    if session.model.mapper is None:
        return words["no_gates"]
    return words["by_pictures" if session.examples else "by_weights"]


def guarded(make, *inputs):
    """make(*inputs) -> (what it returns, ""); a DataError -> (None, it as HTML), the folder of an upload left out of it."""
    try:
        return make(*inputs), ""
    except DataError as error:
        text = str(error)
        for path in (one for one in inputs if isinstance(one, str) and os.path.isabs(one)):
            text = text.replace(path, os.path.basename(path))
        return None, fault_html(text)


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
    # gradio's own opens the file, and of a broken one says "Error" alone; for the class, since a new label makes a new component
    gradio.Image.preprocess = lambda self, payload: payload and payload.path
    return gradio


class Page:
    """The page while it is built: its arguments, what texts its components show in which language, and how its events run."""

    def __init__(self, gr, args, folder):
        """folder: for what is computed and kept until the end."""
        self.gr, self.args, self.folder, self.spoken = gr, args, folder, []
        self.words = words_of("zh" if args.lang == "zh" else "en")  # until the browser has said what it wants
        # one event at a time: they share the models and the processor
        self.on = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        self.session = functools.cache(lambda: load_session(args.checkpoint, args.data, args.blip2, args.efficientnet))
        self.captioner = functools.cache(lambda: load_captioner(args.captioner))
        self.finder = functools.cache(lambda: load_finder(args.retrieval or published.tiny("cir"), args.gallery or self.shipped_gallery(),
                                                          None if args.retrieval else pathlib.Path(folder, "gallery")))
        self.examples = example_rows(args.data)
        self.pictures = self.copies(dict.fromkeys(row.image for row in self.examples))

    def copies(self, paths):
        """Pictures for examples, copied to where gradio shows files from -> their new paths."""
        made = []
        for path in paths:
            made.append(tempfile.mkdtemp(dir=self.folder) + "/" + os.path.basename(path))
            shutil.copyfile(path, made[-1])
        return made

    @staticmethod
    def shipped_gallery():
        return os.path.join(published.tiny("cir"), "gallery")

    def say(self, component, **texts):
        """A component whose properties are words: say(gr.Button(elem_id="ask"), value="ask") -> the component.

        A text is a name of WORDS, or a function of the words."""
        def told(words):
            return {name: text(words) if callable(text) else words[text] for name, text in texts.items()}

        self.spoken.append((component, told))
        for name, text in told(self.words).items():
            setattr(component, name, text)
        return component

    def updates(self, lang):
        """What every component of `say` shows in a language."""
        words = words_of(lang)
        return [self.gr.update(**told(words)) for _, told in self.spoken]

    def picture(self, label, value, place):
        """Where a picture is dropped; what it holds is a path, decoded by rows.load_image alone. place: its id in the page."""
        image = self.gr.Image(value, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260, buttons=[],
                              elem_classes="picture", elem_id=place)
        return self.say(image, label=label)

    def strip(self, paths, into):
        """Pictures in a row under `into`, which a click puts there -> the Dataset, whose events get a picture's number."""
        return self.say(self.gr.Dataset(components=[into], samples=[[path] for path in paths], type="index", layout="gallery",
                                        elem_classes="strip", samples_per_page=EXAMPLES), label="examples")


def ask_tab(page, language):
    """Tab Ask -> (what the page's first event runs once the language is known, what shows the answers, the state that holds them)."""
    gr, say, on = page.gr, page.say, page.on
    questions = common_questions(page.examples)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = page.picture("painting", page.pictures[0], "painting")
            strip = page.strip(page.pictures, image)
            question = say(gr.Textbox(value=QUESTION, max_length=LONGEST, elem_id="question"), label="question")
            button = say(gr.Button(variant="primary", elem_id="ask"), value="ask")
            tries = say(gr.Dataset(components=[question], samples=[[one] for one in questions], layout="gallery", elem_id="tries"),
                        label="questions")
        with gr.Column(scale=4, min_width=320):
            cards = gr.HTML(loading_html(page.words), elem_id="cards")
            with gr.Row():
                style = say(gr.Dropdown([], multiselect=True, max_choices=OTHERS, elem_id="style"), label="style")
                mix = say(gr.Slider(0, 1, value=1, step=0.05, elem_id="mix", buttons=[]), label="mix")
            wanted = say(gr.CheckboxGroup(elem_id="wanted"), label="maps", choices=lambda words: [
                (words["attention_map"], "attention"), (words["occlusion_map"], "occlusion")])
            drawn = gr.HTML(elem_id="maps")
    say(gr.HTML(elem_id="about"), value=about_html)
    shown = gr.State(time_to_live=3600)

    def ask(lang, *inputs):
        words = words_of(lang)
        if not inputs[0] or not inputs[1].strip():
            return fault_html(words["empty"]), "", None
        results, fault = guarded(lambda *given: answers_of(page.session(), *given), *inputs)
        return (fault, "", None) if results is None else (cards_html(results, words), maps_html(results, words), results)

    def ready(lang):
        found, fault = guarded(page.session)
        return (fault, gr.update()) if found is None else (gr.update(), gr.update(choices=found.styles, info=status(found, words_of(lang))))

    asking = {"fn": ask, "inputs": [language, image, question, style, mix, wanted], "outputs": [cards, drawn, shown], **on}
    for event in (button.click, question.submit, style.input, mix.release, wanted.input):
        event(**asking, trigger_mode="always_last")
    strip.click(lambda number: page.pictures[number], strip, image, **on).then(**asking)
    tries.click(lambda row: row[0], tries, question, **on).then(**asking)

    def begin(first):
        first.then(ready, language, [cards, style], show_progress="hidden", **on).then(**asking)

    def speak(lang, results):
        words = words_of(lang)
        if results is None:
            return gr.update(), gr.update(), gr.update()
        return cards_html(results, words), maps_html(results, words), gr.update(info=status(page.session(), words))

    return begin, lambda switch: switch.then(speak, [language, shown], [cards, drawn, style], show_progress="hidden", **on)


def common_questions(examples, count=4):
    """The questions asked of the most pictures: those with the name of a thing in them fit one picture only."""
    counted = collections.Counter(row.question for row in examples)
    return [QUESTION, *(text for text, _ in counted.most_common() if text != QUESTION)][:count]


def caption_tab(page, tab, language):
    gr, say, on = page.gr, page.say, page.on
    lines = ["caption_intro", "caption_tiny"] if page.args.captioner == published.tiny("blip") else ["caption_intro"]
    say(gr.HTML(), value=lambda words: lines_html(*(words[line] for line in lines)))
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = page.picture("painting", page.pictures[0], "captioned")
            strip = page.strip(page.pictures, image)
            button = say(gr.Button(variant="primary"), value="caption")
        with gr.Column(scale=4, min_width=320):
            out = gr.HTML(lines_html(page.words["wait"]), elem_id="caption")

    def caption(lang, image):
        words = words_of(lang)
        if not image:
            return fault_html(words["no_picture"])
        text, fault = guarded(lambda image: page.captioner()(image), image)
        return fault or block(f'<div class="card"><p class="answer">{html.escape(text or words["nothing"])}</p></div>')

    asking = {"fn": caption, "inputs": [language, image], "outputs": out, **on}
    button.click(**asking)
    strip.click(lambda number: page.pictures[number], strip, image, **on).then(**asking)
    tab.select(**asking)


def find_tab(page, tab, language):
    gr, say, on = page.gr, page.say, page.on
    queries = example_queries(page.args.gallery)
    queries = list(zip(page.copies(path for path, _ in queries), (text for _, text in queries)))
    say(gr.HTML(), value=lambda words: lines_html(words["find_intro"]))
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = page.picture("reference", queries[0][0], "reference")
            strip = page.strip([path for path, _ in queries], image)
            text = say(gr.Textbox(queries[0][1], max_length=LONGEST, elem_id="change"), label="change")
            button = say(gr.Button(variant="primary"), value="find")
        with gr.Column(scale=4, min_width=320):
            out = gr.HTML(lines_html(page.words["wait"]), elem_id="found")

    def find(lang, image, text):
        words = words_of(lang)
        if not image:
            return fault_html(words["no_picture"])
        hits, fault = guarded(lambda *given: page.finder()(*given), image, text)
        return fault or hits_html(hits, words)

    asking = {"fn": find, "inputs": [language, image, text], "outputs": out, **on}
    button.click(**asking)
    text.submit(**asking)
    strip.click(lambda number: queries[number], strip, [image, text], **on).then(**asking)
    tab.select(**asking)


def errors_tab(page, tab):
    gr, args = page.gr, page.args
    page.say(gr.HTML(), value=lambda words: lines_html(words["errors_intro"]))
    out = gr.HTML(lines_html(page.words["wait"]), elem_id="report")
    made = functools.cache(lambda: args.report or make_report(page.session(), page.examples, pathlib.Path(page.folder, "report.html")))

    def show():
        found, fault = guarded(lambda: report_html(made()))
        return fault or found

    tab.select(show, None, out, **page.on)


def build(gr, args, folder):
    """The whole page as gr.Blocks. folder: see Page."""
    with gr.Blocks(title="Gated BLIP-2", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        page = Page(gr, args, folder)
        with gr.Row(elem_classes="top"):
            page.say(gr.HTML(elem_id="head", padding=False), value=head_html)
            language = page.say(gr.Radio([("English", "en"), ("中文", "zh")], value="zh" if args.lang == "zh" else "en", container=False,
                                         show_label=False, elem_id="language"), label="language")
        page.say(gr.HTML(elem_id="intro", padding=False), value=intro_html)
        with page.say(gr.Tab(id="ask"), label="ask"):
            begin, respeak = ask_tab(page, language)
        for name, fill in (("caption", caption_tab), ("find", find_tab)):
            with page.say(gr.Tab(id=name), label=name) as tab:
                fill(page, tab, language)
        with page.say(gr.Tab(id="errors"), label="errors") as tab:
            errors_tab(page, tab)
        spoken = [component for component, _ in page.spoken]

        def start(request: gr.Request):
            lang = language_of(request.headers.get("accept-language")) if args.lang == "auto" else args.lang
            return [lang, *page.updates(lang)]

        begin(blocks.load(start, None, [language, *spoken], show_progress="hidden", api_visibility="private"))
        respeak(language.input(page.updates, language, spoken, show_progress="hidden", api_visibility="private"))
    return blocks


def main(argv=None):
    args = get_args(argv)
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        gr = import_gradio(folder)
        from starlette.middleware import Middleware
        # of this machine: none is fetched
        fonts = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
        build(gr, args, folder).launch(
            server_name="127.0.0.1", server_port=args.port, share=False, ssr_mode=False, mcp_server=False, pwa=False,
            footer_links=[], max_file_size="64mb", inbrowser=args.open, app_kwargs={"middleware": [Middleware(Policy)]},
            head=f"<style>{STYLE}</style>",  # gradio's css= would put its own selector before each of ours
            theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]))


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
