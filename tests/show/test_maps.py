"""maps.py: each map against an independent computation of the same thing, hooks that leave nothing behind, figures that say what
they are."""

import json

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import core
from data import rows
from engine import gate_frames, published
from engine.errors import DataError
from show import maps
from tools import drawing, faithfulness

QUESTION, ANSWER = "How many boats are there?", "two"


@pytest.fixture
def gated(build):
    """A model whose gates are far from the identity."""
    model = build()
    torch.manual_seed(5)
    with torch.no_grad():
        for gate in model.gates:
            for last in (gate.key, gate.value, gate.shift):
                last.weight.normal_(0, 0.05)
                last.bias.normal_(0, 0.3)
    return model


def features_of(model, seed=0, style=True):
    """Random features of one picture; the random tiny tower would make all patches alike."""
    generator = torch.Generator().manual_seed(seed)
    P = (model.image_size // model.vision_model.config.patch_size) ** 2 + 1
    embeds = torch.randn(1, P, model.vision_model.config.hidden_size, generator=generator)
    width = model.efficientnet.width if style and model.efficientnet else 0
    return {"image_embeds": embeds, "style_feature": torch.randn(1, width, generator=generator) if width else None}


def loud(model):
    """The same model with a Q-Former that makes something of what it sees: at its random start all answers are nearly alike."""
    torch.manual_seed(2)
    with torch.no_grad():
        model.language_projection.weight.normal_(0, 0.3)
        for attention in model._cross_attentions():
            for name in ("query", "key", "value"):
                attention[name].weight.normal_(0, 0.15)
    return model


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


# --- attention ------------

def test_attention_rows_sum_to_one_and_are_those_of_the_model(gated):
    features, outputs, inputs = features_of(gated), {}, {}
    found = maps.attention_maps(gated, features, QUESTION)
    heads, Q, P = gated.gates[0].heads, gated.query_tokens.shape[1], features["image_embeds"].shape[1]
    assert list(found) == gated.qformer.cross_layers and len(found) > 1
    for layer in found.values():
        assert layer.shape == (heads, Q, P) and (layer >= 0).all()
        np.testing.assert_allclose(layer.sum(-1), 1, atol=1e-5)

    def keep_output(layer, linear, args):
        outputs[layer] = args[0]

    def keep_input(layer, module, args, kwargs):
        inputs[layer] = module, args[0], args[1], kwargs["gate"]

    with torch.no_grad(), maps.hooked(gated, keep_input, keep_output):
        maps.visual_prompt(gated, features, QUESTION, "", True)
    for layer, (module, x, source, gate) in inputs.items():
        with torch.no_grad():
            attention, values = maps.attention_of(module, x, source, gate=gate)
        torch.testing.assert_close((attention @ values).transpose(1, 2).flatten(2), outputs[layer], atol=1e-5, rtol=1e-4)
        np.testing.assert_array_equal(found[layer], attention[0].numpy())


def test_mean_map_leaves_cls_out_and_says_its_share():
    layers = {0: np.zeros((2, 3, 5), np.float32), 4: np.zeros((2, 3, 5), np.float32)}
    layers[0][..., 0], layers[0][..., 3], layers[4][..., 2] = 0.4, 0.6, 1.0
    heat, on_cls = maps.mean_map(layers)
    np.testing.assert_allclose(heat, [[0, 0.5], [0.3, 0]], atol=1e-6)
    assert on_cls == pytest.approx(0.2)


def test_gates_on_is_gates_off_at_the_identity_and_not_after(build, gated):
    fresh = build()
    features = features_of(fresh)
    for model, same in ((fresh, True), (gated, False)):
        on, off = (maps.attention_maps(model, features, QUESTION, gated=gated_now) for gated_now in (True, False))
        assert all((on[layer] == off[layer]).all() for layer in on) == same
    panels = maps.explain(fresh, features, QUESTION, ANSWER)
    assert (panels.attention == panels.closed).all()
    assert (panels.gates.key == 1).all() and (panels.gates.value == 1).all() and (panels.gates.shift == 0).all()


def test_only_open_gates_let_the_question_turn_the_attention(gated):
    features = features_of(gated)
    for gates_on in (True, False):
        one, other, context = (maps.attention_maps(gated, features, *asked, gated=gates_on)[0] for asked in
                               ((QUESTION,), ("Which style is this?",), (QUESTION, "Painted by the sea.")))
        assert ((one == other).all(), (one == context).all()) == (not gates_on, not gates_on)


def test_a_question_of_its_own_length_gives_what_forward_uses(gated):
    """Left-padded or alone, on the way of prediction or of training: the same gates."""
    features = features_of(gated)
    batch = core.encode_training(gated.tokenizer, [QUESTION], [ANSWER])
    direct = gate_frames.gate_rows(gated, features["style_feature"], batch["input_ids"], batch["prompt_mask"])[0]
    found = maps.gate_values(gated, features, QUESTION)
    np.testing.assert_allclose([found.key, found.value], direct, rtol=1e-5)


# --- hooks ------------

def test_hooks_leave_nothing_behind(gated):
    features, pixels = features_of(gated), torch.randn(1, 3, gated.image_size, gated.image_size)
    before = gated.confidence([QUESTION], [ANSWER], **features)
    found = maps.explain(gated, features, QUESTION, ANSWER, pixels=pixels)
    assert hooks_of(gated) == 0 and found.tower is not None
    assert torch.equal(gated.confidence([QUESTION], [ANSWER], **features), before)
    assert all(parameter.grad is None for parameter in gated.parameters())


@pytest.mark.parametrize("part", ["occlusion", "tower_occlusion", "attention_maps", "gradient_map"])
def test_no_hook_is_left_after_a_failure(gated, monkeypatch, part):
    features, seen = features_of(gated), []

    def fail(*args, **kwargs):
        seen.append(hooks_of(gated))
        raise KeyError("planned")

    monkeypatch.setattr(gated.qformer.encoder.layer[-1].attention, "forward", fail)
    calls = {"occlusion": lambda: maps.occlusion(gated, features, QUESTION, ANSWER),
             "tower_occlusion": lambda: maps.tower_occlusion(gated, torch.zeros(1, 3, gated.image_size, gated.image_size),
                                                             features, QUESTION, ANSWER),
             "attention_maps": lambda: maps.attention_maps(gated, features, QUESTION),
             "gradient_map": lambda: maps.gradient_map(gated, features, QUESTION, ANSWER)}
    with pytest.raises(KeyError, match="planned"):
        calls[part]()
    assert hooks_of(gated) == 0 and (seen[0] > 0 or part == "tower_occlusion")  # there the tower's hook is gone by then


def test_the_towers_hook_is_gone_after_a_failure_in_the_tower(gated, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("planned")

    monkeypatch.setattr(gated.vision_model.encoder, "forward", fail)
    with pytest.raises(KeyError, match="planned"):
        maps.tower_occlusion(gated, torch.zeros(1, 3, gated.image_size, gated.image_size), features_of(gated), QUESTION, ANSWER)
    assert hooks_of(gated) == 0


def test_a_model_in_training_is_refused(gated):
    gated.train()
    with pytest.raises(RuntimeError, match="eval"):
        maps.attention_maps(gated, features_of(gated), QUESTION)


# --- occlusion ------------

def falls_by_hand(model, features, window, context=""):
    """The fall without each window, its K and V left out of the sequence; and the mean over the windows that hold a patch."""
    side = maps.side_of(features)
    full = model.confidence([QUESTION], [ANSWER], **features, contexts=[context]).item()
    sums, counts = np.zeros((side, side)), np.zeros((side, side))
    for down in range(side - window + 1):
        for across in range(side - window + 1):
            dropped = {1 + y * side + x for y in range(down, down + window) for x in range(across, across + window)}
            kept = [p for p in range(side * side + 1) if p not in dropped]
            without = {**features, "image_embeds": features["image_embeds"][:, kept]}
            fall = full - model.confidence([QUESTION], [ANSWER], **without, contexts=[context]).item()
            sums[down:down + window, across:across + window] += fall
            counts[down:down + window, across:across + window] += 1
    return sums / counts


@pytest.mark.parametrize("window, context", [(1, "On the sea."), (3, "")])
def test_occlusion_is_the_model_without_these_keys_and_values(gated, window, context):
    model = loud(gated)
    features = features_of(model)
    by_hand = falls_by_hand(model, features, window, context)
    assert by_hand.std() > 1e-4
    found = maps.occlusion(model, features, QUESTION, ANSWER, context, window=window)
    np.testing.assert_allclose(found, by_hand, atol=2e-5)
    assert not np.allclose(found, found.T, atol=1e-4)


def test_chunks_change_nothing(gated):
    model = loud(gated)
    features, pixels = features_of(model), torch.randn(1, 3, model.image_size, model.image_size)
    asked = (features, QUESTION, ANSWER)
    one, all_at_once = (maps.occlusion(model, *asked, chunk=chunk) for chunk in (7, 1000))
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)
    one, all_at_once = (maps.tower_occlusion(model, pixels, *asked, chunk=chunk) for chunk in (7, 1000))
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)


def only_one_patch(build, place):
    """A model without gates that attends everywhere alike, and features of which only the patch number `place` holds anything."""
    model = loud(build(gating="none"))
    with torch.no_grad():
        for attention in model._cross_attentions():
            attention["key"].weight.zero_()
            attention["value"].bias.zero_()
    features = features_of(model, style=False)
    features["image_embeds"][:, [p for p in range(features["image_embeds"].shape[1]) if p != 1 + place]] = 0
    return model, features


def test_an_answer_that_rests_on_one_patch_has_its_maximum_there(build):
    place = 19
    model, features = only_one_patch(build, place)
    without = {**features, "image_embeds": torch.zeros_like(features["image_embeds"])}
    answers = ["one", "two", "three", "red", "blue", "a boat"]
    gains = [model.confidence([QUESTION], [a], **features) - model.confidence([QUESTION], [a], **without) for a in answers]
    answer = answers[int(torch.cat(gains).argmax())]
    heat = maps.occlusion(model, features, QUESTION, answer, window=1)
    assert heat.argmax() == place and heat.flat[place] == pytest.approx(max(gains).item(), abs=1e-4)
    assert np.delete(heat, place).max() < 0.1 * heat.max()
    gradient = maps.gradient_map(model, features, QUESTION, answer)
    assert gradient.flat[place] > 0 and (np.delete(gradient, place) == 0).all()


def test_tower_occlusion_is_the_tower_without_these_patches(gated):
    model = loud(gated)
    pixels = torch.randn(1, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(4))
    features, side = {**features_of(model), "image_embeds": model.vision_model(pixel_values=pixels).last_hidden_state}, 8
    found = maps.tower_occlusion(model, pixels, features, QUESTION, ANSWER, window=1)
    full = model.confidence([QUESTION], [ANSWER], **features).item()
    for patch in (0, 9, 63):
        kept = [p for p in range(side * side + 1) if p != 1 + patch]
        with torch.no_grad():
            states = model.vision_model.encoder(inputs_embeds=model.vision_model.embeddings(pixels)[:, kept]).last_hidden_state
            embeds = model.vision_model.post_layernorm(states)
        without = model.confidence([QUESTION], [ANSWER], **{**features, "image_embeds": embeds}).item()
        assert found.flat[patch] == pytest.approx(full - without, abs=2e-5)
    assert np.ptp(found) > 1e-4
    changed = pixels.clone()
    changed[..., :7, 7:14] += 3  # patch 1 looks different, and its absence is the same
    other_full = model.vision_model(pixel_values=changed).last_hidden_state
    shift = model.confidence([QUESTION], [ANSWER], **{**features, "image_embeds": other_full}).item() - full
    other = maps.tower_occlusion(model, changed, features, QUESTION, ANSWER, window=1)
    assert abs(shift) > 1e-4 and other[0, 1] - found[0, 1] == pytest.approx(shift, abs=2e-5)


def test_tower_occlusion_needs_the_tower(gated):
    gated.vision_model, features = None, features_of(gated)
    with pytest.raises(RuntimeError, match="vision tower"):
        maps.tower_occlusion(gated, torch.zeros(1, 3, gated.image_size, gated.image_size), features, QUESTION, ANSWER)


def test_windows_cover_all_patches_and_are_averaged():
    assert maps.windows(3, 1).int().tolist() == np.eye(9, dtype=int).tolist()
    two = maps.windows(3, 2)
    assert two.shape == (4, 9) and two.sum(1).tolist() == [4] * 4 and two.sum(0).tolist() == [1, 2, 1, 2, 4, 2, 1, 2, 1]
    important = torch.zeros(9)
    important[2] = 1.0  # upper right
    heat = maps.mean_falls(3, 2, 3, lambda dropped: 5 - dropped.float() @ important)
    np.testing.assert_allclose(heat, [[0, 0.5, 1], [0, 0.25, 0.5], [0, 0, 0]])
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="window"):
            maps.windows(3, wrong)
    assert [maps.usual_window(side) for side in (2, 8, 16, 24)] == [1, 1, 2, 3]


def test_patches_that_are_no_square_are_refused(gated):
    features = {**features_of(gated), "image_embeds": torch.zeros(1, 61, 64)}
    with pytest.raises(ValueError, match="no square"):
        maps.occlusion(gated, features, QUESTION, ANSWER)


# --- gradient ------------

def test_gradient_map_is_the_gradient_of_a_factor_on_the_attention(gated):
    """By another way: the layer's output built from attention times a leaf of ones, whose gradient is attention x gradient."""
    model, leaves = loud(gated), {}
    features = features_of(model)

    def rebuilt(layer, module, args, kwargs, output):
        attention, values = maps.attention_of(module, *args, **kwargs)
        leaves[layer] = torch.ones_like(attention, requires_grad=True)
        out = ((attention * leaves[layer]) @ values).transpose(1, 2).flatten(2)
        return module.output.LayerNorm(module.output.dense(out) + args[0])

    handles = [model.qformer.encoder.layer[i].crossattention.register_forward_hook(
        lambda *call, i=i: rebuilt(i, *call), with_kwargs=True) for i in model.qformer.cross_layers]
    batch = core.encode_training(model.tokenizer, [QUESTION], [ANSWER])
    (-model(**batch, **features)["loss"]).backward()
    for handle in handles:
        handle.remove()
    wanted = sum(leaf.grad.clamp(min=0).mean(1).sum((0, 1)) for leaf in leaves.values())[1:].view(8, 8).numpy()
    found = maps.gradient_map(model, features, QUESTION, ANSWER)
    assert wanted.max() > 1e-5
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-7)


def test_gradient_map_is_zero_where_nobody_looks_and_works_within_no_grad(gated):
    model = loud(gated)
    features, hidden = features_of(model), torch.zeros(1, 64, dtype=torch.bool)
    hidden[0, 10:30] = True
    mask = core.padding_mask(~hidden, queries=1)
    with torch.no_grad(), maps.hooked(model, before_attention=lambda layer, module, args, kwargs: (args, {**kwargs, "mask": mask})):
        heat = maps.gradient_map(model, features, QUESTION, ANSWER)
    assert np.isfinite(heat).all() and (heat >= 0).all()
    assert (heat.flat[10:30] == 0).all() and (np.delete(heat, np.s_[10:30]) > 0).any()


def test_gradient_map_knows_the_answer(gated):
    model = loud(gated)
    features = features_of(model)
    assert not np.allclose(*(maps.gradient_map(model, features, QUESTION, answer) for answer in ("two", "blue")))


# --- gate values ------------

@pytest.mark.parametrize("kind, per", [("film", "head"), ("film", "channel"), ("gate", "head"), ("gate", "channel")])
def test_gate_values_by_hand(build, kind, per):
    model = build(gating=kind, per=per)
    torch.manual_seed(5)
    with torch.no_grad():
        for gate in model.gates:
            for last in map(gate.get_submodule, gate.learned):
                last.bias.normal_(0, 0.5)  # the weights stay 0: the gate is its bias
    found, heads = maps.gate_values(model, features_of(model), QUESTION), model.gates[0].heads
    for number, gate in enumerate(model.gates):
        of = {name: getattr(gate, name).bias.detach().view(heads, -1) for name in ("key", "value")}
        opened = (lambda x: 2 * torch.sigmoid(x)) if kind == "gate" else (lambda x: 1 + x)
        np.testing.assert_allclose(found.key[number], opened(of["key"]).mean(1), rtol=1e-5)
        np.testing.assert_allclose(found.value[number], opened(of["value"]).mean(1), rtol=1e-5)
        shift = gate.shift.bias.detach().view(heads, -1).mean(1) if kind == "film" else torch.zeros(heads)
        np.testing.assert_allclose(found.shift[number], shift, rtol=1e-5, atol=1e-7)
    assert found.key.shape == found.shift.shape == (len(model.gates), heads)


def test_gate_summary_by_hand():
    gates = [[[[1.0, 3.0]], [[0.5, 0.5]]], [[[2.0, 5.0]], [[0.5, 1.5]]], [[[7.0, 8.0]], [[9.0, 9.0]]]]  # [3 rows][2][1 layer][2 heads]
    summary = gate_frames.gate_summary(gates, ["Cubism", " Cubism ", ""], [4])
    assert summary == {"layers": [4], "styles": {
        "(none)": {"n": 1, "key": {"mean": [[7.0, 8.0]], "std": [[0.0, 0.0]]}, "value": {"mean": [[9.0, 9.0]], "std": [[0.0, 0.0]]}},
        "Cubism": {"n": 2, "key": {"mean": [[1.5, 4.0]], "std": [[0.5, 1.0]]}, "value": {"mean": [[0.5, 1.0]], "std": [[0.0, 0.5]]}}}}
    assert json.loads(json.dumps(summary)) == summary


def test_summarize_gates_takes_the_style_of_each_row(gated, build):
    class Row:
        def __init__(self, style):
            self.style = style

    row_gates = [[[[float(k)] * 2] * 3] * 2 for k in (1, 2)]
    found = [{"row": 1, "gates": row_gates[0]}, {"row": 0, "gates": row_gates[1]}]
    summary = gate_frames.summarize_gates(gated, found, [Row("Pop Art"), Row("Cubism")])
    assert summary["styles"]["Cubism"]["key"]["mean"] == [[1.0] * 2] * 3 and summary["styles"]["Pop Art"]["key"]["mean"] == [[2.0] * 2] * 3
    assert summary["layers"] == gated.qformer.cross_layers
    assert gate_frames.summarize_gates(build(gating="none"), found, []) is None


# --- frames ------------

def summary_of(value, styles=("Cubism", "Pop $Art$")):
    grid = np.full((3, 4), value)
    return {"layers": [0, 2, 4], "styles": {style: {"n": 3, **{part: {"mean": (grid + 0.1 * i).tolist(), "std": (0 * grid + 0.05).tolist()}
                                                             for part in ("key", "value")}} for i, style in enumerate(styles)}}


def test_frames_are_kept_in_order_and_written_again_after_resume(tmp_path):
    path = tmp_path / "gates.json"
    assert gate_frames.read_frames(path) == []
    for step, value in ((10, 1.1), (20, 1.2), (30, 1.3), (20, 1.5)):
        frames = gate_frames.append_frame(path, step, summary_of(value))
    assert [frame["step"] for frame in frames] == [10, 20] and frames == gate_frames.read_frames(path)
    assert frames[1]["styles"]["Cubism"]["key"]["mean"][0][0] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["gates.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"frames": [{}]}', '{"frames": 3}',
                                     '{"frames": [{"step": 1, "layers": [0], "styles": []}]}',
                                     '{"frames": [{"step": 1, "layers": [0, 2], '
                                     '"styles": {"a": {"key": {"mean": [[1]], "std": [[0]]}}}}]}'])
def test_another_file_in_the_place_of_gates_json_is_an_error_with_its_name(tmp_path, content):
    path = tmp_path / "gates.json"
    path.write_text(content)
    with pytest.raises(DataError, match="gates.json: not a gates.json of this project"):
        gate_frames.append_frame(path, 5, summary_of(1))
    assert path.read_text() == content


def test_skyline_opens_from_the_identity(tmp_path, monkeypatch):
    frames = [{"step": step, **summary_of(value)} for step, value in ((10, 1.2), (20, 0.6), (30, 1.0))]
    frames[1]["styles"]["Cubism"]["value"]["mean"][2][1] = 2.9
    shown, draw = [], maps.draw_skyline

    def recorded(frame, top):
        shown.append((frame, top))
        return draw(frame, top)

    monkeypatch.setattr(maps, "draw_skyline", recorded)
    maps.skyline(frames, tmp_path / "gates.png", tmp_path / "gates.gif")
    first = shown[1][0]
    assert [frame["step"] for frame, _ in shown] == [30, 0, 10, 20, 30]
    for _, top in shown:  # one scale for all frames, for each layer its own
        np.testing.assert_allclose(top, [1.1 * 0.45, 1.1 * 0.45, 1.1 * 1.95])  # |0.6 - 1| + 0.05, |2.9 - 1| + 0.05
    for style in first["styles"].values():
        for part in ("key", "value"):
            assert (np.array(style[part]["mean"]) == 1).all() and (np.array(style[part]["std"]) == 0).all()
            assert np.shape(style[part]["mean"]) == (3, 4)
    assert frames[0]["styles"]["Cubism"]["key"]["mean"][0][0] == 1.2  # what came in is left as it was
    with Image.open(tmp_path / "gates.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0
        pages = []
        for number in range(4):
            gif.seek(number)
            pages.append(np.asarray(gif.convert("RGB"), dtype=int))
    assert all(np.abs(a - b).max() > 100 for a, b in zip(pages, pages[1:]))
    assert Image.open(tmp_path / "gates.png").size[0] == 900  # as wide as README shows it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gates.gif", "gates.png"]


def test_skyline_bars_are_the_numbers(tmp_path):
    summary = summary_of(1.2)
    summary["styles"]["Cubism"]["value"]["mean"][1][2] = 0.7
    figure = maps.draw_skyline({"step": 7, **summary}, [0.3, 0.5, 0.4])
    axis = figure.axes[3 + 1]  # layer 2, V, below the three layers of K
    bars, spread = (lines.get_segments() for lines in axis.collections)
    assert len(bars) == len(spread) == 8  # 2 styles x 4 heads
    np.testing.assert_allclose(bars[2][:, 1], [1, 0.7])
    np.testing.assert_allclose(spread[2][:, 1], [0.65, 0.75])
    assert abs(bars[2][0, 0] - 2) < 0.5  # in the block of head 2
    assert axis.get_ylim() == (0.5, 1.5)
    texts = texts_of(figure)
    assert {f"{part}, layer {layer}" for part in "KV" for layer in (0, 2, 4)} <= set(texts) and any("after step 7" in t for t in texts)
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()]
    assert min(sizes) * maps.DPI / 72 >= 12  # pixels of a page that shows the figure in its own size
    assert any(r"Pop \$Art\$ (3)" in t for t in texts)


def test_skyline_without_gif_and_with_many_styles(tmp_path):
    frames = [{"step": 1, **summary_of(1.0, [f"style {i}" for i in range(28)])}]
    maps.skyline(frames, tmp_path / "gates.png")
    assert [p.name for p in tmp_path.iterdir()] == ["gates.png"]


# --- figures ------------

@pytest.fixture
def figures(monkeypatch):
    """Every figure that would be saved."""
    kept = []
    monkeypatch.setattr(maps, "save", lambda figure, path: kept.append(figure))
    return kept


def panels_of(side=8, **changed):
    rng = np.random.default_rng(0)
    heat = rng.random((side, side)).astype(np.float32)
    gates = core.Gate(1 + rng.normal(size=(3, 8)), 1 + rng.normal(size=(3, 8)), rng.normal(size=(3, 8)))
    return maps.Panels(**{"attention": heat / 70, "on_cls": 0.07, "closed": heat.T / 70, "gradient": heat, "occlusion": heat - 0.5,
                          "tower": 0.2 - heat, "window": 2, "gates": gates, "layers": [0, 2, 4], "precision": "float32", **changed})


PICTURE = Image.new("RGB", (112, 112), (200, 120, 40))


def test_a_figure_says_what_each_map_is(tmp_path, figures):
    maps.draw(tmp_path / "m.png", PICTURE, "How many boats?", "two", panels_of(), truth="three")
    texts = "\n".join(texts_of(figures[0]))
    for said in ("How many boats?", "answer: two   (the table says: three)", maps.NOTICE, "attention, gates on\n(7 % more is on CLS)",
                 "attention, gates off\n(the same for every question)", "attention, gates on minus off",
                 "attention x gradient of the answer",
                 "occlusion in the cross-attention, 2 x 2 patches\n(evidence", "occlusion in the picture, 2 x 2 patches\n(evidence",
                 "scale on K (1: no change)", "scale on V (1: no change)", "shift on V (0: no change)", "layer 4", "percentage points",
                 "% of a query's attention", "fall of the answer's log-probability, nats", "positive part, nats"):
        assert said in texts, said
    assert "absent" not in texts and "no font" not in texts and "rounding" not in texts


def test_what_is_not_there_says_so(tmp_path, figures):
    maps.draw(tmp_path / "m.png", PICTURE, "How many?", "", panels_of(closed=None, gates=None, tower=None, window=1, precision="bfloat16"))
    texts = "\n".join(texts_of(figures[0]))
    for said in ("answer: (empty)", "attention with gates off:\nabsent, this model has no gates", "what the gates change:\nabsent",
                 "no gate values: this model has no gates", "occlusion in the picture:\nabsent", "cross-attention, one patch",
                 "ran in bfloat16: falls\nbelow about 0.03 nats are rounding"):
        assert said in texts, said
    assert "scale on K" not in texts and "gates on" not in texts and "the table says" not in texts


def test_without_gates_there_is_all_the_rest(build, tmp_path):
    model = build(gating="none")
    pixels = torch.randn(1, 3, model.image_size, model.image_size)
    panels = maps.explain(model, model.image_features(pixels), QUESTION, ANSWER, pixels=pixels)
    assert panels.closed is None and panels.gates is None and panels.precision == "float32"
    for heat in (panels.attention, panels.gradient, panels.occlusion, panels.tower):
        assert heat.shape == (8, 8) and np.isfinite(heat).all()
    maps.draw(tmp_path / "m.png", rows.tensor_image(pixels[0]), QUESTION, ANSWER, panels)


def test_the_first_rows_of_a_table_from_pictures_or_a_cache(gated, sample, tmp_path, monkeypatch):
    model, drawn = loud(gated), []
    questions = rows.read_layout(str(sample), "val")[0]
    pixels = rows.picture_tensor(questions[0].image, model.image_size)
    cached = {name: x[0] for name, x in model.image_features(pixels[None]).items()}
    monkeypatch.setattr(maps, "draw", lambda *args: drawn.append(args))
    answers = ["red", "two", "never"]
    paths = maps.draw_rows(model, questions, answers, 2, tmp_path)
    model.vision_model = None
    maps.draw_rows(model, questions, answers, 2, tmp_path, {questions[0].image: cached, questions[1].image: cached})
    assert paths == [tmp_path / "001.png", tmp_path / "002.png"] and len(drawn) == 4
    for number, (path, picture, question, answer, panels, truth) in enumerate(drawn):
        row = questions[number % 2]
        assert (path, question, answer, truth) == (paths[number % 2], row.question, answers[number % 2], row.answer)
        assert (panels.tower is None) == (number > 1) and picture.size == (model.image_size,) * 2
    assert questions[0].image == questions[1].image  # five questions a picture
    for first, second in zip(drawn[:2], drawn[2:]):
        np.testing.assert_allclose(first[4].occlusion, second[4].occlusion, atol=1e-6)


@pytest.mark.parametrize("text", [r"$\frac{$ ^_ \notacommand {", "这幅画里有几条船？", "a\nb\tc \u0000" + "\u202e" + "x" * 3000])
def test_hostile_text_is_only_text(tmp_path, monkeypatch, text):
    figures, save = [], maps.save
    monkeypatch.setattr(maps, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    maps.draw(tmp_path / "m.png", PICTURE, text, text, panels_of(), truth=text)
    assert Image.open(tmp_path / "m.png").size == (1500, 1000)
    title = next(t for t in figures[0].findobj(Text) if "answer:" in t.get_text())
    assert title.get_clip_on() and not title.get_parse_math()
    assert len(title.get_text()) < 500


def test_a_character_without_a_font_is_owned_up_to(tmp_path, figures):
    maps.draw(tmp_path / "m.png", PICTURE, "plain", "\U0001faa9\U0003134a\U000119a0", panels_of())  # one that is lacking is enough
    assert any("no font on this machine" in t for t in texts_of(figures[0]))


def test_white_is_no_change_and_maps_lie_as_the_picture(tmp_path, figures):
    change = np.zeros((8, 8), np.float32)
    change[1, 6], change[4, 2] = 0.5, -0.25
    white = Image.new("RGB", (112, 112), "white")
    maps.draw(tmp_path / "m.png", white, "?", "!",
              panels_of(occlusion=change, tower=change, attention=0.3 + change / 2, closed=0.3 - change / 2))
    for title in ("occlusion in the cross", "occlusion in the picture", "gates on minus off"):
        axis = next(a for a in figures[0].axes if title in a.get_title())
        drawn = np.asarray(axis.images[0].get_array())
        assert drawn.shape == (112, 112, 3) and (drawn[0, 0] > 0.95).all()
        red, blue = drawn[14 + 7, 6 * 14 + 7], drawn[4 * 14 + 7, 2 * 14 + 7]
        assert red[0] > 2 * red[2] and blue[2] > 1.3 * blue[0]


# --- faithfulness ------------

def test_mass_inside_counts_the_positive_part():
    cover = np.array([[1.0, 0.5], [0, 0]])
    assert faithfulness.mass_inside(np.array([[2.0, 2.0], [0, -9.0]]), cover) == pytest.approx(0.75)
    assert faithfulness.mass_inside(np.ones((2, 2)), cover) == pytest.approx(cover.mean())
    assert np.isnan(faithfulness.mass_inside(-np.ones((2, 2)), cover))


def test_shares_by_hand():
    upper, lower = np.array([[1.0, 1.0], [0, 0]]), np.array([[0, 0], [1.0, 0]])
    scenes = [faithfulness.Scene(None, cover, "?", "!", kind) for cover, kind in ((upper, "what"), (lower, "count"), (lower, "colour"))]
    heats = [np.array([[3.0, 0], [1, 0]]), np.array([[0, 1.0], [3, 0]]), -np.ones((2, 2))]
    found = faithfulness.shares(heats, scenes, np.array([True, False, True]))
    assert found["n"] == 2 and found["inside"] == pytest.approx(0.75) and found["error"] == 0
    assert found["chance"] == pytest.approx(1 / 3) and found["above"] == 1.0 and found["peak"] == pytest.approx(2 / 3)
    assert found["elsewhere"] == pytest.approx((0.25 + 0.75) / 2)  # the first on the second's things, the second on the third's
    wide = faithfulness.Scene(None, np.array([[1.0, 1.0], [1.0, 0]]), "?", "!", "count")  # 0.6 lies inside, chance is 0.75
    mixed = faithfulness.shares([heats[0], np.array([[0.6, 0], [0, 0.4]]), heats[1]], [scenes[0], wide, scenes[1]], np.ones(3, bool))
    assert mixed["above"] == pytest.approx(2 / 3) and mixed["chance"] == pytest.approx(0.5)
    assert found["right"] == found["what"] == found["count"] == pytest.approx(0.75) and np.isnan(found["colour"])


def test_the_things_are_where_the_scene_says():
    for index in range(3):
        scene = faithfulness.drawn_scene(index, 112, 8)
        assert scene.kind == faithfulness.KINDS[index] and scene.pixels.shape == (3, 112, 112)
        assert 0.03 < scene.cover.mean() < 0.5 and scene.cover.max() <= 1
    rng = np.random.default_rng([0, 99_000_000 + 2])
    drawn = drawing.random_scene(rng)
    by_hand = drawing.set_stage(drawn, 112, np.random.default_rng(0)).mask.reshape(8, 14, 8, 14).mean((1, 3))
    np.testing.assert_allclose(scene.cover, by_hand, atol=0.08)
    assert np.corrcoef(scene.cover.ravel(), by_hand.ravel())[0, 1] > 0.99
    assert scene.answer == drawn["colour"]
    assert not torch.equal(scene.pixels, faithfulness.drawn_scene(2, 112, 8, seed=1).pixels)


def test_faithfulness_gives_a_row_a_map(build, capsys):
    table = faithfulness.faithfulness(build(gating="none"), pictures=2, sizes=(2, 4))
    assert [row["map"] for row in table] == ["attention", "attention x gradient"] + [
        f"occlusion, {kind}, {n} x {n}" for kind in ("cross-attention", "picture") for n in (2, 4)]
    assert all(0 <= row["inside"] <= 1 and row["chance"] == table[0]["chance"] for row in table)
    faithfulness.print_faithfulness(table)
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_what_the_tower_never_sees_is_missed_most_on_the_things():
    model = core.Blip2OPTGated.build(published.tiny("blip2"), None, [], gating="none").eval()
    scenes = [faithfulness.drawn_scene(index, model.image_size, 8) for index in range(6)]
    heats = []
    for scene in scenes:
        pixels = scene.pixels[None]
        heats.append(maps.tower_occlusion(model, pixels, model.image_features(pixels), scene.question, scene.answer))
    found = faithfulness.shares(heats, scenes, np.ones(6, bool))
    assert found["inside"] > 1.5 * found["chance"] and found["inside"] > 1.3 * found["elsewhere"]
