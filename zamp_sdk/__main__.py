"""``python -m zamp_sdk``."""

from .cli import main

raise SystemExit(main())
