"""README, references, --help and option tables agree, and every command line that they show is accepted."""
from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from email.message import EmailMessage
from importlib import import_module
from pathlib import Path

import pytest
from support import find_examples, run_in_process

from superlance import __version__
from superlance.options import Option

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / 'README.rst').read_text('utf-8')
PAGES = [ROOT / 'README.rst', *sorted((ROOT / 'docs').glob('*.rst'))]
NAMES = ['memmon', 'httpok', 'crashmail']
LONGEST_HELP = {'memmon': 60, 'crashmail': 60, 'httpok': 80}
FLAG = re.compile(r'(?<![\w-])--?[a-zA-Z_][\w-]*')

every_command = pytest.mark.parametrize('name', NAMES)


def read_table(name: str) -> set[str]:
    """Return the flags of a command's option table."""
    options: list[Option] = list(import_module(f'superlance.{name}').OPTIONS)
    return {f'-{option.letter}' for option in options if option.letter} | {f'--{option.name}' for option in options}


def read_help(name: str) -> str:
    return str(import_module(f'superlance.{name}').__doc__)


@every_command
def test_help_names_exactly_the_options_of_the_command(name: str) -> None:
    lines = [line for line in read_help(name).splitlines() if re.match(r' {2,6}-', line)]
    assert {flag for line in lines for flag in FLAG.findall(line[:30])} == read_table(name)


@every_command
def test_reference_describes_exactly_the_options_of_the_command(name: str) -> None:
    page = (ROOT / 'docs' / f'{name}.rst').read_text('utf-8')
    terms = re.findall(r'^(``-.*``)$', page, re.M)
    assert {flag for term in terms for flag in FLAG.findall(re.sub('=[^`]*', '', term))} == read_table(name)


@every_command
def test_help_and_reference_name_the_same_values(name: str) -> None:
    page = (ROOT / 'docs' / f'{name}.rst').read_text('utf-8')
    in_help = re.findall(r'^ {2,6}-.*?--([\w-]+=[^\s\']+)', read_help(name), re.M)
    in_page = re.findall(r"^``-[^'\n]*?--([\w-]+=[^`\s']+)", page, re.M)     # not 'NAME: VALUE'
    assert in_help and sorted(in_help) == sorted(in_page)


@every_command
def test_reference_gives_the_default_of_every_option_that_has_one(name: str) -> None:
    page = (ROOT / 'docs' / f'{name}.rst').read_text('utf-8')
    texts = dict(re.findall(r'^``-.*?--([\w-]+)=.*\n((?:    .*\n)+)', page, re.M))
    without = {'program', 'groupname', 'any', 'header', 'unix-socket', 'smtp', 'webhook'}
    assert [option for option, text in texts.items() if option not in without and 'default' not in text.lower()] == []


@every_command
def test_reference_has_the_sections_of_a_man_page(name: str) -> None:
    titles = re.findall(r'^([A-Z ]+)\n=+$', (ROOT / 'docs' / f'{name}.rst').read_text('utf-8'), re.M)
    expected = ['SYNOPSIS', 'DESCRIPTION', 'OPTIONS', 'LOG', 'MAIL', 'EXIT STATUS', 'ENVIRONMENT', 'FILES', 'EXAMPLES',
                'SEE ALSO']
    assert [title for title in titles if title in expected] == expected


@pytest.mark.parametrize('title', ['DELIVERY', 'EXIT STATUS'])
def test_references_describe_what_is_the_same_in_the_same_words(title: str) -> None:
    texts = set()
    for name in NAMES:
        page = (ROOT / 'docs' / f'{name}.rst').read_text('utf-8')
        match = re.search(rf'^{title}\n=+\n(.*?)\n=+$', page, re.M | re.S)
        assert match, name
        texts.add(' '.join(match.group(1).replace(name, 'NAME').split()[:-1]))
    assert len(texts) == 1, texts


@every_command
def test_readme_names_only_options_of_the_command(name: str) -> None:
    section = re.search(rf'^\*\*{name}\*\* (.*?)(?=^\*\*|^\S+\n---)', README, re.M | re.S)
    assert section, name
    terms = [term for line in section.group(1).splitlines() if line.startswith('- ``')
             for term in re.findall('``(-[^`]*)``', line.partition(':')[0])]
    flags = {flag for term in terms for flag in FLAG.findall(re.sub('[= ].*', '', term))}
    assert flags and flags <= read_table(name)


@every_command
def test_help_fits_a_terminal_and_has_an_example(name: str) -> None:
    lines = read_help(name).splitlines()
    assert lines[0].startswith(f'Usage: {name}')
    assert max(map(len, lines)) < 80 and len(lines) <= LONGEST_HELP[name]
    assert f'[eventlistener:{name}]\n    command={name} ' in read_help(name)


COMMAND_LINES = sorted({command for page in PAGES for example in find_examples(page)
                        for command in re.findall(rf'^command=((?:\S*/)?(?:{"|".join(NAMES)}) .*)$', example, re.M)})


def test_there_are_command_lines() -> None:
    assert len(COMMAND_LINES) > 15


@pytest.mark.parametrize('command', COMMAND_LINES)
def test_command_line_of_the_documentation_is_accepted(command: str) -> None:
    program, *arguments = shlex.split(command.replace('%(here)s', '/tmp').replace('%%', '%'))
    name = program.rpartition('/')[2]
    run = run_in_process(lambda: import_module(f'superlance.{name}').main(arguments),
                         environment={'SUPERVISOR_SERVER_URL': ''})
    assert run.status == 1 and run.log.startswith(f'{name} must be started by supervisord'), run.log


def test_script_of_the_readme_reads_any_message_and_fails_if_its_command_does(tmp_path: Path) -> None:
    block = re.search(r'code-block:: python\n\n((?:    .*\n)+)', README)
    assert block
    logger = tmp_path / 'logger'
    logger.write_text(f'#!/bin/sh\nprintf "%s|" "$@" > {tmp_path}/logged\n')
    logger.chmod(0o755)
    message = EmailMessage()
    message['Subject'] = 'café crashed at 2026-11-24 05:02:11,123'
    message.set_content('café (pid 7) exited unexpectedly\n')

    def run() -> int:
        return subprocess.run([sys.executable, '-c', textwrap.dedent(block.group(1))], input=message.as_bytes(),
                              env={**os.environ, 'PATH': str(tmp_path)}, stderr=subprocess.DEVNULL).returncode
    assert run() == 0
    assert (tmp_path / 'logged').read_text('utf-8') == '-t|superlance|café crashed at 2026-11-24 05:02:11,123|'
    logger.write_text('#!/bin/sh\nexit 1\n')
    assert run() == 1


def test_every_test_that_the_documentation_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r'``(test_\w+)``', page.read_text('utf-8'))}
    defined = set(re.findall(r'^def (test_\w+)\(', ''.join(
        path.read_text('utf-8') for path in (ROOT / 'tests').rglob('test_*.py')), re.M))
    assert len(named) > 30 and named <= defined, sorted(named - defined)


def find_imports(module: str) -> set[str]:
    """Return which modules of superlance a module imports at run time, also within functions."""
    tree = ast.parse((ROOT / 'superlance' / f'{module}.py').read_text('utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == 'TYPE_CHECKING':
            node.body = []
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return ({node.module.split('.')[1] for node in froms if node.module and node.module.startswith('superlance.')}
            | {alias.name for node in froms if node.module == 'superlance' for alias in node.names} - {'__version__'})


def test_contributing_names_every_module_and_each_imports_only_modules_below_it() -> None:
    modules = re.findall(r'^``(\w+)\.py``', (ROOT / 'CONTRIBUTING.rst').read_text('utf-8'), re.M)
    assert sorted(modules) == sorted({path.stem for path in (ROOT / 'superlance').glob('*.py')} - {'__init__'})
    for position, module in enumerate(modules):
        assert find_imports(module) <= {*modules[position + 1:]} - {'demo', *NAMES}, module


def test_readme_is_read_in_ten_minutes() -> None:
    assert len(README.splitlines()) <= 300 and len(README.split()) <= 1800


def test_version_is_that_of_changes_and_references() -> None:
    assert re.search(rf'^{re.escape(__version__)} ', (ROOT / 'CHANGES.txt').read_text('utf-8'), re.M)
    for name in NAMES:
        assert f'\n:Version: superlance {__version__}\n' in (ROOT / 'docs' / f'{name}.rst').read_text('utf-8')


def test_readme_has_two_commands_of_one_line_and_ci_runs_the_second() -> None:
    venv = 'python3 -m venv .venv && .venv/bin/pip install'
    demo, tests = re.findall(rf'^    ({re.escape(venv)} .*)$', README, re.M)
    assert demo == f'{venv} . && .venv/bin/python -m superlance.demo'
    assert tests == f'{venv} tox && .venv/bin/tox'
    assert f'{{ {tests}; }}' in (ROOT / '.ci' / 'run').read_text('utf-8')
