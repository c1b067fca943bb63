"""Reports for people: every table and picture is a function of a `Report`."""

from lben.reports.picture import draw
from lben.reports.table import table

__all__ = ["draw", "table"]
