# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate",
#     "bitsandbytes",
#     "datasets",
#     "diffusers",
#     "huggingface_hub",
#     "numpy",
#     "peft",
#     "pillow",
#     "pyarrow",
#     "pyyaml",
#     "safetensors",
#     "tensorboard",
#     "torch",
#     "torchvision",
#     "tqdm",
#     "transformers",
#     "trl",
# ]
# ///
"""DPO-QSD: preference fine-tuning of SD1.5, SD2.1 and SDXL on the best pairs first ("Effective Text-to-Image Alignment
with Quality Aware Pair Ranking"): a LoRA from the output of `score_pairs.py`.

SD1.5 on the best tenth of own pairs, scored with `score_pairs.py --include_images`:

    accelerate launch train_dpo_qsd.py \
        --dataset_name outputs/my-qsd --top_fraction 0.1 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --mixed_precision bf16 --train_batch_size 8 --gradient_accumulation_steps 16 --checkpointing_steps 50 \
        --output_dir outputs/dpo-qsd-sd15

The paper's setting on Pick-a-Pic; the scores hold no images, which are found in the dataset that was scored:

    accelerate launch train_dpo_qsd.py --config recipes/qsd_sd15.yaml \
        --dataset_name liuhuohuo2/pick-a-pic-v2 --scores_dataset_name outputs/pickapic-qsd

Its baseline, all pairs at random, needs no scores:

    accelerate launch train_dpo_qsd.py --config recipes/qsd_sd15_baseline.yaml --dataset_name liuhuohuo2/pick-a-pic-v2

`--resume_from_checkpoint latest` continues after a crash. Several GPUs: `accelerate launch --multi_gpu --num_processes
8 train_dpo_qsd.py ...`; with the same global batch (`train_batch_size` x processes x `gradient_accumulation_steps`)
every number of processes sees the same pairs, the same timesteps and the same noise in the same optimizer step.
"""

import gc
import hashlib
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from fnmatch import fnmatch
from functools import lru_cache, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from datasets import Dataset, Image, load_dataset
from datasets import config as datasets_config
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, get_session
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image as PILImage
from PIL import ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms import functional as TF
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging
from trl import TrlParser


LOSS_TYPES = ("sigmoid", "hinge", "ipo", "orpo")
# Copied from train_rankdpo_sdxl.LR_SCHEDULERS
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
CACHE_SHARD_ROWS = 64  # pairs per cache file: the unit of work that a crash can lose
# Copied from train_rankdpo_sdxl.CACHE_VERSION
CACHE_VERSION = 1
# Copied from train_rankdpo_sdxl.HUB_STRATEGIES
HUB_STRATEGIES = ("end", "checkpoint")
BASE_LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"license": "creativeml-openrail-m"},
    "stabilityai/stable-diffusion-xl-base-1.0": {"license": "openrail++"},
}
# Per family: beta and learning rate of the paper.
DEFAULTS = {"sd": {"beta_dpo": 2000.0, "learning_rate": 1e-4}, "sdxl": {"beta_dpo": 5000.0, "learning_rate": 1e-5}}
# Copied from train_rankdpo_sdxl.SCRIPT_OF_PIPELINE
SCRIPT_OF_PIPELINE = {
    "StableDiffusionPipeline": "train_dpo_qsd.py",
    "StableDiffusionXLPipeline": "train_rankdpo_sdxl.py",
    "StableDiffusion3Pipeline": "train_rankdpo_sd3.py",
}
# Copied from train_rankdpo_sdxl.LORA_FILE
LORA_FILE = "pytorch_lora_weights.safetensors"
# Copied from train_rankdpo_sdxl.LOG_FILE
LOG_FILE = "training_log.jsonl"
# Copied from train_rankdpo_sdxl.CARD_FACTS
CARD_FACTS = ("base_model", "datasets", "widget")  # of the front matter, what a run states anew
CARD_BEGIN = "<!-- train_dpo_qsd.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what train_dpo_qsd.py wrote. -->"


@dataclass
class ScriptArguments:
    """Flags carry diffusers' names wherever diffusers has one. `--config file.yaml` reads them from a file."""

    # Model
    pretrained_model_name_or_path: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "SD1.5, SD2.1 or SDXL pipeline: Hub id or folder."},
    )
    pretrained_vae_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Another VAE, e.g. madebyollin/sdxl-vae-fp16-fix; it runs in the mixed precision. "
            "The model's own VAE overflows in fp16 and so always runs in float32."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the model's files, e.g. fp16."})

    # Data
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset that holds the images: Hub id, or the folder score_pairs.py wrote. Required."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset, and of the scores'."})
    scores_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Pairs, labels and qualities without images, as score_pairs.py writes them; images are found in "
            "--dataset_name by their ids. Hub id or folder."
        },
    )
    scores_dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    scores_dataset_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    prompt_column: str = field(default="caption", metadata={"help": "Column of the prompts."})
    image_0_column: str = field(default="jpg_0", metadata={"help": "First images: bytes or Image."})
    image_1_column: str = field(default="jpg_1", metadata={"help": "Second images."})
    label_0_column: str = field(
        default="label_0",
        metadata={"help": "1: the first image is preferred, 0: the second, 0.5: tie. `none`: always the first."},
    )
    has_label_column: str = field(
        default="has_label", metadata={"help": "Where this column exists and is false, a pair is unlabelled."}
    )
    image_0_uid_column: str = field(default="image_0_uid", metadata={"help": "Ids of the first images, to join by."})
    image_1_uid_column: str = field(default="image_1_uid", metadata={"help": "Ids of the second images."})
    quality_column: str = field(default="quality", metadata={"help": "Column of the pairs' quality."})
    order: str = field(
        default="sorted",
        metadata={"help": "sorted: best pairs first, never shuffled; random.", "choices": ("sorted", "random")},
    )
    top_fraction: float = field(
        default=0.0533,
        metadata={
            "help": "Share of the labelled pairs to train on, the best by quality; 1: all, also for a dataset that "
            "score_pairs.py has cut already."
        },
    )
    min_quality: float | None = field(default=None, metadata={"help": "Leave out pairs of lower quality."})
    resolution: int | None = field(
        default=None,
        metadata={"help": "Pixels: shorter side resized to it, centre cropped. Default: the model's own, 512 or 1024."},
    )
    cache_dir: str = field(
        default="outputs/cache",
        metadata={"help": "Latents and prompt embeddings are written here once, and reused by every later run."},
    )
    vae_batch_size: int = field(default=4, metadata={"help": "Images per VAE forward while encoding."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read the data ahead."})

    # Objective
    loss_type: str = field(
        default="sigmoid",
        metadata={
            "help": "sigmoid (Diffusion-DPO); hinge (SLiC-HF); ipo; orpo (Diffusion-ORPO, without a reference).",
            "choices": LOSS_TYPES,
        },
    )
    beta_dpo: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the tie to the base model. The margin is beta/2 times mean squared errors. Default: "
            "2000 for SD1.5 and SD2.1, 5000 for SDXL."
        },
    )
    orpo_lambda: float = field(default=0.1, metadata={"help": "Weight of orpo's log-odds term."})

    # LoRA
    rank: int = field(default=64, metadata={"help": "LoRA rank; alpha is equal to it, so the scale is 1."})

    # Training
    output_dir: str = field(default="outputs/dpo-qsd", metadata={"help": "LoRA, card and checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seeds initialisation, data order, timesteps and noise."})
    train_batch_size: int = field(default=1, metadata={"help": "Pairs per process and forward."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forwards per optimizer step."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the selected pairs."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Optimizer steps; overrides the epochs."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Default: 1e-4 for SD1.5 and SD2.1, 1e-5 for SDXL."}
    )
    lr_scheduler: str = field(
        default="constant",
        metadata={"help": "Schedule of the learning rate.", "choices": LR_SCHEDULERS},
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps of linear warm-up."})
    use_8bit_adam: bool = field(default=False, metadata={"help": "AdamW of bitsandbytes with 8-bit states."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."})
    adam_weight_decay: float = field(default=1e-2, metadata={"help": "AdamW's weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: str = field(
        default="no",
        metadata={"help": "Type of the frozen weights and of the forward.", "choices": ("no", "fp16", "bf16")},
    )
    allow_tf32: bool = field(default=False, metadata={"help": "TF32 for the float32 matrix products left."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward: less memory, about a third slower."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "Optimizer steps between two checkpoints."})
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "Keep the newest N checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's folder, or latest (none yet: start at the beginning)."}
    )

    # Validation, trackers, Hub
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the before/after gallery (default: those of the first pairs)."}
    )
    validation_steps: int | None = field(
        default=None, metadata={"help": "Also draw the validation prompts every N optimizer steps."}
    )
    validation_num_inference_steps: int = field(default=30, metadata={"help": "Denoising steps of the gallery."})
    validation_guidance_scale: float = field(default=7.5, metadata={"help": "Guidance of the gallery."})
    report_to: str = field(
        default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, several as all, or none."}
    )
    logging_dir: str = field(default="logs", metadata={"help": "Trackers' folder inside output_dir."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload LoRA, card, gallery and log to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository; default: output_dir's name."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository private."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "end, or checkpoint: the LoRA of every checkpoint too, sent while the training goes on.",
            "choices": HUB_STRATEGIES,
        },
    )

    def __post_init__(self):
        # YAML values bypass argparse, so every type and choice is checked here too.
        kinds = get_type_hints(type(self))
        for name, spec in self.__dataclass_fields__.items():
            value = getattr(self, name)
            choices = spec.metadata.get("choices")
            if kinds[name] in (str, str | None) and value is False:
                value = "no" if name == "mixed_precision" else "none"  # YAML reads a bare no as False
                setattr(self, name, value)
            if kinds[name] is bool and type(value) is not bool:
                raise SystemExit(f"--{name} {value}: must be true or false")
            if choices and value not in choices:
                raise SystemExit(f"--{name} {value}: choose from {', '.join(choices)}")
            if kinds[name] in (int, int | None) and value is not None and type(value) is not int:
                raise SystemExit(f"--{name} {value}: must be a whole number")
            if kinds[name] is float or kinds[name] == float | None and value is not None:
                try:
                    setattr(self, name, float(value))  # YAML reads 1e-5 as a string
                except (TypeError, ValueError):
                    raise SystemExit(f"--{name} {value}: must be a number") from None
            if kinds[name] == list[str] | None and isinstance(value, str):
                setattr(self, name, [value])
        for name in ("beta_dpo", "orpo_lambda", "learning_rate", "max_grad_norm", "num_train_epochs"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise SystemExit(f"--{name} {getattr(self, name)}: must be greater than 0")
        for name in (
            "rank resolution train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps "
            "checkpoints_total_limit validation_steps vae_batch_size validation_num_inference_steps"
        ).split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("lr_warmup_steps", "dataloader_num_workers", "adam_beta1", "adam_beta2", "adam_weight_decay"):
            if getattr(self, name) < 0 or name.startswith("adam_beta") and getattr(self, name) >= 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: out of range")
        if self.resolution and self.resolution % 8:
            raise SystemExit(f"--resolution {self.resolution}: must be a multiple of 8")
        if not 0 < self.top_fraction <= 1:
            raise SystemExit(f"--top_fraction {self.top_fraction}: must be greater than 0 and at most 1")
        if not self.dataset_name:
            raise SystemExit("--dataset_name is missing: a Hub id, or the folder score_pairs.py wrote")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise SystemExit("--mixed_precision fp16 needs a GPU: use bf16 or no")


# ----------------------------------------------------------------------------------------------------------------------
# Objective
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.denoising_error
def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image, in float32 from the subtraction on.

    Half precision here would ruin the margin: at beta/2 = 2500 it puts an error of 0.2 to 5 on every logit.

    Args:
        prediction, target: (n, C, H, W).

    Returns:
        float32 (n,).
    """
    return (target.float() - prediction.float()).square().mean(dim=(1, 2, 3))


def pair_loss(
    model_errors_w: torch.Tensor,
    model_errors_l: torch.Tensor,
    ref_errors_w: torch.Tensor | None,
    ref_errors_l: torch.Tensor | None,
    beta: float,
    loss_type: str = "sigmoid",
    orpo_lambda: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of pairs, in TRL's names.

    With s = model error − reference error (lower is better) the margin is m = −(β/2)(s_w − s_l), and a pair's loss

    - sigmoid (Diffusion-DPO): −log σ(m);
    - hinge (SLiC-HF): max(0, 1 − m);
    - ipo: (m − 1/2)². IPO's own (h − 1/(2β))², h = m/β, is this over β²: the same minimum, but gradients so small that
      AdamW's epsilon would swallow them at these β;
    - orpo (no reference): e_w − λ·log σ(log odds(p_w) − log odds(p_l)), with p = exp(−e) and odds(p) = p/(1 − p).

    Args:
        model_errors_w, model_errors_l: denoising errors of winner and loser under the trained model, float32 (B,).
        ref_errors_w, ref_errors_l: under the reference model, float32 (B,); None for orpo, which has none.
        beta: β; the margin is β/2 times a difference of *mean* squared errors, Diffusion-DPO's convention.
        loss_type: sigmoid, hinge, ipo or orpo.
        orpo_lambda: λ.

    Returns:
        loss, float32 scalar, the mean over pairs; metrics, detached scalars: `loss`, `implicit_accuracy` (share of the
        pairs with a margin above 0) and `margin` (mean; orpo's is the difference of the log odds).
    """
    if loss_type == "orpo":
        margins = log_odds(model_errors_w) - log_odds(model_errors_l)
        losses = model_errors_w - orpo_lambda * F.logsigmoid(margins)
    else:
        margins = -(beta / 2) * ((model_errors_w - ref_errors_w) - (model_errors_l - ref_errors_l))
        if loss_type == "hinge":
            losses = F.relu(1 - margins)
        elif loss_type == "ipo":
            losses = (margins - 0.5).square()
        else:
            losses = -F.logsigmoid(margins)
    loss = losses.mean()
    metrics = {
        "loss": loss.detach(),
        "implicit_accuracy": (margins > 0).float().mean(),
        "margin": margins.detach().mean(),
    }
    return loss, metrics


def log_odds(errors: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)) of p = exp(−error), exact for small errors too."""
    return -errors - torch.log(-torch.expm1(-errors))


def training_step(unet, reference, noise_scheduler, batch: dict, args: ScriptArguments, weight_dtype):
    """One forward of both images of a batch of pairs, and of the reference where the objective needs it.

    Args:
        unet: the model as prepared for training; reference: the same model unwrapped, whose adapter is switched off.
        batch: latents (B, 2, C, h, w), winner first, noise (B, C, h, w), timesteps (B,), prompt_embeds
            (B, tokens, width), time_ids (B, 2, 6) and, for SDXL, pooled_prompt_embeds (B, width).

    Returns:
        loss, metrics of `pair_loss`.
    """
    batch_size = len(batch["latents"])
    latents = batch["latents"].flatten(0, 1).float()
    noise = batch["noise"].repeat_interleave(2, dim=0)
    timesteps = batch["timesteps"].repeat_interleave(2)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).to(weight_dtype)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    inputs = {
        "sample": noisy_latents,
        "timestep": timesteps,
        "encoder_hidden_states": batch["prompt_embeds"].repeat_interleave(2, dim=0),
    }
    if "pooled_prompt_embeds" in batch:
        inputs["added_cond_kwargs"] = {
            "text_embeds": batch["pooled_prompt_embeds"].repeat_interleave(2, dim=0),
            "time_ids": batch["time_ids"].flatten(0, 1).to(weight_dtype),
        }
    ref_errors_w, ref_errors_l = None, None
    if args.loss_type != "orpo":
        with torch.no_grad(), adapter_off(reference):
            ref_errors = denoising_error(reference(**inputs).sample, target).view(batch_size, 2)
        ref_errors_w, ref_errors_l = ref_errors.unbind(dim=1)
    model_errors_w, model_errors_l = denoising_error(unet(**inputs).sample, target).view(batch_size, 2).unbind(dim=1)
    return pair_loss(
        model_errors_w, model_errors_l, ref_errors_w, ref_errors_l, args.beta_dpo, args.loss_type, args.orpo_lambda
    )


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def main(args: ScriptArguments) -> None:
    output_dir = Path(args.output_dir)
    accelerator = make_accelerator(args)
    device = accelerator.device
    weight_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]

    # Everything that can be wrong with flags, folders and data is found here, before a model is loaded.
    family = check_model(args)
    dataset, pairs = load_pairs(args)
    rows, winners, counts = select_pairs(args, pairs)
    settings = run_settings(args, accelerator.num_processes, rows, winners)
    checkpoint = check_output_dir(args, settings)
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    epochs_steps = max(1, round(args.num_train_epochs * len(rows) / global_batch_size))
    max_train_steps = args.max_train_steps or epochs_steps
    start_step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    if start_step > max_train_steps:
        raise SystemExit(f"{checkpoint} is beyond the {max_train_steps} steps asked for: raise --max_train_steps")
    used = min(len(rows), max_train_steps * global_batch_size)  # only what will be trained on is encoded
    with accelerator.main_process_first():  # ids that have to be made are made once
        labels = make_labels(args, dataset, pairs, rows[:used], winners[:used])
    cache = Path(args.cache_dir) / cache_key(args, dataset, pairs, weight_dtype)
    shards = cache_shards(used)
    images = {column: stored_images(dataset, column) for column in (args.image_0_column, args.image_1_column)}
    check_images(images, labels, [row for i in missing_shards(cache, used, accelerator) for row in shards[i]])
    accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:  # a wrong token or name fails now, not after the training
        args.hub_model_id = create_repo(args.hub_model_id or output_dir.resolve().name, "model", args.hub_private_repo)
    if start_step == max_train_steps and (output_dir / "README.md").exists():  # the card is written last
        accelerator.print(f"{output_dir} is trained already: {max_train_steps} steps")
        if args.push_to_hub and accelerator.is_main_process:
            upload(args, output_dir)
        return
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for stale in output_dir.glob(".checkpoint-*.tmp"):
            shutil.rmtree(stale)
        write_text(output_dir / "run.json", json.dumps(settings, indent=2) + "\n")
    validator = encode(args, family, images, labels, cache, accelerator, weight_dtype)

    # Model, optimizer, schedule.
    set_seed(args.seed)
    model = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    noise_scheduler = DDPMScheduler.from_pretrained(**model, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(**model, subfolder="unet", variant=args.variant, dtype=weight_dtype)
    unet.requires_grad_(False)
    add_lora(unet, args.rank)
    cast_training_params(unet, dtype=torch.float32)
    if checkpoint:
        load_lora(checkpoint, unet)
    unet.to(device).train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, parameters)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
    reference = unet  # the same weights, adapter off; never the wrapper, which would synchronise for nothing
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if checkpoint:  # after prepare, which would move AdamW's step counters to the GPU: a sync per tensor and step
        load_training_state(checkpoint, optimizer, lr_scheduler, accelerator.scaler)

    batches = torch.utils.data.DataLoader(
        CachedPairs(cache, labels, args.seed, noise_scheduler.config.num_train_timesteps),
        batch_sampler=EpochSampler(args, len(labels), accelerator.process_index, accelerator.num_processes, start_step),
        num_workers=args.dataloader_num_workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(batches)
    if accelerator.is_main_process:
        config = {name: value for name, value in asdict(args).items() if isinstance(value, (int, float, str, bool))}
        accelerator.init_trackers("dpo-qsd", config=config)
        log = open_log(output_dir / LOG_FILE, start_step)
    progress = tqdm(
        total=max_train_steps, initial=start_step, desc="train", disable=not accelerator.is_local_main_process
    )
    if max_train_steps <= args.lr_warmup_steps:
        accelerator.print(f"warning: all {max_train_steps} steps are warm-up: add pairs, or raise --max_train_steps")
    accelerator.print(
        f"{counts['rows']} pairs: {counts['ties']} ties, {counts['without_label']} without a label; training on "
        f"{describe(args, counts, used)}: {max_train_steps} steps of {global_batch_size}, "
        f"{sum(p.numel() for p in parameters):,} trained parameters"
    )
    upload_checkpoint = None
    if args.push_to_hub and args.hub_strategy == "checkpoint" and accelerator.is_main_process:
        upload_checkpoint = CheckpointUpload(args.hub_model_id)
    started, step_ended = time.time(), time.time()

    for step in range(start_step + 1, max_train_steps + 1):
        totals = {}
        for _ in range(args.gradient_accumulation_steps):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
            with accelerator.accumulate(unet):
                with accelerator.autocast():
                    loss, metrics = training_step(unet, reference, noise_scheduler, batch, args, weight_dtype)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / args.gradient_accumulation_steps
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()

        # The only synchronisation of an optimizer step: all metrics of all processes in one reduction.
        totals["grad_norm"] = grad_norm
        values = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
        logs = dict(zip(totals, values), lr=lr_scheduler.get_last_lr()[0])
        now = time.time()
        logs["images_per_second"] = global_batch_size * 2 / (now - step_ended)
        step_ended = now
        progress.update()
        progress.set_postfix({name: f"{value:.4g}" for name, value in logs.items()}, refresh=False)
        accelerator.log(logs, step=step)
        if accelerator.is_main_process:
            log.write(json.dumps({"step": step, **logs}) + "\n")
        # With fp16 a step whose gradient overflows is skipped by the loss scale; otherwise the weights are lost.
        if not np.isfinite(logs["loss"]) or not np.isfinite(logs["grad_norm"]) and args.mixed_precision != "fp16":
            raise SystemExit(
                f"step {step}: the loss is {logs['loss']}, the gradient's norm {logs['grad_norm']}; the last "
                "checkpoint is kept. Lower --learning_rate, or take --mixed_precision bf16"
            )

        if accelerator.is_main_process and (step % args.checkpointing_steps == 0 or step == max_train_steps):
            total_limit = args.checkpoints_total_limit
            save_checkpoint(output_dir, step, reference, optimizer, lr_scheduler, accelerator.scaler, total_limit)
            if upload_checkpoint and step < max_train_steps:
                upload_checkpoint(output_dir, output_dir / f"checkpoint-{step}")
        if accelerator.is_main_process and args.validation_steps and step % args.validation_steps == 0:
            log_images(accelerator, validator.prompts, validator(reference), step)
            step_ended = time.time()

    progress.close()
    seconds = time.time() - started
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained_images = (max_train_steps - start_step) * global_batch_size * 2
        facts = {
            "pairs": describe(args, counts, used),
            "steps": max_train_steps,
            "pairs per step": global_batch_size,
            "lambda" if args.loss_type == "orpo" else "beta": args.orpo_lambda
            if args.loss_type == "orpo"
            else args.beta_dpo,
            "learning rate": args.learning_rate,
            "LoRA rank": args.rank,
            "seed": args.seed,
            "data": data_identity(dataset, settings["pairs"]),
            "speed": f"{trained_images / seconds:.1f} images/s" if trained_images else "not measured",
            "peak memory": f"{peak_memory_gb(device):.1f} GB",
        }
        log.close()
        finish(args, family, reference, validator, accelerator, facts)
        if upload_checkpoint:
            upload_checkpoint.wait()
        if args.push_to_hub:
            upload(args, output_dir)
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------------------------------
# Data: check, labels, encode once, read
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.one_line
def one_line(error: Exception) -> str:
    """An exception's message on one line, whatever its class and length."""
    return " ".join(str(error).split()) or type(error).__name__


# Copied from train_rankdpo_sdxl.folder_digest
def folder_digest(folder: str) -> str:
    """A hash of the names, sizes and dates of a folder's files: a model's, or a dataset's without what
    build_synpic.py and score_pairs.py write anew at every run (card, pictures, statistics) or for themselves (work)."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    names = [(file.relative_to(folder), file.stat()) for file in files]
    others = ("work", "README.md", "grid.png", "figures", "statistics.json")
    names = [(name, stat) for name, stat in names if name.parts[0] not in others]
    stats = [f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in names]
    return hashlib.sha256("|".join(stats).encode()).hexdigest()[:16]


# Copied from train_rankdpo_sdxl.local_cache
def local_cache(folder: str) -> str | None:
    """Where `load_dataset` shall cache a local folder; None for a dataset of the Hub.

    By itself it keys the cache of a folder by the patterns in its card, not by its files, and so would serve the old
    rows of a dataset that was built again.
    """
    if not os.path.isdir(folder):
        return None
    return os.path.join(datasets_config.HF_DATASETS_CACHE, f"local-{folder_digest(folder)}")


def load_pairs(args: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Loads and checks the tables; no image is decoded yet. Exits with one line that names what is wrong.

    Returns:
        the dataset that holds the images, and the one that holds pairs, labels and qualities: the same unless
        `--scores_dataset_name` is given.
    """
    images = pairs = _load_table(args, "")
    images_flag = pairs_flag = f"--dataset_name {args.dataset_name}"
    images_need = {"image_0_column": args.image_0_column, "image_1_column": args.image_1_column}
    pairs_need = {"prompt_column": args.prompt_column}
    if args.label_0_column != "none":
        pairs_need["label_0_column"] = args.label_0_column
    if args.scores_dataset_name:
        pairs, pairs_flag = _load_table(args, "scores_"), f"--scores_dataset_name {args.scores_dataset_name}"
        pairs_need |= {"image_0_uid_column": args.image_0_uid_column, "image_1_uid_column": args.image_1_uid_column}
    for where, dataset, need in ((images_flag, images, images_need), (pairs_flag, pairs, pairs_need)):
        for flag, column in need.items():
            if column not in dataset.column_names:
                hint = ""
                if flag.endswith(("0_column", "1_column")) and not args.scores_dataset_name and needs_quality(args):
                    hint = (
                        "; if it holds scores only, name it by --scores_dataset_name, and the images by --dataset_name"
                    )
                have = ", ".join(dataset.column_names) or "none"
                raise SystemExit(f"{where}: no column {column!r} (--{flag}); it has {have}{hint}")
        if len(dataset) == 0:
            raise SystemExit(f"{where}: split {args.dataset_split!r} has no rows")
    if needs_quality(args) and args.quality_column not in pairs.column_names:
        raise SystemExit(
            f"{pairs_flag}: no column {args.quality_column!r} (--quality_column): score the pairs first with "
            "score_pairs.py, or train on all of them without it: --order random --top_fraction 1"
        )
    for column in (args.image_0_column, args.image_1_column):
        kind = images.features[column]
        if not isinstance(kind, Image) and getattr(kind, "dtype", None) not in ("binary", "large_binary"):
            raise SystemExit(f"{images_flag}: column {column!r} must hold bytes or Image")
    for column in number_columns(args, pairs):
        kind = getattr(pairs.features[column], "dtype", "")
        if not re.match(r"float|int|uint|bool|null", kind):
            raise SystemExit(f"{pairs_flag}: column {column!r} holds {kind or 'lists'}: it must hold numbers")
    return images, pairs


def _load_table(args: ScriptArguments, prefix: str) -> Dataset:
    name = getattr(args, f"{prefix}dataset_name")
    try:
        return load_dataset(
            name,
            getattr(args, f"{prefix}dataset_config_name"),
            split=args.dataset_split,
            revision=getattr(args, f"{prefix}dataset_revision"),
            cache_dir=local_cache(name),
        )
    except Exception as error:
        raise SystemExit(f"--{prefix}dataset_name {name}: cannot be loaded: {one_line(error)}") from None


def number_columns(args: ScriptArguments, pairs: Dataset) -> list[str]:
    """The columns that decide which pairs are taken."""
    names = [args.label_0_column, args.has_label_column] + [args.quality_column] * needs_quality(args)
    return [name for name in names if name in pairs.column_names]


def needs_quality(args: ScriptArguments) -> bool:
    """Whether the pairs' quality decides anything."""
    return args.order == "sorted" or args.top_fraction < 1 or args.min_quality is not None


def select_pairs(args: ScriptArguments, pairs: Dataset) -> tuple[np.ndarray, np.ndarray, dict]:
    """The pairs to train on, in the order of the first epoch.

    Ties (0.5) and pairs without a label are left out; the best `--top_fraction` of the others is kept.

    Returns:
        rows, int64 (n,); of each, the side of the winner, int64 (n,), 0 or 1; counts: rows, ties, without_label,
        labelled, selected.
    """
    where = args.scores_dataset_name or args.dataset_name
    columns = {}
    for name in number_columns(args, pairs):
        column = pairs.select_columns([name]).with_format("arrow")[:].column(0)
        columns[name] = column.cast(pa.float64()).to_numpy()
    labels = columns.get(args.label_0_column, np.ones(len(pairs)))  # null: NaN
    unlabelled = np.isnan(labels) | (columns.get(args.has_label_column, np.ones(len(pairs))) != 1)
    wrong = np.flatnonzero(~unlabelled & ~np.isin(labels, (0, 0.5, 1)))
    if len(wrong):
        raise SystemExit(f"{where}: row {wrong[0]}: `{args.label_0_column}` is {labels[wrong[0]]}: must be 0, 0.5 or 1")
    rows = labelled = np.flatnonzero(~unlabelled & (labels != 0.5))
    counts = {
        "rows": len(pairs),
        "ties": int((~unlabelled & (labels == 0.5)).sum()),
        "without_label": int(unlabelled.sum()),
        "labelled": len(labelled),
    }
    if needs_quality(args):
        quality = columns[args.quality_column]
        unknown = labelled[~np.isfinite(quality[labelled])]
        if len(unknown):
            raise SystemExit(
                f"{where}: row {unknown[0]}: `{args.quality_column}` is {quality[unknown[0]]}: score it, or remove it"
            )
        rows = labelled[np.argsort(-quality[labelled], kind="stable")]  # equal ones stay in the dataset's order
        rows = rows[: round(args.top_fraction * len(rows))]
        if args.min_quality is not None:
            rows = rows[quality[rows] >= args.min_quality]
    if len(rows) == 0:
        best = f", whose best quality is {quality[labelled].max():.4g}" if needs_quality(args) and len(labelled) else ""
        raise SystemExit(
            f"--top_fraction {args.top_fraction} --min_quality {args.min_quality} select none of {len(labelled)} "
            f"labelled pairs{best} ({counts['rows']} rows, {counts['ties']} ties, {counts['without_label']} without a "
            "label)"
        )
    if args.order == "random":
        rows = rows[_epoch_order(args.seed, 0, len(rows))]
    counts["selected"] = len(rows)
    return rows, np.where(labels[rows] == 1, 0, 1), counts


def describe(args: ScriptArguments, counts: dict, used: int) -> str:
    """Which pairs a run trains on, in words."""
    labelled = f"{counts['labelled']} labelled pairs"
    if args.order == "sorted":
        return f"the best {used} of {labelled}, the best first"
    chosen = labelled if counts["selected"] == counts["labelled"] else f"the best {counts['selected']} of {labelled}"
    return f"{used} of {chosen}, in random order"


def make_labels(args: ScriptArguments, images: Dataset, pairs: Dataset, rows, winners) -> list[dict]:
    """Reads the selected rows.

    Returns:
        one dict per pair: `pair_id` str, which seeds its timestep and noise, `prompt` str, and `images`: where winner
        and loser stand, [(row, column), (row, column)] of the images' dataset.
    """
    columns = (args.image_0_column, args.image_1_column)
    uids = (args.image_0_uid_column, args.image_1_uid_column)
    names = [args.prompt_column, *(uids if args.scores_dataset_name else ())]
    table = pairs.select_columns(names).with_format("arrow")[rows.tolist()]
    prompts = table[args.prompt_column].to_pylist()
    if args.scores_dataset_name:
        sides = [table[uid].to_pylist() for uid in uids]
        places = locate_images(args, images, {uid for side in sides for uid in side})
        missing = [i for i in range(len(rows)) if not {sides[0][i], sides[1][i]} <= places.keys()]
        if missing:
            absent = [uid for i in missing[:3] for uid in (sides[0][i], sides[1][i]) if uid not in places]
            raise SystemExit(
                f"--dataset_name {args.dataset_name} lacks images of {len(missing)} of the {len(rows)} pairs to train "
                f"on, e.g. {', '.join(map(str, absent[:3]))}: take the dataset and revision that were scored, or "
                f"other --image_0_uid_column and --image_1_uid_column"
            )
        found = [[places[uid] for uid in side] for side in sides]
    else:
        found = [[(row, column) for row in rows.tolist()] for column in columns]
    labels = []
    for i, (row, prompt, winner) in enumerate(zip(rows.tolist(), prompts, winners.tolist())):
        if not isinstance(prompt, str) or not prompt.strip():
            where = args.scores_dataset_name or args.dataset_name
            raise SystemExit(f"{where}: row {row}: `{args.prompt_column}` is empty: remove the row, or write a prompt")
        labels.append({"pair_id": str(row), "prompt": prompt, "images": [found[winner][i], found[1 - winner][i]]})
    return labels


def locate_images(args: ScriptArguments, images: Dataset, wanted: set) -> dict:
    """Id → (row, column) of the wanted images. Where the dataset has no ids, they are hashes of the images' files, as
    score_pairs.py makes them; `datasets` keeps those, so that only the first run reads all images for them."""
    places = {}
    for uid, column in ((args.image_0_uid_column, args.image_0_column), (args.image_1_uid_column, args.image_1_column)):
        ids = images
        if uid not in images.column_names:
            ids = stored_images(images, column).map(content_ids, batched=True, batch_size=64, desc=f"ids of {column}")
            uid = "content_id"
        row = 0
        for batch in ids.select_columns([uid]).with_format("arrow").iter(10_000):
            for value in batch.column(0).to_pylist():
                if value in wanted:
                    places.setdefault(value, (row, column))
                row += 1
    return places


def content_ids(table: pa.Table) -> pa.Table:
    """Ids made from the images' files; null where there is none."""
    ids = []
    for value in map(as_stored, table.column(0).to_pylist()):
        data = value["bytes"]
        if data is None and value["path"] and os.path.isfile(value["path"]):
            data = Path(value["path"]).read_bytes()
        ids.append(hashlib.blake2b(data, digest_size=16).hexdigest() if data else None)
    return pa.table({"content_id": pa.array(ids, pa.string())})


def as_stored(value) -> dict:
    """An image as {"bytes", "path"}, whatever kind its column is of."""
    return value if isinstance(value, dict) else {"bytes": value, "path": None}


# Copied from train_rankdpo_sdxl.stored_images
def stored_images(dataset: Dataset, column: str) -> Dataset:
    """The images as stored, undecoded. In Arrow's format: casting the column would write the whole dataset anew. Made
    once: every such view copies the dataset's list of files."""
    return dataset.select_columns([column]).with_format("arrow")


def read_images(images: dict[str, Dataset], places: list[tuple[int, str]]) -> list[dict]:
    """The images at these (row, column), {"bytes", "path"} each; `images` holds the `stored_images` of both columns."""
    return [as_stored(images[column][row].column(0)[0].as_py()) for row, column in places]


# Copied from train_rankdpo_sdxl._generator
def _generator(*key) -> np.random.Generator:
    """A NumPy generator that is a function of the key alone, on every machine and in every process."""
    digest = hashlib.sha256("|".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def check_images(images: dict[str, Dataset], labels: list[dict], rows: list[int]) -> None:
    """Decodes the pairs' images once, JPEGs at an eighth of their size, so that a bad one is named before any model is
    loaded."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        checks = pool.map(partial(_undecodable_image, images, labels), rows)
        for index, found in zip(rows, tqdm(checks, desc="check images", total=len(rows), disable=len(rows) < 2000)):
            if found:
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(f"the pair of row {labels[index]['pair_id']}: {found}")


def _undecodable_image(images: dict[str, Dataset], labels: list[dict], index: int) -> str | None:
    for place, image in zip(labels[index]["images"], read_images(images, labels[index]["images"])):
        try:
            with _open_image(image) as opened:
                opened.draft("RGB", (64, 64))
                opened.load()
        except Exception as error:
            return f"image {place[1]!r} of row {place[0]} does not decode: {one_line(error)}"
    return None


# Copied from train_rankdpo_sdxl._open_image
def _open_image(image: dict) -> PILImage.Image:
    return PILImage.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


# Copied from train_rankdpo_sdxl.preprocess_image
def preprocess_image(image: dict, resolution: int) -> tuple[torch.Tensor, list[float]]:
    """Resizes the shorter side to `resolution` and crops the centre.

    Returns:
        pixels, uint8 (3, resolution, resolution), and SDXL's micro-conditioning of this image:
        [original height, original width, crop top, crop left, target height, target width] in pixels.
    """
    with _open_image(image) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    original = (picture.height, picture.width)
    picture = TF.resize(picture, resolution, interpolation=TF.InterpolationMode.LANCZOS)
    top, left = (picture.height - resolution) // 2, (picture.width - resolution) // 2
    picture = TF.crop(picture, top, left, resolution, resolution)
    return TF.pil_to_tensor(picture), [*original, top, left, resolution, resolution]


# Copied from train_rankdpo_sdxl.model_fingerprint
def model_fingerprint(model: str, file: str, revision: str | None = None) -> str:
    """What identifies a model's weights: the commit of a Hub snapshot; name, size and date of a folder's files.

    Args:
        file: one of the model's files, `model_index.json` of a pipeline or `config.json` of a single model.
    """
    if not os.path.isdir(model):
        return f"{model}@{Path(hf_hub_download(model, file, revision=revision)).parent.name}"
    return folder_digest(model)


def cache_key(args: ScriptArguments, images: Dataset, pairs: Dataset, weight_dtype: torch.dtype) -> str:
    """Hash of everything that latents and embeddings depend on; hyperparameters are not among it. How many of the best
    pairs are taken is not either: a smaller share is the beginning of a larger one."""
    chosen = (args.order, args.seed, args.top_fraction, args.min_quality) if args.order == "random" else args.order
    folders = [name for name in (args.dataset_name, args.scores_dataset_name) if name and os.path.isdir(name)]
    parts = [
        CACHE_VERSION,
        images._fingerprint,
        pairs._fingerprint,
        [folder_digest(name) for name in folders],
        [getattr(args, name) for name in args.__dataclass_fields__ if name.endswith("_column")],
        chosen,
        model_fingerprint(args.pretrained_model_name_or_path, "model_index.json", args.revision),
        args.variant,
        args.pretrained_vae_model_name_or_path
        and model_fingerprint(args.pretrained_vae_model_name_or_path, "config.json"),
        args.resolution,
        str(weight_dtype),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class PromptEncoder:
    """SD's tokenizer and text encoder, or both of SDXL's."""

    def __init__(self, args: ScriptArguments, family: str, device, dtype):
        self.family, kwargs = family, {"revision": args.revision}
        model = args.pretrained_model_name_or_path
        encoders = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection} if family == "sdxl" else {"": CLIPTextModel}
        self.tokenizers = [AutoTokenizer.from_pretrained(model, subfolder=f"tokenizer{s}", **kwargs) for s in encoders]
        kwargs.update(variant=args.variant, dtype=dtype)
        self.text_encoders = [
            encoder.from_pretrained(model, subfolder=f"text_encoder{s}", **kwargs).to(device).eval()
            for s, encoder in encoders.items()
        ]

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """prompts (n) → prompt_embeds (n, tokens, width) and, for SDXL, pooled_prompt_embeds (n, pooled width)."""
        outputs = []
        for tokenizer, text_encoder in zip(self.tokenizers, self.text_encoders):
            tokens = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            outputs.append(text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True))
        if self.family == "sd":
            return {"prompt_embeds": outputs[0].last_hidden_state}
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": outputs[1].text_embeds}


class PairImages(torch.utils.data.Dataset):
    """Decodes and preprocesses both images of a pair; a DataLoader's workers do it while the GPU encodes."""

    def __init__(self, images: dict[str, Dataset], labels: list[dict], args: ScriptArguments, rows: list[int]):
        self.images, self.labels, self.args, self.rows = images, labels, args, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = read_images(self.images, self.labels[self.rows[position]]["images"])
        processed = [preprocess_image(image, self.args.resolution) for image in images]
        return torch.stack([pixels for pixels, _ in processed]), torch.tensor([ids for _, ids in processed]).float()


def encode_dataset(args, images, labels, folder: Path, vae, encode_prompts, accelerator, weight_dtype) -> None:
    """Writes what is missing of the cache: per pair the latents of winner and loser (the posterior's mean, scaled), the
    prompt embeddings and SDXL's micro-conditioning. Shards do not depend on the number of processes."""
    shards = cache_shards(len(labels))
    mine = missing_shards(folder, len(labels), accelerator)
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for i in mine for row in shards[i]]
        loader = torch.utils.data.DataLoader(
            PairImages(images, labels, args, rows), batch_size=None, num_workers=args.dataloader_num_workers
        )
        decoded = iter(tqdm(loader, desc="encode", unit="pair", disable=not accelerator.is_local_main_process))
        for i in mine:
            latents, time_ids = [], []
            for _ in shards[i]:
                pixels, ids = next(decoded)
                latents.append(encode_images(vae, pixels, args.vae_batch_size).to("cpu", weight_dtype))
                time_ids.append(ids)
            tensors = {"latents": torch.stack(latents).contiguous(), "time_ids": torch.stack(time_ids)}
            for name, tensor in encode_prompts([labels[row]["prompt"] for row in shards[i]]).items():
                tensors[name] = tensor.to("cpu", weight_dtype).contiguous()
            file = _cache_file(folder, i, len(labels))
            temporary = file.with_suffix(f".tmp{os.getpid()}")
            save_file(tensors, temporary)
            _publish_file(temporary, file)
    accelerator.wait_for_everyone()


# Copied from train_rankdpo_sdxl.cache_shards
def cache_shards(length: int) -> list[range]:
    """The rows of every cache file."""
    return [range(i, min(i + CACHE_SHARD_ROWS, length)) for i in range(0, length, CACHE_SHARD_ROWS)]


def missing_shards(folder: Path, length: int, accelerator: Accelerator) -> list[int]:
    """This process's shards that are not in the cache yet.

    Owned by number, not dealt out of what is missing: processes look at different times.
    """
    own = range(accelerator.process_index, len(cache_shards(length)), accelerator.num_processes)
    return [i for i in own if not _cache_file(folder, i, length).exists()]


def _cache_file(folder: Path, shard: int, length: int) -> Path:
    """Named by number and rows: with more pairs, the last shard is another one."""
    return folder / f"shard-{shard:06d}-{min(CACHE_SHARD_ROWS, length - shard * CACHE_SHARD_ROWS)}.safetensors"


# Copied from train_rankdpo_sdxl.encode_images
@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """pixels, uint8 (n, 3, H, W) → latents (n, C, H/f, W/f), the posterior's mean times the scaling factor."""
    means = [
        vae.encode((batch.to(vae.device).float() / 127.5 - 1.0).to(vae.dtype)).latent_dist.mean
        for batch in pixels.split(batch_size)
    ]
    return torch.cat(means) * vae.config.scaling_factor


class CachedPairs(torch.utils.data.Dataset):
    """Encoded pairs with their timestep and noise. An item is named by (epoch, row)."""

    def __init__(self, folder: Path, labels: list[dict], seed: int, num_train_timesteps: int):
        self.folder, self.labels, self.seed, self.num_train_timesteps = folder, labels, seed, num_train_timesteps

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        shard, offset = divmod(index, CACHE_SHARD_ROWS)
        file = _open_shard(_cache_file(self.folder, shard, len(self.labels)))
        item = {name: file.get_slice(name)[offset] for name in file.keys()}
        # One timestep and one noise for both images of the pair, a function of (seed, epoch, pair): the same after a
        # resume and on any number of processes.
        rng = _generator(self.seed, epoch, self.labels[index]["pair_id"])
        item["timesteps"] = torch.tensor(rng.integers(self.num_train_timesteps))
        item["noise"] = torch.from_numpy(rng.standard_normal(item["latents"].shape[1:], dtype=np.float32))
        return item


# Copied from train_rankdpo_sdxl._open_shard
@lru_cache(maxsize=64)
def _open_shard(path: Path):
    return safe_open(path, framework="pt")  # memory-mapped: a row is read when it is sliced


class EpochSampler:
    """Names the items of every micro-batch of one process, from an optimizer step on, without end.

    Step s of all processes together takes items s·G … (s+1)·G − 1 of the epochs' orders laid end to end, G = batch ·
    processes · accumulation. The first epoch is in the order of the labels, which `select_pairs` chose; so are the
    later ones of a sorted run, those of a random one are shuffled by (seed, epoch).
    """

    def __init__(self, args: ScriptArguments, length: int, process_index: int, num_processes: int, start_step: int):
        self.seed, self.length, self.shuffled = args.seed, length, args.order == "random"
        self.batch_size, self.start_step = args.train_batch_size, start_step
        self.process_index, self.num_processes = process_index, num_processes
        self.accumulation = args.gradient_accumulation_steps

    def __iter__(self):
        micro_step = self.start_step * self.accumulation
        while True:
            start = (micro_step * self.num_processes + self.process_index) * self.batch_size
            yield [self._item(position) for position in range(start, start + self.batch_size)]
            micro_step += 1

    def _item(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.length)
        if epoch == 0 or not self.shuffled:
            return epoch, offset
        return epoch, int(_epoch_order(self.seed, epoch, self.length)[offset])


# Copied from train_rankdpo_sdxl._epoch_order
@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return _generator(seed, epoch, "order").permutation(length)


# ----------------------------------------------------------------------------------------------------------------------
# Model, LoRA files, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.adapter_off
@contextmanager
def adapter_off(unet):
    """The base model: the same module and kernels, the LoRA left out. So the scores are exactly 0 at initialisation."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def check_model(args: ScriptArguments) -> str:
    """Exits with one line unless the model is an SD1.5, SD2.1 or SDXL pipeline. Sets what depends on the family where
    it was not given: resolution, beta, learning rate. Reads configurations only.

    Returns:
        the family: sd or sdxl.
    """
    model, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    name = _read_config("pretrained_model_name_or_path", model, "model_index.json", args.revision)["_class_name"]
    if name not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        raise SystemExit(
            f"--pretrained_model_name_or_path {model} is a {name}: this script trains SD1.5, SD2.1 and SDXL"
            f"{_other(name)}"
        )
    family = "sd" if name == "StableDiffusionPipeline" else "sdxl"
    if vae:
        config = _read_config("pretrained_vae_model_name_or_path", vae, "config.json", None)
    else:
        config = _read_config("pretrained_model_name_or_path", model, "vae/config.json", args.revision)
    if config.get("latents_mean") is not None:  # Playground v2.5
        raise SystemExit(f"{vae or model}: its VAE standardises latents by `latents_mean`, which SDXL does not")
    if args.resolution is None:
        unet = _read_config("pretrained_model_name_or_path", model, "unet/config.json", args.revision)
        args.resolution = unet["sample_size"] * 2 ** (len(config["block_out_channels"]) - 1)
    for flag, value in DEFAULTS[family].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    return family


# Copied from train_rankdpo_sdxl._other
def _other(pipeline_class: str) -> str:
    script = SCRIPT_OF_PIPELINE.get(pipeline_class)
    return f"; take {script}" if script else ""


# Copied from train_rankdpo_sdxl._read_config
def _read_config(flag: str, model: str, file: str, revision: str | None) -> dict:
    try:
        path = os.path.join(model, file) if os.path.isdir(model) else hf_hub_download(model, file, revision=revision)
        config = json.loads(Path(path).read_text())
        if file == "model_index.json" and "_class_name" not in config:
            raise ValueError("its model_index.json names no pipeline class")
        return config
    except Exception as error:
        raise SystemExit(f"--{flag} {model}: not a diffusers model that can be read: {one_line(error)}") from None


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """LoRA on the attention projections: 128 modules of SD1.5's UNet, 560 of SDXL's. alpha = rank: ComfyUI and
    diffusers agree."""
    target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=target_modules))


# Copied from train_rankdpo_sdxl.comfyui_state_dict
def comfyui_state_dict(lora_state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames LoRA tensors to the keys that ComfyUI and kohya's tools know.

    Args:
        lora_state_dict: peft keys, `[unet.]<module>.lora_A.weight` (rank, in) and `….lora_B.weight` (out, rank);
            trained with alpha = rank.

    Returns:
        `lora_unet_<module with _>.lora_down.weight`, `.lora_up.weight` and `.alpha` (a float32 scalar, the rank).
    """
    renamed = {}
    for key, tensor in lora_state_dict.items():
        module, _, matrix = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        if matrix not in ("lora_A", "lora_B"):
            raise ValueError(f"not a peft LoRA key: {key}")
        name = "lora_unet_" + module.replace(".", "_")
        renamed[f"{name}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        if matrix == "lora_A":
            renamed[f"{name}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return renamed


# Copied from train_rankdpo_sdxl.save_lora
def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` (peft keys and adapter metadata: exact in diffusers)."""
    temporary = folder / ".lora.tmp"
    metadata = unet.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set: its order differs from run to run
    StableDiffusionXLPipeline.save_lora_weights(
        temporary,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=metadata,
    )
    _publish_file(temporary / LORA_FILE, folder / LORA_FILE)
    shutil.rmtree(temporary)


# Copied from train_rankdpo_sdxl.save_comfyui_lora
def save_comfyui_lora(unet: UNet2DConditionModel, file: Path) -> None:
    """Writes the same LoRA under ComfyUI's keys."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    temporary = file.with_suffix(".tmp")
    save_file(comfyui_state_dict(state_dict), temporary, metadata={"format": "pt"})
    _publish_file(temporary, file)


# Copied from train_rankdpo_sdxl._publish_file
def _publish_file(temporary: Path, file: Path) -> None:
    temporary.chmod(0o644)  # safetensors writes 0600, which other users and servers cannot read
    os.replace(temporary, file)


# Copied from train_rankdpo_sdxl.save_checkpoint
def save_checkpoint(output_dir: Path, step: int, unet, optimizer, lr_scheduler, scaler, total_limit) -> None:
    """Writes `checkpoint-<step>` under a temporary name and renames it, then drops the oldest beyond the limit."""
    folder = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_lora(unet, temporary)
    state = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }
    torch.save(state, temporary / "training_state.pt")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    if total_limit:
        others = [path for path in list_checkpoints(output_dir) if path != folder]
        for old in others[: max(0, len(others) + 1 - total_limit)]:
            shutil.rmtree(old)


# Copied from train_rankdpo_sdxl.list_checkpoints
def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


# Copied from train_rankdpo_sdxl.load_lora
def load_lora(folder: Path, unet) -> None:
    """Restores a checkpoint's LoRA into the adapter of the model."""
    lora = {key.removeprefix("unet."): value for key, value in load_file(folder / LORA_FILE).items()}
    missing = get_peft_model_state_dict(unet).keys() ^ lora.keys()
    if missing:
        raise SystemExit(f"{folder}: its LoRA does not fit the model: {sorted(missing)[0]}")
    set_peft_model_state_dict(unet, lora)


# Copied from train_rankdpo_sdxl.load_training_state
def load_training_state(folder: Path, optimizer, lr_scheduler, scaler) -> None:
    """Restores optimizer, schedule and loss scale; the step reached is in the folder's name.

    Timesteps, noise and data order are functions of (seed, step), so there is no random state to restore.
    """
    state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    if scaler:
        scaler.load_state_dict(state["scaler"])


# Settings that may differ between a run and its continuation: they do not change what is learnt.
# Copied from train_rankdpo_sdxl.RESUMABLE
RESUMABLE = (
    "resume_from_checkpoint checkpointing_steps checkpoints_total_limit "
    "train_batch_size gradient_accumulation_steps gradient_checkpointing dataloader_num_workers vae_batch_size "
    "cache_dir validation_prompts validation_steps validation_num_inference_steps validation_guidance_scale report_to "
    "logging_dir push_to_hub hub_model_id hub_private_repo hub_strategy output_dir"
).split()


# Copied from train_rankdpo_sdxl.check_output_dir
def check_output_dir(args: ScriptArguments, settings: dict) -> Path | None:
    """Refuses a folder that holds another run; returns the checkpoint to resume from, if any. Writes nothing."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise SystemExit(f"--output_dir {output_dir} is a file")
    record = output_dir / "run.json"
    checkpoints = list_checkpoints(output_dir)
    finished = (output_dir / LORA_FILE).exists()
    if record.exists():
        previous = json.loads(record.read_text())
        differing = [name for name in settings if previous.get(name) != settings[name]]
        if differing and (checkpoints or finished):
            name = differing[0]
            raise SystemExit(
                f"--output_dir {output_dir} holds a run with {name} {previous.get(name)}, not {settings[name]}: "
                "choose another folder"
            )
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    if args.resume_from_checkpoint is None:
        if checkpoints or finished:
            raise SystemExit(
                f"--output_dir {output_dir} holds this run's results already: add --resume_from_checkpoint latest to "
                "continue it, or choose another folder"
            )
        return None
    if args.resume_from_checkpoint == "latest":
        if finished and not checkpoints:
            raise SystemExit(f"--output_dir {output_dir} holds a LoRA but no checkpoint to continue from")
        return checkpoints[-1] if checkpoints else None
    folder = Path(args.resume_from_checkpoint)
    if folder.resolve() not in [path.resolve() for path in checkpoints]:
        raise SystemExit(f"--resume_from_checkpoint {folder}: not a checkpoint of --output_dir {output_dir}")
    return folder


def run_settings(args: ScriptArguments, num_processes: int, rows: np.ndarray, winners: np.ndarray) -> dict:
    """What makes two runs the same run: all that changes the result, the batch only as the global batch."""
    settings = {name: value for name, value in asdict(args).items() if name not in RESUMABLE}
    if args.lr_scheduler.startswith("constant"):  # then a run may be made longer; other schedules are shaped by it
        del settings["max_train_steps"], settings["num_train_epochs"]
    settings["pairs"] = hashlib.sha256(rows.tobytes() + winners.tobytes()).hexdigest()[:16]
    settings["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# Validation and card
# ----------------------------------------------------------------------------------------------------------------------


class Validator:
    """Draws the validation prompts with the current LoRA, or without it; everything is loaded once, at construction."""

    def __init__(self, args: ScriptArguments, prompts: list[str], vae, encode_prompts: PromptEncoder, device, dtype):
        self.args, self.prompts, self.device, self.dtype = args, prompts, device, dtype
        if encode_prompts.family == "sdxl":
            absent = dict.fromkeys(("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
            pipeline_class, more = StableDiffusionXLPipeline, {"add_watermarker": False}
        else:
            absent = dict.fromkeys(("unet", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
            pipeline_class, more = StableDiffusionPipeline, {"requires_safety_checker": False}
        self.pipeline = pipeline_class.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, vae=vae, **absent, **more
        )
        self.pipeline.set_progress_bar_config(disable=True)
        embeds = [encode_prompts([prompt]) for prompt in (*prompts, "")]  # one by one, as a pipeline does
        self.embeds = {name: torch.cat([embed[name].cpu() for embed in embeds[:-1]]) for name in embeds[0]}
        negative = {f"negative_{name}": tensor.cpu() for name, tensor in embeds[-1].items()}
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
        self.negative_embeds = negative

    @torch.no_grad()
    def __call__(self, unet, lora: bool = True) -> list[PILImage.Image]:
        vae = self.pipeline.vae.to(self.device)
        self.pipeline.register_modules(unet=unet)
        was_training = unet.training
        unet.eval()
        images = []
        for i in range(len(self.prompts)):
            embeds = {name: tensor[i : i + 1] for name, tensor in self.embeds.items()} | self.negative_embeds
            half = self.dtype != torch.float32
            with (
                torch.autocast(torch.device(self.device).type, self.dtype, enabled=half),
                nullcontext() if lora else adapter_off(unet),
            ):
                latents = self.pipeline(
                    **{name: tensor.to(self.device) for name, tensor in embeds.items()},
                    num_inference_steps=self.args.validation_num_inference_steps,
                    guidance_scale=self.args.validation_guidance_scale,
                    height=self.args.resolution,
                    width=self.args.resolution,
                    generator=torch.Generator("cpu").manual_seed(self.args.seed + i),
                    output_type="latent",
                ).images
            # Outside of autocast, in the VAE's own type: SDXL's overflows in fp16.
            pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
            images += self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
        unet.train(was_training)
        self.pipeline.register_modules(unet=None)
        vae.to("cpu")
        return images


# Copied from train_rankdpo_sdxl.log_images
def log_images(accelerator: Accelerator, prompts: list[str], images: list[PILImage.Image], step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images("validation", stacked, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            module = importlib.import_module(tracker.name)
            pictures = {
                f"validation/{i}": module.Image(image, caption=prompt)
                for i, (prompt, image) in enumerate(zip(prompts, images))
            }
            tracker.log(pictures, step=step)


def write_card(args: ScriptArguments, family: str, output_dir: Path, prompts, before, after, facts: dict) -> None:
    """Writes the before/after gallery and the model card."""
    (output_dir / "images").mkdir(exist_ok=True)
    widgets, table = [], ["| prompt | base | with this LoRA |", "|---|---|---|"]
    for i, (prompt, base, tuned) in enumerate(zip(prompts, before, after)):
        base.save(output_dir / "images" / f"{i}_base.png")
        tuned.save(output_dir / "images" / f"{i}.png")
        widgets.append({"text": prompt, "output": {"url": f"images/{i}.png"}})
        cell = prompt.replace("|", "\\|").replace("\n", " ")
        table.append(f"| {cell} | ![base](images/{i}_base.png) | ![LoRA](images/{i}.png) |")
    datasets = [name for name in (args.dataset_name, args.scores_dataset_name) if name and not os.path.isdir(name)]
    family_tag, pipeline_class = {
        "sd": ("stable-diffusion", "StableDiffusionPipeline"),
        "sdxl": ("stable-diffusion-xl", "StableDiffusionXLPipeline"),
    }[family]
    learns = "the model learns to denoise preferred images better than the base model does, and the others worse"
    if args.loss_type == "orpo":
        learns = "the model learns to denoise preferred images, and the others worse than those"
    model = args.pretrained_model_name_or_path
    front = {  # what is a folder of this machine is nothing for the Hub to link
        **({} if os.path.isdir(model) else {"base_model": model}),
        "library_name": "diffusers",
        **base_license(model, args.revision),
        **({"datasets": datasets} if datasets else {}),
        "tags": [
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "lora",
            "template:sd-lora",
            family_tag,
            "dpo",
            "dpo-qsd",
        ],
        "widget": widgets,
    }
    name = output_dir.resolve().name
    figures = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    body = f"""{CARD_BEGIN}
# {name}

A LoRA for `{args.pretrained_model_name_or_path}`, trained with `{args.loss_type}` on {facts["pairs"]}
of `{args.scores_dataset_name or args.dataset_name}`, after *Effective Text-to-Image Alignment with Quality Aware Pair
Ranking* (DPO-QSD): {learns}.

<Gallery />

Same prompts, same seeds:

{chr(10).join(table)}

## Use it

With diffusers:

```python
import torch
from diffusers import {pipeline_class}

pipeline = {pipeline_class}.from_pretrained("{args.pretrained_model_name_or_path}", dtype=torch.float16)
pipeline.to("cuda")
pipeline.load_lora_weights("{args.hub_model_id or output_dir}", weight_name="pytorch_lora_weights.safetensors")
image = pipeline({json.dumps(prompts[0])}).images[0]
```

With ComfyUI: put `comfyui/{name}.safetensors` into `models/loras` and load it with the "Load LoRA" node at strength 1.

## How it was made

```bash
{training_command()}
```

| | |
|---|---|
{figures}

Loss, margins, learning rate and speed of every step are in [{LOG_FILE}]({LOG_FILE}). All settings that are not the
script's defaults, as a file for `--config`:

```yaml
{changed_settings(args)}
```
{CARD_END}
"""
    write_card_file(output_dir / "README.md", front, body)


# Copied from train_rankdpo_sdxl.write_card_file
def write_card_file(file: Path, front: dict, body: str) -> None:
    """Writes a card, or what is new into the one that stands."""
    card = join_card(front, body)
    if file.exists():
        standing, text = split_card(file.read_text())
        for name in ("configs", "dataset_info"):  # a folder holds no other configurations than those written now
            standing.pop(name, None)
        card = merge_cards(card, join_card(standing, text))
    write_text(file, card)


# Copied from train_rankdpo_sdxl.base_license
def base_license(model: str, revision: str | None) -> dict:
    """The licence fields of the base model's card, which a LoRA of it inherits; none if the card cannot be read."""
    if model in BASE_LICENSES:
        return BASE_LICENSES[model]
    try:
        local = os.path.isdir(model)
        card = Path(model, "README.md") if local else hf_hub_download(model, "README.md", revision=revision)
        front = split_card(Path(card).read_text())[0]
    except Exception:  # no card, no network, a card with broken front matter: the licence stays for the user to name
        return {}
    found = {name: front[name] for name in ("license", "license_name", "license_link") if name in front}
    if "license_link" in found and not str(found["license_link"]).startswith("http") and not local:
        found["license_link"] = f"https://huggingface.co/{model}/blob/main/{found['license_link']}"
    return found


# Copied from train_rankdpo_sdxl.data_identity
def data_identity(dataset: Dataset, labels: str) -> str:
    """Which data it was: the commit, of a dataset from the Hub, and the hash of the labels."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}  # datasets names them by the commit
    commits = [f"commit {folder}" for folder in sorted(folders) if re.fullmatch("[0-9a-f]{40}", folder)]
    return ", ".join([*commits, f"hash of rows and labels {labels}"])


# Copied from train_rankdpo_sdxl.changed_settings
def changed_settings(args: ScriptArguments) -> str:
    """What is not the default and bears on the result, as YAML for `--config`."""
    fields = {name: spec.default for name, spec in type(args).__dataclass_fields__.items()}
    elsewhere = "output_dir cache_dir logging_dir resume_from_checkpoint push_to_hub hub_model_id hub_private_repo"
    elsewhere += " hub_strategy report_to dataloader_num_workers"
    settings = {name: value for name, value in asdict(args).items() if value != fields[name]}
    settings = {name: value for name, value in settings.items() if name not in elsewhere.split()}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()


# Copied from train_rankdpo_sdxl.open_log
def open_log(file: Path, step: int):
    """Opens the training log, a JSON object a line, to go on after `step`; lines of later steps are done anew."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    write_text(file, "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step))
    return open(file, "a", buffering=1)


# Copied from train_rankdpo_sdxl.write_text
def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


# ----------------------------------------------------------------------------------------------------------------------
# Hub
# ----------------------------------------------------------------------------------------------------------------------


# What asking again does not mend: a malformed name, no token, no network wanted.
# Copied from train_rankdpo_sdxl.LASTING_ERRORS
LASTING_ERRORS = (ValueError, TypeError, LocalTokenNotFoundError, OfflineModeIsEnabled)


# Copied from train_rankdpo_sdxl.COMMIT_FILES
COMMIT_FILES = 250  # commits of many more files run into the Hub's time limit


# Copied from train_rankdpo_sdxl.HUB_TIMEOUT
HUB_TIMEOUT = 300  # seconds without a byte; the client by itself would wait for ever


# Copied from train_rankdpo_sdxl.retried
def retried(request, *arguments, **options):
    """Asks the Hub again, after growing pauses, for what passes by itself: 409, 412, 429, 5xx, a lost connection, one
    that has gone silent.

    The client repeats reads and uploads of files by itself, but no commit and no making of a repository.
    """
    for pause in (1, 2, 4, 8, 16, None):
        get_session().timeout = HUB_TIMEOUT
        try:
            return request(*arguments, **options)
        except Exception as error:  # the client's own, and its transport's, whose classes differ between versions
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            lasting = isinstance(error, LASTING_ERRORS) if status is None else status < 500
            lasting = lasting and status not in (408, 409, 412, 429)
            if pause is None or lasting and not isinstance(error, json.JSONDecodeError):  # that is a proxy's error page
                raise
            time.sleep(max(pause, wanted_pause(response)) if status else pause)


# Copied from train_rankdpo_sdxl.wanted_pause
def wanted_pause(response) -> int:
    """Seconds that a 429 asks to wait: `Retry-After: 55`, or `RateLimit: "api";r=0;t=55`; at most one window of 330."""
    limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", "")) if response.status_code == 429 else None
    wanted = limit.group(1) if limit else response.headers.get("Retry-After", "")
    return min(int(wanted), 330) if wanted.isdigit() else 0


# Copied from train_rankdpo_sdxl.create_repo
def create_repo(name: str, repo_type: str, private: bool) -> str:
    """Makes the repository unless it exists, and exits with one line unless the token may write to it.

    Returns:
        its whole id, with the namespace.
    """
    try:
        options = {"repo_type": repo_type, "private": private or None, "exist_ok": True}
        repo_id = retried(HfApi().create_repo, name, **options).repo_id
        retried(_check_write_access, repo_id, repo_type)
    except Exception as error:
        raise SystemExit(
            f"--push_to_hub: the {repo_type} repository {name} cannot be written to: {one_line(error)}; it takes a "
            "token with write access (hf auth login, or HF_TOKEN)"
        ) from None
    return repo_id


# Copied from train_rankdpo_sdxl._check_write_access
def _check_write_access(repo_id: str, repo_type: str) -> None:
    try:
        HfApi().auth_check(repo_id, repo_type=repo_type, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 404:  # a Hub of one's own may not know the question
            raise
    HfApi().repo_info(repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)


# Copied from train_rankdpo_sdxl.push_to_hub
def push_to_hub(
    repo_id: str,
    repo_type: str,
    files: dict[str, Path | bytes],
    message: str,
    card: str = "",
    replace: tuple[str, ...] = (),
) -> str:
    """Sends files in one commit (more than COMMIT_FILES in several), after failures again. What the Hub has already is
    not sent again.

    Args:
        files: name in the repository → local file, or its content.
        card: README.md, merged into the one that stands there.
        replace: patterns of names; what matches one there and is not among the files is deleted.

    Returns:
        the card as it stands there now.
    """
    parts = list(files.items())
    while len(parts) > COMMIT_FILES:  # the card goes with each: it is what tells these files as ours
        retried(_commit, repo_id, repo_type, dict(parts[:COMMIT_FILES]), f"{message} (part)", card, (), files)
        parts = parts[COMMIT_FILES:]
    return retried(_commit, repo_id, repo_type, dict(parts), message, card, replace, files)


# Copied from train_rankdpo_sdxl._commit
def _commit(repo_id, repo_type, part: dict, message: str, card: str, replace: tuple[str, ...], files: dict) -> str:
    # A commit upon the very state that was read: if somebody edits the card meanwhile, this is a 412, and asked anew.
    head = HfApi().repo_info(repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)
    standing = {file.rfilename for file in head.siblings}
    operations = [CommitOperationAdd(name, content) for name, content in part.items()]
    if card:
        if "README.md" in standing:
            theirs = hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=head.sha)
            card = merge_cards(card, Path(theirs).read_text())
        operations.append(CommitOperationAdd("README.md", card.encode()))
    stale = {name for name in standing - files.keys() if any(fnmatch(name, pattern) for pattern in replace)}
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    HfApi().create_commit(repo_id, operations, commit_message=message, repo_type=repo_type, parent_commit=head.sha)
    return card


# Copied from train_rankdpo_sdxl.split_card
def split_card(text: str) -> tuple[dict, str]:
    """A card's front matter and body."""
    match = re.match(r"\s*---\s*?\n(.*?)^---[ \t\r]*$\n?", text, re.S | re.M)
    return (yaml.safe_load(match.group(1)) or {}, text[match.end() :]) if match else ({}, text)


# Copied from train_rankdpo_sdxl.join_card
def join_card(front: dict, body: str) -> str:
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body.lstrip()}"


# Copied from train_rankdpo_sdxl.merge_cards
def merge_cards(mine: str, theirs: str) -> str:
    """A card written anew, with what people made of the one that stands.

    Of the front matter CARD_FACTS are mine, everything else theirs if they have it; what is listed by configuration, or
    by the dataset of an evaluation, stays where it is of others. Of the body the part between the marks is mine,
    everything around it theirs.
    """
    (front, body), (their_front, their_body) = split_card(mine), split_card(theirs)
    if "license" in their_front:  # a licence's name and link belong to it
        front = {name: value for name, value in front.items() if "license_" not in name or name in their_front}
    merged = {**front, **their_front, **{name: front[name] for name in CARD_FACTS if name in front}}
    for name in ("configs", "dataset_info"):
        if name in front and name in their_front:
            parts = [part if isinstance(part, list) else [part] for part in (front[name], their_front[name])]
            own = [part.get("config_name", "default") for part in parts[0]]
            merged[name] = parts[0] + [part for part in parts[1] if part.get("config_name", "default") not in own]
    if front.get("model-index") and their_front.get("model-index"):
        (own,), (their, *more) = front["model-index"], their_front["model-index"]
        datasets = [result["dataset"] for result in own["results"]]
        others = [result for result in their.get("results") or [] if result.get("dataset") not in datasets]
        merged["model-index"] = [{**own, **their, "results": others + own["results"]}, *more]
    block = re.search(f"{re.escape(CARD_BEGIN)}.*?{re.escape(CARD_END)}", body, re.S)
    block = block.group(0) if block else body.strip()
    before, begin, rest = their_body.rpartition(CARD_BEGIN)
    _, end, after = rest.partition(CARD_END)
    if begin and end:
        body = f"{before}{block}{after}"
    elif their_body.strip():
        body = f"{their_body.rstrip()}\n\n{block}\n"
    return join_card(merged, body)


# Copied from train_rankdpo_sdxl.hub_files
def hub_files(output_dir: Path) -> dict[str, Path]:
    """Name in the repository → file: not the checkpoints, with their optimizer states, and not the trackers' files."""
    patterns = (LORA_FILE, "comfyui/*.safetensors", "images/*.png", "run.json", LOG_FILE)
    files = [file for pattern in patterns for file in sorted(output_dir.glob(pattern))]
    return {file.relative_to(output_dir).as_posix(): file for file in files}


# Copied from train_rankdpo_sdxl.upload
def upload(args: ScriptArguments, output_dir: Path) -> None:
    """Sends LoRA, card, gallery and log. Where that fails it says how to do it later: everything is on disk."""
    enable_progress_bars()
    try:
        card = (output_dir / "README.md").read_text()
        # A run that is published only now had no repository to name in its card.
        card = re.sub(r'load_lora_weights\("[^"]*"', f'load_lora_weights("{args.hub_model_id}"', card)
        card = push_to_hub(args.hub_model_id, "model", hub_files(output_dir), "LoRA, card and gallery", card)
    except Exception as error:
        command = ["hf", "upload", args.hub_model_id, str(output_dir), ".", "--exclude", "checkpoint-*"]
        command = shlex.join([*command, "--exclude", f"{args.logging_dir}/*"])
        raise SystemExit(
            f"upload to {args.hub_model_id} failed: {one_line(error)}; everything is in {output_dir}. The same command "
            "with --resume_from_checkpoint latest uploads it, and keeps what people wrote on its card; the folder "
            f"as it is: {command}"
        ) from None
    write_text(output_dir / "README.md", card)
    print(f"published: {HfApi().endpoint}/{args.hub_model_id}")


# Copied from train_rankdpo_sdxl.CheckpointUpload
class CheckpointUpload:
    """Sends the LoRA of a checkpoint while the training goes on, one at a time; a checkpoint that comes while another
    is on its way is left to the next, or to the end."""

    def __init__(self, repo_id: str):
        self.repo_id, self.executor, self.sending = repo_id, ThreadPoolExecutor(1), None
        disable_progress_bars()  # they would be drawn over that of the training

    def __call__(self, output_dir: Path, checkpoint: Path) -> None:
        if self.sending and not self.sending.done():
            return
        # Read now: by the time it is sent, checkpoints_total_limit may have removed the folder.
        files = {LORA_FILE: (checkpoint / LORA_FILE).read_bytes()}
        files |= {name: (output_dir / name).read_bytes() for name in (LOG_FILE, "run.json")}
        self.sending = self.executor.submit(self._send, files, checkpoint.name)

    def _send(self, files: dict[str, bytes], checkpoint: str) -> None:
        try:
            push_to_hub(self.repo_id, "model", files, f"LoRA of {checkpoint}")
        except Exception as error:
            message = f"upload of {checkpoint} to {self.repo_id} failed: {one_line(error)}; the training goes on"
            tqdm.write(message, file=sys.stderr)

    def wait(self) -> None:
        self.executor.shutdown()


# Copied from train_rankdpo_sdxl.training_command
def training_command() -> str:
    """The command as it was given, by `accelerate launch` or by `python`."""
    launched = "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    launcher = ["accelerate", "launch"] if launched else ["python"]
    launcher += ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    return shlex.join([*launcher, os.path.basename(sys.argv[0]), *sys.argv[1:]])


# Copied from train_rankdpo_sdxl.peak_memory_gb
def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.make_accelerator
def make_accelerator(args: ScriptArguments) -> Accelerator:
    launched = "LOCAL_RANK" in os.environ
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        cpu=launched and not torch.cuda.is_available(),  # several processes without a GPU: gloo
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise SystemExit(f"accelerate is set to {kind.value}: a LoRA needs no more than data parallelism")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


# Copied from train_rankdpo_sdxl.make_optimizer
def make_optimizer(args: ScriptArguments, parameters: list) -> torch.optim.Optimizer:
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        optimizer_class = torch.optim.AdamW
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def encode(args, family: str, images, labels, cache: Path, accelerator: Accelerator, weight_dtype) -> Validator | None:
    """Encodes what is missing of the cache; the main process gets a validator that holds the VAE, on the CPU."""
    if args.pretrained_vae_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, dtype=weight_dtype)
    else:
        model = {"revision": args.revision, "variant": args.variant, "dtype": torch.float32}
        vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **model)
    vae.requires_grad_(False).eval().to(accelerator.device)
    encode_prompts = None
    if accelerator.is_main_process or missing_shards(cache, len(labels), accelerator):
        encode_prompts = PromptEncoder(args, family, accelerator.device, weight_dtype)
    encode_dataset(args, images, labels, cache, vae, encode_prompts, accelerator, weight_dtype)
    vae.to("cpu")
    validator = None
    if accelerator.is_main_process:
        prompts = args.validation_prompts or list(dict.fromkeys(row["prompt"] for row in labels))[:4]
        validator = Validator(args, prompts, vae, encode_prompts, accelerator.device, weight_dtype)
    del encode_prompts
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return validator


def finish(args, family: str, unet, validator: Validator, accelerator: Accelerator, facts: dict) -> None:
    """Writes the LoRA files, the gallery and, last of all, the card."""
    output_dir = Path(args.output_dir)
    save_lora(unet, output_dir)
    save_comfyui_lora(unet, output_dir / "comfyui" / f"{output_dir.resolve().name}.safetensors")
    before, after = validator(unet, lora=False), validator(unet)
    log_images(accelerator, validator.prompts, after, facts["steps"])
    device = accelerator.device
    facts["hardware"] = f"{accelerator.num_processes} x " + (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    )
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    write_card(args, family, output_dir, validator.prompts, before, after, facts)
    print(f"LoRA: {output_dir / LORA_FILE}, card: {output_dir / 'README.md'}")


# Copied from train_rankdpo_sdxl.parse_arguments
def parse_arguments(arguments: list[str] | None = None) -> ScriptArguments:
    """Flags of the command line over those of `--config`; a wrong one ends in one line."""
    try:
        return TrlParser(ScriptArguments).parse_args_and_config(arguments)[0]
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"{os.path.basename(sys.argv[0])}: {one_line(error)}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Start
# ----------------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    diffusers_logging.disable_progress_bar()  # of loading weights; downloads and our own work show theirs
    transformers_logging.disable_progress_bar()
    main(parse_arguments())
