"""Binary convolution in PyTorch: functions, operators (torch.ops.binconv) and modules."""

from .bit_tensor import BitTensor
from .functional import (
    PreparedWeight,
    binary_conv2d,
    pack_bits,
    pack_weight,
    prepare_weight,
)
from .modules import BinaryConv2d

__all__ = [
    "BinaryConv2d",
    "BitTensor",
    "PreparedWeight",
    "binary_conv2d",
    "pack_bits",
    "pack_weight",
    "prepare_weight",
]
