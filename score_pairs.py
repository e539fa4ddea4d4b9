# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate", "datasets", "ftfy", "huggingface_hub", "matplotlib", "numpy", "pillow", "protobuf", "pyarrow",
#     "pyyaml", "safetensors", "sentencepiece", "torch", "torchvision", "tqdm", "transformers", "trl",
# ]
# ///
"""Scores preference pairs and sorts them by quality: the Quality Sorted Dataset of DPO-QSD.

A reward model gives each image a probability ψ of being preferred. A pair's quality is Q = ψ(winner) · (1 − ψ(loser)).
The paper reports better models from the best 5.33 % of the pairs, best first, than from all of them.

Pick-a-Pic from the Hub, streamed, with HPSv2 as in the paper:

    accelerate launch score_pairs.py --dataset_name liuhuohuo2/pick-a-pic-v2 --reward hpsv2 \
        --output_dir outputs/pickapic-qsd

Your own pairs, in a folder of Parquet files with other column names, where the first image is always the better one.
This keeps the best tenth with its images, and publishes it:

    python score_pairs.py --dataset_name my_pairs --prompt_column prompt --image_0_column chosen \
        --image_1_column rejected --label_0_column none --reward pickscore --top_fraction 0.1 --include_images \
        --output_dir outputs/my-qsd --push_to_hub --hub_dataset_id user/my-qsd

Two folders that hold images of the same names, with a caption in a text file beside each winner:

    python score_pairs.py --winner_dir pairs/better --loser_dir pairs/worse --output_dir outputs/folders-qsd

The work is cut into shards under `<output_dir>/work`. After a crash, run the same command again, on any number of
processes: it does only what is missing.
"""

import argparse
import ast
import errno
import fcntl
import gc
import hashlib
import html
import importlib.util
import inspect
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
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import UnionType
from typing import IO, Literal, Union, get_args, get_origin


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load ends without a traceback
# bitsandbytes warns at every start that an optional kernel is missing, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from accelerate import PartialState
from datasets import (
    Dataset,
    DatasetInfo,
    Features,
    Image,
    IterableDataset,
    SplitDict,
    SplitInfo,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets import config as datasets_config
from datasets.info import DatasetInfosDict
from huggingface_hub import CardData, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import get_session, parse_ratelimit_headers
from matplotlib.figure import Figure
from PIL import Image as PILImage
from PIL import ImageDraw
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, pad, resize, to_tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging
from trl import TrlParser


STAGES = ("score", "sort")
CARD_FACTS = ("size_categories", "configs", "dataset_info")  # keys of the front matter that every run writes again
CARD_BEGIN = "<!-- score_pairs.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what score_pairs.py wrote. -->"
RANKED, TIE, UNLABELLED = 0, 1, 2  # status of a pair
BINARY = ("binary", "large_binary")  # types of columns that hold the bytes of image files
NEW_COLUMNS = {"score_0": "float64", "score_1": "float64", "quality": "float64", "quality_rank": "int64"}


# For --normalization softmax: what turns the scores of a model into logits. CLIP's cosines have a temperature of 0.01.
# PickScore, MPS, ImageReward and your own functions give logits already; the others compare no two images.
LOGIT_SCALES = dict.fromkeys(("hpsv2", "hpsv2.1", "hpsv2_antialias", "hpsv2.1_antialias", "clipscore"), 100)
LOGIT_SCALES |= dict.fromkeys(("aesthetic", "vqascore", "vqascore_vlm"))


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


# Copied from build_synpic.flag
def flag(default, help: str, **metadata):
    """A field with its help, its range (see RANGES), `may_change`: whether a resumed run may set it differently, and
    `group`: the title of the flags from here on in --help."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, **metadata})


@dataclass
class ScriptArguments:
    dataset_name: str | None = flag(
        None, "Dataset of pairs: Hub id (streamed), folder, or .parquet / .jsonl file.", group="Pairs"
    )
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
    on_bad_image: Literal["skip", "fail"] = flag("skip", "Broken images: skip their pairs, or fail.", may_change=True)
    reward: str = flag(
        "hpsv2", f"{', '.join(REWARD_MODELS)}; name=checkpoint; file.py:function.", may_change=True, group="Quality"
    )
    reward_batch_size: int = flag(32, "Images scored together.", min=1, may_change=True)
    normalization: Literal["auto", "standardize", "softmax", "none"] = flag(
        "auto",
        "How a reward becomes ψ in [0, 1]. auto: as in the paper, standardize for your own functions; standardize: "
        "over the dataset, clipped at 3 deviations; softmax: the model's probability that it is the better of the two; "
        "none: it is a probability already.",
        may_change=True,
    )
    top_fraction: float = flag(1.0, "Share of the ranked pairs to keep, the best.", above=0, max=1, may_change=True)
    output_dir: str = flag(
        "outputs/qsd",
        "Folder for the dataset, figures, card, and shards of work.",
        may_change=True,
        group="Work and output",
    )
    include_images: bool = flag(False, "Write, and push, the images too, not only other columns.", may_change=True)
    num_examples: int = flag(5, "Best and worst pairs to show in pictures; 0: none.", min=0, may_change=True)
    shard_size: int = flag(512, "Pairs per shard of work: what a crash can lose.", min=1)
    stages: list[str] = flag(lambda: list(STAGES), "Stages to run.", choices=STAGES, may_change=True)
    task_index: str = flag("auto", "Which of --num_tasks this is, from 0. auto: the scheduler's.", may_change=True)
    num_tasks: str = flag("auto", "Score as one of N independent tasks. auto: the scheduler's, or 1.", may_change=True)
    push_to_hub: bool = flag(False, "Upload the dataset.", may_change=True)
    hub_dataset_id: str | None = flag(None, "Dataset repository: user/name.", may_change=True)
    hub_private_repo: bool = flag(False, "Make a new repository private.", may_change=True)

    def __post_init__(self):
        check_ranges(self)
        complete_task_flags(self, last=("sort",))
        if (self.winner_dir is None) != (self.loser_dir is None):
            raise SystemExit("--winner_dir and --loser_dir belong together")
        if (self.dataset_name is None) == (self.winner_dir is None):
            raise SystemExit("--dataset_name is missing: a Hub id, a folder or a file; or --winner_dir and --loser_dir")
        if self.push_to_hub and not self.hub_dataset_id:
            raise SystemExit("--push_to_hub needs --hub_dataset_id user/name")
        if self.normalization == "softmax" and LOGIT_SCALES.get(self.reward.partition("=")[0], 1) is None:
            raise SystemExit(f"--normalization softmax: {self.reward} does not compare two images: choose another")


# ----------------------------------------------------------------------------------------------------------------------
# Quality
# ----------------------------------------------------------------------------------------------------------------------


def pair_quality(p_w: np.ndarray, p_l: np.ndarray) -> np.ndarray:
    """Q = ψ(winner) · (1 − ψ(loser)) (DPO-QSD, equation 1).

    Args:
        p_w, p_l: float arrays (n,) in [0, 1].

    Returns:
        float64 array (n,) in [0, 1].
    """
    return np.asarray(p_w, dtype=np.float64) * (1.0 - np.asarray(p_l, dtype=np.float64))


def preference_score(reward: str, normalization: str, rewards: np.ndarray, mean: float, std: float) -> np.ndarray:
    """ψ in [0, 1] from raw rewards (DPO-QSD, sections 3.2 and 5.2).

    Args:
        reward: its name; normalization: auto, standardize, softmax or none.
        rewards: float array (n, 2), a pair a row; mean, std: of the rewards of all ranked pairs.

    Returns:
        float64 array of the same shape. Exits with one line if `none` finds a reward outside [0, 1].
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    kind = reward.partition("=")[0]
    if normalization == "auto":
        # The first condition excludes a user's file whose name starts like one of these rewards.
        if kind in REWARD_MODELS and kind.startswith(("hpsv2", "clipscore", "vqascore")):
            return rewards.clip(0, 1)
        if kind == "imagereward":
            return (rewards.clip(-3, 3) + 3) / 6
        if kind == "aesthetic":
            return (rewards / 10).clip(0, 1)
    if normalization == "softmax":
        logits = LOGIT_SCALES.get(kind, 1) * (rewards - rewards[:, ::-1])
        return 0.5 * (1 + np.tanh(logits / 2))  # the sigmoid, without overflow
    if normalization == "none":
        if rewards.size and not (rewards.min() >= 0 and rewards.max() <= 1):
            span = f"{rewards.min():.4g} to {rewards.max():.4g}"
            raise SystemExit(f"--normalization none: {reward} must be in [0, 1], but goes from {span}; try standardize")
        return rewards
    return (((rewards - mean) / std).clip(-3, 3) + 3) / 6


# ----------------------------------------------------------------------------------------------------------------------
# Stages: read, score, rank, write
# ----------------------------------------------------------------------------------------------------------------------


def index(args: ScriptArguments, pairs: "Pairs", state: PartialState) -> None:
    """Reads all rows once and checks their labels, before any model is loaded. Images are read only to make their ids
    where the dataset has none.

    Every task needs the index of all files. Tasks begin at different files, and pass over those that others finish."""
    missing = [file for file in index_order(args, pairs.num_files, state) if not is_indexed(args, file)]
    without_id = [image for image, uid in zip(pairs.images, pairs.uids) if uid not in pairs.features]
    columns = list(dict.fromkeys(pairs.light_columns + without_id))
    progress = progress_bar(desc="read pairs", unit="pair", disable=not (missing and state.is_local_main_process))
    for file in missing:
        if args.num_tasks > 1 and is_indexed(args, file):  # by another task, meanwhile
            continue
        with replacing(index_file(args, file)) as temporary:
            writer, rows_read = None, 0
            for table in pairs.tables(file, columns):
                new_columns = index_rows(args, pairs, table, file, rows_read)
                table = table.select([name for name in pairs.light_columns if name not in new_columns])
                for name, values in new_columns.items():
                    table = table.append_column(name, values)
                schema = table.schema.remove_metadata()
                writer = writer or pq.ParquetWriter(temporary, schema, write_page_checksum=True)
                writer.write_table(table.cast(writer.schema))
                rows_read += len(table)
                progress.update(len(table))
                stop_if_asked(f"nothing in {args.output_dir} is lost: the same command goes on")
            writer = writer or pq.ParquetWriter(temporary, pa.schema([]))  # the file has no rows
            writer.add_key_value_metadata({b"synpic": sealed({}, writer.schema, rows_read)})
            writer.close()
    progress.close()
    state.wait_for_everyone()


def score(args: ScriptArguments, pairs: "Pairs", shards: list[dict], state: PartialState) -> None:
    """Scores the missing shards. Each task, and in it each process, takes a run of consecutive shards, so it reads only
    its own part of the dataset."""
    write_settings(score_folder(args), reward_settings(args.reward))
    own = np.array_split(np.arange(len(shards)), args.num_tasks)[args.task_index]
    own = np.array_split(own, state.num_processes)[state.process_index]
    missing = [shards[i] for i in own if not is_scored(args, shards[i])]
    if missing:
        reward = load_reward_model(args.reward, state.device, batch_size=args.reward_batch_size)
        total = sum(len(shard["keys"]) for shard in missing)
        name, disable = reward_name(args.reward), not state.is_local_main_process
        progress = progress_bar(total=total, desc=f"score {name}", unit="image", disable=disable)
        with ThreadPoolExecutor(1) as pool:
            for shard, images, begun, prompts in one_ahead(shards_with_images(args, pairs, reward, missing), pool):
                score_shard(args, pairs, reward, shard, images, begun, prompts)
                progress.update(len(shard["keys"]))
        progress.close()
    state.wait_for_everyone()


def rank_pairs(args: ScriptArguments, pairs: "Pairs", shards: list[dict]) -> dict:
    """Computes Q of every ranked pair, and the order.

    Returns:
        of all n rows: "psi", float64 (n, 2), and "quality", float64 (n,), NaN where a pair is not ranked; "winner",
        0 or 1; "rank", 0 = best, −1 = not kept. "starts": the first row of each file, and n.
        "order": the ranked rows, best first; "difference": their ψ_w − ψ_l; "kept": how many of them to keep.
        "counts", "statistics", "errors" for the card, and "hash" of the kept pairs, their order and ψ.
    """
    table, starts = read_index(args, pairs, ["_status", "_winner", "_key_0", "_key_1"])
    status, winner = table["_status"].to_numpy(), table["_winner"].to_numpy()
    scored_keys, scores, errors = read_scores(args, pairs, shards)
    rewards = np.full((len(table), 2), np.nan)
    labelled = np.flatnonzero(status == RANKED)
    for side in (0, 1):
        keys = table[f"_key_{side}"].to_numpy()[labelled]
        rewards[labelled, side] = scores[np.searchsorted(scored_keys, keys)]
    ranked = np.flatnonzero(np.isfinite(rewards).all(axis=1))
    counts = {
        "rows": len(table),
        "ties": int((status == TIE).sum()),
        "without_label": int((status == UNLABELLED).sum()),
        "with_bad_image": len(labelled) - len(ranked),
        "ranked": len(ranked),
    }
    kept = round(args.top_fraction * len(ranked))
    if kept == 0:
        raise SystemExit(f"{pairs.where}: --top_fraction {args.top_fraction} keeps none of {describe(counts)}")
    mean, std = float(rewards[ranked].mean()), float(rewards[ranked].std())
    if not std > 0:
        raise SystemExit(f"reward {args.reward}: gives every image the same score, {mean:g}: it cannot rank the pairs")
    psi = np.full((len(table), 2), np.nan)
    psi[ranked] = preference_score(args.reward, args.normalization, rewards[ranked], mean, std)
    rows = np.arange(len(table))
    p_w, p_l = psi[rows, winner], psi[rows, 1 - winner]
    quality = pair_quality(p_w, p_l)
    order = ranked[np.argsort(-quality[ranked], kind="stable")]  # pairs of equal quality stay in the dataset's order
    rank = np.full(len(table), -1)
    rank[order[:kept]] = np.arange(kept)
    identity = np.concatenate([order[:kept].astype(float), psi[order[:kept]].ravel()])
    statistics = {"reward": reward_settings(args.reward), "normalization": args.normalization, "mean": mean, "std": std}
    return {
        "psi": psi,
        "quality": quality,
        "winner": winner,
        "rank": rank,
        "starts": starts,
        "order": order,
        "difference": (p_w - p_l)[order],
        "kept": kept,
        "counts": counts,
        "statistics": statistics,
        "errors": errors,
        "hash": content_hash(identity.tobytes(), 16).hex(),
    }


def write_dataset(args: ScriptArguments, pairs: "Pairs", ranking: dict, upload: "DatasetUpload") -> None:
    """Writes the kept pairs, best first, unless an earlier run has written the same.

    The sorting happens on disk, so memory holds one output file at most: each row first goes to the bucket of its
    output file, then each bucket is sorted.
    """
    output_dir, kept, folders = Path(args.output_dir), ranking["kept"], data_folders(args)
    # At most 120 files with images and as many without: one commit takes them all.
    rows_per_file = max(500, math.ceil(kept / 120)) if args.include_images else 100_000
    files = range(math.ceil(kept / rows_per_file))
    facts = {"pairs": ranking["hash"]}
    targets = {data_file(output_dir / folder, number, files) for folder in folders for number in files}
    stale = {*(output_dir / "scores").glob("*.parquet"), *(output_dir / "data").glob("*.parquet")} - targets
    if not stale and all(shard_facts(file) == facts and is_usable(file) for file in targets):
        (output_dir / UNFINISHED).unlink(missing_ok=True)
        return

    write_text(output_dir / UNFINISHED, "The dataset in this folder is not complete: see score_pairs.py.\n")
    buckets = output_dir / "work" / "buckets"
    buckets.mkdir(parents=True, exist_ok=True)
    # The figures show an earlier run, and the buckets are left from a run that was killed.
    for file in [*(output_dir / "figures").glob("*.png"), *buckets.iterdir()]:
        file.unlink()
    progress = progress_bar(total=kept, desc="sort", unit="pair")
    for file in range(pairs.num_files):
        for table in kept_rows(args, pairs, ranking, file):
            bucket_of_row = (table["quality_rank"].to_numpy() - 1) // rows_per_file
            for number in np.unique(bucket_of_row):
                bucket = buckets / f"{number}.arrow"
                with naming(bucket), open(bucket, "ab") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table.filter(pa.array(bucket_of_row == number)))
            progress.update(len(table))
            stop_if_asked(f"all scores in {output_dir} are kept: the same command goes on")
    progress.close()
    for number in files:
        stop_if_asked(f"all scores in {output_dir} are kept: the same command goes on")
        parts = []
        with open(buckets / f"{number}.arrow", "rb") as handle:
            while handle.peek(1):
                parts.append(pa.ipc.open_stream(handle).read_all())
        table = pa.concat_tables(parts)
        table = table.take(pc.sort_indices(table["quality_rank"]))
        for folder in folders:
            schema = output_features(args, pairs, folder == "data").arrow_schema
            target = data_file(output_dir / folder, number, files)
            images = pairs.images if folder == "data" else []  # elsewhere a column of this name holds paths
            columns = [f"_image_of_{name}" if name in images else name for name in schema.names]
            part = table.select(columns).rename_columns(schema.names).cast(schema)
            write_table(part, target, facts, 20 if folder == "data" else 1000)
            upload.send(f"{folder}/{target.name}", target)
        (buckets / f"{number}.arrow").unlink()
    for file in stale:  # of a run with another --top_fraction: load_dataset would read both
        file.unlink()
    (output_dir / UNFINISHED).unlink()


def main(args: ScriptArguments) -> None:
    state = make_state()

    # Find everything that is wrong with flags, columns and labels before loading a model.
    check_rewards([args.reward])
    output_dir, work = Path(args.output_dir), Path(args.output_dir) / "work"
    if not is_empty(output_dir) and not work.is_dir():  # in this order: another task may begin just now
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    if args.dataset_name and output_dir.resolve().is_relative_to(Path(args.dataset_name).resolve()):
        raise SystemExit(f"--output_dir {output_dir} is inside the dataset: choose another folder")
    if args.dataset_name and not os.path.exists(args.dataset_name):
        try:  # the commit, so that a run that goes on after a crash reads the same data
            args.dataset_revision = HfApi().dataset_info(args.dataset_name, revision=args.dataset_revision).sha
        except Exception as error:
            raise SystemExit(f"--dataset_name {args.dataset_name}: cannot be read: {one_line(error)}") from None
    check_card(output_dir / "README.md")
    if args.dataset_name:
        check_dataset_folder("--dataset_name", args.dataset_name, columns=not (work / "index").is_dir())
    settings = run_settings(args)
    check_settings(work, settings, "a run")
    check_settings(score_folder(args), reward_settings(args.reward), f"scores of {reward_name(args.reward)}")
    pairs = Pairs(args)
    state.wait_for_everyone()  # no process writes before all have checked
    published = tuple(f"{folder}/train-*-of-*.parquet" for folder in data_folders(args))
    # A wrong token or name fails now, not after the work.
    if args.push_to_hub and "sort" in args.stages and state.is_main_process:
        args.hub_dataset_id = create_repo(args.hub_dataset_id, "dataset", args.hub_private_repo)
        check_dataset_repo(args.hub_dataset_id, published)
    if state.is_main_process:
        write_settings(work, settings)
        if args.num_tasks == 1:  # else they may be another task's
            remove_temporary_files(output_dir)
    state.wait_for_everyone()

    if "score" in args.stages:
        index(args, pairs, state)
        shards = shards_to_score(args, pairs)
        score(args, pairs, shards, state)
    else:
        shards = check_scored(args, pairs)
    if state.is_main_process and args.num_tasks > 1:
        last = "--num_tasks 1 --stages sort"
        print(f"task {args.task_index} of {args.num_tasks} is done. After all of them: the same with {last}")
    if state.is_main_process and "sort" in args.stages:
        ranking = rank_pairs(args, pairs, shards)
        with DatasetUpload(args.hub_dataset_id if args.push_to_hub else None) as upload:
            write_dataset(args, pairs, ranking, upload)
        draw_figures(args, ranking)
        if args.num_examples:
            draw_examples(args, pairs, ranking)
        write_card(args, pairs, ranking)
        if args.push_to_hub:
            figures = ["difference", "quality", *(["best", "worst"] if args.include_images else [])]
            publish(args, published, ("statistics.json", *(f"figures/{name}.png" for name in figures)))
        print(f"{describe(ranking['counts'])}; the best {ranking['kept']} of them, sorted, in {output_dir}")
    state.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------------
# Pairs
# ----------------------------------------------------------------------------------------------------------------------


class Pairs:
    """The dataset of pairs as a stream of tables: its files in a fixed order, and of each only the columns needed."""

    def __init__(self, args: ScriptArguments):
        self.args, self.streams = args, {}
        self.images = [args.image_0_column, args.image_1_column]
        self.uids = [args.image_0_uid_column, args.image_1_uid_column]
        self.scored_columns = list(dict.fromkeys([args.prompt_column, *self.images]))  # both images may be one column
        self.where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--winner_dir {args.winner_dir}"
        # The folder that relative paths of images start from.
        if args.winner_dir:
            self.root = os.path.commonpath([Path(args.winner_dir).resolve(), Path(args.loser_dir).resolve()])
        else:
            name = args.dataset_name
            self.root = os.path.dirname(name) if os.path.isfile(name) else name if os.path.isdir(name) else ""
        try:
            stream = self.open(None)
            self.num_files = stream.num_shards
            first = next(iter(stream.with_format("arrow").iter(batch_size=1)), None)
        except Exception as error:
            raise SystemExit(f"{self.where}: cannot be read: {one_line(error.__cause__ or error)}") from None
        if first is None:
            raise SystemExit(f"{self.where}: split {args.dataset_split!r} has no rows")
        self.features = stream.features or Features.from_arrow_schema(first.schema)
        self.types = {name: getattr(feature, "dtype", str(feature)) for name, feature in self.features.items()}
        self.light_columns = [name for name, feature in self.features.items() if not has_bytes(feature)]
        self.check_columns()

    def open(self, columns: tuple[str, ...] | None) -> IterableDataset:
        """The stream of all files. Of Parquet files it reads only these columns from disk or network."""
        if columns not in self.streams:
            args, name = self.args, self.args.dataset_name
            if args.winner_dir:
                stream = folder_pairs(args, self.root).to_iterable_dataset()
            else:
                options = {"revision": args.dataset_revision}
                if os.path.isfile(name):
                    if not name.endswith((".parquet", ".jsonl", ".json")):
                        raise ValueError("a file must be .parquet, .jsonl or .json")
                    options = {"data_files": {args.dataset_split: name}}
                    name = "parquet" if name.endswith(".parquet") else "json"
                options |= {"name": args.dataset_config_name, "cache_dir": local_cache(name)}
                if columns and hasattr(load_dataset_builder(name, **options).config, "columns"):
                    options["columns"] = list(columns)
                stream = load_dataset(name, split=args.dataset_split, streaming=True, **options)
            self.streams[columns] = stream
        return self.streams[columns]

    def tables(self, file: int, columns: list[str], start: int = 0, size: int = 100):
        """Tables of `size` rows of one file, from row `start` of it."""
        try:
            stream = self.open(tuple(columns)).shard(num_shards=self.num_files, index=file)
            for table in stream.skip(start).with_format("arrow").iter(batch_size=size):
                yield table.select(columns)
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            problem = f"file {file} of {self.num_files} cannot be read: {one_line(error.__cause__ or error)}"
            raise SystemExit(f"{self.where}: {problem}; the same command continues from here") from None

    def check_columns(self) -> None:
        """Exits with one line that names a missing or wrong column."""
        types, prompt, label = self.types, self.args.prompt_column, self.args.label_0_column
        for name in (prompt, *self.images, *([] if label == "none" else [label])):
            if name not in types:
                columns = ", ".join(types)
                raise SystemExit(f"{self.where}: no column {name!r}; it has {columns}: see the --…_column flags")
        if types[prompt] not in ("string", "large_string"):
            raise SystemExit(f"{self.where}: column {prompt!r} holds {types[prompt]}, not text")
        for name in self.images:
            if not isinstance(self.features[name], Image) and types[name] not in (*BINARY, "string"):
                raise SystemExit(f"{self.where}: column {name!r} holds {types[name]}: must be bytes, Image or paths")
        if label != "none" and not re.match(r"float|int|uint|bool|null", types[label]):
            raise SystemExit(f"{self.where}: column {label!r} holds {types[label]}: it must hold 0, 0.5 or 1")
        has_label = self.args.has_label_column
        if not re.match(r"bool|int|uint|float|null", types.get(has_label, "bool")):
            raise SystemExit(f"{self.where}: column {has_label!r} holds {types[has_label]}: it must hold true or false")

    def row_name(self, file: int, row: int) -> str:
        return f"row {row} of file {file}" if self.num_files > 1 else f"row {row}"

    def bytes_of(self, value) -> bytes:
        """The bytes of an image's file, from a value of any kind of column; empty if there is no such file."""
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if isinstance(value, str):
            path = Path(self.root, value)
            return path.read_bytes() if path.is_file() else b""  # any other trouble with it ends the run
        return value or b""


def has_bytes(feature) -> bool:
    if isinstance(feature, dict):
        return any(map(has_bytes, feature.values()))
    if hasattr(feature, "feature"):  # a list
        return has_bytes(feature.feature)
    return isinstance(feature, Image) or getattr(feature, "dtype", "") in BINARY


def folder_pairs(args: ScriptArguments, root: str) -> Dataset:
    """Pairs of images of the same name in two folders, as paths relative to `root`; captions from text files beside the
    winners."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    folders = []
    for folder in (args.winner_dir, args.loser_dir):
        files = [file for file in sorted(Path(folder).iterdir()) if file.suffix.lower() in kinds]
        if not files:
            raise FileNotFoundError(f"no {', '.join(kinds)} in {folder}")
        by_stem = {file.stem: file for file in files}
        for file in files:
            if by_stem[file.stem] != file:
                raise ValueError(f"{file} and {by_stem[file.stem]} have the same name: remove one")
        folders.append(by_stem)
    winners, losers = folders
    if alone := sorted(set(winners) ^ set(losers)):
        raise ValueError(f"{len(alone)} images are in only one of the two folders: {', '.join(alone[:5])}")
    rows = []
    for stem, winner in winners.items():
        caption = winner.with_suffix(".txt")
        if not caption.exists():
            raise FileNotFoundError(f"no caption {caption}")
        prompt = caption.read_text(encoding="utf-8-sig").strip()
        image_0, image_1 = (str(file.resolve().relative_to(root)) for file in (winner, losers[stem]))
        images = {args.image_0_column: image_0, args.image_1_column: image_1}
        rows.append({args.prompt_column: prompt, **images, args.label_0_column: 1.0})
    return Dataset.from_list(rows)


def run_settings(args: ScriptArguments) -> dict:
    """What the work in `output_dir` depends on: the flags, and hashes that tell whether a local dataset has changed."""
    settings = {spec.name: getattr(args, spec.name) for spec in fields(args) if not spec.metadata.get("may_change")}
    settings["files"] = []
    for path in (args.dataset_name, args.winner_dir, args.loser_dir):
        if path and os.path.isdir(path):
            settings["files"].append(folder_digest(path))
        elif path and os.path.exists(path):
            settings["files"].append(sampled_digest(Path(path), blocks=64))
    return settings


def index_file(args: ScriptArguments, file: int) -> Path:
    return Path(args.output_dir) / "work" / "index" / f"{file:05d}.parquet"


def score_folder(args: ScriptArguments) -> Path:
    return Path(args.output_dir) / "work" / "scores" / reward_name(args.reward)


def score_file(args: ScriptArguments, shard: dict) -> Path:
    return score_folder(args) / f"{shard['file']:05d}-{shard['shard']:05d}.parquet"


def index_order(args: ScriptArguments, num_files: int, state: PartialState) -> list[int]:
    """The files that this process reads: its share; of several tasks all, its share first."""
    if args.num_tasks == 1:
        return list(range(state.process_index, num_files, state.num_processes))
    place = args.task_index * state.num_processes + state.process_index
    start = num_files * place // (args.num_tasks * state.num_processes)
    return [*range(start, num_files), *range(start)]


def is_indexed(args: ScriptArguments, file: int) -> bool:
    return shard_facts(index_file(args, file)) is not None and is_usable(index_file(args, file))


def is_scored(args: ScriptArguments, shard: dict) -> bool:
    return is_complete(score_file(args, shard), **shard["facts"]) and is_usable(score_file(args, shard))


def check_scored(args: ScriptArguments, pairs: Pairs) -> list[dict]:
    """The shards, all of which have scores. Exits with one line if some are missing."""
    if not all(is_indexed(args, file) for file in range(pairs.num_files)):
        raise SystemExit(f"{args.output_dir}: pairs are not all read: run the score stage first")
    shards = shards_to_score(args, pairs)
    if missing := sum(not is_scored(args, shard) for shard in shards):
        raise SystemExit(f"{args.output_dir}: {missing} of {len(shards)} shards lack scores: run the score stage first")
    return shards


def index_rows(args: ScriptArguments, pairs: Pairs, table: pa.Table, file: int, first_row: int) -> dict[str, pa.Array]:
    """The columns that the other stages need for these rows: ids, keys of (image, prompt), status and winner. Exits
    with one line that names a row whose label, prompt or id is wrong."""
    columns = table.to_pydict()
    prompts = columns[args.prompt_column]
    labels = [1.0] * len(table) if args.label_0_column == "none" else columns[args.label_0_column]
    if args.has_label_column in columns:
        labels = [label if has else None for label, has in zip(labels, columns[args.has_label_column])]
    status, winner = [], []
    for row, (prompt, label) in enumerate(zip(prompts, labels), first_row):
        where = f"{pairs.where}: {pairs.row_name(file, row)}"
        if not isinstance(prompt, str) or not prompt.strip():
            raise SystemExit(f"{where}: {args.prompt_column} is empty: remove the row, or write a prompt")
        missing = label is None or math.isnan(label)
        if not missing and label not in (0, 0.5, 1):
            raise SystemExit(f"{where}: {args.label_0_column} is {label}: must be 0, 0.5 or 1")
        status.append(UNLABELLED if missing else TIE if label == 0.5 else RANKED)
        winner.append(0 if label == 1 else 1)
    new_columns = {"_status": pa.array(status, pa.int8()), "_winner": pa.array(winner, pa.int8())}
    for side, (image, uid) in enumerate(zip(pairs.images, pairs.uids)):
        uids = columns[uid] if uid in pairs.features else [image_uid(pairs, image, value) for value in columns[image]]
        if not all(isinstance(value, str | int | bytes) and value not in ("", b"") for value in uids):
            where = f"{pairs.where}: row {first_row} of file {file}, or one of the {len(uids) - 1} after it"
            raise SystemExit(f"{where}: {uid} is empty: name another column with --image_{side}_uid_column")
        if uid not in pairs.features:
            new_columns[uid] = pa.array(uids)
        keys = [np.frombuffer(content_hash(f"{value}|{prompt}"), np.uint64)[0] for value, prompt in zip(uids, prompts)]
        new_columns[f"_key_{side}"] = pa.array(np.array(keys, dtype=np.uint64))
    return new_columns


def content_hash(content: str | bytes, size: int = 8) -> bytes:
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=size).digest()


def image_uid(pairs: Pairs, column: str, value) -> str:
    """An id for an image without one: made of path, size and date of its file, or of its content where there is no
    path."""
    if pairs.types[column] == "string" and value:
        path = Path(pairs.root, value)
        stat = path.stat() if path.exists() else None
        return content_hash(f"{value}|{stat and (stat.st_size, stat.st_mtime_ns)}", 16).hex()
    return content_hash(pairs.bytes_of(value), 16).hex()


def read_index(args: ScriptArguments, pairs: Pairs, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
    """These columns of all rows, and the first row of each file (and, last, the number of rows)."""
    tables = [read_table(index_file(args, file), columns) for file in range(pairs.num_files)]
    return pa.concat_tables([table for table in tables if len(table)]), np.cumsum([0, *map(len, tables)])


def shards_to_score(args: ScriptArguments, pairs: Pairs) -> list[dict]:
    """Assigns every (image, prompt) of a ranked pair to the shard where it comes first. So each is scored once, and
    always in the same batch, whatever other processes do and wherever an earlier run stopped.

    Returns:
        one dict per shard that has any: "file", "shard" (its number in the file), "places": (row in the shard, side)
        of what to score, "keys": uint64 array of the same, "facts": to record with the scores.
    """
    table, starts = read_index(args, pairs, ["_status", "_key_0", "_key_1"])
    keys = np.stack([table["_key_0"].to_numpy(), table["_key_1"].to_numpy()], axis=1)
    ranked = np.flatnonzero(np.repeat(table["_status"].to_numpy() == RANKED, 2))  # both sides of a pair
    is_first = np.zeros(keys.size, dtype=bool)
    is_first[ranked[np.unique(keys.ravel()[ranked], return_index=True)[1]]] = True
    is_first = is_first.reshape(-1, 2)
    shards = []
    for file, (start, end) in enumerate(zip(starts, starts[1:])):
        for number, first_row in enumerate(range(start, end, args.shard_size)):
            rows = slice(first_row, min(first_row + args.shard_size, end))
            if is_first[rows].any():
                shard_keys = keys[rows][is_first[rows]]
                shard = {"file": file, "shard": number, "places": np.argwhere(is_first[rows]), "keys": shard_keys}
                shards.append({**shard, "facts": {"keys": content_hash(shard_keys.tobytes()).hex()}})
    return shards


def shard_tables(args: ScriptArguments, pairs: Pairs, missing: list[dict]):
    """Yields each shard with its prompts and images. It reads a file once, from its first missing shard to its last."""
    for file in sorted({shard["file"] for shard in missing}):
        shards = {shard["shard"]: shard for shard in missing if shard["file"] == file}
        first, last = min(shards), max(shards)
        tables = pairs.tables(file, pairs.scored_columns, first * args.shard_size, args.shard_size)
        for number, table in zip(range(first, last + 1), tables):
            if number in shards:
                yield shards[number], table


def shards_with_images(args: ScriptArguments, pairs: Pairs, reward, missing: list[dict]) -> Iterator[tuple]:
    """Yields each shard with its images, the same with the first ones in preparation, and its prompts."""
    for shard, table in shard_tables(args, pairs, missing):
        images = [pairs.bytes_of(table[pairs.images[side]][row].as_py()) for row, side in shard["places"].tolist()]
        prompts = [table[args.prompt_column][row].as_py() for row, _ in shard["places"].tolist()]
        yield shard, images, reward.begin(images), prompts


def score_shard(
    args: ScriptArguments, pairs: Pairs, reward, shard: dict, images: list[bytes], begun: list, prompts: list[str]
) -> None:
    """Scores the images of one shard and writes the scores, with NaN and a reason for images that do not decode."""
    started, places = time.time(), shard["places"].tolist()
    scores, errors = reward.score(begun, prompts, skip_bad=True), [""] * len(places)
    for place in np.flatnonzero(np.isnan(scores)):
        try:
            decode_image(images[place])
            reason = "it did not decode"
        except BadImage as error:
            reason = str(error) if images[place] else "no such file, or an empty one"
        row, side = places[place]
        where = pairs.row_name(shard["file"], shard["shard"] * args.shard_size + row)
        errors[place] = f"{where}: {pairs.images[side]}: {reason}"
        if args.on_bad_image == "fail":
            raise SystemExit(f"{pairs.where}: {errors[place]}; --on_bad_image skip leaves its pairs out")
        tqdm.write(f"skipped: {errors[place]}", file=sys.stderr)
    table = pa.table({"key": shard["keys"], "score": pa.array(scores, pa.float32()), "error": errors})
    write_table(table, score_file(args, shard), {**shard["facts"], "seconds": time.time() - started})


def read_scores(args: ScriptArguments, pairs: Pairs, shards: list[dict]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sorted keys, their scores (NaN: bad image), and what was wrong with the bad ones."""
    tables = [read_table(score_file(args, shard)) for shard in shards]
    errors = [error for table in tables for error in table["error"].to_pylist() if error]
    if errors and args.on_bad_image == "fail":
        raise SystemExit(f"{pairs.where}: {errors[0]}; --on_bad_image skip leaves its pairs out")
    keys = np.concatenate([np.empty(0, np.uint64), *(table["key"].to_numpy() for table in tables)])
    scores = np.concatenate([np.empty(0), *(table["score"].to_numpy() for table in tables)])
    order = np.argsort(keys)
    return keys[order], scores[order], errors


def describe(counts: dict) -> str:
    return (
        f"{counts['rows']} pairs: {counts['ties']} ties, {counts['without_label']} without a label, "
        f"{counts['with_bad_image']} with an image that does not decode, {counts['ranked']} ranked"
    )


def output_features(args: ScriptArguments, pairs: Pairs, with_images: bool) -> Features:
    """The dataset's own columns, ids, ψ of both images, Q and the rank. With images, these replace paths of images."""
    features = {name: pairs.features[name] for name in pairs.light_columns}
    features |= {name: Value("string") for name in pairs.uids if name not in features}
    if with_images:
        features |= {name: pairs.features[name] if pairs.types[name] in BINARY else Image() for name in pairs.images}
    return Features(features | {name: Value(kind) for name, kind in NEW_COLUMNS.items()})


def kept_rows(args: ScriptArguments, pairs: Pairs, ranking: dict, file: int):
    """Yields tables of the rows of one file that are kept, in the file's order, with their new columns and images."""
    start, end = ranking["starts"][file : file + 2]
    if not (ranking["rank"][start:end] >= 0).any():
        return
    columns = [name for name in output_features(args, pairs, with_images=False) if name not in NEW_COLUMNS]
    size = 100 if args.include_images else 10_000
    images = pairs.tables(file, pairs.images, size=size) if args.include_images else None
    index_table = pq.ParquetFile(index_file(args, file))
    for batch in index_table.iter_batches(size, columns=columns):
        table = pa.Table.from_batches([batch])
        rows = slice(start, start + len(table))
        start += len(table)
        psi, rank = ranking["psi"][rows], ranking["rank"][rows]
        for name, values in zip(NEW_COLUMNS, [psi[:, 0], psi[:, 1], ranking["quality"][rows], rank + 1]):
            table = table.append_column(name, pa.array(values))
        is_kept = pa.array(rank >= 0)
        table = table.filter(is_kept)
        if images is not None:
            for name, column in zip(pairs.images, next(images).filter(is_kept).columns):
                column = column if pairs.types[name] in BINARY else embedded(pairs, column)
                table = table.append_column(f"_image_of_{name}", column)
        if len(table):
            yield table


def embedded(pairs: Pairs, images: pa.ChunkedArray) -> pa.Array:
    """Turns paths and Images into Images that hold the bytes of their files."""
    values = []
    for value in images.to_pylist():
        path = value["path"] if isinstance(value, dict) else value
        values.append({"bytes": pairs.bytes_of(value), "path": path and os.path.basename(path)})
    return pa.array(values, Image().pa_type)


# ----------------------------------------------------------------------------------------------------------------------
# Figures and card
# ----------------------------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture := BytesIO())
    save_picture(PILImage.open(picture), file)


def draw_figures(args: ScriptArguments, ranking: dict) -> None:
    """Figures 1a and 1b of the paper: the distribution of ψ_w − ψ_l, and Q over the sorted index."""
    folder = Path(args.output_dir) / "figures"
    if is_whole_png(folder / "difference.png") and is_whole_png(folder / "quality.png"):
        return
    title = f"reward: {reward_name(args.reward)}"
    figure = Figure(figsize=(6, 4), dpi=100, layout="tight")
    axes = figure.subplots()
    axes.hist(ranking["difference"], bins=100, color="tab:blue")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title=title, xlabel="ψ(winner) − ψ(loser)", ylabel="number of pairs")
    save_figure(figure, folder / "difference.png")
    figure = Figure(figsize=(6, 4), dpi=100, layout="tight")
    axes = figure.subplots()
    positions = np.unique(np.linspace(0, len(ranking["order"]) - 1, 2000).astype(int))
    axes.plot(positions + 1, ranking["quality"][ranking["order"][positions]], color="tab:blue")
    axes.axvspan(0, ranking["kept"], color="tab:green", alpha=0.2, label=f"kept: {ranking['kept']}")
    axes.set(title=title, xlabel="rank of the pair", ylabel="quality Q")
    axes.legend()
    save_figure(figure, folder / "quality.png")


def draw_examples(args: ScriptArguments, pairs: Pairs, ranking: dict, cell: int = 224) -> None:
    """Strips of the best and the worst pairs: winners above, losers below, in squares of `cell` pixels."""
    folder, order = Path(args.output_dir) / "figures", ranking["order"]
    if is_whole_png(folder / "best.png") and is_whole_png(folder / "worst.png"):
        return
    number = min(args.num_examples, len(order))
    for name, rows in {"best": order[:number], "worst": order[::-1][:number]}.items():
        canvas = PILImage.new("RGB", (cell * number, 2 * cell + 22), "white")
        drawing = ImageDraw.Draw(canvas)
        for left, row in zip(range(0, cell * number, cell), rows):
            file = int(np.searchsorted(ranking["starts"], row, side="right")) - 1
            table = next(pairs.tables(file, pairs.scored_columns, int(row - ranking["starts"][file]), size=1))
            winner = ranking["winner"][row]
            for top, side in ((0, winner), (cell, 1 - winner)):
                image = PILImage.open(BytesIO(pairs.bytes_of(table[pairs.images[side]][0].as_py()))).convert("RGB")
                resample = PILImage.NEAREST if max(image.size) < cell else PILImage.LANCZOS
                scale = cell / max(image.size)
                size = [max(1, round(length * scale)) for length in image.size]
                canvas.paste(image.resize(size, resample), (left, top))
            text = table[args.prompt_column][0].as_py()[: cell // 7].encode("latin-1", "replace").decode("latin-1")
            drawing.text((left + 4, 2 * cell + 5), text, fill="black")
        save_picture(canvas, folder / f"{name}.png")


def data_folders(args: ScriptArguments) -> list[str]:
    """The folder of each configuration of the dataset: `data` has the images."""
    return ["data", "scores"] if args.include_images else ["scores"]


def write_card(args: ScriptArguments, pairs: Pairs, ranking: dict) -> None:
    """Writes README.md and statistics.json."""
    output_dir, counts, statistics = Path(args.output_dir), ranking["counts"], ranking["statistics"]
    name, kept, reward = reward_name(args.reward), ranking["kept"], statistics["reward"]
    source = args.dataset_name or f"{args.winner_dir} and {args.loser_dir}"
    contradicted = float((ranking["difference"] <= 0).mean())
    quality, shares = ranking["quality"][ranking["order"]], (0, 0.01, 0.0533, 0.1, 0.25, 0.5, 0.75, 1)
    quality_at = ", ".join(f"{quality[round(share * (len(quality) - 1))]:.4f}" for share in shares)
    images, examples = "", ""
    if not args.include_images:
        uid_0, uid_1 = pairs.uids
        images = f" The images are not in it: join them from `{source}` by `{uid_0}` and `{uid_1}`"
        is_hash = uid_0 not in pairs.features and pairs.types[args.image_0_column] != "string"
        images += " (BLAKE2b of the image's file, 16 bytes in hexadecimal)." if is_hash else "."
    elif args.num_examples:
        examples = """
## Examples

The best pairs, winners above losers:

![The best pairs](figures/best.png)

The worst pairs, those of the smallest Q:

![The worst pairs](figures/worst.png)
"""
    errors = "".join(f"\n- {error}" for error in ranking["errors"][:20])
    errors += f"\n- and {len(ranking['errors']) - 20} more" if len(ranking["errors"]) > 20 else ""
    rows = [
        ["rows read", counts["rows"]],
        ["ties, left out", counts["ties"]],
        ["without a label, left out", counts["without_label"]],
        ["with an image that does not decode, left out", counts["with_bad_image"]],
        ["ranked", counts["ranked"]],
        [f"kept (`--top_fraction {args.top_fraction:g}`)", kept],
    ]
    body = f"""# {output_dir.resolve().name}

Preference pairs of `{source}`, sorted by their quality Q under a reward model: a Quality Sorted Dataset for
DPO-QSD. Row 1 is the best pair: train in this order, without shuffling.{images}

| column | type | |
|---|---|---|
| `score_0`, `score_1` | float64 | ψ of the first and the second image, in [0, 1], by {name} |
| `quality` | float64 | Q = ψ(winner) · (1 − ψ(loser)) |
| `quality_rank` | int64 | 1 = best |

All other columns are those of the original dataset.

```python
from datasets import load_dataset

dataset = load_dataset("{args.hub_dataset_id or output_dir}", "{"default" if args.include_images else "scores"}", \
split="train")
```

## Pairs

{markdown_table(["", "pairs"], rows)}

In {contradicted:.1%} of the ranked pairs the reward model rates the loser at least as high as the winner.{errors}

## Reward

ψ is made from the reward `{reward["reward"]}`\
{f" with the checkpoint `{reward['checkpoint']}`" if "checkpoint" in reward else ""} \
(`--normalization {args.normalization}`). Over the images of all ranked pairs, the raw reward has mean
{statistics["mean"]:.6g} and standard deviation {statistics["std"]:.6g}.

Q at the first rank, at 1 %, 5.33 %, 10 %, 25 %, 50 % and 75 % of the ranks, and at the last: {quality_at}.

![Distribution of ψ(winner) − ψ(loser)](figures/difference.png)

![Q over the sorted pairs](figures/quality.png)
{examples}
## How it was made

Reward `{args.reward}`{f", pairs at commit {args.dataset_revision}" if args.dataset_revision else ""}. \
{", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets"))}. Hash of pairs, order and ψ:
{ranking["hash"]}.
"""
    configs = {
        "default" if folder == "data" else folder: (folder, output_features(args, pairs, folder == "data"))
        for folder in data_folders(args)
    }
    is_hub = args.dataset_name and not os.path.exists(args.dataset_name)
    front = {
        "pretty_name": output_dir.resolve().name,
        "language": ["en"],
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(kept)],
        "tags": ["dpo-qsd", "preference", "dpo"],
        **({"source_datasets": [args.dataset_name]} if is_hub else {}),
        **config_metadata(output_dir, configs),
    }
    write_text(output_dir / "README.md", make_card(front, card_block(body), output_dir / "README.md"))
    write_text(output_dir / "statistics.json", json.dumps({**statistics, **counts, "kept": kept}, indent=2) + "\n")


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
