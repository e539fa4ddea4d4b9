# SPDX-License-Identifier: Apache-2.0
"""Uploads to a Hub that answers badly: the client asks again, and the same command sends what is missing."""

import json
import os
from pathlib import Path

import hub
from test_hub import OTHER_CARD, client, start, write_build, write_evaluate, write_train


# Runs a script's main again and again, the Hub behaving otherwise each time; a line in, a line of JSON out.
DRIVER = """
import gc, importlib, io, json, sys, traceback
from contextlib import redirect_stderr, redirect_stdout
from accelerate.state import AcceleratorState
asked, script, *flags = sys.argv[1:]
module = importlib.import_module(script)
for line in open(asked):
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()  # the lock of a run that failed goes with its traceback
    text, code = io.StringIO(), 0
    with redirect_stdout(text), redirect_stderr(text):
        try:
            module.main(module.parse_arguments(flags))
        except SystemExit as stopped:
            code = str(stopped.code)
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([code, text.getvalue()]))
"""


class Driver:
    def __init__(self, server, home: Path, script: str, *flags):
        asked, (answers, end) = home / f"asked-{script}", os.pipe()
        os.mkfifo(asked)
        self.asked = os.fdopen(os.open(asked, os.O_RDWR), "w", 1)
        self.process = start(server, home, "-c", DRIVER, asked, script.removesuffix(".py"), *flags, stdout=end)
        os.close(end)
        self.answers = os.fdopen(answers)

    def __call__(self) -> str | int:
        """0, or what the script ended with: a line or a traceback."""
        self.asked.write("again\n")
        code, printed = json.loads(self.answers.readline())
        assert hub.TOKEN not in f"{code}{printed}"
        return code

    def close(self) -> None:
        self.process.kill()


def check_faults(server, run: Driver, before: dict, faults, wanted: tuple[str, str]) -> None:
    """Each fault at every second request: complete at once, or nothing is seen and the same command completes it."""
    kind, repo_id = wanted

    def reset(fault, number) -> None:
        server.clear()
        for (other, name), files in before.items():
            server.commit(other, name, files)
        server.inject(fault, number)

    reset(None, 1)
    assert run() == 0
    requests, complete = server.requests, server.files(kind, repo_id)
    for fault in faults:
        for number in range(1, requests + 1, 2):
            reset(fault, number)
            if run() != 0:
                repo = server.repos.get(wanted)
                assert repo is None or server.files(*wanted) in ({}, before.get(wanted)), (fault, number)
                server.inject(None)
                assert run() == 0, (fault, number)
            assert server.files(*wanted) == complete, (fault, number)
            # The client cannot know that a file has come whose answer was lost: that one may be sent again.
            again = len(server.uploaded) - len(set(server.uploaded))
            assert again <= (fault == "lost"), (fault, number)


def test_dataset_upload_under_faults(server, tiny_sdxl, tmp_path):
    build = write_build(tmp_path, tiny_sdxl)
    client(server, tmp_path / "home", *build)
    wanted, before = ("datasets", "user/synpic"), {"README.md": OTHER_CARD.encode()}
    run = Driver(server, tmp_path / "home", *build, "--stages", "publish")
    check_faults(server, run, {wanted: before}, ("409", "412", "429", "502", "drop", "lost", "always-503"), wanted)
    run.close()
    for name, content in server.files(*wanted).items():
        assert content == (tmp_path / "synpic" / name).read_bytes(), name


def test_results_upload_under_faults(server, tiny_sdxl, ranked_dataset, tmp_path):
    """Into the card of a LoRA that is on the Hub already."""
    client(server, tmp_path / "home", *write_train(tmp_path, tiny_sdxl, ranked_dataset))
    wanted = ("models", "user/lora")
    more = ["--loras", f"mine={tmp_path / 'lora'}", "--hub_model_id", "user/lora"]
    evaluate = write_evaluate(tmp_path, tiny_sdxl, *more)
    before = server.files(*wanted)
    run = Driver(server, tmp_path / "home", *evaluate)
    check_faults(server, run, {wanted: before}, ("412", "always-503"), wanted)
    run.close()
