"""eval_gated.py: what a best.pt of train_gated.py can do, beside what costs nothing.

    python eval_gated.py --checkpoint runs/gated/best.pt                      # data and models as in training
    python eval_gated.py --checkpoint runs/gated/best.pt --split test --predictions runs/gated/test.json

One table: per question type and overall, loss, style hit, KL, exact match, VQA accuracy, BLEU and ROUGE-L of (1) the commonest
training answer of the type, (2) the same BLIP-2 without gates and untrained, (3) the trained model with its gates closed,
(4) the trained model.
"""

import argparse
import csv
import json
import pathlib
import sys

import torch
from accelerate import Accelerator

import core
import metrics
import runfolder
from rows import DataError
from train_gated import Collate, Questions, evaluate, loss_summary, precision_of, read_data, resolved

LOSSES = ("loss", "hit", "kl")  # hit: mass on style words, over the questions whose answer is a style
SCORES = ("EM", "VQA", "BLEU", "ROUGE-L")  # percent


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="best.pt of train_gated.py")
    parser.add_argument("--data", metavar="DIR", help="folder with the CSV files (default: the one of training)")
    parser.add_argument("--images", metavar="DIR", help="image root (default: as in training, or DATA/images)")
    parser.add_argument("--split", default="val", help="which CSV file: train, val or test (default: val)")
    parser.add_argument("--columns", nargs="+", metavar="NAME=COLUMN", help="names of your columns (default: as in training)")
    parser.add_argument("--encoding", help="of the CSV file (default: as in training)")
    parser.add_argument("--separator", help="of the CSV file (default: as in training)")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows and missing images out, counted and listed")
    parser.add_argument("--predictions", metavar="FILE.json", help="answers in VQAv2's result format, and beside it FILE.csv with "
                                                                   "image, question, answer, prediction")
    parser.add_argument("--method", choices=("generate", "rank"), default="generate",
                        help="generate: beam search; rank: the likeliest of all training answers (default: generate)")
    parser.add_argument("--beams", type=runfolder.positive, default=5, help="beams of generate (default: 5)")
    parser.add_argument("--max-new-tokens", type=runfolder.positive, default=16, help="longest answer of generate (default: 16)")
    parser.add_argument("--no-baselines", action="store_true", help="only the trained model: a third of the time")
    parser.add_argument("--blip2", metavar="ID|DIR", help="where the BLIP-2 of training lies now, if it moved")
    parser.add_argument("--efficientnet", metavar="FILE", help="where the style classifier of training lies now, if it moved")
    parser.add_argument("--safe-load", action="store_true", help="refuse a style checkpoint that only pickle can load")
    parser.add_argument("--batch-size", type=runfolder.positive, default=16, help="questions at a time (default: 16)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                        help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    return runfolder.parse_args(parser, argv)


def load_model(args, checkpoint, dtype):
    """The model of a checkpoint before its trained tensors are put in: the same BLIP-2, untrained and with open gates."""
    built_from = dict(checkpoint["model_args"])
    for name in ("blip2", "efficientnet"):
        built_from[name] = getattr(args, name) or built_from[name]
    places = resolved(built_from)
    model = core.Blip2OPTGated.build(**places, safe=args.safe_load, dtype=dtype)
    if runfolder.fingerprint(model) != checkpoint["frozen"]:
        raise DataError(f"{args.checkpoint} was trained on another BLIP-2 or style classifier than {places['blip2']} and "
                        f"{places['efficientnet']}: pass --blip2 and --efficientnet of the training")
    return model


def data_args(args, trained_with):
    """--data, --images, --columns, --encoding and --separator: the flag, else what the training used."""
    if args.data is None:
        args.data, args.images = trained_with["data"], args.images or trained_with["images"]
    args.columns = trained_with["columns"] if args.columns is None else args.columns
    args.encoding = args.encoding or trained_with["encoding"]
    args.separator = args.separator or trained_with["separator"]


# --- scores: one row of the table is (question type, system) ------------

def score(predictions, answers):
    """Mean EM, VQA accuracy, sentence BLEU (prediction as hypothesis) and ROUGE-L, all in percent."""
    pairs = list(zip(predictions, answers))
    sums = {"EM": sum(metrics.exact_match(p, a) for p, a in pairs),
            "VQA": sum(metrics.vqa_accuracy(p, [a]) for p, a in pairs),
            "BLEU": sum(metrics.sentence_bleu(p, a) for p, a in pairs),
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


def write_predictions(path, questions, predictions):
    """VQAv2's result format ({"question_id", "answer"}; question_id = number of the row) and a CSV that people can read."""
    path = pathlib.Path(path)
    with runfolder.whole_file(path) as file:
        json.dump([{"question_id": i, "answer": p} for i, p in enumerate(predictions)], file, ensure_ascii=False, indent=0)
    with runfolder.whole_file(path.with_suffix(".csv")) as file:
        writer = csv.writer(file)
        writer.writerow(("question_id", "image", "question", "answer", "prediction", "question_type", "style"))
        writer.writerows((i, r.name, r.question, r.answer, p, r.question_type, r.style)
                         for i, (r, p) in enumerate(zip(questions, predictions)))
    return path.with_suffix(".csv")


def main(argv=None):
    args = get_args(argv)
    if args.predictions and not args.predictions.endswith(".json"):
        raise DataError(f"--predictions {args.predictions}: must end in .json (the readable .csv is written beside it)")
    checkpoint = runfolder.load_checkpoint(
        args.checkpoint, ("model_args", "state", "args", "loss_weights", "majority", "answers", "frozen"))
    data_args(args, checkpoint["args"])
    questions = read_data(args, args.split)
    accelerator = Accelerator(mixed_precision=precision_of(args), cpu=not torch.cuda.is_available())
    model = load_model(args, checkpoint, core.DTYPES[accelerator.mixed_precision]).to(accelerator.device)
    data = Questions(questions, model.image_size)
    collate = Collate(model.tokenizer, model.styles, checkpoint["args"]["max_answer"])
    weights = checkpoint["loss_weights"]
    candidates = sorted(checkpoint["answers"])

    def run(gated):
        def answer(model, questions, features):
            return model.predict_answers(None, questions, **features, method=args.method, answers=candidates, beams=args.beams,
                                         max_new_tokens=args.max_new_tokens, gated=gated)
        return evaluate(model, data, collate, accelerator, args.batch_size, args.workers, weights, gated, answer)

    majority = checkpoint["majority"]
    systems = {}
    if not args.no_baselines:
        systems["majority answer"] = [{"prediction": majority.get(r.question_type, majority[""])} for r in questions]
        systems["BLIP-2, no gates"] = run(gated=False)
    runfolder.load_trainable(model, checkpoint["state"], args.checkpoint)
    if not args.no_baselines and model.gates is not None:
        systems["gates closed"] = run(gated=False)
    name = "gated" if model.gates is not None else "trained, no gates"
    systems[name] = run(gated=True)
    if accelerator.is_main_process:
        print_table(score_table(questions, systems))
        if args.predictions:
            readable = write_predictions(args.predictions, questions, [one["prediction"] for one in systems[name]])
            print(f"\npredictions: {args.predictions} and {readable}")


if __name__ == "__main__":
    sys.exit(runfolder.exit_code(main))
