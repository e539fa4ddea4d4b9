# SPDX-License-Identifier: Apache-2.0
"""HPSv2 scores of preference pairs: score_pairs.py against hpsv2 1.2.0, full-size ViT-H/14, random weights, one run.

    python benchmarks/score_speed.py

Three ways to the same numbers, on the same pairs, block by block in turn:

- as its README says: `hpsv2.score([image, image], prompt)` for every pair. It loads the checkpoint anew at each call,
  so it is timed on few pairs;
- fair loop: the same function with the checkpoint loaded once. On today's torch, without its obsolete dependencies
  (tests/official.py); what it computes is untouched;
- ours: score_pairs.py from Parquet to the sorted dataset, the model loaded before, not timed.

The pairs are reused as Pick-a-Pic's are: 16 pairs a prompt (959.5k pairs, 58k captions), collected by an app that keeps
the preferred image and replaces the other, so of 17 images; 4 of them (24 %) stand in more than one pair, 1 (6 %) in
more than five, where DPO-QSD counts 25 % and "less than 5 %" (section 3.2). Prints images/s (two a pair), the largest
difference of a score, and at last the ratio of ours to the fair loop over all blocks, with the smallest and the
largest of a block.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import official  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPConfig, CLIPTokenizer  # noqa: E402

import score_pairs  # noqa: E402


KEPT = {9, 12, 14}  # the pairs of a prompt's 16 in which the new image wins, and stays instead of the old one
WORDS = "a photo of the portrait woman dragon city cyberpunk neon oil painting highly detailed 8k artstation".split()


def session() -> list[tuple[int, int]]:
    """The 16 pairs of a prompt, as numbers of its 17 images: one stands in 9 of them, others in 4, 3, 3 and 1."""
    pairs, kept = [], 0
    for new in range(1, 17):
        pairs.append((kept, new))
        kept = new if new in KEPT else kept
    return pairs


def picture(number: int, size: int) -> bytes:
    """A JPEG that is about as rough as a photograph."""
    coarse = np.random.default_rng(number).integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def make_block(rng: np.random.Generator, prompts: int, size: int, first_image: int) -> list[dict]:
    rows = []
    for prompt in range(prompts):
        caption = " ".join(rng.choice(WORDS, size=rng.integers(5, 25)))
        for pair in session():
            a, b = (first_image + 17 * prompt + image for image in pair)
            rows.append({"caption": caption, "image_0_uid": f"{a}", "image_1_uid": f"{b}", "label_0": 1.0})
    jpgs = {number: picture(number, size) for number in range(first_image, first_image + 17 * prompts)}
    for row in rows:
        row |= {f"jpg_{side}": jpgs[int(row[f"image_{side}_uid"])] for side in (0, 1)}
    return rows


def make_checkpoint(folder: Path):
    """Random ViT-H/14 weights as HPSv2 publishes them, with OpenAI's vocabulary; returns the official model."""
    open_clip = official.open_clip()
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"), output_dict=True).eval()
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2_compressed.pt")
    CLIPConfig(**official.VIT_H).save_pretrained(folder)
    merges = official.merges()
    letters = list(official.clip().simple_tokenizer.bytes_to_unicode().values())
    words = [*letters, *(f"{x}</w>" for x in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges]).save_pretrained(folder)
    return model


@contextlib.contextmanager
def checkpoint_stays(img_score, model):
    """Within this, `hpsv2.score` finds its model as it is: nothing is read from disk, nothing is copied."""
    load, load_state_dict = torch.load, type(model).load_state_dict
    torch.load = lambda *_, **__: {"state_dict": None}
    type(model).load_state_dict = lambda *_, **__: None
    try:
        yield
    finally:
        torch.load, type(model).load_state_dict = load, load_state_dict


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def official_scores(img_score, rows: list[dict], checkpoint: Path) -> tuple[np.ndarray, float]:
    """(pairs, 2) scores and seconds, of hpsv2's own function."""
    started, scores = synchronized(), []
    for row in rows:
        images = [Image.open(BytesIO(row[name])) for name in ("jpg_0", "jpg_1")]
        scores.append(img_score.score(images, row["caption"], cp=str(checkpoint)))
    return np.array(scores, dtype=np.float64), synchronized() - started


def our_scores(rows: list[dict], reward, folder: Path) -> tuple[np.ndarray, float]:
    """The same from score_pairs.py, Parquet to sorted Parquet, and the seconds of all its work."""
    (folder / "pairs").mkdir(parents=True)
    numbered = [{**row, "number": number} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(numbered), folder / "pairs" / "train.parquet", row_group_size=100)
    score_pairs.load_reward_model = lambda *_, **__: reward
    args = score_pairs.parse_arguments(
        ["--dataset_name", str(folder / "pairs"), "--reward", reward.name, "--output_dir", str(folder / "out")]
        + ["--num_examples", "0"]
    )
    started = synchronized()
    score_pairs.main(args)
    seconds = synchronized() - started
    table = pq.read_table(next((folder / "out" / "scores").glob("*.parquet"))).sort_by("number")
    return np.stack([table["score_0"].to_numpy(), table["score_1"].to_numpy()], axis=1), seconds


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="Blocks that are timed in turn.")
    parser.add_argument("--prompts", type=int, default=32 if cuda else 2, help="Prompts a block, of 16 pairs each.")
    parser.add_argument("--reload_pairs", type=int, default=1, help="Pairs a block for `hpsv2.score` as it is.")
    parser.add_argument("--size", type=int, default=512, help="Pixels a side.")
    parser.add_argument("--batch_size", type=int, default=64 if cuda else 4, help="Ours.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; {args.blocks} blocks of {16 * args.prompts} pairs, {args.size} pixels")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "HPS_v2_compressed.pt"
        model = make_checkpoint(folder)
        img_score, open_clip = official.hpsv2(), official.open_clip()
        img_score.device = "cuda" if cuda else "cpu"
        preprocess = open_clip.image_transform(224, is_train=False, resize_longest_max=True)
        img_score.model_dict.update(model=model.to(img_score.device), preprocess_val=preprocess)
        # Today's torchvision smooths when it resizes a tensor, so this is what hpsv2 computes now.
        reward = score_pairs.load_reward_model(
            f"hpsv2_antialias={folder}", img_score.device, batch_size=args.batch_size
        )
        seconds, first_image, difference, n_images, n_distinct = [], 0, 0.0, 0, 0
        for block in range(-1 if cuda else 0, args.blocks):  # block −1 warms a GPU up
            rows = make_block(rng, args.prompts if block >= 0 else 2, args.size, first_image)
            distinct = {row[f"image_{side}_uid"] for row in rows for side in (0, 1)}
            first_image += len(distinct)
            with checkpoint_stays(img_score, model):
                expected, fair = official_scores(img_score, rows, checkpoint)
            found, ours = our_scores(rows, reward, folder / f"block{block}")
            shutil.rmtree(folder / f"block{block}")
            _, reloading = official_scores(img_score, rows[: args.reload_pairs], checkpoint)
            difference = max(difference, float(np.abs(found - expected).max()))
            if block < 0:
                continue
            n_images, n_distinct = n_images + 2 * len(rows), n_distinct + len(distinct)
            seconds.append((fair, ours, reloading))
            counts = f"{2 * len(rows)} images, {len(distinct)} distinct"
            print(f"block {block}: {counts}: fair loop {fair:.1f} s, ours {ours:.1f} s: {fair / ours:.2f}", flush=True)
    fair, ours, reloading = (sum(times) for times in zip(*seconds))
    print(f"{n_images} images to score, {n_distinct} distinct: each in {n_images / n_distinct:.2f} comparisons")
    print(f"hpsv2.score as its README says: {2 * args.reload_pairs * args.blocks / reloading:.3f} images/s")
    print(f"fair loop: {n_images / fair:.3f} images/s")
    print(f"score_pairs.py: {n_images / ours:.3f} images/s")
    print(f"largest difference of a score: {difference:.1e}")
    ratios = [fair / ours for fair, ours, _ in seconds]
    found = {"device": where, "torch": torch.__version__, "date": time.strftime("%F"), "difference": difference}
    found["images_per_second"] = {
        "hpsv2.score": 2 * args.reload_pairs * args.blocks / reloading,
        "fair loop": n_images / fair,
        "score_pairs.py": n_images / ours,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found | {"ratios": ratios}, indent=2) + "\n")
    print(f"ratio {fair / ours:.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")


if __name__ == "__main__":
    main()
