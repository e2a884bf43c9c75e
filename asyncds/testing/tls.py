"""Accept TLS connections so that those amid their handshake can be ended, too."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

__all__ = ["TlsServer"]


class TlsServer:
    """Accepts for a listening socket, on the running loop, as `create_server` does; but that one's server knows nothing
    of those who have not finished their handshake, and leaves them to the end of the loop.
    """

    def __init__(
        self, listener: socket.socket, context: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener, self._context, self._protocol = listener, context, protocol
        self._arriving: dict[asyncio.Task[object], socket.socket] = {}
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # it has gone again
            arrived, _ = self._listener.accept()
            arrived.setblocking(False)
            shaking_hands = self._loop.connect_accepted_socket(self._protocol, arrived, ssl=self._context)
            task: asyncio.Task[object] = self._loop.create_task(shaking_hands)
            self._arriving[task] = arrived
            task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[object]) -> None:
        arrived = self._arriving.pop(task)
        if task.cancelled() or task.exception() is not None:
            arrived.close()

    def close(self) -> None:
        """Accept no more, and end those amid their handshake; the others are whoever's the protocol is."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for arriving in self._arriving.values():
            with contextlib.suppress(OSError):  # the client has gone by itself
                arriving.shutdown(socket.SHUT_RDWR)

    async def wait_closed(self) -> None:
        """Return once nobody is amid a handshake."""
        if self._arriving:
            await asyncio.wait([*self._arriving])
