"""What was done: as an object, as JSON, as one page.

A report is filled in by others and knows nothing of how. What turns it into text, tables or plots
enters here, and needs nothing but the report.
"""

from __future__ import annotations

from wanda_ext.report.page import PAGE, REPORT
from wanda_ext.report.report import LinearReport, PruneReport, versions
from wanda_ext.report.saved import note_saved, write_both

__all__ = [
    "PAGE",
    "REPORT",
    "LinearReport",
    "PruneReport",
    "note_saved",
    "versions",
    "write_both",
]
