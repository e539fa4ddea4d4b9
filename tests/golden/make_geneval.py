# SPDX-License-Identifier: Apache-2.0
"""Makes geneval.npz: what the official GenEval code gives on small random models and random detections.

    git clone https://github.com/djghosh13/geneval && git -C geneval checkout af4902f
    python tests/golden/make_geneval.py geneval

Python 3.11 with torch 2.14.1, torchvision 0.29.1, numpy 2.4.6, scipy 1.17.1, pillow 12.3.0, mmdet 2.28.2, mmcv 1.7.2
(without its compiled operators: deformable attention then runs in MMDetection's own PyTorch code),
opencv-python-headless 4.10.0.84, open-clip-torch 2.20.0 and clip-benchmark 1.4.0, on a CPU.

Run as they are: `inference_detector` of mmdet with the published configuration at small sizes, and the functions of
evaluation/evaluate_images.py from `ImageCrops` to `evaluate_image`. Only, both models run in float64, also where mmdet
and clip-benchmark ask for float32 (see double.py); their inputs are the official float32. An image goes through the
detector once, and a DataLoader has no processes. The first half of this file needs only numpy; the tests import it for
the same random weights, pictures and cases.
"""

import argparse
import ast
import hashlib
import json
import os
import sys
import tempfile
import types
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image as PILImage


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "free")
NAMES = ("dog", "tv remote", "cup", "bench")
CASES, CASE_SEED = 4900, 1
SIZES = {  # of Mask2FormerConfig; mmdet's names stand in `tiny_mmdet`
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_layers": 2,
    "encoder_feedforward_dim": 48,
    "decoder_layers": 4,
    "dim_feedforward": 40,
    "num_attention_heads": 2,
    "num_queries": 20,
}
BACKBONE = {"embed_dim": 8, "depths": [2, 2, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 7}
CLIP = {"width": 32, "layers": 2, "heads": 2, "patch": 8, "size": 32, "embed": 16, "vocabulary": 49408, "context": 77}
PICTURES = ((96, 64), (70, 70), (41, 120), (64, 64))  # width, height
INPUTS = ((96, 64), (70, 70), (41, 120), (1024, 1024), (800, 800), (1600, 1600), (640, 481), (512, 384), (1500, 400))
CLIP_CLASSES = ("dog", "computer mouse")


def weight(key: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """A random tensor that depends only on its name."""
    rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:16], 16))
    values = rng.standard_normal(shape)
    if len(shape) > 1:
        values = values * scale / np.sqrt(np.prod(shape[1:]))
    else:
        is_norm = any(part in key for part in ("norm", ".gn.", ".ln_", "ln_final")) and key.endswith("weight")
        values = values * 0.1 + float(is_norm)
    return values.astype(np.float32)


def detector_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """As `weight`, such that some objects are certain and masks have clear edges."""
    scales = {"cls_embed.weight": 8.0, "mask_embed.4.weight": 12.0, "query_feat.weight": 6.0, "query_embed.weight": 6.0}
    return weight(key, shape, next((scale for ending, scale in scales.items() if key.endswith(ending)), 1.0))


def picture(width: int, height: int) -> PILImage.Image:
    """Random blots, RGB."""
    rng = np.random.default_rng([width, height])
    coarse = PILImage.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), PILImage.Resampling.BILINEAR)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_boxes(rng: np.random.Generator, count: int) -> list[list[float]]:
    boxes = set()
    while len(boxes) < count:
        x, y, wide, high = (int(value) for value in rng.integers([0, 0, 1, 1], [60, 60, 50, 50]))
        boxes.add((x, y, x + wide, y + high))
    return [list(map(float, box)) for box in boxes]


def edge_pair(rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Two boxes whose offset stands on, or just beside, a limit of the rules."""
    k, kind = int(rng.integers(1, 41)), int(rng.integers(5))
    along, across = [(10 * k, 0), (4 * k, 3 * k), (0, 0), (5 * k, 12 * k), (8 * k, 0)][kind]
    # kind 0: offset 10k and sizes 100k in sum, the margin itself. 1: 4k - 0.1 · 15k is half of the distance 5k. 4: half
    # of 8k.
    total = [100 * k, 15 * k, 20 * k, 4 * k, 40 * k][kind]
    along += float(rng.choice([0.0, 0.0, -0.5, 0.5, -1.0, 1.0]))
    along, across = along * int(rng.choice([-1, 1])), across * int(rng.choice([-1, 1]))
    sizes = (total - total // 2, total // 2)
    boxes = []
    for size, sign in zip(sizes, (1, -1)):
        center = np.array([500 + sign * along / 2, 500 + sign * across / 2])
        half = np.array([size / 2, 0.5])
        boxes.append([*(center - half), *(center + half)])
    if kind == 2:  # an offset of about 0.001 beyond no margin at all
        shift = float(rng.choice([0.0, 0.0009765625, 0.00048828125, 0.001953125]))
        boxes = [[1.0, 1.0, 1.0, 1.0], [1.0 + shift, 1.0, 1.0 + shift, 1.0]]
    if rng.random() < 0.5:
        boxes = [[box[1], box[0], box[3], box[2]] for box in boxes]
    return tuple([float(value) for value in box] for box in boxes)


def random_cases(count: int = CASES, seed: int = CASE_SEED) -> list[dict]:
    """Lines of metadata with detections: {"metadata", "objects": class → boxes, "colors": class → a colour a box}."""
    rng, cases = np.random.default_rng(seed), []
    for number in range(count):
        tag = TAGS[number % len(TAGS)]
        first, second = (str(name) for name in rng.choice(NAMES, 2, replace=False))
        palette = [str(color) for color in rng.choice(COLORS, 3, replace=False)]
        include, exclude = [{"class": first, "count": 1}], []
        if tag in ("two_object", "position", "color_attr"):
            include.append({"class": second, "count": 1})
        if tag == "position":
            include[1]["position"] = [str(rng.choice(RELATIONS)), 0]
        if tag in ("colors", "color_attr"):
            include = [{**clause, "color": str(rng.choice(palette))} for clause in include]
        if tag == "counting":
            include[0]["count"] = int(rng.integers(2, 5))
            exclude = [{"class": first, "count": include[0]["count"] + 1}]
        if tag == "free":
            include = []
            for index in range(int(rng.integers(1, 4))):
                clause = {"class": str(rng.choice(NAMES)), "count": int(rng.integers(1, 4))}
                if rng.random() < 0.4:
                    clause["color"] = palette[0]
                if index and rng.random() < 0.6:
                    clause["position"] = [str(rng.choice(RELATIONS)), int(rng.integers(index))]
                include.append(clause)
            exclude = [
                {"class": str(rng.choice(NAMES)), "count": int(rng.integers(1, 5))} for _ in range(rng.integers(3))
            ]
        wanted = max(clause["count"] for clause in include)
        objects = {name: random_boxes(rng, int(rng.integers(0, wanted + 3))) for name in NAMES}
        if tag in ("position", "free") and rng.random() < 0.6:
            pair = edge_pair(rng)
            objects |= {first: [pair[0], *objects[first]], second: [pair[1], *objects[second]]}
        objects = {name: boxes for name, boxes in objects.items() if boxes}
        shares = [0.8, 0.1, 0.1] if tag == "free" else [0.5, 0.3, 0.2]
        colors = {name: [str(rng.choice(palette, p=shares)) for _ in boxes] for name, boxes in objects.items()}
        metadata = {"tag": tag, "include": include, "prompt": f"prompt {number}"}
        metadata |= {"exclude": exclude} if exclude else {}
        cases.append({"metadata": metadata, "objects": objects, "colors": colors})
    return cases


def digest(value) -> str:
    data = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# The official code
# ----------------------------------------------------------------------------------------------------------------------


def stub_modules() -> None:
    """mmcv's compiled operators and scikit-learn's reports are imported, but never called."""

    class Stub(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *arguments, **options: (_ for _ in ()).throw(NotImplementedError(name))

    for name in ("mmcv._ext", "sklearn", "sklearn.metrics"):
        sys.modules[name] = Stub(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)


def mmdet_config():
    import mmcv
    import mmdet

    folder = Path(mmdet.__file__).parent / ".mim/configs/mask2former"
    config = mmcv.Config.fromfile(str(folder / "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py"))
    config.model.backbone.init_cfg, config.model.train_cfg = None, None
    return config


def tiny_mmdet(config):
    """The published configuration at small sizes."""
    head, width = config.model.panoptic_head, SIZES["hidden_dim"]
    config.model.backbone.update(
        embed_dims=BACKBONE["embed_dim"], depths=BACKBONE["depths"], num_heads=BACKBONE["num_heads"]
    )
    head.update(in_channels=[BACKBONE["embed_dim"] * 2**stage for stage in range(4)], feat_channels=width)
    head.update(out_channels=width, num_queries=SIZES["num_queries"])
    for encoding in (head.pixel_decoder.positional_encoding, head.positional_encoding):
        encoding.num_feats = width // 2
    head.pixel_decoder.encoder.num_layers = SIZES["encoder_layers"]
    layer = head.pixel_decoder.encoder.transformerlayers
    layer.attn_cfgs.update(embed_dims=width, num_heads=SIZES["num_attention_heads"])
    layer.ffn_cfgs.update(embed_dims=width, feedforward_channels=SIZES["encoder_feedforward_dim"])
    head.transformer_decoder.num_layers = SIZES["decoder_layers"] - 1
    layer = head.transformer_decoder.transformerlayers
    layer.attn_cfgs.update(embed_dims=width, num_heads=SIZES["num_attention_heads"])
    layer.ffn_cfgs.update(embed_dims=width, feedforward_channels=SIZES["dim_feedforward"])
    layer.feedforward_channels = SIZES["dim_feedforward"]
    return config


def build(config):
    from mmdet.models import build_detector

    model = build_detector(config.model, test_cfg=config.get("test_cfg")).eval()
    model.cfg = config
    return model


def shapes_of(model) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def official_functions(repository: Path, names: dict) -> dict:
    """The functions and classes of evaluate_images.py that need no command line, in a namespace with `names`."""
    source = ast.parse((repository / "evaluation/evaluate_images.py").read_text())
    wanted = ("ImageCrops", "color_classification", "compute_iou", "relative_position", "evaluate", "evaluate_image")
    source.body = [
        node
        for node in source.body
        if getattr(node, "name", None) in wanted
        or isinstance(node, ast.Assign)
        and getattr(node.targets[0], "id", None) in ("COLORS", "COLOR_CLASSIFIERS")
    ]
    exec(compile(source, "evaluate_images.py", "exec"), names)
    return names


def official_verdicts(repository: Path, cases: list[dict]) -> str:
    """One digit a case: 1 for correct."""
    from PIL import ImageOps

    names = {"np": np, "torch": __import__("torch"), "Image": PILImage, "ImageOps": ImageOps, "json": json}
    functions, verdicts = official_functions(repository, {**names, "POSITION_THRESHOLD": 0.1}), []
    for case in cases:
        objects = {
            name: [(np.array([*box, 0.5], dtype=np.float32), None) for box in boxes]
            for name, boxes in case["objects"].items()
        }

        def colors(image, found, name, case=case):
            return case["colors"][name][: len(found)]

        functions["color_classification"] = colors
        correct, _ = functions["evaluate"](None, objects, case["metadata"])
        verdicts.append(str(int(correct)))
    return "".join(verdicts)


def official_inputs() -> dict[str, list[str]]:
    """Digests of what mmdet's test pipeline makes of noise: 8-bit RGB after padding, and the detector's input."""
    from mmdet.datasets.pipelines import Compose

    found = {}
    for size in INPUTS:
        steps, results = mmdet_config().data.test.pipeline[1].transforms, []
        steps = [step for step in steps if step.type != "RandomFlip"]  # never flips here
        for last in ("Pad", "Normalize"):
            end = [step.type for step in steps].index(last) + 1
            image = np.ascontiguousarray(noise(*size)[:, :, ::-1])
            data = {"img": image, "img_shape": image.shape, "ori_shape": image.shape, "img_fields": ["img"]}
            results.append(Compose(steps[:end])(data | {"scale": (1333, 800)})["img"])
        found["x".join(map(str, size))] = [digest(np.ascontiguousarray(results[0][:, :, ::-1])), digest(results[1])]
    return found


def tiny_open_clip():
    import torch
    from open_clip.model import CLIP as OpenCLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=CLIP["layers"], width=CLIP["width"], head_width=CLIP["width"] // CLIP["heads"], patch_size=CLIP["patch"],
        image_size=CLIP["size"],
    )  # fmt: skip
    text = CLIPTextCfg(
        context_length=CLIP["context"], vocab_size=CLIP["vocabulary"], width=CLIP["width"], heads=CLIP["heads"],
        layers=CLIP["layers"],
    )  # fmt: skip
    model = OpenCLIP(CLIP["embed"], vision, text, quick_gelu=True).eval()
    shapes = shapes_of(model)
    model.load_state_dict({key: torch.tensor(weight(key, tuple(shape), 2.0)) for key, shape in shapes.items()})
    return model, shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", type=Path, help="checkout of djghosh13/geneval")
    repository = parser.parse_args().repository
    stub_modules()
    import open_clip
    import torch
    from clip_benchmark.metrics import zeroshot_classification as zsc
    from double import in_float64
    from mmdet import apis
    from PIL import ImageOps

    torch.set_num_threads(1)
    here = Path(__file__).resolve().parent
    golden = {"full_size": shapes_of(build(mmdet_config()))}
    cases = random_cases()
    golden["cases"] = {"digest": digest(cases), "verdicts": official_verdicts(repository, cases)}
    golden["inputs"] = official_inputs()

    detector, outputs = build(tiny_mmdet(mmdet_config())), []
    detector.panoptic_head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    golden["detector"] = shapes_of(detector)
    weights = {
        key: torch.from_numpy(detector_weight(key, tuple(shape)))
        for key, shape in golden["detector"].items()
        if not key.endswith("relative_position_index")
    }
    assert not detector.load_state_dict(weights, strict=False).unexpected_keys
    in_float64(detector)
    clip, golden["clip"] = tiny_open_clip()
    in_float64(in_float64(clip, "encode_image"), "encode_text")
    tokenizer = open_clip.get_tokenizer("ViT-L-14")
    golden["tokens"] = {}

    def recorded_tokenizer(texts):
        tokens = tokenizer(texts)
        for text, row in zip(texts, tokens.tolist()):
            golden["tokens"][text] = row[: row.index(49407) + 1]
        return tokens

    logits = []

    def recorded_classification(*arguments, **options):
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # of the logits
            result = run_classification(*arguments, **options)
        logits.append(result[0].numpy())
        return result

    zsc.tqdm = lambda items, *arguments, **options: items
    inference_detector, loader = cache(apis.inference_detector), torch.utils.data.DataLoader
    torch.utils.data.DataLoader = lambda crops, batch_size, num_workers: loader(crops, batch_size)
    run_classification, zsc.run_classification = zsc.run_classification, recorded_classification
    names = {
        "np": np, "torch": torch, "Image": PILImage, "ImageOps": ImageOps, "json": json, "zsc": zsc, "DEVICE": "cpu",
        "args": types.SimpleNamespace(options={}), "inference_detector": inference_detector,
        "object_detector": detector, "clip_model": clip, "tokenizer": recorded_tokenizer,
        "transform": open_clip.transform.image_transform(CLIP["size"], is_train=False),
        "classnames": (repository / "evaluation/object_names.txt").read_text().split("\n")[:80],
        "NMS_THRESHOLD": 1.0, "POSITION_THRESHOLD": 0.1,
    }  # fmt: skip
    functions = official_functions(repository, names)
    arrays, golden["images"] = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(PICTURES):
            file = os.path.join(folder, f"{number}.png")
            picture(*size).save(file)
            boxes, masks = inference_detector(detector, file)
            classes, mask_logits = outputs[-1]  # of every layer
            for label, found in enumerate(boxes):
                for row, mask in zip(found, masks[label]):
                    if row[4] > 0.3:
                        arrays.setdefault(f"boxes{number}", []).append([label, *row])
                        arrays.setdefault(f"masks{number}", []).append(np.packbits(mask))
            arrays[f"class_logits{number}"] = classes[-1][0].numpy()
            arrays[f"mask_logits{number}"] = mask_logits[-1][0, :, ::24, ::24].numpy()
            arrays[f"colors{number}"] = []
            image = PILImage.open(file)
            for label, found in enumerate(boxes):
                crops = [(row, mask) for row, mask in zip(found, masks[label]) if row[4] > 0.3]
                if crops:
                    for name in CLIP_CLASSES:
                        functions["color_classification"](image, crops, name)
                        arrays[f"colors{number}"].append(logits[-1])
            arrays[f"colors{number}"] = np.concatenate(arrays[f"colors{number}"])
            print(f"picture {number}: {len(arrays[f'boxes{number}'])} objects")
            golden["images"].append(evaluated(functions, file, boxes, names["classnames"]))
    arrays = {key: np.array(value) for key, value in arrays.items()}
    record = json.dumps(golden, separators=(",", ":")).encode()
    np.savez_compressed(here / "geneval.npz", record=np.frombuffer(record, dtype=np.uint8), **arrays)


def evaluated(functions: dict, file: str, boxes: list, classes: list[str]) -> list[dict]:
    """Official results for lines of metadata that the image may or may not satisfy, with several settings."""
    present = [name for name, found in zip(classes, boxes) if (found[:, 4] > 0.3).any()] + ["zebra"]
    rng, results = np.random.default_rng(len(present)), []
    for number in range(24):
        tag = TAGS[number % 6]
        first, second = (str(name) for name in rng.choice(present, 2, replace=False))
        include = [{"class": first, "count": 1}]
        include += [{"class": second, "count": 1}] if tag in ("two_object", "position", "color_attr") else []
        if tag == "position":
            include[1]["position"] = [str(rng.choice(RELATIONS)), 0]
        metadata = {"tag": tag, "include": include, "prompt": f"prompt {number}"}
        if tag == "counting":
            include[0]["count"] = 1 + number // 12
            metadata["exclude"] = [{"class": first, "count": include[0]["count"] + 1}]
        variants = COLORS if tag == "colors" else [str(rng.choice(COLORS))]
        for color in variants:
            if tag in ("colors", "color_attr"):
                metadata["include"] = include = [{**clause, "color": color} for clause in include]
            settings = {"threshold": [0.3, 0.1][number % 2], "counting_threshold": [0.9, 0.5][number % 2]}
            settings["max_objects"] = [16, 2][number // 6 % 2]
            functions |= {name.upper(): value for name, value in settings.items()}
            result = functions["evaluate_image"](file, metadata)
            found = {name: [row[:4] for row in rows] for name, rows in json.loads(result["details"]).items()}
            results.append({"metadata": json.loads(json.dumps(metadata)), "settings": settings, "found": digest(found)})
            results[-1]["correct"] = bool(result["correct"])
    return results


if __name__ == "__main__":
    main()
