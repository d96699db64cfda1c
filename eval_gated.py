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
import math
import os
import pathlib
import sys
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator

import core
import metrics
from data import rows
from data.questions import OtherStyle, Questions, read_questions
from engine import answering, checkpoints, comparison, errors, files, flags, folders, loop, memory, packing, published, seen
from engine.errors import DataError
from engine.evaluation import PANELS, coverage, evaluate, print_table, score_table, write_table
from engine.features import cached_features, likeliest_styles, predicted_styles
from engine.prompts import Collate, log_cut_answers, log_cut_questions
from engine.saved import sees_style
from show import maps, report, sharing

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
    given = {name: f"--{name.replace('_', '-')}" for name in ABOUT_TABLES if getattr(args, name)}
    if not args.checkpoint:
        if not (args.predictions and comparison.is_file(args.against)) or args.ask:
            return "--checkpoint is needed, but for --predictions and --against, two files of earlier evaluations"
        other = [flag for name, flag in given.items() if name not in ("predictions", "against")]
        return f"without --checkpoint nothing is evaluated: leave {', '.join(other)} out" if other else ""
    if (args.ask is None) != (args.answers is None):
        return "--ask and --answers go together"
    if args.merge_lora and (args.report or args.against or args.abstain_below is not None):
        return "--merge-lora answers nothing: leave --report, --against and --abstain-below out"
    if not args.ask:
        return ""
    if given:
        return f"--ask is about the pictures of --images alone: leave {', '.join(given.values())} out"
    if not args.images:
        return "--ask needs --images, the folder of pictures"
    return "" if all(question.strip() for question in args.ask) else "--ask: a question is empty"


def refuse_places(args):
    """DataError where something that the flags ask for cannot be written, before anything is loaded."""
    if args.predictions and not args.predictions.endswith(".json"):
        raise DataError(f"--predictions {args.predictions}: must end in .json (the readable .csv is written beside it)")
    written = {"--predictions": [args.predictions, args.predictions and f"{os.path.splitext(args.predictions)[0]}.csv"],
               "--against": [f"{against_place(args)}.{ending}" for ending in ("json", "csv") if args.against],
               "--table": [args.table], "--report": [args.report], "--answers": [args.answers], "--merge-lora": [args.merge_lora],
               "--maps": [args.maps and map_folder(args) / "001.png"]}
    taken = {os.path.realpath(args.checkpoint): "--checkpoint"}
    for flag, paths in written.items():
        for path in filter(None, paths):
            other = taken.setdefault(os.path.realpath(path), flag)
            if other != flag:
                raise DataError(f"{flag} would write {path}, which is the file of {other}: give it another name")
            files.refuse_unwritable(path)
    if args.export:
        if args.merge_lora:
            raise DataError("--export goes with an evaluation, not with --merge-lora")
        sharing.refuse_target(args.export)


def against_place(args):
    """What --against writes, without .json and .csv."""
    beside = os.path.splitext(args.predictions)[0] if args.predictions else pathlib.Path(args.checkpoint).with_name(args.split)
    return f"{beside}.against"


def map_folder(args):
    return pathlib.Path(args.checkpoint).parent / "maps"


# --- data and model ------------

def read_data(args, trained_with, log):
    """The rows of --split. A flag about data that is not given is that of the training, and stands in args from here on."""
    args.val_share = 0.0  # of a table given here, all rows
    was = trained_with["data"]
    if args.data is None:
        args.data, args.images = was, args.images or trained_with["images"]
    moved = not os.path.exists(was) and os.path.isfile(args.data) and os.path.basename(args.data) == os.path.basename(was)
    if moved:
        log(f"{args.data}: taken as the table of the training, {was}, which is no longer there: --split val is what was held out of it")
    if moved or os.path.isfile(args.data) and os.path.isfile(was) and os.path.samefile(args.data, was):
        args.val_share = trained_with["val_share"]
        if not args.val_share and args.split != "train":
            raise DataError(f"{args.data}: all of this table was trained on (--val-share 0): nothing in it was held out: give --data "
                            "with rows of their own, or --split train")
    args.columns = trained_with["columns"] if args.columns is None else args.columns
    args.encoding = args.encoding or trained_with["encoding"]
    args.separator = args.separator or trained_with["separator"]
    args.semart = args.semart or trained_with["semart"]
    args.style, args.context = trained_with["style"], trained_with["context"]
    return read_questions(args.data, args.split, args.columns, args.images, args.encoding, args.separator, args.style, args.semart,
                          args.context, args.val_share, args.skip_bad, args.workers, log)


def current_model_args(args, checkpoint):
    """model_args of a checkpoint with what lies elsewhere now, or is asked for in another precision."""
    moved = {name: getattr(args, name) for name in ("blip2", "efficientnet", "lm_precision") if getattr(args, name)}
    return published.resolve_paths({**checkpoint["model_args"], **moved})


def model_class(script):
    """The Model of an edited train_gated.py, RUN AS A MODULE; core's without one."""
    return flags.load_script(script).Model if script else core.Blip2OPTGated


def load_style(args, places):
    """The style classifier alone. places: see current_model_args."""
    return model_class(args.script).style_tower.from_checkpoint(places["efficientnet"], args.safe_load).eval()


def load_model(args, checkpoint, dtype, towers=None):
    """The model of a checkpoint before its trained tensors are put in: the same BLIP-2, untrained and with open gates.

    towers: None, or the fingerprints of towers that a cache stands for, which are then left out."""
    places = current_model_args(args, checkpoint)
    try:
        model = model_class(args.script).build(**places, safe=args.safe_load, dtype=dtype, tower=not towers)
    except TypeError as error:  # a setting that this version does not know
        raise DataError(f"{args.checkpoint}: written by another version of this project ({error})") from None
    trained_by = os.path.basename((checkpoint.get("command") or ["train_gated.py"])[0])
    if not args.script and trained_by not in ("train_gated.py", "compare_gated.py", "make_tiny.py"):
        print(f"note: {args.checkpoint} was trained by {trained_by}, and core's own Model answers: if that script has another, "
              f"pass --script {trained_by}", file=sys.stderr)
    packing.pack_samples(model.language_model)
    others = checkpoints.other_parts({**checkpoints.fingerprint(model), **(towers or {})}, checkpoint["frozen"])
    if others:
        raise DataError(f"{args.checkpoint} was trained on another BLIP-2 or style classifier than {places['blip2']} and "
                        f"{places['efficientnet']} (other: {', '.join(others)}): pass --blip2 and --efficientnet of the training")
    return model


def questions_at_once(args, model):
    """--batch-size as a number, now that the model is there; --graphs."""
    if args.graphs:
        answering.record_steps(model.language_model)
    return memory.answer_batch(args.batch_size, model.language_model, args.beams, args.max_new_tokens or model.max_answer)


def prepare(args, checkpoint, accelerator):
    """Data of --split and the model, not yet with its trained tensors -> Evaluation."""
    questions = read_data(args, {**BEFORE, **checkpoint["args"]}, accelerator.print)
    ids = comparison.question_ids(questions)
    overlap = seen.tell(args.split, checkpoint, [[row.image] for row in questions], args.workers, accelerator.print)
    places, dtype = current_model_args(args, checkpoint), core.DTYPES[accelerator.mixed_precision]
    features, towers = cached_features(args.cache, places["blip2"], places.get("qformer"),
                                       partial(load_style, args, places) if sees_style(places) else None, questions, accelerator,
                                       dtype, args.workers)
    model = load_model(args, checkpoint, dtype, towers).to(accelerator.device)
    if places.get("lm_precision") != checkpoint["model_args"].get("lm_precision"):
        accelerator.print(f"the language model is in {places['lm_precision']}, in training it was in "
                          f"{checkpoint['model_args'].get('lm_precision') or 'the precision of the towers'}")
    args.batch_size = questions_at_once(args, model)
    published.refuse_unknown_words(model.tokenizer, [row.question for row in questions], places["blip2"])
    log_cut_answers(model.tokenizer, {args.split: questions}, model.max_answer, accelerator.print)
    log_cut_questions(model.tokenizer, {args.split: [row.question for row in questions]}, accelerator.print)
    for field in (name for name in ("style", "context") if getattr(args, name) == "efficientnet"):
        questions, = predicted_styles(load_style(args, places).to(accelerator.device), published.image_size_of(places["blip2"]),
                                      places["efficientnet"], [questions], args.workers, accelerator.device, accelerator.print, field)
    questions = rows.unify_spelling(questions, model.styles, accelerator.print)
    questions = rows.unify_spelling(questions, checkpoint["majority"], accelerator.print, "question_type")
    return Evaluation(args, checkpoint, accelerator, model, questions, ids, overlap, Questions(questions, model.image_size, features),
                      Collate(model.tokenizer, model.styles, model.max_answer))


# --- answers, system by system ------------

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


@dataclass
class Evaluation:
    """What is asked, and of what: the model as it was before training until answers_of_systems has loaded the trained tensors."""
    args: argparse.Namespace
    checkpoint: dict
    accelerator: Accelerator
    model: core.Blip2OPTGated
    questions: list  # of Row
    ids: list  # question_id of each
    overlap: list | None  # see seen.training_overlap
    data: Questions
    collate: Collate

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


# --- what is written ------------

def write_outputs(run, systems, command):
    """Print the table and write what the flags ask for. command: what was typed, for the model card."""
    args, questions, trained = run.args, run.questions, list(systems.values())[-1]
    if args.predictions:  # before the scores: what cost an hour is safe first
        readable = comparison.write_predictions(args.predictions, run.ids, questions, trained)
        print(f"predictions: {args.predictions} and {readable}")
    table = score_table(questions, systems, run.overlap)
    print_table(table)
    metrics.log_characters(row.answer for row in questions)
    if args.abstain_below is not None:
        print(coverage(questions, trained, args.abstain_below))
    if args.table:
        write_table(args.table, table)
    drawn = maps.draw_run(run.model, questions, trained, args.maps, map_folder(args), run.data.features) if args.maps else []
    if args.report:
        made = report.about(checkpoint=args.checkpoint, data=f"{args.data}, {args.split}", seed=run.checkpoint["args"]["seed"],
                            **{"pictures that training saw": seen.format_overlap(run.overlap)})
        log, model = pathlib.Path(args.checkpoint).with_name("training_log.csv"), "BLIP-2" if run.model.gates is None else "Gated BLIP-2"
        data = pathlib.Path(os.path.abspath(args.data)).name
        report.write(args.report, report.outcome(f"{model} on {data} {args.split}", questions, systems),
                     report.gated(questions, systems, table, log, PANELS, run.model.styles, [made], drawn))
        print(f"report: {args.report}")
    if args.export:
        batch = run.collate([run.data[i] for i in range(min(4, len(run.data)))])
        places = current_model_args(args, run.checkpoint)
        moved = {name: places.get(name) for name in ("blip2", "efficientnet", "lm_precision")}
        sharing.export(args.export, run.checkpoint, run.model, sharing.scores(questions, systems), sharing.samples(questions, trained),
                       command, batch, **moved, dtype=core.DTYPES[run.accelerator.mixed_precision], safe=args.safe_load,
                       model_class=model_class(args.script))
        print(f"exported, loaded again and compared: {args.export}")


# --- --against: beside another evaluation ------------

def answers_of_other(args, accelerator):
    """Rows of the run that --against names, asked the same questions."""
    args = argparse.Namespace(**{**vars(args), "checkpoint": str(checkpoints.checkpoint_file(args.against)), "blip2": None,
                                 "efficientnet": None})
    run = prepare(args, checkpoints.load_checkpoint(args.checkpoint, NEEDED), accelerator)
    checkpoints.load_trainable(run.model, run.checkpoint["state"], args.checkpoint)
    return comparison.rows_of(run.ids, run.questions, run.answer())


def compare(args, ours, theirs):
    """--against: print and write what engine.comparison finds. DataError: other questions."""
    comparison.report(ours, theirs, args.checkpoint or args.predictions, args.against, against_place(args))


# --- --ask: a folder of pictures ------------

def ask(args, checkpoint, accelerator):
    """--ask: a row of --answers for each picture of --images and each question, but for those that are there, see folders.py."""
    if accelerator.num_processes > 1:
        raise DataError("--ask writes one file from one process: start it without accelerate launch")
    names, asked = folders.pictures_in(args.images), [(question,) for question in dict.fromkeys(args.ask)]
    places = current_model_args(args, checkpoint)
    search = {"beams": args.beams, "max-new-tokens": args.max_new_tokens} if args.method == "generate" else {}
    made_with = {"checkpoint (sha256)": files.digest(args.checkpoint), "--images": os.path.realpath(args.images),
                 "--method": args.method, **search, "--abstain-below": args.abstain_below, "precision": accelerator.mixed_precision,
                 "--lm-precision": places.get("lm_precision"), **({"--script (sha256)": files.digest(args.script)} if args.script else {})}
    with folders.open_table(args.answers, folders.ANSWERS, 2, made_with) as table, errors.batch_size_in_memory_errors(args.batch_size):
        todo = table.missing(names, asked)
        if not todo:
            print(f"{args.answers}: all {len(names)} pictures are there")
            return
        model = load_model(args, checkpoint, core.DTYPES[accelerator.mixed_precision]).to(accelerator.device).eval()
        checkpoints.load_trainable(model, checkpoint["state"], args.checkpoint)
        log_cut_questions(model.tokenizer, {"--ask": args.ask})
        args.batch_size = questions_at_once(args, model)
        context, net = checkpoint["args"].get("context"), None
        if context == "efficientnet":
            net = load_style(args, places).to(accelerator.device)
        elif context:
            print("note: this model was trained with a text before the question (--context); here there is none")
        answer = partial(answers_to, model, args=args, candidates=sorted(checkpoint["answers"]))

        def answer_batch(images, keys):  # [B,3,s,s], B lists of (name, question)
            labels = likeliest_styles(net, images) if net else None
            return folders.answer_pictures(keys, model.image_features(images), labels, answer, args.batch_size, args.abstain_below or 0)
        folders.fill(table, args.images, todo, answer_batch, model.image_size, max(1, args.batch_size // len(asked)), args.workers,
                     accelerator.device)


def main(argv=None):
    args = get_args(argv)
    theirs = comparison.read_other(args.against)  # of a file; a run is asked afterwards
    if args.against and not theirs:
        checkpoints.load_checkpoint(checkpoints.checkpoint_file(args.against), NEEDED)  # refused before the first question
    if not args.checkpoint:
        return compare(args, comparison.read_predictions(args.predictions), theirs)
    args.checkpoint = str(checkpoints.checkpoint_file(args.checkpoint))  # maps/ and the report's curves go by its folder
    refuse_places(args)
    checkpoint = checkpoints.load_checkpoint(args.checkpoint, NEEDED)
    accelerator = loop.make_accelerator(args.precision)
    if args.merge_lora:
        model = load_model(args, checkpoint, torch.float32)
        checkpoints.load_trainable(model, checkpoint["state"], args.checkpoint)
        return checkpoints.write_merged(args.merge_lora, model, checkpoint)
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
