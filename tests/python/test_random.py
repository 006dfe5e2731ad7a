"""Random convolutions against float64 F.conv2d, by --seed (a fresh one each run) and --fuzz."""

import random

import reference
import reference_torch
import torch

from binconv.torch import BitTensor, binary_conv2d, pack_bits, pack_weight, prepare_weight

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def draw_geometry(rng):
    kernel = rng.choice([(1, 1), (3, 3), (5, 5), (7, 7), (rng.randint(1, 6), rng.randint(1, 6))])
    dilation = rng.choice([1, 1, 2, 3, (rng.randint(1, 4), rng.randint(1, 4))])
    stride = rng.choice([1, 1, 2, 3, (rng.randint(1, 4), rng.randint(1, 4))])
    padding = rng.choice([0, 1, 2, 3, (rng.randint(0, 8), rng.randint(0, 8)), "valid"])
    if stride == 1 and rng.random() < 0.2:
        padding = "same"
    return {
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "pad_value": rng.choice([0, 0, 1, -1]),
    }


def draw_channels(rng):
    near = rng.choice([8, 32, 64, 128, 256]) + rng.randint(-2, 2)
    in_channels = rng.choice([rng.randint(1, 40), near, 8 * rng.randint(1, 40)])
    out_channels = rng.choice([rng.randint(1, 20), 8 * rng.randint(1, 12), rng.randint(60, 140)])
    groups = 1
    if in_channels % 8 == 0 and rng.random() < 0.5:
        common = [g for g in (2, 3, 4, 5) if in_channels % (8 * g) == 0 and out_channels % g == 0]
        groups = rng.choice([1, *common])
    return in_channels, out_channels, groups


def draw(rng):
    geometry = draw_geometry(rng)
    kernel = geometry.pop("kernel")
    in_channels, out_channels, groups = draw_channels(rng)
    pads = reference_torch.pads_of(geometry["padding"], kernel, geometry["dilation"])
    extent = [
        d * (k - 1) + 1
        for k, d in zip(kernel, reference_torch.pair(geometry["dilation"]), strict=True)
    ]
    size = [
        max(rng.choice([rng.randint(1, 12), rng.randint(1, 40)]), extent[i] - pads[i] - pads[i + 2])
        for i in (0, 1)
    ]
    return {
        "x": (rng.choice([0, 1, 1, 2, 3, 9]), in_channels, *size),
        "w": (out_channels, in_channels // groups, *kernel),
        "groups": groups,
        **geometry,
        "dtype": rng.choice(TYPES),
        "layout": rng.choice(["contiguous", "channels_last", "sliced", "transposed", "bits"]),
        "weight": rng.choice(["float", "half", "prepared", "packed"]),
        "out_dtype": rng.choice([torch.int32, *TYPES[:3], "bits"]),
        "scale": rng.random() < 0.5,
        "bias": rng.random() < 0.5,
        "residual": rng.choice([None, None, *TYPES[:3]]),
        "threshold": rng.choice([None, "number", "channels"]),
        "below": rng.random() < 0.5,
        "with_bits": rng.random() < 0.4,
        "clamp": rng.random() < 0.4,
        "prelu": rng.choice([None, [rng.random() < 0.6 for _ in range(3)]]),
        "gradient": rng.random() < 0.3,
        "seed": rng.randrange(2**31),
    }


def values(g, shape, dtype):
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=g, dtype=dtype)
    x = torch.randn(shape, generator=g)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    picked = special[torch.randint(5, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.1, picked, x).to(dtype)


def laid_out(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack((x, -x), -1)[..., 0]
    if layout == "transposed":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    return pack_bits(x) if layout == "bits" else x


def check(case, device):
    g = torch.Generator().manual_seed(case["seed"])
    geometry = {key: case[key] for key in ("stride", "padding", "dilation", "pad_value")}
    x, w = values(g, case["x"], case["dtype"]), torch.randn(case["w"], generator=g)
    acc = reference_torch.conv2d(x, w, groups=case["groups"], **geometry)
    filters, out_dtype = w.shape[0], case["out_dtype"]
    arguments = draw_epilogue(g, case, acc.shape)
    y = reference_torch.epilogue(acc, clamp=case["clamp"], **arguments)
    arguments = to_device(arguments, device, case["gradient"])
    with_bits = case["with_bits"] and out_dtype in TYPES
    limit, below = torch.zeros(filters), torch.zeros(filters, dtype=torch.bool)
    if with_bits or out_dtype == "bits":
        if case["threshold"]:
            limit = torch.randn(filters, generator=g) * 10
            if case["threshold"] == "number":
                limit = limit[:1].expand(filters)
            arguments["threshold"] = limit.to(device)
            if case["threshold"] == "number":
                arguments["threshold"] = limit[0].item()
        if case["below"]:
            below = torch.rand(filters, generator=g) < 0.5
            arguments["threshold_below"] = below.to(device)
    packed = torch.from_numpy(reference.pack(reference.bits_of(y.numpy(), limit, below)))

    given = laid_out(x.to(device), case["layout"])
    weight = w.to(device)
    if case["weight"] == "half":  # In bfloat16 no sign is lost.
        weight = weight.bfloat16()
    elif case["weight"] == "prepared":
        weight = prepare_weight(weight, case["groups"])
    elif case["weight"] == "packed":
        weight = prepare_weight(pack_weight(weight), case["groups"], in_channels=w.shape[1])
    got = binary_conv2d(
        given,
        weight,
        groups=case["groups"],
        out_dtype=out_dtype,
        clamp=case["clamp"],
        with_bits=with_bits,
        **geometry,
        **arguments,
    )
    if with_bits:
        got, bits = got
        assert torch.equal(bits.data.cpu(), packed)
    if out_dtype == "bits":
        assert isinstance(got, BitTensor)
        assert got.shape == acc.shape
        assert torch.equal(got.data.cpu(), packed)
    elif out_dtype == torch.int32:
        assert torch.equal(got.cpu().double(), acc.clamp(min=0) if case["clamp"] else acc)
    else:
        assert got.dtype == out_dtype
        assert torch.equal(got.detach().cpu(), y.to(out_dtype))


def draw_epilogue(g, case, sizes):
    """The floats of an epilogue by their names."""
    arguments = {}
    if case["out_dtype"] == torch.int32:
        return arguments
    for name in ("scale", "bias"):
        if case[name]:
            arguments[name] = reference_torch.factors(g, sizes[1])
    if case["residual"]:
        arguments["residual"] = (torch.randn(sizes, generator=g) * 40).to(case["residual"])
    if case["prelu"]:
        arguments["prelu"] = tuple(
            reference_torch.factors(g, sizes[1]) if wanted else None for wanted in case["prelu"]
        )
    return arguments


def to_device(arguments, device, wants_gradient):
    def moved(value):
        return value.to(device).requires_grad_(wants_gradient)

    return torch.utils._pytree.tree_map_only(torch.Tensor, moved, arguments)


def test_random_convolutions_match_reference(device, fuzz_seed, fuzz_count):
    rng = random.Random(fuzz_seed)
    for number in range(fuzz_count):
        case = draw(rng)
        print(f"draw {number}: {case}")
        check(case, device)


def test_random_gradients_match_reference(device, fuzz_seed, fuzz_count):
    """Integer output gradients: every float32 sum is exact, so gradients are equal."""
    rng = random.Random(fuzz_seed + 1)
    for number in range(fuzz_count // 5):
        case = draw(rng)
        print(f"draw {number}: {case}")
        g = torch.Generator().manual_seed(case["seed"])
        geometry = {k: case[k] for k in ("stride", "padding", "dilation", "pad_value", "groups")}
        x, w = values(g, case["x"], torch.float32), torch.randn(case["w"], generator=g)
        acc = reference_torch.conv2d(x, w, **geometry)
        grad = torch.randint(-3, 4, acc.shape, generator=g).float()
        expected = reference_torch.gradients(x, w, grad, **geometry)
        x, w = x.to(device).requires_grad_(), w.to(device).requires_grad_()
        y = binary_conv2d(x, w, **geometry)
        assert torch.equal(y.detach().cpu().double(), acc)
        y.backward(grad.to(device))
        reference_torch.assert_gradient_is(x.grad, expected[0])
        reference_torch.assert_gradient_is(w.grad, expected[1])
