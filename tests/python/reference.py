"""Naive references in NumPy, after docs/conventions.md. They share nothing with the library."""

import numpy as np


def packed_bytes(channels):
    return 16 * -(-channels // 128)


def bits_of(x, threshold=0.0, below=False):
    """Which values of (N,C,H,W) become a 1: those not less than `threshold`, or where `below` those
    not more. Both are one value or one per channel."""
    threshold = np.asarray(threshold, np.float32).reshape(-1, 1, 1)
    x = x.astype(np.float32)
    return np.where(np.asarray(below, bool).reshape(-1, 1, 1), x <= threshold, x >= threshold)


def inside_of(x, threshold, limit):
    """Which values of (N,C,H,W) are at most `limit` from `threshold`, one or one per channel, both
    ends in float32."""
    threshold, limit = np.asarray(threshold, np.float32).reshape(-1, 1, 1), np.float32(limit)
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        return (threshold - limit <= x) & (x <= threshold + limit)


def pack(bits):
    """Booleans (N,C,H,W) as a packed image: channel c is bit c % 8 of byte c / 8."""
    batch, channels, height, width = bits.shape
    packed = np.zeros((batch, height, width, packed_bytes(channels)), np.uint8)
    for c in range(channels):
        packed[..., c // 8] |= bits[:, c].astype(np.uint8) << np.uint8(c % 8)
    return packed


def signs(rng, *shape):
    return rng.choice(np.array([-1, 1], np.int8), shape)


def out_size(size, pads, kernel, stride, dilation):
    return (size + pads - dilation * (kernel - 1) - 1) // stride + 1


def conv2d(x, w, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, pad_value=0):
    """Cross-correlation of signs (N,C,H,W) with signs (O,C/groups,KH,KW), tap by tap, in float64.

    padding is (top, left, bottom, right). Exact: every partial sum is an integer below 2^53.
    """
    top, left, bottom, right = padding
    batch, _, in_height, in_width = x.shape
    out_channels, depth, kernel_height, kernel_width = w.shape
    height = out_size(in_height, top + bottom, kernel_height, stride[0], dilation[0])
    width = out_size(in_width, left + right, kernel_width, stride[1], dilation[1])
    pads = ((0, 0), (0, 0), (top, bottom), (left, right))
    x = np.pad(x.astype(np.float64), pads, constant_values=pad_value)
    w = w.astype(np.float64)
    y = np.zeros((batch, out_channels, height, width))
    filters = out_channels // groups
    for g in range(groups):
        inputs = x[:, g * depth : (g + 1) * depth]
        outputs = slice(g * filters, (g + 1) * filters)
        for i in range(kernel_height):
            for j in range(kernel_width):
                top, left = i * dilation[0], j * dilation[1]
                rows = slice(top, top + stride[0] * (height - 1) + 1, stride[0])
                columns = slice(left, left + stride[1] * (width - 1) + 1, stride[1])
                tap = np.tensordot(w[outputs, :, i, j], inputs[:, :, rows, columns], (1, 1))
                y[:, outputs] += tap.swapaxes(0, 1)
    return y.astype(np.int64)


def epilogue(acc, scale=None, bias=None, residual=None, clamp=False, activation=None):
    """y = activation(fma(float(acc), scale[o], bias[o]) + residual) in float32, first of all with
    max(acc, 0) for acc if `clamp`; residual is (N,O,P,Q).

    The fused multiply-add is done in float64 and rounded once. That is the true fma wherever the
    float64 sum is exact, which `random_factors` makes sure of.
    """
    column = (-1, 1, 1)
    y = (np.maximum(acc, 0) if clamp else acc).astype(np.float64)
    if scale is not None:
        y = y * scale.astype(np.float64).reshape(column)
    if bias is not None:
        y = y + bias.astype(np.float64).reshape(column)
    y = y.astype(np.float32)
    y = y if residual is None else y + residual.astype(np.float32)
    return y if activation is None else activate(y, *activation)


def activate(y, in_shift, slope, out_shift):
    """PReLU between two shifts, each step in float64 and rounded to float32: sums and products of
    two float32 numbers come out as if they were rounded once."""

    def step(operation, x, per_channel):
        factors = per_channel.astype(np.float64).reshape(-1, 1, 1)
        return operation(x.astype(np.float64), factors).astype(np.float32)

    if in_shift is not None:
        y = step(np.add, y, in_shift)
    negative = np.float32(0) if slope is None else step(np.multiply, y, slope)
    y = np.where(y < 0, negative, y)
    return y if out_shift is None else step(np.add, y, out_shift)


def random_factors(rng, count):
    """float32 of either sign, full 24-bit significands, magnitudes in [1/8, 8).

    With a scale and a bias of this kind acc * scale + bias is a multiple of 2^-26. For |acc| < 2^22
    it is below 2^26, so it fits into 53 bits: float64 holds both the product and the sum exactly.
    """
    magnitude = np.exp2(rng.uniform(-3, 2.99, count))
    return (magnitude * rng.choice([-1, 1], count)).astype(np.float32)
