"""``pyccl bench``: measurements that print the machine, the versions, the command and the spread with every figure.

``figures`` is pure (what is made of raw times) and ``machine`` tells where they were taken. Benchmarks of one process:
``kernels``, ``digest``. Benchmarks of a group: ``all_reduce`` and ``churn`` (join, sync, loss) run in the command's
process and judge; ``conductor`` owns the child processes; ``peer`` is what these run, with ``reduce_peer``, ``gloo``,
``wire`` and ``member``; they read their stdin by ``control``. Nothing here is imported by the library.

Clocks: every time is CLOCK_MONOTONIC, one clock for all processes of a machine, so times of different ranks may be
compared. Nothing sleeps to be in step: processes meet in barriers, or by lines on their pipes.
"""
