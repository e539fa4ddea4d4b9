# SPDX-License-Identifier: Apache-2.0
"""score_pairs.py through the command line: what the sorted dataset holds, resuming, refusals."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, call, check_card, make_tiny_pickscore, refused, run, run_until, torchrun
from datasets import Dataset, Features, Image, Value, get_dataset_config_names, load_dataset
from PIL import Image as PILImage

import score_pairs


# A reward that can be computed by hand, logs what it scores and, where told to, is slow.
REWARD = """
import os, time
from pathlib import Path

def mine(images, prompts):
    with open(Path(__file__).with_name("log.txt"), "a") as log:
        log.write("".join(f"{image.getpixel((0, 0))} {prompt}\\n" for image, prompt in zip(images, prompts)))
    time.sleep(float(os.environ.get("SLOW", 0)) * len(images))
    return [image.getpixel((0, 0))[0] / 255 + len(prompt) / 1000 for image, prompt in zip(images, prompts)]
"""


def picture(red: int, size: int = 8, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    PILImage.new("RGB", (size, size), (red, 10, 20)).save(buffer, kind)
    return buffer.getvalue()


def pick_a_pic(n: int, seed: int = 0, uids: bool = True) -> list[dict]:
    """Rows as Pick-a-Pic's: sessions in which the preferred image meets the next one; some ties, some without label."""
    rng = np.random.default_rng(seed)
    rows, left = [], None
    for i in range(n):
        if i % 8 == 0:
            caption, left = f"prompt {i // 8 % 40}", int(rng.integers(256))
        right = int(rng.integers(256))
        label = float(rng.choice([0, 1, 0.5], p=[0.45, 0.45, 0.1]))
        row = {
            "caption": caption,
            "jpg_0": picture(left),
            "jpg_1": picture(right),
            "label_0": label,
            "label_1": 1 - label,
            "has_label": bool(rng.random() > 0.05),
            "ranking_id": i,
        }
        if uids:
            row |= {"image_0_uid": f"image-{left}", "image_1_uid": f"image-{right}"}
        rows.append(row)
        left = left if label == 1 else right
    return rows


def write(folder: Path, rows: list[dict], files: int = 3, features: Features | None = None) -> Path:
    (folder / "data").mkdir(parents=True)
    for number in range(files):
        part = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        target = folder / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        columns = {name: [row[name] for row in part] for name in features or part[0]}
        Dataset.from_dict(columns, features=features).to_parquet(str(target), batch_size=50)
    return folder


@pytest.fixture
def reward(tmp_path) -> str:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "reward.py").write_text(REWARD)
    return f"{tmp_path}/reward/reward.py:mine"


def images_in(files) -> int:
    """How many images these shards' pairs took: each distinct one of a shard and prompt is scored once."""
    found = 0
    for file in files:
        rows = [row for row in pq.read_table(file).to_pylist() if row["_status"] == score_pairs.RANKED]
        found += len({(row[f"image_{side}_uid"], row["caption"]) for row in rows for side in (0, 1)})
    return found


def scored(reward: str) -> list[str]:
    log = Path(reward.rpartition("/")[0], "log.txt")
    return log.read_text().splitlines() if log.exists() else []


def flags(dataset: Path, reward: str, output: Path, **more) -> list:
    given = {"dataset_name": dataset, "reward": reward, "output_dir": output, "shard_size": 16, **more}
    return [item for name, value in given.items() for item in (f"--{name}", value)]


def by_hand(rows: list[dict]) -> list[dict]:
    """The same dataset, by loops: ranked pairs with ψ and Q, best first."""
    red = lambda data: PILImage.open(BytesIO(data)).getpixel((0, 0))[0]  # noqa: E731
    found = []
    for row in rows:
        if row["has_label"] and row["label_0"] != 0.5:
            raw = [np.float32(red(row[name]) / 255 + len(row["caption"]) / 1000) for name in ("jpg_0", "jpg_1")]
            found.append({**row, "raw": raw})
    raws = np.array([row["raw"] for row in found], dtype=np.float64)
    for row in found:
        psi = [(min(max((float(raw) - raws.mean()) / raws.std(), -3), 3) + 3) / 6 for raw in row["raw"]]
        winner, loser = (psi[0], psi[1]) if row["label_0"] == 1 else (psi[1], psi[0])
        row |= {"score_0": psi[0], "score_1": psi[1], "quality": winner * (1 - loser)}
    return sorted(found, key=lambda row: -row["quality"])


def digests(folder: Path) -> dict[str, str]:
    files = [file for name in ("scores", "data") for file in sorted((folder / name).glob("*"))]
    files += [folder / "README.md", folder / "statistics.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ----------------------------------------------------------------------------------------------------------------------
# Formulas
# ----------------------------------------------------------------------------------------------------------------------


def test_pair_quality():
    """Equation 1; the best pair is a sure winner against a sure loser."""
    found = score_pairs.pair_quality([0.31, 1.0, 0.2, 0.0], [0.2, 0.0, 0.31, 1.0])
    np.testing.assert_allclose(found, [0.31 * 0.8, 1.0, 0.2 * 0.69, 0.0], rtol=1e-15)


def test_what_quality_follows():
    """With cosines near 0.27 it follows the winner's score; with the softmax of the two, the difference."""
    rng = np.random.default_rng(0)
    cosines = rng.normal(0.27, 0.02, (4000, 2)).clip(0.2, 0.35)
    cosines[:2] = [[0.30, 0.32], [0.26, 0.23]]  # a pair whose label the reward contradicts, and one that it supports
    by_cosine = score_pairs.preference_score("hpsv2", "auto", cosines, 0.27, 0.02)
    quality = score_pairs.pair_quality(*by_cosine.T)
    assert quality[0] > quality[1] and np.corrcoef(quality, cosines[:, 0])[0, 1] > 0.9
    for name, scale in {"hpsv2": 100, "hpsv2.1=folder": 100, "clipscore": 40, "pickscore": 1, "mine.py:f": 1}.items():
        psi = score_pairs.preference_score(name, "softmax", cosines, 0.27, 0.02)
        weights = np.exp(scale * cosines)
        np.testing.assert_allclose(psi, weights / weights.sum(axis=1, keepdims=True), atol=1e-12)
        quality = score_pairs.pair_quality(*psi.T)
        assert quality[0] < quality[1]
        assert (np.argsort(quality) == np.argsort(cosines[:, 0] - cosines[:, 1])).mean() > 0.99
    for name in ("aesthetic", "vqascore", "vqascore_vlm=x"):
        flags = ["--dataset_name", "x", "--normalization", "softmax", "--reward", name]
        with pytest.raises(SystemExit, match=f"softmax: {name} does not compare two images"):
            score_pairs.parse_arguments(flags)


def test_preference_scores_of_the_paper():
    rewards = np.array([-5.0, -3.0, 0.0, 0.3, 3.0, 7.0])
    score = lambda name, values=rewards: score_pairs.preference_score(name, "auto", values, 1.0, 2.0)  # noqa: E731
    np.testing.assert_allclose(score("hpsv2"), [0, 0, 0, 0.3, 1, 1])
    np.testing.assert_allclose(score("hpsv2.1=some/folder"), [0, 0, 0, 0.3, 1, 1])
    np.testing.assert_allclose(score("imagereward"), [0, 0, 0.5, 0.55, 1, 1])
    np.testing.assert_allclose(score("aesthetic"), [0, 0, 0, 0.03, 0.3, 0.7])
    np.testing.assert_allclose(score("pickscore"), [0, (-2 + 3) / 6, 2.5 / 6, 2.65 / 6, 4 / 6, 1])
    np.testing.assert_allclose(score("a.py:mine"), score("pickscore"))
    np.testing.assert_allclose(score("a.py:clipscore100"), score("pickscore"))
    np.testing.assert_allclose(score("a.py:aesthetic"), score("pickscore"))
    with pytest.raises(SystemExit, match="must be in .0, 1."):
        score_pairs.preference_score("hpsv2", "none", rewards, 1.0, 2.0)


# ----------------------------------------------------------------------------------------------------------------------
# What the dataset holds
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uids", [True, False], ids=["ids", "no ids"])
def test_sorted_dataset(tmp_path, reward, uids):
    rows = pick_a_pic(120, uids=uids)
    source = write(tmp_path / "pairs", rows)
    call("score_pairs", *flags(source, reward, tmp_path / "out", shard_size=50))
    expected = by_hand(rows)
    found = load_dataset(str(tmp_path / "out"), "scores", split="train", cache_dir=tmp_path / "cache")
    own = {"caption", "label_0", "label_1", "has_label", "ranking_id", "image_0_uid", "image_1_uid"}
    assert set(found.column_names) == own | {"score_0", "score_1", "quality", "quality_rank"}
    assert [row["ranking_id"] for row in found] == [row["ranking_id"] for row in expected]
    assert found["quality_rank"][:] == list(range(1, len(expected) + 1))
    for name in ("score_0", "score_1", "quality"):
        np.testing.assert_allclose(found[name][:], [row[name] for row in expected], rtol=1e-6)
    for row, other in zip(found, expected):
        assert row["caption"] == other["caption"] and row["label_0"] == other["label_0"]
    # Every distinct image of a prompt of a shard was scored once, those of ties and unlabelled pairs not at all.
    used = {(row["caption"], row[name]) for row in expected for name in ("jpg_0", "jpg_1")}
    assert len(scored(reward)) == len(set(scored(reward))) == len(used) < 2 * len(expected)
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    ties = sum(row["label_0"] == 0.5 and row["has_label"] for row in rows)
    assert statistics["rows"] == 120 and statistics["ties"] == ties > 0
    assert statistics["without_label"] == sum(not row["has_label"] for row in rows) > 0
    assert statistics["ranked"] == len(expected)


def test_top_fraction_and_images(tmp_path, reward):
    """The best tenth with its images; then, without scoring anything again, another share without them."""
    rows = pick_a_pic(120)
    source, out = write(tmp_path / "pairs", rows), tmp_path / "out"
    call("score_pairs", *flags(source, reward, out, top_fraction=0.1), "--include_images")
    expected = by_hand(rows)
    n = round(0.1 * len(expected))
    found = load_dataset(str(out), split="train", cache_dir=tmp_path / "cache")
    assert [row["ranking_id"] for row in found] == [row["ranking_id"] for row in expected[:n]]
    assert [row["jpg_1"] for row in found] == [row["jpg_1"] for row in expected[:n]]
    plain = load_dataset(str(out), "scores", split="train", cache_dir=tmp_path / "cache")
    assert plain["quality"][:] == found["quality"][:] and "jpg_0" not in plain.column_names
    card = check_card(out)
    for name in ("difference", "quality", "best", "worst"):
        assert f"figures/{name}.png" in card
        assert PILImage.open(out / "figures" / f"{name}.png").size[0] > 100
    worst = np.asarray(PILImage.open(out / "figures" / "worst.png"))
    last = expected[-1]
    reds = [PILImage.open(BytesIO(last[name])).getpixel((0, 0))[0] for name in ("jpg_0", "jpg_1")]
    winner, loser = reds if last["label_0"] == 1 else reversed(reds)
    assert worst[100, 100, 0] == winner and worst[224 + 100, 100, 0] == loser

    before = scored(reward)
    call("score_pairs", *flags(source, reward, out, top_fraction=0.5))
    assert scored(reward) == before
    plain = load_dataset(str(out), "scores", split="train", cache_dir=tmp_path / "cache")
    assert len(plain) == round(0.5 * len(expected))
    assert get_dataset_config_names(str(out)) == ["scores"]
    assert not list((out / "data").glob("*")), "the images of the earlier run do not fit the card"
    card = check_card(out)
    assert "best.png" not in card and "The images are not in it" in card


def test_file_without_rows(tmp_path, reward):
    """An empty file between two others changes nothing."""
    rows = pick_a_pic(40)
    source = write(tmp_path / "pairs", rows, files=2)
    files = [source / "data" / f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    for number in (0, 1):
        (source / "data" / f"train-{number:05d}-of-00002.parquet").rename(files[2 * number])
    pq.ParquetWriter(files[1], pq.read_schema(files[0])).close()
    call("score_pairs", *flags(source, reward, tmp_path / "out"), "--include_images")
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    expected = by_hand(rows)
    assert [row["ranking_id"] for row in found] == [row["ranking_id"] for row in expected]
    assert [row["jpg_0"] for row in found] == [row["jpg_0"] for row in expected]


def test_other_forms_of_pairs(tmp_path, reward):
    """Image columns, paths, files and two folders hold the same pairs: the same qualities."""
    rows = [row for row in pick_a_pic(40) if row["has_label"] and row["label_0"] != 0.5]
    for row in rows:  # the first image is the better one
        if row["label_0"] == 0:
            row["jpg_0"], row["jpg_1"] = row["jpg_1"], row["jpg_0"]
    expected = [row["quality"] for row in by_hand([{**row, "label_0": 1.0} for row in rows])]
    columns = {"prompt_column": "prompt", "image_0_column": "chosen", "image_1_column": "rejected"}
    columns["label_0_column"] = "none"

    def qualities(name, *more, **given):
        out = tmp_path / f"out-{name}"
        call("score_pairs", *flags(tmp_path / name, reward, out, **given)[2 if more else 0 :], *more)
        return load_dataset(str(out), "scores", split="train", cache_dir=tmp_path / "cache")["quality"][:]

    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    images = [
        {"prompt": r["caption"], "chosen": {"bytes": r["jpg_0"]}, "rejected": {"bytes": r["jpg_1"]}} for r in rows
    ]
    write(tmp_path / "images", images, features=features)
    np.testing.assert_allclose(qualities("images", **columns), expected, rtol=1e-6)

    paths = []
    (tmp_path / "paths" / "pictures").mkdir(parents=True)
    for i, row in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (tmp_path / "paths" / "pictures" / f"{i}-{name}.png").write_bytes(row[name])
        paths.append(
            {"prompt": row["caption"], **{c: f"pictures/{i}-jpg_{s}.png" for s, c in enumerate(("chosen", "rejected"))}}
        )
    (tmp_path / "paths" / "train.jsonl").write_text("\n".join(map(json.dumps, paths)))
    np.testing.assert_allclose(qualities("paths", **columns), expected, rtol=1e-6)
    np.testing.assert_allclose(qualities("paths/train.jsonl", **columns), expected, rtol=1e-6)

    for side, folder in enumerate(("better", "worse")):
        (tmp_path / folder).mkdir()
        for i, row in enumerate(rows):
            (tmp_path / folder / f"{i:03d}.png").write_bytes(row[f"jpg_{side}"])
            if side == 0:
                (tmp_path / folder / f"{i:03d}.txt").write_text(row["caption"] + "\n")
    two = ("--winner_dir", tmp_path / "better", "--loser_dir", tmp_path / "worse")
    np.testing.assert_allclose(qualities("folders", *two), expected, rtol=1e-6)
    call("score_pairs", *flags(tmp_path, reward, tmp_path / "out-folders")[2:], *two, "--include_images")
    first = load_dataset(str(tmp_path / "out-folders"), split="train", cache_dir=tmp_path / "cache")[0]
    assert isinstance(first["jpg_0"], PILImage.Image)
    plain = load_dataset(str(tmp_path / "out-folders"), "scores", split="train", cache_dir=tmp_path / "cache")
    assert "better/007.png" in plain["jpg_0"] and "worse/007.png" in plain["jpg_1"]

    (tmp_path / "worse" / "000.png").unlink()
    assert "only one of the two folders: 000" in refused(
        "score_pairs", *two, "--output_dir", tmp_path / "new", "--reward", reward
    )


def test_two_images_of_one_name_are_refused(tmp_path, reward):
    """Also where another file sorts between them."""
    for folder in ("better", "worse"):
        (tmp_path / folder).mkdir()
        for name in ("a.jpg", "a.k.png", "a.png"):
            (tmp_path / folder / name).write_bytes(b"")
    two = ("--winner_dir", tmp_path / "better", "--loser_dir", tmp_path / "worse")
    message = refused("score_pairs", *two, "--output_dir", tmp_path / "out", "--reward", reward)
    assert "a.jpg" in message and "a.png" in message and "have the same name" in message


# ----------------------------------------------------------------------------------------------------------------------
# Resuming, processes, memory
# ----------------------------------------------------------------------------------------------------------------------


def check_same_dataset(folder: Path) -> None:
    """a/out and b/out hold the same bytes, except that each card names its own folder."""
    a, b = digests(folder / "a" / "out"), digests(folder / "b" / "out")
    assert {**a, "README.md": ""} == {**b, "README.md": ""} and len(a) >= 3
    text = (folder / "b" / "out" / "README.md").read_text().replace(f"{folder}/b", f"{folder}/a")
    assert text == (folder / "a" / "out" / "README.md").read_text()


def command(*arguments) -> list[str]:
    return [sys.executable, "score_pairs.py", *map(str, arguments)]


def test_killed_and_resumed(tmp_path, reward):
    """2,000 pairs, kill -9 at a random moment of the scoring, resumed: the same bytes, and nothing complete is scored
    again."""
    source = write(tmp_path / "pairs", pick_a_pic(2000, seed=1), files=4)
    given = {"shard_size": 50, "top_fraction": 0.5, "include_images": "true"}
    call("score_pairs", *flags(source, reward, tmp_path / "a" / "out", **given))
    total = scored(reward)
    assert len(total) > 1000
    Path(reward.rpartition("/")[0], "log.txt").unlink()

    process = subprocess.Popen(
        command(*flags(source, reward, tmp_path / "b" / "out", **given)),
        cwd=ROOT,
        env={**os.environ, "SLOW": "0.005"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    scores, wanted = tmp_path / "b" / "out" / "work" / "scores" / "mine", int(np.random.default_rng().integers(3, 25))
    while len(list(scores.glob("[0-9]*.parquet"))) < wanted:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    complete = len(list(scores.glob("[0-9]*.parquet")))
    kept = images_in(scores.glob("[0-9]*.parquet"))
    assert wanted <= complete < 40 and not (tmp_path / "b" / "out" / "README.md").exists()
    Path(reward.rpartition("/")[0], "log.txt").unlink()
    call("score_pairs", *flags(source, reward, tmp_path / "b" / "out", **given))
    assert len(scored(reward)) == len(total) - kept
    check_same_dataset(tmp_path)


def test_two_processes_give_the_same_as_one(tmp_path, reward):
    source = write(tmp_path / "pairs", pick_a_pic(300, seed=2), files=3)
    call("score_pairs", *flags(source, reward, tmp_path / "a" / "out"))
    one = scored(reward)
    Path(reward.rpartition("/")[0], "log.txt").unlink()
    run(*torchrun(2, "score_pairs.py"), *flags(source, reward, tmp_path / "b" / "out"))
    assert sorted(scored(reward)) == sorted(one)
    check_same_dataset(tmp_path)


def test_real_reward_model_does_not_depend_on_processes(tmp_path):
    """The same bytes with a network in float32: every image stands in the same batch, whoever scores it."""
    folder = make_tiny_pickscore(tmp_path / "clip")
    source = write(tmp_path / "pairs", pick_a_pic(96, seed=3), files=2)
    given = {"shard_size": 10, "reward_batch_size": 4}
    call("score_pairs", *flags(source, f"pickscore={folder}", tmp_path / "a" / "out", **given))
    run(*torchrun(2, "score_pairs.py"), *flags(source, f"pickscore={folder}", tmp_path / "b" / "out", **given))
    check_same_dataset(tmp_path)


def peak_memory(*arguments) -> float:
    """MB at the highest, of a run in a process of its own."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path('score_pairs.py', run_name='__main__'); "
        "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    # Allocators that give back what is freed, so that the peak is what is held.
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    output = run("-c", code, "score_pairs.py", *arguments, env=env).stdout
    return float(output.rpartition("peak ")[2]) / 1024


def test_memory_does_not_grow_with_the_dataset(tmp_path, reward):
    """500 and 5,000 pairs of images of 60 kB: 0.06 and 0.6 GB of data; with the images in the output."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    image = PILImage.fromarray(noise)
    peaks = {}
    for n in (500, 5000):
        rows = []
        for i in range(n):
            row = {"caption": f"prompt {i // 16}", "label_0": float(i % 2)}
            for side in (0, 1):
                image.putpixel((0, 0), (i % 256, side, i // 256))
                buffer = BytesIO()
                image.save(buffer, "BMP")
                row |= {f"jpg_{side}": buffer.getvalue(), f"image_{side}_uid": f"{i}-{side}"}
            rows.append(row)
        write(tmp_path / f"pairs-{n}", rows, files=n // 500)
        given = {"shard_size": 64, "include_images": "true"}
        peaks[n] = peak_memory(*flags(tmp_path / f"pairs-{n}", reward, tmp_path / f"out-{n}", **given))
    size = sum(file.stat().st_size for file in (tmp_path / "pairs-5000").rglob("*.parquet")) / 1e6
    print(f"peak memory in MB: {peaks}; the dataset of 5,000 pairs has {size:.0f} MB")
    assert size > 600
    assert peaks[5000] < peaks[500] + 0.2 * size, peaks


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


def test_bad_images_are_named_counted_and_left_out(tmp_path, reward):
    rows = [row for row in pick_a_pic(60, seed=4) if row["has_label"] and row["label_0"] != 0.5]
    for i, row in enumerate(rows):
        row |= {"image_0_uid": f"{i}a", "image_1_uid": f"{i}b"}
    large = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = BytesIO()
    large.save(buffer, "JPEG")
    rows[3]["jpg_1"] = buffer.getvalue()[:-900]
    rows[7]["jpg_0"] = b"not an image"
    rows[11]["jpg_0"] = b""
    source, out = write(tmp_path / "pairs", rows, files=1), tmp_path / "out"
    result = run("score_pairs.py", *flags(source, reward, out))
    card = (out / "README.md").read_text()
    for text in (
        "row 3 of file 0: jpg_1: image file is trunc",
        "row 7 of file 0: jpg_0: cannot identify image file",
        "row 11 of file 0: jpg_0: no such file, or an empty one",
    ):
        assert text in result.stderr and text in card, result.stderr
    assert "3 with an image that does not decode" in result.stdout
    found = load_dataset(str(out), "scores", split="train", cache_dir=tmp_path / "cache")
    assert len(found) == len(rows) - 3
    assert not {rows[i]["ranking_id"] for i in (3, 7, 11)} & set(found["ranking_id"])

    message = refused("score_pairs", *flags(source, reward, out, on_bad_image="fail"))
    assert "row 3 of file 0: jpg_1" in message and "--on_bad_image skip" in message
    message = refused("score_pairs", *flags(source, reward, tmp_path / "new", on_bad_image="fail"))
    assert "--on_bad_image skip" in message


BAD = {
    "label of 2": (lambda rows: rows[17].update(label_0=2.0), {}, "row 17 of file 0: label_0 is 2.0: must be 0, 0.5"),
    "label of strings": (
        lambda rows: [row.update(label_0=str(row["label_0"])) for row in rows],
        {},
        "column 'label_0' is string, not numbers",
    ),
    "no labels": (lambda rows: [row.update(label_0=0.5) for row in rows], {}, "keeps none of 24 pairs: "),
    "no prompts": (lambda rows: [row.update(caption=" ") for row in rows], {}, "keeps none of 24 pairs: "),
    "no column": (
        lambda rows: None,
        {"prompt_column": "prompt"},
        "'prompt' is absent, not text; it has caption, jpg_0",
    ),
    "no image column": (
        lambda rows: None,
        {"image_1_column": "chosen"},
        "'chosen' is absent, not bytes, Image or paths",
    ),
    "image column of numbers": (
        lambda rows: None,
        {"image_1_column": "label_0"},
        "is double, not bytes, Image or paths",
    ),
    "prompt column of numbers": (lambda rows: None, {"prompt_column": "label_0"}, "is double, not text"),
    "no rows": (lambda rows: rows.clear(), {}, "split 'train' has no rows"),
    "no such split": (lambda rows: None, {"dataset_split": "test"}, "no split 'test'; it has train"),
    "unknown reward": (
        lambda rows: None,
        {"reward": "hps"},
        "reward hps: unknown; choose from hpsv2, hpsv2.1, pickscore",
    ),
    "fraction": (lambda rows: None, {"top_fraction": 5.33}, "--top_fraction 5.33: must be at most 1"),
    "no fraction": (lambda rows: None, {"top_fraction": 0}, "--top_fraction 0.0: must be greater than 0"),
    "too small a fraction": (lambda rows: None, {"top_fraction": 0.001}, "keeps none of 24 pairs"),
    "policy": (lambda rows: None, {"on_bad_image": "ignore"}, "invalid choice"),
    "no such folder": (lambda rows: None, {"dataset_name": "no/such/folder"}, "cannot be read"),
    "no checkpoint": (lambda rows: None, {"reward": "pickscore=/no/such/folder"}, "reward pickscore=/no/such/folder: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, reward, name):
    change, given, words = BAD[name]
    rows = [{**row, "has_label": True} for row in pick_a_pic(24, seed=5)]
    features = Dataset.from_list(rows).features
    change(rows)
    if name == "label of strings":
        features = None
    source = write(tmp_path / "pairs", rows, files=1, features=features)
    given = {"dataset_name": source, "reward": reward, "output_dir": tmp_path / "out", **given}
    message = refused("score_pairs", *(item for k, v in given.items() for item in (f"--{k}", v)))
    assert words in message, message
    if not name.startswith(("no labels", "no prompts", "too small")):
        assert not scored(reward), "it scored before it looked"


def test_another_run_in_the_folder_is_refused(tmp_path, reward):
    source = write(tmp_path / "pairs", pick_a_pic(24))
    call("score_pairs", *flags(source, reward, tmp_path / "out"))
    rows = pick_a_pic(24)
    rows[3]["label_0"] = 1 - rows[3]["label_0"]
    file = next((source / "data").glob("*.parquet"))
    Dataset.from_list(rows[:8]).to_parquet(str(file))
    assert "made with files" in refused("score_pairs", *flags(source, reward, tmp_path / "out"))
    assert "inside the dataset" in refused("score_pairs", *flags(source, reward, source / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "holds other files" in refused("score_pairs", *flags(source, reward, tmp_path / "full"))


def test_bad_paths_with_images(tmp_path, reward):
    """A path that is missing, and one that is null, cost their own pairs only; files of tied pairs are not read."""
    (tmp_path / "pairs").mkdir()
    rows = []
    for i in range(12):
        for side in (0, 1):
            (tmp_path / "pairs" / f"{i}-{side}.png").write_bytes(picture(17 * i + 3 * side))
        rows.append({"prompt": f"p{i}", "a": f"{i}-0.png", "b": f"{i}-1.png", "label_0": 1.0})
    rows[2]["a"] = None
    rows[5]["b"] = "nowhere.png"
    rows[7]["label_0"] = 0.5
    (tmp_path / "pairs" / "7-0.png").unlink()
    Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs" / "train.parquet"))
    columns = {"prompt_column": "prompt", "image_0_column": "a", "image_1_column": "b", "include_images": "true"}
    call("score_pairs", *flags(tmp_path / "pairs", reward, tmp_path / "out", **columns))
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    assert sorted(found["prompt"]) == sorted({f"p{i}" for i in range(12)} - {"p2", "p5", "p7"})
    row = next(row for row in found if row["prompt"] == "p3")
    assert row["a"].getpixel((0, 0))[0] == 51 and row["b"].getpixel((0, 0))[0] == 54
    plain = load_dataset(str(tmp_path / "out"), "scores", split="train", cache_dir=tmp_path / "cache")
    assert "3-0.png" in plain["a"], "paths join the scores to the images"


def test_another_reward_adds_its_scores(tmp_path, reward):
    """The first reward's scores stay: to come back to it costs nothing."""
    source = write(tmp_path / "pairs", pick_a_pic(40))
    other = tmp_path / "other.py"
    other.write_text("def other(images, prompts):\n    return [-image.getpixel((0, 0))[0] for image in images]\n")
    call("score_pairs", *flags(source, reward, tmp_path / "out"))
    first, log = digests(tmp_path / "out"), scored(reward)
    call("score_pairs", *flags(source, f"{other}:other", tmp_path / "out"))
    assert digests(tmp_path / "out") != first
    call("score_pairs", *flags(source, reward, tmp_path / "out"))
    assert digests(tmp_path / "out") == first and scored(reward) == log


def test_killed_after_the_dataset_before_the_figures(tmp_path, reward, monkeypatch):
    source = write(tmp_path / "pairs", pick_a_pic(40))
    call("score_pairs", *flags(source, reward, tmp_path / "out"))
    figure = tmp_path / "out" / "figures" / "quality.png"
    assert figure.exists()
    with monkeypatch.context() as patch:
        patch.setattr(score_pairs, "draw_figures", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("score_pairs", *flags(source, reward, tmp_path / "out", top_fraction=0.5))
    assert pq.read_metadata(tmp_path / "out" / "scores" / "train-00000-of-00001.parquet").num_rows > 30, "the last one"
    call("score_pairs", *flags(source, reward, tmp_path / "out", top_fraction=0.5))
    call("score_pairs", *flags(source, reward, tmp_path / "straight", top_fraction=0.5))
    assert figure.read_bytes() == (tmp_path / "straight" / "figures" / "quality.png").read_bytes()


def test_three_tasks_in_any_order_make_the_same_dataset(tmp_path, reward):
    """Each task reads and scores only its share."""
    dataset = write(tmp_path / "pairs", pick_a_pic(200, uids=False), files=4)
    call("score_pairs", *flags(dataset, reward, tmp_path / "one"))
    alone = scored(reward)
    Path(reward.rpartition("/")[0], "log.txt").unlink()
    tasks = [*flags(dataset, reward, tmp_path / "out"), "--num_tasks", 3, "--task_index"]
    call("score_pairs", *tasks, 2)
    message = refused("score_pairs", *flags(dataset, reward, tmp_path / "out"), "--stages", "sort")
    assert re.search(r"\d+ of \d+ shards lack scores: run the score stage first", message)
    command = [sys.executable, "score_pairs.py", *map(str, tasks)]
    at_once = [subprocess.Popen([*command, n], cwd=ROOT, stderr=subprocess.DEVNULL) for n in ("0", "1")]
    assert [task.wait() for task in at_once] == [0, 0]
    call("score_pairs", *flags(dataset, reward, tmp_path / "out"), "--stages", "sort")
    assert sorted(scored(reward)) == sorted(alone)
    for file in ("scores/train-00000-of-00001.parquet", "statistics.json", "figures/quality.png"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_a_killed_task_and_others_in_any_order_make_the_same_dataset(tmp_path, reward):
    """Of two tasks at once, kill -9 ends one in its scoring; it is run again, before the third one."""
    dataset = write(tmp_path / "pairs", pick_a_pic(300, seed=5), files=4)
    given = {"include_images": "true", "top_fraction": 0.7}
    call("score_pairs", *flags(dataset, reward, tmp_path / "a" / "out", **given))
    alone = scored(reward)
    Path(reward.rpartition("/")[0], "log.txt").unlink()
    ours = flags(dataset, reward, tmp_path / "b" / "out", **given)
    start = lambda n: command(*ours, "--num_tasks", 3, "--task_index", n)  # noqa: E731
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen(start(1), env={**os.environ, "SLOW": "0.05"}, **quiet)
    other = subprocess.Popen(start(2), **quiet)
    own = range(7, 13)  # of 20 shards, 5 a file: task 1 has the middle ones
    scores = tmp_path / "b" / "out" / "work" / "scores" / "mine"
    files = [scores / f"{number // 5:05d}-{number % 5:05d}.parquet" for number in own]
    while not files[1].exists():
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert [killed.wait(), other.wait()] == [-signal.SIGKILL, 0] and not files[-1].exists()
    kept = images_in(scores.glob("[0-9]*.parquet"))
    Path(reward.rpartition("/")[0], "log.txt").unlink()
    for number in (1, 0):
        call("score_pairs", *ours, "--num_tasks", 3, "--task_index", number)
    call("score_pairs", *ours, "--stages", "sort")
    assert len(scored(reward)) == len(alone) - kept  # what is complete is not scored again
    check_same_dataset(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing: how often, and how much at once
# ----------------------------------------------------------------------------------------------------------------------


def test_the_dataset_is_read_once_to_score_and_once_to_write(tmp_path, reward, monkeypatch):
    """Row groups that are larger and smaller than shards. Without images one pass is all, examples included."""
    rows = pick_a_pic(130)
    (tmp_path / "pairs").mkdir()
    for number, size in enumerate((100, 7)):
        Dataset.from_list(rows[65 * number :][:65]).to_parquet(str(tmp_path / "pairs" / f"{number}.parquet"), size)
    read, read_rows = [], score_pairs.read_rows

    def counted(*arguments):
        for row in read_rows(*arguments):
            read.append(row)
            yield row

    monkeypatch.setattr(score_pairs, "read_rows", counted)
    call("score_pairs", *flags(tmp_path / "pairs", reward, tmp_path / "out"))
    assert len(read) == 130
    call("score_pairs", *flags(tmp_path / "pairs", reward, tmp_path / "out"), "--include_images")
    passes = len(read)
    assert passes <= 260, "shards without a kept pair are not read again"
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    expected = by_hand(rows)
    assert [row["ranking_id"] for row in found] == [row["ranking_id"] for row in expected]
    assert [row["jpg_0"] for row in found] == [row["jpg_0"] for row in expected]
    call("score_pairs", *flags(tmp_path / "pairs", reward, tmp_path / "out"), "--include_images")
    assert len(read) == passes, "a second run reads no images"


def test_few_images_are_in_memory_while_the_dataset_is_written(tmp_path, reward, monkeypatch):
    """So a column of images may hold more than the 2 GiB that one Arrow array can hold."""
    source, tables = write(tmp_path / "pairs", pick_a_pic(300)), []
    write_tables = score_pairs.write_tables

    def noted(parts, file, *arguments):
        return write_tables((tables.append(part) or part for part in parts), file, *arguments)

    monkeypatch.setattr(score_pairs, "write_tables", noted)
    call("score_pairs", *flags(source, reward, tmp_path / "out"), "--include_images", "--stages", "score")
    tables.clear()
    call("score_pairs", *flags(source, reward, tmp_path / "out"), "--include_images", "--stages", "sort")
    sizes = [len(table) for table in tables if "jpg_0" in table.column_names]
    assert sum(sizes) > 200 and max(sizes) == 20
    groups = pq.ParquetFile(next((tmp_path / "out" / "data").glob("*.parquet"))).metadata
    assert groups.row_group(0).num_rows == 20 and groups.num_row_groups == math.ceil(sum(sizes) / 20)
    assert not list((tmp_path / "out" / "work" / "buckets").glob("*"))


def test_killed_while_it_writes(tmp_path, reward):
    """kill -9 when the first file with images is there: the folder holds no half dataset, and what is whole stays."""
    rows = pick_a_pic(1300, seed=6)
    given = flags(write(tmp_path / "pairs", rows), reward, tmp_path / "b" / "out", include_images="true")
    file = tmp_path / "b" / "out" / "work" / "building" / "data" / "train-00000-of-00003.parquet"
    run_until(file, "score_pairs.py", *given)
    assert not (tmp_path / "b" / "out" / "data").exists()
    before = file.stat()
    call("score_pairs", *given)
    after = (tmp_path / "b" / "out" / "data" / file.name).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    call("score_pairs", *flags(tmp_path / "pairs", reward, tmp_path / "a" / "out", include_images="true"))
    check_same_dataset(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of input
# ----------------------------------------------------------------------------------------------------------------------


def qualities(folder: Path) -> list[float]:
    return load_dataset(str(folder), "scores", split="train", cache_dir=folder.parent / "cache")["quality"][:]


def test_folders_take_what_pillow_opens(tmp_path, reward, capsys):
    """Also files without an ending. What is no picture is named, but for captions and an operating system's files."""
    names = ("0.png", "1.jpg", "2.webp", "3.avif", "4.bmp", "5.TIF", "6")
    for folder, red in (("better", 200), ("worse", 20)):
        (tmp_path / folder / "more").mkdir(parents=True)
        for i, name in enumerate(names):
            kind = "PNG" if name == "6" else None
            PILImage.new("RGB", (8, 8), (red + 3 * i,) * 3).save(tmp_path / folder / name, kind)
        for name in (".DS_Store", "Thumbs.db", "._0.png", "desktop.ini"):
            (tmp_path / folder / name).write_bytes(b"system")
        (tmp_path / folder / "notes.md").write_text("mine")
    for i in range(7):
        (tmp_path / "better" / f"{i}.txt").write_text("a cat\r\n", encoding="utf-16" if i == 2 else "utf-8-sig")
    two = ("--winner_dir", tmp_path / "better", "--loser_dir", tmp_path / "worse", "--reward", reward)
    call("score_pairs", *two, "--output_dir", tmp_path / "out", "--include_images")
    output = capsys.readouterr()
    assert f"{tmp_path}/better: 2 are no pictures, left out: more, notes.md" in output.err
    assert "7 ranked" in output.out and not any(name in output.err for name in ("DS_Store", "Thumbs", "desktop"))
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    assert set(found["caption"]) == {"a cat"} and len(found) == 7
    (tmp_path / "better" / "3.txt").unlink()
    assert "3.txt" in refused("score_pairs", *two, "--output_dir", tmp_path / "new")


def test_blank_prompts(tmp_path, reward):
    """They are no error where a pair is not used anyway; else they are left out and counted."""
    rows = [{**row, "has_label": True, "label_0": 1.0} for row in pick_a_pic(12)]
    rows[3] |= {"caption": " ", "label_0": 0.5}
    rows[4] |= {"caption": None, "has_label": False}
    rows[6]["caption"] = "\u3000\n"
    rows[8]["caption"] = None
    call("score_pairs", *flags(write(tmp_path / "pairs", rows, files=1), reward, tmp_path / "out"))
    counts = json.loads((tmp_path / "out" / "statistics.json").read_text())
    names = ("ties", "without_label", "with_blank_prompt", "ranked")
    assert [counts[name] for name in names] == [1, 1, 2, 8]
    assert "| with a blank prompt, left out | 2 |" in (tmp_path / "out" / "README.md").read_text()
    assert len(qualities(tmp_path / "out")) == 8


def test_brackets_in_paths(tmp_path, reward):
    """The folder and the file that were named are read, not another one that fits them as a pattern."""
    rows = [{**row, "has_label": True, "label_0": 1.0} for row in pick_a_pic(24)]
    for name, count in (("run [12]", 24), ("run 1", 6)):
        write(tmp_path / name, rows[:count], files=1)
        lines = [{"caption": row["caption"], "label_0": 1.0, "jpg_0": f"{i}a.png", "jpg_1": f"{i}b.png"}
                 for i, row in enumerate(rows[:count])]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i, row in enumerate(rows):
        (tmp_path / f"{i}a.png").write_bytes(row["jpg_0"])
        (tmp_path / f"{i}b.png").write_bytes(row["jpg_1"])
    call("score_pairs", *flags(tmp_path / "run [12]", reward, tmp_path / "out [34]"), "--include_images")
    assert pq.read_table(tmp_path / "out [34]" / "data" / "train-00000-of-00001.parquet").num_rows == 24
    call("score_pairs", *flags(tmp_path / "run [12].jsonl", reward, tmp_path / "out"))
    assert len(qualities(tmp_path / "out")) == 24


@pytest.mark.parametrize("kind", ["paths", "images", "jsonl"])
def test_images_that_are_drawn_anew_are_scored_anew(tmp_path, reward, kind):
    """Files behind paths belong to what the scores are made of; only shards that name such a file are scored again."""
    rows = [{"caption": f"p{i}", "label_0": 1.0, "jpg_0": f"{i}a.png", "jpg_1": f"{i}b.png"} for i in range(32)]
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i, row in enumerate(rows):
        (pairs / row["jpg_0"]).write_bytes(picture(100 + i))
        (pairs / row["jpg_1"]).write_bytes(picture(20 + i))
    if kind == "jsonl":
        (pairs / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "paths.parquet")
        if kind == "images":
            files = (
                {name: {"bytes": None, "path": f"{pairs}/{row[name]}"} for name in ("jpg_0", "jpg_1")} for row in rows
            )
            kinds = {"caption": Value("string"), "label_0": Value("float64"), "jpg_0": Image(), "jpg_1": Image()}
            table = [{**row, **named} for row, named in zip(rows, files)]
            schema = Features(kinds).arrow_schema
            pq.write_table(pa.Table.from_pylist(table, schema=schema), pairs / "train.parquet")
        else:
            (tmp_path / "paths.parquet").rename(pairs / "train.parquet")
    call("score_pairs", *flags(pairs, reward, tmp_path / "out"), "--include_images")
    first, before = qualities(tmp_path / "out"), len(scored(reward))
    call("score_pairs", *flags(pairs, reward, tmp_path / "out"), "--include_images")
    assert len(scored(reward)) == before == 64
    (pairs / "3a.png").write_bytes(picture(5))
    call("score_pairs", *flags(pairs, reward, tmp_path / "out"), "--include_images")
    assert len(scored(reward)) == before + 32, "the shard of 16 pairs"
    again = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    assert again["quality"][:] != first
    redrawn = next(row for row in again if row["caption"] == "p3")["jpg_0"]
    assert redrawn.getpixel((0, 0))[0] == 5
    rows[5]["label_0"] = 0.0
    if kind == "jsonl":
        (pairs / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert "made with files" in refused("score_pairs", *flags(pairs, reward, tmp_path / "out"))


def test_tables_of_other_libraries_and_saved_datasets(tmp_path, reward):
    """Structs without the metadata of `datasets`, large strings, and what `save_to_disk` wrote."""
    rows = [{**row, "has_label": True, "label_0": 1.0} for row in pick_a_pic(24)]
    expected = [row["quality"] for row in by_hand(rows)]
    images = [{**row, **{name: {"bytes": row[name], "path": None} for name in ("jpg_0", "jpg_1")}} for row in rows]
    table = pa.Table.from_pylist(images)
    table = table.set_column(0, "caption", table["caption"].cast(pa.large_string()))
    pq.write_table(table, tmp_path / "polars.parquet")
    call("score_pairs", *flags(tmp_path / "polars.parquet", reward, tmp_path / "a" / "out"), "--include_images")
    np.testing.assert_allclose(qualities(tmp_path / "a" / "out"), expected, rtol=1e-6)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    call("score_pairs", *flags(tmp_path / "saved", reward, tmp_path / "b" / "out"))
    np.testing.assert_allclose(qualities(tmp_path / "b" / "out"), expected, rtol=1e-6)


def test_a_column_that_one_file_lacks_is_named_first(tmp_path, reward):
    rows = pick_a_pic(24)
    source = write(tmp_path / "pairs", rows, files=1)
    Dataset.from_list(rows).remove_columns("ranking_id").to_parquet(
        str(source / "data" / "train-00001-of-00001.parquet")
    )
    message = refused("score_pairs", *flags(source, reward, tmp_path / "out"))
    assert "train-00001-of-00001.parquet has no column 'ranking_id'" in message and not scored(reward)


def test_a_reward_that_is_no_probability_is_refused_after_the_first_shard(tmp_path, reward):
    source = write(tmp_path / "pairs", pick_a_pic(200), files=1)
    mine = Path(reward.partition(":")[0])
    mine.write_text(mine.read_text().replace("/ 255", "/ 25"))
    message = refused("score_pairs", *flags(source, reward, tmp_path / "out", normalization="none"))
    assert "must be in [0, 1]" in message and len(scored(reward)) <= 32
