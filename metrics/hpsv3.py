# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerate", "pillow", "safetensors", "torch", "transformers"]
# ///
"""HPSv3 (Ma et al., ICCV 2025): how much people like a picture for its prompt, as Qwen2-VL-7B with a head sees it.

    python evaluate.py --dtype float16 --variant fp16 --prompts prompts.txt --loras rankdpo=outputs/rankdpo-sdxl \
        --metrics metrics/hpsv3.py:HPSv3 --output_dir outputs/hpsv3

The head reads the last token and gives mu and sigma; the score is mu. The model has 7.8 billion weights: 15.5 GB in
bfloat16 on a GPU, 31 GB in float32 on the CPU. The default downloads https://huggingface.co/MizzenAI/HPSv3.

As in the official inferencer (hpsv3 1.0.0, MIT licence, transformers 4.45): the instruction, the picture's size (about
448 x 448, sides multiples of 28), the head in float32, positions that count the picture's tokens one by one like a
text's, and rotary frequencies in bfloat16. The official text goes on after <|Reward|>, which changes no score.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from PIL import Image as PILImage
from qalign import checkpoint_folder
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLTextModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel


WEIGHTS, BASE_FILES = "HPSv3.safetensors", ("*.json", "merges.txt")
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = (
    "<|vision_end|>\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and "
    "give a overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n\n**Visual Quality:**  \nEvaluate the overall visual quality of the image. The "
    "following sub-dimensions should be considered:\n- **Reasonableness:** The image should not contain any "
    "significant biological or logical errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n- **Detail Richness:** Consider the level of detail in "
    "textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).\n- **Aesthetic and "
    "Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, "
    "depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n- "
    "**Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \nAssess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n- **Contextual Consistency**: Assess whether the background, setting, and "
    "surrounding elements in the image logically fit the scenario described in the prompt. The environment should "
    "support and enhance the subject without contradictions.\n- **Attribute Fidelity**: Check if specific attributes "
    "mentioned in the prompt (e.g., colors, clothing, accessories, expressions, actions) are faithfully represented in "
    "the image. Minor deviations may be acceptable, but critical attributes should be preserved.\n- **Semantic "
    "Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The "
    "generated content should not introduce elements that conflict with or distort the original description.\nTextual "
    "prompt - {}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>"
)


class HPSv3:
    """One score per image; higher is better. `model`: a folder or a repository on the Hub with `HPSv3.safetensors`;
    `base`: one with configuration and tokenizer of Qwen2-VL-7B-Instruct."""

    def __init__(self, device, batch_size: int, model="MizzenAI/HPSv3", base="Qwen/Qwen2-VL-7B-Instruct"):
        self.device = torch.device(device)
        folder = checkpoint_folder(base, *BASE_FILES)
        self.image_processor = Qwen2VLImageProcessorPil(size=dict.fromkeys(("shortest_edge", "longest_edge"), 448**2))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.add_tokens("<|Reward|>", special_tokens=True)
        config = Qwen2VLConfig.from_pretrained(folder)
        config.text_config.vocab_size = len(self.tokenizer)
        with init_empty_weights():
            self.model = RewardModel(config).eval()
        weights = load_file(Path(checkpoint_folder(model, WEIGHTS), WEIGHTS))
        del weights["lm_head.weight"]  # which names the next word
        self.model.load_state_dict(weights, assign=True)
        for part in (self.model.visual, self.model.model):
            part.to(torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model.rm_head.float()
        self.model.to(self.device)

    @staticmethod
    def prepare(rows: list[dict], settings: dict) -> None:
        checkpoint_folder(settings["base"], *BASE_FILES)
        checkpoint_folder(settings["model"], WEIGHTS)

    @torch.inference_mode()
    def score(self, images: list[PILImage.Image], prompts: list[str]) -> list[float]:
        scores = []
        for image, prompt in zip(images, prompts):
            texts = (self.tokenizer(text, return_tensors="pt") for text in (BEFORE, AFTER.format(prompt)))
            picture = self.image_processor(image.convert("RGB"), return_tensors="pt")
            parts = [picture.pixel_values, picture.image_grid_thw, *(text.input_ids for text in texts)]
            scores.append(self.model(*(part.to(self.device) for part in parts))[0].item())
        return scores


class RewardModel(nn.Module):
    def __init__(self, config: Qwen2VLConfig):
        super().__init__()  # the parts have the official names
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.model = Qwen2VLTextModel(config.text_config)
        self.model.rotary_emb.inv_freq = self.model.rotary_emb.inv_freq.bfloat16()
        self.visual.rotary_pos_emb.register_forward_hook(rounded_angles)
        layers = [nn.Linear(config.text_config.hidden_size, 1024), nn.ReLU(), nn.Dropout(0.05)]
        self.rm_head = nn.Sequential(*layers, nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, pixels, grid, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Mu and sigma as the last token sees them: of patches and their grid, between the tokens of two texts."""
        picture = self.visual(pixels.to(self.visual.dtype), grid).pooler_output[None]
        embeddings = torch.cat([self.model.embed_tokens(before), picture, self.model.embed_tokens(after)], dim=1)
        hidden = self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return self.rm_head(hidden[0, -1].float())


def rounded_angles(rotary: nn.Module, inputs: tuple, output: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches' angles, of row and column; their cosines and sines, too, are rounded to bfloat16."""
    angles = (inputs[1][..., None].bfloat16() * rotary.inv_freq.bfloat16()).flatten(1).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()
