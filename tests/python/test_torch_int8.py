"""Weights of one byte, the Bop optimizer, and converting models."""

import copy
import io
import pickle

import pytest
import reference_torch
import torch
import torch.nn.functional as F
from torch import nn

from binconv.torch import (
    BinaryConv2d,
    BinaryConv2dCutlass,
    BinaryParameter,
    Bop,
    binary_parameters,
    convert,
    prepare_bie_layers,
    set_progress,
    store_weights_as_int8,
)


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def float_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def int8_network(device="cpu", seed=0):
    return store_weights_as_int8(convert(float_network(seed))).to(device)


def data(device="cpu"):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(32, 2, 8, 8, generator=g)
    labels = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    return x.to(device), labels.to(device)


def optimizers_of(model, **options):
    binary = list(binary_parameters(model))
    others = [p for p in model.parameters() if p.requires_grad]
    return Bop(binary, **options), torch.optim.AdamW(others, lr=0.01)


def step(model, optimizers, x, labels):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


# ------------------------------------------------------------------------------ BinaryParameter


def test_a_binary_parameter_is_one_byte_a_value_and_takes_a_float_gradient(device):
    w = torch.randn(6, 16, 3, 3, device=device)
    parameter = BinaryParameter(w)
    assert isinstance(parameter, nn.Parameter)
    assert (parameter.dtype, parameter.element_size()) == (torch.int8, 1)
    assert torch.equal(parameter.cpu().double(), reference_torch.sign(w))
    assert parameter.leaf.untyped_storage().nbytes() == 4
    assert parameter.grad is None
    parameter.grad = torch.ones(w.shape, device=device)
    assert parameter.grad.dtype == torch.float32
    for twin in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert isinstance(twin, BinaryParameter)
        assert torch.equal(twin, parameter)
        assert twin.leaf is not parameter.leaf


def test_the_gradient_is_that_of_the_signs(device):
    torch.manual_seed(0)
    layer = BinaryConv2d(16, 6, 3, padding=1, bias=False).to(device)
    x = torch.randn(2, 16, 7, 6, device=device)
    before = layer(x)
    layer.store_weight_as_int8()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.eval()(x), before)
    layer.train()
    y = layer(x)
    grad = torch.randint(-3, 4, y.shape).float().to(device)
    y.backward(grad)
    acc = reference_torch.conv2d(x, layer.weight, padding=1)
    signs = [reference_torch.sign(t).requires_grad_() for t in (x, layer.weight)]
    reference = reference_torch.conv2d_of_signs(*signs, padding=1)
    scale = layer.scale.detach().cpu().double().view(-1, 1, 1)
    (of_weight,) = torch.autograd.grad(reference, signs[1], grad.cpu().double() * scale)
    reference_torch.assert_gradient_is(layer.weight.grad, of_weight, rounding=4 * 2**-24)
    of_scale = (grad.cpu().double() * acc).sum((0, 2, 3))
    reference_torch.assert_gradient_is(layer.scale.grad, of_scale)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", ["BinaryConv2d", "BinaryConv2dCutlass"])
def test_compiled_layers_give_weights_of_one_byte_their_gradient(device, kind, copied):
    torch.manual_seed(0)
    if kind == "BinaryConv2d":
        layer = BinaryConv2d(16, 8, 3)
        layer.store_weight_as_int8()
    else:
        layer = BinaryConv2dCutlass(16, 8, 3)
        layer.prepare_params()
    layer = copy.deepcopy(layer.to(device)) if copied else layer.to(device)
    x = torch.randn(2, 16, 6, 6, device=device)
    layer.set_activation(x) if kind == "BinaryConv2dCutlass" else None
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    got, layer.weight.grad = layer.weight.grad, None
    layer(x).square().sum().backward()
    expected = layer.weight.grad.cpu().double()
    reference_torch.assert_gradient_is(got, expected, rounding=1e-5)


def test_a_compiled_layer_is_evaluated_after_zero_grad(device):
    """With gradients left on int8 weights PyTorch refuses to trace."""
    model = int8_network(device)
    optimizers = optimizers_of(model)
    x, labels = data(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        F.cross_entropy(compiled(x), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        model.train()


def test_moving_a_model_keeps_weights_and_gradients_of_one_byte(device):
    model = int8_network()
    x, labels = data()
    F.cross_entropy(model(x), labels).backward()
    grads = [p.grad.clone() for p in binary_parameters(model)]
    model.to(device).double().float()
    moved = list(binary_parameters(model))
    assert [p.dtype for p in moved] == [torch.int8, torch.int8]
    for parameter, grad in zip(moved, grads, strict=True):
        assert parameter.device.type == device
        assert torch.equal(parameter.grad.cpu(), grad)


def test_a_model_made_on_meta_trains_after_loading(device):
    source = int8_network()
    with torch.device("meta"):
        model = store_weights_as_int8(convert(float_network()))
    model.to_empty(device=device)
    model.load_state_dict(source.state_dict())
    x, labels = data(device)
    F.cross_entropy(model(x), labels).backward()
    assert all(p.grad is not None for p in binary_parameters(model))
    assert len(list(binary_parameters(model))) == 2


def test_plain_int8_weights_do_not_train_in_silence():
    layer = BinaryConv2d(8, 8, 3)
    layer.weight = nn.Parameter(torch.ones(8, 8, 3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight: got int8.*expected"):
        layer(torch.ones(1, 8, 5, 5))


# ------------------------------------------------------------------------------------------- Bop


def test_bop_is_the_rule_of_the_paper(device):
    """One value at a time, in Python floats, whose rounding the threshold is far away from."""
    gamma, threshold = 0.25, 0.1
    g = torch.Generator().manual_seed(0)
    start = torch.randint(0, 2, (40,), generator=g) * 2 - 1
    grads = torch.randint(-8, 9, (12, 40), generator=g) / 8
    weights, averages = start.tolist(), [0.0] * 40
    parameter = BinaryParameter(start.view(1, 40, 1, 1).to(device))
    float_twin = start.float().view(1, 40, 1, 1).to(device).requires_grad_()
    optimizer = Bop([parameter, float_twin], gamma, threshold)
    flips = 0
    for grad in grads:
        for i, value in enumerate(grad.tolist()):
            averages[i] = (1 - gamma) * averages[i] + gamma * value
            if abs(averages[i]) > threshold and (averages[i] > 0) == (weights[i] > 0):
                weights[i] = -weights[i]
                flips += 1
        for p in (parameter, float_twin):
            p.grad = grad.view(1, 40, 1, 1).to(device)
        optimizer.step()
        assert parameter.flatten().tolist() == weights
        assert float_twin.flatten().tolist() == weights
    assert flips > 20


def test_bop_param_groups_have_their_own_numbers():
    first, second = (BinaryParameter(torch.ones(4)) for _ in range(2))
    optimizer = Bop([{"params": [first]}, {"params": [second], "threshold": 10.0}], 1.0, 0.0)
    for p in (first, second):
        p.grad = torch.ones(4)
    optimizer.step()
    assert first.tolist() == [-1] * 4
    assert second.tolist() == [1] * 4
    optimizer.zero_grad()
    assert first.grad is None
    for arguments, words in (((2.0, 0.0), "gamma: got 2.0"), ((0.1, -1.0), "threshold: got -1.0")):
        with pytest.raises(ValueError, match=f"{words}.*expected"):
            Bop([first], *arguments)


def test_a_network_of_int8_weights_learns(device):
    model = int8_network(device)
    x, labels = data(device)
    optimizers = optimizers_of(model, gamma=0.05, threshold=1e-5)
    start = [p.clone() for p in binary_parameters(model)]
    losses = [step(model, optimizers, x, labels) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    for old, new in zip(start, binary_parameters(model), strict=True):
        assert not torch.equal(old, new)
        assert set(new.unique().tolist()) == {-1, 1}


def test_the_old_layer_trains_with_bop(device):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        BinaryConv2dCutlass(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).to(device)
    prepare_bie_layers(model)
    x, labels = data(device)
    optimizers = optimizers_of(model, gamma=0.05, threshold=1e-5)
    losses = [step(model, optimizers, x, labels) for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]


def test_resuming_from_a_checkpoint_is_bit_exact(device):
    x, labels = data(device)

    def fresh():
        model = int8_network(device)
        return model, optimizers_of(model, gamma=0.05, threshold=1e-5)

    model, optimizers = fresh()
    for _ in range(5):
        step(model, optimizers, x, labels)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), *(o.state_dict() for o in optimizers)], buffer)
    for _ in range(5):
        step(model, optimizers, x, labels)

    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    twin, twin_optimizers = fresh()
    twin.load_state_dict(states[0])
    for optimizer, state in zip(twin_optimizers, states[1:], strict=True):
        optimizer.load_state_dict(state)
    for _ in range(5):
        step(twin, twin_optimizers, x, labels)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in twin.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bop_resumes_to_the_bit_whatever_type_the_weights_have(dtype):
    g = torch.Generator().manual_seed(0)
    grads = torch.randn(8, 50, generator=g).to(dtype)

    def some_steps(weight, optimizer, grads):
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()

    weight = torch.ones(50, dtype=dtype).requires_grad_()
    optimizer = Bop([weight], 0.3, 0.01)
    some_steps(weight, optimizer, grads[:4])
    twin = weight.detach().clone().requires_grad_()
    resumed = Bop([twin], 0.3, 0.01)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    some_steps(weight, optimizer, grads[4:])
    some_steps(twin, resumed, grads[4:])
    averages = [o.state[w]["average"] for o, w in ((optimizer, weight), (resumed, twin))]
    assert averages[1].dtype == torch.float32
    assert torch.equal(*averages)
    assert torch.equal(weight, twin)
    assert not torch.equal(weight, torch.ones_like(weight))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        resumed.load_state_dict({"state": {}, "param_groups": []})
    assert not resumed._optimizer_load_state_dict_pre_hooks


def test_copies_of_bop_take_steps():
    weight = BinaryParameter(torch.ones(4))
    optimizer = Bop([weight], 1.0, 0.0)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.process_group is None
        (copied,) = twin.param_groups[0]["params"]
        assert copied is not weight
        copied.grad = torch.ones(4)
        twin.step()
        assert copied.tolist() == [-1] * 4
    assert weight.tolist() == [1] * 4
    both = copy.deepcopy({"weight": weight, "optimizer": optimizer})
    assert both["optimizer"].param_groups[0]["params"][0] is both["weight"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_copies_of_bop_have_its_process_group(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        optimizer = Bop([BinaryParameter(torch.ones(4))], process_group=dist.group.WORLD)
        for twin in (copy.deepcopy(optimizer), copy.copy(optimizer)):
            assert twin.process_group is dist.group.WORLD
        with pytest.raises(TypeError, match=r"pickle.*ProcessGroup"):
            pickle.dumps(optimizer)
    finally:
        dist.destroy_process_group()


def test_grad_scaler_and_gradient_clipping(device):
    model = int8_network(device)
    x, labels = data(device)
    optimizers = optimizers_of(model, gamma=0.05, threshold=1e-5)
    scaler = torch.amp.GradScaler(device)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = F.cross_entropy(model(x).float(), labels)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    norms = [p.grad.norm() for p in model.parameters()]
    assert torch.stack(norms).norm() <= 1.001


# --------------------------------------------------------------------------------------- convert


def test_convert_keeps_weights_and_the_first_and_last_layer():
    model = float_network()
    weights = dict(model.named_parameters())
    assert convert(model, ste="approx_sign") is model
    assert type(model[0]) is nn.Conv2d
    assert type(model[-1]) is nn.Linear
    for layer in (model[2], model[4][0]):
        assert type(layer) is BinaryConv2d
        assert layer.ste.name == "approx_sign"
    assert model[2].weight is weights["2.weight"]
    assert model[2].bias is None
    assert model[4][0].bias is weights["4.0.bias"]
    assert model[4][0].stride == (2, 2)
    x = torch.randn(2, 8, 6, 6)
    mean = model[2].weight.detach().double().abs().mean((1, 2, 3)).view(-1, 1, 1)
    expected = reference_torch.conv2d(x, model[2].weight, padding=1) * mean
    assert torch.allclose(model[2](x).double(), expected, rtol=1e-5)


def test_convert_obeys_its_choices():
    kept = convert(float_network(), keep=["4.*"])
    assert type(kept[4][0]) is nn.Conv2d
    assert type(kept[2]) is BinaryConv2d
    whole = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    assert not any(isinstance(m, BinaryConv2d) for m in convert(whole))
    convert(whole, keep_first=False, keep_last=False)
    assert all(isinstance(m, BinaryConv2d) for m in whole)
    alone = convert(nn.Conv2d(8, 8, 3).eval(), keep_first=False, keep_last=False)
    assert isinstance(alone, BinaryConv2d)
    assert not alone.training
    shared = nn.Conv2d(8, 8, 3)
    twice = convert(nn.Sequential(shared, shared), keep_first=False, keep_last=False)
    assert twice[0] is twice[1]
    assert isinstance(twice[0], BinaryConv2d)


def test_convert_takes_layers_of_other_libraries():
    class QConv2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 3, 3))
            self.stride, self.padding = 2, (1, 1)

    model = nn.Sequential(QConv2d(), nn.ReLU())
    convert(model, {QConv2d: {"weight_scale": None}}, keep_first=False, keep_last=False)
    assert model[0].bias is None
    assert model[0].weight_scale is None
    x = torch.randn(2, 8, 7, 7)
    expected = reference_torch.conv2d(x, model[0].weight, stride=2, padding=1)
    assert torch.equal(model[0](x).double(), expected)


def test_convert_takes_layers_with_and_without_a_bias():
    class QConv2d(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 3, 3))
            self.bias = bias

    def converted(bias):
        layer = QConv2d(bias)
        return convert(layer, {QConv2d: {}}, keep_first=False, keep_last=False)

    parameter = nn.Parameter(torch.randn(4))
    assert converted(parameter).bias is parameter
    assert converted(None).bias is None
    assert converted(False).bias is None
    for bias in (True, 0, torch.zeros(4)):
        with pytest.raises(ValueError, match=r"layers: got '' \(QConv2d\) with a bias.*expected"):
            converted(bias)


def test_convert_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"keep: got 'nothing'.*expected"):
        convert(float_network(), keep=["nothing"])
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(ValueError, match=r"layers: got '0'.*groups.*expected"):
        convert(depthwise, keep_first=False, keep_last=False)
    with pytest.raises(ValueError, match=r"layers: got '0'.*expected a float parameter"):
        convert(nn.Sequential(nn.ReLU()), {nn.ReLU: {}}, keep_first=False, keep_last=False)


def test_a_converted_model_follows_a_schedule():
    model = convert(float_network(), ste="ede", weight_ste="ede")
    set_progress(model, 0.5)
    assert model[2].progress.tolist() == [0.5, 0.5]
