"""A study: a question about several losses in one file, the runs that answer it, and its page.

    python study.py NAME                  run what is missing of config/study/NAME.yaml
    python study.py NAME --plan           its runs, checked and counted, and the time that they take
    python study.py NAME --report         the page: verdicts, frontiers, tuning budgets, failures
    python study.py NAME --jobs 4         four runs at a time; by default one for each GPU, or two
    python study.py NAME --limit 2        no more than two runs for each worker, to see how long
    python study.py NAME --case CASE      one of the study's cases, with its own page

NAME is a file of config/study/, or a path that ends in .yaml. The same command continues after a
kill. Runs and page are in runs/study/NAME. On a cluster, `sbatch --array=0-15
scripts/slurm/study.sbatch NAME` starts 16 workers.
"""

import argparse
import os
import sys
import time

from preflab.study.plan import Study, read_study
from utils import PrefLabError, machine_error

# Modules that import torch are imported inside functions: --report does without.


def main() -> None:
    arguments = parse_arguments()
    try:
        study = read_study(arguments.name)
        if arguments.case is not None:
            study = study.with_only(arguments.case)
        if arguments.plan:
            plan(study)
        elif arguments.report:
            report(study)
        else:
            raise SystemExit(run(study, arguments))
    except (PrefLabError, OSError) as error:
        print(f"error: {machine_error(error) or error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="a file of config/study/, or a path that ends in .yaml")
    parser.add_argument("--plan", action="store_true", help="check and count the runs, run none")
    parser.add_argument("--report", action="store_true", help="write the page from the runs so far")
    parser.add_argument("--jobs", type=int, help="runs at a time on this machine")
    parser.add_argument("--limit", type=int, help="runs of each worker, after which it ends")
    parser.add_argument("--case", help="this case alone, with its own page")
    parser.add_argument(
        "--amended",
        action="store_true",
        help="go on although the study's file was changed after the first start; the page says so",
    )
    parser.add_argument(
        "--worker",
        type=int,
        metavar="NUMBER",
        help="be one worker, as the tasks of a job array are",
    )
    parser.add_argument("--session", help=argparse.SUPPRESS)
    return parser.parse_args()


def plan(study: Study) -> None:
    from preflab.study.estimate import describe_plan

    print(describe_plan(study))


def report(study: Study) -> None:
    from preflab.study.page import write_study

    print(write_study(study))
    print(study.page_dir / "study.md")
    print(study.page_dir / "report.html")


def run(study: Study, arguments: argparse.Namespace) -> int:
    """Start workers, or be one; returns the exit code."""
    from preflab.study.work import begin, missing

    criterion = begin(study, amended=arguments.amended)
    session = arguments.session or f"{os.getpid()}-{time.time():.0f}"
    if arguments.worker is not None:
        return work(study, criterion, arguments, session)
    from preflab.study.workers import Team, worker_command

    more = [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    more += ["--amended"] if arguments.amended else []
    more += [] if arguments.case is None else ["--case", arguments.case]
    command = worker_command(arguments.name, session, *more)
    code = Team(study, command, arguments.jobs).run() if missing(study) else 0
    if code:
        print("stopped; the same command continues", file=sys.stderr)
        return code
    report(study)
    return 0 if arguments.limit is not None or not missing(study) else 1


def work(study: Study, criterion, arguments: argparse.Namespace, session: str) -> int:
    from preflab.distributed.signals import Stopped, StopSignals
    from preflab.study.work import Worker

    stop = StopSignals()
    stop.listen()
    try:
        Worker(study, criterion, arguments.worker, session, arguments.limit).work(stop)
    except Stopped as stopped:
        return 128 + stopped.signum
    return 0


if __name__ == "__main__":
    main()
