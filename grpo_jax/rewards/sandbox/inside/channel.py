"""Messages over a socket: four bytes of length, then bytes, mostly JSON."""

import json
import socket
import struct
from typing import Any

LARGEST = 2**26  # bytes of a message
_LENGTH = struct.Struct('>I')


class ChannelError(Exception):
    """The other side has ended, or what it sent is not a message."""


class Channel:
    """One end of a connection that carries messages in both directions.

    A connection with a timeout raises TimeoutError where the other side does not send or read.
    """

    def __init__(self, connection: socket.socket):
        self.connection = connection

    def send(self, message: object) -> None:
        """Send a message as JSON.

        Raises:
            ChannelError: the other side has ended, or the message is too large or no JSON.
        """
        try:
            data = json.dumps(message).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ChannelError(f'cannot be sent: {error}') from error
        self.send_bytes(data)

    def receive(self) -> Any:
        """Wait for a message in JSON and return it.

        Raises:
            ChannelError: the other side has ended, or sent something else.
        """
        try:
            return json.loads(self.receive_bytes())
        except (ValueError, RecursionError) as error:
            raise ChannelError(f'not a message: {error}') from error

    def send_bytes(self, data: bytes) -> None:
        """Send a message of bytes; raises as `send`."""
        if len(data) > LARGEST:
            raise ChannelError(f'a message of {len(data)} bytes: at most {LARGEST} can be sent')
        try:
            self.connection.sendall(_LENGTH.pack(len(data)) + data)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelError(f'the other side has ended: {error}') from error

    def receive_bytes(self) -> bytes:
        """Wait for a message and return its bytes; raises as `receive`."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > LARGEST:
            raise ChannelError(f'a message of {length} bytes: at most {LARGEST} are accepted')
        return self._read(length)

    def close(self) -> None:
        """Close this end."""
        self.connection.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = self.connection.recv(min(count - len(data), 2**20))
            except TimeoutError:
                raise
            except OSError as error:
                raise ChannelError(f'the other side has ended: {error}') from error
            if not part:
                raise ChannelError('the other side has ended')
            data += part
        return bytes(data)
