"""pytest tests/test_stage2.py: pretrain_stage2.py on random tiny weights and language models of several kinds.

Reference-checked: the loss against transformers' own on the same weights, captions against its generate. Behaviour-checked: what is
trained, the baselines, resuming, what train_gated.py and an evaluation make of its best.pt.
"""

import json
import shutil

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

import core
import pretrain_stage2
import train_gated
from data import pairs, rows
from data.pairs import Captioned, Pair
from engine import checkpoints, errors, packing, prompts, published, seen
from tests import decoder_kinds
from tests.decoder_kinds import SIZE, Q

CAPTIONS = ["three red boats on the water", "a house", "two large old dogs are on the painting"]
KINDS = ("opt", "smollm", "flan-t5")  # with a first token, without any, an encoder-decoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("stage2")
    return {kind: decoder_kinds.make_folder(kind, place / kind) for kind in KINDS}


@pytest.fixture
def flags(few, tiny, tmp_path, no_curves):
    """Command line of a short run; add your own after it."""
    def make(*more, out="run"):
        return ["--data", f"drawn={few}", "--blip2", tiny[0], "--epochs", "2", "--batch-size", "4", "--accumulation", "2", "--lr", "1e-3",
                "--workers", "0", "--precision", "no", "--max-val", "4", "--out", str(tmp_path / out), *more]
    return make


def build(folder):
    torch.manual_seed(1)
    return core.Blip2OPTGated.build(folder, None, [], "none", train_qformer=True).eval()


def images(count):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loss_and_captions_equal_transformers(folders, kind):
    model, theirs = build(folders[kind]), Blip2ForConditionalGeneration.from_pretrained(folders[kind]).eval()
    batch = prompts.encode_captions(model.tokenizer, CAPTIONS, multiple=4)
    losses = model(**batch, images=images(3))["lm"]
    found = pretrain_stage2.describe(model, model.image_features(images(3))["image_embeds"])
    before, after, _ = prompts.habits_of(model.tokenizer)
    start = [theirs.config.image_token_index] * Q + before + after
    for b, caption in enumerate(CAPTIONS):
        target = model.tokenizer(caption, add_special_tokens=False).input_ids + [core.end_id(model.tokenizer)]
        ids, labels = (start, target) if kind == "flan-t5" else (start + target, [-100] * len(start) + target)
        out = theirs(images(3)[b:b + 1], torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), labels=torch.tensor([labels]))
        assert losses[b].item() == pytest.approx(out.loss.item(), rel=1e-5)
        ids = theirs.generate(images(3)[b:b + 1], torch.tensor([start]), num_beams=5, do_sample=False, max_new_tokens=30, min_new_tokens=1,
                              length_penalty=1.0, eos_token_id=core.stop_ids(model.tokenizer), pad_token_id=model.tokenizer.pad_token_id)[0]
        new = ids[len(start):] if ids[:len(start)].tolist() == start else ids
        assert model.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False).split("\n")[0].strip() == found[b]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_cut_and_keep_their_end(folders, kind):
    tokenizer = published.load_tokenizer(folders[kind])
    batch = prompts.encode_captions(tokenizer, ["a " * 100, "a house"])
    trained = [row[row != -100].tolist() for row in batch["labels"]]
    assert len(trained[0]) == 32 and trained[0][-1] == trained[1][-1] == core.end_id(tokenizer)
    starts = prompts.caption_prompts(tokenizer, 2)
    assert starts["input_ids"].dtype == torch.long and starts["input_ids"].shape == (2, kind != "smollm")
    assert all(row[:len(start)].tolist() == start.tolist() for row, start in zip(batch["input_ids"], starts["input_ids"]))


def test_qformer_and_projection_learn_and_nothing_else(flags, tiny, tmp_path):
    pretrain_stage2.main(flags("--epochs", "1"))
    saved = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    model = build(tiny[0])
    was = checkpoints.trainable_state(model)
    assert saved["state"].keys() == was.keys()
    assert {name.split(".")[0] for name in was} == {"qformer", "query_tokens", "language_projection"}
    still = [name for name in was if torch.equal(was[name], saved["state"][name])]
    assert not still, still
    assert saved["frozen"].keys() == {"vision_model", "language_model", checkpoints.LINEAR}
    assert checkpoints.other_parts(saved["frozen"], checkpoints.fingerprint(model)) == []


def test_it_trains_without_pads(flags):
    args = pretrain_stage2.get_args(flags())
    run, _ = pretrain_stage2.prepare(args, pretrain_stage2.start(args))
    assert run.model.language_model.config._attn_implementation == packing.NAME


def test_training_lowers_the_loss_and_writes_captions(flags, few, tmp_path, capsys):
    pretrain_stage2.main(flags("--epochs", "3", "--captions", str(tmp_path / "captions.json")))
    out = capsys.readouterr().out
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in out.splitlines() if line.startswith("epoch ")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert all("another picture's" in line and "one caption for all" in line for line in out.splitlines() if line.startswith("epoch "))
    said = json.loads((tmp_path / "captions.json").read_text())
    pretrain_stage2.main(flags("--checkpoint", str(tmp_path / "run"), "--captions", str(tmp_path / "again.json")))
    assert json.loads((tmp_path / "again.json").read_text()) == said and len(said) == 3
    best = checkpoints.load_checkpoint(tmp_path / "run/best.pt")
    printed = capsys.readouterr().out
    assert f"loss {best['value']:.3f}," in printed and "val: pictures that training saw: 0 of 3 rows\n" in printed
    read = {split: pairs.read_sets({"x": str(few)}, split, log=lambda *words: None) for split in ("train", "val")}
    assert best["pictures"] == sorted({rows.picture_digest(pair.image) for pair in read["train"]}) and len(best["pictures"]) == 8
    shown = [[read["val"][0].image], [read["train"][0].image]]  # the first picture of a validation is new, the second is not
    assert seen.training_overlap(best["pictures"], shown, 1) == [False, True]


def test_a_stopped_and_resumed_run_ends_in_the_same_bits(flags, tmp_path):
    more = ("--save-last", "--accumulation", "1")
    pretrain_stage2.main(flags(*more, out="whole"))
    args = pretrain_stage2.get_args(flags(*more, out="cut"))
    run, _ = pretrain_stage2.prepare(args, pretrain_stage2.start(args))
    with run.open(False, vars(args), pretrain_stage2.__file__):
        run.wrapped.train()
        for step in run.steps(0):
            pretrain_stage2.train_step(run, step)
            step.update()
            run.stop.number = 2  # as after Ctrl-C
    assert run.step == 1 and run.per_epoch == 2
    pretrain_stage2.main(flags(*more, "--resume", out="cut"))
    whole, cut = (checkpoints.load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole["state"][name], cut["state"][name]) for name in whole["state"])
    assert whole["marks"] == cut["marks"]


def test_train_gated_goes_on_from_it(flags, few, tiny, tmp_path):
    pretrain_stage2.main(flags("--epochs", "1"))
    best = str(tmp_path / "run/best.pt")
    model = core.Blip2OPTGated.build(tiny[0], None, [], "none", qformer=best)
    state = checkpoints.load_checkpoint(best)["state"]
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items()) and len(state) > 50
    args = train_gated.get_args(["--data", str(few), "--blip2", tiny[0], "--efficientnet", tiny[1], "--qformer", best, "--workers", "0",
                                 "--precision", "no", "--dry-run", "--out", str(tmp_path / "gated")])
    train_gated.dry_run(args)


def test_one_validation_picture_has_no_cider_and_the_run_goes_on(flags, tmp_path, capsys):
    assert pretrain_stage2.main(flags("--max-val", "1", "--epochs", "1")) is None and (tmp_path / "run/best.pt").exists()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1"))
    assert "ROUGE-L" in line and "CIDEr-D" not in line and "another picture's" not in line
    pretrain_stage2.main(flags("--max-val", "1", "--checkpoint", str(tmp_path / "run")))
    assert "ROUGE-L" in capsys.readouterr().out


def test_baselines_by_hand():
    """Of three pictures with captions of their own: right captions score, the next picture's do not."""
    split = pretrain_stage2.Split([], [["a red boat"], ["two blue stars"], ["one tall tree"]])
    numbers = pretrain_stage2.scores(["a red boat", "two blue stars", "one tall tree"], split)
    assert numbers["another picture's"] == 0 and numbers["CIDEr-D"] > 5 and numbers["ROUGE-L"] == 1
    numbers = pretrain_stage2.scores(["one tall tree", "a red boat", "two blue stars"], split)  # each stands at the picture after its own
    assert numbers["CIDEr-D"] == 0 and numbers["another picture's"] > 5


def test_the_constant_is_the_caption_that_suits_most():
    def pair(n, text):
        return Pair("", f"{n}", text, n, "x", "f", n)

    train = [pair(n, "two dogs run") for n in range(6)] + [pair(9, "a lonely house by the sea")]
    text, value = pretrain_stage2.best_constant(train, pretrain_stage2.Split([], [["two dogs run"], ["a cat"]]), seed=1)
    assert text == "two dogs run" and value == pytest.approx(pretrain_stage2.cider([text] * 2, [["two dogs run"], ["a cat"]]))


@pytest.mark.parametrize("change, message", [
    (["--data", "x=nowhere"], "nowhere"), (["--blip2", "tinny"], "did you mean tiny"), (["--qformer", "nowhere.pt"], "nowhere.pt"),
    (["--checkpoint", "nowhere"], "no such checkpoint")])
def test_what_is_wrong_costs_one_line_and_leaves_nothing(flags, tmp_path, capsys, change, message):
    assert errors.exit_code(pretrain_stage2.main, flags(*change)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run/best.pt").exists()


def test_captions_that_no_epoch_wrote_are_said(flags, tmp_path, capsys):
    pretrain_stage2.main(flags("--save-last"))
    again = flags("--save-last", "--resume", "--captions", str(tmp_path / "late.json"))
    assert errors.exit_code(pretrain_stage2.main, again) == 2
    assert "late.json is not written: no epoch was the best" in capsys.readouterr().err and not (tmp_path / "late.json").exists()


def test_two_sets_with_pictures_of_the_same_names_keep_both_captions(flags, few, tmp_path):
    again = shutil.copytree(few, tmp_path / "again")
    pretrain_stage2.main(flags("--data", f"other={again}", "--max-val", "9", "--untrained", "--captions", str(tmp_path / "c.json")))
    said = json.loads((tmp_path / "c.json").read_text())
    assert len(said) == 6 and {name.split("/")[0] for name in said} == {"drawn", "other"}


def test_what_is_given_beside_a_checkpoint_wins(flags, tiny, tmp_path, capsys):
    pretrain_stage2.main(flags("--epochs", "1"))
    moved = shutil.copytree(tiny[0], tmp_path / "moved")
    capsys.readouterr()
    pretrain_stage2.main(flags("--checkpoint", str(tmp_path / "run"), "--blip2", str(moved)))
    assert "ROUGE-L" in capsys.readouterr().out
    assert errors.exit_code(pretrain_stage2.main, flags("--checkpoint", str(tmp_path / "run"), "--blip2", "tinny")) == 2
    assert "did you mean tiny" in capsys.readouterr().err


def test_check_data_says_what_is_there_and_what_is_not(flags, tmp_path, capsys):
    assert pretrain_stage2.main(flags("--check-data")) == 0 and "training can start" in capsys.readouterr().out
    assert pretrain_stage2.main(flags("--check-data", "--blip2", "tinny")) == 1
    assert "did you mean tiny" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_broken_picture_is_named(flags, few, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(few, data)
    name = next(iter(json.loads((data / "train_captions.json").read_text())))
    (data / "images" / name).write_bytes(b"no picture")
    assert errors.exit_code(pretrain_stage2.main, ["--data", f"x={data}", *flags()[2:]]) == 2
    assert name in capsys.readouterr().err


def test_augmented_views_differ_by_epoch_and_captions_stay(few):
    read = pairs.read_sets({"x": str(few)}, "train", log=lambda *words: None)
    data = Captioned(read, 28, seed=1)
    assert not torch.equal(data[0, 0][0], data[1, 0][0]) and data[0, 0][1] == data[1, 0][1]
