# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "huggingface_hub", "numpy", "pandas", "pillow", "pyyaml", "safetensors", "torch", "torchvision", "transformers",
# ]
# ///
"""DPG-Bench (Hu et al., 2024, "ELLA"): 1,065 long prompts. A question answering model, mPLUG-large, is asked about each
proposition of a prompt. The score of an image is the share of questions it answers with yes.

    python metrics/dpg_bench.py prompts --output dpg.jsonl
    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=outputs/rankdpo-sdxl --prompts dpg.jsonl --num_images_per_prompt 4 \
        --metrics metrics/dpg_bench.py:DPGBench --output_dir outputs/dpg

As in the official code (github.com/TencentQQGYLab/ELLA, commit 3c228f1, and github.com/modelscope/modelscope, commit
2905da1): the questions, mPLUG in float32, its beam search. An answer counts if it is exactly "yes". A question whose
parent failed counts as failed. This goes through the propositions in the order of the CSV, so the failure passes on to
children further down. Scores are means over the questions, then over a prompt's images, then over the prompts, × 100.
The scores of the categories are means over all questions of a category. They are made of the answers themselves: the
official code does not apply the dependencies there.

A variant: the official code cuts a picture into its 2×2 parts; here each part is an image.

With `quirks=true`, the metric also does the following, as the official script does:

- The first row of the CSV is left out.
- A prompt is dropped if a question of it has a parent that is not there, such as that of the first row: looking for its
  score raises an exception. (A parent that failed, named before it, ends the search without one.) Without `quirks`,
  such a parent is ignored.
- If the CSV has rows of a prompt in several places, only the last place counts.
- The scores of the categories are those of each prompt's last image.

Not imitated: run with several processes, the official script goes through the categories as each process happens to
order a set of strings, so the scores that it prints for a category can be those of others.
"""

import argparse
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import normalize, to_tensor
from transformers import BertConfig, BertTokenizer, CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.bert import modeling_bert as bert


CSV = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
CATEGORIES = ("global", "entity", "attribute", "relation", "other")  # the L1 categories
COLUMNS = ("proposition_ids", "dependencies", "questions", "category_broad", "category_detailed", "csv_rows")
MODELSCOPE = "https://modelscope.cn/api/v1/models/{}/repo?Revision=master&FilePath={}"
# The published mPLUG-large for visual question answering, in the words of its config.yaml and its config_bert.json.
MPLUG = {"image_res": 504, "clip_vision_layers": 24, "clip_vision_width": 1024, "clip_vision_patch_size": 14}
MPLUG |= {"beam_size": 5, "max_length": 10, "min_length": 1}
BERT = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BERT |= {"intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
BERT |= {"text_encoder_layers": 6, "fusion_layers": 6, "text_decode_layers": 12}
BERT |= {"stride_layer": 100}  # every so many fusion layers take image and text as one sequence; here none does
QUESTION_LENGTH = 25  # tokens: a longer question is cut, a shorter one padded
START, END = 101, 102  # tokens of an answer, [CLS] and [SEP]


class Proposition(NamedTuple):
    parents: list[int]  # ids of propositions; 0 stands for none
    question: str
    categories: tuple[str, str]  # L1 and L2, in words fit for the name of a metric


def propositions(row: dict, quirks: bool) -> dict[int, Proposition]:
    """A prompt's propositions by id, in the order of the CSV. Of two with the same id, the later one counts."""
    asked = {}
    for i, number in enumerate(row["proposition_ids"]):
        if quirks and row["csv_rows"][i] == 0:
            continue
        if quirks and i and row["csv_rows"][i] != row["csv_rows"][i - 1] + 1:
            asked = {}
        categories = category_keys(row["category_broad"][i], row["category_detailed"][i])
        asked[number] = Proposition(row["dependencies"][i], row["questions"][i], categories)
    return asked


def category_keys(broad: str, detailed: str) -> tuple[str, str]:
    """Keys of an L1 and an L2 category: ("attribute", "attribute - color") → ("attribute", "attribute_color"). An L2
    category without a name of its own, "global -", gets its L1's: "global_global"."""
    broad, detailed = (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in (broad, detailed))
    return broad, f"{broad}_{broad}" if detailed == broad else detailed


def apply_dependencies(asked: dict[int, Proposition], right: dict[int, bool], quirks: bool) -> dict[int, bool] | None:
    """Answers with the dependencies applied: a question fails if a parent failed. One pass in the order of the CSV: a
    question that fails for its parent fails its own children behind it. None if the official code raises an exception,
    because it looks for a parent that is not there."""
    right = dict(right)
    for number, proposition in asked.items():
        for parent in filter(None, proposition.parents):
            if quirks and parent not in right:
                return None
            if not right.get(parent, True):
                right[number] = False
                break
    return right


def image_scores(asked: dict[int, Proposition], right: dict[int, bool], quirks: bool) -> dict[str, float]:
    """One image's scores, 0 to 100: `score`, with dependencies, and a mean per L1 and L2 category, without. Each L1 has
    an entry, NaN if the prompt has no question of it. All are NaN if the official code drops the prompt."""
    keys = dict.fromkeys([*CATEGORIES, *(key for proposition in asked.values() for key in proposition.categories)])
    final = apply_dependencies(asked, right, quirks)
    if not final:  # dropped, or there is no question
        return dict.fromkeys(["score", *keys], math.nan)
    counted = {"score": [*final.values()]}
    for key in keys:
        counted[key] = [right[number] for number, proposition in asked.items() if key in proposition.categories]
    return {key: 100 * pd.Series(values, dtype=float).mean() for key, values in counted.items()}


def beam_search(
    next_log_probs: Callable, n: int, beam_size: int, max_length: int, min_length: int, device="cpu"
) -> list[tuple[list[int], float]]:
    """mPLUG's beam search: the best answer to each of n questions, as (tokens from START, score).

    `next_log_probs(sequences, questions)` takes int64 (m, beam_size, length) and the numbers of m questions, int64
    (m,). It returns log probabilities of the next token, (m, beam_size, vocabulary).

    A score is the log probability over ((5 + length) / 6) ** 0.6. The search ends for a question when its first beam
    takes END or reaches max_length; then all its beams are candidates. Those that took END before are candidates too,
    and a beam that did goes on after it.
    """
    sequences = torch.full((n, beam_size, 1), START, device=device)
    totals = torch.full((n, beam_size), -math.inf, device=device)
    totals[:, 0] = 0  # the beams are still the same: only the first counts
    questions = torch.arange(n, device=device)
    candidates = [[] for _ in range(n)]
    for length in range(1, max_length + 1):
        log_probs = next_log_probs(sequences, questions)
        if length <= min_length:
            log_probs[..., END] = -1e20
        penalty = ((5 + length) / 6) ** 0.6
        scores, picks = ((totals[..., None] + log_probs) / penalty).flatten(1).topk(beam_size)
        totals = scores * penalty
        beams, tokens = picks // log_probs.shape[-1], picks % log_probs.shape[-1]
        sequences = sequences.gather(1, beams[..., None].expand_as(sequences))
        sequences = torch.cat([sequences, tokens[..., None]], dim=-1)
        ended, numbers = (tokens == END) | (length == max_length), questions.tolist()
        done = ended[:, 0]
        for row, beam in (ended | done[:, None]).nonzero().tolist():
            candidates[numbers[row]].append((sequences[row, beam].tolist(), scores[row, beam].item()))
        sequences, totals, questions = sequences[~done], totals[~done], questions[~done]
        if not len(questions):
            break
    return [max(found, key=lambda candidate: candidate[1]) for found in candidates]


class DPGBench:
    """DPG-Bench's scores of an image, for `evaluate.py`.

    `model`: mPLUG-large for visual question answering: `modelscope:ID`, an id on the Hub, or a folder. In it
    pytorch_model.bin or model.safetensors, vocab.txt, and for other than the published sizes config.yaml and
    config_bert.json. `quirks`: do what the official code does by mistake, too (see above).
    """

    def __init__(
        self,
        device: torch.device,
        batch_size: int,
        model: str = "modelscope:iic/mplug_visual-question-answering_coco_large_en",
        quirks: bool = False,
    ):
        folder = model_folder(model)
        self.device, self.batch_size, self.quirks = device, batch_size, quirks
        self.tokenizer, self.model = load_tokenizer(folder), load_mplug(folder).to(device)

    @torch.inference_mode()
    def score(self, images: list, prompts: list[str], rows: list[dict]) -> list[dict[str, float]]:
        """For each image `score`, one entry per L1 category (global, entity, attribute, relation, other), and one per
        L2 category of the prompt (attribute_color, ...). All from 0 to 100; NaN: does not apply."""
        scores = []
        for image, row in zip(images, rows, strict=True):
            asked = propositions(row, self.quirks)
            answers = self.answer(image, [proposition.question for proposition in asked.values()])
            right = {number: answer == "yes" for number, answer in zip(asked, answers)}
            scores.append(image_scores(asked, right, self.quirks))
        return scores

    @torch.inference_mode()
    def answer(self, image: Image.Image, questions: list[str]) -> list[str]:
        """mPLUG's answers. The image is encoded once; `batch_size` questions are answered at a time."""
        pixels = prepare(image, self.model.config["image_res"])[None].to(self.device)
        tokens, answers = self.model.encode_image(pixels), []
        for start in range(0, len(questions), self.batch_size):
            batch = self.tokenize(questions[start : start + self.batch_size])
            found = self.model.answer(tokens, batch.input_ids, batch.attention_mask.bool())
            answers += [self.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in found]
        return answers

    def tokenize(self, questions: list[str]):
        """int64 `input_ids` and `attention_mask`, each (n, QUESTION_LENGTH)."""
        texts, length = [question.lower() for question in questions], QUESTION_LENGTH
        batch = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return batch.to(self.device)

    @staticmethod
    def prepare(rows: list[dict], settings: dict) -> None:
        """Finds or downloads the model, and reads it: an incomplete file ends the run now, not after the drawing."""
        folder = model_folder(settings["model"])
        load_tokenizer(folder)
        read_weights(folder)

    @staticmethod
    def check_rows(rows: list[dict]) -> None:
        """Raises ValueError unless each row has what `prompts` writes."""
        for number, row in enumerate(rows, 1):
            lengths = {len(row[column]) if isinstance(row.get(column), list) else 0 for column in COLUMNS}
            if len(lengths) > 1 or 0 in lengths:
                problem = f"{', '.join(COLUMNS)} must be lists with one entry for each question"
                mend = "make the file with `python metrics/dpg_bench.py prompts`"
                raise ValueError(f"row {number}, prompt {row['prompt'][:60]!r}: {problem}; {mend}")

    @staticmethod
    def official(rows: list[dict], scores: dict[str, np.ndarray], settings: dict) -> dict[str, float]:
        """The benchmark's summary, 0 to 100: `score`, and one figure per L1 and L2 category that has questions."""
        quirks = settings["quirks"]
        known = np.isfinite(scores["score"])
        if quirks:  # an exception at one image drops the whole prompt
            known = known & known.all(axis=1, keepdims=True)
        if not known.any():
            return {}
        images = known.sum(axis=1)
        sums = np.where(known, scores["score"], 0).sum(axis=1)
        summary = {"score": float((sums[images > 0] / images[images > 0]).mean())}
        counts = [
            Counter(key for proposition in propositions(row, quirks).values() for key in proposition.categories)
            for row in rows
        ]
        for key in [key for key in scores if key != "score"]:
            # An image's score of a category is a mean over its questions; the figure is the mean over all questions.
            weights = np.array([count[key] for count in counts])[:, None] * (known & np.isfinite(scores[key]))
            if quirks:
                weights[:, :-1] = 0
            if weights.any():
                summary[key] = float((weights * np.nan_to_num(scores[key])).sum() / weights.sum())
        return summary


def prepare(image: Image.Image, size: int) -> torch.Tensor:
    """Stretches an image to a square; float32 (3, size, size) in CLIP's normalisation."""
    # The width first, as Pillow did it in one call before 13.0; that rounds tall pictures in another way.
    image = image.convert("RGB").resize((size, image.height), Image.Resampling.BICUBIC)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return normalize(to_tensor(image), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


class MPlug(torch.nn.Module):
    """mPLUG (Li et al., 2022) for visual question answering.

    CLIP's image tokens; a BERT for the question; fusion layers, in which the question attends to the image; a decoder
    that attends to both and writes the answer. `config` has the entries of MPLUG and BERT.

    All questions of a batch are about one image and share its keys and values.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config, width = config, config["hidden_size"]
        vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config["clip_vision_width"],
                intermediate_size=4 * config["clip_vision_width"],
                num_hidden_layers=config["clip_vision_layers"],
                num_attention_heads=config["clip_vision_width"] // 64,
                image_size=config["image_res"],
                patch_size=config["clip_vision_patch_size"],
            )
        )
        self.vision = getattr(vision, "vision_model", vision)  # older versions of transformers nest it
        self.visn_fc = torch.nn.Linear(config["clip_vision_width"], width)
        self.visn_layer_norm = torch.nn.LayerNorm(width, eps=1e-12)
        sizes = BertConfig(**{name: config[name] for name in BERT})
        self.text_embeddings, self.answer_embeddings = bert.BertEmbeddings(sizes), bert.BertEmbeddings(sizes)
        self.text_encoder = torch.nn.ModuleList(BertLayer(sizes, cross=False) for _ in range(sizes.text_encoder_layers))
        self.fusion = torch.nn.ModuleList(BertLayer(sizes, cross=True) for _ in range(sizes.fusion_layers))
        self.decoder = torch.nn.ModuleList(BertLayer(sizes, cross=True) for _ in range(sizes.text_decode_layers))
        self.transform = bert.BertPredictionHeadTransform(sizes)
        self.vocabulary_bias = torch.nn.Parameter(torch.zeros(config["vocab_size"]))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 3, image_res, image_res) → image tokens (n, patches + 1, width)."""
        tokens = self.vision.post_layernorm(self.vision(pixels).last_hidden_state)
        return self.visn_layer_norm(self.visn_fc(tokens))

    def fuse(self, image: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of one image (1, patches + 1, width), and of n questions: ids, int64 (n, QUESTION_LENGTH), and which
        of them are no padding, bool. Returns image tokens (1 or n, patches + 1, width; n if fusion layers change them)
        and question tokens (n, QUESTION_LENGTH, width)."""
        text, mask = self.text_embeddings(ids), seen[:, None, None]
        for layer in self.text_encoder:
            text = layer(text, mask)
        for number, layer in enumerate(self.fusion):
            if number and number % self.config["stride_layer"] == 0:  # image and text as one sequence
                image = image.expand(len(ids), -1, -1)
                all_seen = torch.cat([mask.new_ones(*mask.shape[:3], image.shape[1]), mask], dim=-1)
                both = layer.feed_forward(layer.attend(torch.cat([image, text], dim=1), all_seen))
                image, text = image + both[:, : image.shape[1]], both[:, image.shape[1] :]
            else:
                text = layer(text, mask, [(*layer.crossattention.keys_and_values(image), None)])
        return image, text

    def contexts(self, image: torch.Tensor, text: torch.Tensor, seen: torch.Tensor) -> list[list[tuple]]:
        """What each layer of the decoder attends to: keys, values and mask of the image and of the questions."""
        return [
            [
                (*layer.crossattention.keys_and_values(image), None),
                (*layer.crossattention.keys_and_values(text), seen[:, None, None]),
            ]
            for layer in self.decoder
        ]

    def logits(self, sequences: torch.Tensor, contexts: list[list[tuple]]) -> torch.Tensor:
        """Beams of answers so far, int64 (n, beams, length) → logits of the next token (n, beams, vocabulary)."""
        n, beams, length = sequences.shape
        tokens = self.answer_embeddings(sequences.flatten(0, 1))
        past = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for layer, context in zip(self.decoder, contexts):
            tokens = layer.attend(tokens, past)
            # The beams of a question have the same context, so they can be one sequence here.
            tokens = layer.crossattention(tokens.reshape(n, beams * length, -1), context)
            tokens = layer.feed_forward(tokens).reshape(n * beams, length, -1)
        words = self.answer_embeddings.word_embeddings.weight
        return (self.transform(tokens[:, -1]) @ words.T + self.vocabulary_bias).reshape(n, beams, -1)

    def answer(self, image: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor) -> list[tuple[list[int], float]]:
        """Arguments as for `fuse`. The tokens and the score of each answer (see `beam_search`)."""
        contexts = self.contexts(*self.fuse(image, ids, seen), seen)

        def next_log_probs(sequences: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
            of_questions = [[choose(part, questions) for part in context] for context in contexts]
            return self.logits(sequences, of_questions).softmax(dim=-1).log()

        sizes = (self.config[name] for name in ("beam_size", "max_length", "min_length"))
        return beam_search(next_log_probs, len(ids), *sizes, device=ids.device)


def choose(part: tuple, questions: torch.Tensor) -> tuple:
    """Keys, values and mask of these questions. What all questions share stays as it is."""
    return tuple(tensor if tensor is None or len(tensor) == 1 else tensor[questions] for tensor in part)


class BertAttention(torch.nn.Module):
    """Attention over one or more groups of tokens, then a linear layer, the residual and a layer norm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query, self.key, self.value = (torch.nn.Linear(width, width) for _ in range(3))
        self.output = bert.BertSelfOutput(config)

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split_heads(self.key(tokens)), self.split_heads(self.value(tokens))

    def forward(self, tokens: torch.Tensor, context: list[tuple]) -> torch.Tensor:
        """`tokens` (n, t, width); `context`: groups of keys, values, each (n or 1, heads, m, width / heads), and a mask
        that broadcasts to (n, heads, t, m), True where seen, or None."""
        query = self.split_heads(self.query(tokens))
        query, scores = query / math.sqrt(query.shape[-1]), []
        for keys, _, mask in context:
            found = shared_matmul(query, keys.transpose(-1, -2))
            scores.append(found if mask is None else found.masked_fill(~mask, -math.inf))
        weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([part.shape[-1] for part in scores], dim=-1)
        mixed = sum(shared_matmul(weight, values) for weight, (_, values, _) in zip(weights, context))
        return self.output(mixed.transpose(1, 2).flatten(2), tokens)


def shared_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(n, h, t, k) times (n or 1, h, k, m). One `right` for all is not copied n times."""
    return left @ right if len(right) == len(left) else torch.einsum("nhtk,hkm->nhtm", left, right[0])


class BertLayer(torch.nn.Module):
    """A layer of BERT, with or without cross-attention."""

    def __init__(self, config: BertConfig, cross: bool):
        super().__init__()
        self.attention = BertAttention(config)
        if cross:
            self.crossattention = BertAttention(config)
        self.intermediate, self.output = bert.BertIntermediate(config), bert.BertOutput(config)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, context: list[tuple] = ()) -> torch.Tensor:
        tokens = self.attend(tokens, mask)
        return self.feed_forward(self.crossattention(tokens, context) if context else tokens)

    def attend(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.attention(tokens, [(*self.attention.keys_and_values(tokens), mask)])

    def feed_forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(tokens), tokens)


def model_folder(model: str) -> Path:
    """The folder with a model's files, downloaded if `model` is none."""
    if os.path.isdir(model):
        return Path(model)
    if not model.startswith("modelscope:"):
        files = ["*.yaml", "*.json", "vocab.txt", "model.safetensors", "pytorch_model.bin"]
        return Path(snapshot_download(model, allow_patterns=files))
    name = model.removeprefix("modelscope:")
    folder = Path(torch.hub.get_dir()) / "modelscope" / name.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.yaml", "config_bert.json", "vocab.txt", "pytorch_model.bin"):
        if not (folder / file).exists():
            torch.hub.download_url_to_file(MODELSCOPE.format(name, file), str(folder / file))
    return folder


def load_tokenizer(folder: Path) -> BertTokenizer:
    """BERT's tokenizer. With fewer words than the model has, some would be read as unknown, without an error."""
    tokenizer, expected = BertTokenizer.from_pretrained(folder), load_config(folder)["vocab_size"]
    if len(tokenizer) != expected:
        raise ValueError(f"{folder / 'vocab.txt'} has {len(tokenizer)} words, not {expected}: is the file whole?")
    return tokenizer


def load_config(folder: Path) -> dict:
    """MPLUG and BERT, with what the folder's config.yaml and config_bert.json say instead."""
    config = {}
    for file, parse, known in (("config.yaml", yaml.safe_load, MPLUG), ("config_bert.json", json.loads, BERT)):
        found = parse((folder / file).read_text()) if (folder / file).is_file() else {}
        config |= {key: found.get(key, value) for key, value in known.items()}
    return config


# Regular expressions that turn keys of MPlug into those of the official checkpoint, in turn.
RENAMES = {
    r"^vision\.": "visual_encoder.visual.",
    r"embeddings\.patch_embedding": "conv1",
    r"embeddings\.class_embedding": "class_embedding",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"pre_layrnorm": "ln_pre",
    r"post_layernorm": "ln_post",
    r"encoder\.layers": "transformer.resblocks",
    r"layer_norm(\d)": r"ln_\1",
    r"self_attn\.": "attn.",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"attention\.(query|key|value)\.": r"attention.self.\1.",
    r"^text_encoder\.": "text_encoder.encoder.layer.",
    r"^text_embeddings\.": "text_encoder.embeddings.",
    r"^fusion\.": "fusion_encoder.encoder.layer.",
    r"^decoder\.": "text_decoder.bert.encoder.layer.",
    r"^answer_embeddings\.": "text_decoder.bert.embeddings.",
    r"^transform\.": "text_decoder.cls.predictions.transform.",
    r"^vocabulary_bias": "text_decoder.cls.predictions.bias",
}
# The official checkpoint has these twice. The official code loads both into one tensor, and what it loads last counts.
TWINS = {
    "text_decoder.bert.embeddings.word_embeddings.weight": "text_decoder.cls.predictions.decoder.weight",
    "text_decoder.cls.predictions.bias": "text_decoder.cls.predictions.decoder.bias",
}
# What answers do not need: the moving averages of training, CLIP's text tower and projection, numbers of positions.
UNUSED = re.compile(
    r"(\w+_m\.|visual_encoder\.(transformer\.|token_embedding|positional_embedding|ln_final|text_projection|logit_scale)"
    r"|visual_encoder\.visual\.proj$|.*\.position_ids$)"
)


def official_key(key: str, first_fusion_layer: int) -> str:
    """The official checkpoint's key for a key of MPlug. It has all three projections of CLIP's attention in one."""
    key = re.sub(r"^fusion\.(\d+)", lambda match: f"fusion.{int(match[1]) + first_fusion_layer}", key)
    for pattern, replacement in RENAMES.items():
        key = re.sub(pattern, replacement, key)
    return re.sub(r"attn\.[qkv]_proj\.", "attn.in_proj_", key)


def convert_weights(weights: dict[str, torch.Tensor], model: MPlug) -> dict[str, torch.Tensor]:
    """The official checkpoint's tensors under the keys of `model`. Those that no key stands for keep their own."""
    first = max(0, model.config["num_hidden_layers"] - model.config["fusion_layers"])
    never_run = tuple(f"fusion_encoder.encoder.layer.{i}." for i in range(first))
    converted, used = {}, set()
    for key in model.state_dict():
        source = official_key(key, first)
        twin = TWINS.get(source)
        used |= {source, twin}
        source = twin if twin in weights else source
        if source in weights:
            part = "qkv".index(key.split("_proj.")[0][-1]) if ".in_proj_" in source else None
            converted[key] = weights[source] if part is None else weights[source].chunk(3)[part]
    unknown = {key for key in weights.keys() - used if not UNUSED.match(key) and not key.startswith(never_run)}
    return converted | {key: weights[key] for key in unknown}


def load_mplug(folder: Path) -> MPlug:
    """mPLUG with the weights of a folder, float32, for inference."""
    model = MPlug(load_config(folder))
    weights = convert_weights(read_weights(folder), model)
    model.load_state_dict(weights)
    if wrong := [key for key, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"weights in {folder} are not finite: {', '.join(wrong[:3])}")
    return model.eval().requires_grad_(False)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The official checkpoint's tensors by their keys."""
    safe = folder / "model.safetensors"
    if safe.is_file():
        weights = load_file(safe)
    else:
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    for wrapper in ("model", "module"):
        weights = weights.get(wrapper, weights)
    return {key.replace("model.", ""): weights[key] for key in weights}


def read_csv(source: str) -> list[dict]:
    """Rows of a prompts file from the official CSV, a file or a URL, in its order.

    The categories are those of the column `tuple`, "attribute - color (ball, red)", as the official code takes them.
    `csv_rows` are numbers of the CSV's rows from 0.
    """
    table = pd.read_csv(source, dtype=str, keep_default_na=False, encoding="utf-8-sig").fillna("")
    rows = []
    for item, lines in table.groupby("item_id", sort=False):
        detailed = [text.split("(")[0].strip() for text in lines["tuple"]]
        row = {
            "prompt": lines["text"].iloc[0],
            "item_id": item,
            "proposition_ids": [int(number) for number in lines["proposition_id"]],
            "dependencies": [[int(number) for number in text.split(",")] for text in lines["dependency"]],
            "questions": lines["question_natural_language"].tolist(),
            "category_broad": [name.split("-")[0].strip() for name in detailed],
            "category_detailed": detailed,
            "csv_rows": lines.index.tolist(),
        }
        if not all([row["prompt"], item, *row["questions"], *detailed]):
            raise ValueError(f"item {item!r} has an empty text, tuple or question: is the file whole?")
        rows.append(row)
    return rows


def write_rows(file: Path, rows: list[dict]) -> None:
    """Writes a prompts file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prompts of DPG-Bench")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prompts", help="turn the official CSV into a prompts file for evaluate.py")
    command.add_argument("--csv", default=CSV, help="dpg_bench.csv, a file or a URL (default: the official one)")
    command.add_argument("--output", type=Path, required=True, help="the file to write, one JSON object per line")
    args = parser.parse_args(words)
    rows = read_csv(args.csv)
    write_rows(args.output, rows)
    print(f"{len(rows)} prompts with {sum(len(row['questions']) for row in rows)} questions: {args.output}")


if __name__ == "__main__":
    main()
