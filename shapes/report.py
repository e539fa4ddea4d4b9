# SPDX-License-Identifier: Apache-2.0
"""Ends the RankDPO demos: writes `results.json` and a picture, and says in a few lines what came out."""

import json
import os
import sys
from pathlib import Path

from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont


RIGHT, WRONG = (0, 150, 80), (215, 50, 40)  # frames, as in grid.png of evaluate.py
CELL, GAP = 96, 8  # pixels
MODELS = {"base": "base", "rankdpo": "with the RankDPO LoRA"}


def draw_picture(demo: Path) -> Image.Image:
    """Base and LoRA side by side, all images of a prompt, framed as the verifier judges them.

    The rows follow a rule: of each category the first held-out prompt of which the two models get different numbers of
    images right.
    """
    prompts = [json.loads(line) for line in (demo / "heldout.jsonl").read_text().splitlines()]
    folder = demo / "evaluation"
    scores = [json.loads((folder / "scores" / "accuracy" / f"{name}.json").read_text())["scores"] for name in MODELS]
    rows = {}
    for number, (row, *verdicts) in enumerate(zip(prompts, *scores)):
        if sum(verdicts[0]) != sum(verdicts[1]):
            rows.setdefault(row["category"], (number, row["prompt"], verdicts))
    width = len(scores[0][0]) * (CELL + GAP)
    picture = Image.new("RGB", (2 * width + 3 * GAP, 24 + len(rows) * (CELL + 32)), "white")
    drawing, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for place, title in enumerate(MODELS.values()):
        shown = [right for *_, verdicts in rows.values() for right in verdicts[place]]
        title = f"{title}: {sum(shown):.0f} of {len(shown)} right"
        drawing.text((GAP + place * (width + GAP), 4), title, "black", font)
    for line, (number, prompt, verdicts) in enumerate(rows.values()):
        top = 24 + line * (CELL + 32)
        drawing.text((GAP, top + 4), f"\u201c{prompt}\u201d", (90, 90, 90), font)
        for place, name in enumerate(MODELS):
            for n, right in enumerate(verdicts[place]):
                left = GAP + place * (width + GAP) + n * (CELL + GAP)
                image = Image.open(folder / "images" / name / f"{number:05d}_{n}.png").convert("RGB")
                image = image.resize((CELL - 8, CELL - 8), Image.Resampling.NEAREST)
                drawing.rectangle((left, top + 24, left + CELL - 1, top + 23 + CELL), RIGHT if right else WRONG)
                picture.paste(image, (left + 4, top + 28))
    return picture


def main(demo: Path) -> None:
    results = json.loads((demo / "evaluation" / "results.json").read_text())
    files = str(demo / "synpic" / "data" / "*.parquet")
    dataset = load_dataset("parquet", data_files=files, split="train").remove_columns("images")
    temporary = demo / ".results.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, demo / "results.json")
    draw_picture(demo).save(demo / "picture.png", optimize=True)

    base, tuned = results["base"], results["rankdpo"]
    low, high = tuned["accuracy_lift_ci95"]
    k = len(dataset[0]["generators"])
    print(f"\nSyn-Pic    {len(dataset)} prompts x {k} images, {len(dataset.features['scores'])} rewards: {demo}/synpic")
    comfyui = demo / "lora" / "comfyui" / "lora.safetensors"
    print(
        f"LoRA       {demo}/lora/pytorch_lora_weights.safetensors "
        f"(ComfyUI: {comfyui if comfyui.exists() else 'the same file'})"
    )
    print(
        f"Accuracy   {base['accuracy']:.3f} -> {tuned['accuracy']:.3f} on {results['n_images']} images of "
        f"{results['n_prompts']} held-out prompts, judged exactly"
    )
    print(f"Lift       {tuned['accuracy_lift']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} (paired, over prompts)")
    for category, part in tuned["accuracy_by_category"].items():
        before = base["accuracy_by_category"][category]["mean"]
        print(f"           {category:14} {before:.3f} -> {part['mean']:.3f}  ({part['n_prompts']} prompts)")
    print(f"Picture    {demo}/picture.png (before and after, same seeds; all images: {demo}/evaluation/images)")
    print(f"Report     {demo}/results.json, {demo}/evaluation/results.md, {demo}/lora/README.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
