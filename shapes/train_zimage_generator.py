# SPDX-License-Identifier: Apache-2.0
"""Trains the shapes world's Z-Image generator from scratch, on a CPU, and saves it as an ordinary pipeline.

    python shapes/train_zimage_generator.py --output_dir shapes/models

The folder `zimage` is a `ZImagePipeline` (real diffusers and transformers classes, fp16 safetensors): a single-stream
diffusion transformer on 16-channel latents, whose time runs from noise to image, flow matching with a shift of 6, and a
Qwen3 that reads prompts of unequal lengths in its chat template. The VAE is that of the SD3 generator. It learns from
the same images as the others, a quarter of them with a wrong caption (see train_generators.py).

`TRAINING_ZIMAGE.json` beside the models records the command, seed, versions and time that made it: the one that is
shipped, of both trainings (see `make models`).
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import world
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from train_generators import make_data, save, write_record
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model


WIDTH = 128  # of the transformer and of the text encoder
TRAINING_SHIFT = 2.0  # that of drawing, 6, would leave out the small sigmas, which make the details
MODULES = ("transformer", "text_encoder")
# As Z-Image's template writes one turn of a user with `enable_thinking=True`.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer whose merges spell the world's words, with and without a space before them; any other text falls
    into bytes. The same at every build."""
    words = {word for category in world.CATEGORIES for scene in world.scenes(category) for word in scene.text.split()}
    words |= {word for prefix in world.PREFIXES for word in prefix.split()} | {"user", "assistant"}
    vocab, merges = sorted(ByteLevel.alphabet()), []
    for word in sorted(words):
        for start in ("", "Ġ"):  # a space, as byte-level tokenizers write it
            pieces = [*start, *word]
            while len(pieces) > 1:  # apply what is merged already, first learnt first; then learn the leftmost pair
                pairs = list(zip(pieces, pieces[1:]))
                known = [pair for pair in merges if pair in pairs]
                if not known:
                    merges.append(pairs[0])
                    vocab.append("".join(pairs[0]))
                at = pairs.index(known[0] if known else pairs[0])
                pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys([*vocab, *special]))},
        merges=merges,
        unk_token=None,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """Of its three layers two are read: Z-Image takes the last hidden state but one."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3Model(config)


def make_transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=16,
        dim=WIDTH,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 16, 16],
    )


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in tqdm(pixels.split(256), desc="encode")])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def encode_prompts(text_encoder: Qwen3Model, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """As ZImagePipeline.encode_prompt: of each prompt its own tokens."""
    hidden = text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return [states[: length.item()] for states, length in zip(hidden, mask.sum(dim=1))]


def train_generator(pipeline: ZImagePipeline, latents, captions, steps: int, batch_size: int = 64):
    """Trains transformer and text encoder jointly; returns the averaged weights."""
    modules = torch.nn.ModuleList([getattr(pipeline, name) for name in MODULES]).train()
    averaged = copy.deepcopy(modules).eval().requires_grad_(False)
    turns = [[{"role": "user", "content": caption}] for caption in ["", *captions]]
    options = {"add_generation_prompt": True, "enable_thinking": True, "tokenize": False}
    texts = [pipeline.tokenizer.apply_chat_template(turn, **options) for turn in turns]
    tokens = pipeline.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.05, final_div_factor=10
    )
    progress = tqdm(range(1, steps + 1), desc="generator")
    for step in progress:
        index = torch.randint(len(latents), (batch_size,))
        # A prompt left out is an empty prompt, as at generation. It is the first one.
        row = torch.where(torch.rand(batch_size) >= 0.1, index + 1, 0)
        prompts = encode_prompts(modules[1], tokens.input_ids[row], tokens.attention_mask[row])
        sigmas = torch.sigmoid(torch.randn(batch_size))
        sigmas = TRAINING_SHIFT * sigmas / (1 + (TRAINING_SHIFT - 1) * sigmas)
        noise = torch.randn(batch_size, *latents.shape[1:])
        mix = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - mix) * latents[index] + mix * noise
        velocities = modules[0]([*noisy.unsqueeze(2)], 1 - sigmas, prompts, return_dict=False)[0]
        loss = F.mse_loss(torch.stack([*velocities]).squeeze(2), latents[index] - noise)
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
    parser = argparse.ArgumentParser(description="Train the shapes world's Z-Image generator.")
    parser.add_argument("--output_dir", type=Path, default=Path("shapes/models"))
    parser.add_argument("--vae", type=Path, default=Path("shapes/models/sd3"), help="Pipeline to take the VAE of.")
    parser.add_argument("--num_images", type=int, default=24000)
    parser.add_argument("--start_from", type=Path, help="Pipeline of an earlier training whose weights to go on with.")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    torch.manual_seed(args.seed)

    pixels, captions = make_data(args.num_images, args.seed)
    tokenizer = make_qwen_tokenizer()
    vae = AutoencoderKL.from_pretrained(args.vae, subfolder="vae", dtype=torch.float32)
    latents = encode_images(vae, pixels)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=make_transformer(),
    )
    if args.start_from:
        earlier = ZImagePipeline.from_pretrained(args.start_from, dtype=torch.float32)
        for name in MODULES:
            getattr(pipeline, name).load_state_dict(getattr(earlier, name).state_dict())
    averaged = train_generator(pipeline, latents, captions, args.steps)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save(pipeline, dict(zip(MODULES, averaged)), args.output_dir / "zimage")
    write_record(args, started, "TRAINING_ZIMAGE.json")


if __name__ == "__main__":
    main()
