"""The memory of every process, from ps and from /proc."""
from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import Any, Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given
from support import PYTHON, read, wait_for, write_script

from superlance.listener import ExitRequest, make_log
from superlance.memory import MemoryReader, ProcessMemory, measure, parse_ps, read_proc, read_ps, sum_descendants
from superlance.rpc import Unknown

KB, MB = 1024, 1024 ** 2


@pytest.mark.parametrize(('output', 'memory'), [
    ('1 0 4\n', {1: ProcessMemory(0, 4 * KB)}),
    ('    1     0  4\n  312     1 12345\n\n', {1: ProcessMemory(0, 4 * KB), 312: ProcessMemory(1, 12345 * KB)}),
    ('0 0 0', {0: ProcessMemory(0, 0)}),
    ('1\t0\t4\r\n', {1: ProcessMemory(0, 4 * KB)}),
])
def test_parse_ps(output: str, memory: dict[int, ProcessMemory]) -> None:
    assert parse_ps(output) == memory


@pytest.mark.parametrize(('output', 'error'), [
    ('', 'ps printed no process'),
    (' \n\n', 'ps printed no process'),
    *((line + '\n', f'ps printed {line!r} instead of pid, parent pid and RSS')
      for line in ('1 0', '1 0 4 5', '1 0 12m', '1 0 -4', '1 0 \N{SUPERSCRIPT TWO}')),
    ('PID PPID RSS\n1 0 4\n', "ps printed 'PID PPID RSS' instead of pid, parent pid and RSS"),
    ('1 0 ' + '9' * 5000, f"ps printed '1 0 {'9' * 76}' instead of pid, parent pid and RSS"),
    ('1 0 4\n' + 'x' * 200, f"ps printed '{'x' * 80}' instead of pid, parent pid and RSS"),
])
def test_unusable_output_of_ps_is_unknown(output: str, error: str) -> None:
    with pytest.raises(Unknown) as why:
        parse_ps(output)
    assert str(why.value) == error


@given(st.text('0123456789 \n-x\u0663', max_size=40))
def test_any_output_of_ps_is_read_or_unknown(output: str) -> None:
    try:
        memory = parse_ps(output)
    except Unknown:
        return
    assert memory


@pytest.fixture
def big_child(tmp_path: Path) -> Iterator[int]:
    """The pid of a child that uses 80 MB and has a name that confuses a careless reader of /proc."""
    odd = tmp_path / 'a) R 7 (b'
    odd.symlink_to(PYTHON)
    code = 'x = bytearray(80 * 1024 ** 2); print(flush=True); input()'
    with subprocess.Popen([str(odd), '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout
            assert child.stdout.readline()
            assert read(Path(f'/proc/{child.pid}/comm')) == odd.name + '\n'
            yield child.pid
        finally:
            child.kill()


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='there is no /proc')
def test_proc_and_ps_agree(big_child: int) -> None:
    by_ps, by_proc = read_ps(10, ExitRequest()), read_proc()
    assert by_proc[big_child].parent_pid == by_ps[big_child].parent_pid == os.getpid()
    assert 80 * MB < by_proc[big_child].rss_bytes < 160 * MB
    assert by_proc[big_child].rss_bytes == pytest.approx(by_ps[big_child].rss_bytes, rel=0.05)
    assert set(by_ps) & set(by_proc) >= {os.getpid(), os.getppid(), big_child}


@pytest.mark.parametrize(('found', 'error'), [
    ([], '/proc has no processes'),
    (['self', 'version'], '/proc has no processes'),
    (PermissionError(13, 'Permission denied'), '/proc: Permission denied'),
])
def test_useless_proc_is_unknown(found: Any, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(path: str) -> list[str]:
        if isinstance(found, list):
            return found
        raise found
    monkeypatch.setattr(os, 'listdir', listdir)
    with pytest.raises(Unknown) as why:
        read_proc()
    assert str(why.value) == error


def test_process_that_exits_while_proc_is_read_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'listdir', lambda path: [str(2 ** 30), str(os.getpid())])
    assert list(read_proc()) == [os.getpid()]


@pytest.fixture
def hanging_ps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ps that hangs; the path of the file that it writes first."""
    write_script(tmp_path / 'ps', f'touch {tmp_path}/started; exec sleep 600\n')
    monkeypatch.setenv('PATH', f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / 'started'


def test_ps_that_hangs_is_unknown(hanging_ps: Path) -> None:
    with pytest.raises(Unknown, match=r'ps -A .*: '):
        read_ps(0.2, ExitRequest())


def test_signal_interrupts_ps_and_proc_is_not_read_instead(
        hanging_ps: Path, capfd: pytest.CaptureFixture[str]) -> None:
    request = ExitRequest()

    def ask_to_exit() -> None:
        wait_for(hanging_ps.exists)
        request.requested = True

    thread = threading.Thread(target=ask_to_exit)
    thread.start()
    with pytest.raises(Unknown):
        MemoryReader(make_log('memmon'), request)()
    thread.join()
    assert capfd.readouterr().err == '', 'if it was not interrupted, ps has been waited for'


def test_without_ps_proc_is_read_from_then_on(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('PATH', '/nonexistent')
    read_memory = MemoryReader(make_log('memmon'))
    with monkeypatch.context() as without:
        without.setattr(os.path, 'exists', lambda path: False)
        with pytest.raises(Unknown, match=r'ps -A .*: No such file'):
            read_memory()
    assert os.getpid() in read_memory()
    assert os.getpid() in read_memory()
    assert capfd.readouterr().err.count('No such file or directory; reading memory from /proc from now on') == 1
    monkeypatch.setattr(os, 'listdir', lambda path: [])
    with pytest.raises(Unknown, match='/proc has no processes'):
        read_memory()


# A family of processes: pid to (parent pid, bytes), and what each uses with its descendants.
FAMILIES = [
    ('alone', {5: (1, 7)}, {5: 7}),
    ('tree', {1: (0, 1), 2: (1, 10), 3: (1, 100), 4: (2, 1000), 5: (4, 10000)},
     {1: 11111, 2: 11010, 3: 100, 4: 11000, 5: 10000}),
    ('parents after children', {9: (8, 1), 8: (7, 10), 7: (0, 100)}, {9: 1, 8: 11, 7: 111}),
    ('pid 0 is its own parent', {0: (0, 1), 1: (0, 10), 2: (1, 100)}, {0: 111, 1: 110, 2: 100}),
    ('circle', {1: (2, 1), 2: (1, 10), 3: (0, 100)}, {1: 1, 2: 10, 3: 100}),
    ('circle with a child', {1: (2, 1), 2: (1, 10), 3: (1, 100)}, {1: 101, 2: 10, 3: 100}),
    ('missing parent', {4: (3, 1), 5: (4, 10), 6: (3, 100)}, {4: 11, 5: 10, 6: 100}),
    ('none', {}, {}),
    ('a long chain', {n: (n - 1, 1) for n in range(1, 5001)}, {n: 5001 - n for n in range(1, 5001)}),
]


@pytest.mark.parametrize(('family', 'totals'), [case[1:] for case in FAMILIES], ids=[case[0] for case in FAMILIES])
def test_memory_with_descendants(family: dict[int, tuple[int, int]], totals: dict[int, int]) -> None:
    memory = {pid: ProcessMemory(*numbers) for pid, numbers in family.items()}
    assert sum_descendants(memory) == totals
    assert measure(memory, cumulative=True) == totals
    assert measure(memory, cumulative=False) == {pid: numbers[1] for pid, numbers in family.items()}


@given(st.lists(st.integers(0, 30), max_size=30))
def test_memory_with_descendants_of_any_tree(parents: list[int]) -> None:
    """Each process' parent has a smaller pid, so that there is no circle."""
    memory = {pid: ProcessMemory(parent % pid, 2 ** pid) for pid, parent in enumerate(parents, 1)}
    expected = {pid: 0 for pid in memory}
    for pid, process in memory.items():
        ancestor = pid
        while ancestor:
            expected[ancestor] += process.rss_bytes
            ancestor = memory[ancestor].parent_pid
    assert sum_descendants(memory) == expected
