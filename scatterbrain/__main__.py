"""`python -m scatterbrain`: the library's command line."""

from __future__ import annotations

import sys

from scatterbrain.tuning.command import main

if __name__ == "__main__":
    sys.exit(main())
