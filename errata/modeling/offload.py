"""Models that are larger than their device: blocks in main memory or on the disk, moved in by accelerate's hooks for the length of a call.

Their parameters are on torch's meta device in between. What reads or replaces one goes through here. accelerate and psutil are imported
where they are needed: a served version travels with this module and without them.
"""

import copy
from collections import ChainMap
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

DeviceMap = dict[str, str | int | torch.device]
_LEFT = 0.5
"""Share of the device's free memory, and of the main memory's, that weights leave to what is computed with them."""


def spread_blocks(model: PreTrainedModel, device: torch.device, free: dict[str | int, int]) -> DeviceMap:
    """Which modules go where: in the order of the model to `device`, then to main memory, then to the disk. One device computes all.

    Args:
        model: without its weights (`errata.plan.sketch_model`).
        free: bytes free on the device, under its index, and in main memory, under `cpu`.
    """
    from accelerate import infer_auto_device_map

    room = {place: int(size * (1 - _LEFT)) for place, size in free.items()}
    found = infer_auto_device_map(model, max_memory=room, no_split_module_classes=sorted(model._no_split_modules or ()))
    return {name: device if place == (device.index or 0) else place for name, place in found.items()}


def list_free(device: torch.device) -> dict[str | int, int]:
    """Bytes free in main memory, under `cpu`, and on an accelerator, under its index."""
    import psutil

    free: dict[str | int, int] = {"cpu": psutil.virtual_memory().available}
    if device.type == "cuda":
        free[device.index or 0] = torch.cuda.mem_get_info(device)[0]
    return free


def list_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters, each tensor once, under the first of its names: as `named_parameters` has them while nothing is offloaded.
    After a call, tied parameters on the meta device are no longer one."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, str] = {}
    for name, _ in model.named_parameters():
        found.setdefault(tied.get(name, name), name)
    return list(found.values())


def read_parameter(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter's values; those of one that is offloaded are read in, to the CPU."""
    parameter = model.get_parameter(name)
    if parameter.device.type != "meta":
        return parameter.detach()
    from accelerate.utils import align_module_device

    place = name.rpartition(".")[0]
    with align_module_device(model.get_submodule(place), torch.device("cpu")):
        return model.get_parameter(name).detach().clone()


def find_device(module: nn.Module) -> torch.device:
    """Where a module computes."""
    device = next(module.parameters()).device
    return torch.device(module._hf_hook.execution_device) if device.type == "meta" else device  # type: ignore[union-attr, arg-type]


def swap_parameter(model: nn.Module, name: str, weight: torch.Tensor) -> Any:
    """Put `weight` in the place of a parameter, whose own values are left alone; what `restore_parameter` takes."""
    parameter = model.get_parameter(name)
    if parameter.device.type != "meta":
        before = parameter.data
        parameter.data = weight
        return before
    place, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(place)
    before = module._hf_hook
    hook = copy.copy(before)
    hook.weights_map = ChainMap({leaf: weight}, before.weights_map)
    module._hf_hook = hook
    return before


def restore_parameter(model: nn.Module, name: str, before: Any) -> None:
    """Undo `swap_parameter`."""
    if isinstance(before, torch.Tensor):
        model.get_parameter(name).data = before
    else:
        model.get_submodule(name.rpartition(".")[0])._hf_hook = before
