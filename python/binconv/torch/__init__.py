"""Binary convolution in PyTorch: functions, operators (torch.ops.binconv) and modules."""

from .bit_tensor import BitTensor
from .estimators import EDE, ApproxSign, Clip, Estimator, Identity, SwishSign, set_progress
from .functional import (
    PreparedWeight,
    binary_conv2d,
    pack_bits,
    pack_weight,
    prepare_weight,
)
from .modules import BinaryConv2d, RPReLU

__all__ = [
    "EDE",
    "ApproxSign",
    "BinaryConv2d",
    "BitTensor",
    "Clip",
    "Estimator",
    "Identity",
    "PreparedWeight",
    "RPReLU",
    "SwishSign",
    "binary_conv2d",
    "pack_bits",
    "pack_weight",
    "prepare_weight",
    "set_progress",
]
