# SPDX-License-Identifier: Apache-2.0
"""Faults of all kinds: nothing is lost, nothing is silently wrong, every message is one line. `make test-faults`, which
is faults.py, injects many more of them."""

import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, call, pair_rows, ranked_rows, refused, run, write_dataset, write_pairs
from datasets import Value
from PIL import Image
from safetensors.torch import load_file, save_file

import build_synpic
import evaluate
import train_rankdpo_sdxl as script


FLAGS = "--resolution 32 --rank 4 --learning_rate 1e-2 --beta_dpo 100 --validation_num_inference_steps 1"
FLAGS = [*FLAGS.split(), "--report_to", "none", "--train_batch_size", "2"]
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def flags(tiny_sdxl, ranked_dataset, tmp_path_factory):
    model = ["--pretrained_model_name_or_path", tiny_sdxl, "--dataset_name", ranked_dataset]
    return [*model, "--cache_dir", tmp_path_factory.mktemp("cache"), *FLAGS]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run of four steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    call("train_rankdpo_sdxl", *flags, "--output_dir", folder, "--max_train_steps", 4, "--checkpointing_steps", 1)
    return folder


def same_lora(a: Path, b: Path) -> bool:
    a, b = (load_file(folder / script.LORA_FILE) for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 16
    file.write_bytes(content)


# ----------------------------------------------------------------------------------------------------------------------
# Stopping: signals, damage, runs that go on
# ----------------------------------------------------------------------------------------------------------------------


def start(*command, **env) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, *map(str, command)], env={**os.environ, **env}, **options)


def wait_for(condition, *processes) -> None:
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def logged(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_training_with_a_checkpoint_of_that_step(flags, tmp_path, processes):
    """Exit code 143 of every process, although only one of two receives the signal; then the same weights, bit for bit,
    as a run that nobody stopped. Processes are started as Slurm's srun does, without a launcher of their own."""
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
    log = stopped / "training_log.jsonl"
    wait_for(lambda: logged(log) >= 3, *started)
    started[-1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [143] * processes, outputs
    (checkpoint,) = script.list_checkpoints(stopped)
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"checkpoint-{last}" and last < 40
    assert f"stopped: checkpoint-{last} is in" in outputs[0] and "Traceback" not in "".join(outputs)
    finish(stopped, *LATEST)
    assert same_lora(whole, stopped)


def test_a_signal_to_the_whole_group_and_a_console_that_is_gone(flags, tmp_path):
    """Slurm signals every process, DataLoader's workers too. `| tee log` ends at Ctrl-C, and nobody reads any more."""
    more = ["--dataloader_num_workers", 2, "--max_train_steps", 100_000, "--output_dir", tmp_path / "out"]
    command = [sys.executable, "train_rankdpo_sdxl.py", *map(str, [*flags, *more])]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": ROOT, "start_new_session": True}
    log = tmp_path / "out" / "training_log.jsonl"
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([*command, *LATEST], **options)
        steps = logged(log) + 3
        wait_for(lambda steps=steps: logged(log) >= steps, process)
        if number == signal.SIGINT:
            process.stdout.close()
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == 128 + number, process.stdout.read()
        last = json.loads(log.read_text().splitlines()[-1])["step"]
        assert script.checkpoint_record(tmp_path / "out" / f"checkpoint-{last}")


def test_a_second_signal_ends_at_once(flags, tmp_path):
    """Here the first one would wait for 100,000 steps of accumulation."""
    more = ["--gradient_accumulation_steps", 100_000, "--max_train_steps", 1, "--output_dir", tmp_path / "out"]
    process = start("train_rankdpo_sdxl.py", *flags, *more)
    wait_for(lambda: (tmp_path / "out" / "training_log.jsonl").exists(), process)
    for pause in (2.5, 0):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.wait(timeout=30) == 130
    assert "Traceback" not in process.communicate()[0]


def test_an_extended_run_killed_after_its_last_checkpoint_is_finished(flags, finished, tmp_path, monkeypatch):
    """The old LoRA and card stand beside the new checkpoint: they are not those of the longer run."""
    extended, straight = tmp_path / "extended", tmp_path / "straight"
    shutil.copytree(finished, extended)
    six = [*flags, "--max_train_steps", 6, "--checkpointing_steps", 1, "--output_dir"]
    call("train_rankdpo_sdxl", *six, straight)
    with monkeypatch.context() as patch:
        patch.setattr(script, "finish", lambda *arguments: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError):
            call("train_rankdpo_sdxl", *six, extended, *LATEST)
    assert (extended / "checkpoint-6").exists() and same_lora(extended, finished)
    call("train_rankdpo_sdxl", *six, extended, *LATEST)
    assert same_lora(extended, straight)


@pytest.mark.parametrize("damage", ["lora", "picture", "card"])
def test_a_finished_run_with_a_lost_or_damaged_file_is_finished_again(flags, finished, tmp_path, damage):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    if damage == "lora":
        flip(folder / script.LORA_FILE)
    elif damage == "picture":
        (folder / "images" / "0.png").unlink()
    else:
        (folder / "README.md").write_text((folder / "README.md").read_text()[:500])
    more = ["--output_dir", folder, "--max_train_steps", 4, "--checkpointing_steps", 1]
    call("train_rankdpo_sdxl", *flags, *more, *LATEST)
    assert same_lora(folder, finished) and (folder / "images" / "0.png").exists()
    assert script.CARD_END in (folder / "README.md").read_text()


@pytest.mark.parametrize("file", ["training_state.pt", "pytorch_lora_weights.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over(flags, finished, tmp_path, capsys, file):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    flip(folder / "checkpoint-4" / file)
    more = ["--output_dir", folder, "--max_train_steps", 4, "--checkpointing_steps", 1]
    named = refused("train_rankdpo_sdxl", *flags, *more, "--resume_from_checkpoint", folder / "checkpoint-4")
    assert "checkpoint-4 is damaged" in named
    call("train_rankdpo_sdxl", *flags, *more, *LATEST)
    assert "checkpoint-4 is damaged" in capsys.readouterr().err
    assert same_lora(folder, finished) and script.checkpoint_record(folder / "checkpoint-4")


def test_resume_notices_another_model_other_images_and_another_runs_checkpoint(flags, finished, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    rows = ranked_rows(n=10)
    shutil.copytree(flags[1], model)
    write_dataset(data, rows)
    copied = [*flags[:1], model, flags[2], data, *flags[4:], "--max_train_steps", 4, "--checkpointing_steps", 1]
    folder = tmp_path / "out"
    call("train_rankdpo_sdxl", *copied, "--output_dir", folder)

    weights = next((model / "unet").glob("*.safetensors"))
    before = weights.read_bytes()
    flip(weights)
    assert "model_files" in refused("train_rankdpo_sdxl", *copied, "--output_dir", folder, *LATEST)
    weights.write_bytes(before)

    other = [{**row, "images": new["images"]} for row, new in zip(rows, ranked_rows(n=10, seed=7))]
    shutil.rmtree(data)
    write_dataset(data, other)
    assert "images" in refused("train_rankdpo_sdxl", *copied, "--output_dir", folder, *LATEST)
    shutil.rmtree(data)
    write_dataset(data, rows)  # the dates are new, the content is not

    shutil.copytree(finished / "checkpoint-4", folder / "checkpoint-5")
    more = ["--output_dir", folder, *LATEST, "--max_train_steps", 6]
    assert "checkpoint-5 is of another run" in refused("train_rankdpo_sdxl", *copied, *more)
    shutil.rmtree(folder / "checkpoint-5")
    call("train_rankdpo_sdxl", *copied, "--output_dir", folder, *LATEST)


def test_damaged_run_json_and_log_do_not_stop_a_resume(flags, finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    flip(folder / "run.json")
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    (folder / "training_log.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + '\n{"step": 5')
    call("train_rankdpo_sdxl", *flags, "--output_dir", folder, "--max_train_steps", 6, *LATEST)
    messages = capsys.readouterr().err
    assert "run.json is damaged" in messages and "lines up to step 4 are damaged or missing" in messages
    steps = [json.loads(line)["step"] for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 4, 5, 6]


def test_a_run_of_an_earlier_version_is_not_begun_again(flags, finished, tmp_path):
    """Its files have no checksums: they are not taken for damaged ones."""
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    record = script.read_json(folder / "run.json")
    (folder / "run.json").write_text(json.dumps(record))
    for checkpoint in script.list_checkpoints(folder):
        (checkpoint / "checkpoint.json").unlink()
    message = refused("train_rankdpo_sdxl", *flags, "--output_dir", folder, "--max_train_steps", 6, *LATEST)
    assert "of an earlier version" in message and "choose another folder" in message


def test_a_damaged_cache_file_is_made_again(flags, tmp_path, capsys):
    """Also one whose damage would give a NaN: the file is named."""
    cache = tmp_path / "cache"
    more = [*flags, "--cache_dir", cache, "--max_train_steps", 2, "--proportion_empty_prompts", 0.5, "--output_dir"]
    call("train_rankdpo_sdxl", *more, tmp_path / "a")
    for file in cache.rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    call("train_rankdpo_sdxl", *more, tmp_path / "b")
    assert same_lora(tmp_path / "a", tmp_path / "b")
    assert capsys.readouterr().err.count("is damaged: it is made again") == 2


def nan_at(monkeypatch, steps) -> None:
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
    nan_at(monkeypatch, [2, 4])
    call("train_rankdpo_sdxl", *flags, *more, tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line.get("skipped")] == [2, 4]
    assert [line["step"] for line in log if line["loss"] is None] == [2, 4]
    weights = load_file(tmp_path / "out" / script.LORA_FILE)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    first, second = (load_file(tmp_path / "out" / f"checkpoint-{n}" / script.LORA_FILE) for n in (1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "| skipped steps | 2 |" in (tmp_path / "out" / "README.md").read_text()


def test_too_many_such_steps_end_with_a_command_that_can_be_followed(flags, tmp_path, monkeypatch):
    more = ["--max_train_steps", 4, "--max_skipped_steps", 1, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["train_rankdpo_sdxl.py", *map(str, [*flags, *more])])
    with monkeypatch.context() as patch:
        nan_at(patch, [1, 2])
        message = refused("train_rankdpo_sdxl", *flags, *more)
    assert message.startswith("step 2: 2 steps in a row") and "no checkpoint is kept" in message
    _, _, command = message.partition("To try half the learning rate: ")
    assert "--learning_rate 0.005" in command and command.endswith("--resume_from_checkpoint latest")
    call("train_rankdpo_sdxl", *shlex.split(command)[2:])
    assert (tmp_path / "out-2" / script.LORA_FILE).exists()


# ----------------------------------------------------------------------------------------------------------------------
# Two writers, the disk
# ----------------------------------------------------------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_while_the_first_one_lives(flags, tmp_path):
    more = ["--max_train_steps", 100_000, "--output_dir", tmp_path / "out"]
    first = start("train_rankdpo_sdxl.py", *flags, *more)
    wait_for(lambda: (tmp_path / "out" / "run.json").exists(), first)
    second = run("train_rankdpo_sdxl.py", *flags, "--beta_dpo", 7, *more, check=False)
    expected = f"--output_dir {tmp_path / 'out'} is in use by process {first.pid} on "
    assert second.returncode == 1 and expected in second.stderr.splitlines()[-1]
    first.kill()
    first.wait()
    assert (tmp_path / "out" / ".lock").exists()
    with script.locked(tmp_path / "out", "--output_dir"):  # the lock of a dead process does not hold
        pass
    assert not (tmp_path / "out" / ".lock").exists()


def test_tasks_share_a_folder_but_not_with_themselves_or_a_whole_run(tmp_path):
    def hold(task, ready):
        with script.locked(tmp_path / "out", "--output_dir", task=task):
            ready.set()
            time.sleep(600)

    def held(task):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=hold, args=(task, ready := context.Event()), daemon=True)
        process.start()
        assert ready.wait(60)
        return process

    def refused_to(task):
        with pytest.raises(SystemExit, match="is in use by process"), script.locked(tmp_path / "out", "--f", task=task):
            pass

    task = held("-0-of-3")
    with script.locked(tmp_path / "out", "--output_dir", task="-1-of-3"):
        pass
    for other in ("", "-0-of-3", "-1-of-4"):
        refused_to(other)
    task.kill()
    task.join()
    whole = held("")  # the lock of a dead task does not hold, and goes
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    refused_to("-1-of-3")
    whole.kill()
    whole.join()
    with script.locked(tmp_path / "out", "--output_dir", task="-1-of-3"):
        pass


def test_of_two_tasks_with_other_settings_that_start_at_once_one_is_refused(tmp_path):
    """The check of both came before either had written."""
    build_synpic.write_settings(tmp_path, {"seed": 0})
    build_synpic.write_settings(tmp_path, {"seed": 0})
    (tmp_path / "late").mkdir()
    with build_synpic.replacing(tmp_path / "late" / "settings.json", keep=True) as temporary:
        temporary.write_text("second")
        (tmp_path / "late" / "settings.json").write_text("first")
    assert (tmp_path / "late" / "settings.json").read_text() == "first"
    assert [file.name for file in (tmp_path / "late").iterdir()] == ["settings.json"]


def test_a_refused_run_leaves_no_folder(flags, tmp_path, monkeypatch):
    words = [*flags, "--dataset_name", "no/set", "--output_dir", tmp_path / "a" / "b"]
    monkeypatch.setattr(sys, "argv", ["train_rankdpo_sdxl.py", *map(str, words)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit, match="no/set"):
        script.run_script(script.main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not (tmp_path / "a").exists()


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_write_that_fails_ends_in_one_line(flags, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the same places."""
    more = ["--max_train_steps", 2, "--output_dir", tmp_path / "out"]
    command = ["train_rankdpo_sdxl.py", *flags, "--cache_dir", tmp_path / "cache", *more]
    result = run("-c", LIMITED, 30_000, *command, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search(r"cannot be read or written: File too large \(.*: [\d.e+]+ GB free\)", last), last
    assert not list(tmp_path.rglob(".*.tmp*"))
    call("train_rankdpo_sdxl", *command[1:], *LATEST)


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    """A file that cannot be read while another one is written."""
    with pytest.raises(OSError) as raised, script.replacing(tmp_path / "out.json"):
        (tmp_path / "no" / "source.png").read_bytes()
    assert raised.value.filename.endswith("source.png") and not list(tmp_path.iterdir())


def test_parquet_json_and_pictures_notice_every_flipped_bit(tmp_path):
    """Each reader gives what was written, or says that it cannot."""
    rng = np.random.default_rng(0)
    table = build_synpic.pa.table(
        {"id": ["a", "b", "c"], "image": [rng.bytes(40) for _ in range(3)], "score": [0.5, 1, 2]}
    )
    build_synpic.write_table(table, tmp_path / "t.parquet", {"prompts": "x"}, row_group_size=2)
    build_synpic.write_json(tmp_path / "r.json", {"step": 3, "files": {"a": "b"}})
    picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    build_synpic.save_picture(picture, tmp_path / "p.png")

    def parquet(file):
        return build_synpic.read_table(file).to_pylist(), build_synpic.shard_facts(file)

    def png(file):
        if not build_synpic.is_whole_png(file):
            raise build_synpic.Damaged(file)
        return Image.open(file).tobytes()

    for name, read in {"t.parquet": parquet, "r.json": build_synpic.read_json, "p.png": png}.items():
        file, noticed = tmp_path / name, 0
        right, content = read(file), file.read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            file.write_bytes(changed)
            try:
                assert read(file) == right, (name, position)
            except build_synpic.Damaged:
                noticed += 1
        assert noticed > len(content) / 3


# ----------------------------------------------------------------------------------------------------------------------
# Inputs
# ----------------------------------------------------------------------------------------------------------------------


def test_half_a_dataset_is_refused(flags, tmp_path):
    data = write_dataset(tmp_path / "data", ranked_rows(n=8))
    (file,) = data.rglob("*.parquet")
    parts = [file.with_name(f"train-{number:05d}-of-00003.parquet") for number in range(3)]
    for part in parts[:2]:
        shutil.copy(file, part)
    file.unlink()
    command = [*flags, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    assert "2 of the 3 files train-*-of-00003.parquet" in refused("train_rankdpo_sdxl", *command)
    shutil.copy(parts[0], parts[2])
    (data / "UNFINISHED").write_text("")
    assert "is unfinished" in refused("train_rankdpo_sdxl", *command)


def test_a_dataset_without_any_order_is_refused(flags, tmp_path, capsys):
    rows = ranked_rows(n=6)
    for row in rows[1:]:
        row.update(preference_probability=[0.5] * 4, rank=[1, 2, 3, 4])
    command = [*flags, "--max_train_steps", 1, "--dataset_name"]
    call("train_rankdpo_sdxl", *command, write_dataset(tmp_path / "some", rows), "--output_dir", tmp_path / "out")
    assert "5 prompts have none" in capsys.readouterr().out
    rows[0].update(preference_probability=[0.5] * 4, rank=[1, 2, 3, 4])
    none = write_dataset(tmp_path / "none", rows)
    message = refused("train_rankdpo_sdxl", *command, none, "--output_dir", tmp_path / "none-out")
    assert "the images of all 6 prompts are equally preferred" in message


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


def test_pictures_of_16_bits_floats_and_transparent_ones():
    plain = np.asarray(script.to_rgb(picture("L"))).astype(int)
    assert np.abs(np.asarray(script.to_rgb(picture("I;16"))).astype(int) - plain).max() <= 1
    buffer = BytesIO()
    picture("I;16").save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    pixels, _ = script.resize_and_crop(stored, 40)
    assert np.abs(pixels.numpy().transpose(1, 2, 0).astype(int) - plain).max() <= 1
    seen = np.asarray(script.to_rgb(picture("RGBA")))
    assert (seen[:10] == 255).all() and (seen[30:] == plain[30:]).all()
    for module in (script, build_synpic):
        with pytest.raises(ValueError, match="not of 8 or 16 bits"):
            module.to_rgb(picture("F"))
    with pytest.raises(build_synpic.BadImage, match="not of 8 or 16 bits"):
        build_synpic.decode_image(picture("F"))


def test_a_picture_of_floats_is_named(flags, tmp_path):
    buffer = BytesIO()
    picture("F").save(buffer, "TIFF")
    rows = ranked_rows(n=6)
    rows[2]["images"][1] = {"bytes": buffer.getvalue(), "path": None}
    data = write_dataset(tmp_path / "data", rows)
    message = refused("train_rankdpo_sdxl", *flags, "--dataset_name", data, "--output_dir", tmp_path / "out")
    assert "row 2" in message and "image 1" in message and "not of 8 or 16 bits" in message


WRONG_FLAGS = {
    "tracker": (["--report_to", "foo"], "choose tensorboard"),
    "weight decay": (["--adam_weight_decay", "nan"], "finite"),
    "learning rate": (["--learning_rate", "inf"], "finite"),
    "resolution": (["--resolution", 100_000], "at most 8192"),
    "long name": (["--output_dir", "x" * 250], "100 bytes"),
    "pattern": (["--output_dir", "a|b*[c]?"], "* ? ["),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_flags_that_can_be_known_wrong(flags, tmp_path, name):
    wrong, word = WRONG_FLAGS[name]
    if "--output_dir" in wrong:
        with pytest.raises(SystemExit, match=re.escape(word)):
            script.check_folder_name(Path(wrong[1]))
        return
    assert word in refused("train_rankdpo_sdxl", *flags, "--output_dir", tmp_path / "out", *wrong)


@pytest.mark.parametrize("text", [b"---\nlicense: [\n---\n", "---\nlicense: caf\u00e9\n---\n".encode("latin-1")])
def test_a_card_that_cannot_be_kept_is_found_at_the_start(flags, finished, tmp_path, text):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (folder / "README.md").write_bytes(text)
    more = ["--output_dir", folder, "--max_train_steps", 6, *LATEST]
    assert "README.md is no card" in refused("train_rankdpo_sdxl", *flags, *more)


def test_any_prompt_can_stand_on_a_card(flags, tmp_path):
    prompts = ["a|b\r\nc", f"red {script.CARD_END} square", "`x` <!-- y"]
    more = ["--max_train_steps", 1, "--output_dir", tmp_path / "out", "--validation_prompts", *prompts]
    call("train_rankdpo_sdxl", *flags, *more)
    card = (tmp_path / "out" / "README.md").read_text()
    body = script.RepoCard(card)
    assert body.text.count(script.CARD_END) == 1 and "\r" not in card and "a\\|b c" in card
    assert [widget["text"] for widget in body.data.widget] == prompts
    again = script.merge_cards(script.RepoCard(card), script.RepoCard(card + "\nMine.\n"))
    assert str(again).count("## Use it") == 1 and "Mine." in str(again)


@pytest.mark.parametrize("name", ["build_synpic", "train_rankdpo_sdxl", "train_dpo_qsd", "evaluate", "score_pairs"])
def test_help_shows_the_description_and_groups(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        module.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert module.__doc__.strip().splitlines()[0] in text
    assert len(re.findall(r"^[A-Z][\w, ]+:$", text, re.M)) >= 3


def test_text_in_has_label_is_refused(tmp_path):
    rows = [{**row, "has_label": "false"} for row in pair_rows()]
    data = write_pairs(tmp_path / "pairs", rows, has_label=Value("string"))
    message = refused(
        "score_pairs", "--dataset_name", data, "--reward", "shapes/world.py:preference", "--output_dir", tmp_path / "o"
    )
    assert "has_label" in message and "true or false" in message


def test_a_lora_of_nan_or_of_another_shape_is_refused(finished, tiny_sdxl, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    monkeypatch.setattr(
        evaluate.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded")
    )
    weights = load_file(finished / script.LORA_FILE)
    key = next(key for key in weights if "lora_A" in key)
    wrong = {"nan": weights[key] * float("nan"), "shape": torch.zeros(4, weights[key].shape[1] + 1)}
    for name, word in {"nan": "not finite", "shape": "does not fit"}.items():
        (tmp_path / name).mkdir()
        save_file({**weights, key: wrong[name]}, tmp_path / name / script.LORA_FILE)
        command = ["--pretrained_model_name_or_path", tiny_sdxl, "--prompts", tmp_path / "prompts.txt"]
        command += ["--loras", f"x={tmp_path / name}", "--output_dir", tmp_path / "out"]
        assert word in refused("evaluate", *command)


def test_evaluate_refuses_a_folder_that_is_not_its_own(ranked_dataset, tiny_sdxl, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    command = ["--pretrained_model_name_or_path", tiny_sdxl, "--prompts", tmp_path / "prompts.txt", "--output_dir"]
    assert "holds other files" in refused("evaluate", *command, ranked_dataset)
    message = refused("evaluate", *command, tmp_path / "out", "--loras", "x=/no/such/folder")
    assert "there is no folder /no/such/folder" in message


def test_output_of_the_builders_is_checked_again(tmp_path):
    """Half a Parquet file among whole ones."""
    data = write_dataset(tmp_path / "data", ranked_rows(n=4))
    (file,) = data.rglob("*.parquet")
    table = pq.read_table(file)
    build_synpic.write_table(table, file, {})
    build_synpic.check_dataset_folder("--dataset_name", str(data))
    flip(file, 0.3)
    with pytest.raises(SystemExit, match="is damaged"):
        build_synpic.check_dataset_folder("--dataset_name", str(data))
