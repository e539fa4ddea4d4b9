# SPDX-License-Identifier: Apache-2.0
"""HPSv3 against the official inferencer, with tiny random weights (tests/golden/make_hpsv3.py)."""

import io
import json
import tarfile

import hpsv3
import make_hpsv3 as golden_script
import numpy as np
import pytest
import torch
from conftest import ROOT
from double import in_float64
from make_qalign import weight
from safetensors.torch import save_file
from transformers import Qwen2VLConfig

from build_synpic import load_reward_model


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/hpsv3.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(golden):
    """The official names with the golden script's weights."""
    return {key: torch.from_numpy(weight(key, shape)) for key, shape in json.loads(str(golden["keys"])).items()}


@pytest.fixture
def settings(golden, weights, tmp_path):
    """The files of the two repositories, with tiny contents."""
    with tarfile.open(fileobj=io.BytesIO(golden["base"].tobytes())) as archive:
        archive.extractall(tmp_path / "base", filter="data")
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model/HPSv3.safetensors")
    return {"model": str(tmp_path / "model"), "base": str(tmp_path / "base")}


def test_equals_the_official_inferencer(golden, settings):
    """Tokens, pixels, mu and sigma of pictures of several sizes and of prompts with braces, accents and nothing."""
    metric = hpsv3.HPSv3(torch.device("cpu"), batch_size=2, **settings)
    pictures, prompts = golden_script.pictures(), golden_script.PROMPTS
    in_float32 = metric.score(pictures, prompts)
    in_float64(metric.model)
    seen = []
    metric.model.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    scores = metric.score(pictures, prompts)
    pixels, grids, before, after, heads = zip(*seen)
    np.testing.assert_array_equal(np.concatenate(pixels)[::37, ::41], golden["pixels"])
    for official, grid, start, end in zip(golden["tokens"], grids, before, after):
        count = grid.prod() // 4  # of the picture's tokens
        text = [*start[0], *official[start.shape[1] :][:count], *end[0]]
        assert [*map(int, text)] == official[: len(text)].tolist()
    np.testing.assert_allclose(np.stack(heads), golden["scores"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(scores, golden["scores"][:, 0], rtol=1e-9, atol=1e-9)
    assert in_float32 == pytest.approx(scores, abs=1e-5)


def test_loads_by_name_as_metric_and_reward(golden, settings):
    """Scores do not depend on the batch, and other modes are RGB's. On a GPU, all but the head is in bfloat16."""
    hpsv3.HPSv3.prepare([], settings)
    reward = load_reward_model("metrics/hpsv3.py:HPSv3,model={model},base={base}".format(**settings))
    pictures, prompts = golden_script.pictures(), golden_script.PROMPTS
    assert [*reward.score(pictures, prompts)] == pytest.approx(golden["scores"][:, 0].tolist(), abs=1e-5)
    metric = reward.made
    grey = pictures[0].convert("L")
    assert metric.score([grey], ["x"]) == metric.score([grey.convert("RGB")], ["x"])
    metric.model.visual.bfloat16()
    metric.model.model.bfloat16()  # a dtype that is forgotten somewhere would be an error
    assert metric.score(pictures, prompts) == pytest.approx(golden["scores"][:, 0].tolist(), abs=2e-2)


def test_full_size_has_the_official_keys(golden):
    official = json.loads(str(golden["full_keys"]))
    assert official.pop("lm_head.weight") == official["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = hpsv3.RewardModel(Qwen2VLConfig(**golden_script.FULL))
    assert {key: [*value.shape] for key, value in model.state_dict().items()} == official


@pytest.mark.parametrize(
    "message, change",
    {
        "Missing.*rm_head.5.bias": {"rm_head.5.bias": None},
        "Unexpected.*extra": {"extra": torch.ones(2)},
        "size mismatch for model.embed_tokens.weight": {"model.embed_tokens.weight": torch.ones(400, 64)},
    }.items(),
)
def test_refuses_weights_that_do_not_fit(weights, settings, tmp_path, message, change):
    changed = {key: value for key, value in (weights | change).items() if value is not None}
    save_file(changed, tmp_path / "model/HPSv3.safetensors")
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        hpsv3.HPSv3(torch.device("cpu"), batch_size=1, **settings)
