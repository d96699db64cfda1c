"""stage1.py: where the Q-Former of BLIP-2's stage 1 starts, and the folder in HuggingFace's format in which it ends.

    load                                            a vision tower and a Q-Former from wherever it starts -> the model
    bert_config, start_from_bert, start_at_random   a BERT's weights, or random ones (a LAVIS file or a folder: published.py)
    export, export_trained                          what transformers, train_cir.py and train_gated.py --qformer load
"""

import pathlib

import torch
from torch import nn

from data import rows
from engine import files, published, towers, vision
from engine.errors import DataError

BERT = "bert-base-uncased"  # where BLIP-2's own stage 1 started


# --- where weights come from ------------

def load(model_class, blip2, init, dtype, strict=False, log=print):
    """--blip2 (vision tower) and --init (Q-Former, tokenizer; "random") -> model_class(tower, config, tokenizer), a core.Blip2Retrieval.

    A hub's ID is looked for in models/ first. dtype: of the tower, None: as it is kept. strict: a Q-Former that was trained behind
    another tower is refused, and else said: see towers.join. Says what starts fresh."""
    name, init = published.in_models(blip2, "blip2-itm"), published.with_text(published.in_models(init))
    kind = published.load_config(init).model_type if init != "random" and not pathlib.Path(init).is_file() else None  # of a folder
    tower, config = published.load_vision(name, dtype)
    if kind == "bert":
        config, tokenizer = bert_config(config, published.load_config(init)), published.load_tokenizer(init)
    else:
        source = init if kind else name  # a LAVIS file and a random start take form and tokenizer from --blip2
        config, tokenizer = published.load_config(source), published.load_tokenizer(source)
        if not getattr(getattr(config, "qformer_config", None), "use_qformer_text_input", False):
            raise DataError(f"{source}: no BLIP-2 in image-text-retrieval format, whose Q-Former reads text: give such a folder, "
                            f"or start from a BERT with --init {BERT}")
        config.vision_config, config.qformer_config.encoder_hidden_size = tower.config, tower.config.hidden_size
    published.refuse_other_tokenizer(tokenizer, config.qformer_config.vocab_size, init if kind else name)
    model = model_class(tower, config, tokenizer)
    if kind == "bert":
        absent = start_from_bert(model, published.load_bert(init), init)
    elif init == "random":
        absent = start_at_random(model)
    else:
        place = published.local_folder(init) if kind else init
        model.ln_vision = towers.join(tower, place, name, log, strict)
        parts = published.qformer_weights(published.read_weights(place), text_path=True, source=init)
        model.load_parts(parts, init)
        absent = [part for part in ("temp", "lm_head") if part not in parts]
    log(f"Q-Former: {init}; fresh: {', '.join(absent) or 'nothing'}")
    return model


def bert_config(config, bert, queries=32):
    """A BERT's sizes as a Q-Former's: cross-attention in every second layer, one word more ([DEC])."""
    from transformers import Blip2Config, Blip2QFormerConfig
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
             "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps", "pad_token_id")
    qformer = Blip2QFormerConfig(vocab_size=bert.vocab_size + 1, use_qformer_text_input=True,
                                 **{name: getattr(bert, name) for name in names})
    tower = getattr(config, "vision_config", config)
    return Blip2Config(vision_config=tower.to_dict(), qformer_config=qformer.to_dict(), num_query_tokens=queries,
                       image_text_hidden_size=256)


def start_from_bert(model, state, source):
    """BLIP-2's start: BERT's layers and word head; the query branch is a copy of the text branch; cross-attention, queries,
    projections and [DEC] are new, N(0, 0.02), and so is the word head of a BERT that has lost its own. state: of published.load_bert.
    -> names of what is new."""
    def fresh(shape):
        return torch.randn(shape) * 0.02

    state = {name.removeprefix("bert."): tensor.float() for name, tensor in state.items()}
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("vision_model.")}
    renamed = (("qformer.layernorm.", "embeddings.LayerNorm."), ("qformer.", ""), ("attention.attention.", "attention.self."),
               ("_query.", "."), ("lm_head.", "cls.predictions."))
    new = set()
    for name, tensor in own.items():
        theirs = name
        for ours, other in renamed:
            theirs = theirs.replace(ours, other)
        if name in ("embeddings.word_embeddings.weight", "lm_head.bias"):  # one word more: [DEC]
            start = fresh(tensor.shape) if tensor.ndim > 1 else torch.zeros_like(tensor)
            own[name] = torch.cat([state[theirs], start[len(state[theirs]):]]) if theirs in state else start
        elif "crossattention" not in name and theirs in state:
            if state[theirs].shape != tensor.shape:
                raise DataError(f"{source}: {theirs} is {tuple(state[theirs].shape)}, {tuple(tensor.shape)} is wanted: "
                                "not the BERT of its config")
            own[name] = state[theirs]
        elif tensor.ndim > 1:
            own[name] = fresh(tensor.shape)
            new.add("cross-attention" if "crossattention" in name else name.split(".")[0])
        elif "crossattention" in name and name.endswith(".bias"):
            own[name] = torch.zeros_like(tensor)
    model.load_state_dict(own, strict=False)
    return [*sorted(new), "[DEC]"]


def start_at_random(model):
    """Weights by fan-in, which small widths need (the library's 0.02 sits on a plateau there). -> names of what is new."""
    for name, part in model.named_children():
        for module in part.modules() if name != "vision_model" else ():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5 if name == "embeddings" else 0.02)
    nn.init.normal_(model.query_tokens)
    return ["everything"]


# --- and where they go ------------

def export(model, folder, tower=None, ln_vision=None):
    """A folder that transformers' Blip2ForImageTextRetrieval, train_cir.py and train_gated.py --qformer load.

    tower: the vision tower as its source keeps it, ln_vision: the same of its norm, where another Q-Former brought one (None: the
    model's own, which training may have rounded). temp and the captioning head, which that class does not have, go into
    stage1.safetensors beside."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import Blip2ForImageTextRetrieval, Blip2Processor, BlipImageProcessor
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    kept = {**(tower or model.vision_model).state_dict(), **{f"post_layernorm.{name}": t for name, t in (ln_vision or {}).items()}}
    state |= {f"vision_model.{name}": tensor.cpu().contiguous() for name, tensor in kept.items()}
    extra = {name: state.pop(name) for name in list(state) if name == "temp" or name.startswith("lm_head.")}
    with torch.device("meta"):
        theirs = Blip2ForImageTextRetrieval(model.config)
        theirs.vision_model = vision.build_tower(model.config.vision_config)
    theirs.load_state_dict(state, strict=True, assign=True)
    size = {"height": model.image_size, "width": model.image_size}
    pixels = BlipImageProcessor(size=size, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD)
    try:
        with files.whole_folder(folder) as part:
            theirs.save_pretrained(part)
            save_file(extra, part / "stage1.safetensors")
            Blip2Processor(pixels, model.tokenizer).save_pretrained(part)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: could not be written ({' '.join(str(error).split())}): {files.remedy(error)}; --convert "
                        "writes it from a best.pt") from None


def export_trained(model, folder, blip2, best):
    """export of a training's end, with the tower as --blip2 keeps it. best: the best.pt whose weights `model` has.

    DataError: another tower lies there now than when this training began."""
    tower, _ = published.load_vision(published.in_models(blip2, "blip2-itm"), None)
    other = towers.differing(tower, {n: towers.sampled(t) for n, t in model.vision_model.state_dict().items()})
    if other:
        raise DataError(f"{blip2}: its vision tower is another one than when this training began ({other[0]}): give back "
                        f"that one, and --convert {best} writes {folder}")
    export(model, folder, tower, model.ln_vision)
