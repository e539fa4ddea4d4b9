# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerate", "datasets", "diffusers", "filelock", "ftfy", "huggingface_hub", "numpy", "pillow",
#     "protobuf", "pyarrow", "pyyaml", "safetensors", "sentencepiece", "torch", "torchvision", "tqdm", "transformers",
#     "trl"]
# ///
"""Builds Syn-Pic, a ranked preference dataset, from prompts, generators and reward models (Karthik et al., 2024).

No human labels: k text-to-image models draw each prompt, each reward model scores the k images, and an image's
preference probability is the share of all comparisons that it wins (Algorithm 1 of the paper).

The paper's four generators and its five reward models, for the first 1,000 prompts of a text file:

    python build_synpic.py --prompts prompts.txt --max_prompts 1000 --output_dir outputs/synpic

On several GPUs, with your own generators and reward, prompts of a dataset on the Hub, and an upload at the end:

    accelerate launch build_synpic.py --prompts user/prompts --prompt_column caption \
        --generators recipes/synpic_sdxl.yaml --rewards pickscore my_rewards.py:sharpness \
        --output_dir outputs/synpic-sdxl --push_to_hub --hub_dataset_id user/synpic

Killed at any moment, the same command goes on; new prompts, a new generator or reward cost only themselves.
"""

import argparse
import csv
import difflib
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
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache, partial
from importlib.metadata import version
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit


if not sys.stderr.isatty():  # in a file of output all progress bars write a line every 30 seconds, not ten a second
    os.environ |= {"TQDM_MININTERVAL": "30", "TQDM_MAXINTERVAL": "60"} | os.environ
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
from datasets import Features, Image, List, Value
from datasets.config import HF_HUB_OFFLINE
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from diffusers.training_utils import free_memory
from filelock import FileLock, Timeout
from huggingface_hub import CardData, HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session
from PIL import Image as PILImage
from PIL import ImageDraw, ImageOps, PngImagePlugin
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, pad, resize, to_tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llama.modeling_llama import rotate_half
from transformers.utils import logging as transformers_logging
from trl import TrlParser


STAGES = ("generate", "score", "rank", "publish")
DATA_FILES = ["data/train-*-of-*.parquet", "scores/train-*-of-*.parquet"]
CARD_FACTS = ("size_categories", "configs", "dataset_info")  # the metadata of the card that every run replaces
CARD_BEGIN = f"<!-- {Path(__file__).name} writes from here to its second mark; text before and after is kept. -->"
CARD_END = f"<!-- End of what {Path(__file__).name} wrote. -->"
# The paper's five. VQAScore has 11 billion parameters: recipes/synpic_24gb.yaml is for one small GPU.
DEFAULT_REWARDS = ("hpsv2.1", "mps", "pickscore", "vqascore", "imagereward")
COMPARE = {"at least": operator.ge, "greater than": operator.gt, "at most": operator.le, "less than": operator.lt}


def flag(default, help: str, group: str | None = None, *, min=None, above=None, max=None, below=None, **options):
    """A field of the command line, with its range. `group`: the title in --help of the flags from here on."""
    help += "" if default in (None, list) else f" Default: {' '.join(default()) if callable(default) else default}."
    metadata = {"help": help, "group": group, "limits": dict(zip(COMPARE, (min, above, max, below))), **options}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


@dataclass
class ScriptArguments:
    prompts: str | None = flag(None, "File, URL, dataset's folder or Hub id, or a set's name. Required.", "Prompts")
    prompt_column: str | None = flag(None, "Column of the prompts. Default: prompt, or the named set's.")
    prompt_split: str | None = flag(None, "Split of a dataset. Default: train, or the named set's.")
    max_prompts: int | None = flag(None, "Use the first N distinct prompts.", min=1)
    generators: str | None = flag(None, "YAML list of generators. Default: the paper's four.", "Generators")
    generation_batch_size: str = flag("4", "Images drawn together; auto: as many as fit, at most 32.")
    compile: bool = flag(False, "Compile the denoisers' blocks: faster drawing after a slow first batch.")
    image_format: str = flag("jpg", "jpg has quality 95, and the Hub's viewer shows it.", choices=("jpg", "png"))
    seed: int = flag(0, "Seeds the images, together with the prompt and the generator's name.", min=0, max=2**32 - 1)
    rewards: list[str] = flag(lambda: [*DEFAULT_REWARDS], "Name, name=checkpoint or file.py:function.", "Rewards")
    reward_batch_size: int = flag(32, "Images scored together.", min=1)
    rewards_at_once: int | None = flag(None, "Reward models held at once. Default: all; images are read once.", min=1)
    output_dir: str = flag("outputs/synpic", "Folder for the dataset, its card, and the shards in work/.", "Work")
    shard_size: int = flag(64, "Prompts per shard: the work that a crash can lose.", min=1)
    stages: list[str] = flag(lambda: list(STAGES), "Stages to run.", choices=STAGES)
    task_index: int = flag(0, "Which of --num_tasks this is, from 0, e.g. $SLURM_ARRAY_TASK_ID.", min=0)
    num_tasks: int = flag(1, "Generate and score as one of N independent tasks.", min=1)
    gpu_hourly_cost: float | None = flag(None, "$ per GPU and hour, for the card.", min=0)
    push_to_hub: bool = flag(False, "Upload the dataset in the publish stage.")
    hub_dataset_id: str | None = flag(None, "Dataset repository: user/name.")
    hub_private_repo: bool = flag(False, "Make a new repository private.")

    def __post_init__(self):
        complete_prompt_flags(self)
        if self.num_tasks > 1:  # a run of its own ranks and publishes after all tasks
            self.stages = [stage for stage in self.stages if stage in ("generate", "score")]
        size = self.generation_batch_size
        for wrong, problem in (
            (not self.prompts, f"--prompts is missing: a file, URL, dataset, or one of {', '.join(PROMPT_SETS)}"),
            (not re.fullmatch(r"auto|[1-9]\d{0,8}", size), f"--generation_batch_size {size}: a number from 1, or auto"),
            (self.compile and size == "auto", "--generation_batch_size auto: with --compile, give a number"),
            (self.task_index >= self.num_tasks, f"--task_index {self.task_index}: must be less than --num_tasks"),
            (not self.stages, "--stages rank publish: one run does this after all tasks: give --num_tasks 1"),
            (self.push_to_hub and not self.hub_dataset_id, "--push_to_hub needs --hub_dataset_id user/name"),
        ):
            if wrong:
                raise SystemExit(problem)


# Ranking --------------------------------------------------------------------------------------------------------------
def preference_probability(scores: np.ndarray) -> np.ndarray:
    """Share of the comparisons that an image wins (Algorithm 1): over all rewards, against its prompt's other images.
    scores: float (n_rewards, k), higher is better; equal scores count for neither. Returns float64 (k,) in [0, 1]."""
    scores = np.asarray(scores, dtype=np.float64)
    n_rewards, k = scores.shape
    wins = (scores[:, :, None] > scores[:, None, :]).sum(axis=(0, 2))
    return wins / (n_rewards * (k - 1))


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


# Stages: draw, score, rank --------------------------------------------------------------------------------------------
def main(args: ScriptArguments) -> None:
    diffusers.utils.logging.disable_progress_bar()  # of loading pipelines
    diffusers.utils.logging.set_verbosity_error()  # that a prompt is cut, prompt by prompt: the card counts them
    transformers_logging.disable_progress_bar()
    # Several processes talk through gloo if there is no GPU. The first to finish a stage may wait hours for the last.
    several = {"cpu": not torch.cuda.is_available(), "timeout": timedelta(days=1)}
    state = PartialState(**(several if "LOCAL_RANK" in os.environ else {}))
    generators, output_dir = read_generators(args.generators), Path(args.output_dir)
    _lock = begin_run(args, generators) if state.is_main_process else None  # held until the end of this function
    state.wait_for_everyone()
    shards = json.loads((output_dir / "work" / "prompts.json").read_text())["shards"]
    for stage in (generate, score, rank):
        # Publishing ranks first: where nothing has changed, that writes the card alone, which names the repository.
        if stage.__name__ in args.stages or (stage is rank and "publish" in args.stages):
            stage(args, shards, generators, state)
            state.wait_for_everyone()
    if state.is_main_process:
        if "publish" in args.stages and args.push_to_hub:
            publish(args, [*DATA_FILES, "README.md", "grid.png"])
        then = f"next: train_rankdpo_sdxl.py --dataset_name {output_dir}" if "rank" in args.stages else "next: the rest"
        if args.num_tasks > 1:
            then = f"task {args.task_index} is done; last, --task_index 0 --num_tasks 1 --stages rank publish"
        print(f"{sum(map(len, shards))} prompts x {len(generators)} images in {output_dir}; {then}")


def begin_run(args: ScriptArguments, generators: list[dict]) -> FileLock:
    """Checks what can be checked before a model is loaded, locks the folder, records what the work is made with."""
    output_dir, work = Path(args.output_dir), Path(args.output_dir, "work")
    if not (work / "settings.json").exists() and any(p != work and not is_hidden(p.name) for p in output_dir.glob("*")):
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    check_rewards(args.rewards)
    record = plan_shards(args, work / "prompts.json")
    settings = {work: {"seed": args.seed, "image_format": args.image_format}}
    for entry in generators:  # a local model by its content, which tells it from one trained again into its folder
        files = [path_key(part["model"]) for part in generator_parts(entry) if os.path.exists(part.get("model", ""))]
        settings[work / "images" / entry["name"]] = {**entry, "files": files}
    settings |= {work / "scores" / reward_name(name): reward_settings(name) for name in args.rewards}
    for folder, wanted in settings.items():
        earlier = json.loads(file.read_text()) if (file := folder / "settings.json").exists() else wanted
        for name in {**earlier, **wanted}:
            if earlier.get(name) != wanted.get(name):
                problem = f"{folder} was made with {name} {earlier.get(name)}, not {wanted.get(name)}"
                raise SystemExit(f"{problem}: choose another --output_dir or another name, or delete that folder")
    if "generate" in args.stages:
        for entry in generators:
            check_generator(entry, list(itertools.chain(*record["shards"])))
        probe_rewards(args.rewards, generators[0], record["shards"][0])
    earlier_card(args)
    if args.push_to_hub and args.num_tasks == 1 and "publish" in args.stages:  # a wrong token or name fails now
        prepare_repository(args)
    lock = lock_folder(args)
    write_bytes(work / "prompts.json", json.dumps(record, indent=1).encode())
    for folder, wanted in settings.items():
        write_bytes(folder / "settings.json", json.dumps(wanted, indent=1).encode())
    return lock


def lock_folder(args: "ScriptArguments") -> FileLock:
    """The lock of this run, or task. A single run and a task refuse each other; tasks work side by side."""
    own, others = (f".lock-{args.task_index}", ".lock") if args.num_tasks > 1 else (".lock", ".lock-*")
    try:
        lock = FileLock(Path(args.output_dir, own), timeout=3)
        lock.acquire()
        for other in Path(args.output_dir).glob(others):
            with FileLock(other, timeout=3):
                pass  # tasks that start at once meet here
    except Timeout:
        raise SystemExit(f"--output_dir {args.output_dir} is in use by another run: wait for its end") from None
    return lock


def plan_shards(args: ScriptArguments, file: Path) -> dict:
    """The prompts in shards. Those of an earlier run stay as they are, and new prompts make new shards, so a shard that
    is done is done for ever. Prompts from the Hub or the web are read once."""
    source = [args.prompts, args.prompt_column, args.prompt_split, args.max_prompts]
    earlier = json.loads(file.read_text()) if file.exists() else {"source": None, "shards": []}
    if earlier["source"] == source and not os.path.exists(args.prompts):
        return earlier
    places = {row["prompt"]: {"index": n["index"], "index+1": n["index"] + 1} for row, n in zip(*read_prompts(*source))}
    prompts, known = [*places], [row["prompt"] for shard in earlier["shards"] for row in shard]
    if prompts[: len(known)] != known:
        problem = "other prompts" if prompts != known[: len(prompts)] else f"{len(known)} prompts: it can only grow"
        raise SystemExit(f"--output_dir {args.output_dir} holds a run on {problem}: choose another folder")
    new = [{"prompt_id": short_hash(p), "prompt": p, **places[p]} for p in prompts[len(known) :]]
    return {"source": source, "shards": earlier["shards"] + list(batches(new, args.shard_size))}


def generate(args: ScriptArguments, shards: list[list[dict]], generators: list[dict], state: PartialState) -> None:
    """Draws the missing shards. Each generator is loaded once, draws its shards, and is freed."""
    own = range(args.task_index, len(shards), args.num_tasks)
    files = {entry["name"]: [existing_files(entry, rows) for rows in shards] for entry in generators}
    todo = {e: [s for s in own if not images_of(image_file(args, e, s), files=files[e][s])] for e in files}
    state.wait_for_everyone()  # now all processes know of the same missing shards, which they share out
    device = torch.cuda.get_device_name() if state.device.type == "cuda" else "CPU"
    for entry in generators:
        name, missing = entry["name"], todo[entry["name"]][state.process_index :: state.num_processes]
        if not missing:
            continue
        draw = None if "images" in entry else Generator(entry, state.device, args)
        total, hidden = sum(len(shards[s]) for s in missing), not state.is_local_main_process
        with tqdm(total=total, desc=f"draw {name}", unit="image", disable=hidden) as bar, ThreadPoolExecutor(1) as pool:
            writing = None
            for s in missing:
                started = time.time()
                ids, prompts = ([row[column] for row in shards[s]] for column in ("prompt_id", "prompt"))
                # The run's seed, the prompt and the generator give every image a seed of its own.
                seeds = [int(short_hash(f"{args.seed}|{id}|{name}")[:8], 16) for id in ids]
                images = draw(prompts, seeds, bar) if draw else [*WORKERS.map(read_picture, files[name][s])]
                bar.update(len(files[name][s]))
                columns = {"prompt_id": ids, "image": images, "seed": seeds}
                seconds, cut = time.time() - started, draw.count_cut(prompts) if draw else 0
                facts = {"seconds": seconds, "device": device, "cut": cut, "files": files[name][s]}
                if writing:  # a thread encodes and writes a shard while the next is drawn: at most two are in memory
                    writing.result()
                writing = pool.submit(write_images, args, name, s, columns, facts)
            writing.result()
        del draw
        free_memory()


def score(args: ScriptArguments, shards: list[list[dict]], generators: list[dict], state: PartialState) -> None:
    """Scores what has no score of its images' hash. An image is decoded once for all rewards that are held together."""
    own = range(args.task_index, len(shards), args.num_tasks)
    jobs = [(entry["name"], s) for entry in generators for s in own][state.process_index :: state.num_processes]
    hashes = {job: images_of(image_file(args, *job), "generate") for job in jobs}
    device = torch.cuda.get_device_name() if state.device.type == "cuda" else "CPU"
    for names in batches(args.rewards, args.rewards_at_once or len(args.rewards)):
        todo = {job: [r for r in names if images_of(score_file(args, r, *job)) != hashes[job]] for job in jobs}
        todo = {job: lacking for job, lacking in todo.items() if lacking}
        needed = [name for name in names if any(name in lacking for lacking in todo.values())]
        rewards = {name: load_reward_model(name, state.device, batch_size=args.reward_batch_size) for name in needed}
        begun = (begin_shard(image_file(args, *job), {r: rewards[r] for r in todo[job]}) for job in todo)
        total, hidden = sum(len(shards[s]) * len(todo[name, s]) for name, s in todo), not state.is_local_main_process
        with tqdm(total=total, desc="score", unit="image", disable=hidden or not todo) as bar:
            for job, images in zip(todo, read_ahead(begun)):
                ids, prompts = ([row[column] for row in shards[job[1]]] for column in ("prompt_id", "prompt"))
                for name in images:
                    started = time.time()
                    table = pa.table({"prompt_id": ids, "score": rewards[name].score(images[name], prompts)})
                    facts = {"seconds": time.time() - started, "device": device, "cut": len(rewards[name].cut)}
                    facts["images"] = hashes[job]
                    write_tables(iter([table]), score_file(args, name, *job), facts)
                    bar.update(len(ids))
        del rewards, begun
        free_memory()


# Copied from train_rankdpo_sdxl.read_ahead
def read_ahead(items: Iterator) -> Iterator:
    """The same items. A thread reads the next one while the caller works with this one."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, items, None)
            yield item


def begin_shard(file: Path, rewards: dict[str, "RewardModel"]) -> dict[str, list[Future]]:
    """For each reward the images of a shard, in preparation. Each is decoded once. The workers take work in order, so
    a decoding has begun before another thread waits for it."""
    images = pq.read_table(file, columns=["image"])["image"].to_pylist()
    decoded = [WORKERS.submit(decode_image, image) for image in images]
    return {name: reward.begin([image.result for image in decoded]) for name, reward in rewards.items()}


def rank(args: ScriptArguments, shards: list[list[dict]], generators: list[dict], state: PartialState) -> None:
    """Joins images and scores into the dataset's files, in a folder that takes its place when it is complete."""
    text, numbers = Value("string"), List(Value("float32"))
    columns = {"prompt_id": text, "prompt": text, "images": List(Image()), "generators": List(text)}
    columns |= {"seeds": List(Value("int64")), "scores": {reward_name(name): numbers for name in args.rewards}}
    features = Features(columns | {"preference_probability": numbers, "rank": List(Value("int32"))})
    without_images = Features({name: feature for name, feature in features.items() if name != "images"})
    output_dir, building = Path(args.output_dir), Path(args.output_dir, "work", "building")
    names = [entry["name"] for entry in generators]
    parts = list(batches(range(len(shards)), math.ceil(len(shards) / 200)))  # one commit takes at most 200 files
    files = [f"data/train-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    for number in range(state.process_index, len(parts), state.num_processes):
        tables = (ranked_table(args, s, shards[s], names, features) for s in parts[number])
        build_file(output_dir, files[number], made_of(args, parts[number], names), tables)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    paths, schema = [building / file for file in files], without_images.arrow_schema
    tables = (pq.read_table(path, columns=schema.names).cast(schema) for path in paths)
    key = short_hash("".join(shard_facts(path)["key"] for path in paths))
    scores = "scores/train-00000-of-00001.parquet"
    build_file(output_dir, scores, key, tables, row_group_size=1000)
    old = set(building.rglob("*.parquet")) - {*paths, building / scores}
    for file in [*old, *building.parent.rglob(".*.tmp")]:  # of runs that were killed; here all tasks have ended
        file.unlink()
    for folder in ("data", "scores"):
        shutil.rmtree(output_dir / folder, ignore_errors=True)
        os.rename(building / folder, output_dir / folder)
    configs = {"default": ("data", features), "scores": ("scores", without_images)}
    write_card(args, sum(map(len, shards)), generators, configs, key)


def made_of(args: ScriptArguments, shards: range, names: list[str]) -> str:
    """A hash of what a file of the dataset is made of. Exits with one line if a part of it is missing."""
    parts = [names, {reward_name(name): reward_settings(name) for name in args.rewards}]
    for job in itertools.product(names, shards):
        parts.append(images_of(image_file(args, *job), "generate"))
        for reward in args.rewards:
            if images_of(score_file(args, reward, *job), "score") != parts[-1]:
                raise SystemExit(f"{score_file(args, reward, *job)} is of other images: run the score stage first")
    return short_hash(json.dumps(parts))


def build_file(output_dir: Path, name: str, key: str, tables: Iterator[pa.Table], row_group_size: int | None = None):
    """Makes a file in work/building, unless it is there, or the dataset has one that was made of the same."""
    file = output_dir / "work" / "building" / name
    if shard_facts(file).get("key") == key:
        return
    if shard_facts(output_dir / name).get("key") == key:
        with suppress(OSError):  # some file systems have no links
            file.parent.mkdir(parents=True, exist_ok=True)
            os.link(output_dir / name, file)
            return
    write_tables(tables, file, {"key": key}, row_group_size)


def ranked_table(args: ScriptArguments, s: int, rows: list[dict], names: list[str], features: Features) -> pa.Table:
    """The rows of one shard with their images, scores, preferences and ranks."""
    drawn = [pq.read_table(image_file(args, name, s)).to_pydict() for name in names]
    files = [[score_file(args, reward, name, s) for name in names] for reward in args.rewards]
    scores = np.array([[pq.read_table(file)["score"].to_numpy() for file in row] for row in files])
    ranked = []
    for i, row in enumerate(rows):
        matrix = np.ascontiguousarray(scores[:, :, i])  # (n_rewards, k)
        paths = [f"{row['prompt_id']}_{name}.{args.image_format}" for name in names]
        columns = {
            "images": [{"bytes": images["image"][i], "path": path} for images, path in zip(drawn, paths)],
            "generators": names,
            "seeds": [images["seed"][i] for images in drawn],
            "scores": dict(zip(map(reward_name, args.rewards), matrix.tolist())),
            "preference_probability": preference_probability(matrix).tolist(),
            "rank": preference_rank(matrix).tolist(),
        }
        ranked.append(row | columns)
    return pa.Table.from_pylist(ranked, schema=features.arrow_schema)


# Generators -----------------------------------------------------------------------------------------------------------
# The paper's generators, with the settings of their model cards.
DEFAULT_GENERATORS = """
- {name: sdxl, model: stabilityai/stable-diffusion-xl-base-1.0, load: {variant: fp16, dtype: float16},
   call: {num_inference_steps: 50, guidance_scale: 5.0, height: 1024, width: 1024}}
- {name: sd3-medium, model: stabilityai/stable-diffusion-3-medium-diffusers, load: {dtype: float16},
   call: {num_inference_steps: 28, guidance_scale: 7.0, height: 1024, width: 1024}}
- {name: pixart-sigma, model: PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, load: {dtype: float16},
   call: {num_inference_steps: 20, guidance_scale: 4.5, height: 1024, width: 1024, clean_caption: false}}
- {name: stable-cascade, model: stabilityai/stable-cascade, load: {variant: bf16, dtype: bfloat16},
   call: {num_inference_steps: 10, guidance_scale: 0.0},
   prior: {model: stabilityai/stable-cascade-prior, load: {variant: bf16, dtype: bfloat16},
           call: {num_inference_steps: 20, guidance_scale: 4.0, height: 1024, width: 1024}}}
"""
# What every call of a pipeline gets from this script: one picture for each prompt and seed.
GIVEN_BY_SCRIPT = {"self", "prompt", "prompt_embeds", "generator", "latents", "num_images_per_prompt", "output_type"}
GIVEN_BY_SCRIPT |= {"return_dict", "image_embeddings", "callback_on_step_end"}
# Pipeline → what diffusers must find in a file of its kind.
SINGLE_FILES = {"StableDiffusionPipeline": ("v1", "v2"), "StableDiffusionXLPipeline": ("xl_base", "playground-v2-5")}
# What `load` may have besides the pipeline's components: of the options of from_pretrained, those about the files.
LOAD_OPTIONS = {"dtype", "variant", "revision", "use_safetensors", "cache_dir", "config"}


def read_generators(file: str | None) -> list[dict]:
    """Reads the recipe. Exits with one line that names what is wrong."""
    try:
        entries = yaml.safe_load(Path(file).read_text() if file else DEFAULT_GENERATORS)
        names = [entry["name"] for entry in entries]
        for part in (part for entry in entries for part in (entry, entry.get("prior")) if part):
            known = {"model", "load", "call"} | ({"name", "prior", "images"} if "name" in part else set())  # no prior's
            if unknown := sorted(set(part) - known):
                raise ValueError(f"unknown key {', '.join(unknown)}; the keys are {', '.join(sorted(known))}")
            values = (part.get("images", part.get("model")), part.get("load", {}), part.get("call", {}))
            if [*map(type, values)] != [str, dict, dict]:
                raise ValueError("model must be a folder, file or id of the Hub, load and call hold `name: value`")
        if not all(re.fullmatch(r"\w[\w.-]{,99}", name) for name in names) or len(set(names)) < max(2, len(names)):
            raise ValueError(f"names {names}: at least 2, all different, of letters, digits, '.', '_', '-': of folders")
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}: a list of generators, each with name and model"
        raise SystemExit(f"--generators {file}: {problem}") from None
    return entries


def generator_parts(entry: dict) -> list[dict]:
    """A generator, and its prior if it has one."""
    return [{"load": {}, "call": {}} | part for part in (entry, entry.get("prior")) if part]


def check_generator(entry: dict, rows: list[dict]) -> None:
    """Exits with one line unless each image or model can be read, and the model takes what `load` and `call` name."""
    existing_files(entry, rows)
    for part in generator_parts(entry) if "images" not in entry else ():
        load, call, where = part["load"], part["call"], f"generator {entry['name']}: {part['model']}"
        single = part["model"].endswith((".safetensors", ".ckpt"))
        if single != bool(load.get("config")):
            raise SystemExit(f"{where}: a single file, and no other model, needs `load: {{config: Hub id or folder}}`")
        try:
            config = DiffusionPipeline.load_config(load.get("config", part["model"]), revision=load.get("revision"))
            class_name, weights = config["_class_name"], load_single_file_checkpoint(part["model"]) if single else {}
        except Exception as error:
            raise SystemExit(f"{where} is no diffusers pipeline that can be read: {one_line(error)}") from None
        kind = getattr(diffusers, class_name, DiffusionPipeline)
        takes, components = ({*inspect.signature(function).parameters} for function in (kind.__call__, kind))
        if "prompt" not in takes or re.search("Img2Img|Inpaint|Edit|ControlNet|Layered", class_name):
            raise SystemExit(f"{where} is a {class_name}: no pipeline of diffusers that draws from a prompt alone")
        if single and class_name in SINGLE_FILES:
            fits = infer_diffusers_model_type(weights) in SINGLE_FILES[class_name]
            fits &= "model.diffusion_model.input_blocks.0.0.weight" in weights
            if not fits or any(key.startswith("edm_") for key in weights) and "EDM" not in config["scheduler"][1]:
                raise SystemExit(f"{where} is no {class_name}, but e.g. a refiner, an inpainting model or a LoRA")
        distilled = re.search("turbo|lightning|lcm|dmd2", Path(part["model"]).name, re.IGNORECASE)
        if distilled and ((call.get("num_inference_steps") or 50) > 10 or call.get("guidance_scale", 5) > 3):
            warn(f"{where} is distilled, by its name: it needs at most 10 steps, and a guidance of at most 3")
        dtypes = dtype if isinstance(dtype := load.get("dtype", "float32"), dict) else {"default": dtype}
        given = {"call": call, "load": load, "dtype": dtypes}
        known = {"call": takes - GIVEN_BY_SCRIPT, "load": components | LOAD_OPTIONS, "dtype": components | {"default"}}
        for key, name in ((k, name) for k in given for name in set(given[k]) - known[k]):
            guess = "".join(f": do you mean {close}?" for close in difflib.get_close_matches(name, known[key], 1))
            raise SystemExit(f"{where}: `{key}` has {name}, which {class_name} does not take from a recipe{guess}")
        if not {*dtypes.values()} <= {"float32", "float16", "bfloat16"}:
            raise SystemExit(f"{where}: dtype {dtype}: choose from float32, float16, bfloat16")


def probe_rewards(names: list[str], entry: dict, rows: list[dict]) -> None:
    """Tries the user's functions on two pictures of noise, of the size that the generator will draw, if the recipe says
    it: an error or a NaN shows before hours of drawing. Not classes, which may load a large model."""
    call, prompts = generator_parts(entry)[-1]["call"], [row["prompt"] for row in (rows * 2)[:2]]
    if {"width", "height"} <= set(call):
        noise = np.random.default_rng(0).integers(0, 256, (2, call["height"], call["width"], 3), dtype=np.uint8)
        own = [FunctionReward(name) for name in names if name.partition("=")[0] not in REWARD_MODELS]
        for reward in (reward for reward in own if not inspect.isclass(reward.function)):
            reward.score([PILImage.fromarray(pixels) for pixels in noise], prompts)


class Generator:
    """A text-to-image pipeline with its recipe. Pipelines like Stable Cascade have a second one in front, the prior."""

    def __init__(self, entry: dict, device: torch.device, args: ScriptArguments):
        self.where, self.compile = f"generator {entry['name']}", args.compile
        self.batch_size = 32 if args.generation_batch_size == "auto" else int(args.generation_batch_size)
        self.parts = [(self.load(part, device), part["call"]) for part in generator_parts(entry)]

    def load(self, part: dict, device: torch.device) -> DiffusionPipeline:
        if not hasattr(diffusers.pipelines, "wuerstchen"):
            # diffusers 0.42 moved this module. Stable Cascade's model_index.json names its old place.
            diffusers.pipelines.wuerstchen = importlib.import_module("diffusers.pipelines.deprecated.wuerstchen")
        dtype = "float32" if device.type == "cpu" else part["load"].get("dtype", "float32")  # half is slow on a CPU
        by_component = {name: getattr(torch, kind) for name, kind in dtype.items()} if isinstance(dtype, dict) else None
        options = part["load"] | {"dtype": by_component or getattr(torch, dtype)}
        config = options.get("config")  # of a model in one file
        kind = getattr(diffusers, DiffusionPipeline.load_config(config)["_class_name"]) if config else DiffusionPipeline
        pipeline = (kind.from_single_file if config else kind.from_pretrained)(part["model"], **options).to(device)
        if config and "v_pred" in (weights := load_single_file_checkpoint(part["model"])):  # files like NoobAI's say so
            changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
            changes["rescale_betas_zero_snr"] = "ztsnr" in weights
            pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changes)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.safety_checker = None  # it would replace images by black ones, which would be ranked
        if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
            pipeline.vae.enable_slicing()  # decoding a whole batch at once runs out of memory first
        for name, model in pipeline.components.items() if self.compile else ():
            if name in ("unet", "transformer", "prior", "decoder") and isinstance(model, torch.nn.Module):
                blocks = [kind for kind in model._no_split_modules or () if kind.endswith("Block")]
                model._repeated_blocks = model._repeated_blocks or blocks
                if {type(module).__name__ for module in model.modules()}.intersection(model._repeated_blocks):
                    model.compile_repeated_blocks(dynamic=False)
        return pipeline

    def __call__(self, prompts: list[str], seeds: list[int], bar: tqdm) -> list[PILImage.Image]:
        """The images of these prompts and seeds. Where the device's memory runs out, half as many are drawn at once."""
        images = []
        while todo := prompts[len(images) :][: self.batch_size]:
            try:
                images += self.draw(todo, seeds[len(images) :][: self.batch_size])
                bar.update(len(todo))
            except torch.OutOfMemoryError:
                count = self.batch_size if self.compile else len(todo)  # a compiled batch is filled up
                if count == 1:
                    raise SystemExit(f"{self.where}: the device's memory does not hold a single image") from None
                self.batch_size = count // 2
                warn(f"{self.where}: the device's memory does not hold {count} images at once: half as many")
                free_memory()
        return images

    @torch.no_grad()
    def draw(self, prompts: list[str], seeds: list[int]) -> list[PILImage.Image]:
        count = len(prompts)
        if self.compile:  # one graph for all batches: a smaller one is filled up with its last prompt
            missing = self.batch_size - count
            prompts, seeds = prompts + prompts[-1:] * missing, seeds + seeds[-1:] * missing
        # One generator per image, on the CPU: its noise does not depend on its batch or on the kind of GPU.
        options = {"prompt": prompts, "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds]}
        (pipeline, call), *priors = self.parts
        for prior, settings in priors:
            embeds = prior(**options, **for_each(settings, len(prompts))).image_embeddings
            call = call | {"image_embeddings": embeds.to(pipeline.decoder.dtype)}
        return pipeline(**options, **for_each(call, len(prompts))).images[:count]

    def count_cut(self, prompts: list[str]) -> int:
        """How many of these prompts are longer than each of the text encoders reads."""
        pipeline, call = self.parts[-1]
        parameter = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
        longest = call.get("max_sequence_length", parameter and parameter.default) or math.inf
        longer = []  # of each tokenizer: is it so, prompt by prompt?
        for part in pipeline.components.values():
            if isinstance(part, transformers.PreTrainedTokenizerBase):
                rows, limit = part(prompts, verbose=False).input_ids, min(part.model_max_length, longest)
                longer.append([len(row) > limit for row in rows])
        return sum(map(all, zip(*longer)))


def existing_files(entry: dict, rows: list[dict]) -> dict[str, list[int]]:
    """Of images that exist, each row's file with its size and time; {} of a model. Exits with one line if one lacks."""
    where, template = f"generator {entry['name']}", entry.get("images")
    try:
        files = [template.format(**row) for row in rows] if template else []
    except Exception as error:
        problem = f"no field {error}" if isinstance(error, KeyError) else one_line(error)
        raise SystemExit(f"{where}: images {template}: {problem}; the fields are {', '.join(rows[0])}") from None
    if wrong := [file for file, count in Counter(files).items() if count > 1 or not os.path.isfile(file)]:
        raise SystemExit(f"{where}: {len(wrong)} images are missing or shared: {wrong[0]}")
    return {file: [state.st_size, state.st_mtime_ns] for file, state in zip(files, map(os.stat, files))}


def read_picture(file: str) -> PILImage.Image:
    """A picture that exists, as 8-bit RGB: turned as its EXIF data say, what is transparent becomes white."""
    try:
        picture = decode_image(ImageOps.exif_transpose(PILImage.open(file))).convert("RGBA")
    except Exception as error:  # PIL raises many kinds
        raise SystemExit(f"{file} cannot be read: {one_line(error)}") from None
    return PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture).convert("RGB")


def for_each(call: dict, count: int) -> dict:
    """A negative prompt is one text in the recipe, and some pipelines want one for each prompt."""
    texts = {name for name in call if "negative_prompt" in name and isinstance(call[name], str)}
    return {name: [value] * count if name in texts else value for name, value in call.items()}


# Work on disk ---------------------------------------------------------------------------------------------------------
# Shard s holds the prompts shards[s]: one file per generator, and one per reward and generator.
def image_file(args: ScriptArguments, generator: str, shard: int) -> Path:
    return Path(args.output_dir, "work", "images", generator, f"{shard:05d}.parquet")


def score_file(args: ScriptArguments, reward: str, generator: str, shard: int) -> Path:
    return Path(args.output_dir, "work", "scores", reward_name(reward), generator, f"{shard:05d}.parquet")


def images_of(file: Path, stage: str = "", files: dict | None = None) -> str | None:
    """The hash of a shard's images, if these are of `files`, or of those it has scores of. `stage` had to make it."""
    facts = shard_facts(file)
    if stage and "images" not in facts:
        raise SystemExit(f"{file} is missing: run the {stage} stage first")
    return facts.get("images") if files in (None, facts.get("files", {})) else None


def shard_facts(file: Path) -> dict:
    """What was recorded with a file; {} if there is none, or it is no whole file."""
    try:
        return json.loads(pq.read_metadata(file).metadata[b"synpic"])
    except (FileNotFoundError, pa.ArrowInvalid):
        return {}


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


def write_images(args: ScriptArguments, generator: str, shard: int, columns: dict, facts: dict) -> None:
    if black := sum(image.convert("L").getbbox() is None for image in columns["image"]):
        warn(f"generator {generator}: {black} images are black all over: an overflow in half precision?")
    files = list(WORKERS.map(partial(encode_image, image_format=args.image_format), columns["image"]))
    facts |= {"black": black, "images": short_hash(b"|".join([*map(str.encode, columns["prompt_id"]), *files]))}
    table = pa.table(columns | {"image": pa.array(files, pa.large_binary())})
    write_tables(iter([table]), image_file(args, generator, shard), facts)


def encode_image(image: PILImage.Image, image_format: str) -> bytes:
    kind, image = ("JPEG", image.convert("RGB")) if image_format == "jpg" else ("PNG", image)
    image.save(buffer := BytesIO(), kind, quality=95)
    return buffer.getvalue()


# Card -----------------------------------------------------------------------------------------------------------------
def dataset_statistics(files: list[Path], rewards: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Win rates (n_rewards + 1, k): each generator's share of won comparisons, by reward and over all. Tau (n_rewards,
    n_rewards): the mean of Kendall's tau-b between two rewards over the rows where neither gives equal scores only."""
    shares, taus = [], []
    for file in files:
        table = pq.read_table(file, columns=["scores", "preference_probability"]).flatten()
        scores = np.array([table[f"scores.{reward}"].to_pylist() for reward in rewards])  # (n_rewards, rows, k)
        order = np.sign(scores[..., :, None] - scores[..., None, :])  # 1: the first image is better, 0: equal
        won = (order > 0).sum(axis=-1) / (scores.shape[-1] - 1)
        shares.append([*won, np.array(table["preference_probability"].to_pylist())])
        products = np.einsum("arij,brij->rab", order, order)
        length = np.einsum("raa->ra", products)
        with np.errstate(invalid="ignore"):  # tau-b is the cosine of two orders
            taus.append(products / np.sqrt(length[:, :, None] * length[:, None, :]))
    taus = np.concatenate(taus)
    tau = np.nansum(taus, axis=0) / np.maximum(np.isfinite(taus).sum(axis=0), 1)
    np.fill_diagonal(tau, 1.0)
    return np.concatenate(shares, axis=1).mean(axis=1), tau


def describe_work(args: ScriptArguments, names: list[str], n_prompts: int) -> tuple[str, list[str]]:
    """From what was recorded with the shards: a table of time, speed and cost, and what a user should know."""
    rate, rows, remarks = args.gpu_hourly_cost, [], []
    work = [("images", name, n_prompts) for name in names]
    work += [("scores", reward_name(name), n_prompts * len(names)) for name in args.rewards]
    for kind, name, images in work:
        folders = [Path(args.output_dir, "work", kind, name, part) for part in (names if kind == "scores" else [""])]
        facts = [shard_facts(file) for folder in folders for file in folder.glob("[0-9]*.parquet")]
        seconds = sum(fact["seconds"] for fact in facts)
        speed = np.format_float_positional(images / seconds, 3, fractional=False, trim="-") if seconds else ""
        devices = ", ".join(sorted({fact["device"] for fact in facts}))
        rows.append([f"{kind} of {name}", images, speed, seconds / 3600, devices])
        if cut := sum(fact["cut"] for fact in facts) * n_prompts // images:
            remarks.append(f"{name} reads only the beginning of {cut} of the {n_prompts} prompts.")
        if black := sum(fact.get("black", 0) for fact in facts):
            remarks.append(f"{black} of the {n_prompts} images of {name} are black all over.")
    rows.append(["total", "", "", sum(row[3] for row in rows), ""])
    header = ["work", "images", "images/s of a process", "hours x processes", "device"]
    for row in [header, *rows] if rate else []:
        row.insert(4, f"cost in $ (at {rate} an hour)" if row is header else f"{row[3] * rate:.2f}")
    return markdown_table(header, [[*row[:3], f"{row[3]:.3f}", *row[4:]] for row in rows]), remarks


def grid_picture(file: Path, names: list[str], rows: int = 6, cell: int = 256) -> PILImage.Image:
    """The first prompts' images side by side, with preference probabilities. The best one has a green frame."""
    with pq.ParquetFile(file) as parquet:
        table, label = [batch.to_pylist()[0] for batch in itertools.islice(parquet.iter_batches(1), rows)], 22
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
        draw.text((4, top + cell + 4), " ".join(row["prompt"].split())[: 40 * len(names) - 10], fill="black")
    return canvas


def write_card(args: ScriptArguments, n_prompts: int, generators: list[dict], configs: dict, key: str) -> None:
    """Writes README.md and grid.png."""
    output_dir = Path(args.output_dir)
    files = sorted((output_dir / "data").glob("train-*.parquet"))
    names, rewards = [entry["name"] for entry in generators], [reward_name(name) for name in args.rewards]
    with replacing(output_dir / "grid.png") as temporary:
        grid_picture(files[0], names).save(temporary, "PNG")
    win_rates, taus = dataset_statistics(files, rewards)
    labels = [*rewards, "all: preference probability"]
    wins = [[label, *(f"{value:.3f}" for value in values)] for label, values in zip(labels, win_rates)]
    taus = [[label, *(f"{value:.2f}" for value in values)] for label, values in zip(rewards, taus)]
    times, remarks = describe_work(args, names, n_prompts)
    for remark in remarks:
        warn(remark)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "datasets"))
    dataset, title = args.hub_dataset_id or output_dir, output_dir.resolve().name
    body = f"""# {title}

{len(names)} text-to-image models drew each of {n_prompts} prompts, and {len(rewards)} reward models ranked the images:
a fully synthetic preference dataset for RankDPO, built with [Syn-Pic](https://arxiv.org/abs/2410.18013).
{" ".join(remarks)}{chr(10) * bool(remarks)}
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

{times}

## How it was made

```yaml
{yaml.safe_dump(generators, sort_keys=False).strip()}
```

Rewards: {", ".join(f"`{reward}`" for reward in args.rewards)}. Seed {args.seed}. {libraries}. Hash of prompts, images
and rewards: {key}.
"""
    front = {"pretty_name": title, "language": ["en"], "task_categories": ["text-to-image"]}
    front |= {"size_categories": [size_category(n_prompts)], "tags": ["synpic", "rankdpo", "preference", "synthetic"]}
    write_dataset_card(args, front | config_metadata(output_dir, configs), body)


# ----------------------------------------------------------------------------------------------------------------------
# Shared: dataset files, card and repository (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


def write_tables(tables: Iterator[pa.Table], file: Path, facts: dict, row_group_size: int | None = None) -> None:
    """Writes tables of one schema, and `facts`, into a Parquet file with a page index and row groups of 100 rows and
    64 MB at most: the Hub's viewer needs both. Memory holds one table at a time."""
    with replacing(file) as temporary:
        first = next(tables)
        size = row_group_size or min(max(64_000_000 * len(first) // max(first.nbytes, 1), 1), 100)
        schema = first.schema.with_metadata({**(first.schema.metadata or {}), b"synpic": json.dumps(facts)})
        with pq.ParquetWriter(temporary, schema, write_page_index=True) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table, row_group_size=size)


def config_metadata(output_dir: Path, configs: dict[str, tuple[str, Features]]) -> dict:
    """The card's `configs` and `dataset_info`: configuration → its folder and features. Without a name, `load_dataset`
    takes the one called default; without the sizes, it would serve the rows of an earlier build from its cache."""
    entries, infos = [], []
    for config, (folder, features) in configs.items():
        paths = [{"split": "train", "path": f"{folder}/train-*.parquet"}]
        entries.append({"config_name": config, "data_files": paths})
        files = sorted((output_dir / folder).glob("train-*.parquet"))
        metadata = [pq.read_metadata(file) for file in files]
        size = sum(m.row_group(i).total_byte_size for m in metadata for i in range(m.num_row_groups))
        split = {"name": "train", "num_bytes": size, "num_examples": sum(m.num_rows for m in metadata)}
        sizes = {"download_size": sum(file.stat().st_size for file in files), "dataset_size": size}
        infos.append({"config_name": config, "features": features._to_yaml_list(), "splits": [split], **sizes})
    return {"configs": entries, "dataset_info": infos}


def size_category(n: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if n < bound), "n>1M")


def markdown_table(header: list[str], rows: list[list]) -> str:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(header), *cells[1:]))


def write_dataset_card(args: "ScriptArguments", front: dict, body: str) -> None:
    """Writes README.md, between its marks; what people wrote into an earlier one stays."""
    block = f"{CARD_BEGIN}\n{body.strip().replace('<!--', '<! --')}\n{CARD_END}\n"  # a prompt may hold a mark
    card, theirs = RepoCard(f"---\n{CardData(**front).to_yaml()}\n---\n\n{block}"), earlier_card(args)
    write_bytes(Path(args.output_dir, "README.md"), str(merge_cards(card, theirs) if theirs else card).encode())


def earlier_card(args: "ScriptArguments", on_hub: bool = False) -> RepoCard | None:
    """The card as people may have edited it, in the folder or on the Hub."""
    file, name, kind = Path(args.output_dir, "README.md"), args.hub_dataset_id, "dataset"
    exists = HfApi().file_exists(name, file.name, repo_type=kind) if on_hub else file.exists()
    return RepoCard.load(name if on_hub else file, repo_type=kind, ignore_metadata_errors=False) if exists else None


def merge_cards(mine: RepoCard, theirs: RepoCard) -> RepoCard:
    """This run's card with what people wrote into an earlier one: text outside the marks, and the metadata, in which
    CARD_FACTS are replaced, and what is lacking is added."""
    licensed = "license" in theirs.data  # then name and link of this run's licence do not belong to it
    for name, value in mine.data.to_dict().items():
        if name in CARD_FACTS or name not in theirs.data and not (licensed and name.startswith("license_")):
            theirs.data[name] = value
    marked = f"(.*)({re.escape(CARD_BEGIN)}.*?{re.escape(CARD_END)})(.*)"
    block, old = re.fullmatch(marked, mine.text, re.S)[2], re.fullmatch(marked, theirs.text, re.S)
    theirs.text = f"{old[1]}{block}{old[3]}" if old else f"{theirs.text.rstrip()}\n\n{block}\n"
    return theirs


def prepare_repository(args: "ScriptArguments") -> None:
    """Creates the repository unless it exists. Exits with one line if the token cannot write to it, or if publishing
    would replace data that this script has not written."""
    private, kind = args.hub_private_repo or None, "dataset"
    try:
        url = HfApi().create_repo(args.hub_dataset_id, repo_type=kind, private=private, exist_ok=True)
        args.hub_dataset_id = url.repo_id
        HfApi().auth_check(url.repo_id, repo_type=kind, write=True)
    except Exception as error:
        problem = f"the dataset repository {args.hub_dataset_id} cannot be written to: {one_line(error)}"
        raise SystemExit(f"--push_to_hub: {problem} (hf auth login, or HF_TOKEN with write access)") from None
    card, files = earlier_card(args, on_hub=True), HfApi().list_repo_files(url.repo_id, repo_type=kind)
    foreign = [name for name in files if any(fnmatch(name, pattern) for pattern in DATA_FILES)]
    if foreign and not (card and CARD_BEGIN in card.text):
        raise SystemExit(f"--hub_dataset_id {args.hub_dataset_id} holds other data ({foreign[0]}): choose another name")


def publish(args: "ScriptArguments", published: list[str]) -> None:
    """Uploads the files of these patterns, but what is there; data files of an earlier dataset on the Hub go."""
    if theirs := earlier_card(args, on_hub=True):
        write_bytes(Path(args.output_dir, "README.md"), str(merge_cards(earlier_card(args), theirs)).encode())
    options = {"allow_patterns": published, "delete_patterns": DATA_FILES, "folder_path": args.output_dir}
    HfApi().upload_folder(repo_id=args.hub_dataset_id, repo_type="dataset", **options)
    print(f"published: {HfApi().endpoint}/datasets/{args.hub_dataset_id}")


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
# Shared: MPS and VLMs (build_synpic.py; `make fix-copies` writes it into the other scripts)
# ----------------------------------------------------------------------------------------------------------------------


class MPSReward(PickScoreReward):
    """MPS (Zhang et al., 2024), the overall model: exp(logit scale) · cosine like PickScore, but the image's tokens
    attend to the prompt's before they are compared with it: to those that have to do with the condition, a list of what
    people judge. A token's similarity is its largest dot product with a token of the condition; divided by the largest
    of the prompt (officially of the whole batch, which in its evaluation is one prompt), it must be above a threshold:
    0.3 in the official evaluation (`mps`), 0.01 in the official model class (`mps_t0.01`)."""

    CONDITION = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    )

    def load(self):
        self.threshold = 0.01 if self.kind == "mps_t0.01" else 0.3
        config = transformers.CLIPConfig.from_pretrained(self.source_of("config.json"))
        positions = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
        clip, layers = mps_weights(checkpoint_weights(self.checkpoint), positions)
        self.use_clip(self.load_model(transformers.CLIPModel, config=config, state_dict=clip, dtype=torch.float32))
        dim = config.projection_dim
        blocks = (torch.nn.ModuleList([MPSBlock(dim), MPSBlock(dim, positions)]) for _ in range(4))
        self.layers = torch.nn.ModuleList(blocks)
        self.layers.load_state_dict(layers)
        self.ready(self.layers, self.dtype)
        self.condition = self.text_features([self.CONDITION])[0][0].float()

    def text_features(self, prompts: list[str]) -> list[torch.Tensor]:
        """Of all 77 tokens, padding included, (n, 77, dim); and of the end token, (n, dim)."""
        tokens = self.tokens(prompts, 77, padding="max_length", return_tensors="pt")
        output = self.model.text_model(tokens.input_ids.to(self.device))
        return [self.model.text_projection(part) for part in (output.last_hidden_state, output.pooler_output)]

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        # All tokens, and without the layer norm that CLIP puts behind its pooled one.
        return self.model.visual_projection(self.model.vision_model(self.stack(pixels)).last_hidden_state)

    def encode_prompts(self, prompts: list[str]) -> list:
        tokens, end = self.text_features(prompts)
        similarity = (tokens.float() @ self.condition.T).amax(dim=-1)
        seen = similarity / similarity.amax(dim=-1, keepdim=True) > self.threshold
        return list(zip(tokens, seen, unit(end)))

    def compare(self, images: list[torch.Tensor], texts: list) -> torch.Tensor:
        images, (tokens, seen, end) = torch.stack(images), map(torch.stack, zip(*texts))
        for text_block, image_block in self.layers:
            images = image_block(text_block(images, tokens, seen[:, None, None]))
        return self.logit_scale * (unit(images[:, 0]) * end).sum(dim=-1)


class MPSBlock(torch.nn.Module):
    """Image tokens (n, positions, dim) attend to text tokens (n, t, dim) of which some are seen, or with `positions` to
    each other with rotary positions, beside a SwiGLU feed-forward. All heads, 64 wide, share one key and value."""

    def __init__(self, dim: int, positions: int = 0):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim)
        self.to_q = torch.nn.Linear(dim, dim, bias=False)
        self.to_kv = torch.nn.Linear(dim, 128, bias=False)
        self.to_out = torch.nn.Linear(dim, dim, bias=False)
        self.ff_in = torch.nn.Linear(dim, 8 * dim, bias=False)
        self.ff_out = torch.nn.Linear(4 * dim, dim, bias=False)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(positions, 64) if positions else None)

    def forward(self, images: torch.Tensor, texts=None, seen=None) -> torch.Tensor:
        inputs = self.norm(images)
        query = self.to_q(inputs).unflatten(-1, (-1, 64))  # (n, positions, heads, 64)
        key, value = self.to_kv(inputs if texts is None else texts).chunk(2, dim=-1)
        if texts is None:
            query = query * self.cos[:, None] + rotate_half(query) * self.sin[:, None]
            key = key * self.cos + rotate_half(key) * self.sin
        # With one key and one value, the heads of a token are no more than further queries of one head.
        query, key, value = query.flatten(1, 2)[:, None], key[:, None], value[:, None]
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
        inner, gate = self.ff_in(inputs).chunk(2, dim=-1)
        feed_forward = self.ff_out(torch.nn.functional.silu(gate) * inner)
        return images + self.to_out(attended.reshape(images.shape)) + feed_forward


def mps_weights(weights: dict, positions: int) -> tuple[dict, dict]:
    """MPS's state dict as those of transformers.CLIPModel and of the layers in MPSReward."""
    # "mps." is a prefix in the copy on the Hub.
    clip, layers = {key.removeprefix("mps.").removeprefix("model."): value for key, value in weights.items()}, {}
    for key, value in split_keys(clip, "cross_model.layers.").items():
        block, _, name = key.partition(".fn.")
        if name == "fused_attn_ff_proj.weight":
            parts = value.tensor_split((value.shape[1], value.shape[1] + 128))
            layers |= {f"{block}.{part}.weight": value for part, value in zip(("to_q", "to_kv", "ff_in"), parts)}
        elif name == "rotary_emb.inv_freq":
            # As in the official code in the type of the weights: in float16, these angles are off by up to 0.1.
            angles = torch.outer(torch.arange(positions).to(value), value).repeat(1, 2).float()
            layers |= {f"{block}.cos": angles.cos(), f"{block}.sin": angles.sin()}
        else:
            layers[f"{block}.{rename(name, 'ff.0=ff_in ff.2=ff_out ff_out.1=ff_out attn_out=to_out')}"] = value
    return clip, layers


class VLMReward(RewardModel):
    """Asks an image-text-to-text model of transformers a question like VQAScore's: the probability of "Yes" as the
    first token. A variant: its numbers are not those of CLIP-FlanT5."""

    QUESTION = 'Does this image show "{}"? Answer the question with Yes or No.'

    def load(self):
        self.processor = transformers.AutoProcessor.from_pretrained(self.checkpoint)
        self.processor.tokenizer.padding_side = "left"  # the answer follows the last token
        self.model = self.load_model(transformers.AutoModelForImageTextToText, self.checkpoint)
        self.yes = self.processor.tokenizer("Yes", add_special_tokens=False).input_ids[0]

    def prepare(self, image) -> PILImage.Image:
        return image.convert("RGB")

    def encode_prompts(self, prompts: list[str]) -> list[str]:
        contents = ([{"type": "image"}, {"type": "text", "text": self.QUESTION.format(text)}] for text in prompts)
        chats = [[{"role": "user", "content": content}] for content in contents]
        return [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]

    def compare(self, images: list, texts: list[str]) -> torch.Tensor:
        images = [[image] for image in images]  # a flat list would be many images for the first text
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.device, self.dtype), logits_to_keep=1).logits[:, -1].float()
        return logits.softmax(dim=-1)[:, self.yes]


# Variants: MPS with its model class's threshold; VQAScore's question to a VLM.
REWARD_MODELS |= dict.fromkeys(("mps", "mps_t0.01"), (MPSReward, "RE-N-Y/mpsv1", VIT_H))
REWARD_MODELS["vqascore_vlm"] = (VLMReward, "Qwen/Qwen2.5-VL-7B-Instruct", None)


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
