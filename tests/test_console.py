"""Messages that modules log: shown once, on rank 0, on whatever stream `sys.stdout` is."""

import contextlib
import io
import itertools
import logging

import pytest

from preflab.distributed.console import ConsoleHandler, configure_logging
from utils import Progress

logger = logging.getLogger("preflab.some.module")


@pytest.fixture(autouse=True)
def restored():
    """The logger as other tests expect it."""
    package = logging.getLogger("preflab")
    before = package.level, package.propagate, list(package.handlers)
    yield
    level, package.propagate, package.handlers[:] = before
    package.setLevel(level)


def test_messages_are_bare_lines_and_warnings_go_to_stderr(capsys):
    configure_logging()
    logger.info("layout: padded")
    logger.warning("wandb stopped")
    logger.debug("details")
    output = capsys.readouterr()
    assert output.out == "layout: padded\n" and output.err == "wandb stopped\n"


def test_other_ranks_show_warnings_only(capsys):
    configure_logging(rank=1)
    logger.info("layout: padded")
    logger.warning("wandb stopped")
    output = capsys.readouterr()
    assert output.out == "" and output.err == "wandb stopped\n"


def test_a_second_call_adds_no_handler_and_the_root_logger_receives_nothing(capsys, monkeypatch):
    received = []
    of_root = logging.Handler()
    monkeypatch.setattr(of_root, "emit", received.append)
    monkeypatch.setattr(logging.getLogger(), "handlers", [of_root])
    logging.getLogger("another").warning("for the root logger")
    for rank in (1, 0, 0):
        configure_logging(rank)
    logger.info("once")
    assert capsys.readouterr().out == "once\n"
    assert [record.getMessage() for record in received] == ["for the root logger"]
    handlers = logging.getLogger("preflab").handlers
    assert sum(isinstance(handler, ConsoleHandler) for handler in handlers) == 1


def test_a_log_on_a_full_disk_has_no_traceback(capsys):
    configure_logging()
    logger = logging.getLogger("preflab")
    full = logging.StreamHandler(open("/dev/full", "w"))  # noqa: SIM115
    logger.addHandler(full)
    try:
        logger.info("a line")
    finally:
        logger.removeHandler(full)
    assert capsys.readouterr() == ("a line\n", "")


def test_a_replaced_stdout_gets_the_messages_and_none_drops_them(capsys):
    configure_logging()
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        logger.info("inside")
    with contextlib.redirect_stdout(None):
        logger.info("dropped")
    logger.info("after")
    assert text.getvalue() == "inside\n" and capsys.readouterr().out == "after\n"


@pytest.mark.parametrize(("step", "n_lines"), [(9.0, 9), (0.2, 0)])
def test_a_loop_prints_a_line_every_30_seconds_into_a_file(step, n_lines, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    printed = []
    for done in Progress(range(30), desc="evaluate", leave=False):
        now[0] += step
        if len(capsys.readouterr().err.splitlines()):
            printed.append((done, now[0]))
    rest = capsys.readouterr()
    assert len(printed) == n_lines and rest.out == "" and rest.err.count("\n") <= bool(n_lines)
    gaps = [after - before for (_, before), (_, after) in itertools.pairwise(printed)]
    assert all(gap <= 30 for gap in gaps)


def test_a_line_says_where_the_loop_is_and_other_ranks_print_none(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for disable in (False, True):
        with Progress(total=100, desc="sample", unit=" samples", disable=disable) as bar:
            now[0] += 25
            bar.update(10)
        error = capsys.readouterr().err
        assert ("10/100" in error and error.startswith("sample") and error.count("\n") == 1) == (
            not disable
        )
        assert "\r" not in error
