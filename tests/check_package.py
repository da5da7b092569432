"""Build the sdist, and the wheel from it; install that into a new environment, and run what was installed.

`tox -e package` runs it. twine and docutils check the page for the package index.
"""
from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ('httpok', 'crashmail', 'memmon')


def run(*command: str | Path, folder: Path = ROOT) -> str:
    print('+', *command, flush=True)
    done = subprocess.run([str(word) for word in command], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end='', flush=True)
    return done.stdout


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    files = [*(ROOT / 'tests').rglob('*.py'), *(ROOT / 'docs').glob('*.rst'), *ROOT.glob('*.rst'), *ROOT.glob('*.txt')]
    expected = {str(path.relative_to(ROOT)) for path in files}
    expected |= {'tests/requirements.txt', 'pyproject.toml', 'tox.ini', '.ci/run'}
    assert expected <= names, f'missing in the sdist: {sorted(expected - names)}'


def install(package: Path, folder: Path) -> None:
    """Install a package and what it requires into a new environment, and run what it installs.

    The demo runs to its end in the tests.
    """
    venv.create(folder)
    python = folder / 'bin' / 'python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', package, folder=folder)
    run(sys.executable, '-m', 'pip', '--python', python, 'check', folder=folder)
    run(python, '-m', 'superlance.demo', '--help', folder=folder)
    for command in COMMANDS:
        printed = run(folder / 'bin' / command, '--version', folder=folder)
        assert printed.split()[0] == command, printed


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, '-m', 'build', '--outdir', folder / 'dist', ROOT)
        packages = sorted((folder / 'dist').iterdir())
        wheel, sdist = (next(p for p in packages if p.name.endswith(end)) for end in ('.whl', '.tar.gz'))
        run(sys.executable, '-m', 'twine', 'check', '--strict', *packages)
        for page in [ROOT / 'README.rst', *(ROOT / 'docs').glob('*.rst')]:
            run(sys.executable, '-m', 'docutils', '--halt=2', page, folder / 'page.html')
        check_sdist(sdist)
        install(wheel, folder / 'installed')


if __name__ == '__main__':
    main()
