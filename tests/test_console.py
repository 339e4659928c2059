"""Messages that modules log: shown once, on rank 0, on whatever stream `sys.stdout` is."""

import contextlib
import io
import logging

import pytest

from preflab.distributed.console import ConsoleHandler, configure_logging

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


def test_a_replaced_stdout_gets_the_messages_and_none_drops_them(capsys):
    configure_logging()
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        logger.info("inside")
    with contextlib.redirect_stdout(None):
        logger.info("dropped")
    logger.info("after")
    assert text.getvalue() == "inside\n" and capsys.readouterr().out == "after\n"
