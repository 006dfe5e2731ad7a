"""One process of the distributed tests: python distributed_worker.py RANK WORLD DEVICE FOLDER.

Trains the same small networks under DistributedDataParallel, FSDP2 and Bop on this rank's share of
the batch and writes the weights that it ends up with. With WORLD 1 the share is the whole batch.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from binconv.torch import BinaryConv2d, Bop, binary_parameters, store_weights_as_int8

STEPS = 3


def network():
    """No batch normalization, whose statistics are each process's own by design."""
    torch.manual_seed(0)
    options = {"weight_scale": None, "bias": True, "input_shift": True}
    model = nn.Sequential(
        BinaryConv2d(16, 16, 3, padding=1, **options),
        BinaryConv2d(16, 8, 3, stride=2, **options),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape) / 8)
    return model


def share(rank, world, device):
    """This rank's images and gradients of the output: small whole numbers, so that every sum of the
    training below is exact in float32, in whatever order it is taken."""
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-12, 13, (STEPS, 4, 16, 9, 9), generator=g) / 8
    target = torch.randint(-2, 3, (STEPS, 4, 8, 4, 4), generator=g).float()
    count = 4 // world
    part = slice(rank * count, (rank + 1) * count)
    return x[:, part].to(device), target[:, part].to(device)


def train(model, optimizer, x, target):
    """The loss is a mean over images, as DDP and FSDP expect, times 4 to keep numbers whole."""
    for images, factors in zip(x, target, strict=True):
        optimizer.zero_grad()
        loss = (model(images) * factors).sum() * (4 / len(images))
        loss.backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=2.0**-6)


def data_parallel(rank, world, device):
    model = network().to(device)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    train(wrapped, sgd(wrapped), *share(rank, world, device))
    return model.state_dict()


def fully_sharded(rank, world, device):
    model = network().to(device)
    if world > 1:
        mesh = init_device_mesh(torch.device(device).type, (world,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    x, target = share(rank, world, device)
    optimizer = sgd(model)
    outputs = []
    for _ in range(2):  # The sharded model runs on the bits of its present weights.
        train(model.train(), optimizer, x, target)
        with torch.no_grad():
            outputs.append(model.eval()(x[0]))
    train(model, optimizer, x, target)
    with torch.no_grad():  # Also when it was trained in eval mode.
        outputs.append(model(x[0]))
    state = {k: v.full_tensor() if world > 1 else v for k, v in model.state_dict().items()}
    if world > 1:
        outputs = [gathered(output, world) for output in outputs]
    return state | {f"output {i}": output for i, output in enumerate(outputs)}


def gathered(output, world):
    everyone = [torch.empty_like(output) for _ in range(world)]
    dist.all_gather(everyone, output.contiguous())
    return torch.cat(everyone)


def one_byte_weights(rank, world, device):
    model = store_weights_as_int8(network()).to(device)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    group = dist.group.WORLD if world > 1 else None
    binary = list(binary_parameters(model))
    others = [p for p in model.parameters() if p.requires_grad]
    optimizers = [Bop(binary, 0.5, 0.25, process_group=group), torch.optim.SGD(others, 2.0**-6)]

    class Both:
        def zero_grad(self):
            for optimizer in optimizers:
                optimizer.zero_grad()

        def step(self):
            for optimizer in optimizers:
                optimizer.step()

    train(wrapped, Both(), *share(rank, world, device))
    return copy.copy(model.state_dict())


def scaled_one_byte_weights(rank, world, device):
    """With GradScaler and clipping, and in step 1 an infinite gradient on the last rank alone."""
    model = store_weights_as_int8(network()).to(device)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    bop = Bop(
        list(binary_parameters(model)),
        0.5,
        0.25,
        process_group=dist.group.WORLD if world > 1 else None,
    )
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 2.0**-6)
    scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=8.0)
    x, target = share(rank, world, device)
    if rank == world - 1:
        target[1, -1] = torch.inf
    norms = []
    for images, factors in zip(x, target, strict=True):
        for optimizer in (bop, sgd):
            optimizer.zero_grad()
        loss = (wrapped(images) * factors).sum() * (4 / len(images))
        scaler.scale(loss).backward()
        bop.average_gradients()
        for optimizer in (bop, sgd):
            scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0**20))
        for optimizer in (bop, sgd):
            scaler.step(optimizer)
        scaler.update()
    scale = torch.tensor(scaler.get_scale())
    return model.state_dict() | {"scale": scale, "norms": torch.stack(norms)[[0, 2]]}


def main():
    rank, world, device, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
        torch.backends.cudnn.enabled = False  # It may round where every sum is exact.
    if world > 1:
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
        )
    results = {
        function.__name__: {k: v.cpu() for k, v in function(rank, world, device).items()}
        for function in (data_parallel, fully_sharded, one_byte_weights, scaled_one_byte_weights)
    }
    torch.save(results, Path(folder) / f"{rank}_of_{world}.pth")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
