# SPDX-License-Identifier: Apache-2.0
"""Q-Align against the official model, tokenizer and scorers, with tiny random weights (tests/golden/make_qalign.py)."""

import copy
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import save_file


sys.path[:0] = [str(ROOT / "metrics"), str(ROOT / "tests/golden")]

import make_qalign as golden_script  # noqa: E402
import qalign  # noqa: E402
from double import in_float64  # noqa: E402


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
    # The stored positions: those that the model computes are float32, and their last digits depend on the CPU.
    place = "model.visual_abstractor.encoder.layers.{}.crossattention.attention.{}"
    names = [(layer, name) for layer in range(2) for name in ("q_pos_embed", "k_pos_embed")]
    stored = {place.format(*pair): torch.tensor(golden[pair[1]]) for pair in names}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_shards(weights | stored, folder, extension)
    metric = qalign.QAlign(torch.device("cpu"), batch_size=2, model=str(folder))
    exact = copy.copy(metric)
    exact.model, exact.dtype = in_float64(copy.deepcopy(metric.model)), torch.float64
    mean = metric.image_processor.image_mean
    squares = [qalign.pad_to_square(image, mean) for image in pictures]
    pixels = metric.image_processor(squares, return_tensors="pt").pixel_values
    features = exact.model.vision(pixels.double())
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(features, golden["vision"])
    image_tokens = exact.model.abstractor(features)
    close(image_tokens, golden["abstractor"])
    assert metric.levels == golden["levels"].tolist()
    scores = exact.score(pictures, ["", "unused"], [{}, {}])
    for name, (before, after) in metric.prompts.items():
        assert [*before, -200, *after] == golden[f"{name}_tokens"].tolist()
        logits = exact.model(image_tokens, before, after, list(range(golden[f"{name}_logits"].shape[1])))
        close(logits, golden[f"{name}_logits"])
        close([score[name] for score in scores], golden[name])
    assert exact.score(pictures[1:], [""], [{}]) == [pytest.approx(scores[1], abs=1e-9)]
    assert metric.score(pictures, ["", ""], [{}, {}]) == [pytest.approx(score, abs=1e-5) for score in scores]
    metric.model = metric.model.half()  # the dtype on a GPU; one that is forgotten somewhere would be an error
    metric.dtype = torch.float16
    assert metric.score(pictures, ["", ""], [{}, {}])[0] == pytest.approx(scores[0], abs=2e-3)
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
    np.testing.assert_allclose(qalign.query_positions(48, 5), golden["q_pos_embed"], atol=1e-6)
    np.testing.assert_allclose(qalign.grid_positions(48, 4), golden["k_pos_embed"], atol=1e-6)
    key = "model.visual_abstractor.encoder.layers.1.crossattention.attention.k_pos_embed"
    rounded = torch.from_numpy(golden["k_pos_embed"]).bfloat16()
    save_file(weights | {key: rounded}, folder / "model.safetensors")
    config = qalign.read_config(folder / "config.json")
    model = qalign.load_model(str(folder), config, torch.device("cpu"), torch.float32)
    assert torch.equal(model.abstractor.layers[1].k_pos_embed, rounded.float())  # what is stored counts


def test_refuses_a_checkpoint_that_does_not_fit(weights, folder):
    file, norm = folder / "config.json", "model.norm.weight"

    def problem(content: dict) -> str:
        save_file(content, folder / "model.safetensors")
        with pytest.raises(ValueError) as error:
            qalign.load_model(str(folder), qalign.read_config(file), torch.device("cpu"), torch.float16)
        return str(error.value)

    with pytest.raises(FileNotFoundError, match="no weights: neither model"):
        qalign.weight_files(str(folder))
    assert problem(weights | {"model.extra": torch.ones(2)}).endswith("model.extra is no weight of this model")
    assert problem(weights | {norm: torch.ones(3)}).endswith(f"{norm} has the shape [3], not [64]")
    assert f"{norm} holds a value that is not finite in torch.float16" in problem(
        weights | {norm: torch.ones(64) * 1e6}
    )
    assert problem({key: weights[key] for key in weights if key != norm}).endswith("1 weights are missing: norm.weight")
    config = json.loads(file.read_text())
    for key, value in (("model_type", "llama"), ("rope_scaling", {"type": "linear"}), ("num_key_value_heads", 2)):
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match="of type llama" if key == "model_type" else key):
            qalign.read_config(file)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.model may be missing"):
        qalign.QAlign(torch.device("cpu"), batch_size=1, model=str(folder))


def test_command(weights, folder, pictures, golden, monkeypatch):
    save_file(weights, folder / "model.safetensors")
    pictures[0].save(folder / "a.png")
    (folder / "b.png").write_text("no picture")
    pictures[1].save(folder / "c.png")
    files = [folder / name for name in ("a.png", "b.png", "c.png")]
    result = run("metrics/qalign.py", *files, "--model", folder, "--device", "cpu", check=False)
    lines = [
        f"{file}\tquality {quality:.4f}\taesthetic {aesthetic:.4f}"
        for file, quality, aesthetic in zip(files[::2], golden["quality"], golden["aesthetic"])
    ]
    assert result.stdout.splitlines() == lines
    assert result.stderr.startswith(f"{files[1]} cannot be read: UnidentifiedImageError: ")
    assert result.stderr.count("\n") == 1
    assert result.returncode == 1
    monkeypatch.setattr(sys, "argv", ["qalign.py", "a.png", "--model", str(folder / "none")])
    with pytest.raises(SystemExit, match="none is no folder, and the Hub gives no such model"):
        qalign.main()
