"""State dicts without tied duplicates.

Tied tensors (T5's embedding and head, an encoder shared by questions and passages) are one tensor
under several names. safetensors refuses such a dict, so one name of each group is saved, the first;
loading gives the other names back before modules look for them, so that `strict=True` holds.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def keep_one_name_per_tensor(module: nn.Module) -> None:
    """Leave tied duplicates out of `module.state_dict()`, and restore them when it is loaded."""
    module.register_state_dict_post_hook(_drop_aliases)
    module.register_load_state_dict_pre_hook(_restore_aliases)


def tied_names(module: nn.Module) -> list[list[str]]:
    """Return the groups of names that stand for one parameter or buffer, in definition order."""
    names: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(module):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _drop_aliases(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: Any
) -> None:
    for _, *aliases in tied_names(module):
        for name in aliases:
            state_dict.pop(prefix + name, None)


def _restore_aliases(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_report: Any
) -> None:
    for group in tied_names(module):
        stored = [state_dict[prefix + name] for name in group if prefix + name in state_dict]
        if stored:
            for name in group:
                state_dict.setdefault(prefix + name, stored[0])
