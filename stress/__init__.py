"""Entry of the churn stress harness; what it does is in `pyccl.stress`, which is installed with the library."""
