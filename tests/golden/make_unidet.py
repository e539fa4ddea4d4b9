# SPDX-License-Identifier: Apache-2.0
"""Writes unidet.npz: what the official UniDet makes of two made images with tiny weights, and its full-size keys.

    PYTHONPATH=DETECTRON2:T2I_COMPBENCH/UniDet_eval python make_unidet.py T2I_COMPBENCH unidet.npz

T2I_COMPBENCH: github.com/Karine-Huang/T2I-CompBench at 1b70949. DETECTRON2: github.com/facebookresearch/detectron2 at
02b5c4e, its Python sources alone (the detector runs none of its compiled operators). Made with Python 3.11, torch
2.14.1, torchvision 0.29.1, numpy 2.4.6, pillow 12.3.0, fvcore 0.1.5.post20221221, iopath 0.1.10, omegaconf 2.4.0,
pycocotools 2.0.11, yacs 0.1.8, on the CPU, in float64: boxes and deltas, too, which detectron2 turns to float32 (see
double.py).

The tiny detector is the official configuration with the depth and the widths of `TINY`; all else is as published.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


NAMES = ["dog", "cell phone", "bird", "truck", "bird"]
TINY = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_HEADS.NUM_CLASSES": len(NAMES),
}
SCALES = {"bottom_up.res": 0.5, "fpn_lateral": 1.5}
SIZES = [(512, 512), (300, 500)]  # width, height


def tiny_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights that depend on the key and shape alone; signals keep their size, and some scores pass the threshold."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    values = generator.standard_normal(shape)
    if key.endswith("running_var"):
        values = np.exp(0.3 * values)
    elif key.endswith(("norm.weight", "bn0.weight", "bn1.weight")):
        values = next((scale for part, scale in SCALES.items() if part in key), 1.0) * np.exp(0.2 * values)
    elif len(shape) == 1:
        values = 0.1 * values - (4.2 if "cls_score" in key else 0)
    else:
        values = values * np.sqrt(2 / np.prod(shape[1:]))
        if "anchor_deltas" in key:
            values = 0.3 * values
    return torch.from_numpy(values.astype(np.float32))


def tiny_image(width: int, height: int) -> Image.Image:
    """Coloured rectangles and noise."""
    generator = np.random.default_rng(width * height)
    pixels = generator.integers(0, 60, (height, width, 3))
    for _ in range(12):
        x, y = generator.integers(0, width - 40), generator.integers(0, height - 40)
        w, h = generator.integers(30, 250, 2)
        pixels[y : y + h, x : x + w] += generator.integers(0, 140, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sample(feature: torch.Tensor) -> np.ndarray:
    """100 values of a feature map, evenly spread."""
    values = feature.flatten().numpy()
    return values[np.linspace(0, len(values) - 1, 100).astype(int)]


def official_config(official: Path, options: dict):
    """The official configuration on the CPU, with other values for some of its options."""
    from detectron2.config import get_cfg
    from experts.obj_detection.unidet.config import add_unidet_config

    config = get_cfg()
    add_unidet_config(config)
    folder = official / "UniDet_eval" / "experts" / "obj_detection"
    config.merge_from_file(str(folder / "configs" / "Unified_learned_OCIM_RS200_6x+2x.yaml"))
    labels = folder / "datasets" / "label_spaces" / "learned_mAP+M.json"
    options = {"MODEL.DEVICE": "cpu", "MULTI_DATASET.UNIFIED_LABEL_FILE": str(labels), **options}
    config.merge_from_list([item for pair in options.items() for item in pair])
    return config


def full_size_keys(official: Path) -> list[str]:
    """Lines of key and shape, without the counters of training, sorted."""
    from detectron2.modeling import build_model

    weights = build_model(official_config(official, {})).state_dict()
    return sorted(
        f"{key} {'x'.join(map(str, value.shape))}"
        for key, value in weights.items()
        if not key.endswith("num_batches_tracked")
    )


def tiny_model(official: Path):
    """The official model with the widths of `TINY` and the weights of `tiny_tensor`."""
    from detectron2.modeling import build_model

    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.json"
        datasets = ["objects365", "coco", "oid", "mapillary"]
        labels.write_text(json.dumps({"label_map": {name: [0] for name in datasets}}))
        model = build_model(official_config(official, {**TINY, "MULTI_DATASET.UNIFIED_LABEL_FILE": str(labels)}))
    weights = model.state_dict()
    for key, value in weights.items():
        if value.dtype.is_floating_point:
            weights[key] = tiny_tensor(key, tuple(value.shape))
    model.load_state_dict(weights)
    return model.eval()


def official_input(image: Image.Image) -> dict:
    """What the official data set and transform (generate_dataset.py, model_bank.py) make of an image."""
    from torchvision import transforms

    array = np.array(transforms.Resize(size=479, max_size=480)(image.convert("RGB")))[:, :, ::-1]
    pixels = torch.as_tensor(array.astype("float32").transpose(2, 0, 1))
    return {"image": pixels, "height": pixels.shape[1], "width": pixels.shape[2]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("official", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    import experts.obj_detection.unidet  # noqa: F401 (registers the modules)
    from double import float64

    golden = {"keys": np.array(full_size_keys(arguments.official))}
    with float64():
        model = tiny_model(arguments.official)
    for index, size in enumerate(SIZES):
        inputs = official_input(tiny_image(*size))
        with torch.no_grad(), float64():
            images = model.preprocess_image([inputs])
            features = model.backbone(images.tensor)
            proposals, _ = model.proposal_generator(images, features, None)
            found = model([inputs])[0]["instances"]
        golden[f"size{index}"] = np.array(inputs["image"].shape[1:])
        golden[f"features{index}"] = np.stack([sample(features[name]) for name in ("p3", "p4", "p5", "p6", "p7")])
        golden[f"proposals{index}"] = proposals[0].proposal_boxes.tensor.numpy()
        golden[f"objectness{index}"] = proposals[0].objectness_logits.numpy()
        golden[f"boxes{index}"] = found.pred_boxes.tensor.numpy()
        golden[f"scores{index}"] = found.scores.numpy()
        golden[f"classes{index}"] = found.pred_classes.numpy()
        print(size, len(proposals[0]), "proposals,", len(found), "detections")
    np.savez_compressed(arguments.output, **golden)


if __name__ == "__main__":
    main()
