"""The command line of binconv: `python -m binconv info` and `python -m binconv demo`."""

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
    return _demo(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="binconv", description="Exact, fast binary (+1/-1) 2-D convolution."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,info}")
    commands.add_parser("info", help="show what this binconv was built with and can run on")
    text = "train a small binary network on handwritten digits and run it on packed bits"
    demo = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    demo.add_argument("--device", help="cpu or cuda[:N] (default: a GPU if there is one)")
    demo.add_argument("--seed", type=_whole_number(0), default=0, help="(default: 0)")
    demo.add_argument("--epochs", type=_whole_number(1), default=6, help="(default: 6)")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("binconv-demo.png"),
        help="the picture to write, a PNG file (default: binconv-demo.png)",
    )
    return parser


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


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from .torch import demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("binconv"):
            raise
        return _fail(f'no module named {error.name!r}; run: pip install "binconv[demo]"')
    try:
        demo.run(arguments.device, arguments.seed, arguments.epochs, arguments.output)
    except demo.DemoError as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"binconv demo: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
