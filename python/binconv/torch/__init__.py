"""Binary convolution in PyTorch: functions, operators (torch.ops.binconv) and modules."""

from .binary_parameter import BinaryParameter, Bop, binary_parameters
from .bit_tensor import BitTensor
from .convert import convert, store_weights_as_int8
from .cutlass import (
    BinaryConv2dCutlass,
    load_checkpoint,
    pack_bie_layers,
    prepare_bie_layers,
    save_checkpoint,
)
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
    "BinaryConv2dCutlass",
    "BinaryParameter",
    "BitTensor",
    "Bop",
    "Clip",
    "Estimator",
    "Identity",
    "PreparedWeight",
    "RPReLU",
    "SwishSign",
    "binary_conv2d",
    "binary_parameters",
    "convert",
    "load_checkpoint",
    "pack_bie_layers",
    "pack_bits",
    "pack_weight",
    "prepare_bie_layers",
    "prepare_weight",
    "save_checkpoint",
    "set_progress",
    "store_weights_as_int8",
]
