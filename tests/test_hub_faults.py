# SPDX-License-Identifier: Apache-2.0
"""The builders' and evaluate.py's uploads to a Hub that answers badly: each fault at each request in turn, with the
real client. A trainer leaves this to that client."""

import json
import subprocess
from pathlib import Path

import hub
from conftest import pair_rows, write_pairs
from test_hub import OTHER_CARD, client, start, write_build, write_train


FAULTS = ("409", "412", "429", "502", "503", "drop", "lost", "slow")


# Runs a script's main again and again, the Hub behaving otherwise each time; one line in, one line of JSON out.
DRIVER = """
import importlib, io, json, sys, traceback
from contextlib import redirect_stderr, redirect_stdout
from accelerate.state import AcceleratorState
module = importlib.import_module(sys.argv[1])
module.HUB_TIMEOUT = 1
for line in sys.stdin:
    AcceleratorState._reset_state(reset_partial_state=True)
    text, code = io.StringIO(), 0
    with redirect_stdout(text), redirect_stderr(text):
        try:
            module.main(module.parse_arguments(json.loads(line)))
        except SystemExit as stopped:
            code = str(stopped.code)
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([code, text.getvalue()]), flush=True)
"""


class Driver:
    def __init__(self, server, home: Path, script: str, flags: list):
        self.flags = json.dumps([str(flag) for flag in flags]) + "\n"
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = start(server, home, "-c", DRIVER, script, **options)

    def __call__(self) -> str | int:
        """0, or the line that the script ended with."""
        self.process.stdin.write(self.flags)
        self.process.stdin.flush()
        code, printed = json.loads(self.process.stdout.readline())
        assert hub.TOKEN not in f"{code}{printed}"
        assert code == 0 or "\n" not in code.strip(), code
        return code

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check_faults(server, run: Driver, before: dict, faults, wanted: tuple[str, str], local: Path) -> None:
    """Each fault at each request in turn: complete. No answer any more from every third request on: one line and all
    kept here, and there nothing, or the whole."""
    kind, repo_id = wanted

    def reset(fault, number) -> None:
        server.clear()
        for (other, name), files in before.items():
            server.commit(other, name, files)
        server.inject(fault, number)

    reset(None, 1)
    assert run() == 0
    requests, complete = server.requests, server.files(kind, repo_id)
    kept = {path: path.read_bytes() for path in local.rglob("*") if path.is_file()}
    for fault in faults:
        for number in range(1, requests + 1):
            reset(fault, number)
            code = run()
            assert code == 0 and server.files(kind, repo_id) == complete, (fault, number, code)
            again = len(server.uploaded) - len(set(server.uploaded))
            # The client cannot know that a file has come whose answer was lost: that one may be sent again.
            assert again <= (fault in ("lost", "slow")), (fault, number)
    for number in range(1, requests + 1, 3):
        reset("always-503", number)
        code = run()
        failed = server.repos.get((kind, repo_id))
        if code == 0:
            assert server.files(kind, repo_id) == complete, number
        else:
            assert repo_id in code and ("503" in code or "on the Hub" in code), code
            assert failed is None or server.files(kind, repo_id) == before.get(wanted, {}), number
        assert {path: path.read_bytes() for path in kept} == kept
    reset(None, 1)
    assert run() == 0 and server.files(kind, repo_id) == complete


def test_dataset_upload_under_every_fault(server, tiny_sdxl, tmp_path):
    build = write_build(tmp_path, tiny_sdxl)
    client(server, tmp_path / "home", *build)
    wanted, before = ("datasets", "user/synpic"), {"README.md": OTHER_CARD.encode()}
    # The commit alone, into a repository that exists; then with the upload beside the ranking, into a new one.
    run = Driver(server, tmp_path / "home", "build_synpic", [*build[1:], "--stages", "publish"])
    check_faults(server, run, {wanted: before}, FAULTS, wanted, tmp_path / "synpic")
    run.close()
    run = Driver(server, tmp_path / "home", "build_synpic", [*build[1:], "--stages", "rank", "publish"])
    check_faults(server, run, {}, ("409", "lost"), wanted, tmp_path / "synpic")
    run.close()


def test_dataset_upload_by_xet_under_faults(server, tiny_sdxl, tmp_path):
    """As users have it: huggingface_hub brings hf_xet."""
    build = write_build(tmp_path, tiny_sdxl)
    client(server, tmp_path / "home", *build)
    server.xet = tmp_path / "xet"
    server.xet.mkdir()
    run = Driver(server, tmp_path / "home", "build_synpic", [*build[1:], "--stages", "rank", "publish"])
    wanted = ("datasets", "user/synpic")
    check_faults(server, run, {}, ("412", "503", "lost"), wanted, tmp_path / "synpic")
    run.close()
    assert not server.uploaded and not any("lfs" in path for _, path in server.log)
    for name, content in server.files(*wanted).items():
        assert content == (tmp_path / "synpic" / name).read_bytes(), name


def test_sorted_pairs_upload_under_faults(server, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", pair_rows(8))
    score = ["score_pairs.py", "--dataset_name", pairs, "--reward", "shapes/world.py:clean_reward", "--include_images"]
    score += ["--output_dir", tmp_path / "qsd", "--push_to_hub", "--hub_dataset_id", "user/qsd"]
    client(server, tmp_path / "home", *score)
    run = Driver(server, tmp_path / "home", "score_pairs", score[1:])
    check_faults(server, run, {}, ("409", "drop"), ("datasets", "user/qsd"), tmp_path / "qsd")
    run.close()


def test_results_upload_under_faults(server, tiny_sdxl, ranked_dataset, tmp_path):
    """Into the card of a LoRA that is on the Hub already."""
    client(server, tmp_path / "home", *write_train(tmp_path, tiny_sdxl, ranked_dataset))
    wanted = ("models", "user/lora")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    evaluate = ["evaluate.py", "--pretrained_model_name_or_path", tiny_sdxl, "--loras", f"mine={tmp_path / 'lora'}"]
    evaluate += ["--prompts", tmp_path / "prompts.txt", "--num_inference_steps", 1, "--resolution", 32]
    evaluate += ["--metrics", "shapes/world.py:clean_reward", "--output_dir", tmp_path / "evaluation"]
    evaluate += ["--push_to_hub", "--hub_model_id", "user/lora"]
    before = server.files(*wanted)
    run = Driver(server, tmp_path / "home", "evaluate", evaluate[1:])
    check_faults(server, run, {wanted: before}, ("412", "lost"), wanted, tmp_path / "evaluation")
    run.close()
