"""Write the reports of run folders again, of ended and of unfinished runs."""

from __future__ import annotations

import sys

from open_r1_capo.report.run import ReportError, write_reports
from open_r1_capo.runs.summary import summary_lines


def main(argv: list[str] | None = None) -> int:
    """Write report.html of each folder, whether its run has ended or not.

    Args:
        argv: run folders; None takes the process's arguments.

    Returns:
        0, or 2 if a folder is no run's or cannot be read or written (one sentence says which).
    """
    names = sys.argv[1:] if argv is None else argv
    if not names:
        print("error: name a run folder: make report RUN=outputs/<recipe>/<scale>/seed<seed>", file=sys.stderr)
        return 2
    try:
        written = write_reports(names)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename} cannot be read or written ({error.strerror})", file=sys.stderr)
        return 2
    for folder, summary in written:
        unfinished = [f"the run has not ended; its report so far: {folder.report_file}"]
        lines = summary_lines(folder) if summary else unfinished
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
