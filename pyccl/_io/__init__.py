"""The Trio shells: sockets, timers and threads for the machines of ``_proto``. They carry out, they decide nothing."""
