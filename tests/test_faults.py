"""What becomes of processes and listeners when calls are lost, starts fail, signals come and supervisord goes."""
from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterator

import pytest
from support import (
    ALL_LOST,
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

LISTENERS = ['memmon', 'httpok']
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24

# The first time it is started, it grows over memmon's limit. slow: how long it takes to stop.
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
    """Write a program that needs one restart, and return its section."""
    write_script(folder / (name + '.sh'), GROWING.replace('NAME', name).replace('SLOW', str(slow)).replace(
        'PYTHON', sys.executable))
    return (f'[program:{name}]\ncommand=%(here)s/{name}.sh\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\n')


def count_starts(folder: Path, name: str = 'web') -> int:
    return read(folder / (name + '.starts')).count('\n')


class Rig:
    """A supervisord whose process web needs one restart, which memmon and httpok can see."""

    def __init__(self, supervisord: Supervisord, health_port: int) -> None:
        self.supervisord = supervisord
        self._port = health_port

    def arguments(self, kind: str, *more: str) -> list[str]:
        return {'memmon': ['memmon', '-a', '48MB', *more],
                'httpok': ['httpok', '-a', '-t', '5', *more, 'http://127.0.0.1:%d/' % self._port]}[kind]

    def listen(self, kind: str, url: str = '', *more: str, **popen: Any) -> Listener:
        environment = dict(self.supervisord.environment, **popen.pop('environment', {}))
        if url:
            environment['SUPERVISOR_SERVER_URL'] = url
        return Listener(self.arguments(kind, *more), environment, self.supervisord.folder, **popen)

    def wait_until_grown(self, name: str = 'web') -> int:
        """Return the pid."""
        wait_for((self.supervisord.folder / (name + '.ready')).exists)
        pid: int = self.supervisord.wait_for_state(name)['pid']
        return pid

    def check_restarted(self, listener: Listener) -> None:
        """One restart it is, told once, and after it all is well."""
        assert self.supervisord.info('web')['statename'] == 'RUNNING'
        wait_for(lambda: count_starts(self.supervisord.folder) >= 2)
        lines = listener.log.count('\n')
        listener.tick()
        assert listener.log.count('\n') == lines, listener.log
        assert count_starts(self.supervisord.folder) == 2
        assert self.supervisord.log.count("spawned: 'web'") == 2
        assert listener.log.count('restarted web') == 1
        assert 'Traceback' not in listener.log


def make_health(folder: Path) -> Callable[[socket.socket], None]:
    """Answer like web, which is well when it has been started a second time."""
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

@pytest.mark.parametrize('rules, told', [
    pytest.param({'stopProcess': ['lose answer']}, '', id='stop answer'),
    pytest.param({'startProcess': ['lose answer']}, '', id='start answer'),
    pytest.param({'stopProcess': ['lose call'], 'startProcess': ['lose call']},
                 'failed to stop web: supervisord at URL does not answer stopProcess', id='both calls'),
    pytest.param({'startProcess': ['lose call'], 'getProcessInfo': ALL_LOST},
                 'failed to start web: supervisord at URL does not answer startProcess', id='between'),
    pytest.param({'stopProcess': ['lose answer'], 'getProcessInfo': ALL_LOST},
                 'failed to stop web: supervisord at URL does not answer stopProcess', id='all after the stop'),
    pytest.param({'startProcess': ['lose answer'], 'getProcessInfo': ALL_LOST},
                 'failed to start web: supervisord at URL does not answer startProcess', id='all after the start'),
    pytest.param({'getAllProcessInfo': ['lose call']},
                 'supervisord at URL does not answer getAllProcessInfo', id='process list'),
])
@pytest.mark.parametrize('kind', LISTENERS)
def test_lost_call(rig: Rig, tmp_path: Path, kind: str, rules: dict[str, list[str]], told: str) -> None:
    rig.wait_until_grown()
    rules = {method: list(words) for method, words in rules.items()}
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, rules) as proxy, \
            rig.listen(kind, proxy.url) as listener:
        listener.tick()
        if told:
            listener.wait_for_log(told.replace('URL', proxy.url))
            assert 'restarted web' not in listener.log
            assert listener.log.count('does not answer') == 1
            listener.tick()
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


@contextmanager
def vanish(path: Path) -> Iterator[None]:
    """Take a socket away."""
    away = path.with_suffix('.away')
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


@contextmanager
def refuse(path: Path) -> Iterator[None]:
    """Put a socket in its place that nobody listens at."""
    with vanish(path), socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        yield


@pytest.mark.parametrize('kind', LISTENERS)
@pytest.mark.parametrize('fail, reason', [(vanish, 'No such file or directory'), (refuse, 'Connection refused')])
def test_socket_that_is_gone_for_a_tick(rig: Rig, kind: str, fail: Callable[[Path], ContextManager[None]],
                                        reason: str) -> None:
    pid = rig.wait_until_grown()
    with rig.listen(kind) as listener:
        with fail(rig.supervisord.socket):
            listener.tick()
        listener.wait_for_log(f'supervisord at {rig.supervisord.url} does not answer getAllProcessInfo: {reason}')
        assert listener.log.count('does not answer') == 1
        assert rig.supervisord.info('web')['pid'] == pid
        listener.tick()
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


def test_password(tmp_path: Path) -> None:
    login = {'SUPERVISOR_USERNAME': 'bob', 'SUPERVISOR_PASSWORD': 'secret'}
    server = 'username=bob\npassword=secret\n'
    with Supervisord(tmp_path, add_program(tmp_path, 'web'), server) as supervisord:
        wait_for((tmp_path / 'web.ready').exists)
        rig = Rig(supervisord, 0)
        with rig.listen('memmon') as listener:
            for _ in range(2):
                listener.tick()
            listener.wait_for_log('(401): set SUPERVISOR_USERNAME and SUPERVISOR_PASSWORD by environment=')
            assert 'restarted web' not in listener.log
            assert listener.close() == 0
        assert count_starts(tmp_path) == 1
        with rig.listen('memmon', environment=login) as listener:
            listener.tick()
            listener.wait_for_log('restarted web')
            wait_for(lambda: count_starts(tmp_path) == 2)
            assert listener.close() == 0


def drop_root_rights() -> None:
    """Let file modes hold for root too, from the next exec on; the sockets' owner stays the same."""
    if os.getuid() == 0:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), 'prctl')


@pytest.mark.skipif(not sys.platform.startswith('linux') and os.getuid() == 0, reason='nothing is forbidden to root')
def test_socket_that_may_not_be_opened(rig: Rig) -> None:
    rig.wait_until_grown()
    with rig.listen('memmon', preexec_fn=drop_root_rights) as listener:
        rig.supervisord.socket.chmod(0)
        listener.tick()
        listener.wait_for_log("supervisord's socket %s may not be opened by user %d: see chmod and chown in "
                              '[unix_http_server]' % (rig.supervisord.url, os.getuid()))
        rig.supervisord.socket.chmod(0o700)
        listener.tick()
        listener.wait_for_log('restarted web')
        rig.check_restarted(listener)
        assert listener.close() == 0


def test_supervisord_without_interface(tmp_path: Path) -> None:
    with Supervisord(tmp_path, add_program(tmp_path, 'web'), interface=False) as supervisord:
        wait_for((tmp_path / 'web.ready').exists)
        with Rig(supervisord, 0).listen('memmon') as listener:
            for count in (1, 2):
                listener.tick()
                wait_for(lambda: listener.log.count('needs an [rpcinterface:supervisor] section') == count)
            assert listener.close() == 0
            assert 'Traceback' not in listener.log
        assert count_starts(tmp_path) == 1


def test_supervisord_that_hangs_and_goes_on(rig: Rig) -> None:
    """A tick waits for a supervisord that is stopped for a while, and the restart is done once."""
    rig.wait_until_grown()
    os.kill(rig.supervisord.pid, signal.SIGSTOP)
    try:
        with rig.listen('memmon') as listener:
            listener.expect(b'READY\n')
            listener.send_event('TICK_5', 'when:%d' % time.time())
            # It has connected when the backlog of supervisord's socket holds it.
            wait_for(lambda: any(map(find_socket, [listener.pid, *find_children(listener.pid)])))
            os.kill(rig.supervisord.pid, signal.SIGCONT)
            listener.expect(b'RESULT 2\nOK')
            listener.wait_for_log('restarted web')
            rig.check_restarted(listener)
            assert listener.close() == 0
    finally:
        os.kill(rig.supervisord.pid, signal.SIGCONT)


def find_socket(pid: int) -> bool:
    """Return whether a process has a socket open."""
    def target(link: Path) -> str:
        try:
            return os.readlink(str(link))
        except OSError:
            return ''
    folder = '/proc/%d/fd' % pid
    try:
        return any(target(Path(folder, name)).startswith('socket:') for name in os.listdir(folder))
    except OSError:
        return False    # it has ended since


# Restarts that fail.

def lose_file(path: Path) -> None:
    path.unlink()


def lose_mode(path: Path) -> None:
    path.chmod(0o644)


def exit_at_once(path: Path) -> None:
    write_script(path, 'exit 3\n')


@pytest.mark.parametrize('fail, reason', [
    (lose_file, 'NO_FILE'), (lose_mode, 'NOT_EXECUTABLE'), (exit_at_once, '')])
def test_start_that_fails(tmp_path: Path, fail: Callable[[Path], None], reason: str) -> None:
    """The others are restarted in the same tick, and this one as soon as it can be."""
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
            listener.wait_for_log('failed to start bad: ' + reason)
            supervisord.wait_for_restart('web', web)
            assert supervisord.info('bad')['statename'] in ('STOPPED', 'FATAL', 'BACKOFF', 'EXITED')
            for _ in range(2):
                listener.tick()
            told = [line.partition('memmon: ')[2] for line in listener.log.splitlines()
                    if ' memmon: failed to ' in line]
            assert len(told) == len(set(told)) and (fail is exit_at_once or len(told) == 1)
            program.write_text(text)
            program.chmod(0o755)
            listener.tick()
            listener.wait_for_log('restarted bad')
            assert supervisord.info('bad')['statename'] == 'RUNNING'
            listener.tick()
            assert count_starts(tmp_path, 'bad') == count_starts(tmp_path, 'web') == 2
            assert listener.close() == 0
        mail = read(tmp_path / 'mail')
        for subject, count in (('failed to start process bad', len(told)), ('process bad restarted', 1),
                               ('process web restarted', 1)):
            assert mail.count(f'Subject: memmon: {subject}\n') == count


def test_process_that_its_operator_stops_during_the_check(rig: Rig, tmp_path: Path) -> None:
    """Between the judgement and the stop: it stays as the operator wants it."""
    rig.wait_until_grown()
    core = write_script(tmp_path / 'core', 'touch core.begun; while ! [ -e core.end ]; do sleep 0.05; done\n')
    with rig.listen('httpok', '', '-d', str(tmp_path), '-g', str(core)) as listener:
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', 'when:%d' % time.time())
        wait_for((tmp_path / 'core.begun').exists)
        rig.supervisord.rpc.stopProcess('web')
        (tmp_path / 'core.end').touch()
        listener.expect(b'RESULT 2\nOK')
        listener.wait_for_log('failed to stop web: it is STOPPED with pid 0 now')
        listener.tick()
        assert rig.supervisord.info('web')['statename'] == 'STOPPED'
        assert count_starts(tmp_path) == 1
        assert listener.close() == 0


@pytest.mark.parametrize('operator, state, told', [
    (['startProcess'], 'RUNNING', 'restarted web'),
    (['startProcess', 'stopProcess'], 'STOPPED', 'left web alone: it is STOPPED by now'),
])
def test_operator_takes_over_what_was_left_down(rig: Rig, tmp_path: Path, operator: list[str], state: str,
                                                told: str) -> None:
    begun = rig.supervisord.info('web')['start']
    rig.wait_until_grown()
    wait_for(lambda: time.time() > begun + 1)   # start is in whole seconds
    rules = {'startProcess': ['lose call'], 'getProcessInfo': list(ALL_LOST)}
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, rules) as proxy, \
            rig.listen('memmon', proxy.url) as listener:
        listener.tick()
        listener.wait_for_log('failed to start web')
        for method in operator:
            getattr(rig.supervisord.rpc, method)('web')
        pid = rig.supervisord.info('web')['pid']
        listener.tick()
        listener.wait_for_log(told)
        listener.tick()
        info = rig.supervisord.info('web')
        assert (info['statename'], info['pid']) == (state, pid)
        assert listener.close() == 0


def test_name_beyond_ascii(tmp_path: Path) -> None:
    with Supervisord(tmp_path, add_program(tmp_path, 'größe')) as supervisord:
        rig = Rig(supervisord, 0)
        pid = rig.wait_until_grown('größe')
        with Listener(['memmon', '-p', 'größe=48MB', '-p', 'großes=1KB'], supervisord.environment) as listener:
            listener.tick()
            assert listener.wait_for_log('restarted größe (pid %d: ' % pid).count('no process is called großes') == 1
            assert listener.close() == 0
        assert supervisord.info('größe')['statename'] == 'RUNNING'
        assert count_starts(tmp_path, 'größe') == 2


# Signals.

@pytest.mark.parametrize('kind', LISTENERS)
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_signal_in_the_middle_of_a_restart(tmp_path: Path, kind: str, signum: int) -> None:
    with serving(make_health(tmp_path)) as port, \
            Supervisord(tmp_path, add_program(tmp_path, 'web', slow=2)) as supervisord:
        rig = Rig(supervisord, port)
        pid = rig.wait_until_grown()
        with rig.listen(kind) as listener:
            listener.expect(b'READY\n')
            listener.send_event('TICK_5', 'when:%d' % time.time())
            supervisord.wait_for_state('web', 'STOPPING')
            assert listener.terminate(signum) == 0
            info = supervisord.info('web')
            assert info['statename'] == 'RUNNING' and info['pid'] != pid
            listener.wait_for_log('restarted web')
            assert 'Traceback' not in listener.log
        wait_for(lambda: count_starts(tmp_path) == 2)


@pytest.mark.parametrize('kind', LISTENERS)
def test_signal_after_a_failed_start_tries_once_more(rig: Rig, tmp_path: Path, kind: str) -> None:
    """What was left down is started before the listener ends."""
    rig.wait_until_grown()
    rules = {'startProcess': ['lose call'], 'getProcessInfo': list(ALL_LOST)}
    with Proxy(tmp_path / 'p.sock', rig.supervisord.socket, rules) as proxy, \
            rig.listen(kind, proxy.url) as listener:
        listener.tick()
        listener.wait_for_log('failed to start web')
        assert rig.supervisord.info('web')['statename'] == 'STOPPED'
        assert listener.terminate() == 0
        assert rig.supervisord.info('web')['statename'] == 'RUNNING'


# Ticks that waited.

@pytest.mark.parametrize('arguments', [
    ['memmon', '-p', 'web=1KB'], ['httpok', '-a', '-t', '0.2', 'http://127.0.0.1:1/']])
def test_ticks_from_before_the_end_of_a_restart_are_skipped(tmp_path: Path, arguments: list[str]) -> None:
    with Supervisord(tmp_path, add_program(tmp_path, 'web', slow=1)) as supervisord:
        wait_for((tmp_path / 'web.ready').exists)
        supervisord.wait_for_state('web')
        with Listener(arguments, supervisord.environment) as listener:
            listener.expect(b'READY\n')
            waiting = 'when:%d' % time.time()
            listener.send_event('TICK_5', waiting)
            supervisord.wait_for_state('web', 'STOPPING')
            listener.expect(b'RESULT 2\nOK')
            info = supervisord.wait_for_state('web')
            for _ in range(3):
                listener.serve_event('TICK_5', waiting)
            assert supervisord.info('web')['pid'] == info['pid']
            listener.tick()
            assert supervisord.info('web')['pid'] != info['pid']
            assert listener.close() == 0


# A supervisord that ends.

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
    wait_for(lambda: supervisord.log.count('-> READY') >= len(THREE), supervisord.log)
    return pids


def test_supervisord_that_shuts_down(tmp_path: Path) -> None:
    with Supervisord(tmp_path, ALL_THREE) as supervisord:
        pids = wait_until_listening(supervisord)
        supervisord.process.terminate()
        assert supervisord.process.wait(60) == 0
        assert 'stopped: memmon' in supervisord.log
        assert 'SIGKILL' not in supervisord.log
        assert not any(map(is_alive, pids.values()))
    assert not any('Traceback' in read(tmp_path / (name + '.log')) for name in THREE)


def test_supervisord_that_shuts_down_in_the_middle_of_a_restart(tmp_path: Path) -> None:
    with serving(make_health(tmp_path)) as port, \
            Supervisord(tmp_path, add_program(tmp_path, 'web', slow=2)) as supervisord:
        rig = Rig(supervisord, port)
        rig.wait_until_grown()
        with rig.listen('memmon') as listener:
            listener.expect(b'READY\n')
            listener.send_event('TICK_5', 'when:%d' % time.time())
            supervisord.wait_for_state('web', 'STOPPING')
            supervisord.process.terminate()
            assert supervisord.process.wait(60) == 0
            listener.expect(b'RESULT 2\nOK')
            assert listener.close() == 0
            assert 'Traceback' not in listener.log and 'restarted web' not in listener.log
        assert count_starts(tmp_path) == 1


def test_supervisord_that_is_killed_leaves_no_listener(tmp_path: Path) -> None:
    with Supervisord(tmp_path, ALL_THREE) as supervisord:
        pids = wait_until_listening(supervisord)
        children = find_children(supervisord.pid)
        try:
            supervisord.process.kill()
            supervisord.process.wait()
            for pid in pids.values():
                wait_for(lambda: not is_alive(pid))
        finally:
            for pid in filter(is_alive, children):
                os.kill(pid, signal.SIGKILL)
    assert not any('Traceback' in read(tmp_path / (name + '.log')) for name in THREE)


# Itself.

@pytest.mark.parametrize('command', ['memmon -a 1KB', 'httpok -a -t 0.2 http://127.0.0.1:1/'])
def test_pool_does_not_restart_itself(tmp_path: Path, command: str) -> None:
    """The pool's name comes first, so its processes would have been restarted before web."""
    pool = (f'[eventlistener:pool]\ncommand=BIN/{command}\nevents=TICK_5\nnumprocs=2\n'
            'process_name=%(program_name)s_%(process_num)d\n'
            'stderr_logfile=%(here)s/%(process_num)d.log\n')
    names = ['pool:pool_0', 'pool:pool_1']
    with Supervisord(tmp_path, pool + add_program(tmp_path, 'web')) as supervisord:
        pid = supervisord.wait_for_state('web')['pid']
        pids = [supervisord.wait_for_state(name)['pid'] for name in names]
        supervisord.wait_for_restart('web', pid)
        wait_for(lambda: 'restarted web' in read(tmp_path / '0.log') + read(tmp_path / '1.log'))
        infos: list[dict[str, Any]] = [supervisord.info(name) for name in names]
        assert [(info['statename'], info['pid']) for info in infos] == [('RUNNING', known) for known in pids]
        assert 'pool_' not in read(tmp_path / '0.log') + read(tmp_path / '1.log')
