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
from conftest import call, logged, ranked_rows, refused, same_lora, start, torchrun, write_dataset
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


# Signals --------------------------------------------------------------------------------------------------------------


def wait_for(condition, *processes) -> None:
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_ends_training_with_a_checkpoint_of_that_step(flags, tmp_path, processes, number):
    """128 + n of every process, although only one of two receives the signal; then the same weights, bit for bit, as a
    run that nobody stopped."""
    command = [f"{TRAINER}.py"] if processes == 1 else torchrun(processes, f"{TRAINER}.py")
    command += [*flags, "--train_batch_size", 2 // processes, "--max_train_steps", 20, "--checkpointing_steps", 1000]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    started = start(*command, "--output_dir", stopped)
    wait_for(lambda: len(logged(stopped)) >= 3, *started)
    started[-1].send_signal(number)
    outputs = ["".join(process.communicate(120)) for process in started]
    codes = [process.returncode for process in started]
    # A process that has not received the signal itself leaves as after a SIGTERM.
    assert codes[-1] == 128 + number and set(codes) <= {128 + number, 143}, outputs
    last = logged(stopped)[-1]["step"]
    assert [path.name for path in stopped.glob("checkpoint-*")] == [f"checkpoint-{last}"] and last < 20
    assert f"stopped after step {last}" in outputs[0] and "Traceback" not in "".join(outputs)
    for more in (["--output_dir", whole], ["--output_dir", stopped, *LATEST]):
        assert [process.wait() for process in start(*command, *more)] == [0] * processes
    assert same_lora(whole, stopped)


def test_a_signal_to_the_whole_group_and_a_console_that_is_gone(flags, tmp_path):
    """Slurm signals every process. `| tee log` ends at Ctrl-C, and nobody reads any more."""
    out = tmp_path / "out"
    for number in (signal.SIGTERM, signal.SIGINT):
        more = ["--max_train_steps", 100_000, "--output_dir", out, *LATEST]
        (console, end), steps = os.pipe(), len(logged(out)) + 3
        (process,) = start(f"{TRAINER}.py", *flags, *more, stdout=end)
        os.close(end)
        wait_for(lambda steps=steps: len(logged(out)) >= steps, process)
        os.close(console)
        os.killpg(process.pid, number)
        assert process.wait(60) == 128 + number
        assert (out / f"checkpoint-{logged(out)[-1]['step']}" / script.STATE_FILE).exists()


def test_a_second_signal_ends_at_once(flags, tmp_path):
    """Here the first one would wait for 100,000 forward passes of one step, had it more than one process."""
    more = ["--gradient_accumulation_steps", 100_000, "--max_train_steps", 2, "--output_dir", tmp_path / "out"]
    (process,) = start(f"{TRAINER}.py", *flags, *more)
    status = Path(f"/proc/{process.pid}/status")

    def trains() -> bool:
        """It has begun its log, and then to handle signals."""
        handled = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        return (tmp_path / "out" / "training_log.jsonl").exists() and bool(handled >> (signal.SIGINT - 1) & 1)

    wait_for(trains, process)
    for pause in (2.5, 0):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.wait(30) == 130
    assert "Traceback" not in "".join(process.communicate())


# Runs that go on ------------------------------------------------------------------------------------------------------


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
    card = (folder / "README.md").read_text()
    assert script.CARD_END in card and "license: mit" in card and "Mine." in card
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


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_a_dataset_without_any_order_is_refused(flags, tmp_path):
    rows = [{**row, "preference_probability": [0.5] * 4, "rank": [1, 2, 3, 4]} for row in ranked_rows(n=6)]
    more = ["--dataset_name", write_dataset(tmp_path / "none", rows), "--output_dir", tmp_path / "out"]
    assert "all 6 prompts are equally preferred" in refused(TRAINER, *flags, *more)


def picture(mode: str) -> Image.Image:
    ramp = np.linspace(0, 1, 40 * 40).reshape(40, 40)
    if mode == "I;16":
        return Image.fromarray((ramp * 65535).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(ramp.astype(np.float32))
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    if mode == "RGBA":
        grey = grey.convert("RGBA")
        grey.putalpha(Image.fromarray(np.uint8(ramp > 0.5) * 255))
    return grey


def test_pictures_of_16_bits_and_transparent_ones():
    def pixels(mode: str) -> np.ndarray:
        buffer = BytesIO()
        picture(mode).save(buffer, "TIFF")
        stored = {"bytes": buffer.getvalue(), "path": None}
        return script.preprocess_image(stored, 40)["pixels"].numpy().transpose(1, 2, 0).astype(int)

    plain = pixels("L")
    assert np.abs(pixels("I;16") - plain).max() <= 1
    assert (pixels("RGBA")[:10] == 255).all() and (pixels("RGBA")[30:] == plain[30:]).all()
    with pytest.raises(ValueError, match="not of 8 or 16 bits"):
        pixels("F")
    with pytest.raises(ValueError, match="not of 8 or 16 bits"):
        build_synpic.decode_image(picture("F"))


def test_any_prompt_can_stand_on_a_card(finished):
    card = (finished / "README.md").read_text()
    body = script.RepoCard(card)
    assert body.text.count(script.CARD_END) == 1 and "\r" not in card and "a\\|b c" in card
    assert [widget["text"] for widget in body.data.widget] == PROMPTS
    again = script.merge_cards(script.RepoCard(card), script.RepoCard(card + "\nMine.\n"))
    assert str(again).count("## Use it") == 1 and "Mine." in str(again)
