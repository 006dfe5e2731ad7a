"""Training: estimators, scales and shifts against float64 autograd, and what backward keeps."""

import copy
import io
import pickle

import pytest
import reference_torch
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from kept_memory import bytes_kept
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from binconv.torch import (
    EDE,
    ApproxSign,
    BinaryConv2d,
    Clip,
    Identity,
    RPReLU,
    SwishSign,
    binary_conv2d,
    pack_bits,
    set_progress,
)

FLOAT32_EPS = 2.0**-24


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


# ------------------------------------------- the reference: functions whose derivatives the
# estimators are, in float64, differentiated by autograd; the formulas are those of the papers.


def clip_function(limit):
    return lambda v: v.clamp(-limit, limit)


def approx_sign_function(v):
    inner = torch.where(v < 0, 2 * v + v * v, 2 * v - v * v)
    return torch.where(v < -1, -torch.ones_like(v), torch.where(v < 1, inner, torch.ones_like(v)))


def swish_sign_function(beta):
    def function(v):
        sigma = torch.sigmoid(beta * v)
        return 2 * sigma * (1 + beta * v * (1 - sigma)) - 1

    return function


def ede_function(progress):
    t = 10 ** (-1 + 2 * progress)
    return lambda v: max(1 / t, 1) * torch.tanh(t * v)


CASES = {
    "clip": (Clip(), clip_function(1.0), 1.0),
    "clip_0.6": (Clip(0.6), clip_function(0.6), 1.0),
    "clip_1.3": (Clip(1.3), clip_function(1.3), 1.0),
    "approx_sign": (ApproxSign(), approx_sign_function, 2.0),
    "swish_sign": (SwishSign(), swish_sign_function(5.0), 5.0),
    "swish_sign_2": (SwishSign(2.0), swish_sign_function(2.0), 2.0),
    "ede_start": (EDE(), ede_function(0.0), 1.0),
    "ede_0.7": (EDE(0.7), ede_function(0.7), 10**0.4),
    "ede_end": (EDE(1.0), ede_function(1.0), 10.0),
    "identity": (Identity(), lambda v: v, 1.0),
}


def reference_sign(v, function):
    """The sign, with the derivative of `function`."""
    surrogate = function(v)
    return surrogate + (reference_torch.sign(v) - surrogate).detach()


def reference_gradients(x, w, grad, of_x, of_w, shift=None, scale=None, bias=None, **geometry):
    """Of x, w, shift, scale and bias, by autograd in float64; None where there is none."""
    leaves = [
        None if t is None else t.detach().cpu().double().requires_grad_()
        for t in (x, w, shift, scale, bias)
    ]
    x, w, shift, scale, bias = leaves
    column = (-1, 1, 1)
    v = x if shift is None else x + shift.reshape(column)
    y = reference_torch.conv2d_of_signs(
        reference_sign(v, of_x), reference_sign(w, of_w), **geometry
    )
    if scale is not None:
        y = y * scale.reshape(column)
    if bias is not None:
        y = y + bias.reshape(column)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad.cpu().double()))
    return [None if t is None else next(found) for t in leaves]


def on_a_grid(g, *shape):
    """Multiples of 1/8 up to 2.5: sums of two are exact, and no value is near a clip's end but on
    it, where the derivative of the clip is 1."""
    return torch.randint(-20, 21, shape, generator=g).float() / 8


def make_layer(device, case, **options):
    g = torch.Generator().manual_seed(7)
    ste = CASES[case][0]
    arguments = {"in_channels": 24, "out_channels": 6, "kernel_size": 3, "padding": 1} | options
    layer = BinaryConv2d(**arguments, ste=ste, weight_ste=ste)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(on_a_grid(g, *parameter.shape))
    x = on_a_grid(g, 2, arguments["in_channels"], 7, 6)
    return layer.to(device), x.to(device)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [13, 64, 150])
@pytest.mark.parametrize("case", ["clip_0.6", "identity", "approx_sign"])
def test_steps_that_can_be_differentiated_give_the_same_gradients(
    device, case, channels, dtype, memory_format
):
    layer, x = make_layer(device, case, in_channels=channels, pad_value=1, weight_scale="learnable")
    layer.to(memory_format=memory_format)
    x = x.to(dtype, memory_format=memory_format).requires_grad_()
    y = layer(x)
    wanted = (x, *layer.parameters())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    by_kernels = torch.autograd.grad(y, wanted, grad, retain_graph=True)
    by_steps = torch.autograd.grad(y, wanted, grad, create_graph=True)
    for fast, slow in zip(by_kernels, by_steps, strict=True):
        assert torch.equal(fast, slow)
        assert fast.dtype == slow.dtype


@pytest.mark.parametrize("input_shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("weight_scale", ["learnable", "channel", "tensor", None])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_estimator(device, case, weight_scale, input_shift):
    layer, x = make_layer(device, case, weight_scale=weight_scale, input_shift=input_shift)
    x.requires_grad_()
    y = layer(x)
    grad = torch.randint(-3, 4, y.shape).float()
    y.backward(grad.to(device))

    magnitude = layer.weight.detach().abs()
    scale = {
        "learnable": layer.scale,
        "channel": magnitude.mean((1, 2, 3)),
        "tensor": magnitude.mean().expand(6),
        None: None,
    }[weight_scale]
    _, function, peak = CASES[case]
    inputs = (x, layer.weight, grad)
    others = {"shift": layer.shift, "scale": scale, "bias": layer.bias, "padding": 1}
    expected = reference_gradients(*inputs, function, function, **others)
    # Unit derivatives, absolute values: how large each sum's terms are together.
    sizes = reference_gradients(
        x.detach().abs(),
        layer.weight.detach().abs() + 1e-9,
        grad.abs(),
        lambda v: v,
        lambda v: v,
        **{**others, "shift": None, "scale": None if scale is None else scale.abs()},
    )
    got = [x.grad, layer.weight.grad, *(None if t is None else t.grad for t in (layer.shift,))]
    coded = 0.0 if case.startswith(("clip", "identity")) else peak / 254
    # Each term is rounded a few times, each sum as often as it has terms.
    rounding = 16 * (x.numel() + y.numel()) * FLOAT32_EPS * peak
    size_of_terms = sizes[0].max() if scale is None else sizes[0].max() * 1.01
    for name, value, wanted, bound in zip(
        ("x", "weight", "shift"),
        got,
        expected,
        (
            size_of_terms * (coded + rounding),
            sizes[1].max() * rounding,
            size_of_terms * (coded + rounding) * x[:, 0].numel(),
        ),
        strict=False,
    ):
        assert (value is None) == (wanted is None), name
        if value is not None:
            error = (value.cpu().double() - wanted).abs().max()
            assert error <= bound, f"{name}: off by {error}, bound {bound}"
    if weight_scale == "learnable":
        error = (layer.scale.grad.cpu().double() - expected[3]).abs().max()
        assert error <= sizes[1].sum() * rounding
    else:
        assert layer.scale is None
    assert torch.equal(layer.bias.grad.cpu().double(), expected[4])


@pytest.mark.parametrize("case", ["clip_0.6", "clip_1.3"])
def test_a_clip_passes_its_ends_and_nothing_beyond(device, case):
    limit = torch.tensor(CASES[case][0].limit)
    inf = torch.tensor(torch.inf)
    values = [limit, torch.nextafter(limit, inf), torch.nextafter(limit, -inf), inf]
    values = torch.stack([*values, torch.tensor(torch.nan), torch.tensor(0.0)])
    x = torch.cat((values, -values)).reshape(1, 12, 1, 1).to(device).requires_grad_()
    layer = BinaryConv2d(12, 1, 1, ste=CASES[case][0], weight_scale=None, bias=False).to(device)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    layer(x).sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0] * 2


def test_a_clip_beyond_float32_passes_all_finite_numbers(device):
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([0.0, 1e30, largest, -largest, torch.inf, -torch.inf, torch.nan, -1.0])
    x = values.reshape(1, 8, 1, 1).to(device).requires_grad_()
    layer = BinaryConv2d(8, 1, 1, ste=Clip(1e39), weight_scale=None, bias=False).to(device)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    layer(x).sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("function", ["module", "operator"])
def test_forward_mode_is_refused_and_not_taken_for_a_constant(device, function):
    layer, x = make_layer(device, "clip")
    weight = layer.weight.detach()
    geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    arguments = *[None] * 7, geometry, x.dtype, False, "clip", 1.0, "clip", 1.0

    def operator(x):
        return torch.ops.binconv.sign_conv2d(x, weight, *arguments)

    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(layer if function == "module" else operator, (x,), (torch.ones_like(x),))


def test_estimators_take_separate_choices_for_input_and_weight(device):
    layer, x = make_layer(device, "clip", weight_scale=None)
    layer = BinaryConv2d(24, 6, 3, padding=1, weight_scale=None, ste="identity", weight_ste="clip")
    layer.to(device)
    with torch.no_grad():
        layer.weight.copy_(on_a_grid(torch.Generator().manual_seed(1), *layer.weight.shape))
    x.requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    expected = reference_gradients(
        x, layer.weight, torch.ones_like(y), lambda v: v, clip_function(1.0), padding=1
    )
    reference_torch.assert_gradient_is(x.grad, expected[0])
    reference_torch.assert_gradient_is(layer.weight.grad, expected[1])


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", [(2, 3, 5), (2, 4, 4), (0, 3, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 24, 65, 121, 128, 130])
def test_bits_come_back_for_any_number_of_channels_and_pixels(device, channels, size, compiles):
    """Of some sizes, the bits fill whole groups of 16 bytes, of others not."""
    g = torch.Generator().manual_seed(channels)
    batch, *pixels = size
    x = on_a_grid(g, batch, channels, *pixels).to(device).requires_grad_()
    w = on_a_grid(g, 5, channels, 2, 3).to(device).requires_grad_()
    function = binary_conv2d
    if compiles:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = function(x, w, padding=1)
    grad = torch.randint(-3, 4, y.shape, generator=g).float()
    y.backward(grad.to(device))
    expected = reference_torch.gradients(x, w, grad, padding=1)
    reference_torch.assert_gradient_is(x.grad, expected[0])
    reference_torch.assert_gradient_is(w.grad, expected[1])


def test_input_and_weight_follow_schedules_of_their_own(device):
    layer = BinaryConv2d(24, 6, 3, padding=1, weight_scale=None, ste=EDE(0.7), weight_ste=EDE(0.2))
    layer.to(device)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        layer.weight.copy_(on_a_grid(g, *layer.weight.shape))
    x = on_a_grid(g, 2, 24, 7, 6).to(device).requires_grad_()
    y = layer(x)
    y.sum().backward()
    of_x, of_w = ede_function(0.7), ede_function(0.2)
    expected = reference_gradients(x, layer.weight, torch.ones_like(y), of_x, of_w, padding=1)
    # A derivative of x is off by half a code, peak / 254, and each of 6 x 9 sums' terms may be.
    assert (x.grad.cpu().double() - expected[0]).abs().max() <= 54 * 10**0.4 / 254
    reference_torch.assert_gradient_is(layer.weight.grad, expected[1], rounding=1e-5)


@pytest.mark.parametrize("wanted", ["x", "weight", "shift", "scale", "bias", "residual", "leaf"])
def test_each_tensor_of_the_operator_gets_its_own_gradient(device, wanted):
    g = torch.Generator().manual_seed(5)
    shapes = {"x": (2, 24, 5, 4), "weight": (6, 24, 3, 3), "shift": (24,), "scale": (6,)}
    shapes |= {"bias": (6,), "residual": (2, 6, 5, 4), "leaf": (6, 24, 3, 3)}
    tensors = {name: on_a_grid(g, *shape).to(device) for name, shape in shapes.items()}
    tensors[wanted].requires_grad_()
    x, w, shift, scale, bias, residual, leaf = tensors.values()
    geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    arguments = *[None] * 2, leaf, geometry, x.dtype, False, "clip", 1.0, "clip", 1.0
    y = torch.ops.binconv.sign_conv2d(x, w, shift, scale, bias, residual, *arguments)
    grad = torch.randint(-3, 4, y.shape, generator=g).float()
    y.backward(grad.to(device))
    of_x, of_w = clip_function(1.0), clip_function(1.0)
    others = {"shift": shift, "scale": scale, "bias": bias, "padding": 1}
    expected = reference_gradients(x, w, grad, of_x, of_w, **others)
    every = dict(zip(("x", "weight", "shift", "scale", "bias"), expected, strict=True))
    every |= {"residual": grad.double(), "leaf": expected[1]}
    reference_torch.assert_gradient_is(tensors[wanted].grad, every[wanted])


@pytest.mark.parametrize("case", CASES)
def test_derivative_is_that_of_the_paper(case):
    estimator, function, peak = CASES[case]
    v = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    v = v[(v.abs() - 1).abs() > 1e-9].requires_grad_()
    (expected,) = torch.autograd.grad(function(v).sum(), v)
    difference = (estimator.derivative(v.detach()) - expected).abs()
    assert difference.max() <= 1e-12 * peak
    assert estimator.peak == pytest.approx(peak)
    assert expected.abs().max() <= estimator.peak * (1 + 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_derivative_is_finite_far_from_zero(case):
    far = CASES[case][0].derivative(torch.tensor([-1e30, 1e30, -3e4, 3e4]))
    assert torch.equal(far, torch.full((4,), 1.0 if case == "identity" else 0.0))


def test_ede_follows_its_schedule():
    """T_min = 0.1 and T_max = 10, exponentially in between (IR-Net)."""
    for progress, t, k in ((0, 0.1, 10), (0.25, 10**-0.5, 10**0.5), (0.5, 1, 1), (1, 10, 1)):
        at_zero = EDE(progress).derivative(torch.zeros(1, dtype=torch.float64))
        assert at_zero.item() == pytest.approx(k * t)
    model = nn.Sequential(BinaryConv2d(8, 8, 1, ste="ede"), BinaryConv2d(8, 8, 1, weight_ste="ede"))
    set_progress(model, 0.75)
    assert (model[0].ste, model[0].weight_ste) == (EDE(0.75), Clip())
    assert (model[1].ste, model[1].weight_ste) == (Clip(), EDE(0.75))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Clip(0), "limit: got 0"),
        (lambda: Clip(float("inf")), "limit: got inf"),
        (lambda: Clip("1"), "limit: got '1'"),
        (lambda: SwishSign(-1.0), "beta: got -1.0"),
        (lambda: EDE(1.5), "progress: got 1.5"),
        (lambda: set_progress(nn.Identity(), -0.1), "progress: got -0.1"),
        (lambda: BinaryConv2d(8, 8, 1, ste="tanh"), "ste: got 'tanh'"),
        (lambda: BinaryConv2d(8, 8, 1, weight_ste=None), "weight_ste: got None"),
        (lambda: BinaryConv2d(8, 8, 1, ste=type("Own", (Clip,), {})()), r"ste: got Own\("),
        (lambda: RPReLU(0), "channels: got 0"),
        (lambda: RPReLU(4)(torch.ones(2, 3, 5, 5)), r"x: got shape \(2, 3, 5, 5\)"),
    ],
)
def test_bad_values_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=f"{words}.*expected"):
        call()


# --------------------------------------------------------------------------- shift, scale, RPReLU


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_shift_is_added_before_the_sign(device, training):
    layer, x = make_layer(device, "clip", input_shift=True, weight_scale=None, bias=False)
    layer.train(training)
    shifted = x + layer.shift.detach().view(-1, 1, 1)
    expected = reference_torch.conv2d(shifted, layer.weight, padding=1)
    assert torch.equal(layer(x).detach().cpu().double(), expected)
    with torch.no_grad():
        assert torch.equal(layer(x).cpu().double(), expected)
    if not training:
        assert torch.equal(layer(pack_bits(shifted)).detach().cpu().double(), expected)


def test_a_learnable_scale_starts_as_the_mean_magnitude():
    layer = BinaryConv2d(16, 6, 3, weight_scale="learnable", input_shift=True)
    for _ in range(2):
        assert torch.equal(layer.scale, layer.weight.abs().mean((1, 2, 3)))
        assert torch.equal(layer.shift, torch.zeros(16))
        layer.reset_parameters()


@pytest.mark.parametrize("weight_scale", ["channel", "tensor", "learnable", None])
def test_reset_parameters_starts_anew(weight_scale):
    layer = BinaryConv2d(16, 6, 3, weight_scale=weight_scale, input_shift=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    layer.reset_parameters()
    assert torch.equal(layer.shift, torch.zeros(16))
    assert layer.weight.abs().max() <= 144**-0.5
    if weight_scale == "learnable":
        assert torch.equal(layer.scale, layer.weight.abs().mean((1, 2, 3)))
    layer.store_weight_as_int8()
    with pytest.raises(ValueError, match=r"^weight: got int8, expected floats"):
        layer.reset_parameters()


def test_state_dict_of_a_learnable_scale():
    layer = BinaryConv2d(16, 6, 3, weight_scale="learnable", input_shift=True)
    assert set(layer.state_dict()) == {"weight", "bias", "scale", "shift"}


def test_rprelu_is_a_shifted_prelu():
    torch.manual_seed(0)
    layer = RPReLU(5).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(5))
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    column = (-1, 1, 1)
    before, slope, after = (p.detach().view(column) for p in layer.parameters())
    below = slope * (x - before) + after
    above = x - before + after
    assert torch.equal(layer(x), torch.where(x > before, above, below))


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("ste", "bits"),
    [("clip", 2), (Clip(1.3), 2), ("identity", 1), ("approx_sign", 9), ("ede", 9)],
    ids=str,
)
@pytest.mark.parametrize("channels", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_bits(device, dtype, channels, ste, bits):
    layer = BinaryConv2d(channels, 8, 3, padding=1, ste=ste, input_shift=True, dtype=dtype)
    layer.to(device)
    x = torch.randn(2, channels, 14, 14, device=device, dtype=dtype, requires_grad=True)
    small = 4 * 8 + 4 * channels  # Scale, bias and shift, in float32.
    kept = bytes_kept(lambda: layer(x), layer.weight)
    assert kept <= x.numel() * bits / 8 + 3 * small
    plain = bytes_kept(
        lambda: F.conv2d(torch.where(x >= 0, 1.0, -1.0).to(dtype), layer.weight), layer.weight
    )
    assert plain >= x.numel() * x.element_size()


@pytest.mark.parametrize(("ste", "bits"), [("clip", 2), ("approx_sign", 9)])
def test_the_backward_of_a_compiled_layer_keeps_bits(device, ste, bits):
    layer = BinaryConv2d(64, 8, 3, padding=1, ste=ste).to(device)
    x = torch.randn(2, 64, 14, 14, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    kept = bytes_kept(lambda: compiled(x), layer.weight, layer.bias)
    assert kept <= x.numel() * bits / 8 + 3 * 4 * 8


def test_tangents_of_gradients_are_those_of_a_linear_map(device):
    layer, x = BinaryConv2d(8, 4, 3, padding=1).to(device), torch.randn(1, 8, 6, 6, device=device)
    grad, tangent = torch.randn(2, 1, 4, 6, 6, device=device)

    def gradients(of_result):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((layer(leaf) * of_result).sum(), (leaf, layer.weight))

    with forward_ad.dual_level():
        got = gradients(forward_ad.make_dual(grad, tangent))
        tangents = [forward_ad.unpack_dual(g).tangent for g in got]
    for a, b in zip(tangents, gradients(tangent), strict=True):
        reference_torch.assert_gradient_is(a, b.cpu().double())


@pytest.mark.parametrize("channels", [3, 4, 16])
@pytest.mark.parametrize("once_more", [False, True])
def test_gradients_of_strided_1x1_kernels_of_few_channels(device, channels, once_more):
    g = torch.Generator().manual_seed(channels)
    x, w = (
        torch.randn(9, channels, 12, 12, generator=g),
        torch.randn(134, channels, 1, 1, generator=g),
    )
    grad = torch.randint(-3, 4, (9, 134, 6, 6), generator=g).float()
    expected = reference_torch.gradients(x, w, grad, stride=2)
    leaves = [t.to(device).requires_grad_() for t in (x, w)]
    y = binary_conv2d(*leaves, stride=2)
    got = torch.autograd.grad(y, leaves, grad.to(device), create_graph=once_more)
    for a, b in zip(got, expected, strict=False):
        reference_torch.assert_gradient_is(a.detach(), b)


def test_flops_of_backward_are_those_of_its_two_convolutions(device):
    x = torch.randn(2, 16, 8, 8, device=device, requires_grad=True)
    y = BinaryConv2d(16, 8, 3).to(device)(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * y.numel() * 16 * 3 * 3


@pytest.mark.parametrize("channels", [24, 128])
def test_a_compiled_backward_is_one_operator_and_a_mask_that_a_compiler_fuses(device, channels):
    graphs = []

    def keep(graph, inputs):
        graphs.append(
            {str(node.target): node.meta.get("original_aten") for node in graph.graph.nodes}
        )
        return make_boxed_func(graph.forward)

    layer = BinaryConv2d(channels, 8, 3, padding=1).to(device)
    x = torch.randn(2, channels, 5, 5, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    got, eager = gradients_of(compiled, x), gradients_of(layer, x)
    forward, backward = graphs
    assert "binconv.sign_conv2d_no_grad.default" in forward
    operator = "binconv.sign_conv2d_backward.default"
    assert [target for target in backward if "binconv" in target] == [operator]
    # A kernel takes its name from that, which must not be too long.
    assert str(backward["aten.where.self"]) == operator
    for a, b in zip(got, eager, strict=True):
        reference_torch.assert_gradient_is(a, b.cpu().double())


@pytest.mark.parametrize("name", ["sign_conv2d_no_grad", "sign_conv2d_backward"])
def test_operators_of_a_training_step_take_no_lists(name):
    """Inductor's C++ wrapper calls an operator with a list by way of Python in PyTorch 2.11."""
    schema = getattr(torch.ops.binconv, name).default._schema
    assert not [a.name for a in schema.arguments if isinstance(a.type, torch.ListType)]
    assert len(schema.returns) > 1  # Several, and not a list of them.


def test_the_function_keeps_bits(device):
    x = torch.randn(2, 64, 14, 14, device=device, requires_grad=True)
    w = torch.randn(8, 64, 3, 3, device=device, requires_grad=True)
    residual = torch.randn(2, 8, 12, 12, device=device, requires_grad=True)
    kept = bytes_kept(lambda: binary_conv2d(x, w, residual=residual), w)
    assert kept == x.numel() * 2 // 8


# ----------------------------------------------------------------------- what else it works with


def network(device, **options):
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        BinaryConv2d(16, 16, 3, padding=1, bias=False, **options),
        RPReLU(16),
        nn.BatchNorm2d(16),
        BinaryConv2d(16, 8, 3, stride=2, padding=1, bias=False, **options),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers).to(device)


def gradients_of(model, x):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


REACT = {"ste": "approx_sign", "weight_scale": "learnable", "input_shift": True}


@pytest.mark.parametrize("options", [{}, REACT, {"ste": "ede", "weight_ste": "ede"}], ids=str)
def test_compiled_fullgraph_forward_and_backward(device, options, monkeypatch):
    # The compiler replaces cuDNN's batch normalization by another, whose roundings would move
    # values near zero, and near the next 8-bit code, to the other side.
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    model, x = network(device, **options), torch.randn(4, 3, 8, 8, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, eager in zip(gradients_of(compiled, x), gradients_of(model, x), strict=True):
        reference_torch.assert_gradient_is(got, eager.cpu().double(), rounding=1e-5)


def test_a_schedule_survives_meta(device):
    layer = BinaryConv2d(16, 8, 3, ste=EDE(0.25), device="meta")
    layer.to_empty(device=device)
    assert layer.progress.tolist() == [0.25, 0.0]


def test_a_moving_ede_schedule_stays_compiled(device):
    model = BinaryConv2d(16, 8, 3, ste="ede", weight_ste="ede").to(device)
    x = torch.randn(2, 16, 6, 6, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for epoch in range(20):  # More often than the compiler would compile anew.
        set_progress(model, epoch / 20)
        for got, eager in zip(gradients_of(compiled, x), gradients_of(model, x), strict=True):
            reference_torch.assert_gradient_is(got, eager.cpu().double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(device, dtype):
    model, x = network(device, **REACT), torch.randn(8, 3, 8, 8, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            y = model(x)
            loss = F.cross_entropy(y.float(), torch.arange(8, device=device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(device, use_reentrant):
    model, x = network(device, **REACT), torch.randn(4, 3, 8, 8, device=device)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=use_reentrant)

    assert_same(gradients_of_all(Checkpointed(), model, x), gradients_of(model, x))


def gradients_of_all(wrapper, model, x):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = wrapper(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]


def test_channels_last_gives_the_same_gradients(device):
    layer, x = make_layer(device, "approx_sign", weight_scale=None, bias=False)
    plain = gradients_of(layer, x)
    last = gradients_of(layer, x.contiguous(memory_format=torch.channels_last))
    for got, expected in zip(last, plain, strict=True):
        reference_torch.assert_gradient_is(got, expected.cpu().double())
    assert last[0].is_contiguous(memory_format=torch.channels_last)


def test_a_layer_may_be_used_twice(device):
    torch.manual_seed(0)
    layer = BinaryConv2d(8, 8, 3, padding=1, weight_scale=None, bias=False).to(device)
    x = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
    hidden = layer(x)
    y = layer(hidden / 64)
    y.sum().backward()
    grad = torch.ones_like(y)
    second = reference_torch.gradients(hidden / 64, layer.weight, grad, padding=1)
    first = reference_torch.gradients(x, layer.weight, second[0] / 64, padding=1)
    reference_torch.assert_gradient_is(x.grad, first[0])
    reference_torch.assert_gradient_is(layer.weight.grad, first[1] + second[1])


def test_copies_and_pickles_keep_estimators_scale_and_shift(device):
    layer, x = make_layer(device, "ede_0.7", weight_scale="learnable", input_shift=True)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert (twin.ste, twin.weight_ste) == (EDE(0.7), EDE(0.7))
        assert_same(gradients_of(twin, x), gradients_of(layer, x))


def test_meta_device_gives_the_right_forms():
    layer = BinaryConv2d(
        16, 6, 3, device="meta", ste="approx_sign", input_shift=True, weight_scale="learnable"
    )
    x = torch.empty(2, 16, 7, 6, device="meta", requires_grad=True)
    layer(x).sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.shape == tensor.shape


def test_the_gradient_of_a_scale_is_summed_in_float32(device):
    x = torch.ones(1, 461, 5, 1, device=device, dtype=torch.float16)
    w = torch.ones(1, 461, 5, 1, device=device, dtype=torch.float16, requires_grad=True)
    scale = torch.ones(1, device=device, requires_grad=True)
    binary_conv2d(x, w, scale=scale, out_dtype=torch.float16).sum().backward()
    assert scale.grad.tolist() == [2305.0]  # Not a float16.


@pytest.mark.filterwarnings("ignore:binconv..abs_mean")  # The scale is meant to have no gradient.
def test_gradients_pass_an_exported_and_decomposed_program(device):
    layers = nn.Conv2d(3, 16, 3), nn.Tanh(), BinaryConv2d(16, 16, 3), nn.Tanh(), nn.Conv2d(16, 4, 1)
    model, x = nn.Sequential(*layers).to(device), torch.randn(2, 3, 8, 8, device=device)
    program = torch.export.export(model, (x,)).run_decompositions().module()
    program(x).square().sum().backward()
    model(x).square().sum().backward()
    got = dict(program.named_parameters())
    for name, parameter in model.named_parameters():
        expected = parameter.grad.cpu().double()
        reference_torch.assert_gradient_is(got[name].grad, expected, rounding=1e-5)


@pytest.mark.parametrize("options", [{}, REACT], ids=["plain", "react"])
def test_export_of_the_eval_model(device, options):
    model, x = network(device, **options).eval(), torch.randn(4, 3, 8, 8, device=device)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        # Prepared bits are laid out for one device; a program holds what any can prepare.
        called = {str(node.target) for node in program.graph.nodes}
        assert "binconv.prepare_weight.default" in called
        assert "binconv.refresh_weight.default" not in called
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        assert torch.equal(loaded(x), expected)


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    model = network("cuda", **REACT)
    x = torch.randn(4, 3, 8, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            model(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
        y.square().sum().backward()
    x.copy_(torch.randn_like(x))
    graph.replay()
    captured = [y.clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    for got, eager in zip(captured, [y, *(p.grad for p in model.parameters())], strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4)
