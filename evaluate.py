# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate", "datasets", "diffusers", "ftfy", "huggingface_hub", "matplotlib", "numpy", "peft", "pillow",
#     "protobuf", "pyarrow", "pyyaml", "safetensors", "scipy", "sentencepiece", "torch", "torchvision", "tqdm",
#     "transformers", "trl",
# ]
# ///
"""Compares models on the same prompts and seeds: reward metrics, win rates, intervals, pictures. A model is the base, a
LoRA, a tuned UNet or transformer, another pipeline, or images that exist.

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=outputs/rankdpo-sdxl dpo=user/dpo-lora \
        --prompts prompts.txt --max_prompts 500 --metrics hpsv2.1 imagereward my_rewards.py:sharpness \
        --output_dir outputs/evaluation

Against published models, with lifts over one of them:

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=outputs/rankdpo-sdxl --models dpo=unet:mhdang/dpo-sdxl-text2image-v1 --baseline dpo \
        --prompts parti --output_dir outputs/against-dpo

How far does a run get with how much data? This evaluates every checkpoint of two runs:

    python evaluate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dtype float16 \
        --eval_checkpoints qsd=outputs/dpo-qsd-sd15 random=outputs/dpo-sd15 --prompts prompts.txt \
        --output_dir outputs/curves

Writes `results.json`, `results.md`, `grid.png`, and for checkpoints `curves.png`: the metrics over the pairs or prompts
seen. Each metric's mean comes with its lift over the baseline and the lift's 95 % interval. The interval is a paired
bootstrap over prompts, because all models draw the same prompts from the same noise. After a crash, run the same
command again: it keeps finished images and scores. With `accelerate launch`, all processes draw and score.

This also writes the results into the LoRA's card on the Hub (table, picture and `model-index`):

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=user/rankdpo-sdxl --prompts prompts.txt --output_dir outputs/evaluation --push_to_hub
"""

import argparse
import ast
import csv
import errno
import fcntl
import gc
import hashlib
import html
import importlib.util
import inspect
import itertools
import json
import logging
import math
import operator
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache, partial
from io import BytesIO, StringIO
from pathlib import Path
from types import UnionType
from typing import IO, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load ends without a traceback
# bitsandbytes warns at every start that an optional kernel is missing, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from accelerate import PartialState
from datasets import config as datasets_config
from datasets import load_dataset, load_dataset_builder
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import CardData, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import get_session, parse_ratelimit_headers
from matplotlib.figure import Figure
from PIL import Image as PILImage
from PIL import ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, pad, resize, to_tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging
from trl import TrlParser


# diffusers warns about every text encoder that a LoRA does not train. All LoRAs of these trainers leave them alone.
logging.getLogger("diffusers.loaders.lora_base").addFilter(lambda record: "No LoRA keys" not in record.getMessage())

BASE = "base"
# Keys of results.json that no model may have.
RESERVED = ("n_prompts", "n_images", "baseline", "settings", "checkpoints", "seeds", "pairwise", "missing_images")
NETWORKS = ("unet", "transformer")  # components that --models can replace
OWN_FILES = ("images", "scores", "results.json", "results.md", "grid.png", "curves.png")  # of an output folder
STAGES = ("draw", "score", "report")
SCORES_PER_FILE = 64  # a crash loses at most these
FEW_PROMPTS = 25  # an interval over fewer prompts carries a warning
# What results.json adds to a metric's name: no metric may end so.
ENDINGS = ("_lift", "_win_rate", "_ci95", "_warning", "_category_mean", "_by_category", "_official", "_trained_on")
ENDINGS += ("_seed_means", "_seed_sd")
# What decides whether a network fits into another's place.
NETWORK_SHAPE = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type", "num_layers")
DRAWING_FLAGS = ("num_images_per_prompt", "num_inference_steps", "guidance_scale", "resolution")
LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FACTS = ()  # this script replaces no metadata of a card; it adds results to model-index
CARD_BEGIN = "<!-- evaluate.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what evaluate.py wrote. -->"


# Models that one 24 GB GPU carries: those of recipes/synpic_24gb.yaml.
DEFAULT_METRICS = ("hpsv2.1", "pickscore", "imagereward", "aesthetic", "clipscore")


# Copied from build_synpic.REWARD_MODELS
REWARD_MODELS = {
    "hpsv2": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv2.1": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "mps": ("RE-N-Y/mpsv1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "imagereward": ("zai-org/ImageReward", "google-bert/bert-base-uncased"),
    "aesthetic": ("shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", None),
    "clipscore": ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    "vqascore": ("zhiqiulin/clip-flant5-xxl", "google/flan-t5-xxl"),
    # Variants, under names of their own: HPSv2 with an antialiased resize, MPS with the threshold of its model class,
    # VQAScore's question to another model.
    "hpsv2_antialias": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv2.1_antialias": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "mps_t0.01": ("RE-N-Y/mpsv1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "vqascore_vlm": ("Qwen/Qwen2.5-VL-7B-Instruct", None),
}


# Copied from train_rankdpo_sdxl.flag
def flag(default, help: str, **metadata):
    """A field with its help, its range (see RANGES), `may_change`: whether a resumed run may set it differently, and
    `group`: the title of the flags from here on in --help."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, **metadata})


@dataclass
class ScriptArguments:
    pretrained_model_name_or_path: str = flag(
        "stabilityai/stable-diffusion-xl-base-1.0", "Base: Hub id or folder.", group="Models"
    )
    revision: str | None = flag(None, "Revision of the model on the Hub.")
    variant: str | None = flag(None, "Variant of the model's files, e.g. fp16.")
    loras: list[str] = flag(list, "name=folder or name=Hub id of each LoRA of the base.")
    models: list[str] = flag(
        list, "name=pipeline, or name=unet:network and name=transformer:network, in the base's place; folder or Hub id."
    )
    images: list[str] = flag(list, "name=TEMPLATE of pictures that exist, e.g. a={index:05d}/samples/{number:04d}.png.")
    allow_missing: bool = flag(False, "Leave out pictures of --images that are missing, and count them.")
    eval_checkpoints: list[str] = flag(list, "name=output_dir of training runs. Plots all checkpoints as curves.")
    baseline: str = flag(BASE, "The model that lifts and win rates refer to.")
    dtype: Literal["float32", "float16", "bfloat16"] = flag("float32", "Type of the models' weights.")
    prompts: str | None = flag(
        None, "File, URL, dataset's folder or Hub id, or the name of a set. Required.", group="Prompts"
    )
    prompt_column: str | None = flag(None, "Column of the prompts. Default: prompt, or the named set's.")
    prompt_split: str | None = flag(None, "Split of a dataset. Default: train, or the named set's.")
    category_column: str | None = flag(None, "Column to break the results down by. Default: the named set's.")
    max_prompts: int | None = flag(None, "Use the first N distinct prompts.", min=1)
    num_images_per_prompt: int = flag(1, "Images per prompt and model, each with its own seed.", min=1, group="Drawing")
    num_inference_steps: int = flag(50, "Denoising steps.", min=1)
    guidance_scale: float = flag(5.0, "Scale of classifier-free guidance.")
    resolution: int | None = flag(None, "Pixels per side. Default: the model's own.", min=8, max=8192)
    max_sequence_length: int | None = flag(None, "T5 tokens of a prompt. Default: the pipeline's own.", min=1)
    use_text_encoder_3: bool = flag(True, "SD3's T5. false: draw without it, as for a LoRA trained without it.")
    batch_size: int = flag(4, "Images drawn together.", min=1)
    seed: int = flag(0, "Seeds the images and the bootstrap.", min=0, max=2**32 - 1)
    image_seeds: Literal["own", "counted"] = flag(
        "own", "own: every image has a seed of its own. counted: image n of every prompt has --seed + n."
    )
    metrics: list[str] = flag(
        lambda: list(DEFAULT_METRICS),
        f"{', '.join(REWARD_MODELS)}, each also as name=checkpoint; file.py:function or file.py:Class,key=value.",
        group="Metrics and output",
    )
    reward_batch_size: int = flag(32, "Images scored together.", min=1)
    rewards_at_once: int = flag(1, "Reward models held at once: an image is read and decoded once for them.", min=1)
    output_dir: str = flag("outputs/evaluation", "Folder for images, scores, results and report.")
    stages: list[str] = flag(lambda: list(STAGES), "Stages to run.", choices=STAGES)
    task_index: str = flag("auto", "Which of --num_tasks this is, from 0. auto: the scheduler's number.")
    num_tasks: str = flag("auto", "Draw and score as one of N independent tasks. auto: the scheduler's, else 1.")
    grid_rows: int = flag(8, "Prompts in the picture.", min=1)
    push_to_hub: bool = flag(False, "Upload results.json, grid.png and card to the Hub.")
    hub_model_id: str | None = flag(None, "Repository of the one LoRA. Default: each LoRA's, where it is a Hub id.")
    hub_private_repo: bool = flag(False, "Make a new repository private.")

    def __post_init__(self):
        check_ranges(self)
        if not self.prompts:
            raise SystemExit(f"--prompts is missing: a file, a URL, a dataset, or one of {', '.join(PROMPT_SETS)}")
        complete_prompt_flags(self)
        complete_task_flags(self, last=("report",))
        if self.resolution and self.resolution % 8:
            raise SystemExit(f"--resolution {self.resolution}: must be a multiple of 8")


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def bootstrap_means(values: np.ndarray, seed: int | list[int], resamples: int = 10_000) -> np.ndarray:
    """Means over resampled prompts. One value per prompt: the images of a prompt are not independent of each other.

    Args:
        values: (n_prompts, m), one column per figure; NaN where a figure does not apply.

    Returns:
        (resamples, m).
    """
    rng, n, block = np.random.default_rng(seed), len(values), 500
    known, means = np.isfinite(values), np.empty((resamples, values.shape[1]))
    filled = np.where(known, values, 0.0)
    for start in range(0, resamples, block):
        drawn = rng.integers(n, size=(block, n)) + n * np.arange(block)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=block * n).reshape(block, n).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means[start : start + block] = (counts @ filled) / (counts @ known)
    return means


def estimate(columns: dict, strata: list[np.ndarray], seed: int) -> dict:
    """The mean of each figure over the strata's means, with its 95 % percentile interval. Prompts are resampled with
    replacement within each stratum; all figures see the same draws, so differences are paired.

    Args:
        columns: figure → float64 (n_prompts,); strata: positions of the prompts of each; one for a plain mean.

    Returns:
        figure → {"mean", "ci95", and "warning" where the interval says little}.
    """
    values = np.stack(list(columns.values()), axis=1)
    total = used = 0.0  # a figure that applies to no prompt of a stratum is left out of the mean over strata
    for number, chosen in enumerate(strata):
        draws = bootstrap_means(values[chosen], seed if number == 0 else [seed, number])
        total, used = total + np.nan_to_num(draws), used + np.isfinite(draws)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # nothing applies: NaN
        lows, highs = np.nanpercentile(total / used, [2.5, 97.5], axis=0)
    means = nanmean(np.stack([nanmean(values[chosen]) for chosen in strata]))
    counts = np.array([np.isfinite(values[chosen]).sum(axis=0) for chosen in strata])
    fewest = np.where(counts > 0, counts, len(values)).min(axis=0) * (counts > 0).any(axis=0)
    found = {}
    for figure, mean, low, high, count in zip(columns, means, lows, highs, fewest.tolist()):
        found[figure] = {"mean": float(mean), "ci95": (float(low), float(high))}
        if count < FEW_PROMPTS:
            where = "a category with " if len(strata) > 1 else ""
            found[figure]["warning"] = f"{where}only {count} prompt{'s' * (count != 1)}"
        elif high - low <= 1e-9 * max(abs(low), abs(high)):
            found[figure]["warning"] = "an interval of zero width"
    return found


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is left."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def compare(scores: np.ndarray, baseline: np.ndarray) -> dict[str, np.ndarray]:
    """Lift and win rate of a model over another, image by image, on the same prompts and seeds.

    Args:
        scores, baseline: (n_seeds, n_prompts, n_images); the first axis is the seeds of the training.

    Returns:
        `lift` and `win_rate` (share of images that score higher; a tie counts half), each (n_prompts,).
    """
    ours, theirs = scores[:, None], baseline[None]
    # The same picture, scored in another batch, differs in the last digits.
    tie = np.abs(ours - theirs) <= 1e-6 * np.maximum(np.abs(ours), np.abs(theirs))
    lift, wins = np.where(tie, 0.0, ours - theirs), np.where(tie, 0.5, (ours > theirs).astype(np.float64))
    wins[np.isnan(lift)] = np.nan
    return {"lift": per_prompt(lift.mean(axis=1)), "win_rate": per_prompt(wins.mean(axis=1))}


def per_prompt(scores: np.ndarray) -> np.ndarray:
    """(n_seeds, n_prompts, n_images) → mean of each prompt, (n_prompts,)."""
    return nanmean(np.moveaxis(scores.mean(axis=0), 1, 0))


def summarize(
    results: dict, categories: list[str] | None, baseline: str, compared: list[str], seed: int
) -> tuple[dict, dict]:
    """All figures of all models, and of the `compared` models against each other.

    Args:
        results: metric → model → (n_seeds, n_prompts, n_images).

    Returns:
        model → {metric: mean, metric_ci95, metric_lift, metric_lift_ci95, …, metric_category_mean…, metric_by_category:
        {category: {n_prompts, mean, lift, …}}}; metric → model → other → {lift, lift_ci95, win_rate, …}.
    """
    summary, pairwise = {}, {}
    for metric, by_model in results.items():
        columns = {(name, "mean"): per_prompt(scores) for name, scores in by_model.items()}
        for name, other in itertools.permutations(by_model, 2):
            if other == baseline or {name, other} <= set(compared):
                values = compare(by_model[name], by_model[other])
                columns |= {(name, other, figure): value for figure, value in values.items()}
        everything = np.arange(len(next(iter(columns.values()))))
        strata = {c: np.flatnonzero(np.array(categories) == c) for c in dict.fromkeys(categories or ())}
        figures = estimate(columns, [everything], seed)
        parts = {category: estimate(columns, [chosen], seed) for category, chosen in strata.items()}
        macro = estimate(columns, list(strata.values()), seed) if strata else {}
        for name, scores in by_model.items():
            entry = summary.setdefault(name, {})
            entry |= flatten(metric, figures, name, baseline)
            if len(scores) > 1:
                entry[f"{metric}_seed_means"] = [float(nanmean(per_prompt(one[None]))) for one in scores]
                entry[f"{metric}_seed_sd"] = float(np.std(entry[f"{metric}_seed_means"], ddof=1))
            if strata:
                entry |= flatten(f"{metric}_category_mean", macro, name, baseline)
                by_category = entry[f"{metric}_by_category"] = {}
                for category, part in parts.items():
                    figure = part[name, "mean"]
                    own = {key if key == "mean" else f"mean_{key}": value for key, value in figure.items()}
                    size = {"n_prompts": len(strata[category])}
                    by_category[category] = {**size, **own, **flatten("", part, name, baseline)}
        pairwise[metric] = {
            name: {other: flatten("", figures, name, other) for other in compared if other != name} for name in compared
        }
    return summary, pairwise


def flatten(metric: str, figures: dict, name: str, other: str) -> dict:
    """A model's figures under flat names: METRIC, METRIC_ci95, METRIC_lift, METRIC_lift_ci95, METRIC_win_rate, …; with
    an empty `metric` only those against the other model."""
    keys = {metric: (name, "mean")} if metric else {}
    if name != other:
        keys |= {f"{metric}_{figure}".lstrip("_"): (name, other, figure) for figure in ("lift", "win_rate")}
    flat = {}
    for label, key in keys.items():
        flat |= {label if part == "mean" else f"{label}_{part}": value for part, value in figures[key].items()}
    return flat


def hpsv2_figure(scores: np.ndarray, categories: list[str]) -> dict:
    """HPSv2's own report: for each style the mean and the standard deviation of ten chunks' means, times 100.

    Args:
        scores: (n_prompts, n_images), raw cosines in the benchmark's order; categories: the style of each prompt.
    """
    figure = {}
    for style in dict.fromkeys(categories):
        chosen = scores[np.array(categories) == style].mean(axis=1)
        chunks = [chunk.mean() * 100 for chunk in np.array_split(chosen, 10)]
        figure[style] = {"mean": float(np.mean(chunks)), "std": float(np.std(chunks))}
    return {**figure, "overall": float(np.mean([style["mean"] for style in figure.values()]))}


# ----------------------------------------------------------------------------------------------------------------------
# Stages: draw, score, report
# ----------------------------------------------------------------------------------------------------------------------


def draw(args: ScriptArguments, prompts: list[str], models: dict, state: PartialState) -> None:
    """Draws the missing images, model by model. Loads a pipeline once for all models that follow each other in it."""
    output_dir, loaded = Path(args.output_dir), {}
    shards = image_shards(args, len(prompts))[args.task_index :: args.num_tasks]
    for name, model in models.items():
        if model["kind"] == "images":
            continue
        write_settings(output_dir / "images" / name, model["settings"])
        # Images belong to processes by number, not by what is missing. A damaged one is drawn again.
        own = list(itertools.chain(*shards))[state.process_index :: state.num_processes]
        missing = [item for item in own if not is_whole_png(image_file(output_dir, name, *item))]
        if not missing:
            continue
        source = model["source"] if model["kind"] == "pipeline" else args.pretrained_model_name_or_path
        if source not in loaded:
            loaded.clear()
            free_memory()
            loaded[source] = load_pipeline(args, source, state.device)
        options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        if args.resolution:
            options |= {"height": args.resolution, "width": args.resolution}
        if args.max_sequence_length and takes_sequence_length(loaded[source]):
            options["max_sequence_length"] = args.max_sequence_length
        hidden = not state.is_local_main_process
        with (
            fitted(args, name, model, loaded[source]) as pipeline,
            progress_bar(total=len(missing), desc=f"draw {name}", unit="image", disable=hidden) as progress,
        ):
            size, draw_batch = args.batch_size, partial(draw_images, args, prompts, name, pipeline, options)
            for batch in batches(missing, args.batch_size):
                images, size = in_fitting_parts(draw_batch, batch, size, name)
                for item, image in zip(batch, images):
                    save_picture(image, image_file(output_dir, name, *item))
                progress.update(len(batch))
                stop_if_asked(f"all images drawn so far are in {output_dir}: the same command goes on")
    loaded.clear()
    free_memory()
    state.wait_for_everyone()


def draw_images(args: ScriptArguments, prompts: list[str], name: str, pipeline, options: dict, batch: list) -> list:
    """The images of these (prompt, number)."""
    seeds = [image_seed(args, prompts[i], n) for i, n in batch]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    try:
        return pipeline(prompt=[prompts[i] for i, _ in batch], generator=generators, **options).images
    except (TypeError, ValueError) as error:  # the pipeline's own check of its settings
        raise SystemExit(f"{name}: cannot draw: {one_line(error)}") from None


def score(args: ScriptArguments, rows: list[dict], models: dict, state: PartialState) -> tuple[dict, dict]:
    """Scores every model's images: metric → model → float64 (n_prompts, num_images_per_prompt).

    A metric that returns several values becomes several metrics, METRIC_KEY. NaN: a value does not apply to an image,
    or the image is missing. Also returns the names of each metric's values: metric → key → METRIC_KEY.
    """
    results, keys, unknown = {}, {}, np.full((len(rows), args.num_images_per_prompt), np.nan)
    found = {}
    for metrics in reward_groups(args.metrics, args.rewards_at_once):
        found |= score_metrics(args, metrics, rows, models, state)
    for metric in args.metrics if args.num_tasks == 1 else ():
        column, scores = reward_name(metric), found[metric]
        names = {key: column + key for by_key in scores.values() for key in by_key}
        if not names or results.keys() & names.values():
            problem = "gives a metric that another one gives, too" if names else "gives no values"
            raise SystemExit(f"metric {column}: {problem}")
        check_metric_names(names.values())
        for key, name in names.items():
            results[name] = {model: by_key.get(key, unknown) for model, by_key in scores.items()}
        keys[metric] = {key.removeprefix("_"): name for key, name in names.items()}
    return results, keys


def score_metrics(
    args: ScriptArguments, metrics: list[str], rows: list[dict], models: dict, state: PartialState
) -> dict:
    """Metrics that are held at once, on all processes.

    Returns:
        metric → model → suffix of the metric's name → float64 (n_prompts, num_images_per_prompt); of one of several
        tasks, nothing.
    """
    shards, settings, scores, missing = image_shards(args, len(rows)), {}, {}, {}
    for metric in metrics:
        depends = {"metric": reward_settings(metric)}
        if takes_rows(metric):
            depends["rows"] = short_hash(json.dumps(rows, sort_keys=True, default=str))
        settings[metric] = {name: {**depends, **model["settings"]} for name, model in models.items()}
        scores[metric] = {name: read_scores(args, reward_name(metric), name, settings[metric][name]) for name in models}
        missing[metric] = [name for name in models if scores[metric][name] is None]
    state.wait_for_everyone()  # no process writes before all have looked
    # Files belong to processes by number, not by what is missing. Their size does not depend on the processes.
    own = range(args.task_index, len(shards), args.num_tasks)
    names = [name for name in models if any(name in lacking for lacking in missing.values())]
    jobs = list(itertools.product(names, own))[state.process_index :: state.num_processes]
    jobs = [(metric, name, number) for name, number in jobs for metric in metrics if name in missing[metric]]
    hidden, rewards = not state.is_local_main_process or not jobs, {}
    counts = [count_pictures(models[name], shards[number]) for _, name, number in jobs]
    label = " ".join(map(reward_name, metrics))
    with held_at_once(metrics), progress_bar(total=sum(counts), desc=label, unit="image", disable=hidden) as progress:
        opened = (None, None)
        for (metric, name, number), count in zip(jobs, counts):
            file = scores_file(args, reward_name(metric), name, number)
            if stored_scores(file, settings[metric][name]) is not None:
                progress.update(count)
                continue
            if "score" not in args.stages:
                raise SystemExit(f"{file} is missing: run the stages draw and score first")
            if metric not in rewards:
                rewards[metric] = load_reward_model(metric, state.device, batch_size=args.reward_batch_size)
                rewards[metric].progress = progress
            if opened[0] != (name, number):  # opened, and decoded by the first metric, once for all
                opened = (name, number), open_pictures(args, models[name], name, shards[number])
            values = score_shard(rewards[metric], rows, name, shards[number], opened[1])
            write_scores(file, settings[metric][name], values)
    del rewards, opened
    free_memory()
    state.wait_for_everyone()
    if args.num_tasks > 1:  # other tasks have the other parts
        return {}
    if state.is_main_process:
        for metric in metrics:
            for name in missing[metric]:
                merge_scores(args, reward_name(metric), name, settings[metric][name], len(rows), len(shards))
    state.wait_for_everyone()
    for metric in metrics:
        for name in missing[metric]:
            scores[metric][name] = read_scores(args, reward_name(metric), name, settings[metric][name])
    return scores


def check_metric_names(names: list[str]) -> None:
    for name in names:
        if name.endswith(ENDINGS):
            ending = max(filter(name.endswith, ENDINGS), key=len)
            raise SystemExit(f"metric {name}: a name must not end in {ending}, which results.json uses: rename it")
        if len(name.encode()) > 200:  # it names a folder
            raise SystemExit(f"metric {name[:60]}…: its name, with the settings, is longer than 200 letters")


def report(
    args: ScriptArguments, results: dict, keys: dict, rows: list[dict], categories: list[str] | None, models: dict
) -> tuple[dict, str]:
    """Writes the results, the table and the pictures. Returns the content of results.json and the table."""
    output_dir, metrics, prompts = Path(args.output_dir), list(results), [row["prompt"] for row in rows]
    checkpoints = {name: {"run": m["run"], "seen": m["seen"]} for name, m in models.items() if "run" in m}
    groups, compared, pictured = training_seeds(models), *shown_models(models)
    stacked = {metric: stack_seeds(by_model, groups) for metric, by_model in results.items()}
    summary, pairwise = summarize(stacked, categories, args.baseline, compared, args.seed)
    for name, entry in summary.items():
        trained_on = {reward for member in groups.get(name, [name]) for reward in models[member].get("trained_on", ())}
        entry |= {f"{metric}_trained_on": True for metric in metrics if metric in trained_on}
    for metric in args.metrics:
        for name in models:
            scores = {key: results[value][name] for key, value in keys[metric].items()}
            if figures := official_figures(args, metric, rows, categories, scores):
                summary[name][f"{reward_name(metric)}_official"] = figures
    missing = {name: model["missing"] for name, model in models.items() if model.get("missing")}
    record = {
        "n_prompts": len(prompts),
        "n_images": len(prompts) * args.num_images_per_prompt,
        "baseline": args.baseline,
        "settings": report_settings(args, prompts, models),
        **summary,
        "pairwise": pairwise,
        **({"seeds": groups} if groups else {}),
        **({"checkpoints": checkpoints} if checkpoints else {}),
        **({"missing_images": missing} if missing else {}),
    }
    files = ["results.json", "results.md", "grid.png"]
    if checkpoints:
        draw_curves(summary, checkpoints, metrics, args.baseline, output_dir / "curves.png")
        files.append("curves.png")
    table = markdown_report(record, summary, metrics, compared)
    write_text(output_dir / "results.json", json.dumps(without_nan(record), indent=2) + "\n")
    write_text(output_dir / "results.md", table)
    save_picture(grid_picture(args, prompts, models, pictured), output_dir / "grid.png")
    print(table)
    print(", ".join(str(output_dir / file) for file in files))
    return record, table


def main(args: ScriptArguments) -> None:
    diffusers_logging.disable_progress_bar()  # of loading pipelines
    state = make_state()

    # These checks find what is wrong with flags, files and folders before a model is loaded.
    check_output_dir(args)
    check_rewards(args.metrics)
    check_metric_names([reward_name(metric) for metric in args.metrics])
    keep = (args.category_column,) if args.category_column else ()
    whole_rows = any(takes_rows(metric) for metric in args.metrics)
    whole_rows |= any("{row[" in template for template in args.images)
    source = (args.prompts, args.prompt_column, args.prompt_split, args.max_prompts)
    rows, places = read_prompts(*source, keep, whole_rows)
    with state.local_main_process_first():  # one process of a machine downloads
        prepare_metrics(args.metrics, rows, weights="score" in args.stages)
    prompts = [row["prompt"] for row in rows]
    categories = [str(row[args.category_column]) for row in rows] if args.category_column else None
    models = read_models(args)
    if args.baseline not in (names := {**models, **training_seeds(models)}):
        raise SystemExit(f"--baseline {args.baseline}: no such model; the models are {', '.join(names)}")
    for name, model in models.items():
        model["settings"] = image_settings(args, rows, places, categories, model)
        check_settings(Path(args.output_dir, "images", name), model["settings"], f"images of {name}")
    state.wait_for_everyone()  # no process writes before all have checked
    repositories = hub_repositories(args, models) if args.push_to_hub and "report" in args.stages else {}
    if state.is_main_process:  # a wrong token or name fails now, not after the work
        for name, repo_id in repositories.items():
            repositories[name] = create_repo(repo_id, "model", args.hub_private_repo)
        if args.num_tasks == 1:  # else they may be another task's
            remove_temporary_files(Path(args.output_dir))
    state.wait_for_everyone()

    if "draw" in args.stages:
        draw(args, prompts, models, state)
    if {"score", "report"} & set(args.stages):
        results, keys = score(args, rows, models, state)
    if state.is_main_process and args.num_tasks > 1:
        last = "--num_tasks 1 --stages report"
        print(f"task {args.task_index} of {args.num_tasks} is done. After all of them: the same with {last}")
    if state.is_main_process and "report" in args.stages:
        record, table = report(args, results, keys, rows, categories, models)
        for name, repo_id in repositories.items():
            publish(args, repo_id, results_card(args, name, repo_id, record, table))
    state.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------------
# Models and images
# ----------------------------------------------------------------------------------------------------------------------


def check_output_dir(args: ScriptArguments) -> None:
    """Exits with one line if the folder holds something else, e.g. a dataset: its grid.png would be replaced."""
    folder = Path(args.output_dir)
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if others := [name for name in names if name not in OWN_FILES]:
        raise SystemExit(f"--output_dir {folder} holds other files ({others[0]}): choose another folder")


def read_models(args: ScriptArguments) -> dict[str, dict]:
    """The models to compare; those that share a pipeline follow each other.

    Returns:
        name → {"kind": base, lora, network, pipeline or images; "source": folder, Hub id or template; "file" of a LoRA,
        and "trained_on", the rewards that ranked its training data; "run" of a checkpoint, and "seen", the pairs or
        prompts that the run had seen; "part" and "subfolder" of a network}.
    """
    models, networks = {}, [item for item in args.models if is_network(item)]
    if args.baseline == BASE or args.loras or args.eval_checkpoints or networks:
        base = args.pretrained_model_name_or_path
        index, _ = read_model_config("--pretrained_model_name_or_path", base, revision=args.revision)
        models[BASE] = {"kind": "base", "source": base}
        text_to_image_options(f"--pretrained_model_name_or_path {base}", index.get("_class_name", "folder"))
    for item in args.loras:
        name, path = named_path("--loras", item, models)
        if not os.path.isdir(path) and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise SystemExit(f"--loras {item}: there is no folder {path}, nor can it be a repository on the Hub")
        try:
            weights, record = check_lora(file_of(path, LORA_FILE)), training_record(path)
            if record.get("finished", {}).get("files", {}).get(LORA_FILE, file_digest(weights)) != file_digest(weights):
                raise ValueError("it is not the LoRA that its run.json names: it is damaged, or was replaced")
            models[name] = {"kind": "lora", "source": path, "file": weights, "trained_on": record.get("rewards", [])}
        except Exception as error:
            raise SystemExit(f"--loras {item}: cannot be read: {one_line(error)}") from None
    for item in args.eval_checkpoints:
        models |= read_checkpoints(item, models)
    for item in networks:
        name, source = named_path("--models", item, models)
        models[name] = {"kind": "network", **find_network(args, index, item, *source.split(":", 1))}
    for item in args.models:
        if item not in networks:
            name, source = named_path("--models", item, models)
            config, file = read_model_config(f"--models {name}:", source)
            text_to_image_options(f"--models {name}: {source}", config.get("_class_name", "folder"))
            models[name] = {"kind": "pipeline", "source": source, "commit": commit_of(file)}
    for item in args.images:
        name, template = named_path("--images", item, models)
        models[name] = {"kind": "images", "source": template}
    if BASE in models:
        check_lora_fits(args, index, models)
    return models


def read_checkpoints(item: str, models: dict) -> dict[str, dict]:
    """The models of one of --eval_checkpoints: NAME@STEP of every checkpoint."""
    name, path = named_path("--eval_checkpoints", item, models, seeds=False)
    found = {}
    try:
        per_step = read_json(Path(path, "run.json"), sealed=False)["global_batch_size"]
        matches = [re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in Path(path).iterdir()]
        for step in sorted(int(match[1]) for match in matches if match):
            folder = Path(path, f"checkpoint-{step}")
            digests = read_json(folder / "checkpoint.json").get("files", {})
            if digests.get(LORA_FILE, file_digest(folder / LORA_FILE)) != file_digest(folder / LORA_FILE):
                raise Damaged(folder / LORA_FILE)
            checkpoint = {"kind": "lora", "source": str(folder), "file": check_lora(folder / LORA_FILE)}
            place = {"run": name, "seen": step * per_step}
            found[f"{name}@{step}"] = {**checkpoint, **place, "trained_on": training_record(path).get("rewards", [])}
        if not found:
            raise FileNotFoundError("no checkpoint in it")
    except Exception as error:
        raise SystemExit(f"--eval_checkpoints {item}: not a training run's folder: {one_line(error)}") from None
    return found


def is_network(item: str) -> bool:
    return item.partition("=")[2].startswith(tuple(f"{part}:" for part in NETWORKS))


def read_model_config(
    flag: str, model: str, file: str = "model_index.json", revision: str | None = None
) -> tuple[dict, Path]:
    """A configuration of a model, and where it lies; exits with one line if it cannot be read."""
    try:
        path = file_of(model, file, revision=revision)
        return json.loads(path.read_text()), path
    except Exception as error:
        raise SystemExit(f"{flag} {model}: not a diffusers model: {one_line(error)}") from None


def commit_of(file: Path) -> str | None:
    """The commit of a file from the Hub."""
    match = re.search(r"snapshots/([0-9a-f]{40})/", file.as_posix())
    return match and match[1]


def find_network(args: ScriptArguments, index: dict, item: str, part: str, source: str) -> dict:
    """Where a network's files lie: in a subfolder of its component's name, as trainers write it, or at the top. Exits
    with one line unless it fits into the place of the base's component. `index`: the base's model_index.json."""
    base, where = args.pretrained_model_name_or_path, f"--models {item}:"
    if part not in index:
        raise SystemExit(f"{where} the base, a {index.get('_class_name')}, has no {part}")
    wanted, _ = read_model_config("--pretrained_model_name_or_path", base, f"{part}/config.json", args.revision)
    problems = []
    for subfolder in (part, ""):
        try:
            found, file = read_model_config(where, source, f"{subfolder}/config.json".lstrip("/"))
        except SystemExit as error:
            problems.append(error)
            continue
        for key in ("_class_name", *NETWORK_SHAPE):
            if found.get(key) != wanted.get(key):
                raise SystemExit(f"{where} its {key} is {found.get(key)}, that of the base's {part} {wanted.get(key)}")
        if os.path.isdir(source) and not any(file.parent.glob("*.safetensors")) and not any(file.parent.glob("*.bin")):
            raise SystemExit(f"{where} {file.parent} holds no weights")
        return {"source": source, "part": part, "subfolder": subfolder, "commit": commit_of(file)}
    raise problems[0]


def named_path(flag: str, item: str, models: dict, seeds: bool = True) -> tuple[str, str]:
    """Splits name=path and checks the name; `name@seed` is one of several trainings of a model."""
    name, _, path = item.partition("=")
    if not path or len(name) > 100 or not re.fullmatch(r"\w[\w.-]*" + r"(@\w[\w.-]*)?" * seeds, name):
        problem = "must be name=folder or name=Hub id; name of letters, digits, '.', '_', '-', at most 100"
        raise SystemExit(f"{flag} {item}: {problem}" + ", or name@seed" * seeds)
    root, taken = name.partition("@")[0], {*RESERVED, *models}
    for other, model in models.items():  # a run and several trainings have a name of their own
        if "run" in model or name == root:
            taken.add(model.get("run", other.partition("@")[0]))
    if name in taken or root in taken:
        raise SystemExit(f"{flag} {item}: the name {name if name in taken else root!r} is taken")
    return name, path


def training_seeds(models: dict) -> dict[str, list[str]]:
    """Models that were trained several times: name → its name@seed."""
    groups = {}
    for name, model in models.items():
        if "@" in name and "run" not in model:
            groups.setdefault(name.partition("@")[0], []).append(name)
    return {group: names for group, names in groups.items() if len(names) > 1}


def shown_models(models: dict) -> tuple[list[str], list[str]]:
    """The models that are compared with each other: of a run its last checkpoint, of several trainings their group. And
    those in the picture: of several trainings the first."""
    last = {model["run"]: name for name, model in models.items() if "run" in model}  # steps are in order
    names = [name for name, model in models.items() if "run" not in model or name in last.values()]
    group_of = {name: group for group, members in training_seeds(models).items() for name in members}
    compared = list(dict.fromkeys(group_of.get(name, name) for name in names))
    first = {group_of.get(name, name): name for name in reversed(names)}
    return compared, [first[name] for name in compared]


def stack_seeds(by_model: dict, groups: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """model → (n_seeds, n_prompts, n_images): every model alone, and each group as one, in front."""
    together = {group: np.stack([by_model[name] for name in names]) for group, names in groups.items()}
    return together | {name: scores[None] for name, scores in by_model.items()}


def training_record(path: str) -> dict:
    """The run.json of a LoRA that one of the trainers made, else {}."""
    try:
        file = file_of(path, "run.json")
    except Exception:  # a LoRA of another trainer
        return {}
    return read_json(file, sealed=False)


def check_lora(file: Path) -> str:
    """The path of a LoRA's weights. Raises an error if it holds none."""
    if not file.is_file():
        raise FileNotFoundError(f"no {LORA_FILE} in it")
    weights = load_file(file)
    if not any("lora" in key for key in weights):
        raise ValueError(f"{file} holds no LoRA")
    for first, second in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        ends = [{key.replace(end, "") for key in weights if end in key} for end in (first, second)]
        if alone := sorted(ends[0] ^ ends[1]):
            raise ValueError(f"{file} has only one of {first} and {second} of {alone[0]}")
    if broken := [key for key, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} in {file} holds a value that is not finite")
    return str(file)


def check_lora_fits(args: ScriptArguments, index: dict, models: dict) -> None:
    """Exits with one line if a LoRA of peft's keys was made for a network of another size than the base's. Builds the
    network without memory."""
    loras = {name: model for name, model in models.items() if model["kind"] == "lora"}
    part = next((part for part in NETWORKS if part in index), None)
    if not loras or part is None:
        return
    base = args.pretrained_model_name_or_path
    config, _ = read_model_config("--pretrained_model_name_or_path", base, f"{part}/config.json", args.revision)
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    modules = {name: module for name, module in network.named_modules() if hasattr(module, "weight")}
    for name, model in loras.items():
        with safe_open(model["file"], framework="pt") as weights:
            if all("lora_A" in key or "lora_B" in key for key in weights.keys()) and not any(
                key.startswith(f"{part}.") or key.partition(".lora_")[0] in modules for key in weights.keys()
            ):
                raise SystemExit(f"{model['source']} ({name}): no key of it fits {base}")
            for key in weights.keys():
                match = re.fullmatch(rf"{part}\.(.+)\.lora_([AB])\.weight", key)
                if not match:
                    continue
                module, side = modules.get(match[1]), 1 if match[2] == "A" else 0
                found = weights.get_slice(key).get_shape()[side]
                if module is None or module.weight.shape[side] != found:
                    needs = "no such module" if module is None else f"{module.weight.shape[side]}, not {found}"
                    raise SystemExit(f"{model['source']} ({name}): {key} does not fit {base}: it has {needs}")


def load_pipeline(args: ScriptArguments, source: str, device: torch.device) -> DiffusionPipeline:
    options, is_base = {"dtype": getattr(torch, args.dtype)}, source == args.pretrained_model_name_or_path
    if is_base:
        options |= {"revision": args.revision, "variant": args.variant}
    options |= {} if args.use_text_encoder_3 else {"text_encoder_3": None, "tokenizer_3": None}
    with loading(source):
        pipeline = DiffusionPipeline.from_pretrained(source, **options).to(device)
    if is_base and args.max_sequence_length and not takes_sequence_length(pipeline):
        raise SystemExit(f"--max_sequence_length: a {type(pipeline).__name__} has no such option: leave the flag out")
    prepare_pipeline(pipeline)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)  # SD1.5's would black out images, which are then scored
    return pipeline


def takes_sequence_length(pipeline: DiffusionPipeline) -> bool:
    return "max_sequence_length" in inspect.signature(pipeline.__call__).parameters


@contextmanager
def fitted(args: ScriptArguments, name: str, model: dict, pipeline: DiffusionPipeline):
    """The pipeline with a model's LoRA or network; afterwards as it was."""
    if model["kind"] == "lora":
        with loading(f"{model['source']} ({name})"):
            pipeline.load_lora_weights(model["file"])
        if not pipeline.get_active_adapters():  # diffusers only warns
            raise SystemExit(f"{model['source']} ({name}): no key of it fits {args.pretrained_model_name_or_path}")
        yield pipeline
        pipeline.unload_lora_weights()
    elif model["kind"] == "network":
        original, device = getattr(pipeline, model["part"]), pipeline.device
        options = {"subfolder": model["subfolder"] or None, "dtype": getattr(torch, args.dtype)}
        with loading(f"{model['source']} ({name})"):
            network = type(original).from_pretrained(model["source"], **options)
        original.to("cpu")  # one of the two at a time
        pipeline.register_modules(**{model["part"]: network.to(device)})
        yield pipeline
        pipeline.register_modules(**{model["part"]: original.to(device)})
    else:
        yield pipeline


def image_settings(
    args: ScriptArguments, rows: list[dict], places: list[dict], categories: list[str] | None, model: dict
) -> dict:
    """What a model's images depend on. Exits with one line if pictures that should exist do not."""
    prompts = [row["prompt"] for row in rows]
    if model["kind"] == "images":
        model["pictures"] = find_pictures(args, rows, places, categories, model["source"])
        model["missing"] = len(rows) * args.num_images_per_prompt - len(model["pictures"])
        files = [(*item, file, file.stat()) for item, (file, _) in model["pictures"].items()]
        stats = [f"{i},{n}:{file}:{stat.st_size}:{stat.st_mtime_ns}" for i, n, file, stat in files]
        stats.append(str(args.num_images_per_prompt))
        return {
            "images": model["source"],
            "files": short_hash("\n".join(stats)),
            "prompts": short_hash("\n".join(prompts)),
        }
    settings, base = run_settings(args, prompts), args.pretrained_model_name_or_path
    if model["kind"] == "pipeline":  # revision and variant are the base's
        base, more = model["source"], {"revision": model["commit"], "variant": None}
    elif model["kind"] == "network":
        folder = folder_digest(model["source"]) if os.path.isdir(model["source"]) else model["commit"]
        more = {"network": f"{model['part']}:{model['source']}", "network_files": folder}
    else:
        more = {}
    return {
        **settings,
        "model": base,
        "files": folder_digest(base) if os.path.isdir(base) else None,
        "lora": short_hash(Path(model["file"]).read_bytes()) if "file" in model else None,
        **more,
    }


def report_settings(args: ScriptArguments, prompts: list[str], models: dict) -> dict:
    """The settings in results.json, which --push_to_hub publishes: of local folders only their names."""
    shown = {}
    for name, model in models.items():
        source = model["source"]
        local = model["kind"] == "images" or os.path.isdir(source)
        shown[name] = f"{model['kind']} {os.path.basename(source.rstrip('/')) if local else source}"
    settings = {"prompts": short_hash("\n".join(prompts)), "seed": args.seed}
    if any(model["kind"] != "images" for model in models.values()):
        base = args.pretrained_model_name_or_path
        settings = run_settings(args, prompts) | {"model": os.path.basename(base) if os.path.isdir(base) else base}
    loras = {name: text.removeprefix("lora ") for name, text in shown.items() if text.startswith("lora ")}
    plugins = {reward_name(metric): own for metric in args.metrics if (own := plugin(metric))}
    metrics = {column: {"sha256": own.identity, **public_settings(own)} for column, own in plugins.items()}
    return {**settings, "loras": loras, "models": shown, **({"metrics": metrics} if metrics else {})}


def run_settings(args: ScriptArguments, prompts: list[str]) -> dict:
    """What the images of all models depend on."""
    return {
        "model": args.pretrained_model_name_or_path,
        "variant": args.variant,
        "revision": args.revision,
        "prompts": short_hash("\n".join(prompts)),
        **{name: getattr(args, name) for name in (*DRAWING_FLAGS, "dtype", "seed")},
        **({"max_sequence_length": args.max_sequence_length} if args.max_sequence_length else {}),
        **({} if args.use_text_encoder_3 else {"use_text_encoder_3": False}),
        **({} if args.image_seeds == "own" else {"image_seeds": args.image_seeds}),
    }


def find_pictures(
    args: ScriptArguments, rows: list[dict], places: list[dict], categories: list[str] | None, template: str
) -> dict:
    """(prompt, number) → (file, cell), where a template's pictures lie. Its fields are {index}, the prompt's row in the
    source, and {number}; {image}, the number over all rows; {prompt}, {row[COLUMN]}, {category}; {category_index} and
    {category_image}, the same among the category's rows. Rows that repeat a prompt count, but only the first has
    pictures. With `#2x2` at its end, a file is a grid of pictures, read row by row.

    Returns:
        cell is (column, row, columns, rows) in a grid, else None. Exits with one line if the template is wrong, a
        picture does not open, or pictures are missing without --allow_missing: those are left out of the result.
    """
    where, pictures, missing = f"--images {template}", {}, []
    names, columns, high = re.fullmatch(r"(.*?)(?:#(\d+)x(\d+))?", template, re.DOTALL).groups(default="1")
    columns, high = int(columns), int(high)
    if not columns * high:
        raise SystemExit(f"{where}: a grid has at least one column and one row")
    for i, row in enumerate(rows):
        category = categories[i] if categories else ""
        index, in_category = places[i]["index"], places[i].get(args.category_column, places[i]["index"])
        place = {"index": index, "prompt": row["prompt"], "row": row}
        place |= {"category": category, "category_index": in_category}
        for n in range(args.num_images_per_prompt):
            number, cell = divmod(n, columns * high)
            images = [start * args.num_images_per_prompt + n for start in (index, in_category)]
            try:
                file = Path(names.format(**place, number=number, image=images[0], category_image=images[1]))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                fields = "{index}, {number}, {image}, {prompt}, {row[COLUMN]}, {category}, {category_index} and "
                fields += "{category_image}"
                raise SystemExit(f"{where}: wrong template: {one_line(error)}; its fields are {fields}") from None
            if not os.path.isfile(file):
                missing.append(f"{file} (prompt {i}, image {n})")
                continue
            check_picture(where, file, (columns, high))
            pictures[i, n] = file, (cell % columns, cell // columns, columns, high) if columns * high > 1 else None
    if missing and not (args.allow_missing and pictures):
        of = f"{len(missing)} of {len(missing) + len(pictures)} pictures are missing"
        raise SystemExit(f"{where}: no picture {missing[0]}; {of}: make them, or leave them out with --allow_missing")
    if len(set(pictures.values())) < len(pictures):
        raise SystemExit(f"{where}: gives the same picture to several images: use {{index}} and {{number}}")
    return pictures


def check_picture(where: str, file: Path, grid: tuple[int, int] = (1, 1), whole: bool = False) -> None:
    """Exits with one line if the file holds no picture, or none that can be cut into this many columns and rows;
    `whole`: reads all of it, and not only its head."""
    try:
        with PILImage.open(file) as image:
            if image.width % grid[0] or image.height % grid[1]:
                raise ValueError(f"{image.width} x {image.height} pixels are no grid of {grid[0]} x {grid[1]}")
            if whole:
                image.load()
    except Exception as error:
        raise SystemExit(f"{where}: {file} cannot be read: {one_line(error)}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Metrics of files of their own
# ----------------------------------------------------------------------------------------------------------------------


def plugin(metric: str) -> "FunctionReward | None":
    """A metric of a file of its own, not loaded."""
    return None if metric.partition("=")[0] in REWARD_MODELS else FunctionReward(metric, batch_size=1)


def hook(own: "FunctionReward | None", name: str) -> Callable | None:
    """An optional function of a metric's class: prepare, check_rows or official."""
    return getattr(own.function, name, None) if own and inspect.isclass(own.function) else None


def takes_rows(metric: str) -> bool:
    """Whether a metric wants the whole row of each prompt, to score, to check or to report."""
    own = plugin(metric)
    return own is not None and bool(own.takes_rows or hook(own, "check_rows") or hook(own, "official"))


def all_settings(own: "FunctionReward") -> dict:
    """The settings of a metric's class, those that were not given too."""
    parameters = inspect.signature(own.function).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not p.empty} | own.settings


def prepare_metrics(metrics: list[str], rows: list[dict], weights: bool) -> None:
    """Lets metrics look at the prompts' rows, and find or download their `weights`. Exits with the line of the first
    that cannot work, before anything is drawn."""
    for own in filter(None, map(plugin, metrics)):
        hooks = {"check_rows": (rows,)} | ({"prepare": (rows, all_settings(own))} if weights else {})
        for name, arguments in hooks.items():
            try:
                if function := hook(own, name):
                    function(*arguments)
            except Exception as error:
                where = "--prompts: " if name == "check_rows" else ""
                kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
                raise SystemExit(f"metric {reward_name(own.name)}: {where}{kind}{one_line(error)}") from None


def official_figures(
    args: ScriptArguments, metric: str, rows: list[dict], categories: list[str] | None, scores: dict[str, np.ndarray]
) -> dict:
    """What a benchmark itself reports of a model: its class's `official`, or HPSv2's own figure. Otherwise {}."""
    own = plugin(metric)
    if function := hook(own, "official"):
        figures = own.call(function, rows, scores, all_settings(own))
        try:
            return {str(name): float(figure) for name, figure in figures.items()}
        except (AttributeError, TypeError, ValueError):
            raise SystemExit(f"metric {reward_name(metric)}: `official` must return a dict of numbers") from None
    whole = args.prompts == "hpsv2" and args.category_column == "style" and not args.max_prompts
    if own is None and reward_name(metric).startswith("hpsv2") and whole and not np.isnan(scores[""]).any():
        return hpsv2_figure(scores[""], categories)
    return {}


def public_settings(own: "FunctionReward") -> dict[str, dict]:
    """A metric's settings for results.json, which --push_to_hub publishes: of local files only their names."""
    shown = own.settings | {key: os.path.basename(value.rstrip("/")) for key, value in own.paths().items()}
    return {"settings": shown} if shown else {}


# ----------------------------------------------------------------------------------------------------------------------
# Scores on disk
# ----------------------------------------------------------------------------------------------------------------------


def image_shards(args: ScriptArguments, n_prompts: int) -> list[list[tuple[int, int]]]:
    """All (prompt, number) in parts: what is scored in one file, and drawn and scored by one task."""
    items = [(i, n) for i in range(n_prompts) for n in range(args.num_images_per_prompt)]
    return [items[start : start + SCORES_PER_FILE] for start in range(0, len(items), SCORES_PER_FILE)]


def scores_file(args: ScriptArguments, column: str, model: str, shard: int | None = None) -> Path:
    """A model's scores under a metric, or a part of them."""
    folder = Path(args.output_dir, "scores", column)
    return folder / f"{model}.json" if shard is None else folder / f"{model}.parts" / f"{shard:05d}.json"


def stored_scores(file: Path, settings: dict) -> list | dict | None:
    """The scores in a file; None if they are missing, or were made with other settings."""
    try:
        stored = read_json(file)
    except Damaged:
        return None
    return stored["scores"] if stored.get("settings") == settings else None


def open_pictures(args: ScriptArguments, model: dict, name: str, items: list[tuple[int, int]]) -> dict:
    """(prompt, number) → file and picture of those of these images that exist."""
    pictures = {item: picture_file(args, name, model, *item) for item in items}
    pictures = {item: picture for item, picture in pictures.items() if picture}
    files = {file for file, _ in pictures.values()}
    try:
        opened = {file: PILImage.open(file) for file in files}
        return {item: (file, cut(opened[file], cell)) for item, (file, cell) in pictures.items()}
    except OSError:
        check_pictures(name, files)
        raise


def score_shard(
    reward: "RewardModel", rows: list[dict], name: str, items: list[tuple[int, int]], pictures: dict
) -> list:
    """The scores of these (prompt, number); None where the image is missing."""
    prompts, chosen = [rows[i]["prompt"] for i, _ in pictures], [rows[i] for i, _ in pictures]
    try:
        images = [image for _, image in pictures.values()]
        scores = dict(zip(pictures, reward.score(images, prompts, rows=chosen), strict=True))
    except (BadImage, OSError):
        check_pictures(name, {file for file, _ in pictures.values()})
        raise
    return [scores.get(item) for item in items]


def check_pictures(name: str, files: Iterable[Path]) -> None:
    """Exits with one line that names a file that is no whole picture."""
    for file in sorted(files):
        check_picture(name, file, whole=True)


def write_scores(file: Path, settings: dict, values) -> None:
    write_json(file, without_nan({"settings": settings, "scores": values}))


def merge_scores(args: ScriptArguments, column: str, name: str, settings: dict, n_prompts: int, n_shards: int) -> None:
    """Joins the parts of a model's scores into one file: {"settings", "scores": n_prompts lists, or a dict of them}."""
    parts = [scores_file(args, column, name, number) for number in range(n_shards)]
    values = [value for part in parts for value in read_json(part)["scores"]]
    kinds = {isinstance(value, dict) for value in values if value is not None}  # None: the image is missing
    if len(kinds) > 1:
        shutil.rmtree(parts[0].parent)
        raise SystemExit(f"metric {column}: gives numbers and dicts: all images need the same")
    if kinds == {True}:
        values = [value or {} for value in values]
        keys = dict.fromkeys(key for value in values for key in value)
        scores = {key: nested([value.get(key) for value in values], n_prompts) for key in keys}
    else:
        scores = nested(values, n_prompts)
    write_scores(scores_file(args, column, name), settings, scores)
    shutil.rmtree(parts[0].parent)


def nested(values: list, n_prompts: int) -> list[list]:
    size = len(values) // n_prompts
    return [values[start : start + size] for start in range(0, len(values), size)]


def read_scores(args: ScriptArguments, column: str, name: str, settings: dict) -> dict[str, np.ndarray] | None:
    """Suffix of the metric's name → float64 (n_prompts, n_images); None unless the scores of these settings exist."""
    scores = stored_scores(scores_file(args, column, name), settings)
    if scores is None:
        return None
    scores = {f"_{key}": value for key, value in scores.items()} if isinstance(scores, dict) else {"": scores}
    return {key: np.array(value, dtype=np.float64) for key, value in scores.items()}  # null becomes NaN


def without_nan(value):
    """The same with None in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def image_seed(args: ScriptArguments, prompt: str, number: int) -> int:
    """The seed of an image, the same for all models: its own, or, as in benchmarks, counted from --seed."""
    if args.image_seeds == "counted":
        return args.seed + number
    return int.from_bytes(hashlib.sha256(f"{args.seed}|{prompt}|{number}".encode()).digest()[:4], "big")


def image_file(output_dir: Path, model: str, prompt: int, number: int) -> Path:
    return output_dir / "images" / model / f"{prompt:05d}_{number}.png"


def picture_file(
    args: ScriptArguments, name: str, model: dict, prompt: int, number: int
) -> tuple[Path, tuple | None] | None:
    """The file of a picture and its cell, if the file is a grid; None for one of --images that is missing."""
    drawn = image_file(Path(args.output_dir), name, prompt, number)
    return model["pictures"].get((prompt, number)) if model["kind"] == "images" else (drawn, None)


def count_pictures(model: dict, items: list[tuple[int, int]]) -> int:
    """How many of these images exist, once all are drawn."""
    return sum(item in model["pictures"] for item in items) if model["kind"] == "images" else len(items)


def cut(image: PILImage.Image, cell: tuple[int, int, int, int] | None) -> PILImage.Image:
    """The picture itself, or the one in this cell of it."""
    if cell is None:
        return image
    column, row, columns, rows = cell
    wide, high = image.width // columns, image.height // rows
    return image.crop((column * wide, row * high, (column + 1) * wide, (row + 1) * high))


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def markdown_report(record: dict, summary: dict, metrics: list[str], compared: list[str]) -> str:
    """The tables of results.md."""
    baseline, seeds = record["baseline"], record.get("seeds", {})
    drawn = not any(text.startswith("images ") for text in record["settings"]["models"].values())
    lines = [
        *official_tables(record, summary),
        f"Prompts: {record['n_prompts']}, images per model: {record['n_images']}"
        + (", the same seeds for all" if drawn else "")
        + f". Lift over `{baseline}` and win rate against it, with paired bootstrap 95 % intervals over prompts; a tie "
        "counts half a win.",
        "",
    ]
    rows, spread = [], {metric: known_categories(summary, metric) for metric in metrics}
    for metric in metrics:
        for name, entry in summary.items():
            label = f"{metric} (trained on)" if f"{metric}_trained_on" in entry else metric
            for key, what in ((metric, label), (f"{metric}_category_mean", f"{label}, mean over categories")):
                if not math.isnan(entry.get(key, math.nan)) and (key == metric or len(spread[metric]) > 1):
                    rows.append([name, what, *figure_cells(entry, key)])
    interval = "95 % interval"
    lines.append(markdown_table(["model", "metric", "mean", interval, "lift", interval, "win rate", interval], rows))
    if seeds:
        rows = []
        for name, metric in itertools.product(seeds, metrics):
            means = ", ".join(f"{mean:.4f}" for mean in summary[name][f"{metric}_seed_means"])
            rows.append([name, metric, means, f"{summary[name][f'{metric}_seed_sd']:.4f}"])
        lines += ["", "Several trainings (seeds) of a model; above, their scores are averaged:", ""]
        lines.append(markdown_table(["model", "metric", "mean of each", "standard deviation"], rows))
    for metric in metrics if len(compared) > 2 else ():
        pairs = record["pairwise"][metric]
        lines += ["", f"{metric}, row minus column (win rate of the row); bold where the interval excludes 0:", ""]
        rows = [[name, *(pair_cell(pairs[name].get(other)) for other in compared)] for name in compared]
        lines.append(markdown_table(["", *compared], rows))
    for metric in metrics:
        if len(spread[metric]) > 1:
            rows = []
            for category in spread[metric]:
                parts = [entry[f"{metric}_by_category"][category] for entry in summary.values()]
                means = [f"{part['mean']:.3f}".replace("nan", "") for part in parts]
                rows.append([category, parts[0]["n_prompts"], *means])
            lines += ["", f"{metric} by category:", "", markdown_table(["category", "prompts", *summary], rows)]
    if any(" ! |" in line for line in lines):
        lines += ["", f"! The interval says little: it is over fewer than {FEW_PROMPTS} prompts, or of zero width."]
    return "\n".join(lines) + "\n"


def figure_cells(entry: dict, key: str) -> list[str]:
    """Mean, lift and win rate with their intervals; the baseline has only the mean."""
    cells = []
    for name, form in ((key, "{:.4f}"), (f"{key}_lift", "{:+.4f}"), (f"{key}_win_rate", "{:.3f}")):
        if not math.isnan(entry.get(name, math.nan)):
            mark = " !" if f"{name}_warning" in entry else ""
            low, high = (form.format(end) for end in entry[f"{name}_ci95"])
            cells += [form.format(entry[name]), f"{low} to {high}{mark}"]
        else:
            cells += ["", ""]
    return cells


def known_categories(summary: dict, metric: str) -> list[str]:
    """The categories in which a metric has a value; a benchmark's metric may be for one of them only."""
    parts = [entry.get(f"{metric}_by_category", {}) for entry in summary.values()]
    return [name for name in parts[0] if any(not math.isnan(part[name]["mean"]) for part in parts)]


def official_tables(record: dict, summary: dict) -> list[str]:
    """The figures of benchmarks as they report them, a table each, and what they are over."""
    tables, lines = {}, []
    for name, entry in summary.items():
        for key in (key for key in entry if key.endswith("_official")):
            tables.setdefault(key.removesuffix("_official"), {})[name] = entry[key]
    over = f"{record['n_prompts']} prompts, {record['n_images']} images"
    for metric, by_model in tables.items():
        names = dict.fromkeys(figure for figures in by_model.values() for figure in figures)
        rows = [[figure, *(official_cell(by_model[name].get(figure)) for name in by_model)] for figure in names]
        lines += [f"{metric} as the benchmark reports it, over {over}:", "", markdown_table(["", *by_model], rows), ""]
        if any(isinstance(figure, dict) for figures in by_model.values() for figure in figures.values()):
            lines += ["A style's mean and deviation are those of ten chunks' means, times 100.", ""]
    for name, count in record.get("missing_images", {}).items():
        lines += [f"Of `{name}`, {count} of these images are missing and left out.", ""]
    return lines


def official_cell(figure: float | dict | None) -> str:
    if isinstance(figure, dict):
        return f"{figure['mean']:.2f} ± {figure['std']:.2f}"
    return "" if figure is None or math.isnan(figure) else f"{figure:.4g}"


def pair_cell(pair: dict | None) -> str:
    if pair is None or math.isnan(pair["lift"]):
        return ""
    low, high = pair["lift_ci95"]
    lift = f"**{pair['lift']:+.4f}**" if low > 0 or high < 0 else f"{pair['lift']:+.4f}"
    return f"{lift} ({pair['win_rate']:.3f}){' !' if 'lift_warning' in pair else ''}"


def grid_picture(
    args: ScriptArguments, prompts: list[str], models: dict, pictured: list[str], cell: int = 192
) -> PILImage.Image:
    """Prompts spread over the list, one a row. The models stand side by side, with the same seeds."""
    chosen = np.unique(np.linspace(0, len(prompts) - 1, min(args.grid_rows, len(prompts))).astype(int))
    per_model, label, gap = min(args.num_images_per_prompt, 3), 22, 12
    width = len(pictured) * (per_model * cell + gap) - gap
    canvas = PILImage.new("RGB", (width, label + (cell + label) * len(chosen)), "white")
    drawing = ImageDraw.Draw(canvas)
    for column, name in enumerate(pictured):
        left = column * (per_model * cell + gap)
        drawing.text((left + 4, 5), name, fill="black")
        for row, i in enumerate(chosen):
            top = label + row * (cell + label)
            for n in range(per_model):
                picture = picture_file(args, name, models[name], int(i), n)
                if picture is None:
                    continue
                image = cut(PILImage.open(picture[0]), picture[1]).convert("RGB")
                resample = PILImage.NEAREST if image.width < cell else PILImage.LANCZOS
                canvas.paste(image.resize((cell, cell), resample), (left + n * cell, top))
            if column == 0:
                drawing.text((4, top + cell + 4), prompts[i][: width // 7], fill="black")
    return canvas


def draw_curves(summary: dict, checkpoints: dict[str, dict], metrics: list[str], baseline: str, file: Path) -> None:
    """Every metric over the pairs or prompts that a run had seen, from the base model on, with the 95 % intervals of
    the lift over the baseline."""
    figure = Figure(figsize=(5 * len(metrics), 4), dpi=100, layout="tight")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        base = summary[baseline][metric]
        for run in dict.fromkeys(checkpoint["run"] for checkpoint in checkpoints.values()):
            names = [name for name, checkpoint in checkpoints.items() if checkpoint["run"] == run]
            seen = [0] + [checkpoints[name]["seen"] for name in names]
            axes.plot(seen, [summary[name][metric] for name in (BASE, *names)], marker="o", markersize=3, label=run)
            intervals = [summary[name].get(f"{metric}_lift_ci95", (0.0, 0.0)) for name in (BASE, *names)]
            axes.fill_between(seen, *([base + end for end in ends] for ends in zip(*intervals)), alpha=0.2)
        axes.axhline(base, color="black", linewidth=0.8, linestyle=":", label=baseline)
        axes.set(xlabel="seen in training", ylabel=metric)
    panels[0].legend()
    figure.savefig(picture := BytesIO())
    save_picture(PILImage.open(picture), file)


# ----------------------------------------------------------------------------------------------------------------------
# Results on the Hub
# ----------------------------------------------------------------------------------------------------------------------


def hub_repositories(args: ScriptArguments, models: dict[str, dict]) -> dict[str, str]:
    """Name of a LoRA → the repository for its results. Exits with one line if there is none."""
    loras = {n: model["source"] for n, model in models.items() if model["kind"] == "lora" and "run" not in model}
    if args.hub_model_id:
        names = [name for name, lora in loras.items() if lora == args.hub_model_id] or list(loras)
        if len(names) != 1:
            raise SystemExit(f"--hub_model_id {args.hub_model_id}: is none of the {len(loras)} LoRAs in --loras")
        return {names[0]: args.hub_model_id}
    repositories = {name: lora for name, lora in loras.items() if not os.path.isdir(lora)}
    if not repositories:
        raise SystemExit("--push_to_hub: no LoRA in --loras is a Hub id: say with --hub_model_id where results go")
    return repositories


def results_card(args: ScriptArguments, name: str, repo_id: str, record: dict, report: str) -> str:
    """A card that holds only a LoRA's results, to be merged into the card on the Hub."""
    source = public_text(PROMPT_SETS.get(args.prompts, {}).get("source", args.prompts))
    title = args.prompts if args.prompts in PROMPT_SETS else os.path.basename(source)
    prompts = {"type": "prompts", "name": f"{title}, {record['n_prompts']} prompts"}
    if args.prompts in PROMPT_SETS or not os.path.exists(args.prompts):
        prompts["type"] = source
        if args.prompt_split and "://" not in source:
            prompts["split"] = args.prompt_split
    drawing = {key: record["settings"][key] for key in (*DRAWING_FLAGS, "seed")}
    prompts["args"] = {"prompts": record["settings"]["prompts"], **drawing}
    values = []
    other = "the base model" if args.baseline == BASE else args.baseline
    for metric in record["pairwise"]:
        figures = [(metric, metric, ""), (metric, f"{metric}, lift over {other}", "_lift")]
        figures.append(("win_rate", f"{metric}, win rate over {other}", "_win_rate"))
        for kind, label, ending in figures:  # the baseline has no lift, and a figure may apply to none of these prompts
            if not math.isnan(value := record[name].get(metric + ending, math.nan)):
                values.append({"type": kind, "name": label, "value": value})
    task = {"type": "text-to-image", "name": "Text-to-Image Generation"}
    results = [{"task": task, "dataset": prompts, "metrics": values}]
    base, local = args.pretrained_model_name_or_path, os.path.isdir(args.pretrained_model_name_or_path)
    front = {} if local else {"base_model": base}
    front |= {"library_name": "diffusers", "model-index": [{"name": repo_id.split("/")[-1], "results": results}]}
    settings = ", ".join(f"`{key}` {value}" for key, value in drawing.items())
    others = [f"`{other}`" for other in record["settings"]["models"] if other not in (name, BASE)]
    legend = f"`{name}` is this LoRA" + (f"; {', '.join(others)}: others." if others else ".")
    body = f"""## Evaluation

{legend} Base model: `{os.path.basename(base) if local else base}`. Prompts: {prompts["name"]}. {settings}.

{report}
![The same prompts and seeds for all models](grid.png)

All figures are in [results.json](results.json).
"""
    return make_card(front, card_block(body))


def merge_results(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """`merge_cards` that also keeps results on other prompts in `model-index`."""
    models = theirs.data.get("model-index")
    card = merge_cards(mine, theirs)
    if models:
        (own,), (model, *others) = mine.data["model-index"], models
        prompts = [result["dataset"] for result in own["results"]]
        kept = [result for result in model.get("results") or [] if result.get("dataset") not in prompts]
        card.data["model-index"] = [{**own, **model, "results": kept + own["results"]}, *others]
    return card


def publish(args: ScriptArguments, repo_id: str, card: str) -> None:
    """Sends the results to the repository of one LoRA; exits with one line if that fails."""
    output_dir = Path(args.output_dir)
    names = ("results.json", "results.md", "grid.png", "curves.png")
    files = {name: output_dir / name for name in names if (output_dir / name).exists()}
    try:
        push_to_hub(repo_id, "model", files, "Evaluation", card=card, merge=merge_results)
    except Exception as error:
        advice = f"everything is in {output_dir}: run the same command again"
        raise SystemExit(f"upload to {repo_id} failed: {one_line(error)}; {advice}") from None
    print(f"published: {HfApi().endpoint}/{repo_id}")


# ----------------------------------------------------------------------------------------------------------------------
# Shared: prompts (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


# Short names for --prompts: where the prompts are published, and what flags that are left out then mean.
PICKAPIC = {"source": "liuhuohuo2/pick-a-pic-v2", "prompt_column": "caption"}
PARTI_URL = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"
PROMPT_SETS = {
    "pickapic-train": {**PICKAPIC, "prompt_split": "train"},
    "pickapic-val": {**PICKAPIC, "prompt_split": "validation_unique"},
    "hpsv2": {"source": "zhwang/HPDv2", "prompt_column": "prompt", "category_column": "style"},
    "parti": {"source": PARTI_URL, "prompt_column": "Prompt", "category_column": "Category"},
}
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
TEXT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
FILES = (*TEXT_FILES, ".parquet")


def complete_prompt_flags(args: "ScriptArguments") -> None:
    """Fills in the flags about prompts that were left out."""
    for name, value in PROMPT_SETS.get(args.prompts, {"prompt_column": "prompt", "prompt_split": "train"}).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def read_prompts(
    source: str,
    column: str,
    split: str | None,
    max_prompts: int | None,
    keep: tuple[str, ...] = (),
    whole_rows: bool = False,
) -> tuple[list[dict], list[dict[str, int]]]:
    """Reads prompts in order and drops duplicates. Of a dataset it reads no more than it needs.

    Returns:
        one dict per prompt: "prompt", stripped, and the columns to `keep`; with `whole_rows` all columns that hold no
        images. One dict per prompt of where it first stood in the source, duplicates counted: "index", its row, from 0,
        and for each column to `keep`, how many rows before it have the same value there. Exits with one line that names
        the row if a prompt is empty, or the column that is missing.
    """
    shown, prompts, places, counts = public_text(source), {}, {}, Counter()
    rows = prompt_rows(source, split, tuple(dict.fromkeys((column, *keep))), whole_rows)
    try:
        # Reading all of Pick-a-Pic takes minutes.
        for index, row in enumerate(progress_bar(rows, desc="prompts", unit=" rows", delay=10)):
            prompt = row[column]
            if not isinstance(prompt, str) or not prompt.strip():
                raise SystemExit(f"--prompts {shown}: row {index + 1}: the prompt is empty or no text: remove the row")
            values = {name: (name, str(row[name])) for name in keep}
            place = {"index": index} | {name: counts[value] for name, value in values.items()}
            counts.update(values.values())
            prompts.setdefault(prompt.strip(), {**row, "prompt": prompt.strip()})
            places.setdefault(prompt.strip(), place)
            if max_prompts and len(prompts) == max_prompts:
                break
    except Exception as error:
        guess = "/" not in source and source not in PROMPT_SETS and not source.endswith(FILES)
        names = f"; the sets with a short name are {', '.join(PROMPT_SETS)}" if guess else ""
        raise SystemExit(f"--prompts {shown}: cannot be read: {public_text(one_line(error))}{names}") from None
    if not prompts:
        raise SystemExit(f"--prompts {shown}: holds no prompts")
    if repeated := index + 1 - len(prompts):
        warn(f"--prompts {shown}: {repeated} of {index + 1} rows repeat an earlier prompt and are left out")
    return list(prompts.values()), list(places.values())


def prompt_rows(source: str, split: str | None, columns: tuple[str, ...], whole_rows: bool) -> Iterator[dict]:
    """Yields the rows of a named set, file, URL or dataset with these `columns`, the first of which is the prompt."""
    known = PROMPT_SETS.get(source, {}).get("source", source)
    on_web = known.startswith(("http://", "https://"))
    suffix = Path(urlsplit(known).path if on_web else known).suffix
    if source == "hpsv2":
        rows = []
        for style in HPSV2_STYLES:
            file = retried(hf_hub_download, known, f"benchmark/{style}.json", repo_type="dataset")
            rows += [{**row, "style": style} for row in parse_rows(Path(file).read_bytes(), ".json", columns[0])]
    elif on_web:
        if suffix not in TEXT_FILES:
            raise ValueError(f"the name of a file on the web must end in {', '.join(TEXT_FILES)}")
        rows = parse_rows(fetch(known), suffix, columns[0])
    elif suffix in FILES and not os.path.exists(known):
        raise FileNotFoundError("no such file")
    elif suffix in TEXT_FILES and os.path.isfile(known):
        rows = parse_rows(Path(known).read_bytes(), suffix, columns[0])
    else:
        yield from stream_rows(known, split, columns, whole_rows)
        return
    names = dict.fromkeys(name for row in rows for name in row)
    if rows:
        check_columns(source, names, columns)
    yield from ({name: row.get(name) for name in (names if whole_rows else columns)} for row in rows)


def fetch(url: str) -> bytes:
    def get():
        response = get_session().get(url, timeout=60)
        response.raise_for_status()
        return response

    response = retried(get)
    if "html" in response.headers.get("Content-Type", ""):
        raise ValueError("this is a web page, not a file of prompts: give the link to the raw file")
    return response.content


def parse_rows(content: bytes, suffix: str, column: str) -> list[dict]:
    """The rows of a file. A line of a text file, or a string in a JSON list, becomes a row with that one `column`."""
    text = content.decode("utf-8-sig")
    if suffix == ".txt":
        return [{column: line} for line in text.removesuffix("\n").split("\n")] if text else []
    if suffix in (".csv", ".tsv"):
        # Quotation marks in a .tsv are text, as in PartiPrompts, where a prompt begins with one.
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
        rows = list(csv.DictReader(StringIO(text, newline=""), **dialect))
        if long := [number for number, row in enumerate(rows, 1) if None in row]:
            raise ValueError(f"row {long[0]} has more fields than the header: quote a prompt that has commas")
        return rows
    values, end, blank, decoder = [], 0, re.compile(r"\s*"), json.JSONDecoder()
    while (start := blank.match(text, end).end()) < len(text):  # a list, or a value per line
        value, end = decoder.raw_decode(text, start)
        values += value if isinstance(value, list) else [value]
    return [value if isinstance(value, dict) else {column: value} for value in values]


def stream_rows(source: str, split: str | None, columns: tuple[str, ...], whole_rows: bool) -> Iterator[dict]:
    """Yields rows of a .parquet file, or of a dataset on the Hub or in a folder, while it reads them. Nothing is
    downloaded as a whole. Of Parquet files, which most datasets with images are, only these `columns` are read."""
    check_dataset_folder("--prompts", source, columns=False)
    options = {"path": source}
    if source.endswith(".parquet") and os.path.isfile(source):
        options, split = {"path": "parquet", "data_files": source}, "train"
    builder = load_dataset_builder(**options)
    offline = datasets_config.HF_HUB_OFFLINE and not os.path.exists(source)  # then what an earlier run downloaded
    rows = load_dataset(**options, split=split) if offline else builder.as_streaming_dataset(split=split)
    names = rows.column_names or list(next(iter(rows), {}))
    check_columns(source, names, columns)
    if whole_rows:
        kinds = rows.features or dict.fromkeys(names, "")
        columns = [name for name in names if not re.search(r"\bImage\b|binary", repr(kinds[name]))]
    if hasattr(builder.config, "columns") and not offline:
        # By default the client reads 5 MiB ahead with each small piece of a column: a tenth of the images.
        options |= {"columns": list(columns), "storage_options": {"hf": {"block_size": 2**14}}}
        rows = load_dataset(**options, split=split, streaming=True)
    yield from rows.select_columns(list(columns))


def check_columns(source: str, columns: Iterable[str], wanted: tuple[str, ...]) -> None:
    for name in wanted:
        if name not in columns:
            raise SystemExit(f"--prompts {public_text(source)}: no column {name!r}; it has {', '.join(columns)}")


def public_text(text: str) -> str:
    """`text` without what may be secret in its URLs: user name, password, query."""
    return re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: pipelines (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def text_to_image_options(where: str, class_name: str) -> tuple[str, ...]:
    """What a call of a pipeline takes; exits with one line unless the pipeline draws from a prompt alone."""
    pipeline_class = getattr(diffusers, class_name, None)
    known = tuple(inspect.signature(pipeline_class.__call__).parameters) if pipeline_class else ()
    others = (*AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.values(), *AUTO_INPAINT_PIPELINES_MAPPING.values())
    if "prompt" not in known or pipeline_class in others:
        raise SystemExit(f"{where} is a {class_name}: no pipeline of diffusers that draws from a prompt alone")
    return known


def prepare_pipeline(pipeline: DiffusionPipeline) -> None:
    """No progress bar per image, and memory for one image at a time in the VAE."""
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
        pipeline.vae.enable_slicing()  # decoding a whole batch at once runs out of memory first


# ----------------------------------------------------------------------------------------------------------------------
# Shared: stages (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def make_state() -> PartialState:
    """This process and its device. Without a GPU several processes talk through gloo. The timeout is a week: the first
    process to finish a stage may wait hours for the last."""
    launched = "LOCAL_RANK" in os.environ
    waiting = {"timeout": timedelta(days=7)} if launched else {}
    return PartialState(cpu=launched and not torch.cuda.is_available(), **waiting)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class TooLarge(SystemExit):
    """The device's memory does not hold a model, or not with a single image."""


def in_fitting_parts(work: Callable, items: list, size: int, what: str) -> tuple[list, int]:
    """`work`, which takes a list and returns one result for each, of all items, `size` at once. Where the device's
    memory runs out, half as many are taken from then on.

    Returns:
        the results, and how many at once did fit.
    """
    results = []
    while len(results) < len(items):
        part = items[len(results) : len(results) + size]
        with suppress(torch.OutOfMemoryError):
            results += work(part)
            continue
        if len(part) == 1:
            raise TooLarge(f"{what}: the device's memory does not hold it with a single image")
        size = len(part) // 2
        free_memory()
        warn(f"{what}: the device's memory does not hold {len(part)} images at once: goes on with {size}")
    return results, size


# What a scheduler calls the number of a task, the first and the last number, and the number of tasks.
SCHEDULERS = {
    "SLURM_ARRAY_TASK_ID": ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT"),
    "JOB_COMPLETION_INDEX": ("", "", "JOB_COMPLETIONS"),  # Kubernetes; the pod's template sets the count
}


def complete_task_flags(args: "ScriptArguments", last: tuple[str, ...]) -> None:
    """Makes --task_index and --num_tasks numbers: those given, or a scheduler's, or one task. One of several tasks
    leaves the `last` stages to a run of its own."""
    index, total = args.task_index, args.num_tasks
    for name, value in (("task_index", index), ("num_tasks", total)):
        if not re.fullmatch(r"auto|\d{1,9}", value):
            raise SystemExit(f"--{name} {value}: must be a whole number, or auto")
    if index == total == "auto":
        index, total = scheduled_task()
    if index == "auto" and total == "1":
        index = "0"
    elif index == "auto":  # a task that is run again may be alone in its array, so its number counts as it is
        index = next((os.environ[name] for name in SCHEDULERS if name in os.environ), None)
    if index is None or total == "auto":
        raise SystemExit("--task_index and --num_tasks belong together")
    if int(index) >= int(total):
        raise SystemExit(f"--task_index {index}: must be less than --num_tasks {total}: tasks are numbered from 0")
    args.task_index, args.num_tasks, stages = int(index), int(total), args.stages
    args.stages = [stage for stage in stages if args.num_tasks == 1 or stage not in last]
    if not args.stages:
        raise SystemExit(f"--stages {' '.join(stages)}: one run does this after all tasks: give --num_tasks 1")


def scheduled_task() -> tuple[str, str]:
    """This task's number, from 0, and the number of tasks, by the scheduler's variables; one task if there are none."""
    for variable, (first, end, count) in SCHEDULERS.items():
        index, first, end, count = (os.environ.get(name) for name in (variable, first, end, count))
        if index and count and count != "1":
            first = int(first or 0)
            if end and int(end) - first + 1 != int(count):
                raise SystemExit(f"{variable}: the array has gaps: number the tasks from 0, and give --num_tasks")
            warn(f"task {int(index) - first} of {count}, by {variable}: does its share only; --num_tasks 1 does all")
            return str(int(index) - first), count
    return "0", "1"


def check_settings(folder: Path, settings: dict, what: str) -> None:
    """Refuses to mix two runs: the work in `folder` must have been made with these settings."""
    record = folder / "settings.json"
    try:
        previous = read_json(record)
    except Damaged:
        same = "if this version wrote it, with the settings of this command, delete it: it is written again"
        raise SystemExit(f"{record} is damaged, or of an earlier version of this script: {same}") from None
    for name in {**previous, **settings} if previous else ():
        if previous.get(name) != settings.get(name):
            problem = f"{folder} holds {what} made with {name} {previous.get(name)}, not {settings.get(name)}"
            raise SystemExit(f"{problem}: choose another --output_dir or another name, or delete that folder")


def write_settings(folder: Path, settings: dict) -> None:
    """Records what the work in a folder is made with. A record that exists is the same: see `check_settings`. Of tasks
    that start at once, one writes it, and the others compare theirs with it."""
    if not (folder / "settings.json").exists():
        with replacing(folder / "settings.json", keep=True) as temporary:
            temporary.write_text(sealed_json(settings))
        check_settings(folder, settings, "work")


def markdown_table(header: list[str], rows: list[list]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(table_cell, row)) + " |" for row in cells)


def is_whole_png(file: Path) -> bool:
    """Verifies the checksums in a PNG; False if there is no such file."""
    try:
        with PILImage.open(file) as picture:
            picture.verify()
        return picture.format == "PNG"
    except FileNotFoundError:
        return False
    except Exception as error:  # PIL raises many kinds
        if system_problem(error):
            raise
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Shared: reward models (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def load_reward_model(name: str, device="cpu", dtype: torch.dtype | None = None, batch_size: int = 32):
    """Loads a reward model.

    Args:
        name: one of REWARD_MODELS, or path/to/file.py:name of a function or class. `name=checkpoint` (a folder or a Hub
            id) loads another checkpoint than the published one; `file.py:Class,key=value,…` sets parameters of a class.
        dtype: by default float32 on a CPU and half precision on a GPU.

    Returns:
        an object with `.score(images, prompts) -> list[float]`: PIL images and their prompts, batched inside.
    """
    kind = name.partition("=")[0]
    if kind not in REWARD_MODELS:
        return FunctionReward(name, batch_size, device)
    classes = {
        "pickscore": PickScoreReward,
        "mps": MPSReward,
        "mps_t0.01": MPSReward,
        "imagereward": ImageRewardReward,
        "aesthetic": AestheticReward,
        "clipscore": CLIPScoreReward,
        "vqascore": VQAScoreReward,
        "vqascore_vlm": VLMReward,
    }
    return classes.get(kind, HPSReward)(name, device, dtype, batch_size)


def reward_name(name: str) -> str:
    """The column of a reward: `shapes/world.py:color_reward` → `color_reward`, `pickscore=folder` → `pickscore`,
    `my.py:Score,model=user/name` → `Score_model=name`."""
    kind, _, checkpoint = name.partition("=")
    if kind == "vqascore_vlm":  # scores of different models are not comparable
        return f"{kind}_{Path(checkpoint or REWARD_MODELS[kind][0]).name}"
    if kind in REWARD_MODELS:
        return kind
    _, function, settings = split_function(name)
    return "_".join([function, *(f"{key}={value.rstrip('/').rpartition('/')[2]}" for key, value in settings.items())])


def split_function(name: str) -> tuple[str, str, dict[str, str]]:
    """`file.py:Class,key=value,…` → file, name, settings. Exits with one line if it is nothing of the kind."""
    match = re.fullmatch(r"(.+?\.py):(\w+)(.*)", name, re.DOTALL)
    if not match:
        own = "path/to/file.py:function or path/to/file.py:Class,key=value"
        hint = " (a setting? in YAML, quote a metric that has settings)" if re.fullmatch(r"\w+=.*", name) else ""
        raise SystemExit(f"reward {name}: unknown{hint}; choose from {', '.join(REWARD_MODELS)}, or {own}")
    words = match[3].split(",")[1:]
    settings = dict(word.split("=", 1) for word in words if re.fullmatch(r"\w+=.+", word, re.DOTALL))
    if match[3][:1] not in ("", ",") or len(settings) < len(words):
        form = f"{match[2]},key=value,key=value, each key once, no comma in a value"
        raise SystemExit(f"reward {name}: settings follow the name as {form}")
    return match[1], match[2], settings


def reward_settings(name: str) -> dict:
    """What a reward's scores depend on: its checkpoint; or the text of its file, the settings, and what these name."""
    kind, _, checkpoint = name.partition("=")
    if kind not in REWARD_MODELS:
        own, (file, function, settings) = FunctionReward(name, batch_size=1), split_function(name)
        found = {"reward": f"{Path(file).name}:{function}", "sha256": own.identity}
        # Of a checkpoint's file, the sizes beside it count too.
        paths = {key: [Path(value), Path(value).with_name("config.json")] for key, value in own.paths().items()}
        files = {key: [file_digest(path) for path in paths[key] if path.is_file()] for key in paths}
        files |= {key: folder_digest(value) for key, value in own.paths().items() if os.path.isdir(value)}
        return found | ({"settings": settings} if settings else {}) | ({"files": files} if files else {})
    checkpoint = checkpoint or REWARD_MODELS[kind][0]
    files = {"files": folder_digest(checkpoint)} if os.path.isdir(checkpoint) else {}
    return {"reward": reward_name(name), "checkpoint": checkpoint, **files}


def check_rewards(names: list[str]) -> None:
    """Exits with one line unless every reward is known. Imports the user's own functions."""
    columns = [reward_name(name) for name in names]
    if not columns or len(set(columns)) < len(columns):
        twice = sorted({column for column in columns if columns.count(column) > 1})
        problem = f"two would be named {twice[0]}" if twice else "one or more are needed"
        raise SystemExit(f"rewards {' '.join(names)}: {problem}: each needs a name of its own")
    for name in names:
        kind, _, checkpoint = name.partition("=")
        if kind not in REWARD_MODELS:
            FunctionReward(name, batch_size=2)
        elif "=" in name and not os.path.isdir(checkpoint) and not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
            raise SystemExit(f"reward {name}: {checkpoint!r} is no folder, and no id of a repository on the Hub")
        elif checkpoint and not os.path.isdir(checkpoint):
            try:
                HfApi().model_info(checkpoint)
            except RepositoryNotFoundError:
                raise SystemExit(f"reward {name}: the Hub has no model {checkpoint}, or not for your token") from None
            except Exception:  # no network: the model may be in the cache
                pass


class BadImage(Exception):
    """An image that does not decode."""


def decode_image(image: PILImage.Image | bytes) -> PILImage.Image:
    """Reads the pixels of a PIL image, or of the image file in these bytes. Returns the PIL image."""
    try:
        image = PILImage.open(BytesIO(image)) if isinstance(image, bytes) else image
        image.load()
        # The official scorers take palettes, grey and transparent pictures as they are.
        image = to_rgb(image) if image.mode[0] in "FI" else image
    except Exception as error:  # PIL raises many kinds
        message = re.sub(r" <[^>]*>", "", one_line(error))  # PIL names the object by its address in memory
        raise BadImage(f"{type(error).__name__}: {message}") from None
    return image


class RewardModel:
    """Base class. Worker threads decode and prepare images ahead of the model, which takes them in batches. A subclass
    loads its weights in `load` and defines `compare` (n encoded images and prompts → n rewards). It may override
    `prepare` (PIL image → model input, in a worker), `encode_images` and `encode_prompts` (one batch each)."""

    progress: tqdm | None = None  # a bar that counts the images

    def __init__(self, name: str, device="cpu", dtype: torch.dtype | None = None, batch_size: int = 32):
        self.name = name
        self.kind, _, checkpoint = name.partition("=")
        published, self.base_model = REWARD_MODELS[self.kind]
        self.checkpoint = checkpoint or published
        self.device, self.batch_size = torch.device(device), batch_size
        # float16 is closer to float32 than bfloat16 is, but T5 and other language models overflow in it.
        half = torch.bfloat16 if self.kind.startswith("vqascore") else torch.float16
        self.dtype = dtype or (half if self.device.type == "cuda" else torch.float32)
        try:
            self.load()
        except torch.OutOfMemoryError:
            raise TooLarge(f"reward {name}: the device's memory does not hold it") from None
        except Exception as error:
            message = f"{type(error).__name__}: {one_line(error)}"
            raise SystemExit(f"reward {name}: {self.checkpoint} cannot be loaded: {message}") from None

    def source_of(self, *files: str) -> str:
        """The checkpoint if it is a folder that has one of these files, else the base model."""
        has_file = any(os.path.exists(os.path.join(self.checkpoint, file)) for file in files)
        return self.checkpoint if has_file else self.base_model

    def load_tokenizer(self):
        return transformers.AutoTokenizer.from_pretrained(self.source_of("tokenizer.json", "tokenizer_config.json"))

    def load_pickle(self, name: str) -> dict:
        """Reads a file of the checkpoint that torch.save wrote."""
        return torch.load(file_of(self.checkpoint, name), map_location="cpu", weights_only=True)

    def load_model(self, model_class, source: str | None = None, dtype=None, **kwargs) -> torch.nn.Module:
        """Loads a transformers model. A key that is missing, unknown or of another size is an error."""
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # no report of the keys that differ: the error below names them
        try:
            kwargs |= {"dtype": dtype or self.dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = model_class.from_pretrained(source, **kwargs)
        finally:
            transformers_logging.set_verbosity(verbosity)
        info["mismatched_keys"] = [f"{key} {[*has]}, not {[*needs]}" for key, has, needs in info["mismatched_keys"]]
        for what in ("missing", "unexpected", "mismatched"):
            if keys := sorted(info[f"{what}_keys"]):
                raise ValueError(f"{len(keys)} {what} keys: {', '.join(keys[:3])}{', …' if keys[3:] else ''}")
        # Copies the weights out of the mapped file. Weights that are not aligned to 64 bytes give, on a CPU, other last
        # digits from run to run.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return self.ready(model)

    def ready(self, module: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """The module on the device, for inference. A weight that is not finite is an error: in attention on a CPU it
        can give a finite, wrong score."""
        module = module.eval().requires_grad_(False).to(self.device, dtype)
        for name, tensor in module.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds a value that is not finite in {tensor.dtype}")
        return module

    @torch.no_grad()
    def score(self, images: list, prompts: list[str], skip_bad: bool = False, rows=None) -> list[float]:
        """The reward of each image for its prompt. Images are PIL images, or the bytes of their files. With `skip_bad`
        an image that does not decode gets NaN, else it raises BadImage. `rows` are for the user's own metrics."""
        scores = [math.nan for _ in zip(images, prompts, strict=True)]
        distinct = list(dict.fromkeys(prompts))
        texts = dict(zip(distinct, self.fitting(self.encode_prompts, distinct), strict=True))
        positions, rewards = [], []
        for batch in self.prepared_batches(images, skip_bad):
            # Rewards stay on the device until the end. Waiting for each batch would leave the device idle.
            rewards += self.fitting(self.rewards, [(image, texts[prompts[position]]) for position, image in batch])
            positions += [position for position, _ in batch]
        for position, reward in zip(positions, torch.stack(rewards).tolist() if rewards else []):
            if not np.isfinite(np.float32(reward)):  # scores are stored as float32
                score = f"the score of prompt {prompts[position]!r} is {reward}"
                raise SystemExit(f"reward {self.name}: {score}: it must be a finite number")
            scores[position] = reward
        return scores

    def rewards(self, batch: list[tuple]) -> torch.Tensor:
        """The rewards of (prepared image, encoded prompt)."""
        return self.compare(self.encode_images([image for image, _ in batch]), [text for _, text in batch])

    def fitting(self, work: Callable, items: list) -> list:
        """`work` of all items, in batches that the device's memory holds."""
        results, self.batch_size = in_fitting_parts(work, items, self.batch_size, f"reward {self.name}")
        return results

    def begin(self, images: list) -> list:
        """Begins to prepare the first images, which `score` then takes as they are: so the device does not wait."""
        ready = [workers().submit(self.decode_and_prepare, image) for image in images[: 2 * self.batch_size]]
        return ready + images[len(ready) :]

    def prepared_batches(self, images: list, skip_bad: bool):
        """Yields batches of (position, prepared image). Workers stay two batches ahead."""
        submitted = deque()
        for batch in [*batches(list(enumerate(images)), self.batch_size), [], []]:
            begun = [image if isinstance(image, Future) else self.begin([image])[0] for _, image in batch]
            submitted.append([(i, future) for (i, _), future in zip(batch, begun)])
            if len(submitted) > 2:
                stop_if_asked("all scores of finished shards are kept: the same command goes on")
                futures = submitted.popleft()
                if skip_bad:
                    futures = [item for item in futures if not isinstance(item[1].exception(), BadImage)]
                yield [(position, future.result()) for position, future in futures]
                if self.progress is not None:
                    self.progress.update(len(futures))

    def decode_and_prepare(self, image):
        return self.prepare(decode_image(image))

    def prepare(self, image):
        """OpenAI CLIP's transform: PIL image → float32 (3, size, size)."""
        image = center_crop(resize_shorter(image, self.size), self.size).convert("RGB")
        return normalize(to_tensor(image), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def encode_images(self, images: list):
        return images

    def encode_prompts(self, prompts: list[str]):
        return prompts

    def stack(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(pixels).to(self.device, self.dtype)


class FunctionReward(RewardModel):
    """The user's own: `function(images, prompts)`, or a class that is made once with `device` and `batch_size` and has
    such a `score`. If it has a parameter `rows`, that is the whole row of each image's prompt, as a dict."""

    def __init__(self, name: str, batch_size: int, device="cpu"):
        file, function, settings = split_function(name)
        if not Path(file).is_file():
            raise SystemExit(f"reward {name}: no file {file}")
        try:
            module = import_file(str(Path(file).resolve()))
        except (Exception, SystemExit) as error:  # the file may call sys.exit()
            problem = f"{file} cannot be imported: {type(error).__name__}: {one_line(error)}"
            raise SystemExit(f"reward {name}: {problem}") from None
        self.function = getattr(module, function, None)
        if not callable(getattr(self.function, "score", None) if inspect.isclass(self.function) else self.function):
            raise SystemExit(f"reward {name}: {file} has no function {function!r}, and no class of it with a `score`")
        called = self.function.score if inspect.isclass(self.function) else self.function
        self.takes_rows = "rows" in inspect.signature(called).parameters
        self.name, self.batch_size, self.device = name, batch_size, torch.device(device)
        self.settings = self.read_settings(settings)
        self.identity = short_hash(b"".join(path.read_bytes() for path in source_files(Path(file))))

    def paths(self) -> dict[str, str]:
        """The settings that name a file or a folder."""
        return {key: value for key, value in self.settings.items() if isinstance(value, str) and os.path.exists(value)}

    def read_settings(self, given: dict[str, str]) -> dict:
        """The settings in the types of the class's parameters; exits with one line if one is unknown or wrong."""
        if not inspect.isclass(self.function):
            if given:
                raise SystemExit(f"reward {self.name}: a function takes no settings, only a class does")
            return {}
        known = inspect.signature(self.function, eval_str=True).parameters
        names = [key for key, p in known.items() if key not in ("device", "batch_size") and p.kind != p.VAR_KEYWORD]
        for key, text in given.items():
            if key not in names:
                what = f"its settings are {', '.join(names)}" if names else "it has none"
                raise SystemExit(f"reward {self.name}: there is no setting {key}; {what}")
            try:
                given[key] = typed_setting(text, known[key])
            except ValueError as error:
                raise SystemExit(f"reward {self.name}: setting {key}: {one_line(error)}") from None
        return given

    def prepare(self, image):
        return image

    def score(self, images: list, prompts: list[str], skip_bad: bool = False, rows: list[dict] | None = None) -> list:
        """A number for each image; or a dict of numbers, where `rows` are given. A NaN in it means: does not apply."""
        if inspect.isclass(self.function):
            made = self.call(self.function, device=self.device, batch_size=self.batch_size, **self.settings)
            self.function = made.score
        given = rows or [{"prompt": prompt} for prompt in prompts]
        scores = [math.nan for _ in zip(images, prompts, strict=True)]
        for batch in self.prepared_batches(images, skip_bad):
            values = self.fitting(self.rewards, [(image, prompts[i], given[i]) for i, image in batch])
            for (position, _), value in zip(batch, values):
                scores[position] = self.checked(value, prompts[position], several=rows is not None)
        return scores

    def rewards(self, batch: list[tuple]) -> list:
        """What the function returns for (image, prompt, row)."""
        images, prompts, rows = map(list, zip(*batch))
        values = self.call(self.function, images, prompts, **({"rows": rows} if self.takes_rows else {}))
        if isinstance(values, (dict, str)) or not hasattr(values, "__iter__"):
            raise SystemExit(f"reward {self.name}: returns {type(values).__name__}: it must be a list of numbers")
        values = list(values)
        if len(values) != len(batch):
            raise SystemExit(f"reward {self.name}: {len(values)} scores for {len(batch)} images")
        return values

    def call(self, function: Callable, *arguments, **more):
        """Calls a function of the user's file; exits with one line if it fails."""
        try:
            return function(*arguments, **more)
        except torch.OutOfMemoryError:
            raise  # a smaller batch may fit
        except (Exception, SystemExit) as error:  # of the user's code: say where
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {one_line(error)} ({frame.filename}, line {frame.lineno})"
            raise SystemExit(system_problem(error) or f"reward {self.name}: fails: {message}") from None

    def checked(self, value, prompt: str, several: bool) -> float | dict[str, float]:
        """The value as a finite float, or a dict of floats; exits with one line if it is neither."""
        what, is_dict = f"the score of prompt {prompt!r} is {value}", isinstance(value, dict)
        if is_dict and not several:
            raise SystemExit(f"reward {self.name}: {what}: a ranking takes one number")
        try:
            numbers = {str(key): float(number) for key, number in (value if is_dict else {"": value}).items()}
        except (TypeError, ValueError):
            raise SystemExit(f"reward {self.name}: {what}: it must be a number") from None
        if not all(np.isfinite(np.float32(number)) or is_dict and math.isnan(number) for number in numbers.values()):
            raise SystemExit(f"reward {self.name}: {what}: it must be a finite number")
        return numbers if is_dict else numbers[""]


def typed_setting(text: str, parameter: inspect.Parameter) -> bool | int | float | str:
    """A setting in the type of its parameter, by annotation or default. Raises ValueError if it cannot be."""
    kind = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
    if get_origin(kind) in (Union, UnionType):  # float | None
        kind = get_args(kind)[0]
    if kind in (int, float):
        return kind(text)
    choices = {"true": True, "false": False} if kind is bool else {}
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
    if choices and text not in choices:
        raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
    return choices.get(text, text)


def source_files(file: Path) -> list[Path]:
    """A Python file and those beside it that it imports, directly or through another one; of a package, all files."""
    found = [file]
    for path in found:
        names = {}
        for node in ast.walk(ast.parse(path.read_bytes())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names |= dict.fromkeys(module.partition(".")[0] for module in modules if module)
        for name in names:
            beside = [file.with_name(f"{name}.py"), *sorted(file.with_name(name).rglob("*.py"))]
            found += [other for other in beside if other.is_file() and other not in found]
    return found


@cache
def import_file(file: str):
    """Runs a Python file once, as a module that can import the files beside it."""
    spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up here
    sys.path.append(str(Path(file).parent))
    spec.loader.exec_module(module)
    return module


class HPSReward(RewardModel):
    """HPSv2 and v2.1 (Wu et al., 2023): the cosine of CLIP ViT-H/14, about 0.2 to 0.35, as `hpsv2.score` gives it
    (`hpsv2.evaluate` shows it times 100)."""

    FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
    # HPSv2's tokenizer takes these words in a prompt as its special tokens, unless they follow punctuation. OpenAI's
    # words for them ("<|endoftext|>") are ordinary text to it.
    SPECIAL = re.compile(r"(?<![^\s\w])(?<!_)((?:<(?:start|end)_of_text>)+)")

    def load(self):
        weights = self.load_pickle(self.FILES[self.kind.removesuffix("_antialias")])["state_dict"]
        config = transformers.CLIPConfig.from_pretrained(self.source_of("config.json"))
        self.size = config.vision_config.image_size
        self.model = self.load_model(transformers.CLIPModel, config=config, state_dict=hf_clip_weights(weights))
        self.tokenizer = self.load_tokenizer()

    def prepare(self, image) -> torch.Tensor:
        """Resizes the longer side to 224 and pads with black. torchvision did not antialias tensors when the model was
        trained and its published scores were made, so neither does this."""
        pixels = to_tensor(image.convert("RGB"))
        scale = self.size / max(pixels.shape[1:])
        if scale != 1:
            size = [max(round(side * scale), 1) for side in pixels.shape[1:]]
            pixels = resize(pixels, size, InterpolationMode.BICUBIC, antialias=self.kind.endswith("_antialias"))
        high, wide = self.size - pixels.shape[1], self.size - pixels.shape[2]
        pixels = pad(pixels, [wide // 2, high // 2, wide - wide // 2, high - high // 2])
        return normalize(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return unit(self.model.get_image_features(self.stack(pixels)).pooler_output)

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        # Attention is causal and the feature is that of the first end token, so padding to its right has no effect.
        rows = [torch.tensor(row) for row in self.tokenize(prompts)]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return unit(self.model.get_text_features(tokens.to(self.device)).pooler_output)

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = []
        for prompt in map(clean_text, prompts):
            row = []
            for part in self.SPECIAL.split(prompt):
                if self.SPECIAL.fullmatch(part):
                    row += [start if word == "start" else end for word in re.findall("start|end", part)]
                else:
                    options = {"add_special_tokens": False, "split_special_tokens": True}
                    row += self.tokenizer(part, truncation=True, max_length=75, **options).input_ids
            rows.append([start, *row[:75], end])
        return rows

    def compare(self, images: torch.Tensor, texts: list[torch.Tensor]) -> torch.Tensor:
        return (images * torch.stack(texts)).sum(dim=-1)


class PickScoreReward(HPSReward):
    """PickScore (Kirstain et al., 2023): exp(logit scale) · cosine of CLIP ViT-H/14, about 20 to 23."""

    def load(self):
        self.use_clip(self.load_model(transformers.CLIPModel, self.checkpoint, torch.float32))

    def use_clip(self, model: torch.nn.Module) -> None:
        # Read in float32: bfloat16 turns the scale of 100 into 99, a difference as large as those between images.
        self.logit_scale = model.logit_scale.exp().item()
        self.model = self.ready(model, self.dtype)
        self.tokenizer = self.load_tokenizer()
        # The PIL backend is bit-exact with the transform that the published scores were made with.
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(
            self.source_of("preprocessor_config.json"), backend="pil"
        )

    def prepare(self, image) -> torch.Tensor:
        image = resize_shorter(image.convert("RGB"), self.image_processor.size["shortest_edge"])
        image.info.pop("transparency", None)  # of a palette image: the processor would blend it, PickScore's did not
        return self.image_processor(image, do_resize=False, return_tensors="pt").pixel_values[0]

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        return self.tokenizer(prompts, truncation=True, max_length=77).input_ids

    def compare(self, images: torch.Tensor, texts: list[torch.Tensor]) -> torch.Tensor:
        return self.logit_scale * super().compare(images, texts)


class MPSReward(PickScoreReward):
    """MPS (Zhang et al., 2024), the overall model: exp(logit scale) · cosine like PickScore, but the image's tokens
    attend to the prompt's before they are compared with it.

    They attend to those tokens of the prompt that have to do with the condition, a list of what people judge. A token's
    similarity is its largest dot product with a token of the condition; divided by the largest of the prompt, it must
    be above a threshold: 0.3 in the official evaluation (`mps`), 0.01 in the official model class (`mps_t0.01`).

    The official code divides by the largest of the whole batch. Where it scores one prompt at a time, as its evaluation
    does, that is the same; here a score never depends on its batch.
    """

    CONDITION = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    )
    THRESHOLDS = {"mps": 0.3, "mps_t0.01": 0.01}
    FILE = "MPS_overall_checkpoint.pth"  # the official checkpoint: a pickled module

    def load(self):
        pickled = os.path.join(self.checkpoint, self.FILE)
        weights = read_pickled_weights(pickled) if os.path.exists(pickled) else checkpoint_weights(self.checkpoint)
        config = transformers.CLIPConfig.from_pretrained(self.source_of("config.json"))
        positions = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
        clip, head = mps_weights(weights, positions)
        self.use_clip(self.load_model(transformers.CLIPModel, config=config, state_dict=clip, dtype=torch.float32))
        self.head = MPSHead(config.projection_dim, positions)
        self.head.load_state_dict(head)
        self.ready(self.head, self.dtype)
        self.condition = self.text_features([self.CONDITION])[0][0].float()

    def text_features(self, prompts: list[str]) -> list[torch.Tensor]:
        """Of all 77 tokens, padding included, (n, 77, dim); and of the end token, (n, dim)."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        output = self.model.text_model(tokens.input_ids.to(self.device))
        return [self.model.text_projection(part) for part in (output.last_hidden_state, output.pooler_output)]

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        # All tokens, and without the layer norm that CLIP puts behind its pooled one.
        return self.model.visual_projection(self.model.vision_model(self.stack(pixels)).last_hidden_state)

    def encode_prompts(self, prompts: list[str]) -> list:
        tokens, end = self.text_features(prompts)
        similarity = (tokens.float() @ self.condition.T).amax(dim=-1)
        seen = similarity / similarity.amax(dim=-1, keepdim=True) > self.THRESHOLDS[self.kind]
        return list(zip(tokens, seen, unit(end)))

    def compare(self, images: torch.Tensor, texts: list) -> torch.Tensor:
        tokens, seen, end = zip(*texts)
        return super().compare(unit(self.head(images, torch.stack(tokens), torch.stack(seen))[:, 0]), end)


class MPSHead(torch.nn.Module):
    """MPS's `cross_model`: four layers of attention to the text and of attention among the image's tokens.

    `forward` takes image tokens (n, positions, dim), text tokens (n, t, dim) and which of these are seen, bool (n, t).
    It returns image tokens."""

    def __init__(self, dim: int, positions: int):
        super().__init__()
        layers = [{"text": MPSAttention(dim, 0), "image": MPSAttention(dim, positions)} for _ in range(4)]
        self.layers = torch.nn.ModuleList(map(torch.nn.ModuleDict, layers))

    def forward(self, images: torch.Tensor, texts: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            images = layer["image"](layer["text"](images, texts, seen[:, None, None]))
        return images


class MPSAttention(torch.nn.Module):
    """Attention to text tokens, or with `positions` among image tokens with rotary positions, and beside it a SwiGLU
    feed-forward. All heads, 64 wide, share one key and one value."""

    def __init__(self, dim: int, positions: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim)
        self.query = torch.nn.Linear(dim, dim, bias=False)
        self.key_value = torch.nn.Linear(dim, 128, bias=False)
        self.out = torch.nn.Linear(dim, dim, bias=False)
        self.ff_in = torch.nn.Linear(dim, 8 * dim, bias=False)
        self.ff_out = torch.nn.Linear(4 * dim, dim, bias=False)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(positions, 64) if positions else None)

    def forward(self, images: torch.Tensor, texts=None, seen=None) -> torch.Tensor:
        inputs = self.norm(images)
        query = self.query(inputs).unflatten(-1, (-1, 64))  # (n, positions, heads, 64)
        key, value = self.key_value(inputs if texts is None else texts).chunk(2, dim=-1)
        if texts is None:
            query = query * self.cos[:, None] + rotate_half(query) * self.sin[:, None]
            key = key * self.cos + rotate_half(key) * self.sin
        # With one key and one value, the heads of a token are no more than further queries of one head.
        query, key, value = query.flatten(1, 2)[:, None], key[:, None], value[:, None]
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
        inner, gate = self.ff_in(inputs).chunk(2, dim=-1)
        feed_forward = self.ff_out(torch.nn.functional.silu(gate) * inner)
        return images + self.out(attended.reshape(images.shape)) + feed_forward


class CLIPScoreReward(HPSReward):
    """CLIPScore as Hessel et al. (2021) define it: 2.5 · max(cosine, 0) of CLIP ViT-B/32, "A photo depicts" first."""

    prepare = RewardModel.prepare

    def load(self):
        self.model = self.load_model(transformers.CLIPModel, self.checkpoint)
        self.size = self.model.config.vision_config.image_size
        self.tokenizer = self.load_tokenizer()

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        texts = [clean_text(f"A photo depicts {prompt}") for prompt in prompts]
        return self.tokenizer(texts, truncation=True, max_length=77).input_ids

    def compare(self, images: torch.Tensor, texts: list[torch.Tensor]) -> torch.Tensor:
        return 2.5 * super().compare(images, texts).clamp(min=0)


class AestheticReward(RewardModel):
    """LAION aesthetic predictor v2 (sac+logos+ava1, linear MSE): about 1 to 10; it ignores the prompt."""

    def load(self):
        weights = checkpoint_weights(self.checkpoint)
        head = split_keys(weights, "layers.")
        config = transformers.CLIPVisionConfig.from_pretrained(self.checkpoint)
        self.size = config.image_size
        self.model = self.load_model(transformers.CLIPVisionModelWithProjection, config=config, state_dict=weights)
        self.head = self.ready(linear_head(config.projection_dim, head))

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return self.head(unit(self.model(self.stack(pixels)).image_embeds))[:, 0]

    def compare(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return images


class ImageRewardReward(RewardModel):
    """ImageReward v1.0 (Xu et al., 2023): BLIP's text encoder attends to the image, a linear head rates it; -2 to 2."""

    # zai-org/ImageReward has no config.json. Its image encoder is ViT-L/16; the epsilon is not BlipVisionConfig's
    # default, which would shift the features by 7e-3. Its text encoder is BERT base with two more tokens.
    VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    VISION |= {"patch_size": 16, "image_size": 224, "layer_norm_eps": 1e-6}
    TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    TEXT |= {"vocab_size": 30524, "max_position_embeddings": 512, "layer_norm_eps": 1e-12}

    def load(self):
        vision, text, head = blip_weights(self.load_pickle("ImageReward.pt"))
        if self.source_of("config.json") == self.checkpoint:
            config = transformers.BlipConfig.from_pretrained(self.checkpoint)
        else:
            config = transformers.BlipConfig(vision_config=self.VISION, text_config=self.TEXT)
        self.size = config.vision_config.image_size
        self.vision = self.load_model(transformers.BlipVisionModel, config=config.vision_config, state_dict=vision)
        self.text = self.load_model(
            transformers.BlipTextModel, config=config.text_config, state_dict=text, add_pooling_layer=False
        )
        self.head = self.ready(linear_head(config.text_config.hidden_size, head))
        self.tokenizer = self.load_tokenizer()
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return self.vision(self.stack(pixels)).last_hidden_state

    def encode_prompts(self, prompts: list[str]) -> list:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return list(zip(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)))

    def compare(self, images: torch.Tensor, texts: list) -> torch.Tensor:
        # The configuration names a decoder. It runs as an encoder, which sees the text in both directions.
        ids, mask = map(torch.stack, zip(*texts))
        output = self.text(ids, attention_mask=mask, encoder_hidden_states=images, is_decoder=False)
        return (self.head(output.last_hidden_state[:, 0].float())[:, 0] - 0.16717362830052426) / 1.0333394966054072


class VQAScoreReward(RewardModel):
    """VQAScore (Lin et al., 2024) of CLIP-FlanT5: the probability of "Yes" (and the end) as the answer, 0 to 1."""

    BEFORE = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: "
    )
    AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '

    def load(self):
        weights = checkpoint_weights(self.checkpoint)
        vision = split_keys(weights, "vision_tower.vision_tower.")
        projector = split_keys(weights, "mm_projector.")
        self.tokenizer = self.load_tokenizer()
        config = transformers.T5Config.from_pretrained(self.checkpoint)
        for key in ("shared.weight", "lm_head.weight"):
            if len(weights[key]) != config.vocab_size:
                raise ValueError(f"mismatched keys: {key} has {len(weights[key])} rows, not {config.vocab_size}")
            # As in the official code: the rows that pad T5's vocabulary to 32128 must not get any probability.
            weights[key] = weights[key][: len(self.tokenizer)]
        weights.pop("embed_tokens.weight", None)  # this one and the next two are the same tensor as shared.weight
        weights["encoder.embed_tokens.weight"] = weights["decoder.embed_tokens.weight"] = weights["shared.weight"]
        config.vocab_size = len(self.tokenizer)
        config.tie_word_embeddings = config.scale_decoder_outputs = False
        self.t5 = self.load_model(transformers.T5ForConditionalGeneration, config=config, state_dict=weights)
        tower = config.mm_vision_tower  # openai/clip-vit-large-patch14-336
        vision_config = transformers.CLIPVisionConfig.from_pretrained(tower)
        if not vision:  # training does not change the tower, so a checkpoint may leave it out
            vision = checkpoint_weights(tower)
            vision = {key: value for key, value in vision.items() if key.startswith("vision_model.")}
        self.vision = self.load_model(transformers.CLIPVisionModel, config=vision_config, state_dict=vision)
        layers = [torch.nn.Linear(width, config.d_model) for width in (vision_config.hidden_size, config.d_model)]
        self.projector = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])
        self.projector.load_state_dict(projector)
        self.ready(self.projector, self.dtype)
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(tower, backend="pil")
        self.answer = torch.tensor(self.tokenizer("Yes").input_ids, device=self.device)

    def prepare(self, image) -> torch.Tensor:
        image = image.convert("RGB")
        side = max(image.size)
        square = PILImage.new("RGB", (side, side), tuple(int(255 * mean) for mean in OPENAI_CLIP_MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self.image_processor(square, return_tensors="pt").pixel_values[0]

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        hidden = self.vision(self.stack(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        return self.projector(hidden)

    def encode_prompts(self, prompts: list[str]) -> list:
        # The text before and the text after the image are tokenised apart, so an end token precedes the image too.
        return [
            [torch.tensor(self.tokenizer(text).input_ids, device=self.device) for text in (self.BEFORE, after)]
            for after in map(self.AFTER.format, prompts)
        ]

    def compare(self, images: torch.Tensor, texts: list) -> torch.Tensor:
        embed = self.t5.get_input_embeddings()
        rows = [torch.cat([embed(before), image, embed(after)]) for image, (before, after) in zip(images, texts)]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(inputs.shape[1], device=self.device) < lengths[:, None]
        answer = self.answer.repeat(len(rows), 1)
        logits = self.t5(inputs_embeds=inputs, attention_mask=mask.long(), labels=answer).logits.float()
        return logits.log_softmax(dim=-1).gather(-1, answer[..., None]).mean(dim=(1, 2)).exp()


class VLMReward(RewardModel):
    """Asks an image-text-to-text model of transformers a question like VQAScore's: the probability of "Yes" as the
    first token. A variant: its numbers are not those of CLIP-FlanT5."""

    QUESTION = 'Does this image show "{}"? Answer the question with Yes or No.'

    def load(self):
        self.processor = transformers.AutoProcessor.from_pretrained(self.checkpoint)
        self.processor.tokenizer.padding_side = "left"  # the answer follows the last token
        self.model = self.load_model(transformers.AutoModelForImageTextToText, self.checkpoint)
        self.yes = self.processor.tokenizer("Yes", add_special_tokens=False).input_ids[0]

    def prepare(self, image):
        return image.convert("RGB")

    def encode_prompts(self, prompts: list[str]) -> list[str]:
        contents = [[{"type": "image"}, {"type": "text", "text": self.QUESTION.format(text)}] for text in prompts]
        return [
            self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            for content in contents
        ]

    def compare(self, images: list, texts: list[str]) -> torch.Tensor:
        images = [[image] for image in images]  # a flat list would be many images for the first text
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.device, self.dtype), logits_to_keep=1).logits[:, -1].float()
        return logits.softmax(dim=-1)[:, self.yes]


@cache
def workers() -> ThreadPoolExecutor:
    """The threads that decode and prepare images."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def one_ahead(items: Iterator, pool: ThreadPoolExecutor) -> Iterator:
    """The items of an iterator. A thread makes the next one while the caller works on this one."""
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = pool.submit(next, items, None)
        yield item


def batches(items: list, size: int):
    return (items[start : start + size] for start in range(0, len(items), size))


def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def clean_text(text: str) -> str:
    """OpenAI CLIP's cleaning of a prompt, which transformers' tokenizer does not do."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def resize_shorter(image: PILImage.Image, size: int) -> PILImage.Image:
    """Bicubic, the shorter side to `size`: the width in one call, then the height in another.

    In a single call Pillow does the same up to version 12. From 13.0 on it takes the height first if an image is more
    than twice as high as wide, which rounds other pixels. The models were trained, and published, with the old order.
    """
    wide, high = image.size
    new = (size, int(size * high / wide)) if wide <= high else (int(size * wide / high), size)
    if new == image.size:
        return image
    mode = {"LA": "La", "RGBA": "RGBa"}.get(image.mode, image.mode)  # in which Pillow resizes them
    narrow = image.convert(mode).resize((new[0], high), PILImage.Resampling.BICUBIC)
    return narrow.resize(new, PILImage.Resampling.BICUBIC).convert(image.mode)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """The second half of the last dimension, negated, before the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def checkpoint_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """All tensors of a transformers checkpoint (a folder or a Hub id), from safetensors if there are any."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        folder = (
            checkpoint if os.path.isdir(checkpoint) else HfApi().snapshot_download(checkpoint, allow_patterns=[pattern])
        )
        weights = {}
        for file in sorted(Path(folder).glob(pattern)):
            safe = file.suffix == ".safetensors"
            weights |= load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        if weights:  # older versions of transformers saved the position_ids, which are no weights
            return {key: value for key, value in weights.items() if not key.endswith("position_ids")}
    raise FileNotFoundError("no model*.safetensors and no pytorch_model*.bin in it")


class StandIn:
    """Stands for a class or a function that a pickle names. To call it does nothing."""

    def __init__(self, *arguments, **options):
        pass

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {})


class TensorUnpickler(pickle.Unpickler):
    """Reads what torch.save wrote (as a zip, since PyTorch 1.6) and runs none of the code that the pickle names.

    Tensors are made of the archive's bytes. Names in the packages that a pickled network consists of become StandIn.
    Any other name is an error."""

    PACKAGES = ("torch", "transformers", "trainer")  # trainer: MPS's own
    KNOWN = {
        "collections.OrderedDict": OrderedDict,
        "builtins.set": set,
        "__builtin__.set": set,  # its name in Python 2, which pickles keep
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_tensor_v2": lambda data, start, size, stride, *_: data.as_strided(size, stride, start),
        "torch.DoubleStorage": torch.float64,
        "torch.FloatStorage": torch.float32,
        "torch.HalfStorage": torch.float16,
        "torch.BFloat16Storage": torch.bfloat16,
        "torch.LongStorage": torch.int64,
    }

    def __init__(self, archive: zipfile.ZipFile):
        pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "data.pkl")
        super().__init__(BytesIO(archive.read(pickled)))
        self.read = cache(lambda key: bytearray(archive.read(f"{pickled.removesuffix('data.pkl')}data/{key}")))

    def persistent_load(self, reference) -> torch.Tensor:
        _, dtype, key, _, _ = reference
        return torch.frombuffer(self.read(key), dtype=dtype)

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" in self.KNOWN:
            return self.KNOWN[f"{module}.{name}"]
        if module.partition(".")[0] not in self.PACKAGES:
            raise pickle.UnpicklingError(f"its pickle names {module}.{name}, which no network needs; nothing was run")
        return StandIn


def read_pickled_weights(file: str) -> dict[str, torch.Tensor]:
    """The tensors of a pickled module, or of a pickled state dict, under the keys of the state dict."""
    with zipfile.ZipFile(file) as archive:
        content = TensorUnpickler(archive).load()

    def walk(module, prefix: str):
        for kind in ("_parameters", "_buffers"):
            yield from ((prefix + name, value) for name, value in vars(module).get(kind, {}).items())
        for name, child in vars(module).get("_modules", {}).items():
            yield from walk(child, f"{prefix}{name}.") if child is not None else ()

    found = content.items() if isinstance(content, dict) else walk(content, "")
    # Buffers may be None. Older versions of transformers saved the position_ids, which are no weights.
    return {key: value for key, value in found if torch.is_tensor(value) and not key.endswith("position_ids")}


def split_keys(weights: dict, prefix: str) -> dict:
    """Takes the tensors under a prefix out of `weights`."""
    return {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}


def linear_head(width: int, weights: dict) -> torch.nn.Sequential:
    """The head of the aesthetic predictor and of ImageReward: five linear layers, some with dropout between them."""
    sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    head = torch.nn.Sequential()
    for name, size in sizes.items():
        head.add_module(name, torch.nn.Linear(*size))
    head.load_state_dict(weights)
    return head


def rename(key: str, renames: str) -> str:
    """Replaces parts of a key in turn; `renames` holds `old=new` words."""
    for word in renames.split():
        key = key.replace(*word.split("="))
    return key


def hf_clip_weights(weights: dict) -> dict:
    """open_clip's state dict under the names of transformers' transformers.CLIPModel."""
    renames = """.transformer.resblocks.=.encoder.layers. .ln_pre.=.pre_layrnorm. .ln_post.=.post_layernorm.
        .ln_final.=.final_layer_norm. .ln_1.=.layer_norm1. .ln_2.=.layer_norm2. .attn.=.self_attn. .mlp.c_fc.=.mlp.fc1.
        .mlp.c_proj.=.mlp.fc2. .class_embedding=.embeddings.class_embedding .conv1.=.embeddings.patch_embedding.
        .token_embedding.=.embeddings.token_embedding. .positional_embedding=.embeddings.position_embedding.weight"""
    projections = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
    renamed = {}
    for key, value in weights.items():
        name = rename(f"vision_model.{key[7:]}" if key.startswith("visual.") else f"text_model.{key}", renames)
        if key == "logit_scale":
            renamed[key] = value
        elif key in projections:  # matrices in open_clip, linear layers in transformers
            renamed[projections[key]] = value.T
        elif ".in_proj_" in name:
            for part, tensor in zip("qkv", value.chunk(3)):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = tensor.contiguous()
        else:
            renamed[name] = value
    return renamed


def mps_weights(weights: dict, positions: int) -> tuple[dict, dict]:
    """MPS's state dict as those of transformers.CLIPModel and of MPSHead."""
    weights = {key.removeprefix("mps."): value for key, value in weights.items()}  # the prefix of the copy on the Hub
    clip, head = split_keys(weights, "model."), split_keys(weights, "cross_model.")
    if weights:
        raise ValueError(f"{len(weights)} unexpected keys: {', '.join(list(weights)[:3])}")
    renames = """.0.fn.=.text. .1.fn.=.image. .to_q.=.query. .to_kv.=.key_value. .to_out.=.out. .attn_out.=.out.
        .ff.0.=.ff_in. .ff.2.=.ff_out. .ff_out.1.=.ff_out."""
    head = {rename(key, renames): value for key, value in head.items()}
    for key in list(head):
        prefix, _, name = key.rpartition("image.")
        prefix += "image."
        if name == "fused_attn_ff_proj.weight":
            fused = head.pop(key)
            parts = fused.tensor_split((fused.shape[1], fused.shape[1] + 128))
            head |= {f"{prefix}{part}.weight": value for part, value in zip(("query", "key_value", "ff_in"), parts)}
        elif name == "rotary_emb.inv_freq":
            frequencies = head.pop(key)
            # The official code computes the angles in the type of the weights: in float16, they are off by up to 0.1.
            # It keeps them, so a pickled module may contain them.
            angles = head.pop(f"{prefix}pos_emb", None)
            if angles is None:
                angles = torch.outer(torch.arange(positions).to(frequencies), frequencies).repeat(1, 2)
            head |= {f"{prefix}cos": angles.float().cos(), f"{prefix}sin": angles.float().sin()}
    return clip, head


def blip_weights(weights: dict) -> tuple[dict, dict, dict]:
    """ImageReward's state dict as those of transformers.BlipVisionModel, BlipTextModel and the head."""
    weights = dict(weights)
    vision, text = split_keys(weights, "blip.visual_encoder."), split_keys(weights, "blip.text_encoder.")
    head = split_keys(weights, "mlp.layers.")
    for prefix in ("blip.vision_proj.", "blip.text_proj."):  # of BLIP's pretraining; the reward does not use them
        split_keys(weights, prefix)
    if weights:
        raise ValueError(f"{len(weights)} unexpected keys: {', '.join(list(weights)[:3])}")
    text.pop("embeddings.position_ids", None)
    renames = """.cls_token=.embeddings.class_embedding .pos_embed=.embeddings.position_embedding
        .patch_embed.proj.=.embeddings.patch_embedding. .blocks.=.encoder.layers. .norm1.=.layer_norm1.
        .norm2.=.layer_norm2. .norm.=.post_layernorm. .attn.qkv.=.self_attn.qkv. .attn.proj.=.self_attn.projection."""
    return {rename(f".{key}", renames)[1:]: value for key, value in vision.items()}, text, head


# ----------------------------------------------------------------------------------------------------------------------
# Shared: several rewards (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def reward_groups(names: list[str], size: int) -> list[list[str]]:
    """The rewards in groups of `size` models that are held at once, in order of their first names. A function of the
    user's own is alone: it gets images of its own, which it may change."""
    models = [name for name in names if name.partition("=")[0] in REWARD_MODELS]
    groups = [*batches(models, size), *([name] for name in names if name not in models)]
    return sorted(groups, key=lambda group: names.index(group[0]))


@contextmanager
def held_at_once(names: list[str]) -> Iterator[None]:
    """In this block, the line about a model that the device's memory does not hold says what to do."""
    try:
        yield
    except TooLarge as error:
        if len(names) == 1:
            raise
        raise SystemExit(f"{error}, beside {len(names) - 1} more: give a smaller --rewards_at_once") from None


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
