"""BinaryConv2dCutlass, the layer of bitorch-engine, with its files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .autograd import packed_conv2d, sign_conv2d, wants_gradient
from .binary_parameter import BinaryParameter
from .estimators import Identity
from .functional import FLOATS, check_device, check_tensor, geometry_arguments, pack_bits

LEAST_SCALE = 2.0**-20
IDENTITY = Identity()


class BinaryConv2dCutlass(nn.Module):
    """A binary convolution with learnable activation shift and scale, and weights of one byte.

    y = conv2d(sign(x + bias_a), sign(weight)) * scale_a * scale_w with zero padding, in x's dtype.
    The names are those of bitorch-engine's layer, whose state_dicts load; the numbers are those of
    this formula. sign(0) is +1 in both directions.

    Backward takes both factors as quantized values, a = scale_a sign(v) with v = x + bias_a and
    b = scale_w sign(weight), with straight-through derivatives: da/dv = 1 for |v| <= scale_a and 0
    outside, db/dweight = 1, and for scale_a that of learned step size quantization (Esser et al.,
    2020, LSQ, arXiv:1902.08153). With G = dL/dy, A = conv_transpose(G, b), and M the mask
    |v| <= scale_a:

        dL/dx       = A M
        dL/dbias_a  = sum of A M over images and pixels
        dL/dscale_a = sum of A (sign(v) - M v / scale_a) / sqrt(number of values in x)
        dL/dweight  = correlation of G with a

    Args:
        in_channels, out_channels, stride, padding, dilation: as for nn.Conv2d.
        kernel_size: an int, or (height, width).
        device, dtype: of weight and bias_a; float32, float16 or bfloat16.
        symmetric: how scale_a starts, see `set_activation`.

    Attributes:
        weight: (O, I, KH, KW) in dtype, or a BinaryParameter after `prepare_params`, or None after
            `generate_quantized_weight(qweight_only=True)`.
        qweight: None, or the signs of weight as uint8: value i of weight in row-major order is bit
            i % 8, least significant first, of byte i // 8, and 1 stands for +1. The shape is
            (O, KH, KW, I / 8) as bitorch-engine wrote it, which is its container's shape only, or
            one dimension where 8 does not divide I.
        bias_a: (I,). scale_a: a number, 0 until first use and at least 2^-20 from then on, kept so
            by every forward in training. scale_w: a number, not trained.
        bits_binary_word: 8, the bits in a value of qweight.
        opt_weight: weight in training, qweight in eval.

    A call that makes or saves qweight packs the signs that weight has then; train() drops it,
    unless it is all there is. A layer that only has qweight does not train.

    scale_a is a number without dimensions, as in bitorch-engine, so fully_shard wants it and
    scale_w among its `ignored_params`. Its gradient counts the values of one process: averaged over
    N processes, it is sqrt(N) times that of one process with all of the images.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype = torch.float,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: got {count!r}, expected an int of at least 1")
        if dtype not in FLOATS:
            raise ValueError(f"dtype: got {dtype}, expected float32, float16 or bfloat16")
        self.bits_binary_word = 8
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel_size, stride
        self.padding, self.dilation = padding, dilation
        self.device, self.dtype, self.symmetric = device, dtype, symmetric
        kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != 2 or not all(isinstance(k, int) and k > 0 for k in kernel):
            raise ValueError(f"kernel_size: got {kernel_size!r}, expected one or two ints above 0")
        self._weight_shape = torch.Size((out_channels, in_channels, *kernel))
        self._geometry = geometry_arguments(stride, padding, dilation, kernel, 1, 0)
        self.weight: nn.Parameter | None
        self.qweight: nn.Parameter | None
        self.register_parameter("weight", None)
        self.register_parameter("qweight", None)
        self.bias_a = nn.Parameter(torch.empty(in_channels, device=device, dtype=dtype))
        self.scale_a = nn.Parameter(torch.empty((), device=device))
        self.scale_w = nn.Parameter(torch.empty((), device=device), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A new float weight, uniform as nn.Conv2d's; bias_a and scale_a 0, scale_w 1."""
        weight = self.bias_a.new_empty(self._weight_shape)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self._set_weight(nn.Parameter(weight))
        with torch.no_grad():
            self.bias_a.zero_()
            self.scale_a.zero_()
            self.scale_w.fill_(1)
        self._scale_is_set = False

    # ------------------------------------------------------------------------------------ weights

    def _set_weight(self, weight: nn.Parameter | None) -> None:
        self.weight, self.qweight = weight, None
        self._kept: tuple[Any, Tensor] | None = None
        self._leaf_of_weight()

    def set_weight_data(self, x: Tensor) -> None:
        """Takes weights (O, I, KH, KW), float or int8, and prepares them (`prepare_params`).

        scale_w becomes mean(|x|) for floats; for int8 it stays as it is.
        """
        check_tensor("x", x, (*FLOATS, torch.int8), rank=4)
        if x.shape != self._weight_shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {tuple(self._weight_shape)}")
        x = x.detach().to(self.bias_a.device)
        if x.dtype == torch.int8:
            self._set_weight(BinaryParameter(x))
        else:
            self._set_weight(nn.Parameter(x))
            self.prepare_params()

    def set_quantized_weight_data(self, x: Tensor) -> None:
        """Takes signs packed as `qweight`; weight, if there is one, becomes the same signs."""
        if not isinstance(x, Tensor) or x.dtype != torch.uint8:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: got {got}, expected a tensor of torch.uint8")
        if x.numel() != self._packed_size():
            raise ValueError(
                f"x: got {x.numel()} bytes, expected {self._packed_size()} for a weight of shape "
                f"{tuple(self._weight_shape)}"
            )
        had_weight = self.weight is not None
        self._set_weight(None)
        qweight = x.detach().to(self.bias_a.device).clone()
        self.qweight = nn.Parameter(qweight, requires_grad=False)
        if had_weight:
            self.weight = BinaryParameter(self._signs())
            self._leaf_of_weight()

    def prepare_params(self) -> None:
        """Float weights become int8 signs, and scale_w their mean magnitude; int8 ones stay.

        Raises RuntimeError where there is no weight.
        """
        weight = self._need_weight("prepare_params")
        if not weight.is_floating_point():
            return
        with torch.no_grad():
            self.scale_w.copy_(weight.float().abs().mean())
        self._set_weight(BinaryParameter(weight))

    def generate_quantized_weight(self, qweight_only: bool = False) -> None:
        """Packs the signs of weight into qweight.

        qweight_only: drops weight, which leaves one bit a value, and no training.
        """
        if self.weight is None and self.qweight is not None:
            return
        weight = self._need_weight("generate_quantized_weight")
        # One pixel with every value for a channel: its packed bits are those of qweight.
        bits = pack_bits(weight.detach().reshape(1, -1, 1, 1)).data.flatten()[: self._packed_size()]
        if self.in_channels % 8 == 0:
            out_channels, in_channels, *kernel = self._weight_shape
            bits = bits.view(out_channels, *kernel, in_channels // 8)
        self.qweight = nn.Parameter(bits.clone(), requires_grad=False)
        if qweight_only:
            self.weight = None
            self._leaf_of_weight()

    def train(self, mode: bool = True) -> BinaryConv2dCutlass:
        """As nn.Module.train; all bits are made anew."""
        super().train(mode)
        self._kept = None
        if mode and self.weight is not None:
            self.qweight = None
        return self

    def set_bits_binary_word(self, num_bit: int) -> None:
        """Takes 8, the bits in a value of qweight; raises ValueError for another number."""
        if num_bit != 8:
            raise ValueError(f"num_bit: got {num_bit!r}, expected 8, as qweight is uint8")

    @property
    def opt_weight(self) -> nn.Parameter:
        """The weight in training; qweight, packed now if there is a weight, in eval."""
        if self.training:
            return self._need_weight("opt_weight in training")
        self.generate_quantized_weight()
        assert self.qweight is not None
        return self.qweight

    def _need_weight(self, call: str) -> nn.Parameter:
        if self.weight is None:
            raise RuntimeError(
                f"{call}: got a layer that only has qweight, expected one with a weight: call "
                "set_weight_data, or load a state_dict with a weight"
            )
        return self.weight

    def _packed_size(self) -> int:
        return -(-self._weight_shape.numel() // 8)

    def _signs(self) -> Tensor:
        """The signs of qweight, int8 (O, I, KH, KW)."""
        assert self.qweight is not None
        count = self._weight_shape.numel()
        pixel = self.qweight.detach().flatten()
        pixel = nn.functional.pad(pixel, (0, -len(pixel) % 16)).view(1, 1, 1, -1)
        signs: Tensor = ops.unpack_bits(pixel, count, torch.int8)
        return signs.reshape(self._weight_shape)

    def _prepared(self) -> Tensor:
        """The bits as the kernels read them, made anew whenever their tensor has changed."""
        tensor = self.qweight if self.weight is None else self.weight
        assert tensor is not None
        can_keep = not torch.compiler.is_compiling() and not tensor.is_inference()
        if can_keep and self._kept is not None and self._kept[0].serves(tensor):
            return self._kept[1]
        values = self._signs() if self.weight is None else self.weight.detach()
        packed = ops.pack_bits(values, 0.0, None)
        prepared: Tensor = ops.prepare_weight(packed, self.in_channels, 1)
        if can_keep and not ops.is_captured(tensor):
            self._kept = ops.Source(tensor), prepared
        return prepared

    # ------------------------------------------------------------------------------------ forward

    def set_activation(self, x: Tensor) -> Tensor:
        """X + bias_a; in training, scale_a starts at 2 mean(|x|), or 4 mean(|x|) if not symmetric.

        It starts once, where it is 0, on the device; NaN and infinities count as 0, and an empty x
        starts nothing. In eval nothing changes.
        """
        self._check_input(x)
        if self.training:
            self._start_scale(x)
        return x + self.bias_a.view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) float32, float16 or bfloat16 to (N, O, H', W'); see the class.

        Where scale_a is still 0 in eval, it counts as 1.
        """
        self._check_input(x)
        if self.training:
            self._need_weight("forward in training")
            self._start_scale(x)
        if wants_gradient(x, self.bias_a, self.scale_a, self.weight, self._leaf_of_weight()):
            return self._forward_with_gradient(x)
        return packed_conv2d(
            ops.pack_bits(x, 0.0, -self.bias_a.float()),
            self._prepared(),
            ops.packed_geometry(self._weight_shape, *self._geometry),
            x.dtype,
            ops.is_channels_last(x),
            self._output_scale(self._activation_scale()),
        )

    def _forward_with_gradient(self, x: Tensor) -> Tensor:
        scale = self._activation_scale().detach()
        shifted = _QuantizedSign.apply(  # type: ignore[no-untyped-call]
            x, self.bias_a, self.scale_a, scale
        )
        weight = self._signs() if self.weight is None else self.weight
        leaf = self._leaf_of_weight()
        if leaf is None and weight.is_floating_point():
            leaf = weight
        if leaf is not None:
            leaf = _DividedGradient.apply(leaf, self.scale_w)  # type: ignore[no-untyped-call]
        return sign_conv2d(
            shifted,
            weight.detach(),
            self._geometry,
            x.dtype,
            leaf=leaf,
            scale=self._output_scale(scale),
            ste=IDENTITY,
            weight_ste=IDENTITY,
        )

    def _leaf_of_weight(self) -> Tensor | None:
        if not torch.compiler.is_compiling():  # Which cannot look into the parameter itself.
            self._leaf = self.weight.leaf if isinstance(self.weight, BinaryParameter) else None
        return self._leaf

    def _check_input(self, x: Tensor) -> None:
        check_tensor("x", x, FLOATS, rank=4)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x: got {x.shape[1]} channels, expected {self.in_channels}")
        check_device("bias_a", self.bias_a, x.device)

    def _start_scale(self, x: Tensor) -> None:
        if not x.numel():  # Nothing to start from.
            return
        with torch.no_grad():
            if not self._scale_is_set:
                mean = x.detach().float().abs().nan_to_num(0, 0).mean()
                start = (2 if self.symmetric else 4) * mean
                self.scale_a.copy_(torch.where(self.scale_a == 0, start, self.scale_a))
                if not torch.compiler.is_compiling():  # A graph looks at scale_a each time.
                    self._scale_is_set = True
            self.scale_a.clamp_(min=LEAST_SCALE)

    def _activation_scale(self) -> Tensor:
        """scale_a as it counts: positive, and 1 until first use."""
        scale = self.scale_a.float()
        return torch.where(scale == 0, 1.0, scale.clamp_min(LEAST_SCALE))

    def _output_scale(self, activation_scale: Tensor) -> Tensor:
        return (activation_scale * self.scale_w.float()).detach().repeat(self.out_channels)

    # -------------------------------------------------------------------------------------- files

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if self.weight is not None and self.qweight is not None:
            self.generate_quantized_weight()  # As the weight may have changed.
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Takes the forms that the state has: a float or int8 weight, qweight, or both.

        A weight of the same form stays the same parameter, and where an error is, all stays.
        """
        weight, qweight = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}qweight")
        if wrong := [*self._wrong_sizes(prefix, weight, qweight)]:
            arguments[-1].extend(wrong)  # The errors that load_state_dict raises.
            return
        if weight is not None or qweight is not None:
            self._take_forms(weight, qweight)
        if isinstance(self.weight, BinaryParameter) and weight is not None:
            # Signs, whatever the file's integers.
            state_dict = {**state_dict, f"{prefix}weight": BinaryParameter(weight).data}
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._scale_is_set = False
        self._kept = None
        self._restore_parameter()
        if self.weight is not None and self.qweight is not None:
            self.generate_quantized_weight()

    def _wrong_sizes(
        self, prefix: str, weight: Tensor | None, qweight: Tensor | None
    ) -> Iterator[str]:
        if weight is not None and weight.shape != self._weight_shape:
            yield (
                f"{prefix}weight: got shape {tuple(weight.shape)}, expected "
                f"{tuple(self._weight_shape)}"
            )
        if qweight is not None and qweight.numel() != self._packed_size():
            yield (
                f"{prefix}qweight: got {qweight.numel()} bytes, expected {self._packed_size()} for "
                f"a weight of shape {tuple(self._weight_shape)}"
            )

    def _take_forms(self, weight: Tensor | None, qweight: Tensor | None) -> None:
        """Makes room for what comes."""
        if weight is None:
            self.weight = None
        elif self.weight is None or (self.weight.dtype == torch.int8) != (
            weight.dtype == torch.int8
        ):
            values = self.bias_a.new_empty(self._weight_shape)
            is_int8 = weight.dtype == torch.int8
            self.weight = BinaryParameter(values) if is_int8 else nn.Parameter(values)
        self.qweight = None
        if qweight is not None:
            bits = torch.empty(qweight.shape, dtype=torch.uint8, device=self.bias_a.device)
            self.qweight = nn.Parameter(bits, requires_grad=False)

    def _restore_parameter(self) -> None:
        """PyTorch replaces a parameter by a plain one when it assigns to or converts a module."""
        is_int8 = self.weight is not None and not self.weight.is_floating_point()
        if is_int8 and not isinstance(self.weight, BinaryParameter):
            assert self.weight is not None
            self.weight = BinaryParameter(self.weight)
        self._leaf_of_weight()

    def _apply(self, fn: Any, recurse: bool = True) -> BinaryConv2dCutlass:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore_parameter()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_leaf": None}  # Of use in this process alone.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._leaf_of_weight()

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )


class _QuantizedSign(torch.autograd.Function):
    """x + bias, of which only the sign is used, with the gradients of scale sign(x + bias).

    See the layer. The gradient that arrives is that of the sign: scale times that of scale sign(v).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, scale_a: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias, scale)  # Rather than the sum, which is larger and lives no
        return _shifted(x, bias)  # longer for anyone else.

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, bias, scale = ctx.saved_tensors
        v = _shifted(x, bias)
        grad = grad / scale
        inside = v.abs() <= scale
        sign = torch.where(v >= 0, 1.0, -1.0)
        of_scale = grad * (sign - torch.where(inside, v / scale, 0.0))
        passed = torch.where(inside, grad, 0.0)
        of_bias = passed.sum((0, 2, 3)).to(bias.dtype)
        return passed.to(x.dtype), of_bias, of_scale.sum() / math.sqrt(max(v.numel(), 1)), None


def _shifted(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias.float().view(-1, 1, 1)


class _DividedGradient(torch.autograd.Function):
    """The tensor itself, with its gradient divided by scale."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad / scale.clamp_min(torch.finfo(torch.float32).tiny), None


def _layers(model: nn.Module) -> Iterator[tuple[str, BinaryConv2dCutlass]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BinaryConv2dCutlass):
            yield name, module


def prepare_bie_layers(model: nn.Module) -> None:
    """Calls `prepare_params` of every BinaryConv2dCutlass in the model."""
    for _, layer in _layers(model):
        layer.prepare_params()


def pack_bie_layers(model: nn.Module, qweight_only: bool = True) -> None:
    """Calls `generate_quantized_weight(qweight_only)` of every BinaryConv2dCutlass in the model."""
    for _, layer in _layers(model):
        layer.generate_quantized_weight(qweight_only)


def save_checkpoint(model: nn.Module, name: str | Path, qweight_only: bool = True) -> None:
    """Writes {"state_dict": ...} with packed weights; the model stays as it is.

    qweight_only: leaves the unpacked weights of the BinaryConv2dCutlass layers out, for inference.
        False keeps both, to train on.

    The file is complete or not there: it gets its name when all of it is written.
    """
    state = dict(model.state_dict())
    for prefix, layer in _layers(model):
        dot = f"{prefix}." if prefix else ""
        had = layer.qweight
        layer.generate_quantized_weight()
        assert layer.qweight is not None
        state[f"{dot}qweight"] = layer.qweight.detach()
        layer.qweight = had if layer.weight is not None else layer.qweight
        if qweight_only:
            state.pop(f"{dot}weight", None)
    partial = f"{name}.partial"
    torch.save({"state_dict": state}, partial)
    os.replace(partial, name)


def load_checkpoint(
    model: nn.Module, checkpoint_path: str | Path, qweight_only: bool = True
) -> None:
    """Loads a file of `save_checkpoint`, here or in bitorch-engine, strictly and without code.

    qweight_only: whether the BinaryConv2dCutlass layers shall keep packed weights only. False
        needs a file with weights.

    Raises ValueError for a file that is truncated, of another kind, or of another model.
    """
    state = _read(checkpoint_path)
    if not qweight_only:
        for prefix, _ in _layers(model):
            key = f"{prefix}.weight" if prefix else "weight"
            if key not in state:
                raise ValueError(
                    f"checkpoint_path: got {checkpoint_path} without {key!r}, expected a file "
                    "saved with qweight_only=False"
                )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint_path: got {checkpoint_path}, expected a file of this model: {error}"
        ) from error
    if qweight_only:
        pack_bie_layers(model)


def _read(path: str | Path) -> dict[str, Tensor]:
    wanted = "expected a file of save_checkpoint"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # Whatever bytes of another kind make the reader stumble over.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint_path: got {path}, which is no whole file of tensors ({reason}), {wanted}"
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"checkpoint_path: got {path} without a 'state_dict', {wanted}")
    return state
