# SPDX-License-Identifier: Apache-2.0
"""What a user of evaluate.py sees: means, paired intervals, win rates, pictures, what a rerun costs, refusals."""

import functools
import itertools
import json
import logging
import math
import os
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import call, make_tiny_pickscore, make_tiny_sd, ranked_rows, refused, run, torchrun
from diffusers import (
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors.torch import save_file
from scipy import stats

import evaluate


@pytest.fixture(scope="session")
def lora(tiny_sdxl, ranked_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--dataset_name", ranked_dataset]
    flags += "--resolution 32 --rank 4 --learning_rate 1e-2 --max_train_steps 2 --report_to none".split()
    flags += ["--checkpointing_steps", 1]
    flags += ["--validation_num_inference_steps", 1, "--cache_dir", folder / "cache", "--output_dir", folder / "lora"]
    call("train_rankdpo_sdxl", *flags)
    return folder / "lora"


def write_rows(file, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def results_of(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def brightness(tmp_path) -> str:
    """A metric in a file of the user's own."""
    (tmp_path / "metric.py").write_text(
        "import numpy as np\ndef brightness(images, prompts):\n    return [np.asarray(i).mean() for i in images]\n"
    )
    return f"{tmp_path}/metric.py:brightness"


def make_flags(tmp_path, tiny_sdxl, lora, output="out"):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": row["prompt"], "kind": "odd" if i % 2 else "even"} for i, row in enumerate(ranked_rows(6))]
    rows = [{**row, "more": {"number": row["prompt"][::-1]}} for row in rows]
    write_rows(prompts, rows)
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--prompts", prompts, "--loras", f"mine={lora}"]
    flags += ["--metrics", brightness(tmp_path), "--num_images_per_prompt", 2, "--batch_size", 3]
    return [*flags, *"--num_inference_steps 2 --category_column kind".split(), "--output_dir", tmp_path / output]


def test_results_are_means_lifts_and_wins_over_the_saved_images(tmp_path, tiny_sdxl, lora, monkeypatch, caplog):
    flags = make_flags(tmp_path, tiny_sdxl, lora)
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger("diffusers"), "handlers", [caplog.handler])
        call("evaluate", *flags)
    assert not caplog.text  # the trainers' LoRAs leave text encoders alone, of which diffusers would warn
    results = results_of(tmp_path / "out")
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
    monkeypatch.setattr(evaluate, "load_reward_model", lambda *a, **k: pytest.fail("scored again"))
    lost = tmp_path / "out" / "images" / "mine" / "00004_1.png"
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    content = lost.read_bytes()
    lost.unlink()
    call("evaluate", *flags)
    assert lost.read_bytes() == content
    assert all(path.stat().st_mtime_ns == written for path, written in times.items() if path != lost)
    # Other settings, or another base under its name, are refused: no picture is lost.
    assert "images of base" in refused("evaluate", *flags, "--guidance_scale", 9)
    assert "prompts" in refused("evaluate", *flags, "--max_prompts", 3)
    other = shutil.copytree(tiny_sdxl, tmp_path / "other")
    flags[1] = other
    call("evaluate", *flags, "--output_dir", tmp_path / "of-other", "--max_prompts", 1, "--stages", "draw")
    (other / "unet" / "more.json").write_text("{}")
    words = ["--output_dir", tmp_path / "of-other", "--max_prompts", 1]
    assert "made with files" in refused("evaluate", *flags, *words)
    assert len(list((tmp_path / "of-other").rglob("*.png"))) == 4


def test_schedulers_that_read_the_output_as_something_else(tmp_path, tiny_sdxl, tiny_sd3, monkeypatch):
    monkeypatch.setattr(evaluate.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("model loaded"))
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    euler = StableDiffusionXLPipeline.load_config(tiny_sdxl)["scheduler"][1]
    cases = {
        "unipc": (tiny_sdxl, flow, "UniPCMultistepScheduler", "predicts noise"),
        "flow": (tiny_sdxl, FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler", "predicts noise"),
        "edm": (tiny_sdxl, EDMEulerScheduler(), euler, "scheduler_config.json is EDMEulerScheduler's"),
        "sd3": (tiny_sd3, UniPCMultistepScheduler(), "UniPCMultistepScheduler", "predicts flow"),
    }
    for name, (base, scheduler, named, words) in cases.items():
        shutil.copytree(base, tmp_path / name)
        scheduler.save_pretrained(tmp_path / name / "scheduler")
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        (tmp_path / name / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", named]}))
        message = refused(
            "evaluate", *make_flags(tmp_path, tmp_path / name, tmp_path), "--output_dir", tmp_path / "out"
        )
        assert words in message and named in message


def estimated(values: dict, strata: list) -> dict:
    """The figures of one model against another, or of itself."""
    return evaluate.estimate({("a", "b", name): value for name, value in values.items()}, strata, seed=0)["a", "b"]


def test_interval_equals_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 60, 3))
    tuned = base + rng.normal(0.2, 0.5, size=(1, 60, 3))
    found = estimated(evaluate.compare(tuned, base), [np.arange(60)])
    difference = (tuned - base)[0].mean(1)
    wanted = stats.bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert found["lift"] == pytest.approx(difference.mean()) and "lift_warning" not in found
    assert found["lift_ci95"] == pytest.approx((wanted.low, wanted.high), abs=0.01)
    assert found["win_rate"] == pytest.approx((tuned > base).mean())
    # The same scores but for the noise of another batch: ties. An interval of zero width says so.
    same = estimated(evaluate.compare(base * (1 + 1e-8), base), [np.arange(60)])
    for figure, value in (("win_rate", 0.5), ("lift", 0.0)):
        assert same[figure] == value and same[f"{figure}_ci95"] == (value, value)
        assert same[f"{figure}_warning"] == "an interval of zero width"
    constant = estimated({"x": np.full((1, 1, 60), 0.1)}, [np.arange(60)])
    assert constant["x_warning"] == "an interval of zero width"  # 0.1 has no exact mean
    few = estimated(evaluate.compare(tuned, base), [np.arange(24)])
    assert few["lift_warning"] == "only 24 prompts"


def test_strata_seeds_and_values_that_do_not_apply():
    rng = np.random.default_rng(0)
    values = rng.normal(size=60)
    strata = [np.arange(10), np.arange(10, 60)]
    found = estimated({"x": values[None, None]}, strata)
    assert found["x"] == pytest.approx((values[:10].mean() + values[10:].mean()) / 2)
    draws = [
        stats.bootstrap((values[s],), np.mean, n_resamples=10_000, rng=i).bootstrap_distribution
        for i, s in enumerate(strata)
    ]
    assert found["x_ci95"] == pytest.approx(np.percentile(np.mean(draws, axis=0), [2.5, 97.5]), abs=0.02)

    small = estimated({"x": values[None, None]}, [np.arange(1), np.arange(1, 60)])
    assert small["x_warning"] == "a category with only 1 prompt"

    # Two seeds of one model against one of another: means and wins are averaged over the pairs of seeds.
    seeds, other = rng.normal(size=(2, 60, 2)), rng.normal(size=(1, 60, 2))
    found = evaluate.compare(seeds, other)
    assert found["lift"].mean() == pytest.approx(seeds.mean() - other.mean())
    assert found["win_rate"].mean() == pytest.approx(((seeds[0] > other).mean() + (seeds[1] > other).mean()) / 2)

    # NaN: the prompt is left out where no image counts, and an image where it does not count.
    scores = rng.normal(size=(1, 40, 2))
    scores[0, :10] = np.nan
    scores[0, 10, 1] = np.nan
    found = estimated(evaluate.compare(scores, np.zeros((1, 40, 2))), [np.arange(40)])
    wanted = [scores[0, 10, 0], *scores[0, 11:].mean(axis=1)]
    assert found["lift"] == pytest.approx(np.mean(wanted))
    ours = stats.bootstrap((wanted,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert found["lift_ci95"] == pytest.approx((ours.low, ours.high), abs=0.02)


@pytest.mark.parametrize("n", [2, 5])
def test_intervals_of_several_trainings_are_over_seeds_and_prompts(n):
    """As shapes/reproduce.py has them: paired over the seeds that both models share."""
    import reproduce

    rng = np.random.default_rng(n)
    prompts, seeds = rng.normal(size=(1, 80, 1)), rng.normal(size=(n, 1, 1))
    ours = 0.5 + prompts + 0.3 * seeds + rng.normal(0, 0.2, size=(n, 80, 1))
    theirs = prompts + 0.3 * seeds + rng.normal(0, 0.2, size=(n, 80, 1))
    columns = {("a", None, "mean"): evaluate.per_prompt(ours[:, None])}
    columns |= {("a", "b", figure): values for figure, values in evaluate.compare(ours, theirs).items()}
    labels = tuple(map(str, range(n)))
    found = evaluate.estimate(columns, [np.arange(80)], 0, {"a": labels, "b": labels})
    draws = reproduce.bootstrap(np.stack([ours[..., 0], theirs[..., 0]]))
    wanted = np.percentile(draws[:, 0], [2.5, 97.5]), np.percentile(draws[:, 0] - draws[:, 1], [2.5, 97.5])
    for pair, figure, ends in ((("a", None), "mean", wanted[0]), (("a", "b"), "lift", wanted[1])):
        width = ends[1] - ends[0]
        assert found[pair][f"{figure}_ci95"] == pytest.approx(ends, abs=0.06 * width)
        # Two are too few for an interval.
        assert found[pair].get(f"{figure}_warning") == ("only 2 seeds" if n == 2 else None)
    low, high = found["a", "b"]["win_rate_ci95"]
    assert 0 <= low < found["a", "b"]["win_rate"] < high <= 1
    # With other seeds nothing is paired: what the seeds change counts twice.
    other = evaluate.estimate(columns, [np.arange(80)], 0, {"a": labels, "b": tuple(map(str, range(n, 2 * n)))})
    assert np.ptp(other["a", "b"]["lift_ci95"]) > 1.2 * np.ptp(found["a", "b"]["lift_ci95"])


def test_hpsv2s_own_figure():
    """evaluate() of hpsv2: ten chunks of 80 a style, np.mean and np.std of their means, the mean of the four styles."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.2, 0.35, size=(3200, 1))
    styles = [style for style in ("anime", "concept-art", "paintings", "photo") for _ in range(800)]
    args = types.SimpleNamespace(prompts="hpsv2", category_column="style", max_prompts=None)
    found = evaluate.official_figures(args, "hpsv2.1", [], styles, {"": scores})
    for number, style in enumerate(("anime", "concept-art", "paintings", "photo")):
        chunks = [scores[number * 800 + i * 80 : number * 800 + (i + 1) * 80, 0].mean() * 100 for i in range(10)]
        assert found[style] == {"mean": pytest.approx(np.mean(chunks)), "std": pytest.approx(np.std(chunks))}
    assert found["overall"] == pytest.approx(scores.mean() * 100)


SEVERAL = """
import numpy as np
def second(images, prompts):
    return [1.0 for _ in images]
class Tone:
    made = 0
    def __init__(self, device, batch_size):
        Tone.made += 1
        self.size = batch_size
    def score(self, images, prompts, rows):
        assert len(images) <= self.size and all(row["prompt"] == prompt for row, prompt in zip(rows, prompts))
        assert all(row["more"] == {"number": row["prompt"][::-1]} for row in rows)
        odd = [row["kind"] == "odd" for row in rows]
        return [{"red": float(np.asarray(i)[..., 0].mean()), "odd": float(np.asarray(i).std()) if o else float("nan")}
                for i, o in zip(images, odd)]
"""


def test_any_model_against_any_other(tmp_path, tiny_sdxl, lora):
    """A LoRA, a network, a second pipeline and old pictures, each as the baseline in turn; two processes as one."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias += 0.3
    unet.save_pretrained(tmp_path / "tuned" / "unet")
    unet.save_pretrained(tmp_path / "flat")
    pipeline = make_tiny_sd(tmp_path / "second", seed=5)  # which does not take the base's LoRAs
    (tmp_path / "several.py").write_text(SEVERAL)
    flags = make_flags(tmp_path, tiny_sdxl, lora)
    call("evaluate", *flags, "--stages", "draw")
    flags += ["--loras", f"mine@0={lora}", f"mine@1={lora / 'checkpoint-2'}", "--models", f"second={pipeline}"]
    flags += [f"tuned=unet:{tmp_path / 'tuned'}", f"flat=unet:{tmp_path / 'flat'}"]
    flags += ["--images", f"old={tmp_path}/out/images/base/{{index:05d}}_{{number}}.png"]
    flags += ["--metrics", brightness(tmp_path), f"{tmp_path}/several.py:Tone", f"{tmp_path}/several.py:second"]
    flags += ["--output_dir", tmp_path / "any"]
    found = {}
    for name in ("base", "mine", "old"):
        call("evaluate", *flags, "--baseline", name)
        found[name] = results_of(tmp_path / "any")
        table = (tmp_path / "any" / "results.md").read_text()
        assert found[name]["baseline"] == name and f"Lift over `{name}`" in table
        assert "| mine | second (trained on) |" in table and "fewer than 25 prompts or 3 seeds" in table
    assert found["base"]["mine"]["second_trained_on"] and found["base"]["mine@0"]["second_trained_on"]
    assert not any(key.endswith("trained_on") for key in found["base"]["base"])
    assert "brightness_trained_on" not in found["base"]["mine"]
    for metric in ("brightness", "Tone_red", "Tone_odd"):
        for a, b in itertools.permutations(found, 2):
            one, other = found[a][b], found[b][a]
            low, high = other[f"{metric}_lift_ci95"]
            assert one[f"{metric}_lift"] == pytest.approx(-other[f"{metric}_lift"], abs=1e-9)
            assert one[f"{metric}_lift_ci95"] == pytest.approx([-high, -low], abs=1e-9)
            assert one[f"{metric}_win_rate"] == pytest.approx(1 - other[f"{metric}_win_rate"])
            assert found["base"]["pairwise"][metric][b][a]["lift"] == pytest.approx(one[f"{metric}_lift"], abs=1e-9)
        assert found["base"]["tuned"][metric] == found["base"]["flat"][metric] != found["base"]["base"][metric]
        assert found["base"]["old"][f"{metric}_lift"] == 0 and found["base"]["old"][f"{metric}_win_rate"] == 0.5
        assert found["base"]["second"][f"{metric}_lift"] != 0
    assert found["base"]["seeds"] == {"mine": ["mine@0", "mine@1"]}
    assert found["base"]["mine"]["brightness_seed_sd"] == pytest.approx(0, abs=1e-6)  # the same LoRA twice
    assert found["base"]["base"]["Tone_odd_by_category"]["even"]["mean"] is None  # it does not apply there
    odd = found["base"]["mine"]["Tone_odd_by_category"]["odd"]
    assert found["base"]["mine"]["Tone_odd"] == pytest.approx(odd["mean"]) and "lift_warning" in odd
    both = [found["base"]["mine"]["brightness_by_category"][kind]["mean"] for kind in ("odd", "even")]
    assert found["base"]["mine"]["brightness_category_mean"] == pytest.approx(np.mean(both))

    flags[flags.index("--output_dir", flags.index("--images")) + 1] = tmp_path / "two"
    assert "/" not in json.dumps(found["base"]["settings"]["models"])  # names of local folders, no paths
    run(*torchrun(2, "evaluate.py"), *flags)
    assert results_of(tmp_path / "two") == found["base"]


ROWS = "cat dog cat bird dog fox cat".split()  # repeats between, before and after
KINDS = "x y x x x y y".split()  # a repeat may have another category


def test_pictures_are_numbered_by_the_rows_of_the_source(tmp_path, capfd):
    """A row that repeats a prompt is left out, but the pictures were made for all rows."""
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt, "kind": kind} for prompt, kind in zip(ROWS, KINDS)])
    for i, kind in enumerate(KINDS):
        image = Image.new("RGB", (8, 8), (i,) * 3)
        for name in (f"{i:05d}", f"{i:05d}_0", f"{kind}-{KINDS[:i].count(kind):05d}"):
            image.save(tmp_path / f"{name}.png")
    flags = ["--prompts", tmp_path / "prompts.jsonl", "--category_column", "kind", "--baseline", "x0", "--images"]
    templates = ["{index:05d}", "{image:05d}", "{category}-{category_index:05d}", "{category}-{category_image:05d}"]
    flags += [f"x{i}={tmp_path}/{template}.png" for i, template in enumerate([*templates, "{index:05d}_0"])]
    call("evaluate", *flags, "--metrics", brightness(tmp_path), "--output_dir", tmp_path / "out")
    for file in (f"x{i}.json" for i in range(5)):
        scores = json.loads((tmp_path / "out" / "scores" / "brightness" / file).read_text())["scores"]
        assert scores == [[0], [1], [3], [5]], file
    assert "3 of 7 rows repeat an earlier prompt and are left out" in capfd.readouterr().err


def test_pictures_alone_with_metrics_of_all_kinds(tmp_path):
    """No model is drawn or loaded. One training of several, values that occur for one model only, rows that change."""
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt, "scale": 1} for prompt in "abc"])
    for name, grey in (("one", 100), ("two", 200)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (grey + i, 0, 0)).save(tmp_path / name / f"{i}_0.png")
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def keys(images, prompts, rows):\n"
        "    red = [float(np.asarray(i)[..., 0].mean()) for i in images]\n"
        "    return [{'red': r * row['scale'], **({'high': r} if r > 150 else {})} for r, row in zip(red, rows)]\n"
        "def red_lift(images, prompts):\n    return [1.0 for _ in images]\n"
        "def wrong(images, prompts):\n    return [None for _ in images]\n"
        "def mixed(images, prompts):\n    return [{'a': 1.0} if np.asarray(i)[0, 0, 0] % 2 else 1.0 for i in images]\n"
    )
    flags = ["--prompts", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "out"]
    template = f"{tmp_path}/{{}}/{{{{index}}}}_{{{{number}}}}.png"
    flags += ["--images", f"one={template.format('one')}", f"two@0={template.format('two')}", "--baseline", "one"]
    call("evaluate", *flags, "--metrics", f"{tmp_path}/own.py:keys")
    results = results_of(tmp_path / "out")
    assert results["two@0"]["keys_red"] == pytest.approx(201) and results["two@0"]["keys_red_lift"] == 100
    assert results["two@0"]["keys_high"] == pytest.approx(201) and results["one"]["keys_high"] is None
    assert results["two@0"]["keys_high_lift"] is None and "seeds" not in results
    assert "model" not in results["settings"]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt, "scale": 2} for prompt in "abc"])
    call("evaluate", *flags, "--metrics", f"{tmp_path}/own.py:keys")
    results = results_of(tmp_path / "out")
    assert results["two@0"]["keys_red"] == pytest.approx(402)

    wrong = {"red_lift": "metric red_lift: results.json uses this name", "wrong": "must be a finite number"}
    wrong |= {"mixed": "numbers and dicts"}
    for name, text in wrong.items():
        assert text in refused("evaluate", *flags, "--metrics", f"{tmp_path}/own.py:{name}")
    (tmp_path / "two" / "1_0.png").write_bytes((tmp_path / "two" / "1_0.png").read_bytes()[:45])
    assert "two/1_0.png cannot be read" in refused("evaluate", *flags, "--metrics", f"{tmp_path}/own.py:keys")


BENCHMARK = """
from __future__ import annotations

import math, scale
from typing import Literal

import numpy as np


class Red:
    def __init__(self, device, batch_size, channel: int = 0, mode: Literal["mean", "max"] = "mean", weights: str = ""):
        self.channel, self.mode = channel, getattr(np, mode)

    @staticmethod
    def check_rows(rows):
        if "tag" not in rows[0]:
            raise ValueError("row 1: no tag: make the prompts with red.py")

    @staticmethod
    def prepare(rows, settings):
        if settings["weights"] == "none":
            raise FileNotFoundError("there are no such weights")

    @staticmethod
    def official(rows, scores, settings):
        (values,) = scores.values()
        return {row["tag"]: float(np.nanmean(v)) * settings["channel"] for row, v in zip(rows, values)}

    def score(self, images, prompts, rows):
        return [scale.SCALE * float(self.mode(np.asarray(image.convert("RGB"))[..., self.channel])) for image in images]
"""


def test_a_benchmark_with_settings_grids_and_missing_pictures(tmp_path):
    """Settings of a class are part of name and identity, and so is a file that it imports. Grids are cut row by row."""
    (tmp_path / "red.py").write_text(BENCHMARK)
    (tmp_path / "scale.py").write_text("SCALE = 1\n")
    (tmp_path / "weights.bin").write_bytes(b"1")
    rows = [{"prompt": prompt, "tag": f"t{i}", "id": f"item-{i}", "kind": "x"} for i, prompt in enumerate("abc")]
    write_rows(tmp_path / "prompts.jsonl", rows)
    write_rows(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8, 3), dtype=np.uint8)  # prompt, number
    for i, cells in enumerate(pixels):
        grid = np.concatenate([np.concatenate(list(cells[:2]), axis=1), np.concatenate(list(cells[2:]), axis=1)])
        Image.fromarray(grid).save(tmp_path / f"item-{i}.png")
        Image.fromarray(grid).save(tmp_path / f"{i:03d}.png")
        for n, cell in enumerate(cells):
            Image.fromarray(cell).save(tmp_path / f"{rows[i]['prompt']}_{4 * i + n:06d}.png")
    (tmp_path / "b_000006.png").unlink()
    metric = f"{tmp_path}/red.py:Red"
    flags = ["--prompts", tmp_path / "prompts.jsonl", "--num_images_per_prompt", 4, "--output_dir", tmp_path / "out"]
    flags += ["--baseline", "grid", "--metrics", metric, f"{metric},channel=1,mode=max,weights={tmp_path}/weights.bin"]
    images = [
        "--images",
        f"grid={tmp_path}/{{row[id]}}.png#2x2",
        f"single={tmp_path}/{{prompt}}_{{category_image:06d}}.png",
        f"counted={tmp_path}/{{image:03d}}.png#2x2",  # the number of a file, not of a cell
    ]
    message = refused("evaluate", *flags, *images)
    assert "no picture" in message and "b_000006.png (prompt 1, image 2)" in message
    assert "1 of 12 pictures are missing" in message and not (tmp_path / "out").exists()

    flags += [*images, "--allow_missing", "true"]
    call("evaluate", *flags)
    results = results_of(tmp_path / "out")
    mean, largest = pixels[..., 0].mean(axis=(2, 3)), pixels[..., 1].max(axis=(2, 3)).astype(float)
    left = np.where(np.arange(12).reshape(3, 4) == 6, np.nan, mean)
    name = "Red_channel=1_mode=max_weights=weights.bin"
    assert results["grid"]["Red"] == pytest.approx(mean.mean())
    assert results["grid"][name] == pytest.approx(largest.mean())
    assert results["counted"]["Red"] == results["grid"]["Red"]
    assert results["single"]["Red"] == pytest.approx(np.nanmean(left, axis=1).mean())
    assert results["single"]["Red_lift"] == 0 and results["single"]["Red_win_rate"] == 0.5
    expected = {f"t{i}": value for i, value in enumerate(largest.mean(axis=1))}
    assert results["grid"][f"{name}_official"] == pytest.approx(expected)
    assert results["missing_images"] == {"single": 1}
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.startswith("Red as the benchmark reports it, over 3 prompts, 12 images:")
    assert "Of `single`, 1 of these images are missing and left out." in table
    shown = results["settings"]["metrics"][name]["settings"]
    assert shown == {"channel": 1, "mode": "max", "weights": "weights.bin"}  # no path of this machine

    scores = tmp_path / "out" / "scores"
    before = {file: file.stat().st_mtime_ns for file in scores.rglob("0*.json")}
    call("evaluate", *flags)
    assert {file: file.stat().st_mtime_ns for file in scores.rglob("0*.json")} == before
    (tmp_path / "weights.bin").write_bytes(b"2")  # scores again what depends on it, and nothing else
    call("evaluate", *flags)
    assert {file.parts[-3] for file in before if file.stat().st_mtime_ns != before[file]} == {name}
    (tmp_path / "scale.py").write_text("SCALE = 10\n")
    evaluate.import_file.cache_clear()
    del sys.modules["scale"]
    call("evaluate", *flags)
    results = results_of(tmp_path / "out")
    assert results["grid"]["Red"] == pytest.approx(10 * mean.mean())

    wrong = {
        ",chanel=1": "no setting chanel; its settings are device, batch_size, channel, mode, weights",
        ",channel=x": "channel 'x': it must be like its default",
        ",weights=none": "metric Red_weights=none: there are no such weights",
        ",channel": "file.py:Class,key=value",
        "?channel=1": "file.py:Class,key=value",
        ":": "file.py:Class,key=value",
    }
    for settings, text in wrong.items():
        assert text in refused("evaluate", *flags, "--metrics", metric + settings)
    assert "red.py" in refused("evaluate", *flags, "--prompts", tmp_path / "bare.jsonl")
    message = refused("evaluate", *flags, "--metrics", f"{metric},weights=none", "--stages", "report")
    assert "run the stages draw and score first" in message  # a report asks for no weights
    row = [*flags[: flags.index("--images")], "--images", f"grid={tmp_path}/{{row[id]}}.png#2x2"]
    row[row.index("--num_images_per_prompt") + 1] = 2  # other images of the same files
    call("evaluate", *row, "--metrics", metric)
    results = results_of(tmp_path / "out")
    assert results["grid"]["Red"] == pytest.approx(10 * mean[:, :2].mean())
    (tmp_path / "item-0.png").write_bytes((tmp_path / "a_000000.png").read_bytes())
    flags[flags.index(images[1])] = f"grid={tmp_path}/{{row[id]}}.png#3x2"
    assert "are no grid of 3 x 2" in refused("evaluate", *flags)


def test_counted_seeds(tmp_path, tiny_sdxl):
    """Image n of every prompt is drawn with --seed + n, as the benchmarks draw theirs."""
    (tmp_path / "prompts.txt").write_text("a red circle\na green square\n")
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--prompts", tmp_path / "prompts.txt"]
    flags += ["--metrics", brightness(tmp_path), "--num_images_per_prompt", 2, "--num_inference_steps", 2]
    call("evaluate", *flags, "--seed", 42, "--image_seeds", "counted", "--output_dir", tmp_path / "out")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    for n in range(2):
        generator = torch.Generator("cpu").manual_seed(42 + n)
        image = pipeline("a green square", num_inference_steps=2, guidance_scale=5.0, generator=generator).images[0]
        drawn = np.asarray(Image.open(tmp_path / "out" / "images" / "base" / f"00001_{n}.png"), dtype=int)
        assert np.abs(drawn - np.asarray(image, dtype=int)).max() <= 1


BAD_FLAGS = [
    (["--loras", "mine=no/such/folder"], ["mine=no/such/folder"]),
    (["--loras", "base=x"], ["'base'", "taken"]),
    (["--loras", "a@1=x@2", "a@=x"], ["a@1=x@2"]),
    (["--models", "a=no/such/pipeline"], ["--models a=no/such/pipeline"]),
    (["--models", "a=unet:no/such/unet"], ["a=unet:no/such/unet"]),
    (["--models", "a=transformer:TINY/unet"], ["the base, a StableDiffusionXLPipeline, has no transformer"]),
    (["--models", "a=unet:TINY/vae"], ["its _class_name is AutoencoderKL", "base's unet UNet2DConditionModel"]),
    (["--models", "a=unet:OTHER"], ["its cross_attention_dim is 7", "base's unet 32"]),
    (["--models", "..=TINY"], ["..=", "name of letters"]),
    (["--images", "a=BAD/{index}_{number}.png"], ["cannot identify image file", "0_0.png"]),
    (["--images", "a=x/{index:05d}_{numbers}.png"], ["field 'numbers'; the fields are prompt, row, cat"]),
    (["--images", "a=x/{index}_{number}.png"], ["no picture x/0_0.png", "prompt 0, image 0"]),
    (["--images", "a=ONE"], ["same picture", "{index}"]),
    (["--baseline", "mien"], ["--baseline mien", "base, mine"]),
    (["--metrics", "beauty"], ["beauty", "pickscore"]),
    (["--category_column", "tag"], ["no column 'tag'"]),
    (["--prompt_column", "caption"], ["no column 'caption'"]),
    (["--pretrained_model_name_or_path", "no/model"], ["no/model"]),
    (["--models", "a=VIDEO"], ["a LattePipeline is no pipeline of diffusers that draws images from a prompt"]),
    (["--models", "a=NOSCALE"], ["a HunyuanImagePipeline", "guidance scale"]),
]


def test_bad_flags_are_named(tmp_path, tiny_sdxl, lora, monkeypatch):
    monkeypatch.setattr(evaluate.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("model loaded"))
    config = json.loads((tiny_sdxl / "unet" / "config.json").read_text())
    index = {"video": "LattePipeline", "noscale": "HunyuanImagePipeline"}
    for name in ("other", "bad", *index):
        (tmp_path / name).mkdir()
    for name, kind in index.items():
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 7}))
    for i, n in itertools.product(range(6), range(2)):
        (tmp_path / "bad" / f"{i}_{n}.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "one", "PNG")
    flags, places = make_flags(tmp_path, tiny_sdxl, lora), {"TINY": tiny_sdxl}
    places |= {name.upper(): tmp_path / name for name in ("other", "bad", "one", *index)}
    for more, words in BAD_FLAGS:
        for word, path in places.items():
            more = [part.replace(word, str(path)) for part in more]
        message = refused("evaluate", *flags, *more)
        assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_checkpoints_become_curves_over_the_pairs_seen(tmp_path, tiny_sdxl, lora):
    """Every checkpoint of two runs, as many prompts along as its steps took; the grid shows the last ones."""
    other = shutil.copytree(lora, tmp_path / "other")
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "global_batch_size": 5}))
    torch.manual_seed(0)
    for step in (1, 2):
        unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
        save_file(kohya(unet), other / f"checkpoint-{step}" / evaluate.LORA_FILE)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    flags = ["--pretrained_model_name_or_path", tiny_sdxl, "--prompts", tmp_path / "prompts.txt"]
    flags += ["--metrics", brightness(tmp_path), "--num_inference_steps", 2, "--output_dir", tmp_path / "out"]
    call("evaluate", *flags, "--eval_checkpoints", f"mine={lora}", f"other={other}")
    results, size = results_of(tmp_path / "out"), record["global_batch_size"]
    found = {name: (c["run"], c["seen"]) for name, c in results["checkpoints"].items()}
    seen = {"mine@1": ("mine", size), "mine@2": ("mine", 2 * size), "other@1": ("other", 5), "other@2": ("other", 10)}
    assert found == seen
    # Every checkpoint's own LoRA was drawn with. Means of a few thousand bytes may coincide, whole images do not.
    drawn = {}
    for name in ("base", *seen):
        pixels = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "out" / "images" / name).glob("*.png"))]
        assert len(pixels) == 2 and results[name]["brightness"] == pytest.approx(np.mean(pixels))
        drawn[np.stack(pixels).tobytes()] = name
    assert len(drawn) == 5
    table = (tmp_path / "out" / "results.md").read_text()
    for name in ("mine", "other"):
        best = max((f"{name}@1", f"{name}@2"), key=lambda checkpoint: results[checkpoint]["brightness"])
        assert results["best_checkpoints"][name] == {"brightness": best} and f"| {name} | {best} |" in table
    assert "to judge it, take other prompts" in table
    picture = Image.open(tmp_path / "out" / "curves.png")
    assert picture.size == (500, 400) and np.asarray(picture.convert("L")).min() < 100
    assert Image.open(tmp_path / "out" / "grid.png").width == 3 * 192 + 2 * 12  # base and the last of each run

    message = refused("evaluate", *flags, "--eval_checkpoints", f"mine={tmp_path}")
    assert "--eval_checkpoints" in message and "not a training run's folder" in message
    assert "'a' is taken" in refused("evaluate", *flags, "--eval_checkpoints", f"a={lora}", f"a={other}")


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


def test_tasks_in_any_order_and_small_memory_give_the_same_results(tmp_path, tiny_sdxl, lora, monkeypatch):
    monkeypatch.setattr(evaluate, "SCORES_PER_FILE", 3)  # 12 images: four files
    flags, tasks = make_flags(tmp_path, tiny_sdxl, lora), make_flags(tmp_path, tiny_sdxl, lora, "tasks")
    call("evaluate", *flags)
    for number in (2, 0):
        call("evaluate", *tasks, "--num_tasks", 3, "--task_index", number)
    assert not (tmp_path / "tasks" / "results.json").exists()
    assert "is missing: run the stages draw and score" in refused("evaluate", *tasks, "--stages", "report")
    call("evaluate", *tasks, "--num_tasks", 3, "--task_index", 1)
    monkeypatch.setattr(evaluate, "load_reward_model", lambda *a, **k: pytest.fail("scored again"))
    call("evaluate", *tasks, "--stages", "report")
    for name in ("results.json", "results.md", "grid.png"):
        assert (tmp_path / "tasks" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    # Out of memory: half as many are drawn at once, and they are the same.
    draw = StableDiffusionXLPipeline.__call__

    @functools.wraps(draw)
    def small_gpu(self, prompt, **options):
        if len(prompt) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, prompt, **options)

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", small_gpu)
    call("evaluate", *make_flags(tmp_path, tiny_sdxl, lora, "small"), "--stages", "draw")
    for file in sorted((tmp_path / "out" / "images").rglob("*.png")):
        other = tmp_path / "small" / file.relative_to(tmp_path / "out")
        image, same = (np.asarray(Image.open(path)).astype(int) for path in (file, other))
        assert np.abs(image - same).max() <= 1


def test_rewards_at_once_give_the_same_results(tmp_path, tiny_sdxl, lora, monkeypatch):
    """Two models and a metric of a file, on the same images; each image is decoded once for both models."""
    clip = make_tiny_pickscore(tmp_path / "clip")
    flags = make_flags(tmp_path, tiny_sdxl, lora)
    flags += ["--metrics", f"pickscore={clip}", brightness(tmp_path), f"clipscore={clip}"]
    call("evaluate", *flags, "--stages", "draw")
    loads, load_end, found = [], PngImageFile.load_end, []
    for number in (1, 2):
        loads.clear()
        with monkeypatch.context() as patch:
            patch.setattr(PngImageFile, "load_end", lambda self: loads.append(1) or load_end(self))
            call("evaluate", *flags, "--stages", "score", "--rewards_at_once", number, "--reward_batch_size", 5)
        assert len(loads) == (4 - number) * 24
        call("evaluate", *flags, "--stages", "report")
        found.append([(tmp_path / "out" / name).read_bytes() for name in ("results.json", "results.md", "grid.png")])
        shutil.rmtree(tmp_path / "out" / "scores")
    assert found[0] == found[1]


def test_a_base_on_the_hub_is_drawn_at_the_commit_that_is_recorded(tmp_path, tiny_sdxl, monkeypatch):
    snapshot, load = shutil.copytree(tiny_sdxl, tmp_path / "snapshots" / "abc123"), DiffusionPipeline.from_pretrained
    read = DiffusionPipeline.load_config

    def load_config(model, return_commit_hash=False, **options):
        return (read(snapshot), snapshot.name) if return_commit_hash else read(model, **options)

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(evaluate.DDPMScheduler, "load_config", lambda model, **options: {})

    def from_pretrained(model, revision, **options):
        assert (model, revision) == ("user/base", "abc123")
        return load(snapshot, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = ["--pretrained_model_name_or_path", "user/base", "--prompts", tmp_path / "prompts.txt", "--stages", "draw"]
    flags += ["--metrics", brightness(tmp_path), "--num_inference_steps", 1, "--output_dir", tmp_path / "out"]
    call("evaluate", *flags)
    snapshot.rename(tmp_path / "snapshots" / "def456")
    snapshot = tmp_path / "snapshots" / "def456"
    assert "made with revision abc123, not def456" in refused("evaluate", *flags)


def kohya(unet: UNet2DConditionModel, more=lambda name, weight: {}) -> dict[str, torch.Tensor]:
    """A LoRA of a UNet's attention as kohya's trainers write it."""
    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            key, (out, into) = f"lora_unet_{name.replace('.', '_')}", module.weight.shape
            tensors |= {f"{key}.lora_down.weight": torch.randn(4, into), f"{key}.lora_up.weight": torch.randn(out, 4)}
            tensors |= {f"{key}.alpha": torch.tensor(4.0), **more(key, module.weight)}
    return tensors


def text_encoder_lora(width: int = 16) -> dict[str, torch.Tensor]:
    names = [f"layers.{layer}.self_attn.{part}" for layer in (0, 1) for part in ("q_proj", "k_proj", "v_proj")]
    names = [f"text_encoder.text_model.encoder.{name}" for name in names]
    down = {f"{name}.lora_A.weight": torch.randn(4, width) for name in names}
    return down | {f"{name}.lora_B.weight": torch.randn(width, 4) for name in names}


def test_types_on_a_gpu(monkeypatch):
    args = evaluate.ScriptArguments(prompts="parti", output_dir="none")
    model = {"kind": "base", "pipeline": "a", "variant": None, "commit": None}
    for network, has_bf16, dtype in (
        ("unet", True, "float16"),
        ("transformer", True, "bfloat16"),
        ("transformer", False, "float16"),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, has_bf16=has_bf16: has_bf16)
        found = evaluate.image_settings(args, [], "base", model | {"index": {network: []}}, torch.device("cuda"))
        assert found["dtype"] == dtype


def test_a_lora_is_drawn_whole_or_refused(tmp_path, tiny_sdxl):
    """diffusers leaves out what does not fit, with a warning or without one: such a LoRA ends the run before anything
    is drawn, in a line that says what is wrong. So does a network that lacks a weight, before it is drawn."""
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(tiny_sdxl, subfolder="unet")
    unet = UNet2DConditionModel.from_config(config)
    whole, first = kohya(unet), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    peft = {
        f"unet.{name}.lora_{side}.weight": torch.randn(*shape)
        for name in ("down_blocks.1.attentions.0.proj_in",)
        for side, shape in (("A", (4, 16)), ("B", (16, 4)))
    }
    part = "would be used in part, without|cannot be read as a LoRA of the base"  # by how diffusers takes it
    cases = {
        "deep": (kohya(UNet2DConditionModel.from_config({**config, "transformer_layers_per_block": [2, 2]})), part),
        "wide": (kohya(UNet2DConditionModel.from_config({**config, "cross_attention_dim": 24})), part),
        "dora": (kohya(unet, lambda key, weight: {f"{key}.dora_scale": torch.ones(1, len(weight))}), "is a DoRA"),
        "loha": ({"lora_unet_x.hada_w1_a": torch.ones(4, 4)}, "is a LoHa, which diffusers draws with in part"),
        "lokr": ({"lora_unet_x.lokr_w1": torch.ones(4, 4)}, "is a LoKr"),
        "fp8": ({key: value.to(torch.float8_e4m3fn) for key, value in whole.items()}, "is a LoRA in float8"),
        "half": ({key: value for key, value in peft.items() if "lora_A" in key}, part),
        "mixed": (peft | {"other.proj_in.lora_A.weight": torch.ones(4, 16)}, part),
        "text": (text_encoder_lora(24), part),
        "unet": ({"conv_in.weight": torch.ones(2, 2)}, part),
        "alone": ({key: value for key, value in whole.items() if key != f"{first}.lora_up.weight"}, part),
    }
    flags = [*make_flags(tmp_path, tiny_sdxl, ""), "--stages", "draw"]
    for name, (tensors, words) in cases.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / evaluate.LORA_FILE)
        message = refused("evaluate", *flags, "--loras", f"{name}={tmp_path / name}")
        assert name in message and any(word in message for word in words.split("|")), message
        assert name != "deep" or "without unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1." in message
    assert not list((tmp_path / "out").rglob("*.png"))
    whole[f"{first}.lora_up.weight"][0] = math.nan
    save_file(whole, tmp_path / "nan.safetensors")
    assert "is not finite" in refused("evaluate", *flags, "--loras", f"nan={tmp_path / 'nan.safetensors'}")
    save_file(kohya(unet), tmp_path / "whole.safetensors")
    flags += ["--loras", f"whole={tmp_path / 'whole.safetensors'}"]
    unet.save_pretrained(tmp_path / "lacks")
    weights = {key: value for key, value in unet.state_dict().items() if key != "conv_in.bias"}
    save_file(weights, tmp_path / "lacks" / "diffusion_pytorch_model.safetensors")
    message = refused("evaluate", *flags, "--models", f"lacks=unet:{tmp_path / 'lacks'}")
    assert "lacks: its weights do not fit its config.json: conv_in.bias" in message


def test_a_lora_of_a_text_encoder_alone_and_a_file_of_any_name(tmp_path, tiny_sdxl):
    torch.manual_seed(0)
    tensors = {key: 3 * value for key, value in text_encoder_lora().items()}
    save_file(tensors, tmp_path / "myStyle_v2-000010.safetensors")
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    save_file(kohya(unet), tmp_path / "after.safetensors")
    flags = [*make_flags(tmp_path, tiny_sdxl, ""), "--max_prompts", 1, "--num_images_per_prompt", 1, "--loras"]
    names = ("myStyle_v2-000010", "after")
    call("evaluate", *flags, *(f"{name}={tmp_path}/{name}.safetensors" for name in names))
    results = results_of(tmp_path / "out")
    assert results["settings"]["loras"] == {name: f"{name}.safetensors" for name in names}
    drawn = {(tmp_path / "out" / "images" / name / "00000_0.png").read_bytes() for name in ("base", *names)}
    assert len(drawn) == 3
    call("evaluate", *flags, f"after={tmp_path}/after.safetensors", "--output_dir", tmp_path / "alone")
    files = [tmp_path / output / "images" / "after" / "00000_0.png" for output in ("out", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()  # the first LoRA has left the text encoder


def test_a_lora_that_was_trained_again_gets_new_pictures(tmp_path, tiny_sdxl, monkeypatch):
    torch.manual_seed(0)
    unet, folder = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet"), tmp_path / "lora"
    folder.mkdir()
    flags, found = [*make_flags(tmp_path, tiny_sdxl, folder), "--max_prompts", 2], []
    for _ in range(2):
        save_file(kohya(unet), folder / evaluate.LORA_FILE)
        call("evaluate", *flags)
        images = sorted((tmp_path / "out" / "images").rglob("*.png"))
        found.append({file: (file.stat().st_mtime_ns, file.read_bytes()) for file in images})
        found.append(results_of(tmp_path / "out"))
    for file, (date, content) in found[0].items():
        is_base = file.parent.name == "base"
        assert (found[2][file] == (date, content)) is is_base and (found[2][file][1] == content) is is_base
    assert found[1]["mine"]["brightness"] != found[3]["mine"]["brightness"]
    assert found[1]["base"] == found[3]["base"]
    os.utime(folder / evaluate.LORA_FILE, (0, 0))  # a copy of the same LoRA
    monkeypatch.setattr(evaluate.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("drawn again"))
    call("evaluate", *flags)


def test_pictures_that_are_numbered_from_one(tmp_path):
    """ComfyUI's names. Every picture would be scored for the next prompt, and --allow_missing would hide it."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fox\n")
    for i in range(6):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(tmp_path / f"ComfyUI_{i + 1:05d}_.png")
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(tmp_path / f"{i // 2}-{i % 2 + 1}.png")
    flags = ["--prompts", tmp_path / "prompts.txt", "--baseline", "x", "--metrics", brightness(tmp_path)]
    flags += ["--num_images_per_prompt", 2, "--output_dir", tmp_path / "out", "--images"]
    for given, needed in (
        ("ComfyUI_{image:05d}_", "ComfyUI_{image+1:05d}_"),
        ("{index}-{number}", "{index}-{number+1}"),
    ):
        for more in ([], ["--allow_missing", "true"]):
            message = refused("evaluate", *flags, f"x={tmp_path}/{given}.png", *more)
            assert "count from 1" in message and f"{needed}.png" in message and "allow_missing" not in message
        call("evaluate", *flags, f"x={tmp_path}/{needed}.png")
        scores = json.loads((tmp_path / "out" / "scores" / "brightness" / "x.json").read_text())["scores"]
        assert scores == [[0, 10], [20, 30], [40, 50]]
    (tmp_path / "ComfyUI_00001_.png").unlink()  # it is missing, whatever the others are counted from
    assert "they are missing" not in refused("evaluate", *flags, f"x={tmp_path}/ComfyUI_{{image+1:05d}}_.png")


def test_the_grid_frames_verdicts_and_shows_whole_prompts(tmp_path):
    """Green where a metric of 0 and 1 says right, red where wrong, and none where it does not apply."""
    long = "a fox " * 80
    (tmp_path / "prompts.txt").write_text(f"{long}\na cat\na dog\n")
    for i in range(3):
        Image.new("RGB", (192, 192), (0, 0, 100 * i)).save(tmp_path / f"{i}.png")
    (tmp_path / "own.py").write_text(
        "def right(images, prompts):\n    nan = float('nan')\n"
        "    return [{'is': [0.0, 1.0, nan][image.getpixel((0, 0))[2] // 100]} for image in images]\n"
    )
    flags = ["--prompts", tmp_path / "prompts.txt", "--images", f"x={tmp_path}/{{index}}.png", "--baseline", "x"]
    flags += ["--metrics", f"{tmp_path}/own.py:right", "--output_dir", tmp_path / "out"]
    call("evaluate", *flags, "--grid_prompts", "a cat", "0", "2")
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png").convert("RGB"))
    edges = [tuple(grid[y, 100]) for y in np.flatnonzero((grid[:, 100] != 255).any(axis=1)) if y > 20]
    assert edges.index(evaluate.RIGHT) < edges.index(evaluate.WRONG) and (0, 0, 200) in edges
    assert "green where `right_is` is 1" in (tmp_path / "out" / "results.md").read_text()
    assert grid.shape[0] > 22 + 3 * 192 + 15 * len(long) * 5 // 192  # in as many lines as it takes
    call("evaluate", *flags, "--grid_prompts", "1")
    assert Image.open(tmp_path / "out" / "grid.png").height == 22 + 192 + 22
    assert "--grid_prompts a bird" in refused("evaluate", *flags, "--grid_prompts", "a bird")
