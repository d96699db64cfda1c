"""captioning.py: BLIP's captions and their scores, the same way in training and afterwards.

    load_blip                  a folder or an id -> (model, tokenizer)
    decoder_inputs, Collate    texts as BLIP's decoder is trained on them; samples of captions.Captions -> a batch
    describe                   pictures -> captions
    confidence, evaluate       how sure the model is of a caption; every picture of a split captioned
    summarize                  the scores of a split; mean_of_three: what best.pt is chosen by
    captions_of, write_captions    {file: caption}; write_results: for a page

Capitals in shape comments: B batch, s side of a picture, L tokens of a caption, V vocabulary.
"""

import json

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from tqdm import tqdm

import metrics
from data import rows
from data.captions import token_ids
from engine import errors, files, loaders, pages, published
from engine.errors import DataError
from engine.prompts import pad_ids
from engine.text import texts_of

SMOOTHING = 0.1  # BLIP's own (med.py); transformers had it up to 4.37 and has 0 since


# --- the model ------------

def load_blip(name):
    """HuggingFace id, folder or tiny -> (BlipForConditionalGeneration with label smoothing, tokenizer), see published.load_blip2."""
    from transformers import BlipForConditionalGeneration
    name = published.in_models(name, "blip")
    model, tokenizer = published.load_published(BlipForConditionalGeneration, "BLIP", name)
    text = model.config.text_config
    published.refuse_more_tokens(tokenizer, text.vocab_size, "the decoder", name)
    ours, wanted = (tokenizer.pad_token_id, tokenizer.sep_token_id), (text.pad_token_id, text.sep_token_id)
    if ours != wanted:
        raise DataError(f"{name}: tokenizer and decoder do not belong together (pad and sep are {ours} and {wanted})")
    if tokenizer("a").input_ids[-1] != text.sep_token_id:
        raise DataError(f"{name}: its tokenizer does not end a text with [SEP], so no caption would ever end")
    set_smoothing(model)
    return model, tokenizer


def set_smoothing(model, value=SMOOTHING):
    """Label smoothing of the loss, where the config keeps it and where the decoder took it from."""
    model.config.text_config.label_smoothing = model.text_decoder.label_smoothing = value


# --- texts as the decoder reads them ------------

def decoder_inputs(ids, mask, bos):
    """Token ids [B,L] as the tokenizer gives them ([CLS] ... [SEP] pads) and their mask -> what BLIP's decoder is trained on.

    Position 0 is bos, [DEC], since generation starts with it and the library's forward does not put it there; the labels of pads
    are -100, since it would train on them. Labels stand under their own tokens: the library shifts them. (models/blip.py)
    """
    ids = ids.clone()
    ids[:, 0] = bos
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Collate:
    """Samples -> pixel_values [B,3,s,s] and, where they have tokens, decoder_inputs [B,L]."""

    def __init__(self, pad, bos):
        self.pad, self.bos = pad, bos

    @classmethod
    def of(cls, model):
        """The Collate of a BlipForConditionalGeneration."""
        return cls(model.config.text_config.pad_token_id, model.config.text_config.bos_token_id)

    def __call__(self, samples):
        if fault := loaders.fault_of(samples):
            return fault
        batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample, _ in samples])}
        if "ids" in samples[0][0]:
            batch |= self.inputs([sample["ids"] for sample, _ in samples])
        return batch

    def inputs(self, ids):
        """Token ids of B texts -> decoder_inputs [B,L]."""
        return decoder_inputs(pad_ids(ids, self.pad), pad_ids([[1] * len(i) for i in ids], 0), self.bos)


# --- captions ------------

@torch.no_grad()
def describe(model, tokenizer, pixels, settings):
    """Pixels [B,3,s,s] -> B captions. The one way from a picture to a caption. settings: of generate()."""
    ids = model.generate(pixel_values=pixels, **settings)  # [B,up to max_length]
    return texts_of(tokenizer, ids[:, 1:])  # without [DEC], which is no token of the tokenizer


def token_losses(model, pixels, inputs, smoothing=0.0):
    """Cross-entropy of every label of decoder_inputs -> [B,L-1], 0 at pads."""
    logits = model(pixel_values=pixels, **inputs).logits[:, :-1].float()  # [B,L-1,V]
    return F.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none", label_smoothing=smoothing)


@torch.no_grad()
def confidence(model, tokenizer, pixels, captions):
    """Mean log-probability of a caption's tokens, its end among them, without the search's penalties: [B,3,s,s], B texts -> [B]."""
    rows.refuse_other_pixels(pixels)
    if isinstance(captions, str) or len(captions) != len(pixels):
        raise ValueError(f"a list of {len(pixels)} captions is wanted, one for each picture, got {captions!r:.60}")
    ids = token_ids(tokenizer, captions)
    inputs = send_to_device(Collate.of(model).inputs(ids), pixels.device)
    return -token_losses(model, pixels, inputs).sum(1) / torch.tensor([len(i) - 1 for i in ids], device=pixels.device)


@torch.no_grad()
def evaluate(model, tokenizer, data, accelerator, settings, batch_size, workers, with_confidence=False):
    """Caption every row exactly once, on however many processes.

    Returns on every process a list of dicts in row order: row, caption, with_confidence: confidence and, where the rows have tokens,
    loss (sum over the caption's tokens, smoothed as in training) and tokens. LoaderError: a picture is broken.
    """
    model.eval()
    mine = list(range(len(data)))[accelerator.process_index::accelerator.num_processes]
    batches, results = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)], []
    loaded = iter(loaders.load_batches(data, Collate.of(model), batches, workers))
    for numbers in tqdm(batches, desc="captioning", leave=False, mininterval=1,
                        disable=None if accelerator.is_main_process else True):
        with loaders.dead_loaders_named([data.rows[i] for i in numbers]):
            batch = loaders.next_batch(loaded, accelerator.device)
        pixels, table = batch.pop("pixel_values"), {}
        with errors.batch_size_in_memory_errors(batch_size, "--val-batch"), accelerator.autocast():
            table["caption"] = describe(model, tokenizer, pixels, settings)
            if with_confidence:
                table["confidence"] = confidence(model, tokenizer, pixels, table["caption"]).tolist()
            if batch:
                table |= {"loss": token_losses(model, pixels, batch, model.text_decoder.label_smoothing).sum(1).tolist(),
                          "tokens": (batch["labels"][:, 1:] != -100).sum(1).tolist()}
        results += [{"row": i, **{name: values[k] for name, values in table.items()}} for k, i in enumerate(numbers)]
    return sorted(gather_object(results), key=lambda one: one["row"])


def captions_of(data, results):
    """{file: caption} of the results of evaluate."""
    return {p.name: one["caption"] for p, one in zip(data.rows, results)}


def write_captions(path, data, results):
    """captions_of as JSON, as metrics.py reads it."""
    with files.whole_file(path) as file:
        json.dump(captions_of(data, results), file, indent=1, ensure_ascii=False)


def write_results(page, title, pictures, systems, cases=0, **content):
    """The results of a split for a page, see pages.write_results. pictures: N captions.Picture; systems: {name: N dicts with at least
    "caption"}, the trained one last; cases: 0, or a page of that many worst and best alone."""
    return pages.write_results(page, "captions", title, **content, systems=systems, cases=cases, pictures=[
        {"image": p.image, "name": p.name, "captions": p.captions} for p in pictures])


# --- their scores ------------

def mean_of_three(scores):
    """Mean of METEOR, ROUGE-L and CIDEr-D: what best.pt is chosen by. CIDEr-D has no value for a single picture."""
    values = [scores[name] for name in (metrics.meteor_name(), "ROUGE-L", "CIDEr-D") if scores[name] is not None]
    return sum(values) / len(values)


def summarize(results, data):
    """The numbers that are logged of the results of evaluate, over the rows of `data` with all their captions as references."""
    corpus = metrics.score_captions([one["caption"] for one in results], [list(p.captions) for p in data.rows])["corpus"]
    numbers = {"images": len(results), "loss": sum(one["loss"] for one in results) / sum(one["tokens"] for one in results),
               "meteor": corpus[metrics.meteor_name()], "rouge_l": corpus["ROUGE-L"], "cider_d": corpus["CIDEr-D"],
               "bleu_4": corpus["BLEU-4"], "score": mean_of_three(corpus)}
    return {name: value for name, value in numbers.items() if value is not None}
