"""The operators torch.ops.binconv, on the current CUDA stream or torch's CPU threads.

Their kernels are those of the extension module, which PyTorch calls without Python; here are their
schemas, what they make of shapes alone, and gradients. Sizes are lists of ints in the order of the
C++ library: stride and dilation (height, width), padding (top, left, bottom, right); operators take
them in one list, `geometry` (flat_geometry), behind a weight's shape where none is given
(packed_geometry). Those of a training step take its numbers one by one, at their end: Inductor's
C++ wrapper calls an operator with a list by way of Python in PyTorch 2.11. An `out_dtype` of None
stands for packed bits.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import register_flop_formula

import binconv
from binconv._binconv import register_operators

T = TypeVar("T")

_library = torch.library.Library("binconv", "DEF")


def memoized(function: Callable[..., T]) -> Callable[..., T]:
    """Remembers what a function gave, unless its sizes are symbolic as they are in a trace."""
    kept = functools.lru_cache(maxsize=1024, typed=True)(function)

    @functools.wraps(function)
    def recall(*arguments: Any) -> T:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            return kept(*arguments)
        except TypeError:  # Something has no hash.
            return function(*arguments)

    return recall


def is_plain_call(arguments: Sequence[Any]) -> bool:
    """Whether the dispatcher would hand these to autograd and a kernel, and do nothing else.

    Not so where a mode, a transform or a tracer is on, or a tensor is more than an array on the CPU
    or a GPU: a subclass, a lazy negative and so on.
    """
    # Torch functions are also those of a mode that is on.
    if not _is_plain_state() or torch.overrides.has_torch_function(arguments):
        return False
    for x in arguments:
        if isinstance(x, Tensor) and torch._C._dispatch_keys(x).raw_repr() not in _PLAIN_TENSORS:
            return False
    return True


def is_traced(x: Tensor) -> bool:
    """Whether x stands for a tensor in a graph that is being made, and has no values."""
    return torch.compiler.is_compiling() or isinstance(x, (FakeTensor, FunctionalTensor))


def _is_plain_state() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._dispatch_tls_local_include_set().raw_repr() in _PLAIN_STATES


def _key_set(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, keys).raw_repr()


# The dispatch keys outside and inside of torch.inference_mode.
_PLAIN_STATES = {_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")}
_PLAIN_TENSORS = {
    _key_set(device, f"Autocast{device}", *autograd)
    for device in ("CPU", "CUDA")
    for autograd in ((f"Autograd{device}", "ADInplaceOrView"), ())
}


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies in memory as NHWC and not also as NCHW."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    """Of what shall lie in memory as x does."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _new_packed(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(_packed_sizes(shape), dtype=torch.uint8, device=like.device)


def _packed_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    batch, channels, height, width = shape
    return batch, height, width, packed_bytes(channels)


def packed_bytes(channels: int) -> int:
    """binconv.packed_bytes, also of a symbolic size."""
    return 16 * ((channels + 127) // 128)


def _fake_pack_bits(x: Tensor, threshold: float, channel_threshold: Tensor | None) -> Tensor:
    return _new_packed(x.shape, x)


def _fake_unpack_bits(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((*packed.shape[:3], channels), dtype=dtype, device=packed.device)
    return out.permute(0, 3, 1, 2)


def _fake_abs_mean(x: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.float32, device=x.device)


def _weight_shape(shape: Sequence[int], groups: int) -> binconv.WeightShape:
    """shape: (out_channels, in_channels / groups, kernel_height, kernel_width)."""
    out_channels, in_channels, kernel_height, kernel_width = shape
    return binconv.WeightShape(
        out_channels, in_channels * groups, kernel_height, kernel_width, groups
    )


def new_prepared(shape: Sequence[int], groups: int, like: Tensor) -> Tensor:
    """Memory for the prepared form of a weight of this shape, on the device of `like`."""
    ordinal = like.device.index if like.is_cuda else None
    size = _prepared_bytes(shape, groups, ordinal)
    return torch.empty(size, dtype=torch.uint8, device=like.device)


@memoized
def _prepared_bytes(shape: Sequence[int], groups: int, device: int | None) -> int:
    return binconv.prepared_weight_bytes(_weight_shape(shape, groups), device=device)


def _fake_prepare_weight(packed: Tensor, in_channels: int, groups: int) -> Tensor:
    out_channels, kernel_height, kernel_width, _ = packed.shape
    return new_prepared((out_channels, in_channels, kernel_height, kernel_width), groups, packed)


def _refresh_weight(
    weight: Tensor, groups: int, per_channel: bool, prepared: Tensor, scale: Tensor, stamp: Tensor
) -> None:
    """Rewrites prepared (and scale, unless it is empty) if they are not made from this weight.

    The stamp, an empty tensor on the CPU, remembers what they are made from. In a CUDA graph they
    are rewritten at each replay.
    """
    with _refreshing:  # Else one thread could rewrite what another one already uses.
        captured = is_captured(weight)
        if not captured and _serves(stamp, weight):
            return
        prepared.copy_(prepare_weight(pack_bits(weight, 0.0, None), weight.shape[1], groups))
        if scale.numel():
            scale.copy_(abs_mean(weight, scale.numel() if per_channel else 1))
        keeps = not (captured or weight.is_inference())  # Inference keeps no version.
        stamp._binconv_source = Source(weight) if keeps else None  # type: ignore[attr-defined]


_refreshing = threading.Lock()


def is_fresh(stamp: Tensor, weight: Tensor) -> bool:
    """Whether refresh_weight would do nothing; in a trace, which must hold it, it always may."""
    return _is_plain_state() and _serves(stamp, weight)


def _serves(stamp: Tensor, weight: Tensor) -> bool:
    source: Source | None = getattr(stamp, "_binconv_source", None)
    return source is not None and source.serves(weight)


def is_captured(x: Tensor) -> bool:
    """Whether what is computed from x now goes into a CUDA graph and runs later."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Identity:
    """A mark on a tensor that no other tensor has: copying or pickling one makes a new mark."""

    def __reduce__(self) -> tuple[type[_Identity], tuple[()]]:
        return _Identity, ()


class Source:
    """What a weight was at one time: which tensor, in which memory, at which version.

    It is made behind what is computed from the weight, on the stream that computes it.
    """

    def __init__(self, weight: Tensor) -> None:
        _watch_fused_optimizers()
        if not hasattr(weight, "_binconv_identity"):
            weight._binconv_identity = _Identity()  # type: ignore[attr-defined]
        self.identity = weight._binconv_identity  # type: ignore[attr-defined]
        self.version = weight._version
        self.memory = weight.detach()  # Kept, so that nothing else can lie at its address.
        self.address = weight.data_ptr()
        self.event: torch.cuda.Event | None = None
        if weight.is_cuda:
            self.stream = _raw_stream(weight.device)
            self.event = torch.cuda.current_stream(weight.device).record_event()

    def serves(self, weight: Tensor) -> bool:
        """Whether it is this weight now, which was not made in inference mode.

        If so, the current stream goes on when what was computed from it is there.
        """
        if not (
            getattr(weight, "_binconv_identity", None) is self.identity
            and weight._version == self.version
            and weight.data_ptr() == self.address
        ):
            return False
        # A capture cannot wait for what lies before it, but starts when the GPU has done that.
        if (
            self.event is not None
            and self.stream != _raw_stream(weight.device)
            and not is_captured(weight)
        ):
            torch.cuda.current_stream(weight.device).wait_event(self.event)
        return True


@functools.cache
def _watch_fused_optimizers() -> None:
    """Gives what they step a new version, which PyTorch 2.10 to 2.13 forget."""
    register_optimizer_step_post_hook(_count_fused_steps)


def _count_fused_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            kept = [p for p in group["params"] if hasattr(p, "_binconv_identity")]
            torch.autograd.graph.increment_version(kept)


def _raw_stream(device: torch.device) -> int:
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


def packed_geometry(weight_shape: Sequence[int], *geometry: Any) -> tuple[int, ...]:
    """The argument `geometry` of the operators on packed bits; weight_shape as in PyTorch."""
    return *weight_shape, *flat_geometry(*geometry)


def flat_geometry(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int,
) -> tuple[int, ...]:
    """The argument `geometry` of an operator that knows its weight's shape."""
    return *stride, *padding, *dilation, groups, pad_value


def geometry_parts(geometry: Sequence[int]) -> tuple[Any, Any, Any, int, int]:
    """What flat_geometry made it of."""
    if len(geometry) != 10:
        raise ValueError(f"geometry: got {len(geometry)} numbers behind a weight's, expected 10")
    return geometry[:2], geometry[2:6], geometry[6:8], geometry[8], geometry[9]


def _new_output(
    sizes: Sequence[int], like: Tensor, out_dtype: torch.dtype | None, channels_last: bool
) -> Tensor:
    if out_dtype is None:
        return _new_packed(sizes, like)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=out_dtype, device=like.device, memory_format=memory_format)


def out_sizes(
    batch: int,
    in_sizes: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """(N, O, OH, OW); in Python, as the sizes can be symbolic."""
    extents = []
    for i, name in enumerate(("height", "width")):
        room = in_sizes[i] + padding[i] + padding[i + 2]
        reach = dilation[i] * (weight_shape[i + 2] - 1) + 1
        if reach > room:
            raise ValueError(
                f"weight: got a kernel that reaches over {reach} pixels of {name}, expected at "
                f"most the {room} of the padded image"
            )
        extents.append((room - reach) // stride[i] + 1)
    return batch, weight_shape[0], extents[0], extents[1]


def _out_sizes_of_bits(packed: Tensor, geometry: Sequence[int]) -> tuple[int, int, int, int]:
    batch, *in_sizes, _ = packed.shape
    return out_sizes(batch, in_sizes, geometry[:4], *geometry_parts(geometry[4:])[:3])


def _fake_packed_conv2d(
    packed: Tensor,
    prepared: Tensor,
    geometry: Sequence[int],
    out_dtype: torch.dtype | None,
    channels_last: bool,
    *epilogue: Any,
) -> Tensor:
    sizes = _out_sizes_of_bits(packed, geometry)
    return _new_output(sizes, packed, out_dtype, channels_last)


def _fake_values_conv2d(
    x: Tensor,
    input_threshold: Tensor | None,
    prepared: Tensor,
    geometry: Sequence[int],
    out_dtype: torch.dtype | None,
    channels_last: bool,
    *epilogue: Any,
) -> Tensor:
    parts = geometry_parts(geometry[4:])[:3]
    sizes = out_sizes(x.shape[0], x.shape[2:], geometry[:4], *parts)
    return _new_output(sizes, x, out_dtype, channels_last)


def _fake_packed_conv2d_with_bits(packed: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out = _fake_packed_conv2d(packed, *others)
    return out, _new_packed(out.shape, packed)


def _fake_sign_conv2d_no_grad(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    out_dtype: torch.dtype,
    mean_scale: bool,
    clip: float | None,
    *geometry: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; bits (1 or 2, N, H, W, bytes), of x >= threshold and |x - threshold| <= clip."""
    batch, _, *in_sizes = x.shape
    sizes = out_sizes(batch, in_sizes, weight.shape, *geometry_parts(geometry)[:3])
    out = _new_output(sizes, x, out_dtype, is_channels_last(x))
    bits = x.new_empty((1 if clip is None else 2, *_packed_sizes(x.shape)), dtype=torch.uint8)
    return out, bits, x.new_empty(weight.shape[0] if mean_scale else 0, dtype=torch.float32)


def _fake_sign_conv2d_backward(
    grad: Tensor,
    bits: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    masks: bool,
    limit: float | None,
    dtype: torch.dtype,
    *geometry: int,
) -> tuple[Tensor, Tensor]:
    """convT(grad, scale * sign(weight)) in channels_last and corr(grad, sign(x)) in that of weight.

    Bits as from sign_conv2d_no_grad, of each pixel at least those of the channels. masks: makes the
    first 0 where the bits of the clip are 0. limit: multiplies the second by scale, and makes it 0
    unless |weight| <= limit or that is infinite. What is not needed is (0,).
    """
    channels = weight.shape[1] * geometry_parts(geometry)[3]
    return (
        _fake_unpack_bits(bits[0], channels, grad.dtype) if needs_x else grad.new_empty(0),
        _new_as(weight, grad.dtype if limit is None else dtype)
        if needs_weight
        else grad.new_empty(0),
    )


def _flops_of_backward(
    grad: Sequence[int],
    bits: Sequence[int],
    weight: Sequence[int],
    scale: Any,
    needs_x: bool,
    needs_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Of the two convolutions of floats, from shapes."""
    return 2 * (needs_x + needs_weight) * math.prod(grad) * math.prod(weight[1:])


def _new_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for what has x's sizes and lies as x does."""
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


def _fake_weight_gradient(
    gradient: Tensor, weight: Tensor, scale: Tensor | None, limit: float, dtype: torch.dtype
) -> Tensor:
    return _new_as(weight, dtype)


def _epilogue_gradients(
    grad: Tensor, acc: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of scale, if its factor acc is given, bias and residual."""
    return (
        None if acc is None else (grad.float() * acc).sum((0, 2, 3)),
        None if bias is None else grad.sum((0, 2, 3), dtype=bias.dtype),
        None if residual is None else grad.to(residual.dtype),
    )


def _save_for_packed_conv2d_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    packed, prepared, geometry, _, channels_last, _, bias, residual, clamp, activation = inputs[:10]
    ctx.save_for_backward(packed, prepared, bias, residual)
    ctx.geometry = geometry
    ctx.channels_last = channels_last
    ctx.is_linear = not (clamp or activation)


def _packed_conv2d_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.is_linear:
        raise NotImplementedError(
            "clamp, activation: got a gradient, expected none through the fused operator; "
            "binconv.torch.binary_conv2d computes these steps where it can pass"
        )
    packed, prepared, bias, residual = ctx.saved_tensors
    # Without the trailing arguments that have their default, None.
    needs_scale, needs_bias = (*ctx.needs_input_grad, False, False)[5:7]
    acc = None
    if needs_scale:
        acc = packed_conv2d_no_grad(
            packed, prepared, ctx.geometry, torch.float32, ctx.channels_last
        )
    gradients = _epilogue_gradients(grad, acc, bias if needs_bias else None, residual)
    return *[None] * 5, *gradients, *[None] * 8


def _check_meta(name: str, arguments: Sequence[Any]) -> None:
    """That none is a tensor on meta where another one is not: PyTorch takes all for meta then."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if len({x.is_meta for x in tensors}) > 1:
        other = next(x.device for x in tensors if not x.is_meta)
        raise ValueError(f"{name}: got a tensor on meta, expected one on {other} as the others")


def define(
    schema: str,
    fake: Callable[..., Any],
    *,
    kernel: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = torch.library.fallthrough_kernel,
) -> Any:
    """The operator of this schema.

    fake: makes its results from shapes alone.
    kernel: where it is in Python.
    autograd: its kernel for autograd, which passes it by unless given. None is PyTorch's own, which
        tells when a gradient gets lost.
    """
    name = schema.partition("(")[0]
    _library.define(schema)

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        _check_meta(name, arguments)
        return fake(*arguments)

    torch.library.register_fake(f"binconv::{name}", checked, lib=_library)
    for key, function in (("CPU", kernel), ("CUDA", kernel), ("Autograd", autograd)):
        if function is not None:
            _library.impl(name, function, key)
    return getattr(torch.ops.binconv, name).default


_CONV2D = (
    "Tensor prepared, int[14] geometry, ScalarType? out_dtype, bool channels_last, "
    "Tensor? scale=None, Tensor? bias=None, Tensor? residual=None, "
    "bool clamp=False, bool activation=False, "
    "Tensor? in_shift=None, Tensor? slope=None, Tensor? out_shift=None, "
    "float threshold=0.0, Tensor? channel_threshold=None, Tensor? threshold_below=None"
)
_GEOMETRY = (
    "int stride_height, int stride_width, int pad_top, int pad_left, int pad_bottom, "
    "int pad_right, int dilation_height, int dilation_width, int groups, int pad_value"
)

register_operators()
pack_bits = define(
    "pack_bits(Tensor x, float threshold, Tensor? channel_threshold) -> Tensor", _fake_pack_bits
)
unpack_bits = define(
    "unpack_bits(Tensor packed, int channels, ScalarType dtype) -> Tensor", _fake_unpack_bits
)
abs_mean = define("abs_mean(Tensor x, int rows) -> Tensor", _fake_abs_mean, autograd=None)
prepare_weight = define(
    "prepare_weight(Tensor packed, int in_channels, int groups) -> Tensor", _fake_prepare_weight
)
refresh_weight = define(
    "refresh_weight(Tensor weight, int groups, bool per_channel, Tensor(a!) prepared, "
    "Tensor(b!) scale, Tensor stamp) -> ()",
    lambda *_: None,
    kernel=_refresh_weight,
    autograd=None,
)
packed_conv2d = define(
    f"packed_conv2d(Tensor packed, {_CONV2D}) -> Tensor", _fake_packed_conv2d, autograd=None
)
packed_conv2d_no_grad = define(
    f"packed_conv2d_no_grad(Tensor packed, {_CONV2D}) -> Tensor", _fake_packed_conv2d
)
packed_conv2d_with_bits = define(
    f"packed_conv2d_with_bits(Tensor packed, {_CONV2D}) -> (Tensor, Tensor)",
    _fake_packed_conv2d_with_bits,
)
values_conv2d = define(
    f"values_conv2d(Tensor x, Tensor? input_threshold, {_CONV2D}) -> Tensor", _fake_values_conv2d
)
sign_conv2d_no_grad = define(
    "sign_conv2d_no_grad(Tensor x, Tensor weight, Tensor? threshold, Tensor? scale, Tensor? bias, "
    "Tensor? residual, Tensor? prepared, ScalarType out_dtype, bool mean_scale, float? clip, "
    f"{_GEOMETRY}) -> (Tensor, Tensor, Tensor)",
    _fake_sign_conv2d_no_grad,
)
sign_conv2d_backward = define(
    "sign_conv2d_backward(Tensor grad, Tensor bits, Tensor weight, Tensor? scale, bool needs_x, "
    f"bool needs_weight, bool masks, float? limit, ScalarType dtype, {_GEOMETRY}) "
    "-> (Tensor, Tensor)",
    _fake_sign_conv2d_backward,
)
register_flop_formula(torch.ops.binconv.sign_conv2d_backward)(_flops_of_backward)
weight_gradient = define(
    "weight_gradient(Tensor gradient, Tensor weight, Tensor? scale, float limit, "
    "ScalarType dtype) -> Tensor",
    _fake_weight_gradient,
)
torch.library.register_autograd(
    "binconv::packed_conv2d",
    _packed_conv2d_backward,
    setup_context=_save_for_packed_conv2d_backward,
    lib=_library,
)
