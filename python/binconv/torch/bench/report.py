"""The results as Markdown: a table of all layers, and what was to be reached beside what was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

Cell = dict[str, Any]
Value = Callable[[Cell], float]

COLUMNS = (
    "layer",
    "batch",
    "kernel",
    "fp16 out us",
    "TOPS",
    "TB/s",
    "floor us",
    "of floor + 2",
    "x torch fp16",
    "bits out us",
    "x torch fp16",
    "fp16 layer us",
    "x torch fp16",
    "torch fp16 us",
    "CUTLASS AND us",
    "x CUTLASS",
)


@dataclass(frozen=True)
class Bar:
    """What is to be reached on an H200. `worst` names the layer that it hangs on, if one does."""

    text: str
    bound: float
    reached: float
    unit: str
    at_most: bool = False
    worst: str = ""

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.reached <= self.bound if self.at_most else self.reached >= self.bound


def heading(about: dict[str, Any]) -> str:
    """What was measured where, and the head of the table of layers."""
    lines = ["# Binary convolution layers", ""]
    lines += [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join(lines)


def line(cell: Cell) -> str:
    """A layer at a batch; times are medians, ± half the range between quartiles."""
    fp16, layer, cutlass = cell["fp16"], cell.get("layer"), cell.get("cutlass_and")
    values = [cell["name"], str(cell["batch"]), cell["kernel_name"], _time(fp16)]
    values += [f"{fp16['tops']:.0f}", f"{fp16['tb_s']:.2f}", f"{fp16['floor_us']:.2f}"]
    values += [f"{fp16['of_floor']:.0%}", f"{fp16['speedup']:.2f}"]
    values += [_time(cell["bits"]), f"{cell['bits']['speedup']:.2f}"]
    values += [_time(layer), f"{layer['speedup']:.2f}"] if layer else ["", ""]
    values += [_time(cell["torch_fp16"])]
    values += [_time(cutlass), f"{cutlass['speedup_over']:.2f}"] if cutlass else ["", ""]
    return "| " + " | ".join(values) + " |"


def _time(timing: dict[str, float]) -> str:
    spread = (timing["third_quartile_us"] - timing["first_quartile_us"]) / 2
    return f"{timing['us']:.2f} ± {spread:.2f}"


def summary(results: dict[str, Any]) -> str:
    """The geometric means, pack_bits, the host's time, and every bar: met or missed."""
    lines = ["## Geometric means over torch fp16", ""]
    lines += ["| group | batch | fp16 out | bits out | fp16 layer |", "|---" * 5 + "|"]
    lines += _means(results["layers"])
    lines += ["", "## pack_bits", "", "| values | layout | TB/s | of a copy |", "|---" * 4 + "|"]
    for pack in results["pack_bits"]:
        sizes = "x".join(map(str, pack["sizes"]))
        values = (f"{sizes} {pack['dtype']}", pack["layout"], f"{pack['tb_s']:.2f}")
        lines.append("| " + " | ".join(values) + f" | {pack['of_copy']:.0%} |")
    lines += [
        "",
        "## To be reached on an H200, batch 128 unless said",
        "",
        "| what | bar | reached | |",
        "|---" * 4 + "|",
    ]
    for bar in bars(results):
        sign, worst = "<=" if bar.at_most else ">=", f" ({bar.worst})" if bar.worst else ""
        reached = f"{bar.reached:.2f}{bar.unit}{worst}"
        verdict = "met" if bar.met else "MISSED"
        lines.append(f"| {bar.text} | {sign} {bar.bound:g}{bar.unit} | {reached} | {verdict} |")
    return "\n".join(lines)


def _means(cells: Sequence[Cell]) -> Iterator[str]:
    keys = dict.fromkeys(
        (c["group"], "own" if c["group"] == "seed_tests" else c["batch"]) for c in cells
    )
    for group, batch in keys:
        mine = [c for c in cells if c["group"] == group and batch in ("own", c["batch"])]
        means = []
        for form in ("fp16", "bits", "layer"):
            speedups = [c[form]["speedup"] for c in mine if form in c]
            means.append(f"{geometric_mean(speedups):.2f}x" if speedups else "")
        yield f"| {group} | {batch} | " + " | ".join(means) + " |"


def bars(results: dict[str, Any]) -> list[Bar]:
    """Every bar that these results have something to say about."""
    large = [c for c in results["layers"] if c["batch"] == 128 or c["group"] == "seed_tests"]
    single = [c for c in results["layers"] if c["batch"] == 1 and c["group"] != "seed_tests"]
    return [
        *_packed_bars(large),
        *_layer_bars([c for c in large if "layer" in c]),
        *_least("batch 1, fp16 out, least over torch fp16", 1.0, single, _speedup("fp16")),
        *_mean("batch 1, fp16 out, bireal18", 1.8, single, "bireal18", "fp16"),
        *_cutlass_bars([c for c in results["layers"] if "cutlass_and" in c]),
        *_other_bars(large, results["pack_bits"], results["host_call"]),
    ]


def _packed_bars(large: Sequence[Cell]) -> Iterator[Bar]:
    def is_main(c: Cell) -> bool:
        return c["kernel"] == 3 and c["group"] in ("bireal18", "compute_bound")

    def of_floor(c: Cell) -> float:
        return float(c["fp16"]["of_floor"])

    main, others = [c for c in large if is_main(c)], [c for c in large if not is_main(c)]
    seed = [c for c in large if c["name"] == "seed_4096_128_k5"]
    text = "fp16 out, least of floor + 2 us"
    yield from _least(f"{text}, bireal18 and compute_bound", 0.75, main, of_floor, "")
    yield from _least(f"{text}, others", 0.6, others, of_floor, "")
    yield from _mean("fp16 out, bireal18", 4.7, large, "bireal18", "fp16")
    yield from _mean("fp16 out, compute_bound", 11.0, large, "compute_bound", "fp16")
    yield from _least("fp16 out, over torch fp16", 16.0, seed, _speedup("fp16"))
    yield from _mean("bits out, bireal18", 8.0, large, "bireal18", "bits")


def _layer_bars(large: Sequence[Cell]) -> Iterator[Bar]:
    for size in (3, 1):
        cells = [c for c in large if c["kernel"] == size]
        text = f"fp16 layer, {size}x{size}, least over torch fp16"
        yield from _least(text, 1.0, cells, _speedup("layer"))
    yield from _mean("fp16 layer, bireal18", 2.3, large, "bireal18", "layer")


def _cutlass_bars(cells: Sequence[Cell]) -> Iterator[Bar]:
    for kernel in dict.fromkeys(c["kernel_name"] for c in cells):
        mine = [c for c in cells if c["kernel_name"] == kernel]
        text = f"{kernel}, fp16 out, least over CUTLASS AND"
        yield from _least(text, 1.0, mine, lambda c: float(c["cutlass_and"]["speedup_over"]))


def _other_bars(
    large: Sequence[Cell], packs: Sequence[dict[str, Any]], host: dict[str, float]
) -> Iterator[Bar]:
    least = min(packs, key=lambda pack: float(pack["of_copy"]))
    worst = f"{least['dtype']} {least['layout']}, {least['sizes'][1]} channels"
    yield Bar("pack_bits, least of a copy's TB/s", 0.85, least["of_copy"], "", worst=worst)
    ratios = {c["name"]: c["fp16_nchw"]["us"] / c["fp16"]["us"] for c in large if "fp16_nchw" in c}
    if ratios:
        name = max(ratios, key=lambda name: ratios[name])
        yield Bar("fp16 out, NCHW over NHWC, most", 1.5, ratios[name], "x", True, name)
    yield Bar("binary_conv2d, host time of a call", 15.0, host["us"], " us", at_most=True)


def _speedup(form: str) -> Value:
    return lambda cell: float(cell[form]["speedup"])


def _least(
    text: str, bound: float, cells: Iterable[Cell], value: Value, unit: str = "x"
) -> Iterator[Bar]:
    worst = min(cells, key=value, default=None)
    if worst:
        name = f"{worst['name']}, batch {worst['batch']}"
        yield Bar(text, bound, value(worst), unit, worst=name)


def _mean(text: str, bound: float, cells: Iterable[Cell], group: str, form: str) -> Iterator[Bar]:
    speedups = [c[form]["speedup"] for c in cells if c["group"] == group]
    if speedups:
        yield Bar(f"{text}, mean over torch fp16", bound, geometric_mean(speedups), "x")
