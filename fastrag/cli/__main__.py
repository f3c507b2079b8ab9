"""`python -m fastrag.cli`: the command `fastrag`."""

import sys

from fastrag.cli import main

if __name__ == "__main__":
    sys.exit(main())
