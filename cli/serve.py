"""Serve a model over the OpenAI API.

The order is for speed: the engine process is started first, and while it imports torch and loads
the model this one imports its own things (`cli/api.py`).
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import ssl
import sys
import time
from collections.abc import Sequence

from cli.config import resolve
from cli.errors import CommandError
from engine.config import ServerConfig
from engine.launch import Phase
from engine.logs import configure_logging
from engine.supervisor import Supervisor


def run(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0 after a drain, 1 when the engine is gone for good."""
    started = time.monotonic()
    config = resolve(arguments, os.environ)
    server = config.server
    json_lines = server.log_format == "json" or (
        server.log_format == "auto" and not sys.stderr.isatty()
    )
    configure_logging(server.log_level, json_lines)
    listener = listen(server)
    check_certificate(server)
    allow_many_connections()

    def show(phase: Phase) -> None:
        print(f"  {phase.name:<32}{time.monotonic() - started:6.2f} s", flush=True)

    print(f"foresight: loading {config.engine.model.model}", flush=True)
    supervisor = Supervisor(
        config.engine,
        drain_seconds=server.drain_seconds,
        log_level=server.log_level,
        log_json=json_lines,
        on_phase=show,
    )
    supervisor.spawn()

    from cli.api import serve

    return serve(config, supervisor, listener, started)


def listen(server: ServerConfig) -> socket.socket:
    """Takes the port before anything slow. Raises `CommandError` when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError) as error:
        where = f"{server.host}:{server.port}"
        raise CommandError(f"{where} is not an address to listen on ({error}).") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise CommandError(
                f"port {server.port} on {server.host} is in use; choose another with --port."
            ) from error
        reason = error.strerror or str(error)
        raise CommandError(f"cannot listen on {server.host}:{server.port}: {reason}.") from error
    return listener


def check_certificate(server: ServerConfig) -> None:
    """Raises `CommandError` when https is asked for and its files are of no use."""
    if server.tls_certificate is None:
        if server.tls_key is not None:
            raise CommandError("--tls-key needs --tls-certificate.")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            server.tls_certificate, server.tls_key
        )
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CommandError(
            f"the certificate {server.tls_certificate} and its key cannot be used ({error})."
        ) from error


def allow_many_connections() -> None:
    """Raises the limit on open files as far as this user may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
