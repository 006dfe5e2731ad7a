"""A training step of Bi-Real-18: binconv beside plain sign() and F.conv2d, in one run.

    python benchmarks/training_step.py [--output benchmarks/results/NAME]

Batch 128, 224x224, channels_last, bf16 autocast, Adam, on a CUDA GPU; --smoke runs a few tiny steps
on the CPU instead. Both sides train the same network with the same estimators; only the binary
convolutions differ: the plain ones take signs as floats, with an autograd.Function for the sign,
and hand them to F.conv2d. The contenders take turns, so that a change of clock hits all of them;
times are medians of rounds with the quartiles beside them. Memory is the peak of one step beyond
what was allocated before the network was made, and what autograd keeps from forward for backward
beyond the parameters, from saved-tensor hooks. The last table says where the time on the GPU goes.

Eager and compiled steps also depend on how quickly the host launches. "cpp_wrapper" is
torch.compile with that option, where the host runs C++ instead of Python; two modes leave the host
out: "captured" is the eager step in one CUDA graph, "graphs" is torch.compile with reduce-overhead.

    torchrun --nproc-per-node 2 benchmarks/training_step.py

measures the same under DistributedDataParallel, each process with a batch of its own on its own
GPU: with perfect scaling, a step takes as long as with one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import binconv
from binconv.torch import BinaryConv2d, Estimator
from binconv.torch.estimators import estimator
from binconv.torch.models import bireal18

HERE = Path(__file__).parent
MODES = ["eager", "captured", "compiled", "cpp_wrapper", "graphs"]
REPLAYED = ("captured", "graphs")  # From CUDA graphs, which hide operators and own their memory.


class Sign(torch.autograd.Function):
    """The sign of x as floats; the estimator's derivative in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ste: Estimator) -> Tensor:
        """+1 for x >= 0, else -1."""
        ctx.save_for_backward(x)
        ctx.ste = ste
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """grad times the derivative."""  # noqa: D403
        (x,) = ctx.saved_tensors
        return grad * ctx.ste.derivative(x), None


class PlainBinaryConv2d(nn.Conv2d):
    """What one writes without binconv."""

    def __init__(self, *arguments: Any, ste: Estimator, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ste, self.weight_ste = ste, estimator("clip")

    def forward(self, x: Tensor) -> Tensor:
        """conv2d(sign(x), sign(weight) * mean(|weight|))."""
        scale = self.weight.detach().abs().mean((1, 2, 3), keepdim=True)
        weight = Sign.apply(self.weight, self.weight_ste) * scale
        return F.conv2d(Sign.apply(x, self.ste), weight, None, self.stride, self.padding)


class Contender:
    """A network, its optimizer and its batch."""

    def __init__(self, layer: Callable[..., nn.Module], mode: str, settings: argparse.Namespace):
        torch.manual_seed(0)
        self.settings = settings
        device, size = settings.device, settings.size
        model = bireal18(settings.classes, layer).to(device, memory_format=torch.channels_last)
        self.parameters = list(model.parameters())
        compile_modes: dict[str, dict[str, Any]] = {
            "eager": {},
            "captured": {},
            "compiled": {"backend": settings.backend},
            "cpp_wrapper": {"options": {"cpp_wrapper": True}},
            "graphs": {"mode": "reduce-overhead"},
        }
        if settings.processes > 1:
            model = DistributedDataParallel(model, device_ids=[torch.cuda.current_device()])
        options = compile_modes[mode]
        fullgraph = settings.processes == 1  # DistributedDataParallel splits the graph.
        self.model = torch.compile(model, fullgraph=fullgraph, **options) if options else model
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4, capturable=mode == "captured")
        self.graph: torch.cuda.CUDAGraph | None = None
        images = torch.randn(settings.batch, 3, size, size, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(settings.classes, (settings.batch,), device=device)

    def loss(self) -> Tensor:
        """Forward, under autocast."""
        # Not on a CPU, where bfloat16 may be very slow.
        enabled = self.settings.device == "cuda"
        with torch.autocast(self.settings.device, dtype=torch.bfloat16, enabled=enabled):
            logits = self.model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def capture(self) -> None:
        """From here on, step replays one CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.captured_loss = self.step()
        self.graph = graph

    def step(self) -> Tensor:
        """One training step."""
        if self.graph is not None:
            self.graph.replay()
            return self.captured_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss

    def bytes_kept(self) -> int:
        """Bytes of the distinct memory kept for backward, without the parameters'."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        for tensor in (*self.parameters, self.images, self.labels):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        del loss
        return sum(kept.values())


def synchronize(settings: argparse.Namespace) -> None:
    """Waits for the GPU, if there is one."""
    if settings.device == "cuda":
        torch.cuda.synchronize()


def prepare(name: str, mode: str, settings: argparse.Namespace) -> tuple[Contender, dict[str, Any]]:
    """A warm contender, and its memory."""
    layers: dict[str, Callable[..., nn.Module]] = {
        "binconv": partial(BinaryConv2d, ste=settings.ste),
        "plain": partial(PlainBinaryConv2d, ste=estimator(settings.ste)),
    }
    cuda = settings.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    contender = Contender(layers[name], mode, settings)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if mode == "captured":  # It asks for a stream of its own.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        # The option alone does not reach backward in PyTorch 2.11.
        stack.enter_context(inductor_config.patch(cpp_wrapper=mode == "cpp_wrapper"))
        for _ in range(settings.warmup):
            loss = contender.step()
    synchronize(settings)
    if mode == "captured":
        contender.capture()
    memory: dict[str, Any] = {"warmup_s": time.perf_counter() - start, "loss": loss.item()}
    if cuda and mode not in REPLAYED:
        torch.cuda.reset_peak_memory_stats()
        contender.step()
        synchronize(settings)
        memory["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if mode == "eager":
        memory["kept_mib"] = contender.bytes_kept() / 2**20
    return contender, memory


def seconds_a_step(contender: Contender, settings: argparse.Namespace) -> float:
    """The mean of a few steps."""
    synchronize(settings)
    start = time.perf_counter()
    for _ in range(settings.steps):
        contender.step()
    synchronize(settings)
    return (time.perf_counter() - start) / settings.steps


def device_times(contender: Contender) -> dict[str, float]:
    """Milliseconds of one step on the GPU, by operator; kernels of compiled code by their names."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            contender.step()
        torch.cuda.synchronize()
    times = {
        event.key: event.self_device_time_total / 3e3
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU
    }
    whole = sum(times.values())
    chosen = sorted(times, key=lambda key: -times[key])[:12]
    return {"all": whole} | {key: times[key] for key in chosen if times[key] > 0}


def measure(settings: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """One result for each contender, and the tracebacks of those that failed."""
    results, failures, contenders = [], [], {}
    for mode in settings.modes:
        for name in ("plain", "binconv"):
            print(f"{name}, {mode} ...", flush=True)
            try:
                contender, memory = prepare(name, mode, settings)
            except Exception:
                failures.append(f"{name}, {mode}:\n{traceback.format_exc()}")
                print(failures[-1], flush=True)
                continue
            contenders[name, mode] = contender
            results.append({"layer": name, "mode": mode} | memory)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for _ in range(settings.rounds):
        for key, contender in contenders.items():
            times[key].append(seconds_a_step(contender, settings))
    for result in results:
        key = result["layer"], result["mode"]
        low, middle, high = statistics.quantiles(times[key], n=4)
        result |= {"ms": middle * 1e3, "ms_quartiles": [low * 1e3, high * 1e3]}
        if settings.device == "cuda" and result["mode"] not in REPLAYED:
            result["device_ms"] = device_times(contenders[key])
    return results, failures


def machine(settings: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = os.environ.get("COMMIT")  # For a copy of the tree without its history.
    if not commit:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    cuda = settings.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "binconv": binconv.version(),
        "commit": commit,
        "processes": settings.processes,
        "batch": settings.batch,
        "size": settings.size,
        "ste": settings.ste,
        "rounds": f"{settings.rounds} of {settings.steps} steps",
    }


def table(results: list[dict[str, Any]], failures: list[str], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Training step of Bi-Real-18: bf16 autocast, channels_last, Adam",
        "",
        "`python benchmarks/training_step.py`: " + ", ".join(f"{k} {v}" for k, v in about.items()),
        "",
        "| binary layers | mode | ms a step | quartiles | peak MiB | kept MiB | against plain |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {r["mode"]: r["ms"] for r in results if r["layer"] == "plain"}
    for r in results:
        peak, kept = (f"{r[k]:.0f}" if k in r else "" for k in ("peak_mib", "kept_mib"))
        ratio = f"{plain[r['mode']] / r['ms']:.2f}x" if r["mode"] in plain else ""
        low, high = r["ms_quartiles"]
        lines.append(
            f"| {r['layer']} | {r['mode']} | {r['ms']:.2f} | {low:.2f} to {high:.2f} | {peak} | "
            f"{kept} | {ratio} |"
        )
    for r in results:
        if "device_ms" in r:
            lines += ["", f"{r['layer']}, {r['mode']}: milliseconds on the GPU by operator", ""]
            lines += ["| operator | ms |", "|---|---|"]
            lines += [f"| `{key[:90]}` | {ms:.3f} |" for key, ms in r["device_ms"].items()]
    for failure in failures:
        lines += ["", "Failed: " + failure.replace("\n", "\n    ")]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--ste", default="clip", help="the estimator for activations")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps on the CPU")
    parser.add_argument("--output", type=Path, help="writes NAME.md and NAME.json")
    settings = parser.parse_args()
    settings.device, settings.classes, settings.backend = "cuda", 1000, "inductor"
    if settings.smoke:
        settings.device, settings.classes, settings.backend = "cpu", 10, "aot_eager"
        settings.batch, settings.size, settings.rounds = 2, 32, 2
        settings.steps, settings.warmup = 1, 1
        settings.modes = settings.modes or ["eager", "compiled"]
    settings.processes = int(os.environ.get("WORLD_SIZE", "1"))  # As torchrun says.
    # Graphs of an exchange between processes would need preparations of their own.
    own = MODES if settings.processes == 1 else [mode for mode in MODES if mode not in REPLAYED]
    settings.modes = settings.modes or own
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU; --smoke runs on the CPU")
    return settings


def main() -> int:
    """Measures, prints, and with --output keeps NAME.md and NAME.json; 1 if a contender failed."""
    settings = parse()
    torch.backends.cudnn.benchmark = True
    if settings.processes == 1:
        return report(settings)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    quiet = io.StringIO() if torch.distributed.get_rank() else sys.stdout
    if quiet is not sys.stdout:
        settings.output = None
    with contextlib.redirect_stdout(quiet):
        status = report(settings)
    torch.distributed.destroy_process_group()
    return status


def report(settings: argparse.Namespace) -> int:
    """Measures and prints; 1 if a contender failed."""
    results, failures = measure(settings)
    about = machine(settings)
    text = table(results, failures, about)
    print(text)
    if settings.output:
        settings.output.with_suffix(".md").write_text(text)
        content = {"machine": about, "results": results, "failures": failures}
        settings.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
