"""The memory of every process of the machine, from ps or from Linux's /proc."""
from __future__ import annotations

import os
from typing import Mapping, NamedTuple

from superlance.command import PS_SECONDS, CommandFailed, read_proc_stats, run_ps
from superlance.listener import ExitRequest, Log, exit_request
from superlance.rpc import Unknown


class ProcessMemory(NamedTuple):
    """The memory of a process of the machine."""

    parent_pid: int
    rss_bytes: int


def parse_ps(output: str) -> dict[int, ProcessMemory]:
    """Return the ProcessMemory by pid from lines of pid, parent pid and RSS in KiB. Raises Unknown."""
    memory = {}
    for line in output.splitlines():
        numbers = line.split()
        if not numbers:
            continue
        if len(numbers) != 3 or not all(number.isdecimal() and len(number) < 20 for number in numbers):
            raise Unknown(f'ps printed {line[:80]!r} instead of pid, parent pid and RSS')
        memory[int(numbers[0])] = ProcessMemory(int(numbers[1]), int(numbers[2]) * 1024)
    if not memory:
        raise Unknown('ps printed no process')
    return memory


def read_ps(seconds: float, interrupt: ExitRequest) -> dict[int, ProcessMemory]:
    """Run ps, for so many seconds at most. Raises Unknown."""
    try:
        return parse_ps(run_ps(('pid', 'ppid', 'rss'), seconds, interrupt))
    except CommandFailed as why:
        raise Unknown(str(why)) from why


def read_proc() -> dict[int, ProcessMemory]:
    """Read Linux's /proc. Raises Unknown."""
    page_bytes = os.sysconf('SC_PAGE_SIZE')
    try:
        memory = {pid: ProcessMemory(int(fields[1]), int(fields[21]) * page_bytes) for pid, fields in read_proc_stats()}
    except OSError as why:
        raise Unknown(f'/proc: {why.strerror}') from why
    if not memory:
        raise Unknown('/proc has no processes')
    return memory


class MemoryReader:
    """Reads memory with ps, and after the first failure of ps from /proc, if there is one."""

    def __init__(self, log: Log, interrupt: ExitRequest = exit_request) -> None:
        self._log = log
        self._interrupt = interrupt
        self._use_proc = False

    def __call__(self, seconds: float = PS_SECONDS) -> dict[int, ProcessMemory]:
        """Return the ProcessMemory by pid, within so many seconds. Raises Unknown."""
        if self._use_proc:
            return read_proc()
        try:
            return read_ps(seconds, self._interrupt)
        except Unknown as why:
            if self._interrupt.requested or not os.path.exists('/proc/self/stat'):
                raise
            self._log(f'{why}; reading memory from /proc from now on')
        self._use_proc = True
        return read_proc()


def sum_descendants(memory: Mapping[int, ProcessMemory]) -> dict[int, int]:
    """Return by pid the bytes that a process and all its descendants use.

    From the leaves upwards, each process once. If pids were reused while ps ran, its output can contain a
    cycle; the processes in a cycle keep their own bytes.
    """
    totals = {pid: process.rss_bytes for pid, process in memory.items()}
    children_left = dict.fromkeys(memory, 0)
    for process in memory.values():
        if process.parent_pid in children_left:
            children_left[process.parent_pid] += 1
    leaves = [pid for pid, number in children_left.items() if number == 0]
    for pid in leaves:
        parent = memory[pid].parent_pid
        if parent in totals:
            totals[parent] += totals[pid]
            children_left[parent] -= 1
            if children_left[parent] == 0:
                leaves.append(parent)
    return totals


def measure(memory: Mapping[int, ProcessMemory], cumulative: bool) -> dict[int, int]:
    """Return by pid the bytes that count against a limit."""
    if cumulative:
        return sum_descendants(memory)
    return {pid: process.rss_bytes for pid, process in memory.items()}
