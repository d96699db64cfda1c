"""Scores for answers and captions: one definition of each, no Java, plain Python.

    from metrics import vqa_accuracy, exact_match, bleu, rouge_l, tokenize
    vqa_accuracy("two", ["2"] * 6 + ["three"] * 4)                          # 1.0
    corpus, per_item = bleu([tokenize("A cat.")], [[tokenize("a cat"), tokenize("the cat")]])

Every score lies between 0 and 1 (the exceptions are said). VQA accuracy follows the official VQAv2 evaluator,
BLEU and ROUGE-L the COCO caption tools, exact match and sentence BLEU the ArtQuest code, their oddities included,
so that the numbers compare with published ones.
"""

import math
import re
from collections import Counter

# --------------------------------------------------------------------------- VQA accuracy

NUMBER_WORDS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBER_WORDS["none"] = "0"
ARTICLES = {"a", "an", "the"}

# Ending -> the words the reference joins it to. It knows these and no others (no "she'd", no "something's").
CONTRACTION_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}


def _contractions():
    """Misspelt -> right: each contraction with exactly one of its apostrophes missing (dont, couldn'tve, yall'd've)."""
    table = {}
    for ending, stems in CONTRACTION_ENDINGS.items():
        for word in (stem + ending for stem in stems.split()):
            table.update({word[:i] + word[i + 1:]: word for i, c in enumerate(word) if c == "'"})
    table["somebody'd"] = "somebodyd"  # the reference has this one entry the wrong way round
    return table                       # its "Im", "Ive", "Id've" are left out: words are in lower case by then


CONTRACTIONS = _contractions()


def _one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text):
    """First half of the VQAv2 normalisation: white space to blanks, strip, then the reference's processPunctuation.

    A mark goes without trace where it stands next to a blank anywhere in the text, or the text has a comma between
    digits; otherwise it becomes a blank ("red,white" -> "red white"). Colons, apostrophes, %, $, #, & stay.
    """
    text = out = _one_line(text)
    digit_comma = re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        deleted = digit_comma or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if deleted else " ")
    # Meant to spare periods between digits, but the reference's look-behind has a typo: only a digit AFTER spares one.
    # It also passes re.UNICODE (= 32) in the place of the count, so at most 32 periods go.
    return re.sub(r"\.(?!\d)", "", out, count=32)


def normalise_answer(text):
    """The official VQAv2 answer normalisation, equal to the reference: punctuation (see strip_punctuation), lower
    case, none / zero .. ten to digits, a / an / the dropped, apostrophes put back (dont -> don't). May return ""."""
    words = [NUMBER_WORDS.get(word, word) for word in strip_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction, answers):
    """VQAv2 accuracy of one prediction against its list of human answers, 0..1 (the official figure is 100 x the mean).

    Mean over the n annotators of min(1, matches among the OTHERS / 3): with ten answers 1, 2, 3 matches give 0.3, 0.6,
    0.9, four or more give 1. As in the official evaluator both sides are normalised only if the answers are not all
    equal: ten times "dog" gives 0 to "The Dog.", one "cat" among them gives it 1.

    Fewer than ten answers, where the official rule says nothing: with 2 or 3 the 3 becomes n - 1, so that agreement
    with all still gives 1. A single answer (art QA) is always normalised on both sides and gives 1 or 0: it is
    trivially "all equal", and the switch above, made for ten people who typed the very same string, would turn a
    whole data set of single answers into exact string matching. No answer at all is a ValueError.
    Texts of nothing but articles and marks normalise to "" and match each other and an empty prediction.
    """
    _need_list(answers, "answers")
    if len(answers) == 1:
        return float(normalise_answer(prediction) == normalise_answer(answers[0]))
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    matches, needed = answers.count(prediction), min(3, len(answers) - 1)
    return sum(min(1.0, (matches - (answer == prediction)) / needed) for answer in answers) / len(answers)


# --------------------------------------------------------------------------- ArtQuest

def exact_match(prediction, answer):
    """ArtQuest's EM: 1.0 if both are the same string in lower case, else 0.0. Nothing else is forgiven: no strip, no
    punctuation, no articles, so "dog" against "dog." or "dog " is 0 (vqa_accuracy is the forgiving one)."""
    return float(prediction.lower() == answer.lower())


def sentence_bleu(hypothesis, reference):
    """sacrebleu's sentence BLEU-4 / 100 of two raw strings in lower case, effective order (n-grams longer than the
    hypothesis do not count). 0..1, but equal strings give 1.0000000000000004; an empty side gives 0.

    Not symmetric: ArtQuest's code passes the ANSWER as hypothesis and the PREDICTION as reference, so
    sentence_bleu(answer, prediction) is its figure, sentence_bleu(prediction, answer) the usual one. Report both.
    """
    import sacrebleu
    return sacrebleu.sentence_bleu(hypothesis.lower(), [reference.lower()], use_effective_order=True).score / 100


# --------------------------------------------------------------------------- captions (COCO)

_LETTER = "[\\w\u0300-\u036f]"  # \w lacks the combining accents of decomposed text
_ENDING = r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)"
_SPLIT = re.compile(rf"(?<=\w)(?={_ENDING})|\b(?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b))")
_TOKEN = re.compile(
    r"(?:mr|mrs|ms|dr|jr|sr|st|rd|ave|blvd|ft|mt|vs|inc|co)\."  # abbreviations keep their period,
    r"|(?:[a-z]\.)+(?!\w)"                                       # so do initials: u.s.
    rf"|{_ENDING}"
    rf"|{_LETTER}+(?:(?:[-/&.']|(?<=\d)[,:](?=\d)){_LETTER}+)*"  # x-ray, and/or, o'clock, 3,000.5, 11:05
    r"|[!?]{2,}|[^\w\s]")                                        # "!?" is no entry of the list of dropped marks
_DROPPED = set(".,:;?!'\"`-\u2013\u2014\u2026\u2018\u2019\u201c\u201d")
_BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split()))  # drop list is upper case, text is lower


def tokenize(text):
    """Raw caption -> the string of blank-separated tokens that BLEU and ROUGE-L take; "" where none is left.

    The Penn Treebank rules of the COCO tools in a few patterns: lower case, clitics apart (man 's, do n't, can not),
    quotes and . , : ; ? ! - dropped, hyphens and slashes inside words kept. Measured against the Java tokeniser: the
    same string for 1831 of 1832 COCO captions (99.9 %), and at first sight, before the last rules were added, for 914
    of the 916 not looked at while writing (99.8 %). Not imitated: "23 3/4" as one token, and rarer forms.
    """
    text = _SPLIT.sub(r"\g<0> ", text.lower().replace("\u2019", "'"))
    tokens = _TOKEN.findall(text)
    return " ".join(_BRACKETS.get(token, token) for token in tokens if token not in _DROPPED)


def _need_list(strings, name):
    if isinstance(strings, str):
        raise ValueError(f"{name} must be a list of strings, got the single string {strings!r}")
    if not len(strings):
        raise ValueError(f"{name} is empty: at least one is needed")


def _ngrams(words, n):
    return Counter(tuple(words[i:i + k]) for k in range(1, n + 1) for i in range(len(words) - k + 1))


def _bleu_from_counts(correct, total, length, reference_length):
    # The reference's guards against 0 / 0: because of them an item without 4-gram matches gets ~1e-8 rather than 0
    # and a perfect one slightly less than 1.
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (reference_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for k, (c, t) in enumerate(zip(correct, total), start=1):
        product *= (c + tiny) / (t + small)
        scores.append(product ** (1 / k) * brevity)
    return scores


def bleu(hypotheses, references, n=4):
    """COCO's BLEU-1..n (Papineni et al. 2002) of tokenised strings: (corpus, per_item).

    `hypotheses` is a list of strings, `references` a list of lists of strings in the same order (see tokenize).
    `corpus` is a list of n floats 0..1 from counts summed over the corpus, NOT the mean of the items; `per_item` holds
    n lists, per_item[3][i] being BLEU-4 of item i. Precisions are clipped by the largest count over the references;
    the brevity penalty takes the reference of the closest length, the shorter one where two are equally close.
    An empty hypothesis scores 0. No items, unequal numbers, or an item without references is a ValueError.
    """
    _need_list(hypotheses, "hypotheses")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references")
    rows = []
    for i, (hypothesis, refs) in enumerate(zip(hypotheses, references)):
        _need_list(refs, f"references[{i}]")
        words, refs = hypothesis.split(), [ref.split() for ref in refs]
        allowed = Counter()
        for ref in refs:
            allowed |= _ngrams(ref, n)  # the larger count of each n-gram
        correct = [0] * n
        for gram, count in (_ngrams(words, n) & allowed).items():
            correct[len(gram) - 1] += count
        total = [max(0, len(words) - k) for k in range(n)]
        closest = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        rows.append((correct, total, len(words), closest))
    per_item = [list(scores) for scores in zip(*(_bleu_from_counts(*row) for row in rows))]
    correct, total, lengths, closest = zip(*rows)
    corpus = _bleu_from_counts(map(sum, zip(*correct)), map(sum, zip(*total)), sum(lengths), sum(closest))
    return corpus, per_item


def _lcs_length(positions, length, other):
    """Longest common subsequence with a whole row of the table in one integer (Hyyro 2004).
    positions: word -> bits of its places in the first sequence, which has `length` words."""
    row = ones = (1 << length) - 1
    for word in other:
        hit = row & positions.get(word, 0)
        row = (row + hit) | (row - hit)
    return length - (row & ones).bit_count()


def rouge_l(hypothesis, references):
    """COCO's ROUGE-L (Lin 2004) of one tokenised string against its list of references, 0..1; the corpus value is the
    mean of the items.

    P and R are the longest common subsequence over the two lengths, EACH the largest over the references (they may
    come from different ones); F = (1 + b^2) P R / (R + b^2 P), b = 1.2. As in the reference the split is at single
    blanks, so an empty hypothesis is one empty word: 0, unless a reference is empty too. No reference: ValueError.
    """
    _need_list(references, "references")
    words = hypothesis.split(" ")
    positions = {}
    for i, word in enumerate(words):
        positions[word] = positions.get(word, 0) | 1 << i
    precision = recall = 0.0
    for ref in (ref.split(" ") for ref in references):
        common = _lcs_length(positions, len(words), ref)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(ref))
    if not precision:
        return 0.0
    beta2 = 1.2 ** 2
    return (1 + beta2) * precision * recall / (recall + beta2 * precision)
