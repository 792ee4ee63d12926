"""Encrypted messages between processes, on one host or several, by ZeroMQ; a peer may go and come back at any time.

A message is a list of frames of bytes. Whoever has the key may take part, and nobody else can read along.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from system import safe_files
from system.errors import ConfigError

Frames = Sequence[bytes]

# ZeroMQ's own heartbeats: how often they are sent, and how long a peer may be silent, in milliseconds. They are
# answered while the peer's program is busy, and tell of hosts and networks that are gone.
HEARTBEAT, SILENCE = 5_000, 30_000
# How long what was sent last may take after the socket has been closed, in milliseconds.
LINGER = 1_000
# Messages that wait for one peer at most, and bytes of a frame.
MOST_WAITING, MOST_BYTES = 64, 2**31
# Handshakes in a row that fail before another key is what they fail by: a peer may end in the middle of one.
MOST_FAILURES = 3
# The name under which keys are asked about.
DOMAIN = "collectors"
PRIVATE = 0o600
KEY_LENGTH = 40


class Link(Enum):
    """What has happened to a connection."""

    MADE = "made"
    LOST = "lost"
    REFUSED = "refused"


def new_key() -> str:
    """A secret for all who take part."""
    _, secret = _zmq().curve_keypair()
    return str(secret.decode("ascii"))


def kept_key(path: Path) -> str:
    """The key in a file, which is made for its owner alone where there is none.

    Raises:
        ConfigError: it cannot be made or read.
    """
    try:
        if not path.exists():
            with safe_files.replacing(path) as temporary:
                temporary.chmod(PRIVATE)
                temporary.write_text(new_key() + "\n", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); {safe_files.remedy(error)}") from error
    return read_key(path)


def read_key(path: Path) -> str:
    """The key in a file.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    remedy = "copy collectors.key from the learner's logdir, and name it with --key FILE"
    try:
        key = safe_files.read_text(path, most=1000).strip()
        _zmq().curve_public(key.encode("ascii"))
    except OSError as error:
        raise ConfigError(f"cannot read the key {path} ({error.strerror}); {remedy}") from error
    except (ValueError, _zmq().ZMQError) as error:
        raise ConfigError(f"{path} holds no key; {remedy}") from error
    return key


def parts_of(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ConfigError: the text has no such form.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 2**16):
        raise ConfigError(f"'{address}' is no HOST:PORT, such as learner.example.org:5757")
    return host, int(port)


class Hub:
    """The end that waits for others, each of which it knows by a name that they give themselves.

    Attributes:
        port: where it listens.
    """

    def __init__(self, address: str, *, key: str) -> None:
        """Listen.

        Args:
            address: HOST:PORT; port 0 takes any that is free.
            key: who has it is heard.

        Raises:
            ConfigError: it cannot listen there, or ZeroMQ is not installed.
        """
        zmq = _zmq()
        from zmq.auth.thread import ThreadAuthenticator

        host, port = parts_of(address)
        self._context = zmq.Context()
        self._doorkeeper = ThreadAuthenticator(self._context)
        self._doorkeeper.start()
        self._doorkeeper.configure_curve_callback(domain=DOMAIN, credentials_provider=_OneKey(key))
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare(self._socket, key)
        self._socket.curve_server = True
        self._socket.zap_domain = DOMAIN.encode("ascii")
        # What cannot be delivered is an error here, and a peer that comes back has its name again.
        self._socket.router_mandatory = True
        self._socket.router_handover = True
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot listen at {address} ({error.strerror}); give another --listen") from error
        self.port = int(self._socket.last_endpoint.decode("ascii").rpartition(":")[2])

    def receive(self, seconds: float) -> tuple[bytes, list[bytes]] | None:
        """The next message, with its sender's name; None where none comes in so many seconds."""
        if not self._socket.poll(1000 * seconds):
            return None
        name, *frames = self._socket.recv_multipart()
        return name, frames

    def send(self, name: bytes, frames: Frames) -> bool:
        """Send to a peer. Whether it is there, and takes it."""
        zmq = _zmq()
        try:
            self._socket.send_multipart([name, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Also where the peer does not read what it has been sent.
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def reaches(self, name: bytes) -> bool:
        """Whether a peer is connected, who is sent an empty message to find out."""
        zmq = _zmq()
        try:
            self._socket.send_multipart([name, b""], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return bool(error.errno == zmq.EAGAIN)
        return True

    def close(self) -> None:
        """Let go of the port, once what was sent has had its time."""
        self._socket.close(LINGER)
        self._doorkeeper.stop()
        self._context.term()


class Spoke:
    """The end that looks for a hub, again whenever the connection is lost."""

    def __init__(self, address: str, *, key: str, name: bytes) -> None:
        """Begin to connect.

        Args:
            address: HOST:PORT of the hub.
            key: the hub's.
            name: of this end, unlike any other's.

        Raises:
            ConfigError: there is no such address, or ZeroMQ is not installed.
        """
        zmq = _zmq()
        host, port = parts_of(address)
        self.address = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _prepare(self._socket, key)
        self._socket.curve_serverkey = zmq.curve_public(key.encode("ascii"))
        self._socket.routing_id = name
        # Nothing waits for a connection that is not there.
        self._socket.immediate = True
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 200, 5_000
        self._events = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _failures(zmq)
        )
        self._failed = 0
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._events, zmq.POLLIN)
        try:
            self._socket.connect(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot connect to {address} ({error.strerror}); give another address") from error

    def receive(self, seconds: float) -> list[bytes] | Link | None:
        """The next message, or what has happened to the connection; None where neither comes in so many seconds."""
        until = time.monotonic() + seconds
        while True:
            ready = dict(self._poller.poll(max(0.0, 1000 * (until - time.monotonic()))))
            # What was sent before a connection was lost is read before that.
            if self._socket in ready:
                if (frames := self._socket.recv_multipart()) != [b""]:
                    return list(frames)
                continue
            if self._events in ready and (link := self._happened()) is not None:
                return link
            if time.monotonic() >= until:
                return None

    def _happened(self) -> Link | None:
        from zmq.utils.monitor import recv_monitor_message

        zmq = _zmq()
        event = recv_monitor_message(self._events)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._failed = 0
            return Link.MADE
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._failed += 1
            return Link.REFUSED if self._failed >= MOST_FAILURES else None
        if event & _failures(zmq):
            return Link.REFUSED
        # An attempt to connect that fails ends in this, too.
        return Link.LOST if not self._failed else None

    def send(self, frames: Frames) -> bool:
        """Send to the hub. Whether it is there, and takes it."""
        zmq = _zmq()
        try:
            self._socket.send_multipart(list(frames), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """End the connection, once what was sent has had its time."""
        self._socket.disable_monitor()
        self._events.close(0)
        self._socket.close(LINGER)
        self._context.term()


class _OneKey:
    """Tells ZeroMQ whose keys are welcome."""

    def __init__(self, key: str) -> None:
        self._public = _zmq().curve_public(key.encode("ascii"))

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def _prepare(socket: Any, key: str) -> None:
    """What both ends have in common. They share one secret, so that each proves to the other that it has it."""
    socket.curve_secretkey = key.encode("ascii")
    socket.curve_publickey = _zmq().curve_public(key.encode("ascii"))
    socket.heartbeat_ivl, socket.heartbeat_timeout = HEARTBEAT, SILENCE
    socket.sndhwm = socket.rcvhwm = MOST_WAITING
    socket.maxmsgsize = MOST_BYTES
    socket.linger = LINGER


def _failures(zmq: Any) -> int:
    """The events of a handshake that fails."""
    return int(
        zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    )


def _zmq() -> Any:
    """ZeroMQ, which whoever has no collectors needs not install.

    Raises:
        ConfigError: it is not there.
    """
    try:
        import zmq
        import zmq.utils.monitor
    except ImportError as error:
        raise ConfigError(f'collectors need ZeroMQ ({error}): pip install -e ".[collectors]"') from error
    return zmq
