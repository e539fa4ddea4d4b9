# SPDX-License-Identifier: Apache-2.0
"""The LoRA files' keys at full size against lists of what ComfyUI and kohya's network loader know.

tests/golden/*.txt: of SDXL and SD1.5 the names that ComfyUI (comfy/lora.py: `lora_unet_` and diffusers' path with `_`)
and kohya's network loader take; of SD3-Medium those of diffusers' own file, which ComfyUI takes as it is
(`transformer.` and diffusers' path; `add_*_proj` and `to_add_out` are the text's attention, which the last block does
not put out); of Z-Image the same, which ComfyUI's Lumina2 branch takes and adds to thirds of its fused qkv.
"""

import pytest
import torch
from conftest import ROOT
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, ZImagePipeline, ZImageTransformer2DModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

import train_dpo_qsd
import train_rankdpo_sd3
import train_rankdpo_sdxl
import train_rankdpo_zimage


RANK = 2
# What diffusers' UNet2DConditionModel needs to become SDXL's UNet (stabilityai/stable-diffusion-xl-base-1.0).
SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# What diffusers' UNet2DConditionModel needs to become SD1.5's UNet (stable-diffusion-v1-5/stable-diffusion-v1-5).
SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


# What diffusers' SD3Transformer2DModel needs to become the published transformers (their config.json).
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}


def golden(name: str) -> list[str]:
    return (ROOT / "tests" / "golden" / f"{name}.txt").read_text().split()


def full_size(script, model_class, config: dict):
    """The architecture without weights, and a real LoRA on it."""
    with torch.device("meta"):
        model = model_class(**config)
        model.requires_grad_(False)
        script.add_lora(model, rank=RANK)
    for name, module in model.named_modules():
        if name.endswith((".lora_A", ".lora_B")):
            module.to_empty(device="cpu")
            torch.nn.init.normal_(module["default"].weight)
    return model


@pytest.mark.parametrize(
    "script, config, name, modules",
    [
        (train_rankdpo_sdxl, SDXL_UNET, "sdxl", 560),
        (train_dpo_qsd, SDXL_UNET, "sdxl", 560),
        (train_dpo_qsd, SD15_UNET, "sd15", 128),
    ],
    ids=["rankdpo-sdxl", "qsd-sdxl", "qsd-sd15"],
)
def test_unet_lora_files_hold_the_golden_keys(script, config, name, modules, tmp_path):
    unet = full_size(script, UNet2DConditionModel, config)
    script.save_lora(unet, tmp_path)
    diffusers = load_file(tmp_path / script.LORA_FILE)
    comfyui = script.comfyui_state_dict(get_peft_model_state_dict(unet))

    wanted = golden(name)
    assert len(wanted) == modules
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert comfyui.keys() == {f"{module}.{part}" for module in wanted for part in parts}
    assert all(tensor == RANK for key, tensor in comfyui.items() if key.endswith(".alpha"))
    paths = {key.removesuffix(".lora_A.weight") for key in diffusers if key.endswith(".lora_A.weight")}
    assert len(diffusers) == 2 * modules and {"lora_" + path.replace(".", "_") for path in paths} == set(wanted)
    for path in paths:
        module = "lora_" + path.replace(".", "_")
        assert torch.equal(diffusers[f"{path}.lora_A.weight"], comfyui[f"{module}.lora_down.weight"])
        assert torch.equal(diffusers[f"{path}.lora_B.weight"], comfyui[f"{module}.lora_up.weight"])
    assert convert_state_dict_to_kohya(diffusers).keys() == comfyui.keys()
    with safe_open(tmp_path / script.LORA_FILE, framework="pt") as file:
        metadata = file.metadata()["lora_adapter_metadata"]
    assert f'"unet.lora_alpha": {RANK}' in metadata and f'"unet.r": {RANK}' in metadata


def test_sd3_lora_file_holds_the_golden_keys(tmp_path):
    transformer = full_size(train_rankdpo_sd3, SD3Transformer2DModel, SD3_MEDIUM)
    train_rankdpo_sd3.save_lora(transformer, tmp_path)
    wanted = golden("sd3_medium")
    assert len(wanted) == 191
    found = load_file(tmp_path / train_rankdpo_sd3.LORA_FILE)
    assert found.keys() == {f"{module}.{part}.weight" for module in wanted for part in ("lora_A", "lora_B")}
    with safe_open(tmp_path / train_rankdpo_sd3.LORA_FILE, framework="pt") as file:
        metadata = file.metadata()["lora_adapter_metadata"]
    assert f'"transformer.lora_alpha": {RANK}' in metadata and f'"transformer.r": {RANK}' in metadata


SIZES = [(SD3_MEDIUM, 2_028_328_000, 191, 37_552_128), (SD35_MEDIUM, 2_243_171_520, 243, 47_775_744)]
SIZES.append((SD35_LARGE, 8_056_627_520, 303, 94_322_688))


@pytest.mark.parametrize(
    "config, parameters, modules, trained", SIZES, ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"]
)
def test_sd3_lora_is_on_every_attention(config, parameters, modules, trained):
    """Every attention projection of image and text; the text's last output is thrown away."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
        assert sum(p.numel() for p in transformer.parameters()) == parameters
        transformer.requires_grad_(False)
        train_rankdpo_sd3.add_lora(transformer, rank=64)
    assert sum(p.numel() for p in transformer.parameters() if p.requires_grad) == trained
    lora = get_peft_model_state_dict(transformer)
    assert len(lora) == 2 * modules
    assert sum(".attn2." in name for name in lora) == 2 * 4 * len(config.get("dual_attention_layers", ()))
    assert not any(f"transformer_blocks.{config['num_layers'] - 1}.attn.to_add_out" in name for name in lora)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_zimage_lora_file_holds_the_golden_keys_and_loads_in_diffusers(tmp_path):
    """The constructor's defaults are the published transformer's configuration."""
    transformer = full_size(train_rankdpo_zimage, ZImageTransformer2DModel, {})
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in transformer.parameters()]
    assert sum(size for size, trained in sizes if not trained) == 6_154_908_736
    assert sum(size for size, trained in sizes if trained) * 64 == 66_846_720 * RANK
    train_rankdpo_zimage.save_lora(transformer, tmp_path)
    found, wanted = load_file(tmp_path / train_rankdpo_zimage.LORA_FILE), golden("zimage")
    assert len(wanted) == 136
    assert found.keys() == {f"{module}.{part}.weight" for module in wanted for part in ("lora_A", "lora_B")}
    state, metadata = ZImagePipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert state.keys() == found.keys() and metadata["transformer.lora_alpha"] == metadata["transformer.r"] == RANK
    with torch.device("meta"):
        plain = ZImageTransformer2DModel()
    ZImagePipeline.load_lora_into_transformer(state, plain, metadata=metadata)
    loaded = {name.replace(".default_0", "") for name, _ in plain.named_parameters() if "lora_" in name}
    assert {f"transformer.{name}" for name in loaded} == found.keys()
