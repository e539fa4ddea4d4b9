# SPDX-License-Identifier: Apache-2.0
"""Trains the shapes world's SD3-architecture generator from scratch, on a CPU, and saves it as an ordinary pipeline.

    python shapes/train_sd3_generator.py --output_dir shapes/models

The folder `sd3` is a `StableDiffusion3Pipeline` (real diffusers and transformers classes, 4.6 million parameters, fp16
safetensors): a multimodal diffusion transformer on 16-channel latents with a shift and a scale, flow matching, two
CLIP text encoders and a T5. It learns from the same images as the SDXL ones, a quarter of them with a wrong caption
(see train_generators.py); now and then without T5, so that it also draws when T5 is left out.

`TRAINING_SD3.json` beside the models records the command, seed, versions and time that made it.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import world
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tqdm import tqdm
from train_generators import MAX_TOKENS, make_data, make_tokenizer, save, train_vae, write_record
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer


WIDTH = 128  # of the transformer, and of both CLIP encoders side by side
MODULES = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def make_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the world's words."""
    words = {word for category in world.CATEGORIES for scene in world.scenes(category) for word in scene.text.split()}
    words |= {word for prefix in world.PREFIXES for word in prefix.split()}
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [("▁" + word, -1.0) for word in sorted(words)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def make_text_encoders(tokenizer_3: T5Tokenizer, clip_model: Path) -> list[torch.nn.Module]:
    """Two CLIPs that begin as the SDXL generator's second one: SD3's were trained beforehand too. T5 begins at zero."""
    clip = [CLIPTextModelWithProjection.from_pretrained(clip_model, subfolder="text_encoder_2") for _ in range(2)]
    t5 = T5Config(
        vocab_size=len(tokenizer_3),
        d_model=WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return [*(encoder.float() for encoder in clip), T5EncoderModel(t5)]


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 48],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        sample_size=world.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=world.SIZE // 4,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=world.SIZE // 8,
        qk_norm="rms_norm",
    )


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior means, shifted and scaled to zero mean and unit variance; both go into the VAE's configuration."""
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in tqdm(pixels.split(256), desc="encode")])
    shift, scale = round(latents.mean().item(), 5), round(1.0 / latents.std().item(), 5)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents - shift) * scale


def encode_prompts(text_encoders, ids: torch.Tensor, t5_ids: torch.Tensor, with_t5: torch.Tensor):
    """As StableDiffusion3Pipeline.encode_prompt; T5's part is zeros where `with_t5` is 0, as without that encoder."""
    clip = [encoder(ids, output_hidden_states=True) for encoder in text_encoders[:2]]
    clip_embeds = torch.cat([output.hidden_states[-2] for output in clip], dim=-1)
    t5_embeds = text_encoders[2](t5_ids)[0] * with_t5[:, None, None]
    prompt_embeds = torch.cat([F.pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1])), t5_embeds], dim=1)
    return prompt_embeds, torch.cat([output[0] for output in clip], dim=-1)


def train_generator(pipeline: StableDiffusion3Pipeline, latents, captions, steps: int, batch_size: int = 64):
    """Trains the transformer and all text encoders jointly; returns the averaged weights."""
    modules = torch.nn.ModuleList([getattr(pipeline, name) for name in MODULES]).train()
    averaged = copy.deepcopy(modules).eval().requires_grad_(False)

    def tokens(tokenizer, texts):
        padded = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        return padded.input_ids

    ids, t5_ids = tokens(pipeline.tokenizer, captions), tokens(pipeline.tokenizer_3, captions)
    empty, empty_t5 = tokens(pipeline.tokenizer, [""]), tokens(pipeline.tokenizer_3, [""])
    shift = pipeline.scheduler.config.shift
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.05, final_div_factor=10
    )
    progress = tqdm(range(1, steps + 1), desc="generator")
    for step in progress:
        index = torch.randint(len(latents), (batch_size,))
        # A prompt left out is an empty prompt, as at generation.
        keep = torch.rand(batch_size, 1) >= 0.1
        with_t5 = (torch.rand(batch_size) >= 0.2).float()
        prompt_embeds, pooled = encode_prompts(
            modules[1:], torch.where(keep, ids[index], empty), torch.where(keep, t5_ids[index], empty_t5), with_t5
        )
        sigmas = torch.sigmoid(torch.randn(batch_size))
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        noise = torch.randn(batch_size, *latents.shape[1:])
        mix = sigmas.view(-1, 1, 1, 1)
        prediction = modules[0](
            hidden_states=(1 - mix) * latents[index] + mix * noise,
            timestep=sigmas * 1000,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        loss = F.mse_loss(prediction, noise - latents[index])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (1 + step) / (10 + step))
        for average, value in zip(averaged.parameters(), modules.parameters()):
            average.lerp_(value.detach(), 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return averaged


def main():
    parser = argparse.ArgumentParser(description="Train the shapes world's SD3-architecture generator.")
    parser.add_argument("--output_dir", type=Path, default=Path("shapes/models"))
    parser.add_argument("--num_images", type=int, default=24000)
    parser.add_argument("--vae_steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    torch.manual_seed(args.seed)

    pixels, captions = make_data(args.num_images, args.seed)
    tokenizer, tokenizer_3 = make_tokenizer(), make_t5_tokenizer()
    text_encoders = make_text_encoders(tokenizer_3, args.output_dir / "base")
    vae = make_vae()
    train_vae(vae, pixels, args.vae_steps)
    latents = encode_images(vae, pixels)
    pipeline = StableDiffusion3Pipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoders[2],
        tokenizer_3=tokenizer_3,
    )
    averaged = train_generator(pipeline, latents, captions, args.steps)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save(pipeline, dict(zip(MODULES, averaged)), args.output_dir / "sd3")
    write_record(args, started, "TRAINING_SD3.json")


if __name__ == "__main__":
    main()
