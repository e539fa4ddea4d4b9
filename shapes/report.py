# SPDX-License-Identifier: Apache-2.0
"""Ends `make demo` and `make demo-sd3`: writes `results.json` and says in a few lines what came out."""

import json
import os
import sys
from pathlib import Path

from datasets import load_dataset


def main(demo: Path) -> None:
    results = json.loads((demo / "evaluation" / "results.json").read_text())
    files = str(demo / "synpic" / "data" / "*.parquet")
    dataset = load_dataset("parquet", data_files=files, split="train").remove_columns("images")
    temporary = demo / ".results.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, demo / "results.json")

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
    print(f"Picture    {demo}/evaluation/grid.png (before and after, same seeds)")
    print(f"Report     {demo}/results.json, {demo}/evaluation/results.md, {demo}/lora/README.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
