"""maps.py: pictures of what a Blip2OPTGated looks at, and of what its answer rests on.

    attention_maps, mean_map      where the queries look: description, not evidence
    gradient_map                  attention weighted by the gradient of the answer: a first-order guess
    occlusion                     how far the answer falls when the queries cannot look at a patch: evidence of what they read
    tower_occlusion               the same with a patch that the vision tower never sees: evidence of what in the picture counts
    gate_values                   what the gates do to each layer and head
    explain, draw, draw_rows      all of it for one question, as one figure; for the first questions of a table
    skyline                       the gates by style, one frame an evaluation (engine/gate_frames.py), as PNG and GIF
    draw_run                      both into the maps/ of a run

Do they point at what a question is about? tools/faithfulness.py asks that of drawn scenes.

features is what Blip2OPTGated.image_features gives for one picture, or a cache: image_embeds [1,P,W], style_feature [1,F] (None
without gates). Of its P positions CLS (and registers), where the tower has them, stand first and for no place in the picture, and are
on no map; the rest are side x side patches, row by row. Maps are numpy arrays of float32.

The model itself is not changed: its modules are watched through hooks, which are gone when a function returns or fails.
"""

import contextlib
import math
import pathlib
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image

import core
from data import rows
from engine import files, fonts, gate_frames, vision
from show import gallery

GUIDE = """Attention and the difference: shares of the
softmax, mean over layers, heads and queries.

Gradient: attention times the slope of the
answer, positive part.

Occlusion: the answer is scored again without
the patch. Red: it gets less likely without it,
blue: more likely. Small numbers: the answer
does not rest on that place."""
ROUNDING = """

The language model ran in {}: falls
below about 0.03 nats are rounding."""  # up to 0.029 between bfloat16 and float32 on the tiny model
SKYLINE, DPI = 900, 100  # pixels across, so that the letters are read where a page shows it no wider
NOTICE = "attention shows where the queries look, not why; occlusion is evidence"


# --- watching the cross-attention ------------

@contextlib.contextmanager
def hooked(model, before_attention=None, before_output=None):
    """Run a hook in every layer that looks at the image, for as long as the block lasts.

    before_attention(layer, module, given, named) sees what the cross-attention is called with,
    before_output(layer, linear, given) what its last Linear is called with, [B,Q,H]; what they return takes the place of it
    (None: unchanged)."""
    if model.training:
        raise RuntimeError("call model.eval() before drawing maps: dropout would change them")
    with contextlib.ExitStack() as hooks:
        for layer in model.qformer.cross_layers:
            module = model.qformer.encoder.layer[layer].crossattention
            if before_attention:
                hooks.enter_context(module.register_forward_pre_hook(partial(before_attention, layer), with_kwargs=True))
            if before_output:
                hooks.enter_context(module.output.dense.register_forward_pre_hook(partial(before_output, layer)))
        yield


def attention_of(module, x, source, mask=None, gate=None):
    """The softmax that QFormerAttention.forward leaves to torch's kernel, and the values it averages.

    x [B,Q,H], source [B,P,W], gate a Gate or None -> attention [B,heads,Q,P] in float32, values [B,heads,P,H/heads]."""
    q, k, v = (module.attention[name](s).unflatten(-1, (module.heads, -1)).transpose(1, 2)  # [B,heads,Q or P,H/heads]
               for name, s in (("query", x), ("key", source), ("value", source)))
    if gate is not None:
        k, v = k * gate.key, v * gate.value + gate.shift
    logits = (q.float() @ k.float().transpose(2, 3)) / math.sqrt(q.shape[-1])  # [B,heads,Q,P]
    return (logits if mask is None else logits + mask).softmax(-1), v.float()


def side_of(features):
    """Patches along a side. ValueError where they are no square."""
    return vision.patch_grid(features["image_embeds"].shape[1])[1]


def repeated(features, count):
    """The features of one picture for a batch of `count`; nothing is copied."""
    return {name: None if x is None else x.expand(count, *x.shape[1:]) for name, x in features.items()}


def visual_prompt(model, features, question, context, gated):
    """Run the Q-Former for one question, for the hooks that watch it."""
    batch = send_to_device(core.encode_prompts(model.tokenizer, [question], [context]), features["image_embeds"].device)
    return model.visual_prompt(**features, input_ids=batch["input_ids"], prompt_mask=batch["attention_mask"], gated=gated)


# --- the maps ------------

@torch.no_grad()
def attention_maps(model, features, question, context="", gated=True):
    """Cross-attention for one question -> {layer: [heads,Q,P]}; each row sums to 1, CLS comes first. Of further queries and patches
    (core.WAYS) nothing is told, and with the latter a row sums to less.

    Without gates, or with gated=False, the question changes nothing: BLIP-2's queries never read it, those of --instruct do."""
    found, Q, P = {}, model.query_tokens.shape[1], features["image_embeds"].shape[1]

    def keep(layer, module, given, named):
        found[layer] = attention_of(module, *given, **named)[0][0, :, :Q, -P:].cpu().numpy()

    with hooked(model, before_attention=keep):
        visual_prompt(model, features, question, context, gated)
    return found


def mean_map(attention):
    """{layer: [heads,Q,P]} -> ([side,side], share of CLS and registers): mean over layers, heads and queries; the two sum to 1."""
    mean = np.mean([layer.mean((0, 1)) for layer in attention.values()], 0)  # [P]
    prefix, side = vision.patch_grid(len(mean))
    return mean[prefix:].reshape(side, side), float(mean[:prefix].sum())


def gradient_map(model, features, question, answer, context=""):
    """Attention weighted by the gradient of the answer's mean log-probability per token -> [side,side], 0 or more.

    For each layer the positive part of attention times gradient, averaged over the heads (Chefer et al. 2021, "Generic
    attention-model explainability", equation 5), summed over queries and layers. Their rules that carry relevance on through
    self-attention are left out: the gradient goes through the later layers as it is, and what the vision tower mixes between
    patches before is not undone."""
    side, attention, values, added = side_of(features), {}, {}, {}

    def keep(layer, module, given, named):
        with torch.no_grad():
            attention[layer], values[layer] = attention_of(module, *given, **named)

    def add_leaf(layer, linear, given):
        added[layer] = torch.zeros_like(given[0], requires_grad=True)  # [1,Q,H]; its gradient is that of attention @ values
        return (given[0] + added[layer],)

    batch = core.encode_training(model.tokenizer, [question], [answer], max_answer=64, contexts=[context])
    with torch.enable_grad(), hooked(model, keep, add_leaf):
        loss = model(**send_to_device(batch, features["image_embeds"].device), **features)["loss"]
        gradients = torch.autograd.grad(-loss, list(added.values()))  # of the log-probability; no parameter's grad is touched
    total = 0
    for layer, gradient in zip(added, gradients):
        of_heads = gradient.float().unflatten(-1, (attention[layer].shape[1], -1)).transpose(1, 2)  # [1,heads,Q,H/heads]
        of_attention = of_heads @ values[layer].transpose(2, 3)  # [1,heads,Q,P]
        total = total + (attention[layer] * of_attention).clamp(min=0).mean(1).sum((0, 1))  # [P]
    return total[-side * side:].view(side, side).cpu().numpy()


def windows(side, size):
    """All size x size windows of patches -> bool [(side-size+1)**2, side*side]."""
    if not 1 <= size <= side:
        raise ValueError(f"a window of {size} patches on a side of {side}")
    starts = range(side - size + 1)
    chosen = torch.zeros(len(starts) ** 2, side, side, dtype=torch.bool)
    for number, (down, across) in enumerate((down, across) for down in starts for across in starts):
        chosen[number, down:down + size, across:across + size] = True
    return chosen.flatten(1)


def mean_falls(side, window, chunk, score):
    """The fall of a score without each window of patches, as the mean over the windows that hold a patch -> [side,side].

    score: bool [n,patches], True = dropped -> [n]; chunk: windows at a time. Neighbours are alike, so that one patch alone is
    easily made up for: a larger window shows more of the fall and less of the place."""
    dropped = windows(side, window)  # [N,patches]
    whole = score(torch.zeros_like(dropped[:1]))
    falls = whole.cpu() - torch.cat([score(part).cpu() for part in dropped.split(chunk)])  # [N]
    held = dropped.float()
    return ((falls @ held) / held.sum(0)).view(side, side).numpy()


def usual_window(side):
    """Patches on the side of a window where none is given: an eighth of the picture, one at least."""
    return max(1, side // 8)


@torch.no_grad()
def occlusion(model, features, question, answer, context="", window=None, chunk=32):
    """How far the answer's mean log-probability per token (model.confidence) falls without a patch -> [side,side], in nats.

    A patch is taken out of the softmax of every cross-attention layer: the queries cannot look there, and no grey square is put
    in its place, which would be something to look at itself. Above 0: the patch speaks for the answer. CLS stays, the gates
    keep what the style classifier saw of the whole picture, and the vision tower has told other patches of this one before:
    the map says where the queries read, not where in the picture it was painted (that is tower_occlusion). window, chunk: see
    mean_falls and usual_window. With a language model in half precision, falls below 0.03 nats are rounding."""
    (prefix, side), device = vision.patch_grid(features["image_embeds"].shape[1]), features["image_embeds"].device

    def score(dropped):
        mask = core.padding_mask(~dropped.to(device), queries=prefix)  # [n,1,1,P], CLS is always seen

        def hide(layer, module, given, named):
            further = given[1].shape[1] - mask.shape[-1]  # patches that a way of core.WAYS put before these
            return given, {**named, "mask": torch.nn.functional.pad(mask, (further, 0))}

        with hooked(model, before_attention=hide):
            return scores(model, repeated(features, len(dropped)), question, answer, context)

    return mean_falls(side, window or usual_window(side), chunk, score)


@torch.no_grad()
def tower_occlusion(model, pixels, features, question, answer, context="", window=None, chunk=32):
    """As occlusion, but the patches are left out of what the vision tower reads -> [side,side], in nats.

    Nothing of them reaches CLS or their neighbours; all other patches keep their place. pixels [1,3,h,w]; of the features, the
    style classifier's stays. One pass of the tower for each window."""
    side = side_of(features)
    if model.vision_model is None:
        raise RuntimeError("tower_occlusion needs the vision tower: build the model with it (without a cache)")
    if isinstance(model.vision_model, vision.TimmTower):
        raise RuntimeError("tower_occlusion leaves patches out of what a ViT reads, and a timm tower may be none: see occlusion")

    def score(dropped):
        kept = (~torch.nn.functional.pad(dropped, (1, 0))).nonzero()[:, 1]  # [n*(P-k*k)], CLS is always kept
        kept = kept.view(len(dropped), -1, 1).to(pixels.device)  # [n,P-k*k,1]

        def leave_out(module, given, embeds):  # [1,P,W] -> [n,P-k*k,W]
            return embeds.expand(len(kept), -1, -1).gather(1, kept.expand(-1, -1, embeds.shape[-1]))

        with model.vision_model.embeddings.register_forward_hook(leave_out):
            embeds = model.vision_model(pixel_values=pixels).last_hidden_state
        return scores(model, {**repeated(features, len(dropped)), "image_embeds": embeds}, question, answer, context)

    return mean_falls(side, window or usual_window(side), chunk, score)


def scores(model, features, question, answer, context):
    """model.confidence of one question and answer for each of n variants of the features -> [n]."""
    n = len(features["image_embeds"])
    return model.confidence([question] * n, [answer] * n, contexts=[context] * n, chunk=n, **features)


# --- gate values ------------


def gate_values(model, features, question, context=""):
    """What the gates do for one question -> Gate of arrays [layers,heads] (key and value around 1, shift around 0; a gate per
    channel as the mean over its channels); None without gates."""
    if model.gates is None:
        return None
    batch = send_to_device(core.encode_prompts(model.tokenizer, [question], [context]), features["style_feature"].device)
    found = gate_frames.gate_tensors(model, features["style_feature"], batch["input_ids"], batch["attention_mask"])
    return core.Gate(*(x[0].numpy() for x in found))


# --- one question as a figure ------------

class Panels(NamedTuple):
    """What explain finds and draw shows; what concerns gates is None for a model without any."""
    attention: np.ndarray  # [side,side], gates on
    on_cls: float  # share of the attention that is on CLS and registers
    closed: np.ndarray | None  # attention with the gates off
    gradient: np.ndarray
    occlusion: np.ndarray  # nats
    tower: np.ndarray | None  # tower_occlusion, None without the vision tower and of a timm tower
    window: int
    gates: core.Gate | None  # arrays [layers,heads]
    layers: list
    precision: str  # of the language model, "float32"


def explain(model, features, question, answer, context="", pixels=None, window=None, chunk=32):
    """All maps of one question and answer -> Panels. pixels: [1,3,h,w], or None where the vision tower is not there; of a timm tower
    nothing can be left out, and they are not used."""
    asked = (model, features, question)
    window = window or usual_window(side_of(features))
    attention, on_cls = mean_map(attention_maps(*asked, context))
    closed = None if model.gates is None else mean_map(attention_maps(*asked, context, gated=False))[0]
    tower = None if pixels is None or isinstance(model.vision_model, vision.TimmTower) else tower_occlusion(
        model, pixels, features, question, answer, context, window, chunk)
    return Panels(attention, on_cls, closed, gradient_map(*asked, answer, context),
                  occlusion(*asked, answer, context, window, chunk),
                  tower, window, gate_values(*asked, context), model.qformer.cross_layers,
                  str(model.language_model.get_input_embeddings().weight.dtype).removeprefix("torch."))


def save(figure, path, dpi=DPI):
    """A figure as a whole PNG."""
    with files.whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=dpi)


def span(values, least=1e-6):
    """The largest distance from 0, so that colour bars reach as far on both sides."""
    return max(float(np.abs(values).max()), least)


def overlay(axis, picture, heat, title, label, top, diverging=False):
    """A map over its picture, with a colour bar; diverging: blue below 0, white at 0, red above."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    n = len(heat)
    colours = ScalarMappable(Normalize(-top if diverging else 0, top), "RdBu_r" if diverging else "inferno")
    at = (np.arange(picture.width) * n) // picture.width
    heat = colours.to_rgba(heat[np.ix_(at, at)])[..., :3]  # [h,w,3]
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    axis.imshow(heat * (0.6 + 0.4 * grey) if diverging else 0.4 * grey + 0.6 * heat)  # multiplied: white stays white
    axis.set_title(title, fontsize=10)
    bar = axis.figure.colorbar(colours, cax=axis.inset_axes((1.03, 0, 0.05, 1)), format="%.3g")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def heat_grid(axis, values, layers, centre, title):
    """Gate values, layer x head, in colours around the value that changes nothing."""
    top = span(values - centre, 1e-3)
    drawn = axis.imshow(values, cmap="RdBu_r", vmin=centre - top, vmax=centre + top, aspect="auto")
    axis.set_title(title, fontsize=10)
    axis.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8)
    axis.set_xticks(range(values.shape[1]), range(values.shape[1]), fontsize=8)
    axis.set_xlabel("head", fontsize=8)
    axis.figure.colorbar(drawn, cax=axis.inset_axes((1.03, 0, 0.04, 1)), format="%.4g").ax.tick_params(labelsize=8)


def draw(path, picture, question, answer, panels, truth=""):
    """One PNG: the picture, its maps, the gate values; each title says what the map is, each bar its unit.

    picture: PIL, square, as the model saw it (rows.tensor_image); answer: the one that the maps are about; truth: the answer of
    the table, where there is one; panels: of explain. Texts are shown as they are, never read as mathematics; where no font
    has a character, the figure says so."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox, TransformedBbox
    question, answer, truth = (gallery.wrapped(text, 96, lines) for text, lines in ((question, 2), (answer, 1), (truth, 1)))
    said = f"{question or '(no text)'}\nanswer: {answer or '(empty)'}" + (f"   (the table says: {truth})" if truth else "")
    with fonts.fonts_for(said) as note:
        figure = Figure(figsize=(15, 10), facecolor="white")
        head = TransformedBbox(Bbox([[0.02, 0.905], [0.98, 0.985]]), figure.transFigure)  # wide letters, stacked accents
        figure.text(0.5, 0.945, said, ha="center", va="center", fontsize=13, parse_math=False, clip_on=True, clip_box=head)
        figure.text(0.5, 0.991, note, ha="center", va="center", fontsize=8, color="#666")
        figure.text(0.5, 0.012, NOTICE, ha="center", va="center", fontsize=11, weight="bold")
        grid = figure.add_gridspec(2, 4, left=0.015, right=0.935, top=0.86, bottom=0.265, wspace=0.4, hspace=0.16)
        axes = [figure.add_subplot(cell, xticks=[], yticks=[]) for cell in grid]
        axes[0].imshow(picture)
        axes[0].set_title("the picture, as the model sees it", fontsize=10)
        draw_attention(axes[1:4], picture, panels)
        overlay(axes[4], picture, panels.gradient, "attention x gradient of the answer\n(a first-order guess)",
                "positive part, nats", span(panels.gradient))
        draw_occlusion(axes[5:7], picture, panels)
        axes[7].axis("off")
        guide = GUIDE if panels.precision == "float32" else GUIDE + ROUNDING.format(panels.precision)
        axes[7].text(0, 0.5, guide, va="center", fontsize=9.5, linespacing=1.45, color="#333")
        draw_gates(figure, panels)
        save(figure, path)


def draw_missing(axis, text):
    """A place in the figure whose map this model does not have."""
    axis.axis("off")
    axis.text(0.5, 0.5, text, ha="center", va="center", color="#666")


def draw_attention(axes, picture, panels):
    """Attention with gates on, off and the difference; without gates one map, and the other two places say so."""
    unit, rest = "% of a query's attention", f"({100 * panels.on_cls:.0f} % more is on CLS)"
    if panels.closed is None:
        overlay(axes[0], picture, 100 * panels.attention, f"attention {rest}\nthe same for every question", unit,
                span(100 * panels.attention))
        draw_missing(axes[1], "attention with gates off:\nabsent, this model has no gates")
        draw_missing(axes[2], "what the gates change:\nabsent, this model has no gates")
        return
    top = span(100 * np.stack([panels.attention, panels.closed]))
    overlay(axes[0], picture, 100 * panels.attention, f"attention, gates on\n{rest}", unit, top)
    overlay(axes[1], picture, 100 * panels.closed, "attention, gates off\n(the same for every question)", unit, top)
    change = 100 * (panels.attention - panels.closed)
    overlay(axes[2], picture, change, "attention, gates on minus off\n(where the gates turn the queries)", "percentage points",
            span(change), diverging=True)


def draw_occlusion(axes, picture, panels):
    """Both occlusion maps; the second needs the vision tower and says so where it is absent."""
    size = f"{panels.window} x {panels.window} patches" if panels.window > 1 else "one patch"
    unit = "fall of the answer's log-probability, nats"
    overlay(axes[0], picture, panels.occlusion, f"occlusion in the cross-attention, {size}\n(evidence: what the queries read)",
            unit, span(panels.occlusion), diverging=True)
    if panels.tower is None:
        draw_missing(axes[1], "occlusion in the picture:\nabsent, the vision tower is not\nloaded (a cache), or is timm's")
        return
    overlay(axes[1], picture, panels.tower, f"occlusion in the picture, {size}\n(evidence: what in it counts)", unit,
            span(panels.tower), diverging=True)


def draw_gates(figure, panels):
    """The bottom row: gate values, layer x head."""
    if panels.gates is None:
        figure.text(0.5, 0.13, "no gate values: this model has no gates", ha="center", va="center", color="#666")
        return
    grid = figure.add_gridspec(1, 3, left=0.07, right=0.93, top=0.2, bottom=0.075, wspace=0.42)
    for cell, values, centre, title in zip(grid, panels.gates, (1, 1, 0), ("scale on K (1: no change)", "scale on V (1: no change)",
                                                                         "shift on V (0: no change)")):
        heat_grid(figure.add_subplot(cell), values, panels.layers, centre, title)


def draw_rows(model, questions, predictions, count, folder, features=None):
    """A figure for each of the first `count` questions, of the answer that the model gives itself -> the paths, 001.png and so on.

    questions: rows of rows.py; predictions: their answers; features: None, or those of a cache, by path."""
    paths, device = [], model.query_tokens.device
    for number, (row, answer) in enumerate(zip(questions[:count], predictions), 1):
        pixels = rows.picture_tensor(row.image, model.image_size)  # [3,s,s]
        seen = pixels[None].to(device) if model.vision_model is not None else None
        if features is None:
            found = model.image_features(seen)
        else:
            found = {"style_feature": None, **{name: x[None].to(device) for name, x in features[row.image].items()}}
        panels = explain(model, found, row.question, answer, row.context, seen)
        paths.append(pathlib.Path(folder) / f"{number:03d}.png")
        draw(paths[-1], rows.tensor_image(pixels), row.question, answer, panels, row.answer)
    return paths


# --- the gates by style ------------

def identity_frame(frame):
    """The frame before any training: every gate at 1, without spread."""
    def at(value, part):
        return np.full_like(np.asarray(part["mean"], dtype=float), value).tolist()

    styles = {name: {"n": found["n"],
                     **{part: {"mean": at(1, found[part]), "std": at(0, found[part])} for part in ("key", "value")}}
              for name, found in frame["styles"].items()}
    return {"step": 0, "layers": frame["layers"], "styles": styles}


def reach(frames):
    """The largest distance of a gate from 1 in each layer, its spread included -> [layers]: one scale for all frames."""
    found = [np.abs(np.asarray(style[part]["mean"]) - 1) + np.asarray(style[part]["std"])  # [layers,heads]
             for frame in frames for style in frame["styles"].values() for part in ("key", "value")]
    return 1.1 * np.maximum(1e-3, np.max([values.max(1) for values in found], 0))


def draw_skyline(frame, top):
    """A Figure of SKYLINE pixels a side: for K, then for V, a row a layer, a block a head, in it a bar a style from 1 to the mean gate, a
    thin line its spread.

    top: [layers], how far each layer's scale reaches on both sides of 1."""
    import matplotlib
    from matplotlib.figure import Figure
    names, layers = list(frame["styles"]), frame["layers"]
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "turbo"]
    colours = [palette(i if len(names) <= 10 else i / (len(names) - 1)) for i in range(len(names))]
    legend_rows = -(-len(names) // 4)
    each = 1.25 if len(layers) <= 3 else 0.8  # inches a row
    height = 1.55 + 2 * each * len(layers) + 0.22 * legend_rows
    figure = Figure(figsize=(SKYLINE / DPI, height), facecolor="white")
    axes = figure.subplots(2 * len(layers), 1, sharex=True, squeeze=False, gridspec_kw={
        "left": 0.1, "right": 0.99, "top": 1 - 0.75 / height, "bottom": (0.65 + 0.22 * legend_rows) / height, "hspace": 0.16})[:, 0]
    for number, axis in enumerate(axes):
        part, row = ("key", "value")[number // len(layers)], number % len(layers)
        # [S,layers,heads]
        mean, std = (np.asarray([found[part][kind] for found in frame["styles"].values()]) for kind in ("mean", "std"))
        draw_blocks(axis, mean[:, row], std[:, row], colours, top[row])
        axis.set_ylabel(f"{'K' if part == 'key' else 'V'}, layer {layers[row]}", fontsize=9)
        axis.tick_params(labelsize=9)
    axes[-1].set_xlabel("head", fontsize=10)
    handles = [matplotlib.lines.Line2D([], [], color=colour, linewidth=6) for colour in colours]
    labels = [gallery.wrapped(name, 24, 1).replace("$", r"\$") + f" ({found['n']})" for name, found in frame["styles"].items()]
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9, columnspacing=1.2, handlelength=1.2)
    when = f"after step {frame['step']}" if frame["step"] else "before training: the identity"
    figure.suptitle(f"Mean gate on K and V of each style, by layer and head, {when}\n"
                    "(thin line: one standard deviation over its questions; each layer has its own scale)",
                    fontsize=11, y=1 - 0.12 / height)
    return figure


def draw_blocks(axis, mean, std, colours, top):
    """One layer: mean and std [S,heads]; the ground of a block has the colour of the mean over styles, white = 1."""
    import matplotlib
    S, heads = mean.shape
    ground = matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * (mean.mean(0) - 1) / top)
    axis.bar(np.arange(heads), 2 * top, 0.96, 1 - top, color=ground, alpha=0.35)
    at = np.arange(heads) + ((np.arange(S) + 0.5) / S - 0.5)[:, None] * 0.84  # [S,heads]
    width = max(1.2, min(7.0, 420 / (S * heads)))  # points
    axis.vlines(at, 1, mean, colors=np.repeat(colours, heads, 0), linewidth=width)
    axis.vlines(at, mean - std, mean + std, colors="#333", linewidth=0.25 * width)
    axis.axhline(1, color="#333", linewidth=0.8)
    axis.set_ylim(1 - top, 1 + top)
    axis.set_xlim(-0.55, heads - 0.45)
    axis.set_xticks(range(heads))
    axis.spines[["top", "right"]].set_visible(False)


def skyline(frames, path_png, path_gif=None):
    """The last frame as PNG; all frames as an animated GIF that opens from the identity. frames: of append_frame, at least one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    names = "".join(frames[-1]["styles"])
    top = reach(frames)
    with fonts.fonts_for(names):
        save(draw_skyline(frames[-1], top), path_png)
        if path_gif is None:
            return
        pages = []
        for frame in (identity_frame(frames[0]), *frames):
            canvas = FigureCanvasAgg(draw_skyline(frame, top))
            canvas.figure.set_dpi(DPI)
            canvas.draw()
            pages.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128, dither=Image.Dither.NONE))
    with files.whole_file(path_gif, "wb") as file:
        pages[0].save(file, format="GIF", save_all=True, append_images=pages[1:], loop=0,
                      duration=[900] * (len(pages) - 1) + [3000])


# --- a run's maps/ ------------

def draw_run(model, questions, results, count, folder, features=None):
    """draw_rows into `folder`, maps/ of a run, and the gates by style, which the run left beside it -> the paths, the gates first.

    results: of evaluation.evaluate, with "prediction"; the others: see draw_rows."""
    drawn = draw_rows(model, questions, [one["prediction"] for one in results], count, folder, features)
    print(f"maps of the first {len(drawn)} questions: {folder}")
    frames = gate_frames.read_frames(folder.parent / gate_frames.FILE)
    if frames and model.gates is not None:
        skyline(frames, folder / "gates.png", folder / "gates.gif")
        drawn.insert(0, folder / "gates.png")
    return drawn
