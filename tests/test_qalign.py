# SPDX-License-Identifier: Apache-2.0
"""Q-Align against the official model, tokenizer and scorers, with tiny random weights (tests/golden/make_qalign.py)."""

import copy
import json
from functools import partial
from pathlib import Path

import make_qalign as golden_script
import numpy as np
import pytest
import qalign
import torch
from conftest import ROOT, check_unfit
from double import in_float64
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests/golden/qalign.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(golden):
    """The official names with the golden script's weights, and the official positions."""
    weights = {}
    for key, shape in json.loads(str(golden["keys"])).items():
        positions = golden.get(key.rpartition(".")[2])
        weights[key] = torch.tensor(golden_script.weight(key, shape) if positions is None else positions)
    return weights


@pytest.fixture(scope="module")
def pictures():
    return [golden_script.picture(90, 62, seed=1), golden_script.picture(40, 70, seed=2)]


def write_files(folder: Path, golden: dict) -> Path:
    """A checkpoint's folder, without weights."""
    files = {"preprocessor_config": golden_script.PREPROCESSOR, "tokenizer_config": golden_script.TOKENIZER}
    files["config"] = golden_script.TINY | {"vocab_size": json.loads(str(golden["keys"]))["lm_head.weight"][0]}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "tokenizer.model").write_bytes(golden["tokenizer"].tobytes())
    return folder


@pytest.fixture
def folder(golden, tmp_path):
    return write_files(tmp_path, golden)


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_equals_the_official_scorers(golden, weights, folder, pictures, extension):
    """From two shards, as transformers names them; some hold frequencies that are no weights."""
    save, start = {"safetensors": (save_file, "model"), "bin": (torch.save, "pytorch_model")}[extension]
    items = list((weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}).items())
    for index in range(2):
        save(dict(items[index::2]), folder / f"{start}-0000{index + 1}-of-00002.{extension}")
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


def test_full_size_has_the_official_keys(golden):
    official = {qalign.own_key(key): shape for key, shape in json.loads(str(golden["full_keys"])).items()}
    assert len(official) == len(json.loads(str(golden["full_keys"])))  # no two keys became one
    with torch.device("meta"):
        model = qalign.QAlignModel(qalign.make_config({}))
    assert {key: [*value.shape] for key, value in model.state_dict().items()} == official


def test_refuses_a_checkpoint_that_does_not_fit(weights, folder):
    config, norm = json.loads((folder / "config.json").read_text()), "model.norm.weight"
    with pytest.raises(FileNotFoundError, match="no weights: neither model"):
        qalign.QAlign.prepare([], {"model": str(folder)})
    changes = {
        "Unexpected.*extra": {"model.extra": torch.ones(2)},
        "size mismatch for norm.weight": {norm: torch.ones(3)},
        f"{norm} holds a value that is not finite in torch.float16": {norm: torch.ones(64) * 1e6},
        "Missing.*norm.weight": {norm: None},
    }
    options = str(folder), qalign.make_config(config), torch.device("cpu"), torch.float16
    save = partial(save_file, filename=folder / "model.safetensors")
    check_unfit(partial(qalign.load_model, *options), save, weights, changes)
    for key, value in (("model_type", "llama"), ("rope_scaling", {"type": "linear"}), ("num_key_value_heads", 2)):
        with pytest.raises(ValueError, match=f"{key} is .*; only"):
            qalign.make_config(config | {key: value})
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.model may be missing"):
        qalign.QAlign(torch.device("cpu"), batch_size=1, model=str(folder))


def test_command(weights, folder, pictures, golden, capsys):
    save_file(weights, folder / "model.safetensors")
    pictures[0].save(folder / "a.png")
    (folder / "b.png").write_text("no picture")
    pictures[1].save(folder / "c.png")
    files = [str(folder / name) for name in ("a.png", "b.png", "c.png")]
    qalign.main([*files, "--model", str(folder), "--device", "cpu"])
    first, bad, last = capsys.readouterr().out.splitlines()
    assert bad.startswith(f"{files[1]}\tcannot be read: ")
    for file, line, quality, aesthetic in zip(files[::2], (first, last), golden["quality"], golden["aesthetic"]):
        assert line == f"{file}\tquality {quality:.4f}\taesthetic {aesthetic:.4f}"
