# SPDX-License-Identifier: Apache-2.0
"""How much noisier are loss and gradient with one noise for each image (`--noise image`) than with one for each prompt?

    python benchmarks/noise_variance.py

Run `make demo` first: this takes its dataset, its latents and a checkpoint of its LoRA. Each prompt gets the same
timesteps in both modes, and for each timestep several noises. Prints, for both modes and as a ratio, the variance of
the loss of a prompt and the total variance (the trace of the covariance) of its gradient: over timesteps and noises,
and over noises alone. The interval is a bootstrap over prompts.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train_rankdpo_sdxl as script  # noqa: E402


def load(demo: Path, checkpoint: str) -> tuple:
    """Arguments, scheduler, UNet with the checkpoint's LoRA, what reads a row of the dataset, and their number."""
    config = ["--config", str(ROOT / "shapes/rankdpo.yaml"), "--cache_dir", str(demo / "cache")]
    args = script.parse_arguments([*config, "--dataset_name", str(demo / "synpic")])
    args.output_dir = str(demo / "no run")  # nothing is written
    table, parts = script.load_ranked_dataset(args)
    labels = script.make_labels(args, table)
    run = script.plan_run(args, script.make_accelerator(args), labels)
    keys = [key for part in parts for key in script.row_keys(part, labels).values()]
    if not all(key and run.cache_file(key).exists() for key in keys):
        raise SystemExit(f"{demo}: no latents for this dataset: run make demo first")
    labels["key"] = np.array(keys)
    run.checkpoint = demo / "lora" / checkpoint
    noise_scheduler, model = script.load_model(args)
    script.prepare_model(args, run, model)
    return args, noise_scheduler, model, partial(script.read_row, args, run, labels, noise_scheduler), len(table)


def draw(args, noise_scheduler, item: dict, timestep: int, key: tuple, noise: str) -> dict[str, torch.Tensor]:
    """A batch of one prompt with this timestep and a noise that the key seeds. item: the row of the prompt."""
    args.noise = noise
    item = item | script.sample_noise(args, noise_scheduler, key, item["latents"].shape)
    return {name: tensor[None] for name, tensor in (item | {"timesteps": torch.tensor(timestep)}).items()}


def variances(losses: np.ndarray, gradients: np.ndarray) -> list[float]:
    """losses (timesteps, noises), gradients (timesteps, noises, parameters) → for the loss and for the gradient the
    total variance over timesteps and noises, and over noises alone."""
    figures = []
    for values in (losses[..., None], gradients):
        within = values.var(axis=1, ddof=1).sum(axis=-1).mean()
        between = values.mean(axis=1).var(axis=0, ddof=1).sum() - within / values.shape[1]
        figures.append((within + between, within))
    return [*figures[0], *figures[1]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, default=ROOT / "outputs/demo")
    parser.add_argument("--checkpoint", default="checkpoint-150")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--timesteps", type=int, default=8)
    parser.add_argument("--noises", type=int, default=8)
    options = parser.parse_args()
    args, noise_scheduler, model, read, rows = load(options.demo, options.checkpoint)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng, found = np.random.default_rng(0), {"prompt": [], "image": []}
    for row in tqdm(rng.permutation(rows)[: options.prompts], unit="prompt"):
        timesteps = rng.integers(noise_scheduler.config.num_train_timesteps, size=options.timesteps)
        for noise, results in found.items():
            losses, gradients = [], []
            for timestep in timesteps:
                for number in range(options.noises):
                    key = (0, int(row), int(timestep), number)
                    batch = draw(args, noise_scheduler, read((0, int(row), 0)), int(timestep), key, noise)
                    loss, _ = script.training_step(model, model, noise_scheduler, batch, args)
                    gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).numpy())
                    losses.append(loss.item())
            shape = (options.timesteps, options.noises)
            results.append(variances(np.reshape(losses, shape), np.reshape(gradients, (*shape, -1))))
    prompt, image = np.array(found["prompt"]), np.array(found["image"])
    drawn = [rng.integers(len(prompt), size=len(prompt)) for _ in range(10_000)]
    ratios = np.array([image[i].mean(axis=0) / prompt[i].mean(axis=0) for i in drawn])
    print("| variance of | one noise a prompt | one an image | ratio (95 % interval) |\n|---|---|---|---|")
    names = [f"{what}, over {of}" for what in ("loss", "gradient") for of in ("timesteps and noises", "noises alone")]
    for number, name in enumerate(names):
        shared, own = prompt[:, number].mean(), image[:, number].mean()
        low, high = np.percentile(ratios[:, number], [2.5, 97.5])
        print(f"| {name} | {shared:.3g} | {own:.3g} | {own / shared:.2f} ({low:.2f} to {high:.2f}) |")


if __name__ == "__main__":
    main()
