"""make_tiny.py: the recipe of the tiny models in models/tiny, which ship with the project; stages find them there by name.

    python tools/make_tiny.py --out runs/tiny                        # all of them again: about ten minutes on 2 cores
    python tools/make_tiny.py --out runs/tiny --parts blip blip2-itm # some of them

    blip2/               --blip2 tiny of train_gated.py, eval_gated.py: Blip2ForConditionalGeneration with OPT
    efficientnet-28.pt   its style classifier, 28 classes as the real one
    blip/                --blip tiny of train_blip_caption.py: BlipForConditionalGeneration
    blip2-itm/           --blip2 tiny of train_cir.py and pretrain_qformer.py: Blip2ForImageTextRetrieval
    gated/best.pt        gates that train_gated.py trained on the drawn sample; examples/, test pictures, and examples.csv, their
                         questions, for demo.py
    cir/best.pt          what train_cir.py made of the drawn CIRR sample; gallery/ and examples.csv, pictures and queries of another
                         sample, for demo.py

Each has a record beside it, NAME.json: the recipe and its version, sha256 of every file, the figures it reached. The folders are
in the published formats (save_pretrained, tokenizer, processor), so the code that loads them is the code that loads
Salesforce/blip2-opt-2.7b. Weights are kept in half precision and loaded into float32, the same on every machine; the same command
on the same machine with the same versions makes the same files.

The parts are trained on freshly drawn scenes (other seeds than the sample's own pictures) so that frozen parts are worth freezing:
the vision tower on what, colour and count; then Q-Former, projection and OPT on content questions, with style only as words that
have nothing to do with the picture, so that the language model knows the words but never saw a style; then the style classifier
on the eight manners. The captioner's vision tower learns the same, its decoder is stopped early, so that fine-tuning has
something left to do. The retrieval model has the tiny BLIP-2's tower and a Q-Former of its own with a text path, trained on
image-text contrast.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import core
import metrics
from data import rows, wikiart
from engine import captioning, checkpoints, errors, files, flags, galleries, loop, published
from tools import drawing, make_sample, sample_cirr

RECIPE = 2  # raise it whenever the same command would make other models
PARTS = ("blip2", "efficientnet-28.pt", "blip2-itm", "blip", "gated", "cir")  # in this order: later ones take earlier ones
LOG = logging.getLogger("make_tiny")
SIZE, PATCH, WIDTH, QUERIES = 112, 14, 128, 8
ARCH = "test_efficientnet"  # timm's smallest EfficientNet; 28 classes as the real one
CAPTION_WIDTH = 96
OTHER_CIRR, GALLERY_SETS = pathlib.Path("data/other-cirr"), 10  # a sample that no training saw; its image sets, of six pictures, that ship
# everyday words of photo captions, so that the captioner's tokenizer does not spell them letter by letter
PHOTO_WORDS = """
a an the of in on at to with and or by for from near over under through into out up down off across along behind beside
between around against above below while is are being be as his her their its it he she they him them who that this there
some two three four five several many group people person man men woman women boy boys girl girls child children kid kids
baby toddler couple crowd family dog dogs cat cats horse horses bird birds animal cow sheep player players team rider biker
climber skier surfer skateboarder black white brown red blue green yellow orange purple pink grey gray tan blond dark bright
colorful small little large big tall young old long short wet dirty snowy grassy sandy rocky wooden running runs run jumping
jumps jump playing plays play walking walks walk standing stands stand sitting sits sit riding rides ride holding holds hold
looking looks look wearing wears climbing climbs catching catches throwing throws swimming swims smiling smiles laughing
posing poses watching carrying carries pulling leaping leaps racing chasing lying laying leaning waiting talking eating
drinking kicking swinging sliding skiing surfing water beach sand ocean sea lake river pool wave waves snow ice grass field
park street road sidewalk city building house wall fence window door bridge stairs steps bench table chair tree trees forest
woods hill mountain mountains rock rocks cliff sky sun sunset night day air ground dirt mud path trail track ramp court
stage game ball football soccer tennis basketball baseball hockey bat racket toy stick frisbee rope bike bicycle bicycles
motorcycle car truck train boat kayak skateboard snowboard surfboard swing slide sled shirt shorts pants jeans jacket coat
hat cap helmet dress suit uniform shoes boots gloves glasses sunglasses goggles vest bag backpack camera picture photo phone
sign flag umbrella hand hands arm arms head face hair mouth nose ear ears back front side top edge end middle background
foreground something each other another one all very"""


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the models and make_tiny.log; parts that are there "
                                                                    "are kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"which of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--pictures", type=flags.positive, default=2400,
                        help="scenes drawn for pre-training; the captioner takes 2/3 (default: 2400)")
    steps = parser.add_argument_group("steps of 32")
    steps.add_argument("--vision-steps", type=flags.positive, default=500, help="BLIP-2's vision tower (default: 500)")
    steps.add_argument("--language-steps", type=flags.positive, default=360, help="its Q-Former and OPT (default: 360)")
    steps.add_argument("--style-steps", type=flags.positive, default=480, help="style classifier (default: 480)")
    steps.add_argument("--caption-steps", type=flags.positive, nargs=2, default=[360, 40], metavar=("VISION", "TEXT"),
                       help="captioner: its vision tower, then its decoder (default: 360 40)")
    steps.add_argument("--retrieval-steps", type=flags.positive, default=300, help="retrieval model (default: 300)")
    parser.add_argument("--sample-pictures", type=flags.positive, default=480,
                        help="of the drawn sample, on which the gates are trained and all figures are taken (default: 480)")
    parser.add_argument("--gate-epochs", type=flags.positive, default=20, help="of train_gated.py (default: 20)")
    parser.add_argument("--cir-pictures", type=flags.positive, default=1200, help="of the drawn CIRR sample (default: 1200)")
    parser.add_argument("--cir-epochs", type=flags.positive, default=12, help="of train_cir.py (default: 12)")
    parser.add_argument("--seed", type=flags.whole, default=0, help="of scenes, weights and batches (default: 0)")
    return parser.parse_args(argv)


# --- where it is ------------

HEARTBEAT = 15  # seconds


@contextlib.contextmanager
def told(folder):
    """Write to the terminal and to make_tiny.log in the folder what is under way, at least every HEARTBEAT seconds."""
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(folder / "make_tiny.log", encoding="utf-8")]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    ended = threading.Event()

    def beat():
        while not ended.wait(HEARTBEAT):
            LOG.info(NOW["what"])
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()


NOW = {"what": ""}


def now(what, aloud=True):
    """Set what told says; aloud: say it at once, too."""
    NOW["what"] = what
    if aloud:
        LOG.info(what)


# --- data: scenes in memory ------------

def draw_one(index, seed):
    """Scene `index` of the pre-training set -> (scene, style, pixels uint8 [SIZE,SIZE,3]). Never one of the sample's."""
    rng = np.random.default_rng([seed, 77_000_000 + index])
    scene = drawing.random_scene(rng)
    style = list(drawing.STYLES)[index % len(drawing.STYLES)]
    return scene, style, np.asarray(drawing.draw_scene(scene, style, SIZE, seed=77_000_000 + index))


@functools.lru_cache(maxsize=1)  # three parts take the same ones
def draw_scenes(count, seed):
    """-> scenes, styles (lists), pixels uint8 [N,3,SIZE,SIZE]."""
    now(f"drawing {count} scenes")
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(functools.partial(draw_one, seed=seed), range(count), chunksize=32))
    scenes, styles, pixels = zip(*drawn)
    return scenes, styles, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def normalised(pixels):
    """uint8 [B,3,s,s] -> float in BLIP's normalisation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (rows.BLIP_MEAN, rows.BLIP_STD))
    return (pixels.float() / 255 - mean) / std


def mirrored(pixels, labels, generator):
    """The batch and its patch labels [B,8,8], mirrored half of the time: a cheap guard against learning pictures by heart."""
    return (pixels.flip(3), labels.flip(2)) if torch.rand((), generator=generator) < 0.5 else (pixels, labels)


def patch_kinds(scenes):
    """What each patch of the tower shows, [N,8,8]: 0 ground, else 1 + index of the kind (a circle for each thing)."""
    n = SIZE // PATCH
    centre = (torch.arange(n) + 0.5) / n
    labels = torch.zeros(len(scenes), n, n, dtype=torch.long)
    for label, scene in zip(labels, scenes):
        for thing in scene["things"]:
            inside = (centre[None] - thing["x"]) ** 2 + (centre[:, None] - thing["y"]) ** 2 < (0.8 * thing["radius"]) ** 2
            label[inside] = 1 + list(drawing.KINDS).index(scene["kind"])
    return labels


# --- the parts ------------

def style_sentences():
    """(words, question, answer) on style without a picture: all that the language model ever hears of style.

    The words name the style or its technique, so the model learns to find it in what stands before the question, and which
    technique belongs to which style; it never learns what a style looks like.
    """
    return [(words, question, answer) for style, technique in drawing.TECHNIQUES.items() for words in (style, technique)
            for kind, answer in (("style", style), ("technique", technique)) for question in drawing.WORDINGS[kind]]


def make_tokenizer(texts, folder):
    """Byte-level BPE (as OPT's) of a few hundred pieces, trained on the sample's texts; any text can be encoded."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=480, min_frequency=2, show_progress=False,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<image>"])
    bpe.save_model(str(folder))  # vocab.json and merges.txt, as OPT publishes them
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>",
                "unk_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def make_model(tokenizer, size=SIZE, width=WIDTH, layers=(3, 6, 4)):
    """Random Blip2ForConditionalGeneration of the tiny sizes. size: pixels a side, 8 patches; layers: of vision tower, Q-Former, OPT."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig
    vision = Blip2VisionConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers[0], num_attention_heads=4,
                               image_size=size, patch_size=size // (SIZE // PATCH))
    qformer = Blip2QFormerConfig(vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers[1], num_attention_heads=8,
                                 intermediate_size=2 * width, encoder_hidden_size=width, max_position_embeddings=64)
    text = OPTConfig(vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
                     num_hidden_layers=layers[2], num_attention_heads=4, max_position_embeddings=256, dropout=0.0,
                     bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                     pad_token_id=tokenizer.pad_token_id)
    config = Blip2Config(vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=text.to_dict(),
                         num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    model = Blip2ForConditionalGeneration(config)
    for module in model.modules():  # the library's std of 0.02 sits on a plateau at such widths
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    nn.init.normal_(model.query_tokens, std=1.0)
    nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.2)
    model.language_model.tie_weights()
    return model


def fit(parameters, step_loss, steps, lr, name):
    """Plain AdamW with warm-up and cosine; step_loss(step) -> loss."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = loop.cosine_lr(step, steps, steps // 20, lr)
        loss = step_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        now(f"{name}: step {step + 1} of {steps}, loss {loss.item():.3f}", aloud=step + 1 in (1, steps))


def train_vision(tower, scenes, pixels, steps, generator):
    """Vision tower on what, colour and count, read off the mean of its states, and on what each patch shows."""
    facts = [("kind", list(drawing.KINDS)), ("colour", list(drawing.COLOURS)), ("count", list(drawing.COUNTS))]
    labels = torch.tensor([[values.index(s[key]) for key, values in facts] for s in scenes])  # [N,3]
    patches, width = patch_kinds(scenes), tower.config.hidden_size
    heads = nn.ModuleList([nn.Linear(width, len(values)) for _, values in facts] + [nn.Linear(width, 1 + len(drawing.KINDS))])

    def step_loss(step):
        picked = torch.randint(len(pixels), (32,), generator=generator)
        batch, shown = mirrored(pixels[picked], patches[picked], generator)
        states = tower(pixel_values=normalised(batch)).last_hidden_state  # [32,1+64,width]
        whole = sum(F.cross_entropy(heads[i](states.mean(1)), labels[picked, i]) for i in range(len(facts)))
        return whole + 4 * F.cross_entropy(heads[-1](states[:, 1:]).flatten(0, 1), shown.flatten())

    fit([*tower.parameters(), *heads.parameters()], step_loss, steps, 2e-3, "vision tower")


def train_language(gated, scenes, styles, pixels, steps, generator, rng):
    """Q-Former, projection and language model on content questions over kept vision states; style only as text."""
    with torch.no_grad():
        states = torch.cat([gated.image_features(normalised(p))["image_embeds"] for p in pixels.split(64)])  # [N,P,WIDTH]
    sentences = style_sentences()
    content = [[(q, a) for q, a, kind in drawing.questions(scene, style, rng) if kind in ("what", "count", "colour")]
               for scene, style in zip(scenes, styles)]

    def step_loss(step):
        picked = torch.randint(len(states), (32,), generator=generator).tolist()
        pairs = [content[i][rng.integers(len(content[i]))] for i in picked]
        batch = core.encode_training(gated.tokenizer, *zip(*pairs))
        loss = gated(**batch, image_embeds=states[picked], gated=False)["loss"]
        texts = [sentences[i] for i in rng.integers(len(sentences), size=16)]
        return loss + words_loss(gated, texts, states[picked[:16]], rng)

    trained = [gated.query_tokens, *gated.qformer.parameters(), *gated.language_projection.parameters(),
               *gated.language_model.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    gated.train()
    fit(trained, step_loss, steps, 1e-3, "Q-Former and OPT")


def words_loss(gated, texts, states, rng):
    """Answers on style from words alone: the embeddings of a style's name, or of its technique's, laid over what stands for
    some picture. The words are drawn at random and have nothing to do with that picture."""
    words, questions, answers = zip(*texts)
    ids = [(gated.tokenizer(" " + line, add_special_tokens=False).input_ids * QUERIES)[:QUERIES] for line in words]
    embeds = gated.language_model.get_input_embeddings()(torch.tensor(ids))  # [16,Q,D]
    with torch.no_grad():
        visual = gated.visual_prompt(states, None, None, None, gated=False)  # [16,Q,D]
        loudness = torch.from_numpy(rng.uniform(0.3, 1.0, (len(ids), QUERIES, 1))).float() * visual.std() / embeds.std()
    batch = core.encode_training(gated.tokenizer, questions, answers)
    inputs = gated.decoder.inputs(visual + loudness * embeds, batch["input_ids"], batch["attention_mask"])
    logits = gated.language_model(**inputs).logits[:, QUERIES - 1:-1]  # [16,L,V]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def train_style(net, styles, pixels, steps, generator):
    """The style classifier on the drawn manners."""
    labels = torch.tensor([wikiart.WIKIART.index(s) for s in styles])

    def step_loss(step):
        picked = torch.randint(len(pixels), (32,), generator=generator)
        return F.cross_entropy(net.logits(net(normalised(pixels[picked]))), labels[picked])

    net.train()
    fit(list(net.parameters()), step_loss, steps, 2e-3, "style classifier")
    net.eval()


# --- the captioner ------------

def make_wordpiece(texts, folder):
    """BERT's kind of tokenizer (lower case, WordPiece): words of the texts and of PHOTO_WORDS, letters for all others.

    The words are counted here: the library's own trainer breaks ties by the order of a hash, another one in every process."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import AutoTokenizer
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    split = BertWordPieceTokenizer(lowercase=True)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(text)))
    words = sorted({word for word, count in counts.items() if count > 1 and len(word) > 1} | set(PHOTO_WORDS.split()) - set(letters))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")  # as BLIP publishes it
    # only with a vocabulary does it get the step that puts [CLS] and [SEP] around a text
    BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "pad_token": "[PAD]", "unk_token": "[UNK]",
                "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def make_captioner(tokenizer, width=CAPTION_WIDTH):
    """Random BlipForConditionalGeneration of the tiny sizes; as in the published one [DEC] is no token of the tokenizer."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig
    vision = BlipVisionConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=4,
                              image_size=SIZE, patch_size=PATCH)
    text = BlipTextConfig(vocab_size=len(tokenizer) + 2, hidden_size=width, encoder_hidden_size=width, num_hidden_layers=2,
                          intermediate_size=2 * width, num_attention_heads=4, max_position_embeddings=64, hidden_dropout_prob=0.1,
                          bos_token_id=len(tokenizer), eos_token_id=tokenizer.sep_token_id, sep_token_id=tokenizer.sep_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    for module in model.modules():  # as in make_model
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for place in (model.vision_model.embeddings.position_embedding, model.vision_model.embeddings.class_embedding):
        nn.init.normal_(place, std=0.2)
    model.tie_weights()
    return model


def train_captioner(model, tokenizer, texts, pixels, steps, generator):
    """The decoder on captions, the vision tower as it is; pads are no targets and position 0 is [DEC]."""
    with torch.no_grad():
        towered = [model.vision_model(pixel_values=normalised(p)).last_hidden_state for p in pixels.split(64)]
    states = torch.cat(towered)  # [N,P,W]

    def step_loss(step):
        picked = torch.randint(len(states), (32,), generator=generator).tolist()
        batch = tokenizer([texts[i] for i in picked], padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]  # [32,L]
        labels = ids.masked_fill(mask == 0, -100)
        ids[:, 0] = model.config.text_config.bos_token_id
        return model.text_decoder(input_ids=ids, attention_mask=mask, labels=labels, encoder_hidden_states=states[picked]).loss

    model.train()
    fit(list(model.text_decoder.parameters()), step_loss, steps, 2e-3, "caption decoder")
    model.eval()


def save_captioner(model, tokenizer, folder):
    """Model, tokenizer and processor as the published folder has them."""
    from transformers import BlipImageProcessor, BlipProcessor
    model.save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD)
    BlipProcessor(image_processor, tokenizer).save_pretrained(folder)


def make_captioner_folder(folder, args):
    """models/tiny/blip."""
    generator, rng = torch.Generator().manual_seed(args.seed), np.random.default_rng(args.seed)
    scenes, _, pixels = draw_scenes(args.pictures * 2 // 3, args.seed)
    texts = [drawing.caption(scene, rng) for scene in scenes]
    tokenizer = make_wordpiece(texts, folder)
    model = make_captioner(tokenizer)
    train_vision(model.vision_model, scenes, pixels, args.caption_steps[0], generator)
    train_captioner(model, tokenizer, texts, pixels, args.caption_steps[1], generator)
    save_captioner(model.half(), tokenizer, folder)


def save_random_captioner(folder, texts=("three red boats on the water", "at night, an orange star")):
    """An untrained tiny captioner in the published format, for tests -> its folder."""
    folder = pathlib.Path(folder) / "blip"
    folder.mkdir(parents=True)
    tokenizer = make_wordpiece([*texts] * 2, folder)
    save_captioner(make_captioner(tokenizer, 32), tokenizer, folder)
    return str(folder)


# --- the retrieval model ------------

def make_retrieval(tokenizer, vision, width=WIDTH, layers=6):
    """Blip2ForImageTextRetrieval of the tiny sizes with this vision tower (a Blip2VisionModel), else random."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig
    qformer = Blip2QFormerConfig(vocab_size=len(tokenizer) + 1, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16,
                                 intermediate_size=2 * width, encoder_hidden_size=vision.config.hidden_size,
                                 max_position_embeddings=64, use_qformer_text_input=True)
    config = Blip2Config(vision_config=vision.config.to_dict(), qformer_config=qformer.to_dict(), num_query_tokens=QUERIES,
                         image_text_hidden_size=width // 2)
    model = Blip2ForImageTextRetrieval(config)
    model.vision_model.load_state_dict(vision.state_dict())
    for part in (model.qformer, model.vision_projection, model.text_projection):
        for module in part.modules():  # as in make_model
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for table in (model.embeddings.word_embeddings, model.embeddings.position_embeddings):
        nn.init.normal_(table.weight, std=0.5)
    nn.init.normal_(model.query_tokens, std=1.0)
    return model


def train_retrieval(model, scenes, pixels, steps, generator, rng):
    """Q-Former with its text path on image-text contrast, over kept vision states; equal captions are never negatives."""
    with torch.no_grad():
        states = torch.cat([model.image_embeds(normalised(p)) for p in pixels.split(64)])  # [N,P,W]

    def step_loss(step):
        picked = torch.randint(len(states), (32,), generator=generator).tolist()
        shown = [(scenes[i]["kind"], scenes[i]["count"], scenes[i]["colour"], scenes[i]["ground"]) for i in picked]
        ids = torch.tensor([shown.index(content) for content in shown])
        batch = core.text_ids(model.tokenizer, [drawing.caption(scenes[i], rng) for i in picked])
        images, texts = model.image_features(states[picked]), model.text_features(**batch)
        t2i = core.max_similarity(texts, images) / model.temp  # [32,32]; seen from the images it is the same numbers
        return core.itc_loss(t2i.T, t2i, core.itc_targets(ids, ids)).mean()

    model.train()
    fit([p for p in model.parameters() if p.requires_grad], step_loss, steps, 1e-3, "retrieval Q-Former")
    model.eval()


def save_retrieval(model, tokenizer, folder):
    """Model, tokenizer and processor as the published folder has them."""
    from transformers import Blip2Processor, BlipImageProcessor
    model.save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD)
    Blip2Processor(image_processor, tokenizer).save_pretrained(folder)


def make_retrieval_folder(folder, args):
    """models/tiny/blip2-itm, with the tower of the tiny BLIP-2 beside it."""
    from transformers import Blip2ForConditionalGeneration
    generator, rng = torch.Generator().manual_seed(args.seed), np.random.default_rng(args.seed)
    scenes, _, pixels = draw_scenes(args.pictures, args.seed)
    tokenizer = make_wordpiece([drawing.caption(scene, rng) for scene in scenes], folder)
    blip2 = Blip2ForConditionalGeneration.from_pretrained(pathlib.Path(args.out) / "blip2", dtype=torch.float32)
    whole = make_retrieval(tokenizer, blip2.vision_model)
    model = core.Blip2Retrieval(whole.vision_model, whole.config, tokenizer)
    model.load_parts(published.qformer_weights(whole.state_dict(), text_path=True), "the random model")
    train_retrieval(model, scenes, pixels, args.retrieval_steps, generator, rng)
    whole.load_state_dict({n: p for n, p in model.state_dict().items() if n != "temp"})
    save_retrieval(whole.half(), tokenizer, folder)


def save_random_retrieval(folder, texts=("three red boats on the water", "show two and paint it in small dots"), width=WIDTH):
    """An untrained tiny retrieval model in the published format, for tests -> its folder. width: of its Q-Former."""
    from transformers import Blip2VisionConfig, Blip2VisionModel
    folder = pathlib.Path(folder) / "blip2-itm"
    folder.mkdir(parents=True)
    tokenizer = make_wordpiece([*texts] * 2, folder)
    vision = Blip2VisionModel(Blip2VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                                image_size=SIZE, patch_size=28))
    for module in vision.modules():  # the library starts a tower so near to zero that all pictures look alike
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    save_retrieval(make_retrieval(tokenizer, vision, width, layers=3), tokenizer, folder)
    return str(folder)


# --- assembly ------------

def save_folder(blip2, tokenizer, folder):
    """Model, tokenizer and processor as the published folder has them."""
    from transformers import Blip2Processor, BlipImageProcessor
    blip2.save_pretrained(folder)
    side = dict.fromkeys(("height", "width"), blip2.config.vision_config.image_size)
    image_processor = BlipImageProcessor(size=side, image_mean=rows.BLIP_MEAN, image_std=rows.BLIP_STD)
    Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)


RANDOM_SIZE = 56  # pixels a side of save_random's model: a quarter of the tiny one's, and as much less for EfficientNet to see


def save_random(folder, texts=("Question: What style is this? Answer: Cubism, three\n",), size=RANDOM_SIZE, width=64, layers=(2, 6, 2)):
    """Untrained parts in the published formats, for tests; smaller than the tiny ones by default, see make_model for the sizes
    -> (BLIP-2 folder, EfficientNet checkpoint)."""
    folder = pathlib.Path(folder) / "blip2"
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer([*texts] * 2, folder)
    save_folder(make_model(tokenizer, size, width, layers), tokenizer, folder)
    net = core.EfficientNet28(28, ARCH, wikiart.WIKIART)
    checkpoints.save_checkpoint(folder.parent / "efficientnet.pt", {"model": net.net.state_dict(), "arch": ARCH, "classes": wikiart.WIKIART})
    return str(folder), str(folder.parent / "efficientnet.pt")


def make_blip2(folder, args):
    """models/tiny/blip2."""
    generator, rng = torch.Generator().manual_seed(args.seed), np.random.default_rng(args.seed)
    scenes, styles, pixels = draw_scenes(args.pictures, args.seed)
    lines = [core.PROMPT.format(q) + f" {a}\n" for _, q, a in style_sentences()]
    lines += [drawing.caption(s, rng) for s in scenes]
    lines += [core.PROMPT.format(q) + f" {a}\n" for s, t in zip(scenes, styles) for q, a, _ in drawing.questions(s, t, rng)]
    tokenizer = make_tokenizer(lines, folder)
    blip2 = make_model(tokenizer)
    train_vision(blip2.vision_model, scenes, pixels, args.vision_steps, generator)
    gated = core.Blip2OPTGated(blip2.eval(), tokenizer, gating="none", train_qformer=True)
    train_language(gated, scenes, styles, pixels, args.language_steps, generator, rng)
    blip2.qformer.load_state_dict(gated.qformer.state_dict())
    blip2.query_tokens.data.copy_(gated.query_tokens.data)
    save_folder(blip2.half(), tokenizer, folder)


def make_efficientnet(path, args):
    """models/tiny/efficientnet-28.pt."""
    _, styles, pixels = draw_scenes(args.pictures, args.seed)
    net = core.EfficientNet28(28, ARCH, wikiart.WIKIART)
    train_style(net, styles, pixels, args.style_steps, torch.Generator().manual_seed(args.seed))
    checkpoints.save_checkpoint(path, {"model": halves(net.net.state_dict()), "arch": ARCH, "classes": wikiart.WIKIART})


def halves(state):
    """A state dict in half precision; whole numbers stay."""
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def make_gated(folder, args):
    """models/tiny/gated: best.pt, what train_gated.py makes of the tiny BLIP-2 and the drawn sample, in half precision; examples/."""
    import train_gated
    blip2, classifier = (str(pathlib.Path(args.out) / part) for part in ("blip2", "efficientnet-28.pt"))
    train_gated.main(["--data", "data/artquest", "--blip2", blip2, "--efficientnet", classifier, "--accumulation", "1", "--batch-size", "32",
                      "--lr", "1e-3", "--epochs", str(args.gate_epochs), "--per", "head", "--patience", "0", "--cache", "cache", "--workers", "0", "--seed",
                      str(args.seed), "--out", "runs/tiny"])
    keep_run("runs/tiny", folder, {"blip2": "tiny", "efficientnet": None})
    (folder / "examples").mkdir()
    asked = rows.read_split("data/artquest", "test")
    shown = set({r.style: r.image for r in asked}.values())  # one a style
    for path in sorted(shown):
        shutil.copy(path, folder / "examples")
    write_examples(folder, [{"image": r.name, "question": r.question, "answer": r.answer, "question_type": r.question_type,
                             "style": r.style} for r in asked if r.image in shown])


def keep_run(run, folder, places):
    """best.pt of a run folder in half precision, without what tells places of this machine. places: its model's names from now on."""
    best = checkpoints.load_checkpoint(f"{run}/best.pt")
    best.pop("command", None)
    checkpoints.save_checkpoint(folder / "best.pt", {
        **best, "state": halves(best["state"]), "kept_in": "float16", "model_args": {**best["model_args"], **places},
        "args": {**best["args"], **places, "cache": None}})


def write_examples(folder, table):
    """FOLDER/examples.csv, lines that end the same on every system."""
    with files.whole_file(folder / "examples.csv") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def make_cir(folder, args):
    """models/tiny/cir: best.pt, what train_cir.py makes of the tiny retrieval model and the drawn CIRR sample, in half precision;
    gallery/: the validation pictures of another sample; examples.csv: a query of each of its image sets."""
    import train_cir
    sample_cirr.make(pathlib.Path("data/cirr"), args.seed, args.cir_pictures, sys.exit)
    train_cir.main(["--data", "data/cirr", "--blip2", str(pathlib.Path(args.out) / "blip2-itm"), "--lr", "1e-3", "--epochs",
                    str(args.cir_epochs), "--cache", "cache", "--workers", "0", "--seed", str(args.seed), "--out", "runs/cir"])
    keep_run("runs/cir", folder, {"blip2": "tiny"})
    sample_cirr.make(OTHER_CIRR, args.seed + 1, args.sample_pictures, sys.exit)
    pictures, queries = OTHER_CIRR / "img_raw/dev", json.loads((OTHER_CIRR / "captions/cap.rc2.val.json").read_text())
    shown = {one["img_set"]["id"]: one for one in queries if one["img_set"]["id"] < GALLERY_SETS}  # the last has two changes
    (folder / "gallery").mkdir()
    for name in (name for one in shown.values() for name in one["img_set"]["members"]):
        shutil.copy(pictures / f"{name}.jpg", folder / "gallery")
    write_examples(folder, [{"reference": f"{one['reference']}.jpg", "text": one["caption"], "target": f"{one['target_hard']}.jpg"}
                            for one in shown.values()])


@contextlib.contextmanager
def drawn_sample(args):
    """A working folder with the drawn sample in data/artquest, gone afterwards. What a run in it remembers of its places tells
    nothing of this machine."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            now("drawing the sample")
            make_sample.main(["--pictures", str(args.sample_pictures), "--out", "data/artquest"])
            yield
        finally:
            os.chdir(here)


# --- figures: what a part reaches on the test pictures of the drawn sample, in the working folder, in percent ------------

def test_pixels(paths):
    """Pictures -> [N,3,SIZE,SIZE]."""
    return torch.stack([rows.picture_tensor(path, SIZE) for path in paths])


@torch.no_grad()
def matched(model, gated=True):
    """Exact match of a Blip2OPTGated on the test questions: {"content", "style": percent}."""
    read = rows.read_split("data/artquest", "test")
    hits = {"content": [], "style": []}
    for start in range(0, len(read), 64):
        group = read[start:start + 64]
        answers = model.predict_answers(test_pixels([r.image for r in group]), [r.question for r in group], gated=gated)
        for r, answer in zip(group, answers):
            hits["style" if r.question_type in ("style", "technique") else "content"].append(metrics.exact_match(answer, r.answer))
    return {kind: percent(sum(found), len(found)) for kind, found in hits.items()}


def percent(part, whole):
    return round(100 * part / whole, 1)


def blip2_figures(out):
    model = core.Blip2OPTGated.build(str(out / "blip2"), None, [], gating="none").eval()
    return {f"exact match, {kind} questions": value for kind, value in matched(model).items()}


def gated_figures(out):
    model, _ = core.load_gated(out / "gated", blip2=out / "blip2", efficientnet=out / "efficientnet-28.pt")
    return {f"exact match, {kind} questions, gates {state}": value for state, is_open in (("open", True), ("closed", False))
            for kind, value in matched(model, is_open).items()}


@torch.no_grad()
def style_figures(out):
    styles = {r.image: r.style for r in rows.read_split("data/artquest", "test")}
    net = core.EfficientNet28.from_checkpoint(out / "efficientnet-28.pt").eval()
    found = [net.style_names()[i] for i in net.logits(net(test_pixels(styles))).argmax(-1).tolist()]
    return {"styles told, top-1": percent(sum(map(str.__eq__, found, styles.values())), len(found))}


def test_captions():
    """{picture's path: caption}."""
    captions = json.loads(pathlib.Path("data/artquest/test_captions.json").read_text(encoding="utf-8"))
    return {f"data/artquest/images/{name}": caption for name, caption in captions.items()}


@torch.no_grad()
def caption_figures(out):
    import train_blip_caption
    from transformers import BlipForConditionalGeneration
    model, tokenizer = published.load_published(BlipForConditionalGeneration, "BLIP", str(out / "blip"))
    wanted = test_captions()
    told = captioning.describe(model.eval(), tokenizer, test_pixels(wanted), train_blip_caption.GENERATION)
    scores = metrics.score_captions(told, [[caption] for caption in wanted.values()])["corpus"]
    return {"mean of METEOR, ROUGE-L and CIDEr-D, times 100": percent(captioning.mean_of_three(scores), 1)}


@torch.no_grad()
def retrieval_figures(out):
    model, wanted = core.Blip2Retrieval.load(str(out / "blip2-itm")).eval(), test_captions()
    images = model.image_features(model.image_embeds(test_pixels(wanted)))
    ranked = core.max_similarity(model.text_features(**core.text_ids(model.tokenizer, wanted.values())), images)
    own = torch.arange(len(wanted))
    return {f"recall@1, {name}": percent((s.argmax(-1) == own).sum().item(), len(wanted))
            for name, s in (("text to picture", ranked), ("picture to text", ranked.T))}


def cir_figures(out):
    """Recalls on the validation queries of another sample than the trained one, by pictures that no training saw."""
    import train_cir
    args = train_cir.get_args(["--data", str(OTHER_CIRR), "--checkpoint", str(out / "cir"), "--blip2", str(out / "blip2-itm"),
                               "--workers", "0"])
    _, model, accelerator = train_cir.load_best(args)
    pools = train_cir.read_data(args, "val")
    opener = train_cir.picture_source(args, model, pools, accelerator)
    (numbers, _), = galleries.evaluate(model, pools, opener, accelerator, args.format, args.batch_size, args.workers)
    return {f"{name} of {len(pools[0].gallery)} pictures, another drawn sample's queries": round(numbers[name], 1) for name in ("R@1", "R@5", "R@10")}


# --- records ------------

MAKERS = {"blip2": (make_blip2, blip2_figures), "efficientnet-28.pt": (make_efficientnet, style_figures),
          "blip2-itm": (make_retrieval_folder, retrieval_figures), "blip": (make_captioner_folder, caption_figures),
          "gated": (make_gated, gated_figures), "cir": (make_cir, cir_figures)}


def digests(place):
    """{file: sha256} of a file or of everything in a folder."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def record(part, out, args, seconds):
    """Write NAME.json beside a part."""
    import transformers
    name = part.removesuffix(".pt")
    content = {"recipe": f"tools/make_tiny.py --parts {part}", "recipe_version": RECIPE, "settings": {
        key: value for key, value in vars(args).items() if key not in ("out", "parts")}, "seconds": round(seconds),
        "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "figures on the drawn sample's test pictures, %": MAKERS[part][1](out), "sha256": digests(out / part)}
    with files.whole_file(out / f"{name}.json") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def make(part, out, args):
    """One part and its record; under a temporary name first, so that a part that stands is complete."""
    start, target = time.monotonic(), out / part
    now(f"{part}: begun")
    loop.seed_everything(args.seed)
    unfinished = target.with_name(target.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    if not target.suffix:
        unfinished.mkdir()
    MAKERS[part][0](unfinished, args)
    unfinished.rename(target)
    seconds = time.monotonic() - start
    now(f"{part}: made in {seconds:.0f} s, taking its figures")
    record(part, out, args, seconds)


def main(argv=None):
    args = get_args(argv)
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    args.out = str(out)  # absolute, since the work is done elsewhere
    with told(out), drawn_sample(args):
        for part in PARTS:
            if part in args.parts and not (out / part).exists():
                make(part, out, args)
    print(f"made: {out}")


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
