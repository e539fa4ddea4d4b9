# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "huggingface_hub", "pillow", "protobuf", "safetensors", "sentencepiece", "torch", "transformers",
# ]
# ///
"""Q-Align (Wu et al., ICML 2024): how good a picture's quality and aesthetics are, 0 (bad) to 1 (excellent), as the
multimodal language model OneAlign sees it. The prompt plays no part.

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=outputs/rankdpo-sdxl --prompts prompts.txt --metrics metrics/qalign.py:QAlign \
        --output_dir outputs/qalign

For pictures that exist:

    python metrics/qalign.py outputs/*.png --device cuda

The model reads a question about the picture and the start of the answer ("The quality of the image is"). The score
weighs the five levels by their probability as the next word. The model has 8.2 billion weights: 16.4 GB in float16 on a
GPU, 33 GB in float32 on the CPU. The default downloads https://huggingface.co/q-future/one-align.

As in the official code (https://github.com/Q-Future/Q-Align): the model, the tokens, the pictures' transform, the
prompts of `QAlignScorer` and `QAlignAestheticScorer`, and float16 on a GPU. The official variants differ:

- Those scorers round the probabilities and the score to float16. Here they are float64, as in `iaa_eval.py`.
- The scripts `iqa_eval.py` and `iaa_eval.py` put a space, not a line break, before "ASSISTANT", as training did. And
  `iaa_eval.py` shows the picture before the question. Their scores differ from these.
- `score` of the model's class, the first way in the official README, has levels of 5 to 1: 1 + 4 × the score here.
  But it starts the answer with "The image of the quality is", because two words are swapped. So it differs too.

Two more differences: here a picture becomes RGB before it is padded, not after, and attention is PyTorch's own.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from PIL import Image as PILImage
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, LlamaTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb


LEVELS = {"excellent": 1.0, "good": 0.75, "fair": 0.5, "poor": 0.25, "bad": 0.0}
QUESTION = "USER: How would you rate the {} of this image?\n"  # then the picture
ANSWER = "\nASSISTANT: The {} of the image is"
ASPECTS = {"quality": "quality", "aesthetic": "aesthetics"}  # name of the score → word in the prompt


def score_of_levels(logits: torch.Tensor) -> torch.Tensor:
    """The mean level under the levels' softmax. Takes logits (images, levels), returns float64 (images,), 0 to 1."""
    weights = torch.tensor([*LEVELS.values()], dtype=torch.float64, device=logits.device)
    return logits.double().softmax(dim=-1) @ weights


def pad_to_square(image: PILImage.Image, mean: list[float]) -> PILImage.Image:
    """The picture in RGB, in the middle of a square of the colour `mean` (0 to 1 per channel)."""
    image = image.convert("RGB")
    side = max(image.size)
    square = PILImage.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def prompt_tokens(tokenizer, word: str) -> tuple[list[int], list[int]]:
    """The tokens before and after the picture. Each text is tokenised alone; the second one's start token goes."""
    before, after = (tokenizer(text.format(word)).input_ids for text in (QUESTION, ANSWER))
    return before, after[1:]


def level_tokens(tokenizer) -> list[int]:
    """The first token of each level, after the start token. Raises ValueError if they are not five."""
    tokens = [tokenizer(level).input_ids[1:2] for level in LEVELS]
    if len({*map(tuple, tokens)}) < len(LEVELS):  # without its files, transformers makes an empty tokenizer
        raise ValueError("the tokenizer cannot tell the levels apart: the model's tokenizer.model may be missing")
    return [token for (token,) in tokens]


class QAlign:
    """`quality` and `aesthetic` of each image, 0 to 1. `model` is the checkpoint: a folder or a repository on the Hub
    with `config.json`, `preprocessor_config.json`, LLaMA's tokenizer and the weights (safetensors or .bin, whole or in
    shards)."""

    def __init__(self, device: torch.device, batch_size: int, model: str = "q-future/one-align"):
        self.device = torch.device(device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        folder = checkpoint_folder(model, *MODEL_FILES)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(folder)
        # The official tokenizer adds the start token by default; that of transformers 5 only if the files say so.
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
        self.prompts = {name: prompt_tokens(tokenizer, word) for name, word in ASPECTS.items()}
        self.levels = level_tokens(tokenizer)
        config = make_config(json.loads(Path(folder, "config.json").read_text()))
        self.model = load_model(model, config, self.device, self.dtype)

    @staticmethod
    def prepare(rows: list[dict], settings: dict) -> None:
        """Finds or downloads the model."""
        checkpoint_folder(settings["model"], *MODEL_FILES)
        weight_files(settings["model"])

    @torch.inference_mode()
    def score(self, images: list[PILImage.Image], prompts: list[str], rows: list[dict]) -> list[dict[str, float]]:
        squares = [pad_to_square(image, self.image_processor.image_mean) for image in images]
        pixels = self.image_processor(squares, return_tensors="pt").pixel_values.to(self.device, self.dtype)
        tokens = self.model.image_tokens(pixels)
        scores = {
            name: score_of_levels(self.model(tokens, *prompt, self.levels)).tolist()
            for name, prompt in self.prompts.items()
        }
        return [dict(zip(scores, values)) for values in zip(*scores.values())]


# ----------------------------------------------------------------------------------------------------------------------
# The model: mPLUG-Owl2. A vision transformer, an abstractor that makes few tokens of many patches, and LLaMA-2 with
# weights of their own for the image's tokens.
# ----------------------------------------------------------------------------------------------------------------------


# The sizes that the official configuration classes have by default.
LANGUAGE = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LANGUAGE |= {"num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 448, "patch_size": 14, "layer_norm_eps": 1e-6}
ABSTRACTOR = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16}
ABSTRACTOR |= {"num_learnable_queries": 64, "grid_size": 32, "layer_norm_eps": 1e-6}


def make_config(values: dict) -> SimpleNamespace:
    """The sizes that an official `config.json` holds. Raises ValueError if it says what is not built here."""
    visual = values.get("visual_config") or {}
    config = take_sizes(LANGUAGE, values)
    config.vision = take_sizes(VISION, visual.get("visual_model", {}))
    config.abstractor = take_sizes(ABSTRACTOR, visual.get("visual_abstractor", {}))
    built = {"model_type": "mplug_owl2", "hidden_act": "silu", "rope_scaling": None, "attention_bias": False}
    built["num_key_value_heads"] = config.num_attention_heads
    for key, value in built.items():
        if values.get(key) not in (None, value):
            raise ValueError(f"config.json: {key} is {values[key]!r}; only {value!r} is supported")
    return config


def take_sizes(default: dict, values: dict) -> SimpleNamespace:
    """`default` with what `values` says instead. A null counts as missing, as it does officially."""
    found = {key: values[key] for key in default if values.get(key) is not None}
    return SimpleNamespace(**default | found)


class QAlignModel(nn.Module):
    """mPLUG-Owl2, as far as one forward pass without cache or padding needs it."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.vision = VisionTransformer(config.vision)
        self.abstractor = Abstractor(config.abstractor, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_size, self.rope_theta = config.hidden_size // config.num_attention_heads, config.rope_theta

    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (images, 3, size, size) → tokens (images, queries + 1, hidden_size)."""
        return self.abstractor(self.vision(pixels))

    def forward(self, image: torch.Tensor, before: list[int], after: list[int], words: list[int]) -> torch.Tensor:
        """The logits (images, words) of these words after the text `before`, the image's tokens, the text `after`."""
        texts = [torch.tensor(ids, device=image.device).expand(len(image), -1) for ids in (before, after)]
        parts = [self.embed_tokens(texts[0]), image, self.embed_tokens(texts[1])]
        lengths = [part.shape[1] for part in parts]
        hidden = torch.cat(parts, dim=1)
        rotation = rotary_angles(sum(lengths), self.head_size, self.rope_theta, hidden)
        for layer in self.layers:
            hidden = layer(hidden, lengths, rotation)
        return F.linear(self.norm(hidden[:, -1]), self.lm_head.weight[words])


class VisionTransformer(nn.Module):
    """Pixels (images, 3, size, size) → features (images, 1 + patches, width); the class token is the first."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + patches, width))
        self.pre_layernorm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        hidden = self.pre_layernorm(hidden + self.position_embedding)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.post_layernorm(hidden)


class VisionLayer(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # The fused projection's output is ordered by head, then query, key, value.
        mixed = self.query_key_value(self.input_layernorm(hidden)).unflatten(-1, (self.heads, 3, -1))
        hidden = hidden + self.dense(attention(*(part.transpose(1, 2) for part in mixed.unbind(3))))
        middle = self.fc1(self.post_attention_layernorm(hidden))
        return hidden + self.fc2(middle * torch.sigmoid(1.702 * middle))


class Abstractor(nn.Module):
    """Features of the patches (images, 1 + patches, width) → tokens (images, queries + 1, language width)."""

    def __init__(self, config: SimpleNamespace, language_width: int):
        super().__init__()
        self.query_embeds = nn.Parameter(torch.empty(1, config.num_learnable_queries, config.hidden_size))
        self.layers = nn.ModuleList(AbstractorLayer(config) for _ in range(config.num_hidden_layers))
        self.visual_fc = nn.Linear(config.hidden_size, language_width)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language_width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.query_embeds.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(len(features), -1, -1)], dim=1)


class AbstractorLayer(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, middle = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.norm1, self.normk, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        # Fixed positions, which the checkpoint holds rounded to its own precision.
        self.register_buffer("q_pos_embed", torch.empty(config.num_learnable_queries, width))
        self.register_buffer("k_pos_embed", torch.empty(1 + config.grid_size**2, width))
        self.w1, self.w3 = nn.Linear(width, middle), nn.Linear(width, middle)
        self.ffn_ln = nn.LayerNorm(middle, config.layer_norm_eps)
        self.w2 = nn.Linear(middle, width)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        queries = self.norm1(queries)  # the residual, too, starts after the norm
        context = torch.cat([queries, self.normk(features)], dim=1)
        positions = torch.cat([self.q_pos_embed, self.k_pos_embed])
        query, key = self.query(queries + self.q_pos_embed), self.key(context + positions)
        heads = (split_heads(each, self.heads) for each in (query, key, self.value(context)))
        queries = queries + self.out_proj(attention(*heads))
        normed = self.norm2(queries)
        return queries + self.w2(self.ffn_ln(F.silu(self.w1(normed)) * self.w3(normed)))


class DecoderLayer(nn.Module):
    """A layer of LLaMA, whose norms, keys and values have other weights for the image's tokens than for text."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, middle, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.input_layernorm = ByModality(LlamaRMSNorm(width, eps) for _ in range(2))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = ByModality(nn.Linear(width, width, bias=False) for _ in range(2))
        self.v_proj = ByModality(nn.Linear(width, width, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.post_attention_layernorm = ByModality(LlamaRMSNorm(width, eps) for _ in range(2))
        self.gate_proj = nn.Linear(width, middle, bias=False)
        self.up_proj = nn.Linear(width, middle, bias=False)
        self.down_proj = nn.Linear(middle, width, bias=False)

    def forward(self, hidden: torch.Tensor, lengths: list[int], rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        normed = self.input_layernorm(hidden, lengths)
        projected = (self.q_proj(normed), self.k_proj(normed, lengths), self.v_proj(normed, lengths))
        query, key, value = (split_heads(each, self.heads) for each in projected)
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        hidden = hidden + self.o_proj(attention(query, key, value, is_causal=True))
        normed = self.post_attention_layernorm(hidden, lengths)
        return hidden + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class ByModality(nn.ModuleList):
    """Two modules: the first for the tokens of text, the second for those of the image."""

    def forward(self, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """`lengths`: how many tokens come before the image, belong to it, and follow it."""
        before, image, after = hidden.split(lengths, dim=1)
        text = self[0](torch.cat([before, after], dim=1))
        return torch.cat([text[:, : lengths[0]], self[1](image), text[:, lengths[0] :]], dim=1)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
    """Takes (images, heads, tokens, head size), returns (images, tokens, width)."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal).transpose(1, 2).flatten(2)


def split_heads(hidden: torch.Tensor, heads: int) -> torch.Tensor:
    """(images, tokens, width) → (images, heads, tokens, head size)."""
    return hidden.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotary_angles(length: int, head_size: int, theta: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LLaMA's rotary positions: cosines and sines (1, length, head size), from float32, in the dtype of `like`."""
    exponents = torch.arange(0, head_size, 2, device=like.device).float() / head_size
    angles = torch.outer(torch.arange(length, device=like.device).float(), 1 / theta**exponents).repeat(1, 1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint
# ----------------------------------------------------------------------------------------------------------------------

# The official modules are nested deeper: these parts of their keys are replaced, in this order.
RENAMES = {
    r"^model\.vision_model\.(embeddings\.|encoder\.)?": "vision.",
    r"^model\.visual_abstractor\.(encoder\.)?": "abstractor.",
    r"^model\.": "",
    r"\.crossattention\.(attention\.|output\.)?": ".",
    r"\.(self_attn|mlp|multiway)\.": ".",
}
MODEL_FILES = ("*.json", "tokenizer.model")
UNUSED = re.compile(r"\.rotary_emb\.inv_freq$")  # older versions of transformers saved it; it is no weight


def own_key(key: str) -> str:
    """The name here of an official weight."""
    for pattern, text in RENAMES.items():
        key = re.sub(pattern, text, key)
    return key


def load_model(source: str, config: SimpleNamespace, device: torch.device, dtype: torch.dtype) -> QAlignModel:
    """The model, ready for inference. Weights go to the device one by one, so that no second copy is ever in memory."""
    with torch.device("meta"):
        model = QAlignModel(config)
    loaded = {}
    for key, tensor in checkpoint_tensors(weight_files(source)):
        if UNUSED.search(key):
            continue
        # A copy: weights that lie unaligned in a mapped file give, on a CPU, other last digits from run to run.
        loaded[own_key(key)] = copied = tensor.to(device, dtype, copy=True)
        if not copied.isfinite().all():
            raise ValueError(f"{source}: {key} holds a value that is not finite in {dtype}")
    model.load_state_dict(loaded, assign=True)
    return model.eval().requires_grad_(False)


def checkpoint_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of all files, one at a time, without reading a file as a whole."""
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                yield from ((key, tensors.get_tensor(key)) for key in tensors.keys())
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def weight_files(source: str) -> list[Path]:
    """The checkpoint's files of weights; a safe format first. Raises FileNotFoundError if there are none."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(Path(checkpoint_folder(source, pattern)).glob(pattern)):
            return files
    raise FileNotFoundError(f"{source} has no weights: neither model*.safetensors nor pytorch_model*.bin")


def checkpoint_folder(source: str, *patterns: str) -> str:
    """The folder of a checkpoint. Of a repository on the Hub, it downloads the files that match these patterns."""
    return source if os.path.isdir(source) else snapshot_download(source, allow_patterns=[*patterns])


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prints each picture's file, quality and aesthetic score, 0 to 1.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", default="q-future/one-align", help="folder, or id on the Hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(words)
    metric = QAlign(torch.device(arguments.device), batch_size=1, model=arguments.model)
    for file in arguments.images:
        try:
            image = PILImage.open(file)
            if image.mode[0] in "FI":  # Pillow would cut their values off at 255
                raise ValueError("its pixels are not of 8 bits: convert the image")
            scores = metric.score([image], [""], [{}])[0]
        except (OSError, ValueError) as error:
            print(f"{file}\tcannot be read: {error}", flush=True)
            continue
        print(file, *(f"{name} {value:.4f}" for name, value in scores.items()), sep="\t", flush=True)


if __name__ == "__main__":
    main()
