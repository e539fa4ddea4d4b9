# SPDX-License-Identifier: Apache-2.0
"""What do the benchmarks' models cost for an image? Counts weights and floating-point operations at full size.

    python benchmarks/metric_cost.py

No weights are loaded. The models stand on PyTorch's meta device (Mask2Former, whose code needs numbers, on the CPU).
torch.utils.flop_counter counts their matrix products and convolutions.
"""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "metrics"))

import dpg_bench  # noqa: E402
import geneval  # noqa: E402
import hpsv3  # noqa: E402
import qalign  # noqa: E402
import t2i_compbench  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import unidet  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402


def geneval_image(model) -> None:
    model(pixel_values=torch.empty(1, 3, 800, 800))  # what a square image becomes


def blip_image(model) -> None:
    """An image, and a question of 8 tokens."""
    image = model.vision_model(torch.empty(1, 3, 480, 480)).last_hidden_state
    tokens = torch.ones(1, 8, dtype=torch.long)
    asked = model.text_encoder(tokens, encoder_hidden_states=image, is_decoder=False).last_hidden_state
    model.text_decoder(tokens[:, :1], encoder_hidden_states=asked)


def unidet_image(model) -> None:
    """All but what depends on the picture: the pyramid, the proposals' scores, and 1000 proposals in three stages."""
    features = model.backbone(torch.empty(1, 3, 480, 480))
    for feature in features:
        hidden = model.proposal_generator.rpn_head.conv(feature)
        model.proposal_generator.rpn_head.objectness_logits(hidden)
        model.proposal_generator.rpn_head.anchor_deltas(hidden)
    for head, predictor in zip(model.roi_heads.box_head, model.roi_heads.box_predictor):
        hidden = head(torch.empty(1000, 256, 7, 7))
        for part in predictor.values():
            part(hidden)


def mplug_image(model, questions: int = 10) -> None:
    """An image, and questions that are answered in two tokens."""
    image, ids = model.encode_image(torch.empty(1, 3, 504, 504)), torch.ones(questions, 25, dtype=torch.long)
    fused = model.fuse(image, ids, ids.bool())
    contexts = model.contexts(*fused, ids.bool())
    for length in (1, 2):
        model.logits(torch.ones(questions, 5, length, dtype=torch.long), contexts)


def qalign_image(model) -> None:
    """An image, and the two prompts of 35 tokens."""
    image = model.image_tokens(torch.empty(1, 3, 448, 448))
    for _ in qalign.ASPECTS:
        model(image, [1] * 18, [1] * 17, [1, 2, 3, 4, 5])


def hpsv3_image(model) -> None:
    """An image of 448 x 448: 1024 patches, 256 tokens. And a text of about 560 tokens, most of them the instruction."""
    positions, grid = torch.empty(1024, 2, dtype=torch.long), torch.tensor([[1, 32, 32]], device="cpu")
    model.visual(torch.empty(1024, 1176), grid, position_ids=positions)
    model.model(inputs_embeds=torch.empty(1, 256 + 560, 3584))


def make_hpsv3():
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 151658}
    return hpsv3.RewardModel(transformers.Qwen2VLConfig(vision_config=vision, **text))


def make_blip():
    config = transformers.BlipConfig(vision_config=t2i_compbench.BLIP_VISION, text_config=t2i_compbench.BLIP_TEXT)
    return transformers.BlipForQuestionAnswering(config)


MODELS = {
    "GenEval: Mask2Former Swin-S": (
        "cpu",
        lambda: transformers.Mask2FormerForUniversalSegmentation(geneval.official_config()),
        geneval_image,
    ),
    "T2I-CompBench: BLIP-VQA, 1 question": ("meta", make_blip, blip_image),
    "T2I-CompBench: UniDet ResNeSt-200": (
        "meta",
        lambda: unidet.UnifiedRCNN(**unidet.PUBLISHED, labels=722),
        unidet_image,
    ),
    "DPG-Bench: mPLUG-large, 10 questions": (
        "meta",
        lambda: dpg_bench.MPlug(dpg_bench.load_config(Path("no folder"))),
        mplug_image,
    ),
    "Q-Align: OneAlign, both scores": ("meta", lambda: qalign.QAlignModel(qalign.make_config({})), qalign_image),
    "HPSv3": ("meta", make_hpsv3, hpsv3_image),
}


def main() -> None:
    print("| model | weights, million | TFLOP an image |\n| --- | --- | --- |")
    for name, (device, make, run) in MODELS.items():
        with torch.device(device), torch.inference_mode():
            model = make().eval()
            with FlopCounterMode(display=False) as counter:
                run(model)
        millions = sum(weight.numel() for weight in model.parameters()) / 1e6
        print(f"| {name} | {millions:.0f} | {counter.get_total_flops() / 1e12:.2f} |", flush=True)


if __name__ == "__main__":
    main()
