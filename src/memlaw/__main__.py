"""`python -m memlaw` is the command `memlaw`."""

import sys

from memlaw.cli import main

if __name__ == "__main__":
    sys.exit(main())
