"""evaluation.py: a Gated BLIP-2 scored on questions, the same way in training and afterwards."""

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from engine import gate_frames, loaders

# of curves.png and of the report: (heading, [(kind of row, column of training_log.csv, label)])
PANELS = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),
          ("exact match, validation", [("epoch", "em", "exact match")]),
          ("style questions, share", [("epoch", "hit", "mass on style words"), ("epoch", "hard_hit", "style word first")]),
          ("symmetric KL, nats", [("epoch", "kl", "symmetric KL")]),
          ("gradient norm", [("step", "grad_norm", "gradient norm")])]
OWN = ("total", "lm", "hit", "hard_hit", "hit_rows", "kl", "style_ce", "confidence")  # columns that loss_summary knows or leaves out


@torch.no_grad()
def evaluate(model, data, collate, accelerator, batch_size, workers, loss_weights, answer=None, gates=False, **ablation):
    """Score every row exactly once, on however many processes.

    answer: None, or a function (model, rows, features) -> {column: a value for each row}, "prediction" among them. ablation:
    gated=False or blind=True, see Blip2OPTGated.forward. Returns on every process a list of dicts in row order: row, total, lm,
    hit, hard_hit, hit_rows, kl (those that are switched on), the columns of `answer`, and with gates=True the gates of a model that has any
    (gate_frames.gate_rows).
    """
    model.eval()
    by_length = sorted(range(len(data)), key=lambda i: text_length(data.rows[i]))  # few pads
    mine = by_length[accelerator.process_index::accelerator.num_processes]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    found = []
    loaded = iter(loaders.load_batches(data, collate, batches, workers))
    for numbers in tqdm(batches, desc="evaluating", leave=False, mininterval=1,
                        disable=None if accelerator.is_main_process else True):
        with loaders.dead_loaders_named([data.rows[i] for i in numbers]):
            batch = loaders.next_batch(loaded, accelerator.device)
        features = {name: batch.pop(name) for name in ("image_embeds", "style_feature") if name in batch}
        features = features or model.image_features(batch.pop("images"), batch.pop("style_images", None))
        with accelerator.autocast():
            parts = model(**batch, **features, **loss_weights, **ablation)
        parts.pop("loss")
        table = {name: values.float().expand(len(numbers)).tolist() for name, values in parts.items()}  # a scalar: of each row
        if answer:
            table |= answer(model, [data.rows[i] for i in numbers], features)
        if gates and model.gates is not None:
            table["gates"] = gate_frames.gate_rows(model, features["style_feature"], batch["input_ids"], batch["prompt_mask"])
        found += [{"row": i, **{name: values[k] for name, values in table.items()}} for k, i in enumerate(numbers)]
    return sorted(gather_object(found), key=lambda one: one["row"])


def text_length(row):
    """Letters that the language model reads of a row."""
    return len(row.question) + len(row.answer) + len(row.context)


def mean(found, name, where=None):
    """Mean of a column of evaluate's result over all rows, or over those where column `where` is not 0; None without any."""
    values = [one[name] for one in found if name in one and (where is None or one[where])]
    return sum(values) / len(values) if values else None


def loss_summary(found):
    """The numbers that are logged of an evaluation; hits are over the rows whose answer is a style. A term that an edited model
    returns is among them under its own name."""
    numbers = {"loss": mean(found, "total"), "lm": mean(found, "lm"), "hit": mean(found, "hit", "hit_rows"),
               "hard_hit": mean(found, "hard_hit", "hit_rows"), "kl": mean(found, "kl")}
    numbers |= {name: mean(found, name) for name, value in found[0].items() if isinstance(value, float) and name not in OWN}
    return {name: value for name, value in numbers.items() if value is not None}
