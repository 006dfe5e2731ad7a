"""A binary network from training to packed bits: `python -m binconv demo`.

Trains a small residual network of binary convolutions on scikit-learn's handwritten digits, runs it
on packed bits, checks it against the same network in plain PyTorch, and reports accuracy, size and
speed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm  # type: ignore[import-untyped]

import binconv
from binconv.torch import BinaryConv2d, pack_bits, pack_weight

CHANNELS = 128
BATCH = 64


class DemoError(Exception):
    """What went wrong, in words for the user."""


class SignConv2d(nn.Module):
    """A BinaryConv2d without binconv: the signs as floats, multiplied one by one."""

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.shift = layer.weight, layer.bias, layer.shift
        self.scale = layer.weight.abs().mean((1, 2, 3)) if layer.scale is None else layer.scale
        self.stride, self.padding = layer.stride, layer.padding
        assert layer.weight_scale in ("channel", "learnable")
        assert layer.padding_mode == "zeros"
        assert layer.pad_value == 0

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, in float64: exact by whatever algorithm PyTorch picks."""
        if self.shift is not None:
            x = x + self.shift.view(-1, 1, 1)
        sums = F.conv2d(_signs(x), _signs(self.weight), None, self.stride, self.padding)
        y = sums.float() * self.scale.view(-1, 1, 1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


class BinaryBlock(nn.Module):
    """A binary convolution and a float shortcut, as in Bi-Real Net (Liu et al., 2018)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv = BinaryConv2d(CHANNELS, CHANNELS, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.shortcut = nn.AvgPool2d(stride)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, kept in [-1, 1], where gradients pass the sign of the next convolution."""
        return F.hardtanh(self.norm(self.conv(x)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """8x8 images to 10 logits: a float stem, four binary blocks, a float classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.Hardtanh(),
        )
        self.blocks = nn.Sequential(*(BinaryBlock(stride) for stride in (1, 2, 1, 1)))
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """The logits, (N, 10)."""
        x = self.stem(images).contiguous(memory_format=torch.channels_last)  # As packed bits lie.
        logits: Tensor = self.classifier(self.blocks(x))
        return logits


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) of values in [-1, 1], and the digits that they show."""

    images: Tensor
    labels: Tensor


def run(device_name: str | None, seed: int, epochs: int, output: Path) -> None:
    """The whole demo, printing as it goes. Raises DemoError for what the user should know."""
    device = choose_device(device_name)
    train_set, test_set = load_data(device)
    train_size, total = len(train_set.labels), len(test_set.labels)
    print(f"{train_size:,} handwritten digits to train on, {total} held out")

    torch.set_num_threads(1)  # Layers this small gain little from more, and one repeats exactly.
    torch.manual_seed(seed)
    network = DigitsNet().to(device)
    start = time.perf_counter()
    train(network, train_set, epochs)
    seconds = time.perf_counter() - start
    print(f"Trained on {describe(device)} in {seconds:.1f} s (seed {seed}, epochs {epochs})")

    network.eval()  # From here on, every BinaryConv2d runs on packed bits.
    with torch.inference_mode():
        predictions = network(test_set.images).argmax(1)
        right = int((predictions == test_set.labels).sum())
        print(f"Accuracy on packed bits: {right / total:.2%} of the held-out digits ({right})")
        difference = check_twin(network, plain_twin(network), test_set.images)
        print(f"A plain-PyTorch twin predicts the same for all {total}", end="")
        print(f" (largest difference of a logit: {difference:.1g})")
        print_sizes(network)
        print_times(network, test_set.images[:BATCH])
    save_picture(test_set, predictions, output)
    print(f"\nPicture: {output}")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best one that both binconv and PyTorch can use."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        gpus = range(len(binconv.cuda_devices()))
        devices += [f"cuda:{index}" for index in gpus if binconv.available_kernels(index)]
    if name is None or name == "cuda":
        name = devices[1] if len(devices) > 1 else name or "cpu"
    if name not in devices:
        usable = " or ".join(devices)
        raise DemoError(f"--device: got {name!r}, expected {usable} (see: python -m binconv info)")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "the CPU"


def load_data(device: torch.device) -> tuple[Digits, Digits]:
    """Scikit-learn's 1,797 digits: two thirds to train on, and always the same third held out."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=len(labels) // 3, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = (
        torch.as_tensor(part, device=device) for part in split
    )
    return _digits(train_images, train_labels), _digits(test_images, test_labels)


def _digits(pixels: Tensor, labels: Tensor) -> Digits:
    return Digits(pixels.view(-1, 1, 8, 8).float() / 8 - 1, labels)  # Pixels are 0 to 16.


def train(network: DigitsNet, data: Digits, epochs: int) -> None:
    """Trains with Adam as any other network: gradients pass the signs straight through."""
    network.train()
    steps = epochs * -(-len(data.labels) // BATCH)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=steps)
    with tqdm(total=steps, desc="Training", unit="step") as progress:
        for _ in range(epochs):
            for batch in torch.randperm(len(data.labels)).split(BATCH):
                loss = F.cross_entropy(network(data.images[batch]), data.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def plain_twin(network: nn.Module) -> nn.Module:
    """A copy of a network, in eval mode, without binconv."""
    twin = copy.deepcopy(network)
    for parent in list(twin.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, BinaryConv2d):
                setattr(parent, name, SignConv2d(layer))
    return twin.eval()


def check_twin(network: nn.Module, twin: nn.Module, images: Tensor) -> float:
    """The largest difference between their logits; DemoError if any prediction differs."""
    pairs = [(network(batch), twin(batch)) for batch in images.split(BATCH)]
    logits, expected = (torch.cat(side) for side in zip(*pairs, strict=True))
    difference = float((logits - expected).abs().max())
    differing = int((logits.argmax(1) != expected.argmax(1)).sum())
    if differing:
        raise DemoError(
            f"{differing} of {len(images)} predictions differ from those of plain PyTorch "
            f"(largest difference of a logit: {difference:.3g})"
        )
    return difference


def _binary_layers(network: DigitsNet) -> list[BinaryConv2d]:
    return [layer for layer in network.modules() if isinstance(layer, BinaryConv2d)]


def print_sizes(network: DigitsNet) -> None:
    """Bytes of the binary weights: as floats, packed, and as this device's kernels read them."""
    layers = _binary_layers(network)
    weights = sum(layer.weight.numel() for layer in layers)
    scales = 4 * sum(layer.out_channels for layer in layers)
    packed = scales + sum(pack_weight(layer.weight).numel() for layer in layers)
    prepared = scales + sum(_prepared_bytes(layer) for layer in layers)
    print(f"\nWeights of the {len(layers)} binary convolutions")
    print(f"  float32             {4 * weights:>10,} bytes")
    for name, size in (("packed, for files", packed), ("prepared, to run", prepared)):
        print(f"  {name:<20}{size:>10,} bytes, {4 * weights / size:.1f} times smaller, with scales")


def _prepared_bytes(layer: BinaryConv2d) -> int:
    shape = binconv.WeightShape(layer.out_channels, layer.in_channels, *layer.kernel_size)
    return binconv.prepared_weight_bytes(shape, device=layer.weight.device.index)


def print_times(network: DigitsNet, images: Tensor) -> None:
    """A table: each binary convolution on these images against PyTorch's float convolution."""
    place = describe(images.device) if images.is_cuda else "one CPU thread"
    print(f"\nMicroseconds a call: {CHANNELS} channels, 3x3, batch {len(images)}, {place}")
    print("  image       torch float32    binconv, packed input    binconv, packing a float input")
    x = network.stem(images)
    for block in network.blocks:
        assert isinstance(block, BinaryBlock)
        # In the better of the two memory formats, for both sides.
        floats = x.contiguous(), x.contiguous(memory_format=torch.channels_last)
        plain_calls = [partial(_float_conv2d, block.conv, form) for form in floats]
        layer_calls = [partial(block.conv, form) for form in (pack_bits(x), *floats)]
        *plain, packed, first, last = _microseconds([*plain_calls, *layer_calls])
        floating, packing = min(plain), min(first, last)
        sizes = f"{x.shape[2]}x{x.shape[3]}"
        x = block(x)
        sizes += f" to {x.shape[2]}x{x.shape[3]}"
        print(f"  {sizes:<10}{floating:15.0f}", end="")
        print(f"{packed:16.0f} {floating / packed:6.1f}x", end="")
        print(f"{packing:22.0f} {floating / packing:6.1f}x")


def _float_conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


def _microseconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The median time of each call, taking turns so that a busy moment hits all alike."""
    timers = [Timer("call()", globals={"call": call}) for call in calls]
    rounds = [[timer.timeit(3).mean for timer in timers] for _ in range(9)]
    return [1e6 * statistics.median(times) for times in zip(*rounds, strict=True)]


def save_picture(data: Digits, predictions: Tensor, output: Path) -> None:
    """Writes a grid of digits with what the network takes them for: wrong ones first, in red."""
    wrong = predictions != data.labels
    order = wrong.int().argsort(descending=True, stable=True).tolist()
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    right = len(order) - sum(wrong.tolist())
    figure.suptitle(
        f"A binary network reads {right} of {len(order)} held-out digits right; "
        "its mistakes come first, in red"
    )
    for axes, index in zip(figure.subplots(5, 10).flat, order, strict=False):
        label, predicted = int(data.labels[index]), int(predictions[index])
        axes.imshow(data.images[index, 0].cpu().numpy(), cmap="gray_r")
        axes.set_axis_off()
        if predicted == label:
            axes.set_title(str(predicted))
        else:
            axes.set_title(f"{predicted}, not {label}", color="crimson", weight="bold")
    save_figure(figure, output)


def save_figure(figure: Figure, output: Path) -> None:
    """Writes a PNG file, and the folder for it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise DemoError(f"--output: {error}") from error
