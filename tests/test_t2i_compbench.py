"""metrics/t2i_compbench.py against T2I-CompBench's own code (golden/make_t2i_compbench.py) and against a grammar."""

import json
import math
from functools import partial
from types import SimpleNamespace

import make_t2i_compbench as golden
import numpy as np
import pytest
import spacy
import t2i_compbench as bench
import torch
import transformers
from conftest import ROOT, check_unfit, make_tiny_pickscore
from double import float64, in_float64
from PIL import Image as PILImage


VOCAB = spacy.blank("en").vocab
RULES = json.loads((ROOT / "tests/golden/t2i_compbench_rules.json").read_text())
BLIP = json.loads((ROOT / "tests/golden/t2i_compbench_blip.json").read_text())
KINDS = ("attribute", "spatial", "complex")


@pytest.fixture(scope="module")
def parsed() -> dict[str, list]:
    """(sentence of the grammar, its Doc), 120 of each kind."""
    return {kind: [(one, one.doc(VOCAB)) for one in golden.sentences(kind, 120)] for kind in KINDS}


def test_questions_are_those_of_the_grammar_and_of_the_official_code(parsed):
    found = [(one, bench.noun_questions(doc)) for kind in KINDS for one, doc in parsed[kind]]
    dropped = {"top", "the side", "the left", "the right"}
    assert [asked for _, asked in found] == [
        [f"{phrase}?" for phrase in one.phrases if phrase not in dropped][:8] for one, _ in found
    ]
    assert [asked for _, asked in found] == RULES["questions"]
    phrases = [phrase for one, _ in found for phrase in one.phrases]
    assert dropped | {"the top", "side"} < set(phrases)  # the last two are asked
    assert max(len(one.phrases) for one, _ in found) > 8


def test_vqa_score():
    """The official products; phrases that are not there count 1."""
    given = golden.probabilities(len(RULES["questions"])).tolist()
    scores = [bench.vqa_score(row[: len(asked)]) for row, asked in zip(given, RULES["questions"])]
    assert scores == RULES["vqa_score"]
    assert bench.vqa_score([]) == 1 and bench.vqa_score([0.99996]) == 1 and bench.vqa_score([0.5, 0.00004]) == 0


def test_spatial_scores_are_the_official_ones(parsed):
    """Objects, relation, detections and threshold together, through the prompts file's row."""
    simple = [doc for _, doc in parsed["spatial"]] * 4
    tagged = [doc for _, doc in parsed["complex"]] + golden.tagged_docs(VOCAB, 500)
    objects = set()
    for name, category, docs in (("spatial", "spatial", simple), ("complex", "complex", tagged)):
        images = golden.detections(len(docs), [[t.text for t in doc if t.pos_ in ("NOUN", "PROPN")] for doc in docs])
        rows = [bench.prompt_row(doc.text.strip(), category, ["unidet"], doc) for doc in docs]
        scores = [bench.spatial_score(found, row["objects"], row["relation"]) for found, row in zip(images, rows)]
        assert scores == pytest.approx(RULES[name], abs=1e-12)
        assert sum(score > 0 for score in scores) > 80
        objects |= {tuple(row["objects"]) for row in rows}
    assert () in objects and any(pair and pair[0] == pair[-1] for pair in objects)


def test_positions_are_the_official_ones():
    cases = golden.position_cases(1500)
    scores = [bench.position_score(*case) for case in cases]
    assert scores == pytest.approx(RULES["position"], abs=1e-12)
    ious = [bench.box_iou(torch.tensor([box1]), torch.tensor([box2])).item() for _, box1, box2 in cases]
    assert min(ious) == 0 and max(ious) > 0.5 and 50 < sum(0 < score < 1 for score in scores)
    assert bench.position_score("on the left of", (0, 0, 0, 0), (9, 0, 9, 0)) == 1  # boxes without area do not overlap


def test_three_in_one_and_text_of_complex_prompts(parsed):
    docs = [doc for _, doc in parsed["complex"]]
    rows = [bench.prompt_row(doc.text.strip(), "complex", ["clip"], doc) for doc in docs]
    assert [row["clip_text"] for row in rows] == RULES["clip_text"]
    assert sum("red" in doc.text for doc in docs) > sum("red" in text for text in RULES["clip_text"]) == 0
    parts = [bench.complex_parts(prompt, *golden.SUBSETS.values()) for prompt in golden.SUBSET_PROMPTS]
    assert [len(one) for one in parts] == [2] * 11 + [3] * 5  # prompt 4 is in both lists: spatial
    given = dict(zip(("blip_vqa", "unidet", "clip"), golden.part_scores()))
    metric = object.__new__(bench.T2ICompBench)  # scores without models
    metric.vqa_scores, metric.spatial_scores, metric.clip_scores = (
        lambda images, rows, part=part: [given[part][row["number"], image] for image, row in zip(images, rows)]
        for part in given
    )
    rows = [{"category": "complex", "parts": one, "number": i} for i, one in enumerate(parts) for _ in range(10)]
    scores = metric.score([number % 10 for number in range(len(rows))], [""] * len(rows), rows)
    assert [score["complex"] for score in scores] == pytest.approx(RULES["three_in_one"], abs=1e-12)
    assert all(math.isnan(value) for key, value in scores[0].items() if key != "complex")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Settings that name tiny models: BLIP with the weights of the golden file, CLIP with random ones."""
    folder = tmp_path_factory.mktemp("compbench")
    (folder / "config.json").write_text(json.dumps(golden.CONFIG))
    weights = {key: torch.from_numpy(golden.weight(key, tuple(shape))) for key, shape in BLIP["tiny_keys"].items()}
    for key, value in weights.items():
        if key.endswith("position_ids"):
            weights[key] = torch.arange(value.numel())[None]
    torch.save({"model": weights}, folder / "blip.pth")
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(golden.vocabulary()) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder / "bert/vocab.txt"), do_lower_case=True)
    tokenizer.save_pretrained(folder / "bert")
    make_tiny_pickscore(folder / "clip")
    return {"blip": f"{folder}/blip.pth", "tokenizer": f"{folder}/bert", "clip": f"{folder}/clip"}


def test_blip_is_the_official_model(models):
    """Random weights: pixels, tokens and probabilities as the official code has them, which pads the questions."""
    vqa = bench.BlipVQA(torch.device("cpu"), 2, models["blip"], models["tokenizer"])
    pictures = [PILImage.fromarray(picture) for picture in golden.pictures()]
    assert [[bench.clean_question(one) for one in row] for row in golden.QUESTIONS] == BLIP["cleaned"]
    assert [[vqa.tokenize(one) for one in row] for row in golden.QUESTIONS] == BLIP["tokens"]
    sums = [bench.stretched_pixels(picture, vqa.size).double().abs().sum().item() for picture in pictures]
    assert sums == pytest.approx(BLIP["pixel_sums"], rel=1e-7)
    single = np.array(vqa.probabilities(pictures, golden.QUESTIONS))
    in_float64(vqa.model.double().vision_model)
    vqa.answer = float64()(vqa.answer)
    found = np.array(vqa.probabilities(pictures, golden.QUESTIONS))
    official = np.array(BLIP["probabilities"])
    assert np.abs(found - official).max() < 1e-9 and np.abs(found - single).max() < 1e-4
    assert official.std(axis=0).min() > 1e-3 and official.std(axis=1).min() > 1e-3
    again = vqa.probabilities(pictures[2:3], [golden.QUESTIONS[2][1:]])  # alone, and without the first question
    assert again[0] == pytest.approx(found[2, 1:], abs=1e-9)


def test_full_size_keys_are_known():
    """Every key and shape of the official model, and of the one it becomes."""
    keys = {}
    for pattern, entry in BLIP["full_size_keys"].items():
        numbered = [pattern.replace("#", str(number)) for number in range(entry["number"])]
        keys |= {key: tuple(entry["shape"]) for key in numbered}
    shared = {key for key in keys if "cls.predictions.decoder." in key}
    assert len(shared) == 2
    with torch.device("meta"):
        weights = bench.blip_weights({key: torch.empty(shape) for key, shape in keys.items() if key not in shared})
        config = transformers.BlipConfig(vision_config=bench.BLIP_VISION, text_config=bench.BLIP_TEXT)
        model = transformers.BlipForQuestionAnswering(config)
    needed = {key: value.shape for key, value in model.state_dict().items() if key not in shared}
    assert {key: value.shape for key, value in weights.items()} == needed
    assert shared < set(model.state_dict())
    vision, text = model.vision_model.config, model.text_decoder.config
    assert BLIP["full_size"] == {
        "image_size": vision.image_size,
        "vision": [vision.num_attention_heads, vision.hidden_act, vision.layer_norm_eps],
        "text": [text.num_attention_heads, text.hidden_act, text.layer_norm_eps],
    }


def test_wrong_weights_are_named(models, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(golden.CONFIG))
    weights, answer = torch.load(models["blip"], weights_only=True)["model"], "text_decoder.cls.predictions"
    cases = {
        "missing vision_model.post_layernorm.bias": {"visual_encoder.norm.bias": None},
        "unexpected extra": {"extra": torch.zeros(1)},
        "mismatched .*cls.predictions.bias": {f"{answer}.bias": torch.zeros(5), f"{answer}.decoder.bias": None},
        "decoder.weight differs": {f"{answer}.decoder.weight": torch.zeros(30524, 24)},
    }
    load = partial(bench.BlipVQA, torch.device("cpu"), 1, f"{tmp_path}/blip.pth", models["tokenizer"])
    check_unfit(load, lambda changed: torch.save({"model": changed}, tmp_path / "blip.pth"), weights, cases)
    settings = {"detector": "unidet", "unidet": "official", **models}
    rows = [{"parts": ["clip", "blip_vqa"]}, {"parts": ["unidet"]}]
    bench.T2ICompBench.prepare(rows[:1], settings)  # no detector is needed
    for setting in ("blip", "clip", "unidet"):
        with pytest.raises((OSError, ValueError), match="nowhere|cached snapshot"):
            bench.T2ICompBench.prepare(rows, {**settings, setting: "nowhere"})
    content = (tmp_path / "blip.pth").read_bytes()
    (tmp_path / "blip.pth").write_bytes(content[: len(content) // 2])  # found before anything is drawn
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        bench.T2ICompBench.prepare(rows[:1], {**settings, "blip": f"{tmp_path}/blip.pth"})


def test_scores_of_a_whole_file(models, monkeypatch):
    """Each image has its category's score and NaN elsewhere, whatever is scored beside it."""
    boxes, made = [("dog", 1.0, (0, 0, 10, 10)), ("cat", 0.5, (100, 0, 110, 10))], []
    detector = SimpleNamespace(detect=lambda images: [boxes] * len(images))
    monkeypatch.setattr(bench.unidet, "UniDet", lambda device, weights, **_: made.append(weights) or detector)
    asked = {"questions": ["a red dog?", "the cat?"]}
    spatial = {"objects": ["dog", "cat"], "relation": "on the left of"}
    text = {"clip_text": "A dog <&amp;  a cat"}
    rows = [
        {"category": "color", "parts": ["blip_vqa"], **asked},
        {"category": "spatial", "parts": ["unidet"], **spatial},
        {"category": "non_spatial", "parts": ["clip"], **text},
        {"category": "complex", "parts": ["blip_vqa", "unidet", "clip"], **asked, **spatial, **text},
        {"category": "texture", "parts": ["blip_vqa"], "questions": []},
    ]
    bench.T2ICompBench.check_rows(rows)
    picture = PILImage.fromarray(golden.pictures()[2])
    metric = bench.T2ICompBench("cpu", 8, unidet="own.pth", **models)
    together = metric.score([picture] * 5, [""] * 5, rows)
    alone = [metric.score([picture], [""], [row])[0] for row in rows]
    for row, one, other in zip(rows, together, alone):
        assert list(one) == list(bench.CATEGORIES)
        assert [key for key, value in one.items() if not math.isnan(value)] == [row["category"]]
        assert one == pytest.approx(other, abs=1e-6, nan_ok=True)
    color, spatial_score, cosine, mixed, empty = (one[row["category"]] for one, row in zip(together, rows))
    assert spatial_score == 0.25 + 0.125 + 0.5 and empty == 1 and made == ["own.pth"]
    assert mixed == pytest.approx((color + spatial_score + cosine) / 3)

    clip = transformers.CLIPModel.from_pretrained(models["clip"])
    words = transformers.AutoTokenizer.from_pretrained(models["clip"])(["a dog <& a cat"], return_tensors="pt")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = clip(**words, pixel_values=pixels)
    assert cosine == pytest.approx((output.logits_per_image / clip.logit_scale.exp()).item(), abs=1e-6)

    scores = {key: np.array([[one[key], one[key] + 0.5, np.nan] for one in together]) for key in bench.CATEGORIES[1:]}
    figures = bench.T2ICompBench.official(rows, scores | {"color": np.full((5, 3), np.nan)}, {})  # no image of a color
    means = {row["category"]: one[row["category"]] + 0.25 for row, one in zip(rows[1:], together[1:])}
    assert figures == pytest.approx(means)


def test_other_detectors(tmp_path):
    """Detections from a file, and of a transformers detector in the official detector's pixels."""
    picture = PILImage.fromarray(golden.pictures()[2])  # 90 wide, 50 high
    picture.save(tmp_path / "one.png")
    record = {"image": "one.png", "detections": [["dog", 0.75, [0, 0, 10, 10]]]}
    (tmp_path / "found.jsonl").write_text(json.dumps(record) + "\n")
    stored = bench.T2ICompBench("cpu", 1, detector=f"{tmp_path}/found.jsonl").detector
    assert stored.detect([picture, picture]) == [[("dog", 0.75, (0.0, 0.0, 10.0, 10.0))]] * 2
    with pytest.raises(ValueError, match="has no detections for an image"):
        stored.detect([picture.rotate(180)])

    assert bench.unidet.resized(picture).size == (480, 266)
    assert bench.unidet.resized(PILImage.new("L", (1024, 1024))).size == (479, 479)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.YolosConfig(**sizes, image_size=[32, 32], num_detection_tokens=20, num_labels=2)
    config.id2label = {0: "dog", 1: "cat"}
    model = transformers.YolosForObjectDetection(config)
    for weights in model.parameters():
        torch.nn.init.normal_(weights)
    model.save_pretrained(tmp_path / "yolos")
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor.save_pretrained(tmp_path / "yolos")
    detector = bench.T2ICompBench("cpu", 1, detector=f"{tmp_path}/yolos").detector
    (found,) = detector.detect([picture])
    assert len(found) > 5 and {label for label, _, _ in found} <= {"dog", "cat"}
    assert [score for _, score, _ in found] == sorted({score for _, score, _ in found}, reverse=True)
    assert 100 < max(box[2] for _, _, box in found) <= 720  # of 480, not of 90 or 1


def test_prompts_command(tmp_path, monkeypatch, parsed, capsys):
    docs = {doc.text.strip(): doc for kind in KINDS for _, doc in parsed[kind]}
    lines = {kind: [doc.text.strip() for _, doc in parsed[kind][:6]] for kind in KINDS}
    files = {"color": lines["attribute"], "spatial": lines["spatial"], "complex": lines["complex"]}
    files |= {"non_spatial": ["A cat sits.", "", "A cat sits."]}
    for name, content in files.items():
        (tmp_path / f"{name}_val.txt").write_text("\n".join(content))
    (tmp_path / "complex_val_spatial.txt").write_text("\n".join(lines["complex"][:2]))
    (tmp_path / "complex_val_action.txt").write_text(lines["complex"][2])
    parser = type("Parser", (), {"meta": {"version": "3.8.0"}, "__call__": lambda self, text: docs[text]})()
    monkeypatch.setattr(bench, "load_parser", lambda name: parser)
    output = tmp_path / "out" / "compbench.jsonl"
    command = ["prompts", "--folder", str(tmp_path), "--output", str(output), "--categories"]
    bench.main([*command, "color", "spatial", "non_spatial", "complex"])
    assert "19 prompts, parsed by en_core_web_sm 3.8.0" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    bench.T2ICompBench.check_rows(rows)
    assert [row["category"] for row in rows] == ["color"] * 6 + ["spatial"] * 6 + ["non_spatial"] + ["complex"] * 6
    assert [len(row["parts"]) for row in rows if row["category"] == "complex"] == [2, 2, 2, 3, 3, 3]
    cat = "A cat sits."
    assert rows[12] == {"prompt": cat, "category": "non_spatial", "parts": ["clip"], "clip_text": cat}

    (tmp_path / "shape_val.txt").write_text(lines["attribute"][0])
    with pytest.raises(ValueError, match="is in color and in shape"):
        bench.main([*command, "color", "shape"])
    monkeypatch.undo()
    monkeypatch.setattr(spacy, "load", lambda name: (_ for _ in ()).throw(OSError("E050")))
    with pytest.raises(SystemExit, match="python -m spacy download en_core_web_sm$"):
        bench.main([*command, "color"])
    bench.main([*command, "non_spatial"])  # needs no parser


def test_rows_are_checked():
    good = {"prompt": "a", "category": "color", "parts": ["blip_vqa"], "questions": []}
    bench.T2ICompBench.check_rows([good])
    for change, wrong in (
        ({"category": None}, "category is None"),
        ({"parts": ["vqa"]}, "parts is .*'vqa'"),
        ({"questions": None}, "questions is None"),
        ({"parts": ["unidet"], "objects": ["dog", "cat"]}, "relation is None"),
    ):
        with pytest.raises(ValueError, match=rf"row 2 \('a'\): column {wrong}.*metrics/t2i_compbench.py prompts"):
            bench.T2ICompBench.check_rows([good, good | change])
