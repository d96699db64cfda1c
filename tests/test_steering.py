"""pytest tests/test_steering.py: every way for style to come in: what it changes, what it trains, and that best.pt alone brings it back."""

import csv
import json

import pytest
import torch

import core
import eval_gated
import train_gated
from engine import checkpoints, comparison, errors, features, files
from show import maps
from tools import compare_gated

ASKED = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 4]]), "prompt_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}


def seen(model, style=0, gated=True, **asked):
    """What the language model sees of two pictures, with the style feature of a draw."""
    generator = torch.Generator().manual_seed(5)
    W, F = model.qformer.config.encoder_hidden_size, model.efficientnet.width
    embeds = torch.randn(2, 6, W, generator=generator)
    feature = torch.randn(2, F, generator=torch.Generator().manual_seed(100 + style))
    with torch.no_grad():
        return model.visual_prompt(embeds, feature, gated=gated, **{**ASKED, **asked})


def moved(model):
    """The model with the last layers away from zero, as after some steps."""
    torch.manual_seed(7)
    with torch.no_grad():
        for part in (model.gates or [], model.ways):
            for parameter in torch.nn.ModuleList(part).parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("settings", [{"gating": name} for name in core.GATES] + [{"gating": "none", "steer": ("fusion",)}], ids=str)
def test_the_identity_at_the_start_to_the_bit(build, settings):
    model = build(**settings)
    assert torch.equal(seen(model), seen(model, gated=False))
    assert not torch.equal(seen(moved(model)), seen(model, gated=False))


@pytest.mark.parametrize("way, tokens", [("soft-prompt", 4), ("patches", 4), ("queries", 4), ("fusion", 4), ("soft-prompt", 1)])
def test_a_way_reads_style_and_question_and_closes(build, way, tokens):
    model = build(gating="none", steer=(way,), control_tokens=tokens)
    assert model.gates is None and model.mapper.tokens == tokens
    closed, start = seen(model, gated=False), seen(model)
    Q, extra = model.query_tokens.shape[1], tokens if way == "soft-prompt" else 0
    assert closed.shape[1] == Q and start.shape[1] == Q + extra  # [B,Q,D], with a soft prompt [B,Q+T,D]
    if way == "soft-prompt":
        assert torch.equal(start[:, :Q], closed) and not start[:, Q:].any()
    assert torch.equal(start, seen(model, style=1)) == (way != "queries")  # all but the queries start with nothing of style
    now = seen(moved(model))
    assert not torch.equal(now, seen(model, style=1)), "another style changes nothing"
    assert not torch.equal(now, seen(model, input_ids=ASKED["input_ids"] + 1)), "another question changes nothing"
    assert torch.equal(seen(model, gated=False), closed)
    assert not model.visual_prompt(torch.zeros(2, 6, 1), None, None, None, blind=True).numel()


def test_ways_join_the_gates_and_each_other(build, batch):
    model = moved(build(steer=("soft-prompt", "patches")))
    together = seen(model)
    ways, model.ways = model.ways, torch.nn.ModuleList()
    gates_alone = seen(model)
    model.ways, model.gates = ways, None
    assert together.shape[1] == model.query_tokens.shape[1] + 4
    assert not torch.allclose(together[:, :-4], gates_alone) and not torch.allclose(together, seen(model))


@pytest.mark.parametrize("settings", [{"gating": "none", "steer": tuple(core.WAYS)}, {"gating": "film-key"}, {"gating": "film-value"},
                                      {"control_from": "style"}], ids=str)
def test_what_is_trained_is_new_and_all_of_it_learns(build, batch, settings):
    """A trained part without a gradient would hang several processes."""
    model = moved(build(**settings, **({} if "gating" in settings else {"gating": "film"}))).train()
    parts = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert parts == {"mapper", "language_projection", "style_head", "ways" if "steer" in settings else "gates"}
    model(**batch, hit_weight=0.1, kl_weight=0.05)["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind, left_alone", [("film-key", ("value", "shift")), ("film-value", ("key",))])
def test_a_gate_on_one_of_them_leaves_the_other_alone(build, kind, left_alone):
    model = moved(build(gating=kind, per="channel"))
    gate = model.gates[0](torch.randn(2, model.qformer.config.hidden_size))
    for name, untouched in zip(core.Gate._fields, (1.0, 1.0, 0.0)):
        found = getattr(gate, name)
        assert found == untouched if name in left_alone else (found != untouched).all(), name


def test_a_mapper_of_style_alone_reads_no_question(build):
    plain, blind = build(), build(control_from="style")
    tokens = [model.control_tokens(torch.ones(2, model.efficientnet.width), ids, ASKED["prompt_mask"])
              for model in (plain, blind) for ids in (ASKED["input_ids"], ASKED["input_ids"] + 1)]
    assert not torch.equal(*tokens[:2]) and torch.equal(*tokens[2:])
    assert not [name for name, _ in blind.mapper.named_parameters() if "text" in name]


def test_what_is_no_way_is_refused(build, tiny):
    with pytest.raises(errors.DataError, match="'gate' is not known here, only soft-prompt, patches"):
        build(gating="none", steer=("gate",))
    with pytest.raises(ValueError, match="style\\+question or style"):
        build(control_from="question")
    with pytest.raises(errors.DataError, match="needs an EfficientNet"):
        core.Blip2OPTGated(*core.load_blip2(tiny[0]), None, (), "none", steer=("fusion",))


def test_best_pt_alone_brings_the_ways_back(flags, few, tiny, tmp_path, capsys):
    train_gated.main(flags("--epochs", "1", "--gating", "none", "--steer", "soft-prompt", "fusion", "--control-tokens", "2",
                           "--control-from", "style"))
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert {name.split(".")[0] for name in best["state"]} == {"ways", "mapper", "language_projection", "style_head"}
    capsys.readouterr()
    eval_gated.main(["--checkpoint", str(tmp_path / "run"), "--workers", "0", "--shuffle-style", "--predictions", str(tmp_path / "p.json"),
                     "--export", str(tmp_path / "exported")])
    printed = capsys.readouterr().out
    assert all(system in printed for system in ("gates closed", "another's style", "steered"))
    card = (tmp_path / "exported/README.md").read_text()
    assert "soft-prompt, fusion" in card and "style classifier" in card
    rows = list(csv.DictReader((tmp_path / "p.csv").open(encoding="utf-8-sig")))
    for place in (tmp_path / "run", tmp_path / "exported"):
        model, processor = core.load_gated(place, blip2=tiny[0], efficientnet=tiny[1])
        assert model.mapper.tokens == 2 and [type(way) for way in model.ways] == [core.SoftPrompt, core.PatchFusion]
        told = model.predict_answers(processor([few / "images" / row["image"] for row in rows[:3]]), [row["question"] for row in rows[:3]])
        assert told == [row["prediction"] for row in rows[:3]]


def test_maps_are_of_the_pictures_own_patches(build):
    model = moved(build(gating="none", steer=("patches", "queries"), control_tokens=3))
    features = {"image_embeds": torch.randn(1, 5, model.qformer.config.encoder_hidden_size),  # CLS and 2 x 2 patches
                "style_feature": torch.randn(1, model.efficientnet.width)}
    attention = maps.attention_maps(model, features, "Which style?")
    closed = maps.attention_maps(model, features, "Which style?", gated=False)
    for layer, found in attention.items():
        assert found.shape == closed[layer].shape == (model.qformer.config.num_attention_heads, model.query_tokens.shape[1], 5)
        assert (found.sum(-1) < 0.99).all() and found.sum(-1).min() > 0.1
    for drawn in (maps.occlusion(model, features, "Which style?", "Cubism"), maps.gradient_map(model, features, "Which style?", "Cubism")):
        assert drawn.shape == (2, 2) and drawn.any()


# --- the label as text ------------

@pytest.fixture
def labels(monkeypatch):
    """The style classifier calls light pictures something else than dark ones."""
    def likeliest_styles(net, images):
        return ["Cubism" if image.mean() > 0 else "Pop Art" for image in images]
    monkeypatch.setattr(features, "likeliest_styles", likeliest_styles)
    monkeypatch.setattr(eval_gated, "likeliest_styles", likeliest_styles)


def test_the_label_stands_before_the_question_in_training_evaluation_and_ask(flags, few, tmp_path, labels, monkeypatch):
    read = []
    encode_training, encode_prompts = core.encode_training, core.encode_prompts

    def reading(encode):
        def encode_and_note(tokenizer, questions, *others, **more):
            contexts = others[2] if encode is encode_training else others[0]
            read.append((encode.__name__, tuple(contexts)))
            return encode(tokenizer, questions, *others, **more)
        return encode_and_note
    monkeypatch.setattr("engine.prompts.encode_training", reading(encode_training))
    monkeypatch.setattr(core, "encode_prompts", reading(encode_prompts))
    train_gated.main(flags("--epochs", "1", "--gating", "none", "--context", "efficientnet"))
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert {name.split(".")[0] for name in best["state"]} == {"language_projection"}
    eval_gated.main(["--checkpoint", str(tmp_path / "run"), "--workers", "0", "--no-baselines"])
    folder = tmp_path / "asked"
    folder.mkdir()
    picture = next((few / "images").iterdir())
    (folder / picture.name).write_bytes(picture.read_bytes())
    eval_gated.main(["--checkpoint", str(tmp_path / "run"), "--workers", "0", "--images", str(folder), "--ask", "Which style?", "--answers",
                     str(tmp_path / "a.csv")])
    assert {"encode_training", "encode_prompts"} == {name for name, _ in read}
    assert {label for _, contexts in read for label in contexts} <= {"Cubism", "Pop Art"} and len(read[-1][1]) == 1


# --- compare_gated.py's table ------------

def test_the_label_as_the_answer_takes_the_technique_from_the_style(few, tiny, labels, tmp_path):
    args, others = compare_gated.get_args(["--systems", compare_gated.LABEL_ANSWER, "--split", "test", "--data", str(few),
                                           "--blip2", tiny[0], "--efficientnet", tiny[1], "--workers", "0"])
    args.out = tmp_path
    hits = [(row["image"], row["question_type"], row["prediction"] == row["answer"])
            for row in comparison.read_predictions(compare_gated.answers_of(args, compare_gated.label_answers(args, others)))]
    styles = {row["image"]: row["style"] for row in csv.DictReader((few / "test.csv").open(encoding="utf-8"))}
    size = core.published.image_size_of(tiny[0])
    label = {name: features.likeliest_styles(None, [core.rows.picture_tensor(few / "images" / name, size)])[0] for name in styles}
    for name, kind, hit in hits:
        if kind in ("style", "technique"):
            assert hit == (label[name] == styles[name]), (name, kind)
    assert len(hits) == 15 and {kind for _, kind, _ in hits} == {"what", "count", "colour", "style", "technique"}


def test_every_system_is_compared_with_the_label_as_text(tmp_path):
    """One column of what is not trained against all seeds of the other; one system is the reference."""
    args, _ = compare_gated.get_args(["--systems", "fair", "--no-probes", "--data", "x"])
    assert args.reference == compare_gated.LABEL in args.systems and not set(args.systems) & set(compare_gated.SYSTEMS)
    with pytest.raises(SystemExit):
        compare_gated.get_args(["--systems", "film on K", "--reference", compare_gated.LABEL])

    def folder(name, style, content):
        (tmp_path / name).mkdir()
        rows = [{"question_id": str(2 * n + m), "image": f"{n}.jpg", "question": "q", "answer": "right", "prediction": right,
                 "question_type": kind, "style": ""} for n in range(8) for m, (kind, right) in enumerate(
                     (("style", style[n % 2]), ("what", content)))]
        place = compare_gated.answers_of(args, tmp_path / name)
        place.write_text(json.dumps([{"question_id": int(row["question_id"]), "answer": row["prediction"]} for row in rows]))
        files.write_csv(place.with_suffix(".csv"), rows)
        return tmp_path / name
    found = compare_gated.differences(args, {
        compare_gated.LABEL: [folder(f"label{n}", ("right", "wrong"), "right") for n in range(2)],
        "film per head": [folder(f"film{n}", ("right", "right"), "right") for n in range(2)],
        compare_gated.LABEL_ANSWER: [folder("answer", ("right", "wrong"), "wrong")]})
    assert found["film per head"]["style"]["ours"].value == 100 and found["film per head"]["style"]["difference"].value == 50
    assert found["film per head"]["content"]["difference"] == (0, 0, 0)
    assert found[compare_gated.LABEL_ANSWER]["content"]["difference"].value == -100


def test_systems_are_built_by_flags_that_are_there():
    for system, flags in compare_gated.FLAGS.items():
        settings = train_gated.get_args(["--data", "x", *flags, *(["--qformer", "y"] if system in compare_gated.INSTRUCT else [])])
        assert set(settings.steer) <= set(core.WAYS) and settings.gating in (*core.GATES, "none"), system
