# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["accelerate", "datasets", "filelock", "fsspec", "ftfy", "huggingface_hub", "matplotlib", "numpy",
#     "pillow", "protobuf", "pyarrow", "pyyaml", "safetensors", "sentencepiece", "torch", "torchvision", "tqdm",
#     "transformers", "trl"]
# ///
"""Scores preference pairs and sorts them by quality: the Quality Sorted Dataset of DPO-QSD.

A reward model gives each image a probability ψ of being preferred. A pair's quality is Q = ψ(winner) · (1 − ψ(loser)).
The paper reports better models from the best 5.33 % of the pairs, best first, than from all of them.

Pick-a-Pic from the Hub, streamed, with HPSv2 as in the paper:

    accelerate launch score_pairs.py --dataset_name liuhuohuo2/pick-a-pic-v2 --output_dir outputs/pickapic-qsd

Killed at any moment, the same command goes on with what is missing in `<output_dir>/work`, on any number of processes.
"""

import argparse
import glob
import hashlib
import html
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory


if not sys.stderr.isatty():  # in a file of output all progress bars write a line every 30 seconds, not ten a second
    os.environ |= {"TQDM_MININTERVAL": "30", "TQDM_MAXINTERVAL": "60"} | os.environ

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from accelerate import PartialState
from datasets import Dataset, Features, Image, Value, load_dataset, load_dataset_builder, load_from_disk
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from huggingface_hub import CardData, HfApi, RepoCard
from huggingface_hub.errors import HFValidationError
from matplotlib.figure import Figure
from PIL import Image as PILImage
from PIL import ImageDraw, PngImagePlugin
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, pad, resize, to_tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llama.modeling_llama import rotate_half
from transformers.utils import logging as transformers_logging
from trl import TrlParser


DATA_FILES = ["data/train-*-of-*.parquet", "scores/train-*-of-*.parquet"]
CARD_FACTS = ("size_categories", "configs", "dataset_info")  # the metadata of the card that every run replaces
CARD_BEGIN = "<!-- score_pairs.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what score_pairs.py wrote. -->"
IMAGE_ROWS = 20  # of the dataset with images: in a row group, and in memory at once
COMPARE = {"at least": operator.ge, "greater than": operator.gt, "at most": operator.le, "less than": operator.lt}
# What becomes of a pair; a label comes before prompt and images. In this order: names in statistics.json, and words.
TIE, UNLABELLED, BLANK, BAD, RANKED = range(5)
COUNTS = {"ties": "ties", "without_label": "without a label", "with_blank_prompt": "with a blank prompt"}
COUNTS |= {"with_bad_image": "with an image that does not decode", "ranked": "ranked"}
NEW_COLUMNS = {"score_0": "float64", "score_1": "float64", "quality": "float64", "quality_rank": "int64"}
# The rewards of which a range becomes [0, 1]; the others are standardised.
HPS = ("hpsv2", "hpsv2.1", "hpsv2_antialias", "hpsv2.1_antialias")
RANGES = dict.fromkeys([*HPS, "clipscore", "vqascore", "vqascore_vlm"], (0, 1))
RANGES |= {"imagereward": (-3, 3), "aesthetic": (0, 10)}


# Copied from build_synpic.flag
def flag(default, help: str, group: str | None = None, *, min=None, above=None, max=None, below=None, **options):
    """A field of the command line, with its range. `group`: the title in --help of the flags from here on."""
    help += "" if default in (None, list) else f" Default: {' '.join(default()) if callable(default) else default}."
    metadata = {"help": help, "group": group, "limits": dict(zip(COMPARE, (min, above, max, below))), **options}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


@dataclass
class ScriptArguments:
    dataset_name: str | None = flag(None, "Pairs: Hub id (streamed), folder, or .parquet / .jsonl file.", "Pairs")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    dataset_revision: str | None = flag(None, "Revision of the dataset on the Hub.")
    dataset_split: str = flag("train", "Split of the dataset.")
    winner_dir: str | None = flag(None, "Instead of a dataset: folder of preferred images, captions in .txt files.")
    loser_dir: str | None = flag(None, "Folder of the other images, with the same names.")
    prompt_column: str = flag("caption", "Column of the prompts.")
    image_0_column: str = flag("jpg_0", "First images: bytes, Image, or paths of files.")
    image_1_column: str = flag("jpg_1", "Second images, of the same kind.")
    label_0_column: str = flag("label_0", "1: first image preferred, 0: second, 0.5: tie. none: always the first.")
    has_label_column: str = flag("has_label", "Where this column exists and is false, a pair is unlabelled.")
    image_0_uid_column: str = flag("image_0_uid", "Id of the first image. Without it, ids are made from the content.")
    image_1_uid_column: str = flag("image_1_uid", "Id of the second image.")
    on_bad_image: str = flag("skip", "Broken images: skip their pairs, or fail.", choices=("skip", "fail"))
    reward: str = flag("hpsv2", "Name (see REWARD_MODELS), name=checkpoint or file.py:function.", "Quality")
    reward_batch_size: int = flag(32, "Images scored together.", min=1)
    # auto: as in the paper, for functions as standardize: over the dataset, cut at 3 deviations; none: is in [0, 1].
    normalization: str = flag("auto", "How a reward becomes ψ.", choices="auto standardize softmax none".split())
    top_fraction: float = flag(1.0, "Share of the ranked pairs to keep, the best.", above=0, max=1)
    output_dir: str = flag("outputs/qsd", "Folder for the dataset, figures, card, and the shards in work/.", "Work")
    include_images: bool = flag(False, "Write, and push, the images too, not only other columns.")
    num_examples: int = flag(5, "With --include_images, best and worst pairs to show on the card.", min=0)
    shard_size: int = flag(512, "Pairs per shard of work: what a crash can lose.", min=1)
    stages: list[str] = flag(lambda: ["score", "sort"], "Stages to run.", choices=("score", "sort"))
    task_index: int = flag(0, "Which of --num_tasks this is, from 0, e.g. $SLURM_ARRAY_TASK_ID.", min=0)
    num_tasks: int = flag(1, "Score as one of N independent tasks.", min=1)
    push_to_hub: bool = flag(False, "Upload the dataset.")
    hub_dataset_id: str | None = flag(None, "Dataset repository: user/name.")
    hub_private_repo: bool = flag(False, "Make a new repository private.")

    def __post_init__(self):
        one_image = re.match("(aesthetic|vqascore|vqascore_vlm)(=|$)", self.reward) and self.normalization == "softmax"
        for wrong, problem in (
            (self.task_index >= self.num_tasks, f"--task_index {self.task_index}: must be less than --num_tasks"),
            (self.num_tasks > 1 and self.stages == ["sort"], "--stages sort needs --num_tasks 1, after all tasks"),
            ((self.winner_dir is None) != (self.loser_dir is None), "--winner_dir and --loser_dir belong together"),
            ((self.dataset_name is None) == (self.winner_dir is None), "give either --dataset_name or --winner_dir"),
            (self.push_to_hub and not self.hub_dataset_id, "--push_to_hub needs --hub_dataset_id user/name"),
            (one_image, f"--normalization softmax: {self.reward} does not compare two images: choose another"),
        ):
            if wrong:
                raise SystemExit(problem)
        self.where = f"--dataset_name {self.dataset_name}" if self.dataset_name else f"--winner_dir {self.winner_dir}"
        # The folder that relative paths of images start from.
        name = self.dataset_name or os.path.commonpath(map(os.path.realpath, (self.winner_dir, self.loser_dir)))
        self.root = os.path.dirname(name) if os.path.isfile(name) else name if os.path.isdir(name) else ""


# Quality --------------------------------------------------------------------------------------------------------------
def pair_quality(p_w: np.ndarray, p_l: np.ndarray) -> np.ndarray:
    """Q = ψ(winner) · (1 − ψ(loser)) (DPO-QSD, equation 1). p_w, p_l: float (n,) in [0, 1]. Returns float64 (n,)."""
    return np.asarray(p_w, dtype=np.float64) * (1.0 - np.asarray(p_l, dtype=np.float64))


def preference_score(reward: str, normalization: str, rewards: np.ndarray, mean: float, std: float) -> np.ndarray:
    """ψ in [0, 1] of raw rewards, float64 (n, 2), by their range, or by mean and std of all (DPO-QSD, 3.2 and 5.2)."""
    rewards, kind = np.asarray(rewards, dtype=np.float64), reward.partition("=")[0]
    if normalization == "softmax":
        # CLIP's temperature is 0.01, and CLIPScore is 2.5 cosines. The other models' scores are logits already.
        scale = 100 if kind in HPS else 40 if kind == "clipscore" else 1
        logits = scale * (rewards - rewards[:, ::-1])
        return 0.5 * (1 + np.tanh(logits / 2))  # the sigmoid, without overflow
    if normalization == "none":
        if wrong := rewards[(rewards < 0) | (rewards > 1)].tolist():
            raise SystemExit(f"--normalization none: {reward} must be in [0, 1], not {wrong[0]:.4g}: try standardize")
        return rewards
    if normalization == "auto" and kind in RANGES:
        low, high = RANGES[kind]
    else:
        rewards, low, high = (rewards - mean) / std, -3, 3
    return (rewards.clip(low, high) - low) / (high - low)


# Stages: score, rank, write -------------------------------------------------------------------------------------------
def main(args: ScriptArguments) -> None:
    transformers_logging.disable_progress_bar()
    # Without a GPU several processes talk through gloo. The first to finish its share may wait hours for the last.
    several = {"cpu": not torch.cuda.is_available(), "timeout": timedelta(days=1)}
    state = PartialState(**(several if "LOCAL_RANK" in os.environ else {}))
    _lock = begin_run(args) if state.is_main_process else None  # held until the end of this function
    state.wait_for_everyone()
    pairs = Pairs(args)
    if "score" in args.stages:
        score(args, pairs, state)
        state.wait_for_everyone()
    if args.num_tasks > 1:
        state.print(
            f"task {args.task_index} is done. After all: the same with --task_index 0 --num_tasks 1 --stages sort"
        )
    elif state.is_main_process and "sort" in args.stages:
        ranking = rank_pairs(args, pairs)
        write_dataset(args, pairs, ranking)
        shutil.rmtree(Path(args.output_dir, "work", "building"), ignore_errors=True)  # also of a killed run
        draw_figures(args, pairs, ranking)
        write_card(args, pairs, ranking)
        if args.push_to_hub:
            data = DATA_FILES if args.include_images else DATA_FILES[1:]
            publish(args, ["README.md", "statistics.json", "figures/*.png", *data])
        data = "" if args.include_images else f"{args.dataset_name} --scores_dataset_name "
        then = f"train on them: train_dpo_qsd.py --dataset_name {data}{args.output_dir}"
        print(f"{ranking.summary}; the best {ranking.kept} of them, sorted, in {args.output_dir}; {then}")


def score(args: ScriptArguments, pairs: "Pairs", state: PartialState) -> None:
    """Scores the missing shards. Each process of each task takes consecutive ones, and reads only its own part."""
    own = np.array_split(np.arange(len(pairs.shards)), args.num_tasks)[args.task_index]
    own = np.array_split(own, state.num_processes)[state.process_index]
    missing = [pairs.shards[i] for i in own if not is_scored(pairs.shards[i])]
    if not missing:
        return
    reward = load_reward_model(args.reward, state.device, batch_size=args.reward_batch_size)
    total, hidden = sum(shard.rows for shard in missing), not state.is_local_main_process
    with tqdm(total=total, desc=f"score {reward_name(args.reward)}", unit="pair", disable=hidden) as bar:
        for shard, work in read_ahead(read_to_score(args, pairs, missing)):
            score_shard(args, pairs, reward, shard, work)
            bar.update(shard.rows)


def score_shard(args: ScriptArguments, pairs: "Pairs", reward: "RewardModel", shard: "Shard", work: "Work") -> None:
    """Writes a shard's rows without images, with both rewards: NaN if the pair is not ranked or it does not decode."""
    bad, errors = {}, []
    scores = np.array([*reward.score(work.images, work.prompts, bad=bad), np.nan], dtype=np.float32)
    for number, reason in sorted(bad.items()):
        row, side = np.argwhere(work.places == number)[0].tolist()
        where = f"row {shard.start + row} of file {shard.file}: {pairs.images[side]}"
        errors.append(f"{where}: {reason if work.images[number] else 'no such file, or an empty one'}")
        if args.on_bad_image == "fail":
            raise SystemExit(f"{args.where}: {errors[0]}; --on_bad_image skip leaves its pairs out")
        tqdm.write(f"skipped: {errors[-1]}", file=sys.stderr)
    if args.normalization == "none":  # what is no probability is refused now, not after all shards
        preference_score(args.reward, "none", scores[np.isfinite(scores)], 0, 1)
    table = pa.Table.from_pylist(work.rows, schema=pairs.schema)
    for side in (0, 1):
        table = table.append_column(f"_reward_{side}", pa.array(scores[work.places[:, side]]))  # −1: the NaN at the end
    too_long = sum(work.prompts[place] in reward.cut for place in work.places[:, 0] if place >= 0)
    write_tables(iter([table]), shard.scores, {"files": work.files, "errors": errors, "cut": too_long}, len(table))


# The ranked pairs without images, best first; how many to keep; statistics.json; for the card the counts in words, bad
# images, prompts that are too long, and a hash of the kept pairs, their order and ψ; a key of what made them.
Ranking = namedtuple("Ranking", "table kept statistics summary errors cut hash key")


def rank_pairs(args: ScriptArguments, pairs: "Pairs") -> Ranking:
    """Computes Q of every ranked pair, and the order. Reads no images."""
    files = [shard.scores for shard in pairs.shards]
    if "score" not in args.stages and (missing := sum(not is_scored(shard) for shard in pairs.shards)):
        raise SystemExit(f"{args.output_dir}: {missing} of {len(files)} shards lack scores: run the score stage first")
    for leftover in [*Path(args.output_dir).rglob(".*.tmp")]:  # of runs that were killed; all tasks have ended
        leftover.unlink()
    facts, table = [shard_facts(file) for file in files], pa.concat_tables(map(pq.read_table, files))
    errors = [error for shard in facts for error in shard["errors"]]
    if errors and args.on_bad_image == "fail":
        raise SystemExit(f"{args.where}: {errors[0]}; --on_bad_image skip leaves its pairs out")
    rewards = np.stack([table[f"_reward_{side}"].to_numpy() for side in (0, 1)], axis=1).astype(np.float64)
    status = table["_status"].to_numpy()
    status = np.where(np.isnan(rewards).any(axis=1) & (status == RANKED), BAD, status)
    counts = dict(zip(COUNTS, np.bincount(status, minlength=len(COUNTS)).tolist()))
    summary = f"{len(table)} pairs: {', '.join(f'{counts[name]} {words}' for name, words in COUNTS.items())}"
    kept = round(args.top_fraction * counts["ranked"])
    if kept == 0:
        raise SystemExit(f"{args.where}: --top_fraction {args.top_fraction} keeps none of {summary}")
    row = np.flatnonzero(status == RANKED)
    rewards, winner = rewards[row], table["_winner"].to_numpy()[row]
    mean, std = float(rewards.mean()), float(rewards.std())
    if not std > 0:
        raise SystemExit(f"reward {args.reward}: gives every image the same score, {mean:g}: it cannot rank the pairs")
    psi = preference_score(args.reward, args.normalization, rewards, mean, std)
    won, lost = np.where(winner == 0, psi.T, psi.T[::-1])
    quality = pair_quality(won, lost)
    order = np.argsort(-quality, kind="stable")  # pairs of equal quality stay in the dataset's order
    row, psi = row[order], psi[order]
    added = [*psi.T, quality[order], np.arange(len(row)) + 1, row, (won - lost)[order]]
    columns = dict(zip(table.column_names, table.take(row).columns))
    table = pa.table(columns | dict(zip([*NEW_COLUMNS, "_row", "_difference"], added)))
    statistics = {"reward": reward_settings(args.reward), "normalization": args.normalization, "mean": mean, "std": std}
    statistics |= {"rows": sum(counts.values()), **counts, "kept": kept}
    made = content_hash(np.concatenate([row[:kept].astype(float), psi[:kept].ravel()]).tobytes())
    key = short_hash(json.dumps([made, statistics["reward"], pairs.identity, [shard["files"] for shard in facts]]))
    return Ranking(table, kept, statistics, summary, errors, sum(shard["cut"] for shard in facts), made, key)


def write_dataset(args: ScriptArguments, pairs: "Pairs", ranking: Ranking) -> None:
    """Writes the kept pairs, best first, unless an earlier run has written the same. The folders are built in
    work/building, where complete files outlive a crash, and take their places when all are whole."""
    output_dir, key = Path(args.output_dir), short_hash(f"{ranking.key} {args.include_images}")
    # At most 120 files with images and as many without: one commit takes them all.
    size = max(500, math.ceil(ranking.kept / 120)) if args.include_images else 100_000
    parts = list(batches(ranking.table[: ranking.kept], size))
    names = [f"train-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    folders = dict(pairs.configurations.values())
    wanted = {f"{folder}/{name}": {"key": key} for folder in folders for name in names}
    if wanted == {str(file.relative_to(output_dir)): shard_facts(file) for file in output_dir.glob("*/*.parquet")}:
        return
    building = output_dir / "work" / "building" / key
    for other in {*building.parent.glob("*")} - {building}:  # of another run that was killed
        shutil.rmtree(other)
    if args.include_images:
        copy_images(args, pairs, ranking, building / "images")
    for folder, (name, part) in itertools.product(folders, zip(names, parts)):
        if not (file := building / folder / name).exists():
            schema = folders[folder].arrow_schema
            tables = with_images(args, ranking, part, building / "images") if folder == "data" else [part]
            tables = (table.select(schema.names).cast(schema) for table in tables)
            write_tables(tables, file, {"key": key}, IMAGE_ROWS if folder == "data" else 1000)
    for folder in ("data", "scores"):  # data/ of an earlier run with images would not fit this one
        shutil.rmtree(output_dir / folder, ignore_errors=True)
        if folder in folders:
            os.rename(building / folder, output_dir / folder)


def copy_images(args: ScriptArguments, pairs: "Pairs", ranking: Ranking, folder: Path) -> None:
    """In one pass over the dataset, copies the images of the kept pairs, in the dataset's order, into files of
    `shard_size` pairs. One that exists is done. Refuses a pair that is not the one that was scored."""
    known = [args.prompt_column, *pairs.uids]
    kept = ranking.table[: ranking.kept].select(["_row", *known]).sort_by("_row")
    files = {folder / f"{number}.arrow": part for number, part in enumerate(batches(kept, args.shard_size))}
    missing = {file: part.to_pylist() for file, part in files.items() if not file.exists()}
    wanted = [row["_row"] for rows in missing.values() for row in rows]
    stream = iter(tqdm(read_rows(pairs, wanted), total=len(wanted), desc="sort", unit="pair", disable=not wanted))
    schema = pa.schema([pairs.configurations["default"][1].arrow_schema.field(name) for name in pairs.images])
    for file, rows in missing.items():
        with replacing(file) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            for row, (number, found) in zip(rows, stream):
                light = pairs.without_images(found)
                if any(light[name] != row[name] for name in known):
                    raise SystemExit(f"{args.where}: row {number} is not what was scored: choose another --output_dir")
                images = {name: pairs.image_of(found[name]) for name in pairs.images}
                images |= {name: found[name] for name in pairs.images if isinstance(found[name], bytes)}
                writer.write_batch(pa.RecordBatch.from_pylist([images], schema))


def with_images(args: ScriptArguments, ranking: Ranking, part: pa.Table, folder: Path) -> Iterator[pa.Table]:
    """The rows of one output file with their images, a few at a time: one column of all would overflow beyond 2 GiB."""
    kept = np.sort(ranking.table["_row"].to_numpy()[: ranking.kept])
    for few in batches(part, IMAGE_ROWS):
        places = zip(*np.divmod(np.searchsorted(kept, few["_row"].to_numpy()), args.shard_size))
        files = ((pa.ipc.open_file(pa.memory_map(f"{folder}/{file}.arrow")), batch) for file, batch in places)
        images = pa.Table.from_batches([file.get_batch(batch) for file, batch in files])
        yield pa.table(dict(zip(few.column_names, few.columns)) | dict(zip(images.column_names, images.columns)))


# Start ----------------------------------------------------------------------------------------------------------------
def begin_run(args: ScriptArguments) -> FileLock:
    """Checks what can be checked before a model is loaded, records what the work is made of, and locks the folder."""
    output_dir, work = Path(args.output_dir), Path(args.output_dir, "work")
    check_rewards([args.reward])
    if not (work / "settings.json").exists() and any(p != work and not is_hidden(p.name) for p in output_dir.glob("*")):
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    if args.dataset_name and output_dir.resolve().is_relative_to(Path(args.dataset_name).resolve()):
        raise SystemExit(f"--output_dir {output_dir} is inside the dataset: choose another folder")
    stream = plan_stream(args, work / "stream.json")
    says = re.compile("dataset_|winner_|loser_|.*_column$|shard_size").match  # the flags that say what a shard holds
    made_of = {name: vars(args)[name] for name in filter(says, vars(args))} | {"files": stream["identity"]}
    scores = work / "scores" / reward_name(args.reward)
    files = {work / "settings.json": made_of, scores / "settings.json": reward_settings(args.reward)}
    for file, wanted in files.items():
        earlier = json.loads(file.read_text()) if file.exists() else wanted
        for name in earlier | wanted:
            if earlier.get(name) != wanted.get(name):
                problem = f"{file.parent} was made with {name} {earlier.get(name)}, not {wanted.get(name)}"
                raise SystemExit(f"{problem}: choose another --output_dir, or delete that folder")
    earlier_card(args)
    if args.push_to_hub and args.num_tasks == 1 and "sort" in args.stages:  # a wrong token or name fails now
        prepare_repository(args)
    lock = lock_folder(args)
    for file, content in {**files, work / "stream.json": stream}.items():
        write_bytes(file, json.dumps(content, indent=1).encode())
    return lock


# Copied from build_synpic.lock_folder
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


def plan_stream(args: ScriptArguments, file: Path) -> dict:
    """The files of the dataset, the rows of their row groups, the columns, and an identity by which data that has
    changed is found out. Checks columns and labels. Of the Hub it is made once, of local data at every start."""
    try:
        if args.dataset_name and not os.path.exists(args.dataset_name):
            # The commit, so that a run that goes on after a crash reads the same data.
            args.dataset_revision = HfApi().dataset_info(args.dataset_name, revision=args.dataset_revision).sha
            if file.exists():  # settings.json, which was written before it, says of which commit it is
                return json.loads(file.read_text())
        names = stream_files(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{args.where}: cannot be read: {one_line(error)}") from None
    files = list(WORKERS.map(partial(inspect_file, args), range(len(names)), names))
    for found in files:
        if lacking := sorted({*files[0]["columns"]} - {*found["columns"]}):
            raise SystemExit(f"{args.where}: {found['file']} has no column {lacking[0]!r}, which {names[0]} has")
    if not any(sum(found["groups"]) for found in files):
        raise SystemExit(f"{args.where}: split {args.dataset_split!r} has no rows")
    return {"identity": short_hash(json.dumps([found["facts"] for found in files])), "files": files}


def inspect_file(args: ScriptArguments, number: int, file: str) -> dict:
    """Checks columns and labels of a Parquet file. Footer, labels and, of a local file, prompts tell if it changes."""
    system, path = url_to_fs(file)
    with system.open(path, cache_type="none") as handle, pq.ParquetFile(handle, pre_buffer=False) as parquet:
        features = Features.from_arrow_schema(parquet.schema_arrow)
        types = {field.name: str(field.type) for field in features.arrow_schema}
        labels = [args.label_0_column] * (args.label_0_column != "none")
        labels += [args.has_label_column] * (args.has_label_column in types)
        image = ("bytes, Image or paths", "(large_)?(binary|string)$|struct<bytes: ")
        kinds = [(name, "numbers", "u?int|halffloat|float|double|bool|null") for name in labels]
        kinds += [(args.prompt_column, "text", "(large_)?string$")]
        kinds += [(args.image_0_column, *image), (args.image_1_column, *image)]
        for name, what, kind in kinds:
            if not re.match(kind, found := types.get(name, "absent")):
                raise SystemExit(f"{args.where}: column {name!r} is {found}, not {what}; it has {', '.join(types)}")
        table = parquet.read(labels if "://" in file else [*labels, args.prompt_column], use_threads=False)
        parquet.metadata.write_metadata_file(footer := BytesIO())
        groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    for row, values in enumerate(table.to_pylist()):
        label = pair_label(args, values)
        if not (math.isnan(label) or label in (0, 0.5, 1)):
            raise SystemExit(f"{args.where}: row {row} of file {number}: label {label} is not 0, 0.5 or 1")
    facts = [short_hash(footer.getvalue()), short_hash(json.dumps(table.to_pydict()))]
    return {"file": file, "groups": groups, "columns": features.to_dict(), "facts": facts}


def stream_files(args: ScriptArguments) -> list[str]:
    """The Parquet files of the pairs, where they lie, locally or on the Hub. Two folders, JSON and other formats that
    `datasets` knows, save_to_disk's included, are copied, once, into a Parquet file in work/datasets."""
    name, split, rows = args.dataset_name or "", args.dataset_split, []
    options = {"name": args.dataset_config_name, "revision": args.dataset_revision}
    if os.path.isfile(name) and name.endswith(".parquet"):
        return [name]
    if os.path.isfile(name) and not name.endswith((".jsonl", ".json")):
        raise ValueError("a file must be .parquet, .jsonl or .json")
    with plain_path(name) as path, TemporaryDirectory() as cache:
        if args.winner_dir:
            rows = folder_pairs(args)
            read = partial(Dataset.from_list, rows)
        elif saved := [folder for folder in (path, f"{path}/{split}") if os.path.exists(f"{folder}/state.json")]:
            read = partial(load_from_disk, saved[0])
        else:
            where = {"path": "json", "data_files": {split: path}} if os.path.isfile(name) else {"path": path, **options}
            found = load_dataset_builder(**where).config.data_files or {}
            if found and split not in found:
                raise ValueError(f"no split {split!r}; it has {', '.join(map(str, found))}")
            files = [str(file) for file in found.get(split, [])]
            if files and all(file.endswith(".parquet") for file in files):
                return [file.replace(f"{path}/", f"{name}/") for file in files]
            read = partial(load_dataset, **where, split=split, cache_dir=cache)
        source = rows or [[str(file), file_facts(file)] for file in [Path(name), *sorted(Path(name).rglob("*"))]]
        copy = Path(args.output_dir, "work", "datasets", f"{short_hash(json.dumps([source, options, split]))}.parquet")
        if not copy.exists():
            with replacing(copy) as temporary:
                read().to_parquet(temporary)
    return [str(copy)]


def folder_pairs(args: ScriptArguments) -> list[dict]:
    """Pairs of images of the same name in two folders, as paths; captions from text files beside the winners."""
    winners, losers = pictures_of(args.winner_dir), pictures_of(args.loser_dir)
    if alone := sorted({*winners} ^ {*losers}):
        raise ValueError(f"{len(alone)} images are in only one of the two folders: {', '.join(alone[:5])}")
    rows, columns = [], (args.prompt_column, args.image_0_column, args.image_1_column, args.label_0_column)
    for stem, winner in winners.items():
        text = winner.with_suffix(".txt").read_bytes()
        is_utf16 = text[:2] in (b"\xff\xfe", b"\xfe\xff")  # as Windows saves "Unicode"
        caption = text.decode("utf-16" if is_utf16 else "utf-8-sig").strip()
        paths = [os.path.relpath(file.resolve(), args.root) for file in (winner, losers[stem])]
        rows.append(dict(zip(columns, (caption, *paths, 1.0))))
    return rows


def pictures_of(folder: str) -> dict[str, Path]:
    """Name without ending → file, of all that Pillow opens. Names all else but captions and hidden files."""
    endings = {ending for ending, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    pictures, others = {}, []
    files = [file for file in Path(folder).iterdir() if not is_hidden(file.name) and file.suffix.lower() != ".txt"]
    for file in sorted(files):
        try:
            if file.is_dir() or file.suffix.lower() not in endings:
                PILImage.open(file)
            if pictures.setdefault(file.stem, file) != file:
                raise ValueError(f"{file} and {pictures[file.stem]} have the same name: remove one")
        except OSError:
            others.append(file.name)
    if others:
        print(f"{folder}: {len(others)} are no pictures, left out: {', '.join(others[:9])}", file=sys.stderr)
    if not pictures:
        raise ValueError(f"no pictures in {folder}")
    return pictures


# The stream of pairs --------------------------------------------------------------------------------------------------
# Rows of a file: its number, the first row there, how many, and the first row in the dataset; the file of their scores.
Shard = namedtuple("Shard", "file start rows first scores")
# What is read of a shard: its rows without images; each distinct image and prompt of its ranked pairs, and the places
# of each row's two among them, or −1; the files that hold images, with size and date.
Work = namedtuple("Work", "rows images prompts places files")


class Pairs:
    """The dataset of pairs: its files, its shards, and which of its columns hold what."""

    def __init__(self, args: ScriptArguments):
        stream = json.loads(Path(args.output_dir, "work", "stream.json").read_text())
        folder = Path(args.output_dir, "work", "scores", reward_name(args.reward))
        self.files, self.identity, self.root = stream["files"], stream["identity"], args.root
        self.images = [args.image_0_column, args.image_1_column]
        self.uids = [args.image_0_uid_column, args.image_1_uid_column]
        features = Features.from_dict(self.files[0]["columns"])
        types = {field.name: str(field.type) for field in features.arrow_schema}
        # The columns without images, which are read together with them, and ids, which are made where there are none.
        self.read = [name for name in types if "binary" not in types[name]]
        light = {name: features.get(name, Value("string")) for name in [*self.read, *self.uids]}
        self.schema = Features(light | {name: Value("int8") for name in ("_status", "_winner")}).arrow_schema
        # Of each configuration of the dataset its folder and its columns. Images replace paths of images.
        images = {name: features[name] if types[name].endswith("binary") else Image() for name in self.images}
        added = {name: Value(kind) for name, kind in NEW_COLUMNS.items()}
        self.configurations = {"default": ("data", Features(light | images | added))} if args.include_images else {}
        self.configurations["scores"] = ("scores", Features(light | added))
        self.shards, first = [], 0
        for file, groups in enumerate(found["groups"] for found in self.files):
            for number, start in enumerate(range(0, sum(groups), args.shard_size)):
                rows, scores = min(args.shard_size, sum(groups) - start), f"{file:05d}-{number:05d}.parquet"
                self.shards.append(Shard(file, start, rows, first, folder / scores))
                first += rows

    def path_of(self, value) -> Path | None:
        """The file of an image that the dataset only names."""
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else None
        return Path(self.root, value) if isinstance(value, str) and value else None

    def image_of(self, value) -> dict:
        """An image, from any kind of column, as an Image with its file's bytes: none if there is no such file."""
        if file := self.path_of(value):  # any trouble with it but its absence ends the run
            return {"bytes": file.read_bytes() if file.is_file() else b"", "path": file.name}
        image = value if isinstance(value, dict) else {"bytes": value, "path": None}
        return {"bytes": image["bytes"] or b"", "path": image["path"] and os.path.basename(image["path"])}

    def without_images(self, row: dict) -> dict:
        """A row without images. Ids that it lacks are made of content; in a column of paths of path, size, date."""
        light = {name: row[name] for name in self.read}
        for value, uid in zip((row[name] for name in self.images), self.uids):
            if uid not in light and isinstance(value, str) and value:
                facts = file_facts(self.path_of(value))
                light[uid] = content_hash(f"{value}|{facts and (*facts,)}")
            elif uid not in light:
                light[uid] = content_hash(self.image_of(value)["bytes"])
        return light


def read_rows(pairs: Pairs, wanted: list[int]) -> Iterator[tuple[int, dict]]:
    """Yields these rows in order. Reads only row groups that hold one: of a column 16 MB at once, decoded 16 rows."""
    wanted, columns, end = set(wanted), list(dict.fromkeys([*pairs.read, *pairs.images])), 0
    for part in pairs.files:
        groups = {}
        for group, rows in enumerate(part["groups"]):
            if not wanted.isdisjoint(range(end, end + rows)):
                groups[group] = range(end, end + rows)
            end += rows
        if not groups:
            continue
        system, path = url_to_fs(part["file"])
        options = {"pre_buffer": False, "buffer_size": 2**24}
        with system.open(path, cache_type="none") as handle, pq.ParquetFile(handle, **options) as parquet:
            numbers = itertools.chain.from_iterable(groups.values())
            for batch in parquet.iter_batches(16, list(groups), columns, use_threads=False):
                for place, row in zip(range(len(batch)), numbers):
                    if row in wanted:
                        yield row, batch.slice(place, 1).to_pylist()[0]


def read_to_score(args: ScriptArguments, pairs: Pairs, shards: list[Shard]) -> Iterator[tuple[Shard, Work]]:
    """Yields each shard with the work on it."""
    stream = read_rows(pairs, [row for shard in shards for row in range(shard.first, shard.first + shard.rows)])
    for shard in shards:
        rows, images, files, known, places = [], [], {}, {}, np.full((shard.rows, 2), -1)
        for number, (_, found) in enumerate(itertools.islice(stream, shard.rows)):
            row = pairs.without_images(found)
            label, prompt = pair_label(args, row), row[args.prompt_column]
            blank = not (prompt or "").strip()
            status = UNLABELLED if math.isnan(label) else TIE if label == 0.5 else BLANK if blank else RANKED
            rows.append(row | {"_status": status, "_winner": int(label != 1)})
            for side in (0, 1) if status == RANKED else ():
                value = found[pairs.images[side]]
                if path := pairs.path_of(value):
                    files[str(path)] = file_facts(path)  # before it is read
                uid = row[pairs.uids[side]] or f"row {number}, {side}"
                places[number, side] = known.setdefault((uid, prompt), len(known))
                if places[number, side] == len(images):
                    images.append(pairs.image_of(value)["bytes"])
        yield shard, Work(rows, images, [prompt for _, prompt in known], places, files)


# Copied from train_rankdpo_sdxl.read_ahead
def read_ahead(items: Iterator) -> Iterator:
    """The same items. A thread reads the next one while the caller works with this one."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, items, None)
            yield item


def pair_label(args: ScriptArguments, row: dict) -> float:
    """1, 0 or 0.5; NaN where a pair has no label."""
    label = 1.0 if args.label_0_column == "none" else row[args.label_0_column]
    return float(label) if label is not None and row.get(args.has_label_column, True) else math.nan


def file_facts(path: Path) -> list[int] | None:
    """Size and date of a file, which tell images that were drawn anew; None if there is none."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


def content_hash(content: str | bytes) -> str:
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=16).hexdigest()


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


# Copied from build_synpic.shard_facts
def shard_facts(file: Path) -> dict:
    """What was recorded with a file; {} if there is none, or it is no whole file."""
    try:
        return json.loads(pq.read_metadata(file).metadata[b"synpic"])
    except (FileNotFoundError, pa.ArrowInvalid):
        return {}


def is_scored(shard: Shard) -> bool:
    """Whether a shard has its scores, and the files that it names have not been drawn anew."""
    files = shard_facts(shard.scores).get("files")
    return files is not None and all(file_facts(Path(path)) == facts for path, facts in files.items())


# Figures and card -----------------------------------------------------------------------------------------------------
def draw_figures(args: ScriptArguments, pairs: Pairs, ranking: Ranking) -> None:
    """Figures 1a and 1b of the paper: the distribution of ψ_w − ψ_l, and Q over the ranks; the best and worst pairs."""
    title, quality = f"reward: {reward_name(args.reward)}", ranking.table["quality"].to_numpy()
    bars, curve = (Figure(figsize=(6, 4), dpi=100, layout="tight").subplots() for _ in range(2))
    bars.hist(ranking.table["_difference"].to_numpy(), bins=100, color="tab:blue")
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set(title=title, xlabel="ψ(winner) − ψ(loser)", ylabel="number of pairs")
    positions = np.unique(np.linspace(0, len(quality) - 1, 2000).astype(int))
    curve.plot(positions + 1, quality[positions], color="tab:blue")
    curve.axvspan(0, ranking.kept, color="tab:green", alpha=0.2, label=f"kept: {ranking.kept}")
    curve.set(title=title, xlabel="rank of the pair", ylabel="quality Q")
    curve.legend()
    pictures = {"difference": bars.figure.savefig, "quality": curve.figure.savefig}
    if args.include_images and (count := min(args.num_examples, ranking.kept)):
        pictures["best"] = draw_examples(args, pairs, range(count)).save
        pictures["worst"] = draw_examples(args, pairs, range(ranking.kept - 1, ranking.kept - 1 - count, -1)).save
    shutil.rmtree(Path(args.output_dir, "figures"), ignore_errors=True)
    for name, save in pictures.items():
        with replacing(Path(args.output_dir, "figures", f"{name}.png")) as file:
            save(file, format="png")


def draw_examples(args: ScriptArguments, pairs: Pairs, rows: range, cell: int = 224) -> PILImage.Image:
    """A strip of rows of the dataset: winners above, losers below, in squares of `cell` pixels."""
    files = sorted(Path(args.output_dir, "data").glob("*.parquet"))
    size = pq.read_metadata(files[0]).num_rows
    places = [(row // size, *divmod(row % size, IMAGE_ROWS)) for row in rows]
    groups = {key: pq.ParquetFile(files[key[0]]).read_row_group(key[1]) for key in {place[:2] for place in places}}
    canvas = PILImage.new("RGB", (cell * len(rows), 2 * cell + 22), "white")
    drawing = ImageDraw.Draw(canvas)
    for left, (file, group, place) in zip(range(0, canvas.width, cell), places):
        row = groups[file, group].slice(place, 1).to_pylist()[0]
        for top, is_winner in ((0, True), (cell, False)):
            name = pairs.images[(pair_label(args, row) == 1) ^ is_winner]
            image = decode_image(pairs.image_of(row[name])["bytes"]).convert("RGB")
            resample = PILImage.NEAREST if max(image.size) < cell else PILImage.LANCZOS
            size = [max(1, round(length * (cell / max(image.size)))) for length in image.size]
            canvas.paste(image.resize(size, resample), (left, top))
        drawing.text((left + 4, 2 * cell + 5), row[args.prompt_column][: cell // 7], fill="black")
    return canvas


def write_card(args: ScriptArguments, pairs: Pairs, ranking: Ranking) -> None:
    """Writes README.md and statistics.json."""
    output_dir, facts = Path(args.output_dir), ranking.statistics
    title, source = output_dir.resolve().name, args.dataset_name or f"{args.winner_dir} and {args.loser_dir}"
    quality, shares = ranking.table["quality"].to_numpy(), (0, 0.01, 0.0533, 0.1, 0.25, 0.5, 0.75, 1)
    contradicted = (ranking.table["_difference"].to_numpy() <= 0).mean()
    quality_at = ", ".join(f"{quality[round(share * (len(quality) - 1))]:.4f}" for share in shares)
    images, figures = "", {"difference": "Distribution of ψ(winner) − ψ(loser)", "quality": "Q over the sorted pairs"}
    if not args.include_images:
        images = f" The images are not in it: join them from `{source}` by `{pairs.uids[0]}` and `{pairs.uids[1]}`"
        is_hash = pairs.uids[0] not in pairs.read and pairs.images[0] not in pairs.read
        images += " (BLAKE2b of the image's file, 16 bytes in hexadecimal)." if is_hash else "."
    elif args.num_examples:
        figures |= {"best": "The best pairs, winners above losers", "worst": "The worst pairs that were kept"}
    figures = "\n\n".join(f"{text}:\n\n![{text}](figures/{file}.png)" for file, text in figures.items())
    remarks = [f"\n- {error}" for error in ranking.errors[:20]]
    if ranking.cut:
        remarks.append(f"\n\nOf {ranking.cut} pairs the reward model reads only the beginning of the prompt.")
        warn(remarks[-1].strip())
    rows = [[words if key == "ranked" else f"{words}, left out", facts[key]] for key, words in COUNTS.items()]
    rows = [["rows read", facts["rows"]], *rows, [f"kept (`--top_fraction {args.top_fraction:g}`)", ranking.kept]]
    commit = f", pairs at commit {args.dataset_revision}" if args.dataset_revision else ""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets"))
    body = f"""# {title}

Preference pairs of `{source}`, sorted by their quality Q under a reward model: a Quality Sorted Dataset for
DPO-QSD. Row 1 is the best pair: train in this order, without shuffling.{images}

`score_0` and `score_1` are ψ of the first and the second image, in [0, 1], by {reward_name(args.reward)}. `quality` is
Q = ψ(winner) · (1 − ψ(loser)), and `quality_rank` is 1 for the best. All other columns are the original dataset's.

```python
from datasets import load_dataset

dataset = load_dataset("{args.hub_dataset_id or output_dir}", "{"default" if args.include_images else "scores"}", \
split="train")
```

## Pairs

{markdown_table(["", "pairs"], rows)}

In {contradicted:.1%} of the ranked pairs the reward model rates the loser at least as high as the
winner.{"".join(remarks)}

## Reward

ψ is made from {", ".join(f"{key} `{value}`" for key, value in facts["reward"].items())}, with
`--normalization {args.normalization}`. Over the images of all ranked pairs, the raw reward has mean {facts["mean"]:.6g}
and standard deviation {facts["std"]:.6g}.

Q at the first rank, at 1 %, 5.33 %, 10 %, 25 %, 50 % and 75 % of the ranks, and at the last: {quality_at}.

{figures}

## How it was made

Reward `{args.reward}`{commit}. {libraries}. Hash of pairs, order and ψ: {ranking.hash}.
"""
    front = {"pretty_name": title, "language": ["en"], "task_categories": ["text-to-image"]}
    front |= {"size_categories": [size_category(ranking.kept)], "tags": ["dpo-qsd", "preference", "dpo"]}
    if args.dataset_name and not os.path.exists(args.dataset_name):
        front["source_datasets"] = [args.dataset_name]
    write_dataset_card(args, front | config_metadata(output_dir, pairs.configurations), body)
    write_bytes(output_dir / "statistics.json", (json.dumps(facts, indent=2) + "\n").encode())


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
