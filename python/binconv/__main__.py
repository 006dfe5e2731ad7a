"""The command line of binconv: `python -m binconv info`, `demo`, `train` and `bench`."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import binconv


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; argv is sys.argv[1:] unless given."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "info":
        for name, value in _info():
            print(f"{name:<16}{value}")
        return 0
    if arguments.command == "bench":
        return _bench(arguments)
    return _train(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="binconv", description="Exact, fast binary (+1/-1) 2-D convolution."
    )
    metavar = "{bench,demo,info,train}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=metavar)
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
    _add_train(commands)
    _add_bench(commands)
    return parser


def _add_train(commands: Any) -> None:
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


def _add_bench(commands: Any) -> None:
    text = "measure layers of published networks against float16 convolution in PyTorch"
    bench = commands.add_parser("bench", help=text, description=text.capitalize() + ".")
    bench.add_argument("--device", default="cuda", help="cuda[:N], or cpu to try it")
    bench.add_argument("--rows", default="", metavar="REGEX", help="only group/name with a match")
    bench.add_argument("--batch", type=_whole_number(1), nargs="+", default=[1, 8, 128])
    bench.add_argument("--kernel", help="this one (see: binconv info), not the best for the layer")
    bench.add_argument("--quick", action="store_true", help="fewer repetitions")
    text = "benchmarks/cutlass_and.cu as a shared library, to measure too"
    bench.add_argument("--cutlass", type=Path, metavar="LIBRARY", help=text)
    text = "write PATH.md and PATH.json"
    bench.add_argument("--output", type=Path, metavar="PATH", help=text)
    text = "also write PATH_roofline.png and PATH_speedups.png"
    bench.add_argument("--plots", action="store_true", help=text)


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


def _train(arguments: argparse.Namespace) -> int:
    command = arguments.command
    try:
        from .torch import demo, train
    except ModuleNotFoundError as error:
        return _missing(command, error, "demo")
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


def _bench(arguments: argparse.Namespace) -> int:
    try:
        from .torch import bench

        if arguments.plots:
            from .torch.bench import plots  # noqa: F401  # Missing matplotlib shows at once.
    except ModuleNotFoundError as error:
        return _missing("bench", error, "demo" if arguments.plots else "torch")
    options = vars(arguments)
    del options["command"]
    try:
        bench.run(**options)
    except bench.BenchError as error:
        return _fail("bench", str(error))
    return 0


def _missing(command: str, error: ModuleNotFoundError, extra: str) -> int:
    if error.name is None or error.name.startswith("binconv"):
        raise error
    return _fail(command, f'no module named {error.name!r}; run: pip install "binconv[{extra}]"')


def _fail(command: str, message: str) -> int:
    print(f"binconv {command}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
