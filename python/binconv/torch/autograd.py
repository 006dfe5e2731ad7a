"""The convolution of signs that is differentiated: it keeps bits for backward, not floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .estimators import EDE, Clip, Estimator, Identity, of_parameter

CLIP = Clip()
LEVELS = 127  # Of the derivatives that backward keeps as 8-bit codes, on either side of 0.

_library = torch.library.Library("binconv", "FRAGMENT")
_library.define(
    "sign_conv2d(Tensor x, Tensor weight, Tensor? leaf, Tensor? shift, Tensor? scale, "
    "Tensor? bias, Tensor? residual, Tensor? prepared, "
    "Tensor? progress, int[2] stride, "
    "int[4] padding, int[2] dilation, int groups, int pad_value, ScalarType out_dtype, str ste, "
    "float ste_parameter, str weight_ste, float weight_ste_parameter) -> (Tensor, Tensor, Tensor)"
)


def sign_conv2d(
    x: Tensor,
    weight: Tensor,
    geometry: tuple[Any, ...],
    out_dtype: torch.dtype,
    *,
    leaf: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    prepared: Tensor | None = None,
    progress: Tensor | None = None,
    ste: Estimator = CLIP,
    weight_ste: Estimator = CLIP,
) -> Tensor:
    """The result of conv2d(sign(x + shift), sign(weight)) * scale + bias + residual, for training.

    Backward, with G = dL/dy, the estimators g (for x) and h (for weight), a transposed convolution
    convT, and a correlation corr of G with the signs of the input:

        dL/dx      = g(x + shift) * convT(G, scale * sign(weight))
        dL/dshift  = sum of dL/dx over images and pixels
        dL/dweight = h(weight) * scale * corr(G, sign(x + shift))
        dL/dscale  = sum over a filter of sign(weight) * corr(G, sign(x + shift))
        dL/dbias   = sum of G over images and pixels, dL/dresidual = G

    Kept for backward: weight, scale and one bit of each value of x, the sign; besides, for a clip,
    one bit, whether |x + shift| is within it, and for an estimator that depends on the magnitude
    its derivative as an 8-bit code, which is off by at most peak / 254. Bits are rounded up to
    whole bytes a pixel.

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16.
        weight: (O, C / groups, KH, KW) in a float type, or int8 with a leaf.
        geometry: stride, padding, dilation, groups, pad_value of `geometry_arguments`.
        leaf: float tensor of weight's shape, which takes the gradient in weight's place.
        shift: (C,) float32, added to x before its sign is taken.
        out_dtype: of the result, in which its gradient is expected and backward computes.
        scale: (O,) float32.
        bias: (O,) float32.
        residual: float tensor of the result's shape.
        prepared: the bits of weight, if they are at hand.
        progress: (2,) float32, that of an EDE for x + shift and for weight, instead of its own.
        ste: the estimator for x + shift.
        weight_ste: the estimator for weight.
    """
    tensors = x, weight, leaf, shift, scale, bias, residual, prepared, progress
    others = (
        *geometry,
        out_dtype,
        ste.name,
        _parameter(ste, progress),
        weight_ste.name,
        _parameter(weight_ste, progress),
    )
    y: Tensor
    if ops.reaches_kernel(tensors):
        y = _SignConv2dKernel.apply(*tensors, others)  # type: ignore[no-untyped-call]
    else:
        y = torch.ops.binconv.sign_conv2d.default(*tensors, *others)[0]
    return y


def _parameter(estimator: Estimator, progress: Tensor | None) -> float:
    if isinstance(estimator, EDE) and progress is not None:
        return 0.0  # Unused, and the same at all times, so that nothing is compiled anew.
    return estimator.parameter


def packed_conv2d(
    packed: Tensor,
    prepared: Tensor,
    geometry: Sequence[int],
    out_dtype: torch.dtype | None,
    channels_last: bool,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *steps: Any,
) -> Tensor:
    """The operator of that name, or where no gradient is wanted the one without autograd.

    Autograd of an operator in Python takes the host a quarter of the time of a call.
    """
    factors = scale, bias, residual
    arguments = (packed, prepared, geometry, out_dtype, channels_last, *factors, *steps)
    y: Tensor
    if wants_gradient(*factors):
        y = torch.ops.binconv.packed_conv2d.default(*arguments)
    else:
        y = ops.call("packed_conv2d_no_grad", *arguments)
    return y


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    for tensor in tensors:  # Quicker than any().
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def _sign_conv2d(
    x: Tensor,
    weight: Tensor,
    leaf: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    progress: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *geometry, out_dtype, ste, ste_parameter, _, _ = arguments
    estimator = of_parameter(ste, ste_parameter, None if progress is None else progress[0])
    packed, kept = _packed_and_kept(estimator, x, shift)
    if prepared is None:
        bits = ops._pack_bits(weight, 0.0, None)
        prepared = ops._prepare_weight(bits, weight.shape[1], geometry[3])
    convolve: Any = ops._packed_conv2d
    y = convolve(
        packed,
        prepared,
        ops.packed_geometry(weight.shape, *geometry),
        out_dtype,
        ops.is_channels_last(x),
        scale,
        bias,
        residual,
    )
    return y, _narrow(packed, x.shape[1]), kept


def _packed_and_kept(
    estimator: Estimator, x: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The signs, and what backward needs of the derivative: nothing, bits or 8-bit codes."""
    threshold = None if shift is None else -shift.detach()
    if isinstance(estimator, Clip):
        packed, inside = ops.pack_bits_and_clip(x, threshold, estimator.limit)
        return packed, _narrow(inside, x.shape[1])
    packed = ops._pack_bits(x, 0.0, threshold)
    if isinstance(estimator, Identity):
        return packed, packed.new_empty(0)
    values = x.detach().float()
    if shift is not None:
        values = values + shift.detach().view(-1, 1, 1)
    codes = estimator.derivative(values).mul_(LEVELS / estimator.peak).round_()
    kept = torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=_memory_format(x))
    return packed, kept.copy_(codes)


def _narrow(packed: Tensor, channels: int) -> Tensor:
    """Without the unused bytes of each pixel."""
    return packed[..., : (channels + 7) // 8].contiguous() if channels % 128 else packed


def _widen(narrow: Tensor, channels: int) -> Tensor:
    """With the unused bytes of each pixel, as the kernels read them."""
    missing = 16 * ((channels + 127) // 128) - (channels + 7) // 8
    return torch.nn.functional.pad(narrow, (0, missing)) if missing else narrow


def _unpacked(narrow: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Of bits as _narrow leaves them, +1 and -1, (N, C, H, W) in channels_last."""
    if not torch.compiler.is_compiling():
        y: Tensor = ops.call("unpack_bits", _widen(narrow, channels), channels, dtype)
        return y
    # A compiler fuses this with what uses it.
    masks = 1 << torch.arange(8, dtype=torch.uint8, device=narrow.device)
    bits = (narrow.unsqueeze(-1) & masks).flatten(3)[..., :channels]
    return ((bits != 0).to(dtype) * 2 - 1).permute(0, 3, 1, 2)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if ops.is_channels_last(x) else torch.contiguous_format


def _fake_sign_conv2d(
    x: Tensor,
    weight: Tensor,
    leaf: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    progress: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, _, _, out_dtype, ste, *_ = arguments
    batch, channels, height, width = x.shape
    sizes = ops.out_sizes(batch, (height, width), weight.shape, stride, padding, dilation)
    form: dict[str, Any] = {"device": x.device, "memory_format": _memory_format(x)}
    y = torch.empty(sizes, dtype=out_dtype, **form)
    bits = torch.empty(
        (batch, height, width, (channels + 7) // 8), dtype=torch.uint8, device=x.device
    )
    if ste == Identity.name:
        return y, bits, bits.new_empty(0)
    if ste == Clip.name:
        return y, bits, torch.empty_like(bits)
    return y, bits, torch.empty(x.shape, dtype=torch.int8, **form)


class _SignConv2d(torch.autograd.Function):
    """What autograd records: the operator below autograd, and `_backward`.

    Not by torch.library.register_autograd, which spends ten times as much a call on an operator
    with this many arguments.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _below_autograd(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grads[0])


class _SignConv2dKernel(torch.autograd.Function):
    """The same, where the dispatcher would do no more than call the kernel.

    Autograd takes time for each input and output: what is no tensor comes as one, and what backward
    keeps is not returned.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        flat = (*inputs[:-1], *inputs[-1])
        output = _sign_conv2d(*flat)
        _save(ctx, flat, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)[:10]


def _autograd(*inputs: Any) -> Any:
    """What the dispatcher calls for autograd, which it spares where there is nothing to record."""
    if wants_gradient(*inputs[:7]) or forward_ad._current_level >= 0:
        return _SignConv2d.apply(*inputs)  # type: ignore[no-untyped-call]
    return _below_autograd(*inputs)


def _below_autograd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[Tensor, Tensor, Tensor] = ops.call("sign_conv2d", *inputs)
    return output


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, scale, _, residual, _, progress, *arguments = inputs
    *geometry, _, ste, ste_parameter, weight_ste, weight_ste_parameter = arguments
    ctx.set_materialize_grads(False)  # Bits have no gradient, not one of zeros.
    ctx.save_for_backward(output[1], output[2], weight, scale, progress)
    ctx.geometry = geometry
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.estimators = (ste, ste_parameter), (weight_ste, weight_ste_parameter)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 19
    bits, kept, weight, scale, progress = ctx.saved_tensors
    ste, weight_ste = (
        of_parameter(name, parameter, None if progress is None else progress[i])
        for i, (name, parameter) in enumerate(ctx.estimators)
    )
    needs_x, needs_weight, needs_leaf, needs_shift, needs_scale, needs_bias, needs_residual = (
        ctx.needs_input_grad[:7]
    )
    x_dtype, residual_dtype = ctx.dtypes
    of_signs = _sign_gradients(
        grad,
        bits,
        weight,
        scale,
        ctx.geometry,
        (needs_x or needs_shift, needs_weight or needs_leaf or needs_scale),
    )
    grad_x = _let_through(ste, of_signs[0], kept)
    grad_shift = grad_x.sum((0, 2, 3), dtype=torch.float32) if needs_shift else None
    grad_weight, grad_scale = _weight_gradients(of_signs[1], weight, scale, needs_scale, weight_ste)
    return (
        grad_x.to(x_dtype) if needs_x else None,
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_weight if needs_leaf else None,
        grad_shift,
        grad_scale,
        grad.sum((0, 2, 3), dtype=torch.float32) if needs_bias else None,
        grad.to(residual_dtype) if needs_residual else None,
        *[None] * 12,
    )


def _sign_gradients(
    grad: Tensor,
    bits: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    geometry: Sequence[Any],
    needs: tuple[bool, bool],
) -> tuple[Any, Any]:
    """convT(grad, scale * sign(weight)) and corr(grad, sign(x))."""
    if not any(needs):
        return None, None
    stride, (top, left, bottom, right), dilation, groups, pad_value = geometry
    channels = weight.shape[1] * groups
    signs = _unpacked(bits, channels, grad.dtype)
    padded = pad_value != 0 or (top, left) != (bottom, right)
    if padded:
        pads = (left, right, top, bottom)
        signs = torch.nn.functional.pad(signs, pads, value=float(pad_value))
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        signs,
        _scaled_signs(weight, scale, grad.dtype),
        None,
        stride,
        [0, 0] if padded else [top, left],
        dilation,
        False,
        [0, 0],
        groups,
        [*needs, False],
    )
    if padded and needs[0]:
        grad_x = grad_x[:, :, top : top + bits.shape[1], left : left + bits.shape[2]]
    return grad_x, grad_weight


def _scaled_signs(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return torch.where(weight >= 0, 1.0, -1.0).to(dtype)
    factor = scale.to(dtype).view(-1, 1, 1, 1)
    return torch.where(weight >= 0, factor, -factor)


def _let_through(estimator: Estimator, grad: Any, kept: Tensor) -> Any:
    """The product grad * g(x), from what was kept of g(x)."""
    if grad is None or isinstance(estimator, Identity):
        return grad
    if isinstance(estimator, Clip):
        inside = _unpacked(kept, grad.shape[1], torch.int8)
        return torch.ops.aten.threshold_backward(grad, inside, 0)  # One operation, not two.
    return grad * kept * (estimator.peak / LEVELS)


def _weight_gradients(
    of_signs: Any,
    weight: Tensor,
    scale: Tensor | None,
    needs_scale: bool,
    estimator: Estimator,
) -> tuple[Any, Tensor | None]:
    """Of weight, in float32, and of scale if it needs one."""
    if of_signs is None:
        return None, None
    of_signs = of_signs.float()
    grad_scale = None
    if needs_scale:
        grad_scale = (of_signs * _scaled_signs(weight, None, torch.float32)).sum((1, 2, 3))
    if scale is not None:
        of_signs = of_signs * scale.view(-1, 1, 1, 1)
    if not isinstance(estimator, Identity):
        of_signs = of_signs * estimator.derivative(weight.float())
    return of_signs, grad_scale


for _key in ("CPU", "CUDA"):
    _library.impl("sign_conv2d", _sign_conv2d, _key)
ops.kernels["sign_conv2d"] = _sign_conv2d
torch.library.register_fake("binconv::sign_conv2d", _fake_sign_conv2d, lib=_library)
_library.impl("sign_conv2d", _autograd, "Autograd")
