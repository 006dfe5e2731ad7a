"""Binary residual networks: Bi-Real Net and relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .modules import BinaryConv2d


class BiRealBlock(nn.Module):
    """activation(norm(layer(x)) + shortcut(x)): one 3x3 binary convolution with its own shortcut.

    The shortcut is x itself, or its 2x2 means, for stride 2, followed by a float 1x1 convolution
    and a normalization where the number of channels changes.

    Args:
        in_channels, out_channels: of the block.
        stride: 1 or 2.
        layer: makes the convolution, see BiRealNet.
        activation: makes what follows the sum, see BiRealNet.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        layer: Callable[..., nn.Module],
        activation: Callable[[int], nn.Module] | None,
    ) -> None:
        super().__init__()
        self.conv = layer(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        shortcut: list[nn.Module] = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []
        if in_channels != out_channels:
            shortcut += [
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            ]
        self.shortcut = nn.Sequential(*shortcut)
        self.activation = nn.Identity() if activation is None else activation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', ceil(H / stride), ceil(W / stride))."""
        out: Tensor = self.activation(self.norm(self.conv(x)) + self.shortcut(x))
        return out


class BiRealNet(nn.Module):
    """A residual network of binary convolutions with a shortcut around every one.

    Liu et al., 2018, Bi-Real Net, arXiv:1808.00278. With BinaryConv2d(ste="approx_sign",
    input_shift=True) for layer and RPReLU for activation it is a network in the manner of ReActNet
    (Liu et al., 2020, arXiv:2003.03488).

    Args:
        num_classes: how many logits.
        widths: channels of each stage; every stage but the first starts with stride 2.
        depth: binary convolutions in each stage.
        in_channels: of the images.
        stem: "large" for a 7x7 convolution with stride 2 and a 3x3 maximum with stride 2 before the
            stages, for images of 224x224; "small" for a 3x3 convolution with stride 1.
        layer: what makes the binary convolutions, called as
            layer(in_channels, out_channels, 3, stride=..., padding=1, bias=False).
        activation: what makes the activation after every shortcut, called with the number of
            channels; None for none, as in Bi-Real Net.

    Input: (N, in_channels, H, W). Output: (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        depth: int,
        in_channels: int = 3,
        stem: str = "large",
        layer: Callable[..., nn.Module] = BinaryConv2d,
        activation: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("large", "small"):
            raise ValueError(f"stem: got {stem!r}, expected 'large' or 'small'")
        first = widths[0]
        if stem == "large":
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, first, 7, 2, 3, bias=False),
                nn.BatchNorm2d(first),
                nn.MaxPool2d(3, 2, 1),
            )
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
            )
        blocks = []
        for stage, (before, width) in enumerate(zip((first, *widths), widths, strict=False)):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(BiRealBlock(width if i else before, width, stride, layer, activation))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x = self.blocks(self.stem(images))
        logits: Tensor = self.classifier(torch.mean(x, (2, 3)))
        return logits


def bireal18(
    num_classes: int = 1000,
    layer: Callable[..., nn.Module] = BinaryConv2d,
    activation: Callable[[int], nn.Module] | None = None,
) -> BiRealNet:
    """Bi-Real-18 for images of 224x224: 16 binary convolutions of 64 to 512 channels."""
    return BiRealNet(num_classes, (64, 128, 256, 512), 4, layer=layer, activation=activation)
