"""Packed bits as PyTorch sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops


class BitTensor:
    """A batch of images of +1/-1 values at one bit each.

    Attributes:
        data: uint8 (N, H, W, packed_bytes(C)): channel c of a pixel is bit c % 8 of byte c // 8,
            the bits beyond the last channel are zero.
        channels: C.
        shape: torch.Size((N, C, H, W)), as the tensor of values would have it.
        device: where the bits are.

    Made by `pack_bits` and by `binary_conv2d(..., out_dtype="bits")`. Carries no gradient.
    """

    def __init__(self, data: Tensor, channels: int) -> None:
        self.data = data
        self.channels = channels

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        batch, height, width, _ = self.data.shape
        return torch.Size((batch, self.channels, height, width))

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.data.device

    def to(self, device: torch.device | str | int) -> BitTensor:
        """The same bits on another device."""
        return BitTensor(self.data.to(device), self.channels)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as +1 and -1: (N, C, H, W) in channels_last memory format.

        dtype: float32, float16, bfloat16 or int8.
        """
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
            raise ValueError(
                f"dtype: got {dtype!r}, expected torch.float32, float16, bfloat16 or int8"
            )
        values: Tensor = ops.unpack_bits(self.data, self.channels, dtype)
        return values

    def __repr__(self) -> str:
        return f"BitTensor(shape={tuple(self.shape)}, device='{self.device}')"
