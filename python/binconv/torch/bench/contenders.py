"""What is measured on a layer: calls that each work on another set of random buffers.

The weights are the same in every set, as a layer's are from batch to batch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

import binconv
import binconv.torch as bt

from .suite import Layer
from .timing import Call, buffer_sets


class PackedConv2d:
    """The neutral binary_conv2d from packed input to fp16, bits or int32.

    fp16 output takes a scale for each channel, bits a threshold for each, as networks need them.
    """

    def __init__(
        self,
        layer: Layer,
        device: torch.device,
        out: Literal["fp16", "bits", "int32"],
        *,
        layout: Literal["nhwc", "nchw"] = "nhwc",
        kernel: str | None = None,
        pad_value: int = 0,
    ) -> None:
        self.layer, self.layout, self.kernel = layer, layout, kernel
        self.shape = layer.shape(pad_value)
        self.place = _place(device)
        out_bits = {"fp16": 16, "bits": 1, "int32": 32}[out]
        self.sets = buffer_sets(layer.bytes_moved(1, out_bits), device)
        size = layer.in_size
        self.input = random_bits((self.sets, layer.batch, size, size), layer.c_in, device)
        self.weight = random_bits((layer.c_out, layer.kernel, layer.kernel), layer.c_in, device)
        self.prepared = self._prepared_weight()
        self.out = self._new_out(out)
        self.workspace = self._new_bytes(
            binconv.workspace_bytes(self.shape, **self.place, kernel=kernel)
        )
        channels = torch.rand(layer.c_out, device=device) + 0.5
        self.scale = channels if out == "fp16" else None
        self.threshold = channels if out == "bits" else None

    def __call__(self, i: int) -> None:
        """Convolves on buffer set i."""
        binconv.binary_conv2d(
            self.shape,
            self.input[i],
            self.prepared,
            self.out[i],
            layout=self.layout,
            scale=self.scale,
            threshold=self.threshold,
            workspace=self.workspace,
            stream=_stream(self.input),
            kernel=self.kernel,
        )

    def _prepared_weight(self) -> Tensor:
        shape = self.shape.weight
        size = binconv.prepared_weight_bytes(shape, **self.place, kernel=self.kernel)
        prepared = self._new_bytes(size)
        stream = _stream(self.weight)
        binconv.prepare_weight(shape, self.weight, prepared, stream=stream, kernel=self.kernel)
        return prepared

    def _new_out(self, out: str) -> Tensor:
        layer, device = self.layer, self.input.device
        pixels = (self.sets, layer.batch, layer.out_size, layer.out_size)
        if out == "bits":
            return torch.empty(
                *pixels, binconv.packed_bytes(layer.c_out), dtype=torch.uint8, device=device
            )
        dtype = torch.float16 if out == "fp16" else torch.int32
        if self.layout == "nhwc":
            return torch.empty(*pixels, layer.c_out, dtype=dtype, device=device)
        return torch.empty(*pixels[:2], layer.c_out, *pixels[2:], dtype=dtype, device=device)

    def _new_bytes(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.input.device)


def whole_layer(layer: Layer, device: torch.device) -> tuple[Call, int]:
    """binconv.torch from float16 channels_last to the same, packing on the way; and its sets."""
    inputs, weight = _float16_operands(layer, device)
    prepared = bt.prepare_weight(weight)
    scale = torch.rand(layer.c_out, device=device)

    def call(i: int) -> object:
        return bt.binary_conv2d(
            inputs[i], prepared, stride=layer.stride, padding=layer.pad, scale=scale
        )

    return call, len(inputs)


def torch_fp16(layer: Layer, device: torch.device) -> tuple[Call, int]:
    """The float16 channels_last conv2d of torch, on a GPU cuDNN's, without bias; and its sets."""
    inputs, weight = _float16_operands(layer, device)

    def call(i: int) -> object:
        return torch.nn.functional.conv2d(inputs[i], weight, None, layer.stride, layer.pad)

    return call, len(inputs)


def random_bits(pixels: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """Packed random bits of a multiple of 8 channels: uint8 (*pixels, packed_bytes(channels))."""
    shape = (*pixels, binconv.packed_bytes(channels))
    bits = torch.randint(256, shape, dtype=torch.uint8, device=device)
    bits[..., channels // 8 :] = 0
    return bits


def _float16_operands(layer: Layer, device: torch.device) -> tuple[list[Tensor], Tensor]:
    sets = buffer_sets(layer.bytes_moved(16, 16), device)
    size = layer.in_size
    weight = _channels_last((layer.c_out, layer.c_in, layer.kernel, layer.kernel), device)
    return [
        _channels_last((layer.batch, layer.c_in, size, size), device) for _ in range(sets)
    ], weight


def _channels_last(sizes: tuple[int, int, int, int], device: torch.device) -> Tensor:
    empty = torch.empty(
        sizes, dtype=torch.float16, device=device, memory_format=torch.channels_last
    )
    return empty.normal_()


def kernel_name(layer: Layer, device: torch.device, kernel: str | None) -> str:
    """The kernel that runs; NotImplementedError where a forced one does not take the layer."""
    return binconv.kernel_name(layer.shape(), **_place(device), kernel=kernel)


def _place(device: torch.device) -> dict[str, Any]:
    return {"device": device.index if device.type == "cuda" else None}


def _stream(x: Tensor) -> int | None:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


class PackBits:
    """The neutral pack_bits of values of a dtype that lie as a layout says, (N, C, H, W)."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int],
        dtype: torch.dtype,
        layout: Literal["nhwc", "nchw"],
        device: torch.device,
    ) -> None:
        batch, channels, height, width = sizes
        packed = (batch, height, width, binconv.packed_bytes(channels))
        lies = sizes if layout == "nchw" else (batch, height, width, channels)
        self.layout = layout
        self.bytes_moved = dtype.itemsize * math.prod(sizes) + math.prod(packed)
        self.sets = buffer_sets(self.bytes_moved, device)
        self.x = torch.empty(self.sets, *lies, dtype=dtype, device=device).normal_()
        self.out = torch.empty(self.sets, *packed, dtype=torch.uint8, device=device)

    def __call__(self, i: int) -> None:
        """Packs buffer set i."""
        binconv.pack_bits(self.x[i], self.out[i], layout=self.layout, stream=_stream(self.x))


class DeviceCopy:
    """Copy from one tensor to another, of so many bytes each, on the same device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes_moved = 2 * size
        self.sets = buffer_sets(self.bytes_moved, device)
        self.x = torch.ones(self.sets, size, dtype=torch.uint8, device=device)
        self.out = torch.empty_like(self.x)

    def __call__(self, i: int) -> None:
        """Copies buffer set i."""
        self.out[i].copy_(self.x[i])
