"""The command line: parse, call one function, print. Nobody imports it."""

from memlaw.cli.dispatch import main, run

__all__ = ["main", "run"]
