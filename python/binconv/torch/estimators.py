"""Estimators: what stands in for the derivative of the sign, which is zero almost everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .ops import memoized


@dataclass(frozen=True)
class Estimator:
    """A function g for backward: d sign(v) / dv is taken as g(v).

    Those of this module are all there are: compiled operators know them by their names.

    Attributes:
        name: what BinaryConv2d calls it.
        parameter: the number that shapes g.
        peak: the largest value of |g|.
    """

    name: ClassVar[str]

    @property
    def parameter(self) -> float:
        """The number that shapes g; 0 where there is none."""
        return 0.0

    @property
    def peak(self) -> Any:
        """The largest value of |g|, a number or a tensor without dimensions."""
        return 1.0

    def derivative(self, v: Tensor) -> Tensor:
        """g(v), elementwise, in v's dtype and shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Estimator):
    """g(v) = 1: the plain straight-through estimator (Bengio et al., 2013, arXiv:1308.3432)."""

    name: ClassVar[str] = "identity"

    def derivative(self, v: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(v)


@dataclass(frozen=True)
class Clip(Estimator):
    """g(v) = 1 for |v| <= limit, else 0.

    With limit 1: Hubara et al., 2016, Binarized Neural Networks, arXiv:1602.02830.

    limit: a finite number above 0; the comparison is made in float32.
    """

    name: ClassVar[str] = "clip"
    limit: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("limit", self.limit)

    @property
    def parameter(self) -> float:
        """The limit."""
        return float(self.limit)

    def derivative(self, v: Tensor) -> Tensor:
        """1 within the limit, 0 outside and for NaN."""
        return (v.abs() <= self.limit).to(v.dtype)


@dataclass(frozen=True)
class ApproxSign(Estimator):
    """g(v) = max(0, 2 - 2|v|), the derivative of a piecewise quadratic sign.

    Liu et al., 2018, Bi-Real Net, arXiv:1808.00278.
    """

    name: ClassVar[str] = "approx_sign"

    @property
    def peak(self) -> float:
        """g(0) = 2."""
        return 2.0

    def derivative(self, v: Tensor) -> Tensor:
        """2 - 2|v| within [-1, 1], 0 outside."""
        return (2 - 2 * v.abs()).clamp_min(0)


@dataclass(frozen=True)
class SwishSign(Estimator):
    """g(v) = beta (2 - beta v tanh(beta v / 2)) / (1 + cosh(beta v)).

    The derivative of 2 sigmoid(beta v) (1 + beta v (1 - sigmoid(beta v))) - 1: Darabi et al., 2018,
    BNN+, arXiv:1812.11800.

    beta: a finite number above 0; larger is closer to the sign.
    """

    name: ClassVar[str] = "swish_sign"
    beta: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)

    @property
    def parameter(self) -> float:
        """The beta."""
        return float(self.beta)

    @property
    def peak(self) -> float:
        """g(0) = beta."""
        return float(self.beta)

    def derivative(self, v: Tensor) -> Tensor:
        """g(v), written with tanh alone, which does not overflow."""
        u = self.beta * v
        slope = (u / 2).tanh()
        return self.beta / 2 * (2 - u.clamp(-80, 80) * slope) * (1 - slope * slope)


@dataclass(frozen=True)
class EDE(Estimator):
    """g(v) = k t (1 - tanh(t v)^2), the derivative of k tanh(t v).

    Qin et al., 2020, IR-Net, arXiv:1909.10788. With the progress of training from 0 to 1,
    t = 10^(2 progress - 1) goes from 0.1 to 10 and k = max(1 / t, 1) from 10 to 1: first close to
    the identity, then close to the sign. `set_progress` moves all layers of a model along.

    progress: a number from 0 to 1; or a tensor without dimensions, on v's device, unchecked.
    """

    name: ClassVar[str] = "ede"
    progress: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.progress, Tensor):
            return
        if not _is_number(self.progress) or not 0 <= self.progress <= 1:
            raise ValueError(f"progress: got {self.progress!r}, expected a number from 0 to 1")

    @property
    def parameter(self) -> float:
        """The progress."""
        return float(self.progress)

    @property
    def peak(self) -> Any:
        """g(0) = k t = max(1, t)."""
        t = 10 ** (2 * self.progress - 1)
        return t.clamp_min(1) if isinstance(t, Tensor) else max(1.0, t)

    def derivative(self, v: Tensor) -> Tensor:
        """As for the class: k t (1 - tanh(t v)^2)."""
        slope = (10 ** (2 * self.progress - 1) * v).tanh()
        return (1 - slope * slope) * self.peak  # type: ignore[no-any-return]


_CLASSES: dict[str, type[Estimator]] = {
    kind.name: kind for kind in (Identity, Clip, ApproxSign, SwishSign, EDE)
}


def estimator(value: str | Estimator, argument: str = "ste") -> Estimator:
    """The estimator of that name with its default parameter, or the one given.

    value: an Estimator, or "clip", "approx_sign", "ede", "swish_sign" or "identity".
    argument: what to call the value in an error.
    """
    if isinstance(value, Estimator) and type(value) in _CLASSES.values():
        return value
    if not isinstance(value, str) or value not in _CLASSES:
        kinds = ", ".join(kind.__name__ for kind in _CLASSES.values())
        names = ", ".join(map(repr, _CLASSES))
        raise ValueError(f"{argument}: got {value!r}, expected a {kinds} or one of {names}")
    return _CLASSES[value]()


def of_parameter(name: str, parameter: float, progress: Tensor | None = None) -> Estimator:
    """The estimator with that name and that `parameter`; for "ede" progress, if given, instead."""
    if name == EDE.name and progress is not None:
        return EDE(progress)
    return _of_number(name, parameter)


@memoized
def _of_number(name: str, parameter: float) -> Estimator:
    default: Any = estimator(name)
    return type(default)(parameter) if fields(default) else default  # type: ignore[no-any-return]


def set_progress(model: nn.Module, progress: float) -> None:
    """Moves every EDE of the BinaryConv2d layers in a model to this progress of training.

    Neither a compiled model nor a captured CUDA graph is made anew for it.

    progress: from 0 to 1, for example epoch / epochs (IR-Net, see EDE).
    """
    moved = EDE(progress)
    for module in model.modules():
        for name in ("ste", "weight_ste"):
            if isinstance(getattr(module, name, None), EDE):
                setattr(module, name, moved)
                assert isinstance(module.progress, Tensor)
                module.progress.fill_(progress)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_positive(name: str, value: float) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}, expected a finite number above 0")
