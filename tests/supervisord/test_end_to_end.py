"""A real supervisord starts the listeners and sends them events; mail leaves through a real sendmail."""
from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from inbox import CommandInbox, SmtpInbox
from support import (
    COMMANDS,
    READY,
    RESULT,
    Listener,
    Supervisord,
    find_free_port,
    make_patient,
    read,
    wait_for,
    write_script,
)

SENDMAIL = '/usr/sbin/sendmail'

# A program that misbehaves in its first run only.
PROGRAM = '''
import os, signal, socket, sys, time

task, name, argument = sys.argv[1:]
first = not os.path.exists(name + '.ran')
open(name + '.ran', 'w').close()
if task == 'leak':
    used = bytearray(int(argument) * 1024 ** 2 if first else 1)
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
    print('last line of', name, flush=True)
    if first:
        sys.exit(3)
signal.pause()
'''


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[SmtpInbox]:
    """An SMTP server; the machine's own sendmail sends to it if HOME is the test's folder."""
    with SmtpInbox(tmp_path) as running:
        yield running


def start(folder: Path, sections: str) -> Supervisord:
    """Start a supervisord whose listeners find the commands on PATH, as those of the manual's examples do."""
    (folder / 'program.py').write_text(PROGRAM, 'utf-8')
    return Supervisord(folder, sections, environment={
        'HOME': '/nonexistent', 'PATH': f"{COMMANDS}:{os.environ['PATH']}", 'PYTHONUTF8': '1', **make_patient(folder)})


def program(name: str, task: str, argument: Any = 0, more: str = '') -> str:
    return f'[program:{name}]\ncommand=PYTHON program.py {task} {name} {argument}\nstartsecs=0\n{more}\n'


def listener(command: str, events: str, name: str = '', more: str = '') -> str:
    name = name or command.split()[0].rpartition('/')[2]
    return f'[eventlistener:{name}]\ncommand={command}\nevents={events}\nenvironment=HOME="%(here)s"\n{more}\n'


def read_bodies(inbox: SmtpInbox | CommandInbox, number: int) -> dict[str, str]:
    """Wait until number mails have been received, and return their bodies by subject, without times."""
    return {re.sub(r' at [-\d]+ [:,\d]+$', '', str(mail['Subject']).strip()): mail.get_content().replace('\r\n', '\n')
            for mail in inbox.wait(number)}


def check_unchanged(supervisord: Supervisord, pids: dict[str, int]) -> None:
    for name, pid in pids.items():
        assert supervisord.info(name)['pid'] == pid, name


@pytest.mark.skipif(not os.path.exists(SENDMAIL), reason='no sendmail is installed')
def test_all_three_at_once_with_a_real_sendmail(tmp_path: Path, inbox: SmtpInbox) -> None:
    port = find_free_port()
    sections = ''.join([
        program('leaking', 'leak', 60), program('hung', 'serve', port), program('crashing', 'crash'),
        program('healthy', 'leak', 1),
        listener('BIN/memmon -a 50MB -m bob@example.com', 'TICK_5'),
        listener(f'BIN/httpok -p hung -t 1 -m bob@example.com http://127.0.0.1:{port}/', 'TICK_5'),
        listener('BIN/crashmail --tail=5 -m bob@example.com', 'PROCESS_STATE_EXITED'),
    ])
    names = ['leaking', 'hung', 'healthy', 'memmon', 'httpok', 'crashmail']
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in names}
        for name in ('leaking', 'hung'):
            supervisord.wait_for_restart(name, pids.pop(name))
        bodies = read_bodies(inbox, 3)
        httpok, = (subject for subject in bodies if subject.startswith('httpok'))
        assert httpok.startswith(f'httpok: http://127.0.0.1:{port}/: bad status returned')
        assert {*bodies} - {httpok} == {'crashing crashed', 'memmon: process leaking:leaking restarted'}
        assert 'crashing (pid ' in bodies['crashing crashed'] and 'exit status 3' in bodies['crashing crashed']
        assert 'last line of crashing' in bodies['crashing crashed']
        assert 'over its limit of 50.0MB' in bodies['memmon: process leaking:leaking restarted']
        assert all('supervisor testing' in body for body in bodies.values())
        assert all(mail['To'] == 'bob@example.com' for mail in inbox.mails)
        assert supervisord.wait_for_state('crashing')
        check_unchanged(supervisord, pids)


def test_examples_of_the_manual_of_2_0_0(tmp_path: Path) -> None:
    """Word for word but for the tick and the mail command; the third example, `-a 200MB`, would restart both."""
    inbox = CommandInbox(tmp_path)
    write_script(tmp_path / 'mail', inbox.command)
    more = f' -s {tmp_path}/mail'
    sections = ''.join([
        program('foo', 'leak', 220), program('baz', 'leak', 220), program('small', 'leak', 1),
        '[group:bar]\nprograms=baz,small\n',
        listener('memmon -p foo=200MB -m bob@example.com' + more, 'TICK_5', 'first'),
        listener('memmon -g bar=200MB -m bob@example.com' + more, 'TICK_5', 'second'),
    ])
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in ('foo', 'bar:baz', 'bar:small', 'first', 'second')}
        for name in ('foo', 'bar:baz'):
            supervisord.wait_for_restart(name, pids.pop(name))
        bodies = read_bodies(inbox, 2)
        assert sorted(bodies) == ['memmon: process bar:baz restarted', 'memmon: process foo:foo restarted']
        check_unchanged(supervisord, pids)


def test_httpok_restarts_a_whole_group(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    write_script(tmp_path / 'mail', inbox.command)
    port = find_free_port()
    sections = ''.join([
        program('one', 'serve', port), program('two', 'leak'), program('other', 'leak'),
        '[group:site]\nprograms=one,two\n',
        listener(f'BIN/httpok -p site:* -t 1 -m bob@example.com -s {tmp_path}/mail http://127.0.0.1:{port}/', 'TICK_5'),
    ])
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in ('site:one', 'site:two', 'other', 'httpok')}
        for name in ('site:one', 'site:two'):
            supervisord.wait_for_restart(name, pids.pop(name))
        body = inbox.wait()[0].get_content()
        assert 'site:one' in body and 'site:two' in body and 'other' not in body
        check_unchanged(supervisord, pids)


def test_crashmail_reports_what_cannot_start_and_no_expected_exit(tmp_path: Path) -> None:
    inbox = CommandInbox(tmp_path)
    write_script(tmp_path / 'mail', inbox.command)
    sections = ('[program:bad]\ncommand=false\nstartsecs=5\nstartretries=0\n'
                + program('expected', 'crash', more='exitcodes=3') + program('crashing', 'crash')
                + listener(f'BIN/crashmail -m bob@example.com -s {tmp_path}/mail',
                           'PROCESS_STATE_EXITED,PROCESS_STATE_FATAL', more='priority=1'))
    with start(tmp_path, sections) as supervisord:
        for name in ('expected', 'crashing'):
            wait_for(lambda: f'exited: {name} (exit status 3; ' in supervisord.log, name)
        bodies = read_bodies(inbox, 2)
        assert sorted(bodies) == ['bad is FATAL: supervisord gave up starting it', 'crashing crashed']
        assert len(inbox.mails) == 2


def test_storm_of_crashes_loses_no_mail(tmp_path: Path) -> None:
    """30 programs exit at once, and the mail command takes 50 ms."""
    os.mkfifo(tmp_path / 'go')
    inbox = CommandInbox(tmp_path)
    sections = ("[program:storm]\ncommand=sh -c 'read line < go; exit 1'\nnumprocs=30\nstartsecs=0\n"
                'process_name=p%(process_num)02d\nautorestart=false\nstdout_logfile=NONE\nredirect_stderr=true\n'
                + listener(f'BIN/crashmail -m bob@example.com -s "sleep 0.05; {inbox.command}"',
                           'PROCESS_STATE_EXITED', more='buffer_size=1000'))
    names = [f'p{number:02d}' for number in range(30)]
    with start(tmp_path, sections) as supervisord:
        supervisord.wait_for_state('crashmail')
        pids = {info['name']: info['pid'] for info in supervisord.rpc.getAllProcessInfo() if info['group'] == 'storm'}
        assert sorted(pids) == names
        with open(tmp_path / 'go', 'w', encoding='utf-8'):
            wait_for(lambda: all(is_reading(pid, tmp_path) for pid in pids.values()), 'all programs to wait')
        mails = inbox.wait(30)
        assert 'discarding event' not in supervisord.log
    assert sorted(subject.split()[0] for subject in inbox.subjects) == names
    for name, pid in pids.items():
        assert sum(f'storm:{name} (pid {pid}) exited' in mail.get_content() for mail in mails) == 1


def is_reading(pid: int, folder: Path) -> bool:
    """Return whether a program has opened the FIFO."""
    try:
        return os.readlink(f'/proc/{pid}/fd/0') == str(folder / 'go')
    except OSError:
        return False


def test_names_beyond_ascii_and_pools_of_several_listeners(tmp_path: Path) -> None:
    """memmon leaves all of its own pool alone, and one of the pool serves each tick."""
    inbox = CommandInbox(tmp_path)
    write_script(tmp_path / 'mail', inbox.command)
    mail = f'-m bob@example.com -s {tmp_path}/mail'
    more = 'numprocs=2\nprocess_name=%(program_name)s_%(process_num)d'
    sections = ''.join([
        program('fuß', 'leak', 60),
        listener(f'BIN/memmon -p größe:*=1KB -p fuß=50MB -n Büro {mail}', 'TICK_5', 'größe', more),
        listener(f'BIN/crashmail -p straße -o Büro {mail}', 'PROCESS_STATE_EXITED', 'höhe', more),
        program('straße', 'crash'),
    ])
    pool = ['größe:größe_0', 'größe:größe_1', 'höhe:höhe_0', 'höhe:höhe_1']
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in [*pool, 'fuß']}
        supervisord.wait_for_restart('fuß', pids.pop('fuß'))
        bodies = read_bodies(inbox, 2)
        assert sorted(bodies) == ['Büro: straße crashed', 'memmon [Büro]: process fuß:fuß restarted']
        assert 'straße (pid ' in bodies['Büro: straße crashed']
        assert 'fuß' in bodies['memmon [Büro]: process fuß:fuß restarted']
        check_unchanged(supervisord, pids)
        logs = ''.join(read(path) for path in tmp_path.glob('*-stderr---*'))
    assert 'restarted größe' not in logs
    assert logs.count('memmon: restarted fuß') == 1
    assert len(inbox.mails) == 2


# Output of commands.

NOISE = 'echo READY; echo RESULT 4; printf FAIL; echo RESULT 4 >&2; '


@pytest.mark.parametrize('arguments', [
    ['httpok', '-t', '0.1', '-p', 'web', '-d', 'cores', '-g', './gcore -o', 'http://127.0.0.1:1/'],
    ['memmon', '-a', '1', '--dry-run'],
    ['crashmail'],
], ids=lambda arguments: str(arguments[0]))
def test_output_of_commands_does_not_reach_supervisord(arguments: list[str], tmp_path: Path) -> None:
    write_script(tmp_path / 'mail', NOISE + 'readlink /proc/self/fd/0 >> stdin; cat >/dev/null; touch mailed\n')
    write_script(tmp_path / 'gcore', NOISE + 'readlink /proc/self/fd/0 >> stdin; cat; touch dumped\n')
    with Supervisord(tmp_path, '[program:web]\ncommand=/bin/sleep 1000\nstartsecs=0\n') as supervisord, Listener(
            [arguments[0], '-m', 'bob@example.com', '-s', './mail', *arguments[1:]], supervisord.environment,
            tmp_path) as command:
        supervisord.wait_for_state('web')
        protocol = os.readlink(f'/proc/{command.pid}/fd/0')
        command.expect(READY)
        if arguments[0] == 'crashmail':
            command.send_event('PROCESS_STATE_EXITED', 'processname:web groupname:web expected:0 pid:1')
        else:
            command.send_event('TICK_5', f'when:{int(time.time())}')
        command.expect(RESULT + READY)
        command.send_event('PROCESS_GROUP_ADDED', 'groupname:web\n')
        command.expect(RESULT + READY)
        command.wait_for_log('sent mail')
        assert command.close() == 0
        assert command.process.stdout and command.process.stdout.read() == b''
    assert (tmp_path / 'mailed').exists() and (tmp_path / 'dumped').exists() == ('-g' in arguments)
    assert read(tmp_path / 'stdin') and protocol not in read(tmp_path / 'stdin')
    assert 'READY | RESULT 4 | FAILRESULT 4' in command.log
