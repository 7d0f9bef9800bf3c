"""``pyccl doctor``: what stands in the way of taking part in a run from this machine, and what to do about it."""
