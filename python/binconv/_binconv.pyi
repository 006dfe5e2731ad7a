"""Types of the compiled module; the public names are re-exported by `binconv`."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

class Array(Protocol):
    """An array that DLPack can export: NumPy, CuPy, JAX, torch and others."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

Layout = Literal["nchw", "nhwc"]

class WeightShape:
    """Sizes of a weight tensor.

    in_channels counts all groups together. groups divides both channel counts, and in_channels /
    groups is a multiple of 8 unless groups is 1.
    """

    out_channels: int
    in_channels: int
    kernel_height: int
    kernel_width: int
    groups: int
    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        kernel_height: int,
        kernel_width: int,
        groups: int = 1,
    ) -> None: ...
    def __eq__(self, other: object) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]

class Conv2dShape:
    """All sizes of a convolution.

    stride and dilation are (height, width), padding is (top, left, bottom, right), pad_value (0, 1
    or -1) is what pixels outside the image count as.
    """

    def __init__(
        self,
        batch: int,
        in_height: int,
        in_width: int,
        weight: WeightShape,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0, 0, 0),
        dilation: Sequence[int] = (1, 1),
        pad_value: int = 0,
    ) -> None: ...
    @property
    def batch(self) -> int: ...
    @property
    def in_height(self) -> int: ...
    @property
    def in_width(self) -> int: ...
    @property
    def weight(self) -> WeightShape: ...
    @property
    def stride(self) -> tuple[int, int]: ...
    @property
    def padding(self) -> tuple[int, int, int, int]: ...
    @property
    def dilation(self) -> tuple[int, int]: ...
    @property
    def pad_value(self) -> int: ...
    @property
    def out_height(self) -> int: ...
    @property
    def out_width(self) -> int: ...
    def __eq__(self, other: object) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]

def packed_bytes(channels: int) -> int:
    """Bytes of one packed pixel: 16 * ceil(channels / 128)."""

def pack_bits(
    x: Array,
    out: Array,
    *,
    layout: Layout = "nchw",
    threshold: float | Array | None = None,
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """Writes the bits of x >= threshold.

    x: float32, float16, bfloat16 or int8, C-contiguous, (N, C, H, W) or for layout "nhwc" (N, H,
    W, C).
    out: uint8 (N, H, W, packed_bytes(C)); channel c is bit c % 8 of byte c // 8, unused bits are
    zero.
    threshold: a number, or a float32 array (C,); 0 unless given. -0.0 gives a 1, NaN a 0.
    """

def pack_bits_and_clip(
    x: Array,
    out: Array,
    inside: Array,
    *,
    layout: Layout = "nchw",
    threshold: float | Array | None = None,
    limit: float = 1.0,
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """As pack_bits, and writes to inside the bits of |x - threshold| <= limit.

    That is where the clipped straight-through estimator (Hubara et al., 2016, arXiv:1602.02830)
    lets a gradient through: threshold - limit <= x <= threshold + limit, both ends in float32.

    inside: as out.
    limit: finite, at least 0.
    """

def unpack_bits(
    packed: Array,
    out: Array,
    *,
    layout: Layout = "nchw",
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """Writes +1 and -1 for the bits: the inverse of pack_bits.

    out: float32, float16, bfloat16 or int8, (N, C, H, W) or for layout "nhwc" (N, H, W, C).
    """

def prepared_weight_bytes(
    shape: WeightShape, *, device: int | None = None, kernel: str | None = None
) -> int:
    """Bytes of prepared weights on the CPU (device None) or on the CUDA device of that ordinal."""

def prepare_weight(
    shape: WeightShape,
    packed: Array,
    out: Array,
    *,
    stream: int | None = None,
    threads: int | None = None,
    kernel: str | None = None,
) -> None:
    """Lays packed weights out for the kernels of the device they are on.

    packed: uint8 (out_channels, kernel_height, kernel_width, packed_bytes(in_channels // groups)).
    out: uint8, one dimension of at least prepared_weight_bytes(shape).
    """

def workspace_bytes(
    shape: Conv2dShape,
    *,
    values: bool = False,
    device: int | None = None,
    threads: int | None = None,
    kernel: str | None = None,
) -> int:
    """Bytes of scratch memory for binary_conv2d with the same threads and kernel.

    values: whether its input will be values; if not, often 0.
    """

def binary_conv2d(
    shape: Conv2dShape,
    input: Array,
    prepared_weight: Array,
    out: Array,
    *,
    layout: Layout = "nhwc",
    clamp: bool = False,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    activation: tuple[Array | None, Array | None, Array | None] | None = None,
    threshold: float | Array | None = None,
    threshold_below: Array | None = None,
    bits: Array | None = None,
    workspace: Array | None = None,
    input_layout: Layout = "nhwc",
    input_threshold: float | Array | None = None,
    stream: int | None = None,
    threads: int | None = None,
    kernel: str | None = None,
) -> None:
    """Writes the convolution of +1/-1 values, acc, or what an epilogue makes of it.

    That is y = activation(fma(acc, scale, bias) + residual) in float32, where every sum and product
    but the fma is rounded by itself.

    input: uint8 (N, H, W, packed_bytes(C)); or values, of which the bits are taken that pack_bits
        would make: float32, float16, bfloat16 or int8, (N, H, W, C), for input_layout "nchw" (N, C,
        H, W). They are packed to the workspace or, where a kernel can, as they are loaded.
    prepared_weight: from prepare_weight, with the same kernel.
    out: its dtype says what is written: int32 acc itself, which is exact; float32, float16 or
        bfloat16 y, computed in float32 and rounded once; uint8 the packed bits of y >= threshold.
        (N, OH, OW, O), for layout "nchw" (N, O, OH, OW), for bits (N, OH, OW, packed_bytes(O)).
    clamp: makes acc max(acc, 0) before all else, also for int32.
    scale, bias: float32 (O,).
    residual: float32, float16 or bfloat16, shaped as the values of out; may not overlap it.
    activation: (in_shift, slope, out_shift), float32 (O,) or None each: y becomes
        PReLU(y + in_shift) + out_shift. A slope of None is 0, as in ReLU; a shift of None is left
        out.
    threshold: a number or float32 (O,), for bits; 0 unless given.
    threshold_below: uint8 or bool (O,): the bit is y <= threshold where it is not zero.
    bits: uint8 (N, OH, OW, packed_bytes(O)), beside a float out: also gets the bits of y, taken
        before y is rounded to out's dtype.
    workspace: uint8, one dimension of at least workspace_bytes(shape, values=...).
    input_threshold: of values, as threshold in pack_bits.
    kernel: a name from available_kernels(), instead of the best one for the shape.
    """

def sign_conv2d_bytes(
    shape: Conv2dShape,
    *,
    prepared: bool = False,
    device: int | None = None,
    threads: int | None = None,
) -> int:
    """Bytes of scratch memory for sign_conv2d with the same threads.

    prepared: whether its weight will be a prepared one.
    """

def sign_conv2d(
    shape: Conv2dShape,
    x: Array,
    weight: Array,
    bits: Array,
    out: Array,
    scratch: Array,
    *,
    layout: Layout = "nchw",
    weight_layout: Layout = "nchw",
    threshold: float | Array | None = None,
    inside: Array | None = None,
    limit: float = 1.0,
    scale: Array | None = None,
    mean_scale: bool = False,
    bias: Array | None = None,
    residual: Array | None = None,
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """Writes the convolution of the signs of x - threshold and of weight, for values in floats.

    In one call what pack_bits (with inside, pack_bits_and_clip) of x, pack_bits and prepare_weight
    of weight (with mean_scale, abs_mean, too), and binary_conv2d do: a step of training takes them
    all, each call takes time.

    x: float32, float16, bfloat16 or int8, (N, C, H, W) or for layout "nhwc" (N, H, W, C).
    weight: of these types, (O, C / groups, KH, KW) or for weight_layout "nhwc" (O, KH, KW,
        C / groups); or uint8, from prepare_weight.
    bits: uint8 (N, H, W, packed_bytes(C)), gets those of x >= threshold.
    out, scale, bias, residual: as in binary_conv2d, in the layout of x.
    mean_scale: first writes mean(|weight[o]|) to scale, as abs_mean does; for a weight of floats.
    scratch: uint8, one dimension of at least sign_conv2d_bytes(shape).
    threshold, inside, limit: as in pack_bits_and_clip.
    """

def sign_conv2d_operands(
    bits: Array,
    weight: Array,
    signs: Array,
    filters: Array,
    *,
    layout: Layout = "nchw",
    scale: Array | None = None,
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """Writes what the two convolutions in the backward pass of sign_conv2d take, in floats.

    signs becomes +1 and -1 for the bits, filters scale[o] where weight[o] >= 0 and else -scale[o].

    bits: uint8 (N, H, W, B), in the order of pack_bits; B is packed_bytes(C) or any number of bytes
        that hold C bits.
    weight: float32, float16, bfloat16 or int8, with the output channels first, in any order of the
        others.
    signs: float32, float16 or bfloat16, (N, C, H, W) or for layout "nhwc" (N, H, W, C).
    filters: of these types, in the shape and order of weight.
    scale: float32 (O,); 1 unless given.
    """

def mask_values(
    x: Array,
    bits: Array,
    *,
    layout: Layout = "nchw",
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """Makes x 0 where a bit is 0, in place.

    With the bits `inside` of pack_bits_and_clip, x being the gradient of the signs, it becomes that
    of the values by a clipped straight-through estimator (Hubara et al., 2016, arXiv:1602.02830).

    x: float32, float16 or bfloat16, (N, C, H, W) or for layout "nhwc" (N, H, W, C).
    bits: as in sign_conv2d_operands.
    """

def weight_gradient(
    gradient: Array,
    weight: Array,
    out: Array,
    *,
    scale: Array | None = None,
    limit: float = 1.0,
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """Writes scale[o] * gradient[o] where |weight| <= limit, else 0: as mask_values, for weights.

    gradient: of the signs, float32, float16 or bfloat16, in the shape and order of weight.
    weight, scale: as in sign_conv2d_operands.
    out: as gradient; the product is made in float32 and rounded once.
    limit: at least 0; math.inf, the identity as the estimator, lets all pass.
    """

def abs_mean(
    x: Array, out: Array, *, stream: int | None = None, threads: int | None = None
) -> None:
    """Writes mean(|x|) to a float32 out of one element, or mean(|x[i]|) to one of x.shape[0]."""

def scale_channels(
    x: Array,
    scale: Array,
    out: Array,
    *,
    layout: Layout = "nchw",
    stream: int | None = None,
    threads: int | None = None,
) -> None:
    """Writes x * scale[c], in float32, rounded once to x's dtype; out may be x.

    x, out: float32, float16 or bfloat16, (N, C, H, W) or for layout "nhwc" (N, H, W, C).
    scale: float32 (C,).
    """

def kernel_name(shape: Conv2dShape, *, device: int | None = None, kernel: str | None = None) -> str:
    """The kernel that binary_conv2d runs for this shape, such as "cpu_avx2"."""

def available_kernels(device: int | None = None) -> list[str]:
    """Names of the kernels that can run on the CPU (None) or on a CUDA device, best first."""

def version() -> str:
    """The version of libbinconv."""

def cuda_architectures() -> str:
    """GPU architectures with compiled code, as given to CMake; "" in a CPU-only build."""

def cuda_devices() -> list[tuple[str, int]]:
    """(name, compute capability such as 90) of each CUDA device."""

def register_operators() -> None:
    """Gives the operators torch.ops.binconv their kernels, in the PyTorch that is loaded.

    Raises NotImplementedError where there is none, or one older than 2.10.
    """
