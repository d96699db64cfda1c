"""eval_gated.py: what a best.pt of train_gated.py can do, beside what costs nothing.

    python eval_gated.py --checkpoint runs/gated/best.pt                      # data and models as in training
    python eval_gated.py --checkpoint runs/gated/best.pt --split test --predictions runs/gated/test.json

One table: per question type and overall, loss, style hit, KL, exact match, VQA accuracy, BLEU and ROUGE-L of (1) the commonest
training answer of the type, (2) the language model with the question alone, without an image, (3) the same BLIP-2 without gates
and untrained, (4) the trained model with its gates closed, (5) with --shuffle-style the trained model with another picture in its
style classifier, (6) the trained model.
"""

import argparse
import csv
import json
import pathlib
import sys

import numpy as np
import torch
from accelerate import Accelerator

import loop
import core
import metrics
import published
import rows
import runfolder
from rows import DataError
from train_gated import Collate, Questions, cached_features, evaluate, loss_summary, predicted_styles, read_data, resolved
from train_gated import get_args as train_gated_args

LOSSES = ("loss", "lm", "hit", "kl")  # hit: mass on style words, over the questions whose answer is a style
SCORES = ("EM", "VQA", "BLEU", "BLEU-AQ", "ROUGE-L")  # percent; AQ: with ArtQuest's order of the arguments


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="best.pt of train_gated.py")
    parser.add_argument("--data", metavar="DIR", help="folder with the CSV files (default: the one of training)")
    parser.add_argument("--images", metavar="DIR", help="image root (default: as in training, or DATA/images)")
    parser.add_argument("--split", default="val", help="which CSV file: train, val or test (default: val)")
    parser.add_argument("--columns", nargs="+", metavar="NAME=COLUMN", help="names of your columns (default: as in training)")
    parser.add_argument("--encoding", help="of the CSV file (default: as in training)")
    parser.add_argument("--separator", help="of the CSV file (default: as in training)")
    parser.add_argument("--semart", metavar="DIR|FILE", help="SemArt's table, where --style or --context of the training need it "
                                                             "(default: as in training)")
    parser.add_argument("--skip-bad", type=runfolder.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                        help="leave bad rows and broken or missing images out and list them, up to this share (0.01 where no "
                             "number is given)")
    parser.add_argument("--predictions", metavar="FILE.json", help="answers in VQAv2's result format, and beside it FILE.csv with "
                                                                   "image, question, answer, prediction")
    parser.add_argument("--method", choices=("generate", "rank"), default="generate",
                        help="generate: beam search; rank: the likeliest of all training answers (default: generate)")
    parser.add_argument("--beams", type=runfolder.positive, default=5, help="beams of generate (default: 5)")
    parser.add_argument("--max-new-tokens", type=runfolder.positive, default=16, help="longest answer of generate (default: 16)")
    parser.add_argument("--table", metavar="FILE.json", help="the table as a list of JSON objects")
    parser.add_argument("--no-baselines", action="store_true", help="only the trained model: a third of the time")
    parser.add_argument("--shuffle-style", action="store_true", help="also with another picture in the style classifier: where the "
                                                                     "gates do the work, style answers must fall")
    parser.add_argument("--merge-lora", metavar="FILE.pt", help="write the checkpoint with LoRA folded into W_K and W_V, and stop")
    parser.add_argument("--blip2", metavar="ID|DIR", help="where the BLIP-2 of training lies now, if it moved")
    parser.add_argument("--efficientnet", metavar="FILE", help="where the style classifier of training lies now, if it moved")
    parser.add_argument("--safe-load", action="store_true", help="refuse a style checkpoint that only pickle can load")
    parser.add_argument("--batch-size", type=runfolder.positive, default=16, help="questions at a time (default: 16)")
    parser.add_argument("--workers", type=runfolder.whole, default=2, help="loader processes (default: 2)")
    parser.add_argument("--cache", metavar="DIR", help="keep the frozen towers' features there, computed once, also those of training")
    parser.add_argument("--lm-precision", choices=tuple(published.LM_PRECISIONS), help="of the frozen language model (default: as in training)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                        help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    return runfolder.parse_args(parser, argv)


def built_as(args, checkpoint):
    """model_args of a checkpoint with what lies elsewhere now, or is asked for in another precision."""
    moved = {name: getattr(args, name) for name in ("blip2", "efficientnet", "lm_precision") if getattr(args, name)}
    return resolved({**checkpoint["model_args"], **moved})


def load_model(args, checkpoint, dtype, towers=None):
    """The model of a checkpoint before its trained tensors are put in: the same BLIP-2, untrained and with open gates.

    towers: None, or the fingerprints of towers that a cache stands for, which are then left out."""
    places = built_as(args, checkpoint)
    try:
        model = core.Blip2OPTGated.build(**places, safe=args.safe_load, dtype=dtype, tower=not towers)
    except TypeError as error:  # a setting that this version does not know
        raise DataError(f"{args.checkpoint}: written by another version of this project ({error})") from None
    others = runfolder.other_parts({**runfolder.fingerprint(model), **(towers or {})}, checkpoint["frozen"])
    if others:
        raise DataError(f"{args.checkpoint} was trained on another BLIP-2 or style classifier than {places['blip2']} and "
                        f"{places['efficientnet']} (other: {', '.join(others)}): pass --blip2 and --efficientnet of the training")
    return model


def data_args(args, trained_with):
    """The flags about data: the one given, else what the training used."""
    args.val_share = 0.0  # of a table given here, all rows
    if args.data is None:
        args.data, args.images = trained_with["data"], args.images or trained_with["images"]
        args.val_share = trained_with["val_share"]
    args.columns = trained_with["columns"] if args.columns is None else args.columns
    args.encoding = args.encoding or trained_with["encoding"]
    args.separator = args.separator or trained_with["separator"]
    args.semart = args.semart or trained_with["semart"]
    args.style, args.context = trained_with["style"], trained_with["context"]


class OtherStyle(Questions):
    """Questions whose style classifier looks at another picture: {"images", "style_images"}, each [3,s,s].

    Every picture gets one partner, drawn from the seed, never itself (where there are two)."""

    def __init__(self, questions, image_size, features=None, seed=0):
        super().__init__(questions, image_size, features)
        paths = sorted({row.image for row in questions})
        order = np.random.default_rng(seed).permutation(len(paths))
        self.partner = {paths[i]: paths[j] for i, j in zip(order, np.roll(order, 1))}

    def __getitem__(self, index):
        sample, row = super().__getitem__(index)
        other = self.partner[row.image]
        if self.features is not None:
            return {**sample, "style_feature": self.features[other]["style_feature"]}, row
        if not isinstance(sample, DataError):
            try:
                sample["style_images"] = rows.image_tensor(rows.load_image(other), self.image_size)
            except DataError as error:
                sample = error
        return sample, row


def write_merged(model, checkpoint, path):
    """--merge-lora: best.pt without LoRA; eval_gated takes it like any other, and peft is no longer needed."""
    if not checkpoint["model_args"]["lora_rank"]:
        raise DataError("--merge-lora: this checkpoint was trained without --lora-rank")
    model.merge_lora()
    settings = {**checkpoint["model_args"], "lora_rank": 0, "own_kv": True}
    runfolder.save_checkpoint(path, {**checkpoint, "state": runfolder.trainable_state(model), "model_args": settings,
                                     "frozen": runfolder.fingerprint(model)})
    print(f"merged: {path}")


# --- scores: one row of the table is (question type, system) ------------

def score(predictions, answers):
    """Mean EM, VQA accuracy, sentence BLEU (prediction as hypothesis; AQ: answer as hypothesis) and ROUGE-L, in percent."""
    pairs = list(zip(predictions, answers))
    sums = {"EM": sum(metrics.exact_match(p, a) for p, a in pairs),
            "VQA": sum(metrics.vqa_accuracy(p, [a]) for p, a in pairs),
            "BLEU": sum(metrics.sentence_bleu(p, a) for p, a in pairs),
            "BLEU-AQ": sum(metrics.sentence_bleu(a, p) for p, a in pairs),
            "ROUGE-L": sum(metrics.rouge_l(metrics.tokenize(p), [metrics.tokenize(a)]) for p, a in pairs)}
    return {name: 100 * value / len(pairs) for name, value in sums.items()}


def score_table(questions, systems):
    """questions: list of Row; systems: {name: what evaluate returns, at least [{"prediction"}]}.

    -> rows {type, system, n, loss, hit, kl (those that the system has), EM, ...}; types sorted, "all" last.
    """
    kinds = sorted({r.question_type for r in questions if r.question_type})
    table = []
    for kind in [*kinds, "all"]:
        chosen = [i for i, r in enumerate(questions) if kind in (r.question_type, "all")]
        for system, found in systems.items():
            here = [found[i] for i in chosen]
            scores = score([one["prediction"] for one in here], [questions[i].answer.strip() for i in chosen])
            table.append({"type": kind, "system": system, "n": len(chosen), **loss_summary(here), **scores})
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


def question_ids(questions):
    """The table's question_id, as a number where it is one, else the number of the row from 0. DataError: one twice."""
    ids = [int(r.question_id) if r.question_id.isdecimal() else r.question_id or i for i, r in enumerate(questions)]
    seen = {}
    for i, r in zip(ids, questions):
        if i in seen:
            raise DataError(f"{r.file}: {rows.locate(r.file, seen[i].line)} and {rows.locate(r.file, r.line)} share question_id {i}, "
                            "which evaluators refuse: make them distinct or rename the column")
        seen[i] = r
    return ids


def write_predictions(path, ids, questions, predictions):
    """VQAv2's result format ({"question_id", "answer"}) and a CSV that people can read."""
    path = pathlib.Path(path)
    with runfolder.whole_file(path) as file:
        json.dump([{"question_id": i, "answer": p} for i, p in zip(ids, predictions)], file, ensure_ascii=False, indent=0)
    with runfolder.whole_file(path.with_suffix(".csv")) as file:
        writer = csv.writer(file)
        writer.writerow(("question_id", "image", "question", "answer", "prediction", "question_type", "style"))
        writer.writerows((i, r.name, r.question, r.answer, p, r.question_type, r.style)
                         for i, r, p in zip(ids, questions, predictions))
    return path.with_suffix(".csv")


def main(argv=None):
    args = get_args(argv)
    if args.predictions and not args.predictions.endswith(".json"):
        raise DataError(f"--predictions {args.predictions}: must end in .json (the readable .csv is written beside it)")
    for path in filter(None, (args.predictions, args.table, args.merge_lora)):
        runfolder.refuse_unwritable(path)
    checkpoint = runfolder.load_checkpoint(
        args.checkpoint, ("model_args", "state", "args", "loss_weights", "majority", "answers", "frozen"))
    accelerator = Accelerator(mixed_precision=loop.precision_of(args.precision), cpu=not torch.cuda.is_available())
    if args.merge_lora:
        model = load_model(args, checkpoint, torch.float32)
        runfolder.load_trainable(model, checkpoint["state"], args.checkpoint)
        return write_merged(model, checkpoint, args.merge_lora)
    data_args(args, {**vars(train_gated_args(["--data", ""])), **checkpoint["args"]})  # defaults for what older files lack
    questions = read_data(args, args.split, accelerator.print)
    ids = question_ids(questions)
    places, dtype = built_as(args, checkpoint), core.DTYPES[accelerator.mixed_precision]
    features, towers = cached_features(args, places, questions, accelerator, dtype)
    model = load_model(args, checkpoint, dtype, towers).to(accelerator.device)
    if places.get("lm_precision") != checkpoint["model_args"].get("lm_precision"):
        accelerator.print(f"the language model is in {places['lm_precision']}, in training it was in "
                          f"{checkpoint['model_args'].get('lm_precision') or 'the precision of the towers'}")
    if args.style == "efficientnet":
        questions, = predicted_styles(args, places["blip2"], places["efficientnet"], [questions], accelerator.device,
                                      accelerator.print)
    data = Questions(questions, model.image_size, features)
    collate = Collate(model.tokenizer, model.styles, checkpoint["args"]["max_answer"])
    candidates = sorted(checkpoint["answers"])

    def run(data=data, trained=True, **seeing):
        def answer(model, group, features):
            return model.predict_answers(None, [r.question for r in group], [r.context for r in group], **features, **seeing,
                                         method=args.method, answers=candidates, beams=args.beams, max_new_tokens=args.max_new_tokens)
        weights = checkpoint["loss_weights"] if trained else {"hit_weight": checkpoint["loss_weights"]["hit_weight"]}
        with loop.batch_size_in_memory_errors(args.batch_size):
            found = evaluate(model, data, collate, accelerator, args.batch_size, args.workers, weights, answer, **seeing)
        return found if trained else [{k: v for k, v in one.items() if k != "total"} for one in found]  # no KL: a part is left out

    majority = checkpoint["majority"]
    systems = {}
    if not args.no_baselines:
        systems["majority answer"] = [{"prediction": majority.get(r.question_type, majority[""])} for r in questions]
        systems["no image"] = run(trained=False, blind=True)
        systems["BLIP-2, no gates"] = run(trained=False, gated=False)
    runfolder.load_trainable(model, checkpoint["state"], args.checkpoint)
    if not args.no_baselines and model.gates is not None:
        systems["gates closed"] = run(gated=False)
    if args.shuffle_style and model.gates is not None:
        systems["another's style"] = run(OtherStyle(questions, model.image_size, features))
    name = "gated" if model.gates is not None else "trained, no gates"
    systems[name] = run()
    if accelerator.is_main_process:
        if args.predictions:  # before the scores: what cost an hour is safe first
            readable = write_predictions(args.predictions, ids, questions, [one["prediction"] for one in systems[name]])
            print(f"predictions: {args.predictions} and {readable}")
        table = score_table(questions, systems)
        print_table(table)
        if args.table:
            with runfolder.whole_file(args.table) as file:
                json.dump(table, file, indent=1)


if __name__ == "__main__":
    sys.exit(loop.exit_code(main))
