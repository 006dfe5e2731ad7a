"""BinaryConv2d: what it computes, that it trains, and that it never uses stale weights."""

import copy
import io
import pickle
import threading

import pytest
import reference_torch
import torch
import torch.nn.functional as F
from reference_torch import assert_gradient_is
from torch import nn
from torch.nn.utils import parametrize, prune

from binconv.torch import (
    BinaryConv2d,
    BinaryConv2dCutlass,
    BinaryParameter,
    BitTensor,
    pack_bits,
)

SCALES = ("channel", "tensor", None)


def layer_and_input(device="cpu", seed=0, dtype=torch.float32, size=(2, 16, 7, 6), **options):
    """A layer with random weights, a tenth of them beyond 1, and an input of both signs."""
    torch.manual_seed(seed)
    arguments = {"in_channels": 16, "out_channels": 6, "kernel_size": 3} | options
    layer = BinaryConv2d(**arguments)
    with torch.no_grad():
        layer.weight.normal_(std=0.6)
        if layer.bias is not None:
            layer.bias.normal_()
    return layer.to(device, dtype), torch.randn(size).to(device, dtype)


def expected_output(layer, x, weight=None):
    """(y, bound): conv2d of signs times mean |w| plus bias in float64, and how far off it may be.

    The mean of n float32 values may carry n roundings of 2^-24, then come the scale's own rounding,
    the fused multiply-add's and that to x's type. Without a scale and a bias all of it is exact.
    """
    weight = layer.weight if weight is None else weight
    padding = layer.padding
    signs = reference_torch.sign(x)
    if layer.padding_mode != "zeros":
        signs = F.pad(signs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    acc = reference_torch.conv2d_of_signs(
        signs,
        reference_torch.sign(weight),
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        groups=layer.groups,
        pad_value=layer.pad_value if layer.padding_mode == "zeros" else 0,
    )
    magnitude = weight.detach().cpu().double().abs()
    y, bound = acc, torch.zeros_like(acc)
    if layer.weight_scale is not None:
        mean = magnitude.flatten(1).mean(1) if layer.weight_scale == "channel" else magnitude.mean()
        count = magnitude[0].numel() if layer.weight_scale == "channel" else magnitude.numel()
        y = acc * mean.reshape(-1, 1, 1)
        bound = y.abs() * (count + 2) * 2**-24
    if layer.bias is not None:
        y = y + layer.bias.detach().cpu().double().reshape(-1, 1, 1)
        bound = bound + y.abs() * 2**-24
    if x.dtype != torch.float32:
        bound = bound + (y.abs() + bound) * torch.finfo(x.dtype).eps / 2
    return y, bound


def assert_is_expected(y, layer, x, weight=None):
    expected, bound = expected_output(layer, x, weight)
    y = y.detach().cpu().double()
    assert y.shape == expected.shape
    worst = ((y - expected).abs() - bound).max() if y.numel() else 0
    assert worst <= 0, f"off by {worst} more than rounding explains"


def differ(a, b):
    return not torch.equal(a, b)


# ------------------------------------------------------------------------------------------ forward


GEOMETRIES = [
    {},
    {"padding": 1},
    {"padding": 2, "pad_value": 1, "stride": 2},
    {"padding": (1, 2), "pad_value": -1, "dilation": 2},
    {"padding": "same", "kernel_size": (3, 4), "pad_value": 1},
    {"padding": "valid", "stride": (1, 2)},
    {"groups": 2, "padding": 1},
    {"groups": 2, "kernel_size": (1, 3), "out_channels": 8},
    {"kernel_size": 1, "stride": 2},
    {"in_channels": 5, "size": (3, 5, 8, 8)},
    {"in_channels": 130, "out_channels": 70, "size": (1, 130, 5, 5), "padding": 1},
    {"size": (0, 16, 7, 6)},
]


def options_id(options):
    return ",".join(f"{k}={v}" for k, v in options.items()).replace(" ", "") or "plain"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("weight_scale", SCALES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=options_id)
def test_train_and_eval_are_the_scaled_convolution_of_signs(device, geometry, weight_scale, bias):
    layer, x = layer_and_input(device, weight_scale=weight_scale, bias=bias, **geometry)
    trained = layer.train()(x)
    evaluated = layer.eval()(x)
    bits = layer(pack_bits(x))
    for y in (trained, evaluated, bits):
        assert y.dtype == torch.float32
        assert_is_expected(y, layer, x)
    if weight_scale is None and not bias:
        assert torch.equal(trained, evaluated)
    assert torch.equal(bits, evaluated)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_scale", SCALES)
def test_half_precision(device, dtype, weight_scale):
    layer, x = layer_and_input(device, dtype=dtype, weight_scale=weight_scale, padding=1)
    assert layer.weight.dtype == dtype
    for y in (layer.train()(x), layer.eval()(x)):
        assert y.dtype == dtype
        assert_is_expected(y, layer, x)


def test_output_type_is_the_input_type(device):
    layer, x = layer_and_input(device, weight_scale=None, bias=False)
    for mode in (True, False):
        layer.train(mode)
        assert layer(x).dtype == torch.float32
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(layer(x.bfloat16()).float(), layer(x))


def test_default_scale_is_per_channel():
    assert BinaryConv2d(8, 4, 3).weight_scale == "channel"
    assert BinaryConv2d(8, 4, 3).pad_value == 0


def test_memory_format_follows_the_input(device):
    layer, x = layer_and_input(device, padding=1)
    for mode in (True, False):
        layer.train(mode)
        assert layer(x).is_contiguous()
        y = layer(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, layer(x))
    assert layer(pack_bits(x)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"], ids=str)
def test_padding_modes_are_those_of_nn_conv2d(device, padding_mode, padding):
    options = {"padding": padding, "padding_mode": padding_mode, "kernel_size": (3, 2)}
    layer, x = layer_and_input(device, weight_scale=None, bias=False, **options)
    twin = nn.Conv2d(16, 6, bias=False, dtype=torch.float64, **options)
    with torch.no_grad():
        twin.weight.copy_(reference_torch.sign(layer.weight))
    expected = twin(reference_torch.sign(x))
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x).cpu().double(), expected)


def test_padding_mode_with_bits_is_right_or_refused(device):
    layer, x = layer_and_input(device, padding=1, padding_mode="reflect", weight_scale=None)
    layer.eval()
    try:
        y = layer(pack_bits(x))
    except (ValueError, NotImplementedError) as error:
        refusal = str(error)
    else:
        refusal = "padding_mode"
        assert_is_expected(y, layer, x)
    assert "padding_mode" in refusal


def test_bit_tensor_input_in_eval(device):
    layer, x = layer_and_input(device, padding=1, weight_scale=None, bias=False)
    y = layer.eval()(pack_bits(x))
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x))


def test_any_strides(device):
    layer, x = layer_and_input(device, padding=1)
    wide = torch.randn(2, 16, 7, 12).to(device)
    for view in (wide[..., ::2], x.flip(2), x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
        for mode in (True, False):
            assert_is_expected(layer.train(mode)(view), layer, view)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_repeated_calls_give_the_same_numbers(device, mode):
    layer, x = layer_and_input(device, padding=1)
    layer.train(mode)
    first = layer(x)
    for _ in range(5):
        assert torch.equal(layer(x), first)


def test_eval_and_train_give_the_same_numbers_for_one_summation(device):
    """The docstring of the module may promise more; the contract is rounding of the scale alone."""
    layer, x = layer_and_input(device, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight >= 0, 0.5, -0.5))  # The mean is exact.
    assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_concurrent_calls_in_eval_give_the_same_numbers(device, made_in_inference_mode):
    with torch.inference_mode(made_in_inference_mode):
        layer, x = layer_and_input(device, padding=1, out_channels=64)
    layer.eval()
    with torch.no_grad():
        expected, wrong = layer(x), []

    def work(barrier):
        for _ in range(10):
            barrier.wait()
            with torch.no_grad():
                if differ(layer(x), expected):
                    wrong.append(threading.get_ident())

    barrier = threading.Barrier(4, action=lambda: layer.eval())  # Each round starts without bits.
    workers = [threading.Thread(target=work, args=(barrier,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weight_scale", SCALES)
@pytest.mark.parametrize(
    "geometry",
    [{}, {"padding": 1, "pad_value": -1, "stride": 2}, {"groups": 2, "padding": "same"}],
    ids=options_id,
)
def test_gradients_are_those_of_the_clipped_estimator(device, geometry, weight_scale, mode):
    """The scale is a constant. Weights are multiples of 2^-3, so that scales and sums are exact."""
    layer, x = layer_and_input(device, weight_scale=weight_scale, **geometry)
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight.abs() > 0.7, 1.25, 0.75) * layer.weight.sign())
        layer.weight[:, 1:] = layer.weight[:, :1].sign() * 0.5
        layer.weight[:, 0] = layer.weight[:, 0].sign() * 0.5
        layer.weight[0, 0, 0, 0], layer.weight[0, 0, 0, 1] = 1.25, -0.25
        layer.weight[0, 0, 0, 2], layer.weight[0, 0, 1, 0] = 0.25, -0.75
    magnitude = layer.weight.detach().cpu().double().abs()
    scale = {
        "channel": magnitude.flatten(1).mean(1),
        "tensor": magnitude.mean().expand(layer.out_channels),
        None: None,
    }[weight_scale]
    x.requires_grad_()
    y = layer.train(mode)(x)
    grad = torch.randint(-3, 4, y.shape).float()
    y.backward(grad.to(device))
    expected = reference_torch.gradients(
        x,
        layer.weight,
        grad,
        scale,
        layer.bias,
        stride=layer.stride,
        padding=layer.padding,
        groups=layer.groups,
        pad_value=layer.pad_value,
    )
    # Each product with the rounded scale is off by 2 * 2^-24 at most, each sum by count * 2^-24.
    count = layer.weight.numel() + y.numel()
    for got, value in ((x.grad, expected[0]), (layer.weight.grad, expected[1])):
        size = value.abs().max() + 3 * count * (1.0 if scale is None else scale.max())
        if weight_scale is None:
            assert_gradient_is(got, value)
        else:
            assert (got.cpu().double() - value).abs().max() <= size * 4 * 2**-24
    assert_gradient_is(layer.bias.grad, expected[3])


def test_no_gradient_flows_through_the_scale(device):
    layer, x = layer_and_input(device, kernel_size=1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(2.0)  # Beyond 1: the estimator lets nothing through.
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_gradients_pass_the_padding_modes(device, padding_mode):
    layer, x = layer_and_input(
        device, padding=1, padding_mode=padding_mode, weight_scale=None, bias=False
    )
    x.requires_grad_()
    y = layer(x)
    grad = torch.randint(-3, 4, y.shape).float()
    y.backward(grad.to(device))
    signs = reference_torch.sign(x).requires_grad_()
    weight = reference_torch.sign(layer.weight).requires_grad_()
    twin = F.conv2d(F.pad(signs, (1, 1, 1, 1), mode=padding_mode), weight)
    grad_x, grad_w = torch.autograd.grad(twin, (signs, weight), grad.double())
    assert_gradient_is(x.grad, grad_x * (x.detach().cpu().abs() <= 1))
    masked = grad_w * (layer.weight.detach().cpu().abs() <= 1)
    assert_gradient_is(layer.weight.grad, masked)


def test_gradients_add_up_in_the_parameters(device):
    layer, x = layer_and_input(device, weight_scale=None)
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, 2 * once)


def test_frozen_parameters_get_no_gradient(device):
    layer, x = layer_and_input(device)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert not layer.eval()(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_a_small_network_learns(device):
    torch.manual_seed(1)
    network = nn.Sequential(
        BinaryConv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardtanh(),
        BinaryConv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    ).to(device)
    x = torch.randn(32, 8, 6, 6)
    labels = (x[:, :2].mean((1, 2, 3)) > 0).long()
    x, labels = x.to(device), labels.to(device)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(differ(p, old) for p, old in zip(network.parameters(), before, strict=True))
    network.eval()
    with torch.no_grad():
        assert (network(x).argmax(1) == labels).float().mean() > 0.8


# -------------------------------------------------------------------------------------- never stale


def evaluated(device, seed=2, **options):
    """A layer in eval mode that has already run, so that it may have kept something."""
    layer, x = layer_and_input(device, seed, padding=1, **options)
    layer.eval()
    old = layer(x).detach()
    assert_is_expected(old, layer, x)
    assert torch.equal(layer(x), old)
    return layer, x, old


def assert_fresh(layer, x, old):
    for _ in range(2):
        y = layer(x)
        assert differ(y, old)
        assert_is_expected(y, layer, x)
        assert_is_expected(layer(pack_bits(x)), layer, x)


def edit_negate(layer):
    with torch.no_grad():
        layer.weight.mul_(-1)


def edit_copy(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))


def edit_one_value(layer):
    with torch.no_grad():
        layer.weight[3, 5, 1, 1] *= -1


def edit_magnitude_only(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def edit_view(layer):
    with torch.no_grad():
        layer.weight.view(-1)[: layer.weight.numel() // 2].neg_()


def edit_detached(layer):
    layer.weight.detach().neg_()


def edit_in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.mul_(-1)


def edit_through_out(layer):
    with torch.no_grad():
        torch.neg(layer.weight.clone(), out=layer.weight)


def edit_init(layer):
    nn.init.normal_(layer.weight)


def edit_reset_parameters(layer):
    layer.reset_parameters()


def edit_new_parameter(layer):
    layer.weight = nn.Parameter(-layer.weight.detach())


def edit_delete_and_register(layer):
    weight = -layer.weight.detach()
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(weight))


def edit_set_parameter_in_dict(layer):
    layer._parameters["weight"] = nn.Parameter(-layer.weight.detach())


def edit_load_state_dict(layer):
    layer.load_state_dict({k: -v for k, v in layer.state_dict().items()})


def edit_load_state_dict_assign(layer):
    layer.load_state_dict({k: -v for k, v in layer.state_dict().items()}, assign=True)


def edit_swap_tensors(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(-layer.weight.detach()))


def edit_bias(layer):
    with torch.no_grad():
        layer.bias.add_(1)


def edit_new_bias(layer):
    layer.bias = nn.Parameter(layer.bias.detach() + 1)


def edit_no_bias(layer):
    layer.bias = None


def edit_data_then_eval(layer):
    layer.weight.data.mul_(-1)
    layer.eval()


def edit_new_data_then_eval(layer):
    layer.weight.data = -layer.weight.data
    layer.eval()


def edit_data_then_parent_eval(layer):
    layer.weight.data.mul_(-1)
    nn.Sequential(nn.Sequential(layer)).eval()


def edit_data_in_train(layer):
    layer.train()
    layer.weight.data.mul_(-1)
    layer.eval()


def edit_vector_to_parameters(layer):
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(-vector, layer.parameters())


def edit_apply(layer):
    layer._apply(torch.neg)


EDITS = [value for name, value in sorted(globals().items()) if name.startswith("edit_")]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.removeprefix("edit_"))
def test_edited_weights_are_used_at_once(device, edit):
    layer, x, old = evaluated(device)
    edit(layer)
    assert not layer.training
    assert_fresh(layer, x, old)


@pytest.mark.parametrize("weight_scale", ["tensor", None])
def test_edited_weights_are_used_at_once_with_every_scale(device, weight_scale):
    layer, x, old = evaluated(device, weight_scale=weight_scale)
    edit_one_value(layer)
    assert_fresh(layer, x, old)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1.0),
        lambda p: torch.optim.SGD(p, lr=1.0, foreach=True),
        lambda p: torch.optim.Adam(p, lr=1.0),
        lambda p: torch.optim.AdamW(p, lr=1.0, fused=True),
    ],
    ids=["sgd", "foreach", "adam", "fused"],
)
def test_an_optimizer_step_is_seen(device, make):
    layer, x, old = evaluated(device)
    optimizer = make(layer.parameters())
    for mode in (True, False):  # Also when it trains without leaving eval mode.
        layer.train(mode)
        optimizer.zero_grad()
        layer(x).pow(2).sum().backward()
        optimizer.step()
        if mode:
            layer.eval()
        assert_fresh(layer, x, old)
        old = layer(x)


def test_training_between_evaluations_is_seen_without_a_mode_change(device):
    layer, x, old = evaluated(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).pow(2).sum().backward()
        optimizer.step()
        assert_fresh(layer, x, old)
        old = layer(x)


def test_mode_flips_change_nothing(device):
    layer, x, old = evaluated(device)
    for _ in range(3):
        layer.train()
        assert_is_expected(layer(x), layer, x)
        layer.eval()
        assert torch.equal(layer(x), old)


def test_new_parameters_at_the_same_address_are_seen(device):
    """Freed memory is used again: a new weight may have the old one's address, version and id."""
    layer, x, old = evaluated(device)
    for seed in range(20):
        torch.manual_seed(seed)
        layer.weight = None
        layer.weight = nn.Parameter(torch.randn(6, 16, 3, 3, device=device))
        assert_fresh(layer, x, old)
        old = layer(x).detach()


def test_unpickled_parameters_of_equal_history_are_told_apart(device):
    layer, x, _ = evaluated(device)
    layer.weight = nn.Parameter(torch.randn(6, 16, 3, 3, device=device))
    layer(x)
    copies = [pickle.loads(pickle.dumps(layer.weight)) for _ in range(2)]
    copies.append(copy.deepcopy(layer.weight))
    buffer = io.BytesIO()
    torch.save(layer.weight, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    with torch.no_grad():
        for i, weight in enumerate(copies):  # Each is edited just as often.
            weight.copy_(torch.randn(6, 16, 3, 3, generator=torch.Generator().manual_seed(i)))
    old = layer(x)
    for weight in copies:
        layer.weight = weight
        assert_fresh(layer, x, old)
        old = layer(x)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", ["cpu", "meta"])
def test_floats_load_into_a_weight_of_signs(target, assign):
    if target == "meta" and not assign:
        pytest.skip("nothing to copy into")
    layer, x = layer_and_input(weight_scale="learnable", padding=1)
    expected = layer.eval()(x)
    other = BinaryConv2d(16, 6, 3, padding=1, weight_scale="learnable")
    other.store_weight_as_int8()
    other.to(target).load_state_dict(layer.state_dict(), assign=assign)
    assert isinstance(other.weight, BinaryParameter)
    for mode in (True, False):
        assert torch.equal(other.train(mode)(x), expected)


def test_two_layers_may_share_a_weight(device):
    layer, x, old = evaluated(device)
    other = BinaryConv2d(16, 6, 3, padding=1, weight_scale=None).to(device).eval()
    other.weight, other.bias = layer.weight, layer.bias
    assert_is_expected(other(x), other, x)
    edit_negate(layer)
    assert_fresh(other, x, old)
    assert_fresh(layer, x, old)


def test_two_layers_may_use_a_weight_in_turn(device):
    layer, x, old = evaluated(device)
    other, _, _ = evaluated(device, seed=3)
    for _ in range(3):
        layer.weight, other.weight = other.weight, layer.weight
        assert_fresh(layer, x, old)
        old = layer(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_change_of_type_is_seen(device, dtype):
    layer, x, _ = evaluated(device)
    with torch.no_grad():
        layer.weight[0, 0, 0, :2] = torch.tensor([-1e-30, 1e-30])  # -0 and 0 in float16.
    layer(x)
    layer.to(dtype)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert_is_expected(y, layer, x.to(dtype))
    layer.float()
    assert_is_expected(layer(x), layer, x)
    edit_negate(layer)
    assert_is_expected(layer(x), layer, x)


@pytest.mark.gpu
def test_a_change_of_device_is_seen():
    layer, x, old = evaluated("cpu")
    layer.cuda()
    assert_is_expected(layer(x.cuda()), layer, x)
    edit_negate(layer)
    layer.cpu()
    assert_fresh(layer, x, old)


def layers_to_evaluate(device="cuda"):
    """A layer of each class, with the same signs and not run yet, an input, and the result."""
    layer, x = layer_and_input(device, padding=1, weight_scale=None, bias=False)
    cutlass = BinaryConv2dCutlass(16, 6, 3, padding=1, device=device)
    cutlass.set_weight_data(layer.weight)
    with torch.no_grad():
        cutlass.scale_w.fill_(1)
    expected = reference_torch.conv2d(x, layer.weight, padding=1).float().to(device)
    return [layer.eval(), cutlass.eval()], x, expected


@pytest.mark.gpu
def test_another_stream_waits_for_the_bits():
    layers, x, expected = layers_to_evaluate()
    for layer in layers:
        streams = [torch.cuda.Stream() for _ in range(3)]
        results = [copy.deepcopy(layer)(x).detach()]  # What loads all code, which may wait.
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]), torch.no_grad():
            torch.cuda._sleep(200_000_000)  # About a tenth of a second.
            results.append(layer(x))
        assert not streams[0].query()
        for stream in streams[1:]:
            with torch.cuda.stream(stream), torch.no_grad():
                results.append(layer(x))
        torch.cuda.synchronize()
        for y in results:
            assert torch.equal(y, expected)


@pytest.mark.gpu
def test_bits_of_a_capture_are_not_taken_for_made():
    layers, x, expected = layers_to_evaluate()
    for layer in layers:
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        results = []
        for graph in graphs:
            with torch.no_grad(), torch.cuda.graph(graph):
                results.append(layer(x))
        assert torch.equal(layer(x).detach(), expected)
        for graph, y in reversed([*zip(graphs, results, strict=True)]):
            graph.replay()
            assert torch.equal(y, expected)


@pytest.mark.gpu
def test_a_capture_after_a_call_on_another_stream():
    layers, x, expected = layers_to_evaluate()
    for layer in layers:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_compiled_cuda_graphs_see_a_change_of_weight():
    pytest.importorskip("triton")
    layers, x, expected = layers_to_evaluate()
    for layer in layers:
        torch._dynamo.reset()
        compiled = torch.compile(layer, mode="reduce-overhead")
        for sign in (1, -1, 1):
            for _ in range(4):  # Warms up, records and replays.
                with torch.no_grad():
                    assert torch.equal(compiled(x), sign * expected)
            with torch.no_grad():
                layer.weight.mul_(-1)


def test_a_deep_copy_has_its_own_weights(device):
    layer, x, old = evaluated(device)
    twin = copy.deepcopy(layer)
    assert not twin.training
    assert torch.equal(twin(x), old)
    edit_negate(twin)
    assert_fresh(twin, x, old)
    assert torch.equal(layer(x), old)
    edit_copy(layer)
    assert_fresh(layer, x, old)
    assert_is_expected(twin(x), twin, x)


def test_a_shallow_copy_follows_the_shared_weight(device):
    layer, x, old = evaluated(device)
    twin = copy.copy(layer)
    assert torch.equal(twin(x), old)
    edit_negate(layer)
    assert_fresh(twin, x, old)
    assert_fresh(layer, x, old)
    twin.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert_is_expected(twin(x), twin, x)
    assert_is_expected(layer(x), layer, x)


def round_trip_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def round_trip_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("round_trip", [round_trip_pickle, round_trip_save])
@pytest.mark.parametrize("ran_before", [True, False])
def test_a_saved_module_comes_back_whole(device, round_trip, ran_before):
    layer, x = layer_and_input(device, padding=1, pad_value=-1, weight_scale="tensor")
    layer.eval()
    if ran_before:
        layer(x)
    loaded = round_trip(layer)
    assert not loaded.training
    assert loaded.pad_value == -1
    assert loaded.weight_scale == "tensor"
    assert torch.equal(loaded(x), layer(x))
    old = layer(x)
    edit_negate(loaded)
    assert_fresh(loaded, x, old)
    assert torch.equal(layer(x), old)


def test_a_saved_module_holds_little_more_than_its_weights(device):
    layer, _, _ = evaluated(device, in_channels=256, out_channels=256, size=(1, 256, 4, 4))
    assert len(pickle.dumps(layer)) < 1.01 * layer.weight.numel() * 4 + 4096


def test_functional_call_uses_the_given_weights(device):
    layer, x, old = evaluated(device)
    for seed in (5, 6):
        torch.manual_seed(seed)
        weight = torch.randn(6, 16, 3, 3, device=device)
        for _ in range(2):
            y = torch.func.functional_call(layer, {"weight": weight}, (x,))
            assert_is_expected(y, layer, x, weight)
        assert torch.equal(layer(x), old)
    with torch.no_grad():
        weight.neg_()
    y = torch.func.functional_call(layer, {"weight": weight}, (x,))
    assert_is_expected(y, layer, x, weight)
    assert torch.equal(layer(x), old)


def test_functional_call_has_gradients(device):
    layer, x, _ = evaluated(device, weight_scale=None)
    weight = torch.randn(6, 16, 3, 3, device=device, requires_grad=True)
    y = torch.func.functional_call(layer, {"weight": weight}, (x,))
    y.sum().backward()
    expected = reference_torch.gradients(x, weight, torch.ones_like(y), padding=1)
    assert_gradient_is(weight.grad, expected[1])
    assert layer.weight.grad is None


class Negate(nn.Module):
    def forward(self, weight):
        return -weight


def test_a_parametrized_weight_is_used(device):
    layer, x, old = evaluated(device)
    parametrize.register_parametrization(layer, "weight", Negate())
    assert_fresh(layer, x, old)
    old = layer(x)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    assert_fresh(layer, x, old)
    layer.train()
    assert_is_expected(layer(x), layer, x)
    parametrize.remove_parametrizations(layer, "weight")
    layer.eval()
    assert_is_expected(layer(x), layer, x)
    edit_copy(layer)
    assert_is_expected(layer(x), layer, x)


def test_a_pruned_weight_is_used(device):
    layer, x, old = evaluated(device)
    prune.l1_unstructured(layer, "weight", amount=0.4)
    assert_fresh(layer, x, old)  # Zeros count as +1.
    prune.remove(layer, "weight")
    assert_is_expected(layer(x), layer, x)
    edit_negate(layer)
    assert_is_expected(layer(x), layer, x)


def test_weights_made_in_inference_mode_are_never_stale(device):
    """Such tensors keep no version."""
    with torch.inference_mode():
        layer, x = layer_and_input(device, padding=1)
        layer.eval()
        old = layer(x)
        assert_is_expected(old, layer, x)
        layer.weight.mul_(-1)
        assert_fresh(layer, x, old)
        old = layer(x)
        layer.weight.normal_()
        assert_fresh(layer, x, old)


def test_inference_mode_and_normal_mode_in_turn(device):
    layer, x, old = evaluated(device)
    with torch.inference_mode():
        assert torch.equal(layer(x), old)
        layer.weight.mul_(-1)
        assert_fresh(layer, x, old)
    assert_fresh(layer, x, old)
    layer.to(torch.float32)
    with torch.inference_mode():
        layer.eval()
        y = layer(x)
    layer.train()
    layer.eval()
    assert torch.equal(layer(x), y)


def test_a_module_first_run_in_inference_mode_can_train_later(device):
    layer, x = layer_and_input(device, padding=1)
    with torch.inference_mode():
        old = layer.eval()(x)
    layer.train()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    edit_negate(layer)
    assert_fresh(layer.eval(), x, old)


def test_a_changed_weight_shape_is_served_or_refused(device):
    """Channel pruning replaces the weight by a smaller one."""
    layer, x, _ = evaluated(device, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach()[:4].clone())
    layer.out_channels = 4
    try:
        y = layer(x)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = "weight"
        assert_is_expected(y, layer, x)
    assert "weight" in refusal


# ----------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_compiled_module_equals_the_eager_one(device, mode):
    layer, x = layer_and_input(device, padding=1)
    layer.train(mode)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = function(leaf)
        y.pow(2).sum().backward()
        results.append((y, leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    for eager, got in zip(results[0][1:], results[1][1:], strict=True):
        assert_gradient_is(got, eager.cpu().double())


def test_a_compiled_module_is_never_stale(device):
    layer, x, old = evaluated(device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), old)
        for edit in (edit_negate, edit_copy, edit_new_parameter, edit_data_then_eval):
            edit(layer)
            y = compiled(x)
            assert differ(y, old), edit.__name__
            assert_is_expected(y, layer, x)
            assert torch.equal(compiled(x), y)
            old = y


# ------------------------------------------------------------------------------- module conventions


def test_state_dict_is_that_of_nn_conv2d(device):
    for bias in (True, False):
        layer, x, _ = evaluated(device, bias=bias)
        names = ["weight", "bias"] if bias else ["weight"]
        assert list(layer.state_dict()) == names
        assert [name for name, _ in layer.named_parameters()] == names
        assert list(layer.buffers()) == []
        twin = nn.Conv2d(16, 6, 3, padding=1, bias=bias)
        twin.load_state_dict(layer.state_dict())
        other = BinaryConv2d(16, 6, 3, padding=1, bias=bias).to(device).eval()
        other(x)
        other.load_state_dict(twin.state_dict())
        assert torch.equal(other(x), layer(x))


def test_float_weight_parameter(device):
    layer, _ = layer_and_input(device, groups=2, kernel_size=(3, 5))
    assert isinstance(layer, nn.Module)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.shape == (6, 8, 3, 5)
    assert layer.weight.dtype == torch.float32
    assert BinaryConv2d(8, 4, 3, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert BinaryConv2d(8, 4, 3, bias=False).bias is None


def test_constructor_takes_the_positions_of_nn_conv2d():
    arguments = (16, 6, (3, 2), (1, 2), (2, 1), (1, 3), 2, False, "circular", "cpu", torch.float32)
    layer, twin = BinaryConv2d(*arguments), nn.Conv2d(*arguments)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(twin, name), name
    with pytest.raises(TypeError):
        BinaryConv2d(*arguments, 0)  # pad_value and what follows are keyword-only.


def test_representation_names_the_arguments():
    text = repr(BinaryConv2d(16, 6, 3, stride=2, padding=1, pad_value=-1, weight_scale="tensor"))
    for part in ("16, 6", "kernel_size=(3, 3)", "stride=(2, 2)", "padding=(1, 1)"):
        assert part in text
    assert "pad_value=-1" in text
    assert "tensor" in text


def test_meta_construction(device):
    layer = BinaryConv2d(16, 6, 3, padding=1, device="meta")
    x = torch.empty(2, 16, 7, 6, device="meta")
    for mode in (True, False):
        y = layer.train(mode)(x)
        assert y.shape == (2, 6, 7, 6)
        assert y.device.type == "meta"
    layer.to_empty(device=device)
    layer.load_state_dict(BinaryConv2d(16, 6, 3, padding=1).state_dict())
    x = torch.randn(2, 16, 7, 6, device=device)
    for mode in (True, False):
        assert_is_expected(layer.train(mode)(x), layer, x)


def test_meta_construction_then_assigned_weights(device):
    layer = BinaryConv2d(16, 6, 3, padding=1, device="meta").eval()
    source, x = layer_and_input(device, padding=1)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_is_expected(layer(x), layer, x)
    old = layer(x)
    edit_negate(layer)
    assert_fresh(layer, x, old)


def test_double_precision_is_served_or_refused_by_name():
    layer, x = layer_and_input()
    for mode in (True, False):
        layer.train(mode)
        try:
            y = layer(x.double())
        except (TypeError, ValueError) as error:
            message = str(error)
        else:
            message = "x: float64"
            assert_is_expected(y, layer, x)
        assert "x" in message
        assert "float64" in message


BAD_ARGUMENTS = [
    ({"pad_value": 2}, "pad_value", "2"),
    ({"pad_value": -2}, "pad_value", "-2"),
    ({"pad_value": 0.5}, "pad_value", "0.5"),
    ({"weight_scale": "row"}, "weight_scale", "row"),
    ({"weight_scale": True}, "weight_scale", "True"),
    ({"groups": 3}, "groups|in_channels", "."),
    ({"groups": 4, "out_channels": 8}, "groups", "4"),  # 4 channels each: no whole byte.
    ({"groups": 0}, "groups", "."),
    ({"out_channels": 7, "groups": 2}, "groups|out_channels", "."),
    ({"padding_mode": "mirror"}, "padding_mode", "mirror"),
    ({"padding": "full"}, "padding", "full"),
    ({"padding": "same", "stride": 2}, "padding|stride", "."),
    ({"padding": -1}, "padding", "-1"),
    ({"stride": 0}, "stride", "0"),
    ({"stride": (1, 2, 3)}, "stride", "."),
    ({"dilation": 0}, "dilation", "0"),
    ({"kernel_size": 0}, "kernel", "0"),
    ({"kernel_size": (3, -1)}, "kernel", "-1"),
    ({"in_channels": 0}, "in_channels", "0"),
    ({"out_channels": 0}, "out_channels", "0"),
    ({"in_channels": -8}, "in_channels", "-8"),
    ({"dtype": torch.float64}, "dtype|weight", "float64"),
    ({"dtype": torch.int8}, "dtype|weight", "int8|floating"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("options", "name", "got"), BAD_ARGUMENTS, ids=str)
def test_bad_constructor_argument_is_refused_by_name(options, name, got):
    """By the constructor or the first call. What nn.Conv2d refuses may be refused in its words."""
    arguments = {"in_channels": 16, "out_channels": 6, "kernel_size": 3} | options
    x = torch.randn(2, max(arguments["in_channels"], 1), 7, 6)
    plain = {k: v for k, v in arguments.items() if k not in ("pad_value", "weight_scale")}
    try:
        nn.Conv2d(**plain)
    except (ValueError, RuntimeError) as error:
        with pytest.raises(type(error)):
            BinaryConv2d(**arguments)
        return
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as raised:
        BinaryConv2d(**arguments)(x)
    message = str(raised.value)
    assert any(word in message for word in name.split("|")), message
    assert got == "." or any(word in message for word in got.split("|")), message


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_bad_input_is_refused_by_name(mode):
    layer, _ = layer_and_input()
    layer.train(mode)
    for x, error, got in (
        (None, TypeError, "None"),
        ([1.0], TypeError, "list"),
        (torch.ones(16, 7, 6), ValueError, r"\(16, 7, 6\)"),
        (torch.ones(2, 15, 7, 6), ValueError, "15"),
        (torch.ones(2, 16, 7, 6, dtype=torch.int32), ValueError, "int32"),
        (torch.ones(2, 16, 7, 6, dtype=torch.bool), ValueError, "bool"),
        (pack_bits(torch.ones(2, 15, 7, 6)), ValueError, "15"),
    ):
        with pytest.raises(error, match=rf"x: got .*{got}.*expected"):
            layer(x)
    with pytest.raises(ValueError, match=r"kernel_height.*3.*expected"):
        layer(torch.ones(2, 16, 2, 6))


@pytest.mark.gpu
def test_input_on_another_device_is_refused_by_name():
    layer, x = layer_and_input("cuda")
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"got .*(cuda|cpu).*expected"):
            layer.train(mode)(x.cpu())


def test_bits_flow_from_layer_to_layer(device):
    first, x = layer_and_input(device, padding=1, bias=False)
    second, _ = layer_and_input(device, in_channels=6, weight_scale=None, bias=False)
    first.eval(), second.eval()
    bits = pack_bits(first(x))
    assert isinstance(bits, BitTensor)
    assert torch.equal(second(bits), second(first(x)))
