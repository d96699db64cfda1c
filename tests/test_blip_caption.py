"""pytest tests/test_blip_caption.py: train_blip_caption.py on random tiny weights. Behaviour-checked; its loss is checked against
the original's in test_golden.py."""

import csv
import json
import os
import pickle
import re
import signal
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
import train_blip_caption as blip
from conftest import ROOT
from data import captions, rows
from engine import captioning, checkpoints, errors, loaders, loop, runfolder
from engine import run as engine_run
from engine.errors import DataError
from engine.run import Step
from show import report
from tools import make_tiny
from faults import the_error
from test_pages import draw_here  # noqa: F401
from test_report import Page, check_safe

pytestmark = pytest.mark.usefixtures("draw_here")
COLOURS = {"red": (210, 40, 40), "blue": (40, 80, 210), "green": (40, 160, 60)}
VAL = {"v0.png": ["a red square", "red all over"], "v1.png": "a blue square", "v2.png": "the green <b>square</b>",
       "v3.png": "a red one"}
LONGEST = 10  # tokens of a caption here: its words, and what begins and ends it
TEXTS = ["a red square on the left", "the blue green one is all over"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models here are so small that a second thread costs more than it brings; WordNet may be missing."""
    former, known = torch.get_num_threads(), metrics._wordnet
    torch.set_num_threads(1)
    metrics._wordnet = lambda: None
    metrics._meteor_helpers.cache_clear()
    longest, blip.GENERATION["max_length"] = blip.GENERATION["max_length"], LONGEST  # random weights never end a caption
    yield
    blip.GENERATION["max_length"] = longest
    torch.set_num_threads(former)
    metrics._wordnet = known
    metrics._meteor_helpers.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny BLIP."""
    loop.seed_everything(0)
    return make_tiny.save_random_captioner(tmp_path_factory.mktemp("models"), TEXTS)


def make_data(place):
    """Nine training pictures, one of them with two captions, and four for validation: plain colours."""
    (place / "images").mkdir(parents=True)
    train = {f"t{n}.png": f"a {list(COLOURS)[n % 3]} square{' on the left' * (n % 2)}" for n in range(9)}
    train["t0.png"] = ["a red square", "the red one"]
    for n, name in enumerate([*train, *VAL]):
        pixels = np.random.default_rng(n).integers(0, 40, (24, 24, 3)) + np.array(list(COLOURS.values())[n % 3])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / "images" / name)
    write(place, train=train, val=VAL)
    return place


def write(place, **splits):
    for split, content in splits.items():
        (place / f"{split}_captions.json").write_text(json.dumps(content))


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def flags(data, folder, tmp_path, no_curves):
    """Command line of a short run; add your own after it."""
    def make(*more, out="run"):
        return ["--data", str(data), "--blip", folder, "--epochs", "2", "--batch-size", "4", "--lr", "1e-3", "--vision-lr", "1",
                "--workers", "0", "--precision", "no", "--out", str(tmp_path / out), *more]
    return make


def prepared(args):
    """(Run, Parts) at the first step of a training with these flags."""
    return blip.prepare(args, blip.start(args))


@pytest.fixture
def both(flags):
    return prepared(blip.get_args(flags()))


@pytest.fixture
def run(both):
    """A Run at its first step."""
    return both[0]


@pytest.fixture
def parts(both):
    """The Parts of the very same run."""
    return both[1]


def state_of(path):
    return checkpoints.load_checkpoint(path)["state"]


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- labels ------------

def test_pads_are_masked_and_position_0_is_bos(run, parts):
    batch = parts.collate([parts.train[n] for n in (0, 2)])  # 3 and 6 words
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    text = run.model.config.text_config
    assert ids[:, 0].tolist() == [text.bos_token_id] * 2 and text.bos_token_id >= len(parts.tokenizer)
    assert mask.sum(1).tolist() == [5, 8]
    assert torch.equal(labels == -100, mask == 0) and torch.equal(labels[mask == 1], ids[mask == 1])
    assert ids[0, 4] == text.sep_token_id and ids[0, 5:].tolist() == [text.pad_token_id] * 3
    assert parts.tokenizer.decode(labels[1, 1:7]) == parts.train.texts[2]


def test_pads_of_a_batch_change_neither_loss_nor_captions(run, parts):
    run.model.eval()
    short, both = (parts.collate([parts.train[n] for n in numbers]) for numbers in ((0,), (0, 2)))
    with torch.no_grad():
        alone, beside = (run.model(**{k: v[:1] for k, v in batch.items()}).loss for batch in (short, both))
    assert alone.item() == pytest.approx(beside.item(), abs=1e-5)


def test_smoothing_is_set_whatever_the_library_has(run):
    assert run.model.text_decoder.label_smoothing == 0.1 == run.model.config.text_config.label_smoothing


def test_long_captions_lose_their_end_and_never_end_there(parts):
    ids = captions.token_ids(parts.tokenizer, ["red " * 200, "red"])
    sep = parts.tokenizer.sep_token_id
    assert len(ids[0]) == captions.MAX_LENGTH and ids[0][-1] != sep and ids[1][-1] == sep


def test_validation_loss_is_the_training_loss(run, parts):
    found = blip.evaluate(run.model, parts.tokenizer, parts.val, run.accelerator, blip.GENERATION, 3, 0)
    with torch.no_grad():
        expected = run.model(**parts.collate([parts.val[n] for n in range(4)])).loss.item()
    assert sum(f["loss"] for f in found) / sum(f["tokens"] for f in found) == pytest.approx(expected, abs=1e-5)


def test_confidence_is_the_mean_over_the_captions_tokens_one_at_a_time(run, parts):
    """Its end among them; captions of other lengths in the batch change nothing, and smoothing has no part in it."""
    texts = ["a red square", "blue", ""]
    pixels = torch.stack([parts.val[n][0]["pixel_values"] for n in range(3)])
    found = captioning.confidence(run.model.eval(), parts.tokenizer, pixels, texts)
    for one, text, value in zip(pixels, texts, found.tolist()):
        ids = parts.tokenizer(text).input_ids  # [CLS] ... [SEP]
        with torch.no_grad():
            states = run.model.vision_model(one[None]).last_hidden_state
            logits = run.model.text_decoder(torch.tensor([[parts.collate.bos, *ids[1:]]]), encoder_hidden_states=states).logits[0]
        assert value == pytest.approx(logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].mean().item(), abs=1e-5)
    assert found.std() > 1e-3


# --- what is trained ------------

@pytest.mark.parametrize("layers", [0, 1, 3])
def test_each_parameter_is_in_exactly_one_group(run, flags, layers):
    blip.open_layers(run.model, layers)
    groups = blip.parameter_groups(run.model, blip.get_args(flags("--vision-lr", "0.3", "--weight-decay", "0.2")))
    ids = [id(p) for group in groups for p in group["params"]]
    trained = {id(p): name for name, p in run.model.named_parameters() if p.requires_grad}
    assert len(ids) == len(set(ids)) and set(ids) == set(trained)
    for group in groups:
        assert all((group["scale"] == 0.3) == trained[id(p)].startswith("vision_model.encoder.layers.") for p in group["params"])
        assert all((group["weight_decay"] == 0.2) == (p.ndim > 1) and group["weight_decay"] in (0, 0.2) for p in group["params"])
    opened = {name.split(".")[3] for name in trained.values() if name.startswith("vision_model.")}
    assert opened == {str(2 - n) for n in range(layers)} and all(
        p.requires_grad for p in run.model.text_decoder.parameters())


def test_schedule_opens_more_as_epochs_go_by(flags, tmp_path):
    args = blip.get_args(flags("--unfreeze", "0", "--unfreeze-schedule", "2:1", "4:3"))
    assert [blip.layers_at(args, epoch) for epoch in range(5)] == [0, 1, 1, 3, 3]
    blip.main(flags("--unfreeze", "0", "--unfreeze-schedule", "2:2", "--save-last"))
    start = blip.load_blip(args.blip)[0].state_dict()
    last = checkpoints.load_checkpoint(tmp_path / "run/last.pt")
    assert last["open"] == 2 and {n.split(".")[3] for n in last["state"] if n.startswith("vision_model.")} == {"1", "2"}
    assert all(not torch.equal(value, start[name]) for name, value in last["state"].items() if "weight" in name)
    log = runfolder.read_log(tmp_path / "run/training_log.csv")
    assert [row["layers"] for row in log if row["kind"] == "epoch"] == ["0", "2"]


def test_in_a_step_the_trained_parts_alone_are_in_training_mode_and_in_validation_none(flags, monkeypatch):
    """In every epoch of a schedule: a validation puts everything into eval mode, and the schedule opens layers."""
    step, describe, seen = blip.train_step, captioning.describe, []

    def watched_step(run, *args):
        opened = {int(name.split(".")[3]) for name, p in run.model.named_parameters() if name.startswith("vision") and p.requires_grad}
        wanted = ("text_decoder", *(f"vision_model.encoder.layers.{n}" for n in opened))
        for name, module in run.model.named_modules():
            assert module.training == (not name or any(name == one or name.startswith(f"{one}.") for one in wanted)), name
        seen.append(opened)
        step(run, *args)

    def watched_describe(model, *args):
        assert not any(module.training for module in model.modules())
        seen.append("describe")
        return describe(model, *args)

    monkeypatch.setattr(blip, "train_step", watched_step)
    monkeypatch.setattr(captioning, "describe", watched_describe)
    blip.main(flags("--unfreeze", "0", "--unfreeze-schedule", "2:2", "--batch-size", "5"))
    rehearsal, first, second = [{1, 2}, "describe"], [set(), set(), "describe"], [{1, 2}, {1, 2}, "describe"]
    assert seen == rehearsal + first + second


def test_a_step_moves_vision_at_its_share_of_the_rate_and_decays_no_bias_or_norm(flags):
    """AdamW's first step moves every weight that has a gradient by the rate, and the decayed ones by rate * decay of their value."""
    run, _ = prepared(blip.get_args(flags("--vision-lr", "0.25", "--weight-decay", "0.5", "--unfreeze", "2")))
    before = checkpoints.trainable_state(run.model)
    rate = run.lr(0)
    step = next(run.steps(0))
    blip.train_step(run, step)
    step.update()
    for name, after in checkpoints.trainable_state(run.model).items():
        scaled = rate * (0.25 if name.startswith("vision_model.") else 1.0)
        moved = after - before[name] + (scaled * 0.5 * before[name] if after.ndim > 1 else 0.0)
        assert moved.abs().max() <= scaled * 1.01 + 1e-7 and (moved.abs().max() > scaled * 0.9 or ".key.bias" in name), name


def test_gradients_are_clipped_at_2(run):
    found = []

    def norm(*args):
        found.append(torch.stack([p.grad.square().sum() for p in run.model.parameters() if p.grad is not None]).sum().sqrt().item())

    run.optimizer.optimizer.register_step_pre_hook(norm)
    step = next(run.steps(0))
    blip.train_step(run, step)
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1e3)
    step.update()
    assert found == [pytest.approx(2.0, rel=1e-3)]


def test_the_rehearsal_takes_the_longest_captions_and_all_layers_and_leaves_nothing(flags, monkeypatch):
    args = blip.get_args(flags("--unfreeze", "0", "--unfreeze-schedule", "2:3"))
    run, parts = prepared(args)
    before, step, seen = {name: value.clone() for name, value in run.model.state_dict().items()}, blip.train_step, []

    def watched(run, one):
        step(run, one)
        seen.append(({parts.train.texts[n] for n in one.group},
                     {name.split(".")[3] for name, p in run.model.named_parameters() if name.startswith("vision") and p.grad is not None}))
    monkeypatch.setattr(blip, "train_step", watched)
    blip.rehearse(run, parts, args)
    assert [layers for _, layers in seen] == [{"0", "1", "2"}] and all(text.endswith("on the left") for text in seen[0][0])
    assert all(p.grad is None or not p.grad.any() for p in run.model.parameters())
    assert same_state(run.model.state_dict(), before) and run.step == 0 and not run.optimizer.state


def test_frozen_layers_stay_and_have_no_dropout(run):
    blip.open_layers(run.model, 1)
    blip.train_mode(run)
    tower = run.model.vision_model
    assert not tower.training and [layer.training for layer in tower.encoder.layers] == [False, False, True]
    assert run.model.text_decoder.training


def test_vision_moves_at_its_own_rate(flags, tmp_path):
    args = blip.get_args(flags("--vision-lr", "0", "--epochs", "1", "--unfreeze", "2"))
    start = blip.load_blip(args.blip)[0].state_dict()
    blip.main(flags("--vision-lr", "0", "--epochs", "1", "--unfreeze", "2"))
    moved = {name for name, value in state_of(tmp_path / "run/best.pt").items() if not torch.equal(value, start[name])}
    assert moved and not any(name.startswith("vision_model.") for name in moved)


def test_recipes(flags):
    short = [f for f in flags() if f not in ("--lr", "1e-3", "--vision-lr", "1")]
    args = blip.get_args(short)
    assert (args.unfreeze, args.lr, args.vision_lr, args.weight_decay, args.patience) == (1, 1e-5, 0.05, 0.05, 3)
    args = blip.get_args([*short, "--recipe", "original", "--lr", "2e-5"])
    assert (args.unfreeze, args.lr, args.vision_lr, args.weight_decay, args.patience) == (3, 2e-5, 0.1, 0.01, 5)


def test_rate_warms_up_linearly_and_ends_at_0(run):
    run.total = 200  # the warm-up is a tenth
    rates = [run.lr(step) / 1e-3 for step in (0, 9, 19, 110, 199)]
    assert rates == pytest.approx([0.05, 0.5, 1, 0.5, 0], abs=1e-3)


def test_accumulation_equals_the_large_batch(run, parts):
    """The mean is over tokens: micro-batches of 5 and 3 captions of other lengths."""
    run.model.eval()
    group = list(range(8))

    def gradients(split):
        step = Step(run, 0, group, list(enumerate(split)), iter(loaders.load_batches(parts.train, parts.collate, split, 0)))
        blip.train_step(run, step)
        found = {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}
        run.optimizer.zero_grad()
        return step.means()["loss"], found

    (loss, whole), (split_loss, split) = gradients([group]), gradients([group[:5], group[5:]])
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(split[name], gradient, atol=1e-6, rtol=1e-3) for name, gradient in whole.items())


def test_one_batch_can_be_learnt_by_heart(flags, folder):
    model, tokenizer = blip.load_blip(folder)
    captioning.set_smoothing(model, 0.0)
    pictures = blip.read_data(blip.get_args(flags()), "train")[:3]
    data = blip.Captions(pictures, model.config.vision_config.image_size, tokenizer)
    text = model.config.text_config
    batch = blip.Collate(text.pad_token_id, text.bos_token_id)([data[n] for n in range(3)])
    blip.open_layers(model.eval(), 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-3)
    for _ in range(45):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert blip.describe(model, tokenizer, batch["pixel_values"], blip.GENERATION) == data.texts


# --- validation ------------

def test_batches_say_what_single_pictures_say(run, parts):
    pixels = torch.stack([parts.train[n][0]["pixel_values"] for n in range(len(parts.train))])
    many = blip.describe(run.model.eval(), parts.tokenizer, pixels, blip.GENERATION)
    alone = [blip.describe(run.model, parts.tokenizer, one[None], blip.GENERATION)[0] for one in pixels]
    assert many == alone and len(set(many)) > 1


def test_whole_split_or_said(flags, tmp_path, capsys):
    blip.main(flags("--epochs", "1", "--val-batch", "3"))
    assert set(json.loads((tmp_path / "run/val.json").read_text())) == set(VAL) and "--max-val" not in capsys.readouterr().out
    blip.main(flags("--epochs", "1", "--max-val", "2", out="two"))
    assert "val: 2 of 4 pictures are scored (--max-val)" in capsys.readouterr().out
    kept = json.loads((tmp_path / "two/val.json").read_text())
    log = runfolder.read_log(tmp_path / "two/training_log.csv")
    assert len(kept) == 2 and [row["images"] for row in log if row["kind"] == "epoch"] == ["2"]


def test_score_is_the_mean_of_three_with_all_references(parts):
    found = [{"caption": text, "loss": 2.0, "tokens": 4} for text in ("red all over", "a blue square", "green", "")]
    numbers = blip.summarize(found, parts.val)
    references = [[t] if isinstance(t, str) else t for t in VAL.values()]
    corpus = metrics.score_captions([f["caption"] for f in found], references)["corpus"]
    assert numbers["score"] == pytest.approx((corpus["METEOR (no WordNet)"] + corpus["ROUGE-L"] + corpus["CIDEr-D"]) / 3)
    assert numbers["loss"] == 0.5
    one = blip.Captions(parts.val.rows[:1], 112, parts.tokenizer)
    numbers = blip.summarize(found[:1], one)  # CIDEr-D has no value
    assert "cider_d" not in numbers and numbers["score"] == pytest.approx((numbers["meteor"] + numbers["rouge_l"]) / 2)


def test_better_and_patience(flags, tmp_path, monkeypatch, capsys):
    marks = {"value": None}
    assert not loop.is_better(float("nan"), marks) and loop.is_better(0.0, marks)
    assert not loop.is_better(0.5, {"value": 0.5}) and loop.is_better(0.6, {"value": 0.5})
    values = iter([0.0, 0.3, 0.5, 0.4, 0.5, 0.6])  # the first is the rehearsal's
    monkeypatch.setattr(blip, "summarize", lambda found, data: {"score": next(values)})
    blip.main(flags("--epochs", "9", "--patience", "2"))
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    assert (best["epoch"], best["value"]) == (2, 0.5) and "no better score for 2 epochs" in capsys.readouterr().out


def test_best_pt_and_val_json_are_of_the_best_epoch_and_not_of_the_last(flags, tmp_path, monkeypatch):
    scores, after, validate = [0.0, 0.5, 0.9, 0.2], [], blip.validate  # the first is the rehearsal's

    def marked(model, *args):
        numbers, results = validate(model, *args)
        after.append(checkpoints.trainable_state(model))
        return {**numbers, "score": scores[len(after) - 1]}, [{**one, "caption": f"epoch {len(after) - 1}"} for one in results]

    monkeypatch.setattr(blip, "validate", marked)
    blip.main(flags("--epochs", "3", "--unfreeze-schedule", "3:2", "--save-last"))
    best, last = state_of(tmp_path / "run/best.pt"), state_of(tmp_path / "run/last.pt")
    assert same_state(best, after[2]) and same_state(last, after[3]) and best.keys() < last.keys()
    assert not any(torch.equal(best[name], last[name]) for name in best if name.endswith("dense.weight"))
    assert set(json.loads((tmp_path / "run/val.json").read_text()).values()) == {"epoch 2"}


def test_test_split_is_scored_by_best_even_where_layers_were_opened_later(flags, data, tmp_path, monkeypatch, capsys):
    write(data, test={"t1.png": "a blue square", "t2.png": "a green one"})
    values, summarize = iter([0.0, 0.5, 0.4]), blip.summarize
    monkeypatch.setattr(blip, "summarize", lambda found, data: {"score": next(values, 0.1)})
    blip.main(flags("--unfreeze-schedule", "2:3"))
    monkeypatch.setattr(blip, "summarize", summarize)
    assert checkpoints.load_checkpoint(tmp_path / "run/best.pt")["open"] == 1
    capsys.readouterr()
    blip.main(["--data", str(data), "--checkpoint", str(tmp_path / "run/best.pt"), "--json", "--workers", "0"])
    assert json.loads(capsys.readouterr().out)["test"]["captions"] == json.loads((tmp_path / "run/test.json").read_text())


def test_zero_shot_checkpoint_and_caption_agree_with_validation(flags, data, tmp_path, capsys):
    write(data, test={"t1.png": "a blue square"})
    blip.main(flags("--save-last"))
    assert "test: pictures that training saw: 1 of 1 rows: these" in capsys.readouterr().out
    said = json.loads((tmp_path / "run/val.json").read_text())
    numbers = [r for r in runfolder.read_log(tmp_path / "run/training_log.csv") if r["kind"] == "epoch"]
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    capsys.readouterr()
    checkpoint = ["--checkpoint", str(tmp_path / "run/best.pt"), "--json", "--workers", "0"]
    assert blip.main(["--data", str(data), *checkpoint]) is None
    told = capsys.readouterr()
    scored = json.loads(told.out)
    assert best["pictures"] == sorted(rows.picture_digest(str(data / f"images/t{n}.png")) for n in range(9))
    assert "val: pictures that training saw: 0 of 4 rows\n" in told.err and (scored["val"]["seen"], scored["test"]["seen"]) == (0, 1)
    assert "test: pictures that training saw: 1 of 1 rows: these scores are not of held-out pictures" in told.err  # t1.png
    assert scored["val"]["captions"] == said
    assert scored["test"]["captions"] == json.loads((tmp_path / "run/test.json").read_text())
    assert scored["val"]["scores"]["score"] == pytest.approx(float(numbers[best["epoch"] - 1]["score"]), rel=1e-4)
    assert blip.main(["--caption", *(str(data / "images" / name) for name in VAL), *checkpoint]) == 0
    assert list(json.loads(capsys.readouterr().out).values()) == list(said.values())
    for name in VAL:
        (data / "images" / name).rename(data / name)  # a folder of its own
    for left in (data / "images").iterdir():
        left.unlink()
    assert blip.main(["--caption", str(data), *checkpoint[:2], "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{data / name}: {said[name]}" for name in sorted(VAL)]


def test_zero_shot_scores_the_untrained_weights(flags, folder, run, parts, tmp_path, capsys):
    capsys.readouterr()
    assert blip.main(flags("--zero-shot", "--json")) is None
    pixels = torch.stack([parts.val[n][0]["pixel_values"] for n in range(4)])
    expected = blip.describe(run.model.eval(), parts.tokenizer, pixels, blip.GENERATION)
    assert list(json.loads(capsys.readouterr().out)["val"]["captions"].values()) == expected
    assert not (tmp_path / "run").exists()


# --- data ------------

def test_every_caption_is_a_row_and_validation_has_one_for_each_picture(parts):
    assert len(parts.train) == 10 and len(parts.val) == 4 and parts.val.rows[0].captions == ("a red square", "red all over")


def test_shots_are_a_function_of_names_and_seed(flags, data):
    def names(*more):
        return [p.name for p in blip.read_data(blip.get_args(flags("--shots", "4", *more)), "train", print)]

    first = names()
    train = json.loads((data / "train_captions.json").read_text())
    write(data, train=dict(reversed(train.items())))
    assert len(first) == 4 and names() == first[::-1]
    assert {tuple(names("--seed", str(s))) for s in range(5)} != {tuple(first[::-1])}
    with pytest.raises(DataError, match="--shots 10 of 9"):
        blip.read_data(blip.get_args(flags("--shots", "10")), "train")


def test_clean_removes_and_counts(flags, data, capsys):
    write(data, train={"t0.png": ["a red square", " A red  square.", ""], "t1.png": "blue " * 101, "t2.png": "a red square"})
    read = blip.read_data(blip.get_args(flags("--train-texts-clean")), "train")
    assert [(p.name, p.captions) for p in read] == [("t0.png", ("a red square",)), ("t2.png", ("a red square",))]
    assert "1 empty, 1 duplicate and 1 absurdly long captions removed, and 1 pictures" in capsys.readouterr().out
    with pytest.raises(DataError, match="row 1: an empty caption .--train-texts-clean"):
        blip.read_data(blip.get_args(flags()), "train")


def half(caption, seed):
    """Which half of a picture with a white left half is the brighter after augmentation."""
    image = Image.new("RGB", (40, 40))
    image.paste("white", (0, 0, 20, 40))
    grey = np.asarray(captions.augment(image, caption, np.random.default_rng(seed)).convert("L"), float)
    return "left" if grey[10:30, 5:15].mean() > grey[10:30, 25:35].mean() else "right"


def test_left_and_right_stay_where_a_caption_says_so():
    for caption in ("a boat on the left", "The rightmost tree", "her right-hand glove", "左边的船"):
        assert {half(caption, seed) for seed in range(12)} == {"left"}, caption
    for caption in ("a bright boat", "a copyright notice", "a boat"):
        assert {half(caption, seed) for seed in range(12)} == {"left", "right"}, caption


def test_augmentation_is_a_function_of_seed_epoch_and_row(flags):
    args = blip.get_args(flags())
    data = blip.Captions(blip.read_data(args, "train"), 32, None, every=True, augment=3)

    def pixels(index):
        return data[index][0]["pixel_values"]

    assert torch.equal(pixels((1, 2)), pixels((1, 2))) and not torch.equal(pixels((1, 2)), pixels((2, 2)))
    assert not torch.equal(pixels((1, 2)), pixels((1, 3))) and not torch.equal(pixels((1, 2)), pixels(2))
    assert torch.equal(pixels(2), blip.Captions(data.rows, 32)[2][0]["pixel_values"])


def test_training_is_augmented_and_validation_is_not(flags, monkeypatch):
    drawn = []
    monkeypatch.setattr(captions, "augment", lambda image, caption, rng: drawn.append(rng.random()) or image)
    blip.main(flags("--augment", "--batch-size", "5"))
    assert len(drawn) == len(set(drawn)) == 2 * 10  # epochs, rows


# --- runs ------------

def test_interrupted_and_resumed_equals_undisturbed(flags, tmp_path, monkeypatch, no_curves):
    more = ("--save-last", "--accumulation", "2", "--batch-size", "2", "--augment", "--unfreeze-schedule", "3:2", "--epochs", "3")
    monkeypatch.setattr(engine_run, "LOG_EVERY", 1)
    blip.main(flags(*more, out="whole"))
    step, calls = blip.train_step, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 4:  # the rehearsal is the first; an epoch has two steps
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(blip, "train_step", interrupt)
    assert blip.main(flags(*more, out="cut")) == 143
    assert checkpoints.load_checkpoint(tmp_path / "cut/last.pt")["step"] == 3
    monkeypatch.setattr(blip, "train_step", step)
    monkeypatch.setattr(runfolder, "draw_curves", no_curves)
    blip.main(flags(*more, "--resume", out="cut"))
    for name in ("best.pt", "last.pt"):
        assert same_state(state_of(tmp_path / "whole" / name), state_of(tmp_path / "cut" / name)), name
    for name in ("training_log.csv", "val.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert {"curves.png", "args.yaml"} <= {p.name for p in (tmp_path / "cut").iterdir()}


def test_a_run_may_be_made_longer_where_the_schedule_goes_on(flags, tmp_path, capsys):
    """The layers that are opened later have their place in the optimizer from the start; what is not opened is not called trained."""
    more = ("--unfreeze", "0", "--unfreeze-schedule", "2:2", "--save-last")
    blip.main(flags(*more, "--epochs", "1"))
    said = capsys.readouterr().out
    blip.main(flags("--unfreeze", "0", "--epochs", "1", out="none"))
    without = capsys.readouterr().out
    lines = [next(line for line in text.splitlines() if line.startswith("vision_model")) for text in (said, without)]
    assert lines[0] == lines[1] and lines[0].split()[1] == "0"  # trainable
    blip.main(flags(*more, "--epochs", "2", "--resume"))
    assert checkpoints.load_checkpoint(tmp_path / "run/last.pt")["marks"]["done"] == 2


def test_a_run_that_is_killed_before_best_pt_is_made_up_for_with_its_captions(flags, data, tmp_path, monkeypatch):
    """last.pt of the epoch is just there and best.pt is not yet: val.json must be of that epoch already."""
    write(data, test={"t1.png": "a blue square"})
    more = ("--save-last", "--unfreeze-schedule", "2:2")
    blip.main(flags(*more, out="whole"))
    scores, done, validate, save_last = [0.0, 0.1, 0.9], [], blip.validate, engine_run.Run.save_last  # the first is the rehearsal's

    def marked(*args):
        numbers, results = validate(*args)
        done.append(1)
        return {**numbers, "score": scores[len(done) - 1]}, [{**one, "caption": f"epoch {len(done) - 1}"} for one in results]

    def killed(run):
        save_last(run)
        if run.progress["done"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blip, "validate", marked)
        patch.setattr(engine_run.Run, "save_last", killed)
        with pytest.raises(KeyboardInterrupt):
            blip.main(flags(*more, out="cut"))
    assert checkpoints.load_checkpoint(tmp_path / "cut/best.pt")["epoch"] == 1
    blip.main(flags(*more, "--resume", out="cut"))
    best = checkpoints.load_checkpoint(tmp_path / "cut/best.pt")
    assert (best["epoch"], best["open"]) == (2, 2) and same_state(best["state"], state_of(tmp_path / "whole/last.pt"))
    assert set(json.loads((tmp_path / "cut/val.json").read_text()).values()) == {"epoch 2"}
    assert set(json.loads((tmp_path / "cut/test.json").read_text())) == {"t1.png"}


def test_checkpoints_have_the_names_that_earlier_versions_wrote(flags, tmp_path):
    blip.main(flags("--epochs", "1", "--save-last"))
    best, last = (checkpoints.load_checkpoint(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert set(last) == {"stage", "state", "open", "frozen", "settings", "optimizer", "scaler", "step", "marks"}
    assert set(best) - {"timm"} == {"stage", "state", "model_args", "open", "generation", "precision", "args", "metric", "value", "epoch",
                                    "stale", "done", "meteor", "frozen", "pictures", "torch", "transformers"}
    assert set(last["marks"]) == {"metric", "value", "epoch", "stale", "done"} and best["stage"] == last["stage"] == "blip"
    assert best["model_args"] == {"blip": flags()[3]} and best["frozen"] == last["frozen"] and len(last["frozen"]) == 3
    assert {group["scale"] for group in last["optimizer"]["param_groups"]} == {1.0}


def test_two_processes_train_as_one_while_layers_open(flags, data, tmp_path, forker):
    """The micro-batches of a step are the same, whoever computes them, and of other lengths in tokens. A layer that is still frozen
    gets no gradient on either process, or AdamW would have moved its moments."""
    write(data, val=dict(list(VAL.items())[:3]), test={"t1.png": "a blue square"})  # three do not divide by two
    common = ("--unfreeze", "0", "--unfreeze-schedule", "2:2", "--batch-size", "2", "--save-last")
    blip.main(flags(*common, "--accumulation", "4", out="one"))
    (tmp_path / "two.py").write_text(textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
        import conftest, torch
        import metrics, train_blip_caption as blip
        from engine import checkpoints, errors, runfolder

        def refused(*args):
            raise AssertionError("the second process reads the first one's files")

        torch.set_num_threads(1)
        metrics._wordnet, runfolder.draw_curves, blip.GENERATION["max_length"] = lambda: None, lambda *args: None, {LONGEST}
        if os.environ["RANK"] == "1":
            checkpoints.load_checkpoint = checkpoints.save_checkpoint = refused
        sys.exit(errors.exit_code(blip.main))
    """))
    done = forker.together([tmp_path / "two.py", *flags(*common, "--accumulation", "2", out="two")])
    assert not any(one.returncode for one in done), done
    printed = "".join(one.stdout for one in done)
    one, two = (checkpoints.load_checkpoint(tmp_path / out / "last.pt") for out in ("one", "two"))
    assert one["open"] == two["open"] == 2 and one["step"] == two["step"] == 2 and one["state"].keys() == two["state"].keys()
    assert all(torch.allclose(two["state"][name], value, atol=2e-4) for name, value in one["state"].items())
    steps = [{key: int(value["step"]) for key, value in last["optimizer"]["state"].items()} for last in (one, two)]
    assert steps[0] == steps[1] and set(steps[0].values()) == {1, 2}  # vision from the second epoch on
    logs = [[row for row in runfolder.read_log(tmp_path / out / "training_log.csv") if row["kind"] == "epoch"] for out in ("one", "two")]
    assert [row["layers"] for row in logs[1]] == ["0", "2"] and {row["images"] for row in logs[1]} == {"3"}
    assert all(float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4) for a, b in zip(*logs))
    for split, names in (("val", {"v0.png", "v1.png", "v2.png"}), ("test", {"t1.png"})):
        assert set(json.loads((tmp_path / f"two/{split}.json").read_text())) == names
    assert printed.count("epoch 1: images 3") == 1 and printed.count("test: images 1") == 1


def test_dropout_is_a_function_of_step_and_micro_batch(run, parts):
    blip.train_mode(run)
    batch = parts.collate([parts.train[n] for n in range(4)])

    def loss(number, micro_batch):
        run.step = number
        step = Step(run, 0, [0, 1, 2, 3], [(micro_batch, [0, 1, 2, 3])], iter([batch]))
        blip.train_step(run, step)
        return step.means()["loss"]

    assert loss(0, 0) == loss(0, 0) and len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3


def test_cases_page_holds_text_as_text_and_needs_nothing_else(flags, data, tmp_path):
    hostile = "<script>alert('x')</script> {{ 7*7 }} \"quoted\""
    write(data, val={**VAL, "v1.png": hostile})
    blip.main(flags("--epochs", "1", "--cases", "2"))
    page = (tmp_path / "run/cases.html").read_text()
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; {{ 7*7 }} &#34;quoted&#34;" in page
    assert "<script" not in page and "<b>" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("url(data:image/jpeg;base64,") == 4 and page.count("<figure>") == 4
    assert all(name in page for name in VAL)


def test_cases_are_the_worst_and_the_best(parts, tmp_path):
    said = ["nothing like it", "a blue square", "the green square", "a red one"]
    report.write(tmp_path / "c.html", "t", report.caption_cases(parts.val.rows, said, 1))
    page = (tmp_path / "c.html").read_text()
    worst, best = page.split("The 1 best")
    assert "nothing like it" in worst and "a red one" in best and page.count("<figure>") == 2


# --- --report, --captions ------------

def test_report_of_each_split(flags, data, tmp_path, capsys):
    write(data, test={"t1.png": "a blue square", "t2.png": "green"})
    blip.main(flags("--epochs", "1"))
    best, page = str(tmp_path / "run/best.pt"), tmp_path / "pages/r.html"
    blip.main(["--data", str(data), "--checkpoint", best, "--workers", "0", "--report", str(page)])
    said, out = json.loads((tmp_path / "run/val.json").read_text()), capsys.readouterr().out
    for path, names in ((page, VAL), (page.with_name("r_test.html"), ["t1.png", "t2.png"])):
        found = Page(path)
        check_safe(found)
        assert f"report: {path}" in out and all(f"· {name}" in found.text for name in names) and found.part("Training").count("<svg") >= 2
        assert found.part(f"{len(names)} samples").count("<bdi>confidence</bdi>") == len(names)
        assert best in found.part("How this was made") and "trained" in found.part("Scores") and "untrained" not in found.source
    assert all(text in Page(page).text for text in said.values())
    blip.main(flags("--zero-shot", "--report", str(page)))
    assert "untrained" in Page(page).part("Scores") and "no training_log.csv" in Page(page).part("Training")


def test_training_writes_the_report_of_its_best_epoch(flags, data, tmp_path, capsys, monkeypatch):
    """The scores fall after the first epoch: the page stays that of the first, and equals that of --checkpoint."""
    write(data, test={"t1.png": "a blue square", "t2.png": "green"})
    numbers, left = blip.summarize, iter([0.5, 0.9, 0.2, 0.3])  # rehearsal, epochs 1 and 2, test
    with monkeypatch.context() as patch:
        patch.setattr(blip, "summarize", lambda *args: {**numbers(*args), "score": next(left)})
        blip.main(flags("--epochs", "2", "--report", str(tmp_path / "r.html")))
    out, best = capsys.readouterr().out, str(tmp_path / "run/best.pt")
    assert out.count(f"report: {tmp_path / 'r.html'}") == 1 and out.count(f"report: {tmp_path / 'r_test.html'}") == 1
    blip.main(["--data", str(data), "--checkpoint", best, "--workers", "0", "--report", str(tmp_path / "again.html")])
    for name, samples in (("", "4 samples"), ("_test", "2 samples")):
        page, again = Page(tmp_path / f"r{name}.html"), Page(tmp_path / f"again{name}.html")
        check_safe(page)
        for part in ("Scores", "All scores", samples):
            assert page.part(part) == again.part(part)
        assert best in page.text


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_captions_of_a_folder_are_those_of_caption_and_go_on_after_a_kill(flags, data, tmp_path, capsys, monkeypatch):
    blip.main(flags("--epochs", "1"))
    images, out, checkpoint = data / "images", tmp_path / "out.csv", ["--checkpoint", str(tmp_path / "run/best.pt"), "--workers", "0"]
    capsys.readouterr()
    assert blip.main(["--caption", str(images), "--json", *checkpoint]) == 0
    said = {os.path.basename(name): text for name, text in json.loads(capsys.readouterr().out).items()}
    (images / "below").mkdir()
    (images / "t3.png").rename(images / "below/t3.png")
    (images / "t4.png").rename(images / "=t4.png")
    (images / "broken.png").write_bytes(b"no picture")
    command = ["--caption", str(images), "--captions", str(out), *checkpoint, "--val-batch", "4"]
    assert blip.main(command) is None
    found = read_csv(out)
    expected = {{"t3.png": "below/t3.png", "t4.png": "=t4.png"}.get(name, name): text for name, text in said.items()}
    assert {one["image"]: one["caption"] for one in found} == expected and [one["image"] for one in found] == sorted(expected)
    printed = capsys.readouterr().out
    assert "left out: 'broken.png': no picture" in printed and "13 rows, 13 of them new; 1 of 14 pictures could not be read" in printed
    whole = out.read_bytes()
    out.write_bytes(whole[:len(whole) // 2])
    described, real = [], blip.describe
    monkeypatch.setattr(blip, "describe", lambda *args: described.append(len(args[2])) or real(*args))
    blip.main(command)
    assert out.read_bytes() == whole and 0 < sum(described) < 13
    assert errors.exit_code(blip.main, ["--caption", str(images), "--captions", str(out), "--blip", flags()[3], "--workers", "0"]) == 2
    assert "checkpoint (sha256) is None" in capsys.readouterr().err and out.read_bytes() == whole


@pytest.mark.parametrize("more, words", [
    (["--captions", "a.csv"], "takes one folder in --caption"), (["--caption", "a", "b", "--captions", "a.csv"], "takes one folder"),
    (["--caption", "a", "--captions", "a.csv", "--json"], "without --json"),
    (["--report", "r.html", "--checkpoint", "x", "--caption", "a"], "--report is of")])
def test_flags_that_do_not_go_together(flags, capsys, more, words):
    with pytest.raises(SystemExit) as stop:
        blip.get_args(flags(*more))
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


# --- bad input ------------

def spoil(name, content):
    def do(data):
        (data / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return do


BAD = [  # what is done to the data folder, further flags, words of the message
    (lambda data: (data / "val_captions.json").unlink(), [], "val_captions.json: there is no such file"),
    (spoil("train_captions.json", b"{"), [], "train_captions.json, line 1.*not JSON"),
    (spoil("train_captions.json", {}), [], "holds no captions"),
    (spoil("train_captions.json", {"t1.png": {"a": "b"}}), [], "'t1.png'.*not text"),
    (spoil("train_captions.json", {"t1.png": []}), [], "row 1: an empty caption"),
    (spoil("val_captions.json", {"v0.png": "a", "v1.png": " "}), [], "1 of 2 pictures.*row 2: an empty caption"),
    (spoil("train_captions.json", {"../t1.png": "a"}), [], r"holds '\.\.'"),
    (spoil("train_captions.json", {"t1.jpg": "a"}), [], "'t1.jpg' is not there .*nearest is 't1.png'"),
    (spoil("images/v2.png", b""), [], "row 3: image 'v2.png' has 0 bytes"),
    (spoil("images/v2.png", b"GIF8"), ["--skip-bad", "0.1"], "1 of 4 pictures.*v2.png"),
    (spoil("images/t3.png", b"no picture"), ["--zero-shot", "--blip", "nowhere/blip"], "BLIP: nowhere/blip is not on this machine"),
    (lambda data: None, ["--unfreeze", "4"], "asks for 4 vision layers and this BLIP has 3"),
    (lambda data: None, ["--unfreeze-schedule", "2:9"], "asks for 9 vision layers"),
    (lambda data: None, ["--caption", "none.png"], "none.png: there is no such picture"),
    (lambda data: None, ["--checkpoint", "none.pt"], "none.pt: no such checkpoint"),
    (lambda data: None, ["--images", "none"], "no such image folder"),
    (lambda data: None, ["--lr", "1e30", "--save-last"], r"(loss|gradient) is (nan|inf)"),
]


@pytest.mark.parametrize("do, more, words", BAD, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_bad_input_is_one_line(data, flags, tmp_path, capsys, do, more, words):
    do(data)
    assert errors.exit_code(blip.main, flags(*more)) == 2
    error = the_error(capsys.readouterr().err)
    assert re.search(words, error), error
    assert not (tmp_path / "run/best.pt").exists()


@pytest.mark.parametrize("more", [["--unfreeze-schedule", "0:2"], ["--unfreeze-schedule", "2"], ["--recipe", "other"],
                                  ["--zero-shot", "--checkpoint", "x"], ["--shots", "0"]])
def test_bad_flags(flags, more):
    with pytest.raises(SystemExit) as stop:
        blip.get_args(flags(*more))
    assert stop.value.code == 2


def test_broken_training_picture_leaves_a_last_pt(flags, data, tmp_path, monkeypatch, capsys):
    step = blip.train_step

    def spoiled(run, *args):
        step(run, *args)
        if run.step == 2:
            for n in range(9):
                (data / f"images/t{n}.png").write_bytes(b"")

    monkeypatch.setattr(blip, "train_step", spoiled)
    assert errors.exit_code(blip.main, flags("--batch-size", "2")) == 2
    assert "row " in (line := capsys.readouterr().err) and "is missing, empty (0 bytes)" in line
    assert checkpoints.load_checkpoint(tmp_path / "run/last.pt")["step"] == 3


def test_other_folders_and_checkpoints_are_refused(flags, folder, data, tiny, tmp_path, capsys):
    def error(*argv):
        assert errors.exit_code(blip.main, list(argv)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "a blip-2 model and not a BLIP" in error(*flags("--zero-shot", "--blip", tiny[0]))
    blip.main(flags("--epochs", "1", "--save-last"))
    assert "already holds" in error(*flags())
    assert "--lr is 0.002, was 0.001" in error(*flags("--epochs", "1", "--save-last", "--resume", "--lr", "2e-3"))
    loop.seed_everything(9)
    other = make_tiny.save_random_captioner(tmp_path / "other", TEXTS)
    best = str(tmp_path / "run/best.pt")
    assert "trained on another BLIP" in error("--caption", str(data / "images"), "--checkpoint", best, "--blip", other)
    last = checkpoints.load_checkpoint(tmp_path / "run/last.pt")
    checkpoints.save_checkpoint(tmp_path / "run/last.pt", {**last, "frozen": {**last["frozen"], "embeddings": "of another"}})
    assert "last.pt was trained on another BLIP" in error(*flags("--epochs", "1", "--save-last", "--resume"))
    checkpoints.save_checkpoint(tmp_path / "x.pt", {**checkpoints.load_checkpoint(best), "stage": "gated"})
    assert "another stage (gated)" in error("--caption", str(data / "images"), "--checkpoint", str(tmp_path / "x.pt"))
    with runfolder.folder_lock(tmp_path / "held"):
        assert "is in use by" in error(*flags(out="held"))


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_hostile_checkpoint_never_runs(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "ran"))
    torch.save({"state": Hostile()}, tmp_path / "hostile.pt", pickle_module=pickle)
    assert errors.exit_code(blip.main, ["--caption", str(data / "images"), "--checkpoint", str(tmp_path / "hostile.pt")]) == 2
    assert "nothing of it was run" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_check_data(flags, data, capsys):
    assert blip.main(flags("--check-data")) == 0
    out = capsys.readouterr().out
    assert "9 pictures, 10 captions" in out and "4 say left or right" in out and "[DEC] a red square [SEP]" in out
    assert blip.main(flags("--check-data", "--blip", "tinny")) == 1  # the data is fine, and there is no such model
    out = capsys.readouterr().out
    assert "error: BLIP:" in out and "did you mean tiny" in out and out.splitlines()[-1] == "training would fail"
    (data / "images/t1.png").write_bytes(b"x")
    write(data, val={"t2.png": "a green square"})
    assert blip.main(flags("--check-data")) == 1
    out = capsys.readouterr().out
    assert "broken image" in out and "in train and val" in out and "training would fail" in out


def test_dry_run_writes_nothing(flags, tmp_path, capsys):
    assert blip.main(flags("--dry-run")) is None and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert printed.count("tokens are trained") == 3 and "sum, computed" in printed and "measured" in printed
