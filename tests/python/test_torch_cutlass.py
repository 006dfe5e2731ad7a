"""BinaryConv2dCutlass: its numbers, gradients, order of calls and bitorch-engine's files."""

import copy
import pickle

import pytest
import reference_torch
import torch
import torch.nn.functional as F
from kept_memory import bytes_kept
from torch import nn

from binconv.torch import (
    BinaryConv2dCutlass,
    BinaryParameter,
    Bop,
    load_checkpoint,
    pack_bie_layers,
    prepare_bie_layers,
    save_checkpoint,
)

GEOMETRIES = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 5, "stride": 3, "padding": 4, "dilation": 1},
    {"in_channels": 5, "padding": 1},
]


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def make(device="cpu", seed=0, **options):
    torch.manual_seed(seed)
    arguments = {"in_channels": 16, "out_channels": 6, "kernel_size": 3} | options
    layer = BinaryConv2dCutlass(**arguments).to(device)
    with torch.no_grad():
        layer.bias_a.normal_(std=0.3)
    x = torch.randn(2, arguments["in_channels"], 9, 8)
    return layer, x.to(device)


def geometry_of(layer):
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def expected_output(layer, x, signs=None):
    """conv2d(sign(x + bias_a), sign(weight)) * scale_a * scale_w in float64, zero-padded."""
    shifted = x.detach().cpu().float() + layer.bias_a.detach().cpu().view(-1, 1, 1)
    signs = reference_torch.sign(layer.weight) if signs is None else signs.double()
    acc = F.conv2d(reference_torch.sign(shifted), signs, None, **geometry_of(layer))
    return acc * layer.scale_a.item() * layer.scale_w.item()


def assert_is_expected(y, layer, x, signs=None):
    """The product of the scales is rounded to float32, and so is the result to y's type."""
    expected = expected_output(layer, x, signs)
    error = (y.detach().cpu().double() - expected).abs()
    assert torch.all(error <= expected.abs() * (2**-23 + torch.finfo(y.dtype).eps))


# ---------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("form", ["float", "int8", "packed"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_forward_is_the_scaled_convolution_of_signs(device, geometry, form):
    layer, x = make(device, **geometry)
    signs = reference_torch.sign(layer.weight)
    assert_is_expected(layer(x), layer, x)
    if form != "float":
        layer.prepare_params()
        assert torch.equal(reference_torch.sign(layer.weight), signs)
        assert_is_expected(layer(x), layer, x)
    if form == "packed":
        layer.generate_quantized_weight(qweight_only=True)
    layer.eval()
    assert_is_expected(layer(x), layer, x, signs)
    with torch.no_grad():
        assert_is_expected(layer(x), layer, x, signs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_output_has_the_type_of_the_input(device, dtype):
    layer, x = make(device, padding=1)
    x = x.to(dtype)
    assert layer(x).dtype == dtype
    assert_is_expected(layer(x), layer, x)
    assert_is_expected(layer.eval()(x), layer, x)
    assert make(device, dtype=dtype)[0].weight.dtype == dtype


def test_zero_counts_as_plus_one(device):
    layer, _ = make(device, kernel_size=1, in_channels=8, out_channels=1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias_a.zero_()
        layer.scale_a.fill_(1)
    x = torch.zeros(1, 8, 1, 1, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.item() == 8
    assert torch.equal(x.grad, torch.ones_like(x))  # conv_transpose(1, sign(0) * scale_w).
    assert torch.equal(layer.weight.grad.flatten(), torch.ones(8, device=device))


def test_names_and_defaults():
    layer = BinaryConv2dCutlass(16, 6, 3)
    assert layer.bits_binary_word == 8
    assert layer.weight.shape == (6, 16, 3, 3)
    assert layer.weight.std() > 0
    assert layer.qweight is None
    assert layer.bias_a.shape == (16,)
    assert torch.equal(layer.scale_a, torch.tensor(0.0))
    assert torch.equal(layer.scale_w, torch.tensor(1.0))
    assert not layer.scale_w.requires_grad
    assert layer.scale_a.requires_grad
    assert layer.bias_a.requires_grad
    assert layer.opt_weight is layer.weight
    assert torch.equal(layer.eval().opt_weight, layer.qweight)
    assert (layer.stride, layer.padding, layer.dilation, layer.symmetric) == (1, 0, 1, True)


# ------------------------------------------------------------------------------------- activation


@pytest.mark.parametrize(("symmetric", "factor"), [(True, 2), (False, 4)])
def test_scale_a_starts_on_first_use_in_training(device, symmetric, factor):
    layer, x = make(device, symmetric=symmetric)
    layer.eval()
    layer(x), layer.set_activation(x)
    assert layer.scale_a.item() == 0
    layer.train()
    shifted = layer.set_activation(x)
    assert torch.equal(shifted, x + layer.bias_a.view(-1, 1, 1))
    start = factor * x.double().abs().mean().item()
    assert layer.scale_a.item() == pytest.approx(start, rel=1e-6)
    old = layer.scale_a.clone()
    layer(3 * x)
    assert torch.equal(layer.scale_a, old)
    assert layer(x).grad_fn is not None


def test_eval_before_training_counts_scale_a_as_one(device):
    layer, x = make(device)
    y = layer.eval()(x)
    with torch.no_grad():
        layer.scale_a.fill_(1)
    assert torch.equal(y, layer(x))
    assert y.abs().sum() > 0


def test_scale_a_stays_positive(device):
    layer, x = make(device)
    optimizer = torch.optim.SGD([layer.scale_a], lr=10.0)
    for _ in range(5):
        optimizer.zero_grad()
        y = layer(x)
        assert layer.scale_a > 0
        (y * y.detach().sign()).sum().backward()  # Pulls the scale down.
        optimizer.step()
    assert torch.all(torch.isfinite(layer.eval()(x)))


@pytest.mark.parametrize("spoilt", ["empty", "nan", "inf"])
def test_a_spoilt_first_batch_does_not_spoil_scale_a(device, spoilt):
    layer, x = make(device)
    first = x[:0] if spoilt == "empty" else x.clone()
    if spoilt != "empty":
        first[0, 0, 0, 0] = float(spoilt)
    layer(first).sum().backward()
    if spoilt == "empty":
        assert layer.scale_a == 0
        assert layer.scale_a.grad == 0
        first = x
        layer(first)
    magnitudes = first.double().abs()
    mean = magnitudes[magnitudes.isfinite()].sum() / first.numel()
    torch.testing.assert_close(layer.scale_a.double(), 2 * mean, rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------- gradients


class QuantizedActivation(torch.autograd.Function):
    """scale * sign(v) as LSQ differentiates it (Esser et al., 2020), one value at a time."""

    @staticmethod
    def forward(ctx, v, scale):
        ctx.save_for_backward(v, scale)
        return scale * torch.where(v >= 0, 1.0, -1.0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        v, scale = ctx.saved_tensors
        ratio = v / scale
        passed = ((ratio >= -1) & (ratio <= 1)).to(v.dtype)
        rounded = torch.where(v >= 0, 1.0, -1.0).to(v.dtype)
        step = (rounded - ratio) * passed + rounded * (1 - passed)
        return grad * passed, (grad * step).sum() / v.numel() ** 0.5


class QuantizedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale):
        return scale * torch.where(weight >= 0, 1.0, -1.0).to(scale.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def reference_gradients(layer, x, grad):
    """Of x, weight, bias_a and scale_a, in float64."""
    leaves = [
        t.detach().cpu().double().requires_grad_()
        for t in (x, layer.weight, layer.bias_a, layer.scale_a)
    ]
    x, weight, bias, scale_a = leaves
    a = QuantizedActivation.apply(x + bias.view(-1, 1, 1), scale_a)
    b = QuantizedWeight.apply(weight, layer.scale_w.detach().cpu().double())
    y = F.conv2d(a, b, None, **geometry_of(layer))
    return torch.autograd.grad(y, leaves, grad.cpu().double())


@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_match_plain_torch(device, geometry, form):
    layer, x = make(device, **geometry)
    if form == "int8":
        layer.prepare_params()
    layer(x)
    x.requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape).to(device)
    y.backward(grad)
    got = (x.grad, layer.weight.grad, layer.bias_a.grad, layer.scale_a.grad)
    expected = reference_gradients(layer, x, grad)
    count = x.numel() + y.numel()
    for name, value, wanted in zip(
        ("x", "weight", "bias_a", "scale_a"), got, expected, strict=True
    ):
        assert value.shape == wanted.shape, name
        # float32 sums of at most `count` terms, each no larger than the largest sum of magnitudes.
        bound = 8 * 2**-24 * count**0.5 * (wanted.abs().max() + grad.abs().max().cpu() * 10)
        assert (value.cpu().double() - wanted).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_the_input_itself_and_bits(device, dtype):
    layer, x = make(device, in_channels=128)
    x = x.to(dtype).requires_grad_()
    layer(x)
    small = 4 * 6 + 4 * 4  # The scales of the channels and of the layer, in float32.
    kept = bytes_kept(lambda: layer(x), x, layer.weight, layer.bias_a)
    assert kept <= x.numel() / 8 + small


def test_gradients_reach_everything_in_eval_too(device):
    layer, x = make(device)
    layer(x)
    layer.eval()
    layer(x).sum().backward()
    assert all(p.grad is not None for p in (layer.weight, layer.bias_a, layer.scale_a))
    layer.generate_quantized_weight(qweight_only=True)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_compiled_forward_and_backward_equal_eager(device):
    layer, x = make(device, padding=1)
    layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    for eager, got in zip(*results, strict=True):
        reference_torch.assert_gradient_is(got, eager.cpu().double(), rounding=1e-5)


def test_autocast_trains(device):
    layer, x = make(device, padding=1)
    layer.prepare_params()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------- weights


def test_prepare_params_keeps_signs_and_takes_the_mean_magnitude(device):
    layer, _ = make(device)
    with torch.no_grad():
        layer.weight[0, 0, 0] = torch.tensor([0.0, -0.0, float("nan")])
        layer.weight[0, 0, 1] = torch.tensor([1e-40, -1e-40, -3.0])
    weight = layer.weight.detach().clone()
    layer.prepare_params()
    assert layer.weight.dtype == torch.int8
    assert layer.weight.element_size() == 1
    assert isinstance(layer.weight, BinaryParameter)
    assert torch.equal(reference_torch.sign(layer.weight), reference_torch.sign(weight))
    weight[0, 0, 0, 2] = 0.5
    layer.set_weight_data(weight)
    assert layer.scale_w.item() == pytest.approx(weight.double().abs().mean().item(), rel=1e-6)
    again = layer.weight.clone(), layer.scale_w.clone()
    layer.prepare_params()
    assert torch.equal(layer.weight, again[0])
    assert torch.equal(layer.scale_w, again[1])


def pack_like_the_old_library(weight):
    """Row-major over (O, I, KH, KW), eight values a byte, least significant bit first, 1 for >= 0;
    the container is shaped (O, KH, KW, I / 8)."""
    data = bytearray()
    values = weight.detach().cpu().flatten().tolist()
    for i in range(0, len(values), 8):
        data.append(sum(1 << j for j, value in enumerate(values[i : i + 8]) if value >= 0))
    out_channels, in_channels, *kernel = weight.shape
    packed = torch.tensor(list(data), dtype=torch.uint8)
    return packed.view(out_channels, *kernel, in_channels // 8) if in_channels % 8 == 0 else packed


@pytest.mark.parametrize("in_channels", [16, 24, 5])
def test_qweight_is_the_row_major_bits(device, in_channels):
    layer, _ = make(device, in_channels=in_channels)
    expected = pack_like_the_old_library(layer.weight)
    layer.generate_quantized_weight()
    assert layer.qweight.dtype == torch.uint8
    assert torch.equal(layer.qweight.cpu(), expected)
    assert layer.weight is not None
    layer.generate_quantized_weight(qweight_only=True)
    assert layer.weight is None
    layer.generate_quantized_weight()
    assert torch.equal(layer.qweight.cpu(), expected)


def test_quantized_weight_data_is_used_and_trains_on(device):
    layer, x = make(device)
    other, _ = make(device, seed=1)
    layer.set_quantized_weight_data(pack_like_the_old_library(other.weight))
    signs = reference_torch.sign(other.weight)
    assert torch.equal(reference_torch.sign(layer.weight), signs)
    assert_is_expected(layer(x), layer, x, signs)
    layer.generate_quantized_weight(qweight_only=True)
    layer.set_quantized_weight_data(pack_like_the_old_library(-other.weight))
    assert_is_expected(layer.eval()(x), layer, x, -signs)


def test_eval_never_uses_stale_bits(device):
    layer, x = make(device)
    layer(x)
    layer.eval()
    with torch.no_grad():
        for edit in (
            lambda: layer.weight.neg_(),
            lambda: layer.set_weight_data(torch.randn(6, 16, 3, 3)),
            lambda: layer.weight.neg_(),
            lambda: layer.reset_parameters(),
            lambda: layer.load_state_dict(make(device, seed=5)[0].state_dict()),
        ):
            layer(x), layer.opt_weight
            edit()
            layer.scale_a.fill_(0.5)
            assert_is_expected(layer(x), layer, x)
            expected = pack_like_the_old_library(layer.weight)
            assert torch.equal(layer.opt_weight.cpu(), expected)


def test_steps_of_a_fused_optimizer_are_seen(device):
    """Which does not count up the version of what it changes."""
    layer, x = make(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for mode in (True, True, False, False):
        layer.train(mode)
        optimizer.zero_grad()
        layer(x).pow(2).mean().backward()
        optimizer.step()
        layer.eval()
        with torch.no_grad():
            layer.scale_a.clamp_(min=0.5)
            assert_is_expected(layer(x), layer, x)


def test_an_edit_through_data_counts_from_a_change_of_mode_on(device):
    layer, x = make(device)
    layer(x)
    with torch.no_grad():
        layer.eval()(x)
        layer.weight.data.neg_()
        assert_is_expected(layer.eval()(x), layer, x)


def test_qweight_is_not_stale_after_training(device):
    layer, x = make(device)
    layer(x)
    layer.eval().opt_weight  # noqa: B018  Packs.
    layer.train()
    assert layer.qweight is None
    layer.generate_quantized_weight()
    with torch.no_grad():
        layer.weight.neg_()
    state = layer.state_dict()
    twin, _ = make(device, seed=1)
    twin.load_state_dict({k: v for k, v in state.items() if k != "weight"})
    with torch.no_grad():
        assert_is_expected(twin.eval()(x), layer, x)


def test_copies_have_their_own_weights(device):
    for prepared in (False, True):
        layer, x = make(device)
        if prepared:
            layer.prepare_params()
        layer(x).sum().backward()
        layer.eval()
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))
            with torch.no_grad():
                twin.weight.neg_()
            assert torch.equal(twin(x), -layer(x))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda layer, x: layer(x), RuntimeError, "forward in training"),
        (lambda layer, x: layer.prepare_params(), RuntimeError, "prepare_params"),
        (lambda layer, x: layer.opt_weight, RuntimeError, "opt_weight in training"),
    ],
)
def test_calls_out_of_order_are_refused(call, error, words):
    layer, x = make()
    layer.generate_quantized_weight(qweight_only=True)
    with pytest.raises(error, match=f"{words}.*got .*expected"):
        call(layer, x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda layer: layer(torch.ones(2, 15, 5, 5)), ValueError, "x: got 15"),
        (lambda layer: layer(torch.ones(16, 5, 5)), ValueError, "x: got shape"),
        (lambda layer: layer(None), TypeError, "x: got NoneType"),
        (lambda layer: layer.set_weight_data(torch.ones(6, 16, 3, 2)), ValueError, "x: got shape"),
        (lambda layer: layer.set_weight_data([1.0]), TypeError, "x: got list"),
        (
            lambda layer: layer.set_quantized_weight_data(torch.ones(162, dtype=torch.uint8)),
            ValueError,
            "x: got 162 bytes",
        ),
        (lambda layer: layer.set_quantized_weight_data(torch.ones(108)), TypeError, "x: got torch"),
        (lambda layer: layer.set_bits_binary_word(32), ValueError, "num_bit: got 32"),
        (lambda _: BinaryConv2dCutlass(0, 6, 3), ValueError, "in_channels: got 0"),
        (lambda _: BinaryConv2dCutlass(8, 6, (3, 3, 3)), ValueError, "kernel_size: got"),
        (lambda _: BinaryConv2dCutlass(8, 6, 3, dtype=torch.int8), ValueError, "dtype: got"),
        (lambda _: BinaryConv2dCutlass(8, 6, 3, stride=0), ValueError, "stride: got 0"),
    ],
)
def test_bad_values_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=f"{words}.*expected"):
        call(make()[0])


# ------------------------------------------------------------------------------------------ files


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        BinaryConv2dCutlass(16, 16, 3, padding=1),
        nn.Sequential(BinaryConv2dCutlass(16, 8, 3, stride=2), nn.BatchNorm2d(8)),
    )


def trained_network():
    model = network()
    x = torch.randn(2, 3, 12, 12)
    model(x).square().sum().backward()
    prepare_bie_layers(model)
    model(x)
    return model.eval(), x


def old_state(model, form):
    """The state_dict of bitorch-engine's layer with the same signs."""
    state = {}
    for key, value in model.state_dict().items():
        module = model.get_submodule(key.rpartition(".")[0])
        if isinstance(module, BinaryConv2dCutlass) and key.endswith(".weight"):
            magnitudes = torch.randint(1, 127, value.shape).to(torch.int8)
            integers = torch.where(value >= 0, magnitudes, -magnitudes)
            if form in ("int8", "both"):
                state[key] = integers
            if form == "float":
                state[key] = integers.float() / 100
            if form in ("packed", "both"):
                state[key.replace("weight", "qweight")] = pack_like_the_old_library(value)
        else:
            state[key] = value.clone()
    return state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", ["float", "int8", "packed", "both"])
def test_state_dicts_of_the_old_layer_load(form, assign):
    model, x = trained_network()
    twin = network(seed=1).eval()
    twin.load_state_dict(old_state(model, form), assign=assign)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    if form != "packed":
        twin.train()
        twin(x).square().sum().backward()
        assert twin[1].weight.grad is not None
        assert (twin[1].weight.dtype == torch.int8) == (form != "float")


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_loading_keeps_the_parameter_that_an_optimizer_has(device, int8):
    def start(seed):
        layer, _ = make(device, seed)
        if int8:
            layer.prepare_params()
        weight = layer.weight
        optimizer = Bop([weight], 0.5, 1e-6) if int8 else torch.optim.SGD([weight], 0.1, 0.9)
        return layer, optimizer

    def train(layer, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).pow(2).sum().backward()
            optimizer.step()

    _, x = make(device)
    layer, optimizer = start(0)
    train(layer, optimizer)
    states = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    train(layer, optimizer)
    twin, other = start(1)
    parameter = twin.weight
    twin.load_state_dict(states[0])
    other.load_state_dict(states[1])
    assert twin.weight is parameter
    train(twin, other)
    assert not torch.equal(layer.weight, states[0]["weight"])
    for name, value in layer.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


def test_loading_keeps_type_and_freezing():
    layer, _ = make()
    state = layer.state_dict()
    layer.bfloat16()
    layer.weight.requires_grad_(False)
    layer.load_state_dict(state)
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    layer.reset_parameters()
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["weight", "qweight"])
@pytest.mark.parametrize("trained", ["float", "int8", "packed"])
def test_a_failed_load_leaves_the_layer_as_it_was(form, trained):
    layer, x = make()
    layer(x)
    if trained != "float":
        layer.prepare_params()
    if trained == "packed":
        layer.generate_quantized_weight(qweight_only=True)
    other, _ = make(out_channels=4)
    if form == "qweight":
        other.generate_quantized_weight(qweight_only=True)
    with torch.no_grad():
        before = layer.eval()(x)
        state = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match=rf"{form}: got .*expected"):
            layer.load_state_dict({form: other.state_dict()[form], "bias_a": torch.ones(16)})
        assert torch.equal(layer(x), before)
    assert layer.state_dict().keys() == state.keys()


def test_strict_loading_names_missing_weights():
    model, _ = trained_network()
    state = old_state(model, "int8")
    del state["1.weight"]
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        network().load_state_dict(state)


@pytest.mark.parametrize("qweight_only", [True, False])
def test_checkpoints_round_trip(tmp_path, qweight_only):
    model, x = trained_network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "model.pth"
    save_checkpoint(model, path, qweight_only)
    after = model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)

    twin = network(seed=1).eval()
    load_checkpoint(twin, str(path), qweight_only)
    assert (twin[1].weight is None) == qweight_only
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state["1.qweight"].numel() == 16 * 16 * 9 // 8
    assert ("1.weight" in state) != qweight_only
    assert list(tmp_path.iterdir()) == [path]
    if qweight_only:
        with pytest.raises(ValueError, match=r"checkpoint_path: .*1\.weight.*expected"):
            load_checkpoint(twin, path, qweight_only=False)


def test_bad_files_are_refused_by_name(tmp_path):
    model, _ = trained_network()
    path = tmp_path / "model.pth"
    save_checkpoint(model, path)
    whole = path.read_bytes()
    bad = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint\n",
        "tail": whole[1000:],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"checkpoint_path: got .*expected"):
            load_checkpoint(network(), tmp_path / name)
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"state_dict": {"1.weight": 3}}, tmp_path / "number")
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "other")
    torch.save(nn.Linear(2, 2), tmp_path / "code")
    for name in ("foreign", "list", "number", "other", "code"):
        with pytest.raises(ValueError, match=r"checkpoint_path: got .*expected"):
            load_checkpoint(network(), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(network(), tmp_path / "absent")


def test_pack_bie_layers_packs_every_layer():
    model, x = trained_network()
    with torch.no_grad():
        expected = model(x)
        for qweight_only in (False, True):
            pack_bie_layers(model, qweight_only)
            assert (model[1].weight is None) == qweight_only
            assert model[2][0].qweight is not None
            assert torch.equal(model(x), expected)


def test_the_packed_model_exports():
    model, x = trained_network()
    pack_bie_layers(model, qweight_only=True)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))
