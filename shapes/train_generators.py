# SPDX-License-Identifier: Apache-2.0
"""Trains the two generators of the shapes world from scratch, on a CPU, and saves them as ordinary SDXL pipelines.

    python shapes/train_generators.py --output_dir shapes/models

Both are `StableDiffusionXLPipeline` folders (real diffusers and transformers classes, 3.3 million parameters, fp16
safetensors) that `from_pretrained` loads: `base`, the model that preference training improves, and `early`, the
average of the weights at half of the same training, a worse model for Syn-Pic to rank. A quarter of the training
images show one thing other than their caption says (`world.corrupt`), as captions of the web do. That is what
preference training can mend: the model can draw what is asked, but has learnt not to take captions quite literally.

`TRAINING.json` beside the models records the command, seed, versions and time that made them.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


CATEGORY_WEIGHTS = {
    "single_object": 0.5,
    "colors": 1.0,
    "two_object": 1.0,
    "counting": 1.5,
    "position": 2.5,
    "color_attr": 1.5,
}
WRONG_CAPTIONS = 0.25  # share of training images that show one thing other than the caption says
MAX_TOKENS = 16


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell the world's words; one token a word, the same at every build."""
    words = sorted({word for category in world.CATEGORIES for s in world.scenes(category) for word in s.text.split()})
    words += sorted({word for prefix in world.PREFIXES for word in prefix.split()} - set(words))
    alphabet = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = alphabet + [letter + "</w>" for letter in alphabet]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # apply what is merged already, first learnt first; then learn the leftmost pair
            pairs = list(zip(pieces, pieces[1:]))
            known = [pair for pair in merges if pair in pairs]
            if not known:
                merges.append(pairs[0])
                vocab.append("".join(pairs[0]))
            at = pairs.index(known[0] if known else pairs[0])
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(vocab))},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 48],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=world.SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        block_out_channels=[48, 96],
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 1],
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )


def make_data(number: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Rendered images, float32 (number, 3, 32, 32) in [-1, 1], with their (sometimes wrong) captions."""
    rng = np.random.default_rng(seed)
    weights = np.array([CATEGORY_WEIGHTS[category] for category in world.CATEGORIES])
    images, captions = [], []
    for category in tqdm(rng.choice(world.CATEGORIES, number, p=weights / weights.sum()), desc="render"):
        caption = str(rng.choice(world.prompts(str(category), "train")))
        scene = world.parse_prompt(caption)
        if rng.random() < WRONG_CAPTIONS:
            scene = world.corrupt(scene, rng)
        images.append(world.render(scene, rng))
        captions.append(caption)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1.0, captions


def train_vae(vae: AutoencoderKL, pixels: torch.Tensor, steps: int, batch_size: int = 32) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="vae")
    for _ in progress:
        batch = pixels[torch.randint(len(pixels), (batch_size,))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(decoded, batch) + F.l1_loss(decoded, batch) + 1e-4 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior means, scaled to unit variance; the scale goes into the VAE's configuration."""
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in tqdm(pixels.split(256), desc="encode")])
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return latents * vae.config.scaling_factor


def encode_prompts(text_encoders, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As StableDiffusionXLPipeline.encode_prompt: both penultimate hidden states, and the second pooled output."""
    outputs = [encoder(input_ids, output_hidden_states=True) for encoder in text_encoders]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


def train_generator(pipeline: StableDiffusionXLPipeline, latents, captions, steps: int, batch_size: int = 64):
    """Trains UNet and text encoders jointly; returns the averaged weights at half of the steps and at the end."""
    modules = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]).train()
    averaged = copy.deepcopy(modules).eval().requires_grad_(False)
    input_ids = pipeline.tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, 0)
    add_time_ids = torch.tensor([world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE]).float().repeat(batch_size, 1)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.03, final_div_factor=10
    )
    early = None
    progress = tqdm(range(1, steps + 1), desc="generator")
    for step in progress:
        index = torch.randint(len(latents), (batch_size,))
        prompt_embeds, pooled = encode_prompts(modules[1:], input_ids[index])
        # An empty prompt is all zeros at generation (force_zeros_for_empty_prompt), so it is here too.
        keep = (torch.rand(batch_size) >= 0.1).float()
        prompt_embeds, pooled = prompt_embeds * keep[:, None, None], pooled * keep[:, None]
        timesteps = torch.randint(0, 1000, (batch_size,))
        noise = torch.randn(batch_size, *latents.shape[1:])
        signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents[index] + (1 - signal).sqrt() * noise
        added = {"text_embeds": pooled, "time_ids": add_time_ids}
        prediction = modules[0](noisy, timesteps, prompt_embeds, added_cond_kwargs=added).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (1 + step) / (10 + step))
        for average, value in zip(averaged.parameters(), modules.parameters()):
            average.lerp_(value.detach(), 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.4f}")
        if step == steps // 2:
            early = copy.deepcopy(averaged)
    return early, averaged


def save(pipeline: DiffusionPipeline, modules: dict[str, torch.nn.Module], folder: Path) -> None:
    pipeline.register_modules(**modules)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(temporary)
    for file in temporary.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes 0600
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def write_record(args: argparse.Namespace, started: float, file: str) -> None:
    """What made the models: command, seed, time, versions."""
    record = {
        "command": "python " + " ".join(sys.argv),
        "seed": args.seed,
        "seconds": round(time.time() - started),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    (args.output_dir / file).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def main():
    parser = argparse.ArgumentParser(description="Train the shapes world's generators.")
    parser.add_argument("--output_dir", type=Path, default=Path("shapes/models"))
    parser.add_argument("--num_images", type=int, default=24000)
    parser.add_argument("--vae_steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    torch.manual_seed(args.seed)

    pixels, captions = make_data(args.num_images, args.seed)
    tokenizer = make_tokenizer()
    text_encoder, text_encoder_2 = make_text_encoders(tokenizer)
    vae = make_vae()
    train_vae(vae, pixels, args.vae_steps)
    latents = encode_images(vae, pixels)

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_unet(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    early, final = train_generator(pipeline, latents, captions, args.steps)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    names = ("unet", "text_encoder", "text_encoder_2")
    save(pipeline, dict(zip(names, early)), args.output_dir / "early")
    save(pipeline, dict(zip(names, final)), args.output_dir / "base")
    write_record(args, started, "TRAINING.json")


if __name__ == "__main__":
    main()
