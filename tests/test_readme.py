"""The README and the --help of each command tell the same, and every example works as it is written."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import COMMANDS, Supervisord, wait_for

from superlance import __version__, crashmail, httpok, memmon
from superlance.options import Option

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.rst').read_text('utf-8')
SCRIPTS = {'memmon': memmon, 'httpok': httpok, 'crashmail': crashmail}
EXAMPLES = re.findall(r'\.\. code-block:: ini\n\n((?:    .*\n|\n)+)', README)
EXPECTED_EXAMPLES = 15


def section(title: str) -> str:
    """Return a section of the README."""
    match = re.search(rf'^{re.escape(title)}\n-+\n(.*?)(?=^\S[^\n]*\n---+\n|\Z)', README, re.M | re.S)
    assert match, title
    return match.group(1)


def table_of(script: object) -> set[str]:
    options: list[Option] = list(getattr(script, 'OPTIONS'))
    return {'-' + o.letter for o in options if o.letter} | {'--' + o.name for o in options}


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_and_readme_name_the_options_that_there_are(name: str) -> None:
    # An option in --help stands at the beginning of a line, one in the README in a table's first column.
    usage = str(SCRIPTS[name].__doc__)
    in_help = {flag for line in usage.splitlines() if re.match(r' {2,6}-', line)
               for flag in re.findall(r'(?<![\w-])--?[a-zA-Z_][\w-]*', line[:30])}
    rows = re.findall(r'^``(-.*?)``(?:, ``(--.*?)``)?  ', section(name), re.M)
    in_readme = {re.split('[= ]', flag)[0] for row in rows for flag in row if flag}
    assert in_help == in_readme == table_of(SCRIPTS[name])


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_fits_a_terminal_and_has_an_example(name: str) -> None:
    usage = str(SCRIPTS[name].__doc__)
    assert usage.startswith(f'Usage: {name}')
    assert max(map(len, usage.splitlines())) < 80
    assert f'[eventlistener:{name}]\n    command={name} ' in usage


def test_tests_named_exist() -> None:
    named = set(re.findall(r'``(test_\w+)``', section('What it survives')))
    defined = set(re.findall(r'^def (test_\w+)\(', ''.join(
        path.read_text('utf-8') for path in (ROOT / 'tests').glob('test_*.py')), re.M))
    assert len(named) > 30 and named <= defined, named - defined


def test_version_and_changes() -> None:
    assert re.search(rf'^{re.escape(__version__)} ', (ROOT / 'CHANGES.txt').read_text('utf-8'), re.M)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = re.search(r'^    (pip install tox.*)$', README, re.M)
    assert command and f'{{ {command.group(1)}; }}' in (ROOT / '.ci' / 'run').read_text('utf-8')


def find_sections(text: str) -> dict[str, str]:
    """Return the name of each section that supervisord starts, with its kind."""
    return {name: kind for kind, name in re.findall(r'^\[(program|eventlistener):(.*)\]$', text, re.M)}


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == EXPECTED_EXAMPLES


@pytest.mark.parametrize('number', range(EXPECTED_EXAMPLES))
def test_example_runs_as_it_is_written(number: int, tmp_path: Path) -> None:
    text = re.sub('^    ', '', EXAMPLES[number], flags=re.M)
    (tmp_path / 'app.py').write_text('def app(environ, start):\n    start("200 OK", [])\n    return [b"hello"]\n')
    (tmp_path / 'worker.py').write_text('import time\ntime.sleep(1000)\n')
    path = '{}:{}'.format(COMMANDS, '/usr/bin:/bin')
    if '[unix_http_server]' in text:
        configuration = text
    else:
        configuration = text + (
            '\n[unix_http_server]\nfile=%(here)s/supervisor.sock\n[rpcinterface:supervisor]\n'
            'supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n')
    with Supervisord(tmp_path, configuration, own_server=False, environment={'PATH': path}) as supervisord:
        sections = find_sections(text)
        assert sections or '[rpcinterface:supervisor]' in text
        for name in sections:
            what = 'success: %s' % (name if name != 'worker' else 'worker_03')
            wait_for(lambda: what + ' entered RUNNING state' in supervisord.log, lambda: supervisord.log)
        for name, kind in sections.items():
            if kind == 'eventlistener':
                wait_for(lambda: f'{name}: ACKNOWLEDGED -> READY' in supervisord.log,
                         lambda: supervisord.log)
        assert 'exited' not in supervisord.log
