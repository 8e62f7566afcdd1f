"""Writes the report of a run as one HTML page that stands alone, from log.jsonl, events.jsonl and sheets/*.png in its folder.

    python tools/report_run.py runs/wan_1_3b --out report.html

A run that goes on may be reported at any time. Exit code 2 if there is no log, or the page cannot be written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rcm_mcore.evaluation.run_report import run_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, its checkpoint.dir")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the folder of the run)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    try:
        out.write_text(run_report(args.run), encoding="utf-8")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
