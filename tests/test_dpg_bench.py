# SPDX-License-Identifier: Apache-2.0
"""DPG-Bench: its protocol against the official script, mPLUG against the official model (golden/make_dpg_bench.py)."""

import csv
import io
import json
import math
import shutil
from pathlib import Path

import dpg_bench
import make_dpg_bench as inputs
import numpy as np
import pytest
import torch
from conftest import ROOT, check_unfit
from double import in_float64
from dpg_bench import DPGBench
from safetensors.torch import save_file


GOLDEN = np.load(ROOT / "tests" / "golden" / "dpg_bench.npz")
N = len(inputs.QUESTIONS)


def official_weights(name: str) -> dict[str, torch.Tensor]:
    shapes = json.loads(str(GOLDEN[f"{name}_keys"]))
    return {key: torch.from_numpy(inputs.random_weight(key, tuple(shape))) for key, shape in shapes.items()}


@pytest.fixture(scope="module", params=inputs.STRIDES)
def mplug(request, tmp_path_factory):
    """A variant's name, and its folder in the official form."""
    folder = tmp_path_factory.mktemp(request.param)
    inputs.write_model(folder, inputs.STRIDES[request.param])
    weights = {f"model.{key}": value for key, value in official_weights(request.param).items()}
    torch.save({"module": weights}, folder / "pytorch_model.bin")  # the official code unwraps both
    return request.param, folder


def load(folder) -> DPGBench:
    return DPGBench(torch.device("cpu"), 5, model=str(folder))


@pytest.fixture(scope="module")
def exact(mplug) -> DPGBench:
    """The metric in float64, as the golden values are: the choice of an answer's words enlarges rounding."""
    metric = load(mplug[1])
    in_float64(metric.model, "encode_image")
    return metric


CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def rows_of(text: str) -> list[dict]:
    return dpg_bench.read_csv(io.StringIO(text))


@torch.no_grad()
def test_mplug_is_the_official_one(mplug, exact):
    name, metric = mplug[0], exact
    pixels = dpg_bench.prepare(inputs.picture(1), inputs.MPLUG["image_res"])
    np.testing.assert_array_equal(pixels[:, ::5, ::7], GOLDEN[f"{name}_pixels"])
    batch = metric.tokenize(inputs.QUESTIONS)
    np.testing.assert_array_equal(batch.input_ids, GOLDEN[f"{name}_ids"][N:])
    seen = batch.attention_mask.bool()
    image = metric.model.encode_image(pixels[None])
    np.testing.assert_allclose(image[0], GOLDEN[f"{name}_image"], **CLOSE)
    image, text = metric.model.fuse(image, batch.input_ids, seen)
    assert len(image) == (1 if name == "published" else N)
    np.testing.assert_allclose(image[min(3, len(image) - 1)], GOLDEN[f"{name}_fused_image"], **CLOSE)
    np.testing.assert_allclose(text, GOLDEN[f"{name}_fused_text"], **CLOSE)
    prefixes = torch.from_numpy(inputs.PREFIXES).expand(N, -1, -1)
    logits = metric.model.logits(prefixes, metric.model.contexts(image, text, seen))
    np.testing.assert_allclose(logits, GOLDEN[f"{name}_logits"], **CLOSE)


def test_answers_are_the_official_ones(mplug, exact, monkeypatch):
    """Tokens, scores and texts. An answer does not depend on the questions beside it."""
    name, answer, found = mplug[0], exact.model.answer, []
    monkeypatch.setattr(exact.model, "answer", lambda *given: [found.append(a) or a for a in answer(*given)])
    sequences = [[token for token in row if token >= 0] for row in GOLDEN[f"{name}_sequences"].tolist()]
    for batch_size in (3, 20):
        found.clear()
        monkeypatch.setattr(exact, "batch_size", batch_size)
        texts = [text for number in range(2) for text in exact.answer(inputs.picture(number), inputs.QUESTIONS)]
        assert texts == GOLDEN[f"{name}_texts"].tolist()
        assert [tokens for tokens, _ in found] == sequences
        np.testing.assert_allclose([score for _, score in found], GOLDEN[f"{name}_scores"], **CLOSE)
    assert "yes" in texts and len(set(texts)) > 4 and len(set(map(len, sequences))) > 2


def test_all_keys_of_the_full_size_mplug():
    """Without config files the model has the published sizes: no key is missing, and none is unknown."""
    shapes = json.loads(str(GOLDEN["full_keys"]))
    weights = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    with torch.device("meta"):
        model = dpg_bench.MPlug(dpg_bench.load_config(Path("no-such-folder")))
    converted = dpg_bench.convert_weights(weights, model)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_weights_in_safetensors_without_the_twins(mplug, tmp_path):
    """Programs that write safetensors leave out one of two tensors that share their memory."""
    name, folder = mplug
    inputs.write_model(tmp_path, inputs.STRIDES[name])
    weights = official_weights(name)
    for first, second in dpg_bench.TWINS.items():
        weights[first] = weights.pop(second)
    save_file(weights, tmp_path / "model.safetensors")
    expected = load(folder).model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in load(tmp_path).model.state_dict().items())


def test_download_from_modelscope(mplug, tmp_path, monkeypatch):
    """Each file is fetched once, from the address that modelscope's own package uses."""
    urls, start = [], "https://modelscope.cn/api/v1/models/iic/mplug/repo?Revision=master&FilePath="
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(url, file):
        urls.append(url)
        shutil.copy(mplug[1] / url.removeprefix(start), file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    DPGBench.prepare([], {"model": "modelscope:iic/mplug"})
    weights = load("modelscope:iic/mplug").model.state_dict()
    assert torch.equal(weights["visn_fc.bias"], official_weights(mplug[0])["visn_fc.bias"])
    assert urls == [start + file for file in ("config.yaml", "config_bert.json", "vocab.txt", "pytorch_model.bin")]


def test_other_weights_and_incomplete_files_are_an_error(tmp_path):
    inputs.write_model(tmp_path, 6)
    layer, weights, file = "encoder.layer.1.output.dense.bias", official_weights("published"), "pytorch_model.bin"
    changes = {
        "Missing.*text_encoder.1.output.dense.bias": {f"text_encoder.{layer}": None},
        f"Unexpected.*fusion_encoder.bert.{layer}": {f"fusion_encoder.bert.{layer}": torch.zeros(32)},
        "size mismatch for visn_fc.weight": {"visn_fc.weight": torch.zeros(32, 64)},
        "not finite: visn_fc.bias": {"visn_fc.bias": torch.full((32,), math.inf)},
    }
    check_unfit(lambda: load(tmp_path), lambda changed: torch.save(changed, tmp_path / file), weights, changes)
    torch.save(weights, tmp_path / file)
    settings = {"model": str(tmp_path)}
    DPGBench.prepare([], settings)
    for name in ("vocab.txt", file):  # a download that broke off: found before anything is drawn
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises((ValueError, RuntimeError), match="vocab.txt.* words, not |PytorchStreamReader"):
            DPGBench.prepare([], settings)
        (tmp_path / name).write_bytes(content)


class Answers(DPGBench):
    """The metric with given answers. An image is (item, number)."""

    def __init__(self, quirks: bool):
        self.quirks = quirks

    def answer(self, image, questions):
        return [inputs.answer(*image, question) for question in questions]


def benchmark(seed: int, n_images: int, quirks: bool) -> tuple[list[dict], dict]:
    """Rows, and the metric's scores for all images as evaluate.py collects them; item11 has no images."""
    rows = rows_of(inputs.make_csv(seed))
    DPGBench.check_rows(rows)
    images = [(row["item_id"], number) for row in rows for number in range(n_images)]
    repeated = [row for row in rows for _ in range(n_images)]
    values = Answers(quirks).score(images, [row["prompt"] for row in repeated], repeated)
    values = [{} if row["item_id"] == "item11" else value for row, value in zip(repeated, values)]
    keys = {key for value in values for key in value}
    scores = {key: np.array([value.get(key, math.nan) for value in values]).reshape(-1, n_images) for key in keys}
    return rows, scores


@pytest.mark.parametrize("seed, n_images", [*((seed, 4) for seed in range(6)), (0, 1), (1, 1)])
def test_quirks_are_the_official_ones(seed, n_images):
    """The figures that the official script prints; among them a first prompt whose first row is left out."""
    official = json.loads(str(GOLDEN[f"scores_{seed}_{n_images}"]))
    expected = {"score": official.pop("DPG-Bench score")}
    for name, value in official.items():
        expected[dpg_bench.category_keys(name.split("-")[0], name)["-" in name]] = value
    rows, scores = benchmark(seed, n_images, quirks=True)
    found = DPGBench.official(rows, scores, {"quirks": True})
    assert found == pytest.approx(expected, abs=1e-9)
    assert len(expected) == 1 + 5 + 8
    rows, scores = benchmark(seed, n_images, quirks=False)
    assert DPGBench.official(rows, scores, {"quirks": False})["score"] != pytest.approx(expected["score"], abs=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_without_quirks(seed):
    """All rows, all images; a parent that is not there is ignored."""
    items, categories, totals = {}, {}, []
    for line in csv.DictReader(io.StringIO(inputs.make_csv(seed))):
        items.setdefault(line["item_id"], {})[int(line["proposition_id"])] = line
    for item, lines in items.items():
        for number in range(4 if item != "item11" else 0):
            answers = {i: inputs.answer(item, number, line["question_natural_language"]) for i, line in lines.items()}
            right = {i: answer == "yes" for i, answer in answers.items()}
            for i, line in lines.items():
                broad, detailed = line["tuple"].split("(")[0].split("-", 1)
                for name in (broad.strip(), f"{broad.strip()}_{detailed.strip().replace('-', '_') or broad.strip()}"):
                    categories.setdefault(name, []).append(right[i])
            for i, line in lines.items():
                right[i] = right[i] and all(right.get(int(parent), True) for parent in line["dependency"].split(","))
            totals.append(100 * np.mean(list(right.values())))
    expected = {name: 100 * np.mean(values) for name, values in categories.items()} | {"score": np.mean(totals)}
    found = DPGBench.official(*benchmark(seed, 4, quirks=False), {"quirks": False})
    assert found == pytest.approx(expected, abs=1e-9)


def test_prompts_command(tmp_path, capsys):
    (tmp_path / "dpg.csv").write_text("\ufeff" + inputs.make_csv(0), encoding="utf-8")
    command = ["prompts", "--csv", str(tmp_path / "dpg.csv"), "--output", str(tmp_path / "new/dpg.jsonl")]
    dpg_bench.main(command)
    assert capsys.readouterr().out.startswith("24 prompts with ")
    rows = [json.loads(line) for line in (tmp_path / "new/dpg.jsonl").read_text().splitlines()]
    lines = list(csv.DictReader(io.StringIO(inputs.make_csv(0))))
    assert len(rows) == 24 and {row["prompt"] for row in rows} == {line["text"] for line in lines}
    for row in rows:
        for i, number in enumerate(row["csv_rows"]):
            line = lines[number]
            assert (row["item_id"], row["questions"][i]) == (line["item_id"], line["question_natural_language"])
            assert row["proposition_ids"][i] == int(line["proposition_id"])
            assert ", ".join(map(str, row["dependencies"][i])) == line["dependency"]
            assert row["category_detailed"][i] == line["tuple"].split("(")[0].strip()
            assert row["category_broad"][i] == line["tuple"].split()[0]
    assert sorted(number for row in rows for number in row["csv_rows"]) == list(range(len(lines)))


def test_a_csv_or_rows_that_do_not_fit_are_an_error():
    first = "item_id,text,proposition_id,dependency,tuple,question_natural_language\na,A,1,0,global - (x),?\n"
    assert len(rows_of(first)) == 1
    for last in ("a,A,2,none,global - (x),?", "b,,1,0,global - (x),?", "a,A,2,0,global - (x)"):
        with pytest.raises(ValueError):
            rows_of(first + last)
    row = rows_of(inputs.make_csv(0))[1]
    DPGBench.check_rows([row])
    for change in ({"questions": None}, {"csv_rows": row["csv_rows"][1:]}):
        with pytest.raises(ValueError, match="^row 2, prompt 'A long.* make the file with `python metrics/dpg_bench"):
            DPGBench.check_rows([row, {**row, **change}])
