"""evaluation.py: a Gated BLIP-2 scored on questions, the same way in training and afterwards.

    evaluate, loss_summary                 every row's losses and answer; their means, as they are logged
    score, score_table                     the answers' scores; all of it by question type and system
    print_table, write_table, coverage     what is told of them
"""

import json
import math

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

import metrics
from engine import comparison, files, gate_frames, loaders

# of curves.png and of the report: (heading, [(kind of row, column of training_log.csv, label)])
PANELS = [("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),
          ("exact match, validation", [("epoch", "em", "exact match")]),
          ("style questions, share", [("epoch", "hit", "mass on style words"), ("epoch", "hard_hit", "style word first")]),
          ("symmetric KL, nats", [("epoch", "kl", "symmetric KL")]),
          ("gradient norm", [("step", "grad_norm", "gradient norm")])]
OWN = ("total", "lm", "hit", "hard_hit", "hit_rows", "kl", "style_ce", "confidence")  # columns that loss_summary knows or leaves out
LOSSES = ("loss", "lm", "hit", "kl")  # hit: mass on style words, over the questions whose answer is a style
SCORES = ("EM", "VQA", "BLEU", "BLEU-AQ", "ROUGE-L")  # percent; AQ: with ArtQuest's order of the arguments


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


# --- scores: one row of the table is (question type, system) ------------

def score(predictions, answers, people=None):
    """Means of metrics.answer_scores and of BLEU-AQ, the answer as hypothesis, in percent: {name of SCORES: mean}.

    people: of each question the answers of all people who were asked, for VQA accuracy; None: the one answer."""
    found = [{**metrics.answer_scores(p, a, asked), "BLEU-AQ": metrics.sentence_bleu(a, p)}
             for p, a, asked in zip(predictions, answers, people or [[a] for a in answers])]
    return {name: 100 * sum(one[name] for one in found) / len(found) for name in SCORES}


def score_table(questions, systems, overlap=None):
    """questions: list of Row; systems: {name: what evaluate returns, at least [{"prediction"}]}; overlap: see
    seen.training_overlap.

    -> rows {type, system, n, seen (how many of n, where that is known), loss, hit, kl (those that the system has), EM, ...}; types
    sorted, "all" last.
    """
    table = []
    for kind, chosen in comparison.groups([r.question_type for r in questions]).items():
        seen = {} if overlap is None else {"seen": sum(overlap[i] for i in chosen)}
        for system, results in systems.items():
            here = [results[i] for i in chosen]
            scores = score([one["prediction"] for one in here], [questions[i].answer.strip() for i in chosen],
                           [questions[i].people for i in chosen])
            table.append({"type": kind, "system": system, "n": len(chosen), **seen, **loss_summary(here), **scores})
    return table


def print_table(table):
    """The rows of score_table as text; "-" where a system has no such value."""
    width = max(len(r["system"]) for r in table)
    print(f"\n{'type':12} {'system':{width}} {'n':>6}" + "".join(f"{name:>9}" for name in (*LOSSES, *SCORES)))
    previous = None
    for row in table:
        kind = row["type"] if row["type"] != previous else ""
        previous = row["type"]
        losses = "".join(f"{row[name]:9.3f}" if name in row else f"{'-':>9}" for name in LOSSES)
        print(f"{kind:12} {row['system']:{width}} {row['n']:>6}" + losses + "".join(f"{row[name]:9.1f}" for name in SCORES))


def write_table(path, table):
    """The rows of score_table as FILE.csv, or as a list of JSON objects."""
    if path.endswith(".csv"):
        files.write_csv(path, table)
        return
    with files.whole_file(path) as file:
        json.dump(table, file, indent=1)


def coverage(questions, results, least):
    """--abstain-below in a line: how many of the answers have this confidence (0 to 1), and the EM of those."""
    hits = [metrics.exact_match(one["prediction"], r.answer.strip()) for r, one in zip(questions, results)]
    kept = [hit for hit, one in zip(hits, results) if math.exp(one["confidence"]) >= least]
    told = f"EM {100 * sum(kept) / len(kept):.1f} on those, " if kept else ""
    return (f"--abstain-below {least:g}: {len(kept)} of {len(hits)} questions are answered ({len(kept) / len(hits):.1%}), {told}"
            f"{100 * sum(hits) / len(hits):.1f} on all")
