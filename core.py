"""core.py: the models, and what every stage must agree on. Plain modules and functions; nothing runs on import.

Reading order (building blocks first, the whole last):
  style classifier EfficientNet28
  masks            padding_mask, unimodal_mask, unilm_mask
  Q-Former         QFormer, TextEmbeddings, Instruction
  gates            KVGate with its kinds, PromptMapper, GatedFusionModule
  further ways     Way with its kinds: where else style can come in
  style terms      style_vocabulary, style_hit, style_kl
  stage 1          Blip2Retrieval, itc_targets, itc_loss
  the system       Blip2OPTGated
  loading          load_gated
What stands below: engine/prompts.py (texts as the models read them), similarity.py (cosines), published.py (models of others),
checkpoints.py, saved.py (what a training left); data/rows.py (tables and images).

Capitals in shape comments: B batch, Q queries, L text tokens, S = Q + L, P image patches (with CLS), H Q-Former width,
W vision width, D language model width, V vocabulary, T control tokens, M answer positions of the whole batch, E width of the
space in which images and texts are compared.
"""

import argparse
import inspect
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from PIL import Image
from torch import nn

from data import rows
from data.rows import BLIP_MEAN, BLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from data.wikiart import WIKIART
from engine import environment, given, memory, published, towers
from engine.checkpoints import load_foreign, load_strictly, load_trainable, stated_net, unwrap_state
from engine.decoders import decoder_of, refuse_decoder
from engine.errors import DataError, said
# all of them: README, and whoever copies a script, has them as core.encode_training and so on
from engine.prompts import (CONTEXT, MAX_ANSWER, MAX_QUESTION, MAX_TEXT, PROMPT, answer_ids, answer_lengths, encode_prompts,  # noqa: F401
                            encode_training, end_id, inner_ids, newline_id, pad_ids, prompt_ids, question_of, stop_ids, text_ids,
                            text_lengths)
from engine.published import (load_blip2, load_published, load_text_path, qformer_weights, read_weights, replace_qformer,
                              stage1_extras)
from engine.saved import PLACES, part_paths, read, refuse_other_base, refuse_other_dtypes, sees_style
from engine.similarity import cosines, max_similarity, no_rounding  # noqa: F401
from engine.text import texts_of

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the frozen towers, by precision


# --- the style classifier ------------

class EfficientNet28(nn.Module):
    """Style classifier: timm's EfficientNet-B3 with a head of 28 classes (27 WikiArt styles and photographs).

    forward takes images in BLIP's normalisation and at BLIP-2's size; the bridge to the net's own is inside. mean, std: three numbers
    each, of its training pixels (ImageNet's; timm's Lite and tf_ nets have others). note: a line on what a file without a name was
    taken for, "" where it says all.
    """
    note = ""

    def __init__(self, num_classes=28, arch="efficientnet_b3", classes=None, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        import timm
        self.net = timm.create_model(arch, num_classes=num_classes, pretrained=False)
        self.arch, self.num_classes, self.classes = arch, num_classes, classes
        for name, values in (("blip_mean", BLIP_MEAN), ("blip_std", BLIP_STD),
                             ("net_mean", mean), ("net_std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self):
        """Length of the pooled feature (1536 for B3)."""
        return self.net.num_features

    @property
    def settings(self):
        """What the feature depends on beside the weights, which nets of several names may share: of a best.pt."""
        pixels = {name: getattr(self, f"net_{name}").flatten().tolist() for name in ("mean", "std")}
        return {"arch": self.arch, **{name: " ".join(f"{value:.4g}" for value in values) for name, values in pixels.items()}}

    @classmethod
    def from_checkpoint(cls, path, safe=False):
        """Build the net with as many classes as the checkpoint holds, and load it strictly. `arch`, `classes`, `mean` and `std` are taken
        from the file where it has them (ours do), else from timm's config.json beside it; what neither says is that of an
        EfficientNet-B3 of ImageNet's, as `note` says."""
        loaded = load_foreign(path, safe)
        state, where = unwrap_state(loaded, path)
        if "classifier.weight" not in state:
            raise DataError(f"{path}: no timm EfficientNet in {where} (no classifier.weight among {len(state)} tensors, "
                            f"first {list(state)[:3]})")
        extra = loaded if isinstance(loaded, dict) else {}
        stated = stated_net(loaded, path)
        arch, pixels = stated.get("arch", "efficientnet_b3"), {name: stated[name] for name in ("mean", "std") if name in stated}
        try:
            net = cls(state["classifier.weight"].shape[0], arch, extra.get("classes"), **pixels)
        except (RuntimeError, TypeError, ValueError) as error:  # timm, of a name that it does not know; a mean that is none
            raise DataError(f"{path}: arch {arch!r} cannot be built ({' '.join(str(error).split())})") from None
        load_strictly(net.net, state, f"{path} ({where}) as {arch}")
        if extra.get("arch") != arch or not pixels and tuple(net.net.pretrained_cfg["mean"]) != IMAGENET_MEAN:
            net.note = net._taken_for(path, stated)
        return net

    def _taken_for(self, path, stated):
        """A line on the net that a file was taken for which does not name it itself. stated: see checkpoints.stated_net."""
        said_so = "as its config.json says" if len(stated) == 3 else (
            "for want of a word on it; others have the same tensors (tf_efficientnet_b3): if it is another, say so with "
            '{"architecture": NAME, "mean": [...], "std": [...]} in a config.json beside it')
        return f"style classifier {path}: taken for {', '.join(f'{k} {v}' for k, v in self.settings.items())}, {said_so}"

    def style_names(self):
        """The classes' names: the checkpoint's own, else WikiArt's where their number fits. DataError: neither."""
        names = self.classes if isinstance(self.classes, (list, tuple)) else WIKIART[:self.num_classes]
        if len(names) != self.num_classes or not all(isinstance(name, str) for name in names):
            raise DataError(f"the style checkpoint names {len(names)} styles for its {self.num_classes} classes: a style cannot "
                            "be taken from its prediction")
        return [name.replace("_", " ") for name in names]

    def forward(self, images):
        """images [B,3,h,w] in BLIP's normalisation -> pooled feature [B,width]. ValueError: no pixels."""
        rows.refuse_other_pixels(images, anywhere=False)
        pixels = (images.float() * self.blip_std + self.blip_mean).clamp(0, 1)
        return self.net.forward_head(self.net.forward_features((pixels - self.net_mean) / self.net_std), pre_logits=True)

    def logits(self, feature):
        """Pooled feature [B,width] -> class scores [B,num_classes]."""
        return self.net.get_classifier()(feature)


# --- masks: additive, float, 0 where a row may look and the lowest float where it may not ------------

def _additive(allowed):
    """bool [B,1,R,S] (True = may look) -> float mask that is added to attention logits."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def padding_mask(text_mask, queries=0):
    """Everything sees everything but pads (BLIP-2's bidirectional mask, for ITM).

    text_mask [B,L] (1 = real token) -> [B,1,1,queries+L].
    """
    seen = F.pad(text_mask.bool(), (queries, 0), value=True)  # [B,S]
    return _additive(seen[:, None, None, :])


def unimodal_mask(text_mask, queries):
    """Queries see only queries, text sees only real text (BLIP-2's mask for ITC). text_mask [B,L] -> [B,1,S,S]."""
    B, L = text_mask.shape
    allowed = torch.zeros(B, queries + L, queries + L, dtype=torch.bool, device=text_mask.device)
    allowed[:, :queries, :queries] = True
    allowed[:, queries:, queries:] = text_mask.bool()[:, None, :]
    return _additive(allowed[:, None])


def unilm_mask(text_mask, queries):
    """Queries see only queries; text sees all queries and the real text up to itself (UniLM, for ITG).

    text_mask [B,L] -> [B,1,S,S]. One pass under this mask equals LAVIS's two passes with cached keys.
    """
    B, L = text_mask.shape
    allowed = torch.zeros(B, queries + L, queries + L, dtype=torch.bool, device=text_mask.device)
    allowed[:, :, :queries] = True
    causal = torch.ones(L, L, dtype=torch.bool, device=text_mask.device).tril()
    allowed[:, queries:, queries:] = causal & text_mask.bool()[:, None, :]
    return _additive(allowed[:, None])


# --- Q-Former (Li et al. 2023, BLIP-2), with HuggingFace's parameter names ------------

class QFormerAttention(nn.Module):
    """Self- or cross-attention with its residual and LayerNorm (post-norm, as in BERT)."""

    def __init__(self, config, source_width):
        super().__init__()
        H = config.hidden_size
        if H % config.num_attention_heads:
            raise ValueError(f"hidden_size {H} is not a multiple of num_attention_heads {config.num_attention_heads}")
        self.heads, self.attention_dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        # ModuleDict, since the published names are attention.query, ..., output.LayerNorm
        self.attention = nn.ModuleDict(
            {"query": nn.Linear(H, H), "key": nn.Linear(source_width, H), "value": nn.Linear(source_width, H)})
        self.output = nn.ModuleDict({"dense": nn.Linear(H, H), "LayerNorm": nn.LayerNorm(H, eps=config.layer_norm_eps)})
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, source=None, mask=None, gate=None):
        """x [B,R,H]; source [B,N,width] (x itself when None); mask additive; gate a Gate or None -> [B,R,H]."""
        source = x if source is None else source
        q, k, v = (self.attention[name](s).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,heads,R or N,H/heads]
                   for name, s in (("query", x), ("key", source), ("value", source)))
        # a gate does the same to all rows of K and V, so that it can act on the few queries and on what they read instead:
        # q (g K)' = (g q) K', and a (g V + b) = g (a V) + b, since the rows of a sum to 1 (under attention dropout in the mean; b
        # itself is never dropped). The gate itself is in float32
        if gate is not None:
            q = (q * gate.key).to(q.dtype)
        if mask is not None:
            mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)  # float32's lowest is -inf in half precision
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # [B,heads,R,H/heads]
        if gate is not None:
            out = (out * gate.value + gate.shift).to(out.dtype)
        out = out.transpose(1, 2).flatten(2)  # [B,R,H]
        return self.output.LayerNorm(self.dropout(self.output.dense(out)) + x)


class QFormerLayer(nn.Module):
    """Self-attention over [queries; text]; queries also look at the image. Queries and text have a feed-forward each."""

    def __init__(self, config, cross):
        super().__init__()
        self.attention = QFormerAttention(config, config.hidden_size)
        if cross:
            self.crossattention = QFormerAttention(config, config.encoder_hidden_size)
        self.has_cross = cross
        branches = ["_query"] + ([""] if config.use_qformer_text_input else [])
        for branch in branches:
            self.add_module("intermediate" + branch,
                            nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)}))
            self.add_module("output" + branch, nn.ModuleDict(
                {"dense": nn.Linear(config.intermediate_size, config.hidden_size),
                 "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)}))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def feed_forward(self, x, branch):
        up, down = getattr(self, "intermediate" + branch), getattr(self, "output" + branch)
        return down.LayerNorm(self.dropout(down.dense(F.gelu(up.dense(x)))) + x)

    def forward(self, x, image_embeds, mask, query_length, gate):
        x = self.attention(x, mask=mask)  # [B,S,H]
        queries, text = x[:, :query_length], x[:, query_length:]
        if query_length and self.has_cross:
            queries = self.crossattention(queries, image_embeds, gate=gate)
        parts = []
        if query_length:
            parts.append(self.feed_forward(queries, "_query"))
        if text.shape[1]:
            parts.append(self.feed_forward(text, ""))
        return torch.cat(parts, 1)


class QFormer(nn.Module):
    """BLIP-2's Querying Transformer: query path and text path. Names as in transformers' Blip2QFormerModel.

    config: transformers' Blip2QFormerConfig (use_qformer_text_input=True builds the text feed-forwards too).
    """

    def __init__(self, config):
        super().__init__()
        if config.hidden_act != "gelu":
            raise ValueError(f"only gelu is known here, the config asks for {config.hidden_act}")
        self.config = config
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        layers = [QFormerLayer(config, cross=i % config.cross_attention_frequency == 0)
                  for i in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    @property
    def cross_layers(self):
        """Indices of the layers that look at the image, in order."""
        return [i for i, layer in enumerate(self.encoder.layer) if layer.has_cross]

    def forward(self, embeds, image_embeds=None, mask=None, query_length=None, gates=None):
        """One pass over [queries; text].

        embeds [B,S,H]: queries, text embeddings or both, queries first. image_embeds [B,P,W] or None.
        mask: additive, [B,1,1,S] or [B,1,S,S] (see the mask functions), None = all see all.
        query_length: how many leading positions take the query branch (cross-attention and query feed-forward). Default:
        all of them with an image, none without (SPRC's second pass: everything through the text feed-forward).
        gates: one Gate for each cross-attention layer, or None.
        Returns [B,S,H].
        """
        if query_length is None:
            query_length = 0 if image_embeds is None else embeds.shape[1]
        if query_length and image_embeds is None:
            raise ValueError("queries need image_embeds: pass query_length=0 to run everything through the text path")
        if query_length < embeds.shape[1] and not self.config.use_qformer_text_input:
            raise ValueError("this Q-Former has no text path (use_qformer_text_input is False)")
        by_layer = dict(zip(self.cross_layers, gates)) if gates is not None else {}
        x = self.dropout(self.layernorm(embeds))
        for i, layer in enumerate(self.encoder.layer):
            x = layer(x, image_embeds, mask, query_length, by_layer.get(i))
        return x


class TextEmbeddings(nn.Module):
    """Word plus position embeddings of the Q-Former's text path (transformers' Blip2TextEmbeddings).

    The LayerNorm that BERT has here lives in QFormer.layernorm, since it acts on [queries; text].
    """

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids):
        """input_ids [B,L] -> [B,L,H]; positions start at 0 whatever stands before the text."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)


class Instruction(nn.Module):
    """The question as the Q-Former reads it, beside its queries (InstructBLIP, Dai et al. 2023).

    reader: the TextPath of a stage-1 Q-Former (see published.load_text_path); tokenizer: the language model's, whose prompt the
    question is taken from again: so what asks the language model asks the Q-Former too, and no caller can forget it.
    """

    def __init__(self, reader, tokenizer):
        super().__init__()
        self.embeddings, self.tokenizer, self.lm_tokenizer = TextEmbeddings(reader.config), reader.tokenizer, tokenizer
        load_strictly(self.embeddings, reader.embeddings, "embeddings of --instruct")

    def forward(self, input_ids, prompt_mask):
        """Prompts of the language model, [B,L] -> words of the questions [B,M,H], their mask [B,M]."""
        prompts = [[i for i, kept in zip(*row) if kept] for row in zip(input_ids.tolist(), prompt_mask.tolist())]
        longest = min(MAX_QUESTION, self.embeddings.position_embeddings.num_embeddings)
        words = text_ids(self.tokenizer, [question_of(text) for text in texts_of(self.lm_tokenizer, prompts)], longest)
        ids, mask = (words[name].to(input_ids.device) for name in ("input_ids", "attention_mask"))
        return self.embeddings(ids), mask


# --- gates ------------

class Gate(NamedTuple):
    """What one gate does to a cross-attention layer: key * K, value * V + shift; each [B,heads,1,1 or H/heads], the same for all rows of
    K and V, or a plain number."""
    key: torch.Tensor | float
    value: torch.Tensor | float
    shift: torch.Tensor | float


class KVGate(nn.Module):
    """Gate of one cross-attention layer: control vector -> what is done to K and V. A kind says which numbers it learns, and how
    they act; K and V have their own.

    per "head" or "channel". The last layers start at zero, so a kind that does nothing at zero starts as the identity to the bit;
    they get a gradient in the first step and everything below them in the second. scale is a learned factor on their outputs: its
    start value sets how fast the gate opens.
    """
    learned = ("key", "value", "shift")  # the last layers: the names of act's arguments

    def __init__(self, control_width, heads, head_width, per="head", hidden=512, scale=1.0):
        super().__init__()
        if per not in ("head", "channel"):
            raise ValueError(f"a gate is per head or channel; got {per!r}")
        if scale == 0:
            raise ValueError("a gate scale of 0 never opens: the zero last layer would get no gradient")
        self.heads = heads
        width = heads * (head_width if per == "channel" else 1)
        self.norm = nn.LayerNorm(control_width)
        self.mlp = nn.Sequential(nn.Linear(control_width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        for name in self.learned:
            self.add_module(name, zero_linear(hidden, width))
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, control):
        """control [B,C] -> Gate."""
        h = self.mlp(self.norm(control))  # [B,hidden]
        numbers = {name: self.scale * self.get_submodule(name)(h) for name in self.learned}  # each [B,heads or H]
        return self.act(**{name: x.unflatten(-1, (self.heads, 1, -1)) for name, x in numbers.items()})  # [B,heads,1,1 or H/heads]

    def act(self, **learned):
        """The numbers of `learned`, each [B,heads,1,1 or H/heads] and 0 at the start -> Gate."""
        raise NotImplementedError


class FilmGate(KVGate):
    """K (1 + g_k), V (1 + g_v) + b_v (Perez et al. 2018); no shift on K, since it would cancel in the softmax."""

    def act(self, key, value, shift):
        return Gate(1 + key, 1 + value, shift)


class FilmKeyGate(FilmGate):
    """FilmGate on K alone: where a query looks, not what it reads there."""
    learned = ("key",)

    def act(self, key):
        return Gate(1 + key, 1.0, 0.0)


class FilmValueGate(FilmGate):
    """FilmGate on V alone: what a query reads, not where it looks."""
    learned = ("value", "shift")

    def act(self, value, shift):
        return Gate(1.0, 1 + value, shift)


class SigmoidGate(KVGate):
    """K 2 sigmoid(g_k), V 2 sigmoid(g_v); the factor 2 makes it start at 1 and not at a half."""
    learned = ("key", "value")

    def act(self, key, value):
        return Gate(2 * torch.sigmoid(key), 2 * torch.sigmoid(value), 0.0)


# --gating: a new kind stands in here, see docs/recipes.md
GATES = {"film": FilmGate, "film-key": FilmKeyGate, "film-value": FilmValueGate, "gate": SigmoidGate}


def masked_mean(x, mask):
    """Mean over real tokens. x [B,L,C], mask [B,L] (1 = real) -> [B,C]; 0 where a row has none."""
    mask = mask.to(x.dtype)[..., None]
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


class PromptMapper(nn.Module):
    """EfficientNet's pooled feature and the prompt's token embeddings -> control tokens [B,T,C].

    The T tokens come from one Linear to T*C, so that they differ from each other (the original repeated one vector T
    times). The text joins as its mean over real tokens, so padding changes nothing and long questions do not drown the
    image. reads_text=False: the image alone, and nothing is built for the text.
    """

    def __init__(self, image_width, text_width, width=768, tokens=4, hidden=1024, dropout=0.1, reads_text=True):
        super().__init__()
        self.tokens, self.reads_text = tokens, reads_text
        # both inputs are normalised first: word embeddings are so small (OPT's about 0.05) that biases would drown them
        self.image_norm = nn.LayerNorm(image_width)
        self.image_proj = nn.Linear(image_width, width)
        self.image_mlp = nn.Sequential(nn.GELU(), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout),
                                       nn.Linear(hidden, tokens * width))
        if reads_text:
            self.text_norm, self.text_proj = nn.LayerNorm(text_width), nn.Linear(text_width, width)
            self.text_mlp = nn.Sequential(nn.GELU(), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout),
                                          nn.Linear(hidden, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, image_feature, text_embeds, text_mask):
        """image_feature [B,F], text_embeds [B,L,D], text_mask [B,L] -> [B,T,C]."""
        image = self.image_mlp(self.image_proj(self.image_norm(image_feature))).unflatten(-1, (self.tokens, -1))  # [B,T,C]
        if not self.reads_text:
            return self.norm(image)
        text = masked_mean(self.text_mlp(self.text_proj(self.text_norm(text_embeds))), text_mask)  # [B,C]
        return self.norm(image + text[:, None])


class GatedFusionModule(nn.Module):
    """Residual fusion of a text into image tokens: out = image + alpha * gate * delta.

    gate = sigmoid(MLP([image; t])), delta = tanh(MLP(t)), t = mean of the real text tokens. 2,952,193 parameters at
    hidden_size 768. The biases of delta start at zero, so a zero text changes nothing at all.
    """

    def __init__(self, hidden_size=768, alpha=0.5, dropout=0.1):
        super().__init__()
        H = hidden_size
        self.gate = nn.Sequential(nn.Linear(2 * H, H), nn.ReLU(), nn.Dropout(dropout), nn.Linear(H, H))
        self.delta = nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Dropout(dropout), nn.Linear(H, H))
        nn.init.zeros_(self.delta[0].bias)
        nn.init.zeros_(self.delta[3].bias)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, image, text, text_mask=None):
        """image [B,N,H], text [B,M,H], text_mask [B,M] (None: all real) -> [B,N,H]."""
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], device=text.device)
        t = masked_mean(text, text_mask)[:, None]  # [B,1,H]
        first, *rest = self.gate
        # first([image; t]) in two halves: that of the text is the same for all image tokens
        both = F.linear(image, first.weight[:, :t.shape[-1]], first.bias) + F.linear(t, first.weight[:, t.shape[-1]:])
        gate = torch.sigmoid(nn.Sequential(*rest)(both))  # [B,N,H]
        return image + self.alpha * gate * torch.tanh(self.delta(t))


# --- further ways for style to come in, beside the gates or instead of them ------------

class Way(nn.Module):
    """Where the control tokens [B,T,H] come in. The three methods are all places there are, and give back what they are given:
    a way overrides one of them. control, vision, language: the widths H, W and D."""

    def __init__(self, control, vision, language):
        super().__init__()

    def patches(self, image_embeds, control):
        """What the queries look at: image_embeds [B,P,W] -> [B,any,W]."""
        return image_embeds

    def queries(self, queries, control):
        """queries [B,Q,H] -> [B,Q or more,H]; the language model sees the first Q."""
        return queries

    def visual(self, visual, control):
        """What the language model sees of the picture: visual [B,Q,D] -> [B,any,D]."""
        return visual


class SoftPrompt(Way):
    """Further tokens of the language model, behind the picture's. Zeros at the start, yet not the identity: they take attention."""

    def __init__(self, control, vision, language):
        super().__init__(control, vision, language)
        self.project = zero_linear(control, language)

    def visual(self, visual, control):
        return torch.cat([visual, self.project(control).to(visual.dtype)], 1)  # [B,Q+T,D]


class PatchTokens(Way):
    """Further patches for the queries to look at, before the picture's, as registers are. Zeros at the start, yet not the identity:
    they take attention."""

    def __init__(self, control, vision, language):
        super().__init__(control, vision, language)
        self.project = zero_linear(control, vision)

    def patches(self, image_embeds, control):
        return torch.cat([self.project(control).to(image_embeds.dtype), image_embeds], 1)  # [B,T+P,W]


class QueryTokens(Way):
    """Further queries, which the others attend to in self-attention, as InstructBLIP's attend to the question. They begin as noise
    (behind a LayerNorm zeros would have no gradient to speak of), so this is not the identity."""

    def __init__(self, control, vision, language):
        super().__init__(control, vision, language)
        self.project = nn.Linear(control, control)

    def queries(self, queries, control):
        return torch.cat([queries, self.project(control).to(queries.dtype)], 1)  # [B,Q+T,H]


class PatchFusion(Way):
    """GatedFusionModule of the control tokens into every patch; its last layer starts at zero: the identity to the bit."""

    def __init__(self, control, vision, language):
        super().__init__(control, vision, language)
        self.project, self.fusion = nn.Linear(control, vision), GatedFusionModule(vision)
        nn.init.zeros_(self.fusion.delta[3].weight)

    def patches(self, image_embeds, control):
        return self.fusion(image_embeds, self.project(control)).to(image_embeds.dtype)


def zero_linear(width, out):
    """A Linear that starts at zero: what is behind it gets a gradient in the first step, what is before it in the second."""
    last = nn.Linear(width, out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last


WAYS = {"soft-prompt": SoftPrompt, "patches": PatchTokens, "queries": QueryTokens, "fusion": PatchFusion}  # --steer


# --- style terms ------------

def style_vocabulary(styles, tokenizer):
    """Distinct styles -> (their names sorted, pieces [S,V]: each row holds 1/n at the n word pieces of that style).

    A piece that several styles share counts for each of them. Names are tokenised as in an answer: after a space.
    """
    names = sorted({s.strip() for s in styles if s.strip()})
    pieces = torch.zeros(len(names), len(tokenizer))
    for row, name in enumerate(names):
        ids = sorted(set(inner_ids(tokenizer, " " + name)))
        pieces[row, ids] = 1 / len(ids)
    return names, pieces


def style_hit(logits, rows, pieces):
    """Expected mass on style tokens at answer positions (differentiable), and the share of hard hits.

    logits [M,V]; rows [B,M] averages the positions of each sample; pieces [S,V] -> two tensors [B] in 0..1.
    """
    ids = pieces.any(0).nonzero()[:, 0]  # [U] tokens of any style
    mass = logits.float().softmax(-1)[:, ids].sum(-1)  # [M]
    hard = torch.isin(logits.argmax(-1), ids).float()  # [M]
    return _weighed(rows, mass), _weighed(rows, hard)


def style_kl(image_logits, logits, rows, pieces):
    """Symmetric KL between the image's style distribution and the answer's, 0.5 (KL(p|q) + KL(q|p)) -> [B].

    p = softmax of image_logits [B,S]. q: every style is scored by the mean log-probability of its word pieces over the
    sample's answer positions, then a softmax over styles. logits [M,V], rows [B,M], pieces [S,V].
    """
    ids = pieces.any(0).nonzero()[:, 0]  # [U]
    word = _weighed(rows, logits.float().log_softmax(-1)[:, ids])  # [B,U]
    log_q = _weighed(word, pieces[:, ids].T).log_softmax(-1)  # [B,S]
    log_p = image_logits.float().log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


# --- stage 1: image and text in one space ------------

class Blip2Retrieval(nn.Module):
    """BLIP-2 as stage 1 leaves it: frozen vision tower, Q-Former with its text path, projections into one space.

    Names as in transformers' Blip2ForImageTextRetrieval, plus `temp` of LAVIS (logits are divided by it; start 0.07).
    vision_model: a transformers Blip2VisionModel; config: a Blip2Config.
    """

    def __init__(self, vision_model, config, tokenizer):
        super().__init__()
        settings, E = config.qformer_config, config.image_text_hidden_size
        self.config, self.tokenizer, self.image_size = config, tokenizer, config.vision_config.image_size
        self.vision_model = vision_model
        self.query_tokens = nn.Parameter(torch.randn(1, config.num_query_tokens, settings.hidden_size) * 0.02)
        self.embeddings, self.qformer = TextEmbeddings(settings), QFormer(settings)
        self.vision_projection = nn.Linear(settings.hidden_size, E)
        self.text_projection = nn.Linear(settings.hidden_size, E)
        self.itm_head = nn.Linear(settings.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.ln_vision = {}  # of the vision tower, where another Q-Former brought its own: a best.pt must hold it
        self.vision_model.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def load(cls, name, qformer=None, dtype=torch.float32, log=print, **settings):
        """name: HuggingFace id or folder (image-text-retrieval format). qformer: another folder or a LAVIS .pth whose
        Q-Former, queries, heads and ln_vision are put in (see towers.join). dtype is that of the frozen vision tower."""
        from transformers import Blip2ForImageTextRetrieval
        published, tokenizer = load_published(Blip2ForImageTextRetrieval, "BLIP-2", name, dtype, [
            "query_tokens", "qformer", "word_embeddings", "position_embeddings", "vision_projection", "text_projection", "itm_head"])
        model = cls(published.vision_model, published.config, tokenizer, **settings)
        state = {n: p.float() for n, p in published.state_dict().items()} | stage1_extras(name)
        for source, tensors in ((name, state), *([(qformer, read_weights(qformer))] if qformer else [])):
            model.load_parts(qformer_weights(tensors, text_path=True, source=source), source)
        if qformer:
            model.ln_vision = towers.join(model.vision_model, qformer, name, log)
        return model

    def load_parts(self, parts, source):
        """Put in what qformer_weights found. Only temp and lm_head may be absent (HuggingFace's folders have none)."""
        wanted = {"query_tokens", "embeddings", "qformer", "vision_projection", "text_projection", "itm_head"}
        if wanted - parts.keys():
            raise DataError(f"{source}: no {', '.join(sorted(wanted - parts.keys()))}: give an image-text-retrieval folder or a "
                            "stage-1 checkpoint")
        for part, state in parts.items():
            if part in ("query_tokens", "temp"):
                own = getattr(self, part)
                if own.numel() != state[""].numel():
                    raise DataError(f"{source}: {part} is {tuple(state[''].shape)}, {tuple(own.shape)} is wanted")
                own.data.copy_(state[""].view_as(own))
            elif hasattr(self, part):
                load_strictly(getattr(self, part), state, f"{part} of {source}")

    def train(self, mode=True):
        """The frozen vision tower stays in eval mode."""
        super().train(mode)
        if self.vision_model is not None:
            self.vision_model.eval()
        return self

    @torch.no_grad()
    def image_embeds(self, images):
        """images [B,3,h,w] in BLIP's normalisation -> the frozen tower's [B,P,W]; or [B,P,W] of a cache, handed on."""
        if getattr(images, "ndim", None) == 3:
            return images.float()
        rows.refuse_other_pixels(images, anywhere=False)
        return self.vision_model(pixel_values=images).last_hidden_state.float()

    def joint(self, image_embeds, input_ids, attention_mask, mask=padding_mask):
        """[queries; text] with the image -> states [B,Q+L,H]; mask: one of the mask functions."""
        queries = self.query_tokens.expand(len(input_ids), -1, -1)  # [B,Q,H]
        Q = queries.shape[1]
        embeds = torch.cat([queries, self.embeddings(input_ids)], 1)
        return self.qformer(embeds, image_embeds, mask(attention_mask, Q), query_length=Q)

    def image_features(self, image_embeds):
        """image_embeds [B,P,W] -> unit vectors [B,Q,E]. ValueError: pixels, say."""
        given.features(image_embeds, self.qformer.config.encoder_hidden_size)
        states = self.qformer(self.query_tokens.expand(len(image_embeds), -1, -1), image_embeds)
        return F.normalize(self.vision_projection(states), dim=-1)

    def text_features(self, input_ids, attention_mask):
        """The text alone -> the unit vector of its [CLS], [B,E]."""
        states = self.qformer(self.embeddings(input_ids), mask=padding_mask(attention_mask))
        return F.normalize(self.text_projection(states[:, 0]), dim=-1)


def itc_targets(own, everyone, smoothing=0.1):
    """Image ids [B] of this process and [N] of all -> soft targets [B,N]: what is left of 1 after smoothing goes to the pairs
    of the same image in equal shares, so that two captions of one image are never each other's negatives."""
    same = (own[:, None] == everyone[None]).float()
    return (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(everyone)


def itc_loss(i2t, t2i, targets):
    """Image-text contrastive loss: soft cross-entropy of the logits [B,N] in both directions, averaged. [B]"""
    return -((i2t.log_softmax(-1) + t2i.log_softmax(-1)) * targets).sum(-1) / 2


# --- the system ------------

class Blip2OPTGated(nn.Module):
    """BLIP-2 (frozen vision tower, Q-Former, frozen language model) whose cross-attention is gated by art style.

    Named after the first of its language models, OPT; Flan-T5 and every causal decoder work too, see engine/decoders.py.

    blip2: a transformers Blip2ForConditionalGeneration; its parts are taken over, its Q-Former's weights go into core's.
    efficientnet: an EfficientNet28 or None (only with gating "none" and no way). steer: names of WAYS, beside the gates; control_from:
    what the control tokens are made of, "style+question" or "style". styles: the style vocabulary ([] = no style terms).
    instruct: a published.TextPath, and the Q-Former reads the question beside its queries; None: it never does, as in BLIP-2.
    style_head=False leaves out the head of the KL term: a trained part without a gradient would hang several processes.
    max_answer: tokens of the longest answer with its end of line, to which predict_answers generates; a training sets it from its
    own answers, and it travels with the checkpoint.
    Trained: gates, ways, mapper, language_projection, style_head; with train_qformer the Q-Former and its queries too; with
    lora_rank LoRA on the cross-attention's key and value, with own_kv these two whole (what a merged LoRA becomes).
    Everything else is frozen and stays in eval mode.
    """
    style_tower = EfficientNet28  # what looks at style: a class with from_checkpoint, width, forward, logits, style_names

    def __init__(self, blip2, tokenizer, efficientnet=None, styles=(), gating="film", per="head", gate_hidden=512,
                 gate_scale=1.0, control_tokens=4, mapper_hidden=1024, train_qformer=False, lora_rank=0, own_kv=False,
                 style_head=True, max_answer=16, steer=(), control_from="style+question", instruct=None):
        super().__init__()
        config = blip2.config
        refuse_decoder(config.text_config, "this BLIP-2")
        self.tokenizer, self.image_size, self.max_answer = tokenizer, config.vision_config.image_size, max_answer
        self.vision_model, self.language_model = blip2.vision_model, blip2.language_model
        self.query_tokens = nn.Parameter(blip2.query_tokens.detach().float())
        self.language_projection = blip2.language_projection.float()
        with torch.device(self.query_tokens.device):
            self.qformer = QFormer(instruct.config if instruct else config.qformer_config)
            self.instruction = Instruction(instruct, tokenizer) if instruct else None
        weights = {n: p.float() for n, p in blip2.qformer.state_dict().items()} | (instruct.feed_forwards if instruct else {})
        self.qformer.load_state_dict(weights, strict=True, assign=True)  # assign: works on the meta device as well
        self.efficientnet = efficientnet
        self.gates, self.mapper, self.ways = None, None, nn.ModuleList()
        if gating != "none" or steer:
            self._build_mapper(config.qformer_config.hidden_size, control_tokens, mapper_hidden, control_from)
            self._build_gates(config.qformer_config, gating, per, gate_hidden, gate_scale)
            self._build_ways(config, steer)
        self._build_style_terms(styles, style_head)
        if lora_rank:
            published.quiet_bitsandbytes()
            from peft import LoraConfig, inject_adapter_in_model
            lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank,
                              target_modules=r".*crossattention\.attention\.(key|value)")
            inject_adapter_in_model(lora, self.qformer)
        self._freeze(train_qformer, own_kv)

    @classmethod
    def build(cls, blip2, efficientnet, styles, gating="film", qformer=None, dtype=torch.float32, safe=False, lm_precision=None,
              tower=True, log=print, instruct=False, **settings):
        """From names and plain values (best.pt's model_args): blip2 an id or folder, efficientnet a checkpoint, qformer the
        folder or file of another Q-Former, whose ln_vision and projection come with it (see towers; without `tower` the norm is in
        the features already); instruct: that Q-Former reads the question too, with the text path of its stage 1. dtype is that of the
        frozen towers; lm_precision and tower: see load_blip2."""
        reader = load_text_path(qformer) if instruct else None  # first: a Q-Former that reads no text is refused before gigabytes are read
        net = cls.style_tower.from_checkpoint(efficientnet, safe) if sees_style({"gating": gating, **settings}) else None
        if note := getattr(net, "note", ""):
            log(note)
        name, (blip2, tokenizer) = blip2, load_blip2(blip2, dtype, lm_precision, tower)
        if not tower:
            blip2.vision_model = None
        if qformer:
            if replace_qformer(blip2, qformer, log):
                towers.refuse_other_reader(blip2.language_model, qformer, name, log)
            if tower:
                towers.join(blip2.vision_model, qformer, name, log)
        return cls(blip2, tokenizer, net, styles, gating, instruct=reader, **settings)

    def _build_mapper(self, width, tokens, hidden, control_from):
        if self.efficientnet is None:
            raise DataError("steering by style needs an EfficientNet style checkpoint (--efficientnet), or use --gating none without "
                            "--steer")
        if control_from not in ("style+question", "style"):
            raise ValueError(f"control tokens are made from style+question or style; got {control_from!r}")
        text_width = self.language_model.get_input_embeddings().embedding_dim
        with torch.device(self.query_tokens.device):
            self.mapper = PromptMapper(self.efficientnet.width, text_width, width, tokens, hidden, reads_text=control_from != "style")

    def _build_gates(self, qconfig, gating, per, hidden, scale):
        if gating == "none":
            return
        if gating not in GATES:
            raise DataError(f"gating {gating!r} is not known here, only {', '.join(GATES)}; where a script of your own adds it: "
                            "eval_gated.py --script FILE")
        H, heads = qconfig.hidden_size, qconfig.num_attention_heads
        with torch.device(self.query_tokens.device):
            self.gates = nn.ModuleList([GATES[gating](H, heads, H // heads, per, hidden, scale) for _ in self.qformer.cross_layers])

    def _build_ways(self, config, steer):
        unknown = [name for name in steer if name not in WAYS]
        if unknown:
            raise DataError(f"steer {unknown[0]!r} is not known here, only {', '.join(WAYS)}; where a script of your own adds it: "
                            "eval_gated.py --script FILE")
        widths = config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size, self.language_projection.out_features
        with torch.device(self.query_tokens.device):
            self.ways = nn.ModuleList([WAYS[name](*widths) for name in steer])

    def _build_style_terms(self, styles, style_head):
        self.styles, self.style_head = list(styles), None
        if self.styles:
            names, pieces = style_vocabulary(styles, self.tokenizer)
            if names != self.styles:
                raise ValueError("styles must be sorted and distinct, as style_vocabulary gives them")
            self.register_buffer("style_pieces", pieces, persistent=False)  # [S,V]
            if self.efficientnet is not None and style_head:
                self.style_head = nn.Linear(self.efficientnet.width, len(self.styles))

    def _freeze(self, train_qformer, own_kv):
        self.requires_grad_(False)
        trained = [self.gates, self.ways, self.mapper, self.style_head, self.language_projection]
        if train_qformer:
            trained += [self.qformer, self.instruction]
            self.query_tokens.requires_grad_(True)
        if own_kv:
            trained += [attention[name] for attention in self._cross_attentions() for name in ("key", "value")]
        for part in trained:
            if part is not None:
                part.requires_grad_(True)
        for name, parameter in self.qformer.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
        self.frozen_parts = ["vision_model", "language_model", "efficientnet"] + ([] if train_qformer else ["qformer"])
        self.train(self.training)

    def _cross_attentions(self):
        """The ModuleDicts {query, key, value} of the layers that look at the image."""
        return [self.qformer.encoder.layer[i].crossattention.attention for i in self.qformer.cross_layers]

    def merge_lora(self):
        """Fold LoRA into W_K and W_V, which are then own tensors of the checkpoint (settings lora_rank=0, own_kv=True)."""
        for attention in self._cross_attentions():
            for name in ("key", "value"):
                attention[name].merge()
                attention[name] = attention[name].get_base_layer().requires_grad_(True)

    def train(self, mode=True):
        """Frozen parts stay in eval mode: a frozen BatchNorm in train mode would still move, and dropout would add noise."""
        super().train(mode)
        for name in self.frozen_parts:
            if getattr(self, name) is not None:
                getattr(self, name).eval()
        return self

    # -- features of the frozen towers; both may be computed before and passed in

    @torch.no_grad()
    def image_features(self, images, style_images=None):
        """images [B,3,h,w] in BLIP's normalisation -> dict image_embeds [B,P,W], style_feature [B,F] or None.

        style_images [B,3,h,w]: other pictures for the EfficientNet alone (what if this were painted like that?).
        """
        if self.vision_model is None:
            raise RuntimeError("built without the vision tower (tower=False): pass image_embeds, from a cache")
        rows.refuse_other_pixels(images, anywhere=False)
        embeds = self.vision_model(pixel_values=images).last_hidden_state  # casts to its own dtype
        style_images = images if style_images is None else style_images
        return {"image_embeds": embeds, "style_feature": self.efficientnet(style_images) if self.efficientnet else None}

    def control_tokens(self, style_feature, input_ids, prompt_mask):
        """Style and question -> control tokens [B,T,H]."""
        with torch.no_grad():
            words = self.language_model.get_input_embeddings()(input_ids)  # [B,L,D]
        return self.mapper(style_feature.float(), words.float(), prompt_mask)

    def control(self, style_feature, input_ids, prompt_mask):
        """Style and question -> control vector [B,H] of the gates: the mean of the control tokens."""
        return self.control_tokens(style_feature, input_ids, prompt_mask).mean(1)

    def visual_prompt(self, image_embeds, style_feature, input_ids, prompt_mask, gated=True, blind=False):
        """Q-Former and projection -> what the language model sees of the image, [B,Q,D], with a soft prompt more; blind: nothing,
        [B,0,D]. gated=False: gates and further ways are closed."""
        if blind:
            return image_embeds.new_zeros(len(image_embeds), 0, self.language_projection.out_features)
        control, gates, ways = None, None, []
        if gated and self.mapper is not None:
            control, ways = self.control_tokens(style_feature, input_ids, prompt_mask), self.ways  # [B,T,H]
        if gated and self.gates is not None:
            with no_rounding(control.device):  # in bf16 a gate of 1.003 is 1
                gates = [gate(control.float().mean(1)) for gate in self.gates]
        patches, queries = image_embeds.to(self.query_tokens.dtype), self.query_tokens.expand(len(image_embeds), -1, -1)  # [B,Q,H]
        for way in ways:
            patches, queries = way.patches(patches, control), way.queries(queries, control)
        words, mask = [], None
        if self.instruction is not None:
            question, question_mask = self.instruction(input_ids, prompt_mask)  # [B,M,H], [B,M]
            words, mask = [question], padding_mask(question_mask, queries.shape[1])
        out = self.qformer(torch.cat([queries, *words], 1), patches, mask, queries.shape[1], gates)  # [B,Q or more,H]
        visual = self.language_projection(out[:, :self.query_tokens.shape[1]])  # [B,Q,D]
        for way in ways:
            visual = way.visual(visual, control)
        return visual

    @property
    def decoder(self):
        """What the frozen language model is asked through: see engine/decoders.py."""
        return decoder_of(self.language_model, self.tokenizer)

    def forward(self, input_ids, attention_mask, prompt_mask, labels, images=None, image_embeds=None, style_feature=None,
                style=None, hit_rows=None, hit_weight=0.0, kl_weight=0.0, gated=True, blind=False):
        """Loss and its parts for a batch of encode_training.

        images [B,3,h,w], or image_embeds [B,P,W] and style_feature [B,F] computed before. style [B]: index into the style
        vocabulary, -1 = unknown. hit_rows [B]: 1 where the answer names a style; the hit term asks only those for style
        words (asking a colour question for a style word would fight the answer). gated=False closes the gates; blind=True
        shows the language model the words alone, which is the baseline that tells how far one comes without looking.
        Returns {"loss": scalar, parts: [B]}: lm is the mean over a sample's answer tokens; loss is the mean over samples of
        lm + hit_weight (1 - hit) on hit_rows + kl_weight (kl + cross-entropy of the style head). A mean over samples, so
        that accumulation and several processes add up to exactly the large batch.
        """
        given.one_source(images, image_embeds)
        features = {"image_embeds": image_embeds, "style_feature": style_feature}
        if image_embeds is None:
            features = self.image_features(images)
        visual = self.visual_prompt(**features, input_ids=input_ids, prompt_mask=prompt_mask, gated=gated, blind=blind)
        logits, targets, owner = self.decoder.answer_logits(visual, input_ids, attention_mask, labels)
        rows = F.one_hot(owner, len(labels)).T.float()  # [B,M]
        nll = F.cross_entropy(logits.float(), targets, reduction="none")  # [M]
        parts = {"lm": _weighed(_row_mean(rows), nll)}
        total = parts["lm"]
        if hit_weight or kl_weight:
            words = _row_mean(rows * (targets != end_id(self.tokenizer)))  # without what ends an answer: no style word
        if hit_weight:
            parts["hit"], parts["hard_hit"] = style_hit(logits, words, self.style_pieces)
            parts["hit_rows"] = hit_rows.float()
            total = total + hit_weight * (1 - parts["hit"]) * parts["hit_rows"]
        if kl_weight:
            style_logits = self.style_head(features["style_feature"].float())  # [B,S]
            # the head learns from the style column alone: if the KL reached it, p would follow the text halfway
            parts["kl"] = style_kl(style_logits.detach(), logits, words, self.style_pieces)
            parts["style_ce"] = F.cross_entropy(style_logits, style, ignore_index=-1, reduction="none")
            total = total + kl_weight * (parts["kl"] + parts["style_ce"])
        parts["total"] = total
        return {"loss": total.mean(), **{name: part.detach() for name, part in parts.items()}}

    # -- answering

    @torch.no_grad()
    def predict_answers(self, images, questions, contexts=None, image_embeds=None, style_feature=None, method="generate",
                        answers=None, beams=5, max_new_tokens=None, length_penalty=0.0, gated=True, blind=False, best=None,
                        batch_size=memory.ANSWERS):
        """Answers as strings, one a question; prompt never repeated, cut at the newline.

        images [B,3,h,w] as Processor makes them, or None with image_embeds [B,P,W] and style_feature [B,F] computed before. A single
        picture, question or context stands for all others. ValueError: anything else that does not go together. method "generate":
        beam search (BLIP-2's VQA settings as defaults) up to max_new_tokens (None: max_answer of the model); with best=N a list for each
        question, the N best of the beams (N at least), equal ones once; batch_size questions at a time, "auto": as many as the GPU's
        memory holds. method "rank": the likeliest of the given list `answers`.
        """
        if self.training:
            raise RuntimeError("call model.eval() before predict_answers: dropout would change the answers")
        new_tokens = self.max_answer if max_new_tokens is None else max_new_tokens
        given.one_source(images, image_embeds, style_feature)
        given.search(method, answers, best, beams=beams, max_new_tokens=new_tokens, batch_size=1 if batch_size == "auto" else batch_size)
        features = {"image_embeds": image_embeds, "style_feature": style_feature}
        if image_embeds is None:
            rows.refuse_other_pixels(images)
            features = self.image_features(images)
        if method == "rank":
            scores = self.score_answers(questions, answers, contexts=contexts, **features, gated=gated, blind=blind)
            return [answers[i] for i in scores.argmax(-1).tolist()]
        asked = self._asked(questions, contexts, **features, gated=gated and not blind)
        found = {}
        for part in self._parts(*asked[:2], memory.answer_batch(batch_size, self.language_model, beams, new_tokens)):
            own = (x if x is None else x[part] if isinstance(x, torch.Tensor) else [x[i] for i in part] for x in asked)
            ids = self.decoder.generate(*self._prompts(*own, gated, blind), beams, new_tokens, length_penalty, best or 1)
            texts = [text.split("\n")[0].strip() for text in texts_of(self.tokenizer, ids.tolist())]
            found |= {i: texts[k:k + (best or 1)] for i, k in zip(part, range(0, len(texts), best or 1))}
        return [found[i][0] if best is None else list(dict.fromkeys(found[i])) for i in range(len(found))]

    @staticmethod
    def _parts(questions, contexts, size):
        """Numbers of the questions in lists of `size` at most, like lengths together: few pads."""
        order = range(len(questions))
        if len(order) > size:
            order = sorted(order, key=lambda i: len(questions[i]) + len(contexts[i] if contexts else ""))
        return [list(order[start:start + size]) for start in range(0, len(order), size)]

    @torch.no_grad()
    def score_answers(self, questions, answers, image_embeds, style_feature=None, contexts=None, gated=True, blind=False,
                      chunk=64):
        """Log-likelihood of every candidate answer (with its newline) for every question -> float [B,A].

        image_embeds [B,P,W], style_feature [B,F]. Candidates are scored in chunks of `chunk` question-answer pairs.
        """
        given.whole_from_one(chunk=chunk)
        asked = questions, *_ = self._asked(questions, contexts, image_embeds, style_feature, gated and not blind)
        prompts = self._prompts(*asked, gated, blind)
        targets = [answer_ids(self.tokenizer, answer) for answer in given.texts(answers, "answers")]
        pairs = [(b, target) for b in range(len(questions)) for target in targets]
        return self.decoder.log_likelihoods(*prompts, pairs, chunk).view(len(questions), len(answers))

    @torch.no_grad()
    def confidence(self, questions, answers, image_embeds, style_feature=None, contexts=None, gated=True, blind=False, chunk=64):
        """Mean log-probability of the tokens of one answer a question, newline included -> float [B], 0 at most.

        image_embeds [B,P,W], style_feature [B,F]. The mean and not the sum, so that long answers do not count as doubtful. An
        empty answer is what answer_ids makes of it: a space and the newline, which generation may well give.
        """
        given.whole_from_one(chunk=chunk)
        asked = questions, *_ = self._asked(questions, contexts, image_embeds, style_feature, gated and not blind)
        if len(given.texts(answers, "answers")) != len(questions):
            raise ValueError(f"{len(answers)} answers to {len(questions)} questions: one of each is wanted")
        prompts = self._prompts(*asked, gated, blind)
        pairs = list(enumerate(answer_ids(self.tokenizer, answer) for answer in answers))
        lengths = torch.tensor([len(target) for _, target in pairs], device=image_embeds.device)
        return self.decoder.log_likelihoods(*prompts, pairs, chunk) / lengths

    def _asked(self, questions, contexts, image_embeds, style_feature, gated):
        """-> (B questions, B contexts or None, image_embeds [B,P,W], style_feature [B,F] or None): what was given once stands for all.

        gated: are gates asked for? ValueError: numbers that do not go together, a thing of another kind."""
        widths = self.qformer.config.encoder_hidden_size, self.efficientnet.width if self.efficientnet is not None else None
        return given.asked(questions, contexts, image_embeds, style_feature, widths, gated and self.mapper is not None)

    def _prompts(self, questions, contexts, image_embeds, style_feature, gated, blind):
        """-> what the language model sees of the pictures, [B,Q,D], and the batch of encode_prompts."""
        batch = send_to_device(encode_prompts(self.tokenizer, questions, contexts, self.decoder.left), image_embeds.device,
                               non_blocking=True)
        return self.visual_prompt(image_embeds, style_feature, batch["input_ids"], batch["attention_mask"], gated, blind), batch


def _weighed(rows, values):
    """rows [B,M] @ values [M] or [M,N], in float32: a mean is a product too, which autocast would round to three digits."""
    with no_rounding(rows.device):
        return rows @ values


def _row_mean(rows):
    """0/1 [B,M] -> the matrix that averages each row's positions (rows without any give 0)."""
    return rows / rows.sum(1, keepdim=True).clamp(min=1)


# --- one line to load what was trained ------------

def _known_settings():
    """Names that Blip2OPTGated.build takes, but for those of how a model is loaded."""
    parameters = [*inspect.signature(Blip2OPTGated).parameters, *PLACES, "lm_precision"]
    return set(parameters) - {"tokenizer", "dtype", "safe", "tower"}


class Processor:
    """Pictures -> [B,3,s,s] as the model takes them, on its device: a path, a PIL image, or a list of these (B of them).

    DataError: a picture that is missing, damaged, or of another kind; none at all."""

    def __init__(self, model):
        self.model = model

    def __call__(self, pictures):
        pictures = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        if not pictures:
            raise DataError("an empty list of pictures: a path, a PIL image or a list of at least one is wanted")
        tensors = [rows.image_tensor(self._image(one), self.model.image_size) for one in pictures]
        return torch.stack(tensors).to(self.model.query_tokens.device)

    def _image(self, picture):
        if isinstance(picture, (str, os.PathLike)):
            return rows.load_image(picture)
        if not isinstance(picture, Image.Image):
            raise DataError(f"a picture's path or a PIL image is wanted, got {type(picture).__name__}")
        try:
            picture.load()
            return rows.to_rgb(picture)
        except OSError as error:  # Pillow reads no pixel before it must
            raise DataError(f"{getattr(picture, 'filename', '') or 'a PIL image'}: cannot be read ({error})") from None


def load_gated(folder, blip2=None, efficientnet=None, device="cpu", dtype=torch.float32, lm_precision=None, qformer=None,
               safe=True, model_class=None):
    """What was trained -> (Blip2OPTGated in eval mode, Processor).

    folder: runs/<name>/, its best.pt, or an exported folder. blip2, efficientnet, qformer: where these of the training lie now, if
    they moved. Every relative path, also those that the training was started with, counts from the working directory, and from the
    project's folder where it is not there. dtype: of the frozen towers; lm_precision: one of published.LM_PRECISIONS (default: as
    in training). safe=False: take a style classifier that only pickle can load, WHICH RUNS WHATEVER THE FILE HOLDS. model_class: the
    subclass of Blip2OPTGated that was trained, where it is one's own.

        model, processor = load_gated("runs/gated")
        model.predict_answers(processor("painting.jpg"), ["What style is this painting?"])

    DataError: see engine/saved.py.
    """
    saved = read(folder, _known_settings())
    moved = {"blip2": blip2, "efficientnet": efficientnet, "qformer": qformer, "lm_precision": lm_precision}
    places = part_paths(saved, {name: str(value) for name, value in moved.items() if value is not None})
    if places["lm_precision"] not in (None, *published.LM_PRECISIONS):
        raise DataError(f"lm_precision {places['lm_precision']!r} is none of {', '.join(published.LM_PRECISIONS)}")
    try:
        model = (model_class or Blip2OPTGated).build(**places, dtype=dtype, safe=safe)
    except (TypeError, ValueError) as error:  # of a setting's value
        raise DataError(f"{saved.source}: no model can be built from its settings ({said(error)})") from None
    refuse_other_base(saved, places, model)
    refuse_other_dtypes(saved, model)
    load_trainable(model, saved.state, saved.source)
    if saved.context:
        what = "the label that its style classifier finds likeliest" if saved.context == "efficientnet" else "a text about the picture"
        print(f"note: {saved.source} was trained with {what} before each question (--context {saved.context}); without it, "
              "contexts=[...] of predict_answers, it answers worse than eval_gated.py says", file=sys.stderr)
    return model.eval().to(device), Processor(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="core.py: the models. Nothing to run here but --env.")
    parser.add_argument("--env", action="store_true", required=True,
                        help="print what a bug report needs; names and paths are masked")
    parser.parse_args()
    print(environment.environment())
