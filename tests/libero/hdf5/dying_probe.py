"""The program of `hdf5.probe`, with a library that does not survive some files, told by their names.

Which damage it is that kills depends on the version of the library; this does not.
"""

import os
import signal

from worldvla_libero.hdf5 import probe

walk = probe._walk
poisoned = False


def dying_walk(path: str) -> None:
    global poisoned
    if "crash" in path or poisoned:
        os.kill(os.getpid(), signal.SIGSEGV)
    while "endless" in path:
        pass
    if "exit" in path:
        os._exit(3)
    poisoned = "poison" in path
    walk(path)


if __name__ == "__main__":
    probe._walk = dying_walk
    probe._serve()
