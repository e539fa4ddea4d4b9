# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub", "pillow", "torch", "torchvision"]
# ///
"""UniDet (Zhou et al., 2022), the object detector of T2I-CompBench's spatial scores, in plain PyTorch and torchvision.
A Cascade R-CNN on ResNeSt-200 with a feature pyramid, for one vocabulary of 722 labels that was learned from COCO,
Objects365, OpenImages and Mapillary. It is not a metric of its own; a metric imports it:

    from unidet import UniDet

    detector = UniDet(torch.device("cuda"))
    for name, score, (x0, y0, x1, y1) in detector.detect([image])[0]: ...

The same as T2I-CompBench's UniDet_eval/2D_spatial_eval.py:
- Images: RGB, resized by PIL to a shorter side of 479, or a longer side of 480 where that would exceed it. Then the
  channels turn to BGR, although the configuration's mean and deviation are in RGB order. Boxes are in pixels of the
  resized image, and the protocol's distances too.
- Score threshold 0.1. The official command line has 0.5, but its box head does not read that: it holds 0.1.
- Names: the list in the official `dataset/detection_features.pt`, lower case, two names of one label with ", " between
  them (`mobile phone, cell phone`). Some occur twice (`truck`, `vase`), for labels that training kept apart.
- Order: falling score. At most 300 detections per image.
- On CUDA, float16 autocast, as the official run has it. On the CPU, float32 (the official code has no CPU run).
A difference: images run one by one, not in padded batches of 64, so that no image changes another's scores. Images of
one size give the same in the official code.

Weights: `shikunl/prismer`, `expert_weights/Unified_learned_OCIM_RS200_6x+2x.pth`. The code was written for this project
after the published architecture: xingyizhou/UniDet with its ResNeSt, detectron2 (both Apache-2.0), T2I-CompBench (MIT).
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import nn
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align
from torchvision.transforms.functional import pil_to_tensor, resize


OFFICIAL_WEIGHTS = ("shikunl/prismer", "expert_weights/Unified_learned_OCIM_RS200_6x+2x.pth")
OFFICIAL_LABELS = (
    "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/1b7094991a57f3c22abdd4f6e8ba6c1a15517073/"
    "UniDet_eval/dataset/detection_features.pt"
)
LABELS_FILE = "unidet_labels-c38ba9352b2a9f83.pt"  # in torch.hub's folder; the digits are those of its SHA-256

# The sizes of Unified_learned_OCIM_RS200_6x+2x. A config.json beside other weights may replace them.
PUBLISHED = {
    "blocks": [3, 24, 36, 3],  # residual blocks of res2 to res5
    "stem_channels": 64,
    "bottleneck_channels": 64,  # of res2; they double from stage to stage, as the next
    "res2_channels": 256,
    "fpn_channels": 256,
    "head_channels": 256,
    "head_features": 1024,
}

PIXEL_MEAN = (123.68, 116.779, 103.939)
PIXEL_STD = (58.393, 57.12, 57.375)
STRIDES = (8, 16, 32, 64, 128)  # of the pyramid's levels p3 to p7
ANCHOR_SIZES = tuple(tuple(size * 2 ** (third / 3) for third in range(3)) for size in (32, 64, 128, 256, 512))
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
PROPOSALS = 1000  # per level before non-maximum suppression, and per image after it
PROPOSAL_IOU = 0.7
CASCADE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
DETECTIONS = 300
DETECTION_IOU = 0.5
LARGEST_GROWTH = math.log(1000 / 16)  # of a box's width or height, as a logarithm


class UniDet:
    """The detector with its weights and names.

    Args:
        device: where it runs.
        weights: "official", or the path of a .pth file. A `config.json` in the file's folder may hold the sizes (the
            keys of `PUBLISHED`) and `labels`: the name of a file in that folder with the labels' names, either a JSON
            list or the official .pt file. What is missing there is as published.
        threshold: the score that a detection must exceed. 0.1 is the official value.
    """

    def __init__(self, device: torch.device, weights: str = "official", threshold: float = 0.1):
        path, config, self.labels = find_files(weights)
        self.device, self.threshold = torch.device(device), threshold
        with torch.device("meta"):  # no time for initial values, no memory for a second copy
            self.model = UnifiedRCNN(**PUBLISHED | config, labels=len(self.labels))
        self.model.load_state_dict(read_weights(path), assign=True)
        self.model.to(self.device, torch.float32).eval()

    @torch.inference_mode()
    def detect(self, images: list[Image.Image]) -> list[list[tuple[str, float, tuple[float, float, float, float]]]]:
        """Finds objects in PIL images of any mode and size.

        Returns:
            For each image its detections by falling score: (label's name, score in 0..1, box). A box is x0, y0, x1, y1
            in pixels of the resized image (see `resized`), which is what the official spatial score works with.
        """
        results = []
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            for image in images:
                boxes, scores, classes = self.model(pixels_of(image).to(self.device), self.threshold)
                names = [self.labels[index] for index in classes.tolist()]
                results.append(list(zip(names, scores.tolist(), map(tuple, boxes.tolist()))))
        return results


# Input


def resized(image: Image.Image) -> Image.Image:
    """The image as RGB, shorter side 479 unless that makes the longer one exceed 480, which is then 480."""
    return resize(image.convert("RGB"), 479, max_size=480)


def pixels_of(image: Image.Image) -> torch.Tensor:
    """Returns (3, height, width), float32, 0 to 255, BGR."""
    return pil_to_tensor(resized(image)).flip(0).float()


# Boxes. All are x0, y0, x1, y1 in pixels, float32, shape (n, 4).


def anchor_boxes(height: int, width: int, stride: int, sizes: tuple[float, ...]) -> torch.Tensor:
    """The anchors of a pyramid level of height × width cells: (height · width · len(sizes) · 3, 4)."""
    shapes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for size in sizes for ratio in ANCHOR_RATIOS]
    around_zero = torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1).float()
    return (centres[:, :, None] + around_zero).reshape(-1, 4)


def apply_deltas(deltas: torch.Tensor, boxes: torch.Tensor, weights: tuple[float, ...]) -> torch.Tensor:
    """Moves boxes by dx, dy (in box widths and heights) and scales them by exp(dw), exp(dh), all divided by weights."""
    dx, dy, dw, dh = (deltas.float() / deltas.new_tensor(weights, dtype=torch.float32)).unbind(1)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + 0.5 * size + torch.stack([dx, dy], dim=1) * size
    size = size * torch.stack([dw, dh], dim=1).clamp(max=LARGEST_GROWTH).exp()
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=1)


def has_area(boxes: torch.Tensor) -> torch.Tensor:
    """Which boxes have a width and a height: (n,), bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def pool_regions(features: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Cuts a 7 × 7 patch out of p3, p4 or p5 for each box; larger boxes take coarser levels. Returns (len(boxes),
    channels, 7, 7), in the features' dtype."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = torch.floor(4 + torch.log2(side / 224 + 1e-8)).clamp(3, 5)
    patches = features[0].new_zeros(len(boxes), features[0].shape[1], 7, 7)
    for level, feature, stride in zip((3, 4, 5), features, STRIDES):
        chosen = (levels == level).nonzero()[:, 0]
        regions = [boxes[chosen].to(feature.dtype)]  # the official code rounds them to float16 too
        patches[chosen] = roi_align(feature, regions, 7, spatial_scale=1 / stride, aligned=True)
    return patches


def choose_proposals(
    levels: list[tuple[torch.Tensor, torch.Tensor]], height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best regions of all pyramid levels, each given as boxes and their scores (n,). Returns at most 1000 boxes
    inside the image and their scores, by falling score."""
    best = [scores.topk(min(PROPOSALS, len(scores))) for _, scores in levels]
    boxes = torch.cat([boxes[top.indices] for (boxes, _), top in zip(levels, best)])
    scores = torch.cat([top.values for top in best])
    level_of = torch.cat([torch.full_like(top.indices, level) for level, top in enumerate(best)])
    finite = boxes.isfinite().all(dim=1) & scores.isfinite()
    boxes = clip_boxes_to_image(boxes, (height, width))
    use = finite & has_area(boxes)
    boxes, scores, level_of = boxes[use], scores[use], level_of[use]
    keep = batched_nms(boxes, scores, level_of, PROPOSAL_IOU)[:PROPOSALS]
    return boxes[keep], scores[keep]


def choose_detections(
    boxes: torch.Tensor, scores: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Detections above the threshold, without overlaps inside a class, of boxes inside the image and their scores (n,
    classes). Returns at most 300 boxes, their scores (k,) and class indices (k,), by falling score."""
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    boxes, scores = boxes[finite], scores[finite]
    rows, classes = (scores > threshold).nonzero(as_tuple=True)
    boxes, scores = boxes[rows], scores[rows, classes]
    keep = batched_nms(boxes, scores, classes, DETECTION_IOU)[:DETECTIONS]
    keep = keep[has_area(boxes[keep])]
    return boxes[keep], scores[keep], classes[keep]


# The model. Module names are those of the published checkpoint.


class NormConv(nn.Conv2d):
    """A convolution without bias, "same" padding, batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


class SplitAttention(nn.Module):
    """ResNeSt's convolution: two branches, mixed per channel with weights that depend on both branches' means."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 32)
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * channels)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.bn0(self.conv(x)).relu().chunk(2, dim=1)
        mean = F.adaptive_avg_pool2d(first + second, 1)
        weights = self.fc2(self.bn1(self.fc1(mean)).relu()).unflatten(1, (2, -1)).softmax(dim=1)
        return weights[:, 0] * first + weights[:, 1] * second


class Block(nn.Module):
    """A residual bottleneck. Where it halves the resolution, average pooling does so in both paths."""

    def __init__(self, inputs: int, bottleneck: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.shortcut = NormConv(inputs, outputs, 1) if inputs != outputs else None
        self.conv1 = NormConv(inputs, bottleneck, 1)
        self.conv2 = SplitAttention(bottleneck)
        self.conv3 = NormConv(bottleneck, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv2(self.conv1(x).relu())
        if self.stride > 1:
            out = F.avg_pool2d(out, 3, self.stride, padding=1)
        out = self.conv3(out)
        if self.shortcut is not None:
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True, count_include_pad=False)
            x = self.shortcut(x)
        return (out + x).relu()


class Stem(nn.Module):
    """Three convolutions and a maximum: a quarter of the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1_1 = NormConv(3, channels, 3, stride=2)
        self.conv1_2 = NormConv(channels, channels, 3)
        self.conv1_3 = NormConv(channels, 2 * channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1_1, self.conv1_2, self.conv1_3):
            x = conv(x).relu()
        return F.max_pool2d(x, 3, 2, padding=1)


class ResNeSt(nn.Module):
    """ResNeSt with two branches per block. Returns the outputs of res3, res4 and res5."""

    def __init__(self, blocks: list[int], stem_channels: int, bottleneck_channels: int, res2_channels: int):
        super().__init__()
        self.stem = Stem(stem_channels)
        inputs = 2 * stem_channels
        for stage, count in enumerate(blocks):
            bottleneck, outputs = bottleneck_channels * 2**stage, res2_channels * 2**stage
            stride = 1 if stage == 0 else 2
            layers = [Block(inputs, bottleneck, outputs, stride)]
            layers += [Block(outputs, bottleneck, outputs, 1) for _ in range(count - 1)]
            self.add_module(f"res{stage + 2}", nn.Sequential(*layers))
            inputs = outputs

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        res3 = self.res3(self.res2(self.stem(x)))
        res4 = self.res4(res3)
        return [res3, res4, self.res5(res4)]


class FeaturePyramid(nn.Module):
    """Returns p3 to p7, fine to coarse, all with the same number of channels. p6 and p7 are made from p5."""

    def __init__(self, bottom_up: ResNeSt, res2_channels: int, channels: int):
        super().__init__()
        self.bottom_up = bottom_up
        for level in (3, 4, 5):
            self.add_module(f"fpn_lateral{level}", NormConv(res2_channels * 2 ** (level - 2), channels, 1))
            self.add_module(f"fpn_output{level}", NormConv(channels, channels, 3))
        self.top_block = nn.Module()
        self.top_block.p6 = nn.Conv2d(channels, channels, 3, 2, padding=1)
        self.top_block.p7 = nn.Conv2d(channels, channels, 3, 2, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        res3, res4, res5 = self.bottom_up(x)
        inner5 = self.fpn_lateral5(res5)
        inner4 = self.fpn_lateral4(res4) + F.interpolate(inner5, scale_factor=2.0)
        inner3 = self.fpn_lateral3(res3) + F.interpolate(inner4, scale_factor=2.0)
        p5 = self.fpn_output5(inner5)
        p6 = self.top_block.p6(p5)
        return [self.fpn_output3(inner3), self.fpn_output4(inner4), p5, p6, self.top_block.p7(p6.relu())]


class ProposalNetwork(nn.Module):
    """Proposes regions of the image that may hold an object: rates and moves the anchors of each level."""

    def __init__(self, channels: int):
        super().__init__()
        anchors = len(ANCHOR_SIZES[0]) * len(ANCHOR_RATIOS)
        self.rpn_head = nn.Module()
        self.rpn_head.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_head.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.rpn_head.anchor_deltas = nn.Conv2d(channels, 4 * anchors, 1)

    def forward(self, features: list[torch.Tensor], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        levels = []
        for feature, stride, sizes in zip(features, STRIDES, ANCHOR_SIZES):
            hidden = self.rpn_head.conv(feature).relu()
            scores = self.rpn_head.objectness_logits(hidden)[0].permute(1, 2, 0).flatten()
            deltas = self.rpn_head.anchor_deltas(hidden)[0].permute(1, 2, 0).reshape(-1, 4)
            anchors = anchor_boxes(*feature.shape[-2:], stride, sizes).to(feature.device)
            levels.append((apply_deltas(deltas, anchors, (1.0, 1.0, 1.0, 1.0)), scores))
        return choose_proposals(levels, height, width)


class BoxHead(nn.Module):
    """Four convolutions and a linear layer on a region's 7 × 7 patch."""

    def __init__(self, inputs: int, channels: int, features: int):
        super().__init__()
        self.conv1 = NormConv(inputs, channels, 3)
        self.conv2, self.conv3, self.conv4 = (NormConv(channels, channels, 3) for _ in range(3))
        self.fc1 = nn.Linear(channels * 7 * 7, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        return self.fc1(x.flatten(1)).relu()


class CascadeHeads(nn.Module):
    """Three stages. Each rates the labels (and, as the last one, the background) and moves the boxes of the one before,
    the same for all labels. The scores are the mean of all three."""

    def __init__(self, inputs: int, channels: int, features: int, labels: int):
        super().__init__()
        stages = range(len(CASCADE_WEIGHTS))
        self.box_head = nn.ModuleList(BoxHead(inputs, channels, features) for _ in stages)
        self.box_predictor = nn.ModuleList(
            nn.ModuleDict({"cls_score": nn.Linear(features, labels + 1), "bbox_pred": nn.Linear(features, 4)})
            for _ in stages
        )

    def forward(
        self, features: list[torch.Tensor], boxes: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the moved boxes, clipped to the image, and their scores (n, labels), without the background."""
        scores = []
        for head, predictor, weights in zip(self.box_head, self.box_predictor, CASCADE_WEIGHTS):
            hidden = head(pool_regions(features, boxes))
            # A sigmoid, not a softmax: an object may be a bird and an animal.
            scores.append(predictor["cls_score"](hidden).sigmoid())
            deltas = predictor["bbox_pred"](hidden)
            boxes = clip_boxes_to_image(apply_deltas(deltas, boxes, weights), (height, width))
        return boxes, sum(scores)[:, :-1] * (1 / len(scores))


class UnifiedRCNN(nn.Module):
    """The whole detector, for one image. The arguments are the number of labels, and the keys of `PUBLISHED`."""

    def __init__(self, labels: int, fpn_channels: int, head_channels: int, head_features: int, **backbone):
        super().__init__()
        self.backbone = FeaturePyramid(ResNeSt(**backbone), backbone["res2_channels"], fpn_channels)
        self.proposal_generator = ProposalNetwork(fpn_channels)
        self.roi_heads = CascadeHeads(fpn_channels, head_channels, head_features, labels)

    def forward(self, pixels: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Takes `pixels_of` an image; returns what `choose_detections` returns."""
        height, width = pixels.shape[-2:]
        features = self.encode(pixels)
        proposals, _ = self.proposal_generator(features, height, width)
        boxes, scores = self.roi_heads(features[:3], proposals, height, width)
        return choose_detections(boxes, scores, threshold)

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The pyramid's levels p3 to p7. Zeros on the right and below fill the image up to multiples of 32."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        height, width = pixels.shape[-2:]
        padded = F.pad((pixels - mean) / std, (0, -width % 32, 0, -height % 32))
        return self.backbone(padded[None])


# Files


def find_files(weights: str) -> tuple[Path, dict, list[str]]:
    """The file of the weights, the sizes that its config.json gives, and the labels' names. Downloads official ones."""
    path = Path(hf_hub_download(*OFFICIAL_WEIGHTS) if weights == "official" else weights)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass the path of UniDet's weights, or `official`")
    beside = path.with_name("config.json")
    config = json.loads(beside.read_text()) if weights != "official" and beside.is_file() else {}
    labels = config.pop("labels", None)
    return path, config, read_labels(path.with_name(labels) if labels else None)


def read_labels(path: Path | None) -> list[str]:
    """The labels' names by class index: from a JSON list, or a .pt file like the official one, or the official one."""
    if path is None:
        options = {"file_name": LABELS_FILE, "check_hash": True, "map_location": "cpu", "weights_only": True}
        return torch.hub.load_state_dict_from_url(OFFICIAL_LABELS, **options)["labels"]
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return torch.load(path, map_location="cpu", weights_only=True)["labels"]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a detectron2 checkpoint, without what inference does not use."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("module."): value for key, value in checkpoint.get("model", checkpoint).items()}
    # Constants that older releases of detectron2 stored; they are constants here.
    constants = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.")
    return {key: value for key, value in weights.items() if not key.startswith(constants)}
