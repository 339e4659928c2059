"""Run folders to tables and pictures: `python report.py RUN`, or a folder of runs. Needs no torch
and starts in a second.

    python report.py RUN                     a run, finished or not: report.html and pictures; also
    of what function=eval wrote python report.py SWEEP_DIR               a folder of runs: one
    table, paired differences, frontiers, curves with bands, samples python report.py SWEEP_DIR
    --baseline loss.name=dpo loss.beta=0.1
    python report.py RUN --watch [SECONDS]   again and again, until all runs there are done

A sweep gets comparison.csv (numbers), comparison.md and comparison.tex (mean ± standard error over
seeds), differences.csv (from the baseline, paired by seed, with bootstrap intervals), frontier.csv
(the best reward within a KL, by seed) and report.html.
"""

import argparse
import sys
import time
from pathlib import Path

from preflab.reports.sweep import report
from utils import PrefLabError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the group to compare with",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="write it anew every so often while runs go on",
    )
    arguments = parser.parse_args()
    try:
        while True:
            table, running = report(
                arguments.folder, dict(pair.partition("=")[::2] for pair in arguments.baseline)
            )
            print(table)
            print(f"{arguments.folder / 'report.html'}", flush=True)
            if not (arguments.watch and running):
                break
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        pass
    except PrefLabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
