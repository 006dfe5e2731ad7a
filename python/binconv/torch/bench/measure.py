"""Measurements as the numbers that are kept: plain dictionaries, times in microseconds."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import binconv
import binconv.torch as bt

from .contenders import DeviceCopy, PackBits, PackedConv2d, kernel_name, torch_fp16, whole_layer
from .cutlass import CutlassAnd
from .suite import LAUNCH_US, Layer
from .timing import Call, Timing, host_us, time_call

PACK_SIZES = ((256, 56), (64, 112))  # Channels, height and width; 128 images.
NCHW_GROUPS = ("bireal18", "compute_bound")
LAYOUTS: tuple[Literal["nhwc", "nchw"], ...] = ("nhwc", "nchw")


@dataclass(frozen=True)
class Settings:
    """Where and how to measure. A forced kernel leaves out what only the chosen one can do."""

    device: torch.device
    replays: int
    kernel: str | None
    cutlass: CutlassAnd | None

    def time(self, call: Call, sets: int) -> Timing:
        """The time of one call."""
        return time_call(call, sets, self.device, self.replays)


def layer_times(layer: Layer, settings: Settings) -> dict[str, Any] | None:
    """All times of a layer, or None where the forced kernel does not take it."""
    try:
        name = kernel_name(layer, settings.device, settings.kernel)
    except NotImplementedError:
        return None
    rival = asdict(settings.time(*torch_fp16(layer, settings.device)))
    result = {**asdict(layer), "kernel_name": name, "torch_fp16": rival}
    result["fp16"] = _packed_times(layer, settings, "fp16", 16)
    result["bits"] = _packed_times(layer, settings, "bits", 1)
    if layer.group in NCHW_GROUPS and layer.batch >= 128:
        result["fp16_nchw"] = _packed_times(layer, settings, "fp16", 16, "nchw")
    if settings.kernel is None:
        timing = settings.time(*whole_layer(layer, settings.device))
        result["layer"] = _with_rates(timing, layer, 16, 16)
    for form in ("fp16", "bits", "layer"):
        if form in result:
            result[form]["speedup"] = rival["us"] / result[form]["us"]
    if settings.cutlass and settings.cutlass.takes(layer):
        tile, timing = settings.cutlass.time(layer, settings.device, settings.replays)
        speedup = timing.us / result["fp16"]["us"]
        result["cutlass_and"] = {**asdict(timing), "tile": tile, "speedup_over": speedup}
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()  # Of the graphs' outputs, which nothing else can reuse.
    return result


def _packed_times(
    layer: Layer,
    settings: Settings,
    out: Literal["fp16", "bits"],
    out_bits: int,
    layout: Literal["nhwc", "nchw"] = "nhwc",
) -> dict[str, float]:
    conv = PackedConv2d(layer, settings.device, out, layout=layout, kernel=settings.kernel)
    return _with_rates(settings.time(conv, conv.sets), layer, 1, out_bits)


def _with_rates(timing: Timing, layer: Layer, in_bits: int, out_bits: int) -> dict[str, float]:
    floor = layer.floor_us(in_bits, out_bits)
    return {
        **asdict(timing),
        "tops": layer.operations / timing.us / 1e6,
        "tb_s": layer.bytes_moved(in_bits, out_bits) / timing.us / 1e6,
        "floor_us": floor,
        "of_floor": (floor + LAUNCH_US) / timing.us,
    }


def pack_bandwidth(settings: Settings) -> list[dict[str, Any]]:
    """pack_bits beside a copy that moves as many bytes, in TB/s, both read and written."""
    results = []
    for channels, size in PACK_SIZES:
        for dtype in (torch.float16, torch.float32):
            for layout in LAYOUTS:
                sizes = (128, channels, size, size)
                pack = PackBits(sizes, dtype, layout, settings.device)
                copy = DeviceCopy(pack.bytes_moved // 2, settings.device)
                rates = [
                    call.bytes_moved / settings.time(call, call.sets).us / 1e6
                    for call in (pack, copy)
                ]
                name = str(dtype).removeprefix("torch.")
                results.append(
                    {"sizes": sizes, "dtype": name, "layout": layout}
                    | {"tb_s": rates[0], "copy_tb_s": rates[1], "of_copy": rates[0] / rates[1]}
                )
    return results


def host_call(settings: Settings) -> dict[str, float]:
    """An eager binconv.torch.binary_conv2d of a BitTensor by a prepared weight, on the host."""
    x = bt.pack_bits(torch.randn(1, 64, 7, 7, device=settings.device))
    weight = bt.prepare_weight(torch.randn(64, 64, 3, 3, device=settings.device))

    def call() -> object:
        return bt.binary_conv2d(x, weight, padding=1, out_dtype=torch.float16)

    return asdict(host_us(call, settings.device, 4 * settings.replays))


def about(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    where: dict[str, Any] = {"device": "CPU"}
    if device.type == "cuda":
        where = {
            "device": torch.cuda.get_device_name(device),
            "driver": _output_of(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    here = str(Path(__file__).parent)
    return {
        **where,
        "torch": torch.__version__,
        "binconv": binconv.__version__,
        "commit": os.environ.get("COMMIT")  # For a copy without the history.
        or _output_of("git", "-C", here, "rev-parse", "--short", "HEAD"),
        "command": shlex.join(["binconv", *sys.argv[1:]]),
    }


def _output_of(*command: str) -> str:
    """The first line that a command prints, or "unknown" if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().split("\n")[0]
