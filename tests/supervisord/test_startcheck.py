"""The checks at start with a real supervisord: its configuration as it really is, and what /proc hides."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator

import pytest
from support import PYTHON, Listener, Supervisord, make_patient, wait_for, write_script

PROGRAMS = """
[program:web]
command=sleep 1000
[program:slow]
command=sleep 1000
stopwaitsecs=60
[program:container]
command=sleep 1000
stdout_logfile=/dev/null
redirect_stderr=true
[program:quiet]
command=sleep 1000
stdout_logfile=NONE
stderr_logfile=syslog
[program:pool]
process_name=%(program_name)s_%(process_num)d
numprocs=2
command=sleep 1000
[eventlistener:memmon]
command=PYTHON -m superlance.memmon -p web=1GB -p pool=1GB -p wbe=1GB -p slow=1GB
events=TICK_3600
stderr_logfile=%(here)s/memmon.log
[eventlistener:crashmail]
command=PYTHON -m superlance.crashmail -p web -p container -p quiet --tail=5
events=PROCESS_STATE_EXITED
stderr_logfile=%(here)s/crashmail.log
"""
GROUP_NOTE = 'no process is named "pool"; using all processes of group "pool"'
TYPO = 'warning: no process matches "wbe"'
STOP_TIME = ('warning: stopwaitsecs=10 of memmon is shorter than stopwaitsecs=60 of slow: if memmon is stopped while '
             'it restarts slow, slow may stay down; set stopwaitsecs=80 in [eventlistener:memmon]')
LOGS = ['warning: unable to read the stdout log of container for --tail: it goes to /dev/null',
        'warning: unable to read the stdout log of quiet for --tail: there is none (stdout_logfile=NONE)',
        'warning: unable to read the stderr log of quiet for --tail: it goes to syslog']


@pytest.fixture(scope='module')
def supervisord(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisord]:
    folder = tmp_path_factory.mktemp('startcheck')
    with Supervisord(folder, PROGRAMS, environment=make_patient(folder)) as running:
        yield running


def read_messages(supervisord: Supervisord, listener: str, number: int) -> list[str]:
    """Wait for so many lines of a listener's log; return them without the time, the program and the first line."""
    path = supervisord.folder / f'{listener}.log'
    wait_for(lambda: path.exists() and path.read_text('utf-8').count('\n') > number, lambda: path.read_text('utf-8'))
    return [line.partition(f' {listener}: ')[2] for line in path.read_text('utf-8').splitlines()][1:]


def test_problems_of_the_configuration_are_logged_at_start(supervisord: Supervisord) -> None:
    assert read_messages(supervisord, 'memmon', 3) == [GROUP_NOTE, TYPO, STOP_TIME]
    assert sorted(read_messages(supervisord, 'crashmail', 3)) == sorted(LOGS)


def test_check_at_start_leaves_no_memory_behind(supervisord: Supervisord) -> None:
    def measure_kib(url: str) -> int:
        with Listener(['memmon', '-p', 'web=1GB'], {'SUPERVISOR_SERVER_URL': url}) as listener:
            listener.tick()
            rss = next(line for line in Path(f'/proc/{listener.pid}/status').read_text('utf-8').splitlines()
                       if line.startswith('VmRSS'))
            return int(rss.split()[1])

    assert measure_kib(supervisord.url) - measure_kib('unix:///nonexistent.sock') < 1024


MOUNT = 'mount -t proc -o hidepid=2 proc /proc'
SET_PRIVILEGES = 'setpriv --regid=65534 --clear-groups --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace'


@pytest.fixture
def hidepid(tmp_path: Path) -> str:
    """The path of a Python to which /proc hides the processes of other users.

    It is still root, so that it can read its own files, but without what exempts root: the capability SYS_PTRACE and
    the group 0.
    """
    if os.geteuid() or not all(map(shutil.which, ('unshare', 'setpriv'))):
        pytest.skip('needs root, unshare and setpriv')
    if tuple(map(int, re.findall(r'\d+', os.uname().release)[:2])) < (5, 8):
        pytest.skip('before Linux 5.8, a mount of /proc changes the options of all others')
    if subprocess.run(['unshare', '-m', 'sh', '-c', f'{MOUNT} && {SET_PRIVILEGES} true'],
                      stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip('may not mount /proc')
    return str(write_script(
        tmp_path / 'python', f"""exec unshare -m sh -c '{MOUNT} && exec {SET_PRIVILEGES} "$@"' sh {PYTHON} "$@"\n"""))


def test_processes_that_hidepid_hides_are_logged_at_start(tmp_path: Path, hidepid: str) -> None:
    line = ("warning: unable to read the memory of web: other users' processes are hidden, probably by the mount "
            'option hidepid of /proc; run memmon as root or as the user of these processes')
    with Supervisord(tmp_path, '[program:web]\ncommand=sleep 1000\nstartsecs=0\nuser=nobody\n') as supervisord:
        supervisord.wait_for_state('web')
        with Listener(['memmon', '-a', '1KB'], {**supervisord.environment, **make_patient(tmp_path)},
                      executable=hidepid) as listener:
            for _ in range(3):
                listener.tick()
            assert listener.log.count(line) == 1
            assert 'restarted' not in listener.log
