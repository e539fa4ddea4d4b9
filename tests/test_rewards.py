"""The reward models against the official scorers' own code: same random weights, same pictures, same words."""

import copy
import functools
import json
import shutil
import types
from io import BytesIO
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from PIL import Image as PILImage
from PIL import PngImagePlugin
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import build_synpic
import evaluate
from build_synpic import load_reward_model


PROMPTS = [
    "",
    "   ",
    "a red bicycle",
    "A  Red\tBICYCLE\n",
    "a cat 🐈‍⬛ and a dog 🐕",
    "一只戴帽子的猫,水彩画",
    "ネコ ﾈｺ　全角",
    "“curly” ‘quotes’ — and … dots",
    "fish &amp; chips &lt;3",
    "&amp;amp; twice",
    "mojibake: cafÃ© schÃ¶n",
    "naïve façade, Škoda, Zürich",
    "it's we're they'll I'd you've i'm don't",
    "4k 8K 1920x1080 3.14 №5",
    "a_b-c/d\\e (f) [g] {h} <i> |j|",
    "(masterpiece:1.4), best quality, ((detailed)), <lora:foo:0.8>",
    "<|endoftext|> in the middle",
    "[SEP] [DEC] [ENC] [CLS]",
    "word " * 200,
    "длинное предложение " * 40,
    "العربية और हिन्दी",
    "x" * 300,
    "zero\u200bwidth and soft\u00adhyphen",
    "e\u0301 against \u00e9",
]
WORDS = "portrait of a woman dragon city cyberpunk neon oil painting photo 8k, trending artstation by greg sky".split()
_rng = np.random.default_rng(0)
PROMPTS += [" ".join(_rng.choice(WORDS, size=_rng.integers(1, 40))) for _ in range(200 - len(PROMPTS))]


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PILImage.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return PILImage.fromarray(pixels.squeeze() if mode == "L" else pixels, mode)


def through_file(image: PILImage.Image, kind: str, **options) -> PILImage.Image:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return PILImage.open(buffer)


@functools.cache
def pictures() -> dict[str, PILImage.Image]:
    exif = PILImage.Exif()
    exif[274] = 6  # turned by 90°
    return {
        "square": noise(224, 224),
        "large": noise(512, 512),
        "odd and wide": noise(333, 201),
        "odd and high": noise(101, 307),
        "one pixel off": noise(225, 224),
        "small": noise(31, 17),
        "narrow": noise(400, 9),
        "gray": noise(301, 211, "L"),
        "RGBA": noise(215, 317, "RGBA"),
        "LA": noise(120, 311, "LA"),
        "palette": through_file(noise(257, 199).quantize(32), "PNG"),
        "palette with transparency": through_file(noise(130, 131).quantize(16), "PNG", transparency=3),
        "1 bit": noise(100, 240, "L").convert("1"),
        "jpeg": through_file(noise(640, 427), "JPEG", quality=80),
        "turned by EXIF": through_file(noise(320, 241), "JPEG", exif=exif.tobytes()),
        "CMYK": through_file(noise(177, 178).convert("CMYK"), "JPEG"),
    }


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    """OpenAI CLIP's own vocabulary as a transformers tokenizer: what laion/CLIP-ViT-H-14-… holds."""
    merges = official.merges()
    letters = list(official.clip().simple_tokenizer.bytes_to_unicode().values())
    words = [*letters, *(f"{x}</w>" for x in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip-tokenizer")
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges]).save_pretrained(folder)
    return folder


def with_files(folder, source):
    if source != folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


@functools.cache
def loaded(name: str):
    """A reward model that several tests use."""
    return load_reward_model(name, batch_size=5)


# HPSv2


@pytest.fixture(scope="module")
def hps(tmp_path_factory, clip_tokenizer):
    """hpsv2's fork of open_clip at a small size with ViT-H/14's head widths: (model, preprocessing, checkpoint)."""
    size = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = official.VISION | size | {"hidden_size": 160, "intermediate_size": 640, "image_size": 56}
    text = official.TEXT | size | {"hidden_size": 128, "intermediate_size": 512}
    config, open_clip = CLIPConfig(vision_config=vision, text_config=text, projection_dim=64), official.open_clip()
    vision = {"image_size": 56, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
    model = official.seeded(open_clip.CLIP(64, vision, text, output_dict=True))
    folder = with_files(tmp_path_factory.mktemp("hpsv2"), clip_tokenizer)
    config.save_pretrained(folder)
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / name)
    transform = open_clip.image_transform(56, is_train=False, resize_longest_max=True)
    return model, transform, folder


@pytest.fixture
def without_antialias(monkeypatch):
    """torchvision before 0.17 did not smooth when it resized a tensor."""
    transform = official.open_clip().transform
    resize = functools.partial(transform.F.resize, antialias=False)
    monkeypatch.setattr(transform, "F", types.SimpleNamespace(resize=resize, pad=transform.F.pad))


def test_hps_is_the_official_score(hps, monkeypatch, without_antialias):
    model, transform, folder = hps
    img_score = official.hpsv2()
    monkeypatch.setattr(img_score, "model_dict", {"model": model, "preprocess_val": transform})
    monkeypatch.setattr(img_score, "device", "cpu")
    images = [image.convert("RGB") for image in pictures().values()]
    reward = loaded(f"hpsv2.1={folder}")
    for prompt in (PROMPTS[4], PROMPTS[18]):
        expected = [float(value) for value in img_score.score(images, prompt, cp=f"{folder}/{reward.FILES['hpsv2.1']}")]
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(reward.score(images, [prompt] * len(images)), expected, atol=1e-5, rtol=0)


def test_hps_preprocessing_is_bit_exact(hps, without_antialias):
    reward = loaded(f"hpsv2={hps[2]}")
    for name, image in pictures().items():
        # Its own model cannot take the fourth channel.
        expected = hps[1](image.convert("RGB") if image.mode == "RGBA" else image)
        assert torch.equal(reward.prepare(image), expected), name


def test_hps_antialias_is_todays_torchvision(hps):
    image, (smooth, plain) = noise(512, 300), (loaded(f"{name}={hps[2]}") for name in ("hpsv2_antialias", "hpsv2"))
    assert torch.equal(smooth.prepare(image), hps[1](image))
    assert (smooth.prepare(image) - plain.prepare(image)).abs().mean() > 0.05


def test_hps_tokens(hps):
    assert len(PROMPTS) == 200
    same_tokens(loaded(f"hpsv2={hps[2]}"), PROMPTS, official.open_clip().tokenize(PROMPTS))


def same_tokens(reward, prompts: list[str], expected: torch.Tensor) -> None:
    for prompt, row, tokens in zip(prompts, expected.tolist(), reward.tokenize(prompts), strict=True):
        assert tokens + [0] * (77 - len(tokens)) == row, prompt


def shapes(weights: dict) -> dict:
    return {key: tuple(value.shape) for key, value in weights.items()}


def heads(model) -> tuple[int, int]:
    """Attention heads of the image tower and of the text tower, of open_clip's model and of OpenAI's."""
    return tuple(tower.resblocks[0].attn.num_heads for tower in (model.visual.transformer, model.transformer))


def test_all_keys_of_the_full_size_hps():
    open_clip = official.open_clip()
    with torch.device("meta"):
        open_clip_model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        model = CLIPModel(CLIPConfig(**official.VIT_H))
    weights = build_synpic.hf_clip_weights(open_clip_model.state_dict())
    assert shapes(weights) == shapes(model.state_dict())
    assert sum(value.numel() for value in weights.values()) == 986_109_441
    towers = model.config.vision_config, model.config.text_config
    assert heads(open_clip_model) == tuple(tower.num_attention_heads for tower in towers) == (16, 16)


# PickScore and CLIPScore


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory, clip_tokenizer, hps):
    """The open_clip model of `hps` as a transformers checkpoint, as PickScore is published."""
    folder = with_files(tmp_path_factory.mktemp("pickscore"), clip_tokenizer)
    weights = build_synpic.hf_clip_weights(hps[0].state_dict())
    model = CLIPModel(CLIPConfig.from_pretrained(hps[2]))
    model.load_state_dict(weights)
    with torch.no_grad():
        model.logit_scale.fill_(np.log(100))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


def pickscore_pixels(image: PILImage.Image, size: int) -> torch.Tensor:
    """transformers' CLIPFeatureExtractor of 2023 in words of its own: PIL resize of the shorter side, crop, scale."""
    image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
    pixels = np.asarray(image.resize((new[0], height), PILImage.BICUBIC).resize(new, PILImage.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    pixels = (pixels[top : top + size, left : left + size] * (1 / 255)).astype(np.float32)
    mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())


def test_pickscore_is_the_scaled_cosine_of_open_clip(hps, pickscore):
    reward, images = loaded(f"pickscore={pickscore}"), list(pictures().values())
    prompts = [PROMPTS[2 + i % 5] for i in range(len(images))]
    pixels = torch.stack([pickscore_pixels(image, 56) for image in images])
    for name, image, expected in zip(pictures(), images, pixels):
        assert torch.equal(reward.prepare(image), expected), name
    tokens = [row + [0] * (77 - len(row)) for row in reward.tokenize(prompts)]
    with torch.no_grad():
        outputs = hps[0](pixels, torch.tensor(tokens))
    expected = 100 * (outputs["image_features"] * outputs["text_features"]).sum(dim=-1)
    assert expected.std() > 0.1
    # At 20 the last digit of a float32 is worth 2e-6.
    np.testing.assert_allclose(reward.score(images, prompts), expected, atol=1e-5, rtol=1e-6)
    half = load_reward_model(f"pickscore={pickscore}", dtype=torch.bfloat16)
    assert half.logit_scale == reward.logit_scale == pytest.approx(100)  # bfloat16 would make it 99


OPENAI_CLIP = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
OPENAI_CLIP |= {"hidden_act": "quick_gelu"}


@pytest.fixture(scope="module")
def openai_clip():
    """OpenAI's CLIP at a small size, heads 64 wide."""
    torch.manual_seed(0)
    return official.seeded(official.clip().model.CLIP(64, 56, 2, 128, 14, 77, 49408, 128, 2, 2))


def test_clipscore_is_hessels(openai_clip, clip_tokenizer, tmp_path):
    with_files(tmp_path, clip_tokenizer)
    weights = build_synpic.hf_clip_weights(openai_clip.state_dict())
    vision = {**OPENAI_CLIP, "image_size": 56, "patch_size": 14}
    model = CLIPModel(CLIPConfig(text_config=OPENAI_CLIP, vision_config=vision, projection_dim=64))
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path)
    reward = load_reward_model(f"clipscore={tmp_path}", batch_size=4)

    clip = official.clip()
    transform = clip.clip._transform(56)
    images = list(pictures().values())
    for name, image in pictures().items():
        assert torch.equal(reward.prepare(image), transform(image)), name
    tokens = clip.tokenize([f"A photo depicts {prompt}" for prompt in PROMPTS], truncate=True)
    same_tokens(reward, PROMPTS, tokens)
    with torch.no_grad():
        image_features = openai_clip.encode_image(torch.stack([transform(image) for image in images]))
        text_features = openai_clip.encode_text(tokens[: len(images)])
    expected = 2.5 * torch.nn.functional.cosine_similarity(image_features, text_features).clamp(min=0)
    np.testing.assert_allclose(reward.score(images, PROMPTS[: len(images)]), expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3
    reward.score(images[:2], ["a cat", long := "A Cat " * 80])
    assert reward.cut == {long}  # the prompt, not the text that is made of it


# MPS


class Scale(torch.nn.Module):
    """Layer norm with a weight, and a bias that is a buffer of zeros."""

    def __init__(self, dim):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * self.weight


class Holder(torch.nn.Module):
    """A module for its name's sake: `fn` of the official residual blocks, the angles' frequencies."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part) if isinstance(part, torch.nn.Module) else self.register_buffer(name, part)


def linear(inside: int, outside: int) -> torch.nn.Linear:
    return torch.nn.Linear(inside, outside, bias=False)


class OfficialMPS(torch.nn.Module):
    """MPS in words of its own, with the official module's names: one image, one head at a time."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        dim, self.heads = config.projection_dim, config.projection_dim // 64
        self.model, self.cross_model = CLIPModel(config), torch.nn.Module()
        self.cross_model.layers = torch.nn.ModuleList()
        for _ in range(4):
            cross = Holder(norm=Scale(dim), to_q=linear(dim, dim), to_kv=linear(dim, 128), to_out=linear(dim, dim))
            cross.ff = torch.nn.Sequential(linear(dim, 8 * dim), torch.nn.Identity(), linear(4 * dim, dim))
            image = Holder(norm=Scale(dim), fused_attn_ff_proj=linear(dim, 9 * dim + 128), attn_out=linear(dim, dim))
            image.rotary_emb = Holder(inv_freq=10000 ** -(torch.arange(0, 64, 2) / 64))
            image.ff_out = torch.nn.Sequential(torch.nn.Identity(), linear(4 * dim, dim))
            image.register_buffer("pos_emb", None, persistent=False)
            self.cross_model.layers.append(torch.nn.ModuleList([Holder(fn=cross), Holder(fn=image)]))

    def attend(self, query, key, value, seen=None):
        heads = []
        for part in query.split(64, dim=-1):
            logits = part @ key.T / 8
            logits = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
            heads.append(logits.softmax(dim=-1) @ value)
        return torch.cat(heads, dim=-1)

    def turn(self, tokens, part):
        """Each pair (i, i + 32) of a head's 64 numbers as a complex number, turned by position · frequency."""
        if part.pos_emb is None:
            part.pos_emb = torch.outer(torch.arange(len(tokens)), part.rotary_emb.inv_freq).repeat(1, 2)
        turns = torch.exp(1j * part.pos_emb[:, :32])
        real, imaginary = tokens.unflatten(-1, (-1, 2, 32)).unbind(dim=-2)
        turned = torch.complex(real, imaginary) * turns[:, None]
        return torch.stack([turned.real, turned.imag], dim=-2).flatten(1)

    def cross(self, tokens, text, seen):
        for cross, image in self.cross_model.layers:
            part, x = cross.fn, cross.fn.norm(tokens)
            key, value = part.to_kv(text).chunk(2, dim=-1)
            up, gate = part.ff[0](x).chunk(2, dim=-1)
            tokens = tokens + part.to_out(self.attend(part.to_q(x), key, value, seen))
            tokens = tokens + part.ff[2](up * gate * gate.sigmoid())
            part, x = image.fn, image.fn.norm(tokens)
            dim = x.shape[1]
            query, key, value, up, gate = part.fused_attn_ff_proj(x).split([dim, 64, 64, 4 * dim, 4 * dim], dim=-1)
            attended = self.attend(self.turn(query, part), self.turn(key, part), value)
            tokens = tokens + part.attn_out(attended) + part.ff_out[1](up * gate * gate.sigmoid())
        return tokens

    @torch.no_grad()
    def forward(self, pixels, ids, condition_ids, threshold):
        """The score of one image (3, h, w) for one prompt; and which of its tokens are seen."""
        words = [self.model.text_model(row[None]).last_hidden_state[0] for row in (ids, condition_ids)]
        text, condition = map(self.model.text_projection, words)
        similarity = torch.stack([(condition @ token).max() for token in text])
        seen = similarity / similarity.max() > threshold
        tokens = self.model.visual_projection(self.model.vision_model(pixels[None]).last_hidden_state[0])
        cosine = torch.cosine_similarity(self.cross(tokens, text, seen)[0], text[ids.argmax()], dim=0)
        return (self.model.logit_scale.exp() * cosine).item(), seen


@pytest.fixture(scope="module")
def mps(tmp_path_factory, pickscore):
    """The small model, and a folder with its weights as the copy on the Hub has them."""
    config = CLIPConfig.from_pretrained(pickscore, projection_dim=128)
    model = official.seeded(OfficialMPS(config))
    with torch.no_grad():
        model.model.logit_scale.fill_(np.log(100))
        # Words count for more and differ in two directions, so that both thresholds leave tokens out.
        model.model.text_model.embeddings.token_embedding.weight.mul_(10)
        directions = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(3))
        model.model.text_projection.weight.copy_(directions[0, :, :2] @ directions[1, :2] / 12)
    folder = with_files(tmp_path_factory.mktemp("mps"), pickscore)
    config.save_pretrained(folder)
    publish_mps(model.state_dict(), folder, folder)
    return model, folder


def publish_mps(weights: dict, source: Path, folder: Path) -> None:
    with_files(folder, source)
    save_file({f"mps.{key}": value.clone() for key, value in weights.items()}, folder / "model.safetensors")


def mps_tokens(folder: Path, prompts: list[str]) -> torch.Tensor:
    """Of the prompts and of the condition."""
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    return AutoTokenizer.from_pretrained(folder)([*prompts, build_synpic.MPSReward.CONDITION], **options).input_ids


@pytest.mark.parametrize("name, threshold", [("mps", 0.3), ("mps_t0.01", 0.01)])
def test_mps_is_the_official_score(name, threshold, mps, tmp_path):
    """`mps` from the copy on the Hub; `mps_t0.01` from a pickle with the official names."""
    model, folder = mps
    if name == "mps_t0.01":
        folder = with_files(tmp_path, folder)
        (folder / "model.safetensors").unlink()
        position_ids = {"model.text_model.embeddings.position_ids": torch.arange(77)[None]}
        torch.save(model.state_dict() | position_ids, folder / "pytorch_model.bin")
    images = list(pictures().values())[::2]
    prompts = [PROMPTS[i] for i in (2, 4, 0, 60, 18, 2, 70, 20)]
    *ids, condition = mps_tokens(folder, prompts)
    rows = [model(pickscore_pixels(image, 56), row, condition, threshold) for image, row in zip(images, ids)]
    expected, seen = zip(*rows)
    reward = load_reward_model(f"{name}={folder}", batch_size=3)
    for (_, found, _), mask in zip(reward.encode_prompts(prompts), seen):
        assert torch.equal(found, mask)
    assert 2 < sum(not mask.all() for mask in seen)
    # A millionth of the scale, 100.
    scores = reward.score(images, prompts)
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    assert np.std(expected) > 1
    metric = f"metrics/rewards.py:{name.replace('.', '')},model={folder}"
    assert evaluate.load_reward_model(metric, batch_size=3).score(images, prompts) == scores


def test_mps_turns_by_float16_angles(mps, tmp_path):
    """The angles of a float16 checkpoint are those of the official code in float16, on a CPU in float32 too."""
    half = copy.deepcopy(mps[0]).half()
    for _, image in half.cross_model.layers:
        frequencies = image.fn.rotary_emb.inv_freq.mul_(30)  # as far apart at 17 tokens as at 257 and more
        image.fn.pos_emb = torch.outer(torch.arange(17, dtype=torch.float16), frequencies).repeat(1, 2)
    publish_mps(half.state_dict(), mps[1], tmp_path)
    single = half.float()
    image, prompt = pictures()["large"], "a red bicycle"
    ids = mps_tokens(tmp_path, [prompt])
    found = load_reward_model(f"mps={tmp_path}").score([image], [prompt])
    expected = [single(pickscore_pixels(image, 56), *ids, 0.3)[0]]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    for _, image_part in single.cross_model.layers:
        image_part.fn.pos_emb = None
    assert abs(single(pickscore_pixels(image, 56), *ids, 0.3)[0] - expected[0]) > 1e-3


def test_all_keys_of_the_full_size_mps():
    with torch.device("meta"):
        official_model = OfficialMPS(CLIPConfig(**official.VIT_H))
        clip, layers = build_synpic.mps_weights(official_model.state_dict(), 257)
        assert shapes(clip) == shapes(CLIPModel(CLIPConfig(**official.VIT_H)).state_dict())
        blocks = ([build_synpic.MPSBlock(1024), build_synpic.MPSBlock(1024, 257)] for _ in range(4))
        blocks = torch.nn.ModuleList(torch.nn.ModuleList(pair) for pair in blocks)
        assert shapes(layers) == shapes(blocks.state_dict())
    # As many as in the official module.
    assert sum(parameter.numel() for parameter in official_model.parameters()) == 1_104_606_721
    assert official_model.heads == 16


# LAION aesthetic


def publish_aesthetic(model, head, folder):
    """In the form of shunk031/aesthetics-predictor-v2-…: CLIPVisionModelWithProjection and `layers`."""
    weights = build_synpic.hf_clip_weights(model.state_dict())
    weights = {key: value for key, value in weights.items() if key.startswith(("vision_model.", "visual_projection."))}
    CLIPVisionConfig(**OPENAI_CLIP, image_size=56, patch_size=14, projection_dim=64).save_pretrained(folder)
    weights |= {f"layers.{key}": value for key, value in head.layers.state_dict().items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # as older transformers saved it
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")


def test_aesthetic_is_the_official_score(openai_clip, tmp_path):
    official_score = official.image_reward().AestheticScore
    scorer = official_score.AestheticScore.__new__(official_score.AestheticScore)
    torch.nn.Module.__init__(scorer)
    scorer.device, scorer.clip_model = "cpu", openai_clip
    scorer.preprocess = official.clip().clip._transform(56)
    scorer.mlp = official.seeded(official_score.MLP(64), seed=1)
    publish_aesthetic(openai_clip, scorer.mlp, tmp_path)
    reward = load_reward_model(f"aesthetic={tmp_path}", batch_size=4)
    images, expected = list(pictures().values()), []
    for number, (name, image) in enumerate(pictures().items()):
        assert torch.equal(reward.prepare(image), scorer.preprocess(image)), name
        path = tmp_path / f"{number}.tiff"
        image.convert("RGB").save(path)  # the official code opens files
        images[number] = PILImage.open(path)
        with torch.no_grad():
            expected.append(scorer.score("", path))
    np.testing.assert_allclose(reward.score(images, [""] * len(images)), expected, atol=1e-5, rtol=0)
    assert np.std(expected) > 1e-3


# ImageReward


# Its med_config.json; dropout does nothing in evaluation.
MED_CONFIG = {"architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu"}
MED_CONFIG |= {"hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072}
MED_CONFIG |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "pad_token_id": 0}
MED_CONFIG |= {"num_attention_heads": 12, "num_hidden_layers": 12, "add_type_embeddings": False, "vocab_size": 30524}
MED_CONFIG |= {"encoder_width": 768, "add_cross_attention": True}


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    """A word-piece vocabulary made of the prompts' letters and words."""
    folder = tmp_path_factory.mktemp("bert")
    letters = sorted({letter for prompt in PROMPTS for letter in prompt.lower() if not letter.isspace()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = list(dict.fromkeys(words + WORDS + ["##ing", "word", "##word"]))
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder


def official_image_reward(parts, tokenizer=None, vit: dict | None = None, **med):
    """`ImageReward.ImageReward` with its image and text encoders at another size."""
    model = parts.ImageReward.ImageReward.__new__(parts.ImageReward.ImageReward)
    torch.nn.Module.__init__(model)
    config = parts.med.BertConfig(**{**MED_CONFIG, **med})
    size = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **(vit or {})}
    config.encoder_width = size["embed_dim"]
    model.blip = torch.nn.Module()
    model.blip.visual_encoder = parts.vit.VisionTransformer(**size)
    model.blip.text_encoder = parts.med.BertModel(config=config, add_pooling_layer=False)
    model.blip.vision_proj = torch.nn.Linear(size["embed_dim"], 256)
    model.blip.text_proj = torch.nn.Linear(config.hidden_size, 256)
    model.blip.tokenizer = tokenizer
    model.mlp = parts.ImageReward.MLP(config.hidden_size)
    model.preprocess = parts.ImageReward._transform(size["img_size"])
    model.device, model.mean, model.std = "cpu", 0.16717362830052426, 1.0333394966054072
    return model


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory, bert_tokenizer):
    parts = official.image_reward()
    folder = with_files(tmp_path_factory.mktemp("imagereward"), bert_tokenizer)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6}
    text = {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 3, "num_hidden_layers": 2}
    tokenizer = AutoTokenizer.from_pretrained(bert_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    vit = {"img_size": 64, "embed_dim": 128, "depth": 2, "num_heads": 2}
    model = official.seeded(official_image_reward(parts, tokenizer, vit, **text))
    weights = model.state_dict() | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(weights, folder / "ImageReward.pt")
    BlipConfig(vision_config=vision, text_config=text).save_pretrained(folder)
    return model, folder


def test_image_reward_is_the_official_score(image_reward, tmp_path, monkeypatch):
    model, folder = image_reward
    reward, images = loaded(f"imagereward={folder}"), list(pictures().values())
    for prompt in (PROMPTS[0], PROMPTS[18]):
        with torch.no_grad():
            _, expected = model.inference_rank(prompt, images)
            single = model.score(prompt, images[0])
        found = reward.score(images, [prompt] * len(images))
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        assert found[0] == pytest.approx(single, abs=1e-5)
        assert np.std(expected) > 1e-3
    for name, image in pictures().items():
        assert torch.equal(reward.prepare(image), model.preprocess(image)), name
    config = BlipConfig.from_pretrained(folder)
    monkeypatch.setattr(build_synpic.ImageRewardReward, "VISION", config.vision_config.to_dict())
    monkeypatch.setattr(build_synpic.ImageRewardReward, "TEXT", config.text_config.to_dict())
    (with_files(tmp_path, folder) / "config.json").unlink()  # as it is published
    assert load_reward_model(f"imagereward={tmp_path}", batch_size=5).score(images, [prompt] * len(images)) == found
    tokens = model.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    ids, masks = map(torch.stack, zip(*reward.encode_prompts(PROMPTS)))
    assert torch.equal(ids, tokens.input_ids) and torch.equal(masks, tokens.attention_mask)


def test_all_keys_of_the_full_size_image_reward(monkeypatch):
    # It reads numbers out of this tensor, which a meta tensor does not have.
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    reward = build_synpic.ImageRewardReward
    config = BlipConfig(vision_config=reward.VISION, text_config=reward.TEXT)
    with torch.device("meta"):
        model = official_image_reward(official.image_reward())
        # `checkpoint_weights` leaves these out, in every checkpoint.
        weights = {key: value for key, value in model.state_dict().items() if not key.endswith("position_ids")}
        vision, text, head = build_synpic.blip_weights(weights)
        assert shapes(vision) == shapes(BlipVisionModel(config.vision_config).state_dict())
        assert shapes(text) == shapes(BlipTextModel(config.text_config, add_pooling_layer=False).state_dict())
        build_synpic.linear_head(768, head)
    encoder = model.blip.visual_encoder
    assert config.vision_config.num_attention_heads == encoder.blocks[0].attn.num_heads == 16
    assert config.vision_config.layer_norm_eps == encoder.norm.eps == 1e-6
    assert config.vision_config.image_size == encoder.patch_embed.img_size[0] == 224
    assert {name: MED_CONFIG[name] for name in reward.TEXT} == reward.TEXT
    assert config.text_config.num_attention_heads == 12 and config.text_config.hidden_act == MED_CONFIG["hidden_act"]
    assert len(weights) - len(vision) - len(text) - len(head) == 4


# VQAScore


def make_t5_tokenizer(folder) -> None:
    """A unigram vocabulary over the prompts' words and letters, with T5's end token."""
    letters = sorted({letter for prompt in PROMPTS for letter in prompt if not letter.isspace()} | {"\u2581"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581Yes", -2.0), ("\u2581No", -2.0)]
    pieces += [(f"\u2581{word}", -4.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=2048
    ).save_pretrained(folder)


T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24}
T5_XXL |= {"num_heads": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5_XXL |= {"decoder_start_token_id": 0}
VISION_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION_336 |= {"image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu"}


def official_clip_t5(t5: dict, vision: dict, folder):
    """t2v-metrics' CLIPT5ForConditionalGeneration, and its weights under the names of its published checkpoints."""
    clip_t5 = official.clip_t5()
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder)
    tower = {"mm_vision_tower": str(folder), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    tower |= {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": vision["hidden_size"]}
    config = clip_t5.CLIPT5Config(**t5, **tower)
    # transformers 5 ties and scales by itself what T5 1.1 and FLAN never did.
    config.tie_word_embeddings = config.scale_decoder_outputs = False
    return clip_t5.CLIPT5ForConditionalGeneration(config)


def published(weights: dict) -> dict:
    """transformers 5.23 took the `vision_model.` out of CLIPVisionModel's names; the checkpoints are older."""
    old, new = "vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model."
    return {new + key.removeprefix(old).removeprefix("vision_model.") if key.startswith(old) else key: value
            for key, value in weights.items()}  # fmt: skip


@pytest.fixture(scope="module")
def vqascore(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqascore")
    make_t5_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    tower = {**VISION_336, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "image_size": 56}
    small = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    tower_folder = tmp_path_factory.mktemp("tower")
    processor.save_pretrained(tower_folder)
    small |= {"vocab_size": len(tokenizer) + 7}
    model = official.seeded(official_clip_t5(T5_XXL | small, tower | {"num_attention_heads": 2}, tower_folder))
    for part in (model.encoder, model.decoder):  # one tensor in the transformers of its day
        part.embed_tokens.weight = model.shared.weight
    model.config.save_pretrained(folder)
    weights = published(model.state_dict())
    assert {"shared.weight", "lm_head.weight", "mm_projector.2.bias"} < set(weights)
    assert not torch.equal(weights["lm_head.weight"], weights["shared.weight"])
    torch.save(weights, folder / "pytorch_model.bin")
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer, processor, folder


def test_vqascore_is_the_official_score(vqascore):
    """As t2v_metrics' CLIPT5Model.forward does it, with its model class and its way to tokenise."""
    model, tokenizer, processor, folder = vqascore
    reward = loaded(f"vqascore={folder}")
    images, prompts = list(pictures().values())[:8], [PROMPTS[i] for i in (2, 4, 0, 2, 30, 18, 7, 2)]
    expected = []
    for image, prompt in zip(images, prompts):
        image = image.convert("RGB")
        side = max(image.size)
        square = PILImage.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        question = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\n"
            f'Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
        )
        before, after = (tokenizer(chunk).input_ids for chunk in question.split("<image>"))
        assert before[-1] == after[-1] == 1
        ids, labels = torch.tensor([[*before, -200, *after]]), torch.tensor([tokenizer("Yes").input_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "return_dict": True}
        inputs |= {"decoder_attention_mask": torch.ones_like(labels)}
        with torch.no_grad():
            logits = model(**inputs, images=processor(square, return_tensors="pt").pixel_values).logits
        expected.append((-torch.nn.functional.cross_entropy(logits[0], labels[0])).exp().item())
    found = reward.score(images, prompts)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert np.std(expected) > 0.05 * np.mean(expected)


def test_vqascore_without_its_image_tower(vqascore, tmp_path):
    """A checkpoint may leave out the tower that its config.json names, since training does not change it."""
    with_files(tmp_path, vqascore[3])
    weights = torch.load(tmp_path / "pytorch_model.bin")
    tower = build_synpic.split_keys(weights, "vision_tower.vision_tower.")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    folder = with_files(tmp_path / "tower", Path(config["mm_vision_tower"]))
    save_file({key: value.contiguous() for key, value in tower.items()}, folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(folder)}))
    images, prompts = list(pictures().values())[:3], PROMPTS[2:5]
    expected = loaded(f"vqascore={vqascore[3]}").score(images, prompts)
    assert load_reward_model(f"vqascore={tmp_path}").score(images, prompts) == expected


def test_all_keys_of_the_full_size_vqascore(tmp_path, monkeypatch):
    monkeypatch.setattr(CLIPVisionModel, "save_pretrained", lambda *_: None)
    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", lambda *_: CLIPVisionModel(CLIPVisionConfig(**VISION_336)))
    monkeypatch.setattr(CLIPImageProcessor, "from_pretrained", lambda *_: None)
    with torch.device("meta"):
        weights = published(official_clip_t5(T5_XXL, VISION_336, tmp_path).state_dict())
        vision = build_synpic.split_keys(weights, "vision_tower.vision_tower.")
        projector = build_synpic.split_keys(weights, "mm_projector.")
        tower = CLIPVisionModel(CLIPVisionConfig(**VISION_336)).state_dict()
        assert shapes(vision) == {f"vision_model.{key}": shape for key, shape in shapes(tower).items()}
        t5 = T5ForConditionalGeneration(T5Config(**T5_XXL)).state_dict()
        assert shapes({key: weights[key] for key in t5}) == shapes(t5)
        assert set(weights) - set(t5) <= {"embed_tokens.weight"}
        sizes = {"0.weight": (4096, 1024), "0.bias": (4096,), "2.weight": (4096, 4096), "2.bias": (4096,)}
        assert shapes(projector) == sizes


def test_any_vlm_as_a_variant(tmp_path):
    """p("Yes") as the first token, of each pair alone without padding, by the model's own forward."""
    make_t5_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    template = (
        "{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(image_processor, tokenizer, chat_template=template, **options)
    folder = tmp_path / "Tiny-LLaVA-1B"
    processor.save_pretrained(folder)
    tower = {**VISION_336, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 56}
    tower["num_attention_heads"] = 2
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    towers = {"vision_config": CLIPVisionConfig(**tower), "text_config": LlamaConfig(**text)}
    model = LlavaForConditionalGeneration(LlavaConfig(**towers, image_token_index=image_token))
    official.seeded(model).save_pretrained(folder)

    name = f"vqascore_vlm={folder}"
    assert build_synpic.reward_name(name) == "vqascore_vlm_Tiny-LLaVA-1B"
    images, prompts, expected = list(pictures().values())[:6], [PROMPTS[i] for i in (2, 40, 2, 0, 4, 50)], []
    for image, prompt in zip(images, prompts):
        text = f'USER: <image> Does this image show "{prompt}"? Answer the question with Yes or No. ASSISTANT:'
        inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        expected.append(logits.softmax(dim=-1)[tokenizer.convert_tokens_to_ids("\u2581Yes")].item())
    found = load_reward_model(name, batch_size=4).score(images, prompts)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert np.std(expected) > 0.05 * np.mean(expected)
    metric = f"metrics/rewards.py:vqascore_vlm,model={folder}"
    assert evaluate.load_reward_model(metric, batch_size=4).score(images, prompts) == found
    with pytest.raises(SystemExit, match="/nothing is no folder, and no model of the Hub that you can read"):
        evaluate.hook(f"metrics/rewards.py:vqascore_vlm,model={tmp_path}/nothing", "prepare")([])
    with pytest.raises(SystemExit, match="reward vqascore_vlm=x: unknown; choose from .* as in metrics/$"):
        evaluate.reward_name("vqascore_vlm=x")


# Common behaviour


def checkpoint_of(name: str, request, folder: Path) -> str:
    """`name=folder` of the small checkpoint."""
    if name == "aesthetic":
        head = official.seeded(official.image_reward().AestheticScore.MLP(64), seed=1)
        publish_aesthetic(request.getfixturevalue("openai_clip"), head, folder)
        return f"{name}={folder}"
    source = request.getfixturevalue({"hpsv2": "hps", "imagereward": "image_reward"}.get(name, name))
    return f"{name}={source if isinstance(source, Path) else source[-1]}"


NETWORKS = ["hpsv2", "pickscore", "mps", "imagereward", "aesthetic", "vqascore"]


# Of each network: the file of its weights, and a key in its middle, as it is stored and as the message names it.
MIDDLE = "vision_model.encoder.layers.1.mlp.fc1.bias"
DENSE = "layer.1.output.dense.bias"
WIDE = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
KEYS = {
    "hpsv2": ("HPS_v2_compressed.pt", "visual.transformer.resblocks.1.mlp.c_fc.bias", MIDDLE),
    "pickscore": ("model.safetensors", MIDDLE, MIDDLE),
    "mps": ("model.safetensors", "mps.cross_model.layers.2.0.fn.ff.0.weight", "2.0.ff_in.weight"),
    "imagereward": ("ImageReward.pt", f"blip.text_encoder.encoder.{DENSE}", DENSE),
    "aesthetic": ("model.safetensors", "layers.2.bias", "2.bias"),
    "vqascore": ("pytorch_model.bin", WIDE, WIDE),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_weights_are_an_error(name, request, tmp_path):
    """Never a partial load: one key too few, one too many, one of another size, a NaN that attention on a CPU could
    swallow. And config.json says the architecture: the shapes of the weights are never taken instead."""
    file_name, key, shown = KEYS[name]
    with_files(tmp_path, Path(checkpoint_of(name, request, tmp_path).partition("=")[2]))
    file = tmp_path / file_name
    load, save = (load_file, save_file) if file.suffix == ".safetensors" else (torch.load, torch.save)
    stored = load(file)
    weights = stored["state_dict"] if name == "hpsv2" else stored

    def problem(changes: dict) -> str:
        changed = {key: value for key, value in (weights | changes).items() if value is not None}
        save({"state_dict": changed} if name == "hpsv2" else changed, file)
        with pytest.raises(SystemExit) as stopped:
            load_reward_model(f"{name}={tmp_path}")
        message = str(stopped.value)
        assert "\n" not in message and message.startswith(f"reward {name}={tmp_path}: {tmp_path} cannot be loaded: ")
        return message

    value = weights[key]
    assert shown in problem({key: None}) and shown in problem({f"{key}_ema": value.clone()})
    if name in ("hpsv2", "mps"):  # by transformers, by PyTorch
        assert shown in problem({key: torch.zeros(len(value) + 1, *value.shape[1:])})
    if name == "vqascore":  # whose words are counted before they are loaded
        assert "shared.weight has" in problem({"shared.weight": weights["shared.weight"][1:].clone()})
    message = problem({key: torch.full_like(value, torch.nan)})
    assert shown in message and "not finite" in message
    config = json.loads((tmp_path / "config.json").read_text())
    config.get("vision_config", config)["num_layers" if name == "vqascore" else "num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert " missing keys: " in problem({})


def png(seed: int, text: int = 0) -> bytes:
    """A file, with so many letters of metadata, as of a workflow."""
    info, buffer = PngImagePlugin.PngInfo(), BytesIO()
    info.add_text("workflow", "x" * text, zip=True)
    noise(60, 60, seed=seed).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["hpsv2", "function"])
def test_equal_images_prompts_and_pairs_are_taken_once(kind, hps, tmp_path, monkeypatch):
    """Files that hold the same bytes, wherever they stand; and each gets its own score."""
    (tmp_path / "mine.py").write_text(
        "seen = []\ndef mine(images, prompts):\n    seen.extend(prompts)\n"
        "    colors = [image.getpixel((5, 5)) for image in images]\n"
        "    for image in images:\n        image.paste('black', (0, 0, *image.size))\n"
        "    return [red + len(prompt) for (red, _, _), prompt in zip(colors, prompts)]\n"
    )
    name = f"hpsv2={hps[2]}" if kind == "hpsv2" else f"{tmp_path}/mine.py:mine"
    reward = load_reward_model(name, batch_size=4)
    files, prompts = [png(seed) for seed in (0, 1, 2, 0, 3, 4, 0, 1)], ["x", "y", "y", "yy", "x", "x", "x", "y"]
    alone = [reward.score([file], [prompt])[0] for file, prompt in zip(files, prompts)]
    encoded = {"encode_images": [], "encode_prompts": []}

    def spy(part):
        encode = getattr(reward, part)
        monkeypatch.setattr(reward, part, lambda batch: encoded[part].append(len(batch)) or encode(batch))

    for part in encoded:
        spy(part)
    np.testing.assert_allclose(reward.score(files, prompts), alone, atol=1e-6)
    assert len({*alone}) == 6 and sum(encoded["encode_images"]) == 5 and sum(encoded["encode_prompts"]) == 3
    if kind == "function":
        assert len(reward.function.__globals__["seen"]) == 8 + 6
    assert reward.score([], []) == []


@pytest.mark.parametrize("kind, read", [("hpsv2", 75), ("pickscore", 75), ("imagereward", 33)])
def test_longer_prompts_are_counted(kind, read, request, tmp_path):
    """A tokenizer's start and end tokens count. VQAScore reads all."""
    reward = loaded(checkpoint_of(kind, request, tmp_path))
    prompts = ["a " * (read + more) for more in (-1, 0, 1, 9)]
    reward.score([noise(60, 60)] * 4, prompts)
    assert reward.cut == set(prompts[2:])
    reward.score([noise(60, 60)], prompts[:1])
    assert not reward.cut


@pytest.mark.parametrize("kind", ["hpsv2", "function"])
def test_bad_images(hps, tmp_path, kind):
    """NaN and a reason; the others' scores stay. Without `bad`, an error. Large metadata makes no image bad."""
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts):\n    return [im.getpixel((0, 0))[0] for im in images]\n"
    )
    name = f"hpsv2={hps[2]}" if kind == "hpsv2" else f"{tmp_path}/mine.py:bright"
    reward, cut, bad = load_reward_model(name, batch_size=3), png(9)[:5000], {}
    expected = reward.score([noise(60, 60, seed=seed) for seed in range(4)], ["x"] * 4)
    found = reward.score([png(0), cut, png(1), b"no image", png(2, text=2**22), png(3), cut], ["x"] * 7, bad=bad)
    assert sorted(bad) == [1, 3, 6] and bad[1] == bad[6] and "truncated" in bad[1]
    assert bad[3] == "cannot identify image file" and np.isnan([found[n] for n in bad]).all()
    np.testing.assert_allclose(np.delete(found, list(bad)), expected, atol=1e-6)
    with pytest.raises(OSError, match="truncated"):
        reward.score([png(0), cut], ["x"] * 2)
    assert all(np.isnan(reward.score([cut, cut], ["x", "y"], bad={})))


def test_settings_of_a_class(tmp_path):
    """They have the types of its parameters. What a file or folder that one names holds is part of them."""
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, device, batch_size, size=3, rate: float = 1, on=False, model=None):\n"
        "        pass\n\n    def score(self, images, prompts):\n        return [0.0] * len(images)\n"
    )
    name = f"{tmp_path}/mine.py:Mine"
    words = "size=5,rate=1e-5,on=true,model=user/x"
    assert load_reward_model(f"{name},{words}").settings == {"size": 5, "rate": 1e-5, "on": True, "model": "user/x"}
    wrong = {"size=many": "like its default, size=3", "on=1": "on=False", "sise=3": "no setting sise"}
    for setting, problem in wrong.items():
        with pytest.raises(SystemExit, match=problem):
            load_reward_model(f"{name},{setting}")
    keys = []
    for folder, content in {"a": "one", "b": "one", "c": "two"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights.bin").write_text(content)
        for path in (tmp_path / folder, tmp_path / folder / "weights.bin"):
            keys.append(build_synpic.reward_settings(f"{name},model={path}")["files"]["model"])
    assert keys[:2] == keys[2:4] and len({*keys}) == 4


def stays_near(name: str, **half) -> None:
    images = list(pictures().values())[:6]
    prompts = [PROMPTS[2 + i % 3] for i in range(len(images))]
    full = np.array(loaded(name).score(images, prompts))
    found = load_reward_model(name, **half).score(images, prompts)
    # bfloat16 has fewer bits than float16. In float16, MPS may leave out another token at its threshold.
    bits = 0.3 if name.startswith(("vqascore", "mps")) else 0.1
    np.testing.assert_allclose(found, full, atol=bits * full.std())


@pytest.mark.parametrize("name", ["hpsv2", *NETWORKS[2:]])  # PickScore runs HPSv2's network
def test_half_precision_stays_near(name, request, tmp_path):
    dtype = torch.bfloat16 if name == "vqascore" else torch.float16
    stays_near(checkpoint_of(name, request, tmp_path), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu(name, request, tmp_path):
    stays_near(checkpoint_of(name, request, tmp_path), device="cuda")
