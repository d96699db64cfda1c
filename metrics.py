"""Scores for answers and captions: one definition of each, no Java.

    python metrics.py --references refs.json --predictions preds.json       # the table of caption scores; --json

    from metrics import vqa_accuracy, exact_match, bleu, score_captions, tokenize
    vqa_accuracy("two", ["2"] * 6 + ["three"] * 4)                          # 1.0
    corpus, per_item = bleu([tokenize("A cat.")], [[tokenize("a cat"), tokenize("the cat")]])
    score_captions({"a.jpg": "A cat."}, {"a.jpg": ["A black cat.", "The cat"]})["corpus"]["ROUGE-L"]

Every score lies between 0 and 1 (the exceptions are said: CIDEr-D goes up to 10). VQA accuracy follows the official
VQAv2 evaluator, BLEU, ROUGE-L and CIDEr-D the COCO caption tools, exact match and sentence BLEU the ArtQuest code,
their oddities included, so that the numbers compare with published ones. METEOR is NLTK's, which is NOT the METEOR 1.5
of the COCO tools and of papers: see meteor and coco_meteor. Recalls (cirr_scores, fashioniq_scores, retrieval_scores) are
percent. Intervals of means come from estimate, of comparisons from paired_difference.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from collections import Counter
from typing import NamedTuple

import numpy as np

from data.tables import excerpt
from engine import errors
from engine.errors import DataError
from engine.text import MARKS, UNSPACED


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
    _need_text(prediction=prediction, **_numbered("answers", answers))
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
    _need_text(prediction=prediction, answer=answer)
    return float(prediction.lower() == answer.lower())


def sentence_bleu(hypothesis, reference):
    """sacrebleu's sentence BLEU-4 / 100 of two raw strings in lower case, effective order (n-grams longer than the
    hypothesis do not count). 0..1, but equal strings give 1.0000000000000004; an empty side gives 0.

    Not symmetric: ArtQuest's code passes the ANSWER as hypothesis and the PREDICTION as reference, so
    sentence_bleu(answer, prediction) is its figure, sentence_bleu(prediction, answer) the usual one. Report both.
    Characters of scripts without blanks are tokens of their own, as in `tokenize`; sacrebleu's rules alone leave a sentence in one.
    """
    _need_text(hypothesis=hypothesis, reference=reference)
    import sacrebleu
    hypothesis, reference = (UNSPACED.sub(r" \g<0> ", text.lower()) for text in (hypothesis, reference))
    return sacrebleu.sentence_bleu(hypothesis, [reference], use_effective_order=True).score / 100


def answer_scores(prediction, answer, people):
    """What tables and pages tell of one answer: exact match, VQA accuracy over the answers of all `people` who were asked, sentence BLEU
    with the prediction as hypothesis, ROUGE-L: {"EM", "VQA", "BLEU", "ROUGE-L"}, each 0 to 1."""
    return {"EM": exact_match(prediction, answer), "VQA": vqa_accuracy(prediction, people),
            "BLEU": sentence_bleu(prediction, answer), "ROUGE-L": rouge_l(tokenize(prediction), [tokenize(answer)])}


# --------------------------------------------------------------------------- captions (COCO)

_LETTER = f"[\\w\u0300-\u036f{MARKS}]"  # \w lacks combining marks
_ENDING = r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)"
_SPLIT = re.compile(rf"(?<=\w)(?={_ENDING})|\b(?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b))")
_TOKEN = re.compile(
    r"(?:mr|mrs|ms|dr|jr|sr|st|rd|ave|blvd|ft|mt|vs|inc|co)\."  # abbreviations keep their period,
    r"|(?:[a-z]\.)+(?!\w)"                                       # so do initials: u.s.
    rf"|{_ENDING}"
    rf"|{_LETTER}+(?:(?:[-/&.']|(?<=\d)[,:](?=\d)){_LETTER}+)*"  # x-ray, and/or, o'clock, 3,000.5, 11:05
    r"|[!?]{2,}|[^\w\s]")                                        # "!?" is no entry of the list of dropped marks
_DROPPED = set(".,:;?!'\"`-\u2013\u2014\u2026\u2018\u2019\u201c\u201d"
               "\u3001\u3002\uff0c\uff0e\uff01\uff1f\uff1b\uff1a\u300c\u300d\u300e\u300f\uff08\uff09\u300a\u300b\u3010\u3011\u00b7")
_BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split()))  # drop list is upper case, text is lower


def tokenize(text):
    """Raw caption -> the string of blank-separated tokens that the caption scores take; "" where none is left.

    The Penn Treebank rules of the COCO tools in a few patterns: lower case, clitics apart (man 's, do n't, can not),
    quotes and . , : ; ? ! - dropped, hyphens and slashes inside words kept. Measured against the Java tokeniser: the
    same string for 1831 of 1832 COCO captions (99.9 %), and at first sight, before the last rules were added, for 914
    of the 916 not looked at while writing (99.8 %). Not imitated: "23 3/4" as one token, and rarer forms.

    In scripts without blanks between words each character is a token, as is usual for Chinese captions: the rules above would make
    one token of a sentence, and one wrong character would score 0.
    """
    _need_text(text=text)
    text = UNSPACED.sub(r" \g<0> ", text)
    text = _SPLIT.sub(r"\g<0> ", text.lower().replace("\u2019", "'"))
    tokens = _TOKEN.findall(text)
    return " ".join(_BRACKETS.get(token, token) for token in tokens if token not in _DROPPED)


IN_CHARACTERS = "in scripts without blanks between words (Chinese, Japanese, Thai, ...) each character counts as a token"


def in_characters(texts):
    """Does `tokenize` take characters for tokens in some of these texts? To be said beside their scores."""
    return any(UNSPACED.search(text) for text in texts)


def log_characters(texts, log=print):
    """Say IN_CHARACTERS where it holds for some of the reference texts."""
    if in_characters(texts):
        log(f"note: {IN_CHARACTERS}")


def _need_list(strings, name):
    if isinstance(strings, str):
        raise ValueError(f"{name} must be a list of strings, got the single string {strings!r}")
    if not hasattr(strings, "__len__") or not hasattr(strings, "__getitem__"):
        raise ValueError(f"{name} must be a list of strings, got {strings!r:.60}")
    if not len(strings):
        raise ValueError(f"{name} is empty: at least one is needed")


def _numbered(name, texts):
    return {f"{name}[{k}]": text for k, text in enumerate(texts)}


def _need_text(**texts):
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {text!r:.60}")


def _need_pairs(hypotheses, references):
    _need_list(hypotheses, "hypotheses")
    if isinstance(references, str) or not hasattr(references, "__len__"):
        _need_list(references, "references")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references")
    for i, (hypothesis, refs) in enumerate(zip(hypotheses, references)):
        _need_list(refs, f"references[{i}]")
        _need_text(**{f"hypotheses[{i}]": hypothesis}, **_numbered(f"references[{i}]", refs))


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
    _need_pairs(hypotheses, references)
    rows = []
    for hypothesis, refs in zip(hypotheses, references):
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
    _need_text(hypothesis=hypothesis, **_numbered("references", references))
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


def _ngram_counts(texts, longest=4):
    """Yield for n = 1 .. longest the n-grams of lists of words as three arrays, one entry for each different n-gram of
    each text: the number of the text, the number of the n-gram (below the count of all words), how often it occurs."""
    numbers = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for text in texts for word in text], dtype=np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    gram = words  # gram[i]: the n-gram that begins at word i, also where it runs into the next text
    for n in range(1, longest + 1):
        if n > 1:
            gram = np.unique(gram[:-1] * len(words) + words[n - 1:], return_inverse=True)[1]
        inside = owner[:len(gram)] == owner[n - 1:]
        pairs, counts = np.unique(owner[:len(gram)][inside] * len(words) + gram[inside], return_counts=True)
        yield *np.divmod(pairs, len(words)), counts


def _clipped_cosines(text, gram, count, image):
    """CIDEr-D's similarity of each reference with the hypothesis of its image for one n. `image` holds the image of
    each text, the hypotheses first; the rest is one n of _ngram_counts."""
    images, size = image.max() + 1, gram.max(initial=0) + 1
    in_reference = text >= images
    pairs, place = np.unique(image[text] * size + gram, return_inverse=True)  # each n-gram of each image once
    images_with = np.bincount(pairs[np.unique(place[in_reference])] % size, minlength=size)
    weight = count * (math.log(images) - np.log(np.maximum(1, images_with)))[gram]
    of_hypothesis = np.zeros(len(pairs))
    of_hypothesis[place[~in_reference]] = weight[~in_reference]
    own, place, text_of_own = weight[in_reference], place[in_reference], text[in_reference]
    dot = np.bincount(text_of_own, np.minimum(of_hypothesis[place], own) * own, minlength=len(image))[images:]
    length = np.sqrt(np.bincount(text, weight ** 2, minlength=len(image)))
    both = length[:images][image[images:]] * length[images:]
    return np.divide(dot, both, out=np.zeros(len(both)), where=both > 0)


def cider_d(hypotheses, references):
    """COCO's CIDEr-D (Vedantam et al. 2015) of tokenised strings, 0..10: (corpus, per_item), lists as for bleu; the
    corpus value is the mean of the items.

    An n-gram weighs count * (ln N - ln max(1, df)), N the number of images, df the number of images whose references
    hold it. sim_n = sum min(h, r) r / (|h| |r|) * exp(-(l_h - l_r)^2 / (2 * 6^2)), l the length in words; the score
    is 10 times the mean over n = 1..4 and over the references. df comes from the references given here, so a score
    belongs to its set of images: a subset scores differently. An empty hypothesis scores 0. With ONE image ln N = 0
    and all is 0, which says nothing about the caption (score_captions gives None then).
    """
    _need_pairs(hypotheses, references)
    each = [len(refs) for refs in references]
    image = np.concatenate([np.arange(len(each)), np.repeat(np.arange(len(each)), each)])  # of every text
    texts = [text.split() for text in itertools.chain(hypotheses, *references)]
    similarity = sum(_clipped_cosines(*grams, image) for grams in _ngram_counts(texts)) / 4
    lengths = np.array([len(text) for text in texts])
    of_reference = image[len(each):]
    similarity *= np.exp(-(lengths[of_reference] - lengths[len(each):]) ** 2 / (2 * 6 ** 2))
    per_item = 10 * np.bincount(of_reference, similarity) / each
    return float(per_item.mean()), per_item.tolist()


# --------------------------------------------------------------------------- METEOR

def _download_wordnet():
    """Let NLTK fetch WordNet (11 MB), for 20 seconds at most: in a process of its own, since a name server that does
    not answer cannot be interrupted otherwise. Silent, and not tried where HF_HUB_OFFLINE forbids the network."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        try:
            subprocess.run([sys.executable, "-c", "import nltk; nltk.download('wordnet', quiet=True)"], timeout=20,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            pass


@functools.cache
def _wordnet():
    """NLTK's WordNet, or None where it is neither there nor to be had. Settled once for the process."""
    from nltk.corpus import wordnet
    for last_try in (False, True):
        try:
            wordnet.synsets("dog")  # loads the files
            return wordnet
        except (LookupError, OSError, zipfile.BadZipFile):
            if not last_try:
                _download_wordnet()
    return None


@functools.cache
def _meteor_helpers():
    """Stemmer and synonyms in the form meteor_score takes, each word looked up once: 6 times as fast."""
    from nltk.stem.porter import PorterStemmer
    wordnet = _wordnet()
    synsets = functools.cache(wordnet.synsets) if wordnet else lambda word: []
    return {"stemmer": types.SimpleNamespace(stem=functools.cache(PorterStemmer().stem)),
            "wordnet": types.SimpleNamespace(synsets=synsets)}


def meteor_name():
    """What the figure of meteor is to be called: "METEOR", or "METEOR (no WordNet)", which is lower: without synonyms.

    Settled at the first call: where NLTK does not find its WordNet, one download is tried (20 seconds at most)."""
    return "METEOR" if _wordnet() else "METEOR (no WordNet)"


def meteor(hypothesis, references):
    """NLTK's METEOR (Lavie & Agarwal 2007) of one tokenised string against its list of references, 0..1; the corpus
    value is the mean of the items. Show it under meteor_name().

    Words are matched as they are, then by Porter stem, then by WordNet synonym. F = P R / (0.9 P + 0.1 R) of the
    matches, times 1 - 0.5 (chunks / matches)^3, a chunk being matches in a row on both sides; the best reference
    counts. The COCO tools' METEOR 1.5 (coco_meteor) is another metric with far lower values: never compare the two.
    An empty hypothesis scores 0. No reference: ValueError.
    """
    _need_list(references, "references")
    _need_text(hypothesis=hypothesis, **_numbered("references", references))
    from nltk.translate.meteor_score import meteor_score
    return float(meteor_score([ref.split() for ref in references], hypothesis.split(), **_meteor_helpers()))


def coco_meteor(hypotheses, references):
    """METEOR 1.5 as papers report it (Denkowski & Lavie 2014), by pycocoevalcap and Java: (corpus, per_item), lists of
    tokenised strings as for bleu, 0..1. The corpus value comes from summed counts: it is NOT the mean of the items.

    DataError: pycocoevalcap or Java is missing or fails.
    """
    _need_pairs(hypotheses, references)
    if not importlib.util.find_spec("pycocoevalcap") or not shutil.which("java"):
        raise DataError("--coco-meteor needs Java and the package pycocoevalcap: install both or leave the flag out")
    from pycocoevalcap.meteor.meteor import Meteor
    try:
        corpus, per_item = Meteor().compute_score(dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)})
    except (OSError, ValueError, AssertionError) as error:
        raise DataError(f"--coco-meteor: the Java program failed ({excerpt(error)}): try `java -version`, which must work, "
                        "and see that 2 GB of memory are free") from error
    return float(corpus), list(map(float, per_item))


# --------------------------------------------------------------------------- all caption scores

def paired(hypotheses, references):
    """(hypotheses, references) as two lists in the same order, from two lists or from two dicts with the same keys.
    ValueError: no hypotheses, keys on one side only, unequal numbers, an item without references."""
    if isinstance(hypotheses, dict) != isinstance(references, dict):
        raise ValueError("hypotheses and references must both be dicts or both be lists")
    if isinstance(hypotheses, dict):
        for ours, theirs, problem in ((references, hypotheses, "no caption for"), (hypotheses, references, "no references for")):
            lacking = [key for key in ours if key not in theirs]
            if lacking:
                raise ValueError(f"{problem} {len(lacking)} of {len(ours)} images, first {excerpt(lacking[0])}: "
                                 "both sides must hold the same images")
        for key, refs in references.items():
            _need_list(refs, f"the list of references of {excerpt(key)}")
        hypotheses, references = list(hypotheses.values()), [references[key] for key in hypotheses]
    _need_pairs(hypotheses, references)
    return hypotheses, references


def score_captions(hypotheses, references, with_coco_meteor=False):
    """Every caption score of raw strings: {"corpus": {name: value}, "per_item": {name: [value of each item]}}.

    hypotheses {key: caption} and references {key: [captions]}, or two lists in the same order; the items stand in
    the order of the hypotheses. Names: BLEU-1..4, meteor_name(), ROUGE-L, CIDEr-D and, if asked for, METEOR 1.5.
    All 0..1 but CIDEr-D (0..10), which with one image has no meaning and is None. Each string is tokenised once. An
    empty hypothesis scores 0 (in ROUGE-L 1 where a reference is empty too). ValueError: see paired.
    """
    hypotheses, references = paired(hypotheses, references)
    hypotheses = [tokenize(text) for text in hypotheses]
    references = [[tokenize(text) for text in refs] for refs in references]
    java = {"METEOR 1.5": coco_meteor(hypotheses, references)} if with_coco_meteor else {}  # first: it may be missing
    bleu_corpus, bleu_items = bleu(hypotheses, references)
    corpus = {f"BLEU-{k}": value for k, value in enumerate(bleu_corpus, 1)}
    per_item = {f"BLEU-{k}": values for k, values in enumerate(bleu_items, 1)}
    for name, score in ((meteor_name(), meteor), ("ROUGE-L", rouge_l)):
        per_item[name] = [score(hypothesis, refs) for hypothesis, refs in zip(hypotheses, references)]
        corpus[name] = sum(per_item[name]) / len(hypotheses)
    one_image = len(hypotheses) == 1
    corpus["CIDEr-D"], per_item["CIDEr-D"] = (None, [None]) if one_image else cider_d(hypotheses, references)
    for name, (value, values) in java.items():
        corpus[name], per_item[name] = value, values
    return {"corpus": corpus, "per_item": per_item}


# --------------------------------------------------------------------------- retrieval

def target_ranks(scores, target, excluded=None):
    """Where the target stands in each query's ranking: scores [N,G], higher is better, target [N] columns -> [N], from 1.

    excluded [N]: columns that are left out of the ranking (CIRR's references), or None. What ties with the target, and NaN
    on either side, counts against it: a model that says the same of all pictures gets the last rank. ValueError: shapes;
    a column outside the gallery; a target that is excluded.
    """
    scores, target = np.asarray(scores), np.asarray(target)
    columns = [target] if excluded is None else [target, np.asarray(excluded)]
    if scores.ndim != 2 or any(c.shape != scores.shape[:1] for c in columns):
        raise ValueError(f"scores [N,G] and columns [N] wanted, got {scores.shape} and {[c.shape for c in columns]}")
    if any(((c < 0) | (c >= scores.shape[1])).any() for c in columns):
        raise ValueError(f"a column is outside the gallery of {scores.shape[1]}")
    if excluded is not None and (columns[0] == columns[1]).any():
        raise ValueError(f"query {np.flatnonzero(columns[0] == columns[1])[0]}: the target is excluded from its own ranking")
    queries = np.arange(len(scores))
    ahead = ~(scores < scores[queries, target][:, None])  # [N,G], true for ties and NaN as well
    for column in columns:
        ahead[queries, column] = False
    return 1 + ahead.sum(axis=1)


def best_ranks(scores, right):
    """Where the best of several right columns stands: scores [N,G], right [N,G] bool -> [N], from 1; ties and NaN as above. ValueError:
    shapes; a row without a right column."""
    scores, right = np.asarray(scores), np.asarray(right, bool)
    if scores.ndim != 2 or scores.shape != right.shape or not right.any(axis=1).all():
        raise ValueError(f"scores {scores.shape} and right {right.shape}: both [N,G], with a right column in every row")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + (~right & ~(scores < best)).sum(axis=1)


def subset_ranks(scores, target, excluded, members):
    """target_ranks among the members [N,M] of each query's image set. ValueError: target or excluded not there just once."""
    members, places = np.asarray(members), []
    for column in (target, excluded):
        found = members == np.asarray(column)[:, None]  # [N,M]
        if (found.sum(axis=1) != 1).any():
            raise ValueError(f"query {np.flatnonzero(found.sum(axis=1) != 1)[0]}: target and reference belong once in its set")
        places.append(found.argmax(axis=1))
    return target_ranks(np.take_along_axis(np.asarray(scores), members, axis=1), *places)


def recall_at(ranks, k):
    """Percent of the ranks that are at most k. ValueError: no ranks."""
    if not len(ranks):
        raise ValueError("recall of no queries")
    return 100 * float(np.mean(np.asarray(ranks) <= k))


def cirr_scores(scores, target, reference, members):
    """CIRR's recalls in percent. scores [N,G] over the whole split; target, reference [N] and members [N,6] are columns.

    The reference is left out of both rankings; Rs@K ranks the other five members. mean: of R@5 and Rs@1, as papers rank.
    """
    ranks, inner = target_ranks(scores, target, reference), subset_ranks(scores, target, reference, members)
    found = {f"R@{k}": recall_at(ranks, k) for k in (1, 5, 10, 50)} | {f"Rs@{k}": recall_at(inner, k) for k in (1, 2, 3)}
    return found | {"mean": (found["R@5"] + found["Rs@1"]) / 2}


def fashioniq_scores(scores, target):
    """FashionIQ's recalls in percent over one category's gallery, from which the reference is NOT removed."""
    ranks = target_ranks(scores, target)
    found = {f"R@{k}": recall_at(ranks, k) for k in (10, 50)}
    return found | {"mean": (found["R@10"] + found["R@50"]) / 2}


def average_precision(scores, right, ks=(5, 10, 25, 50)):
    """AP@k in percent of each query with several right answers -> {k: [N]}. scores [N,G], right [N,G] bool.

    The sum over the places up to k that hold a right answer of the precision there, over min(k, number of right answers): CIRCO's
    (Baldrati et al. 2023, "Zero-shot composed image retrieval with textual inversion", equation 7). Ties with a right answer and NaN
    stand before it, as in target_ranks. ValueError: a query without a right answer."""
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    if scores.shape != right.shape or not right.any(axis=1).all():
        raise ValueError(f"scores {scores.shape} and right {right.shape}: alike, with a right answer in every row")
    found = {k: np.zeros(len(scores)) for k in ks}
    for n, (row, own) in enumerate(zip(scores, right)):
        best = np.sort(np.nan_to_num(row[own], nan=-np.inf))[::-1]  # [R] the right answers, best first
        count = np.arange(1, len(best) + 1)
        place = count + (~(row[~own] < best[:, None])).sum(axis=1)  # [R] where they stand
        for k in ks:
            found[k][n] = 100 * (count / place)[place <= k].sum() / min(k, len(best))
    return found


def circo_scores(scores, right, target):
    """CIRCO's mAP@k over all right answers and R@k of the one that the sentence was written for, in percent. The reference is not left
    out. scores [N,G], right [N,G] bool, target [N] columns. mean: mAP@10, which papers rank by."""
    found = {f"mAP@{k}": float(values.mean()) for k, values in average_precision(scores, right).items()}
    ranks = target_ranks(scores, target)
    return found | {f"R@{k}": recall_at(ranks, k) for k in (5, 10, 25, 50)} | {"mean": found["mAP@10"]}


def circo_chance(gallery, counts):
    """circo_scores of a random ranking of `gallery` pictures; counts: right answers of each query."""
    places = np.arange(1, min(50, gallery) + 1)
    found = {}
    for k in (5, 10, 25, 50):
        at = places[:k]  # a right answer stands there with R / G, and R - 1 others are spread evenly over the other places
        each = [r / gallery * ((1 + (at - 1) * (r - 1) / max(1, gallery - 1)) / at).sum() / min(k, r) for r in counts]
        found[f"mAP@{k}"] = 100 * float(np.mean(each))
    return found | {f"R@{k}": 100 * min(1.0, k / gallery) for k in (5, 10, 25, 50)} | {"mean": found["mAP@10"]}


def chance_level(gallery, members=None):
    """The scores of a random ranking of `gallery` pictures: cirr_scores' where members (6) is given, else fashioniq_scores'."""
    def recall(k, candidates):
        return 100 * min(1.0, k / candidates)

    if members is None:
        found = {f"R@{k}": recall(k, gallery) for k in (10, 50)}
        return found | {"mean": (found["R@10"] + found["R@50"]) / 2}
    found = {f"R@{k}": recall(k, gallery - 1) for k in (1, 5, 10, 50)}
    found |= {f"Rs@{k}": recall(k, members - 1) for k in (1, 2, 3)}
    return found | {"mean": (found["R@5"] + found["Rs@1"]) / 2}


def retrieval_scores(t2i, i2t, owner):
    """Recall@1, 5, 10 in percent both ways, and their mean. t2i [T,G], i2t [G,T] scores, owner [T] = the image of each text."""
    owner = np.asarray(owner)
    ranks = {"i2t": best_ranks(i2t, owner[None] == np.arange(len(i2t))[:, None]), "t2i": target_ranks(t2i, owner)}
    scores = {f"{side} R@{k}": recall_at(ranks[side], k) for side in ranks for k in (1, 5, 10)}
    return scores | {"mean": float(np.mean(list(scores.values())))}


def retrieval_chance(owner):
    """The retrieval_scores that a random ranking is expected to have. owner [T] = the image of each text.

    Of an image with m of the T texts none is among the first k with probability C(T-m,k) / C(T,k)."""
    owned, T = np.unique(np.asarray(owner), return_counts=True)[1], len(owner)
    scores = {f"i2t R@{k}": 100 * float(np.mean([1 - math.comb(T - m, k) / math.comb(T, k) for m in owned.tolist()])) if k < T else 100.0
              for k in (1, 5, 10)}
    scores |= {f"t2i R@{k}": 100 * min(1.0, k / len(owned)) for k in (1, 5, 10)}
    return scores | {"mean": float(np.mean(list(scores.values())))}


# --------------------------------------------------------------------------- intervals

RESAMPLES = 1000


class Estimate(NamedTuple):
    """A mean with the ends of its 95 % interval, which are None where there is but one picture."""
    value: float
    low: float | None
    high: float | None

    def __format__(self, form):
        """f"{estimate:.1f}" is "74.3 [71.2, 77.0]"; f"{estimate:+.1f}" shows the signs."""
        form = form or ".1f"
        return format(self.value, form) + ("" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]")


def resampled_means(values, units, resamples=RESAMPLES, seed=0):
    """Means of values [N,K] over draws of units with replacement -> [resamples,K]; all rows of a drawn unit come along.

    units: N names, the pictures. All columns share the draws, so that a difference of two is paired. NaN where there is but one
    unit, whose draws are all the same. (The bootstrap of clusters: Efron 1979; Davison & Hinkley 1997, section 3.8.)"""
    values, place = np.asarray(values, float), {name: number for number, name in enumerate(sorted(set(units)))}
    if len(place) == 1:
        return np.full((resamples, values.shape[1]), np.nan)
    sums = np.zeros((len(place), values.shape[1] + 1))  # the last column: how many rows
    np.add.at(sums, [place[name] for name in units], np.column_stack([values, np.ones(len(values))]))
    rng, count = np.random.default_rng(seed), len(place)
    drawn = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) @ sums for _ in range(resamples)])
    return drawn[:, :-1] / drawn[:, -1:]


def estimate(values, units, resamples=RESAMPLES, seed=0):
    """The mean of values [N], or [N,S] of S seeds of training, with its 95 % percentile interval -> Estimate.

    units: N names, the pictures: what is asked about one picture is not independent. Pictures and seeds are drawn with replacement,
    independently of each other (Owen 2007, "The pigeonhole bootstrap"). Of S seeds S - 1 are drawn: S draws of so few have a
    variance that is too small by (S - 1) / S (Rao & Wu 1988). Of one seed the interval says nothing of what another would change.
    ValueError: no values, or not one unit for each."""
    values, units = np.asarray(values, float), list(units)
    if not len(values) or len(values) != len(units):
        raise ValueError(f"{len(values)} values of {len(units)} units")
    values = values.reshape(len(values), -1)  # [N,S]
    means, seeds = resampled_means(values, units, resamples, seed), values.shape[1]  # [R,S]
    if seeds > 1:
        drawn = np.random.default_rng([seed, seeds]).integers(0, seeds, (resamples, seeds - 1))
        means = np.take_along_axis(means, drawn, axis=1)  # [R,S-1]
    ends = np.percentile(means.mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), *([None, None] if np.isnan(ends).any() else ends.tolist()))


def paired_difference(ours, theirs, units, resamples=RESAMPLES, seed=0):
    """estimate of ours minus theirs, row by row and seed by seed: both [N] or [N,S], or one [N] against all S seeds of the other.

    A difference whose interval holds 0 is not shown. ValueError: other numbers of rows or of seeds."""
    ours, theirs = (np.asarray(side, float).reshape(len(side), -1) for side in (ours, theirs))  # [N,S]
    if len(ours) != len(theirs) or (ours.shape[1] != theirs.shape[1] and 1 not in (ours.shape[1], theirs.shape[1])):
        raise ValueError(f"{ours.shape} against {theirs.shape} (rows, seeds): no pairs")
    return estimate(ours - theirs, units, resamples, seed)


# --------------------------------------------------------------------------- command line


PLAIN_FORMS = ("captions by file name", "rows of image_id and caption", "COCO's annotations")  # that need no word


def _by_keys(entries):
    """The captions under each kind of key that tells the pictures apart: id, file with its folders, file, the number in COCO's names."""
    kinds = (lambda e: e.ident, lambda e: e.name, lambda e: re.split(r"[\\/]", e.name)[-1],
             lambda e: (re.findall(r"COCO_[a-z]+[0-9]+_0*([0-9]+)\.", e.name) or [""])[0])
    tables = [{kind(entry): list(entry.captions) for entry in entries} for kind in kinds]
    return [table for table in tables if len(table) == len(entries) and (table is tables[1] or "" not in table)]


def read_pair(references_path, predictions_path, encoding="utf-8", subset=False):
    """({image: caption}, {image: [captions]}, notes) of two files for data.captions.read_entries, over the same images; they may go
    by ids in one and by file names in the other. subset: only the images of the predictions. DataError: not one prediction for each
    image."""
    from data.captions import grouped, read_entries  # not above: it needs torch
    form, entries = read_entries(references_path, encoding)
    references, predictions = _by_keys(grouped(entries)), _by_keys(grouped(read_entries(predictions_path, encoding)[1]))
    pairs = [(ours, theirs) for ours in predictions for theirs in references]
    predictions, references = next((pair for pair in pairs if pair[0].keys() & pair[1].keys()), pairs[0])
    for image, captions in predictions.items():
        if len(captions) != 1:
            raise DataError(f"{predictions_path}: {len(captions)} captions for image {excerpt(image)}: give exactly one")
    predictions = {image: captions[0] for image, captions in predictions.items()}
    notes = [] if form in PLAIN_FORMS else [f"references: {form}"]
    if subset:
        notes.append(f"--subset: {len(predictions)} of {len(references)} images of {references_path} are scored")
        references = {image: references[image] for image in predictions if image in references}
    try:
        paired(predictions, references)
    except ValueError as error:
        lacks = "; --subset scores those that the predictions have" if str(error).startswith("no caption for") else ""
        raise DataError(f"{predictions_path} against {references_path}: {error}{lacks}") from None
    return predictions, references, notes


def _notes(corpus, references):
    """What must be said beside the figures."""
    notes = []
    if in_characters(text for texts in references.values() for text in texts):
        notes.append(IN_CHARACTERS)
    if corpus["CIDEr-D"] is None:
        notes.append("CIDEr-D has no meaning for one image (every word weighs ln 1 = 0): score more images")
    if "METEOR" not in corpus:
        notes.append("METEOR (no WordNet) counts no synonyms, so it is not comparable with METEOR: for that, run "
                     "python -m nltk.downloader wordnet")
    return notes


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="BLEU-1..4, METEOR (NLTK), ROUGE-L and CIDEr-D of captions.",
        epilog="Both files are JSON: {image: [captions]}, {image: caption}, or COCO's annotation and result files, or in another "
               "layout of data/README.md. Both must hold the same images, predictions one caption for each.")
    parser.add_argument("--references", required=True, metavar="FILE", help="human captions")
    parser.add_argument("--predictions", required=True, metavar="FILE", help="captions to score")
    parser.add_argument("--subset", action="store_true",
                        help="score only the images of the predictions; without it one that they lack is an error")
    parser.add_argument("--encoding", default="utf-8", help="of both files (default: utf-8)")
    parser.add_argument("--json", action="store_true", help="print a JSON object, which also has the scores of every image")
    parser.add_argument("--coco-meteor", action="store_true",
                        help="add METEOR 1.5, which papers report (needs Java and pycocoevalcap)")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    predictions, references, notes = read_pair(args.references, args.predictions, args.encoding, args.subset)
    scores = score_captions(predictions, references, with_coco_meteor=args.coco_meteor)
    corpus, notes = scores["corpus"], notes + _notes(scores["corpus"], references)
    if args.json:
        per_image = {image: dict(zip(scores["per_item"], values))
                     for image, values in zip(predictions, zip(*scores["per_item"].values()))}
        print(json.dumps({"images": len(predictions), "corpus": corpus, "notes": notes, "per_image": per_image}, indent=1))
        return
    print(f"{'images':20} {len(predictions):7}")
    for name, value in corpus.items():
        print(f"{name:20} {'-' if value is None else format(value, '.4f'):>7}")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
