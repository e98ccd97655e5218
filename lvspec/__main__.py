"""`python -m lvspec`, where the `lvspec` command is not on the path."""

import sys

from lvspec.cli import main

if __name__ == "__main__":
    sys.exit(main())
