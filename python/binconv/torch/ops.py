"""The operators torch.ops.binconv, on the current CUDA stream or torch's CPU threads.

Registered with `torch.library.Library` rather than `custom_op`, which costs three times as much a
call. Sizes are lists of ints in the order of the C++ library: stride and dilation (height, width),
padding (top, left, bottom, right); operators on packed bits take them in one list, which is quicker
(`packed_geometry`). An `out_dtype` of None stands for packed bits.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

import binconv

T = TypeVar("T")

_library = torch.library.Library("binconv", "DEF")

_GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation, int groups, int pad_value"
_EPILOGUE = "Tensor? scale, Tensor? bias, Tensor? residual"
_CONV2D = (
    "Tensor prepared, int[14] geometry, ScalarType? out_dtype, bool channels_last, "
    "Tensor? scale=None, Tensor? bias=None, Tensor? residual=None, "
    "bool clamp=False, bool activation=False, "
    "Tensor? in_shift=None, Tensor? slope=None, Tensor? out_shift=None, "
    "float threshold=0.0, Tensor? channel_threshold=None, Tensor? threshold_below=None"
)

_library.define("pack_bits(Tensor x, float threshold, Tensor? channel_threshold) -> Tensor")
_library.define("unpack_bits(Tensor packed, int channels, ScalarType dtype) -> Tensor")
_library.define("abs_mean(Tensor x, int rows) -> Tensor")
_library.define("prepare_weight(Tensor packed, int in_channels, int groups) -> Tensor")
_library.define(
    "refresh_weight(Tensor weight, int groups, bool per_channel, Tensor(a!) prepared, "
    "Tensor(b!) scale, Tensor stamp) -> ()"
)
_library.define(f"packed_conv2d(Tensor packed, {_CONV2D}) -> Tensor")
_library.define(f"packed_conv2d_no_grad(Tensor packed, {_CONV2D}) -> Tensor")
_library.define(f"packed_conv2d_with_bits(Tensor packed, {_CONV2D}) -> (Tensor, Tensor)")
_library.define(f"values_conv2d(Tensor x, Tensor? input_threshold, {_CONV2D}) -> Tensor")
_library.define(
    f"conv2d(Tensor x, Tensor weight, Tensor? prepared, {_GEOMETRY}, {_EPILOGUE}, "
    "ScalarType out_dtype) -> Tensor"
)
_library.define(
    "sign_conv2d_operands(Tensor bits, Tensor weight, Tensor? scale, int channels, "
    "ScalarType dtype) -> (Tensor, Tensor)"
)
_library.define("mask_values(Tensor(a!) x, Tensor bits) -> ()")
_library.define(
    "weight_gradient(Tensor gradient, Tensor weight, Tensor? scale, float limit, "
    "ScalarType dtype) -> Tensor"
)


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


def call(name: str, *arguments: Any) -> Any:
    """The operator of that name, or its kernel where the dispatcher would do no more than call it.

    The dispatcher alone takes the host as long as all the rest of a convolution's call.
    """
    return caller(*arguments)(name, *arguments)


def caller(*arguments: Any) -> Callable[..., Any]:
    """The same as a function of a name and arguments, for several calls on such arguments."""
    return _call_kernel if reaches_kernel(arguments) else _dispatch


def _call_kernel(name: str, *arguments: Any) -> Any:
    return kernels[name](*arguments)


def _dispatch(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.binconv, name).default(*arguments)


def reaches_kernel(arguments: Sequence[Any]) -> bool:
    """Whether the dispatcher would hand these to an operator's kernel and do nothing else.

    Not so where a mode, a transform or a tracer is on, a profiler wants the operator's name, or a
    tensor is more than an array on the CPU or a GPU: a subclass, a lazy negative and so on.
    Autograd, which does nothing unless a gradient is wanted, is left to the caller.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_STATES:
        return False
    if torch._C._autograd._profiler_enabled():
        return False
    for x in arguments:  # noqa: SIM110, as all() is slower
        if isinstance(x, Tensor) and not _is_plain(x):
            return False
    return True


def is_traced(x: Tensor) -> bool:
    """Whether x stands for a tensor in a graph that is being made, and has no values."""
    return torch.compiler.is_compiling() or isinstance(x, (FakeTensor, FunctionalTensor))


def _is_plain(x: Tensor) -> bool:
    if torch.overrides.has_torch_function_unary(x):  # Also where a function mode is on.
        return False
    return torch._C._dispatch_keys(x).raw_repr() in _PLAIN_TENSORS


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


def _queue(x: Tensor) -> dict[str, Any]:
    """Where to run: the keyword arguments of the neutral functions for a tensor's device."""
    if x.is_cuda:
        return {"stream": torch._C._cuda_getCurrentRawStream(x.get_device()), "threads": None}
    return {"stream": None, "threads": torch.get_num_threads()}


def _ordinal(x: Tensor) -> int | None:
    """The argument `device` of the neutral functions for a tensor's device."""
    return x.device.index if x.is_cuda else None


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies in memory as NHWC and not also as NCHW."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    """Of what shall lie in memory as x does."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _bits(x: Tensor) -> Tensor:
    """Packed or prepared bits as the kernels read them: contiguous and aligned to 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _dense(x: Tensor) -> tuple[Tensor, Literal["nchw", "nhwc"]]:
    """The array behind a tensor, as its memory lies, and the layout that this makes it."""
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1), "nhwc"
    return x.contiguous(), "nchw"


def _array(x: Tensor | None) -> Any:
    """A tensor for the neutral functions, which take a capsule in a fifth of a tensor's time."""
    return None if x is None else to_dlpack(x)


def _pack_bits(x: Tensor, threshold: float, channel_threshold: Tensor | None) -> Tensor:
    array, layout = _dense(x)
    packed = _new_packed(x.shape, x)
    limit = _limit(threshold, channel_threshold)
    binconv.pack_bits(_array(array), _array(packed), layout=layout, threshold=limit, **_queue(x))
    return packed


def _limit(threshold: float, channel_threshold: Tensor | None) -> Any:
    return threshold if channel_threshold is None else _array(channel_threshold)


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


def _unpack_bits(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    out = _fake_unpack_bits(packed, channels, dtype)
    array = _array(out.permute(0, 2, 3, 1))
    binconv.unpack_bits(_array(_bits(packed)), array, layout="nhwc", **_queue(packed))
    return out


def _fake_unpack_bits(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((*packed.shape[:3], channels), dtype=dtype, device=packed.device)
    return out.permute(0, 3, 1, 2)


def _abs_mean(x: Tensor, rows: int) -> Tensor:
    out = _fake_abs_mean(x, rows)
    binconv.abs_mean(_array(x.contiguous()), _array(out), **_queue(x))
    return out


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
    size = _prepared_bytes(shape, groups, _ordinal(like))
    return torch.empty(size, dtype=torch.uint8, device=like.device)


@memoized
def _prepared_bytes(shape: Sequence[int], groups: int, device: int | None) -> int:
    return binconv.prepared_weight_bytes(_weight_shape(shape, groups), device=device)


def _prepare_weight(packed: Tensor, in_channels: int, groups: int) -> Tensor:
    out_channels, kernel_height, kernel_width, _ = packed.shape
    shape = (out_channels, in_channels, kernel_height, kernel_width)
    prepared = new_prepared(shape, groups, packed)
    arrays = _array(_bits(packed)), _array(prepared)
    binconv.prepare_weight(_weight_shape(shape, groups), *arrays, **_queue(packed))
    return prepared


def _fake_prepare_weight(packed: Tensor, in_channels: int, groups: int) -> Tensor:
    out_channels, kernel_height, kernel_width, _ = packed.shape
    return new_prepared((out_channels, in_channels, kernel_height, kernel_width), groups, packed)


def _refresh_weight(
    weight: Tensor, groups: int, per_channel: bool, prepared: Tensor, scale: Tensor, stamp: Tensor
) -> None:
    """Rewrites prepared (and scale, unless it is empty) if they are not made from this weight.

    The stamp, an empty tensor on the CPU, remembers what they are made from.
    """
    source = None if weight.is_inference() else _Source(weight)  # Inference keeps no version.
    with _refreshing:  # Else one thread could rewrite what another one already uses.
        if source is not None and source.is_same(getattr(stamp, "_binconv_source", None)):
            return
        packed = _pack_bits(weight, 0.0, None)
        shape = _weight_shape(weight.shape, groups)
        binconv.prepare_weight(shape, _array(packed), _array(prepared), **_queue(weight))
        if scale.numel():
            scale.copy_(_abs_mean(weight, scale.numel() if per_channel else 1))
        stamp._binconv_source = source  # type: ignore[attr-defined]


_refreshing = threading.Lock()


class _Identity:
    """A mark on a tensor that no other tensor has: copying or pickling one makes a new mark."""

    def __reduce__(self) -> tuple[type[_Identity], tuple[()]]:
        return _Identity, ()


class _Source:
    """What a weight was at one time: which tensor, in which memory, at which version."""

    def __init__(self, weight: Tensor) -> None:
        if not hasattr(weight, "_binconv_identity"):
            weight._binconv_identity = _Identity()  # type: ignore[attr-defined]
        self.identity = weight._binconv_identity  # type: ignore[attr-defined]
        self.version = weight._version
        self.memory = weight.detach()  # Kept, so that nothing else can lie at its address.

    def is_same(self, other: _Source | None) -> bool:
        return (
            other is not None
            and self.identity is other.identity
            and self.version == other.version
            and self.memory.data_ptr() == other.memory.data_ptr()
        )


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


def _shape(
    batch: int, in_sizes: Sequence[int], geometry: Sequence[int]
) -> tuple[binconv.Conv2dShape, tuple[int, int, int, int]]:
    """All sizes of a convolution, and those of its result; geometry with a weight's shape."""
    stride, padding, dilation, groups, pad_value = geometry_parts(geometry[4:])
    height, width = in_sizes
    shape = binconv.Conv2dShape(
        batch,
        height,
        width,
        _weight_shape(geometry[:4], groups),
        stride=stride,
        padding=padding,
        dilation=dilation,
        pad_value=pad_value,
    )
    return shape, (batch, geometry[0], shape.out_height, shape.out_width)


_Plan = tuple[binconv.Conv2dShape, tuple[int, int, int, int], int]


@functools.lru_cache(maxsize=1024)
def _plan(
    packed_shape: torch.Size, geometry: tuple[int, ...], device: int | None, threads: int | None
) -> _Plan:
    """What depends on sizes alone: all of them, those of the result, bytes of scratch memory."""
    batch, *in_sizes, _ = packed_shape
    shape, sizes = _shape(batch, in_sizes, geometry)
    return shape, sizes, binconv.workspace_bytes(shape, device=device, threads=threads)


@functools.lru_cache(maxsize=1024)
def _values_plan(
    x_shape: torch.Size, geometry: tuple[int, ...], device: int | None, threads: int | None
) -> _Plan:
    """The same for values."""
    batch, _, *in_sizes = x_shape
    shape, sizes = _shape(batch, in_sizes, geometry)
    return shape, sizes, binconv.workspace_bytes(shape, values=True, device=device, threads=threads)


@functools.lru_cache(maxsize=1024)
def _sign_plan(
    x_shape: torch.Size,
    geometry: tuple[int, ...],
    prepared: bool,
    device: int | None,
    threads: int | None,
) -> _Plan:
    """The same for sign_conv2d, with a weight that is prepared or not."""
    batch, _, *in_sizes = x_shape
    shape, sizes = _shape(batch, in_sizes, geometry)
    scratch = binconv.sign_conv2d_bytes(shape, prepared=prepared, device=device, threads=threads)
    return shape, sizes, scratch


def _packed_conv2d(
    packed: Tensor,
    prepared: Tensor,
    geometry: Sequence[int],
    *others: Any,
    bits: Tensor | None = None,
) -> Tensor:
    queue = _queue(packed)
    plan = _plan(packed.shape, tuple(geometry), _ordinal(packed), queue["threads"])
    array = to_dlpack(_bits(packed))
    return _binary_conv2d(packed, plan, queue, {"input": array}, prepared, *others, bits=bits)


def _values_conv2d(
    x: Tensor,
    input_threshold: Tensor | None,
    prepared: Tensor,
    geometry: Sequence[int],
    *others: Any,
) -> Tensor:
    """The same for the bits x >= input_threshold, 0 if it is not given."""
    queue = _queue(x)
    plan = _values_plan(x.shape, tuple(geometry), _ordinal(x), queue["threads"])
    array, layout = _dense(x)
    source = {"input": to_dlpack(array), "input_layout": layout}
    if input_threshold is not None:
        source["input_threshold"] = to_dlpack(input_threshold)
    return _binary_conv2d(x, plan, queue, source, prepared, *others)


def _binary_conv2d(
    like: Tensor,
    plan: _Plan,
    queue: dict[str, Any],
    source: dict[str, Any],
    prepared: Tensor,
    out_dtype: torch.dtype | None,
    channels_last: bool,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    clamp: bool = False,
    activation: bool = False,
    in_shift: Tensor | None = None,
    slope: Tensor | None = None,
    out_shift: Tensor | None = None,
    threshold: float = 0.0,
    channel_threshold: Tensor | None = None,
    threshold_below: Tensor | None = None,
    *,
    bits: Tensor | None = None,
) -> Tensor:
    shape, sizes, scratch = plan
    workspace = like.new_empty(scratch, dtype=torch.uint8) if scratch else None
    out = _new_output(sizes, like, out_dtype, channels_last)
    if residual is not None:
        residual = _in_layout(residual, channels_last).contiguous()
    makes_bits = out_dtype is None or bits is not None
    binconv.binary_conv2d(
        shape,
        prepared_weight=to_dlpack(_bits(prepared)),
        out=to_dlpack(out if out_dtype is None else _in_layout(out, channels_last)),
        layout="nhwc" if channels_last else "nchw",
        clamp=clamp,
        scale=_array(scale),
        bias=_array(bias),
        residual=_array(residual),
        activation=tuple(map(_array, (in_shift, slope, out_shift))) if activation else None,
        threshold=_limit(threshold, channel_threshold) if makes_bits else None,
        threshold_below=_array(threshold_below),
        bits=_array(bits),
        workspace=_array(workspace),
        stream=queue["stream"],  # Quicker than **queue.
        threads=queue["threads"],
        **source,
    )
    return out


def _packed_conv2d_with_bits(
    packed: Tensor, prepared: Tensor, geometry: Sequence[int], *others: Any
) -> tuple[Tensor, Tensor]:
    bits = _new_packed(_out_sizes_of_bits(packed, geometry), packed)
    return _packed_conv2d(packed, prepared, geometry, *others, bits=bits), bits


def _in_layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.permute(0, 2, 3, 1) if channels_last else x


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


def _conv2d(
    x: Tensor,
    weight: Tensor,
    prepared: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Convolution of the signs of x and weight; `prepared`, if given, is made from this weight.

    Carries no gradient: that is sign_conv2d's part (autograd.py).
    """
    geometry = packed_geometry(weight.shape, stride, padding, dilation, groups, pad_value)
    weight = weight if prepared is None else prepared
    return sign_conv2d(x, weight, geometry, out_dtype, scale, bias, residual)[0]


def sign_conv2d(
    x: Tensor,
    weight: Tensor,
    geometry: tuple[int, ...],
    out_dtype: torch.dtype,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: Tensor | None = None,
    limit: float | None = None,
    mean_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """The convolution of values with a weight or prepared bits, and the bits of the values.

    Those are (1 or 2, N, H, W, bytes): of x >= threshold, 0 if not given, and if there is a limit,
    of |x - threshold| <= limit. One beyond float32 holds all of its finite numbers, as the largest
    of them does. With mean_scale, scale becomes mean(|weight|) of each filter.
    """
    queue = _queue(x)
    is_prepared = weight.dtype == torch.uint8
    shape, sizes, scratch = _sign_plan(
        x.shape, geometry, is_prepared, _ordinal(x), queue["threads"]
    )
    channels_last = is_channels_last(x)
    x_array, layout = _dense(x)
    if is_prepared:
        weight_array, weight_layout = _bits(weight), layout  # Which it has none of.
    else:
        weight_array, weight_layout = _dense(weight)
    bits = x.new_empty((1 if limit is None else 2, *_packed_sizes(x.shape)), dtype=torch.uint8)
    out = _new_output(sizes, x, out_dtype, channels_last)
    if residual is not None:
        residual = _in_layout(residual, channels_last).contiguous()
    clip = {} if limit is None else {"inside": _array(bits[1]), "limit": min(limit, LARGEST)}
    binconv.sign_conv2d(
        shape,
        to_dlpack(x_array),
        to_dlpack(weight_array),
        to_dlpack(bits[0]),
        to_dlpack(_in_layout(out, channels_last)),
        to_dlpack(x.new_empty(scratch, dtype=torch.uint8)),
        layout=layout,
        weight_layout=weight_layout,
        threshold=_array(threshold),
        scale=_array(scale),
        mean_scale=mean_scale,
        bias=_array(bias),
        residual=_array(residual),
        **clip,
        **queue,
    )
    return out, bits


LARGEST = torch.finfo(torch.float32).max


def _sign_conv2d_operands(
    bits: Tensor, weight: Tensor, scale: Tensor | None, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The signs of x, (N, C, H, W) in channels_last, and scale * sign(weight)."""
    signs, filters = _fake_sign_conv2d_operands(bits, weight, scale, channels, dtype)
    binconv.sign_conv2d_operands(
        to_dlpack(bits),
        to_dlpack(_dense(weight)[0]),
        to_dlpack(signs.permute(0, 2, 3, 1)),
        to_dlpack(_dense(filters)[0]),
        layout="nhwc",
        scale=_array(scale),
        **_queue(bits),
    )
    return signs, filters


def _fake_sign_conv2d_operands(
    bits: Tensor, weight: Tensor, scale: Tensor | None, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _fake_unpack_bits(bits, channels, dtype), _new_as(weight, dtype)


def _new_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for what has x's sizes and lies as x does."""
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


def _mask_values(x: Tensor, bits: Tensor) -> None:
    """In place; x is dense."""
    array, layout = _dense(x)
    binconv.mask_values(to_dlpack(array), to_dlpack(bits), layout=layout, **_queue(x))


def _weight_gradient(
    gradient: Tensor, weight: Tensor, scale: Tensor | None, limit: float, dtype: torch.dtype
) -> Tensor:
    out = _new_as(weight, dtype)
    binconv.weight_gradient(
        to_dlpack(_dense(gradient.contiguous(memory_format=memory_format(weight)))[0]),
        to_dlpack(_dense(weight)[0]),
        to_dlpack(_dense(out)[0]),
        scale=_array(scale),
        limit=limit,
        **_queue(weight),
    )
    return out


def _fake_weight_gradient(
    gradient: Tensor, weight: Tensor, scale: Tensor | None, limit: float, dtype: torch.dtype
) -> Tensor:
    return _new_as(weight, dtype)


def _fake_conv2d(
    x: Tensor,
    weight: Tensor,
    prepared: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *others: Any,
) -> Tensor:
    *_, out_dtype = others
    sizes = out_sizes(x.shape[0], x.shape[2:], weight.shape, stride, padding, dilation)
    return _new_output(sizes, x, out_dtype, is_channels_last(x))


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
        acc = torch.ops.binconv.packed_conv2d_no_grad.default(
            packed, prepared, ctx.geometry, torch.float32, ctx.channels_last
        )
    gradients = _epilogue_gradients(grad, acc, bias if needs_bias else None, residual)
    return *[None] * 5, *gradients, *[None] * 8


_OPERATORS: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
    ("pack_bits", _pack_bits, _fake_pack_bits),
    ("unpack_bits", _unpack_bits, _fake_unpack_bits),
    ("abs_mean", _abs_mean, _fake_abs_mean),
    ("prepare_weight", _prepare_weight, _fake_prepare_weight),
    ("refresh_weight", _refresh_weight, lambda *_: None),
    ("packed_conv2d", _packed_conv2d, _fake_packed_conv2d),
    ("packed_conv2d_no_grad", _packed_conv2d, _fake_packed_conv2d),
    ("packed_conv2d_with_bits", _packed_conv2d_with_bits, _fake_packed_conv2d_with_bits),
    ("values_conv2d", _values_conv2d, _fake_values_conv2d),
    ("conv2d", _conv2d, _fake_conv2d),
    ("sign_conv2d_operands", _sign_conv2d_operands, _fake_sign_conv2d_operands),
    ("mask_values", _mask_values, lambda *_: None),
    ("weight_gradient", _weight_gradient, _fake_weight_gradient),
]
for _name, _function, _fake in _OPERATORS:
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"binconv::{_name}", _fake, lib=_library)
kernels = {_name: _function for _name, _function, _ in _OPERATORS}
for _name in (
    "packed_conv2d_no_grad",
    "packed_conv2d_with_bits",
    "values_conv2d",
    "sign_conv2d_operands",
    "weight_gradient",
):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
torch.library.register_autograd(
    "binconv::packed_conv2d",
    _packed_conv2d_backward,
    setup_context=_save_for_packed_conv2d_backward,
    lib=_library,
)
