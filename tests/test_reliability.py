# SPDX-License-Identifier: Apache-2.0
"""What docs/reliability.md promises, for all trainers, and what the builders and evaluate.py promise beyond it.
`make test-faults`, which is faults.py, injects many more faults."""

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import (
    ROOT,
    TRAINERS,
    call,
    logged,
    pair_rows,
    ranked_rows,
    refused,
    run,
    same_lora,
    write_dataset,
    write_pairs,
)
from datasets import Value
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

import build_synpic
import train_rankdpo_sdxl as script


LATEST = ("--resume_from_checkpoint", "latest")
all_trainers = pytest.mark.parametrize("name", TRAINERS)


@pytest.fixture(scope="module")
def flags(trainer_flags):
    return trainer_flags("train_rankdpo_sdxl")


@pytest.fixture(scope="module")
def finished(trainer_flags, tmp_path_factory):
    """Makes a run of four steps, once, with a checkpoint of each."""
    folders = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("runs") / name
            more = ["--output_dir", folders[name], "--max_train_steps", 4, "--checkpointing_steps", 1]
            call(name, *trainer_flags(name), *more)
        return folders[name]

    return make


def flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 16
    file.write_bytes(content)


# Trainers: signals, runs that go on ----------------------------------------------------------------------------------


def start(*command, **options) -> subprocess.Popen:
    """A command, whose environment may be given as ENV=..., without a launcher of its own: as Slurm's srun does it."""
    environment = {name: options.pop(name) for name in list(options) if name.isupper()}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([sys.executable, *map(str, command)], env={**os.environ, **environment}, **options)


def wait_for(condition, *processes) -> None:
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_ends_training_with_a_checkpoint_of_that_step(flags, tmp_path, processes, number):
    """128 + n of every process, although only one of two receives the signal; then the same weights, bit for bit, as a
    run that nobody stopped."""
    size = ["--train_batch_size", 2 // processes, "--max_train_steps", 40, "--checkpointing_steps", 1000]
    command = ["train_rankdpo_sdxl.py", *flags, *size, "--output_dir"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ranks(folder: Path, *more) -> list[subprocess.Popen]:
        if processes == 1:
            return [start(*command, folder, *more)]
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [start(*command, folder, *more, RANK=str(i), LOCAL_RANK=str(i), **world) for i in range(2)]

    def finish(folder: Path, *more) -> None:
        if processes == 1:
            call("train_rankdpo_sdxl", *command[1:], folder, *more)
        else:
            assert [process.wait() for process in ranks(folder, *more)] == [0, 0]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(whole)
    started = ranks(stopped)
    wait_for(lambda: len(logged(stopped)) >= 3, *started)
    started[-1].send_signal(number)
    outputs = [process.communicate(timeout=120)[0] for process in started]
    codes = [process.returncode for process in started]
    # A process that has not received the signal itself leaves as after a SIGTERM.
    assert codes[-1] == 128 + number and set(codes) <= {128 + number, 143}, outputs
    last = logged(stopped)[-1]["step"]
    assert [path.name for path in stopped.glob("checkpoint-*")] == [f"checkpoint-{last}"] and last < 40
    assert f"stopped after step {last}" in outputs[0] and "Traceback" not in "".join(outputs)
    finish(stopped, *LATEST)
    assert same_lora(whole, stopped)


def test_a_signal_to_the_whole_group_and_a_console_that_is_gone(flags, tmp_path):
    """Slurm signals every process. `| tee log` ends at Ctrl-C, and nobody reads any more."""
    out = tmp_path / "out"
    for number in (signal.SIGTERM, signal.SIGINT):
        more = ["--max_train_steps", 100_000, "--output_dir", out, *LATEST]
        process, steps = start("train_rankdpo_sdxl.py", *flags, *more, start_new_session=True), len(logged(out)) + 3
        wait_for(lambda steps=steps: len(logged(out)) >= steps, process)
        if number == signal.SIGINT:
            process.stdout.close()
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == 128 + number
        assert (out / f"checkpoint-{logged(out)[-1]['step']}" / script.STATE_FILE).exists()


def test_a_second_signal_ends_at_once(flags, tmp_path):
    """Here the first one would wait for 100,000 forward passes of one step, had it more than one process."""
    more = ["--gradient_accumulation_steps", 100_000, "--max_train_steps", 2, "--output_dir", tmp_path / "out"]
    process = start("train_rankdpo_sdxl.py", *flags, *more)
    wait_for(lambda: (tmp_path / "out" / "training_log.jsonl").exists(), process)
    for pause in (2.5, 0):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.wait(timeout=30) == 130
    assert "Traceback" not in process.communicate()[0]


@all_trainers
def test_a_finished_run_is_finished_again(trainer_flags, finished, tmp_path, name):
    """Without training, by the same command: whatever is lost of LoRA, gallery and card is there again."""
    folder = tmp_path / name
    shutil.copytree(finished(name), folder)
    module, before = importlib.import_module(name), (folder / "training_log.jsonl").read_text()
    (folder / module.LORA_FILE).unlink()
    (folder / "images" / "0.png").unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    more = ["--output_dir", folder, "--max_train_steps", 4, "--checkpointing_steps", 1]
    call(name, *trainer_flags(name), *more, *LATEST)
    assert same_lora(folder, finished(name)) and (folder / "images" / "0.png").exists()
    card = (folder / "README.md").read_text()
    assert module.CARD_END in card and "license: mit" in card and "Mine." in card
    assert (folder / "training_log.jsonl").read_text() == before


@all_trainers
def test_resume_notices_another_model_and_other_images(trainer_flags, tmp_path, name):
    model, data, folder = tmp_path / "model", tmp_path / "data", tmp_path / "out"
    rows, write, keys = ranked_rows, write_dataset, ["images"]
    if name == "train_dpo_qsd":
        rows, write, keys = pair_rows, write_pairs, ["jpg_0", "jpg_1"]
    flags = trainer_flags(name)
    shutil.copytree(flags[1], model)
    write(data, rows(n=8))
    command = [*flags[:1], model, flags[2], data, *flags[4:], "--max_train_steps", 2, "--output_dir", folder]
    call(name, *command)

    weights = next((model / ("transformer" if "sd3" in name else "unet")).glob("*.safetensors"))
    before = weights.read_bytes()
    flip(weights)
    assert "model_files" in refused(name, *command, *LATEST)
    weights.write_bytes(before)

    others = rows(n=8, seed=7)
    shutil.rmtree(data)
    write(data, [{**row, **{key: other[key] for key in keys}} for row, other in zip(rows(n=8), others)])
    assert "images" in refused(name, *command, *LATEST)
    shutil.rmtree(data)
    write(data, rows(n=8))  # the dates are new, the content is not
    call(name, *command, *LATEST)


def nan_at(monkeypatch, module, steps) -> None:
    """Losses of these steps become NaN."""
    original, done = module.training_step, []

    def step(*arguments):
        loss, metrics = original(*arguments)
        done.append(loss)
        factor = float("nan") if len(done) in steps else 1.0
        return loss * factor, {**metrics, "loss": metrics["loss"] * factor}

    monkeypatch.setattr(module, "training_step", step)


@all_trainers
def test_steps_without_a_finite_loss_are_skipped_and_counted(trainer_flags, tmp_path, monkeypatch, name):
    more = ["--max_train_steps", 5, "--max_skipped_steps", 1, "--checkpointing_steps", 1, "--output_dir"]
    out, module, flags = tmp_path / "out", importlib.import_module(name), trainer_flags(name)
    with monkeypatch.context() as patch:
        nan_at(patch, module, [2, 4])
        call(name, *flags, *more, out)
    assert [line["step"] for line in logged(out) if line.get("skipped")] == [2, 4]
    assert [line["step"] for line in logged(out) if line["loss"] is None] == [2, 4]
    assert all(tensor.isfinite().all() for tensor in load_file(out / module.LORA_FILE).values())
    assert same_lora(out / "checkpoint-1", out / "checkpoint-2")
    assert not same_lora(out / "checkpoint-2", out / "checkpoint-3")
    assert "| skipped steps | 2 |" in (out / "README.md").read_text()
    nan_at(monkeypatch, module, [1, 2])
    message = refused(name, *flags, *more, tmp_path / "other")
    assert message.startswith("step 2: 2 steps in a row") and "--learning_rate" in message


# Trainers: two writers, the disk -------------------------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_while_the_first_one_lives(flags, tmp_path):
    out = tmp_path / "out"
    more = ["--max_train_steps", 100_000, "--output_dir", out]
    first = start("train_rankdpo_sdxl.py", *flags, *more)
    wait_for(lambda: (out / "run.json").exists(), first)
    for other in ([], ["--beta_dpo", 7]):
        assert f"--output_dir {out} is in use by another run" in refused("train_rankdpo_sdxl", *flags, *more, *other)
    first.kill()
    first.wait()
    FileLock(out / ".lock").acquire(timeout=0).lock.release()  # a dead process holds no lock


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_write_that_fails_leaves_nothing_half_written(flags, finished, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the same places."""
    command = [*flags, "--cache_dir", tmp_path / "cache", "--max_train_steps", 4, "--checkpointing_steps", 1]
    command += ["--output_dir", tmp_path / "out"]
    result = run("-c", LIMITED, 30_000, "train_rankdpo_sdxl.py", *command, check=False)
    assert result.returncode == 1, result.stderr[-2000:]
    files = [file for file in tmp_path.rglob("*.safetensors") if not re.search(r"(^|/)\.", str(file))]
    assert files and all(load_file(file) for file in files)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    call("train_rankdpo_sdxl", *command, *LATEST)
    assert same_lora(tmp_path / "out", finished("train_rankdpo_sdxl"))


# Trainers: inputs ----------------------------------------------------------------------------------------------------


def test_files_that_are_links_are_read_in_place(flags, tmp_path):
    """As in a snapshot of the Hub's cache: names that end in .parquet, of files that do not."""
    for file in Path(flags[3]).rglob("*.parquet"):
        link = tmp_path / "run [12]" / file.relative_to(flags[3])
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "blob")
        link.symlink_to(tmp_path / "blob")
    more = [
        "--dataset_name",
        tmp_path / "run [12]",
        "--cache_dir",
        tmp_path / "cache",
        "--output_dir",
        tmp_path / "out",
    ]
    call("train_rankdpo_sdxl", *flags, *more, "--max_train_steps", 1)
    assert not (tmp_path / "cache" / "datasets").exists() and len(logged(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["train_rankdpo_sdxl", "train_rankdpo_sd3"])
def test_a_dataset_without_any_order_is_refused(trainer_flags, tmp_path, capsys, name):
    rows, command = ranked_rows(n=6), [*trainer_flags(name), "--max_train_steps", 1, "--dataset_name"]
    for row in rows[1:]:
        row.update(preference_probability=[0.5] * 4, rank=[1, 2, 3, 4])
    call(name, *command, write_dataset(tmp_path / "some", rows), "--output_dir", tmp_path / "out")
    assert "5 prompts have none" in capsys.readouterr().out
    rows[0].update(preference_probability=[0.5] * 4, rank=[1, 2, 3, 4])
    none = write_dataset(tmp_path / "none", rows)
    assert "all 6 prompts are equally preferred" in refused(name, *command, none, "--output_dir", tmp_path / "none-out")


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


WRONG_FLAGS = {
    "tracker": (["--report_to", "foo"], "--report_to"),
    "weight decay": (["--adam_weight_decay", "nan"], "at least 0"),
    "learning rate": (["--learning_rate", -1], "greater than 0"),
    "resolution": (["--resolution", 100_000], "at most 8192"),
}


@all_trainers
def test_flags_that_can_be_known_wrong(trainer_flags, tmp_path, name):
    for wrong, word in WRONG_FLAGS.values():
        assert word in refused(name, *trainer_flags(name), "--output_dir", tmp_path / "out", *wrong)


@all_trainers
@pytest.mark.parametrize("text", [b"---\nlicense: [\n---\n", "---\nlicense: caf\u00e9\n---\n".encode("latin-1")])
def test_a_card_that_cannot_be_kept_is_found_at_the_start(trainer_flags, finished, tmp_path, text, name):
    folder = tmp_path / "out"
    shutil.copytree(finished(name), folder)
    (folder / "README.md").write_bytes(text)
    more = ["--output_dir", folder, "--max_train_steps", 6, *LATEST]
    with pytest.raises((ValueError, yaml.YAMLError)):
        call(name, *trainer_flags(name), *more)
    assert (folder / "README.md").read_bytes() == text and len(logged(folder)) == 4


@all_trainers
def test_any_prompt_can_stand_on_a_card(trainer_flags, tmp_path, name):
    module = importlib.import_module(name)
    prompts = ["a|b\r\nc", f"red {module.CARD_END} square", "`x` <!-- y"]
    more = ["--max_train_steps", 1, "--output_dir", tmp_path / "out", "--validation_prompts", *prompts]
    call(name, *trainer_flags(name), *more)
    card = (tmp_path / "out" / "README.md").read_text()
    body = module.RepoCard(card)
    assert body.text.count(module.CARD_END) == 1 and "\r" not in card and "a\\|b c" in card
    assert [widget["text"] for widget in body.data.widget] == prompts
    again = module.merge_cards(module.RepoCard(card), module.RepoCard(card + "\nMine.\n"))
    assert str(again).count("## Use it") == 1 and "Mine." in str(again)


# Builders and evaluate.py --------------------------------------------------------------------------------------------


def test_text_in_has_label_is_refused(tmp_path):
    rows = [{**row, "has_label": "false"} for row in pair_rows()]
    data = write_pairs(tmp_path / "pairs", rows, has_label=Value("string"))
    message = refused(
        "score_pairs", "--dataset_name", data, "--reward", "shapes/world.py:preference", "--output_dir", tmp_path / "o"
    )
    assert "has_label" in message and "numbers" in message


def test_evaluate_refuses_a_folder_that_is_not_its_own(ranked_dataset, tiny_sdxl, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    command = ["--pretrained_model_name_or_path", tiny_sdxl, "--prompts", tmp_path / "prompts.txt", "--output_dir"]
    assert "holds other files" in refused("evaluate", *command, ranked_dataset)
    message = refused("evaluate", *command, tmp_path / "out", "--loras", "x=/no/such/folder")
    assert "/no/such/folder" in message
