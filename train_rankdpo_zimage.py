# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerate", "bitsandbytes", "datasets", "diffusers", "filelock", "fsspec", "huggingface_hub",
#     "numpy", "peft", "pillow", "pyarrow", "pyyaml", "safetensors", "tensorboard", "torch", "torchvision",
#     "transformers", "trl"]
# ///
"""RankDPO for Z-Image: a LoRA from ranked images (Karthik et al., "Scalable Ranked Preference Optimization").

One GPU, with a dataset as `build_synpic.py` writes it: one row per prompt, k images and their preference probabilities.

    accelerate launch train_rankdpo_zimage.py --dataset_name outputs/synpic --output_dir outputs/rankdpo-zimage \
        --pretrained_model_name_or_path Tongyi-MAI/Z-Image --resolution 768 \
        --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam \
        --train_batch_size 1 --gradient_accumulation_steps 16 --max_train_steps 1000 --checkpointing_steps 100

Settings from a file, which the command line overrides. The same command continues a run that was interrupted:

    accelerate launch train_rankdpo_zimage.py --config recipes/rankdpo_zimage.yaml --dataset_name outputs/synpic \
        --beta_dpo 1000 --resume_from_checkpoint latest

Several GPUs: `accelerate launch --multi_gpu --num_processes 4 train_rankdpo_zimage.py ...`. With the same global batch
(`train_batch_size` x processes x `gradient_accumulation_steps`) every number of processes sees the same data and noise.
The method is in `rankdpo_loss`, `training_step` and `train`; the rest is data, model and files.
"""

import argparse
import glob
import hashlib
import importlib.util
import itertools
import json
import operator
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal


if not sys.stderr.isatty():  # in a file of output all progress bars write a line every 30 seconds, not ten a second
    os.environ |= {"TQDM_MININTERVAL": "30", "TQDM_MAXINTERVAL": "60"} | os.environ

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list, set_seed, tqdm
from datasets import Dataset, Image, load_dataset, load_dataset_builder, load_from_disk
from diffusers import AutoencoderKL, BitsAndBytesConfig, ZImagePipeline, ZImageTransformer2DModel, training_utils
from diffusers.optimization import get_scheduler
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import cast_training_params, compute_density_for_timestep_sampling, free_memory
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from huggingface_hub import CardData, HfApi, RepoCard, hf_hub_download
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image as PILImage
from safetensors.torch import load_file, save
from torch.nn import Module
from torch.utils.data import default_collate
from torchvision.transforms import functional as TF
from trl import TrlParser


LOSS_TYPES = ("rankdpo", "dpo_gain", "dpo", "plackett_luce", "sft", "weighted_sft", "lair")
WEIGHTING_SCHEMES = ("logit_normal", "none", "mode", "cosmap")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
SFT = ("sft", "weighted_sft")
# Option → the objectives that ignore it. A new objective needs a branch in `rankdpo_loss`: without one it is dpo.
UNUSED_BY = {"rank_source": LOSS_TYPES[1:], "safeguard": LOSS_TYPES[3:], "sft_weight": SFT, "precompute_ref": SFT}
UNUSED_BY |= dict.fromkeys(("lair_tau", "lair_lambda"), LOSS_TYPES[:-1])
VERSION = 2  # of run.json, checkpoints and cache: those of other versions are not read
LORA_FILE, STATE_FILE, LOG_FILE = "pytorch_lora_weights.safetensors", "training_state.pt", "training_log.jsonl"
CARD_BEGIN = f"<!-- {Path(__file__).name} writes from here to its second mark; text before and after is kept. -->"
CARD_END = f"<!-- End of what {Path(__file__).name} wrote. -->"
RESOLUTION_MULTIPLE = 16  # the VAE makes 8 pixels one, the transformer 2 of these
IMAGE_COLUMNS = ("images_column",)
COMPARE = {"at least": operator.ge, "greater than": operator.gt, "at most": operator.le, "less than": operator.lt}
stop_signals: list[tuple[int, float]] = []  # that this process has received while it trained, and when


# Copied from train_rankdpo_sdxl.flag
def flag(default, help: str, group: str | None = None, *, min=None, above=None, max=None, below=None, free=False):
    """A field of the command line, with its range. `group`: the title in --help of the flags from here on."""
    help += "" if default in (None, MISSING) else f" Default: {default}."
    limits = dict(zip(COMPARE, (min, above, max, below)))
    return field(default=default, metadata={"help": help, "group": group, "limits": limits, "free": free})


free = partial(flag, free=True)  # one that a resumed run may set differently; all others identify a run


# Copied from train_rankdpo_sdxl.TrainingArguments
@dataclass
class TrainingArguments:  # the flags of all trainers; they carry diffusers' names wherever diffusers has one
    dataset_name: str = flag(MISSING, "Dataset: Hub id, folder or .parquet file.", "Data")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    dataset_revision: str | None = free(None, "Revision of the dataset on the Hub.")
    dataset_split: str = flag("train", "Split of the dataset.")
    proportion_empty_prompts: float = flag(0.0, "Share of the rows trained with an empty prompt.", min=0, max=1)
    cache_dir: str = free("outputs/cache", "Folder where latents and embeddings stay for later runs.")
    cache_text_embeddings: bool = free(True, "Encode prompts once; false: at every step.")
    vae_batch_size: int = free(4, "Images of a row per forward pass of the VAE.", min=1)
    dataloader_num_workers: int = free(0, "Threads that read and decode ahead; 0: four.", min=0)
    revision: str | None = free(None, "Revision of the model on the Hub.", "Model")
    variant: str | None = flag(None, "Variant of the model's files, e.g. fp16.")
    rank: int = flag(64, "LoRA rank. Alpha equals it, so the scale is 1.", min=1)
    noise: Literal["prompt", "image"] = flag("prompt", "One for all images of a row, or one for each.", "Training")
    sft_weight: float = flag(0.0, "Weight of the winners' denoising error, added to a preference loss.", min=0)
    safeguard: float | None = flag(None, "Diffusion-SDPO's mu, e.g. 0.6: see safeguard_scale.", min=0, max=1)
    seed: int = flag(0, "Seeds LoRA, labels, empty prompts, order, timesteps, noise, gallery.", min=0, max=2**32 - 1)
    train_batch_size: int = free(1, "Rows per process and forward pass.", min=1)
    gradient_accumulation_steps: int = free(1, "Forward passes per optimizer step.", min=1)
    num_train_epochs: float = flag(1.0, "Passes over the data.", above=0)
    max_train_steps: int | None = flag(None, "Optimizer steps; overrides num_train_epochs.", min=1)
    learning_rate: float = flag(1e-5, "Peak learning rate.", above=0)
    lr_scheduler: Literal[LR_SCHEDULERS] = flag("constant_with_warmup", "Schedule of the learning rate.")
    lr_warmup_steps: int = flag(0, "Optimizer steps of linear warm-up.", min=0)
    use_8bit_adam: bool = flag(False, "Use AdamW of bitsandbytes with 8-bit states.")
    adam_beta1: float = flag(0.9, "AdamW's beta1.", min=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW's beta2.", min=0, below=1)
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay.", min=0)
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", min=0)
    max_grad_norm: float = flag(1.0, "Gradients are clipped to this norm.", above=0)
    max_skipped_steps: int = free(10, "Steps in a row without a finite loss to skip.", min=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "Type of the frozen weights and of the forward pass.")
    base_precision: Literal["nf4", "int8"] | None = flag(None, "Quantise the frozen weights with bitsandbytes.")
    allow_tf32: bool = flag(False, "Allow TF32 in the remaining float32 products and convolutions.")
    compile: bool = free(False, "Compile the transformer blocks: faster steps after a slow first one.")
    precompute_ref: bool = free(False, "Compute the reference's errors first, and keep them.")
    gradient_checkpointing: bool = free(False, "Less memory, about a quarter more computation.")
    checkpointing_steps: int = free(500, "Optimizer steps between two checkpoints; the last step has one, too.", min=1)
    checkpoints_total_limit: int | None = free(None, "Keep the newest N checkpoints.", min=1)
    resume_from_checkpoint: str | None = free(None, "A checkpoint of output_dir, e.g. checkpoint-500, or latest.")
    validation_prompts: list[str] | None = free(None, "Default: the first four prompts.", "Gallery, trackers, Hub")
    validation_steps: int | None = free(None, "Also draw the gallery every N optimizer steps.", min=1)
    validation_num_inference_steps: int = free(30, "Denoising steps of the gallery.", min=1)
    validation_guidance_scale: float = free(5.0, "Guidance scale of the gallery.")
    report_to: Literal["tensorboard", "wandb", "trackio", "all", "none"] = free("tensorboard", "Tracker.")
    logging_dir: str = free("logs", "Folder of the trackers inside output_dir.")
    gpu_hourly_cost: float | None = free(None, "Price of a GPU hour; the card then states the run's.", min=0)
    push_to_hub: bool = free(False, "Upload LoRA, card, gallery and log to the Hub.")
    hub_model_id: str | None = free(None, "Repository. Default: the name of output_dir.")
    hub_private_repo: bool = free(False, "Make a new repository private.")
    hub_strategy: Literal["end", "checkpoint"] = free("end", "checkpoint: also upload every checkpoint's LoRA.")

    @property
    def model(self) -> str:  # where it is read: in the folder that was made of a single file
        return vars(self).get("folder", self.pretrained_model_name_or_path)

    @property
    def weight_dtype(self) -> torch.dtype:  # of the frozen weights, and of the cached latents and embeddings
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.mixed_precision]


@dataclass
class ScriptArguments(TrainingArguments):  # and those of this one
    pretrained_model_name_or_path: str = flag("Tongyi-MAI/Z-Image", "Id or folder, of the base model.", "Z-Image")
    max_sequence_length: int = flag(512, "Tokens of a prompt, 8 of the template included.", min=16, max=512)
    prompt_column: str = flag("prompt", "Column of the prompts.")
    images_column: str = flag("images", "Column of the lists of k images.")
    prompt_id_column: str = flag("prompt_id", "Column of the unique ids that seed each prompt's timestep and noise.")
    preference_column: str = flag("preference_probability", "Column of the preference probabilities, in [0, 1].")
    rank_column: str = flag("rank", "Column of the ranks, 1 = best. Without it, rows are ranked by preference.")
    rank_by: str = flag("all", "Labels: all (the columns, or all rewards), one reward's name, or random.")
    generators: list[str] | None = flag(None, "Only these generators' images; their preferences are recomputed.")
    resolution: int = flag(1024, "Pixels: shorter side resized to these, centre cropped.", min=16, max=8192)
    max_train_samples: int | None = flag(None, "Use the first N prompts only.", min=1)
    # Z-Image's shift of 6 is one for drawing. Of uniform timesteps it puts 2 in 5 above σ = 0.9, where all images of a
    # row are nearly the same noise. logit_normal gives logit σ the mean ln 6 − logit_mean: with 1.1 ln 2, as a shift of
    # 2 does, which others train Z-Image with; the median of σ is then 0.67.
    weighting_scheme: Literal[WEIGHTING_SCHEMES] = flag("logit_normal", "Density of timesteps; cosmap weights errors.")
    logit_mean: float = flag(1.1, "Mean of logit_normal; that of logit σ is ln 6 minus it.")
    logit_std: float = flag(1.0, "Standard deviation of logit_normal.", above=0)
    mode_scale: float = flag(1.29, "Scale of mode.")
    output_dir: str = free("outputs/rankdpo-zimage", "Folder for LoRA, card and checkpoints.")
    loss_type: Literal[LOSS_TYPES] = flag("rankdpo", "See rankdpo_loss.")
    beta_dpo: float = flag(2000.0, "Strength of the tie to the base; the margin is beta/2 times mean errors.", above=0)
    rank_source: Literal["label", "predicted"] = flag("label", "Ranks in rankdpo's discounts; predicted: LambdaLoss.")
    lair_tau: float = flag(0.5, "Temperature of lair's rewards: the smaller, the more the best image counts.", above=0)
    lair_lambda: float = flag(2.5e-4, "Strength of lair's penalty on large implicit rewards.", above=0)
    mixed_precision: Literal["no", "bf16"] = flag("no", "Of frozen weights and forward pass. In fp16 it overflows.")
    validation_num_inference_steps: int = free(28, "Denoising steps of the gallery.", min=1)
    validation_guidance_scale: float = free(4.0, "Of the gallery: 0 is none; 4 is 5 in other tools.")


# Objective: one prompt, k images, their preference probabilities φ --------------------------------------------------
# Copied from train_rankdpo_sdxl.denoising_error
def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image, (n, C, H, W) → float32 (n,), in float32 from the subtraction on: in half
    precision the rounding error, times beta/2 = 2500, would change every logit by 0.2 to 5."""
    return (target.float() - prediction.float()).square().mean(dim=(1, 2, 3))


# Copied from train_rankdpo_sdxl.dcg_weights
def dcg_weights(phi: torch.Tensor, rank: torch.Tensor | None = None) -> torch.Tensor:
    """Pairwise DCG weights |2^φ_i − 2^φ_j| · |1/log2(1 + r_i) − 1/log2(1 + r_j)| (RankDPO, Algorithm 2, Eq. 6).
    phi: preference probabilities, float (B, k) in [0, 1]; rank: (B, k), 1 = best; default: by phi, ties by position.
    Returns float32 (B, k, k), symmetric, zero on the diagonal and between images of equal phi."""
    if rank is None:
        rank = phi.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    gain = torch.exp2(phi.float())
    discount = 1.0 / torch.log2(1.0 + rank.float())
    return (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


# Copied from train_rankdpo_sdxl.rankdpo_loss
def rankdpo_loss(
    model_errors: torch.Tensor,
    ref_errors: torch.Tensor | None,
    phi: torch.Tensor,
    beta: float,
    rank: torch.Tensor | None = None,
    loss_type: str = "rankdpo",
    *,
    rank_source: str = "label",
    weight: torch.Tensor | None = None,
    sft_weight: float = 0.0,
    lair: tuple[float, float] = (0.5, 2.5e-4),
    loser_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """RankDPO (Eq. 7), the paper's other objectives, and the listwise Diffusion-LPO and Diffusion-LAIR.

    With s = model error − reference error (the implicit reward is −(β/2)·s) and m_ij = −(β/2)(s_i − s_j), a prompt's
    loss is −Σ_{i preferred over j} Δ_ij · log σ(m_ij); the batch's is the mean over prompts.

    Args (float, (B, k), where nothing else is said):
        model_errors, ref_errors: denoising errors under the trained model and the reference (sft objectives: None).
        phi: preference probabilities; rank: 1 = best; default: by phi, ties by position.
        beta: β; the margin is β/2 times a difference of *mean* squared errors, Diffusion-DPO's convention.
        loss_type: rankdpo (Δ = DCG weight), dpo_gain (Δ = |G|), dpo (Δ = 1, ties left out), plackett_luce (minus the
            log probability of the ranking, arXiv 2510.01540: each image against all that are less preferred; ties do
            not compete), sft (errors of the winners of all pairs), weighted_sft (all errors times `weight`:
            the score of hpsv2.1, or of --rank_by), lair (arXiv 2605.26491: λ/k Σ_i ŝ_i² − Σ_i w_i·ŝ_i of the implicit
            rewards ŝ; w = softmax(φ/τ) − 1/k, and φ may be any rewards).
        rank_source: label, or predicted: the discounts' ranks come from the model's own scores (LambdaLoss).
        sft_weight: how much of the loss of sft is added to a preference loss; lair: its τ and λ.
        loser_scale: of `safeguard_scale`, (B, k, k): scales the gradient of s_j in m_ij, not its value.

    Returns:
        loss, float32 scalar; metrics, detached scalars: `loss`, and for the preference losses `implicit_accuracy`
        (share of the weighted pairs with m > 0; m = 0 counts half), `margin` (mean m over the weighted pairs), and
        `chosen_error` and `rejected_error` (mean s of the preferred and of the other side of the pairs, weighted by Δ).
    """
    preferred = phi[:, :, None] > phi[:, None, :]
    wins = preferred.sum(dim=2)
    sft_loss = (wins / wins.sum(dim=1, keepdim=True).clamp(min=1) * model_errors).sum(dim=1).mean()
    if loss_type in SFT:
        loss = sft_loss if loss_type == "sft" else (weight * model_errors).mean()
        return loss, {"loss": loss.detach()}

    scores = model_errors - ref_errors
    winner, loser = scores[:, :, None], scores[:, None, :]
    if loser_scale is not None:
        loser = loser.detach() + loser_scale * (loser - loser.detach())
    margins, weights = -(beta / 2) * (winner - loser), preferred.float()
    if loss_type == "rankdpo":
        if rank_source == "predicted":
            rank = scores.detach().argsort(dim=1, stable=True).argsort(dim=1) + 1
        weights = weights * dcg_weights(phi, rank)
    elif loss_type == "dpo_gain":
        weights = weights * (torch.exp2(phi)[:, :, None] - torch.exp2(phi)[:, None, :]).abs()

    if loss_type == "plackett_luce":
        competes = preferred | torch.eye(phi.shape[1], dtype=torch.bool, device=phi.device)
        loss = (-margins).masked_fill(~competes, -torch.inf).logsumexp(dim=2).sum(dim=1).mean()
    elif loss_type == "lair":
        rewards, advantages = -(beta / 2) * scores, (phi / lair[0]).softmax(dim=1) - 1 / phi.shape[1]
        loss = (lair[1] * rewards.square().mean(dim=1) - (advantages * rewards).sum(dim=1)).mean()
    else:
        loss = -(weights * F.logsigmoid(margins)).sum(dim=(1, 2)).mean()
    if sft_weight:
        loss = loss + sft_weight * sft_loss

    weighted, sides = (weights > 0).float(), weights / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    count = weighted.sum().clamp(min=1)
    metrics = {
        "loss": loss,
        "implicit_accuracy": ((margins.sign() + 1) / 2 * weighted).sum() / count,
        "margin": (margins * weighted).sum() / count,
        "chosen_error": (sides * winner).sum(),
        "rejected_error": (sides * loser).sum(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


# Copied from train_rankdpo_sdxl.safeguard_scale
def safeguard_scale(prediction: torch.Tensor, target: torch.Tensor, mu: float) -> torch.Tensor:
    """Diffusion-SDPO's λ of each pair (arXiv 2511.03317): the share of the loser's gradient that keeps the winner safe.
    With residuals ρ = prediction − target, λ_ij = (1 − μ)·‖ρ_i‖² / ⟨ρ_i, ρ_j⟩ in [0, 1], and 1 where ⟨ρ_i, ρ_j⟩ ≤ 0. To
    first order, in the space of predictions, a step on the pair then does not raise the winner's error. prediction,
    target: (B, k, C, H, W); mu: larger is safer. Returns float32 (B, k, k), winner i, loser j, without a gradient."""
    residuals = (prediction.detach().float() - target.float()).flatten(2)
    # No matrix product: autocast would compute it in half precision, where it overflows.
    products = torch.stack([(residuals * other[:, None]).sum(dim=2) for other in residuals.unbind(dim=1)], dim=2)
    squares = products.diagonal(dim1=1, dim2=2)[:, :, None]
    return torch.where(products > 0, (1 - mu) * squares / products, 1.0).clamp(max=1.0)


# Training: what is drawn, one forward, one step, the loop -----------------------------------------------------------
# Copied from train_rankdpo_sd3.sample_noise
def sample_noise(args: ScriptArguments, noise_scheduler, key: tuple, shape: torch.Size) -> dict:
    """Draws one timestep for all images of a row, and one noise for all (`--noise prompt`) or each (`--noise image`:
    the paper's ε_i): a function of (seed, epoch, id of the row) alone, so the same after a resume and on any number of
    processes. shape: of the row's latents, (k, C, h, w). Returns sigmas, float32 scalar, that of a timestep of the
    schedule, which the model's shift has moved, of the density `--weighting_scheme`; noise, float32 (k, C, h, w)."""
    rng, steps = seeded_generator(*key), noise_scheduler.config.num_train_timesteps
    options = {"generator": torch.Generator().manual_seed(int(rng.integers(2**63))), "mode_scale": args.mode_scale}
    u = compute_density_for_timestep_sampling(args.weighting_scheme, 1, args.logit_mean, args.logit_std, **options)
    sigma = noise_scheduler.sigmas[(u * steps).long().clamp(0, steps - 1).item()]  # the mode density reaches 1
    noise = rng.standard_normal(shape if args.noise == "image" else shape[1:], dtype=np.float32)
    return {"sigmas": sigma, "noise": torch.from_numpy(noise).expand(shape)}


def predict(model: Module, noise_scheduler, batch: dict, args: ScriptArguments) -> tuple:
    """One forward of all k images of a batch of prompts.
    batch: latents and noise (B, k, C, h, w), sigmas (B,), and the embeddings of `collate`, a tensor for each prompt.
    Returns errors, float32 (B, k), weighted by the sigma under cosmap; prediction and target, (B, k, C, h, w)."""
    shape, k = batch["latents"].shape, batch["latents"].shape[1]
    latents, noise = batch["latents"].flatten(0, 1).float(), batch["noise"].flatten(0, 1)
    sigmas = batch["sigmas"].repeat_interleave(k)
    mix = sigmas.view(-1, 1, 1, 1)
    noisy_latents = (1.0 - mix) * latents + mix * noise
    target = noise - latents
    # Z-Image takes lists: of images with one frame, (C, 1, h, w), and of prompts without padding. Its time runs from
    # noise to image: t is 1 − σ, and the velocity points the other way.
    images = [*noisy_latents.to(args.weight_dtype).unsqueeze(2)]
    prompts = [prompt for prompt in pipeline_embeds(args, batch)["prompt_embeds"] for _ in range(k)]
    prediction = -torch.stack([*model(images, 1.0 - sigmas, prompts).sample]).squeeze(2)
    weighting = training_utils.compute_loss_weighting_for_sd3(args.weighting_scheme, batch["sigmas"])[:, None]
    return weighting * denoising_error(prediction, target).view(shape[:2]), prediction.view(shape), target.view(shape)


# Copied from train_rankdpo_sdxl.training_step
def training_step(model: Module, reference: Module, noise_scheduler, batch: dict, args: ScriptArguments) -> tuple:
    """Loss and metrics of a batch of prompts: what `predict` reads, phi, rank, maybe weight and ref_errors, (B, k).
    model: as prepared for training; reference: the same model unwrapped, whose adapter is switched off."""
    ref_errors = batch.get("ref_errors")
    if ref_errors is None and args.loss_type not in SFT:
        with as_reference(reference):
            ref_errors = predict(reference, noise_scheduler, batch, args)[0].detach()
    model_errors, prediction, target = predict(model, noise_scheduler, batch, args)
    options = {name: batch[name] for name in ("phi", "rank", "weight") if name in batch}
    if args.safeguard is not None:
        options["loser_scale"] = safeguard_scale(prediction, target, args.safeguard)
    options |= {"loss_type": args.loss_type, "rank_source": args.rank_source, "sft_weight": args.sft_weight}
    return rankdpo_loss(model_errors, ref_errors, beta=args.beta_dpo, lair=(args.lair_tau, args.lair_lambda), **options)


# Copied from train_rankdpo_sdxl.train
def train(args: ScriptArguments, run: "Run", model: Module, noise_scheduler, batches: Iterator, pipeline) -> None:
    """Trains the LoRA of `model` up to `run.max_train_steps`, with checkpoints and logs. `batches`: of
    `training_batches`; `pipeline`: draws the validation prompts, in the main process only."""
    accelerator, unwrapped = run.accelerator, model  # with its adapter off it is the reference
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as adam
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = adam(parameters, args.learning_rate, betas, args.adam_epsilon, args.adam_weight_decay)
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, run.max_train_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    state = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    state |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    if run.checkpoint:
        stored = torch.load(run.checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        for name, part in state.items():
            part.load_state_dict(stored[name])
    log = TrainingLog(args, run)
    for number in (signal.SIGTERM, signal.SIGINT):  # until here a signal ends the process at once: nothing is lost
        signal.signal(number, on_stop_signal)

    for step in range(run.start_step + 1, run.max_train_steps + 1):
        totals = Counter()
        for _ in range(args.gradient_accumulation_steps):
            if stop_signals:
                stop(args, run, step - 1, unwrapped, state, leave=accelerator.num_processes == 1)
            asked = time.time()
            batch = next(batches)
            log.data_time += time.time() - asked
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss, metrics = training_step(model, unwrapped, noise_scheduler, batch, args)
                accelerator.backward(loss)
            totals.update({name: value / args.gradient_accumulation_steps for name, value in metrics.items()})
        totals["grad_norm"] = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        totals["stop"] = torch.full_like(totals["grad_norm"], len(stop_signals))

        # The only synchronisation of an optimizer step: all metrics of all processes in one reduction. It comes before
        # the update, so that a step without a finite loss and gradient can be skipped: by all processes alike.
        values = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
        logs = dict(zip(totals, values), lr=lr_scheduler.get_last_lr()[0])
        stopping = logs.pop("stop") > 0  # a process has received a signal: all of them leave after this step
        finite = log.write(step, logs)
        if finite or accelerator.scaler:  # with fp16 the scaler itself skips a step, and lowers the loss scale
            optimizer.step()
        if finite:
            lr_scheduler.step()
        optimizer.zero_grad()

        if accelerator.is_main_process and (step % args.checkpointing_steps == 0 or step == run.max_train_steps):
            save_checkpoint(args, run, step, unwrapped, state)
        if stopping:
            stop(args, run, step, unwrapped, state, leave=True)
        if accelerator.is_main_process and args.validation_steps and step % args.validation_steps == 0:
            log_images(args, accelerator, draw_gallery(args, run, pipeline, unwrapped), step)
            log.step_ended = time.time()  # drawing does not count as training
    for number in (signal.SIGTERM, signal.SIGINT):  # from here on a signal ends the process at once, again
        signal.signal(number, signal.SIG_DFL)


def main(args: ScriptArguments) -> None:
    # What can be wrong with flags, folders and labels is found before a model is loaded. A start reads labels and an
    # index, and lists the cache. Only `encode_dataset` reads images, each of them once.
    accelerator = make_accelerator(args)
    check_model(args)
    model = args.pretrained_model_name_or_path
    scheduler = json.loads(file_of(model, "scheduler/scheduler_config.json", args.revision).read_text())
    if scheduler.get("shift") == 3.0:  # nothing else tells Turbo from the base model
        warning = "shift 3, as Z-Image-Turbo, whose distillation this training undoes; Tongyi-MAI/Z-Image has 6"
        accelerator.print(f"--pretrained_model_name_or_path {model} has {warning}", file=sys.stderr)
    table, parts = load_ranked_dataset(args)
    labels = make_labels(args, table)
    run = plan_run(args, accelerator, labels)
    fit(args, run, parts, labels)


# Copied from train_rankdpo_sdxl.fit
def fit(args: ScriptArguments, run: "Run", parts: list, labels: dict) -> None:
    lock, accelerator = begin_run(args, run), run.accelerator
    pipeline = encode_dataset(args, run, parts, labels)
    record_run(args, run, labels)
    set_seed(args.seed)
    noise_scheduler, model = load_model(args)
    prepare_model(args, run, model)
    batches = partial(training_batches, args, run, labels, noise_scheduler, pipeline)
    if args.precompute_ref:
        precompute_reference(args, run, model, noise_scheduler, batches)
    train(args, run, model, noise_scheduler, batches(run.start_step), pipeline)
    accelerator.wait_for_everyone()
    # The others leave: none waits in NCCL, where it would time out, while the first process draws and uploads.
    accelerator.state.destroy_process_group()
    if accelerator.is_main_process:
        finish(args, run, model, pipeline, parts)
    accelerator.end_training()
    lock.release()


# Data: labels of all rows -------------------------------------------------------------------------------------------
# Copied from train_rankdpo_sdxl.load_ranked_dataset
def load_ranked_dataset(args: ScriptArguments) -> tuple[pa.Table, list["Part"]]:
    """The dataset without its images: the label columns of all rows, and the parts that hold the images."""
    needed = {args.prompt_id_column: "ids", args.prompt_column: "text", args.images_column: "lists of images"}
    needed[args.preference_column] = "lists of numbers"
    table, parts = read_columns(args, needed, {args.rank_column, "generators", "scores"})
    table = table[: args.max_train_samples]
    return table, [part for part in parts if part.start < len(table)]


# Copied from train_rankdpo_sdxl.make_labels
def make_labels(args: ScriptArguments, table: pa.Table) -> dict:
    """Checks all rows and computes their labels: Arrow's `id` and `prompt` (n,); arrays (n, k) `images`, positions of
    the images used, `phi` float32, `rank` int64 and, for weighted_sft, `weight` float32, of mean 1; `count` (n,)."""
    seen, found = {}, []
    for index, row in enumerate(row for batch in table.to_batches(1000) for row in batch.to_pylist()):
        prompt_id = row[args.prompt_id_column]
        try:
            if prompt_id is None or prompt_id in seen:
                raise ValueError(f"its id is missing, or the same as in row {seen.get(prompt_id)}")
            found.append(row_labels(args, row))
            if (k := len(found[-1]["images"])) != (first := len(found[0]["images"])):
                raise ValueError(f"{k} images, but row 0 has {first}: all rows need the same number")
        except (ValueError, TypeError, LookupError) as error:
            problem = f"the dataset has no column {error}" if isinstance(error, KeyError) else error
            raise SystemExit(f"row {index} (prompt_id {prompt_id!r}): {problem}") from None
        seen[prompt_id] = index
    if not found:
        raise SystemExit(f"--dataset_name {args.dataset_name}: split {args.dataset_split!r} has no rows")
    labels = {name: np.array([row[name] for row in found]) for name in found[0]}
    for name, column in (("id", args.prompt_id_column), ("prompt", args.prompt_column)):
        labels[name] = table[column].combine_chunks()
    if "weight" in labels:
        labels["weight"] = np.float32(labels["weight"] / (labels["weight"].mean() or 1.0))
    phi = labels["phi"]
    ordered = np.mean([phi[:, i] != phi[:, j] for i, j in itertools.combinations(range(phi.shape[1]), 2)])
    without = np.count_nonzero(np.ptp(phi, axis=1) == 0)
    if ordered == 0 and args.loss_type != "weighted_sft":
        raise SystemExit(f"{args.dataset_name}: the images of all {without} prompts are equally preferred")
    PartialState().print(f"{ordered:.1%} of the pairs of images have an order; {without} prompts have none")
    # What identifies them: the rewards that made them, which evaluate.py marks, and a hash.
    scores = table[:1].to_pylist()[0].get("scores")
    known = ["hpsv2.1"] if args.loss_type == "weighted_sft" else list(scores) if isinstance(scores, dict) else []
    rewards = {"all": known, "random": []}.get(args.rank_by, [args.rank_by])
    numbers = [labels[name].tolist() for name in ("images", "phi", "rank", "weight") if name in labels]
    labels["settings"] = {"rewards": rewards, "labels": content_key(str([*numbers, labels["id"].to_pylist()]))}
    return labels


# Copied from train_rankdpo_sdxl.row_labels
def row_labels(args: ScriptArguments, row: dict) -> dict:
    """A row's `images`, `phi`, `rank` and, for weighted_sft, `weight`. A ValueError says what is wrong with the row."""
    prompt, stored, rank = row[args.prompt_column], row[args.preference_column], row.get(args.rank_column)
    phi = np.array(stored or [], dtype=np.float32)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("the prompt is empty: remove the row")
    if len(phi) < 2 or not ((phi >= 0) & (phi <= 1)).all():
        raise ValueError(f"`{args.preference_column}` {stored}: it takes at least 2 images, and none is outside [0, 1]")
    if rank is None:
        rank = np.argsort(np.argsort(-phi, kind="stable"), kind="stable") + 1
    if sorted(rank) != list(range(1, len(phi) + 1)) or (np.diff(phi[np.argsort(rank)]) > 0).any():
        raise ValueError(f"`{args.rank_column}` {rank} is no permutation, or contradicts the preferences {stored}")
    count, images = len(phi), list(range(len(phi)))
    if args.generators:
        images = [i for i in images if row["generators"][i] in args.generators]
        if len(images) < 2:
            raise ValueError(f"{len(images)} images of --generators {' '.join(args.generators)}: it takes at least 2")
    if args.rank_by == "random":
        rank = seeded_generator(args.seed, "random labels", row[args.prompt_id_column]).permutation(len(images)) + 1
        phi = (len(images) - rank) / (len(images) - 1)
    elif args.generators or args.rank_by != "all":
        scores = reward_scores(row, count, args.rank_by)[:, images]
        phi = scores[0] if args.loss_type == "lair" and args.rank_by != "all" else preference_probability(scores)
        rank = preference_rank(scores)
    labels = {"count": count, "images": images, "phi": np.float32(phi), "rank": np.int64(rank)}
    if args.loss_type == "weighted_sft":
        reward = "hpsv2.1" if args.rank_by == "all" else args.rank_by
        labels["weight"] = reward_scores(row, count, reward)[0, images]
        if labels["weight"].min() < 0:
            raise ValueError(f"weighted_sft: its weights, `{reward}`, go below 0: name another reward with --rank_by")
    return labels


# Copied from train_rankdpo_sdxl.reward_scores
def reward_scores(row: dict, n_images: int, reward: str) -> np.ndarray:
    """A row's scores under a reward, or under all of them, float64 (n_rewards, n_images)."""
    if reward not in ("all", *row["scores"]):
        raise ValueError(f"--rank_by {reward}: the dataset has scores of {', '.join(row['scores'])}: name one of them")
    names = sorted(row["scores"]) if reward == "all" else [reward]
    scores = np.array([row["scores"][name] for name in names], dtype=np.float64)
    if scores.shape[1:] != (n_images,) or not np.isfinite(scores).all():
        raise ValueError("`scores` must give one finite number per image and reward")
    return scores


# Copied from build_synpic.preference_probability
def preference_probability(scores: np.ndarray) -> np.ndarray:
    """Share of the comparisons that an image wins (Algorithm 1): over all rewards, against its prompt's other images.
    scores: float (n_rewards, k), higher is better; equal scores count for neither. Returns float64 (k,) in [0, 1]."""
    scores = np.asarray(scores, dtype=np.float64)
    n_rewards, k = scores.shape
    wins = (scores[:, :, None] > scores[:, None, :]).sum(axis=(0, 2))
    return wins / (n_rewards * (k - 1))


# Copied from build_synpic.preference_rank
def preference_rank(scores: np.ndarray) -> np.ndarray:
    """Ranks by preference probability. The mean standardised reward breaks ties, then the position.
    scores: float (n_rewards, k), higher is better. Returns int64 (k,), a permutation of 1…k; 1 is the best."""
    scores = np.asarray(scores, dtype=np.float64)
    deviation = scores.std(axis=1, keepdims=True)
    standardised = (scores - scores.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1.0)
    # Rounded, so that float noise in the mean of equal values does not break a tie that the position should break.
    tie_breaker = np.round(standardised.mean(axis=0), 9)
    order = np.lexsort((np.arange(scores.shape[1]), -tie_breaker, -preference_probability(scores)))
    return np.argsort(order) + 1


# Copied from train_rankdpo_sdxl.label_rows
def label_rows(labels: dict, start: int, end: int) -> list[tuple[int, int]]:
    """Which labels belong to the dataset's rows from `start` to `end`: (row of the dataset, row of the labels)."""
    return [(row, row) for row in range(start, min(end, len(labels["id"])))]


# Copied from train_rankdpo_sdxl.epoch_order
def epoch_order(args: ScriptArguments, epoch: int, length: int) -> np.ndarray:
    """The order of the dataset's rows in an epoch, int64 (length,): shuffled, a function of (seed, epoch)."""
    return seeded_generator(args.seed, epoch, "order").permutation(length)


# Model: what is refused, the pipeline without its transformer, the transformer with its LoRA ------------------------
# Prompts differ in length: with False each would be compiled anew, and the fourth would fail; None compiles twice.
PIPELINE, DENOISER, DYNAMIC_SHAPES = ZImagePipeline, "transformer", None
PIPELINES = ("ZImagePipeline", "ZImageImg2ImgPipeline")
OTHERS = "this trains Z-Image; train_rankdpo_sdxl.py, train_rankdpo_sd3.py and train_dpo_qsd.py train other models"
# What cache and reference depend on.
ENCODING_FLAGS = ("variant", "resolution", "mixed_precision", "max_sequence_length")
REFERENCE_FLAGS = "seed noise proportion_empty_prompts base_precision allow_tf32 compile train_batch_size".split()
REFERENCE_FLAGS += ["weighting_scheme", "logit_mean", "logit_std", "mode_scale"]
# What Z-Image has; absent: the first. Else: other schedules, inpainting, another architecture or VAE.
PLAIN = {
    "model_index.json": {},
    "scheduler/scheduler_config.json": {
        "_class_name": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        "use_dynamic_shifting": (False, None),  # sigmas that depend on the resolution
    },
    "transformer/config.json": {"_class_name": ("ZImageTransformer2DModel",), "in_channels": (16,)},
    "vae/config.json": {"_class_name": ("AutoencoderKL",), "latents_mean": (None,), "latent_channels": (16,)},
}


def load_pipeline(args: ScriptArguments, device: torch.device, with_text: bool = True) -> ZImagePipeline:
    """The pipeline without its transformer, and without its text encoder if nothing is left for it to encode."""
    model, options = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=torch.float32, **options)
    absent = ["transformer"] if with_text else ["transformer", "text_encoder", "tokenizer"]
    options |= {"vae": vae.requires_grad_(False), **dict.fromkeys(absent)}
    pipeline = ZImagePipeline.from_pretrained(model, dtype=args.weight_dtype, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@torch.no_grad()
def encode_prompt(args: ScriptArguments, pipeline: ZImagePipeline, prompts: list[str]) -> dict:
    """prompts (n) → prompt_0, prompt_1, …, (1, tokens, width) each: a prompt's own tokens, without padding."""
    # The pipeline's own device would be the VAE's, which may have left the GPU. It writes its template into the list
    # that it is given: a copy.
    options = {"device": pipeline.text_encoder.device, "max_sequence_length": args.max_sequence_length}
    embeds, _ = pipeline.encode_prompt([*prompts], do_classifier_free_guidance=False, **options)
    return {f"prompt_{i}": part[None].to(args.weight_dtype) for i, part in enumerate(embeds)}


def collate(rows: list[dict]) -> dict:
    """Rows as a batch, with the names of `encode_prompt`: prompts have unequal lengths, so they stay apart."""
    embeds = {f"prompt_{i}": row.pop("prompt_0")[None] for i, row in enumerate(rows) if "prompt_0" in row}
    return default_collate(rows) | embeds


def pipeline_embeds(args: ScriptArguments, parts: dict) -> dict[str, list[torch.Tensor]]:
    """prompt_embeds: what pipeline and transformer take, a list of (tokens, width)."""
    return {"prompt_embeds": [part[0] for name, part in parts.items() if name.startswith("prompt_")]}


def load_model(args: ScriptArguments) -> tuple[FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel]:
    """Scheduler and transformer, without LoRA. `--base_precision` quantises the linear layers of its blocks."""
    model = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
    options = {"variant": args.variant, "dtype": args.weight_dtype}
    if args.base_precision:
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": args.weight_dtype}
        bits = {"load_in_8bit": True} if args.base_precision == "int8" else four
        whole = ["t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer"]  # 0.2 % of the weights
        options["quantization_config"] = BitsAndBytesConfig(**bits, llm_int8_skip_modules=whole)
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(**model, subfolder="scheduler")
    return noise_scheduler, ZImageTransformer2DModel.from_pretrained(**model, subfolder="transformer", **options)


def add_lora(model: ZImageTransformer2DModel, rank: int) -> None:
    """LoRA on the attention projections: 136 modules of Z-Image. alpha = rank: ComfyUI and diffusers agree."""
    target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=target_modules))


def comfyui_state_dict(lora_state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {}  # ComfyUI reads diffusers' file


# Copied from train_rankdpo_sdxl.record_run
def record_run(args: ScriptArguments, run: "Run", labels: dict) -> None:
    """Writes what identifies the run. The images do, too: they are known once all are encoded."""
    rows = zip(labels["id"].to_pylist(), labels["prompt"].to_pylist(), labels["key"].tolist())
    run.settings["images"] = content_key(str([*rows]))
    check_same_run(args, run.settings, run.earlier)
    if run.accelerator.is_main_process:
        write_bytes(Path(args.output_dir, "run.json"), json.dumps(run.settings, indent=2).encode())


def describe(args: ScriptArguments, run: "Run") -> dict:
    """What the card says of method, data and model."""
    data, paper = f"ranked images (`{args.dataset_name}`)", "[RankDPO](https://arxiv.org/abs/2410.18013)"
    paper = "one of the baselines of " * (args.loss_type in SFT) + paper
    model, name = args.pretrained_model_name_or_path, Path(args.output_dir).resolve().name
    tokens = "" if args.max_sequence_length == 512 else f", max_sequence_length={args.max_sequence_length}"
    usage = f"""```python
import torch
from diffusers import ZImagePipeline

pipeline = ZImagePipeline.from_pretrained("{model}", dtype=torch.bfloat16)
pipeline.to("cuda").load_lora_weights("{args.hub_model_id or args.output_dir}", weight_name="{LORA_FILE}")
options = {{"height": {args.resolution}, "width": {args.resolution}, "num_inference_steps": 28, "guidance_scale": 4.0}}
image = pipeline({json.dumps(args.validation_prompts[0])}, **options{tokens}).images[0]
```

With ComfyUI: put `{LORA_FILE}` into `models/loras` as `{name}.safetensors` and load it with
the "Load LoRA" node at strength 1. A CFG of 5 there is a guidance scale of 4 here."""
    about = {"tags": ["z-image", "rankdpo"], "datasets": [args.dataset_name], "usage": usage}
    options = {"logit_normal": ["logit_mean", "logit_std"], "mode": ["mode_scale"]}.get(args.weighting_scheme, [])
    density = "".join(f", {name} {getattr(args, name):g}" for name in options)
    about["facts"] = {"objective": f"{args.loss_type}, beta {args.beta_dpo:g}"}
    about["facts"]["timesteps"] = f"{args.weighting_scheme}{density}"
    return about | {"method": f"{data}, after\n{paper}: the model learns to denoise preferred images better."}


# ----------------------------------------------------------------------------------------------------------------------
# Shared: data, run, card, files (train_rankdpo_sdxl.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


# Data: images where they lie, one cache file a row, batches, the reference's errors ---------------------------------
# A row group of a Parquet file: path or URL, number, its index in the cache (see `row_keys`), first row, how many.
Part = namedtuple("Part", "file number index start rows")
KINDS = {  # of columns: patterns of Arrow's types
    "ids": "string|int",
    "text": "^(large_)?string|^null",
    "numbers": "^(u?int|float|halffloat|double|bool|null)",
    "images": "^(large_)?binary|^struct<.*bytes: ",
    "lists of numbers": "list<[^<]*(int|float|double)",
    "lists of images": "list.*<.*(binary|bytes: )",
}


def read_columns(args: ScriptArguments, needed: dict, optional: set) -> tuple[pa.Table, list[Part]]:
    """These columns of all rows but the images, and the parts that hold those. needed: column → its kind, and after a
    colon what to do if it is not there."""
    found = None
    if PartialState().is_main_process:  # for all processes: the Hub limits requests
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(partial(read_labels, args, needed, optional), find_files(args)))
    tables, groups = zip(*broadcast_object_list([found])[0])
    groups = [*itertools.chain(*groups)]
    starts = itertools.accumulate((rows for *_, rows in groups), initial=0)
    parts = [Part(*place, start, rows) for (*place, rows), start in zip(groups, starts)]
    return pa.concat_tables(tables, promote_options="permissive"), parts


def find_files(args: ScriptArguments) -> list[str]:
    """The Parquet files of the split, where they lie, locally or on the Hub. Datasets of other formats that `datasets`
    knows, save_to_disk's included, are copied, once, into a Parquet file in the cache."""
    name, split, folder, found = args.dataset_name, args.dataset_split, args.dataset_name, {}
    if os.path.isfile(name):  # one .parquet file
        return [name]
    options = {"name": args.dataset_config_name, "revision": args.dataset_revision}
    with TemporaryDirectory() as links:
        if os.path.isdir(name) and glob.has_magic(os.path.abspath(name)):
            # `datasets` takes * ? [ in a path for a pattern, and would read another folder.
            folder = shutil.copytree(os.path.abspath(name), f"{links}/data", copy_function=os.symlink)
        on_disk = any(os.path.exists(f"{name}/{file}") for file in ("state.json", "dataset_dict.json"))
        if not on_disk:
            found = load_dataset_builder(folder, **options).config.data_files or {}
            if found and re.split(r"[\[+]", split)[0] not in found:
                raise SystemExit(f"--dataset_name {name}: no split {split!r}; it has {', '.join(found)}")
        files = [str(file).replace(f"{folder}/", f"{name}/") for file in found.get(split, [])]
        if files and all(file.endswith(".parquet") for file in files):
            return files
        stats = [(str(file), file.stat()) for file in sorted(Path(name).rglob("*"))]
        facts = [options, split, str(found), *((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)]
        copy = Path(args.cache_dir, "datasets", f"{content_key(str(facts))}.parquet")
        if not copy.exists():
            options |= {"split": split, "cache_dir": f"{links}/arrow"}
            dataset = load_from_disk(folder) if on_disk else load_dataset(folder, **options)
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = f"{copy}.{os.getpid()}.tmp"
            (dataset if isinstance(dataset, Dataset) else dataset[split]).to_parquet(temporary)
            os.replace(temporary, copy)
    return [str(copy)]


def read_labels(args: ScriptArguments, needed: dict, optional: set, file: str) -> tuple[pa.Table, list[tuple]]:
    system, path = url_to_fs(file)
    known, footer = system.info(path), BytesIO()
    with system.open(path, cache_type="none") as handle, pq.ParquetFile(handle) as parquet:
        types = {field.name: str(field.type) for field in parquet.schema_arrow}
        for column, kind in needed.items():
            if not re.search(KINDS[kind.partition(":")[0]], found := types.get(column, "absent")):
                raise SystemExit(f"{args.dataset_name}: column {column!r} is {found}, not {kind}; it has {[*types]}")
        images = [getattr(args, name) for name in IMAGE_COLUMNS]
        table = parquet.read([name for name in types if name in {*needed, *optional} and name not in images])
        parquet.metadata.write_metadata_file(footer)
        sizes = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
    # What identifies the images of a file, wherever it lies and whatever it is called.
    facts = [known["size"], known.get("mtime"), known.get("blob_id"), content_key(footer.getvalue()), *images]
    index = [Path(args.cache_dir, "index", f"{content_key(json.dumps([*facts, n]))}.json") for n in range(len(sizes))]
    return table, list(zip([file] * len(sizes), range(len(sizes)), index, sizes))


def read_images(args: ScriptArguments, part: Part) -> Iterator[list[dict]]:
    """The images of a part, row by row, [{"bytes", "path"}, …]. Only a few rows are in memory at a time."""
    columns, (system, path) = [getattr(args, name) for name in IMAGE_COLUMNS], url_to_fs(part.file)
    options = {"pre_buffer": False, "buffer_size": 2**20}
    with system.open(path, block_size=2**25) as handle, pq.ParquetFile(handle, **options) as parquet:
        for batch in parquet.iter_batches(4, [part.number], columns, use_threads=False):
            for cells in zip(*(batch.column(name).to_pylist() for name in columns)):  # of images, or of lists of them
                images = itertools.chain(*(cell if isinstance(cell, list) else [cell] for cell in cells))
                yield [image if isinstance(image, dict) else {"bytes": image, "path": None} for image in images]


# The cache knows rows by their images and prompts by their text, whatever dataset, order, seed or labels they are of.
# A file there is whole. The index of a part holds the names of its images: it need not be read again.
def image_name(stored: dict) -> str:
    """The hash that score_pairs.py makes of an image; of one that lies in a file, its path."""
    content = stored["bytes"]
    return hashlib.blake2b(content, digest_size=16).hexdigest() if content else os.path.abspath(stored["path"] or "")


def row_key(labels: dict, row: int, images: list[str]) -> str:
    """The name of a row in the cache: a hash of the images used. A file is known by its size and date, too."""
    facts = [images[position] for position in labels["images"][row]]
    files = [os.stat(image) for image in facts if "/" in image and os.path.exists(image)]
    return content_key(json.dumps([*facts, *((file.st_size, file.st_mtime_ns) for file in files)]))


def row_keys(part: Part, labels: dict) -> dict[int, str | None]:
    """The key of each row of the labels whose images a part holds; of a part without an index it is not known yet."""
    rows = label_rows(labels, part.start, part.start + part.rows)
    if not part.index.exists():
        return dict.fromkeys(row for _, row in rows)
    images = json.loads(part.index.read_text()) if rows else []
    return {row: row_key(labels, row, images[place - part.start]) for place, row in rows}


def rows_to_encode(args: ScriptArguments, run: "Run", parts: list[Part], labels: dict) -> Iterator[tuple]:
    """Reads parts and writes their indices; gives the rows without a cache file: (key, pixels and time_ids)."""
    with ThreadPoolExecutor(args.dataloader_num_workers or 4) as pool:  # decoding releases the interpreter's lock
        for part in parts:
            index = []
            for place, images in enumerate(read_images(args, part), part.start):
                index.append([image_name(image) for image in images])
                for _, row in label_rows(labels, place, place + 1):
                    where = f"row {place} (id {labels['id'][row].as_py()!r})"
                    if len(images) != labels["count"][row]:
                        raise SystemExit(f"{where}: {len(images)} images, but {labels['count'][row]} preferences")
                    if run.cache_file(key := row_key(labels, row, index[-1])).exists():
                        continue
                    used = labels["images"][row]
                    decoded = [pool.submit(preprocess_image, images[i], args.resolution) for i in used]
                    for i, image in zip(used, decoded):
                        if image.exception():
                            raise SystemExit(f"{where}: image {i} does not decode: {image.exception()}")
                    yield key, collate([image.result() for image in decoded])
            write_bytes(part.index, json.dumps(index).encode())


def preprocess_image(stored: dict, resolution: int) -> dict[str, torch.Tensor]:
    """{"bytes", "path"} → pixels, uint8 (3, resolution, resolution): the shorter side resized, the centre cropped; and
    time_ids, float32 (6,), which SDXL reads: [original height, width, crop top, left, target height, width]."""
    picture = Image().decode_example(stored)  # turned as its EXIF data say
    if picture.mode == "F" or picture.mode.startswith("I") and max(picture.getextrema()) > 65535:
        raise ValueError("its pixels are not of 8 or 16 bits: convert it")
    if picture.mode.startswith("I;") or picture.mode == "I" and max(picture.getextrema()) > 255:  # of 16 bits
        picture = PILImage.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    original, picture = [picture.height, picture.width], picture.convert("RGB")
    picture = TF.resize(picture, resolution, interpolation=TF.InterpolationMode.LANCZOS)
    top, left = (picture.height - resolution) // 2, (picture.width - resolution) // 2
    pixels = TF.pil_to_tensor(TF.crop(picture, top, left, resolution, resolution))
    return {"pixels": pixels, "time_ids": torch.tensor([*original, top, left, resolution, resolution]).float()}


def encode_dataset(args: ScriptArguments, run: "Run", parts: list[Part], labels: dict):
    """Writes what is missing of the cache, a file for each row and each prompt; gives the labels the `key` of each row.
    Returns the pipeline, to draw with. Its text encoders are gone, unless they are to encode prompts at every step."""
    accelerator = run.accelerator
    args.validation_prompts = args.validation_prompts or list(dict.fromkeys(labels["prompt"][:64].to_pylist()))[:4]
    prompts = labels["prompt"].unique().to_pylist() if args.cache_text_embeddings else []
    texts = {content_key(text): text for text in ["", *args.validation_prompts, *prompts]}
    texts = [(key, text) for key, text in texts.items() if not run.cache_file(key).exists()]
    pipeline = load_pipeline(args, accelerator.device, with_text=bool(texts) or not args.cache_text_embeddings)
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    # The second round is for machines with caches of their own.
    for share, own_texts in ((parts[own], texts[own]), (parts, texts))[: accelerator.num_processes]:
        encode_rows(args, run, pipeline, share, labels)
        for key, text in tqdm(own_texts, desc="encode prompts", disable=not own_texts):
            if not run.cache_file(key).exists():
                embeds = encode_prompt(args, pipeline, [text])
                write_tensors(run.cache_file(key), {name: part[0] for name, part in embeds.items()})
        accelerator.wait_for_everyone()
    pipeline.vae.to("cpu")
    if args.cache_text_embeddings:
        pipeline.register_modules(**dict.fromkeys(name for name in pipeline.components if "text_encoder" in name))
    keys = {row: key for part in parts for row, key in row_keys(part, labels).items()}
    labels["key"] = np.array([keys[row] for row in range(len(keys))])
    free_memory()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return pipeline


@torch.no_grad()
def encode_rows(args: ScriptArguments, run: "Run", pipeline, parts: list[Part], labels: dict) -> None:
    """Writes what is missing of the latents, (k, C, h, w), the posterior's mean, scaled: a file for each row."""
    cached = {file.stem for file in run.cache.glob("*.safetensors")}
    parts = [part for part in parts if not cached.issuperset(row_keys(part, labels).values())]
    total = sum(len(label_rows(labels, part.start, part.start + part.rows)) for part in parts)
    rows = read_ahead(rows_to_encode(args, run, parts, labels))
    vae, shift = pipeline.vae, getattr(pipeline.vae.config, "shift_factor", None) or 0.0
    for key, item in tqdm(rows, desc="encode images", total=total, unit="row", disable=not parts):
        # Scaled in float32: bf16 would round by up to half a step of a pixel.
        batches = item.pop("pixels").split(args.vae_batch_size)
        batches = [(batch.to(vae.device).float() / 127.5 - 1.0).to(vae.dtype) for batch in batches]
        means = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])
        latents = ((means - shift) * vae.config.scaling_factor).to(args.weight_dtype)
        if not latents.isfinite().all():
            raise SystemExit("the VAE's latents are not finite: it overflows in half precision: give another one")
        write_tensors(run.cache_file(key), {"latents": latents, **item})


def read_row(args: ScriptArguments, run: "Run", labels: dict, noise_scheduler, key: tuple[int, int, int]) -> dict:
    """An encoded row with its labels, timestep and noise. `key`: of `micro_batches`."""
    epoch, row, place = key
    item = load_file(run.cache_file(labels["key"][row]))
    noise_key = (args.seed, epoch, labels["id"][row].as_py())
    item |= sample_noise(args, noise_scheduler, noise_key, item["latents"].shape)
    item |= {name: torch.from_numpy(labels[name][row]) for name in ("phi", "rank", "weight") if name in labels}
    if run.reference:
        step, place = divmod(place, run.rows_per_step)
        item["ref_errors"] = load_file(run.reference / f"{step}.safetensors")["errors"][place]
    empty = seeded_generator(*noise_key, "empty prompt").random() < args.proportion_empty_prompts
    prompt = "" if empty else labels["prompt"][row].as_py()
    return item | (load_file(run.cache_file(content_key(prompt))) if args.cache_text_embeddings else {"prompt": prompt})


def micro_batches(args: ScriptArguments, length: int, process: int, processes: int, start_step: int) -> Iterator[list]:
    """The keys of a process's micro-batches, without end: (epoch, row, place). In step s, counted from 0, all processes
    together take the places s·G … (s+1)·G − 1 of the epochs' orders laid end to end; G is the global batch."""
    order = lru_cache(maxsize=2)(partial(epoch_order, args, length=length))
    for micro_step in itertools.count(start_step * args.gradient_accumulation_steps):
        start = (micro_step * processes + process) * args.train_batch_size
        places = range(start, start + args.train_batch_size)
        yield [(place // length, int(order(place // length)[place % length]), place) for place in places]


def training_batches(args: ScriptArguments, run: "Run", labels: dict, noise_scheduler, pipeline, start_step: int):
    """This process's micro-batches on its device, from a step on, without end."""
    accelerator, on_gpu = run.accelerator, run.accelerator.device.type == "cuda"
    place, length = (accelerator.process_index, accelerator.num_processes), len(labels["key"])
    read, keys = partial(read_row, args, run, labels, noise_scheduler), micro_batches(args, length, *place, start_step)
    with ThreadPoolExecutor(args.dataloader_num_workers or 4) as pool:
        for batch in read_ahead(collate(list(pool.map(read, batch))) for batch in keys):
            if not args.cache_text_embeddings:
                batch |= encode_prompt(args, pipeline, batch.pop("prompt"))
            pinned = {n: part.pin_memory() if on_gpu and not part.is_cuda else part for n, part in batch.items()}
            yield {name: part.to(accelerator.device, non_blocking=True) for name, part in pinned.items()}


def read_ahead(items: Iterator) -> Iterator:
    """The same items. A thread reads the next one while the caller works with this one."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, items, None)
            yield item


def precompute_reference(args: ScriptArguments, run: "Run", model: Module, noise_scheduler, batches) -> None:
    """Computes the reference's errors of all places of the run, a file for each step. Runs of the same rows that differ
    in nothing but length, objective and optimizer share them. `batches`: makes the micro-batches from a step on."""
    accelerator = run.accelerator
    key = [run.cache.name, run.settings["images"], run.rows_per_step, *(getattr(args, n) for n in REFERENCE_FLAGS)]
    folder = run.cache.parent / f"reference-{content_key(json.dumps(key))}"
    missing = (s for s in range(run.start_step, run.max_train_steps) if not (folder / f"{s}.safetensors").exists())
    start = broadcast_object_list([next(missing, run.max_train_steps)])[0]  # another run may be writing
    batches = batches(start)
    for step in tqdm(range(start, run.max_train_steps), desc="reference", unit="step"):
        found = []
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)  # outside of autocast, as in training
            with accelerator.autocast(), as_reference(model):
                errors = predict(model, noise_scheduler, batch, args)[0].detach()
            found.append(accelerator.gather(errors))
        if accelerator.is_local_main_process:
            write_tensors(folder / f"{step}.safetensors", {"errors": torch.cat(found)})
    accelerator.wait_for_everyone()
    run.reference = folder


# Model: checks, LoRA, reference, optimizer --------------------------------------------------------------------------
def check_model(args: ScriptArguments) -> None:
    """Exits with one line unless the model is one that the objective fits. Reads configurations only."""
    model, other = args.model, getattr(args, "pretrained_vae_model_name_or_path", None)
    for file, rules in PLAIN.items():
        where, source = f"--pretrained_model_name_or_path {model}", (model, file, args.revision)
        if other and file == "vae/config.json":
            where, source = f"--pretrained_vae_model_name_or_path {other}", (other, "config.json")
        if os.path.isfile(source[0]):
            raise SystemExit(f"{where} is a single file: from_single_file and save_pretrained make a folder of it")
        config = json.loads(file_of(*source).read_text())
        name = config.get("_class_name", file)
        if file == "model_index.json" and name not in PIPELINES:
            raise SystemExit(f"{where} is a {name}: {OTHERS}")
        for key, values in rules.items():
            if (found := config.get(key, values[0])) == "absent" or found not in values:
                fit = " or ".join(str(value) for value in values if value != "absent")
                raise SystemExit(f"{where}: its {name} has {key} {found}; the objective takes {fit}")
    weights = [file.name for file in Path(model, DENOISER).glob("*.safetensors")]  # none of a model on the Hub
    if not args.variant and weights and all(".fp16" in name for name in weights):
        raise SystemExit(f"--pretrained_model_name_or_path {model} holds fp16 files only: add --variant fp16")


def file_of(model: str, file: str, revision: str | None = None) -> Path:
    return Path(model, file) if os.path.isdir(model) else Path(hf_hub_download(model, file, revision=revision))


def model_key(model: str, file: str, revision: str | None = None) -> str:
    """Identifies a model's weights: a folder, wherever it lies, by names and sizes of its files and blocks of each; a
    model of the Hub by the commit of one of its files."""
    if not os.path.isdir(model):
        return f"{model}@{file_of(model, file, revision).parent.name}"
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(model).rglob("*.*") if path.is_file() and path.stat().st_size):
        name = f"/{path.relative_to(model)}"
        if not re.search(r"/\.|\.(md|png)$", name):  # no hidden files, cards and pictures
            content = np.memmap(path, mode="r")
            digest.update(f"{name}:{len(content)}".encode())
            for start in np.linspace(0, max(0, len(content) - 2**16), 32).astype(int):
                digest.update(content[start : start + 2**16])
    return digest.hexdigest()[:16]


def prepare_model(args: ScriptArguments, run: "Run", model: Module) -> None:
    """Freezes the model, adds the LoRA in float32, and restores the LoRA of the checkpoint."""
    model.requires_grad_(False)
    add_lora(model, args.rank)
    cast_training_params(model, dtype=torch.float32)
    if run.checkpoint:
        lora = load_file(run.checkpoint / LORA_FILE)
        set_peft_model_state_dict(model, {key.removeprefix(f"{DENOISER}."): value for key, value in lora.items()})
    model.to(run.accelerator.device).train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        # The LoRA's scale becomes a tensor, 0 for the reference: without the adapter the graph would be another one.
        model.lora_scale = torch.ones((), device=model.device)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] = model.lora_scale
        model.compile_repeated_blocks(fullgraph=True, dynamic=DYNAMIC_SHAPES)


@contextmanager
def as_reference(model: Module) -> Iterator[None]:
    """In this block a forward is the reference's: the same module and kernels without the LoRA, so scores begin at 0.
    A compiled model keeps track of gradients as in training, so that the same graphs run: detach what it returns."""
    scale = getattr(model, "lora_scale", None)  # of a compiled model
    with torch.no_grad() if scale is None else nullcontext():
        model.disable_adapters() if scale is None else scale.zero_()
        try:
            yield
        finally:
            model.enable_adapters() if scale is None else scale.fill_(1.0)


def save_lora(model: Module, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors`: peft keys and the adapter's metadata, exact in diffusers."""
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set: its order differs from run to run
    layers = {f"{DENOISER}_lora_layers": get_peft_model_state_dict(model)}
    PIPELINE.save_lora_weights(folder, **layers, **{f"{DENOISER}_lora_adapter_metadata": metadata})
    (folder / LORA_FILE).chmod(0o644)  # safetensors writes 0600, which other users and servers cannot read


# Run: what it is, its folder, checkpoints, signals, log -------------------------------------------------------------
@dataclass
class Run:  # one training run: its size, its cache, and the step it continues from
    accelerator: Accelerator
    settings: dict  # all that changes the result: two runs with the same settings are the same run
    earlier: dict  # settings of the run whose results are in the output folder
    cache: Path  # of latents and embeddings
    checkpoint: Path | None
    start_step: int
    max_train_steps: int
    rows_per_step: int  # of all processes and accumulated forwards
    images_per_row: int
    reference: Path | None = None  # of `precompute_reference`
    upload: object = None  # the Future of a checkpoint

    def cache_file(self, key: str) -> Path:
        return self.cache / f"{key}.safetensors"


def make_accelerator(args: ScriptArguments) -> Accelerator:
    """Exits with one line if what accelerate is set to does not fit the flags."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    accelerator = Accelerator(
        cpu="LOCAL_RANK" in os.environ and not torch.cuda.is_available(),  # several processes without a GPU: gloo
        # A plain number would be overridden by ACCELERATE_GRADIENT_ACCUMULATION_STEPS.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=Path(args.output_dir, args.logging_dir)),
        # The first process may draw, or write to a slow disk, for longer than NCCL's ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if (kind := accelerator.distributed_type.value) not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise SystemExit(f"accelerate is set to {kind}: a LoRA needs no more than data parallelism")
    if (backend := accelerator.state.dynamo_plugin.backend.value) != "NO":
        raise SystemExit(f"accelerate is set to compile with {backend}: switch it off, and use --compile")
    return accelerator


def plan_run(args: ScriptArguments, accelerator: Accelerator, labels: dict) -> Run:
    """Counts the steps, finds the checkpoint to continue from, and refuses a folder that holds another run."""
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    # What latents and embeddings depend on besides the row: the content of the model, not its place, and preprocessing.
    model, vae = args.model, getattr(args, "pretrained_vae_model_name_or_path", None)
    models = [model_key(model, "model_index.json", args.revision), vae and model_key(vae, "config.json")]
    encoding = content_key(json.dumps([VERSION, *models, *(getattr(args, name) for name in ENCODING_FLAGS)]))
    settings = {spec.name: getattr(args, spec.name) for spec in fields(args) if not spec.metadata["free"]}
    if args.lr_scheduler.startswith("constant"):  # such a run may be made longer; other schedules depend on its length
        del settings["max_train_steps"], settings["num_train_epochs"]
    settings |= {"version": VERSION, **labels["settings"], "model_files": encoding, "global_batch_size": rows_per_step}

    output_dir, resume, checkpoints = Path(args.output_dir), args.resume_from_checkpoint, list_checkpoints(args)
    here, record = f"--output_dir {output_dir} holds", output_dir / "run.json"
    earlier = json.loads(record.read_text()) if record.exists() else {}
    if not earlier and output_dir.exists() and any(path.name[0] != "." for path in output_dir.iterdir()):
        raise SystemExit(f"{here} other files: choose another folder")
    earlier = earlier if checkpoints or (output_dir / LORA_FILE).exists() else {}  # {}: it left nothing
    check_same_run(args, settings, earlier)
    if earlier and not resume:
        raise SystemExit(f"{here} this run: add --resume_from_checkpoint latest, or choose another folder")
    if resume not in (None, "latest"):  # a path, or a name in the folder
        wanted = {Path(resume).resolve(), (output_dir / resume).resolve()}
        checkpoints = {step: path for step, path in checkpoints.items() if path.resolve() in wanted}
        if not checkpoints:
            raise SystemExit(f"--resume_from_checkpoint {resume}: not a checkpoint of --output_dir {output_dir}")
    max_train_steps = args.max_train_steps or max(1, round(args.num_train_epochs * len(labels["id"]) / rows_per_step))
    start_step = max(checkpoints, default=0)
    if start_step > max_train_steps:
        raise SystemExit(f"{here} checkpoint-{start_step}, beyond the {max_train_steps} steps: raise --max_train_steps")
    size = (start_step, max_train_steps, rows_per_step, labels["images"].shape[1])
    return Run(accelerator, settings, earlier, Path(args.cache_dir, encoding), checkpoints.get(start_step), *size)


def check_same_run(args: ScriptArguments, settings: dict, earlier: dict) -> None:
    if other := [name for name in settings if earlier and earlier.get(name) != settings[name]]:
        was = f"{other[0]} {earlier.get(other[0])}, not {settings[other[0]]}"
        raise SystemExit(f"--output_dir {args.output_dir} holds a run with {was}: choose another folder")


def begin_run(args: ScriptArguments, run: Run) -> FileLock:
    """Keeps other runs out of the output folder, and prepares it and the repository."""
    output_dir, lock = Path(args.output_dir), FileLock(Path(args.output_dir, ".lock"))
    run.accelerator.wait_for_everyone()  # all have looked at the folder
    if run.accelerator.is_main_process:
        earlier_card(args)
        if args.push_to_hub:  # a wrong token, name or card fails now, not after the training
            name, private = args.hub_model_id or output_dir.resolve().name, args.hub_private_repo or None
            args.hub_model_id = HfApi().create_repo(name, private=private, exist_ok=True).repo_id
            HfApi().auth_check(args.hub_model_id, write=True)
            earlier_card(args, on_hub=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise SystemExit(f"--output_dir {output_dir} is in use by another run: choose another folder") from None
    run.accelerator.wait_for_everyone()
    return lock


def list_checkpoints(args: ScriptArguments) -> dict[int, Path]:
    folders = [path for path in Path(args.output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return dict(sorted((int(path.name[11:]), path) for path in folders))  # oldest first


def save_checkpoint(args: ScriptArguments, run: Run, step: int, model: Module, state: dict) -> None:
    """Writes `checkpoint-<step>` under another name and renames it: a killed run leaves no half checkpoint. It needs no
    random state: timesteps, noise and order of the data are functions of seed and step."""
    folder, temporary = Path(args.output_dir, f"checkpoint-{step}"), Path(args.output_dir, f".checkpoint-{step}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_lora(model, temporary)
    torch.save({name: part.state_dict() for name, part in state.items()}, temporary / STATE_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    older = [path for saved, path in list_checkpoints(args).items() if saved <= step]
    for path in older[: -(args.checkpoints_total_limit or len(older))]:
        shutil.rmtree(path)
    if args.push_to_hub and args.hub_strategy == "checkpoint" and step < run.max_train_steps:
        lora = {"path_or_fileobj": (folder / LORA_FILE).read_bytes(), "path_in_repo": LORA_FILE}
        run.upload = HfApi().upload_file(repo_id=args.hub_model_id, **lora, run_as_future=True)


def on_stop_signal(number: int, frame) -> None:
    """After the first SIGTERM or Ctrl-C all processes `stop`; a second one, after 2 seconds, ends this one now."""
    # A launcher passes a signal on that the whole group has received already: this is not a second one.
    if stop_signals and time.monotonic() - stop_signals[0][1] > 2:
        os._exit(128 + number)
    stop_signals.append((number, time.monotonic()))


def stop(args: ScriptArguments, run: Run, step: int, model: Module, state: dict, leave: bool) -> None:
    """After a signal, a checkpoint of the last whole step, before the next forward: launchers kill all processes 30
    seconds after their signal. One process leaves at once; several leave together, after the step in hand."""
    if run.accelerator.is_main_process and step and not Path(args.output_dir, f"checkpoint-{step}").exists():
        save_checkpoint(args, run, step, model, state)
    if not leave:
        return
    run.accelerator.wait_for_everyone()  # a launcher ends all processes soon after the first
    run.accelerator.end_training()
    with suppress(BrokenPipeError):
        run.accelerator.print(f"stopped after step {step}: --resume_from_checkpoint latest goes on", flush=True)
    # Perhaps another process has received the signal. A usual end would write into a pipe that nobody reads any more.
    os._exit(128 + (stop_signals[0][0] if stop_signals else signal.SIGTERM))


class TrainingLog:  # progress bar, trackers, `training_log.jsonl`, and the clock
    def __init__(self, args: ScriptArguments, run: Run):
        self.args, self.run, self.accelerator, total = args, run, run.accelerator, run.max_train_steps
        size, warm_up = f"{run.rows_per_step} x {run.images_per_row} images", f"warm-up: {args.lr_warmup_steps} steps"
        self.accelerator.print(f"{total} steps of {size}; {warm_up}")
        if self.accelerator.is_main_process:
            config = {name: value for name, value in asdict(args).items() if isinstance(value, (int, float, str, bool))}
            self.accelerator.init_trackers(Path(__file__).stem, config=config)
            file = Path(args.output_dir, LOG_FILE)
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            whole = [line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= run.start_step]
            write_bytes(file, "".join(whole).encode())
            self.file = open(file, "a", buffering=1)
        self.bar = tqdm(total=total, initial=run.start_step, desc="train", unit="step")
        self.step_ended, self.data_time, self.skipped = time.time(), 0.0, 0  # steps in a row

    def write(self, step: int, logs: dict[str, float]) -> bool:
        """Logs one optimizer step. Returns whether its loss and gradient are finite, so that it counts."""
        now = time.time()
        logs |= {"step_time": now - self.step_ended, "data_time": self.data_time}
        logs["images_per_second"] = self.run.rows_per_step * self.run.images_per_row / logs["step_time"]
        self.step_ended, self.data_time = now, 0.0
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in logs.items()}, refresh=False)
        with suppress(BrokenPipeError):  # the reader of `2>&1 | tee log` ends at Ctrl-C, too
            self.bar.update()
        self.accelerator.log(logs, step=step)
        finite = bool(np.isfinite([logs["loss"], logs["grad_norm"]]).all())
        self.skipped = 0 if finite else self.skipped + 1
        if self.accelerator.is_main_process:
            known = {name: value if np.isfinite(value) else None for name, value in logs.items()}  # JSON has no NaN
            known |= {"processes": self.accelerator.num_processes, **({} if finite else {"skipped": True})}
            self.file.write(json.dumps({"step": step, **known}) + "\n")
        # With fp16 the first gradients overflow, while the loss scaler looks for its scale.
        if self.skipped > self.args.max_skipped_steps + 20 * (self.args.mixed_precision == "fp16"):
            raise SystemExit(f"step {step}: {self.skipped} steps in a row were not finite: lower --learning_rate")
        return finite


# Gallery, card, Hub -------------------------------------------------------------------------------------------------
@torch.no_grad()
def draw_gallery(args: ScriptArguments, run: Run, pipeline, model: Module, lora: bool = True) -> list:
    """The validation prompts, drawn with the current LoRA or without it: PIL images."""
    device, vae, dtype = model.device, pipeline.vae.to(model.device), args.weight_dtype
    options = {"height": args.resolution, "width": args.resolution, "output_type": "latent"}
    options |= {name: getattr(args, f"validation_{name}") for name in ("num_inference_steps", "guidance_scale")}
    setattr(pipeline, DENOISER, model.eval())
    files, images = [run.cache_file(content_key(text)) for text in ["", *args.validation_prompts]], []
    parts = [{name: part[None].to(device) for name, part in load_file(file).items()} for file in files]
    empty, *embeds = (pipeline_embeds(args, part) for part in parts)
    options |= {f"negative_{name}": part for name, part in empty.items()}
    for i, prompt_embeds in enumerate(embeds):
        with (
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            nullcontext() if lora else as_reference(model),
            # Other shapes than in training: they would be compiled anew.
            torch.compiler.set_stance("force_eager") if args.compile else nullcontext(),
        ):
            generator = torch.Generator("cpu").manual_seed(args.seed + i)
            latents = pipeline(**options, **prompt_embeds, generator=generator).images
        # Outside of autocast, in the VAE's own type: SDXL's overflows in fp16.
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        images += pipeline.image_processor.postprocess(vae.decode(latents).sample.float(), output_type="pil")
    model.train()
    vae.to("cpu")
    return images


def log_images(args: ScriptArguments, accelerator: Accelerator, images: list[PILImage.Image], step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.stack(images)}, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            picture, texts = importlib.import_module(tracker.name).Image, args.validation_prompts
            pictures = {f"validation/{i}": picture(image, caption=texts[i]) for i, image in enumerate(images)}
            tracker.log(pictures, step=step)


def finish(args: ScriptArguments, run: Run, model: Module, pipeline, parts: list[Part]) -> None:
    """Writes the LoRA files, the gallery and, last of all, the card; then uploads them."""
    output_dir, facts = Path(args.output_dir), run_facts(args, run, parts)
    if facts["skipped steps"] == run.max_train_steps:
        raise SystemExit("no step had a finite loss and gradient: nothing was learned")
    write_bytes(output_dir / LORA_FILE, (output_dir / f"checkpoint-{run.max_train_steps}" / LORA_FILE).read_bytes())
    if comfyui := comfyui_state_dict(get_peft_model_state_dict(model)):
        write_tensors(output_dir / "comfyui" / f"{output_dir.resolve().name}.safetensors", comfyui)
    before, after = (draw_gallery(args, run, pipeline, model, lora) for lora in (False, True))
    log_images(args, run.accelerator, after, run.max_train_steps)
    write_card(args, run, before, after, facts)
    print(f"LoRA: {output_dir / LORA_FILE}, card: {output_dir / 'README.md'}; next: judge it with evaluate.py")
    if args.push_to_hub:
        if run.upload:
            run.upload.exception()  # waits; what follows replaces it, failed or not
        if theirs := earlier_card(args, on_hub=True):
            write_bytes(output_dir / "README.md", str(merge_cards(earlier_card(args), theirs)).encode())
        patterns = [LORA_FILE, "comfyui/*", "images/*", "README.md", "run.json", LOG_FILE]
        HfApi().upload_folder(repo_id=args.hub_model_id, folder_path=output_dir, allow_patterns=patterns)
        print(f"published: {HfApi().endpoint}/{args.hub_model_id}")


def run_facts(args: ScriptArguments, run: Run, parts: list[Part]) -> dict:
    """What the card states of the run. Times are sums over the steps: of all parts of an interrupted run."""
    device, on_gpu = run.accelerator.device, run.accelerator.device.type == "cuda"
    log = [json.loads(line) for line in Path(args.output_dir, LOG_FILE).read_text().splitlines()]
    hours = sum(line["step_time"] for line in log) / 3600
    process_hours = sum(line["step_time"] * line["processes"] for line in log) / 3600
    commit = re.search(r"@([0-9a-f]{40})/|$", parts[0].file)[1]  # of a dataset of the Hub
    return {
        "base": args.pretrained_model_name_or_path,
        "data": f"{args.dataset_name}, commit {commit or 'unknown'}, {run.settings['images']} {run.settings['labels']}",
        **describe(args, run)["facts"],
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}, warm-up {args.lr_warmup_steps} steps",
        "LoRA rank": args.rank,
        "batch": f"{run.rows_per_step} prompts x {run.images_per_row} images",
        "steps": run.max_train_steps,
        "skipped steps": sum("skipped" in line for line in log),
        "seed": args.seed,
        "time": f"{hours:.3g} h of training",
        "GPU hours": f"{process_hours:.3g}" if on_gpu else f"0, and {process_hours:.3g} of CPU processes",
        **({"price": f"{process_hours * args.gpu_hourly_cost:.2f}"} if args.gpu_hourly_cost else {}),
        "speed": f"{len(log) * run.rows_per_step * run.images_per_row / (3600 * hours or 1):.3g} images/s",
        "peak memory": f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if on_gpu else "not measured",
        "hardware": f"{run.accelerator.num_processes} x {torch.cuda.get_device_name(device) if on_gpu else 'CPU'}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft")),
    }


def write_card(args: ScriptArguments, run: Run, before: list, after: list, facts: dict) -> None:
    output_dir, widgets, about = Path(args.output_dir), [], describe(args, run)
    shutil.rmtree(output_dir / "images", ignore_errors=True)  # of a run with other validation prompts
    gallery = ["| prompt | base | with this LoRA |", "|---|---|---|"]
    for i, (prompt, base, tuned) in enumerate(zip(args.validation_prompts, before, after)):
        for file, image in ((f"{i}_base.png", base), (f"{i}.png", tuned)):
            image.save(content := BytesIO(), "PNG")
            write_bytes(output_dir / "images" / file, content.getvalue())
        widgets.append({"text": prompt, "output": {"url": f"images/{i}.png"}})
        cell = " ".join(prompt.split()).replace("|", "\\|")
        gallery.append(f"| {cell} | ![base](images/{i}_base.png) | ![LoRA](images/{i}.png) |")
    model, name = args.pretrained_model_name_or_path, output_dir.resolve().name
    front = {"library_name": "diffusers", **base_license(args), "widget": widgets}
    front["tags"] = ["text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", *about["tags"]]
    front["base_model"] = None if os.path.exists(model) else re.sub("^https://[^/]+/|/(blob|resolve)/.*", "", model)
    front["datasets"] = [name for name in about["datasets"] if not os.path.exists(name)] or None
    local = "output_dir cache_dir resume_from_checkpoint push_to_hub hub_model_id validation_prompts".split()
    command = ["accelerate", "launch", f"--num_processes={run.accelerator.num_processes}", Path(__file__).name]
    for spec in fields(args):
        value = getattr(args, spec.name)
        if value != spec.default and spec.name not in local:
            command += [f"--{spec.name}", *map(str, value if isinstance(value, list) else [value])]
    body = f"""# {name}

A LoRA for `{model}`, trained with `{args.loss_type}` on {about["method"]}

<Gallery />

Same prompts, same seeds:

{chr(10).join(gallery)}

## Use it

{about["usage"]}

## How it was made

```bash
{shlex.join(command)}
```

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in facts.items())}

Loss, margins, learning rate and speed of every step are in [{LOG_FILE}]({LOG_FILE}).
"""
    block = f"{CARD_BEGIN}\n{body.strip().replace('<!--', '<! --')}\n{CARD_END}\n"  # a prompt may hold a mark
    card, theirs = RepoCard(f"---\n{CardData(**front).to_yaml()}\n---\n\n{block}"), earlier_card(args)
    write_bytes(output_dir / "README.md", str(merge_cards(card, theirs) if theirs else card).encode())


def base_license(args: ScriptArguments) -> dict:
    """The licence of the base model, which its LoRA inherits."""
    try:
        card = RepoCard(file_of(args.pretrained_model_name_or_path, "README.md", args.revision).read_text())
    except Exception:  # no card, no network, a card with broken front matter: the user names the licence
        return {}
    found = {name: card.data[name] for name in ("license", "license_name", "license_link") if name in card.data}
    if "://" not in (file := found.get("license_link", "://")):  # of the base model's repository
        found["license_link"] = f"https://huggingface.co/{args.pretrained_model_name_or_path}/blob/main/{file}"
    return found


def earlier_card(args: ScriptArguments, on_hub: bool = False) -> RepoCard | None:
    """The card as people may have edited it, in the folder or on the Hub."""
    file = Path(args.output_dir, "README.md")
    exists = HfApi().file_exists(args.hub_model_id, file.name) if on_hub else file.exists()
    return RepoCard.load(args.hub_model_id if on_hub else file, ignore_metadata_errors=False) if exists else None


def merge_cards(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """This run's card with what people wrote into an earlier one: text outside the marks, most metadata."""
    licensed = "license" in theirs.data  # then name and link of this run's licence do not belong to it
    for name, value in mine.data.to_dict().items():
        lacks = name not in theirs.data and not (licensed and name.startswith("license_"))
        if lacks or name in ("base_model", "datasets", "widget"):
            theirs.data[name] = value
    marked = f"(.*)({re.escape(CARD_BEGIN)}.*?{re.escape(CARD_END)})(.*)"
    block, old = re.fullmatch(marked, mine.text, re.S)[2], re.fullmatch(marked, theirs.text, re.S)
    theirs.text = f"{old[1]}{block}{old[3]}" if old else f"{theirs.text.rstrip()}\n\n{block}\n"
    return theirs


# Arguments and files ------------------------------------------------------------------------------------------------
class ArgumentParser(TrlParser):  # ends every usage error in one line, and knows the metadata of `flag`
    group = None

    def add_argument(self, *names, limits=None, group=None, free=False, **options):
        self.group = self.add_argument_group(group) if group else self.group
        return (self.group.add_argument if self.group else super().add_argument)(*names, **options)

    def error(self, message: str):
        # argparse names both spellings of a flag: --lr_scheduler/--lr-scheduler.
        raise SystemExit(re.sub(r"^argument |(?<=\w)/--[\w-]+", "", " ".join(message.split())))


def parse_arguments(words: list[str] | None = None) -> ScriptArguments:
    """Parses and checks the command line. `--config file.yaml` adds flags, which the command line overrides."""
    words, layout = sys.argv[1:] if words is None else words, argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(ScriptArguments, allow_abbrev=False, description=__doc__, formatter_class=layout)
    parser.add_argument("--config", type=config_words, default=[], metavar="FILE", help="YAML file of flags.")
    config, _ = parser.parse_known_args(["--dataset_name", "", *words])  # the file may name the dataset
    arguments = vars(parser.parse_args([*config.config, *words]))
    args = ScriptArguments(**{name: value for name, value in arguments.items() if name != "config"})
    for spec in fields(args):
        value = getattr(args, spec.name)
        for wording, limit in spec.metadata["limits"].items():
            if None not in (value, limit) and not COMPARE[wording](value, limit):
                raise SystemExit(f"--{spec.name} {value}: must be {wording} {limit}")
        if isinstance(value, str) and value.startswith("~"):  # the shell leaves it in --flag=~/x, and YAML has none
            setattr(args, spec.name, os.path.expanduser(value))
        if spec.name in UNUSED_BY and value != spec.default and args.loss_type in UNUSED_BY[spec.name]:
            raise SystemExit(f"--{spec.name}: --loss_type {args.loss_type} does not use it: leave it out")
    if (args.resolution or 0) % RESOLUTION_MULTIPLE:
        raise SystemExit(f"--resolution {args.resolution}: must be a multiple of {RESOLUTION_MULTIPLE}")
    if args.report_to not in ("all", "none") and not importlib.util.find_spec(args.report_to):
        raise SystemExit(f"--report_to {args.report_to}: it is not installed: pip install {args.report_to}")
    return args


def config_words(file: str) -> list[str]:
    """The flags of a YAML file as words of a command line, so that argparse checks their types and choices too."""
    given = []
    # BaseLoader leaves every value as text, so `no` stays `no`. A single one stands behind "=": it may begin with "-".
    for name, value in dict(yaml.load(Path(file).expanduser().read_text(), Loader=yaml.BaseLoader) or {}).items():
        words = value if isinstance(value, list) else [value]
        if words and value not in ("", "~", "null", "Null", "NULL"):
            given += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    return given


def seeded_generator(*key) -> np.random.Generator:
    """A NumPy generator that is a function of the key alone, on every machine and in every process."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def content_key(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_bytes(file, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a whole file, or nothing: a killed run leaves no half file under this name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.urandom(4).hex()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the training there is nothing to save
    main(parse_arguments())
