"""What the modules of the package log, as plain lines on the console, from one rank."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path


class ConsoleHandler(logging.Handler):
    """Prints bare messages: those below WARNING to stdout, the others to stderr.

    The streams are looked up at each message, so that a stream which replaces `sys.stdout` for a
    while (`contextlib.redirect_stdout`, a notebook, a test) receives it. A stream that is None
    drops it, as it does for `print`.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        if stream is None:
            return
        try:
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:
            self.handleError(record)


def configure_logging(rank: int = 0) -> None:
    """Show the messages of the logger "preflab": all from INFO up on rank 0, warnings elsewhere.

    They do not reach the root logger, where Hydra has a handler that would repeat them. Calling
    this again only sets the level.
    """
    # A message that a file on a full disk does not take has no traceback on the console, where it
    # is as well.
    logging.raiseExceptions = False
    logger = logging.getLogger("preflab")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())


@contextlib.contextmanager
def logged_to(path: Path, *, writes: bool = True) -> Iterator[None]:
    """Inside, messages are added to a file too, with their time. writes: False on other ranks."""
    if not writes:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("preflab")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
