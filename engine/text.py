"""text.py: token ids back into text, the one way for all stages and the same with every version of transformers.

    text_of, texts_of    ids -> text
    join_words           words and marks as BERT's tokenizer parts them -> text as one writes it

The library's own decode() parts or joins marks differently from version to version, and a best.pt is chosen by such texts.
"""

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
