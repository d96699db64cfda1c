"""prompts.py: texts as the models read them: what training, evaluation and every page must agree on.

    prompt_ids, answer_ids, encode_training, encode_prompts   questions and answers of the language model
    question_of                                               a prompt's question back
    habits_of, end_id, stop_ids                               what its tokenizer puts around a text, and what ends an answer
    answer_length, log_cut_answers, log_cut_questions         how long answers and questions may be, and which are cut
    Collate                                                   samples of questions.Questions -> a batch
    encode_captions, caption_prompts                          captions of the language model
    text_ids                                                  texts of the Q-Former

Capitals in shape comments as in core.py: B batch, L text tokens, P image patches, W vision width.
"""

import functools
import sys
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

from data.tables import excerpt
from engine import loaders
from engine.errors import DataError

PROMPT = "Question: {} Answer:"  # BLIP-2's prompt; training and evaluation share this one line
CONTEXT = "Context: {} "  # before it, where a data set has text about the picture
MAX_PROMPT = 64  # tokens of "Question: ... Answer:"
MAX_QUESTION = 128  # tokens of a question in the Q-Former, as InstructBLIP has it
MAX_TEXT = 32  # tokens of a text in the Q-Former, [CLS] and [SEP] among them
MAX_ANSWER = 64  # tokens of an answer with its end of line, at most: more than short answers ever have, so that none is cut


class Habits(NamedTuple):
    """What a tokenizer does with a text, and with the pieces that a prompt is made of."""
    before: list  # ids that stand before a text: [BOS] of OPT and Llama, none of Qwen, SmolLM2 and T5
    after: list  # ids behind it: [EOS] of T5's encoder
    own_blank: bool  # SentencePiece puts the blank before a word itself, byte-level tokenizers have it written


@functools.lru_cache(maxsize=16)
def habits_of(tokenizer):
    """Tokenizer -> Habits. A token that begins or ends texts is taken for one where the tokenizer puts it: many name one that their
    model was never trained with. OPT's (</s>) is always put, since its tokenizer is often saved without that rule."""
    whole, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    begins = whole[0] == tokenizer.bos_token_id or tokenizer.bos_token == "</s>"
    ends = whole[-1] == tokenizer.eos_token_id
    return Habits([tokenizer.bos_token_id] * begins, [tokenizer.eos_token_id] * ends,
                  tokenizer.convert_ids_to_tokens(bare)[0].startswith("\u2581"))


def inner_ids(tokenizer, text):
    """Ids of a text as it stands within a longer one; the blank before its first word is written: inner_ids(t, " word")."""
    return tokenizer(text.removeprefix(" ") if habits_of(tokenizer).own_blank else text, add_special_tokens=False).input_ids


def newline_id(tokenizer):
    """The token of a line's end."""
    ids = tokenizer("\n", add_special_tokens=False).input_ids
    if not ids:
        raise DataError(f"{tokenizer.name_or_path}: its tokenizer has no token for the end of a line, which ends an answer, nor one that "
                        "it puts behind a text: give a BLIP-2 with another language model, such as Salesforce/blip2-opt-2.7b")
    return ids[-1]


def end_id(tokenizer):
    """The token that is trained to end an answer: the newline (BLIP-2's stage 2 trains "text + newline"), or T5's end of text."""
    return (habits_of(tokenizer).after or [newline_id(tokenizer)])[0]


def stop_ids(tokenizer):
    """The tokens that end a generated answer: end_id, and the end of text where that is not also its beginning, as OPT's </s>."""
    return list(dict.fromkeys([end_id(tokenizer)] + [i for i in [tokenizer.eos_token_id] if i not in (None, tokenizer.bos_token_id)]))


def prompt_ids(tokenizer, question, context="", max_tokens=MAX_PROMPT, max_context=128):
    """Token ids of the context where there is one and the prompt, with what the tokenizer puts before and behind a text.

    A long question is cut so that "Answer:" always stands at the end; a context is cut to max_context tokens of its own.
    """
    before, after, _ = habits_of(tokenizer)
    head, tail = PROMPT.split("{}")
    told = inner_ids(tokenizer, CONTEXT.format(context.strip()).rstrip())[:max_context] if context.strip() else []
    head = " " + head if told else head  # OPT's words hold the blank before them: alone it would be a token that no text has there
    tail = inner_ids(tokenizer, tail) + after
    asked = inner_ids(tokenizer, head + question.strip())[:max_tokens - len(before) - len(tail)]
    return before + told + asked + tail


def question_of(prompt):
    """The text of a prompt -> its question. Of a context only the last "Question:" counts."""
    head, tail = PROMPT.split(" {}")
    return prompt.rpartition(head)[2].strip().removesuffix(tail.strip()).strip()


def answer_ids(tokenizer, answer, max_tokens=None):
    """Token ids of " answer" and end_id; with max_tokens cut to as many, the end stays."""
    ids = inner_ids(tokenizer, " " + answer.strip())
    return (ids if max_tokens is None else ids[:max_tokens - 1]) + [end_id(tokenizer)]


def answer_lengths(tokenizer, answers):
    """Tokens of each answer with its end of line; equal answers are counted once."""
    lengths = {answer: len(answer_ids(tokenizer, answer)) for answer in set(answers)}
    return [lengths[answer] for answer in answers]


def pad_ids(rows, value, left=False, multiple=1):
    """Lists of ids -> LongTensor [B,L], padded with value on the right, or on the left for generation; L a multiple of `multiple`."""
    L = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[value] * (L - len(r)) + r if left else r + [value] * (L - len(r)) for r in rows])


def text_lengths(tokenizer, questions, answers, contexts):
    """Tokens of each prompt with its answer, nearly (nothing is cut here): what batches of equal length are made by."""
    texts = [CONTEXT.format(c.strip()) * bool(c.strip()) + PROMPT.format(q) + f" {a}"
             for q, a, c in zip(questions, answers, contexts)]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def encode_training(tokenizer, questions, answers, max_answer=None, contexts=None, multiple=1):
    """Questions and answers -> dict of [B,L] tensors, right-padded to a multiple: input_ids, attention_mask, prompt_mask, labels.

    labels are -100 on the prompt and on pads, so the loss sees the answer alone. prompt_mask marks the prompt: the gates
    read the question there and never the answer. max_answer: tokens of an answer kept, None = all.
    """
    prompts = [prompt_ids(tokenizer, q, c) for q, c in zip(questions, contexts or [""] * len(questions))]
    return pad_training(tokenizer, prompts, [answer_ids(tokenizer, a, max_answer) for a in answers], multiple)


def pad_training(tokenizer, prompts, targets, multiple=1):
    """Ids of B prompts and of what is to follow them -> the dict of encode_training."""
    def padded(rows, value):
        return pad_ids(rows, value, multiple=multiple)

    pairs = list(zip(prompts, targets))
    return {"input_ids": padded([p + t for p, t in pairs], tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(p + t) for p, t in pairs], 0),
            "prompt_mask": padded([[1] * len(p) + [0] * len(t) for p, t in pairs], 0),
            "labels": padded([[-100] * len(p) + t for p, t in pairs], -100)}


def encode_captions(tokenizer, captions, max_tokens=MAX_TEXT, multiple=1):
    """Captions -> dict of [B,L] tensors as encode_training gives them: no prompt but what the tokenizer puts around a text, then the
    caption, cut to max_tokens with its end_id (LAVIS, stage 2)."""
    before, after, _ = habits_of(tokenizer)
    targets = [inner_ids(tokenizer, caption)[:max_tokens - 1] + [end_id(tokenizer)] for caption in captions]
    return pad_training(tokenizer, [before + after] * len(targets), targets, multiple)


def caption_prompts(tokenizer, count):
    """What encode_captions puts before each of `count` captions: dict of [B,0 or 1], input_ids, attention_mask."""
    before, after, _ = habits_of(tokenizer)
    ids = torch.tensor([before + after] * count, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encode_prompts(tokenizer, questions, contexts=None, left=True):
    """Questions -> dict of [B,L] tensors for generation: input_ids, attention_mask; padded on the left, as a decoder needs it that
    goes on where the prompt ends, or on the right for an encoder."""
    prompts = [prompt_ids(tokenizer, q, c) for q, c in zip(questions, contexts or [""] * len(questions))]
    return {"input_ids": pad_ids(prompts, tokenizer.pad_token_id, left),
            "attention_mask": pad_ids([[1] * len(p) for p in prompts], 0, left)}


def text_ids(tokenizer, texts, max_length=MAX_TEXT):
    """Texts -> dict of [B,L]: input_ids ([CLS] words [SEP], a long one loses its end and keeps [SEP]), attention_mask."""
    ids = [i if len(i) <= max_length else i[:max_length - 1] + i[-1:] for i in tokenizer(list(texts), verbose=False).input_ids]
    return {"input_ids": pad_ids(ids, tokenizer.pad_token_id), "attention_mask": pad_ids([[1] * len(i) for i in ids], 0)}


# --- batches of questions ------------

class Collate:
    """Samples -> batch for Blip2OPTGated.forward. A class and not a closure, so that it also works where workers are spawned.

    max_answer: see answer_length."""

    def __init__(self, tokenizer, styles, max_answer):
        self.tokenizer, self.styles, self.max_answer = tokenizer, [s.lower() for s in styles], max_answer

    def __call__(self, samples):
        features, group = zip(*samples)
        if fault := loaders.fault_of(samples):
            return fault
        batch = encode_training(self.tokenizer, [r.question for r in group], [r.answer for r in group], self.max_answer,
                                [r.context for r in group], multiple=4)  # few distinct lengths
        batch |= default_collate(features)  # images [B,3,s,s], or image_embeds [B,P,W] and style_feature [B,F]
        batch["style"] = torch.tensor([self._index(r.style) for r in group])  # [B], -1 = unknown
        batch["hit_rows"] = torch.tensor([self._index(r.answer) >= 0 for r in group])  # [B]
        return batch

    def _index(self, name):
        name = name.strip().lower()
        return self.styles.index(name) if name in self.styles else -1


def answer_length(tokenizer, train_rows, limit):
    """Tokens of the longest training answer with its end of line, `limit` at most: what is trained and what is generated."""
    return min(limit, max(answer_lengths(tokenizer, [answer for r in train_rows for answer in r.trained_on])))


def log_cut_questions(tokenizer, texts, log=print):
    """Say of {word before the line: questions} how many different ones are longer than prompt_ids has them, where any is."""
    for what, questions in texts.items():
        asked = list(dict.fromkeys(questions))
        cut = [text for text in asked if len(prompt_ids(tokenizer, text, max_tokens=sys.maxsize)) > MAX_PROMPT]
        if cut:
            log(f"{what}: {len(cut)} of {len(asked)} different questions are cut at {MAX_PROMPT} tokens with \"Question:\" and "
                f"\"Answer:\", first {excerpt(cut[0])}: what stands behind is never read; put long texts into a context (--context)")


def log_cut_answers(tokenizer, splits, longest, log=print):
    """Say of every split {name: rows} how many answers, of a row's several each different one, have more than `longest` tokens; only those
    are not trained or scored whole."""
    for split, read in splits.items():
        told = [(r, answer) for r in read for answer in dict.fromkeys(r.trained_on)]
        cut = [one for one, n in zip(told, answer_lengths(tokenizer, [answer for _, answer in told])) if n > longest]
        first = f", first {loaders.list_rows([cut[0][0]])}: {cut[0][1]!r}" if cut else ""
        log(f"{split}: {len(cut)} of {len(told)} answers are cut at {longest} tokens{first}")
