# SPDX-License-Identifier: Apache-2.0
"""docs/datasets.md, word for word: on small files of each layout its snippets run, and its commands train one step."""

import json
import re
import shlex
import tarfile
from io import BytesIO

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, SHORT, call, learned, pair_rows, ranked_rows, refused
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage


PAGE = (ROOT / "docs" / "datasets.md").read_text()
ROWS = [row for row in pair_rows(n=8) if row["label_0"] != 0.5][:6]
PROMPTS, PAIRS = [row["caption"] for row in ROWS], [(row["jpg_0"], row["jpg_1"]) for row in ROWS]
LISTS = [[image["bytes"] for image in row["images"]] for row in ranked_rows(n=4)]


def write(folder, name: str, content: bytes | str) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def parquet(file, images: tuple = (), **columns) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_dict(columns)
    for name in images:
        data = data.cast_column(name, Image())
    data.to_parquet(file)


def encoded(side: int) -> list[dict]:
    return [{"bytes": pair[side], "path": None} for pair in PAIRS]


def binarized(folder) -> None:
    name = "data-is-better-together/open-image-preferences-v1-binarized/data/train-00000-of-00001.parquet"
    parquet(folder / name, ("chosen", "rejected"), prompt=PROMPTS, chosen=encoded(0), rejected=encoded(1))


def rapidata(folder) -> None:
    name = "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3/data/train_0001-00000-of-00001.parquet"
    columns = {"prompt": PROMPTS, "image1": encoded(0), "image2": encoded(1), "model1": ["flux"] * 6}
    votes = {"votes_image1": [3, 1, 2, 0, 5, 4], "votes_image2": [1, 3, 2, 4, 0, 1], "model2": ["sd3"] * 6}
    newer = {f"weighted_results_image{n}_preference": [v / 7 for v in votes[f"votes_image{n}"]] for n in (1, 2)}
    parquet(folder / name, ("image1", "image2"), **columns, **votes, **newer, detailed_results=["{}"] * 6)


def hpdv3(folder) -> None:
    rows = []
    for i, (prompt, pair) in enumerate(zip(PROMPTS, PAIRS)):
        paths = [f"images/{i}-{side}.png" for side in (0, 1)]
        for path, content in zip(paths, pair):
            write(folder / "HPDv3", path, content)
        dist = [12.0, 1.0] if i else None  # of some sources there is none
        names = {"path1": paths[0], "path2": paths[1], "model1": "flux", "model2": "sd3"}
        rows.append({"prompt": prompt, "choice_dist": dist, "confidence": 0.99 if i else None, **names})
    write(folder / "HPDv3", "train.json", json.dumps(rows))


def pickapic(folder) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0] if name != "quality"}
    parquet(folder / "pickapic-anonymous/pickapic_v1/data/train-00000-of-00001.parquet", **columns)


def folders(folder) -> None:
    for i, (prompt, pair) in enumerate(zip(PROMPTS, PAIRS)):
        write(folder, f"pairs/chosen/{i}.txt", prompt)
        for side, content in zip(("chosen", "rejected"), pair):
            write(folder, f"pairs/{side}/{i}.png", content)


def imagefolder(folder) -> None:
    lines = []
    for i, (prompt, pair) in enumerate(zip(PROMPTS, PAIRS)):
        names = {f"{side}_file_name": f"{side}-{i}.png" for side in ("chosen", "rejected")}
        for name, content in zip(names.values(), pair):
            write(folder / "my_folder", name, content)
        lines.append(json.dumps(names | {"prompt": prompt}))
    write(folder / "my_folder", "metadata.jsonl", "\n".join(lines))


def webdataset(folder) -> None:
    (folder / "my_tars").mkdir()
    with tarfile.open(folder / "my_tars" / "00000.tar", "w") as tar:
        for i, (prompt, pair) in enumerate(zip(PROMPTS, PAIRS)):
            members = {"prompt.txt": prompt.encode(), "chosen.jpg": pair[0], "rejected.jpg": pair[1]}
            for name, content in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{name}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))


def hpdv2(folder) -> None:
    rows = []
    for i, images in enumerate(LISTS):
        for j, content in enumerate(images):
            write(folder / "HPDv2" / "test", f"{i}-{j}.png", content)
        paths = [f"{i}-{j}.png" for j in range(4)]
        notes = [{"rank": [2, 1, 4, 3], "user_hash": "x"}]
        rows.append({"prompt": PROMPTS[i], "image_path": paths, "rank": [2, 1, 4, 3], "raw_annotations": notes})
    write(folder / "HPDv2", "test.json", json.dumps(rows))


def imagerewarddb(folder) -> None:
    rows = []
    for i, images in enumerate(LISTS):
        for j, content in enumerate(images[: 3 if i == 3 else 4]):
            write(folder / "ImageRewardDB", path := f"images/train/train_1/{i}-{j}.webp", content)
            ratings = {"overall_rating": 4, "image_text_alignment_rating": 5, "fidelity_rating": 6}
            row = {"image_path": path, "prompt_id": f"p{i}", "prompt": PROMPTS[i], "classification": "People"}
            rows.append({**row, "image_amount_in_total": 4, "rank": [1, 2, 2, 3][j], **ratings})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    parquet(folder / "ImageRewardDB" / "metadata-train.parquet", **columns)


LAYOUTS = {  # how the part of the page begins → what makes small files of it, and how many rows are trained on
    "open-image-preferences-v1-binarized": (binarized, "6 pairs"),
    "Rapidata's votes": (rapidata, "6 pairs: 1 ties"),
    "HPDv3": (hpdv3, "6 pairs"),
    "Pick-a-Pic": (pickapic, "6 pairs: 0 ties, 1 without a label"),
    "Two folders": (folders, "6 pairs"),
    "`imagefolder`": (imagefolder, "6 pairs"),
    "WebDataset": (webdataset, "6 pairs"),
    "HPDv2's test split": (hpdv2, "1 steps of 1 x 4 images"),
    "ImageRewardDB": (imagerewarddb, "1 steps of 1 x 4 images"),
}


def test_newer_columns_of_votes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    rapidata(tmp_path)
    block = re.search(r"\*\*Rapidata's votes.*?```python\n(.*?)```", PAGE, re.S)[1]
    exec(re.sub(r"votes_image(\d)", r"weighted_results_image\1_preference", block), {})
    assert pq.read_table("rapidata.parquet")["label_0"].to_pylist() == [1, 0, 0.5, 0, 1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tiny_sd, tiny_sdxl, tmp_path, monkeypatch, capsys):
    make, found = LAYOUTS[layout]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    make(tmp_path)
    write(tmp_path, "rewards.py", "def red(images, prompts):\n    return [i.getpixel((0, 0))[0] for i in images]\n")
    part = PAGE[PAGE.index(f"**{layout}**") :]
    part = re.split(r"\n\n\*\*|\n## ", part)[0]
    for kind, block in re.findall(r"```(python|bash)\n(.*?)```", part, re.S):
        if kind == "python":
            exec(block, {})
            continue
        for line in re.sub(r"\\\n", " ", block).splitlines():
            script, flags = re.fullmatch(r"(?:accelerate launch|python) (\w+)\.py (.*)", line).groups()
            more = ["--reward", "rewards.py:red", "--top_fraction", 1, "--num_examples", 0]
            if script.startswith("train"):
                model = tiny_sd if script == "train_dpo_qsd" else tiny_sdxl
                more = ["--pretrained_model_name_or_path", model, "--report_to", "none", *SHORT, "--max_train_steps", 1]
                more += ["--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "lora"]
            call(script, *shlex.split(flags), *more)
    learned(tmp_path / "lora")
    assert found in capsys.readouterr().out


def test_images_that_exist_become_a_ranked_dataset(tmp_path, monkeypatch):
    """Rankings of folders of Midjourney or ComfyUI: no generator is loaded. Lines that repeat a prompt count."""
    for i, images in enumerate(LISTS[:3]):
        for name, content in zip("ab", images):
            write(tmp_path, f"{name}/{i + (name == 'b'):05d}.png", content)
    write(tmp_path, "prompts.txt", "\n".join([PROMPTS[0], PROMPTS[0], PROMPTS[2]]))
    recipe = [{"name": "a", "images": "a/{index:05d}.png"}, {"name": "b", "images": "b/{index+1:05d}.png"}]
    write(tmp_path, "recipe.yaml", yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    rewards = [f"{ROOT}/shapes/world.py:{name}_reward" for name in ("color", "shape")]
    flags = ["--prompts", "prompts.txt", "--generators", "recipe.yaml", "--output_dir", "out", "--image_format", "png"]
    call("build_synpic", *flags, "--rewards", *rewards)
    rows = load_dataset("parquet", data_files="out/data/*.parquet", split="train", cache_dir=tmp_path / "arrow")
    assert rows["prompt"][:] == [PROMPTS[0], PROMPTS[2]]
    for row, i in zip(rows, (0, 2)):
        for image, content in zip(row["images"], LISTS[i]):
            assert image.tobytes() == PILImage.open(BytesIO(content)).tobytes()
    (tmp_path / "b" / "00003.png").unlink()
    message = refused("build_synpic", *flags, "--rewards", *rewards, "--output_dir", "other")
    assert message.startswith("generator b: 1 images are missing or shared: ") and message.endswith("b/00003.png")
