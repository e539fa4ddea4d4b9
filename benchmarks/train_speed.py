# SPDX-License-Identifier: Apache-2.0
"""How much a training step costs, counted and timed: the RankDPO trainers, and diffusers' Diffusion-DPO script.

Counted, without weights and without a GPU, at full size (1024², 4 images a prompt, rank 64):

    python benchmarks/train_speed.py --flops --peer path/to/train_diffusion_dpo_sdxl.py
    python benchmarks/train_speed.py --flops --families zimage --resolution 768

Memory, counted: the largest sum of all tensors that a training step holds at once, at each operation of the step, for
SDXL, SD3, SD1.5 and Z-Image, 1, 2 and 4 prompts (or pairs) in a step, with and without gradient checkpointing, bf16 and
nf4:

    python benchmarks/train_speed.py --memory --json outputs/memory.json

Timed, ours and the peer in turn, each started as a user starts it, with random weights: full size on a GPU, on a CPU a
UNet of a fifth of the width with SDXL's depth and text width, at 256²:

    python benchmarks/train_speed.py --peer path/to/train_diffusion_dpo_sdxl.py --json outputs/train_speed.json

Ours alone, SDXL and SD3, batch after batch until memory ends, with and without gradient checkpointing:

    python benchmarks/train_speed.py --sweep --json outputs/sweep.json

The peer is a copy of examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py of diffusers. It stays where
it is. Only the steps are timed, from the dates that both scripts' TensorBoard logs carry; ours has then encoded the
images, the peer encodes them in every step. Nothing is downloaded.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from unittest import mock


os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from datasets import Dataset, Features, Image, List, Value  # noqa: E402
from PIL import Image as PILImage  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402


K = 4  # images of a prompt: two pairs of the peer's
SCRIPTS = {"sdxl": "train_rankdpo_sdxl", "sd3": "train_rankdpo_sd3", "sd15": "train_dpo_qsd"}
SCRIPTS |= {"zimage": "train_rankdpo_zimage"}
PLAIN_ATTENTION = F.scaled_dot_product_attention
CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
HAS_WANDB = importlib.util.find_spec("wandb") is not None  # the peer imports it; an empty module is enough
SETTINGS = ("step", "checkpointing")  # of a count: without and with gradient checkpointing
REPEATS = (1, 2, 4, 10)  # epochs, or runs, that share what is computed once
WARM_UP = 2  # steps that are not timed
# scaled: a fifth of SDXL's width, with a VAE of a quarter and one layer of each text encoder, so that these have about
# the share of a step's FLOPs that they have at full size. zimage: what differs from the class's own sizes.
SIZES = {
    "full": {"resolution": 1024, "channels": (320, 640, 1280), "heads": (5, 10, 20), "depths": (1, 2, 10)}
    | {"vae": (128, 256, 512, 512), "text": ((768, 12, 12), (1280, 32, 20)), "sd3": (24, 24), "zimage": {}},
    "scaled": {"resolution": 256, "channels": (64, 128, 256), "heads": (1, 2, 4), "depths": (1, 2, 10)}
    | {"vae": (32, 64, 128, 128), "text": ((768, 1, 12), (1280, 1, 20)), "sd3": (12, 5)}
    | {"zimage": {"dim": 640, "n_heads": 5, "n_kv_heads": 5}},
    "tiny": {"resolution": 64, "channels": (32, 64, 64), "heads": (1, 2, 2), "depths": (1, 1, 1)}
    | {"vae": (32, 32, 32, 32), "text": ((32, 1, 2), (32, 1, 2)), "sd3": (2, 1)}
    | {"zimage": {"dim": 128, "n_heads": 1, "n_kv_heads": 1, "n_layers": 2, "cap_feat_dim": 32}},
}


# ----------------------------------------------------------------------------------------------------------------------
# Counting
# ----------------------------------------------------------------------------------------------------------------------


def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Attention as a GPU computes it in half precision: by the kernel whose backward pass computes the scores again.
    The meta device by itself takes the plain formula, which keeps them: less to compute, far more to store."""
    if attn_mask is None and query.shape[-1] <= 256:  # the kernel's largest head
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def count(run: Callable, *arguments) -> float:
    """TFLOP of a call: matrix products, convolutions and attention, of its backward pass too."""
    with mock.patch.object(F, "scaled_dot_product_attention", flash_attention):
        with FlopCounterMode(display=False) as counter:
            run(*arguments)
    return counter.get_total_flops() / 1e12


def load_without_weights(
    cls, folder=None, *, pretrained_model_name_or_path=None, subfolder="", dtype=None, device="meta", **_
):
    """Takes the place of `from_pretrained`: the model of a configuration, on the meta device."""
    folder = Path(pretrained_model_name_or_path or folder, subfolder or "")
    torch.set_default_dtype(dtype or torch.float32)
    with torch.device(device):
        if issubclass(cls, diffusers.ModelMixin):
            model = cls.from_config(cls.load_config(folder))
        else:
            model = cls(cls.config_class.from_pretrained(folder))
    torch.set_default_dtype(torch.float32)
    return model.eval()


@contextmanager
def without_weights(device: str = "meta") -> Iterator[None]:
    """In this block all models have shapes and no values."""
    load = classmethod(partial(load_without_weights, device=device))
    with mock.patch.object(diffusers.ModelMixin, "from_pretrained", load):
        with mock.patch.object(transformers.PreTrainedModel, "from_pretrained", load):
            yield


def make_batch(family: str, model, resolution: int, rows: int = 1, device: str = "meta") -> dict[str, torch.Tensor]:
    """Prompts with their images (SD1.5: pairs), as the trainer's loop gets them, without values."""
    config, size, k = model.config, resolution // 8, 2 if family == "sd15" else K
    with torch.device(device):
        latents = torch.empty(rows, k, config.in_channels, size, size)
        batch = {"latents": latents, "noise": latents, "phi": torch.empty(rows, k)}
        batch["rank"] = torch.ones(rows, k, dtype=torch.long)
        if family == "sd3":
            batch |= {"sigmas": torch.empty(rows), "clip_embeds": torch.empty(rows, 77, config.pooled_projection_dim)}
            batch["t5_embeds"] = torch.empty(rows, 256, config.joint_attention_dim)
            return batch | {"pooled_prompt_embeds": torch.empty(rows, config.pooled_projection_dim)}
        if family == "zimage":  # captions of 64 tokens, those of the template included
            prompts = {f"prompt_{row}": torch.empty(1, 64, config.cap_feat_dim) for row in range(rows)}
            return batch | prompts | {"sigmas": torch.empty(rows)}
        batch["timesteps"] = torch.ones(rows, dtype=torch.long)
        batch["prompt_embeds"] = torch.empty(rows, 77, config.cross_attention_dim)
        if family == "sdxl":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            batch |= {"time_ids": torch.empty(rows, k, 6), "pooled_prompt_embeds": torch.empty(rows, pooled)}
    return batch


def count_ours(family: str, folder: Path, rank: int, resolution: int, settings: tuple = SETTINGS) -> dict[str, float]:
    """TFLOP an image of a training step in these settings; of what no step can do without: `reference` (a forward of
    the base model), `lora` (a forward and backward with the LoRA), `floor` (both); of a step with `compile`, whose
    reference computes the LoRA, too; and of the VAE, `encode`, before the training."""
    script = importlib.import_module(SCRIPTS[family])
    flags = ["--pretrained_model_name_or_path", str(folder), "--dataset_name", "none"]
    args = script.parse_arguments([*flags, "--rank", str(rank), "--resolution", str(resolution)])
    getattr(script, "set_defaults", lambda args: None)(args)
    with without_weights():
        noise_scheduler, model = script.load_model(args)
    place = types.SimpleNamespace(device=torch.device("meta"))
    script.prepare_model(args, types.SimpleNamespace(checkpoint=None, accelerator=place), model)
    calls = []
    model.register_forward_pre_hook(lambda _, *inputs: calls.append(inputs), with_kwargs=True)
    batch = make_batch(family, model, resolution)
    step, images = (our_step, script, model, noise_scheduler, batch, args), batch["latents"].shape[1]
    counted = {}
    for setting in (name for name in SETTINGS if name in settings):
        if setting == "checkpointing":
            model.enable_gradient_checkpointing()
        counted[setting] = count(*step) / images
    model.disable_gradient_checkpointing()
    inputs = calls[0]  # what the script gives to the model
    counted["lora"] = count(forward_and_backward, model, inputs) / images
    counted["compile"] = counted["lora"] + count(forward, model, inputs) / images
    model.disable_adapters()
    counted["reference"] = count(forward, model, inputs) / images
    with without_weights():
        vae = script.load_pipeline(args, torch.device("meta"), with_text=False).vae
    pixels = torch.empty(1, 3, resolution, resolution, device="meta")
    counted["encode"] = count(encode_images, vae, pixels)
    return counted | {"floor": counted["reference"] + counted["lora"]}


@torch.no_grad()
def encode_images(vae, pixels: torch.Tensor) -> None:
    """As the trainers do it before the training."""
    vae.encode((pixels.to(vae.device).float() / 127.5 - 1.0).to(vae.dtype))


def repeated(counted: dict[str, float], n: int) -> tuple[float, float]:
    """TFLOP per trained image, with its encoding: of one run of n epochs, whose noises all differ, so that the
    reference computes them all; and of n runs of one epoch, which share the reference's errors (--precompute_ref)."""
    epochs = counted["floor"] + counted["encode"] / n
    return epochs, counted["lora"] + (counted["reference"] + counted["encode"]) / n


def our_step(script, model, noise_scheduler, batch: dict, args) -> None:
    loss, _ = script.training_step(model, model, noise_scheduler, batch, args)
    loss.backward()


def forward_and_backward(model, inputs: tuple[tuple, dict]) -> None:
    positional, named = inputs
    sample = model(*positional, **named).sample  # a tensor, or of Z-Image a list
    torch.stack([*sample]).square().mean().backward()


@torch.no_grad()
def forward(model, inputs: tuple[tuple, dict]) -> None:
    positional, named = inputs
    model(*positional, **named)


class StepDone(Exception):
    """The peer reads its loss: its first step is over."""


def stop_at_loss(tensor: torch.Tensor, item: Callable = torch.Tensor.item):
    if tensor.is_meta:
        raise StepDone
    return item(tensor)


def count_peer(file: Path, flags: list[str], images: int) -> float:
    """TFLOP an image of the first step of the peer's own `main`, on the meta device. The step is complete when the peer
    reads the loss, which on this device has no value."""
    peer = import_peer(file)
    device = property(lambda accelerator: torch.device("meta"))
    with without_weights(), mock.patch.object(Accelerator, "device", device):
        with mock.patch.object(torch.Tensor, "item", stop_at_loss), redirect_stderr(StringIO()):
            return count(run_to_loss, peer, flags) / images


def run_to_loss(peer, flags: list[str]) -> None:
    try:
        peer.main(peer.parse_args(flags))
    except StepDone:
        return
    raise SystemExit(f"--peer {peer.__file__}: it ended without a step")


def import_peer(file: Path):
    if not HAS_WANDB:
        sys.modules["wandb"] = types.ModuleType("wandb")
    spec = importlib.util.spec_from_file_location("peer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_settings(options, work: Path) -> dict[str, list[str]]:
    """The settings of the peer that are counted. In its README's the rank is 8, and the VAE is another one."""
    rank, checkpointing = ["--rank", str(options.rank)], ["--gradient_checkpointing"]
    vae = ["--pretrained_vae_model_name_or_path", str(work / "sdxl" / "vae")]
    return {"step": rank, "checkpointing": [*rank, *checkpointing], "readme": ["--rank", "8", *checkpointing, *vae]}


def resolution_of(options, family: str) -> int:
    return options.resolution // (2 if family == "sd15" else 1)


def count_all(options, work: Path, families: list[str], settings: tuple) -> dict:
    """Counts the trainers and the peer, prints and returns the figures."""
    found = {}
    for family in families:
        make_model(work / family, family, options.size, None)
        resolution = resolution_of(options, family)
        found[family] = ours = count_ours(family, work / family, options.rank, resolution, settings)
        parts = f"{ours['reference']:.4g} for the reference and {ours['lora']:.4g} for the LoRA"
        for name, setting in {"step": "no checkpointing", "checkpointing": "checkpointing"}.items():
            if name in ours:
                print(f"{SCRIPTS[family]}: {ours[name]:.4g} TFLOP an image (rank {options.rank}, {setting})")
        print(f"    floor {ours['floor']:.4g}: {parts}; with --compile {ours['compile']:.4g}")
        for n in REPEATS:
            epochs, runs = repeated(ours, n)
            print(f"    with the VAE: {epochs:.4g} in {n} epochs; {runs:.4g} in {n} runs with --precompute_ref")
    if options.peer:
        make_datasets(work, 2, options.resolution)
        ours, found["peer"], found["ratios"] = found["sdxl"], {}, {}
        titles = {
            "step": (f"rank {options.rank}, no checkpointing", "the same"),
            "checkpointing": (f"rank {options.rank}, checkpointing", "the same"),
            "readme": ("its README's setting: rank 8, checkpointing", f"ours at rank {options.rank} without it"),
        }
        for name, flags in peer_settings(options, work).items():
            if name in settings:
                flags = [*peer_flags(work, work / f"peer-{name}", options.resolution, 1), *flags]
                found["peer"][name] = tflop = count_peer(options.peer, flags, K)
                found["ratios"][name] = ratio = tflop / ours["step" if name == "readme" else name]
                setting, other = titles[name]
                print(f"{options.peer.stem}: {tflop:.4g} TFLOP an image ({setting}); {ratio:.2f} times {other}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def sizes_only() -> Iterator[None]:
    """In this block tensors are made and computed without values, as if on a CPU, and models have no weights."""
    stay = mock.patch.object(torch.nn.Module, "to", lambda model, *_, **__: model)  # these tensors cannot be exchanged
    no_value = mock.patch.object(torch.Tensor, "item", lambda tensor: 0.0)
    with FakeTensorMode(allow_non_fake_inputs=True), without_weights("cpu"), stay, no_value:
        yield


class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of the tensors that exist after each operation, and keeps the largest sum. What an operation
    takes inside and gives back is not seen."""

    def __init__(self, existing: Iterator[torch.Tensor]):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()
        for tensor in existing:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:  # views share one
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        for value in tree_leaves(returned):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return returned


@contextmanager
def operations_of_a_gpu() -> Iterator[None]:
    """In this block autocast on a CPU chooses types as it does on a GPU, where normalisations compute in float32, and
    attention is one kernel."""

    def in_float32(function: Callable) -> Callable:
        def call(*args, **options):
            if torch.is_autocast_enabled("cpu"):
                args = [value.float() if torch.is_tensor(value) else value for value in args]
                options = {name: value.float() if torch.is_tensor(value) else value for name, value in options.items()}
            return function(*args, **options)

        return call

    def half_attention(query, key, value, *args, **options):
        return flash_attention(*(tensor.to(torch.bfloat16) for tensor in (query, key, value)), *args, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", half_attention):
        with mock.patch.object(F, "layer_norm", in_float32(F.layer_norm)):
            with mock.patch.object(F, "group_norm", in_float32(F.group_norm)):
                yield


def count_memory(family: str, folder: Path, rank: int, resolution: int, rows: int, checkpointing: bool) -> dict:
    """Gigabytes of a training step in bf16, the second of two whose gradients add up.

    Returns:
        `weights` (frozen), `nf4` (the same with --base_precision nf4), `lora` (its parameters and gradients, float32),
        `adam` and `adam_8bit` (the states of the optimizer), `activations` (all else at the peak), `peak` (with AdamW
        and bf16 weights) and `least` (with 8-bit AdamW and nf4).
    """
    script = importlib.import_module(SCRIPTS[family])
    flags = ["--pretrained_model_name_or_path", str(folder), "--dataset_name", "none", "--mixed_precision", "bf16"]
    args = script.parse_arguments([*flags, "--rank", str(rank), "--resolution", str(resolution)])
    args.gradient_checkpointing = checkpointing
    script.check_model(args)
    with sizes_only():
        noise_scheduler, model = script.load_model(args)
        place = types.SimpleNamespace(device=torch.device("cpu"))
        script.prepare_model(args, types.SimpleNamespace(checkpoint=None, accelerator=place), model)
        batch = make_batch(family, model, resolution, rows, "cpu")
        existing = itertools.chain(model.parameters(), model.buffers(), batch.values())
        with operations_of_a_gpu(), LiveTensors(existing) as tensors:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss, _ = script.training_step(model, model, noise_scheduler, batch, args)
                loss.backward()
                del loss
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    linear = sum(layer.weight.numel() for layer in model.modules() if is_quantised(layer))
    weights = sum(parameter.numel() for parameter in frozen) * 2
    found = {
        "weights": weights,
        "nf4": weights + linear * (1 / 2 + 4 / 64 - 2),  # 4 bits, and a float32 scale for every 64 values
        "lora": trained * (4 + 4),
        "adam": trained * 8,
        "adam_8bit": trained * (2 + 2 * 4 / 256),  # a float32 scale for every 256 values
        "activations": tensors.peak - weights - trained * 8,
    }
    found["peak"] = found["weights"] + found["lora"] + found["adam"] + found["activations"]
    found["least"] = found["nf4"] + found["lora"] + found["adam_8bit"] + found["activations"]
    return {name: value / 1e9 for name, value in found.items()}


def is_quantised(layer: torch.nn.Module) -> bool:
    """Whether --base_precision quantises a layer: the linear ones of the frozen model."""
    return isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad


def count_encoding(family: str, folder: Path, resolution: int, images: int) -> float:
    """Gigabytes of the VAE while it encodes so many images at once: SDXL's in bf16, as with the recipes'
    --pretrained_vae_model_name_or_path, SD1.5's in float32."""
    script = importlib.import_module(SCRIPTS[family])
    flags = ["--pretrained_model_name_or_path", str(folder), "--dataset_name", "none", "--mixed_precision", "bf16"]
    flags += ["--pretrained_vae_model_name_or_path", str(folder / "vae")] if family == "sdxl" else []
    args = script.parse_arguments([*flags, "--resolution", str(resolution)])
    getattr(script, "set_defaults", lambda args: None)(args)
    with sizes_only():
        vae = script.load_pipeline(args, torch.device("cpu"), with_text=False).vae
        pixels = torch.empty(images, 3, resolution, resolution, dtype=torch.uint8)
        with mock.patch.object(F, "scaled_dot_product_attention", flash_attention):
            with LiveTensors(itertools.chain(vae.parameters(), [pixels])) as tensors:
                encode_images(vae, pixels)
    return tensors.peak / 1e9


def memory_table(options, work: Path) -> dict:
    """Counts and prints the memory of all settings."""
    found = {}
    for family in options.families or SCRIPTS:
        resolution = resolution_of(options, family)
        make_model(work / family, family, options.size, None)
        found[family] = rows = []
        encoding = {images: count_encoding(family, work / family, resolution, images) for images in (1, 4)}
        vae = ", ".join(f"{gigabytes:.1f} GB with {images} at once" for images, gigabytes in encoding.items())
        print(f"\n{SCRIPTS[family]}, {family} at {resolution}², rank {options.rank}; encoding images: {vae}")
        print("| in a step | checkpointing | weights | nf4 | LoRA, gradients | activations | peak | 8-bit | and nf4 |")
        print("|---|---|---|---|---|---|---|---|---|")
        for batch, checkpointing in itertools.product(options.batches, (False, True)):
            row = count_memory(family, work / family, options.rank, resolution, batch, checkpointing)
            rows.append({"batch": batch, "checkpointing": checkpointing, **row, "encoding": encoding})
            eight = row["peak"] - row["adam"] + row["adam_8bit"]
            values = [row[name] for name in ("weights", "nf4", "lora", "activations", "peak")] + [eight, row["least"]]
            cells = [f"{batch} x {2 if family == 'sd15' else K}", "yes" if checkpointing else "no"]
            print(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in values)])} |", flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Timing
# ----------------------------------------------------------------------------------------------------------------------


def step_ends(folder: Path) -> list[float]:
    """When each step was logged, in seconds: the dates of the loss in a run's TensorBoard files."""
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "loss" in events.Tags()["scalars"]:
            return [event.wall_time for event in events.Scalars("loss")]
    return []


def taken_memory() -> int:
    """Bytes of the GPU's memory that are taken, by whatever process."""
    free, total = torch.cuda.mem_get_info() if CUDA else (0, 0)
    return total - free


def timed_run(command: list, folder: Path, images: int) -> dict:
    """Runs a trainer in a process of its own.

    Returns:
        of its steps after the first ones images/s and, which other processes disturb less, CPU seconds an image; of the
        whole process the seconds and the peak of the GPU's memory in GB; and why it failed, if it did.
    """
    environment, stubs = dict(os.environ), folder.parent / "stubs"
    if not HAS_WANDB:
        stubs.mkdir(parents=True, exist_ok=True)
        (stubs / "wandb.py").touch()
        environment["PYTHONPATH"] = str(stubs)
    torch.cuda.empty_cache()  # what made the model
    before, started, watched, peak = taken_memory(), time.time(), [], 0
    with open(folder.with_suffix(".log"), "w+") as console:
        command = list(map(str, command))
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=console)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                used = process.cpu_times()
                watched.append((time.time(), used.user + used.system))
            peak = max(peak, taken_memory() - before)
            time.sleep(0.05)
        console.seek(0)
        lines = [line.strip() for line in console if line.strip()]
    row = {"images_per_second": None, "cpu_seconds_per_image": None, "seconds": time.time() - started}
    row["peak_memory_gb"] = peak / 1e9 if CUDA else None
    if process.returncode:
        return row | {"failed": next((line for line in lines if "out of memory" in line), (lines or ["?"])[-1])[:300]}
    ends = step_ends(folder)[WARM_UP - 1 :]
    images *= len(ends) - 1
    row["images_per_second"] = images / (ends[-1] - ends[0])
    row["cpu_seconds_per_image"] = float(np.diff(np.interp([ends[0], ends[-1]], *zip(*watched)))[0]) / images
    return row


def our_flags(work: Path, output: Path, family: str, resolution: int, batch: int) -> list:
    """What both trainers need for a run without anything beside its steps, but for one small gallery at the end."""
    return [
        *("--pretrained_model_name_or_path", work / family, "--dataset_name", work / "ranked"),
        *("--cache_dir", work / f"cache-{family}", "--output_dir", output, "--resolution", resolution),
        *("--train_batch_size", batch, "--learning_rate", 1e-5, "--checkpointing_steps", 10**6, "--seed", 0),
        *("--validation_prompts", "a red circle", "--validation_num_inference_steps", 1),
    ]


def peer_flags(work: Path, output: Path, resolution: int, batch: int) -> list[str]:
    """The same images in as many to a step: two pairs for each prompt."""
    flags = [
        *("--pretrained_model_name_or_path", work / "sdxl", "--dataset_name", work / "pairs"),
        *("--dataset_split_name", "train", "--cache_dir", work / "cache-peer", "--output_dir", output),
        *("--resolution", resolution, "--train_batch_size", batch * K // 2, "--learning_rate", 1e-5),
        *("--lr_warmup_steps", 0, "--checkpointing_steps", 10**6, "--seed", 0, "--no_hflip"),
    ]
    return list(map(str, flags))


def matmul_peak(dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of matrices of this type: the best of ten."""
    n = 8192 if CUDA else 2048
    a, seconds = torch.randn(n, n, device="cuda" if CUDA else "cpu", dtype=dtype), []
    for _ in range(10):
        started = synchronized()
        a @ a
        seconds.append(synchronized() - started)
    return 2 * n**3 / min(seconds) / 1e12


def synchronized() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(options, work: Path, found: dict) -> None:
    """Ours and the peer in turn, A B A B."""
    resolution, batch = options.resolution, options.batch
    cost = "checkpointing" if options.gradient_checkpointing else "step"
    found["counted"] = counted = count_all(options, work / "counted", ("sdxl",), (cost,))
    found["runs"] = []
    make_model(work / "sdxl", "sdxl", options.size, DTYPE)
    make_datasets(work, options.steps * batch, resolution)
    same = [*run_flags(options), *["--gradient_checkpointing"] * options.gradient_checkpointing]
    names = {"ours": "sdxl", "peer": "peer"} if options.peer else {"ours": "sdxl"}
    for number in range(options.rounds):
        for name, counts in names.items():
            output = work / f"{name}-{number}"
            if name == "ours":
                script = f"{SCRIPTS['sdxl']}.py"
                flags = [*our_flags(work, output, "sdxl", resolution, batch), *shlex.split(options.ours)]
            else:
                script, flags = options.peer.resolve(), peer_flags(work, output, resolution, batch)
            row = timed_run([sys.executable, script, *flags, *same], output, K * batch)
            if "failed" in row:
                raise SystemExit(f"{name}: {row['failed']}")
            add_row(options, found, {"run": name, "round": number} | row, counted[counts][cost])
    if options.peer:
        ours, peer = ([row["images_per_second"] for row in found["runs"] if row["run"] == name] for name in names)
        ratios = [a / b for a, b in zip(ours, peer)]
        # All runs have as many images, so their times for an image may be added.
        together = sum(1 / speed for speed in peer) / sum(1 / speed for speed in ours)
        found["ratio"] = {"all": together, "min": min(ratios), "max": max(ratios)}
        ours, peer = ([row["cpu_seconds_per_image"] for row in found["runs"] if row["run"] == name] for name in names)
        ratios = [b / a for a, b in zip(ours, peer)]
        found["cpu_ratio"] = {"all": sum(peer) / sum(ours), "min": min(ratios), "max": max(ratios)}


def sweep(options, work: Path, found: dict) -> None:
    """Ours alone, both models, from one prompt a batch on until memory or time ends."""
    resolution, ended = options.resolution, time.time() + 60 * options.minutes
    found |= {"counted": {}, "runs": []}
    counted, full, left_out = found["counted"], set(), 0
    make_datasets(work, 16, resolution)
    for batch, family, checkpointing in itertools.product((1, 2, 4, 8), ("sdxl", "sd3"), (False, True)):
        if (family, checkpointing) in full:
            continue
        if time.time() > ended:
            left_out += 1
            continue
        if family not in counted:
            make_model(work / family, family, options.size, DTYPE)
            counted[family] = count_ours(family, work / family, options.rank, resolution)
        output = work / f"{family}-{batch}-{checkpointing}"
        flags = [*our_flags(work, output, family, resolution, batch), *run_flags(options), *shlex.split(options.ours)]
        flags += ["--gradient_checkpointing"] * checkpointing
        row = timed_run([sys.executable, f"{SCRIPTS[family]}.py", *flags], output, K * batch)
        if "failed" in row:
            full.add((family, checkpointing))
        name = f"{family}, {batch} x {K} images{', checkpointing' * checkpointing}"
        add_row(options, found, {"run": name} | row, counted[family]["checkpointing" if checkpointing else "step"])
    if left_out:
        print(f"the {options.minutes:g} minutes are over: {left_out} settings are left out")


def run_flags(options) -> list:
    """The flags that ours and the peer share, under the same names."""
    flags = ["--rank", options.rank, "--max_train_steps", options.steps, "--report_to", "tensorboard"]
    return [*flags, "--mixed_precision", "bf16" if CUDA else "no", "--dataloader_num_workers", 4 if CUDA else 0]


def add_row(options, found: dict, row: dict, tflop: float) -> None:
    """Keeps and prints a run, with the share of the measured peak that its counted work comes to."""
    speed = row["images_per_second"]
    row |= {"tflop_per_image": tflop, "share_of_peak": speed and speed * tflop / found["matmul_tflops"]}
    found["runs"].append(row)
    write_figures(options, found)
    print(describe(row), flush=True)


def describe(row: dict) -> str:
    if "failed" in row:
        return f"{row['run']}: {row['failed']}"
    memory = f", {row['peak_memory_gb']:.1f} GB" if row["peak_memory_gb"] else ""
    speed = f"{row['images_per_second']:.3f} images/s, {row['share_of_peak']:.1%} of the peak"
    processor = f"{row['cpu_seconds_per_image']:.3g} CPU seconds an image"
    return f"{row['run']}: {speed}{memory}; {processor}; {row['seconds']:.0f} s in all"


# ----------------------------------------------------------------------------------------------------------------------
# Models and data
# ----------------------------------------------------------------------------------------------------------------------


def make_pipeline(family: str, size: str, dtype: torch.dtype | None) -> diffusers.DiffusionPipeline:
    """A pipeline with random weights of this type on the GPU, if there is one; with None without weights. SD3 goes
    without T5: its place among the tokens is filled with zeros, at the same cost. Z-Image has no text encoder: it is
    counted only."""
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype or torch.float32)
    with torch.device(device if dtype else "meta"):
        parts = make_parts(family, SIZES[size])
    torch.set_default_dtype(torch.float32)
    if family == "zimage":
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
        return diffusers.ZImagePipeline(**parts)
    for suffix in ("", "_2"):
        parts[f"tokenizer{suffix}"] = tokenizer = transformers.AutoTokenizer.from_pretrained(
            ROOT / "shapes/models" / ("sd3" if family == "sd3" else "base") / f"tokenizer{suffix}"
        )
        tokenizer.model_max_length = 77
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if family == "sdxl":
        parts["scheduler"] = diffusers.EulerDiscreteScheduler(**schedule)
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    if family == "sd15":
        parts["scheduler"] = diffusers.PNDMScheduler(**schedule, steps_offset=1)
        parts = {name: part for name, part in parts.items() if not name.endswith("_2")}
        absent = dict.fromkeys(("safety_checker", "feature_extractor"))
        return diffusers.StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)


def make_model(folder: Path, family: str, size: str, dtype: torch.dtype | None) -> None:
    """Writes a pipeline with random weights of this type; with None only its configurations, scheduler and
    tokenizers."""
    pipeline = make_pipeline(family, size, dtype)
    if dtype:
        pipeline.to("cpu").save_pretrained(folder)
        return
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, diffusers.ModelMixin):
            part.save_config(folder / name)
        elif isinstance(part, transformers.PreTrainedModel):
            part.config.architectures = [type(part).__name__]
            part.config.save_pretrained(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def make_parts(family: str, size: dict) -> dict:
    """The models of a pipeline, on the device of the context."""
    first = transformers.CLIPTextModelWithProjection if family == "sd3" else transformers.CLIPTextModel
    widths = [width for width, _, _ in size["text"]]
    parts = {
        "text_encoder": first(clip_config(*size["text"][0], "quick_gelu")),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(clip_config(*size["text"][1], "gelu")),
    }
    vae = {"latent_channels": 4, "scaling_factor": 0.13025}
    if family == "sdxl":
        parts["unet"] = diffusers.UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=size["channels"],
            attention_head_dim=size["heads"],  # diffusers' name for their number
            transformer_layers_per_block=size["depths"],
            cross_attention_dim=sum(widths),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + widths[1],
        )
    elif family == "sd15":
        channels = size["channels"]
        parts["unet"] = diffusers.UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(*channels, channels[-1]),
            attention_head_dim=8,  # diffusers' name for their number
            cross_attention_dim=widths[0],
        )
    elif family == "zimage":
        parts["transformer"] = diffusers.ZImageTransformer2DModel(**size["zimage"])
        parts |= dict.fromkeys(("text_encoder", "tokenizer"))
        del parts["text_encoder_2"]
        vae = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    else:
        layers, heads = size["sd3"]
        parts["transformer"] = diffusers.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=2 * sum(widths),
            caption_projection_dim=64 * heads,
            pooled_projection_dim=sum(widths),
            pos_embed_max_size=192,
        )
        vae = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    if "transformer" in parts:
        vae |= {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    parts["vae"] = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=size["vae"],
        layers_per_block=2,
        sample_size=1024,
        **vae,
    )
    return parts


def clip_config(width: int, layers: int, heads: int, activation: str) -> transformers.CLIPTextConfig:
    """Of the sizes that are not full, the inner layers are narrow too: text must not cost more than it does there."""
    return transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width if layers > 1 else width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def make_datasets(work: Path, prompts: int, resolution: int) -> None:
    """The same images twice: `ranked`, K to a prompt, for our trainers; `pairs`, two and two of them, for the peer."""
    rng, ranked, pairs = np.random.default_rng(0), [], []
    for number in range(prompts):
        prompt = f"a red circle and {number} squares"
        jpgs = [picture(rng, resolution) for _ in range(K)]
        phi = [1 - place / (K - 1) for place in range(K)]
        row = {"prompt_id": f"{number}", "prompt": prompt, "images": [{"bytes": jpg, "path": None} for jpg in jpgs]}
        ranked.append({**row, "preference_probability": phi, "rank": list(range(1, K + 1))})
        for first in range(0, K, 2):
            pairs.append({"caption": prompt, "jpg_0": jpgs[first], "jpg_1": jpgs[first + 1], "label_0": 1.0})
    for name in ("ranked", "pairs"):
        (work / name / "data").mkdir(parents=True, exist_ok=True)
    file = "data/train-00000-of-00001.parquet"
    kinds = {"prompt_id": Value("string"), "prompt": Value("string"), "images": List(Image())}
    kinds |= {"preference_probability": List(Value("float32")), "rank": List(Value("int32"))}
    Dataset.from_list(ranked, features=Features(kinds)).to_parquet(str(work / "ranked" / file))
    pq.write_table(pa.Table.from_pylist(pairs), work / "pairs" / file)


def picture(rng: np.random.Generator, resolution: int) -> bytes:
    """A JPEG that is about as rough as a photograph."""
    coarse = rng.integers(0, 256, (resolution // 16, resolution // 16, 3), dtype=np.uint8)
    buffer = BytesIO()
    PILImage.fromarray(coarse).resize((resolution, resolution), PILImage.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", action="store_true", help="Count, at full size; nothing is run.")
    parser.add_argument("--memory", action="store_true", help="Count the memory of a step; nothing is run.")
    parser.add_argument("--families", nargs="+", choices=SCRIPTS, help="To count. Default: sd3 sdxl; of memory all.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="Prompts or pairs in a step.")
    parser.add_argument("--sweep", action="store_true", help="Time ours alone, SDXL and SD3, at growing batches.")
    parser.add_argument("--peer", type=Path, help="diffusers' train_diffusion_dpo_sdxl.py.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    parser.add_argument("--size", choices=SIZES, help="Default: full if counted or on a GPU, scaled on a CPU.")
    parser.add_argument("--resolution", type=int, help="Pixels; SD1.5 takes half of them. Default: the size's own.")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help=f"Prompts of {K} images a step; the peer: as many images.")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="For both.")
    parser.add_argument("--ours", default="", help="More flags for our trainers, in quotes, after a =.")
    parser.add_argument("--steps", type=int, default=20 if CUDA else 10, help=f"The first {WARM_UP} are not timed.")
    parser.add_argument("--rounds", type=int, default=2, help="Runs of each, in turn.")
    parser.add_argument("--minutes", type=float, default=6.0, help="A sweep begins no run after this time.")
    options = parser.parse_args(words)
    options.size = options.size or ("full" if options.flops or options.memory or CUDA else "scaled")
    options.resolution = options.resolution or SIZES[options.size]["resolution"]
    if options.peer and not options.peer.is_file():
        parser.error(f"--peer {options.peer}: no such file")
    if options.peer and "sdxl" not in (options.families or ["sdxl"]):
        parser.error("--peer: it trains SDXL: name sdxl in --families, too")
    if options.steps < WARM_UP + 1:
        parser.error(f"--steps {options.steps}: must be at least {WARM_UP + 1}")
    return options


def machine() -> dict:
    """What the figures were measured on."""
    found = {"gpu": torch.cuda.get_device_name() if CUDA else None, "cpu": platform.processor()}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            found["cpu"] = line.partition(":")[2].strip()
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    return found | {"cores": os.cpu_count(), "date": time.strftime("%F")} | versions


def spread(ratio: dict) -> str:
    return f"ratio {ratio['all']:.2f} (min {ratio['min']:.2f}, max {ratio['max']:.2f})"


def write_figures(options, found: dict) -> None:
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.json.with_name(f".{options.json.name}.tmp")
        temporary.write_text(json.dumps(found, indent=2) + "\n")
        temporary.replace(options.json)


def main() -> None:
    options = parse_options()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    found = {"machine": machine(), "size": options.size, "resolution": options.resolution}
    with tempfile.TemporaryDirectory(prefix="train-speed-") as name:
        work, last = Path(name), None
        if options.flops:
            families = options.families or ["sd3", "sdxl"]
            found |= count_all(options, work, families, (*SETTINGS, "readme"))
            ours = found[families[-1]]
            last = f"TFLOP per image: {ours['step']:.1f} (floor {ours['floor']:.1f})"
        elif options.memory:
            found |= memory_table(options, work)
        else:
            found |= {"precision": str(DTYPE).removeprefix("torch."), "matmul_tflops": matmul_peak(DTYPE)}
            where = found["machine"]["gpu"] or f"{found['machine']['cpu']}, {torch.get_num_threads()} threads"
            products = f"{found['precision']} matrix products: {found['matmul_tflops']:.3g} TFLOP/s"
            print(f"{where}; torch {torch.__version__}; {products}", flush=True)
            (sweep if options.sweep else compare)(options, work, found)
            if ratio := found.get("ratio"):
                print(f"CPU time: {spread(found['cpu_ratio'])}")
                last = spread(ratio)
    write_figures(options, found)
    if last:
        print(last)


if __name__ == "__main__":
    main()
