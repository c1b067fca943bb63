"""How are reports shown? Every table and picture is a function of a report."""

from lben.evaluation.reports.certification import certification_table, draw_certification
from lben.evaluation.reports.picture import draw
from lben.evaluation.reports.robustness import robustness_table
from lben.evaluation.reports.table import table

__all__ = ["certification_table", "draw", "draw_certification", "robustness_table", "table"]
