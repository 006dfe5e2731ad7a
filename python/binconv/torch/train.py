"""A training run that can be repeated and resumed: `python -m binconv train`.

Trains a network in the manner of ReActNet (Liu et al., 2020) on scikit-learn's handwritten digits,
or on the images of a folder, writes a checkpoint and the learning curve after every epoch, and in
the end checks that the network on packed bits and the same network in plain PyTorch say the same of
every test image.
"""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

from binconv.torch import BinaryConv2d, RPReLU
from binconv.torch.demo import (
    DemoError,
    Digits,
    check_twin,
    choose_device,
    describe,
    load_data,
    plain_twin,
    save_figure,
)
from binconv.torch.models import BiRealNet

WIDTHS, DEPTH = (64, 128), 2
LEARNING_RATE = 0.004
SIZE = {"digits": 16, "folder": 32}  # Pixels, to which images are scaled.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")


class Settings(NamedTuple):
    """What a run depends on, besides the device: kept in its checkpoints."""

    seed: int
    epochs: int
    batch: int
    data: str  # "digits" or a folder.


class Data(NamedTuple):
    """Images (N, C, H, W) in [-1, 1] with their labels, to train on and to test with."""

    train: Digits
    test: Digits
    classes: int


def run(device_name: str | None, settings: Settings, output: Path, resume: bool) -> None:
    """The whole run, printing as it goes. Raises DemoError for what the user should know."""
    device = choose_device(device_name)
    torch.set_num_threads(1)  # One thread repeats exactly.
    torch.backends.cudnn.deterministic = True
    data = load(settings.data, device)
    print(f"{len(data.train.labels):,} images to train on, {len(data.test.labels):,} held out")
    trainer = Trainer(data, settings, device)
    checkpoint = output / "checkpoint.pth"
    if resume:
        trainer.load(checkpoint)
        print(f"Resumed after epoch {len(trainer.history)} of {settings.epochs}")
    start = time.perf_counter()
    while len(trainer.history) < settings.epochs:
        trainer.epoch()
        trainer.save(checkpoint)
        save_figure(learning_curve(trainer.history), output / "curve.png")
    seconds = time.perf_counter() - start
    print(f"Trained on {describe(device)} in {seconds:.1f} s (seed {settings.seed})")
    report(trainer.network.eval(), data.test)
    print(f"Checkpoint and learning curve: {output}")


@torch.inference_mode()
def report(network: nn.Module, test: Digits) -> None:
    """Accuracy on packed bits, and that plain PyTorch agrees on every image."""
    right = correct(network, test)
    total = len(test.labels)
    print(f"Accuracy on packed bits: {right / total:.2%} of the held-out images ({right})")
    difference = check_twin(network, plain_twin(network), test.images)
    print(f"A plain-PyTorch twin predicts the same for all {total}", end="")
    print(f" (largest difference of a logit: {difference:.1g})")


class Trainer:
    """A network with its optimizer, schedule and history, epoch by epoch.

    Everything random comes from the seed and the number of the epoch, so that a resumed run ends
    with the very weights of one that was never interrupted.
    """

    def __init__(self, data: Data, settings: Settings, device: torch.device) -> None:
        self.data, self.settings = data, settings
        torch.manual_seed(settings.seed)
        self.network = BiRealNet(
            data.classes,
            WIDTHS,
            DEPTH,
            in_channels=data.train.images.shape[1],
            stem="small",
            layer=partial(BinaryConv2d, ste="approx_sign", input_shift=True),
            activation=RPReLU,
        ).to(device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.network.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=LEARNING_RATE,
            total_steps=settings.epochs * math.ceil(len(data.train.labels) / settings.batch),
        )
        self.history: list[dict[str, float]] = []

    def epoch(self) -> None:
        """Trains once over the images, tests, and adds to the history."""
        number = len(self.history)
        loss_sum, count = 0.0, 0
        self.network.train()
        with tqdm(total=len(self.data.train.labels), unit="image") as progress:
            progress.set_description(f"Epoch {number + 1}/{self.settings.epochs}")
            for images, labels in self._batches(number):
                loss = F.cross_entropy(self.network(images), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                loss_sum += loss.item() * len(labels)
                count += len(labels)
                progress.update(len(labels))
                progress.set_postfix(loss=f"{loss_sum / count:.3f}")
        self.network.eval()
        with torch.inference_mode():
            accuracy = correct(self.network, self.data.test) / len(self.data.test.labels)
        self.history.append({"loss": loss_sum / count, "accuracy": accuracy})

    def _batches(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, and each image shifted by up to a sixteenth of its size."""
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + number) % 2**63)
        images, labels = self.data.train
        reach = images.shape[-1] // 16
        for chosen in torch.randperm(len(labels), generator=generator).split(self.settings.batch):
            shifts = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            yield images[chosen].roll(shifts, (2, 3)), labels[chosen]

    def save(self, path: Path) -> None:
        """Writes a checkpoint: complete, or not there."""
        content = {
            "settings": self.settings._asdict(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": self.history,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path = path.with_suffix(".partial")
            torch.save(content, partial_path)
            os.replace(partial_path, path)
        except OSError as error:
            raise DemoError(f"--output: {error}") from error

    def load(self, path: Path) -> None:
        """Takes a checkpoint of a run with the same settings."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise TypeError(f"a {type(content).__name__}")
            self._check_settings(content["settings"], path)
            self._take(content)
        except DemoError:
            raise
        except FileNotFoundError:
            raise DemoError(f"--resume: got no {path}, expected one of an earlier run") from None
        except Exception as error:  # Whatever content of another kind makes a reader stumble over.
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            message = f"--resume: got {path}, which is no checkpoint of such a run ({reason})"
            raise DemoError(message) from error

    def _check_settings(self, settings: dict[str, Any], path: Path) -> None:
        for name, value in self.settings._asdict().items():
            if settings[name] != value:
                raise DemoError(f"--{name}: got {value}, expected {settings[name]} as in {path}")

    def _take(self, content: dict[str, Any]) -> None:
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.history = [
            {name: float(entry[name]) for name in ("loss", "accuracy")}
            for entry in content["history"]
        ]


def correct(network: nn.Module, data: Digits) -> int:
    """How many images the network, in eval mode and so on packed bits, takes for what they are."""
    pairs = zip(data.images.split(256), data.labels.split(256), strict=True)
    return sum(int((network(images).argmax(1) == labels).sum()) for images, labels in pairs)


def load(data: str, device: torch.device) -> Data:
    """The digits, scaled up, or the folders train/CLASS and test/CLASS of a folder."""
    if data == "digits":
        size = SIZE["digits"]
        train, test = (
            Digits(F.interpolate(images, (size, size), mode="bilinear"), labels)
            for images, labels in load_data(device)
        )
        return Data(_channels_last(train), _channels_last(test), classes=10)
    folder = Path(data)
    classes = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
    if not classes:
        raise DemoError(f"--data: got {data}, expected 'digits' or a folder with train/CLASS/*.png")
    train, test = (_read(folder / part, classes, device) for part in ("train", "test"))
    return Data(_channels_last(train), _channels_last(test), len(classes))


def _channels_last(data: Digits) -> Digits:
    return Digits(data.images.contiguous(memory_format=torch.channels_last), data.labels)


def _read(folder: Path, classes: list[str], device: torch.device) -> Digits:
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("*"))
        found = [_read_image(path) for path in files if path.suffix.lower() in SUFFIXES]
        if not found:
            raise DemoError(f"--data: got no images in {folder / name}, expected some")
        images += found
        labels += [label] * len(found)
    return Digits(torch.stack(images).to(device), torch.tensor(labels, device=device))


def _read_image(path: Path) -> Tensor:
    from matplotlib.image import pil_to_array
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = pil_to_array(image.convert("RGB").resize((SIZE["folder"],) * 2))
    except Exception as error:  # PIL has one of its own for every format.
        raise DemoError(f"--data: got {path}, expected an image ({error})") from error
    return torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1


def learning_curve(history: list[dict[str, float]]) -> Figure:
    """Loss and accuracy by epoch."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    epochs = range(1, len(history) + 1)
    last = history[-1]["accuracy"]
    figure.suptitle(f"{last:.2%} of the held-out images right after {len(history)} epochs")
    left = figure.subplots()
    left.plot(epochs, [entry["loss"] for entry in history], "o-", color="tab:blue")
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color="tab:blue")
    right = left.twinx()
    accuracies = [100 * entry["accuracy"] for entry in history]
    right.plot(epochs, accuracies, "s-", color="tab:orange")
    right.set_ylabel("held-out accuracy on packed bits, %", color="tab:orange")
    return figure
