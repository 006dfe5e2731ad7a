"""The functions of binconv.torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import ops
from .autograd import sign_conv2d, wants_gradient
from .bit_tensor import BitTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
VALUES = (*FLOATS, torch.int8)

Padding = int | Sequence[int] | Literal["same", "valid"]


class PreparedWeight:
    """Weights in the layout of one device's kernels, made by `prepare_weight`.

    Attributes:
        data: uint8, one dimension, opaque. Not portable: keep float or packed weights in files.
        shape: (out_channels, in_channels / groups, kernel_height, kernel_width).
        groups: the groups that the weights were prepared for.
        device: where they are, and where alone they can be used.
    """

    def __init__(self, data: Tensor, shape: Sequence[int], groups: int) -> None:
        self.data = data
        self.shape = torch.Size(shape)
        self.groups = groups

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.data.device

    def __repr__(self) -> str:
        shape = tuple(self.shape)
        return f"PreparedWeight(shape={shape}, groups={self.groups}, device='{self.device}')"


def pack_bits(x: Tensor, threshold: float | Tensor | None = None) -> BitTensor:
    """The bits of x >= threshold.

    x: (N, C, H, W) float32, float16, bfloat16 or int8, of any strides; contiguous and channels_last
        tensors are read as they lie.
    threshold: a number, or a tensor (C,), one for each channel; 0 unless given. -0.0 gives +1, NaN
        gives -1.
    """
    check_tensor("x", x, VALUES, rank=4)
    value, per_channel = _threshold(threshold, x.shape[1], x.device)
    return BitTensor(torch.ops.binconv.pack_bits(x, value, per_channel), x.shape[1])


def pack_weight(w: Tensor) -> Tensor:
    """The signs of a weight (O, I, KH, KW) as uint8 (O, KH, KW, packed_bytes(I)), for files."""
    return pack_bits(check_tensor("w", w, VALUES, rank=4)).data


def prepare_weight(w: Tensor, groups: int = 1, in_channels: int | None = None) -> PreparedWeight:
    """Weights for `binary_conv2d`, laid out for the kernels of the device they are on.

    w: (O, I / groups, KH, KW) in a float type or int8, or what `pack_weight` made of it.
    in_channels: for packed weights, I / groups; needed where that is not a multiple of 128.
    """
    check_tensor("w", w, (*VALUES, torch.uint8), rank=4)
    _check_extent("groups", groups, 1)
    if w.dtype == torch.uint8:
        packed = w
        in_channels = 8 * w.shape[3] if in_channels is None else in_channels
        if w.shape[3] != 16 * ((in_channels + 127) // 128):
            raise ValueError(
                f"in_channels: got {in_channels}, expected what {w.shape[3]} bytes a pixel can hold"
            )
    else:
        packed = pack_weight(w)
        if in_channels not in (None, w.shape[1]):
            raise ValueError(f"in_channels: got {in_channels}, expected w.shape[1] = {w.shape[1]}")
        in_channels = w.shape[1]
    out_channels, kernel_height, kernel_width, _ = packed.shape
    data = torch.ops.binconv.prepare_weight(packed, in_channels, groups)
    return PreparedWeight(data, (out_channels, in_channels, kernel_height, kernel_width), groups)


def binary_conv2d(
    x: Tensor | BitTensor,
    weight: Tensor | PreparedWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pad_value: int = 0,
    scale: float | Tensor | None = None,
    residual: Tensor | None = None,
    threshold: float | Tensor | None = None,
    out_dtype: torch.dtype | Literal["bits"] | None = None,
) -> Tensor | BitTensor:
    """Convolution of signs: torch.nn.functional.conv2d(sign(x), sign(weight)), computed on bits.

    With acc that exact integer, the result is y = fma(acc, scale, bias) + residual, in float32,
    rounded once to out_dtype. sign(0) is +1, sign(NaN) is -1.

    Args:
        x: (N, C, H, W) float32, float16, bfloat16 or int8, or a BitTensor.
        weight: (O, C / groups, KH, KW) of the same types, or a prepared weight.
        bias: (O,).
        stride: a number, or (height, width).
        padding: a number, (height, width), or "same" or "valid" as in torch.nn.functional.conv2d.
        dilation: a number, or (height, width).
        groups: divides C and O, with C / groups a multiple of 8 unless it is 1. A prepared weight
            brings its own; leave this at 1 or give the same.
        pad_value: what pixels outside the image count as: 0, 1 or -1.
        scale: a number or (O,).
        residual: float tensor of the output's shape.
        threshold: for "bits": the output bit is y >= threshold, a number or (O,); 0 unless given.
        out_dtype: float32, float16, bfloat16; torch.int32 for acc itself; "bits" for a BitTensor.
            None is x's dtype, or float32 where that is no float type.

    Returns:
        (N, O, OH, OW), in channels_last memory format if x is a BitTensor or in that format itself.

    For float x and weight and float output, gradients pass the signs by the clipped
    straight-through estimator: d sign(v) / dv = 1 where |v| <= 1, else 0 (Hubara et al., 2016,
    Binarized Neural Networks); those of bias, scale and residual are exact. Bits and prepared
    weights carry none: an x or weight that requires a gradient is refused where it would be lost.
    """
    packed = x.data if isinstance(x, BitTensor) else None
    channels = check_tensor("x", x, VALUES, rank=4).shape[1] if packed is None else x.shape[1]
    groups = _check_weight(x, weight, channels, groups)
    out_channels, _, *kernel = weight.shape
    geometry = geometry_arguments(stride, padding, dilation, kernel, groups, pad_value)
    dtype = _out_dtype(x, out_dtype)
    scale = _per_channel("scale", scale, out_channels, x.device)
    bias = _per_channel("bias", bias, out_channels, x.device)
    sizes = ops.out_sizes(x.shape[0], x.shape[2:], weight.shape, *geometry[:3])
    if residual is not None:
        check_tensor("residual", residual, FLOATS, rank=4)
        check_device("residual", residual, x.device)
        if residual.shape != sizes:
            raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {sizes}")
    if threshold is not None and dtype is not None:
        raise ValueError(f"threshold: got one for out_dtype {dtype}, expected it for 'bits' only")

    if isinstance(x, Tensor) and isinstance(weight, Tensor) and dtype in FLOATS:
        if wants_gradient(x, weight, scale, bias, residual):
            return sign_conv2d(
                x, weight, geometry, dtype, scale=scale, bias=bias, residual=residual
            )
        y: Tensor = torch.ops.binconv.conv2d(
            x, weight, None, *geometry, scale, bias, residual, dtype
        )
        return y
    if isinstance(x, Tensor):
        _refuse_lost_gradient("x", x, dtype, "a prepared weight")
        packed = torch.ops.binconv.pack_bits(x, 0.0, None)
    if isinstance(weight, Tensor):
        _refuse_lost_gradient("weight", weight, dtype, "a BitTensor")
        weight = prepare_weight(weight, groups)
    limits = _threshold(threshold, out_channels, x.device)
    channels_last = dtype is None or isinstance(x, BitTensor) or ops.is_channels_last(x)
    epilogue = (scale, bias, residual, *limits, dtype)
    out: Tensor = torch.ops.binconv.packed_conv2d(
        packed, weight.data, weight.shape, *geometry, *epilogue, channels_last
    )
    return BitTensor(out, out_channels) if dtype is None else out


Geometry = tuple[list[int], list[int], list[int], int, int]


def _refuse_lost_gradient(name: str, value: Tensor, dtype: torch.dtype | None, other: str) -> None:
    if value.requires_grad and torch.is_grad_enabled() and dtype in FLOATS:
        raise ValueError(
            f"{name}: got a tensor that requires a gradient beside {other}, which gives none; "
            f"expected two float tensors, or {name}.detach(), or torch.no_grad()"
        )


def check_tensor(name: str, x: object, dtypes: Sequence[torch.dtype], rank: int) -> Tensor:
    """Returns x if it is a tensor of one of these dtypes and that many dimensions, else raises."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
    if x.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: got {got}, expected one of {expected}")
    if x.dim() != rank:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {rank} dimensions")
    return x


def _check_extent(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or not minimum <= value < 2**31:
        raise ValueError(f"{name}: got {value!r}, expected an int from {minimum} to 2^31 - 1")


def check_device(name: str, x: Tensor | PreparedWeight, device: torch.device) -> None:
    """Raises unless x is on the device, which is that of an argument called x."""
    if x.device != device:
        raise ValueError(f"{name}: got a tensor on {x.device}, expected {device} as for x")


def _check_weight(
    x: Tensor | BitTensor, weight: Tensor | PreparedWeight, channels: int, groups: int
) -> int:
    """Checks a weight against x and returns the number of groups."""
    if isinstance(weight, PreparedWeight):
        if groups not in (1, weight.groups):
            raise ValueError(f"groups: got {groups}, expected {weight.groups} as the weight's")
        groups = weight.groups
    else:
        check_tensor("weight", weight, VALUES, rank=4)
    check_device("weight", weight, x.device)
    expected = weight.shape[1] * groups
    if channels != expected:
        raise ValueError(
            f"x: got {channels} channels, expected {expected} for a weight of shape "
            f"{tuple(weight.shape)} with groups = {groups}"
        )
    return groups


def _out_dtype(
    x: Tensor | BitTensor, out_dtype: torch.dtype | Literal["bits"] | None
) -> torch.dtype | None:
    """The operators' out_dtype, where None means bits."""
    if out_dtype is None:
        return x.dtype if isinstance(x, Tensor) and x.dtype in FLOATS else torch.float32
    if out_dtype == "bits":
        return None
    if out_dtype not in (*FLOATS, torch.int32):
        raise ValueError(
            f"out_dtype: got {out_dtype}, expected float32, float16, bfloat16, int32 or 'bits'"
        )
    return out_dtype


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    pair = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name}: got {value!r}, expected an int or a pair of ints")
    return pair


def _pads(
    padding: Padding, strides: Sequence[int], dilations: Sequence[int], kernel: Sequence[int]
) -> list[int]:
    """(top, left, bottom, right)."""
    if not isinstance(padding, str):
        return _pair("padding", padding) * 2
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding != "same":
        raise ValueError(f"padding: got {padding!r}, expected 'same', 'valid' or numbers")
    if list(strides) != [1, 1]:
        raise ValueError(f"padding: got 'same' with stride {strides}, expected stride 1")
    total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return [t // 2 for t in total] + [t - t // 2 for t in total]


def geometry_arguments(
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    kernel: Sequence[int],
    groups: int,
    pad_value: int,
) -> Geometry:
    """The operators' arguments stride, padding, dilation, groups and pad_value."""
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    pads = _pads(padding, strides, dilations, kernel)
    for name, values, minimum in (
        ("stride", strides, 1),
        ("padding", pads, 0),
        ("dilation", dilations, 1),
        ("groups", [groups], 1),
    ):
        for value in values:
            _check_extent(name, value, minimum)
    if pad_value not in (-1, 0, 1):
        raise ValueError(f"pad_value: got {pad_value!r}, expected 0, 1 or -1")
    return strides, pads, dilations, groups, pad_value


def _per_channel(
    name: str, value: float | Tensor | None, channels: int, device: torch.device
) -> Tensor | None:
    """One float32 for each channel, in memory that the kernels can read."""
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return torch.full((channels,), float(value), device=device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number or a tensor")
    if value.shape != (channels,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({channels},)")
    check_device(name, value, device)
    return value.to(torch.float32).contiguous()


def _threshold(
    threshold: float | Tensor | None, channels: int, device: torch.device
) -> tuple[float, Tensor | None]:
    if threshold is None or isinstance(threshold, (int, float)):
        return float(threshold or 0), None
    return 0.0, _per_channel("threshold", threshold, channels, device)
