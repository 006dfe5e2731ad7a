"""Time of one call among many back to back, each on another set of buffers."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

LEAST_GRAPH_US = 1000.0
LEAST_LAUNCHES = 8
MOST_TOTAL_US = 500_000.0
SETTLE_US = 100_000.0
MOST_SETS = 512

Call = Callable[[int], object]
"""Runs one of the buffer sets; what it returns is kept until as many other calls were made."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the quartiles around it."""

    us: float
    first_quartile_us: float
    third_quartile_us: float


def buffer_sets(bytes_each: int, device: torch.device) -> int:
    """How many sets of buffers keep a call's data out of the last-level cache.

    Four times the cache, and two at least. Not more than 512, which leaves in the cache what is so
    small (a few hundred KB) that in a network, too, it comes from there.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2, min(MOST_SETS, -(-4 * cache // bytes_each)))


def time_call(call: Call, sets: int, device: torch.device, replays: int) -> Timing:
    """Times call(0), ..., call(sets - 1) in turn: on a GPU as a CUDA graph, else one by one."""
    times = (
        _times_on_gpu(call, sets, replays)
        if device.type == "cuda"
        else _times_on_cpu(call, sets, replays)
    )
    return _timing(times)


def host_us(call: Callable[[], object], device: torch.device, replays: int) -> Timing:
    """The time a call keeps the host busy, without waiting for what it starts."""
    calls = 200
    times = []
    for _ in range(replays + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - start) / calls)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _timing(times[1:])


def _timing(times: Sequence[float]) -> Timing:
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, first, third)


def _run(call: Call, sets: int, launches: int) -> None:
    kept: deque[object] = deque(maxlen=sets)  # So that new outputs get other memory.
    for i in range(launches):
        kept.append(call(i % sets))


def _times_on_cpu(call: Call, sets: int, replays: int) -> list[float]:
    _run(call, sets, sets)
    times = []
    for _ in range(replays):
        start = time.perf_counter()
        _run(call, sets, sets)
        times.append(1e6 * (time.perf_counter() - start) / sets)
    return times


def _times_on_gpu(call: Call, sets: int, replays: int) -> list[float]:
    """Replays run back to back, so the host's time to launch a graph hides behind the GPU's.

    For SETTLE_US they are not measured: the clock follows the power with some delay, and would be
    that of what ran before.
    """
    launches = sets * -(-LEAST_LAUNCHES // sets)
    graph = _captured(call, sets, launches)
    estimate = min(_replay_us(graph, 2))
    if estimate < LEAST_GRAPH_US:
        repeats = -(-int(LEAST_GRAPH_US) // max(1, int(estimate)))
        launches *= repeats
        estimate *= repeats
        graph = _captured(call, sets, launches)
    else:  # Something slow needs no more than three replays.
        replays = max(3, min(replays, int(MOST_TOTAL_US / estimate)))
    for _ in range(int(SETTLE_US / estimate)):
        graph.replay()
    return [us / launches for us in _replay_us(graph, replays)]


def _captured(call: Call, sets: int, launches: int) -> torch.cuda.CUDAGraph:
    """A graph of these launches, on a stream of its own where the calls were warmed up.

    torch.cuda.graph would collect garbage and empty the cache each time, which takes longer than
    most measurements.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _run(call, sets, min(sets, 3))
        torch.cuda.synchronize()
        graph.capture_begin()
        _run(call, sets, launches)
        graph.capture_end()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairwise(events)]
