"""pytest tests/engine/test_towers.py: a Q-Former from elsewhere and the vision tower that it is put behind, on random tiny weights.
Behaviour-checked."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import core
import pretrain_qformer
import pretrain_stage2
import train_cir
import train_gated
from conftest import prepared
from engine import checkpoints, published, stage1, towers
from engine.errors import DataError
from test_cir import drawn, random_retrieval, to_lavis  # noqa: F401

NORM = "vision_model.post_layernorm."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_retrieval(tmp_path_factory.mktemp("models"))


def changed(folder, place, change):
    """A copy of a model's folder whose tensors went through change(name, tensor)."""
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    save_file({n: change(n, t).contiguous() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return str(place)


def other_norm(name, tensor):
    return tensor + 0.25 if name.startswith(NORM) else tensor


def other_tower(name, tensor):
    return tensor * 1.02 if name.endswith("layers.1.mlp.fc1.weight") else tensor


def norm_of(tower):
    return {n: t.clone() for n, t in tower.post_layernorm.state_dict().items()}


def as_lavis(folder, file, tower=False):
    """The folder's Q-Former as LAVIS keeps it, ln_vision in float32 and moved by 0.25; with `tower` its visual_encoder too."""
    state = {n: t for n, t in load_file(f"{folder}/model.safetensors").items() if not n.startswith("vision_model.") or n.startswith(NORM)}
    lavis = to_lavis({n: other_norm(n, t.float()) for n, t in state.items()})
    assert "ln_vision.weight" in lavis
    if tower:
        for name, tensor in load_file(f"{folder}/model.safetensors").items():
            inner = name.removeprefix("vision_model.")
            if inner != name and not name.startswith(NORM) and "qkv.bias" not in name:
                for old, new in reversed(towers.LAVIS_TOWER[1:]):
                    inner = inner.replace(new, old)
                lavis["visual_encoder." + inner] = tower(name, tensor)
    torch.save({"model": lavis}, file)
    return str(file)


# --- ln_vision ------------

@pytest.mark.parametrize("kind", ["folder", "lavis"])
def test_the_ln_vision_comes_with_its_qformer_in_retrieval(folder, tmp_path, kind, capsys):
    source = changed(folder, tmp_path / "other", other_norm) if kind == "folder" else as_lavis(folder, tmp_path / "q.pth")
    own, model = core.Blip2Retrieval.load(folder), core.Blip2Retrieval.load(folder, source)
    assert torch.equal(model.vision_model.post_layernorm.weight, own.vision_model.post_layernorm.weight + 0.25)
    assert torch.equal(model.vision_model.post_layernorm.bias, own.vision_model.post_layernorm.bias + 0.25)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and "with its ln_vision" in told[0] and ("cannot be told" in told[0]) == (kind == "lavis")


def test_a_file_of_gigabytes_is_mapped_and_not_read_twice(folder, tmp_path, monkeypatch):
    file, old = as_lavis(folder, tmp_path / "q.pth", tower=other_tower), tmp_path / "old.pth"
    torch.save(torch.load(file), old, _use_new_zipfile_serialization=False)  # torch before 1.6: it cannot be mapped
    mapped, real = [], torch.load

    def load(path, **settings):
        mapped.append((path.name, settings["mmap"]))
        return real(path, **settings)
    monkeypatch.setattr(torch, "load", load)
    models = [core.Blip2Retrieval.load(folder, place).state_dict() for place in (file, str(old))]
    assert set(mapped) == {("q.pth", True), ("old.pth", False)}
    assert models[0].keys() == models[1].keys() and all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_half_a_norm_is_refused(folder, tmp_path):
    file = as_lavis(folder, tmp_path / "q.pth")
    lavis = torch.load(file)["model"]
    del lavis["ln_vision.bias"]
    torch.save(lavis, file)
    with pytest.raises(DataError, match="ln_vision"):
        core.Blip2Retrieval.load(folder, file)


def test_training_of_gates_uses_the_ln_vision_with_and_without_a_cache(flags, tiny, tmp_path, capsys):
    """Also the features of a cache: those of another norm are other features, and never taken for these."""
    source, cache = changed(tiny[0], tmp_path / "other", other_norm), ("--cache", str(tmp_path / "cache"))
    more = ("--qformer", source)
    before, _ = prepared(train_gated.get_args(flags(*cache)))
    run, parts = prepared(train_gated.get_args(flags(*more)))
    own = published.load_vision(tiny[0])[0]
    assert torch.equal(run.model.vision_model.post_layernorm.weight, own.post_layernorm.weight + 0.25)
    assert capsys.readouterr().out.count("with its ln_vision") == 1
    kept_run, kept = prepared(train_gated.get_args(flags(*more, *cache)))
    sample, row = kept.train[0, 0] if isinstance(kept.train[0], DataError) else kept.train[0]
    pixels, _ = parts.train[0]
    with torch.no_grad():
        wanted = run.model.vision_model(pixel_values=pixels["images"][None]).last_hidden_state[0]
    assert torch.allclose(sample["image_embeds"], wanted, atol=1e-4)
    assert kept_run.frozen == run.frozen != before.frozen
    assert len(list((tmp_path / "cache").glob("vision-*.rows"))) == 2


def test_a_trained_retrieval_keeps_the_ln_vision_of_its_qformer(drawn, folder, tmp_path):  # noqa: F811
    source = as_lavis(folder, tmp_path / "q.pth")
    more = ["--qformer", source, "--cache", str(tmp_path / "cache")]
    args = ["--data", str(drawn), "--blip2", folder, "--epochs", "1", "--batch-size", "32", "--workers", "0", "--precision", "no"]
    assert train_cir.main([*args, "--out", str(tmp_path / "run"), *more]) is None
    _, model, _ = train_cir.load_best(train_cir.get_args([*args, "--checkpoint", str(tmp_path / "run")]))
    own = published.load_vision(folder)[0]
    assert torch.equal(model.vision_model.post_layernorm.bias, own.post_layernorm.bias + 0.25)


# --- another tower ------------

def test_a_qformer_of_another_tower_is_refused(folder, tiny, tmp_path):
    with pytest.raises(DataError, match="another vision tower.*layers.1.mlp.fc1.weight.*give --blip2"):
        core.Blip2Retrieval.load(folder, changed(folder, tmp_path / "other", other_tower))
    with pytest.raises(DataError, match="another vision tower"):
        core.Blip2OPTGated.build(*tiny, [], gating="none", qformer=changed(tiny[0], tmp_path / "opt", other_tower))


def test_the_same_tower_in_another_precision_is_the_same(folder, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        source = changed(folder, tmp_path / str(dtype), lambda name, t: t.to(dtype))
        for own in (torch.float32, torch.bfloat16, torch.float16):
            core.Blip2Retrieval.load(folder, source, own)


def test_a_visual_encoder_is_left_out_and_said(folder, tmp_path, capsys):
    core.Blip2Retrieval.load(folder, as_lavis(folder, tmp_path / "same.pth", lambda name, tensor: tensor))
    core.Blip2Retrieval.load(folder, as_lavis(folder, tmp_path / "tuned.pth", other_tower))
    same, tuned = capsys.readouterr().out.splitlines()
    assert "visual_encoder is left out" in same and "fine-tuned" not in same and "cannot be told" not in same
    assert "visual_encoder is left out" in tuned and "1 of them" in tuned and "fine-tuned" in tuned


def test_a_start_behind_another_tower_is_said_and_keeps_the_towers_norm(folder, tmp_path):
    source, said = changed(folder, tmp_path / "other", lambda n, t: other_tower(n, other_norm(n, t))), []
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", folder, "--init", source])
    model = pretrain_qformer.load_model(args, torch.float32, said.append)
    assert model.ln_vision == {} and "another vision tower" in said[0]
    own = published.load_vision(folder)[0]
    assert torch.equal(model.vision_model.post_layernorm.weight, own.post_layernorm.weight)


# --- another language model ------------

def stage2_of(folder, path, precision="no", lm_precision=None):
    """A best.pt of pretrain_stage2.py, as it stands after no step."""
    more = ["--lm-precision", lm_precision] if lm_precision else []
    args = pretrain_stage2.get_args(["--data", "x=y", "--blip2", folder, *more])
    model = core.Blip2OPTGated.build(folder, None, [], "none", dtype=core.DTYPES[precision], train_qformer=True, lm_precision=lm_precision)
    content = {"stage": "stage2", **pretrain_stage2.best_of(args, model, checkpoints.fingerprint(model), precision)}
    checkpoints.save_checkpoint(path, content)
    return str(path)


def behind(folder, source, precision="no", lm_precision=None):
    return core.Blip2OPTGated.build(folder, None, [], "none", qformer=source, dtype=core.DTYPES[precision], lm_precision=lm_precision)


def other_reader(name):
    """Change of the one tensor of a language model whose name ends so."""
    return lambda own, tensor: tensor * 1.02 if own.startswith("language_model.") and own.endswith(name) else tensor


@pytest.mark.parametrize("name", ["layers.1.fc1.weight", "embed_positions.weight"])
def test_a_qformer_of_another_language_model_is_refused(tiny, tmp_path, name):
    """Of the same shapes throughout: nothing else would tell."""
    best, other = stage2_of(tiny[0], tmp_path / "best.pt"), changed(tiny[0], tmp_path / "other", other_reader(name))
    with pytest.raises(DataError, match="best.pt: .*another language model than that of .*other .*fingerprint.*give --blip2"):
        behind(other, best)
    with pytest.raises(DataError, match=f"other: .*another language model than that of .*1 differ, first .*{name}"):
        behind(tiny[0], other)


def test_training_of_gates_refuses_the_qformer_of_another_language_model(flags, tiny, tmp_path):
    best, other = stage2_of(tiny[0], tmp_path / "best.pt"), changed(tiny[0], tmp_path / "other", other_reader("layers.1.fc1.weight"))
    for more in ([], ["--cache", str(tmp_path / "cache")]):
        with pytest.raises(DataError, match="another language model"):
            prepared(train_gated.get_args(flags("--blip2", other, "--qformer", best, *more)))


@pytest.mark.parametrize("then", ["no", "bf16", "fp16"])
def test_the_same_language_model_in_another_precision_is_the_same(tiny, tmp_path, capsys, then):
    """Also where float16 on one side alone has moved the values, float32 ones here, and nothing can be told."""
    best = stage2_of(tiny[0], tmp_path / "best.pt", then)
    half = changed(tiny[0], tmp_path / "half", lambda name, tensor: tensor.to(core.DTYPES[then]))
    capsys.readouterr()
    for now in ("no", "bf16", "fp16"):
        behind(tiny[0], best, now)
        of_file, of_tower = capsys.readouterr().out.splitlines()
        unknown = then != now and "fp16" in (then, now) and (then, now) != ("fp16", "no")
        assert ("cannot be told" in of_file) == ("cannot be told" in of_tower) == unknown
        assert ("is the one it was trained with" in of_file) != unknown
        behind(tiny[0], half, now)
        assert "is the one it was trained with" in capsys.readouterr().out


@pytest.mark.parametrize("packed", ["int8", "nf4"])
def test_a_packed_language_model_is_the_same_and_another_one_is_not(tiny, tmp_path, packed):
    pytest.importorskip("bitsandbytes")
    for then, now in ((packed, None), (None, packed)):
        behind(tiny[0], stage2_of(tiny[0], tmp_path / "best.pt", lm_precision=then), lm_precision=now)
    behind(tiny[0], changed(tiny[0], tmp_path / "same", lambda name, tensor: tensor), lm_precision=packed)
    other = changed(tiny[0], tmp_path / "other", other_reader("embed_positions.weight"))
    for source in (tmp_path / "best.pt", tiny[0]):
        with pytest.raises(DataError, match="another language model"):
            behind(other, str(source), lm_precision=packed)


def test_the_projection_of_a_lavis_file_is_said_once(tiny, tmp_path, capsys):
    """It names no language model."""
    torch.save({"model": {name.replace("t5_proj.", "opt_proj."): tensor for name, tensor in to_lavis(
        {n: t for n, t in load_file(f"{tiny[0]}/model.safetensors").items() if not n.startswith(("vision_", "language_model."))}).items()}},
        tmp_path / "stage2.pth")
    behind(tiny[0], str(tmp_path / "stage2.pth"))
    told = [line for line in capsys.readouterr().out.splitlines() if "its projection" in line]
    assert len(told) == 1 and "stage2.pth: with its projection" in told[0] and f"cannot be told, that of {tiny[0]} is taken" in told[0]


# --- --convert and OUT/hf ------------

def convert(file, blip2, out):
    return pretrain_qformer.main(["--convert", str(file), "--blip2", str(blip2), "--out", str(out)])


def best_of(folder, path, init="random", dtype=torch.float32, precision="no"):
    """A best.pt of pretrain_qformer.py, as it stands after no step -> its model."""
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", str(folder), "--init", init])
    model = pretrain_qformer.load_model(args, dtype, lambda line: None)
    content = {"stage": "qformer", **pretrain_qformer.best_of(args, model, checkpoints.fingerprint(model), precision)}
    checkpoints.save_checkpoint(path, content)
    return model


def test_convert_refuses_the_tower_of_another_training(folder, tmp_path):
    best_of(folder, tmp_path / "best.pt")
    with pytest.raises(DataError, match="another vision tower.*fingerprint"):
        convert(tmp_path / "best.pt", changed(folder, tmp_path / "other", other_norm), tmp_path / "a")
    with pytest.raises(DataError, match="another vision tower.*fingerprint"):
        core.Blip2Retrieval.load(changed(folder, tmp_path / "third", lambda n, t: t * 2 if "fc1" in n else t), tmp_path / "best.pt")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_convert_takes_the_tower_of_the_training_in_any_precision(folder, tmp_path, precision):
    best_of(folder, tmp_path / "best.pt", as_lavis(folder, tmp_path / "q.pth"), core.DTYPES[precision], precision)
    convert(tmp_path / "best.pt", folder, tmp_path / "run")
    check_exported(folder, tmp_path / "run/hf", 0.25)


def check_exported(folder, out, moved):
    """OUT/hf holds the source's tower to the bit, in its dtype, and the ln_vision as its file had it."""
    own, written = load_file(f"{folder}/model.safetensors"), load_file(out / "model.safetensors")
    tower = [name for name in own if name.startswith("vision_model.")]
    for name in tower:
        wanted = own[name] + moved if name.startswith(NORM) else own[name]
        assert written[name].dtype == wanted.dtype and torch.equal(written[name], wanted), name
    assert tower and {n for n in written if n.startswith("vision_model.")} == set(tower)


def test_convert_of_a_lavis_file_keeps_tower_and_norm_as_they_are(folder, tmp_path):
    assert load_file(f"{folder}/model.safetensors")["vision_model.post_layernorm.weight"].dtype == torch.float32
    convert(as_lavis(folder, tmp_path / "q.pth"), folder, tmp_path / "run")
    check_exported(folder, tmp_path / "run/hf", 0.25)


def test_a_training_in_half_precision_exports_the_towers_own_values(folder, tmp_path):
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", folder, "--init", "random"])
    model = pretrain_qformer.load_model(args, torch.bfloat16, lambda line: None)
    run = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True), progress={"value": 1.0}, out=tmp_path, model=model)
    checkpoints.save_checkpoint(tmp_path / "best.pt", {"state": checkpoints.trainable_state(model)})
    pretrain_qformer.export_best(run, args)
    check_exported(folder, tmp_path / "hf", 0.0)


def test_the_end_of_a_training_refuses_a_tower_that_was_changed_meanwhile(folder, tmp_path):
    place = changed(folder, tmp_path / "blip2", lambda name, tensor: tensor)
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", place, "--init", "random"])
    model = best_of(place, tmp_path / "best.pt")
    run = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True), progress={"value": 1.0}, out=tmp_path, model=model)
    pretrain_qformer.export_best(run, args)
    check_exported(folder, tmp_path / "hf", 0.0)
    shutil.rmtree(place)
    changed(folder, tmp_path / "blip2", other_tower)
    with pytest.raises(DataError, match="another one than when this training began.*fc1.*--convert"):
        pretrain_qformer.export_best(run, args)


# --- the exports in every stage that their message names ------------

@pytest.fixture
def with_image_token(folder, tmp_path):
    """The folder as transformers' conversion leaves it: <image> in the tokenizer, and no row for it."""
    from transformers import Blip2Processor, BlipImageProcessor
    place = tmp_path / "itm"
    shutil.copytree(folder, place)
    rows = load_file(place / "model.safetensors")["embeddings.word_embeddings.weight"].shape[0]
    for file in place.glob("*token*.json"):  # the row after BERT's words is [DEC]'s in the published model
        file.write_text(file.read_text().replace('"<image>"', '"[DEC]"'))
    tokenizer = published.load_tokenizer(str(place))
    assert len(tokenizer) == rows
    Blip2Processor(BlipImageProcessor(), tokenizer).save_pretrained(place)
    assert len(published.load_tokenizer(str(place))) == rows + 1
    return str(place)


def bert(folder, place):
    from transformers import BertConfig, BertForMaskedLM
    tokenizer = published.load_tokenizer(folder)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
                               max_position_embeddings=48)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("init", ["random", "bert", "itm"])
def test_every_stage_takes_the_export_that_names_it(with_image_token, tmp_path, init):
    from transformers import Blip2ForImageTextRetrieval
    start = {"random": "random", "bert": bert(with_image_token, tmp_path / "bert"), "itm": with_image_token}[init]
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", with_image_token, "--init", start])
    model = pretrain_qformer.load_model(args, torch.float32, lambda line: None)
    out = str(tmp_path / "hf")
    stage1.export(model, tmp_path / "hf")
    Blip2ForImageTextRetrieval.from_pretrained(out)
    base = out if init == "bert" else with_image_token  # a BERT's Q-Former has sizes of its own
    for more in (["--blip2", out], ["--blip2", base, "--qformer", out]):
        cir = train_cir.load_model(train_cir.get_args(["--data", "x", *more]), torch.float32)
        assert torch.equal(cir.text_projection.weight, model.text_projection.weight)
        ids = core.text_ids(cir.tokenizer, ["two boats <image> and a house"])["input_ids"]
        assert ids.max() < len(cir.embeddings.word_embeddings.weight)
        cir.embeddings(ids)
    again = pretrain_qformer.load_model(pretrain_qformer.get_args(["--data", "x=y", "--blip2", out, "--init", out]), torch.float32)
    assert torch.equal(again.text_projection.weight, model.text_projection.weight)


def test_a_word_without_a_row_is_refused_and_a_mark_is_not(with_image_token):
    tokenizer, words = published.load_tokenizer(with_image_token), len(published.load_tokenizer(with_image_token)) - 1
    published.refuse_other_tokenizer(tokenizer, words, "here")
    assert tokenizer(["a <image>"]).input_ids[0] == tokenizer("a < image >").input_ids
    with pytest.raises(DataError, match="do not belong together"):
        published.refuse_other_tokenizer(published.load_tokenizer(with_image_token), words - 2, "here")
    more = published.load_tokenizer(with_image_token)
    more.add_tokens(["zebra"])
    with pytest.raises(DataError, match=f"{words + 2} tokens"):
        published.refuse_other_tokenizer(more, words, "here")


def test_the_captioner_and_the_language_model_take_such_a_tokenizer_too(tiny, tmp_path):
    from transformers import AddedToken
    import train_blip_caption
    for source, load in ((published.tiny("blip"), train_blip_caption.load_blip), (tiny[0], published.load_blip2)):
        place = tmp_path / load.__name__
        shutil.copytree(source, place)
        tokenizer, config = published.load_tokenizer(source), json.loads((place / "config.json").read_text())
        marks = [AddedToken(f"<mark{n}>", special=True) for n in range(config["text_config"]["vocab_size"] + 1 - len(tokenizer))]
        tokenizer.add_tokens(marks, special_tokens=True)
        tokenizer.save_pretrained(place)
        model, loaded = load(str(place))
        assert len(loaded) > config["text_config"]["vocab_size"] > max(loaded(f"a {marks[-1]} b").input_ids)
