# SPDX-License-Identifier: Apache-2.0
"""What a user of train_rankdpo_sd3.py sees, and what it computes, against diffusers' scheduler and pipeline."""

import math
from io import BytesIO
from pathlib import Path

import pytest
import torch
from conftest import (
    call,
    check_card,
    check_gallery,
    make_tiny_sd3,
    ranked_rows,
)
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

import train_rankdpo_sd3 as script


@pytest.fixture(scope="session")
def flags(trainer_flags):
    return [*trainer_flags("train_rankdpo_sd3"), "--max_sequence_length", 20]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    more = "--max_train_steps 4 --train_batch_size 3 --checkpointing_steps 2 --validation_steps 3"
    call("train_rankdpo_sd3", *flags, "--output_dir", folder, *more.split())
    return folder


def test_lora_changes_the_images_exactly_as_the_trained_model_does(trained, tiny_sd3):
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, dtype=torch.float32)
    prompts = [row["prompt"] for row in ranked_rows(n=10)[:4]]
    files = [trained / "pytorch_lora_weights.safetensors"]
    check_gallery(pipeline, trained, prompts, files, guidance_scale=7.0, max_sequence_length=20)


def test_one_file_and_a_card_that_says_how_to_use_it(trained):
    files = [path.name for path in trained.rglob("*.safetensors") if "checkpoint" not in str(path)]
    assert files == ["pytorch_lora_weights.safetensors"]
    card = check_card(trained)
    assert "StableDiffusion3Pipeline" in card and "- sd3" in card and "<Gallery />" in card
    assert "models/loras" in card and "comfyui/" not in card
    assert "text_encoder_3=None" not in card and "max_sequence_length=20).images[0]" in card
    assert "| T5 | 20 tokens |" in card


def test_prompts_encoded_on_the_fly_train_the_same_lora(flags, trained, tmp_path):
    """And then the cache holds latents only."""
    more = ["--max_train_steps", 4, "--train_batch_size", 3, "--cache_text_embeddings", "false"]
    call("train_rankdpo_sd3", *flags, *more, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "fly")
    assert [set(row) for row in cached_rows(tmp_path / "cache")] == [{"latents", "time_ids"}] * 10
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (trained, tmp_path / "fly"))
    # The prompts of a batch go through the encoders together, not each alone: last digits differ.
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


def cached_rows(cache: Path) -> list[dict]:
    return [item for item in map(load_file, cache.glob("*/*.safetensors")) if "latents" in item]


@pytest.mark.parametrize("t5", [True, False])
def test_cached_rows_hold_what_the_pipeline_would_compute(flags, tmp_path, t5):
    """Prompt embeddings as StableDiffusion3Pipeline.encode_prompt's, also without T5, and none of its zeros on disk."""
    model = make_tiny_sd3(tmp_path / "model", t5=t5)
    more = ["--pretrained_model_name_or_path", model, "--cache_dir", tmp_path / "cache", "--max_train_steps", 1]
    call("train_rankdpo_sd3", *flags, *more, "--output_dir", tmp_path / "out")
    items = cached_rows(tmp_path / "cache")
    assert len(items) == 10
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32, **absent)
    config = pipeline.vae.config
    for row in ranked_rows(n=10):
        (file,) = (tmp_path / "cache").glob(f"*/{script.content_key(row['prompt'])}.safetensors")
        parts = load_file(file)
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        t5_shape = (20 if t5 else 0, 32)
        assert shapes == {"clip_embeds": (16, 24), "pooled_prompt_embeds": (24,), "t5_embeds": t5_shape}
        found = script.pipeline_embeds(arguments(), {name: part[None] for name, part in parts.items()})
        assert found["prompt_embeds"].shape == (1, 16 + 20, 32)
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                row["prompt"], None, None, do_classifier_free_guidance=False, max_sequence_length=20
            )
        assert torch.equal(found["prompt_embeds"], embeds) and torch.equal(found["pooled_prompt_embeds"], pooled)
        pixels = pipeline.image_processor.preprocess(Image.open(BytesIO(row["images"][2]["bytes"])))
        with torch.no_grad():
            latents = (pipeline.vae.encode(pixels).latent_dist.mean - config.shift_factor) * config.scaling_factor
        assert sum(torch.allclose(item["latents"][2], latents[0], atol=1e-5) for item in items) == 1


def test_sd35_trains_both_attentions_and_loads_in_diffusers(flags, tmp_path):
    model = make_tiny_sd3(tmp_path / "sd35", qk_norm="rms_norm")
    more = ["--pretrained_model_name_or_path", model, "--cache_dir", tmp_path / "cache", "--max_train_steps", 2]
    call("train_rankdpo_sd3", *flags, *more, "--output_dir", tmp_path / "lora")
    lora = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert sum("attn2." in name for name in lora) == 2 * 4
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "lora")
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(lora)


def scheduler(shift=3.0):
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def arguments(**kwargs):
    return script.ScriptArguments(dataset_name="x", max_sequence_length=20, **kwargs)


def draw_sigma(args, seed):
    """The sigma of a row, and the generator that it is drawn with."""
    key = (args.seed, 0, f"p{seed}")
    generator = torch.Generator().manual_seed(int(script.seeded_generator(*key).integers(2**63)))
    return script.sample_noise(args, scheduler(), key, torch.Size([4, 16, 8, 8]))["sigmas"], generator


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.tensor([[0.9, 0.3, 0.6, 0.1], [0.2, 0.2, 0.8, 0.8]])
    drawn = [draw_sigma(arguments(), seed + i)[0] for i in range(2)]
    return {
        "latents": torch.randn(2, 4, 16, 8, 8, generator=generator),
        "noise": torch.randn(2, 1, 16, 8, 8, generator=generator).expand(2, 4, 16, 8, 8),
        "weight": torch.rand(2, 4, generator=generator),
        "sigmas": torch.stack(drawn),
        "clip_embeds": torch.randn(2, 16, 24, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 24, generator=generator),
        "t5_embeds": torch.randn(2, 20, 32, generator=generator),
        "phi": phi,
        "rank": (-phi).argsort(dim=1, stable=True).argsort(dim=1) + 1,
    }


class Recorder:
    """Stands for the transformer: keeps what it is given, answers with zeros."""

    def __call__(self, **inputs):
        self.inputs = inputs
        return type("Output", (), {"sample": torch.zeros_like(inputs["hidden_states"])})


def test_noising_and_target_are_the_schedulers():
    """Noisy latents bit for bit scale_noise's; the error of a zero prediction is the target's mean square."""
    model, batch = Recorder(), make_batch()
    loss, _ = script.training_step(model, model, scheduler(), batch, arguments(loss_type="weighted_sft"))
    latents = batch["latents"].flatten(0, 1)
    noise = batch["noise"].flatten(0, 1)
    schedule = scheduler()
    timesteps = torch.stack([schedule.timesteps[schedule.sigmas == sigma][0] for sigma in batch["sigmas"]])
    timesteps = timesteps.repeat_interleave(4)
    assert torch.equal(model.inputs["hidden_states"], scheduler().scale_noise(latents, timesteps, noise))
    assert torch.equal(model.inputs["timestep"], timesteps)
    errors = (noise - latents).double().square().mean((1, 2, 3)).view(2, 4)
    assert loss.item() == pytest.approx((batch["weight"] * errors).mean().item(), rel=1e-6)


@pytest.mark.parametrize("scheme", script.WEIGHTING_SCHEMES)
def test_timesteps_and_weights_are_those_of_diffusers_sd3_example(scheme):
    """The formulas of train_dreambooth_lora_sd3.py, written out: density, lookup of timestep and sigma, loss weight."""
    args, noise_scheduler = arguments(weighting_scheme=scheme, logit_mean=-0.3, logit_std=0.8), scheduler()
    for seed in range(200):
        sigma, generator = draw_sigma(args, seed)
        if scheme == "logit_normal":
            u = torch.sigmoid(torch.normal(-0.3, 0.8, (1,), generator=generator))
        else:
            u = torch.rand(1, generator=generator)
        if scheme == "mode":
            u = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        index = min(int(u * 1000), 999)
        assert sigma == noise_scheduler.sigmas[index]
        base = (1000 - index) / 1000
        assert sigma.item() == pytest.approx(3 * base / (1 + 2 * base), rel=1e-6)
        assert sigma * 1000 == noise_scheduler.timesteps[index]

    model, batch = Recorder(), make_batch()
    loss, _ = script.training_step(model, model, scheduler(), batch, arguments(loss_type="sft"))
    args.loss_type = "sft"
    weighed, _ = script.training_step(model, model, scheduler(), batch, args)
    errors = (batch["noise"] - batch["latents"]).square().mean((2, 3, 4))
    wins = torch.tensor([[3, 1, 2, 0], [0, 0, 2, 2]])  # of phi; the winner of every pair is denoised
    best = (errors * wins).sum(1) / wins.sum(1)
    sigma, weight = batch["sigmas"], torch.ones(2)
    if scheme == "cosmap":
        weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    assert loss.item() == pytest.approx(best.mean().item(), rel=1e-6)
    assert weighed.item() == pytest.approx((weight * best).mean().item(), rel=1e-6)
