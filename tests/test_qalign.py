# SPDX-License-Identifier: Apache-2.0
"""Q-Align against the official model, tokenizer and scorers, with tiny random weights (tests/golden/make_qalign.py)."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import save_file


sys.path[:0] = [str(ROOT / "metrics"), str(ROOT / "tests/golden")]

import make_qalign as golden_script  # noqa: E402
import qalign  # noqa: E402


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/qalign.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(golden):
    """The official names with the golden script's weights, without the positions that the model computes itself."""
    shapes = json.loads(str(golden["keys"]))
    keys = [key for key in shapes if not key.endswith("pos_embed")]
    return {key: torch.from_numpy(golden_script.weight(key, shapes[key])) for key in keys}


@pytest.fixture(scope="module")
def pictures():
    return [golden_script.picture(90, 62, seed=1), golden_script.picture(40, 70, seed=2)]


@pytest.fixture
def folder(golden, tmp_path):
    """A checkpoint's folder, without weights."""
    config = golden_script.TINY | {"vocab_size": json.loads(str(golden["keys"]))["lm_head.weight"][0]}
    files = {
        "config.json": config,
        "preprocessor_config.json": golden_script.PREPROCESSOR,
        "tokenizer_config.json": golden_script.TOKENIZER,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "tokenizer.model").write_bytes(golden["tokenizer"].tobytes())
    return tmp_path


def save_shards(weights: dict, folder, extension: str):
    """Two shards, as transformers names them."""
    for index in range(2):
        shard = dict(list(weights.items())[index::2])
        if extension == "safetensors":
            save_file(shard, folder / f"model-0000{index + 1}-of-00002.safetensors")
        else:
            torch.save(shard, folder / f"pytorch_model-0000{index + 1}-of-00002.bin")


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_equals_the_official_scorers(golden, weights, folder, pictures, extension):
    save_shards(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder, extension)
    metric = qalign.QAlign(torch.device("cpu"), batch_size=2, model=str(folder))
    mean = metric.image_processor.image_mean
    squares = [qalign.pad_to_square(image, mean) for image in pictures]
    pixels = metric.image_processor(squares, return_tensors="pt").pixel_values
    features = metric.model.vision(pixels)
    np.testing.assert_allclose(features, golden["vision"], atol=1e-5)
    image_tokens = metric.model.abstractor(features)
    np.testing.assert_allclose(image_tokens, golden["abstractor"], atol=1e-5)
    assert metric.levels == golden["levels"].tolist()
    scores = metric.score(pictures, ["", "unused"], [{}, {}])
    for name, (before, after) in metric.prompts.items():
        assert [*before, -200, *after] == golden[f"{name}_tokens"].tolist()
        logits = metric.model(image_tokens, before, after, list(range(golden[f"{name}_logits"].shape[1])))
        np.testing.assert_allclose(logits, golden[f"{name}_logits"], atol=1e-5)
        np.testing.assert_allclose([score[name] for score in scores], golden[name], atol=1e-6)
    assert metric.score(pictures[1:], [""], [{}]) == [pytest.approx(scores[1], abs=1e-6)]
    grey = pictures[0].convert("L")
    assert metric.score([grey], [""], [{}]) == metric.score([grey.convert("RGB")], [""], [{}])


def test_score_is_the_mean_level(golden):
    logits = golden["quality_logits"][:, golden["levels"]].astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = [sum(p * w for p, w in zip(row, (1, 0.75, 0.5, 0.25, 0))) for row in chances]
    np.testing.assert_allclose(qalign.score_of_levels(torch.from_numpy(logits)), expected, rtol=1e-12)
    certain = torch.eye(5, dtype=torch.float16) * 1000
    assert qalign.score_of_levels(certain).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_full_size_has_the_official_keys(golden):
    official = {qalign.own_key(key): shape for key, shape in json.loads(str(golden["full_keys"])).items()}
    assert len(official) == len(json.loads(str(golden["full_keys"])))  # no two keys became one
    with torch.device("meta"):
        model = qalign.QAlignModel(qalign.ModelConfig())
    assert {key: [*value.shape] for key, value in model.state_dict().items()} == official


def test_positions(golden, weights, folder):
    np.testing.assert_array_equal(qalign.query_positions(48, 5), golden["q_pos_embed"])
    np.testing.assert_array_equal(qalign.grid_positions(48, 4), golden["k_pos_embed"])
    key = "model.visual_abstractor.encoder.layers.1.crossattention.attention.k_pos_embed"
    rounded = torch.from_numpy(golden["k_pos_embed"]).bfloat16()
    save_file(weights | {key: rounded}, folder / "model.safetensors")
    config = qalign.read_config(folder / "config.json")
    model = qalign.load_model(str(folder), config, torch.device("cpu"), torch.float32)
    assert torch.equal(model.abstractor.layers[1].k_pos_embed, rounded.float())  # what is stored counts


def test_refuses_a_checkpoint_that_does_not_fit(weights, folder):
    def problem(**changes):
        save_file({key: value for key, value in (weights | changes).items()}, folder / "model.safetensors")
        with pytest.raises(ValueError) as error:
            qalign.load_model(
                str(folder), qalign.read_config(folder / "config.json"), torch.device("cpu"), torch.float16
            )
        return str(error.value)

    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no weights: neither model"):
        qalign.weight_files(str(folder))
    assert problem(**{"model.extra.weight": torch.ones(2)}).endswith("model.extra.weight is no weight of this model")
    assert problem(**{"model.norm.weight": torch.ones(3)}).endswith("model.norm.weight has the shape [3], not [64]")
    large = torch.full((64,), 1e6)
    assert "model.norm.weight holds a value that is not finite in torch.float16" in problem(
        **{"model.norm.weight": large}
    )
    fewer = {key: value for key, value in weights.items() if key != "model.norm.weight"}
    weights = fewer
    assert problem().endswith("1 weights are missing: norm.weight")
    for key, value in (("model_type", "llama"), ("rope_scaling", {"type": "linear", "factor": 2.0})):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"{value if key == 'model_type' else key}"):
            qalign.read_config(folder / "config.json")


def test_command(weights, folder, pictures, golden):
    save_file(weights, folder / "model.safetensors")
    pictures[0].save(folder / "a.png")
    (folder / "b.png").write_text("no picture")
    pictures[1].save(folder / "c.png")
    command = ["metrics/qalign.py", *(folder / f"{name}.png" for name in "abc"), "--model", folder, "--device", "cpu"]
    result = run(*command, check=False)
    lines = [
        f"{folder / name}\tquality {golden['quality'][index]:.4f}\taesthetic {golden['aesthetic'][index]:.4f}"
        for index, name in enumerate(("a.png", "c.png"))
    ]
    assert result.stdout.splitlines() == lines
    assert result.stderr.splitlines() == [f"{folder / 'b.png'} cannot be read: UnidentifiedImageError"]
    assert result.returncode == 1
    absent = run("metrics/qalign.py", "a.png", "--model", folder / "none", check=False)
    assert absent.returncode == 1 and absent.stderr.count("\n") == 1 and "no folder" in absent.stderr
