"""Tensors on an accelerator, by a stand-in: its memory is the host's, but copies marked as non-blocking are made when
``torch.cuda.synchronize`` is called, as late as a real device may. No accelerator takes part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from replicas import Replicas, bits, copied

import pyccl
from pyccl.optim import DiLoCo, NoLoCo, StreamingDiLoCo
from pyccl.optim.params import Params


class OnDevice(torch.Tensor):
    """Says that it is on an accelerator; its values go in by ``copy_`` and out by that and ``cpu`` alone."""

    kind = "cuda:0"
    queues: dict[str, list[Callable[[], Any]]]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self.kind)

    def cpu(self, *_: Any) -> torch.Tensor:
        return plain(self)

    def numpy(self) -> Any:
        raise TypeError("can't convert a tensor on another device to numpy")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = dict(kwargs or {})
        if func is torch.Tensor.copy_ and told.pop("non_blocking", False):
            to, source = (x.as_subclass(torch.Tensor) for x in args)
            OnDevice.queues.setdefault(cls.kind, []).append(lambda: to.copy_(source))
            return args[0]
        return super().__torch_function__(func, types, args, told)


class OnSecond(OnDevice):
    kind = "cuda:1"


class Elsewhere(OnDevice):
    kind = "xpu:0"


class Stand:
    """What was asked of torch: staging buffers that were to be pinned, devices that were waited for."""

    def __init__(self) -> None:
        self.pinned: list[bool] = []
        self.waited: list[str] = []

    def empty(self, *shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        self.pinned.append(pin_memory)  # which needs an accelerator
        return EMPTY(*shape, **options)

    def synchronize(self, device: torch.device) -> None:
        self.waited.append(str(device))
        for copy in OnDevice.queues.pop(str(device), []):
            copy()


EMPTY = torch.empty


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.setattr(OnDevice, "queues", {}, raising=False)
    monkeypatch.setattr(torch, "empty", stand.empty)
    monkeypatch.setattr(torch.cuda, "synchronize", stand.synchronize)
    return stand


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_on_a_device_is_staged_in_pinned_memory_and_waited_for(stand: Stand, dtype: torch.dtype) -> None:
    tensors = {name: torch.randn(7).to(dtype).as_subclass(OnDevice) for name in ("a", "b")}
    host = torch.randn(3)
    params = Params([*tensors.items(), ("host", host)])
    assert stand.pinned == [True, True]
    values, g = params.vectors(), params.vectors()
    params.read(values)
    assert stand.waited == ["cuda:0"]  # once for all of a device
    for name, tensor in tensors.items():
        assert values.views[name].tolist() == plain(tensor).float().tolist()
    (vector,) = values.vectors
    vector *= np.float32(2)
    params.write(values)
    assert stand.waited == ["cuda:0"] * 2
    for name, tensor in tensors.items():
        assert torch.equal(plain(tensor), torch.from_numpy(values.views[name]).to(dtype))
    assert torch.equal(host, torch.from_numpy(values.views["host"]))
    for tensor in tensors.values():
        plain(tensor).sub_(1)
    params.pseudo_gradient(values, g)
    assert stand.waited == ["cuda:0"] * 3 and not OnDevice.queues
    for name, tensor in tensors.items():
        expected = torch.from_numpy(values.views[name]).to(dtype).float() - plain(tensor).float()
        assert g.views[name].tolist() == expected.tolist()


def test_each_device_is_waited_for_and_other_kinds_copy_at_once_without_pinned_memory(stand: Stand) -> None:
    one, two = (torch.zeros(2).as_subclass(kind) for kind in (OnDevice, OnSecond))
    other = torch.zeros(2).as_subclass(Elsewhere)
    params = Params([("one", one), ("other", other), ("two", two)])
    assert stand.pinned == [True, False, True]
    values = params.vectors()
    values.vectors[0][:] = np.arange(6)
    params.write(values)
    assert sorted(stand.waited) == ["cuda:0", "cuda:1"]
    assert [plain(tensor).tolist() for tensor in (one, other, two)] == [[0, 1], [2, 3], [4, 5]]


def test_tied_tensors_on_a_device_are_exchanged_once(stand: Stand) -> None:
    tensor = torch.zeros(2).as_subclass(OnDevice)
    params = Params([("a", tensor), ("b", tensor.detach())])
    assert params.aliases == {"b": "a"} and params.names == ("a",)


def test_a_state_is_kept_on_the_host_and_loaded_from_wherever_a_file_was_read_to(
    replicas: Replicas, stand: Stand
) -> None:
    (comm,) = replicas.members(1)
    opt = DiLoCo(comm, {"a": torch.randn(5).as_subclass(OnDevice), "b": np.zeros(3, np.float32)}, 2)
    state = opt.state_dict()
    for arrays in (state["theta"], state["buffers"]["momentum"]):
        assert (type(arrays["a"]), type(arrays["b"])) == (torch.Tensor, np.ndarray)
    read = torch.randn(5).as_subclass(OnDevice).requires_grad_()
    opt.load_state_dict(state | {"theta": {"a": read, "b": torch.ones(3)}})
    assert opt.theta["a"].tolist() == plain(read).tolist() and opt.theta["b"].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda comm, params: DiLoCo(comm, params, 2),
        lambda comm, params: StreamingDiLoCo(comm, params, 4, fragments=2, delay=1, alpha=0.5),
        lambda comm, params: NoLoCo(comm, params, 2),
    ],
    ids=["DiLoCo", "StreamingDiLoCo", "NoLoCo"],
)
def test_an_optimizer_of_tensors_on_a_device_does_what_it_does_on_the_host(
    replicas: Replicas, stand: Stand, make: Callable[[pyccl.Communicator, Any], Any]
) -> None:
    def train(comm: pyccl.Communicator, rank: int, kind: type[torch.Tensor]) -> Any:
        generator = torch.Generator().manual_seed(5)
        values = {name: torch.randn(6, generator=generator) for name in ("a", "b")}
        opt = make(comm, {name: value.as_subclass(kind) for name, value in values.items()})
        for step in range(8):
            for value in values.values():
                value.add_((rank + 1.0) * (step - 3.5) / 8 - value * 0.1)
            opt.step()
        opt.finish()
        return copied(opt.theta), copied({name: value.numpy() for name, value in values.items()})

    on_device = replicas.run(2, lambda comm, rank: train(comm, rank, OnDevice))
    assert stand.waited
    waited = len(stand.waited)
    again = Replicas(replicas.address)
    try:
        on_host = again.run(2, lambda comm, rank: train(comm, rank, torch.Tensor))
    finally:
        again.close()
    assert len(stand.waited) == waited
    for (theta, live), (theta_host, live_host) in zip(on_device, on_host, strict=True):
        assert bits(theta) == bits(theta_host) and bits(live) == bits(live_host)
