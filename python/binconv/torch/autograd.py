"""The convolution of signs that is differentiated: it keeps bits for backward, not floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import set_original_aten_op

from . import ops
from .estimators import EDE, Clip, Estimator, Identity, of_parameter

CLIP = Clip()
LEVELS = 127  # Of the derivatives that backward keeps as 8-bit codes, on either side of 0.


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
    mean_scale: bool = False,
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

    Differentiated once more, signs count as constants, and so do masks.

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
        mean_scale: takes mean(|weight|) of each filter as the scale, without a gradient.
        bias: (O,) float32.
        residual: float tensor of the result's shape.
        prepared: the bits of weight, if they are at hand.
        progress: (2,) float32, that of an EDE for x + shift and for weight, instead of its own.
        ste: the estimator for x + shift.
        weight_ste: the estimator for weight.
    """
    tensors = x, weight, shift, scale, bias, residual, prepared, progress, leaf
    others = (
        ops.flat_geometry(*geometry),
        out_dtype,
        mean_scale,
        ste.name,
        _parameter(ste, progress),
        weight_ste.name,
        _parameter(weight_ste, progress),
    )
    y: Tensor
    if ops.is_plain_call(tensors):  # Spares what the dispatcher takes to call Python.
        y = _SignConv2d.apply(*tensors, others)  # type: ignore[no-untyped-call]
    else:
        y = _operator(*tensors, *others)
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
    convolve = ops.packed_conv2d if wants_gradient(*factors) else ops.packed_conv2d_no_grad
    y: Tensor = convolve(*arguments)
    return y


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # Quicker than any().
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _SignConv2d(torch.autograd.Function):
    """What autograd records.

    Not by torch.library.register_autograd, which spends ten times as much a call on an operator
    with this many arguments. Autograd takes time for each input: what is no tensor comes as one.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, others = inputs
        x, weight, shift, scale, _, residual, _, progress, _ = tensors
        geometry, _, mean_scale, *estimators = others
        y: Tensor
        y, bits, means = _convolve(tensors, others)
        ctx.save_for_backward(
            _narrow(bits, x.shape[1]),
            _codes(estimators[0], estimators[1], progress, x, shift),
            weight,
            means if mean_scale else scale,
            progress,
        )
        ctx.geometry = geometry
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.estimators = estimators
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


def _convolve(tensors: Sequence[Any], others: Sequence[Any]) -> Any:
    """The result, the bits of x, and the mean scale of the weight."""
    x, weight, shift, scale, bias, residual, prepared, *_ = tensors
    geometry, out_dtype, mean_scale, ste, ste_parameter, *_ = others
    return ops.sign_conv2d_no_grad(
        x,
        weight,
        None if shift is None else -shift.detach(),
        scale,
        bias,
        residual,
        prepared,
        out_dtype,
        mean_scale,
        ste_parameter if ste == Clip.name else None,
        *geometry,
    )


def _narrow(packed: Tensor, channels: int) -> Tensor:
    """Without the unused bytes of each pixel."""
    return packed[..., : (channels + 7) // 8].contiguous() if channels % 128 else packed


def _codes(
    ste: str, parameter: float, progress: Tensor | None, x: Tensor, shift: Tensor | None
) -> Tensor | None:
    """The derivative as codes from -LEVELS to LEVELS, for an estimator that bits do not tell."""
    if ste in (Clip.name, Identity.name):
        return None
    estimator = of_parameter(ste, parameter, None if progress is None else progress[0])
    values = x.detach().float()
    if shift is not None:
        values = values + shift.detach().view(-1, 1, 1)
    derivative = estimator.derivative(values).mul_(LEVELS / estimator.peak).round_()
    codes = torch.empty(
        x.shape, dtype=torch.int8, device=x.device, memory_format=ops.memory_format(x)
    )
    return codes.copy_(derivative)


def _autograd(*inputs: Any) -> Any:
    """What the dispatcher calls for autograd, which it spares where there is nothing to record.

    A trace of that holds the operator itself, so that gradients can still pass what is traced.
    """
    if wants_gradient(*inputs[:6], inputs[8]) or forward_ad._current_level >= 0:
        return _SignConv2d.apply(*inputs[:9], inputs[9:])  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors among the arguments, and None."""
    bits, codes, weight, scale, progress = ctx.saved_tensors
    ste, weight_ste = _estimators(ctx, progress)
    needs_x, needs_weight, needs_shift, needs_scale, needs_bias, needs_residual, *_, needs_leaf = (
        ctx.needs_input_grad[:9]
    )
    x_dtype, residual_dtype = ctx.dtypes
    dtype = torch.float32 if needs_leaf else weight.dtype
    once_more = _is_differentiated()
    masks = isinstance(ste, Clip) and not (once_more or ops.is_traced(grad))  # A compiler fuses it.
    limit = None if once_more else _limit(weight_ste)
    needs_values = needs_weight or needs_leaf
    finishes = limit is not None and needs_values and not needs_scale
    needs = needs_x or needs_shift, needs_values or needs_scale
    grad_x: Any = None
    of_signs: Any = None
    if any(needs):
        convolve_backward = _sign_gradients if once_more else ops.sign_conv2d_backward
        grad_x, of_signs = convolve_backward(
            grad,
            bits,
            weight,
            scale,
            *needs,
            masks,
            limit if finishes else None,
            dtype,
            *ctx.geometry,
        )
    if needs[0] and not masks:
        # Named after the operator, not after every step, a fused kernel's name stays within the 150
        # characters that Triton keeps; Inductor's quick launcher does not find others.
        with set_original_aten_op(ops.sign_conv2d_backward):
            grad_x = _let_through(ste, grad_x, bits, codes)
    grad_weight = None
    if finishes:
        grad_weight = of_signs
    elif needs_values:
        grad_weight = _weight_gradient(weight_ste, of_signs, weight, scale, limit, dtype)
    return (
        grad_x.to(x_dtype) if needs_x else None,
        grad_weight if needs_weight else None,
        grad_x.sum((0, 2, 3), dtype=torch.float32) if needs_shift else None,
        _scale_gradient(of_signs, weight) if needs_scale else None,
        grad.sum((0, 2, 3), dtype=torch.float32) if needs_bias else None,
        grad.to(residual_dtype) if needs_residual else None,
        None,
        None,
        grad_weight if needs_leaf else None,
        None,
    )


def _is_differentiated() -> bool:
    """Whether what is computed now gets derivatives itself, backward or forward."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _estimators(ctx: Any, progress: Tensor | None) -> tuple[Estimator, Estimator]:
    of_x, of_weight = (None, None) if progress is None else progress
    name, parameter, weight_name, weight_parameter = ctx.estimators
    ste = of_parameter(name, parameter, of_x)
    return ste, of_parameter(weight_name, weight_parameter, of_weight)


def _limit(estimator: Estimator) -> float | None:
    """Up to which magnitude a gradient passes unchanged, if no other part of it does."""
    if isinstance(estimator, Identity):
        return math.inf
    return estimator.parameter if isinstance(estimator, Clip) else None


def _sign_gradients(
    grad: Tensor,
    bits: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    masks: bool,
    limit: float | None,
    dtype: torch.dtype,
    *geometry: int,
) -> tuple[Any, Any]:
    """What ops.sign_conv2d_backward computes without masks and limit, to be differentiated."""
    stride, (top, left, bottom, right), dilation, groups, pad_value = ops.geometry_parts(geometry)
    signs = torch.where(_ones(bits[0], weight.shape[1] * groups), 1.0, -1.0).to(grad.dtype)
    padded = pad_value != 0 or (top, left) != (bottom, right)
    if padded:
        pads = (left, right, top, bottom)
        signs = torch.nn.functional.pad(signs, pads, value=float(pad_value))
    if tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1 and not signs.is_cuda:
        signs = signs.contiguous()  # Else oneDNN's weight gradient is wrong for few channels.
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
        [needs_x, needs_weight, False],
    )
    if padded and needs_x:
        grad_x = torch.nn.functional.pad(grad_x, (-left, -right, -top, -bottom))
    if needs_weight:
        grad_weight = grad_weight.contiguous(memory_format=ops.memory_format(weight))
    return grad_x, grad_weight


def _ones(bits: Tensor, channels: int) -> Tensor:
    """Which bits are 1, (N, C, H, W) in channels_last."""
    masks = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & masks != 0).flatten(3)[..., :channels].permute(0, 3, 1, 2)


def _scaled_signs(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return torch.where(weight >= 0, 1.0, -1.0).to(dtype)
    factor = scale.to(dtype).view(-1, 1, 1, 1)
    return torch.where(weight >= 0, factor, -factor)


def _let_through(estimator: Estimator, grad: Any, bits: Tensor, codes: Tensor | None) -> Any:
    """The product grad * g(x + shift), from what was kept of g."""
    if isinstance(estimator, Identity):
        return grad
    if not isinstance(estimator, Clip):
        return grad * codes * (estimator.peak / LEVELS)
    return torch.where(_ones(bits[1], grad.shape[1]), grad, 0)


def _scale_gradient(of_signs: Any, weight: Tensor) -> Tensor:
    signs = _scaled_signs(weight, None, torch.float32)
    gradient: Tensor = (of_signs * signs).sum((1, 2, 3))
    return gradient


def _weight_gradient(
    estimator: Estimator,
    of_signs: Any,
    weight: Tensor,
    scale: Tensor | None,
    limit: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product scale * of_signs * h(weight)."""
    y: Tensor
    if limit is not None:
        y = ops.weight_gradient(of_signs, weight, scale, limit, dtype)
        return y
    y = of_signs.float() if scale is None else of_signs * scale.view(-1, 1, 1, 1)
    if isinstance(estimator, Clip):
        largest = torch.finfo(torch.float32).max
        y = torch.where(weight.float().abs() <= min(estimator.parameter, largest), y, 0)
    elif not isinstance(estimator, Identity):
        y = y * estimator.derivative(weight.float())
    return y.to(dtype)


def _forward(*inputs: Any) -> Any:
    return _convolve(inputs[:9], inputs[9:])[0]


_operator = ops.define(
    "sign_conv2d(Tensor x, Tensor weight, Tensor? shift, Tensor? scale, Tensor? bias, "
    "Tensor? residual, Tensor? prepared, Tensor? progress, Tensor? leaf, int[10] geometry, "
    "ScalarType out_dtype, bool mean_scale, str ste, float ste_parameter, str weight_ste, "
    "float weight_ste_parameter) -> Tensor",
    _forward,
    kernel=_forward,
    autograd=_autograd,
)
