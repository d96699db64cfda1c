"""assemble.py: a BLIP-2 of your own parts: a vision tower, a language model, a BERT; a folder that every stage loads.

    python tools/assemble.py --vision timm:vit_base_patch16_siglip_224.webli --lm models/SmolLM2-135M-Instruct \\
        --qformer models/all-MiniLM-L6-v2 --out models/mine
    python tools/assemble.py --vision models/blip2-opt-2.7b --lm Qwen/Qwen2.5-0.5B --qformer bert-base-uncased --out models/mine
    python pretrain_qformer.py --blip2 models/mine --data NAME=PLACE     # and train_gated.py, train_cir.py --blip2 models/mine

    OUT/                Blip2ForConditionalGeneration: tower, Q-Former without its text path, projection, language model; its tokenizer
    OUT/qformer/        Blip2ForImageTextRetrieval: the same tower and Q-Former with text path and heads, and BERT's tokenizer
    OUT/assembled.json  what went in: sources with digests, seed, versions, what is fresh

Two folders, since transformers has two classes for the two stages and a folder holds one class and one tokenizer: OUT reads with the
language model's, OUT/qformer with BERT's. The tower lies in both. Stages that need the text path find OUT/qformer when they are given
OUT. Fresh are the queries, the cross-attention, the heads and the projection: train stage 1 first, then the projection.

--qformer fresh is a random Q-Former of --width and --layers without a text path, and OUT has no qformer/: stage 1 then starts
from a BERT of its own (pretrain_qformer.py --blip2 OUT --init BERT).
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import timm
import torch
import transformers
from torch import nn

import core
import pretrain_qformer
from data import rows
from engine import decoders, errors, files, flags, loop, published, stage1, vision
from engine.errors import DataError


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True, metavar="timm:NAME|ID|DIR",
                        help="a timm model, or a BLIP-2 in HuggingFace's format whose tower is taken")
    parser.add_argument("--vision-weights", metavar="FILE", help="of timm:NAME, in timm's names or its original publisher's (default: "
                                                                 "timm fetches them)")
    parser.add_argument("--image-size", type=flags.positive, metavar="PIXELS", help="of timm:NAME (default: that of its pretraining)")
    parser.add_argument("--lm", required=True, metavar="ID|DIR", help="any causal or T5 model of transformers")
    parser.add_argument("--qformer", required=True, metavar="ID|DIR|fresh", help="a BERT, whose layers the Q-Former takes over")
    parser.add_argument("--queries", type=flags.positive, default=32, help="(default: 32)")
    parser.add_argument("--width", type=flags.positive, default=768, help="of --qformer fresh, in heads of 64 (default: 768)")
    parser.add_argument("--layers", type=flags.positive, default=12, help="of --qformer fresh (default: 12)")
    parser.add_argument("--dropout", type=flags.share, default=0.1, help="of --qformer fresh (default: 0.1, as BERT's)")
    parser.add_argument("--seed", type=flags.whole, default=0, help="of what is fresh (default: 0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, which must not be there")
    args = parser.parse_args(argv)
    if not args.vision.startswith("timm:") and (args.vision_weights or args.image_size):
        parser.error("--vision-weights and --image-size belong to --vision timm:NAME")
    if args.qformer == "fresh" and args.width % 64:
        parser.error("--width is a multiple of 64")
    return args


# --- the parts ------------

def load_tower(args):
    """--vision -> TimmTower or Blip2VisionModel, as its source keeps it."""
    if args.vision.startswith("timm:"):
        if args.vision_weights is None and not published.hub_answers():
            raise DataError(f"{args.vision}: timm cannot fetch its weights, since the hub cannot be reached: give --vision-weights FILE")
        return vision.make_tower(args.vision.removeprefix("timm:"), args.vision_weights, args.image_size)
    return published.load_vision(published.in_models(args.vision), None)[0]


def load_language_model(name):
    """--lm -> (transformers model in its file's dtype, tokenizer). DataError: tensors that are missing, a tokenizer of another model."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    config = published.load_config(name)
    decoders.refuse_decoder(config, name)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    published.quiet_own_head()
    try:
        model, found = kind.from_pretrained(name, dtype="auto", output_loading_info=True, local_files_only=not published.hub_answers())
    except Exception as error:  # a damaged folder raises anything, from four libraries
        raise DataError(f"{name}: no language model that can be loaded ({' '.join(str(error).split())[:160]})") from None
    if found["missing_keys"]:
        raise DataError(f"{name}: {len(found['missing_keys'])} tensors are missing, first {sorted(found['missing_keys'])[:3]}")
    tokenizer = published.load_tokenizer(name)
    published.refuse_more_tokens(tokenizer, model.config.vocab_size, "the language model", name)
    return model, tokenizer


def make_stage1(args, tower):
    """--qformer BERT -> Stage1 as BLIP-2's stage 1 starts: see stage1.start_from_bert; and the names of what is fresh in it."""
    name = published.in_models(args.qformer)
    bert, tokenizer = published.load_config(name), published.load_tokenizer(name)
    if bert.model_type != "bert":
        raise DataError(f"{name}: a {bert.model_type} and not a BERT (model_type of its config.json), from which a Q-Former can start")
    config = stage1.bert_config(tower.config, bert, args.queries)
    config.qformer_config.encoder_hidden_size = tower.config.hidden_size
    published.refuse_other_tokenizer(tokenizer, config.qformer_config.vocab_size, name)
    model = pretrain_qformer.Stage1(tower, config, tokenizer)
    return model, stage1.start_from_bert(model, published.load_bert(name), name)


def fresh_qformer(args, tower):
    """--qformer fresh -> (Blip2QFormerConfig, {"qformer": state, "query_tokens": ...} of random weights, N(0, 0.02) as BERT's)."""
    from transformers import Blip2QFormerConfig
    config = Blip2QFormerConfig(hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
                                intermediate_size=4 * args.width, encoder_hidden_size=tower.config.hidden_size,
                                hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout)
    model = core.QFormer(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return config, {"qformer": model.state_dict(), "query_tokens": {"": torch.randn(1, args.queries, args.width) * 0.02}}


def join_parts(tower, qformer_config, parts, language_model):
    """-> Blip2ForConditionalGeneration that holds these parts; parts as from published.qformer_weights, the projection is fresh."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, GenerationConfig
    settings = qformer_config.to_dict() | {"use_qformer_text_input": False}
    queries = parts["query_tokens"][""]  # [1,Q,H]
    config = Blip2Config(vision_config=tower.config.to_dict(), qformer_config=settings, num_query_tokens=queries.shape[1],
                         text_config=language_model.config.to_dict())
    projection = nn.Linear(queries.shape[2], config.text_config.hidden_size)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model.vision_model, model.language_model, model.language_projection = tower, language_model, projection
    model.query_tokens = nn.Parameter(queries)
    model.qformer.load_state_dict(parts["qformer"], strict=True, assign=True)
    marks = language_model.generation_config  # of which no more is used: sampling that a folder asks for may be no longer valid
    model.generation_config = GenerationConfig(**{name: value for name in ("bos_token_id", "eos_token_id", "pad_token_id",
                                                                           "decoder_start_token_id")
                                                  if (value := getattr(marks, name)) is not None})
    return model


# --- the folder ------------

def digests(name):
    """{file: sha256} of a source: a file, or the weights and settings of a folder."""
    place = pathlib.Path(name) if pathlib.Path(name).is_file() else published.local_folder(name)
    found = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())
    return {file.name: files.digest(file) for file in found}


def parameters(model):
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def record(args, model, fresh):
    """What assembled.json says: enough to make the folder again, and to see whether it was made of the same things."""
    sources = {"lm": published.in_models(args.lm)}
    if args.vision_weights or not args.vision.startswith("timm:"):
        sources["vision"] = args.vision_weights or published.in_models(args.vision)
    if args.qformer != "fresh":
        sources["qformer"] = published.in_models(args.qformer)
    return {"command": vars(args), "sources": {part: digests(name) for part, name in sources.items()}, "fresh": fresh,
            "parameters": parameters(model),
            "versions": {library.__name__: library.__version__ for library in (torch, transformers, timm)}}


def save_tokenizer(tokenizer, folder):
    """save_pretrained, but what transformers 5 alone has goes by the name that 4 and 5 know: a class, and the list of further marks."""
    tokenizer.save_pretrained(folder)
    file = pathlib.Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    with files.whole_file(file) as out:
        json.dump(settings, out, indent=1)


def save_settings_for_both(language_model, folder):
    """What transformers 4 would read otherwise in a config.json that transformers 5 has written: angles of positions, and whether a T5
    has a head of its own, of which 5 writes that it is tied. The published folders say it so, and 5 reads it too."""
    file = pathlib.Path(folder) / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    text, head = settings.get("text_config", settings), language_model.get_output_embeddings()
    if head.weight is not language_model.get_input_embeddings().weight:
        text["tie_word_embeddings"] = False
        text.pop("scale_decoder_outputs", None)
    text |= decoders.positions_for_4(text)
    with files.whole_file(file) as out:
        json.dump(settings, out, indent=2)


def save_gated(model, tokenizer, folder):
    """Weights, tokenizer and the settings of pictures, as transformers publishes a BLIP-2."""
    from transformers import BlipImageProcessor
    size = model.config.vision_config.image_size
    model.save_pretrained(folder)
    save_settings_for_both(model.language_model, folder)
    save_tokenizer(tokenizer, folder)
    BlipImageProcessor(size={"height": size, "width": size}, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD).save_pretrained(folder)


def main(argv=None):
    args = get_args(argv)
    out = pathlib.Path(args.out)
    if out.exists():
        raise DataError(f"{out} is there already: choose another --out")
    files.refuse_unwritable(out)
    language_model, tokenizer = load_language_model(published.in_models(args.lm))
    tower = load_tower(args)
    loop.seed_everything(args.seed)
    if args.qformer == "fresh":
        whole, fresh = None, ["everything of the Q-Former"]
        config, parts = fresh_qformer(args, tower)
    else:
        whole, fresh = make_stage1(args, tower)
        config, parts = whole.config.qformer_config, published.qformer_weights(whole.state_dict(), text_path=False)
    model = join_parts(tower, config, parts, language_model)
    with files.whole_folder(out) as part:
        save_gated(model, tokenizer, part)
        if whole:
            stage1.export(whole, part / "qformer", tower)
        with files.whole_file(part / "assembled.json") as file:
            json.dump(record(args, model, [*fresh, "language_projection"]), file, indent=1)
    for name, count in parameters(model).items():
        print(f"{name:22}{count:>15,}")
    print(f"fresh: {', '.join([*fresh, 'language_projection'])}\n{out}: for --blip2 of every stage")


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
