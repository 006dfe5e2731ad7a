"""Binary convolution on the CPU beside torch's float32 conv2d, in one run on one machine.

    python benchmarks/cpu_conv2d.py [--output benchmarks/results/NAME]

Layers: the stride-1 3x3 rows of bireal18, batch 8. binconv goes from packed input to
float32 NHWC output, once for every kernel that this CPU can run; torch gets its better memory
format. The contenders take turns, so that a change of clock or load hits all of them; times are
medians, and the ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import binconv
from binconv.torch.bench.suite import Layer, layers

BATCH = 8
HERE = Path(__file__).parent


def binconv_call(layer: Layer, kernel: str, threads: int) -> Callable[[], None]:
    """A convolution of random bits with everything prepared."""
    shape = layer.shape()
    x = torch.randn(BATCH, layer.c_in, layer.in_size, layer.in_size)
    w = torch.randn(layer.c_out, layer.c_in, layer.kernel, layer.kernel)
    packed = [
        torch.empty(v.shape[0], *v.shape[2:], binconv.packed_bytes(v.shape[1]), dtype=torch.uint8)
        for v in (x, w)
    ]
    for values, bits in zip((x, w), packed, strict=True):
        binconv.pack_bits(values, bits)
    size = binconv.prepared_weight_bytes(shape.weight, kernel=kernel)
    prepared = torch.empty(size, dtype=torch.uint8)
    binconv.prepare_weight(shape.weight, packed[1], prepared, kernel=kernel)
    scratch = binconv.workspace_bytes(shape, threads=threads, kernel=kernel)
    workspace = torch.empty(scratch, dtype=torch.uint8)
    out = torch.empty(BATCH, shape.out_height, shape.out_width, layer.c_out)
    return lambda: binconv.binary_conv2d(
        shape, packed[0], prepared, out, workspace=workspace, threads=threads, kernel=kernel
    )


def torch_call(layer: Layer, memory_format: torch.memory_format) -> Callable[[], None]:
    """The float32 convolution of the same sizes."""
    x = torch.randn(BATCH, layer.c_in, layer.in_size, layer.in_size)
    w = torch.randn(layer.c_out, layer.c_in, 3, 3).to(memory_format=memory_format)
    x = x.to(memory_format=memory_format)
    return lambda: torch.nn.functional.conv2d(x, w, padding=layer.pad)


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, measured in turns after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(rounds: int) -> list[dict[str, Any]]:
    """One result for each layer and kernel."""
    threads = torch.get_num_threads()
    results = []
    for layer in layers("^bireal18/", [BATCH]):
        if layer.kernel != 3 or layer.stride != 1:
            continue
        kernels = binconv.available_kernels()
        calls = {name: binconv_call(layer, name, threads) for name in kernels}
        calls["torch contiguous"] = torch_call(layer, torch.contiguous_format)
        calls["torch channels_last"] = torch_call(layer, torch.channels_last)
        with torch.no_grad():
            seconds = medians(calls, rounds)
        reference = min(seconds["torch contiguous"], seconds["torch channels_last"])
        for name in kernels:
            results.append(
                {
                    "layer": layer.name,
                    "kernel": name,
                    "ms": seconds[name] * 1e3,
                    "tops": layer.operations / seconds[name] / 1e12,
                    "torch_ms": reference * 1e3,
                    "speedup": reference / seconds[name],
                }
            )
    return results


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = os.environ.get("COMMIT")  # For a copy of the tree without its history.
    if not commit:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "binconv": binconv.version(),
        "commit": commit,
    }


def table(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Binary convolution on the CPU, packed input to float32 output",
        "",
        "`python benchmarks/cpu_conv2d.py`: " + ", ".join(f"{k} {v}" for k, v in about.items()),
        "",
        "| layer | kernel | ms | TOPS | torch float32 ms | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['layer']} | {r['kernel']} | {r['ms']:.2f} | {r['tops']:.2f} | "
            f"{r['torch_ms']:.2f} | {r['speedup']:.1f}x |"
        )
    for kernel in dict.fromkeys(r["kernel"] for r in results):
        speedups = [r["speedup"] for r in results if r["kernel"] == kernel]
        mean = statistics.geometric_mean(speedups)
        lines += ["", f"{kernel}: geometric mean {mean:.1f}x, least {min(speedups):.1f}x"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, and with --output keeps NAME.md and NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    about, results = machine() | {"batch": BATCH}, measure(arguments.rounds)
    text = table(results, about)
    print(text)
    if arguments.output:
        arguments.output.with_suffix(".md").write_text(text)
        content = {"machine": about, "results": results}
        arguments.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
