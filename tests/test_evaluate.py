# SPDX-License-Identifier: Apache-2.0
"""What a user of evaluate.py sees: means, paired intervals, win rates, pictures, what a rerun costs, refusals."""

import json
import logging

import numpy as np
import pytest
from conftest import call, ranked_rows, refused
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

import evaluate


@pytest.fixture(scope="session")
def lora(tiny_sdxl, ranked_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--dataset_name", ranked_dataset]
    flags += "--resolution 32 --rank 4 --learning_rate 1e-2 --max_train_steps 3 --report_to none".split()
    flags += ["--validation_num_inference_steps", 1, "--cache_dir", folder / "cache", "--output_dir", folder / "lora"]
    call("train_rankdpo_sdxl", *flags)
    return folder / "lora"


def brightness(tmp_path) -> str:
    """A metric in a file of the user's own."""
    (tmp_path / "metric.py").write_text(
        "import numpy as np\ndef brightness(images, prompts):\n    return [np.asarray(i).mean() for i in images]\n"
    )
    return f"{tmp_path}/metric.py:brightness"


def make_flags(tmp_path, tiny_sdxl, lora, output="out"):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": row["prompt"], "kind": "odd" if i % 2 else "even"} for i, row in enumerate(ranked_rows(6))]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--prompts", prompts, "--loras", f"mine={lora}"]
    flags += ["--metrics", brightness(tmp_path), "--num_images_per_prompt", 2, "--batch_size", 3]
    return [*flags, *"--num_inference_steps 2 --category_column kind".split(), "--output_dir", tmp_path / output]


def test_results_are_means_lifts_and_wins_over_the_saved_images(tmp_path, tiny_sdxl, lora, monkeypatch):
    flags = make_flags(tmp_path, tiny_sdxl, lora)
    call("evaluate", *flags)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = {
        name: np.array(
            [
                [np.asarray(Image.open(tmp_path / "out" / "images" / name / f"{i:05d}_{n}.png")).mean() for n in (0, 1)]
                for i in range(6)
            ]
        )
        for name in ("base", "mine")
    }
    assert results["n_prompts"] == 6 and results["n_images"] == 12
    assert results["base"]["brightness"] == pytest.approx(scores["base"].mean())
    mine = results["mine"]
    assert mine["brightness"] == pytest.approx(scores["mine"].mean())
    assert mine["brightness_lift"] == pytest.approx((scores["mine"] - scores["base"]).mean())
    assert mine["brightness_lift"] != 0  # the LoRA was applied, and the base drawn without it
    assert mine["brightness_win_rate"] == pytest.approx((scores["mine"] > scores["base"]).mean())
    part = mine["brightness_by_category"]["odd"]
    assert part["n_prompts"] == 3 and part["mean"] == pytest.approx(scores["mine"][1::2].mean())
    assert "| mine | brightness |" in (tmp_path / "out" / "results.md").read_text()
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * 192

    # A second run draws nothing and scores nothing; a lost image is drawn again alone, the same.
    monkeypatch.setattr(evaluate, "load_reward_model", lambda *a: pytest.fail("scored again"))
    lost = tmp_path / "out" / "images" / "mine" / "00004_1.png"
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    pixels = np.asarray(Image.open(lost)).astype(int)
    lost.unlink()
    call("evaluate", *flags)
    assert np.abs(np.asarray(Image.open(lost)).astype(int) - pixels).max() <= 1
    assert all(path.stat().st_mtime_ns == written for path, written in times.items() if path != lost)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("drawn again"))
        call("evaluate", *flags)


def test_of_diffusers_warnings_only_the_one_on_text_encoders_is_hidden(tmp_path, tiny_sdxl, lora, monkeypatch, caplog):
    """The trainers' LoRAs leave text encoders alone. A LoRA whose keys do not fit the UNet is refused."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [caplog.handler])
    flags = [*make_flags(tmp_path, tiny_sdxl, lora), "--max_prompts", 1]
    call("evaluate", *flags)
    assert "No LoRA keys" not in caplog.text
    (tmp_path / "other").mkdir()
    weights = load_file(lora / evaluate.LORA_FILE)
    weights = {key.replace("unet.", "other."): value for key, value in weights.items()}
    save_file(weights, tmp_path / "other" / evaluate.LORA_FILE)
    flags += ["--loras", f"other={tmp_path / 'other'}", "--output_dir", tmp_path / "refused"]
    assert "no key of it fits" in refused("evaluate", *flags)
    assert "No LoRA keys associated to UNet2DConditionModel" in caplog.text and "CLIPText" not in caplog.text


def test_interval_equals_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(60, 3))
    tuned = base + rng.normal(0.2, 0.5, size=(60, 3))
    found = evaluate.compare(tuned, base, seed=0)
    difference = (tuned - base).mean(1)
    wanted = stats.bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert found["lift"] == pytest.approx(difference.mean())
    assert found["lift_ci95"] == pytest.approx((wanted.low, wanted.high), abs=0.01)
    assert found["win_rate"] == pytest.approx((tuned > base).mean())
    same = evaluate.compare(base, base, seed=0)
    assert same["lift_ci95"] == (0.0, 0.0) and same["win_rate"] == 0.5


@pytest.mark.parametrize(
    "more, words",
    [
        (["--loras", "no/such/folder"], ["no/such/folder", "name=folder"]),
        (["--loras", "mine=no/such/folder"], ["mine=no/such/folder"]),
        (["--loras", "base=x"], ["'base'", "taken"]),
        (["--metrics", "beauty"], ["beauty", "pickscore"]),
        (["--category_column", "tag"], ["no column 'tag'"]),
        (["--prompt_column", "caption"], ["no column 'caption'"]),
        (["--pretrained_model_name_or_path", "no/model"], ["no/model"]),
        (["--batch_size", 0], ["--batch_size 0"]),
    ],
)
def test_bad_flags_are_named(tmp_path, tiny_sdxl, lora, monkeypatch, more, words):
    monkeypatch.setattr(evaluate.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("model loaded"))
    message = refused("evaluate", *make_flags(tmp_path, tiny_sdxl, lora), *more)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_images_of_other_settings_are_not_mixed(tmp_path, tiny_sdxl, lora):
    flags = make_flags(tmp_path, tiny_sdxl, lora)
    call("evaluate", *flags, "--max_prompts", 2)
    assert "images of base" in refused("evaluate", *flags, "--max_prompts", 2, "--guidance_scale", 9)
    assert "prompts" in refused("evaluate", *flags, "--max_prompts", 3)


def test_checkpoints_become_curves_over_the_pairs_seen(tmp_path, tiny_sd, pair_dataset):
    """Every checkpoint of two runs, as many pairs along as its steps took; the grid shows the last ones."""
    flags = ["--pretrained_model_name_or_path", tiny_sd, "--dataset_name", pair_dataset, "--top_fraction", 1]
    flags += "--rank 4 --learning_rate 1e-2 --report_to none --validation_num_inference_steps 1".split()
    flags += ["--cache_dir", tmp_path / "cache", "--max_train_steps", 4, "--checkpointing_steps", 2]
    call("train_dpo_qsd", *flags, "--train_batch_size", 3, "--output_dir", tmp_path / "qsd")
    call("train_dpo_qsd", *flags, "--train_batch_size", 2, "--order", "random", "--output_dir", tmp_path / "random")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    evaluation = ["--pretrained_model_name_or_path", tiny_sd, "--prompts", tmp_path / "prompts.txt"]
    evaluation += ["--metrics", brightness(tmp_path), "--num_inference_steps", 2]
    evaluation += ["--output_dir", tmp_path / "out"]
    runs = ["--eval_checkpoints", f"qsd={tmp_path / 'qsd'}", f"random={tmp_path / 'random'}"]
    call("evaluate", *evaluation, *runs)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: (c["run"], c["seen"]) for name, c in results["checkpoints"].items()} == {
        "qsd@2": ("qsd", 6),
        "qsd@4": ("qsd", 12),
        "random@2": ("random", 4),
        "random@4": ("random", 8),
    }
    # Every checkpoint's own LoRA was drawn with. Means of a few thousand bytes may coincide, whole images do not.
    drawn = {}
    for name in ("base", *results["checkpoints"]):
        pixels = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "out" / "images" / name).glob("*.png"))]
        assert len(pixels) == 2 and results[name]["brightness"] == pytest.approx(np.mean(pixels))
        drawn[np.stack(pixels).tobytes()] = name
    assert len(drawn) == 5
    picture = Image.open(tmp_path / "out" / "curves.png")
    assert picture.size == (500, 400) and np.asarray(picture.convert("L")).min() < 100
    assert Image.open(tmp_path / "out" / "grid.png").width == 3 * 192 + 2 * 12  # base and the last of each run

    message = refused("evaluate", *evaluation, "--eval_checkpoints", f"qsd={tmp_path / 'cache'}")
    assert "--eval_checkpoints" in message and "not a training run's folder" in message
    twice = ["--eval_checkpoints", f"a={tmp_path / 'qsd'}", f"a={tmp_path / 'random'}"]
    assert "'a' is taken" in refused("evaluate", *evaluation, *twice)


def test_sd3_is_drawn_with_the_tokens_asked_for_and_without_t5(tmp_path, tiny_sd3):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = ["--pretrained_model_name_or_path", tiny_sd3, "--prompts", tmp_path / "prompts.txt"]
    flags += ["--metrics", brightness(tmp_path), "--num_inference_steps", 2, "--resolution", 32]
    found = []
    for number, more in enumerate((["--max_sequence_length", 20], ["--max_sequence_length", 40], [])):
        more = more or ["--use_text_encoder_3", "false", "--max_sequence_length", 20]
        call("evaluate", *flags, *more, "--output_dir", tmp_path / str(number))
        found.append(json.loads((tmp_path / str(number) / "results.json").read_text())["base"]["brightness"])
    assert len(set(found)) == 3
