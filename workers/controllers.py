"""Where controllers are, in which order a worker tries them, and when it should move to another one.

All workers of a cluster decide for themselves, without talking to each other: the order spreads them by a hash of both
names, and what is left uneven, or becomes so when controllers come and go, evens out by moves that chance keeps apart.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvpilot.process import split_address


@dataclass(frozen=True, order=True)
class Address:
    """Where a controller may listen.

    Attributes:
        target: ``ip:port``, what is connected to.
        name: ``host:port`` as configured.
    """

    target: str
    name: str


@dataclass(frozen=True)
class Load:
    """How many workers a controller has, and where it was asked."""

    workers: int
    address: Address


async def resolve(names: Iterable[str]) -> list[Address]:
    """All addresses behind ``host:port`` names, each once: a name with several addresses counts as several controllers.

    Raises:
        OSError: none of the names can be resolved now; tells why the last one cannot.
    """
    loop = asyncio.get_running_loop()
    found: dict[str, Address] = {}
    failure: OSError | None = None
    for name in names:
        host, port = split_address(name)
        try:
            entries = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except OSError as error:
            failure = OSError(f"{name}: {error}")
            continue
        for family, _, _, _, where in entries:
            ip = f"[{where[0]}]" if family == socket.AF_INET6 else where[0]
            found.setdefault(f"{ip}:{port}", Address(f"{ip}:{port}", name))
    if not found and failure is not None:
        raise failure
    return list(found.values())


def rank(worker: str, addresses: Iterable[Address]) -> list[Address]:
    """The addresses in the order in which this worker tries them (highest random weight; Thaler and Ravishankar 1998).

    Each worker has an order of its own, in which an address that goes or comes moves none of the others.
    """

    def weight(address: Address) -> bytes:
        return hashlib.blake2b(f"{worker}\0{address.target}".encode(), digest_size=8).digest()

    return sorted(addresses, key=weight, reverse=True)


def choose(own: str, loads: Mapping[str, Load], chance: random.Random) -> Address | None:
    """The controller to move to from the one named ``own``; None: stay.

    A worker moves only where that makes the numbers more even, to each controller in proportion to what it lacks, and
    with such a probability that, if all workers looked at once, as many would move as there are too many here.
    """
    if own not in loads:
        return None
    here = loads[own].workers
    mean = sum(load.workers for load in loads.values()) / len(loads)
    lacking: Sequence[Load] = [load for load in loads.values() if load.workers <= here - 2 and load.workers < mean]
    if not lacking or chance.random() * here >= here - mean:
        return None
    weights = [mean - load.workers for load in lacking]
    return chance.choices(lacking, weights)[0].address
