"""Modules of binconv.torch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .bit_tensor import BitTensor
from .functional import (
    FLOATS,
    Padding,
    check_device,
    check_tensor,
    geometry_arguments,
    prepare_weight,
)


class BinaryConv2d(nn.Conv2d):
    """A convolution of signs with a float weight to train.

    y = conv2d(sign(x), sign(weight)) * scale + bias. Trains like nn.Conv2d, with gradients that
    pass the signs by the clipped straight-through estimator (see `binary_conv2d`). In eval mode it
    keeps its weight as prepared bits, made anew whenever the weight has changed: by an optimizer,
    load_state_dict, an in-place edit, another parameter, another device. Only an edit through
    `weight.data` is hidden from PyTorch; it counts from the next call of train() or eval() on.
    Both modes compute the same numbers.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for
            nn.Conv2d.
        padding_mode: as nn.Conv2d. Modes other than "zeros" pad x before its sign is taken.
        device, dtype: as nn.Conv2d; float32, float16 or bfloat16.
        pad_value: what pixels outside the image count as: 0, 1 or -1.
        weight_scale: "channel" for one scale per output channel, mean(|weight|) over its filter, as
            in XNOR-Net (Rastegari et al., 2016) and Bi-Real Net (Liu et al., 2018); "tensor" for
            one over all filters; None for 1. No gradient flows through the scale.

    Input: (N, C, H, W) float32, float16 or bfloat16, or a BitTensor, which takes no gradient.
    The output has x's dtype and memory format (float32 and channels_last for a BitTensor).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pad_value: int = 0,
        weight_scale: Literal["channel", "tensor"] | None = "channel",
    ) -> None:
        if weight_scale not in ("channel", "tensor", None):
            raise ValueError(
                f"weight_scale: got {weight_scale!r}, expected 'channel', 'tensor' or None"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,  # type: ignore[arg-type]
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if groups > 1 and (in_channels // groups) % 8:
            raise ValueError(
                f"groups: got {groups} groups of {in_channels // groups} input channels, expected "
                "a multiple of 8 channels each"
            )
        self.pad_value = pad_value
        self.weight_scale = weight_scale
        pads: Padding = padding if padding_mode == "zeros" else 0
        self._geometry = geometry_arguments(
            stride, pads, dilation, self.kernel_size, groups, pad_value
        )
        self._allocate()

    def forward(self, x: Tensor | BitTensor) -> Tensor:
        """The convolution; see the class."""
        self._check_weight()
        self._check_input(x)
        bias = None if self.bias is None else self.bias.float()
        prepared, scale = self._kept_weight() if self._keeps_weight() else (None, self._new_scale())
        if isinstance(x, BitTensor):
            return self._forward_bits(x, prepared, scale, bias)
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)
        out: Tensor = torch.ops.binconv.conv2d(
            x, self.weight, prepared, *self._geometry, scale, bias, None, x.dtype
        )
        return out

    def _forward_bits(
        self, x: BitTensor, prepared: Tensor | None, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if prepared is None:
            prepared = prepare_weight(self.weight.detach(), self.groups).data
        shape, geometry = self.weight.shape, self._geometry
        epilogue = (scale, bias, None, 0.0, None)
        out: Tensor = torch.ops.binconv.packed_conv2d(
            x.data, prepared, shape, *geometry, *epilogue, torch.float32, channels_last=True
        )
        return out

    def _check_weight(self) -> None:
        check_tensor("weight", self.weight, FLOATS, rank=4)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        if self.weight.shape != shape:
            raise ValueError(f"weight: got shape {tuple(self.weight.shape)}, expected {shape}")

    def _check_input(self, x: Tensor | BitTensor) -> None:
        bits = isinstance(x, BitTensor)
        if not bits:
            check_tensor("x", x, FLOATS, rank=4)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x: got {x.shape[1]} channels, expected {self.in_channels}")
        check_device("weight", self.weight, x.device)
        if bits and self.training:
            raise ValueError("x: got a BitTensor in training mode, expected a float tensor")
        if bits and self.padding_mode != "zeros":
            raise NotImplementedError(
                f"x: got a BitTensor, expected floats for padding_mode {self.padding_mode!r}"
            )

    def _new_scale(self) -> Tensor | None:
        if self.weight_scale is None:
            return None
        rows = self.out_channels if self.weight_scale == "channel" else 1
        scale: Tensor = torch.ops.binconv.abs_mean(self.weight.detach(), rows)
        return scale.expand(self.out_channels).contiguous()

    def _keeps_weight(self) -> bool:
        # A parametrized weight is a new tensor at every access: there is nothing to keep.
        return not self.training and self._prepared is not None and "weight" in self._parameters

    def _kept_weight(self) -> tuple[Tensor, Tensor | None]:
        if self._kept_shape != self.weight.shape:
            self._allocate()
        assert self._prepared is not None
        with torch.no_grad():
            torch.ops.binconv.refresh_weight(
                self.weight,
                self.groups,
                self.weight_scale == "channel",
                self._prepared,
                self._scale,
                self._stamp,
            )
        return self._prepared, self._scale if self.weight_scale else None

    def _allocate(self) -> None:
        # Not buffers: neither a state_dict nor a broadcast of buffers should see them.
        weight = self.weight
        self._prepared: Tensor | None = None
        self._kept_shape = weight.shape
        if weight.is_meta:
            return
        with torch.inference_mode(False):
            self._prepared = ops.new_prepared(weight.shape, self.groups, weight)
            scales = self.out_channels if self.weight_scale else 0
            self._scale = torch.empty(scales, device=weight.device)
            self._stamp = torch.empty(0, device="cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> BinaryConv2d:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._allocate()
        return self

    def train(self, mode: bool = True) -> BinaryConv2d:
        """As nn.Module.train; the prepared bits are made anew."""
        super().train(mode)
        self._allocate()
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_prepared", "_kept_shape", "_scale", "_stamp")  # Of use in this process alone.
        return {key: value for key, value in self.__dict__.items() if key not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._allocate()

    def extra_repr(self) -> str:
        """The arguments, as in nn.Conv2d."""
        text = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{text}, pad_value={self.pad_value}, weight_scale={self.weight_scale!r}"
