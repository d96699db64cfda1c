"""pytest tests/show/test_sharing.py: loading in one line, exported folders, the proof that they are the same, what a bug report tells.

Reference-checked: peft's own loader reads the adapter files into the published BLIP-2; the round trip, bit by bit.
Behaviour-checked: refusals of changed models and damaged files, one line each; the model card and --env tell no path and no name.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import core
import train_gated
from data import rows
from engine import checkpoints, environment, files, loop, published, saved
from engine.errors import DataError
from show import sharing

STYLES = ["Cubism", "Pointillism", "Pop Art"]
BUILD = core.Blip2OPTGated.build
VARIANTS = {"film": {}, "gate": {"gating": "gate"}, "channel": {"per": "channel"}, "qformer": {"train_qformer": True},
            "lora": {"lora_rank": 2}, "lora and qformer": {"lora_rank": 2, "train_qformer": True, "gating": "gate", "per": "channel"},
            "merged": {"own_kv": True}, "none": {"gating": "none", "style_head": False}}
HOSTILE = 'x | y <script>alert(1)</script> ```\n# head [a](http://b.c) ![i](d) $m$ @jane www.e.f \u202e*g* _h_ ~~k~~ &lt;'


@pytest.fixture
def quick(monkeypatch):
    """The same settings give the same model object: for tests of what is refused after it is built."""
    kept = {}

    def built(**settings):
        if repr(settings) not in kept:
            kept[repr(settings)] = BUILD(**settings)
        return kept[repr(settings)]

    monkeypatch.setattr(core.Blip2OPTGated, "build", built)


def trained(tiny, **settings):
    """A model whose trained tensors are all drawn, and what save_best would write of it."""
    loop.seed_everything(1)
    model = BUILD(*tiny, STYLES, **settings).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    places = {"blip2": str(tiny[0]), "efficientnet": str(tiny[1]), "qformer": None}
    flags = ["--data", "/home/jane/pictures/artquest", "--lr", "1e-3", "--save-last", "--blip2", places["blip2"]]
    settings = {**places, "gating": "film", "per": "head", "gate_scale": 1.0, "train_qformer": False, "lora_rank": 0, "style_head": True,
                "styles": STYLES, "lm_precision": None, **settings}
    return model, {"stage": "gated", "state": checkpoints.trainable_state(model), "args": vars(train_gated.get_args(flags)),
                   "model_args": settings, "metric": "loss", "value": 1.25, "epoch": 3, "frozen": checkpoints.fingerprint(model),
                   "loss_weights": {"hit_weight": 0.1, "kl_weight": 0.05}, "command": ["train_gated.py", *flags], "torch": "2.9.0",
                   "transformers": "5.0.0"}


def evaluated():
    """Six questions about three pictures and what two systems say."""
    questions = [rows.Row(f"/home/jane/pictures/{i // 2}.jpg", f"/home/jane/pictures/{i // 2}.jpg", f"Question {i}", "red",
                          "style" if i % 2 else "colour", "", i + 2, "/home/jane/pictures/val.csv") for i in range(6)]
    said = ["red", "red", "red", HOSTILE, "red", HOSTILE]
    return questions, {"no image": [{"prediction": "blue"}] * 6, "gated": [{"prediction": text} for text in said]}


@pytest.fixture(scope="module")
def batch(tiny):
    """Three questions of different length with random images."""
    generator, size = torch.Generator().manual_seed(3), published.image_size_of(tiny[0])
    texts = ["Which style is this painting?", "How many boats can be seen in the water?", "Colour?"], ["Pop Art", "three", "red"]
    images = torch.randn(3, 3, size, size, generator=generator)
    return {**core.encode_training(published.load_tokenizer(tiny[0]), *texts), "images": images}


def export(folder, tiny, batch, model, checkpoint, command=("eval_gated.py", "--checkpoint", "/home/jane/runs/best.pt"), **where):
    questions, systems = evaluated()
    table, samples = sharing.scores(questions, systems), sharing.samples(questions, systems["gated"])
    sharing.export(folder, checkpoint, model, table, samples, list(command), batch, **{"blip2": tiny[0], "efficientnet": tiny[1], **where})
    return folder, model, checkpoint


def unchecked(folder, tiny, settings):
    """An exported folder that export itself has not verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "verify", lambda *args, **kwargs: None)
        return export(folder, tiny, None, *trained(tiny, **settings))


@pytest.fixture(scope="module")
def variants(tiny, tmp_path_factory):
    """Function of a name in VARIANTS -> (exported folder, its model, content of its best.pt), made once; not to be changed."""
    return functools.cache(lambda name: unchecked(tmp_path_factory.mktemp("exported") / name, tiny, VARIANTS[name]))


@pytest.fixture
def exported(variants, tmp_path):
    """Function of a name in VARIANTS -> (a copy of the exported folder, its model)."""
    def make(name="film"):
        folder, model, _ = variants(name)
        return pathlib.Path(shutil.copytree(folder, tmp_path / "out")), model
    return make


@pytest.fixture
def load(tiny):
    """load_gated with the places of the random tiny weights."""
    return lambda folder, **more: core.load_gated(folder, **{"blip2": tiny[0], "efficientnet": tiny[1], **more})


def refused(function, *args, **kwargs):
    """The one line of a DataError."""
    with pytest.raises(DataError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def rewrite(folder, change, file=saved.GATES):
    """Change the tensors of an exported file, and its check sum with them: damage that only strict loading can see."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    configure(folder, lambda config: config["sha256"].update({file: hashlib.sha256((folder / file).read_bytes()).hexdigest()}))


def configure(folder, change):
    config = json.loads((folder / saved.CONFIG).read_text())
    change(config)
    (folder / saved.CONFIG).write_text(json.dumps(config))


# --- the same model ------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_folder_gives_the_same_bits(exported, load, batch, variant):
    folder, model = exported(variant)
    again, _ = load(folder)
    wanted, got = checkpoints.trainable_state(model), checkpoints.trainable_state(again)
    assert wanted.keys() == got.keys() and all(checkpoints.same_bits(wanted[name], got[name]) for name in wanted)
    assert checkpoints.same_bits(sharing.logits(model, batch), sharing.logits(again, batch))
    assert not again.training and again.styles == STYLES
    files = {"README.md", saved.CONFIG, saved.GATES} | ({saved.ADAPTER, saved.ADAPTER_CONFIG} if "lora" in variant else set())
    assert {path.name for path in folder.iterdir()} == files
    assert not any("lora_" in name for name in load_file(folder / saved.GATES))
    assert folder.stat().st_mode & 0o777 == 0o755 and all(path.stat().st_mode & 0o777 == 0o644 for path in folder.glob("[Rg]*"))


def test_run_folder_checkpoint_and_export_of_a_real_run_are_the_same(flags, tiny, tmp_path):
    train_gated.main(flags("--lora-rank", "2", "--epochs", "1", "--lr", "1e-2"))
    run = tmp_path / "run"
    checkpoint = checkpoints.load_checkpoint(run / "best.pt")
    model, _ = core.load_gated(run)
    picture = next((pathlib.Path(checkpoint["args"]["data"]) / "images").iterdir())
    collate = train_gated.Collate(model.tokenizer, model.styles, 16)
    row = rows.Row(str(picture), picture.name, "Which style is this?", "Cubism", "style", "Cubism", 2, "val.csv")
    batch = collate([({"images": rows.picture_tensor(picture, model.image_size)}, row)])
    export(tmp_path / "out", tiny, batch, model, checkpoint)
    first = sharing.logits(model, batch)
    for source in (run / "best.pt", str(run), tmp_path / "out"):
        again, _ = core.load_gated(source, blip2=tiny[0], efficientnet=tiny[1])
        assert checkpoints.same_bits(sharing.logits(again, batch), first)
    checkpoints.verify_saved(run / "best.pt", model)
    sharing.verify(run, model, batch)
    assert any("lora_" in name and tensor.any() for name, tensor in checkpoint["state"].items() if "lora_B" in name)


def test_the_snippet_of_the_readme_runs(exported, load, sample):
    folder, _ = exported()
    picture = next((sample / "images").iterdir())
    model, processor = load(folder)
    answers = model.predict_answers(processor(picture), ["What style is this painting?"])
    assert len(answers) == 1 and isinstance(answers[0], str)
    assert "core.load_gated('film')" in (folder / "README.md").read_text()


def test_a_changed_style_dimension_or_layer_is_refused(exported, quick, load):
    folder, _ = exported()
    config = json.loads((folder / saved.CONFIG).read_text())
    model, _ = load(folder)
    assert config["style_dimension"] == model.efficientnet.width and config["layers"] == model.qformer.cross_layers
    for changed in ({"style_dimension": 7}, {"layers": [0]}, {"heads": 3}, {"control_width": 1}, {"style_dimension": None}):
        (folder / saved.CONFIG).write_text(json.dumps({**config, **changed}))
        assert min(changed) in refused(load, folder)


def test_towers_in_half_precision_and_on_the_device_asked_for(exported, load, batch):
    folder, model = exported()
    half, _ = load(folder, dtype=torch.bfloat16)
    assert half.vision_model.dtype == half.language_model.dtype == torch.bfloat16 and half.query_tokens.dtype == torch.float32
    mixed, _ = load(folder, lm_precision="bf16")
    assert mixed.vision_model.dtype == torch.float32 and mixed.language_model.dtype == torch.bfloat16
    assert "none of" in refused(load, folder, lm_precision="int3")
    _, processor = load(folder, device="meta")
    assert processor(Image.new("RGB", (9, 5))).device.type == "meta"


def test_processor_takes_paths_images_and_lists(exported, load, tmp_path):
    model, processor = load(exported()[0])
    image = Image.effect_noise((40, 30), 90).convert("RGBA")
    image.putalpha(100)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png")
    both = processor([tmp_path / "a.png", Image.open(tmp_path / "a.png")])
    assert both.shape == (2, 3, model.image_size, model.image_size) and torch.equal(both[0], both[1])
    assert torch.equal(both[:1], processor(str(tmp_path / "a.png")))
    assert torch.equal(both[0], rows.picture_tensor(tmp_path / "a.png", model.image_size))
    image.convert("RGB").save(tmp_path / "turned.tif", exif=exif)  # Pillow itself turns a TIFF when it is read
    assert torch.equal(processor(tmp_path / "turned.tif"), processor(Image.open(tmp_path / "turned.tif")))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:len(data) // 2])
    assert "cut.png" in refused(processor, tmp_path / "cut.png") and "cut.png" in refused(processor, Image.open(tmp_path / "cut.png"))
    assert "no.png" in refused(processor, "no.png") and "Tensor" in refused(processor, torch.zeros(3, 4, 4))


# --- peft ------------

def test_peft_reads_the_adapter_into_the_published_blip2(tiny, tmp_path):
    from peft import PeftConfig, PeftModel
    from transformers import Blip2ForConditionalGeneration
    folder, model, _ = unchecked(tmp_path / "out", tiny, {"lora_rank": 2, "gating": "none", "style_head": False})
    assert PeftConfig.from_pretrained(folder).r == 2 and PeftConfig.from_pretrained(folder).lora_alpha == 4
    published = Blip2ForConditionalGeneration.from_pretrained(tiny[0]).eval()
    image = torch.randn(2, 5, model.qformer.config.encoder_hidden_size)
    queries = published.query_tokens.expand(2, -1, -1)
    before = published.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    loaded = PeftModel.from_pretrained(published, folder).base_model.model
    after = loaded.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after, model.qformer(queries, image), atol=1e-5)


def test_peft_sets_every_tensor_of_the_adapter(exported, tiny):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights
    folder, model = exported("lora")
    weights = load_peft_weights(str(folder), device="cpu")
    assert weights and all(name.startswith("base_model.model.qformer.encoder.layer.") for name in weights)
    fresh = core.Blip2OPTGated.build(*tiny, STYLES, lora_rank=2)
    inner = {name.removeprefix("base_model.model.qformer."): tensor for name, tensor in weights.items()}
    assert not set_peft_model_state_dict(fresh.qformer, inner).unexpected_keys
    wanted, got = (get_peft_model_state_dict(m.qformer) for m in (model, fresh))
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


# --- changed models ------------

def change_tensor(folder, start):
    """Move one tensor of a published BLIP-2."""
    tensors = load_file(folder / "model.safetensors")
    name = max((n for n in tensors if start in n and n.endswith("weight")), key=lambda n: tensors[n].numel())
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("start, part", [("language_model.model.decoder.layers.0.fc1", "language_model, linear layers"),
                                         ("language_model.model.decoder.embed_positions", "language_model"),
                                         ("vision_model.encoder.layers.1", "vision_model"),
                                         ("qformer.encoder.layer.0.attention", "qformer")])
def test_a_changed_base_model_is_refused(exported, load, tiny, tmp_path, start, part):
    folder, _ = exported()
    other = shutil.copytree(tiny[0], tmp_path / "other")
    change_tensor(pathlib.Path(other), start)
    text = refused(load, folder, blip2=other)
    assert f"(other: {part})" in text and "blip2=" in text and str(other) in text


def test_a_changed_style_classifier_is_refused(exported, load, tiny, tmp_path):
    folder, _ = exported()
    content = torch.load(tiny[1], weights_only=True)
    state, _ = checkpoints.unwrap_state(content, "best.pt")
    state["conv_stem.weight"] += 0.5
    torch.save(content, tmp_path / "other.pt")
    assert "(other: efficientnet)" in refused(load, folder, efficientnet=tmp_path / "other.pt")


def test_a_changed_base_model_of_a_run_is_refused(tiny, load, tmp_path):
    _, checkpoint = trained(tiny)
    checkpoints.save_checkpoint(tmp_path / "run/best.pt", checkpoint)
    load(tmp_path / "run")
    other = shutil.copytree(tiny[0], tmp_path / "other")
    change_tensor(pathlib.Path(other), "vision_model.encoder.layers.1")
    assert "(other: vision_model)" in refused(load, tmp_path / "run", blip2=other)


def test_places_that_are_gone_say_which_argument_gives_them(exported, tiny, tmp_path, monkeypatch):
    folder, _ = exported()
    monkeypatch.chdir(tmp_path)
    assert "blip2=" in refused(core.load_gated, folder, efficientnet=tiny[1])
    assert "efficientnet=" in refused(core.load_gated, folder, blip2=tiny[0])


def test_the_revision_stands_in_the_message(exported, load, tiny, tmp_path):
    folder, _ = exported()
    there = tmp_path / "snapshots" / ("b" * 40)
    shutil.copytree(tiny[0], there)
    change_tensor(there, "vision_model.encoder.layers.1")
    configure(folder, lambda config: config["base_model"].update(revision="a" * 40))
    assert f"revision {'a' * 40} there, {'b' * 40} here" in refused(load, folder, blip2=there)


def test_a_qformer_from_elsewhere_is_kept_only_where_it_is_frozen(tiny, tmp_path, batch, load):
    other = pathlib.Path(shutil.copytree(tiny[0], tmp_path / "other-qformer"))
    change_tensor(other, "qformer.encoder.layer.0.attention")
    for whole in (False, True):
        folder, *_ = export(tmp_path / f"out{whole}", tiny, batch, *trained(tiny, qformer=str(other), train_qformer=whole))
        assert json.loads((folder / saved.CONFIG).read_text())["qformer"] == (None if whole else "other-qformer")
    load(tmp_path / "outTrue")
    assert "qformer=" in refused(load, tmp_path / "outFalse")
    load(tmp_path / "outFalse", qformer=other)


# --- damaged files ------------

def test_damage_that_the_check_sum_cannot_see(exported, quick, load):
    folder, _ = exported("lora")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = next(iter(load_file(folder / saved.GATES)))
    damages = {"missing": lambda t: t.pop(name), "extra": lambda t: t.update(extra=torch.zeros(2)),
               "shape": lambda t: t.update({name: torch.zeros(3, 5, 7)}), "dtype": lambda t: t.update({name: t[name].half()}),
               "other name": lambda t: t.update({name + "x": t.pop(name)})}
    for what, change in damages.items():
        for file in (saved.GATES, saved.ADAPTER):
            name = next(iter(load_file(folder / file)))
            rewrite(folder, change, file)
            text = refused(load, folder)
            assert str(folder) in text and ("dtype" if what == "dtype" else "missing, unknown or of another shape") in text, what
            for file_name, data in kept.items():
                (folder / file_name).write_bytes(data)
    lora = load_file(folder / saved.ADAPTER)
    rewrite(folder, lambda t: t.update({saved.from_peft(n): x for n, x in lora.items()}))
    assert "stands in both" in refused(load, folder)


@pytest.mark.parametrize("file", [saved.GATES, saved.ADAPTER, saved.ADAPTER_CONFIG])
def test_flipped_cut_and_missing_files(exported, quick, load, file):
    folder, _ = exported("lora")
    data = (folder / file).read_bytes()
    for place in (0, 9, len(data) // 2, len(data) - 1):
        (folder / file).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
        assert file in refused(load, folder)
    for size in (0, 5, len(data) - 1):
        (folder / file).write_bytes(data[:size])
        assert file in refused(load, folder)
    (folder / file).unlink()
    assert "missing" in refused(load, folder)


def test_config_damages(exported, quick, load):
    folder, _ = exported()
    config = folder / saved.CONFIG
    text = config.read_text()
    told = {"format": "newer version", "future": "unknown: future", "gating": "gating", "styles sorted": "sorted", "lora_rank": "lora_rank",
            "fingerprints": "other: language_model", "sha256": "not those that were exported", "base_model": "base_model",
            "bool": "gate_scale"}
    changes = {"format": lambda c: c.update(format=2), "future": lambda c: c.update(future=1), "gating": lambda c: c.update(gating="filn"),
               "styles sorted": lambda c: c.update(style_vocabulary=["b", "a"]), "lora_rank": lambda c: c.update(lora_rank="2"),
               "fingerprints": lambda c: c["fingerprints"].update(language_model="0" * 16),
               "sha256": lambda c: c["sha256"].clear(), "base_model": lambda c: c["base_model"].pop("name"),
               "bool": lambda c: c.update(gate_scale=True)}
    for what, change in changes.items():
        configure(folder, change)
        assert told[what] in refused(load, folder), what
        config.write_text(text)
    for name in saved.FIELDS:
        configure(folder, lambda c: c.pop(name))
        assert name in refused(load, folder)
        config.write_text(text)
    for damaged in (text[:-9], "", "[]", "\udcff{", '{"format": "1"}'):
        config.write_bytes(damaged.encode("utf-8", "surrogateescape"))
        assert saved.CONFIG in refused(load, folder)


def test_checkpoints_that_are_none_of_ours(tiny, quick, load, tmp_path):
    _, checkpoint = trained(tiny)
    assert "no best.pt in this folder" in refused(load, tmp_path)
    assert "no such checkpoint" in refused(load, tmp_path / "nothing")
    def told(**changes):
        checkpoints.save_checkpoint(tmp_path / "best.pt", {**checkpoint, **changes})
        return refused(load, tmp_path)
    assert "another stage (cir)" in told(stage="cir")
    assert "unknown: novelty" in told(model_args={**checkpoint["model_args"], "novelty": 1})
    assert "unknown: safe" in told(model_args={**checkpoint["model_args"], "safe": False})
    assert "1 of" in told(state=dict(list(checkpoint["state"].items())[1:]))
    assert "dtype" in told(state={n: t.half() for n, t in checkpoint["state"].items()})
    torch.save({**checkpoint, "args": pathlib.PurePosixPath("x")}, tmp_path / "best.pt")
    assert "nothing of it was run" in refused(load, tmp_path)
    (tmp_path / "best.pt").write_bytes((tmp_path / "best.pt").read_bytes()[:1000])
    assert "damaged" in refused(load, tmp_path)


def test_a_classifier_that_only_pickle_can_load_is_refused(exported, load, tiny, tmp_path):
    folder, _ = exported()
    torch.save({**torch.load(tiny[1], weights_only=True), "more": Foreign()}, tmp_path / "foreign.pt")
    assert "Foreign" in refused(load, folder, efficientnet=tmp_path / "foreign.pt")
    with pytest.warns(UserWarning, match="runs whatever code"):
        load(folder, efficientnet=tmp_path / "foreign.pt", safe=False)


class Foreign:
    """A class that torch's weights-only loader does not know."""


# --- verifying ------------

def test_verify_finds_one_changed_bit(tiny, tmp_path, batch):
    model, checkpoint = trained(tiny)
    checkpoints.save_checkpoint(tmp_path / "best.pt", checkpoint)
    where = {"blip2": tiny[0], "efficientnet": tiny[1]}
    sharing.verify(tmp_path, model, batch, **where)
    checkpoints.verify_saved(tmp_path / "best.pt", model)
    with torch.no_grad():
        bits = model.mapper.norm.bias.view(torch.int32)
        bits[0] ^= 1
    for check in (lambda: sharing.verify(tmp_path, model, batch, **where), lambda: checkpoints.verify_saved(tmp_path / "best.pt", model)):
        text = refused(check)
        assert "1 of" in text and "mapper.norm.bias" in text


def test_verify_compares_the_logits_too(tiny, tmp_path, batch):
    model, checkpoint = trained(tiny)
    checkpoints.save_checkpoint(tmp_path / "best.pt", checkpoint)
    with torch.no_grad():  # between the values that a fingerprint looks at
        model.language_model.model.decoder.layers[0].fc1.weight[3, 1:3] += 0.3
    assert "other logits" in refused(sharing.verify, tmp_path, model, batch, blip2=tiny[0], efficientnet=tiny[1])


def test_verify_leaves_the_model_in_its_mode_and_takes_cached_features(tiny, tmp_path, batch):
    model, checkpoint = trained(tiny)
    checkpoints.save_checkpoint(tmp_path / "best.pt", checkpoint)
    features = model.image_features(batch["images"])
    model.vision_model = None
    model.train()
    cached = {name: x for name, x in batch.items() if name != "images"} | features
    sharing.verify(tmp_path, model, cached, blip2=tiny[0], efficientnet=tiny[1])
    assert model.training and model.mapper.training


def test_other_styles_are_found(tiny, tmp_path, batch):
    model, checkpoint = trained(tiny)
    checkpoints.save_checkpoint(tmp_path / "best.pt", checkpoint)
    model.styles = ["Baroque", *STYLES[1:]]
    assert "style vocabulary" in refused(sharing.verify, tmp_path, model, batch, blip2=tiny[0], efficientnet=tiny[1])


def test_same_bits():
    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert checkpoints.same_bits(nan, nan.clone()) and checkpoints.same_bits(torch.tensor(1.0), torch.tensor(1.0))
    assert not checkpoints.same_bits(zero, -zero) and not checkpoints.same_bits(zero, torch.zeros(2, 1))
    assert not checkpoints.same_bits(zero, torch.zeros(2, dtype=torch.int32))


# --- nothing by halves ------------

@pytest.mark.parametrize("failing", ["save", "rename", "verify", "adapter", "card"])
def test_a_failed_export_leaves_nothing(tiny, variants, tmp_path, batch, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def other(*args, **kwargs):
        raise DataError(f"{args[0]}: other logits")

    if failing == "card":
        writers = iter([files.whole_file] * 3 + [full])
        monkeypatch.setattr(files, "whole_file", lambda *args: next(writers)(*args))
    elif failing == "adapter":
        monkeypatch.setattr("peft.LoraConfig.save_pretrained", full)
    else:
        places = {"save": (files, "whole_file", full), "rename": (os, "rename", full), "verify": (sharing, "verify", other)}
        monkeypatch.setattr(*places[failing])
    text = refused(export, tmp_path / "out", tiny, batch, *variants("lora")[1:])
    assert not list(tmp_path.rglob("*"))
    assert "out: other logits" in text if failing == "verify" else "No space left on device" in text and "nothing of it is left" in text


def test_a_target_that_holds_something_is_refused_and_kept(tiny, tmp_path, batch):
    (tmp_path / "out").mkdir()
    model, checkpoint = trained(tiny)
    export(tmp_path / "out", tiny, batch, model, checkpoint)  # an empty folder is no obstacle
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "is there already" in refused(export, tmp_path / "out", tiny, batch, model, checkpoint)
    assert "not empty" in refused(sharing.refuse_target, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "file").write_text("mine")
    assert "is there already" in refused(export, tmp_path / "file", tiny, batch, model, checkpoint)
    assert (tmp_path / "file").read_text() == "mine"
    sharing.refuse_target(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_not_the_checkpoint_is_not_exported(tiny, tmp_path, batch):
    model, checkpoint = trained(tiny)
    checkpoint["state"] = {name: tensor.clone() for name, tensor in checkpoint["state"].items()}
    checkpoint["state"]["gates.0.scale"] += 1
    text = refused(export, tmp_path / "out", tiny, batch, model, checkpoint)
    assert "gates.0.scale" in text and not (tmp_path / "out").exists()


# --- the model card ------------

@pytest.fixture
def jane(monkeypatch):
    """A user and a machine of known names."""
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "jane")
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu7.lab.example")
    monkeypatch.setattr("platform.node", lambda: "gpu7.lab.example")


def test_no_file_tells_a_path_or_a_name(jane, tiny, variants, tmp_path, batch):
    command = ["eval_gated.py", "--checkpoint", "/home/jane/runs/best.pt", "--images=/data/pics", "--out", "~/jane/x y", "--data",
               "../up/artquest", "--split", "test", "--blip2", "Salesforce/blip2-opt-2.7b"]
    folder, *_ = export(tmp_path / "out", tiny, batch, *variants("lora")[1:], command)
    for path in folder.iterdir():
        text = path.read_text("utf-8", "ignore")
        secrets = ["/home", "jane", "gpu7", str(tmp_path), str(tiny[0]), "/data/"]
        secrets += ["../up", "~/"] if path.suffix != ".safetensors" else []  # too short for random bytes
        assert not [secret for secret in secrets if secret in text.replace("\\@jane", "")], path
    card = (folder / "README.md").read_text()
    assert ("python eval_gated.py --checkpoint .../best.pt --images=.../pics --out '.../x y' --data .../artquest --split test "
            "--blip2 Salesforce/blip2-opt-2.7b\n") in card
    assert "python train_gated.py --data .../artquest --lr 1e-3 --save-last --blip2 .../blip2\n" in card
    assert "of the folder artquest;" in card


def test_card_front_matter_scores_and_choice(exported):
    folder, _ = exported("lora")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert front.startswith("# license: ")
    parsed = yaml.safe_load(front)
    assert parsed["library_name"] == "pytorch" and "lora" in parsed["tags"] and not {"base_model", "license"} & parsed.keys()
    assert "kept: 1.2500 in epoch 3" in text and "validation loss" in text
    assert "val.csv: 6 questions about 3 pictures" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| no image", "| gated"))]
    assert [(line[0], line[1], line[2], line[3]) for line in lines] == [
        ("| no image", "all", "6", "0.0 (0.0 to 0.0)"), ("| gated", "all", "6", lines[1][3]), ("| gated", "colour", "3", lines[2][3]),
        ("| gated", "style", "3", lines[3][3])]
    assert [line[3] for line in lines[1:]] == ["66.7 (50.0 to 100.0)", "100.0 (100.0 to 100.0)", "33.3 (0.0 to 100.0)"]


def test_base_model_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, cached = "Salesforce/blip2-opt-2.7b", f"/home/jane/hub/models--x/snapshots/{'c' * 40}/config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: cached)
    assert sharing.base_model(name, name) == {"name": name, "revision": "c" * 40, "kind": "hub"}
    assert sharing.base_model("tiny", "tiny") == {"name": "tiny", "revision": None, "kind": "tiny"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert sharing.base_model(name, name)["revision"] is None
    assert sharing.base_model("/data/jane/my-blip2", "/data/jane/my-blip2") == {"name": "my-blip2", "revision": None, "kind": "folder"}
    (tmp_path / name).mkdir(parents=True)
    assert sharing.base_model(name, name)["kind"] == "folder" and sharing.base_model("models/a/b", "models/a/b")["kind"] == "folder"
    assert sharing.base_model("a/b", tmp_path / f"snapshots/{'d' * 40}")["revision"] is None  # no such folder
    (tmp_path / f"snapshots/{'d' * 40}").mkdir(parents=True)
    assert sharing.base_model("a/b", tmp_path / f"snapshots/{'d' * 40}")["revision"] == "d" * 40


def test_a_hub_base_stands_in_the_front_matter(tiny, variants, tmp_path, batch):
    _, model, checkpoint = variants("film")
    named = {**checkpoint, "model_args": {**checkpoint["model_args"], "blip2": "someone/some-blip2"}}
    export(tmp_path / "hub", tiny, batch, model, named)
    front = yaml.safe_load((tmp_path / "hub/README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "someone/some-blip2" and "lora" not in front["tags"]


def test_hostile_texts_stay_text():
    escaped = sharing.plain(HOSTILE)
    assert "\n" not in escaped and "\u202e" not in escaped and "<" not in escaped and "&lt;script&gt;" in escaped and "&amp;lt;" in escaped
    bare = escaped
    for letter in "\\`*_{}[]#|~$:@":
        bare = bare.replace("\\" + letter, "")
    assert not set(bare) & set("`*_{}[]#|~$:@") and "www\\." in escaped
    assert len(sharing.plain("a" * 5000)) == 300 and sharing.plain("a" * 300) == "a" * 300


def test_hostile_answers_keep_the_card_whole(tiny, variants, tmp_path, batch):
    folder, *_ = export(tmp_path / "na|me <b>", tiny, batch, *variants("film")[1:])
    card = (folder / "README.md").read_text()
    table = card.split("## Sample answers")[1].splitlines()
    lines = [line for line in table if line.startswith("|")]
    assert len(lines) == 2 + 5 and all(line.replace("\\|", "").count("|") == 5 for line in lines)
    assert "<script>" not in card and "```" not in card and "# na\\|me &lt;b&gt;" in card


def test_samples_do_not_depend_on_the_order():
    questions, systems = evaluated()
    first = sharing.samples(questions, systems["gated"], 3)
    again = sharing.samples(questions[::-1], systems["gated"][::-1], 3)
    assert first == again and len(first) == 3 and all(name == f"{int(question[-1]) // 2}.jpg" for name, question, _, _ in first)


def test_a_command_is_one_line():
    assert sharing.format_command(["a.py", "--x", "one\n\n## two"]) == "a.py --x 'one ## two'"


def test_training_command_of_older_checkpoints_gives_the_settings_again():
    args = train_gated.get_args(["--data", "d", "--lora-rank", "4", "--train-qformer", "--columns", "answer=a", "image=b", "--lr", "3e-4",
                                 "--skip-bad"])
    again = train_gated.get_args(sharing.training_command(vars(args))[2:])
    assert vars(again) == vars(args)
    typed = ["train_gated.py", "--data", "d"]
    assert sharing.training_command(vars(args), typed) == ["python", *typed]


# --- masks and environment ------------

@pytest.mark.parametrize("word, told", [
    ("/home/jane/x.csv", ".../x.csv"), ("data/artquest", "data/artquest"), ("--data=/a/b/", "--data=.../b"),
    ("C:\\Users\\Jane\\a.csv", ".../a.csv"),
    ("/home/jane", ".../<user>"), ("runs/jane_1", "runs/<user>_1"), ("https://jane:secret@h.x/y", "https://..."),
    ("/a/b:/c/d", ".../b:.../d"),
    ("~/a", ".../a"), ("../../a", ".../a"), ("coco=/a/coco", "coco=.../coco"), ("1e-3", "1e-3"), ("Salesforce/blip2", "Salesforce/blip2"),
    ("gpu7", "<host>"), ("a.gpu7.lab.example", "a.<host>"),
    ("janes", "janes"), ("xjane", "xjane"), ("/x/y=3", ".../y=3"), ("--endpoint=http://gpu7:80", "--endpoint=http://..."),
    ("/", ".../")])
def test_masked(jane, word, told):
    assert environment.masked(word) == told


def test_environment_tells_much_and_masks(jane, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/home/jane/hf")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/jane/lib:/usr/lib")
    told = environment.environment()
    for name in (*environment.PACKAGES, "python", "platform", "processors", "memory", "project", "cuda", "free disk, this folder"):
        line, = [line for line in told.splitlines() if line.startswith(name + " ")]
        assert "cannot be told" not in line and len(line.split()) > 1
    assert [line.split()[1] for line in told.splitlines() if line.startswith("HF_HOME ")] == [".../hf"]
    assert torch.__version__.partition("+")[0] in told and "OMP_NUM_THREADS" in told and ".../lib:.../lib" in told
    assert "jane" not in told and "/home" not in told and "gpu7" not in told and "secret" not in told


def test_environment_of_a_broken_installation(monkeypatch):
    real = environment.importlib.metadata.version

    def version(name):
        if name == "bitsandbytes":
            raise environment.importlib.metadata.PackageNotFoundError(name)
        if name == "timm":
            raise ValueError("damaged metadata")
        return real(name)

    def broken(*args):
        raise RuntimeError("driver")

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(environment, "project_version", broken)
    lines = dict(line.split(None, 1) for line in environment.environment().splitlines())
    assert lines["bitsandbytes"] == "not installed" and lines["timm"] == "cannot be told (ValueError)"
    assert lines["cuda"] == lines["project"] == "cannot be told (RuntimeError)" and lines["numpy"][0].isdigit()


def test_graphics_cards_are_named(monkeypatch):
    card = type("Card", (), {"name": "A100", "total_memory": 80 * 2**30})
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 2), ("get_device_properties", lambda number: card)):
        monkeypatch.setattr(torch.cuda, name, value)
    assert environment._cuda().endswith("; A100 80 GiB, A100 80 GiB")


def test_core_env_from_the_command_line(forker):
    done, = forker.run([core.__file__, "--env"])
    assert done.returncode == 0 and "transformers" in done.stdout and "Traceback" not in done.stderr
    assert str(pathlib.Path.home()) + "/" not in done.stdout
