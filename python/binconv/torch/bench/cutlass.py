"""CUTLASS's b1 AND implicit GEMM, compiled from benchmarks/cutlass_and.cu, to measure against."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .contenders import PackedConv2d
from .suite import Layer
from .timing import Timing, time_call


class BaselineError(Exception):
    """The baseline does not load, does not launch or computes something else."""


class CutlassAnd:
    """The compiled kernels. Each tile size is one; the best of them is what counts."""

    def __init__(self, library: Path) -> None:
        try:
            self.library = ctypes.CDLL(str(library.absolute()))
        except OSError as error:
            raise BaselineError(f"--cutlass: {error}") from error
        self.library.cutlass_and_conv2d.argtypes = [ctypes.c_int] * 8 + [ctypes.c_void_p] * 4
        self.tiles: int = self.library.cutlass_and_tiles()

    def takes(self, layer: Layer) -> bool:
        """Whether its loads of 16 bytes fit the channels."""
        return layer.c_in % 128 == 0 and layer.c_out % 4 == 0

    def launch(self, tile: int, layer: Layer, x: Tensor, weight: Tensor, out: Tensor) -> bool:
        """Writes int32 popcount(x & weight) to out, NHWC, on the current stream, if it can."""
        sizes = (layer.batch, layer.in_size, layer.c_in, layer.c_out)
        window = (layer.kernel, layer.stride, layer.pad)
        pointers = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
        stream = torch.cuda.current_stream(x.device).cuda_stream
        status = self.library.cutlass_and_conv2d(tile, *sizes, *window, *pointers, stream)
        return bool(status == 0)

    def time(self, layer: Layer, device: torch.device, replays: int) -> tuple[int, Timing]:
        """The best tile, and its time."""
        conv = PackedConv2d(layer, device, "int32")
        timings = {}
        for tile in range(self.tiles):

            def call(i: int, tile: int = tile) -> bool:
                return self.launch(tile, layer, conv.input[i], conv.weight, conv.out[i])

            if call(0):
                timings[tile] = time_call(call, conv.sets, device, replays)
        if not timings:
            raise BaselineError(f"CUTLASS: no tile launches on {layer.name}, batch {layer.batch}")
        return min(timings.items(), key=lambda item: item[1].us)

    def check(self, device: torch.device) -> None:
        """Raises unless every tile computes what binconv's exact sums say it should."""
        layer = Layer("", "check", 2, 256, 256, kernel=3, stride=1, pad=1, in_size=14)
        conv = PackedConv2d(layer, device, "int32", pad_value=-1)
        conv(0)
        expected = _and_popcounts(layer, conv.input[0], conv.weight, conv.out[0])
        for tile in range(self.tiles):
            out = torch.full_like(conv.out[0], -1)
            launched = self.launch(tile, layer, conv.input[0], conv.weight, out)
            if not launched or not torch.equal(out, expected):
                raise BaselineError(f"CUTLASS: tile {tile} computes something else")


def _and_popcounts(layer: Layer, x: Tensor, weight: Tensor, acc: Tensor) -> Tensor:
    """popcount(x & w) of each window, from acc = K - 2 popcount(x) - 2 popcount(w) + 4 of it.

    acc is that of pad_value -1, to which a pixel outside the image is zero bits.
    """
    pixels = _bit_counts(x).unsqueeze(1).double()
    ones = torch.ones(1, 1, layer.kernel, layer.kernel, dtype=torch.float64, device=x.device)
    windows = torch.nn.functional.conv2d(pixels, ones, None, layer.stride, layer.pad)
    in_windows = windows.permute(0, 2, 3, 1).int()
    in_weights = _bit_counts(weight).sum((1, 2), dtype=torch.int32)
    return (acc - layer.kernel**2 * layer.c_in + 2 * in_windows + 2 * in_weights) // 4


def _bit_counts(packed: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & 1).sum((-1, -2), dtype=torch.int32)
