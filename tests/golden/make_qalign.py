# SPDX-License-Identifier: Apache-2.0
"""Writes qalign.npz: what the official Q-Align code computes with tiny random weights, and the full-size model's keys.

    python make_qalign.py OFFICIAL_CHECKOUT

Official code: https://github.com/Q-Future/Q-Align at 14dfdffb3b970c0727d48938b8f3741a65acbd6e. Environment: Python
3.11, torch 2.14.1, torchvision 0.29.1, transformers 4.36.1, tokenizers 0.15.0, sentencepiece 0.2.1, protobuf 7.36.2,
numpy 2.4.6, pillow 12.3.0, icecream 2.2.0. The images go through the official `QAlignScorer` and
`QAlignAestheticScorer` on the CPU, with the attention of the official pins (`eager`; transformers takes SDPA from
torch 2.1.1 on). The model is in float64, also where its code asks for float16 or float32 (see double.py); pixels and
the abstractor's positions are float32.
"""

import hashlib
import io
import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image


# Unlike the published sizes in every number, so that a mix-up shows. Large epsilons make a wrong one visible.
TINY = {
    "model_type": "mplug_owl2",
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "visual_config": {
        "visual_model": {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 56,
            "patch_size": 14,
            "layer_norm_eps": 1e-3,
        },
        "visual_abstractor": {
            "num_learnable_queries": 5,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 72,
            "layer_norm_eps": 1e-2,
            "encoder_hidden_size": 48,
            "grid_size": 4,
        },
    },
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": 56,
    "size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
TOKENIZER = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
WORDS = [
    "USER: How would you rate the quality of this image?",
    "ASSISTANT: The aesthetics of the image is excellent",
]
LEVELS = ["excellent", "good", "fair", "poor", "bad"]  # often enough to be whole tokens, as they are for LLaMA


def weight(key: str, shape) -> np.ndarray:
    """The random weight of this name: norms near 1, biases small, matrices that keep the size of their input."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    values = np.random.default_rng(seed).standard_normal(tuple(shape))
    if "norm" in key or "ffn_ln" in key:
        values = 0.2 * values + key.endswith("weight")
    elif key.endswith("bias"):
        values = 0.2 * values
    elif key.endswith("weight") and "embed_tokens" not in key:
        values = values / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 20
    phase = rng.uniform(0, 6, 3)
    waves = 127 + 90 * np.sin(x[..., None] * rng.uniform(0.5, 2, 3) + y[..., None] + phase)
    return Image.fromarray((waves + rng.integers(-30, 31, (height, width, 3))).clip(0, 255).astype(np.uint8))


def tokenizer_model() -> bytes:
    """A sentencepiece model made as LLaMA's: byte-pair encoding, byte fallback, no normalisation."""
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS + LEVELS * 20),
        model_writer=file,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


def main():
    folder = Path(tempfile.mkdtemp())
    files = {"config.json": TINY, "preprocessor_config.json": PREPROCESSOR, "tokenizer_config.json": TOKENIZER}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    model_file = tokenizer_model()
    (folder / "tokenizer.model").write_bytes(model_file)

    import transformers

    sys.path.insert(0, sys.argv[1])
    sys.modules["decord"] = types.ModuleType("decord")  # reads videos
    sys.modules["decord"].VideoReader = None
    # The model's class loads these two from the Hub.
    slow = transformers.LlamaTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained = lambda *arguments, **options: slow
    transformers.CLIPImageProcessor.from_pretrained = lambda *arguments, **options: processor
    from double import float64, in_float64
    from q_align.evaluate import scorer
    from q_align.model.configuration_mplug_owl2 import MPLUGOwl2Config
    from q_align.model.modeling_mplug_owl2 import MPLUGOwl2LlamaForCausalLM

    with torch.device("meta"):
        full = MPLUGOwl2LlamaForCausalLM(MPLUGOwl2Config(attn_implementation="eager"))
    full_keys = {key: list(value.shape) for key, value in full.state_dict().items()}

    settings = {key: value for key, value in TINY.items() if key not in ("model_type", "visual_config")}
    visual = {key: dict(value) for key, value in TINY["visual_config"].items()}
    config = MPLUGOwl2Config(visual, vocab_size=len(slow), attn_implementation="eager", **settings)
    with float64():
        model = in_float64(MPLUGOwl2LlamaForCausalLM(config).eval())
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith("pos_embed")}
    weights = {key: torch.from_numpy(weight(key, value.shape)) for key, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.endswith("pos_embed") for key in missing)

    torch.Tensor.half = torch.Tensor.double  # the scorers work in float16
    scorer.load_pretrained_model = lambda *arguments, **options: (slow, model, processor, None)
    pictures = [picture(90, 62, seed=1), picture(40, 70, seed=2)]
    golden = {"tokenizer": np.frombuffer(model_file, dtype=np.uint8)}
    model.model.vision_model.register_forward_hook(
        lambda module, inputs, output: golden.update(vision=output.last_hidden_state.numpy())
    )
    model.model.visual_abstractor.register_forward_hook(
        lambda module, inputs, output: golden.update(abstractor=output.last_hidden_state.numpy())
    )
    for name, kind in (("quality", scorer.QAlignScorer), ("aesthetic", scorer.QAlignAestheticScorer)):
        official = kind(device="cpu")
        golden[name] = official(pictures).numpy()
        golden[f"{name}_tokens"] = official.input_ids[0].numpy()
        squares = [official.expand2square(image, (122, 116, 104)) for image in pictures]
        pixels = processor.preprocess(squares, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            golden[f"{name}_logits"] = model(official.input_ids.repeat(2, 1), images=pixels)["logits"][:, -1].numpy()
        golden["levels"] = np.array(official.preferential_ids_)
    attention = model.model.visual_abstractor.encoder.layers[1].crossattention.attention
    golden |= {key: getattr(attention, key).float().numpy() for key in ("q_pos_embed", "k_pos_embed")}
    golden["keys"] = np.array(json.dumps({key: list(value.shape) for key, value in model.state_dict().items()}))
    golden["full_keys"] = np.array(json.dumps(full_keys))
    np.savez_compressed(Path(__file__).with_name("qalign.npz"), **golden)
    for key, value in golden.items():
        print(key, value.shape, value if value.size < 8 and value.ndim else "")


if __name__ == "__main__":
    main()
