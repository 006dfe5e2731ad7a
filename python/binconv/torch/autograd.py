"""The convolution of signs that is differentiated: it keeps bits for backward, not floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .estimators import EDE, Clip, Estimator, Identity, of_parameter

CLIP = Clip()
Caller = Callable[..., Any]  # Of an operator's name and arguments.
LEVELS = 127  # Of the derivatives that backward keeps as 8-bit codes, on either side of 0.

_TENSORS = (
    "Tensor x, Tensor weight, Tensor? shift, Tensor? scale, Tensor? bias, Tensor? residual, "
    "Tensor? prepared, Tensor? progress"
)
_OTHERS = "int[10] geometry, ScalarType out_dtype, bool mean_scale, str ste, float ste_parameter"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor)"

_library = torch.library.Library("binconv", "FRAGMENT")
_library.define(
    f"sign_conv2d({_TENSORS}, Tensor? leaf, {_OTHERS}, str weight_ste, "
    f"float weight_ste_parameter) -> {_RESULTS}"
)
_library.define(f"sign_conv2d_no_grad({_TENSORS}, {_OTHERS}) -> {_RESULTS}")


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
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    progress: Tensor | None,
    geometry: Sequence[int],
    out_dtype: torch.dtype,
    mean_scale: bool,
    ste: str,
    ste_parameter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and what backward needs: bits (see _fake_sign_conv2d) and codes of x; means."""
    estimator = None
    if ste not in _BITS_ALONE:
        estimator = of_parameter(ste, ste_parameter, None if progress is None else progress[0])
    means = _new_means(x, weight, mean_scale)
    y, kept = ops.sign_conv2d(
        x,
        weight if prepared is None else prepared,
        (*weight.shape, *geometry),
        out_dtype,
        means if mean_scale else scale,
        bias,
        residual,
        None if shift is None else -shift.detach(),
        ste_parameter if ste == Clip.name else None,
        mean_scale,
    )
    codes = x.new_empty(0, dtype=torch.int8) if estimator is None else _codes(estimator, x, shift)
    return y, _narrow(kept, x.shape[1]), codes, means


def _new_means(x: Tensor, weight: Tensor, mean_scale: bool) -> Tensor:
    return x.new_empty(weight.shape[0] if mean_scale else 0, dtype=torch.float32)


_BITS_ALONE = (Clip.name, Identity.name)  # Estimators whose derivative bits tell.


def _codes(estimator: Estimator, x: Tensor, shift: Tensor | None) -> Tensor:
    """The derivative as codes from -LEVELS to LEVELS."""
    values = x.detach().float()
    if shift is not None:
        values = values + shift.detach().view(-1, 1, 1)
    derivative = estimator.derivative(values).mul_(LEVELS / estimator.peak).round_()
    codes = torch.empty(
        x.shape, dtype=torch.int8, device=x.device, memory_format=ops.memory_format(x)
    )
    return codes.copy_(derivative)


def _narrow(packed: Tensor, channels: int) -> Tensor:
    """Without the unused bytes of each pixel."""
    return packed[..., : (channels + 7) // 8].contiguous() if channels % 128 else packed


def _fake_sign_conv2d(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    progress: Tensor | None,
    geometry: Sequence[int],
    out_dtype: torch.dtype,
    mean_scale: bool,
    ste: str,
    ste_parameter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bits: (1 or 2, N, H, W, bytes), the signs and for a clip which values are within it."""
    batch, channels, height, width = x.shape
    sizes = ops.out_sizes(batch, (height, width), weight.shape, *ops.geometry_parts(geometry)[:3])
    form: dict[str, Any] = {"device": x.device, "memory_format": ops.memory_format(x)}
    y = torch.empty(sizes, dtype=out_dtype, **form)
    bits = 2 if ste == Clip.name else 1, batch, height, width, (channels + 7) // 8
    kept = torch.empty(bits, dtype=torch.uint8, device=x.device)
    means = _new_means(x, weight, mean_scale)
    if ste in _BITS_ALONE:
        return y, kept, x.new_empty(0, dtype=torch.int8), means
    return y, kept, torch.empty(x.shape, dtype=torch.int8, **form), means


class _SignConv2d(torch.autograd.Function):
    """What autograd records: the operator without autograd, and `_backward`.

    Not by torch.library.register_autograd, which spends ten times as much a call on an operator
    with this many arguments.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...]
        output = ops.call("sign_conv2d_no_grad", *_of_no_grad(inputs))
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grads[0]), *[None] * 6


class _SignConv2dKernel(torch.autograd.Function):
    """The same, where the dispatcher would do no more than call the kernel.

    Autograd takes time for each input and output: what is no tensor comes as one, and what backward
    keeps is not returned.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, others = inputs
        flat = (*tensors, *others)
        output = _sign_conv2d(*_of_no_grad(flat))
        _save(ctx, flat, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


def _of_no_grad(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of sign_conv2d_no_grad among those of sign_conv2d."""
    return *inputs[:8], *inputs[9:14]


def _autograd(*inputs: Any) -> Any:
    """What the dispatcher calls for autograd, which it spares where there is nothing to record.

    A trace of that holds the operator itself, so that gradients can still pass what is traced.
    """
    if wants_gradient(*inputs[:6], inputs[8]) or forward_ad._current_level >= 0:
        return _SignConv2d.apply(*inputs)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return ops.call("sign_conv2d", *inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, scale, _, residual, _, progress, _, geometry, _, mean_scale, *estimators = inputs
    _, bits, codes, means = output
    ctx.set_materialize_grads(False)  # Bits have no gradient, not one of zeros.
    ctx.save_for_backward(bits, codes, weight, means if mean_scale else scale, progress)
    ctx.geometry = geometry
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.estimators = estimators


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the tensors among the arguments, and None."""
    if grad is None:
        return (None,) * 10
    bits, codes, weight, scale, progress = ctx.saved_tensors
    of_x, of_weight = (None, None) if progress is None else progress
    name, parameter, weight_name, weight_parameter = ctx.estimators
    ste = of_parameter(name, parameter, of_x)
    weight_ste = of_parameter(weight_name, weight_parameter, of_weight)
    needs_x, needs_weight, needs_shift, needs_scale, needs_bias, needs_residual, *_, needs_leaf = (
        ctx.needs_input_grad[:9]
    )
    x_dtype, residual_dtype = ctx.dtypes
    call = _caller(grad, bits, weight)
    of_signs, of_weight_signs = _sign_gradients(
        grad,
        bits[0],
        weight,
        scale,
        ctx.geometry,
        (needs_x or needs_shift, needs_weight or needs_leaf or needs_scale),
        call,
    )
    grad_x = _let_through(ste, of_signs, bits, codes, call)
    grad_shift = grad_x.sum((0, 2, 3), dtype=torch.float32) if needs_shift else None
    grad_scale = None
    if needs_scale:
        signs = _scaled_signs(weight, None, torch.float32)
        grad_scale = (of_weight_signs * signs).sum((1, 2, 3))
    grad_weight = None
    if needs_weight or needs_leaf:
        dtype = torch.float32 if needs_leaf else weight.dtype
        grad_weight = _weight_gradient(weight_ste, of_weight_signs, weight, scale, dtype, call)
    return (
        grad_x.to(x_dtype) if needs_x else None,
        grad_weight if needs_weight else None,
        grad_shift,
        grad_scale,
        grad.sum((0, 2, 3), dtype=torch.float32) if needs_bias else None,
        grad.to(residual_dtype) if needs_residual else None,
        None,
        None,
        grad_weight if needs_leaf else None,
        None,
    )


def _sign_gradients(
    grad: Tensor,
    bits: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    geometry: Sequence[int],
    needs: tuple[bool, bool],
    call: Caller | None,
) -> tuple[Any, Any]:
    """convT(grad, scale * sign(weight)) and corr(grad, sign(x))."""
    if not any(needs):
        return None, None
    stride, (top, left, bottom, right), dilation, groups, pad_value = ops.geometry_parts(geometry)
    channels = weight.shape[1] * groups
    signs, filters = _operands(bits, weight, scale, channels, grad.dtype, call)
    padded = pad_value != 0 or (top, left) != (bottom, right)
    if padded:
        pads = (left, right, top, bottom)
        signs = torch.nn.functional.pad(signs, pads, value=float(pad_value))
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        signs,
        filters,
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


def _caller(*tensors: Tensor) -> Caller | None:
    """How backward calls operators; None for steps in PyTorch alone.

    Those a compiler fuses, and they can be differentiated once more.
    """
    if torch.is_grad_enabled() or ops.is_traced(tensors[0]):
        return None
    return ops.caller(*tensors)


def _operands(
    bits: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    channels: int,
    dtype: torch.dtype,
    call: Caller | None,
) -> tuple[Tensor, Tensor]:
    """The signs of x, in channels_last, and scale * sign(weight)."""
    if call is not None:
        operands: tuple[Tensor, Tensor]
        operands = call("sign_conv2d_operands", bits, weight, scale, channels, dtype)
        return operands
    signs = torch.where(_ones(bits, channels), 1.0, -1.0).to(dtype)
    return signs, _scaled_signs(weight, scale, dtype)


def _ones(bits: Tensor, channels: int) -> Tensor:
    """Which bits are 1, (N, C, H, W) in channels_last."""
    masks = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & masks != 0).flatten(3)[..., :channels].permute(0, 3, 1, 2)


def _scaled_signs(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return torch.where(weight >= 0, 1.0, -1.0).to(dtype)
    factor = scale.to(dtype).view(-1, 1, 1, 1)
    return torch.where(weight >= 0, factor, -factor)


def _let_through(
    estimator: Estimator, grad: Any, bits: Tensor, codes: Tensor, call: Caller | None
) -> Any:
    """The product grad * g(x + shift), from what was kept of g; grad may become it."""
    if grad is None or isinstance(estimator, Identity):
        return grad
    if not isinstance(estimator, Clip):
        return grad * codes * (estimator.peak / LEVELS)
    if call is None:
        return torch.where(_ones(bits[1], grad.shape[1]), grad, 0)
    grad = grad.contiguous(memory_format=ops.memory_format(grad))
    call("mask_values", grad, bits[1])
    return grad


def _weight_gradient(
    estimator: Estimator,
    of_signs: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    call: Caller | None,
) -> Tensor:
    """The product scale * of_signs * h(weight)."""
    is_clip = isinstance(estimator, Clip)
    if call is not None and (is_clip or isinstance(estimator, Identity)):
        limit = min(estimator.parameter, ops.LARGEST) if is_clip else math.inf
        y: Tensor = call("weight_gradient", of_signs, weight, scale, limit, dtype)
        return y
    y = of_signs.float() if scale is None else of_signs * scale.view(-1, 1, 1, 1)
    if is_clip:
        y = torch.where(weight.float().abs() <= estimator.parameter, y, 0)
    elif not isinstance(estimator, Identity):
        y = y * estimator.derivative(weight.float())
    return y.to(dtype)


_OPERATORS: list[tuple[str, Any, Any]] = [
    ("sign_conv2d_no_grad", _sign_conv2d, _fake_sign_conv2d),
    (
        "sign_conv2d",
        lambda *inputs: _sign_conv2d(*_of_no_grad(inputs)),
        lambda *inputs: _fake_sign_conv2d(*_of_no_grad(inputs)),
    ),
]
for _name, _function, _fake in _OPERATORS:
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"binconv::{_name}", _fake, lib=_library)
    ops.kernels[_name] = _function
_library.impl("sign_conv2d", _autograd, "Autograd")
_library.impl("sign_conv2d_no_grad", torch.library.fallthrough_kernel, "Autograd")
