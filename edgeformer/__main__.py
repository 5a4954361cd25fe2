"""`python -m edgeformer`: the same as `edgeformer`."""

import sys

from edgeformer.cli import main

sys.exit(main())
