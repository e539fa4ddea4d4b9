# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate", "datasets", "diffusers", "ftfy", "huggingface_hub", "numpy", "pillow", "protobuf", "pyarrow",
#     "pyyaml", "safetensors", "sentencepiece", "torch", "torchvision", "tqdm", "transformers", "trl",
# ]
# ///
"""Builds Syn-Pic, a ranked preference dataset, from prompts, generators and reward models (Karthik et al., 2024).

The dataset needs no human labels: k text-to-image models draw each prompt, and each reward model scores the k images.
An image's preference probability is the share of all comparisons that it wins (Algorithm 1 of the paper).

The paper's four generators and its five reward models, for the first 1,000 prompts of a text file:

    python build_synpic.py --prompts prompts.txt --max_prompts 1000 --output_dir outputs/synpic

On several GPUs, with your own generators and reward, prompts of a dataset on the Hub, and an upload at the end:

    accelerate launch build_synpic.py --prompts user/prompts --prompt_column caption \
        --generators recipes/synpic_sdxl.yaml --rewards pickscore my_rewards.py:sharpness \
        --output_dir outputs/synpic-sdxl --push_to_hub --hub_dataset_id user/synpic

The script keeps its work in shards under `<output_dir>/work`. After a crash, run the same command again: it does only
what is missing. If you add a generator or a reward later, it computes the new shards and ranks everything again. With
`--push_to_hub` it sends each file when it is finished, and all files appear in one commit at the end. Other
configurations of the repository, and text that people wrote on its card, stay.
"""

import argparse
import ast
import csv
import difflib
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
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from io import BytesIO, StringIO
from pathlib import Path
from types import UnionType
from typing import IO, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load ends without a traceback
# bitsandbytes warns at every start that an optional kernel is missing, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers.pipelines
import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from accelerate import PartialState
from datasets import DatasetInfo, Features, Image, List, SplitDict, SplitInfo, Value, load_dataset, load_dataset_builder
from datasets import config as datasets_config
from datasets.info import DatasetInfosDict
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import CardData, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import get_session, parse_ratelimit_headers
from PIL import Image as PILImage
from PIL import ImageDraw
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, pad, resize, to_tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging
from trl import TrlParser


STAGES = ("generate", "score", "rank", "publish")
DATA_FILES = ("data/train-*-of-*.parquet", "scores/train-*-of-*.parquet")
CARD_FACTS = ("size_categories", "configs", "dataset_info")  # the metadata of the card that every run replaces
CARD_BEGIN = "<!-- build_synpic.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what build_synpic.py wrote. -->"


# The paper's five. VQAScore has 11 billion parameters: recipes/synpic_24gb.yaml is for one small GPU.
DEFAULT_REWARDS = ("hpsv2.1", "mps", "pickscore", "vqascore", "imagereward")


# Name → its checkpoint on the Hub, and the base model that gives what the checkpoint lacks: configuration, tokenizer.
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
    prompts: str | None = flag(
        None, "File, URL, dataset's folder or Hub id, or the name of a set. Required.", group="Prompts"
    )
    prompt_column: str | None = flag(None, "Column of the prompts. Default: prompt, or the named set's.")
    prompt_split: str | None = flag(None, "Split of a dataset. Default: train, or the named set's.")
    max_prompts: int | None = flag(None, "Use the first N distinct prompts.", min=1)
    generators: str | None = flag(
        None, "YAML list: name, model, load, call, prior of each. Default: the paper's four.", group="Generators"
    )
    generation_batch_size: str = flag("4", "Images drawn together; auto: as many as fit, at most 32.")
    compile: bool = flag(False, "Compile the denoisers' blocks: faster drawing after a slow first batch.")
    image_format: Literal["jpg", "png"] = flag("jpg", "jpg (quality 95, which the Hub's viewer shows) or png.")
    seed: int = flag(0, "Seeds the images, together with the prompt and the generator's name.", min=0, max=2**32 - 1)
    rewards: list[str] = flag(
        lambda: list(DEFAULT_REWARDS),
        f"{', '.join(REWARD_MODELS)}, each also as name=checkpoint; file.py:function of your own.",
        group="Rewards",
    )
    reward_batch_size: int = flag(32, "Images scored together.", min=1)
    rewards_at_once: int = flag(1, "Reward models held at once: an image is read and decoded once for them.", min=1)
    output_dir: str = flag(
        "outputs/synpic", "Folder for the dataset, its card, and the shards in work/.", group="Work and output"
    )
    shard_size: int = flag(64, "Prompts per shard: the work that a crash can lose.", min=1)
    stages: list[str] = flag(lambda: list(STAGES), "Stages to run.", choices=STAGES)
    task_index: str = flag("auto", "Which of --num_tasks this is, from 0. auto: the scheduler's number.")
    num_tasks: str = flag("auto", "Generate and score as one of N independent tasks. auto: the scheduler's, else 1.")
    gpu_hourly_cost: float | None = flag(None, "$ per GPU and hour, for the card.", min=0)
    push_to_hub: bool = flag(False, "Upload the dataset in the publish stage.")
    hub_dataset_id: str | None = flag(None, "Dataset repository: user/name.")
    hub_private_repo: bool = flag(False, "Make a new repository private.")

    def __post_init__(self):
        check_ranges(self)
        if not self.prompts:
            raise SystemExit(f"--prompts is missing: a file, a URL, a dataset, or one of {', '.join(PROMPT_SETS)}")
        complete_prompt_flags(self)
        complete_task_flags(self, last=("rank", "publish"))
        size = "32" if self.generation_batch_size == "auto" else self.generation_batch_size
        if not re.fullmatch(r"[1-9]\d{0,8}", size):
            raise SystemExit(f"--generation_batch_size {size}: must be a whole number, at least 1, or auto")
        if self.compile and self.generation_batch_size == "auto":  # every size on the way down would be compiled
            raise SystemExit("--generation_batch_size auto: with --compile, give a number")
        self.generation_batch_size = int(size)
        if self.push_to_hub and not self.hub_dataset_id:
            raise SystemExit("--push_to_hub needs --hub_dataset_id user/name")


# ----------------------------------------------------------------------------------------------------------------------
# Ranking
# ----------------------------------------------------------------------------------------------------------------------


def preference_probability(scores: np.ndarray) -> np.ndarray:
    """Share of the comparisons that an image wins (Algorithm 1): over all rewards, against its prompt's other images.

    Args:
        scores: float array (n_rewards, k), higher is better. An equal score counts for neither image.

    Returns:
        float64 array (k,) in [0, 1].
    """
    scores = np.asarray(scores, dtype=np.float64)
    n_rewards, k = scores.shape
    wins = (scores[:, :, None] > scores[:, None, :]).sum(axis=(0, 2))
    return wins / (n_rewards * (k - 1))


def preference_rank(scores: np.ndarray) -> np.ndarray:
    """Ranks by preference probability. The mean standardised reward breaks ties, then the position.

    Args:
        scores: float array (n_rewards, k), higher is better.

    Returns:
        int64 array (k,), a permutation of 1…k; 1 is the best.
    """
    scores = np.asarray(scores, dtype=np.float64)
    deviation = scores.std(axis=1, keepdims=True)
    standardised = (scores - scores.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1.0)
    # Rounded, so that float noise in the mean of equal values does not break a tie that the position should break.
    tie_breaker = np.round(standardised.mean(axis=0), 9)
    order = np.lexsort((np.arange(scores.shape[1]), -tie_breaker, -preference_probability(scores)))
    return np.argsort(order) + 1


# ----------------------------------------------------------------------------------------------------------------------
# Stages: draw, score, rank
# ----------------------------------------------------------------------------------------------------------------------


def generate(args: ScriptArguments, shards: list[list[dict]], generators: list[dict], state: PartialState) -> None:
    """Draws the missing images. Each generator is loaded once, draws its shards, and is freed.

    Shards belong to tasks and to their processes by number, not by what is missing: they look at different times.
    """
    for entry in generators:
        name = entry["name"]
        write_settings(Path(args.output_dir, "work", "images", name), generator_settings(entry))
        missing = []
        for s in own_shards(args, shards)[state.process_index :: state.num_processes]:
            file, ids = shard_file(args, s, "images", name), [row["prompt_id"] for row in shards[s]]
            if not is_complete(file, prompts=hash_of(ids)):
                missing.append((file, ids, shards[s]))
        if not missing:
            continue
        draw, size = Generator(entry, state.device, args.compile), args.generation_batch_size
        total, writing = sum(len(ids) for _, ids, _ in missing), Future()
        writing.set_result(None)
        with image_bar(f"draw {name}", total, state) as progress, ThreadPoolExecutor(4) as pool:
            for file, ids, rows in missing:
                started = time.time()
                images = read_column(file, "prompt_id", "image")  # of a shard that was not full
                # The run's seed, the prompt and the generator give every image a seed of its own.
                seeds = [int(hash_of([str(args.seed), id, name])[:8], 16) for id in ids]
                todo = [(row, seed) for row, seed in zip(rows, seeds) if row["prompt_id"] not in images]
                progress.update(len(rows) - len(todo))
                for start in range(0, len(todo), args.generation_batch_size):
                    batch = todo[start : start + args.generation_batch_size]
                    drawn, size = in_fitting_parts(draw, batch, size, f"generator {name}")
                    for (row, _), image in zip(batch, drawn):  # encoded while the next batch is drawn
                        images[row["prompt_id"]] = pool.submit(encode_image, image, args.image_format)
                    progress.update(len(batch))
                    if stop_signals:  # the next run goes on within the shard
                        break
                writing.result()  # the shard before: at most two are in memory, and an error ends the run
                seeds = {id: seed for id, seed in zip(ids, seeds) if id in images}
                writing = pool.submit(write_images, file, images, seeds, time.time() - started, state.device)
                if stop_signals:
                    writing.result()
                stop_if_asked(f"all images drawn so far are in {args.output_dir}: the same command goes on")
            writing.result()
        del draw
        free_memory()
    state.wait_for_everyone()


def score(args: ScriptArguments, shards: list[list[dict]], generators: list[dict], state: PartialState) -> None:
    """Scores the images without a score. Reward models are loaded, `--rewards_at_once` of them together, score all
    generators' shards, and are freed.

    A score belongs to an image by the hash of its bytes, so an image that is drawn again is scored again.
    """
    jobs = [(entry["name"], s) for entry in generators for s in own_shards(args, shards)]
    jobs = jobs[state.process_index :: state.num_processes]
    for names in reward_groups(args.rewards, args.rewards_at_once):
        for name in names:
            write_settings(Path(args.output_dir, "work", "scores", reward_name(name)), reward_settings(name))
        missing = []  # source of each shard, its facts and rows, and the target of each reward that lacks it
        for generator, s in jobs:
            source, facts = image_shard(args, generator, s, shards[s])
            targets = {name: shard_file(args, s, "scores", reward_name(name), generator) for name in names}
            targets = {name: file for name, file in targets.items() if not is_scored(file, facts)}
            if targets:
                missing.append((source, facts, shards[s], targets))
        if not missing:
            continue
        needed = [name for name in names if any(name in targets for *_, targets in missing)]
        options = {"device": state.device, "batch_size": args.reward_batch_size}
        total = sum(len(rows) * len(targets) for _, _, rows, targets in missing)
        label = f"score {' '.join(map(reward_name, needed))}"
        with held_at_once(needed), image_bar(label, total, state) as progress, ThreadPoolExecutor(1) as pool:
            rewards = {name: load_reward_model(name, **options) for name in needed}
            read = (read_unscored(rewards, *shard) for shard in missing)  # the next one, while this one is scored
            for facts, rows, hashes, parts in one_ahead(read, pool):
                for name, target, scores, todo, images in parts:
                    started, ids = time.time(), [row["prompt_id"] for row in rows]
                    new = rewards[name].score(images, [rows[n]["prompt"] for n in todo])
                    scores |= {hashes[n]: value for n, value in zip(todo, new)}
                    scores = pa.array([scores[item] for item in hashes], pa.float32())
                    columns, seconds = {"prompt_id": ids, "image": hashes, "score": scores}, time.time() - started
                    write_shard(target, columns, facts, seconds, state.device)
                    progress.update(len(ids))
        del rewards
        free_memory()
    state.wait_for_everyone()


def rank(args: ScriptArguments, shards: list[list[dict]], generators: list[dict], state: PartialState) -> None:
    """Joins images and scores into the dataset's files. With --push_to_hub, sends each file while it makes the next."""
    features = Features(
        prompt_id=Value("string"),
        prompt=Value("string"),
        images=List(Image()),
        generators=List(Value("string")),
        seeds=List(Value("int64")),
        scores={reward_name(name): List(Value("float32")) for name in args.rewards},
        preference_probability=List(Value("float32")),
        rank=List(Value("int32")),
    )
    without_images = Features({name: feature for name, feature in features.items() if name != "images"})
    per_file = math.ceil(len(shards) / 200)  # with the files of `write_scores`, one commit takes them all
    parts = [range(s, min(s + per_file, len(shards))) for s in range(0, len(shards), per_file)]
    data, names = Path(args.output_dir) / "data", [entry["name"] for entry in generators]
    files = [data_file(data, number, parts) for number in range(len(parts))]
    if state.is_main_process:
        write_text(
            Path(args.output_dir, UNFINISHED), "The dataset in this folder is not complete: see build_synpic.py.\n"
        )
        for file in set(data.glob("*.parquet")) - set(files):  # of a run on fewer prompts: both would be read
            file.unlink()
    state.wait_for_everyone()
    publishing = args.push_to_hub and "publish" in args.stages
    with DatasetUpload(args.hub_dataset_id if publishing else None) as upload:
        for number in range(state.process_index, len(parts), state.num_processes):
            rank_shards(args, {s: shards[s] for s in parts[number]}, names, features, files[number])
            stop_if_asked(f"the same command finishes the dataset in {args.output_dir}")
            upload.send(f"data/{files[number].name}", files[number])
    state.wait_for_everyone()
    if state.is_main_process:
        write_scores(Path(args.output_dir), without_images)
        configs = {"default": ("data", features), "scores": ("scores", without_images)}
        write_card(args, sum(map(len, shards)), generators, configs)
        Path(args.output_dir, UNFINISHED).unlink()
    state.wait_for_everyone()


def rank_shards(args: ScriptArguments, shards: dict, names: list[str], features: Features, target: Path) -> None:
    """Joins shards, number → rows, into one file of the dataset, unless it exists and was made of the same parts. Holds
    the images of a few shards at a time."""
    rewards = {reward_name(name): reward_settings(name) for name in args.rewards}
    facts = {"prompts": [], "images": {name: [] for name in names}, "scores": rewards}
    for s, rows in shards.items():
        facts["prompts"].append(hash_of([row["prompt_id"] for row in rows]))
        for name in names:
            _, shard = image_shard(args, name, s, rows)
            facts["images"][name].append(shard["images"])
            for reward in rewards:
                file = shard_file(args, s, "scores", reward, name)
                if not is_complete(file, **shard):
                    raise SystemExit(f"{file} is missing or of other images: run the score stage first")
    if shard_facts(target) != facts or not is_usable(target):
        tables = (ranked_table(args, s, rows, names, features) for s, rows in shards.items())
        write_tables(tables, sum(map(len, shards.values())), target, facts)


def ranked_table(args: ScriptArguments, s: int, rows: list[dict], names: list[str], features: Features) -> pa.Table:
    """The rows of one shard with their images, scores, preferences and ranks."""
    rewards = [reward_name(name) for name in args.rewards]
    drawn = [read_table(shard_file(args, s, "images", name)).to_pydict() for name in names]
    files = [[shard_file(args, s, "scores", reward, name) for name in names] for reward in rewards]
    scores = np.array([[read_table(file)["score"].to_pylist() for file in row] for row in files])
    table = []
    for i, row in enumerate(rows):
        matrix = np.ascontiguousarray(scores[:, :, i])  # (n_rewards, k)
        paths = [f"{row['prompt_id']}_{name}.{args.image_format}" for name in names]
        ranked = {
            "images": [{"bytes": columns["image"][i], "path": path} for columns, path in zip(drawn, paths)],
            "generators": names,
            "seeds": [columns["seed"][i] for columns in drawn],
            "scores": dict(zip(rewards, matrix.tolist())),
            "preference_probability": preference_probability(matrix).tolist(),
            "rank": preference_rank(matrix).tolist(),
        }
        table.append({**row, **ranked})
    return pa.Table.from_pylist(table, schema=features.arrow_schema)


def main(args: ScriptArguments) -> None:
    diffusers_logging.disable_progress_bar()  # of loading pipelines
    state = make_state()

    # These checks find what is wrong with flags, files and folders before a model is loaded.
    generators = read_generators(args.generators)
    check_rewards(args.rewards)
    source = (args.prompts, args.prompt_column, args.prompt_split, args.max_prompts)
    prompts = [row["prompt"] for row in read_prompts(*source)[0]]
    settings = {"seed": args.seed, "image_format": args.image_format, "shard_size": args.shard_size}
    check_card(Path(args.output_dir, "README.md"))
    check_work(args, settings, prompts, generators)
    if "rank" not in args.stages and "publish" in args.stages:
        check_finished(args)
    if "generate" in args.stages:
        check_compiler(args)
        for entry in generators:
            check_generator(entry)
        probe_rewards(args.rewards, generators[0], prompts)
    state.wait_for_everyone()  # no process writes before all have checked
    if args.push_to_hub and args.num_tasks == 1:  # a wrong token or name fails now, not after the work
        with state.main_process_first():
            args.hub_dataset_id = create_repo(args.hub_dataset_id, "dataset", args.hub_private_repo)
            check_dataset_repo(args.hub_dataset_id, DATA_FILES)

    if state.is_main_process:
        work = Path(args.output_dir) / "work"
        write_settings(work, settings)
        if args.num_tasks == 1:  # else they may be another task's
            remove_temporary_files(Path(args.output_dir))
        if read_prompt_list(work) != prompts:
            write_json(work / "prompts.json", {"prompts": prompts})
    state.wait_for_everyone()
    rows = [{"prompt_id": hash_of([prompt]), "prompt": prompt} for prompt in prompts]  # the same id in every dataset
    shards = [rows[start : start + args.shard_size] for start in range(0, len(rows), args.shard_size)]
    run_stages(args, shards, generators, state)
    if state.is_main_process:
        if "publish" in args.stages and args.push_to_hub:
            publish(args, DATA_FILES, ("grid.png",))
        if args.num_tasks > 1:
            last = "--num_tasks 1 --stages rank publish"
            print(f"task {args.task_index} of {args.num_tasks} is done. After all of them: the same with {last}")
        else:
            print(f"{len(rows)} prompts x {len(generators)} images in {args.output_dir}")


def run_stages(args: ScriptArguments, shards: list[list[dict]], generators: list[dict], state: PartialState) -> None:
    """Draws, scores and ranks. A file of this folder that turns out to be damaged is made again."""
    removed = set()
    while True:
        try:
            for stage in (generate, score, rank):
                if stage.__name__ in args.stages:
                    stage(args, shards, generators, state)
            return
        except Damaged as error:
            error.file.unlink()
            if state.num_processes > 1 or error.file in removed:  # the other processes are at another place
                raise SystemExit(f"{error}; it is removed: run the same command again, which makes it again") from None
            warn(f"{error}: it is made again")
            removed.add(error.file)


# ----------------------------------------------------------------------------------------------------------------------
# Generators
# ----------------------------------------------------------------------------------------------------------------------


# What every call of a pipeline gets from this script: one picture for each prompt and seed.
GIVEN_BY_SCRIPT = ("self", "prompt", "prompt_embeds", "generator", "latents", "num_images_per_prompt", "output_type")
GIVEN_BY_SCRIPT += ("return_dict", "image_embeddings", "callback_on_step_end")
# The paper's generators, with the settings of their model cards.
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


def read_generators(file: str | None) -> list[dict]:
    """Reads the recipe. Exits with one line that names what is wrong."""
    where = f"--generators {file}" if file else "generators"
    try:
        entries = yaml.safe_load(Path(file).read_text() if file else DEFAULT_GENERATORS)
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"{where}: cannot be read: {one_line(error)}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SystemExit(f"{where}: must be a YAML list of generators, each with `name` and `model`")
    for entry in entries:
        check_recipe(where, entry, ("call", "load", "model", "name", "prior"))
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{,99}", name):
            allowed = "use letters, digits, '.', '_' and '-', a letter or digit first, at most 100"
            raise SystemExit(f"{where}: name {str(name)[:110]!r} names a folder: {allowed}")
        if "prior" in entry:
            check_recipe(where, entry["prior"], ("call", "load", "model"))
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise SystemExit(f"{where}: two generators share a name: {', '.join(names)}")
    if len(names) < 2:
        raise SystemExit(f"{where}: {len(names)} generator: a ranking needs at least 2 images per prompt")
    return entries


def check_recipe(where: str, part: dict, known: tuple[str, ...]) -> None:
    """Exits with one line unless a generator, or its prior, has a model and only known keys."""
    where = f"{where}: {part}"
    if not isinstance(part, dict) or not isinstance(part.get("model"), str):
        raise SystemExit(f"{where}: needs a `model`, a Hub id or a folder")
    if unknown := sorted(set(part) - set(known)):
        raise SystemExit(f"{where}: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")
    if not all(isinstance(part.get(name, {}), dict) for name in ("load", "call")):
        raise SystemExit(f"{where}: `load` and `call` must hold names and values")
    dtypes = part.get("load", {}).get("dtype", "float32")
    for dtype in dtypes.values() if isinstance(dtypes, dict) else [dtypes]:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise SystemExit(f"{where}: dtype {dtype}: choose from float32, float16, bfloat16")


def check_generator(entry: dict) -> None:
    """Exits with one line unless each model is a text-to-image pipeline of diffusers whose `call` settings exist. Reads
    `model_index.json` only (gated models need `hf auth login`)."""
    for part in generator_parts(entry):
        model, call, where = part["model"], part.get("call", {}), f"generator {entry['name']}"
        try:
            file = file_of(model, "model_index.json", revision=part.get("load", {}).get("revision"))
            class_name = json.loads(file.read_text())["_class_name"]
        except Exception as error:
            problem = f"{model} is not a diffusers pipeline that can be read: {one_line(error)}"
            raise SystemExit(f"{where}: {problem}") from None
        known = text_to_image_options(f"{where}: {model}", class_name)
        for name, value in call.items():
            if name not in known or name in GIVEN_BY_SCRIPT:
                guess = difflib.get_close_matches(name, set(known) - set(GIVEN_BY_SCRIPT), 1)
                hint = f": do you mean {guess[0]}?" if guess else ", or the script gives it itself"
                raise SystemExit(f"{where}: `call` has {name}, which {class_name} does not take{hint}")
            if name == "num_inference_steps" and (not isinstance(value, int) or value < 1):
                raise SystemExit(f"{where}: `call` has {name} {value}: it must be a number of steps, at least 1")
            if name in ("height", "width") and (not isinstance(value, int) or value < 8 or value % 8 or value > 8192):
                raise SystemExit(f"{where}: `call` has {name} {value}: it must be a multiple of 8, at most 8192")


def generator_parts(entry: dict) -> list[dict]:
    """A generator and its prior, if it has one."""
    return [entry, entry["prior"]] if "prior" in entry else [entry]


def generator_settings(entry: dict) -> dict:
    """A generator's recipe. Hashes of local folders tell a model from one that was trained again into its folder."""
    digests = [folder_digest(part["model"]) for part in generator_parts(entry) if os.path.isdir(part["model"])]
    return {**entry, "files": digests} if digests else entry


def probe_rewards(names: list[str], entry: dict, prompts: list[str]) -> None:
    """Tries each of the user's functions on two pictures of noise, of the size that the generator will draw. An error,
    a wrong number of scores or a NaN shows before hours of drawing. Does nothing if the recipe gives no size."""
    call = generator_parts(entry)[-1].get("call", {})
    if not {"width", "height"} <= set(call):
        return
    noise = np.random.default_rng(0).integers(0, 256, (2, call["height"], call["width"], 3), dtype=np.uint8)
    images = [PILImage.fromarray(pixels) for pixels in noise]
    for name in names:
        if name.partition("=")[0] in REWARD_MODELS:
            continue
        reward = FunctionReward(name, batch_size=2)
        if inspect.isclass(reward.function):  # it may load a large model
            continue
        reward.score(images, (prompts * 2)[:2])


class Generator:
    """A text-to-image pipeline with its recipe. Pipelines like Stable Cascade have a second one in front, the prior."""

    def __init__(self, entry: dict, device, compile: bool = False):
        self.entry = entry
        self.pipeline, *priors = [self._load(part, device) for part in generator_parts(entry)]
        self.prior = priors[0] if priors else None
        self.compiled_size = 0 if compile else None  # the largest batch so far; None: nothing is compiled
        if compile:
            torch.compiler.reset()  # the number of graphs is limited: this generator's count anew
            for pipeline in (self.pipeline, *priors):
                compile_blocks(entry["name"], pipeline)

    @staticmethod
    def _load(part: dict, device) -> DiffusionPipeline:
        if not hasattr(diffusers.pipelines, "wuerstchen"):
            # diffusers 0.42 moved this module. Stable Cascade's model_index.json names its old place.
            diffusers.pipelines.wuerstchen = importlib.import_module("diffusers.pipelines.deprecated.wuerstchen")
        kwargs = dict(part.get("load", {}))
        dtype = kwargs.pop("dtype", "float32")
        if torch.device(device).type == "cpu":
            dtype = "float32"  # half precision is slower on CPUs, and some layers lack it
        if isinstance(dtype, dict):  # by component, as diffusers takes it
            kwargs["dtype"] = {component: getattr(torch, name) for component, name in dtype.items()}
        else:
            kwargs["dtype"] = getattr(torch, dtype)
        with loading(f"generator's model {part['model']}"):
            pipeline = DiffusionPipeline.from_pretrained(part["model"], **kwargs).to(device)
        prepare_pipeline(pipeline)
        return pipeline

    def __call__(self, batch: list[tuple[dict, int]]) -> list[PILImage.Image]:
        """The images of these rows and seeds."""
        if self.compiled_size is None:
            return self.draw(batch)
        if len(batch) < self.compiled_size:  # the last of a shard: compiling for its size would cost more
            with torch.compiler.set_stance("force_eager"):
                return self.draw(batch)
        started = time.time()
        try:
            images = self.draw(batch)
        except torch.OutOfMemoryError:  # smaller batches follow: they are compiled, too
            self.compiled_size = 0
            raise
        if len(batch) > self.compiled_size and is_first_process():
            seconds = f"{time.time() - started:.0f} s, with its compilation"
            print(f"generator {self.entry['name']}: the first batch of {len(batch)} took {seconds}")
        self.compiled_size = len(batch)
        return images

    @torch.no_grad()
    def draw(self, batch: list[tuple[dict, int]]) -> list[PILImage.Image]:
        prompts, seeds = [row["prompt"] for row, _ in batch], [seed for _, seed in batch]
        # One generator per image, on the CPU: an image does not depend on its batch or on the kind of GPU.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = dict(self.entry.get("call", {}))
        try:
            if self.prior:
                embeddings = self.prior(prompt=prompts, generator=generators, **self.entry["prior"].get("call", {}))
                call["image_embeddings"] = embeddings.image_embeddings.to(self.pipeline.decoder.dtype)
            return self.pipeline(prompt=prompts, generator=generators, **call).images
        except (TypeError, ValueError) as error:  # the pipeline's own check of its settings
            raise SystemExit(f"generator {self.entry['name']}: cannot draw: {one_line(error)}") from None


def check_compiler(args: ScriptArguments) -> None:
    """Exits with one line if --compile is given and nothing is there that compiles."""
    if args.compile and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which(os.environ.get("CC", "gcc"))):
        raise SystemExit("--compile needs a C++ compiler, for example g++: install one, or leave it out")


def compile_blocks(name: str, pipeline: DiffusionPipeline) -> None:
    """Compiles the repeated blocks of a pipeline's denoiser, each kind once, at its first forward with a size of batch.
    Warns where there are none that diffusers names."""
    parts = [getattr(pipeline, part, None) for part in ("unet", "transformer", "prior", "decoder")]
    for model in (part for part in parts if isinstance(part, torch.nn.Module)):
        blocks = [kind for kind in model._no_split_modules or () if kind.endswith("Block")]
        model._repeated_blocks = model._repeated_blocks or blocks
        if {type(module).__name__ for module in model.modules()}.intersection(model._repeated_blocks):
            model.compile_repeated_blocks(dynamic=False)
        else:
            warn(f"generator {name}: --compile: diffusers names no blocks of {type(model).__name__}: drawn without")


def encode_image(image: PILImage.Image, image_format: str) -> bytes:
    buffer = BytesIO()
    if image_format == "jpg":
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Work on disk
# ----------------------------------------------------------------------------------------------------------------------


def check_work(args: ScriptArguments, settings: dict, prompts: list[str], generators: list[dict]) -> None:
    """Exits with one line if the output folder holds another run: other files, prompts or settings. Writes nothing."""
    output_dir, work = Path(args.output_dir), Path(args.output_dir) / "work"
    if not is_empty(output_dir) and not work.is_dir():  # in this order: another task may begin just now
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    check_settings(work, settings, "a run")
    previous = read_prompt_list(work)
    if previous is not None:
        if previous[: len(prompts)] != prompts[: len(previous)]:
            raise SystemExit(f"--output_dir {output_dir} holds a run on other prompts: choose another folder")
        if len(prompts) < len(previous):
            problem = f"holds a run on {len(previous)} prompts, not {len(prompts)}: it can only grow"
            raise SystemExit(f"--output_dir {output_dir} {problem}; choose another folder")
    for entry in generators:
        check_settings(work / "images" / entry["name"], generator_settings(entry), f"images of {entry['name']}")
    for name in args.rewards:
        check_settings(work / "scores" / reward_name(name), reward_settings(name), f"scores of {reward_name(name)}")


def read_prompt_list(work: Path) -> list[str] | None:
    """The prompts of an earlier run; None if there is none, or their file is damaged."""
    try:
        return read_json(work / "prompts.json").get("prompts")
    except Damaged as error:
        warn(f"{error}: it is written again")
        return None


def check_finished(args: ScriptArguments) -> None:
    """Exits with one line unless the folder holds a dataset that can be published."""
    if not all(Path(args.output_dir, name).exists() for name in ("README.md", "data", "scores")):
        raise SystemExit(f"--output_dir {args.output_dir} holds no dataset to publish: run the rank stage first")
    check_dataset_folder("--output_dir", args.output_dir)


def own_shards(args: ScriptArguments, shards: list) -> range:
    """The numbers of this task's shards. All other stages of a shard belong to the same task, so no task waits."""
    return range(args.task_index, len(shards), args.num_tasks)


def shard_file(args: ScriptArguments, shard: int, *folders: str) -> Path:
    """A shard in work/images/GENERATOR or work/scores/REWARD/GENERATOR."""
    return Path(args.output_dir, "work", *folders, f"{shard:05d}.parquet")


def image_shard(args: ScriptArguments, generator: str, shard: int, rows: list[dict]) -> tuple[Path, dict]:
    """A shard of images, and the facts that its scores share with it. Exits with one line if it is missing."""
    file, prompts = shard_file(args, shard, "images", generator), hash_of([row["prompt_id"] for row in rows])
    facts = shard_facts(file)
    if facts is None or facts.get("prompts") != prompts:
        raise SystemExit(f"{file} is missing: run the generate stage first")
    return file, {"prompts": prompts, "images": facts["images"]}


def hash_of(items: list[str | bytes]) -> str:
    """A hash of strings or bytes in order."""
    return short_hash(b"|".join(x.encode() if isinstance(x, str) else x for x in items))


def hash_of_facts(files: list[Path]) -> str:
    """A hash of what the dataset's files were made of: prompts, images, rewards."""
    return hash_of([json.dumps(shard_facts(file), sort_keys=True) for file in files])


def read_column(file: Path, key: str, value: str) -> dict:
    """One column of a shard by another. Empty if the shard is missing or cannot be read."""
    try:
        table = read_table(file, columns=[key, value])
    except Damaged:
        return {}
    return dict(zip(table[key].to_pylist(), table[value].to_pylist()))


def is_scored(file: Path, facts: dict) -> bool:
    return is_complete(file, **facts) and is_usable(file)


def read_unscored(rewards: dict, source: Path, facts: dict, rows: list[dict], targets: dict[str, Path]) -> tuple:
    """What is to do for a shard: facts, rows, the hash of each row's image; and for each reward that lacks scores its
    name, target, scores that exist by hash, numbers of the rows without one, and their images, the first of them in
    preparation."""
    images = read_table(source)["image"].to_pylist()
    hashes = [hash_of([image, row["prompt_id"]]) for image, row in zip(images, rows)]
    known = {name: read_column(target, "image", "score") for name, target in targets.items()}
    todo = {name: [n for n in range(len(rows)) if hashes[n] not in scores] for name, scores in known.items()}
    begun = begin_together(rewards, images, todo)
    parts = [(name, target, known[name], todo[name], begun[name]) for name, target in targets.items()]
    return facts, rows, hashes, parts


def begin_together(rewards: dict[str, "RewardModel"], images: list[bytes], todo: dict[str, list[int]]) -> dict:
    """For each reward its images, by their numbers in `todo`, in preparation. For several, an image is decoded once.
    The pool takes its work in order: an image's decoding has begun before a thread waits for it."""
    if len(todo) == 1:
        return {name: rewards[name].begin([images[n] for n in numbers]) for name, numbers in todo.items()}
    decoded = {n: workers().submit(decode_image, images[n]) for n in sorted(set().union(*todo.values()))}
    return {
        name: [workers().submit(prepare_decoded, rewards[name], decoded[n]) for n in numbers]
        for name, numbers in todo.items()
    }


def prepare_decoded(reward: "RewardModel", image: Future):
    return reward.prepare(image.result())


def write_images(file: Path, images: dict, seeds: dict, seconds: float, device: torch.device) -> None:
    """Writes a shard of images. `images`: of each prompt_id the bytes, or the work that makes them."""
    images = [image.result() if isinstance(image, Future) else image for image in (images[id] for id in seeds)]
    columns = {"prompt_id": [*seeds], "image": pa.array(images, pa.large_binary()), "seed": [*seeds.values()]}
    write_shard(file, columns, {"prompts": hash_of([*seeds]), "images": hash_of(images)}, seconds, device)


def write_shard(file: Path, columns: dict, facts: dict, seconds: float, device: torch.device) -> None:
    """Writes a shard with the device and the seconds that it took, those of its earlier versions included."""
    seconds += (shard_facts(file) or {}).get("seconds", 0.0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    write_table(pa.table(columns), file, {**facts, "seconds": seconds, "device": name})


def image_bar(label: str, images: int, state: PartialState) -> tqdm:
    return progress_bar(total=images, desc=label, unit="image", disable=not state.is_local_main_process)


def write_scores(output_dir: Path, features: Features) -> None:
    """Writes the dataset without its images, as a small configuration of its own. Keeps files that are up to date."""
    sources = sorted((output_dir / "data").glob("*.parquet"))
    per_file = max(1, 100_000 * len(sources) // sum(pq.read_metadata(file).num_rows for file in sources))
    parts = [sources[i : i + per_file] for i in range(0, len(sources), per_file)]
    targets = [data_file(output_dir / "scores", number, parts) for number in range(len(parts))]
    for file in set((output_dir / "scores").glob("*.parquet")) - set(targets):
        file.unlink()
    for part, target in zip(parts, targets):
        facts = {"data": hash_of_facts(part)}
        if shard_facts(target) != facts or not is_usable(target):
            table = pa.concat_tables(read_table(file, columns=list(features)) for file in part)
            write_table(table.cast(features.arrow_schema), target, facts, row_group_size=1000)


# ----------------------------------------------------------------------------------------------------------------------
# Card
# ----------------------------------------------------------------------------------------------------------------------


def dataset_statistics(files: list[Path], rewards: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Statistics over all rows. Reads no images.

    Returns:
        win rates (n_rewards + 1, k): each generator's share of won comparisons under each reward, and over all;
        tau (n_rewards, n_rewards): the mean of Kendall's tau-b between two rewards' orders of a prompt's images.
    """
    wins, taus, known, n_rows = 0.0, 0.0, 0, 0
    for file in files:
        table = read_table(file, columns=["scores", "preference_probability"]).flatten()
        scores = np.array([table[f"scores.{reward}"].to_pylist() for reward in rewards])  # (n_rewards, rows, k)
        probability = np.array(table["preference_probability"].to_pylist())
        order = np.sign(scores[..., :, None] - scores[..., None, :])  # 1: the first image is better, 0: equal
        shares = (order > 0).sum(axis=-1) / (scores.shape[-1] - 1)
        wins = wins + np.concatenate([shares, probability[None]]).sum(axis=1)
        tau = rank_correlation(order)
        taus, known = taus + np.nansum(tau, axis=0), known + np.isfinite(tau).sum(axis=0)
        n_rows += len(table)
    tau = taus / np.maximum(known, 1)
    np.fill_diagonal(tau, 1.0)
    return wins / n_rows, tau


def rank_correlation(order: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row between two rewards: the cosine of their orders.

    Args:
        order: (n_rewards, rows, k, k): the sign of image i's score minus image j's.

    Returns:
        float64 (rows, n_rewards, n_rewards); NaN where a reward gives all images the same score, and orders nothing.
    """
    flat = order.reshape(*order.shape[:2], -1)
    products = np.einsum("arp,brp->rab", flat, flat)
    length = np.einsum("raa->ra", products)
    with np.errstate(invalid="ignore"):
        return products / np.sqrt(length[:, :, None] * length[:, None, :])


def time_table(args: ScriptArguments, n_prompts: int, names: list[str]) -> str:
    """Time, speed and cost of all images and scores, from what was recorded with their shards."""
    rate, rows = args.gpu_hourly_cost, []
    jobs = [(f"images of {name}", n_prompts, ("images", name)) for name in names]
    for reward in map(reward_name, args.rewards):
        jobs.append((f"scores of {reward}", n_prompts * len(names), ("scores", reward)))
    for label, images, folders in jobs:
        facts = [shard_facts(file) or {} for file in Path(args.output_dir, "work", *folders).rglob("*.parquet")]
        seconds = sum(fact.get("seconds", 0.0) for fact in facts)
        speed = np.format_float_positional(images / seconds, 3, fractional=False, trim="-") if seconds else ""
        devices = ", ".join(sorted({fact["device"] for fact in facts if "device" in fact}))
        rows.append([label, images, speed, seconds / 3600, devices])
    rows.append(["total", "", "", sum(hours for _, _, _, hours, _ in rows), ""])
    for row in rows:
        row[3:4] = [f"{row[3]:.3f}", *([f"{row[3] * rate:.2f}"] if rate else [])]
    cost = [f"cost in $ (at {rate} an hour)"] if rate else []
    return markdown_table(["work", "images", "images/s of a process", "hours x processes", *cost, "device"], rows)


def grid_picture(file: Path, names: list[str], rows: int = 6, cell: int = 256) -> PILImage.Image:
    """The first prompts' images side by side, with preference probabilities. The best one has a green frame."""
    with reading(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:  # of a file of many GB
        batches_of_one = itertools.islice(parquet.iter_batches(1), rows)
        table, label = [row for batch in batches_of_one for row in batch.to_pylist()], 22
    canvas = PILImage.new("RGB", (cell * len(names), label + (cell + label) * len(table)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(names):
        draw.text((column * cell + 4, 5), name, fill="black")
    for number, row in enumerate(table):
        top = label + number * (cell + label)
        for column in range(len(names)):
            left = column * cell
            image = PILImage.open(BytesIO(row["images"][column]["bytes"])).convert("RGB")
            resample = PILImage.NEAREST if image.width < cell else PILImage.LANCZOS
            canvas.paste(image.resize((cell, cell), resample), (left, top))
            if row["rank"][column] == 1:
                draw.rectangle((left + 1, top + 1, left + cell - 2, top + cell - 2), outline=(0, 200, 0), width=4)
            draw.text((left + cell - 30, top + cell + 4), f"{row['preference_probability'][column]:.2f}", fill="black")
        draw.text((4, top + cell + 4), row["prompt"][: 40 * len(names) - 10], fill="black")
    return canvas


def write_card(args: ScriptArguments, n_prompts: int, generators: list[dict], configs: dict) -> None:
    """Writes README.md and grid.png."""
    output_dir = Path(args.output_dir)
    files = sorted((output_dir / "data").glob("*.parquet"))
    names, rewards = [entry["name"] for entry in generators], [reward_name(name) for name in args.rewards]
    save_picture(grid_picture(files[0], names), output_dir / "grid.png")
    win_rates, taus = dataset_statistics(files, rewards)
    win_labels = [*rewards, "all: preference probability"]
    wins = [[label, *(f"{value:.3f}" for value in values)] for label, values in zip(win_labels, win_rates)]
    taus = [[label, *(f"{value:.2f}" for value in values)] for label, values in zip(rewards, taus)]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "datasets"))
    dataset = args.hub_dataset_id or output_dir
    body = f"""# {output_dir.resolve().name}

{len(names)} text-to-image models drew each of {n_prompts} prompts, and {len(rewards)} reward models ranked the images:
a fully synthetic preference dataset for RankDPO, built with [Syn-Pic](https://arxiv.org/abs/2410.18013).

![Images of the first prompts. The best one has a frame. Below each: its preference probability](grid.png)

| column | type | |
|---|---|---|
| `prompt_id` | string | stable id of the prompt |
| `prompt` | string | |
| `images` | List(Image) | {len(names)} images, in the order of `generators` |
| `generators` | List(string) | model that made each image |
| `seeds` | List(int64) | seed of each image |
| `scores` | struct: reward name → List(float32) | raw reward of each image |
| `preference_probability` | List(float32) | share of all comparisons (rewards x other images) that the image wins |
| `rank` | List(int32) | 1 = best; the mean standardised reward breaks ties |

```python
from datasets import load_dataset

dataset = load_dataset("{dataset}", split="train")
scores = load_dataset("{dataset}", "scores", split="train")  # all columns but the images: a small download
```

## Share of comparisons won

{markdown_table(["reward", *names], wins)}

## Agreement between rewards (Kendall's tau)

{markdown_table(["", *rewards], taus)}

## Time and cost

{time_table(args, n_prompts, names)}

## How it was made

```yaml
{yaml.safe_dump(generators, sort_keys=False).strip()}
```

Rewards: {", ".join(f"`{reward}`" for reward in args.rewards)}. Seed {args.seed}. {libraries}. Hash of prompts, images
and rewards: {hash_of_facts(files)}.
"""
    front = {
        "pretty_name": output_dir.resolve().name,
        "language": ["en"],
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(n_prompts)],
        "tags": ["synpic", "rankdpo", "preference", "synthetic"],
        **config_metadata(output_dir, configs),
    }
    write_text(output_dir / "README.md", make_card(front, card_block(body), output_dir / "README.md"))


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
# Shared: Parquet shards (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def write_table(table: pa.Table, file: Path, facts: dict, row_group_size: int = 100) -> None:
    """Writes one table as `write_tables` does."""
    write_tables(iter([table]), len(table), file, facts, row_group_size)


def write_tables(
    tables: Iterator[pa.Table], n_rows: int, file: Path, facts: dict, row_group_size: int | None = None
) -> None:
    """Writes tables of one schema into a Parquet file with small row groups and a page index (the Hub's viewer needs
    both) and with checksums, then renames it. Memory holds one table, and those that did not fill a row group.

    Args:
        n_rows: of all tables together.
        facts: recorded in the file; `shard_facts` reads them.
        row_group_size: rows; by default at most 100, and at most 64 MB as the first table has them: the viewer reads a
            whole group to show a page.
    """
    with replacing(file) as temporary, open(temporary, "wb") as handle:
        left = next(tables)
        size = row_group_size or min(max(64_000_000 * len(left) // max(left.nbytes, 1), 1), 100)
        record = {b"synpic": sealed(facts, left.schema, n_rows)}
        schema = left.schema.with_metadata({**(left.schema.metadata or {}), **record})
        options = {"write_page_index": True, "write_page_checksum": True}
        with pq.ParquetWriter(handle, schema, **options) as writer:
            for table in tables:
                while len(left) >= size:
                    writer.write_table(left.slice(0, size))
                    left = left.slice(size)
                left = pa.concat_tables([left, table])
            writer.write_table(left, row_group_size=size)


def sealed(facts: dict, schema: pa.Schema, n_rows: int) -> bytes:
    """The record in a Parquet file: facts, and a checksum of what the pages' own checksums do not cover."""
    columns = [f"{field.name} {field.type}".replace("<item:", "<element:") for field in schema]
    checksum = json_checksum({"facts": facts, "columns": columns, "rows": n_rows})
    return json.dumps({"facts": facts, "checksum": checksum}).encode()


def shard_facts(file: Path) -> dict | None:
    """What was recorded with a shard; None if there is no such shard, or it is not readable."""
    if not file.exists():
        return None
    try:
        with reading(file):
            metadata = pq.read_metadata(file)
            record = metadata.metadata[b"synpic"]
            facts = json.loads(record)["facts"]
            if record == sealed(facts, metadata.schema.to_arrow_schema(), metadata.num_rows):
                return facts
            raise Damaged(file)
    except Damaged as error:
        warn(str(error))
        return None


def is_usable(file: Path) -> bool:
    """Whether the checksums of a file's pages are right; says so if they are not."""
    try:
        check_pages(file)
        return True
    except Damaged as error:
        warn(str(error))
        return False


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of a file that `write_table` wrote. Raises Damaged if a checksum does not match."""
    if shard_facts(file) is not None:
        with reading(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            table = parquet.read(columns)
            if len(table) == parquet.metadata.num_rows:
                return table
    raise Damaged(file)


def is_complete(file: Path, **expected) -> bool:
    """True if a shard exists that was made from the same input."""
    facts = shard_facts(file)
    return facts is not None and all(facts.get(name) == value for name, value in expected.items())


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
# Shared: dataset card and repository (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def data_file(folder: Path, number: int, files: Sequence) -> Path:
    """Where file `number` of several stands. A commit takes about 250 files: the callers keep to that."""
    return folder / f"train-{number:05d}-of-{len(files):05d}.parquet"


def config_metadata(output_dir: Path, configs: dict[str, tuple[str, Features]]) -> dict:
    """The card's `configs` and `dataset_info`: configuration → its folder and features. `load_dataset` without a name
    takes the configuration called default.

    Without `dataset_info`, `load_dataset` on a folder that was built again would serve the rows it cached before: its
    key is made of the card, not of the files.
    """
    entries, infos = [], []
    for config, (folder, features) in configs.items():
        data_files = [{"split": "train", "path": f"{folder}/train-*.parquet"}]
        entries.append({"config_name": config, "data_files": data_files})
        files = sorted((output_dir / folder).glob("*.parquet"))
        metadata = [pq.read_metadata(file) for file in files]
        size = sum(m.row_group(i).total_byte_size for m in metadata for i in range(m.num_row_groups))
        split = SplitInfo("train", num_bytes=size, num_examples=sum(m.num_rows for m in metadata))
        download_size = sum(file.stat().st_size for file in files)
        splits = SplitDict({"train": split})
        info = DatasetInfo(features=features, splits=splits, download_size=download_size, dataset_size=size)
        data = CardData()
        DatasetInfosDict({"default": info}).to_dataset_card_data(data)
        infos.append({"config_name": config, **data.to_dict()["dataset_info"]})
    return {"configs": entries, "dataset_info": infos}


def size_category(n: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if n < bound), "n>1M")


def merge_dataset_cards(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """`merge_cards`, and other configurations of the repository stay beside this run's."""
    others = {name: as_list(theirs.data.get(name)) for name in ("configs", "dataset_info") if name in mine.data}
    card = merge_cards(mine, theirs)
    for name, entries in others.items():
        card.data[name] = as_list(mine.data[name])
        own = [entry.get("config_name", "default") for entry in card.data[name]]
        card.data[name] += [entry for entry in entries if entry.get("config_name", "default") not in own]
    return card


def as_list(entries: list | dict | None) -> list:
    """A card may name a single configuration without a list."""
    return [entries] if isinstance(entries, dict) else list(entries or [])


def check_dataset_repo(repo_id: str, patterns: tuple[str, ...]) -> None:
    """Exits with one line if publishing would replace data that this script has not written."""
    try:
        head = retried(HfApi().repo_info, repo_id, repo_type="dataset", timeout=HUB_TIMEOUT)
        files, card = {file.rfilename for file in head.siblings}, ""
        if "README.md" in files:
            readme = retried(hf_hub_download, repo_id, "README.md", repo_type="dataset", revision=head.sha)
            card = Path(readme).read_text()
    except Exception as error:
        raise SystemExit(f"--push_to_hub: the dataset repository {repo_id} cannot be read: {one_line(error)}") from None
    foreign = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in patterns))
    if foreign and CARD_BEGIN not in card:
        problem = f"--hub_dataset_id {repo_id} holds other data ({foreign[0]}), which would be replaced"
        raise SystemExit(f"{problem}: choose another name")


class DatasetUpload:
    """Sends files in the background as they are finished, one after the other; with None as repository, none.

    They appear in the repository with the commit of `push_to_hub`, which then has nothing left to send. Leaving the
    context waits for the last file.
    """

    def __init__(self, repo_id: str | None):
        self.repo_id, self.api, self.last, self.stopped = repo_id, HfApi(), None, False

    def send(self, name: str, file: Path) -> None:
        if self.repo_id:
            self.last = self.api.run_as_future(self._send, name, file)

    def _send(self, name: str, file: Path) -> None:
        if self.stopped:
            return
        try:
            additions = [CommitOperationAdd(name, file)]
            retried(self.api.preupload_lfs_files, self.repo_id, additions, repo_type="dataset")
        except Exception:  # push_to_hub tries again, and reports what is wrong
            self.stopped = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stopped = self.stopped or kind is not None
        if self.last:  # the client sends in order
            self.last.result()


def publish(args: ScriptArguments, data: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Sends the card and the files that match these patterns. Exits with one line if that fails.

    Args:
        data: patterns of data files; other files on the Hub that match one are deleted.
        others: patterns of further files.
    """
    output_dir = Path(args.output_dir)
    files = sorted(file for pattern in (*data, *others) for file in output_dir.glob(pattern))
    files = {file.relative_to(output_dir).as_posix(): file for file in files}
    try:
        # The card of a dataset that was built without --push_to_hub names its folder.
        card = (output_dir / "README.md").read_text()
        card = re.sub(r'load_dataset\("[^"]*"', f'load_dataset("{args.hub_dataset_id}"', card)
        options = {"card": card, "merge": merge_dataset_cards, "replace": data}
        card = push_to_hub(args.hub_dataset_id, "dataset", files, "Dataset", **options)
    except Exception as error:
        raise SystemExit(
            f"upload to {args.hub_dataset_id} failed: {one_line(error)}; everything is in {output_dir}: run the same "
            "command again to upload what is missing"
        ) from None
    write_text(output_dir / "README.md", card)
    print(f"published: {HfApi().endpoint}/datasets/{args.hub_dataset_id}")


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
