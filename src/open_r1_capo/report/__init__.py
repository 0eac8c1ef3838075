"""report.html of a run, and one page that compares several: `python -m open_r1_capo.report <run folder>`.

run.py writes a run's report, compare.py the page of several. panels.py says which metrics share a diagram, facts.py
what stands beside the curves, records.py which token records fit on a page. page.py makes one HTML file out of
page.html, the style sheets and the scripts, and keeps it safe from what it shows.
"""

from open_r1_capo.report.run import write_report

__all__ = ["write_report"]
