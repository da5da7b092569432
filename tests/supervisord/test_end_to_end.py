"""A real supervisord starts the listeners and sends them events; mail leaves through a real sendmail."""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Iterator

import pytest
from inbox import CommandInbox, SmtpInbox
from support import COMMANDS, Supervisord, find_free_port, make_patient, read, wait_for, write_script

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


def read_bodies(inbox: SmtpInbox | CommandInbox, *subjects: str) -> dict[str, str]:
    """Wait until mails with these subjects have been received; return all bodies by subject, without times."""
    def read_all() -> dict[str, str]:
        bodies = {re.sub(r' at [-\d]+ [:,\d]+$', '', str(mail['Subject']).strip()):
                  mail.get_content().replace('\r\n', '\n') for mail in inbox.mails}
        return bodies if {*subjects} <= {*bodies} else {}
    found: dict[str, str] = wait_for(read_all, lambda: f'{subjects} in {inbox.subjects}')
    return found


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
        hung = f'httpok: http://127.0.0.1:{port}/: bad status returned (restarted hung)'
        bodies = read_bodies(inbox, hung, 'crashing crashed', 'memmon: process leaking:leaking restarted')
        assert 'crashing (pid ' in bodies['crashing crashed'] and 'exit status 3' in bodies['crashing crashed']
        assert 'last line of crashing' in bodies['crashing crashed']
        assert 'over its limit of 50.0MB' in bodies['memmon: process leaking:leaking restarted']
        assert all('supervisor testing' in body for body in bodies.values())
        assert all(mail['To'] == 'bob@example.com' for mail in inbox.mails)
        assert supervisord.wait_for_state('crashing')
        check_unchanged(supervisord, pids)


def test_names_beyond_ascii_and_a_pool_of_two_listeners(tmp_path: Path) -> None:
    """memmon leaves all of its own pool alone, and one of the pool serves each tick."""
    inbox = CommandInbox(tmp_path)
    write_script(tmp_path / 'mail', inbox.command)
    mail = f'-m bob@example.com -s {tmp_path}/mail'
    more = 'numprocs=2\nprocess_name=%(program_name)s_%(process_num)d'
    sections = ''.join([
        program('fuß', 'leak', 60),
        listener(f'BIN/memmon -p größe:*=1KB -p fuß=50MB -n Büro {mail}', 'TICK_5', 'größe', more),
        listener(f'BIN/crashmail -p straße -o Büro {mail}', 'PROCESS_STATE_EXITED', 'höhe'),
        program('straße', 'crash'),
    ])
    pool = ['größe:größe_0', 'größe:größe_1']
    with start(tmp_path, sections) as supervisord:
        pids = {name: supervisord.info(name)['pid'] for name in [*pool, 'fuß']}
        supervisord.wait_for_restart('fuß', pids.pop('fuß'))
        bodies = read_bodies(inbox, 'Büro: straße crashed', 'memmon [Büro]: process fuß:fuß restarted')
        assert 'straße (pid ' in bodies['Büro: straße crashed']
        assert 'fuß' in bodies['memmon [Büro]: process fuß:fuß restarted']
        check_unchanged(supervisord, pids)
        logs = ''.join(read(path) for path in tmp_path.glob('*-stderr---*'))
    assert 'restarted größe' not in logs
    assert logs.count('memmon: restarted fuß') == 1
    assert len(inbox.mails) == 2
