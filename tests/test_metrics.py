"""python -m pytest tests/test_metrics.py   (seconds; needs no data)

Values worked out by hand, and edge cases. The comparison with the reference code's output is in test_golden.py.
"""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import metrics  # noqa: E402
from metrics import bleu, exact_match, normalise_answer, rouge_l, sentence_bleu, strip_punctuation  # noqa: E402
from metrics import tokenize, vqa_accuracy  # noqa: E402

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


@pytest.mark.parametrize("arguments, message", [
    (([], []), "hypotheses is empty"), ((["a"], []), "1 hypotheses but 0"),
    ((["a", "b"], [["a"], []]), r"references\[1\] is empty"), ((["a"], ["a cat"]), "single string 'a cat'"),
    (("a", [["a"]]), "hypotheses must be a list"),
])
def test_bleu_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        bleu(*arguments)


@pytest.mark.parametrize("function", [rouge_l, vqa_accuracy])
def test_references_must_be_a_filled_list(function):
    with pytest.raises(ValueError, match="is empty"):
        function("a cat", [])
    with pytest.raises(ValueError, match="must be a list of strings, got the single string 'a cat'"):
        function("a cat", "a cat")


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
