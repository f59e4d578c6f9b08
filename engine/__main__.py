"""``python -m cohobate`` is the command line, so ``torchrun -m cohobate train ...`` works."""

import sys

from cohobate.cli import main

if __name__ == "__main__":
    sys.exit(main())
