"""questions.py: questions about paintings: the rows of a split with style and context, and the data set they become."""

import os
import pathlib
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from data import rows
from engine.errors import DataError


def read_questions(place, split, columns=(), images=None, encoding="utf-8", separator=None, style="column", semart=None,
                   context=None, val_share=0.0, skip_bad=0.0, workers=2, log=print):
    """Rows of a split, bad ones refused; with skip_bad (a share) left out and listed, after every picture has been decoded once.

    place: a folder, a file, a pandas DataFrame or a list of dicts; columns: texts NAME=COLUMN; style, semart, context: as
    train_gated.py's flags have it; val_share: of the pictures, held out as val where `place` is one table (0: the split is the whole
    table). DataError: another split than train and val of such a table."""
    columns = dict(pair.partition("=")[::2] for pair in columns)
    context = None if context == "efficientnet" else context  # put in later, as a style that is predicted
    if context and not semart:
        columns["context"] = context
    read, understood = rows.read_layout(place, split, columns, images, encoding, separator)
    log(f"{split}: {understood}")
    one_table = rows.is_frame(place) or os.path.isfile(place)
    if one_table and val_share and split not in ("train", "val"):
        name = rows.FRAME if rows.is_frame(place) else place
        raise DataError(f"{name} is one table, of which {val_share:.0%} of the pictures are held out as val and the others are "
                        f"trained on: there is no {split} in it: take val (--split val), or give --data with rows of their own")

    def say(line):
        log(f"{split}: {line}")

    if one_table and val_share:
        read = rows.hold_out(read, val_share, split == "val", say)
        log(f"{split}: one table for both: {len(read)} rows, {val_share:.0%} of the pictures are held out for validation")
    read = rows.unify_spelling(add_style_and_context(read, split, style, semart, context, log), log=say)
    read = rows.unify_spelling(read, log=say, field="question_type")
    broken = rows.verify_images(read, max(1, workers)) if skip_bad else []
    good, bad = rows.usable_rows(read, skip_bad, broken)
    for row, reason in bad:
        log(f"left out: {row.file}, {rows.locate(row.file, row.line)}: {reason}")
    if bad:
        log(f"{split}: {len(bad)} of {len(read)} rows left out ({len(bad) / len(read):.1%})")
    return good


def add_style_and_context(read, split, style, semart, context, log):
    """The rows with style and context from where --style and --context say."""
    if style == "none":
        read = [replace(row, style="") for row in read]
    fields = {"style": style} if style not in ("column", "efficientnet", "none") else {}
    if context and semart:
        fields["context"] = context
    if fields and not semart:
        raise DataError(f"--style {style} is a column of SemArt's table: pass --semart, or one of column, efficientnet, none")
    if not fields:
        return read
    place = pathlib.Path(semart)
    table = place / f"semart_{split}.csv" if place.is_dir() else place
    read, matched = rows.join_semart(read, table, fields, log=lambda line: log(f"{split}: {line}"))
    log(f"{split}: {', '.join(f'{name} from {column}' for name, column in fields.items())} of {table}, "
        f"{matched} of {len(read)} rows")
    return read


class Questions(Dataset):
    """Number, or (epoch, number) in training -> ({"images": tensor [3,s,s] in BLIP's normalisation}, Row), or (the DataError of a
    broken picture, Row).

    The error is handed on and not raised: one that comes out of a loader process would keep the others from ending.
    features: None, or {path: {"image_embeds": [P,W], "style_feature": [F]}} of a cache, taken in place of the pictures. seed: of the
    answer that an epoch draws where people gave several; None, and without an epoch: the row as it is, with the commonest.
    """

    def __init__(self, questions, image_size, features=None, seed=None):
        self.rows, self.image_size, self.features, self.seed = questions, image_size, features, seed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        epoch, number = index if isinstance(index, tuple) else (None, index)
        row = self.rows[number]
        if epoch is not None and self.seed is not None:
            row = rows.draw_answer(row, self.seed, epoch, number)
        try:
            if self.features is not None:
                return self.features[row.image], row
            return {"images": rows.picture_tensor(row.image, self.image_size)}, row
        except DataError as error:
            return error, row


class OtherStyle(Questions):
    """Questions whose style classifier looks at another picture: {"images", "style_images"}, each [3,s,s].

    Every picture gets one partner, drawn from the seed, never itself (where there are two)."""

    def __init__(self, questions, image_size, features=None, seed=0):
        super().__init__(questions, image_size, features)
        paths = sorted({row.image for row in questions})
        order = np.random.default_rng(seed).permutation(len(paths))
        self.partner = {paths[i]: paths[j] for i, j in zip(order, np.roll(order, 1))}

    def __getitem__(self, index):
        sample, row = super().__getitem__(index)
        if isinstance(sample, DataError):
            return sample, row
        other = self.partner[row.image]
        try:
            if self.features is not None:
                return {**sample, "style_feature": self.features[other]["style_feature"]}, row
            return {**sample, "style_images": rows.picture_tensor(other, self.image_size)}, row
        except DataError as error:
            return error, row
