# SPDX-License-Identifier: Apache-2.0
"""UniDet against the official code (golden/unidet.npz, made by golden/make_unidet.py), and its files."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch


TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent / "metrics"), str(TESTS / "golden")]

import unidet
from double import float64
from make_unidet import NAMES, SIZES, official_input, sample, tiny_image, tiny_tensor


CONFIG = {
    "blocks": [3, 4, 6, 3],
    "stem_channels": 32,
    "bottleneck_channels": 8,
    "res2_channels": 16,
    "fpn_channels": 16,
    "head_channels": 16,
    "head_features": 32,
}


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTS / "golden" / "unidet.npz") as file:
        return dict(file)


def tiny_weights() -> dict[str, torch.Tensor]:
    """The tiny weights as a detectron2 checkpoint of the published kind stores them."""
    with torch.device("meta"):
        model = unidet.UnifiedRCNN(**CONFIG, labels=len(NAMES))
    tensors = {key: tiny_tensor(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    tensors["backbone.bottom_up.res3.0.conv1.norm.num_batches_tracked"] = torch.tensor(7)
    tensors["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(9, 4)
    return tensors | {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}


@pytest.fixture(scope="module")
def weights():
    return tiny_weights()


def save(folder: Path, weights, **config) -> str:
    """Writes weights, config.json and labels.json; returns the weights' path."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"labels": "labels.json"} | config))
    (folder / "labels.json").write_text(json.dumps(NAMES))
    torch.save({"model": weights, "iteration": 539999}, folder / "model.pth")
    return str(folder / "model.pth")


@pytest.fixture(scope="module")
def detector(tmp_path_factory, weights):
    return unidet.UniDet(torch.device("cpu"), weights=save(tmp_path_factory.mktemp("unidet"), weights))


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_the_official_model_gives_the_same(index, detector, golden):
    image = tiny_image(*SIZES[index])
    pixels = unidet.pixels_of(image)
    assert torch.equal(pixels, official_input(image)["image"])
    height, width = golden[f"size{index}"]
    assert pixels.shape == (3, height, width)
    expected = golden[f"features{index}"]
    with torch.inference_mode():
        found = np.stack(list(map(sample, detector.model.encode(pixels))))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    # From here on the best are chosen and overlaps suppressed, so that float32 would not give the same on every CPU.
    exact = copy.deepcopy(detector)
    exact.model.double()
    with torch.inference_mode(), float64():
        features = exact.model.encode(pixels.double())
        proposals, objectness = exact.model.proposal_generator(features, height, width)
        names, scores, boxes = zip(*exact.detect([image])[0])
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(np.stack(list(map(sample, features))), expected)
    close(proposals, golden[f"proposals{index}"])
    close(objectness, golden[f"objectness{index}"])
    assert list(scores) == sorted(scores, reverse=True) and min(scores) > 0.1
    assert list(names) == [NAMES[label] for label in golden[f"classes{index}"]]
    close(scores, golden[f"scores{index}"])
    close(boxes, golden[f"boxes{index}"])


def test_the_full_size_has_the_official_keys_and_shapes(golden):
    with torch.device("meta"):
        model = unidet.UnifiedRCNN(**unidet.PUBLISHED, labels=722)
    keys = [f"{key} {'x'.join(map(str, value.shape))}" for key, value in model.state_dict().items()]
    assert sorted(keys) == golden["keys"].tolist()


def test_images_do_not_depend_on_each_other(detector):
    images = [tiny_image(*size) for size in SIZES]
    assert detector.detect(images) == detector.detect(images[:1]) + detector.detect(images[1:])
    assert detector.detect([images[0].convert("RGBA")]) == detector.detect(images[:1])


def test_a_higher_threshold_keeps_the_best(detector, weights, tmp_path):
    strict = unidet.UniDet(torch.device("cpu"), save(tmp_path, weights), threshold=0.2)
    image = tiny_image(*SIZES[0])
    found = strict.detect([image])[0]
    assert found and found == [detection for detection in detector.detect([image])[0] if detection[1] > 0.2]
    strict.threshold = 1.0
    assert strict.detect([image]) == [[]]


def test_a_blank_or_narrow_image_is_no_error(detector):
    for size in ((1, 1), (2000, 9)):
        detector.detect([tiny_image(64, 64).resize(size)])


def test_files_that_do_not_fit(weights, tmp_path):
    def refused(changed, error=ValueError, **config):
        with pytest.raises(error) as raised:
            unidet.UniDet(torch.device("cpu"), save(tmp_path, changed, **config))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    key = "roi_heads.box_predictor.2.cls_score.bias"
    assert f"lack the key {key}" in refused({name: value for name, value in weights.items() if name != key})
    assert f"{key} has the shape (7,), not (6,)" in refused(weights | {key: torch.zeros(7)})
    assert "unknown key mask_head.weight" in refused(weights | {"mask_head.weight": torch.zeros(1)})
    assert "unknown key width" in refused(weights, width=3)
    assert "absent.json" in refused(weights, FileNotFoundError, labels="absent.json")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        unidet.UniDet(torch.device("cpu"), str(tmp_path / "nowhere.pth"))
    (tmp_path / "model.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        unidet.read_weights(tmp_path / "model.pth")


def test_official_downloads(weights, tmp_path, monkeypatch):
    """The names come from a file of the official kind, the weights from the Hub, and keys may start with `module.`"""
    torch.save({"labels": NAMES, "features": torch.zeros(5, 64)}, tmp_path / "names.pt")
    assert unidet.read_labels(tmp_path / "names.pt") == NAMES
    calls = []

    def download(*arguments):
        calls.append(arguments)
        return tmp_path / "names.pt"

    path = save(tmp_path, {f"module.{name}": value for name, value in weights.items()})
    monkeypatch.setattr(unidet, "PUBLISHED", CONFIG)
    monkeypatch.setattr(unidet, "hf_hub_download", lambda *arguments: calls.append(arguments) or path)
    monkeypatch.setattr(unidet, "download", download)
    assert unidet.UniDet(torch.device("cpu")).labels == NAMES
    assert calls[0] == ("shikunl/prismer", "expert_weights/Unified_learned_OCIM_RS200_6x+2x.pth")
    assert calls[1][0].endswith("/dataset/detection_features.pt") and calls[1][2] == "c38ba9352b2a9f83"


def test_a_box_takes_the_level_of_its_size():
    """Level 4 begins at a side of 224 pixels, level 5 at 448; each level's features are its number."""
    features = [torch.full((1, 1, 512 // stride, 512 // stride), float(level)) for level, stride in ((3, 8), (4, 16))]
    features.append(torch.full((1, 1, 16, 16), 5.0))
    sides = torch.tensor([8.0, 112, 223.5, 224, 447.5, 448, 512])
    boxes = torch.stack([512 - sides, torch.zeros(7), torch.full((7,), 512.0), sides], dim=1)
    patches = unidet.pool_regions(features, boxes)
    assert patches.shape == (7, 1, 7, 7)
    assert patches.mean(dim=(1, 2, 3)).tolist() == pytest.approx([3, 3, 3, 4, 4, 5, 5])


def test_empty_and_infinite_boxes_are_no_detections():
    boxes = torch.tensor([[0, 0, 9, 9], [5, 5, 5, 8], [0, 0, float("inf"), 9], [20, 20, 30, 30]])
    scores = torch.tensor([[0.3, 0.05], [0.9, 0.9], [0.9, 0.9], [0.2, 0.6]])
    boxes, scores, classes = unidet.choose_detections(boxes, scores, 0.1)
    assert boxes.tolist() == [[20, 20, 30, 30], [0, 0, 9, 9], [20, 20, 30, 30]]
    assert scores.tolist() == pytest.approx([0.6, 0.3, 0.2]) and classes.tolist() == [1, 0, 0]
