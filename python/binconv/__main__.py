"""The command line of binconv: `python -m binconv info`, `demo` and `train`."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import binconv


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; argv is sys.argv[1:] unless given."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "info":
        for name, value in _info():
            print(f"{name:<16}{value}")
        return 0
    return _run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="binconv", description="Exact, fast binary (+1/-1) 2-D convolution."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,info,train}")
    commands.add_parser("info", help="show what this binconv was built with and can run on")
    text = "train a small binary network on handwritten digits and run it on packed bits"
    demo = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    _add_common(demo, epochs=6)
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("binconv-demo.png"),
        help="the picture to write, a PNG file (default: binconv-demo.png)",
    )
    text = "train a binary residual network with checkpoints that a run can resume from"
    train = commands.add_parser("train", help=text, description=text.capitalize() + ".")
    _add_common(train, epochs=20)
    train.add_argument("--batch", type=_whole_number(2), default=64, help="(default: 64)")
    train.add_argument(
        "--data",
        default="digits",
        help="a folder with images train/CLASS/* and test/CLASS/* (default: handwritten digits)",
    )
    train.add_argument(
        "--output",
        type=Path,
        default=Path("binconv-train"),
        help="the folder for checkpoint and learning curve (default: binconv-train)",
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint there")
    return parser


def _add_common(parser: argparse.ArgumentParser, epochs: int) -> None:
    parser.add_argument("--device", help="cpu or cuda[:N] (default: a GPU if there is one)")
    parser.add_argument("--seed", type=_whole_number(0), default=0, help="(default: 0)")
    help_text = f"(default: {epochs})"
    parser.add_argument("--epochs", type=_whole_number(1), default=epochs, help=help_text)


def _whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number >= {least}")
        return int(text)

    return parse


def _info() -> Iterator[tuple[str, str]]:
    yield "binconv", binconv.__version__
    yield "CPU kernels", _best_first(binconv.available_kernels())
    yield "CUDA targets", binconv.cuda_architectures() or "built without CUDA"
    devices = binconv.cuda_devices()
    if not devices:
        yield "CUDA devices", "none"
    for index, (name, capability) in enumerate(devices):
        yield f"CUDA device {index}", f"{name}, compute capability {capability / 10}"
        yield "  kernels", _best_first(binconv.available_kernels(index))
    yield "torch", _torch_version()


def _best_first(kernels: Sequence[str]) -> str:
    return ", ".join(kernels) + (" (best first)" if len(kernels) > 1 else "") or "none"


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command
    try:
        from .torch import demo, train
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("binconv"):
            raise
        missing = f'no module named {error.name!r}; run: pip install "binconv[demo]"'
        return _fail(command, missing)
    seed, epochs, output = arguments.seed, arguments.epochs, arguments.output
    try:
        if command == "demo":
            demo.run(arguments.device, seed, epochs, output)
        else:
            settings = train.Settings(seed, epochs, arguments.batch, arguments.data)
            train.run(arguments.device, settings, output, arguments.resume)
    except demo.DemoError as error:
        return _fail(command, str(error))
    return 0


def _fail(command: str, message: str) -> int:
    print(f"binconv {command}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
