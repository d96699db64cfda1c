"""gate_frames.py: what the gates do, by style, one frame an evaluation: gates.json of a run folder.

    gate_tensors, gate_rows      the gates of a batch
    gate_summary, summarize_gates    by style
    append_frame, read_frames    gates.json
"""

import json
import pathlib

import numpy as np
import torch

from engine import files
from engine.errors import DataError, said

FILE = "gates.json"  # in a run folder: a frame of gate_summary an evaluation


@torch.no_grad()
def gate_tensors(model, style_feature, input_ids, prompt_mask):
    """-> core.Gate of tensors [B,layers,heads]; a gate per channel as its mean over the channels of a head."""
    control = model.control(style_feature, input_ids, prompt_mask)
    by_layer = [gate(control) for gate in model.gates]

    def per_head(x, heads):  # [B,heads,1,1 or H/heads] or a plain number -> [B,heads]
        return (torch.as_tensor(x).float().cpu() * torch.ones(len(control), heads, 1, 1)).mean((2, 3))

    def stacked(name):
        return torch.stack([per_head(getattr(found, name), gate.heads) for found, gate in zip(by_layer, model.gates)], 1)

    return by_layer[0]._make(stacked(name) for name in by_layer[0]._fields)


def gate_rows(model, style_feature, input_ids, prompt_mask):
    """Key and value scales of a batch -> list of B nested lists [2][layers][heads]: what evaluate keeps of each row."""
    found = gate_tensors(model, style_feature, input_ids, prompt_mask)
    return torch.stack([found.key, found.value], 1).tolist()


def gate_summary(gates, styles, layers):
    """Mean and spread of the gates by style, as plain values for gates.json.

    gates: [rows][2][layers][heads] of gate_rows; styles: the style of each row; layers: their numbers (qformer.cross_layers).
    -> {"layers": [...], "styles": {style: {"n": rows, "key" and "value": {"mean", "std"}, each [layers][heads]}}}; the
    spread is that between the style's own rows (divided by n), 0 for one row. Rows without a style count as "(none)"."""
    values = np.asarray(gates, dtype=np.float64)  # [rows,2,layers,heads]
    names = np.array([style.strip() or "(none)" for style in styles])
    summary = {}
    for name in sorted(set(names.tolist())):
        own = values[names == name]
        summary[name] = {"n": len(own), **{part: {"mean": own[:, i].mean(0).tolist(), "std": own[:, i].std(0).tolist()}
                                           for i, part in enumerate(("key", "value"))}}
    return {"layers": list(layers), "styles": summary}


def summarize_gates(model, results, questions):
    """gate_summary of the results of evaluation.evaluate(gates=True) for the rows `questions`; None without gates."""
    if model.gates is None:
        return None
    return gate_summary([one["gates"] for one in results], [questions[one["row"]].style for one in results], model.qformer.cross_layers)


def read_frames(path):
    """The frames of a gates.json, [] where there is none. DataError: another file."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    try:
        frames = json.loads(path.read_text(encoding="utf-8"))["frames"]
        for frame in frames:
            check_frame(frame)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a {FILE} of this project ({said(error)}): move it away, it is only "
                        "drawn from") from None
    return frames


def check_frame(frame):
    """An error of some kind where a frame is not as append_frame makes it."""
    int(frame["step"])
    for found in frame["styles"].values():
        for part in ("key", "value"):
            for kind in ("mean", "std"):
                shape = np.asarray(found[part][kind], dtype=float).shape
                if len(shape) != 2 or shape[0] != len(frame["layers"]):
                    raise ValueError(f"{part} {kind} is of shape {shape}")


def append_frame(path, step, summary):
    """Add an evaluation's gate_summary after `step` optimizer steps to gates.json -> all frames, in order.

    Frames of this step and later ones are dropped: after --resume they come again."""
    frames = [frame for frame in read_frames(path) if frame["step"] < step] + [{"step": step, **summary}]
    with files.whole_file(path) as file:
        json.dump({"frames": frames}, file)
    return frames
