# SPDX-License-Identifier: Apache-2.0
"""score_pairs.py through the command line: what the sorted dataset holds, resuming, refusals."""

import hashlib
import json
import re
import signal
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call, check_card, make_tiny_pickscore, refused, run, torchrun
from datasets import Dataset, DatasetDict, Features, Image, Value, get_dataset_config_names, load_dataset
from filelock import FileLock
from PIL import Image as PILImage

import score_pairs


# A reward that can be computed by hand, and logs what it scores.
REWARD = """
from pathlib import Path

def mine(images, prompts):
    with open(Path(__file__).with_name("log.txt"), "a") as log:
        log.write("".join(f"{image.getpixel((0, 0))} {prompt}\\n" for image, prompt in zip(images, prompts)))
    return [image.getpixel((0, 0))[0] / 255 + len(prompt) / 1000 for image, prompt in zip(images, prompts)]
"""
# `score_pairs.py` as `python -c DIES N FLAGS`: when it has renamed N files into place, it kills itself.
DIES = """
import os, signal, sys
import score_pairs
left, replace = int(sys.argv.pop(1)), os.replace
def dying(*names):
    global left
    replace(*names)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
score_pairs.main(score_pairs.parse_arguments())
"""


def picture(red: int) -> bytes:
    buffer = BytesIO()
    PILImage.new("RGB", (8, 8), (red, 10, 20)).save(buffer, "PNG")
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


def ranked_rows(n: int) -> list[dict]:
    """The first image of each is the better one."""
    return [{**row, "has_label": True, "label_0": 1.0} for row in pick_a_pic(n)]


def load(folder: Path, name: str | None = None) -> Dataset:
    return load_dataset(str(folder), name, split="train", cache_dir=folder.parent / "cache")


def digests(folder: Path) -> dict[str, str]:
    files = [file for name in ("scores", "data") for file in sorted((folder / name).glob("*"))]
    files += [folder / "README.md", folder / "statistics.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# Formulas -------------------------------------------------------------------------------------------------------------


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


# What the dataset holds -----------------------------------------------------------------------------------------------


def test_sorted_dataset(tmp_path, reward):
    """Without ids in the dataset."""
    rows = pick_a_pic(120, uids=False)
    source = write(tmp_path / "pairs", rows)
    call("score_pairs", *flags(source, reward, tmp_path / "out", shard_size=50))
    expected = by_hand(rows)
    found = load(tmp_path / "out", "scores")
    own = {"caption", "label_0", "label_1", "has_label", "ranking_id", "image_0_uid", "image_1_uid"}
    assert set(found.column_names) == own | {"score_0", "score_1", "quality", "quality_rank"}
    for name in ("ranking_id", "caption", "label_0"):
        assert found[name][:] == [row[name] for row in expected]
    assert found["image_1_uid"][3] == hashlib.blake2b(expected[3]["jpg_1"], digest_size=16).hexdigest()
    assert found["quality_rank"][:] == list(range(1, len(expected) + 1))
    for name in ("score_0", "score_1", "quality"):
        np.testing.assert_allclose(found[name][:], [row[name] for row in expected], rtol=1e-6)
    # Every distinct image of a prompt of a shard was scored once, those of ties and unlabelled pairs not at all.
    used = {(row["caption"], row[name]) for row in expected for name in ("jpg_0", "jpg_1")}
    assert len(scored(reward)) == len(set(scored(reward))) == len(used) < 2 * len(expected)
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    ties = sum(row["label_0"] == 0.5 and row["has_label"] for row in rows)
    assert statistics["rows"] == 120 and statistics["ties"] == ties > 0
    assert statistics["without_label"] == sum(not row["has_label"] for row in rows) > 0
    assert statistics["ranked"] == len(expected)


def test_top_fraction_and_images(tmp_path, reward):
    """The best tenth with its images; then, without scoring anything again, fewer examples, and another share without
    images."""
    rows = pick_a_pic(120)
    source, out = write(tmp_path / "pairs", rows), tmp_path / "out"
    call("score_pairs", *flags(source, reward, out, top_fraction=0.1), "--include_images")
    expected = by_hand(rows)
    n = round(0.1 * len(expected))
    found = load(out)
    for name in ("ranking_id", "jpg_1"):
        assert found[name][:] == [row[name] for row in expected[:n]]
    plain = load(out, "scores")
    assert plain["quality"][:] == found["quality"][:] and "jpg_0" not in plain.column_names
    card = check_card(out)
    for name in ("difference", "quality", "best", "worst"):
        assert f"figures/{name}.png" in card
        assert PILImage.open(out / "figures" / f"{name}.png").size[0] > 100
    worst = np.asarray(PILImage.open(out / "figures" / "worst.png"))
    last = expected[n - 1]
    reds = [PILImage.open(BytesIO(last[name])).getpixel((0, 0))[0] for name in ("jpg_0", "jpg_1")]
    winner, loser = reds if last["label_0"] == 1 else reversed(reds)
    assert worst[100, 100, 0] == winner and worst[224 + 100, 100, 0] == loser

    before, file = scored(reward), out / "data" / "train-00000-of-00001.parquet"
    inode = file.stat().st_ino
    call("score_pairs", *flags(source, reward, out, top_fraction=0.1, num_examples=2), "--include_images")
    assert file.stat().st_ino == inode, "the number of examples is none of the data's concern"
    assert PILImage.open(out / "figures" / "best.png").width == 2 * 224
    call("score_pairs", *flags(source, reward, out, top_fraction=0.5))
    assert scored(reward) == before and len(load(out, "scores")) == round(0.5 * len(expected))
    assert get_dataset_config_names(str(out)) == ["scores"]
    assert not file.exists(), "the images of the earlier run do not fit the card"
    card = check_card(out)
    assert "best.png" not in card and "The images are not in it" in card


def test_how_often_and_how_much_at_once_is_read(tmp_path, reward, monkeypatch):
    """Row groups larger and smaller than shards, and a file without rows. Each row is read once to score it, each kept
    one once for its images, in tables of 20 rows: a column of images may be larger than an Arrow array can be."""
    rows, folder = pick_a_pic(130), tmp_path / "pairs"
    folder.mkdir()
    for number, size in ((0, 100), (2, 7)):
        Dataset.from_list(rows[65 * number // 2 :][:65]).to_parquet(str(folder / f"{number}.parquet"), size)
    pq.ParquetWriter(folder / "1.parquet", pq.read_schema(folder / "0.parquet")).close()
    read, sizes, read_rows, write_tables = [], [], score_pairs.read_rows, score_pairs.write_tables

    def counted(*arguments):
        for row in read_rows(*arguments):
            read.append(row)
            yield row

    def noted(tables, file, *arguments):
        write_tables((sizes.append(len(table)) or table for table in tables), file, *arguments)

    monkeypatch.setattr(score_pairs, "read_rows", counted)
    monkeypatch.setattr(score_pairs, "write_tables", noted)
    call("score_pairs", *flags(folder, reward, tmp_path / "out"))
    assert len(read) == 130
    sizes.clear()
    call("score_pairs", *flags(folder, reward, tmp_path / "out"), "--include_images")
    expected = by_hand(rows)
    assert len(read) == 130 + len(expected)
    tables, rest = divmod(len(expected), 20)
    assert sizes == [20] * tables + [rest, len(expected)]
    found = load(tmp_path / "out")
    for name in ("ranking_id", "jpg_0"):
        assert found[name][:] == [row[name] for row in expected]
    groups = pq.ParquetFile(next((tmp_path / "out" / "data").glob("*.parquet"))).metadata
    assert groups.row_group(0).num_rows == 20 and groups.num_row_groups == tables + 1
    call("score_pairs", *flags(folder, reward, tmp_path / "out"), "--include_images")
    assert len(read) == 130 + len(expected), "a second run reads none"


def test_other_forms_of_pairs(tmp_path, reward):
    """Image columns, tables of other libraries, saved datasets, paths, files and two folders: the same qualities."""
    rows = ranked_rows(24)
    expected = [row["quality"] for row in by_hand(rows)]
    names = {"caption": "prompt", "jpg_0": "chosen", "jpg_1": "rejected"}
    rows = [{other: row[name] for name, other in names.items()} for row in rows]
    columns = {"prompt_column": "prompt", "image_0_column": "chosen", "image_1_column": "rejected"}
    columns["label_0_column"] = "none"

    def check(name, *more, **given) -> Dataset:
        out = tmp_path / f"out-{name.replace('/', '-')}"
        call("score_pairs", *flags(tmp_path / name, reward, out, **given)[2 if more else 0 :], *more)
        found = load(out, "scores")
        np.testing.assert_allclose(found["quality"][:], expected, rtol=1e-6)
        return found

    images = [{**row, **{c: {"bytes": row[c], "path": None} for c in ("chosen", "rejected")}} for row in rows]
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    write(tmp_path / "images", images, features=features)
    check("images", **columns)
    table = pa.Table.from_pylist(images)  # without the metadata of `datasets`
    table = table.set_column(0, "prompt", table["prompt"].cast(pa.large_string()))
    pq.write_table(table, tmp_path / "polars.parquet")
    check("polars.parquet", **columns, include_images="true")
    saved = Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    check("saved", **columns)
    DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
    check("splits", **columns)
    other = flags(tmp_path / "splits", reward, tmp_path / "new", dataset_split="val")
    assert "no split 'val'; it has train, test" in refused("score_pairs", *other)

    paths = [{"prompt": row["prompt"], "chosen": f"better/{i:03d}.png", "rejected": f"worse/{i:03d}.png"}
             for i, row in enumerate(rows)]  # fmt: skip
    for root in (tmp_path / "paths", tmp_path):
        for row, files in zip(rows, paths):
            for name in ("chosen", "rejected"):
                (root / files[name]).parent.mkdir(parents=True, exist_ok=True)
                (root / files[name]).write_bytes(row[name])
            (root / files["chosen"]).with_suffix(".txt").write_text(row["prompt"] + "\n")
    (tmp_path / "paths" / "train.jsonl").write_text("\n".join(map(json.dumps, paths)))
    check("paths/train.jsonl", **columns)
    check("paths", **columns)
    two = ("--winner_dir", tmp_path / "better", "--loser_dir", tmp_path / "worse")
    plain = check("folders", *two, "--include_images")
    assert "better/007.png" in plain["jpg_0"] and "worse/007.png" in plain["jpg_1"]
    assert isinstance(load(tmp_path / "out-folders")[0]["jpg_0"], PILImage.Image)
    (tmp_path / "worse" / "000.png").unlink()
    message = refused("score_pairs", *two, "--output_dir", tmp_path / "new", "--reward", reward)
    assert "only one of the two folders: 000" in message


# Resuming, processes, memory ------------------------------------------------------------------------------------------


def check_same_dataset(folder: Path) -> None:
    """a/out and b/out hold the same bytes, except that each card names its own folder."""
    a, b = digests(folder / "a" / "out"), digests(folder / "b" / "out")
    assert {**a, "README.md": ""} == {**b, "README.md": ""} and len(a) >= 3
    text = (folder / "b" / "out" / "README.md").read_text().replace(f"{folder}/b", f"{folder}/a")
    assert text == (folder / "a" / "out" / "README.md").read_text()


def test_killed_again_and_again(tmp_path, reward, monkeypatch):
    """kill -9 when a file is whole: the next run goes on, nothing is scored or copied twice, the folder never holds a
    part of the dataset, and the result is the same, byte for byte."""
    source, given = write(tmp_path / "pairs", ranked_rows(160)), {"include_images": "true", "top_fraction": 0.7}
    call("score_pairs", *flags(source, reward, tmp_path / "a" / "out", **given))
    alone, out = sorted(scored(reward)), tmp_path / "b" / "out"
    Path(reward.rpartition("/")[0], "log.txt").unlink()
    for left in (5, 16):  # in the middle of the scores, and of the copies of images
        result = run("-c", DIES, left, *flags(source, reward, out, **given), check=False)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert not list(out.glob("*/*.parquet")) and not (out / "README.md").exists()
    copies = list(out.glob("work/building/*/images/*.arrow"))
    assert len(copies) == 3
    read, read_rows = [], score_pairs.read_rows
    monkeypatch.setattr(score_pairs, "read_rows", lambda pairs, rows: read.append(len(rows)) or read_rows(pairs, rows))
    call("score_pairs", *flags(source, reward, out, **given))
    assert read == [112 - 3 * 16], "images that are not copied yet"
    assert sorted(scored(reward)) == alone and not list((out / "work" / "building").glob("*"))
    check_same_dataset(tmp_path)


def test_a_network_s_scores_do_not_depend_on_processes(tmp_path):
    """The same bytes in float32: every image stands in the same batch, whoever scores it."""
    folder = make_tiny_pickscore(tmp_path / "clip")
    source = write(tmp_path / "pairs", pick_a_pic(96, seed=3), files=2)
    given = {"shard_size": 10, "reward_batch_size": 4}
    call("score_pairs", *flags(source, f"pickscore={folder}", tmp_path / "a" / "out", **given))
    run(*torchrun(2, "score_pairs.py"), *flags(source, f"pickscore={folder}", tmp_path / "b" / "out", **given))
    check_same_dataset(tmp_path)


def test_tasks_in_any_order_make_the_same_dataset(tmp_path, reward):
    """Each reads and scores only its share."""
    dataset = write(tmp_path / "pairs", pick_a_pic(200, uids=False), files=4)
    call("score_pairs", *flags(dataset, reward, tmp_path / "a" / "out"))
    alone, ours = sorted(scored(reward)), flags(dataset, reward, tmp_path / "b" / "out")
    Path(reward.rpartition("/")[0], "log.txt").unlink()
    call("score_pairs", *ours, "--num_tasks", 3, "--task_index", 2)
    message = refused("score_pairs", *ours, "--stages", "sort")
    assert re.search(r"\d+ of \d+ shards lack scores: run the score stage first", message)
    for number in (1, 0):
        call("score_pairs", *ours, "--num_tasks", 3, "--task_index", number)
    call("score_pairs", *ours, "--stages", "sort")
    assert sorted(scored(reward)) == alone
    check_same_dataset(tmp_path)


def test_tasks_and_single_runs_see_each_other(tmp_path, reward):
    given, out = flags(write(tmp_path / "pairs", pick_a_pic(24)), reward, tmp_path / "out"), tmp_path / "out"
    tasks = [[*given, "--num_tasks", 2, "--task_index", number] for number in (0, 1)]
    call("score_pairs", *tasks[0])
    for name, others in ((".lock-0", [given, tasks[0]]), (".lock", [given, tasks[1]])):
        with FileLock(out / name):  # as such a run holds it
            assert all("in use by another run" in refused("score_pairs", *other) for other in others)
    with FileLock(out / ".lock-0"):
        call("score_pairs", *tasks[1])
    call("score_pairs", *given)


PEAKS = """
import os, sys
import score_pairs
for size in ("small", "large"):
    score_pairs.main(score_pairs.parse_arguments([word.replace("SIZE", size) for word in sys.argv[1:]]))
    print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_the_dataset(tmp_path, reward):
    """Images of 77 kB, which are in the output, too: 0.03 and 0.3 GB of data."""
    image = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8))
    for size, n in (("small", 200), ("large", 2000)):
        rows = []
        for i in range(n):
            row = {"caption": f"prompt {i // 16}", "label_0": float(i % 2)}
            for side in (0, 1):
                image.putpixel((0, 0), (i % 256, side, i // 256))
                buffer = BytesIO()
                image.save(buffer, "BMP")
                row |= {f"jpg_{side}": buffer.getvalue(), f"image_{side}_uid": f"{i}-{side}"}
            rows.append(row)
        write(tmp_path / size, rows, files=n // 200)
    given = flags(tmp_path / "SIZE", reward, tmp_path / "out-SIZE", shard_size=64, include_images="true")
    peaks = [int(words) / 1024 for words in re.findall("peak ([0-9]+)", run("-c", PEAKS, *given).stdout)]
    size = sum(file.stat().st_size for file in (tmp_path / "large").rglob("*.parquet")) / 1e6
    assert size > 300 and peaks[1] < peaks[0] + 0.2 * size, (size, peaks)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_images_and_blank_prompts_are_counted_and_left_out(tmp_path, reward, capsys):
    """Blank prompts are no error where a pair is not used anyway."""
    rows = [{**row, "image_0_uid": f"{i}a", "image_1_uid": f"{i}b"} for i, row in enumerate(ranked_rows(40))]
    buffer = BytesIO()
    PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    rows[3]["jpg_1"] = buffer.getvalue()[:-900]
    rows[7]["jpg_0"] = b"not an image"
    rows[11]["jpg_0"] = b""
    rows[20] |= {"caption": " ", "label_0": 0.5}
    rows[21] |= {"caption": None, "has_label": False}
    rows[22]["caption"] = "\u3000\n"
    rows[23]["caption"] = None
    source, out = write(tmp_path / "pairs", rows, files=1), tmp_path / "out"
    call("score_pairs", *flags(source, reward, out))
    output, card = capsys.readouterr(), (out / "README.md").read_text()
    for text in (
        "row 3 of file 0: jpg_1: image file is trunc",
        "row 7 of file 0: jpg_0: cannot identify image file",
        "row 11 of file 0: jpg_0: no such file, or an empty one",
    ):
        assert text in output.err and text in card, output.err
    counts = "1 ties, 1 without a label, 2 with a blank prompt, 3 with an image that does not decode, 33 ranked"
    assert f"40 pairs: {counts}; the best 33" in output.out and "| with a blank prompt, left out | 2 |" in card
    found = load(out, "scores")["ranking_id"][:]
    assert len(found) == 33 and not {3, 7, 11, 20, 21, 22, 23} & set(found)
    for folder in (out, tmp_path / "new"):
        message = refused("score_pairs", *flags(source, reward, folder, on_bad_image="fail"))
        assert "row 3 of file 0: jpg_1" in message and "--on_bad_image skip" in message


# Flags, and words of the one line that refuses them; or a change of the rows.
BAD = [
    ({"prompt_column": "prompt"}, "'prompt' is absent, not text; it has caption, jpg_0"),
    ({"prompt_column": "label_0"}, "is double, not text"),
    ({"image_1_column": "chosen"}, "'chosen' is absent, not bytes, Image or paths"),
    ({"image_1_column": "label_0"}, "is double, not bytes, Image or paths"),
    ({"label_0_column": "caption"}, "column 'caption' is string, not numbers"),
    ({"dataset_split": "test"}, "no split 'test'; it has train"),
    ({"dataset_name": "no/such/folder"}, "cannot be read"),
    ({"reward": "hps"}, "reward hps: unknown; choose from hpsv2, hpsv2.1, pickscore"),
    ({"reward": "pickscore=/no/such/folder"}, "reward pickscore=/no/such/folder: "),
    ({"top_fraction": 5.33}, "--top_fraction 5.33: must be at most 1"),
    ({"top_fraction": 0}, "--top_fraction 0.0: must be greater than 0"),
    ({"on_bad_image": "ignore"}, "invalid choice"),
    (lambda rows: rows[17].update(label_0=2.0), "row 17 of file 0: label 2.0 is not 0, 0.5 or 1"),
    (lambda rows: rows.clear(), "split 'train' has no rows"),
    # What only the scores tell.
    ({"top_fraction": 0.001}, "keeps none of 24 pairs"),
    (lambda rows: [row.update(label_0=0.5) for row in rows], "keeps none of 24 pairs: "),
]


def test_bad_input_is_one_line(tmp_path, reward):
    features = Dataset.from_list(ranked_rows(24)).features
    good = write(tmp_path / "good", ranked_rows(24), files=1)
    for number, (change, words) in enumerate(BAD):
        rows, given = ranked_rows(24), {"dataset_name": good, "reward": reward, "output_dir": tmp_path / f"o{number}"}
        if callable(change):
            change(rows)
            given["dataset_name"] = write(tmp_path / f"bad-{number}", rows, files=1, features=features)
        else:
            given |= change
        with pytest.raises(SystemExit, match=re.escape(words)) as stopped:
            score_pairs.main(score_pairs.parse_arguments([f"--{name}={value}" for name, value in given.items()]))
        message = stopped.value.code
        assert "\n" not in message
        assert not scored(reward) or "keeps none" in message, "it scored before it looked"


def test_another_run_in_the_folder_is_refused(tmp_path, reward):
    source, out = write(tmp_path / "pairs", ranked_rows(24)), tmp_path / "out"
    call("score_pairs", *flags(source, reward, out))
    assert "inside the dataset" in refused("score_pairs", *flags(source, reward, source / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "holds other files" in refused("score_pairs", *flags(source, reward, tmp_path / "full"))
    file, rows = source / "data" / "train-00000-of-00003.parquet", ranked_rows(8)
    rows[3]["label_0"] = 0.0
    Dataset.from_list(rows).to_parquet(str(file))
    assert "made with files" in refused("score_pairs", *flags(source, reward, out))
    Dataset.from_list(rows).remove_columns("ranking_id").to_parquet(str(file.with_name("train-00001-of-00003.parquet")))
    message = refused("score_pairs", *flags(source, reward, tmp_path / "new"))
    assert "train-00001-of-00003.parquet has no column 'ranking_id'" in message


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
    found = load(tmp_path / "out")
    assert sorted(found["prompt"]) == sorted({f"p{i}" for i in range(12)} - {"p2", "p5", "p7"})
    row = next(row for row in found if row["prompt"] == "p3")
    assert row["a"].getpixel((0, 0))[0] == 51 and row["b"].getpixel((0, 0))[0] == 54
    assert "3-0.png" in load(tmp_path / "out", "scores")["a"], "paths join the scores to the images"


def test_images_of_other_rows_are_not_joined(tmp_path, reward):
    """The dataset's images have changed places since they were scored, and nothing in the file's footer tells."""
    rows, columns = ranked_rows(24), ["caption", "label_0", "jpg_0", "jpg_1"]
    table = pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows])
    options = {"compression": "none", "write_statistics": False, "use_dictionary": False}
    pq.write_table(table, tmp_path / "pairs.parquet", **options)
    call("score_pairs", *flags(tmp_path / "pairs.parquet", reward, tmp_path / "out"))
    table = table.set_column(2, "jpg_0", table["jpg_0"].take([8, *range(1, 8), 0, *range(9, 24)]))
    pq.write_table(table, tmp_path / "pairs.parquet", **options)
    message = refused("score_pairs", *flags(tmp_path / "pairs.parquet", reward, tmp_path / "out"), "--include_images")
    assert "row 0 is not what was scored" in message


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


# Kinds of input -------------------------------------------------------------------------------------------------------


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
    assert load(tmp_path / "out")["caption"][:] == ["a cat"] * 7
    (tmp_path / "better" / "3.txt").unlink()
    assert "3.txt" in refused("score_pairs", *two, "--output_dir", tmp_path / "new")
    (tmp_path / "better" / "0.jpg").write_bytes(b"")
    message = refused("score_pairs", *two, "--output_dir", tmp_path / "new")
    assert "0.jpg" in message and "0.png" in message and "have the same name" in message


def test_brackets_in_paths(tmp_path, reward):
    """The folder and the file that were named are read, not another one that fits them as a pattern."""
    rows = ranked_rows(24)
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
    assert len(load(tmp_path / "out", "scores")) == 24


@pytest.mark.parametrize("kind", ["images", "jsonl"])
def test_images_that_are_drawn_anew_are_scored_anew(tmp_path, reward, kind, monkeypatch):
    """Files behind paths belong to what the scores are made of; only shards that name such a file are scored again. A
    start looks at each file once."""
    rows = [{"caption": f"p{i}", "label_0": 1.0, "jpg_0": f"{i}a.png", "jpg_1": f"{i}b.png"} for i in range(32)]
    pairs, looked, file_facts = tmp_path / "pairs", [], score_pairs.file_facts
    given = [*flags(pairs, reward, tmp_path / "out"), "--include_images"]
    pairs.mkdir()
    for i, row in enumerate(rows):
        (pairs / row["jpg_0"]).write_bytes(picture(100 + i))
        (pairs / row["jpg_1"]).write_bytes(picture(20 + i))
    if kind == "jsonl":
        (pairs / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        named = [{name: {"bytes": None, "path": f"{pairs}/{row[name]}"} for name in ("jpg_0", "jpg_1")} for row in rows]
        kinds = {"caption": Value("string"), "label_0": Value("float64"), "jpg_0": Image(), "jpg_1": Image()}
        table = pa.Table.from_pylist([row | files for row, files in zip(rows, named)], Features(kinds).arrow_schema)
        pq.write_table(table, pairs / "train.parquet")
    call("score_pairs", *given)
    first, before = load(tmp_path / "out")["quality"][:], len(scored(reward))
    monkeypatch.setattr(score_pairs, "file_facts", lambda path: looked.append(path) or file_facts(path))
    call("score_pairs", *given)
    assert len(scored(reward)) == before == 64 and (kind == "jsonl" or len(looked) == 64)
    (pairs / "3a.png").write_bytes(picture(5))
    call("score_pairs", *given)
    assert len(scored(reward)) == before + 32, "the shard of 16 pairs"
    again = load(tmp_path / "out")
    assert again["quality"][:] != first
    redrawn = next(row for row in again if row["caption"] == "p3")["jpg_0"]
    assert redrawn.getpixel((0, 0))[0] == 5
    rows[5]["label_0"] = 0.0
    if kind == "jsonl":
        (pairs / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert "made with files" in refused("score_pairs", *given)


def test_a_reward_that_is_no_probability_is_refused_after_the_first_shard(tmp_path, reward):
    source = write(tmp_path / "pairs", pick_a_pic(200), files=1)
    mine = Path(reward.partition(":")[0])
    mine.write_text(mine.read_text().replace("/ 255", "/ 25"))
    message = refused("score_pairs", *flags(source, reward, tmp_path / "out", normalization="none"))
    assert "must be in [0, 1]" in message and len(scored(reward)) <= 32
