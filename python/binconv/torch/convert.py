"""Making binary networks of float ones, and float weights of one byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .functional import FLOATS
from .modules import BinaryConv2d

_ARGUMENTS = ("stride", "padding", "dilation", "groups", "padding_mode", "pad_value")
_PLAIN_CONV2D: Mapping[type[nn.Module], Mapping[str, Any]] = {nn.Conv2d: {}}


def convert(
    model: nn.Module,
    layers: Mapping[type[nn.Module], Mapping[str, Any]] = _PLAIN_CONV2D,
    *,
    keep: Iterable[str] = (),
    keep_first: bool = True,
    keep_last: bool = True,
    **options: Any,
) -> nn.Module:
    """Replaces convolutions of a model by BinaryConv2d, in place, and returns it.

    A new layer takes over the very parameters weight (O, I / groups, KH, KW) and bias (None and
    False are no bias), the mode, and the attributes stride, padding, dilation, groups, padding_mode
    and pad_value as far as the old one has them. Hooks of the old layer are lost.

    Args:
        model: any module; a model that is itself a convolution is replaced, so use what is
            returned.
        layers: which classes to replace, exactly these and not their subclasses, and what options
            BinaryConv2d gets for each, for example
            {nn.Conv2d: {}, other_library.QConv2d: {"weight_scale": None}}.
        keep: names of layers as in `model.named_modules()`, or patterns as "*.downsample.*", to
            leave alone.
        keep_first: leaves the first layer of `layers` or nn.Linear alone, in the order of
            `model.modules()`.
        keep_last: leaves the last one alone; in most networks that is the classifier.
        options: for every BinaryConv2d, unless `layers` says otherwise.

    Raises ValueError for a pattern that matches nothing and for a layer that cannot be binary.
    """
    chosen = _chosen(model, tuple(layers), list(keep), keep_first, keep_last)
    made = {old: _binary(old, name, {**options, **layers[type(old)]}) for name, old in chosen}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # Also where one module has two names.
            if child in made:
                setattr(parent, name, made[child])
    return made.get(model, model)


def _chosen(
    model: nn.Module,
    classes: tuple[type[nn.Module], ...],
    keep: list[str],
    keep_first: bool,
    keep_last: bool,
) -> list[tuple[str, nn.Module]]:
    named = list(model.named_modules())
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"keep: got {pattern!r}, expected the name of a layer or a pattern")
    layers = [(n, m) for n, m in named if type(m) in classes or isinstance(m, nn.Linear)]
    layers = layers[keep_first : len(layers) - keep_last]
    return [
        (name, module)
        for name, module in layers
        if type(module) in classes and not any(fnmatchcase(name, pattern) for pattern in keep)
    ]


def _binary(old: nn.Module, name: str, options: dict[str, Any]) -> BinaryConv2d:
    weight = getattr(old, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 4 or weight.dtype not in FLOATS:
        raise ValueError(
            f"layers: got {name!r} ({type(old).__name__}), expected a float parameter 'weight' of "
            "4 dimensions"
        )
    found = {key: getattr(old, key) for key in _ARGUMENTS if hasattr(old, key)}
    bias = _bias(old, name)
    arguments = {**found, **options}
    groups = int(arguments.get("groups", 1))
    out_channels, in_channels, kernel_height, kernel_width = weight.shape
    try:
        new = BinaryConv2d(
            in_channels * groups,
            out_channels,
            (kernel_height, kernel_width),
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **arguments,
        )
    except ValueError as error:
        raise ValueError(f"layers: got {name!r}, which cannot be binary: {error}") from error
    new.weight, new.bias = weight, bias
    if new.scale is not None:
        with torch.no_grad():
            new.scale.copy_(weight.abs().mean((1, 2, 3)))
    return new.train(old.training)


def _bias(old: nn.Module, name: str) -> nn.Parameter | None:
    bias = getattr(old, "bias", None)
    if bias is None or bias is False:  # Some libraries keep the argument under this name.
        return None
    if not isinstance(bias, nn.Parameter):
        raise ValueError(
            f"layers: got {name!r} ({type(old).__name__}) with a bias of type "
            f"{type(bias).__name__}, expected a parameter, None or False"
        )
    return bias


def store_weights_as_int8(model: nn.Module) -> nn.Module:
    """Makes the weights of every BinaryConv2d BinaryParameters, in place, and returns the model.

    The outputs stay the same: a scale computed from the float weight becomes a learnable one that
    starts there. From then on Bop trains the weights, and any other optimizer the rest.
    """
    for layer in model.modules():
        if isinstance(layer, BinaryConv2d) and layer.weight.is_floating_point():
            layer.store_weight_as_int8()
    return model
