"""What is compared: every way of training as a name, an optimizer of pyccl.optim and its arguments.

Arguments that are not the optimizer's defaults were tuned once, at H 50, with a seed that is not in the results
(docs/optimizers.md, "Experiments").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pyccl
from pyccl import optim

H = 50  # inner steps of a round, where it is not about that
P, DELAY, ALPHA = 5, 8, 0.5  # of streaming
KILL_EVERY = 5  # rounds


@dataclass(frozen=True, slots=True)
class Variant:
    """optimizer: of pyccl.optim; None: gradients are averaged at every step.

    peers: replicas; the tokens of a step are the same for any number. kill_every: rounds between two kills; 0: none.
    """

    name: str
    optimizer: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    peers: int = 4
    kill_every: int = 0

    def make(self, comm: pyccl.Communicator, params: Any) -> optim.OuterOptimizer | None:
        """Collective where there are others."""
        if self.optimizer is None:
            return None
        made: optim.OuterOptimizer = getattr(optim, self.optimizer)(comm, params, **self.options)
        return made

    @property
    def is_per_replica(self) -> bool:
        """Whether replicas end with weights of their own."""
        return self.optimizer == "NoLoCo" or bool(self.options.get("eager"))

    @property
    def sync_every(self) -> int:
        return int(self.options.get("sync_every", 1))


def _diloco(name: str, sync_every: int = H, peers: int = 4, kill_every: int = 0, **options: Any) -> Variant:
    options = {"sync_every": sync_every, "outer_lr": 0.7, "outer_momentum": 0.6, **options}
    return Variant(f"DiLoCo{name}", "DiLoCo", options, peers, kill_every)


def _late(name: str, **options: Any) -> Variant:
    return Variant(name, "AsyncDiLoCo", {"sync_every": H, "outer_lr": 0.4, "outer_momentum": 0.6, **options})


def _streaming(name: str, **options: Any) -> Variant:
    options = {"sync_every": H, "fragments": P, "outer_lr": 0.7, "outer_momentum": 0.6, **options}
    return Variant(f"streaming{name}", "StreamingDiLoCo", options)


_FP4: Final = {"quantize": "fp4_e3m0"}
_OVERLAP: Final = {"delay": DELAY, "alpha": ALPHA}
_EVERY_STEP: Final = {"sync_every": 1, "outer_lr": 1.0, "outer_momentum": 0.0}  # the mean of what Adam changed
ALL: Final = (
    Variant("every step", None),
    Variant("LocalSGD", "LocalSGD", {"sync_every": H}),
    _diloco(", H 10", 10),
    _diloco(""),
    _diloco(", H 100", 100),
    _late("late"),
    _late("eager", eager=True),
    _streaming(""),
    _streaming(", uint8", quantize="uint8"),
    _streaming(", fp4", **_FP4),
    _streaming(", overlap", **_OVERLAP),
    _streaming(", overlap, uint8", quantize="uint8", **_OVERLAP),
    _streaming(", overlap, fp4", **_FP4, **_OVERLAP),
    Variant("NoLoCo", "NoLoCo", {"sync_every": H}),
    Variant("NoLoCo, 8 peers", "NoLoCo", {"sync_every": H}, peers=8),
    _diloco(", kills", kill_every=KILL_EVERY),
    _diloco(", fp4", **_FP4),
    _diloco(", fp4, feedback", **_FP4, error_feedback=True),
    _diloco(", H 1", **_EVERY_STEP),
    _diloco(", H 1, fp4", **_EVERY_STEP, **_FP4),
    _diloco(", H 1, fp4, feedback", **_EVERY_STEP, **_FP4, error_feedback=True),
)
CANDIDATES: Final = (  # what arguments were chosen from, or might have been
    *(_streaming(f", delay {delay}, alpha {alpha}", delay=delay, alpha=alpha)
      for delay, alpha in ((2, 0.5), (5, 0.5), (8, 0.0), (8, 0.25))),
    _diloco(", heavy-ball 0.5", outer_momentum=0.5, nesterov=False),  # what the mean of NoLoCo follows
    _diloco(", 8 peers", peers=8),
    _diloco(", 3 peers", peers=3),  # with --batch 96
    Variant("NoLoCo, beta 1", "NoLoCo", {"sync_every": H, "beta": 1.0}),
    *(_diloco(f", lr {lr}, mu {mu}", outer_lr=lr, outer_momentum=mu) for lr, mu in ((0.7, 0.9), (1.0, 0.3))),
    *(_streaming(f", lr {lr}, mu {mu}", outer_lr=lr, outer_momentum=mu) for lr, mu in ((0.4, 0.9),)),
    *(_late(f"{name}, lr {lr}, mu {mu}", eager=name == "eager", outer_lr=lr, outer_momentum=mu)
      for name in ("late", "eager") for lr, mu in ((0.4, 0.9), (0.7, 0.3), (0.7, 0.0))),
)  # fmt: skip
BY_NAME: Final = {variant.name: variant for variant in (*ALL, *CANDIDATES)}
