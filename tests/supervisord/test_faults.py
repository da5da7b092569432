"""Faults on a real supervisord: lost calls, credentials, permissions, failed starts, an operator, a signal.

Their combinations are in tests/unit.
"""
from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from inbox import CommandInbox
from support import (
    TIMEOUT,
    Listener,
    Proxy,
    Supervisord,
    make_patient,
    read,
    read_until,
    serving,
    wait_for,
    write_script,
)

from superlance.rpc import find_supervisor

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24

# When it is started for the first time, it grows over memmon's limit. SLOW: then it stops only when it may.
GROWING = '''echo >> NAME.starts
if mkdir NAME.grown 2>/dev/null
then exec PYTHON -c '
import os, signal, time
def stop(*_):
    while SLOW and not os.path.exists("NAME.may-stop"):
        time.sleep(0.02)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
memory = b"x" * (64 << 20)
open("NAME.ready", "w").close()
time.sleep(1000)'
fi
exec sleep 1000
'''


def add_program(folder: Path, name: str, slow: bool = False) -> str:
    """Write a program that needs one restart, and return its section; slow: it stops when NAME.may-stop exists."""
    write_script(folder / f'{name}.sh', GROWING.replace('NAME', name).replace('SLOW', str(slow)).replace(
        'PYTHON', sys.executable))
    return (f'[program:{name}]\ncommand=%(here)s/{name}.sh\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\n'
            'stopwaitsecs=600\n')


def count_starts(folder: Path, name: str = 'web') -> int:
    return read(folder / f'{name}.starts').count('\n')


class Rig:
    """A supervisord whose process web needs one restart, as memmon and httpok can see."""

    def __init__(self, supervisord: Supervisord, health_port: int) -> None:
        self.supervisord = supervisord
        self._port = health_port

    def arguments(self, kind: str, *more: str) -> list[str]:
        return {'memmon': ['memmon', '-a', '48MB', *more],
                'httpok': ['httpok', '-a', '-t', '60', *more, f'http://127.0.0.1:{self._port}/']}[kind]

    def listen(self, kind: str, url: str = '', *more: str, **popen: Any) -> Listener:
        environment = dict(self.supervisord.environment, **popen.pop('environment', {}))
        if url:
            environment['SUPERVISOR_SERVER_URL'] = url
        return Listener(self.arguments(kind, *more), environment, self.supervisord.folder, **popen)

    def wait_until_grown(self, name: str = 'web') -> int:
        """Return the pid."""
        wait_for((self.supervisord.folder / f'{name}.ready').exists)
        pid: int = self.supervisord.wait_for_state(name)['pid']
        return pid

    def check_restarted(self, listener: Listener) -> None:
        """Check that there was exactly one restart, logged once, and that the next tick does not restart again."""
        assert self.supervisord.info('web')['statename'] == 'RUNNING'
        wait_for(lambda: count_starts(self.supervisord.folder) >= 2)
        listener.tick()
        assert count_starts(self.supervisord.folder) == 2
        assert self.supervisord.log.count("spawned: 'web'") == 2
        assert listener.log.count('restarted web') == 1
        assert 'Traceback' not in listener.log


def make_health(folder: Path) -> Callable[[socket.socket], None]:
    """Answer for web, which is healthy once it has been started a second time."""
    def handle(client: socket.socket) -> None:
        read_until(client, b'\r\n\r\n')
        status = b'200 OK' if count_starts(folder) > 1 else b'500 Sick'
        client.sendall(b'HTTP/1.1 ' + status + b'\r\nContent-Length: 0\r\n\r\n')
    return handle


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(make_health(tmp_path)) as port, Supervisord(tmp_path, add_program(tmp_path, 'web')) as supervisord:
        yield Rig(supervisord, port)


# Lost calls.

def test_lost_answers_leave_the_process_restarted_once(rig: Rig, tmp_path: Path) -> None:
    rules = {'stopProcess': ['lose answer'], 'startProcess': ['lose answer']}
    rig.wait_until_grown()
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, rules) as proxy, \
            rig.listen('memmon', proxy.url) as listener:
        listener.tick_until_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


def test_process_that_httpok_left_down_is_started_at_the_next_tick(rig: Rig, tmp_path: Path) -> None:
    # It is stopped, and then supervisord does not answer within that tick.
    rules = {'startProcess': ['lose call'], 'getProcessInfo': ['pass', 'lose call', 'lose call']}
    rig.wait_until_grown()
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, rules) as proxy, \
            rig.listen('httpok', proxy.url) as listener:
        listener.tick()
        listener.wait_for_log(f'failed to start web: supervisord at {proxy.url} does not answer startProcess')
        assert rig.supervisord.info('web')['statename'] == 'STOPPED'
        listener.tick()
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


# Credentials and permissions.

def test_credentials_are_required_and_used(tmp_path: Path) -> None:
    login = {'SUPERVISOR_USERNAME': 'bob', 'SUPERVISOR_PASSWORD': 'größe'}
    patient = make_patient(tmp_path)
    warning = ('warning: supervisord requires a user name and password (401): '
               'set SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD ')
    options = 'username=bob\npassword=größe\n'
    with Supervisord(tmp_path, add_program(tmp_path, 'web'), options) as supervisord:
        wait_for((tmp_path / 'web.ready').exists)
        rig = Rig(supervisord, 0)
        with rig.listen('memmon', environment=patient) as listener:
            for _ in range(2):
                listener.tick()
            assert listener.log.count(warning) == 1
            assert 'restarted web' not in listener.log
            assert listener.close() == 0
        assert count_starts(tmp_path) == 1
        with rig.listen('memmon', environment={**patient, **login}) as listener:
            listener.tick()
            assert 'restarted web' in listener.log and 'warning' not in listener.log
            wait_for(lambda: count_starts(tmp_path) == 2)
            assert listener.close() == 0
        # Those of supervisorctl are used from the command line.
        text = supervisord.configuration.read_text('utf-8')
        supervisord.configuration.write_text(text.replace('[supervisorctl]', '[supervisorctl]\n' + options), 'utf-8')
        process, = find_supervisor(str(supervisord.configuration), {}).get_processes()
        assert process.namespec == 'web:web'


def drop_root_rights() -> None:
    """Make file modes apply to root, too, from the next exec on; the owner of sockets stays the same."""
    if os.getuid() == 0:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), 'prctl')


@pytest.mark.skipif(not sys.platform.startswith('linux') and os.getuid() == 0, reason='nothing is forbidden to root')
def test_socket_without_permission(rig: Rig) -> None:
    rig.wait_until_grown()
    with rig.listen('memmon', preexec_fn=drop_root_rights) as listener:
        listener.expect(b'READY\n')
        rig.supervisord.socket.chmod(0)
        listener.send_event('TICK_5', f'when:{int(time.time())}')
        listener.expect(b'RESULT 2\nOK')
        listener.wait_for_log(
            f"uid {os.getuid()} is not allowed to open supervisord's socket {rig.supervisord.url}: see chmod")
        rig.supervisord.socket.chmod(0o700)
        listener.tick()
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


# Starts that fail.

def test_failed_start_is_repeated_and_does_not_keep_others_from_being_restarted(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    with Supervisord(tmp_path, add_program(tmp_path, 'bad') + add_program(tmp_path, 'web')) as supervisord:
        rig = Rig(supervisord, 0)
        web = rig.wait_until_grown()
        rig.wait_until_grown('bad')
        program = tmp_path / 'bad.sh'
        with rig.listen('memmon', '', '-m', 'bob@example.com', '-s', inbox.command) as listener:
            program.rename(tmp_path / 'away')
            listener.tick()
            assert 'failed to start bad: NO_FILE' in listener.log
            assert supervisord.info('web')['pid'] not in (0, web)
            assert supervisord.info('bad')['statename'] == 'STOPPED'
            (tmp_path / 'away').rename(program)
            listener.tick()
            assert 'restarted bad' in listener.log
            assert supervisord.info('bad')['statename'] == 'RUNNING'
            assert listener.log.count('failed to start bad') == 1
            listener.tick()
            wait_for(lambda: count_starts(tmp_path, 'bad') == count_starts(tmp_path, 'web') == 2)
            inbox.wait(3)
            assert listener.close() == 0
    assert sorted(inbox.subjects) == ['memmon: failed to start process bad:bad', 'memmon: process bad:bad restarted',
                                      'memmon: process web:web restarted']


# An operator.

def test_process_that_its_operator_stops_during_the_check_stays_stopped(rig: Rig, tmp_path: Path) -> None:
    rig.wait_until_grown()
    core = write_script(tmp_path / 'core', 'touch core.begun; while ! [ -e core.end ]; do sleep 0.05; done\n')
    with rig.listen('httpok', '', '-d', str(tmp_path), '-g', str(core)) as listener:
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', f'when:{int(time.time())}')
        wait_for((tmp_path / 'core.begun').exists)
        rig.supervisord.rpc.stopProcess('web')
        (tmp_path / 'core.end').touch()
        listener.expect(b'RESULT 2\nOK')
        listener.wait_for_log('left web alone: it is now STOPPED')
        listener.tick()
        assert rig.supervisord.info('web')['statename'] == 'STOPPED'
        assert count_starts(tmp_path) == 1
        assert listener.close() == 0


# A signal.

def test_sigterm_during_restart_completes_it_and_acknowledges_event(tmp_path: Path) -> None:
    """Else supervisord would send the tick again to the next listener, which would restart the process once more."""
    with serving(make_health(tmp_path)) as port, \
            Supervisord(tmp_path, add_program(tmp_path, 'web', slow=True)) as supervisord:
        rig = Rig(supervisord, port)
        pid = rig.wait_until_grown()
        with rig.listen('httpok') as listener:
            listener.expect(b'READY\n')
            listener.send_event('TICK_5', f'when:{int(time.time())}')
            supervisord.wait_for_state('web', 'STOPPING')
            listener.process.send_signal(signal.SIGTERM)
            (tmp_path / 'web.may-stop').touch()
            listener.expect(b'RESULT 2\nOK')
            assert listener.process.wait(TIMEOUT) == 0
            assert listener.process.stdout and listener.process.stdout.read() == b''
            assert supervisord.wait_for_state('web')['pid'] != pid
            assert listener.log.count('restarted web') == 1
            assert 'Traceback' not in listener.log
        wait_for(lambda: count_starts(tmp_path) == 2)
