"""The functions of binconv.torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import packed_conv2d, sign_conv2d, wants_gradient
from .bit_tensor import BitTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
VALUES = (*FLOATS, torch.int8)
OUTPUTS = (*FLOATS, torch.int32)

Padding = int | Sequence[int] | Literal["same", "valid"]
# Slopes, or (in_shift, slope, out_shift); each one number for all channels, or one for each.
Factor = float | Tensor
PReLU = Factor | tuple[Factor | None, Factor | None, Factor | None]


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
    return BitTensor(ops.pack_bits(x, value, per_channel), x.shape[1])


def pack_weight(w: Tensor) -> Tensor:
    """The signs of a weight (O, I, KH, KW) as uint8 (O, KH, KW, packed_bytes(I)), for files."""
    return pack_bits(check_tensor("w", w, VALUES, rank=4)).data


def prepare_weight(w: Tensor, groups: int = 1, in_channels: int | None = None) -> PreparedWeight:
    """Weights for `binary_conv2d`, laid out for the kernels of the device they are on.

    w: (O, I / groups, KH, KW) in a float type or int8, or what `pack_weight` made of it.
    in_channels: for packed weights, I / groups; needed where that is not a multiple of 128.
    """
    check_tensor("w", w, (*VALUES, torch.uint8), rank=4)
    _check_extents("groups", [groups], 1)
    if w.dtype == torch.uint8:
        packed = w
        in_channels = 8 * w.shape[3] if in_channels is None else in_channels
        if w.shape[3] != ops.packed_bytes(in_channels):
            raise ValueError(
                f"in_channels: got {in_channels}, expected what {w.shape[3]} bytes a pixel can hold"
            )
    else:
        packed = pack_weight(w)
        if in_channels not in (None, w.shape[1]):
            raise ValueError(f"in_channels: got {in_channels}, expected w.shape[1] = {w.shape[1]}")
        in_channels = w.shape[1]
    out_channels, kernel_height, kernel_width, _ = packed.shape
    data = ops.prepare_weight(packed, in_channels, groups)
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
    clamp: bool = False,
    prelu: PReLU | None = None,
    threshold_below: Tensor | None = None,
    with_bits: bool = False,
) -> Tensor | BitTensor | tuple[Tensor, BitTensor]:
    """Convolution of signs: torch.nn.functional.conv2d(sign(x), sign(weight)), computed on bits.

    With acc that exact integer, the result is y = prelu(fma(acc, scale, bias) + residual), in
    float32, rounded once to out_dtype. sign(0) is +1, sign(NaN) is -1.

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
        threshold: for bits: the output bit is y >= threshold, a number or (O,); 0 unless given.
        out_dtype: float32, float16, bfloat16; torch.int32 for acc itself; "bits" for a BitTensor.
            None is x's dtype, or float32 where that is no float type.
        clamp: takes max(acc, 0) for acc, also for int32.
        prelu: slopes, a number or (O,), or a tuple (in_shift, slope, out_shift) of such or None:
            y becomes PReLU(y + in_shift) + out_shift, the RPReLU of ReActNet (Liu et al., 2020).
            In a tuple a slope of None is 0, that is ReLU, and a shift of None is left out.
        threshold_below: for bits: bool or uint8 (O,); where true the bit is y <= threshold.
        with_bits: also returns the bits of y, taken before it is rounded to a float out_dtype.

    Returns:
        (N, O, OH, OW), in channels_last memory format if x is a BitTensor or in that format itself;
        with_bits a tuple of that and a BitTensor.

    For float x and weight and float output, gradients pass the signs by the clipped
    straight-through estimator: d sign(v) / dv = 1 where |v| <= 1, else 0 (Hubara et al., 2016,
    Binarized Neural Networks); those of bias, scale, residual and prelu are exact, and where clamp
    and prelu bend, at 0, those of the positive side. Bits and prepared weights carry none: an x or
    weight that requires a gradient is refused where it would be lost.
    """
    if not isinstance(x, BitTensor):
        check_tensor("x", x, VALUES, rank=4)
    device, in_shape = x.device, x.shape
    groups = _check_weight(weight, groups, in_shape[1], device)
    weight_shape = weight.shape
    out_channels = weight_shape[0]
    sizes = _sizes(
        _pair("stride", stride),
        padding if isinstance(padding, str) else _pair("padding", padding),
        _pair("dilation", dilation),
        groups,
        pad_value,
        in_shape,
        weight_shape,
    )
    dtype = _out_dtype(x, out_dtype)
    channels_last = dtype is None or isinstance(x, BitTensor) or ops.is_channels_last(x)
    scale = _per_channel("scale", scale, out_channels, device)
    bias = _per_channel("bias", bias, out_channels, device)
    residual = _checked_residual(residual, sizes.out, device)
    makes_bits = with_bits or threshold is not None or threshold_below is not None
    if dtype in FLOATS and not (clamp or makes_bits or prelu is not None):
        return _convolve(x, weight, sizes, channels_last, scale, bias, residual, dtype)
    epilogue = Epilogue(
        scale=scale,
        bias=bias,
        residual=residual,
        clamp=clamp,
        activation=_activation(prelu, out_channels, device),
        limits=_threshold(threshold, out_channels, device),
        below=_flags("threshold_below", threshold_below, out_channels, device),
        dtype=dtype,
        with_bits=with_bits,
        channels_last=channels_last,
    )
    _check_outputs(epilogue, has_threshold=threshold is not None)
    if dtype in FLOATS and _need_gradient(x, weight, epilogue):
        return _in_steps(x, weight, sizes, epilogue)
    return _fused(x, weight, sizes, epilogue)


Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int, int]
Activation = tuple[Tensor | None, Tensor | None, Tensor | None]


class Sizes(NamedTuple):
    """What depends on sizes alone: the operators' arguments for floats and bits, (N, O, OH, OW)."""

    geometry: Geometry
    packed_geometry: Sequence[int]
    out: tuple[int, int, int, int]


@ops.memoized
def _sizes(
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
    pad_value: int,
    in_shape: Sequence[int],
    weight_shape: Sequence[int],
) -> Sizes:
    batch, _, *in_sizes = in_shape
    geometry = geometry_arguments(stride, padding, dilation, weight_shape[2:], groups, pad_value)
    return Sizes(
        geometry,
        ops.packed_geometry(weight_shape, *geometry),
        ops.out_sizes(batch, in_sizes, weight_shape, *geometry[:3]),
    )


class Epilogue(NamedTuple):
    """What a convolution ends with, checked and in the form that the operators take."""

    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    clamp: bool
    activation: Activation | None
    limits: tuple[float, Tensor | None]
    below: Tensor | None
    dtype: torch.dtype | None
    with_bits: bool
    channels_last: bool


def _fused(
    x: Tensor | BitTensor, weight: Tensor | PreparedWeight, sizes: Sizes, epilogue: Epilogue
) -> Tensor | BitTensor | tuple[Tensor, BitTensor]:
    scale, bias, residual, clamp, activation, limits, below, dtype, with_bits, last = epilogue
    activates = (False, None, None, None) if activation is None else (True, *activation)
    epilogue_arguments = (last, scale, bias, residual, clamp, *activates, *limits, below)
    if with_bits:
        x, weight = _packed(x, dtype), _prepared(weight, dtype, sizes)
        operands = x.data, weight.data, sizes.packed_geometry, dtype
        out, bits = ops.packed_conv2d_with_bits(*operands, *epilogue_arguments)
        return out, BitTensor(bits, weight.shape[0])
    out = _without_autograd(x, weight, sizes, dtype, *epilogue_arguments)
    return BitTensor(out, weight.shape[0]) if dtype is None else out


def _without_autograd(
    x: Tensor | BitTensor,
    weight: Tensor | PreparedWeight,
    sizes: Sizes,
    dtype: torch.dtype | None,
    channels_last: bool,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *steps: Any,
) -> Tensor:
    """A convolution that has no gradient of x and weight."""
    arguments = sizes.packed_geometry, dtype, channels_last, scale, bias, residual, *steps
    if isinstance(x, BitTensor) or wants_gradient(scale, bias, residual):
        x, weight = _packed(x, dtype), _prepared(weight, dtype, sizes)
        return packed_conv2d(x.data, weight.data, *arguments)
    _refuse_lost_gradient("x", x, dtype, "a prepared weight")
    weight = _prepared(weight, dtype, sizes)
    y: Tensor = ops.values_conv2d(x, None, weight.data, *arguments)
    return y


def _packed(x: Tensor | BitTensor, dtype: torch.dtype | None) -> BitTensor:
    if isinstance(x, BitTensor):
        return x
    _refuse_lost_gradient("x", x, dtype, "a prepared weight")
    return BitTensor(ops.pack_bits(x, 0.0, None), x.shape[1])


def _prepared(
    weight: Tensor | PreparedWeight, dtype: torch.dtype | None, sizes: Sizes
) -> PreparedWeight:
    if isinstance(weight, PreparedWeight):
        return weight
    _refuse_lost_gradient("weight", weight, dtype, "a BitTensor")
    return prepare_weight(weight, sizes.geometry[3])


def _need_gradient(x: object, weight: object, epilogue: Epilogue) -> bool:
    operands = (t if isinstance(t, Tensor) else None for t in (x, weight))
    factors = (epilogue.scale, epilogue.bias, epilogue.residual, *(epilogue.activation or ()))
    return wants_gradient(*operands, *factors)


def _convolve(
    x: Tensor | BitTensor,
    weight: Tensor | PreparedWeight,
    sizes: Sizes,
    channels_last: bool,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A convolution whose operator knows the gradients of everything that it is given."""
    factors = scale, bias, residual
    if isinstance(x, BitTensor) or isinstance(weight, PreparedWeight):
        return _without_autograd(x, weight, sizes, dtype, channels_last, *factors)
    if wants_gradient(x, weight, *factors):
        return sign_conv2d(
            x, weight, sizes.geometry, dtype, scale=scale, bias=bias, residual=residual
        )
    geometry = ops.flat_geometry(*sizes.geometry)
    y: Tensor
    y, *_ = ops.sign_conv2d_no_grad(x, weight, None, *factors, None, dtype, False, None, *geometry)
    return y


def _in_steps(
    x: Tensor | BitTensor, weight: Tensor | PreparedWeight, sizes: Sizes, epilogue: Epilogue
) -> Tensor | tuple[Tensor, BitTensor]:
    """What the fused epilogue computes, to the last bit, in operations that have gradients."""
    if isinstance(x, BitTensor) or isinstance(weight, PreparedWeight):
        x, weight = _packed(x, torch.float32), _prepared(weight, torch.float32, sizes)
    convolve = functools.partial(_convolve, x, weight, sizes, epilogue.channels_last)
    scale, bias, residual = epilogue.scale, epilogue.bias, epilogue.residual
    y = convolve(scale, bias, residual, torch.float32)
    if epilogue.clamp:
        with torch.no_grad():
            acc = convolve(None, None, None, torch.float32)
        # Where acc is 0, the fma has one term, which needs no fused operation.
        y = torch.where(acc >= 0, y, _add(_of_zero(scale, bias, y), residual))
    if epilogue.activation is not None:
        y = _activate(y, epilogue.activation)
    assert epilogue.dtype is not None
    out = _in_format(y.to(epilogue.dtype), epilogue.channels_last)
    if not epilogue.with_bits:
        return out
    return out, _bits_of(y.detach(), epilogue.limits, epilogue.below)


def _activate(y: Tensor, activation: Activation) -> Tensor:
    in_shift, slope, out_shift = (None if v is None else _column(v) for v in activation)
    y = _add(y, in_shift)
    zero = torch.zeros((), device=y.device)
    return _add(torch.where(y < 0, zero if slope is None else slope * y, y), out_shift)


def _column(per_channel: Tensor) -> Tensor:
    return per_channel.view(1, -1, 1, 1)


def _add(x: Tensor, other: Tensor | None) -> Tensor:
    return x if other is None else x + other


def _of_zero(scale: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    """fma(0, scale, bias) for each channel."""
    zero = torch.zeros((1, 1, 1, 1), device=like.device)
    product = zero if scale is None else _column(scale) * zero
    return product + (zero if bias is None else _column(bias))


def _in_format(x: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=memory_format)


def _bits_of(y: Tensor, limits: tuple[float, Tensor | None], below: Tensor | None) -> BitTensor:
    value, per_channel = limits
    if below is not None:  # y <= t is -y >= -t.
        flip = below != 0
        if per_channel is None:
            per_channel = torch.full_like(flip, value, dtype=torch.float32)
        per_channel = torch.where(flip, -per_channel, per_channel)
        y = torch.where(_column(flip), -y, y)
    return BitTensor(ops.pack_bits(y, value, per_channel), y.shape[1])


def _checked_residual(
    residual: Tensor | None, sizes: Sequence[int], device: torch.device
) -> Tensor | None:
    if residual is not None:
        check_tensor("residual", residual, FLOATS, rank=4)
        check_device("residual", residual, device)
        if residual.shape != sizes:
            raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {sizes}")
    return residual


def _check_outputs(epilogue: Epilogue, has_threshold: bool) -> None:
    dtype = epilogue.dtype
    if dtype == torch.int32 and epilogue.activation is not None:
        raise ValueError("prelu: got one for out_dtype torch.int32, expected none")
    if epilogue.with_bits and dtype not in FLOATS:
        raise ValueError(
            f"with_bits: got True for out_dtype {dtype or 'bits'}, expected it for a float type"
        )
    if dtype is None or epilogue.with_bits:
        return
    has_below = epilogue.below is not None
    for name, given in (("threshold", has_threshold), ("threshold_below", has_below)):
        if given:
            raise ValueError(
                f"{name}: got one for out_dtype {dtype}, expected it for 'bits' or with_bits only"
            )


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


def _check_extents(name: str, values: Sequence[int], minimum: int) -> None:
    for value in values:
        if not isinstance(value, int) or not minimum <= value < 2**31:
            raise ValueError(f"{name}: got {value!r}, expected an int from {minimum} to 2^31 - 1")


def check_device(name: str, x: Tensor | PreparedWeight, device: torch.device) -> None:
    """Raises unless x is on the device, which is that of an argument called x."""
    if x.device != device:
        raise ValueError(f"{name}: got a tensor on {x.device}, expected {device} as for x")


def _check_weight(
    weight: Tensor | PreparedWeight, groups: int, channels: int, device: torch.device
) -> int:
    """Checks a weight for x of these channels on this device; returns the number of groups."""
    if isinstance(weight, PreparedWeight):
        if groups not in (1, weight.groups):
            raise ValueError(f"groups: got {groups}, expected {weight.groups} as the weight's")
        groups = weight.groups
    else:
        check_tensor("weight", weight, VALUES, rank=4)
    check_device("weight", weight, device)
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
    if out_dtype not in OUTPUTS:
        raise ValueError(
            f"out_dtype: got {out_dtype}, expected float32, float16, bfloat16, int32 or 'bits'"
        )
    return out_dtype


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, int):
        return value, value
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name}: got {value!r}, expected an int or a pair of ints")
    return pair


def _pads(
    padding: Padding, strides: Sequence[int], dilations: Sequence[int], kernel: Sequence[int]
) -> tuple[int, ...]:
    """(top, left, bottom, right)."""
    if not isinstance(padding, str):
        return _pair("padding", padding) * 2
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise ValueError(f"padding: got {padding!r}, expected 'same', 'valid' or numbers")
    if strides != (1, 1):
        raise ValueError(f"padding: got 'same' with stride {list(strides)}, expected stride 1")
    total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return *(t // 2 for t in total), *(t - t // 2 for t in total)


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
        _check_extents(name, values, minimum)
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
    return value.float().contiguous()


def _activation(prelu: PReLU | None, channels: int, device: torch.device) -> Activation | None:
    if prelu is None:
        return None
    if not isinstance(prelu, tuple):
        return None, _per_channel("prelu", prelu, channels, device), None
    if len(prelu) != 3:
        raise ValueError(
            f"prelu: got a tuple of {len(prelu)}, expected (in_shift, slope, out_shift)"
        )
    in_shift, slope, out_shift = (
        _per_channel(f"prelu {name}", value, channels, device)
        for name, value in zip(("in_shift", "slope", "out_shift"), prelu, strict=True)
    )
    return in_shift, slope, out_shift


def _flags(name: str, value: Tensor | None, channels: int, device: torch.device) -> Tensor | None:
    """One uint8 for each channel, not 0 for true."""
    if value is None:
        return None
    check_tensor(name, value, (torch.bool, torch.uint8), rank=1)
    if value.shape != (channels,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({channels},)")
    check_device(name, value, device)
    return value.to(torch.uint8).contiguous()


def _threshold(
    threshold: float | Tensor | None, channels: int, device: torch.device
) -> tuple[float, Tensor | None]:
    if threshold is None or isinstance(threshold, (int, float)):
        return float(threshold or 0), None
    per_channel = _per_channel("threshold", threshold, channels, device)
    return 0.0, None if per_channel is None else per_channel.detach()
