"""What a run has shown: summary.json's numbers, a few lines for the terminal, and report.html.

summary.py has the numbers and the lines; panels.py says which metrics share a diagram, facts.py what stands beside the
curves, records.py which token records fit on a page; page.py makes the HTML file, safe from what it shows, out of
page.html, style.css and the scripts; run.py is the report of a run, compare.py one page for several.

python -m open_r1_capo.report outputs/capo_aggressive/lab/seed0
"""

from open_r1_capo.report.run import ReportError, write_report
from open_r1_capo.runs.summary import summarise, summary_lines

__all__ = ["ReportError", "summarise", "summary_lines", "write_report"]
