# SPDX-License-Identifier: Apache-2.0
"""A whole SDXL in one file, random weights under the original names, trains one step and gives the LoRA of the folder.

    python benchmarks/one_file.py outputs/single-file

It writes a file of 7 GB, and the script another 7 GB in the Hub's cache (HF_ASSETS_CACHE). On a CPU the step takes a
few minutes and 10 GB of memory. The configuration is SDXL's, written here, and the tokenizers are tiny: it needs no
network.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "shapes")]

import torch
from accelerate import init_empty_weights
from conftest import ranked_rows, write_dataset
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from single_file import single_file
from train_generators import make_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


UNET = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
}
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "pad_token_id": 1}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def make_pipeline() -> StableDiffusionXLPipeline:
    """SDXL on the meta device."""
    tokenizer = make_tokenizer()
    with init_empty_weights():
        return StableDiffusionXLPipeline(
            unet=UNet2DConditionModel(**UNET),
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP, **CLIP_L, projection_dim=768)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, **CLIP_G, projection_dim=1280)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            add_watermarker=False,
        )


def write_config(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """All of a folder but its weights: what `--single_file_config` reads."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            config = part.config
            config.save_pretrained(folder / name) if hasattr(config, "save_pretrained") else part.save_config(
                folder / name
            )
        elif part is not None and name != "feature_extractor":
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)


def main(folder: Path) -> None:
    import train_rankdpo_sdxl

    pipeline, file = make_pipeline(), folder / "model.safetensors"
    write_config(pipeline, folder / "config")
    if not file.exists():
        torch.manual_seed(0)
        pool = torch.randn(2**24).mul(0.02).bfloat16()  # repeated: billions of numbers take minutes

        def noise(shape: torch.Size) -> torch.Tensor:
            whole, rest = divmod(shape.numel(), len(pool))
            return torch.cat([pool] * whole + [pool[:rest]]).view(shape)

        save_file({name: noise(tensor.shape) for name, tensor in single_file(pipeline).items()}, file)
    if not (folder / "data").exists():
        write_dataset(folder / "data", ranked_rows(n=1, k=2))
    flags = f"""--pretrained_model_name_or_path {file} --single_file_config {folder / "config"}
        --dataset_name {folder / "data"} --output_dir {folder / "out"}
        --cache_dir {folder / "cache"} --resolution 32 --rank 4 --max_train_steps 1
        --mixed_precision bf16 --report_to none --validation_num_inference_steps 1 --gradient_checkpointing"""
    start = time.time()
    train_rankdpo_sdxl.main(train_rankdpo_sdxl.parse_arguments(flags.split()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with safe_open(folder / "out" / "pytorch_lora_weights.safetensors", "pt") as lora:
        found = {key: list(lora.get_slice(key).get_shape()) for key in lora.keys()}
    train_rankdpo_sdxl.add_lora(pipeline.unet, 4)
    wanted = train_rankdpo_sdxl.get_peft_model_state_dict(pipeline.unet)
    wanted = {f"unet.{key}": list(tensor.shape) for key, tensor in wanted.items()}
    assert found == wanted, "the LoRA of the file is not that of the folder"
    facts = {"tensors in the file": len(single_file(make_pipeline())), "GB": round(os.path.getsize(file) / 1e9, 2)}
    print(
        json.dumps(facts | {"LoRA keys": len(found), "seconds": round(time.time() - start), "peak GB": round(peak, 1)})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
