"""The report as HTML for ``report.html`` and for notebooks."""

from lbyl.io.report.page.pictures import plot
from lbyl.io.report.page.render import inspection_html, page, report_html, result_html

__all__ = ["inspection_html", "page", "plot", "report_html", "result_html"]
