"""The report of a run as one self-contained HTML file: tables with intervals, plots, the best recipe."""

from evomerge.build.commands.report.page import write_report

__all__ = ["write_report"]
