"""Tell sets of weights apart: a quick comparison within a process, a checksum on disk."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 16  # numbers of each weight that are compared


def weights_identity(model: nn.Module, device: torch.device) -> Any:
    """Return a value that differs once a model computes something else on a device.

    Places and version counters of the weights are compared, and for writes through `.data`, which
    torch does not count, some numbers of each; adapters of PEFT and the dtype of autocast as well.
    """
    weights = [*model.parameters(), *model.buffers()]
    counted = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
    samples: dict[Any, list[Tensor]] = {}
    for weight in weights:
        values = weight.detach().reshape(-1)
        some = values[:: max(1, len(values) // _SAMPLED)]
        samples.setdefault((weight.device, weight.dtype), []).append(some)
    numbers = [
        torch.cat(some).view(torch.uint8).cpu().numpy().tobytes() for some in samples.values()
    ]
    peft = [
        (module.disable_adapters, module.active_adapters, getattr(module, "scaling", None))
        for module in model.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters")
    ]
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return id(model), counted, numbers, str(peft), autocast


def weights_checksum(model: nn.Module, device: torch.device) -> str:
    """Return a checksum of all that decides what a model computes on a device.

    Weights and buffers with their names, the settings of a model of transformers, adapters of PEFT,
    and the dtype of autocast; read whole, which takes about a second per gigabyte.
    """
    sha = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        sha.update(values.view(-1).view(torch.uint8).numpy().data)
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    for name in ("_name_or_path", "transformers_version", "_attn_implementation"):
        settings.pop(name, None)
    *_, adapters, autocast = weights_identity(model, device)
    sha.update(repr((type(model).__name__, sorted(settings.items(), key=str))).encode())
    sha.update(f"{adapters} {autocast}".encode())
    return sha.hexdigest()
