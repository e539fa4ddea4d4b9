# SPDX-License-Identifier: Apache-2.0
"""Models in one file: they train as the folder that they were made of, and predict v where they say so."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, copy_of, load, logged, make_tiny_sdxl, refused, same_lora
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from single_file import single_file, unet_key


NOOBAI = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
V_PREDICTION = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    return tmp_path / "assets" / "diffusers" / "single_file"


@pytest.fixture(scope="module")
def models(tiny_sd, tmp_path_factory):
    """Family → folder and file of a tiny model. diffusers knows SDXL by the tenth layer of its second text encoder."""
    base = tmp_path_factory.mktemp("files")
    found = {}
    for family, folder, kind in (
        ("sd", tiny_sd, StableDiffusionPipeline),
        ("sdxl", make_tiny_sdxl(base / "sdxl", second=(24, 10)), StableDiffusionXLPipeline),
    ):
        save_file(single_file(kind.from_pretrained(folder)), base / f"{family}.safetensors")
        found[family] = folder, base / f"{family}.safetensors"
    return found


FAMILIES = [("train_rankdpo_sdxl", "sdxl"), ("train_dpo_qsd", "sdxl"), ("train_dpo_qsd", "sd")]


@pytest.mark.parametrize("script, family", FAMILIES)
def test_a_single_file_trains_as_its_folder(script, family, models, trainer_flags, tmp_path, cache):
    folder, file = models[family]
    flags = [*trainer_flags(script), "--max_train_steps", 2, "--pretrained_model_name_or_path"]
    call(script, *flags, folder, "--output_dir", tmp_path / "folder")
    for _ in range(2):  # it is unpacked once
        out = ["--output_dir", tmp_path / "file", "--resume_from_checkpoint", "latest"]
        call(script, *flags, file, "--single_file_config", folder, *out)
    assert same_lora(tmp_path / "folder", tmp_path / "file") and len([*cache.iterdir()]) == 1
    card = (tmp_path / "file" / "README.md").read_text()
    assert f'from_single_file("{file}"' in card and "base_model" not in card


@pytest.mark.parametrize("says", ["file", "flags", "one flag"])
def test_v_prediction_with_zero_terminal_snr_is_trained_and_drawn(says, models, trainer_flags, tmp_path, cache):
    folder, file = models["sdxl"]
    more = ["--rescale_betas_zero_snr", *(["--prediction_type", "v_prediction"] if says == "flags" else [])]
    if says == "file":
        save_file(load_file(file) | NOOBAI, file := tmp_path / "noobai.safetensors")
        more = []
    flags = [*trainer_flags("train_rankdpo_sdxl"), "--pretrained_model_name_or_path", file]
    flags += ["--single_file_config", folder, "--output_dir", tmp_path / "out", "--max_train_steps", 1]
    call("train_rankdpo_sdxl", *flags, *more)
    (made,) = cache.iterdir()
    config = json.loads((made / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "EulerDiscreteScheduler" and V_PREDICTION.items() <= config.items()
    assert logged(tmp_path / "out")[0]["grad_norm"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pipeline.scheduler.from_config(pipeline.scheduler.config, **{V_PREDICTION})" in card


def test_a_flag_overrides_what_the_file_says(models, trainer_flags, tmp_path, cache):
    folder, file = models["sdxl"]
    save_file(load_file(file) | NOOBAI, noobai := tmp_path / "noobai.safetensors")
    flags = [*trainer_flags("train_rankdpo_sdxl"), "--pretrained_model_name_or_path", noobai, "--max_train_steps", 1]
    flags += ["--single_file_config", folder, "--prediction_type", "epsilon", "--variant", "fp16"]  # of folders
    call("train_rankdpo_sdxl", *flags, "--output_dir", tmp_path / "out")
    (made,) = cache.iterdir()
    config, as_published = (
        json.loads((path / "scheduler" / "scheduler_config.json").read_text()) for path in (made, folder)
    )
    keys = V_PREDICTION.keys() & as_published.keys()
    assert {key: config[key] for key in keys} == {key: as_published[key] for key in keys}
    assert config["prediction_type"] == "epsilon"
    assert "**{'prediction_type': 'epsilon'})" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("script", ["train_rankdpo_sdxl", "train_dpo_qsd"])
def test_the_objective_of_v_prediction_with_zero_terminal_snr(script):
    """Against a loop over the images in float64. The last step is noise alone: its target is minus the image."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **V_PREDICTION)
    torch.manual_seed(0)
    latents, noise, guess = torch.randn(3, 4, 2, 4, 8, 8)
    timesteps = torch.tensor([0, 500, 998, 999])
    batch = {"latents": latents, "noise": noise, "timesteps": timesteps, "prompt_embeds": torch.zeros(4, 1, 1)}
    batch |= {"pooled_prompt_embeds": torch.zeros(4, 1), "time_ids": torch.zeros(4, 2, 6)}
    batch["rank"] = torch.tensor([[1, 2]]).repeat(4, 1)
    args = SimpleNamespace(weight_dtype=torch.float32, time_ids="resolution")
    seen = {}

    def model(sample, **inputs):
        seen["noisy"] = sample
        return SimpleNamespace(sample=guess.flatten(0, 1))

    errors, _, _ = load(script).predict(model, scheduler, batch, args)
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # sqrt of the share of the image, 0 at the last step
    for b, t in enumerate(timesteps):
        signal, sigma = root[t], (1 - root[t] ** 2).sqrt()
        for i in range(2):
            x, e = latents[b, i].double(), noise[b, i].double()
            assert torch.allclose(seen["noisy"].view(latents.shape)[b, i].double(), signal * x + sigma * e, atol=1e-5)
            error = (signal * e - sigma * x - guess[b, i].double()).square().mean()
            assert torch.isclose(errors[b, i].double(), error, rtol=1e-4)
    assert root[-1] == 0 and torch.allclose(errors[3], (latents[3] + guess[3]).square().mean(dim=(1, 2, 3)))


def key(name: str, *shape: int) -> dict:
    return {name: torch.zeros(shape)}


UNET = "model.diffusion_model.input_blocks.0.0.weight"
XL = key("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", 1)
OTHERS = {
    "refiner": key(UNET, 1, 4, 3, 3) | key("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", 1),
    "inpainting": key(UNET, 1, 9, 3, 3) | XL,
    "cosxl": key(UNET, 1, 4, 3, 3) | XL | key("edm_vpred.sigma_max"),
    "lora": key("lora_unet_mid_block_attentions_0_proj_in.alpha"),
    "sd3": key("model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight", 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(name, trainer_flags, tmp_path):
    save_file(OTHERS[name], file := tmp_path / f"{name}.safetensors")
    for script in ("train_rankdpo_sdxl", "train_dpo_qsd"):
        flags = [*trainer_flags(script), "--pretrained_model_name_or_path", file, "--output_dir", tmp_path / "out"]
        assert refused(script, *flags).startswith(f"{file} is something else")
    assert not (tmp_path / "out").exists()


def test_a_distilled_file_is_warned_of_and_a_folder_needs_no_flags(models, trainer_flags, tmp_path, capsys):
    folder, file = models["sdxl"]
    save_file(load_file(file), turbo := tmp_path / "dreamshaperXL_Turbo.safetensors")
    flags = [*trainer_flags("train_rankdpo_sdxl"), "--output_dir", tmp_path / "out", "--max_train_steps", 1]
    call("train_rankdpo_sdxl", *flags, "--pretrained_model_name_or_path", turbo, "--single_file_config", folder)
    assert "distilled" in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "sdxl-turbo")
    flags = [*flags, "--output_dir", tmp_path / "other"]
    call("train_rankdpo_sdxl", *flags, "--pretrained_model_name_or_path", tmp_path / "sdxl-turbo")
    assert "sdxl-turbo is distilled" in capsys.readouterr().out
    message = refused("train_rankdpo_sdxl", *flags, "--prediction_type", "v_prediction")
    assert message.startswith("--prediction_type") and "single file" in message


@pytest.mark.parametrize("predicts", ["noise", "v"])
def test_evaluate_draws_a_single_file_as_its_folder(predicts, models, tmp_path):
    folder, file = models["sdxl"]
    if predicts == "v":
        save_file(load_file(file) | NOOBAI, file := tmp_path / "noobai.safetensors")
        folder = copy_of(folder, tmp_path / "noobai", **{"scheduler/scheduler_config": V_PREDICTION})
    (tmp_path / "prompts.txt").write_text("a red circle")
    flags = ["--prompts", tmp_path / "prompts.txt", "--metrics", "shapes/world.py:color_reward", "--resolution", 32]
    flags += ["--num_inference_steps", 1, "--pretrained_model_name_or_path"]
    call("evaluate", *flags, folder, "--output_dir", tmp_path / "folder")
    more = ["--single_file_config", models["sdxl"][0], "--variant", "fp16"]  # as in README's command; it is of folders
    call("evaluate", *flags, file, *more, "--output_dir", tmp_path / "file")
    drawn = [
        {f.relative_to(out): f.read_bytes() for f in out.rglob("images/**/*.png")}
        for out in (tmp_path / "folder", tmp_path / "file")
    ]
    assert drawn[0] and drawn[0] == drawn[1]


def test_lora_files_of_other_trainers_draw_the_same(models, tmp_path):
    """Of diffusers, of OneTrainer and ai-toolkit (with diffusers' paths), of kohya (with those of the single file)."""
    folder, _ = models["sdxl"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    files = {"diffusers": {}, "onetrainer": {}, "kohya": {}}
    torch.manual_seed(0)
    for part, short in (("unet", "unet"), ("text_encoder", "te1"), ("text_encoder_2", "te2")):
        for name, module in getattr(pipeline, part).named_modules():
            if re.search(r"(to_[qkv]|to_out\.0|ff\.net\.(0\.proj|2)|proj_in|[qkv]_proj|out_proj|mlp\.fc[12])$", name):
                rows, columns = module.weight.shape
                down, up = torch.randn(4, columns), torch.randn(rows, 4)
                path = name if part == "unet" or name.startswith("text_model") else f"text_model.{name}"
                pair = {"lora_A.weight": down, "lora_B.weight": up / 2}  # alpha is half the rank
                files["diffusers"] |= {f"{part}.{path}.{key}": value for key, value in pair.items()}
                pair = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
                original = unet_key(f"{path}.", pipeline.unet)[:-1] if part == "unet" else path
                for trainer, named in (("onetrainer", path), ("kohya", original)):
                    key = f"lora_{short}_{named.replace('.', '_')}"
                    files[trainer] |= {f"{key}.{kind}": value for kind, value in pair.items()}
    (tmp_path / "prompts.txt").write_text("a red circle")
    flags = ["--prompts", tmp_path / "prompts.txt", "--metrics", "shapes/world.py:color_reward", "--resolution", 32]
    flags += ["--num_inference_steps", 1, "--pretrained_model_name_or_path", folder, "--output_dir", tmp_path / "out"]
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    call("evaluate", *flags, "--loras", *(f"{name}={tmp_path}/{name}.safetensors" for name in files))
    drawn = {name: (tmp_path / "out/images" / name / "00000_0.png").read_bytes() for name in ("base", *files)}
    assert drawn["diffusers"] == drawn["onetrainer"] == drawn["kohya"] != drawn["base"]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_build_synpic_draws_a_single_file_as_its_folder(family, models, tmp_path):
    """One that predicts v, by NoobAI's keys or as its configuration says, is drawn as a folder that says so."""
    folder, file = models[family]
    euler, pndm = (
        {"model_index": {"scheduler": ["diffusers", f"{kind}Scheduler"]}} for kind in ("EulerDiscrete", "PNDM")
    )
    noobai = copy_of(folder, tmp_path / "noobai", **{"scheduler/scheduler_config": V_PREDICTION}, **euler)
    plain = copy_of(folder, tmp_path / "plain", **(pndm if family == "sd" else {}))  # which has no zero terminal SNR
    save_file(load_file(file) | NOOBAI, one := tmp_path / "noobai.safetensors")
    script, images = load("build_synpic"), []
    for model, config in ((folder, None), (file, folder), (noobai, None), (file, noobai), (one, plain)):
        entry = {"name": "a", "model": str(model), "load": {"config": str(config)} if config else {}}
        entry["call"] = {"num_inference_steps": 2, "height": 32, "width": 32}
        script.check_generator(entry, [])
        draw = script.Generator(entry, torch.device("cpu"), SimpleNamespace(generation_batch_size="1", compile=False))
        images.append(np.asarray(draw.draw(["a red circle"], [1])[0], dtype=int))
    away = [np.abs(image - images[2]).max() for image in images]
    assert np.array_equal(*images[:2]) and max(away[3:]) <= 1 < min(away[:2]), away


def test_build_synpic_tells_what_a_single_file_is(models, tmp_path, capsys):
    check, folder = load("build_synpic").check_generator, models["sdxl"][0]
    for name, weights in OTHERS.items():
        save_file(weights, file := tmp_path / f"{name}.safetensors")
        for config, _ in models.values():
            entry = {"name": "a", "model": str(file), "load": {"config": str(config)}}
            with pytest.raises(SystemExit, match=rf"{name}.safetensors is no StableDiffusion\w*, but e.g. a refiner"):
                check(entry, [])
    missing = {"name": "a", "model": str(tmp_path / "no.safetensors"), "load": {"config": str(folder)}}
    with pytest.raises(SystemExit, match="no.safetensors is no diffusers pipeline that can be read"):
        check(missing, [])
    save_file(load_file(models["sdxl"][1]), file := tmp_path / "xlLightning.safetensors")
    call = {"num_inference_steps": 6, "guidance_scale": 1.0}
    check(entry := {"name": "a", "model": str(file), "load": {"config": str(folder)}, "call": call}, [])
    assert not capsys.readouterr().err
    check(entry | {"call": {}}, [])
    assert (
        capsys.readouterr().err
        == f"warning: generator a: {file} is distilled, by its name: it needs at most 10 "
        + ("steps, and a guidance of at most 3\n")
    )
