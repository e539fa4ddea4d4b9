# SPDX-License-Identifier: Apache-2.0
"""The benchmarks through evaluate.py, with a shapes generator and tiny detectors and language models of random weights.
The figures mean nothing; how they come about is real: drawing, crashes, several processes, official folder layouts."""

import json
import shutil

import numpy as np
import pytest
import test_qalign
import torch
from conftest import ROOT, call, refused, run, torchrun
from PIL import Image
from safetensors.torch import save_file
from test_dpg_bench import inputs as dpg_inputs
from test_dpg_bench import official_weights as mplug_weights
from test_geneval import checkpoints  # noqa: F401 (a fixture)


BASE = ["--pretrained_model_name_or_path", ROOT / "shapes" / "models" / "base", "--num_inference_steps", 2]
COUNTED = ["--seed", 42, "--image_seeds", "counted", "--reward_batch_size", 3]
# Things that the random detector finds in some of the pictures.
OBJECTS = {
    "single_object": {"include": [{"class": "dog", "count": 1}]},
    "counting": {"include": [{"class": "fork", "count": 2}], "exclude": [{"class": "fork", "count": 3}]},
    "position": {
        "include": [{"class": "spoon", "count": 1}, {"class": "fork", "count": 1, "position": ["left of", 0]}]
    },
}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory, checkpoints) -> list[str]:  # noqa: F811
    """GenEval, DPG-Bench and Q-Align with settings that name tiny models."""
    folder = tmp_path_factory.mktemp("tiny")
    dpg_inputs.write_model(folder / "mplug", dpg_inputs.STRIDES["published"])
    torch.save(mplug_weights("published"), folder / "mplug" / "pytorch_model.bin")
    with np.load(ROOT / "tests" / "golden" / "qalign.npz") as file:
        golden = dict(file)
    (folder / "owl").mkdir()
    test_qalign.write_files(folder / "owl", golden)
    owl, shapes = test_qalign.golden_script, json.loads(str(golden["keys"]))
    weights = {key: torch.from_numpy(owl.weight(key, shape)) for key, shape in shapes.items()}
    save_file(weights, folder / "owl" / "model.safetensors")
    detector, clip = checkpoints / "mmdet" / "detector.pth", checkpoints / "clip"
    return [
        f"metrics/geneval.py:GenEval,detector={detector},clip={clip},threshold=0.01,counting_threshold=0.02",
        f"metrics/dpg_bench.py:DPGBench,model={folder / 'mplug'}",
        f"metrics/qalign.py:QAlign,model={folder / 'owl'}",
    ]


def read_results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_geneval_dpg_and_qalign(tmp_path, metrics):
    """Two processes and official layouts give what one process gives; missing images are refused."""
    rows = []
    for number, (tag, objects) in enumerate(OBJECTS.items()):
        questions = dpg_inputs.QUESTIONS[number : number + 3]
        row = {"prompt": f"a circle {number}", "tag": tag, **objects, "item_id": f"item{number}"}
        row |= {"questions": questions}
        row |= {"proposition_ids": [1, 2, 3], "dependencies": [[0], [1], [0]], "csv_rows": [0, 1, 2]}
        row |= {"category_broad": ["entity"] * 2 + ["relation"]}
        rows.append(row | {"category_detailed": ["entity - whole", "entity - part", "relation - spatial"]})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts", tmp_path / "prompts.jsonl", "--category_column", "tag", "--num_images_per_prompt", 4]
    flags += [*COUNTED, "--metrics", *metrics]
    call("evaluate", *BASE, *flags, "--output_dir", tmp_path / "out")
    results = read_results(tmp_path / "out")
    found = results["base"]
    geneval = next(key for key in found if key.startswith("GenEval") and key.endswith("_official"))
    dpg = next(key for key in found if key.startswith("DPGBench") and key.endswith("_official"))
    name = geneval.removesuffix("_official")
    assert name.startswith("GenEval_detector=detector.pth_clip=clip_threshold=0.01")
    shares = [found[f"{name}_by_category"][tag]["mean"] for tag in OBJECTS]
    assert 0 < sum(shares) < 3  # not all images are correct, nor all wrong
    assert found[geneval]["overall"] == pytest.approx(np.mean(shares)) == pytest.approx(found[f"{name}_category_mean"])
    assert found[dpg]["score"] == pytest.approx(found[dpg.replace("official", "score")])
    assert {"entity", "entity_whole", "relation_spatial"} <= found[dpg].keys()
    assert 0 < found["QAlign_model=owl_quality"] < 1 and 0 < found["QAlign_model=owl_aesthetic"] < 1
    table = (tmp_path / "out" / "results.md").read_text()
    assert f"{name} as the benchmark reports it" in table

    run(*torchrun(2, "evaluate.py"), *BASE, *flags, "--output_dir", tmp_path / "two")
    assert read_results(tmp_path / "two") == results

    for i, row in enumerate(rows):  # the layouts of the official repositories
        pictures = [tmp_path / "out" / "images" / "base" / f"{i:05d}_{n}.png" for n in range(4)]
        samples = tmp_path / "geneval" / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        for n, picture in enumerate(pictures):
            shutil.copy(picture, samples / f"{n:05d}.png")
        cells = [np.asarray(Image.open(picture)) for picture in pictures]
        grid = np.concatenate([np.concatenate(cells[:2], axis=1), np.concatenate(cells[2:], axis=1)])
        Image.fromarray(grid).save(tmp_path / f"{row['item_id']}.png")
    flags += ["--images", f"geneval={tmp_path}/geneval/{{index:05d}}/samples/{{number:05d}}.png"]
    flags += [f"dpg={tmp_path}/{{row[item_id]}}.png#2x2", "--baseline", "geneval", "--output_dir", tmp_path / "again"]
    call("evaluate", *flags)
    again = read_results(tmp_path / "again")
    for key in (geneval, dpg):
        assert again["geneval"][key] == again["dpg"][key] == found[key]
    (tmp_path / "item2.png").unlink()
    assert "4 of 12 pictures are missing" in refused("evaluate", *flags)
    call("evaluate", *flags, "--allow_missing", "true")
    again = read_results(tmp_path / "again")
    assert again["missing_images"] == {"dpg": 4} and again["geneval"][geneval] == found[geneval]
    left = [share for share, tag in zip(shares, OBJECTS) if tag != rows[2]["tag"]]
    assert again["dpg"][geneval]["overall"] == pytest.approx(np.mean(left))

    rows[1].pop("include")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "row 2" in refused("evaluate", *flags)
