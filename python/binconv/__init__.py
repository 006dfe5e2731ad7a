"""Exact, fast binary (+1/-1) 2-D convolution on any DLPack array.

The operations are those of the C++ library. Two functions take several of them in one call, for
training (`sign_conv2d`, `sign_conv2d_operands`); `sign_values`, `scaled_signs` and `prepare_weight`
from values are there only as steps of these. All write into arrays that the caller made (`out`),
take NumPy, CuPy, JAX or torch arrays alike (JAX's, which are immutable, as inputs only), and import
none of these. `binconv.torch` builds operations and modules that take and return tensors on top of
them.

Every function takes `threads` for arrays on the CPU (all cores unless given) and requires `stream`,
a CUDA stream as an int (0 is the default stream), for arrays on a GPU.

Errors: ValueError for arguments that can never work, TypeError for an argument that is not an
array, NotImplementedError for what this build or device does not do, RuntimeError from CUDA. Each
names the argument, what it got and what it expects, and is raised before anything is written.
"""

from ._binconv import (
    Conv2dShape,
    WeightShape,
    abs_mean,
    available_kernels,
    binary_conv2d,
    cuda_architectures,
    cuda_devices,
    kernel_name,
    mask_values,
    pack_bits,
    pack_bits_and_clip,
    packed_bytes,
    prepare_weight,
    prepared_weight_bytes,
    scale_channels,
    sign_conv2d,
    sign_conv2d_bytes,
    sign_conv2d_operands,
    unpack_bits,
    version,
    weight_gradient,
    workspace_bytes,
)

__version__ = version()

__all__ = [
    "Conv2dShape",
    "WeightShape",
    "__version__",
    "abs_mean",
    "available_kernels",
    "binary_conv2d",
    "cuda_architectures",
    "cuda_devices",
    "kernel_name",
    "mask_values",
    "pack_bits",
    "pack_bits_and_clip",
    "packed_bytes",
    "prepare_weight",
    "prepared_weight_bytes",
    "scale_channels",
    "sign_conv2d",
    "sign_conv2d_bytes",
    "sign_conv2d_operands",
    "unpack_bits",
    "version",
    "weight_gradient",
    "workspace_bytes",
]
