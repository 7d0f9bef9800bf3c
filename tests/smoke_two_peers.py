"""Two peers sum a vector through an installed pyccl: the least that a wheel must do. Run it as a script, anywhere.

It imports nothing of this repository, only what is installed.
"""

from __future__ import annotations

import subprocess
import sys

LISTENING = "listening on "
TIMEOUT_S = 60
PEER = """
import sys, numpy as np, pyccl
with pyccl.connect(sys.argv[1]) as comm:
    while comm.group_world_size < 2:
        comm.update_topology()
    x = np.arange(100_000, dtype=np.float32)
    state = pyccl.SharedState({"x": x}, revision=0)
    comm.sync_shared_state(state)
    info = comm.all_reduce(x, op="sum")
    assert info.world_size == 2, info
    assert np.array_equal(x, 2 * np.arange(100_000, dtype=np.float32)), x
    state.revision += 1
    print(state.digest())
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start a Python process that imports the installed package."""
    return subprocess.Popen([sys.executable, "-P", *arguments], stdout=subprocess.PIPE, text=True)


def main() -> None:
    """Run master and peers; raise if anything is not as it should be."""
    master = start("-m", "pyccl.cli.master", "--listen", "127.0.0.1:0")
    processes = [master]
    try:
        assert master.stdout is not None
        line = master.stdout.readline()
        assert line.startswith(LISTENING), line
        peers = [start("-c", PEER, line.removeprefix(LISTENING).strip()) for _ in range(2)]
        processes += peers
        digests = [peer.communicate(timeout=TIMEOUT_S)[0].strip() for peer in peers]
        assert [peer.returncode for peer in peers] == [0, 0], [peer.returncode for peer in peers]
        assert len(set(digests)) == 1, digests
        master.terminate()
        assert master.wait(TIMEOUT_S) == 0, master.returncode
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
    sys.stdout.write(f"two peers agree: {digests[0]}\n")


if __name__ == "__main__":
    main()
