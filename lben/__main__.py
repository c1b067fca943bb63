"""`python -m lben`."""

import sys

from lben.cli import main

sys.exit(main())
