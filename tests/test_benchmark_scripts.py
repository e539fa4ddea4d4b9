# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what is counted is what is computed, and what is timed are the steps, or the drawing."""

import json
import subprocess
import sys

import generate_speed
import many_rows
import numpy as np
import pytest
import torch
import train_speed
from conftest import ROOT


@pytest.mark.parametrize("family", ["sdxl", "sd3", "zimage"])
def test_a_step_costs_no_more_than_its_least_parts(family, tmp_path):
    train_speed.make_model(tmp_path, family, "tiny", None)
    counted = train_speed.count_ours(family, tmp_path, rank=4, resolution=64)
    assert counted["step"] == pytest.approx(counted["floor"]) == pytest.approx(counted["reference"] + counted["lora"])
    assert counted["step"] < counted["compile"] < counted["step"] + 0.2 * counted["lora"]  # the LoRA, forward only
    assert train_speed.repeated(counted, 1)[0] == pytest.approx(train_speed.repeated(counted, 1)[1])
    epochs, runs = train_speed.repeated(counted, 4)
    assert epochs - runs == pytest.approx(0.75 * counted["reference"])
    assert counted["reference"] < counted["lora"] and counted["step"] < counted["checkpointing"] < 1.5 * counted["step"]


def test_full_size_is_sdxl_at_its_floor(tmp_path):
    train_speed.make_model(tmp_path, "sdxl", "full", None)
    counted = train_speed.count_ours("sdxl", tmp_path, rank=64, resolution=1024, settings=("step",))
    assert counted["reference"] == pytest.approx(6.76, abs=0.01)  # as published counts of SDXL's UNet have it
    assert counted["step"] <= 22.0 and counted["step"] == pytest.approx(counted["floor"])


def test_ours_is_timed_through_its_command_line(tmp_path, monkeypatch, capsys):
    words = "--size tiny --steps 3 --rank 4 --gradient_checkpointing --rounds 1 --json".split()
    monkeypatch.setattr(sys, "argv", ["train_speed.py", *words, str(tmp_path / "found.json")])
    train_speed.main()
    found = json.loads((tmp_path / "found.json").read_text())
    (row,) = found["runs"]
    assert row["tflop_per_image"] == found["counted"]["sdxl"]["checkpointing"]
    speed = row["images_per_second"]
    assert speed > 0 and row["share_of_peak"] == speed * row["tflop_per_image"] / found["matmul_tflops"]
    assert f"{speed:.3f} images/s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure for 9 minutes")
def test_bench_gpu_skips_itself_without_a_gpu():
    done = subprocess.run(["make", "--no-print-directory", "bench-gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "bench-gpu: no CUDA device here: nothing was measured\n"


def test_a_start_with_many_rows_is_measured(tmp_path):
    words = ["--rows", "40", "--trainer", "train_rankdpo_sdxl", "--json", str(tmp_path / "found.jsonl")]
    many_rows.main(words)
    first, again = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert (first["start"], again["start"]) == ("first", "again") and first["rows"] == again["rows"] == 40
    # The second start reads no image and writes no index.
    assert again["read_gb"] < first["read_gb"] and again["written_gb"] < first["written_gb"]
    assert 0 < again["imported_gb"] < again["peak_gb"] and 0 < again["cpu_seconds"]


def test_an_image_is_counted_as_its_forwards(tmp_path):
    """With guidance, each step is two forwards of the denoiser; the rest is counted once."""
    train_speed.make_model(tmp_path, "sd3", "tiny", None)
    forward = train_speed.count_ours("sd3", tmp_path, rank=4, resolution=64)["reference"]
    pipeline = train_speed.make_pipeline("sd3", "tiny", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "guidance_scale": 5.0}
    one, four = (generate_speed.tflop_per_image(pipeline, {"num_inference_steps": n, **size}) for n in (1, 4))
    assert (four - one) / 6 == pytest.approx(forward, rel=0.01) and one > 2 * forward


def test_drawing_is_timed_beside_the_bare_pipeline(tmp_path, capsys):
    words = "--size tiny --models sdxl --steps 1 --images 3 --batch 2 --rounds 2 --json".split()
    generate_speed.main([*words, str(tmp_path / "found.json")])
    found, last = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out.splitlines()[-2:]
    assert [row["way"] for row in found["runs"]] == 2 * ["ours", "bare"]
    seconds = np.array([row["seconds"] for row in found["runs"]]).reshape(2, 2)
    rounds = seconds[:, 0] / seconds[:, 1] - 1
    expected = {"all": seconds[:, 0].sum() / seconds[:, 1].sum() - 1, "min": min(rounds), "max": max(rounds)}
    assert found["overhead"] == pytest.approx(expected)
    assert last[0].startswith("CPU time: overhead ") and last[1].startswith(f"overhead {expected['all']:.1%} (min ")
    assert found["difference"]["sdxl"] <= 3  # the same seeds, so the same pictures
    assert all(row["images_per_second"] == pytest.approx(3 / row["seconds"]) for row in found["runs"])


def test_memory_of_a_step(tmp_path):
    """Of the tiny UNet: the sizes of what is known, and what checkpointing and a larger batch change."""
    train_speed.make_model(tmp_path, "sdxl", "tiny", None)
    settings = {"one": (1, False), "two": (2, False), "checkpointing": (1, True)}
    found = {name: train_speed.count_memory("sdxl", tmp_path, 4, 64, *setting) for name, setting in settings.items()}
    with train_speed.without_weights():
        unet = train_speed.diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert found["one"]["weights"] == pytest.approx(2e-9 * sum(parameter.numel() for parameter in unet.parameters()))
    linear = sum(layer.weight.numel() for layer in unet.modules() if isinstance(layer, torch.nn.Linear))
    assert found["one"]["weights"] - found["one"]["nf4"] == pytest.approx((2 - 0.5625) * 1e-9 * linear)
    assert found["one"]["adam"] == found["one"]["lora"]  # parameters and gradients, or two states, in float32
    one, two, checkpointing = (found[name]["activations"] for name in settings)
    assert 1.7 * one < two < 2.05 * one and checkpointing < 0.7 * one
