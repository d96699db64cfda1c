"""text.py: token ids back into text, the one way for all stages and the same with every version of transformers.

    text_of, texts_of    ids -> text
    join_words           words and marks as BERT's tokenizer parts them -> text as one writes it
    words_of, first_words, unit_of   words as they are counted and cut: characters in scripts without blanks

The library's own decode() parts or joins marks differently from version to version, and a best.pt is chosen by such texts.
"""

import itertools
import re

_QUOTES = "\"'"
_LEFT = ".,:;?!%)]}\u2019\u201d\u2026"  # marks that stand behind a word,
_RIGHT = "([{$#\u2018\u201c"  # before one,
_INNER = "-/_\u2013"  # within one: t-shirt, and/or
_CLITICS = ("s", "t", "m", "d", "re", "ve", "ll")
_ELIDED = ("d", "l", "o", "y")  # d'este, trompe l'oeil, o'clock, y'all
# inside a [] of a regular expression: kana and Chinese characters, which stand without blanks between words, and their marks
CHARACTERS = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTER = re.compile(f"[{CHARACTERS}\u3001-\u303f\uff01-\uff65]")
MARKS = ("\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"  # vowels and tones of Thai and Lao,
         "\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u17dd")  # Burmese and Khmer
# of scripts that set no blanks between words: kana and Chinese characters; Thai, Lao, Burmese and Khmer letters with their marks,
# which BERT's pieces leave as they are written
UNSPACED = re.compile(f"[{CHARACTERS}]"
                      f"|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff][{MARKS}]*")
# one of them with the marks at it, or a word up to the next of them
_WORD = re.compile(rf"[^\w\s]*(?:{UNSPACED.pattern})[^\w\s]*|(?:(?!{UNSPACED.pattern})\S)+")


def texts_of(tokenizer, rows):
    """Rows of ids [B,L], a tensor or lists -> B texts, without special tokens."""
    return [text_of(tokenizer, ids) for ids in rows]


def text_of(tokenizer, ids, special=False):
    """Ids [L] -> text. Byte-level tokens (OPT's) give their bytes and nothing else; word pieces (BERT's) are joined.

    special: [CLS] and the like are shown. Ids that the tokenizer does not know, as [DEC] of BLIP, give nothing."""
    ids = [int(number) for number in ids]
    if type(tokenizer.backend_tokenizer.model).__name__ != "WordPiece":
        return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    hidden, words = () if special else set(tokenizer.all_special_ids), []
    for token in tokenizer.convert_ids_to_tokens([number for number in ids if number not in hidden]):
        if token is None:
            continue
        if token.startswith("##") and words:
            words[-1] += token[2:]
        else:
            words.append(token)
    return join_words(words)


def join_words(words):
    """Words and marks, each mark a word of its own -> the text as one writes it: a dog's bowl, t-shirt, "no", 3.5, u.s.

    What the tokenizer has forgotten is guessed by what captions have most: a hyphen between words stands without blanks."""
    text, glue, opened = "", True, set()  # glue: the next word follows without a blank
    for place, word in enumerate(words):
        attached, glues = _sides(word, words[:place][-1:], words[place + 1:], opened)
        text += word if glue or attached else " " + word
        glue = glues
    return text


def _sides(word, before, rest, opened):
    """Does a word stand without a blank behind the one before, and without one before the next? -> (bool, bool)

    before: list of the word before or of none; rest: the words that follow; opened: the quotes that are open, kept up to date."""
    before, after = (before or [""])[0], (rest or [""])[0]
    inside = _is_word(before) and _is_word(after)
    if word in _QUOTES:
        if word == "'" and inside and (after in _CLITICS or before in _ELIDED):
            return True, True
        if word in opened or (word == "'" and before.endswith("s") and "'" not in rest):  # the dogs' bowl
            opened.discard(word)
            return True, False
        opened.add(word)
        return False, True
    if word in _INNER:
        return inside, inside
    if before.isdigit() and after.isdigit() and (word == "." or (word, len(after)) in ((",", 3), (":", 2))):  # 3.5, 1,000, 5:30
        return True, True
    if word == "." and len(before) == len(after) == 1 and inside and rest[1:2] == ["."]:  # u.s.
        return True, True
    return word in _LEFT or _joins_characters(before, word), word in _RIGHT


def _is_word(text):
    return text[-1:].isalnum()


def _joins_characters(before, word):
    """Is one of them Chinese or Japanese, and none a special token, [CLS]?"""
    return bool(_CHARACTER.match(before[-1:]) or _CHARACTER.match(word)) and not (before + word).endswith("]") and before[-1:] != "]"


# --- words, counted and cut ------------

def words_of(text):
    """Text -> the list of its words: what blanks part, and each character with its marks in scripts without blanks, where the caption
    scores take characters, too."""
    return _WORD.findall(text) if UNSPACED.search(text) else text.split()


def first_words(text, count):
    """A text up to the end of its first `count` words_of; nothing in it is changed."""
    found = list(itertools.islice(_WORD.finditer(text), count))
    return text[:found[-1].end()] if found else ""


def unit_of(texts):
    """What words_of counts in these texts, for a message."""
    return "words (characters where no blanks part them)" if any(UNSPACED.search(text) for text in texts) else "words"
