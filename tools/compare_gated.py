"""compare_gated.py: do the gates help, and is a gate a good way to bring style in? Ways beside each other, everything else equal.

    python tools/compare_gated.py --data data/artquest --blip2 tiny --epochs 5 --batch-size 32 --accumulation 1
    python tools/compare_gated.py --systems fair --no-probes --data ...         # docs/results.md

By default four systems: with gates or without, the Q-Former frozen or trained. Each has the same data and steps and the same search:
one run for each of --lrs on the first seed, the best by validation loss; with that rate a run for each of --seeds. Every run is
train_gated.py and eval_gated.py as they stand (its folder is OUT/<name>), on features of the frozen towers computed once
(--cache OUT/cache); seconds a step are therefore without the towers. Finished runs are not repeated when the command is given
again, with more seeds or systems too, and refused where their settings came to something else than now (on another machine, of other
data). All other flags go to train_gated.py. Every system is compared with --reference in pairs,
question by question and seed by seed; intervals are over pictures and seeds together (metrics.estimate).
"""

import gc
import itertools
import json
import pathlib
import re
import statistics
import sys
import time
from collections import Counter
from types import SimpleNamespace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import eval_gated
import train_gated
from data import rows
from engine import checkpoints, comparison, errors, features, files, flags, loop, published, runfolder
from engine.errors import DataError

UNGATED = ["--gating", "none"]
SYSTEMS = {"ungated, Q-Former frozen": UNGATED, "gated, Q-Former frozen": [],
           "ungated, Q-Former trained": [*UNGATED, "--train-qformer"], "gated, Q-Former trained": ["--train-qformer"]}
# the style classifier's label in place of its feature; the first two train nothing, nor does BLIP-2 as it is
LABEL_ANSWER, LABEL_UNTRAINED, LABEL = "label as the answer", "label as text, untrained", "label as text"
UNTRAINED = {"BLIP-2 as it is": UNGATED, LABEL_UNTRAINED: [*UNGATED, "--context", "efficientnet"]}
FAIR = {**UNTRAINED, LABEL_ANSWER: [], LABEL: UNTRAINED[LABEL_UNTRAINED],
        "soft prompt of 1 token": [*UNGATED, "--steer", "soft-prompt", "--control-tokens", "1"],
        "soft prompt of 4 tokens": [*UNGATED, "--steer", "soft-prompt"], "4 further patches": [*UNGATED, "--steer", "patches"],
        "4 further queries": [*UNGATED, "--steer", "queries"], "fusion into the patches": [*UNGATED, "--steer", "fusion"],
        "film per head": ["--per", "head"], "film per channel": ["--per", "channel"],
        "film on K": ["--gating", "film-key"], "film on V": ["--gating", "film-value"],
        "sigmoid per head": ["--gating", "gate", "--per", "head"], "sigmoid per channel": ["--gating", "gate", "--per", "channel"],
        "gates that read no question": ["--control-from", "style"], "gates and soft prompt": ["--steer", "soft-prompt"]}
# as InstructBLIP's; beside the two of SYSTEMS with a trained Q-Former, all with the same --qformer of stage 1
INSTRUCT = {"question in the Q-Former": [*UNGATED, "--train-qformer", "--instruct"],
            "gated, question in the Q-Former": ["--train-qformer", "--instruct"]}
FLAGS = {**SYSTEMS, **FAIR, **INSTRUCT}  # of train_gated.py
NAME = max(map(len, FLAGS)) + 2  # width of a column
# of eval_gated
SEEN = {"": ("gated", "steered", "trained, no gates"), ", gates closed": ("gates closed",), ", another's style": ("another's style",)}


def get_args(argv=None):
    parser = flags.make_parser(__doc__)
    parser.allow_abbrev = False
    parser.add_argument("--systems", nargs="+", choices=(*FLAGS, "fair"), default=list(SYSTEMS), metavar="NAME",
                        help=f"what is compared (default: the four); others: {'; '.join(FAIR)}; fair: all these "
                             f"others; with --qformer: {'; '.join(INSTRUCT)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3],
                        help="learning rates that every system may choose from (default: 3e-4 1e-3 3e-3)")
    parser.add_argument("--split", default="test", help="which split is scored (default: test)")
    parser.add_argument("--style-types", nargs="+", default=["style", "technique"], metavar="TYPE",
                        help="question types that ask for style; all others are content (default: style technique)")
    parser.add_argument("--reference", choices=tuple(FLAGS), metavar="SYSTEM",
                        help=f"what the others are compared with in pairs (default: {LABEL}, where that is not among them the first)")
    parser.add_argument("--no-probes", action="store_true", help="score the trained model alone, not with its gates closed and with "
                                                                 "another picture's style too; measure no seconds")
    parser.add_argument("--out", default="runs/compare", metavar="DIR", help="(default: runs/compare)")
    flags.show_passed_on(parser, "passed on, as all others are (python train_gated.py --help)", train_gated.get_parser(), "--data",
                         "--images", "--columns", "--style", "--blip2", "--efficientnet", "--epochs", "--batch-size", "--accumulation")
    parser.usage = "%(prog)s --data DIR|FILE [flags]"
    args, others = parser.parse_known_args(argv)
    args.systems = list(dict.fromkeys(name for chosen in args.systems for name in (FAIR if chosen == "fair" else [chosen])))
    args.reference = args.reference or (LABEL if LABEL in args.systems else args.systems[0])
    if args.reference not in args.systems:
        parser.error(f"--reference {args.reference}: is not one of --systems")
    return args, others


# --- runs ------------

def one_run(args, others, system, lr, seed):
    """Train one system, where that is not done yet and it is to be trained at all -> what run.json holds, and the folder."""
    name = re.sub(r"\W+", "-", system.replace(", Q-Former", ""))
    folder = pathlib.Path(args.out) / f"{name}-lr{lr:g}-seed{seed}"
    given = [*others, *FLAGS[system], "--lr", str(lr), "--seed", str(seed)]
    settings = train_gated.get_args([*given, "--out", str(folder), "--resume", "--save-last"])
    done, now = folder / "run.json", made_with(settings, args.rows)
    if done.exists():
        return held_of(done, given, now), folder
    if system in UNTRAINED:
        run, _ = train_gated.prepare(settings, train_gated.start(settings))
        folder.mkdir(parents=True, exist_ok=True)
        run.save_best()
    else:
        run = train_gated.train(settings)
    if run.stop.number:
        raise KeyboardInterrupt
    trained = 0 if system in UNTRAINED else sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    held = {"flags": given, "value": run.progress["value"], "trained": trained, "steps": run.step}
    with files.whole_file(done) as file:
        json.dump({**held, "settings": now}, file, indent=1)
    return held, folder


def made_with(settings, read):
    """What the flags of a run become here, as run.json keeps them: those that are not typed too, the precision of this machine, hashes of
    the data. read: {split: rows} before any style is predicted."""
    parts = SimpleNamespace(train=SimpleNamespace(rows=read["train"]), val=SimpleNamespace(rows=read["val"]))
    return json.loads(json.dumps(train_gated.settings(settings, parts, loop.make_accelerator(settings.precision))))


def held_of(done, given, now):
    """What the run.json of a finished run holds. DataError: of other flags, or they came to something else: no rows of one table."""
    held = json.loads(done.read_text(encoding="utf-8"))
    if held["flags"] != given:
        raise DataError(f"{done} is of other flags ({' '.join(held['flags'])}): choose another --out")
    last, was = done.with_name("last.pt"), held.pop("settings", None)
    if was is None and last.exists():  # of an earlier version, whose hashes are of the rows with predicted styles
        was = {name: value for name, value in checkpoints.load_checkpoint(last, ("settings",))["settings"].items() if name[:2] == "--"}
    if was is None:
        print(f"note: {done}: of an earlier version, which did not keep what its settings came to: taken as it is")
    other = runfolder.other_settings(now, was or {})
    if other:
        raise DataError(f"{done}: a finished run that does not belong beside new ones: {'; '.join(other)}: give the former settings, "
                        f"choose another --out, or delete {done.parent} to train it again")
    return held


def step_seconds(others, system, rounds=5, steps=10):
    """Median seconds of an optimizer step of one system, whose model is the only one in memory and gone again afterwards."""
    settings = train_gated.get_args([*others, *FLAGS[system]])
    run, parts = train_gated.prepare(settings, train_gated.start(settings))
    found = []
    for _ in range(rounds):
        run.step = 0
        run.wrapped.train()
        started = time.perf_counter()
        for step in itertools.islice(run.steps(0), steps):
            train_gated.train_step(run, step, parts.weights)
            step.update()
        found.append((time.perf_counter() - started) / steps)
    del run, parts, step
    gc.collect()  # a Run and its functions hold each other
    return statistics.median(found)


def scores(args, others, folder):
    """Rows of eval_gated's table for the run in `folder`, whose answers are then in its file of answers_of."""
    table = folder / f"{args.split}.json"
    if not (table.exists() and answers_of(args, folder).exists()):
        eval_gated.main(["--checkpoint", str(folder / "best.pt"), "--split", args.split, "--table", str(table), "--workers", "0",
                         "--cache", others[-1], "--predictions", str(answers_of(args, folder)),
                         "--no-baselines" if args.no_probes else "--shuffle-style"])
    return json.loads(table.read_text(encoding="utf-8"))


def answers_of(args, folder):
    return folder / f"{args.split}-answers.json"


def label_answers(args, others):
    """`label as the answer` -> its folder with its answers, as `scores` leaves them. Nothing is trained.

    The answer is the commonest one of training to a question of this type about a picture of the style that the classifier sees: the
    style itself, the technique that goes with it; of a question on content that says next to nothing."""
    settings = train_gated.get_args(others)
    train, asked = (train_gated.read_data(settings, split, lambda line: None) for split in ("train", args.split))
    asked = rows.unify_spelling(asked, {row.question_type for row in train}, lambda line: None, "question_type")
    places = published.resolve_paths({"blip2": settings.blip2, "efficientnet": settings.efficientnet})
    net = train_gated.Model.style_tower.from_checkpoint(places["efficientnet"], settings.safe_load).eval()
    asked, = features.predicted_styles(net, published.image_size_of(places["blip2"]), places["efficientnet"], [asked],
                                       settings.workers, "cpu", field="context")
    answers = {}
    for row in train:
        for style in {row.style.strip(), ""}:
            answers.setdefault((row.question_type, style), Counter())[row.answer.strip()] += 1
    found = [answers.get((row.question_type, row.context)) or answers[row.question_type, ""] for row in asked]
    folder = pathlib.Path(args.out) / "label-as-the-answer"
    folder.mkdir(parents=True, exist_ok=True)
    comparison.write_predictions(answers_of(args, folder), comparison.question_ids(asked), asked,
                                 [{"prediction": counts.most_common(1)[0][0], "confidence": 0.0} for counts in found])
    return folder


def differences(args, folders):
    """{system: comparison.compare with --reference, of the style and of the content questions}. folders: {system: one for each seed, one
    alone where nothing is trained}."""
    answered = {system: [comparison.read_predictions(answers_of(args, folder)) for folder in some] for system, some in folders.items()}
    rows = answered[args.reference][0]
    where = {"style": [n for n, row in enumerate(rows) if row["question_type"] in args.style_types]}
    where["content"] = sorted({*range(len(rows))} - {*where["style"]})
    hits = {system: list(zip(*(comparison.hits(one) for one in some))) for system, some in answered.items()}  # [N,S]
    return {system: comparison.compare(rows, hits[system], hits[args.reference], {kind: some for kind, some in where.items() if some})
            for system in folders}


def exact_match(table, kinds, systems):
    """Mean EM of one of eval_gated's systems over the questions of these types; None where it is not in the table."""
    chosen = [r for r in table if r["type"] in kinds and r["system"] in systems]
    return sum(r["EM"] * r["n"] for r in chosen) / sum(r["n"] for r in chosen) if chosen else None


def style_and_content(table, style_types):
    """{"style", "content", "style, gates closed", ...}: EM of the trained model, with its gates closed, with another's style."""
    kinds = {"style": style_types, "content": {r["type"] for r in table} - {*style_types, "all"}}
    return {kind + seen: exact_match(table, kinds[kind], systems) for seen, systems in SEEN.items() for kind in kinds}


def spread(values):
    """"mean +- standard deviation" over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} +- {deviation:.1f}"


# --- the comparison ------------

def chosen_rates(args, others):
    """{system: learning rate}: the best by validation loss on the first seed; None where nothing is trained."""
    rates = {}
    for system in args.systems:
        if system in UNTRAINED or system == LABEL_ANSWER:
            rates[system] = None
            continue
        tried = {lr: one_run(args, others, system, lr, args.seeds[0])[0]["value"] for lr in args.lrs}
        rates[system] = min(tried, key=lambda lr: float("inf") if tried[lr] is None else tried[lr])
        print(f"{system}: validation loss by lr {tried}, chosen {rates[system]:g}")
    return rates


def run_all(args, others, rates):
    """-> {system: [what run.json holds and the scores]} and {system: [folder]}, of each seed; of one where nothing is trained."""
    results, folders = {system: [] for system in args.systems}, {system: [] for system in args.systems}
    for seed in args.seeds:  # seeds outside, so that a slow hour of the machine falls on all systems alike
        for system in args.systems:
            if folders[system] and rates[system] is None:
                continue
            if system == LABEL_ANSWER:
                held, folder, table = {"flags": [], "value": None, "trained": 0, "steps": 0}, label_answers(args, others), []
            else:
                held, folder = one_run(args, others, system, rates[system] or args.lrs[0], seed)
                table = scores(args, others, folder)
            folders[system].append(folder)
            results[system].append({**held, **style_and_content(table, args.style_types)})
    return results, folders


def print_differences(args, rates, results, found):
    steps = max(one["steps"] for runs in results.values() for one in runs)
    print(f"\nexact match in % on {args.split} with 95 % intervals over pictures and seeds ({' '.join(map(str, args.seeds))}), and the "
          f"difference to {args.reference} in pairs; {steps} steps at most")
    print(f"{'system':{NAME}}{'lr':>8}{'trained':>12}" + "".join(f"{kind:>20}{'difference':>22}" for kind in next(iter(found.values()))))
    for system, kinds in found.items():
        print(f"{system:{NAME}}{rates[system] or '-':>8}{results[system][0]['trained']:>12,}" + "".join(
            f"{format(one['ours'], '.1f'):>20}{format(one['difference'], '+.1f') if system != args.reference else '-':>22}"
            for one in kinds.values()))


def print_probes(results):
    print(f"\nmean +- standard deviation over the seeds\n{'':{NAME}}{'as trained':>26}{'gates closed':>26}{'another style':>26}")
    print(f"{'system':{NAME}}" + f"{'style':>13}{'content':>13}" * len(SEEN))
    for system, runs in results.items():
        columns = [spread([one[kind + seen] for one in runs]) if runs[0][kind + seen] is not None else "-"
                   for seen in SEEN for kind in ("style", "content")]
        print(f"{system:{NAME}}" + "".join(f"{c:>13}" for c in columns))


def main(argv=None):
    args, others = get_args(argv)
    settings = train_gated.get_args(others)
    args.rows = {split: train_gated.read_data(settings, split, lambda line: None)  # what is not there shows now
                 for split in (args.split, "train", "val")}
    files.refuse_unwritable(pathlib.Path(args.out) / "compare.json")  # nor after hours
    others += ["--workers", "0", "--cache", str(pathlib.Path(args.out) / "cache")]
    rates = chosen_rates(args, others)
    results, folders = run_all(args, others, rates)
    paired = differences(args, folders)
    print_differences(args, rates, results, paired)
    write_results(args, rates, results, paired, {})
    if args.no_probes:
        return
    print_probes(results)
    seconds = {}  # last: what cost hours is safe, and memory that runs out here loses nothing
    for system in (name for name in args.systems if rates[name]):
        seconds[system] = step_seconds(others, system)
        print(f"{system}: {seconds[system]:.3f} s a step")
        write_results(args, rates, results, paired, seconds)


def write_results(args, rates, results, paired, seconds):
    """OUT/compare.json: the learning rate, the scores of each seed, the differences to the reference and, where they are measured, the
    seconds of a step by system; OUT/compare.csv: the scores, a row for each system and seed."""
    files.write_csv(pathlib.Path(args.out) / "compare.csv", [{"system": system, "seed": seed, "lr": rates[system], **{
        name: value for name, value in one.items() if name != "flags"}} for system, found in results.items()
        for seed, one in zip(args.seeds, found)])
    with files.whole_file(pathlib.Path(args.out) / "compare.json") as file:
        json.dump({"rates": rates, "seconds_per_step": seconds, "results": results, "reference": args.reference, "compared": {
            system: comparison.as_plain(kinds) for system, kinds in paired.items()}}, file, indent=1)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
