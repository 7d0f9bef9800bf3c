"""Low-communication training: replicas train alone and exchange every now and then. See docs/optimizers.md."""

from pyccl.optim.base import OuterOptimizer
from pyccl.optim.diloco import AsyncDiLoCo, DiLoCo
from pyccl.optim.group import Stats
from pyccl.optim.local_sgd import LocalSGD
from pyccl.optim.noloco import NoLoCo
from pyccl.optim.streaming import StreamingDiLoCo

__all__ = ["AsyncDiLoCo", "DiLoCo", "LocalSGD", "NoLoCo", "OuterOptimizer", "Stats", "StreamingDiLoCo"]
