# SPDX-License-Identifier: Apache-2.0
"""Writes dpg_bench.npz: what the official code of mPLUG and of DPG-Bench gives for random weights and random answers.

    python tests/golden/make_dpg_bench.py MODELSCOPE ELLA

MODELSCOPE: a checkout of github.com/modelscope/modelscope, commit 2905da12205410de83f2fcdaabb4b505430890d5. Its files
modeling_mplug.py, predictor.py, clip.py and configuration_mplug.py are imported as they are, around its packages, and
the class MPlugPreprocessor alone is taken out of its file; `timm` is empty. ELLA: one of
github.com/TencentQQGYLab/ELLA, commit 3c228f1dc6c4d3cad0a47493816151a419f14db3. Its script runs as it is, in one
process, with `answer` below in place of mPLUG and a stand-in for accelerate. Made with Python 3.11, torch 2.14.1,
torchvision 0.29.1, transformers 4.30.2, tokenizers 0.13.3, numpy 2.4.6, pandas 3.1.1, pillow 12.3.0. The model runs in
float64 (see double.py), on the float32 pixels of its preprocessor.

The test imports the inputs from here: sizes, weights, pictures, questions, the CSV and the answers.
"""

import ast
import csv
import hashlib
import importlib
import io
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
from PIL import Image


BERT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "encoder_width": 32,
    "text_encoder_layers": 2,
    "fusion_layers": 2,
    "text_decode_layers": 2,
    "pad_token_id": 0,
}
STRIDES = {"published": 6, "joint": 1}  # with 1, the second fusion layer takes image and text as one sequence
MPLUG = {
    "image_res": 56,
    "vision_width": 128,
    "clip_embed_dim": 16,
    "clip_image_resolution": 56,
    "clip_vision_layers": 2,
    "clip_vision_width": 128,
    "clip_vision_patch_size": 14,
    "clip_context_length": 5,
    "clip_vocab_size": 11,
    "clip_transformer_width": 16,
    "clip_transformer_heads": 2,
    "clip_transformer_layers": 1,
}
WORDS = (
    "yes no is there a the ball red dog café # two of in on any ? ##s ##ish ! ' , . - green 12 it and blue man".split()
)
QUESTIONS = [
    "Is there a ball?",
    "Is the BALL reddish?",
    "Are there two dogs on the ball?",
    "IS IT A CAFÉ",
    "no",
    "Is the man in the blue dog, and is there a green ball on the red, red, red, red, red, red, red, red dog?",
    "Is there any text, 'yes - no'?",
    "??",
]
PREFIXES = np.array([[101, 110, 104], [101, 102, 104], [101, 130, 130], [101, 0, 159]])


def vocabulary() -> list[str]:
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return words + [chr(ord("b") + i) for i in range(BERT["vocab_size"] - len(words))]


def write_model(folder: Path, stride: int) -> None:
    """The official files of a model, except its weights. (JSON is YAML, too.)"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(MPLUG))
    (folder / "config_bert.json").write_text(json.dumps({**BERT, "stride_layer": stride}))
    (folder / "configuration.json").write_text(json.dumps({"task": "visual-question-answering"}))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")


def generator(text: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def random_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that depends on its key only. Biases of words make answers that are yes, and others that end early."""
    values = generator(key).normal(size=shape)
    if key.endswith("position_ids"):
        values = np.arange(shape[-1])[None]
    elif len(shape) > 1:
        values *= 1.2 / np.sqrt(np.prod(shape[1:])) if "embedding" not in key else 0.6
    else:
        values = 0.1 * values + ("norm.weight" in key.lower() or "ln_" in key and key.endswith("weight"))
    if key.startswith("text_decoder.cls.predictions.") and key.endswith(".bias") and "transform" not in key:
        values[:102] -= 6
        values[102:105] += (1.6, -6, 1)  # [SEP], [MASK], yes
    return np.asarray(values, np.int64 if key.endswith("position_ids") else np.float32)


def picture(number: int, size: tuple[int, int] = (90, 61), mode: str = "RGB") -> Image.Image:
    return Image.fromarray(generator(f"picture {number}").integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)


def make_csv(seed: int) -> str:
    """A CSV with the official columns. Propositions are in any order, parents may be several, stand behind, or lack;
    some prompts stand in two places. The first prompt has one row if `seed` is odd."""
    rng, blocks = np.random.default_rng(seed), []
    details = ["global - ", "entity - whole ", "entity - part ", "attribute - color ", "relation - non-spatial "]
    details += ["other - count ", "attribute - size "]
    for item in range(24):
        size = 1 if item == 0 and seed % 2 else int(rng.integers(3, 9))
        ids = [1, *(1 + rng.permutation(np.arange(1, size))).tolist()] if item == 0 else rng.permutation(size) + 1
        lines = []
        for number in ids:
            parents = rng.choice([0, *ids], int(rng.integers(1, 3)), replace=False)
            if item == 0 and number > 1 and rng.random() < 0.6:
                parents = [*(parent for parent in parents if parent != 1), 1]
            if rng.random() < 0.01:
                parents = [*parents, 99]
            if rng.random() < 0.4:
                parents = [0]
            detail = details[rng.integers(len(details))]
            line = [f"item{item}", f'A long, "quoted" prompt.\nNumber {item}', "", number]
            line.append(", ".join(map(str, parents)))
            line += ["x", "y", f"{detail}(thing {number}, (red))", f"Is thing {number} of {item} there, really?"]
            lines.append(line)
        if item in (5, 9):
            blocks[item - 3] += lines[:2]
            lines = lines[2:]
        if item == 7:
            lines.append([*lines[0][:-2], "other - text (twice)", "Asked twice?"])
        blocks.append(lines)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
    writer.writerow([*columns.split(","), "question_natural_language"])
    writer.writerows(line for lines in blocks for line in lines)
    return text.getvalue()


def answer(item: str, number: int, question: str) -> str:
    """The answer about image `number` of an item."""
    digest = hashlib.sha256(f"{item} {number} {question}".encode()).digest()
    return ["yes", "no", "yes", "yes it is", "yes"][digest[0] % 5]


def import_mplug(checkout: Path):
    """modeling_mplug.py and the class MPlugPreprocessor, without modelscope's packages."""
    import torch
    import transformers  # noqa: F401 (it looks for the real timm)

    for name in ("", ".models", ".models.multi_modal", ".models.multi_modal.mplug", ".utils"):
        package = types.ModuleType(f"modelscope{name}")
        package.__path__ = [str(checkout / "modelscope" / name.strip(".").replace(".", "/"))]
        sys.modules[package.__name__] = package
    for name in ("timm", "timm.models", "timm.models.layers"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"].trunc_normal_ = None
    modeling = importlib.import_module("modelscope.models.multi_modal.mplug.modeling_mplug")
    package = sys.modules["modelscope.models.multi_modal.mplug"]
    package.CONFIG_NAME, package.MPlugConfig = modeling.CONFIG_NAME, modeling.MPlugConfig
    tree = ast.parse((checkout / "modelscope/preprocessors/multi_modal.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MPlugPreprocessor"]
    tree.body[0].decorator_list = []  # they enter it into a registry
    constants = importlib.import_module("modelscope.utils.constant")
    config = types.SimpleNamespace(from_file=lambda file: types.SimpleNamespace(**json.loads(Path(file).read_text())))
    from typing import Any, Union  # noqa: UP035

    space = {"Preprocessor": object, "ModeKeys": constants.ModeKeys, "ModelFile": constants.ModelFile, "Config": config}
    space |= {"Tasks": constants.Tasks, "osp": os.path, "torch": torch, "Image": Image}
    space |= {"Any": Any, "Dict": dict, "Tuple": tuple, "Union": Union}
    exec(compile(tree, "multi_modal.py", "exec"), space)
    return modeling, space["MPlugPreprocessor"]


def build(modeling, folder: Path):
    """The official model at the sizes of the folder's files; its code fixes one size, that of CLIP's positions."""
    import torch

    model = modeling.MPlug.from_pretrained(str(folder), task="visual-question-answering", load_checkpoint=False)
    config = model.config
    patches = (config.image_res // config.clip_vision_patch_size) ** 2
    for encoder in (model.visual_encoder, model.visual_encoder_m):
        encoder.visual.positional_embedding = torch.nn.Parameter(torch.zeros(patches + 1, config.clip_vision_width))
    return model.eval()


def mplug_outputs(modeling, preprocessor_class, folder: Path) -> dict:
    """What the official model gives for two pictures and all questions."""
    import torch
    from double import float64, in_float64

    model, preprocessor = build(modeling, folder), preprocessor_class(str(folder))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = {key: torch.from_numpy(random_weight(key, shape)) for key, shape in shapes.items()}
    print(model.load_state_dict(weights, strict=False))
    in_float64(model)
    found = {"keys": json.dumps(shapes), "sequences": [], "scores": [], "texts": [], "ids": []}
    for number in range(2):
        for question in QUESTIONS:
            data = preprocessor({"image": picture(number), "question": question})
            with torch.no_grad():
                sequences, scores = model(data["image"], data["question"], train=False)
                found["sequences"].append(sequences[0][0].tolist())
                found["scores"].append(scores[0][0].item())
                found["texts"].append(model.tokenizer.decode(sequences[0][0], skip_special_tokens=True))
            found["ids"].append(data["question"].input_ids[0].tolist())
    found["pixels"] = data["image"][0, :, ::5, ::7].numpy()
    with torch.no_grad(), float64():  # the steps of forward, for the last picture
        batch = preprocessor.tokenizer(
            [q.lower() for q in QUESTIONS], padding="max_length", truncation=True, max_length=25, return_tensors="pt"
        )
        image = model.visual_encoder.visual(data["image"].double(), skip_last_layer=True)
        image = model.visn_layer_norm(model.visn_fc(image))
        found["image"] = image[0].numpy().copy()
        image = image.repeat(len(QUESTIONS), 1, 1)
        seen = torch.ones(image.shape[:2], dtype=torch.long)
        text = model.text_encoder(batch.input_ids, attention_mask=batch.attention_mask, return_dict=True)
        image, text = model.fusion_encoder(
            encoder_embeds=text.last_hidden_state,
            attention_mask=batch.attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=seen,
            return_dict=False,
        )
        found["fused_image"], found["fused_text"] = image[3].numpy(), text.numpy()
        found["logits"] = np.stack(
            [
                model.text_decoder(
                    torch.from_numpy(prefix)[None].repeat(len(QUESTIONS), 1),
                    encoder_hidden_states=torch.cat([image, text], 1),
                    encoder_attention_mask=torch.cat([seen, batch.attention_mask], 1),
                    return_dict=True,
                    reduction="none",
                ).logits[:, -1]
                for prefix in PREFIXES
            ],
            axis=1,
        )
    length = max(map(len, found["sequences"]))
    found["sequences"] = [sequence + [-1] * (length - len(sequence)) for sequence in found["sequences"]]
    return {key: np.asarray(value) for key, value in found.items()}


def full_size_keys(modeling, folder: Path) -> str:
    """Keys and sizes of the published model: the defaults of MPlugConfig and BERT-base's sizes."""
    import torch

    write_model(folder, 6)
    (folder / "config.yaml").write_text("{}")
    bert = {**BERT, "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    bert |= {"intermediate_size": 3072, "max_position_embeddings": 512, "encoder_width": 768, "text_encoder_layers": 6}
    bert |= {"fusion_layers": 6, "text_decode_layers": 12, "stride_layer": 6}
    (folder / "config_bert.json").write_text(json.dumps(bert))
    with torch.device("meta"):
        model = modeling.MPlug.from_pretrained(str(folder), task="visual-question-answering", load_checkpoint=False)
    return json.dumps({key: tuple(value.shape) for key, value in model.state_dict().items()})


def official_scores(script: Path, folder: Path, seed: int, pic_num: int) -> dict[str, float]:
    """What the official script prints for grids of one-coloured pictures, whose colour says item and number."""
    accelerate, utils = types.ModuleType("accelerate"), types.ModuleType("accelerate.utils")
    wait = types.SimpleNamespace(
        is_main_process=True, device="cpu", num_processes=1, process_index=0, prepare=lambda model: model
    )
    wait.wait_for_everyone = lambda: None
    accelerate.Accelerator, utils.gather_object = lambda: wait, lambda values: values
    sys.modules |= {"accelerate": accelerate, "accelerate.utils": utils}
    space = {"__name__": "compute_dpg_bench"}
    exec(compile(script.read_text(), str(script), "exec"), space)

    class Answers:
        def __init__(self, device):
            pass

        def vqa(self, image, question):
            item, number, _ = image.getpixel((0, 0))
            return answer(f"item{item}", number, question)

    space["MPLUG"] = Answers
    images = folder / f"images{seed}-{pic_num}"
    images.mkdir()
    for item in range(24):
        if item != 11:  # a prompt without images
            grid = Image.new("RGB", (8, 8))
            for number in range(4):
                left, top = number % 2 * 4, number // 2 * 4
                grid.paste((item, number, 0), (left, top, left + 4, top + 4))
            grid.save(images / f"item{item}.png")
    Image.new("RGB", (8, 8)).save(images / "unknown.png")
    (folder / "dpg.csv").write_text(make_csv(seed))
    flags = ["--image-root-path", images, "--resolution", 4, "--csv", folder / "dpg.csv", "--pic-num", pic_num]
    sys.argv = ["compute_dpg_bench.py", *map(str, flags), "--res-path", str(folder / "result.txt")]
    space["main"]()
    lines = (folder / "result.txt").read_text().split("L1 category scores:\n")[1].splitlines()
    lines = [line for line in lines if ": " in line and "/" not in line]
    return {name.strip(): float(value) for name, value in (line.rsplit(": ", 1) for line in lines)}


def main(modelscope: Path, ella: Path) -> None:
    import tempfile

    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        modeling, preprocessor_class = import_mplug(modelscope)
        for name, stride in STRIDES.items():
            write_model(folder / name, stride)
            outputs = mplug_outputs(modeling, preprocessor_class, folder / name)
            print(name, outputs["texts"], outputs["scores"], outputs["sequences"])
            result |= {f"{name}_{key}": value for key, value in outputs.items()}
        result["full_keys"] = np.asarray(full_size_keys(modeling, folder / "full"))
        for seed in range(6):
            for pic_num in (4, 1):
                scores = official_scores(ella / "dpg_bench/compute_dpg_bench.py", folder, seed, pic_num)
                print(seed, pic_num, scores)
                result[f"scores_{seed}_{pic_num}"] = np.asarray(json.dumps(scores))
    np.savez_compressed(Path(__file__).with_name("dpg_bench.npz"), **result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
