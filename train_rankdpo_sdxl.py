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
"""RankDPO for SDXL: a LoRA from ranked images (Kag et al., "Scalable Ranked Preference Optimization", 2024).

The dataset has one row per prompt with k images and their preference probabilities, as `build_synpic.py` writes it.

One GPU:

    accelerate launch train_rankdpo_sdxl.py \
        --dataset_name outputs/synpic \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --output_dir outputs/rankdpo-sdxl \
        --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam \
        --train_batch_size 1 --gradient_accumulation_steps 16 --max_train_steps 1000 \
        --checkpointing_steps 100

Settings from a file, some of them overridden, and the same run continued after a crash:

    accelerate launch train_rankdpo_sdxl.py --config recipes/rankdpo_sdxl.yaml --dataset_name outputs/synpic \
        --beta_dpo 2000
    accelerate launch train_rankdpo_sdxl.py --config recipes/rankdpo_sdxl.yaml --dataset_name outputs/synpic \
        --beta_dpo 2000 --resume_from_checkpoint latest

Several GPUs: `accelerate launch --multi_gpu --num_processes 4 train_rankdpo_sdxl.py ...`. With the same global batch
(`train_batch_size` x processes x `gradient_accumulation_steps`) every number of processes sees the same prompts, the
same timesteps and the same noise in the same optimizer step.

Published as it learns, with card, gallery and log at the end: `--push_to_hub --hub_model_id user/name --hub_strategy
checkpoint`.
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
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from datasets import Dataset, Image, load_dataset
from datasets import config as datasets_config
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
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


LOSS_TYPES = ("rankdpo", "dpo_gain", "dpo", "sft", "weighted_sft")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
CACHE_SHARD_ROWS = 64  # prompts per cache file: the unit of work that a crash can lose
CACHE_VERSION = 1
HUB_STRATEGIES = ("end", "checkpoint")
BASE_LICENSES = {"stabilityai/stable-diffusion-xl-base-1.0": {"license": "openrail++"}}
SCRIPT_OF_PIPELINE = {
    "StableDiffusionPipeline": "train_dpo_qsd.py",
    "StableDiffusionXLPipeline": "train_rankdpo_sdxl.py",
    "StableDiffusion3Pipeline": "train_rankdpo_sd3.py",
}
LORA_FILE = "pytorch_lora_weights.safetensors"
LOG_FILE = "training_log.jsonl"
CARD_FACTS = ("base_model", "datasets", "widget")  # of the front matter, what a run states anew
CARD_BEGIN = "<!-- train_rankdpo_sdxl.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what train_rankdpo_sdxl.py wrote. -->"


@dataclass
class ScriptArguments:
    """Flags carry diffusers' names wherever diffusers has one. `--config file.yaml` reads them from a file."""

    # Model
    pretrained_model_name_or_path: str = field(
        default="stabilityai/stable-diffusion-xl-base-1.0", metadata={"help": "SDXL pipeline: Hub id or folder."}
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
        default=None, metadata={"help": "Ranked dataset: Hub id, or the folder build_synpic.py wrote. Required."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    images_column: str = field(default="images", metadata={"help": "Column of the lists of k images."})
    prompt_id_column: str = field(
        default="prompt_id", metadata={"help": "Column of the unique ids that seed each prompt's timestep and noise."}
    )
    preference_column: str = field(
        default="preference_probability", metadata={"help": "Column of the preference probabilities, in [0, 1]."}
    )
    rank_column: str = field(
        default="rank",
        metadata={"help": "Column of the ranks, 1 = best. A dataset without it is ranked by preference."},
    )
    rank_by: str = field(
        default="all",
        metadata={"help": "What the labels come from: all (the columns as they are), one reward's name, or random."},
    )
    generators: list[str] | None = field(
        default=None, metadata={"help": "Train on these generators' images only; preferences are computed anew."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N prompts only."})
    resolution: int = field(default=1024, metadata={"help": "Pixels: shorter side resized to it, centre cropped."})
    cache_dir: str = field(
        default="outputs/cache",
        metadata={"help": "Latents and prompt embeddings are written here once, and reused by every later run."},
    )
    vae_batch_size: int = field(default=4, metadata={"help": "Images per VAE forward while encoding."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read the data ahead."})

    # Objective
    loss_type: str = field(
        default="rankdpo",
        metadata={
            "help": "rankdpo; dpo_gain (gain weights only); dpo (all pairs alike); sft (denoise the best image); "
            "weighted_sft (denoise all images, weighted by preference).",
            "choices": LOSS_TYPES,
        },
    )
    beta_dpo: float = field(
        default=5000.0,
        metadata={"help": "Strength of the tie to the base model. The margin is beta/2 times mean squared errors."},
    )
    rank_source: str = field(
        default="label",
        metadata={
            "help": "Where rankdpo's discounts take the ranks from: label (Algorithm 2) or predicted (the model's "
            "own scores, LambdaLoss).",
            "choices": ("label", "predicted"),
        },
    )

    # LoRA
    rank: int = field(default=64, metadata={"help": "LoRA rank; alpha is equal to it, so the scale is 1."})

    # Training
    output_dir: str = field(default="outputs/rankdpo-sdxl", metadata={"help": "LoRA, card and checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seeds initialisation, data order, timesteps and noise."})
    train_batch_size: int = field(default=1, metadata={"help": "Prompts (of k images each) per process and forward."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forwards per optimizer step."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the prompts, if no step count."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Optimizer steps; overrides the epochs."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(
        default="constant_with_warmup",
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
        default=None, metadata={"help": "Prompts of the before/after gallery (default: the dataset's first four)."}
    )
    validation_steps: int | None = field(
        default=None, metadata={"help": "Also draw the validation prompts every N optimizer steps."}
    )
    validation_num_inference_steps: int = field(default=30, metadata={"help": "Denoising steps of the gallery."})
    validation_guidance_scale: float = field(default=5.0, metadata={"help": "Guidance of the gallery."})
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
            if kinds[name] is float:
                try:
                    setattr(self, name, float(value))  # YAML reads 1e-5 as a string
                except (TypeError, ValueError):
                    raise SystemExit(f"--{name} {value}: must be a number") from None
            if kinds[name] == list[str] | None and isinstance(value, str):
                setattr(self, name, [value])
        for name in ("beta_dpo", "learning_rate", "max_grad_norm", "num_train_epochs"):
            if not getattr(self, name) > 0:
                raise SystemExit(f"--{name} {getattr(self, name)}: must be greater than 0")
        for name in (
            "rank resolution train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps "
            "checkpoints_total_limit max_train_samples validation_steps vae_batch_size validation_num_inference_steps"
        ).split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("lr_warmup_steps", "dataloader_num_workers", "adam_beta1", "adam_beta2", "adam_weight_decay"):
            if getattr(self, name) < 0 or name.startswith("adam_beta") and getattr(self, name) >= 1:
                raise SystemExit(f"--{name} {getattr(self, name)}: out of range")
        if self.resolution % 8:
            raise SystemExit(f"--resolution {self.resolution}: must be a multiple of 8")
        if not self.dataset_name:
            raise SystemExit("--dataset_name is missing: a Hub id, or the folder build_synpic.py wrote")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise SystemExit("--mixed_precision fp16 needs a GPU: use bf16 or no")


# ----------------------------------------------------------------------------------------------------------------------
# Objective
# ----------------------------------------------------------------------------------------------------------------------


def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image, in float32 from the subtraction on.

    Half precision here would ruin the margin: at beta/2 = 2500 it puts an error of 0.2 to 5 on every logit.

    Args:
        prediction, target: (n, C, H, W).

    Returns:
        float32 (n,).
    """
    return (target.float() - prediction.float()).square().mean(dim=(1, 2, 3))


def dcg_weights(phi: torch.Tensor, rank: torch.Tensor | None = None) -> torch.Tensor:
    """Pairwise DCG weights |2^φ_i − 2^φ_j| · |1/log2(1 + r_i) − 1/log2(1 + r_j)| (RankDPO, Algorithm 2, Eq. 6).

    Args:
        phi: preference probabilities, float (B, k) in [0, 1].
        rank: ranks (B, k), 1 = best; default: by phi, ties by position.

    Returns:
        float32 (B, k, k), symmetric, zero on the diagonal and between images of equal phi.
    """
    phi = phi.float()
    if rank is None:
        rank = phi.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    gain = torch.exp2(phi)
    discount = 1.0 / torch.log2(1.0 + rank.float())
    return (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


def rankdpo_loss(
    model_errors: torch.Tensor,
    ref_errors: torch.Tensor | None,
    phi: torch.Tensor,
    beta: float,
    rank: torch.Tensor | None = None,
    loss_type: str = "rankdpo",
    rank_source: str = "label",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """RankDPO (Eq. 7) and the paper's other objectives.

    With s = model error − reference error (lower is better) and m_ij = −(β/2)(s_i − s_j), a prompt's loss is
    −Σ_{i preferred over j} Δ_ij · log σ(m_ij); the batch's is the mean over prompts.

    Args:
        model_errors: denoising errors under the trained model, float32 (B, k).
        ref_errors: under the reference model, float32 (B, k); None for sft and weighted_sft, which need none.
        phi: preference probabilities, float (B, k).
        beta: β; the margin is β/2 times a difference of *mean* squared errors, Diffusion-DPO's convention.
        rank: ranks (B, k), 1 = best; default: by phi, ties by position.
        loss_type: rankdpo (Δ = DCG weight), dpo_gain (Δ = |G|), dpo (Δ = 1, ties left out), sft (error of the best
            image), weighted_sft (errors weighted by phi, normalised per prompt).
        rank_source: label, or predicted: the discounts' ranks come from the model's own scores (LambdaLoss).

    Returns:
        loss, float32 scalar; metrics, detached scalars: `loss`, and for the preference losses `implicit_accuracy`
        (share of the weighted pairs with m > 0) and `margin` (mean m over the weighted pairs).
    """
    phi = phi.float()
    if loss_type == "sft":
        best = phi.argmax(dim=1) if rank is None else rank.argmin(dim=1)
        loss = model_errors.gather(1, best[:, None]).mean()
        return loss, {"loss": loss.detach()}
    if loss_type == "weighted_sft":
        weights = phi / phi.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        loss = (weights * model_errors).sum(dim=1).mean()
        return loss, {"loss": loss.detach()}

    scores = model_errors - ref_errors
    margins = -(beta / 2) * (scores[:, :, None] - scores[:, None, :])
    preferred = phi[:, :, None] > phi[:, None, :]
    if loss_type == "rankdpo":
        if rank_source == "predicted":
            rank = scores.detach().argsort(dim=1, stable=True).argsort(dim=1) + 1
        weights = dcg_weights(phi, rank)
    elif loss_type == "dpo_gain":
        gain = torch.exp2(phi)
        weights = (gain[:, :, None] - gain[:, None, :]).abs()
    else:
        weights = torch.ones_like(margins)
    weights = weights * preferred
    loss = -(weights * F.logsigmoid(margins)).sum(dim=(1, 2)).mean()

    weighted = (weights > 0).float()
    count = weighted.sum().clamp(min=1)
    metrics = {
        "loss": loss.detach(),
        "implicit_accuracy": ((margins > 0) * weighted).sum().detach() / count,
        "margin": (margins * weighted).sum().detach() / count,
    }
    return loss, metrics


def training_step(unet, reference, noise_scheduler, batch: dict, args: ScriptArguments, weight_dtype):
    """One forward of all k images of a batch of prompts, and of the reference where the objective needs it.

    Args:
        unet: the model as prepared for training; reference: the same model unwrapped, whose adapter is switched off.
        batch: latents (B, k, C, h, w), noise (B, C, h, w), timesteps (B,), prompt_embeds (B, tokens, width),
            pooled_prompt_embeds (B, width), time_ids (B, k, 6), phi (B, k), rank (B, k).

    Returns:
        loss, metrics of `rankdpo_loss`.
    """
    batch_size, k = batch["latents"].shape[:2]
    latents = batch["latents"].flatten(0, 1).float()
    noise = batch["noise"].repeat_interleave(k, dim=0)
    timesteps = batch["timesteps"].repeat_interleave(k)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).to(weight_dtype)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    inputs = {
        "sample": noisy_latents,
        "timestep": timesteps,
        "encoder_hidden_states": batch["prompt_embeds"].repeat_interleave(k, dim=0),
        "added_cond_kwargs": {
            "text_embeds": batch["pooled_prompt_embeds"].repeat_interleave(k, dim=0),
            "time_ids": batch["time_ids"].flatten(0, 1).to(weight_dtype),
        },
    }
    ref_errors = None
    if args.loss_type not in ("sft", "weighted_sft"):
        with torch.no_grad(), adapter_off(reference):
            ref_errors = denoising_error(reference(**inputs).sample, target).view(batch_size, k)
    model_errors = denoising_error(unet(**inputs).sample, target).view(batch_size, k)
    return rankdpo_loss(
        model_errors, ref_errors, batch["phi"], args.beta_dpo, batch["rank"], args.loss_type, args.rank_source
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
    check_model(args)
    dataset = load_ranked_dataset(args)
    labels = make_labels(args, dataset)
    settings = run_settings(args, accelerator.num_processes, labels)
    checkpoint = check_output_dir(args, settings)
    k = len(labels[0]["images"])
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    epochs_steps = max(1, round(args.num_train_epochs * len(labels) / global_batch_size))
    max_train_steps = args.max_train_steps or epochs_steps
    start_step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    if start_step > max_train_steps:
        raise SystemExit(f"{checkpoint} is beyond the {max_train_steps} steps asked for: raise --max_train_steps")
    cache = Path(args.cache_dir) / cache_key(args, dataset, labels, weight_dtype)
    shards = cache_shards(len(labels))
    images = stored_images(dataset, args.images_column)
    check_images(images, labels, [row for i in missing_shards(cache, len(labels), accelerator) for row in shards[i]])
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
    validator = encode(args, images, labels, cache, accelerator, weight_dtype)

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
        CachedPrompts(cache, labels, args.seed, noise_scheduler.config.num_train_timesteps),
        batch_sampler=EpochSampler(args, len(labels), accelerator.process_index, accelerator.num_processes, start_step),
        num_workers=args.dataloader_num_workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(batches)
    if accelerator.is_main_process:
        config = {name: value for name, value in asdict(args).items() if isinstance(value, (int, float, str, bool))}
        accelerator.init_trackers("rankdpo-sdxl", config=config)
        log = open_log(output_dir / LOG_FILE, start_step)
    progress = tqdm(
        total=max_train_steps, initial=start_step, desc="train", disable=not accelerator.is_local_main_process
    )
    if max_train_steps <= args.lr_warmup_steps:
        accelerator.print(f"warning: all {max_train_steps} steps are warm-up: add prompts, or raise --max_train_steps")
    accelerator.print(
        f"{len(labels)} prompts x {k} images, {max_train_steps} steps of {global_batch_size} prompts, "
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
        logs["images_per_second"] = global_batch_size * k / (now - step_ended)
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
        images = (max_train_steps - start_step) * global_batch_size * k
        facts = {
            "prompts": f"{len(labels)} of {k} images",
            "steps": max_train_steps,
            "prompts per step": global_batch_size,
            "seed": args.seed,
            "data": data_identity(dataset, settings["labels"]),
            "speed": f"{images / seconds:.1f} images/s" if images else "not measured",
            "peak memory": f"{peak_memory_gb(device):.1f} GB",
        }
        log.close()
        finish(args, reference, validator, accelerator, facts)
        if upload_checkpoint:
            upload_checkpoint.wait()
        if args.push_to_hub:
            upload(args, output_dir)
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------------------------------
# Data: check, labels, encode once, read
# ----------------------------------------------------------------------------------------------------------------------


def one_line(error: Exception) -> str:
    """An exception's message on one line, whatever its class and length."""
    return " ".join(str(error).split()) or type(error).__name__


# Copied from build_synpic.preference_probability
def preference_probability(scores) -> np.ndarray:
    """Share of the comparisons an image wins (Algorithm 1): over all rewards, against all other images of its prompt.

    Args:
        scores: float array (n_rewards, k), higher is better. An equal score counts for neither image.

    Returns:
        float64 array (k,) in [0, 1].
    """
    scores = np.asarray(scores, dtype=np.float64)
    n_rewards, k = scores.shape
    wins = (scores[:, :, None] > scores[:, None, :]).sum(axis=(0, 2))
    return wins / (n_rewards * (k - 1))


# Copied from build_synpic.preference_rank
def preference_rank(scores) -> np.ndarray:
    """Ranks by preference probability, ties broken by the mean standardised reward, then by position.

    Args:
        scores: float array (n_rewards, k), higher is better.

    Returns:
        int64 array (k,), a permutation of 1…k; 1 is the best.
    """
    scores = np.asarray(scores, dtype=np.float64)
    deviation = scores.std(axis=1, keepdims=True)
    standardised = (scores - scores.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1.0)
    # Rounded, so that float noise in a mean of equal values cannot decide what position should.
    tie_breaker = np.round(standardised.mean(axis=0), 9)
    order = np.lexsort((np.arange(scores.shape[1]), -tie_breaker, -preference_probability(scores)))
    rank = np.empty(scores.shape[1], dtype=np.int64)
    rank[order] = np.arange(1, scores.shape[1] + 1)
    return rank


def folder_digest(folder: str) -> str:
    """A hash of the names, sizes and dates of a folder's files: a model's, or a dataset's without what
    build_synpic.py and score_pairs.py write anew at every run (card, pictures, statistics) or for themselves (work)."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    names = [(file.relative_to(folder), file.stat()) for file in files]
    others = ("work", "README.md", "grid.png", "figures", "statistics.json")
    names = [(name, stat) for name, stat in names if name.parts[0] not in others]
    stats = [f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in names]
    return hashlib.sha256("|".join(stats).encode()).hexdigest()[:16]


def local_cache(folder: str) -> str | None:
    """Where `load_dataset` shall cache a local folder; None for a dataset of the Hub.

    By itself it keys the cache of a folder by the patterns in its card, not by its files, and so would serve the old
    rows of a dataset that was built again.
    """
    if not os.path.isdir(folder):
        return None
    return os.path.join(datasets_config.HF_DATASETS_CACHE, f"local-{folder_digest(folder)}")


def load_ranked_dataset(args: ScriptArguments) -> Dataset:
    """Loads and checks the dataset's table; no image is decoded yet. Exits with one line that names what is wrong."""
    where = f"--dataset_name {args.dataset_name}"
    try:
        dataset = load_dataset(
            args.dataset_name,
            args.dataset_config_name,
            split=args.dataset_split,
            revision=args.dataset_revision,
            cache_dir=local_cache(args.dataset_name),
        )
    except Exception as error:
        raise SystemExit(f"{where}: cannot be loaded: {one_line(error)}") from None
    needed = {
        "prompt_id_column": args.prompt_id_column,
        "prompt_column": args.prompt_column,
        "images_column": args.images_column,
        "preference_column": args.preference_column,
    }
    for flag, column in needed.items():
        if column not in dataset.column_names:
            raise SystemExit(
                f"{where}: no column {column!r} (--{flag}); it has {', '.join(dataset.column_names) or 'none'}"
            )
    if not isinstance(getattr(dataset.features[args.images_column], "feature", None), Image):
        raise SystemExit(f"{where}: column {args.images_column!r} must hold lists of images, List(Image())")
    if args.max_train_samples:
        dataset = dataset.select(range(min(args.max_train_samples, len(dataset))))
    if len(dataset) == 0:
        raise SystemExit(f"{where}: split {args.dataset_split!r} has no rows")
    return dataset


def make_labels(args: ScriptArguments, dataset: Dataset) -> list[dict]:
    """Checks every row and computes its labels.

    Returns:
        one dict per row: `prompt_id` str, `prompt` str, `images` (positions of the images used, k of them),
        `phi` float32 (k,) and `rank` int64 (k,).
    """
    columns = [args.prompt_id_column, args.prompt_column, args.preference_column]
    columns += [name for name in (args.rank_column, "generators", "scores") if name in dataset.column_names]
    from_scores = args.rank_by != "random" and (args.generators or args.rank_by != "all")
    if from_scores and "scores" not in columns:
        raise SystemExit("--rank_by / --generators need the dataset's `scores` column, which it does not have")
    if args.generators and "generators" not in columns:
        raise SystemExit("--generators needs the dataset's `generators` column, which it does not have")
    n_images = count_images(dataset, args.images_column)
    labels, seen, expected = [], {}, None
    for index, row in enumerate(dataset.select_columns(columns)):
        where = f"row {index} (prompt_id {row[args.prompt_id_column]!r})"
        prompt_id, prompt, phi = (row[name] for name in columns[:3])
        if prompt_id is None or prompt_id in seen:
            raise SystemExit(
                f"{where}: `{args.prompt_id_column}` is missing or stands at row {seen.get(prompt_id)} too"
            )
        seen[prompt_id] = index
        if not prompt or not prompt.strip():
            raise SystemExit(f"{where}: the prompt is empty: remove the row")
        if n_images[index] < 2:
            raise SystemExit(f"{where}: {n_images[index]} image: a preference needs at least 2 images per prompt")
        if phi is None or len(phi) != n_images[index] or any(value is None or value != value for value in phi):
            raise SystemExit(
                f"{where}: `{args.preference_column}` must give one number for each of the {n_images[index]} images"
            )
        if min(phi) < 0 or max(phi) > 1:
            raise SystemExit(f"{where}: `{args.preference_column}` {phi} is outside [0, 1]")
        rank = row.get(args.rank_column)
        if rank is None:
            rank = np.argsort(np.argsort(-np.array(phi), kind="stable"), kind="stable") + 1
        elif not is_ranking(rank, phi):
            raise SystemExit(
                f"{where}: `{args.rank_column}` {list(rank)} contradicts `{args.preference_column}` {phi}: it must be "
                "a permutation of 1…k that never puts a less preferred image first"
            )
        images = list(range(n_images[index]))
        if args.generators:
            if len(row["generators"]) != n_images[index]:
                raise SystemExit(f"{where}: `generators` must name one for each of the {n_images[index]} images")
            images = [i for i, name in enumerate(row["generators"]) if name in args.generators]
            if len(images) < 2:
                raise SystemExit(
                    f"{where}: {len(images)} of its images are from --generators {' '.join(args.generators)}; the row "
                    f"has {', '.join(sorted(set(row['generators'])))}; at least 2 are needed"
                )
        if args.rank_by == "random":
            rank = _generator(args.seed, "random labels", prompt_id).permutation(len(images)) + 1
            phi = (len(images) - rank) / (len(images) - 1)
        elif from_scores:
            names = sorted(row["scores"]) if args.rank_by == "all" else [args.rank_by]
            if not set(names) <= set(row["scores"]):
                raise SystemExit(f"--rank_by {args.rank_by}: no such reward; it has {', '.join(row['scores'])}")
            if any(len(row["scores"][name] or []) != n_images[index] for name in names):
                raise SystemExit(f"{where}: `scores` must give one number per image and reward")
            scores = np.array([row["scores"][name] for name in names], dtype=np.float64)[:, images]
            if not np.isfinite(scores).all():
                raise SystemExit(f"{where}: `scores` holds a number that is not finite")
            phi, rank = preference_probability(scores), preference_rank(scores)
        expected = expected or (len(images), where)
        if len(images) != expected[0]:
            raise SystemExit(
                f"{where}: {len(images)} images, but {expected[1]} has {expected[0]}: all rows need the same"
            )
        labels.append(
            {
                "prompt_id": str(prompt_id),
                "prompt": prompt,
                "images": images,
                "phi": np.array(phi, dtype=np.float32),
                "rank": np.array(rank, dtype=np.int64),
            }
        )
    return labels


def is_ranking(rank: list[int], phi: list[float]) -> bool:
    """True for a permutation of 1…k that never puts an image before one of higher preference."""
    if None in rank or sorted(rank) != list(range(1, len(phi) + 1)):
        return False
    return bool((np.diff(np.array(phi)[np.argsort(rank)]) <= 0).all())


def count_images(dataset: Dataset, column: str) -> list[int]:
    """Images per row, counted in Arrow: no image is read into Python."""
    batches = dataset.select_columns([column]).with_format("arrow").iter(256)
    return [count for table in batches for count in pc.list_value_length(table[column]).fill_null(0).to_pylist()]


def stored_images(dataset: Dataset, column: str) -> Dataset:
    """The images as stored, undecoded. In Arrow's format: casting the column would write the whole dataset anew. Made
    once: every such view copies the dataset's list of files."""
    return dataset.select_columns([column]).with_format("arrow")


def read_images(images: Dataset, index: int) -> list[dict]:
    """A row of `stored_images`: {"bytes", "path"} of each image."""
    return images[index].column(0)[0].as_py()


def _generator(*key) -> np.random.Generator:
    """A NumPy generator that is a function of the key alone, on every machine and in every process."""
    digest = hashlib.sha256("|".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def check_images(images: Dataset, labels: list[dict], rows: list[int]) -> None:
    """Decodes the rows' images once, JPEGs at an eighth of their size, so that a bad one is named before any model
    is loaded."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        checks = pool.map(partial(_undecodable_image, images, labels), rows)
        for index, found in zip(rows, tqdm(checks, desc="check images", total=len(rows), disable=len(rows) < 2000)):
            if found:
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(f"row {index} (prompt_id {labels[index]['prompt_id']!r}): {found}")


def _undecodable_image(images: Dataset, labels: list[dict], index: int) -> str | None:
    row = read_images(images, index)
    for position in labels[index]["images"]:
        try:
            with _open_image(row[position]) as image:
                image.draft("RGB", (64, 64))
                image.load()
        except Exception as error:
            return f"image {position} does not decode: {one_line(error)}"
    return None


def _open_image(image: dict) -> PILImage.Image:
    return PILImage.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


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


def model_fingerprint(model: str, file: str, revision: str | None = None) -> str:
    """What identifies a model's weights: the commit of a Hub snapshot; name, size and date of a folder's files.

    Args:
        file: one of the model's files, `model_index.json` of a pipeline or `config.json` of a single model.
    """
    if not os.path.isdir(model):
        return f"{model}@{Path(hf_hub_download(model, file, revision=revision)).parent.name}"
    return folder_digest(model)


def cache_key(args: ScriptArguments, dataset: Dataset, labels: list[dict], weight_dtype: torch.dtype) -> str:
    """Hash of everything that latents and embeddings depend on; labels and hyperparameters are not among it."""
    parts = [
        CACHE_VERSION,
        dataset._fingerprint,
        folder_digest(args.dataset_name) if os.path.isdir(args.dataset_name) else None,
        args.images_column,
        args.prompt_column,
        labels[0]["images"] if args.generators is None else [row["images"] for row in labels],
        model_fingerprint(args.pretrained_model_name_or_path, "model_index.json", args.revision),
        args.variant,
        args.pretrained_vae_model_name_or_path
        and model_fingerprint(args.pretrained_vae_model_name_or_path, "config.json"),
        args.resolution,
        str(weight_dtype),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class PromptEncoder:
    """Both of SDXL's tokenizers and text encoders."""

    def __init__(self, args: ScriptArguments, device, dtype):
        kwargs = {"revision": args.revision}
        model = args.pretrained_model_name_or_path
        self.tokenizers = [
            AutoTokenizer.from_pretrained(model, subfolder=f"tokenizer{s}", **kwargs) for s in ("", "_2")
        ]
        kwargs.update(variant=args.variant, dtype=dtype)
        self.text_encoders = [
            CLIPTextModel.from_pretrained(model, subfolder="text_encoder", **kwargs).to(device).eval(),
            CLIPTextModelWithProjection.from_pretrained(model, subfolder="text_encoder_2", **kwargs).to(device).eval(),
        ]

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """prompts (n) → prompt_embeds (n, tokens, width), pooled_prompt_embeds (n, pooled width)."""
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
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": outputs[1].text_embeds}


class RankedImages(torch.utils.data.Dataset):
    """Decodes and preprocesses all images of a row; a DataLoader's workers do it while the GPU encodes."""

    def __init__(self, images: Dataset, labels: list[dict], args: ScriptArguments, rows: list[int]):
        self.images, self.labels, self.args, self.rows = images, labels, args, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.rows[position]
        images = read_images(self.images, index)
        processed = [preprocess_image(images[i], self.args.resolution) for i in self.labels[index]["images"]]
        return torch.stack([pixels for pixels, _ in processed]), torch.tensor([ids for _, ids in processed]).float()


def encode_dataset(args, images, labels, folder: Path, vae, encode_prompts, accelerator, weight_dtype) -> None:
    """Writes what is missing of the cache: per prompt its images' latents (the posterior's mean, scaled), the prompt
    embeddings and the micro-conditioning. Shards do not depend on the number of processes."""
    shards = cache_shards(len(labels))
    mine = missing_shards(folder, len(labels), accelerator)
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for i in mine for row in shards[i]]
        loader = torch.utils.data.DataLoader(
            RankedImages(images, labels, args, rows), batch_size=None, num_workers=args.dataloader_num_workers
        )
        decoded = iter(tqdm(loader, desc="encode", unit="prompt", disable=not accelerator.is_local_main_process))
        for i in mine:
            latents, time_ids = [], []
            for _ in shards[i]:
                pixels, ids = next(decoded)
                latents.append(encode_images(vae, pixels, args.vae_batch_size).to("cpu", weight_dtype))
                time_ids.append(ids)
            tensors = {"latents": torch.stack(latents).contiguous(), "time_ids": torch.stack(time_ids)}
            for name, tensor in encode_prompts([labels[row]["prompt"] for row in shards[i]]).items():
                tensors[name] = tensor.to("cpu", weight_dtype).contiguous()
            temporary = _cache_file(folder, i).with_suffix(f".tmp{os.getpid()}")
            save_file(tensors, temporary)
            _publish_file(temporary, _cache_file(folder, i))
    accelerator.wait_for_everyone()


def cache_shards(length: int) -> list[range]:
    """The rows of every cache file."""
    return [range(i, min(i + CACHE_SHARD_ROWS, length)) for i in range(0, length, CACHE_SHARD_ROWS)]


def missing_shards(folder: Path, length: int, accelerator: Accelerator) -> list[int]:
    """This process's shards that are not in the cache yet.

    Owned by number, not dealt out of what is missing: processes look at different times.
    """
    own = range(accelerator.process_index, len(cache_shards(length)), accelerator.num_processes)
    return [i for i in own if not _cache_file(folder, i).exists()]


def _cache_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.safetensors"


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """pixels, uint8 (n, 3, H, W) → latents (n, C, H/f, W/f), the posterior's mean times the scaling factor."""
    means = [
        vae.encode((batch.to(vae.device).float() / 127.5 - 1.0).to(vae.dtype)).latent_dist.mean
        for batch in pixels.split(batch_size)
    ]
    return torch.cat(means) * vae.config.scaling_factor


class CachedPrompts(torch.utils.data.Dataset):
    """Encoded rows with their labels, timestep and noise. An item is named by (epoch, row)."""

    def __init__(self, folder: Path, labels: list[dict], seed: int, num_train_timesteps: int):
        self.folder, self.labels, self.seed, self.num_train_timesteps = folder, labels, seed, num_train_timesteps

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        shard, offset = divmod(index, CACHE_SHARD_ROWS)
        file = _open_shard(_cache_file(self.folder, shard))
        item = {name: file.get_slice(name)[offset] for name in file.keys()}
        # One timestep and one noise for all images of the prompt, a function of (seed, epoch, prompt): the same after
        # a resume and on any number of processes.
        rng = _generator(self.seed, epoch, self.labels[index]["prompt_id"])
        item["timesteps"] = torch.tensor(rng.integers(self.num_train_timesteps))
        item["noise"] = torch.from_numpy(rng.standard_normal(item["latents"].shape[1:], dtype=np.float32))
        item["phi"] = torch.from_numpy(self.labels[index]["phi"])
        item["rank"] = torch.from_numpy(self.labels[index]["rank"])
        return item


@lru_cache(maxsize=64)
def _open_shard(path: Path):
    return safe_open(path, framework="pt")  # memory-mapped: a row is read when it is sliced


class EpochSampler:
    """Names the items of every micro-batch of one process, from an optimizer step on, without end.

    Step s of all processes together takes items s·G … (s+1)·G − 1 of the epochs' shuffled orders laid end to end,
    G = batch · processes · accumulation, so the order depends on (seed, epoch) only.
    """

    def __init__(self, args: ScriptArguments, length: int, process_index: int, num_processes: int, start_step: int):
        self.seed, self.length = args.seed, length
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
        return epoch, int(_epoch_order(self.seed, epoch, self.length)[offset])


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return _generator(seed, epoch, "order").permutation(length)


# ----------------------------------------------------------------------------------------------------------------------
# Model, LoRA files, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def adapter_off(unet):
    """The base model: the same module and kernels, the LoRA left out. So the scores are exactly 0 at initialisation."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def check_model(args: ScriptArguments) -> None:
    """Exits with one line unless the model is an SDXL pipeline. Reads configurations only."""
    model, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    name = _read_config("pretrained_model_name_or_path", model, "model_index.json", args.revision)["_class_name"]
    if name not in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        raise SystemExit(f"--pretrained_model_name_or_path {model} is a {name}: this script trains SDXL{_other(name)}")
    if vae:
        config = _read_config("pretrained_vae_model_name_or_path", vae, "config.json", None)
    else:
        config = _read_config("pretrained_model_name_or_path", model, "vae/config.json", args.revision)
    if config.get("latents_mean") is not None:  # Playground v2.5
        raise SystemExit(f"{vae or model}: its VAE standardises latents by `latents_mean`, which SDXL does not")


def _other(pipeline_class: str) -> str:
    script = SCRIPT_OF_PIPELINE.get(pipeline_class)
    return f"; take {script}" if script else ""


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
    """LoRA on the attention projections: 560 modules of SDXL's UNet. alpha = rank: ComfyUI and diffusers agree."""
    target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=target_modules))


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


def save_comfyui_lora(unet: UNet2DConditionModel, file: Path) -> None:
    """Writes the same LoRA under ComfyUI's keys."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    temporary = file.with_suffix(".tmp")
    save_file(comfyui_state_dict(state_dict), temporary, metadata={"format": "pt"})
    _publish_file(temporary, file)


def _publish_file(temporary: Path, file: Path) -> None:
    temporary.chmod(0o644)  # safetensors writes 0600, which other users and servers cannot read
    os.replace(temporary, file)


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


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def load_lora(folder: Path, unet) -> None:
    """Restores a checkpoint's LoRA into the adapter of the model."""
    lora = {key.removeprefix("unet."): value for key, value in load_file(folder / LORA_FILE).items()}
    missing = get_peft_model_state_dict(unet).keys() ^ lora.keys()
    if missing:
        raise SystemExit(f"{folder}: its LoRA does not fit the model: {sorted(missing)[0]}")
    set_peft_model_state_dict(unet, lora)


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
RESUMABLE = (
    "resume_from_checkpoint checkpointing_steps checkpoints_total_limit "
    "train_batch_size gradient_accumulation_steps gradient_checkpointing dataloader_num_workers vae_batch_size "
    "cache_dir validation_prompts validation_steps validation_num_inference_steps validation_guidance_scale report_to "
    "logging_dir push_to_hub hub_model_id hub_private_repo hub_strategy output_dir"
).split()


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


def run_settings(args: ScriptArguments, num_processes: int, labels: list[dict]) -> dict:
    """What makes two runs the same run: all that changes the result, the batch only as the global batch."""
    settings = {name: value for name, value in asdict(args).items() if name not in RESUMABLE}
    if args.lr_scheduler.startswith("constant"):  # then a run may be made longer; other schedules are shaped by it
        del settings["max_train_steps"], settings["num_train_epochs"]
    rows = [f"{row['prompt_id']}{row['phi'].tolist()}{row['rank'].tolist()}" for row in labels]
    settings["labels"] = hashlib.sha256("|".join(rows).encode()).hexdigest()[:16]
    settings["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# Validation and card
# ----------------------------------------------------------------------------------------------------------------------


class Validator:
    """Draws the validation prompts with the current LoRA, or without it; everything is loaded once, at construction."""

    def __init__(self, args: ScriptArguments, prompts: list[str], vae, encode_prompts: PromptEncoder, device, dtype):
        self.args, self.prompts, self.device, self.dtype = args, prompts, device, dtype
        absent = dict.fromkeys(("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, vae=vae, add_watermarker=False, **absent
        )
        self.pipeline.set_progress_bar_config(disable=True)
        embeds = [encode_prompts([prompt]) for prompt in (*prompts, "")]  # one by one, as a pipeline does
        self.embeds = {name: torch.cat([embed[name].cpu() for embed in embeds[:-1]]) for name in embeds[0]}
        negative = {f"negative_{name}": tensor.cpu() for name, tensor in embeds[-1].items()}
        if self.pipeline.config.force_zeros_for_empty_prompt:
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


def write_card(args: ScriptArguments, output_dir: Path, prompts, before, after, facts: dict) -> None:
    """Writes the before/after gallery and the model card."""
    (output_dir / "images").mkdir(exist_ok=True)
    widgets, table = [], ["| prompt | base | with this LoRA |", "|---|---|---|"]
    for i, (prompt, base, tuned) in enumerate(zip(prompts, before, after)):
        base.save(output_dir / "images" / f"{i}_base.png")
        tuned.save(output_dir / "images" / f"{i}.png")
        widgets.append({"text": prompt, "output": {"url": f"images/{i}.png"}})
        cell = prompt.replace("|", "\\|").replace("\n", " ")
        table.append(f"| {cell} | ![base](images/{i}_base.png) | ![LoRA](images/{i}.png) |")
    model = args.pretrained_model_name_or_path
    front = {  # what is a folder of this machine is nothing for the Hub to link
        **({} if os.path.isdir(model) else {"base_model": model}),
        "library_name": "diffusers",
        **base_license(model, args.revision),
        **({} if os.path.isdir(args.dataset_name) else {"datasets": [args.dataset_name]}),
        "tags": [
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "lora",
            "template:sd-lora",
            "stable-diffusion-xl",
            "rankdpo",
        ],
        "widget": widgets,
    }
    name = output_dir.resolve().name
    figures = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    body = f"""{CARD_BEGIN}
# {name}

A LoRA for `{args.pretrained_model_name_or_path}`, trained with `{args.loss_type}` on ranked images
(`{args.dataset_name}`) by [RankDPO](https://arxiv.org/abs/2410.18013): the model learns to denoise preferred images
better than the base model does, and the others worse.

<Gallery />

Same prompts, same seeds:

{chr(10).join(table)}

## Use it

With diffusers:

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("{args.pretrained_model_name_or_path}", dtype=torch.float16)
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


def write_card_file(file: Path, front: dict, body: str) -> None:
    """Writes a card, or what is new into the one that stands."""
    card = join_card(front, body)
    if file.exists():
        standing, text = split_card(file.read_text())
        for name in ("configs", "dataset_info"):  # a folder holds no other configurations than those written now
            standing.pop(name, None)
        card = merge_cards(card, join_card(standing, text))
    write_text(file, card)


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


def data_identity(dataset: Dataset, labels: str) -> str:
    """Which data it was: the commit, of a dataset from the Hub, and the hash of the labels."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}  # datasets names them by the commit
    commits = [f"commit {folder}" for folder in sorted(folders) if re.fullmatch("[0-9a-f]{40}", folder)]
    return ", ".join([*commits, f"hash of rows and labels {labels}"])


def changed_settings(args: ScriptArguments) -> str:
    """What is not the default and bears on the result, as YAML for `--config`."""
    fields = {name: spec.default for name, spec in type(args).__dataclass_fields__.items()}
    elsewhere = "output_dir cache_dir logging_dir resume_from_checkpoint push_to_hub hub_model_id hub_private_repo"
    elsewhere += " hub_strategy report_to dataloader_num_workers"
    settings = {name: value for name, value in asdict(args).items() if value != fields[name]}
    settings = {name: value for name, value in settings.items() if name not in elsewhere.split()}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()


def open_log(file: Path, step: int):
    """Opens the training log, a JSON object a line, to go on after `step`; lines of later steps are done anew."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    write_text(file, "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step))
    return open(file, "a", buffering=1)


def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


# ----------------------------------------------------------------------------------------------------------------------
# Hub
# ----------------------------------------------------------------------------------------------------------------------


# What asking again does not mend: a malformed name, no token, no network wanted.
LASTING_ERRORS = (ValueError, TypeError, LocalTokenNotFoundError, OfflineModeIsEnabled)


COMMIT_FILES = 250  # commits of many more files run into the Hub's time limit


HUB_TIMEOUT = 300  # seconds without a byte; the client by itself would wait for ever


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


def wanted_pause(response) -> int:
    """Seconds that a 429 asks to wait: `Retry-After: 55`, or `RateLimit: "api";r=0;t=55`; at most one window of 330."""
    limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", "")) if response.status_code == 429 else None
    wanted = limit.group(1) if limit else response.headers.get("Retry-After", "")
    return min(int(wanted), 330) if wanted.isdigit() else 0


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


def _check_write_access(repo_id: str, repo_type: str) -> None:
    try:
        HfApi().auth_check(repo_id, repo_type=repo_type, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 404:  # a Hub of one's own may not know the question
            raise
    HfApi().repo_info(repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)


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


def split_card(text: str) -> tuple[dict, str]:
    """A card's front matter and body."""
    match = re.match(r"\s*---\s*?\n(.*?)^---[ \t\r]*$\n?", text, re.S | re.M)
    return (yaml.safe_load(match.group(1)) or {}, text[match.end() :]) if match else ({}, text)


def join_card(front: dict, body: str) -> str:
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body.lstrip()}"


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


def hub_files(output_dir: Path) -> dict[str, Path]:
    """Name in the repository → file: not the checkpoints, with their optimizer states, and not the trackers' files."""
    patterns = (LORA_FILE, "comfyui/*.safetensors", "images/*.png", "run.json", LOG_FILE)
    files = [file for pattern in patterns for file in sorted(output_dir.glob(pattern))]
    return {file.relative_to(output_dir).as_posix(): file for file in files}


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


def training_command() -> str:
    """The command as it was given, by `accelerate launch` or by `python`."""
    launched = "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    launcher = ["accelerate", "launch"] if launched else ["python"]
    launcher += ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    return shlex.join([*launcher, os.path.basename(sys.argv[0]), *sys.argv[1:]])


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


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


def encode(args, images, labels, cache: Path, accelerator: Accelerator, weight_dtype) -> Validator | None:
    """Encodes what is missing of the cache; the main process gets a validator that holds the VAE, on the CPU."""
    if args.pretrained_vae_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, dtype=weight_dtype)
    else:
        model = {"revision": args.revision, "variant": args.variant, "dtype": torch.float32}
        vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **model)
    vae.requires_grad_(False).eval().to(accelerator.device)
    encode_prompts = None
    if accelerator.is_main_process or missing_shards(cache, len(labels), accelerator):
        encode_prompts = PromptEncoder(args, accelerator.device, weight_dtype)
    encode_dataset(args, images, labels, cache, vae, encode_prompts, accelerator, weight_dtype)
    vae.to("cpu")
    validator = None
    if accelerator.is_main_process:
        prompts = args.validation_prompts or [row["prompt"] for row in labels[:4]]
        validator = Validator(args, prompts, vae, encode_prompts, accelerator.device, weight_dtype)
    del encode_prompts
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return validator


def finish(args, unet, validator: Validator, accelerator: Accelerator, facts: dict) -> None:
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
    write_card(args, output_dir, validator.prompts, before, after, facts)
    print(f"LoRA: {output_dir / LORA_FILE}, card: {output_dir / 'README.md'}")


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
