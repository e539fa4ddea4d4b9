"""Makes the tiny models and datasets of the golden runs, once, in the folder world beside it: `python make_world.py`.

Uses the helpers of code/tests/conftest.py, code being a checkout of the scripts. Everything is seeded; the folder is written under a temporary
name and renamed, and is never written again: golden runs can be compared only if they read the same world.
"""

import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path


HERE = Path(__file__).resolve().parent
CODE, WORLD = HERE / "code", HERE / "world"
sys.dont_write_bytecode = True
sys.path[:0] = [str(CODE / "tests"), str(CODE), str(CODE / "shapes")]
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import conftest  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from build_synpic import preference_probability, preference_rank  # noqa: E402


REWARDS = """import numpy as np


def red(images, prompts):
    return [float(np.asarray(image.convert("RGB"))[..., 0].mean()) / 255 for image in images]
"""


def picture(rng: np.random.Generator) -> np.ndarray:
    """A picture of 24 to 80 pixels a side: a gradient, rectangles and noise, uint8 (h, w, 3)."""
    height, width = rng.integers(24, 81, 2)
    y, x = np.mgrid[0:1:complex(height), 0:1:complex(width)][..., None]
    pixels = rng.uniform(0, 255, 3) * (1 - y) * (1 - x) + rng.uniform(0, 255, 3) * y + rng.uniform(0, 80, 3) * x
    for _ in range(rng.integers(1, 5)):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        h, w = rng.integers(4, 24, 2)
        pixels[top : top + h, left : left + w] = rng.uniform(0, 255, 3)
    return (pixels + rng.normal(0, rng.uniform(1, 30), pixels.shape)).clip(0, 255).astype(np.uint8)


def file_of(pixels: np.ndarray, kind: int) -> bytes:
    """As PNG; of 8 kinds one is JPEG, one grey, one transparent."""
    image, buffer = Image.fromarray(pixels), BytesIO()
    if kind % 8 == 3:
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
    if kind % 8 == 5:
        image = image.convert("L")
    if kind % 8 == 7:
        image.putalpha(Image.fromarray(np.linspace(0, 255, pixels.shape[1], dtype=np.uint8)[None].repeat(len(pixels), 0)))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scores_of(pixels: np.ndarray) -> dict[str, float]:
    """Four rewards of a picture. `contrast` is rounded, so that there are ties; `left` has both signs."""
    values = pixels / 255
    half = pixels.shape[1] // 2
    return {
        "hpsv2.1": round(float(0.2 + 0.1 * values[..., 2].mean()), 4),
        "red": round(float(values[..., 0].mean()), 4),
        "contrast": round(float(values.std()), 1),
        "left": round(float(values[:, :half].mean() - values[:, half:].mean()), 4),
    }


def ranked(seed: int) -> list[dict]:
    """12 prompts x 4 images. The prompt of row 3 is longer than the tokenizers take; the images of row 7 are all
    equally preferred."""
    rng, rows = np.random.default_rng(seed), conftest.ranked_rows(n=12, seed=seed)
    for i, row in enumerate(rows):
        pictures = [picture(rng) for _ in range(4)]
        files = [file_of(pixels, 4 * i + j) for j, pixels in enumerate(pictures)]
        row["images"] = [{"bytes": file, "path": None} for file in files]
        each = [scores_of(pixels) for pixels in pictures]
        row["scores"] = {name: [1.0 if i == 7 else scores[name] for scores in each] for name in each[0]}
        values = np.array([row["scores"][name] for name in sorted(row["scores"])], dtype=np.float32).astype(np.float64)
        row["preference_probability"] = preference_probability(values).tolist()
        row["rank"] = preference_rank(values).tolist()
    rows[3]["prompt"] = ", and ".join(row["prompt"] for row in rows)
    return rows


def pairs(seed: int) -> list[dict]:
    """24 pairs, unsorted: rows 5 and 13 are ties, 6 and 17 have no label, 20 has a null, 2 and 9 equal quality."""
    rng, rows = np.random.default_rng(seed), conftest.pair_rows(n=24, seed=seed)
    for i, row in enumerate(rows):
        pictures = [picture(rng) for _ in range(2)]
        row["jpg_0"], row["jpg_1"] = (file_of(pixels, 2 * i + side) for side, pixels in enumerate(pictures))
        row["label_0"] = 0.5 if i in (5, 13) else None if i == 20 else row["label_0"]
        row["has_label"] = i not in (6, 17)
        winner = 0 if row["label_0"] in (1, 0.5, None) else 1
        red = [scores_of(pixels)["red"] for pixels in pictures]
        row["quality"] = red[winner] * (1 - red[1 - winner])
    rows[9]["quality"] = rows[2]["quality"]
    return rows


def join(world: Path, rows: list[dict]) -> None:
    """The same pairs as images in another order, some on the other side, and as scores without images."""
    holder = [dict(row) for row in rows[::-1]]
    for row in holder[::3]:
        for name in ("jpg_{}", "image_{}_uid"):
            row[name.format(0)], row[name.format(1)] = row[name.format(1)], row[name.format(0)]
    holder.insert(0, {**pairs(seed=1)[0], "image_0_uid": "x", "image_1_uid": "y"})
    conftest.write_pairs(world / "images", holder, drop=("quality", "label_0", "caption", "has_label"))
    conftest.write_pairs(world / "scores", rows, drop=("jpg_0", "jpg_1"))


def main() -> None:
    if WORLD.exists():
        raise SystemExit(f"{WORLD} is there already")
    world = WORLD.with_name("world.tmp")
    shutil.rmtree(world, ignore_errors=True)
    models = world / "models"
    conftest.make_tiny_sdxl(models / "sdxl")
    conftest.make_tiny_sd(models / "sd")
    conftest.make_tiny_sd(models / "sd-v", prediction_type="v_prediction")
    conftest.make_tiny_sd3(models / "sd3")
    conftest.make_tiny_sd3(models / "sd3-no-t5", t5=False)
    conftest.make_tiny_sd3(models / "sd35", qk_norm="rms_norm")
    shutil.copytree(conftest.make_tiny_sdxl(models / "other", seed=1) / "vae", models / "vae")
    shutil.rmtree(models / "other")
    conftest.write_dataset(world / "ranked", ranked(seed=0))
    rows = pairs(seed=0)
    conftest.write_pairs(world / "pairs", rows)
    conftest.write_pairs(world / "raw", rows, drop=("quality", "image_0_uid", "image_1_uid"))
    join(world, rows)
    (world / "rewards.py").write_text(REWARDS)
    command = ["score_pairs.py", "--dataset_name", world / "raw", "--reward", f"{world}/rewards.py:red"]
    command += ["--output_dir", world / "qsd", "--include_images", "--num_examples", 0]
    environment = {**os.environ, "HF_HOME": str(world / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, *map(str, command)], cwd=CODE, env=environment, check=True)
    shutil.rmtree(world / "qsd" / "work", ignore_errors=True)
    shutil.rmtree(world / "hf", ignore_errors=True)
    world.rename(WORLD)


if __name__ == "__main__":
    main()
