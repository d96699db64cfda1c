"""published.py: models that others have published: HuggingFace ids and folders, LAVIS checkpoints; their names, their faults.

    load_blip2, load_published   an id or a folder, complete or one line that says what is wrong with it
    load_config, load_tokenizer, load_vision, load_bert, image_size_of, local_folder, hub_answers   one part alone
    missing_model, refuse_missing   is it here, or can it be fetched? Else one error that says what is missing, and the ways to it
    read_weights, qformer_weights, replace_qformer   a Q-Former from another folder or from a LAVIS .pth
    load_text_path                                   and what it reads texts with
"""

import difflib
import importlib.util
import json
import logging
import os
import pathlib
import re
import socket
import urllib.parse
import urllib.request
from typing import NamedTuple

import torch

from data import rows
from data.tables import excerpt
from engine import vision
from engine.checkpoints import load_foreign, load_strictly, unwrap_state
from engine.decoders import refuse_decoder
from engine.errors import DataError, said
from engine.files import PROJECT, located


# --- folders in HuggingFace's format ------------

LM_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": None, "nf4": None}


def load_blip2(name, dtype=torch.float32, lm_precision=None, tower=True):
    """HuggingFace id or local folder -> (Blip2ForConditionalGeneration, tokenizer). Local files are tried first.

    dtype: of the vision tower, and of the language model where lm_precision (one of LM_PRECISIONS) is None. tower=False: without
    the layers of the vision tower, whose features come from a cache.
    """
    from transformers import Blip2ForConditionalGeneration
    lm_dtype, options = LM_PRECISIONS.get(lm_precision) or dtype, {}
    if lm_precision in ("int8", "nf4"):
        options["quantization_config"] = quantization(lm_precision, dtype)

    class WithDecoder(Blip2ForConditionalGeneration):
        def __init__(self, config):
            refuse_decoder(config.text_config, name, dtype, lm_dtype)  # before a weight is read
            super().__init__(config)
    model_class = WithDecoder
    if not tower and not vision.is_timm(name):
        class WithoutTower(WithDecoder):
            _keys_to_ignore_on_load_unexpected = [r"^vision_model\."]  # else a table of every layer that is left out
        model_class, options["config"] = WithoutTower, load_config(name)
        options["config"].vision_config.num_hidden_layers = 0
    model, tokenizer = load_published(model_class, "BLIP-2", name, torch.promote_types(dtype, lm_dtype),
                                      ["query_tokens", "qformer", "language_projection"], tower, **options)
    keep_4bit_layout(model)
    model.vision_model.to(dtype)
    if "quantization_config" not in options:
        for weight in model.language_model.parameters():  # and no buffer: angles of positions stay float32, as transformers keeps them
            weight.data = weight.data.to(lm_dtype)
    refuse_more_tokens(tokenizer, model.config.text_config.vocab_size, "the language model", name)
    return model, tokenizer


def quantization(lm_precision, dtype):
    """transformers' config for the language model in int8 (Dettmers et al. 2022) or nf4 with double quantisation (QLoRA, 2023);
    dtype is what the products are computed in. The other parts stay as they are."""
    if not importlib.util.find_spec("bitsandbytes"):
        raise DataError(f"--lm-precision {lm_precision} needs bitsandbytes: pip install bitsandbytes, or take bf16, fp16 or fp32")
    from transformers import BitsAndBytesConfig
    kept = ["vision_model", "qformer", "language_projection", "query_tokens", "lm_head", "embed_out"]  # GPT-NeoX has the last
    quiet_bitsandbytes()
    if lm_precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept)


def quiet_bitsandbytes():
    """Before bitsandbytes is imported, which peft does too: two things that it logs say nothing about a run here."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(no_word_on_float16)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(no_word_on_kernels)


def no_word_on_float16(record):
    """Filter. In every pass of every layer it says that int8 is reached through float16, thousands of lines a
    run. So it is, in this method; giving it float16 would silence it, and would round the gradients that pass through as well."""
    return "will be cast" not in str(record.msg)


def no_word_on_kernels(record):
    """Filter. On a CPU with avx512_bf16 it asks for a package that would fetch a kernel for the layout that keep_4bit_layout refuses."""
    return "kernels-community" not in str(record.msg)


def quiet_own_head():
    """Before a language model is read: see no_word_on_own_head."""
    logging.getLogger("transformers.modeling_utils").addFilter(no_word_on_own_head)


def no_word_on_own_head(record):
    """Filter. transformers 5 ties the head of every T5 by its config, and then leaves it untied where the file holds both, as the
    published Flan-T5 do. That is right, and said as if the folder were at fault, with the advice of a setting that T5 does not take."""
    names = r"tie (language_model\.)?shared\.weight to (language_model\.)?lm_head\.weight, but both are present"
    return not re.search(names, str(record.msg))


def keep_4bit_layout(model):
    """No 4-bit layer may repack its weight. bitsandbytes >= 0.49 does so on a CPU with avx512_bf16 for a faster kernel, in the
    first pass without gradient of a layer in eval mode; that kernel passes no gradient on, its scales are rounded, and the frozen
    language model is always in eval mode. Older versions do not look at the attribute."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_published(model_class, kind, name, dtype=torch.float32, trained=(), tower=True, **options):
    """A transformers class, kind "BLIP-2" or "BLIP", and an id or folder -> (model, tokenizer), complete or a DataError.

    trained: parts that start from the file's own values, whatever the dtype of the others. A timm tower is no part of transformers'
    classes: it is read by load_vision and put in; without `tower` an empty module stands there."""
    flag, wanted = "--" + kind.replace("-", "").lower(), theirs(model_class)
    of_timm = kind == "BLIP-2" and vision.is_timm(name)
    if of_timm:
        model_class = vision.without_tower(model_class)
    if trained:
        class WithoutRounding(model_class):
            _keep_in_fp32_modules_strict = trained
        model_class = WithoutRounding
    if pathlib.Path(name).exists():
        refuse_other_folder(pathlib.Path(name), kind, wanted)
    quiet_own_head()
    errors = []
    for local in (True, False):
        try:
            model, found = model_class.from_pretrained(name, dtype=dtype, local_files_only=local, output_loading_info=True,
                                                       ignore_mismatched_sizes=True, **options)
            break
        except (MemoryError, torch.OutOfMemoryError, DataError):
            raise
        except Exception as error:  # a damaged folder raises anything, from four libraries
            errors.append(said(f"{type(error).__name__}: {error}"))
        if pathlib.Path(name).exists():
            raise DataError(f"{name}: cannot be loaded as {kind}: {errors[0]}")
        if not local or not may_be_hub_id(name) or not hub_answers():
            raise DataError(f"no {kind} called {name!r} on this machine and none could be fetched: pass {flag} with a local "
                            f"folder in HuggingFace's format, or {flag} tiny ({errors[-1]})")
    wrong = sorted(found["missing_keys"]) + sorted(str(key) for key in found.get("mismatched_keys", ()))
    if wrong:  # transformers would leave them random
        raise DataError(f"{name}: {len(wrong)} tensors are missing or of another shape, first {wrong[:3]}")
    if of_timm and tower:
        model.vision_model = load_vision(name, dtype)[0]
    return model, load_tokenizer(name)


def load_config(name):
    """The config alone of a HuggingFace id or folder. DataError: there is none, or it was saved quantised."""
    from transformers import AutoConfig, Blip2VisionConfig
    local = pathlib.Path(name).exists() or not hub_answers()
    try:
        settings, _ = Blip2VisionConfig.get_config_dict(name, local_files_only=local)
        # transformers 4 has it, but AutoConfig does not know it
        alone = settings.get("model_type") == Blip2VisionConfig.model_type
        config = Blip2VisionConfig.from_dict(settings) if alone else AutoConfig.from_pretrained(name, local_files_only=local)
    except Exception as error:  # as above
        raise DataError(f"{name}: no readable config.json on this machine, and none could be fetched: give a local folder in "
                        f"HuggingFace's format ({said(error)})") from None
    refuse_quantised(settings.get("quantization_config"), name)
    return config


NO_BIN = "; where there is a pytorch_model.bin, load the folder with transformers and save it again with save_pretrained"


def load_vision(name, dtype=torch.float32):
    """The vision tower alone -> (Blip2VisionModel or vision.TimmTower, config of the whole). name: any BLIP-2 in HuggingFace's format,
    or a folder that holds its vision part alone. The language model beside it is never read. dtype None: as each tensor is kept."""
    from safetensors import safe_open
    from transformers import Blip2VisionConfig
    config, state = load_config(name), {}
    settings = getattr(config, "vision_config", config)
    if not isinstance(settings, Blip2VisionConfig):
        raise DataError(f"{name}: a {config.model_type} model and neither a BLIP-2 nor its vision tower (model_type of its "
                        f"config.json): give {DEFAULTS['blip2-itm']} or any other BLIP-2")
    for file in sorted(local_folder(name).glob("*.safetensors")):
        refuse_incomplete(file)
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            inner = [n for n in names if n.startswith("vision_model.")] if config.model_type == "blip-2" else names
            found = {n.removeprefix("vision_model."): tensors.get_tensor(n) for n in inner}
            # a batch norm counts in whole numbers
            state |= {n: t.to(dtype=dtype) if t.is_floating_point() else t for n, t in found.items()}
    if not state:
        raise DataError(f"{name}: no vision tower in its .safetensors files (model_type {config.model_type}){NO_BIN}")
    with torch.device("meta"):
        model = vision.build_tower(settings)
    load_strictly(model, state, f"vision tower of {name}", assign=True)
    return model if dtype is None else model.to(dtype), config  # what no file holds too: tables that timm makes for positions


# tools/make_tiny.py is the recipe; {part}.json beside each is its record
TINY = PROJECT / "models/tiny"


def tiny(part):
    """Place of a tiny model that ships with the project: blip2, blip, blip2-itm, efficientnet-28.pt, gated or cir."""
    if not (TINY / part).exists():
        raise DataError(f"{TINY / part}: missing, though it ships with the project: git checkout -- models/tiny")
    return str(TINY / part)


def in_models(name, tiny_part=None):
    """A hub's ID as models/NAME where that folder is, "tiny" as the place of tiny_part (see tiny), any other name as it is. Folders
    are looked for as files.located does. Where tiny_part reads texts with its Q-Former, of an assembled folder that part: see with_text."""
    if name == "tiny" and tiny_part:
        return tiny(tiny_part)
    given, kept = located(name), located(os.path.join("models", pathlib.PurePath(name).name))
    place = kept if os.path.isdir(kept) and not os.path.exists(given) else given
    return with_text(place) if tiny_part == "blip2-itm" else place


def with_text(place):
    """A folder of tools/assemble.py -> PLACE/qformer, the same tower with the Q-Former that reads text; any other place as it is."""
    inner = os.path.join(place, "qformer")
    return inner if os.path.isfile(os.path.join(inner, "config.json")) else place


def resolve_paths(built_from):
    """model_args with names made into places: tiny's own files; a hub's ID is looked for in models/ first. Relative paths are
    looked for as files.located does."""
    places = {**built_from, "blip2": in_models(built_from["blip2"], "blip2"),
              "efficientnet": classifier_place(built_from["blip2"], built_from["efficientnet"])}
    if places.get("qformer"):
        places["qformer"] = located(places["qformer"])
    return places


def classifier_place(blip2, given):
    """The style classifier's file: the one given, or that of the run folder given; else tiny's own or the default."""
    own = tiny("efficientnet-28.pt") if blip2 == "tiny" and not given else "runs/efficientnet-28/best.pt"
    place = located(given or own)
    return os.path.join(place, "best.pt") if os.path.isdir(place) else place


def local_folder(name):
    """A folder, or that of a HuggingFace id's weights on this machine, fetched where they are not there."""
    from huggingface_hub import snapshot_download
    if pathlib.Path(name).exists():
        return pathlib.Path(name)
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"],
                                              local_files_only=not hub_answers()))
    except Exception as error:  # as above
        raise DataError(f"{name}: its weights are not on this machine and could not be fetched: give a local folder in "
                        f"HuggingFace's format ({said(error)})") from None


def load_bert(name):
    """The state dict of a BERT with its word head (transformers' BertForMaskedLM), without one where the folder has none: a sentence
    encoder such as MiniLM."""
    from transformers import BertForMaskedLM
    from transformers.utils import logging as told
    level = told.get_verbosity()
    told.set_verbosity_error()  # of a head that is missing it would say that the file seems corrupted
    try:
        local = pathlib.Path(name).exists() or not hub_answers()
        model, found = BertForMaskedLM.from_pretrained(name, local_files_only=local, output_loading_info=True)
    except Exception as error:  # as above
        raise DataError(f"{name}: no BERT that can be loaded ({said(error)})") from None
    finally:
        told.set_verbosity(level)
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("cls."))
    if missing:
        raise DataError(f"{name}: {len(missing)} tensors of a BERT are missing, first {missing[:3]}")
    headless = bool(found["missing_keys"])
    return {name: tensor for name, tensor in model.state_dict().items() if not (headless and name.startswith("cls."))}


def theirs(model_class):
    """Name of the transformers class that this one is, or is made of."""
    return next(one.__name__ for one in model_class.__mro__ if one.__module__.startswith("transformers."))


def refuse_other_folder(path, kind, wanted):
    """DataError where a local folder is no complete BLIP-2 or BLIP (kind), or one of another class than `wanted`, a transformers
    class's name: better than a random model of full size."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        held = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a {kind} folder (no readable config.json); "
                        "give the folder that save_pretrained wrote") from None
    what, default = FORMS[wanted]
    if held != kind.lower():
        raise DataError(f"{path}: a {held} model and not a {kind} (model_type of its config.json): give {default} or a folder like it")
    other = next(iter(config.get("architectures") or ()), wanted)
    if other != wanted and other in FORMS:
        raise DataError(f"{path}: a {kind} {FORMS[other][0]} and not one {what} (its config.json names {other}): give {default} or a "
                        "folder like it")
    refuse_quantised(config.get("quantization_config"), path, kind == "BLIP-2")
    if wrong := [part for part in ("vision_config", "text_config", "qformer_config") if not isinstance(config.get(part, {}), dict | None)]:
        raise DataError(f"{path}: {wrong[0]} in its config.json is no list of settings: download it again")
    refuse_other_pixels(path)
    for file in sorted(path.glob("*.safetensors")):
        refuse_incomplete(file)


def refuse_other_pixels(path):
    """DataError where a folder's model was trained on pixels of another mean or deviation than BLIP's, which every picture has here (a
    timm tower turns them into its own)."""
    for name in ("preprocessor_config.json", "processor_config.json"):  # of transformers 4, and of 5
        try:
            told = json.loads((path / name).read_text(encoding="utf-8"))
            told = told.get("image_processor", told)
            pairs = [(told.get(key, ours), ours) for key, ours in (("image_mean", rows.BLIP_MEAN), ("image_std", rows.BLIP_STD))]
            same = all(abs(a - b) < 1e-3 for values, ours in pairs for a, b in zip(values, ours, strict=True))
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # none, or none that could be read: nothing is known, as of the hub's older ones
        if not same:
            raise DataError(f"{path / name}: pictures of image_mean {pairs[0][0]} and image_std {pairs[1][0]}, and here they have BLIP's "
                            f"({rows.BLIP_MEAN}, {rows.BLIP_STD}): this model would see other colours than in its training")


def refuse_quantised(settings, name, at_load=False):
    """DataError where a folder was saved in int8 or in 4 bits. settings: quantization_config of its config.json, None where there is
    none; at_load: does --lm-precision stand in the command?"""
    if settings:
        how = settings.get("quant_method", "quantization_config")
        raise DataError(f"{name}: saved quantised ({how}), all its parts with it, and those that are trained "
                        "and compared here need their own values: give the folder that it was made from"
                        + ("; --lm-precision int8 or nf4 quantises the language model alone" if at_load else ""))


def refuse_incomplete(path):
    """DataError for a .safetensors file whose header does not fit its size: a broken download, a pointer, a web page."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < size else b""
    try:
        expected = 8 + length + max(entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__")
    except (ValueError, TypeError, KeyError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path}: not a safetensors file ({size} bytes; a web page or a git-lfs pointer saved under this name?): "
                        "download it again") from None
    if size != expected:
        raise DataError(f"{path}: incomplete ({size:,} of {expected:,} bytes): download it again")


def load_tokenizer(name):
    """The tokenizer alone, without a weight."""
    from transformers import AutoTokenizer
    folder = pathlib.Path(name)
    local = folder.exists() or not hub_answers()
    absent = DataError(f"{name}: no tokenizer files there: give the folder that save_pretrained of model and tokenizer wrote "
                       "(tokenizer.json; or vocab.json and merges.txt, or vocab.txt)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # as above
        if folder.is_dir() and not any(path.match(kind) for path in folder.iterdir() for kind in ("tokenizer*", "vocab*", "*.model")):
            raise absent from None
        raise DataError(f"{name}: its tokenizer cannot be read ({said(error)})") from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:  # Llama's have none; pads are masked
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes one without a word where the files are missing
        raise absent
    return tokenizer


def refuse_more_tokens(tokenizer, words, whose, name):
    """DataError where a text may hold an id that `whose` table of this many words has no row for.

    A processor's marks for pictures (Blip2Processor adds <image> to the tokenizer of any model) stand in no text and need no row: a
    text that spells one out is from now on read as any other characters."""
    kept = {getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "sep", "pad", "cls")}
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special and number not in kept}
    most = max(number for number in tokenizer.get_vocab().values() if number not in marks) + 1
    if most > words:
        raise DataError(f"{name}: the tokenizer has {most} tokens, {whose} {words}: they do not belong together")
    if max(marks, default=0) >= words:
        tokenizer.split_special_tokens = True


def refuse_other_tokenizer(tokenizer, words, name):
    """DataError where a tokenizer is not that of a Q-Former with this many words, which reads [CLS] text [SEP]."""
    refuse_more_tokens(tokenizer, words, "the Q-Former", name)
    ids = tokenizer("a").input_ids
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id) or (
            ids[0] != tokenizer.cls_token_id or ids[-1] != tokenizer.sep_token_id):
        raise DataError(f"{name}: its tokenizer does not put a text between [CLS] and [SEP] as BERT's does: give the folder that "
                        "save_pretrained of model and tokenizer wrote")


UNKNOWN_SHARE = 0.2


def refuse_unknown_words(tokenizer, texts, name):
    """DataError where more than UNKNOWN_SHARE of what a tokenizer makes of these texts are unknown tokens: nothing is learned from them.
    A tokenizer that was read wrongly makes them of all words (transformers 5's BertTokenizerFast(vocab_file=FILE) does), one of
    another language of most. At most 2000 of the texts are read, evenly taken."""
    texts = list(texts)
    texts = texts[::len(texts) // 2000 + 1]
    rows = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    unknown, tokens = sum(ids.count(tokenizer.unk_token_id) for ids in rows), sum(len(ids) for ids in rows)
    if unknown > UNKNOWN_SHARE * tokens:
        first = next(text for text, ids in zip(texts, rows) if tokenizer.unk_token_id in ids)
        raise DataError(f"{name}: its tokenizer reads {unknown} of {tokens} words as unknown, first in {excerpt(first, 60)!r} (at most "
                        f"{UNKNOWN_SHARE:.0%} may be): is it of another language, or are its files damaged?")


def image_size_of(name):
    """Side of the pictures that a BLIP-2 takes, from its config alone."""
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(name, local_files_only=not hub_answers()).vision_config.image_size
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{name}: not a BLIP-2 ({said(error)})") from None


def hub_answers():
    """Can the hub be reached? Asked first, since the library would try again for a minute. A proxy is taken at its word."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies().get("https"):
        return not constants.HF_HUB_OFFLINE
    try:
        socket.create_connection((urllib.parse.urlparse(constants.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True


# --- what is missing, and the ways to it ------------

DEFAULTS = {"blip2": "Salesforce/blip2-opt-2.7b", "blip": "Salesforce/blip-image-captioning-base",
            "blip2-itm": "Salesforce/blip2-itm-vit-g"}  # of each part of tiny the published model that it stands for
# transformers class -> (what such a model is for, the published one); of two of a kind neither has all that the other needs
FORMS = {"Blip2ForConditionalGeneration": ("that answers through a language model", DEFAULTS["blip2"]),
         "Blip2ForImageTextRetrieval": ("for image-text retrieval", DEFAULTS["blip2-itm"]),
         "BlipForConditionalGeneration": ("that writes captions", DEFAULTS["blip"]),
         "BlipForImageTextRetrieval": ("for image-text retrieval", "Salesforce/blip-itm-base-coco")}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ALIKE = 0.7  # difflib's likeness of two names from which one may be a slip of the other


def missing_model(name, part):
    """[] where this BLIP-2 or BLIP is on this machine or can be fetched, else lines: the fault, then the ways to a model.

    part: of tiny, see there. Loads nothing: of weights only the header is read."""
    if name == "tiny":
        return missing_tiny(part)
    if os.path.exists(in_models(name)):
        return [] if part == "blip2-itm" else folder_fault(in_models(name), part)  # pretrain_qformer takes a vision tower too
    fault = "" if is_cached(name) else hub_fault(name)
    if not fault:
        return []
    default, flag = DEFAULTS[part], "--blip" if part == "blip" else "--blip2"
    ways = [f"{flag} tiny takes the small one that ships with the project",
            f"{flag} DIR takes a local folder in HuggingFace's format",
            f"download {default} into models/{default.split('/')[1]}: data/README.md"]
    names, there = [] if name == default else alike(name, part), folders_in_models(part)
    hint = f"did you mean {' or '.join(names)}?" if names else f"in models/ there is already {', '.join(there[:3])}"
    return [fault, *([hint] if names or there else []), *ways]


def folder_fault(place, part):
    """[] for a folder that holds a model of the kind of `part`, else what is wrong with it."""
    try:
        kind, wanted = ("BLIP", "BlipForConditionalGeneration") if part == "blip" else ("BLIP-2", "Blip2ForConditionalGeneration")
        refuse_other_folder(pathlib.Path(place), kind, wanted)
    except DataError as error:
        return [str(error)]
    return []


def missing_tiny(*parts):
    """missing_model's lines about those of the tiny models that are not in models/tiny."""
    absent = [f"models/tiny/{part}" for part in parts if not (TINY / part).exists()]
    return [f"{' and '.join(absent)}: missing, though shipped with the project",
            "git checkout -- models/tiny brings the tiny models back"] if absent else []


def may_be_hub_id(name):
    """Is this OWNER/NAME, as every BLIP and BLIP-2 on the hub is called, and no path into a folder of this project?"""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    owner, slash, _ = name.partition("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(slash) and owner not in ("models", "runs", "data", ".", "..", "~")


def is_cached(name):
    """Are the weights of a hub's ID in the hub's cache?"""
    from huggingface_hub import try_to_load_from_cache
    return may_be_hub_id(name) and any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS)


def hub_fault(name):
    """Why a name cannot be fetched from the hub, "" where it can. A name that is none of the hub's is never asked for there."""
    from huggingface_hub import constants, file_exists
    from huggingface_hub.errors import HfHubHTTPError
    if not may_be_hub_id(name):
        return f"no such folder: {excerpt(name, 60)}" if "/" in name else (
            f"{excerpt(name, 60)} is no folder here and no name on the hub (OWNER/NAME)")
    absent = f"{name} is not on this machine"
    if constants.HF_HUB_OFFLINE:
        return f"{absent}, and HF_HUB_OFFLINE forbids to fetch it"
    try:
        if hub_answers():
            return "" if file_exists(name, "config.json") else f"{absent}, and the hub has no such model"
    except HfHubHTTPError:  # the hub is there and answers something else, which is told where the model is loaded
        return ""
    except Exception:  # of a connection, from one of two libraries: a proxy that leads nowhere
        pass
    return f"{absent}, and the hub cannot be reached"


def alike(name, part):
    """The names that look like `name` among those that work: tiny, the folders in models/, the hub's ID; the closest first."""
    def likeness(other):
        return difflib.SequenceMatcher(None, *(pathlib.PurePath(n).name.lower() for n in (name, other))).ratio()

    names = ["tiny", *folders_in_models(part), DEFAULTS[part]]
    return [other for other in sorted(names, key=likeness, reverse=True) if likeness(other) >= ALIKE][:3]


def folders_in_models(part):
    """models/NAME of every folder there, in the working directory or the project, that holds a model of the kind of `part`."""
    configs = [config for root in (pathlib.Path(), PROJECT) for config in root.glob("models/*/config.json")]
    return sorted({f"models/{config.parent.name}" for config in configs if not folder_fault(config.parent, part)})


def format_missing(missing, shortest=""):
    """{thing: lines, see missing_model} as one text, "" where no thing has lines. shortest: a last line of it."""
    told = [[f"{thing}: {lines[0]}", *(f"  {way}" for way in lines[1:])] for thing, lines in missing.items() if lines]
    if len(told) > 1:
        told = [[f"{len(told)} things are missing:"], *([f"  {line}" for line in lines] for lines in told)]
    return "\n".join([*(line for lines in told for line in lines), *([f"  {shortest}"] if told and shortest else [])])


def refuse_missing(missing, shortest=""):
    """DataError with told_missing, unless nothing is."""
    told = format_missing(missing, shortest)
    if told:
        raise DataError(told)


# --- a Q-Former from elsewhere ------------

# LAVIS name -> HuggingFace name, applied in this order; lm_head (of ITG) is a name of ours, HuggingFace has no such head. Not
# covered: LAVIS's EVA vision tower ("visual_encoder."), which is frozen and comes from the BLIP-2 folder (towers.py compares them).
LAVIS_KEYS = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.", "embeddings."),
    ("Qformer.bert.", "qformer."),
    ("Qformer.cls.predictions.", "lm_head."),
    ("attention.self.", "attention.attention."),  # also inside "crossattention.self."
    ("ln_vision.", "vision_model.post_layernorm."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("opt_proj.", "language_projection."),
    ("t5_proj.", "language_projection."),
)
LAVIS_READERS = {"opt_proj.": "opt", "t5_proj.": "t5"}  # the kind of language model that a projection speaks to
QFORMER_PARTS = ("qformer", "embeddings", "query_tokens", "language_projection", "vision_projection", "text_projection",
                 "itm_head", "temp", "lm_head")


def lavis_to_hf(state):
    """LAVIS BLIP-2 state dict -> the same tensors under HuggingFace names (position_ids buffers are dropped)."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in LAVIS_KEYS:
            name = name.replace(old, new)
        if not name.endswith("position_ids"):
            renamed[name] = tensor
    return renamed


def qformer_weights(state, text_path, source="these weights"):
    """Pick the Q-Former out of an HF BLIP-2, HF image-text-retrieval or LAVIS state dict.

    Returns {"qformer": ..., "embeddings": ..., "query_tokens": ..., ...}, each a state dict, those of QFORMER_PARTS that the
    source holds. Without text_path the text feed-forwards are left out: stage 2 has no text in the Q-Former.
    """
    if any(name.startswith("Qformer.") for name in state):
        state = lavis_to_hf(state)
    parts = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if name.startswith("lm_head.decoder."):
            continue  # the word embeddings once more
        is_text = ".intermediate.dense." in name or (".output." in name and "attention.output." not in name)
        if part in QFORMER_PARTS and (text_path or not is_text):
            parts.setdefault(part, {})[rest] = tensor
    if "qformer" not in parts:
        raise DataError(f"no Q-Former in {source}: found {sorted({n.split('.')[0] for n in state})[:8]}: give a BLIP-2's folder in "
                        "HuggingFace's format, or a LAVIS checkpoint")
    return parts


def load_qformer_file(path):
    """A .pth or .bin file, or a best.pt, as it was saved. What is not looked at, gigabytes of towers, is not read from the disk."""
    return load_foreign(path, safe=True, advice="give a Q-Former's tensors alone, as a plain dict", mapped=True)


def read_weights(source):
    """All tensors but the towers of an HF folder (safetensors), of a .pth / .bin file or of a best.pt: {name: tensor}."""
    path = pathlib.Path(source)
    if not path.is_dir():
        return unwrap_state(load_qformer_file(path), path)[0]
    from safetensors import safe_open
    state = {}
    if (path / "config.json").is_file():  # a folder of tensors alone may have none
        load_config(path)  # refuses one that was saved quantised
    for file in sorted(path.glob("*.safetensors")):
        refuse_incomplete(file)
        with safe_open(file, "pt") as tensors:
            state |= {n: tensors.get_tensor(n) for n in tensors.keys() if not n.startswith(("vision_model.", "language_model."))}
    if not state:
        raise DataError(f"{path}: no .safetensors file with a Q-Former in this folder{NO_BIN}")
    return state


def stage1_extras(folder):
    """temp and lm_head, which pretrain_qformer.py puts beside HuggingFace's weights: {name: tensor}, {} where there are none."""
    from safetensors.torch import load_file
    path = pathlib.Path(folder) / "stage1.safetensors"
    return load_file(path) if path.is_file() else {}


def refuse_other_reader(reader, source):
    """DataError where the Q-Former of a folder speaks to another kind of language model than `reader` (a model_type). Its projection
    may have the same shape."""
    if not (pathlib.Path(source) / "config.json").is_file():
        return
    held = load_config(source)
    other = getattr(getattr(held, "text_config", None), "model_type", reader)
    speaks = held.model_type == "blip-2" and "Blip2ForImageTextRetrieval" not in (held.architectures or ())
    if speaks and other != reader:
        refuse_reader(source, other, reader)


def refuse_reader(source, other, reader):
    raise DataError(f"{source}: its Q-Former speaks to another language model ({other}, here {reader}): give that of a BLIP-2 with "
                    f"{reader}, or one of stage 1, which has spoken to none, such as {DEFAULTS['blip2-itm']}")


def replace_qformer(blip2, source, log=print):
    """Put another checkpoint's Q-Former and queries (and projection, where it holds one, else it says so) into a transformers BLIP-2.
    -> did it hold a projection?"""
    reader = blip2.config.text_config.model_type
    refuse_other_reader(reader, source)
    state = read_weights(source)
    for prefix, kind in LAVIS_READERS.items():
        if kind != reader and any(name.startswith(prefix) for name in state):
            refuse_reader(source, kind, reader)
    parts = qformer_weights(state, text_path=False, source=source)
    load_strictly(blip2.qformer, parts["qformer"], f"Q-Former of {source}")
    queries = parts.get("query_tokens", {}).get("")
    if queries is None or queries.shape != blip2.query_tokens.shape:
        raise DataError(f"{source}: query tokens {None if queries is None else tuple(queries.shape)} for "
                        f"{tuple(blip2.query_tokens.shape)}")
    blip2.query_tokens.data.copy_(queries)
    if "language_projection" in parts:
        load_strictly(blip2.language_projection, parts["language_projection"], f"language projection of {source}")
    else:
        log(f"Q-Former of {source}: without a projection to a language model, which stays as --blip2 has it")
    return "language_projection" in parts


class TextPath(NamedTuple):
    """What a Q-Former of stage 1 reads texts with."""
    config: object  # transformers' Blip2QFormerConfig, with use_qformer_text_input
    feed_forwards: dict  # {name in core.QFormer: tensor}, the text's own
    embeddings: dict  # state dict of core.TextEmbeddings
    tokenizer: object


def load_text_path(source):
    """A folder in image-text-retrieval format -> the TextPath of its Q-Former. DataError: there is none in it."""
    wanted = (f"--instruct needs a --qformer that reads text: a folder in image-text-retrieval format, such as OUT/hf of "
              f"pretrain_qformer.py or {DEFAULTS['blip2-itm']}")
    if not source or not pathlib.Path(source).is_dir():
        raise DataError(f"{source or 'no --qformer'}: {wanted}")
    config = getattr(load_config(source), "qformer_config", None)
    if not getattr(config, "use_qformer_text_input", False):
        raise DataError(f"{source}: its Q-Former has no text path: {wanted}")
    state, tokenizer = read_weights(source), load_tokenizer(source)
    refuse_other_tokenizer(tokenizer, config.vocab_size, source)
    whole, queries = (qformer_weights(state, text_path, source) for text_path in (True, False))
    own = whole["qformer"].keys() - queries["qformer"].keys()
    return TextPath(config, {name: whole["qformer"][name].float() for name in own},
                    {name: tensor.float() for name, tensor in whole["embeddings"].items()}, tokenizer)
