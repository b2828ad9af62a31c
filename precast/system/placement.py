"""Which cores the ranks of a decode worker compute on, with how many threads, and why.

``plan`` is a pure function of what ``this_machine`` reads. The rules, in this order:

* a thread for each physical core, because two on one share what a kernel needs of it
* no more threads than the CPU quota pays for; replicas share it
* performance cores alone where a machine has both kinds
* from 8 cores on, one is left to the leader and the gateway
* ranks on NUMA nodes of their own first, then on L3 caches of their own; ranks of a group get equal
  numbers, because they wait for each other twice a layer
* a thread is pinned to its core, but not where a quota gives it less than the machine has: another
  container with a quota would choose the same cores. Ranks stay on a node then, the first on that
  which the kernel has put this process on.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Final

from precast.errors import ConfigError
from precast.system.cgroup import NO_LIMITS, ROOT, CpuQuota, Limits, read_limits
from precast.system.deal import deal
from precast.system.topology import Core, Topology, cpu_list, read_topology

LEAVE_ONE_FROM: Final = 8
"""Cores from which on one is left to leader and gateway: below, it is missed more than it helps."""
UNPINNED: Final = -1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan depends on."""

    topology: Topology
    affinity: tuple[int, ...]
    """CPUs that this process may run on."""
    limits: Limits = NO_LIMITS
    here: int = 0
    """The CPU that this process runs on."""


@dataclass(frozen=True, kw_only=True)
class RankPlacement:
    threads: tuple[int, ...]
    """For each compute thread, the CPU that it is pinned to, or UNPINNED."""
    cpus: tuple[int, ...]
    """What the rank may run on."""
    nodes: tuple[int, ...]
    """NUMA nodes of these CPUs."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    replicas: tuple[tuple[RankPlacement, ...], ...]
    """The ranks of each replica."""
    spare: tuple[int, ...]
    """CPUs of cores that no rank is pinned to."""
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


_Runs = Sequence[Sequence[Sequence[Core]]]
_Ranks = tuple[tuple[RankPlacement, ...], ...]


def this_machine(root: Path = ROOT) -> Machine:
    affinity = tuple(sorted(os.sched_getaffinity(0)))
    return Machine(
        topology=read_topology(root / "sys", affinity),
        affinity=affinity,
        limits=read_limits(root),
        here=int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36]),
    )


def compute_threads() -> tuple[int, ...]:
    """The threads of a program that computes alone on this machine."""
    return plan(this_machine()).replicas[0][0].threads


def plan(
    machine: Machine, *, tp: int = 1, replicas: int = 1, cores: Sequence[int] = ()
) -> Placement:
    """``cores``: the CPU ids that were asked for, dealt out in order. Raises ConfigError if this
    process may not use one of them."""
    if cores:
        return _as_asked(machine, tp, replicas, cores)
    notes = _Notes(reasons=[*machine.topology.missing], warnings=[])
    usable = _usable(machine, notes)
    chosen = _of_one_kind(usable, tp * replicas, notes)
    budget, floating = _threads(machine.limits.quota, len(chosen), notes)
    if floating or len(chosen) == len(usable):
        budget = _leave_one(budget, tp * replicas, notes)
    if floating:
        runs = _runs(_from_here(chosen, machine.here), tp, replicas, notes)
        placed = _floating(runs, budget, chosen)
    else:
        placed = _pinned(_runs(chosen[:budget], tp, replicas, notes))
    _note_ranks(placed, budget, floating, notes)
    return Placement(
        replicas=placed,
        spare=_spare(usable, placed),
        reasons=tuple(notes.reasons),
        warnings=tuple(notes.warnings),
    )


def described(rank: RankPlacement) -> str:
    """``27 threads on CPUs 0-26, node 0``."""
    count = f"{len(rank.threads)} thread{'s' if len(rank.threads) > 1 else ''}"
    where = cpu_list(rank.cpus)
    node = f"node{'s' if len(rank.nodes) > 1 else ''} {cpu_list(rank.nodes)}"
    pinned = "" if UNPINNED not in rank.threads else ", not pinned"
    return f"{count} on CPU{'s' if len(rank.cpus) > 1 else ''} {where}, {node}{pinned}"


@dataclass(frozen=True, kw_only=True)
class _Notes:
    reasons: list[str]
    warnings: list[str]


def _usable(machine: Machine, notes: _Notes) -> list[Core]:
    """Cores with the CPUs of each that this process may use."""
    allowed = set(machine.affinity) & set(machine.limits.cpuset or machine.affinity)
    allowed = allowed or set(machine.affinity)
    cut = (_only(core, allowed) for core in machine.topology.cores)
    cores = [core for core in cut if core.cpus]
    unknown = allowed.difference(*(core.cpus for core in cores))
    cores += [Core(cpus=(cpu,)) for cpu in sorted(unknown)]
    total = sum(len(core.cpus) for core in machine.topology.cores)
    whose = "" if len(allowed) >= total else f" of {total}: affinity or cpuset"
    notes.reasons.append(
        f"{_count(len(cores), 'core')} with {_count(len(allowed), 'CPU')} "
        f"({cpu_list(allowed)}{whose}): a thread for each core"
    )
    return cores


def _only(core: Core, allowed: set[int]) -> Core:
    return Core(
        cpus=tuple(cpu for cpu in core.cpus if cpu in allowed),
        package=core.package,
        node=core.node,
        l3=core.l3,
        efficient=core.efficient,
    )


def _of_one_kind(cores: list[Core], ranks: int, notes: _Notes) -> list[Core]:
    fast = [core for core in cores if not core.efficient]
    slow = [core for core in cores if core.efficient]
    if not fast or not slow:
        return cores
    for name, kind, others in (("P", fast, slow), ("E", slow, fast)):
        if len(kind) >= ranks:
            notes.reasons.append(
                f"only the {len(kind)} {name} cores compute, not the {len(others)} others: threads "
                f"wait for the slowest"
            )
            return kind
    notes.warnings.append(f"P and E cores are mixed: no kind has {ranks}, one for each rank")
    return fast + slow


def _threads(quota: CpuQuota | None, cores: int, notes: _Notes) -> tuple[int, bool]:
    """Most threads of all ranks, and whether a quota makes it fewer than there are cores."""
    if quota is None or int(quota.cpus) >= cores:
        return cores, False
    budget = max(1, int(quota.cpus))
    notes.reasons.append(f"{quota.path} pays for {quota.cpus:g} CPUs: {_count(budget, 'thread')}")
    return budget, True


def _leave_one(budget: int, ranks: int, notes: _Notes) -> int:
    if budget < LEAVE_ONE_FROM or budget <= ranks:
        return budget
    notes.reasons.append("one core is left to leader and gateway")
    return budget - 1


def _spare(usable: Sequence[Core], placed: _Ranks) -> tuple[int, ...]:
    pinned = {cpu for group in placed for rank in group for cpu in rank.threads}
    free = (core.cpus for core in usable if pinned.isdisjoint(core.cpus))
    return tuple(sorted(chain.from_iterable(free)))


def _from_here(cores: list[Core], here: int) -> list[Core]:
    """The same, beginning with the node of the CPU ``here``."""
    node = next((core.node for core in cores if here in core.cpus), cores[0].node)
    return sorted(cores, key=lambda core: core.node < node)  # stable


def _runs(cores: list[Core], tp: int, replicas: int, notes: _Notes) -> list[list[list[Core]]]:
    """The cores that each rank of each replica may have."""
    ranks = tp * replicas
    if len(cores) >= ranks:
        return [deal(mine, tp) for mine in deal(cores, replicas)]
    notes.warnings.append(f"{_count(len(cores), 'core')} for {ranks} ranks: decoding will be slow")
    shared = [[cores[rank % len(cores)]] for rank in range(ranks)]
    return [shared[start : start + tp] for start in range(0, ranks, tp)]


def _pinned(runs: _Runs) -> _Ranks:
    """Ranks of a group have as many threads each as the smallest run has cores."""
    return tuple(tuple(_pinned_to(run[: min(map(len, group))]) for run in group) for group in runs)


def _pinned_to(cores: Sequence[Core]) -> RankPlacement:
    cpus = tuple(core.cpus[0] for core in cores)
    return RankPlacement(threads=cpus, cpus=cpus, nodes=_nodes(cores))


def _floating(runs: _Runs, budget: int, cores: Sequence[Core]) -> _Ranks:
    """The same, but no more than a group's share of the budget."""
    placed, groups = [], len(runs)
    for number, group in enumerate(runs):
        share = budget * (number + 1) // groups - budget * number // groups
        count = max(1, min(share // len(group), *map(len, group)))
        placed.append(tuple(_anywhere(run, count, cores) for run in group))
    return tuple(placed)


def _anywhere(run: Sequence[Core], count: int, cores: Sequence[Core]) -> RankPlacement:
    """``count`` threads on any of ``cores`` that are on the first nodes of ``run`` with so many."""
    nodes: set[int] = set()
    for node, _ in groupby(run, lambda core: core.node):
        if sum(core.node in nodes for core in run) < count:
            nodes.add(node)
    near = [core for core in cores if core.node in nodes]
    cpus = tuple(sorted(chain.from_iterable(core.cpus for core in near)))
    return RankPlacement(threads=(UNPINNED,) * count, cpus=cpus, nodes=_nodes(near))


def _note_ranks(placed: _Ranks, budget: int, floating: bool, notes: _Notes) -> None:
    ranks = [rank for group in placed for rank in group]
    used = sum(len(rank.threads) for rank in ranks)
    if used > budget and floating:
        notes.warnings.append(f"{used} threads, one for each rank, share {budget} of quota")
    if len(placed) > 1:
        notes.reasons.append(f"{len(placed)} replicas share the {_count(budget, 'thread')}")
    if used < budget:
        notes.reasons.append(f"{_count(budget - used, 'core')} more left: ranks get equal numbers")
    if floating:
        notes.reasons.append("threads are not pinned: others may be on the same cores")
    spanning = max((len(rank.nodes) for rank in ranks), default=1)
    if spanning > 1:
        times = spanning * len(placed[0])
        notes.warnings.append(
            f"a rank spans {spanning} nodes: tp = {times} would keep each rank's memory on its own"
        )


def _as_asked(machine: Machine, tp: int, replicas: int, cores: Sequence[int]) -> Placement:
    """Runs of the CPUs that were asked for, one for each rank."""
    foreign = sorted(set(cores) - set(machine.affinity))
    if foreign:
        raise ConfigError(
            f"cores: CPU {foreign[0]} is not one that this process may use "
            f"({cpu_list(machine.affinity)})"
        )
    known = {cpu: core for core in machine.topology.cores for cpu in core.cpus}
    ranks = tp * replicas
    runs = [cores[len(cores) * r // ranks : len(cores) * (r + 1) // ranks] for r in range(ranks)]
    placed = [
        RankPlacement(
            threads=tuple(run),
            cpus=tuple(run),
            nodes=_nodes(known.get(cpu, Core(cpus=(cpu,))) for cpu in run),
        )
        for run in runs
    ]
    return Placement(
        replicas=tuple(tuple(placed[start : start + tp]) for start in range(0, ranks, tp)),
        spare=tuple(sorted(set(machine.affinity) - set(cores))),
        reasons=(f"cores = {','.join(map(str, cores))} was asked for: a thread for each",),
        warnings=tuple(_asked_too_much(machine, known, cores)),
    )


def _asked_too_much(
    machine: Machine, known: dict[int, Core], cores: Sequence[int]
) -> Iterable[str]:
    quota = machine.limits.quota
    if quota is not None and len(cores) > quota.cpus:
        yield f"{quota.path} pays for {quota.cpus:g} of these CPUs: threads will be stopped"
    if len({known[cpu].cpus if cpu in known else (cpu,) for cpu in cores}) < len(cores):
        yield "some of these CPUs are one core's"


def _nodes(cores: Iterable[Core]) -> tuple[int, ...]:
    return tuple(sorted({core.node for core in cores}))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
