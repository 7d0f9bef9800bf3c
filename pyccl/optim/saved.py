"""What a ``state_dict()`` must hold: all is looked at before anything is loaded, so that a bad one changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyccl.errors import UsageError
from pyccl.optim.params import Vectors

Array = np.ndarray[Any, Any]


def load(vectors: Vectors, arrays: Mapping[str, Any]) -> None:
    """What ``check_arrays`` found right."""
    for name, view in vectors.views.items():
        np.copyto(view, _array(arrays[name]))


def entry(state: Any, *path: str) -> Any:
    """state[path[0]][path[1]]... UsageError: there is none."""
    for depth, name in enumerate(path, 1):
        if not isinstance(state, Mapping) or name not in state:
            raise UsageError(f"load_state_dict: {'/'.join(path[:depth])} is missing")
        state = state[name]
    return state


def check_arrays(vectors: Vectors, state: Any, *path: str) -> None:
    """UsageError unless there is an array of the same dtype and shape for every name of `vectors`."""
    for name, view in vectors.views.items():
        where = "/".join((*path, name))
        value = entry(state, *path, name)
        try:
            found = _array(value)
        except (TypeError, ValueError, RuntimeError) as e:
            raise UsageError(f"load_state_dict: {where} is no array: {e}") from e
        if (found.dtype, found.shape) != (view.dtype, view.shape):
            raise UsageError(f"load_state_dict: {where} is {_told(found)}, {_told(view)} is needed")


def check_counts(count: int, state: Any, *path: str) -> None:
    """UsageError unless it is a list of so many whole numbers, as int64 has them, none of them negative."""
    found = entry(state, *path)
    values = list(found) if isinstance(found, list | tuple) else []
    if len(values) != count or not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise UsageError(f"load_state_dict: {'/'.join(path)} is {found!r}, {count} counts are needed")


def _array(value: Any) -> Array:
    """A tensor may be on an accelerator: ``torch.load`` puts it where its `map_location` says."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _told(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"
