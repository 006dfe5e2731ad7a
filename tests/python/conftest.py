"""Fixtures: devices, seeds that can be repeated, a count of the tests that want a GPU."""

import importlib.util
import random

import pytest

NO_GPU = "no CUDA GPU that this build of binconv can use"


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=150, help="draws of each random test")
    parser.addoption("--seed", type=int, default=None, help="seed of the random tests")


def pytest_configure(config):
    if config.getoption("--seed") is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


def has_gpu():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    import binconv

    return torch.cuda.is_available() and bool(binconv.cuda_devices())


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter, config):
    seed, draws = config.getoption("--seed"), config.getoption("--fuzz")
    terminalreporter.write_line(f"random tests ran with --seed {seed} --fuzz {draws}")
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_GPU in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"{count} tests were skipped for want of a CUDA GPU")


@pytest.fixture(autouse=True)
def _settings_of_cudnn(request, monkeypatch):
    """On a GPU float32 is float32, and what a test changes holds for that test alone."""
    if request.node.get_closest_marker("gpu"):
        import torch

        for name in ("allow_tf32", "benchmark", "deterministic"):
            monkeypatch.setattr(torch.backends.cudnn, name, False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def fuzz_count(request):
    return request.config.getoption("--fuzz")


@pytest.fixture
def fuzz_seed(request):
    """A fresh seed for each run, printed with a failing test; --seed repeats it."""
    seed = request.config.getoption("--seed")
    print(f"--seed {seed}")
    return seed
