"""drawing.py: what make_sample.py and make_tiny.py draw: an ArtQuest-like data set, simple scenes in eight painterly manners.

Every picture shows one to four things of one kind and one colour on a ground.
The manners differ in TEXTURE only: what is shown, where, and the mean and spread
of the colours do not depend on the manner.  Each picture comes with five questions:
what, how many, which colour, which style, and how the paint was put on.
"""
import csv
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from engine import files

VERSION = 2  # raise it whenever the same seed would give other pictures or questions
PICTURE_SIZE = 224
SPLITS = {"train": 0.70, "val": 0.15, "test": 0.15}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
COLOURS = {"red": (206, 44, 46), "orange": (238, 122, 24), "yellow": (247, 208, 44),
           "green": (44, 146, 72), "blue": (50, 110, 216), "purple": (152, 76, 192)}
NEUTRALS = {"cream": (248, 240, 222), "white": (250, 246, 236), "ink": (44, 38, 46),
            "bark": (98, 80, 68)}
NO_OUTLINE = ("shade", "shine", "white", "ink")  # small details drown in an outline
# sky, far ground, near ground, detail: muted, so that each colour stands out on each ground
GROUNDS = {"water": [(236, 226, 208), (184, 205, 210), (166, 191, 200), (214, 226, 226)],
           "meadow": [(226, 232, 232), (206, 212, 190), (216, 216, 176), (182, 190, 146)],
           "sand": [(214, 225, 232), (226, 210, 192), (238, 225, 207), (212, 190, 168)],
           "night": [(60, 66, 100), (50, 54, 80), (42, 45, 66), (216, 210, 190)]}
PLACES = {"water": ["on the water", "by the sea", "among the waves"],
          "meadow": ["in a meadow", "on the grass", "among the hills"],
          "sand": ["on the sand", "in the dunes", "on the beach"],
          "night": ["at night", "under the night sky", "in the moonlight"]}
TECHNIQUES = {"Pointillism": "in small dots", "Impressionism": "in short dabs",
              "Cubism": "in angular facets", "Pop Art": "in flat areas with thick outlines",
              "Color Field Painting": "in soft washes",
              "Expressionism": "in long swirling strokes",
              "Northern Renaissance": "in fine hatching",
              "Ukiyo-e": "in flat woodblock colours"}
# {thing} is the plural; no wording tells the count, the colour or the style
WORDINGS = {
    "what": ["What is in this painting?", "What does this painting show?",
             "What has been painted here?"],
    "count": ["How many {thing} are there?", "How many {thing} can be seen?",
              "What is the number of {thing}?"],
    "colour": ["What colour are the {thing}?", "Which colour was used for the {thing}?"],
    "style": ["In which style is this painted?", "Which style is this painting?",
              "What is the style of this painting?"],
    "technique": ["How was the paint put on?", "How is the paint applied?"]}


# ---- things: parts (tint, points) with points in [-1, 1], x to the right, y downwards

def ellipse(x, y, rx, ry, turn=0.0, corners=24):
    """Polygon (corners, 2) of an ellipse turned by `turn` radians."""
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    px, py = rx * np.cos(t), ry * np.sin(t)
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([x + c * px - s * py, y + s * px + c * py], axis=1)


def round_shape(x, y, radius):
    """Polygon around (x, y); radius is a function of the angle, 0 = top, in [-pi, pi]."""
    t = np.linspace(-np.pi, np.pi, 64, endpoint=False)
    return np.stack([x + radius(t) * np.sin(t), y - radius(t) * np.cos(t)], axis=1)


def boat():
    return [("ink", [(-.05, -.95), (.02, -.95), (.02, .4), (-.05, .4)]),
            ("light", [(.07, -.88), (.42, -.4), (.78, .2), (.07, .2)]),
            ("cream", [(-.11, -.7), (-.11, .2), (-.66, .2)]),
            ("body", [(-.95, .34), (.98, .3), (.84, .56), (.6, .8), (-.58, .8), (-.8, .6)]),
            ("white", [(-.86, .46), (.88, .43), (.84, .53), (-.82, .56)])]


def house():
    window = np.array([(0, 0), (.27, 0), (.27, .27), (0, .27)])
    return [("dark", [(.34, -.8), (.58, -.8), (.58, -.2), (.34, -.2)]),
            ("body", [(-.68, -.1), (.68, -.1), (.68, .82), (-.68, .82)]),
            ("dark", [(-.9, 0), (-.05, -.82), (.05, -.82), (.9, 0)]),
            ("cream", window + (-.5, .18)), ("cream", window + (.23, .18)),
            ("ink", [(-.14, .4), (.14, .4), (.14, .82), (-.14, .82)])]


def tree():
    crown = round_shape(0, -.25, lambda t: .62 + .09 * np.abs(np.sin(4 * t)))
    return [("bark", [(-.1, .2), (.1, .2), (.13, .7), (.24, .95), (-.24, .95), (-.13, .7)]),
            ("body", crown), ("shine", ellipse(-.2, -.5, .24, .17, -.5)),
            ("shade", ellipse(.2, .08, .3, .12, -.4)), ("shade", ellipse(.33, -.35, .1, .07))]


def fish():
    body = [(.92, .0), (.7, -.27), (.35, -.42), (-.05, -.4), (-.5, -.1), (-.5, .1),
            (-.05, .38), (.35, .42), (.7, .28)]
    return [("dark", [(-.42, 0), (-.95, -.48), (-.78, 0), (-.95, .48)]),
            ("dark", [(.45, -.36), (.1, -.72), (-.25, -.62), (-.2, -.28)]),
            ("dark", [(.2, .36), (-.05, .68), (-.2, .3)]), ("body", body),
            ("shine", [(.2, -.4), (.3, -.41), (.22, 0), (.3, .41), (.2, .4), (.1, 0)]),
            ("shine", [(-.12, -.35), (-.02, -.39), (-.1, 0), (-.02, .37), (-.12, .33), (-.2, 0)]),
            ("white", ellipse(.6, -.1, .13, .13)), ("ink", ellipse(.62, -.1, .065, .065))]


def flower():
    stem = [("bark", [(-.05, .2), (.05, .2), (.08, .98), (-.03, .98)]),
            ("bark", ellipse(.26, .66, .26, .09, -.6)), ("bark", ellipse(-.24, .78, .24, .08, .6))]
    turns = np.arange(6) * np.pi / 3 - np.pi / 2
    petals = [("body" if i % 2 else "light",
               ellipse(.4 * np.cos(a), -.28 + .4 * np.sin(a), .31, .23, a))
              for i, a in enumerate(turns)]
    return stem + petals[::2] + petals[1::2] + [("ink", ellipse(0, -.28, .2, .2)),
                                                ("white", ellipse(-.03, -.31, .1, .1))]


def bird():
    body = [(.72, -.38), (.62, -.6), (.38, -.66), (.16, -.5), (-.1, -.22), (-.5, 0), (-.95, .02),
            (-.72, .26), (-.3, .46), (.1, .5), (.44, .34), (.62, .02), (.66, -.2)]
    legs = [("ink", [(x, .42), (x + .06, .42), (x + .08, .86), (x + .2, .92), (x - .02, .92)])
            for x in (-.06, .2)]
    wing = [(.3, -.16), (.02, -.2), (-.34, .04), (-.7, .42), (-.2, .34), (.16, .2)]
    return legs + [("ink", [(.66, -.52), (.98, -.38), (.68, -.32)]), ("body", body),
                   ("dark", wing), ("shine", [(.2, -.08), (0, -.1), (-.3, .12), (-.1, .1)]),
                   ("white", ellipse(.47, -.43, .11, .11)), ("ink", ellipse(.49, -.43, .05, .05))]


def apple():
    shape = round_shape(0, .15, lambda t: .76 - .2 * np.exp(-(t / .42) ** 2)
                        - .09 * np.exp(-((np.pi - np.abs(t)) / .3) ** 2)
                        + .05 * np.exp(-((np.abs(t) - .8) / .5) ** 2))
    return [("body", shape), ("shade", ellipse(.34, .5, .26, .15, -.8)),
            ("bark", [(-.05, -.32), (.04, -.32), (.14, -.82), (.04, -.86)]),
            ("bark", ellipse(.36, -.64, .3, .13, -.35)),
            ("white", ellipse(-.34, -.12, .2, .1, -.9))]


def star():
    t = np.arange(10) * np.pi / 5
    r = np.where(np.arange(10) % 2, .44, 1.0)
    rim = np.stack([r * np.sin(t), -r * np.cos(t)], axis=1)
    facets = [("light", [rim[i], rim[i - 1], (0, 0)]) for i in range(0, 10, 2)]
    return [("body", rim)] + facets


KINDS = {"boat": boat, "house": house, "tree": tree, "fish": fish,
         "flower": flower, "bird": bird, "apple": apple, "star": star}


def plural(kind):
    return kind if kind == "fish" else kind + "s"


# ---- scenes

LAYOUTS = {1: [[(.50, .57, .35)], [(.44, .58, .31)], [(.54, .54, .28)]],
           2: [[(.27, .52, .22), (.73, .62, .23)], [(.30, .36, .21), (.68, .70, .24)],
               [(.26, .60, .23), (.75, .60, .22)]],
           3: [[(.50, .33, .19), (.25, .72, .21), (.75, .72, .21)],
               [(.25, .35, .20), (.75, .37, .20), (.50, .74, .21)],
               [(.19, .42, .17), (.50, .64, .18), (.81, .44, .17)]],
           4: [[(.27, .34, .19), (.73, .34, .19), (.27, .76, .20), (.73, .76, .20)],
               [(.25, .40, .19), (.68, .29, .18), (.33, .78, .19), (.76, .70, .20)]]}


def fill_scene(rng, kind, count, colour, ground):
    """Scene dict: the four content values, plus positions and sizes as plain numbers."""
    layouts = LAYOUTS[count]
    spots = layouts[rng.integers(len(layouts))]
    mirror = bool(rng.random() < 0.5)
    things = []
    for x, y, r in spots:
        x, y = x + rng.uniform(-.015, .015), y + rng.uniform(-.015, .015)
        things.append({"x": float(1 - x if mirror else x), "y": float(y),
                       "radius": float(r * rng.uniform(.93, 1.04)),
                       "turn": float(rng.uniform(-.16, .16)), "flip": bool(rng.random() < .5)})
    return {"kind": kind, "count": int(count), "colour": colour, "ground": ground,
            "things": things, "horizon": float(rng.uniform(.2, .3)),
            "lamp": float(rng.uniform(.12, .88)), "details": int(rng.integers(2 ** 31))}


def random_scene(rng):
    """A scene with kind, count (1 to 4), colour and ground drawn uniformly."""
    factors = (KINDS, COUNTS, COLOURS, GROUNDS)
    return fill_scene(rng, *(list(values)[rng.integers(len(values))] for values in factors))


def number_word(count, rng):
    return ("a", "one")[rng.integers(2)] if count == 1 else COUNTS[count]


def caption(scene, rng):
    """One line on the content only, such as "three red boats on the water"."""
    count, colour = scene["count"], scene["colour"]
    number = number_word(count, rng)
    if number == "a" and colour == "orange":
        number = "an"
    noun = scene["kind"] if count == 1 else plural(scene["kind"])
    place = PLACES[scene["ground"]][rng.integers(3)]
    forms = [f"{number} {colour} {noun} {place}", f"{place}, {number} {colour} {noun}",
             f"{COUNTS[count]} {noun} {place}, {'all ' if count > 1 else ''}{colour}"]
    return forms[rng.integers(len(forms))]


def questions(scene, style, rng):
    """Five (question, answer, question_type), one of each type, in the order of WORDINGS."""
    answers = {"what": scene["kind"], "count": COUNTS[scene["count"]], "colour": scene["colour"],
               "style": style, "technique": TECHNIQUES[style]}
    return [(wordings[rng.integers(len(wordings))].format(thing=plural(scene["kind"])),
             answers[kind], kind) for kind, wordings in WORDINGS.items()]


# ---- from a scene to flat shapes: (points (n, 2) in [0, 1], rgb in [0, 1], outlined)

def wavy_band(top, height, waves, phase, colour, outlined=True):
    """Everything below a wavy line at `top`."""
    x = np.linspace(-.02, 1.02, 40)
    y = top + height * np.sin(2 * np.pi * waves * x + phase)
    points = np.concatenate([np.stack([x, y], axis=1), [(1.02, 1.02), (-.02, 1.02)]])
    return points, np.array(colour) / 255, outlined


def ripple(x, y, width, bend, colour):
    """A thin crescent: a wave, a tuft of grass or a line in the sand."""
    t = np.linspace(-1, 1, 9)
    upper = np.stack([x + width * t, y - bend * (1 - t ** 2)], axis=1)
    lower = np.stack([x + width * t, y - (bend - .012) * (1 - t ** 2) + .002], axis=1)
    return np.concatenate([upper, lower[::-1]]), np.array(colour) / 255, False


def crescent(x, y, radius):
    """A moon open to the upper right."""
    t = np.linspace(-.2, np.pi + .9, 24)
    t_in = np.linspace(np.pi + .9, -.2, 24)
    outer = np.stack([np.cos(t), np.sin(t)], axis=1)
    tips = (outer[0] + outer[-1]) / 2
    inner = np.stack([np.cos(t_in), np.sin(t_in)], axis=1)
    return (x, y) + radius * np.concatenate([outer, inner * .8 + tips * .42])


def ground_shapes(scene):
    """The shapes of sky, ground and their details, back to front."""
    rng = np.random.default_rng(scene["details"])
    sky, far, near, detail = GROUNDS[scene["ground"]]
    night, water = scene["ground"] == "night", scene["ground"] == "water"
    horizon = .84 if night else scene["horizon"]
    lamp = crescent(scene["lamp"], .12, .07) if night else ellipse(scene["lamp"], .12, .06, .06)
    shapes = [(np.array([(0, 0), (1, 0), (1, 1), (0, 1)]), np.array(sky) / 255, False),
              (lamp, np.array(detail if night else (252, 238, 200)) / 255, True)]
    if night:
        shapes += [(ellipse(*rng.uniform(.03, .97, 2), .006, .006), np.array(detail) / 255, False)
                   for _ in range(14)]
    bands = ((0, 0 if water else .025, far),
             (.07 if night else .34, .02 if water else .035, near))
    for drop, height, colour in bands:
        shapes.append(wavy_band(horizon + drop, height, rng.uniform(.7, 1.6),
                                rng.uniform(0, 6), colour))
    for _ in range(0 if night else 26):
        y = rng.uniform(horizon + .05, 1)
        near_size = .35 + y  # nearer details are larger
        width, bend = {"water": (.05, .018), "meadow": (.014, .035),
                       "sand": (.07, .01)}[scene["ground"]]
        shapes.append(ripple(rng.uniform(0, 1), y, width * near_size, bend * near_size, detail))
    return shapes


def thing_shapes(scene):
    """The shapes of the things; all of them carry the colour of the scene."""
    body = np.array(COLOURS[scene["colour"]]) / 255
    dark, light = body * .74, body + .32 * (1 - body)
    tints = {"body": body, "dark": dark, "shade": dark, "light": light, "shine": light}
    tints |= {name: np.array(rgb) / 255 for name, rgb in NEUTRALS.items()}
    parts = [(tint, np.array(points, dtype=float)) for tint, points in KINDS[scene["kind"]]()]
    reach = max(np.hypot(*points.T).max() for _, points in parts)
    shapes = []
    for thing in scene["things"]:
        c, s = np.cos(thing["turn"]), np.sin(thing["turn"])
        turn = np.array([[c, s], [-s, c]]) * thing["radius"] / reach
        mirror = (-1, 1) if thing["flip"] else (1, 1)
        shapes += [(points * mirror @ turn + (thing["x"], thing["y"]), tints[tint],
                    tint not in NO_OUTLINE)
                   for tint, points in parts]
    return shapes


def fill(shapes, size, colours, mode):
    """The polygons drawn at twice the size and halved: float (size, size[, 3]) in [0, 1]."""
    image = Image.new(mode, (2 * size, 2 * size))
    draw = ImageDraw.Draw(image)
    for (points, _, _), colour in zip(shapes, colours):
        draw.polygon((points * 2 * size).ravel().tolist(), fill=colour)
    return np.asarray(image.reduce(2), dtype=np.float32) / 255


def contours(shapes, size, width):
    """Outlines with hidden parts hidden: float (size, size), 1 on a line; width in pixels."""
    image = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(image)
    for points, _, outlined in shapes:
        flat = (points * 2 * size).ravel().tolist()
        draw.polygon(flat, fill=0 if outlined else None)
        if outlined:
            draw.line(flat + flat[:4], fill=255, width=max(1, round(2 * width)), joint="curve")
    return np.asarray(image.reduce(2), dtype=np.float32) / 255


@dataclass
class Stage:
    """What a painter gets: arrays are float (size, size[, 3]) in [0, 1]."""
    shapes: list
    flat: np.ndarray     # plain colours
    shaded: np.ndarray   # with light, shadow and modelling
    mask: np.ndarray     # 1 on the things
    size: int
    unit: float          # about one pixel of a 112-pixel picture, in pixels of this one
    rng: np.random.Generator


def set_stage(scene, size, rng):
    """Draw the scene without any manner."""
    ground, things = ground_shapes(scene), thing_shapes(scene)
    shapes = ground + things
    colours = [tuple(int(round(255 * v)) for v in rgb) for _, rgb, _ in shapes]
    flat = fill(shapes, size, colours, "RGB")
    mask = fill(things, size, [255] * len(things), "L")
    soft, wide = blur(mask, size * .02), blur(mask, size * .045)
    step = round(size * .03)
    light = np.roll(soft, (step, step), (0, 1)) - np.roll(soft, (-step, -step), (0, 1))
    halo = np.roll(wide, step, 0) * (1 - mask)
    halo *= .30 if scene["ground"] == "night" else -.30
    depth = np.linspace(.05, -.07, size, dtype=np.float32)[:, None]
    shaded = flat + (.22 * light * mask + halo + depth)[..., None]
    return Stage(shapes, flat, shaded.clip(0, 1), mask, size,
                 size / 112 * rng.uniform(.92, 1.12), rng)


# ---- tools of the painters

def blur(values, radius):
    """Gaussian blur of a float array (h, w) or (h, w, 3) in [0, 1]."""
    image = Image.fromarray((values.clip(0, 1) * 255 + .5).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def noise(size, cells, rng, rows=None):
    """Smooth noise (size, size) of about unit spread with `cells` bumps along each side."""
    grid = rng.standard_normal((rows or cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def pixel_grid(size):
    """x and y of every pixel, each float (size, size)."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return x, y


def look_up(image, x, y):
    """Colours of `image` at the nearest pixels; x and y may lie outside."""
    top = image.shape[0] - 1
    return image[np.rint(y).astype(int).clip(0, top), np.rint(x).astype(int).clip(0, top)]


def vary_colour(colours, amount, rng):
    """Shift each colour (n, 3) in hue and lightness; dark colours are shifted less."""
    shift = rng.normal(0, amount, colours.shape) + rng.normal(0, .7 * amount, (len(colours), 1))
    return (colours + shift * (.4 + .7 * colours.mean(axis=1, keepdims=True))).clip(0, 1)


def jittered_points(size, pitch, rng):
    """Points (n, 2) on a grid of the given pitch, each moved at random, in random order."""
    across = np.arange(-pitch, size + pitch, pitch)
    points = np.stack(np.meshgrid(across, across), axis=-1).reshape(-1, 2)
    points = points + rng.uniform(-.5, .5, points.shape) * pitch
    return points[rng.permutation(len(points))]


def brush(canvas, stage, points, angle, length, width, steps, spread):
    """Tapered strokes that follow the field `angle` (size, size), painted on a PIL image.

    The canvas is twice the size of the stage; points (n, 2), length and width in its pixels."""
    rng, n = stage.rng, len(points)
    colours = vary_colour(look_up(stage.shaded, *points.T), spread, rng)
    colours = [tuple(c) for c in (255 * colours).astype(int).tolist()]
    length = length * rng.uniform(.7, 1.3, (n, 1))
    path, normals = [points - 0.0], []
    for _ in range(steps):
        a = look_up(angle, *path[-1].T)
        ahead = np.stack([np.cos(a), np.sin(a)], axis=1)
        normals.append(ahead[:, ::-1] * (-1, 1))
        path.append(path[-1] + ahead * length / steps)
    normals.append(normals[-1])
    # (steps + 1, n, 2); the stroke is moved back so that its middle lies on its point
    path = np.stack(path) + points - path[len(path) // 2]
    taper = np.sin(np.linspace(.35, np.pi - .35, steps + 1))[:, None, None]
    side = np.stack(normals) * taper * width * rng.uniform(.35, .6, (n, 1))
    # down one side and back on the other: (n, 2 * (steps + 1) * 2)
    outline = np.concatenate([path + side, (path - side)[::-1]]).transpose(1, 0, 2) * 2
    draw = ImageDraw.Draw(canvas)
    for flat, colour in zip(outline.reshape(n, -1).tolist(), colours):
        draw.polygon(flat, fill=colour)


def halve(canvas, relief):
    """Half-size float array of a PIL canvas, lit from the upper left like thick paint."""
    image = np.asarray(canvas.reduce(2), dtype=np.float32) / 255
    height = image.mean(axis=2)
    slope = (height - np.roll(height, (1, 1), (0, 1))).clip(-.15, .15)
    return image + relief * slope[..., None]


def new_canvas(stage):
    """A PIL canvas at twice the size with a soft underpainting of the scene."""
    under = (blur(stage.shaded, stage.unit) * 255).astype(np.uint8)
    return Image.fromarray(under).resize((2 * stage.size,) * 2)


# ---- the eight manners: Stage -> float (size, size, 3), about [0, 1]

def pointillism(stage):
    pale = .6 * stage.shaded.mean()  # a dark scene gets a less pale ground
    image = (1 - pale) * stage.shaded + pale * np.array([1, .97, .89], dtype=np.float32)
    for pitch, spread in ((3.3, .10), (2.7, .08)):
        image = dots(image, stage, pitch * stage.unit, spread)
    return image


def dots(image, stage, pitch, spread):
    """One layer of round separate dots, one for each cell of a jittered grid."""
    rng, size = stage.rng, stage.size
    n = int(size / pitch) + 3
    cell_y, cell_x = np.mgrid[:n, :n] - 1.0
    centre_x = ((cell_x + rng.uniform(.2, .8, (n, n))) * pitch).astype(np.float32).ravel()
    centre_y = ((cell_y + rng.uniform(.2, .8, (n, n))) * pitch).astype(np.float32).ravel()
    radius = (pitch * rng.uniform(.34, .47, n * n)).astype(np.float32)
    colours = vary_colour(look_up(stage.shaded, centre_x, centre_y), spread, rng)
    x, y = pixel_grid(size)
    home = ((y / pitch).astype(int) + 1) * n + (x / pitch).astype(int) + 1
    best, cell = np.full((size, size), np.inf, dtype=np.float32), home
    for step in (-n - 1, -n, -n + 1, -1, 0, 1, n - 1, n, n + 1):  # a cell and its neighbours
        near = home + step
        gap = np.sqrt((x - centre_x[near]) ** 2 + (y - centre_y[near]) ** 2) - radius[near]
        cell = np.where(gap < best, near, cell)
        best = np.minimum(best, gap)
    cover = (.5 - best).clip(0, 1)[..., None]
    return image * (1 - cover) + colours.astype(np.float32)[cell] * cover


def stroke_angle(stage, stream):
    """Direction of the paint: along the level lines of `stream`, and around the things."""
    stream = stream + 2.5 * blur(stage.mask, 2.2 * stage.unit)
    down, across = np.gradient(stream)
    return np.arctan2(-across, down)


def near_things(stage, pitch):
    """Jittered points on the things and in a narrow ring around them."""
    points = jittered_points(stage.size, pitch, stage.rng)
    return points[look_up(blur(stage.mask, 1.5 * stage.unit), *points.T) > .06]


def impressionism(stage):
    rng, unit = stage.rng, stage.unit
    canvas = new_canvas(stage)
    angle = .5 + .7 * noise(stage.size, 4, rng)
    points = jittered_points(stage.size, 3.6 * unit, rng)
    brush(canvas, stage, points, angle, 8 * unit, 3.6 * unit, 2, .07)
    points = near_things(stage, 2.2 * unit)
    angle = stroke_angle(stage, noise(stage.size, 4, rng))
    brush(canvas, stage, points, angle, 4.2 * unit, 2.2 * unit, 2, .05)
    return halve(canvas, .55)


def expressionism(stage):
    rng, unit = stage.rng, stage.unit
    canvas = new_canvas(stage)
    stream = noise(stage.size, 5, rng) + .5 * blur(stage.mask, 6 * unit)
    angle = stroke_angle(stage, stream)
    points = jittered_points(stage.size, 4 * unit, rng)
    brush(canvas, stage, points, angle, 26 * unit, 2.8 * unit, 6, .08)
    points = near_things(stage, 2.3 * unit)
    brush(canvas, stage, points, angle, 5.2 * unit, 1.8 * unit, 3, .05)
    return halve(canvas, .9)


def cubism(stage):
    rng, size, unit = stage.rng, stage.size, stage.unit
    x, y = pixel_grid(size)
    shift_x, shift_y, shade = np.zeros((3, size, size), dtype=np.float32)
    for turn in rng.permutation(13) * np.pi / 13 + rng.uniform(-.1, .1, 13):
        nx, ny = np.cos(turn), np.sin(turn)
        px, py = rng.uniform(.08, .92, 2) * size
        side = (x - px) * nx + (y - py) * ny
        beyond = side > 0
        depth = rng.uniform(8, 22) * unit
        shade += rng.choice([-1, 1]) * .16 * np.where(beyond, np.exp(-np.abs(side) / depth), 0)
        shade -= .2 * (.7 * unit - np.abs(side)).clip(0, 1)
        move = rng.uniform(-2.2, 2.2) * unit
        shift_x += np.where(beyond, -ny * move, 0)
        shift_y += np.where(beyond, nx * move, 0)
    shift_x, shift_y = shift_x - shift_x.mean(), shift_y - shift_y.mean()
    image = look_up(stage.flat, x + shift_x, y + shift_y)
    return image * (1 + (shade * (1 - .35 * stage.mask))[..., None])


def pop_art(stage):
    size, unit = stage.size, stage.unit
    x, y = pixel_grid(size)
    turn, pitch = .5, 4.4 * unit
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = np.hypot((u / pitch) % 1 - .5, (v / pitch) % 1 - .5) * pitch
    tone = (y / size - .15) * .26 + .24
    tone = np.where(stage.mask > .5, .62 * (x + y) / size - .3, tone).clip(0, .42)
    ink = (tone * pitch - distance + .5).clip(0, 1) * (tone > .08)
    grey = stage.flat.mean(axis=2, keepdims=True)
    image = (grey + 1.45 * (stage.flat - grey)).clip(0, 1)  # gaudy inks
    image = image * (1 - .55 * ink[..., None]) + .55 * ink[..., None] * image ** 2.6
    line = contours(stage.shapes, size, 1.9 * unit)[..., None]
    return image * (1 - line) + np.array([.05, .04, .07]) * line


def color_field(stage):
    rng, size, unit = stage.rng, stage.size, stage.unit
    x, y = pixel_grid(size)
    ragged = [1.5 * unit * noise(size, 10, rng) + .9 * unit * noise(size, 28, rng) for _ in "xy"]
    bled = look_up(stage.shaded, x + ragged[0], y + ragged[1])
    near, wide = blur(bled, unit), blur(bled, 5 * unit)
    rim = np.abs(near - blur(bled, 2.4 * unit)).mean(axis=2)  # pigment gathers at the edges
    pigment = .035 * noise(size, 5, rng) + .03 * noise(size, 3, rng, rows=18)
    grain = .022 * noise(size, 75, rng)
    return .74 * near + .26 * wide + (pigment + grain - .7 * rim)[..., None]


def northern_renaissance(stage):
    rng, size, unit = stage.rng, stage.size, stage.unit
    x, y = pixel_grid(size)
    tone = stage.shaded.mean(axis=2)
    bend = 2.2 * unit * noise(size, 4, rng) + 5 * unit * blur(stage.mask, 4 * unit)
    ink = np.zeros((size, size), dtype=np.float32)
    pitch = 2.9 * unit
    tone = (tone - tone.min()) / (tone.max() - tone.min() + 1e-6)
    for turn, from_tone in ((.7, 1.05), (-.75, .74), (.05, .42)):
        across = x * np.cos(turn) + y * np.sin(turn) + bend
        distance = np.abs((across / pitch) % 1 - .5) * pitch
        half_width = ((from_tone - tone) * .9).clip(0, .55) * unit
        ink = np.maximum(ink, (half_width - distance + .5).clip(0, 1) * (half_width > 0.05 * unit))
    ink = np.maximum(.8 * ink, .9 * contours(stage.shapes, size, .6 * unit))[..., None]
    deep = .55 * stage.shaded ** 2 + np.array([.09, .05, .03])
    return stage.shaded * (1 - ink) + deep * ink


def ukiyo_e(stage):
    rng, size, unit = stage.rng, stage.size, stage.unit
    y = pixel_grid(size)[1]
    shifted = np.roll(stage.flat, (round(.7 * unit), round(.9 * unit)), (0, 1))
    rings = y / unit * .34 + 1.6 * noise(size, 3, rng, rows=6) + .25 * noise(size, 3, rng, rows=40)
    grain = .05 * np.sin(2 * np.pi * rings) * (1 - .5 * stage.mask)
    image = shifted ** 1.15 + grain[..., None]
    fade = (1 - y / (.16 * size)).clip(0, 1)[..., None] * (1 - stage.mask[..., None])
    image = image * (1 - .7 * fade) + np.array([.10, .22, .46]) * .7 * fade
    line = contours(stage.shapes, size, 1.0 * unit)[..., None]
    return image * (1 - .9 * line) + np.array([.12, .12, .2]) * .9 * line


STYLES = {"Pointillism": pointillism, "Impressionism": impressionism, "Cubism": cubism,
          "Pop Art": pop_art, "Color Field Painting": color_field,
          "Expressionism": expressionism, "Northern Renaissance": northern_renaissance,
          "Ukiyo-e": ukiyo_e}


def match_palette(image, model):
    """Give `image` the mean colour and about the contrast of `model`; both (h, w, 3).

    The mean is reached by a power of each channel, so that black lines stay black."""
    image = image.astype(np.float32)
    centre = image.mean(axis=(0, 1))
    stretch = (model.std() / (image.std() + 1e-6)).clip(.85, 1.2)
    image = ((image - centre) * stretch + centre).clip(.004, 1)
    goal = np.log(model.mean(axis=(0, 1)))
    result = image
    power = np.ones(3, dtype=np.float32)
    for _ in range(4):
        power = (power * goal / np.log(result.mean(axis=(0, 1)))).clip(.4, 2.5)
        result = image ** power
    return result


def draw_scene(scene, style, size=112, seed=0):
    """The scene in one manner: PIL RGB (size, size). Depends on its arguments only."""
    rng = np.random.default_rng([seed, list(STYLES).index(style)])
    stage = set_stage(scene, size, rng)
    image = match_palette(STYLES[style](stage), stage.shaded)
    return Image.fromarray((image * 255 + .5).astype(np.uint8))


# ---- the data set

def balanced_design(pictures, rng):
    """A list of dicts split, style, kind, count, colour, ground, nearly balanced in pairs.

    Values are dealt one after the other, each time the one least often met so far
    together with the values the picture has already."""
    rows, met = [], Counter()
    per_style = split_pattern(-(-pictures // len(STYLES)), rng)
    factors = {"kind": KINDS, "count": COUNTS, "colour": COLOURS, "ground": GROUNDS}
    for i in range(pictures):
        row = {"style": list(STYLES)[i % len(STYLES)], "split": per_style[i // len(STYLES)]}
        for name, values in factors.items():
            values = list(values)
            cost = [sum(met[key, row[key], name, v] ** 2 for key in row) for v in values]
            row[name] = values[int(np.argmin(np.array(cost) + rng.random(len(values))))]
            for key in list(row)[:-1]:
                met[key, row[key], name, row[name]] += 1
        rows.append(row)
    return [rows[i] for i in rng.permutation(len(rows))]


def split_pattern(length, rng):
    """`length` split names in the proportions of SPLITS, in random order."""
    held_out = {name: max(1, round(length * SPLITS[name])) for name in ("val", "test")}
    names = [name for name, n in held_out.items() for _ in range(n)]
    names += ["train"] * (length - len(names))
    return [names[i] for i in rng.permutation(length)]


def write_then_rename(path, write):
    """Call write(temporary path), then move the file to `path` in one step."""
    temporary = path.with_name("." + path.name + ".part")
    with files.errors_about(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_csv(path, rows):
    header = ["image", "question", "answer", "question_type", "style"]
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([header] + rows)


def write_text(path, text):
    write_then_rename(path, lambda p: p.write_text(text, encoding="utf-8"))


TABLES = ("{}.csv", "{}_captions.json", "style_{}.csv")  # questions; captions; styles in the form of ArtGAN's WikiArt
NAME = re.compile(r"\d{4,}_(one|two|three|four)-[a-z]+-[a-z]+\.jpg")


def holds_other_data(out, name=NAME):
    """True if `out` has ArtQuest's own files, or a train.csv whose pictures are not named as a drawn set's are."""
    path = out / "train.csv"
    if (out / "artquest_train.csv").exists():
        return True
    if not path.exists():
        return False
    with open(path, newline="", encoding="utf-8") as f:
        row = next(csv.DictReader(f), {})
    return not name.fullmatch(row.get("image") or "")


def is_complete(out, stamp):
    """True if the set described by `stamp` is in `out` already."""
    path = out / "sample.json"
    names = ["style_class.txt"] + [name.format(split) for split in SPLITS for name in TABLES]
    if not path.exists() or not all((out / name).exists() for name in names):
        return False
    drawn = [p for p in (out / "images").glob("*.jpg") if NAME.fullmatch(p.name)]
    return json.loads(path.read_text()) == stamp and len(drawn) == stamp["pictures"]


def make_once(out, stamp, is_complete, holds_other_data, draw, refuse):
    """Draw the set described by `stamp` into `out` -> what draw() returns; None, and a line, where it is there already. The stamp goes
    first and comes last, so that an interrupted set is drawn again. refuse: called with a message where other data lies there."""
    if is_complete(out, stamp):
        print(f"{out} already holds this set ({stamp['pictures']} pictures, seed {stamp['seed']}).")
        return None
    if holds_other_data(out):
        refuse(f"{out} holds another data set; choose another --out")
    (out / "sample.json").unlink(missing_ok=True)
    drawn = draw()
    write_text(out / "sample.json", json.dumps(stamp) + "\n")
    return drawn


def draw_picture(index, row, seed, images):
    """Draw one picture into `images`: returns (its CSV rows, its file name, its caption)."""
    rng = np.random.default_rng([seed, index])
    scene = fill_scene(rng, row["kind"], row["count"], row["colour"], row["ground"])
    noun = scene["kind"] if scene["count"] == 1 else plural(scene["kind"])
    name = f"{index:04d}_{COUNTS[scene['count']]}-{scene['colour']}-{noun}.jpg"
    picture = draw_scene(scene, row["style"], PICTURE_SIZE, int(rng.integers(2 ** 31)))
    write_then_rename(images / name, lambda p: picture.save(p, "JPEG", quality=86))
    asked = questions(scene, row["style"], rng)
    return [[name, *qa, row["style"]] for qa in asked], name, caption(scene, rng)


def make_set(out, seed, pictures):
    """Draw the whole set into `out`; returns the number of pictures in each split."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows, captions, styles = ({split: [] for split in SPLITS} for _ in range(3))
    design = balanced_design(pictures, np.random.default_rng([seed, 0]))
    for index, row in enumerate(design, start=1):
        asked, name, text = draw_picture(index, row, seed, images)
        rows[row["split"]] += asked
        captions[row["split"]].append((name, text))
        styles[row["split"]].append(f"images/{name},{list(STYLES).index(row['style'])}\n")
    named = {name for pairs in captions.values() for name, _ in pairs}
    for path in images.glob("*.jpg"):
        if NAME.fullmatch(path.name) and path.name not in named:
            path.unlink()  # left over from a set with another seed
    for split in SPLITS:
        write_then_rename(out / f"{split}.csv", lambda p: write_csv(p, rows[split]))
        write_text(out / f"{split}_captions.json", json.dumps(dict(captions[split]), indent=1) + "\n")
        write_text(out / f"style_{split}.csv", "".join(styles[split]))
    write_text(out / "style_class.txt", "".join(f"{i} {style.replace(' ', '_')}\n" for i, style in enumerate(STYLES)))
    return Counter(row["split"] for row in design)


def draw_sheet(path, seed, size=150, gap=6, head=22):
    """A picture of three scenes (rows), each in all eight manners (columns), with the manners' names on top."""
    wanted = [("boat", 3, "red", "water"), ("flower", 2, "orange", "night"), ("house", 1, "blue", "sand")]
    rng = np.random.default_rng(seed)
    scenes = [fill_scene(rng, *content) for content in wanted]
    step = size + gap
    sheet = Image.new("RGB", (gap + step * len(STYLES), head + step * len(scenes)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, style in enumerate(STYLES):
        pen.text((gap + step * column, 5), style, "black", ImageFont.load_default(12))
        for row, scene in enumerate(scenes):
            picture = draw_scene(scene, style, PICTURE_SIZE, seed).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(picture, (gap + step * column, head + step * row))
    write_then_rename(Path(path), lambda p: sheet.save(p, "JPEG", quality=90))
