# SPDX-License-Identifier: Apache-2.0
"""What docs/reliability.md promises of the trainers: of one, where they share the code. faults.py, of which
test_faults.py runs a share, injects many more faults into all scripts."""

import os
import re
import shutil
import signal
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import call, logged, ranked_rows, refused, same_lora, start, write_dataset
from PIL import Image
from safetensors.torch import load_file

import build_synpic
import train_rankdpo_sdxl as script


TRAINER = "train_rankdpo_sdxl"
PROMPTS = ["a|b\r\nc", f"red {script.CARD_END} square", "`x` <!-- y"]
FOUR_STEPS = ["--max_train_steps", 4, "--checkpointing_steps", 1, "--validation_prompts", *PROMPTS]
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def flags(trainer_flags):
    return trainer_flags(TRAINER)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run of four steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    call(TRAINER, *flags, "--output_dir", folder, *FOUR_STEPS)
    return folder


def wait_for(condition, *processes) -> None:
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_signal_to_the_whole_group_and_a_console_that_is_gone(flags, tmp_path):
    """Slurm signals every process. `| tee log` ends at Ctrl-C, and nobody reads any more."""
    out, (console, end) = tmp_path / "out", os.pipe()
    (process,) = start(f"{TRAINER}.py", *flags, "--max_train_steps", 100_000, "--output_dir", out, stdout=end)
    os.close(end)
    wait_for(lambda: len(logged(out)) >= 3, process)
    os.close(console)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert (out / f"checkpoint-{logged(out)[-1]['step']}" / script.STATE_FILE).exists()


def test_a_second_signal_ends_at_once(flags, tmp_path):
    """Here the first one would wait for 100,000 forward passes of one step."""
    more = ["--gradient_accumulation_steps", 100_000, "--max_train_steps", 2, "--output_dir", tmp_path / "out"]
    (process,) = start(f"{TRAINER}.py", *flags, *more)

    def handles_signals() -> bool:
        handled = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
        return bool(int(handled, 16) >> (signal.SIGTERM - 1) & 1)

    wait_for(handles_signals, process)
    for pause in (2.5, 0):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.wait(30) == 130
    assert "Traceback" not in "".join(process.communicate())


def test_a_finished_run_is_finished_again(flags, finished, tmp_path):
    """Without training, by the same command: whatever is lost of LoRA, gallery and card is there again."""
    folder = tmp_path / "finished"
    shutil.copytree(finished, folder)
    before = (folder / "training_log.jsonl").read_text()
    (folder / script.LORA_FILE).unlink()
    (folder / "images" / "0.png").unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    call(TRAINER, *flags, "--output_dir", folder, *FOUR_STEPS, *LATEST)
    assert same_lora(folder, finished) and (folder / "images" / "0.png").exists()
    card = script.RepoCard((folder / "README.md").read_text())
    assert "Mine." in card.text and card.data.license == "mit"
    assert card.text.count(script.CARD_END) == 1 and "\r" not in card.text and "a\\|b c" in card.text  # for any prompt
    assert [widget["text"] for widget in card.data.widget] == PROMPTS
    assert (folder / "training_log.jsonl").read_text() == before

    # A card that cannot be kept is found at the start.
    for text in (b"---\nlicense: [\n---\n", "---\nlicense: caf\u00e9\n---\n".encode("latin-1")):
        (folder / "README.md").write_bytes(text)
        with pytest.raises((ValueError, yaml.YAMLError)):
            call(TRAINER, *flags, "--output_dir", folder, "--max_train_steps", 6, *LATEST)
        assert (folder / "README.md").read_bytes() == text and len(logged(folder)) == 4


def test_resume_notices_another_model_and_other_images(flags, tmp_path):
    model, data, folder = tmp_path / "model", tmp_path / "data", tmp_path / "out"
    shutil.copytree(flags[1], model)
    write_dataset(data, ranked_rows(n=8))
    command = [flags[0], model, flags[2], data, *flags[4:], "--max_train_steps", 2, "--output_dir", folder]
    call(TRAINER, *command)

    (weights,) = (model / "unet").glob("*.safetensors")
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 16]))
    assert "model_files" in refused(TRAINER, *command, *LATEST)
    weights.write_bytes(before)

    others = ranked_rows(n=8, seed=7)
    shutil.rmtree(data)
    write_dataset(data, [{**row, "images": other["images"]} for row, other in zip(ranked_rows(n=8), others)])
    assert "images" in refused(TRAINER, *command, *LATEST)
    shutil.rmtree(data)
    write_dataset(data, ranked_rows(n=8))  # the dates are new, the content is not
    call(TRAINER, *command, *LATEST)


def nan_at(monkeypatch, steps: list[int]) -> None:
    """Losses of these steps become NaN."""
    original, done = script.training_step, []

    def step(*arguments):
        loss, metrics = original(*arguments)
        done.append(loss)
        factor = float("nan") if len(done) in steps else 1.0
        return loss * factor, {**metrics, "loss": metrics["loss"] * factor}

    monkeypatch.setattr(script, "training_step", step)


def test_steps_without_a_finite_loss_are_skipped_and_counted(flags, tmp_path, monkeypatch):
    more = ["--max_train_steps", 5, "--max_skipped_steps", 1, "--checkpointing_steps", 1, "--output_dir"]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        nan_at(patch, [2, 4])
        call(TRAINER, *flags, *more, out)
    assert [line["step"] for line in logged(out) if line.get("skipped")] == [2, 4]
    assert [line["step"] for line in logged(out) if line["loss"] is None] == [2, 4]
    assert all(tensor.isfinite().all() for tensor in load_file(out / script.LORA_FILE).values())
    assert same_lora(out / "checkpoint-1", out / "checkpoint-2")
    assert not same_lora(out / "checkpoint-2", out / "checkpoint-3")
    assert "| skipped steps | 2 |" in (out / "README.md").read_text()
    nan_at(monkeypatch, [1, 2])
    message = refused(TRAINER, *flags, *more, tmp_path / "other")
    assert message.startswith("step 2: 2 steps in a row") and "--learning_rate" in message


def test_a_dataset_without_any_order_is_refused(flags, tmp_path):
    rows = [{**row, "preference_probability": [0.5] * 4, "rank": [1, 2, 3, 4]} for row in ranked_rows(n=6)]
    more = ["--dataset_name", write_dataset(tmp_path / "none", rows), "--output_dir", tmp_path / "out"]
    assert "all 6 prompts are equally preferred" in refused(TRAINER, *flags, *more)


def test_pictures_of_16_bits_and_transparent_ones():
    ramp = np.linspace(0, 1, 40 * 40).reshape(40, 40)
    grey, deep, wrong = (
        Image.fromarray(array) for array in (np.uint8(255 * ramp), np.uint16(65535 * ramp), np.float32(ramp))
    )
    glass = grey.convert("RGBA")
    glass.putalpha(Image.fromarray(np.uint8(ramp > 0.5) * 255))

    def pixels(picture: Image.Image) -> np.ndarray:
        buffer = BytesIO()
        picture.save(buffer, "TIFF")
        stored = {"bytes": buffer.getvalue(), "path": None}
        return script.preprocess_image(stored, 40)["pixels"].numpy().transpose(1, 2, 0).astype(int)

    assert np.abs(pixels(deep) - pixels(grey)).max() <= 1
    assert (pixels(glass)[:10] == 255).all() and (pixels(glass)[30:] == pixels(grey)[30:]).all()
    for read in (pixels, build_synpic.decode_image):
        with pytest.raises(ValueError, match="not of 8 or 16 bits"):
            read(wrong)
