"""A real supervisord starts the listeners itself; what they do is seen in its processes, and mail comes by SMTP."""
from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any, Iterator

import pytest
from inbox import CommandInbox, SmtpInbox
from support import COMMANDS, Supervisord, read, wait_for

SENDMAIL = '/usr/sbin/sendmail'
pytestmark = pytest.mark.skipif(not os.path.exists(SENDMAIL), reason='no sendmail is installed')

# A program that does ill in its first run and well in later ones.
PROGRAM = '''
import os, signal, socket, sys, time

task, name, argument = sys.argv[1:]
first = not os.path.exists(name + '.ran')
open(name + '.ran', 'w').close()
if task == 'leak':
    held = bytearray(int(argument) * 1024 ** 2 if first else 1)
elif task == 'serve':
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(('127.0.0.1', int(argument)))
    server.listen(50)
    while not first:
        client = server.accept()[0]
        client.recv(65536)
        client.sendall(b'HTTP/1.0 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello')
        client.close()
elif task == 'crash':
    print('last words of', name, flush=True)
    if first:
        sys.exit(3)
signal.pause()
'''


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[SmtpInbox]:
    """An SMTP server, to which the machine's own sendmail sends where HOME is the test's folder."""
    (tmp_path / 'program.py').write_text(PROGRAM, 'utf-8')
    with SmtpInbox(tmp_path) as running:
        yield running


def start(folder: Path, sections: str) -> Supervisord:
    """Start a supervisord whose listeners find the commands on PATH, as those of the manual's examples do."""
    return Supervisord(folder, sections, environment={
        'HOME': '/nonexistent', 'PATH': '{}:{}'.format(COMMANDS, os.environ['PATH']), 'PYTHONUTF8': '1'})


def program(name: str, task: str, argument: Any = 0, more: str = '') -> str:
    return (f'[program:{name}]\ncommand=PYTHON program.py {task} {name} {argument}\nstartsecs=0\n{more}\n')


def listener(command: str, events: str, name: str = '', more: str = '') -> str:
    return ('[eventlistener:{}]\ncommand={}\nevents={}\nenvironment=HOME="%(here)s"\n{}\n'.format(name or command.split()[0].rpartition('/')[2], command, events, more))


def find_free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port: int = server.getsockname()[1]
        return port


def read_bodies(inbox: SmtpInbox, number: int) -> dict[str, str]:
    """Wait until so many mails have come, and return their bodies by subject, without times."""
    return {re.sub(r' at [-\d]+ [:,\d]+$', '', str(mail['Subject']).strip()): mail.get_content().replace('\r\n', '\n')
            for mail in inbox.wait(number)}


# The examples of the original manual, word for word but for the tick.
EXAMPLES = [
    ('memmon -a 200MB -m bob@example.com', 'foo', 'foo'),
    ('memmon -p foo=200MB -m bob@example.com', 'foo', 'foo'),
    ('memmon -g bar=200MB -m bob@example.com', 'bar:baz', 'bar:baz'),
]


@pytest.mark.parametrize('command, leaking, title', EXAMPLES)
def test_memmon_examples_of_the_manual(tmp_path: Path, inbox: SmtpInbox, command: str, leaking: str,
                                       title: str) -> None:
    programs = ''.join(program(name, 'leak', 220 if leaking.endswith(name) else 1) for name in ('foo', 'baz'))
    sections = programs + '[group:bar]\nprograms=baz\n' + listener(command, 'TICK_5')
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in ('foo', 'bar:baz', 'memmon')}
        supervisord.wait_for_restart(leaking, pids.pop(leaking))
        mail = inbox.wait()[0]
        assert mail['To'] == 'bob@example.com'
        assert mail['Subject'] == f'memmon: process {title} restarted'
        assert 'over its limit of 200.0MB' in mail.get_content()
        assert 'supervisor testing' in mail.get_content()
        assert supervisord.info('memmon')['statename'] == 'RUNNING'
        for name, pid in pids.items():
            assert supervisord.info(name)['pid'] == pid


def test_all_three_at_once(tmp_path: Path, inbox: SmtpInbox) -> None:
    port = find_free_port()
    sections = ''.join([
        program('leaking', 'leak', 60), program('hung', 'serve', port), program('crashing', 'crash'),
        program('healthy', 'leak', 1),
        listener('BIN/memmon -a 50MB -m bob@example.com', 'TICK_5'),
        listener('BIN/httpok -p hung -t 1 -m bob@example.com http://127.0.0.1:%d/' % port, 'TICK_5'),
        listener('BIN/crashmail --tail=5 -m bob@example.com', 'PROCESS_STATE_EXITED'),
    ])
    names = ['leaking', 'hung', 'healthy', 'memmon', 'httpok', 'crashmail']
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in names}
        for name in ('leaking', 'hung'):
            supervisord.wait_for_restart(name, pids.pop(name))
        bodies = read_bodies(inbox, 3)
        assert sorted(bodies) == ['crashing crashed', 'httpok: http://127.0.0.1:%d/: bad status returned' % port,
                                  'memmon: process leaking restarted']
        assert 'was RUNNING and exited unexpectedly' in bodies['crashing crashed']
        assert 'last words of crashing' in bodies['crashing crashed']
        assert supervisord.wait_for_state('crashing')
        for name, pid in pids.items():
            assert supervisord.info(name)['pid'] == pid, name


def test_httpok_of_a_group(tmp_path: Path, inbox: SmtpInbox) -> None:
    port = find_free_port()
    sections = ''.join([
        program('one', 'serve', port), program('two', 'leak'), program('other', 'leak'),
        '[group:site]\nprograms=one,two\n',
        listener('BIN/httpok -p site:* -t 1 -m bob@example.com http://127.0.0.1:%d/' % port, 'TICK_5'),
    ])
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in ('site:one', 'site:two', 'other', 'httpok')}
        for name in ('site:one', 'site:two'):
            supervisord.wait_for_restart(name, pids.pop(name))
        body = read_bodies(inbox, 1)['httpok: http://127.0.0.1:%d/: bad status returned' % port]
        assert 'site:one' in body and 'site:two' in body and 'other' not in body
        for name, pid in pids.items():
            assert supervisord.info(name)['pid'] == pid, name


def test_crashmail_of_a_program_that_can_not_start(tmp_path: Path, inbox: SmtpInbox) -> None:
    sections = ('[program:bad]\ncommand=false\nstartsecs=5\nstartretries=1\n'
                + listener('BIN/crashmail -m bob@example.com', 'PROCESS_STATE_EXITED,PROCESS_STATE_FATAL'))
    with start(tmp_path, sections):
        bodies = read_bodies(inbox, 1)
        subject, = bodies
        assert subject == 'bad is FATAL, supervisord has given up starting it,'
        assert 'given up starting program bad of group bad, which was BACKOFF and is FATAL now' in bodies[subject]


def test_crashmail_does_not_mail_an_expected_exit(tmp_path: Path, inbox: SmtpInbox) -> None:
    sections = (program('expected', 'crash', more='exitcodes=3') + program('crashing', 'crash')
                + listener('BIN/crashmail -m bob@example.com', 'PROCESS_STATE_EXITED', more='priority=1'))
    with start(tmp_path, sections) as supervisord:
        for name in ('expected', 'crashing'):
            wait_for(lambda: f'exited: {name} (exit status 3; ' in supervisord.log, name)
        inbox.wait()
    assert list(read_bodies(inbox, 1)) == ['crashing crashed']


def test_storm_of_crashes(tmp_path: Path) -> None:
    """No mail is lost where 120 programs die at once and the mail command takes 50 ms."""
    os.mkfifo(tmp_path / 'go')
    inbox = CommandInbox(tmp_path)
    sections = ("[program:storm]\ncommand=sh -c 'read line < go; exit 1'\nnumprocs=120\nstartsecs=0\n"
                'process_name=p%%(process_num)03d\nautorestart=false\nstdout_logfile=NONE\nredirect_stderr=true\n'
                + listener(f'BIN/crashmail -m bob@example.com -s "sleep 0.05; {inbox.command}"',
                           'PROCESS_STATE_EXITED', more='buffer_size=1000')).replace('%%', '%')
    names = ['p%03d' % number for number in range(120)]
    with start(tmp_path, sections) as supervisord:
        supervisord.wait_for_state('crashmail')
        pids = {info['name']: info['pid'] for info in supervisord.rpc.getAllProcessInfo() if info['group'] == 'storm'}
        assert sorted(pids) == names
        with open(tmp_path / 'go', 'w', encoding='utf-8'):
            wait_for(lambda: all(is_reading(pid, tmp_path) for pid in pids.values()), 'all programs to wait')
        mails = inbox.wait(120, timeout=120)
        assert 'discarding event' not in supervisord.log
    assert sorted(subject.split()[0] for subject in inbox.subjects) == names
    for name, pid in pids.items():
        assert sum('program %s of group storm (pid %d)' % (name, pid) in mail.get_content() for mail in mails) == 1


def is_reading(pid: int, folder: Path) -> bool:
    """Return whether a program has opened the FIFO."""
    try:
        return os.readlink('/proc/%d/fd/0' % pid) == str(folder / 'go')
    except OSError:
        return False


def test_names_that_are_not_ascii_and_pools_of_several(tmp_path: Path, inbox: SmtpInbox) -> None:
    """memmon leaves all of its own pool alone, and one of the pool serves each tick."""
    more = 'numprocs=2\nprocess_name=%(program_name)s_%(process_num)d'
    sections = ''.join([
        program('fuß', 'leak', 60),
        listener('BIN/memmon -p größe:*=1KB -p fuß=50MB -n Büro -m bob@example.com', 'TICK_5', 'größe', more),
        listener('BIN/crashmail -p straße -o Büro -m bob@example.com', 'PROCESS_STATE_EXITED', 'höhe', more),
        program('straße', 'crash'),
    ])
    pool = ['größe:größe_0', 'größe:größe_1', 'höhe:höhe_0', 'höhe:höhe_1']
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in [*pool, 'fuß']}
        supervisord.wait_for_restart('fuß', pids.pop('fuß'))
        bodies = read_bodies(inbox, 2)
        assert sorted(bodies) == ['Büro: straße crashed', 'memmon [Büro]: process fuß restarted']
        assert 'program straße of group straße' in bodies['Büro: straße crashed']
        assert 'program fuß of group fuß' in bodies['memmon [Büro]: process fuß restarted']
        for name, pid in pids.items():
            assert supervisord.info(name)['pid'] == pid, name
    logs = ''.join(read(path) for path in tmp_path.glob('*-stderr---*'))
    assert 'restarted größe' not in logs
    assert logs.count('memmon: restarted fuß') == 1
    assert len(inbox.mails) == 2
