# SPDX-License-Identifier: Apache-2.0
"""What a user of build_synpic.py sees: the dataset, what a rerun costs, refusals."""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import world
import yaml
from conftest import ROOT, call, check_card, make_tiny_pickscore, make_tiny_sdxl, refused, tiny_clip
from datasets import Image, List, Value, load_dataset
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from filelock import FileLock
from huggingface_hub import DatasetCard
from PIL import Image as PILImage
from scipy import stats
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor

import build_synpic


REWARDS = ["shapes/world.py:color_reward", "shapes/world.py:shape_reward", "shapes/world.py:clean_reward"]
CALL = {"num_inference_steps": 1, "height": 32, "width": 32}


def build(*words) -> None:
    call("build_synpic", *words)


@pytest.fixture(scope="session")
def recipe(tiny_sdxl, tmp_path_factory):
    """Two generators in one file, three in the other."""
    folder = tmp_path_factory.mktemp("recipes")
    entries = [{"name": name, "model": str(tiny_sdxl), "call": CALL} for name in ("one", "two", "three")]
    entries[1]["model"] = entries[2]["model"] = str(make_tiny_sdxl(folder / "other-sdxl", seed=1))
    entries[1]["call"] = {**CALL, "guidance_scale": 3.0}
    (folder / "two.yaml").write_text(yaml.safe_dump(entries[:2]))
    (folder / "three.yaml").write_text(yaml.safe_dump(entries))
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Ten prompts, one of them twice; the shards below hold four."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    shapes = [f"a {color} circle" for color in ("red", "green", "blue", "yellow", "purple", "cyan")]
    shapes += ["a square", "a red circle", "a cross", "two red squares", "three blue circles"]
    file.write_text("\n".join(shapes) + "\n")
    return file


def flags(prompts, recipe, output, rewards=tuple(REWARDS), generators="two", **more):
    found = ["--prompts", prompts, "--generators", recipe / f"{generators}.yaml", "--output_dir", output]
    found += ["--rewards", *rewards, "--shard_size", 4, "--image_format", "png"]
    return found + [item for name, value in more.items() for item in (f"--{name}", value)]


@pytest.fixture(scope="session")
def built(prompts, recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "synpic"
    build(*flags(prompts, recipe, output, gpu_hourly_cost=1.5))
    return output


class Painter:
    """A generator that draws nothing: an image tells its seed and the number in its prompt."""

    def __init__(self, *arguments):
        pass

    def __call__(self, prompts, seeds, bar):
        return [PILImage.new("RGB", (8, 8), (s % 256, 0, int(p[1:]) % 256)) for p, s in zip(prompts, seeds)]

    def count_cut(self, prompts):
        return 0


def snapshot(folder: Path) -> dict:
    """Path → (content, time of writing) of every Parquet file."""
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.rglob("*.parquet")}


def contents(folder: Path) -> dict:
    """Path → content of every Parquet file of a finished dataset."""
    return {file: content for file, (content, _) in snapshot(folder).items() if not file.startswith("work")}


def written(before: dict, folder: Path, start: str = "") -> list[str]:
    """Files written anew, whose paths start so."""
    after = snapshot(folder)
    return sorted(name for name in after if after[name] != before.get(name) and name.startswith(start))


def test_dataset_has_the_schema_and_the_ranking(built):
    dataset = load_dataset(str(built), split="train")
    kinds = dataset.features
    assert list(kinds) == "prompt_id prompt images generators seeds scores preference_probability rank".split()
    assert kinds["images"] == List(Image()) and kinds["generators"] == List(Value("string"))
    assert kinds["seeds"] == List(Value("int64")) and kinds["rank"] == List(Value("int32"))
    assert kinds["preference_probability"] == List(Value("float32"))
    names = ["color_reward", "shape_reward", "clean_reward"]
    assert dict(kinds["scores"]) == {name: List(Value("float32")) for name in names}
    assert len(dataset) == 10 == len(set(dataset["prompt_id"])) and dataset[0]["prompt"] == "a red circle"
    for row in dataset:
        assert row["generators"] == ["one", "two"] and row["seeds"][0] != row["seeds"][1]
        matrix = np.array([row["scores"][name] for name in names])
        # The stored images are what was scored.
        assert np.allclose(matrix[0], world.color_reward(row["images"], [row["prompt"]] * 2), atol=1e-6)
        wins = [(matrix[:, 0] > matrix[:, 1]).mean(), (matrix[:, 1] > matrix[:, 0]).mean()]
        assert row["preference_probability"] == pytest.approx(wins)
        if wins[0] != wins[1]:
            assert row["rank"] == ([1, 2] if wins[0] > wins[1] else [2, 1])
    scores = load_dataset(str(built), "scores", split="train")
    assert scores.column_names == [name for name in dataset.column_names if name != "images"]
    assert scores.to_list() == dataset.remove_columns("images").to_list()


def test_images_are_what_the_pipeline_draws_from_the_stored_seed(built, tiny_sdxl):
    row = load_dataset(str(built), split="train")[3]
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(row["seeds"][0])
    image = pipeline(row["prompt"], generator=generator, **CALL).images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(row["images"][0]).astype(int)).max() <= 1


def test_card_tells_what_was_built(built):
    check_card(built)
    card = DatasetCard.load(built / "README.md")
    assert card.data.to_dict()["configs"][0]["data_files"][0]["path"] == "data/train-*.parquet"
    assert card.data.task_categories == ["text-to-image"] and card.data.size_categories == ["n<1K"]
    for words in ("Kendall's tau", "cost in $ (at 1.5 an hour)", "Share of comparisons won", "num_inference_steps: 1"):
        assert words in card.text
    scores = np.array([row["color_reward"] for row in load_dataset(str(built), split="train")["scores"]])
    wins = [(scores[:, 0] > scores[:, 1]).mean(), (scores[:, 1] > scores[:, 0]).mean()]
    line = next(line for line in card.text.splitlines() if line.startswith("| color_reward | 0"))
    assert [float(cell) for cell in line.split("|")[2:4]] == pytest.approx(wins, abs=6e-4)
    assert [info["splits"][0]["num_examples"] for info in card.data.dataset_info] == [10, 10]
    grid = np.asarray(PILImage.open(built / "grid.png"))
    row = pq.read_table(built / "data" / "train-00000-of-00003.parquet").slice(0, 1).to_pylist()[0]
    assert grid.shape[1] == 512
    assert grid[22 + 2, row["rank"].index(1) * 256 + 100].tolist() == [0, 200, 0]  # the frame of the best image


def test_many_shards_make_few_files(recipe, tmp_path, monkeypatch):
    """What the Hub takes in one commit: at most 200 files; every prompt once, in order, with its own images."""
    monkeypatch.setattr(build_synpic, "Generator", Painter)
    (tmp_path / "prompts.txt").write_text("\n".join(f"p{i}" for i in range(201)) + "\n")
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return [i.getpixel((0, 0))[0] for i in images]\n")
    given = flags(tmp_path / "prompts.txt", recipe, tmp_path / "out", [f"{tmp_path / 'mine.py'}:red"])
    build(*given, "--shard_size", 1)
    assert len(list((tmp_path / "out" / "data").iterdir())) == 101  # 201 shards, two a file
    dataset = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    assert dataset["prompt"][:] == [f"p{i}" for i in range(201)]
    for i in (0, 1, 2, 3, 100, 200):
        row = dataset[i]
        pixels = [image.getpixel((0, 0)) for image in row["images"]]
        assert pixels == [(seed % 256, 0, i % 256) for seed in row["seeds"]]
        assert row["scores"]["red"] == [red for red, _, _ in pixels]


def test_a_second_run_makes_what_is_lost_alone(built, prompts, recipe, tmp_path, monkeypatch):
    output = shutil.copytree(built, tmp_path / "again")
    before = snapshot(output)
    with monkeypatch.context() as patch:
        patch.setattr(build_synpic, "Generator", lambda *a: pytest.fail("a generator was loaded"))
        patch.setattr(build_synpic, "load_reward_model", lambda *a: pytest.fail("a reward was loaded"))
        build(*flags(prompts, recipe, output))
    assert snapshot(output) == before
    for lost in ("work/images/two/00001.parquet", "work/scores/shape_reward/one/00002.parquet"):
        (output / lost).unlink()
        build(*flags(prompts, recipe, output))
        assert written(before, output) == [lost]  # and the dataset's shard holds what it held
        assert pq.read_table(output / lost).equals(pq.read_table(built / lost))
        before = snapshot(output)
    truncated = output / "data" / "train-00000-of-00003.parquet"
    truncated.write_bytes(truncated.read_bytes()[:100])
    build(*flags(prompts, recipe, output))
    assert load_dataset("parquet", data_files=str(truncated), split="train")[0]["prompt"] == "a red circle"


def test_new_generators_rewards_and_prompts_cost_only_themselves(built, prompts, recipe, tmp_path):
    output, longer = shutil.copytree(built, tmp_path / "more"), tmp_path / "longer.txt"
    assert len(load_dataset(str(output), split="train")) == 10  # and is in the cache of datasets now
    longer.write_text(prompts.read_text() + "a triangle\na blue cross\na green cross\n")
    rewards = [*REWARDS, "shapes/world.py:count_reward"]
    for given, number, words in (
        (flags(prompts, recipe, output, generators="three"), 3 + 3 * 3, "/three/"),
        (flags(prompts, recipe, output, rewards, generators="three"), 3 * 3, "/count_reward/"),
        (flags(longer, recipe, output, rewards, generators="three"), 3 + 4 * 3, "/00003.parquet"),  # no shard changes
    ):
        before = snapshot(output)
        build(*given)
        made = written(before, output, "work/")
        assert len(made) == number and all(words in name for name in made)
    dataset = load_dataset(str(output), split="train")
    assert len(dataset) == 13 and len(dataset[0]["scores"]) == 4
    assert dataset[0]["generators"] == ["one", "two", "three"] and sorted(dataset[0]["rank"]) == [1, 2, 3]
    assert "only grow" in refused("build_synpic", *flags(prompts, recipe, output))


def test_images_drawn_anew_are_scored_anew(built, prompts, recipe, tmp_path):
    """Scores belong to images: after a folder of images is deleted and drawn with other settings, none is stale."""
    output = shutil.copytree(built, tmp_path / "again")
    entries = yaml.safe_load((recipe / "two.yaml").read_text())
    entries[0]["call"]["num_inference_steps"] = 2
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(entries))
    shutil.rmtree(output / "work" / "images" / "one")
    build(*flags(prompts, tmp_path, output))
    old, new = (load_dataset(str(folder), split="train") for folder in (built, output))
    for a, b in zip(old, new):
        assert not np.array_equal(np.asarray(a["images"][0]), np.asarray(b["images"][0]))
        assert np.allclose(b["scores"]["color_reward"], world.color_reward(b["images"], [b["prompt"]] * 2), atol=1e-6)


def test_images_that_exist_look_as_in_a_viewer_and_are_read_again_when_they_change(tmp_path, monkeypatch, capsys):
    """16 bits keep their brightness, what is transparent is white, a camera's picture stands upright."""
    (tmp_path / "prompts.txt").write_text("p0\np1\np2\n")
    (tmp_path / "mine.py").write_text(
        "def red(images, prompts):\n    return [image.getpixel((0, 0))[0] for image in images]\n"
    )
    recipe = [{"name": name, "images": f"{tmp_path}/{name}{{index}}.png"} for name in "ab"]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe))
    PILImage.fromarray(np.full((4, 6), 100 << 8, dtype=np.uint16)).save(tmp_path / "a0.png")
    hidden = PILImage.new("RGBA", (6, 4), (255, 0, 0, 0))
    hidden.putpixel((0, 0), (1, 2, 3, 255))
    hidden.save(tmp_path / "a1.png")
    upright = PILImage.new("RGB", (4, 6), (9, 8, 7))
    upright.putpixel((0, 0), (3, 2, 1))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.transpose(PILImage.Transpose.ROTATE_90).save(tmp_path / "a2.png", exif=exif)
    for i in range(3):
        PILImage.new("RGB", (6, 4), (40, 50, i)).save(tmp_path / f"b{i}.png")
    given = flags(tmp_path / "prompts.txt", tmp_path, tmp_path / "out", [f"{tmp_path / 'mine.py'}:red"])
    given += ["--shard_size", 1]
    build(*given)
    assert "draw a: 100%" in (said := capsys.readouterr().err) and "3/3" in said
    grey, clear, turned = [row["images"][0] for row in load_dataset(str(tmp_path / "out"), split="train")]
    assert np.all(np.asarray(grey) == 100) and grey.mode == clear.mode == turned.mode == "RGB"
    assert clear.getpixel((0, 0)) == (1, 2, 3) and clear.getpixel((5, 3)) == (255, 255, 255)
    assert np.array_equal(np.asarray(turned), np.asarray(upright))

    before, read, picture = snapshot(tmp_path / "out"), [], build_synpic.read_picture
    monkeypatch.setattr(build_synpic, "read_picture", lambda file: read.append(file) or picture(file))
    build(*given)
    assert snapshot(tmp_path / "out") == before and not read
    changed = tmp_path / "b1.png"
    time = changed.stat().st_mtime_ns
    PILImage.new("RGB", (6, 4), (30, 50, 1)).save(changed)  # of the same size
    os.utime(changed, ns=(time, time + 1))
    build(*given)
    assert read == [str(changed)]
    assert written(before, tmp_path / "out", "work") == [
        "work/images/b/00001.parquet",
        "work/scores/red/b/00001.parquet",
    ]
    row = load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "new")[1]
    assert row["scores"]["red"][1] == 30 == row["images"][1].getpixel((0, 0))[0]
    os.truncate(changed, 40)
    assert f"{changed} cannot be read" in refused("build_synpic", *given)


def test_stable_cascade_draws_with_its_prior(tmp_path):
    """Real Stable Cascade classes, tiny: the decoder gets what the prior made of the same prompt and seed."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from train_generators import make_tokenizer
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer, blocks = make_tokenizer(), ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    common = {"conditioning_dim": 32, "block_out_channels": (16, 32), "block_types_per_layer": (blocks, blocks)}
    common |= {"clip_text_pooled_in_channels": 32, "dropout": (0.1, 0.1), "timestep_ratio_embedding_dim": 16}
    names = "num_attention_heads down_num_layers_per_block up_num_layers_per_block"
    common |= {name: (2, 2) if "heads" in name else (1, 1) for name in names.split()}
    common |= {"down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 1)}
    channels = {"in_channels": 16, "out_channels": 16, "clip_text_in_channels": 32, "clip_image_in_channels": 32}
    kinds = {"switch_level": (False,), "self_attn": True, "timestep_conditioning_type": ("sca", "crp")}
    prior = StableCascadeUNet(**channels, **kinds, **common)
    decoder = StableCascadeUNet(in_channels=4, out_channels=4, effnet_in_channels=16, self_attn=False, **common)
    shared = {"tokenizer": tokenizer, "text_encoder": CLIPTextModelWithProjection(tiny_clip(tokenizer, 32)).eval()}
    shared["scheduler"] = DDPMWuerstchenScheduler()
    prior = StableCascadePriorPipeline(prior=prior, image_encoder=None, feature_extractor=None, **shared)
    prior.save_pretrained(tmp_path / "prior")
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8)
    decoder = StableCascadeDecoderPipeline(decoder=decoder, vqgan=vqgan, latent_dim_scale=4.0, **shared)
    decoder.save_pretrained(tmp_path / "decoder")
    # As the published model_index.json has it.
    index = tmp_path / "decoder" / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "vqgan": ["wuerstchen", "PaellaVQModel"]}))
    size = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 128, "width": 128}
    entry = {"name": "cascade", "model": str(tmp_path / "decoder")}
    entry |= {"call": {"num_inference_steps": 2, "guidance_scale": 0.0}}
    entry |= {"prior": {"model": str(tmp_path / "prior"), "call": size}}
    arguments = build_synpic.ScriptArguments(prompts="p.txt")
    draw = build_synpic.Generator(entry, torch.device("cpu"), arguments)
    prompts = ["a red circle", "a blue cross"]
    images, again = (draw(prompts, seeds, tqdm(disable=True)) for seeds in ([1, 2], [1, 3]))
    assert draw.count_cut(prompts) == 0 and draw.count_cut(["a red circle " * 10, *prompts]) == 1
    assert len(images) == 2 and images[0].size[0] >= 32
    assert np.array_equal(np.asarray(images[0]), np.asarray(again[0]))
    assert not np.array_equal(np.asarray(images[1]), np.asarray(again[1]))


def test_default_generators_are_the_papers_four():
    entries = build_synpic.read_generators(None)
    assert [entry["name"] for entry in entries] == ["sdxl", "sd3-medium", "pixart-sigma", "stable-cascade"]
    assert entries == yaml.safe_load((ROOT / "recipes" / "synpic_paper.yaml").read_text())


# tests/faults.py has more that is refused. A generator's entries:
BAD_ENTRIES = {
    "load": ({"load": {"torch_dtype": "float16"}}, "do you mean dtype?"),
    "dtype": ({"load": {"dtype": {"unnet": "float16", "default": "float32"}}}, "unet?"),
    "prior": ({"prior": {"model": "x", "cal": {}}}, "unknown key cal; the keys are call, load, model"),
    "text": ({"call": "fast"}, "load and call hold `name: value`"),
    "field": (
        {"images": "x/{idx}.png"},
        "generator a: images x/{idx}.png: no field 'idx'; the fields are prompt_id, prompt, index, index+1",
    ),
    "format": ({"images": "x/{index.no}.png"}, "no attribute 'no'; the fields are"),
    "no_config": ({"model": "x.safetensors"}, "generator a: x.safetensors: a single file, and no other model, needs"),
    "config": ({"load": {"config": "x"}}, "needs `load: {config: Hub id or folder}`"),
}
BAD_FLAGS = {
    "--rewards TMP/mine.py:f": "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    "--rewards shapes/world.py:f": "no attribute 'f'",
    "--rewards beauty": "pickscore",
    "--rewards no/file.py:f": "no/file.py",
    "--generators TMP/single.yaml": "at least 2",
    "--compile --generation_batch_size auto": "--generation_batch_size auto: with --compile, give a number",
    "--task_index 3 --num_tasks 3": "--task_index 3: must be less than --num_tasks",
    "--stages rank --num_tasks 3": "give --num_tasks 1",
}


def test_what_is_wrong_is_named_before_anything_is_drawn(prompts, recipe, tiny_sdxl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_synpic, "Generator", lambda *a: pytest.fail("a generator was loaded"))
    (tmp_path / "single.yaml").write_text("[{name: a, model: x}]")
    cases = dict(BAD_FLAGS)
    (tmp_path / "mine.py").write_text("import no_such_module\n")
    for name, (entry, words) in BAD_ENTRIES.items():
        entries = [{"name": "a", "model": str(tiny_sdxl), **entry}, {"name": "b", "model": str(tiny_sdxl)}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(entries))
        cases[f"--generators TMP/{name}.yaml"] = words
    for given, words in cases.items():
        more = given.replace("TMP", str(tmp_path)).split()
        message = refused("build_synpic", *flags(prompts, recipe, tmp_path / "out"), *more)
        assert words in message, (given, message)
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def test_output_folder_of_another_run_is_refused(built, prompts, recipe, tmp_path):
    before = snapshot(built)
    assert "seed 0, not 1" in refused("build_synpic", *flags(prompts, recipe, built, seed=1))
    other = tmp_path / "other.txt"
    other.write_text("a cross\na square\n")
    assert "other prompts" in refused("build_synpic", *flags(other, recipe, built))
    entries = yaml.safe_load((recipe / "two.yaml").read_text())
    entries[0]["call"]["num_inference_steps"] = 2
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(entries))
    message = refused("build_synpic", *flags(prompts, tmp_path, built))
    assert "images/one was made with call {" in message and "delete that folder" in message
    assert snapshot(built) == before


def test_three_tasks_make_the_same_dataset(built, prompts, recipe, tmp_path):
    """On a new shared folder, and one run for the last stages. tests/faults.py does it at once, with kills."""
    given = flags(prompts, recipe, tmp_path / "out")
    assert "is missing: run the generate stage first" in refused("build_synpic", *given, "--stages", "score")
    for task in (0, 2):
        build(*given, "--num_tasks", 3, "--task_index", task)
    message = refused("build_synpic", *given, "--stages", "rank", "publish")
    assert "00001.parquet is missing" in message and "run the" in message and not (tmp_path / "out" / "data").exists()
    before = snapshot(tmp_path / "out")
    for lock, other in ((".lock", ["--num_tasks", 3]), (".lock-2", [])):
        with FileLock(tmp_path / "out" / lock):  # as a single run and a task hold it
            assert "in use by another run" in refused("build_synpic", *given, *other)
    build(*given, "--num_tasks", 3, "--task_index", 1)
    new = written(before, tmp_path / "out")
    assert new and all("00001.parquet" in name for name in new)
    build(*given, "--stages", "rank", "publish")
    assert contents(tmp_path / "out") == contents(built)


def test_out_of_memory_halves_the_batch_and_draws_the_same(built, prompts, recipe, tmp_path, monkeypatch, capsys):
    drawn, draw = [], build_synpic.Generator.draw

    def small_gpu(self, texts, seeds, limit=2):
        drawn.append(len(texts))
        if (self.batch_size if self.compile else len(texts)) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, texts, seeds)

    monkeypatch.setattr(build_synpic.Generator, "draw", small_gpu)
    build(*flags(prompts, recipe, tmp_path / "out"))
    warning = "warning: generator one: the device's memory does not hold 4 images at once: half as many\n"
    assert capsys.readouterr().err.count(warning) == 1
    assert drawn == 2 * [4, 2, 2, 2, 2, 2]  # each generator tries the full batch once
    rows, expected = (load_dataset(str(folder), split="train") for folder in (tmp_path / "out", built))
    assert rows["seeds"] == expected["seeds"]
    for row, other in zip(rows, expected):
        for image, same in zip(row["images"], other["images"]):
            assert np.abs(np.asarray(image).astype(int) - np.asarray(same).astype(int)).max() <= 1
    # A batch that is compiled is always full: there a single image that does not fit is no reason to end.
    monkeypatch.setattr("diffusers.ModelMixin.compile_repeated_blocks", lambda *_, **__: None)
    few = [*flags(prompts, recipe, tmp_path / "compiled"), "--max_prompts", 1, "--generation_batch_size", 4]
    build(*few, "--compile", "--stages", "generate")
    assert drawn[12:] == 2 * [1, 1]
    monkeypatch.setattr(build_synpic.Generator, "draw", lambda self, *batch: small_gpu(self, *batch, limit=0))
    message = refused("build_synpic", *flags(prompts, recipe, tmp_path / "none", generation_batch_size="auto"))
    assert message == "generator one: the device's memory does not hold a single image"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_generators_draw_the_same_images(built, prompts, recipe, tmp_path, monkeypatch):
    """But for rounding. One size of batch is compiled: the last batch of a shard, which is smaller, adds no graph."""
    graphs, draw = [], build_synpic.Generator.draw

    def counted(self, texts, seeds):
        images = draw(self, texts, seeds)
        graphs.append((len(texts), counters["stats"]["unique_graphs"]))
        return images

    torch._dynamo.reset()
    monkeypatch.setattr(build_synpic.Generator, "draw", counted)
    more = {"stages": "generate", "generation_batch_size": 3}
    given = flags(prompts, recipe, tmp_path / "out", **more)
    build(*given, "--compile")
    sizes, found = zip(*graphs)
    assert sizes == 2 * (3, 1, 3, 1, 2) and found[0] > 0 and len(set(found[:5])) == len(set(found[5:])) == 1
    for file in sorted((tmp_path / "out").rglob("work/images/*/*.parquet")):
        table, other = (pq.read_table(path) for path in (file, built / file.relative_to(tmp_path / "out")))
        assert table["seed"] == other["seed"]
        for image, same in zip(table["image"].to_pylist(), other["image"].to_pylist()):
            image, same = (np.asarray(PILImage.open(BytesIO(item))).astype(int) for item in (image, same))
            assert np.abs(image - same).max() <= 2


def test_rewards_at_once_decode_once_and_give_the_same_bytes(built, prompts, recipe, tmp_path, monkeypatch):
    """Two models and a function that spoils its images: the dataset of one after the other, each image decoded once for
    both models, and again for the function. A run that lacks a file of one model scores only that."""
    clip = make_tiny_pickscore(tmp_path / "clip")
    (tmp_path / "mine.py").write_text(
        "def spoiler(images, prompts):\n    for image in images:\n        image.paste('black', (0, 0, *image.size))\n"
        "    return [len(prompt) for prompt in prompts]\n"
    )
    rewards = [f"pickscore={clip}", f"{tmp_path / 'mine.py'}:spoiler", f"clipscore={clip}"]
    outputs, decode, decoded = {}, build_synpic.decode_image, []
    monkeypatch.setattr(build_synpic, "decode_image", lambda image: decoded.append(1) or decode(image))
    for number in (1, 2):
        decoded.clear()
        outputs[number] = output = tmp_path / str(number)
        shutil.copytree(built / "work", output / "work")
        given = flags(prompts, recipe, output, rewards, rewards_at_once=number, reward_batch_size=3)
        build(*given)
        # Each once for all rewards that are held, and passed on to each; and two of noise, to try the function.
        assert len(decoded) == (2 if number == 2 else 3) * 20 + 3 * 20 + 2
    assert contents(outputs[1]) == contents(outputs[2]) and len(contents(outputs[1])) == 4
    check_card(outputs[1])  # also of a reward that is constant for each prompt

    lost = outputs[2] / "work" / "scores" / "clipscore" / "two" / "00001.parquet"
    before = snapshot(outputs[2])
    lost.unlink()
    build(*given)
    assert written(before, outputs[2]) == [str(lost.relative_to(outputs[2]))]


def test_statistics_are_those_of_scipy(tmp_path):
    """Over two files: tau-b with ties, and a reward that orders nothing in some rows, or in all."""
    rng, rewards = np.random.default_rng(0), ["a", "b.1", "constant"]
    scores = rng.integers(0, 4, (3, 60, 5)).astype(np.float32)
    scores[1, :7], scores[2] = 2.0, 1.0
    files = []
    for number, part in enumerate((slice(0, 25), slice(25, 60))):
        rows = [
            {"scores": dict(zip(rewards, scores[:, i].tolist())), "preference_probability": scores[0, i].tolist()}
            for i in range(60)[part]
        ]
        files.append(tmp_path / f"{number}.parquet")
        build_synpic.write_tables(iter([pa.Table.from_pylist(rows)]), files[-1], {})
    wins, taus = build_synpic.dataset_statistics(files, rewards)
    expected = np.nanmean([stats.kendalltau(*scores[:2, i]).statistic for i in range(60)])
    assert taus == pytest.approx(np.array([[1, expected, 0], [expected, 1, 0], [0, 0, 1]]))
    for reward in range(3):
        shares = [build_synpic.preference_probability(scores[reward, i][None]) for i in range(60)]
        assert wins[reward] == pytest.approx(np.mean(shares, axis=0))
    assert wins[3] == pytest.approx(scores[0].mean(axis=0))


def test_a_file_of_many_shards_needs_the_memory_of_one(tmp_path):
    """And small row groups, which the Hub's viewer needs."""
    held, size = [], 64 * 40_000

    def tables():
        for shard in range(24):
            held.append(pa.total_allocated_bytes())
            images = [os.urandom(40_000) for _ in range(64)]
            yield pa.table({"number": range(64 * shard, 64 * shard + 64), "image": images})

    build_synpic.write_tables(tables(), tmp_path / "many.parquet", {"a": 1})
    assert max(held) - held[0] < 6 * size
    metadata = pq.read_metadata(tmp_path / "many.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [64] * 24
    assert pq.read_table(tmp_path / "many.parquet")["number"].to_pylist() == list(range(64 * 24))
    assert build_synpic.shard_facts(tmp_path / "many.parquet") == {"a": 1}


def test_what_no_drawing_should_do_to_a_dataset(tiny_sd, tmp_path, capsys):
    """A safety checker, which replaces images by black ones, does not draw; one text is the negative prompt of all; and
    what is black, or is read in part only, is said and stands on the card."""
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**tower, "vocab_size": 100}, vision_config=vision, projection_dim=24)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data[:] = -1.0  # every image has all concepts
    checker.concept_embeds.data = torch.randn_like(checker.concept_embeds)
    size = {"height": 32, "width": 32}
    parts = StableDiffusionPipeline.from_pretrained(tiny_sd).components | {"safety_checker": checker}
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    StableDiffusionPipeline(**parts, requires_safety_checker=True).save_pretrained(tmp_path / "checked")
    dark = StableDiffusionPipeline.from_pretrained(tiny_sd)
    dark.vae.decoder.conv_out.weight.data.zero_()
    dark.vae.decoder.conv_out.bias.data.fill_(-1.0)
    dark.save_pretrained(tmp_path / "dark")
    prompts = ["a red circle", "a blue square", "a " + "red " * 30 + "circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "mine.py").write_text(
        "def light(images, prompts):\n    return [sum(i.getpixel((9, 9))) for i in images]\n"
    )
    negative = {**CALL, "negative_prompt": "blurry", "guidance_scale": 3.0}
    entries = [{"name": name, "model": str(tmp_path / name), "call": negative} for name in ("checked", "dark")]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(entries))
    build(*flags(tmp_path / "prompts.txt", tmp_path, tmp_path / "out", [f"{tmp_path / 'mine.py'}:light"]))
    for row in load_dataset(str(tmp_path / "out"), split="train"):
        light, black = (np.asarray(image).max() for image in row["images"])
        assert light > 0 and black == 0 and row["preference_probability"] == [1.0, 0.0]
    said, card = capsys.readouterr().err, check_card(tmp_path / "out")
    cut = "checked reads only the beginning of 1 of the 3 prompts."
    for line in ("3 of the 3 images of dark are black all over.", cut):
        assert said.count(f"warning: {line}") == 1 and line in card
    assert "images of checked are black" not in said
