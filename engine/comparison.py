"""comparison.py: what a system answered, as rows and as the files of --predictions; two evaluations of the same questions in pairs.

    question_ids                 what its questions are called there
    rows_of                      rows straight from an evaluation
    write_predictions, read_predictions, read_other    the files, and whether --against names one
    in_order                     the other's rows in the order of ours; refuses those of other questions
    hits, groups, compare        exact match of each row; the rows of each question type; both sides and their difference
    side_by_side, report         what changed in each row; all of it printed short and written whole

A row is a dict of texts: question_id, image (its name), question, answer, prediction, question_type, style. A JSON file in VQAv2's
result format without its CSV beside it has question_id and prediction alone.
"""

import json
import math
import pathlib
import re

import metrics
from data.rows import label_key
from data.tables import excerpt, locate, read_json, read_table
from engine import checkpoints, files
from engine.errors import DataError

SHOWN = 5  # rows gained and rows lost that are printed
COLUMNS = ("question_id", "image", "question", "answer", "prediction", "question_type", "style")
QUESTION = ("image", "question", "answer", "question_type")  # must be the same on both sides


# --- rows ------------

def question_ids(questions):
    """The table's question_id as it is written, else the number of the row in the table from 0; the plain spelling of a whole number,
    such as 1827492 and not 01827492, is that number, as VQAv2's evaluator takes it. DataError: one twice."""
    ids = [int(r.question_id) if re.fullmatch("0|[1-9][0-9]*", r.question_id) else r.question_id or r.number for r in questions]
    seen = {}
    for i, r in zip(ids, questions):
        if i in seen:
            raise DataError(f"{r.file}: {locate(r.file, seen[i].line)} and {locate(r.file, r.line)} share "
                            f"question_id {i}, which evaluators refuse: make them distinct or rename the column")
        seen[i] = r
    return ids


def rows_of(ids, questions, results):
    """question_id of N, list of Row, what evaluation.evaluate returned with "prediction" -> N rows."""
    return [dict(zip(COLUMNS, (str(i), row.name, row.question, row.answer, one["prediction"], row.question_type, row.style)))
            for i, row, one in zip(ids, questions, results)]


def write_predictions(path, ids, questions, results):
    """FILE.json of --predictions, VQAv2's result format ({"question_id", "answer"}), and beside it a CSV that people can read -> its path.

    ids: of question_ids; questions: list of Row; results: of evaluation.evaluate, with "prediction" and "confidence"."""
    path, table = pathlib.Path(path), rows_of(ids, questions, results)
    for row, one in zip(table, results):
        row["confidence"] = f"{math.exp(one['confidence']):.4f}"
        if "margin" in one:
            row["margin"] = f"{one['margin']:.4f}"
    with files.whole_file(path) as file:
        json.dump([{"question_id": i, "answer": one["prediction"]} for i, one in zip(ids, results)], file, ensure_ascii=False, indent=0)
    files.write_csv(path.with_suffix(".csv"), table)
    return path.with_suffix(".csv")


def read_predictions(path):
    """FILE.json or FILE.csv of --predictions -> rows. Of FILE.json the CSV beside it is taken where there is one.

    DataError: unreadable, no such columns, the two files disagree."""
    path = pathlib.Path(path)
    if path.suffix == ".csv":
        table = [cells for _, cells in read_table(path, separator=",")]
        lacking = [name for name in COLUMNS[:5] if name not in table[0]]
        if lacking:
            raise DataError(f"{path}: no column {', '.join(lacking)}: give a file of eval_gated.py --predictions")
        return [{name: cells.get(name, "") for name in COLUMNS} for cells in table]
    entries = [one for _, one in read_json(str(path))[1]]
    if not all(isinstance(one, dict) and {"question_id", "answer"} <= one.keys() for one in entries):
        raise DataError(f"{path}: no list of objects with question_id and answer (VQAv2's result format)")
    found = [{"question_id": str(one["question_id"]), "prediction": str(one["answer"])} for one in entries]
    beside = path.with_suffix(".csv")
    if not beside.is_file():
        return found
    whole = read_predictions(beside)
    if [{name: row[name] for name in found[0]} for row in whole] != found:
        raise DataError(f"{path} and {beside} are of different evaluations: evaluate again")
    return whole


def is_file(place):
    """Does --against name a file of --predictions, and no run?"""
    return bool(place) and place.endswith((".json", ".csv"))


def read_other(place):
    """The rows of the file that --against names; None where it names a run, which is there, or nothing. DataError: no such run."""
    if is_file(place):
        return read_predictions(place)
    if place:
        checkpoints.checkpoint_file(place, "a file of --predictions")
    return None


def in_order(ours, theirs, us, them):
    """theirs in the order of ours, matched by question_id, and every column of a question that is on both sides equal.

    us, them: what the sides are called. DataError: a question of one side alone, one twice, or one that differs."""
    known = {row["question_id"]: row for row in theirs}
    mine = {row["question_id"] for row in ours}
    if len(known) < len(theirs) or len(mine) < len(ours):
        raise DataError(f"{them if len(known) < len(theirs) else us}: a question_id stands there twice: nothing can be matched by it")
    if mine != known.keys():
        raise DataError(f"{us} has {len(mine)} questions and {them} {len(known)}, {len(mine & known.keys())} of them in both; question_id "
                        f"{min(mine ^ known.keys())} is not: compare answers to the same questions")
    for row in ours:
        other = known[row["question_id"]]
        for name in QUESTION:
            plain = label_key if name == "question_type" else str.strip  # an earlier version kept every spelling of a type
            if name in row and name in other and plain(row[name]) != plain(other[name]):
                raise DataError(f"question_id {row['question_id']}: {name} is {excerpt(row[name])} in {us} and {excerpt(other[name])} in "
                                f"{them}: compare answers to the same questions")
    return [known[row["question_id"]] for row in ours]


# --- numbers ------------

def hits(rows, answers=None):
    """Exact match in percent of each row: [N] of 0 or 100. answers: N rows that have the right answers, where these have none."""
    return [100 * metrics.exact_match(row["prediction"], right["answer"].strip()) for row, right in zip(rows, answers or rows)]


def groups(types):
    """The question types of N rows ("": none) -> {type: numbers of its rows}, sorted, "all" last."""
    return {kind: [n for n, own in enumerate(types) if kind in (own, "all")] for kind in [*sorted({*types} - {""}), "all"]}


def compare(rows, ours, theirs, where=None):
    """rows: N; ours, theirs: hits of both sides, [N] or [N,S] of S seeds; where: {name: numbers of rows}, else `groups`.

    -> {name: {"n", "pictures", "ours", "theirs", "difference": metrics.Estimate}}; intervals over pictures and seeds together."""
    found = {}
    for kind, numbers in (where or groups([row["question_type"] for row in rows])).items():
        sides, units = [[side[n] for n in numbers] for side in (ours, theirs)], [rows[n]["image"] for n in numbers]
        found[kind] = {"n": len(numbers), "pictures": len(set(units)), "ours": metrics.estimate(sides[0], units),
                       "theirs": metrics.estimate(sides[1], units), "difference": metrics.paired_difference(*sides, units)}
    return found


def as_plain(found):
    """What compare found, for JSON."""
    return {kind: {name: value._asdict() if isinstance(value, metrics.Estimate) else value for name, value in one.items()}
            for kind, one in found.items()}


def side_by_side(ours, theirs):
    """Our rows, each with `other` (the other's prediction) and `change`: same, gained (right here alone), lost (right there alone), or
    neither (two answers, both wrong or both right)."""
    found = []
    for row, other, here, there in zip(ours, theirs, hits(ours), hits(theirs, ours)):
        change = "same" if row["prediction"] == other["prediction"] else "gained" if here > there else "lost" if there > here else "neither"
        found.append({**row, "other": other["prediction"], "change": change})
    return found


# --- what is told ------------

def report(ours, theirs, us, them, place, log=print):
    """Print the comparison short and write it whole: place.json the numbers, place.csv every row with both answers.

    ours, theirs: rows, in any order; us, them: what they are called. DataError: see in_order."""
    theirs = in_order(ours, theirs, us, them)
    ours = [{**other, **row} for row, other in zip(ours, theirs)]  # right answers may stand on one side alone
    if not all("answer" in row for row in ours):
        raise DataError(f"{us} and {them} have no right answers: keep the FILE.csv that --predictions writes beside one of them")
    found, table, place = compare(ours, hits(ours), hits(theirs, ours)), side_by_side(ours, theirs), pathlib.Path(place)
    log(f"\n{us} against {them}: exact match in %, the same questions in pairs; 95 % intervals over pictures, which do not cover what "
        "another seed of training would change")
    log(f"{'type':12} {'n':>6} {'pictures':>9}{'ours':>22}{'theirs':>22}{'difference':>24}")
    for kind, one in found.items():
        ends = f"{format(one['ours'], '.1f'):>22}{format(one['theirs'], '.1f'):>22}{format(one['difference'], '+.1f'):>24}"
        log(f"{kind:12} {one['n']:>6} {one['pictures']:>9}{ends}")
    changed = {kind: [row for row in table if row["change"] == kind] for kind in ("gained", "lost", "neither")}
    log(f"{sum(map(len, changed.values()))} of {len(table)} answers differ: "
        + ", ".join(f"{len(some)} {kind}" for kind, some in changed.items()))
    for row in [*changed["gained"][:SHOWN], *changed["lost"][:SHOWN]]:
        log(f"  {row['change']:6} {row['image']}: {row['question']} {row['answer'].strip()!r}: {row['prediction']!r}, there "
            f"{row['other']!r}")
    with files.whole_file(f"{place}.json") as file:
        json.dump({"ours": us, "theirs": them, "exact match in percent": as_plain(found)}, file, indent=1)
    files.write_csv(f"{place}.csv", table)
    log(f"{place}.json: these numbers; {place}.csv: every question with both answers")
