"""`python -m binconv bench`: every layer of suite.json against torch's float16 conv2d.

On a GPU the times are those of launches back to back in a CUDA graph, over buffers that together
are four times its cache; on the CPU, which is there to try the harness, those of single calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import binconv

from . import report
from .cutlass import BaselineError, CutlassAnd
from .measure import Settings, about, host_call, layer_times, pack_bandwidth
from .suite import Layer, layers


class BenchError(Exception):
    """What went wrong, in words for the user."""


def run(
    *,
    device: str,
    rows: str,
    batch: Sequence[int],
    kernel: str | None,
    quick: bool,
    cutlass: Path | None,
    output: Path | None,
    plots: bool,
) -> None:
    """Measures, prints, and keeps output.json and output.md, with plots also two PNG files."""
    if plots and output is None:
        raise BenchError("--plots: got no --output, expected where to write the pictures")
    place = _device(device)
    if cutlass and place.type != "cuda":
        raise BenchError(f"--cutlass: got --device {device}, expected a GPU")
    found = _layers(rows, batch)
    kernels = binconv.available_kernels(place.index if place.type == "cuda" else None)
    if kernel not in (None, *kernels):
        raise BenchError(f"--kernel: got {kernel!r}, expected {' or '.join(kernels)}")
    try:
        baseline = CutlassAnd(cutlass) if cutlass else None
        settings = Settings(place, 5 if quick else 15, kernel, baseline)
        results = _measure(found, settings)
    except BaselineError as error:
        raise BenchError(str(error)) from error
    if output:
        _keep(output, results, plots)


def _layers(rows: str, batches: Sequence[int]) -> list[Layer]:
    try:
        found = layers(rows, batches)
    except re.error as error:
        raise BenchError(f"--rows: got {rows!r}: {error}") from error
    if not found:
        raise BenchError(f"--rows: got {rows!r}, expected a pattern that finds a group/name")
    return found


def _device(name: str) -> torch.device:
    gpus = range(torch.cuda.device_count())
    if name not in ("cpu", "cuda", *(f"cuda:{i}" for i in gpus)) or (name == "cuda" and not gpus):
        raise BenchError(f"--device: got {name!r}, expected cpu or one of {len(gpus)} GPUs: cuda:N")
    if name == "cpu":
        return torch.device(name)
    device = torch.device("cuda", torch.device(name).index or 0)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    return device


@torch.no_grad()
def _measure(found: Sequence[Layer], settings: Settings) -> dict[str, Any]:
    """All results, printed as they come."""
    if settings.cutlass:
        settings.cutlass.check(settings.device)
    results: dict[str, Any] = {"about": about(settings.device), "layers": []}
    print(report.heading(results["about"]), flush=True)
    for layer in found:
        cell = layer_times(layer, settings)
        if cell:
            results["layers"].append(cell)
            print(report.line(cell), flush=True)
    results["pack_bits"] = pack_bandwidth(settings)
    results["host_call"] = host_call(settings)
    print("\n" + report.summary(results))
    return results


def _keep(output: Path, results: dict[str, Any], plots: bool) -> None:
    lines = [report.heading(results["about"]), *map(report.line, results["layers"])]
    text = "\n".join(lines) + "\n\n" + report.summary(results) + "\n"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(f"{output.name}.md").write_text(text)
        output.with_name(f"{output.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        if plots:
            from .plots import draw_roofline, draw_speedups

            draw_roofline(results, output.with_name(f"{output.name}_roofline.png"))
            draw_speedups(results, output.with_name(f"{output.name}_speedups.png"))
    except OSError as error:
        raise BenchError(f"--output: {error}") from error
