"""Weights that are stored in one byte each and trained on stock PyTorch, and their optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class BinaryParameter(nn.Parameter):
    """A parameter of signs, int8 and one byte a value, that takes a float32 gradient.

    PyTorch lets floating-point tensors alone require gradients, so autograd gets a stand-in:
    `leaf`, a float32 tensor of the same shape whose values nobody reads and which takes four bytes
    in all, as its strides are 0. BinaryConv2d and BinaryConv2dCutlass send the gradient of the
    signs to the leaf, and `grad` is the leaf's. A tensor subclass that pretends to be float32 would
    make every operation, file and collective handle a type of its own; this is an int8 tensor
    everywhere, in a state_dict too.

    Known to: optimizers (`grad`, `zero_grad`), GradScaler, clip_grad_norm_, deepcopy, pickle and
    Module.to. Not known to: DistributedDataParallel and fully_shard, as `requires_grad` is False;
    there `Bop(process_group=...)` averages the gradients, and fully_shard wants
    `ignored_params=set(binary_parameters(model))`. torch.compile refuses to trace a tensor with a
    gradient of another type: set gradients to None before what may trace anew, by `zero_grad()`
    after `step()`, say, and before the first evaluation.

    Args:
        data: any real tensor; values >= 0 become +1, others, NaN included, -1.
    """

    def __new__(cls, data: Tensor) -> BinaryParameter:  # noqa: D102
        signs = torch.where(data.detach() >= 0, 1, -1).to(torch.int8)
        return torch.Tensor._make_subclass(cls, signs, False)

    @property
    def leaf(self) -> Tensor:
        """The float32 tensor that takes the gradient."""
        old: Tensor | None = self.__dict__.get("_leaf")
        if old is not None and old.device == self.device:
            return old
        with torch.inference_mode(False):
            leaf = torch.zeros((), device=self.device).expand(self.shape).requires_grad_()
        if old is not None and old.grad is not None:
            leaf.grad = old.grad.to(self.device)
        self.__dict__["_leaf"] = leaf
        return leaf

    @property
    def grad(self) -> Tensor | None:
        """The gradient with respect to the signs, float32, or None."""
        return self.leaf.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.leaf.grad = value

    def __deepcopy__(self, memo: dict[int, Any]) -> BinaryParameter:
        copied = BinaryParameter(self.data)
        copied.grad = None if self.grad is None else self.grad.clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return BinaryParameter, (self.data,)


def binary_parameters(model: nn.Module) -> Iterator[BinaryParameter]:
    """The int8 weights of a model, for Bop; all its other parameters are for any optimizer."""
    return (p for p in model.parameters() if isinstance(p, BinaryParameter))


class Bop(torch.optim.Optimizer):
    """The binary optimizer: flips signs where the gradient insists (Helwegen et al., 2019).

    With the gradient g of a sign w, its moving average m = (1 - gamma) m + gamma g, starting at 0:
    w becomes -w where |m| > threshold and m has the sign of w (Latent Weights Do Not Exist:
    Rethinking Binarized Neural Network Optimization, arXiv:1906.02107, algorithm 1). A larger gamma
    adapts faster, a larger threshold flips less. There is no learning rate; to calm training down,
    lower gamma as others lower the learning rate. m takes four bytes a weight.

    DiodeMix of bitorch-engine keeps l = beta1 l + (1 - beta1) g and
    s = beta2 s + (1 - beta2) lr sign(l), and sets w to -sign(s). Bop with gamma = 1 - beta1 and
    threshold 0 sets w to -sign(l); the second average only delays a flip, by about
    |s| / ((1 - beta2) lr) steps of one sign, which is what the threshold does here.

    Args:
        params: BinaryParameters, or float tensors whose signs count; or param groups of them.
        gamma: from 0 to 1.
        threshold: at least 0.
        process_group: if given, gradients are averaged over it before they are used: needed for
            BinaryParameters, which DistributedDataParallel leaves out, and for nothing else. A deep
            copy has the same group; an optimizer with one cannot be pickled, its state_dict can.
            With GradScaler or clip_grad_norm_ call `average_gradients()` first.

    Beside it, any optimizer for the float parameters:

        binary = list(binary_parameters(model))
        others = [p for p in model.parameters() if p.requires_grad]
        optimizers = Bop(binary), torch.optim.AdamW(others)
    """

    def __init__(
        self,
        params: Any,
        gamma: float = 1e-4,
        threshold: float = 1e-8,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(params, {"gamma": gamma, "threshold": threshold})
        self.process_group = process_group

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"process_group": self.process_group}

    def __deepcopy__(self, memo: dict[int, Any]) -> Bop:
        memo[id(self.process_group)] = self.process_group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any optimizer; the averages stay float32, whatever type the weights have."""
        given: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, state: given.update(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        # PyTorch has cast them to the type of the weights.
        for saved, group in zip(given["param_groups"], self.param_groups, strict=True):
            for key, weight in zip(saved["params"], group["params"], strict=True):
                if key in given["state"]:
                    average = given["state"][key]["average"]
                    self.state[weight]["average"] = average.to(weight.device, torch.float32)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; a group may have its own gamma and threshold."""
        gamma = param_group.get("gamma", self.defaults["gamma"])
        threshold = param_group.get("threshold", self.defaults["threshold"])
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma: got {gamma!r}, expected a number from 0 to 1")
        if not threshold >= 0:
            raise ValueError(f"threshold: got {threshold!r}, expected a number of at least 0")
        super().add_param_group(param_group)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Averages the gradients over the process group; without one it does nothing.

        step() does so by itself. Call it after backward, before whatever decides by the gradients:
        GradScaler's unscale_ and step, as a rank that alone met an infinite gradient would skip the
        step that the others wait for it in, and clip_grad_norm_, which would take each rank's own
        norm. step() then averages what is the same everywhere already, which is harmless.
        """
        if self.process_group is None:
            return
        size = torch.distributed.get_world_size(self.process_group)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    torch.distributed.all_reduce(weight.grad, group=self.process_group)
                    weight.grad.div_(size)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Flips; returns what the closure, if any, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.average_gradients()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._flip(weight, group["gamma"], group["threshold"])
        return loss

    def _flip(self, weight: Tensor, gamma: float, threshold: float) -> None:
        grad = weight.grad
        assert grad is not None
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight, dtype=torch.float32)
        average = state["average"].lerp_(grad.float(), gamma)
        agrees = torch.where(weight >= 0, average > threshold, average < -threshold)
        # The negative of a float zero would be one, whose sign is +1 as well.
        weight.copy_(torch.where(agrees, torch.where(weight == 0, -1, -weight), weight))
