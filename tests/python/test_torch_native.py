"""The operators torch.ops.binconv as such: memory of any form, bad arguments, leaks, threads.

Their callers in binconv.torch check and convert much of what comes to the kernels unchecked here.
"""

import contextlib
import random
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import reference_torch
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import binconv.torch  # noqa: F401  Registers the operators.

OPS = torch.ops.binconv
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
VALUES = (*FLOATS, torch.int8)
SPECIAL = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 1.0, -1.0])


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def assert_same(got, expected):
    """Equal in dtype and every value, NaN included."""
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if is_tensor(a):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def cloned(tree):
    return tree_map_only(torch.Tensor, lambda t: t.detach().clone(), tree)


def packed(bits):
    """Booleans (N, C, H, W), of NumPy or PyTorch, as a packed image."""
    return torch.from_numpy(reference.pack(torch.as_tensor(bits).numpy()))


def strided(x):
    return torch.stack((x, x), -1)[..., 0]


def unaligned(x):
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) if x.numel() else x


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": strided,
    "unaligned": unaligned,
    "amid others": lambda x: F.pad(x, (1, 2, 0, 0, 2, 1))[:, 2:-1, :, 1:-2],
    "free strides": lambda x: x.as_strided(  # Where there is one place, its stride is unused.
        x.shape, [s if n > 1 else 999 for n, s in zip(x.shape, x.stride(), strict=True)]
    ),
}


# ------------------------------------------------------------------------------- against references


class Draw:
    """Random arguments. Values are made on the CPU, then laid out on the device."""

    def __init__(self, seed, device):
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.device = device

    def choose(self, *given):
        return self.random.choice(given)

    def maybe(self, make, *arguments, where=True):
        return make(*arguments) if where and self.choose(False, True) else None

    def values(self, *shape, dtype=torch.float32):
        if dtype == torch.int8:
            return torch.randint(-128, 128, shape, generator=self.generator, dtype=dtype)
        x = torch.randn(shape, generator=self.generator)
        special = SPECIAL[torch.randint(len(SPECIAL), shape, generator=self.generator)]
        return torch.where(torch.rand(shape, generator=self.generator) < 0.1, special, x).to(dtype)

    def eighths(self, *shape, dtype):
        """Values whose sums are exact."""
        return (torch.randint(-32, 33, shape, generator=self.generator) / 8).to(dtype)

    def few_ones(self, *shape):
        """Values of 1 and -1, a tenth of them not 0: bfloat16 holds their sums."""
        few = torch.rand(shape, generator=self.generator) < 0.1
        return few * (self.bits(*shape) * 2 - 1)

    def bits(self, *shape):
        return torch.rand(shape, generator=self.generator) < 0.5

    def sizes(self):
        channels = self.choose(1, 7, 8, 33, 128, 130)
        return self.choose(0, 1, 2), channels, self.choose(1, 4, 5), self.choose(1, 3, 9)

    def laid(self, x):
        """On the device, in any memory if it is an image; None stays None."""
        if x is None or x.dim() != 4:
            return x if x is None else self.choose(unaligned, cloned)(x.to(self.device))
        return LAYOUTS[self.choose(*LAYOUTS)](x.to(self.device))


def array(x, other=0.0):
    return other if x is None else x.float().numpy()


def pack_bits(d):
    x = d.values(*d.sizes(), dtype=d.choose(*VALUES))
    limit, limits = d.choose(0.0, -0.5, torch.nan, 1e300), d.maybe(d.values, x.shape[1])
    bits = reference.bits_of(array(x), array(limits, float(torch.tensor(limit).float())))
    return (d.laid(x), limit, d.laid(limits)), packed(bits)


def unpack_bits(d):
    bits, dtype = d.bits(*d.sizes()), d.choose(*VALUES)
    return (d.laid(packed(bits)), bits.shape[1], dtype), (bits * 2 - 1).to(dtype)


def abs_mean(d):
    x = d.eighths(d.choose(1, 4, 8), d.choose(1, 16), 4, d.choose(1, 2), dtype=d.choose(*FLOATS))
    rows = d.choose(1, len(x))
    return (d.laid(x), rows), x.double().abs().reshape(rows, -1).mean(1).float()


class Convolution:
    """Random signs of an image and a weight, and the integers that come of them."""

    def __init__(self, d, dtypes=VALUES, kernel=None):
        groups = d.choose(1, 1, 2, 3)
        depth = d.choose(8, 16) if groups > 1 or kernel else d.choose(1, 8, 33, 128, 130)
        kernel = kernel or (d.choose(1, 2, 3, 5), d.choose(1, 3, 4))
        stride, dilation = (d.choose(1, 2), d.choose(1, 3)), (d.choose(1, 2), d.choose(1, 1, 3))
        top, left, bottom, right = pads = [d.choose(0, 1, 2) for _ in range(4)]
        least = [dilation[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + 2] for i in (0, 1)]
        size = [max(1, n) + d.choose(0, 1, 4, 13) for n in least]
        self.x = d.values(d.choose(0, 1, 2), depth * groups, *size, dtype=d.choose(*VALUES))
        self.shape = [groups * d.choose(1, 5, 16), depth, *kernel]
        make = d.eighths if dtypes == FLOATS else d.values
        self.weight, pad_value = make(*self.shape, dtype=d.choose(*dtypes)), d.choose(0, 1, -1)
        self.limits = d.maybe(d.values, self.x.shape[1])
        self.geometry = [*stride, *pads, *dilation, groups, pad_value]
        weight_bits = OPS.pack_bits(self.weight.to(d.device), 0.0, None)
        prepared = OPS.prepare_weight(d.laid(weight_bits), depth, groups)
        longer = torch.cat((prepared, prepared.new_full((16,), 255)))
        self.prepared = d.choose(strided, unaligned, cloned)(d.choose(prepared, longer))
        self.bits = torch.from_numpy(reference.bits_of(array(self.x), array(self.limits)))
        signs = F.pad(self.bits * 2.0 - 1, (left, right, top, bottom), value=float(pad_value))
        others = {"stride": stride, "dilation": dilation, "groups": groups}
        weight_signs = reference_torch.sign(self.weight)
        self.acc = reference_torch.conv2d_of_signs(signs.double(), weight_signs, **others)

    def factors(self, d, dtype, *, scales=True):
        """A scale, a bias and a residual, as far as the type of the output permits."""
        floats, count = dtype != torch.int32, self.shape[0]
        scale = d.maybe(reference_torch.factors, d.generator, count, where=floats and scales)
        bias = d.maybe(reference_torch.factors, d.generator, count, where=floats)
        other = d.choose(*FLOATS)
        return scale, bias, d.maybe(lambda: d.values(*self.acc.shape, dtype=other), where=floats)


def convolution(d, makes, *, of_values=False):
    """Makes 'bits', 'numbers' or 'both'. The steps behind a residual are those of other tests."""
    c, to_bits = Convolution(d), makes == "bits"
    dtype = None if to_bits else d.choose(*FLOATS, torch.int32 if makes == "numbers" else FLOATS[0])
    factors = c.factors(d, dtype)
    limit = 0.0 if makes == "numbers" else d.choose(0.0, -1.5, torch.nan, torch.inf)
    limits, below = (d.maybe(f, c.shape[0], where=makes != "numbers") for f in (d.values, d.bits))
    flags = None if below is None else below.byte() * d.choose(1, 255)
    source = (d.laid(c.x), d.laid(c.limits)) if of_values else (d.laid(packed(c.bits)),)
    form = c.prepared, c.shape + c.geometry, dtype, to_bits or d.choose(False, True)
    y = reference_torch.epilogue(c.acc, *factors)
    bits = packed(reference.bits_of(y.numpy(), array(limits, limit), array(below)))
    results = {"bits": [bits], "numbers": [y.to(dtype)], "both": [y.to(dtype), bits]}[makes]
    steps = *map(d.laid, factors), False, False, None, None, None, limit
    return (*source, *form, *steps, d.laid(limits), d.laid(flags)), results


def sign_conv2d_no_grad(d):
    means, clip = d.choose(False, True), d.choose(None, 0.0, 0.5, torch.inf, 1e300)
    c = Convolution(d, FLOATS, (2, 4)) if means else Convolution(d)
    dtype = d.choose(*FLOATS, FLOATS[0] if means else torch.int32)
    factors, prepared = c.factors(d, dtype, scales=not means), None if means else c.prepared
    operands = map(d.laid, (c.x, c.weight, c.limits, *factors))
    mean = c.weight.double().abs().mean((1, 2, 3)).float() if means else torch.empty(0)
    y = reference_torch.epilogue(c.acc, mean if means else factors[0], *factors[1:])
    bits = [packed(c.bits)]
    if clip is not None:
        clipped = reference.inside_of(array(c.x), array(c.limits), min(clip, 3.4028234e38))
        bits.append(packed(clipped))
    arguments = *operands, d.choose(None, prepared), dtype, means, clip, *c.geometry
    return arguments, [y.to(dtype), torch.stack(bits), mean]


def weight_gradient(d):
    weight, dtype = d.values(*d.sizes(), dtype=d.choose(*VALUES)), d.choose(*FLOATS)
    gradient, scale = (
        d.values(*weight.shape, dtype=d.choose(*FLOATS)),
        d.maybe(d.values, len(weight)),
    )
    limit = d.choose(0.0, 0.5, 1.0, torch.inf)
    y = gradient.float() if scale is None else gradient.float() * scale.view(-1, 1, 1, 1)
    inside = (weight.float().abs() <= limit) | torch.tensor(limit == torch.inf)
    y = torch.where(inside, y, 0).to(dtype)
    return (d.laid(gradient), d.laid(weight), d.laid(scale), limit, dtype), y


CASES = {
    "packed_conv2d": lambda d: convolution(d, d.choose("bits", "numbers")),
    "packed_conv2d_with_bits": lambda d: convolution(d, "both"),
    "values_conv2d": lambda d: convolution(d, d.choose("bits", "numbers"), of_values=True),
    **{f.__name__: f for f in (pack_bits, unpack_bits, abs_mean, weight_gradient)},
    "sign_conv2d_no_grad": sign_conv2d_no_grad,
}
OPERATORS = (*CASES, "packed_conv2d_no_grad", "prepare_weight", "sign_conv2d_backward")


def forms(tree):
    return [(x.shape, x.dtype, x.device, strides_in_use(x)) for x in tree_leaves(tree)]


def strides_in_use(x):
    sizes = zip(x.shape, x.stride(), strict=True)
    return [stride for size, stride in sizes if size > 1 and x.numel()]


@pytest.mark.parametrize("name", CASES)
def test_operator_matches_reference(device, name, fuzz_count, fuzz_seed):
    operator, draw = getattr(OPS, name).default, Draw(fuzz_seed, device)
    for i in range(fuzz_count // 3):
        arguments, expected = CASES[name](draw)
        before = cloned(arguments)
        results = operator(*arguments)
        assert_same(results, expected)
        assert_same(arguments, before)
        if i % 8 == 0:
            with FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
                assert forms(operator(*fakes)) == forms(results)


def gradients_of_signs(c, weight_signs, grad, needs):
    """convT(grad, weight_signs) and corr(grad, signs of the image), in float64."""
    *stride, top, left, bottom, right, dh, dw, groups, pad_value = c.geometry
    signs = (c.bits * 2.0 - 1).double().requires_grad_()
    weight = weight_signs.double().requires_grad_()
    padded = F.pad(signs, (left, right, top, bottom), value=float(pad_value))
    y = F.conv2d(padded, weight, None, stride, 0, (dh, dw), groups)
    both = torch.autograd.grad(y, (signs, weight), grad.double())
    return [g if needed else torch.empty(0) for g, needed in zip(both, needs, strict=True)]


def test_backward_matches_reference(device, fuzz_count, fuzz_seed):
    d = Draw(fuzz_seed, device)
    for i in range(fuzz_count // 3):
        c, dtype, weight_dtype = Convolution(d), d.choose(*FLOATS), d.choose(*FLOATS)
        grad = d.few_ones(*c.acc.shape).to(dtype)
        scale = d.maybe(
            lambda n: 2.0 ** torch.randint(-1, 2, (n,), generator=d.generator), c.shape[0]
        )
        factor = torch.ones(1) if scale is None else scale
        needs, masks = (d.choose(False, True), d.choose(False, True)), d.choose(False, True)
        limit = d.choose(None, 0.5, 1e300, torch.inf)
        kept = [c.bits, d.bits(*c.bits.shape)]
        images = torch.stack([packed(bits) for bits in kept[: d.choose(1 + masks, 2)]])
        images = images[..., : d.choose((c.bits.shape[1] + 7) // 8, 144)].contiguous()
        weight_signs = reference_torch.sign(c.weight).double()
        filters = weight_signs * factor.double().view(-1, 1, 1, 1)
        of_x, of_weight = gradients_of_signs(c, filters, grad, needs)
        if needs[0] and masks:
            of_x = torch.where(kept[1], of_x, 0)
        if needs[1] and limit is not None:
            inside = (c.weight.float().abs() <= min(limit, 3.4028234e38)) | (limit == torch.inf)
            of_weight = torch.where(inside, of_weight * factor.double().view(-1, 1, 1, 1), 0)
        operands = d.laid(grad), unaligned(images.to(device)), d.laid(c.weight), d.laid(scale)
        arguments = *operands, *needs, masks, limit, weight_dtype, *c.geometry
        before = cloned(arguments)
        results = OPS.sign_conv2d_backward(*arguments)
        assert_same(arguments, before)
        assert [x.dtype for x in results] == [dtype, weight_dtype if needs[1] and limit else dtype]
        for got, expected in zip(results, (of_x, of_weight), strict=True):
            reference_torch.assert_gradient_is(got, expected)
        if i % 8 == 0:
            with FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
                assert forms(OPS.sign_conv2d_backward(*fakes)) == forms(results)


@pytest.mark.parametrize("channels_last", [False, True])
def test_residual_beside_bits_has_the_order_of_its_dimensions(device, channels_last):
    call = good("packed_conv2d_with_bits", device)
    call["residual"] = Draw(0, device).values(2, 3, 3, 3).to(device) * 200  # Fits in any order.
    weight = OPS.pack_bits(torch.ones(3, 16, 3, 3, device=device), 0.0, None)
    call |= {"prepared": OPS.prepare_weight(weight, 16, 1), "activation": False}
    call["geometry"][0] = 3
    call |= dict.fromkeys(("scale", "bias", "threshold_below", "channel_threshold", *PRELU))
    expected = OPS.packed_conv2d_with_bits(**call)[1]
    got = OPS.packed_conv2d(**call | {"out_dtype": None, "channels_last": channels_last})
    assert_same(got, expected)


# ------------------------------------------------------------------------------------ bad arguments


PRELU = ("in_shift", "slope", "out_shift")
SIZES = {
    **dict.fromkeys(("stride_height", "stride_width"), 1),
    **dict.fromkeys(("pad_top", "pad_left", "pad_bottom", "pad_right"), 0),
    **{"dilation_height": 1, "dilation_width": 1, "groups": 1, "pad_value": 0},
}
GEOMETRY = [8, 16, 3, 3, *SIZES.values()]


def good(name, device="cpu"):
    """The arguments of a good call."""
    draw = Draw(0, device)
    x, weight = (draw.values(*n).to(device) for n in ((2, 16, 5, 5), (8, 16, 3, 3)))
    bits, weight_bits = OPS.pack_bits(x, 0.0, None), OPS.pack_bits(weight, 0.0, None)
    inputs, outputs = torch.ones(16, device=device), torch.ones(8, device=device)
    given = {"x": x, "weight": weight, "gradient": weight, "bits": bits, "packed": bits}
    given |= {"rows": 8, "channels": 16, "in_channels": 16, "limit": 1.0, "clip": 1.0}
    given |= dict.fromkeys(("scale", "bias", *PRELU), outputs) | {"input_threshold": inputs}
    given |= {"prepared": OPS.prepare_weight(weight_bits, 16, 1), "geometry": GEOMETRY, **SIZES}
    given |= {"residual": torch.ones(2, 8, 3, 3, device=device), "channels_last": True}
    given |= {"activation": True, "threshold": 0.0, "dtype": FLOATS[0], "out_dtype": FLOATS[0]}
    if name == "packed_conv2d_with_bits":
        given |= {"channel_threshold": outputs, "threshold_below": outputs.byte()}
    own = {
        "pack_bits": {"channel_threshold": inputs},
        "abs_mean": {"x": weight},
        "prepare_weight": {"packed": weight_bits},
        "sign_conv2d_no_grad": {"threshold": inputs, "prepared": None, "mean_scale": False},
        "sign_conv2d_backward": {"bits": torch.stack((bits, bits))},
    }
    given["grad"] = given["residual"]
    given |= dict.fromkeys(("needs_x", "needs_weight", "masks"), True)
    given |= own.get(name, {})
    names = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    return cloned({key: given[key] for key in names if key in given})


def put(index, number):
    return lambda sizes: [number if i - len(sizes) == index else n for i, n in enumerate(sizes)]


def always(value):
    return lambda _: value


TYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.bool, torch.int32)}
BAD_TYPES = {name: lambda x, t=t: x.to(t) for name, t in TYPES.items()}
ANY = BAD_TYPES | {"deeper": lambda x: x[None], "scalar": lambda x: x.flatten()[0]}
IMAGE = ANY | {"flat": torch.flatten, "uint8": torch.Tensor.byte}
BITS = ANY | {"flat": torch.flatten, "float32": torch.Tensor.float, "int8": torch.Tensor.char}
COLUMN = ANY | {"shorter": lambda x: x[1:], "strided": strided, "int8": torch.Tensor.char}
SMALLER = {"smaller": lambda x: x[..., 1:].contiguous()}
NUMBERS = {"0": always(0), "-1": always(-1), "2^62": always(2**62)}
SAME = ("packed_conv2d_no_grad", "packed_conv2d_with_bits", "values_conv2d")  # As packed_conv2d.
OTHERS = {"-1": always(-1.0), "nan": always(float("nan"))}
DTYPES = {**{name: always(t) for name, t in TYPES.items()}, "uint8": always(torch.uint8)}
WRONG = {
    **dict.fromkeys(("x", "weight"), IMAGE),
    **dict.fromkeys(("grad", "gradient", "residual"), IMAGE | SMALLER),
    **dict.fromkeys(("packed", "bits"), BITS),
    **dict.fromkeys(("scale", "bias", *PRELU, "channel_threshold", "input_threshold"), COLUMN),
    "threshold_below": COLUMN | {"float32": torch.Tensor.float},
    "prepared": ANY | {"shorter": lambda x: x[1:], "float32": torch.Tensor.float},
    **dict.fromkeys(("channels", "rows", "in_channels"), NUMBERS),
    **{
        name: NUMBERS if n else {"-1": always(-1), "2^31": always(2**31)}
        for name, n in SIZES.items()
    },
    "pad_value": {"2": always(2), "2^32 + 1": always(2**32 + 1)},
    **dict.fromkeys(("clip", "limit"), OTHERS),
    "dtype": DTYPES,
    "out_dtype": {name: dtype for name, dtype in DTYPES.items() if name != "int32"},
    "geometry": {f"{n} numbers": lambda x, n=n: x[:n] for n in (0, 3, 9)}
    | {f"[{i}]={n}": put(i, n) for i in (-10, -4, -2) for n in (0, -1, 2**62)}
    | {f"[{i}]={n}": put(i, n) for i, n in ((-1, 2), (-1, 2**32 + 1), (-5, -1), (-8, 2**31))},
    "abs_mean.x": BAD_TYPES | {"int8": torch.Tensor.char},
    "threshold": COLUMN,
    "prepare_weight.packed": BITS | SMALLER,
    "packed_conv2d.packed": BITS | SMALLER,
}
NAMES = {  # In a message, if not that of the argument.
    "channel_threshold": "threshold",
    "clip": "limit",
    "rows": "out",
    "geometry": r"weight|pad_\w+|stride_height|dilation_height|groups",
}
BAD = [
    (name, argument, label, change)
    for name in OPERATORS
    for argument, value in good(name).items()
    if is_tensor(value) or (value is not None and argument != "threshold")
    if name not in SAME or argument not in good("packed_conv2d")
    for label, change in WRONG.get(f"{name}.{argument}", WRONG.get(argument, {})).items()
]


@pytest.mark.parametrize(
    ("name", "argument", "change"),
    [pytest.param(*case[:2], case[3], id="-".join(case[:3])) for case in BAD],
)
def test_bad_argument_is_refused_by_name(device, name, argument, change):
    call = good(name, device)
    call[argument] = change(call[argument])
    before = cloned(call)
    names = f"{argument}|{NAMES.get(argument, argument)}"
    with pytest.raises(ValueError, match=rf"^({names}): got .*, expected "):
        getattr(OPS, name)(**call)
    assert_same(call, before)


@pytest.mark.parametrize(
    "name", [n for n in OPERATORS if sum(map(is_tensor, good(n).values())) > 1]
)
def test_an_operand_on_meta_beside_others_is_refused(device, name):
    call = good(name, device)
    for key in [key for key, value in call.items() if is_tensor(value)]:
        with pytest.raises(ValueError, match=f"^{name}: got a tensor on meta, expected one on "):
            getattr(OPS, name)(**call | {key: call[key].to("meta")})


SHAPED_AS_BITS = {  # The output is, in memory.
    "x": LAYOUTS["channels_last"](torch.ones(2, 16, 5, 5)),
    "weight": torch.ones(16, 16, 3, 3),
    **dict.fromkeys(("scale", "bias", "residual")),
}


@pytest.mark.parametrize(
    ("name", "says", "changes"),
    [
        ("packed_conv2d", "threshold", {"channel_threshold": torch.ones(8)}),
        ("packed_conv2d", "threshold", {"threshold": 0.5}),
        ("packed_conv2d", "threshold_below", {"threshold_below": torch.ones(8).byte()}),
        ("packed_conv2d", "scale", {"out_dtype": torch.int32}),
        ("packed_conv2d", "in_shift", {"activation": False}),
        ("packed_conv2d_with_bits", "bits", {"out_dtype": None}),
        ("sign_conv2d_no_grad", "scale", {"out_dtype": torch.int32}),
        ("sign_conv2d_no_grad", "scale", {"mean_scale": True}),
        ("sign_conv2d_no_grad", "prepared", {"prepared": torch.ones(8, 16, 3, 3)}),
        ("sign_conv2d_no_grad", "out_dtype", {"out_dtype": torch.uint8, **SHAPED_AS_BITS}),
        ("sign_conv2d_no_grad", "kernel_height", {"x": torch.ones(2, 16, 2, 5)}),
        ("values_conv2d", "x", {"x": torch.ones(2, 15, 5, 5)}),
        (
            "weight_gradient",
            "gradient",
            {"weight": LAYOUTS["channels_last"](torch.ones(8, 16, 3, 3))},
        ),
        ("prepare_weight", "in_channels", {"in_channels": 2**60 + 16, "groups": 16}),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_by_name(device, name, says, changes):
    call = good(name, device)
    if name == "prepare_weight":
        call["packed"] = call["packed"].repeat(2, 1, 1, 1)  # Of 16 filters, one for each group.
    if name == "weight_gradient":
        call["gradient"] = call["gradient"][0]
    call |= tree_map_only(torch.Tensor, lambda t: t.to(device), changes)
    with pytest.raises(ValueError, match=f"^{says}: .*expected"):
        getattr(OPS, name)(**call)


# -------------------------------------------------------------------------- what calls leave behind


@pytest.mark.parametrize("fails", [False, True], ids=["good", "failing"])
@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_are_released(device, name, fails):
    """The Python object of a tensor stays for as long as anything refers to the tensor."""
    call = good(name, device)
    if fails:
        last = [key for key, value in call.items() if is_tensor(value)][-1]
        call[last] = call[last].double()
    kept = [weakref.ref(x) for x in call.values() if is_tensor(x)]
    for _ in range(3):
        try:
            results = getattr(OPS, name)(**call)
            assert not fails
            kept += [weakref.ref(x) for x in tree_leaves(results) if is_tensor(x)]
        except ValueError:
            assert fails
    call = results = None
    assert [x() for x in kept] == [None] * len(kept)


def memory_held(device):
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (64, 64, 3, 9)], ids=["good", "failing"])
def test_copies_are_released(device, shape):
    weight = LAYOUTS["channels_last"](torch.ones(64, 64, 3, 3, device=device))
    gradient = torch.ones(shape, device=device)  # Is copied to the layout of the weight.
    for count in (10, 200):
        before = memory_held(device)
        for _ in range(count):
            with contextlib.suppress(ValueError):
                OPS.weight_gradient(gradient, weight, None, 1.0, torch.float32)
    assert memory_held(device) - before < 100 * gradient.nbytes


def test_a_gradient_is_released_when_its_padding_finds_no_memory(device):
    bits = torch.zeros(1, 200000, 1, 1, 1, dtype=torch.uint8, device=device)
    weight, grad = torch.ones(8, 8, 1, 1, device=device), torch.ones(200000, 8, 2, 2, device=device)
    most = 2**31 - 1
    geometry = [most, most, 0, 0, most, most, 1, 1, 1, 1]
    before = grad._use_count()
    with pytest.raises(RuntimeError, match="aten::pad"):
        OPS.sign_conv2d_backward(
            grad, bits, weight, None, True, True, False, None, torch.float32, *geometry
        )
    assert grad._use_count() == before


def test_calls_of_many_threads_at_a_time_give_the_same(device):
    draw = Draw(0, device)
    calls = [(getattr(OPS, name), *CASES[name](draw)) for name in CASES for _ in range(4)]

    def run(_):
        for operator, arguments, expected in calls:
            assert_same(operator(*arguments), expected)
        with pytest.raises(ValueError, match=r"^geometry: got"):
            OPS.packed_conv2d_no_grad(**good("packed_conv2d", device) | {"geometry": GEOMETRY[4:]})

    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            run(None)
            with ThreadPoolExecutor(6) as pool:
                list(pool.map(run, range(12)))
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------- around the operators


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_operator_equals_eager(device, name):
    torch.compiler.reset()  # Else each test counts as another compilation of one function.
    operator, calls = getattr(OPS, name), [good(name, device) for _ in range(2)]
    expected = operator(**calls[0])
    got = torch.compile(operator, backend="aot_eager", fullgraph=True, dynamic=False)(**calls[1])
    assert_same(got, expected)
    assert_same(calls[1], calls[0])
    assert forms(got) == forms(expected)


def test_a_backward_of_which_nothing_is_needed_passes_opcheck(device):
    call = good("sign_conv2d_backward", device) | {"needs_x": False, "needs_weight": False}
    torch.library.opcheck(OPS.sign_conv2d_backward.default, tuple(call.values()))


@pytest.mark.parametrize("name", CASES)
def test_vmap_equals_a_loop(device, name):
    call = good(name, device)
    first = next(key for key in call if is_tensor(call[key]))
    stack = torch.stack([call.pop(first)] * 3)

    def operator(x):
        return getattr(OPS, name)(**{first: x}, **call)

    results = [tree_leaves(operator(x)) for x in stack]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = tree_leaves(torch.func.vmap(operator)(stack))
    assert_same(got, [torch.stack(same) for same in zip(*results, strict=True)])


@pytest.mark.parametrize("name", OPERATORS)
def test_results_are_the_same_for_any_kind_of_tensor(device, name):
    """Such as want a gradient, stand for a negative or were made for inference."""
    expected = getattr(OPS, name)(**good(name, device))
    for kind in (torch.Tensor.requires_grad_, lambda x: torch._neg_view(-x)):
        call = good(name, device)
        floats = {k: kind(x) for k, x in call.items() if is_tensor(x) and x.is_floating_point()}
        assert_same(cloned(getattr(OPS, name)(**call | floats)), expected)
    with torch.inference_mode():
        call = good(name, device)
        assert_same(getattr(OPS, name)(**call), expected)
    if name != "packed_conv2d":  # Whose autograd saves what it is given.
        assert_same(getattr(OPS, name)(**call), expected)
