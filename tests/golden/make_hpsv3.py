# SPDX-License-Identifier: Apache-2.0
"""Writes hpsv3.npz: what the official HPSv3 inferencer gives with tiny random weights, and the full-size model's keys.

    python make_hpsv3.py

Environment: Python 3.11, hpsv3 1.0.0, torch 2.14.1, torchvision 0.29.1, transformers 4.45.2, tokenizers 0.20.3, trl
0.11.4, peft 0.13.2, accelerate 1.1.1, datasets 3.1.0, huggingface_hub 0.26.5, omegaconf 2.3.0, fire 0.7.0, numpy 2.4.6,
pillow 12.3.0. The pictures go through the official `HPSv3RewardInferencer` on the CPU. It makes the model in bfloat16,
which rounds the rotary frequencies; then the weights are in float64 (see double.py), and the frequencies stay as they
are. Prompts go together, with padding; their text goes on after <|Reward|>.
"""

import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from make_qalign import picture, weight


# Unlike the published sizes, so that a mix-up shows. The layout of the published config.json.
TINY = {"hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-3, "rope_theta": 500.0, "tie_word_embeddings": False}
TINY |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
TINY["vision_config"] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "hidden_size": 64}
FULL = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
FULL |= {"num_key_value_heads": 4, "vocab_size": 151658, "tie_word_embeddings": False}
FULL |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
FULL["vision_config"] = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
# As in the published chat_template.json, for one picture and one text of a user.
TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PROMPTS = ["a red fox", "two {cats} on a café table,\n\n 12345 — naïve 写真", ""]


def pictures() -> list:
    """Landscape and portrait; smaller and larger than the 448 x 448 pixels that they get."""
    return [picture(300, 200, seed=1), picture(470, 701, seed=2), picture(33, 50, seed=3)]


def write_base(folder: Path) -> None:
    """Model and processor of a tiny Qwen2-VL."""
    from hpsv3.dataset.data_collator_qwen import INSTRUCTION, prompt_with_special_token
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([INSTRUCTION + prompt_with_special_token] * 3, vocab_size=400, show_progress=False)
    trained.save_model(str(folder))
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Qwen2TokenizerFast(*files, additional_special_tokens=SPECIAL[1:])
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    Qwen2VLImageProcessor().save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"), "video_token_id": 10**6}
    ids["vocab_size"] = len(tokenizer) + 7  # the published vocabulary is padded, too
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(**TINY, **ids)).save_pretrained(folder)


def main():
    import hpsv3
    import yaml
    from double import in_float64
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig

    folder = Path(tempfile.mkdtemp())
    write_base(folder)
    settings = yaml.safe_load(Path(hpsv3.__file__).with_name("config").joinpath("HPSv3_7B.yaml").read_text())
    settings |= {"model_name_or_path": str(folder), "use_cpu": True, "output_dir": str(folder / "out")}
    (folder / "HPSv3_7B.yaml").write_text(yaml.safe_dump(settings))
    head = {"output_dim": 2, "special_token_ids": [0], "rm_head_type": "ranknet"}
    shapes = {}
    for name, values in (("full_keys", FULL), ("keys", TINY | {"vocab_size": vocabulary(folder)})):
        with torch.device("meta"):
            model = Qwen2VLRewardModelBT(Qwen2VLConfig(**values), **head)
        shapes[name] = {key: list(value.shape) for key, value in model.state_dict().items()}
    weights = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes["keys"].items()}
    save_file(weights, folder / "HPSv3.safetensors")
    official = hpsv3.HPSv3RewardInferencer(
        str(folder / "HPSv3_7B.yaml"), str(folder / "HPSv3.safetensors"), device="cpu"
    )
    frequencies = {name: value for name, value in official.model.named_buffers() if name.endswith("inv_freq")}
    assert all(value.dtype == torch.bfloat16 for value in frequencies.values())
    in_float64(official.model).load_state_dict(weights)
    for name, value in frequencies.items():
        official.model.get_submodule(name.rpartition(".")[0]).inv_freq = value
    batch = official.prepare_batch(pictures(), PROMPTS)
    golden = {"tokens": batch["input_ids"].numpy(), "pixels": batch["pixel_values"].numpy()[::37, ::41]}
    with torch.inference_mode():
        golden["scores"] = official.reward(pictures(), PROMPTS).numpy()
    golden |= {name: np.array(json.dumps(value)) for name, value in shapes.items()}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            archive.add(folder / name, name)
    golden["base"] = np.frombuffer(file.getvalue(), dtype=np.uint8)
    np.savez_compressed(Path(__file__).with_name("hpsv3.npz"), **golden)
    for key, value in golden.items():
        print(key, value.shape, value if value.size < 8 and value.ndim else "")


def vocabulary(folder: Path) -> int:
    """The tokenizer's size with the token of the reward."""
    return len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + len(SPECIAL) + 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
