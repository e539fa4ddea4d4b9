# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate",
#     "datasets",
#     "diffusers",
#     "ftfy",
#     "huggingface_hub",
#     "matplotlib",
#     "numpy",
#     "peft",
#     "pillow",
#     "protobuf",
#     "pyyaml",
#     "safetensors",
#     "sentencepiece",
#     "torch",
#     "torchvision",
#     "tqdm",
#     "transformers",
#     "trl",
# ]
# ///
"""Compares a base model with LoRAs on the same prompts and seeds: reward metrics, win rates, intervals, pictures.

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=outputs/rankdpo-sdxl dpo=user/dpo-lora \
        --prompts prompts.txt --max_prompts 500 --metrics hpsv2.1 imagereward my_rewards.py:sharpness \
        --output_dir outputs/evaluation

How far does a run get with how much data? Every checkpoint of a run, metrics over the pairs (or prompts) seen:

    python evaluate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dtype float16 \
        --eval_checkpoints qsd=outputs/dpo-qsd-sd15 random=outputs/dpo-sd15 --prompts prompts.txt \
        --output_dir outputs/curves

Writes `results.json`, `results.md`, `grid.png` and, of checkpoints, `curves.png`. Every metric's mean comes with its
lift over the base model and the lift's 95 % interval: a bootstrap over prompts, paired, since all models draw the same
prompts from the same noise. Run the same command again after a crash: images and scores that exist are kept.
`accelerate launch` shares the drawing.

Onto the LoRA's page on the Hub, results in its card (table, picture and `model-index`):

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \
        --loras rankdpo=user/rankdpo-sdxl --prompts prompts.txt --output_dir outputs/evaluation --push_to_hub
"""

import gc
import hashlib
import html
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache
from io import BytesIO
from pathlib import Path

import ftfy
import matplotlib
import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import config as datasets_config
from datasets import load_dataset
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session
from PIL import Image as PILImage
from PIL import ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, pad, resize, to_tensor
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging
from trl import TrlParser


matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


# Copied from build_synpic.DEFAULT_REWARDS
DEFAULT_REWARDS = ("hpsv2.1", "pickscore", "imagereward", "aesthetic", "clipscore")

# Copied from build_synpic.REWARD_MODELS
REWARD_MODELS = {
    "hpsv2": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv2.1": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "imagereward": ("zai-org/ImageReward", "google-bert/bert-base-uncased"),
    "aesthetic": ("shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", None),
    "clipscore": ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    "vqascore": ("zhiqiulin/clip-flant5-xxl", "google/flan-t5-xxl"),
    # Variants, so named wherever a score is written: HPSv2 with a smoothing resize, VQAScore asked of another model.
    "hpsv2_antialias": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv2.1_antialias": ("xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "vqascore_vlm": ("Qwen/Qwen2.5-VL-7B-Instruct", None),
}

# Copied from build_synpic.VQASCORE_VISION
VQASCORE_VISION = "openai/clip-vit-large-patch14-336"  # its image processor

BASELINE = "base"
LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FACTS = ()  # of the front matter this script states nothing but results, in model-index
CARD_BEGIN = "<!-- evaluate.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what evaluate.py wrote. -->"


@dataclass
class ScriptArguments:
    """`--config file.yaml` reads the flags from a file; the command line overrides it."""

    # Models
    pretrained_model_name_or_path: str = field(
        default="stabilityai/stable-diffusion-xl-base-1.0", metadata={"help": "Base pipeline: Hub id or folder."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the model's files, e.g. fp16."})
    loras: list[str] = field(
        default_factory=list, metadata={"help": "name=folder or name=Hub id of each LoRA to compare with the base."}
    )
    eval_checkpoints: list[str] = field(
        default_factory=list,
        metadata={
            "help": "name=output_dir of training runs: all their checkpoints, drawn as curves over the data seen."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the models' weights.", "choices": ("float32", "float16", "bfloat16")},
    )

    # Prompts
    prompts: str | None = field(
        default=None,
        metadata={"help": "Text file (one a line), .jsonl, .parquet, a dataset's folder or its Hub id. Required."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts (not for text files)."})
    prompt_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    category_column: str | None = field(default=None, metadata={"help": "Column to break the results down by."})
    max_prompts: int | None = field(default=None, metadata={"help": "Take the first N distinct prompts."})

    # Drawing
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images per prompt and model, seeds of their own."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Classifier-free guidance."})
    resolution: int | None = field(default=None, metadata={"help": "Pixels a side; default: the model's own."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "T5 tokens of a prompt, for pipelines with T5; default: the pipeline's own."}
    )
    use_text_encoder_3: bool = field(
        default=True, metadata={"help": "SD3's T5. false: draw without it, as a LoRA trained without it is used."}
    )
    batch_size: int = field(default=4, metadata={"help": "Images drawn together."})
    seed: int = field(default=0, metadata={"help": "Seeds the images and the bootstrap."})

    # Metrics and output
    metrics: list[str] = field(
        default_factory=lambda: list(DEFAULT_REWARDS),
        metadata={"help": f"{', '.join(REWARD_MODELS)}, each also as name=checkpoint; file.py:function of your own."},
    )
    reward_batch_size: int = field(default=32, metadata={"help": "Images scored together."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Images, scores, results and report."})
    grid_rows: int = field(default=8, metadata={"help": "Prompts in the picture."})
    push_to_hub: bool = field(default=False, metadata={"help": "Put results.json, grid.png and card onto the Hub."})
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "Repository of the one LoRA; default: the repository of each that is given by a Hub id."},
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository private."})

    def __post_init__(self):
        # YAML values bypass argparse, so types and choices are checked here too.
        if not self.prompts:
            raise SystemExit("--prompts is missing: a text, .jsonl or .parquet file, or a dataset")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise SystemExit(f"--dtype {self.dtype}: choose from float32, float16, bfloat16")
        if type(self.use_text_encoder_3) is not bool:
            raise SystemExit(f"--use_text_encoder_3 {self.use_text_encoder_3}: must be true or false")
        for name in ("push_to_hub", "hub_private_repo"):
            if type(getattr(self, name)) is not bool:
                raise SystemExit(f"--{name} {getattr(self, name)}: must be true or false")
        for name in ("loras", "eval_checkpoints", "metrics"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for name in (
            "max_prompts num_images_per_prompt num_inference_steps resolution max_sequence_length batch_size "
            "reward_batch_size grid_rows"
        ).split():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SystemExit(f"--{name} {value}: must be a whole number, at least 1")


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def bootstrap_interval(values: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (n,), resampled with replacement.

    One value per prompt: the images of a prompt are not independent of each other.
    """
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare(scores: np.ndarray, baseline: np.ndarray, seed: int) -> dict:
    """Lift and win rate of a model over the baseline, image by image, with paired bootstrap intervals over prompts.

    Args:
        scores, baseline: (n_prompts, n_images) of the same prompts and seeds.

    Returns:
        `lift` (difference of means), `lift_ci95`, `win_rate` (share of images that score higher, a tie counts half),
        `win_rate_ci95`.
    """
    difference = (scores - baseline).mean(axis=1)
    wins = ((scores > baseline) + 0.5 * (scores == baseline)).mean(axis=1)
    return {
        "lift": float(difference.mean()),
        "lift_ci95": bootstrap_interval(difference, seed),
        "win_rate": float(wins.mean()),
        "win_rate_ci95": bootstrap_interval(wins, seed),
    }


def summarize(results: dict, categories: list[str] | None, seed: int) -> dict:
    """Model → {metric: mean, metric_lift, …, metric_by_category: {category: {n_prompts, mean, lift, …}}}."""
    summary = {}
    for metric, by_model in results.items():
        for name, scores in by_model.items():
            entry = summary.setdefault(name, {})
            entry[metric] = float(scores.mean())
            if name != BASELINE:
                found = compare(scores, by_model[BASELINE], seed)
                entry.update({f"{metric}_{key}": value for key, value in found.items()})
            if categories:
                entry[f"{metric}_by_category"] = {}
                for category in dict.fromkeys(categories):
                    chosen = np.array([other == category for other in categories])
                    part = {"n_prompts": int(chosen.sum()), "mean": float(scores[chosen].mean())}
                    if name != BASELINE:
                        part.update(compare(scores[chosen], by_model[BASELINE][chosen], seed))
                    entry[f"{metric}_by_category"][category] = part
    return summary


# ----------------------------------------------------------------------------------------------------------------------
# Stages: draw, score, report
# ----------------------------------------------------------------------------------------------------------------------


RESERVED = ("n_prompts", "n_images", "settings", "checkpoints")


def draw(args: ScriptArguments, prompts: list[str], models: dict, state: PartialState) -> None:
    """Draws what is missing, model by model, the pipeline loaded once."""
    output_dir, pipeline = Path(args.output_dir), None
    for name, model in models.items():
        write_settings(output_dir / "images" / name, image_settings(args, prompts, model))
        state.wait_for_everyone()
        items = [(i, n) for i in range(len(prompts)) for n in range(args.num_images_per_prompt)]
        missing = [item for item in items if not image_file(output_dir, name, *item).exists()]
        # All processes must have listed what is missing before any of them adds to it.
        state.wait_for_everyone()
        missing = missing[state.process_index :: state.num_processes]
        if not missing:
            continue
        if pipeline is None:
            pipeline = DiffusionPipeline.from_pretrained(
                args.pretrained_model_name_or_path,
                revision=args.revision,
                variant=args.variant,
                dtype=getattr(torch, args.dtype),
                **({} if args.use_text_encoder_3 else {"text_encoder_3": None, "tokenizer_3": None}),
            ).to(state.device)
            pipeline.set_progress_bar_config(disable=True)
            if getattr(pipeline, "safety_checker", None) is not None:
                pipeline.register_modules(safety_checker=None)  # SD1.5's: it would black out images, and be scored
            if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
                pipeline.vae.enable_slicing()  # decoding a batch at once is what runs out of memory first
        if model["lora"]:
            pipeline.load_lora_weights(model["file"])
            if not pipeline.get_active_adapters():  # diffusers only warns
                raise SystemExit(f"{model['lora']} ({name}): no key of it fits {args.pretrained_model_name_or_path}")
        options = {"height": args.resolution, "width": args.resolution} if args.resolution else {}
        if args.max_sequence_length:
            if "max_sequence_length" not in inspect.signature(pipeline.__call__).parameters:
                raise SystemExit(
                    f"--max_sequence_length: a {type(pipeline).__name__} has no such thing: leave the flag out"
                )
            options["max_sequence_length"] = args.max_sequence_length
        progress = tqdm(total=len(missing), desc=f"draw {name}", unit="image", disable=not state.is_local_main_process)
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            seeds = [image_seed(args.seed, prompts[i], n) for i, n in batch]
            images = pipeline(
                prompt=[prompts[i] for i, _ in batch],
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                **options,
            ).images
            for item, image in zip(batch, images):
                file = image_file(output_dir, name, *item)
                temporary = file.with_suffix(".tmp")
                image.save(temporary, "PNG")
                os.replace(temporary, file)
            progress.update(len(batch))
        progress.close()
        if model["lora"]:
            pipeline.unload_lora_weights()
    del pipeline
    gc.collect()
    torch.cuda.empty_cache()
    state.wait_for_everyone()


def score(args: ScriptArguments, prompts: list[str], models: dict, state: PartialState) -> dict:
    """Scores every model's images with every metric.

    Returns:
        metric → model → float64 array (n_prompts, num_images_per_prompt).
    """
    output_dir = Path(args.output_dir)
    results = {}
    for metric in args.metrics:
        column, reward, results[reward_name(metric)] = reward_name(metric), None, {}
        for name, model in models.items():
            identity = {"metric": reward_settings(metric), **image_settings(args, prompts, model)}
            file = output_dir / "scores" / column / f"{name}.json"
            stored = json.loads(file.read_text()) if file.exists() else {}
            if stored.get("settings") != identity:
                reward = reward or load_reward_model(metric, state.device, batch_size=args.reward_batch_size)
                items = [(i, n) for i in range(len(prompts)) for n in range(args.num_images_per_prompt)]
                values = []
                for start in tqdm(range(0, len(items), 256), desc=f"{column} of {name}", unit_scale=256, unit="image"):
                    batch = items[start : start + 256]
                    images = [PILImage.open(image_file(output_dir, name, *item)) for item in batch]
                    values += reward.score(images, [prompts[i] for i, _ in batch])
                values = np.reshape(values, (len(prompts), args.num_images_per_prompt)).tolist()
                stored = {"settings": identity, "scores": values}
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(stored))
            results[column][name] = np.array(stored["scores"], dtype=np.float64)
        del reward
        gc.collect()
        torch.cuda.empty_cache()
    return results


def main(args: ScriptArguments) -> None:
    launched = "LOCAL_RANK" in os.environ
    waiting = {"timeout": timedelta(days=7)} if launched else {}
    state = PartialState(cpu=launched and not torch.cuda.is_available(), **waiting)

    # Everything that can be wrong with flags, files and folders is found here, before a model is loaded.
    check_rewards(args.metrics)
    keep = (args.category_column,) if args.category_column else ()
    rows = read_prompts(args.prompts, args.prompt_column, args.prompt_split, args.max_prompts, keep)
    prompts = [row["prompt"] for row in rows]
    categories = [str(row[args.category_column]) for row in rows] if args.category_column else None
    models = read_models(args)
    output_dir = Path(args.output_dir)
    for name, model in models.items():
        check_settings(output_dir / "images" / name, image_settings(args, prompts, model), f"images of {name}")
    state.wait_for_everyone()  # nobody writes before all have looked
    repositories = hub_repositories(args, models) if args.push_to_hub else {}
    if state.is_main_process:  # a wrong token or name fails now, not after the work
        repositories = {
            name: create_repo(repo_id, "model", args.hub_private_repo) for name, repo_id in repositories.items()
        }

    draw(args, prompts, models, state)
    if state.is_main_process:
        results = score(args, prompts, models, state)
        summary = summarize(results, categories, args.seed)
        n_images = len(prompts) * args.num_images_per_prompt
        settings = image_settings(args, prompts, models[BASELINE])
        settings["loras"] = {name: model["lora"] for name, model in models.items() if model["lora"]}
        checkpoints = {
            name: {key: model[key] for key in ("run", "seen")} for name, model in models.items() if "run" in model
        }
        report = markdown_report(summary, list(results), len(prompts), n_images)
        record = {"n_prompts": len(prompts), "n_images": n_images, "settings": settings, **summary}
        shown = list(models)
        if checkpoints:
            record["checkpoints"] = checkpoints
            draw_curves(summary, models, list(results), output_dir / "curves.png")
            last = {model["run"]: name for name, model in models.items() if "run" in model}  # steps are in order
            shown = [name for name in models if name not in checkpoints or name in last.values()]
        write_text(output_dir / "results.json", json.dumps(record, indent=2) + "\n")
        write_text(output_dir / "results.md", report)
        temporary = output_dir / ".grid.tmp.png"
        grid_picture(args, prompts, shown).save(temporary)
        os.replace(temporary, output_dir / "grid.png")
        print(report)
        files = ["results.json", "results.md", "grid.png"] + ["curves.png"] * bool(checkpoints)
        print(", ".join(str(output_dir / file) for file in files))
        for name, repo_id in repositories.items():
            publish(args, repo_id, results_card(args, name, repo_id, record, report, list(results)))
    state.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and models
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.one_line
def one_line(error: Exception) -> str:
    """An exception's message on one line, whatever its class and length."""
    return " ".join(str(error).split()) or type(error).__name__


# Copied from train_rankdpo_sdxl.local_cache
def local_cache(folder: str) -> str | None:
    """Where `load_dataset` shall cache a local folder; None for a dataset of the Hub.

    By itself it keys the cache of a folder by the patterns in its card, not by its files, and so would serve the old
    rows of a dataset that was built again.
    """
    if not os.path.isdir(folder):
        return None
    return os.path.join(datasets_config.HF_DATASETS_CACHE, f"local-{folder_digest(folder)}")


# Copied from build_synpic.read_prompts
def read_prompts(
    source: str, column: str, split: str, max_prompts: int | None, keep: tuple[str, ...] = ()
) -> list[dict]:
    """Reads prompts in order and drops duplicates.

    Returns:
        one dict per prompt: "prompt", stripped, and the columns to `keep`. Exits with one line that names the row if a
        prompt is empty, or the column that is missing.
    """
    path = Path(source)
    try:
        if path.suffix == ".txt" and path.is_file():
            lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
            rows, columns = [{column: line} for line in lines if lines != [""]], [column]
        else:
            if path.suffix in (".jsonl", ".json", ".parquet") and path.is_file():
                kind = "parquet" if path.suffix == ".parquet" else "json"
                rows = load_dataset(kind, data_files=str(path), split="train")
            elif path.suffix in (".txt", ".jsonl", ".json", ".parquet"):
                raise FileNotFoundError("no such file")
            else:
                rows = load_dataset(source, split=split, cache_dir=local_cache(source))
            columns = rows.column_names
    except Exception as error:
        raise SystemExit(f"--prompts {source}: cannot be read: {one_line(error)}") from None
    for name in (column, *keep):
        if name not in columns:
            raise SystemExit(f"--prompts {source}: no column {name!r}; it has {', '.join(columns)}")
    if not isinstance(rows, list):  # images of a preference dataset stay unread
        rows = rows.select_columns(list(dict.fromkeys((column, *keep))))
    found = {}
    for number, row in enumerate(rows, 1):
        prompt = row[column]
        if not isinstance(prompt, str) or not prompt.strip():
            raise SystemExit(f"--prompts {source}: row {number}: the prompt is empty: remove the row")
        found.setdefault(prompt.strip(), {**row, "prompt": prompt.strip()})
        if max_prompts and len(found) == max_prompts:
            break
    if not found:
        raise SystemExit(f"--prompts {source}: holds no prompts")
    return list(found.values())


def read_models(args: ScriptArguments) -> dict[str, dict]:
    """Name → {"lora": folder or Hub id or None, "file": local path of the weights}, the base model first; a checkpoint
    has also "run", its run's name, and "seen", the pairs or prompts that the run had seen."""
    model = args.pretrained_model_name_or_path
    try:
        if os.path.isdir(model):
            json.loads(Path(model, "model_index.json").read_text())
        else:
            hf_hub_download(model, "model_index.json", revision=args.revision)
    except Exception as error:
        raise SystemExit(
            f"--pretrained_model_name_or_path {model}: not a diffusers pipeline: {one_line(error)}"
        ) from None
    models = {BASELINE: {"lora": None, "file": None}}
    for item in args.loras:
        name, path = named_path("--loras", item, models)
        try:
            file = Path(path, LORA_FILE) if os.path.isdir(path) else Path(hf_hub_download(path, LORA_FILE))
            check_lora(file)
        except Exception as error:
            raise SystemExit(f"--loras {item}: cannot be read: {one_line(error)}") from None
        models[name] = {"lora": path, "file": str(file)}
    for item in args.eval_checkpoints:
        name, path = named_path("--eval_checkpoints", item, models)
        try:
            per_step = json.loads(Path(path, "run.json").read_text())["global_batch_size"]
            steps = [re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in Path(path).iterdir()]
            steps = sorted(int(step.group(1)) for step in steps if step)
            if not steps:
                raise FileNotFoundError("no checkpoint in it")
            for step in steps:
                folder = Path(path, f"checkpoint-{step}")
                check_lora(folder / LORA_FILE)
                facts = {"lora": str(folder), "file": str(folder / LORA_FILE), "run": name, "seen": step * per_step}
                models[f"{name}@{step}"] = facts
        except Exception as error:
            raise SystemExit(f"--eval_checkpoints {item}: not a training run's folder: {one_line(error)}") from None
    return models


def named_path(flag: str, item: str, models: dict) -> tuple[str, str]:
    """name=path in two, the name checked."""
    name, _, path = item.partition("=")
    if not path or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise SystemExit(f"{flag} {item}: must be name=folder or name=Hub id; name of letters, digits, '.', '_', '-'")
    if name in RESERVED or name in models or any(name == model.get("run") for model in models.values()):
        raise SystemExit(f"{flag} {item}: the name {name!r} is taken")
    return name, path


def check_lora(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"no {LORA_FILE} in it")
    with safe_open(file, framework="pt") as weights:
        if not any("lora" in key for key in weights.keys()):
            raise ValueError(f"{file} holds no LoRA")


# ----------------------------------------------------------------------------------------------------------------------
# Reward models
# ----------------------------------------------------------------------------------------------------------------------


# Copied from build_synpic.BadImage
class BadImage(Exception):
    """An image that does not decode."""


# Copied from build_synpic.decoded
def decoded(image):
    """The PIL image, or the one in these bytes, its pixels read."""
    try:
        image = PILImage.open(BytesIO(image)) if isinstance(image, bytes) else image
        image.load()
    except Exception as error:  # PIL raises many kinds
        raise BadImage(f"{type(error).__name__}: {one_line(error)}") from None
    return image


# Copied from build_synpic.FunctionReward
class FunctionReward:
    """The user's own `function(images, prompts) -> list of float`."""

    def __init__(self, name: str, batch_size: int):
        file, _, function = name.rpartition(":")
        if not file.endswith(".py") or not function:
            raise SystemExit(
                f"reward {name}: unknown; choose from {', '.join(REWARD_MODELS)}, or path/to/file.py:function"
            )
        if not Path(file).is_file():
            raise SystemExit(f"reward {name}: no file {file}")
        try:
            module = import_file(str(Path(file).resolve()))
        except Exception as error:
            raise SystemExit(f"reward {name}: {file} cannot be imported: {one_line(error)}") from None
        if not callable(getattr(module, function, None)):
            raise SystemExit(f"reward {name}: {file} has no function {function!r}")
        self.name, self.function, self.batch_size = name, getattr(module, function), batch_size
        self.identity = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]

    def score(self, images: list, prompts: list[str], skip_bad: bool = False) -> list[float]:
        """As RewardModel.score."""
        scores = [math.nan] * len(images)
        for batch in batches(list(range(len(images))), self.batch_size):
            good = {}
            for place in batch:
                try:
                    good[place] = decoded(images[place])
                except BadImage:
                    if not skip_bad:
                        raise
            if not good:
                continue
            found = list(self.function(list(good.values()), [prompts[place] for place in good]))
            if len(found) != len(good):
                raise SystemExit(f"reward {self.name}: {len(found)} scores for {len(good)} images")
            check_scores(self.name, found, [prompts[place] for place in good])
            for place, score in zip(good, found):
                scores[place] = float(score)
        return scores


# Copied from build_synpic.import_file
@cache
def import_file(file: str):
    """Runs a Python file once, as a module that finds its neighbours."""
    spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up here
    sys.path.append(str(Path(file).parent))
    spec.loader.exec_module(module)
    return module


# Copied from build_synpic.RewardModel
class RewardModel:
    """What the reward models share: workers that decode and resize, batches, and every distinct image and prompt of a
    call encoded once.

    A subclass loads its weights in `load` and gives `prepare` (PIL image → what the model takes, run by a worker),
    `encode_images` and `encode_prompts` (features of one batch) and `compare` (n of each → n rewards in float32).
    """

    def __init__(self, name: str, device="cpu", dtype=None, batch_size: int = 32):
        self.name, self.kind = name, name.partition("=")[0]
        self.checkpoint, self.processor = reward_source(name)
        self.device, self.batch_size = torch.device(device), batch_size
        # Of the half precisions float16 is the nearer one to float32, but T5 and other language models overflow in it.
        half = torch.bfloat16 if self.kind.startswith("vqascore") else torch.float16
        self.dtype = dtype or (half if self.device.type == "cuda" else torch.float32)
        try:
            self.load()
        except Exception as error:
            message = f"{type(error).__name__}: {one_line(error)}"
            raise SystemExit(f"reward {name}: {self.checkpoint} cannot be loaded: {message}") from None

    def load_exactly(self, model_class, source: str | None, dtype=torch.float32, **kwargs) -> torch.nn.Module:
        """A transformers model; a key that the checkpoint lacks, or that the model does not know, is an error."""
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # no report of the keys that differ: here they are an error
        try:
            model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
        finally:
            transformers_logging.set_verbosity(verbosity)
        for what in ("missing", "unexpected", "mismatched"):
            if keys := sorted(map(str, info[f"{what}_keys"])):
                raise ValueError(f"{len(keys)} {what} keys: {', '.join(keys[:3])}{', …' if keys[3:] else ''}")
        # Out of the mapped file into memory of our own: weights that lie across the boundaries of 64 bytes give, on a
        # CPU, other last digits from run to run.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, images: list, prompts: list[str], skip_bad: bool = False) -> list[float]:
        """The reward of each image for its prompt.

        Args:
            images: n PIL images, or the bytes of their files, which the workers decode and then forget; an object that
                is listed again is not encoded again.
            prompts: n prompts.
            skip_bad: give NaN for an image that does not decode, instead of raising BadImage.
        """
        distinct = list(dict.fromkeys(prompts))
        texts = [row for batch in batches(distinct, self.batch_size) for row in self.encode_prompts(batch)]
        texts = dict(zip(distinct, texts, strict=True))
        asked = {}  # image → prompt → positions
        for position, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            asked.setdefault(id(image), {}).setdefault(prompt, []).append(position)
        positions, rewards = [], []
        for batch in self.prepared({id(image): image for image in images}, skip_bad):
            features = self.encode_images([pixels for _, pixels in batch]) if batch else []
            pairs = [(row, key, prompt) for row, (key, _) in enumerate(batch) for prompt in asked[key]]
            positions += [asked[key][prompt] for _, key, prompt in pairs]
            for part in batches(pairs, self.batch_size):
                # Rewards stay on the device until all is done: to wait for each batch would leave the device idle.
                rewards.append(self.compare([features[row] for row, _, _ in part], [texts[text] for *_, text in part]))
        rewards = torch.cat(rewards).tolist() if rewards else []
        check_scores(self.name, rewards, [prompts[places[0]] for places in positions])
        scores = [math.nan] * len(images)
        for places, reward in zip(positions, rewards):
            for place in places:
                scores[place] = reward
        return scores

    def prepared(self, images: dict, skip_bad: bool):
        """Batches of (key, `prepare`d image), by workers that stay two batches ahead; bad images may be left out."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            ahead = deque()
            for batch in [*batches(list(images.items()), self.batch_size), [], []]:
                ahead.append([(key, pool.submit(self.decode_and_prepare, image)) for key, image in batch])
                if len(ahead) > 2:
                    futures = ahead.popleft()
                    if skip_bad:
                        futures = [item for item in futures if not isinstance(item[1].exception(), BadImage)]
                    yield [(key, future.result()) for key, future in futures]

    def decode_and_prepare(self, image):
        return self.prepare(decoded(image))

    def stack(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(pixels).to(self.device, self.dtype)


# Copied from build_synpic.batches
def batches(items: list, size: int):
    return (items[start : start + size] for start in range(0, len(items), size))


# Copied from build_synpic.HPSReward
class HPSReward(RewardModel):
    """HPSv2 and v2.1 (Wu et al., 2023): the cosine of CLIP ViT-H/14, about 0.2 to 0.35, as `hpsv2.score` gives it
    (`hpsv2.evaluate` shows it times 100)."""

    FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}

    def load(self):
        file = self.FILES[self.kind.removesuffix("_antialias")]
        weights = torch.load(checkpoint_file(self.checkpoint, file), map_location="cpu", weights_only=True)
        weights = hf_clip_weights(weights["state_dict"])
        config = clip_config(weights)
        self.size = config.vision_config.image_size
        self.model = self.load_exactly(CLIPModel, None, config=config, state_dict=weights)
        self.model.to(self.device, self.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor)

    def prepare(self, image) -> torch.Tensor:
        """The longer side to 224, the rest padded with black. When the model was trained and its published scores were
        made, torchvision resized tensors without antialiasing: so it is done here."""
        pixels = to_tensor(image.convert("RGB"))
        scale = self.size / max(pixels.shape[1:])
        if scale != 1:
            size = [max(round(side * scale), 1) for side in pixels.shape[1:]]
            smooth = self.kind.endswith("_antialias")
            pixels = resize(pixels, size, InterpolationMode.BICUBIC, antialias=smooth)
        high, wide = self.size - pixels.shape[1], self.size - pixels.shape[2]
        pixels = pad(pixels, [wide // 2, high // 2, wide - wide // 2, high - high // 2])
        return normalize(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return unit(self.model.get_image_features(self.stack(pixels)).pooler_output)

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        # Attention is causal and the feature is the first end token's: padding to its right plays no part.
        tokens = self.tokenize(prompts, padding=True, return_tensors="pt").to(self.device)
        return unit(self.model.get_text_features(tokens).pooler_output)

    def tokenize(self, prompts: list[str], **kwargs):
        texts = [clean_text(prompt) for prompt in prompts]
        # To HPSv2's tokenizer, unlike OpenAI's, "<|endoftext|>" in a prompt is text like any other.
        kwargs["split_special_tokens"] = self.kind.startswith("hpsv2")
        return self.tokenizer(texts, truncation=True, max_length=77, **kwargs).input_ids

    def compare(self, images: list, texts: list) -> torch.Tensor:
        return (torch.stack(images) * torch.stack(texts)).sum(dim=-1)


# Copied from build_synpic.PickScoreReward
class PickScoreReward(HPSReward):
    """PickScore (Kirstain et al., 2023): exp(logit scale) · cosine of CLIP ViT-H/14, about 20 to 23."""

    def load(self):
        self.model = self.load_exactly(CLIPModel, self.checkpoint)
        # Taken in float32: bf16 turns the scale of 100 into 99, a difference as large as what is measured.
        self.logit_scale = self.model.logit_scale.exp().item()
        self.model.to(self.device, self.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor)
        # The PIL backend is bit-exact with the transform that the published scores were made with.
        self.image_processor = image_processor(self.checkpoint, self.processor)

    def prepare(self, image) -> torch.Tensor:
        image = image.convert("RGB")
        image.info.pop("transparency", None)  # of a palette image: the processor would blend it, PickScore's did not
        return self.image_processor(image, return_tensors="pt").pixel_values[0]

    def tokenize(self, prompts: list[str], **kwargs):
        return self.tokenizer(prompts, truncation=True, max_length=77, **kwargs).input_ids

    def compare(self, images: list, texts: list) -> torch.Tensor:
        return self.logit_scale * super().compare(images, texts)


# Copied from build_synpic.CLIPScoreReward
class CLIPScoreReward(HPSReward):
    """CLIPScore as Hessel et al. (2021) define it: 2.5 · max(cosine, 0) of CLIP ViT-B/32, "A photo depicts" first."""

    def load(self):
        self.model = self.load_exactly(CLIPModel, self.checkpoint).to(self.device, self.dtype)
        self.size = self.model.config.vision_config.image_size
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor)

    def prepare(self, image) -> torch.Tensor:
        return clip_pixels(image, self.size)

    def tokenize(self, prompts: list[str], **kwargs):
        return super().tokenize([f"A photo depicts {prompt}" for prompt in prompts], **kwargs)

    def compare(self, images: list, texts: list) -> torch.Tensor:
        return 2.5 * super().compare(images, texts).clamp(min=0)


# Copied from build_synpic.AestheticReward
class AestheticReward(RewardModel):
    """LAION aesthetic predictor v2 (sac+logos+ava1, linear MSE): about 1 to 10; the prompt plays no part."""

    def load(self):
        weights = checkpoint_weights(self.checkpoint)
        head = split_keys(weights, "layers.")
        config = CLIPVisionConfig.from_pretrained(self.checkpoint)
        self.size = config.image_size
        self.model = self.load_exactly(CLIPVisionModelWithProjection, None, config=config, state_dict=weights)
        self.model.to(self.device, self.dtype)
        self.head = linear_head(head).to(self.device)

    def prepare(self, image) -> torch.Tensor:
        return clip_pixels(image, self.size)

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return self.head(unit(self.model(self.stack(pixels)).image_embeds))[:, 0]

    def encode_prompts(self, prompts: list[str]) -> list:
        return prompts

    def compare(self, images: list, texts: list) -> torch.Tensor:
        return torch.stack(images)


# Copied from build_synpic.ImageRewardReward
class ImageRewardReward(RewardModel):
    """ImageReward v1.0 (Xu et al., 2023): BLIP's text encoder looks at the image, a linear head rates it; -2 to 2."""

    def load(self):
        weights = torch.load(checkpoint_file(self.checkpoint, "ImageReward.pt"), map_location="cpu", weights_only=True)
        vision, text, head = blip_weights(weights)
        vision_config, text_config = blip_configs(vision, text)
        self.size = vision_config.image_size
        self.vision = self.load_exactly(BlipVisionModel, None, config=vision_config, state_dict=vision)
        self.text = self.load_exactly(BlipTextModel, None, config=text_config, state_dict=text, add_pooling_layer=False)
        self.vision.to(self.device, self.dtype)
        self.text.to(self.device, self.dtype)
        self.head = linear_head(head).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor)
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})

    def prepare(self, image) -> torch.Tensor:
        return clip_pixels(image, self.size)

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        return self.vision(self.stack(pixels)).last_hidden_state

    def encode_prompts(self, prompts: list[str]) -> list:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return list(zip(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)))

    def compare(self, images: list, texts: list) -> torch.Tensor:
        # The decoder that the configuration names is run as an encoder: it sees the text in both directions.
        hidden = self.text(
            torch.stack([ids for ids, _ in texts]),
            attention_mask=torch.stack([mask for _, mask in texts]),
            encoder_hidden_states=torch.stack(images),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(hidden[:, 0].float())[:, 0] - 0.16717362830052426) / 1.0333394966054072


# Copied from build_synpic.VQAScoreReward
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
        if not vision:  # frozen in its training, so a checkpoint may leave it out
            vision = checkpoint_weights(VQASCORE_VISION)
            vision = {key: value for key, value in vision.items() if key.startswith("vision_model.")}
        projector = split_keys(weights, "mm_projector.")
        self.tokenizer = AutoTokenizer.from_pretrained(self.processor)
        # As the official code resizes it: what pads T5's vocabulary to 32128 is no word, and must not share in p.
        for key in ("shared.weight", "lm_head.weight"):
            weights[key] = weights[key][: len(self.tokenizer)]
        weights.pop("embed_tokens.weight", None)  # this and the next two are the same tensor as shared.weight
        weights["encoder.embed_tokens.weight"] = weights["decoder.embed_tokens.weight"] = weights["shared.weight"]
        config = T5Config.from_pretrained(self.checkpoint, vocab_size=len(weights["shared.weight"]))
        config.tie_word_embeddings = config.scale_decoder_outputs = False
        self.t5 = self.load_exactly(T5ForConditionalGeneration, None, self.dtype, config=config, state_dict=weights).to(
            self.device
        )
        vision_config = clip_vision_config(vision, "vision_model.", head_width=64, hidden_act="quick_gelu")
        self.vision = self.load_exactly(CLIPVisionModel, None, self.dtype, config=vision_config, state_dict=vision)
        self.vision.to(self.device)
        self.projector = torch.nn.Sequential(linear(projector, "0"), torch.nn.GELU(), linear(projector, "2"))
        if projector:
            raise ValueError(f"unexpected keys of mm_projector: {', '.join(projector)}")
        self.projector.to(self.device, self.dtype)
        self.image_processor = image_processor(self.checkpoint, VQASCORE_VISION)
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
        # Before and after the image are tokenised apart, so an end token stands before the image too.
        return [
            [torch.tensor(self.tokenizer(text).input_ids, device=self.device) for text in (self.BEFORE, after)]
            for after in map(self.AFTER.format, prompts)
        ]

    def compare(self, images: list, texts: list) -> torch.Tensor:
        embed = self.t5.get_input_embeddings()
        rows = [torch.cat([embed(before), image, embed(after)]) for image, (before, after) in zip(images, texts)]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(inputs.shape[1], device=self.device) < lengths[:, None]
        answer = self.answer.repeat(len(rows), 1)
        logits = self.t5(inputs_embeds=inputs, attention_mask=mask.long(), labels=answer).logits.float()
        return logits.log_softmax(dim=-1).gather(-1, answer[..., None]).mean(dim=(1, 2)).exp()


# Copied from build_synpic.VLMReward
class VLMReward(RewardModel):
    """A question like VQAScore's put to an image-text-to-text model of transformers: the probability of "Yes" as the
    first token. A variant: its numbers are not those of CLIP-FlanT5."""

    QUESTION = 'Does this image show "{}"? Answer the question with Yes or No.'

    def load(self):
        self.processor = AutoProcessor.from_pretrained(self.checkpoint)
        self.processor.tokenizer.padding_side = "left"  # the answer follows the last token
        self.model = self.load_exactly(AutoModelForImageTextToText, self.checkpoint, self.dtype).to(self.device)
        self.yes = self.processor.tokenizer("Yes", add_special_tokens=False).input_ids[0]

    def prepare(self, image):
        return image.convert("RGB")

    def encode_images(self, images: list) -> list:
        return images

    def encode_prompts(self, prompts: list[str]) -> list[str]:
        contents = [[{"type": "image"}, {"type": "text", "text": self.QUESTION.format(text)}] for text in prompts]
        return [
            self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            for content in contents
        ]

    def compare(self, images: list, texts: list) -> torch.Tensor:
        images = [[image] for image in images]  # one image a text: a flat list would be many images of the first
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.device, self.dtype), logits_to_keep=1).logits[:, -1].float()
        return logits.softmax(dim=-1)[:, self.yes]


# Copied from build_synpic.clean_text
def clean_text(text: str) -> str:
    """OpenAI CLIP's cleaning, which HPSv2 and CLIPScore do before tokenising; transformers' tokenizer has none."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


# Copied from build_synpic.clip_pixels
def clip_pixels(image, size: int) -> torch.Tensor:
    """OpenAI CLIP's transform, ImageReward's too: PIL image → float32 (3, size, size)."""
    image = center_crop(resize(image, size, InterpolationMode.BICUBIC), size).convert("RGB")
    return normalize(to_tensor(image), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


# Copied from build_synpic.unit
def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


# Copied from build_synpic.checkpoint_file
def checkpoint_file(checkpoint: str, name: str) -> str:
    """A file of a folder or of a repository on the Hub."""
    return os.path.join(checkpoint, name) if os.path.isdir(checkpoint) else hf_hub_download(checkpoint, name)


# Copied from build_synpic.image_processor
def image_processor(checkpoint: str, default: str):
    """The image processor in the checkpoint's folder, else the default one, on PIL: its other backend deviates."""
    own = os.path.exists(os.path.join(checkpoint, "preprocessor_config.json"))
    return AutoImageProcessor.from_pretrained(checkpoint if own else default, backend="pil")


# Copied from build_synpic.checkpoint_weights
def checkpoint_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """All tensors of a transformers checkpoint, a folder or on the Hub, safetensors before pickles."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        folder = checkpoint
        if not os.path.isdir(checkpoint):
            folder = snapshot_download(checkpoint, allow_patterns=[pattern])
        files = sorted(Path(folder).glob(pattern))
        if files:
            break
    else:
        raise FileNotFoundError("no model*.safetensors and no pytorch_model*.bin in it")
    weights = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        weights |= load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    return {key: value for key, value in weights.items() if not key.endswith("position_ids")}  # buffers, once saved


# Copied from build_synpic.split_keys
def split_keys(weights: dict, prefix: str) -> dict:
    """Takes the tensors under a prefix out of `weights`."""
    return {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}


# Copied from build_synpic.linear
def linear(weights: dict, name: str) -> torch.nn.Linear:
    """Takes a linear layer out of `weights`."""
    weight, bias = weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias")
    layer = torch.nn.Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False)


# Copied from build_synpic.linear_head
def linear_head(weights: dict) -> torch.nn.Sequential:
    """The head of the aesthetic predictor and of ImageReward: five linear layers with dropout, and nothing, between."""
    head = torch.nn.Sequential(*(linear(weights, name) for name in ("0", "2", "4", "6", "7")))
    if weights:
        raise ValueError(f"unexpected keys of the head: {', '.join(weights)}")
    return head


# Copied from build_synpic.hf_clip_weights
def hf_clip_weights(weights: dict) -> dict:
    """open_clip's state dict under the names of transformers' CLIPModel."""
    renames = {
        ".transformer.resblocks.": ".encoder.layers.",
        ".ln_pre.": ".pre_layrnorm.",
        ".ln_post.": ".post_layernorm.",
        ".ln_final.": ".final_layer_norm.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".attn.": ".self_attn.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
        ".class_embedding": ".embeddings.class_embedding",
        ".conv1.": ".embeddings.patch_embedding.",
        ".token_embedding.": ".embeddings.token_embedding.",
        ".positional_embedding": ".embeddings.position_embedding.weight",
    }
    found = {}
    for key, value in weights.items():
        if key in ("text_projection", "visual.proj"):  # matrices there, linear layers here
            found["text_projection.weight" if key == "text_projection" else "visual_projection.weight"] = value.T
            continue
        if key == "logit_scale":
            found[key] = value
            continue
        name = f"vision_model.{key[7:]}" if key.startswith("visual.") else f"text_model.{key}"
        for old, new in renames.items():
            name = name.replace(old, new)
        if ".in_proj_" in name:
            for part, tensor in zip("qkv", value.chunk(3)):
                found[name.replace("in_proj_", f"{part}_proj.")] = tensor.contiguous()
        else:
            found[name] = value
    return found


# Copied from build_synpic.n_layers
def n_layers(weights: dict, prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))


# Copied from build_synpic.clip_vision_config
def clip_vision_config(weights: dict, prefix: str, head_width: int, hidden_act: str) -> CLIPVisionConfig:
    """What the shapes of CLIP's image tower tell, and the two things that they do not."""
    width, _, patch, _ = weights[f"{prefix}embeddings.patch_embedding.weight"].shape
    positions = len(weights[f"{prefix}embeddings.position_embedding.weight"])
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights[f"{prefix}encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=n_layers(weights, f"{prefix}encoder.layers."),
        num_attention_heads=width // head_width,
        patch_size=patch,
        image_size=patch * math.isqrt(positions - 1),
        hidden_act=hidden_act,
    )


# Copied from build_synpic.clip_config
def clip_config(weights: dict) -> CLIPConfig:
    """The configuration of an open_clip ViT-H/14, or of a smaller relative with heads of the same widths."""
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
    text = {
        "hidden_size": width,
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": n_layers(weights, "text_model.encoder.layers."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"]),
        "vocab_size": vocabulary,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "hidden_act": "gelu",
    }
    vision = clip_vision_config(weights, "vision_model.", head_width=80, hidden_act="gelu").to_dict()
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=len(weights["text_projection.weight"]))


# Copied from build_synpic.blip_weights
def blip_weights(weights: dict) -> tuple[dict, dict, dict]:
    """ImageReward's state dict as those of BlipVisionModel, BlipTextModel and the head."""
    weights = dict(weights)
    vision, text = split_keys(weights, "blip.visual_encoder."), split_keys(weights, "blip.text_encoder.")
    head = split_keys(weights, "mlp.layers.")
    for prefix in ("blip.vision_proj.", "blip.text_proj."):  # of BLIP's pretraining: no part of the reward
        split_keys(weights, prefix)
    if weights:
        raise ValueError(f"{len(weights)} unexpected keys: {', '.join(list(weights)[:3])}")
    text.pop("embeddings.position_ids", None)
    renames = {
        ".cls_token": ".embeddings.class_embedding",
        ".pos_embed": ".embeddings.position_embedding",
        ".patch_embed.proj.": ".embeddings.patch_embedding.",
        ".blocks.": ".encoder.layers.",
        ".norm1.": ".layer_norm1.",
        ".norm2.": ".layer_norm2.",
        ".norm.": ".post_layernorm.",
        ".attn.qkv.": ".self_attn.qkv.",
        ".attn.proj.": ".self_attn.projection.",
    }
    renamed = {}
    for key, value in vision.items():
        name = f".{key}"
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[name[1:]] = value
    return renamed, text, head


# Copied from build_synpic.blip_configs
def blip_configs(vision: dict, text: dict) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """BLIP's two configurations from the shapes; all its heads are 64 wide."""
    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=n_layers(vision, "encoder.layers."),
        num_attention_heads=width // 64,
        image_size=patch * math.isqrt(vision["embeddings.position_embedding"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,  # the class's own default shifts the features by 7e-3
    )
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=n_layers(text, "encoder.layer."),
        num_attention_heads=hidden // 64,
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
    )
    return vision_config, text_config


# Copied from build_synpic.reward_source
def reward_source(name: str) -> tuple[str, str | None]:
    """A reward's checkpoint, and the folder or Hub id of its tokenizer and image processor: the checkpoint's own
    folder, where they lie in it."""
    kind, _, checkpoint = name.partition("=")
    default, processor = REWARD_MODELS[kind]
    checkpoint = checkpoint or default
    own = any(os.path.exists(os.path.join(checkpoint, file)) for file in ("tokenizer.json", "tokenizer_config.json"))
    return checkpoint, checkpoint if own else processor


# Copied from build_synpic.load_reward_model
def load_reward_model(name: str, device="cpu", dtype=None, batch_size: int = 32):
    """Loads a reward model.

    Args:
        name: one of REWARD_MODELS, with `=checkpoint` (a folder, or a Hub id) for another than the published one; or
            path/to/file.py:function.
        dtype: by default float32 on a CPU and half precision on a GPU.

    Returns:
        an object with `.score(images, prompts) -> list[float]`: PIL images and their prompts, batched inside.
    """
    kind = name.partition("=")[0]
    if kind not in REWARD_MODELS:
        return FunctionReward(name, batch_size)
    classes = {
        "pickscore": PickScoreReward,
        "imagereward": ImageRewardReward,
        "aesthetic": AestheticReward,
        "clipscore": CLIPScoreReward,
        "vqascore": VQAScoreReward,
        "vqascore_vlm": VLMReward,
    }
    return classes.get(kind, HPSReward)(name, device, dtype, batch_size)


# Copied from build_synpic.check_scores
def check_scores(name: str, scores: list[float], prompts: list[str]) -> list[float]:
    for score, prompt in zip(scores, prompts):
        if not np.isfinite(np.float32(score)):  # they are stored as float32
            raise SystemExit(f"reward {name}: the score of prompt {prompt!r} is {score}: it must be a finite number")
    return scores


# Copied from build_synpic.reward_name
def reward_name(name: str) -> str:
    """The column of a reward: `shapes/world.py:color_reward` → `color_reward`, `pickscore=folder` → `pickscore`."""
    kind, _, checkpoint = name.partition("=")
    if kind == "vqascore_vlm":  # the numbers of one model are not those of another
        return f"{kind}_{Path(checkpoint or REWARD_MODELS[kind][0]).name}"
    return kind if kind in REWARD_MODELS else name.rpartition(":")[2]


# Copied from build_synpic.reward_settings
def reward_settings(name: str) -> dict:
    """What a reward's scores depend on: its checkpoint, or the text of its file."""
    if name.partition("=")[0] not in REWARD_MODELS:
        return {"reward": name.rpartition("/")[2], "sha256": FunctionReward(name, batch_size=1).identity}
    checkpoint = reward_source(name)[0]
    files = {"files": folder_digest(checkpoint)} if os.path.isdir(checkpoint) else {}
    return {"reward": reward_name(name), "checkpoint": checkpoint, **files}


# Copied from build_synpic.check_rewards
def check_rewards(names: list[str]) -> None:
    """Exits with one line unless every reward is known; imports the user's own functions."""
    columns = [reward_name(name) for name in names]
    if not columns or len(set(columns)) < len(columns):
        raise SystemExit(f"rewards {' '.join(names)}: one or more are needed, each with a name of its own")
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
            except Exception:  # no network: it may lie in the cache
                pass


# ----------------------------------------------------------------------------------------------------------------------
# Images and scores: a file each, written under a temporary name and renamed; what exists is kept
# ----------------------------------------------------------------------------------------------------------------------


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


# Copied from build_synpic.check_settings
def check_settings(folder: Path, settings: dict, what: str) -> None:
    """Refuses to mix two runs: what stands in `folder` must have been made with these settings."""
    record = folder / "settings.json"
    if record.exists():
        previous = json.loads(record.read_text())
        for name in {**previous, **settings}:
            if previous.get(name) != settings.get(name):
                raise SystemExit(
                    f"{folder} holds {what} made with {name} {previous.get(name)}, not {settings.get(name)}: "
                    "choose another --output_dir or another name, or delete that folder"
                )


# Copied from build_synpic.write_settings
def write_settings(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".settings.tmp{os.getpid()}"
    temporary.write_text(json.dumps(settings, indent=2))
    os.replace(temporary, folder / "settings.json")


def image_settings(args: ScriptArguments, prompts: list[str], model: dict) -> dict:
    """What a model's images depend on."""
    lora = model["file"] and hashlib.sha256(Path(model["file"]).read_bytes()).hexdigest()[:16]
    return {
        "model": args.pretrained_model_name_or_path,
        "files": folder_digest(args.pretrained_model_name_or_path)
        if os.path.isdir(args.pretrained_model_name_or_path)
        else None,
        "variant": args.variant,
        "revision": args.revision,
        "lora": lora,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        "num_images_per_prompt": args.num_images_per_prompt,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "resolution": args.resolution,
        "dtype": args.dtype,
        "seed": args.seed,
        **({"max_sequence_length": args.max_sequence_length} if args.max_sequence_length else {}),
        **({} if args.use_text_encoder_3 else {"use_text_encoder_3": False}),
    }


def image_seed(seed: int, prompt: str, number: int) -> int:
    """A seed of its own for every image, the same for all models."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{number}".encode()).digest()[:4], "big")


def image_file(output_dir: Path, model: str, prompt: int, number: int) -> Path:
    return output_dir / "images" / model / f"{prompt:05d}_{number}.png"


# ----------------------------------------------------------------------------------------------------------------------
# Statistics and report
# ----------------------------------------------------------------------------------------------------------------------


def markdown_report(summary: dict, metrics: list[str], n_prompts: int, n_images: int) -> str:
    lines = [
        f"{n_prompts} prompts, {n_images} images per model, the same seeds for all. Lift over the base model and win "
        "rate with paired bootstrap 95 % intervals over prompts; a tie counts half a win.",
        "",
        "| model | metric | mean | lift | 95 % interval | win rate | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for metric in metrics:
        for name, entry in summary.items():
            cells = [name, metric, f"{entry[metric]:.4f}", "", "", "", ""]
            if name != BASELINE:
                (low, high), (worst, best) = entry[f"{metric}_lift_ci95"], entry[f"{metric}_win_rate_ci95"]
                cells[3:5] = [f"{entry[f'{metric}_lift']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
                cells[5:7] = [f"{entry[f'{metric}_win_rate']:.3f}", f"{worst:.3f} to {best:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    for metric in metrics:
        categories = next(iter(summary.values())).get(f"{metric}_by_category", {})
        if categories:
            lines += ["", f"{metric} by category:", "", "| category | prompts | " + " | ".join(summary) + " |"]
            lines.append("|---|---|" + "---|" * len(summary))
            for category, part in categories.items():
                means = [f"{entry[f'{metric}_by_category'][category]['mean']:.3f}" for entry in summary.values()]
                lines.append(f"| {category} | {part['n_prompts']} | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def grid_picture(args: ScriptArguments, prompts: list[str], models: list[str], cell: int = 192) -> PILImage.Image:
    """Prompts spread over the list, one a row; models side by side, same seed."""
    chosen = np.unique(np.linspace(0, len(prompts) - 1, min(args.grid_rows, len(prompts))).astype(int))
    per_model = min(args.num_images_per_prompt, 3)
    label, gap = 22, 12
    width = len(models) * (per_model * cell + gap) - gap
    canvas = PILImage.new("RGB", (width, label + (cell + label) * len(chosen)), "white")
    drawing = ImageDraw.Draw(canvas)
    for column, name in enumerate(models):
        left = column * (per_model * cell + gap)
        drawing.text((left + 4, 5), name, fill="black")
        for line, i in enumerate(chosen):
            top = label + line * (cell + label)
            for n in range(per_model):
                image = PILImage.open(image_file(Path(args.output_dir), name, int(i), n)).convert("RGB")
                resample = PILImage.NEAREST if image.width < cell else PILImage.LANCZOS
                canvas.paste(image.resize((cell, cell), resample), (left + n * cell, top))
    for line, i in enumerate(chosen):
        drawing.text((4, label + line * (cell + label) + cell + 4), prompts[i][: width // 7], fill="black")
    return canvas


def draw_curves(summary: dict, models: dict, metrics: list[str], file: Path) -> None:
    """Every metric over the pairs or prompts that a run had seen, with the 95 % intervals of the lift over the base."""
    runs = list(dict.fromkeys(model["run"] for model in models.values() if "run" in model))
    figure, panels = pyplot.subplots(1, len(metrics), figsize=(5 * len(metrics), 4), squeeze=False)
    for axes, metric in zip(panels[0], metrics):
        base = summary[BASELINE][metric]
        for run in runs:
            names = [name for name, model in models.items() if model.get("run") == run]
            seen = [0] + [models[name]["seen"] for name in names]
            axes.plot(seen, [base] + [summary[name][metric] for name in names], marker="o", markersize=3, label=run)
            intervals = [(0.0, 0.0)] + [summary[name][f"{metric}_lift_ci95"] for name in names]
            axes.fill_between(seen, *([base + end for end in ends] for ends in zip(*intervals)), alpha=0.2)
        axes.axhline(base, color="black", linewidth=0.8, linestyle=":", label=BASELINE)
        axes.set(xlabel="seen in training", ylabel=metric)
    panels[0][0].legend()
    save_figure(figure, file)


# Copied from score_pairs.save_figure
def save_figure(figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp.png")
    figure.tight_layout()
    figure.savefig(temporary, dpi=100)
    pyplot.close(figure)
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


def hub_repositories(args: ScriptArguments, models: dict[str, dict]) -> dict[str, str]:
    """Name of a LoRA → repository that gets its results; exits with one line if there is none."""
    loras = {name: model["lora"] for name, model in models.items() if model["lora"] and "run" not in model}
    if args.hub_model_id:
        meant = [name for name, lora in loras.items() if lora == args.hub_model_id] or list(loras)
        if len(meant) != 1:
            raise SystemExit(f"--hub_model_id {args.hub_model_id}: is none of the {len(loras)} LoRAs in --loras")
        return {meant[0]: args.hub_model_id}
    found = {name: lora for name, lora in loras.items() if not os.path.isdir(lora)}
    if not found:
        raise SystemExit("--push_to_hub: no LoRA in --loras is a Hub id: say with --hub_model_id where results go")
    return found


def results_card(args: ScriptArguments, name: str, repo_id: str, record: dict, report: str, metrics: list[str]) -> str:
    """A card of nothing but a LoRA's results, to be merged into the card that stands on the Hub."""
    drawing = ("num_images_per_prompt", "num_inference_steps", "guidance_scale", "resolution", "seed")
    prompts = {"type": "prompts", "name": f"{os.path.basename(args.prompts)}, {record['n_prompts']} prompts"}
    if not os.path.exists(args.prompts):
        prompts |= {"type": args.prompts, "split": args.prompt_split}
    prompts["args"] = {key: record["settings"][key] for key in ("prompts", *drawing)}
    values = []
    for metric in metrics:
        lift, win_rate = record[name][f"{metric}_lift"], record[name][f"{metric}_win_rate"]
        values.append({"type": metric, "name": metric, "value": record[name][metric]})
        values.append({"type": metric, "name": f"{metric}, lift over the base model", "value": lift})
        values.append({"type": "win_rate", "name": f"{metric}, win rate over the base model", "value": win_rate})
    task = {"type": "text-to-image", "name": "Text-to-Image Generation"}
    model = args.pretrained_model_name_or_path
    front = {
        **({} if os.path.isdir(model) else {"base_model": model}),
        "library_name": "diffusers",
        "model-index": [
            {"name": repo_id.split("/")[-1], "results": [{"task": task, "dataset": prompts, "metrics": values}]}
        ],
    }
    base = os.path.basename(model) if os.path.isdir(model) else model
    settings = ", ".join(f"`{key}` {value}" for key, value in prompts["args"].items() if key != "prompts")
    others = [other for other in record["settings"]["loras"] if other != name]
    here = f"`{name}` is this LoRA" + (f"; {', '.join(f'`{other}`' for other in others)}: others." if others else ".")
    body = f"""{CARD_BEGIN}
## Evaluation

{here} Base model: `{base}`. Prompts: {prompts["name"]}. {settings}.

{report}
![The same prompts and seeds for all models](grid.png)

All figures are in [results.json](results.json).
{CARD_END}
"""
    return join_card(front, body)


def publish(args: ScriptArguments, repo_id: str, card: str) -> None:
    """Sends the results to the repository of one LoRA; exits with one line if that fails."""
    output_dir = Path(args.output_dir)
    files = [output_dir / name for name in ("results.json", "results.md", "grid.png", "curves.png")]
    try:
        push_to_hub(repo_id, "model", {file.name: file for file in files if file.exists()}, "Evaluation", card)
    except Exception as error:
        raise SystemExit(
            f"upload to {repo_id} failed: {one_line(error)}; everything is in {output_dir}: run the same command again"
        ) from None
    print(f"published: {HfApi().endpoint}/{repo_id}")


# Copied from train_rankdpo_sdxl.write_text
def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


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
