"""`python -m dman_runtime` is `dman-runtime`."""

import sys

from dman_runtime.cli import main

sys.exit(main())
