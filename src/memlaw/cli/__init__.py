"""The command line: a module for each command, which parses, calls one function and prints.

In: words. Out: text, and an exit status. May import everything; nobody imports it.
"""

from memlaw.cli.dispatch import main, run

__all__ = ["main", "run"]
