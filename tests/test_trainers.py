# SPDX-License-Identifier: Apache-2.0
"""What is alike in all trainers, a table each: variants train, unfit flags, rows and models are refused in one line."""

import json
from functools import partial

import pytest
from conftest import (
    TRAINERS,
    call,
    copy_of,
    learned,
    load,
    logged,
    pair_rows,
    ranked_rows,
    refused,
    refused_early,
    write_dataset,
    write_pairs,
)
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler


SDXL, SD3, ZIMAGE, QSD = "train_rankdpo_sdxl", "train_rankdpo_sd3", "train_rankdpo_zimage", "train_dpo_qsd"
MODEL = "--pretrained_model_name_or_path"
VARIANTS = [
    (SDXL, "--mixed_precision bf16 --gradient_checkpointing --use_8bit_adam --rank_source predicted"),
    (SDXL, "--loss_type plackett_luce --sft_weight 0.5 --proportion_empty_prompts 0.5 --cache_text_embeddings false"),
    (SDXL, "--safeguard 0.5 --sft_weight 0.1 --time_ids image --rank_by random --dataloader_num_workers 1"),
    (SDXL, "--loss_type dpo_gain --generators g0 g2 --rank_by second --max_train_samples 4"),
    (SDXL, "--loss_type lair --rank_by second --lair_tau 0.1 --lair_lambda 0.01 --precompute_ref"),
    (SD3, "--mixed_precision bf16 --gradient_checkpointing --weighting_scheme cosmap --noise image --safeguard 0.6"),
    (SD3, "--loss_type sft --use_8bit_adam --weighting_scheme mode --use_text_encoder_3 false"),
    (
        ZIMAGE,
        "--mixed_precision bf16 --gradient_checkpointing --weighting_scheme cosmap --noise image --precompute_ref",
    ),
    (ZIMAGE, "--safeguard 0.6 --use_8bit_adam --weighting_scheme none --train_batch_size 3"),
    (QSD, "--loss_type ipo --use_8bit_adam --order random --mixed_precision bf16 --safeguard 0.9 --sft_weight 0.1"),
    (QSD, "--loss_type orpo --proportion_empty_prompts 0.5 --noise image --cache_text_embeddings false"),
]


@pytest.mark.parametrize("script, more", VARIANTS)
def test_variants_train(trainer_flags, tmp_path, script, more):
    """An untrained LoRA is exactly the base: the first step has no margin."""
    call(script, *trainer_flags(script), "--output_dir", tmp_path / "lora", "--max_train_steps", 2, *more.split())
    learned(tmp_path / "lora")
    first = logged(tmp_path / "lora")[0]
    compares = "--loss_type sft" not in more and "orpo" not in more
    assert not compares or first["margin"] == first["chosen_error"] == first["rejected_error"] == 0
    without_t5 = "text_encoder_3=None, tokenizer_3=None" in (tmp_path / "lora" / "README.md").read_text()
    assert without_t5 == ("--use_text_encoder_3 false" in more)


@pytest.mark.parametrize("script", TRAINERS)
def test_every_step_sees_the_same_rows_on_any_number_of_processes(script):
    """Four rows a step, one process straight through, against splits that begin later. Each row once an epoch."""
    module = load(script)

    def steps(length: int, processes: int, size: int, accumulation: int, first: int, number: int) -> list:
        sizes = {"train_batch_size": size, "gradient_accumulation_steps": accumulation, "seed": 3}
        args = module.ScriptArguments(dataset_name="x", **sizes)
        samplers = [module.micro_batches(args, length, process, processes, first) for process in range(processes)]
        parts = [sampler for sampler in samplers for _ in range(accumulation)]
        return [sorted(item for sampler in parts for item in next(sampler)) for _ in range(number)]

    for length in range(1, 14):
        whole = steps(length, 1, 4, 1, 0, 12)
        for start, split in enumerate([(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2), (1, 1, 4)]):
            assert steps(length, *split, start, 6) == whole[start : start + 6]
        items = [item for step in whole for item in step]
        for number in range(len(items) // length):
            assert sorted(row for epoch, row, _ in items if epoch == number) == list(range(length))


# Flags, and words of the line that refuses them. Values out of their ranges: tests/faults.py.
BAD_FLAGS = {
    SDXL: {
        "--beta_dpo 0": "--beta_dpo 0|greater than 0",
        "--prompt_column caption": "column 'caption' is absent|text|prompt_id",
        "--images_column prompt": "column 'prompt' is string|lists of images",
        "--rank_by beauty": "--rank_by beauty|first, second",
        "--loss_type weighted_sft": "hpsv2.1|first, second|--rank_by",
        "--loss_type weighted_sft --rank_by first": "row 0|`first`|below 0|--rank_by",
        "--loss_type plackett_luce --safeguard 0.5": "--safeguard|plackett_luce",
        "--loss_type dpo --rank_source predicted": "--rank_source|--loss_type dpo",
        "--lair_tau 1": "--lair_tau: --loss_type rankdpo does not use it",
        "--loss_type lair --safeguard 0.5": "--safeguard: --loss_type lair does not use it",
        "--loss_type sft --sft_weight 1": "--sft_weight|--loss_type sft",
        "--loss_type sft --precompute_ref": "--precompute_ref: --loss_type sft does not use it",
        "--safeguard 1.5": "--safeguard 1.5|at most 1",
        "--generators g0 flux": "--generators g0 flux|at least 2",
    },
    SD3: {
        "--resolution 40": "--resolution 40|multiple of 16",
        "--max_sequence_length 513": "--max_sequence_length 513|512",
        "--logit_std 0": "--logit_std 0|greater than 0",
    },
    ZIMAGE: {
        "--mixed_precision fp16": "--mixed_precision|fp16",
        "--resolution 40": "--resolution 40|multiple of 16",
        "--max_sequence_length 513": "--max_sequence_length 513|512",
    },
    QSD: {
        "--top_fraction 0.001": "--top_fraction|none of 22",
        "--min_quality 2": "--min_quality|none of 22",
        "--quality_column q": "column 'q' is absent|score_pairs.py|--order random",
        "--prompt_column text": "column 'text' is absent|caption",
        "--prompt_column has_label": "'has_label' is bool|text",
        "--image_0_column caption": "'caption' is string|images",
        "--time_ids image": "--time_ids image|no micro-conditioning",
        "--loss_type orpo --safeguard 0.9": "--safeguard|orpo",
    },
}


@pytest.mark.parametrize("script, more", [(script, more) for script, table in BAD_FLAGS.items() for more in table])
def test_bad_flags_are_named(trainer_flags, tmp_path, monkeypatch, script, more):
    here = ["--output_dir", tmp_path / "out", *more.split()]
    message = refused_early(monkeypatch, script, *trainer_flags(script), *here)
    assert all(word in message for word in BAD_FLAGS[script][more].split("|")), message
    assert not (tmp_path / "out").exists()


PHI = "preference_probability"
# What is wrong in row 2, and words of the line.
BAD_ROWS = [
    (SDXL, {"prompt": "  "}, "p2|prompt is empty"),
    (SDXL, {"images": slice(1), PHI: [1.0], "rank": [1]}, "at least 2 images"),
    (SDXL, {"images": slice(3), PHI: [1, 0.5, 0], "rank": [1, 2, 3], "generators": ["a"] * 3}, "3 images|row 0"),
    (SDXL, {PHI: None}, PHI),
    (SDXL, {PHI: [0.5, 0.5]}, "permutation"),
    (SDXL, {PHI: [0.5, 0.5, float("nan"), 0.0]}, PHI),
    (SDXL, {PHI: [1.5, 0.5, 0.2, 0.0]}, "outside [0, 1]"),
    (SDXL, {PHI: [1.0, 0.5, 0.2, 0.0], "rank": [4, 3, 2, 1]}, "contradicts"),
    (SDXL, {"rank": [1, 1, 2, 3]}, "permutation"),
    (SDXL, {"prompt_id": "p0"}, "row 0"),
    (SDXL, {"images": [{"bytes": b"PNG", "path": None}] * 4}, "p2|image 0 does not decode"),
    (QSD, {"label_0": 2.0}, "label_0|2.0|0, 0.5 or 1"),
    (QSD, {"quality": float("nan")}, "quality"),
    (QSD, {"caption": " "}, "caption|empty"),
    (QSD, {"jpg_1": b"no picture"}, "image 1 does not decode"),
    (QSD, {"jpg_0": None}, "image 0 does not decode"),
]


@pytest.mark.parametrize("script, change, words", BAD_ROWS)
def test_bad_rows_are_named(trainer_flags, tmp_path, monkeypatch, script, change, words):
    """Before a model is loaded and an image is read. Images are read to be encoded, and no sooner."""
    early = "decode" not in words
    rows, write = (pair_rows(4), write_pairs) if script == QSD else (ranked_rows(4), write_dataset)
    for name, value in change.items():
        rows[2][name] = rows[2][name][value] if isinstance(value, slice) else value
    more = ["--dataset_name", write(tmp_path / "data", rows), "--output_dir", tmp_path / "out"]
    more += ["--cache_dir", tmp_path / "cache"]
    refuse = partial(refused_early, monkeypatch) if early else refused
    message = refuse(script, *trainer_flags(script), *more)
    assert all(word in message for word in ["row 2", *words.split("|")]), message
    assert not early or not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


SCHEDULER = "scheduler/scheduler_config"
# A file of the model, what it says, and words of the line.
OTHER_MODELS = [
    (SDXL, SCHEDULER, dict(FlowMatchEulerDiscreteScheduler().config), "beta_schedule"),
    (SDXL, SCHEDULER, dict(EDMEulerScheduler().config), "beta_schedule"),
    (SDXL, SCHEDULER, {"use_flow_sigmas": True}, "use_flow_sigmas"),
    (SDXL, SCHEDULER, {"prediction_type": "sample"}, "prediction_type"),
    (SDXL, "unet/config", {"in_channels": 9}, "in_channels"),  # inpainting
    (SDXL, "unet/config", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),  # LCM
    (SDXL, "model_index", {"requires_aesthetics_score": True, "text_encoder": [None, None]}, "aesthetics_score"),
    (SDXL, "vae/config", {"latents_mean": [0.0] * 4}, "latents_mean"),  # Playground
    (SDXL, "model_index", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
    (SD3, SCHEDULER, {"use_dynamic_shifting": True}, "has use_dynamic_shifting True"),
    (SD3, SCHEDULER, {"_class_name": "DPMSolverMultistepScheduler"}, "has _class_name DPMSolverMultistepScheduler"),
    (SD3, "transformer/config", {"in_channels": 33}, "has in_channels 33"),
    (SD3, "transformer/config", {"_class_name": "FluxTransformer2DModel"}, "has _class_name FluxTransformer2DModel"),
    (SD3, "vae/config", {"latent_channels": 4}, "has latent_channels 4"),
    (ZIMAGE, SCHEDULER, {"use_dynamic_shifting": True}, "has use_dynamic_shifting True"),
    (ZIMAGE, "transformer/config", {"in_channels": 33}, "has in_channels 33"),
    (ZIMAGE, "vae/config", {"latent_channels": 4}, "has latent_channels 4"),
    (QSD, "unet/config", {"in_channels": 9}, "in_channels"),
]


@pytest.mark.parametrize("script, file, values, words", OTHER_MODELS)
def test_models_that_the_objective_does_not_fit(trainer_flags, tmp_path, monkeypatch, script, file, values, words):
    flags = trainer_flags(script)
    model = copy_of(flags[1], tmp_path / "model", **{file: values})
    if words == "beta_schedule":  # of another scheduler the file says nothing else
        (model / f"{file}.json").write_text(json.dumps(values))
    message = refused_early(monkeypatch, script, *flags, MODEL, model, "--output_dir", tmp_path / "out")
    assert message.startswith(f"{MODEL} {model}") and words in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, other", [(SDXL, ZIMAGE), (SD3, SDXL), (ZIMAGE, SD3), (QSD, SD3)])
def test_each_script_names_the_right_one_for_another_s_model(trainer_flags, tmp_path, script, other):
    more = (MODEL, trainer_flags(other)[1], "--output_dir", tmp_path / "out")
    assert f"{other}.py" in refused(script, *trainer_flags(script), *more) and not (tmp_path / "out").exists()
