"""The results as pictures, of the largest batch of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .suite import PEAK_BYTES, PEAK_OPS


def draw_roofline(results: dict[str, Any], path: Path) -> None:
    """Operations a second over operations a byte, below the line that an H200 cannot pass."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    cells = _largest_batches(results["layers"])
    for marker, form, text in (("o", "fp16", "fp16 out"), ("^", "bits", "packed out")):
        for color, group in enumerate(dict.fromkeys(c["group"] for c in cells)):
            mine = [c[form] for c in cells if c["group"] == group]
            intensity = [rates["tops"] / rates["tb_s"] for rates in mine]
            tops = [rates["tops"] for rates in mine]
            axes.plot(intensity, tops, marker, color=f"C{color}", label=f"{group}, {text}")
    ridge = PEAK_OPS / PEAK_BYTES
    low, high = 10.0, 40 * ridge
    limits = [low * PEAK_BYTES / 1e12, PEAK_OPS / 1e12, PEAK_OPS / 1e12]
    axes.plot([low, ridge, high], limits, "k-", label="H200: memory, b1 tensor cores")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TOPS")
    axes.set_title(f"binconv on {results['about']['device']}, packed in")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def draw_speedups(results: dict[str, Any], path: Path) -> None:
    """Times faster than torch's float16 conv2d, a bar for each layer and form."""
    cells = _largest_batches(results["layers"])
    forms = {"fp16": "packed in, fp16 out", "bits": "packed in, packed out"}
    forms |= {"layer": "fp16 in, fp16 out"} if all("layer" in c for c in cells) else {}
    figure = Figure(figsize=(max(6, 0.35 * len(cells)), 5), layout="constrained")
    axes = figure.subplots()
    for i, (form, text) in enumerate(forms.items()):
        places = [x + 0.28 * (i - 1) for x in range(len(cells))]
        axes.bar(places, [c[form]["speedup"] for c in cells], 0.28, label=text)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [f"{c['name']}, {c['batch']}" for c in cells])
    axes.tick_params(axis="x", labelrotation=90, labelsize="small")
    axes.set(yscale="log", ylabel="times faster than torch fp16, channels_last")
    axes.set_yticks(ticks := [1, 2, 5, 10, 20, 50], [f"{tick}x" for tick in ticks])
    axes.set_title(f"binconv on {results['about']['device']}; layer, batch")
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=len(forms))
    figure.savefig(path, dpi=120)


def _largest_batches(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    largest: dict[str, dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda c: int(c["batch"])):
        largest[cell["name"]] = cell
    return [largest[name] for name in dict.fromkeys(c["name"] for c in cells)]
