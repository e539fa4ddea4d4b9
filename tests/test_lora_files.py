# SPDX-License-Identifier: Apache-2.0
"""The LoRA files' keys at full size against lists of what ComfyUI and kohya's network loader know.

tests/golden/*.txt: of SDXL and SD1.5 the names that ComfyUI (comfy/lora.py: `lora_unet_` and diffusers' path with `_`)
and kohya's network loader take; of SD3-Medium those of diffusers' own file, which ComfyUI takes as it is
(`transformer.` and diffusers' path; `add_*_proj` and `to_add_out` are the text's attention, which the last block does
not put out); of Z-Image the same, which ComfyUI's Lumina2 branch takes and adds to thirds of its fused qkv.
"""

import pytest
import torch
import train_speed
from conftest import ROOT
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

import train_dpo_qsd
import train_rankdpo_sd3
import train_rankdpo_sdxl
import train_rankdpo_zimage


RANK = 2


def full_size(script, family: str):
    """The architecture without weights, and a real LoRA on it. Z-Image's constructor has the published sizes."""
    with torch.device("meta"):
        if family == "zimage":
            model = ZImageTransformer2DModel()
        else:
            parts = train_speed.make_parts(family, train_speed.SIZES["full"])
            model = parts.get("unet") or parts["transformer"]
        model.requires_grad_(False)
        script.add_lora(model, rank=RANK)
    for name, module in model.named_modules():
        if name.endswith((".lora_A", ".lora_B")):
            module.to_empty(device="cpu")
            torch.nn.init.normal_(module["default"].weight)
    return model


@pytest.mark.parametrize(
    "script, family, parameters, modules",
    [
        (train_rankdpo_sdxl, "sdxl", 2_567_463_684, 560),
        (train_dpo_qsd, "sdxl", 2_567_463_684, 560),
        (train_dpo_qsd, "sd15", 859_520_964, 128),
        (train_rankdpo_sd3, "sd3", 2_028_328_000, 191),
        (train_rankdpo_zimage, "zimage", 6_154_908_736, 136),
    ],
)
def test_lora_files_hold_the_golden_keys(script, family, parameters, modules, tmp_path):
    model = full_size(script, family)
    script.save_lora(model, tmp_path)
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name) == parameters
    found = load_file(tmp_path / script.LORA_FILE)
    wanted = (ROOT / "tests" / "golden" / f"{family}.txt").read_text().split()
    assert len(found) == 2 * modules == 2 * len(wanted)
    prefix = "transformer" if family in ("sd3", "zimage") else "unet"
    with safe_open(tmp_path / script.LORA_FILE, framework="pt") as file:
        metadata = file.metadata()["lora_adapter_metadata"]
    assert f'"{prefix}.lora_alpha": {RANK}' in metadata and f'"{prefix}.r": {RANK}' in metadata
    if prefix == "transformer":
        assert found.keys() == {f"{module}.{part}.weight" for module in wanted for part in ("lora_A", "lora_B")}
        return
    comfyui = script.comfyui_state_dict(get_peft_model_state_dict(model))
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert comfyui.keys() == {f"{module}.{part}" for module in wanted for part in parts}
    assert all(tensor == RANK for key, tensor in comfyui.items() if key.endswith(".alpha"))
    for path in {key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")}:
        module = "lora_" + path.replace(".", "_")
        assert torch.equal(found[f"{path}.lora_A.weight"], comfyui[f"{module}.lora_down.weight"])
        assert torch.equal(found[f"{path}.lora_B.weight"], comfyui[f"{module}.lora_up.weight"])
    assert convert_state_dict_to_kohya(found).keys() == comfyui.keys()


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_zimage_lora_loads_in_diffusers(tmp_path):
    train_rankdpo_zimage.save_lora(full_size(train_rankdpo_zimage, "zimage"), tmp_path)
    state, metadata = ZImagePipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    with torch.device("meta"):
        plain = ZImageTransformer2DModel()
    ZImagePipeline.load_lora_into_transformer(state, plain, metadata=metadata)
    loaded = {name.replace(".default_0", "") for name, _ in plain.named_parameters() if "lora_" in name}
    assert {f"transformer.{name}" for name in loaded} == state.keys()
