"""How long idle OpenMP threads spin before they sleep; to be settled before torch is imported.

Between two parallel regions OpenMP's threads wait by spinning, libgomp's for some milliseconds.
Beside other processes on the same cores they spin on time that those could have used: four
calibrations at once take far more than four times as long as one. The number of threads stays
what it is, because the order of sums, and so the bytes of a bundle, depend on it.
"""

from __future__ import annotations

import os
import sys

__all__ = ["shorten_idle_spinning"]

# Whoever has set one of these has decided: the standard's variable, libgomp's and libiomp's.
_DECIDED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Some 0.1 ms: longer than the gaps between operators, shorter than a time slice of the system.
# libgomp (Linux) counts turns of its loop, libiomp (macOS, Windows, conda) milliseconds.
_SETTINGS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


def shorten_idle_spinning() -> bool:
    """Let OpenMP's threads sleep soon when they have nothing to do, in this process and children.

    Only the commands and their workers call this: a library does not change the environment of
    the program that uses it.

    Returns:
        Whether anything was set: not where the user has set how threads wait, and not where
        torch, which reads the variables once, is there already.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _DECIDED):
        return False
    os.environ.update(_SETTINGS)
    return True
