"""`python -m trackpl` is the command `trackpl`."""

import sys

from trackpl.cli import main

sys.exit(main())
