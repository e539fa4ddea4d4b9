# SPDX-License-Identifier: Apache-2.0
"""What a user of train_rankdpo_sd3.py sees, and what it computes, against diffusers' scheduler and pipeline."""

import json
import math
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, check_card, lora_difference, make_tiny_sd3, ranked_rows, refused, run, run_until, torchrun
from PIL import Image
from safetensors.torch import load_file
from test_train_rankdpo_sdxl import copy_of

import train_rankdpo_sd3 as script


FLAGS = (
    "--resolution 32 --rank 4 --learning_rate 1e-2 --beta_dpo 100 --validation_num_inference_steps 2 --report_to none "
    "--max_sequence_length 20"
).split()


@pytest.fixture(scope="session")
def flags(tiny_sd3, ranked_dataset, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    model = ("--pretrained_model_name_or_path", tiny_sd3, "--dataset_name", ranked_dataset, "--cache_dir", cache)
    return [*model, *FLAGS]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    more = "--max_train_steps 6 --train_batch_size 2 --checkpointing_steps 2 --checkpoints_total_limit 2"
    call("train_rankdpo_sd3", *flags, "--output_dir", folder, *more.split(), "--validation_steps", 3)
    return folder


def test_lora_changes_the_images_exactly_as_the_trained_model_does(trained, tiny_sd3):
    """The gallery was drawn by the model in training; an ordinary pipeline draws the same pixels from the file."""
    from diffusers import StableDiffusion3Pipeline

    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, dtype=torch.float32)
    prompts = [row["prompt"] for row in ranked_rows(n=10)[:4]]

    def draw(i):
        image = pipeline(
            prompts[i],
            num_inference_steps=2,
            guidance_scale=7.0,
            height=32,
            width=32,
            max_sequence_length=20,
            generator=torch.Generator("cpu").manual_seed(i),
        ).images[0]
        return np.asarray(image)

    for i in range(4):
        assert np.array_equal(draw(i), np.asarray(Image.open(trained / "images" / f"{i}_base.png")))
    pipeline.load_lora_weights(trained)
    changed = False
    for i in range(4):
        tuned = np.asarray(Image.open(trained / "images" / f"{i}.png"))
        assert np.array_equal(draw(i), tuned)
        changed |= not np.array_equal(tuned, np.asarray(Image.open(trained / "images" / f"{i}_base.png")))
    assert changed


def test_one_file_and_a_card_that_says_how_to_use_it(trained):
    files = [path.name for path in trained.rglob("*.safetensors") if "checkpoint" not in str(path)]
    assert files == ["pytorch_lora_weights.safetensors"]
    card = check_card(trained)
    assert "StableDiffusion3Pipeline" in card and "- sd3" in card and "<Gallery />" in card
    assert "models/loras" in card and "comfyui/" not in card
    assert "text_encoder_3=None" not in card and "max_sequence_length=20).images[0]" in card
    assert "| T5 | 20 tokens |" in card


def test_card_carries_the_licence_of_the_base(tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    base = "license: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md"
    (tmp_path / "base.md").write_text(f"---\n{base}\n---\n")
    monkeypatch.setattr(script, "file_of", lambda *where: tmp_path / "base.md")
    args = arguments(
        pretrained_model_name_or_path="stabilityai/stable-diffusion-3.5-medium",
        use_text_encoder_3=False,
        validation_prompts=["a red circle"],
        output_dir=str(tmp_path),
    )
    args.dataset_name, args.max_sequence_length = "user/synpic", 256
    picture = Image.new("RGB", (8, 8))
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    script.write_card(args, run, [picture], [picture], {"steps": 1})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "other" and card.data.license_name == "stabilityai-ai-community"
    home = f"https://huggingface.co/{args.pretrained_model_name_or_path}"
    assert card.data.license_link == f"{home}/blob/main/LICENSE.md"
    assert card.data.base_model == args.pretrained_model_name_or_path and card.data.datasets == ["user/synpic"]
    assert "text_encoder_3=None, tokenizer_3=None" in card.text and "max_sequence_length" not in card.text


def test_killed_and_resumed_run_gives_the_same_bits(flags, tmp_path):
    more = "--max_train_steps 12 --train_batch_size 5 --gradient_accumulation_steps 4 --checkpointing_steps 6"
    more += " --lr_scheduler cosine --lr_warmup_steps 2 --weighting_scheme logit_normal"
    command = [*flags, *more.split(), "--output_dir"]
    call("train_rankdpo_sd3", *command, tmp_path / "straight")

    killed = tmp_path / "killed"
    run_until(killed / "checkpoint-6", "train_rankdpo_sd3.py", *command, killed)
    assert not (killed / "checkpoint-12").exists()

    call("train_rankdpo_sd3", *command, killed, "--resume_from_checkpoint", "latest")
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path / "straight", killed))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    paths = [tmp_path / name / "checkpoint-12" / "training_state.pt" for name in ("straight", "killed")]
    states = [torch.load(path, weights_only=True) for path in paths]
    for a, b in zip(*(state["optimizer"]["state"].values() for state in states)):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_agree_with_one(flags, tmp_path):
    more = "--max_train_steps 5 --learning_rate 1e-3".split()
    call("train_rankdpo_sd3", *flags, *more, "--train_batch_size", 4, "--output_dir", tmp_path / "one")
    more += ["--cache_dir", tmp_path / "cache"]  # two processes encode, too
    run(*torchrun(2, "train_rankdpo_sd3.py"), *flags, *more, "--train_batch_size", 2, "--output_dir", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["global_batch_size"] == 4
    assert "2 x CPU" in (tmp_path / "two" / "README.md").read_text()
    assert lora_difference(tmp_path / "one", tmp_path / "two") < 1e-6
    lora = load_file(tmp_path / "one" / "pytorch_lora_weights.safetensors")
    assert max(tensor.abs().max().item() for name, tensor in lora.items() if "lora_B" in name) > 1e-3


def test_prompts_encoded_on_the_fly_train_the_same_lora(flags, tmp_path):
    """And then the cache holds latents only."""
    more = ["--max_train_steps", 4, "--train_batch_size", 3]
    call("train_rankdpo_sd3", *flags, *more, "--output_dir", tmp_path / "cached")
    cache = ["--cache_dir", tmp_path / "cache", "--cache_text_embeddings", "false"]
    call("train_rankdpo_sd3", *flags, *more, *cache, "--output_dir", tmp_path / "fly")
    assert [set(row) for row in cached_rows(tmp_path / "cache")] == [{"latents", "time_ids"}] * 10
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("cached", "fly"))
    # The prompts of a batch go through the encoders together, not each alone: last digits differ.
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4
    assert max(tensor.abs().max().item() for name, tensor in a.items() if "lora_B" in name) > 1e-2


def cached_rows(cache: Path) -> list[dict]:
    return [item for item in map(load_file, cache.glob("*/*.safetensors")) if "latents" in item]


@pytest.mark.parametrize("t5", [True, False])
def test_cached_rows_hold_what_the_pipeline_would_compute(tmp_path, ranked_dataset, t5):
    """Prompt embeddings as StableDiffusion3Pipeline.encode_prompt's, also without T5, and none of its zeros on disk."""
    from diffusers import StableDiffusion3Pipeline

    model = make_tiny_sd3(tmp_path / "model", t5=t5)
    call(
        "train_rankdpo_sd3",
        *("--pretrained_model_name_or_path", model, "--dataset_name", ranked_dataset, "--max_train_steps", 1, *FLAGS),
        *("--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"),
    )
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


def test_empty_prompts_are_embedded_as_the_pipeline_does(flags, tiny_sd3, tmp_path, monkeypatch):
    """The same rows in every run, whether embeddings are cached or not."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, dtype=torch.float32)
    options = {"do_classifier_free_guidance": False, "max_sequence_length": 20}
    with torch.no_grad():
        wanted, _, pooled, _ = pipeline.encode_prompt("", "", "", **options)
    seen, original = [], script.training_step

    def spy(model, reference, noise_scheduler, batch, args):
        found = script.pipeline_embeds(args, batch)
        for embeds, own_pooled in zip(found["prompt_embeds"], found["pooled_prompt_embeds"]):
            same = torch.allclose(embeds, wanted[0], atol=1e-6)
            assert same == torch.allclose(own_pooled, pooled[0], atol=1e-6)
            seen.append(same)
        return original(model, reference, noise_scheduler, batch, args)

    monkeypatch.setattr(script, "training_step", spy)
    more = "--max_train_steps 4 --train_batch_size 10 --proportion_empty_prompts 0.3 --cache_text_embeddings".split()
    for cached in ("true", "false"):
        call("train_rankdpo_sd3", *flags, "--output_dir", tmp_path / cached, *more, cached)
    assert seen[:40] == seen[40:] and 4 <= sum(seen[:40]) <= 22


@pytest.mark.parametrize(
    "more",
    [
        "--mixed_precision bf16 --gradient_checkpointing --weighting_scheme mode",
        "--use_8bit_adam --rank_source predicted --weighting_scheme cosmap --use_text_encoder_3 false",
        "--loss_type sft --dataloader_num_workers 1 --cache_text_embeddings false",
        "--noise image --safeguard 0.6 --sft_weight 0.1 --proportion_empty_prompts 0.5 --mixed_precision bf16",
    ],
)
def test_variants_train(flags, tmp_path, more):
    call("train_rankdpo_sd3", *flags, "--output_dir", tmp_path / "lora", "--max_train_steps", 2, *more.split())
    lora = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in lora.values())
    assert max(tensor.abs().max().item() for name, tensor in lora.items() if "lora_B" in name) > 1e-4


def test_sd35_trains_both_attentions_and_loads_in_diffusers(flags, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model = make_tiny_sd3(tmp_path / "sd35", qk_norm="rms_norm")
    more = ["--pretrained_model_name_or_path", model, "--cache_dir", tmp_path / "cache", "--max_train_steps", 2]
    call("train_rankdpo_sd3", *flags, *more, "--output_dir", tmp_path / "lora")
    lora = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert sum("attn2." in name for name in lora) == 2 * 4
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "lora")
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(lora)


# The timestep, the noise and the target


def scheduler(shift=3.0):
    from diffusers import FlowMatchEulerDiscreteScheduler

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


def test_a_density_that_reaches_1_stays_in_the_schedule(monkeypatch):
    for u in (0.0, 1.0, 1.0001, -0.0001):
        density = "compute_density_for_timestep_sampling"
        monkeypatch.setattr(script, density, lambda *a, u=u, **k: torch.tensor([u]))
        assert 0 < draw_sigma(arguments(), 0)[0] <= 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scheme", ["none", "cosmap"])
def test_untrained_lora_gives_exactly_log_2_times_the_weights(tiny_sd3, checkpointing, scheme):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
    transformer.requires_grad_(False)
    script.add_lora(transformer, rank=4)
    transformer.train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    batch, args = make_batch(), arguments(beta_dpo=5000, weighting_scheme=scheme)
    loss, metrics = script.training_step(transformer, transformer, scheduler(), batch, args)
    pairs = script.dcg_weights(batch["phi"], batch["rank"]) * (batch["phi"][:, :, None] > batch["phi"][:, None, :])
    log_2 = torch.tensor(math.log(2), dtype=torch.float32)
    assert loss.item() == (pairs * log_2).sum((1, 2)).mean().item()
    assert metrics["margin"].item() == 0
    loss.backward()
    trained = {name for name, p in transformer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # Every B but that of the last block's text queries, whose answers the model throws away.
    wanted = {name for name, _ in transformer.named_parameters() if "lora_B" in name}
    assert trained == {name for name in wanted if not name.startswith("transformer_blocks.1.attn.add_q_proj")}


# Full size

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


@pytest.mark.parametrize(
    "config, parameters, modules, trained",
    [
        (SD3_MEDIUM, 2_028_328_000, 191, 37_552_128),
        (SD35_MEDIUM, 2_243_171_520, 243, 47_775_744),
        (SD35_LARGE, 8_056_627_520, 303, 94_322_688),
    ],
    ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
def test_full_size_lora_keys(config, parameters, modules, trained):
    """Every attention projection of image and text; the keys are those that ComfyUI's MMDiT map knows."""
    from diffusers import SD3Transformer2DModel
    from peft import get_peft_model_state_dict

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
        assert sum(p.numel() for p in transformer.parameters()) == parameters
        transformer.requires_grad_(False)
        script.add_lora(transformer, rank=64)
    assert sum(p.numel() for p in transformer.parameters() if p.requires_grad) == trained
    lora = get_peft_model_state_dict(transformer)
    wanted = set()
    for i in range(config["num_layers"]):
        last = i == config["num_layers"] - 1
        names = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        names += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"] + ["attn.to_add_out"] * (not last)
        if i in config.get("dual_attention_layers", ()):
            names += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
        wanted |= {f"transformer_blocks.{i}.{name}.lora_{m}.weight" for name in names for m in "AB"}
    assert lora.keys() == wanted and len(wanted) == 2 * modules


# Bad input


@pytest.mark.parametrize(
    "more, words",
    [
        (["--beta_dpo", 0], ["--beta_dpo 0", "greater than 0"]),
        (["--resolution", 40], ["--resolution 40", "multiple of 16"]),
        (["--max_sequence_length", 513], ["--max_sequence_length 513", "512"]),
        (["--logit_std", 0], ["--logit_std 0", "greater than 0"]),
        (["--prompt_column", "caption"], ["column 'caption' is absent", "text"]),
        (["--rank_by", "beauty"], ["--rank_by beauty", "first, second"]),
        (["--resume_from_checkpoint", "no/checkpoint"], ["no/checkpoint"]),
        (["--pretrained_model_name_or_path", "no/such"], ["on the Hub"]),
    ],
)
def test_bad_flags_are_named(flags, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(script.AutoencoderKL, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises((SystemExit, OSError)) as stopped:  # OSError: of a model that is not there
        call("train_rankdpo_sd3", *flags, "--output_dir", tmp_path / "out", *more)
    assert all(word in str(stopped.value) for word in words), stopped.value
    assert not (tmp_path / "out").exists()


def test_each_script_sends_the_others_model_to_the_right_script(flags, tiny_sdxl, tiny_sd3, tmp_path):
    for name, model, right in [
        ("train_rankdpo_sd3", tiny_sdxl, "train_rankdpo_sdxl.py"),
        ("train_rankdpo_sdxl", tiny_sd3, "train_rankdpo_sd3.py"),
    ]:
        more = ("--dataset_name", flags[3], "--output_dir", tmp_path / "out", "--pretrained_model_name_or_path", model)
        assert right in refused(name, *more)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("scheduler/scheduler_config", "use_dynamic_shifting", True),
        ("scheduler/scheduler_config", "_class_name", "DPMSolverMultistepScheduler"),
        ("transformer/config", "in_channels", 33),
        ("transformer/config", "_class_name", "FluxTransformer2DModel"),
        ("vae/config", "latent_channels", 4),
    ],
)
def test_models_that_the_objective_does_not_fit_are_refused(flags, tiny_sd3, tmp_path, monkeypatch, file, key, value):
    monkeypatch.setattr(script.AutoencoderKL, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    model = copy_of(tiny_sd3, tmp_path / "model", **{file: {key: value}})
    more = ("--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "out")
    message = refused("train_rankdpo_sd3", *flags, *more)
    assert message.startswith(f"--pretrained_model_name_or_path {model}") and f"has {key} {value}" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_trains_in_bf16_on_a_gpu(flags, tmp_path):
    call(
        "train_rankdpo_sd3",
        *(*flags, "--output_dir", tmp_path / "lora", "--mixed_precision", "bf16", "--use_8bit_adam"),
        *("--max_train_steps", 3, "--dataloader_num_workers", 2),
    )
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
