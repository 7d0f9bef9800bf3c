"""Churn stress: real processes, faults on purpose from a seed, an oracle that checks every value. ``pyccl stress``.

workload   what a round does, as a pure function of (seed, revision, number of the process)
peer       one process of the run; reports what it got and judges nothing
oracle     what must be true of the reports; pure
faults     what is done to the run, each kind an object; network: what stands between the processes
conductor  starts, faults, listens, watches for progress
report     what it cost; pure
"""
