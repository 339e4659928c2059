"""Tables, pictures and a page from a run folder or from a folder of runs.

    python report.py RUN                  a run, finished or not, or an evaluation of checkpoints
    python report.py SWEEP                a folder of runs: one table, paired differences,
                                          frontiers, curves with error bands, samples
    python report.py SWEEP --baseline loss.name=dpo loss.beta=0.1
    python report.py RUN --watch 60       every 60 seconds until no run there is running

A run gets report.html and its pictures. A sweep also gets comparison.csv (full precision),
comparison.md and comparison.tex (mean ± standard error over seeds), differences.csv (from the
baseline, paired by seed, with bootstrap intervals) and frontier.csv (the best reward within a KL,
by seed). The command does not import torch and starts in about a second.
"""

import argparse
import contextlib
import time

from preflab.reports.sweep import report_folder
from preflab.settings.refused import errors_in_one_line
from utils import path_argument


def main() -> None:
    arguments = parse_arguments()
    baseline = dict(pair.partition("=")[::2] for pair in arguments.baseline)
    with contextlib.suppress(KeyboardInterrupt), errors_in_one_line():
        while True:
            text, is_running = report_folder(arguments.folder, baseline)
            print(text)
            print(arguments.folder / "report.html", flush=True)
            if not (arguments.watch and is_running):
                break
            time.sleep(arguments.watch)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=path_argument, help="a run folder, or a folder of run folders"
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the group that the others are compared with",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="write the report again every so many seconds (30 by default) while a run is running",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
