# SPDX-License-Identifier: Apache-2.0
"""Uploads to a Hub that answers badly: the client asks again, and the same command sends what is missing."""

import time

import pytest
from conftest import call
from test_hub import OTHER_CARD, write_build, write_evaluate, write_train


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """As in the other tests, the client's pauses are a thousand times shorter."""
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 1000))


def run(command: list) -> None:
    call(command[0].removesuffix(".py"), *command[1:])


def fails(command: list) -> bool:
    try:
        run(command)
    except (Exception, SystemExit):
        return True
    return False


def check_faults(server, command: list, before: dict, faults: tuple, wanted: tuple[str, str]) -> None:
    """Each fault at every second request: complete at once, or nothing is seen and the same command completes it."""

    def reset(fault, number) -> None:
        server.clear()
        for (kind, repo_id), files in before.items():
            server.commit(kind, repo_id, files)
        server.inject(fault, number)

    reset(None, 1)
    run(command)
    requests, complete = server.requests, server.files(*wanted)
    for fault, number in ((fault, number) for fault in faults for number in range(1, requests + 1, 2)):
        reset(fault, number)
        if fails(command):
            assert wanted not in server.repos or server.files(*wanted) in ({}, before.get(wanted)), (fault, number)
            server.inject(None)
            run(command)
        assert server.files(*wanted) == complete, (fault, number)
        # The client cannot know that a file has come whose answer was lost: that one may be sent again.
        again = len(server.uploaded) - len(set(server.uploaded))
        assert again <= (fault == "lost"), (fault, number)


def test_dataset_upload_under_faults(online, tiny_sdxl, tmp_path):
    build, wanted = write_build(tmp_path, tiny_sdxl), ("datasets", "user/synpic")
    run(build)
    faults = ("409", "412", "429", "502", "drop", "lost", "always-503")
    before = {wanted: {"README.md": OTHER_CARD.encode()}}
    check_faults(online, [*build, "--stages", "publish"], before, faults, wanted)
    for name, content in online.files(*wanted).items():
        assert content == (tmp_path / "synpic" / name).read_bytes(), name


def test_results_upload_under_faults(online, tiny_sdxl, ranked_dataset, tmp_path):
    """Into the card of a LoRA that is on the Hub already."""
    run(write_train(tmp_path, tiny_sdxl, ranked_dataset))
    more, wanted = ["--loras", f"mine={tmp_path / 'lora'}", "--hub_model_id", "user/lora"], ("models", "user/lora")
    evaluate = write_evaluate(tmp_path, tiny_sdxl, *more)
    check_faults(online, evaluate, {wanted: online.files(*wanted)}, ("412", "always-503"), wanted)
