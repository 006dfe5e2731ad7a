"""The layers to measure, and the least time that an H200 needs for one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import binconv

PEAK_OPS = 15.6e15  # wgmma b1 on an H200, two operations to a multiply-accumulate, a second.
PEAK_BYTES = 4.4e12  # Its memory, a second, reading and writing.
LAUNCH_US = 2.0  # What one of many launches back to back adds to its kernel.


@dataclass(frozen=True)
class Layer:
    """A convolution of square images by a square kernel, and the group of the suite it is in."""

    group: str
    name: str
    batch: int
    c_in: int
    c_out: int
    kernel: int
    stride: int
    pad: int
    in_size: int

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.in_size + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def inputs(self) -> int:
        """Values in the input."""
        return self.batch * self.in_size**2 * self.c_in

    @property
    def outputs(self) -> int:
        """Values in the output."""
        return self.batch * self.out_size**2 * self.c_out

    @property
    def weights(self) -> int:
        """Values in the weight."""
        return self.c_out * self.kernel**2 * self.c_in

    @property
    def operations(self) -> int:
        """Multiplications and additions, taps outside the image included."""
        return 2 * self.outputs * self.kernel**2 * self.c_in

    def bytes_moved(self, in_bits: int, out_bits: int) -> int:
        """Bytes of input, binary weights and output, each once, at these bits to a value."""
        return (self.inputs * in_bits + self.weights + self.outputs * out_bits) // 8

    def floor_us(self, in_bits: int, out_bits: int) -> float:
        """The least microseconds: what the arithmetic or the memory of an H200 takes."""
        memory = self.bytes_moved(in_bits, out_bits) / PEAK_BYTES
        return 1e6 * max(self.operations / PEAK_OPS, memory)

    def shape(self, pad_value: int = 0) -> binconv.Conv2dShape:
        """The sizes as the neutral functions take them."""
        return binconv.Conv2dShape(
            self.batch,
            self.in_size,
            self.in_size,
            binconv.WeightShape(self.c_out, self.c_in, self.kernel, self.kernel),
            stride=(self.stride, self.stride),
            padding=(self.pad,) * 4,
            pad_value=pad_value,
        )


def layers(pattern: str, batches: Sequence[int]) -> list[Layer]:
    """Layers whose "group/name" the regular expression finds, at each batch or their own one."""
    suite = json.loads((Path(__file__).parent / "suite.json").read_text())
    found = []
    for group, rows in suite.items():
        if group == "about":
            continue
        for row in rows:
            layer = Layer(group, **{"batch": 0, **row})
            if re.search(pattern, f"{group}/{layer.name}"):
                own = [layer] if layer.batch else [replace(layer, batch=n) for n in batches]
                found += own
    return found
