"""`python -m memlaw` is the command `memlaw`."""

from memlaw.cli import main

if __name__ == "__main__":
    main()
