"""faithfulness.py: do the maps point at what the question is about? Each map against the known place of things in drawn scenes.

    python tools/faithfulness.py --pictures 100                        # of the tiny model as it ships
    python tools/faithfulness.py --checkpoint runs/demo/best.pt        # of a model that train_gated.py has trained
"""

import argparse
import math
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import numpy as np
import torch
from tqdm import tqdm

import core
import eval_gated
from data import rows
from engine import checkpoints, errors, flags, published, vision
from engine.errors import DataError
from show import maps
from tools import drawing

KINDS = ("what", "count", "colour")  # of questions about the things, as tools/drawing.py asks them


class Scene(NamedTuple):
    """A drawn picture whose things stand in a known place."""
    pixels: torch.Tensor  # [3,s,s], normalised
    cover: np.ndarray  # [side,side], share of each patch that the things cover
    question: str
    answer: str
    kind: str  # what, count or colour


def drawn_scene(index, size, side, seed=0):
    """A scene of tools/drawing.py, never one of the sample's or of the tiny model's training, with one question about its
    things; kinds of questions take turns."""
    rng = np.random.default_rng([seed, 99_000_000 + index])
    scene, style = drawing.random_scene(rng), list(drawing.STYLES)[index % len(drawing.STYLES)]
    picture = drawing.draw_scene(scene, style, size, seed=99_000_000 + index)
    things = drawing.thing_shapes(scene)
    mask = drawing.fill(things, side * 8, [255] * len(things), "L")  # [8*side,8*side], 1 on the things
    question, answer, kind = drawing.questions(scene, style, rng)[index % 3]
    return Scene(rows.image_tensor(picture, size), mask.reshape(side, 8, side, 8).mean((1, 3)), question, answer, kind)


def mass_inside(heat, cover):
    """Share of the map's positive part that lies on the things; nan where nothing is positive. heat, cover [side,side]."""
    positive = np.clip(heat, 0, None).astype(np.float64)
    return float((positive * cover).sum() / positive.sum()) if positive.any() else math.nan


def scene_maps(model, pixels, features, scene, sizes):
    """{name: [side,side]} of one scene: attention, attention x gradient, both kinds of occlusion with each window size."""
    asked, answer = (features, scene.question), scene.answer
    found = {"attention": maps.mean_map(maps.attention_maps(model, *asked))[0],
             "attention x gradient": maps.gradient_map(model, *asked, answer)}
    found |= {f"occlusion, cross-attention, {n} x {n}": maps.occlusion(model, *asked, answer, window=n) for n in sizes}
    return found | {f"occlusion, picture, {n} x {n}": maps.tower_occlusion(model, pixels, *asked, answer, window=n)
                    for n in sizes}


def faithfulness(model, pictures=100, sizes=(1, 2, 3), seed=0):
    """How much of each map lies on the things that the question is about -> one dict a map.

    The maps are of the right answer. inside: mean share of a map's positive part on the things; error: its standard error;
    chance: the things' share of the picture; elsewhere: the share of the same map on the things of the next picture, which a map
    that only likes the middle reaches as well; above: share of the pictures whose map is above their own chance; peak: how much
    of the map's highest patch is covered by things; n: pictures with anything positive; right, what, count, colour: inside over
    the pictures that the model answers right, and by kind of question."""
    _, side = vision.patch_grid(vision.token_count(model.vision_model))
    scenes = [drawn_scene(index, model.image_size, side, seed) for index in range(pictures)]
    by_map, right = {}, []
    for scene in tqdm(scenes, desc="maps", leave=False, mininterval=1, disable=None):
        pixels = scene.pixels[None].to(model.query_tokens.device)
        features = model.image_features(pixels)
        right += [model.predict_answers(None, [scene.question], **features) == [scene.answer]]
        for name, heat in scene_maps(model, pixels, features, scene, sizes).items():
            by_map.setdefault(name, []).append(heat)
    return [{"map": name, **shares(heats, scenes, np.array(right))} for name, heats in by_map.items()]


def shares(heats, scenes, right):
    """The numbers of faithfulness for one map of every scene. heats [side,side] each; right: bool [scenes]."""
    inside = np.array([mass_inside(heat, scene.cover) for heat, scene in zip(heats, scenes)])
    elsewhere = np.array([mass_inside(heat, scene.cover) for heat, scene in zip(heats, scenes[1:] + scenes[:1])])
    chance, kinds = np.array([scene.cover.mean() for scene in scenes]), np.array([scene.kind for scene in scenes])
    good = np.isfinite(inside)  # a map without anything positive points nowhere

    def mean(values, where):
        return float(values[good & where].mean()) if (good & where).any() else math.nan

    return {"n": int(good.sum()), "inside": mean(inside, True), "error": float(inside[good].std() / math.sqrt(max(1, good.sum()))),
            "chance": float(chance.mean()), "elsewhere": mean(elsewhere, True), "above": mean(inside > chance, True),
            "peak": float(np.mean([scene.cover.flat[heat.argmax()] for heat, scene in zip(heats, scenes)])),
            "right": mean(inside, right), **{kind: mean(inside, kinds == kind) for kind in KINDS}}


def print_faithfulness(table):
    """The rows of faithfulness as text."""
    columns = ("chance", "elsewhere", "above", "peak", "right", *KINDS)
    print(f"{'map':36}{'n':>5}{'inside':>16}" + "".join(f"{name:>10}" for name in columns))
    for row in table:
        print(f"{row['map']:36}{row['n']:>5}{row['inside']:>8.1%} ± {row['error']:>5.1%}"
              + "".join(f"{row[name]:>10.1%}" for name in columns))


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="DIR|FILE",
                        help="run folder of train_gated.py, or its best.pt (default: the tiny BLIP-2 as it ships)")
    parser.add_argument("--pictures", type=flags.positive, default=100, help="(default: 100)")
    parser.add_argument("--windows", type=flags.positive, nargs="+", default=[1, 2, 3],
                        help="patches on a side (default: 1 2 3)")
    parser.add_argument("--seed", type=flags.whole, default=0, help="of the scenes (default: 0)")
    return flags.parse_args(parser, argv)


def load(path):
    """The model of a best.pt, or without one the tiny BLIP-2, ungated and as it is."""
    if path is None:
        return core.Blip2OPTGated.build(published.tiny("blip2"), None, [], gating="none").eval()
    path, checkpoint = checkpoints.load_best(path, "gated", ("model_args", "state", "frozen"))
    model = eval_gated.load_model(eval_gated.get_args(["--checkpoint", path]), checkpoint, torch.float32)
    checkpoints.load_trainable(model, checkpoint["state"], path)
    return model.eval()


def main(argv=None):
    args = get_args(argv)
    model = load(args.checkpoint)
    side = vision.patch_grid(vision.token_count(model.vision_model))[1]
    if max(args.windows) > side:
        raise DataError(f"--windows {max(args.windows)}: this model has {side} patches on a side")
    print_faithfulness(faithfulness(model, args.pictures, args.windows, args.seed))


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
