"""python -m pytest tests/test_metrics.py   (seconds; needs no data)

Values worked out by hand, and edge cases. The comparison with the reference code's output is in test_golden.py, the
command line in test_metrics_cli.py. WordNet is a stand-in here and nothing is downloaded.
"""

import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import metrics  # noqa: E402
from metrics import (bleu, cider_d, coco_meteor, exact_match, meteor, normalise_answer, rouge_l, score_captions, sentence_bleu,  # noqa: E402
                     strip_punctuation, tokenize, vqa_accuracy)
from data.tables import DataError  # noqa: E402


# --------------------------------------------------------------------------- answer normalisation


@pytest.mark.parametrize("raw, expected", [
    ("  Yes.\n", "yes"), ("new\tline\nhere", "new line here"),
    ("The dog and an apple", "dog and apple"), ("the a an", ""), ("", ""),
    ("None of ten", "0 of 10"), ("eleven", "eleven"),
    ("red,white", "red white"), ("red, white", "red white"), ("3, 4", "3 4"), ("2,500 (or so)", "2500 or so"),
    ("2.5", "2.5"), ("10.", "10"), ("a.b 3.x", "ab 3x"), (".5", ".5"),
    ("12:30", "12:30"), ("'single' 50% #1 & $2", "'single' 50% #1 & $2"), ("a {b} x\\y", "b x y"),
    ("dont", "don't"), ("Dont", "don't"), ("couldntve", "couldntve"), ("couldn'tve", "couldn't've"),
    ("yall'd've", "y'all'd've"), ("oclock", "o'clock"), ("twas", "'twas"), ("somebody'd", "somebodyd"),
    ("its well were ill shed lets", "its well were ill shed lets"), ("Im", "im"), ("ive", "ive"),
])
def test_normalise_answer(raw, expected):
    assert normalise_answer(raw) == expected


def test_a_mark_next_to_a_blank_anywhere_is_deleted_everywhere():
    assert strip_punctuation("a-b") == "a b"
    assert strip_punctuation("a-b - c") == "ab  c"
    assert strip_punctuation("a- b-c") == "a bc"
    assert strip_punctuation("a -b-c") == "a bc"
    assert strip_punctuation("1,000 a-b") == "1000 ab"  # digit, comma, digit: every mark is deleted
    assert strip_punctuation("5,x a-b") == "5 x a b"    # but not for a digit on one side only


def test_white_space_and_the_marks_that_go():
    assert strip_punctuation(" a\tb\n") == "a b"
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        assert strip_punctuation(f"x{mark}y") == "x y"
    for mark in ":'%$#&*^~|":
        assert strip_punctuation(f"x{mark}y") == f"x{mark}y"


def test_at_most_32_periods_go():
    assert strip_punctuation("." * 40) == "." * 8


def test_contraction_table_size():
    assert len(metrics.CONTRACTIONS) == 114  # 120 of the reference less 4 with a capital I and 2 that map to themselves
    assert all(wrong != right for wrong, right in metrics.CONTRACTIONS.items())


# --------------------------------------------------------------------------- VQA accuracy


@pytest.mark.parametrize("agree, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_vqa_accuracy_of_ten(agree, expected):
    assert vqa_accuracy("two", ["2"] * agree + ["three"] * (10 - agree)) == pytest.approx(expected, abs=1e-12)


def test_ten_equal_answers_switch_normalisation_off():
    assert vqa_accuracy("The Dog.", ["dog"] * 10) == 0.0
    assert vqa_accuracy("dog", ["dog"] * 10) == 1.0
    assert vqa_accuracy(" dog\n", ["dog"] * 10) == 1.0            # white space goes in any case,
    assert vqa_accuracy("The Dog.", ["dog"] * 9 + ["dog "]) == 0.0  # and before it is asked whether all are equal
    assert vqa_accuracy("The Dog.", ["dog"] * 9 + ["cat"]) == 1.0


def test_single_answer_is_normalised_unlike_ten_copies_of_it():
    assert vqa_accuracy("The Dog.", ["dog"]) == 1.0
    assert vqa_accuracy("The Dog.", ["dog"] * 10) == 0.0
    assert vqa_accuracy("dog", ["The Dog."]) == 1.0
    assert vqa_accuracy("cat", ["dog"]) == 0.0
    assert vqa_accuracy("", ["The?"]) == 1.0  # both normalise to ""
    assert vqa_accuracy("", ["dog"]) == 0.0


def test_two_to_nine_answers():
    assert vqa_accuracy("dog", ["dog", "dog"]) == 1.0
    assert vqa_accuracy("dog", ["dog", "cat"]) == 0.5             # (0 + 1) / 2
    assert vqa_accuracy("dog", ["dog", "dog", "cat"]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert vqa_accuracy("dog", ["dog"] * 2 + ["cat"] * 3) == pytest.approx((2 * 1 / 3 + 3 * 2 / 3) / 5)


def test_exact_match_forgives_case_only():
    assert exact_match("Rembrandt", "rembrandt") == 1.0
    for near in ("rembrandt.", "rembrandt ", "the rembrandt"):
        assert exact_match(near, "rembrandt") == 0.0


def test_sentence_bleu_by_hand():
    assert sentence_bleu("dog", "a dog") == pytest.approx(math.exp(-1))  # only unigrams count; brevity exp(1 - 2)
    assert sentence_bleu("a dog", "dog") == pytest.approx(0.5)           # p1 = 1/2, p2 = 0 of 1 smoothed to 1/2
    assert sentence_bleu("Rembrandt", "rembrandt") == pytest.approx(1)
    assert sentence_bleu("", "german") == sentence_bleu("german", "") == 0


# --------------------------------------------------------------------------- BLEU


def test_bleu_clips_counts():
    corpus, per_item = bleu(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert corpus[0] == per_item[0][0] == pytest.approx(2 / 7, rel=1e-8)


def test_bleu_brevity_and_closest_reference():
    assert bleu(["a b"], [["a b c d"]], n=1)[0] == pytest.approx([math.exp(-1)], rel=1e-6)
    hypothesis = "one two three four five"  # references of 4 and 6 are equally close: the shorter, so no penalty
    assert bleu([hypothesis], [[hypothesis + " six", "one two three four"]])[0] == pytest.approx([1] * 4, rel=1e-6)
    assert bleu([hypothesis], [[hypothesis + " six"]])[0] == pytest.approx([math.exp(-0.2)] * 4, rel=1e-6)


def test_bleu_corpus_is_no_mean_of_items():
    corpus, per_item = bleu(["a b c d", "x"], [["a b c d"], ["y"]], n=2)
    assert per_item[0] == pytest.approx([1, 0], abs=1e-8)
    assert corpus == pytest.approx([4 / 5, math.sqrt(4 / 5)], rel=1e-8)  # unigrams 4 of 5, bigrams 3 of 3
    assert bleu(["a b c d", "x"], [["a b c d"], ["x"]])[0] == pytest.approx([1] * 4, rel=1e-8)  # 0 bigrams in "x"


def test_bleu_guards():
    corpus, per_item = bleu(["b a", ""], [["a b"], ["a"]])
    assert per_item[1][0] == pytest.approx(math.sqrt(1e-15), rel=1e-6)  # no bigram matches, yet not 0
    assert per_item[0][0] == pytest.approx(1 - 1e-9, abs=1e-14)         # all matches, yet not quite 1
    assert [scores[1] for scores in per_item] == [0, 0, 0, 0]           # empty hypothesis
    assert len(corpus) == len(per_item) == 4


@pytest.mark.parametrize("function", [bleu, cider_d, coco_meteor])
@pytest.mark.parametrize("arguments, message", [
    (([], []), "hypotheses is empty"), ((["a"], []), "1 hypotheses but 0"),
    ((["a", "b"], [["a"], []]), r"references\[1\] is empty"), ((["a"], ["a cat"]), "single string 'a cat'"),
    (("a", [["a"]]), "hypotheses must be a list"), ((None, [["a"]]), "hypotheses must be a list of strings, got None"),
    ((["a"], "a"), "references must be a list"), ((["a"], None), "references must be a list"),
    (([["a", "cat"]], [["a cat"]]), r"hypotheses\[0\] must be a string, got \['a', 'cat'\]"),
    ((["a"], [["a", None]]), r"references\[0\]\[1\] must be a string, got None"),
])
def test_lists_are_checked(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("function", [rouge_l, meteor, vqa_accuracy])
def test_references_must_be_a_filled_list(function):
    with pytest.raises(ValueError, match="is empty"):
        function("a cat", [])
    with pytest.raises(ValueError, match="must be a list of strings, got the single string 'a cat'"):
        function("a cat", "a cat")
    with pytest.raises(ValueError, match="must be a list of strings, got None"):
        function("a cat", None)
    with pytest.raises(ValueError, match=r"(hypothesis|prediction) must be a string, got \['a cat'\]"):
        function(["a cat"], ["a cat"])
    with pytest.raises(ValueError, match=r"(references|answers)\[1\] must be a string, got 2"):
        function("a cat", ["a cat", 2])


@pytest.mark.parametrize("function", [exact_match, sentence_bleu])
@pytest.mark.parametrize("arguments", [(["a"], "a"), ("a", ["a"]), (None, "a"), ("a", 3)])
def test_two_strings_are_wanted(function, arguments):
    with pytest.raises(ValueError, match="(prediction|answer|hypothesis|reference) must be a string"):
        function(*arguments)


def test_a_text_is_wanted_to_be_tokenised():
    with pytest.raises(ValueError, match=r"text must be a string, got \['a cat'\]"):
        tokenize(["a cat"])


@pytest.mark.parametrize("scores, right", [
    ([[1, 2]], [[True, False], [True, False]]), ([[1, 2]], [[False, False]]), ([1, 2], [True, False])])
def test_best_ranks_refuses_what_has_no_right_answer(scores, right):
    with pytest.raises(ValueError, match="with a right column in every row"):
        metrics.best_ranks(scores, right)


def test_the_recall_of_a_random_order_is_what_random_orders_have():
    owner, generator = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 5], np.random.default_rng(0)
    found = metrics.retrieval_chance(owner)
    drawn = [metrics.retrieval_scores(scores, scores.T, owner) for scores in generator.random((3000, 12, 6))]
    assert found.keys() == drawn[0].keys()
    for name in found:
        values = [one[name] for one in drawn]
        assert abs(found[name] - np.mean(values)) < 4 * np.std(values) / 3000 ** 0.5 + 1e-9, name
    by_hand = metrics.retrieval_chance([0, 0, 1])  # the first of three texts is one of two with 2/3, the one of one with 1/3
    assert by_hand["i2t R@1"] == pytest.approx(50) and by_hand["i2t R@5"] == 100 and by_hand["t2i R@1"] == 50


def test_retrieval_scores_take_lists():
    assert metrics.retrieval_scores(np.eye(2), np.eye(2), [0, 1])["mean"] == 100


# --------------------------------------------------------------------------- ROUGE-L and the tokeniser


def f_beta(p, r):
    return (1 + 1.44) * p * r / (r + 1.44 * p)


def test_rouge_l_by_hand():
    assert rouge_l("a b c d", ["a x c y z w"]) == pytest.approx(f_beta(2 / 4, 2 / 6), rel=1e-12)
    assert rouge_l("a b c d", ["a b c d e f g h"]) == pytest.approx(f_beta(1, 1 / 2), rel=1e-12)
    assert rouge_l("a b c d", ["a b c d e f g h", "a"]) == 1.0  # precision of the first, recall of the second
    assert rouge_l("a b", ["c d"]) == 0.0
    assert rouge_l("", ["a cat"]) == 0.0
    assert rouge_l("", ["a cat", ""]) == 1.0                     # an empty string is one empty word
    assert rouge_l("a  b", ["a b"]) == pytest.approx(f_beta(2 / 3, 1), rel=1e-12)


def test_lcs_against_the_table():
    def table(a, b):
        row = [0] * (len(b) + 1)
        for x in a:
            previous = row
            row = [0]
            for j, y in enumerate(b):
                row.append(previous[j] + 1 if x == y else max(previous[j + 1], row[j]))
        return row[-1]

    rng = random.Random(0)
    for length in [1, 2, 5, 20, 63, 64, 65, 200] * 3:
        a = [rng.choice("abcde") for _ in range(length)]
        b = [rng.choice("abcdef") for _ in range(rng.randint(1, 100))]
        positions = {w: sum(1 << i for i, x in enumerate(a) if x == w) for w in a}
        assert metrics._lcs_length(positions, len(a), b) == table(a, b)


@pytest.mark.parametrize("raw, expected", [
    ("A cat, on the Mat.", "a cat on the mat"), ("Wow! A cat? `x` \"y\"", "wow a cat x y"),
    ("", ""), (" ... ", ""), ("...!?", "!?"),
    ("it's the woman's dog, don't", "it 's the woman 's dog do n't"), ("It\u2019s men's'", "it 's men 's"),
    ("I cannot, gonna; wannabe", "i can not gon na wannabe"), ("'the scream' (1893)", "the scream -lrb- 1893 -rrb-"),
    ("3,000 at 11:05, 10.5% of $20", "3,000 at 11:05 10.5 % of $ 20"),
    ("17th-century black/white", "17th-century black/white"),
    ("Mr. No on Main St. in the U.S. west.", "mr. no on main st. in the u.s. west"),
    ("a \u2013 b -- c - d", "a b c d"), ("Caf\u00e9 cafe\u0301", "caf\u00e9 cafe\u0301"), ("a\nb", "a b"),
])
def test_tokenize(raw, expected):
    assert tokenize(raw) == expected


def test_import_is_light():
    code = "import sys, metrics; sys.exit(any(m in sys.modules for m in ('torch', 'nltk', 'sacrebleu')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --------------------------------------------------------------------------- CIDEr-D


def slow_cider_d(hypotheses, references):
    """CIDEr-D word for word from its definition, one pair and one n at a time."""
    def counts(text, n):
        words = text.split()
        return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))

    def weights(text, n):
        having = {gram: sum(any(gram in counts(ref, n) for ref in refs) for refs in references) for gram in counts(text, n)}
        return {gram: count * math.log(len(references) / max(1, having[gram])) for gram, count in counts(text, n).items()}

    def similarity(a, b, n):
        h, r = weights(a, n), weights(b, n)
        lengths = math.hypot(*h.values()) * math.hypot(*r.values())
        return sum(min(h.get(gram, 0), r[gram]) * r[gram] for gram in r) / lengths if lengths else 0.0

    scores = []
    for hypothesis, refs in zip(hypotheses, references):
        gaps = [sum(counts(hypothesis, 2).values()) - sum(counts(ref, 2).values()) for ref in refs]
        each = [sum(similarity(hypothesis, ref, n) for n in (1, 2, 3, 4)) / 4 * math.exp(-gap ** 2 / 72)
                for ref, gap in zip(refs, gaps)]
        scores.append(10 * sum(each) / len(each))
    return sum(scores) / len(scores), scores


def test_cider_d_by_hand():
    assert cider_d(["a b c d", "x"], [["a b c d"], ["y"]]) == (pytest.approx(5), [pytest.approx(10), 0])
    # "a" is in the references of both images and weighs nothing, the others weigh w = ln 2. n = 1: b (w) against b b (2w)
    # gives 1; n = 2: "a b" against "a b" and "b b"; n = 3, 4: nothing on one side. 1 and 2 bigrams.
    both = cider_d(["a b", "a"], [["a b b"], ["a"]])[1]
    assert both == [pytest.approx(10 / 4 * (1 + 1 / math.sqrt(2)) * math.exp(-1 / 72)), 0]
    # clipped: min(3w, w) w / (3w w); the mean over two references, of which the second has nothing in common
    assert cider_d(["b b b", "x"], [["b", "c"], ["y"]])[1] == [pytest.approx(10 / 4 * (1 / 3) * math.exp(-4 / 72) / 2), 0]


def test_cider_d_equals_its_definition():
    rng = random.Random(0)
    for images in (2, 3, 9):
        texts = [[" ".join(rng.choices("abcdef", k=rng.choice([0, 1, 2, 3, 4, 9, 30]))) for _ in range(rng.randint(2, 5))]
                 for _ in range(images)]
        hypotheses, references = [t[0] for t in texts], [t[1:] for t in texts]
        hypotheses[0] += " unseen"
        corpus, per_item = cider_d(hypotheses, references)
        slow, slow_items = slow_cider_d(hypotheses, references)
        assert per_item == pytest.approx(slow_items, abs=1e-12) and corpus == pytest.approx(slow, abs=1e-12)
        assert max(per_item) > 0 and isinstance(corpus, float) and isinstance(per_item, list)


def test_cider_d_edges():
    assert cider_d(["a cat"], [["a cat"]]) == (0.0, [0.0])              # one image: every idf is 0
    assert cider_d(["", "a"], [["a cat"], ["the dog"]])[1] == [0, 0]    # empty hypothesis
    assert cider_d(["", ""], [[""], ["", ""]]) == (0.0, [0.0, 0.0])     # nothing but empty strings
    alone = cider_d(["a cat", "a dog"], [["a cat"], ["a dog"]])[1]
    among = cider_d(["a cat", "a dog", "x"], [["a cat"], ["a dog"], ["a cat"]])[1]
    assert alone[0] == pytest.approx(5) and among[1] == pytest.approx(5) and alone != among


# --------------------------------------------------------------------------- METEOR

SYNONYMS = {"stop": ["halt", "full_stop"], "dog": ["cad"]}


def synsets(word):
    lemmas = [types.SimpleNamespace(name=lambda name=name: name) for name in SYNONYMS.get(word, [])]
    return [types.SimpleNamespace(lemmas=lambda: lemmas)]


def forget():
    metrics._wordnet.cache_clear()
    metrics._meteor_helpers.cache_clear()


@pytest.fixture(params=[True, False], ids=["wordnet", "no wordnet"])
def with_wordnet(request, monkeypatch):
    """Whether there is a (stand-in) WordNet."""
    metrics._meteor_helpers.cache_clear()
    monkeypatch.setattr(metrics, "_wordnet", lambda: types.SimpleNamespace(synsets=synsets) if request.param else None)
    yield request.param
    metrics._meteor_helpers.cache_clear()


def test_meteor_by_hand(with_wordnet):
    assert meteor("the cats sat", ["the cat sat"]) == pytest.approx(1 - 0.5 / 27)        # by stem; one chunk of three
    assert meteor("running", ["runs"]) == 0.5
    assert meteor("sat the cat", ["the cat sat"]) == pytest.approx(1 - 0.5 * (2 / 3) ** 3)
    precise = 1 / (0.9 * 1 + 0.1 * 0.5) * 0.5                                            # P 1, R 1/2; one chunk of two
    assert meteor("a b", ["a b c d"]) == pytest.approx(precise * (1 - 0.5 / 8))
    assert meteor("a b", ["x", "a b", "a"]) == pytest.approx(1 - 0.5 / 8)                # the best reference
    assert meteor("stop", ["halt"]) == (0.5 if with_wordnet else 0)                      # by synonym
    assert meteor("A", ["a"]) == 0.5 and meteor("", ["a"]) == 0 and meteor("x", [""]) == 0
    assert isinstance(meteor("", ["a"]), float)


def test_meteor_name(with_wordnet):
    assert metrics.meteor_name() == ("METEOR" if with_wordnet else "METEOR (no WordNet)")
    assert metrics.meteor_name() in score_captions(["a cat"], [["a cat"]])["corpus"]


class Reader:
    """NLTK's WordNet, missing for the first `failures` times it is asked."""

    def __init__(self, failures, error=LookupError):
        self.failures, self.error, self.asked = failures, error, 0

    def synsets(self, word):
        self.asked += 1
        if self.asked <= self.failures:
            raise self.error("wordnet is not there")
        return synsets(word)


@pytest.fixture
def downloads(monkeypatch):
    """The calls of the program that would download, which does nothing here."""
    calls = []
    monkeypatch.setattr(metrics.subprocess, "run", lambda *args, **settings: calls.append((args, settings)))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    forget()
    yield calls
    forget()


def put_reader(monkeypatch, reader):
    import nltk.corpus
    monkeypatch.setattr(nltk.corpus, "wordnet", reader)


def test_wordnet_that_is_there_is_not_downloaded(monkeypatch, downloads):
    put_reader(monkeypatch, Reader(0))
    assert metrics.meteor_name() == "METEOR" and not downloads


@pytest.mark.parametrize("error", [LookupError, OSError, metrics.zipfile.BadZipFile])
def test_download_is_tried_once(monkeypatch, downloads, error):
    put_reader(monkeypatch, reader := Reader(99, error))
    assert [metrics.meteor_name() for _ in range(3)] == ["METEOR (no WordNet)"] * 3
    assert meteor("stop", ["halt"]) == 0 and meteor("stops", ["stop"]) == 0.5
    (command,), settings = downloads[0]
    assert len(downloads) == 1 and reader.asked == 2 and "wordnet" in command[-1] and settings["timeout"] <= 20
    assert {settings[name] for name in ("stdin", "stdout", "stderr")} == {subprocess.DEVNULL}


def test_download_that_works(monkeypatch, downloads):
    put_reader(monkeypatch, Reader(1))
    assert metrics.meteor_name() == "METEOR" and len(downloads) == 1 and meteor("stop", ["halt"]) == 0.5


def test_download_that_hangs(monkeypatch, downloads):
    def hang(command, timeout, **settings):
        downloads.append(command)
        raise subprocess.TimeoutExpired(command, timeout)

    put_reader(monkeypatch, Reader(99))
    monkeypatch.setattr(metrics.subprocess, "run", hang)
    assert metrics.meteor_name() == "METEOR (no WordNet)" and len(downloads) == 1


@pytest.mark.parametrize("offline, tries", [("1", 0), ("true", 0), ("0", 1), ("", 1)])
def test_no_download_offline(monkeypatch, downloads, offline, tries):
    put_reader(monkeypatch, Reader(99))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert metrics.meteor_name() == "METEOR (no WordNet)" and len(downloads) == tries


def test_words_are_looked_up_once(monkeypatch, downloads):
    put_reader(monkeypatch, reader := Reader(0))
    for _ in range(5):
        meteor("stop", ["halt", "end"])
    assert reader.asked == 2  # "dog", to see whether it is there, and "stop"


# --------------------------------------------------------------------------- METEOR 1.5


@pytest.fixture
def java_meteor(monkeypatch):
    """A stand-in for pycocoevalcap's Meteor; returns the list of what it was asked."""
    asked = []

    class Meteor:
        def compute_score(self, references, hypotheses):
            asked.append((references, hypotheses))
            if hypotheses[0] == ["broken"]:
                raise BrokenPipeError("no answer")
            return 0.25, [0.5] * len(hypotheses)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for name in ("pycocoevalcap", "pycocoevalcap.meteor", "pycocoevalcap.meteor.meteor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pycocoevalcap.meteor.meteor"].Meteor = Meteor
    return asked


def test_coco_meteor(java_meteor, with_wordnet):
    assert coco_meteor(["a", "b"], [["c"], ["d", "e"]]) == (0.25, [0.5, 0.5])  # the corpus value is no mean
    assert java_meteor == [({0: ["c"], 1: ["d", "e"]}, {0: ["a"], 1: ["b"]})]
    scores = score_captions({"x": "A dog.", "y": "Cats"}, {"x": ["C, d"], "y": ["E"]}, with_coco_meteor=True)
    assert java_meteor[1] == ({0: ["c d"], 1: ["e"]}, {0: ["a dog"], 1: ["cats"]})
    assert list(scores["corpus"])[-1] == "METEOR 1.5" and scores["corpus"]["METEOR 1.5"] == 0.25
    assert scores["per_item"]["METEOR 1.5"] == [0.5, 0.5] and metrics.meteor_name() in scores["corpus"]


def test_coco_meteor_that_breaks(java_meteor):
    with pytest.raises(DataError, match="the Java program failed .*no answer"):
        coco_meteor(["broken"], [["a"]])


@pytest.mark.parametrize("place, name", [(importlib.util, "find_spec"), (shutil, "which")])
def test_coco_meteor_that_is_missing(java_meteor, monkeypatch, place, name):
    monkeypatch.setattr(place, name, lambda name: None)
    with pytest.raises(DataError, match="needs Java and the package pycocoevalcap"):
        coco_meteor(["a"], [["a"]])
    assert not java_meteor


# --------------------------------------------------------------------------- all caption scores


def test_score_captions(with_wordnet):
    hypotheses = {"a.jpg": "A cat, sitting.", "b.jpg": "Dogs run", "c.jpg": ""}
    references = {"c.jpg": ["A tree"], "b.jpg": ["Two dogs run.", "dogs!"], "a.jpg": ["The cat sits."]}
    scores = score_captions(hypotheses, references)
    names = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", metrics.meteor_name(), "ROUGE-L", "CIDEr-D"]
    assert list(scores) == ["corpus", "per_item"] and list(scores["corpus"]) == list(scores["per_item"]) == names
    tokenised = ["a cat sitting", "dogs run", ""], [["the cat sits"], ["two dogs run", "dogs"], ["a tree"]]
    corpus, per_item = bleu(*tokenised)
    for k in range(4):
        assert scores["corpus"][f"BLEU-{k + 1}"] == corpus[k] and scores["per_item"][f"BLEU-{k + 1}"] == per_item[k]
    assert (scores["corpus"]["CIDEr-D"], scores["per_item"]["CIDEr-D"]) == cider_d(*tokenised)
    for name, score in ((metrics.meteor_name(), meteor), ("ROUGE-L", rouge_l)):
        assert scores["per_item"][name] == [score(h, r) for h, r in zip(*tokenised)]
        assert scores["corpus"][name] == pytest.approx(sum(scores["per_item"][name]) / 3, abs=1e-15)
    assert all(values[2] == 0 for values in scores["per_item"].values())  # the empty caption
    in_lists = score_captions(list(hypotheses.values()), [references[key] for key in hypotheses])
    assert in_lists == scores


def test_one_image_has_no_cider(with_wordnet):
    scores = score_captions(["a cat"], [["a cat"]])
    assert scores["corpus"]["CIDEr-D"] is None and scores["per_item"]["CIDEr-D"] == [None]
    assert scores["corpus"]["ROUGE-L"] == 1 and scores["per_item"]["BLEU-1"] == [pytest.approx(1)]
    assert score_captions(["a cat", "x"], [["a cat"], ["y"]])["corpus"]["CIDEr-D"] == pytest.approx(2.5)


def test_each_string_is_tokenised_once(monkeypatch, with_wordnet):
    seen = []
    monkeypatch.setattr(metrics, "tokenize", lambda text: seen.append(text) or text)
    score_captions(["a", "b"], [["c", "d"], ["e"]])
    assert seen == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("arguments, message", [
    (({"a": "x"}, {"a": ["x"], "b": ["x"]}), "no caption for 1 of 2 images, first 'b'"),
    (({"a": "x", "b": "x", 3: "x"}, {"a": ["x"]}), "no references for 2 of 3 images, first 'b'"),
    (({}, {}), "hypotheses is empty"), (([], []), "hypotheses is empty"),
    (({"a": "x"}, {"a": []}), "references of 'a' is empty"), (({"a": "x"}, {"a": "x"}), "references of 'a' must be a list"),
    ((["x"], []), "1 hypotheses but 0"), ((["x"], [[]]), r"references\[0\] is empty"),
    (({"a": "x"}, [["x"]]), "both be dicts or both be lists"), ((["x"], {"a": ["x"]}), "both be dicts or both be lists"),
    (("x", [["x"]]), "hypotheses must be a list"), ((["x"], ["x"]), r"references\[0\] must be a list"),
])
def test_score_captions_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_captions(*arguments)


# --- scripts without blanks between words ------------

@pytest.mark.parametrize("text, tokens", [
    ("\u4e00\u53ea\u72d7\u3002", "\u4e00 \u53ea \u72d7"),  # one dog, with its full stop
    ("\u4e00 \u53ea \u72d7", "\u4e00 \u53ea \u72d7"),  # as BERT's tokenizer decodes it
    ("a \u7ea2\u8272 T-shirt, 3.5\u7c73", "a \u7ea2 \u8272 t-shirt 3.5 \u7c73"),
    ("\u8d64\u3044\u8239\u3068\u30d2\u30c8", "\u8d64 \u3044 \u8239 \u3068 \u30d2 \u30c8"),
    ("\u0e2b\u0e21\u0e32\u0e14\u0e33 \u0e17\u0e35\u0e48", "\u0e2b \u0e21 \u0e32 \u0e14 \u0e33 \u0e17\u0e35\u0e48"),
    ("\ub450 \uc0ac\ub78c", "\ub450 \uc0ac\ub78c")])  # Korean has blanks
def test_characters_are_tokens_where_words_have_no_blanks(text, tokens):
    assert metrics.tokenize(text) == tokens


def test_one_wrong_chinese_character_of_four_scores_three_quarters():
    scores = metrics.score_captions(["\u7ea2\u8272\u7684\u72d7", "\u7ea2"], [["\u7ea2\u8272\u7684\u732b"], ["\u7ea2"]])["per_item"]
    assert scores["ROUGE-L"] == [pytest.approx(0.75), 1.0] and scores["BLEU-1"][0] == pytest.approx(0.75)


def test_characters_are_said_beside_the_scores(tmp_path, capsys):
    for name, text in (("refs", ["\u7ea2\u8272"]), ("preds", "\u7ea2\u8272")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"a": text, "b": text}), encoding="utf-8")
    metrics.main(["--references", str(tmp_path / "refs.json"), "--predictions", str(tmp_path / "preds.json")])
    assert "each character counts as a token" in capsys.readouterr().out


def test_a_chinese_answer_has_its_bleu_by_characters():
    """One wrong character of four scores as one wrong word of four does, and not as a sentence that is wholly wrong."""
    assert sentence_bleu("\u7ea2\u8272\u7684\u72d7", "\u7ea2\u8272\u7684\u732b") == sentence_bleu("a b c d", "a b c e")
    assert sentence_bleu("\u7ea2\u8272\u7684\u72d7", "\u7ea2\u8272\u7684\u72d7") == pytest.approx(1)


def test_every_stage_that_scores_texts_says_what_counts_as_a_token(tmp_path, capsys):
    import eval_gated
    import pretrain_stage2
    import train_blip_caption
    from data.rows import Row
    from PIL import Image
    (tmp_path / "images").mkdir()
    for n in (1, 2):
        Image.new("RGB", (32, 32), (60 * n, 0, 0)).save(tmp_path / f"images/{n}.png")
    said = "each character counts as a token"
    for text, wanted in (("\u7ea2\u8272\u7684\u732b", True), ("a red cat", False)):
        for n, split in ((1, "train"), (2, "val")):
            (tmp_path / f"{split}_captions.json").write_text(json.dumps({f"{n}.png": text}), encoding="utf-8")
        lines = []
        train_blip_caption.read_scored(train_blip_caption.get_args(["--data", str(tmp_path), "--workers", "0"]), "val", lines.append)
        assert (said in "\n".join(lines)) is wanted
        lines = []
        pretrain_stage2.read_data(pretrain_stage2.get_args(["--data", f"few={tmp_path}", "--workers", "0"]), lines.append)
        assert (said in "\n".join(lines)) is wanted
        asked = types.SimpleNamespace(predictions=None, abstain_below=None, table=None, maps=0, report=None, export=None)
        row = Row("1.png", "1.png", "?", text, "style", "", 2, "val.csv")
        eval_gated.write_outputs(types.SimpleNamespace(args=asked, questions=[row], overlap=None), {"gated": [{"prediction": "x"}]}, [])
        assert (said in capsys.readouterr().out) is wanted
