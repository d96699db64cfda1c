"""pytest tests/engine/test_text.py: ids back into text. The texts wanted here stand letter by letter: the same with every version of
transformers. Behaviour-checked; the captions of ../shared/data, where they are, come back so that their scores are 1."""

import json
import os
import pathlib
import unicodedata

import pytest
import torch

import metrics
from conftest import ROOT
from engine import prompts, published, text
from engine.errors import DataError

SHARED = pathlib.Path(os.environ.get("SHARED_DATA") or ROOT / "../shared/data")
WRITTEN = ["a dog's bowl", "a man in a t-shirt", "black-and-white", "they don't, we're not", "the dogs' bowl", "a 'stop' sign", "3.5 m",
           "1,000", "at 5:30", "in 23, 1555", "the u.s. flag", "st. john", 'he said "no"!', "what's (really) up...", "$5 or 50%", "and/or",
           "o'clock", "trompe l'oeil of d'este", "ends in -", "- starts", "red; blue: green", "a & b", "", "狗和猫",
           "一只狗，在水。", "の猫"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A BERT tokenizer that has letters, digits, marks, and a few words and characters."""
    place = tmp_path_factory.mktemp("bert")
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters if c.isalnum()),
             *"狗和猫一只在水，。の", "##猫"]
    (place / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return published.load_tokenizer(str(place))


@pytest.mark.parametrize("written", WRITTEN)
def test_word_pieces_are_joined_as_one_writes(pieces, written):
    ids = pieces(written).input_ids
    assert pieces.unk_token_id not in ids
    assert text.text_of(pieces, ids) == written
    assert text.texts_of(pieces, torch.tensor([ids + [pieces.pad_token_id] * 3] * 2)) == [written] * 2


def test_the_characters_that_are_joined_are_those_that_count_as_tokens():
    """Every kana and Chinese character, for the tokenizer of captions and for the text of word pieces alike."""
    kinds = ("HIRAGANA LETTER", "KATAKANA LETTER", "CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")
    every = map(chr, (*range(0x3000, 0x10000), *range(0x20000, 0x33000)))
    letters = [letter for letter in every if unicodedata.name(letter, "").startswith(kinds)]
    assert len(letters) > 90_000
    for letter in (*letters[:300], *letters[300::50], letters[-1]):
        assert text.join_words([letter, letter]) == letter * 2 and metrics.tokenize(letter * 2) == f"{letter} {letter}"
    assert text.join_words(["\u732b", "\u3002"]) == "\u732b\u3002" and metrics.tokenize("\u732b\u3002") == "\u732b"
    assert text.join_words(["\u0e01", "\u0e01"]) == "\u0e01 \u0e01" and metrics.tokenize("\u0e01" * 2) == "\u0e01 \u0e01"  # Thai


@pytest.mark.parametrize("written, words", [
    ("a dog's bowl , x-ray", ["a", "dog's", "bowl", ",", "x-ray"]), ("", []), ("\tone \n two", ["one", "two"]),
    ("一只“红色”的狗，在跑。", ["一", "只“", "红", "色”", "的", "狗，", "在", "跑。"]), ("猫が走る", list("猫が走る")),
    ("สวัสดี", ["ส", "วั", "ส", "ดี"]), ("一只dog，在 x-ray 里", ["一", "只", "dog，", "在", "x-ray", "里"]),
    ("한국어 낱말", ["한국어", "낱말"])])
def test_words_are_counted_and_cut_as_the_scores_take_them(written, words):
    assert text.words_of(written) == words
    if words and "," not in words:  # a mark by itself is a word where blanks part it, and no token
        assert len(metrics.tokenize(written).split()) == len(words)
    for count in range(len(words) + 2):
        assert text.words_of(text.first_words(written, count)) == words[:count] and written.startswith(text.first_words(written, count))
    unit = text.unit_of(["a dog", written])
    assert unit == ("words" if unit == "words" else "words (characters where no blanks part them)")
    assert (unit == "words") is (words == written.split())


def test_special_tokens_are_shown_where_asked_and_unknown_ids_give_nothing(pieces):
    ids = pieces("a dog's").input_ids
    assert text.text_of(pieces, ids, special=True) == "[CLS] a dog's [SEP]"
    assert text.text_of(pieces, pieces("狗").input_ids, special=True) == "[CLS] 狗 [SEP]"
    assert text.text_of(pieces, [len(pieces), *ids[1:], len(pieces) + 1]) == "a dog's"  # [DEC] of BLIP


@pytest.mark.parametrize("written", ["Poussin 's", "st . john", "a dog ' s bowl", " t - shirt , do n't", "naïve Café", "鹳鸟踟蹰",
                                     "\t odd  spaces\n"])
def test_byte_tokens_give_their_bytes(build, written):
    tokenizer = build(gating="none").tokenizer
    assert text.text_of(tokenizer, tokenizer(written).input_ids) == written


def test_an_answer_is_read_as_its_tokens_say(build, batch, monkeypatch):
    """The library's clean-up would join "Poussin 's"."""
    model = build(gating="none")
    ids = torch.tensor([model.tokenizer(" Poussin 's st . john\nmore", add_special_tokens=False).input_ids])
    monkeypatch.setattr(type(model.decoder), "generate", lambda self, *asked: ids)
    model.tokenizer.clean_up_tokenization_spaces = True
    assert model.predict_answers(batch["images"][:1], ["Who?"]) == ["Poussin 's st . john"]


@pytest.mark.parametrize("file", ["flickr8k_mini/references.json", "deepfashion_captions/test_captions.json"])
def test_a_caption_said_word_for_word_scores_one(file, tmp_path):
    if not (SHARED / file).is_file():
        pytest.skip("no ../shared/data")
    (tmp_path / "vocab.txt").write_bytes((SHARED / "tokenizers/bert_base_uncased/vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    tokenizer = published.load_tokenizer(str(tmp_path))
    table = json.loads((SHARED / file).read_text(encoding="utf-8")).values()
    captions = [one for found in table for one in ([found] if isinstance(found, str) else found)]
    said = text.texts_of(tokenizer, tokenizer(captions).input_ids)
    wrong = [(caption, own) for caption, own in zip(captions, said)
             if metrics.rouge_l(metrics.tokenize(own), [metrics.tokenize(caption)]) < 0.9999]
    assert len(captions) > 2000 and not wrong, wrong[:5]
    assert all(own == " ".join(own.split()) for own in said)


def test_a_tokenizer_without_an_end_of_line_is_one_line(pieces):
    """What ends an answer; BERT's knows no such token, nor does a language model's without the newline among its words."""
    with pytest.raises(DataError, match="no token for the end of a line.*give a BLIP-2"):
        prompts.newline_id(pieces)
