# SPDX-License-Identifier: Apache-2.0
"""Datasets, LoRAs and results on a Hub: real clients in processes of their own against tests/hub.py."""

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import hub
import yaml
from conftest import ROOT, make_tiny_sdxl, pair_rows, write_pairs
from diffusers import StableDiffusionXLPipeline
from forks import Process, zygote
from huggingface_hub import ModelCard, RepoCard
from safetensors.torch import load, save_file
from single_file import single_file

from train_rankdpo_sdxl import CARD_BEGIN, CARD_END, LORA_FILE, merge_cards


PROMPTS = [f"a {color} {shape}" for shape in ("circle", "square") for color in ("red", "green", "blue")]


def start(server, home: Path, *command, token: str = hub.TOKEN, **options) -> Process:
    """A command as a user of this Hub gives it, with a cache of its own; it pauses a thousand times shorter."""
    link = Path(tempfile.gettempdir()) / f"hub-home-{os.getpid()}"  # libraries read where it is when they are imported
    link.unlink(missing_ok=True)
    link.symlink_to(home)
    home.mkdir(exist_ok=True)
    environment = server.environment() | {"HF_HOME": str(link), "PYTHONPATH": str(ROOT / "tests" / "hurried")}
    return Process(zygote(*environment.items()), command, {**os.environ, **environment, "HF_TOKEN": token}, **options)


def client(server, home: Path, *command, check=True, token: str = hub.TOKEN) -> subprocess.CompletedProcess:
    """Runs it to its end. The token is never printed."""
    process = start(server, home, *command, token=token)
    output, errors = process.communicate()
    assert token not in output + errors
    assert not check or process.returncode == 0, errors[-4000:]
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def last_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-4000:]
    return result.stderr.strip().splitlines()[-1]


def write_build(folder: Path, model: Path, rewards=("color_reward", "clean_reward"), prompts=PROMPTS) -> list:
    """The command that builds a dataset of two generators and publishes it."""
    call = {"num_inference_steps": 1, "height": 32, "width": 32}
    entries = [{"name": name, "model": str(model), "call": call} for name in ("one", "two")]
    (folder / "two.yaml").write_text(yaml.safe_dump(entries))
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    build = ["build_synpic.py", "--prompts", folder / "prompts.txt", "--generators", folder / "two.yaml"]
    build += ["--rewards", *(f"shapes/world.py:{reward}" for reward in rewards), "--shard_size", 2]
    return [*build, "--output_dir", folder / "synpic", "--push_to_hub", "--hub_dataset_id", "user/synpic"]


TRAIN = "--resolution 32 --rank 2 --learning_rate 1e-2 --max_train_steps 6 --report_to none --loss_type sft".split()
TRAIN += "--validation_num_inference_steps 1".split()


def write_train(folder: Path, model: Path, dataset, *more) -> list:
    train = ["train_rankdpo_sdxl.py", "--pretrained_model_name_or_path", model, "--dataset_name", dataset, *TRAIN]
    train += ["--cache_dir", folder / "cache", "--output_dir", folder / "lora"]
    return [*train, "--push_to_hub", "--hub_model_id", "user/lora", *more]


def write_evaluate(folder: Path, model, *more) -> list:
    (folder / "prompts.txt").write_text("a red circle\n")
    evaluate = ["evaluate.py", "--pretrained_model_name_or_path", model, "--prompts", folder / "prompts.txt"]
    evaluate += ["--num_inference_steps", 1, "--resolution", 32, "--metrics", "shapes/world.py:clean_reward"]
    return [*evaluate, "--output_dir", folder / "evaluation", "--push_to_hub", *more]


LOAD = """
import sys
from datasets import load_dataset
for streaming in (False, True):
    rows = list(load_dataset("user/synpic", split="train", streaming=streaming))
    assert sorted(row["prompt"] for row in rows) == sorted(sys.argv[1:]), rows
    assert all(len(row["images"]) == 2 and row["images"][0].size == (32, 32) for row in rows)
    scores = list(load_dataset("user/synpic", "scores", split="train", streaming=streaming))
    assert [{**row, "images": None} for row in rows] == [{**row, "images": None} for row in scores]
"""
DRAW = """
import sys
import torch
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipeline.load_lora_weights("user/lora", weight_name="pytorch_lora_weights.safetensors")
loaded = [tensor for name, tensor in pipeline.unet.named_parameters() if "lora_B" in name]
print(sum(tensor.abs().sum().item() > 0 for tensor in loaded))
"""


def test_from_a_prompt_list_to_a_lora_that_loads_from_the_hub(server, tiny_sdxl, tmp_path):
    """Killed in the middle of the upload, and again; load_dataset, streaming too; train; load_lora_weights."""
    build = write_build(tmp_path, tiny_sdxl)
    server.stall_after = 2
    process = start(server, tmp_path / "home", *build)
    while process.poll() is None and not server.stalled.is_set():
        time.sleep(0.05)
    # The first files were sent while the others were made, and nobody sees a part of the dataset.
    assert server.files("datasets", "user/synpic") == {}
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(server.uploaded) == 2
    server.stall_after = None
    client(server, tmp_path / "home", *build)
    files = server.files("datasets", "user/synpic")
    assert len(server.uploaded) == len(set(server.uploaded)) == sum(hub.is_lfs(name) for name in files)
    names = {f"data/train-0000{i}-of-00003.parquet" for i in range(3)} | {"README.md", "grid.png"}
    assert files.keys() == names | {"scores/train-00000-of-00001.parquet"}
    commits = len(server.repos["datasets", "user/synpic"].commits)
    client(server, tmp_path / "home", *build)  # nothing is sent twice, and no empty commit is made
    assert len(server.uploaded) == len(set(server.uploaded))
    assert len(server.repos["datasets", "user/synpic"].commits) == commits
    client(server, tmp_path / "other-home", "-c", LOAD, *PROMPTS)

    train = write_train(tmp_path, tiny_sdxl, "user/synpic", "--checkpointing_steps", 2, "--hub_strategy", "checkpoint")
    printed = client(server, tmp_path / "other-home", *train).stdout
    assert f"published: {server.url}/user/lora" in printed
    files = server.files("models", "user/lora")
    wanted = {"README.md", "comfyui/lora.safetensors", "images/0.png", "pytorch_lora_weights.safetensors", "run.json"}
    assert wanted | {"training_log.jsonl"} <= files.keys() and not any("checkpoint" in name for name in files)
    for name, content in files.items():
        assert content == (tmp_path / "lora" / name).read_bytes(), name
    assert [json.loads(line)["step"] for line in files["training_log.jsonl"].splitlines()] == [1, 2, 3, 4, 5, 6]
    card = files["README.md"].decode()
    commit = server.repos["datasets", "user/synpic"].head[0]
    assert "datasets:\n- user/synpic" in card and f"commit {commit}" in card
    assert 'load_lora_weights("user/lora", weight_name="pytorch_lora_weights.safetensors")' in card
    # A checkpoint's LoRA came before, and was another.
    earlier = [files for _, files in server.repos["models", "user/lora"].commits[:-1]]
    earlier = [files[LORA_FILE] for files in earlier if files]
    assert earlier and files[LORA_FILE] not in earlier
    drawn = client(server, tmp_path / "third-home", "-c", DRAW, tiny_sdxl)
    assert int(drawn.stdout.split()[-1]) == sum(key.endswith("lora_B.weight") for key in load(files[LORA_FILE]))


def test_a_token_that_may_not_write_fails_before_any_work(server, tiny_sdxl, ranked_dataset, tmp_path):
    train = write_train(tmp_path, tiny_sdxl, ranked_dataset)
    assert "401" in client(server, tmp_path / "home", *train, check=False, token="hf_wrong").stderr
    server.commit("models", "user/lora", {})
    server.read_only.add("user/lora")
    assert "403" in client(server, tmp_path / "home", *train, check=False).stderr
    assert not (tmp_path / "lora").exists() and not (tmp_path / "cache" / "index").exists()

    build = write_build(tmp_path, tiny_sdxl)
    line = last_line(client(server, tmp_path / "home", *build, check=False, token="hf_wrong"))
    assert line.startswith("--push_to_hub: the dataset repository user/synpic cannot be written to"), line
    server.commit("datasets", "user/synpic", {"data/train-00000-of-00002.parquet": b"somebody's"})
    line = last_line(client(server, tmp_path / "home", *build, check=False))
    assert line.startswith("--hub_dataset_id user/synpic holds other data (data/train-00000-of-00002.parquet)"), line
    assert not (tmp_path / "synpic").exists()

    evaluate = write_evaluate(tmp_path, tiny_sdxl)
    line = last_line(client(server, tmp_path / "home", *evaluate, check=False))
    assert line == "--push_to_hub: no LoRA in --loras is a Hub id: name one with --loras and --hub_model_id"
    assert not (tmp_path / "evaluation").exists()


OTHER_CARD = """---
license: cc-by-4.0
---
What people wrote before.
"""
COUNT = "from datasets import load_dataset; print(len(load_dataset('user/synpic', split='train')))"


def test_what_people_write_on_a_card_stays_and_a_grown_dataset_replaces_the_old_one(server, tiny_sdxl, tmp_path):
    server.commit("datasets", "user/synpic", {"README.md": OTHER_CARD.encode(), "notes.txt": b"mine"})
    client(server, tmp_path / "home", *write_build(tmp_path, tiny_sdxl))
    # One cache for both versions: it must not serve the old rows.
    assert client(server, tmp_path / "a", "-c", COUNT).stdout.strip() == "6"
    card = server.files("datasets", "user/synpic")["README.md"].decode()
    assert "cc-by-4.0" in card and "What people wrote before." in card and "## Time and cost" in card

    # Somebody edits the card on the Hub; the dataset grows by two prompts and a reward.
    card = card.replace("license: cc-by-4.0", "license: cc0-1.0\nviewer: true") + "\nWhat people wrote after.\n"
    server.commit("datasets", "user/synpic", {"README.md": card.encode()})
    rewards = ("color_reward", "clean_reward", "shape_reward")
    more = [*PROMPTS, "a red triangle", "a blue triangle"]
    client(server, tmp_path / "home", *write_build(tmp_path, tiny_sdxl, rewards, more))
    assert client(server, tmp_path / "a", "-c", COUNT).stdout.strip() == "8"
    files = server.files("datasets", "user/synpic")
    data = [f"data/train-0000{i}-of-00004.parquet" for i in range(4)]
    assert sorted(name for name in files if name.startswith("data/")) == data and files["notes.txt"] == b"mine"
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc0-1.0" and front["viewer"] is True
    assert [config["config_name"] for config in front["configs"]] == ["default", "scores"]
    assert card.count("What people wrote before.") == card.count("What people wrote after.") == 1
    assert card.count("## Time and cost") == 1 and "shape_reward" in card and "8 prompts" in card
    assert card == (tmp_path / "synpic" / "README.md").read_text()


def test_sorted_pairs_are_published_and_the_next_fraction_replaces_them(server, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", pair_rows())
    score = ["score_pairs.py", "--dataset_name", pairs, "--reward", "shapes/world.py:clean_reward", "--include_images"]
    score += ["--output_dir", tmp_path / "qsd", "--push_to_hub", "--hub_dataset_id", "user/qsd"]
    server.commit("datasets", "user/qsd", {"data/train-00000-of-00001.parquet": b"somebody's"})
    line = last_line(client(server, tmp_path / "home", *score, check=False))
    assert "user/qsd holds other data (data/train-00000-of-00001.parquet)" in line and not (tmp_path / "qsd").exists()
    server.clear()
    for number, fraction in enumerate((1, 0.2)):
        client(server, tmp_path / "home", *score, "--top_fraction", fraction)
        words = client(server, tmp_path / f"home-{number}", "-c", LOAD_PAIRS).stdout.split()
        assert int(words[0]) > 10 if fraction == 1 else int(words[0]) < 6
    names = set(server.files("datasets", "user/qsd"))
    assert {"README.md", "statistics.json", "figures/best.png", "figures/quality.png"} <= names
    assert not any("work" in name for name in names)
    score.remove("--include_images")  # rows in another order do not fit the images of before
    client(server, tmp_path / "home", *score)
    assert not any(name.startswith("data/") for name in server.files("datasets", "user/qsd"))
    server.clear()
    card = tmp_path / "qsd" / "README.md"
    card.write_text(card.read_text() + '\nSee also load_dataset("somebody/else").\n')
    client(server, tmp_path / "home", *score)
    assert 'load_dataset("somebody/else")' in server.files("datasets", "user/qsd")["README.md"].decode()


LOAD_PAIRS = """
from datasets import load_dataset
scores = load_dataset("user/qsd", "scores", split="train")
whole = load_dataset("user/qsd", split="train")
assert scores["quality_rank"] == whole["quality_rank"] == list(range(1, len(whole) + 1))
assert "chosen" not in scores.column_names
print(len(whole), whole[0]["jpg_0"][:4] if isinstance(whole[0]["jpg_0"], bytes) else whole[0]["jpg_0"].size)
"""


def test_an_upload_that_fails_costs_no_weights_and_is_repeated(server, tiny_sdxl, ranked_dataset, tmp_path):
    """The Hub goes away after the training has begun; later the same command uploads the folder, without training."""
    train = write_train(tmp_path, tiny_sdxl, ranked_dataset, "--checkpointing_steps", 2, "--hub_strategy", "checkpoint")
    process = start(server, tmp_path / "home", *train)
    while ("models", "user/lora") not in server.repos or len(server.log) < 3:
        time.sleep(0.001)
    server.inject("always-503")
    output, errors = process.communicate()
    assert process.returncode == 1 and "503" in errors and hub.TOKEN not in output + errors
    assert server.files("models", "user/lora") == {}
    for name in ("pytorch_lora_weights.safetensors", "README.md", "comfyui/lora.safetensors"):
        assert (tmp_path / "lora" / name).exists()
    server.inject(None)
    log = (tmp_path / "lora" / "training_log.jsonl").read_bytes()
    client(server, tmp_path / "home", *train, "--resume_from_checkpoint", "latest")
    files = server.files("models", "user/lora")
    assert {"pytorch_lora_weights.safetensors", "README.md", "comfyui/lora.safetensors"} <= files.keys()
    assert not any("checkpoint" in name or "state" in name for name in files) and files["training_log.jsonl"] == log


def test_a_base_in_one_file_on_the_hub(server, tmp_path):
    folder = make_tiny_sdxl(tmp_path / "sdxl", second=(24, 10))  # by which diffusers knows SDXL
    save_file(single_file(StableDiffusionXLPipeline.from_pretrained(folder)), tmp_path / "one.safetensors")
    server.commit("models", "user/noobai", {"one.safetensors": (tmp_path / "one.safetensors").read_bytes()})
    (tmp_path / "prompts.txt").write_text("a red circle")
    command = ["evaluate.py", "--prompts", tmp_path / "prompts.txt", "--metrics", "shapes/world.py:color_reward"]
    command += ["--resolution", 32, "--num_inference_steps", 1, "--single_file_config", folder]
    drawn = []
    for name, file in (
        ("here", tmp_path / "one.safetensors"),
        ("hub", "https://huggingface.co/user/noobai/resolve/main/one.safetensors"),
    ):
        client(
            server,
            tmp_path / "home",
            *command,
            "--pretrained_model_name_or_path",
            file,
            "--output_dir",
            tmp_path / name,
        )
        drawn.append((tmp_path / name / "images" / "base" / "00000_0.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_merged_card():
    """What becomes of the two sides of a card, key by key and mark by mark."""
    block, old = f"{CARD_BEGIN}\nnew\n{CARD_END}", f"{CARD_BEGIN}\nold\n{CARD_END}"
    front = {"license": "other", "license_name": "sai", "tags": ["a"], "widget": [2]}
    mine = f"---\n{yaml.safe_dump(front)}---\n\n{block}\n"

    def merged(theirs: str) -> tuple[dict, str]:
        card = str(merge_cards(RepoCard(mine), RepoCard(theirs)))
        assert str(merge_cards(RepoCard(mine), RepoCard(card))) == card  # a second merge changes nothing
        return RepoCard(card).data.to_dict(), RepoCard(card).text.strip()

    assert merged("") == merged("---\n\n---\n") == merged(mine) == (front, block)
    theirs = "---\nlicense: mit\nwidget: [1]\nmine: é\nconfigs: [{config_name: b}]\n---\nText.\n"
    metadata, body = merged(theirs)
    kept = {"license": "mit", "mine": "é", "configs": [{"config_name": "b"}]}
    assert metadata == {"tags": ["a"], "widget": [2], **kept} and body == f"Text.\n\n{block}"
    assert list(metadata) == ["license", "widget", "mine", "configs", "tags"]  # in their order
    assert merged("---\nlicense_name: own\n---\n")[0] == {**front, "license_name": "own"}
    # Text around the marks, in other line endings; in a card that came from Windows.
    assert merged(f"---\ntags: []\n---\nA\r\n{old} B")[1] == f"A\r\n{block} B"
    assert merged(f"---\r\ntags: []\r\n---\r\nA\r\n{old} B") == ({**front, "tags": []}, f"A\r\n{block} B")
    # Somebody deleted the end mark, or the first one and all metadata.
    assert merged(f"A {CARD_BEGIN} old B") == (front, f"A {CARD_BEGIN} old B\n\n{block}")
    assert merged(f"only text {CARD_END}") == (front, f"only text {CARD_END}\n\n{block}")
    assert merged(f"{CARD_BEGIN} A {old} B") == (front, f"{CARD_BEGIN} A {block} B")


BASE_CARD = "---\nlicense: openrail++\nlicense_link: LICENSE.md\n---\nThe base model.\n"


def test_results_go_into_the_card_and_stay_there(server, tiny_sdxl, ranked_dataset, tmp_path):
    """Trained from a base model on the Hub, whose licence is carried over; evaluated, edited, evaluated and published
    again."""
    files = [path for path in tiny_sdxl.rglob("*") if path.is_file()]
    base = {path.relative_to(tiny_sdxl).as_posix(): path.read_bytes() for path in files}
    server.commit("models", "user/base", {**base, "README.md": BASE_CARD.encode()})
    train = write_train(tmp_path, "user/base", ranked_dataset)
    client(server, tmp_path / "home", *train)
    card = server.files("models", "user/lora")["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "user/base" and front["license"] == "openrail++"
    assert front["license_link"] == "https://huggingface.co/user/base/blob/main/LICENSE.md"

    evaluate = write_evaluate(tmp_path, "user/base", "--loras", "mine=user/lora")
    client(server, tmp_path / "home", *evaluate)
    files = server.files("models", "user/lora")
    results = json.loads(files["results.json"])
    assert files["grid.png"] == (tmp_path / "evaluation" / "grid.png").read_bytes()
    edited = files["README.md"].decode() + "\nA remark of mine.\n"
    edited = edited.replace("license: openrail++", "license: openrail++\nnew_version: user/next")
    server.commit("models", "user/lora", {"README.md": edited.encode()})

    metrics = [f"shapes/world.py:{name}_reward" for name in ("clean", "color")]
    client(server, tmp_path / "home", *evaluate, "--metrics", *metrics)
    client(server, tmp_path / "home", *train, "--resume_from_checkpoint", "latest")
    card = server.files("models", "user/lora")["README.md"].decode()
    assert card.count("## Evaluation") == card.count("## Use it") == card.count("A remark of mine.") == 1
    front = yaml.safe_load(card.split("---")[1])
    assert front["new_version"] == "user/next" and front["widget"][0]["output"]["url"] == "images/0.png"
    (index,) = front["model-index"]
    (result,) = index["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert index["name"] == "lora" and result["task"]["type"] == "text-to-image"
    assert values["clean_reward"] == results["mine"]["clean_reward"] and "color_reward" in values
    assert ModelCard(card).data.eval_results[0].metric_type == "clean_reward"
