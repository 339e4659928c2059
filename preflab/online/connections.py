"""How the scoring service treats connections: no client can hold one without using it."""

from fastapi import FastAPI
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

SILENT_SECONDS = 10  # without a byte from a client that the service is waiting for
REQUEST_SECONDS = 120  # for a whole request, however slowly its bytes come
LOOK_SECONDS = 1.0  # between two looks at a connection
STOP_SECONDS = 30  # for the requests that are being answered when the service is asked to stop
MAX_CONNECTIONS = 1000  # more get status 503


def make_server(app: FastAPI, host: str, port: int) -> Server:
    """A server for the application; its `run()` answers requests until a signal."""
    return Server(
        Config(
            app,
            host=host,
            port=port,
            http=WatchedConnection,
            timeout_keep_alive=SILENT_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
            limit_concurrency=MAX_CONNECTIONS,
            log_level="warning",
        )
    )


class WatchedConnection(H11Protocol):
    """Closes the connection of a client that keeps the service waiting.

    It waits for the start of a request, for the rest of it, or for its answer to be taken: uvicorn
    by itself waits for ever, except between two requests.
    """

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._heard = self._began = self.loop.time()
        self._request, self._untaken = None, 0
        self._watch()

    def connection_lost(self, error) -> None:
        self._timer.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        super().data_received(data)

    def _watch(self) -> None:
        """Look what the connection waits for."""
        self._timer = self.loop.call_later(LOOK_SECONDS, self._watch)
        now, request, untaken = self.loop.time(), self.cycle, self.transport.get_write_buffer_size()
        is_read = request is not None and not request.more_body
        if is_read and not request.response_complete and not untaken:
            self._heard = self._began = now  # the client waits for the service
        elif request is not self._request:
            self._began = now
        if untaken != self._untaken:
            self._heard = now
        self._request, self._untaken = request, untaken
        if now - self._heard > SILENT_SECONDS or now - self._began > REQUEST_SECONDS:
            self.transport.abort()
