"""The report: one page, from files alone, that shows what is remembered. Needs no torch."""

from memlaw.report.make import FORMATS, make_report

__all__ = ["FORMATS", "make_report"]
