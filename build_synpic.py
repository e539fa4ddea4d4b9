# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate",
#     "datasets",
#     "diffusers",
#     "ftfy",
#     "huggingface_hub",
#     "numpy",
#     "pillow",
#     "protobuf",
#     "pyarrow",
#     "pyyaml",
#     "safetensors",
#     "scipy",
#     "sentencepiece",
#     "torch",
#     "torchvision",
#     "tqdm",
#     "transformers",
#     "trl",
# ]
# ///
"""Builds Syn-Pic: prompts x generators x reward models → a ranked preference dataset (Kag et al., 2024, Algorithm 1).

No human labels: every prompt is drawn by k text-to-image models, every reward model scores the k images, and an
image's preference probability is the share of all comparisons that it wins.

The paper's four generators, ranked by five reward models, for the first 1,000 prompts of a text file:

    python build_synpic.py --prompts prompts.txt --max_prompts 1000 --output_dir outputs/synpic

Several GPUs, own generators, own reward, prompts of a dataset on the Hub, published:

    accelerate launch build_synpic.py --prompts user/prompts --prompt_column caption \
        --generators recipes/synpic_sdxl.yaml --rewards pickscore my_rewards.py:sharpness \
        --output_dir outputs/synpic-sdxl --push_to_hub --hub_dataset_id user/synpic

The work is cut into shards under `<output_dir>/work`. Run the same command again after a crash: only what is missing is
done. A generator or a reward added later costs its own shards; then everything is ranked anew. With `--push_to_hub` the
dataset's files are sent as they are finished and appear in one commit at the end; another configuration in that
repository, and what people wrote on its card, stays.
"""

import gc
import hashlib
import html
import importlib.util
import itertools
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
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import diffusers.pipelines
import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate import PartialState
from datasets import DatasetInfo, Features, Image, List, SplitDict, SplitInfo, Value, load_dataset
from datasets import config as datasets_config
from datasets.info import DatasetInfosDict
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCardData,
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
from safetensors.torch import load_file
from scipy.stats import kendalltau
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


STAGES = ("generate", "score", "rank", "publish")
DATA_FILES = ("data/train-*-of-*.parquet", "scores/train-*-of-*.parquet")
CARD_FACTS = ("size_categories",)  # of the front matter, what a run states anew beside its configurations
CARD_BEGIN = "<!-- build_synpic.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what build_synpic.py wrote. -->"
# The paper names PickScore, ImageReward and HPSv2 among its five rewards; the other two are a choice of ours.
DEFAULT_REWARDS = ("hpsv2.1", "pickscore", "imagereward", "aesthetic", "clipscore")

# Name → its checkpoint on the Hub, and where its tokenizer and image processor come from.
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
VQASCORE_VISION = "openai/clip-vit-large-patch14-336"  # its image processor

# The paper's generators, with their model cards' settings.
DEFAULT_GENERATORS = """
- name: sdxl
  model: stabilityai/stable-diffusion-xl-base-1.0
  load: {variant: fp16, dtype: float16}
  call: {num_inference_steps: 50, guidance_scale: 5.0, height: 1024, width: 1024}
- name: sd3-medium
  model: stabilityai/stable-diffusion-3-medium-diffusers
  load: {dtype: float16}
  call: {num_inference_steps: 28, guidance_scale: 7.0, height: 1024, width: 1024}
- name: pixart-sigma
  model: PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
  load: {dtype: float16}
  call: {num_inference_steps: 20, guidance_scale: 4.5, height: 1024, width: 1024, clean_caption: false}
- name: stable-cascade
  model: stabilityai/stable-cascade
  load: {variant: bf16, dtype: bfloat16}
  call: {num_inference_steps: 10, guidance_scale: 0.0}
  prior:
    model: stabilityai/stable-cascade-prior
    load: {variant: bf16, dtype: bfloat16}
    call: {num_inference_steps: 20, guidance_scale: 4.0, height: 1024, width: 1024}
"""


@dataclass
class ScriptArguments:
    """`--config file.yaml` reads the flags from a file; the command line overrides it."""

    # Prompts
    prompts: str | None = field(
        default=None,
        metadata={"help": "Text file (one a line), .jsonl, .parquet, a dataset's folder or its Hub id. Required."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts (not for text files)."})
    prompt_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    max_prompts: int | None = field(default=None, metadata={"help": "Take the first N distinct prompts."})

    # Generators
    generators: str | None = field(
        default=None,
        metadata={"help": "YAML list of generators (name, model, load, call, prior); default: the paper's four."},
    )
    generation_batch_size: int = field(default=4, metadata={"help": "Images drawn together."})
    image_format: str = field(
        default="jpg",
        metadata={"help": "jpg (quality 95; the Hub's viewer shows it) or png.", "choices": ("jpg", "png")},
    )
    seed: int = field(default=0, metadata={"help": "Seeds the images, with the prompt and the generator's name."})

    # Rewards
    rewards: list[str] = field(
        default_factory=lambda: list(DEFAULT_REWARDS),
        metadata={"help": f"{', '.join(REWARD_MODELS)}, each also as name=checkpoint; file.py:function of your own."},
    )
    reward_batch_size: int = field(default=32, metadata={"help": "Images scored together."})

    # Work and output
    output_dir: str = field(default="outputs/synpic", metadata={"help": "Dataset, card and the shards in work/."})
    shard_size: int = field(default=64, metadata={"help": "Prompts per shard: what a crash can lose."})
    stages: list[str] = field(
        default_factory=lambda: list(STAGES),
        metadata={"help": "Stages to run, of generate, score, rank, publish.", "choices": STAGES},
    )
    gpu_hourly_cost: float | None = field(default=None, metadata={"help": "$ per GPU and hour, for the card."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the dataset in the publish stage."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Dataset repository: user/name."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository private."})

    def __post_init__(self):
        # YAML values bypass argparse, so types and choices are checked here too.
        if not self.prompts:
            raise SystemExit("--prompts is missing: a text, .jsonl or .parquet file, or a dataset")
        for name in ("rewards", "stages"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for stage in self.stages:
            if stage not in STAGES:
                raise SystemExit(f"--stages {stage}: choose from {', '.join(STAGES)}")
        if self.image_format not in ("jpg", "png"):
            raise SystemExit(f"--image_format {self.image_format}: choose from jpg, png")
        for name in ("max_prompts", "generation_batch_size", "reward_batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SystemExit(f"--{name} {value}: must be a whole number, at least 1")
        if type(self.seed) is not int:
            raise SystemExit(f"--seed {self.seed}: must be a whole number")
        if self.gpu_hourly_cost is not None and type(self.gpu_hourly_cost) not in (int, float):
            raise SystemExit(f"--gpu_hourly_cost {self.gpu_hourly_cost}: must be a number")
        if self.push_to_hub and not self.hub_dataset_id:
            raise SystemExit("--push_to_hub needs --hub_dataset_id user/name")


# ----------------------------------------------------------------------------------------------------------------------
# Ranking
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Stages: draw, score, rank
# ----------------------------------------------------------------------------------------------------------------------


def generate(args: ScriptArguments, rows: list[dict], shards: list[range], generators: list[dict], state) -> None:
    """Draws what is missing: for each generator (loaded once, then freed) its image shards.

    Shards belong to processes by number, not by what is missing: processes look at different times.
    """
    for entry in generators:
        folder = Path(args.output_dir) / "work" / "images" / entry["name"]
        write_settings(folder, generator_settings(entry))
        ids = [[rows[i]["prompt_id"] for i in shard] for shard in shards]
        own = range(state.process_index, len(shards), state.num_processes)
        missing = [s for s in own if not is_complete(shard_file(folder, s), prompts=digest(ids[s]))]
        if not missing:
            continue
        draw = Generator(entry, state.device)
        progress = tqdm(
            total=sum(len(shards[s]) for s in missing),
            desc=f"draw {entry['name']}",
            unit="image",
            disable=not state.is_local_main_process,
        )
        for s in missing:
            started = time.time()
            images = read_column(shard_file(folder, s), "prompt_id", "image")  # of a shard that was not full
            seeds = {id: image_seed(args.seed, id, entry["name"]) for id in ids[s]}
            todo = [rows[i] for i in shards[s] if rows[i]["prompt_id"] not in images]
            progress.update(len(shards[s]) - len(todo))
            for start in range(0, len(todo), args.generation_batch_size):
                batch = todo[start : start + args.generation_batch_size]
                drawn = draw([row["prompt"] for row in batch], [seeds[row["prompt_id"]] for row in batch])
                images |= {row["prompt_id"]: encode_image(im, args.image_format) for row, im in zip(batch, drawn)}
                progress.update(len(batch))
            images = [images[id] for id in ids[s]]
            columns = {"image": pa.array(images, pa.large_binary()), "seed": list(seeds.values())}
            facts = {"prompts": digest(ids[s]), "images": digest(images)}
            facts["seconds"] = time.time() - started + (shard_facts(shard_file(folder, s)) or {}).get("seconds", 0.0)
            facts["device"] = device_name(state.device)
            write_table(pa.table({"prompt_id": ids[s], **columns}), shard_file(folder, s), facts)
        progress.close()
        del draw
        free_memory()
    state.wait_for_everyone()


def score(args: ScriptArguments, rows: list[dict], shards: list[range], generators: list[dict], state) -> None:
    """Scores what is missing: for each reward model (loaded once, then freed) and generator the score shards.

    Scores belong to images, by the hash of their bytes: an image drawn anew is scored anew.
    """
    work = Path(args.output_dir) / "work"
    for name in args.rewards:
        folder = work / "scores" / reward_name(name)
        write_settings(folder, reward_settings(name))
        missing = []
        for number, (entry, s) in enumerate((entry, s) for entry in generators for s in range(len(shards))):
            if number % state.num_processes != state.process_index:
                continue
            ids = [rows[i]["prompt_id"] for i in shards[s]]
            source, target = shard_file(work / "images" / entry["name"], s), shard_file(folder / entry["name"], s)
            if not is_complete(source, prompts=digest(ids)):
                raise SystemExit(f"{source} is missing: run the generate stage first")
            images = shard_facts(source)["images"]
            if not is_complete(target, prompts=digest(ids), images=images):
                missing.append((s, ids, source, target, images))
        if not missing:
            continue
        reward = load_reward_model(name, state.device, batch_size=args.reward_batch_size)
        progress = tqdm(
            total=sum(len(ids) for _, ids, *_ in missing),
            desc=f"score {reward_name(name)}",
            unit="image",
            disable=not state.is_local_main_process,
        )
        for s, ids, source, target, images in missing:
            started = time.time()
            data = pq.read_table(source)["image"].to_pylist()
            hashes = [digest([item, id]) for item, id in zip(data, ids)]
            scores = read_column(target, "image", "score")
            todo = [n for n in range(len(ids)) if hashes[n] not in scores]
            found = reward.score([data[n] for n in todo], [rows[shards[s][n]]["prompt"] for n in todo])
            scores |= {hashes[n]: value for n, value in zip(todo, found)}
            columns = {"image": hashes, "score": pa.array([scores[item] for item in hashes], pa.float32())}
            facts = {"prompts": digest(ids), "images": images}
            facts["seconds"] = time.time() - started + (shard_facts(target) or {}).get("seconds", 0.0)
            facts["device"] = device_name(state.device)
            write_table(pa.table({"prompt_id": ids, **columns}), target, facts)
            progress.update(len(ids))
        progress.close()
        del reward
        free_memory()
    state.wait_for_everyone()


def rank(args: ScriptArguments, rows: list[dict], shards: list[range], generators: list[dict], state) -> None:
    """Joins images and scores into the dataset's files. Where they are to be published, a file that is finished is sent
    while the next is made."""
    data = Path(args.output_dir) / "data"
    rewards = [reward_name(name) for name in args.rewards]
    features = Features(
        {
            "prompt_id": Value("string"),
            "prompt": Value("string"),
            "images": List(Image()),
            "generators": List(Value("string")),
            "seeds": List(Value("int64")),
            "scores": {reward: List(Value("float32")) for reward in rewards},
            "preference_probability": List(Value("float32")),
            "rank": List(Value("int32")),
        }
    )
    per_file = math.ceil(len(shards) / 200)  # the dataset can be published in one commit
    parts = [range(s, min(s + per_file, len(shards))) for s in range(0, len(shards), per_file)]
    if state.is_main_process:
        wanted = {data_file(data, number, parts) for number in range(len(parts))}
        for file in set(data.glob("*.parquet")) - wanted:  # of a run on fewer prompts: both would be read
            file.unlink()
    state.wait_for_everyone()
    publishing = args.push_to_hub and "publish" in args.stages
    with DatasetUpload(args.hub_dataset_id if publishing else None) as upload:
        for number in range(state.process_index, len(parts), state.num_processes):
            target = data_file(data, number, parts)
            rank_shards(args, {s: [rows[i] for i in shards[s]] for s in parts[number]}, target, generators, features)
            upload.send(f"data/{target.name}", target)
    state.wait_for_everyone()
    if state.is_main_process:
        write_scores(args, features)
        write_card(args, rows, generators, features)
    state.wait_for_everyone()


def rank_shards(args: ScriptArguments, shards: dict[int, list], target: Path, generators: list[dict], features) -> None:
    """Joins shards, number → rows, into one file of the dataset, unless it stands there, made of the same parts."""
    work, names = Path(args.output_dir) / "work", [entry["name"] for entry in generators]
    rewards = {reward_name(name): reward_settings(name) for name in args.rewards}
    facts = {"prompts": [], "images": {name: [] for name in names}, "scores": rewards}
    for s, rows in shards.items():
        ids = [row["prompt_id"] for row in rows]
        facts["prompts"].append(digest(ids))
        for name in names:
            file = shard_file(work / "images" / name, s)
            if not is_complete(file, prompts=digest(ids)):
                raise SystemExit(f"{file} is missing: run the generate stage first")
            images = shard_facts(file)["images"]
            facts["images"][name].append(images)
            for reward in rewards:
                file = shard_file(work / "scores" / reward / name, s)
                if not is_complete(file, prompts=digest(ids), images=images):
                    raise SystemExit(f"{file} is missing or of other images: run the score stage first")
    if shard_facts(target) != facts:
        table = pa.concat_tables(
            ranked_table(args, s, rows, names, list(rewards), features) for s, rows in shards.items()
        )
        # Row groups of at most 64 MB: the Hub's viewer reads a whole one to show a page.
        write_table(table, target, facts, row_group_size=min(max(64_000_000 * len(table) // table.nbytes, 1), 100))


def ranked_table(args: ScriptArguments, s: int, rows: list[dict], names: list[str], rewards: list[str], features):
    """The rows of one shard with their images, scores, preferences and ranks."""
    work = Path(args.output_dir) / "work"
    drawn = {name: pq.read_table(shard_file(work / "images" / name, s)).to_pydict() for name in names}
    files = {(r, name): shard_file(work / "scores" / r / name, s) for r in rewards for name in names}
    scored = {key: pq.read_table(file)["score"].to_pylist() for key, file in files.items()}
    table = []
    for i, row in enumerate(rows):
        matrix = np.array([[scored[r, name][i] for name in names] for r in rewards])
        paths = [f"{row['prompt_id']}_{name}.{args.image_format}" for name in names]
        table.append(
            {
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "images": [{"bytes": drawn[name]["image"][i], "path": path} for name, path in zip(names, paths)],
                "generators": names,
                "seeds": [drawn[name]["seed"][i] for name in names],
                "scores": {r: matrix[j].tolist() for j, r in enumerate(rewards)},
                "preference_probability": preference_probability(matrix).tolist(),
                "rank": preference_rank(matrix).tolist(),
            }
        )
    return pa.Table.from_pylist(table, schema=features.arrow_schema)


def main(args: ScriptArguments) -> None:
    # Several processes without a GPU talk through gloo; the first to arrive may have hours to wait for the last.
    launched = "LOCAL_RANK" in os.environ
    waiting = {"timeout": timedelta(days=7)} if launched else {}
    state = PartialState(cpu=launched and not torch.cuda.is_available(), **waiting)

    # Everything that can be wrong with flags, files and folders is found here, before a model is loaded.
    generators = read_generators(args.generators)
    check_rewards(args.rewards)
    rows = read_prompts(args.prompts, args.prompt_column, args.prompt_split, args.max_prompts)
    check_work(args, rows, generators)
    if "generate" in args.stages:
        for entry in generators:
            check_generator(entry)
        if size := image_size(generators[0]):
            probe_rewards(args.rewards, size, [row["prompt"] for row in rows])
    state.wait_for_everyone()  # nobody writes before all have looked
    if args.push_to_hub:  # a wrong token or name fails now, not after the work
        with state.main_process_first():
            args.hub_dataset_id = create_repo(args.hub_dataset_id, "dataset", args.hub_private_repo)
            check_dataset_repo(args.hub_dataset_id, DATA_FILES)

    work = Path(args.output_dir) / "work"
    if state.is_main_process:
        write_settings(work, run_settings(args))
        for stale in work.rglob(".*.tmp*"):  # of processes that were killed
            stale.unlink()
        write_text(work / "prompts.json", json.dumps([row["prompt"] for row in rows]))
    state.wait_for_everyone()
    rows = [{"prompt": row["prompt"], "prompt_id": prompt_id(row["prompt"])} for row in rows]
    shards = [range(i, min(i + args.shard_size, len(rows))) for i in range(0, len(rows), args.shard_size)]
    if "generate" in args.stages:
        generate(args, rows, shards, generators, state)
    if "score" in args.stages:
        score(args, rows, shards, generators, state)
    if "rank" in args.stages:
        rank(args, rows, shards, generators, state)
    if "publish" in args.stages and args.push_to_hub and state.is_main_process:
        publish(args, DATA_FILES, ("grid.png",))
    if state.is_main_process:
        print(f"{len(rows)} prompts x {len(generators)} images in {args.output_dir}")


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and recipe
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


def prompt_id(prompt: str) -> str:
    """A stable id: the same prompt has the same one in every dataset."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def read_generators(file: str | None) -> list[dict]:
    """Reads the recipe; exits with one line that names what is wrong. Downloads at most each `model_index.json`."""
    where = f"--generators {file}" if file else "generators"
    try:
        entries = yaml.safe_load(Path(file).read_text() if file else DEFAULT_GENERATORS)
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"{where}: cannot be read: {one_line(error)}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SystemExit(f"{where}: must be a YAML list of generators, each with `name` and `model`")
    for entry in entries:
        check_recipe(where, entry, {"name", "model", "load", "call", "prior"})
        if not isinstance(entry.get("name"), str) or not re.fullmatch(r"[\w.-]+", entry["name"]):
            raise SystemExit(
                f"{where}: name {entry.get('name')!r} names a folder: use letters, digits, '.', '_' and '-'"
            )
        if "prior" in entry:
            check_recipe(where, entry["prior"], {"model", "load", "call"})
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise SystemExit(f"{where}: two generators share a name: {', '.join(names)}")
    if len(names) < 2:
        raise SystemExit(f"{where}: {len(names)} generator: a ranking needs at least 2 images per prompt")
    return entries


def check_recipe(where: str, part: dict, known: set[str]) -> None:
    """Exits with one line unless a generator, or its prior, has a model and only settings that are known."""
    if not isinstance(part, dict) or not isinstance(part.get("model"), str):
        raise SystemExit(f"{where}: {part}: needs a `model`, a Hub id or a folder")
    if set(part) - known:
        raise SystemExit(
            f"{where}: {part}: knows no {', '.join(sorted(set(part) - known))}; has {', '.join(sorted(known))}"
        )
    for name in ("load", "call"):
        if not isinstance(part.get(name, {}), dict):
            raise SystemExit(f"{where}: {part}: `{name}` must hold names and values")
    dtypes = part.get("load", {}).get("dtype", "float32")
    for dtype in dtypes.values() if isinstance(dtypes, dict) else [dtypes]:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise SystemExit(f"{where}: {part}: dtype {dtype}: choose from float32, float16, bfloat16")


def check_generator(entry: dict) -> None:
    """Exits with one line unless the models of a generator can be had (gated ones need `hf auth login`)."""
    for part in (entry, entry.get("prior")):
        if part is None:
            continue
        try:
            if os.path.isdir(part["model"]):
                json.loads(Path(part["model"], "model_index.json").read_text())
            else:
                hf_hub_download(part["model"], "model_index.json", revision=part.get("load", {}).get("revision"))
        except Exception as error:
            raise SystemExit(
                f"generator {entry['name']}: {part['model']} is not a diffusers pipeline that can be read: "
                f"{one_line(error)}"
            ) from None


# ----------------------------------------------------------------------------------------------------------------------
# Reward models
# ----------------------------------------------------------------------------------------------------------------------


class BadImage(Exception):
    """An image that does not decode."""


def decoded(image):
    """The PIL image, or the one in these bytes, its pixels read."""
    try:
        image = PILImage.open(BytesIO(image)) if isinstance(image, bytes) else image
        image.load()
    except Exception as error:  # PIL raises many kinds
        raise BadImage(f"{type(error).__name__}: {one_line(error)}") from None
    return image


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


@cache
def import_file(file: str):
    """Runs a Python file once, as a module that finds its neighbours."""
    spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up here
    sys.path.append(str(Path(file).parent))
    spec.loader.exec_module(module)
    return module


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


def batches(items: list, size: int):
    return (items[start : start + size] for start in range(0, len(items), size))


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


def clean_text(text: str) -> str:
    """OpenAI CLIP's cleaning, which HPSv2 and CLIPScore do before tokenising; transformers' tokenizer has none."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def clip_pixels(image, size: int) -> torch.Tensor:
    """OpenAI CLIP's transform, ImageReward's too: PIL image → float32 (3, size, size)."""
    image = center_crop(resize(image, size, InterpolationMode.BICUBIC), size).convert("RGB")
    return normalize(to_tensor(image), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def checkpoint_file(checkpoint: str, name: str) -> str:
    """A file of a folder or of a repository on the Hub."""
    return os.path.join(checkpoint, name) if os.path.isdir(checkpoint) else hf_hub_download(checkpoint, name)


def image_processor(checkpoint: str, default: str):
    """The image processor in the checkpoint's folder, else the default one, on PIL: its other backend deviates."""
    own = os.path.exists(os.path.join(checkpoint, "preprocessor_config.json"))
    return AutoImageProcessor.from_pretrained(checkpoint if own else default, backend="pil")


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


def split_keys(weights: dict, prefix: str) -> dict:
    """Takes the tensors under a prefix out of `weights`."""
    return {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}


def linear(weights: dict, name: str) -> torch.nn.Linear:
    """Takes a linear layer out of `weights`."""
    weight, bias = weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias")
    layer = torch.nn.Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False)


def linear_head(weights: dict) -> torch.nn.Sequential:
    """The head of the aesthetic predictor and of ImageReward: five linear layers with dropout, and nothing, between."""
    head = torch.nn.Sequential(*(linear(weights, name) for name in ("0", "2", "4", "6", "7")))
    if weights:
        raise ValueError(f"unexpected keys of the head: {', '.join(weights)}")
    return head


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


def n_layers(weights: dict, prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))


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


def reward_source(name: str) -> tuple[str, str | None]:
    """A reward's checkpoint, and the folder or Hub id of its tokenizer and image processor: the checkpoint's own
    folder, where they lie in it."""
    kind, _, checkpoint = name.partition("=")
    default, processor = REWARD_MODELS[kind]
    checkpoint = checkpoint or default
    own = any(os.path.exists(os.path.join(checkpoint, file)) for file in ("tokenizer.json", "tokenizer_config.json"))
    return checkpoint, checkpoint if own else processor


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


def check_scores(name: str, scores: list[float], prompts: list[str]) -> list[float]:
    for score, prompt in zip(scores, prompts):
        if not np.isfinite(np.float32(score)):  # they are stored as float32
            raise SystemExit(f"reward {name}: the score of prompt {prompt!r} is {score}: it must be a finite number")
    return scores


def reward_name(name: str) -> str:
    """The column of a reward: `shapes/world.py:color_reward` → `color_reward`, `pickscore=folder` → `pickscore`."""
    kind, _, checkpoint = name.partition("=")
    if kind == "vqascore_vlm":  # the numbers of one model are not those of another
        return f"{kind}_{Path(checkpoint or REWARD_MODELS[kind][0]).name}"
    return kind if kind in REWARD_MODELS else name.rpartition(":")[2]


def reward_settings(name: str) -> dict:
    """What a reward's scores depend on: its checkpoint, or the text of its file."""
    if name.partition("=")[0] not in REWARD_MODELS:
        return {"reward": name.rpartition("/")[2], "sha256": FunctionReward(name, batch_size=1).identity}
    checkpoint = reward_source(name)[0]
    files = {"files": folder_digest(checkpoint)} if os.path.isdir(checkpoint) else {}
    return {"reward": reward_name(name), "checkpoint": checkpoint, **files}


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


def probe_rewards(names: list[str], size: tuple[int, int], prompts: list[str]) -> None:
    """Tries each of the user's functions on two pictures of noise, of the size (width, height) to come: an error, a
    wrong count or a NaN shows before hours of drawing."""
    noise = np.random.default_rng(0).integers(0, 256, (2, size[1], size[0], 3), dtype=np.uint8)
    images = [PILImage.fromarray(pixels) for pixels in noise]
    for name in names:
        if name.partition("=")[0] not in REWARD_MODELS:
            try:
                FunctionReward(name, batch_size=2).score(images, (prompts * 2)[:2])
            except Exception as error:
                message = f"{type(error).__name__}: {one_line(error)}"
                raise SystemExit(f"reward {name}: fails on a test image: {message}") from None


def image_size(entry: dict) -> tuple[int, int] | None:
    """Width and height of a generator's images, if its recipe says."""
    call = (entry.get("prior") or entry).get("call", {})
    return (call["width"], call["height"]) if {"width", "height"} <= set(call) else None


# ----------------------------------------------------------------------------------------------------------------------
# Shards: written under a temporary name, then renamed; complete when they hold the prompts they should
# ----------------------------------------------------------------------------------------------------------------------


def write_table(table: pa.Table, file: Path, facts: dict, row_group_size: int = 100) -> None:
    """Writes Parquet with small row groups and a page index (the Hub's viewer needs both), then renames it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**(table.schema.metadata or {}), b"synpic": json.dumps(facts).encode()}
    temporary = file.with_name(f".{file.name}.tmp{os.getpid()}")
    with open(temporary, "wb") as handle:
        pq.write_table(
            table.replace_schema_metadata(metadata), handle, row_group_size=row_group_size, write_page_index=True
        )
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def shard_facts(file: Path) -> dict | None:
    """What was recorded with a shard; None if there is no such shard, or it is not readable."""
    if not file.exists():
        return None
    try:
        return json.loads(pq.read_schema(file).metadata[b"synpic"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


def is_complete(file: Path, **expected) -> bool:
    """True if a shard exists that was made for these prompts (and, of scores, for these images)."""
    facts = shard_facts(file)
    return facts is not None and all(facts.get(name) == value for name, value in expected.items())


def digest(items: list) -> str:
    """A hash of strings or bytes in order."""
    return hashlib.sha256(b"|".join(x.encode() if isinstance(x, str) else x for x in items)).hexdigest()[:16]


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


# Copied from train_rankdpo_sdxl.write_text
def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def write_settings(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".settings.tmp{os.getpid()}"
    temporary.write_text(json.dumps(settings, indent=2))
    os.replace(temporary, folder / "settings.json")


def generator_settings(entry: dict) -> dict:
    """A generator's recipe, with what tells a retrained model in the same folder from the old one."""
    parts = [part["model"] for part in (entry, entry.get("prior")) if part and os.path.isdir(part["model"])]
    return {**entry, "files": [folder_digest(part) for part in parts]} if parts else entry


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


def run_settings(args: ScriptArguments) -> dict:
    return {"seed": args.seed, "image_format": args.image_format, "shard_size": args.shard_size}


def check_work(args: ScriptArguments, prompts: list[dict], generators: list[dict]) -> None:
    """Exits with one line if the output folder holds another run: other files, prompts or settings. Writes nothing."""
    output_dir, work = Path(args.output_dir), Path(args.output_dir) / "work"
    if output_dir.is_dir() and any(output_dir.iterdir()) and not work.is_dir():
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    check_settings(work, run_settings(args), "a run")
    if (work / "prompts.json").exists():
        previous = json.loads((work / "prompts.json").read_text())
        wanted = [row["prompt"] for row in prompts]
        if previous[: len(wanted)] != wanted[: len(previous)]:
            raise SystemExit(f"--output_dir {output_dir} holds a run on other prompts: choose another folder")
        if len(wanted) < len(previous):
            raise SystemExit(
                f"--output_dir {output_dir} holds a run on {len(previous)} prompts, not {len(wanted)}: it can "
                "only grow; choose another folder"
            )
    for entry in generators:
        check_settings(work / "images" / entry["name"], generator_settings(entry), f"images of {entry['name']}")
    for name in args.rewards:
        check_settings(work / "scores" / reward_name(name), reward_settings(name), f"scores of {reward_name(name)}")


# ----------------------------------------------------------------------------------------------------------------------
# Stages
# ----------------------------------------------------------------------------------------------------------------------


class Generator:
    """A text-to-image pipeline with its recipe; Stable Cascade's kind has a prior in front."""

    def __init__(self, entry: dict, device):
        self.entry = entry
        self.pipeline = self._load(entry, device)
        self.prior = self._load(entry["prior"], device) if entry.get("prior") else None

    @staticmethod
    def _load(part: dict, device) -> DiffusionPipeline:
        if not hasattr(diffusers.pipelines, "wuerstchen"):
            # diffusers 0.42 moved this module; Stable Cascade's model_index.json names its old place.
            diffusers.pipelines.wuerstchen = importlib.import_module("diffusers.pipelines.deprecated.wuerstchen")
        kwargs = dict(part.get("load", {}))
        dtype = kwargs.pop("dtype", "float32")
        if torch.device(device).type == "cpu":
            kwargs["dtype"] = torch.float32  # half precision is for GPUs: here it is slower, for some layers missing
        elif isinstance(dtype, dict):  # by component, as diffusers takes it
            kwargs["dtype"] = {component: getattr(torch, name) for component, name in dtype.items()}
        else:
            kwargs["dtype"] = getattr(torch, dtype)
        pipeline = DiffusionPipeline.from_pretrained(part["model"], **kwargs).to(device)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
            pipeline.vae.enable_slicing()  # decoding a batch at once is what runs out of memory first
        return pipeline

    @torch.no_grad()
    def __call__(self, prompts: list[str], seeds: list[int]) -> list[PILImage.Image]:
        # One generator per image, on the CPU: an image does not depend on its batch or on the GPU's kind.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = dict(self.entry.get("call", {}))
        if self.prior:
            embeddings = self.prior(prompt=prompts, generator=generators, **self.entry["prior"].get("call", {}))
            dtype = self.pipeline.decoder.dtype
            call["image_embeddings"] = embeddings.image_embeddings.to(dtype)
        return self.pipeline(prompt=prompts, generator=generators, **call).images


def image_seed(seed: int, id: str, generator: str) -> int:
    """A seed of its own for every image, a function of the run's seed, the prompt and the generator."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{id}|{generator}".encode()).digest()[:4], "big")


def encode_image(image: PILImage.Image, image_format: str) -> bytes:
    buffer = BytesIO()
    if image_format == "jpg":
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def device_name(device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def read_column(file: Path, key: str, value: str) -> dict:
    """One column of a shard by another; nothing if there is no such shard, or it is not readable."""
    if shard_facts(file) is None:
        return {}
    table = pq.read_table(file, columns=[key, value])
    return dict(zip(table[key].to_pylist(), table[value].to_pylist()))


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.parquet"


def write_scores(args: ScriptArguments, features: Features) -> None:
    """The dataset without its images, a configuration of its own: small, quickly read. What did not change is left."""
    output_dir, features = Path(args.output_dir), without_images(features)
    sources = sorted((output_dir / "data").glob("*.parquet"))
    per_file = max(1, 100_000 * len(sources) // sum(pq.read_metadata(file).num_rows for file in sources))
    parts = [sources[i : i + per_file] for i in range(0, len(sources), per_file)]
    wanted = [data_file(output_dir / "scores", number, parts) for number in range(len(parts))]
    for file in set((output_dir / "scores").glob("*.parquet")) - set(wanted):
        file.unlink()
    for part, target in zip(parts, wanted):
        facts = {"data": digest([json.dumps(shard_facts(file), sort_keys=True) for file in part])}
        if shard_facts(target) != facts:
            table = pa.concat_tables(pq.read_table(file, columns=list(features)) for file in part)
            write_table(table.cast(features.arrow_schema), target, facts, row_group_size=1000)


def without_images(features: Features) -> Features:
    return Features({name: feature for name, feature in features.items() if name != "images"})


def data_file(folder: Path, shard: int, shards: list) -> Path:
    return folder / f"train-{shard:05d}-of-{len(shards):05d}.parquet"


# ----------------------------------------------------------------------------------------------------------------------
# Card
# ----------------------------------------------------------------------------------------------------------------------


def dataset_statistics(output_dir: Path, rewards: list[str]) -> dict:
    """Statistics over all rows, images unread.

    Returns:
        `win_rate`: (n_rewards + 1, k), each generator's share of won comparisons under each reward, and overall;
        `tau`: (n_rewards, n_rewards), Kendall's tau-b between the rewards' orders of a prompt's images, mean.
    """
    columns = ["prompt", "scores", "preference_probability"]
    wins, taus = [], []
    for file in sorted((output_dir / "data").glob("*.parquet")):
        for row in pq.read_table(file, columns=columns).to_pylist():
            matrix = np.array([row["scores"][reward] for reward in rewards])
            wins.append([*(preference_probability(line[None]) for line in matrix), row["preference_probability"]])
            tau = np.eye(len(rewards))
            for i, j in itertools.combinations(range(len(rewards)), 2):
                tau[i, j] = tau[j, i] = kendalltau(matrix[i], matrix[j]).statistic
            taus.append(tau)
    known = np.isfinite(taus)  # a reward that gives all images the same score orders nothing
    taus = np.where(known, taus, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return {"win_rate": np.mean(wins, axis=0), "tau": taus}


def work_facts(folder: Path) -> tuple[float, set[str]]:
    """Seconds that the shards in a folder took, and the devices that they were made on."""
    facts = [shard_facts(file) or {} for file in folder.rglob("*.parquet")]
    return sum(fact.get("seconds", 0.0) for fact in facts), {fact["device"] for fact in facts if "device" in fact}


def grid_picture(output_dir: Path, names: list[str], rows: int = 6, cell: int = 256) -> PILImage.Image:
    """The first prompts' images side by side, the best framed in green, with prompts and preference probabilities."""
    table = pq.read_table(sorted((output_dir / "data").glob("*.parquet"))[0]).slice(0, rows).to_pylist()
    label = 22
    canvas = PILImage.new("RGB", (cell * len(names), label + (cell + label) * len(table)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(names):
        draw.text((column * cell + 4, 5), name, fill="black")
    for line, row in enumerate(table):
        top = label + line * (cell + label)
        for column in range(len(names)):
            image = PILImage.open(BytesIO(row["images"][column]["bytes"])).convert("RGB")
            resample = PILImage.NEAREST if image.width < cell else PILImage.LANCZOS
            canvas.paste(image.resize((cell, cell), resample), (column * cell, top))
            if row["rank"][column] == 1:
                box = (column * cell + 1, top + 1, (column + 1) * cell - 2, top + cell - 2)
                draw.rectangle(box, outline=(0, 200, 0), width=4)
            phi = f"{row['preference_probability'][column]:.2f}"
            draw.text(((column + 1) * cell - 30, top + cell + 4), phi, fill="black")
        draw.text((4, top + cell + 4), row["prompt"][: 40 * len(names) - 10], fill="black")
    return canvas


def markdown_table(header: list[str], lines: list[list]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in cells)


def dataset_infos(output_dir: Path, configs: dict[str, tuple[str, Features]]) -> list[dict]:
    """The card's `dataset_info`: configuration → its folder and features. Without it, `load_dataset` on a folder that
    was built again would serve the rows it cached before: its key is made of the card, not of the files."""
    infos = []
    for config, (folder, features) in configs.items():
        files = sorted((output_dir / folder).glob("*.parquet"))
        metadata = [pq.read_metadata(file) for file in files]
        size = sum(m.row_group(i).total_byte_size for m in metadata for i in range(m.num_row_groups))
        split = SplitInfo("train", num_bytes=size, num_examples=sum(m.num_rows for m in metadata))
        info = DatasetInfo(
            features=features,
            splits=SplitDict({"train": split}),
            download_size=sum(file.stat().st_size for file in files),
            dataset_size=size,
        )
        data = DatasetCardData()
        DatasetInfosDict({"default": info}).to_dataset_card_data(data)
        infos.append({"config_name": config, **data.to_dict()["dataset_info"]})
    return infos


def write_card(args: ScriptArguments, rows, generators: list[dict], features: Features) -> None:
    """Writes README.md and grid.png."""
    output_dir = Path(args.output_dir)
    names, rewards = [entry["name"] for entry in generators], list(features["scores"])
    statistics = dataset_statistics(output_dir, rewards)
    temporary = output_dir / ".grid.tmp.png"
    grid_picture(output_dir, names).save(temporary)
    os.replace(temporary, output_dir / "grid.png")

    work, rate = output_dir / "work", args.gpu_hourly_cost
    jobs = {f"images of {name}": (len(rows), work / "images" / name) for name in names}
    jobs |= {f"scores of {reward}": (len(rows) * len(names), work / "scores" / reward) for reward in rewards}
    jobs = {what: (images, *work_facts(folder)) for what, (images, folder) in jobs.items()}
    jobs["total"] = (0, sum(seconds for _, seconds, _ in jobs.values()), set())
    lines = [
        [
            what,
            images or "",
            f"{images / seconds:.2f}" if images and seconds else "",
            f"{seconds / 3600:.3f}",
            *([f"{seconds / 3600 * rate:.2f}"] if rate else []),
            ", ".join(sorted(devices)),
        ]
        for what, (images, seconds, devices) in jobs.items()
    ]
    header = ["work", "images", "images/s of a process", "hours x processes"]
    header += [f"cost in $ (at {rate} an hour)"] if rate else []
    header += ["device"]
    wins = [
        [label, *(f"{value:.3f}" for value in line)]
        for label, line in zip([*rewards, "all: preference probability"], statistics["win_rate"])
    ]
    taus = [[reward, *(f"{value:.2f}" for value in line)] for reward, line in zip(rewards, statistics["tau"])]
    recipe = yaml.safe_dump(generators, sort_keys=False)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "datasets"))
    name = args.hub_dataset_id or output_dir
    body = f"""{CARD_BEGIN}
# {output_dir.resolve().name}

{len(rows)} prompts, each drawn by {len(names)} text-to-image models and ranked by {len(rewards)} reward models: a
fully synthetic preference dataset built with [Syn-Pic](https://arxiv.org/abs/2410.18013), for RankDPO.

![The first prompts; the best image of each is framed, its preference probability below](grid.png)

| column | type | |
|---|---|---|
| `prompt_id` | string | stable id of the prompt |
| `prompt` | string | |
| `images` | List(Image) | {len(names)} images, in the order of `generators` |
| `generators` | List(string) | model that made each image |
| `seeds` | List(int64) | seed of each image |
| `scores` | struct: reward name → List(float32) | raw reward of each image |
| `preference_probability` | List(float32) | share of all comparisons (rewards x other images) that the image wins |
| `rank` | List(int32) | 1 = best; ties in preference are broken by the mean standardised reward |

```python
from datasets import load_dataset

dataset = load_dataset("{name}", split="train")
scores = load_dataset("{name}", "scores", split="train")  # without the images: all other columns, small
```

## Share of comparisons won

{markdown_table(["reward", *names], wins)}

## Agreement between rewards (Kendall's tau)

{markdown_table(["", *rewards], taus)}

## Time and cost

{markdown_table(header, lines)}

## How it was made

```yaml
{recipe.strip()}
```

Rewards: {", ".join(f"`{reward}`" for reward in args.rewards)}. Seed {args.seed}. {libraries}. Hash of prompts, images
and rewards: {data_hash(output_dir)}.
{CARD_END}
"""
    configs = {"default": ("data", features), "scores": ("scores", without_images(features))}
    front = {
        "pretty_name": output_dir.resolve().name,
        "language": ["en"],
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(len(rows))],
        "tags": ["synpic", "rankdpo", "preference", "synthetic"],
        "configs": card_configs(configs),
        "dataset_info": dataset_infos(output_dir, configs),
    }
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


def card_configs(configs: dict[str, tuple[str, Features]]) -> list[dict]:
    """The card's `configs`; `load_dataset` without a name takes the one called default."""
    return [
        {"config_name": config, "data_files": [{"split": "train", "path": f"{folder}/train-*.parquet"}]}
        for config, (folder, _) in configs.items()
    ]


def data_hash(output_dir: Path) -> str:
    """A hash of what the dataset's files were made of: prompts, images, rewards."""
    facts = [shard_facts(file) for file in sorted((output_dir / "data").glob("*.parquet"))]
    return digest([json.dumps(fact, sort_keys=True) for fact in facts])


def size_category(n: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if n < bound), "n>1M")


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


def check_dataset_repo(repo_id: str, patterns: tuple[str, ...]) -> None:
    """Exits with one line if publishing would replace data that this script has not written."""
    try:
        head = retried(HfApi().repo_info, repo_id, repo_type="dataset", timeout=HUB_TIMEOUT)
        files, card = {file.rfilename for file in head.siblings}, ""
        if "README.md" in files:
            file = retried(hf_hub_download, repo_id, "README.md", repo_type="dataset", revision=head.sha)
            card = Path(file).read_text()
    except Exception as error:
        raise SystemExit(f"--push_to_hub: the dataset repository {repo_id} cannot be read: {one_line(error)}") from None
    foreign = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in patterns))
    if foreign and CARD_BEGIN not in card:
        raise SystemExit(
            f"--hub_dataset_id {repo_id} holds other data ({foreign[0]}), which would be replaced: choose another name"
        )


class DatasetUpload:
    """Sends files as they are finished, beside the work; with None as repository, none. They appear in the repository
    with the commit of `push_to_hub`, which has nothing left to send then. Leaving the context waits for the last."""

    def __init__(self, repo_id: str | None):
        self.repo_id, self.executor, self.failed = repo_id, ThreadPoolExecutor(1), False

    def send(self, name: str, file: Path) -> None:
        if self.repo_id:
            self.executor.submit(self._send, name, file)

    def _send(self, name: str, file: Path) -> None:
        if self.failed:  # push_to_hub will try again, and say what is wrong
            return
        try:
            additions = [CommitOperationAdd(name, file)]
            retried(HfApi().preupload_lfs_files, self.repo_id, additions, repo_type="dataset")
        except Exception:
            self.failed = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.executor.shutdown(cancel_futures=kind is not None)


def publish(args: ScriptArguments, data: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Sends the card and what matches these patterns, `data` in the place of all that matches them in the repository.
    Exits with one line if that fails."""
    output_dir = Path(args.output_dir)
    files = sorted(file for pattern in (*data, *others) for file in output_dir.glob(pattern))
    files = {file.relative_to(output_dir).as_posix(): file for file in files}
    try:
        card = (output_dir / "README.md").read_text()
        # A dataset that is published only now had no repository to name in its card.
        card = re.sub(r'load_dataset\("[^"]*"', f'load_dataset("{args.hub_dataset_id}"', card)
        card = push_to_hub(args.hub_dataset_id, "dataset", files, "Dataset", card, data)
    except Exception as error:
        raise SystemExit(
            f"upload to {args.hub_dataset_id} failed: {one_line(error)}; everything is in {output_dir}: run the same "
            "command again to upload what is missing"
        ) from None
    write_text(output_dir / "README.md", card)
    print(f"published: {HfApi().endpoint}/datasets/{args.hub_dataset_id}")


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
