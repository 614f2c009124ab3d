"""The two networks: one of convolutions, one of attention.

Between them they hold what a quantizer must get right: standard, depthwise and pointwise
convolutions, SiLU, ReLU and ReLU6 (a Clip), residual Adds with branches of unlike ranges, global
pooling; projections with biases, LayerNormalization, GELU, and attention's two MatMuls of
activations around a Softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def conv(
    inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A padded convolution and its BatchNorm."""
    layer = nn.Conv2d(
        inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False
    )
    return layer, nn.BatchNorm2d(outputs)


class Separable(nn.Sequential):
    """Depthwise 3x3, SiLU, pointwise, SiLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            *conv(inputs, inputs, 3, stride=stride, groups=inputs),
            nn.SiLU(),
            *conv(inputs, outputs, 1),
            nn.SiLU(),
        )


class Residual(nn.Module):
    """x + branch(x), and an activation after it if one is given."""

    def __init__(self, branch: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.branch(x)
        return y if self.after is None else self.after(y)


def basic(width: int) -> Residual:
    """ResNet's block: two 3x3 convolutions, ReLU between and after the Add."""
    branch = nn.Sequential(*conv(width, width, 3), nn.ReLU(), *conv(width, width, 3))
    return Residual(branch, nn.ReLU())


def inverted(width: int, inner: int) -> Residual:
    """MobileNetV2's block: widen, depthwise, project without activation; ReLU6 inside."""
    return Residual(
        nn.Sequential(
            *conv(width, inner, 1),
            nn.ReLU6(),
            *conv(inner, inner, 3, groups=inner),
            nn.ReLU6(),
            *conv(inner, width, 1),
        )
    )


class DigitsCNN(nn.Sequential):
    """(N, 1, 64, 64) -> (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__(
            *conv(1, 64, 3),
            nn.SiLU(),  # (N, 64, 64, 64)
            basic(64),
            basic(64),  # most of the work: 604 of the 666 million multiply-adds are here
            Separable(64, 96, stride=2),  # (N, 96, 32, 32)
            inverted(96, 192),
            Residual(Separable(96, 96)),
            Separable(96, 96, stride=2),  # (N, 96, 16, 16)
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, 10),
        )


class Attention(nn.Module):
    """Multi-head self-attention over (N, tokens, width)."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.split = (-1, tokens, heads, width // heads)
        self.joined = (-1, tokens, width)
        self.scale = 1 / math.sqrt(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).reshape(self.split).permute(0, 2, 1, 3)
        key = self.key(x).reshape(self.split).permute(0, 2, 3, 1)
        value = self.value(x).reshape(self.split).permute(0, 2, 1, 3)
        weights = torch.softmax(query @ key * self.scale, dim=-1)  # (N, heads, tokens, tokens)
        joined = (weights @ value).permute(0, 2, 1, 3).reshape(self.joined)
        y: Tensor = self.out(joined)
        return y


class Layer(nn.Sequential):
    """A pre-norm encoder layer."""

    def __init__(self, tokens: int, width: int, heads: int, inner: int) -> None:
        mlp = (nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        super().__init__(
            Residual(nn.Sequential(nn.LayerNorm(width), Attention(tokens, width, heads))),
            Residual(nn.Sequential(nn.LayerNorm(width), *mlp)),
        )


class DigitsTransformer(nn.Module):
    """(N, 64, 16) -> (N, 10) logits: 64 patches, two layers of width 128, mean pooling."""

    def __init__(self, tokens: int = 64, features: int = 16, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.Sequential(*(Layer(tokens, width, 4, 2 * width) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.layers(self.embed(patches) + self.position)
        y: Tensor = self.head(self.norm(x).mean(dim=1))
        return y
