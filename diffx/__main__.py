"""``python -m diffx``, and so ``torchrun -m diffx``."""

import sys

from diffx.cli import main

sys.exit(main())
