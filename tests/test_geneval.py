# SPDX-License-Identifier: Apache-2.0
"""metrics/geneval.py against the official code: its rules, MMDetection's detector, its colours, its summary.

What the official code gave stands in golden/geneval.npz; golden/make_geneval.py says how it was made.
"""

import io
import json
import math
from email.message import Message
from functools import cache, partial

import geneval
import make_geneval
import numpy as np
import pytest
import torch
from conftest import ROOT, check_unfit
from double import float64, in_float64
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file


ARRAYS = np.load(ROOT / "tests" / "golden" / "geneval.npz")
GOLDEN = json.loads(ARRAYS["record"].tobytes())


def test_judge_is_official():
    """4,900 random sets of detections, with all edges."""
    cases, verdicts = make_geneval.random_cases(), ""
    assert make_geneval.digest(cases) == GOLDEN["cases"]["digest"]
    for case in cases:
        metadata, objects, colors = case["metadata"], case["objects"], case["colors"]
        asked = []

        def color_of(name, box, objects=objects, colors=colors, asked=asked):
            asked.append((name, objects[name].index(box)))
            return colors[name][asked[-1][1]]

        correct, reason = geneval.judge(metadata, objects, color_of)
        assert correct is (reason == "")
        limits = {clause["class"]: 0 for clause in metadata["include"]}
        for clause in metadata["include"]:
            limits[clause["class"]] = max(limits[clause["class"]], clause["count"] if "color" in clause else 0)
        assert all(number < limits[name] for name, number in asked)  # only the best boxes are asked for
        verdicts += str(int(correct))
    assert verdicts == GOLDEN["cases"]["verdicts"]
    for tag in make_geneval.TAGS:  # every kind of prompt has both verdicts
        found = [verdict for case, verdict in zip(cases, verdicts) if case["metadata"]["tag"] == tag]
        assert 0.05 < found.count("1") / len(found) < 0.95


def test_judge_says_why():
    box = [0, 0, 10, 10]
    few = geneval.judge({"include": [{"class": "clock", "count": 2}]}, {}, None)
    assert few == (False, "expected clock>=2, found 0")
    scene = [{"class": "dog", "count": 1, "color": "red"}, {"class": "cup", "count": 1, "position": ["above", 0]}]
    reason = "expected cup above target, found below and right of target"
    found = {"dog": [box, box], "cup": [[60, 60, 70, 70]]}
    assert geneval.judge({"include": scene}, found, lambda name, box: "red") == (False, reason)
    empty = {"class": "dog", "count": 1, "color": None, "position": None}  # as a table of rows would hold it
    assert geneval.judge({"include": [empty], "exclude": None}, {"dog": [box]}, None) == (True, "")


def mmdet_weights() -> dict[str, torch.Tensor]:
    """The state dict of the small MMDetection model that golden/make_geneval.py ran."""
    weights = {}
    for key, shape in GOLDEN["detector"].items():
        is_index = key.endswith("relative_position_index")
        weights[key] = torch.zeros(shape) if is_index else torch.tensor(make_geneval.detector_weight(key, tuple(shape)))
    return weights


def detector_config(**changes) -> geneval.Mask2FormerConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = geneval.SwinConfig(**make_geneval.BACKBONE, out_features=stages)
    return geneval.Mask2FormerConfig(backbone_config=backbone, **{"num_labels": 80} | make_geneval.SIZES | changes)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with the detector as an MMDetection file beside a config.json, and CLIP as a folder of transformers."""
    import train_generators
    from transformers import CLIPConfig, CLIPModel

    from build_synpic import hf_clip_weights

    folder, sizes = tmp_path_factory.mktemp("checkpoints"), make_geneval.CLIP
    (folder / "mmdet").mkdir()
    meta = {"CLASSES": ("person",), "epoch": 50}
    torch.save({"meta": meta, "state_dict": mmdet_weights()}, folder / "mmdet" / "detector.pth")
    detector_config().to_json_file(folder / "mmdet" / "config.json")
    shared = {"hidden_size": sizes["width"], "intermediate_size": 4 * sizes["width"], "hidden_act": "quick_gelu"}
    shared |= {"num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"]}
    text = {"vocab_size": sizes["vocabulary"], "max_position_embeddings": sizes["context"], "eos_token_id": 2}
    config = CLIPConfig(
        text_config=shared | text,
        vision_config=shared | {"image_size": sizes["size"], "patch_size": sizes["patch"]},
        projection_dim=sizes["embed"],
    )
    weights = {key: torch.tensor(make_geneval.weight(key, tuple(shape), 2.0)) for key, shape in GOLDEN["clip"].items()}
    clip = CLIPModel(config)
    clip.load_state_dict(hf_clip_weights(weights))
    clip.save_pretrained(folder / "clip")
    train_generators.make_tokenizer().save_pretrained(folder / "clip")
    return folder


class OfficialTokens:
    """The tokens that open_clip's tokenizer gave for the prompts of the recorded run."""

    def __call__(self, prompts, **options):
        from transformers import BatchEncoding

        rows = [torch.tensor(GOLDEN["tokens"][prompt]) for prompt in prompts]
        fields = {"input_ids": (rows, 49407), "attention_mask": ([torch.ones_like(row) for row in rows], 0)}
        pad = torch.nn.utils.rnn.pad_sequence
        return BatchEncoding({n: pad(v, batch_first=True, padding_value=value) for n, (v, value) in fields.items()})


@pytest.fixture(scope="module")
def metric(checkpoints):
    """In float64, as the golden values: the detector's thresholded masks enlarge rounding."""
    detector, clip = str(checkpoints / "mmdet" / "detector.pth"), str(checkpoints / "clip")
    metric = geneval.GenEval("cpu", 3, detector=detector, clip=clip)
    metric.tokenizer = OfficialTokens()
    in_float64(metric.detector)
    in_float64(in_float64(metric.clip, "get_image_features"), "get_text_features")
    return metric


@pytest.fixture(scope="module")
def outputs(metric) -> list:
    """(picture, class logits, mask logits, sizes) of each picture."""
    found = []
    for size in make_geneval.PICTURES:
        image = make_geneval.picture(*size)
        pixels, resized = geneval.detector_input(image, "cpu")
        with torch.inference_mode():
            output = metric.detector(pixel_values=pixels[None])
        sizes = pixels.shape[1:], resized, image.size[::-1]
        found.append((image, output.class_queries_logits[0], output.masks_queries_logits[0], sizes))
    return found


@pytest.mark.parametrize("size", make_geneval.INPUTS, ids=str)
def test_input_is_official(size):
    """OpenCV's resize, MMDetection's padding and normalisation: every bit."""
    noise = make_geneval.noise(*size)
    pixels, (high, wide) = geneval.detector_input(PILImage.fromarray(noise), "cpu")
    bytes_, floats = GOLDEN["inputs"]["x".join(map(str, size))]
    assert make_geneval.digest(pixels.permute(1, 2, 0).contiguous().numpy()) == floats
    resized = geneval.resize_bilinear(torch.from_numpy(noise), high, wide)
    padded = np.full((*pixels.shape[1:], 3), geneval.PADDING, dtype=np.uint8)
    padded[:high, :wide] = resized.numpy()
    assert make_geneval.digest(padded) == bytes_


def test_detector_is_official(outputs):
    """Logits of MMDetection's module; boxes, scores and masks of its instance segmentation."""
    for number, (_, classes, masks, sizes) in enumerate(outputs):
        np.testing.assert_allclose(classes, ARRAYS[f"class_logits{number}"], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(masks[:, ::24, ::24], ARRAYS[f"mask_logits{number}"], rtol=1e-9, atol=1e-9)
        with float64():
            objects = geneval.find_objects(classes, masks, *sizes, 0.3, 100)
        expected = {}
        for (label, *box, score), mask in zip(ARRAYS[f"boxes{number}"].tolist(), ARRAYS[f"masks{number}"]):
            expected.setdefault(geneval.CLASSES[int(label)], []).append((score, box, mask))
        assert {name: len(found) for name, found in objects.items()} == {n: len(found) for n, found in expected.items()}
        for name, found in objects.items():
            by_score = sorted(expected[name], key=lambda row: -row[0])
            for detection, (score, box, mask) in zip(found, by_score, strict=True):
                assert detection.score == pytest.approx(score, abs=1e-9)
                assert list(detection[:4]) == box
                assert np.array_equal(np.packbits(detection.mask), mask)


def test_colors_are_official(metric, outputs):
    """Crops, CLIP's transform, the prompts' mean directions: the logits of open_clip and clip_benchmark."""
    seen = set()
    for number, (image, classes, masks, sizes) in enumerate(outputs):
        objects = geneval.find_objects(classes, masks, *sizes, 0.3, 100)
        # The recorded run took the objects of a class in the order of the detector's outputs.
        order = iter(ARRAYS[f"colors{number}"])
        labels = ARRAYS[f"boxes{number}"][:, 0].astype(int).tolist()
        for label in dict.fromkeys(labels):
            rows = [row for row in ARRAYS[f"boxes{number}"] if int(row[0]) == label]
            by_score = {round(float(found.score), 3): found for found in objects[geneval.CLASSES[label]]}
            found = [by_score[min(by_score, key=lambda score, row=row: abs(score - row[5]))] for row in rows]
            for name in make_geneval.CLIP_CLASSES:
                for detection in found:
                    expected = next(order)
                    pixels = geneval.clip_input(geneval.masked_crop(image, detection), make_geneval.CLIP["size"])
                    with torch.inference_mode():
                        features = metric.clip.get_image_features(pixels[None]).pooler_output
                        logits = 100 * geneval.unit(features, dim=-1) @ metric.color_classifier(name)
                        assert metric.color_of(image, name, detection) == geneval.COLORS[expected.argmax()]
                    np.testing.assert_allclose(logits[0], expected, rtol=1e-9, atol=1e-9)
                    seen.add(expected.argmax())
        assert next(order, None) is None
    assert len(seen) > 2


def test_results_are_official(metric, outputs):
    """evaluate_image of the official script, from the file to the verdict."""
    verdicts = []
    for (image, classes, masks, sizes), records in zip(outputs, GOLDEN["images"], strict=True):

        @cache
        def objects_at(threshold, max_objects, classes=classes, masks=masks, sizes=sizes):
            return geneval.find_objects(classes, masks, *sizes, threshold, max_objects)

        for record in records:
            settings, metadata = record["settings"], record["metadata"]
            threshold = settings["counting_threshold" if metadata["tag"] == "counting" else "threshold"]
            objects = objects_at(threshold, settings["max_objects"])
            boxes = {name: [list(detection[:4]) for detection in found] for name, found in objects.items()}
            assert make_geneval.digest(boxes) == record["found"], (settings, metadata)
            correct, reason = geneval.judge(metadata, objects, partial(metric.color_of, image))
            assert correct == record["correct"], (metadata, reason)
            verdicts.append((metadata["tag"], correct))
    assert {tag for tag, correct in verdicts if correct} >= {"single_object", "two_object", "counting", "colors"}
    assert {tag for tag, correct in verdicts if not correct} == set(geneval.TAGS)


def test_full_size():
    """The loader takes every key of the published architecture, and fills every weight of transformers' model."""
    weights = {key: torch.zeros(1).expand(shape) for key, shape in GOLDEN["full_size"].items()}
    model = geneval.load_strictly(
        geneval.Mask2FormerForUniversalSegmentation,
        None,
        geneval.UNUSED,
        config=geneval.official_config(),
        state_dict=geneval.detector_weights(weights),
    )
    left = {key for key, value in model.state_dict().items() if value.any()}
    assert left <= {"model.pixel_level_module.encoder.swin.layernorm.weight", "criterion.empty_weight"}
    assert sum(parameter.numel() for parameter in model.parameters()) > 68e6


CLOCKS = {"include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}
SIDES = {"include": [{"class": "bed", "count": 1}, {"class": "tv", "count": 1, "position": ["left of", 0]}]}
OFFICIAL_ROWS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", **CLOCKS, "prompt": "a photo of two clocks"},
    {"tag": "position", **SIDES, "prompt": "a photo of a tv left of a bed"},
]


def test_score_is_that_of_the_recorded_run(metric, outputs):
    """Pictures of several sizes and kinds together. Counting has a threshold of its own."""
    usual, images, rows, expected = {"threshold": 0.3, "counting_threshold": 0.9, "max_objects": 16}, [], [], []
    for number, tag, correct in ((3, "single_object", True), (1, "position", False), (3, "counting", True)):
        records = [r for r in GOLDEN["images"][number] if r["settings"] == usual and r["correct"] == correct]
        images.append(outputs[number][0])
        rows.append(next(record["metadata"] for record in records if record["metadata"]["tag"] == tag))
        expected.append(float(correct))
    assert metric.score(images, [""] * 3, rows) == expected


def test_score_turns_pictures(metric, monkeypatch):
    """As OpenCV and the official script do: by the camera's orientation, without transparency."""
    seen, image = [], make_geneval.picture(41, 120)
    monkeypatch.setattr(metric, "detect", lambda images, rows: [seen.extend(images) or {}])
    turned = image.transpose(PILImage.Transpose.ROTATE_90).convert("RGBA")
    turned.putalpha(7)
    turned.getexif()[274] = 6  # to be shown turned by 270 degrees
    assert metric.score([turned], [""], OFFICIAL_ROWS[:1]) == [0.0]
    assert seen[0].mode == "RGB" and np.array_equal(seen[0], image)


def test_official_summary():
    """summary_scores.py, with plain loops; an image that is missing counts nowhere."""
    rng, rows = np.random.default_rng(0), [{"tag": geneval.TAGS[number % 4]} for number in range(30)]
    scores = rng.integers(0, 2, (30, 4)).astype(float)
    scores[rng.random((30, 4)) < 0.3] = math.nan
    scores[3] = math.nan
    by_tag, prompts = {}, []
    for row, values in zip(rows, scores.tolist()):
        known = [value for value in values if value == value]
        by_tag.setdefault(row["tag"], []).extend(known)
        prompts += [any(known)] if known else []
    expected = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    expected["overall"] = sum(expected.values()) / 4
    known = sum(by_tag.values(), [])
    expected |= {"correct_images": sum(known) / len(known), "correct_prompts": sum(prompts) / len(prompts)}
    assert geneval.GenEval.official(rows, {"": scores}, {}) == pytest.approx(expected)
    missing = geneval.GenEval.official(rows[:2], {"": scores[:2] * math.nan}, {})
    assert all(math.isnan(value) for value in missing.values())


def test_checkpoints(checkpoints, tmp_path):
    """A folder of transformers works like an MMDetection file; a checkpoint that does not fit is an error."""
    detector = geneval.load_detector(str(checkpoints / "mmdet" / "detector.pth"))
    detector.save_pretrained(tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "model.safetensors")
    tables = [key for key in saved if key.endswith(".relative_position_bias_table")]
    assert len(tables) > 4  # the checkpoint on the Hub was saved by a version that kept an index beside each
    saved |= {key.replace("bias_table", "index"): torch.zeros(49, 49, dtype=torch.long) for key in tables}
    save_file(saved, tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    again = geneval.load_detector(str(tmp_path / "folder")).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in detector.state_dict().items())

    file = tmp_path / "detector.pth"
    load, save = partial(geneval.load_detector, str(file)), lambda weights: torch.save(weights, file)
    key, name = "panoptic_head.transformer_decoder.post_norm.bias", "model.transformer_module.decoder.layernorm.bias"
    changes = {f"1 keys do not fit: missing {name}": {key: None}}
    changes["1 keys do not fit: unexpected neck.bias"] = {"neck.bias": torch.zeros(1)}
    detector_config().to_json_file(tmp_path / "config.json")
    check_unfit(load, save, mmdet_weights(), changes)
    detector_config(num_labels=11).to_json_file(tmp_path / "config.json")
    check_unfit(load, save, mmdet_weights(), {"mismatched .*class_predictor.bias.*81.*12": {}})
    geneval.Mask2FormerForUniversalSegmentation(detector_config(num_labels=11)).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match="has 11 classes, not the 80 of COCO"):
        geneval.load_detector(str(tmp_path / "few"))


def test_check_rows():
    dog = {"class": "dog", "count": 1}
    geneval.GenEval.check_rows(OFFICIAL_ROWS)
    for change, problem in (
        ({"tag": "count"}, "tag is 'count', not one of single_object"),
        ({"include": None}, "include names no object"),
        ({"include": [dog | {"class": "mouse"}]}, "the class of include 0 is 'mouse'"),
        ({"include": [dog | {"color": "gray"}]}, "the color of include 0 is 'gray'"),
        ({"include": [dog | {"position": ["above", 0]}]}, "the position of include 0 is"),
        ({"exclude": [dog | {"count": 0}]}, "the count of exclude 0 is 0"),
    ):
        with pytest.raises(ValueError, match=rf"^row 2 \('a photo of two clocks'\): {problem}.*; make the file with"):
            geneval.GenEval.check_rows([OFFICIAL_ROWS[0], OFFICIAL_ROWS[1] | change])


def test_prompts_command(tmp_path, capsys):
    source, output = tmp_path / "metadata.jsonl", tmp_path / "new" / "geneval.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in OFFICIAL_ROWS))
    geneval.main(["prompts", "--metadata", str(source), "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: 3 prompts\n"
    assert [json.loads(line) for line in output.read_text().splitlines()] == OFFICIAL_ROWS


def test_another_file_under_the_official_address_is_refused(tmp_path, monkeypatch):
    """It must have the digest that is part of its name; a connection that breaks off leaves nothing."""

    class Response(io.BytesIO):
        info = Message

    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(b"no detector"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match='expected "743b7d99"'):
        geneval.GenEval.prepare([], {"detector": "official", "clip": str(tmp_path)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
