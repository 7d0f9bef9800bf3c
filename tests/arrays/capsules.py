"""DLPack producers by hand: the structures of dlpack.h over the memory of a NumPy array."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np

_CPU: Final = 1
_READ_ONLY: Final = 1
_CODES: Final = {"i": 0, "u": 1, "f": 2}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


_DELETER: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER)]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", _DELETER),
        ("flags", ctypes.c_uint64), ("tensor", _Tensor),
    ]  # fmt: skip


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Producer:
    """Gives its array by DLPack alone: version (0, 8), which can't say whether it may be written, or (1, 0).

    given, taken_back: capsules that consumers have got, and those whose deleter they have called.
    """

    def __init__(
        self, array: np.ndarray[Any, Any], version: tuple[int, int], read_only: bool = False, device: int = _CPU
    ) -> None:
        self.array, self._version, self._read_only, self._device = array, version, read_only, device
        self.given = self.taken_back = 0
        self._kept: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **others: Any) -> Any:
        array, size = self.array, self.array.itemsize
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        strides = (ctypes.c_int64 * array.ndim)(*(step // size for step in array.strides))
        tensor = _Tensor(
            array.ctypes.data, self._device, 0, array.ndim, _CODES[array.dtype.kind], 8 * size, 1, shape, strides, 0
        )
        deleter = _DELETER(self._take_back)
        if max_version is not None and self._version >= (1, 0):
            flags = _READ_ONLY if self._read_only else 0
            managed: Any = _ManagedVersioned(*self._version, None, deleter, flags, tensor)
            name = b"dltensor_versioned"
        else:
            managed, name = _Managed(tensor, None, deleter), b"dltensor"
        self._kept += [shape, strides, deleter, managed, name]
        self.given += 1
        return _new_capsule(ctypes.addressof(managed), name, None)

    def _take_back(self, managed: int) -> None:
        self.taken_back += 1
