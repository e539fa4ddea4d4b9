# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["ftfy", "huggingface_hub", "numpy", "pillow", "spacy", "torch", "torchvision", "transformers"]
# ///
"""T2I-CompBench (Huang et al., NeurIPS 2023): six categories of compositional prompts, 300 prompts each.

    python -m spacy download en_core_web_sm
    python metrics/t2i_compbench.py prompts --categories color shape texture spatial non_spatial complex \
        --output compbench.jsonl
    python evaluate.py --prompts compbench.jsonl --category_column category --num_images_per_prompt 10 \
        --loras rankdpo=outputs/rankdpo-sdxl --metrics metrics/t2i_compbench.py:T2ICompBench \
        --output_dir outputs/compbench

The first two commands parse the official prompts once; scoring needs no spaCy. An image gets a number, at most 1 and
higher for better, for the category of its prompt:

- `color`, `shape`, `texture`: BLIP-VQA. The product of p(yes) over the prompt's noun phrases, each asked as a question.
- `spatial`: UniDet. How sure the detector is of both objects, and how well their boxes fit the relation.
- `non_spatial`: the cosine of CLIP ViT-B/32.
- `complex`: 3-in-1. The mean of BLIP-VQA and UniDet for prompts with a spatial relation, of BLIP-VQA and CLIP for those
  with an action, of all three for those with both.

As in the official code (github.com/Karine-Huang/T2I-CompBench, commit 1b70949): questions, objects, relations, the
subsets of `complex`, models, weights, preprocessing, formulas, and where it rounds. The official files hold every
prompt once, in one category only. Different:

- The official code parses with en_core_web_sm 3.5.0. Another version may tag a word differently; the prompts file shows
  what was asked and looked for.
- CLIP runs in float32 (the official code: float16 on a GPU), and cuts prompts at 77 tokens (the official code stops).
- The official images are drawn with 10 seeds per prompt, 42 to 51, as `--seed 42 --image_seeds counted` does.

Settings (`metrics/t2i_compbench.py:T2ICompBench,key=value,…`):

- `blip`: URL or file of BLIP's VQA weights in the official format. A `config.json` beside the file gives other sizes.
- `tokenizer`: folder or Hub id of BERT's vocabulary. `clip`: folder or Hub id of a CLIP.
- `detector`: `unidet`; a `.jsonl` file of detections that UniDet made elsewhere; or the folder or Hub id of a
  transformers detector with COCO labels, e.g. `hustvl/yolos-base`. Scores with the last are a variant, not comparable
  with published ones.
- `unidet`: weights of UniDet, see `unidet.py`.

A line of a `.jsonl` file of detections, the best detection first, boxes in pixels of the image that `unidet.resized`
makes (479 pixels high, if it is square), as the official detector sees it:

    {"image": "path/from/this/file.png", "detections": [["dog", 0.93, [12.5, 30.0, 200.1, 310.9]], ...]}

A model is loaded when the first image needs it, so only `spatial` and `complex` load a detector.
"""

import argparse
import hashlib
import html
import json
import math
import os
import re
import urllib.request
from functools import cached_property
from pathlib import Path

import ftfy
import numpy as np
import torch
import transformers
import unidet
from huggingface_hub import snapshot_download
from PIL import Image as PILImage
from torchvision.ops import box_iou
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
FOLDER = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/main/examples/dataset"
BLIP_WEIGHTS = (
    "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_base_vqa_capfilt_large.pth"
)
# What an image of a category is scored by; complex has parts for each prompt.
PARTS = {**dict.fromkeys(("color", "shape", "texture"), ["blip_vqa"]), "spatial": ["unidet"], "non_spatial": ["clip"]}
# The columns of the prompts file that a part needs, and their types.
COLUMNS = {"blip_vqa": {"questions": list}, "unidet": {"objects": list, "relation": str}, "clip": {"clip_text": str}}

TOKENIZER_FILES = ("*.json", "*.txt")  # of a model on the Hub
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of `unidet.resized`
Detection = tuple[str, float, Box]  # label, score, box


# ----------------------------------------------------------------------------------------------------------------------
# What is asked about a prompt. `doc` is a spaCy Doc: the parsed prompt.
# ----------------------------------------------------------------------------------------------------------------------


MAX_QUESTIONS = 8
NO_OBJECTS = ("top", "the side", "the left", "the right")  # noun chunks of "on top of", "on the left of", ...
# The first of these that the prompt contains is its relation, in this order. "on top of" is found, but scores nothing.
RELATIONS = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of")
RELATIONS += ("on top of",)
# In a complex prompt, the words that stand between the two objects.
BETWEEN = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
PEOPLE = ("girl", "boy", "man", "woman")  # UniDet's label for them is "person"


def prompt_row(prompt: str, category: str, parts: list[str], doc) -> dict:
    """The row of a prompt in the prompts file: what each part of its score needs. `doc` may be None for non_spatial."""
    row = {"prompt": prompt, "category": category, "parts": parts}
    if "blip_vqa" in parts:
        row["questions"] = noun_questions(doc)
    if "unidet" in parts:
        found = objects_around(doc) if category == "complex" else first_and_last_noun(doc)
        row["objects"] = ["person" if name in PEOPLE else name for name in found]
        row["relation"] = next((words for words in RELATIONS if words in prompt), "")
    if "clip" in parts:
        row["clip_text"] = without_adjectives(doc) if category == "complex" else prompt
    return row


def noun_questions(doc) -> list[str]:
    """A question for each noun phrase, in order: "a green bench?"."""
    chunks = [chunk.text for chunk in doc.noun_chunks if chunk.text not in NO_OBJECTS]
    return [f"{chunk}?" for chunk in chunks[:MAX_QUESTIONS]]


def first_and_last_noun(doc) -> list[str]:
    """The two objects of a spatial prompt. Raises ValueError if it has no noun."""
    nouns = [token.text for token in doc if token.pos_ == "NOUN"]
    if not nouns:
        raise ValueError(f"prompt {doc.text!r}: the parser finds no noun: take en_core_web_sm")
    return [nouns[0], nouns[-1]]


def objects_around(doc) -> list[str]:
    """The two objects of a complex prompt: the nouns next to the words of a relation. [] unless there are exactly two,
    as with two relations: then nothing counts as found."""
    found = []
    for start in range(len(doc)):
        length = next((n for n in (3, 2, 1) if doc[start : start + n].text in BETWEEN), None)
        if length:
            before = [token.text for token in doc[:start] if token.pos_ in ("NOUN", "PROPN")]
            found += before[-1:] + object_after(doc[start + length :])
    return found if len(found) == 2 else []


def object_after(tokens) -> list[str]:
    """The first noun; where there is none, the last word of the first proper name, unless that ends the prompt."""
    nouns = [token.text for token in tokens if token.pos_ == "NOUN"]
    names = [
        token.text
        for token, following in zip(tokens, tokens[1:])
        if (token.pos_, following.pos_ == "PROPN") == ("PROPN", False)
    ]
    return (nouns or names)[:1]


def without_adjectives(doc) -> str:
    """The text that CLIP sees of a complex prompt: words and punctuation with spaces between them."""
    return " ".join(token.text for token in doc if token.pos_ != "ADJ")


def complex_parts(prompt: str, spatial: list[str], action: list[str]) -> list[str]:
    """Which scores 3-in-1 averages for a prompt, given the official lists of spatial and of action prompts."""
    if subset_key(prompt) in map(subset_key, spatial):
        return ["blip_vqa", "unidet"]
    if subset_key(prompt) in map(subset_key, action):
        return ["blip_vqa", "clip"]
    return ["blip_vqa", "unidet", "clip"]


def subset_key(line: str) -> str:
    """What 3-in-1 compares prompts by: the text before the first full stop, lower case."""
    return line.strip("\n").split(".")[0].lower()


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------


FOUND_WEIGHT = 0.25  # of each object's detection score; the relation has the other half
LEAST_SCORE = 0.5  # a smaller one becomes 0: always, where only one object is found
NEAR_PIXELS = 150  # on either axis
TOUCHING_IOU = 0.1
BESIDE = ("next to", "on side of", "near")
# The axis, and the sign of the second object's centre minus the first's; y points down.
DIRECTIONS = {
    "on the left of": (0, 1),
    "on the right of": (0, -1),
    "on the top of": (1, 1),
    "on the bottom of": (1, -1),
}


def vqa_score(probabilities: list[float]) -> float:
    """BLIP-VQA of an image: the product of p(yes), 1 where there are no questions. The official code writes each
    probability, and the product, with four decimals."""
    return round4(math.prod(np.float32(round4(probability)) for probability in probabilities))


def round4(value: float) -> float:
    return float(f"{value:.4f}")


def spatial_score(detections: list[Detection], objects: list[str], relation: str) -> float:
    """UniDet's score of an image. Of the detections, the best first, only the first of each label counts. If the labels
    of the two objects are the same, both are the same detection. Without objects, nothing is found."""
    first = {}
    for label, score, box in detections:
        first.setdefault(label, (score, box))
    found = [first[name] for name in objects if name in first]
    total = sum(FOUND_WEIGHT * score for score, _ in found)
    if len(found) == 2:
        total += position_score(relation, *(box for _, box in found)) / 2
    return float(total) if total >= LEAST_SCORE else 0.0


def position_score(relation: str, box1: Box, box2: Box) -> float:
    """How well the first box stands in this relation to the second, 0 to 1; 0 for other relations than the official
    code knows, and "on top of" is one of them."""
    centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in (box1, box2)]
    delta = [second - first for first, second in zip(*centres)]
    distances = [abs(value) for value in delta]
    if relation in BESIDE:
        return 1.0 if min(distances) < NEAR_PIXELS else NEAR_PIXELS / max(distances)
    axis, sign = DIRECTIONS.get(relation, (0, 0))
    if delta[axis] * sign <= 0 or distances[axis] <= distances[1 - axis]:
        return 0.0
    iou = box_iou(*torch.tensor([[box1], [box2]], dtype=torch.float64)).item()  # NaN for two boxes without area
    return TOUCHING_IOU / iou if iou >= TOUCHING_IOU else 1.0


# ----------------------------------------------------------------------------------------------------------------------
# The metric
# ----------------------------------------------------------------------------------------------------------------------


class T2ICompBench:
    """The scores of images, for `evaluate.py`. The settings are at the top of this file. `batch_size`: images, and
    questions, that a model takes at once."""

    def __init__(
        self,
        device,
        batch_size: int,
        blip: str = BLIP_WEIGHTS,
        tokenizer: str = "google-bert/bert-base-uncased",
        clip: str = "openai/clip-vit-base-patch32",
        detector: str = "unidet",
        unidet: str = "official",
    ):
        self.device, self.batch_size = torch.device(device), batch_size
        self.sources = {"blip": blip, "tokenizer": tokenizer, "clip": clip, "detector": detector, "unidet": unidet}

    @staticmethod
    def check_rows(rows: list[dict]) -> None:
        """Raises ValueError that names the first row that lacks what it is scored by."""
        for number, row in enumerate(rows, 1):
            category, parts = row.get("category"), row.get("parts") or []
            wrong = [] if category in CATEGORIES else ["category"]
            wrong += [] if parts and set(parts) <= set(COLUMNS) else ["parts"]
            needed = {column: kind for part in parts if part in COLUMNS for column, kind in COLUMNS[part].items()}
            wrong += [column for column, kind in needed.items() if not isinstance(row.get(column), kind)]
            if wrong:
                problem = f"column {wrong[0]} is {row.get(wrong[0])!r}"
                make = "make the prompts file with `python metrics/t2i_compbench.py prompts`"
                raise ValueError(f"row {number} ({row.get('prompt')!r}): {problem}: {make}")

    @staticmethod
    def prepare(rows: list[dict], settings: dict) -> None:
        """Finds or downloads the weights that these rows need. Reads BLIP's: half a download ends the run now."""
        parts = {part for row in rows for part in row["parts"]}
        if "blip_vqa" in parts:
            read_weights(settings["blip"])
            checkpoint_folder(settings["tokenizer"], *TOKENIZER_FILES)
        if "clip" in parts:
            checkpoint_folder(settings["clip"], *MODEL_FILES)
        if "unidet" in parts and settings["detector"] == "unidet":
            unidet.find_files(settings["unidet"])
        elif "unidet" in parts and not os.path.isfile(settings["detector"]):
            checkpoint_folder(settings["detector"], *MODEL_FILES)

    @staticmethod
    def official(rows: list[dict], scores: dict[str, np.ndarray], settings: dict) -> dict[str, float]:
        """The benchmark's figure of each category: the mean over its images."""
        return {key: float(np.nanmean(values)) for key, values in scores.items() if not np.isnan(values).all()}

    @torch.inference_mode()
    def score(self, images: list[PILImage.Image], prompts: list[str], rows: list[dict]) -> list[dict[str, float]]:
        """For each image a number for each category: NaN but for that of its prompt."""
        functions = {"blip_vqa": self.vqa_scores, "unidet": self.spatial_scores, "clip": self.clip_scores}
        found = {}  # part → position of an image → its score
        for part, function in functions.items():
            chosen = [position for position, row in enumerate(rows) if part in row["parts"]]
            if chosen:
                values = function([images[position] for position in chosen], [rows[position] for position in chosen])
                found[part] = dict(zip(chosen, values, strict=True))
        scores = []
        for position, row in enumerate(rows):
            parts = [found[part][position] for part in functions if part in row["parts"]]
            scores.append(dict.fromkeys(CATEGORIES, math.nan) | {row["category"]: sum(parts) / len(parts)})
        return scores

    def vqa_scores(self, images: list[PILImage.Image], rows: list[dict]) -> list[float]:
        answers = self.vqa.probabilities(images, [row["questions"] for row in rows])
        return [vqa_score(probabilities) for probabilities in answers]

    def spatial_scores(self, images: list[PILImage.Image], rows: list[dict]) -> list[float]:
        found = self.detector.detect(images)
        return [spatial_score(one, row["objects"], row["relation"]) for one, row in zip(found, rows, strict=True)]

    def clip_scores(self, images: list[PILImage.Image], rows: list[dict]) -> list[float]:
        return self.clip.cosines(images, [row["clip_text"] for row in rows])

    @cached_property
    def vqa(self) -> "BlipVQA":
        return BlipVQA(self.device, self.batch_size, self.sources["blip"], self.sources["tokenizer"])

    @cached_property
    def clip(self) -> "ClipCosine":
        return ClipCosine(self.device, self.sources["clip"])

    @cached_property
    def detector(self):
        """An object with `detect(images) -> list[list[Detection]]`."""
        source = self.sources["detector"]
        if source == "unidet":
            return unidet.UniDet(self.device, weights=self.sources["unidet"])
        return StoredDetections(source) if os.path.isfile(source) else HubDetector(self.device, source)


# ----------------------------------------------------------------------------------------------------------------------
# BLIP-VQA
# ----------------------------------------------------------------------------------------------------------------------


# The published sizes. The transformers copy of these weights on the Hub is another one: 384 pixels, another epsilon.
BLIP_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BLIP_VISION |= {"patch_size": 16, "image_size": 480, "layer_norm_eps": 1e-6}
BLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BLIP_TEXT |= {"vocab_size": 30524, "max_position_embeddings": 512, "layer_norm_eps": 1e-12}
MAX_QUESTION_TOKENS = 35
MAX_QUESTION_WORDS = 50


class BlipVQA:
    """BLIP's model for visual question answering (Li et al., 2022): p(yes) against p(no) as an answer's first word."""

    def __init__(self, device: torch.device, batch_size: int, weights: str, tokenizer: str):
        self.device, self.batch_size = device, batch_size
        beside = Path(weights).with_name("config.json")
        if "://" not in weights and beside.is_file():
            config = transformers.BlipConfig.from_json_file(beside)
        else:
            config = transformers.BlipConfig(vision_config=BLIP_VISION, text_config=BLIP_TEXT)
        self.size = config.vision_config.image_size
        converted = blip_weights(read_weights(weights))
        model = load_strictly(transformers.BlipForQuestionAnswering, None, config=config, state_dict=converted)
        self.model = model.to(device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        # 30523, 30522, 2748 and 2053 in BERT's vocabulary
        words = ("[ENC]", "[DEC]", "yes", "no")
        self.encode, self.decode, self.yes, self.no = self.tokenizer.convert_tokens_to_ids(words)

    @torch.inference_mode()
    def probabilities(self, images: list[PILImage.Image], questions: list[list[str]]) -> list[list[float]]:
        """p(yes) / (p(yes) + p(no)) for each question about each image, 0 to 1.

        An image is encoded once, whatever the number of its questions. Questions of one length go together, none is
        padded: transformers' BLIP drops the mask of what the decoder attends to, so padding would change the answer.
        """
        answers = [[math.nan] * len(asked) for asked in questions]
        by_length = {}
        for position, asked in enumerate(questions):
            for slot, question in enumerate(asked):
                tokens = self.tokenize(question)
                by_length.setdefault(len(tokens), []).append((position, slot, tokens))
        states = self.encode_images(images) if by_length else None
        for same_length in by_length.values():
            for start in range(0, len(same_length), self.batch_size):
                positions, slots, tokens = zip(*same_length[start : start + self.batch_size])
                values = self.answer(states[list(positions)], torch.tensor(tokens, device=self.device))
                for position, slot, value in zip(positions, slots, values.tolist()):
                    answers[position][slot] = value
        return answers

    def tokenize(self, question: str) -> list[int]:
        ids = self.tokenizer(clean_question(question), truncation=True, max_length=MAX_QUESTION_TOKENS).input_ids
        return [self.encode, *ids[1:]]  # in the place of [CLS]

    def encode_images(self, images: list[PILImage.Image]) -> torch.Tensor:
        """(images, tokens, width), float32."""
        pixels = torch.stack([stretched_pixels(image, self.size) for image in images])
        return self.model.vision_model(pixels.to(self.device)).last_hidden_state

    def answer(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(n, tokens, width) of the images and (n, length) of the questions → (n,) probabilities."""
        asked = self.model.text_encoder(tokens, encoder_hidden_states=states, is_decoder=False).last_hidden_state
        start = torch.full((len(tokens), 1), self.decode, device=self.device)
        logits = self.model.text_decoder(start, encoder_hidden_states=asked).logits[:, 0].float()
        # Of the softmax over the vocabulary, p(yes) / (p(yes) + p(no)) is the sigmoid of the two logits' difference.
        return (logits[:, self.yes] - logits[:, self.no]).sigmoid()


def clean_question(question: str) -> str:
    """Lower case, without some punctuation; the question mark stays."""
    kept = "".join(letter for letter in question.lower() if letter not in '.!"()*#:;~').rstrip(" ")
    return " ".join(kept.split(" ")[:MAX_QUESTION_WORDS])


def stretched_pixels(image: PILImage.Image, size: int) -> torch.Tensor:
    """(3, size, size), float32, normalised: both sides are resized, whatever the image's shape."""
    # The width first, as Pillow did it in one call before 13.0; that rounds tall pictures in another way.
    narrow = image.convert("RGB").resize((size, image.height), PILImage.Resampling.BICUBIC)
    square = narrow.resize((size, size), PILImage.Resampling.BICUBIC)
    return normalize(to_tensor(square), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """The state dict of BLIP's checkpoint, a URL or a file."""
    if "://" in source:
        return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)["model"]
    return torch.load(source, map_location="cpu", weights_only=True)["model"]


# Copied from qalign.checkpoint_folder
def checkpoint_folder(source: str, *patterns: str) -> str:
    """The folder of a checkpoint. Of a repository on the Hub, it downloads the files that match these patterns."""
    return source if os.path.isdir(source) else snapshot_download(source, allow_patterns=[*patterns])


# Regular expressions that turn BLIP's names of the image model into those of transformers, in turn. The text models'
# names are the same.
BLIP_NAMES = {
    r"^visual_encoder\.cls_token": "vision_model.embeddings.class_embedding",
    r"^visual_encoder\.pos_embed": "vision_model.embeddings.position_embedding",
    r"^visual_encoder\.patch_embed\.proj\.": "vision_model.embeddings.patch_embedding.",
    r"^visual_encoder\.blocks\.": "vision_model.encoder.layers.",
    r"^visual_encoder\.norm\.": "vision_model.post_layernorm.",
    r"^(vision_model\..*)\.norm(\d)\.": r"\1.layer_norm\2.",
    r"^(vision_model\..*)\.attn\.qkv\.": r"\1.self_attn.qkv.",
    r"^(vision_model\..*)\.attn\.proj\.": r"\1.self_attn.projection.",
}
ANSWER = "text_decoder.cls.predictions"
# One tensor under two names; transformers shares it by itself.
SHARED = {
    f"{ANSWER}.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    f"{ANSWER}.decoder.bias": f"{ANSWER}.bias",
}


def blip_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BLIP's state dict under the names of transformers.BlipForQuestionAnswering."""
    converted = {}
    for key, value in weights.items():
        if key in SHARED and not torch.equal(value, weights[SHARED[key]]):
            raise ValueError(f"{key} differs from {SHARED[key]}")
        if key in SHARED or key.endswith(".position_ids"):  # 0, 1, 2, ...: no weights
            continue
        for pattern, name in BLIP_NAMES.items():
            key = re.sub(pattern, name, key)
        converted[key] = value
    return converted


# Copied from geneval.load_strictly
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
# CLIP
# ----------------------------------------------------------------------------------------------------------------------


class ClipCosine:
    """The cosine of CLIP's image and text features, as it is: neither scaled nor cut at 0."""

    def __init__(self, device: torch.device, source: str):
        self.device = device
        self.model = load_strictly(transformers.CLIPModel, source).to(device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.size = self.model.config.vision_config.image_size

    @torch.inference_mode()
    def cosines(self, images: list[PILImage.Image], texts: list[str]) -> list[float]:
        pixels = torch.stack([cropped_pixels(image, self.size) for image in images]).to(self.device)
        # Attention is causal and the feature is that of the end token, so padding to its right has no effect.
        options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        tokens = self.tokenizer([clean_text(text) for text in texts], **options).to(self.device)
        seen = self.model.get_image_features(pixels).pooler_output
        read = self.model.get_text_features(**tokens).pooler_output
        return torch.nn.functional.cosine_similarity(seen, read).tolist()


def cropped_pixels(image: PILImage.Image, size: int) -> torch.Tensor:
    """(3, size, size), float32, normalised: the shorter side to `size`, then the middle."""
    small = center_crop(resize(image.convert("RGB"), size, InterpolationMode.BICUBIC), size)
    return normalize(to_tensor(small), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


# Copied from build_synpic.clean_text
def clean_text(text: str) -> str:
    """OpenAI CLIP's cleaning of a prompt, which transformers' tokenizer does not do."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


# ----------------------------------------------------------------------------------------------------------------------
# Detectors other than UniDet
# ----------------------------------------------------------------------------------------------------------------------


class HubDetector:
    """A transformers detector with labels of its own, a variant of the benchmark."""

    def __init__(self, device: torch.device, source: str, threshold: float = 0.5):
        self.device, self.threshold = device, threshold
        self.processor = transformers.AutoImageProcessor.from_pretrained(source)
        self.model = load_strictly(transformers.AutoModelForObjectDetection, source).to(device)

    @torch.inference_mode()
    def detect(self, images: list[PILImage.Image]) -> list[list[Detection]]:
        """One image at a time: the processor pads those of a batch."""
        return [self.detect_one(unidet.resized(image)) for image in images]

    def detect_one(self, image: PILImage.Image) -> list[Detection]:
        output = self.model(**self.processor(images=image, return_tensors="pt").to(self.device))
        sizes = [(image.height, image.width)]
        found = self.processor.post_process_object_detection(output, self.threshold, target_sizes=sizes)[0]
        names = [self.model.config.id2label[label] for label in found["labels"].tolist()]
        detections = zip(names, found["scores"].tolist(), map(tuple, found["boxes"].tolist()))
        return sorted(detections, key=lambda detection: -detection[1])


class StoredDetections:
    """Detections from a file, see the top of this file. An image is known by its pixels, whatever its file's name."""

    def __init__(self, file: str):
        self.file, self.known = file, {}
        for line in Path(file).read_text().splitlines():
            record = json.loads(line)
            found = [(label, float(score), tuple(map(float, box))) for label, score, box in record["detections"]]
            path = Path(file).parent / record["image"]
            with PILImage.open(path) as image:
                self.known[pixel_digest(image)] = found

    def detect(self, images: list[PILImage.Image]) -> list[list[Detection]]:
        found = [self.known.get(pixel_digest(image)) for image in images]
        if None in found:
            raise ValueError(f"{self.file} has no detections for an image: run the detector on all images")
        return found


def pixel_digest(image: PILImage.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The prompts file
# ----------------------------------------------------------------------------------------------------------------------


def make_rows(folder: str, categories: list[str], parse) -> list[dict]:
    """The rows of the categories' official files, in their order. `folder`: folder or URL of `color_val.txt` and so on;
    `parse`: prompt → spaCy Doc."""
    rows = {}
    subsets = ("spatial", "action") if "complex" in categories else ()
    lists = [read_lines(folder, f"complex_val_{kind}.txt") for kind in subsets]
    for category in categories:
        for prompt in read_lines(folder, f"{category}_val.txt"):
            parts = complex_parts(prompt, *lists) if category == "complex" else PARTS[category]
            doc = None if category == "non_spatial" else parse(prompt)
            earlier = rows.setdefault(prompt, prompt_row(prompt, category, parts, doc))
            if earlier["category"] != category:  # evaluate.py keeps one row of a prompt
                raise ValueError(f"prompt {prompt!r} is in {earlier['category']} and in {category}: make two files")
    return list(rows.values())


def read_lines(folder: str, name: str) -> list[str]:
    """The lines of a file in a folder or under a URL, without empty ones."""
    folder = folder.rstrip("/") if "://" in folder else Path(folder).absolute().as_uri()
    with urllib.request.urlopen(f"{folder}/{name}", timeout=60) as response:
        lines = response.read().decode("utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


# Copied from dpg_bench.write_rows
def write_rows(file: Path, rows: list[dict]) -> None:
    """Writes a prompts file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


def load_parser(name: str):
    """The spaCy pipeline of this name."""
    import spacy

    try:
        return spacy.load(name)
    except OSError:
        raise SystemExit(f"spaCy has no model {name} here: python -m spacy download {name}") from None


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="Make the prompts file.")
    prompts.add_argument("--categories", nargs="+", choices=CATEGORIES, default=list(CATEGORIES))
    prompts.add_argument("--folder", default=FOLDER, help="Folder or URL of the official files, e.g. color_val.txt.")
    prompts.add_argument("--parser", default="en_core_web_sm", help="spaCy model: its name or folder.")
    prompts.add_argument("--output", type=Path, required=True, help="The .jsonl file to write.")
    args = parser.parse_args(words)
    parse = None if args.categories == ["non_spatial"] else load_parser(args.parser)
    rows = make_rows(args.folder, args.categories, parse)
    write_rows(args.output, rows)
    version = f", parsed by {args.parser} {parse.meta['version']}" if parse else ""
    print(f"{args.output}: {len(rows)} prompts{version}")


if __name__ == "__main__":
    main()
