"""GOLDEN=folder python -m pytest tests/test_golden_metrics.py   (default ../shared/golden; seconds)

metrics.py against stored output of the reference code: the official VQAv2 evaluator, the ArtQuest metrics, COCO's
caption tools. It takes whatever cases the folder holds; another folder of the same layout works as well.
"""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from metrics import bleu, exact_match, normalise_answer, rouge_l, sentence_bleu, strip_punctuation  # noqa: E402
from metrics import tokenize, vqa_accuracy  # noqa: E402

GOLDEN = Path(os.environ.get("GOLDEN") or ROOT / "../shared/golden")
VQA, CAPTIONS = GOLDEN / "vqa_eval", GOLDEN / "caption_metrics"
CORPORA = sorted(path.name.removesuffix("_inputs.json.gz") for path in CAPTIONS.glob("*_inputs.json.gz"))

needs_vqa = pytest.mark.skipif(not VQA.is_dir(), reason=f"no folder {VQA} (set GOLDEN)")
needs_captions = pytest.mark.skipif(not CAPTIONS.is_dir(), reason=f"no folder {CAPTIONS} (set GOLDEN)")


def read(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def mean(values):
    return sum(values) / len(values)


# --------------------------------------------------------------------------- questions


@needs_vqa
def test_normalisation():
    cases = read(VQA / "normalisation.json")
    assert cases
    for case in cases:
        assert strip_punctuation(case["raw"]) == case["after_processPunctuation"], case
        assert normalise_answer(case["raw"]) == case["normalised"], case


@needs_vqa
def test_vqa_accuracy():
    golden = read(VQA / "accuracy.json")
    scores = [100 * vqa_accuracy(q["prediction"], q["answers"]) for q in golden["questions"]]
    for question, score in zip(golden["questions"], scores):
        assert round(score, 2) == question["accuracy_percent_official"], question
    assert round(mean(scores), 2) == golden["official"]["overall"]
    for field, key in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
        for kind, expected in golden["official"][key].items():
            of_kind = [s for q, s in zip(golden["questions"], scores) if q[field] == kind]
            assert round(mean(of_kind), 2) == expected, (key, kind)


@needs_vqa
def test_artquest():
    golden = read(VQA / "artquest.json")
    items, original = golden["items"], golden["original_code"]
    for item in items:
        answer, prediction = item["answer"], item["prediction"]
        item["em"] = exact_match(prediction, answer)
        item["swapped"], item["usual"] = sentence_bleu(answer, prediction), sentence_bleu(prediction, answer)
        assert item["em"] == item["exact_match"], item
        assert item["swapped"] == pytest.approx(item["bleu"], abs=1e-12), item
        assert item["usual"] == pytest.approx(item["bleu_with_the_arguments_in_the_usual_order"], abs=1e-12), item
    for key, mine in (("em", "em"), ("bleu", "swapped")):
        assert mean([item[mine] for item in items]) == pytest.approx(original[key], abs=1e-12)
    usual = mean([item["usual"] for item in items])
    assert usual == pytest.approx(golden["bleu_with_the_arguments_in_the_usual_order"], abs=1e-12)


@needs_vqa
def test_artquest_per_type():
    golden = read(VQA / "artquest.json")
    for kind, em in golden["original_code"]["em_per_type"].items():
        pairs = [(i["answer"], i["prediction"]) for i in golden["items"] if i["question_type"] == kind]
        assert mean([exact_match(p, a) for a, p in pairs]) == pytest.approx(em, abs=1e-12), kind
        expected = golden["original_code"]["bleu_per_type"][kind]
        assert mean([sentence_bleu(a, p) for a, p in pairs]) == pytest.approx(expected, abs=1e-12), kind


# --------------------------------------------------------------------------- captions


@needs_captions
def test_the_folder_holds_cases():
    assert CORPORA, f"{CAPTIONS} has no *_inputs.json.gz"


@pytest.mark.parametrize("name", CORPORA)
def test_bleu_and_rouge_l(name):
    items = read(CAPTIONS / f"{name}_inputs.json.gz")
    hypotheses, references = [i["hypothesis"] for i in items], [i["references"] for i in items]
    corpus_golden, item_golden = read(CAPTIONS / f"{name}_corpus.json"), np.load(CAPTIONS / f"{name}_per_item.npz")
    corpus, per_item = bleu(hypotheses, references)
    for k in range(4):
        np.testing.assert_allclose(per_item[k], item_golden[f"Bleu_{k + 1}"], rtol=1e-6, atol=1e-15)
        assert corpus[k] == pytest.approx(corpus_golden[f"Bleu_{k + 1}"], rel=1e-6)
    rouge = [rouge_l(h, r) for h, r in zip(hypotheses, references)]
    np.testing.assert_allclose(rouge, item_golden["ROUGE_L"], rtol=0, atol=1e-6)
    assert mean(rouge) == pytest.approx(corpus_golden["ROUGE_L"], abs=1e-6)


@needs_captions
def test_bleu_of_tiny_corpora():
    path = CAPTIONS / "tiny_corpora.json"
    if not path.exists():
        pytest.skip(f"no file {path}")
    edge = {int(item["id"]): item for item in read(CAPTIONS / "edge_inputs.json.gz")}
    for case in read(path):
        items = [edge[i] for i in case["edge_ids"]]
        corpus, per_item = bleu([i["hypothesis"] for i in items], [i["references"] for i in items])
        np.testing.assert_allclose(corpus, case["Bleu"], rtol=1e-6)
        np.testing.assert_allclose(per_item, case["Bleu_per_item"], rtol=1e-6, atol=1e-15)


def raw_pairs():
    """(raw, tokenised) of ptb_pairs and of every corpus that also stores the raw strings."""
    path = CAPTIONS / "ptb_pairs.json.gz"
    if path.exists():
        yield path.name, [(pair["raw"], pair["tokenised"]) for pair in read(path)]
    for name in CORPORA:
        items = [i for i in read(CAPTIONS / f"{name}_inputs.json.gz") if "raw_hypothesis" in i]
        yield name, [pair for i in items for pair in zip([i["raw_hypothesis"], *i["raw_references"]],
                                                         [i["hypothesis"], *i["references"]])]


@needs_captions
def test_tokenizer_agreement():
    for name, pairs in raw_pairs():
        if pairs:
            agreement = mean([tokenize(raw) == expected for raw, expected in pairs])
            print(f"{name}: {agreement:.4f} of {len(pairs)}")
            wanted = 0.99 if name.startswith("ptb") else 0.95  # small files of made-up oddities may hold more misses
            assert agreement >= wanted, (name, [p for p in pairs if tokenize(p[0]) != p[1]][:5])
