"""given.py: what the model's functions are given from Python, checked before anything is computed: ValueError says what is wanted.

    asked                              questions, contexts, features: what was given once stands for all others
    features, texts, whole_from_one, search, one_source
"""

from numbers import Integral

import torch


def asked(questions, contexts, image_embeds, style_feature, widths, needs_style):
    """-> (B questions, B contexts or None, image_embeds [B,P,W], style_feature [B,F] or None).

    A text alone is one question. widths: (W, F) of the model, F None where it has no style classifier. needs_style: are there gates
    that read a style feature? ValueError: numbers that do not go together, a thing of another kind."""
    questions, contexts = ([given] if isinstance(given, str) else given for given in (questions, contexts))
    questions, contexts = texts(questions, "questions"), contexts if contexts is None else texts(contexts, "contexts")
    features(image_embeds, widths[0])
    if needs_style and style_feature is None:
        raise ValueError("the gates need style_feature [B,F] too: image_features gives it beside image_embeds")
    if style_feature is not None and widths[1] and tuple(getattr(style_feature, "shape", ())[1:]) != widths[1:]:
        raise ValueError(f"style_feature must be [B,{widths[1]}], as image_features gives it, got {kind(style_feature)}")
    counts = {"pictures": len(image_embeds), "questions": len(questions), "contexts": len(contexts or [""])}
    B = max(counts.values())
    if set(counts.values()) - {1, B} or (style_feature is not None and len(style_feature) != len(image_embeds)):
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if what != "contexts" or contexts)
        raise ValueError(f"{told}: as many of each are wanted, or a single one for all others (of style features as of pictures)")
    return tuple(x * B if isinstance(x, list) and len(x) == 1 else x.expand(B, *x.shape[1:]) if isinstance(x, torch.Tensor) else x
                 for x in (questions, contexts, image_embeds, style_feature))


def features(image_embeds, W):
    """ValueError where these are not features [B,P,W] of pictures."""
    if not isinstance(image_embeds, torch.Tensor) or image_embeds.ndim != 3 or image_embeds.shape[2] != W:
        raise ValueError(f"image_embeds must be [B,P,{W}], as image_features gives them, got {kind(image_embeds)}")


def texts(given, name):
    """A list of texts, at least one. A text alone would be taken letter by letter."""
    if isinstance(given, (list, tuple)) and given and all(isinstance(text, str) for text in given):
        return list(given)
    raise ValueError(f"{name} must be a list of texts, at least one, got {given!r:.60}")


def whole_from_one(**numbers):
    """ValueError where one of these is no whole number from 1 on."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, got {number!r:.60}")


def one_source(images, image_embeds, style_feature=None):
    """ValueError where there are pictures and features too: one of them would be left out without a word."""
    if images is not None and (image_embeds is not None or style_feature is not None):
        raise ValueError("give pictures or what image_features made of them (image_embeds, style_feature), and not both: "
                         "one would be left out")


def search(method, answers, best, **numbers):
    """ValueError where the settings of predict_answers do not go together. numbers: those that are 1 at least."""
    if method not in ("generate", "rank"):
        raise ValueError(f"method must be generate or rank, got {method!r}")
    whole_from_one(**numbers, best=1 if best is None else best)
    if method == "generate" and answers is not None:
        raise ValueError('answers are a list to choose from, for method="rank"; method="generate" would not look at them')
    if method == "rank" and best is not None:
        raise ValueError('best is of the beams of method="generate": score_answers gives what method="rank" makes of every answer')
    if best is not None and best > numbers["beams"]:
        raise ValueError(f"best={best} of beams={numbers['beams']}: as many beams are wanted at least")


def kind(thing):
    """What a thing is, in a few words."""
    return f"a tensor {list(thing.shape)}" if isinstance(thing, torch.Tensor) else type(thing).__name__
