# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub", "numpy", "pillow", "scipy", "torch", "torchvision", "transformers"]
# ///
"""GenEval (Ghosh et al., NeurIPS 2023): does an image show the objects of its prompt, in number, colour and place?

A detector finds the objects of COCO's 80 classes with their masks, CLIP names their colours, and rules decide whether
the image is correct: 1.0 or 0.0. The benchmark has 553 prompts of six kinds, and four images of each:

    python metrics/geneval.py prompts --output geneval.jsonl
    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=outputs/rankdpo-sdxl --prompts geneval.jsonl --category_column tag \
        --num_images_per_prompt 4 --guidance_scale 9.0 --metrics metrics/geneval.py:GenEval \
        --output_dir outputs/geneval

Images that exist, in the folders of the official repository:

    python evaluate.py --images "sdxl=IMAGES/{index:05d}/samples/{number:05d}.png" --baseline sdxl \
        --prompts geneval.jsonl --category_column tag --num_images_per_prompt 4 \
        --metrics metrics/geneval.py:GenEval --output_dir outputs/geneval

Identical to https://github.com/djghosh13/geneval (commit af4902f): the rules, the thresholds, the detector's weights
(MMDetection's Mask2Former, loaded into that of transformers), its pre-processing to the last bit, its post-processing,
the prompts and crops for colours. CLIP ViT-L/14 is that of transformers. On a GPU it runs under float16 autocast, as in
the official code. The published figures are of 50 steps, guidance 9.0, and seed 42 before each prompt. With `--seed 42
--image_seeds counted`, image n of each prompt has seed 42 + n here.

A variant, to be named as such: `GenEval,detector=hub` takes facebook/mask2former-swin-small-coco-instance, another
training of the same architecture, with the official pre- and post-processing.
"""

import argparse
import json
import os
import re
import urllib.request
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image as PILImage
from PIL import ImageOps
from torch.nn.functional import interpolate, pad
from torch.nn.functional import normalize as unit
from torchvision.transforms.functional import center_crop, normalize, to_tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# COCO's 80 classes in the order of the detector's outputs, under GenEval's names (computer mouse, tv remote, …).
CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
BACKGROUND = "#999999"  # around an object whose colour CLIP names

METADATA = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
DETECTOR = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)
HUB_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
LONG_SIDE, SHORT_SIDE, MULTIPLE = 1333, 800, 32  # pixels of the detector's input
PADDING, PIXEL_MEAN, PIXEL_STD = 128, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_DETECTIONS = 100
DETECTED_TOGETHER = 8  # of 800 x 800 pixels, each takes the detector about 0.9 GB of memory


def judge(metadata: dict, objects: dict, color_of, position_threshold: float = 0.1) -> tuple[bool, str]:
    """Whether an image shows what a prompt asks for.

    Every clause of `include` takes the best `count` boxes of its class. All of them must have the colour, and all must
    have the relation to all boxes that an earlier clause took. A class of `exclude` must have fewer than `count` boxes.

    Args:
        metadata: one line of GenEval's file: {"include": [{"class", "count", "color"?, "position"?: [relation, index of
            an earlier clause]}], "exclude"?: [{"class", "count"}]}.
        objects: class → its boxes, sequences that start with x0, y0, x1, y1, by descending score.
        color_of: function of class and box → name of the colour.
        position_threshold: share of both boxes' sizes that does not count as an offset.

    Returns:
        (correct, reasons why not, one a line).
    """
    reasons, taken = [], []
    for clause in metadata.get("include") or []:
        name, count = clause["class"], clause["count"]
        boxes = objects.get(name, [])[:count]
        reason = None
        if len(boxes) < count:
            reason = f"expected {name}>={count}, found {len(boxes)}"
        elif clause.get("color"):
            colors = [color_of(name, box) for box in boxes]
            if any(color != clause["color"] for color in colors):
                reason = f"expected {clause['color']} {name}>={count}, found {', '.join(colors)}"
        if reason is None and clause.get("position"):
            relation, index = clause["position"]
            reason = misplaced(name, boxes, relation, taken[index], position_threshold)
        taken.append(boxes if reason is None else None)
        reasons.append(reason)
    for clause in metadata.get("exclude") or []:
        name, count, found = clause["class"], clause["count"], len(objects.get(clause["class"], []))
        reasons.append(f"expected {name}<{count}, found {found}" if found >= count else None)
    reasons = [reason for reason in reasons if reason]
    return not reasons, "\n".join(reasons)


def misplaced(name: str, boxes: list, relation: str, targets: list | None, threshold: float) -> str | None:
    """Why the boxes do not all have the relation to all targets; None if they have. No targets: their clause failed."""
    if targets is None:
        return f"no target for {name} to be {relation}"
    for box in boxes:
        for target in targets:
            found = relations(box, target, threshold)
            if relation not in found:
                return f"expected {name} {relation} target, found {' and '.join(sorted(found))} target"
    return None


def relations(box, target, threshold: float = 0.1) -> set[str]:
    """Where a box lies, seen from a target: none, one or two of RELATIONS. In float32, as the detector's boxes are."""
    corners = np.array([box[:4], target[:4]], dtype=np.float32).reshape(2, 2, 2)  # box, corner, (x, y)
    offset = np.subtract(*corners.mean(axis=1))
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    beyond = np.maximum(np.abs(offset) - threshold * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {relation for relation, held in zip(RELATIONS, holds) if held}


class GenEval:
    """1.0 for an image that shows what its prompt asks for, else 0.0.

    Args:
        device, batch_size: given by evaluate.py.
        detector: `official`; `hub` (a variant); the file of an MMDetection checkpoint, which has the official sizes
            unless a `config.json` of a Mask2FormerConfig stands beside it; or a folder or Hub id of a Mask2Former of
            transformers.
        clip: folder or Hub id of the CLIP that names colours.
        threshold: objects need a higher score than this.
        counting_threshold: the same for prompts with the tag counting.
        max_objects: at most so many objects of a class.
        position_threshold: see `judge`.
    """

    def __init__(
        self,
        device: torch.device,
        batch_size: int,
        detector: str = "official",
        clip: str = "openai/clip-vit-large-patch14",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        position_threshold: float = 0.1,
    ):
        self.device, self.batch_size = torch.device(device), min(batch_size, DETECTED_TOGETHER)
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_objects, self.position_threshold = max_objects, position_threshold
        self.detector = load_detector(detector).to(self.device)
        self.clip = load_strictly(transformers.CLIPModel, clip).to(self.device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
        self.classifiers = {}  # class → what `color_classifier` gives

    @torch.inference_mode()
    def score(self, images: list[PILImage.Image], prompts: list[str], rows: list[dict]) -> list[float]:
        """Rows are lines of GenEval's file. The prompts play no part: the rows say what to look for."""
        images = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        scores = []
        for image, row, objects in zip(images, rows, self.detect(images, rows)):
            correct, _ = judge(row, objects, partial(self.color_of, image), self.position_threshold)
            scores.append(float(correct))
        return scores

    @staticmethod
    def prepare(rows: list[dict], settings: dict) -> None:
        """Finds or downloads the weights."""
        read_detector(settings["detector"])
        checkpoint_folder(settings["clip"], *MODEL_FILES)

    @staticmethod
    def check_rows(rows: list[dict]) -> None:
        for number, row in enumerate(rows, start=1):
            if problem := row_problem(row):
                mend = "make the file with: python metrics/geneval.py prompts --output geneval.jsonl"
                raise ValueError(f"row {number} ({row.get('prompt')!r}): {problem}; {mend}")

    @staticmethod
    def official(rows: list[dict], scores: dict[str, np.ndarray], settings: dict) -> dict[str, float]:
        """The summary of summary_scores.py, as shares from 0 to 1, over the images that exist.

        Returns:
            Each tag's share of correct images; `overall`: their unweighted mean; `correct_images` of all images;
            `correct_prompts`: prompts with at least one correct image.
        """
        correct, tags = scores[""], np.array([row["tag"] for row in rows])
        figures = {tag: known_mean(correct[tags == tag]) for tag in dict.fromkeys(tags.tolist())}
        figures["overall"] = known_mean(np.array(list(figures.values())))
        seen = ~np.isnan(correct).all(axis=1)
        figures["correct_images"] = known_mean(correct)
        figures["correct_prompts"] = known_mean((correct[seen] == 1).any(axis=1).astype(float))
        return figures

    def detect(self, images: list[PILImage.Image], rows: list[dict]) -> list[dict[str, list["Detection"]]]:
        """The objects of each RGB image: class → detections by descending score."""
        inputs, found = [detector_input(image, self.device) for image in images], [None] * len(images)
        by_size = defaultdict(list)  # a batch holds images of one size, so that no padding depends on the batch
        for position, (pixels, _) in enumerate(inputs):
            by_size[pixels.shape].append(position)
        for positions in by_size.values():
            for start in range(0, len(positions), self.batch_size):
                batch = positions[start : start + self.batch_size]
                output = self.detector(pixel_values=torch.stack([inputs[position][0] for position in batch]))
                for position, *logits in zip(batch, output.class_queries_logits, output.masks_queries_logits):
                    threshold = self.counting_threshold if rows[position]["tag"] == "counting" else self.threshold
                    sizes = inputs[position][0].shape[1:], inputs[position][1], images[position].size[::-1]
                    found[position] = find_objects(*logits, *sizes, threshold, self.max_objects)
        return found

    def color_of(self, image: PILImage.Image, name: str, found: "Detection") -> str:
        """The colour of a detected object of an RGB image: CLIP's choice among COLORS."""
        pixels = clip_input(masked_crop(image, found), self.clip.config.vision_config.image_size).to(self.device)
        if name not in self.classifiers:
            self.classifiers[name] = self.color_classifier(name)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            features = unit(self.clip.get_image_features(pixels[None]).pooler_output, dim=-1)
            logits = 100.0 * features @ self.classifiers[name]
        return COLORS[logits[0].float().cpu().argmax()]  # float16 has ties; on a CPU the first one wins

    def color_classifier(self, name: str) -> torch.Tensor:
        """Unit text embeddings of the ten colours of a class, (width, 10): each the mean of its prompts' directions."""
        prompts = [prompt.format(color=color, name=name) for color in COLORS for prompt in COLOR_PROMPTS]
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            embeddings = self.clip.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
            means = unit(embeddings, dim=-1).unflatten(0, (len(COLORS), -1)).mean(dim=1)
            return (means / means.norm(dim=-1, keepdim=True)).T


def known_mean(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def row_problem(row: dict) -> str | None:
    """What is wrong with a line of GenEval's file, or None."""
    if row.get("tag") not in TAGS:
        return f"tag is {row.get('tag')!r}, not one of {', '.join(TAGS)}"
    if not row.get("include"):
        return "include names no object"
    for kind in ("include", "exclude"):
        for number, clause in enumerate(row.get(kind) or []):
            relation, earlier = clause.get("position") or (None, 0)
            known = {
                "class": clause.get("class") in CLASSES,
                "count": clause.get("count", 0) >= 1,
                "color": clause.get("color") in (None, *COLORS),
                "position": relation is None or (relation in RELATIONS and earlier in range(number)),
            }
            if wrong := [key for key, fits in known.items() if not fits]:
                return f"the {wrong[0]} of {kind} {number} is {clause.get(wrong[0])!r}"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Detection: MMDetection's test pipeline and its instance segmentation
# ----------------------------------------------------------------------------------------------------------------------


class Detection(NamedTuple):
    """A box in pixels of the image, whose right and lower edges lie outside it, and its mask, bool (height, width)."""

    x0: float
    y0: float
    x1: float
    y1: float
    score: float
    mask: np.ndarray


def detector_input(image: PILImage.Image, device: torch.device) -> tuple[torch.Tensor, tuple[int, int]]:
    """An RGB image as the detector takes it.

    Returns:
        Normalised pixels, float32 (3, height, width) with sides that are multiples of 32; (height, width) of the image
        in them, whose shorter side is 800 unless its longer one would exceed 1333.
    """
    pixels = torch.from_numpy(np.array(image)).to(device)
    scale = min(LONG_SIDE / max(image.size), SHORT_SIDE / min(image.size))
    high, wide = (int(side * scale + 0.5) for side in image.size[::-1])
    pixels = resize_bilinear(pixels, high, wide).permute(2, 0, 1)
    # Padding comes first: the grey of 128 is normalised, too.
    pixels = pad(pixels, (0, -wide % MULTIPLE, 0, -high % MULTIPLE), value=PADDING).float()
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std, (high, wide)


def resize_bilinear(pixels: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """OpenCV's bilinear resize of 8-bit pixels to the last bit: no antialiasing, weights of 11 bits, cut sums.

    Args:
        pixels: uint8 (height, width, channels).

    Returns:
        int32 (high, wide, channels), from 0 to 255.
    """
    first, second, left, right = resize_taps(pixels.shape[1], wide, pixels.device)
    pixels = pixels.int()
    rows = pixels[:, first] * left[:, None] + pixels[:, second] * right[:, None]
    first, second, upper, lower = resize_taps(pixels.shape[0], high, pixels.device)
    rows = rows >> 4
    upper, lower = (rows[i] * weight[:, None, None] >> 16 for i, weight in ((first, upper), (second, lower)))
    return (upper + lower + 2) >> 2


def resize_taps(old: int, new: int, device: torch.device) -> list[torch.Tensor]:
    """For each of `new` pixels in a line: the two of `old` pixels that it lies between, and their shares of 2048."""
    place = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    start = np.floor(place)
    share = place - start
    taps = [(start + step).clip(0, old - 1).astype(np.int64) for step in (0, 1)]
    taps += [np.rint(weight * 2048).astype(np.int32) for weight in (1 - share, share)]
    return [torch.from_numpy(tap).to(device) for tap in taps]


def find_objects(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    threshold: float,
    max_objects: int,
) -> dict[str, list[Detection]]:
    """The objects of one image.

    A query may stand for several classes: the 100 most probable of all pairs of query and class are candidates. The
    score of one is its probability times the mean confidence of the pixels in its mask.

    Args:
        class_logits: (queries, 80 + 1), the last for no object; mask_logits: (queries, height / 4, width / 4).
        padded, resized, original: (height, width) of the detector's input, of the image in it, and of the image.

    Returns:
        Class → detections by descending score, at most `max_objects` of a class.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    candidates, pairs = probabilities.flatten().topk(MAX_DETECTIONS)
    # The mask's confidence, at most 1, only lowers a score. So most candidates need no mask.
    kept = candidates > 0.99 * threshold
    candidates, pairs = candidates[kept], pairs[kept]
    if not len(pairs):
        return {}
    masks = mask_logits[pairs // probabilities.shape[1]][None]
    masks = interpolate(masks, size=tuple(padded), mode="bilinear", align_corners=False)
    masks = masks[:, :, : resized[0], : resized[1]]
    masks = interpolate(masks, size=tuple(original), mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    confidence = (masks.sigmoid() * inside).flatten(1).sum(dim=1) / (inside.float().flatten(1).sum(dim=1) + 1e-6)
    scores, labels = (candidates * confidence).cpu().numpy(), (pairs % probabilities.shape[1]).cpu().numpy()
    objects = {}
    # Scores are float32, and so is the threshold that they are compared with.
    for candidate in np.argsort(-scores, kind="stable")[: np.count_nonzero(scores > np.float32(threshold))]:
        found = objects.setdefault(CLASSES[labels[candidate]], [])
        if len(found) < max_objects:
            mask = inside[candidate].cpu().numpy()
            x, y = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
            box = map(float, (x[0], y[0], x[-1] + 1, y[-1] + 1))
            found.append(Detection(*box, float(scores[candidate]), mask))
    return objects


# ----------------------------------------------------------------------------------------------------------------------
# Colours: what CLIP sees of an object
# ----------------------------------------------------------------------------------------------------------------------


def masked_crop(image: PILImage.Image, found: Detection) -> PILImage.Image:
    """The object of an RGB image on grey, cut to its box."""
    blank = PILImage.new("RGB", image.size, BACKGROUND)
    return PILImage.composite(image, blank, PILImage.fromarray(found.mask)).crop(found[:4])


def clip_input(image: PILImage.Image, size: int) -> torch.Tensor:
    """OpenAI CLIP's transform of an RGB image: float32 (3, size, size)."""
    wide, high = image.size
    new = (size, int(size * high / wide)) if wide <= high else (int(size * wide / high), size)
    # The width first, then the height: a single call does so up to Pillow 12, but not always from 13.0 on.
    for step in ((new[0], high), new):
        image = image.resize(step, PILImage.Resampling.BICUBIC)
    return normalize(to_tensor(center_crop(image, size)), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


# Of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco. Transformers counts the decoder's first prediction as a layer.
OFFICIAL_SIZES = {"feature_size": 256, "mask_feature_size": 256, "hidden_dim": 256, "num_queries": 100}
OFFICIAL_SIZES |= {"encoder_layers": 6, "encoder_feedforward_dim": 1024, "decoder_layers": 10}
OFFICIAL_SIZES |= {"dim_feedforward": 2048, "num_attention_heads": 8}
OFFICIAL_BACKBONE = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
# MMDetection's keys → those of transformers' checkpoints on the Hub, each pattern in turn.
BACKBONE, DECODER = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
MASK_HEAD = "model.transformer_module.decoder.mask_predictor.mask_embedder."
DETECTOR_KEYS = (
    (r"^backbone\.patch_embed\.projection\.", rf"{BACKBONE}embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", rf"{BACKBONE}embeddings.norm."),
    (r"^backbone\.norm(\d)\.", lambda match: f"{BACKBONE}hidden_states_norms.stage{int(match[1]) + 1}."),
    (r"^backbone\.stages\.", rf"{BACKBONE}encoder.layers."),
    (r"\.attn\.w_msa\.relative", ".attention.self.relative"),
    (r"\.attn\.w_msa\.qkv\.", ".attention.self.in_proj_"),
    (r"\.attn\.w_msa\.proj\.", ".attention.output.dense."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"\.ffn\.layers\.0\.0\.", ".intermediate.dense."),
    (r"\.ffn\.layers\.1\.", ".output.dense."),
    (r"^panoptic_head\.pixel_decoder\.", DECODER),
    (r"\.input_convs\.(\d+)\.conv\.", r".input_projections.\1.0."),
    (r"\.input_convs\.(\d+)\.gn\.", r".input_projections.\1.1."),
    (r"\.lateral_convs\.0\.conv\.", ".adapter_1.0."),
    (r"\.lateral_convs\.0\.gn\.", ".adapter_1.1."),
    (r"\.output_convs\.0\.conv\.", ".layer_1.0."),
    (r"\.output_convs\.0\.gn\.", ".layer_1.1."),
    (r"\.level_encoding\.weight$", ".level_embed"),
    (r"\.mask_feature\.", ".mask_projection."),
    (r"^(model\..+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(model\..+)\.norms\.0\.", r"\1.self_attn_layer_norm."),
    (r"^(model\..+)\.norms\.1\.", r"\1.final_layer_norm."),
    (r"^panoptic_head\.transformer_decoder\.post_norm\.", "model.transformer_module.decoder.layernorm."),
    (r"^panoptic_head\.transformer_decoder\.", "model.transformer_module.decoder."),
    (r"\.attentions\.0\.attn\.", ".cross_attn."),
    (r"\.attentions\.1\.attn\.", ".self_attn."),
    (r"\.norms\.0\.", ".cross_attn_layer_norm."),
    (r"\.norms\.1\.", ".self_attn_layer_norm."),
    (r"\.norms\.2\.", ".final_layer_norm."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".fc1."),
    (r"\.ffns\.0\.layers\.1\.", ".fc2."),
    (r"^panoptic_head\.query_embed\.", "model.transformer_module.queries_embedder."),
    (r"^panoptic_head\.query_feat\.", "model.transformer_module.queries_features."),
    (r"^panoptic_head\.level_embed\.", "model.transformer_module.level_embed."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
    (r"^panoptic_head\.mask_embed\.(\d)\.", lambda match: f"{MASK_HEAD}{int(match[1]) // 2}.0."),
)
# Of transformers' model: no output depends on them, or, an index, they follow from the window's size.
MODEL_FILES = ("*.json", "*.txt", "*.safetensors")  # of a model on the Hub
UNUSED = (r"\.swin\.layernorm\.", r" criterion\.empty_weight$", r"\.relative_position_index$")


def load_detector(source: str) -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former for instances of the 80 classes, from what GenEval's `detector` may be."""
    found = read_detector(source)
    if isinstance(found, dict):
        sizes = Path(source).with_name("config.json")
        beside = source != "official" and sizes.exists()
        config = Mask2FormerConfig.from_json_file(sizes) if beside else official_config()
        weights = detector_weights(found.get("state_dict", found))
        return load_strictly(Mask2FormerForUniversalSegmentation, None, UNUSED, config=config, state_dict=weights)
    model = load_strictly(Mask2FormerForUniversalSegmentation, found, UNUSED)
    if model.config.num_labels != len(CLASSES):
        raise ValueError(f"detector {source} has {model.config.num_labels} classes, not the {len(CLASSES)} of COCO")
    return model


def read_detector(source: str) -> dict | str:
    """What MMDetection's file holds, or the folder of a model of transformers; downloaded if it is none here."""
    if source == "official":
        return torch.hub.load_state_dict_from_url(DETECTOR, map_location="cpu", check_hash=True, weights_only=True)
    if os.path.isfile(source):
        return torch.load(source, map_location="cpu", weights_only=True)
    return checkpoint_folder(HUB_DETECTOR if source == "hub" else source, *MODEL_FILES)


# Copied from qalign.checkpoint_folder
def checkpoint_folder(source: str, *patterns: str) -> str:
    """The folder of a checkpoint. Of a repository on the Hub, it downloads the files that match these patterns."""
    return source if os.path.isdir(source) else snapshot_download(source, allow_patterns=[*patterns])


def official_config() -> Mask2FormerConfig:
    backbone = SwinConfig(**OFFICIAL_BACKBONE, out_features=["stage1", "stage2", "stage3", "stage4"])
    return Mask2FormerConfig(backbone_config=backbone, num_labels=len(CLASSES), **OFFICIAL_SIZES)


def detector_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of MMDetection's Mask2Former under the keys of transformers' checkpoints."""
    renamed = {}
    for key, value in weights.items():
        name = key
        for pattern, new in DETECTOR_KEYS:
            name = re.sub(pattern, new, name)
        if name.endswith(".relative_position_index"):  # no weight: follows from the window's size
            continue
        if ".downsample." in name:
            # Four neighbours beside each other: the channel is the slower index there and the faster one here, and the
            # neighbours go row by row there and column by column here.
            shape = value.shape
            value = value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).reshape(shape)
        if ".self_attn.in_proj_" in name or ".attention.self.in_proj_" in name:
            parts = ("query", "key", "value") if ".attention.self." in name else ("q_proj", "k_proj", "v_proj")
            for part, tensor in zip(parts, value.chunk(3)):
                renamed[name.replace("in_proj_", f"{part}.")] = tensor
        else:
            renamed[name] = value
    return renamed


def load_strictly(
    model_class, source: str | None, unused: tuple[str, ...] = (), **options
) -> transformers.PreTrainedModel:
    """A transformers model in float32 for inference. ValueError if a weight is missing, unknown or of another size.
    `unused`: patterns of keys on which no output depends."""
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    transformers.utils.logging.set_verbosity_error()  # no report of the keys that differ: the error below names them
    model, info = model_class.from_pretrained(source, **options)
    transformers.utils.logging.set_verbosity_warning()
    wrong = [f"{kind} {key}" for kind in ("missing", "unexpected", "mismatched") for key in info[f"{kind}_keys"]]
    wrong = sorted(text for text in wrong if not any(re.search(pattern, text) for pattern in unused))
    if wrong:
        raise ValueError(f"{source or 'the weights'}: {len(wrong)} keys do not fit: {', '.join(wrong[:3])}")
    # Copies the weights out of the mapped file. Weights that are not aligned to 64 bytes give, on a CPU, other last
    # digits from run to run.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------


def read_metadata(source: str) -> list[dict]:
    """The rows of GenEval's metadata, a file or a URL. Raises ValueError that names what is wrong."""
    url = source if "://" in source else Path(source).absolute().as_uri()
    with urllib.request.urlopen(url, timeout=60) as response:
        lines = response.read().decode("utf-8-sig").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    GenEval.check_rows(rows)
    return rows


# Copied from dpg_bench.write_rows
def write_rows(file: Path, rows: list[dict]) -> None:
    """Writes a prompts file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write the prompts file")
    prompts.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    prompts.add_argument("--metadata", default=METADATA, help="file or URL. Default: the official file")
    args = parser.parse_args(words)
    rows = read_metadata(args.metadata)
    write_rows(args.output, rows)
    print(f"{args.output}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
