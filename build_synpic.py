# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate",
#     "datasets",
#     "diffusers",
#     "huggingface_hub",
#     "numpy",
#     "pillow",
#     "protobuf",
#     "pyarrow",
#     "pyyaml",
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

The paper's four generators, ranked by PickScore and CLIPScore, for the first 1,000 prompts of a text file:

    python build_synpic.py --prompts prompts.txt --max_prompts 1000 --rewards pickscore clipscore \
        --output_dir outputs/synpic

Several GPUs, own generators, own reward, prompts of a dataset on the Hub, published:

    accelerate launch build_synpic.py --prompts user/prompts --prompt_column caption \
        --generators recipes/synpic_sdxl.yaml --rewards pickscore my_rewards.py:sharpness \
        --output_dir outputs/synpic --push_to_hub --hub_dataset_id user/synpic

The work is cut into shards under `<output_dir>/work`. Run the same command again after a crash: only what is missing is
done. A generator or a reward added later costs its own shards; then everything is ranked anew.
"""

import gc
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate import PartialState
from datasets import Features, Image, List, Value, load_dataset
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import DatasetCard, HfApi, hf_hub_download
from PIL import Image as PILImage
from PIL import ImageDraw
from scipy.stats import kendalltau
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging
from trl import TrlParser


STAGES = ("generate", "score", "rank", "publish")
REWARDS = ("pickscore", "clipscore")

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
  call: {num_inference_steps: 20, guidance_scale: 4.5, height: 1024, width: 1024}
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
        default_factory=lambda: list(REWARDS),
        metadata={"help": "pickscore, clipscore, file.py:function with function(images, prompts) -> list of float."},
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
# Prompts and recipe
# ----------------------------------------------------------------------------------------------------------------------


def read_prompts(source: str, column: str, split: str, max_prompts: int | None) -> list[dict]:
    """Reads prompts in order and drops duplicates.

    Returns:
        list of the rows (dicts) with "prompt" stripped; other columns of the source stay. Exits with one line that
        names the row if a prompt is empty or the column is missing.
    """
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        rows = [{column: line} for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        try:
            if path.suffix in (".jsonl", ".json", ".parquet") and path.is_file():
                kind = "parquet" if path.suffix == ".parquet" else "json"
                rows = load_dataset(kind, data_files=str(path), split="train")
            elif path.suffix and not path.exists() and path.suffix in (".txt", ".jsonl", ".json", ".parquet"):
                raise FileNotFoundError("no such file")
            else:
                rows = load_dataset(source, split=split)
        except Exception as error:
            raise SystemExit(f"--prompts {source}: cannot be read: {str(error).strip().splitlines()[0]}") from None
        if column not in rows.column_names:
            raise SystemExit(
                f"--prompts {source}: no column {column!r} (--prompt_column); it has {', '.join(rows.column_names)}"
            )
        plain = ("Value",)
        rows = rows.select_columns([name for name, kind in rows.features.items() if type(kind).__name__ in plain])
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
        raise SystemExit(f"{where}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SystemExit(f"{where}: must be a YAML list of generators, each with `name` and `model`")
    for entry in entries:
        unknown = set(entry) - {"name", "model", "load", "call", "prior"}
        if not {"name", "model"} <= set(entry) or unknown:
            raise SystemExit(
                f"{where}: {entry}: needs `name` and `model`; may have `load`, `call`, `prior`"
                + (f"; not {', '.join(sorted(unknown))}" if unknown else "")
            )
        if not str(entry["name"]).replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise SystemExit(f"{where}: name {entry['name']!r} names a folder: use letters, digits, '.', '_' and '-'")
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise SystemExit(f"{where}: two generators share a name: {', '.join(names)}")
    if len(names) < 2:
        raise SystemExit(f"{where}: {len(names)} generator: a ranking needs at least 2 images per prompt")
    return entries


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
                f"{str(error).strip().splitlines()[0]}"
            ) from None


# ----------------------------------------------------------------------------------------------------------------------
# Reward models
# ----------------------------------------------------------------------------------------------------------------------


class FunctionReward:
    """The user's own `function(images, prompts) -> list of float`."""

    def __init__(self, name: str, batch_size: int):
        file, _, function = name.rpartition(":")
        if not file.endswith(".py") or not function:
            raise SystemExit(f"reward {name}: unknown; choose from {', '.join(REWARDS)}, or path/to/file.py:function")
        path = Path(file)
        if not path.is_file():
            raise SystemExit(f"reward {name}: no file {file}")
        spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickling look their module up here
        sys.path.insert(0, str(path.parent.resolve()))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise SystemExit(f"reward {name}: {file} cannot be imported: {error}") from None
        finally:
            sys.path.pop(0)
        if not callable(getattr(module, function, None)):
            raise SystemExit(f"reward {name}: {file} has no function {function!r}")
        self.name, self.function, self.batch_size = name, getattr(module, function), batch_size
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def score(self, images: list, prompts: list[str]) -> list[float]:
        scores = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            found = list(self.function(images[batch], prompts[batch]))
            if len(found) != len(images[batch]):
                raise SystemExit(f"reward {self.name}: {len(found)} scores for {len(images[batch])} images")
            scores += [float(score) for score in found]
        return check_scores(self.name, scores, prompts)


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
        self.model = CLIPModel.from_pretrained(model, dtype=dtype).to(device).eval()
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
            scores = self.model.logit_scale.exp().float() * cosine
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


def load_reward_model(name: str, device="cpu", dtype=torch.float32, batch_size: int = 32):
    """Loads a reward model by name (pickscore, clipscore, path/to/file.py:function).

    Returns:
        an object with `.score(images, prompts) -> list[float]`: PIL images and their prompts, batched inside.
    """
    if name in REWARDS:
        return CLIPReward(name, device, dtype, batch_size)
    return FunctionReward(name, batch_size)


def check_scores(name: str, scores: list[float], prompts: list[str]) -> list[float]:
    for score, prompt in zip(scores, prompts):
        if not math.isfinite(score):
            raise SystemExit(f"reward {name}: the score of prompt {prompt!r} is {score}: it must be a finite number")
    return scores


def reward_name(name: str) -> str:
    """The column of a reward: `shapes/world.py:color_reward` → `color_reward`."""
    return name.rpartition(":")[2]


def check_rewards(names: list[str]) -> None:
    """Exits with one line unless every reward is known; imports the user's own functions."""
    columns = [reward_name(name) for name in names]
    if not columns or len(set(columns)) < len(columns):
        raise SystemExit(f"--rewards {' '.join(names)}: needs one or more, each with a name of its own")
    for name in names:
        if name not in REWARDS:
            FunctionReward(name, batch_size=2)


def probe_rewards(names: list[str], generators: list[dict], prompts: list[str]) -> None:
    """Tries each of the user's functions on two pictures of noise, of the size to come: an error, a wrong count or a
    NaN shows before hours of drawing."""
    last = generators[0].get("prior") or generators[0]
    size = (last.get("call", {}).get("width", 1024), last.get("call", {}).get("height", 1024))
    noise = np.random.default_rng(0).integers(0, 256, (2, size[1], size[0], 3), dtype=np.uint8)
    images = [PILImage.fromarray(pixels) for pixels in noise]
    for name in names:
        if name not in REWARDS:
            try:
                FunctionReward(name, batch_size=2).score(images, (prompts * 2)[:2])
            except Exception as error:
                raise SystemExit(f"reward {name}: fails on a test image: {type(error).__name__}: {error}") from None


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
    except (pa.ArrowException, OSError, KeyError):
        return None


def is_complete(file: Path, ids: list[str]) -> bool:
    facts = shard_facts(file)
    return facts is not None and facts["prompts"] == prompt_digest(ids)


def prompt_digest(ids: list[str]) -> str:
    return hashlib.sha256("".join(ids).encode()).hexdigest()[:16]


def check_settings(folder: Path, settings: dict, what: str) -> None:
    """Refuses to mix two runs: what stands in `folder` must have been made with these settings."""
    record = folder / "settings.json"
    if record.exists():
        previous = json.loads(record.read_text())
        for name in settings:
            if previous.get(name) != settings[name]:
                raise SystemExit(
                    f"{folder} holds {what} made with {name} {previous.get(name)}, not {settings[name]}: "
                    "choose another --output_dir or another name, or delete that folder"
                )


def write_settings(folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".settings.tmp{os.getpid()}"
    temporary.write_text(json.dumps(settings, indent=2))
    os.replace(temporary, folder / "settings.json")


def run_settings(args: ScriptArguments) -> dict:
    return {"seed": args.seed, "image_format": args.image_format, "shard_size": args.shard_size}


def reward_settings(name: str) -> dict:
    if name in REWARDS:
        return {"reward": CLIPReward.MODELS[name][0]}
    return {"reward": name.rpartition("/")[2], "sha256": FunctionReward(name, batch_size=1).identity}


def check_work(args: ScriptArguments, prompts: list[dict], generators: list[dict]) -> None:
    """Exits with one line if the output folder holds another run: other files, prompts or settings. Writes nothing."""
    output_dir, work = Path(args.output_dir), Path(args.output_dir) / "work"
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (work / "settings.json").exists():
        raise SystemExit(f"--output_dir {output_dir} holds other files: choose another folder")
    check_settings(work, run_settings(args), "a run")
    if (work / "prompts.json").exists():
        previous = json.loads((work / "prompts.json").read_text())
        wanted = [row["prompt"] for row in prompts]
        shared = min(len(previous), len(wanted))
        if previous[:shared] != wanted[:shared]:
            raise SystemExit(f"--output_dir {output_dir} holds a run on other prompts: choose another folder")
    for entry in generators:
        check_settings(work / "images" / entry["name"], entry, f"images of {entry['name']}")
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
        kwargs = dict(part.get("load", {}))
        dtype = kwargs.pop("dtype", "float32")
        # Half precision is for GPUs: on a CPU it is slower, and for some layers missing.
        kwargs["dtype"] = getattr(torch, dtype) if torch.device(device).type != "cpu" else torch.float32
        pipeline = DiffusionPipeline.from_pretrained(part["model"], **kwargs).to(device)
        pipeline.set_progress_bar_config(disable=True)
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


def generate(args: ScriptArguments, rows: list[dict], shards: list[range], generators: list[dict], state) -> None:
    """Draws what is missing: for each generator (loaded once, then freed) its image shards."""
    for entry in generators:
        folder = Path(args.output_dir) / "work" / "images" / entry["name"]
        write_settings(folder, entry)
        ids = [[rows[i]["prompt_id"] for i in shard] for shard in shards]
        missing = [s for s in range(len(shards)) if not is_complete(shard_file(folder, s), ids[s])]
        mine = missing[state.process_index :: state.num_processes]
        if not mine:
            continue
        draw = Generator(entry, state.device)
        progress = tqdm(
            total=sum(len(shards[s]) for s in mine),
            desc=f"draw {entry['name']}",
            unit="image",
            disable=not state.is_local_main_process,
        )
        for s in mine:
            started, images, seeds = time.time(), [], []
            for start in range(0, len(shards[s]), args.generation_batch_size):
                batch = [rows[i] for i in shards[s]][start : start + args.generation_batch_size]
                drawn = [image_seed(args.seed, row["prompt_id"], entry["name"]) for row in batch]
                images += [encode_image(im, args.image_format) for im in draw([row["prompt"] for row in batch], drawn)]
                seeds += drawn
                progress.update(len(batch))
            table = pa.table({"prompt_id": ids[s], "image": pa.array(images, pa.binary()), "seed": seeds})
            facts = {"prompts": prompt_digest(ids[s]), "seconds": time.time() - started}
            write_table(table, shard_file(folder, s), facts)
        progress.close()
        del draw
        gc.collect()
        torch.cuda.empty_cache()
    state.wait_for_everyone()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.parquet"


def score(args: ScriptArguments, rows: list[dict], shards: list[range], generators: list[dict], state) -> None:
    """Scores what is missing: for each reward model (loaded once, then freed) and generator the score shards."""
    work = Path(args.output_dir) / "work"
    dtype = torch.float32 if state.device.type == "cpu" else torch.bfloat16
    for name in args.rewards:
        folder = work / "scores" / reward_name(name)
        write_settings(folder, reward_settings(name))
        missing = []
        for entry in generators:
            for s, shard in enumerate(shards):
                ids = [rows[i]["prompt_id"] for i in shard]
                if not is_complete(shard_file(folder / entry["name"], s), ids):
                    missing.append((entry["name"], s, ids))
        mine = missing[state.process_index :: state.num_processes]
        if not mine:
            continue
        reward = load_reward_model(name, state.device, dtype, args.reward_batch_size)
        progress = tqdm(
            total=sum(len(ids) for _, _, ids in mine),
            desc=f"score {reward_name(name)}",
            unit="image",
            disable=not state.is_local_main_process,
        )
        for generator, s, ids in mine:
            source = shard_file(work / "images" / generator, s)
            if not is_complete(source, ids):
                raise SystemExit(f"{source} is missing: run the generate stage first")
            started = time.time()
            images = [PILImage.open(BytesIO(data)) for data in pq.read_table(source)["image"].to_pylist()]
            scores = reward.score(images, [rows[i]["prompt"] for i in shards[s]])
            table = pa.table({"prompt_id": ids, "score": pa.array(scores, pa.float32())})
            facts = {"prompts": prompt_digest(ids), "seconds": time.time() - started}
            write_table(table, shard_file(folder / generator, s), facts)
            progress.update(len(ids))
        progress.close()
        del reward
        gc.collect()
        torch.cuda.empty_cache()
    state.wait_for_everyone()


def rank(args: ScriptArguments, rows: list[dict], shards: list[range], generators: list[dict], state) -> None:
    """Joins images and scores into the dataset's shards; a shard whose parts did not change is left alone."""
    work, data = Path(args.output_dir) / "work", Path(args.output_dir) / "data"
    names, rewards = [entry["name"] for entry in generators], [reward_name(name) for name in args.rewards]
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
    for s in range(state.process_index, len(shards), state.num_processes):
        ids = [rows[i]["prompt_id"] for i in shards[s]]
        images = {name: shard_file(work / "images" / name, s) for name in names}
        scores = {(r, name): shard_file(work / "scores" / r / name, s) for r in rewards for name in names}
        for file in [*images.values(), *scores.values()]:
            if not is_complete(file, ids):
                raise SystemExit(f"{file} is missing: run the generate and score stages first")
        parts = [(str(f.relative_to(work)), f.stat().st_mtime_ns) for f in [*images.values(), *scores.values()]]
        facts = {"prompts": prompt_digest(ids), "parts": hashlib.sha256(json.dumps(parts).encode()).hexdigest()}
        target = data / f"train-{s:05d}-of-{len(shards):05d}.parquet"
        if shard_facts(target) == facts:
            continue
        drawn = {name: pq.read_table(file).to_pydict() for name, file in images.items()}
        scored = {key: pq.read_table(file)["score"].to_pylist() for key, file in scores.items()}
        table = []
        for position, i in enumerate(shards[s]):
            matrix = np.array([[scored[r, name][position] for name in names] for r in rewards])
            table.append(
                {
                    "prompt_id": rows[i]["prompt_id"],
                    "prompt": rows[i]["prompt"],
                    "images": [
                        {
                            "bytes": drawn[name]["image"][position],
                            "path": f"{rows[i]['prompt_id']}_{name}.{args.image_format}",
                        }
                        for name in names
                    ],
                    "generators": names,
                    "seeds": [drawn[name]["seed"][position] for name in names],
                    "scores": {r: matrix[j].tolist() for j, r in enumerate(rewards)},
                    "preference_probability": preference_probability(matrix).tolist(),
                    "rank": preference_rank(matrix).tolist(),
                }
            )
        write_table(pa.Table.from_pylist(table, schema=features.arrow_schema), target, facts, row_group_size=20)
    state.wait_for_everyone()
    if state.is_main_process:
        expected = {f"train-{s:05d}-of-{len(shards):05d}.parquet" for s in range(len(shards))}
        for file in data.glob("*.parquet"):
            if file.name not in expected:  # of a run on fewer or more prompts
                file.unlink()
        write_card(args, rows, generators, names, rewards)
    state.wait_for_everyone()


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
            taus.append([[kendalltau(a, b).statistic for b in matrix] for a in matrix])
    return {"win_rate": np.mean(wins, axis=0), "tau": np.nanmean(np.array(taus), axis=0)}


def work_seconds(folder: Path) -> float:
    return sum((shard_facts(file) or {}).get("seconds", 0.0) for file in folder.rglob("*.parquet"))


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


def write_card(args: ScriptArguments, rows, generators: list[dict], names: list[str], rewards: list[str]) -> None:
    """Writes README.md and grid.png. What a person added to the card's front matter stays."""
    output_dir = Path(args.output_dir)
    statistics = dataset_statistics(output_dir, rewards)
    temporary = output_dir / ".grid.tmp.png"
    grid_picture(output_dir, names).save(temporary)
    os.replace(temporary, output_dir / "grid.png")

    times = [[f"images of {name}", work_seconds(output_dir / "work" / "images" / name)] for name in names]
    times += [[f"scores of {reward}", work_seconds(output_dir / "work" / "scores" / reward)] for reward in rewards]
    total = sum(seconds for _, seconds in times)
    rate = args.gpu_hourly_cost
    lines = [
        [what, f"{seconds / 3600:.3f}"] + ([f"{seconds / 3600 * rate:.2f}"] if rate else [])
        for what, seconds in [*times, ["total", total]]
    ]
    header = ["work", "hours x processes"] + ([f"cost in $ (at {rate} an hour)"] if rate else [])
    wins = [
        [label, *(f"{value:.3f}" for value in line)]
        for label, line in zip([*rewards, "all: preference probability"], statistics["win_rate"])
    ]
    taus = [[reward, *(f"{value:.2f}" for value in line)] for reward, line in zip(rewards, statistics["tau"])]
    recipe = yaml.safe_dump(generators, sort_keys=False)
    body = f"""
# {output_dir.name}

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

dataset = load_dataset("{args.hub_dataset_id or output_dir}", split="train")
```

## Share of comparisons won

{markdown_table(["reward", *names], wins)}

## Agreement between rewards (Kendall's tau)

{markdown_table(["", *rewards], taus)}

## Time and cost

{markdown_table(header, lines)}

## Generators

```yaml
{recipe.strip()}
```

Rewards: {", ".join(f"`{name}`" for name in args.rewards)}. Seed {args.seed}.
"""
    readme = output_dir / "README.md"
    data = DatasetCard.load(readme).data.to_dict() if readme.exists() else {}
    own = {
        "pretty_name": output_dir.name,
        "language": ["en"],
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(len(rows))],
        "tags": ["synpic", "rankdpo", "preference", "synthetic"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    front = yaml.safe_dump({**own, **data, "size_categories": own["size_categories"]}, sort_keys=False)
    temporary = output_dir / ".README.tmp"
    temporary.write_text(f"---\n{front}---\n{body}")
    os.replace(temporary, readme)


def size_category(n: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if n < bound), "n>1M")


def publish(args: ScriptArguments) -> None:
    """Uploads data, card and picture; files the repository has already are not sent again."""
    api = HfApi()
    api.create_repo(args.hub_dataset_id, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
    api.upload_folder(
        repo_id=args.hub_dataset_id,
        repo_type="dataset",
        folder_path=args.output_dir,
        allow_patterns=["data/*.parquet", "README.md", "grid.png"],
        commit_message="Syn-Pic dataset",
    )
    print(f"published: https://huggingface.co/datasets/{args.hub_dataset_id}")


def main(args: ScriptArguments) -> None:
    # Everything that can be wrong with flags, files and folders is found here, before a model is loaded.
    generators = read_generators(args.generators)
    check_rewards(args.rewards)
    rows = read_prompts(args.prompts, args.prompt_column, args.prompt_split, args.max_prompts)
    check_work(args, rows, generators)
    for entry in generators:
        check_generator(entry)
    probe_rewards(args.rewards, generators, [row["prompt"] for row in rows])
    rows = [{"prompt": row["prompt"], "prompt_id": prompt_id(row["prompt"])} for row in rows]
    shards = [range(i, min(i + args.shard_size, len(rows))) for i in range(0, len(rows), args.shard_size)]

    state = PartialState(timeout=timedelta(hours=12)) if "RANK" in os.environ else PartialState()
    work = Path(args.output_dir) / "work"
    if state.is_main_process:
        write_settings(work, run_settings(args))
        temporary = work / ".prompts.tmp"
        temporary.write_text(json.dumps([row["prompt"] for row in rows]))
        os.replace(temporary, work / "prompts.json")
    state.wait_for_everyone()
    if "generate" in args.stages:
        generate(args, rows, shards, generators, state)
    if "score" in args.stages:
        score(args, rows, shards, generators, state)
    if "rank" in args.stages:
        rank(args, rows, shards, generators, state)
    if "publish" in args.stages and args.push_to_hub and state.is_main_process:
        publish(args)
    if state.is_main_process:
        print(f"{len(rows)} prompts x {len(generators)} images in {args.output_dir}")


if __name__ == "__main__":
    diffusers_logging.disable_progress_bar()  # of loading weights; downloads and our own work show theirs
    transformers_logging.disable_progress_bar()
    parser = TrlParser(ScriptArguments)
    (script_args,) = parser.parse_args_and_config()
    main(script_args)
