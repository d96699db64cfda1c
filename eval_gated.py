"""eval_gated.py: what a best.pt of train_gated.py can do, beside its baselines.

    python eval_gated.py --checkpoint runs/gated                              # data and models as in training
    python eval_gated.py --checkpoint runs/gated/best.pt --split test --predictions runs/gated/test.json
    python eval_gated.py --checkpoint runs/gated/best.pt --report runs/gated/report.html     # a page to look at
    python eval_gated.py --checkpoint runs/gated --against runs/other        # in pairs, with intervals; also --against test.json
    python eval_gated.py --checkpoint runs/gated/best.pt --ask "What style is this?" --images photos --answers answers.csv

One table: per question type and overall, loss, style hit, KL, exact match, VQA accuracy, BLEU and ROUGE-L of (1) the commonest
training answer of the type, (2) the language model with the question alone, without an image, (3) the same BLIP-2 without gates
and untrained, (4) the trained model with its gates closed, (5) with --shuffle-style the trained model with another picture in its
style classifier, (6) the trained model.
Confidence: geometric mean of the probabilities of the answer's tokens, its end among them; 0 to 1.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

import core
import metrics
from data import rows
from data.questions import Questions, read_questions
from engine import answering, checkpoints, comparison, errors, files, flags, folders, gate_frames, loop, memory, packing, published
from engine.errors import DataError
from engine.evaluation import PANELS, evaluate, loss_summary
from engine.features import cached_features, likeliest_styles, predicted_styles
from engine.prompts import Collate, log_cut_answers
from engine.saved import sees_style
from show import maps, report, sharing

LOSSES = ("loss", "lm", "hit", "kl")  # hit: mass on style words, over the questions whose answer is a style
SCORES = ("EM", "VQA", "BLEU", "BLEU-AQ", "ROUGE-L")  # percent; AQ: with ArtQuest's order of the arguments
ANSWERS = ("image", "question", "answer", "confidence")  # columns of --answers
ABOUT_TABLES = ("data", "predictions", "against", "table", "report", "no_baselines", "shuffle_style", "merge_lora", "cache", "skip_bad",
                "maps", "export")  # not with --ask
NEEDED = ("model_args", "state", "args", "loss_weights", "majority", "answers", "frozen")  # of a best.pt
# what train_gated.py did before a flag about data was there: for checkpoints that lack it
BEFORE = {"val_share": 0.1, "images": None, "columns": [], "encoding": "utf-8", "separator": None, "style": "column",
          "semart": None, "context": None}


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    data, answers = parser.add_argument_group("data"), parser.add_argument_group("answers")
    written, models = parser.add_argument_group("what is written"), parser.add_argument_group("models")
    models.add_argument("--checkpoint", metavar="DIR|FILE", help="run folder of train_gated.py, or its best.pt; not needed with "
                                                                 "--predictions and --against, two files of earlier evaluations")
    data.add_argument("--data", metavar="DIR", help="folder with the CSV files (default: the one of training)")
    data.add_argument("--images", metavar="DIR", help="image root (default: as in training, or DATA/images); with --ask "
                                                      "the folder of pictures")
    data.add_argument("--split", default="val", help="which CSV file: train, val or test; of a training on one table: val, its "
                                                                  "held-out pictures, or train (default: val)")
    data.add_argument("--columns", nargs="+", metavar="NAME=COLUMN", help="names of your columns (default: as in training)")
    data.add_argument("--encoding", help="of the CSV file (default: as in training)")
    data.add_argument("--separator", help="of the CSV file (default: as in training)")
    data.add_argument("--semart", metavar="DIR|FILE", help="SemArt's table, where --style or --context of the training need it "
                                                           "(default: as in training)")
    data.add_argument("--skip-bad", type=flags.share, nargs="?", const=0.01, default=0.0, metavar="SHARE",
                      help="leave bad rows and broken or missing images out and list them, up to this share (0.01 where no "
                           "number is given)")
    written.add_argument("--predictions", metavar="FILE.json", help="answers in VQAv2's result format, and beside it FILE.csv with "
                                                                    "image, question, answer, prediction, confidence, and with rank "
                                                                    "margin: log-likelihood above that of the runner-up")
    answers.add_argument("--method", choices=("generate", "rank"), default="generate",
                         help="generate: beam search; rank: the likeliest of all training answers (default: generate)")
    answers.add_argument("--beams", type=flags.positive, default=5, help="beams of generate (default: 5)")
    answers.add_argument("--max-new-tokens", type=flags.positive, metavar="N",
                         help="longest answer of generate (default: as long as the longest of training)")
    written.add_argument("--table", metavar="FILE.json|FILE.csv", help="the table as a list of JSON objects, or as CSV; seen: of how many "
                                                                       "of the n rows training saw the picture")
    written.add_argument("--report", metavar="FILE.html", help="a page with scores and their intervals, curves, confusion of "
                                                               "styles, how well confidence is calibrated, and samples")
    answers.add_argument("--abstain-below", type=flags.share, metavar="X",
                         help="confidence (0 to 1) below which there is no answer: says how many questions are answered and the EM "
                              "of those, the files keep all answers; with --ask the answer stays empty")
    answers.add_argument("--ask", nargs="+", metavar="QUESTION", help="ask this of every picture of --images and of the folders "
                                                                      "in it, write --answers, and stop")
    answers.add_argument("--answers", metavar="FILE.csv", help="of --ask: image, question, answer, confidence; goes on where it "
                                                               "stopped, FILE.csv.json says what it was made with")
    written.add_argument("--maps", type=flags.whole, default=0, metavar="N",
                         help="draw where the model looks and what its answers rest on, for the first N questions, and the gates "
                              "by style, into maps/ beside the checkpoint (default: 0)")
    written.add_argument("--export", metavar="DIR", help="write the trained tensors, gate_config.json and a model card there; they "
                                                         "are loaded again and compared bit by bit before the folder appears")
    answers.add_argument("--against", metavar="DIR|FILE",
                         help="compare in pairs with another run (its folder or best.pt), or with another's --predictions: by type, with "
                              "intervals over pictures and the rows that changed; written as PREDICTIONS.against.json and .csv, or as "
                              "SPLIT.against.json and .csv beside the checkpoint")
    answers.add_argument("--no-baselines", action="store_true", help="only the trained model: a third of the time")
    answers.add_argument("--shuffle-style", action="store_true", help="also with another picture in the style classifier: where the "
                                                                      "gates do the work, style answers must fall")
    written.add_argument("--merge-lora", metavar="FILE.pt", help="write the checkpoint with LoRA folded into W_K and W_V, and stop")
    models.add_argument("--blip2", metavar="ID|DIR", help="where the BLIP-2 of training lies now, if it moved")
    models.add_argument("--efficientnet", metavar="FILE", help="where the style classifier of training lies now, if it moved")
    answers.add_argument("--script", metavar="FILE.py", help="the edited copy of train_gated.py that trained it: its Model is used, and "
                                                             "the kinds of gates that it adds are known; the file is run")
    models.add_argument("--safe-load", action="store_true", help="refuse a style checkpoint that only pickle can load")
    models.add_argument("--batch-size", type=flags.positive_or_auto, default=memory.ANSWERS, metavar="N|auto",
                        help="questions at a time; auto: as many as the GPU's memory holds (default: 64)")
    models.add_argument("--graphs", action="store_true", help="on a GPU record each step of the answers once and replay it (CUDA graphs): "
                                                              "off by default, since no GPU was there to measure it")
    data.add_argument("--workers", type=flags.whole, default=2, help="loader processes (default: 2)")
    models.add_argument("--cache", metavar="DIR",
                        help="keep the frozen towers' features there, computed once, also those of training")
    models.add_argument("--lm-precision", choices=tuple(published.LM_PRECISIONS),
                        help="of the frozen language model (default: as in training)")
    models.add_argument("--precision", choices=("auto", "bf16", "fp16", "no"), default="auto",
                        help="auto: bf16 or fp16 on a GPU, none on a CPU (default: auto)")
    flags.put_first(parser, "--checkpoint", "--split", "--data", "--predictions", "--report", "--ask")
    args = flags.parse_args(parser, argv)
    mistake = flags_at_odds(args)
    if mistake:
        parser.error(mistake)
    return args


def flags_at_odds(args):
    """What is wrong with the flags in one line, "" where they go together."""
    if not args.checkpoint:
        if not (args.predictions and (args.against or "").endswith((".json", ".csv"))) or args.ask:
            return "--checkpoint is needed, but for --predictions and --against, two files of earlier evaluations"
        other = [f"--{name.replace('_', '-')}" for name in ABOUT_TABLES if getattr(args, name) and name not in ("predictions", "against")]
        return f"without --checkpoint nothing is evaluated: leave {', '.join(other)} out" if other else ""
    if (args.ask is None) != (args.answers is None):
        return "--ask and --answers go together"
    if args.merge_lora and (args.report or args.against or args.abstain_below is not None):
        return "--merge-lora answers nothing: leave --report, --against and --abstain-below out"
    if not args.ask:
        return ""
    other = [f"--{name.replace('_', '-')}" for name in ABOUT_TABLES if getattr(args, name)]
    if other:
        return f"--ask is about the pictures of --images alone: leave {', '.join(other)} out"
    if not args.images:
        return "--ask needs --images, the folder of pictures"
    return "" if all(question.strip() for question in args.ask) else "--ask: a question is empty"


def current_model_args(args, checkpoint):
    """model_args of a checkpoint with what lies elsewhere now, or is asked for in another precision."""
    moved = {name: getattr(args, name) for name in ("blip2", "efficientnet", "lm_precision") if getattr(args, name)}
    return published.resolve_paths({**checkpoint["model_args"], **moved})


def model_class(script):
    """The Model of an edited train_gated.py, RUN AS A MODULE; core's without one."""
    return flags.load_script(script).Model if script else core.Blip2OPTGated


def load_model(args, checkpoint, dtype, towers=None):
    """The model of a checkpoint before its trained tensors are put in: the same BLIP-2, untrained and with open gates.

    towers: None, or the fingerprints of towers that a cache stands for, which are then left out."""
    places = current_model_args(args, checkpoint)
    try:
        model = model_class(args.script).build(**places, safe=args.safe_load, dtype=dtype, tower=not towers)
    except TypeError as error:  # a setting that this version does not know
        raise DataError(f"{args.checkpoint}: written by another version of this project ({error})") from None
    packing.pack_samples(model.language_model)
    others = checkpoints.other_parts({**checkpoints.fingerprint(model), **(towers or {})}, checkpoint["frozen"])
    if others:
        raise DataError(f"{args.checkpoint} was trained on another BLIP-2 or style classifier than {places['blip2']} and "
                        f"{places['efficientnet']} (other: {', '.join(others)}): pass --blip2 and --efficientnet of the training")
    return model


def data_args(args, trained_with):
    """The flags about data: the one given, else what the training used."""
    args.val_share = 0.0  # of a table given here, all rows
    if args.data is None:
        args.data, args.images = trained_with["data"], args.images or trained_with["images"]
    if is_same_table(args.data, trained_with["data"]):
        args.val_share = trained_with["val_share"]
        if not args.val_share and args.split != "train":
            raise DataError(f"{args.data}: all of this table was trained on (--val-share 0): nothing in it was held out: give --data "
                            "with rows of their own, or --split train")
    args.columns = trained_with["columns"] if args.columns is None else args.columns
    args.encoding = args.encoding or trained_with["encoding"]
    args.separator = args.separator or trained_with["separator"]
    args.semart = args.semart or trained_with["semart"]
    args.style, args.context = trained_with["style"], trained_with["context"]


def is_same_table(one, other):
    """Are both the same table, and no folder with several?"""
    return os.path.isfile(one) and os.path.isfile(other) and os.path.samefile(one, other)


def training_overlap(checkpoint, questions, workers):
    """Of each row: did training see its picture? None where the checkpoint, of an earlier version, does not say."""
    if "pictures" not in checkpoint:
        return None
    pictures, digests = set(checkpoint["pictures"]), rows.picture_digests(questions, workers)
    return [digests[row.image] in pictures for row in questions]


def format_overlap(overlap):
    """training_overlap in words."""
    if overlap is None:
        return "unknown, since this checkpoint of an earlier version does not say which pictures were trained on"
    return f"{sum(overlap)} of {len(overlap)} rows" + (": these scores are not of held-out pictures" if any(overlap) else "")


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
    checkpoints.save_checkpoint(path, {**checkpoint, "state": checkpoints.trainable_state(model), "model_args": settings,
                                     "frozen": checkpoints.fingerprint(model)})
    print(f"merged: {path}")


# --- answers ------------

def answers_to(model, questions, contexts, features, args, candidates, with_confidence=True, **ablation):
    """Answers of a batch: {"prediction": texts}, with_confidence also "confidence", mean log-probability of the answer's tokens, and
    with --method rank "margin", by how much its log-likelihood is above that of the runner-up (nats; not where there is no other).

    features: image_embeds [B,P,W], style_feature [B,F]; candidates: of rank; ablation: gated=False or blind=True."""
    asked = {"questions": questions, "contexts": contexts, **features, **ablation}
    results = {}
    if args.method == "rank":
        scores = model.score_answers(answers=candidates, **asked)  # [B,A]
        results["prediction"] = [candidates[i] for i in scores.argmax(-1).tolist()]
        if with_confidence and len(candidates) > 1:
            first, second = scores.topk(2).values.unbind(-1)  # [B]
            results["margin"] = (first - second).tolist()
    else:
        results["prediction"] = model.predict_answers(None, beams=args.beams, max_new_tokens=args.max_new_tokens,
                                                      batch_size=args.batch_size, **asked)
    if with_confidence:
        results["confidence"] = model.confidence(answers=results["prediction"], **asked).tolist()
        for question, value in zip(questions, results["confidence"]):
            if not math.isfinite(value):
                raise DataError(f"{question!r}: the probability of the answer is {value}; use --precision bf16 or no")
    return results


def questions_at_once(args, model):
    """--batch-size as a number, now that the model is there; --graphs."""
    if args.graphs:
        answering.record_steps(model.language_model)
    return memory.answer_batch(args.batch_size, model.language_model, args.beams, args.max_new_tokens or model.max_answer)


def coverage(questions, results, least):
    """--abstain-below in a line: how many of the answers have this confidence (0 to 1), and the EM of those."""
    hits = [metrics.exact_match(one["prediction"], r.answer.strip()) for r, one in zip(questions, results)]
    kept = [hit for hit, one in zip(hits, results) if math.exp(one["confidence"]) >= least]
    told = f"EM {100 * sum(kept) / len(kept):.1f} on those, " if kept else ""
    return (f"--abstain-below {least:g}: {len(kept)} of {len(hits)} questions are answered ({len(kept) / len(hits):.1%}), {told}"
            f"{100 * sum(hits) / len(hits):.1f} on all")


def ask(args, checkpoint, accelerator):
    """--ask: a row of --answers for each picture of --images and each question, but for those that are there, see folders.py."""
    if accelerator.num_processes > 1:
        raise DataError("--ask writes one file from one process: start it without accelerate launch")
    names, asked = folders.pictures_in(args.images), [(question,) for question in dict.fromkeys(args.ask)]
    places = current_model_args(args, checkpoint)
    search = {"beams": args.beams, "max-new-tokens": args.max_new_tokens} if args.method == "generate" else {}
    made_with = {"checkpoint (sha256)": files.digest(args.checkpoint), "--images": os.path.realpath(args.images),
                 "--method": args.method, **search, "--abstain-below": args.abstain_below, "precision": accelerator.mixed_precision,
                 "--lm-precision": places.get("lm_precision")}
    with folders.open_table(args.answers, ANSWERS, 2, made_with) as table, errors.batch_size_in_memory_errors(args.batch_size):
        todo = table.missing(names, asked)
        if not todo:
            print(f"{args.answers}: all {len(names)} pictures are there")
            return
        model = load_model(args, checkpoint, core.DTYPES[accelerator.mixed_precision]).to(accelerator.device).eval()
        checkpoints.load_trainable(model, checkpoint["state"], args.checkpoint)
        args.batch_size = questions_at_once(args, model)
        context, net = checkpoint["args"].get("context"), None
        if context == "efficientnet":
            net = model_class(args.script).style_tower.from_checkpoint(places["efficientnet"], args.safe_load).to(accelerator.device).eval()
        elif context:
            print("note: this model was trained with a text before the question (--context); here there is none")

        def answer_batch(images, keys):
            return answer_pictures(model, images, keys, args, sorted(checkpoint["answers"]), net)
        folders.fill(table, args.images, todo, answer_batch, model.image_size, max(1, args.batch_size // len(asked)), args.workers,
                     accelerator.device)


def answer_pictures(model, images, keys, args, candidates, net=None):
    """images [B,3,s,s] and of each its keys (image, question) -> (N keys, N (answer, confidence)), see folders.fill. net: the style
    classifier whose label stood before each question in training."""
    features, labels = model.image_features(images), likeliest_styles(net, images) if net else None
    asked, cells = [(n, key) for n, own in enumerate(keys) for key in own], []
    for part in (asked[start:start + args.batch_size] for start in range(0, len(asked), args.batch_size)):
        numbers = torch.tensor([n for n, _ in part], device=images.device)
        own = {name: x if x is None else x[numbers] for name, x in features.items()}  # [N,P,W] and [N,F]
        contexts = [labels[n] for n, _ in part] if labels else None
        found = answers_to(model, [question for _, (_, question) in part], contexts, own, args, candidates)
        sure = [math.exp(value) for value in found["confidence"]]
        cells += [(text if value >= (args.abstain_below or 0) else "", f"{value:.4f}")
                  for text, value in zip(found["prediction"], sure)]
    return [key for _, key in asked], cells


# --- scores: one row of the table is (question type, system) ------------

def score(predictions, answers, people=None):
    """Mean EM, VQA accuracy, sentence BLEU (prediction as hypothesis; AQ: answer as hypothesis) and ROUGE-L, in percent.

    people: of each question the answers of all people who were asked, for VQA accuracy; None: the one answer."""
    pairs = list(zip(predictions, answers))
    sums = {"EM": sum(metrics.exact_match(p, a) for p, a in pairs),
            "VQA": sum(map(metrics.vqa_accuracy, predictions, people or [[a] for a in answers])),
            "BLEU": sum(metrics.sentence_bleu(p, a) for p, a in pairs),
            "BLEU-AQ": sum(metrics.sentence_bleu(a, p) for p, a in pairs),
            "ROUGE-L": sum(metrics.rouge_l(metrics.tokenize(p), [metrics.tokenize(a)]) for p, a in pairs)}
    return {name: 100 * value / len(pairs) for name, value in sums.items()}


def score_table(questions, systems, overlap=None):
    """questions: list of Row; systems: {name: what evaluate returns, at least [{"prediction"}]}; overlap: see
    training_overlap.

    -> rows {type, system, n, seen (how many of n, where that is known), loss, hit, kl (those that the system has), EM, ...}; types
    sorted, "all" last.
    """
    kinds = sorted({r.question_type for r in questions if r.question_type})
    table = []
    for kind in [*kinds, "all"]:
        chosen = [i for i, r in enumerate(questions) if kind in (r.question_type, "all")]
        for system, results in systems.items():
            here = [results[i] for i in chosen]
            scores = score([one["prediction"] for one in here], [questions[i].answer.strip() for i in chosen],
                           [questions[i].people for i in chosen])
            met = {} if overlap is None else {"seen": sum(overlap[i] for i in chosen)}
            table.append({"type": kind, "system": system, "n": len(chosen), **met, **loss_summary(here), **scores})
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
    """The table's question_id as it is written, else the number of the row from 0; the plain spelling of a whole number, such as 1827492
    and not 01827492, is that number, as VQAv2's evaluator takes it. DataError: one twice."""
    ids = [int(r.question_id) if re.fullmatch("0|[1-9][0-9]*", r.question_id) else r.question_id or i for i, r in enumerate(questions)]
    seen = {}
    for i, r in zip(ids, questions):
        if i in seen:
            raise DataError(f"{r.file}: {rows.locate(r.file, seen[i].line)} and {rows.locate(r.file, r.line)} share "
                            f"question_id {i}, which evaluators refuse: make them distinct or rename the column")
        seen[i] = r
    return ids


def write_predictions(path, ids, questions, results):
    """VQAv2's result format ({"question_id", "answer"}) and a CSV that people can read. results: of evaluate, with "confidence"."""
    path, table = pathlib.Path(path), []
    for i, row, one in zip(ids, questions, results):
        confidence = {"confidence": f"{math.exp(one['confidence']):.4f}", **({"margin": f"{one['margin']:.4f}"} if "margin" in one else {})}
        table.append({"question_id": i, "image": row.name, "question": row.question, "answer": row.answer, "prediction": one["prediction"],
                      "question_type": row.question_type, "style": row.style, **confidence})
    with files.whole_file(path) as file:
        json.dump([{"question_id": one["question_id"], "answer": one["prediction"]} for one in table], file, ensure_ascii=False, indent=0)
    files.write_csv(path.with_suffix(".csv"), table)
    return path.with_suffix(".csv")


# --- the evaluation ------------

@dataclass
class Evaluation:
    """What is asked, and of what: the model as it was before training until answers_of_systems has loaded the trained tensors."""
    args: argparse.Namespace
    checkpoint: dict
    accelerator: Accelerator
    model: core.Blip2OPTGated
    questions: list  # of Row
    ids: list  # question_id of each
    overlap: list | None  # see training_overlap
    data: Questions
    collate: Collate
    places: dict  # see current_model_args
    dtype: torch.dtype

    def answer(self, data=None, trained=True, with_confidence=False, **ablation):
        """What evaluate returns of one system, with "prediction" and, with_confidence, "confidence"."""
        args, weights, candidates = self.args, self.checkpoint["loss_weights"], sorted(self.checkpoint["answers"])
        weights = weights if trained else {"hit_weight": weights["hit_weight"]}  # no KL: its head is untrained

        def answer(model, group, features):
            questions, contexts = [r.question for r in group], [r.context for r in group]
            return answers_to(model, questions, contexts, features, args, candidates, with_confidence or bool(args.report), **ablation)
        with errors.batch_size_in_memory_errors(args.batch_size):
            found = evaluate(self.model, data or self.data, self.collate, self.accelerator, args.batch_size, args.workers, weights,
                             answer, **ablation)
        return found if trained else [{k: v for k, v in one.items() if k != "total"} for one in found]  # a part of it is left out


def prepare(args, checkpoint, accelerator):
    """Data of --split and the model, not yet with its trained tensors -> Evaluation."""
    data_args(args, {**BEFORE, **checkpoint["args"]})
    questions = read_questions(args.data, args.split, args.columns, args.images, args.encoding, args.separator, args.style,
                               args.semart, args.context, args.val_share, args.skip_bad, args.workers, accelerator.print)
    ids, seen = question_ids(questions), training_overlap(checkpoint, questions, args.workers)
    accelerator.print(f"{args.split}: pictures that training saw: {format_overlap(seen)}")
    places, dtype = current_model_args(args, checkpoint), core.DTYPES[accelerator.mixed_precision]

    def load_style():
        return model_class(args.script).style_tower.from_checkpoint(places["efficientnet"], args.safe_load).eval()

    features, towers = cached_features(args.cache, places["blip2"], places.get("qformer"),
                                       load_style if sees_style(places) else None, questions, accelerator, dtype, args.workers)
    model = load_model(args, checkpoint, dtype, towers).to(accelerator.device)
    if places.get("lm_precision") != checkpoint["model_args"].get("lm_precision"):
        accelerator.print(f"the language model is in {places['lm_precision']}, in training it was in "
                          f"{checkpoint['model_args'].get('lm_precision') or 'the precision of the towers'}")
    args.batch_size = questions_at_once(args, model)
    published.refuse_unknown_words(model.tokenizer, [row.question for row in questions], places["blip2"])
    log_cut_answers(model.tokenizer, {args.split: questions}, model.max_answer, accelerator.print)
    for field in (name for name in ("style", "context") if getattr(args, name) == "efficientnet"):
        questions, = predicted_styles(load_style().to(accelerator.device), published.image_size_of(places["blip2"]),
                                      places["efficientnet"], [questions], args.workers, accelerator.device, accelerator.print, field)
    questions = rows.unify_spelling(questions, model.styles, accelerator.print)
    return Evaluation(args, checkpoint, accelerator, model, questions, ids, seen,
                      Questions(questions, model.image_size, features),
                      Collate(model.tokenizer, model.styles, model.max_answer), places, dtype)


def answers_of_systems(run):
    """{system: what Evaluation.answer found}; the trained system is the last."""
    args, model, majority, systems = run.args, run.model, run.checkpoint["majority"], {}
    if not args.no_baselines:
        systems["majority answer"] = [{"prediction": majority.get(r.question_type, majority[""])} for r in run.questions]
        systems["no image"] = run.answer(trained=False, blind=True)
        systems["BLIP-2, no gates"] = run.answer(trained=False, gated=False)
    checkpoints.load_trainable(model, run.checkpoint["state"], args.checkpoint)
    if not args.no_baselines and model.mapper is not None:
        systems["gates closed"] = run.answer(gated=False)
    if args.shuffle_style and model.mapper is not None:
        systems["another's style"] = run.answer(OtherStyle(run.questions, model.image_size, run.data.features))
    name = "gated" if model.gates is not None else "steered" if model.mapper is not None else "trained, no gates"
    systems[name] = run.answer(with_confidence=bool(args.predictions or args.abstain_below is not None))
    return systems


def write_outputs(run, systems, command):
    """Print the table and write what the flags ask for. command: what was typed, for the model card."""
    args, questions, trained = run.args, run.questions, list(systems.values())[-1]
    if args.predictions:  # before the scores: what cost an hour is safe first
        readable = write_predictions(args.predictions, run.ids, questions, trained)
        print(f"predictions: {args.predictions} and {readable}")
    table = score_table(questions, systems, run.overlap)
    print_table(table)
    if args.abstain_below is not None:
        print(coverage(questions, trained, args.abstain_below))
    if args.table and args.table.endswith(".csv"):
        files.write_csv(args.table, table)
    elif args.table:
        with files.whole_file(args.table) as file:
            json.dump(table, file, indent=1)
    drawn = draw_maps(run, trained) if args.maps else []
    if args.report:
        made = report.about(checkpoint=args.checkpoint, data=f"{args.data}, {args.split}", seed=run.checkpoint["args"]["seed"],
                            **{"pictures that training saw": format_overlap(run.overlap)})
        log, model = pathlib.Path(args.checkpoint).with_name("training_log.csv"), "BLIP-2" if run.model.gates is None else "Gated BLIP-2"
        data = pathlib.Path(os.path.abspath(args.data)).name
        report.write(args.report, report.outcome(f"{model} on {data} {args.split}", questions, systems),
                     report.gated(questions, systems, table, log, PANELS, run.model.styles, [made], drawn))
        print(f"report: {args.report}")
    if args.export:
        batch = run.collate([run.data[i] for i in range(min(4, len(run.data)))])
        moved = {n: run.places.get(n) for n in ("blip2", "efficientnet", "lm_precision")}
        sharing.export(args.export, run.checkpoint, run.model, sharing.scores(questions, systems),
                       sharing.samples(questions, trained), command, batch, **moved, dtype=run.dtype, safe=args.safe_load,
                       model_class=model_class(args.script))
        print(f"exported, loaded again and compared: {args.export}")


def draw_maps(run, trained):
    """--maps: figures of the first questions and the gates by style -> their paths, the gates first."""
    folder = map_folder(run.args)
    drawn = maps.draw_rows(run.model, run.questions, [one["prediction"] for one in trained], run.args.maps, folder, run.data.features)
    print(f"maps of the first {len(drawn)} questions: {folder}")
    frames = gate_frames.read_frames(folder.parent / gate_frames.FILE)
    if frames and run.model.gates is not None:
        maps.skyline(frames, folder / "gates.png", folder / "gates.gif")
        drawn.insert(0, folder / "gates.png")
    return drawn


def rows_against(args):
    """The rows of the file that --against names, read before an hour of answers; None where it is a run, which is asked afterwards."""
    if args.against and args.against.endswith((".json", ".csv")):
        return comparison.read_predictions(args.against)
    if args.against:
        checkpoints.checkpoint_file(args.against, "a file of --predictions")
    return None


def answers_of_other(args, accelerator):
    """Rows of the run that --against names, asked the same questions."""
    args = argparse.Namespace(**{**vars(args), "checkpoint": str(checkpoints.checkpoint_file(args.against)), "blip2": None,
                                 "efficientnet": None})
    run = prepare(args, checkpoints.load_checkpoint(args.checkpoint, NEEDED), accelerator)
    checkpoints.load_trainable(run.model, run.checkpoint["state"], args.checkpoint)
    return comparison.rows_of(run.ids, run.questions, run.answer())


def compare(args, ours, theirs):
    """--against: print and write what engine.comparison finds. DataError: other questions."""
    us = args.checkpoint or args.predictions
    comparison.report(ours, comparison.in_order(ours, theirs, us, args.against), us, args.against, against_place(args))


def against_place(args):
    """What --against writes, without .json and .csv."""
    beside = os.path.splitext(args.predictions)[0] if args.predictions else pathlib.Path(args.checkpoint).with_name(args.split)
    return f"{beside}.against"


def map_folder(args):
    return pathlib.Path(args.checkpoint).parent / "maps"


def refuse_places(args):
    """DataError where something that the flags ask for cannot be written, before anything is loaded."""
    if args.predictions and not args.predictions.endswith(".json"):
        raise DataError(f"--predictions {args.predictions}: must end in .json (the readable .csv is written beside it)")
    for path in filter(None, (args.predictions, args.against and against_place(args), args.table, args.report, args.answers,
                              args.merge_lora, args.maps and map_folder(args) / "001.png")):
        files.refuse_unwritable(path)
    if args.export:
        if args.merge_lora:
            raise DataError("--export goes with an evaluation, not with --merge-lora")
        sharing.refuse_target(args.export)


def main(argv=None):
    args = get_args(argv)
    theirs = rows_against(args)
    if not args.checkpoint:
        return compare(args, comparison.read_predictions(args.predictions), theirs)
    args.checkpoint = str(checkpoints.checkpoint_file(args.checkpoint))  # maps/ and the report's curves go by its folder
    refuse_places(args)
    checkpoint = checkpoints.load_checkpoint(args.checkpoint, NEEDED)
    accelerator = loop.make_accelerator(args.precision)
    if args.merge_lora:
        model = load_model(args, checkpoint, torch.float32)
        checkpoints.load_trainable(model, checkpoint["state"], args.checkpoint)
        return write_merged(model, checkpoint, args.merge_lora)
    if args.ask:
        return ask(args, checkpoint, accelerator)
    run = prepare(args, checkpoint, accelerator)
    if theirs:  # other questions are refused before the first is answered
        unanswered = comparison.rows_of(run.ids, run.questions, [{"prediction": ""}] * len(run.ids))
        comparison.in_order(unanswered, theirs, args.checkpoint, args.against)
    systems = answers_of_systems(run)
    if accelerator.is_main_process:
        write_outputs(run, systems, ["eval_gated.py", *(sys.argv[1:] if argv is None else argv)])
    if args.against:
        ours = comparison.rows_of(run.ids, run.questions, list(systems.values())[-1])
        del run  # with its model: the other run has one of its own
        theirs = theirs or answers_of_other(args, accelerator)
        if accelerator.is_main_process:
            compare(args, ours, theirs)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
