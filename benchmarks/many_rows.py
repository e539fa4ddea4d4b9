# SPDX-License-Identifier: Apache-2.0
"""What a dataset of many rows costs a trainer before its first step: time, memory and Python objects of each part.

    python benchmarks/many_rows.py --rows 1000000 --json outputs/many_rows.json

Makes datasets of N rows whose images are all the same picture of one pixel, and runs the trainers' own `main` on them
with a tiny model: train_rankdpo_sdxl.py on prompts of 4 images, train_dpo_qsd.py on pairs whose images are found by
their ids in another dataset. The cache of latents is filled before, with zeros, so that nothing is encoded. Each
trainer runs to the end of its first step, and once more, resumed, to the end of its second, in a process of its own.

Of each part of a run it prints the seconds and, which other processes disturb less, the CPU seconds; and, at the end of
the part, the largest memory and the Python objects per row, both over those at the start of the run. Memory is the
anonymous memory of the process: pages of files that are mapped do not count. Nothing is downloaded.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from datasets import Features, Image, List, Value  # noqa: E402
from safetensors.torch import save  # noqa: E402
from train_speed import DTYPE, machine, make_model  # noqa: E402


K, RESOLUTION, ROWS_PER_FILE = 4, 16, 50_000
PICTURE = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)
PARTS = {
    "train_rankdpo_sdxl": {
        "load_ranked_dataset": "load the table",
        "make_labels": "check rows, make labels",
        "hash_of_labels": "hash of the labels",
        "images_key": "key of the cache",
        "LatentCache": "list the cache's files",
        "check_images": "verify the cache's files",
    },
    "train_dpo_qsd": {
        "load_pairs": "load the tables",
        "select_pairs": "select and sort the pairs",
        "images_key": "key of the cache",
        "make_labels": "check rows, find images",
        "LatentCache": "list the cache's files",
        "check_images": "verify the cache's files",
    },
}
LAST_PARTS = {"encode_dataset": "load VAE and text encoders", "load_model": "load the model", "train": "the step"}


class Ended(Exception):
    """The first checkpoint is written."""


def anonymous_memory() -> int:
    """Bytes of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class Meter:
    """Times parts of a run, and watches the memory from its creation on."""

    def __init__(self, rows: int):
        self.rows, self.parts, self.peak = rows, [], 0
        self.memory, self.blocks = anonymous_memory(), sys.getallocatedblocks()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.02)

    def timed(self, title: str, function: Callable) -> Callable:
        """The function, whose calls are a part of the run."""

        def call(*arguments, **options):
            started, used = time.perf_counter(), time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.peak = max(self.peak, anonymous_memory())
                row = {"part": title, "seconds": time.perf_counter() - started}
                row["cpu_seconds"] = time.process_time() - used
                row["peak_gb"] = (self.peak - self.memory) / 1e9
                row["objects_per_row"] = (sys.getallocatedblocks() - self.blocks) / self.rows
                self.parts.append(row)

        return call


def run_trainer(name: str, flags: list[str], rows: int, found) -> None:
    """Runs a trainer's `main` up to its next checkpoint. Puts its parts into the queue `found`."""
    script = importlib.import_module(name)
    datasets.disable_progress_bars()
    meter, check_images, save_checkpoint = Meter(rows), script.check_images, script.save_checkpoint
    for function, title in (PARTS[name] | LAST_PARTS).items():
        if function != "check_images":
            setattr(script, function, meter.timed(title, getattr(script, function)))

    def check_filled(images, cache) -> None:
        fill(cache, images_per_row=2 if name == "train_dpo_qsd" else K)
        meter.timed(PARTS[name]["check_images"], check_images)(images, cache)

    def save_and_end(*arguments) -> None:
        save_checkpoint(*arguments)
        raise Ended

    script.check_images, script.save_checkpoint = check_filled, save_and_end
    try:
        script.main(script.parse_arguments(flags))
    except Ended:
        found.put(meter.parts)


def fill(cache, images_per_row: int) -> None:
    """Writes zeros as the latents of all rows."""
    cache.folder.mkdir(parents=True, exist_ok=True)
    for shard in range(-(-cache.length // len(cache.rows(0)))):
        rows, size = len(cache.rows(shard)), RESOLUTION // 8
        if cache.name(shard) not in cache.files:
            latents = torch.zeros(rows, images_per_row, 4, size, size, dtype=DTYPE)
            content = save({"latents": latents, "time_ids": torch.zeros(rows, images_per_row, 6)})
            digest = importlib.import_module("train_rankdpo_sdxl").short_hash(content)
            (cache.folder / f"{cache.name(shard)}-{digest}.safetensors").write_bytes(content)
    cache.find()


def ranked_rows(rows: range, rng: np.random.Generator) -> dict:
    rank = rng.permuted(np.tile(np.arange(1, K + 1, dtype=np.int32), (len(rows), 1)), axis=1)
    phi = ((K - rank) / (K - 1)).astype(np.float32)
    return {
        "prompt_id": [f"prompt-{row:09d}" for row in rows],
        "prompt": [f"a photograph of the object number {row} on a wooden table, in the evening" for row in rows],
        "images": lists(pa.array([{"bytes": PICTURE, "path": None}]).take(np.zeros(K * len(rows), dtype=int)), K),
        "preference_probability": lists(pa.array(phi.ravel()), K),
        "rank": lists(pa.array(rank.ravel()), K),
    }


def lists(values: pa.Array, k: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, k, dtype=np.int32), values)


def image_rows(rows: range, rng: np.random.Generator) -> dict:
    picture = pa.array([{"bytes": PICTURE, "path": None}]).take(np.zeros(len(rows), dtype=int))
    ids = {f"image_{side}_uid": [f"{2 * row + side:032x}" for row in rows] for side in (0, 1)}
    return ids | {"jpg_0": picture, "jpg_1": picture}


def pair_rows(rows: range, rng: np.random.Generator) -> dict:
    ids = {f"image_{side}_uid": [f"{2 * row + side:032x}" for row in rows] for side in (0, 1)}
    return {
        "caption": [f"a photograph of the object number {row} on a wooden table, in the evening" for row in rows],
        **ids,
        "label_0": rng.integers(0, 2, len(rows)).astype(np.float32),
        "quality": rng.random(len(rows), dtype=np.float32),
    }


KINDS = {name: Value("string") for name in ("prompt_id", "prompt", "caption", "image_0_uid", "image_1_uid")}
KINDS |= {"images": List(Image()), "jpg_0": Image(), "jpg_1": Image(), "rank": List(Value("int32"))}
KINDS |= {"preference_probability": List(Value("float32")), "label_0": Value("float32"), "quality": Value("float32")}


def write_dataset(folder: Path, make_rows: Callable, rows: int) -> None:
    """Parquet files of ROWS_PER_FILE rows."""
    (folder / "data").mkdir(parents=True)
    rng, files = np.random.default_rng(0), -(-rows // ROWS_PER_FILE)
    for number in range(files):
        columns = make_rows(range(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, rows)), rng)
        schema = Features({name: KINDS[name] for name in columns}).arrow_schema
        columns = [pa.array(column).cast(kind) for column, kind in zip(columns.values(), schema.types)]
        table = pa.Table.from_arrays(columns, schema=schema)
        pq.write_table(table, folder / f"data/train-{number:05d}-of-{files:05d}.parquet")


def measure(name: str, work: Path, rows: int) -> dict[str, list[dict]]:
    """Runs a trainer twice: to its first step, and resumed to its second."""
    flags = [
        "--pretrained_model_name_or_path",
        work / "model",
        "--cache_dir",
        work / "cache",
        "--resolution",
        RESOLUTION,
    ]
    flags += ["--output_dir", work / f"lora-{name}", "--cache_text_embeddings", "false", "--report_to", "none"]
    flags += ["--rank", 1, "--mixed_precision", "no", "--checkpointing_steps", 1]
    if name == "train_dpo_qsd":
        write_dataset(work / "images", image_rows, rows)
        write_dataset(work / "pairs", pair_rows, rows)
        flags += ["--dataset_name", work / "images", "--scores_dataset_name", work / "pairs", "--top_fraction", 1]
    else:
        write_dataset(work / "ranked", ranked_rows, rows)
        flags += ["--dataset_name", work / "ranked"]
    found, context = {}, multiprocessing.get_context("spawn")
    for run, more in {"first": [], "resumed": ["--resume_from_checkpoint", "latest"]}.items():
        queue = context.SimpleQueue()
        process = context.Process(target=run_trainer, args=(name, list(map(str, [*flags, *more])), rows, queue))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name}: the {run} run failed")
        found[run] = parts = queue.get()
        seconds, used = (sum(part[unit] for part in parts) for unit in ("seconds", "cpu_seconds"))
        print(f"\n{name}, {rows:,} rows, {run} run: {seconds:.1f} s, {used:.1f} of CPU time")
        for part in parts:
            memory = f"peak so far {part['peak_gb']:6.3f} GB, {part['objects_per_row']:8.3f} objects a row"
            times = f"{part['seconds']:8.2f} s, {part['cpu_seconds']:8.2f} of CPU time"
            print(f"    {part['part']:30} {times}, {memory}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--trainer", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    found = {"machine": machine(), "rows": options.rows}
    with tempfile.TemporaryDirectory(prefix="many-rows-") as name:
        work = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
        make_model(work / "model", "sdxl", "tiny", DTYPE)
        for trainer in options.trainer:
            found[trainer] = measure(trainer, work, options.rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
