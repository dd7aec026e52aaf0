"""A program run among parties under SPU, in one process or in one each, and what it sent."""

from __future__ import annotations

import multiprocessing
import re
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from spu import api, libspu
from spu.utils import frontend, simulation

PROTOCOLS = {"SEMI2K": 2, "ABY3": 3}
_TOOK = re.compile(r"SPU execution .* completed, .*execution took ([0-9.e+-]+)s")
_OPERATIONS = re.compile(r"HLO profiling: total time ([0-9.e+-]+)")
_LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run: the longest time of a party, and the mean of what each sent and waited for: in ABY3 roles go round.

    Attributes:
        seconds: of the program's operations, without compiling it and without sharing its inputs.
        seconds_with_parsing: also of SPU's reading of the compiled program, which a party does once.
        bytes_sent: by a party.
        rounds: messages that a party waited for.
    """

    seconds: float
    seconds_with_parsing: float
    bytes_sent: float
    rounds: float


class Engine:
    """Runs JAX programs whose inputs are all secret.

    Args:
        protocol: of `PROTOCOLS`.
        field: FM64 or FM128.
        fraction_bits: of the fixed-point numbers.
        processes: a process for each party, which talk over loopback; else threads of this one.
    """

    def __init__(self, protocol: str, field: str = "FM64", fraction_bits: int = 18, processes: bool = False) -> None:
        self.protocol, self.parties, self.processes = protocol, PROTOCOLS[protocol], processes
        self.settings = (protocol, field, fraction_bits)

    def run(self, function: Callable[..., Any], *arguments: Any) -> tuple[np.ndarray, Cost]:
        """Returns the only output of a program, revealed, and its cost."""
        names: list[str] = []

        def numbered(outputs: list[Any]) -> list[str]:
            return [f"out{i}" for i in range(len(outputs))]

        leaves = jax.tree_util.tree_leaves(arguments)
        names = [f"in{i}" for i in range(len(leaves))]
        executable, _ = frontend.compile(
            frontend.Kind.JAX, function, arguments, {}, names, [libspu.Visibility.VIS_SECRET] * len(leaves), numbered
        )
        io = api.Io(self.parties, configuration(self.settings))
        shares = [io.make_shares(np.array(leaf), libspu.Visibility.VIS_SECRET) for leaf in leaves]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "spu.log"
            outputs = (self._among_processes if self.processes else self._among_threads)(executable, names, shares, log)
            logs = [file.read_text() for file in Path(folder).iterdir()]
            return io.reconstruct(outputs), read_cost("".join(logs), self.parties)

    def _among_threads(self, executable: Any, names: list[str], shares: list[Any], log: Path) -> list[Any]:
        log_to(log)
        description = link_to([f"thread_{rank}" for rank in range(self.parties)])

        def party(rank: int) -> Any:
            link = libspu.link.create_mem(description, rank)
            return one_party(link, self.settings, executable, names, [share[rank] for share in shares])

        jobs = [simulation.PropagatingThread(target=party, args=(rank,)) for rank in range(self.parties)]
        for job in jobs:
            job.start()
        return [job.join() for job in jobs]

    def _among_processes(self, executable: Any, names: list[str], shares: list[Any], log: Path) -> list[Any]:
        addresses = free_addresses(self.parties)
        context = multiprocessing.get_context("spawn")
        answers, workers = context.Queue(), []
        for rank in range(self.parties):
            own = [share[rank] for share in shares]
            task = (rank, addresses, self.settings, executable.SerializeToString(), names, own, log, answers)
            workers.append(context.Process(target=party_process, args=task))
        for worker in workers:
            worker.start()
        found = dict(answers.get(timeout=1200) for _ in workers)
        for worker in workers:
            worker.join()
        failed = [answer for answer in found.values() if isinstance(answer, str)]
        if failed:
            raise RuntimeError(f"a party failed: {failed[0]}")
        return [found[rank] for rank in range(self.parties)]


def party_process(
    rank: int,
    addresses: list[str],
    settings: tuple[str, str, int],
    program: bytes,
    names: list[str],
    shares: list[Any],
    log: Path,
    answers: Any,
) -> None:
    """Is one party: has its shares of the inputs, and gives back its share of the output, or what went wrong."""
    try:
        log_to(log.with_name(f"spu-{rank}.log"))
        executable = libspu.Executable()
        executable.ParseFromString(program)
        link = libspu.link.create_brpc(link_to(addresses), rank)
        answers.put((rank, one_party(link, settings, executable, names, shares)))
        link.stop_link()
    except Exception as error:
        answers.put((rank, repr(error)))


def one_party(link: Any, settings: tuple[str, str, int], executable: Any, names: list[str], shares: list[Any]) -> Any:
    """Runs a party's part and returns its share of the output."""
    runtime = api.Runtime(link, configuration(settings))
    for name, share in zip(names, shares, strict=True):
        runtime.set_var(name, share)
    runtime.run(executable)
    return runtime.get_var("out0")


def configuration(settings: tuple[str, str, int]) -> Any:
    """Returns SPU's configuration of a party, which keeps a profile."""
    protocol, field, fraction_bits = settings
    kinds = {name: getattr(libspu.ProtocolKind, name) for name in PROTOCOLS}
    config = libspu.RuntimeConfig(
        protocol=kinds[protocol], field=getattr(libspu.FieldType, field), fxp_fraction_bits=fraction_bits
    )
    config.enable_pphlo_profile = True
    return config


def link_to(addresses: list[str]) -> Any:
    """Returns the description of the link between parties at these addresses."""
    description = libspu.link.Desc()
    for rank, address in enumerate(addresses):
        description.add_party(f"party{rank}", address)
    return description


def log_to(path: Path) -> None:
    """Sends SPU's log, with its profile, to a file."""
    options = libspu.logging.LogOptions()
    options.enable_console_logger, options.system_log_path = False, str(path)
    libspu.logging.setup_logging(options)


def free_addresses(count: int) -> list[str]:
    """Returns addresses on loopback that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def read_cost(log: str, parties: int) -> Cost:
    """Returns the cost of the run that the logs of all parties tell of."""
    operations, took, links = (pattern.findall(log) for pattern in (_OPERATIONS, _TOOK, _LINK))
    if not len(operations) == len(took) == len(links) == parties:
        raise RuntimeError(f"SPU's logs have {len(links)} profiles of one run, not {parties}: {log[-300:]!r}")
    sent, waited = (sum(int(link[i]) for link in links) / parties for i in (0, 3))
    return Cost(max(map(float, operations)), max(map(float, took)), sent, waited)
