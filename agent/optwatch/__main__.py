"""``python -m optwatch``: the same as the `optwatch` command."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
