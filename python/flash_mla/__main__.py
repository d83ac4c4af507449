"""``python -m flash_mla`` is the command ``flash-mla``."""

import sys

from .cli import main

sys.exit(main())
