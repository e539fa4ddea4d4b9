# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate", "datasets", "diffusers", "filelock", "ftfy", "huggingface_hub", "matplotlib", "numpy", "peft",
#     "pillow", "protobuf", "pyyaml", "safetensors", "scipy", "sentencepiece", "torch", "torchvision",
#     "tqdm", "transformers", "trl",
# ]
# ///
"""Compares models on the same prompts and seeds: reward metrics, win rates, intervals, pictures. A model is the base, a
LoRA, a tuned UNet or transformer, another pipeline, or images that exist.

    python evaluate.py --loras rankdpo=outputs/rankdpo-sdxl dpo=user/dpo-lora \
        --models tuned=unet:mhdang/dpo-sdxl-text2image-v1 --prompts prompts.txt --max_prompts 500 \
        --metrics hpsv2.1 imagereward my_rewards.py:sharpness --output_dir outputs/evaluation

Each metric's mean comes with its lift over the baseline and the lift's 95 % interval: a paired bootstrap over prompts,
because all models draw the same prompts from the same noise, and over the seeds of a model that was trained several
times (name@seed). After a crash, run the same command again: a picture or a file of 64 scores that exists is done. With
`accelerate launch`, all processes draw and score. `--push_to_hub` also writes the results into the LoRA's card.
"""

import argparse
import csv
import glob
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
import re
import shutil
import signal
import sys
import textwrap
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from urllib.parse import urlsplit


if not sys.stderr.isatty():  # in a file of output all progress bars write a line every 30 seconds, not ten a second
    os.environ |= {"TQDM_MININTERVAL": "30", "TQDM_MAXINTERVAL": "60"} | os.environ
# bitsandbytes warns at every start that an optional kernel is missing, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import ftfy
import numpy as np
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets.config import HF_HUB_OFFLINE
from diffusers import AutoModel, DDPMScheduler, DiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from diffusers.training_utils import free_memory
from diffusers.utils import logging as diffusers_logging
from filelock import FileLock, Timeout
from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, cached_assets_path, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session
from matplotlib.figure import Figure
from PIL import Image as PILImage
from PIL import ImageDraw, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.special import ndtri, stdtrit
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, pad, resize, to_tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging
from trl import TrlParser


# diffusers warns about every text encoder that a LoRA does not train. All LoRAs of these trainers leave them alone.
logging.getLogger("diffusers.loaders.lora_base").addFilter(lambda record: "No LoRA keys" not in record.getMessage())
warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN slice")  # of a figure that applies to no image

BASE = "base"
# Keys of results.json that no model may have.
RESERVED = "n_prompts n_images baseline settings checkpoints seeds pairwise missing_images best_checkpoints".split()
NETWORK = re.compile(r"[^=]*=(unet|transformer):")  # a model of --models that replaces this component
RESULTS = ("results.json", "results.md", "grid.png", "curves.png")
STAGES = ("draw", "score", "report")
SCORES_PER_FILE = 64  # a crash loses at most these
FEW_PROMPTS, FEW_SEEDS = 25, 3  # an interval over fewer carries a warning
# What results.json adds to a metric's name: no metric may end so.
ENDINGS = "_(lift|win_rate|ci95|warning|category_mean|by_category|official|trained_on|seed_means|seed_sd)$"
# What decides whether a network fits into another's place.
NETWORK_SHAPE = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type", "num_layers")
LOADED = ("model", "revision", "variant", "network")  # settings of images that say which pipeline draws them
DRAWING_FLAGS = ("num_images_per_prompt", "num_inference_steps", "guidance_scale", "resolution")
COUNTED = ("index", "number", "image", "category_index", "category_image")  # fields of --images
LORA_FILE = "pytorch_lora_weights.safetensors"
# Parts of a LoRA's keys and types, and what such a file is: diffusers would leave it out, or a part of it.
OTHER_LORAS = {"hada_w": "a LoHa", "lokr_": "a LoKr", "dora_scale": "a DoRA", " F8_": "a LoRA in float8"}
RIGHT, WRONG = (0, 150, 80), (215, 50, 40)  # frames of pictures with a verdict of 1 and of 0
CARD_BEGIN = "<!-- evaluate.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what evaluate.py wrote. -->"
DEFAULT_METRICS = "hpsv2.1 pickscore imagereward aesthetic clipscore"  # models that one 24 GB GPU carries
HALF = "Type of the weights. Default: float32 on a CPU; on a GPU float16 for U-Nets, bfloat16 for transformers."
KNOWN_METRICS = "hpsv2, hpsv2.1, pickscore, imagereward, aesthetic, clipscore, vqascore, each also as name=checkpoint; "
KNOWN_METRICS += "metrics/FILE.py:NAME; file.py:function or file.py:Class,key=value of your own."
# Copied from build_synpic.COMPARE
COMPARE = {"at least": operator.ge, "greater than": operator.gt, "at most": operator.le, "less than": operator.lt}


# Copied from build_synpic.flag
def flag(default, help: str, group: str | None = None, *, min=None, above=None, max=None, below=None, **options):
    """A field of the command line, with its range. `group`: the title in --help of the flags from here on."""
    help += "" if default in (None, list) else f" Default: {' '.join(default()) if callable(default) else default}."
    metadata = {"help": help, "group": group, "limits": dict(zip(COMPARE, (min, above, max, below))), **options}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


@dataclass
class ScriptArguments:
    pretrained_model_name_or_path: str = flag("stabilityai/stable-diffusion-xl-base-1.0", "Id or path.", "Models")
    single_file_config: str | None = flag(None, "Configuration of a base in one file: folder or Hub id.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = flag(None, "Of a base in one file.")
    rescale_betas_zero_snr: bool = flag(False, "Zero terminal SNR, of a base in one file.")
    revision: str | None = flag(None, "Revision of the model on the Hub.")
    variant: str | None = flag(None, "Variant of the model's files, e.g. fp16.")
    loras: list[str] = flag(list, "name=folder, name=file or name=Hub id of each LoRA of the base.")
    models: list[str] = flag(list, "name=pipeline; name=unet:network or name=transformer:network; folder or Hub id.")
    images: list[str] = flag(list, "name=TEMPLATE of pictures that exist, e.g. a={index:05d}/samples/{number:04d}.png.")
    allow_missing: bool = flag(False, "Leave out pictures of --images that are missing, and count them.")
    eval_checkpoints: list[str] = flag(list, "name=output_dir of training runs. Plots all checkpoints as curves.")
    baseline: str = flag(BASE, "The model that lifts and win rates refer to.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = flag(None, HALF)
    prompts: str | None = flag(None, "File, URL, dataset's folder or Hub id, or a set's name. Required.", "Prompts")
    prompt_column: str | None = flag(None, "Column of the prompts. Default: prompt, or the named set's.")
    prompt_split: str | None = flag(None, "Split of a dataset. Default: train, or the named set's.")
    category_column: str | None = flag(None, "Column to break the results down by. Default: the named set's.")
    max_prompts: int | None = flag(None, "Use the first N distinct prompts.", min=1)
    num_images_per_prompt: int = flag(1, "Images per prompt and model, each with its own seed.", "Drawing", min=1)
    num_inference_steps: int = flag(50, "Denoising steps.", min=1)
    guidance_scale: float = flag(5.0, "Scale of classifier-free guidance.", min=-1e6, max=1e6)
    resolution: int | None = flag(None, "Pixels per side. Default: the model's own.", min=8, max=8192)
    max_sequence_length: int | None = flag(None, "Tokens of a prompt (SD3, Z-Image). Default: the pipeline's.", min=1)
    use_text_encoder_3: bool = flag(True, "SD3's T5. false: draw without it, as for a LoRA trained without it.")
    batch_size: int = flag(4, "Images drawn together.", min=1)
    seed: int = flag(0, "Seeds the images and the bootstrap.", min=0, max=2**32 - 1)
    image_seeds: Literal["own", "counted"] = flag("own", "A seed of its own for each image; or --seed + its number.")
    metrics: list[str] = flag(DEFAULT_METRICS.split, KNOWN_METRICS, "Metrics and output")
    reward_batch_size: int = flag(32, "Images scored together.", min=1)
    rewards_at_once: int = flag(1, "Reward models held at once: an image is read and decoded once for them.", min=1)
    output_dir: str = flag("outputs/evaluation", "Folder for images, scores, results and report.")
    stages: list[str] = flag(lambda: list(STAGES), "Stages to run.", choices=STAGES)
    task_index: int = flag(0, "Which of --num_tasks this is, from 0, e.g. $SLURM_ARRAY_TASK_ID.", min=0)
    num_tasks: int = flag(1, "Draw and score as one of N independent tasks.", min=1)
    grid_rows: int = flag(8, "Prompts in the picture.", min=1)
    grid_prompts: list[str] = flag(list, "Which ones: texts, or numbers as in the names of images. Default: spread.")
    push_to_hub: bool = flag(False, "Upload results.json, grid.png and card to the Hub.")
    hub_model_id: str | None = flag(None, "Repository of the one LoRA. Default: each LoRA's, where it is a Hub id.")
    hub_private_repo: bool = flag(False, "Make a new repository private.")

    def __post_init__(self):
        if not self.prompts:
            raise SystemExit(f"--prompts is missing: a file, a URL, a dataset, or one of {', '.join(PROMPT_SETS)}")
        complete_prompt_flags(self)
        if self.resolution and self.resolution % 8:
            raise SystemExit(f"--resolution {self.resolution}: must be a multiple of 8")
        if self.task_index >= self.num_tasks:
            raise SystemExit(f"--task_index {self.task_index}: must be less than --num_tasks {self.num_tasks}")
        if self.num_tasks > 1:  # a run of its own reports after all tasks
            self.stages = [stage for stage in self.stages if stage != "report"]


# Statistics -----------------------------------------------------------------------------------------------------------
def bootstrap_means(values: np.ndarray, seed: int | list[int], resamples: int = 10_000) -> np.ndarray:
    """Means over resampled prompts, (resamples, figures), of values (n_prompts, figures), NaN where a figure does not
    apply. One value per prompt: the images of a prompt are not independent of each other."""
    rng, n, block = np.random.default_rng(seed), len(values), 500
    known, means = np.isfinite(values), np.empty((resamples, values.shape[1]))
    filled = np.where(known, values, 0.0)
    for start in range(0, resamples, block):
        drawn = rng.integers(n, size=(block, n)) + n * np.arange(block)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=block * n).reshape(block, n).astype(np.float64)
        means[start : start + block] = (counts @ filled) / (counts @ known)
    return means


def with_seeds(values: np.ndarray, seeds: list[tuple], seed: int, resamples: int = 10_000) -> tuple:
    """A figure of models that were trained several times, for a bootstrap over their seeds: its rows, (seeds x seeds of
    the other model, n_prompts), and how much each counts in every resample. The same seeds are drawn alike: differences
    are paired. Few seeds, resampled, spread too little: their variance is short by (n − 1)/n, and 2.5 % of a normal
    distribution is not 2.5 % of Student's t with n − 1 degrees of freedom. What a seed changes is enlarged by both."""
    weights = np.ones((resamples, 1))
    for axis, n in enumerate(values.shape[:2]):
        if n > 1:
            factor = np.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975) / ndtri(0.975)
            changes = values.mean(axis=1 - axis, keepdims=True) - values.mean(axis=(0, 1))
            values = values + (factor - 1) * changes
            rng = np.random.default_rng([seed, int(short_hash("|".join(seeds[axis]))[:8], 16)])
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
            weights = (weights[:, :, None] * drawn[:, None]).reshape(resamples, -1)
    return values.reshape(-1, values.shape[-1]), weights


@np.errstate(invalid="ignore")
def estimate(columns: dict, strata: list[np.ndarray], seed: int, seeds: dict[str, tuple] | None = None) -> dict:
    """The mean of each figure over the strata's means, with its 95 % percentile interval. Prompts are resampled with
    replacement within each stratum, and seeds where there are several; all figures see the same draws, so differences
    are paired. columns: (model, other or None, figure) → (seeds, seeds of the other, n_prompts); strata: positions of
    the prompts of each; seeds: model → its seeds, if it has several. Returns (model, other or None) → {figure: mean,
    figure_ci95, and figure_warning where the interval says little}."""
    seeds_of = [[(seeds or {}).get(name) for name in (model, other)] for model, other, _ in columns]
    parts, weights = zip(*(with_seeds(values, of, seed) for values, of in zip(columns.values(), seeds_of)))
    flat, ends = np.ascontiguousarray(np.concatenate(parts).T), np.cumsum([len(part) for part in parts])[:-1]
    values = np.stack([values.mean(axis=(0, 1)) for values in columns.values()], axis=1)
    known = [np.isfinite(values[chosen]).sum(axis=0) for chosen in strata]
    # A figure that applies to no prompt of a stratum is left out of the mean over strata.
    means = np.nanmean([np.nanmean(values[chosen], axis=0) for chosen in strata], axis=0)
    draws = []
    for number, chosen in enumerate(strata):
        drawn = np.split(bootstrap_means(flat[chosen], [seed, number] if number else seed), ends, axis=1)
        draws.append(np.stack([(part * weight).sum(axis=1) for part, weight in zip(drawn, weights)], axis=1))
    intervals = np.nanpercentile(np.nanmean(draws, axis=0), [2.5, 97.5], axis=0).T
    found = {}
    for i, ((model, other, figure), of) in enumerate(zip(columns, seeds_of)):
        low, high = intervals[i]
        if figure in ("mean", "win_rate") and not np.any((values[:, i] < 0) | (values[:, i] > 1)):
            low, high = np.clip([low, high], 0.0, 1.0)  # few seeds spread more than shares can
        entry = found.setdefault((model, other), {})
        entry |= {figure: float(means[i]), f"{figure}_ci95": (float(low), float(high))}
        prompts = min((int(count[i]) for count in known if count[i]), default=0)
        if prompts < FEW_PROMPTS:
            where = "a category with " if len(strata) > 1 else ""
            entry[f"{figure}_warning"] = f"{where}only {prompts} prompt{'s' * (prompts != 1)}"
        elif any(trained and len(trained) < FEW_SEEDS for trained in of):
            entry[f"{figure}_warning"] = f"only {FEW_SEEDS - 1} seeds"
        elif high - low <= 1e-9 * max(abs(low), abs(high)):
            entry[f"{figure}_warning"] = "an interval of zero width"
    return found


def compare(scores: np.ndarray, baseline: np.ndarray) -> dict[str, np.ndarray]:
    """Lift and win rate (share of images that score higher; a tie counts half) of a model over another, image by image,
    on the same prompts and seeds: each (seeds, seeds of the other, n_prompts), of (seeds, n_prompts, n_images)."""
    ours, theirs = scores[:, None], baseline[None]
    # The same picture, scored in another batch, differs in the last digits.
    tie = np.abs(ours - theirs) <= 1e-6 * np.maximum(np.abs(ours), np.abs(theirs))
    lift = np.where(tie, 0.0, ours - theirs)
    return {"lift": per_prompt(lift), "win_rate": per_prompt((1 + np.sign(lift)) / 2)}


def per_prompt(scores: np.ndarray) -> np.ndarray:
    """The mean of each prompt's images, the last axis. An image counts if it does for all seeds, the first two axes."""
    known = np.isfinite(scores).all(axis=(0, 1))
    return np.nanmean(np.moveaxis(np.where(known, scores, np.nan), -1, 0), axis=0)


def summarize(results: dict, members: dict, categories: list | None, baseline: str, compared: list, seed: int) -> tuple:
    """All figures of all models, and of the `compared` models against each other. results: metric → training →
    (n_prompts, n_images); members: model → its trainings, name@seed. Returns the figures as results.json has them:
    model → {metric: mean, metric_ci95, metric_lift, …}; metric → model → other → {lift, lift_ci95, …}."""
    summary, pairwise, strata = {name: {} for name in members}, {}, {}
    for position, category in enumerate(categories or ()):
        strata.setdefault(category, []).append(position)
    seeds = {name: tuple(one.partition("@")[2] for one in group) for name, group in members.items() if len(group) > 1}
    for metric, scores in results.items():
        by_model = {name: np.stack([scores[training] for training in group]) for name, group in members.items()}
        columns = {(name, None, "mean"): per_prompt(ours[:, None]) for name, ours in by_model.items()}
        for name, other in itertools.permutations(by_model, 2):
            if other == baseline or {name, other} <= set(compared):
                figures = compare(by_model[name], by_model[other])
                columns |= {(name, other, figure): values for figure, values in figures.items()}
        everything = list(range(next(iter(columns.values())).shape[-1]))
        figures = estimate(columns, [everything], seed, seeds)
        parts = {category: estimate(columns, [chosen], seed, seeds) for category, chosen in strata.items()}
        macro = estimate(columns, list(strata.values()), seed, seeds) if strata else {}
        for name, entry in summary.items():
            entry |= named_figures(metric, figures, name, baseline)
            if name in seeds:
                means = [float(np.nanmean(one)) for one in columns[name, None, "mean"][:, 0]]
                entry |= {f"{metric}_seed_means": means, f"{metric}_seed_sd": float(np.std(means, ddof=1))}
            if strata:
                entry |= named_figures(f"{metric}_category_mean", macro, name, baseline)
                found = {c: part[name, None] | part.get((name, baseline), {}) for c, part in parts.items()}
                entry[f"{metric}_by_category"] = {c: {"n_prompts": len(strata[c])} | found[c] for c in strata}
        pairwise[metric] = {a: {b: figures[a, b] for b in compared if b != a} for a in compared}
    return summary, pairwise


def named_figures(metric: str, figures: dict, name: str, baseline: str) -> dict:
    """A model's figures as METRIC, METRIC_ci95, METRIC_lift, METRIC_lift_ci95, METRIC_win_rate, …"""
    figures = figures[name, None] | figures.get((name, baseline), {})
    return {metric + f"_{figure}".removeprefix("_mean"): value for figure, value in figures.items()}


# Stages: draw, score, report ------------------------------------------------------------------------------------------
def main(args: ScriptArguments) -> None:
    diffusers_logging.disable_progress_bar()  # of loading pipelines
    transformers_logging.disable_progress_bar()
    # Several processes talk through gloo if there is no GPU. The first to finish a stage may wait hours for the last.
    several = {"cpu": not torch.cuda.is_available(), "timeout": timedelta(days=1)}
    state = PartialState(**(several if "LOCAL_RANK" in os.environ else {}))
    lock = FileLock(Path(args.output_dir, f".lock-{args.task_index}" if args.num_tasks > 1 else ".lock"))
    # What is wrong with flags, files and folders is found before a model is loaded, by the main process alone.
    plan = [begin_run(args, state, lock) if state.is_main_process else None]
    rows, models = broadcast_object_list(plan)[0]
    if "draw" in args.stages:
        draw(args, rows, models, state)
        state.wait_for_everyone()
    if {*args.stages} & {"score", "report"}:
        score(args, rows, models, state)
        state.wait_for_everyone()
    if state.is_main_process and "report" in args.stages:
        report(args, rows, models)
    elif state.is_main_process:
        print(f"task {args.task_index} is done. Last: the same with --task_index 0 --num_tasks 1 --stages score report")
    lock.release()


def begin_run(args: ScriptArguments, state: PartialState, lock: FileLock) -> tuple[list[dict], dict[str, dict]]:
    """Checks what can be checked before the work, locks the folder, and records what images are made with. Returns the
    rows of the prompts, and the models (see `read_models`), each with the settings of its images."""
    output_dir, keep = Path(args.output_dir), (args.category_column,) if args.category_column else ()
    if others := {path.name for path in output_dir.glob("[!.]*")} - {"images", "scores", *RESULTS}:
        raise SystemExit(f"--output_dir {output_dir} holds other files ({min(others)}): choose another folder")
    check_rewards(args.metrics)
    whole_rows = any(map(takes_rows, args.metrics)) or any("{row[" in template for template in args.images)
    rows, places = read_prompts(args.prompts, args.prompt_column, args.prompt_split, args.max_prompts, keep, whole_rows)
    args.grid_prompts = chosen_prompts(args, rows)
    for metric, name in itertools.product(args.metrics, ("check_rows", "prepare")):  # "prepare" may download weights
        try:
            if (function := hook(metric, name)) and (name == "check_rows" or "score" in args.stages):
                function(rows)
        except (ValueError, OSError) as error:  # so metrics say what is wrong; others are errors of their own
            raise SystemExit(f"metric {reward_name(metric)}: {one_line(error)}") from None
    models = read_models(args, rows, places)
    if args.baseline not in (names := [*models, *families(models)[0]]):
        raise SystemExit(f"--baseline {args.baseline}: no such model; the models are {', '.join(names)}")
    for name, model in models.items():
        folder, items = output_dir / "images" / name, itertools.chain(*image_shards(args, len(rows)))
        model.setdefault("pictures", {(i, n): (folder / f"{i:05d}_{n}.png", None) for i, n in items})
        model["settings"] = image_settings(args, rows, name, model, state.device)
    if args.push_to_hub and "report" in args.stages:  # a wrong token or name fails now, not after the work
        prepare_repositories(args, models)
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"--output_dir {output_dir} is in use by another run: wait for its end") from None
    with FileLock(output_dir / ".lock-images"):  # of tasks that start at once, one removes what is outdated
        for name, model in models.items():
            begin_images(args, name, model)
    return rows, models


def begin_images(args: ScriptArguments, name: str, model: dict) -> None:
    """Records what a model's images are made with. Removes those of other files under its name, as when a LoRA was
    trained again. Exits with one line if they were drawn with other settings, or with another base."""
    folder, wanted = Path(args.output_dir, "images", name), model["settings"]
    earlier = earlier_settings(args, name) or wanted
    changed = [key for key in {**earlier, **wanted} if earlier.get(key) != wanted.get(key)]
    own = {"lora", "network_files"} | ({"files"} if model["kind"] == "pipeline" else set())
    for key in changed:
        if key not in own or "draw" not in args.stages:
            problem = f"{folder} holds images of {name} made with {key} {earlier.get(key)}, not {wanted.get(key)}"
            raise SystemExit(f"{problem}: choose another --output_dir or another name, or delete that folder")
    if changed:
        print(f"{folder} was drawn with another model of this name: its images are drawn anew")
        for file in list(folder.glob("*.png")):  # settings.json stays: killed here, the next run goes on
            file.unlink()
    if model["kind"] != "images" and "draw" in args.stages:
        write_bytes(folder / "settings.json", json.dumps(wanted, indent=2).encode())


def earlier_settings(args: ScriptArguments, name: str) -> dict:
    file = Path(args.output_dir, "images", name, "settings.json")
    return json.loads(file.read_bytes()) if file.exists() else {}


def draw(args: ScriptArguments, rows: list[dict], models: dict, state: PartialState) -> None:
    """Draws the missing images, model by model. Loads a pipeline once for all models that follow each other in it.
    Batches belong to tasks and processes by number, and are drawn whole: an image depends neither on where a run was
    killed, nor on how many processes draw."""
    shards = image_shards(args, len(rows))[args.task_index :: args.num_tasks]
    own = [batch for shard in shards for batch in batches(shard, args.batch_size)]
    own, missing, writing = own[state.process_index :: state.num_processes], {}, []
    for name, model in ((name, model) for name, model in models.items() if model["kind"] != "images"):
        files = {item: model["pictures"][item][0] for batch in own for item in batch}
        missing[name] = {item: file for item, file in files.items() if not file.exists()}
    todo = [name for name in missing if missing[name]]
    for _, group in itertools.groupby(todo, key=lambda name: [models[name]["settings"].get(key) for key in LOADED]):
        names, pipeline = list(group), None
        free_memory()
        pipeline = load_pipeline(args, models[names[0]], state.device)
        for name in names[1:]:  # one that does not fit ends the run before anything is drawn; the first one below
            with fitted(models[name], pipeline):
                pass
        for name in names:
            needed = [batch for batch in own if not missing[name].keys().isdisjoint(batch)]
            bar = tqdm(needed, desc=f"draw {name}", unit="batch", disable=not state.is_local_main_process)
            with fitted(models[name], pipeline):
                for batch in bar:
                    images = dict(zip(batch, draw_batch(args, rows, models[name], pipeline, batch)))
                    for earlier in writing:  # threads encode and write a batch while the next one is drawn
                        earlier.result()
                    files = {item: missing[name][item] for item in batch if item in missing[name]}
                    writing = [WORKERS.submit(save_picture, images[item], file) for item, file in files.items()]
    for last in writing:
        last.result()


def draw_batch(args: ScriptArguments, rows: list[dict], model: dict, pipeline, batch: list) -> list:
    """The images of these (prompt, number). Where the device's memory runs out, half as many are drawn at once."""
    options, images = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}, []
    options |= {"height": args.resolution, "width": args.resolution} if args.resolution else {}
    if args.max_sequence_length and model["takes_length"]:
        options["max_sequence_length"] = args.max_sequence_length
    while todo := batch[len(images) : len(images) + args.batch_size]:
        prompts = [rows[i]["prompt"] for i, _ in todo]
        # An image has the same seed for all models. Generators are on the CPU: it does not depend on the kind of GPU.
        seeds = [args.seed + n for _, n in todo]  # as in benchmarks
        if args.image_seeds == "own":
            seeds = [int(short_hash(f"{args.seed}|{rows[i]['prompt']}|{n}")[:8], 16) for i, n in todo]
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with suppress(torch.OutOfMemoryError):
            images += pipeline(prompt=prompts, generator=noise, **options).images
            continue
        if len(todo) == 1:
            raise SystemExit(f"{model['source']}: the device's memory does not hold a single image")
        args.batch_size = len(todo) // 2
        tqdm.write(f"{model['source']}: out of memory: goes on with {args.batch_size} at once")
        free_memory()
    return images


def score(args: ScriptArguments, rows: list[dict], models: dict, state: PartialState) -> None:
    """Scores the images without a score. An image is read and decoded once for all metrics that are held together. A
    score belongs to the metric's settings and to what its images were drawn with, and is made anew with either."""
    shards = image_shards(args, len(rows))
    own = range(args.task_index, len(shards), args.num_tasks)
    jobs = list(itertools.product(models, own))[state.process_index :: state.num_processes]
    for metrics in batches(args.metrics, args.rewards_at_once):
        keys, todo = {}, {}
        for metric, name in itertools.product(metrics, models):
            depends = [reward_settings(metric), models[name]["settings"], rows if takes_rows(metric) else None]
            keys[metric, name] = short_hash(json.dumps(depends, sort_keys=True, default=str))
        for (name, s), metric in itertools.product(jobs, metrics):
            file = scores_file(args, metric, name, s)
            if not file.exists() or json.loads(file.read_bytes())["key"] != keys[metric, name]:
                if "score" not in args.stages:
                    raise SystemExit(f"{file} is missing: run the stages draw and score first")
                todo.setdefault((name, s), []).append(metric)
        needed = {*itertools.chain(*todo.values())}
        options = {"device": state.device, "batch_size": args.reward_batch_size}
        rewards = {metric: load_reward_model(metric, **options) for metric in metrics if metric in needed}
        opened = ((*job, *open_pictures(models, shards, job, rewards, todo[job])) for job in todo)
        opened = itertools.pairwise(itertools.chain(opened, [None]))  # the next pictures are decoded meanwhile
        hidden, label = not todo or not state.is_local_main_process, " ".join(map(reward_name, rewards))
        for (name, s, pictures, images), _ in tqdm(opened, label, len(todo), unit="part", disable=hidden):
            prompts, chosen = [rows[i]["prompt"] for i, _ in pictures], [rows[i] for i, _ in pictures]
            for metric in images:
                bad = {}
                scores = dict(zip(pictures, rewards[metric].score(images[metric], prompts, chosen, bad)))
                if bad:
                    file, _ = list(pictures.values())[min(bad)]
                    raise SystemExit(f"{name}: {file} cannot be read: {bad[min(bad)]}")
                content = {"key": keys[metric, name], "scores": [scores.get(item) for item in shards[s]]}
                write_bytes(scores_file(args, metric, name, s), as_json(content))
        del rewards, opened
        free_memory()


def open_pictures(models: dict, shards: list, job: tuple, rewards: dict, metrics: list) -> tuple[dict, dict]:
    """The pictures of a model and a shard, and for each metric their images, in preparation. The workers take their
    work in order: a file's decoding, once for all, has begun before another thread waits for it."""
    name, shard = job
    pictures = {item: models[name]["pictures"][item] for item in shards[shard] if item in models[name]["pictures"]}
    files = dict.fromkeys(file for file, _ in pictures.values())
    decoded = {file: WORKERS.submit(lambda file=file: decode_image(file.read_bytes())) for file in files}
    images = [lambda file=file, cell=cell: cut(decoded[file].result(), cell) for file, cell in pictures.values()]
    return pictures, {metric: rewards[metric].begin(images) for metric in metrics}


def report(args: ScriptArguments, rows: list[dict], models: dict) -> None:
    """Writes the results, the table and the pictures, and the LoRAs' cards on the Hub."""
    results, keys = collect_scores(args, rows, models)
    output_dir, metrics = Path(args.output_dir), list(results)
    for file in [*output_dir.rglob(".*.tmp"), output_dir / "curves.png"]:  # of killed runs; of earlier checkpoints
        file.unlink(missing_ok=True)
    categories = [str(row[args.category_column]) for row in rows] if args.category_column else None
    groups, compared = families(models)
    members = groups | {name: [name] for name in models}  # several trainings as one model, in front, and each alone
    summary, pairwise = summarize(results, members, categories, args.baseline, compared, args.seed)
    for name, metric in itertools.product(members, metrics):
        if any(metric in models[training].get("trained_on", ()) for training in members[name]):
            summary[name][f"{metric}_trained_on"] = True
    for metric, name in itertools.product(args.metrics, models):
        scores = {key: results[value][name] for key, value in keys[metric].items()}
        if figures := official_figures(args, metric, rows, categories, scores):
            summary[name][f"{reward_name(metric)}_official"] = figures
    checkpoints = {name: {"run": m["run"], "seen": m["seen"]} for name, m in models.items() if "run" in m}
    best = {found["run"]: {} for found in checkpoints.values()}  # of equal ones the earliest
    for run, metric in itertools.product(best, metrics):
        means = {name: summary[name][metric] for name, found in checkpoints.items() if found["run"] == run}
        if applies := [name for name, mean in means.items() if not math.isnan(mean)]:
            best[run][metric] = max(applies, key=means.get)
    record = {"n_prompts": len(rows), "n_images": len(rows) * args.num_images_per_prompt, "baseline": args.baseline}
    record |= {"settings": report_settings(args, rows, models), **summary, "pairwise": pairwise}
    missing = {name: n for name, model in models.items() if (n := record["n_images"] - len(model["pictures"]))}
    optional = {"seeds": groups, "checkpoints": checkpoints, "best_checkpoints": best, "missing_images": missing}
    record |= {key: value for key, value in optional.items() if value}
    content = as_json(record, indent=2)
    known = json.loads(content)  # None in place of NaN
    verdict = next((metric for metric in metrics if is_verdict(results[metric])), None)
    table = markdown_report(known, metrics, compared, verdict)
    write_bytes(output_dir / "results.json", content + b"\n")
    write_bytes(output_dir / "results.md", table.encode())
    pictured = [members[name][0] for name in compared]
    save_picture(grid_picture(args, rows, models, pictured, results.get(verdict)), output_dir / "grid.png")
    if checkpoints:
        save_picture(curves_picture(record, metrics), output_dir / "curves.png")
    print(table, ", ".join(str(output_dir / file) for file in RESULTS[: 4 if checkpoints else 3]), sep="\n", end="; ")
    print(f"what do people say? user_study.py serve --evaluation_dir {output_dir}, with the same flags for prompts")
    for name, model in models.items():
        if repo_id := model.get("repository"):
            publish(args, name, repo_id, known, table)


# Report ---------------------------------------------------------------------------------------------------------------
def report_settings(args: ScriptArguments, rows: list[dict], models: dict) -> dict:
    """The settings in results.json, which --push_to_hub publishes: of local folders and files only their names."""
    settings = {"prompts": short_hash("\n".join(row["prompt"] for row in rows)), "seed": args.seed}
    if drawn := [model["settings"] for model in models.values() if model["kind"] != "images"]:
        settings = {key: value for key, value in drawn[0].items() if key not in ("files", "lora")}
        settings["model"] = public_name(drawn[0]["model"])
    shown = {name: public_name(model["source"], model["kind"] == "images") for name, model in models.items()}
    settings["loras"] = {name: shown[name] for name, model in models.items() if model["kind"] == "lora"}
    settings["models"] = {name: f"{model['kind']} {shown[name]}" for name, model in models.items()}
    for metric in args.metrics:
        if own := plugin(metric):
            given = {key: public_name(value) if key in own.paths() else value for key, value in own.settings.items()}
            entry = {"sha256": own.identity} | ({"settings": given} if given else {})
            settings.setdefault("metrics", {})[reward_name(metric)] = entry
    return settings


def public_name(source: str, local: bool = False) -> str:
    return os.path.basename(source.rstrip("/")) if local or os.path.exists(source) else source


def markdown_report(record: dict, metrics: list[str], compared: list[str], verdict: str | None) -> str:
    """The tables of results.md."""
    summary, seeds = {name: record[name] for name in record if name not in RESERVED}, record.get("seeds", {})
    parts, over = [], f"over {record['n_prompts']} prompts, {record['n_images']} images:"
    for key in dict.fromkeys(key for entry in summary.values() for key in entry if key.endswith("_official")):
        by_model = {name: entry[key] for name, entry in summary.items() if key in entry}
        rows = [[name] for name in dict.fromkeys(itertools.chain(*by_model.values()))]
        for row, figures in itertools.product(rows, by_model.values()):
            row.append(as_text(figures.get(row[0]), ".4g"))
        parts.append(f"{key.removesuffix('_official')} as the benchmark reports it, {over}")
        parts.append(markdown_table(["", *by_model], rows))
    for name, count in record.get("missing_images", {}).items():
        parts.append(f"Of `{name}`, {count} of these images are missing and left out.")
    drawn = not any(text.startswith("images ") for text in record["settings"]["models"].values())
    parts.append(
        f"Prompts: {record['n_prompts']}, images per model: {record['n_images']}{', the same seeds for all' * drawn}. "
        f"Lift over `{record['baseline']}` and win rate against it, with paired bootstrap 95 % intervals over prompts"
        f"{', and over seeds where there are several' * bool(seeds)}; a tie counts half a win."
    )
    rows, interval, categories = [], "95 % interval", {}
    for metric in metrics:  # the categories in which a metric has a value: a benchmark's may be for one of them only
        found = [entry.get(f"{metric}_by_category", {}) for entry in summary.values()]
        categories[metric] = [c for c in found[0] if any(part[c]["mean"] is not None for part in found)]
        for name, entry in summary.items():
            label = f"{metric} (trained on)" if f"{metric}_trained_on" in entry else metric
            rows.append([name, label, *figure_cells(entry, metric)])
            if len(categories[metric]) > 1:
                mean = figure_cells(entry, f"{metric}_category_mean")
                rows.append([name, f"{label}, mean over categories", *mean])
    header = ["model", "metric", "mean", interval, "lift", interval, "win rate", interval]
    parts.append(markdown_table(header, [row for row in rows if row[2]]))
    if seeds:
        rows = []
        for name, metric in itertools.product(seeds, metrics):
            means, deviation = summary[name][f"{metric}_seed_means"], summary[name][f"{metric}_seed_sd"]
            rows.append([name, metric, ", ".join(as_text(mean, ".4f") for mean in means), as_text(deviation, ".4f")])
        parts.append("Several trainings (seeds) of a model; above, their scores are averaged:")
        parts.append(markdown_table(["model", "metric", "mean of each", "standard deviation"], rows))
    if best := record.get("best_checkpoints"):
        rows = [[run, *(found.get(metric, "") for metric in metrics)] for run, found in best.items()]
        parts.append("The best checkpoint of each run, chosen on these prompts: to judge it, take other prompts.")
        parts.append(markdown_table(["run", *metrics], rows))
    lone = {name for name in compared if "@" in name and name not in record.get("checkpoints", {})}
    for metric in metrics if len(compared) > 2 else ():
        pairs, rows = record["pairwise"][metric], [[name] for name in compared]
        for row, other in itertools.product(rows, compared):
            row.append(pair_cell(pairs[row[0]].get(other), bool(lone & {row[0], other})))
        parts.append(f"{metric}, row minus column (win rate of the row); bold where the interval excludes 0:")
        parts.append(markdown_table(["", *compared], rows))
    if lone:
        parts.append("The interval of a model of one seed says nothing about other trainings of it, and is never bold.")
    for metric in (metric for metric in metrics if len(categories[metric]) > 1):
        found, rows = [entry[f"{metric}_by_category"] for entry in summary.values()], []
        for c in categories[metric]:
            rows.append([c, found[0][c]["n_prompts"], *(as_text(part[c]["mean"], ".3f") for part in found)])
        parts += [f"{metric} by category:", markdown_table(["category", "prompts", *summary], rows)]
    if any(" ! |" in part for part in parts):
        few = f"fewer than {FEW_PROMPTS} prompts or {FEW_SEEDS} seeds"
        parts.append(f"! The interval says little: it is over {few}, or of zero width.")
    if verdict:
        parts.append(f"Frames in grid.png: green where `{verdict}` is 1, red where it is 0.")
    return "\n\n".join(parts) + "\n"


def as_text(figure: float | dict | None, form: str) -> str:
    if isinstance(figure, dict):  # HPSv2's figure of a style
        return f"{figure['mean']:.2f} ± {figure['std']:.2f}"
    return "" if figure is None else format(figure, form)


def figure_cells(entry: dict, key: str) -> list[str]:
    """Mean, lift and win rate with their intervals; the baseline has only the mean."""
    cells = []
    for name, form in ((key, ".4f"), (f"{key}_lift", "+.4f"), (f"{key}_win_rate", ".3f")):
        known = entry.get(name) is not None
        interval = " to ".join(format(end, form) for end in entry[f"{name}_ci95"]) if known else ""
        cells += [as_text(entry.get(name), form), interval + " !" * (known and f"{name}_warning" in entry)]
    return cells


def pair_cell(pair: dict | None, lone: bool) -> str:
    if pair is None or pair["lift"] is None:
        return ""
    low, high = pair["lift_ci95"]
    bold = "" if low <= 0 <= high or lone else "**"
    return f"{bold}{pair['lift']:+.4f}{bold} ({pair['win_rate']:.3f}){' !' if 'lift_warning' in pair else ''}"


def chosen_prompts(args: ScriptArguments, rows: list[dict]) -> list[int]:
    """The numbers of the prompts in the picture: --grid_prompts, or --grid_rows of them, spread over the list."""
    numbers = {str(number): number for number in range(len(rows))}
    numbers |= {row["prompt"]: number for number, row in enumerate(rows)}
    if unknown := [word for word in args.grid_prompts if word not in numbers]:
        raise SystemExit(f"--grid_prompts {unknown[0]}: neither one of the {len(rows)} prompts nor the number of one")
    spread = np.linspace(0, len(rows) - 1, min(args.grid_rows, len(rows))).astype(int)
    return [numbers[word] for word in args.grid_prompts] or spread.tolist()


def is_verdict(by_model: dict[str, np.ndarray]) -> bool:
    """Whether a metric says right or wrong, 1 or 0, of every image that it applies to."""
    values = np.stack(list(by_model.values()))
    return bool(np.isfinite(values).any() and np.isin(values[np.isfinite(values)], (0.0, 1.0)).all())


def grid_picture(args: ScriptArguments, rows: list, models: dict, pictured: list, verdicts: dict | None, cell=192):
    """Some prompts, one a row, their texts below. The models stand side by side, with the same seeds. A picture has a
    green or a red frame if there are `verdicts`: model → (n_prompts, n_images) of 1 and 0."""
    per_model, gap, top = min(args.num_images_per_prompt, 3), 12, 22
    width = len(pictured) * (per_model * cell + gap) - gap
    texts = {i: textwrap.wrap(rows[i]["prompt"], width // 7) for i in args.grid_prompts}
    canvas = PILImage.new("RGB", (width, top + sum(cell + 8 + 14 * len(text) for text in texts.values())), "white")
    drawing = ImageDraw.Draw(canvas)
    for column, name in enumerate(pictured):
        drawing.text((column * (per_model * cell + gap) + 4, 5), name, fill="black")
    for i, text in texts.items():
        for (column, name), n in itertools.product(enumerate(pictured), range(per_model)):
            if picture := models[name]["pictures"].get((i, n)):
                left = column * (per_model * cell + gap) + n * cell
                image = cut(PILImage.open(picture[0]), picture[1]).convert("RGB")
                resample = PILImage.NEAREST if image.width < cell else PILImage.LANCZOS
                canvas.paste(image.resize((cell, cell), resample), (left, top))
                if verdicts and not math.isnan(verdict := verdicts[name][i, n]):
                    frame = (left + 1, top + 1, left + cell - 2, top + cell - 2)
                    drawing.rectangle(frame, outline=RIGHT if verdict else WRONG, width=5)
        drawing.text((4, top + cell + 4), "\n".join(text), fill="black")
        top += cell + 8 + 14 * len(text)
    return canvas


def curves_picture(record: dict, metrics: list[str]) -> PILImage.Image:
    """Every metric over the pairs or prompts that a run had seen, from the base model on, with the 95 % intervals of
    the lift over the baseline, and a star at the best checkpoint."""
    figure, checkpoints = Figure(figsize=(5 * len(metrics), 4), dpi=100, layout="tight"), record["checkpoints"]
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics):
        base = record[record["baseline"]][metric]
        for run, best in record["best_checkpoints"].items():
            seen = {BASE: 0} | {name: found["seen"] for name, found in checkpoints.items() if found["run"] == run}
            means = {name: record[name][metric] for name in seen}
            [curve] = axes.plot(seen.values(), means.values(), marker="o", markersize=3, label=run)
            ends = np.array([record[name].get(f"{metric}_lift_ci95", (0.0, 0.0)) for name in seen]) + base
            axes.fill_between(list(seen.values()), *ends.T, alpha=0.2)
            if star := best.get(metric):
                axes.plot(seen[star], means[star], marker="*", markersize=12, color=curve.get_color())
        axes.axhline(base, color="black", linewidth=0.8, linestyle=":", label=record["baseline"])
        axes.set(xlabel="seen in training (star: best on these prompts)", ylabel=metric)
    panels[0].legend()
    figure.savefig(picture := BytesIO())
    return PILImage.open(picture)


# Models ---------------------------------------------------------------------------------------------------------------
def read_models(args: ScriptArguments, rows: list[dict], places: list[dict]) -> dict[str, dict]:
    """The models to compare: name → {"kind": base, lora, network, pipeline or images; "source": folder, file, Hub id or
    template; and what else `find_pipeline`, `find_network`, `find_lora` or `find_pictures` return}; checkpoints have
    their "run" and the pairs or prompts "seen". Exits with one line that names flag and model if one cannot be used."""
    given = [(flag, item) for flag in ("loras", "eval_checkpoints", "models", "images") for item in getattr(args, flag)]
    tuned = any(flag in ("loras", "eval_checkpoints") or NETWORK.match(item) for flag, item in given)
    if args.baseline == BASE or tuned:
        given.insert(0, ("pretrained_model_name_or_path", single_file_folder(args)))
    models = {}
    for flag, item in given:
        try:
            if flag == "pretrained_model_name_or_path":
                base = find_pipeline(item, args.revision, tuned) | {"kind": "base", "variant": args.variant}
                models[BASE] = base
                if args.max_sequence_length and not base["takes_length"]:
                    raise ValueError(f"a {base['index']['_class_name']} has no --max_sequence_length: leave it out")
                continue
            name, source = named_path(item, models, seeds=flag != "eval_checkpoints")
            if flag == "loras":
                models[name] = base | find_lora(source)
            elif flag == "eval_checkpoints":
                models |= {f"{name}@{step}": base | lora | {"run": name} for step, lora in find_checkpoints(source)}
            elif network := NETWORK.match(item):
                models[name] = base | find_network(base, network[1], source.partition(":")[2])
            elif flag == "models":
                models[name] = find_pipeline(source)
            else:
                models[name] = find_pictures(args, rows, places, source)
        except Exception as error:
            raise SystemExit(f"--{flag} {item}: {one_line(error)[:500]}") from error
    return models


def named_path(item: str, models: dict, seeds: bool) -> tuple[str, str]:
    """Splits name=path and checks the name; `name@seed` is one of several trainings of a model."""
    name, _, path = item.partition("=")
    if not path or not re.fullmatch(r"\w[\w.-]{0,99}" + r"(@\w[\w.-]*)?" * seeds, name):
        wanted = "name=folder or name=Hub id; name of letters, digits, '.', '_', '-', at most 100"
        raise ValueError(f"must be {wanted}{', or name@seed' * seeds}")
    root = name.partition("@")[0]
    related = [other for other in models if other.partition("@")[0] == root]
    # Only trainings of one model share what stands before "@".
    trainings = name != root and all(other not in (name, root) and "run" not in models[other] for other in related)
    if root in RESERVED or related and not trainings:
        raise ValueError(f"the name {name!r} is taken")
    return name, path


def families(models: dict) -> tuple[dict[str, list[str]], list[str]]:
    """Models that were trained several times, name → its name@seed; and what is compared with each other: of several
    trainings their group, of a run its last checkpoint."""
    found = {}
    for name in models:  # the steps of a run are in order
        found.setdefault(name.partition("@")[0], []).append(name)
    groups = {root: sorted(names) for root, names in found.items() if len(names) > 1 and "run" not in models[names[0]]}
    return groups, [root if root in groups else names[-1] for root, names in found.items()]


SINGLE_FILES = dict.fromkeys(("v1", "v2"), diffusers.StableDiffusionPipeline)
SINGLE_FILES |= {"xl_base": diffusers.StableDiffusionXLPipeline}
OTHERS = "give a base model of SD1.5, SD2.1 or SDXL with U-Net, VAE and text encoders"


# Copied from train_rankdpo_sdxl.single_file_folder with content_key->short_hash
def single_file_folder(args: ScriptArguments) -> str:
    """Where the model is: of a single file, a folder in the Hub's cache. Keys like NoobAI's tell that it predicts v."""
    name, config = args.pretrained_model_name_or_path.replace("/resolve/", "/blob/"), args.single_file_config
    given = [key for key in ("prediction_type", "rescale_betas_zero_snr", "single_file_config") if getattr(args, key)]
    if re.search("turbo|lightning|lcm|dmd2", os.path.basename(name.rstrip("/")), re.IGNORECASE):
        PartialState().print(f"{name} is distilled, by its name: take the model that it was made from")
    if not name.endswith((".safetensors", ".ckpt")):
        if given:
            raise SystemExit(f"--{given[0]}: {name} is no single file: leave it out")
        return name
    args.variant = args.revision = None  # these are of folders
    weights = load_single_file_checkpoint(name)
    kind, unet = infer_diffusers_model_type(weights), weights.get("model.diffusion_model.input_blocks.0.0.weight")
    if kind not in SINGLE_FILES or unet is None or "edm_vpred.sigma_max" in weights:
        raise SystemExit(f"{name} is something else, e.g. a refiner, an inpainting model or a LoRA: {OTHERS}")
    zero = args.rescale_betas_zero_snr or "ztsnr" in weights
    is_v = args.prediction_type != "epsilon" and (args.prediction_type or zero or "v_pred" in weights)
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero, "timestep_spacing": "trailing"}
    args.scheduler = v if is_v else {"prediction_type": "epsilon"} if args.prediction_type else {}
    facts = [config, args.scheduler, *((key, weight.flatten()[:8].tolist()) for key, weight in weights.items())]
    folder = cached_assets_path("diffusers", "single_file", short_hash(str(facts)))
    with FileLock(folder / ".lock"):
        if not (folder / "model_index.json").exists():  # it is written last
            pipeline = SINGLE_FILES[kind].from_single_file(name, config=config, dtype=unet.dtype)
            pipeline.scheduler.register_to_config(**args.scheduler)
            pipeline.save_pretrained(folder)
    return str(folder)


def find_pipeline(source: str, revision: str | None = None, tuned: bool = False) -> dict:
    """A pipeline that draws from a prompt alone, with a scheduler that reads the model's output as what it is: its
    "index", model_index.json; "commit" on the Hub or what identifies its "files"; whether it "takes_length" of prompts.
    `tuned`: LoRAs or networks that predict noise are put into it."""
    index, commit = DiffusionPipeline.load_config(source, revision=revision, return_commit_hash=True)
    name, kind = index["_class_name"], getattr(diffusers, index["_class_name"], None)
    takes = inspect.signature(kind.__call__).parameters if kind else {}
    is_other = re.search("Img2Img|Inpaint|Edit|ControlNet|Layered|frames|video|audio", " ".join([name, *takes]))
    if is_other or not {"prompt", "guidance_scale", "num_inference_steps", "generator"} <= {*takes}:
        raise ValueError(f"a {name} is no pipeline of diffusers that draws images from a prompt and a guidance scale")
    if "scheduler" in index and name.startswith("StableDiffusion"):
        config = DDPMScheduler.load_config(source, subfolder="scheduler", revision=revision)  # of any scheduler
        used = index["scheduler"][1]
        written, matches = config.get("_class_name", used), "FlowMatch" in used
        flow = matches or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas", False)
        if any((part in used) != (part in written) for part in ("FlowMatch", "EDM")):
            raise ValueError(f"its model_index.json names {used}, its scheduler_config.json is {written}'s")
        predicts, wrong = ("noise", matches or flow and tuned) if "unet" in index else ("flow", not flow)
        if wrong:
            raise ValueError(f"a {name} predicts {predicts}, and its scheduler, {used}, takes something else")
    files = path_key(source) if os.path.isdir(source) else None
    found = {"kind": "pipeline", "source": source, "pipeline": source, "variant": None, "commit": commit}
    return found | {"files": files, "lora": None, "index": index, "takes_length": "max_sequence_length" in takes}


def find_network(base: dict, part: str, source: str) -> dict:
    """A network that fits into the place of the base's: in a "subfolder" of its component's name, as trainers write it,
    or at the top."""
    if part not in base["index"]:
        raise ValueError(f"the base, a {base['index']['_class_name']}, has no {part}")
    wanted = AutoModel.load_config(base["pipeline"], subfolder=part, revision=base["commit"])
    try:
        subfolder, (found, commit) = part, AutoModel.load_config(source, subfolder=part, return_commit_hash=True)
    except OSError:
        subfolder, (found, commit) = None, AutoModel.load_config(source, return_commit_hash=True)
    for key in ("_class_name", *NETWORK_SHAPE):
        if found.get(key) != wanted.get(key):
            raise ValueError(f"its {key} is {found.get(key)}, that of the base's {part} {wanted.get(key)}")
    network = {"kind": "network", "source": source, "part": part, "subfolder": subfolder}
    return network | {"network": f"{part}:{source}", "network_files": commit or path_key(source)}


def find_lora(path: str) -> dict:
    """The "file" of a LoRA, which is a file, a folder or a repository on the Hub; and the rewards that ranked its
    training data, by the run.json of a trainer, as "trained_on"."""
    found = path if os.path.exists(path) else HfApi().snapshot_download(path, allow_patterns=[LORA_FILE, "run.json"])
    file = Path(found) if os.path.isfile(found) else Path(found, LORA_FILE)
    with safe_open(file, framework="pt") as stored:
        keys = [f"{key} {stored.get_slice(key).get_dtype()}" for key in stored.keys()]
    for key, (part, kind) in itertools.product(keys, OTHER_LORAS.items()):
        if part in key:
            raise ValueError(f"it is {kind}, which diffusers draws with in part or not at all ({key})")
    record = file.with_name("run.json")
    trained_on = json.loads(record.read_text()).get("rewards", []) if record.exists() else []
    return {"kind": "lora", "source": path, "file": str(file), "lora": path_key(file), "trained_on": trained_on}


def find_checkpoints(path: str) -> list[tuple[int, dict]]:
    """The steps and LoRAs of a training run, in order, each with the pairs or prompts that the run had "seen"."""
    folders = {int(folder.name.partition("-")[2]): folder for folder in Path(path).glob("checkpoint-*[0-9]")}
    if not folders:
        raise ValueError("not a training run's folder: it holds no checkpoint")
    record = json.loads(Path(path, "run.json").read_text())
    size, more = record["global_batch_size"], {"trained_on": record.get("rewards", [])}
    return [(step, find_lora(str(folders[step])) | more | {"seen": step * size}) for step in sorted(folders)]


def load_pipeline(args: ScriptArguments, model: dict, device: torch.device) -> DiffusionPipeline:
    """The pipeline that draws a model, without its LoRA. Exits with one line if a network's weights do not fit."""
    settings = model["settings"]
    options = {"dtype": getattr(torch, settings["dtype"]), "variant": settings["variant"]}
    parts = {} if args.use_text_encoder_3 else {"text_encoder_3": None, "tokenizer_3": None}
    if model["kind"] == "network":
        network_class = getattr(diffusers, model["index"][model["part"]][1])
        where = {"subfolder": model["subfolder"], "dtype": options["dtype"], "output_loading_info": True}
        parts[model["part"]], info = network_class.from_pretrained(model["source"], **where)
        if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
            raise SystemExit(f"{model['source']}: its weights do not fit its config.json: {wrong[0]}")
    pipeline = DiffusionPipeline.from_pretrained(settings["model"], revision=settings["revision"], **options, **parts)
    pipeline.to(device).set_progress_bar_config(disable=True)
    if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
        pipeline.vae.enable_slicing()  # decoding a whole batch at once runs out of memory first
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)  # SD1.5's would black out images, which are then scored
    return pipeline


@contextmanager
def fitted(model: dict, pipeline: DiffusionPipeline) -> Iterator[None]:
    """The pipeline has the model's whole LoRA in the block. What does not fit, diffusers leaves out: here it ends."""
    if model["kind"] != "lora":
        yield
        return
    config = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    try:
        given = pipeline.lora_state_dict(model["file"], **config)
        pipeline.load_lora_weights(model["file"])
    except Exception as error:
        raise SystemExit(f"{model['source']}: cannot be read as a LoRA of the base: {one_line(error)[:300]}") from error
    given = {key for key in (given[0] if isinstance(given, tuple) else given) if "alpha" not in key}
    components = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    layers = {key: value for part in components for key, value in part.named_parameters() if ".lora_" in key}
    if len(layers) != len(given):
        paths = {key.partition(".lora_")[0].removesuffix(".0") for key in layers}
        left = [key for key in sorted(given) if not any(path in key.replace(".processor", "") for path in paths)]
        raise SystemExit(f"{model['source']}: would be used in part, without {', '.join(left[:1]) or 'half a pair'}")
    if broken := [key for key, value in layers.items() if not value.isfinite().all()]:
        raise SystemExit(f"{model['source']}: {broken[0]} is not finite")
    yield
    pipeline.unload_lora_weights()


def image_settings(args: ScriptArguments, rows: list[dict], name: str, model: dict, device: torch.device) -> dict:
    """What a model's images depend on."""
    prompts = short_hash("\n".join(row["prompt"] for row in rows))
    if model["kind"] == "images":
        return {"images": model["source"], "files": model["files"], "prompts": prompts}
    default = "float32"
    if device.type == "cuda":  # U-Nets are published in float16, most transformers in bfloat16
        default = "bfloat16" if "unet" not in model["index"] and torch.cuda.is_bf16_supported(False) else "float16"
    # A folder keeps the type that it was begun with, for models that are added, and where only the report is written.
    base = {} if model["kind"] == "pipeline" else earlier_settings(args, BASE)
    dtype = args.dtype or {"dtype": default, **base, **earlier_settings(args, name)}["dtype"]
    settings = {"model": model["pipeline"], "variant": model["variant"], "revision": model["commit"]}
    settings |= {"prompts": prompts} | {flag: getattr(args, flag) for flag in DRAWING_FLAGS}
    settings |= {"dtype": dtype, "seed": args.seed}
    rare = {"max_sequence_length": None, "use_text_encoder_3": True, "image_seeds": "own"}
    settings |= {flag: getattr(args, flag) for flag, default in rare.items() if getattr(args, flag) != default}
    return settings | {key: model[key] for key in ("files", "lora", "network", "network_files") if key in model}


# Pictures -------------------------------------------------------------------------------------------------------------
def find_pictures(args: ScriptArguments, rows: list[dict], places: list[dict], template: str) -> dict:
    """The "pictures" of a template: (prompt, number) → (file, cell); cell is (column, row, columns, rows) in a grid,
    which `#2x2` at the template's end says, read row by row.

    The fields of a template are {index}, the prompt's row in the source, and {number}; {image}, the number over all
    rows; {prompt}, {row[COLUMN]}, {category}; {category_index} and {category_image}, the same among the category's
    rows. They count from 0, and with +1, as {index+1:05d}, from 1. Rows that repeat a prompt count, but only the first
    has pictures."""
    names, wide, high = re.fullmatch(r"(.*?)(?:#([1-9]\d*)x([1-9]\d*))?", template, re.DOTALL).groups(default="1")
    cells = [(column, row, int(wide), int(high)) for row in range(int(high)) for column in range(int(wide))]
    per_prompt = math.ceil(args.num_images_per_prompt / len(cells))  # files

    def file_of(names: str, i: int, n: int) -> Path:
        index, number = places[i]["index"], n // len(cells)
        in_category = places[i].get(args.category_column, index)
        image, category_image = index * per_prompt + number, in_category * per_prompt + number
        counted = dict(zip(COUNTED, (index, number, image, in_category, category_image)))
        counted |= {f"{name}+1": value + 1 for name, value in counted.items()}
        category = str(rows[i].get(args.category_column, ""))
        return Path(names.format(prompt=rows[i]["prompt"], row=rows[i], category=category, **counted))

    items = list(itertools.product(range(len(rows)), range(args.num_images_per_prompt)))
    try:
        asked = {item: file_of(names, *item) for item in items}
    except KeyError as error:
        raise ValueError(f"no field {error}; the fields are prompt, row, category, {', '.join(COUNTED)}") from error
    files = {item: file for item, file in asked.items() if os.path.isfile(file)}
    missing = [item for item in items if item not in files]
    for name in COUNTED if missing else ():
        from_one = re.sub(rf"\{{{name}\b(?!\+)", f"{{{name}+1", names)
        if sum(os.path.isfile(file_of(from_one, *item)) for item in items) > len(files):
            raise ValueError(f"no picture {asked[missing[0]]}: they count from 1: write {from_one}")
    if missing and not (args.allow_missing and files):
        (i, n), of = missing[0], f"{len(missing)} of {len(asked)} pictures are missing"
        problem = f"no picture {asked[i, n]} (prompt {i}, image {n}); {of}"
        raise ValueError(f"{problem}: make them, or leave them out with --allow_missing")
    pictures = {(i, n): (file, cells[n % len(cells)] if len(cells) > 1 else None) for (i, n), file in files.items()}
    if len(set(pictures.values())) < len(pictures):
        raise ValueError("gives the same picture to several images: use {index} and {number}")
    file, cell = next(iter(pictures.values()))
    cut(PILImage.open(file), cell)  # one that does not open, or is no such grid, ends the run now
    facts = [f"{i},{n}:{file}:{(stat := file.stat()).st_size}:{stat.st_mtime_ns}" for (i, n), file in files.items()]
    identity = short_hash("\n".join([*facts, str(args.num_images_per_prompt)]))
    return {"kind": "images", "source": template, "pictures": pictures, "files": identity}


def image_shards(args: ScriptArguments, n_prompts: int) -> list[list[tuple[int, int]]]:
    """All (prompt, number) in parts: what is scored in one file, and drawn and scored by one task."""
    return list(batches(list(itertools.product(range(n_prompts), range(args.num_images_per_prompt))), SCORES_PER_FILE))


def cut(image: PILImage.Image, cell: tuple[int, int, int, int] | None) -> PILImage.Image:
    """The picture itself, or the one in this cell of it."""
    column, row, columns, rows = cell or (0, 0, 1, 1)
    if image.width % columns or image.height % rows:
        raise ValueError(f"{image.width} x {image.height} pixels are no grid of {columns} x {rows}")
    wide, high = image.width // columns, image.height // rows
    return image.crop((column * wide, row * high, (column + 1) * wide, (row + 1) * high)) if cell else image


def save_picture(picture: PILImage.Image, file: Path) -> None:
    with replacing(file) as temporary:
        picture.save(temporary, "PNG")


# Metrics of files of their own, and scores on disk --------------------------------------------------------------------
def plugin(metric: str) -> "FunctionReward | None":
    """A metric of a file of its own, not loaded."""
    return None if metric.partition("=")[0] in REWARD_MODELS else FunctionReward(metric, batch_size=1)


def hook(metric: str, name: str) -> Callable | None:
    """An optional function of a metric's class: prepare, check_rows or official. The last argument of the others than
    check_rows are all settings of the class, those that were not given too."""
    own = plugin(metric)
    function = getattr(own and own.function, name, None)
    if function is None or name == "check_rows":
        return function
    parameters = inspect.signature(own.function).parameters
    settings = {key: p.default for key, p in parameters.items() if p.default is not p.empty} | own.settings
    return lambda *given: function(*given, settings)


def takes_rows(metric: str) -> bool:
    """Whether a metric wants the whole row of each prompt, to score, to check or to report."""
    return bool((own := plugin(metric)) and (own.takes_rows or hook(metric, "check_rows") or hook(metric, "official")))


def official_figures(args: ScriptArguments, metric: str, rows: list, categories: list | None, scores: dict) -> dict:
    """What a benchmark itself reports of a model: its class's `official`, or HPSv2's own figure. Otherwise {}.
    scores: key of the metric's values → (n_prompts, n_images)."""
    if function := hook(metric, "official"):
        return {str(name): float(figure) for name, figure in function(rows, scores).items()}
    whole = args.prompts == "hpsv2" and args.category_column == "style" and not args.max_prompts
    if plugin(metric) or not metric.startswith("hpsv2") or not whole or np.isnan(scores[""]).any():
        return {}
    figure = {}  # for each style the mean and the standard deviation of ten chunks' means, times 100, of raw cosines
    for style in dict.fromkeys(categories):
        chosen = scores[""][np.array(categories) == style].mean(axis=1)
        chunks = [chunk.mean() * 100 for chunk in np.array_split(chosen, 10)]
        figure[style] = {"mean": float(np.mean(chunks)), "std": float(np.std(chunks))}
    return {**figure, "overall": float(np.mean([style["mean"] for style in figure.values()]))}


def scores_file(args: ScriptArguments, metric: str, model: str, shard: int) -> Path:
    return Path(args.output_dir, "scores", reward_name(metric), model, f"{shard:05d}.json")


def collect_scores(args: ScriptArguments, rows: list[dict], models: dict) -> tuple[dict, dict]:
    """Joins the parts of all scores, and writes them as METRIC/MODEL.json. Returns metric → model → float64 (n_prompts,
    n_images), NaN where a value does not apply or the image is missing; and the names of the values of metrics that
    return several: metric → key → METRIC_KEY."""
    results, names, shape = {}, {}, (len(models), len(rows), args.num_images_per_prompt)
    shards = range(len(image_shards(args, len(rows))))
    for metric in args.metrics:
        column = reward_name(metric)
        files = [scores_file(args, metric, name, s) for name in models for s in shards]
        parts = [json.loads(file.read_bytes()) for file in files]
        values = [{} if value is None else value for part in parts for value in part["scores"]]
        values = [value if isinstance(value, dict) else {"": value} for value in values]
        keys = dict.fromkeys(itertools.chain(*values)) or {"": None}
        if "" in keys and len(keys) > 1:
            raise SystemExit(f"metric {column}: gives numbers and dicts: all images need the same")
        names[metric] = {key: f"{column}_{key}" if key else column for key in keys}
        for key, label in names[metric].items():
            if label in results or re.search(ENDINGS, label):
                raise SystemExit(f"metric {label}: results.json uses this name for another figure: rename it")
            scores = np.array([value.get(key) for value in values], dtype=np.float64)  # null: NaN
            results[label] = dict(zip(models, scores.reshape(shape)))
        for name, model in models.items():
            lists = {key: results[label][name].tolist() for key, label in names[metric].items()}
            content = {"settings": model["settings"], "scores": lists.get("", lists)}
            write_bytes(Path(args.output_dir, "scores", column, f"{name}.json"), as_json(content))
    return results, names


def as_json(content: dict, **options) -> bytes:
    """JSON with null in place of NaN, which it does not have."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda name: None), **options).encode()


# Results on the Hub ---------------------------------------------------------------------------------------------------
def prepare_repositories(args: ScriptArguments, models: dict[str, dict]) -> None:
    """Notes the "repository" for the results of each LoRA, and creates it unless it exists. Exits with one line if
    there is none, or if the token cannot write to it."""
    loras = {n: model["source"] for n, model in models.items() if model["kind"] == "lora" and "run" not in model}
    wanted = {name: args.hub_model_id or lora for name, lora in loras.items()}
    wanted = {name: repo_id for name, repo_id in wanted.items() if args.hub_model_id or not os.path.exists(repo_id)}
    if args.hub_model_id and len(wanted) > 1:
        raise SystemExit(f"--hub_model_id {args.hub_model_id}: is for one LoRA, and --loras has {len(wanted)}")
    if not wanted:
        raise SystemExit("--push_to_hub: no LoRA in --loras is a Hub id: name one with --loras and --hub_model_id")
    for name, repo_id in wanted.items():
        try:
            repo_id = HfApi().create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True).repo_id
            HfApi().auth_check(repo_id, write=True)
        except Exception as error:
            problem = f"the model repository {repo_id} cannot be written to: {one_line(error)}"
            raise SystemExit(f"--push_to_hub: {problem} (hf auth login, or HF_TOKEN with write access)") from None
        earlier_card(repo_id)  # one that cannot be read fails now
        models[name]["repository"] = repo_id


def earlier_card(repo_id: str) -> RepoCard:
    """The card on the Hub, as people may have edited it. A new one has nothing between the marks."""
    known = HfApi().file_exists(repo_id, "README.md")
    return RepoCard.load(repo_id) if known else RepoCard(f"---\n\n---\n\n{CARD_BEGIN}{CARD_END}\n")


def write_card(args: ScriptArguments, card: RepoCard, name: str, repo_id: str, record: dict, table: str) -> None:
    """Writes a LoRA's results into its card: into the metadata, where results on other prompts stay, and between the
    marks, outside of which all text stays."""
    source = public_text(PROMPT_SETS.get(args.prompts, {}).get("source", args.prompts))
    title = args.prompts if args.prompts in PROMPT_SETS else os.path.basename(source)
    prompts = {"type": "prompts", "name": f"{title}, {record['n_prompts']} prompts"}
    if args.prompts in PROMPT_SETS or not os.path.exists(args.prompts):
        split = {"split": args.prompt_split} if args.prompt_split and "://" not in source else {}
        prompts |= {"type": source, **split}
    drawing = {key: record["settings"][key] for key in (*DRAWING_FLAGS, "seed")}
    prompts["args"] = {"prompts": record["settings"]["prompts"], **drawing}
    values, other = [], "the base model" if args.baseline == BASE else args.baseline
    labels = {"": "", "_lift": f", lift over {other}", "_win_rate": f", win rate over {other}"}
    for metric, (ending, label) in itertools.product(record["pairwise"], labels.items()):
        if (value := record[name].get(metric + ending)) is not None:  # the baseline has no lift
            kind = "win_rate" if ending == "_win_rate" else metric
            values.append({"type": kind, "name": metric + label, "value": value})
    task = {"type": "text-to-image", "name": "Text-to-Image Generation"}
    base, (model, *models) = args.pretrained_model_name_or_path, card.data.get("model-index") or [{}]
    hub_id = re.sub("^https://[^/]+/|/(blob|resolve)/.*", "", base)  # of a file on the Hub
    kept = [result for result in model.get("results") or [] if result.get("dataset") != prompts]
    results = [*kept, {"task": task, "dataset": prompts, "metrics": values}]
    card.data["base_model"] = card.data.get("base_model", None if os.path.exists(base) else hub_id)
    card.data["library_name"] = card.data.get("library_name", "diffusers")
    card.data["model-index"] = [{"name": repo_id.split("/")[-1], **model, "results": results}, *models]
    settings = ", ".join(f"`{key}` {value}" for key, value in drawing.items())
    others = ", ".join(f"`{other}`" for other in record["settings"]["models"] if other not in (name, BASE))
    curves = "\n\n![All checkpoints](curves.png)" if "checkpoints" in record else ""
    body = f"""## Evaluation

`{name}` is this LoRA{f"; {others}: others" if others else ""}. Base model: `{public_name(base)}`. Prompts:
{prompts["name"]}. {settings}.

{table}
![The same prompts and seeds for all models](grid.png){curves}

All figures are in [results.json](results.json)."""
    marked = re.fullmatch(f"(.*){re.escape(CARD_BEGIN)}.*?{re.escape(CARD_END)}(.*)", card.text, re.S)
    before, after = marked.groups() if marked else (f"{card.text.rstrip()}\n\n", "\n")
    card.text = f"{before}{CARD_BEGIN}\n{body}\n{CARD_END}{after}"


def publish(args: ScriptArguments, name: str, repo_id: str, record: dict, table: str) -> None:
    """Sends the results to the repository of one LoRA, in one commit."""
    card = earlier_card(repo_id)
    write_card(args, card, name, repo_id, record, table)
    files = {file: Path(args.output_dir, file) for file in RESULTS if Path(args.output_dir, file).exists()}
    files["README.md"] = str(card).encode()
    operations = list(itertools.starmap(CommitOperationAdd, files.items()))
    HfApi().create_commit(repo_id, operations, commit_message="Evaluation")
    print(f"published: {HfApi().endpoint}/{repo_id}")


# Copied from build_synpic.markdown_table
def markdown_table(header: list[str], rows: list[list]) -> str:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(header), *cells[1:]))


# Copied from build_synpic.path_key
def path_key(path: str) -> str:
    """Identifies a local file or model, wherever it lies, by the names and sizes of its files and 32 blocks of each."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")) or [Path(path)]:
        name = file.relative_to(path).as_posix()
        # A card is no part of a model.
        if file.is_file() and file.stat().st_size and not is_hidden(name) and not name.endswith(".md"):
            content = np.memmap(file, mode="r")
            digest.update(f"{name}:{len(content)}".encode())
            for start in np.linspace(0, max(0, len(content) - 2**16), 32).astype(int):
                digest.update(content[start : start + 2**16])
    return digest.hexdigest()[:16]


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
TEXT_FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv")


def complete_prompt_flags(args: "ScriptArguments") -> None:
    """Fills in the flags about prompts that were left out."""
    for name, value in PROMPT_SETS.get(args.prompts, {"prompt_column": "prompt", "prompt_split": "train"}).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def read_prompts(
    source: str, column: str, split: str | None, max_prompts: int | None, keep: tuple = (), whole_rows: bool = False
) -> tuple[list[dict], list[dict[str, int]]]:
    """Reads prompts in order and drops duplicates. Of a dataset it reads no more than it needs. Returns one dict per
    prompt: "prompt", stripped, and the columns to `keep`; with `whole_rows` all columns that hold no images. And one
    dict per prompt of where it first stood in the source, duplicates counted: "index", its row, from 0, and for each
    column to `keep`, how many rows before it have the same value there."""
    shown, columns = public_text(source), list(dict.fromkeys((column, *keep)))
    prompts, places, counts = {}, {}, Counter()
    try:
        rows = tqdm(prompt_rows(source, split, columns, whole_rows), desc="prompts", unit=" rows", delay=10)
        for index, row in enumerate(rows):
            if missing := [name for name in columns if name not in row]:
                raise ValueError(f"no column {missing[0]!r}; it has {', '.join(map(str, row))}")
            if not isinstance(row[column], str) or not (prompt := row[column].strip()):
                raise ValueError(f"row {index + 1}: the prompt is empty or no text: remove the row")
            values = {name: (name, str(row[name])) for name in keep}
            places.setdefault(prompt, {"index": index} | {name: counts[value] for name, value in values.items()})
            prompts.setdefault(prompt, {**row, "prompt": prompt})
            counts.update(values.values())
            if max_prompts and len(prompts) == max_prompts:
                break
    except Exception as error:
        known = "" if "/" in source else f"; the sets with a short name are {', '.join(PROMPT_SETS)}"
        raise SystemExit(f"--prompts {shown}: cannot be read: {public_text(one_line(error))}{known}") from None
    if not prompts:
        raise SystemExit(f"--prompts {shown}: holds no prompts")
    if repeated := index + 1 - len(prompts):
        warn(f"--prompts {shown}: {repeated} of {index + 1} rows repeat an earlier prompt and are left out")
    return list(prompts.values()), list(places.values())


def prompt_rows(source: str, split: str | None, columns: list[str], whole_rows: bool) -> Iterable[dict]:
    """The rows of a named set, file, URL or dataset. The first of these `columns` is the prompt."""
    known = PROMPT_SETS.get(source, {}).get("source", source)
    suffix = Path(urlsplit(known).path if "://" in known else known).suffix.lower()
    if source == "hpsv2":
        styles = ("anime", "concept-art", "paintings", "photo")
        files = {s: hf_hub_download(known, f"benchmark/{s}.json", repo_type="dataset") for s in styles}
        return [row | {"style": style} for style in files for row in file_rows(files[style], ".json", columns[0])]
    if "://" in known and suffix not in TEXT_FILES:
        raise ValueError(f"the name of a file on the web must end in {', '.join(TEXT_FILES)}")
    if suffix in TEXT_FILES and not os.path.isdir(known):
        return file_rows(known, suffix, columns[0])
    return stream_rows(known, split, columns, whole_rows)


def file_rows(file: str, suffix: str, column: str) -> list[dict]:
    """The rows of a file or URL. A line of a text file, or a string in a JSON list, becomes a row with one `column`."""
    text = read_text(file)
    if suffix == ".txt":
        return [{column: line} for line in text.rstrip("\n").split("\n")] if text else []
    if suffix in (".csv", ".tsv"):
        # Quotation marks in a .tsv are text, as in PartiPrompts, where a prompt begins with one.
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if suffix == ".csv":  # the first of these that separates the names of the columns
            header = text.partition("\n")[0]
            found = (mark for mark in ",;\t|" if column in next(csv.reader([header], delimiter=mark), []))
            options = {"delimiter": next(found, ","), "strict": True}
        rows = list(csv.DictReader(StringIO(text, newline=""), **options))
        if long := [number for number, row in enumerate(rows, 1) if None in row]:
            raise ValueError(f"row {long[0]} has more fields than the header: quote a prompt that has commas")
        return rows
    values, end, blank, decoder = [], 0, re.compile(r"\s*"), json.JSONDecoder()
    while (start := blank.match(text, end).end()) < len(text):  # a list, or a value per line
        value, end = decoder.raw_decode(text, start)
        values += value if isinstance(value, list) else [value]
    return [value if isinstance(value, dict) else {column: value} for value in values]


def read_text(file: str) -> str:
    """The text of a file or URL: UTF-8, with or without a byte order mark, or UTF-16 with one; with any line ends."""
    if file.startswith(("http://", "https://")):
        response = get_session().get(file, timeout=60)
        response.raise_for_status()
        if "html" in response.headers.get("Content-Type", ""):
            raise ValueError("this is a web page, not a file of prompts: give the link to the raw file")
        content = response.content
    else:
        content = Path(file).read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return StringIO(content.decode(encoding), newline=None).read()


def stream_rows(source: str, split: str | None, columns: list[str], whole_rows: bool) -> Iterator[dict]:
    """The rows of a .parquet file, or of a dataset on the Hub or in a folder, while it reads them: nothing is
    downloaded as a whole. Of Parquet files, which most datasets with images are, only these `columns` are read."""
    from datasets import load_dataset, load_dataset_builder  # here: a user study's Space has no `datasets`

    with plain_path(source) as path:
        options = {"path": path}
        if path.endswith(".parquet") and os.path.isfile(path):
            options, split = {"path": "parquet", "data_files": path}, "train"
        offline = HF_HUB_OFFLINE and not os.path.exists(path)  # then it is what an earlier run downloaded
        builder = None if offline else load_dataset_builder(**options)
        rows = load_dataset(**options, split=split) if offline else builder.as_streaming_dataset(split=split)
        names = rows.column_names or list(next(iter(rows), {}))
        if missing := sorted({*columns} - {*names}):
            raise ValueError(f"no column {missing[0]!r}; it has {', '.join(names)}")
        if whole_rows:
            kinds = rows.features or dict.fromkeys(names, "")
            columns = [name for name in names if not re.search(r"\bImage\b|binary", repr(kinds[name]))]
        if not offline and hasattr(builder.config, "columns"):
            # By default the client reads 5 MiB ahead with each small piece of a column: a tenth of the images.
            options |= {"columns": columns, "storage_options": {"hf": {"block_size": 2**14}}}
            rows = load_dataset(**options, split=split, streaming=True)
        yield from rows.select_columns(columns)


def public_text(text: str) -> str:
    """`text` without what may be secret in its URLs: user name, password, query."""
    return re.sub(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", r"\1\2", text)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: reward models (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def load_reward_model(name: str, device="cpu", dtype: torch.dtype | None = None, batch_size: int = 32) -> "RewardModel":
    """Loads a reward: an object with `.score(images, prompts) -> list[float]`. `name`: one of REWARD_MODELS, if need be
    with `=checkpoint`, a folder or Hub id; or `file.py:function`, or `file.py:Class,key=value,…`. `dtype`: by default
    float32 on a CPU and half precision on a GPU."""
    reward_class = REWARD_MODELS.get(name.partition("=")[0], (FunctionReward,))[0]
    return reward_class(name, device, dtype, batch_size)


def reward_name(name: str) -> str:
    """The column of a reward: `shapes/world.py:color_reward` → `color_reward`, `pickscore=folder` → `pickscore`,
    `my.py:Score,model=user/name` → `Score_model=name`."""
    kind, _, checkpoint = name.partition("=")
    if kind in REWARD_MODELS:  # scores of different VLMs are not comparable
        return f"{kind}_{Path(checkpoint or REWARD_MODELS[kind][1]).name}" if kind == "vqascore_vlm" else kind
    _, function, settings = split_function(name)
    return "_".join([function, *(f"{key}={Path(value).name}" for key, value in settings.items())])


def split_function(name: str) -> tuple[str, str, dict[str, str]]:
    """`file.py:Class,key=value,…` → file, name, settings. Exits with one line if it is nothing of the kind."""
    match = re.fullmatch(r"(.+?\.py):(\w+)((?:,\w+=[^,]+)*)", name)
    if not match:
        own = "path/to/file.py:function or path/to/file.py:Class,key=value (in YAML in quotes), as in metrics/"
        raise SystemExit(f"reward {name}: unknown; choose from {', '.join(REWARD_MODELS)}, or {own}")
    return match[1], match[2], dict(word.split("=", 1) for word in match[3].split(",")[1:])


def reward_settings(name: str) -> dict:
    """What a reward's scores depend on: its checkpoint; or the text of its file, the settings, and what these name."""
    kind, _, checkpoint = name.partition("=")
    if kind in REWARD_MODELS:
        checkpoint = checkpoint or REWARD_MODELS[kind][1]
        files = {"files": path_key(checkpoint)} if os.path.isdir(checkpoint) else {}
        return {"reward": reward_name(name), "checkpoint": checkpoint, **files}
    own, (file, function, settings) = FunctionReward(name), split_function(name)
    parts = {"settings": settings, "files": {key: path_key(path) for key, path in own.paths().items()}}
    known = {"reward": f"{Path(file).name}:{function}", "sha256": own.identity}
    return known | {key: part for key, part in parts.items() if part}


def check_rewards(names: list[str]) -> None:
    """Exits with one line unless every reward is known. Imports the user's own functions."""
    columns = [reward_name(name) for name in names]
    if len(set(columns)) < len(columns):
        raise SystemExit(f"rewards {' '.join(names)}: two have the same name: each needs one of its own")
    for name in names:
        kind, _, checkpoint = name.partition("=")
        if kind not in REWARD_MODELS:
            FunctionReward(name)
        elif checkpoint and not os.path.isdir(checkpoint):
            try:
                known = HfApi().repo_exists(checkpoint)
            except Exception as error:  # without a network the model may be in the cache
                known = not isinstance(error, HFValidationError)
            if not known:
                raise SystemExit(f"reward {name}: {checkpoint} is no folder, and no model of the Hub that you can read")


class RewardModel:
    """A reward model. Worker threads decode and prepare images ahead of the device, which takes them in batches.

    To add one, write a subclass and name it in REWARD_MODELS. It loads its weights in `load` and defines `compare` (n
    encoded images and n encoded prompts → n rewards). It may override `prepare` (PIL image → input of the model, in a
    worker), `encode_images` and `encode_prompts` (one batch each, of images and prompts that differ)."""

    def __init__(self, name: str, device="cpu", dtype: torch.dtype | None = None, batch_size: int = 32):
        self.name, self.device, self.batch_size = name, torch.device(device), batch_size
        self.kind, _, checkpoint = name.partition("=")
        _, published, self.base_model = REWARD_MODELS[self.kind]
        self.checkpoint = checkpoint or published
        self.cut = set()  # prompts of the last `score` that are longer than the model reads
        # float16 is closer to float32 than bfloat16 is, but T5 and other language models overflow in it.
        half = torch.bfloat16 if self.kind.startswith("vqascore") else torch.float16
        self.dtype = dtype or (half if self.device.type == "cuda" else torch.float32)
        try:
            self.load()
        except torch.OutOfMemoryError:
            raise SystemExit(f"reward {name}: the device's memory does not hold it: hold fewer at once") from None
        except (OSError, LookupError, RuntimeError, ValueError) as error:
            problem = f"{self.checkpoint} cannot be loaded: {type(error).__name__}: {one_line(error)}"
            raise SystemExit(f"reward {name}: {problem}") from None

    @torch.no_grad()
    def score(self, images: list, prompts: list[str], rows: list[dict] | None = None, bad: dict | None = None) -> list:
        """The reward of each image for its prompt, whatever else is in its batch. What occurs several times, an image,
        a prompt or both together, is encoded and scored once. images: PIL images, the bytes of their files, functions
        that return an image, or what `begin` returned; rows: the whole row of each prompt, for the user's own metrics;
        bad: takes position → reason of images that do not decode, which get NaN; without it, the first is an error."""
        self.cut, self.rows = set(), dict(zip(prompts, rows or []))
        pairs = list(zip(self.begin(images), prompts, strict=True))
        wanted = {}  # distinct image → its distinct prompts
        for image, prompt in pairs:
            wanted.setdefault(image, {})[prompt] = True
        texts, results, scores, reasons = {}, [], {}, {}
        for batch in batches(list(wanted), self.batch_size):
            inputs = {image: image.result() for image in batch}
            for image in [image for image in batch if isinstance(inputs[image], Exception)]:
                reasons[image] = inputs.pop(image)
                if bad is None:
                    raise reasons[image]
            encoded = dict(zip(inputs, self.encode_images(list(inputs.values())))) if inputs else {}
            for part in batches([(image, prompt) for image in inputs for prompt in wanted[image]], self.batch_size):
                new = list(dict.fromkeys(prompt for _, prompt in part if prompt not in texts))
                texts.update(zip(new, self.encode_prompts(new) if new else []))
                rewards = self.compare([encoded[image] for image, _ in part], [texts[prompt] for _, prompt in part])
                results.append((part, rewards))
        for part, rewards in results:  # until here they stay on the device, which never waits
            scores.update(zip(part, rewards.tolist() if torch.is_tensor(rewards) else rewards, strict=True))
        for position, (image, _) in enumerate(pairs if reasons else []):
            if image in reasons:  # PIL names an object by its address
                bad[position] = re.sub(r" <[^>]*>", "", one_line(reasons[image]))
        return [self.checked(scores[pair], pair[1]) if pair in scores else math.nan for pair in pairs]

    def begin(self, images: list) -> list[Future]:
        """Lets the workers prepare these images, equal files once. `score` takes what this returns in place of them."""
        keys, begun = [image if isinstance(image, bytes) else id(image) for image in images], {}
        for key, image in zip(keys, images):
            if key not in begun:
                begun[key] = image if isinstance(image, Future) else WORKERS.submit(self.prepare_image, image)
        return [begun[key] for key in keys]

    def prepare_image(self, image):
        """`prepare` of an image that may have to be decoded first; the error if it does not decode."""
        try:
            image = decode_image(image)
        except Exception as error:  # PIL raises many kinds
            return error
        return self.prepare(image)

    def checked(self, value, prompt: str) -> float | dict[str, float]:
        """A score, or of the user's own metrics a dict of scores, in which a NaN means: does not apply."""
        if isinstance(value, dict):
            return {key: math.nan if part != part else self.checked(part, prompt) for key, part in value.items()}
        if not np.isfinite(np.float32(value)):  # they are stored as float32
            raise SystemExit(f"reward {self.name}: the score of {prompt!r} is {value}: it must be a finite number")
        return float(value)

    def prepare(self, image: PILImage.Image):
        """OpenAI CLIP's transform: PIL image → float32 (3, size, size)."""
        image = center_crop(resize(image, self.size, InterpolationMode.BICUBIC), self.size).convert("RGB")
        return normalize(to_tensor(image), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def encode_images(self, images: list):
        return images

    encode_prompts = encode_images

    def stack(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(pixels).to(self.device, self.dtype)

    def tokens(self, texts: list[str], max_length: int, prompts: list[str] | None = None, **options):
        """The tokens of texts. What is longer is cut, and noted: by the `prompts` that the texts were made of."""
        tokens = self.tokenizer(texts, truncation=True, max_length=max_length, **options)
        self.cut.update(text for text, found in zip(prompts or texts, tokens.encodings) if found.overflowing)
        return tokens

    def source_of(self, *files: str) -> str:
        """The checkpoint if it is a folder that has one of these files, else the base model."""
        has_file = any(os.path.exists(os.path.join(self.checkpoint, file)) for file in files)
        return self.checkpoint if has_file else self.base_model

    def load_tokenizer(self):
        return transformers.AutoTokenizer.from_pretrained(self.source_of("tokenizer.json", "tokenizer_config.json"))

    def load_model(self, model_class, source: str | None = None, dtype=None, **options) -> torch.nn.Module:
        """Loads a transformers model. A key that is missing, unknown or of another size is an error."""
        options |= {"dtype": dtype or self.dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        transformers_logging.set_verbosity_error()  # no report of the keys that differ: the error below names them
        model, info = model_class.from_pretrained(source, **options)
        transformers_logging.set_verbosity_warning()
        info["mismatched_keys"] = [f"{key} {[*has]}, not {[*needs]}" for key, has, needs in info["mismatched_keys"]]
        for what in ("missing", "unexpected", "mismatched"):
            if keys := sorted(info[f"{what}_keys"]):
                raise ValueError(f"{len(keys)} {what} keys: {', '.join(keys[:3])}{', …' if keys[3:] else ''}")
        return self.ready(model)

    def ready(self, module: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """The module on the device, for inference. A weight that is not finite is an error: in attention on a CPU it
        can give a finite, wrong score."""
        module = module.eval().requires_grad_(False).to(self.device, dtype)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds a value that is not finite in {tensor.dtype}")
            if self.device.type == "cpu":  # in a mapped file, weights may lie anywhere: other last digits, run by run
                tensor.data = tensor.data.clone()
        return module


class FunctionReward(RewardModel):
    """The user's own: `function(images, prompts)`, or a class that is made once with `device`, `batch_size` and its
    settings, and has such a `score`. If it has a parameter `rows`, that is the whole row of each prompt, as a dict."""

    def __init__(self, name: str, device="cpu", dtype: torch.dtype | None = None, batch_size: int = 32):
        self.name, self.device, self.batch_size, self.made = name, torch.device(device), batch_size, None
        file, function, settings = split_function(name)
        try:
            self.identity = short_hash(b"".join(path.read_bytes() for path in source_files(Path(file))))
            self.function = getattr(import_file(os.path.abspath(file)), function)
            called = self.function.score if inspect.isclass(self.function) else self.function
            self.takes_rows = "rows" in inspect.signature(called).parameters
            known = inspect.signature(self.function).parameters if inspect.isclass(self.function) else {}
        except (Exception, SystemExit) as error:  # the file may call sys.exit()
            raise SystemExit(f"reward {name}: cannot be imported: {type(error).__name__}: {one_line(error)}") from error
        self.settings = {}
        for key, text in settings.items():
            if key not in known:
                raise SystemExit(f"reward {name}: no setting {key}; its settings are {', '.join(known) or 'none'}")
            try:
                self.settings[key] = typed_setting(text, known[key])
            except (LookupError, ValueError):
                raise SystemExit(f"reward {name}: {key} {text!r}: it must be like its default, {known[key]}") from None

    def paths(self) -> dict[str, str]:
        """The settings that name a file or a folder."""
        return {key: value for key, value in self.settings.items() if isinstance(value, str) and os.path.exists(value)}

    def prepare(self, image: PILImage.Image) -> PILImage.Image:
        return image

    def compare(self, images: list[PILImage.Image], texts: list[str]) -> list:
        if inspect.isclass(self.function) and self.made is None:
            self.made = self.function(device=self.device, batch_size=self.batch_size, **self.settings)
        function = self.made.score if self.made else self.function
        rows = {"rows": [self.rows.get(text, {"prompt": text}) for text in texts]} if self.takes_rows else {}
        # The function may draw on its images, and another reward may need them, too.
        values = function([image.copy() for image in images], texts, **rows)
        if isinstance(values, dict) or len(values := list(values)) != len(images):
            raise SystemExit(f"reward {self.name}: {len(values)} scores for {len(images)} images: a list of one each")
        return values


def typed_setting(text: str, parameter: inspect.Parameter) -> bool | int | float | str:
    """A setting in the type of its parameter, by annotation or default: bool, int, float; everything else is text."""
    kind = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
    readers = {"bool": {"true": True, "false": False}.__getitem__, "int": int, "float": float}
    return next((read for name, read in readers.items() if re.search(rf"\b{name}\b", str(kind))), str)(text)


def source_files(file: Path) -> list[Path]:
    """A Python file and those beside it that it imports, directly or through another one; of a package, all files."""
    found = [file]
    for path in found:
        imports = " ".join(re.findall(r"^\s*(?:from|import)\b(.*)", path.read_text(), re.M))
        for name in dict.fromkeys(re.findall(r"\w+", imports)):
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

    def load(self):
        file = self.FILES[self.kind.removesuffix("_antialias")]
        weights = hf_clip_weights(checkpoint_weights(self.checkpoint, file)["state_dict"])
        config = transformers.CLIPConfig.from_pretrained(self.source_of("config.json"))
        self.size = config.vision_config.image_size
        self.model = self.load_model(transformers.CLIPModel, config=config, state_dict=weights)
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

    def compare(self, images: list[torch.Tensor], texts: list[torch.Tensor]) -> torch.Tensor:
        return (torch.stack(images) * torch.stack(texts)).sum(dim=-1)

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        # "<|endoftext|>" in a prompt is ordinary text to HPSv2's tokenizer.
        return self.tokens([clean_text(text) for text in prompts], 77, prompts, split_special_tokens=True).input_ids


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
        source = self.source_of("preprocessor_config.json")
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")

    def prepare(self, image) -> torch.Tensor:
        image = image.convert("RGB")
        image.info.pop("transparency", None)  # of a palette image: the processor would blend it, PickScore's did not
        return self.image_processor(image, return_tensors="pt").pixel_values[0]

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        return self.tokens(prompts, 77).input_ids

    def compare(self, images: list[torch.Tensor], texts: list[torch.Tensor]) -> torch.Tensor:
        return self.logit_scale * super().compare(images, texts)


class CLIPScoreReward(HPSReward):
    """CLIPScore as Hessel et al. (2021) define it: 2.5 · max(cosine, 0) of CLIP ViT-B/32, "A photo depicts" first."""

    prepare = RewardModel.prepare

    def load(self):
        self.model = self.load_model(transformers.CLIPModel, self.checkpoint)
        self.size = self.model.config.vision_config.image_size
        self.tokenizer = self.load_tokenizer()

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        return self.tokens([clean_text(f"A photo depicts {prompt}") for prompt in prompts], 77, prompts).input_ids

    def compare(self, images: list[torch.Tensor], texts: list[torch.Tensor]) -> torch.Tensor:
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

    def compare(self, images: list[torch.Tensor], texts: list[str]) -> torch.Tensor:
        return torch.stack(images)


class ImageRewardReward(RewardModel):
    """ImageReward v1.0 (Xu et al., 2023): BLIP's text encoder attends to the image, a linear head rates it; -2 to 2."""

    # zai-org/ImageReward has no config.json. Its image encoder is ViT-L/16; the epsilon is not BlipVisionConfig's
    # default, which would shift the features by 7e-3. Its text encoder is BERT base with two more tokens.
    VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    VISION |= {"patch_size": 16, "image_size": 224, "layer_norm_eps": 1e-6}
    TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    TEXT |= {"vocab_size": 30524, "max_position_embeddings": 512, "layer_norm_eps": 1e-12}

    def load(self):
        vision, text, head = blip_weights(checkpoint_weights(self.checkpoint, "ImageReward.pt"))
        config = transformers.BlipConfig(vision_config=self.VISION, text_config=self.TEXT)
        if self.source_of("config.json") == self.checkpoint:
            config = transformers.BlipConfig.from_pretrained(self.checkpoint)
        self.size = config.vision_config.image_size
        self.vision = self.load_model(transformers.BlipVisionModel, config=config.vision_config, state_dict=vision)
        options = {"config": config.text_config, "state_dict": text, "add_pooling_layer": False}
        self.text = self.load_model(transformers.BlipTextModel, **options)
        self.head = self.ready(linear_head(config.text_config.hidden_size, head))
        self.tokenizer = self.load_tokenizer()
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return self.vision(self.stack(pixels)).last_hidden_state

    def encode_prompts(self, prompts: list[str]) -> list:
        tokens = self.tokens(prompts, 35, padding="max_length", return_tensors="pt")
        return list(zip(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)))

    def compare(self, images: list[torch.Tensor], texts: list) -> torch.Tensor:
        ids, mask = map(torch.stack, zip(*texts))
        # The configuration names a decoder. It runs as an encoder, which sees the text in both directions.
        output = self.text(ids, attention_mask=mask, encoder_hidden_states=torch.stack(images), is_decoder=False)
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
        vision, projector = split_keys(weights, "vision_tower.vision_tower."), split_keys(weights, "mm_projector.")
        self.tokenizer = self.load_tokenizer()
        self.answer = torch.tensor(self.tokenizer("Yes").input_ids, device=self.device)
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
            vision = {k: v for k, v in checkpoint_weights(tower).items() if k.startswith("vision_model.")}
        self.vision = self.load_model(transformers.CLIPVisionModel, config=vision_config, state_dict=vision)
        layers = [torch.nn.Linear(width, config.d_model) for width in (vision_config.hidden_size, config.d_model)]
        self.projector = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])
        self.projector.load_state_dict(projector)
        self.ready(self.projector, self.dtype)
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(tower, backend="pil")

    def prepare(self, image) -> torch.Tensor:
        image = image.convert("RGB")
        side = max(image.size)
        square = PILImage.new("RGB", (side, side), tuple(int(255 * mean) for mean in OPENAI_CLIP_MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return self.image_processor(square, return_tensors="pt").pixel_values[0]

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return self.projector(self.vision(self.stack(pixels), output_hidden_states=True).hidden_states[-2][:, 1:])

    def encode_prompts(self, prompts: list[str]) -> list:
        # The text before and the text after the image are tokenised apart, so an end token precedes the image too.
        rows = [[self.tokenizer(text).input_ids for text in (self.BEFORE, self.AFTER.format(p))] for p in prompts]
        return [[torch.tensor(tokens, device=self.device) for tokens in row] for row in rows]

    def compare(self, images: list[torch.Tensor], texts: list) -> torch.Tensor:
        embed = self.t5.get_input_embeddings()
        rows = [torch.cat([embed(before), image, embed(after)]) for image, (before, after) in zip(images, texts)]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(inputs.shape[1], device=self.device) < lengths[:, None]
        answer = self.answer.repeat(len(rows), 1)
        logits = self.t5(inputs_embeds=inputs, attention_mask=mask.long(), labels=answer).logits.float()
        return logits.log_softmax(dim=-1).gather(-1, answer[..., None]).mean(dim=(1, 2)).exp()


# The threads that decode and prepare images. Each has one core: teams of OpenMP's threads would be too many.
WORKERS = ThreadPoolExecutor(min(16, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,))
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30  # a picture may hold the workflow that made it


def decode_image(image) -> PILImage.Image:
    """The PIL image, its pixels read, of the bytes of a file, of a PIL image, or of a function that returns one."""
    image = image() if callable(image) else image
    image = PILImage.open(BytesIO(image)) if isinstance(image, bytes) else image
    image.load()
    if image.mode[0] not in "FI":  # the official scorers take palettes, grey and transparent pictures as they are
        return image
    if image.mode == "F" or max(image.getextrema()) > 65535:
        raise ValueError("its pixels are not of 8 or 16 bits: convert the image")
    return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")


def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def clean_text(text: str) -> str:
    """OpenAI CLIP's cleaning of a prompt, which transformers' tokenizer does not do."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def checkpoint_weights(checkpoint: str, *patterns: str) -> dict[str, torch.Tensor]:
    """All tensors in those files of a checkpoint (a folder or a Hub id) that match the first pattern with a match; by
    default transformers' names. They stay in the files until they are used: those of VQAScore have 44 GB."""
    for pattern in patterns or ("model*.safetensors", "pytorch_model*.bin"):
        local, weights = os.path.isdir(checkpoint), {}
        folder = checkpoint if local else HfApi().snapshot_download(checkpoint, allow_patterns=[pattern])
        for file in sorted(Path(folder).glob(pattern)):
            options = {"map_location": "cpu", "mmap": zipfile.is_zipfile(file), "weights_only": True}
            weights |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, **options)
        if weights:  # older versions of transformers saved the position_ids, which are no weights
            return {key: value for key, value in weights.items() if not key.endswith("position_ids")}
    raise FileNotFoundError("it has no file of weights")


def split_keys(weights: dict, prefix: str) -> dict:
    """Takes the tensors under a prefix out of `weights`."""
    return {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}


def linear_head(width: int, weights: dict) -> torch.nn.Sequential:
    """The head of the aesthetic predictor and of ImageReward: five linear layers, some with dropout between them."""
    sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    head = torch.nn.Sequential(OrderedDict((name, torch.nn.Linear(*size)) for name, size in sizes.items()))
    head.load_state_dict(weights)
    return head


def rename(key: str, renames: str) -> str:
    """Replaces parts of a key in turn; `renames` holds `old=new` words."""
    for word in renames.split():
        key = key.replace(*word.split("="))
    return key


def hf_clip_weights(weights: dict) -> dict:
    """open_clip's state dict under the names of transformers.CLIPModel."""
    renames = """.transformer.resblocks.=.encoder.layers. .ln_pre.=.pre_layrnorm. .ln_post.=.post_layernorm.
        .ln_final.=.final_layer_norm. .ln_1.=.layer_norm1. .ln_2.=.layer_norm2. .attn.=.self_attn. .mlp.c_fc.=.mlp.fc1.
        .mlp.c_proj.=.mlp.fc2. .class_embedding=.embeddings.class_embedding .conv1.=.embeddings.patch_embedding.
        .token_embedding.=.embeddings.token_embedding. .positional_embedding=.embeddings.position_embedding.weight
        text_model.text_projection=text_projection.weight vision_model.proj=visual_projection.weight
        text_model.logit_scale=logit_scale"""
    renamed = {}
    for key, value in weights.items():
        name = rename(f"vision_model.{key[7:]}" if key.startswith("visual.") else f"text_model.{key}", renames)
        if ".in_proj_" in name:
            names = [name.replace("in_proj_", f"{part}_proj.") for part in "qkv"]
            renamed |= {part: tensor.contiguous() for part, tensor in zip(names, value.chunk(3))}
        else:  # the projections are matrices in open_clip, linear layers in transformers
            renamed[name] = value.T if key in ("text_projection", "visual.proj") else value
    return renamed


def blip_weights(weights: dict) -> tuple[dict, dict, dict]:
    """ImageReward's state dict as those of transformers.BlipVisionModel, BlipTextModel and the head."""
    vision, prefixes = dict(weights), ("blip.text_encoder.", "mlp.layers.", "blip.vision_proj.", "blip.text_proj.")
    text, head, *_ = [split_keys(vision, prefix) for prefix in prefixes]  # the projections are of BLIP's pretraining
    renames = """.blip.visual_encoder.=. .cls_token=.embeddings.class_embedding .blocks.=.encoder.layers.
        .pos_embed=.embeddings.position_embedding .patch_embed.proj.=.embeddings.patch_embedding. .norm1.=.layer_norm1.
        .norm2.=.layer_norm2. .norm.=.post_layernorm. .attn.qkv.=.self_attn.qkv. .attn.proj.=.self_attn.projection."""
    return {rename(f".{key}", renames)[1:]: value for key, value in vision.items()}, text, head


# Name → class, checkpoint on the Hub, the base model that gives what the checkpoint lacks (configuration, tokenizer).
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
REWARD_MODELS = {
    "hpsv2": (HPSReward, "xswu/HPSv2", VIT_H),
    "hpsv2.1": (HPSReward, "xswu/HPSv2", VIT_H),
    "pickscore": (PickScoreReward, "yuvalkirstain/PickScore_v1", VIT_H),
    "imagereward": (ImageRewardReward, "zai-org/ImageReward", "google-bert/bert-base-uncased"),
    "aesthetic": (AestheticReward, "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", None),
    "clipscore": (CLIPScoreReward, "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    "vqascore": (VQAScoreReward, "zhiqiulin/clip-flant5-xxl", "google/flan-t5-xxl"),
    # Variants: HPSv2 with an antialiased resize.
    "hpsv2_antialias": (HPSReward, "xswu/HPSv2", VIT_H),
    "hpsv2.1_antialias": (HPSReward, "xswu/HPSv2", VIT_H),
}


# ----------------------------------------------------------------------------------------------------------------------
# Shared: arguments and files (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


class ArgumentParser(TrlParser):  # ends every usage error in one line, and knows the metadata of `flag`
    group = None

    def add_argument(self, *names, limits=None, group=None, **options):
        self.group = self.add_argument_group(group) if group else self.group
        return (self.group.add_argument if self.group else super().add_argument)(*names, **options)

    def error(self, message: str):
        # argparse names both spellings of a flag: --shard_size/--shard-size.
        raise SystemExit(re.sub(r"^argument |(?<=\w)/--[\w-]+", "", one_line(message)))


def parse_arguments(words: list[str] | None = None) -> "ScriptArguments":
    """Parses and checks the command line. `--config file.yaml` adds flags, which the command line overrides."""
    words, layout = sys.argv[1:] if words is None else words, argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(ScriptArguments, allow_abbrev=False, description=__doc__, formatter_class=layout)
    parser.add_argument("--config", type=config_words, default=[], metavar="FILE", help="YAML file of flags.")
    words = [*parser.parse_known_args(words)[0].config, *words]
    # The shell leaves ~/x in --flag=~/x and in name=~/x, and YAML has none.
    given = vars(parser.parse_args([re.sub(r"(^|=)~/", rf"\1{Path.home()}/", word) for word in words]))
    del given["config"]
    for spec in fields(ScriptArguments):
        value = given[spec.name]
        for phrase, limit in spec.metadata["limits"].items():
            if None not in (value, limit) and not COMPARE[phrase](value, limit):
                raise SystemExit(f"--{spec.name} {value}: must be {phrase} {limit}")
    return ScriptArguments(**given)


# Copied from train_rankdpo_sdxl.config_words
def config_words(file: str) -> list[str]:
    """The flags of a YAML file as words of a command line, so that argparse checks their types and choices too."""
    given = []
    # BaseLoader leaves every value as text, so `no` stays `no`. A single one stands behind "=": it may begin with "-".
    for name, value in dict(yaml.load(Path(file).expanduser().read_text(), Loader=yaml.BaseLoader) or {}).items():
        words = value if isinstance(value, list) else [value]
        if words and value not in ("", "~", "null", "Null", "NULL"):
            given += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    return given


@contextmanager
def plain_path(path: str) -> Iterator[str]:
    """The path of a dataset for `datasets`, which takes * ? [ in one for a pattern, and would read another folder: such
    a folder or file is linked under a plain name while the block lasts."""
    if not os.path.exists(path) or not glob.has_magic(os.path.abspath(path)):
        yield path
        return
    with TemporaryDirectory() as links:
        if os.path.isdir(path):
            yield shutil.copytree(os.path.abspath(path), f"{links}/data", copy_function=os.symlink)
        else:
            os.symlink(os.path.abspath(path), f"{links}/data{Path(path).suffix}")
            yield f"{links}/data{Path(path).suffix}"


def is_hidden(name: str) -> bool:
    """Whether a file is not the user's: hidden ("." is not), or of those that operating systems put into folders."""
    return bool(re.search(r"(^|/)(\.(?!$)|__MACOSX|__pycache__|Thumbs\.db|desktop\.ini)", name, re.I))


def one_line(error: BaseException | str) -> str:
    """An error's message on one line, whatever its class and length."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(text: str) -> None:
    """Says something on stderr, once for all processes of a run."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"warning: {text}", file=sys.stderr)


# Copied from train_rankdpo_sdxl.content_key with content_key->short_hash
def short_hash(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def batches(items, size: int) -> Iterator:
    return (items[start : start + size] for start in range(0, len(items), size))


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to, which becomes `file` when the block has ended without an error: there is no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.urandom(4).hex()}.tmp")
    yield temporary
    os.replace(temporary, file)


def write_bytes(file: Path, content: bytes) -> None:
    with replacing(file) as temporary:
        temporary.write_bytes(content)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):  # finished shards are whole: there is nothing to save
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    main(parse_arguments())
