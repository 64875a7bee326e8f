"""HRDA (Hoyer et al., ECCV 2022): DAFormer at two scales, weighed by a learned attention.

An image is seen whole at half its size, for context, and in nine overlapping crops of the same
size at full resolution, for detail. All ten go through encoder and head as one batch, so that
every weight is met once: in calibration, and in the engine.

The encoders are torchvision's ResNet-101 with mmseg's deep stem (ResNetV1c, output stride 8) and
transformers' MiT-B5; modules outside them have the names of the public checkpoints.

The features of four levels are fused in one of two ways. Separable atrous convolutions
(``sepaspp``), as HRDA was published with MiT-B5, or one 1x1 convolution (``conv1x1``), as HDRQ's
authors trained their ResNet-101. The scale attention is always fused by a 1x1 convolution.

Source:
    github.com/lhoyer/HRDA: mmseg/models/segmentors/hrda_encoder_decoder.py (crops),
    decode_heads/hrda_head.py (fusion), decode_heads/daformer_head.py, configs/_base_/models.
    Widths of ``hrda_resnet101_conv1x1``: configs/_base_/models/segformer_r101.py of the authors
    of Shin et al., ICML 2025.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError

__all__ = ["FUSIONS", "Hrda", "hrda_mit_b5", "hrda_resnet101", "hrda_resnet101_conv1x1"]

FUSIONS = ("sepaspp", "conv1x1")
_CROPS = 9
_DILATIONS = (1, 6, 12, 18)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU, named as mmcv's ConvModule."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, 1, padding, dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        return functional.relu(self.bn(self.conv(x)))


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise, named as mmcv's DepthwiseSeparableConvModule."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvNorm(inputs, inputs, 3, dilation, inputs)
        self.pointwise_conv = ConvNorm(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        return cast(Tensor, self.pointwise_conv(self.depthwise_conv(x)))


class Pyramid(nn.Module):
    """Atrous spatial pyramid of separable convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.aspp_modules = nn.ModuleList(
            ConvNorm(inputs, outputs, 1) if d == 1 else SeparableConv(inputs, outputs, d)
            for d in _DILATIONS
        )
        self.bottleneck = ConvNorm(len(_DILATIONS) * outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        return cast(Tensor, self.bottleneck(torch.cat([m(x) for m in self.aspp_modules], 1)))


class _Pointwise(ConvNorm):
    """A 1x1 convolution with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)


class Embed(nn.Module):
    """A linear layer on every position, named as SegFormer's MLP."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        y = self.proj(x.flatten(2).transpose(1, 2))
        return cast(Tensor, y.transpose(1, 2).unflatten(2, x.shape[2:]))


class DAFormerHead(nn.Module):
    """Features of four levels, brought to one size, fused, classified.

    Args:
        inputs: Channels of the levels.
        width: Channels that every level is embedded in.
        channels: Channels of the fused features.
        classes: Number of classes.
        fusion: One of ``FUSIONS``.
    """

    def __init__(
        self, inputs: Sequence[int], width: int, channels: int, classes: int, fusion: str
    ) -> None:
        super().__init__()
        self.embed_layers = nn.ModuleDict(
            {str(i): Embed(count, width) for i, count in enumerate(inputs)}
        )
        fuse = Pyramid if fusion == "sepaspp" else _Pointwise
        self.fuse_layer = fuse(len(inputs) * width, channels)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, the largest first, to scores of its size (N, classes, h, w)."""
        size = features[0].shape[2:]
        parts = []
        for embed, feature in zip(self.embed_layers.values(), features, strict=True):
            part = embed(feature)
            if part.shape[2:] != size:
                part = functional.interpolate(part, size, mode="bilinear", align_corners=False)
            parts.append(part)
        return cast(Tensor, self.conv_seg(self.fuse_layer(torch.cat(parts, 1))))


class ResNetV1c(nn.Module):
    """ResNet-101 with three 3x3 convolutions in the stem and output stride 8."""

    channels = (256, 512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        models = _need("torchvision.models")
        body = models.resnet101(weights=None, replace_stride_with_dilation=[False, True, True])
        widths = ((3, 32, 2), (32, 32, 1), (32, 64, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in widths:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)
        self.maxpool = body.maxpool
        self.layer1, self.layer2 = body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) to features at 1/4, 1/8, 1/8 and 1/8."""
        x = self.maxpool(self.stem(x))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class Mit(nn.Module):
    """SegFormer's encoder, B5 by default, as transformers builds it."""

    def __init__(
        self,
        depths: Sequence[int] = (3, 6, 40, 3),
        widths: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
    ) -> None:
        super().__init__()
        library = _need("transformers")
        config = library.SegformerConfig(
            depths=list(depths),
            hidden_sizes=list(widths),
            num_attention_heads=list(heads),
            sr_ratios=[8, 4, 2, 1],
            drop_path_rate=0.1,
        )
        self.channels = tuple(widths)
        self.encoder = library.SegformerModel(config)
        for name, module in self.encoder.named_modules():
            if isinstance(module, nn.LayerNorm):
                # mmseg's own values: those of blocks and stages were given, the others left.
                inner = "patch_embeddings" in name or "attention" in name
                module.eps = 1e-5 if inner else 1e-6

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) to features at 1/4, 1/8, 1/16 and 1/32."""
        features = self.encoder(x, output_hidden_states=True, return_dict=True)
        return list(features.hidden_states)


class Hrda(nn.Module):
    """Encoder, DAFormer head and scale attention.

    Args:
        backbone: The encoder.
        classes: Number of classes.
        width: Channels that the head embeds every level in.
        channels: Channels of the head's fused features; ``width`` by default.
        fusion: How the head fuses, one of ``FUSIONS``.
        attention: Width and channels of the scale attention; ``width`` by default.

    Raises:
        ModelError: Another fusion.
    """

    def __init__(
        self,
        backbone: ResNetV1c | Mit,
        classes: int,
        width: int = 256,
        channels: int | None = None,
        fusion: str = "sepaspp",
        attention: int | None = None,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ModelError(f"found fusion {fusion!r}; choose one of {', '.join(FUSIONS)}")
        self.backbone, self.fusion = backbone, fusion
        inputs, inner = backbone.channels, attention or width
        self.decode_head = nn.ModuleDict(
            {
                "head": DAFormerHead(inputs, width, channels or width, classes, fusion),
                "scale_attention": DAFormerHead(inputs, inner, inner, classes, "conv1x1"),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised as ImageNet's, to scores (N, classes, H / 4, W / 4).

        Raises:
            ModelError: Sides that are no multiples of 64, or under 128.
        """
        whole = functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        if x.shape[2] % 64 or x.shape[3] % 64 or min(height, width) < 64:
            raise ModelError(
                f"found images of {x.shape[2]}x{x.shape[3]}; HRDA crops them by half and needs "
                "sides of 128 or more that are multiples of 64: pass `size`"
            )
        places = [(top, left) for top in _starts(height) for left in _starts(width)]
        crops = [x[:, :, t : t + height, u : u + width] for t, u in places]
        seen = torch.stack([whole, *crops], 1).flatten(0, 1)
        features = self.backbone(seen)
        scores = self.decode_head["head"](features).unflatten(0, (-1, 1 + _CROPS))
        context = [feature.unflatten(0, (-1, 1 + _CROPS))[:, 0] for feature in features]
        attention = torch.sigmoid(self.decode_head["scale_attention"](context))
        coarse = _twice((1 - attention) * scores[:, 0])
        fine = _assembled([scores[:, 1 + i] for i in range(_CROPS)], places, x.shape[2:])
        return _twice(attention) * fine + coarse

    def map_checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public checkpoint of HRDA by our names; others unchanged.

        Of a checkpoint of the adaptation itself (``model.``, ``ema_model.``, ``imnet_model.``) the
        model that was trained is taken.

        Raises:
            ModelError: A checkpoint of the other encoder or the other fusion; the factory that
                takes it is named.
        """
        trained = "model."
        if any(key.startswith(trained) for key in state):
            state = {k.removeprefix(trained): v for k, v in state.items() if k.startswith(trained)}
        kept = {k: v for k, v in state.items() if not k.startswith("auxiliary_head.")}
        self._check_form(kept)
        if isinstance(self.backbone, Mit):
            own = self.backbone.state_dict()
            return _mit_names(kept, any(key.startswith("encoder.stages.") for key in own))
        return kept

    def _check_form(self, state: Mapping[str, Tensor]) -> None:
        own = ("mit" if isinstance(self.backbone, Mit) else "resnet", self.fusion)
        found = _form_of(state)
        if found is not None and found != own:
            factory = _FACTORIES.get(found)
            way = f"use hdrq_deploy.models:{factory}" if factory else "no factory builds it"
            raise ModelError(
                f"found a checkpoint of HRDA with {_said(found)} for a network with {_said(own)}; "
                f"the model must have the checkpoint's form: {way}"
            )


_FACTORIES = {
    ("resnet", "sepaspp"): "hrda_resnet101",
    ("resnet", "conv1x1"): "hrda_resnet101_conv1x1",
    ("mit", "sepaspp"): "hrda_mit_b5",
}


def _form_of(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Encoder and fusion of a public checkpoint; None where its keys do not show both."""
    fuse = "decode_head.head.fuse_layer."
    marks = (
        {"mit": "backbone.patch_embed1.", "resnet": "backbone.layer1."},
        {"sepaspp": f"{fuse}aspp_modules.", "conv1x1": f"{fuse}conv."},
    )
    form = [n for row in marks for n, m in row.items() if any(k.startswith(m) for k in state)]
    return (form[0], form[1]) if len(form) == 2 and form[1] in FUSIONS else None


def _said(form: tuple[str, str]) -> str:
    encoder = {"mit": "MiT", "resnet": "ResNet"}[form[0]]
    fusion = "separable ASPP" if form[1] == "sepaspp" else "a 1x1 convolution"
    return f"{encoder} and fusion by {fusion}"


def _starts(side: int) -> tuple[int, int, int]:
    return 0, side // 2, side


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _assembled(
    parts: Sequence[Tensor], places: Sequence[tuple[int, int]], size: Sequence[int]
) -> Tensor:
    """Scores of overlapping crops in their places, averaged where they meet."""
    height, width = size[0] // 4, size[1] // 4

    def placed(part: Tensor, place: tuple[int, int]) -> Tensor:
        top, left = place[0] // 4, place[1] // 4
        right, bottom = width - left - part.shape[3], height - top - part.shape[2]
        return functional.pad(part, (left, right, top, bottom))

    pairs = list(zip(parts, places, strict=True))
    ones = torch.ones_like(parts[0][:1, :1])
    count = torch.stack([placed(ones, place) for _, place in pairs]).sum(0)
    total = placed(*pairs[0])
    for pair in pairs[1:]:
        total = total + placed(*pair)
    return total / count


def _mit_names(state: Mapping[str, Tensor], new: bool) -> dict[str, Tensor]:
    """mmseg's MiT by transformers' names; ``new`` are those of version 5."""
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in _MIT_NEW if new else _MIT_OLD:
            if match := re.fullmatch(rf"backbone\.{pattern}\.(weight|bias)", key):
                *numbers, kind = match.groups()
                places = [str(int(numbers[0]) - 1), *numbers[1:]]
                stem = "backbone.encoder." + name.format(*places)
                if "kv" in pattern:
                    for part, half in zip("kv", value.chunk(2), strict=True):
                        full = {"k": "key", "v": "value"}[part]
                        mapped[f"{stem.replace('*', part if new else full)}.{kind}"] = half.clone()
                else:
                    mapped[f"{stem}.{kind}"] = value
                break
        else:
            mapped[key] = value
    return mapped


_BLOCK = r"block(\d)\.(\d+)\."
_MMSEG = (
    r"patch_embed(\d)\.proj",
    r"patch_embed(\d)\.norm",
    r"norm(\d)",
    _BLOCK + "norm1",
    _BLOCK + r"attn\.q",
    _BLOCK + r"attn\.kv",
    _BLOCK + r"attn\.proj",
    _BLOCK + r"attn\.sr",
    _BLOCK + r"attn\.norm",
    _BLOCK + "norm2",
    _BLOCK + r"mlp\.fc1",
    _BLOCK + r"mlp\.dwconv\.dwconv",
    _BLOCK + r"mlp\.fc2",
)
_IN_NEW = "stages.{0}.blocks.{1}."
_MIT_NEW = tuple(
    zip(
        _MMSEG,
        (
            "stages.{0}.patch_embeddings.proj",
            "stages.{0}.patch_embeddings.layer_norm",
            "stages.{0}.layer_norm",
            _IN_NEW + "layernorm_before",
            _IN_NEW + "attention.q_proj",
            _IN_NEW + "attention.*_proj",
            _IN_NEW + "attention.o_proj",
            _IN_NEW + "attention.sequence_reduction.sequence_reduction",
            _IN_NEW + "attention.sequence_reduction.layer_norm",
            _IN_NEW + "layernorm_after",
            _IN_NEW + "mlp.fc1",
            _IN_NEW + "mlp.dwconv.dwconv",
            _IN_NEW + "mlp.fc2",
        ),
        strict=True,
    )
)
_IN_OLD = "encoder.block.{0}.{1}."
_MIT_OLD = tuple(
    zip(
        _MMSEG,
        (
            "encoder.patch_embeddings.{0}.proj",
            "encoder.patch_embeddings.{0}.layer_norm",
            "encoder.layer_norm.{0}",
            _IN_OLD + "layer_norm_1",
            _IN_OLD + "attention.self.query",
            _IN_OLD + "attention.self.*",
            _IN_OLD + "attention.output.dense",
            _IN_OLD + "attention.self.sr",
            _IN_OLD + "attention.self.layer_norm",
            _IN_OLD + "layer_norm_2",
            _IN_OLD + "mlp.dense1",
            _IN_OLD + "mlp.dwconv.dwconv",
            _IN_OLD + "mlp.dense2",
        ),
        strict=True,
    )
)


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"HRDA's encoders are {module.partition('.')[0]}'s: pip install 'hdrq-deploy[models]'"
        ) from error


def hrda_resnet101(classes: int = 19) -> Hrda:
    """HRDA with ResNet-101, fused by separable ASPP, Cityscapes' 19 classes."""
    return Hrda(ResNetV1c(), classes)


def hrda_resnet101_conv1x1(classes: int = 19) -> Hrda:
    """HRDA with ResNet-101 as HDRQ was published with it, Cityscapes' 19 classes.

    The head embeds in 786 channels and fuses by a 1x1 convolution to 128; the attention's width
    is 256.
    """
    return Hrda(ResNetV1c(), classes, 786, 128, "conv1x1", 256)


def hrda_mit_b5(classes: int = 19) -> Hrda:
    """HRDA with MiT-B5, Cityscapes' 19 classes."""
    return Hrda(Mit(), classes)
