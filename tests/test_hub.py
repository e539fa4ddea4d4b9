# SPDX-License-Identifier: Apache-2.0
"""Datasets and LoRAs on a Hub: real clients in processes of their own against tests/hub.py."""

import os
import subprocess
import sys

import hub
import pytest
import yaml
from conftest import ROOT


def client(server, home, *command, check=True, token=hub.TOKEN):
    """Runs a command as a user of this Hub, with a cache of its own; returns its result. The token is never printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= server.environment() | {"HF_TOKEN": token, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert token not in result.stdout + result.stderr
    if check:
        assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.fixture
def server():
    server = hub.Hub()
    yield server
    server.close()


LOAD = """
import sys
from datasets import load_dataset
for streaming in (False, True):
    rows = list(load_dataset("user/synpic", split="train", streaming=streaming))
    assert sorted(row["prompt"] for row in rows) == sorted(sys.argv[1:]), rows
    assert all(len(row["images"]) == 2 and row["images"][0].size == (32, 32) for row in rows)
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
    """Build and push; load_dataset, streaming too; train from that id and push; load_lora_weights."""
    call = {"num_inference_steps": 1, "height": 32, "width": 32}
    entries = [{"name": name, "model": str(tiny_sdxl), "call": call} for name in ("one", "two")]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(entries))
    prompts = [f"a {color} circle" for color in ("red", "green", "blue", "yellow")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    build = ["build_synpic.py", "--prompts", tmp_path / "prompts.txt", "--generators", tmp_path / "two.yaml"]
    build += ["--rewards", "shapes/world.py:color_reward", "shapes/world.py:clean_reward", "--shard_size", 2]
    build += ["--output_dir", tmp_path / "synpic", "--push_to_hub", "--hub_dataset_id", "user/synpic"]
    client(server, tmp_path / "home", *build)
    assert "README.md" in server.files("datasets", "user/synpic")
    sent = len(server.uploaded)
    client(server, tmp_path / "home", *build)  # nothing is sent twice
    assert len(server.uploaded) == sent
    client(server, tmp_path / "other-home", "-c", LOAD, *prompts)

    train = ["train_rankdpo_sdxl.py", "--pretrained_model_name_or_path", tiny_sdxl, "--dataset_name", "user/synpic"]
    train += (
        "--resolution 32 --rank 2 --learning_rate 1e-2 --max_train_steps 2 --report_to none --loss_type sft".split()
    )
    train += ["--validation_num_inference_steps", 1, "--cache_dir", tmp_path / "cache"]
    train += ["--output_dir", tmp_path / "lora", "--push_to_hub", "--hub_model_id", "user/lora"]
    client(server, tmp_path / "other-home", *train)
    files = server.files("models", "user/lora")
    wanted = {"README.md", "comfyui/lora.safetensors", "images/0.png", "pytorch_lora_weights.safetensors", "run.json"}
    assert wanted <= files.keys() and not any("checkpoint" in name for name in files)
    assert b"datasets:\n- user/synpic" in files["README.md"]
    drawn = client(server, tmp_path / "third-home", "-c", DRAW, tiny_sdxl)
    assert int(drawn.stdout.split()[-1]) == sum(key.endswith("lora_B.weight") for key in lora_keys(files))
    everything = [content for repo in server.repos.values() for _, files in repo.commits for content in files.values()]
    assert not any(hub.TOKEN.encode() in content for content in everything)


def lora_keys(files: dict[str, bytes]) -> list[str]:
    from safetensors.torch import load

    return list(load(files["pytorch_lora_weights.safetensors"]))


def test_a_wrong_token_fails_before_any_work(server, tiny_sdxl, ranked_dataset, tmp_path):
    train = ["train_rankdpo_sdxl.py", "--pretrained_model_name_or_path", tiny_sdxl, "--dataset_name", ranked_dataset]
    train += ["--resolution", 32, "--output_dir", tmp_path / "lora", "--push_to_hub", "--hub_model_id", "user/lora"]
    result = client(server, tmp_path / "home", *train, check=False, token="hf_wrong")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("--push_to_hub: the repository user/lora cannot be had"), last
    assert not (tmp_path / "lora").exists()
