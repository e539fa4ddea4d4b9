# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate",
#     "datasets",
#     "ftfy",
#     "huggingface_hub",
#     "matplotlib",
#     "numpy",
#     "pillow",
#     "protobuf",
#     "pyarrow",
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
"""Scores preference pairs and sorts them by quality: the Quality Sorted Dataset of DPO-QSD.

A pair's quality is Q = ψ(winner) · (1 − ψ(loser)), with a reward model as ψ, read as the probability to be preferred.
The paper reports better models from the best 5.33 % of the pairs, in this order, than from all of them.

Pick-a-Pic from the Hub, streamed, as in the paper (HPSv2):

    accelerate launch score_pairs.py --dataset_name liuhuohuo2/pick-a-pic-v2 --reward hpsv2 \
        --output_dir outputs/pickapic-qsd

Own pairs: a folder of Parquet files with other columns, the first image always the better one, the best tenth, with its
images, published:

    python score_pairs.py --dataset_name my_pairs --prompt_column prompt --image_0_column chosen \
        --image_1_column rejected --label_0_column none --reward pickscore --top_fraction 0.1 --include_images \
        --output_dir outputs/my-qsd --push_to_hub --hub_dataset_id user/my-qsd

Two folders of images of the same names, each winner with its caption in a text file beside it:

    python score_pairs.py --winner_dir pairs/better --loser_dir pairs/worse --output_dir outputs/folders-qsd

The work is cut into shards under `<output_dir>/work`. Run the same command again after a crash, on any number of
processes: only what is missing is done.
"""

import hashlib
import html
import importlib.util
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

import ftfy
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
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


CARD_FACTS = ("size_categories",)  # of the front matter, what a run states anew beside its configurations
CARD_BEGIN = "<!-- score_pairs.py writes from here to its second mark; text before and after is kept. -->"
CARD_END = "<!-- End of what score_pairs.py wrote. -->"
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


@dataclass
class ScriptArguments:
    """`--config file.yaml` reads the flags from a file; the command line overrides it."""

    # Pairs
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of pairs: Hub id (streamed), folder, or .parquet / .jsonl file."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    winner_dir: str | None = field(
        default=None, metadata={"help": "Instead of a dataset: folder of preferred images, captions in .txt files."}
    )
    loser_dir: str | None = field(default=None, metadata={"help": "Folder of the other images, of the same names."})
    prompt_column: str = field(default="caption", metadata={"help": "Column of the prompts."})
    image_0_column: str = field(default="jpg_0", metadata={"help": "First images: bytes, Image, or paths of files."})
    image_1_column: str = field(default="jpg_1", metadata={"help": "Second images, of the same kind."})
    label_0_column: str = field(
        default="label_0",
        metadata={"help": "1: the first image is preferred, 0: the second, 0.5: tie. `none`: always the first."},
    )
    has_label_column: str = field(
        default="has_label", metadata={"help": "Where this column exists and is false, a pair is unlabelled."}
    )
    image_0_uid_column: str = field(
        default="image_0_uid", metadata={"help": "Id of the first image; made from its content where there is none."}
    )
    image_1_uid_column: str = field(default="image_1_uid", metadata={"help": "Id of the second image, likewise."})
    on_bad_image: str = field(
        default="skip",
        metadata={"help": "An image that does not decode: skip its pairs, or fail.", "choices": ("skip", "fail")},
    )

    # Quality
    reward: str = field(
        default="hpsv2", metadata={"help": f"{', '.join(REWARD_MODELS)}, also as name=checkpoint; file.py:function."}
    )
    reward_batch_size: int = field(default=32, metadata={"help": "Images scored together."})
    normalization: str = field(
        default="auto",
        metadata={
            "help": "How a reward becomes ψ in [0, 1]. auto: as in the paper, standardize for your own functions; "
            "standardize: over the dataset, clipped at 3 deviations; none: it is a probability already.",
            "choices": ("auto", "standardize", "none"),
        },
    )
    top_fraction: float = field(default=1.0, metadata={"help": "Share of the ranked pairs to keep, the best first."})

    # Work and output
    output_dir: str = field(default="outputs/qsd", metadata={"help": "Dataset, figures, card, shards in work/."})
    include_images: bool = field(
        default=False,
        metadata={"help": "Write, and push, the images too; by default all other columns and the scores."},
    )
    num_examples: int = field(default=5, metadata={"help": "Best and worst pairs to show in pictures; 0: none."})
    shard_size: int = field(default=512, metadata={"help": "Pairs per shard of work: what a crash can lose."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the dataset."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Dataset repository: user/name."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository private."})

    def __post_init__(self):
        # YAML values bypass argparse, so types and choices are checked here too.
        if (self.winner_dir is None) != (self.loser_dir is None):
            raise SystemExit("--winner_dir and --loser_dir belong together")
        if (self.dataset_name is None) == (self.winner_dir is None):
            raise SystemExit("--dataset_name is missing: a Hub id, a folder or a file; or --winner_dir and --loser_dir")
        for name, choices in {
            "on_bad_image": ("skip", "fail"),
            "normalization": ("auto", "standardize", "none"),
        }.items():
            if getattr(self, name) not in choices:
                raise SystemExit(f"--{name} {getattr(self, name)}: choose from {', '.join(choices)}")
        for name, least in {"reward_batch_size": 1, "shard_size": 1, "num_examples": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SystemExit(f"--{name} {value}: must be a whole number, at least {least}")
        if type(self.top_fraction) not in (int, float) or not 0 < self.top_fraction <= 1:
            raise SystemExit(f"--top_fraction {self.top_fraction}: must be above 0 and at most 1")
        if self.push_to_hub and not self.hub_dataset_id:
            raise SystemExit("--push_to_hub needs --hub_dataset_id user/name")


# ----------------------------------------------------------------------------------------------------------------------
# Quality
# ----------------------------------------------------------------------------------------------------------------------


def pair_quality(p_w, p_l) -> np.ndarray:
    """Q = ψ(winner) · (1 − ψ(loser)) (DPO-QSD, equation 1): the probability that both are what the label says.

    Args:
        p_w, p_l: float arrays (n,) in [0, 1].

    Returns:
        float64 array (n,) in [0, 1].
    """
    return np.asarray(p_w, dtype=np.float64) * (1.0 - np.asarray(p_l, dtype=np.float64))


def preference_score(reward: str, normalization: str, rewards: np.ndarray, mean: float, std: float) -> np.ndarray:
    """ψ in [0, 1] from raw rewards (DPO-QSD, sections 3.2 and 5.2).

    Args:
        reward: its name; normalization: auto, standardize or none.
        rewards: float array of any shape; mean, std: of the rewards of all ranked pairs.

    Returns:
        float64 array of the same shape. Exits with one line if `none` finds a reward outside [0, 1].
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    kind = reward.partition("=")[0]  # a function of the user's may have the name of a reward
    if normalization == "auto":
        if kind in REWARD_MODELS and kind.startswith(("hpsv2", "clipscore", "vqascore")):
            return rewards.clip(0, 1)
        if kind == "imagereward":
            return (rewards.clip(-3, 3) + 3) / 6
        if kind == "aesthetic":
            return (rewards / 10).clip(0, 1)
    if normalization == "none":
        if rewards.size and not (rewards.min() >= 0 and rewards.max() <= 1):
            found = f"{rewards.min():.4g} to {rewards.max():.4g}"
            raise SystemExit(
                f"--normalization none: {reward} must be in [0, 1], but goes from {found}; try standardize"
            )
        return rewards
    return (((rewards - mean) / std).clip(-3, 3) + 3) / 6


# ----------------------------------------------------------------------------------------------------------------------
# Stages: read, score, rank, write
# ----------------------------------------------------------------------------------------------------------------------


RANKED, TIE, UNLABELLED = 0, 1, 2  # status of a pair


def index(args: ScriptArguments, pairs: "Pairs", state: PartialState) -> None:
    """Reads all rows once, without images where they have ids: labels are checked before any model is loaded."""
    work = Path(args.output_dir) / "work"
    own = [f for f in range(pairs.num_files) if f % state.num_processes == state.process_index]
    own = [f for f in own if shard_facts(index_file(work, f)) is None]
    progress = tqdm(desc="read pairs", unit="pair", disable=not (own and state.is_local_main_process))
    for file in own:
        target = index_file(work, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
        writer, row = None, 0
        for table in pairs.tables(file, index_columns(args, pairs)):
            found = index_rows(args, pairs, table, file, row)
            table = table.select(pairs.light_columns)
            for name, values in found.items():
                table = table.drop_columns(name) if name in table.column_names else table
                table = table.append_column(name, values)
            if writer is None:
                schema = table.schema.with_metadata({b"synpic": b"{}"})
                writer = pq.ParquetWriter(temporary, schema)
            writer.write_table(table.cast(schema))
            row += len(table)
            progress.update(len(table))
        if writer is None:  # an empty file of the dataset
            pq.write_table(pa.table({}).replace_schema_metadata({b"synpic": b"{}"}), temporary)
        else:
            writer.close()
        os.replace(temporary, target)
    progress.close()
    state.wait_for_everyone()


def score(args: ScriptArguments, pairs: "Pairs", shards: list[dict], state: PartialState) -> None:
    """Scores what is missing. Shards belong to processes in runs, so that each reads its own part of the dataset."""
    write_settings(score_file(args, {"file": 0, "shard": 0}).parent, reward_settings(args.reward))
    own = np.array_split(np.arange(len(shards)), state.num_processes)[state.process_index]
    missing = []
    for number in own:
        shard = shards[number]
        facts = {"keys": digest(shard["keys"].tobytes()).hex()}
        if not is_complete(score_file(args, shard), **facts):
            missing.append((shard, facts))
    if missing:
        reward = load_reward_model(args.reward, state.device, batch_size=args.reward_batch_size)
        progress = tqdm(
            total=sum(len(shard["keys"]) for shard, _ in missing),
            desc=f"score {reward_name(args.reward)}",
            unit="image",
            disable=not state.is_local_main_process,
        )
        for shard, facts, table in shard_tables(args, pairs, missing):
            score_shard(args, pairs, reward, shard, facts, table)
            progress.update(len(shard["keys"]))
        progress.close()
    state.wait_for_everyone()


def rank_pairs(args: ScriptArguments, pairs: "Pairs", shards: list[dict]) -> dict:
    """Q of every ranked pair, and the order.

    Returns:
        "psi": float64 (n, 2), ψ of both images (NaN: not ranked); "difference": ψ_w − ψ_l and "quality" of the m ranked
        pairs, best first, and "order": their rows of the n; "kept": how many of them; counts and statistics.
    """
    work = Path(args.output_dir) / "work"
    tables = read_index(work, pairs.num_files, ["_status", "_winner", "_key_0", "_key_1"])
    table = pa.concat_tables([table for table in tables if len(table)])
    status, winner = table["_status"].to_numpy(), table["_winner"].to_numpy()
    known, scores, errors = read_scores(args, pairs, shards)
    rewards = np.full((len(table), 2), np.nan)
    labelled = np.flatnonzero(status == RANKED)
    for side in (0, 1):
        keys = table[f"_key_{side}"].to_numpy()[labelled]
        rewards[labelled, side] = scores[np.searchsorted(known, keys)]
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
        raise SystemExit(f"reward {args.reward}: gives every image the same score, {mean:g}: it orders nothing")
    psi = np.full((len(table), 2), np.nan)
    psi[ranked] = preference_score(args.reward, args.normalization, rewards[ranked], mean, std)
    lines = np.arange(len(table))
    p_w, p_l = psi[lines, winner], psi[lines, 1 - winner]
    quality = pair_quality(p_w, p_l)
    order = ranked[np.argsort(-quality[ranked], kind="stable")]  # equal ones stay in the dataset's order
    statistics = {"reward": reward_settings(args.reward), "normalization": args.normalization, "mean": mean, "std": std}
    return {
        "psi": psi,
        "order": order,
        "quality": quality[order],
        "difference": (p_w - p_l)[order],
        "kept": kept,
        "winner": winner,
        "counts": counts,
        "statistics": statistics,
        "errors": errors,
    }


def write_dataset(args: ScriptArguments, pairs: "Pairs", ranking: dict, upload) -> None:
    """Writes the kept pairs, best first, unless they stand there already.

    Sorting happens on disk: rows go to the bucket of their output file as they come, then each bucket is sorted, so
    that memory holds one output file at most.
    """
    output_dir, kept = Path(args.output_dir), ranking["kept"]
    rows_per_file = max(500, math.ceil(kept / 200)) if args.include_images else 100_000
    files = range(math.ceil(kept / rows_per_file))
    folders = data_folders(args)
    identity = np.concatenate([ranking["order"][:kept].astype(float), ranking["psi"][ranking["order"][:kept]].ravel()])
    facts = {"pairs": digest(identity.tobytes(), 16).hex()}
    wanted = {data_file(output_dir / folder, number, files) for folder in folders for number in files}
    stale = {*(output_dir / "scores").glob("*.parquet"), *(output_dir / "data").glob("*.parquet")} - wanted
    if not stale and all(shard_facts(file) == facts for file in wanted):
        return

    for file in (output_dir / "figures").glob("*.png"):  # they show the earlier run
        file.unlink()
    rank = np.full(len(ranking["psi"]), -1)
    rank[ranking["order"][:kept]] = np.arange(kept)
    buckets = output_dir / "work" / "buckets"
    buckets.mkdir(parents=True, exist_ok=True)
    for file in buckets.iterdir():  # of a run that was killed
        file.unlink()
    start = 0
    progress = tqdm(total=kept, desc="sort", unit="pair")
    for file in range(pairs.num_files):
        for table in kept_rows(args, pairs, ranking, rank, file, start):
            numbers = table["quality_rank"].to_numpy() - 1
            for bucket in np.unique(numbers // rows_per_file):
                with open(buckets / f"{bucket}.arrow", "ab") as handle:
                    part = table.filter(pa.array(numbers // rows_per_file == bucket))
                    with pa.ipc.new_stream(handle, part.schema) as writer:
                        writer.write_table(part)
            progress.update(len(table))
        start += pq.read_metadata(index_file(output_dir / "work", file)).num_rows
    progress.close()
    for number in files:
        parts = []
        with open(buckets / f"{number}.arrow", "rb") as handle:
            while handle.peek(1):
                parts.append(pa.ipc.open_stream(handle).read_all())
        table = pa.concat_tables(parts)
        table = table.take(pc.sort_indices(table["quality_rank"]))
        for folder in folders:
            schema = output_features(args, pairs, folder == "data").arrow_schema
            target = data_file(output_dir / folder, number, files)
            images = pairs.images if folder == "data" else []  # else these are paths, or nothing
            held = [f"_image_of_{name}" if name in images else name for name in schema.names]
            part = table.select(held).rename_columns(schema.names).cast(schema)
            write_table(part, target, facts, 20 if folder == "data" else 1000)
            upload.send(f"{folder}/{target.name}", target)
        (buckets / f"{number}.arrow").unlink()
    for file in stale:  # of a run with another fraction: both would be read
        file.unlink()


def main(args: ScriptArguments) -> None:
    # Several processes without a GPU talk through gloo; the first to arrive may have hours to wait for the last.
    launched = "LOCAL_RANK" in os.environ
    waiting = {"timeout": timedelta(days=7)} if launched else {}
    state = PartialState(cpu=launched and not torch.cuda.is_available(), **waiting)

    # Everything that can be wrong with flags, columns and labels is found before a model is loaded.
    check_rewards([args.reward])
    output_dir, work = Path(args.output_dir), Path(args.output_dir) / "work"
    if output_dir.is_dir() and any(output_dir.iterdir()) and not work.is_dir():
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    if args.dataset_name and output_dir.resolve().is_relative_to(Path(args.dataset_name).resolve()):
        raise SystemExit(f"--output_dir {output_dir} is inside the dataset: choose another folder")
    if args.dataset_name and not os.path.exists(args.dataset_name):
        args.dataset_revision = hub_commit(args)
    check_settings(work, run_settings(args), "a run")
    name = reward_name(args.reward)
    check_settings(work / "scores" / name, reward_settings(args.reward), f"scores of {name}")
    pairs = Pairs(args)
    state.wait_for_everyone()  # nobody writes before all have looked
    published = tuple(f"{folder}/train-*-of-*.parquet" for folder in data_folders(args))
    if args.push_to_hub and state.is_main_process:  # a wrong token or name fails now, not after the work
        args.hub_dataset_id = create_repo(args.hub_dataset_id, "dataset", args.hub_private_repo)
        check_dataset_repo(args.hub_dataset_id, published)
    if state.is_main_process:
        write_settings(work, run_settings(args))
        for stale in output_dir.rglob(".*.tmp*"):  # of processes that were killed
            stale.unlink()
    state.wait_for_everyone()

    index(args, pairs, state)
    shards = shards_to_score(args, pairs)
    score(args, pairs, shards, state)
    if state.is_main_process:
        ranking = rank_pairs(args, pairs, shards)
        with DatasetUpload(args.hub_dataset_id if args.push_to_hub else None) as upload:
            write_dataset(args, pairs, ranking, upload)
        draw_figures(args, ranking)
        if args.num_examples:
            draw_examples(args, pairs, ranking)
        write_card(args, pairs, ranking)
        if args.push_to_hub:
            figures = ["difference.png", "quality.png"] + (["best.png", "worst.png"] if args.include_images else [])
            publish(args, published, ("statistics.json", *(f"figures/{name}" for name in figures)))
        print(f"{describe(ranking['counts'])}; the best {ranking['kept']} of them, sorted, in {output_dir}")
    state.wait_for_everyone()


# ----------------------------------------------------------------------------------------------------------------------
# Pairs
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


def hub_commit(args: ScriptArguments) -> str:
    """The commit of the dataset: what was read before a crash and what is read after must be the same."""
    try:
        return HfApi().dataset_info(args.dataset_name, revision=args.dataset_revision).sha
    except Exception as error:
        raise SystemExit(f"--dataset_name {args.dataset_name}: cannot be read: {one_line(error)}") from None


class Pairs:
    """The dataset of pairs as a stream: files in a fixed order, each read in tables of the columns that are asked."""

    def __init__(self, args: ScriptArguments):
        self.args, self.streams = args, {}
        self.where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--winner_dir {args.winner_dir}"
        try:
            stream = self.open(None)
            self.num_files = stream.num_shards
            first = next(iter(stream.with_format("arrow").iter(batch_size=1)), None)
        except Exception as error:
            raise SystemExit(f"{self.where}: cannot be read: {one_line(error)}") from None
        if first is None:
            raise SystemExit(f"{self.where}: split {args.dataset_split!r} has no rows")
        self.features = stream.features or Features.from_arrow_schema(first.schema)
        self.images = [args.image_0_column, args.image_1_column]
        self.check_columns()
        self.root = self.folder()

    def open(self, columns: tuple[str, ...] | None) -> IterableDataset:
        """The stream of all files; of Parquet files only these columns are read from disk or network."""
        if columns not in self.streams:
            args = self.args
            if args.winner_dir:
                stream = folder_pairs(args).to_iterable_dataset()
            else:
                name, kwargs = args.dataset_name, {"revision": args.dataset_revision}
                if os.path.isfile(name):
                    kind = "parquet" if name.endswith(".parquet") else "json"
                    name, kwargs = kind, {"data_files": {args.dataset_split: name}}
                kwargs["cache_dir"] = local_cache(name)
                builder = load_dataset_builder(name, args.dataset_config_name, **kwargs)
                if columns and hasattr(builder.config, "columns"):
                    kwargs["columns"] = list(columns)
                stream = load_dataset(
                    name, args.dataset_config_name, split=args.dataset_split, streaming=True, **kwargs
                )
            self.streams[columns] = stream
        return self.streams[columns]

    def tables(self, file: int, columns: list[str], start: int = 0, size: int = 100):
        """Tables of `size` rows of one file, from row `start` of it."""
        try:
            stream = self.open(tuple(columns)).shard(num_shards=self.num_files, index=file)
            for table in stream.skip(start).with_format("arrow").iter(batch_size=size):
                yield table.select(columns)
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            where = f"{self.where}: file {file} of {self.num_files}"
            message = f"{where} cannot be read: {one_line(error)}; the same command continues from here"
            raise SystemExit(message) from None

    def folder(self) -> str:
        """What relative paths of images are relative to."""
        if self.args.winner_dir:
            return common_folder(self.args)
        name = self.args.dataset_name
        return name if os.path.isdir(name) else os.path.dirname(name) if os.path.isfile(name) else ""

    def check_columns(self) -> None:
        """Exits with one line that names a missing or wrong column."""
        args, have = self.args, self.features
        wanted = [args.prompt_column, *self.images]
        wanted += [args.label_0_column] if args.label_0_column != "none" else []
        for name in wanted:
            if name not in have:
                raise SystemExit(
                    f"{self.where}: no column {name!r}; it has {', '.join(have)}: see the --…_column flags"
                )
        kinds = {name: getattr(feature, "dtype", str(feature)) for name, feature in have.items()}
        if kinds[args.prompt_column] not in ("string", "large_string"):
            raise SystemExit(f"{self.where}: column {args.prompt_column!r} holds {kinds[args.prompt_column]}, not text")
        for name in self.images:
            if not isinstance(have[name], Image) and kinds[name] not in ("binary", "large_binary", "string"):
                raise SystemExit(f"{self.where}: column {name!r} holds {kinds[name]}: must be bytes, Image or paths")
        if args.label_0_column != "none" and not re.match(r"float|int|uint|bool|null", kinds[args.label_0_column]):
            raise SystemExit(
                f"{self.where}: column {args.label_0_column!r} holds {kinds[args.label_0_column]}: it must hold 0, 0.5 "
                "or 1"
            )

    @property
    def light_columns(self) -> list[str]:
        """The dataset's own columns without pictures."""
        heavy = {name for name, feature in self.features.items() if has_bytes(feature)}
        return [name for name in self.features if name not in heavy]

    def is_path(self, column: str) -> bool:
        return getattr(self.features[column], "dtype", None) == "string"

    def is_binary(self, column: str) -> bool:
        return getattr(self.features[column], "dtype", None) in ("binary", "large_binary")

    def bytes_of(self, value) -> bytes:
        """An image's file, whatever kind its column is of; an empty one if it cannot be read."""
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if isinstance(value, str):
            path = Path(self.root, value)
            return path.read_bytes() if path.is_file() else b""  # any other trouble with it ends the run
        return value or b""


def has_bytes(feature) -> bool:
    if isinstance(feature, dict):
        return any(map(has_bytes, feature.values()))
    if hasattr(feature, "feature"):  # of a list
        return has_bytes(feature.feature)
    return isinstance(feature, Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def common_folder(args: ScriptArguments) -> str:
    """What the paths of images in two folders are written relative to."""
    return os.path.commonpath([Path(args.winner_dir).resolve(), Path(args.loser_dir).resolve()])


def folder_pairs(args: ScriptArguments) -> Dataset:
    """Pairs of images of the same name in two folders; captions from text files beside the winners."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    folders = []
    for folder in (args.winner_dir, args.loser_dir):
        files = [file for file in sorted(Path(folder).iterdir()) if file.suffix.lower() in kinds]
        if not files:
            raise FileNotFoundError(f"no {', '.join(kinds)} in {folder}")
        for one, other in zip(files, files[1:]):
            if one.stem == other.stem:
                raise ValueError(f"{one} and {other} have the same name: remove one")
        folders.append({file.stem: file for file in files})
    winners, losers = folders
    if set(winners) != set(losers):
        alone = sorted(set(winners) ^ set(losers))
        raise ValueError(f"{len(alone)} images are in only one of the two folders: {', '.join(alone[:5])}")
    rows = []
    for stem, winner in winners.items():
        caption = winner.with_suffix(".txt")
        if not caption.exists():
            raise FileNotFoundError(f"no caption {caption}")
        text = caption.read_text(encoding="utf-8-sig").strip()
        files = {args.image_0_column: winner, args.image_1_column: losers[stem]}
        paths = {name: str(file.resolve().relative_to(common_folder(args))) for name, file in files.items()}
        rows.append({args.prompt_column: text, **paths, args.label_0_column: 1.0})
    return Dataset.from_list(rows)


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
# Shards: written under a temporary name, then renamed; complete when they hold what they should
# ----------------------------------------------------------------------------------------------------------------------


# Copied from build_synpic.write_table
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


# Copied from build_synpic.shard_facts
def shard_facts(file: Path) -> dict | None:
    """What was recorded with a shard; None if there is no such shard, or it is not readable."""
    if not file.exists():
        return None
    try:
        return json.loads(pq.read_schema(file).metadata[b"synpic"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


# Copied from build_synpic.is_complete
def is_complete(file: Path, **expected) -> bool:
    """True if a shard exists that was made for these prompts (and, of scores, for these images)."""
    facts = shard_facts(file)
    return facts is not None and all(facts.get(name) == value for name, value in expected.items())


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


# Copied from train_rankdpo_sdxl.write_text
def write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


# Copied from build_synpic.write_settings
def write_settings(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".settings.tmp{os.getpid()}"
    temporary.write_text(json.dumps(settings, indent=2))
    os.replace(temporary, folder / "settings.json")


def run_settings(args: ScriptArguments) -> dict:
    """What the work in `output_dir` depends on. Another reward adds its scores; fraction and figures are made anew."""
    names = (
        "dataset_name dataset_config_name dataset_revision dataset_split winner_dir loser_dir prompt_column "
        "image_0_column image_1_column label_0_column has_label_column image_0_uid_column image_1_uid_column shard_size"
    ).split()
    local = [name for name in (args.dataset_name, args.winner_dir, args.loser_dir) if name and os.path.exists(name)]
    return {name: getattr(args, name) for name in names} | {"files": [source_digest(name) for name in local]}


def source_digest(path: str) -> str:
    """Tells a dataset that was changed from the one that was read before."""
    if os.path.isdir(path):
        return folder_digest(path)
    stat = os.stat(path)
    return digest(f"{stat.st_size}|{stat.st_mtime_ns}").hex()


def index_file(work: Path, file: int) -> Path:
    return work / "index" / f"{file:05d}.parquet"


def score_file(args: ScriptArguments, shard: dict) -> Path:
    folder = Path(args.output_dir) / "work" / "scores" / reward_name(args.reward)
    return folder / f"{shard['file']:05d}-{shard['shard']:05d}.parquet"


# ----------------------------------------------------------------------------------------------------------------------
# Stages
# ----------------------------------------------------------------------------------------------------------------------


def index_columns(args: ScriptArguments, pairs: Pairs) -> list[str]:
    """The light columns, and those images that have no id of their own: their bytes are hashed."""
    uids = (args.image_0_uid_column, args.image_1_uid_column)
    images = [image for image, uid in zip(pairs.images, uids) if uid not in pairs.features]
    return list(dict.fromkeys(pairs.light_columns + images))


def index_rows(args: ScriptArguments, pairs: Pairs, table: pa.Table, file: int, first_row: int) -> dict[str, pa.Array]:
    """What the other stages need of these rows: ids, keys of (image, prompt), status, winner. Exits with one line that
    names a row whose label or prompt is wrong."""
    columns = table.to_pydict()
    prompts = columns[args.prompt_column]
    labels = [1.0] * len(table) if args.label_0_column == "none" else columns[args.label_0_column]
    if args.has_label_column in columns:
        labels = [label if has else None for label, has in zip(labels, columns[args.has_label_column])]
    status, winner = [], []
    for number, (prompt, label) in enumerate(zip(prompts, labels), first_row):
        where = f"{pairs.where}: row {number}" + (f" of file {file}" if pairs.num_files > 1 else "")
        if not isinstance(prompt, str):
            raise SystemExit(f"{where}: {args.prompt_column} is empty: remove the row, or write a prompt")
        missing = label is None or label != label
        if not missing and label not in (0, 0.5, 1):
            raise SystemExit(f"{where}: {args.label_0_column} is {label}: must be 0, 0.5 or 1")
        status.append(UNLABELLED if missing else TIE if label == 0.5 else RANKED)
        winner.append(0 if label == 1 else 1)
    found = {"_row": pa.array(range(first_row, first_row + len(table)), pa.int64())}
    found |= {"_status": pa.array(status, pa.int8()), "_winner": pa.array(winner, pa.int8())}
    for side, (image, uid) in enumerate(zip(pairs.images, (args.image_0_uid_column, args.image_1_uid_column))):
        uids = columns[uid] if uid in pairs.features else [image_uid(pairs, image, value) for value in columns[image]]
        if not all(isinstance(item, str | int | bytes) and item not in ("", b"") for item in uids):
            where = f"{pairs.where}: row {first_row} of file {file}, or one of the {len(uids) - 1} after it"
            raise SystemExit(f"{where}: {uid} is empty: name another column with --image_{side}_uid_column")
        if uid not in pairs.features:
            found[uid] = pa.array(uids)
        keys = [np.frombuffer(digest(f"{item}|{prompt}"), np.uint64)[0] for item, prompt in zip(uids, prompts)]
        found[f"_key_{side}"] = pa.array(np.array(keys, dtype=np.uint64))
    return found


def digest(text: str | bytes, size: int = 8) -> bytes:
    return hashlib.blake2b(text.encode() if isinstance(text, str) else text, digest_size=size).digest()


def image_uid(pairs: Pairs, column: str, value) -> str:
    """An id for an image without one: of a path with size and date, else of the content."""
    if pairs.is_path(column) and value:
        path = Path(pairs.root, value)
        stat = path.stat() if path.exists() else None
        return digest(f"{value}|{stat and (stat.st_size, stat.st_mtime_ns)}", 16).hex()
    return digest(pairs.bytes_of(value), 16).hex()


def read_index(work: Path, num_files: int, columns: list[str]) -> list[pa.Table]:
    """These columns of every file's index; an empty table for an empty file."""
    tables = []
    for file in range(num_files):
        schema = pq.read_schema(index_file(work, file))
        tables.append(pq.read_table(index_file(work, file), columns=columns if schema.names else []))
    return tables


def shards_to_score(args: ScriptArguments, pairs: Pairs) -> list[dict]:
    """Every (image, prompt) of a ranked pair belongs to the shard where it first stands: so each is scored once, in
    the same batch, whatever other processes do and whatever was interrupted.

    Returns:
        one dict per shard that has any: "file", "shard" (its number in the file), "places": (row in the shard, side)
        of what to score, "keys": uint64 array of the same.
    """
    work = Path(args.output_dir) / "work"
    tables = read_index(work, pairs.num_files, ["_status", "_key_0", "_key_1"])
    parts = []  # per file: (rows, 2) keys, (rows, 2) whether asked
    for table in tables:
        if len(table):
            keys = np.stack([table["_key_0"].to_numpy(), table["_key_1"].to_numpy()], axis=1)
            parts.append((keys, np.repeat(table["_status"].to_numpy()[:, None] == RANKED, 2, axis=1)))
        else:
            parts.append((np.empty((0, 2), np.uint64), np.empty((0, 2), bool)))
    keys = np.concatenate([keys.ravel() for keys, _ in parts])
    asked = np.flatnonzero(np.concatenate([ranked.ravel() for _, ranked in parts]))
    first = np.zeros(len(keys), dtype=bool)
    first[asked[np.unique(keys[asked], return_index=True)[1]]] = True
    shards, start = [], 0
    for file, (file_keys, _) in enumerate(parts):
        file_first = first[start : start + file_keys.size].reshape(-1, 2)
        start += file_keys.size
        for shard in range(math.ceil(len(file_keys) / args.shard_size)):
            rows = slice(shard * args.shard_size, (shard + 1) * args.shard_size)
            places = np.argwhere(file_first[rows])
            if len(places):
                found = file_keys[rows][places[:, 0], places[:, 1]]
                shards.append({"file": file, "shard": shard, "places": places, "keys": found})
    return shards


def shard_tables(args: ScriptArguments, pairs: Pairs, missing: list[tuple]):
    """(shard, facts, its rows with images), each file read through once from the first missing shard on."""
    columns = list(dict.fromkeys([args.prompt_column, *pairs.images]))
    for file in sorted({shard["file"] for shard, _ in missing}):
        wanted = {shard["shard"]: (shard, facts) for shard, facts in missing if shard["file"] == file}
        start = min(wanted)
        tables = pairs.tables(file, columns, start * args.shard_size, args.shard_size)
        for number, table in enumerate(tables, start):
            if number in wanted:
                yield *wanted[number], table
            if number == max(wanted):
                break


def score_shard(args: ScriptArguments, pairs: Pairs, reward, shard: dict, facts: dict, table: pa.Table) -> None:
    started, places = time.time(), shard["places"].tolist()
    images = [pairs.bytes_of(table[pairs.images[side]][row].as_py()) for row, side in places]
    prompts = [table[args.prompt_column][row].as_py() for row, _ in places]
    scores, errors = reward.score(images, prompts, skip_bad=True), [""] * len(places)
    for place, (row, side) in enumerate(places):
        if math.isnan(scores[place]):
            where = f"row {shard['shard'] * args.shard_size + row}"
            where += f" of file {shard['file']}" if pairs.num_files > 1 else ""
            errors[place] = f"{where}: {pairs.images[side]}: {why_bad(images[place])}"
            if args.on_bad_image == "fail":
                raise SystemExit(f"{pairs.where}: {errors[place]}; --on_bad_image skip leaves its pairs out")
            tqdm.write(f"skipped: {errors[place]}", file=sys.stderr)
    columns = {"key": shard["keys"], "score": pa.array(scores, pa.float32()), "error": errors}
    write_table(pa.table(columns), score_file(args, shard), {**facts, "seconds": time.time() - started})


def why_bad(data: bytes) -> str:
    if not data:
        return "no such file, or an empty one"
    try:
        decoded(data)
    except BadImage as error:
        return str(error)
    return "it did not decode"


def read_scores(args: ScriptArguments, pairs: Pairs, shards: list[dict]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sorted keys, their scores (NaN: bad image), and what was wrong with the bad ones."""
    keys, scores, errors = [np.empty(0, np.uint64)], [np.empty(0)], []
    for shard in shards:
        table = pq.read_table(score_file(args, shard))
        keys.append(table["key"].to_numpy())
        scores.append(table["score"].to_numpy().astype(np.float64))
        errors += [error for error in table["error"].to_pylist() if error]
    if errors and args.on_bad_image == "fail":
        raise SystemExit(f"{pairs.where}: {errors[0]}; --on_bad_image skip leaves its pairs out")
    keys, scores = np.concatenate(keys), np.concatenate(scores)
    order = np.argsort(keys)
    return keys[order], scores[order], errors


def describe(counts: dict) -> str:
    return (
        f"{counts['rows']} pairs: {counts['ties']} ties, {counts['without_label']} without a label, "
        f"{counts['with_bad_image']} with an image that does not decode, {counts['ranked']} ranked"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The sorted dataset
# ----------------------------------------------------------------------------------------------------------------------


# Copied from build_synpic.data_file
def data_file(folder: Path, shard: int, shards: list) -> Path:
    return folder / f"train-{shard:05d}-of-{len(shards):05d}.parquet"


def output_features(args: ScriptArguments, pairs: Pairs, with_images: bool) -> Features:
    """The dataset's own columns, ψ of both images, Q and the rank; paths of images become the images."""
    features = {name: pairs.features[name] for name in pairs.light_columns}
    for name in (args.image_0_uid_column, args.image_1_uid_column):
        features.setdefault(name, Value("string"))
    if with_images:
        features |= {name: pairs.features[name] if pairs.is_binary(name) else Image() for name in pairs.images}
    new = {"score_0": "float64", "score_1": "float64", "quality": "float64", "quality_rank": "int64"}
    return Features(features | {name: Value(kind) for name, kind in new.items()})


def kept_rows(args: ScriptArguments, pairs: Pairs, ranking: dict, rank: np.ndarray, file: int, start: int):
    """The kept rows of one file, in its order, with their new columns."""
    work, names = Path(args.output_dir) / "work", output_features(args, pairs, with_images=False)
    names = [name for name in names if name not in ("score_0", "score_1", "quality", "quality_rank")]
    here = rank[start : start + pq.read_metadata(index_file(work, file)).num_rows]
    if not (here >= 0).any():
        return
    size = 100 if args.include_images else 10_000
    images = pairs.tables(file, pairs.images, size=size) if args.include_images else None
    for batch in pq.ParquetFile(index_file(work, file)).iter_batches(size, columns=names):
        table = pa.Table.from_batches([batch])
        pictures = next(images) if images is not None else None
        rows = np.arange(start, start + len(table))
        psi = ranking["psi"][rows]
        lines, winner = np.arange(len(rows)), ranking["winner"][rows]
        new = {
            "score_0": psi[:, 0],
            "score_1": psi[:, 1],
            "quality": pair_quality(psi[lines, winner], psi[lines, 1 - winner]),
            "quality_rank": rank[rows] + 1,
        }
        for name, values in new.items():
            table = table.append_column(name, pa.array(values))
        start += len(table)
        kept = pa.array(rank[rows] >= 0)
        table = table.filter(kept)
        if pictures is not None:
            for name, column in zip(pairs.images, pictures.filter(kept).columns):
                column = column if pairs.is_binary(name) else embedded(pairs, column)
                table = table.append_column(f"_image_of_{name}", column)
        if len(table):
            yield table


def embedded(pairs: Pairs, images: pa.ChunkedArray) -> pa.Array:
    """Paths and Images as Images that hold their files' bytes."""
    values = []
    for value in images.to_pylist():
        path = value["path"] if isinstance(value, dict) else value
        values.append({"bytes": pairs.bytes_of(value), "path": path and os.path.basename(path)})
    return pa.array(values, Image().pa_type)


# ----------------------------------------------------------------------------------------------------------------------
# Figures, card, Hub
# ----------------------------------------------------------------------------------------------------------------------


def draw_figures(args: ScriptArguments, ranking: dict) -> None:
    """Figures 1a and 1b of the paper: the distribution of ψ_w − ψ_l, and Q over the sorted index."""
    folder = Path(args.output_dir) / "figures"
    if (folder / "difference.png").exists() and (folder / "quality.png").exists():
        return
    name = reward_name(args.reward)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.hist(ranking["difference"], bins=100, color="tab:blue")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=f"ψ(winner) − ψ(loser), {name}", ylabel="pairs")
    save_figure(figure, folder / "difference.png")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    shown = np.unique(np.linspace(0, len(ranking["quality"]) - 1, 2000).astype(int))
    axes.plot(shown + 1, ranking["quality"][shown], color="tab:blue")
    axes.axvspan(0, ranking["kept"], color="tab:green", alpha=0.2, label=f"kept: {ranking['kept']}")
    axes.set(xlabel="rank", ylabel=f"Q, {name}")
    axes.legend()
    save_figure(figure, folder / "quality.png")


def save_figure(figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp.png")
    figure.tight_layout()
    figure.savefig(temporary, dpi=100)
    pyplot.close(figure)
    os.replace(temporary, file)


def draw_examples(args: ScriptArguments, pairs: Pairs, ranking: dict, cell: int = 224) -> None:
    """Strips of the best and the worst pairs: winners above, losers below."""
    folder = Path(args.output_dir) / "figures"
    if (folder / "best.png").exists() and (folder / "worst.png").exists():
        return
    work = Path(args.output_dir) / "work"
    starts = np.cumsum([0, *(pq.read_metadata(index_file(work, file)).num_rows for file in range(pairs.num_files))])
    columns = list(dict.fromkeys([args.prompt_column, *pairs.images]))
    number = min(args.num_examples, len(ranking["order"]))
    for name, rows in {"best": ranking["order"][:number], "worst": ranking["order"][::-1][:number]}.items():
        canvas = PILImage.new("RGB", (cell * number, 2 * cell + 22), "white")
        drawing = ImageDraw.Draw(canvas)
        for column, row in enumerate(rows):
            file = int(np.searchsorted(starts, row, side="right")) - 1
            table = next(pairs.tables(file, columns, int(row - starts[file]), size=1))
            winner = ranking["winner"][row]
            for line, side in enumerate((winner, 1 - winner)):
                image = PILImage.open(BytesIO(pairs.bytes_of(table[pairs.images[side]][0].as_py()))).convert("RGB")
                resample = PILImage.NEAREST if max(image.size) < cell else PILImage.LANCZOS
                scale = cell / max(image.size)
                size = [max(1, round(side * scale)) for side in image.size]
                canvas.paste(image.resize(size, resample), (column * cell, line * cell))
            text = table[args.prompt_column][0].as_py()[: cell // 7].encode("latin-1", "replace").decode("latin-1")
            drawing.text((column * cell + 4, 2 * cell + 5), text, fill="black")
        file = folder / f"{name}.png"
        temporary = file.with_name(f".{file.name}.tmp.png")
        canvas.save(temporary)
        os.replace(temporary, file)


# Copied from build_synpic.markdown_table
def markdown_table(header: list[str], lines: list[list]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in cells)


# Copied from build_synpic.size_category
def size_category(n: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if n < bound), "n>1M")


def data_folders(args: ScriptArguments) -> list[str]:
    """Folder of each configuration that is written: `data` has the images."""
    return ["data", "scores"] if args.include_images else ["scores"]


# Copied from build_synpic.dataset_infos
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


def write_card(args: ScriptArguments, pairs: Pairs, ranking: dict) -> None:
    """Writes README.md and statistics.json."""
    output_dir, counts, statistics = Path(args.output_dir), ranking["counts"], ranking["statistics"]
    name, kept = reward_name(args.reward), ranking["kept"]
    source = args.dataset_name or f"{args.winner_dir} and {args.loser_dir}"
    is_hub = bool(args.dataset_name) and not os.path.exists(args.dataset_name)
    against = float((ranking["difference"] <= 0).mean())
    quality = ranking["quality"]
    marks = [
        0,
        *(round(share * (len(quality) - 1)) for share in (0.01, 0.0533, 0.1, 0.25, 0.5, 0.75)),
        len(quality) - 1,
    ]
    sizes = ", ".join(f"{quality[mark]:.4f}" for mark in marks)
    made = ""
    if args.image_0_uid_column not in pairs.features and not pairs.is_path(args.image_0_column):
        made = " (BLAKE2b of the image's file, 16 bytes in hexadecimal)"
    images = (
        ""
        if args.include_images
        else (
            f" The images are not in it: join them from `{source}` by `{args.image_0_uid_column}` and "
            f"`{args.image_1_uid_column}`{made}."
        )
    )
    pictures = ""
    if args.include_images and args.num_examples:
        pictures = """
## Examples

The best pairs, winners above losers:

![The best pairs](figures/best.png)

The worst pairs, where the reward model contradicts the label most:

![The worst pairs](figures/worst.png)
"""
    errors = "".join(f"\n- {error}" for error in ranking["errors"][:20])
    more = f"\n- and {len(ranking['errors']) - 20} more" if len(ranking["errors"]) > 20 else ""
    lines = [
        ["rows read", counts["rows"]],
        ["ties, left out", counts["ties"]],
        ["without a label, left out", counts["without_label"]],
        ["with an image that does not decode, left out", counts["with_bad_image"]],
        ["ranked", counts["ranked"]],
        [f"kept (`--top_fraction {args.top_fraction:g}`)", kept],
    ]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets"))
    which = '"default"' if args.include_images else '"scores"'
    body = f"""{CARD_BEGIN}
# {output_dir.resolve().name}

Preference pairs of `{source}`, sorted by how much a reward model trusts their labels: a Quality Sorted Dataset for
DPO-QSD. Row 1 is the best pair: train in this order, without shuffling.{images}

| column | type | |
|---|---|---|
| `score_0`, `score_1` | float64 | ψ of the first and the second image, in [0, 1], by {name} |
| `quality` | float64 | Q = ψ(winner) · (1 − ψ(loser)) |
| `quality_rank` | int64 | 1 = best |

All other columns are those of the pairs' dataset.

```python
from datasets import load_dataset

dataset = load_dataset("{args.hub_dataset_id or output_dir}", {which}, split="train")
```

## Pairs

{markdown_table(["", "pairs"], lines)}

In {against:.1%} of the ranked pairs the reward model rates the loser at least as high as the winner.{errors}{more}

## Reward

`{json.dumps(statistics)}`: mean and standard deviation of the raw reward over the images of all ranked pairs.

Q at rank 1, at 1 %, 5.33 %, 10 %, 25 %, 50 %, 75 % and at the last: {sizes}.

![Distribution of ψ(winner) − ψ(loser)](figures/difference.png)

![Q over the sorted pairs](figures/quality.png)
{pictures}
## How it was made

Reward `{args.reward}`{f", pairs at commit {args.dataset_revision}" if args.dataset_revision else ""}. {libraries}. Hash
of pairs, order and ψ: {data_hash(output_dir)}.
{CARD_END}
"""
    configs = {
        "default" if folder == "data" else folder: (folder, output_features(args, pairs, folder == "data"))
        for folder in data_folders(args)
    }
    front = {
        "pretty_name": output_dir.resolve().name,
        "language": ["en"],
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(kept)],
        "tags": ["dpo-qsd", "preference", "dpo"],
        **({"source_datasets": [args.dataset_name]} if is_hub else {}),
        "configs": card_configs(configs),
        "dataset_info": dataset_infos(output_dir, configs),
    }
    write_card_file(output_dir / "README.md", front, body)
    write_text(output_dir / "statistics.json", json.dumps({**statistics, **counts, "kept": kept}, indent=2) + "\n")


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


# Copied from build_synpic.card_configs
def card_configs(configs: dict[str, tuple[str, Features]]) -> list[dict]:
    """The card's `configs`; `load_dataset` without a name takes the one called default."""
    return [
        {"config_name": config, "data_files": [{"split": "train", "path": f"{folder}/train-*.parquet"}]}
        for config, (folder, _) in configs.items()
    ]


def data_hash(output_dir: Path) -> str:
    """A hash of what the dataset's files hold: pairs, order, ψ."""
    return shard_facts(min((output_dir / "scores").glob("*.parquet")))["pairs"]


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


# Copied from build_synpic.check_dataset_repo
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


# Copied from build_synpic.DatasetUpload
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


# Copied from build_synpic.publish
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
    transformers_logging.disable_progress_bar()
    main(parse_arguments())
