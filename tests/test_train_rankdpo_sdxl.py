# SPDX-License-Identifier: Apache-2.0
"""What a user of train_rankdpo_sdxl.py sees: the LoRA, its effect, resume, several processes, refusals."""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    call,
    check_card,
    check_gallery,
    count_items,
    encoded,
    learned,
    logged,
    lora_difference,
    ranked_rows,
    refused,
    run,
    run_until,
    same_lora,
    torchrun,
    write_dataset,
)
from datasets import Dataset, List, load_dataset
from datasets import Image as DatasetsImage
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

import train_rankdpo_sdxl as script


@pytest.fixture(scope="session")
def flags(trainer_flags, tmp_path_factory):
    return [*trainer_flags("train_rankdpo_sdxl"), "--cache_dir", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    """One run with checkpoints, a limit, validation, a tracker and a price."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    more = "--max_train_steps 6 --train_batch_size 2 --checkpointing_steps 2 --checkpoints_total_limit 2"
    more += " --validation_steps 3 --report_to tensorboard --gpu_hourly_cost 3600"
    call("train_rankdpo_sdxl", *flags, "--output_dir", folder, *more.split())
    return folder


def test_files_of_a_run(trained):
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(trained.rglob("*tmp*"))
    card, logs = check_card(trained), logged(trained)
    assert "library_name: diffusers" in card and "<Gallery />" in card
    facts = ["base", "objective | rankdpo, beta 100", "learning rate | 0.01", "LoRA rank | 4", "batch | 2 prompts x 4"]
    facts += ["steps | 6", "seed | 0", "time", "GPU hours", "speed", "peak memory", "hardware | 1 x CPU"]
    facts.append(f"price | {sum(line['step_time'] for line in logs):.2f}")
    assert all(f"| {fact}" in card for fact in facts) and "How it was made" in card
    for line in logs:
        assert 0 <= line["data_time"] < line["step_time"]
        assert line["images_per_second"] == pytest.approx(8 / line["step_time"])
    for name in ("0.png", "0_base.png", "3.png"):
        assert Image.open(trained / "images" / name).size == (32, 32)
    assert list((trained / "logs").rglob("events.out.tfevents*"))
    mode = (trained / "pytorch_lora_weights.safetensors").stat().st_mode & 0o777
    assert mode == 0o644
    endings = [path.name for path in trained.rglob("*.safetensors") if "checkpoint" not in str(path)]
    assert sum(name.endswith("pytorch_lora_weights.safetensors") for name in endings) == 1


def test_lora_changes_the_images_exactly_as_the_trained_model_does(trained, tiny_sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32)
    prompts = [row["prompt"] for row in ranked_rows(n=10)[:4]]
    files = [trained / "pytorch_lora_weights.safetensors", trained / "comfyui" / "trained.safetensors"]
    check_gallery(pipeline, trained, prompts, files, guidance_scale=5.0)


def test_killed_and_resumed_run_gives_the_same_bits(flags, tmp_path):
    """12 steps straight against 6, kill -9, resume: the same LoRA, bit for bit, which tells of the optimizer, too."""
    more = "--max_train_steps 12 --train_batch_size 5 --gradient_accumulation_steps 6 --checkpointing_steps 6"
    more += " --lr_scheduler cosine --lr_warmup_steps 2 --noise image --proportion_empty_prompts 0.3"
    command = [*flags, *more.split(), "--output_dir"]
    call("train_rankdpo_sdxl", *command, tmp_path / "straight")

    killed = tmp_path / "killed"
    run_until(killed / "checkpoint-6", "train_rankdpo_sdxl.py", *command, killed)
    assert not (killed / "checkpoint-12").exists()
    call("train_rankdpo_sdxl", *command, killed, "--resume_from_checkpoint", "latest")
    assert same_lora(tmp_path / "straight", killed)


def test_two_processes_agree_with_one(flags, tmp_path):
    """Both encode, each its share of the row groups, here of one row each: the same cache, and the same LoRA."""
    data = write_dataset(tmp_path / "data", ranked_rows(n=10))
    (file,) = data.rglob("*.parquet")
    pq.write_table(pq.read_table(file), file, row_group_size=1)
    more = "--max_train_steps 5 --learning_rate 1e-3 --proportion_empty_prompts 0.3".split()
    for name, processes in (("one", 1), ("two", 2)):
        here = ["--dataset_name", data, "--cache_dir", tmp_path / f"cache-{name}", "--output_dir", tmp_path / name]
        here += ["--train_batch_size", 4 // processes]
        if processes == 1:
            call("train_rankdpo_sdxl", *flags, *more, *here)
        else:  # the real launcher, in new interpreters
            run(*torchrun(2, "train_rankdpo_sdxl.py"), *flags, *more, *here, env=os.environ)
    assert latents(tmp_path / "cache-one").keys() == latents(tmp_path / "cache-two").keys()
    assert len(latents(tmp_path / "cache-two")) == 10 and images_of(tmp_path / "one") == images_of(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["global_batch_size"] == 4
    assert "2 x CPU" in (tmp_path / "two" / "README.md").read_text()
    assert lora_difference(tmp_path / "one", tmp_path / "two") < 1e-6
    learned(tmp_path / "one")


def images_of(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["images"]


def test_pictures_that_change_are_encoded_anew(flags, tmp_path):
    """In a dataset that is built again in its folder, which `datasets` knows by its card; and behind paths."""
    rng, data, linked = np.random.default_rng(0), tmp_path / "data", ranked_rows(n=2)
    for i, row in enumerate(linked):
        row["images"] = [str(tmp_path / f"{i}_{k}.png") for k in range(4)]

    def train(name: str, draw: bool, table: Dataset) -> str:
        for file in [file for row in linked for file in row["images"]] if draw else []:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        shutil.rmtree(data, ignore_errors=True)
        (data / "data").mkdir(parents=True)
        (data / "README.md").write_text("---\nlicense: mit\n---\n")
        table.cast_column("images", List(DatasetsImage())).to_parquet(str(data / "data" / "train.parquet"))
        more = ["--dataset_name", data, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / name]
        call("train_rankdpo_sdxl", *flags, *more, "--max_train_steps", 1)
        return images_of(tmp_path / name)

    found = [train(f"built-{seed}", False, Dataset.from_list(ranked_rows(n=4, seed=seed))) for seed in (1, 2)]
    assert found[0] != found[1]
    found = [train(name, name != "same", Dataset.from_list(linked)) for name in ("drawn", "same", "anew")]
    assert found[0] == found[1] != found[2]


def latents(cache: Path) -> dict[str, int]:
    """The cached rows, and when they were written."""
    files = [file for file in cache.glob("*/*.safetensors") if "latents" in load_file(file)]
    return {file.stem: file.stat().st_mtime_ns for file in files}


def test_the_cache_knows_rows_whatever_dataset_they_come_in(flags, tmp_path, monkeypatch):
    """A dataset that grew, moved, in another order and with other scores costs what it did not have; a second start
    reads no image; rows that are not needed are not encoded."""
    rows, cache = ranked_rows(n=8), tmp_path / "cache"
    reads = count_items(monkeypatch, script, "read_images")

    def train(name: str, rows: list, *more) -> int:
        data = write_dataset(tmp_path / f"data-{name}", rows) if rows else more[0]
        before = latents(cache)
        reads.clear()
        more = [*more, "--cache_dir", cache, "--output_dir", tmp_path / name, "--max_train_steps", 1]
        call("train_rankdpo_sdxl", *flags, "--dataset_name", data, *map(str, more[not rows :]))
        after = latents(cache)
        assert before.items() <= after.items()  # nothing is written again
        return len(after) - len(before)

    assert train("first", rows[:6], "--max_train_samples", 4) == 4 and reads.total() == 6
    assert train("again", None, tmp_path / "data-first", "--max_train_samples", 4) == 0 and reads.total() == 0
    assert train("labels", None, tmp_path / "data-first", "--rank_by", "first", "--seed", 3) == 2 and reads.total() == 6
    shutil.move(tmp_path / "data-first", tmp_path / "elsewhere")
    assert train("moved", None, tmp_path / "elsewhere", "--loss_type", "dpo") == 0 and reads.total() == 0
    scored = [{**row, "scores": {"first": [4.0, 3, 2, 1], "second": [1.0, 2, 3, 4]}} for row in reversed(rows)]
    assert train("grown", scored) == 2 and reads.total() == 8
    assert train("some", None, tmp_path / "data-grown", "--rank_by", "first", "--generators", "g0", "g2") == 8


def test_the_cache_s_folder_follows_what_is_cached_and_nothing_else(tiny_sdxl, ranked_dataset):
    """And never the dataset: its rows are known by their content."""
    labels = {"id": pa.array(["a"]), "images": np.array([[0, 1]]), "settings": {}}

    def folder(**changes) -> str:
        settings = {"pretrained_model_name_or_path": str(tiny_sdxl), "output_dir": "no such folder", "resolution": 32}
        args = script.ScriptArguments(**{**settings, "dataset_name": str(ranked_dataset), **changes})
        return script.plan_run(args, SimpleNamespace(num_processes=1), labels).cache.name

    cached = {"resolution": 64, "mixed_precision": "bf16", "variant": "fp16"}
    assert len({folder(), *(folder(**{name: value}) for name, value in cached.items())}) == 4
    others = {"learning_rate": 1.0, "seed": 5, "train_batch_size": 2, "loss_type": "dpo", "max_train_steps": 3}
    assert folder(**others, output_dir="elsewhere", cache_text_embeddings=False) == folder()


def test_datasets_people_have(flags, tmp_path):
    """save_to_disk, one Parquet file, Parquet as pandas and polars write it, links in a folder whose name holds a
    pattern, as in the Hub's cache, JSON lines: the same images, and so the same rows of the cache."""
    cache, rows = tmp_path / "cache", ranked_rows(n=4)
    plain = write_dataset(tmp_path / "plain", rows)
    (parquet,) = plain.rglob("*.parquet")
    load_dataset(str(plain), split="train").save_to_disk(tmp_path / "disk")
    table = pq.read_table(parquet).replace_schema_metadata(None)
    (tmp_path / "pandas").mkdir()
    pq.write_table(table, tmp_path / "pandas" / "x.parquet")
    (tmp_path / "polars").mkdir()
    pictures = pa.array([[image["bytes"] for image in row["images"]] for row in rows], pa.large_list(pa.large_binary()))
    table = table.set_column(table.column_names.index("images"), "images", pictures)
    pq.write_table(table, tmp_path / "polars" / "x.parquet", row_group_size=3)
    (tmp_path / "run [12]").mkdir()
    shutil.copy(parquet, tmp_path / "blob")
    (tmp_path / "run [12]" / "train.parquet").symlink_to(tmp_path / "blob")
    write_dataset(tmp_path / "run 1", ranked_rows(n=3, seed=5))
    (tmp_path / "json").mkdir()
    for i, row in enumerate(rows):
        for k, image in enumerate(row["images"]):
            (tmp_path / "json" / f"{i}_{k}.png").write_bytes(image["bytes"])
        row["images"] = [{"path": str(tmp_path / "json" / f"{i}_{k}.png"), "bytes": None} for k in range(4)]
    (tmp_path / "json" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = {}
    for name in ("plain", "disk", "plain/data/train-00000-of-00001.parquet", "pandas", "polars", "run [12]", "json"):
        out = tmp_path / "out" / name.replace("/", "-")
        more = ["--dataset_name", tmp_path / name, "--cache_dir", cache, "--output_dir", out, "--max_train_steps", 1]
        call("train_rankdpo_sdxl", *flags, *more)
        lora = load_file(out / "pytorch_lora_weights.safetensors")
        found[name] = (images_of(out), {key: tensor.sum().item() for key, tensor in lora.items()})
    assert len({str(lora) for _, lora in found.values()}) == 1
    assert len({images for name, (images, _) in found.items() if name != "json"}) == 1
    assert len(latents(cache)) == 8  # those of `json` are known by path and date


def test_cached_rows_hold_what_the_pipeline_would_compute(flags, trained, tiny_sdxl, ranked_dataset):
    """Prompt embeddings as StableDiffusionXLPipeline.encode_prompt's, latents as the VAE's scaled mean."""
    cache, row = flags[-1], ranked_rows(n=10)[3]
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(row["prompt"], do_classifier_free_guidance=False)
    (file, *_) = cache.glob(f"*/{script.content_key(row['prompt'])}.safetensors")
    item = load_file(file)
    assert torch.equal(item["prompt_embeds"], embeds[0]) and torch.equal(item["pooled_prompt_embeds"], pooled[0])
    pixels = pipeline.image_processor.preprocess(Image.open(BytesIO(row["images"][2]["bytes"])))
    with torch.no_grad():
        wanted = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    items = [item for item in map(load_file, file.parent.glob("*.safetensors")) if len(item.get("latents", [])) == 4]
    (item,) = [item for item in items if torch.allclose(item["latents"][2], wanted[0], atol=1e-5)]
    assert item["time_ids"][2].tolist() == [32, 32, 0, 0, 32, 32]


def test_micro_conditioning_is_original_size_crop_and_target():
    """(width, height) → [original height, width, crop top, left, target height, width]."""
    sizes = {(64, 96): [96, 64, 8, 0, 32, 32], (100, 40): [40, 100, 0, 24, 32, 32], (8, 8): [8, 8, 0, 0, 32, 32]}
    for (width, height), wanted in sizes.items():
        image = script.preprocess_image(encoded(np.zeros((height, width, 3), dtype=np.uint8)), 32)
        assert image["pixels"].shape == (3, 32, 32) and image["pixels"].dtype == torch.uint8
        assert image["time_ids"].tolist() == wanted and image["time_ids"].dtype == torch.float32


def labels(data: Path, **kwargs) -> dict:
    args = script.ScriptArguments(dataset_name=str(data), **kwargs)
    return script.make_labels(args, script.load_ranked_dataset(args)[0])


def test_weighted_sft_weights_images_by_one_reward(flags, tmp_path):
    """hpsv2.1, or the reward that --rank_by names, over the dataset's mean; computed here in Python floats. lair takes
    the scores that --rank_by names as they are, or else the preferences."""
    rows = ranked_rows(n=6)
    for i, row in enumerate(rows):
        row["scores"] = {"hpsv2.1": [0.2 + 0.01 * i + 0.03 * j for j in range(4)], "second": [1.0, 0.0, 0.0, 3.0]}
    data = write_dataset(tmp_path / "data", rows)
    mean = sum(score for row in rows for score in row["scores"]["hpsv2.1"]) / 24
    found = labels(data, loss_type="weighted_sft")
    for i, row in enumerate(rows):
        assert found["weight"][i].tolist() == pytest.approx([score / mean for score in row["scores"]["hpsv2.1"]])
        assert found["rank"][i].tolist() == row["rank"]  # the labels stay
    assert labels(data, loss_type="weighted_sft", rank_by="second")["weight"][0].tolist() == [1, 0, 0, 3]
    assert labels(data, loss_type="lair", rank_by="second")["phi"].tolist() == [[1, 0, 0, 3]] * 6
    assert np.array_equal(labels(data, loss_type="lair")["phi"], found["phi"])
    more = ["--dataset_name", data, "--loss_type", "weighted_sft", "--max_train_steps", 2]
    call("train_rankdpo_sdxl", *flags, *more, "--output_dir", tmp_path / "lora")
    learned(tmp_path / "lora")


def test_noise_is_a_function_of_seed_epoch_and_prompt():
    """One draw for all images, or one for each; the timestep is the same in both."""

    def draw(noise: str, epoch: int = 1) -> dict:
        args = script.ScriptArguments(dataset_name="x", noise=noise)
        return script.sample_noise(args, DDPMScheduler(), (0, epoch, "p3"), torch.Size([4, 4, 8, 8]))

    shared, own = draw("prompt"), draw("image")
    assert torch.equal(own["noise"], draw("image")["noise"])
    assert not torch.equal(own["noise"], draw("image", epoch=2)["noise"])
    assert torch.equal(shared["noise"], own["noise"][:1].expand(4, -1, -1, -1))
    assert len({str(image) for image in own["noise"]}) == 4 and shared["timesteps"] == own["timesteps"]


def test_empty_prompts_replace_their_share_of_the_prompts(flags, tmp_path, monkeypatch):
    """The same rows in every run, with what the pipeline takes for no prompt: of this model, zeros."""
    seen = []
    original = script.training_step

    def spy(model, reference, noise_scheduler, batch, args):
        seen.extend(zip(batch["prompt_embeds"], batch["pooled_prompt_embeds"]))
        return original(model, reference, noise_scheduler, batch, args)

    monkeypatch.setattr(script, "training_step", spy)
    more = "--max_train_steps 3 --train_batch_size 10 --proportion_empty_prompts 0.3 --cache_text_embeddings".split()
    for cached in ("true", "false"):
        call("train_rankdpo_sdxl", *flags, "--output_dir", tmp_path / cached, *more, cached)
    empty = [not embeds.any() and not pooled.any() for embeds, pooled in seen]
    assert empty[:30] == empty[30:] and 4 <= sum(empty[:30]) <= 15


def test_labels_by_reward_and_by_generator(ranked_dataset):
    """Recomputed from the scores of the images that are left."""
    rows = ranked_rows(n=10)
    for row, rank in zip(rows, labels(ranked_dataset, rank_by="second")["rank"]):
        order = np.argsort(-np.array(row["scores"]["second"]))
        assert rank.argsort().tolist() == order.tolist()
    some = labels(ranked_dataset, generators=["g1", "g3"])
    for row, images, phi in zip(rows, some["images"], some["phi"]):
        wins = sum(row["scores"][name][1] > row["scores"][name][3] for name in ("first", "second"))
        assert images.tolist() == [1, 3] and phi.tolist() == [wins / 2, 1 - wins / 2]
    random, again = (labels(ranked_dataset, rank_by="random", seed=1)["rank"].tolist() for _ in range(2))
    assert random == again and len(set(map(str, random))) > 3


def test_settings_of_a_file_mean_what_they_mean_on_the_command_line(tmp_path, monkeypatch):
    """Numbers, switches, lists, words that YAML would change, ~; the command line wins. No abbreviations."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "dataset_name: 123\nlearning_rate: 1e-3\nmixed_precision: no\nuse_8bit_adam: true\nvariant: null\nrevision: ~\n"
        "cache_text_embeddings: false\nvalidation_prompts: [a red circle, 'yes: no']\ngenerators: g0\nreport_to: none\n"
        "cache_dir: ~/cache\n"
    )
    args = script.parse_arguments(["--config=~/recipe.yaml", "--report_to", "all", "--output_dir=~/lora"])
    assert (args.dataset_name, args.learning_rate, args.mixed_precision) == ("123", 1e-3, "no")
    assert (args.use_8bit_adam, args.cache_text_embeddings, args.variant or args.revision) == (True, False, None)
    assert (args.validation_prompts, args.generators) == (["a red circle", "yes: no"], ["g0"])
    assert (args.report_to, args.output_dir, args.cache_dir) == ("all", f"{tmp_path}/lora", f"{tmp_path}/cache")
    for text, word in {"rank: 16.5": "invalid int value: '16.5'", "loss_typ: dpo": "unrecognized arguments"}.items():
        recipe.write_text(f"{text}\n")
        message = refused("train_rankdpo_sdxl", "--dataset_name", "x", "--config", recipe)
        assert word in message and f"--{text.split(':')[0]}" in message


def test_output_folder_of_another_run_is_refused(flags, trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    here = ("--output_dir", trained, "--train_batch_size", 2, "--max_train_steps", 6)
    assert "beta_dpo 100" in refused("train_rankdpo_sdxl", *flags, *here, "--beta_dpo", 7)
    assert "--resume_from_checkpoint latest" in refused("train_rankdpo_sdxl", *flags, *here)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert json.loads((trained / "run.json").read_text())["rewards"] == ["first", "second"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    assert "holds other files" in refused("train_rankdpo_sdxl", *flags, "--output_dir", tmp_path / "letters")
    assert os.listdir(tmp_path / "letters") == ["love.txt"]


def test_checkpoints_are_named_as_people_name_them(flags, tmp_path):
    more = ["--output_dir", tmp_path, "--checkpointing_steps", 1, "--max_train_steps"]
    call("train_rankdpo_sdxl", *flags, *more, 2)
    for steps, name in ((3, "checkpoint-1"), (4, tmp_path / "checkpoint-2"), (5, "latest")):
        call("train_rankdpo_sdxl", *flags, *more, steps, "--resume_from_checkpoint", name)
        assert [line["step"] for line in logged(tmp_path)] == [*range(1, steps + 1)]
        assert (tmp_path / f"checkpoint-{steps}").exists()


def test_files_that_are_no_diffusers_folder_are_refused(flags, tiny_sdxl, tmp_path):
    (tmp_path / "vae.safetensors").touch()
    flag = "--pretrained_vae_model_name_or_path"
    message = refused("train_rankdpo_sdxl", *flags, flag, tmp_path / "vae.safetensors")
    assert flag in message and "single file" in message and "from_single_file" in message
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    half = ["--pretrained_model_name_or_path", tmp_path / "half", "--output_dir", tmp_path / "out"]
    assert "--variant fp16" in refused("train_rankdpo_sdxl", *flags, *half)
    call("train_rankdpo_sdxl", *flags, *half, "--variant", "fp16", "--max_train_steps", 1)


def test_the_environment_does_not_change_what_flags_say(flags, tmp_path, monkeypatch):
    more = ["--gradient_accumulation_steps", 3, "--max_train_steps", 2, "--output_dir"]
    call("train_rankdpo_sdxl", *flags, *more, tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    call("train_rankdpo_sdxl", *flags, *more, tmp_path / "set")
    assert same_lora(tmp_path / "plain", tmp_path / "set")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    assert "compile with INDUCTOR" in refused("train_rankdpo_sdxl", *flags, *more, tmp_path / "out")
