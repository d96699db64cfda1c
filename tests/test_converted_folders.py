"""pytest tests/test_converted_folders.py: the folders that transformers' own conversion scripts make of the published BLIP-2 and BLIP,
in every stage that takes a folder. Behaviour-checked.

Configs, names of tensors, special tokens and processors are theirs, the sizes shrunk, the weights random, the words those of OPT and
bert-base-uncased (../shared/data/tokenizers; Flan-T5's are not there, its tokenizer is one of the same kind with few words). The
table is also in data/README.md.
"""

import json
import os
import pathlib
import re
import shutil

import pytest
import torch
from torch import nn

import core
import pretrain_qformer
import pretrain_stage2
import train_blip_caption
import train_cir
import train_gated
from data import rows
from engine import errors, loop, published
from engine.errors import DataError
from test_cir import drawn  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = pathlib.Path(os.environ.get("SHARED_DATA") or ROOT / "../shared/data") / "tokenizers"
SIZE = 56
FOLDERS = ("blip2-opt-2.7b", "blip2-flan-t5-xl", "blip2-itm-vit-g", "blip-image-captioning-base", "blip-itm-base")


# --- as the conversion scripts write them ------------

def spread(model):
    """The library starts small widths so near to zero that all pictures look alike."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def opt_tokenizer(folder):
    """As facebook/opt-2.7b has it: GPT-2's class, </s> at both ends, which begins a text."""
    from transformers import AutoTokenizer
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((WORDS / "opt" / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, "errors": "replace", "bos_token": "</s>",
        "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}))
    return AutoTokenizer.from_pretrained(folder)


def t5_tokenizer(folder):
    """As google/flan-t5-xl has it, of few words: a unigram model, <pad> 0, </s> 1, <unk> 2, the hundred <extra_id> last."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, decoders, processors
    from transformers import T5TokenizerFast
    marks = [f"<extra_id_{n}>" for n in range(99, -1, -1)]
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in "a the of in two three style boat".split()),
              *map(chr, range(33, 127)), *marks]
    model = Tokenizer(models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], unk_id=2))
    model.normalizer, model.decoder = normalizers.NFKC(), decoders.Metaspace()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=100)


def bert_tokenizer(folder, **settings):
    from transformers import AutoTokenizer
    folder.mkdir()
    (folder / "vocab.txt").write_bytes((WORDS / "bert_base_uncased/vocab.txt").read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True,
                                                              "model_max_length": 512}))
    return AutoTokenizer.from_pretrained(folder, **settings)


def tower():
    """One vision tower for all BLIP-2, as the published ones share EVA's ViT-g."""
    from transformers import Blip2VisionConfig, Blip2VisionModel
    loop.seed_everything(0)
    return spread(Blip2VisionModel(Blip2VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                                     image_size=SIZE, patch_size=14)))


def save_blip2(folder, tokenizer, qformer, text=None):
    """convert_blip_2_original_to_pytorch.py: with a language model's config Blip2ForConditionalGeneration, else image-text-retrieval."""
    from transformers import (Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor, Blip2QFormerConfig,
                              BlipImageProcessor)
    vision = tower()
    form = Blip2QFormerConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=32,
                              **qformer)
    sizes = {"vision_config": vision.config.to_dict(), "qformer_config": form.to_dict(), "image_text_hidden_size": 32}
    if text is not None:
        sizes["text_config"] = text.to_dict()
    model = spread((Blip2ForImageTextRetrieval if text is None else Blip2ForConditionalGeneration)(Blip2Config(**sizes)))
    model.vision_model.load_state_dict(vision.state_dict())
    nn.init.normal_(model.query_tokens)
    model.tie_weights()
    pixels = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD)
    Blip2Processor(pixels, tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)


def save_blip(folder, tokenizer, kind):
    """convert_blip_original_pytorch_to_hf.py, with the processor that the published folders have."""
    import transformers
    text = transformers.BlipTextConfig(hidden_size=64, encoder_hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4)
    vision = transformers.BlipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                           image_size=SIZE, patch_size=14)
    config = transformers.BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    model = spread(getattr(transformers, kind)(config))
    model.tie_weights()
    model.save_pretrained(folder)
    pixels = transformers.BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD)
    transformers.BlipProcessor(pixels, tokenizer).save_pretrained(folder)


def save_bert(folder, tokenizer):
    """google-bert/bert-base-uncased, where a Q-Former starts."""
    from transformers import BertConfig, BertForMaskedLM
    BertForMaskedLM(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name: folder} of FOLDERS, and of a bert-base-uncased."""
    from transformers import OPTConfig, T5Config
    if not (WORDS / "opt/vocab.json").is_file():
        pytest.skip(f"no words of OPT and BERT in {WORDS}")
    root = tmp_path_factory.mktemp("published")
    opt, bert, t5 = opt_tokenizer(root / "opt"), bert_tokenizer(root / "words"), t5_tokenizer(root / "t5")
    end_of_line = [tokenizer("\n", add_special_tokens=False).input_ids[:1] for tokenizer in (opt, t5)]
    save_blip2(root / FOLDERS[0], opt, {}, OPTConfig(
        vocab_size=50272, hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=end_of_line[0][0]))
    save_blip2(root / FOLDERS[1], t5, {}, T5Config(
        vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", dense_act_fn="gelu",
        bos_token_id=1, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False))
    itm = bert_tokenizer(root / "itm", truncation_side="right")
    itm.add_special_tokens({"bos_token": "[DEC]"})
    save_blip2(root / FOLDERS[2], itm, {"vocab_size": 30523, "use_qformer_text_input": True})
    save_blip(root / FOLDERS[3], bert, "BlipForConditionalGeneration")
    save_blip(root / FOLDERS[4], bert, "BlipForImageTextRetrieval")
    save_bert(root / "bert-base-uncased", bert)
    torch.manual_seed(0)
    return {path.name: str(path) for path in root.iterdir()}


# --- the table: every stage that takes a folder, and every folder ------------

OPT, T5, ITM, BLIP, BLIP_ITM = FOLDERS
STAGES = {  # (script and flag, its module, the flag's value -> the command line after --data)
    "train_gated.py --blip2": (train_gated, lambda here, known: ["--blip2", here]),
    "train_gated.py --qformer": (train_gated, lambda here, known: ["--blip2", known[OPT], "--qformer", here]),
    "pretrain_stage2.py --blip2": (pretrain_stage2, lambda here, known: ["--blip2", here]),
    "pretrain_stage2.py --qformer": (pretrain_stage2, lambda here, known: ["--blip2", known[OPT], "--qformer", here]),
    "train_cir.py --blip2": (train_cir, lambda here, known: ["--blip2", here]),
    "train_cir.py --qformer": (train_cir, lambda here, known: ["--blip2", known[ITM], "--qformer", here]),
    "pretrain_qformer.py --blip2": (pretrain_qformer, lambda here, known: ["--blip2", here, "--init", known["bert-base-uncased"]]),
    "pretrain_qformer.py --init": (pretrain_qformer, lambda here, known: ["--blip2", known[ITM], "--init", here]),
    "train_blip_caption.py --blip": (train_blip_caption, lambda here, known: ["--blip", here])}
NO_BLIP2 = r"a blip model and (not|neither) a BLIP-2.*: give Salesforce/"
NO_TEXT = r"Blip2ForConditionalGeneration\): give Salesforce/blip2-itm-vit-g"
NO_QFORMER = r"no Q-Former in .*: give a BLIP-2's folder"
NO_BLIP = r"a blip-2 model and not a BLIP .*: give Salesforce/blip-image-captioning-base"
# (stage, folder): why it is refused and what would work; every other pair is taken. data/README.md has the same table
REFUSED = {
    **{(f"{script} --blip2", folder): why for script in ("train_gated.py", "pretrain_stage2.py") for folder, why in (
        (ITM, r"for image-text retrieval and not one that answers.*: give Salesforce/blip2-opt-2.7b"), (BLIP, NO_BLIP2),
        (BLIP_ITM, NO_BLIP2))},
    **{(f"{script} --qformer", folder): why for script in ("train_gated.py", "pretrain_stage2.py") for folder, why in (
        (T5, "speaks to another language model .t5, here opt.: give that of a BLIP-2 with opt"), (BLIP, NO_QFORMER),
        (BLIP_ITM, NO_QFORMER))},
    ("train_cir.py --blip2", OPT): NO_TEXT, ("train_cir.py --blip2", T5): NO_TEXT,
    ("train_cir.py --blip2", BLIP): NO_BLIP2, ("train_cir.py --blip2", BLIP_ITM): NO_BLIP2,
    **{("train_cir.py --qformer", folder): "no embeddings.*: give an image-text-retrieval folder" for folder in (OPT, T5)},
    ("train_cir.py --qformer", BLIP): NO_QFORMER, ("train_cir.py --qformer", BLIP_ITM): NO_QFORMER,
    ("pretrain_qformer.py --blip2", BLIP): NO_BLIP2, ("pretrain_qformer.py --blip2", BLIP_ITM): NO_BLIP2,
    **{("pretrain_qformer.py --init", folder): "whose Q-Former reads text: give such a folder, or start from a BERT"
       for folder in (OPT, T5, BLIP, BLIP_ITM)},
    **{("train_blip_caption.py --blip", folder): NO_BLIP for folder in (OPT, T5, ITM)},
    ("train_blip_caption.py --blip", BLIP_ITM): r"for image-text retrieval and not one that writes.*: give Salesforce/blip-image-c",
}


@pytest.fixture
def rehearse(places, few, tiny, drawn, capsys):  # noqa: F811
    """Function: a stage and a folder -> (exit code, stdout, stderr) of its --dry-run."""
    data = {train_gated: [str(few), "--efficientnet", tiny[1]], train_cir: [str(drawn)], pretrain_qformer: [f"few={few}"],
            pretrain_stage2: [f"few={few}"],
            train_blip_caption: [str(few)]}

    def run(stage, folder):
        module, flags = STAGES[stage]
        code = errors.exit_code(module.main, ["--data", *data[module], *flags(places[folder], places), "--dry-run", "--workers", "0",
                                              "--batch-size", "4", "--precision", "no"])
        return code, *capsys.readouterr()
    return run


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_published_folder_is_taken_or_refused_in_one_line(rehearse, stage, folder):
    code, out, err = rehearse(stage, folder)
    if (stage, folder) not in REFUSED:
        assert not code and "sum, computed" in out, err[-3000:]
        return
    fault, *below = err[err.index("error: "):].rstrip("\n").split("\n")
    assert code == 2 and "sum, computed" not in out and all(line.startswith("  the shortest way: ") for line in below), err[-3000:]
    assert folder in fault
    assert re.search(REFUSED[stage, folder], fault), fault


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_was_saved_quantised_is_told_so(rehearse, places, tmp_path, monkeypatch, stage):
    folder = next(folder for folder in FOLDERS if (stage, folder) not in REFUSED)
    place = tmp_path / folder
    shutil.copytree(places[folder], place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    monkeypatch.setitem(places, "quantised", str(place))
    code, _, err = rehearse(stage, "quantised")
    assert code == 2 and f"{place}: saved quantised (bitsandbytes)" in err and "give the folder that it was made from" in err, err[-3000:]


@pytest.mark.parametrize("name, form", [("preprocessor_config.json", lambda told: told),
                                        ("processor_config.json", lambda told: {"image_processor": told})])
def test_a_folder_of_other_colours_is_refused(tmp_path, name, form):
    """Every picture has BLIP's mean and deviation here, whatever a folder asks for."""
    folder = pathlib.Path(shutil.copytree(published.tiny("blip2"), tmp_path / "blip2"))
    told = {"image_mean": list(rows.BLIP_MEAN), "image_std": list(rows.BLIP_STD)}
    for present in (told, {}, {**told, "image_std": [0.2686295, 0.2613026, 0.2757771]}):  # what is not there is not known; rounded
        (folder / name).write_text(json.dumps(form(present)))
        published.load_blip2(str(folder))
    (folder / name).write_text(json.dumps(form({**told, "image_mean": [0.5, 0.5, 0.5]})))
    with pytest.raises(DataError, match=r"image_mean \[0.5, 0.5, 0.5\] and image_std .* here they have BLIP's .*other colours"):
        published.load_blip2(str(folder))


def test_a_qformer_of_t5_goes_behind_t5(places):
    model = core.Blip2OPTGated.build(places[T5], None, [], gating="none", qformer=places[T5])
    assert model.language_projection.weight.shape == (32, 64)


def test_a_t5_that_names_no_start_of_its_answers_is_refused(places, tmp_path):
    """transformers 5 has no default for it, and ends in its midst."""
    place = tmp_path / T5
    shutil.copytree(places[T5], place)
    config = json.loads((place / "config.json").read_text())
    del config["text_config"]["decoder_start_token_id"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"{T5}: its text_config names no decoder_start_token_id.*config.json"):
        published.load_blip2(str(place))


def test_the_answers_of_a_converted_opt_are_its_own(places):
    """Real words go in and come out, without the mark for pictures that the processor has added."""
    model = core.Blip2OPTGated.build(places[OPT], None, [], gating="none").eval()
    assert len(model.tokenizer) == 50266 and model.tokenizer("a").input_ids[0] == 2
    answers = model.predict_answers(torch.randn(2, 3, SIZE, SIZE), ["What is it?", "Who?"])
    assert len(answers) == 2 and all(isinstance(answer, str) and "<image>" not in answer for answer in answers)


@pytest.mark.parametrize("page", ["data/README.md", "data/README.zh-CN.md"])
def test_the_page_has_the_table(page):
    lines = [line.strip("|").split("|") for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    table = {cells[0].strip().replace("`", ""): [cell.strip() for cell in cells[1:]] for cells in lines}
    heads = [cells for cells in table.values() if FOLDERS[0] in cells]
    assert heads == [list(FOLDERS)]
    for stage in STAGES:
        assert [cell == "yes" or cell == "是" for cell in table[stage]] == [(stage, folder) not in REFUSED for folder in FOLDERS], stage
