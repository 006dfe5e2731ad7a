"""Two processes with half of the batch each train exactly the weights of one with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)


def two_gpus():
    return torch.cuda.is_available() and torch.cuda.device_count() >= 2


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], name="results"
)
def run(request, tmp_path_factory):
    """What one process ends up with, and what each of two does."""
    if request.param == "cuda" and not two_gpus():
        pytest.skip("fewer than two GPUs")
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(world), request.param, str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    for worker in workers:
        try:
            _, errors = worker.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            for other in workers:
                other.kill()
            raise
        assert worker.returncode == 0, errors
    names = ("0_of_1.pth", "0_of_2.pth", "1_of_2.pth")
    return [torch.load(folder / name, weights_only=True) for name in names]


@pytest.mark.parametrize(
    "way", ["data_parallel", "fully_sharded", "one_byte_weights", "scaled_one_byte_weights"]
)
def test_two_processes_train_the_weights_of_one(results, way):
    one, *two = (result[way] for result in results)
    assert {"0.weight", "0.bias", "0.shift", "1.weight"} <= set(one)
    for rank in two:
        assert set(rank) == set(one)
        for key in one:
            assert torch.equal(rank[key], one[key]), key


def test_training_changed_the_weights(results):
    """Otherwise the comparison would compare nothing."""
    sys.path.insert(0, str(WORKER.parent))
    from distributed_worker import network

    start = network().state_dict()
    for way in ("data_parallel", "fully_sharded"):
        trained = results[0][way]
        assert all(not torch.equal(start[key], trained[key]) for key in start)
    outputs = [results[0]["fully_sharded"][f"output {i}"] for i in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    for way in ("one_byte_weights", "scaled_one_byte_weights"):
        flipped = results[0][way]["0.weight"] != (start["0.weight"] >= 0) * 2 - 1
        assert flipped.any()
    assert results[0]["scaled_one_byte_weights"]["scale"] == 4  # One step was skipped.
