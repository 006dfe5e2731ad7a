"""How much memory autograd keeps for backward."""

import torch


def bytes_kept(function, *ignored):
    """Bytes of the distinct tensors that autograd keeps while the function runs."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    for tensor in ignored:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())
