"""Faults on a real supervisord: lost calls, failed starts, an operator, signals, and a supervisord that exits."""
from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import (
    Listener,
    Proxy,
    Supervisord,
    find_children,
    is_alive,
    read,
    read_until,
    serving,
    wait_for,
    write_script,
)

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24

# When it is started for the first time, it grows over memmon's limit. SLOW: how long it takes to stop.
GROWING = '''echo >> NAME.starts
if mkdir NAME.grown 2>/dev/null
then exec PYTHON -c '
import os, signal, time
def stop(*_):
    time.sleep(SLOW)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
memory = b"x" * (64 << 20)
open("NAME.ready", "w").close()
time.sleep(1000)'
fi
exec sleep 1000
'''


def add_program(folder: Path, name: str, slow: float = 0) -> str:
    """Write a program that needs one restart, and return its section; slow: how many seconds it takes to stop."""
    write_script(folder / f'{name}.sh', GROWING.replace('NAME', name).replace('SLOW', str(slow)).replace(
        'PYTHON', sys.executable))
    return (f'[program:{name}]\ncommand=%(here)s/{name}.sh\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\n')


def count_starts(folder: Path, name: str = 'web') -> int:
    return read(folder / f'{name}.starts').count('\n')


class Rig:
    """A supervisord whose process web needs one restart, as memmon and httpok can see."""

    def __init__(self, supervisord: Supervisord, health_port: int) -> None:
        self.supervisord = supervisord
        self._port = health_port

    def arguments(self, kind: str, *more: str) -> list[str]:
        return {'memmon': ['memmon', '-a', '48MB', *more],
                'httpok': ['httpok', '-a', '-t', '5', *more, f'http://127.0.0.1:{self._port}/']}[kind]

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


# Lost calls. Every combination of them is tested in tests/unit.

@pytest.mark.parametrize('rules', [
    pytest.param({'stopProcess': ['lose answer']}, id='stop answer'),
    pytest.param({'startProcess': ['lose answer']}, id='start answer'),
    pytest.param({'stopProcess': ['lose call'], 'startProcess': ['lose call']}, id='both calls'),
])
def test_lost_call_or_answer_leaves_the_process_running(rig: Rig, tmp_path: Path, rules: dict[str, list[str]]) -> None:
    rig.wait_until_grown()
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, rules) as proxy, \
            rig.listen('memmon', proxy.url) as listener:
        listener.tick_until_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


def lose_after_stop() -> dict[str, list[str]]:
    """Rules for a Proxy: the process is stopped, and then supervisord does not answer within that tick."""
    return {'startProcess': ['lose call'], 'getProcessInfo': ['pass', 'lose call', 'lose call']}


def test_process_that_httpok_left_down_is_started_at_the_next_tick(rig: Rig, tmp_path: Path) -> None:
    rig.wait_until_grown()
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, lose_after_stop()) as proxy, \
            rig.listen('httpok', proxy.url) as listener:
        listener.tick()
        listener.wait_for_log(f'failed to start web: supervisord at {proxy.url} does not answer startProcess')
        assert rig.supervisord.info('web')['statename'] == 'STOPPED'
        listener.tick()
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


@contextmanager
def vanish(path: Path) -> Iterator[None]:
    """Take a socket away during the block."""
    away = path.with_suffix('.away')
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


def test_supervisord_that_cannot_be_reached_for_a_tick(rig: Rig) -> None:
    pid = rig.wait_until_grown()
    with rig.listen('memmon') as listener:
        listener.expect(b'READY\n')
        with vanish(rig.supervisord.socket):
            listener.send_event('TICK_5', f'when:{int(time.time())}')
            listener.expect(b'RESULT 2\nOK')
        listener.wait_for_log(f'supervisord at {rig.supervisord.url} does not answer')
        assert rig.supervisord.info('web')['pid'] == pid
        listener.tick()
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


def test_credentials_are_required_and_used(tmp_path: Path) -> None:
    login = {'SUPERVISOR_USERNAME': 'bob', 'SUPERVISOR_PASSWORD': 'secret'}
    server = 'username=bob\npassword=secret\n'
    with Supervisord(tmp_path, add_program(tmp_path, 'web'), server) as supervisord:
        wait_for((tmp_path / 'web.ready').exists)
        rig = Rig(supervisord, 0)
        with rig.listen('memmon') as listener:
            listener.tick()
            listener.wait_for_log('(401): set SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD')
            assert 'restarted web' not in listener.log
            assert listener.close() == 0
        assert count_starts(tmp_path) == 1
        with rig.listen('memmon', environment=login) as listener:
            listener.tick()
            listener.wait_for_log('restarted web')
            wait_for(lambda: count_starts(tmp_path) == 2)
            assert listener.close() == 0


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


def test_supervisord_without_an_interface(tmp_path: Path) -> None:
    with Supervisord(tmp_path, add_program(tmp_path, 'web'), interface=False) as supervisord:
        wait_for((tmp_path / 'web.ready').exists)
        with Rig(supervisord, 0).listen('memmon') as listener:
            listener.tick()
            listener.wait_for_log('needs an [rpcinterface:supervisor] section')
            assert listener.close() == 0
            assert 'Traceback' not in listener.log
        assert count_starts(tmp_path) == 1


def test_tick_waits_for_a_supervisord_that_is_stopped_for_a_while(rig: Rig) -> None:
    rig.wait_until_grown()
    with rig.listen('memmon') as listener:
        # When the first event is acknowledged, the checks at start are done.
        listener.serve_event('PROCESS_GROUP_ADDED', 'groupname:web\n')
        listener.expect(b'READY\n')
        os.kill(rig.supervisord.pid, signal.SIGSTOP)
        listener.send_event('TICK_5', f'when:{int(time.time())}')
        # It has connected when the backlog of supervisord's socket contains it.
        wait_for(lambda: any(map(find_socket, [listener.pid, *find_children(listener.pid)])))
        os.kill(rig.supervisord.pid, signal.SIGCONT)
        listener.expect(b'RESULT 2\nOK')
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


def find_socket(pid: int) -> bool:
    """Return whether a process has a socket open."""
    def target(link: Path) -> str:
        try:
            return os.readlink(str(link))
        except OSError:
            return ''
    folder = f'/proc/{pid}/fd'
    try:
        return any(target(Path(folder, name)).startswith('socket:') for name in os.listdir(folder))
    except OSError:
        return False    # it has exited


# Starts that fail.

def remove(path: Path) -> None:
    path.unlink()


def let_exit(path: Path) -> None:
    write_script(path, 'exit 3\n')


@pytest.mark.parametrize(('fail', 'reason'), [(remove, 'NO_FILE'), (let_exit, '')])
def test_failed_start_is_repeated_and_does_not_keep_others_from_being_restarted(
        tmp_path: Path, fail: Callable[[Path], None], reason: str) -> None:
    bad = add_program(tmp_path, 'bad').replace('startsecs=0', 'startsecs=1\nstartretries=0')
    with Supervisord(tmp_path, bad + add_program(tmp_path, 'web')) as supervisord:
        rig = Rig(supervisord, 0)
        web = rig.wait_until_grown()
        rig.wait_until_grown('bad')
        program = tmp_path / 'bad.sh'
        text = program.read_text()
        with rig.listen('memmon', '', '-m', 'bob@example.com', '-s', f'cat >> {tmp_path}/mail') as listener:
            fail(program)
            listener.tick()
            listener.wait_for_log(f'failed to start bad: {reason}')
            supervisord.wait_for_restart('web', web)
            assert supervisord.info('bad')['statename'] in ('STOPPED', 'FATAL', 'BACKOFF', 'EXITED')
            program.write_text(text)
            program.chmod(0o755)
            listener.tick_until_log('restarted bad')
            assert supervisord.info('bad')['statename'] == 'RUNNING'
            assert listener.log.count('failed to start bad') == 1
            listener.tick()
            assert count_starts(tmp_path, 'bad') == count_starts(tmp_path, 'web') == 2
            assert listener.close() == 0
        mail = read(tmp_path / 'mail')
        for subject in ('failed to start process bad:bad', 'process bad:bad restarted', 'process web:web restarted'):
            assert mail.count(f'Subject: memmon: {subject}\n') == 1, subject


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


def test_operator_takes_over_what_was_left_down(rig: Rig, tmp_path: Path) -> None:
    begun = rig.supervisord.info('web')['start']
    rig.wait_until_grown()
    wait_for(lambda: time.time() > begun + 1)   # start is in whole seconds
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, lose_after_stop()) as proxy, \
            rig.listen('memmon', proxy.url) as listener:
        listener.tick()
        listener.wait_for_log('failed to start web')
        rig.supervisord.rpc.startProcess('web')
        # A SIGTERM between supervisord's fork and exec would be lost.
        wait_for(lambda: count_starts(tmp_path) == 2)
        rig.supervisord.rpc.stopProcess('web')
        listener.tick()
        listener.wait_for_log('left web alone: somebody else has stopped it')
        listener.tick()
        assert rig.supervisord.info('web')['statename'] == 'STOPPED'
        assert listener.close() == 0


def test_program_with_a_name_beyond_ascii_is_restarted(tmp_path: Path) -> None:
    with Supervisord(tmp_path, add_program(tmp_path, 'größe')) as supervisord:
        pid = Rig(supervisord, 0).wait_until_grown('größe')
        with Listener(['memmon', '-p', 'größe=48MB', '-p', 'großes=1KB'], supervisord.environment) as listener:
            listener.tick()
            listener.wait_for_log(f'restarted größe (pid {pid}: ')
            assert listener.log.count('no process matches "großes"') == 1
            assert listener.close() == 0
        assert supervisord.info('größe')['statename'] == 'RUNNING'
        assert count_starts(tmp_path, 'größe') == 2


# Signals.

def test_sigterm_during_restart_completes_it_and_acknowledges_event(tmp_path: Path) -> None:
    with serving(make_health(tmp_path)) as port, \
            Supervisord(tmp_path, add_program(tmp_path, 'web', slow=1)) as supervisord:
        rig = Rig(supervisord, port)
        pid = rig.wait_until_grown()
        with rig.listen('httpok') as listener:
            listener.expect(b'READY\n')
            listener.send_event('TICK_5', f'when:{int(time.time())}')
            supervisord.wait_for_state('web', 'STOPPING')
            listener.process.send_signal(signal.SIGTERM)
            listener.expect(b'RESULT 2\nOK')
            assert listener.process.wait(30) == 0
            assert listener.process.stdout and listener.process.stdout.read() == b''
            info = supervisord.wait_for_state('web')
            assert info['pid'] != pid
            listener.wait_for_log('restarted web')
            assert 'Traceback' not in listener.log
        wait_for(lambda: count_starts(tmp_path) == 2)


# A supervisord that exits.

ALL_THREE = '''
[eventlistener:memmon]
command=BIN/memmon -a 1GB -p nonesuch=1GB -m bob@example.com -s 'cat > /dev/null'
events=TICK_5
stderr_logfile=%(here)s/memmon.log
[eventlistener:httpok]
command=BIN/httpok -p web -E -m bob@example.com -s 'cat > /dev/null' http://127.0.0.1:1/
events=TICK_5
stderr_logfile=%(here)s/httpok.log
[eventlistener:crashmail]
command=BIN/crashmail -a -m bob@example.com -s 'cat > /dev/null'
events=PROCESS_STATE
stderr_logfile=%(here)s/crashmail.log
'''
THREE = ['memmon', 'httpok', 'crashmail']


def wait_until_listening(supervisord: Supervisord) -> dict[str, int]:
    """Return the pids of the three listeners, all of which wait for an event."""
    pids = {name: supervisord.wait_for_state(name)['pid'] for name in THREE}
    wait_for(lambda: supervisord.log.count('-> READY') >= len(THREE), lambda: supervisord.log)
    return pids


def test_listeners_exit_when_supervisord_shuts_down(tmp_path: Path) -> None:
    with Supervisord(tmp_path, ALL_THREE) as supervisord:
        pids = wait_until_listening(supervisord)
        os.kill(supervisord.pid, signal.SIGTERM)
        assert supervisord.wait() == 0
        assert 'stopped: memmon' in supervisord.log
        assert 'SIGKILL' not in supervisord.log
        assert not any(map(is_alive, pids.values()))
    assert not any('Traceback' in read(tmp_path / f'{name}.log') for name in THREE)


def test_listeners_exit_when_supervisord_is_killed(tmp_path: Path) -> None:
    with Supervisord(tmp_path, ALL_THREE) as supervisord:
        pids = wait_until_listening(supervisord)
        os.kill(supervisord.pid, signal.SIGKILL)
        supervisord.wait()
        for pid in pids.values():
            wait_for(lambda: not is_alive(pid))
    assert not any('Traceback' in read(tmp_path / f'{name}.log') for name in THREE)


def test_supervisord_that_shuts_down_during_a_restart(tmp_path: Path) -> None:
    with Supervisord(tmp_path, add_program(tmp_path, 'web', slow=1)) as supervisord:
        rig = Rig(supervisord, 0)
        rig.wait_until_grown()
        with rig.listen('memmon') as listener:
            listener.expect(b'READY\n')
            listener.send_event('TICK_5', f'when:{int(time.time())}')
            supervisord.wait_for_state('web', 'STOPPING')
            os.kill(supervisord.pid, signal.SIGTERM)
            assert supervisord.wait() == 0
            listener.expect(b'RESULT 2\nOK')
            assert listener.close() == 0
            assert 'Traceback' not in listener.log and 'restarted web' not in listener.log
        assert count_starts(tmp_path) == 1


# Itself.

def test_httpok_does_not_restart_its_own_pool(tmp_path: Path) -> None:
    """The pool's name comes first, so its processes would have been restarted before web."""
    pool = ('[program:pool]\ncommand=/bin/sleep 1000\nnumprocs=2\nstartsecs=0\n'
            'process_name=%(program_name)s_%(process_num)d\n')
    with Supervisord(tmp_path, pool + add_program(tmp_path, 'web')) as supervisord, \
            Listener(['httpok', '-a', '-t', '0.2', 'http://127.0.0.1:1/'],
                     {**supervisord.environment, 'SUPERVISOR_GROUP_NAME': 'pool'}) as listener:
        names = ['web', 'pool:pool_0', 'pool:pool_1']
        pids = {name: supervisord.wait_for_state(name)['pid'] for name in names}
        listener.tick()
        supervisord.wait_for_restart('web', pids.pop('web'))
        for name, pid in pids.items():
            assert supervisord.info(name)['pid'] == pid
        assert 'pool_' not in listener.log
        assert listener.close() == 0
