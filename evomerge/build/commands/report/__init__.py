"""A run as one HTML file with everything in it: tables with intervals, plots, the best recipe."""

from evomerge.build.commands.report.page import write_report

__all__ = ["write_report"]
