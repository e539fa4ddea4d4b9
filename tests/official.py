"""The official scorers on today's stack, as oracles: their own modules, with what they import and no longer exists
put in their way. Nothing of what they compute is touched.

- hpsv2 1.2.0: its wheel lacks the vocabulary of its tokenizer (taken from the clip package) and imports `turtle`,
  `clint` by mistake.
- image-reward 1.5: `med.py` imports and inherits what transformers 5 moved or dropped. `apply_chunking_to_forward` and
  `prune_linear_layer` are transformers' own, pruning is never called; the head mask (none) and the inverted mask of the
  cross-attention (all ones) are made as transformers 4.30 made them; timm's names are given where they are today.
- t2v-metrics 3.0: only the CLIP-FlanT5 model, without the package around it, which imports a dozen others.
"""

import functools
import gzip
import importlib
import importlib.util
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: make test installs requirements-official.txt")
    return Path(spec.submodule_search_locations[0])


def stub(name: str, **attributes) -> None:
    """Gives a module the attributes it lacks; and makes the module where there is none of that name."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = []
    for key, value in attributes.items():
        if not hasattr(module, key):
            setattr(module, key, value)


def vocabulary() -> Path:
    """OpenAI's byte pair merges (also of open_clip and HPSv2)."""
    return folder_of("clip") / "bpe_simple_vocab_16e6.txt.gz"


def merges() -> list[str]:
    with gzip.open(vocabulary(), "rt", encoding="utf-8") as file:
        return file.read().split("\n")[1 : 49152 - 256 - 2 + 1]


def open_clip():
    """hpsv2's fork of open_clip."""
    target = folder_of("hpsv2") / "src/open_clip/bpe_simple_vocab_16e6.txt.gz"
    if not target.exists():
        shutil.copy(vocabulary(), target)
    stub("turtle", forward=None)
    stub("clint")
    stub("clint.textui", progress=None)
    return importlib.import_module("hpsv2.src.open_clip")


def hpsv2():
    """The module that holds `hpsv2.score`."""
    open_clip()
    return importlib.import_module("hpsv2.img_score")


def clip():
    stub("pkg_resources", packaging=importlib.import_module("packaging"))
    importlib.import_module("packaging.version")
    return importlib.import_module("clip")


@functools.cache
def image_reward():
    """image-reward's modules: ImageReward, and models.BLIP.{vit, med}, models.AestheticScore."""
    import timm.layers
    import timm.models
    import transformers.modeling_utils
    import transformers.pytorch_utils

    folder = folder_of("ImageReward")

    def never(*_):
        raise AssertionError("pruning")

    for name in ("apply_chunking_to_forward", "prune_linear_layer"):
        if not hasattr(transformers.modeling_utils, name):
            setattr(transformers.modeling_utils, name, getattr(transformers.pytorch_utils, name))
    stub("transformers.modeling_utils", find_pruneable_heads_and_indices=never)
    for old, new in {"timm.models.hub": "timm.models._hub", "timm.models.registry": "timm.models._registry"}.items():
        sys.modules.setdefault(old, importlib.import_module(new))
    sys.modules.setdefault("timm.models.layers", timm.layers)
    if "transformers.file_utils" not in sys.modules:
        sys.modules["transformers.file_utils"] = transformers.utils
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        stub(name)
    stub("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=never)
    clip()
    package = sys.modules["ImageReward"] = types.ModuleType("ImageReward")  # its __init__ imports the training loop
    package.__path__ = [str(folder)]
    med = importlib.import_module("ImageReward.models.BLIP.med")
    shims = {
        "get_head_mask": lambda self, mask, layers: [None] * layers,
        "invert_attention_mask": lambda self, mask: (1.0 - mask[:, None, None, :].float()) * torch.finfo().min,
    }
    for name, method in shims.items():
        if not hasattr(med.BertPreTrainedModel, name):
            setattr(med.BertPreTrainedModel, name, method)
    med.BertPreTrainedModel.init_weights = lambda self: None  # overwritten by `seeded`
    return types.SimpleNamespace(
        med=med,
        vit=importlib.import_module("ImageReward.models.BLIP.vit"),
        blip=importlib.import_module("ImageReward.models.BLIP.blip"),
        ImageReward=importlib.import_module("ImageReward.ImageReward"),
        AestheticScore=importlib.import_module("ImageReward.models.AestheticScore"),
    )


def clip_t5():
    """t2v-metrics' CLIP-FlanT5 model and its tokenisation."""
    sys.path.append(str(folder_of("t2v_metrics") / "models/vqascore_models"))
    return importlib.import_module("clip_t5.model.language_model.clip_t5")


# What config.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K says. Its end token of 2 means, in transformers, the token
# with the highest number.
VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "hidden_act": "gelu"}
VIT_H = {"projection_dim": 1024, "vision_config": VISION, "text_config": TEXT}


def seeded(module: torch.nn.Module, seed: int = 0, scale: float = 0.02) -> torch.nn.Module:
    """Random weights that are not small enough to hide a mistake: norms differ from 1, biases from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (scale if parameter.ndim < 2 else parameter.shape[-1] ** -0.5))
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    return module.eval()
