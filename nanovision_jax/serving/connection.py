"""Connections: HTTP/1.1 by uvicorn, whose clients have to say soon what they want."""

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closes a connection on which the head of a request takes longer than `seconds`: uvicorn waits for ever."""

    seconds, _late = 15.0, None

    def connection_made(self, transport):
        """As asyncio has it."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data):
        """As asyncio has it."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, error):
        """As asyncio has it."""
        super().connection_lost(error)
        self._forget()

    def _watch(self):
        if self.conn.their_state is not h11.IDLE:  # the head is there
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self.seconds, self._close)

    def _forget(self):
        if self._late:
            self._late.cancel()
            self._late = None

    def _close(self):
        self._late = None
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(b'HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n')
            self.transport.close()
