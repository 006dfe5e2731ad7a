"""Modules of binconv.torch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .autograd import packed_conv2d, sign_conv2d, wants_gradient
from .binary_parameter import BinaryParameter
from .bit_tensor import BitTensor
from .estimators import EDE, Estimator, Identity, estimator
from .functional import (
    FLOATS,
    Padding,
    check_device,
    check_tensor,
    geometry_arguments,
    prepare_weight,
)

IDENTITY = Identity()
WEIGHTS = (*FLOATS, torch.int8)


class BinaryConv2d(nn.Conv2d):
    """A convolution of signs with a float weight to train.

    y = conv2d(sign(x + shift), sign(weight)) * scale + bias. Trains like nn.Conv2d, with gradients
    that pass the signs by estimators (see `sign_conv2d`), keeping bits for backward where a float
    convolution keeps x. In eval mode it keeps its weight as prepared bits, made anew whenever the
    weight has changed: by an optimizer, load_state_dict, an in-place edit, another parameter,
    another device. Only an edit through `weight.data` and a compiled step of a fused optimizer are
    hidden from PyTorch; they count from the next call of train() or eval() on; call one of them
    after fully_shard, too. A captured CUDA graph reads the bits that were there: capture anew after
    such a change. Both modes compute the same numbers.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for
            nn.Conv2d.
        padding_mode: as nn.Conv2d. Modes other than "zeros" pad x before its sign is taken.
        device, dtype: as nn.Conv2d; float32, float16 or bfloat16.
        pad_value: what pixels outside the image count as: 0, 1 or -1.
        weight_scale: "channel" for one scale per output channel, mean(|weight|) over its filter, as
            in XNOR-Net (Rastegari et al., 2016), Bi-Real Net (Liu et al., 2018) and ReActNet (Liu
            et al., 2020); "tensor" for one over all filters; no gradient flows through either.
            "learnable" for a parameter `scale` (out_channels,), which starts as the former (Bulat
            and Tzimiropoulos, 2019, XNOR-Net++). None for 1.
        ste: the estimator for the signs of x: "clip" (|x| <= 1), "approx_sign", "ede",
            "swish_sign", "identity" or an Estimator such as Clip(1.3).
        weight_ste: the same for the signs of weight.
        input_shift: whether there is a parameter `shift` (in_channels,), zero at first, added to x
            before its sign is taken: ReActNet's RSign.

    Input: (N, C, H, W) float32, float16 or bfloat16, or a BitTensor, which takes no gradient and
    holds the signs of x + shift. The output has x's dtype and memory format (float32 and
    channels_last for a BitTensor).
    """

    _leaf: Tensor | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pad_value: int = 0,
        weight_scale: Literal["channel", "tensor", "learnable"] | None = "channel",
        ste: str | Estimator = "clip",
        weight_ste: str | Estimator = "clip",
        input_shift: bool = False,
    ) -> None:
        if weight_scale not in ("channel", "tensor", "learnable", None):
            raise ValueError(
                f"weight_scale: got {weight_scale!r}, expected 'channel', 'tensor', 'learnable' or "
                "None"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,  # type: ignore[arg-type]
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if groups > 1 and (in_channels // groups) % 8:
            raise ValueError(
                f"groups: got {groups} groups of {in_channels // groups} input channels, expected "
                "a multiple of 8 channels each"
            )
        self.pad_value = pad_value
        self.weight_scale = weight_scale
        self.ste = estimator(ste, "ste")
        self.weight_ste = estimator(weight_ste, "weight_ste")
        pads: Padding = padding if padding_mode == "zeros" else 0
        self._geometry = geometry_arguments(
            stride, pads, dilation, self.kernel_size, groups, pad_value
        )
        self._weight_shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._packed_geometry = ops.packed_geometry(self._weight_shape, *self._geometry)
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        learns_scale = weight_scale == "learnable"
        self.scale = nn.Parameter(torch.empty(out_channels, **like)) if learns_scale else None
        self.shift = nn.Parameter(torch.empty(in_channels, **like)) if input_shift else None
        self._reset_scale_and_shift()
        self.progress: Tensor | None
        self.register_buffer("progress", self._first_progress(), persistent=False)
        self._allocate()

    def _first_progress(self) -> Tensor | None:
        both = self.ste, self.weight_ste
        if not any(isinstance(chosen, EDE) for chosen in both):
            return None
        numbers = [chosen.parameter if isinstance(chosen, EDE) else 0.0 for chosen in both]
        return torch.tensor(numbers, device=self.weight.device)

    def reset_parameters(self) -> None:
        """As nn.Conv2d; scale becomes mean(|weight|) of each filter, shift zero."""
        if not self.weight.is_floating_point():
            raise ValueError("weight: got int8, expected floats, as signs have no distribution")
        super().reset_parameters()
        if hasattr(self, "shift"):  # Not yet while nn.Conv2d is being constructed.
            self._reset_scale_and_shift()

    def _reset_scale_and_shift(self) -> None:
        with torch.no_grad():
            if self.scale is not None:
                self.scale.copy_(self.weight.abs().mean((1, 2, 3)))
            if self.shift is not None:
                self.shift.zero_()

    def store_weight_as_int8(self) -> None:
        """Makes weight a BinaryParameter of its signs; the outputs stay the same.

        A scale computed from the float weight becomes a learnable one that starts there.
        """
        scale = self._new_scale()
        if self.scale is None and scale is not None:
            self.weight_scale = "learnable"
            self.scale = nn.Parameter(scale.detach().to(self.weight.dtype))
        self.weight = BinaryParameter(self.weight)
        self._allocate()

    def forward(self, x: Tensor | BitTensor) -> Tensor:
        """The convolution; see the class."""
        self._check_weight()
        self._check_input(x)
        if isinstance(x, BitTensor):
            return self._convolve_bits(x)
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)
        leaf = self._leaf_of_weight()
        if wants_gradient(x, self.weight, leaf, self.shift, self.scale, self.bias):
            return self._convolve_with_gradient(x, leaf)
        return self._convolve_values(x)

    def _convolve_bits(self, x: BitTensor) -> Tensor:
        prepared, scale = self._prepared_weight()
        bias = _float(self.bias)
        return packed_conv2d(
            x.data, prepared, self._packed_geometry, torch.float32, True, scale, bias
        )

    def _convolve_values(self, x: Tensor) -> Tensor:
        prepared, scale = self._prepared_weight()
        shift = _float(self.shift)
        y: Tensor = ops.values_conv2d(
            x,
            None if shift is None else -shift,
            prepared,
            self._packed_geometry,
            x.dtype,
            ops.is_channels_last(x),
            scale,
            _float(self.bias),
        )
        return y

    def _convolve_with_gradient(self, x: Tensor, leaf: Tensor | None) -> Tensor:
        prepared, scale, mean_scale = None, None, False
        if self._keeps_weight():
            prepared, scale = self._kept_weight()
        elif self.weight_scale == "channel":
            mean_scale = True
        else:
            scale = self._new_scale()
        return sign_conv2d(
            x,
            self.weight,
            self._geometry,
            x.dtype,
            leaf=leaf,
            shift=_float(self.shift),
            scale=scale,
            mean_scale=mean_scale,
            bias=_float(self.bias),
            prepared=prepared,
            progress=_float(self.progress),
            ste=self.ste,
            weight_ste=self.weight_ste if leaf is None else IDENTITY,
        )

    def _leaf_of_weight(self) -> Tensor | None:
        if not torch.compiler.is_compiling():  # Which cannot look into the parameter itself.
            weight: Tensor = self.weight
            leaf = weight.leaf if isinstance(weight, BinaryParameter) else None
            if leaf is not self._leaf:  # As a module takes its time to set an attribute.
                self._leaf = leaf
        return self._leaf

    def _prepared_weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight's bits as the kernels read them, and its scale."""
        if self._keeps_weight():
            return self._kept_weight()
        return prepare_weight(self.weight.detach(), self.groups).data, self._new_scale()

    def _check_weight(self) -> None:
        weight = self.weight
        check_tensor("weight", weight, WEIGHTS, rank=4)
        trains = weight.is_floating_point() or isinstance(weight, BinaryParameter)
        if self.training and not trains:
            raise ValueError(
                "weight: got int8, expected floats or a BinaryParameter in training mode"
            )
        if weight.shape != self._weight_shape:
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}, expected {self._weight_shape}"
            )

    def _check_input(self, x: Tensor | BitTensor) -> None:
        bits = isinstance(x, BitTensor)
        if not bits:
            check_tensor("x", x, FLOATS, rank=4)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x: got {x.shape[1]} channels, expected {self.in_channels}")
        check_device("weight", self.weight, x.device)
        if bits and self.training:
            raise ValueError("x: got a BitTensor in training mode, expected a float tensor")
        if bits and self.padding_mode != "zeros":
            raise NotImplementedError(
                f"x: got a BitTensor, expected floats for padding_mode {self.padding_mode!r}"
            )

    def _scales(self) -> int:
        """How many scales are computed from the weight."""
        return {"channel": self.out_channels, "tensor": 1}.get(str(self.weight_scale), 0)

    def _new_scale(self) -> Tensor | None:
        rows = self._scales()
        if not rows:
            return _float(self.scale)
        scale: Tensor = ops.abs_mean(self.weight.detach(), rows)
        return scale if rows == self.out_channels else scale.expand(self.out_channels).contiguous()

    def _keeps_weight(self) -> bool:
        if self.training:
            return False
        # A parametrized weight is a new tensor at every access: there is nothing to keep. One made
        # in inference mode does not tell when it changes (which a trace cannot ask). And what is
        # kept is laid out for this device, where an exported program may run on any.
        can_keep = self._prepared is not None and "weight" in self._parameters
        if not torch.compiler.is_compiling():
            can_keep = can_keep and not self.weight.is_inference()
        return can_keep and not torch.compiler.is_exporting()

    def _kept_weight(self) -> tuple[Tensor, Tensor | None]:
        if self._kept_shape != self.weight.shape:
            self._allocate()
        assert self._prepared is not None
        if not ops.is_fresh(self._stamp, self.weight):
            with torch.no_grad():
                ops.refresh_weight(
                    self.weight,
                    self.groups,
                    self.weight_scale == "channel",
                    self._prepared,
                    self._scale,
                    self._stamp,
                )
        return self._prepared, self._scale if self._scales() else _float(self.scale)

    def _allocate(self) -> None:
        # Not buffers: neither a state_dict nor a broadcast of buffers should see them.
        weight = self.weight
        self._prepared: Tensor | None = None
        self._leaf_of_weight()
        self._kept_shape = weight.shape
        # What fully_shard gathers for each call looks unchanged when it is not: keep nothing then.
        if weight.is_meta or hasattr(weight, "placements"):
            return
        with torch.inference_mode(False):
            self._prepared = ops.new_prepared(weight.shape, self.groups, weight)
            scales = self.out_channels if self._scales() else 0
            self._scale = torch.empty(scales, device=weight.device)
            self._stamp = torch.empty(0, device="cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> BinaryConv2d:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore_parameter()
        progress = self._first_progress()
        if self.progress is not None and progress is not None:
            self.progress.copy_(progress)  # to_empty does not keep it.
        self._allocate()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """As nn.Module's; of floats, a weight of signs takes the signs."""
        key = f"{prefix}weight"
        if isinstance(self.weight, BinaryParameter) and key in state_dict:
            state_dict = {**state_dict, key: BinaryParameter(state_dict[key]).data}
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._restore_parameter()

    def _restore_parameter(self) -> None:
        """PyTorch replaces a parameter by a plain one when it assigns to or converts a module."""
        if self.weight.dtype == torch.int8 and not isinstance(self.weight, BinaryParameter):
            self.weight = BinaryParameter(self.weight)
            self._allocate()

    def train(self, mode: bool = True) -> BinaryConv2d:
        """As nn.Module.train; the prepared bits are made anew."""
        super().train(mode)
        self._allocate()
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "_prepared",
            "_leaf",
            "_kept_shape",
            "_scale",
            "_stamp",
        )  # Of use in this process alone.
        return {key: value for key, value in self.__dict__.items() if key not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._allocate()

    def extra_repr(self) -> str:
        """The arguments, as in nn.Conv2d."""
        text = super().extra_repr()  # type: ignore[no-untyped-call]
        text = f"{text}, pad_value={self.pad_value}, weight_scale={self.weight_scale!r}"
        text = f"{text}, ste={self.ste}, weight_ste={self.weight_ste}"
        return text if self.shift is None else f"{text}, input_shift=True"


class RPReLU(nn.Module):
    """A PReLU with learnable shifts before and after it.

    Liu et al., 2020, ReActNet, arXiv:2003.03488:
    y = prelu(x - before) + after, that is slope * (x - before) + after below `before` and
    x - before + after above, each with its own number for each channel.

    Args:
        channels: C, at least 1.
        slope: the first value of every slope; the shifts start at zero.
        device, dtype: of the parameters `before`, `slope` and `after`, (C,) each.

    Input and output: (N, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        slope: float = 0.25,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels: got {channels!r}, expected an int of at least 1")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.before = nn.Parameter(torch.zeros(channels, **like))
        self.slope = nn.Parameter(torch.full((channels,), slope, **like))
        self.after = nn.Parameter(torch.zeros(channels, **like))

    def forward(self, x: Tensor) -> Tensor:
        """The activation; see the class."""
        if x.dim() != 4 or x.shape[1] != len(self.slope):
            channels = len(self.slope)
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, {channels}, H, W)")
        column = (-1, 1, 1)
        shifted = x - self.before.to(x.dtype).view(column)
        activated = nn.functional.prelu(shifted, self.slope.to(x.dtype))
        return activated + self.after.to(x.dtype).view(column)

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(len(self.slope))


def _float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()
