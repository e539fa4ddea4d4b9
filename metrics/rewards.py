# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["pillow", "torch"]
# ///
"""Rewards of build_synpic.py, the script beside evaluate.py, which evaluate.py has not: MPS, VQAScore by any VLM.

    python evaluate.py --dtype float16 --variant fp16 --prompts prompts.txt --loras rankdpo=outputs/rankdpo-sdxl \
        --metrics metrics/rewards.py:mps metrics/rewards.py:vqascore_vlm,model=Qwen/Qwen2.5-VL-7B-Instruct \
        --output_dir outputs/evaluation

`model` is another checkpoint, a folder or a repository on the Hub. docs/rewards.md says what the scores are.
"""

import torch
from PIL import Image as PILImage

from build_synpic import check_rewards, load_reward_model


class Reward:
    """The reward `name`, of its published checkpoint or of `model`."""

    name = None

    def __init__(self, device: torch.device, batch_size: int, model: str = ""):
        self.reward = load_reward_model(self.with_checkpoint(model), device, batch_size=batch_size)

    @classmethod
    def with_checkpoint(cls, model: str) -> str:
        return f"{cls.name}={model}" if model else cls.name

    @classmethod
    def prepare(cls, rows: list[dict], settings: dict) -> None:
        """Exits with one line if there is no such model."""
        check_rewards([cls.with_checkpoint(settings["model"])])

    def score(self, images: list[PILImage.Image], prompts: list[str]) -> list[float]:
        return self.reward.score(images, prompts)


class mps(Reward):
    name = "mps"


class mps_t001(Reward):
    name = "mps_t0.01"


class vqascore_vlm(Reward):
    name = "vqascore_vlm"
