"""The elementwise steps of backward on the CPU beside the same in torch, in one run.

    python benchmarks/cpu_gradient.py [--output benchmarks/results/NAME]

torch works on what a float network keeps: x itself instead of its bits. The contenders take turns,
so that a change of clock or load hits both; times are medians, and the ratio is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_conv2d import machine
from torch import Tensor

import binconv

BATCH, CHANNELS, SIZE = 8, 256, 28
Pair = tuple[Callable[[], object], Callable[[], object]]


def of_values(dtype: torch.dtype, nhwc: bool) -> dict[str, Pair]:
    """Signs and mask of an image, by binconv and by torch."""
    shape = (BATCH, SIZE, SIZE, CHANNELS) if nhwc else (BATCH, CHANNELS, SIZE, SIZE)
    x, grad, signs = (torch.randn(shape).to(dtype) for _ in range(3))
    bits, inside = torch.empty(2, BATCH, SIZE, SIZE, CHANNELS // 8, dtype=torch.uint8)
    weight, filters = torch.ones(1, 8, 1, 1), torch.empty(1, 8, 1, 1)  # Next to nothing.
    where = {"layout": "nhwc" if nhwc else "nchw", "threads": torch.get_num_threads()}
    binconv.pack_bits_and_clip(x, bits, inside, **where)
    masked = grad.clone()

    def mask() -> Tensor:
        return grad * (x.abs() <= 1)

    return {
        "signs of x": (
            lambda: binconv.sign_conv2d_operands(bits, weight, signs, filters, **where),
            lambda: torch.where(x >= 0, 1.0, -1.0).to(dtype),
        ),
        "clip of dL/dx": (lambda: binconv.mask_values(masked, inside, **where), mask),
    }


def of_weight() -> dict[str, Pair]:
    """The gradient of a weight, by binconv and by torch."""
    weight, grad, out = torch.randn(3, CHANNELS, CHANNELS, 3, 3)
    scale = torch.rand(CHANNELS)
    column, threads = scale.view(-1, 1, 1, 1), torch.get_num_threads()
    return {
        "dL/dweight": (
            lambda: binconv.weight_gradient(grad, weight, out, scale=scale, threads=threads),
            lambda: grad * column * (weight.abs() <= 1),
        )
    }


def medians(pair: Pair, rounds: int = 60) -> list[float]:
    """Milliseconds of each."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for call, taken in zip(pair, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def table() -> str:
    """The results as Markdown."""
    about = machine() | {"images": f"{BATCH} of {SIZE}x{SIZE} with {CHANNELS} channels"}
    lines = [
        "# Elementwise steps of backward on the CPU",
        "",
        "`python benchmarks/cpu_gradient.py`: " + ", ".join(f"{k} {v}" for k, v in about.items()),
        "",
        "| step | values | layout | binconv ms | torch ms | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for nhwc in (True, False):
            for name, pair in of_values(dtype, nhwc).items():
                ours, theirs = medians(pair)
                kind, layout = str(dtype).removeprefix("torch."), "NHWC" if nhwc else "NCHW"
                lines.append(
                    f"| {name} | {kind} | {layout} | {ours:.2f} | {theirs:.2f} | "
                    f"{theirs / ours:.1f}x |"
                )
    for name, pair in of_weight().items():
        ours, theirs = medians(pair)
        lines.append(f"| {name} | float32 | | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f}x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, and with --output keeps NAME.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="writes NAME.md")
    settings = parser.parse_args()
    text = table()
    print(text)
    if settings.output:
        settings.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
