"""binconv train: it repeats, it resumes to the bit, and packed bits decide as plain PyTorch does.

And the benchmark of training steps, which shares its network.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from binconv.__main__ import main

torch = pytest.importorskip("torch")
for name in ("sklearn", "matplotlib", "tqdm", "PIL"):
    pytest.importorskip(name)

from binconv.torch import BinaryConv2d, RPReLU, demo, models, train  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    deterministic = torch.backends.cudnn.deterministic
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic


@pytest.fixture
def data(device):
    """A few of the digits."""
    whole = train.load("digits", torch.device(device))
    few = [demo.Digits(part.images[:96], part.labels[:96]) for part in whole[:2]]
    return train.Data(*few, whole.classes)


@pytest.fixture
def few_digits(monkeypatch):
    """The command on a few of the digits, in a smaller network."""
    true_load = train.load

    def load(name, device):
        whole = true_load(name, device)
        few = [demo.Digits(part.images[:70], part.labels[:70]) for part in whole[:2]]
        return train.Data(*few, whole.classes)

    monkeypatch.setattr(train, "load", load)
    monkeypatch.setattr(train, "WIDTHS", (16, 32))


SETTINGS = train.Settings(seed=3, epochs=3, batch=32, data="digits")


def assert_same_state(one, other):
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_repeats_and_resumes_to_the_bit(device, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WIDTHS", (16, 32))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    place = torch.device(device)
    straight = train.Trainer(data, SETTINGS, place)
    for _ in range(SETTINGS.epochs):
        straight.epoch()

    stopped = train.Trainer(data, SETTINGS, place)
    stopped.epoch()
    stopped.save(tmp_path / "checkpoint.pth")
    torch.manual_seed(99)  # Whatever else happened in between.
    resumed = train.Trainer(data, SETTINGS, place)
    resumed.load(tmp_path / "checkpoint.pth")
    while len(resumed.history) < SETTINGS.epochs:
        resumed.epoch()
    assert_same_state(straight.network.state_dict(), resumed.network.state_dict())
    assert straight.history == resumed.history
    other = train.Trainer(data, SETTINGS._replace(seed=4), place)
    assert not torch.equal(other.network.stem[0].weight, stopped.network.stem[0].weight)


def test_packed_predictions_are_those_of_the_twin(data):
    trainer = train.Trainer(data, SETTINGS, data.train.images.device)
    trainer.epoch()
    network = trainer.network.eval()
    with torch.inference_mode():
        twin = demo.plain_twin(network)
        assert not any(isinstance(layer, BinaryConv2d) for layer in twin.modules())
        demo.check_twin(network, twin, data.test.images)
        for layer in twin.modules():
            if isinstance(layer, demo.SignConv2d):
                layer.weight = torch.nn.Parameter(-layer.weight)
        with pytest.raises(demo.DemoError, match="of 96 predictions differ"):
            demo.check_twin(network, twin, data.test.images)


@pytest.mark.usefixtures("few_digits")
def test_the_command_trains_reports_and_resumes(tmp_path, capsys):
    output = tmp_path / "new" / "run"
    arguments = ["train", "--device", "cpu", "--batch", "35", "--output", str(output)]
    assert main([*arguments, "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "70 images to train on, 70 held out" in out
    assert "twin predicts the same for all 70" in out
    assert str(output) in out
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint.pth", "curve.png"]

    assert main([*arguments, "--epochs", "1", "--resume"]) == 0
    assert "Resumed after epoch 1 of 1" in capsys.readouterr().out
    assert main([*arguments, "--epochs", "2", "--resume"]) == 1
    assert "--epochs: got 2, expected 1 as in" in capsys.readouterr().err
    checkpoint = output / "checkpoint.pth"
    whole = torch.load(checkpoint, weights_only=True)
    for write in (lambda: checkpoint.write_bytes(b"torn"), lambda: torch.save({}, checkpoint)):
        write()
        assert main([*arguments, "--epochs", "1", "--resume"]) == 1
        assert "is no checkpoint" in capsys.readouterr().err

    # Of other kinds, without an entry, and of another network.
    settings = whole["settings"]
    without = [{k: v for k, v in whole.items() if k != key} for key in whole]
    partial = {"settings": {k: v for k, v in settings.items() if k != "batch"}}
    bad = [[1, 2], torch.ones(3), {"settings": None}, whole | partial, *without]
    bad += [whole | {"network": {}}, whole | {"optimizer": {}}, whole | {"optimizer": None}]
    bad += [whole | {"history": None}, whole | {"history": [{"loss": 1.0}]}]
    for content in bad:
        torch.save(content, checkpoint)
        assert main([*arguments, "--epochs", "1", "--resume"]) == 1
        error = capsys.readouterr().err
        assert f"--resume: got {checkpoint}, which is no checkpoint" in error
        assert error.count("\n") == 1
    arguments[-1] = str(tmp_path / "nowhere")
    assert main([*arguments, "--resume"]) == 1
    assert "--resume: got no" in capsys.readouterr().err


def write_images(folder):
    from PIL import Image

    for part, count in (("train", 3), ("test", 2)):
        for label, colour in (("dark", 10), ("light", 250)):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (20 + i, 30), (colour, colour, colour))
                image.save(folder / part / label / f"{i}.png")


def test_folders_of_images_are_data(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "notes.txt").write_text("not a class")
    data = train.load(str(tmp_path), torch.device("cpu"))
    assert data.classes == 2
    assert data.train.images.shape == (6, 3, 32, 32)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images[0].unique().tolist() == pytest.approx([10 / 127.5 - 1])
    with pytest.raises(demo.DemoError, match=r"--data: got .*expected"):
        train.load(str(tmp_path / "train"), torch.device("cpu"))


def test_what_is_no_image_and_what_is_missing_is_said(tmp_path):
    write_images(tmp_path)
    image = tmp_path / "test" / "dark" / "0.png"
    content = image.read_bytes()
    for broken in (b"some text", content[:40], b""):
        image.write_bytes(broken)
        with pytest.raises(demo.DemoError, match=rf"--data: got {re.escape(str(image))}, expected"):
            train.load(str(tmp_path), torch.device("cpu"))
    image.write_bytes(content)
    (tmp_path / "test" / "light").rename(tmp_path / "elsewhere")
    with pytest.raises(demo.DemoError, match=r"--data: got no images in \S*light, expected"):
        train.load(str(tmp_path), torch.device("cpu"))


# ----------------------------------------------------------------------------- network, benchmark


def test_bireal18_has_sixteen_binary_convolutions(device):
    network = models.bireal18(7, activation=RPReLU).to(device)
    layers = [m for m in network.modules() if isinstance(m, BinaryConv2d)]
    widths = [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    assert [layer.out_channels for layer in layers] == widths
    assert [layer.in_channels for layer in layers] == [64, *widths[:-1]]
    strides = [layer.stride for layer in layers]
    assert [i for i, stride in enumerate(strides) if stride == (2, 2)] == [4, 8, 12]
    y = network(torch.randn(2, 3, 70, 50, device=device))
    assert y.shape == (2, 7)
    y.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with pytest.raises(ValueError, match=r"stem: got 'tiny'.*expected"):
        models.BiRealNet(10, (8,), 1, stem="tiny")


@pytest.mark.parametrize("ste", ["clip", "approx_sign"])
def test_the_plain_layer_of_the_benchmark_computes_the_same(device, ste):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from training_step import PlainBinaryConv2d

    from binconv.torch.estimators import estimator

    arguments = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}
    layer = BinaryConv2d(16, 8, **arguments, ste=ste).to(device)
    plain = PlainBinaryConv2d(16, 8, **arguments, ste=estimator(ste)).to(device)
    unmasked = PlainBinaryConv2d(16, 8, **arguments, ste=estimator("identity")).to(device)
    for other in (plain, unmasked):
        other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16, 9, 9, device=device)
    results = []
    for module in (layer, plain, unmasked):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, module.weight.grad))
    # An 8-bit code of a derivative is off by up to 1 / 254 of its peak.
    coded = 0 if ste == "clip" else estimator(ste).peak / 254
    bounds = (0, coded * results[2][1].abs(), 0)
    for got, expected, bound in zip(*results[:2], bounds, strict=True):
        assert ((got - expected).abs() <= bound + 1e-5 * expected.abs().max()).all()


def test_the_benchmark_of_training_steps_runs(tmp_path):
    output = tmp_path / "smoke"
    script = ROOT / "benchmarks" / "training_step.py"
    command = [sys.executable, script, "--smoke", "--modes", "eager", "--output", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # More do not pay for so little.
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.with_suffix(".json").read_text())["results"]
    kept = {result["layer"]: result["kept_mib"] for result in results}
    assert kept["binconv"] < kept["plain"] / 3
    assert "| binconv | eager |" in output.with_suffix(".md").read_text()
