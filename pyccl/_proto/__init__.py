"""Sans-IO protocol machines: messages, membership, election. Standard library only; no socket, clock or randomness.

Why apart: a whole cluster of these runs in one process under a virtual clock from one seed, and the Trio shells in
``_io`` that drive them in production decide nothing. Messages in, effects out; time is an argument.
"""
