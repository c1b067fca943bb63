"""Reports for people: every table and picture is a function of a report."""

from lben.reports.certification import certification_table, draw_certification
from lben.reports.picture import draw
from lben.reports.table import table

__all__ = ["certification_table", "draw", "draw_certification", "table"]
