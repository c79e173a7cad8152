"""`python -m iet_finetune` is the command `iet-finetune`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
