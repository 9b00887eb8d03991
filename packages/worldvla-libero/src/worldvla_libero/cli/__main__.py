"""`python -m worldvla_libero.cli`, for launchers that start modules: `accelerate launch`, `torchrun`."""

import sys

from worldvla_libero.cli.main import main

sys.exit(main())
