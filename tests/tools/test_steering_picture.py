"""tools/steering.py, README's picture (behaviour): what each column is told, and the figure that is written."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import rows
from tools import steering


@pytest.fixture(name="paths")
def two_paintings(tmp_path):
    for name, colour in (("own", "orange"), ("other", "navy")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in ("own", "other")]


def test_columns_differ_in_what_the_classifier_sees_alone(build, paths):
    model, (own, other) = build().eval(), paths
    for gate in model.gates:
        for name in gate.learned:  # a fresh gate does nothing
            torch.nn.init.normal_(gate.get_submodule(name).weight, std=0.5)
    asked = []

    def predict(images, questions, image_embeds, style_feature, gated):
        asked.append((image_embeds, style_feature, gated))
        return ["Cubism"]

    model.predict_answers = predict
    closed, opened, as_if = steering.answers(model, own, [other], [steering.STYLE])
    seen = [model.image_features(rows.picture_tensor(path, model.image_size)[None]) for path in paths]
    for (embeds, style, gated), told, is_open in zip(asked, (seen[0], seen[0], seen[1]), (False, True, True)):
        assert gated is is_open
        assert torch.equal(embeds, seen[0]["image_embeds"]) and torch.equal(style, told["style_feature"])
    assert closed[1] is None and closed[3] is None and (opened[1], as_if[1]) == (own, other)
    assert opened[3].shape == (len(model.gates), model.gates[0].heads) and abs(opened[3] - as_if[3]).max() > 1e-3


def test_the_picture_is_written(paths, tmp_path):
    gates = np.linspace(0, 2, 6).reshape(2, 3)
    columns = [("gates closed", None, "Cubism", None, [("", 0.5)]), ("gates open", paths[0], "Cubism", gates, [("Pop Art", 0.9)])]
    steering.draw(tmp_path / "a.png", paths[0], ["Which style?"], columns)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 300
