"""Write report.html of run folders, whether their runs have ended or not."""

from __future__ import annotations

import sys

from open_r1_capo.report.page import file_errors
from open_r1_capo.report.run import write_report
from open_r1_capo.runs.exit import UserError, run_cli
from open_r1_capo.runs.run import Run
from open_r1_capo.runs.summary import summary_lines


def main(argv: list[str] | None = None) -> int:
    """Write the report of each folder named."""
    names = sys.argv[1:] if argv is None else argv
    return run_cli(lambda: write_reports([Run(name) for name in names]))


def write_reports(runs: list[Run]) -> None:
    """Write the reports and print the results; a UserError, and no report, if a folder holds no run."""
    if not runs:
        raise UserError("name a run folder: make report RUN=outputs/<recipe>/<scale>/seed<seed>")
    for run in runs:
        _ = run.settings
    for run in runs:
        with file_errors():
            write_report(run)
        lines = summary_lines(run) if run.summary else [f"the run has not ended; its report so far: {run.report_file}"]
        print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
