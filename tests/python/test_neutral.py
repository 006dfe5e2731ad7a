"""binconv on DLPack arrays: every kernel against naive references, and every bad argument."""

import itertools
import multiprocessing
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import reference
from reference import packed_bytes, random_factors, signs

import binconv

KERNELS = binconv.available_kernels()
VALUE_TYPES = (np.float32, np.float16, np.int8)
FLOAT_TYPES = (np.float32, np.float16)
GUARD = 64
POISON = 0xA5


class Guarded:
    """An array of exactly the asked size between guard bytes, 64-byte aligned and poisoned."""

    def __init__(self, shape, dtype, offset=0):
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = np.full(size + 2 * GUARD + 128, POISON, np.uint8)
        start = GUARD + -(memory.ctypes.data + GUARD) % 64 + offset
        self.before, self.after = memory[:start], memory[start + size :]
        self.array = memory[start : start + size].view(dtype).reshape(shape)

    def assert_guards_intact(self):
        assert np.all(self.before == POISON), "bytes before the array were overwritten"
        assert np.all(self.after == POISON), "bytes after the array were overwritten"

    def assert_untouched(self):
        self.assert_guards_intact()
        assert np.all(self.array.reshape(-1).view(np.uint8) == POISON)


def aligned(values, offset=0):
    """A copy of an array on a 64-byte boundary, or `offset` bytes behind one."""
    copy = Guarded(values.shape, values.dtype, offset).array
    copy[...] = values
    return copy


def kernels_for(shape, device):
    """Those of the device's kernels that take the shape; the one that the library chooses does."""

    def takes(kernel):
        try:
            return binconv.kernel_name(shape, device=device, kernel=kernel) == kernel
        except NotImplementedError:
            return False

    kernels = [kernel for kernel in binconv.available_kernels(device=device) if takes(kernel)]
    assert binconv.kernel_name(shape, device=device) in kernels
    return kernels


def nhwc(x):
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def nchw(x):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def pack(x, layout="nchw", **options):
    """binconv.pack_bits of an (N,C,H,W) array handed over in `layout`, into guarded memory."""
    batch, channels, height, width = x.shape
    out = Guarded((batch, height, width, packed_bytes(channels)), np.uint8)
    binconv.pack_bits(nhwc(x) if layout == "nhwc" else x, out.array, layout=layout, **options)
    out.assert_guards_intact()
    return out.array


def pack_and_clip(x, layout="nchw", **options):
    """The same of binconv.pack_bits_and_clip, both results."""
    batch, channels, height, width = x.shape
    size = (batch, height, width, packed_bytes(channels))
    out, inside = Guarded(size, np.uint8), Guarded(size, np.uint8)
    binconv.pack_bits_and_clip(
        nhwc(x) if layout == "nhwc" else x, out.array, inside.array, layout=layout, **options
    )
    out.assert_guards_intact()
    inside.assert_guards_intact()
    return out.array, inside.array


def conv_shape(x, w, groups=1, **geometry):
    batch, channels, height, width = x.shape
    out_channels, _, kernel_height, kernel_width = w.shape
    weight = binconv.WeightShape(out_channels, channels, kernel_height, kernel_width, groups)
    return binconv.Conv2dShape(batch, height, width, weight, **geometry)


def prepare(w, shape, kernel=None):
    packed = aligned(reference.pack(w > 0))
    out = Guarded((binconv.prepared_weight_bytes(shape.weight, kernel=kernel),), np.uint8)
    binconv.prepare_weight(shape.weight, packed, out.array, kernel=kernel)
    out.assert_guards_intact()
    return out.array


def conv(
    x,
    w,
    out_type=np.int32,
    layout="nhwc",
    kernel=None,
    threads=None,
    residual=None,
    scale=None,
    bias=None,
    threshold=None,
    with_bits=False,
    clamp=False,
    activation=None,
    threshold_below=None,
    **geometry,
):
    """binconv.binary_conv2d of signs, without a byte to spare; (N,O,P,Q) or packed bits, with_bits
    both."""
    shape = conv_shape(x, w, **geometry)
    prepared = prepare(w, shape, kernel)
    scratch = Guarded((binconv.workspace_bytes(shape, threads=threads, kernel=kernel),), np.uint8)
    size = (x.shape[0], shape.out_height, shape.out_width)
    if out_type == "bits":
        out = Guarded((*size, packed_bytes(w.shape[0])), np.uint8)
    elif layout == "nhwc":
        out = Guarded((*size, w.shape[0]), out_type)
    else:
        out = Guarded((size[0], w.shape[0], *size[1:]), out_type)
    if residual is not None and (layout == "nhwc" or out_type == "bits"):
        residual = nhwc(residual)
    bits = Guarded((*size, packed_bytes(w.shape[0])), np.uint8)
    binconv.binary_conv2d(
        shape,
        aligned(reference.pack(x > 0)),
        prepared,
        out.array,
        layout=layout,
        clamp=clamp,
        scale=scale,
        bias=bias,
        residual=residual,
        activation=activation,
        threshold=threshold,
        threshold_below=threshold_below,
        bits=bits.array if with_bits else None,
        workspace=scratch.array if scratch.array.size else None,
        threads=threads,
        kernel=kernel,
    )
    out.assert_guards_intact()
    scratch.assert_guards_intact()
    bits.assert_guards_intact()
    y = nchw(out.array) if layout == "nhwc" and out_type != "bits" else out.array
    return (y, bits.array) if with_bits else y


# ---------------------------------------------------------------------------------------- reference


def test_reference_convolution_is_the_definition():
    rng = np.random.default_rng(0)
    x, w = signs(rng, 2, 16, 6, 7), signs(rng, 4, 8, 3, 2)
    groups, stride, padding, dilation, pad_value = 2, (2, 1), (1, 0, 2, 3), (1, 2), -1
    y = reference.conv2d(x, w, stride, padding, dilation, groups, pad_value)
    assert y.shape == (2, 4, 4, 8)
    for n, o, p, q in itertools.product(*map(range, y.shape)):
        acc = 0
        for c, i, j in itertools.product(*map(range, w.shape[1:])):
            h = p * stride[0] - padding[0] + i * dilation[0]
            v = q * stride[1] - padding[1] + j * dilation[1]
            inside = 0 <= h < 6 and 0 <= v < 7
            acc += int(w[o, c, i, j]) * int(x[n, o // 2 * 8 + c, h, v] if inside else pad_value)
        assert y[n, o, p, q] == acc


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize(
    ("channels", "size"),
    [(1, 16), (127, 16), (128, 16), (129, 32), (256, 32), (257, 48), (2**62, 2**59)],
)
def test_packed_bytes(channels, size):
    assert binconv.packed_bytes(channels) == size


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("channel", "byte", "value"),
    [
        (0, 0, 0x01),
        (7, 0, 0x80),
        (8, 1, 0x01),
        (33, 4, 0x02),
        (127, 15, 0x80),
        (128, 16, 0x01),
    ],
)
def test_one_hot_channel_sets_the_documented_bit(channel, byte, value, layout):
    x = np.full((1, 130, 2, 3), -1, np.float32)
    x[0, channel, 1, 2] = 1
    expected = np.zeros((1, 2, 3, 32), np.uint8)
    expected[0, 1, 2, byte] = value
    np.testing.assert_array_equal(pack(x, layout), expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 31, 32, 33, 48, 64, 96, 127, 128, 130, 512])
def test_pack_matches_reference(channels, dtype, layout):
    rng = np.random.default_rng(channels)
    for height, width in ((5, 7), (1, 33), (16, 16), (3, 1)):
        x = (rng.standard_normal((2, channels, height, width)) * 40).astype(dtype)
        expected = reference.pack(reference.bits_of(x))
        np.testing.assert_array_equal(pack(x, layout), expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_pack_of_every_width_matches_reference(dtype, layout):
    rng = np.random.default_rng(1)
    for width in range(1, 70):
        x = (rng.standard_normal((1, 11, 2, width)) * 40).astype(dtype)
        expected = reference.pack(reference.bits_of(x))
        np.testing.assert_array_equal(pack(x, layout), expected, err_msg=f"width {width}")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_zeros_are_plus_one_and_nan_is_minus_one(dtype, layout):
    tiny = np.finfo(dtype).smallest_subnormal
    values = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, tiny, -tiny], dtype)
    bits = np.array([1, 1, 0, 0, 1, 0, 1, 0], bool)
    for shape in ((1, 8, 1, 1), (1, 1, 1, 8)):
        expected = reference.pack(bits.reshape(shape))
        np.testing.assert_array_equal(pack(values.reshape(shape), layout), expected)
    rows = np.tile(values, 16 * 9).reshape(1, 16, 9, 8)
    expected = reference.pack(np.tile(bits, 16 * 9).reshape(1, 16, 9, 8))
    np.testing.assert_array_equal(pack(rows, layout), expected)


def test_every_int8_and_every_float16_packs_by_its_sign():
    int8 = np.arange(-128, 128).astype(np.int8).reshape(1, 256, 1, 1)
    np.testing.assert_array_equal(pack(int8), reference.pack(int8 >= 0))
    half = np.arange(65536).astype(np.uint16).view(np.float16).reshape(1, 256, 16, 16)
    with np.errstate(invalid="ignore"):
        expected = reference.pack(half.astype(np.float64) >= 0)
    for layout in ("nchw", "nhwc"):
        np.testing.assert_array_equal(pack(half, layout), expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize(
    "threshold", [0.5, -3, 1e-45, np.inf, -np.inf, np.nan, 100], ids=lambda t: f"threshold={t}"
)
def test_number_threshold_matches_reference(threshold, dtype, layout):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((2, 37, 5, 9)) * 3).astype(dtype)
    expected = reference.pack(reference.bits_of(x, threshold))
    np.testing.assert_array_equal(pack(x, layout, threshold=threshold), expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_channel_thresholds_match_reference(dtype, layout):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((2, 133, 5, 9)) * 3).astype(dtype)
    threshold = (rng.standard_normal(133) * 3).astype(np.float32)
    threshold[:4] = [np.nan, np.inf, -np.inf, -0.0]
    threshold[5::2] = x[0, 5::2, 0, 0]  # Equal values count as reached.
    expected = reference.pack(reference.bits_of(x, threshold))
    for given in (threshold, threshold.__dlpack__()):
        np.testing.assert_array_equal(pack(x, layout, threshold=given), expected)


def test_threshold_is_compared_in_float32():
    assert float(np.float32(0.7)) < 0.7  # In float64 the comparison would say no.
    x = np.full((1, 8, 1, 1), 0.7, np.float32)
    assert pack(x, threshold=0.7)[0, 0, 0, 0] == 0xFF
    half = np.full((1, 8, 1, 1), 0.7, np.float16)  # 0.7001953125, above 0.7.
    assert pack(half, threshold=0.7)[0, 0, 0, 0] == 0xFF
    assert pack(half, threshold=0.7002)[0, 0, 0, 0] == 0


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("limit", [0, 0.5, 1.3, np.float32(2), 70000, 3e38])
def test_clip_matches_reference(limit, dtype, layout):
    rng = np.random.default_rng(29)
    x = (rng.standard_normal((2, 133, 5, 9)) * 3).astype(dtype)
    per_channel = (rng.standard_normal(133) * 3).astype(np.float32)
    per_channel[:5] = [np.nan, np.inf, -np.inf, -0.0, 3e38]
    per_channel[5::2] = x[0, 5::2, 0, 0]
    for sign, index in ((-1, 1), (1, 2)):
        end = per_channel[5::2] + sign * np.float32(limit)
        if dtype != np.int8:
            with np.errstate(over="ignore"):
                x[0, 5::2, 0, index] = end
    for threshold in (0, -0.7, np.inf, -np.inf, np.nan, per_channel):
        out, inside = pack_and_clip(x, layout, threshold=threshold, limit=limit)
        np.testing.assert_array_equal(out, reference.pack(reference.bits_of(x, threshold)))
        expected = reference.pack(reference.inside_of(x, threshold, limit))
        np.testing.assert_array_equal(inside, expected, err_msg=f"threshold {threshold}")


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_clip_includes_its_ends_and_nothing_beyond(dtype):
    ends = np.array([-0.75, 1.25], dtype)
    beyond = np.nextafter(ends, np.array([-np.inf, np.inf], dtype))
    values = np.array([*ends, *beyond, 0.25, np.nan, np.inf, -np.inf], dtype).reshape(1, 8, 1, 1)
    out, inside = pack_and_clip(values, threshold=0.25)  # The limit is 1 unless given.
    assert out[0, 0, 0, 0] == 0b01011010
    assert inside[0, 0, 0, 0] == 0b00010011


def test_every_float16_is_clipped_in_float32():
    half = np.arange(65536).astype(np.uint16).view(np.float16).reshape(1, 256, 16, 16)
    for threshold, limit in ((0, 1.3), (0.1, 0), (1e-8, 1e-8), (-1, 70000), (65504, 0.1)):
        expected = reference.pack(reference.inside_of(half, threshold, limit))
        for layout in ("nchw", "nhwc"):
            got = pack_and_clip(half, layout, threshold=threshold, limit=limit)[1]
            np.testing.assert_array_equal(got, expected, err_msg=f"{threshold}, {limit}")


def test_clip_of_nothing_writes_nothing():
    for shape in ((0, 5, 4, 4), (2, 5, 0, 4), (2, 5, 4, 0)):
        out, inside = pack_and_clip(np.zeros(shape, np.float32))
        assert out.size == inside.size == 0


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_unused_bits_are_zero_whatever_was_in_out(layout):
    for channels in range(1, 131):
        packed = pack(np.ones((1, channels, 2, 3), np.int8), layout)
        for bits in (packed, *pack_and_clip(np.ones((1, channels, 2, 3), np.int8), layout)):
            count = np.unpackbits(bits.reshape(6, -1), axis=1).sum(axis=1)
            assert np.all(count == channels)


def test_pack_of_nothing_writes_nothing():
    for shape in ((0, 5, 4, 4), (2, 5, 0, 4), (2, 5, 4, 0)):
        assert pack(np.zeros(shape, np.float32)).size == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_pack_does_not_depend_on_threads(threads):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 70, 61, 67)).astype(np.float32)
    expected = reference.pack(x >= 0)
    for layout in ("nchw", "nhwc"):
        np.testing.assert_array_equal(pack(x, layout, threads=threads), expected)
    out = np.empty_like(x)
    binconv.unpack_bits(expected, out, threads=threads)
    np.testing.assert_array_equal(out, np.where(x >= 0, 1, -1))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="cannot fork")
def test_child_of_a_fork_does_not_wait_for_threads_of_its_parent():
    x = np.random.default_rng(33).standard_normal((8, 256, 56, 56)).astype(np.float32)
    expected = pack(x, threads=2)

    def compare():
        np.testing.assert_array_equal(pack(x, threads=2), expected)

    child = multiprocessing.get_context("fork").Process(target=compare)
    child.start()
    child.join(60)
    child.kill()  # One that hangs; its exit code is not 0 then.
    child.join()
    assert child.exitcode == 0


def test_values_may_lie_at_any_multiple_of_their_size():
    rng = np.random.default_rng(5)
    for dtype, start in itertools.product(VALUE_TYPES, (1, 2, 3, 5)):
        x = (rng.standard_normal(start + 2 * 9 * 35) * 9).astype(dtype)[start:]
        x = x.reshape(1, 9, 2, 35)
        np.testing.assert_array_equal(pack(x), reference.pack(x >= 0))
        out = np.full(start + x.size, 3, dtype)
        binconv.unpack_bits(reference.pack(x >= 0), out[start:].reshape(x.shape))
        np.testing.assert_array_equal(out[start:].reshape(x.shape), np.where(x >= 0, 1, -1))
        assert np.all(out[:start] == 3)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_unpack_gives_the_signs_back(dtype, layout):
    rng = np.random.default_rng(6)
    sizes = ((1, 1, 1, 1), (2, 7, 3, 5), (1, 128, 4, 4), (2, 130, 5, 3), (1, 33, 1, 65))
    for shape in (*sizes, (0, 3, 2, 2)):
        x = signs(rng, *shape)
        out = Guarded(shape if layout == "nchw" else nhwc(x).shape, dtype)
        binconv.unpack_bits(aligned(reference.pack(x > 0)), out.array, layout=layout)
        out.assert_guards_intact()
        np.testing.assert_array_equal(out.array if layout == "nchw" else nchw(out.array), x)


def test_unpack_ignores_the_unused_bits():
    packed = np.full((1, 1, 1, 16), 0xFF, np.uint8)
    out = np.zeros((1, 5, 1, 1), np.float32)
    binconv.unpack_bits(packed, out)
    np.testing.assert_array_equal(out.reshape(-1), np.ones(5))


def test_read_only_inputs_are_accepted():
    rng = np.random.default_rng(7)
    x, w = signs(rng, 1, 8, 4, 4), signs(rng, 2, 8, 3, 3)
    shape = conv_shape(x, w)

    def frozen(values):
        values = aligned(values)
        values.flags.writeable = False
        return values

    out = np.zeros((1, 4, 4, 16), np.uint8)
    threshold = frozen(np.zeros(8, np.float32))
    binconv.pack_bits(frozen(x), out, threshold=threshold)
    np.testing.assert_array_equal(out, reference.pack(x > 0))
    values = np.zeros((1, 8, 4, 4), np.float32)
    binconv.unpack_bits(frozen(out), values)
    np.testing.assert_array_equal(values, x)
    prepared = aligned(np.zeros(binconv.prepared_weight_bytes(shape.weight), np.uint8))
    binconv.prepare_weight(shape.weight, frozen(reference.pack(w > 0)), prepared)
    y = np.zeros((1, 2, 2, 2), np.float32)
    factors = frozen(np.ones(2, np.float32))
    binconv.binary_conv2d(
        shape,
        frozen(out),
        frozen(prepared),
        y,
        scale=factors,
        bias=factors,
        residual=frozen(np.ones(y.shape, np.float32)),
        workspace=aligned(np.zeros(binconv.workspace_bytes(shape), np.uint8)),
    )
    np.testing.assert_array_equal(nchw(y), reference.conv2d(x, w) + 2)
    means = np.zeros(1, np.float32)
    binconv.abs_mean(frozen(values), means)
    assert means[0] == 1
    scaled = np.zeros_like(values)
    binconv.scale_channels(frozen(values), frozen(np.full(8, 2, np.float32)), scaled)
    np.testing.assert_array_equal(scaled, 2 * values)


# -------------------------------------------------------------------------------------- convolution


def draw_shapes():
    """Every channel count with every kernel, the rest of the list drawn around them."""
    rng = np.random.default_rng(2024)
    channels = (1, 7, 8, 31, 32, 33, 48, 64, 96, 127, 128, 130, 512)
    kernels = ((1, 1), (3, 3), (5, 5), (7, 7), (1, 7))
    for in_channels, kernel in itertools.product(channels, kernels):
        out_channels = int(rng.choice([1, 7, 64, 130]))
        stride = tuple(map(int, rng.integers(1, 4, 2)))
        dilation = tuple(map(int, rng.integers(1, 4, 2)))
        padding = tuple(map(int, rng.integers(0, 4, 4)))
        extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        size = [
            max(int(rng.integers(1, 12)), e - p)
            for e, p in zip(extent, (padding[0] + padding[2], padding[1] + padding[3]), strict=True)
        ]
        groups = int(rng.choice([g for g in (1, 2, 4) if in_channels % (8 * g) == 0 or g == 1]))
        if out_channels % groups:
            groups = 1
        yield {
            "x": (int(rng.integers(1, 3)), in_channels, *size),
            "w": (out_channels, in_channels // groups, *kernel),
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "pad_value": int(rng.integers(-1, 2)),
        }


SPECIAL_SHAPES = [
    {"x": (0, 8, 5, 5), "w": (3, 8, 3, 3)},
    {"x": (65, 16, 5, 4), "w": (7, 16, 3, 3), "padding": (1, 1, 1, 1)},
    {"x": (1, 33, 1, 1), "w": (5, 33, 3, 3), "padding": (3, 3, 3, 3), "pad_value": 1},
    {"x": (1, 9, 2, 3), "w": (130, 9, 3, 3), "padding": (5, 4, 7, 6), "pad_value": -1},
    {"x": (1, 9, 2, 3), "w": (4, 9, 2, 2), "padding": (5, 0, 0, 0), "stride": (3, 3)},
    {"x": (1, 40, 3, 50), "w": (65, 40, 3, 3), "padding": (1, 1, 1, 1), "pad_value": 1},
    {"x": (1, 40, 50, 3), "w": (65, 40, 3, 3), "padding": (1, 1, 1, 1), "dilation": (3, 1)},
    {"x": (1, 64, 8, 8), "w": (64, 8, 3, 3), "groups": 8, "padding": (1, 1, 1, 1)},
    {"x": (1, 512, 4, 4), "w": (512, 256, 1, 1), "groups": 2},
    {"x": (2, 72, 7, 7), "w": (9, 24, 3, 3), "groups": 3, "padding": (1, 2, 1, 0), "pad_value": 1},
    {"x": (1, 2048, 4, 4), "w": (3, 2048, 3, 3), "padding": (1, 1, 1, 1), "pad_value": -1},
    {"x": (1, 16, 31, 29), "w": (17, 16, 2, 4), "stride": (2, 3), "padding": (0, 3, 1, 0)},
]
SHAPES = [*draw_shapes(), *SPECIAL_SHAPES]


def shape_id(case):
    text = "x".join(map(str, case["x"])) + "-" + "x".join(map(str, case["w"]))
    return text + "".join(f"-{key}{case[key]}" for key in case if key not in "xw").replace(" ", "")


@pytest.mark.parametrize("case", SHAPES, ids=shape_id)
def test_every_kernel_matches_reference(case):
    rng = np.random.default_rng(8)
    geometry = {key: case[key] for key in case if key not in ("x", "w")}
    x, w = signs(rng, *case["x"]), signs(rng, *case["w"])
    expected = reference.conv2d(x, w, **geometry)
    for kernel in KERNELS:
        got = conv(x, w, kernel=kernel, **geometry)
        np.testing.assert_array_equal(got, expected, err_msg=kernel)
    np.testing.assert_array_equal(conv(x, w, layout="nchw", **geometry), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pad_value", [0, 1, -1])
def test_extreme_inputs_reach_the_extreme_results(kernel, pad_value):
    for channels, x_sign, w_sign in itertools.product((1, 127, 128, 300), (1, -1), (1, -1)):
        x = np.full((1, channels, 3, 3), x_sign, np.int8)
        w = np.full((2, channels, 3, 3), w_sign, np.int8)
        got = conv(x, w, kernel=kernel, padding=(1, 1, 1, 1), pad_value=pad_value)
        outside = w_sign * pad_value * channels
        assert np.all(got[:, :, 1, 1] == 9 * channels * x_sign * w_sign)
        assert np.all(got[:, :, 0, 0] == 4 * channels * x_sign * w_sign + 5 * outside)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_long_sum_is_exact(kernel):
    rng = np.random.default_rng(9)
    channels = 20_011
    x, w = signs(rng, 1, channels, 3, 3), signs(rng, 1, channels, 3, 3)
    np.testing.assert_array_equal(conv(x, w, kernel=kernel), reference.conv2d(x, w))
    np.testing.assert_array_equal(conv(x, x, kernel=kernel), [[[[9 * channels]]]])
    np.testing.assert_array_equal(conv(x, -x, kernel=kernel), [[[[-9 * channels]]]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_acc_above_float32_rounds_to_nearest_even(kernel):
    channels = 2**24 + 1  # float32 holds its neighbours only.
    ones = Guarded((1, 1, 1, packed_bytes(channels)), np.uint8).array
    ones[...] = 0
    ones[..., : 2**21] = 0xFF
    ones[..., 2**21] = 1
    weight = binconv.WeightShape(1, channels, 1, 1)
    shape = binconv.Conv2dShape(1, 1, 1, weight)
    prepared = aligned(np.zeros(binconv.prepared_weight_bytes(weight, kernel=kernel), np.uint8))
    binconv.prepare_weight(weight, ones, prepared, kernel=kernel)
    workspace = aligned(np.zeros(binconv.workspace_bytes(shape, kernel=kernel), np.uint8))
    for out_type, expected in ((np.int32, 2**24 + 1), (np.float32, 2**24)):
        out = np.zeros((1, 1, 1, 1), out_type)
        binconv.binary_conv2d(shape, ones, prepared, out, workspace=workspace, kernel=kernel)
        assert out.item() == expected


EPILOGUES = [
    (),
    ("scale",),
    ("bias",),
    ("scale", "bias"),
    ("residual",),
    ("scale", "residual"),
    ("scale", "bias", "residual"),
]
GEOMETRY = {"padding": (1, 1, 1, 1), "pad_value": 0}


def epilogue_arguments(rng, names, y_shape, residual_type=np.float32):
    arguments = {}
    if "scale" in names:
        arguments["scale"] = random_factors(rng, y_shape[1])
    if "bias" in names:
        arguments["bias"] = random_factors(rng, y_shape[1])
    if "residual" in names:
        arguments["residual"] = (rng.standard_normal(y_shape) * 30).astype(residual_type)
    return arguments


@pytest.mark.parametrize("names", EPILOGUES, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("out_type", FLOAT_TYPES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_float_outputs_round_once(layout, out_type, names):
    rng = np.random.default_rng(10)
    for channels, filters in ((67, 19), (16, 64), (130, 1)):
        x, w = signs(rng, 2, channels, 5, 7), signs(rng, filters, channels, 3, 3)
        acc = reference.conv2d(x, w, **GEOMETRY)
        for residual_type in FLOAT_TYPES if "residual" in names else FLOAT_TYPES[:1]:
            arguments = epilogue_arguments(rng, names, acc.shape, residual_type)
            expected = reference.epilogue(acc, **arguments).astype(out_type)
            for kernel in KERNELS:
                got = conv(x, w, out_type, layout, kernel, **arguments, **GEOMETRY)
                np.testing.assert_array_equal(got, expected, err_msg=kernel)


def test_fused_multiply_add_differs_from_two_roundings_on_the_test_data():
    rng = np.random.default_rng(10)
    acc = rng.integers(-600, 600, (1, 64, 8, 8))
    scale, bias = random_factors(rng, 64), random_factors(rng, 64)
    column = (-1, 1, 1)
    twice = acc.astype(np.float32) * scale.reshape(column) + bias.reshape(column)
    assert np.any(twice != reference.epilogue(acc, scale, bias))


@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_output_rounds_ties_to_even_and_overflows_to_infinity(kernel):
    channels = 4099
    x = np.ones((1, channels, 1, 1), np.int8)
    w = np.ones((4, channels, 1, 1), np.int8)
    w[1, 0] = -1  # 4099, 4097: odd, half-way between two float16 values.
    scale = np.array([1, 1, 16, -16], np.float32)
    got = conv(x, w, np.float16, kernel=kernel, scale=scale).reshape(-1)
    np.testing.assert_array_equal(got, np.array([4100, 4096, np.inf, -np.inf], np.float16))
    tiny = np.full(4, 2.0**-24 / channels, np.float32)
    got = conv(x, w, np.float16, kernel=kernel, scale=tiny).reshape(-1)
    expected = reference.epilogue(np.array([4099, 4097, 4099, 4099]).reshape(1, 4, 1, 1), tiny)
    np.testing.assert_array_equal(got, expected.astype(np.float16).reshape(-1))
    assert np.all(got == 2.0**-24)


@pytest.mark.parametrize("names", EPILOGUES, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("filters", [1, 7, 8, 64, 127, 130])
def test_bit_outputs_match_reference(filters, names):
    rng = np.random.default_rng(11)
    x, w = signs(rng, 2, 67, 5, 7), signs(rng, filters, 67, 3, 3)
    acc = reference.conv2d(x, w, **GEOMETRY)
    arguments = epilogue_arguments(rng, names, acc.shape)
    y = reference.epilogue(acc, **arguments)
    thresholds = (rng.standard_normal(filters) * 20).astype(np.float32)
    thresholds[::3] = y[0, ::3, 2, 2]  # Equal values count as reached.
    for threshold in (None, 2.5, -7, thresholds):
        expected = reference.pack(reference.bits_of(y, 0 if threshold is None else threshold))
        for kernel in KERNELS:
            got = conv(x, w, "bits", "nhwc", kernel, threshold=threshold, **arguments, **GEOMETRY)
            np.testing.assert_array_equal(got, expected, err_msg=f"{kernel} {threshold}")


ACTIVATIONS = [None, *itertools.product((False, True), repeat=3)]


def activation_id(given):
    names = ("in_shift", "slope", "out_shift")
    return "+".join(itertools.compress(names, given)) or "relu" if given else "none"


@pytest.mark.parametrize("given", ACTIVATIONS, ids=activation_id)
@pytest.mark.parametrize("clamp", [False, True])
def test_clamp_and_activation_match_reference_with_bits_beside_values(clamp, given):
    rng = np.random.default_rng(29)
    for channels, filters in ((67, 19), (16, 64)):
        x, w = signs(rng, 2, channels, 5, 7), signs(rng, filters, channels, 3, 3)
        acc = reference.conv2d(x, w, **GEOMETRY)
        arguments = epilogue_arguments(rng, ("scale", "bias", "residual"), acc.shape)
        arguments["clamp"] = clamp
        if given:
            shifts = random_factors(rng, filters) * 30, random_factors(rng, filters) * 30
            values = (shifts[0], random_factors(rng, filters), shifts[1])
            pairs = zip(values, given, strict=True)
            arguments["activation"] = tuple(v if wanted else None for v, wanted in pairs)
        y = reference.epilogue(acc, **arguments)
        threshold, below = y[0, :, 2, 2].copy(), rng.random(filters) < 0.5
        bits = reference.pack(reference.bits_of(y, threshold, below))
        arguments |= {"threshold": threshold, "threshold_below": below}
        for kernel, out_type in itertools.product(KERNELS, FLOAT_TYPES):
            for layout in ("nchw", "nhwc"):
                got = conv(x, w, out_type, layout, kernel, with_bits=True, **arguments, **GEOMETRY)
                np.testing.assert_array_equal(got[0], y.astype(out_type), err_msg=kernel)
                np.testing.assert_array_equal(got[1], bits, err_msg=kernel)
            got = conv(x, w, "bits", kernel=kernel, **arguments, **GEOMETRY)
            np.testing.assert_array_equal(got, bits, err_msg=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_clamped_sums_match_reference(kernel):
    rng = np.random.default_rng(30)
    x, w = signs(rng, 2, 67, 5, 7), signs(rng, 70, 67, 3, 3)
    acc = reference.conv2d(x, w)
    np.testing.assert_array_equal(conv(x, w, kernel=kernel, clamp=True), np.maximum(acc, 0))


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_directions_may_be_bool_or_uint8(dtype):
    rng = np.random.default_rng(31)
    x, w = signs(rng, 1, 16, 4, 4), signs(rng, 9, 16, 3, 3)
    below = (np.arange(9) % 3 * 100).astype(dtype)  # Any number but zero means below.
    expected = reference.pack(reference.bits_of(reference.conv2d(x, w), 2, below != 0))
    got = conv(x, w, "bits", threshold=2, threshold_below=below)
    np.testing.assert_array_equal(got, expected)


def test_bits_are_taken_before_the_output_is_rounded():
    x, w = np.ones((1, 3, 1, 1), np.int8), np.ones((2, 3, 1, 1), np.int8)
    bias = np.array([2.0**-12, -(2.0**-12)], np.float32)
    y, bits = conv(x, w, np.float16, bias=bias, threshold=3.0, with_bits=True)
    np.testing.assert_array_equal(y.reshape(-1), [3, 3])
    assert bits.reshape(-1)[0] == 0b01


def test_negative_scale_flips_the_bits():
    rng = np.random.default_rng(12)
    x, w = signs(rng, 1, 33, 6, 6), signs(rng, 9, 33, 3, 3)
    acc = reference.conv2d(x, w)
    assert not np.any(acc == 0)  # 297 terms: odd.
    scale = np.full(9, -0.25, np.float32)
    np.testing.assert_array_equal(conv(x, w, "bits", scale=scale), reference.pack(acc < 0))


def test_nan_and_infinite_factors_follow_the_formula():
    rng = np.random.default_rng(13)
    x, w = signs(rng, 1, 16, 4, 4), signs(rng, 4, 16, 1, 1)
    acc = reference.conv2d(x, w)
    assert np.any(acc == 0)
    assert np.any(acc > 0)
    bias = np.array([np.nan, np.inf, -np.inf, 0], np.float32)
    scale = np.array([1, 1, 1, np.inf], np.float32)
    with np.errstate(invalid="ignore"):
        y = reference.epilogue(acc, scale, bias)
    for out_type, kernel in itertools.product(FLOAT_TYPES, KERNELS):
        got = conv(x, w, out_type, kernel=kernel, scale=scale, bias=bias)
        np.testing.assert_array_equal(got, y.astype(out_type))
    got = conv(x, w, "bits", scale=scale, bias=bias)
    np.testing.assert_array_equal(got, reference.pack(y >= 0))
    got = conv(x, w, "bits", threshold=np.array([np.nan, np.inf, -np.inf, 0], np.float32))
    expected = reference.bits_of(acc, np.array([np.nan, np.inf, -np.inf, 0]))
    np.testing.assert_array_equal(got, reference.pack(expected))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_convolution_does_not_depend_on_threads(threads, kernel):
    rng = np.random.default_rng(14)
    x, w = signs(rng, 3, 70, 20, 23), signs(rng, 33, 70, 3, 3)
    expected = reference.conv2d(x, w, **GEOMETRY)
    got = conv(x, w, kernel=kernel, threads=threads, **GEOMETRY)
    np.testing.assert_array_equal(got, expected)


def test_prepared_weights_serve_every_geometry():
    rng = np.random.default_rng(15)
    w = signs(rng, 10, 24, 3, 3)
    x = signs(rng, 1, 48, 5, 5)
    prepared = prepare(w, conv_shape(x, w, groups=2))
    before = prepared.copy()
    for batch, size, stride, pad, dilation, pad_value in (
        (1, 5, 1, 0, 1, 0),
        (3, 9, 2, 1, 1, 1),
        (2, 8, 3, 2, 3, -1),
    ):
        x = signs(rng, batch, 48, size, size + 1)
        geometry = {
            "stride": (stride, stride),
            "padding": (pad,) * 4,
            "dilation": (dilation, dilation),
            "groups": 2,
            "pad_value": pad_value,
        }
        shape = conv_shape(x, w, **geometry)
        out = Guarded((batch, shape.out_height, shape.out_width, 10), np.int32)
        workspace = aligned(np.zeros(binconv.workspace_bytes(shape), np.uint8))
        binconv.binary_conv2d(
            shape, aligned(reference.pack(x > 0)), prepared, out.array, workspace=workspace
        )
        out.assert_guards_intact()
        np.testing.assert_array_equal(nchw(out.array), reference.conv2d(x, w, **geometry))
    np.testing.assert_array_equal(prepared, before)


def test_larger_buffers_than_needed_are_accepted_and_their_rest_is_untouched():
    rng = np.random.default_rng(16)
    x, w = signs(rng, 1, 24, 6, 6), signs(rng, 5, 24, 3, 3)
    shape = conv_shape(x, w)
    size = binconv.prepared_weight_bytes(shape.weight)
    prepared = Guarded((size + 32,), np.uint8)
    binconv.prepare_weight(shape.weight, aligned(reference.pack(w > 0)), prepared.array)
    assert np.all(prepared.array[size:] == POISON)
    scratch = binconv.workspace_bytes(shape)
    workspace = Guarded((scratch + 32,), np.uint8)
    out = np.zeros((1, 4, 4, 5), np.int32)
    packed = aligned(reference.pack(x > 0))
    binconv.binary_conv2d(shape, packed, prepared.array, out, workspace=workspace.array)
    np.testing.assert_array_equal(nchw(out), reference.conv2d(x, w))
    assert np.all(workspace.array[scratch:] == POISON)


def test_content_of_the_workspace_does_not_matter():
    rng = np.random.default_rng(17)
    x, w = signs(rng, 1, 200, 6, 6), signs(rng, 5, 200, 3, 3)
    for kernel in KERNELS:
        shape = conv_shape(x, w, padding=(1, 1, 1, 1), pad_value=1)
        prepared = prepare(w, shape, kernel)
        results = []
        for fill in (0, 0xFF):
            size = binconv.workspace_bytes(shape, kernel=kernel)
            workspace = aligned(np.full(size, fill, np.uint8))
            out = np.zeros((1, 6, 6, 5), np.int32)
            binconv.binary_conv2d(
                shape,
                aligned(reference.pack(x > 0)),
                prepared,
                out,
                workspace=workspace,
                kernel=kernel,
            )
            results.append(out)
        np.testing.assert_array_equal(results[0], results[1])


def test_concurrent_calls_share_inputs_and_prepared_weights():
    rng = np.random.default_rng(18)
    x, w = signs(rng, 2, 100, 12, 12), signs(rng, 20, 100, 3, 3)
    shape = conv_shape(x, w, **GEOMETRY)
    prepared, packed = prepare(w, shape), aligned(reference.pack(x > 0))
    expected = reference.conv2d(x, w, **GEOMETRY)
    outs = [np.zeros((2, 12, 12, 20), np.int32) for _ in range(4)]

    def work(out):
        for _ in range(20):
            out[...] = 0
            size = binconv.workspace_bytes(shape, threads=2)
            workspace = aligned(np.zeros(size, np.uint8))
            binconv.binary_conv2d(shape, packed, prepared, out, workspace=workspace, threads=2)
            if not np.array_equal(nchw(out), expected):
                return

    workers = [threading.Thread(target=work, args=(out,)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for out in outs:
        np.testing.assert_array_equal(nchw(out), expected)


# -------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_abs_mean_per_channel_and_per_tensor(dtype):
    rng = np.random.default_rng(19)
    for shape in ((1, 1, 1, 1), (7, 3, 3, 3), (64, 65, 3, 3), (5, 1001), (9,)):
        x = rng.standard_normal(shape).astype(dtype)
        exact = np.abs(x.astype(np.longdouble).reshape(shape[0], -1))
        for rows, mean in ((shape[0], exact.mean(axis=1)), (1, exact.mean(keepdims=True).ravel())):
            out = Guarded((rows,), np.float32)
            binconv.abs_mean(x, out.array)
            out.assert_guards_intact()
            # A sum in double is off by less than columns * 2^-53; one rounding adds half an ulp.
            np.testing.assert_allclose(out.array, mean.astype(np.float64), rtol=2**-24 + 2**-40)


def test_abs_mean_repeats_exactly_with_any_number_of_threads():
    rng = np.random.default_rng(20)
    x = rng.standard_normal((300, 1001)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        out = np.zeros(300, np.float32)
        binconv.abs_mean(x, out, threads=threads)
        results.append(out)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_abs_mean_of_nan_is_nan():
    x = np.ones((2, 9), np.float32)
    x[1, 3] = np.nan
    out = np.zeros(2, np.float32)
    binconv.abs_mean(x, out)
    np.testing.assert_array_equal(out, np.array([1, np.nan], np.float32))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_scale_channels_multiplies_in_float32_and_rounds_once(dtype, layout):
    rng = np.random.default_rng(21)
    for shape in ((2, 5, 3, 7), (1, 1, 1, 1), (1, 67, 9, 4), (0, 4, 2, 2), (3, 130, 1, 33)):
        x = (rng.standard_normal(shape) * 5).astype(dtype)
        scale = rng.standard_normal(shape[1]).astype(np.float32)
        expected = (x.astype(np.float32) * scale.reshape(-1, 1, 1)).astype(dtype)
        given = x if layout == "nchw" else nhwc(x)
        out = Guarded(given.shape, dtype)
        binconv.scale_channels(given, scale, out.array, layout=layout)
        out.assert_guards_intact()
        np.testing.assert_array_equal(out.array if layout == "nchw" else nchw(out.array), expected)


def test_scale_channels_works_in_place():
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    expected = x * np.array([2, -3], np.float32).reshape(2, 1, 1)
    binconv.scale_channels(x, np.array([2, -3], np.float32), x)
    np.testing.assert_array_equal(x, expected)


# ------------------------------------------------------------------------------------------ queries


def test_shapes_keep_and_compute_their_sizes():
    weight = binconv.WeightShape(7, 16, 3, 5, groups=2)
    sizes = (weight.out_channels, weight.in_channels, weight.kernel_height, weight.kernel_width)
    assert (*sizes, weight.groups) == (7, 16, 3, 5, 2)
    shape = binconv.Conv2dShape(
        2, 10, 12, weight, stride=(2, 3), padding=(1, 2, 3, 4), dilation=(2, 1), pad_value=-1
    )
    assert (shape.batch, shape.in_height, shape.in_width) == (2, 10, 12)
    assert (shape.stride, shape.padding, shape.dilation) == ((2, 3), (1, 2, 3, 4), (2, 1))
    assert shape.pad_value == -1
    assert shape.out_height == (10 + 1 + 3 - 2 * 2 - 1) // 2 + 1
    assert shape.out_width == (12 + 2 + 4 - 4 - 1) // 3 + 1
    defaults = binconv.Conv2dShape(1, 4, 4, binconv.WeightShape(1, 1, 1, 1))
    assert (defaults.stride, defaults.dilation) == ((1, 1), (1, 1))
    assert (defaults.padding, defaults.pad_value) == ((0, 0, 0, 0), 0)
    assert defaults.weight.groups == 1


def test_kernel_queries_agree():
    assert KERNELS
    assert len(set(KERNELS)) == len(KERNELS)
    shape = binconv.Conv2dShape(1, 8, 8, binconv.WeightShape(8, 8, 3, 3))
    assert binconv.kernel_name(shape) in KERNELS
    for kernel in KERNELS:
        assert binconv.kernel_name(shape, kernel=kernel) == kernel


def test_build_queries():
    assert binconv.version() == binconv.__version__
    assert len(binconv.version().split(".")) == 3
    assert isinstance(binconv.cuda_architectures(), str)
    for name, capability in binconv.cuda_devices():
        assert isinstance(name, str)
        assert capability >= 10


def test_cpu_only_build_has_no_cuda_kernels():
    if binconv.cuda_architectures():
        pytest.skip("built with CUDA")
    assert binconv.cuda_devices() == []
    with pytest.raises(NotImplementedError, match="CUDA"):
        binconv.available_kernels(device=0)


# ------------------------------------------------------------------------------- values in one call


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", VALUE_TYPES)
@pytest.mark.parametrize("threshold", [None, 0.5, "channels"])
@pytest.mark.parametrize(("channels", "kernel", "padding"), [(13, 3, 1), (64, 1, 0), (136, 1, 0)])
def test_convolution_of_values_with_a_prepared_weight(
    fuzz_seed, layout, dtype, threshold, channels, kernel, padding
):
    rng = np.random.default_rng(fuzz_seed)
    x = (rng.integers(-8, 9, (3, channels, 7, 6)) / 2).astype(dtype)
    w = signs(rng, 12, channels, kernel, kernel)
    if threshold == "channels":
        threshold = (rng.integers(-4, 5, channels) / 2).astype(np.float32)
    shape = conv_shape(x, w, stride=(2, 1), padding=(padding,) * 4, pad_value=1)
    workspace = Guarded((binconv.workspace_bytes(shape, values=True),), np.uint8)
    out = Guarded((3, shape.out_height, shape.out_width, 12), np.int32)
    binconv.binary_conv2d(
        shape,
        nhwc(x) if layout == "nhwc" else x,
        prepare(w, shape),
        out.array,
        workspace=workspace.array,
        input_layout=layout,
        input_threshold=threshold,
    )
    bits = reference.bits_of(x, 0.0 if threshold is None else threshold)
    expected = reference.conv2d(
        np.where(bits, 1, -1), w, stride=(2, 1), padding=(padding,) * 4, pad_value=1
    )
    np.testing.assert_array_equal(nchw(out.array), expected)
    out.assert_guards_intact()
    workspace.assert_guards_intact()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("weight_layout", ["nchw", "nhwc", "prepared"])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("mean_scale", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(13, 1), (128, 1), (150, 1), (64, 4)])
def test_convolution_of_values_is_that_of_their_bits(
    fuzz_seed, layout, weight_layout, clips, mean_scale, channels, groups
):
    rng = np.random.default_rng(fuzz_seed)

    def placed(values, memory):
        return nhwc(values) if memory == "nhwc" else values

    x = rng.standard_normal((3, channels, 7, 6)).astype(np.float32)
    w = rng.standard_normal((12, channels // groups, 3, 2)).astype(np.float32)
    threshold = rng.standard_normal(channels).astype(np.float32) / 2
    scale, bias = (random_factors(rng, 12) for _ in range(2))
    geometry = {"stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2), "pad_value": -1}
    shape = conv_shape(x, w, groups, **geometry)
    residual = rng.standard_normal((3, 12, shape.out_height, shape.out_width)).astype(np.float32)
    is_prepared = weight_layout == "prepared"
    mean_scale = mean_scale and not is_prepared
    if mean_scale:
        scale = Guarded((12,), np.float32).array
    scratch = Guarded((binconv.sign_conv2d_bytes(shape, prepared=is_prepared),), np.uint8)
    bits, inside = (Guarded((3, 7, 6, packed_bytes(channels)), np.uint8) for _ in range(2))
    out = Guarded(placed(residual, layout).shape, np.float32)
    binconv.sign_conv2d(
        shape,
        placed(x, layout),
        prepare(np.where(w >= 0, 1, -1), shape) if is_prepared else placed(w, weight_layout),
        bits.array,
        out.array,
        scratch.array,
        layout=layout,
        weight_layout="nchw" if is_prepared else weight_layout,
        threshold=threshold,
        inside=inside.array if clips else None,
        limit=0.75,
        scale=scale,
        mean_scale=mean_scale,
        bias=bias,
        residual=placed(residual, layout),
    )
    if mean_scale:
        means = np.abs(w.astype(np.float64)).mean((1, 2, 3))
        np.testing.assert_array_max_ulp(scale, means.astype(np.float32))
    of_x = reference.bits_of(x, threshold)
    acc = reference.conv2d(
        np.where(of_x, 1, -1), np.where(w >= 0, 1, -1), groups=groups, **geometry
    )
    expected = reference.epilogue(acc, scale, bias, residual)
    y = nchw(out.array) if layout == "nhwc" else out.array
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(bits.array, reference.pack(of_x))
    if clips:
        kept = reference.inside_of(x, threshold, 0.75)
        np.testing.assert_array_equal(inside.array, reference.pack(kept))
    for array in (bits, inside, out, scratch):
        array.assert_guards_intact()


# ---------------------------------------------------------------------------------------- gradients


def narrow_bits(rng, bits, pixel_bytes):
    """Of booleans (N,C,H,W), at an odd address, with noise in what nobody may read."""
    channels = bits.shape[1]
    packed = rng.integers(0, 256, (bits.shape[0], *bits.shape[2:], pixel_bytes), np.uint8)
    for c in range(channels):
        packed[..., c // 8] &= ~np.uint8(1 << c % 8)
        packed[..., c // 8] |= bits[:, c].astype(np.uint8) << np.uint8(c % 8)
    return aligned(packed, offset=1)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("channels", [5, 64, 150])
@pytest.mark.parametrize("spare_bytes", [0, 3])
def test_operands_and_mask_of_backward(fuzz_seed, layout, dtype, channels, spare_bytes):
    rng = np.random.default_rng(fuzz_seed)

    def placed(values):
        return nhwc(values) if layout == "nhwc" else values

    bits = rng.random((3, channels, 5, 8)) < 0.5
    kept = narrow_bits(rng, bits, (channels + 7) // 8 + spare_bytes)
    weight = rng.standard_normal((6, channels, 3, 2)).astype(np.float16)
    weight[0, 0] = [[0.0, -0.0], [np.nan, np.inf], [-np.inf, -6e-8]]
    scale = random_factors(rng, 6)
    signs_out, filters = (Guarded(placed(a).shape, dtype) for a in (bits, weight))
    binconv.sign_conv2d_operands(
        kept, placed(weight), signs_out.array, filters.array, layout=layout, scale=scale
    )
    signs_out.assert_guards_intact()
    filters.assert_guards_intact()
    np.testing.assert_array_equal(signs_out.array, placed(np.where(bits, 1, -1)))
    column = scale.reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(
        filters.array, placed(np.where(weight >= 0, column, -column)).astype(dtype)
    )

    x = rng.standard_normal(bits.shape).astype(dtype)
    x[0, 0, 0] = [np.nan, np.inf, -np.inf, -0.0] * 2
    masked = Guarded(placed(x).shape, dtype)
    masked.array[...] = placed(x)
    binconv.mask_values(masked.array, kept, layout=layout)
    masked.assert_guards_intact()
    expected = placed(np.where(bits, x, dtype(0)))
    np.testing.assert_array_equal(masked.array, expected)
    np.testing.assert_array_equal(np.signbit(masked.array), np.signbit(expected))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("weight_dtype", VALUE_TYPES)
@pytest.mark.parametrize("limit", [0.0, 0.75, np.inf])
@pytest.mark.parametrize("has_scale", [False, True])
def test_gradient_of_a_weight(fuzz_seed, dtype, weight_dtype, limit, has_scale):
    rng = np.random.default_rng(fuzz_seed)
    gradient = rng.standard_normal((6, 3, 3, 70)).astype(dtype)
    gradient[1, 0, 0, :2] = np.nan, np.inf
    weight = (rng.integers(-8, 9, gradient.shape) / 4).astype(weight_dtype)
    if weight_dtype != np.int8:
        weight[0, 0, 0, :4] = np.nextafter(weight_dtype(0.75), weight_dtype(1)), np.nan, 0.0, -0.0
    scale = random_factors(rng, 6) if has_scale else None
    out = Guarded(gradient.shape, np.float16)
    binconv.weight_gradient(gradient, weight, out.array, scale=scale, limit=limit)
    out.assert_guards_intact()
    product = gradient.astype(np.float32)
    if has_scale:
        product = product * scale.reshape(-1, 1, 1, 1)
    passes = (np.abs(weight.astype(np.float32)) <= limit) | (limit == np.inf)
    expected = np.where(passes, product, np.float32(0)).astype(np.float16)
    np.testing.assert_array_equal(out.array, expected)


# ---------------------------------------------------------------------------------------- bad input
# Each case names the function, the arguments to replace in a call that works, the error, the
# argument that the message must name, and what it must say that it got.


def valid_arguments(function):
    rng = np.random.default_rng(22)
    x, w = signs(rng, 2, 16, 5, 5), signs(rng, 8, 16, 3, 3)
    shape = conv_shape(x, w)
    if function == "pack_bits":
        return {"x": x.astype(np.float32), "out": Guarded((2, 5, 5, 16), np.uint8)}
    if function == "pack_bits_and_clip":
        out, inside = (Guarded((2, 5, 5, 16), np.uint8) for _ in range(2))
        return {"x": x.astype(np.float32), "out": out, "inside": inside}
    if function == "unpack_bits":
        return {"packed": aligned(reference.pack(x > 0)), "out": Guarded(x.shape, np.float32)}
    if function == "prepare_weight":
        size = binconv.prepared_weight_bytes(shape.weight)
        packed = aligned(reference.pack(w > 0))
        return {"shape": shape.weight, "packed": packed, "out": Guarded((size,), np.uint8)}
    if function == "binary_conv2d":
        return {
            "shape": shape,
            "input": aligned(reference.pack(x > 0)),
            "prepared_weight": prepare(w, shape),
            "out": Guarded((2, 3, 3, 8), np.float32),
            "workspace": aligned(np.zeros(max(64, binconv.workspace_bytes(shape)), np.uint8)),
        }
    if function == "sign_conv2d":
        return {
            "shape": shape,
            "x": x.astype(np.float32),
            "weight": w.astype(np.float32),
            "bits": Guarded((2, 5, 5, 16), np.uint8),
            "out": Guarded((2, 8, 3, 3), np.float32),
            "scratch": Guarded((binconv.sign_conv2d_bytes(shape),), np.uint8),
        }
    if function == "sign_conv2d_operands":
        return {
            "bits": np.zeros((2, 5, 5, 2), np.uint8),
            "weight": w.astype(np.float32),
            "signs": Guarded((2, 16, 5, 5), np.float32),
            "filters": Guarded((8, 16, 3, 3), np.float32),
        }
    if function == "mask_values":
        return {"x": Guarded((2, 16, 5, 5), np.float32), "bits": np.zeros((2, 5, 5, 2), np.uint8)}
    if function == "weight_gradient":
        values = w.astype(np.float32)
        return {"gradient": values, "weight": values, "out": Guarded((8, 16, 3, 3), np.float32)}
    if function == "abs_mean":
        return {"x": w.astype(np.float32), "out": Guarded((8,), np.float32)}
    factors = np.ones(16, np.float32)
    return {"x": x.astype(np.float32), "scale": factors, "out": Guarded(x.shape, np.float32)}


FUNCTIONS = (
    "pack_bits",
    "pack_bits_and_clip",
    "unpack_bits",
    "prepare_weight",
    "binary_conv2d",
    "sign_conv2d",
    "sign_conv2d_operands",
    "mask_values",
    "weight_gradient",
    "abs_mean",
    "scale_channels",
)
OUTPUTS = {"sign_conv2d_operands": "signs", "mask_values": "x"}  # Of the others, out.


def call(function, arguments):
    arguments = {
        name: value.array if isinstance(value, Guarded) else value
        for name, value in arguments.items()
    }
    getattr(binconv, function)(**arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_arguments_that_bad_input_starts_from_work(function):
    arguments = valid_arguments(function)
    call(function, arguments)
    for value in arguments.values():
        if isinstance(value, Guarded):
            value.assert_guards_intact()


def poisoned(*shape, dtype=np.float32, offset=0):
    return Guarded(shape, dtype, offset)


def read_only(guarded):
    guarded.array.flags.writeable = False
    return guarded


def every_other(*shape, dtype=np.float32):
    """Out of a guarded array, every second element of the last dimension."""
    guarded = Guarded((*shape[:-1], 2 * shape[-1]), dtype)
    whole = guarded.array
    guarded.array = whole[..., ::2]
    guarded.assert_untouched = lambda: np.testing.assert_array_equal(
        whole.reshape(-1).view(np.uint8), POISON
    )
    return guarded


def weight_shape(**changes):
    sizes = {"out_channels": 8, "in_channels": 16, "kernel_height": 3, "kernel_width": 3}
    return binconv.WeightShape(**(sizes | changes))


def image_shape(weight=None, **changes):
    sizes = {"batch": 2, "in_height": 5, "in_width": 5, "weight": weight or weight_shape()}
    return binconv.Conv2dShape(**(sizes | changes))


def floats(*shape):
    return np.ones(shape, np.float32)


def packed_zeros(*shape, offset=0):
    return aligned(np.zeros(shape, np.uint8), offset)


# (function, replaced arguments, exception, argument named, got)
BAD_ARRAYS = [
    # No arrays at all.
    *(
        (function, {name: value}, TypeError, name, got)
        for function, names in (
            ("pack_bits", ("x", "out")),
            ("pack_bits_and_clip", ("x", "out", "inside")),
            ("unpack_bits", ("packed", "out")),
            ("prepare_weight", ("packed", "out")),
            ("binary_conv2d", ("input", "prepared_weight", "out")),
            ("sign_conv2d", ("x", "weight", "bits", "out", "scratch")),
            ("sign_conv2d_operands", ("bits", "weight", "signs", "filters")),
            ("mask_values", ("x", "bits")),
            ("weight_gradient", ("gradient", "weight", "out")),
            ("abs_mean", ("x", "out")),
            ("scale_channels", ("x", "scale", "out")),
        )
        for name in names
        for value, got in ((None, "None"), ([1.0, 2.0], "list"), ("text", "str"), (3, "int"))
    ),
    *(
        ("binary_conv2d", {name: value}, TypeError, name, got)
        for name in (
            "scale",
            "bias",
            "residual",
            "workspace",
            "threshold_below",
            "bits",
            "activation",
        )
        for value, got in (([1.0], "list"), ("text", "str"), (3, "int"))
    ),
    ("pack_bits", {"threshold": 10**400}, ValueError, "threshold", "."),
    ("binary_conv2d", {"threshold": -(10**400)}, ValueError, "threshold", "."),
    ("pack_bits", {"threshold": "0.5"}, TypeError, "threshold", "str"),
    ("pack_bits", {"threshold": [0.5]}, TypeError, "threshold", "list"),
    *(
        ("pack_bits_and_clip", {"limit": limit}, ValueError, "limit", got)
        for limit, got in (
            (-1, "-1"),
            (-1e-45, "-1"),
            (np.nan, "nan"),
            (np.inf, "inf"),
            (-np.inf, "-inf"),
            (1e39, "inf"),  # As a float32.
        )
    ),
    ("binary_conv2d", {"threshold": [0.5]}, TypeError, "threshold", "list"),
    *(
        ("binary_conv2d", {"activation": parts}, TypeError, name, "list")
        for name, parts in (
            ("in_shift", ([1.0], None, None)),
            ("slope", (None, [1.0], None)),
            ("out_shift", (None, None, [1.0])),
        )
    ),
    ("binary_conv2d", {"activation": floats(8)}, TypeError, "activation", "ndarray"),
    ("binary_conv2d", {"activation": ()}, ValueError, "activation", "0"),
    ("binary_conv2d", {"activation": (None, floats(8))}, ValueError, "activation", "2"),
    # Types.
    ("binary_conv2d", {"activation": (np.ones(8), None, None)}, ValueError, "in_shift", "64"),
    (
        "binary_conv2d",
        {"activation": (None, np.ones(8, np.float16), None)},
        ValueError,
        "slope",
        "float16",
    ),
    ("binary_conv2d", {"threshold_below": floats(8)}, ValueError, "threshold_below", "float32"),
    (
        "binary_conv2d",
        {"threshold_below": np.ones(8, np.int8)},
        ValueError,
        "threshold_below",
        "int8",
    ),
    (
        "binary_conv2d",
        {"bits": poisoned(2, 3, 3, 16, dtype=np.int8)},
        ValueError,
        "bits",
        "int8",
    ),
    ("sign_conv2d", {"inside": [1.0]}, TypeError, "inside", "list"),
    ("sign_conv2d", {"x": np.ones((2, 16, 5, 5), np.int32)}, ValueError, "x", "int32"),
    ("sign_conv2d", {"x": floats(2, 5, 5, 16)}, ValueError, "x", "(2, 5, 5, 16)"),
    ("sign_conv2d", {"weight": np.ones((8, 16, 3, 3))}, ValueError, "weight", "64"),
    ("sign_conv2d", {"weight": floats(8, 16, 3, 2)}, ValueError, "weight", "(8, 16, 3, 2)"),
    ("sign_conv2d", {"weight": poisoned(7, dtype=np.uint8)}, ValueError, "weight", "7"),
    ("sign_conv2d", {"bits": poisoned(2, 5, 5, 16)}, ValueError, "bits", "float32"),
    ("sign_conv2d", {"out": poisoned(2, 3, 3, 8)}, ValueError, "out", "(2, 3, 3, 8)"),
    ("sign_conv2d", {"scratch": poisoned(99, dtype=np.uint8)}, ValueError, "scratch", "99"),
    ("sign_conv2d", {"scale": np.ones(8)}, ValueError, "scale", "64"),
    ("sign_conv2d", {"mean_scale": True}, TypeError, "scale", "None"),
    (
        "sign_conv2d",
        {"mean_scale": True, "scale": read_only(poisoned(8))},
        (TypeError, ValueError),
        "scale",
        "read-only",
    ),
    (
        "sign_conv2d",
        {"mean_scale": True, "scale": poisoned(8), "weight": np.ones((8, 16, 3, 3), np.int8)},
        ValueError,
        "weight",
        "int8",
    ),
    ("sign_conv2d", {"residual": floats(2, 3, 3, 8)}, ValueError, "residual", "(2, 3, 3, 8)"),
    ("sign_conv2d", {"layout": "hwcn"}, ValueError, "layout", "hwcn"),
    *(
        (
            "sign_conv2d",
            {"out": poisoned(2, 8, 3, 3, dtype=np.int32), name: floats(*shape)},
            ValueError,
            name,
            "int32",
        )
        for name, shape in (("scale", (8,)), ("bias", (8,)), ("residual", (2, 8, 3, 3)))
    ),
    *(
        (function, {name: value}, ValueError, name, got)
        for function, name, value, got in (
            ("sign_conv2d_operands", "bits", np.zeros((2, 5, 5, 1), np.uint8), "(2, 5, 5, 1)"),
            ("sign_conv2d_operands", "bits", np.zeros((2, 5, 4, 2), np.uint8), "(2, 5, 4, 2)"),
            ("sign_conv2d_operands", "bits", np.zeros((50, 2), np.uint8), "(50, 2)"),
            ("sign_conv2d_operands", "bits", np.zeros((2, 5, 5, 2), np.int8), "int8"),
            ("sign_conv2d_operands", "weight", np.ones((8, 16, 3, 3)), "64"),
            ("sign_conv2d_operands", "weight", floats(8, 144), "(8, 144)"),
            ("sign_conv2d_operands", "signs", poisoned(2, 16, 5, 5, dtype=np.int8), "int8"),
            ("sign_conv2d_operands", "filters", poisoned(8, 16, 9), "(8, 16, 9)"),
            ("sign_conv2d_operands", "filters", poisoned(8, 16, 3, 3, dtype=np.int8), "int8"),
            ("sign_conv2d_operands", "scale", floats(16), "(16,)"),
            ("sign_conv2d_operands", "layout", "hwcn", "hwcn"),
            ("mask_values", "x", poisoned(2, 16, 5, 5, dtype=np.int8), "int8"),
            ("mask_values", "x", poisoned(2, 16, 25), "(2, 16, 25)"),
            ("mask_values", "bits", np.zeros((2, 5, 5, 1), np.uint8), "(2, 5, 5, 1)"),
            ("mask_values", "bits", floats(2, 5, 5, 2), "float32"),
            ("mask_values", "layout", "hwcn", "hwcn"),
            ("weight_gradient", "gradient", floats(8, 16, 3, 2), "(8, 16, 3, 2)"),
            ("weight_gradient", "gradient", np.ones((8, 16, 3, 3), np.int8), "int8"),
            ("weight_gradient", "weight", np.ones((8, 16, 3, 3), np.int32), "int32"),
            ("weight_gradient", "out", poisoned(8, 3, 3, 16), "(8, 3, 3, 16)"),
            ("weight_gradient", "out", poisoned(8, 16, 3, 3, dtype=np.int8), "int8"),
            ("weight_gradient", "scale", np.ones(8), "64"),
            ("weight_gradient", "limit", -1e-45, "-1"),
            ("weight_gradient", "limit", np.nan, "nan"),
        )
    ),
    ("pack_bits", {"x": np.ones((2, 16, 5, 5))}, ValueError, "x", "64"),
    ("pack_bits", {"x": np.ones((2, 16, 5, 5), np.int32)}, ValueError, "x", "int32"),
    ("pack_bits", {"x": np.ones((2, 16, 5, 5), np.uint8)}, ValueError, "x", "uint8|bits"),
    ("pack_bits", {"x": np.ones((2, 16, 5, 5), bool)}, ValueError, "x", "bool|8"),
    ("pack_bits", {"x": np.ones((2, 16, 5, 5), np.complex64)}, ValueError, "x", "complex|64"),
    ("pack_bits", {"out": poisoned(2, 5, 5, 16, dtype=np.int8)}, ValueError, "out", "int8"),
    ("pack_bits", {"out": poisoned(2, 5, 5, 16)}, ValueError, "out", "float32"),
    (
        "pack_bits_and_clip",
        {"inside": poisoned(2, 5, 5, 16, dtype=np.int8)},
        ValueError,
        "inside",
        "int8",
    ),
    ("pack_bits_and_clip", {"inside": poisoned(2, 5, 5, 16)}, ValueError, "inside", "float32"),
    ("pack_bits_and_clip", {"threshold": np.zeros(16)}, ValueError, "threshold", "64"),
    ("pack_bits", {"threshold": np.zeros(16)}, ValueError, "threshold", "64"),
    ("pack_bits", {"threshold": np.zeros(16, np.float16)}, ValueError, "threshold", "float16"),
    ("unpack_bits", {"packed": np.zeros((2, 5, 5, 16), np.int8)}, ValueError, "packed", "int8"),
    ("unpack_bits", {"out": poisoned(2, 16, 5, 5, dtype=np.int32)}, ValueError, "out", "int32"),
    (
        "unpack_bits",
        {"out": poisoned(2, 16, 5, 5, dtype=np.uint8)},
        ValueError,
        "out",
        "uint8|bits",
    ),
    ("unpack_bits", {"out": poisoned(2, 16, 5, 5, dtype=np.float64)}, ValueError, "out", "64"),
    ("prepare_weight", {"packed": np.zeros((8, 3, 3, 16), np.int8)}, ValueError, "packed", "int8"),
    ("prepare_weight", {"out": poisoned(99_999, dtype=np.int8)}, ValueError, "out", "int8"),
    ("binary_conv2d", {"input": np.zeros((2, 5, 5, 16), np.int32)}, ValueError, "input", "int32"),
    ("binary_conv2d", {"input": floats(2, 16, 5, 5)}, ValueError, "input", "(2, 16, 5, 5)"),
    (
        "binary_conv2d",
        {"input": floats(2, 5, 5, 16), "workspace": None},
        ValueError,
        "workspace",
        "None",
    ),
    ("binary_conv2d", {"input_layout": "hwcn"}, ValueError, "input_layout", "hwcn"),
    ("binary_conv2d", {"input_threshold": 0.5}, ValueError, "input_threshold", "one"),
    ("binary_conv2d", {"input_threshold": [0.5]}, TypeError, "input_threshold", "list"),
    ("binary_conv2d", {"input_threshold": floats(8)}, ValueError, "input_threshold", "(8,)"),
    (
        "binary_conv2d",
        {"prepared_weight": np.zeros(99_999, np.float32)},
        ValueError,
        "prepared_weight",
        "float32",
    ),
    ("binary_conv2d", {"out": poisoned(2, 3, 3, 8, dtype=np.int8)}, ValueError, "out", "int8"),
    ("binary_conv2d", {"out": poisoned(2, 3, 3, 8, dtype=np.int64)}, ValueError, "out", "64"),
    ("binary_conv2d", {"out": poisoned(2, 3, 3, 8, dtype=np.float64)}, ValueError, "out", "64"),
    ("binary_conv2d", {"scale": np.ones(8)}, ValueError, "scale", "64"),
    ("binary_conv2d", {"bias": np.ones(8, np.float16)}, ValueError, "bias", "float16"),
    ("binary_conv2d", {"threshold": np.ones(8, np.int32)}, ValueError, "threshold", "int32"),
    ("binary_conv2d", {"residual": np.ones((2, 3, 3, 8), np.int8)}, ValueError, "residual", "int8"),
    ("binary_conv2d", {"residual": np.ones((2, 3, 3, 8))}, ValueError, "residual", "64"),
    ("binary_conv2d", {"workspace": floats(9_999)}, ValueError, "workspace", "float32"),
    ("abs_mean", {"x": np.ones((8, 4), np.int8)}, ValueError, "x", "int8"),
    ("abs_mean", {"out": poisoned(8, dtype=np.float16)}, ValueError, "out", "float16"),
    ("scale_channels", {"x": np.ones((2, 16, 5, 5), np.int8)}, ValueError, "out|x", "float32|int8"),
    (
        "scale_channels",
        {"out": poisoned(2, 16, 5, 5, dtype=np.float16)},
        ValueError,
        "out",
        "float16",
    ),
    ("scale_channels", {"scale": np.ones(16)}, ValueError, "scale", "64"),
    # Ranks and shapes.
    ("pack_bits", {"x": floats(16, 5, 5)}, ValueError, "x", "(16, 5, 5)"),
    ("pack_bits", {"x": floats(2, 16, 5, 5, 1)}, ValueError, "x", "(2, 16, 5, 5, 1)"),
    ("pack_bits", {"x": np.float32(1).reshape(())}, ValueError, "x", "()"),
    ("pack_bits", {"x": floats(2, 0, 5, 5)}, ValueError, "channels|x", "0"),
    (
        "pack_bits",
        {"out": poisoned(2, 5, 5, 32, dtype=np.uint8)},
        ValueError,
        "out",
        "(2, 5, 5, 32)",
    ),
    (
        "pack_bits",
        {"out": poisoned(2, 16, 5, 5, dtype=np.uint8)},
        ValueError,
        "out",
        "(2, 16, 5, 5)",
    ),
    ("pack_bits", {"out": poisoned(800, dtype=np.uint8)}, ValueError, "out", "(800,)"),
    ("pack_bits", {"layout": "nhwc"}, ValueError, "out", "(2, 5, 5, 16)"),
    *(
        (
            "pack_bits_and_clip",
            {"inside": poisoned(*shape, dtype=np.uint8)},
            ValueError,
            "inside",
            str(shape),
        )
        for shape in ((2, 5, 5, 32), (2, 16, 5, 5), (1, 5, 5, 16), (800,))
    ),
    ("pack_bits_and_clip", {"threshold": floats(15)}, ValueError, "threshold", "(15,)"),
    ("pack_bits", {"threshold": floats(15)}, ValueError, "threshold", "(15,)"),
    ("pack_bits", {"threshold": floats(16, 1)}, ValueError, "threshold", "(16, 1)"),
    ("unpack_bits", {"packed": packed_zeros(2, 5, 5, 32)}, ValueError, "packed", "(2, 5, 5, 32)"),
    ("unpack_bits", {"packed": packed_zeros(50, 16)}, ValueError, "packed", "(50, 16)"),
    ("unpack_bits", {"out": poisoned(2, 129, 5, 5)}, ValueError, "packed|out", "16"),
    ("unpack_bits", {"out": poisoned(16, 5, 5)}, ValueError, "out", "(16, 5, 5)"),
    ("prepare_weight", {"packed": packed_zeros(8, 3, 16)}, ValueError, "packed", "(8, 3, 16)"),
    (
        "prepare_weight",
        {"packed": packed_zeros(7, 3, 3, 16)},
        ValueError,
        "packed",
        "(7, 3, 3, 16)",
    ),
    ("prepare_weight", {"out": poisoned(8, dtype=np.uint8)}, ValueError, "out", "8"),
    ("prepare_weight", {"out": poisoned(999, 99, dtype=np.uint8)}, ValueError, "out", "(999, 99)"),
    ("binary_conv2d", {"input": packed_zeros(2, 5, 4, 16)}, ValueError, "input", "(2, 5, 4, 16)"),
    ("binary_conv2d", {"input": packed_zeros(50, 16)}, ValueError, "input", "(50, 16)"),
    ("binary_conv2d", {"prepared_weight": packed_zeros(64)}, ValueError, "prepared_weight", "64"),
    (
        "binary_conv2d",
        {"prepared_weight": packed_zeros(999, 99)},
        ValueError,
        "prepared_weight",
        "(999, 99)",
    ),
    ("binary_conv2d", {"out": poisoned(2, 8, 3, 3)}, ValueError, "out", "(2, 8, 3, 3)"),
    ("binary_conv2d", {"layout": "nchw"}, ValueError, "out", "(2, 3, 3, 8)"),
    ("binary_conv2d", {"out": poisoned(2, 3, 4, 8)}, ValueError, "out", "(2, 3, 4, 8)"),
    ("binary_conv2d", {"out": poisoned(144)}, ValueError, "out", "(144,)"),
    (
        "binary_conv2d",
        {"out": poisoned(2, 3, 3, 8, dtype=np.uint8)},
        ValueError,
        "out",
        "(2, 3, 3, 8)",
    ),
    ("binary_conv2d", {"scale": floats(7)}, ValueError, "scale", "(7,)"),
    ("binary_conv2d", {"scale": floats(1)}, ValueError, "scale", "(1,)"),
    ("binary_conv2d", {"bias": floats(1, 8)}, ValueError, "bias", "(1, 8)"),
    ("binary_conv2d", {"residual": floats(2, 8, 3, 3)}, ValueError, "residual", "(2, 8, 3, 3)"),
    ("binary_conv2d", {"residual": floats(1, 3, 3, 8)}, ValueError, "residual", "(1, 3, 3, 8)"),
    ("binary_conv2d", {"workspace": packed_zeros(1, 4096)}, ValueError, "workspace", "(1, 4096)"),
    ("abs_mean", {"out": poisoned(2)}, ValueError, "out", "2"),
    ("abs_mean", {"out": poisoned(8, 1)}, ValueError, "out", "(8, 1)"),
    ("abs_mean", {"out": poisoned(0)}, ValueError, "out", "0"),
    ("abs_mean", {"x": floats(8, 0)}, ValueError, "x|columns", "0"),
    ("abs_mean", {"x": floats(0, 3), "out": poisoned(1)}, ValueError, "x|columns", "0"),
    ("scale_channels", {"scale": floats(15)}, ValueError, "scale", "(15,)"),
    ("scale_channels", {"x": floats(2, 16, 5)}, ValueError, "x", "(2, 16, 5)"),
    ("scale_channels", {"out": poisoned(2, 16, 5, 4)}, ValueError, "out", "(2, 16, 5, 4)"),
    (
        "binary_conv2d",
        {"activation": (None, None, floats(7))},
        ValueError,
        "out_shift",
        "(7,)",
    ),
    (
        "binary_conv2d",
        {"threshold_below": np.ones((8, 1), bool)},
        ValueError,
        "threshold_below",
        "(8, 1)",
    ),
    (
        "binary_conv2d",
        {"bits": poisoned(2, 3, 3, 32, dtype=np.uint8)},
        ValueError,
        "bits",
        "(2, 3, 3, 32)",
    ),
    # Strides and alignment.
    (
        "binary_conv2d",
        {"bits": poisoned(2, 3, 3, 16, dtype=np.uint8, offset=8)},
        ValueError,
        "bits",
        "address",
    ),
    (
        "binary_conv2d",
        {"activation": (None, aligned(floats(8), offset=2), None)},
        ValueError,
        "slope",
        "address",
    ),
    (
        "binary_conv2d",
        {"threshold_below": np.ones(16, bool)[::2]},
        ValueError,
        "threshold_below",
        "stride 2",
    ),
    ("pack_bits", {"x": floats(2, 16, 5, 10)[..., ::2]}, ValueError, "x", "stride 2"),
    ("pack_bits", {"x": floats(2, 16, 5, 5)[:, :, ::-1]}, ValueError, "x", "stride -5"),
    ("pack_bits", {"x": floats(2, 5, 5, 16).transpose(0, 3, 1, 2)}, ValueError, "x", "stride"),
    ("pack_bits", {"x": np.broadcast_to(floats(1), (2, 16, 5, 5))}, ValueError, "x", "stride 0"),
    ("pack_bits", {"out": every_other(2, 5, 5, 16, dtype=np.uint8)}, ValueError, "out", "stride 2"),
    (
        "pack_bits_and_clip",
        {"inside": every_other(2, 5, 5, 16, dtype=np.uint8)},
        ValueError,
        "inside",
        "stride 2",
    ),
    *(
        (
            "pack_bits_and_clip",
            {"inside": poisoned(2, 5, 5, 16, dtype=np.uint8, offset=offset)},
            ValueError,
            "inside",
            "address",
        )
        for offset in (1, 8)
    ),
    ("pack_bits", {"threshold": floats(32)[::2]}, ValueError, "threshold", "stride 2"),
    (
        "pack_bits",
        {"out": poisoned(2, 5, 5, 16, dtype=np.uint8, offset=1)},
        ValueError,
        "out",
        "address",
    ),
    (
        "unpack_bits",
        {"packed": packed_zeros(2, 5, 5, 32)[..., :16]},
        ValueError,
        "packed",
        "stride",
    ),
    (
        "unpack_bits",
        {"packed": packed_zeros(2, 5, 5, 16, offset=1)},
        ValueError,
        "packed",
        "address",
    ),
    (
        "unpack_bits",
        {"packed": packed_zeros(2, 5, 5, 16, offset=8)},
        ValueError,
        "packed",
        "address",
    ),
    ("unpack_bits", {"out": every_other(2, 16, 5, 5)}, ValueError, "out", "stride 2"),
    ("unpack_bits", {"out": poisoned(2, 16, 5, 5, offset=2)}, ValueError, "out", "address"),
    (
        "prepare_weight",
        {"packed": packed_zeros(8, 3, 3, 16, offset=1)},
        ValueError,
        "packed",
        "address",
    ),
    (
        "prepare_weight",
        {"out": poisoned(99_999, dtype=np.uint8, offset=1)},
        ValueError,
        "out",
        "address",
    ),
    ("prepare_weight", {"out": every_other(99_999, dtype=np.uint8)}, ValueError, "out", "stride 2"),
    (
        "binary_conv2d",
        {"input": packed_zeros(2, 5, 5, 16, offset=1)},
        ValueError,
        "input",
        "address",
    ),
    (
        "binary_conv2d",
        {"input": packed_zeros(2, 5, 10, 16)[:, :, ::2]},
        ValueError,
        "input",
        "stride",
    ),
    (
        "binary_conv2d",
        {"prepared_weight": packed_zeros(99_999, offset=1)},
        ValueError,
        "prepared_weight",
        "address",
    ),
    ("binary_conv2d", {"out": every_other(2, 3, 3, 8)}, ValueError, "out", "stride 2"),
    ("binary_conv2d", {"out": poisoned(2, 3, 3, 8, offset=1)}, ValueError, "out", "address"),
    (
        "binary_conv2d",
        {"out": poisoned(2, 3, 3, 16, dtype=np.uint8, offset=1)},
        ValueError,
        "out",
        "address",
    ),
    ("binary_conv2d", {"scale": floats(16)[::2]}, ValueError, "scale", "stride 2"),
    ("binary_conv2d", {"bias": np.broadcast_to(floats(1), 8)}, ValueError, "bias", "stride 0"),
    ("binary_conv2d", {"bias": aligned(floats(8), offset=2)}, ValueError, "bias", "address"),
    (
        "binary_conv2d",
        {"residual": floats(2, 3, 3, 16)[..., ::2]},
        ValueError,
        "residual",
        "stride 2",
    ),
    ("abs_mean", {"x": floats(8, 10)[:, ::2]}, ValueError, "x", "stride 2"),
    ("abs_mean", {"out": every_other(8)}, ValueError, "out", "stride 2"),
    ("scale_channels", {"x": floats(2, 16, 5, 10)[..., ::2]}, ValueError, "x", "stride 2"),
    ("scale_channels", {"out": every_other(2, 16, 5, 5)}, ValueError, "out", "stride 2"),
    # Combinations of the epilogue.
    *(
        (
            "binary_conv2d",
            {name: value, "out": poisoned(2, 3, 3, 8, dtype=np.int32)},
            ValueError,
            name,
            "int32",
        )
        for name, value in (
            ("scale", floats(8)),
            ("bias", floats(8)),
            ("residual", floats(2, 3, 3, 8)),
            ("threshold", floats(8)),
            ("threshold", 0.5),
            ("activation", (None, None, None)),
            ("threshold_below", np.ones(8, bool)),
            ("bits", poisoned(2, 3, 3, 16, dtype=np.uint8)),
        )
    ),
    (
        "binary_conv2d",
        {
            "bits": poisoned(2, 3, 3, 16, dtype=np.uint8),
            "out": poisoned(2, 3, 3, 16, dtype=np.uint8),
        },
        ValueError,
        "bits",
        "uint8",
    ),
    ("binary_conv2d", {"threshold_below": np.ones(8, bool)}, ValueError, "threshold_below", "floa"),
    ("binary_conv2d", {"threshold": floats(8)}, ValueError, "threshold", "float32"),
    ("binary_conv2d", {"threshold": 0.5}, ValueError, "threshold", "float32"),
    # Layout, stream, threads, kernel.
    *(
        (function, {"layout": "hwcn"}, ValueError, "layout", "hwcn")
        for function in (
            "pack_bits",
            "pack_bits_and_clip",
            "unpack_bits",
            "binary_conv2d",
            "scale_channels",
        )
    ),
    (
        "binary_conv2d",
        {"layout": "hwcn", "out": poisoned(2, 3, 3, 16, dtype=np.uint8)},
        ValueError,
        "layout",
        "hwcn",
    ),
    *((function, {"stream": 0}, ValueError, "stream", "0") for function in FUNCTIONS),
    *((function, {"threads": 0}, ValueError, "threads", "0") for function in FUNCTIONS),
    *((function, {"threads": -3}, ValueError, "threads", "-3") for function in FUNCTIONS),
    ("prepare_weight", {"kernel": "cpu_nonsense"}, ValueError, "kernel", "cpu_nonsense"),
    ("binary_conv2d", {"kernel": "cpu_nonsense"}, ValueError, "kernel", "cpu_nonsense"),
    ("binary_conv2d", {"kernel": ""}, ValueError, "kernel", '""'),
    # Sizes of the shape that the arrays do not have.
    ("prepare_weight", {"shape": {"groups": 3}}, ValueError, "groups", "3"),
    ("prepare_weight", {"shape": {"groups": 0}}, ValueError, "groups", "0"),
    ("prepare_weight", {"shape": {"groups": 4}}, ValueError, "groups", "4"),
    ("prepare_weight", {"shape": {"in_channels": 300}}, ValueError, "out|packed", "[0-9]+"),
    ("binary_conv2d", {"shape": {"pad_value": 2}}, ValueError, "pad_value", "2"),
    ("binary_conv2d", {"shape": {"pad_value": -2}}, ValueError, "pad_value", "-2"),
    ("binary_conv2d", {"shape": {"stride": (0, 1)}}, ValueError, "stride_height", "0"),
    ("binary_conv2d", {"shape": {"dilation": (1, -1)}}, ValueError, "dilation_width", "-1"),
    ("binary_conv2d", {"shape": {"padding": (0, 0, 0, -1)}}, ValueError, "pad_right", "-1"),
    ("binary_conv2d", {"shape": {"batch": -1}}, ValueError, "batch", "-1"),
    ("binary_conv2d", {"shape": {"batch": 3}}, ValueError, "input|out", "2"),
    ("binary_conv2d", {"shape": {"in_height": 2}}, ValueError, "kernel_height", "3"),
    ("binary_conv2d", {"shape": {"dilation": (1, 3)}}, ValueError, "kernel_width", "7"),
]


def bad_id(value):
    if isinstance(value, dict):
        plain = {k: v for k, v in value.items() if isinstance(v, (int, float, str, tuple, dict))}
        return ",".join(f"{k}={plain[k]}"[:60] if k in plain else k for k in value)
    return value.__name__ if isinstance(value, type) else str(value)[:40]


def assert_message(message, name, got):
    """The message names the argument, says what it got and what is expected."""
    assert re.search(rf"(?<!\w)({name})(?!\w)", message), f"{message!r} does not name {name}"
    got = re.escape(got) if "(" in got else got
    assert re.search(got, message), f"{message!r} does not say {got}"
    assert "expected" in message, f"{message!r} does not say what is expected"


@pytest.mark.parametrize(("function", "changes", "error", "name", "got"), BAD_ARRAYS, ids=bad_id)
def test_bad_argument_is_refused_by_name_and_nothing_is_written(
    function, changes, error, name, got
):
    arguments = valid_arguments(function) | changes
    if isinstance(arguments.get("shape"), dict):
        make = weight_shape if function == "prepare_weight" else image_shape
        arguments["shape"] = make(**arguments["shape"])
    with pytest.raises(error) as raised:
        call(function, arguments)
    for value in arguments.values():
        if isinstance(value, Guarded):
            value.assert_untouched()
    assert_message(str(raised.value), name, got)


@pytest.mark.parametrize(
    "dtype",
    ["float64", "int16", "int64", "uint16", "uint32", "uint64", "bool", "complex64", "complex128"],
)
def test_dtype_that_no_argument_has_is_named(dtype):
    arguments = valid_arguments("pack_bits") | {"x": np.ones((2, 16, 5, 5), dtype)}
    with pytest.raises(ValueError, match=rf"^x: got {dtype}, expected float32, float16, bfloat16"):
        call("pack_bits", arguments)
    if dtype != "bool":
        arguments = valid_arguments("binary_conv2d") | {"threshold_below": np.ones(8, dtype)}
        with pytest.raises(ValueError, match=rf"^threshold_below: got {dtype}, expected uint8 or"):
            call("binary_conv2d", arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_read_only_out_is_refused(function):
    arguments = valid_arguments(function)
    name = OUTPUTS.get(function, "out")
    read_only(arguments[name])
    with pytest.raises((TypeError, ValueError), match=rf"{name}.*expected.*writable"):
        call(function, arguments)
    arguments[name].assert_untouched()


def test_read_only_inside_is_refused():
    arguments = valid_arguments("pack_bits_and_clip")
    read_only(arguments["inside"])
    with pytest.raises((TypeError, ValueError), match=r"inside.*expected.*writable"):
        call("pack_bits_and_clip", arguments)
    arguments["inside"].assert_untouched()
    arguments["out"].assert_untouched()


@pytest.mark.parametrize("limit", [None, "1", [1.0], np.ones(16, np.float32), 10**400])
def test_limit_that_is_no_number_is_refused(limit):
    arguments = valid_arguments("pack_bits_and_clip")
    with pytest.raises((TypeError, ValueError, OverflowError), match="limit"):
        call("pack_bits_and_clip", arguments | {"limit": limit})
    arguments["inside"].assert_untouched()
    arguments["out"].assert_untouched()


def test_read_only_workspace_is_refused():
    arguments = valid_arguments("binary_conv2d")
    arguments["workspace"].flags.writeable = False
    with pytest.raises(
        (TypeError, ValueError), match=r"^workspace: got a read-only array, expected"
    ):
        call("binary_conv2d", arguments)
    arguments["out"].assert_untouched()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "values",
    [np.array([object()]), np.array(["a"]), np.ones(4, ">f4"), np.zeros(2, "datetime64[s]")],
    ids=lambda values: str(values.dtype),
)
def test_numpy_arrays_that_dlpack_cannot_carry_are_refused(function, values):
    arguments = valid_arguments(function)
    name = next(name for name in arguments if name != "shape")
    with pytest.raises((TypeError, ValueError), match=rf"(?<!\w){name}(?!\w).*got.*expected"):
        call(function, arguments | {name: values})
    arguments[OUTPUTS.get(function, "out")].assert_untouched()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("problem", ["missing", "small", "misaligned"])
def test_bad_workspace_is_refused(problem, kernel):
    rng = np.random.default_rng(23)
    x, w = signs(rng, 2, 300, 9, 9), signs(rng, 8, 300, 3, 3)
    shape = conv_shape(x, w, padding=(1, 1, 1, 1))
    size = binconv.workspace_bytes(shape, kernel=kernel)
    if size == 0:
        pytest.skip(f"{kernel} needs no workspace for this shape")
    workspace = {
        "missing": None,
        "small": packed_zeros(size - 1),
        "misaligned": packed_zeros(size + 16, offset=1),
    }[problem]
    got = {"missing": "None", "small": f"got {size - 1} bytes", "misaligned": "address"}[problem]
    out = Guarded((2, 9, 9, 8), np.int32)
    with pytest.raises(ValueError, match="workspace") as raised:
        binconv.binary_conv2d(
            shape,
            aligned(reference.pack(x > 0)),
            prepare(w, shape, kernel),
            out.array,
            workspace=workspace,
            kernel=kernel,
        )
    out.assert_untouched()
    assert_message(str(raised.value), "workspace", got)


HUGE = (2**31, 2**62, 2**63 - 1)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        *(
            ({name: value}, name)
            for name in ("out_channels", "in_channels", "kernel_height", "kernel_width", "groups")
            for value in (0, -1, -(2**63), *HUGE)
        ),
        ({"groups": 3}, "groups"),
        ({"groups": 4}, "groups"),  # 4 channels each: no whole byte.
        ({"in_channels": 24, "groups": 16}, "groups"),
        ({"out_channels": 9, "groups": 2}, "groups"),
        ({"in_channels": 2**27}, "weight|in_channels"),  # 9 * 2^27 terms: too many.
        ({"kernel_height": 2**15, "kernel_width": 2**15}, "weight|kernel_height|kernel_width"),
        ({"kernel_height": 2**31 - 1, "kernel_width": 2**31 - 1}, "weight|kernel_height"),
    ],
    ids=bad_id,
)
def test_impossible_weight_shape_is_refused(changes, name):
    shape = weight_shape(**changes)
    with pytest.raises(ValueError, match=name) as raised:
        binconv.prepared_weight_bytes(shape)
    got = str(changes[name]) if name in changes else "[0-9]"
    assert_message(str(raised.value), name, got)
    packed = packed_zeros(8, 3, 3, 16)
    for run in (
        lambda: binconv.prepare_weight(shape, packed, packed_zeros(99_999)),
        lambda: binconv.workspace_bytes(image_shape(weight=shape)),
        lambda: binconv.kernel_name(image_shape(weight=shape)),
    ):
        with pytest.raises(ValueError, match=name):
            run()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch": -1}, "batch"),
        ({"batch": -(2**63)}, "batch"),
        ({"batch": 2**62}, "batch|image|input"),
        ({"batch": 2**63 - 1}, "batch|image|input"),
        *(
            ({name: value}, name)
            for name in ("in_height", "in_width")
            for value in (0, -1, -(2**63), *HUGE)
        ),
        *(
            ({name: pair}, f"{name}_{side}")
            for name in ("stride", "dilation")
            for value in (0, -1, *HUGE)
            for side, pair in (("height", (value, 1)), ("width", (1, value)))
        ),
        *(
            ({"padding": tuple(value * (i == j) for j in range(4))}, f"pad_{side}")
            for value in (-1, *HUGE)
            for i, side in enumerate(("top", "left", "bottom", "right"))
        ),
        *(({"pad_value": value}, "pad_value") for value in (2, -2, 100, 2**31 - 1, -(2**31))),
        ({"in_height": 2}, "kernel_height"),
        ({"dilation": (3, 1)}, "kernel_height"),
        ({"in_width": 1, "padding": (0, 1, 0, 0)}, "kernel_width"),
        ({"in_height": 2**31 - 1, "in_width": 2**31 - 1}, "in_height|image|input"),
        ({"batch": 2**31, "in_height": 2**31 - 1}, "batch|image|input"),
    ],
    ids=bad_id,
)
def test_impossible_shape_is_refused(changes, name):
    shape = image_shape(**changes)
    out = Guarded((2, 3, 3, 8), np.int32)
    prepared = prepare(signs(np.random.default_rng(0), 8, 16, 3, 3), image_shape())
    for run in (
        lambda: binconv.workspace_bytes(shape),
        lambda: binconv.kernel_name(shape),
        lambda: binconv.binary_conv2d(
            shape, packed_zeros(2, 5, 5, 16), prepared, out.array, workspace=packed_zeros(4096)
        ),
    ):
        with pytest.raises(ValueError, match=name) as raised:
            run()
        assert_message(str(raised.value), name, "[0-9]")
    out.assert_untouched()


def test_shapes_compare_by_value_and_say_how_to_make_them():
    weight = binconv.WeightShape(8, 16, 3, 1, 2)
    shape = binconv.Conv2dShape(
        1, 5, 6, weight, stride=(1, 2), padding=(1, 2, 3, 4), dilation=(2, 1), pad_value=-1
    )
    for value in (weight, shape, binconv.Conv2dShape(1, 5, 6, weight)):
        assert eval(repr(value), vars(binconv)) == value
        assert value != repr(value)
        with pytest.raises(TypeError, match="unhashable"):
            hash(value)
    assert repr(weight) == (
        "WeightShape(out_channels=8, in_channels=16, kernel_height=3, kernel_width=1, groups=2)"
    )
    assert repr(shape) == (
        f"Conv2dShape(batch=1, in_height=5, in_width=6, weight={weight!r}, stride=(1, 2), "
        "padding=(1, 2, 3, 4), dilation=(2, 1), pad_value=-1)"
    )
    assert weight != binconv.WeightShape(8, 16, 3, 1)
    assert shape != binconv.Conv2dShape(1, 5, 6, weight)
    assert weight != shape


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**200, 1.5, None, "3"])
def test_sizes_that_are_no_64_bit_integers_are_refused(value):
    for name in ("out_channels", "in_channels", "kernel_height", "kernel_width", "groups"):
        with pytest.raises((TypeError, OverflowError, ValueError)):
            weight_shape(**{name: value})
    for name in ("batch", "in_height", "in_width", "pad_value"):
        with pytest.raises((TypeError, OverflowError, ValueError)):
            image_shape(**{name: value})
    for name, count in (("stride", 2), ("dilation", 2), ("padding", 4)):
        with pytest.raises((TypeError, OverflowError, ValueError)):
            image_shape(**{name: (value,) * count})
    with pytest.raises((TypeError, OverflowError, ValueError)):
        binconv.packed_bytes(value)


@pytest.mark.parametrize("channels", [0, -1, -(2**63)])
def test_packed_bytes_of_no_channels_is_refused(channels):
    with pytest.raises(ValueError, match="channels") as raised:
        binconv.packed_bytes(channels)
    assert_message(str(raised.value), "channels", str(channels))


@pytest.mark.parametrize("query", ["kernel_name", "workspace_bytes", "prepared_weight_bytes"])
def test_queries_refuse_an_unknown_kernel(query):
    shape = weight_shape() if query == "prepared_weight_bytes" else image_shape()
    with pytest.raises(ValueError, match="kernel") as raised:
        getattr(binconv, query)(shape, kernel="cpu_nonsense")
    assert_message(str(raised.value), "kernel", "cpu_nonsense")


@pytest.mark.parametrize("query", ["kernel_name", "workspace_bytes", "prepared_weight_bytes"])
def test_queries_refuse_a_device_that_is_not_there(query):
    shape = weight_shape() if query == "prepared_weight_bytes" else image_shape()
    for device, errors in ((-1, ValueError), (99, (ValueError, NotImplementedError, RuntimeError))):
        with pytest.raises(errors, match=r"device|CUDA|GPU"):
            getattr(binconv, query)(shape, device=device)


def test_kernels_of_another_device_are_refused():
    other = "cuda_direct" if "cuda_direct" not in KERNELS else "cpu_portable"
    with pytest.raises((ValueError, NotImplementedError), match="kernel"):
        binconv.kernel_name(image_shape(), kernel=other)


def test_a_shape_with_zero_stride_can_be_looked_at_without_a_crash():
    program = (
        "import binconv\n"
        "weight = binconv.WeightShape(8, 16, 3, 3)\n"
        "for stride in ((0, 1), (1, 0), (0, 0), (-1, -1), (-2**63, -2**63)):\n"
        "    shape = binconv.Conv2dShape(1, 5, 5, weight, stride=stride)\n"
        "    for size in ('out_height', 'out_width'):\n"
        "        try:\n"
        "            getattr(shape, size)\n"
        "        except ValueError as error:\n"
        "            assert 'stride' in str(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode} {done.stderr}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unknown_and_missing_arguments_are_type_errors(function):
    arguments = valid_arguments(function)
    with pytest.raises(TypeError):
        call(function, arguments | {"nonsense": 1})
    del arguments[OUTPUTS.get(function, "out")]
    with pytest.raises(TypeError):
        call(function, arguments)


@pytest.mark.parametrize("function", ["prepare_weight", "binary_conv2d"])
def test_shape_of_the_wrong_class_is_a_type_error(function):
    arguments = valid_arguments(function)
    other = image_shape() if function == "prepare_weight" else weight_shape()
    for shape in (None, (2, 5, 5), other):
        with pytest.raises(TypeError):
            call(function, arguments | {"shape": shape})
    arguments["out"].assert_untouched()


# --------------------------------------------------------------------------------- other frameworks


def torch_case(torch, device):
    rng = np.random.default_rng(24)
    x, w = signs(rng, 2, 40, 6, 7), signs(rng, 9, 40, 3, 3)
    return (
        torch.from_numpy(x).to(device),
        torch.from_numpy(reference.pack(w > 0)).to(device),
        conv_shape(x, w, **GEOMETRY),
        reference.conv2d(x, w, **GEOMETRY),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_torch_tensors_are_taken_on_their_device(device, dtype):
    torch = pytest.importorskip("torch")
    x, w, shape, expected = torch_case(torch, device)
    ordinal = None if device == "cpu" else 0
    where = {} if device == "cpu" else {"stream": torch.cuda.current_stream().cuda_stream}
    packed = torch.full((2, 6, 7, 16), 255, dtype=torch.uint8, device=device)
    binconv.pack_bits(x.to(getattr(torch, dtype)), packed, **where)
    np.testing.assert_array_equal(packed.cpu().numpy(), reference.pack(x.cpu().numpy() > 0))
    clipped, inside = torch.full_like(packed, 255), torch.full_like(packed, 255)
    binconv.pack_bits_and_clip(
        x.to(getattr(torch, dtype)), clipped, inside, threshold=-0.5, limit=0.5, **where
    )
    assert torch.equal(clipped, packed)
    np.testing.assert_array_equal(inside.cpu().numpy(), reference.pack(x.cpu().numpy() < 0))
    values = torch.zeros(2, 6, 7, 40, dtype=getattr(torch, dtype), device=device)
    binconv.unpack_bits(packed, values, layout="nhwc", **where)
    assert torch.equal(values.permute(0, 3, 1, 2).float(), x.float())

    for kernel in kernels_for(shape, ordinal):
        size = binconv.prepared_weight_bytes(shape.weight, device=ordinal, kernel=kernel)
        prepared = torch.zeros(size, dtype=torch.uint8, device=device)
        binconv.prepare_weight(shape.weight, w, prepared, kernel=kernel, **where)
        size = binconv.workspace_bytes(shape, device=ordinal, kernel=kernel)
        workspace = torch.zeros(size, dtype=torch.uint8, device=device) if size else None
        out_type = torch.int32 if dtype == "int8" else getattr(torch, dtype)
        for layout, sizes in (("nhwc", (2, 6, 7, 9)), ("nchw", (2, 9, 6, 7))):
            out = torch.zeros(sizes, dtype=out_type, device=device)
            binconv.binary_conv2d(
                shape,
                packed,
                prepared,
                out,
                layout=layout,
                workspace=workspace,
                kernel=kernel,
                **where,
            )
            got = out.permute(0, 3, 1, 2) if layout == "nhwc" else out
            exact = torch.from_numpy(expected).float().to(out_type)
            assert torch.equal(got.cpu(), exact), f"{kernel} {layout}"


def test_bfloat16_rounds_once_to_nearest_even(device):
    torch = pytest.importorskip("torch")
    x, w, shape, acc = torch_case(torch, device)
    rng = np.random.default_rng(25)
    ordinal = None if device == "cpu" else 0
    where = {} if device == "cpu" else {"stream": torch.cuda.current_stream().cuda_stream}
    scale, bias = random_factors(rng, 9), random_factors(rng, 9)
    residual = torch.from_numpy(rng.standard_normal(acc.shape) * 30).to(torch.bfloat16)
    y = reference.epilogue(acc, scale, bias, residual.float().numpy())
    expected = torch.from_numpy(y).to(torch.bfloat16)
    packed = torch.zeros((2, 6, 7, 16), dtype=torch.uint8, device=device)
    binconv.pack_bits(x, packed, **where)
    for kernel in kernels_for(shape, ordinal):
        size = binconv.prepared_weight_bytes(shape.weight, device=ordinal, kernel=kernel)
        prepared = torch.zeros(size, dtype=torch.uint8, device=device)
        binconv.prepare_weight(shape.weight, w, prepared, kernel=kernel, **where)
        size = binconv.workspace_bytes(shape, device=ordinal, kernel=kernel)
        out = torch.zeros(acc.shape, dtype=torch.bfloat16, device=device)
        binconv.binary_conv2d(
            shape,
            packed,
            prepared,
            out,
            layout="nchw",
            scale=torch.from_numpy(scale).to(device),
            bias=torch.from_numpy(bias).to(device),
            residual=residual.to(device),
            workspace=torch.zeros(size, dtype=torch.uint8, device=device) if size else None,
            kernel=kernel,
            **where,
        )
        assert torch.equal(out.cpu(), expected), kernel


def test_bfloat16_abs_mean_and_scale(device):
    torch = pytest.importorskip("torch")
    where = {} if device == "cpu" else {"stream": torch.cuda.current_stream().cuda_stream}
    generator = torch.Generator().manual_seed(26)
    x = torch.randn(4, 6, 3, 5, generator=generator).to(torch.bfloat16)
    means = torch.zeros(4, device=device)
    binconv.abs_mean(x.to(device), means, **where)
    exact = x.double().abs().flatten(1).mean(1)
    assert torch.allclose(means.cpu().double(), exact, rtol=2**-23, atol=0)
    scale = torch.randn(6, generator=generator)
    out = torch.zeros_like(x, device=device)
    binconv.scale_channels(x.to(device), scale.to(device), out, **where)
    assert torch.equal(out.cpu(), (x.float() * scale.reshape(-1, 1, 1)).to(torch.bfloat16))


@pytest.mark.gpu
def test_gpu_arrays_need_a_stream_and_one_device():
    import torch

    x = torch.ones(1, 8, 4, 4, device="cuda")
    out = torch.zeros(1, 4, 4, 16, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=r"stream: got None .* expected"):
        binconv.pack_bits(x, out)
    with pytest.raises(ValueError, match=r"threads: got 2 .* expected"):
        binconv.pack_bits(x, out, stream=0, threads=2)
    with pytest.raises(ValueError, match=r"out: got an array on cpu, expected cuda:0"):
        binconv.pack_bits(x, out.cpu(), stream=0)
    with pytest.raises(ValueError, match=r"out: got an array on cuda:0, expected cpu"):
        binconv.pack_bits(x.cpu(), out)
    assert not out.any()


def test_tensor_that_requires_grad_is_read():
    torch = pytest.importorskip("torch")
    x = torch.full((1, 8, 1, 1), -1.0, requires_grad=True)
    out = np.full((1, 1, 1, 16), 255, np.uint8)
    binconv.pack_bits(x, out)
    assert np.all(out == 0)


def test_jax_arrays_are_read():
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(27)
    x = rng.standard_normal((2, 9, 4, 5)).astype(np.float32)
    out = np.zeros((2, 4, 5, 16), np.uint8)
    on_cpu = jax.device_put(x, jax.devices("cpu")[0])
    binconv.pack_bits(on_cpu, out)
    np.testing.assert_array_equal(out, reference.pack(x >= 0))


@pytest.mark.gpu
def test_cupy_arrays_are_read_and_written():
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(28)
    x = rng.standard_normal((2, 9, 4, 5)).astype(np.float32)
    out = cupy.zeros((2, 4, 5, 16), cupy.uint8)
    binconv.pack_bits(cupy.asarray(x), out, stream=cupy.cuda.get_current_stream().ptr)
    np.testing.assert_array_equal(cupy.asnumpy(out), reference.pack(x >= 0))
