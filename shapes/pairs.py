# SPDX-License-Identifier: Apache-2.0
"""Pairs with noisy labels from a Syn-Pic dataset of the shapes world, in Pick-a-Pic's columns.

    python shapes/pairs.py --synpic outputs/demo-qsd/synpic --flip 0.3 --seed 0 --output_dir outputs/demo-qsd/pairs

Every two images of a prompt make a pair. The exact verifier says which one shows what was asked; where it calls both
right or both wrong, the pair is a tie. A share of the labels, `--flip`, is then turned round, as careless people would.
With `--misjudged` the rater is one who misjudges some pictures, in all their pairs, instead of some pairs.
"""

import argparse
import itertools
import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import world
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from tqdm import tqdm


FEATURES = Features(
    {
        "caption": Value("string"),
        "jpg_0": Value("binary"),
        "jpg_1": Value("binary"),
        "image_0_uid": Value("string"),
        "image_1_uid": Value("string"),
        "label_0": Value("float64"),
    }
)


def make_pairs(synpic: Dataset, flip: float, seed: int, misjudged: bool = False) -> tuple[list[dict], dict]:
    """Rows in random order, and counts."""
    rng = np.random.default_rng(seed)
    rows, wrong, synpic = [], 0, synpic.cast_column("images", [Image(decode=False)])
    for row in tqdm(synpic, desc="pairs", unit="prompt"):
        pictures = [image["bytes"] for image in row["images"]]
        images = [PILImage.open(BytesIO(picture)) for picture in pictures]
        verdicts = truth = world.accuracy(images, [row["prompt"]] * len(images))
        if misjudged:
            verdicts = [1 - t if world.misjudged(i, row["prompt"]) else t for t, i in zip(truth, images)]
        for i, j in itertools.combinations(range(len(pictures)), 2):
            if rng.random() < 0.5:
                i, j = j, i
            label = 0.5 + 0.5 * (verdicts[i] - verdicts[j])
            if label != 0.5 and rng.random() < flip:
                label = 1.0 - label
            wrong += label != 0.5 and label != 0.5 + 0.5 * (truth[i] - truth[j])
            names = [f"{row['prompt_id']}-{side}" for side in (i, j)]
            rows.append(dict(zip(FEATURES, (row["prompt"], pictures[i], pictures[j], *names, label))))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    labelled = sum(row["label_0"] != 0.5 for row in rows)
    return rows, {"pairs": len(rows), "labelled": labelled, "wrong": wrong}


def main():
    parser = argparse.ArgumentParser(description="Make pairs with noisy labels from a Syn-Pic dataset.")
    parser.add_argument("--synpic", type=Path, required=True)
    parser.add_argument("--flip", type=float, default=0.3)
    parser.add_argument("--misjudged", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    if (args.output_dir / "counts.json").exists():  # written last
        print((args.output_dir / "counts.json").read_text())
        return
    files = str(args.synpic / "data" / "*.parquet")
    rows, counts = make_pairs(
        load_dataset("parquet", data_files=files, split="train"), args.flip, args.seed, args.misjudged
    )
    temporary = args.output_dir.with_name(args.output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(str(temporary / "data" / "train-00000-of-00001.parquet"))
    (temporary / "counts.json").write_text(json.dumps(counts) + "\n")
    shutil.rmtree(args.output_dir, ignore_errors=True)
    os.replace(temporary, args.output_dir)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
