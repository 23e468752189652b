"""How messages travel between API processes and an engine: over ZeroMQ, or within one process.

The engine's end blocks in `receive` until a message comes, `wake` is called or time is up: one
place to sleep for a loop that waits for its clients and its worker at once. The client's end never
blocks; it calls back on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from engine.messages import (
    FromEngine,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode_from_engine,
    encode_to_engine,
)

log = logging.getLogger(__name__)

# A client that leaves so many messages unread is treated as gone: the engine never waits for one.
MAX_UNREAD_MESSAGES = 20_000
# Fairness towards the worker: the rest stays queued in the socket until the next turn.
MAX_MESSAGES_A_TURN = 256
# How long the last words may take to leave the process.
LINGER_MS = 500


class EngineTransport(Protocol):
    """The engine's end. Everything but `wake` belongs to the loop's thread."""

    def receive(self, timeout: float | None) -> list[tuple[bytes, ToEngine]]:
        """Messages with the identity of their sender, in order of arrival.

        Blocks until there is one, `wake` was called or `timeout` seconds passed (None: no limit;
        0: does not block). May return nothing.
        """
        ...

    def send(self, client: bytes, message: FromEngine) -> bool:
        """Never blocks. False: the client is gone, or too far behind to count as there."""
        ...

    def wake(self) -> None:
        """Makes the current or the next `receive` return. From any thread."""
        ...

    def close(self) -> None: ...


class ClientTransport(Protocol):
    """The API process's end, on its event loop."""

    def listen(self, on_message: Callable[[FromEngine], None]) -> None:
        """Starts delivery. Called once, from the event loop."""
        ...

    def send(self, message: ToEngine) -> None:
        """Never blocks and never fails; a message to a dead engine is lost."""
        ...

    def close(self) -> None: ...


class ZmqEngineTransport:
    """A ROUTER socket, and a pipe that other threads wake the loop through."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # submissions are bounded by the queue limit
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD_MESSAGES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a client that left fails
        self._socket.bind(address)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def receive(self, timeout: float | None) -> list[tuple[bytes, ToEngine]]:
        # Rounded up: a wait that ends early would be repeated until it is over.
        ready = self._poller.poll(None if timeout is None else math.ceil(max(timeout, 0.0) * 1000))
        messages: list[tuple[bytes, ToEngine]] = []
        for source, _ in ready:
            if source == self._wake_read:
                os.read(self._wake_read, 4096)
            else:
                self._read_socket(messages)
        return messages

    def _read_socket(self, messages: list[tuple[bytes, ToEngine]]) -> None:
        while len(messages) < MAX_MESSAGES_A_TURN:
            try:
                client, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                messages.append((client, decode_to_engine(data)))
            except msgspec.DecodeError as error:
                log.error("dropped a malformed message: %s", error)

    def send(self, client: bytes, message: FromEngine) -> bool:
        try:
            self._socket.send_multipart((client, encode_from_engine(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def wake(self) -> None:
        # A full pipe wakes as well; a closed one has nobody waiting.
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)


class ZmqClientTransport:
    """A DEALER socket read by the running event loop.

    pyzmq's own asyncio socket costs a future and a task switch per message; this reads everything
    there is in one callback. ZeroMQ's descriptor is edge-triggered: it signals once per change, and
    a send may swallow the signal, so reading goes on until the socket is empty and is tried again
    after every send.
    """

    def __init__(self, address: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, MAX_UNREAD_MESSAGES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)  # ms; the engine binds when it is up
        self._socket.connect(address)
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._on_message: Callable[[FromEngine], None] | None = None
        self._read_scheduled = False
        self._closed = False

    def listen(self, on_message: Callable[[FromEngine], None]) -> None:
        self._on_message = on_message
        self._loop.add_reader(self._descriptor, self._read)
        self._read_soon()

    def send(self, message: ToEngine) -> None:
        if self._closed:
            return
        self._socket.send(encode_to_engine(message), zmq.NOBLOCK)
        self._read_soon()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        self._socket.close()
        # Waits up to the linger time for what was sent last; not on the event loop's thread.
        threading.Thread(target=self._context.term, daemon=True).start()

    def _read_soon(self) -> None:
        if not self._read_scheduled:
            self._read_scheduled = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._read_scheduled = False
        while not self._closed and self._on_message is not None:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_from_engine(data)
            except msgspec.DecodeError as error:
                log.error("dropped a malformed message: %s", error)
                continue
            self._on_message(message)


class LocalEngineTransport:
    """Both ends in one process: for tests and for the offline `LLM`.

    Messages are passed as they are, not encoded.
    """

    def __init__(self) -> None:
        self._inbox: list[tuple[bytes, ToEngine]] = []
        self._changed = threading.Condition()
        self._woken = False
        self._clients: dict[bytes, Callable[[FromEngine], None]] = {}

    def connect(self, identity: bytes, deliver: Callable[[FromEngine], None]) -> None:
        """`deliver` is called on the engine's thread."""
        self._clients[identity] = deliver

    def disconnect(self, identity: bytes) -> None:
        self._clients.pop(identity, None)

    def post(self, identity: bytes, message: ToEngine) -> None:
        """Sends to the engine, from any thread."""
        with self._changed:
            self._inbox.append((identity, message))
            self._changed.notify()

    def receive(self, timeout: float | None) -> list[tuple[bytes, ToEngine]]:
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._woken, timeout)
            self._woken = False
            messages, self._inbox = self._inbox, []
            return messages

    def send(self, client: bytes, message: FromEngine) -> bool:
        deliver = self._clients.get(client)
        if deliver is None:
            return False
        deliver(message)
        return True

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self) -> None:
        self._clients.clear()


class LocalClientTransport:
    """The client's end of a `LocalEngineTransport`, on the running event loop."""

    def __init__(self, engine: LocalEngineTransport, identity: bytes = b"local") -> None:
        self._engine = engine
        self._identity = identity
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def listen(self, on_message: Callable[[FromEngine], None]) -> None:
        def hand_over(message: FromEngine) -> None:
            if not self._closed:
                on_message(message)

        def deliver(message: FromEngine) -> None:
            self._loop.call_soon_threadsafe(hand_over, message)

        self._engine.connect(self._identity, deliver)

    def send(self, message: ToEngine) -> None:
        self._engine.post(self._identity, message)

    def close(self) -> None:
        self._closed = True
        self._engine.disconnect(self._identity)
