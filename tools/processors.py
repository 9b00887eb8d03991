"""Do the tests hold on processors with other instructions, and with other numbers of threads?

    uv run python tools/processors.py [PATH_OR_PYTEST_OPTION ...]   default: tests/tokenizers tests/model

Runs the everyday tests once under each setting below and prints a line for each; exit status 1 if one is red.
The libraries choose their instructions by these variables when they are loaded, so each run is a fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = ["tests/tokenizers", "tests/model"]
SETTINGS = [
    {"ATEN_CPU_CAPABILITY": "default"},  # torch's own kernels without AVX
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},  # convolutions
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},  # matrix products
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
]


def main(arguments: list[str]) -> int:
    """Run each setting; returns 1 if one is red, else 0."""
    failed = False
    for setting in SETTINGS:
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *(arguments or PATHS)],
            cwd=ROOT,
            env={**os.environ, **setting},
            capture_output=True,
            text=True,
        )
        failed |= ran.returncode != 0
        if ran.returncode != 0:
            print(ran.stdout[-8_000:], ran.stderr[-2_000:], sep="\n")
        last = ran.stdout.strip().splitlines()[-1:] or ["no output"]
        told = " ".join(f"{name}={value}" for name, value in setting.items())
        print(f"{told:<36} {last[0].strip('= ')}  ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
