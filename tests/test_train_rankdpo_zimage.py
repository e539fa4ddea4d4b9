# SPDX-License-Identifier: Apache-2.0
"""What a user of train_rankdpo_zimage.py sees, and what it computes, against diffusers' scheduler and pipeline."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import (
    call,
    check_card,
    check_gallery,
    copy_of,
    learned,
    logged,
    lora_difference,
    ranked_rows,
    run,
    run_until,
    same_lora,
    torchrun,
    write_dataset,
)
from datasets import load_dataset
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from safetensors.torch import load_file
from test_train_speed import needs_compiler
from test_user_study import study_of

import train_rankdpo_zimage as script
import user_study


FLAGS = (
    "--resolution 32 --rank 4 --learning_rate 1e-2 --beta_dpo 100 --validation_num_inference_steps 1 --report_to none"
).split()
# Of 9, 32 and 47 tokens, the template's 8 included. The model fills them up to 32, 32 and 64.
PROMPTS = ["star", " ".join(["red"] * 24), " ".join(["a blue circle"] * 13)]


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Among prompts of about the same length a short one and two long ones."""
    rows = ranked_rows(n=10)
    for row, prompt in zip(rows, PROMPTS):
        row["prompt"] = prompt
    return rows


@pytest.fixture(scope="session")
def flags(tiny_zimage, rows, tmp_path_factory):
    data = write_dataset(tmp_path_factory.mktemp("data") / "ranked", rows)
    cache = tmp_path_factory.mktemp("cache")
    return ["--pretrained_model_name_or_path", tiny_zimage, "--dataset_name", data, "--cache_dir", cache, *FLAGS]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    more = "--max_train_steps 4 --train_batch_size 5 --checkpointing_steps 2 --validation_steps 3"
    call("train_rankdpo_zimage", *flags, "--output_dir", folder, *more.split())
    return folder


@pytest.fixture(scope="session")
def pipeline(tiny_zimage):
    pipeline = ZImagePipeline.from_pretrained(tiny_zimage, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_one_lora_file_changes_the_images_exactly_as_the_trained_model_does(trained, pipeline, rows):
    """And scores are 0 at the start. The card says how to use the file."""
    logs = logged(trained)
    assert logs[0]["chosen_error"] == logs[0]["rejected_error"] == 0.0 and logs[-1]["chosen_error"] != 0.0
    files = [path for path in trained.rglob("*.safetensors") if "checkpoint" not in str(path)]
    assert [file.name for file in files] == ["pytorch_lora_weights.safetensors"]
    assert len(learned(trained)) == 2 * 4 * 4  # of two layers and two refiners
    check_gallery(pipeline, trained, [row["prompt"] for row in rows[:4]], files, guidance_scale=4.0)
    card = check_card(trained)
    assert "ZImagePipeline" in card and "- z-image" in card and "models/loras" in card and "comfyui/" not in card
    assert "| timesteps | logit_normal, logit_mean 1.1, logit_std 1 |" in card and "max_sequence_length=" not in card


def test_prompts_are_cached_trimmed_as_the_pipeline_encodes_them(flags, trained, pipeline, rows, tmp_path):
    """Without padding; those of the empty prompt too. Encoded at every step, they train the same LoRA."""
    (cache,) = (path for path in flags[5].iterdir() if list(path.glob("*.safetensors")))
    lengths = []
    for prompt in ["", *(row["prompt"] for row in rows)]:
        (found,) = load_file(cache / f"{script.content_key(prompt)}.safetensors").values()
        with torch.no_grad():
            (wanted,), _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
        assert torch.equal(found, wanted)
        lengths.append(len(found))
    assert lengths[0] == 8 and lengths[1] < 32 < lengths[3] <= 64
    more = "--max_train_steps 4 --train_batch_size 5 --cache_text_embeddings false --output_dir".split()
    call("train_rankdpo_zimage", *flags, *more, tmp_path / "fly")
    assert lora_difference(trained, tmp_path / "fly") < 1e-6


def test_model_and_lora_work_in_the_other_scripts(trained, pipeline, tiny_zimage, tmp_path):
    """build_synpic.py draws prompts of unequal lengths in one batch, evaluate.py the LoRA beside its base in bf16, and
    user_study.py takes the pictures; the prompts are the user's, not the pipeline's template around them."""
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 64}
    calls = {"free": size | {"guidance_scale": 0.0}, "guided": size | {"guidance_scale": 4.0}}
    entries = [{"name": name, "model": str(tiny_zimage), "call": call} for name, call in calls.items()]
    (tmp_path / "generators.yaml").write_text(json.dumps(entries))
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], PROMPTS[2]]))
    metric = tmp_path / "metric.py"
    metric.write_text("def red(images, prompts):\n    return [image.getpixel((0, 0))[0] for image in images]\n")
    flags = ["--prompts", tmp_path / "prompts.txt", "--output_dir"]
    more = ["--generators", tmp_path / "generators.yaml", "--image_format", "png", "--rewards", f"{metric}:red"]
    call("build_synpic", *flags, tmp_path / "synpic", *more)
    built = load_dataset(str(tmp_path / "synpic"), split="train")
    assert sorted(built["prompt"]) == sorted([PROMPTS[0], PROMPTS[2]])
    for row in built:
        for name, seed, image in zip(row["generators"], row["seeds"], row["images"]):
            drawn = pipeline(row["prompt"], generator=torch.Generator().manual_seed(seed), **calls[name]).images[0]
            assert np.abs(np.int16(drawn) - np.int16(image)).max() <= 1

    more = ["--pretrained_model_name_or_path", tiny_zimage, "--loras", f"mine={trained}", "--metrics", f"{metric}:red"]
    more += "--dtype bfloat16 --resolution 32 --max_sequence_length 64 --num_inference_steps 1".split()
    call("evaluate", *flags, tmp_path / "evaluation", *more, "--guidance_scale", 4)
    files = [sorted((tmp_path / "evaluation/images" / name).glob("*.png")) for name in ("base", "mine")]
    assert [len(part) for part in files] == [2, 2]
    assert all(not np.array_equal(Image.open(base), Image.open(mine)) for base, mine in zip(*files))
    study = study_of(*flags[:2], "--evaluation_dir", tmp_path / "evaluation", "--study_dir", tmp_path / "study")
    assert [row["prompt"] for row in study.record["prompts"]] == [PROMPTS[0], PROMPTS[2]]
    for number, name in itertools.product(range(2), ("base", "mine")):
        assert Image.open(user_study.picture_file(study.folder, study.record, number, name)).size == (32, 32)


def make_batch(pipeline, prompts: list[str], k: int = 2) -> dict:
    """A batch as `collate` makes it, of random latents, with the sigmas of some timesteps."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt([*prompts], do_classifier_free_guidance=False)
    rows = [
        {
            "latents": torch.randn(k, 16, 8, 8, generator=generator),
            "noise": torch.randn(1, 16, 8, 8, generator=generator).expand(k, 16, 8, 8),
            "sigmas": FlowMatchEulerDiscreteScheduler(shift=6.0).sigmas[200 * i + 300],
            "prompt_0": prompt,
        }
        for i, prompt in enumerate(embeds)
    ]
    return script.collate(rows)


def part_of(batch: dict, i: int) -> dict:
    parts = {name: batch[name][i : i + 1] for name in ("latents", "noise", "sigmas")}
    return parts | {"prompt_0": batch[f"prompt_{i}"]}


def test_errors_are_those_of_the_pipeline_s_own_step_whatever_the_batch(pipeline):
    """The pipeline's Euler step from σ to 0 tells its velocity: so time, sign, shapes and prompt of `predict` are the
    pipeline's. Prompts of unequal lengths in a batch have the errors that each has alone."""
    batch, args = make_batch(pipeline, PROMPTS), script.ScriptArguments(dataset_name="x")
    with torch.no_grad():
        errors, prediction, target = script.predict(pipeline.transformer, None, batch, args)
        for i in range(3):
            alone = script.predict(pipeline.transformer, None, part_of(batch, i), args)[0]
            assert torch.allclose(errors[i], alone[0], rtol=1e-6)
    assert len({len(batch[f"prompt_{i}"][0]) for i in range(3)}) == 3 and errors.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        sigma, latents, noise = batch["sigmas"][i], batch["latents"][i, j], batch["noise"][i, j]
        noisy = (1 - sigma) * latents + sigma * noise
        options = {"height": 32, "width": 32, "output_type": "latent", "guidance_scale": 0.0}
        options |= {"num_inference_steps": 1, "sigmas": [(sigma / (6 - 5 * sigma)).item()]}  # the shift comes on top
        step = pipeline(prompt_embeds=[batch[f"prompt_{i}"][0]], latents=noisy[None], **options).images[0]
        velocity = (noisy - step) / sigma
        assert torch.allclose(prediction[i, j], velocity, atol=1e-4)
        wanted = (noise - latents - velocity).double().square().mean()
        assert errors[i, j].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.equal(target, batch["noise"] - batch["latents"])


def test_the_default_density_of_timesteps():
    """Of a schedule that a shift of 6 has moved: logit σ has the mean ln 6 − 1.1. Uniform timesteps lie near 1."""
    found = {}
    for scheme in ("logit_normal", "none"):
        args = script.ScriptArguments(dataset_name="x", weighting_scheme=scheme)
        schedule, shape = FlowMatchEulerDiscreteScheduler(shift=6.0), torch.Size([2, 16, 2, 2])
        drawn = [script.sample_noise(args, schedule, (0, 0, i), shape)["sigmas"] for i in range(1000)]
        assert all((schedule.sigmas == sigma).any() for sigma in drawn[:20])
        found[scheme] = torch.stack(drawn)
    assert script.ScriptArguments(dataset_name="x").weighting_scheme == "logit_normal"
    logits = torch.logit(found["logit_normal"].clamp(max=0.9999))
    assert logits.mean() == pytest.approx(math.log(6) - 1.1, abs=0.1) and logits.std() == pytest.approx(1, abs=0.1)
    assert found["none"].median() == pytest.approx(0.857, abs=0.02) and (found["none"] > 0.9).float().mean() > 0.35


def test_killed_and_resumed_run_gives_the_same_bits(flags, tmp_path):
    """4 steps straight against 2, kill -9, resume: the same LoRA, and the same optimizer."""
    more = "--max_train_steps 4 --train_batch_size 3 --gradient_accumulation_steps 4 --checkpointing_steps 2"
    more += " --lr_scheduler cosine --noise image --proportion_empty_prompts 0.3"
    command = [*flags, *more.split(), "--output_dir"]
    call("train_rankdpo_zimage", *command, tmp_path / "straight")
    killed = tmp_path / "killed"
    run_until(killed / "checkpoint-2", "train_rankdpo_zimage.py", *command, killed)
    assert not (killed / "checkpoint-4").exists()
    call("train_rankdpo_zimage", *command, killed, "--resume_from_checkpoint", "latest")
    assert same_lora(tmp_path / "straight", killed)
    paths = [tmp_path / name / "checkpoint-4" / "training_state.pt" for name in ("straight", "killed")]
    states = [torch.load(path, weights_only=True)["optimizer"]["state"] for path in paths]
    for a, b in zip(*(state.values() for state in states)):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_agree_with_one(flags, tmp_path):
    more = "--max_train_steps 4 --learning_rate 1e-3 --proportion_empty_prompts 0.3 --train_batch_size".split()
    call("train_rankdpo_zimage", *flags, *more, 4, "--output_dir", tmp_path / "one")
    run(*torchrun(2, "train_rankdpo_zimage.py"), *flags, *more, 2, "--output_dir", tmp_path / "two")
    assert lora_difference(tmp_path / "one", tmp_path / "two") < 1e-6
    learned(tmp_path / "one")


def test_turbo_is_warned_of(flags, tiny_zimage, tmp_path, capsys):
    """And the card's code cuts prompts where the training did."""
    turbo = copy_of(tiny_zimage, tmp_path / "turbo", **{"scheduler/scheduler_config": {"shift": 3.0}})
    here = ["--pretrained_model_name_or_path", turbo, "--output_dir", tmp_path / "lora", "--max_train_steps", 1]
    call("train_rankdpo_zimage", *flags, *here, "--max_sequence_length", 64, "--weighting_scheme", "mode")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "Turbo" in line)
    assert line.startswith(f"--pretrained_model_name_or_path {turbo} has shift 3")
    card = check_card(tmp_path / "lora")
    assert "**options, max_sequence_length=64).images" in card and "| timesteps | mode, mode_scale 1.29 |" in card


@needs_compiler
def test_compiled_blocks_take_prompts_of_any_length(flags, rows, tmp_path):
    """Of six lengths, where blocks of fixed shapes would fail at the fourth; and the losses are the eager run's."""
    longer = [{**row, "prompt": " ".join(["red"] * (20 + 32 * i))} for i, row in enumerate(rows[:6])]
    data = write_dataset(tmp_path / "data", longer)
    more = ["--dataset_name", data, "--max_train_steps", 6, "--adam_epsilon", 1e-4]  # see test_train_speed.py
    torch._dynamo.reset()
    for name, flag in (("eager", []), ("compiled", ["--compile"])):
        call("train_rankdpo_zimage", *flags, *more, *flag, "--output_dir", tmp_path / name)
    eager, compiled = (logged(tmp_path / name) for name in ("eager", "compiled"))
    assert compiled[0]["chosen_error"] == compiled[0]["rejected_error"] == 0.0
    for a, b in zip(eager, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
