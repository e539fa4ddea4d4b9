# SPDX-License-Identifier: Apache-2.0
"""A pipeline of SD1.5 or SDXL as one file, under the names that Stability AI, ComfyUI and Civitai use."""

import re

import torch


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
UNET |= {"mid_block.resnets.1": "middle_block.2"}
VAE = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "conv_shortcut": "nin_shortcut"}
VAE |= {
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
}
VAE |= {"to_q": "q", "to_k": "k", "to_v": "v", "resnets": "block", "downsamplers.0": "downsample"}
VAE |= {"upsamplers.0": "upsample", "down_blocks": "down"}
OPEN_CLIP = {"text_model.encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
OPEN_CLIP |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.": "attn.", "final_layer_norm": "ln_final"}
OPEN_CLIP |= {"text_model.": "", "embeddings.": "", "position_embedding.weight": "positional_embedding"}


def renamed(key: str, names: dict) -> str:
    for name, other in names.items():
        key = key.replace(name, other)
    return key


def unet_key(key: str, unet) -> str:
    n, names = unet.config.layers_per_block, UNET | (RESNET if "resnets" in key else {})
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key):
        side, block, kind, j, rest = found.groups()
        number, place = int(block) * (n + 1) + int(j) + (side == "down"), int(kind == "attentions")
        if kind == "downsamplers":
            number, rest = number + n, rest.replace("conv", "op")
        elif kind == "upsamplers":
            number, place = number + n, 1 + hasattr(unet.up_blocks[int(block)], "attentions")
        key = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{place}.{rest}"
    return renamed(key, names)


def vae_key(key: str, vae) -> str:
    last = len(vae.config.up_block_types) - 1
    key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
    return renamed(key, VAE)


def open_clip(weights: dict) -> dict:
    found = {}
    for key, tensor in weights.items():
        if "q_proj" in key:
            parts = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[renamed(key, OPEN_CLIP).replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif key == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif not re.search("[kv]_proj", key):
            found[renamed(key, OPEN_CLIP)] = tensor
    return found


def single_file(pipeline) -> dict[str, torch.Tensor]:
    """All weights of a StableDiffusionPipeline or StableDiffusionXLPipeline."""
    found = {
        f"model.diffusion_model.{unet_key(key, pipeline.unet)}": t for key, t in pipeline.unet.state_dict().items()
    }
    for key, tensor in pipeline.vae.state_dict().items():
        tensor = tensor[:, :, None, None] if re.search(r"(to_.|to_out\.0)\.weight", key) else tensor
        found[f"first_stage_model.{vae_key(key, pipeline.vae)}"] = tensor.contiguous()
    xl = hasattr(pipeline, "text_encoder_2")
    clip = "conditioner.embedders.0.transformer" if xl else "cond_stage_model.transformer"
    for key, tensor in pipeline.text_encoder.state_dict().items():
        found[f"{clip}.text_model.{key.removeprefix('text_model.')}"] = tensor
    if xl:
        second = open_clip(pipeline.text_encoder_2.state_dict())
        found |= {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in second.items()}
    return found
