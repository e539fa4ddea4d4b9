# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate", "bitsandbytes", "datasets", "diffusers", "huggingface_hub", "numpy", "peft", "pillow", "pyarrow",
#     "pyyaml", "safetensors", "tensorboard", "torch", "torchvision", "tqdm", "transformers", "trl",
# ]
# ///
"""DPO-QSD: preference fine-tuning of SD1.5, SD2.1 and SDXL on the best pairs first ("Effective Text-to-Image Alignment
with Quality Aware Pair Ranking"): a LoRA from the output of `score_pairs.py`.

SD1.5 on the best tenth of your own pairs, scored with `score_pairs.py --include_images`:

    accelerate launch train_dpo_qsd.py --dataset_name outputs/my-qsd --top_fraction 0.1 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --mixed_precision bf16 --train_batch_size 8 --gradient_accumulation_steps 16 --checkpointing_steps 50 \
        --output_dir outputs/dpo-qsd-sd15

The paper's setting on Pick-a-Pic, with scores and images in two datasets; and its baseline, all pairs at random:

    accelerate launch train_dpo_qsd.py --config recipes/qsd_sd15.yaml \
        --dataset_name liuhuohuo2/pick-a-pic-v2 --scores_dataset_name outputs/pickapic-qsd
    accelerate launch train_dpo_qsd.py --config recipes/qsd_sd15_baseline.yaml --dataset_name liuhuohuo2/pick-a-pic-v2

`--resume_from_checkpoint latest` continues a run that was interrupted. Several GPUs: `accelerate launch --multi_gpu
--num_processes 8 train_dpo_qsd.py ...`. With the same global batch (`train_batch_size` x processes x
`gradient_accumulation_steps`) every number of processes sees the same pairs, timesteps and noise in the same step.
The method is in `pair_loss`, `training_step` and `train`; sections named Shared are the same in other scripts.
"""

import argparse
import errno
import fcntl
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import operator
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from fnmatch import fnmatch
from functools import lru_cache, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Literal


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load ends without a traceback
# bitsandbytes warns at every start that an optional kernel is missing, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from datasets import Dataset, Image, load_dataset
from datasets import config as datasets_config
from diffusers import (
    AutoencoderKL,
    BitsAndBytesConfig,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import CardData, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, get_session, parse_ratelimit_headers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image as PILImage
from PIL import ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.amp import GradScaler
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.transforms import functional as TF
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging
from trl import TrlParser


LOSS_TYPES = ("sigmoid", "hinge", "ipo", "orpo", "orpo_diff")
WITHOUT_REFERENCE = ("orpo", "orpo_diff")
# The objectives that an option has no meaning for.
UNUSED_BY = dict.fromkeys(("sft_weight", "safeguard", "precompute_ref"), WITHOUT_REFERENCE)
PROJECT = "dpo-qsd"  # its name in the trackers
BASE_LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"license": "creativeml-openrail-m"},
    "stabilityai/stable-diffusion-xl-base-1.0": {"license": "openrail++"},
}
# The paper's beta and learning rate for each family.
DEFAULTS = {"sd": {"beta_dpo": 2000.0, "learning_rate": 1e-4}, "sdxl": {"beta_dpo": 5000.0, "learning_rate": 1e-5}}
CARD_BEGIN = "<!-- train_dpo_qsd.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what train_dpo_qsd.py wrote. -->"


# Copied from train_rankdpo_sdxl.flag
def flag(default, help: str, **metadata):
    """A field with its help, its range (see RANGES), `may_change`: whether a resumed run may set it differently, and
    `group`: the title of the flags from here on in --help."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, **metadata})


# Copied from train_rankdpo_sdxl.TrainingArguments
@dataclass
class TrainingArguments:
    """The flags of all trainers. They carry diffusers' names wherever diffusers has one."""

    revision: str | None = flag(None, "Revision of the model on the Hub.", may_change=True, group="Model")
    variant: str | None = flag(None, "Variant of the model's files, e.g. fp16.")
    rank: int = flag(64, "LoRA rank. Alpha equals it, so the scale is 1.", min=1)
    dataset_name: str | None = flag(None, "Dataset with the images: Hub id or folder. Required.", group="Data")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    dataset_revision: str | None = flag(None, "Revision of the dataset on the Hub.", may_change=True)
    dataset_split: str = flag("train", "Split of the dataset.")
    cache_dir: str = flag("outputs/cache", "Folder where latents and embeddings stay for later runs.", may_change=True)
    cache_text_embeddings: bool = flag(True, "Encode prompts once; false: at every step.", may_change=True)
    vae_batch_size: int = flag(4, "Images per forward pass of the VAE.", min=1, may_change=True)
    dataloader_num_workers: int = flag(0, "Processes that read the data ahead.", min=0, may_change=True)
    proportion_empty_prompts: float = flag(0.0, "Share of the rows trained with an empty prompt.", min=0, max=1)
    noise: Literal["prompt", "image"] = flag(
        "prompt", "One noise for all images of a row, or one for each image.", group="Training"
    )
    sft_weight: float = flag(0.0, "Weight of the winners' denoising error, added to a preference loss.", min=0)
    safeguard: float | None = flag(
        None, "Diffusion-SDPO's mu, e.g. 0.6: weakens the losers' gradients that would harm the winner.", min=0, max=1
    )
    output_dir: str = flag("outputs/lora", "Folder for LoRA, card and checkpoints.", may_change=True)
    seed: int = flag(
        0, "Seeds the initial LoRA, random labels, order, timesteps, noise and gallery.", min=0, max=2**32 - 1
    )
    train_batch_size: int = flag(1, "Prompts or pairs per process and forward pass.", min=1, may_change=True)
    gradient_accumulation_steps: int = flag(1, "Forward passes per optimizer step.", min=1, may_change=True)
    num_train_epochs: float = flag(1.0, "Passes over the data.", above=0)
    max_train_steps: int | None = flag(None, "Optimizer steps; overrides num_train_epochs.", min=1)
    learning_rate: float | None = flag(1e-5, "Peak learning rate.", above=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = flag(
        "constant_with_warmup", "Schedule of the learning rate."
    )
    lr_warmup_steps: int = flag(0, "Optimizer steps of linear warm-up.", min=0)
    use_8bit_adam: bool = flag(False, "Use AdamW of bitsandbytes with 8-bit states.")
    adam_beta1: float = flag(0.9, "AdamW's beta1.", min=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW's beta2.", min=0, below=1)
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay.", min=0)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", min=0)
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.", above=0)
    max_skipped_steps: int = flag(10, "Steps in a row without a finite loss to skip.", min=0, may_change=True)
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "Type of the frozen weights and of the forward pass.")
    base_precision: Literal["nf4", "int8"] | None = flag(None, "Quantise the frozen weights with bitsandbytes.")
    allow_tf32: bool = flag(False, "Allow TF32 in the remaining float32 matrix products.")
    compile: bool = flag(False, "Compile the transformer blocks: faster steps after a slow first one.", may_change=True)
    precompute_ref: bool = flag(False, "Compute the reference's errors first, and keep them.", may_change=True)
    gradient_checkpointing: bool = flag(False, "Less memory, about a quarter more computation.", may_change=True)
    checkpointing_steps: int = flag(500, "Optimizer steps between two checkpoints.", min=1, may_change=True)
    checkpoints_total_limit: int | None = flag(None, "Keep the newest N checkpoints.", min=1, may_change=True)
    resume_from_checkpoint: str | None = flag(None, "A checkpoint's folder, or latest (if any).", may_change=True)
    validation_prompts: list[str] | None = flag(
        None, "Gallery; default: the first four prompts.", may_change=True, group="Validation, trackers, Hub"
    )
    validation_steps: int | None = flag(None, "Also draw the gallery every N optimizer steps.", min=1, may_change=True)
    validation_num_inference_steps: int = flag(30, "Denoising steps of the gallery.", min=1, may_change=True)
    validation_guidance_scale: float = flag(5.0, "Guidance scale of the gallery.", may_change=True)
    report_to: str = flag("tensorboard", "tensorboard, wandb, trackio, all or none.", may_change=True)
    logging_dir: str = flag("logs", "Folder of the trackers inside output_dir.", may_change=True)
    push_to_hub: bool = flag(False, "Upload LoRA, card, gallery and log to the Hub.", may_change=True)
    hub_model_id: str | None = flag(None, "Repository. Default: the name of output_dir.", may_change=True)
    hub_private_repo: bool = flag(False, "Make a new repository private.", may_change=True)
    hub_strategy: Literal["end", "checkpoint"] = flag(
        "end", "checkpoint: also upload the LoRA of every checkpoint, in the background.", may_change=True
    )

    def __post_init__(self):
        check_ranges(self)
        if not self.dataset_name:
            raise SystemExit("--dataset_name is missing: a Hub id, or the folder of a dataset")
        if self.resolution and self.resolution % RESOLUTION_MULTIPLE:
            raise SystemExit(f"--resolution {self.resolution}: must be a multiple of {RESOLUTION_MULTIPLE}")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise SystemExit("--mixed_precision fp16 needs a GPU: use bf16 or no")
        if self.report_to not in ("all", "none", "no"):
            if self.report_to not in ("tensorboard", "wandb", "trackio"):
                raise SystemExit(f"--report_to {self.report_to}: choose tensorboard, wandb, trackio, all or none")
            if not importlib.util.find_spec(self.report_to):
                raise SystemExit(f"--report_to {self.report_to}: it is not installed: pip install {self.report_to}")
        for name, unused_by in UNUSED_BY.items():
            if getattr(self, name) != getattr(type(self), name) and self.loss_type in unused_by:
                raise SystemExit(f"--{name}: --loss_type {self.loss_type} does not use it: leave it out")

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the frozen weights, and of the cached latents and embeddings."""
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.mixed_precision]


@dataclass
class ScriptArguments(TrainingArguments):
    pretrained_model_name_or_path: str = flag(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "SD1.5, SD2.1 or SDXL pipeline: Hub id or folder.", group="Model"
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "Another VAE, e.g. madebyollin/sdxl-vae-fp16-fix; it runs in the mixed precision. The model's own runs in "
        "float32, because it overflows in fp16.",
    )
    scores_dataset_name: str | None = flag(
        None,
        "Pairs, labels and qualities without images, as score_pairs.py writes them: Hub id or folder. The images are "
        "found in --dataset_name by their ids.",
        group="Data",
    )
    scores_dataset_config_name: str | None = flag(None, "Its configuration.")
    scores_dataset_revision: str | None = flag(None, "Its revision on the Hub.", may_change=True)
    prompt_column: str = flag("caption", "Column of the prompts.")
    image_0_column: str = flag("jpg_0", "First images: bytes or Image.")
    image_1_column: str = flag("jpg_1", "Second images.")
    label_0_column: str = flag(
        "label_0", "1: the first image is preferred, 0: the second, 0.5: tie. none: always the first."
    )
    has_label_column: str = flag("has_label", "Where this column exists and is false, a pair is unlabelled.")
    image_0_uid_column: str = flag("image_0_uid", "Ids of the first images, to join by.")
    image_1_uid_column: str = flag("image_1_uid", "Ids of the second images.")
    quality_column: str = flag("quality", "Column of the pairs' quality.")
    order: Literal["sorted", "random"] = flag("sorted", "sorted: best pairs first, never shuffled; random.")
    top_fraction: float = flag(
        0.0533,
        "Share of the labelled pairs to train on, the best by quality; 1: all, also for a dataset that score_pairs.py "
        "has cut already.",
        above=0,
        max=1,
    )
    min_quality: float | None = flag(None, "Leave out pairs of lower quality.")
    resolution: int | None = flag(
        None, "Pixels: shorter side resized to it, centre cropped. Default: the model's, 512 or 1024.", min=8, max=8192
    )
    time_ids: Literal["resolution", "image"] = flag(
        "resolution", "SDXL's micro-conditioning: the resolution for both images, or each one's original size and crop."
    )
    loss_type: Literal[LOSS_TYPES] = flag(
        "sigmoid",
        "sigmoid (Diffusion-DPO); hinge (SLiC-HF); ipo; orpo, orpo_diff (two readings of ORPO, without a reference).",
        group="Objective and training",
    )
    beta_dpo: float | None = flag(
        None,
        "Strength of the tie to the base model. The margin is beta/2 times mean errors. Default: 2000 for SD1.5 and "
        "SD2.1, 5000 for SDXL.",
        above=0,
    )
    orpo_lambda: float = flag(0.1, "Weight of the second term of orpo and orpo_diff.", above=0)
    output_dir: str = flag("outputs/dpo-qsd", "Folder for LoRA, card and checkpoints.", may_change=True)
    learning_rate: float | None = flag(
        None, "Peak learning rate. Default: 1e-4 for SD1.5 and SD2.1, 1e-5 for SDXL.", above=0
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = flag(
        "constant", "Schedule of the learning rate."
    )
    validation_guidance_scale: float = flag(7.5, "Guidance scale of the gallery.", may_change=True)


# ----------------------------------------------------------------------------------------------------------------------
# Objective
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.denoising_error
def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image, in float32 from the subtraction on.

    In half precision the rounding error, times beta/2 = 2500, would change every logit by 0.2 to 5.

    Args:
        prediction, target: (n, C, H, W).

    Returns:
        float32 (n,).
    """
    return (target.float() - prediction.float()).square().mean(dim=(1, 2, 3))


# Copied from train_rankdpo_sdxl.safeguard_scale
def safeguard_scale(prediction: torch.Tensor, target: torch.Tensor, mu: float) -> torch.Tensor:
    """Diffusion-SDPO's λ of each pair (arXiv 2511.03317): the share of the loser's gradient that keeps the winner safe.

    With residuals ρ = prediction − target, λ_ij = (1 − μ)·‖ρ_i‖² / ⟨ρ_i, ρ_j⟩ in [0, 1], and 1 where ⟨ρ_i, ρ_j⟩ ≤ 0. To
    first order, in the space of predictions, a step on the pair then does not raise the winner's error. The published
    code takes one λ for a whole batch; here every pair has its own, so that it does not depend on its batch.

    Args:
        prediction, target: (B, k, C, H, W); mu: μ in [0, 1], larger is safer.

    Returns:
        float32 (B, k, k), winner i and loser j; carries no gradient.
    """
    residuals = (prediction.detach().float() - target.float()).flatten(2)
    # No matrix product: autocast would compute it in half precision, where it overflows.
    products = torch.stack([(residuals * other[:, None]).sum(dim=2) for other in residuals.unbind(dim=1)], dim=2)
    squares = products.diagonal(dim1=1, dim2=2)[:, :, None]
    return torch.where(products > 0, (1 - mu) * squares / products, 1.0).clamp(max=1.0)


def pair_loss(
    model_errors_w: torch.Tensor,
    model_errors_l: torch.Tensor,
    ref_errors_w: torch.Tensor | None,
    ref_errors_l: torch.Tensor | None,
    beta: float,
    loss_type: str = "sigmoid",
    *,
    orpo_lambda: float = 0.1,
    sft_weight: float = 0.0,
    loser_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of pairs, in TRL's names.

    With s = model error − reference error (lower is better) the margin is m = −(β/2)(s_w − s_l), and a pair's loss

    - sigmoid (Diffusion-DPO): −log σ(m);
    - hinge (SLiC-HF): max(0, 1 − m);
    - ipo: (m − 1/2)². IPO's own (h − 1/(2β))², h = m/β, is this over β²: the same minimum, but gradients so small that
      AdamW's epsilon would swallow them at these β;
    - orpo (no reference): e_w − λ·log σ(log odds(p_w) − log odds(p_l)), with p = exp(−e) and odds(p) = p/(1 − p);
    - orpo_diff (no reference): e_w − λ·log σ(e_l − e_w).

    Args:
        model_errors_w, model_errors_l: denoising errors of winner and loser under the trained model, float32 (B,).
        ref_errors_w, ref_errors_l: under the reference model, float32 (B,); None for both kinds of orpo.
        beta: β; the margin is β/2 times a difference of *mean* squared errors, Diffusion-DPO's convention.
        loss_type: sigmoid, hinge, ipo, orpo or orpo_diff.
        orpo_lambda: λ.
        sft_weight: how much of e_w is added to the loss (RPO's anchor).
        loser_scale: of `safeguard_scale`, (B,): scales the gradient of s_l, not its value.

    Returns:
        loss, float32 scalar, the mean over pairs; metrics, detached scalars: `loss`, `implicit_accuracy` (share of the
        pairs with m > 0; m = 0 counts half), `margin` (mean m; orpo's m is what log σ is taken of) and, with a
        reference, `chosen_error` and `rejected_error` (mean s_w and s_l).
    """
    metrics = {}
    if loss_type in WITHOUT_REFERENCE:
        if loss_type == "orpo":
            margins = log_odds(model_errors_w) - log_odds(model_errors_l)
        else:
            margins = model_errors_l - model_errors_w
        losses = model_errors_w - orpo_lambda * F.logsigmoid(margins)
    else:
        winner, loser = model_errors_w - ref_errors_w, model_errors_l - ref_errors_l
        if loser_scale is not None:
            loser = loser.detach() + loser_scale * (loser - loser.detach())
        margins = -(beta / 2) * (winner - loser)
        metrics = {"chosen_error": winner.mean(), "rejected_error": loser.mean()}
        if loss_type == "hinge":
            losses = F.relu(1 - margins)
        elif loss_type == "ipo":
            losses = (margins - 0.5).square()
        else:
            losses = -F.logsigmoid(margins)
    loss = losses.mean()
    if sft_weight:
        loss = loss + sft_weight * model_errors_w.mean()
    accuracy = ((margins > 0).float() + 0.5 * (margins == 0).float()).mean()
    metrics = {"loss": loss, "implicit_accuracy": accuracy, "margin": margins.mean(), **metrics}
    return loss, {name: value.detach() for name, value in metrics.items()}


def log_odds(errors: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)) of p = exp(−error), exact for small errors too."""
    return -errors - torch.log(-torch.expm1(-errors))


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.sample_noise
def sample_noise(args: ScriptArguments, noise_scheduler: SchedulerMixin, key: tuple, shape: torch.Size) -> dict:
    """Draws one timestep for all images of a dataset row, and one noise for all of them (`--noise prompt`) or one for
    each (`--noise image`, the paper's ε_i); the trained model and the reference share them.

    They are a function of the key alone: the same after a resume and on any number of processes.

    Args:
        key: (seed, epoch, id of the row); shape: of the row's latents, (k, C, h, w).

    Returns:
        timesteps, int64 scalar; noise, float32 (k, C, h, w).
    """
    rng = seeded_generator(*key)
    timestep = torch.tensor(rng.integers(noise_scheduler.config.num_train_timesteps))
    drawn = shape if args.noise == "image" else shape[1:]
    noise = torch.from_numpy(rng.standard_normal(drawn, dtype=np.float32))
    return {"timesteps": timestep, "noise": noise.expand(shape)}


def epoch_order(args: ScriptArguments, epoch: int, length: int) -> np.ndarray:
    """The order of the selected pairs in an epoch, int64 (length,). `select_pairs` has put them into the order of the
    first epoch, best first or shuffled; later epochs repeat it, or are shuffled by (seed, epoch)."""
    if args.order == "sorted" or epoch == 0:
        return np.arange(length)
    return seeded_generator(args.seed, epoch, "order").permutation(length)


def predict(
    model: Module, noise_scheduler: SchedulerMixin, batch: dict, args: ScriptArguments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward of both images of a batch of pairs.

    Args:
        batch: latents (B, 2, C, h, w), winner first, their noise (B, 2, C, h, w), timesteps (B,), prompt_embeds
            (B, tokens, width), time_ids (B, 2, 6) and, for SDXL, pooled_prompt_embeds (B, width).

    Returns:
        errors, float32 (B, 2); prediction and target, (B, 2, C, h, w).
    """
    latents = batch["latents"].flatten(0, 1).float()
    noise = batch["noise"].flatten(0, 1)
    timesteps = batch["timesteps"].repeat_interleave(2)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    inputs = {
        "sample": noise_scheduler.add_noise(latents, noise, timesteps).to(args.weight_dtype),
        "timestep": timesteps,
        "encoder_hidden_states": batch["prompt_embeds"].repeat_interleave(2, dim=0),
    }
    if "pooled_prompt_embeds" in batch:
        inputs["added_cond_kwargs"] = {
            "text_embeds": batch["pooled_prompt_embeds"].repeat_interleave(2, dim=0),
            "time_ids": micro_conditioning(args, batch["time_ids"]).flatten(0, 1).to(args.weight_dtype),
        }
    prediction, shape = model(**inputs).sample, batch["latents"].shape
    return denoising_error(prediction, target).view(shape[:2]), prediction.view(shape), target.view(shape)


def training_step(
    model: Module, reference: Module, noise_scheduler: SchedulerMixin, batch: dict, args: ScriptArguments
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch of pairs: one forward, and one of the reference where the objective needs it.

    Args:
        model: the UNet as prepared for training; reference: the same UNet unwrapped, whose adapter is switched off.
        batch: what `predict` reads, and ref_errors (B, 2) where they were computed before.

    Returns:
        loss, metrics of `pair_loss`.
    """
    ref_errors_w, ref_errors_l = None, None
    if args.loss_type not in WITHOUT_REFERENCE:
        if (ref_errors := batch.get("ref_errors")) is None:
            with as_reference(reference):
                ref_errors = predict(reference, noise_scheduler, batch, args)[0].detach()
        ref_errors_w, ref_errors_l = ref_errors.unbind(dim=1)
    errors, prediction, target = predict(model, noise_scheduler, batch, args)
    options = {"orpo_lambda": args.orpo_lambda, "sft_weight": args.sft_weight}
    if args.safeguard is not None:
        options["loser_scale"] = safeguard_scale(prediction, target, args.safeguard)[:, 0, 1]
    return pair_loss(*errors.unbind(dim=1), ref_errors_w, ref_errors_l, args.beta_dpo, args.loss_type, **options)


# Copied from train_rankdpo_sdxl.train
def train(
    args: ScriptArguments, run: "Run", model: Module, noise_scheduler: SchedulerMixin, batches: Iterator, validator
) -> float:
    """Trains the LoRA of `model` up to `run.max_train_steps`, with checkpoints and logs.

    Args:
        batches: of `training_batches`; validator: draws the gallery, in the main process only.

    Returns:
        images per second, checkpoints and validation included.
    """
    accelerator, unwrapped = run.accelerator, model  # with its adapter off it is the reference
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, parameters)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=run.max_train_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if run.checkpoint:
        load_training_state(run.checkpoint, optimizer, lr_scheduler, accelerator.scaler)
    log = TrainingLog(args, run, parameters)

    for step in range(run.start_step + 1, run.max_train_steps + 1):
        totals = {}
        for _ in range(args.gradient_accumulation_steps):
            batch = log.next_batch(batches)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss, metrics = training_step(model, unwrapped, noise_scheduler, batch, args)
                accelerator.backward(loss)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / args.gradient_accumulation_steps
        totals["grad_norm"] = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        totals["stop"] = torch.full_like(totals["grad_norm"], len(stop_signals))

        # The only synchronisation of an optimizer step: all metrics of all processes in one reduction. It comes before
        # the update, so that a step without a finite loss and gradient can be skipped: by all processes alike.
        values = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
        logs = dict(zip(totals, values), lr=lr_scheduler.get_last_lr()[0])
        stopping = logs.pop("stop") > 0
        finite = log.write(step, logs)
        if finite or accelerator.scaler:  # with fp16 the scaler itself skips a step, and lowers the loss scale
            optimizer.step()
        if finite:
            lr_scheduler.step()
        optimizer.zero_grad()

        due = step % args.checkpointing_steps == 0 or step == run.max_train_steps or stopping
        if accelerator.is_main_process and due:
            save_checkpoint(args, run, step, unwrapped, optimizer, lr_scheduler)
            if args.push_to_hub:
                upload_checkpoint(args, run, step, wait=stopping)
        if stopping and step < run.max_train_steps:
            end_stopped_run(args, run, step)
        if accelerator.is_main_process and args.validation_steps and step % args.validation_steps == 0:
            log_images(accelerator, validator.prompts, validator(unwrapped), step)
            log.step_ended = time.time()  # drawing does not count as training
    return log.close()


# Copied from train_rankdpo_sdxl.fit
def fit(args: ScriptArguments, run: "Run", images: "StoredImages", cache: "LatentCache", facts: dict) -> None:
    """Encodes the data, trains, and writes the LoRA with its card. `facts`: of the data, for the card."""
    validator, encode_prompts = encode_dataset(args, images, cache, run.accelerator)
    set_seed(args.seed)
    with loading(args.pretrained_model_name_or_path):
        noise_scheduler, model = load_model(args)
    prepare_model(args, run, model)
    rows = CachedRows(args, cache, images.labels, noise_scheduler)
    if args.precompute_ref:
        precompute_reference(args, run, model, rows, encode_prompts)
    speed = train(args, run, model, noise_scheduler, training_batches(args, run, rows, encode_prompts), validator)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        finish(args, run, model, validator, facts, speed)
    run.accelerator.end_training()


def main(args: ScriptArguments) -> None:
    accelerator = make_accelerator(args)

    # Everything that can be wrong with flags, folders and data is found here, before a model is loaded.
    check_model_and_defaults(args)
    dataset, pairs = load_pairs(args)
    selected, winners, counts = select_pairs(args, pairs)
    identity = {"pairs": short_hash(selected.tobytes() + winners.tobytes()), "images": images_key(args, dataset, pairs)}
    run = plan_run(args, accelerator, len(selected), 2, identity)
    used = min(len(selected), run.max_train_steps * run.rows_per_step)  # only what will be trained on is encoded
    chosen = describe(args, counts, used)
    left_out = f"{counts['ties']} ties, {counts['without_label']} without a label"
    run.rewards = quality_rewards(args)
    run.description = f"{counts['rows']} pairs: {left_out}; training on {chosen}"
    with accelerator.main_process_first():  # ids that have to be made are made once
        labels = make_labels(args, dataset, pairs, selected[:used], winners[:used])
    images = stored_images(args, dataset, labels)
    cache = LatentCache(args, cache_key(args, identity["images"]), used, accelerator)
    check_images(images, cache)
    facts = {"pairs": chosen, "data": data_identity(dataset, identity["pairs"])}
    if begin_run(args, run):  # False: the run is finished already
        fit(args, run, images, cache, facts)


# ----------------------------------------------------------------------------------------------------------------------
# The pairs, and the model's defaults
# ----------------------------------------------------------------------------------------------------------------------


ROW = "pair"  # what messages call a row of the dataset


def check_model_and_defaults(args: ScriptArguments) -> None:
    """Exits with one line unless the model is an SD1.5, SD2.1 or SDXL pipeline. Sets what depends on the model and was
    not given: resolution, beta, learning rate. Reads configurations only."""
    model, name = args.pretrained_model_name_or_path, read_config(args, "model_index.json")["_class_name"]
    if name not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        trains = "this script trains SD1.5, SD2.1 and SDXL; use train_rankdpo_sd3.py for SD3"
        raise SystemExit(f"--pretrained_model_name_or_path {model} is a {name}: {trains}")
    if args.time_ids == "image" and not is_sdxl(args):
        raise SystemExit(f"--time_ids image: {model} has no micro-conditioning: leave it out")
    vae = read_vae_config(args)
    check_prediction_type(args)
    if args.resolution is None:
        sample_size = read_config(args, "unet/config.json")["sample_size"]
        args.resolution = sample_size * 2 ** (len(vae["block_out_channels"]) - 1)
    for name, value in DEFAULTS["sdxl" if is_sdxl(args) else "sd"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def load_pairs(args: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Loads and checks the tables; no image is decoded yet. Exits with one line that names what is wrong.

    Returns:
        the dataset that holds the images, and the one that holds pairs, labels and qualities: the same unless
        `--scores_dataset_name` is given.
    """
    images = pairs = load_table(args, "")
    images_flag = pairs_flag = f"--dataset_name {args.dataset_name}"
    images_need = {"image_0_column": args.image_0_column, "image_1_column": args.image_1_column}
    pairs_need = {"prompt_column": args.prompt_column}
    if args.label_0_column != "none":
        pairs_need["label_0_column"] = args.label_0_column
    if args.scores_dataset_name:
        pairs, pairs_flag = load_table(args, "scores_"), f"--scores_dataset_name {args.scores_dataset_name}"
        pairs_need |= {"image_0_uid_column": args.image_0_uid_column, "image_1_uid_column": args.image_1_uid_column}
    for where, dataset, need in ((images_flag, images, images_need), (pairs_flag, pairs, pairs_need)):
        for name, column in need.items():
            if column not in dataset.column_names:
                have, hint = ", ".join(dataset.column_names) or "none", ""
                if name.endswith(("0_column", "1_column")) and not args.scores_dataset_name and needs_quality(args):
                    hint = "; if it holds only scores, give it as --scores_dataset_name, the images as --dataset_name"
                raise SystemExit(f"{where}: no column {column!r} (--{name}); it has {have}{hint}")
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


def load_table(args: ScriptArguments, prefix: str) -> Dataset:
    name, config, revision = (getattr(args, f"{prefix}dataset_{what}") for what in ("name", "config_name", "revision"))
    options = {"split": args.dataset_split, "revision": revision, "cache_dir": local_cache(name)}
    fresh = options["cache_dir"] and not os.path.isdir(options["cache_dir"])
    check_dataset_folder(f"--{prefix}dataset_name", name, columns=fresh)
    try:
        return load_dataset(name, config, **options)
    except Exception as error:
        written = options["cache_dir"] or str(datasets_config.HF_DATASETS_CACHE)
        raise load_problem(f"--{prefix}dataset_name {name}", error.__cause__ or error, written) from None


def number_columns(args: ScriptArguments, pairs: Dataset) -> list[str]:
    """The columns that decide which pairs are selected."""
    names = [args.label_0_column, args.has_label_column] + [args.quality_column] * needs_quality(args)
    return [name for name in names if name in pairs.column_names]


def needs_quality(args: ScriptArguments) -> bool:
    """Whether the run depends on the pairs' quality."""
    return args.order == "sorted" or args.top_fraction < 1 or args.min_quality is not None


def quality_rewards(args: ScriptArguments) -> list[str]:
    """The reward that sorted the pairs, where `score_pairs.py` left its name: evaluate.py marks its figures."""
    name = args.scores_dataset_name or args.dataset_name
    if not needs_quality(args):
        return []
    try:
        statistics = json.loads(file_of(name, "statistics.json", repo_type="dataset").read_text())
        return [statistics["reward"]["reward"].rpartition(":")[2]]
    except Exception:  # a dataset of another origin
        return []


def select_pairs(args: ScriptArguments, pairs: Dataset) -> tuple[np.ndarray, np.ndarray, dict]:
    """The pairs to train on, in the order of the first epoch.

    Ties (0.5) and pairs without a label are left out; the best `--top_fraction` of the others is kept.

    Returns:
        rows, int64 (n,); of each, the side of the winner, int64 (n,), 0 or 1; counts: rows, ties, without_label,
        labelled, selected.
    """
    where = args.scores_dataset_name or args.dataset_name
    tables = {name: pairs.select_columns([name]).with_format("arrow")[:] for name in number_columns(args, pairs)}
    columns = {name: table.column(0).cast(pa.float64()).to_numpy() for name, table in tables.items()}
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
            row, name = unknown[0], args.quality_column
            raise SystemExit(f"{where}: row {row}: `{name}` is {quality[row]}: score it, or remove it")
        rows = labelled[np.argsort(-quality[labelled], kind="stable")]  # equal ones stay in the dataset's order
        rows = rows[: round(args.top_fraction * len(rows))]
        if args.min_quality is not None:
            rows = rows[quality[rows] >= args.min_quality]
    if len(rows) == 0:
        best = f", whose best quality is {quality[labelled].max():.4g}" if needs_quality(args) and len(labelled) else ""
        flags = f"--top_fraction {args.top_fraction} --min_quality {args.min_quality}"
        left_out = f"{counts['rows']} rows, {counts['ties']} ties, {counts['without_label']} without a label"
        raise SystemExit(f"{flags} select none of {len(labelled)} labelled pairs{best} ({left_out})")
    if args.order == "random":
        rows = rows[seeded_generator(args.seed, 0, "order").permutation(len(rows))]
    counts["selected"] = len(rows)
    return rows, np.where(labels[rows] == 1, 0, 1), counts


def describe(args: ScriptArguments, counts: dict, used: int) -> str:
    """Which pairs a run trains on, in words."""
    labelled = f"{counts['labelled']} labelled pairs"
    if args.order == "sorted":
        return f"the best {used} of {labelled}, the best first"
    chosen = labelled if counts["selected"] == counts["labelled"] else f"the best {counts['selected']} of {labelled}"
    return f"{used} of {chosen}, in random order"


def make_labels(
    args: ScriptArguments, images: Dataset, pairs: Dataset, rows: np.ndarray, winners: np.ndarray
) -> "Labels":
    """Reads the selected rows.

    Returns:
        of each pair `id` str, which seeds its timestep and noise, `prompt` str, and the places of winner and loser in
        the images' dataset: `rows` int64 (2,), and `sides` int8 (2,), 0 for the column of the first images.
    """
    uids = [args.image_0_uid_column, args.image_1_uid_column] if args.scores_dataset_name else []
    where = args.scores_dataset_name or args.dataset_name
    if getattr(pairs.features[args.prompt_column], "dtype", None) not in ("string", "large_string", "null"):
        raise SystemExit(f"{where}: column {args.prompt_column!r} (--prompt_column) must hold text")
    # The columns are views of mapped files. What is taken of them may be larger than what a short string type can hold.
    table = pairs.select_columns(list(dict.fromkeys([args.prompt_column, *uids]))).with_format("arrow")[:]
    columns = {name: as_text(table[name], f"{where}: column {name!r}") for name in table.column_names}
    table = pa.table(columns).take(pa.array(rows))
    empty = pc.equal(pc.utf8_trim_whitespace(table[args.prompt_column]), "").fill_null(True).to_numpy()
    if empty.any():
        row = rows[empty.argmax()]
        raise SystemExit(f"{where}: row {row}: `{args.prompt_column}` is empty: remove the row, or write a prompt")
    places = np.stack([rows, rows], axis=1), np.tile(np.array([0, 1], dtype=np.int8), (len(rows), 1))
    if uids:
        places = locate_images(args, images, [table[uid] for uid in uids])
    order = np.stack([winners, 1 - winners], axis=1)
    image_rows, sides = (np.take_along_axis(place, order, axis=1) for place in places)
    ids = pa.array(rows).cast(pa.string())
    return Labels(id=ids, prompt=table[args.prompt_column], rows=image_rows, sides=sides)


def as_text(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException:
        raise SystemExit(f"{name} must hold text or whole numbers, not {column.type}") from None


def locate_images(
    args: ScriptArguments, images: Dataset, wanted: list[pa.ChunkedArray]
) -> tuple[np.ndarray, np.ndarray]:
    """Finds images by their ids. A dataset without ids gets hashes of the images' files, as in score_pairs.py;
    `datasets` caches them, so only the first run reads all images.

    Args:
        wanted: ids of the first and of the second images, (n,) each.

    Returns:
        the first row that has each id, int64 (n, 2), and its column, int8 (n, 2), 0 or 1.
    """
    rows, sides = np.full((len(wanted[0]), 2), -1), np.zeros((len(wanted[0]), 2), dtype=np.int8)
    columns = ((args.image_0_uid_column, args.image_0_column), (args.image_1_uid_column, args.image_1_column))
    for side, (uid, column) in enumerate(columns):
        ids = images
        if uid not in images.column_names:
            ids = stored_column(images, column).map(content_ids, batched=True, batch_size=64, desc=f"ids of {column}")
            uid = "content_id"
        ids = as_text(ids.select_columns([uid]).with_format("arrow")[:][uid], f"{args.dataset_name}: column {uid!r}")
        for place, of_pairs in enumerate(wanted):
            found = pc.index_in(of_pairs, value_set=ids, skip_nulls=True).fill_null(-1).to_numpy()
            new = (rows[:, place] < 0) & (found >= 0)
            rows[new, place], sides[new, place] = found[new], side
    if (absent := rows < 0).any():
        incomplete = np.flatnonzero(absent.any(axis=1))
        names = [str(wanted[side][row]) for row in incomplete[:3].tolist() for side in (0, 1) if absent[row, side]]
        raise SystemExit(
            f"--dataset_name {args.dataset_name} lacks images of {len(incomplete)} of the {len(rows)} pairs to train "
            f"on, e.g. {', '.join(names[:3])}: use the dataset and revision that were scored, or other "
            "--image_0_uid_column and --image_1_uid_column"
        )
    return rows, sides


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


def images_key(args: ScriptArguments, images: Dataset, pairs: Dataset) -> str:
    """Hash of what identifies the images, prompts and their order: content, wherever a dataset lies. The number of best
    pairs is not part of it: a smaller share is the beginning of a larger one."""
    names = [name for name in (args.dataset_name, args.scores_dataset_name) if name]
    tables = [folder_digest(name) if os.path.isdir(name) else None for name in names]
    parts = [
        [local or hub_commits(table) or table._fingerprint for local, table in zip(tables, (images, pairs))],
        [getattr(args, spec.name) for spec in fields(args) if spec.name.endswith("_column")],
        (args.order, args.seed, args.top_fraction, args.min_quality) if args.order == "random" else args.order,
    ]
    return short_hash(json.dumps(parts))


# Copied from train_rankdpo_sdxl.cache_key
def cache_key(args: ScriptArguments, images: str) -> str:
    """Hash of everything that latents and embeddings depend on, so not of labels and hyperparameters. `images`: of
    `images_key`."""
    return short_hash(json.dumps([CACHE_VERSION, images, args.cache_text_embeddings, *encoding_settings(args)]))


def stored_images(args: ScriptArguments, dataset: Dataset, labels: "Labels") -> "StoredImages":
    columns = [(name, stored_column(dataset, name)) for name in (args.image_0_column, args.image_1_column)]
    return StoredImages(args, labels, partial(read_images, columns))


def read_images(columns: list[tuple[str, Dataset]], index: int, label: dict) -> list[tuple[str, dict]]:
    """Winner and loser of a pair, undecoded, with the names that error messages use."""
    pair, stored = f"the pair of row {label['id']}", []
    for row, side in zip(label["rows"].tolist(), label["sides"].tolist()):
        name, column = columns[side]
        stored.append((f"{pair}: image {name!r} of row {row}", as_stored(column[row].column(0)[0].as_py())))
    return stored


def card_parts(args: ScriptArguments, facts: dict) -> dict:
    """What the card says of this method and model: see `write_card`."""
    learns = "the model learns to denoise preferred images better than the base model does, and the others worse"
    if args.loss_type in WITHOUT_REFERENCE:
        learns = "the model learns to denoise preferred images, and the others worse than those"
    strength = {"lambda": args.orpo_lambda} if args.loss_type in WITHOUT_REFERENCE else {"beta": args.beta_dpo}
    return {
        "tags": ["stable-diffusion-xl" if is_sdxl(args) else "stable-diffusion", "dpo", "dpo-qsd"],
        "datasets": [args.dataset_name, args.scores_dataset_name],
        "introduction": f"""A LoRA for `{args.pretrained_model_name_or_path}`, trained with `{args.loss_type}` on \
{facts["pairs"]}
of `{args.scores_dataset_name or args.dataset_name}`, after *Effective Text-to-Image Alignment with Quality Aware Pair
Ranking* (DPO-QSD): {learns}.""",
        "facts": {**strength, "learning rate": args.learning_rate, "LoRA rank": args.rank},
        **unet_usage(args),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Shared: trainer (train_rankdpo_sdxl.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


CACHE_SHARD_ROWS = 64  # dataset rows per cache file: a crash loses at most these
CACHE_VERSION = 3
EMPTY_PROMPT = "unconditional"  # the cache file of its embeddings
FREE_OF_REFERENCE = (  # settings that the reference's errors do not depend on
    *("labels", "rank_by", "preference_column", "rank_column", "loss_type", "beta_dpo", "rank_source", "orpo_lambda"),
    *("sft_weight", "safeguard", "rank", "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps"),
    *("num_train_epochs", "max_grad_norm", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_epsilon", "global_batch_size"),
)
LABELS_PER_BATCH = 10_000  # rows that are Python objects at a time
LORA_FILE = "pytorch_lora_weights.safetensors"
STATE_FILE = "training_state.pt"
LOG_FILE = "training_log.jsonl"
HINTS = {  # if they differ from those of an earlier run
    "images": "the dataset has changed; --dataset_revision takes an earlier commit of the Hub",
    "model_files": "the model has changed; --revision takes an earlier commit of the Hub",
}
CARD_FACTS = ("base_model", "datasets", "widget")  # the keys of the card's front matter that a run writes again


@dataclass
class Run:
    """One training run: its size, what identifies it, and the step it continues from."""

    accelerator: Accelerator
    settings: dict  # all that changes the result: two runs with the same settings are the same run
    checkpoint: Path | None
    start_step: int
    max_train_steps: int
    rows_per_step: int  # of all processes and accumulated forwards
    images_per_row: int
    description: str = ""  # of the data, for the console
    rewards: list[str] = field(default_factory=list)  # that made the labels; kept in run.json
    pending_upload: Future | None = None  # of a checkpoint


def make_accelerator(args: ScriptArguments) -> Accelerator:
    diffusers_logging.disable_progress_bar()  # of loading weights
    launched, output_dir = "LOCAL_RANK" in os.environ, Path(args.output_dir)
    accelerator = Accelerator(
        cpu=launched and not torch.cuda.is_available(),  # several processes without a GPU: gloo
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to in ("none", "no") else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise SystemExit(f"accelerate is set to {kind.value}: a LoRA needs no more than data parallelism")
    check_compiler(args)
    check_quantization(args)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def plan_run(args: ScriptArguments, accelerator: Accelerator, length: int, images_per_row: int, identity: dict) -> Run:
    """Counts the steps and finds the checkpoint to continue from. Refuses a folder that holds another run. `length`:
    rows of the dataset; `identity`: what identifies the data, a part of the settings."""
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    settings = {spec.name: getattr(args, spec.name) for spec in fields(args) if not spec.metadata.get("may_change")}
    if args.lr_scheduler.startswith("constant"):  # such a run may be made longer; other schedules depend on its length
        del settings["max_train_steps"], settings["num_train_epochs"]
    if args.base_precision is None:  # a run of a version without this flag goes on
        del settings["base_precision"]
    settings |= {**identity, "model_files": short_hash(json.dumps(encoding_settings(args)))}
    settings |= {"global_batch_size": rows_per_step}
    checkpoint = check_output_dir(args, settings)
    start_step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    max_train_steps = args.max_train_steps or max(1, round(args.num_train_epochs * length / rows_per_step))
    if start_step > max_train_steps:
        raise SystemExit(f"{checkpoint} is beyond the {max_train_steps} steps asked for: raise --max_train_steps")
    return Run(accelerator, settings, checkpoint, start_step, max_train_steps, rows_per_step, images_per_row)


def check_output_dir(args: ScriptArguments, settings: dict) -> Path | None:
    """Refuses a folder that holds another run; returns the checkpoint to resume from, if any."""
    output_dir, resume = Path(args.output_dir), args.resume_from_checkpoint
    here, checkpoints = f"--output_dir {output_dir} holds", list_checkpoints(output_dir)
    has_lora = (output_dir / LORA_FILE).exists()
    check_card(output_dir / "README.md")
    try:
        previous = read_json(output_dir / "run.json")
    except Damaged as error:  # the checkpoints, too, know which run they are of
        if not any(map(checkpoint_record, checkpoints)):
            raise SystemExit(f"{error}, and no checkpoint of it can be used: choose another folder") from None
        warn(f"{error}: it is written again")
        previous = settings
    changed = [name for name, value in settings.items() if previous.get(name) != value]
    if previous and changed and (checkpoints or has_lora):
        name = min(changed, key=lambda name: name not in previous)
        other = f"of another version of this script, which had no {name}"
        if name in previous:
            other = f"with {name} {previous[name]}, not {settings[name]}"
        if name in HINTS and name in previous:
            other += f" ({HINTS[name]})"
        raise SystemExit(f"{here} a run {other}: choose another folder")
    if not previous and not is_empty(output_dir) and not any(map(checkpoint_record, checkpoints)):
        raise SystemExit(f"{here} other files: choose another folder")
    if resume is None:
        if checkpoints or has_lora:
            hint = "add --resume_from_checkpoint latest to continue it, or choose another folder"
            raise SystemExit(f"{here} this run's results already: {hint}")
        return None
    if resume == "latest":
        if has_lora and not checkpoints:
            raise SystemExit(f"{here} a LoRA but no checkpoint to continue from")
    elif Path(resume).resolve() not in [path.resolve() for path in checkpoints]:
        raise SystemExit(f"--resume_from_checkpoint {resume}: not a checkpoint of --output_dir {output_dir}")
    else:
        checkpoints = [Path(resume)]
    for checkpoint in reversed(checkpoints):
        record = checkpoint_record(checkpoint)
        if record.get("run", run_id(settings)) != run_id(settings):
            raise SystemExit(f"{checkpoint} is of another run: remove it, or choose another folder")
        if record:
            return checkpoint
        problem = f"{checkpoint} is damaged"
        if resume != "latest":
            raise SystemExit(f"{problem}: --resume_from_checkpoint latest takes the newest whole one")
        warn(f"{problem}: the one before it is taken, if there is one")
    return None


def run_id(settings: dict) -> str:
    return short_hash(json.dumps(settings, sort_keys=True))


def checkpoint_record(folder: Path) -> dict:
    """What a checkpoint says of itself, if all of its files are as they were written; else {}."""
    try:
        record = read_json(folder / "checkpoint.json")
        return record if all(file_digest(folder / name) == digest for name, digest in record["files"].items()) else {}
    except (Damaged, LookupError, FileNotFoundError):
        return {}


def begin_run(args: ScriptArguments, run: Run) -> bool:
    """Creates the repository and the output folder; False if the run is finished already."""
    accelerator, output_dir = run.accelerator, Path(args.output_dir)
    accelerator.wait_for_everyone()  # no process writes before all have checked
    if args.push_to_hub and accelerator.is_main_process:  # a wrong token or name fails now, not after the training
        args.hub_model_id = create_repo(args.hub_model_id or output_dir.resolve().name, "model", args.hub_private_repo)
    finished = run.start_step == run.max_train_steps and is_finished(run, output_dir)
    accelerator.wait_for_everyone()
    if finished:
        accelerator.print(f"{output_dir} is trained already: {run.max_train_steps} steps")
        if args.push_to_hub and accelerator.is_main_process:
            upload(args, output_dir)
        return False
    if accelerator.is_main_process:
        remove_temporary_files(output_dir)
        write_run_record(run, output_dir)
    return True


def write_run_record(run: Run, output_dir: Path, finished: dict | None = None) -> None:
    """Writes run.json: the settings, the rewards that made the labels, and, once the LoRA is written, `finished`."""
    record = {**run.settings, "rewards": run.rewards, **({"finished": finished} if finished else {})}
    write_json(output_dir / "run.json", record)


def result_files(output_dir: Path) -> dict[str, str]:
    """The files of a finished run, by name: their digests. Not the card, which people edit."""
    files = [output_dir / LORA_FILE, *output_dir.glob("comfyui/*.safetensors"), *output_dir.glob("images/*.png")]
    files.append(output_dir / LOG_FILE)
    return {file.relative_to(output_dir).as_posix(): file_digest(file) for file in sorted(files) if file.exists()}


def is_finished(run: Run, output_dir: Path) -> bool:
    """Whether LoRA, gallery, log and card of the run's last step are in place, as they were written."""
    try:
        finished = read_json(output_dir / "run.json").get("finished", {})
    except Damaged:
        return False
    if finished.get("step") != run.max_train_steps:
        return False
    files, card = result_files(output_dir), output_dir / "README.md"
    wrong = [name for name, digest in finished["files"].items() if files.get(name) != digest]
    if not card.exists() or CARD_END not in card.read_text():
        wrong.append(card.name)
    if wrong:
        warn(f"{output_dir / wrong[0]} is damaged or missing: the run is finished again")
    return not wrong


def read_config(args: ScriptArguments, file: str, flag: str = "pretrained_model_name_or_path") -> dict:
    """A configuration file of the model that a flag names; exits with one line if it cannot be read."""
    model = getattr(args, flag)
    revision = args.revision if flag == "pretrained_model_name_or_path" else None
    try:
        config = json.loads(file_of(model, file, revision=revision).read_text())
        if file == "model_index.json" and "_class_name" not in config:
            raise ValueError("its model_index.json names no pipeline class")
        return config
    except Exception as error:
        raise SystemExit(f"--{flag} {model}: not a diffusers model that can be read: {one_line(error)}") from None


def seeded_generator(*key) -> np.random.Generator:
    """A NumPy generator that is a function of the key alone, on every machine and in every process."""
    digest = hashlib.sha256("|".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


class Labels:
    """What a run knows of each row of the dataset, in NumPy and Arrow columns of equal length: as Python objects it
    would take about a kilobyte a row. `labels[row]` is a dict of the row's values."""

    def __init__(self, **columns: np.ndarray | pa.Array | pa.ChunkedArray):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["id"])

    def __getitem__(self, row: int) -> dict:
        values = {name: column[row] for name, column in self.columns.items()}
        return {name: value.as_py() if isinstance(value, pa.Scalar) else value for name, value in values.items()}

    def values(self, *names: str) -> Iterator[tuple]:
        """The values of these columns as Python objects, row by row."""
        for start in range(0, len(self), LABELS_PER_BATCH):
            parts = (self.columns[name][start : start + LABELS_PER_BATCH] for name in names)
            yield from zip(*(part.tolist() if isinstance(part, np.ndarray) else part.to_pylist() for part in parts))


class StoredImages(torch.utils.data.Dataset):
    """The images of the dataset's rows; an item holds a row's images, preprocessed by a DataLoader's worker while the
    GPU encodes. `read(index, label)` gives a row's [(name, {"bytes", "path"}), …]."""

    def __init__(self, args: ScriptArguments, labels: Labels, read: Callable[[int, dict], list]):
        self.resolution, self.labels, self.read = args.resolution, labels, read

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        images = [preprocess_image(image, self.resolution) for _, image in self.read(index, self.labels[index])]
        return {name: torch.stack([image[name] for image in images]) for name in images[0]}

    def problem(self, index: int) -> str | None:
        """What is wrong with an image of a row. JPEGs are decoded at an eighth of their size."""
        for name, stored in self.read(index, self.labels[index]):
            try:
                with open_image(stored) as image:
                    image.draft("RGB", (64, 64))
                    to_rgb(image)
                    image.load()
            except Exception as error:
                return f"{name} does not decode: {one_line(error)}"
        return None


def stored_column(dataset: Dataset, column: str) -> Dataset:
    """A column of images, undecoded, in Arrow's format: casting the column would write the whole dataset again. Make
    it once: every such view copies the dataset's list of files."""
    return dataset.select_columns([column]).with_format("arrow")


def open_image(stored: dict) -> PILImage.Image:
    return PILImage.open(BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])


def resize_and_crop(stored: dict, resolution: int) -> tuple[torch.Tensor, list[int]]:
    """Resizes the shorter side of an image, {"bytes", "path"}, to `resolution` and crops the centre. Returns uint8
    pixels (3, resolution, resolution) and [original height, original width, crop top, crop left]."""
    with open_image(stored) as opened:
        picture = to_rgb(ImageOps.exif_transpose(opened))
    original = [picture.height, picture.width]
    picture = TF.resize(picture, resolution, interpolation=TF.InterpolationMode.LANCZOS)
    top, left = (picture.height - resolution) // 2, (picture.width - resolution) // 2
    return TF.pil_to_tensor(TF.crop(picture, top, left, resolution, resolution)), [*original, top, left]


class LatentCache:
    """Latents and prompt embeddings on disk, CACHE_SHARD_ROWS rows a file, whatever the number of processes. The name
    of a file ends with a hash of its content."""

    def __init__(self, args: ScriptArguments, key: str, length: int, accelerator: Accelerator):
        self.folder, self.length, self.verified = Path(args.cache_dir) / key, length, set()
        # Files belong to processes by number, not by what is missing: processes check at different times.
        self.owned = range(accelerator.process_index, -(-length // CACHE_SHARD_ROWS), accelerator.num_processes)
        self.find()

    def find(self) -> None:
        """Lists the files, by their names without the hash."""
        open_cache_file.cache_clear()  # a file may have been made again
        self.files = {file.stem.rpartition("-")[0]: file for file in sorted(self.folder.glob("*.safetensors"))}

    def rows(self, shard: int) -> range:
        return range(shard * CACHE_SHARD_ROWS, min((shard + 1) * CACHE_SHARD_ROWS, self.length))

    def name(self, shard: int) -> str:
        """Number and rows: with more data, the last file is another one."""
        return f"shard-{shard:06d}-{len(self.rows(shard))}"

    def missing(self) -> list[int]:
        """The files of this process that do not exist yet. A damaged one is removed, to be made again."""
        hidden = not is_first_process()
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter's lock
            whole = pool.map(self.has, map(self.name, self.owned))
            whole = progress_bar(whole, desc="check cache", total=len(self.owned), unit="file", delay=5, disable=hidden)
            return [shard for shard, known in zip(self.owned, whole) if not known]

    def is_complete(self, *others: str) -> bool:
        """Whether all files of all processes, and `others`, exist; says nothing of their content."""
        shards = range(-(-self.length // CACHE_SHARD_ROWS))
        return self.files.keys() >= {*others, *map(self.name, shards)}

    def has(self, name: str) -> bool:
        """Whether there is such a file, and it holds what was written into it."""
        file = self.files.get(name)
        if file is None or file in self.verified:
            return file is not None
        if file_digest(file) == file.stem.rpartition("-")[2]:
            self.verified.add(file)
            return True
        print(f"warning: {file} is damaged: it is made again", file=sys.stderr)
        file.unlink(missing_ok=True)
        del self.files[name]
        return False

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        content = save(tensors)
        write_bytes(self.folder / f"{name}-{short_hash(content)}.safetensors", content)

    def read(self, row: int) -> dict[str, torch.Tensor]:
        shard, offset = divmod(row, CACHE_SHARD_ROWS)
        file = open_cache_file(self.files[self.name(shard)])
        return {name: file.get_slice(name)[offset] for name in file.keys()}


open_cache_file = lru_cache(maxsize=64)(partial(safe_open, framework="pt"))  # memory-mapped: only slices are read


def model_fingerprint(model: str, file: str, revision: str | None = None) -> str:
    """Identifies a model's weights: a folder by its files, a model of the Hub by the commit of one of its files."""
    if os.path.isdir(model):
        return folder_digest(model)
    return f"{model}@{Path(hf_hub_download(model, file, revision=revision)).parent.name}"


def check_images(images: StoredImages, cache: LatentCache) -> None:
    """Decodes the images that will be encoded, so that a bad one is named before any model is loaded."""
    missing = cache.missing()
    total = sum(len(cache.rows(shard)) for shard in missing)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        # File by file: a pool makes an object of every row that it is given.
        problems = (problem for shard in missing for problem in pool.map(images.problem, cache.rows(shard)))
        for problem in progress_bar(problems, desc="check images", total=total, disable=total < 2000):
            if problem or stop_signals:
                pool.shutdown(wait=False, cancel_futures=True)
                stop_if_asked("nothing was begun")
                raise SystemExit(problem)


def encode_dataset(
    args: ScriptArguments, images: StoredImages, cache: LatentCache, accelerator: Accelerator
) -> tuple["Validator | None", "PromptEncoder | None"]:
    """Writes what is missing of the cache, then frees the VAE and the text encoders. Returns a validator, in the main
    process, and the prompt encoder, if prompts are encoded at every step."""
    with loading(f"the VAE of {args.pretrained_model_name_or_path}"):
        vae = load_vae(args).requires_grad_(False).eval().to(accelerator.device)
    encode_prompts, is_main = None, accelerator.is_main_process
    others = [EMPTY_PROMPT] if needs_empty_embeds(args) else []
    cache.missing()  # removes damaged files
    if is_main and others:
        cache.has(EMPTY_PROMPT)
    accelerator.wait_for_everyone()
    cache.find()
    writes = not cache.is_complete(*others)
    if writes or is_main or not args.cache_text_embeddings:
        with loading(args.pretrained_model_name_or_path):
            encode_prompts = PromptEncoder(args, accelerator.device)
    with locked(cache.folder, "--cache_dir", wait=True) if writes else nullcontext():
        accelerator.wait_for_everyone()  # the first process has the lock
        cache.find()  # a run that wrote here meanwhile may have made it all
        encode_shards(args, images, cache, vae, encode_prompts, hidden=not accelerator.is_local_main_process)
        if is_main and others and not cache.has(EMPTY_PROMPT):
            embeds = encode_in_batches(encode_prompts, [""], args.weight_dtype)
            cache.write(EMPTY_PROMPT, {name: tensor[0].cpu() for name, tensor in embeds.items()})
        accelerator.wait_for_everyone()
        if writes and is_main:  # no process of this run or of another one is writing here
            remove_temporary_files(cache.folder)
    cache.find()  # with the files of the other processes
    vae.to("cpu")
    validator = None
    if is_main:
        prompts = args.validation_prompts or first_prompts(images.labels, 4)
        validator = Validator(args, prompts, vae, encode_prompts, accelerator.device)
    if args.cache_text_embeddings:
        encode_prompts = None
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return validator, encode_prompts


def first_prompts(labels: Labels, count: int) -> list[str]:
    """The first prompts that differ."""
    found = {}
    for (prompt,) in labels.values("prompt"):
        found[prompt] = None
        if len(found) == count:
            break
    return list(found)


def encode_shards(
    args: ScriptArguments, images: StoredImages, cache: LatentCache, vae, encode_prompts: "PromptEncoder", hidden: bool
) -> None:
    """Writes the missing cache files of this process. `hidden`: without a progress bar."""
    missing = cache.missing()
    total, rows = sum(len(cache.rows(shard)) for shard in missing), map(cache.rows, missing)
    options = {"num_workers": args.dataloader_num_workers if missing else 0, "worker_init_fn": ignore_stop_signals}
    sampler = itertools.chain.from_iterable(rows)
    decoded = iter(torch.utils.data.DataLoader(images, batch_size=None, sampler=sampler, **options))
    with progress_bar(total=total, desc="encode", unit=ROW, disable=hidden or not missing) as bar:
        for shard in missing:
            items = []
            for _ in cache.rows(shard):
                item = next(decoded)
                latents = encode_images(vae, item.pop("pixels"), args.vae_batch_size)
                items.append({**item, "latents": latents.to("cpu", args.weight_dtype)})
                bar.update()
            tensors = {name: torch.stack([item[name] for item in items]).contiguous() for name in items[0]}
            if args.cache_text_embeddings:
                prompts = [images.labels[row]["prompt"] for row in cache.rows(shard)]
                embeds = encode_in_batches(encode_prompts, prompts, args.weight_dtype)
                tensors |= {name: tensor.to("cpu").contiguous() for name, tensor in embeds.items()}
            cache.write(cache.name(shard), tensors)
            stop_if_asked(f"what is encoded is in {cache.folder}: the same command goes on")


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """pixels, uint8 (n, 3, H, W) → latents (n, C, H/f, W/f): the posterior's mean, shifted where the VAE has a shift,
    and scaled."""
    means = [
        vae.encode((batch.to(vae.device).float() / 127.5 - 1.0).to(vae.dtype)).latent_dist.mean
        for batch in pixels.split(batch_size)
    ]
    return (torch.cat(means) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def encode_in_batches(encode_prompts: "PromptEncoder", prompts: list[str], dtype: torch.dtype) -> dict:
    """Embeddings of all prompts, in this type."""
    starts = range(0, len(prompts), PROMPTS_PER_FORWARD)
    batches = [encode_prompts(prompts[start : start + PROMPTS_PER_FORWARD]) for start in starts]
    return {name: torch.cat([batch[name] for batch in batches]).to(dtype) for name in batches[0]}


def needs_empty_embeds(args: ScriptArguments) -> bool:
    return args.proportion_empty_prompts > 0 and args.cache_text_embeddings


class CachedRows(torch.utils.data.Dataset):
    """Encoded rows with their labels, timestep and noise, indexed by the keys of `EpochSampler`."""

    def __init__(self, args: ScriptArguments, cache: LatentCache, labels: Labels, noise_scheduler):
        self.args, self.cache, self.labels, self.noise_scheduler = args, cache, labels, noise_scheduler
        self.empty_embeds = load_file(cache.files[EMPTY_PROMPT]) if needs_empty_embeds(args) else {}
        self.ref_errors: LatentCache | None = None  # of `precompute_reference`

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        epoch, row, place = key
        label, item = self.labels[row], self.cache.read(row)
        noise_key = (self.args.seed, epoch, label["id"])
        item |= sample_noise(self.args, self.noise_scheduler, noise_key, item["latents"].shape)
        item |= {name: torch.from_numpy(label[name]) for name in ("phi", "rank", "weight") if name in label}
        item |= self.ref_errors.read(place) if self.ref_errors else {}
        share = self.args.proportion_empty_prompts
        empty = share > 0 and seeded_generator(*noise_key, "empty prompt").random() < share
        if self.args.cache_text_embeddings:
            return item | self.empty_embeds if empty else item
        return {**item, "prompt": "" if empty else label["prompt"]}


class EpochSampler:
    """Yields the keys of one process's micro-batches, without end: (epoch, row, place), where the place counts from the
    start of the run. In step s, counted from 0, all processes together take the places s·G … (s+1)·G − 1 of the epochs'
    orders laid end to end; G is the global batch."""

    def __init__(self, args: ScriptArguments, length: int, process_index: int, num_processes: int, start_step: int):
        self.args, self.length, self.start_step = args, length, start_step
        self.process_index, self.num_processes = process_index, num_processes
        self.order = lru_cache(maxsize=2)(partial(epoch_order, args, length=length))

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        batch_size = self.args.train_batch_size
        for micro_step in itertools.count(self.start_step * self.args.gradient_accumulation_steps):
            start = (micro_step * self.num_processes + self.process_index) * batch_size
            yield [self.key(place) for place in range(start, start + batch_size)]

    def key(self, place: int) -> tuple[int, int, int]:
        epoch, offset = divmod(place, self.length)
        return epoch, int(self.order(epoch)[offset]), place


def training_batches(
    args: ScriptArguments, run: Run, rows: CachedRows, encode_prompts: "PromptEncoder | None"
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches on its device, from the run's first step on, without end."""
    accelerator, device = run.accelerator, run.accelerator.device
    place = (accelerator.process_index, accelerator.num_processes, run.start_step)
    sampler, workers = EpochSampler(args, len(rows.labels), *place), args.dataloader_num_workers
    on_gpu = device.type == "cuda"
    options = {"num_workers": workers, "pin_memory": on_gpu, "worker_init_fn": ignore_stop_signals}
    loader = iter(torch.utils.data.DataLoader(rows, batch_sampler=sampler, **options))  # starts the workers at once
    return map(partial(complete_batch, args, device, encode_prompts), read_ahead(loader))


def read_ahead(batches: Iterator) -> Iterator:
    """The same batches. A thread reads the next one while the caller works with this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(next, batches)
        while True:
            batch, ahead = ahead.result(), thread.submit(next, batches)
            yield batch


def precompute_reference(
    args: ScriptArguments, run: Run, model: Module, rows: CachedRows, encode_prompts: "PromptEncoder | None"
) -> None:
    """Gives the rows the reference's errors of all places of the run. They are kept beside the latents, in files like
    theirs, for later runs that differ in nothing but FREE_OF_REFERENCE."""
    accelerator = run.accelerator
    settings = {name: value for name, value in run.settings.items() if name not in FREE_OF_REFERENCE}
    key = short_hash(json.dumps([rows.cache.folder.name, args.train_batch_size, args.compile, settings]))
    cache = LatentCache(args, f"reference-{key}", run.max_train_steps * run.rows_per_step, accelerator)
    sampler = EpochSampler(args, len(rows.labels), 0, 1, 0)
    cache.missing()  # removes damaged files
    accelerator.wait_for_everyone()
    cache.find()
    with locked(cache.folder, "--cache_dir", wait=True) if not cache.is_complete() else nullcontext():
        accelerator.wait_for_everyone()  # the first process has the lock
        cache.find()
        missing, hidden = cache.missing(), not accelerator.is_local_main_process
        for shard in progress_bar(missing, desc="reference", unit="file", disable=hidden or not missing):
            places, errors = cache.rows(shard), []
            for start in range(places.start, places.stop, args.train_batch_size):
                keys = map(sampler.key, range(start, min(start + args.train_batch_size, places.stop)))
                batch = torch.utils.data.default_collate([rows[key] for key in keys])
                batch = complete_batch(args, accelerator.device, encode_prompts, batch)
                with accelerator.autocast(), as_reference(model):
                    errors.append(predict(model, rows.noise_scheduler, batch, args)[0].detach())
            cache.write(cache.name(shard), {"ref_errors": torch.cat(errors).cpu()})
            stop_if_asked(f"what is computed is in {cache.folder}: the same command goes on")
        accelerator.wait_for_everyone()
    cache.find()  # with the files of the other processes
    rows.ref_errors = cache


def ignore_stop_signals(worker: int) -> None:
    """In a DataLoader's worker: signals often reach the whole group. The main process still needs the worker, and ends
    it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def complete_batch(args: ScriptArguments, device: torch.device, encode_prompts: "PromptEncoder | None", batch: dict):
    """Encodes the prompts, unless they are cached, and moves the batch to the device."""
    if encode_prompts:
        batch |= encode_in_batches(encode_prompts, batch.pop("prompt"), args.weight_dtype)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def check_compiler(args: ScriptArguments) -> None:
    """Exits with one line if --compile is given and nothing is there that compiles."""
    if args.compile and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which(os.environ.get("CC", "gcc"))):
        raise SystemExit("--compile needs a C++ compiler, for example g++: install one, or leave it out")


def check_quantization(args: ScriptArguments) -> None:
    """Exits with one line if the base cannot be quantised here."""
    if args.base_precision and args.compile:
        raise SystemExit(f"--base_precision {args.base_precision}: leave out --compile, with which it was never tried")
    if args.base_precision and not torch.cuda.is_available():
        raise SystemExit(f"--base_precision {args.base_precision} needs a GPU: diffusers does not quantise without one")


def quantization(args: ScriptArguments) -> dict:
    """Options of `from_pretrained`: the linear layers in the type of --base_precision, if there is one."""
    options = {
        None: {},
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": args.weight_dtype},
    }[args.base_precision]
    return {"quantization_config": BitsAndBytesConfig(**options)} if options else {}


def prepare_model(args: ScriptArguments, run: Run, model: Module) -> None:
    """Freezes the model, adds the LoRA in float32, and restores the LoRA of the checkpoint."""
    model.requires_grad_(False)
    add_lora(model, args.rank)
    cast_training_params(model, dtype=torch.float32)
    if run.checkpoint:
        load_lora(run.checkpoint, model)
    model.to(run.accelerator.device).train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(model)


def compile_blocks(model: Module) -> None:
    """Compiles the transformer blocks, each kind of block once, at its first forward. The scale of the LoRA becomes a
    tensor, which `as_reference` sets to 0: an adapter that is switched off is another graph, with other rounding."""
    model.lora_scale = torch.ones((), device=model.device)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] = model.lora_scale
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)


def make_optimizer(args: ScriptArguments, parameters: list) -> torch.optim.Optimizer:
    optimizer_class, betas = partial(torch.optim.AdamW, fused=True), (args.adam_beta1, args.adam_beta2)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    decay, epsilon = args.adam_weight_decay, args.adam_epsilon
    return optimizer_class(parameters, lr=args.learning_rate, betas=betas, weight_decay=decay, eps=epsilon)


@contextmanager
def as_reference(model: Module):
    """In this block a forward of the model is one of the reference, without the LoRA. A compiled model keeps track of
    gradients as in training, so that the same graphs run: detach what it returns."""
    if (scale := getattr(model, "lora_scale", None)) is None:
        with torch.no_grad(), adapter_off(model):
            yield
        return
    scale.zero_()
    try:
        yield
    finally:
        scale.fill_(1.0)


@contextmanager
def adapter_off(model: Module):
    """The base model: the same module and kernels without the LoRA. So the scores are exactly 0 at initialisation."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def write_lora(pipeline_class: type, model: Module, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` with peft keys and the adapter's metadata."""
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set: its order differs from run to run
    layers = {f"{DENOISER}_lora_layers": get_peft_model_state_dict(model)}
    with TemporaryDirectory(prefix=".lora.tmp", dir=folder) as temporary:
        pipeline_class.save_lora_weights(temporary, **layers, **{f"{DENOISER}_lora_adapter_metadata": metadata})
        with replacing(folder / LORA_FILE) as file:
            os.replace(Path(temporary, LORA_FILE), file)
            file.chmod(0o644)  # safetensors writes 0600, which other users and servers cannot read


def save_checkpoint(
    args: ScriptArguments, run: Run, step: int, model: Module, optimizer: Optimizer, lr_scheduler: LRScheduler
) -> None:
    """Writes `checkpoint-<step>` under a temporary name and renames it, then drops the oldest beyond the limit. Its
    checkpoint.json names the run, and the digests of the files."""
    output_dir, scaler = Path(args.output_dir), run.accelerator.scaler
    folder, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    state = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_lora(model, temporary)
        torch.save(state, content := BytesIO())
        write_bytes(temporary / STATE_FILE, content.getbuffer())
        digests = {name: file_digest(temporary / name) for name in (LORA_FILE, STATE_FILE)}
        record = {"step": step, "run": run_id(run.settings), "files": digests}
        sync(output_dir / LOG_FILE)
        write_json(temporary / "checkpoint.json", {**record, "log": file_digest(output_dir / LOG_FILE)})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        sync(output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if args.checkpoints_total_limit:
        others = [path for path in list_checkpoints(output_dir) if path != folder]
        for old in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
            shutil.rmtree(old)


def end_stopped_run(args: ScriptArguments, run: Run, step: int) -> None:
    """Ends all processes after a signal. The checkpoint of the step is written."""
    if run.pending_upload:
        run.pending_upload.result()
    for tracker in run.accelerator.trackers:
        tracker.finish()
    run.accelerator.wait_for_everyone()  # a launcher ends all processes soon after the first
    stop_signals.append((signal.SIGTERM, 0.0))  # perhaps only another process has received one
    stop_if_asked(f"checkpoint-{step} is in {args.output_dir}: --resume_from_checkpoint latest goes on from there")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def load_lora(folder: Path, model: Module) -> None:
    """Restores a checkpoint's LoRA into the adapter of the model."""
    lora = {key.removeprefix(f"{DENOISER}."): value for key, value in load_file(folder / LORA_FILE).items()}
    unmatched = get_peft_model_state_dict(model).keys() ^ lora.keys()
    if unmatched:
        raise SystemExit(f"{folder}: its LoRA does not fit the model: {sorted(unmatched)[0]}")
    set_peft_model_state_dict(model, lora)


def load_training_state(folder: Path, optimizer: Optimizer, lr_scheduler: LRScheduler, scaler: GradScaler) -> None:
    """Restores optimizer, schedule and loss scale. There is no random state: timesteps, noise and order of the data are
    functions of seed and step."""
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    if scaler:
        scaler.load_state_dict(state["scaler"])


class TrainingLog:
    """Progress bar, trackers, `training_log.jsonl`, the clock, and the uploads of checkpoints."""

    def __init__(self, args: ScriptArguments, run: Run, parameters: list):
        self.args, self.run, accelerator = args, run, run.accelerator
        total = run.max_train_steps
        if total <= args.lr_warmup_steps:
            accelerator.print(f"warning: all {total} steps are warm-up: add {ROW}s, or raise --max_train_steps")
        trained = f"{sum(parameter.numel() for parameter in parameters):,} trained parameters"
        accelerator.print(f"{run.description}: {total} steps of {run.rows_per_step} {ROW}s, {trained}")
        if accelerator.is_main_process:
            config = {name: value for name, value in asdict(args).items() if isinstance(value, (int, float, str, bool))}
            accelerator.init_trackers(PROJECT, config=config)
            file = Path(args.output_dir) / LOG_FILE
            write_text(file, earlier_log(file, run))
            self.file = open(file, "a", buffering=1)
        hidden = not accelerator.is_local_main_process
        self.bar = progress_bar(total=total, initial=run.start_step, desc="train", unit="step", disable=hidden)
        self.started = self.step_ended = time.time()
        self.data_time = 0.0  # of this step
        self.skipped = 0  # steps in a row

    def next_batch(self, batches: Iterator) -> dict[str, torch.Tensor]:
        """The next batch. Counts the seconds that the step waits for it."""
        asked = time.time()
        batch = next(batches)
        self.data_time += time.time() - asked
        return batch

    def write(self, step: int, logs: dict[str, float]) -> bool:
        """Logs one optimizer step. Returns whether its loss and gradient are finite, so that it counts; exits with one
        line after too many steps that do not."""
        now = time.time()
        logs |= {"step_time": now - self.step_ended, "data_time": self.data_time}
        logs["images_per_second"] = self.run.rows_per_step * self.run.images_per_row / logs["step_time"]
        self.step_ended, self.data_time = now, 0.0
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in logs.items()}, refresh=False)
        self.bar.update()
        self.run.accelerator.log(logs, step=step)
        if self.args.compile and step == self.run.start_step + 1:
            self.run.accelerator.print(f"step {step} took {logs['step_time']:.0f} s, with its compilation")
        finite = np.isfinite([logs["loss"], logs["grad_norm"]]).all()
        self.skipped = 0 if finite else self.skipped + 1
        if self.run.accelerator.is_main_process:
            known = {name: value if np.isfinite(value) else None for name, value in logs.items()}  # JSON has no NaN
            line = json.dumps({"step": step, **known, **({} if finite else {"skipped": True})})
            with naming(Path(self.args.output_dir, LOG_FILE)):
                self.file.write(line + "\n")
        # With fp16 the first gradients overflow, while the loss scaler looks for its scale.
        if self.skipped > self.args.max_skipped_steps + 20 * (self.args.mixed_precision == "fp16"):
            self.give_up(step)
        return bool(finite)

    def give_up(self, step: int) -> None:
        """Ends the run, with a command that may help."""
        kept = [path.name for path in list_checkpoints(Path(self.args.output_dir))[-1:]] or ["no checkpoint"]
        values = f"{self.skipped} steps in a row without a finite loss and gradient; {kept[0]} is kept"
        other = f"--learning_rate {self.args.learning_rate / 2:g} --output_dir {self.args.output_dir}-2"
        other += " --resume_from_checkpoint latest"
        raise SystemExit(f"step {step}: {values}. To try half the learning rate: {training_command()} {other}")

    def close(self) -> float:
        """Returns the images per second of the whole training; 0 if there was no step left."""
        self.bar.close()
        if self.run.accelerator.is_main_process:
            self.file.close()
        images = (self.run.max_train_steps - self.run.start_step) * self.run.rows_per_step * self.run.images_per_row
        return images / (time.time() - self.started) if images else 0.0


def earlier_log(file: Path, run: Run) -> str:
    """A training log up to the step that a run continues from. Says if it is not as it was at that step."""
    lines = {}
    for line in file.read_bytes().decode(errors="replace").splitlines() if file.exists() else ():
        try:
            step = json.loads(line)["step"]
            if step <= run.start_step:
                lines[int(step)] = line + "\n"
        except (ValueError, LookupError, TypeError):
            pass  # the last line of a run that was killed, or a damaged one
    text = "".join(lines[step] for step in sorted(lines))
    if run.checkpoint and read_json(run.checkpoint / "checkpoint.json").get("log") != short_hash(text):
        warn(f"{file}: lines up to step {run.start_step} are damaged or missing")
    return text


class Validator:
    """Draws the validation prompts with the current LoRA, or without it. The constructor loads everything."""

    def __init__(self, args: ScriptArguments, prompts: list[str], vae, encode_prompts: "PromptEncoder", device):
        self.args, self.prompts, self.device = args, prompts, device
        self.pipeline = load_pipeline(args, vae)
        self.pipeline.set_progress_bar_config(disable=True)
        embeds = [pipeline_embeds(args, encode_prompts([prompt])) for prompt in (*prompts, "")]  # as a pipeline does
        *self.embeds, negative = [{name: tensor.cpu() for name, tensor in part.items()} for part in embeds]
        self.negative_embeds = {f"negative_{name}": tensor for name, tensor in negative.items()}

    @torch.no_grad()
    def __call__(self, model, lora: bool = True) -> list[PILImage.Image]:
        vae = self.pipeline.vae.to(self.device)
        self.pipeline.register_modules(**{DENOISER: model})
        was_training = model.training
        model.eval()
        images, dtype = [], self.args.weight_dtype
        for i, embeds in enumerate(self.embeds):
            with (
                torch.autocast(torch.device(self.device).type, dtype, enabled=dtype != torch.float32),
                nullcontext() if lora else adapter_off(model),
                # Other shapes than in training: they would be compiled anew.
                torch.compiler.set_stance("force_eager") if self.args.compile else nullcontext(),
            ):
                latents = self.pipeline(
                    **{name: tensor.to(self.device) for name, tensor in (embeds | self.negative_embeds).items()},
                    num_inference_steps=self.args.validation_num_inference_steps,
                    guidance_scale=self.args.validation_guidance_scale,
                    height=self.args.resolution,
                    width=self.args.resolution,
                    generator=torch.Generator("cpu").manual_seed(self.args.seed + i),
                    output_type="latent",
                ).images
            # Outside of autocast, in the VAE's own type: SDXL's overflows in fp16.
            latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            images += self.pipeline.image_processor.postprocess(vae.decode(latents).sample.float(), output_type="pil")
        model.train(was_training)
        self.pipeline.register_modules(**{DENOISER: None})
        vae.to("cpu")
        return images


def log_images(accelerator: Accelerator, prompts: list[str], images: list[PILImage.Image], step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images("validation", stacked, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            picture = importlib.import_module(tracker.name).Image
            captioned = enumerate(zip(images, prompts))
            tracker.log({f"validation/{i}": picture(image, caption=text) for i, (image, text) in captioned}, step=step)


def finish(args: ScriptArguments, run: Run, model: Module, validator: Validator, facts: dict, speed: float) -> None:
    """Writes the LoRA files, the gallery and, last of all, the card; then uploads them. `speed`: images per second."""
    output_dir, device = Path(args.output_dir), run.accelerator.device
    on_gpu, kilobytes = device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else kilobytes * 1024
    facts = facts | {
        "steps": run.max_train_steps,
        f"{ROW}s per step": run.rows_per_step,
        "seed": args.seed,
        "speed": f"{speed:.3g} images/s" if speed else "not measured",
        "peak memory": f"{memory / 1e9:.1f} GB",
        "hardware": f"{run.accelerator.num_processes} x {torch.cuda.get_device_name(device) if on_gpu else 'CPU'}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft")),
    }
    log = (output_dir / LOG_FILE).read_text()
    if skipped := log.count('"skipped": true'):
        facts["skipped steps"] = skipped
    if skipped == log.count("\n") > 0:
        problem = "no step had a finite loss and gradient: nothing was learned"
        raise SystemExit(f"{problem}. See that {args.pretrained_model_name_or_path} draws pictures")
    export_lora(model, output_dir)
    before, after = validator(model, lora=False), validator(model)
    log_images(run.accelerator, validator.prompts, after, run.max_train_steps)
    write_card(args, output_dir, validator.prompts, before, after, facts)
    write_run_record(run, output_dir, {"step": run.max_train_steps, "files": result_files(output_dir)})
    print(f"LoRA: {output_dir / LORA_FILE}, card: {output_dir / 'README.md'}")
    if args.push_to_hub:
        if run.pending_upload:
            run.pending_upload.result()
        upload(args, output_dir)


def write_card(args: ScriptArguments, output_dir: Path, prompts: list, before: list, after: list, facts: dict) -> None:
    """Writes the before/after gallery and the model card. `card_parts` gives what depends on method and model: `tags`,
    `datasets`, `introduction`, `facts`, how to `load` and `call` the pipeline, how to use the LoRA in `comfyui`."""
    shutil.rmtree(output_dir / "images", ignore_errors=True)  # of a run with other validation prompts
    widgets, gallery = [], ["| prompt | base | with this LoRA |", "|---|---|---|"]
    for i, (prompt, base, tuned) in enumerate(zip(prompts, before, after)):
        for image, name in ((base, f"{i}_base.png"), (tuned, f"{i}.png")):
            save_picture(image, output_dir / "images" / name)
        widgets.append({"text": prompt, "output": {"url": f"images/{i}.png"}})
        gallery.append(f"| {table_cell(prompt)} | ![base](images/{i}_base.png) | ![LoRA](images/{i}.png) |")
    model, parts, name = args.pretrained_model_name_or_path, card_parts(args, facts), output_dir.resolve().name
    datasets = [dataset for dataset in parts["datasets"] if dataset and not os.path.isdir(dataset)]
    front = {  # the Hub cannot link to a folder of this machine
        **({} if os.path.isdir(model) else {"base_model": model}),
        "library_name": "diffusers",
        **base_license(model, args.revision),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", *parts["tags"]],
        "widget": widgets,
    }
    body = f"""# {name}

{parts["introduction"]}

<Gallery />

Same prompts, same seeds:

{chr(10).join(gallery)}

## Use it

With diffusers:

```python
import torch
{parts["load"]}
pipeline.to("cuda")
pipeline.load_lora_weights("{args.hub_model_id or output_dir}", weight_name="pytorch_lora_weights.safetensors")
image = pipeline({json.dumps(prompts[0])}{parts["call"]}).images[0]
```

With ComfyUI: {parts["comfyui"]} and load it with the "Load LoRA" node at strength 1.

## How it was made

```bash
{training_command()}
```

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in (facts | parts["facts"]).items())}

Loss, margins, learning rate and speed of every step are in [{LOG_FILE}]({LOG_FILE}). The settings that differ
from the script's defaults, as a file for `--config`:

```yaml
{changed_settings(args)}
```
"""
    write_text(output_dir / "README.md", make_card(front, card_block(body), output_dir / "README.md"))


def base_license(model: str, revision: str | None) -> dict:
    """The licence fields of the base model's card, which its LoRA inherits; none if the card cannot be read."""
    if model in BASE_LICENSES:
        return BASE_LICENSES[model]
    try:
        front = RepoCard(file_of(model, "README.md", revision=revision).read_text()).data.to_dict()
    except Exception:  # no card, no network, a card with broken front matter: the user names the licence
        return {}
    found = {name: front[name] for name in ("license", "license_name", "license_link") if name in front}
    if not os.path.isdir(model) and not str(found.get("license_link", "http")).startswith("http"):
        found["license_link"] = f"https://huggingface.co/{model}/blob/main/{found['license_link']}"
    return found


def data_identity(dataset: Dataset, digest: str) -> str:
    """Identifies the data: the commit of a dataset from the Hub, and a hash of the labels."""
    return ", ".join([*(f"commit {commit}" for commit in hub_commits(dataset)), f"hash of rows and labels {digest}"])


def hub_commits(dataset: Dataset) -> list[str]:
    """The commit of a dataset from the Hub: `datasets` names the folders of its cache by it."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    return [folder for folder in sorted(folders) if re.fullmatch("[0-9a-f]{40}", folder)]


def changed_settings(args: ScriptArguments) -> str:
    """The settings that differ from the defaults and bear on the result, as YAML for `--config`."""
    local = "output_dir cache_dir logging_dir resume_from_checkpoint report_to dataloader_num_workers"
    names = [spec.name for spec in fields(args) if getattr(args, spec.name) != spec.default]
    names = [name for name in names if name not in local.split() and "hub_" not in name and "_hub" not in name]
    settings = {name: getattr(args, name) for name in names}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()


def training_command() -> str:
    """The command as it was given, by `accelerate launch` or by `python`."""
    launched = "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    launcher = ["accelerate", "launch"] if launched else ["python"]
    launcher += ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    return shlex.join([*launcher, os.path.basename(sys.argv[0]), *sys.argv[1:]])


def upload(args: ScriptArguments, output_dir: Path) -> None:
    """Sends LoRA, card, gallery and log. Exits with one line if that fails; it says how to send them later."""
    enable_progress_bars()
    # Neither the checkpoints, with their optimizer states, nor the trackers' files.
    patterns = (LORA_FILE, "comfyui/*.safetensors", "images/*.png", "run.json", LOG_FILE)
    files = {file.relative_to(output_dir).as_posix(): file for name in patterns for file in output_dir.glob(name)}
    try:
        # The card of a run that was trained without --push_to_hub names its folder.
        card = (output_dir / "README.md").read_text()
        card = re.sub(r'load_lora_weights\("[^"]*"', f'load_lora_weights("{args.hub_model_id}"', card)
        card = push_to_hub(args.hub_model_id, "model", files, "LoRA, card and gallery", card=card)
    except Exception as error:
        command = ["hf", "upload", args.hub_model_id, str(output_dir), ".", "--exclude", "checkpoint-*"]
        command = shlex.join([*command, "--exclude", f"{args.logging_dir}/*"])
        raise SystemExit(
            f"upload to {args.hub_model_id} failed: {one_line(error)}; everything is in {output_dir}. The same command "
            "with --resume_from_checkpoint latest uploads it and keeps edits of the card. To upload the folder "
            f"as it is: {command}"
        ) from None
    write_text(output_dir / "README.md", card)
    print(f"published: {HfApi().endpoint}/{args.hub_model_id}")


def upload_checkpoint(args: ScriptArguments, run: Run, step: int, wait: bool) -> None:
    """Sends a checkpoint's LoRA in the background. It is skipped if an earlier one is still being sent: a later one, or
    the final LoRA, replaces it. `wait`: not skipped."""
    if args.hub_strategy != "checkpoint" or step == run.max_train_steps:
        return
    if run.pending_upload and not run.pending_upload.done():
        if not wait:
            return
        run.pending_upload.result()
    disable_progress_bars()  # they would be drawn over the bar of the training
    output_dir, name = Path(args.output_dir), f"checkpoint-{step}"
    # Read now: by the time they are sent, checkpoints_total_limit may have removed the folder.
    files = {LORA_FILE: (output_dir / name / LORA_FILE).read_bytes()}
    files |= {other: (output_dir / other).read_bytes() for other in (LOG_FILE, "run.json")}
    run.pending_upload = HfApi().run_as_future(send_checkpoint, args.hub_model_id, name, files)


def send_checkpoint(repo_id: str, name: str, files: dict[str, bytes]) -> None:
    try:
        push_to_hub(repo_id, "model", files, f"LoRA of {name}")
    except Exception as error:
        tqdm.write(f"upload of {name} to {repo_id} failed: {one_line(error)}; the training goes on", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: Stable Diffusion UNets (train_rankdpo_sdxl.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


DENOISER = "unet"  # the component of the pipeline that is trained
RESOLUTION_MULTIPLE = 8
PROMPTS_PER_FORWARD = 64


def is_sdxl(args: ScriptArguments) -> bool:
    return "XL" in read_config(args, "model_index.json")["_class_name"]


def read_vae_config(args: ScriptArguments) -> dict:
    """The configuration of the VAE; exits with one line if its latents are not what these models are trained on."""
    vae = args.pretrained_vae_model_name_or_path
    other = ("config.json", "pretrained_vae_model_name_or_path")
    config = read_config(args, *other) if vae else read_config(args, "vae/config.json")
    if config.get("latents_mean") is not None:  # Playground v2.5
        model = vae or args.pretrained_model_name_or_path
        raise SystemExit(f"{model}: its VAE standardises latents by `latents_mean`, which SDXL's does not")
    return config


def check_prediction_type(args: ScriptArguments) -> None:
    """Exits with one line unless the model predicts what the objective has a target for."""
    found = read_config(args, "scheduler/scheduler_config.json").get("prediction_type", "epsilon")
    if found not in ("epsilon", "v_prediction"):
        model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
        raise SystemExit(f"{model}: it predicts {found!r}: this script trains epsilon and v_prediction")


def micro_conditioning(args: ScriptArguments, time_ids: torch.Tensor) -> torch.Tensor:
    """SDXL's conditioning on sizes, (…, 6): [original height, width, crop top, left, target height, width]. All images
    get the resolution without a crop, as the pipeline does when it draws; or, with `--time_ids image`, their own."""
    if args.time_ids == "image":
        return time_ids
    target = time_ids[..., 4:]
    return torch.cat([target, torch.zeros_like(target), target], dim=-1)


def load_vae(args: ScriptArguments) -> AutoencoderKL:
    if args.pretrained_vae_model_name_or_path:
        return AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, dtype=args.weight_dtype)
    # The model's own VAE overflows in fp16.
    options = {"revision": args.revision, "variant": args.variant, "dtype": torch.float32}
    return AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **options)


def load_model(args: ScriptArguments) -> tuple[DDPMScheduler, UNet2DConditionModel]:
    """Scheduler and UNet, without LoRA."""
    model = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    noise_scheduler = DDPMScheduler.from_pretrained(**model, subfolder="scheduler")
    weights = {"subfolder": "unet", "variant": args.variant, "dtype": args.weight_dtype, **quantization(args)}
    return noise_scheduler, UNet2DConditionModel.from_pretrained(**model, **weights)


def load_pipeline(args: ScriptArguments, vae: AutoencoderKL) -> DiffusionPipeline:
    """The pipeline that draws the gallery, without the components that are given to it later or not needed."""
    if is_sdxl(args):
        absent = dict.fromkeys(("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipeline_class, options = StableDiffusionXLPipeline, {"add_watermarker": False}
    else:
        absent = dict.fromkeys(("unet", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipeline_class, options = StableDiffusionPipeline, {"requires_safety_checker": False}
    model = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    return pipeline_class.from_pretrained(**model, vae=vae, **absent, **options)


def add_lora(model: UNet2DConditionModel, rank: int) -> None:
    """LoRA on the attention projections: 128 modules of SD1.5's UNet, 560 of SDXL's. alpha = rank: ComfyUI and
    diffusers agree."""
    target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=target_modules))


def save_lora(model: UNet2DConditionModel, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` (peft keys and adapter metadata: exact in diffusers)."""
    write_lora(StableDiffusionXLPipeline, model, folder)


def export_lora(model: UNet2DConditionModel, output_dir: Path) -> None:
    """Writes the LoRA for diffusers and for ComfyUI."""
    save_lora(model, output_dir)
    save_comfyui_lora(model, output_dir / "comfyui" / f"{output_dir.resolve().name}.safetensors")


def save_comfyui_lora(model: UNet2DConditionModel, file: Path) -> None:
    """Writes the LoRA under ComfyUI's keys."""
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    write_bytes(file, save(comfyui_state_dict(state_dict), metadata={"format": "pt"}))


def comfyui_state_dict(lora_state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames LoRA tensors to the keys that ComfyUI, kohya's network loader and A1111 know.

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


class PromptEncoder:
    """SD's tokenizer and text encoder, or both of SDXL's."""

    def __init__(self, args: ScriptArguments, device: torch.device):
        model, options = args.pretrained_model_name_or_path, {"revision": args.revision}
        self.is_sdxl = is_sdxl(args)
        self.force_zeros = read_config(args, "model_index.json").get("force_zeros_for_empty_prompt", self.is_sdxl)
        encoders = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection} if self.is_sdxl else {"": CLIPTextModel}
        self.tokenizers = [AutoTokenizer.from_pretrained(model, subfolder=f"tokenizer{s}", **options) for s in encoders]
        options.update(variant=args.variant, dtype=args.weight_dtype)
        self.text_encoders = [
            encoder.from_pretrained(model, subfolder=f"text_encoder{s}", **options).to(device).eval()
            for s, encoder in encoders.items()
        ]

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """prompts (n) → prompt_embeds (n, tokens, width) and, for SDXL, pooled_prompt_embeds (n, pooled width). An
        empty prompt becomes what the pipeline guides away from: for SDXL zeros."""
        outputs = []
        for tokenizer, text_encoder in zip(self.tokenizers, self.text_encoders):
            length = tokenizer.model_max_length
            tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            outputs.append(text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True))
        if not self.is_sdxl:
            return {"prompt_embeds": outputs[0].last_hidden_state}
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled_prompt_embeds = outputs[1].text_embeds
        if self.force_zeros:
            empty = torch.tensor([not prompt for prompt in prompts], device=prompt_embeds.device)
            prompt_embeds = prompt_embeds.masked_fill(empty[:, None, None], 0)
            pooled_prompt_embeds = pooled_prompt_embeds.masked_fill(empty[:, None], 0)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}


def encoding_settings(args: ScriptArguments) -> list:
    """Everything of the model that latents and embeddings depend on."""
    vae = args.pretrained_vae_model_name_or_path
    return [
        model_fingerprint(args.pretrained_model_name_or_path, "model_index.json", args.revision),
        args.variant,
        vae and model_fingerprint(vae, "config.json"),
        args.resolution,
        str(args.weight_dtype),
    ]


def pipeline_embeds(args: ScriptArguments, embeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings of `PromptEncoder` as the pipeline takes them: here they need no change."""
    return embeds


def preprocess_image(image: dict, resolution: int) -> dict[str, torch.Tensor]:
    """{"bytes", "path"} → pixels, uint8 (3, resolution, resolution), and time_ids, float32 (6,), SDXL's conditioning on
    [original height, original width, crop top, crop left, target height, target width] in pixels."""
    pixels, sizes = resize_and_crop(image, resolution)
    return {"pixels": pixels, "time_ids": torch.tensor([*sizes, resolution, resolution]).float()}


def unet_usage(args: ScriptArguments) -> dict:
    """The card's lines on how to load the LoRA."""
    pipeline_class = "StableDiffusionXLPipeline" if is_sdxl(args) else "StableDiffusionPipeline"
    return {
        "load": f"from diffusers import {pipeline_class}\n\npipeline = {pipeline_class}.from_pretrained("
        f'"{args.pretrained_model_name_or_path}", dtype=torch.float16)',
        "call": "",
        "comfyui": f"put `comfyui/{Path(args.output_dir).resolve().name}.safetensors` into `models/loras`",
    }


# ----------------------------------------------------------------------------------------------------------------------
# Shared: Hub (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


# Errors that repeating the request cannot fix: a malformed name, no token, offline mode.
LASTING_ERRORS = (ValueError, TypeError, LocalTokenNotFoundError, OfflineModeIsEnabled)
HUB_PAUSES = (1, 2, 4, 8, 16)  # seconds before each further attempt
HUB_TIMEOUT = 300  # seconds without a byte; the client itself would wait for ever


def retried(request: Callable, *arguments, **options):
    """Calls a function of the Hub's client, and calls it again after a pause if the error may pass: 408, 409, 412, 429,
    5xx, a lost or silent connection. The client itself repeats neither commits nor the creation of a repository."""
    for pause in (*HUB_PAUSES, None):
        get_session().timeout = HUB_TIMEOUT
        try:
            return request(*arguments, **options)
        except Exception as error:  # of the client or of its transport, whose classes differ between versions
            response = getattr(error, "response", None)
            if response is None:  # a JSONDecodeError is a ValueError, but comes from a proxy's error page
                lasting = isinstance(error, LASTING_ERRORS) and not isinstance(error, json.JSONDecodeError)
            else:
                lasting = response.status_code < 500 and response.status_code not in (408, 409, 412, 429)
            if lasting or pause is None:
                raise
            time.sleep(pause if response is None else max(pause, requested_pause(response)))


def requested_pause(response) -> int:
    """Seconds that the Hub asks to wait, at most 330: it counts requests in windows of 300 seconds."""
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    seconds = str(limit.reset_in_seconds) if limit else response.headers.get("Retry-After", "")
    return min(int(seconds), 330) if seconds.isdigit() else 0


def file_of(source: str, file: str, **options) -> Path:
    """A file of a local folder, or of a repository on the Hub."""
    return Path(source, file) if os.path.isdir(source) else Path(hf_hub_download(source, file, **options))


def create_repo(name: str, repo_type: str, private: bool, **options) -> str:
    """Creates the repository unless it exists, and returns its id with the namespace. Exits with one line if the token
    cannot write to it. `options`: more of `HfApi.create_repo`'s."""
    try:
        options |= {"repo_type": repo_type, "private": private or None, "exist_ok": True}
        repo_id = retried(HfApi().create_repo, name, **options).repo_id
        try:  # `create_repo` also succeeds for an existing repository that the token can only read
            retried(HfApi().auth_check, repo_id, repo_type=repo_type, write=True)
        except Exception as error:
            response = getattr(error, "response", None)
            if response is None or response.status_code != 404:  # a self-hosted Hub may not know this question
                raise
        check_hub_card(repo_id, repo_type)
    except Exception as error:
        problem = f"--push_to_hub: the {repo_type} repository {name} cannot be written to: {one_line(error)}"
        raise SystemExit(f"{problem}; it takes a token with write access (hf auth login, or HF_TOKEN)") from None
    return repo_id


def check_card(file: Path) -> None:
    """Exits with one line if a card exists and cannot be read: at its end the run keeps what people wrote into it."""
    try:
        if file.exists():
            RepoCard(file.read_text(), ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise SystemExit(f"{file} is no card that can be kept: {one_line(error)}: mend or remove it") from None


def check_hub_card(repo_id: str, repo_type: str) -> None:
    """The same for the card of a repository."""
    head = retried(HfApi().repo_info, repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)
    if "README.md" in {file.rfilename for file in head.siblings}:
        check_card(Path(retried(hf_hub_download, repo_id, "README.md", repo_type=repo_type, revision=head.sha)))


def card_block(text: str) -> str:
    """The part of a card that a run writes, between its marks; a prompt may hold anything, even a mark."""
    return f"{CARD_BEGIN}\n{text.strip().replace('<!--', '<! --')}\n{CARD_END}\n"


def make_card(front: dict, body: str, file: Path | None = None) -> str:
    """The text of a card. If `file` exists, what people wrote into it stays."""
    card = RepoCard(f"---\n{CardData(**front).to_yaml()}\n---\n\n{body}")
    return str(merge_cards(card, RepoCard(file.read_text())) if file and file.exists() else card)


def merge_cards(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """Updates and returns `theirs`, a card that people may have edited. CARD_FACTS and the text between the marks come
    from `mine`, the card of this run; of its other metadata only what they lack is added."""
    licensed = "license" in theirs.data  # then name and link of this run's licence do not belong to it
    for name, value in mine.data.to_dict().items():
        if name in CARD_FACTS or name not in theirs.data and not (licensed and name.startswith("license_")):
            theirs.data[name] = value
    marked = f"(.*)({re.escape(CARD_BEGIN)}.*?{re.escape(CARD_END)})(.*)"
    block, old = re.fullmatch(marked, mine.text, re.S), re.fullmatch(marked, theirs.text, re.S)
    block = block[2] if block else mine.text.strip()
    if old:
        theirs.text = f"{old[1]}{block}{old[3]}"
    elif theirs.text.strip():
        theirs.text = f"{theirs.text.rstrip()}\n\n{block}\n"
    else:
        theirs.text = mine.text
    return theirs


def push_to_hub(
    repo_id: str, repo_type: str, files: dict, message: str, *, card: str = "", merge=merge_cards, replace: tuple = ()
) -> str:
    """Sends files in one commit; those that the Hub has already are not sent again. Returns the card as it is then.

    Args:
        files: name in the repository → local file (Path), or its content (bytes).
        card: the text of README.md, which `merge` combines with the card on the Hub.
        replace: patterns of names; other files on the Hub that match one are deleted.
    """

    def commit() -> str:
        # On top of the state that was read: if somebody edits the card meanwhile, the Hub answers 412: read it again.
        head = HfApi().repo_info(repo_id, repo_type=repo_type, timeout=HUB_TIMEOUT)
        names, merged = {file.rfilename for file in head.siblings}, card
        if card and "README.md" in names:
            readme = hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=head.sha)
            merged = str(merge(RepoCard(card), RepoCard(Path(readme).read_text())))
        new = {**files, "README.md": merged.encode()} if card else files
        operations = [CommitOperationAdd(name, content) for name, content in new.items()]
        stale = [name for name in names - new.keys() if any(fnmatch(name, pattern) for pattern in replace)]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        HfApi().create_commit(repo_id, operations, commit_message=message, repo_type=repo_type, parent_commit=head.sha)
        return merged

    return retried(commit)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: start and stop (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # errors of file systems without locks
LOCK_BEAT = 20  # seconds between two signs of life of a lock's owner
# Errors of the disk and of the system that say nothing about the script.
SYSTEM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
SYSTEM_ERRORS |= {errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ESTALE}
stop_signals: list[tuple[int, float]] = []  # that this process has received, and when


def run_script(main: Callable) -> None:
    """Parses the flags, locks the output folder and runs `main`. An error of the disk ends in one line."""
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_stop_signal)
    transformers_logging.disable_progress_bar()  # of loading weights; downloads and our own work show theirs
    for handler in logging.getLogger("datasets").handlers:  # its errors are raised as well
        handler.addFilter(lambda record: record.levelno != logging.ERROR)
    try:
        args = parse_arguments()
        check_folder_name(Path(args.output_dir))
        number, total = getattr(args, "task_index", 0), getattr(args, "num_tasks", 1)
        with locked(Path(args.output_dir), "--output_dir", task=f"-{number}-of-{total}" if total > 1 else ""):
            main(args)
    except Exception as error:
        if stop_signals:  # another process of this run has ended at its own place
            stop_if_asked(f"before this process was ready for it: {one_line(error)}")
        if problem := system_problem(error):
            raise SystemExit(problem) from None
        raise


class Console:
    """A text stream whose reader may go away, as `| tee log` does at Ctrl-C: what nobody reads is dropped."""

    def __init__(self, stream: IO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(BrokenPipeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def check_folder_name(folder: Path) -> None:
    """Exits with one line if the name of the output folder cannot stand in patterns of files, cards and on the Hub."""
    name = folder.resolve().name
    if len(name.encode()) > 100 or not re.fullmatch(r"[^*?\[\]{}|<>\"'\\\x00-\x1f]+", name):
        shown = repr(name[:110])
        raise SystemExit(f"--output_dir: the name {shown} has over 100 bytes, or one of * ? [ ] {{ }} | < > \" ' \\")


def on_stop_signal(number: int, frame) -> None:
    """The first SIGTERM or Ctrl-C lets the script finish the step or batch in hand; a second one ends it at once."""
    # A launcher passes a signal on that the whole group has received already: this is not a second one.
    if stop_signals and time.monotonic() - stop_signals[0][1] > 2:
        os._exit(128 + number)
    stop_signals.append((number, time.monotonic()))
    if is_first_process() and len(stop_signals) == 1:
        name = signal.Signals(number).name
        with suppress(OSError):
            os.write(2, f"\n{name}: stops after the work in hand; a second signal stops at once\n".encode())


def stop_if_asked(kept: str) -> None:
    """Ends the script if a signal has asked for that. `kept`: one line, what is kept and how to go on."""
    if stop_signals:
        if is_first_process():
            print(f"stopped: {kept}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stop_signals[0][0])


def system_problem(error: BaseException, where: str = "") -> str | None:
    """One line for an error of the disk or the system, or for one that it caused; None for others. `where`: the folder
    it is about, if the error does not say."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        number, text = getattr(error, "errno", None), one_line(error)
        if match := re.search(r"(?:os error|errno) (\d+)", text):  # of a library that is not written in Python
            number = int(match[1])
        if number in SYSTEM_ERRORS:
            break
        error = error.__cause__ or error.__context__
    else:
        return None
    path = getattr(error, "filename", None) or where
    if not path:
        return f"reading or writing failed: {os.strerror(number)}. Nothing is half-written: the same command goes on"
    path = Path(os.path.abspath(path))
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free, inodes = shutil.disk_usage(existing).free, os.statvfs(existing)
    left = f"{free / 1e9:.3g} GB free" + (", no file can be added" if inodes.f_files and not inodes.f_favail else "")
    problem = f"{path} cannot be read or written: {os.strerror(number)} ({existing}: {left})"
    return f"{problem}. Nothing is half-written: the same command goes on"


def load_problem(what: str, error: Exception, where: str = "") -> SystemExit:
    """What to raise if a model or a dataset cannot be loaded: one line. `where`: the folder that loading writes to."""
    return SystemExit(system_problem(error, where) or f"{what}: cannot be loaded: {one_line(error)}")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Ends in one line if what stands in the block cannot load a model."""
    try:
        yield
    except Exception as error:
        raise load_problem(what, error) from None


@contextmanager
def locked(folder: Path, flag: str, wait: bool = False, task: str = "") -> Iterator[None]:
    """Keeps other runs out of a folder, on this machine or on others that share it. If one is there, exits with one
    line, or waits for its end. Only the first process of a run does this. Leaves no empty folder behind.

    A `task`, "-I-of-N", shares the folder with the other tasks of N, but not with itself or a whole run."""
    if not is_first_process():
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"{flag} {folder} is a file")
    # A task leaves the folder: another one may be about to write into it.
    created = [path for path in (folder, *folder.parents) if not task and not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file, ended = folder / f".lock{task}", threading.Event()
    handle = take_lock(file, flag, wait)
    threading.Thread(target=show_life, args=(file, ended), daemon=True).start()
    try:
        # Both take their own lock before they look for others: of two, at least one sees the other.
        siblings = task[task.find("-of-") :]
        for other in set(folder.glob(".lock*")) - {file}:
            if not task or not other.name.endswith(siblings):
                refuse_owner(other, flag, remove=not task)
        yield
    finally:
        ended.set()
        file.unlink(missing_ok=True)
        handle.close()
        for path in created:
            try:
                path.rmdir()
            except OSError:  # it is not empty
                break


def take_lock(file: Path, flag: str, wait: bool) -> IO:
    """Locks a file and writes this process into it. The system drops the lock of a process that dies."""
    waited = False
    while True:
        handle = open(file, "a+")
        handle.seek(0)
        owner = handle.read()
        free = is_free(file, handle, owner, fcntl.LOCK_EX)
        if free and is_file_of(handle, file):
            break
        handle.close()
        if not free and not wait:
            raise SystemExit(f"{flag} {file.parent} is in use by {owner}: wait for its end, or choose another folder")
        if not free and not waited:
            warn(f"{file.parent} is in use by {owner}: waiting for its end")
            waited = True
        stop_if_asked("nothing was begun")
        time.sleep(0 if free else 1)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {platform.node()}")
    handle.flush()
    return handle


def refuse_owner(file: Path, flag: str, remove: bool) -> None:
    """Exits with one line if the owner of another lock is alive. `remove`: takes away the lock of one that is dead."""
    with suppress(FileNotFoundError), open(file, "r+") as handle:
        owner = handle.read()
        if not is_free(file, handle, owner, fcntl.LOCK_SH):  # shared: several tasks may look at once
            raise SystemExit(f"{flag} {file.parent} is in use by {owner}: wait for its end, or choose another folder")
        if remove:
            file.unlink()


def is_free(file: Path, handle: IO, owner: str, kind: int) -> bool:
    """Locks an open file, exclusively or shared; whether its owner, the process that the file names, has ended."""
    try:
        fcntl.lockf(handle, kind | fcntl.LOCK_NB)
        return owner_is_gone(file, owner)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, *NO_LOCKS):
            raise
        if error.errno in NO_LOCKS:
            warn(f"{file.parent} is on a file system without locks: see that no other run writes there")
        return error.errno in NO_LOCKS


def is_file_of(handle: IO, file: Path) -> bool:
    """Whether an open file is still the one of this name: its last owner may have just removed it."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False


def owner_is_gone(file: Path, owner: str) -> bool:
    """Whether the process that a lock names has ended, although its lock is free: some network file systems keep locks
    on one machine only. A live owner changes the file's date."""
    if not owner or owner.endswith(f" on {platform.node()}"):
        return True
    warn(f"{file} names {owner}: watching it for {2 * LOCK_BEAT} s")
    try:
        date = file.stat().st_mtime_ns
        time.sleep(2 * LOCK_BEAT)
        return file.stat().st_mtime_ns == date
    except FileNotFoundError:
        return True


def show_life(file: Path, ended: threading.Event) -> None:
    """Changes a lock's date now and then, until the run has ended."""
    while not ended.wait(LOCK_BEAT):
        with suppress(OSError):
            os.utime(file)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: arguments and files (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


# The metadata of a flag that gives its range.
RANGES = {"min": operator.ge, "above": operator.gt, "max": operator.le, "below": operator.lt}
YAML_NULL = ("", "~", "null", "Null", "NULL")
RANGE_WORDS = {"min": "at least", "above": "greater than", "max": "at most", "below": "less than"}
UNFINISHED = "UNFINISHED"  # stands in a folder of data files while they are written


class OneLineParser(TrlParser):
    """TrlParser that ends every usage error in one line. A flag with a `group`, and those after it, stand under that
    title in --help. Metadata that is ours, not argparse's, is left out."""

    group = None

    def add_argument(self, *names, **options):
        if title := options.pop("group", None):
            self.group = self.add_argument_group(title)
        options = {key: value for key, value in options.items() if key not in (*RANGES, "may_change")}
        return self.group.add_argument(*names, **options) if self.group else super().add_argument(*names, **options)

    def error(self, message: str):
        # argparse names both spellings of a flag: --lr_scheduler/--lr-scheduler.
        raise SystemExit(one_line(re.sub(r"^argument |(?<=\w)/--[\w-]+", "", message)))


def parse_arguments(words: list[str] | None = None) -> "ScriptArguments":
    """Parses the command line. `--config file.yaml` adds flags from a file, which the command line overrides."""
    words = list(sys.argv[1:] if words is None else words)
    if "command" in ScriptArguments.__dataclass_fields__ and words and not words[0].startswith("-"):
        words[0] = f"--command={words[0]}"  # of a script that does several things: `user_study.py serve`
    layout = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = OneLineParser(ScriptArguments, allow_abbrev=False, **layout)
    parser.add_argument("--config", type=config_words, metavar="FILE", help="YAML file of flags.")
    arguments = vars(parser.parse_args([*(parser.parse_known_args(words)[0].config or []), *words]))
    return ScriptArguments(**{name: value for name, value in arguments.items() if name != "config"})


def config_words(file: str) -> list[str]:
    """The flags of a YAML file as words of a command line, so that argparse checks their types and choices too."""
    try:
        # BaseLoader leaves every value as text: argparse reads 1e-5 as a number, and `no` stays `no`.
        settings = yaml.load(Path(file).read_text(), Loader=yaml.BaseLoader) or {}
        values = settings.values() if isinstance(settings, dict) else [settings, None]
        lists = [value if isinstance(value, list) else [value] for value in values]
        if not all(isinstance(word, str) for words in lists for word in words) or "config" in settings:
            raise ValueError("it must hold lines of `flag: value` or `flag: [value, value]`, and no `config`")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"{file} cannot be read: {one_line(error)}") from None
    given = {name: words for name, words in zip(settings, lists) if words and settings[name] not in YAML_NULL}
    # A single value stands behind "=": it may begin with "-".
    pairs = ([f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words] for name, words in given.items())
    return [word for pair in pairs for word in pair]


def check_ranges(args: "ScriptArguments") -> None:
    """Exits with one line if a value is outside the range that its flag's metadata gives."""
    for spec in fields(args):
        value = getattr(args, spec.name)
        if isinstance(value, float) and not np.isfinite(value):
            raise SystemExit(f"--{spec.name} {value}: must be a finite number")
        for limit in RANGES.keys() & spec.metadata.keys():
            if value is not None and not RANGES[limit](value, spec.metadata[limit]):
                raise SystemExit(f"--{spec.name} {value}: must be {RANGE_WORDS[limit]} {spec.metadata[limit]}")


def one_line(error: Exception | str) -> str:
    """An error's message on one line, whatever its class and length."""
    return " ".join(str(error).split()) or type(error).__name__


def table_cell(value) -> str:
    """Any text as one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def progress_bar(*arguments, **options) -> tqdm:
    """A tqdm bar; where the output is not a terminal it writes at most one line every 30 seconds."""
    pause = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60}
    return tqdm(*arguments, **pause, **options)


class Damaged(Exception):
    """A file that does not hold what was written into it. `file`: its path."""

    def __init__(self, file: Path):
        super().__init__(f"{file} is damaged, or of an earlier version of this script")
        self.file = file


@contextmanager
def replacing(file: Path, keep: bool = False) -> Iterator[Path]:
    """Gives the name of a temporary file, which takes the place of `file` when the block ends, after its content has
    reached the disk. If anything fails, `file` stays as it was, and nothing is left over. With `keep`, a `file` that
    another process has written meanwhile stays, too."""
    # Processes on two machines may have the same number.
    temporary = file.with_name(f".{file.name}.tmp{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with naming(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            if not (keep and is_linked(temporary, file)):
                os.replace(temporary, file)
            sync(file.parent)  # the name, too, is on the disk
    finally:
        temporary.unlink(missing_ok=True)


def is_linked(source: Path, target: Path) -> bool:
    """Gives a file a second name, unless something has that name. False: the file system has no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of the disk in this block name this file, unless they are about a file of another folder."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(str(error.filename)).parent != file.parent:
            raise
        raise OSError(error.errno, error.strerror or one_line(error), str(file)) from None


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a whole file, or leaves it as it was."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


def save_picture(picture: PILImage.Image, file: Path) -> None:
    """Writes a PNG. Each part of it has a checksum."""
    with replacing(file) as temporary:
        picture.save(temporary, "PNG")


def write_json(file: Path, record: dict) -> None:
    """Writes a JSON file with a checksum, which `read_json` verifies."""
    write_text(file, sealed_json(record))


def sealed_json(record: dict) -> str:
    return json.dumps({**record, "checksum": json_checksum(record)}, indent=2) + "\n"


def read_json(file: Path, sealed: bool = True) -> dict:
    """What `write_json` wrote, without its checksum; {} if there is no such file. Raises Damaged for other content.
    With `sealed` False it also takes a file without a checksum, of an earlier version."""
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_bytes())
        if not sealed and "checksum" not in record:
            return record
        if record.pop("checksum") == json_checksum(record):
            return record
    except (ValueError, LookupError, AttributeError, TypeError):
        pass
    raise Damaged(file)


def json_checksum(record: dict) -> str:
    return short_hash(json.dumps(record, sort_keys=True))


def is_empty(folder: Path) -> bool:
    """True if a folder holds nothing but locks: this run's, or those of tasks."""
    return not folder.is_dir() or all(path.name.startswith(".lock") for path in folder.iterdir())


def remove_temporary_files(folder: Path) -> None:
    """Removes what killed runs left in a folder that this run has locked."""
    for path in list(folder.rglob(".*.tmp*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have been in such a folder


warned: set[str] = set()


def warn(text: str) -> None:
    """A line on the console, once, and from the first process only."""
    if is_first_process() and text not in warned:
        warned.add(text)
        print(f"warning: {text}", file=sys.stderr)


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_dataset_folder(flag: str, folder: str, columns: bool = True) -> None:
    """Exits with one line if a local dataset is not whole: its build was interrupted, or a file is missing, unreadable
    or damaged. `columns`: reads the columns, too, and verifies their checksums; else only the list of files."""
    if not os.path.isdir(folder):
        return
    again = "run the command that wrote it again"
    if marks := sorted(Path(folder).rglob(UNFINISHED)):
        raise SystemExit(f"{flag} {folder}: {marks[0].parent} is unfinished: {again}")
    files = sorted(file for file in Path(folder).rglob("*.parquet") if "work" not in file.relative_to(folder).parts)
    series = {}
    for file in files:
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.parquet", file.name):
            series.setdefault((file.parent, match[1]), {}).setdefault(int(match[3]), set()).add(int(match[2]))
    for (parent, name), found in series.items():
        (total, numbers), *others = found.items()
        if others:
            kinds = " and ".join(f"{name}-*-of-{total:05d}.parquet" for total in sorted(found))
            raise SystemExit(f"{flag} {folder}: {parent} holds files of two datasets, {kinds}: remove those of one")
        if numbers != set(range(total)):
            have = f"{len(numbers)} of the {total} files {name}-*-of-{total:05d}.parquet"
            raise SystemExit(f"{flag} {folder}: {parent} holds {have}: {again}, or fetch the dataset again")
    for file in progress_bar(files if columns and is_first_process() else [], desc="check data", unit="file", delay=5):
        stop_if_asked("nothing was begun")
        try:
            check_pages(file)
        except Damaged:
            raise SystemExit(f"{flag} {folder}: {file} is damaged: {again}, or fetch the file again") from None


def check_pages(file: Path) -> None:
    """Reads a Parquet file and verifies the checksums of its pages, where it has them. Raises Damaged."""
    with reading(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        rows = sum(len(parquet.read_row_group(group)) for group in range(parquet.num_row_groups))
        if rows != parquet.metadata.num_rows:
            raise Damaged(file)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """What readers of Parquet raise in this block on a damaged file becomes Damaged."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        if getattr(error, "errno", None) or isinstance(error, MemoryError):  # not the content
            raise
        raise Damaged(file) from None


def folder_digest(folder: str) -> str:
    """A hash of the names, sizes and content of a folder's files, whatever their dates: of a model, or of a dataset
    without what is written again at every run (card, pictures, statistics) and without the work shards. Of a large
    file it reads blocks that are spread over it, the last one included."""
    others = ("work", "README.md", "grid.png", "figures", "statistics.json")
    names = sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    # Hidden files and folders are other programs' records: .git, .cache/huggingface.
    names = [name for name in names if name.parts[0] not in others and not any(p[0] == "." for p in name.parts)]
    blocks, block_size = (max(1, min(64, 4096 // len(names))), 2**16) if 0 < len(names) < 4096 else (1, 2**12)
    return short_hash("|".join(f"{name}:{sampled_digest(Path(folder, name), blocks, block_size)}" for name in names))


def sampled_digest(file: Path, blocks: int, block_size: int = 2**16) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with open(file, "rb") as handle:
        last = max(size - block_size, 0)
        whole = size <= blocks * block_size
        for start in range(0, max(size, 1), block_size) if whole else np.linspace(0, last, blocks + 1)[1:].astype(int):
            handle.seek(start)
            digest.update(handle.read(block_size))
    return digest.hexdigest()


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """A picture of any kind as 8-bit RGB: 16 bits keep their brightness, what is transparent becomes white. Raises
    ValueError for pixels whose range is not known."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I") and max(image.getextrema()) > 65535:
        raise ValueError("its pixels are not of 8 or 16 bits: convert the image")
    if image.mode.startswith("I"):
        return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        warn("transparent images get a white background")
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def file_digest(file: Path) -> str:
    """A hash of the whole content of a file."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def short_hash(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def local_cache(folder: str) -> str | None:
    """Where `load_dataset` caches a local folder; None for a dataset of the Hub. Its own key depends on the folder's
    card, not on its files: it would return the old rows of a dataset that was built again."""
    local = os.path.isdir(folder)
    return os.path.join(datasets_config.HF_DATASETS_CACHE, f"local-{folder_digest(folder)}") if local else None


if __name__ == "__main__":
    run_script(main)
