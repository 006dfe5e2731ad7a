"""Naive references in float64 PyTorch. They share nothing with the library."""

import torch
import torch.nn.functional as F


def sign(x):
    """+1 for x >= 0 (so for -0.0), -1 otherwise (so for NaN), as float64."""
    x = x.detach().cpu().double()
    return torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))


def pads_of(padding, kernel, dilation):
    """(top, left, bottom, right) of a number, a pair, 'same' or 'valid', as F.conv2d means them."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, pair(dilation), strict=True)]
        before = [t // 2 for t in total]
        return (*before, total[0] - before[0], total[1] - before[1])
    return pair(padding) * 2


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def conv2d_of_signs(x, w, stride=1, padding=0, dilation=1, groups=1, pad_value=0):
    """F.conv2d of values that are signs already, padded with pad_value."""
    top, left, bottom, right = pads_of(padding, w.shape[2:], dilation)
    x = F.pad(x, (left, right, top, bottom), value=float(pad_value))
    return F.conv2d(x, w, None, stride, 0, dilation, groups)


def conv2d(x, w, **geometry):
    """The exact integers, in float64, which holds every partial sum."""
    return conv2d_of_signs(sign(x), sign(w), **geometry)


def epilogue(acc, scale=None, bias=None, residual=None, clamp=False, prelu=None):
    """y = prelu(fma(acc, scale, bias) + residual) in float32. float64 holds acc * scale + bias
    exactly for the values of `factors`, so one rounding to float32 gives the fused multiply-add."""
    y = acc * (acc > 0) if clamp else acc
    if scale is not None:
        y = y * scale.detach().cpu().double().reshape(-1, 1, 1)
    if bias is not None:
        y = y + bias.detach().cpu().double().reshape(-1, 1, 1)
    y = y.float()
    y = y if residual is None else y + residual.detach().cpu().float()
    return y if prelu is None else activate(y, *prelu)


def activate(y, in_shift, slope, out_shift):
    """PReLU between two shifts. Sums and products of two float32 numbers, rounded from float64, are
    as if they were rounded once."""

    def column(per_channel):
        return per_channel.detach().cpu().double().reshape(-1, 1, 1)

    if in_shift is not None:
        y = (y.double() + column(in_shift)).float()
    negative = torch.zeros(()) if slope is None else (y.double() * column(slope)).float()
    y = torch.where(y < 0, negative, y)
    return y if out_shift is None else (y.double() + column(out_shift)).float()


def factors(generator, count):
    """float32 of either sign with full 24-bit significands and magnitudes in [1/8, 8).

    acc * scale + bias is a multiple of 2^-26, below 2^26 for |acc| < 2^22: it fits into float64.
    """
    magnitude = torch.exp2(torch.rand(count, generator=generator, dtype=torch.float64) * 5.99 - 3)
    flip = torch.randint(2, (count,), generator=generator) * 2 - 1
    return (magnitude * flip).float()


def gradients(x, w, grad, scale=None, bias=None, residual=None, **geometry):
    """Of y = conv2d(sign(x), sign(w)) * scale + bias + residual, in float64, as (x, w, scale, bias,
    residual): signs are let through where |value| <= 1, everything else is plain calculus."""
    grad = grad.detach().cpu().double()
    signs = [sign(x).requires_grad_(), sign(w).requires_grad_()]
    acc = conv2d_of_signs(*signs, **geometry)
    column = (-1, 1, 1)
    factor = 1 if scale is None else scale.detach().cpu().double().reshape(column)
    grad_x, grad_w = torch.autograd.grad(acc, signs, grad * factor)
    return (
        grad_x * (x.detach().cpu().double().abs() <= 1),
        grad_w * (w.detach().cpu().double().abs() <= 1),
        None if scale is None else (grad * acc.detach()).sum((0, 2, 3)),
        None if bias is None else grad.sum((0, 2, 3)),
        None if residual is None else grad,
    )


def step_gradients(acc, grad, scale, bias, residual, clamp, prelu):
    """Of y = prelu(acc * scale + bias + residual), by hand and in float64, as (acc, scale, bias,
    residual, in_shift, slope, out_shift); all are given. At a bend the positive side counts."""
    scale, bias, in_shift, slope = (
        t.double().reshape(-1, 1, 1) for t in (scale, bias, prelu[0], prelu[1])
    )
    grad, inside = grad.double(), acc
    if clamp:
        inside = acc.clamp(min=0)
    bent = inside * scale + bias + residual.double() + in_shift
    negative = bent < 0
    inner = torch.where(negative, grad * slope, grad)
    to_acc = inner * scale
    if clamp:
        to_acc = to_acc * (acc >= 0)
    per_channel = (0, 2, 3)
    return (
        to_acc,
        (inner * inside).sum(per_channel),
        inner.sum(per_channel),
        inner,
        inner.sum(per_channel),
        (grad * bent * negative).sum(per_channel),
        grad.sum(per_channel),
    )


def assert_gradient_is(grad, expected, rounding=0.0):
    """Equal on the CPU, for gradients that float32 sums exactly; or off by no more than `rounding`,
    relative to the largest. cuDNN may choose an algorithm that transforms its operands, such as
    Winograd's, and so rounds even where every sum is exact: a few tens of units in the last place.
    """
    error = (grad.cpu().double() - expected).abs()
    if grad.is_cuda:
        eps = torch.finfo(grad.dtype).eps
        rounding += (256 if grad.dtype == torch.float32 else 32) * eps
    bound = rounding * expected.abs().max().item() if expected.numel() else 0.0
    assert error.shape == expected.shape
    assert torch.all(error <= bound), f"off by {error.max()}"
