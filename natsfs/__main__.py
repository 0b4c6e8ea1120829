"""`python -m natsfs` is the command natsfs."""

from __future__ import annotations

import sys

from natsfs.cli import main

if __name__ == "__main__":
    sys.exit(main())
