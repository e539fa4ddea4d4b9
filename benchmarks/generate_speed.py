# SPDX-License-Identifier: Apache-2.0
"""What build_synpic.py adds to drawing: its generate stage against a loop over the bare pipeline, in one run.

    python benchmarks/generate_speed.py --json outputs/generate_speed.json

Both draw the same prompts with the same seeds, in batches of the same size, with the same pipeline, in turn, A B A B:

- bare: `pipeline(prompt=…, generator=…)`, batch after batch; the pictures are dropped;
- ours: the stage as it is, from the list of missing images to complete shards on disk, JPEGs included.

The weights are random: full size on a GPU, 1024², SDXL and SD3-Medium; on a CPU a UNet of a fifth of SDXL's width with
its depth, at 256². Not timed: making and freeing the models, and one batch of each way to warm up. Prints images/s, the
share of the measured peak that the counted work comes to, and the largest difference of a pixel between both ways. The
last two lines are what ours takes more, of CPU time and of time, over all rounds, with the smallest and the largest of
a round. Other processes disturb CPU time less.
"""

import argparse
import shlex
import tempfile
import time
from contextlib import redirect_stderr
from io import BytesIO, StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import torch
import train_speed
from accelerate import PartialState
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train_speed import CUDA, DTYPE, SIZES, machine, matmul_peak, synchronized, write_figures

import build_synpic


def tflop_per_image(pipeline, call: dict) -> float:
    """Counted work of an image: matrix products, convolutions and attention of one step and of two; each further step
    costs as much as the second."""
    counted = []
    for steps in (1, 2):
        # The plain formula of attention consists of products, which the counter knows on every device.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            pipeline(prompt=["a red circle"], **{**call, "num_inference_steps": steps})
        counted.append(counter.get_total_flops() / 1e12)
    one, two = counted
    return one + (call["num_inference_steps"] - 1) * (two - one)


def bare(pipeline, rows: list[dict], seeds: list[int], call: dict, batch: int) -> list:
    """The images of the bare pipeline."""
    images = []
    for start in range(0, len(rows), batch):
        prompts = [row["prompt"] for row in rows[start : start + batch]]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]]
        images += pipeline(prompt=prompts, generator=generators, **call).images
    return images


def clock() -> np.ndarray:
    """Seconds: the time, and the CPU's time of this process."""
    return np.array([synchronized(), time.process_time()])


def timed_bare(pipeline, *arguments) -> tuple[list, np.ndarray]:
    """The images and the seconds. As a user has it: nothing compiled, the VAE decodes a whole batch."""
    pipeline.vae.disable_slicing()
    with torch.compiler.set_stance("force_eager"):
        started = clock()
        images = bare(pipeline, *arguments)
        return images, clock() - started


def timed_ours(generator, rows: list[dict], entry: dict, flags: list[str]) -> tuple[list, list[int], np.ndarray]:
    """The images as files' bytes, their seeds, and the seconds of the stage without loading and freeing the model."""
    (pipeline, _), *_ = generator.parts
    pipeline.vae.enable_slicing()  # as build_synpic.py has loaded it; the bare pipeline is without
    with tempfile.TemporaryDirectory(prefix="generate-speed-") as folder:
        args = build_synpic.parse_arguments(["--prompts", "none", "--output_dir", folder, *flags])
        shards = [rows[start : start + args.shard_size] for start in range(0, len(rows), args.shard_size)]
        unfreed = mock.patch.object(build_synpic, "free_memory", lambda: None)
        with mock.patch.object(build_synpic, "Generator", lambda *_: generator), unfreed, redirect_stderr(StringIO()):
            started = clock()
            build_synpic.generate(args, shards, [entry], PartialState())
            seconds = clock() - started
        tables = [pq.read_table(file) for file in sorted(Path(folder).rglob("images/*/*.parquet"))]
        images, seeds = (sum((table[name].to_pylist() for table in tables), []) for name in ("image", "seed"))
    return images, seeds, seconds


def difference(images: list, files: list[bytes]) -> int:
    """The largest difference of a pixel, both as JPEGs."""
    encoded = [build_synpic.encode_image(image, "jpg") for image in images]
    pairs = [[np.asarray(Image.open(BytesIO(item))).astype(int) for item in pair] for pair in zip(encoded, files)]
    return max(int(np.abs(a - b).max()) for a, b in pairs)


def measure(options, family: str, found: dict) -> None:
    """Adds the rounds of one model to the figures, and prints them."""
    pixels = SIZES[options.size]["resolution"]
    call = {"num_inference_steps": options.steps, "height": pixels, "width": pixels}
    call["guidance_scale"] = 5.0 if family == "sdxl" else 7.0
    entry, flags = {"name": family, "model": family, "call": call}, ["--generation_batch_size", str(options.batch)]
    flags += shlex.split(options.ours)
    args = build_synpic.parse_arguments(["--prompts", "none", *flags])
    pipeline = train_speed.make_pipeline(family, options.size, DTYPE)
    pipeline.set_progress_bar_config(disable=True)
    found["tflop_per_image"][family] = tflop = tflop_per_image(pipeline, call)
    with mock.patch.object(build_synpic.DiffusionPipeline, "from_pretrained", lambda *_, **__: pipeline):
        generator = build_synpic.Generator(entry, torch.device("cuda" if CUDA else "cpu"), args)
    rows = [{"prompt_id": f"{n}", "prompt": f"a red circle and {n} squares"} for n in range(options.images)]
    _, seeds, _ = timed_ours(generator, rows[: options.batch], entry, flags)  # to warm up
    timed_bare(pipeline, rows[: options.batch], seeds, call, options.batch)
    for number in range(options.rounds):
        for way in ("ours", "bare"):
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            if way == "ours":
                files, seeds, seconds = timed_ours(generator, rows, entry, flags)
            else:
                images, seconds = timed_bare(pipeline, rows, seeds, call, options.batch)
            seconds, cpu_seconds = seconds.tolist()
            speed = len(rows) / seconds
            row = {"model": family, "way": way, "round": number, "images_per_second": speed}
            row |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
            row["share_of_peak"] = speed * tflop / found["matmul_tflops"]
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
            found["runs"].append(row)
            memory = f", {row['peak_memory_gb']:.1f} GB" if CUDA else ""
            share = f"{row['share_of_peak']:.1%} of the peak"
            times = f"{seconds:.2f} s, {cpu_seconds:.2f} of the CPU"
            print(f"{family}, {way}: {speed:.4g} images/s, {share}{memory}; {times}", flush=True)
            write_figures(options, found)
    found["difference"][family] = difference(images, files)
    print(f"{family}: {tflop:.4g} TFLOP an image; largest difference of a pixel: {found['difference'][family]}")


def overhead(runs: list[dict], unit: str) -> dict[str, float]:
    """Seconds of ours against bare, minus 1: of all rounds together, and of the best and the worst."""
    ours, plain = ([run[unit] for run in runs if run["way"] == way] for way in ("ours", "bare"))
    rounds = [a / b - 1 for a, b in zip(ours, plain)]
    return {"all": sum(ours) / sum(plain) - 1, "min": min(rounds), "max": max(rounds)}


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = ("sdxl", "sd3")
    parser.add_argument("--models", nargs="+", choices=families, default=families if CUDA else families[:1])
    parser.add_argument("--size", choices=SIZES, default="full" if CUDA else "scaled")
    parser.add_argument("--steps", type=int, default=28 if CUDA else 6, help="Denoising steps, with guidance.")
    parser.add_argument("--batch", type=int, default=4, help="Images drawn together.")
    parser.add_argument("--images", type=int, default=16 if CUDA else 8, help="Images of a round.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds of both ways, in turn.")
    parser.add_argument("--ours", default="", help="More flags for build_synpic.py, in quotes, after a =.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parse_options(words)
    found = {"machine": machine(), "size": options.size, "batch": options.batch, "steps": options.steps}
    found |= {"precision": str(DTYPE).removeprefix("torch."), "matmul_tflops": matmul_peak(DTYPE)}
    found |= {"tflop_per_image": {}, "difference": {}, "runs": []}
    where = found["machine"]["gpu"] or f"{found['machine']['cpu']}, {torch.get_num_threads()} threads"
    products = f"{found['precision']} matrix products: {found['matmul_tflops']:.3g} TFLOP/s"
    print(f"{where}; torch {torch.__version__}; {products}", flush=True)
    for family in options.models:
        measure(options, family, found)
        build_synpic.free_memory()
    for name, unit in {"cpu_overhead": "cpu_seconds", "overhead": "seconds"}.items():
        found[name] = ratio = overhead(found["runs"], unit)
        label = "CPU time: " if name == "cpu_overhead" else ""
        print(f"{label}overhead {ratio['all']:.1%} (min {ratio['min']:.1%}, max {ratio['max']:.1%})")
    write_figures(options, found)


if __name__ == "__main__":
    main()
