"""The command line: binconv info and binconv demo; test_bench.py has binconv bench."""

import subprocess
import sys

import pytest

import binconv
from binconv.__main__ import main


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def demo():
    """The module binconv.torch.demo, with the thread count that it changes put back."""
    torch = pytest.importorskip("torch")
    for name in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    from binconv.torch import demo

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield demo
    torch.set_num_threads(threads)


@pytest.fixture
def digits(demo):
    _, held_out = demo.load_data(demo.torch.device("cpu"))
    return demo.Digits(held_out.images[:128], held_out.labels[:128])


def trained_network(demo, digits):
    demo.torch.manual_seed(0)
    network = demo.DigitsNet()
    demo.train(network, digits, epochs=2)
    return network.eval()


def test_info_shows_version_kernels_and_cuda_targets(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"binconv         {binconv.__version__}\n" in out
    assert f"CPU kernels     {', '.join(binconv.available_kernels())}" in out
    assert f"CUDA targets    {binconv.cuda_architectures() or 'built without CUDA'}\n" in out
    assert all(name in out for name, _ in binconv.cuda_devices())


def test_info_runs_as_a_module():
    done = run_python("-m", "binconv", "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("binconv ")


def test_info_needs_neither_torch_nor_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; "
        "from binconv.__main__ import main; sys.exit(main(['info']))"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "CPU kernels" in done.stdout


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "{bench,demo,info,train}" in capsys.readouterr().err


def test_demo_reports_and_writes_a_picture(demo, tmp_path, capsys):
    picture = tmp_path / "new" / "digits.png"
    assert main(["demo", "--device", "cpu", "--epochs", "1", "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "1,198 handwritten digits to train on, 599 held out" in out
    assert "twin predicts the same for all 599" in out
    assert "75,776 bytes, 31.1 times smaller" in out
    assert out.count("4x4 to 4x4") == 2
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.gpu
def test_demo_runs_on_the_gpu_by_default(demo, tmp_path, capsys):
    assert main(["demo", "--epochs", "1", "--output", str(tmp_path / "digits.png")]) == 0
    out = capsys.readouterr().out
    assert f"Trained on {demo.torch.cuda.get_device_name(0)}" in out
    assert "twin predicts the same for all 599" in out


def test_demo_fails_when_the_twin_differs(demo, tmp_path, capsys, monkeypatch):
    def tampered_twin(network):
        twin = true_twin(network)
        twin.blocks[0].conv.weight.neg_()
        return twin

    true_twin = demo.plain_twin
    monkeypatch.setattr(demo, "plain_twin", tampered_twin)
    monkeypatch.setattr(demo, "train", lambda *_: None)
    picture = tmp_path / "digits.png"
    assert main(["demo", "--device", "cpu", "--output", str(picture)]) == 1
    assert "of 599 predictions differ" in capsys.readouterr().err
    assert not picture.exists()


def test_twin_check_catches_stale_bits(demo, digits):
    network = trained_network(demo, digits)
    with demo.torch.inference_mode():
        demo.check_twin(network, demo.plain_twin(network), digits.images)
        network.blocks[0].conv.weight.data.neg_()  # The one edit that PyTorch hides.
        twin = demo.plain_twin(network)
        with pytest.raises(demo.DemoError, match="of 128 predictions differ"):
            demo.check_twin(network, twin, digits.images)


def test_training_repeats_exactly(demo, digits):
    first, second = (trained_network(demo, digits).state_dict() for _ in range(2))
    assert all(demo.torch.equal(first[name], second[name]) for name in first)


def test_held_out_third_is_fixed_and_stratified(demo):
    (_, train_labels), (images, labels) = demo.load_data(demo.torch.device("cpu"))
    (_, _), (again, _) = demo.load_data(demo.torch.device("cpu"))
    assert (len(train_labels), len(labels)) == (1198, 599)
    assert demo.torch.equal(images, again)
    assert images.aminmax() == (-1, 1)
    assert all(58 <= count <= 61 for count in labels.bincount().tolist())


@pytest.mark.parametrize("module", ["torch", "sklearn.datasets", "matplotlib.figure", "tqdm"])
def test_missing_dependency_is_one_clear_message(module, capsys, monkeypatch):
    monkeypatch.delattr("binconv.torch.demo", raising=False)
    monkeypatch.delitem(sys.modules, "binconv.torch.demo", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo"]) == 1
    message = f"binconv demo: no module named '{module}'; run: pip install \"binconv[demo]\"\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "", "cpu:1"])
def test_unusable_device_is_refused(demo, name, capsys):
    assert main(["demo", "--device", name]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"binconv demo: --device: got '{name}', expected cpu")


@pytest.mark.parametrize("option", ["--epochs=0", "--epochs=1.5", "--seed=-1", f"--seed={2**64}"])
def test_bad_numbers_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", option])
    assert stop.value.code == 2
    name, value = option.split("=")
    assert f"{name}: got '{value}', expected a whole number" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_an_error(demo, digits, tmp_path):
    with pytest.raises(demo.DemoError, match="--output: "):
        demo.save_picture(digits, digits.labels, tmp_path)
