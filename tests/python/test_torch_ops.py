"""binconv.torch's functions against float64 F.conv2d on signs, which is exact."""

import itertools
import re
import shutil
import sysconfig
import threading
import warnings
from pathlib import Path

import pytest
import reference
import reference_torch
import torch
import torch.nn.functional as F
from reference_torch import assert_gradient_is, factors
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from binconv.torch import BitTensor, binary_conv2d, pack_bits, pack_weight, prepare_weight
from binconv.torch.autograd import sign_conv2d
from binconv.torch.estimators import estimator
from binconv.torch.functional import geometry_arguments
from binconv.torch.ops import is_plain_call, packed_geometry

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
VALUES = (*FLOATS, torch.int8)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_values(g, *shape, dtype=torch.float32):
    """Values of both signs, about a third of them beyond 1 in magnitude."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=g, dtype=dtype)
    return torch.randn(shape, generator=g).to(dtype)


def packed_reference(bits):
    """Booleans (N,C,H,W) -> the packed uint8 tensor."""
    return torch.from_numpy(reference.pack(bits.cpu().numpy()))


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def trained(x, device):
    """A copy of x that wants a gradient."""
    return x.detach().clone().to(device).requires_grad_()


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("dtype", VALUES, ids=name_of)
@pytest.mark.parametrize("channels", [1, 7, 33, 64, 128, 130, 512])
def test_pack_bits_matches_reference(device, channels, dtype):
    x = random_values(generator(0), 2, channels, 5, 7, dtype=dtype)
    bits = pack_bits(x.to(device))
    assert isinstance(bits, BitTensor)
    assert bits.data.dtype == torch.uint8
    assert bits.data.shape == (2, 5, 7, reference.packed_bytes(channels))
    assert bits.data.is_contiguous()
    assert bits.shape == torch.Size((2, channels, 5, 7))
    assert isinstance(bits.shape, torch.Size)
    assert bits.channels == channels
    assert bits.device == bits.data.device
    assert bits.device.type == device
    assert torch.equal(bits.data.cpu(), packed_reference(x >= 0))


# Made of tensors on the device: a copy to it would have other strides.
VIEWS = {
    "contiguous": lambda values: values(2, 12, 6, 8),
    "channels_last": lambda values: channels_last(values(2, 12, 6, 8)),
    "sliced_width": lambda values: values(2, 12, 6, 16)[..., ::2],
    "sliced_channels": lambda values: values(2, 24, 6, 8)[:, 3:15],
    "sliced_batch": lambda values: values(6, 12, 6, 8)[1::3],
    "channels_last_sliced": lambda values: channels_last(values(2, 12, 9, 9))[:, :, 1:7, :8],
    "offset_by_one_value": lambda values: values(2 * 12 * 6 * 8 + 1)[1:].view(2, 12, 6, 8),
    "expanded_batch": lambda values: values(1, 12, 6, 8).expand(2, -1, -1, -1),
    "expanded_channels": lambda values: values(2, 1, 6, 8).expand(-1, 12, -1, -1),
    "transposed": lambda values: values(2, 12, 8, 6).transpose(2, 3),
    "flipped": lambda values: values(2, 12, 6, 8).flip(3),
    "permuted": lambda values: values(8, 6, 12, 2).permute(3, 2, 1, 0),
}


def view_on(device, view):
    return VIEWS[view](lambda *shape: random_values(generator(1), *shape).to(device))


@pytest.mark.parametrize("view", VIEWS)
def test_pack_bits_takes_any_strides(device, view):
    x = view_on(device, view)
    assert torch.equal(pack_bits(x).data.cpu(), packed_reference(x >= 0))


def test_special_values_pack_by_the_convention(device):
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45])
    bits = torch.tensor([True, True, False, True, False, True, False])
    for x in (values.reshape(1, 7, 1, 1), values.reshape(1, 1, 1, 7)):
        packed = pack_bits(x.to(device))
        assert torch.equal(packed.data.cpu(), packed_reference(bits.reshape(x.shape)))
        unpacked = packed.unpack()
        assert torch.equal(unpacked.cpu().reshape(-1), bits.float() * 2 - 1)


@pytest.mark.parametrize("dtype", VALUES, ids=name_of)
@pytest.mark.parametrize("threshold", [0.5, -0.25, 3, -1e30, float("inf"), float("nan")])
def test_number_threshold(device, threshold, dtype):
    x = random_values(generator(2), 2, 33, 4, 5, dtype=dtype)
    expected = x.float() >= torch.tensor(threshold, dtype=torch.float32)
    got = pack_bits(x.to(device), threshold)
    assert torch.equal(got.data.cpu(), packed_reference(expected))


@pytest.mark.parametrize("dtype", VALUES, ids=name_of)
def test_channel_thresholds(device, dtype):
    g = generator(3)
    x = random_values(g, 2, 33, 4, 5, dtype=dtype)
    threshold = torch.randn(33, generator=g)
    threshold[::4] = x[0, ::4, 0, 0].float()
    expected = packed_reference(x.float() >= threshold.reshape(-1, 1, 1))
    x, threshold = x.to(device), threshold.to(device)
    strided = torch.stack((threshold, threshold), 1)[:, 0]
    for limits in (threshold, strided):
        assert torch.equal(pack_bits(x, limits).data.cpu(), expected)


@pytest.mark.parametrize("dtype", VALUES, ids=name_of)
def test_unpack_gives_channels_last_signs(device, dtype):
    x = random_values(generator(4), 2, 37, 4, 5)
    values = pack_bits(x.to(device)).unpack(dtype)
    assert values.dtype == dtype
    assert values.shape == x.shape
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(values.cpu().double(), reference_torch.sign(x))


def test_unpack_gives_float32_unless_told():
    assert pack_bits(torch.ones(1, 3, 2, 2)).unpack().dtype == torch.float32


def test_bit_tensor_moves_between_devices(device):
    x = random_values(generator(5), 2, 20, 3, 4)
    moved = pack_bits(x).to(device)
    assert isinstance(moved, BitTensor)
    assert moved.device.type == device
    assert moved.shape == x.shape
    assert torch.equal(moved.to("cpu").unpack().double(), reference_torch.sign(x))


def test_pack_of_an_empty_batch(device):
    bits = pack_bits(torch.zeros(0, 9, 4, 5, device=device))
    assert bits.shape == (0, 9, 4, 5)
    assert bits.data.shape == (0, 4, 5, 16)
    assert bits.unpack().shape == (0, 9, 4, 5)


def test_pack_bits_of_a_tensor_that_requires_grad(device):
    x = torch.ones(1, 3, 2, 2, device=device, requires_grad=True)
    assert not pack_bits(x).data.requires_grad


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_pack_weight_is_a_packed_image(device, dtype):
    for shape in ((5, 33, 3, 2), (1, 1, 1, 1), (7, 130, 1, 7)):
        w = random_values(generator(6), *shape, dtype=dtype)
        packed = pack_weight(w.to(device))
        expected = packed_reference(w >= 0)
        assert packed.dtype == torch.uint8
        assert torch.equal(packed.cpu(), expected)
        assert torch.equal(pack_weight(channels_last(w).to(device)).cpu(), expected)
        assert torch.equal(pack_weight(torch.nn.Parameter(w.to(device))).cpu(), expected)


def test_prepared_weight_describes_itself(device):
    w = random_values(generator(7), 6, 24, 3, 5).to(device)
    for weight, arguments in ((w, {}), (pack_weight(w), {"in_channels": 24})):
        prepared = prepare_weight(weight, groups=2, **arguments)
        assert prepared.data.dtype == torch.uint8
        assert prepared.data.dim() == 1
        assert tuple(prepared.shape) == (6, 24, 3, 5)
        assert prepared.groups == 2
        assert prepared.device == w.device
    assert prepare_weight(w).groups == 1


def test_prepared_float_and_packed_weights_are_the_same(device):
    w = random_values(generator(8), 6, 24, 3, 5).to(device)
    x = random_values(generator(9), 2, 48, 9, 9).to(device)
    acc = reference_torch.conv2d(x, w, groups=2)
    prepared = [
        prepare_weight(w, 2),
        prepare_weight(pack_weight(w), 2, 24),
        prepare_weight(channels_last(w), groups=2),
        prepare_weight(w.half(), groups=2),
    ]
    for weight in prepared:
        for groups in (1, 2):  # The default, or what was prepared.
            got = binary_conv2d(x, weight, groups=groups, out_dtype=torch.int32)
            assert torch.equal(got.cpu().double(), acc)


# -------------------------------------------------------------------------------------- convolution


def draw_shapes():
    """Every channel count with every kernel, the rest of the list drawn around them."""
    g = torch.Generator().manual_seed(2025)

    def choose(values):
        return values[int(torch.randint(len(values), (), generator=g))]

    channels = (1, 7, 8, 31, 32, 33, 48, 64, 96, 127, 128, 130, 512)
    kernels = (1, 3, 5, 7, (1, 7))
    for in_channels, kernel in itertools.product(channels, kernels):
        kernel = reference_torch.pair(kernel)
        stride, dilation = choose((1, 1, 2, 3, (1, 2))), choose((1, 1, 2, 3, (3, 1)))
        padding = choose((0, 1, 2, 3, (2, 0), kernel, (kernel[0] + 1, 1)))
        if stride == 1:
            padding = choose((padding, "same"))
        pads = reference_torch.pads_of(padding, kernel, dilation)
        extent = [
            d * (k - 1) + 1 for k, d in zip(kernel, reference_torch.pair(dilation), strict=True)
        ]
        size = [max(choose(range(1, 13)), extent[i] - pads[i] - pads[i + 2]) for i in (0, 1)]
        out_channels = choose((1, 7, 64, 130))
        divides = [k for k in (2, 4) if in_channels % (8 * k) == 0 and out_channels % k == 0]
        groups = choose((1, *divides))
        yield {
            "x": (choose((1, 2, 3)), in_channels, *size),
            "w": (out_channels, in_channels // groups, *kernel),
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "pad_value": choose((0, 1, -1)),
        }


# The shapes of the first CUTLASS layer's own tests, with smaller batches and images.
SEED_SHAPES = [
    {"x": (1, 1024, 32, 32), "w": (32, 1024, 3, 3), "stride": 2, "padding": 2},
    {"x": (2, 1024, 56, 56), "w": (64, 1024, 1, 1), "stride": 2},
    {"x": (1, 1024, 24, 24), "w": (64, 1024, 3, 3), "padding": 1},
    {"x": (1, 2048, 64, 64), "w": (64, 2048, 1, 1)},
    {"x": (1, 4096, 9, 9), "w": (128, 4096, 5, 5), "padding": 1},
]
SPECIAL_SHAPES = [
    {"x": (0, 8, 5, 5), "w": (3, 8, 3, 3)},
    {"x": (1, 8, 5, 5), "w": (3, 8, 3, 3)},
    {"x": (130, 24, 6, 5), "w": (7, 24, 3, 3), "padding": 1},
    {"x": (1, 33, 1, 1), "w": (5, 33, 3, 3), "padding": 3, "pad_value": 1},
    {"x": (1, 16, 2, 2), "w": (5, 16, 3, 3), "padding": 7, "pad_value": -1, "stride": 2},
    {"x": (1, 40, 3, 50), "w": (65, 40, 3, 3), "padding": (0, 1)},
    {"x": (2, 72, 7, 7), "w": (9, 24, 3, 3), "groups": 3, "padding": 1, "pad_value": 1},
    {"x": (1, 128, 8, 8), "w": (32, 8, 3, 3), "groups": 16, "padding": "same"},
    {"x": (2, 160, 6, 7), "w": (12, 40, 3, 3), "groups": 4, "dilation": 2, "padding": 3},
    {"x": (2, 20, 9, 6), "w": (4, 20, 2, 4), "padding": "same", "pad_value": -1},
    {"x": (2, 20, 9, 6), "w": (4, 20, 4, 2), "padding": "same", "dilation": (3, 2)},
    {"x": (2, 20, 9, 6), "w": (4, 20, 3, 3), "padding": "valid", "stride": (2, 1)},
]
SHAPES = [*draw_shapes(), *SEED_SHAPES, *SPECIAL_SHAPES]


def shape_id(case):
    text = "x".join(map(str, case["x"])) + "-" + "x".join(map(str, case["w"]))
    return text + "".join(f"-{key}{case[key]}" for key in case if key not in "xw").replace(" ", "")


@pytest.mark.parametrize("case", SHAPES, ids=shape_id)
def test_convolution_is_exact(device, case):
    g = generator(10)
    geometry = {key: case[key] for key in case if key not in ("x", "w")}
    x, w = random_values(g, *case["x"]), random_values(g, *case["w"])
    acc = reference_torch.conv2d(x, w, **geometry)
    x, w = x.to(device), w.to(device)
    integers = binary_conv2d(x, w, out_dtype=torch.int32, **geometry)
    assert integers.dtype == torch.int32
    assert torch.equal(integers.cpu().double(), acc)
    assert torch.equal(binary_conv2d(x, w, **geometry).cpu().double(), acc)

    geometry.pop("groups", None)
    prepared = prepare_weight(w, case.get("groups", 1))
    packed = binary_conv2d(pack_bits(channels_last(x)), prepared, **geometry)
    assert packed.dtype == torch.float32
    assert torch.equal(packed.cpu().double(), acc)
    bits = binary_conv2d(x, prepared, out_dtype="bits", threshold=2, **geometry)
    assert bits.shape == acc.shape
    assert torch.equal(bits.data.cpu(), packed_reference(acc >= 2))


def test_the_shapes_cover_the_list():
    def seen(key):
        return {case.get(key, 1) for case in SHAPES}

    assert {1, 7, 8, 31, 32, 33, 48, 64, 96, 127, 128, 130, 512} <= {c["x"][1] for c in SHAPES}
    assert {1, 7, 64, 130} <= {case["w"][0] for case in SHAPES}
    assert {(1, 1), (3, 3), (5, 5), (7, 7), (1, 7)} <= {case["w"][2:] for case in SHAPES}
    assert {1, 2, 3} <= seen("stride")
    assert {1, 2, 3} <= seen("dilation")
    assert {0, 1, 2, 3, "same", "valid"} <= seen("padding")
    assert {1, 2, 3, 4, 16} <= seen("groups")
    assert {0, 1, -1} <= seen("pad_value")
    assert {0, 1, 130} <= {case["x"][0] for case in SHAPES}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [2, 4, (2, 3), (1, 4), (6, 1)])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_is_that_of_f_conv2d(device, kernel, dilation):
    g = generator(11)
    x, w = random_values(g, 2, 10, 13, 11), random_values(g, 5, 10, *reference_torch.pair(kernel))
    signs = reference_torch.sign(x), reference_torch.sign(w)
    expected = F.conv2d(*signs, padding="same", dilation=dilation)
    got = binary_conv2d(x.to(device), w.to(device), padding="same", dilation=dilation)
    assert got.shape == (2, 5, 13, 11)
    assert torch.equal(got.cpu().double(), expected)
    assert torch.equal(reference_torch.conv2d(x, w, padding="same", dilation=dilation), expected)


@pytest.mark.parametrize("dtype", VALUES, ids=name_of)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=name_of)
def test_input_and_weight_types(device, dtype, weight_dtype):
    g = generator(12)
    x = random_values(g, 2, 20, 6, 7, dtype=dtype).to(device)
    w = random_values(g, 5, 20, 3, 3, dtype=weight_dtype).to(device)
    acc = reference_torch.conv2d(x, w, padding=1)
    got = binary_conv2d(x, w, padding=1, out_dtype=torch.int32)
    assert torch.equal(got.cpu().double(), acc)
    if dtype != torch.int8:
        y = binary_conv2d(x, w, padding=1)
        assert y.dtype == dtype
        assert torch.equal(y.cpu().double(), acc)  # |acc| <= 180: exact in every type.
    for out_dtype in FLOATS:
        y = binary_conv2d(x, w, padding=1, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        assert torch.equal(y.cpu().double(), acc)


def test_positional_arguments_are_those_of_f_conv2d(device):
    g = generator(13)
    x, w = random_values(g, 2, 32, 9, 10).to(device), random_values(g, 6, 16, 3, 3).to(device)
    bias = factors(g, 6).to(device)
    arguments = (bias, (2, 1), (1, 2), (1, 3), 2)
    signs = (reference_torch.sign(x), reference_torch.sign(w))
    expected = F.conv2d(*signs, bias.cpu().double(), *arguments[1:]).float()
    assert torch.equal(binary_conv2d(x, w, *arguments).cpu(), expected)


@pytest.mark.parametrize("view", VIEWS)
def test_convolution_takes_any_strides(device, view):
    x = view_on(device, view)
    w = random_values(generator(14), 5, 12, 3, 3).to(device)
    acc = reference_torch.conv2d(x, w, padding=1)
    weights = {
        "contiguous": w,
        "channels_last": channels_last(w),
        "strided": torch.stack((w, w), -1)[..., 0],
    }
    for name, weight in weights.items():
        got = binary_conv2d(x, weight, padding=1)
        assert torch.equal(got.cpu().double(), acc), name


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_memory_format_follows_the_input(device, dtype):
    g = generator(15)
    x = random_values(g, 2, 12, 6, 7, dtype=dtype).to(device)
    w = random_values(g, 5, 12, 3, 3, dtype=dtype).to(device)
    residual = random_values(g, 2, 5, 4, 5, dtype=dtype).to(device)
    for weight, extra in itertools.product((w, prepare_weight(w)), (None, residual)):
        y = binary_conv2d(x, weight, residual=extra)
        assert y.is_contiguous()
        z = binary_conv2d(channels_last(x), weight, residual=extra)
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert not z.is_contiguous()
        assert torch.equal(y, z)
        b = binary_conv2d(pack_bits(x), weight, residual=extra, out_dtype=dtype)
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert not b.is_contiguous()
        assert torch.equal(y, b)
    for out_dtype in (torch.int32, *FLOATS):
        z = binary_conv2d(channels_last(x), w, out_dtype=out_dtype)
        assert z.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", ["x", "channels_last", "bits"])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    "names",
    [
        ("scale",),
        ("bias",),
        ("scale", "bias"),
        ("residual",),
        ("scale", "residual"),
        ("bias", "residual"),
        ("scale", "bias", "residual"),
    ],
    ids="+".join,
)
def test_epilogue_rounds_once(device, names, out_dtype, form):
    g = generator(16)
    x, w = random_values(g, 2, 67, 6, 7), random_values(g, 19, 67, 3, 3)
    acc = reference_torch.conv2d(x, w, padding=1)
    for residual_dtype in FLOATS if "residual" in names else FLOATS[:1]:
        every = {
            "scale": factors(g, 19),
            "bias": factors(g, 19),
            "residual": (torch.randn(acc.shape, generator=g) * 40).to(residual_dtype),
        }
        chosen = {name: every[name] for name in names}
        expected = reference_torch.epilogue(acc, **chosen).to(out_dtype)
        moved = {name: value.to(device) for name, value in chosen.items()}
        inputs = {"x": x.to(device), "channels_last": channels_last(x).to(device)}
        given = pack_bits(x.to(device)) if form == "bits" else inputs[form]
        for weight in (w.to(device), prepare_weight(w.to(device))):
            got = binary_conv2d(given, weight, padding=1, out_dtype=out_dtype, **moved)
            assert torch.equal(got.cpu(), expected)


def test_epilogue_is_the_same_when_gradients_are_wanted(device):
    """fma and one rounding: scale, bias and residual that train change no number."""
    g = generator(17)
    x, w = random_values(g, 2, 67, 6, 7).to(device), random_values(g, 19, 67, 3, 3).to(device)
    acc = reference_torch.conv2d(x, w)
    every = {
        "scale": factors(g, 19).to(device),
        "bias": factors(g, 19).to(device),
        "residual": torch.randn(acc.shape, generator=g).to(device) * 40,
    }
    expected = reference_torch.epilogue(acc, **every)
    for trained in ([], ["x"], ["scale"], ["bias"], ["residual"], ["scale", "bias", "residual"]):
        arguments = {k: v.clone().requires_grad_(k in trained) for k, v in every.items()}
        y = binary_conv2d(x.clone().requires_grad_("x" in trained), w, **arguments)
        assert torch.equal(y.detach().cpu(), expected), trained


def test_residual_of_any_strides(device):
    g = generator(18)
    x, w = random_values(g, 2, 16, 6, 7).to(device), random_values(g, 5, 16, 3, 3).to(device)
    residual = random_values(g, 2, 5, 4, 5).to(device)
    expected = reference_torch.epilogue(reference_torch.conv2d(x, w), residual=residual)
    views = (
        residual,
        channels_last(residual),
        torch.stack((residual, residual), -1)[..., 0],
        residual.transpose(2, 3).contiguous().transpose(2, 3),
    )
    for view, given in itertools.product(views, (x, channels_last(x))):
        assert torch.equal(binary_conv2d(given, w, residual=view).cpu(), expected)
    row = residual[:, :, :, :1].expand(-1, -1, -1, 5)
    expected = reference_torch.epilogue(reference_torch.conv2d(x, w), residual=row)
    assert torch.equal(binary_conv2d(x, w, residual=row).cpu(), expected)


@pytest.mark.parametrize("filters", [1, 7, 64, 130])
def test_bit_output_is_y_at_or_above_the_threshold(device, filters):
    g = generator(19)
    x, w = random_values(g, 2, 40, 6, 7), random_values(g, filters, 40, 3, 3)
    acc = reference_torch.conv2d(x, w)
    every = {
        "scale": factors(g, filters),
        "bias": factors(g, filters),
        "residual": torch.randn(acc.shape, generator=g) * 20,
    }
    x, w = x.to(device), w.to(device)
    for names in ((), ("scale",), ("scale", "bias"), ("scale", "bias", "residual")):
        chosen = {name: every[name] for name in names}
        y = reference_torch.epilogue(acc, **chosen)
        thresholds = torch.randn(filters, generator=g) * 9
        thresholds[::2] = y[0, ::2, 1, 1]  # Equal values count as reached.
        moved = {name: value.to(device) for name, value in chosen.items()}
        for threshold in (None, 1.5, -4, thresholds):
            limit = torch.as_tensor(0 if threshold is None else threshold, dtype=torch.float32)
            expected = packed_reference(y >= limit.reshape(-1, 1, 1))
            given = thresholds.to(device) if threshold is thresholds else threshold
            for form in (x, channels_last(x), pack_bits(x)):
                bits = binary_conv2d(form, w, out_dtype="bits", threshold=given, **moved)
                assert isinstance(bits, BitTensor)
                assert bits.shape == acc.shape
                assert torch.equal(bits.data.cpu(), expected)


def test_chained_bits_equal_the_chain_of_floats(device):
    g = generator(20)
    x = random_values(g, 2, 40, 12, 11).to(device)
    w1, w2 = random_values(g, 70, 40, 3, 3).to(device), random_values(g, 9, 70, 3, 3).to(device)
    scale, bias = factors(g, 70).to(device), factors(g, 70).to(device)
    floats = binary_conv2d(x, w1, bias, padding=1, scale=scale)
    expected = binary_conv2d(floats, w2, stride=2, pad_value=-1, padding=1)
    hidden = binary_conv2d(x, w1, bias, padding=1, scale=scale, out_dtype="bits")
    got = binary_conv2d(hidden, prepare_weight(w2), stride=2, pad_value=-1, padding=1)
    assert torch.equal(got, expected)
    acc = reference_torch.conv2d(
        reference_torch.epilogue(reference_torch.conv2d(x, w1, padding=1), scale, bias),
        w2,
        stride=2,
        pad_value=-1,
        padding=1,
    )
    assert torch.equal(got.cpu().double(), acc)


def test_signs_of_special_values(device):
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45])
    x = special.repeat(24)[: 9 * 16].reshape(1, 16, 3, 3)
    w = special.repeat(50)[: 2 * 16 * 9].reshape(2, 16, 3, 3)
    signs = torch.tensor([1.0, 1, -1, 1, -1, 1, -1], dtype=torch.float64)
    expected = F.conv2d(
        signs.repeat(24)[: 9 * 16].reshape(1, 16, 3, 3),
        signs.repeat(50)[: 2 * 16 * 9].reshape(2, 16, 3, 3),
        padding=1,
    )
    got = binary_conv2d(x.to(device), w.to(device), padding=1)
    assert torch.equal(got.cpu().double(), expected)


def test_inputs_are_not_changed(device):
    g = generator(21)
    x, w = random_values(g, 2, 16, 6, 7).to(device), random_values(g, 5, 16, 3, 3).to(device)
    residual, scale = random_values(g, 2, 5, 4, 5).to(device), factors(g, 5).to(device)
    prepared, bits = prepare_weight(w), pack_bits(x)
    tensors = (x, w, residual, scale, prepared.data, bits.data)
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    binary_conv2d(x, w, scale=scale, residual=residual)
    binary_conv2d(bits, prepared, scale, scale=scale, residual=residual)
    binary_conv2d(bits, prepared, out_dtype="bits", threshold=scale)
    for tensor, copy, version in zip(tensors, before, versions, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == version


def test_results_do_not_depend_on_torch_threads():
    g = generator(22)
    x, w = random_values(g, 3, 70, 20, 21), random_values(g, 33, 70, 3, 3)
    expected = reference_torch.conv2d(x, w, padding=1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(binary_conv2d(x, w, padding=1).double(), expected)
    finally:
        torch.set_num_threads(threads)


def test_concurrent_calls_from_four_threads(device):
    g = generator(23)
    w = random_values(g, 20, 100, 3, 3).to(device)
    prepared = prepare_weight(w)
    inputs = [random_values(g, 2, 100, 12 + i, 12).to(device) for i in range(4)]
    expected = [reference_torch.conv2d(x, w, padding=1) for x in inputs]
    wrong = []

    def work(x, acc):
        for _ in range(10):
            for weight, given in ((w, x), (prepared, x), (prepared, pack_bits(x))):
                if not torch.equal(binary_conv2d(given, weight, padding=1).cpu().double(), acc):
                    wrong.append(x.shape)

    workers = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.gpu
def test_calls_follow_the_current_stream():
    g = generator(24)
    x, w = random_values(g, 64, 256, 28, 28).cuda(), random_values(g, 256, 256, 3, 3).cuda()
    expected = binary_conv2d(x, w, padding=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = binary_conv2d(x.neg().neg(), w, padding=1)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_cuda_graph_replays_new_inputs():
    g = generator(25)
    x, w = random_values(g, 2, 64, 14, 14).cuda(), random_values(g, 70, 64, 3, 3).cuda()
    prepared = prepare_weight(w)
    binary_conv2d(x, prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = binary_conv2d(x, prepared, padding=1)
    x.copy_(random_values(g, 2, 64, 14, 14))
    graph.replay()
    assert torch.equal(y.cpu().double(), reference_torch.conv2d(x, w, padding=1))


# ------------------------------------------------------------------------------ clamp, prelu, bits


PRELUS = [None, "slope", *itertools.product((False, True), repeat=3)]


def prelu_id(given):
    names = ("in_shift", "slope", "out_shift")
    if isinstance(given, tuple):
        return "+".join(itertools.compress(names, given)) or "relu"
    return given or "none"


def draw_prelu(given, draw, count):
    """The argument of binary_conv2d, and the parts that it stands for."""
    if given is None:
        return None, None
    if given == "slope":
        slope = draw(count)
        return slope, (None, slope, None)
    parts = tuple(draw(count) if wanted else None for wanted in given)
    return parts, parts


def moved(value, device, requires_grad=False):
    def move(t):
        return t.detach().clone().to(device).requires_grad_(requires_grad)

    return torch.utils._pytree.tree_map_only(torch.Tensor, move, value)


@pytest.mark.parametrize("given", PRELUS, ids=prelu_id)
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=name_of)
def test_fused_and_differentiable_steps_match_reference(device, out_dtype, clamp, given):
    """By floats or bits, with and without gradients: the same numbers, formats and bits."""
    g = generator(50)
    x, w = random_values(g, 2, 24, 7, 6), random_values(g, 19, 24, 3, 3)
    acc = reference_torch.conv2d(x, w, padding=1)
    prelu, parts = draw_prelu(given, lambda n: factors(g, n) * 20, 19)
    epilogue = {
        "scale": factors(g, 19),
        "bias": factors(g, 19),
        "residual": integers(g, *acc.shape),
    }
    y = reference_torch.epilogue(acc, **epilogue, clamp=clamp, prelu=parts)
    threshold, below = y[0, :, 2, 2], torch.rand(19, generator=g) < 0.5
    bits = reference.pack(reference.bits_of(y.numpy(), threshold, below))
    for layout, prepares, wants_gradient in itertools.product(
        ("contiguous", "channels_last", "bits"), (False, True), (False, True)
    ):
        given_x = channels_last(x).to(device) if layout == "channels_last" else x.to(device)
        got, got_bits = binary_conv2d(
            pack_bits(given_x) if layout == "bits" else given_x,
            prepare_weight(w.to(device)) if prepares else w.to(device),
            **moved({**epilogue, "prelu": prelu}, device, wants_gradient),
            padding=1,
            clamp=clamp,
            threshold=threshold.to(device),
            threshold_below=below.to(device),
            with_bits=True,
            out_dtype=out_dtype,
        )
        assert got.requires_grad == wants_gradient
        assert got.dtype == out_dtype
        assert torch.equal(got.detach().cpu(), y.to(out_dtype))
        assert got.is_contiguous(
            memory_format=torch.contiguous_format if layout == "contiguous" else torch.channels_last
        )
        assert torch.equal(got_bits.data.cpu(), torch.from_numpy(bits))


def test_steps_keep_the_sign_of_zero_and_nan_with_and_without_gradients(device):
    x, w = torch.ones(1, 3, 1, 1, device=device), torch.ones(4, 3, 1, 1, device=device)
    nan, zero = float("nan"), torch.tensor([-0.0, -0.0, 0.0, -0.0], device=device)
    bias = torch.tensor([-0.0, nan, -3.0, -0.0], device=device)
    for slope in (None, torch.full((4,), -1.0, device=device)):
        for requires_grad in (False, True):
            y = binary_conv2d(
                x,
                w,
                bias.clone().requires_grad_(requires_grad),
                scale=zero,
                prelu=(None, slope, None),
            ).detach()
            expected = torch.tensor([-0.0, nan, 0.0 if slope is None else 3.0, -0.0])
            y = y.cpu().reshape(-1)
            assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
            assert torch.equal(y.signbit()[[0, 2, 3]], expected.signbit()[[0, 2, 3]])


def test_numbers_stand_for_every_channel(device):
    g = generator(51)
    x, w = random_values(g, 1, 8, 5, 5).to(device), random_values(g, 4, 8, 3, 3).to(device)
    quarter = torch.full((4,), 0.25, device=device)
    expected = binary_conv2d(x, w, prelu=(quarter, quarter, None))
    assert torch.equal(binary_conv2d(x, w, prelu=(0.25, 0.25, None)), expected)
    assert torch.equal(binary_conv2d(x, w, prelu=0.25), binary_conv2d(x, w, prelu=quarter))


def test_clamped_integers_and_bits_below(device):
    g = generator(52)
    x, w = random_values(g, 2, 16, 6, 7), random_values(g, 9, 16, 3, 3)
    acc = reference_torch.conv2d(x, w)
    y = binary_conv2d(x.to(device), w.to(device), clamp=True, out_dtype=torch.int32)
    assert torch.equal(y.cpu().double(), acc.clamp(min=0))
    below = torch.arange(9, dtype=torch.uint8) % 3
    bits = binary_conv2d(
        x.to(device), w.to(device), threshold=2, threshold_below=below.to(device), out_dtype="bits"
    )
    expected = reference.pack(reference.bits_of(acc.numpy(), 2, below != 0))
    assert torch.equal(bits.data.cpu(), torch.from_numpy(expected))


STEP_GRADIENTS = ["scale", "bias", "residual", "in_shift", "slope", "out_shift"]


@pytest.mark.parametrize("operands", ["floats", "bits"])
@pytest.mark.parametrize("clamp", [False, True])
def test_gradients_pass_clamp_and_prelu(device, clamp, operands):
    """Integers and powers of two: every float32 sum is exact, so gradients are equal."""
    g = generator(53)
    x, w = random_values(g, 2, 16, 7, 6), random_values(g, 6, 16, 3, 3)
    acc = reference_torch.conv2d(x, w, padding=1)
    assert (acc == 0).any()
    values = {
        "scale": powers_of_two(g, 6) * torch.tensor([1, -1, 1, -1, 1, 1]),
        "bias": integers(g, 6),
        "residual": integers(g, *acc.shape),
        "in_shift": integers(g, 6),
        "slope": powers_of_two(g, 6),
        "out_shift": integers(g, 6),
    }
    grad = integers(g, *acc.shape)
    prelu = tuple(values[name] for name in STEP_GRADIENTS[3:])
    to_acc, *expected = reference_torch.step_gradients(
        acc, grad, *(values[name] for name in STEP_GRADIENTS[:3]), clamp, prelu
    )
    leaves = {name: trained(value, device) for name, value in values.items()}
    given_x, given_w = trained(x, device), trained(w, device)
    if operands == "bits":
        given_x, given_w = pack_bits(given_x), prepare_weight(given_w)
    y = binary_conv2d(
        given_x,
        given_w,
        leaves["bias"],
        scale=leaves["scale"],
        residual=leaves["residual"],
        prelu=tuple(leaves[name] for name in STEP_GRADIENTS[3:]),
        clamp=clamp,
        padding=1,
    )
    y.backward(grad.to(device))
    for name, value in zip(STEP_GRADIENTS, expected, strict=True):
        assert_gradient_is(leaves[name].grad, value)
    if operands == "floats":
        expected = reference_torch.gradients(x, w, to_acc, padding=1)
        assert_gradient_is(given_x.grad, expected[0])
        assert_gradient_is(given_w.grad, expected[1])


def test_prelu_beside_a_lost_gradient_is_refused(device):
    x = torch.ones(1, 8, 5, 5, device=device, requires_grad=True)
    w = torch.ones(4, 8, 3, 3, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"x: got .*prepared weight"):
        binary_conv2d(x, prepare_weight(w), prelu=0.5)
    with pytest.raises(ValueError, match=r"weight: got .*BitTensor"):
        binary_conv2d(pack_bits(x), w, clamp=True)
    bits = binary_conv2d(x, prepare_weight(w), prelu=0.5, out_dtype="bits")
    assert isinstance(bits, BitTensor)


def test_gradient_through_the_fused_operator_is_refused(device):
    g = generator(54)
    x, w = random_values(g, 1, 8, 4, 4).to(device), random_values(g, 4, 8, 3, 3).to(device)
    scale = factors(g, 4).to(device).requires_grad_()
    y = torch.ops.binconv.packed_conv2d(
        pack_bits(x).data,
        prepare_weight(w).data,
        packed_geometry(w.shape, [1, 1], [0] * 4, [1, 1], 1, 0),
        *(torch.float32, False, scale),
        clamp=True,
    )
    with pytest.raises(NotImplementedError, match="clamp"):
        y.sum().backward()


@pytest.mark.parametrize("count", [9, 11])
def test_raw_operators_refuse_a_geometry_of_another_length(device, count):
    x, w = torch.ones(1, 8, 4, 4, device=device), torch.ones(4, 8, 1, 1, device=device)
    geometry = [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0][:count]
    bits, prepared = pack_bits(x).data, prepare_weight(w).data
    with pytest.raises(ValueError, match=f"^geometry: got {count} numbers"):
        torch.ops.binconv.packed_conv2d(bits, prepared, [4, 8, 1, 1, *geometry], None, False)


def test_a_raw_operator_refuses_an_unknown_estimator(device):
    x = torch.ones(1, 8, 4, 4, device=device, requires_grad=True)
    w = torch.ones(4, 8, 1, 1, device=device)
    others = [1, 1, 0, 0, 0, 0, 1, 1, 1, 0], torch.float32, False, "clap", 1.0, "clip", 1.0
    with pytest.raises(ValueError, match=r"^ste: got 'clap'"):
        torch.ops.binconv.sign_conv2d(x, w, *(None,) * 7, *others)


def test_calls_that_differ_in_one_size_are_told_apart(device):
    """Images of 8 and of 16 channels have packed forms of the same shape."""
    g = generator(60)
    w = random_values(g, 6, 8, 3, 3)
    cases = [{"padding": 1, "groups": groups} for groups in (1, 2)]
    cases += [{"padding": 1, "pad_value": value} for value in (1, -1)]
    cases += [{"padding": 1, name: 2} for name in ("stride", "dilation")]
    cases += [{"padding": padding} for padding in ((1, 0), (0, 1), 2)]
    for options in cases * 2:
        groups = options.get("groups", 1)
        for batch, height, width in ((2, 7, 6), (2, 6, 7), (1, 7, 6)):
            x = random_values(g, batch, 8 * groups, height, width)
            prepared = prepare_weight(w.to(device), groups=groups)
            y = binary_conv2d(pack_bits(x.to(device)), prepared, out_dtype=torch.int32, **options)
            assert torch.equal(y.cpu().double(), reference_torch.conv2d(x, w, **options))


def test_calls_that_differ_in_the_number_of_threads_are_told_apart():
    """The workspace of so large a convolution grows with the threads."""
    g = generator(61)
    x, w = random_values(g, 8, 64, 32, 32), random_values(g, 32, 64, 3, 3)
    threads = torch.get_num_threads()
    try:
        for count in (1, 4, 1, 2):
            torch.set_num_threads(count)
            y = binary_conv2d(pack_bits(x), prepare_weight(w), out_dtype=torch.int32)
            assert torch.equal(y.double(), reference_torch.conv2d(x, w))
    finally:
        torch.set_num_threads(threads)


PACKED_GRADIENTS = {
    "scale": lambda acc, grad: (grad * acc).sum((0, 2, 3)),
    "bias": lambda acc, grad: grad.sum((0, 2, 3)),
    "residual": lambda acc, grad: grad,
}


@pytest.mark.parametrize("trains", PACKED_GRADIENTS)
@pytest.mark.parametrize("others", ["given", "left out"])
def test_gradient_of_one_tensor_beside_packed_operands(device, trains, others):
    g = generator(58)
    x, w = random_values(g, 2, 16, 6, 5), random_values(g, 4, 16, 3, 3)
    acc = reference_torch.conv2d(x, w, padding=1)
    values = {"scale": integers(g, 4), "bias": integers(g, 4), "residual": integers(g, *acc.shape)}
    leaf = trained(values[trains], device)
    given = {name: value.to(device) for name, value in values.items() if others == "given"}
    operands = pack_bits(x.to(device)), prepare_weight(w.to(device))
    grad = integers(g, *acc.shape)
    y = binary_conv2d(*operands, padding=1, **(given | {trains: leaf}))
    y.backward(grad.to(device))
    assert_gradient_is(leaf.grad, PACKED_GRADIENTS[trains](acc, grad.double()))


def test_autograd_takes_part_only_where_a_gradient_is_wanted(device):
    g = generator(59)
    x = pack_bits(random_values(g, 1, 8, 4, 4).to(device))
    w = prepare_weight(random_values(g, 4, 8, 3, 3).to(device))
    plain, leaf = factors(g, 4).to(device), factors(g, 4).to(device).requires_grad_()

    def called(**options):
        with Recorder() as recorder:
            y = binary_conv2d(x, w, **options)
        (call,) = recorder.calls
        y = y[0] if isinstance(y, tuple) else y
        return call[0]._schema.name.removeprefix("binconv::"), y.requires_grad

    assert called(scale=plain) == ("packed_conv2d_no_grad", False)
    assert called(scale=leaf) == ("packed_conv2d", True)
    assert called(with_bits=True, threshold=leaf) == ("packed_conv2d_with_bits", False)
    with torch.no_grad():
        assert called(scale=leaf) == ("packed_conv2d_no_grad", False)


# ---------------------------------------------------------------------------------------- gradients


GRADIENTS = ["x", "w", "scale", "bias", "residual"]


def integers(g, *shape, low=-3, high=4):
    return torch.randint(low, high, shape, generator=g).float()


def powers_of_two(g, count):
    return torch.exp2(torch.randint(-2, 3, (count,), generator=g).float())


GRADIENT_GEOMETRIES = [
    {},
    {"padding": 1},
    {"padding": 2, "pad_value": 1},
    {"padding": (1, 3), "pad_value": -1, "stride": 2},
    {"stride": (2, 3), "padding": 1},
    {"stride": 3, "pad_value": 1, "padding": 2},
    {"dilation": 2, "padding": 2, "pad_value": -1},
    {"dilation": (1, 3), "padding": "same", "pad_value": 1},
    {"padding": "same"},
    {"groups": 2, "padding": 1, "stride": 2},
    {"groups": 2, "padding": "valid", "dilation": 2, "pad_value": 1},
    {"kernel": (2, 4), "padding": "same", "pad_value": -1},
    {"kernel": (1, 1), "stride": 2, "padding": 1, "pad_value": 1},
]


def geometry_id(geometry):
    return ",".join(f"{k}={v}" for k, v in geometry.items()).replace(" ", "") or "plain"


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("geometry", GRADIENT_GEOMETRIES, ids=geometry_id)
def test_gradients_are_those_of_the_clipped_estimator(device, geometry, memory_format):
    """Integer output gradients and power-of-two scales: float32 sums are exact, so equal ones."""
    g = generator(26)
    geometry = dict(geometry)
    kernel, groups = geometry.pop("kernel", (3, 3)), geometry.get("groups", 1)
    x, w = random_values(g, 2, 16, 9, 8), random_values(g, 6, 16 // groups, *kernel)
    x[0, :4, 0, 0] = torch.tensor([1.0, -1.0, 1.0000001, -1.0000001])
    x[0, 4:9, 0, 0] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    w[0, :4, 0, 0] = torch.tensor([1.0, -1.0, 1.0000001, float("nan")])
    acc = reference_torch.conv2d(x, w, **geometry)
    scale, bias, residual = powers_of_two(g, 6), integers(g, 6), integers(g, *acc.shape)
    grad = integers(g, *acc.shape)
    if memory_format == "channels_last":
        x, grad = channels_last(x), channels_last(grad)
    expected = reference_torch.gradients(x, w, grad, scale, bias, residual, **geometry)
    leaves = [trained(t, device) for t in (x, w, scale, bias, residual)]
    y = binary_conv2d(*leaves[:2], leaves[3], scale=leaves[2], residual=leaves[4], **geometry)
    assert torch.equal(y.detach().cpu(), reference_torch.epilogue(acc, scale, bias, residual))
    y.backward(grad.to(device))
    for name, leaf, value in zip(GRADIENTS, leaves, expected, strict=True):
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape, name
        assert leaf.grad.dtype == leaf.dtype, name
        assert_gradient_is(leaf.grad, value)


@pytest.mark.parametrize("wanted", ["x", "w", "scale", "bias", "residual", "xw", "none"])
def test_only_the_wanted_gradients_are_made(device, wanted):
    g = generator(27)
    x, w = random_values(g, 2, 8, 5, 5), random_values(g, 4, 8, 3, 3)
    scale, bias, residual = powers_of_two(g, 4), integers(g, 4), integers(g, 2, 4, 3, 3)
    asked = {"xw": {"x", "w"}, "none": set()}.get(wanted, {wanted})
    values = dict(zip(GRADIENTS, (x, w, scale, bias, residual), strict=True))
    leaves = {n: v.clone().to(device).requires_grad_(n in asked) for n, v in values.items()}
    y = binary_conv2d(
        leaves["x"],
        leaves["w"],
        leaves["bias"],
        scale=leaves["scale"],
        residual=leaves["residual"],
    )
    assert y.requires_grad == bool(asked)
    if not asked:
        return
    grad = integers(g, 2, 4, 3, 3)
    y.backward(grad.to(device))
    expected = reference_torch.gradients(x, w, grad, scale, bias, residual)
    for name, value in zip(GRADIENTS, expected, strict=True):
        if name in asked:
            assert_gradient_is(leaves[name].grad, value)
        else:
            assert leaves[name].grad is None, name


@pytest.mark.parametrize("names", [(), ("scale",), ("bias",), ("residual",), ("scale", "residual")])
def test_gradients_without_some_of_the_epilogue(device, names):
    g = generator(28)
    x, w = random_values(g, 2, 8, 5, 5), random_values(g, 4, 8, 3, 3)
    every = {
        "scale": powers_of_two(g, 4),
        "bias": integers(g, 4),
        "residual": integers(g, 2, 4, 3, 3),
    }
    chosen = {name: every[name] for name in names}
    grad = integers(g, 2, 4, 3, 3)
    expected = reference_torch.gradients(x, w, grad, **chosen)
    x, w = trained(x, device), trained(w, device)
    leaves = {name: trained(value, device) for name, value in chosen.items()}
    binary_conv2d(x, w, **leaves).backward(grad.to(device))
    assert_gradient_is(x.grad, expected[0])
    assert_gradient_is(w.grad, expected[1])
    for name, value in zip(("scale", "bias", "residual"), expected[2:], strict=True):
        if name in names:
            assert_gradient_is(leaves[name].grad, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_gradients_in_half_precision_have_the_type_of_their_tensor(device, dtype):
    """Few small integers: every sum is an integer below 2^8 and so exact in either type."""
    g = generator(29)
    x, w = random_values(g, 1, 8, 4, 4, dtype=dtype), random_values(g, 4, 8, 3, 3, dtype=dtype)
    grad = integers(g, 1, 4, 2, 2, low=-1, high=2)
    expected = reference_torch.gradients(x, w, grad)
    x, w = trained(x, device), trained(w, device)
    y = binary_conv2d(x, w)
    assert y.dtype == dtype
    y.backward(grad.to(device, dtype))
    for leaf, value in ((x, expected[0]), (w, expected[1])):
        assert leaf.grad.dtype == dtype
        assert_gradient_is(leaf.grad, value)


def test_mixed_types_get_gradients_of_their_own_type(device):
    g = generator(30)
    x, w = random_values(g, 1, 8, 4, 4, dtype=torch.bfloat16), random_values(g, 4, 8, 3, 3)
    grad = integers(g, 1, 4, 2, 2, low=-1, high=2)
    expected = reference_torch.gradients(x, w, grad)
    x, w = trained(x, device), trained(w, device)
    y = binary_conv2d(x, w, out_dtype=torch.float32)
    y.backward(grad.to(device))
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    assert_gradient_is(x.grad, expected[0])
    assert_gradient_is(w.grad, expected[1])


def test_a_gradient_that_is_expanded_or_permuted(device):
    g = generator(31)
    x, w = random_values(g, 2, 8, 5, 6), random_values(g, 4, 8, 3, 3)
    for make in (
        lambda y: y.sum(),  # The gradient is one value, expanded.
        lambda y: (y.permute(0, 3, 2, 1) * torch.arange(4.0, device=y.device)).sum(),
        lambda y: y[:, ::2, 1:].sum(),
    ):
        a, b = trained(x, device), trained(w, device)
        y = binary_conv2d(a, b)
        probe = torch.zeros(y.shape, requires_grad=True)
        (grad,) = torch.autograd.grad(make(probe), probe)
        make(y).backward()
        expected = reference_torch.gradients(x, w, grad)
        assert_gradient_is(a.grad, expected[0])
        assert_gradient_is(b.grad, expected[1])


def test_gradient_of_an_empty_batch_is_zero(device):
    x = torch.zeros(0, 8, 5, 5, device=device, requires_grad=True)
    w = torch.ones(4, 8, 3, 3, device=device, requires_grad=True)
    binary_conv2d(x, w).sum().backward()
    assert x.grad.shape == (0, 8, 5, 5)
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_gradients_add_up_over_several_calls(device):
    g = generator(32)
    x, w = random_values(g, 1, 8, 5, 5), random_values(g, 4, 8, 3, 3)
    grads = [integers(g, 1, 4, 3, 3), integers(g, 1, 4, 5, 5)]
    a, b = trained(x, device), trained(w, device)
    first, second = binary_conv2d(a, b), binary_conv2d(a, b, padding=1)
    torch.autograd.backward([first, second], [grad.to(device) for grad in grads])
    one = reference_torch.gradients(x, w, grads[0])
    two = reference_torch.gradients(x, w, grads[1], padding=1)
    assert_gradient_is(a.grad, one[0] + two[0])
    assert_gradient_is(b.grad, one[1] + two[1])


def test_saved_tensors_that_change_before_backward_are_an_error(device):
    x = random_values(generator(33), 1, 8, 5, 5).to(device).requires_grad_()
    w = random_values(generator(34), 4, 8, 3, 3).to(device).requires_grad_()
    y = binary_conv2d(x, w)
    with torch.no_grad():
        w.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("out_dtype", [torch.int32, "bits"])
def test_integers_and_bits_carry_no_gradient(device, out_dtype):
    x = torch.ones(1, 8, 5, 5, device=device, requires_grad=True)
    w = torch.ones(4, 8, 3, 3, device=device, requires_grad=True)
    y = binary_conv2d(x, w, out_dtype=out_dtype)
    data = y.data if out_dtype == "bits" else y
    assert not data.requires_grad


@pytest.mark.parametrize("name", ["scale", "bias", "residual"])
@pytest.mark.parametrize("form", ["bits and prepared", "bits and floats", "floats and prepared"])
@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_epilogue_of_packed_operands_gets_its_gradient_or_is_refused(device, form, name):
    """A gradient must never be lost in silence."""
    g = generator(43)
    x, w = random_values(g, 2, 8, 5, 5), random_values(g, 4, 8, 3, 3)
    every = {
        "scale": powers_of_two(g, 4),
        "bias": integers(g, 4),
        "residual": integers(g, 2, 4, 3, 3),
    }
    grad = integers(g, 2, 4, 3, 3)
    expected = reference_torch.gradients(x, w, grad, **every)[GRADIENTS.index(name)]
    given = pack_bits(x.to(device)) if form.startswith("bits") else x.to(device)
    weight = prepare_weight(w.to(device)) if form.endswith("prepared") else w.to(device)
    arguments = {k: v.to(device) for k, v in every.items()}
    arguments[name] = trained(arguments[name], device)
    try:
        y = binary_conv2d(given, weight, **arguments)
    except (ValueError, NotImplementedError) as error:
        refusal = str(error)
    else:
        refusal = None
        y.backward(grad.to(device))
    if refusal is None:
        assert arguments[name].grad is not None
        assert_gradient_is(arguments[name].grad, expected)
    else:
        assert name in refusal


def test_x_that_wants_a_gradient_is_refused_with_a_prepared_weight(device):
    x = torch.ones(1, 8, 5, 5, device=device, requires_grad=True)
    prepared = prepare_weight(torch.ones(4, 8, 3, 3, device=device))
    with pytest.raises((ValueError, NotImplementedError), match=r"gradient"):
        binary_conv2d(x, prepared)
    with torch.no_grad():
        assert torch.equal(binary_conv2d(x, prepared), torch.full((1, 4, 3, 3), 72.0).to(device))


class Watched(torch.Tensor):
    """A subclass whose __torch_function__ is PyTorch's, which passes the class on."""


def watch(mode):
    class Watcher(mode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def _watch(self, function, types, args=(), kwargs=None):
            self.names.add(str(function))
            return function(*args, **(kwargs or {}))

        __torch_dispatch__ = __torch_function__ = _watch

    return Watcher()


@pytest.mark.parametrize("mode", [TorchDispatchMode, TorchFunctionMode])
@pytest.mark.parametrize("trains", [False, True], ids=["eval", "train"])
def test_modes_see_the_operators(device, mode, trains):
    x = torch.ones(1, 8, 5, 5, device=device, requires_grad=trains)
    w = torch.ones(4, 8, 3, 3, device=device)
    with watch(mode) as watcher:
        binary_conv2d(x, w)
        binary_conv2d(pack_bits(x), prepare_weight(w))
    tracked = trains and mode is TorchFunctionMode
    convolution = "sign_conv2d" if tracked else "sign_conv2d_no_grad"
    operators = {convolution, "pack_bits", "packed_conv2d_no_grad"}
    assert {f"binconv.{name}.default" for name in operators} <= watcher.names


def test_profilers_see_the_operators(device):
    x, w = torch.ones(1, 8, 5, 5, device=device), torch.ones(4, 8, 3, 3, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        binary_conv2d(x, w)
    assert "binconv::sign_conv2d_no_grad" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_traces_hold_the_operators(device, tracing):
    x, w = torch.ones(1, 8, 5, 5, device=device), torch.ones(4, 8, 3, 3, device=device)
    traced = make_fx(lambda x, w: binary_conv2d(x, w, padding=1), tracing_mode=tracing)(x, w)
    operator = torch.ops.binconv.sign_conv2d_no_grad.default
    assert operator in {node.target for node in traced.graph.nodes}
    assert torch.equal(traced(x, w), binary_conv2d(x, w, padding=1))


def test_lazy_negatives_and_subclasses_take_the_dispatcher(device):
    x = pack_bits(torch.ones(1, 8, 5, 5, device=device))
    w = prepare_weight(torch.ones(4, 8, 3, 3, device=device))
    ones = torch.ones(4, device=device)
    negative = torch._neg_view(ones)
    assert torch.equal(binary_conv2d(x, w, scale=negative), -binary_conv2d(x, w, scale=ones))
    assert type(binary_conv2d(x, w, scale=ones.as_subclass(Watched))) is Watched


def test_packing_a_meta_tensor_gives_the_shape_alone():
    bits = pack_bits(torch.empty(1, 8, 5, 5, device="meta"))
    assert bits.data.is_meta
    assert bits.shape == (1, 8, 5, 5)


@pytest.mark.parametrize(
    "context", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__
)
def test_plain_calls_are_known(device, context):
    with context(), torch.autocast(torch.device(device).type):
        here = torch.ones(4, device=device)
        assert is_plain_call((here, torch.nn.Parameter(torch.ones(4, device=device)), None, 1))


def test_floats_are_refused_after_equal_integers(device):
    x, w = torch.ones(1, 8, 5, 5, device=device), torch.ones(4, 8, 3, 3, device=device)
    binary_conv2d(x, w, stride=(1, 1), padding=(0, 0), groups=1)
    for name, value in (("stride", (1.0, 1.0)), ("padding", (0.0, 0.0)), ("groups", 1.0)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            binary_conv2d(x, w, **{name: value})


def test_no_grad_and_inference_mode(device):
    g = generator(35)
    x, w = random_values(g, 1, 8, 5, 5).to(device), random_values(g, 4, 8, 3, 3).to(device)
    w.requires_grad_()
    expected = reference_torch.conv2d(x, w)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = binary_conv2d(x, w)
            packed = binary_conv2d(pack_bits(x), prepare_weight(w))
        assert not y.requires_grad
        assert torch.equal(y.cpu().double(), expected)
        assert torch.equal(packed.cpu().double(), expected)


# --------------------------------------------------------------- dispatcher, fake tensors, compiler


def registered_operators():
    names = torch._C._dispatch_get_all_op_names()
    return {name.split(".")[0] for name in names if name.startswith("binconv::")}


class Recorder(TorchDispatchMode):
    """Keeps the calls of binconv's operators with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "binconv":
            copies = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().clone(), (args, kwargs or {})
            )
            self.calls.append((function, *copies))
        return function(*args, **(kwargs or {}))


def record_calls(device):
    """Calls of every operator by the public functions, one for each combination of types."""
    from binconv.torch import BinaryConv2d

    g = generator(36)
    x = random_values(g, 2, 16, 6, 5).to(device)
    w = random_values(g, 6, 8, 3, 3).to(device)
    scale, bias = factors(g, 6).to(device), factors(g, 6).to(device)
    residual = random_values(g, 2, 6, 6, 5).to(device)
    geometry = {"padding": 1, "pad_value": -1}
    with Recorder() as recorder:
        prepared = prepare_weight(w, groups=2)
        binary_conv2d(x, prepared, **geometry)
        binary_conv2d(pack_bits(x.half()), prepared, bias, scale=scale, stride=2)
        binary_conv2d(channels_last(x), prepared, residual=residual, **geometry)
        binary_conv2d(x, prepared, out_dtype=torch.int32, dilation=2)
        binary_conv2d(x, prepared, out_dtype="bits", threshold=0.5)
        binary_conv2d(x, prepared, out_dtype="bits", threshold=bias)
        binary_conv2d(x, w, groups=2, **geometry)
        binary_conv2d(x, w.clone().requires_grad_(), groups=2, **geometry)
        binary_conv2d(
            channels_last(x), w, bias, groups=2, scale=scale, residual=residual, padding=1
        )
        binary_conv2d(x.bfloat16(), w, bias, groups=2)
        below = {"threshold_below": torch.ones(6, dtype=torch.bool, device=x.device)}
        binary_conv2d(x, prepared, clamp=True, out_dtype=torch.int32)
        binary_conv2d(x, prepared, out_dtype="bits", prelu=scale, threshold=1.0, **below)
        binary_conv2d(x, prepared, residual=residual, prelu=(bias, scale, None), **geometry)
        binary_conv2d(x, prepared, prelu=(None, None, bias), with_bits=True)
        binary_conv2d(
            channels_last(x), prepared, bias, threshold=scale, with_bits=True, clamp=True, **below
        )
        binary_conv2d(pack_bits(x), prepared, bias, with_bits=True, out_dtype=torch.float16)
        leaves = [t.clone().requires_grad_() for t in (bias, scale, residual)]
        for given in (x, pack_bits(x)):
            binary_conv2d(given, prepared, scale=leaves[1], out_dtype=torch.float16)
            binary_conv2d(given, prepared, leaves[0], residual=leaves[2], **geometry)
        pack_bits(x, scale.repeat(3)[:16]).unpack(torch.float16)
        prepare_weight(pack_weight(w), groups=2, in_channels=8)
        for weight_scale in ("channel", "tensor", "learnable", None):
            layer = BinaryConv2d(16, 6, 3, groups=2, weight_scale=weight_scale).to(device)
            layer.train()(x).sum().backward()
            with torch.no_grad():
                layer.eval()(x)
            layer(pack_bits(x))
        trained_w = w.clone().requires_grad_()
        for ste in ("clip", "approx_sign", "identity"):
            for given in (x, channels_last(x).bfloat16()):
                y = sign_conv2d(
                    given.detach().requires_grad_(),
                    trained_w,
                    geometry_arguments(1, 1, 1, (3, 3), 2, -1),
                    given.dtype,
                    shift=factors(g, 16).to(device),
                    scale=scale,
                    bias=bias,
                    residual=residual,
                    ste=estimator(ste),
                    weight_ste=estimator(ste),
                )
                y.float().sum().backward()
    # The recorder sees what is called below autograd.
    differentiable = torch.ops.binconv.sign_conv2d.default
    without = torch.ops.binconv.sign_conv2d_no_grad.default
    trained = [args for function, args, _ in recorder.calls if function == without]
    calls = [
        (differentiable, (*a[:7], None, None, a[10:], *a[7:9], *("clip", 1.0) * 2), {})
        for a in trained
    ]
    return recorder.calls + calls


def kind(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim(), value.is_contiguous()
    return value if value is None or isinstance(value, torch.dtype) else type(value)


def test_opcheck_of_every_operator(device):
    calls = record_calls(device)
    assert registered_operators()
    assert {call[0]._schema.name for call in calls} == registered_operators()
    distinct = {(str(call[0]), *map(kind, call[1])): call for call in calls}
    for function, args, kwargs in distinct.values():
        torch.library.opcheck(function, args, kwargs)


def test_opcheck_of_the_differentiable_operators_with_gradients(device):
    checked = set()
    for function, args, kwargs in record_calls(device):
        if function._schema.is_mutable:
            continue
        wanting, named = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.requires_grad_(t.is_floating_point()), (args, kwargs)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(*wanting, **named)
        result = result[0] if isinstance(result, tuple) else result
        if isinstance(result, torch.Tensor) and result.requires_grad:
            key = (str(function), *map(kind, args))
            if key not in checked:
                checked.add(key)
                torch.library.opcheck(function, wanting, named)
    assert checked


def skip_without_inductor(device):
    """Inductor compiles C++ for the CPU, and for a GPU what Triton starts its kernels with."""
    names = ("g++", "clang++") if device == "cpu" else ("cc", "gcc", "clang")
    if not any(map(shutil.which, names)):
        pytest.skip(f"none of the compilers {', '.join(names)} for inductor")
    if device == "cuda":
        pytest.importorskip("triton")
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            pytest.skip("no Python.h for Triton")


def small_network(device):
    g = generator(37)
    w1 = random_values(g, 12, 16, 3, 3).to(device).requires_grad_()
    w2 = random_values(g, 6, 12, 1, 1).to(device).requires_grad_()
    bias, scale = integers(g, 12).to(device), powers_of_two(g, 6).to(device)

    def forward(x):
        y = binary_conv2d(x, w1, bias, stride=2, padding=1, pad_value=1)
        y = y * 0.125
        return binary_conv2d(y, w2, scale=scale.requires_grad_(), residual=y[:, :6])

    return forward, [w1, w2, scale]


def compiled_equals_eager(device, backend, **options):
    forward, parameters = small_network(device)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=backend, **options)
    for size in (9, 12):
        results = []
        x = random_values(generator(38), 2, 16, size, 8).to(device)
        for function in (forward, compiled):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            grad = integers(generator(39), *y.shape).to(device)
            results.append([y, *torch.autograd.grad(y, [leaf, *parameters], grad)])
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][0].stride() == results[1][0].stride()
        for eager, got in zip(results[0][1:], results[1][1:], strict=True):
            assert_gradient_is(got, eager.cpu().double())


def test_compiled_fullgraph_equals_eager(device):
    compiled_equals_eager(device, "aot_eager")


def test_compiled_with_dynamic_shapes_equals_eager(device):
    compiled_equals_eager(device, "aot_eager", dynamic=True)


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_compiled_by_inductor_equals_eager(device, cpp_wrapper):
    skip_without_inductor(device)
    # As an option of torch.compile it does not reach backward in every version.
    with inductor_config.patch(cpp_wrapper=cpp_wrapper):
        compiled_equals_eager(device, "inductor")


def test_compiled_packed_chain_equals_eager(device):
    g = generator(40)
    x = random_values(g, 2, 40, 9, 8).to(device)
    w1 = prepare_weight(random_values(g, 20, 40, 3, 3).to(device))
    w2 = prepare_weight(random_values(g, 6, 20, 3, 3).to(device))
    limits = factors(g, 20).to(device)

    def forward(x):
        hidden = binary_conv2d(pack_bits(x), w1, out_dtype="bits", threshold=limits, padding=1)
        return binary_conv2d(hidden, w2, padding="same"), hidden.unpack(torch.float16)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for got, eager in zip(compiled(x), forward(x), strict=True):
        assert got.stride() == eager.stride()
        assert torch.equal(got, eager)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_clamp_and_prelu_equal_eager(device, backend):
    if backend == "inductor":
        skip_without_inductor(device)
    g = generator(41)
    w = random_values(g, 20, 40, 3, 3).to(device)
    shift, slope = integers(g, 20).to(device), powers_of_two(g, 20).to(device)
    below = torch.arange(20, device=device) % 2 == 0

    def forward(x):
        y, bits = binary_conv2d(
            x,
            w,
            padding=1,
            clamp=True,
            prelu=(-shift, slope, shift),
            threshold=1.0,
            threshold_below=below,
            with_bits=True,
        )
        return y, bits.data

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    x = random_values(g, 2, 40, 9, 8).to(device)
    for requires_grad in (False, True):
        results = []
        for function in (forward, compiled):
            leaves = [x.clone().requires_grad_(requires_grad), w, shift, slope]
            w.requires_grad_(requires_grad)
            slope.requires_grad_(requires_grad)
            y, bits = function(leaves[0])
            gradients = ()
            if requires_grad:
                grad = integers(generator(42), *y.shape).to(device)
                gradients = torch.autograd.grad(y, [leaves[0], w, slope], grad)
            results.append(((y.detach(), bits), gradients))
        (eager_outputs, eager_gradients), (outputs, gradients) = results
        for got, eager in zip(outputs, eager_outputs, strict=True):
            assert torch.equal(got, eager)
            assert got.stride() == eager.stride()
        for got, eager in zip(gradients, eager_gradients, strict=True):
            assert_gradient_is(got, eager.cpu().double())


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_fake_and_meta_tensors_have_the_right_form(mode):
    from torch._subclasses.fake_tensor import FakeTensorMode

    g = generator(41)
    cases = []
    for dtype, form, geometry in itertools.product(
        FLOATS,
        ("contiguous", "channels_last", "sliced"),
        ({}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}),
    ):
        x = random_values(g, 2, 16, 10, 9, dtype=dtype)
        x = {"contiguous": x, "channels_last": channels_last(x), "sliced": x[:, :, 1:, ::2]}[form]
        for out_dtype in (None, torch.int32, torch.float16, "bits"):
            cases.append((x, geometry, out_dtype))
    w = random_values(g, 7, 16, 3, 3)

    def run(x, w, geometry, out_dtype):
        bits = pack_bits(x)
        prepared = prepare_weight(w)
        results = [bits.data, bits.unpack(), pack_weight(w)]
        for form, weight in itertools.product((x, bits), (w, prepared)):
            y = binary_conv2d(form, weight, out_dtype=out_dtype, **geometry)
            results.append(y.data if isinstance(y, BitTensor) else y)
        return results

    fake_mode = FakeTensorMode()
    for x, geometry, out_dtype in cases:
        real = run(x, w, geometry, out_dtype)
        if mode == "meta":
            strided = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            fake = run(strided, w.to("meta"), geometry, out_dtype)
        else:
            with fake_mode:
                fake = run(fake_mode.from_tensor(x), fake_mode.from_tensor(w), geometry, out_dtype)
        for got, expected in zip(fake, real, strict=True):
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            assert got.stride() == expected.stride()
            assert got.device.type == ("meta" if mode == "meta" else "cpu")


def test_gradients_of_meta_tensors_have_the_right_form():
    x = torch.empty(2, 16, 9, 8, device="meta", requires_grad=True)
    w = torch.empty(6, 16, 3, 3, device="meta", requires_grad=True)
    binary_conv2d(x, w, padding=1).sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape


def test_autocast_leaves_the_result_exact(device):
    g = generator(42)
    x, w = random_values(g, 2, 16, 6, 7).to(device), random_values(g, 5, 16, 3, 3).to(device)
    x.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = binary_conv2d(x, w)
    assert torch.equal(y.detach().cpu().double(), reference_torch.conv2d(x, w))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------- bad input


def valid():
    return {"x": torch.ones(2, 16, 5, 5), "weight": torch.ones(8, 16, 3, 3)}


def bits():
    return pack_bits(torch.ones(2, 16, 5, 5))


# (what is different from a good call, exception, argument named, what the message says it got)
BAD_CALLS = [
    ({"x": None}, TypeError, "x", "NoneType"),
    ({"x": [1.0]}, TypeError, "x", "list"),
    ({"weight": None}, TypeError, "weight", "NoneType"),
    ({"weight": "w"}, TypeError, "weight", "str"),
    ({"bias": [0.0] * 8}, TypeError, "bias", "list"),
    ({"residual": 3}, TypeError, "residual", "int"),
    ({"x": torch.ones(2, 16, 5, 5, dtype=torch.int32)}, ValueError, "x", "int32"),
    ({"x": torch.ones(2, 16, 5, 5, dtype=torch.bool)}, ValueError, "x", "bool"),
    ({"x": torch.ones(2, 16, 5, 5, dtype=torch.complex64)}, ValueError, "x", "complex64"),
    ({"weight": torch.ones(8, 16, 3, 3, dtype=torch.int32)}, ValueError, "weight", "int32"),
    ({"weight": torch.ones(8, 16, 3, 3, dtype=torch.bool)}, ValueError, "weight", "bool"),
    ({"residual": torch.ones(2, 8, 3, 3, dtype=torch.int32)}, ValueError, "residual", "int32"),
    ({"residual": torch.ones(2, 8, 3, 3, dtype=torch.int8)}, ValueError, "residual", "int8"),
    ({"x": torch.ones(16, 5, 5)}, ValueError, "x", r"\(16, 5, 5\)"),
    ({"x": torch.ones(1, 2, 16, 5, 5)}, ValueError, "x", r"\(1, 2, 16, 5, 5\)"),
    ({"x": torch.tensor(1.0)}, ValueError, "x", r"\(\)"),
    ({"x": torch.ones(2, 15, 5, 5)}, ValueError, "x", "15"),
    ({"x": torch.ones(2, 0, 5, 5)}, ValueError, "x", "0"),
    ({"weight": torch.ones(8, 16, 3)}, ValueError, "weight", r"\(8, 16, 3\)"),
    ({"weight": torch.ones(0, 16, 3, 3)}, ValueError, "weight|out_channels", "0"),
    ({"weight": torch.ones(8, 16, 0, 3)}, ValueError, "weight|kernel_height", "0"),
    ({"weight": torch.ones(8, 8, 3, 3)}, ValueError, "x|weight", "16|8"),
    ({"bias": torch.ones(7)}, ValueError, "bias", r"\(7,\)"),
    ({"bias": torch.ones(8, 1, 1)}, ValueError, "bias", r"\(8, 1, 1\)"),
    ({"scale": torch.ones(1)}, ValueError, "scale", r"\(1,\)"),
    ({"scale": torch.ones(8, 1, 1)}, ValueError, "scale", r"\(8, 1, 1\)"),
    ({"residual": torch.ones(2, 8, 3, 4)}, ValueError, "residual", r"\(2, 8, 3, 4\)"),
    ({"residual": torch.ones(8, 3, 3)}, ValueError, "residual", r"\(8, 3, 3\)"),
    ({"residual": torch.ones(1, 8, 1, 1)}, ValueError, "residual", r"\(1, 8, 1, 1\)"),
    ({"stride": 0}, ValueError, "stride", "0"),
    ({"stride": (1, -2)}, ValueError, "stride", "-2"),
    ({"stride": (1, 2, 3)}, ValueError, "stride", r"\(1, 2, 3\)"),
    ({"stride": 1.5}, (TypeError, ValueError), "stride", "1.5|float"),
    ({"stride": 2**31}, ValueError, "stride", str(2**31)),
    ({"stride": 2**62}, ValueError, "stride", str(2**62)),
    ({"stride": "same"}, (TypeError, ValueError), "stride", "same|str"),
    ({"padding": -1}, ValueError, "pad", "-1"),
    ({"padding": (0, -1)}, ValueError, "pad", "-1"),
    ({"padding": "full"}, ValueError, "padding", "full"),
    ({"padding": (1, 1, 1, 1)}, ValueError, "padding", r"\(1, 1, 1, 1\)"),
    ({"padding": 2**31}, ValueError, "pad", str(2**31)),
    ({"padding": 2**62}, ValueError, "pad", str(2**62)),
    ({"padding": "same", "stride": 2}, ValueError, "padding|stride", "2"),
    ({"dilation": 0}, ValueError, "dilation", "0"),
    ({"dilation": (2, -1)}, ValueError, "dilation", "-1"),
    ({"dilation": 2**62}, ValueError, "dilation", str(2**62)),
    ({"dilation": 3}, ValueError, "kernel", "7"),
    ({"x": torch.ones(2, 16, 2, 5)}, ValueError, "kernel", "3"),
    ({"groups": 0}, ValueError, "groups", "0"),
    ({"groups": -1}, ValueError, "groups", "-1"),
    ({"groups": 3}, ValueError, "groups", "3"),
    ({"groups": 2}, ValueError, "groups", "2"),
    ({"groups": 4, "weight": torch.ones(8, 4, 3, 3)}, ValueError, "groups", "4"),
    ({"groups": 2, "weight": torch.ones(7, 8, 3, 3)}, ValueError, "groups", "2"),
    ({"groups": 2.5}, (TypeError, ValueError), "groups", "2.5|float"),
    ({"pad_value": 2}, ValueError, "pad_value", "2"),
    ({"pad_value": -3}, ValueError, "pad_value", "-3"),
    ({"pad_value": 0.5}, (TypeError, ValueError), "pad_value", "0.5|float"),
    ({"out_dtype": torch.int8}, ValueError, "out_dtype", "int8"),
    ({"out_dtype": torch.int64}, ValueError, "out_dtype", "int64"),
    ({"out_dtype": torch.float64}, ValueError, "out_dtype", "float64"),
    ({"out_dtype": torch.uint8}, ValueError, "out_dtype", "uint8"),
    ({"out_dtype": "float32"}, (TypeError, ValueError), "out_dtype", "float32"),
    ({"out_dtype": 3}, (TypeError, ValueError), "out_dtype", "3|int"),
    ({"threshold": 0.5}, ValueError, "threshold", "float32"),
    ({"threshold": 0.0}, ValueError, "threshold", "float32"),
    ({"threshold": torch.zeros(8)}, ValueError, "threshold", "float32"),
    ({"threshold": 0.5, "out_dtype": torch.int32}, ValueError, "threshold", "int32"),
    ({"threshold": torch.zeros(7), "out_dtype": "bits"}, ValueError, "threshold", r"\(7,\)"),
    ({"threshold": torch.zeros(8, 1), "out_dtype": "bits"}, ValueError, "threshold", r"\(8, 1\)"),
    ({"threshold": "0", "out_dtype": "bits"}, TypeError, "threshold", "str"),
    ({"threshold": [0.0] * 8, "out_dtype": "bits"}, TypeError, "threshold", "list"),
    *(
        ({name: value, "out_dtype": torch.int32}, ValueError, name, "int32")
        for name, value in (
            ("bias", torch.ones(8)),
            ("scale", torch.ones(8)),
            ("residual", torch.ones(2, 8, 3, 3)),
            ("prelu", torch.ones(8)),
            ("prelu", (None, None, None)),
            ("threshold_below", torch.ones(8, dtype=torch.bool)),
            ("with_bits", True),
        )
    ),
    ({"prelu": [0.0] * 8}, TypeError, "prelu", "list"),
    ({"prelu": torch.ones(1)}, ValueError, "prelu", r"\(1,\)"),
    ({"prelu": (None, None)}, ValueError, "prelu", "2"),
    ({"prelu": ("0", None, None)}, TypeError, "in_shift", "str"),
    ({"prelu": (None, torch.ones(7), None)}, ValueError, "slope", r"\(7,\)"),
    ({"prelu": (None, None, torch.ones(8, 1))}, ValueError, "out_shift", r"\(8, 1\)"),
    ({"threshold_below": torch.ones(8, dtype=torch.bool)}, ValueError, "threshold_below", "floa"),
    ({"threshold_below": True, "out_dtype": "bits"}, TypeError, "threshold_below", "bool"),
    ({"threshold_below": torch.ones(8), "with_bits": True}, ValueError, "threshold_below", "floa"),
    (
        {"threshold_below": torch.ones(7, dtype=torch.bool), "with_bits": True},
        ValueError,
        "threshold_below",
        r"\(7,\)",
    ),
    ({"with_bits": True, "out_dtype": "bits"}, ValueError, "with_bits", "bits"),
]


def value_id(value):
    if isinstance(value, torch.Tensor):
        return f"{name_of(value.dtype)}{list(value.shape)}"
    if isinstance(value, tuple):
        return ",".join(map(value_id, value))
    return getattr(value, "__name__", str(value))


def call_id(value):
    if isinstance(value, dict):
        return ",".join(f"{k}={value_id(v)}" for k, v in value.items())
    return value_id(value)


def assert_names(message, name, got):
    assert re.search(rf"(?<![a-z])({name})", message), f"{message!r} does not name {name}"
    assert re.search(got, message), f"{message!r} does not say that it got {got}"
    assert "expected" in message, f"{message!r} does not say what is expected"


@pytest.mark.parametrize(("changes", "error", "name", "got"), BAD_CALLS, ids=call_id)
def test_bad_argument_is_refused_by_name(changes, error, name, got):
    with pytest.raises(error) as raised:
        binary_conv2d(**valid() | changes)
    assert_names(str(raised.value), name, got)


@pytest.mark.parametrize(
    ("changes", "error", "name", "got"),
    [case for case in BAD_CALLS if not {"x", "weight"} & set(case[0])],
    ids=call_id,
)
def test_bad_argument_beside_packed_operands_is_refused_by_name(changes, error, name, got):
    packed = {"x": bits(), "weight": prepare_weight(valid()["weight"])}
    with pytest.raises(error) as raised:
        binary_conv2d(**packed | changes)
    assert_names(str(raised.value), name, got)


def test_float64_is_refused_by_name():
    for function in (pack_bits, pack_weight, prepare_weight):
        with pytest.raises((TypeError, ValueError), match=r"(x|w): got .*float64.*expected"):
            function(torch.ones(2, 16, 5, 5, dtype=torch.float64))
    for name, shape in (("x", (2, 16, 5, 5)), ("weight", (8, 16, 3, 3))):
        with pytest.raises((TypeError, ValueError), match=rf"{name}: got .*float64.*expected"):
            binary_conv2d(**valid() | {name: torch.ones(shape, dtype=torch.float64)})


def test_prepared_weight_of_other_groups_is_refused():
    prepared = prepare_weight(torch.ones(8, 16, 3, 3), groups=2)
    with pytest.raises(ValueError, match=r"groups: got 4, expected 2"):
        binary_conv2d(torch.ones(1, 32, 5, 5), prepared, groups=4)
    with pytest.raises(ValueError, match=r"16.*expected 32"):
        binary_conv2d(torch.ones(1, 16, 5, 5), prepared)


def test_bit_tensor_of_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"x: got 15 .*expected 16"):
        binary_conv2d(pack_bits(torch.ones(1, 15, 5, 5)), torch.ones(8, 16, 3, 3))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "name"),
    [
        (pack_bits, (None,), TypeError, "x"),
        (pack_bits, ([1.0],), TypeError, "x"),
        (pack_bits, (torch.ones(3, 4, 5),), ValueError, "x"),
        (pack_bits, (torch.ones(2, 3, 4, 5, dtype=torch.int32),), ValueError, "x"),
        (pack_bits, (torch.ones(2, 3, 4, 5, dtype=torch.uint8),), ValueError, "x"),
        (pack_bits, (torch.ones(2, 0, 4, 5),), ValueError, "x|channels"),
        (pack_bits, (torch.ones(2, 3, 4, 5), torch.ones(4)), ValueError, "threshold"),
        (pack_bits, (torch.ones(2, 3, 4, 5), torch.ones(3, 1)), ValueError, "threshold"),
        (pack_bits, (torch.ones(2, 3, 4, 5), "0"), TypeError, "threshold"),
        (pack_bits, (torch.ones(2, 3, 4, 5), [0.0] * 3), TypeError, "threshold"),
        (pack_weight, (None,), TypeError, "w"),
        (pack_weight, (torch.ones(3, 4, 5),), ValueError, "w"),
        (pack_weight, (torch.ones(2, 3, 4, 5, dtype=torch.int32),), ValueError, "w"),
        (pack_weight, (torch.ones(2, 0, 3, 3),), ValueError, "w|channels"),
        (prepare_weight, (None,), TypeError, "w"),
        (prepare_weight, (torch.ones(8, 16, 3),), ValueError, "w"),
        (prepare_weight, (torch.ones(8, 16, 3, 3), 3), ValueError, "groups"),
        (prepare_weight, (torch.ones(8, 16, 3, 3), 0), ValueError, "groups"),
        (prepare_weight, (torch.ones(8, 4, 3, 3), 2), ValueError, "groups"),
        (prepare_weight, (torch.ones(8, 16, 3, 3), 1, 15), ValueError, "in_channels"),
        (
            prepare_weight,
            (torch.zeros(8, 3, 3, 16, dtype=torch.uint8), 1, 129),
            ValueError,
            "in_ch",
        ),
        (prepare_weight, (torch.zeros(8, 3, 3, 16, dtype=torch.uint8), 1, 0), ValueError, "in_ch"),
        (prepare_weight, (torch.zeros(8, 3, 3, 16, dtype=torch.uint8), 1, -5), ValueError, "in_ch"),
        (
            prepare_weight,
            (torch.zeros(8, 3, 3, 15, dtype=torch.uint8), 1, 100),
            ValueError,
            "w|in_ch",
        ),
        (prepare_weight, (torch.zeros(8, 9, 16, dtype=torch.uint8), 1, 100), ValueError, "w"),
        (prepare_weight, (torch.ones(8, 16, 3, 3, dtype=torch.int32),), ValueError, "w"),
    ],
    ids=value_id,
)
def test_bad_argument_of_the_packing_functions_is_refused_by_name(function, arguments, error, name):
    with pytest.raises(error) as raised:
        function(*arguments)
    assert_names(str(raised.value), name, "got")


def test_packed_weight_without_in_channels_is_refused_or_full():
    """128 bits may mean any of 113 to 128 channels: only a full word can be guessed."""
    packed = pack_weight(torch.ones(8, 128, 3, 3))
    assert tuple(prepare_weight(packed, in_channels=128).shape) == (8, 128, 3, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.uint8, torch.bool, None, "f"])
def test_unpack_to_another_type_is_refused(dtype):
    with pytest.raises((TypeError, ValueError), match=r"dtype|type"):
        bits().unpack(dtype)


def test_an_output_without_pixels_is_refused_on_fake_tensors_too():
    x, w = torch.empty(1, 8, 2, 2, device="meta"), torch.empty(4, 8, 3, 3, device="meta")
    with pytest.raises(ValueError, match="kernel"):
        binary_conv2d(x, w)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused_by_name():
    x, w = torch.ones(1, 8, 5, 5), torch.ones(4, 8, 3, 3)
    with pytest.raises(ValueError, match=r"weight: got .*cpu.*expected cuda"):
        binary_conv2d(x.cuda(), w)
    for name in ("bias", "scale"):
        with pytest.raises(ValueError, match=rf"{name}: got .*cpu.*expected cuda"):
            binary_conv2d(x.cuda(), w.cuda(), **{name: torch.ones(4)})
    with pytest.raises(ValueError, match=r"residual: got .*cuda.*expected cpu"):
        binary_conv2d(x, w, residual=torch.ones(1, 4, 3, 3).cuda())
    with pytest.raises(ValueError, match=r"weight: got .*cpu.*expected cuda"):
        binary_conv2d(pack_bits(x.cuda()), prepare_weight(w))
    with pytest.raises(ValueError, match=r"threshold: got .*cpu.*expected cuda"):
        pack_bits(x.cuda(), torch.zeros(8))
