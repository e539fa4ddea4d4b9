# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate",
#     "datasets",
#     "diffusers",
#     "huggingface_hub",
#     "numpy",
#     "peft",
#     "pillow",
#     "protobuf",
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
        --prompts prompts.txt --max_prompts 500 --metrics pickscore clipscore my_metrics.py:sharpness \
        --output_dir outputs/evaluation

Writes `results.json`, `results.md` and `grid.png`. Every metric's mean comes with its lift over the base model and the
lift's 95 % interval: a bootstrap over prompts, paired, since all models draw the same prompts from the same noise. Run
the same command again after a crash: images and scores that exist are kept. `accelerate launch` shares the drawing.
"""

import gc
import hashlib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import config as datasets_config
from datasets import load_dataset
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from PIL import Image as PILImage
from PIL import ImageDraw
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging
from trl import TrlParser


# Copied from build_synpic.REWARDS
REWARDS = ("pickscore", "clipscore")

BASELINE = "base"
LORA_FILE = "pytorch_lora_weights.safetensors"


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
    batch_size: int = field(default=4, metadata={"help": "Images drawn together."})
    seed: int = field(default=0, metadata={"help": "Seeds the images and the bootstrap."})

    # Metrics and output
    metrics: list[str] = field(
        default_factory=lambda: list(REWARDS),
        metadata={"help": "pickscore, clipscore, file.py:function with function(images, prompts) -> list of float."},
    )
    reward_batch_size: int = field(default=32, metadata={"help": "Images scored together."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Images, scores, results and report."})
    grid_rows: int = field(default=8, metadata={"help": "Prompts in the picture."})

    def __post_init__(self):
        # YAML values bypass argparse, so types and choices are checked here too.
        if not self.prompts:
            raise SystemExit("--prompts is missing: a text, .jsonl or .parquet file, or a dataset")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise SystemExit(f"--dtype {self.dtype}: choose from float32, float16, bfloat16")
        for name in ("loras", "metrics"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for name in (
            "max_prompts num_images_per_prompt num_inference_steps resolution batch_size reward_batch_size grid_rows"
        ).split():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SystemExit(f"--{name} {value}: must be a whole number, at least 1")


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
    """Name → {"lora": folder or Hub id or None, "file": local path of the weights}; the base model comes first."""
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
        name, _, path = item.partition("=")
        if not path or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise SystemExit(
                f"--loras {item}: must be name=folder or name=Hub id; name of letters, digits, '.', '_', '-'"
            )
        if name in models or name in RESERVED:
            raise SystemExit(f"--loras {item}: the name {name!r} is taken")
        try:
            file = Path(path, LORA_FILE) if os.path.isdir(path) else Path(hf_hub_download(path, LORA_FILE))
            if not file.is_file():
                raise FileNotFoundError(f"no {LORA_FILE} in it")
            with safe_open(file, framework="pt") as weights:
                if not any("lora" in key for key in weights.keys()):
                    raise ValueError(f"{file} holds no LoRA")
        except Exception as error:
            raise SystemExit(f"--loras {item}: cannot be read: {one_line(error)}") from None
        models[name] = {"lora": path, "file": str(file)}
    return models


# ----------------------------------------------------------------------------------------------------------------------
# Reward models
# ----------------------------------------------------------------------------------------------------------------------


# Copied from build_synpic.FunctionReward
class FunctionReward:
    """The user's own `function(images, prompts) -> list of float`."""

    def __init__(self, name: str, batch_size: int):
        file, _, function = name.rpartition(":")
        if not file.endswith(".py") or not function:
            raise SystemExit(f"reward {name}: unknown; choose from {', '.join(REWARDS)}, or path/to/file.py:function")
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

    def score(self, images: list, prompts: list[str]) -> list[float]:
        scores = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            found = list(self.function(images[batch], prompts[batch]))
            if len(found) != len(images[batch]):
                raise SystemExit(f"reward {self.name}: {len(found)} scores for {len(images[batch])} images")
            scores += [float(score) for score in found]
        return check_scores(self.name, scores, prompts)


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


# Copied from build_synpic.CLIPReward
class CLIPReward:
    """PickScore and CLIPScore: a scaled cosine of image and prompt embeddings.

    pickscore: Kirstain et al. (2023), exp(logit scale) · cosine, about 20 to 23.
    clipscore: Hessel et al. (2021), 2.5 · max(cosine, 0), ViT-B/32, prompts prefixed with "A photo depicts".
    """

    MODELS = {
        "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        "clipscore": ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    }

    def __init__(self, name: str, device, dtype, batch_size: int):
        model, processor = self.MODELS[name]
        self.name, self.device, self.batch_size = name, device, batch_size
        self.identity = model
        self.model = CLIPModel.from_pretrained(model, dtype=torch.float32).eval()
        # Taken in float32: bf16 turns PickScore's scale of 100 into 99, a difference as large as what is measured.
        self.logit_scale = self.model.logit_scale.exp().item()
        self.model.to(device, dtype)
        # The PIL backend is bit-exact with the transform that the published scores were made with.
        self.image_processor = AutoImageProcessor.from_pretrained(processor, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(processor)

    @torch.no_grad()
    def score(self, images: list, prompts: list[str]) -> list[float]:
        distinct = list(dict.fromkeys(prompts))  # k images share a prompt: encode it once
        text = torch.cat([self._encode_prompts(batch) for batch in self._batches(distinct)])
        image = torch.cat([self._encode_images(batch) for batch in self._batches(images)])
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        cosine = (image * text[[rows[prompt] for prompt in prompts]]).sum(dim=-1)
        if self.name == "pickscore":
            scores = self.logit_scale * cosine
        else:
            scores = 2.5 * cosine.clamp(min=0)
        return check_scores(self.name, scores.tolist(), prompts)

    def _batches(self, items: list):
        return (items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size))

    def _encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        if self.name == "clipscore":
            prompts = [f"A photo depicts {prompt}" for prompt in prompts]
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.device)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def _encode_images(self, images: list) -> torch.Tensor:
        pixels = self.image_processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        features = self.model.get_image_features(pixels.to(self.device, self.model.dtype)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1)


# Copied from build_synpic.load_reward_model
def load_reward_model(name: str, device="cpu", dtype=torch.float32, batch_size: int = 32):
    """Loads a reward model by name (pickscore, clipscore, path/to/file.py:function).

    Returns:
        an object with `.score(images, prompts) -> list[float]`: PIL images and their prompts, batched inside.
    """
    if name in REWARDS:
        return CLIPReward(name, device, dtype, batch_size)
    return FunctionReward(name, batch_size)


# Copied from build_synpic.check_scores
def check_scores(name: str, scores: list[float], prompts: list[str]) -> list[float]:
    for score, prompt in zip(scores, prompts):
        if not np.isfinite(np.float32(score)):  # they are stored as float32
            raise SystemExit(f"reward {name}: the score of prompt {prompt!r} is {score}: it must be a finite number")
    return scores


# Copied from build_synpic.reward_name
def reward_name(name: str) -> str:
    """The column of a reward: `shapes/world.py:color_reward` → `color_reward`."""
    return name.rpartition(":")[2]


# Copied from build_synpic.check_rewards
def check_rewards(names: list[str]) -> None:
    """Exits with one line unless every reward is known; imports the user's own functions."""
    columns = [reward_name(name) for name in names]
    if not columns or len(set(columns)) < len(columns):
        raise SystemExit(f"rewards {' '.join(names)}: one or more are needed, each with a name of its own")
    for name in names:
        if name not in REWARDS:
            FunctionReward(name, batch_size=2)


# ----------------------------------------------------------------------------------------------------------------------
# Images and scores: a file each, written under a temporary name and renamed; what exists is kept
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_rankdpo_sdxl.folder_digest
def folder_digest(folder: str) -> str:
    """A hash of the names, sizes and dates of a folder's files: a model's, or a dataset's without what
    build_synpic.py writes anew at every run (the card and its picture) or for itself (work)."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    names = [(file.relative_to(folder), file.stat()) for file in files]
    names = [(name, stat) for name, stat in names if name.parts[0] not in ("work", "README.md", "grid.png")]
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
    }


def image_seed(seed: int, prompt: str, number: int) -> int:
    """A seed of its own for every image, the same for all models."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}|{number}".encode()).digest()[:4], "big")


def image_file(output_dir: Path, model: str, prompt: int, number: int) -> Path:
    return output_dir / "images" / model / f"{prompt:05d}_{number}.png"


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
            ).to(state.device)
            pipeline.set_progress_bar_config(disable=True)
            if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
                pipeline.vae.enable_slicing()  # decoding a batch at once is what runs out of memory first
        if model["lora"]:
            pipeline.load_lora_weights(model["file"])
            if not pipeline.get_active_adapters():  # diffusers only warns
                raise SystemExit(
                    f"--loras {name}={model['lora']}: no key of it fits {args.pretrained_model_name_or_path}"
                )
        size = {"height": args.resolution, "width": args.resolution} if args.resolution else {}
        progress = tqdm(total=len(missing), desc=f"draw {name}", unit="image", disable=not state.is_local_main_process)
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            seeds = [image_seed(args.seed, prompts[i], n) for i, n in batch]
            images = pipeline(
                prompt=[prompts[i] for i, _ in batch],
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                **size,
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
            identity = {"metric": metric_identity(metric), **image_settings(args, prompts, model)}
            file = output_dir / "scores" / column / f"{name}.json"
            stored = json.loads(file.read_text()) if file.exists() else {}
            if stored.get("settings") != identity:
                reward = reward or load_reward_model(metric, state.device, torch.float32, args.reward_batch_size)
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


def metric_identity(metric: str) -> str:
    """What a metric's scores depend on: its model, or the text of its file."""
    if metric in REWARDS:
        return CLIPReward.MODELS[metric][0]
    return FunctionReward(metric, batch_size=1).identity


# ----------------------------------------------------------------------------------------------------------------------
# Statistics and report
# ----------------------------------------------------------------------------------------------------------------------


RESERVED = ("n_prompts", "n_images", "settings")


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


# Copied from train_rankdpo_sdxl.write_text
def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


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

    draw(args, prompts, models, state)
    if state.is_main_process:
        results = score(args, prompts, models, state)
        summary = summarize(results, categories, args.seed)
        n_images = len(prompts) * args.num_images_per_prompt
        settings = image_settings(args, prompts, models[BASELINE])
        settings["loras"] = {name: model["lora"] for name, model in models.items() if model["lora"]}
        report = markdown_report(summary, list(results), len(prompts), n_images)
        record = {"n_prompts": len(prompts), "n_images": n_images, "settings": settings, **summary}
        write_text(output_dir / "results.json", json.dumps(record, indent=2) + "\n")
        write_text(output_dir / "results.md", report)
        temporary = output_dir / ".grid.tmp.png"
        grid_picture(args, prompts, list(models)).save(temporary)
        os.replace(temporary, output_dir / "grid.png")
        print(report)
        print(f"{output_dir / 'results.json'}, {output_dir / 'results.md'}, {output_dir / 'grid.png'}")
    state.wait_for_everyone()


# Copied from train_rankdpo_sdxl.parse_arguments
def parse_arguments(arguments: list[str] | None = None) -> ScriptArguments:
    """Flags of the command line over those of `--config`; a wrong one ends in one line."""
    try:
        return TrlParser(ScriptArguments).parse_args_and_config(arguments)[0]
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"{os.path.basename(sys.argv[0])}: {one_line(error)}") from None


if __name__ == "__main__":
    diffusers_logging.disable_progress_bar()  # of loading weights; downloads and our own work show theirs
    transformers_logging.disable_progress_bar()
    main(parse_arguments())
