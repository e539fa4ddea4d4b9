# SPDX-License-Identifier: Apache-2.0
"""Tiny real pipelines and datasets: real diffusers and transformers classes, a few thousand parameters, no network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # scripts under test run beside each other
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import gc
import importlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import diffusers
import hub
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, List, Value
from forks import ROOT, Process, zygote
from PIL import Image as PILImage
from safetensors.torch import load_file


sys.path[:0] = [str(ROOT / folder) for folder in (".", "shapes", "metrics", "benchmarks", "tests/golden")]
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The file that takes longest goes first: started last, it would keep one worker busy while the other waits."""
    items.sort(key=lambda item: item.path.name != "test_hub.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start(*command, **options) -> list[Process]:
    """A script of the repository in a process of its own, as a user starts it; with `torchrun` in several."""
    words, together = list(map(str, command)), [{}]
    if words[:2] == ["-m", "torch.distributed.run"]:
        count, words = int(words[4]), words[5:]
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        together = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Process(zygote(), words, {**os.environ, **mine}, **options) for mine in together]


def run(*command, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Runs it to its end; with options of `subprocess.run` in a new interpreter."""
    if options:
        words = [sys.executable, *map(str, command)]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, **options)
    else:
        processes = start(*command)
        outputs = map("".join, zip(*(process.communicate() for process in processes)))
        result = subprocess.CompletedProcess(command, max(process.returncode for process in processes), *outputs)
    if check and result.returncode:
        raise AssertionError(f"{command}: exit code {result.returncode}\n{result.stderr[-4000:]}")
    return result


def torchrun(processes: int, script) -> list:
    """The start of a command for several processes; each run takes a free port, so that tests can run side by side."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, script]


def run_until(file: Path, *command) -> None:
    """Runs a script as `run` does, and kills it with -9 as soon as the file is there."""
    (process,) = start(*command)
    while process.poll() is None and not file.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@functools.cache
def load(script: str):
    """A script as a module. What it has imported stays, so the collector need not look at it again."""
    module = importlib.import_module(script)
    gc.collect()
    gc.freeze()
    return module


def call(script: str, *flags) -> None:
    """The same inside this process: parse the flags, run the script's main."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may hold one kind of run only
    module = load(script)
    gc.collect()  # the lock of a run that failed goes with its traceback
    module.main(module.parse_arguments([str(flag) for flag in flags]))


def refused(script: str, *flags) -> str:
    """Runs a script that must refuse; returns its one line."""
    try:
        call(script, *flags)
    except SystemExit as stopped:
        assert isinstance(stopped.code, str) and "\n" not in stopped.code.strip(), stopped.code
        return stopped.code
    pytest.fail(f"not refused: {flags}")


def refused_early(monkeypatch, script: str, *flags) -> str:
    """The one line of a trainer that must refuse before it loads a model."""
    vae = load(script).AutoencoderKL
    monkeypatch.setattr(vae, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    return refused(script, *flags)


def check_unfit(load: Callable, save: Callable, weights: dict, changes: dict) -> None:
    """Weights with such a change (None: absent) are no checkpoint of a metric: words of the error → change."""
    for words, change in changes.items():
        save({key: value for key, value in (weights | change).items() if value is not None})
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){words}"):
            load()


def check_card(folder: Path) -> str:
    """The card's text. Its front matter parses, its templates are filled, and its links lead to files of the folder."""
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    widgets = yaml.safe_load(front).get("widget", [])
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    assert not re.search(r"\{[\w.\[\]]+\}", text) and "{" not in prose and "}" not in prose
    assert not re.search(r"(?<!=)\b(None|nan)\b", text)
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    links += [widget["output"]["url"] for widget in widgets]
    missing = [link for link in links if not re.match(r"https?://|#", link) and not (folder / link).exists()]
    assert links and not missing, missing
    return card


def tiny_clip(tokenizer, width: int, layers: int = 2):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16, "vocab_size": len(tokenizer)}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return transformers.CLIPTextConfig(**sizes, **ends)


TINY_UNET = {"sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
TINY_VAE = {"block_out_channels": [4, 4, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
TINY_VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
# Of latents of 16 channels, which the VAE of newer models gives.
VAE_16 = {**TINY_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_tiny_sdxl(folder: Path, seed: int = 0, second: tuple = (16, 2)) -> Path:
    """An SDXL pipeline of 40 thousand parameters for 32x32 images. second: width and layers of the second encoder."""
    import train_generators

    torch.manual_seed(seed)
    tokenizer = train_generators.make_tokenizer()
    config = tiny_clip(tokenizer, 16)
    blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": [1, 2]}
    blocks |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 1]}
    blocks |= {"cross_attention_dim": 16 + second[0], "use_linear_projection": True, "addition_embed_type": "text_time"}
    blocks |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + second[0]}
    parts = {"unet": diffusers.UNet2DConditionModel(**TINY_UNET, **blocks)}
    parts |= {"vae": diffusers.AutoencoderKL(**TINY_VAE), "tokenizer": tokenizer, "tokenizer_2": tokenizer}
    parts |= {"text_encoder": transformers.CLIPTextModel(config)}
    parts |= {"text_encoder_2": transformers.CLIPTextModelWithProjection(tiny_clip(tokenizer, *second))}
    parts |= {"scheduler": diffusers.EulerDiscreteScheduler(**SCHEDULE), "add_watermarker": False}
    diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True).save_pretrained(folder)
    return folder


def make_tiny_sd(folder: Path, seed: int = 0) -> Path:
    """An SD1.5 pipeline of 25 thousand parameters for 32x32 images."""
    import train_generators

    torch.manual_seed(seed)
    tokenizer = train_generators.make_tokenizer()
    blocks = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2}
    blocks |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 16}
    parts = {"unet": diffusers.UNet2DConditionModel(**TINY_UNET, **blocks), "vae": diffusers.AutoencoderKL(**TINY_VAE)}
    parts |= {"text_encoder": transformers.CLIPTextModel(tiny_clip(tokenizer, 16)), "tokenizer": tokenizer}
    parts |= {"scheduler": diffusers.DDIMScheduler(**SCHEDULE), "safety_checker": None, "feature_extractor": None}
    diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def make_tiny_sd3(folder: Path, seed: int = 0, t5: bool = True, qk_norm: str | None = None) -> Path:
    """An SD3 pipeline of 60 thousand parameters for 32x32 images; with `qk_norm` and a second attention, an SD3.5."""
    import train_generators
    import train_sd3_generator

    torch.manual_seed(seed)
    tokenizer, tokenizer_3 = train_generators.make_tokenizer(), train_sd3_generator.make_t5_tokenizer()
    clip = tiny_clip(tokenizer, 12)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "pos_embed_max_size": 8}
    sizes |= {"joint_attention_dim": 32, "pooled_projection_dim": 24}  # wider than both CLIPs side by side, as SD3's
    sizes |= {"qk_norm": qk_norm, "dual_attention_layers": (0,) if qk_norm else ()}
    parts = {"transformer": diffusers.SD3Transformer2DModel(**sizes)}
    parts |= {"vae": diffusers.AutoencoderKL(**VAE_16, scaling_factor=1.5305, shift_factor=0.0609)}
    parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}
    for ending in ("", "_2"):
        parts[f"text_encoder{ending}"] = transformers.CLIPTextModelWithProjection(clip)
        parts[f"tokenizer{ending}"] = tokenizer
    t5_config = {"vocab_size": len(tokenizer_3), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    parts |= {"text_encoder_3": transformers.T5EncoderModel(transformers.T5Config(**t5_config)) if t5 else None}
    parts |= {"tokenizer_3": tokenizer_3 if t5 else None}
    diffusers.StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> Path:
    return make_tiny_sd3(tmp_path_factory.mktemp("models") / "tiny-sd3")


def make_tiny_zimage(folder: Path, seed: int = 0) -> Path:
    """A Z-Image pipeline of 390 thousand parameters for 32x32 images; most of them embed the time."""
    import train_zimage_generator

    torch.manual_seed(seed)
    tokenizer = train_zimage_generator.make_qwen_tokenizer()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    blocks = {"in_channels": 16, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    blocks |= {"cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [1024, 16, 16]}
    transformer = diffusers.ZImageTransformer2DModel(**blocks)
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):  # zeros at first
            torch.nn.init.normal_(parameter, std=0.02)
    parts = {"transformer": transformer, "tokenizer": tokenizer}
    parts |= {"text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**sizes, **ends))}
    parts |= {"vae": diffusers.AutoencoderKL(**VAE_16, scaling_factor=0.3611, shift_factor=0.1159)}
    parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)}
    diffusers.ZImagePipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_zimage(tmp_path_factory) -> Path:
    return make_tiny_zimage(tmp_path_factory.mktemp("models") / "tiny-zimage")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


def copy_of(model: Path, folder: Path, **changes) -> Path:
    """A pipeline with other values in its configurations: {"unet/config": {…}}."""
    shutil.copytree(model, folder)
    for file, values in changes.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def make_tiny_pickscore(folder: Path) -> Path:
    """A CLIP model that is a checkpoint of `pickscore` and of `clipscore`."""
    import train_generators

    torch.manual_seed(0)
    tokenizer = train_generators.make_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def encoded(pixels: np.ndarray) -> dict:
    buffer = BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def ranked_rows(n: int = 8, k: int = 4, size: int = 32, seed: int = 0) -> list[dict]:
    """Rows of the ranked schema: noise pictures, two rewards with random scores."""
    import world

    from build_synpic import preference_probability, preference_rank

    rng = np.random.default_rng(seed)
    prompts = [row["prompt"] for row in world.sample_prompts("train", n, seed)]
    rows = [{"prompt_id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    for row in rows:
        scores = rng.normal(size=(2, k)).round(3)
        row["images"] = [encoded(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(k)]
        row |= {"generators": [f"g{j}" for j in range(k)], "seeds": list(range(k))}
        row["scores"] = {"first": scores[0].tolist(), "second": scores[1].tolist()}
        row["preference_probability"] = preference_probability(scores).tolist()
        row["rank"] = preference_rank(scores).tolist()
    return rows


def _write(folder: Path, rows: list[dict], features: dict) -> Path:
    """One Parquet file of these columns of the rows."""
    rows = [{name: value for name, value in row.items() if name in features} for row in rows]
    (folder / "data").mkdir(parents=True)
    (folder / "data" / ".DS_Store").touch()  # as a Mac leaves it
    table = Dataset.from_list(rows, features=Features(features))
    table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return folder


def write_dataset(folder: Path, rows: list[dict], drop: tuple = ()) -> Path:
    kinds = dict.fromkeys(("prompt_id", "prompt"), Value("string")) | {"images": List(Image())}
    kinds |= {"generators": List(Value("string")), "seeds": List(Value("int64"))}
    kinds |= {"scores": {name: List(Value("float32")) for name in rows[0].get("scores", ())}}
    kinds |= {"preference_probability": List(Value("float32")), "rank": List(Value("int32"))}
    return _write(folder, rows, {name: kind for name, kind in kinds.items() if name not in drop})


@pytest.fixture(scope="session")
def ranked_dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "ranked", ranked_rows(n=10))


def pair_rows(n: int = 24, size: int = 32, seed: int = 0) -> list[dict]:
    """Rows as score_pairs.py writes them, not in the order of their quality; row 5 is a tie, row 6 has no label."""
    import world

    rng = np.random.default_rng(seed)
    prompts = [row["prompt"] for row in world.sample_prompts("train", n, seed)]
    quality = rng.permutation(n) / n
    rows = [{"caption": prompt} for prompt in prompts]
    for i, row in enumerate(rows):
        for side, letter in enumerate("ab"):
            row[f"jpg_{side}"] = encoded(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))["bytes"]
            row[f"image_{side}_uid"] = f"{letter}{i}"
        row |= {"label_0": 0.5 if i == 5 else float(rng.integers(2)), "has_label": i != 6, "quality": float(quality[i])}
    return rows


def write_pairs(folder: Path, rows: list[dict], drop: tuple = (), **kinds) -> Path:
    """`kinds`: of columns of another kind."""
    usual = {"caption": "string", "jpg_0": "binary", "jpg_1": "binary", "image_0_uid": "string"}
    usual |= {"image_1_uid": "string", "label_0": "float64", "has_label": "bool", "quality": "float64"}
    features = {name: kinds.get(name, Value(kind)) for name, kind in usual.items() if name not in drop}
    return _write(folder, rows, features)


@pytest.fixture(scope="session")
def pair_dataset(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs", pair_rows())


# Model and dataset of the trainers' tests, and the flags of their short runs.
TRAINERS = {
    "train_rankdpo_sdxl": ("tiny_sdxl", "ranked_dataset"),
    "train_rankdpo_sd3": ("tiny_sd3", "ranked_dataset"),
    "train_rankdpo_zimage": ("tiny_zimage", "ranked_dataset"),
    "train_dpo_qsd": ("tiny_sd", "pair_dataset"),
}
SHORT = "--resolution 32 --rank 4 --learning_rate 1e-2 --beta_dpo 100 --validation_num_inference_steps 1".split()


@pytest.fixture(scope="session")
def trainer_flags(request, tmp_path_factory):
    """Makes the flags of a short run of a trainer. Its runs share a cache."""

    def make(script: str) -> list:
        model, data = map(request.getfixturevalue, TRAINERS[script])
        flags = ["--pretrained_model_name_or_path", model, "--dataset_name", data, "--report_to", "none", *SHORT]
        flags += ["--cache_dir", tmp_path_factory.getbasetemp() / f"cache-{script}"]
        return [*flags, *["--top_fraction", 1] * (script == "train_dpo_qsd")]

    return make


def logged(folder: Path) -> list[dict]:
    """The whole lines of a run's log so far."""
    file = folder / "training_log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def same_lora(a: Path, b: Path) -> bool:
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """The LoRA of a run, which has learned something in every layer: B is 0 at first. But not for the text's queries in
    the last block of an SD3, whose answers the model throws away."""
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in lora.values())
    largest = {name: tensor.abs().max() for name, tensor in lora.items() if "lora_B" in name}
    still = [name for name, value in largest.items() if not value and "transformer_blocks.1.attn.add_q" not in name]
    assert max(largest.values()) > 1e-4 and not still, still
    return lora


def lora_difference(a: Path, b: Path) -> float:
    """Mean difference of the weights: where a gradient is nearly 0, Adam makes more of a last digit in single ones."""
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (a, b))
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean().item()


def count_items(monkeypatch, module, *names: str) -> Counter:
    """How many items these generators of a script gave: name → number."""
    counts = Counter()

    def counted(name: str, original, *arguments):
        for item in original(*arguments):
            counts[name] += 1
            yield item

    for name in names:
        monkeypatch.setattr(module, name, partial(counted, name, getattr(module, name)))
    return counts


def check_gallery(pipeline, run: Path, prompts: list[str], files: list[Path], guidance_scale: float, **options) -> None:
    """The gallery was drawn in training; a pipeline draws the same pixels, without a LoRA and with each file."""
    options |= {"guidance_scale": guidance_scale, "num_inference_steps": 1, "height": 32, "width": 32}

    def draw() -> list[np.ndarray]:
        generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
        drawn = [pipeline(prompt, generator=generator, **options) for prompt, generator in zip(prompts, generators)]
        return [np.asarray(output.images[0]) for output in drawn]

    def stored(ending: str) -> list[np.ndarray]:
        return [np.asarray(PILImage.open(run / "images" / f"{i}{ending}")) for i in range(len(prompts))]

    assert np.array_equal(draw(), stored("_base.png")) and not np.array_equal(stored("_base.png"), stored(".png"))
    for file in files:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        assert np.array_equal(draw(), stored(".png"))
        pipeline.unload_lora_weights()


@pytest.fixture
def server(tmp_path):
    """A Hub; afterwards its token stands in no file, neither there nor on this machine."""
    server = hub.Hub()
    yield server
    server.close()
    assert hub.TOKEN.encode() not in b"".join(server.contents())
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or hub.TOKEN.encode() not in file.read_bytes(), file


@pytest.fixture
def online(server, tmp_path, monkeypatch):
    """This process as a client of that Hub."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    values = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    values["HF_HUB_CACHE"] = str(tmp_path / "cache")
    for name, value in values.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield server
    huggingface_hub.close_session()  # else the next test would use its connections
