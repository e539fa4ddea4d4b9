# SPDX-License-Identifier: Apache-2.0
"""UniDet against the official code (golden/unidet.npz, made by golden/make_unidet.py), and its files."""

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import unidet
from conftest import ROOT, check_unfit
from double import float64
from make_unidet import NAMES, SIZES, official_input, sample, tiny_image, tiny_tensor


CONFIG = {"blocks": [3, 4, 6, 3], "stem_channels": 32, "bottleneck_channels": 8, "res2_channels": 16}
CONFIG |= {"fpn_channels": 16, "head_channels": 16, "head_features": 32}


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests" / "golden" / "unidet.npz") as file:
        return dict(file)


def tiny_weights() -> dict[str, torch.Tensor]:
    """The tiny weights as a detectron2 checkpoint of the published kind stores them."""
    with torch.device("meta"):
        model = unidet.UnifiedRCNN(**CONFIG, labels=len(NAMES))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tensors = {key: tiny_tensor(key, shape) for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
    tensors["backbone.bottom_up.res3.0.conv1.norm.num_batches_tracked"] = torch.tensor(7)
    tensors["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(9, 4)
    tensors |= {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    return {f"module.{key}": value for key, value in tensors.items()}  # as in older checkpoints


def save(folder: Path, weights, **config) -> str:
    """Writes weights, config.json and labels.json; returns the weights' path."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"labels": "labels.json"} | config))
    (folder / "labels.json").write_text(json.dumps(NAMES))
    torch.save({"model": weights, "iteration": 539999}, folder / "model.pth")
    return str(folder / "model.pth")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return unidet.UniDet(torch.device("cpu"), weights=save(tmp_path_factory.mktemp("unidet"), tiny_weights()))


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
    detector_encode = exact.model.double().encode
    seen = {}
    exact.model.proposal_generator.register_forward_hook(lambda *call: seen.update(features=call[1][0], best=call[2]))
    with torch.inference_mode(), float64():
        exact.model.encode = lambda pixels: detector_encode(pixels.double())
        names, scores, boxes = zip(*exact.detect([image])[0])
    features, (proposals, objectness) = seen["features"], seen["best"]
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
    assert sorted(key for key in keys if "num_batches_tracked" not in key) == golden["keys"].tolist()


def test_images_do_not_depend_on_each_other_and_may_be_blank_or_narrow(detector):
    images = [tiny_image(*SIZES[1]), *(tiny_image(64, 64).resize(size) for size in ((1, 1), (2000, 9)))]
    together = detector.detect([images[0].convert("RGBA"), *images[1:]])
    assert together[::2] == [detector.detect([image])[0] for image in images[::2]]
    scores = [score for _, score, _ in together[0]]
    detector.threshold = 0.2
    assert detector.detect(images[:1])[0] == [found for found in together[0] if found[1] > 0.2]
    detector.threshold = 0.1
    assert min(scores) < 0.2 < max(scores)


def test_files_that_do_not_fit(tmp_path):
    weights = tiny_weights()
    key = "module.roi_heads.box_predictor.2.cls_score.bias"
    changes = {"Missing.*cls_score.bias": {key: None}, "size mismatch for .*cls_score.bias": {key: torch.zeros(7)}}
    changes["Unexpected.*mask_head.weight"] = {"mask_head.weight": torch.zeros(1)}
    file = tmp_path / "model.pth"
    check_unfit(lambda: unidet.UniDet(torch.device("cpu"), str(file)), partial(save, tmp_path), weights, changes)
    for file, config in (("absent.json", {"labels": "absent.json"}), ("nowhere.pth", {})):
        path = Path(save(tmp_path, weights, **config))
        with pytest.raises(FileNotFoundError, match=file):
            unidet.find_files(str(path if config else path.with_name(file)))


def test_official_downloads(tmp_path, monkeypatch):
    """The names come from a file of the official kind, which must have the digest in its name; weights from the Hub."""
    urls = []

    def download(url, file, hash_prefix, progress):
        urls.append((url, hash_prefix))
        torch.save({"labels": NAMES, "features": torch.zeros(5, 64)}, file)

    path = save(tmp_path, tiny_weights())
    (tmp_path / "config.json").write_text("not read")
    monkeypatch.setattr(unidet, "PUBLISHED", CONFIG)
    monkeypatch.setattr(unidet, "hf_hub_download", lambda *arguments: urls.append(arguments) or path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert unidet.UniDet(torch.device("cpu")).labels == NAMES
    weights_source = ("shikunl/prismer", "expert_weights/Unified_learned_OCIM_RS200_6x+2x.pth")
    assert urls == [weights_source, (unidet.OFFICIAL_LABELS, "c38ba9352b2a9f83"), weights_source]


def test_empty_and_infinite_boxes_are_no_detections():
    boxes = torch.tensor([[0, 0, 9, 9], [5, 5, 5, 8], [0, 0, float("inf"), 9], [20, 20, 30, 30]])
    scores = torch.tensor([[0.3, 0.05], [0.9, 0.9], [0.9, 0.9], [0.2, 0.6]])
    boxes, scores, classes = unidet.choose_detections(boxes, scores, 0.1)
    assert boxes.tolist() == [[20, 20, 30, 30], [0, 0, 9, 9], [20, 20, 30, 30]]
    assert scores.tolist() == pytest.approx([0.6, 0.3, 0.2]) and classes.tolist() == [1, 0, 0]
