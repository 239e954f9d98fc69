"""What a process and all its children listen on: a service says where it can be reached, and this checks it.

Example:
    >>> unexpected(listeners(os.getpid()), allowed=[("0.0.0.0", 8000)])
    []
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Listener:
    """One listening socket.

    Attributes:
        host: Its address.
        port: Its port.
        process: Name of the process that holds it.
    """

    host: str
    port: int
    process: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        address = ipaddress.ip_address(self.host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    def __str__(self) -> str:
        return f"{self.host}:{self.port} ({self.process})"


def listeners(pid: int) -> list[Listener]:
    """The TCP sockets on which a process and its children listen; those that end meanwhile are left out.

    Args:
        pid: The process.
    """
    import psutil

    found = set()
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            name = process.name()
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(Listener(connection.laddr.ip, connection.laddr.port, name))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return sorted(found)


def unexpected(found: Iterable[Listener], allowed: Iterable[int] = ()) -> list[Listener]:
    """Those that other machines reach, but for the allowed ports.

    Args:
        found: What listens.
        allowed: Ports that are meant to be reached.
    """
    ports = set(allowed)
    return [listener for listener in found if not listener.is_loopback and listener.port not in ports]
