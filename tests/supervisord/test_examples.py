"""The examples of the README and of the references run on a real supervisord, as they are written."""
from __future__ import annotations

import os
import re
import shlex
import signal
from configparser import RawConfigParser
from pathlib import Path

import pytest
from support import COMMANDS, Supervisord, find_examples, find_free_port, run_command_line, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / 'README.rst', *sorted((ROOT / 'docs').glob('*.rst'))]
EXAMPLES = [example for page in PAGES for example in find_examples(page)]
STARTED = ('program', 'eventlistener', 'group', 'fcgi-program')


def prepare(text: str) -> RawConfigParser:
    """Return an example; its port is a free one, and its logs are in the test's folder."""
    text = text.replace('8080', str(find_free_port())).replace('/var/log/supervisor/', '%(here)s/')
    parser = RawConfigParser(inline_comment_prefixes=(';',), strict=False)
    parser.read_string(text)
    return parser


def format_section(name: str, parser: RawConfigParser, section: str) -> str:
    return '\n'.join((f'[{name}]', *(f'{key}={value}' for key, value in parser.items(section)), ''))


def join(examples: list[str]) -> tuple[str, dict[str, str]]:
    """Return one configuration with what all the examples start, and the kind of each section by its new name.

    The same names occur in several examples, so each gets a number.
    """
    sections = []
    kinds = {}
    for number, text in enumerate(examples):
        parser = prepare(text)
        for section in parser.sections():
            kind, _, name = section.partition(':')
            if kind in STARTED:
                kinds[f'{name}_{number}'] = kind
                if parser.has_option(section, 'programs'):
                    programs = parser.get(section, 'programs').split(',')
                    parser.set(section, 'programs', ','.join(f'{program}_{number}' for program in programs))
                sections.append(format_section(f'{kind}:{name}_{number}', parser, section))
    return '\n'.join(sections), kinds


def check(supervisord: Supervisord, kinds: dict[str, str]) -> None:
    """Wait until all programs are RUNNING and all listeners READY, and none has exited."""
    for name, kind in kinds.items():
        if kind != 'group':
            process = rf'{re.escape(name)}(_\d+)?'
            wait_for(lambda: re.search(rf'success: {process} entered RUNNING', supervisord.log),
                     lambda: supervisord.log)
            if kind == 'eventlistener':
                wait_for(lambda: re.search(rf'{process}: ACKNOWLEDGED -> READY', supervisord.log),
                         lambda: supervisord.log)
    assert 'exited: ' not in supervisord.log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / 'app.py').write_text('def app(environ, start):\n    start("200 OK", [])\n    return [b"hello"]\n')
    (tmp_path / 'worker.py').write_text('import time\ntime.sleep(1000)\n')
    return tmp_path


PATH = {'PATH': f'{COMMANDS}:/usr/bin:/bin'}


def test_all_examples_run_together(folder: Path) -> None:
    """Without the checks at start, which are 20 processes more."""
    (folder / 'sitecustomize.py').write_text(
        'import superlance.startcheck\nsuperlance.startcheck.StartCheck.run = lambda self: None\n', 'utf-8')
    text, kinds = join(EXAMPLES)
    assert len(kinds) > 20 and {'program', 'eventlistener'} <= set(kinds.values())
    with Supervisord(folder, text, environment={**PATH, 'PYTHONPATH': str(folder)}) as supervisord:
        check(supervisord, kinds)


def test_complete_configuration_runs_as_it_is_written_until_supervisord_shuts_down(folder: Path) -> None:
    complete, = (example for example in EXAMPLES if '[unix_http_server]' in example)
    text = complete.replace('8080', str(find_free_port()))
    kinds = {name: kind for kind, name in re.findall(r'^\[(\w+):(\w+)\]$', text, re.M) if kind in STARTED}
    assert len(kinds) == 4
    with Supervisord(folder, text, own_server=False, environment=PATH) as supervisord:
        check(supervisord, kinds)
        for command in re.findall(r'^command=((?:memmon|httpok) .*)$', text, re.M):
            program, *arguments = shlex.split(command)
            patience = ['-t', '60'] if program == 'httpok' else []
            once = run_command_line(program, *arguments, *patience, '--once', folder=folder)
            assert once.returncode == 0 and 'web' in once.stdout, once.stdout + once.stderr
            warnings = [line for line in once.stdout.splitlines() if line.startswith('warning:')]
            assert [line for line in warnings if 'mail command' not in line] == []
        # The listeners exit when supervisord shuts down.
        os.kill(supervisord.pid, signal.SIGTERM)
        assert supervisord.wait() == 0
    assert all(f'stopped: {name} (exit status 0)' in supervisord.log
               for name, kind in kinds.items() if kind == 'eventlistener')
