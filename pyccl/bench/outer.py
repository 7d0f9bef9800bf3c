"""``pyccl bench outer``: the arithmetic of an outer step on one thread, beside copying memory.

Rates are GiB that a pass reads and writes in a second, counted once for each array it touches: theta - w reads two and
writes one, an outer step with momentum reads three and writes two, mixing reads two and writes one, a step of gossip in
a pair reads five and writes two, a copy reads one and writes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl.bench.figures import Summary
from pyccl.bench.kernels import SAMPLE_S, sample
from pyccl.optim import gossip, rules
from pyccl.optim.params import Params

COPY: Final = "memcpy"


@dataclass(frozen=True, slots=True)
class Rate:
    """GiB read and written a second; of_copy: as a share of what a copy of arrays of that size makes."""

    what: str
    gib_per_s: Summary
    of_copy: float

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "gib_per_s": self.gib_per_s.to_json(), "of_copy": self.of_copy}


def measure(size_bytes: int, sample_s: float = SAMPLE_S) -> list[Rate]:
    """Every rule on float32 vectors of this size."""
    count = max(size_bytes // 4, 1)
    rng = np.random.default_rng(1)
    theta, momentum, g, w, other = (rng.standard_normal(count, np.float32) for _ in range(5))
    params = Params({"w": w})
    vectors, out = params.vectors(), params.vectors()
    vectors.vectors[0][:] = theta

    def step(b: Any, nesterov: bool) -> Callable[[], object]:
        return lambda: rules.outer_sgd(theta, b, g, lr=1e-6, mu=0.9, nesterov=nesterov)

    runs: dict[str, tuple[int, Callable[[], object]]] = {
        COPY: (2, lambda: np.copyto(g, w)),
        "theta - w": (3, lambda: params.pseudo_gradient(vectors, out)),
        "outer step, Nesterov": (5, step(momentum, nesterov=True)),
        "outer step, heavy-ball": (5, step(momentum, nesterov=False)),
        "outer step, SGD": (3, step(None, nesterov=False)),
        "eager": (4, lambda: rules.eager(g, theta, w, 4)),
        "mix": (3, lambda: rules.mix(w, theta, 0.5)),
        "gossip step, pair": (
            7, lambda: gossip.gossip_step(theta, momentum, [g, w], [theta, other], alpha=0.5, beta=1e-6, gamma=0.7)
        ),
    }
    found = {what: sample(run, arrays * 4 * count, sample_s) for what, (arrays, run) in runs.items()}
    return [Rate(what, rate, rate.median / found[COPY].median) for what, rate in found.items()]
