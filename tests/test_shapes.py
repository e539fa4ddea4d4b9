# SPDX-License-Identifier: Apache-2.0
"""The shapes world: the verifier is exact, the rewards are not, the shipped generators work, preferences teach."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import world
from conftest import ROOT, call, encoded, write_dataset
from datasets import load_dataset
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from peft import set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from build_synpic import preference_probability, preference_rank


REWARDS = [world.color_reward, world.shape_reward, world.count_reward, world.layout_reward, world.clean_reward]


def test_verifier_accepts_every_truth_and_refuses_every_lie():
    rng = np.random.default_rng(5)
    rows = world.sample_prompts("train", 300, seed=5) + world.sample_prompts("heldout", 300, seed=5)
    scenes = [world.parse_prompt(row["prompt"]) for row in rows]
    prompts = [row["prompt"] for row in rows]
    truths = [Image.fromarray(world.render(scene, rng)) for scene in scenes]
    # Two squares may be placed corner to corner: one blob, for any reader. One rendering in several thousand is so.
    assert sum(world.accuracy(truths, prompts)) >= len(rows) - 1
    lies = [Image.fromarray(world.render(world.corrupt(scene, rng), rng)) for scene in scenes]
    assert world.accuracy(lies, prompts) == [0.0] * len(rows)
    noise = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(50)]
    assert sum(world.accuracy(noise, prompts[:50])) == 0
    for color in (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.6, 0.7):  # black, white and pink are no colours here
        mask = world.shape_mask("circle", 16, 16, 6)[..., None]
        pixels = Image.fromarray(np.round(255 * (0.15 * (1 - mask) + np.array(color) * mask)).astype(np.uint8))
        assert world.accuracy([pixels] * 6, [f"a {name} circle" for name in world.COLORS]) == [0.0] * 6


def test_splits_share_no_prompt_and_every_prompt_parses():
    for category in world.CATEGORIES:
        train, heldout = (set(world.prompts(category, split)) for split in ("train", "heldout"))
        assert train and heldout and not train & heldout
        scenes = {world.mirrored(world.parse_prompt(prompt)).text for prompt in heldout}
        if category in ("counting", "position", "color_attr"):
            assert not scenes & {world.parse_prompt(prompt).text for prompt in train}
        assert {world.parse_prompt(prompt).category for prompt in train | heldout} == {category}
    with pytest.raises(ValueError, match="not a prompt of the shapes world"):
        world.parse_prompt("a pink elephant")


def test_mean_of_the_rewards_is_better_than_any_single_one():
    """Share of (truth, lie) pairs that are ordered right."""
    rng = np.random.default_rng(1)
    prompts = [row["prompt"] for row in world.sample_prompts("train", 400, seed=1)]
    scenes = [world.parse_prompt(prompt) for prompt in prompts]
    truths = [Image.fromarray(world.render(scene, rng)) for scene in scenes]
    lies = [Image.fromarray(world.render(world.corrupt(scene, rng), rng)) for scene in scenes]
    good, bad = (np.array([reward(images, prompts) for reward in REWARDS]) for images in (truths, lies))
    single = (good > bad).mean(axis=1)
    together = (good.mean(0) > bad.mean(0)).mean()
    assert (single < 0.9).all() and together > single.max() + 0.03
    assert world.color_reward(truths[:3], prompts[:3]) == world.color_reward(truths[:3], prompts[:3])


def test_noisy_pairs_are_labelled_by_the_verifier_and_flipped(tmp_path):
    import pairs

    dataset = load_dataset(str(truths_and_lies(tmp_path / "synpic", 40, seed=3)), split="train")
    for flip, low, high in ((0.0, 0, 0), (0.3, 25, 75)):
        rows, counts = pairs.make_pairs(dataset, flip, seed=1)
        wrong = 0
        for row in rows:
            images = [Image.open(BytesIO(row[name])) for name in ("jpg_0", "jpg_1")]
            one, other = world.accuracy(images, [row["caption"]] * 2)
            assert (row["label_0"] == 0.5) == (one == other)
            wrong += row["label_0"] != 0.5 and (row["label_0"] == 1) != (one > other)
        assert counts == {"pairs": 240, "labelled": 160, "wrong": wrong} and low <= wrong <= high
    assert len({row["image_0_uid"] for row in rows} | {row["image_1_uid"] for row in rows}) == 160


def test_shipped_generators_draw_what_is_asked_and_differ_in_quality():
    size = sum(path.stat().st_size for path in (ROOT / "shapes" / "models").rglob("*") if path.is_file())
    assert size <= 31e6
    assert json.loads((ROOT / "shapes" / "models" / "TRAINING.json").read_text())["command"]
    prompts = [row["prompt"] for row in world.sample_prompts("train", 96, seed=2)]
    found = {}
    for name in ("base", "early"):
        pipeline = DiffusionPipeline.from_pretrained(ROOT / "shapes" / "models" / name, dtype=torch.float32)
        assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
        images = pipeline(prompts, num_inference_steps=12, guidance_scale=3.0, generator=generators).images
        found[name] = np.mean(world.accuracy(images, prompts))
    assert found["base"] > 0.25 and found["base"] > found["early"]


ABSENT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
SD3_CALL, ZIMAGE_CALL = (
    {"num_inference_steps": 10, "guidance_scale": guidance, "max_sequence_length": length}
    for guidance, length in ((3.0, 16), (2.0, 64))
)


@pytest.mark.parametrize(
    "name, call, absent", [("sd3", SD3_CALL, {}), ("sd3", SD3_CALL, ABSENT_T5), ("zimage", ZIMAGE_CALL, {})]
)
def test_shipped_transformers_draw_what_is_asked_sd3_also_without_t5(name, call, absent):
    folder = ROOT / "shapes" / "models" / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10e6
    assert json.loads((ROOT / "shapes" / "models" / f"TRAINING_{name.upper()}.json").read_text())["command"]
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    assert pipeline.vae.config.latent_channels == 16
    pipeline.set_progress_bar_config(disable=True)
    prompts = [row["prompt"] for row in world.sample_prompts("train", 64, seed=2)]
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
    size = {"height": 32, "width": 32}
    images = pipeline([*prompts], generator=generators, **size, **call).images
    assert np.mean(world.accuracy(images, prompts)) > 0.2


def truths_and_lies(folder: Path, n: int, seed: int) -> Path:
    """A ranked dataset of rendered pictures: per prompt two truths and two lies, judged by the five rewards."""
    rng, rows = np.random.default_rng(seed), []
    for i, row in enumerate(world.sample_prompts("train", n, seed)):
        scene = world.parse_prompt(row["prompt"])
        scenes = [scene, world.corrupt(scene, rng), scene, world.corrupt(scene, rng)]
        pixels = [world.render(each, rng) for each in scenes]
        scores = np.array([reward([Image.fromarray(p) for p in pixels], [row["prompt"]] * 4) for reward in REWARDS])
        rows.append({"prompt_id": str(i), "prompt": row["prompt"], "images": [encoded(p) for p in pixels]})
        rows[i] |= {"preference_probability": preference_probability(scores), "rank": preference_rank(scores)}
    return write_dataset(folder, rows, drop=("generators", "seeds", "scores"))


def implicit_accuracy(lora: Path, cache: Path, rows: Path) -> float:
    """Share of the pairs of a dataset that the trained model orders right, at timesteps drawn as in training."""
    import train_rankdpo_sdxl as script

    options = {"resolution": 32, "beta_dpo": 200.0, "rank": 8, "seed": 123, "cache_dir": str(cache)}
    args = script.ScriptArguments(dataset_name=str(rows), output_dir=f"{rows}-unused", **options)
    args.pretrained_model_name_or_path = str(ROOT / "shapes" / "models" / "base")
    table, parts = script.load_ranked_dataset(args)
    labels = script.make_labels(args, table)
    labels["key"] = [key for part in parts for key in script.row_keys(part, labels).values()]
    run = script.plan_run(args, script.make_accelerator(args), labels)
    scheduler = DDPMScheduler.from_pretrained(args.pretrained_model_name_or_path, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet", dtype=torch.float32
    )
    script.add_lora(unet, rank=8)
    state = {k.removeprefix("unet."): v for k, v in load_file(lora / "pytorch_lora_weights.safetensors").items()}
    set_peft_model_state_dict(unet, state)
    found = []
    # Four timesteps and noises for each prompt; the place is not used.
    draws = [(draw, i, 0) for draw in range(4) for i in range(len(labels["key"]))]
    for start in range(0, len(draws), 16):
        items = [script.read_row(args, run, labels, scheduler, draw) for draw in draws[start : start + 16]]
        batch = torch.utils.data.default_collate(items)
        with torch.no_grad():
            _, metrics = script.training_step(unet, unet, scheduler, batch, args)
        found.append(metrics["implicit_accuracy"].item())
    return float(np.mean(found))


def test_rankdpo_learns_preferences_that_hold_on_other_prompts(tmp_path):
    """Right labels teach an order that holds on prompts not trained on; random labels do not."""
    train, test = truths_and_lies(tmp_path / "train", 128, seed=1), truths_and_lies(tmp_path / "test", 64, seed=2)
    model = ["--pretrained_model_name_or_path", ROOT / "shapes" / "models" / "base", "--resolution", 32]
    flags = [*model, *"--rank 8 --beta_dpo 1000 --learning_rate 1e-3 --train_batch_size 8 --report_to none".split()]
    flags += ["--validation_num_inference_steps", 1, "--cache_dir", tmp_path / "cache"]
    for name, more in {"right": [], "random": ["--rank_by", "random"]}.items():
        here = ["--dataset_name", train, "--output_dir", tmp_path / name, "--max_train_steps", 60]
        call("train_rankdpo_sdxl", *flags, *here, *more)
    # Encodes the test prompts; its LoRA is not used.
    call("train_rankdpo_sdxl", *flags, "--dataset_name", test, "--output_dir", tmp_path / "x", "--max_train_steps", 1)
    right, random = (implicit_accuracy(tmp_path / name, tmp_path / "cache", test) for name in ("right", "random"))
    assert right > 0.6 and right > random + 0.08, (right, random)
