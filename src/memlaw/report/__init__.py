"""The report: one page, or figures and tables, that show what is remembered.

In: folders and files that the other commands wrote. Out: HTML, PNG, SVG, Markdown. May import
whatever needs no torch; nobody but `cli` imports it.
"""

from memlaw.report.make import FORMATS, make_report

__all__ = ["FORMATS", "make_report"]
