"""decoders.py: the frozen language model behind the Q-Former: logits of training, answers, and the likelihood of given answers.

    decoder_of       the one that fits a transformers model
    Causal           OPT, Llama, Qwen, ...: one row [visual | question | answer]
    Seq2Seq          Flan-T5: its encoder reads [visual | question], its decoder writes the answer
    refuse_decoder   what neither can do, from the config alone

Capitals in shape comments as in core.py: B batch, Q queries, L text tokens, D width, V vocabulary, M answer positions of the batch,
N question-answer pairs of a chunk, A tokens of their longest answer.
"""

import inspect
from importlib.metadata import version

import torch
import torch.nn.functional as F

from engine import packing
from engine.answering import Rows, Tree, search
from engine.errors import DataError
from engine.memory import cache_rows
from engine.prompts import pad_ids, stop_ids

BEFORE_5 = int(version("transformers").split(".")[0]) < 5  # the older end of what requirements.txt allows
NEEDS_5 = ("xglm",)  # before, its code takes no mask of four axes
ENCODER_DECODERS = ("t5", "mt5")
# what a config names where the model's own forward does something to the logits after its head, which answer positions alone would miss
LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}


def decoder_of(language_model, tokenizer):
    """A transformers language model and its tokenizer -> Causal or Seq2Seq."""
    return (Seq2Seq if language_model.config.is_encoder_decoder else Causal)(language_model, tokenizer)


def refuse_decoder(config, name, *dtypes):
    """DataError for a language model, by its config, that is not built in here, or not in one of these dtypes."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODERS:
        raise DataError(f"{name}: answers with {config.model_type}, an encoder-decoder that is not built in here; of these "
                        f"{' and '.join(ENCODER_DECODERS)} are, and every causal decoder (OPT, Llama, Qwen, ...)")
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        raise DataError(f"{name}: its text_config names no decoder_start_token_id, the token with which an answer of {config.model_type} "
                        "starts: add it to its config.json (0 in the published Flan-T5)")
    # as transformers 5 writes a T5 whose head is its own
    if getattr(config, "scale_decoder_outputs", None) is False and config.tie_word_embeddings and BEFORE_5:
        raise DataError(f"{name}: saved by transformers 5, and the one here ({version('transformers')}) would give {config.model_type} "
                        "another head: set tie_word_embeddings of text_config in its config.json to false")
    unread = _unread(config) if BEFORE_5 else ()
    if unread:
        raise DataError(f"{name}: saved by transformers 5, and the one here ({version('transformers')}) does not read its rope_parameters: "
                        f"write {', '.join(unread)} beside them in its config.json, as tools/assemble.py does, or install transformers 5")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False):
        raise DataError(f"{name}: answers with {config.model_type}, whose layers do not all remember by attention "
                        f"({', '.join(sorted(others)) or 'they have a state'}): not built in here")
    if BEFORE_5 and config.model_type in NEEDS_5:
        raise DataError(f"{name}: answers with {config.model_type}, which works from transformers 5 on; here is {version('transformers')}")
    if (narrow := getattr(config, "word_embed_proj_dim", None)) and narrow != config.hidden_size:
        raise DataError(f"{name}: answers with {config.model_type} whose words are {narrow} wide and its layers "
                        f"{config.hidden_size}: not built in here")
    changed = [key for key, plain in LOGIT_CHANGES.items() if getattr(config, key, plain) not in (None, plain)]
    if changed:
        raise DataError(f"{name}: answers with {config.model_type}, which changes its logits after the word head ({', '.join(changed)}): "
                        "not built in here")
    if config.model_type in ENCODER_DECODERS and torch.float16 in dtypes:
        raise DataError(f"{name}: answers with {config.model_type}, whose activations overflow in float16, and it answers \"ssss\": "
                        "take --precision bf16 or no (and --lm-precision bf16, fp32, int8 or nf4)")


def positions_for_4(settings):
    """rope_parameters of a language model's config, as transformers 5 writes them -> {name: value} of the settings that transformers 4
    reads in their place, without which it would take its defaults."""
    rope = settings.get("rope_parameters") or {}
    near = rope.get("sliding_attention", {})  # Gemma 3 has angles for each kind of layer
    rope, found = rope.get("full_attention", rope), {}
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            found["rope_scaling"] = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        if "partial_rotary_factor" in rope:
            found["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if settings["model_type"] == "gpt_neox":
            found |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 0.25)}
    if "rope_theta" in near:
        found["rope_local_base_freq"] = near["rope_theta"]
    return found


def _unread(config):
    """Names of positions_for_4 whose value this config, as transformers 4 has read it, does not have."""
    def same(value, wanted):
        return all(value.get(name) == one for name, one in wanted.items()) if isinstance(wanted, dict) and value else value == wanted
    return [name for name, wanted in positions_for_4(config.to_dict()).items() if not same(getattr(config, name, None), wanted)]


class Decoder:
    """What both kinds share. Holds no weight of its own: made anew from the model's language_model whenever it is asked for."""
    left = True  # on which side prompts are padded, see prompts.encode_prompts

    def __init__(self, language_model, tokenizer):
        self.language_model, self.tokenizer = language_model, tokenizer

    def inputs(self, visual, input_ids, attention_mask):
        """[visual | tokens] as the language model takes them: the one place where dtype and device are settled.

        visual [B,Q,D], input_ids and attention_mask [B,L] -> inputs_embeds [B,Q+L,D], attention_mask [B,Q+L].
        """
        words = self.language_model.get_input_embeddings()(input_ids)  # [B,L,D]
        embeds = torch.cat([visual.to(words.dtype), words], 1)
        ones = attention_mask.new_ones(visual.shape[:2])
        return {"inputs_embeds": embeds, "attention_mask": torch.cat([ones, attention_mask], 1)}

    def answer_logits(self, visual, input_ids, attention_mask, labels):
        """Logits at answer positions only, of a batch of encode_training: the vocabulary is wide and all other rows would be thrown
        away. -> logits [M,V], targets [M], owner [M] (row of the batch), in the order of the rows."""
        raise NotImplementedError

    def prefill(self, visual, input_ids, attention_mask):
        """Run the prompts of encode_prompts once -> what `scores` needs of them."""
        raise NotImplementedError

    def scores(self, prefilled, rows, targets):
        """Logits of answers targets [N,A], right-padded with -100, to the prompts `rows` [N] of prefill -> [M,V], of real tokens."""
        raise NotImplementedError

    def log_likelihoods(self, visual, prompts, pairs, chunk):
        """Sum of the log-probabilities of the tokens of each pair (row of the batch, token ids) -> float [pairs].

        The prompts run once, whatever the number of answers; `chunk` pairs run together.
        """
        prefilled, sums = self.prefill(visual, **prompts), torch.empty(len(pairs), device=visual.device)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))  # like lengths together: next to no pads
        for part in (order[start:start + chunk] for start in range(0, len(order), chunk)):
            rows = torch.tensor([pairs[i][0] for i in part], device=visual.device)
            targets = pad_ids([pairs[i][1] for i in part], -100).to(visual.device)  # [N,A]
            real = targets != -100
            nll = F.cross_entropy(self.scores(prefilled, rows, targets).float(), targets[real], reduction="none")  # [M]
            sums[part] = -torch.zeros(targets.shape, device=visual.device).masked_scatter(real, nll).sum(1)  # [N]
        return sums

    def generate(self, visual, prompts, beams, new_tokens, length_penalty, best=1):
        """Greedy or beam search, at most new_tokens each -> ids of the new tokens, `best` rows a prompt, the likeliest first."""
        return search(self._state(visual, prompts, beams, new_tokens), beams, new_tokens, stop_ids(self.tokenizer),
                      self.tokenizer.pad_token_id, length_penalty, best)

    def _state(self, visual, prompts, beams, new_tokens):
        """What `search` runs on."""
        raise NotImplementedError

    def with_cache(self, cache):
        """The cache as the language model takes it: past_key_values before transformers 5.24, cache since."""
        names = inspect.signature(type(self.language_model).forward).parameters
        return {"cache" if "cache" in names else "past_key_values": cache}


class Causal(Decoder):
    """A decoder that goes on with the row that it is given."""

    @property
    def body(self):
        """The layers without the word head."""
        return packing.body_of(self.language_model)

    def head(self, states):
        """States [...,D] -> logits [...,V]."""
        return self.language_model.get_output_embeddings()(states)

    def answer_logits(self, visual, input_ids, attention_mask, labels):
        """See Decoder."""
        inputs = self.inputs(visual, input_ids, attention_mask)
        if self.language_model.config._attn_implementation == packing.NAME:
            states = packing.Packing.of(inputs["attention_mask"]).run(self.body, inputs["inputs_embeds"])
        else:  # pads are on the right, where no word looks; without a mask the flash kernel may run
            states = self.body(**{**inputs, "attention_mask": None}, use_cache=False).last_hidden_state  # [B,Q+L,D]
        owner, position = (labels != -100).nonzero(as_tuple=True)
        before = visual.shape[1] + position - 1  # the state before each token predicts it
        return self.head(states[owner, before]), labels[owner, position], owner

    def asked(self, visual, input_ids, attention_mask):
        """`inputs` of prompts with their pads before the picture, where nothing stands between picture and question: of some (MPT)
        columns are positions."""
        inputs = self.inputs(visual, input_ids, attention_mask)
        order = inputs["attention_mask"].argsort(dim=1, stable=True)  # [B,Q+L]
        return {"inputs_embeds": inputs["inputs_embeds"].gather(1, order[..., None].expand_as(inputs["inputs_embeds"])),
                "attention_mask": inputs["attention_mask"].gather(1, order)}

    def prefill(self, visual, input_ids, attention_mask):
        """-> (cache of all positions but the last, mask [B,Q+L], last token [B,1], never a pad, whose state predicts the answer)."""
        inputs = self.asked(visual, input_ids, attention_mask)
        return self._cached(inputs), inputs["attention_mask"], input_ids[:, -1:]

    def scores(self, prefilled, rows, targets):
        """See Decoder. A chunk holds a copy of the cache for each of its pairs, and runs the last token and the answer."""
        cache, mask, last = prefilled
        real, before = targets != -100, targets[:, :-1]  # the last token of an answer predicts nothing
        ids = torch.cat([last[rows], before.clamp(min=0)], 1)  # [N,A], right-padded
        mask = torch.cat([mask[rows], real[:, :-1]], 1)  # [N,Q+L-1+A]; a pad takes no position
        out = self.body(input_ids=ids, attention_mask=mask, **self.positions(mask, ids.shape[1]),
                        **self.with_cache(cache_rows(cache, rows)))
        return self.head(out.last_hidden_state[real])  # [N,A,D] -> [M,D] -> [M,V]

    def generate(self, visual, prompts, beams, new_tokens, length_penalty, best=1):
        """See Decoder."""
        if self._takes_tree(visual.shape[1] + prompts["input_ids"].shape[1] + beams * new_tokens):
            return super().generate(visual, prompts, beams, new_tokens, length_penalty, best)
        settings = {"length_penalty": length_penalty} if beams > 1 else {}
        return self.language_model.generate(
            **self.asked(visual, **prompts), **settings, num_beams=beams, num_return_sequences=best, do_sample=False,
            max_new_tokens=new_tokens, min_new_tokens=1, eos_token_id=stop_ids(self.tokenizer), pad_token_id=self.tokenizer.pad_token_id)

    def _takes_tree(self, places):
        """May keys stand in another order than their positions, at so many places? Not where the place is the position (Bloom, MPT,
        Falcon's biases), nor where a layer looks back on fewer of them."""
        config = self.language_model.config
        windows = [w for name in ("sliding_window", "window_size") if (w := getattr(config, name, None)) is not None]
        takes_positions = "position_ids" in inspect.signature(type(self.body).forward).parameters and not getattr(config, "alibi", False)
        return takes_positions and places <= min(windows, default=places)

    def _state(self, visual, prompts, beams, new_tokens):
        return Tree(self, self.inputs(visual, **prompts), beams, new_tokens)

    def _cached(self, inputs):
        """`inputs` -> DynamicCache of all positions but the last, [B,heads,Q+L-1,D/heads] a layer."""
        from transformers import DynamicCache
        cache, before = DynamicCache(), {name: x[:, :-1] for name, x in inputs.items()}
        if before["inputs_embeds"].shape[1]:  # else nothing stands before the last
            self.body(**before, **self.positions(before["attention_mask"], before["inputs_embeds"].shape[1]), **self.with_cache(cache))
        return cache

    def positions(self, mask, n):
        """Positions of the last n columns of a mask [B,L], as keywords: a pad takes none, so that it moves nothing."""
        if "position_ids" not in inspect.signature(type(self.body).forward).parameters:
            return {}
        return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)[:, -n:]}


class Seq2Seq(Decoder):
    """T5: [visual | question] go through the encoder, the answer is the decoder's. Its relative positions count pads, so they stand
    on the right, behind the question."""
    left = False

    def answer_logits(self, visual, input_ids, attention_mask, labels):
        """See Decoder."""
        is_answer = labels != -100  # [B,L]
        asked = attention_mask.bool() & ~is_answer  # [B,L], the prompts, at the left
        columns = int(asked.sum(1).max())
        encoded = self.prefill(visual, input_ids[:, :columns], asked[:, :columns].to(attention_mask.dtype))
        order = is_answer.int().argsort(dim=1, descending=True, stable=True)[:, :int(is_answer.sum(1).max())]
        targets = labels.gather(1, order)  # [B,A]: each row's answer moved to its left, -100 behind it
        real = targets != -100
        rows = torch.arange(len(labels), device=labels.device)
        return self.scores(encoded, rows, targets), targets[real], real.nonzero()[:, 0]

    def prefill(self, visual, input_ids, attention_mask):
        """-> (the encoder's states [B,Q+L,D], mask [B,Q+L])."""
        inputs = self.inputs(visual, input_ids, attention_mask)
        return self.language_model.get_encoder()(**inputs).last_hidden_state, inputs["attention_mask"]

    def _state(self, visual, prompts, beams, new_tokens):
        return Rows(self, *self.prefill(visual, **prompts), beams)

    def scores(self, prefilled, rows, targets):
        """See Decoder."""
        from transformers.modeling_outputs import BaseModelOutput
        states, mask = prefilled
        ids = self.language_model.prepare_decoder_input_ids_from_labels(labels=targets)  # [N,A]: the start, then all but the last
        out = self.language_model(encoder_outputs=BaseModelOutput(states[rows]), attention_mask=mask[rows], decoder_input_ids=ids,
                                  use_cache=False)
        return out.logits[targets != -100]  # [N,A,V] -> [M,V]
