# SPDX-License-Identifier: Apache-2.0
"""What a start costs the trainers with many rows: time, memory, and bytes read and written, up to the first step.

    OMP_NUM_THREADS=1 python benchmarks/many_rows.py --rows 58000 1000000 --json outputs/many_rows.jsonl

Rows have 4 images of one pixel (DPO-QSD: pairs, whose images another dataset holds), in files and row groups of the
sizes that build_synpic.py would write at 1024². The model is tiny. Each case is started twice, and ends when the first
batch is there:

- `first`: nothing is cached. All images are read and hashed, and the index is written. They are neither decoded nor
  encoded: every row of the cache is a link to one file.
- `again`: all is cached, so this is what every later start costs, at any size of the images.

Prints a line of JSON for each start. Sums over all processes: memory (VmHWM, of which the imports are `imported_gb`),
CPU time, and the bytes of all system calls that read and write (/proc/self/io).
"""

import argparse
import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from datasets import Features, Image, List, Value  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from train_speed import DTYPE, SCRIPTS, K, machine, make_model  # noqa: E402


RESOLUTION, ROWS_PER_FILE, ROWS_PER_GROUP = 16, 5_000, 48
PICTURE = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)
FAMILIES = {script: family for family, script in SCRIPTS.items()}  # of the tiny models


# A start, in a process of its own -----------------------------------------------------------------------------------
def figures() -> dict[str, float]:
    """What this process has used since it began."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    found = {"seconds": time.time(), "cpu_seconds": time.process_time()}
    return found | {"read_gb": int(io["rchar"]) / 1e9, "written_gb": int(io["wchar"]) / 1e9}


def memory(name: str) -> float:
    """Gigabytes of this process: VmRSS, now; VmHWM, at most."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024 / 1e9


def start_trainer(name: str, flags: list[str], stored: Path, environment: dict, found) -> None:
    """Runs a trainer's `main` up to its first batch. Puts its figures into the queue `found`."""
    os.environ.update(environment)
    script = importlib.import_module(name)
    datasets.disable_progress_bars()
    skip_encoding(script, stored)

    def end(*arguments) -> None:
        next(arguments[4])  # the batches
        after = figures()
        row = {name: after[name] - value for name, value in before.items()}
        found.put(row | {"imported_gb": imported, "peak_gb": memory("VmHWM")})
        os._exit(0)

    script.train, imported, before = end, memory("VmRSS"), figures()
    script.main(script.parse_arguments(flags))


def skip_encoding(script, stored: Path) -> None:
    """What is decoded and encoded once serves all rows. Their files in the cache are links to `stored`."""
    preprocess_image, encode, write_tensors = script.preprocess_image, AutoencoderKL.encode, script.write_tensors
    pixels = cache(lambda: preprocess_image({"bytes": PICTURE, "path": None}, RESOLUTION))
    latents = []

    def encode_once(vae, pixels):
        latents[:] = latents or [encode(vae, pixels)]
        return latents[0]

    def link(file: Path, tensors: dict) -> None:
        if not stored.exists():
            write_tensors(stored, tensors)
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another process was here
            file.symlink_to(stored)

    script.preprocess_image, script.write_tensors = lambda *_: pixels(), link
    AutoencoderKL.encode = encode_once


def measure(name: str, flags: list, stored: Path, processes: int) -> dict[str, float]:
    """Starts a trainer, and adds up what its processes used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context, started = multiprocessing.get_context("spawn"), []
    queue = context.SimpleQueue()
    for rank in range(processes):
        environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        arguments = (name, list(map(str, flags)), stored, environment, queue)
        started.append(context.Process(target=start_trainer, args=arguments))
        started[-1].start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise SystemExit(f"{name} failed")
    rows = [queue.get() for _ in started]
    return {unit: (max if unit == "seconds" else sum)(row[unit] for row in rows) for unit in rows[0]}


# Data ---------------------------------------------------------------------------------------------------------------
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
    return {**image_ids(rows), "jpg_0": picture, "jpg_1": picture}


def pair_rows(rows: range, rng: np.random.Generator) -> dict:
    return {
        "caption": [f"a photograph of the object number {row} on a wooden table, in the evening" for row in rows],
        **image_ids(rows),
        "label_0": rng.integers(0, 2, len(rows)).astype(np.float32),
        "quality": rng.random(len(rows), dtype=np.float32),
    }


def image_ids(rows: range) -> dict:
    return {f"image_{side}_uid": [f"{2 * row + side:032x}" for row in rows] for side in (0, 1)}


KINDS = {name: Value("string") for name in ("prompt_id", "prompt", "caption", "image_0_uid", "image_1_uid")}
KINDS |= {"images": List(Image()), "jpg_0": Image(), "jpg_1": Image(), "rank": List(Value("int32"))}
KINDS |= {"preference_probability": List(Value("float32")), "label_0": Value("float32"), "quality": Value("float32")}


def write_dataset(folder: Path, make_rows: Callable, rows: int) -> Path:
    """Parquet files of ROWS_PER_FILE rows, in row groups of ROWS_PER_GROUP."""
    (folder / "data").mkdir(parents=True)
    rng, files = np.random.default_rng(0), -(-rows // ROWS_PER_FILE)
    for number in range(files):
        columns = make_rows(range(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, rows)), rng)
        schema = Features({name: KINDS[name] for name in columns}).arrow_schema
        columns = [pa.array(column).cast(kind) for column, kind in zip(columns.values(), schema.types)]
        table = pa.Table.from_arrays(columns, schema=schema)
        file = folder / f"data/train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table, file, row_group_size=ROWS_PER_GROUP)
    return folder


def make_flags(name: str, work: Path, rows: int) -> list:
    """The flags of a trainer on so many rows, which are written."""
    flags = ["--pretrained_model_name_or_path", work / FAMILIES[name], "--resolution", RESOLUTION, "--rank", 1]
    flags += ["--cache_dir", work / "cache", "--output_dir", work / "lora", "--report_to", "none"]
    flags += ["--cache_text_embeddings", "false", "--resume_from_checkpoint", "latest"]
    if name != "train_dpo_qsd":
        return [*flags, "--dataset_name", write_dataset(work / "ranked", ranked_rows, rows)]
    images, pairs = (write_dataset(work / make.__name__, make, rows) for make in (image_rows, pair_rows))
    return [*flags, "--dataset_name", images, "--scores_dataset_name", pairs, "--top_fraction", 1]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[58_000, 1_000_000])
    parser.add_argument("--trainer", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--processes", type=int, default=1, help="Of the second start.")
    parser.add_argument("--json", type=Path, help="Also append the lines to this file.")
    options = parser.parse_args(words)
    for name in options.trainer:
        for rows in options.rows:
            with tempfile.TemporaryDirectory(prefix="many-rows-") as temporary:
                work = Path(temporary)
                make_model(work / FAMILIES[name], FAMILIES[name], "tiny", DTYPE)
                flags = make_flags(name, work, rows)
                for run, processes in {"first": 1, "again": options.processes}.items():
                    found = measure(name, flags, work / "row.safetensors", processes)
                    line = {"trainer": name, "rows": rows, "start": run, "processes": processes, **found}
                    line = json.dumps(line | {"machine": machine()})
                    print(line, flush=True)
                    if options.json:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        options.json.open("a").write(line + "\n")


if __name__ == "__main__":
    main()
