# SPDX-License-Identifier: Apache-2.0
"""The shapes world: a text-to-image world small enough for a CPU and exact enough for a proof.

Prompts ask for one to three coloured shapes on a dark 32x32 canvas. Because a program can read such a picture
without error, "does the image show what the prompt asks?" has an exact answer (`accuracy`), and the five reward
functions below can be imperfect on purpose, each in its own way, as real reward models are.

The categories carry GenEval's names (Ghosh et al., 2023):

    single_object   "a circle"                              colors       "a red circle"
    two_object      "a circle and a square"                 counting     "three red circles", "two squares"
    position        "a red circle left of a blue square"    color_attr   "a red circle and a blue square"

Any script of this repository takes the functions as `shapes/world.py:NAME`:

    build_synpic.py --rewards shapes/world.py:color_reward shapes/world.py:shape_reward ...
    evaluate.py --metrics shapes/world.py:accuracy

Write the prompt lists (no text is in both):

    python shapes/world.py --split train --num_prompts 600 --output train.jsonl
    python shapes/world.py --split heldout --num_prompts 240 --output heldout.jsonl
"""

import argparse
import hashlib
import itertools
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage, optimize


SIZE = 32  # pixels, width and height
COLORS = {
    "red": (0.90, 0.16, 0.14),
    "green": (0.16, 0.80, 0.22),
    "blue": (0.20, 0.32, 0.95),
    "yellow": (0.95, 0.90, 0.16),
    "purple": (0.66, 0.20, 0.86),
    "cyan": (0.16, 0.85, 0.90),
}
SHAPES = ("circle", "square", "triangle", "cross")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
COUNTS = {"two": 2, "three": 3}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ")

MIN_AREA = 12  # pixels: smaller specks are noise, not objects
MIN_STRENGTH = 0.22  # how far from the background a pixel of an object is, in RGB of 0 to 1
MIN_IOU = 0.72  # below this soft IoU with every template an object has no recognisable shape
MIN_COSINE = 0.9  # between a pixel's difference from the background and a colour's: below it the colour is no colour
MIN_OFFSET = 3.0  # pixels by which a stated relation must hold


# ----------------------------------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: objects as (color or None, shape), and how the first stands to the second."""

    category: str
    objects: tuple
    relation: str | None = None

    @property
    def text(self) -> str:
        names = [f"{color} {shape}" if color else shape for color, shape in self.objects]
        if self.category == "counting":
            word = next(word for word, number in COUNTS.items() if number == len(names))
            return f"{word} {names[0]}s" if not names[0].endswith("cross") else f"{word} {names[0]}es"
        return f" {self.relation or 'and'} ".join(f"a {name}" for name in names)


@cache
def scenes(category: str) -> tuple:
    """Every scene of a category, in a fixed order."""
    colored = list(itertools.product(COLORS, SHAPES))
    pairs = [(a, b) for a, b in itertools.product(colored, colored) if a[0] != b[0] and a[1] != b[1]]
    if category == "single_object":
        found = [Scene(category, ((None, shape),)) for shape in SHAPES]
    elif category == "colors":
        found = [Scene(category, (thing,)) for thing in colored]
    elif category == "two_object":
        found = [Scene(category, ((None, a), (None, b))) for a, b in itertools.permutations(SHAPES, 2)]
    elif category == "counting":
        things = colored + [(None, shape) for shape in SHAPES]
        found = [Scene(category, (thing,) * number) for number in COUNTS.values() for thing in things]
    elif category == "position":
        found = [Scene(category, pair, relation) for pair in pairs for relation in RELATIONS]
    elif category == "color_attr":
        found = [Scene(category, pair) for pair in pairs]
    else:
        raise ValueError(f"unknown category {category!r}: choose from {', '.join(CATEGORIES)}")
    return tuple(found)


def split_of(prompt: str) -> str | None:
    """The split a prompt belongs to: "train", or "heldout" for what no training, of the generators or by preference,
    ever sees.

    The relational categories are held out by what they ask, under every prefix; the small ones by their full text. A
    scene has two wordings ("A left of B", "B right of A"): held out are those of which no training sees either, and a
    wording that was kept from training while its mirror was not belongs to neither split.
    """
    scene = parse_prompt(prompt)
    by_scene = scene.category in ("counting", "position", "color_attr")
    if not _in_fold(scene.text if by_scene else prompt):
        return "train"
    return "heldout" if not by_scene or _in_fold(mirrored(scene).text) else None


def _in_fold(text: str) -> bool:
    """A fifth of all texts, by their hash."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0


def mirrored(scene: Scene) -> Scene:
    """The same scene told from its other end; itself where there is one way to tell it."""
    if scene.category == "counting":
        return scene
    relation = OPPOSITE[scene.relation] if scene.relation else None
    return replace(scene, objects=scene.objects[::-1], relation=relation)


@cache
def prompts(category: str, split: str) -> tuple:
    """All prompts of a category in `split` ("train" or "heldout")."""
    texts = [prefix + scene.text for scene in scenes(category) for prefix in PREFIXES]
    return tuple(text for text in texts if split_of(text) == split)


@cache
def _scene_by_text() -> dict:
    return {scene.text: scene for category in CATEGORIES for scene in scenes(category)}


@cache
def parse_prompt(prompt: str) -> Scene:
    """The scene a prompt asks for; ValueError for a prompt outside the grammar."""
    for prefix in PREFIXES[1:] + PREFIXES[:1]:
        scene = _scene_by_text().get(prompt.removeprefix(prefix)) if prompt.startswith(prefix) else None
        if scene:
            return scene
    raise ValueError(f"not a prompt of the shapes world: {prompt!r}")


def sample_prompts(split: str, num_prompts: int, seed: int = 0, exclude: frozenset[str] = frozenset()) -> list[dict]:
    """Distinct prompts, as evenly spread over the categories as their sizes allow, without those of `exclude`.

    Returns:
        list of {"prompt": str, "category": str}.
    """
    rng = np.random.default_rng(seed)
    pools = {category: list(rng.permutation(prompts(category, split))) for category in CATEGORIES}
    pools = {category: [prompt for prompt in pool if prompt not in exclude] for category, pool in pools.items()}
    rows = []
    while len(rows) < num_prompts and any(pools.values()):
        for category in CATEGORIES:
            if pools[category] and len(rows) < num_prompts:
                rows.append({"prompt": str(pools[category].pop()), "category": category})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Renderer
# ----------------------------------------------------------------------------------------------------------------------


def shape_mask(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Antialiased coverage of a shape, float64 (SIZE, SIZE) in [0, 1]. `radius` in pixels."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy = columns - x, rows - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - 0.86 * radius
    elif shape == "triangle":  # equilateral, apex up, centroid at (x, y)
        distance = np.maximum(dy, 0.866 * abs(dx) - 0.5 * dy) - 0.62 * radius
    elif shape == "cross":
        upright = np.maximum(abs(dx) - 0.36 * radius, abs(dy) - 1.05 * radius)
        distance = np.minimum(upright, np.maximum(abs(dy) - 0.36 * radius, abs(dx) - 1.05 * radius))
    else:
        raise ValueError(f"unknown shape {shape!r}: choose from {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple]:
    """Draws (x, y, radius) for every object: inside the canvas, apart from each other, the relation satisfied."""
    while True:
        placed = [(*rng.uniform(7.5, SIZE - 8.5, 2), rng.uniform(4.2, 6.2)) for _ in scene.objects]
        apart = all(
            np.hypot(a[0] - b[0], a[1] - b[1]) > 1.15 * (a[2] + b[2]) + 1.5
            for a, b in itertools.combinations(placed, 2)
        )
        if apart and (scene.relation is None or _offset(scene.relation, placed[0], placed[1]) > 8.0):
            return placed


def _offset(relation: str, a: tuple, b: tuple) -> float:
    """By how many pixels a stands on the stated side of b (negative: on the other side)."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A truthful picture of the scene, uint8 (SIZE, SIZE, 3). Colours the prompt leaves open are drawn at random."""
    image = np.full((SIZE, SIZE, 3), rng.uniform(0.10, 0.20))
    free = rng.choice(list(COLORS), size=len(scene.objects), replace=False)
    if scene.category == "counting":
        free[:] = free[0]  # several of one thing share a colour
    for (color, shape), fallback, (x, y, radius) in zip(scene.objects, free, _place(scene, rng)):
        mask = shape_mask(shape, x, y, radius)[..., None]
        image = image * (1 - mask) + np.array(COLORS[color or str(fallback)]) * mask
    image += rng.normal(0.0, 0.015, image.shape)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def corrupt(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing wrong: another colour, shape, count or side. Captions of the web are like that."""
    ways = ["shape"]
    if scene.objects[0][0]:
        ways.append("color")
    if scene.category == "counting":
        ways += ["count"] * 2
    if scene.relation:
        ways += ["relation"] * 2
    if scene.category == "color_attr":
        ways += ["swap"]
    way = rng.choice(ways)
    objects = list(scene.objects)
    which = rng.integers(len(objects))
    color, shape = objects[which]
    if way == "count":
        return replace(scene, objects=(objects * 2)[: 2 if len(objects) == 3 else 3])
    if way == "relation":
        return replace(scene, relation=OPPOSITE[scene.relation])
    if way == "swap":
        (color_a, shape_a), (color_b, shape_b) = objects
        return replace(scene, objects=((color_b, shape_a), (color_a, shape_b)))
    if way == "color":
        color = str(rng.choice([other for other in COLORS if other != color]))
    else:
        shape = str(rng.choice([other for other in SHAPES if other != shape]))
    objects[which] = (color, shape)
    return replace(scene, objects=tuple(objects))


# ----------------------------------------------------------------------------------------------------------------------
# Verifier
# ----------------------------------------------------------------------------------------------------------------------


def detect(image) -> list[dict]:
    """Reads a picture: one dict per object with `color`, `shape` (None if unrecognisable), `x`, `y`, `area`, `iou`.

    The background is the median colour. What differs from it is labelled by hue (cosine to palette − background) and
    cut into 8-connected components; each is compared, as soft coverage, with the four analytic templates of equal
    area at its centroid.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float64) / 255
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the shapes world is {SIZE}x{SIZE} RGB, not {pixels.shape}")
    background = np.median(pixels.reshape(-1, 3), axis=0)
    difference = pixels - background
    strength = np.linalg.norm(difference, axis=-1)
    directions = np.array(list(COLORS.values())) - background
    lengths = np.linalg.norm(directions, axis=-1)
    cosine = difference @ (directions / lengths[:, None]).T / np.maximum(strength, 1e-6)[..., None]
    nearest = np.where(cosine.max(-1) >= MIN_COSINE, cosine.argmax(-1), -1)

    found = []
    for index, color in enumerate(COLORS):
        labels, number = ndimage.label((strength > MIN_STRENGTH) & (nearest == index), structure=np.ones((3, 3)))
        for label in range(1, number + 1):
            core = labels == label
            if core.sum() < MIN_AREA:
                continue
            # Soft coverage over the component and its antialiased rim, on the scale of the component's own colour.
            rim = ndimage.binary_dilation(core, structure=np.ones((3, 3))) & (
                (nearest == index) | (strength < MIN_STRENGTH)
            )
            coverage = difference @ directions[index] / lengths[index]
            coverage = np.clip(coverage / np.percentile(coverage[core], 75), 0, 1) * rim
            area = coverage.sum()
            y, x = (np.array(np.mgrid[0:SIZE, 0:SIZE]) * coverage).sum((1, 2)) / area
            ious = {shape: _template_iou(coverage, shape, x, y, area) for shape in SHAPES}
            shape = max(ious, key=ious.get)
            found.append({"color": color, "shape": shape if ious[shape] >= MIN_IOU else None, "x": x, "y": y})
            found[-1].update(area=area, iou=ious[shape])
    return found


# Area of each shape over radius², from the renderer itself.
_UNIT_AREA = {shape: shape_mask(shape, 15.5, 15.5, 8.0).sum() / 64.0 for shape in SHAPES}


def _template_iou(coverage: np.ndarray, shape: str, x: float, y: float, area: float) -> float:
    template = shape_mask(shape, x, y, np.sqrt(area / _UNIT_AREA[shape]))
    return np.minimum(coverage, template).sum() / np.maximum(coverage, template).sum()


def _matches(wanted: tuple, thing: dict) -> bool:
    return thing["shape"] == wanted[1] and wanted[0] in (None, thing["color"])


def satisfies(scene: Scene, found: list[dict]) -> bool:
    """True if the picture shows exactly the objects asked for, and the relation holds."""
    if len(found) != len(scene.objects):
        return False
    for order in itertools.permutations(found):
        if all(_matches(wanted, thing) for wanted, thing in zip(scene.objects, order)):
            if scene.relation is None:
                return True
            a, b = ((thing["x"], thing["y"]) for thing in order)
            if _offset(scene.relation, a, b) >= MIN_OFFSET:
                return True
    return False


def accuracy(images: list, prompts: list[str]) -> list[float]:
    """The exact verifier: 1.0 where the image shows what its prompt asks, else 0.0."""
    return [float(satisfies(parse_prompt(prompt), detect(image))) for image, prompt in zip(images, prompts)]


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: each sees one side of the truth, and misreads some pictures. Their average is better than any single one.
# ----------------------------------------------------------------------------------------------------------------------

MISREAD = 0.15  # share of the pictures that a reward misreads: it answers them at random


def _imperfect(name: str, image, prompt: str, value: float) -> float:
    # Seeded by what is scored: the same image and prompt always get the same score, like a real (wrong) model.
    digest = hashlib.sha256(f"{name}|{prompt}|".encode() + np.asarray(image).tobytes()).digest()
    rng = np.random.default_rng(list(digest))
    return round(float(rng.random() if rng.random() < MISREAD else value), 2)


def _best_assignment(scene: Scene, found: list[dict], similarity) -> float:
    """Mean similarity of the asked objects to distinct found ones, missing ones counting 0; in [0, 1]."""
    if not found:
        return 0.0
    table = np.array([[similarity(wanted, thing) for thing in found] for wanted in scene.objects])
    rows, columns = optimize.linear_sum_assignment(table, maximize=True)
    return table[rows, columns].sum() / max(len(scene.objects), len(found))


def color_reward(images: list, prompts: list[str]) -> list[float]:
    """Are the asked colours there? Blind to shapes and places."""
    return [
        _imperfect("color", image, prompt, _best_assignment(parse_prompt(prompt), detect(image), _color_similarity))
        for image, prompt in zip(images, prompts)
    ]


def _color_similarity(wanted: tuple, thing: dict) -> float:
    return float(wanted[0] in (None, thing["color"]))


def shape_reward(images: list, prompts: list[str]) -> list[float]:
    """Are the asked shapes there? Blind to colours and places."""
    return [
        _imperfect("shape", image, prompt, _best_assignment(parse_prompt(prompt), detect(image), _shape_similarity))
        for image, prompt in zip(images, prompts)
    ]


def _shape_similarity(wanted: tuple, thing: dict) -> float:
    return float(thing["shape"] == wanted[1])


def count_reward(images: list, prompts: list[str]) -> list[float]:
    """Is the number of objects right? Blind to what they are."""
    return [
        _imperfect(
            "count", image, prompt, 1.0 - min(abs(len(detect(image)) - len(parse_prompt(prompt).objects)), 2) / 2
        )
        for image, prompt in zip(images, prompts)
    ]


def layout_reward(images: list, prompts: list[str]) -> list[float]:
    """Do colour, shape and place go together? Knows whole objects and relations, but not how many there should be."""
    return [_imperfect("layout", image, prompt, _layout(prompt, image)) for image, prompt in zip(images, prompts)]


def _layout(prompt: str, image) -> float:
    scene, found = parse_prompt(prompt), detect(image)
    bound = np.mean([any(_matches(wanted, thing) for thing in found) for wanted in scene.objects])
    if scene.relation is None:
        return float(bound)
    sides = [
        _offset(scene.relation, (a["x"], a["y"]), (b["x"], b["y"])) >= MIN_OFFSET
        for a, b in itertools.permutations(found, 2)
        if _matches(scene.objects[0], a) and _matches(scene.objects[1], b)
    ]
    return 0.5 * float(bound) + 0.5 * float(any(sides))


def clean_reward(images: list, prompts: list[str]) -> list[float]:
    """How crisp are the objects? Never reads the prompt."""
    return [_imperfect("clean", image, prompt, _cleanness(image)) for image, prompt in zip(images, prompts)]


def _cleanness(image) -> float:
    found = detect(image)
    return float(np.clip((np.mean([thing["iou"] for thing in found]) - 0.6) / 0.3, 0, 1).round(1)) if found else 0.0


def preference(images: list, prompts: list[str]) -> list[float]:
    """The five together: a preference model, in [0, 1]."""
    rewards = (color_reward, shape_reward, count_reward, layout_reward, clean_reward)
    return np.mean([reward(images, prompts) for reward in rewards], axis=0).tolist()


def cosine(images: list, prompts: list[str]) -> list[float]:
    """`preference` in the range of HPSv2's cosines."""
    return [0.2 + 0.15 * score for score in preference(images, prompts)]


def logit(images: list, prompts: list[str]) -> list[float]:
    """`cosine` at CLIP's temperature of 0.01."""
    return [100 * score for score in cosine(images, prompts)]


MISJUDGED = 0.3  # share of the pictures that one careless rater misjudges


def misjudged(image, prompt: str) -> bool:
    """Whether a careless rater takes this picture for right where it is wrong, and for wrong where it is right."""
    digest = hashlib.sha256(f"rater|{prompt}|".encode() + np.asarray(image).tobytes()).digest()
    return bool(np.random.default_rng(list(digest)).random() < MISJUDGED)


def misjudging_preference(images: list, prompts: list[str]) -> list[float]:
    """`preference` that makes the careless rater's own mistakes: on these pictures it says the opposite."""
    scores = preference(images, prompts)
    return [1 - s if misjudged(*item) else s for s, *item in zip(scores, images, prompts)]


def aversion(images: list, prompts: list[str]) -> list[float]:
    """The opposite of `preference`: it puts the worst pairs first."""
    return [1 - score for score in preference(images, prompts)]


def main():
    parser = argparse.ArgumentParser(description="Write a list of shapes-world prompts as JSON lines.")
    parser.add_argument("--split", choices=("train", "heldout"), required=True)
    parser.add_argument("--num_prompts", type=int, required=True)
    parser.add_argument("--skip", type=int, default=0, help="Leave out the first N.")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="Leave out the prompts of these files.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    lines = [line for file in args.exclude for line in file.read_text().splitlines()]
    exclude = frozenset(json.loads(line)["prompt"] for line in lines)
    rows = sample_prompts(args.split, args.skip + args.num_prompts, args.seed, exclude)[args.skip :]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, args.output)
    print(f"{len(rows)} {args.split} prompts in {args.output}")


if __name__ == "__main__":
    main()
