"""Build the sdist and the wheel, install each into a fresh environment, and use what was installed.

Run by `tox -e package`. The page for the package index is checked by twine and docutils.
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
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / 'tests').rglob('*.py')}
    expected |= {'tests/requirements.txt', 'tox.ini', 'README.rst', 'CHANGES.txt', 'LICENSE.txt', '.ci/run'}
    assert expected <= names, f'missing in the sdist: {sorted(expected - names)}'


def check_installed(package: Path, folder: Path) -> None:
    venv.create(folder, with_pip=True)
    python = folder / 'bin' / 'python'
    run(python, '-m', 'pip', 'install', '--quiet', package, folder=folder)
    for command in COMMANDS:
        said = run(folder / 'bin' / command, '--version', folder=folder)
        assert said.split()[0] == command, said
    run(python, '-m', 'superlance.demo', folder=folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, '-m', 'build', '--outdir', folder / 'dist', ROOT)
        packages = sorted((folder / 'dist').iterdir())
        wheel, sdist = (next(p for p in packages if p.name.endswith(end)) for end in ('.whl', '.tar.gz'))
        run(sys.executable, '-m', 'twine', 'check', '--strict', *packages)
        run(sys.executable, '-m', 'docutils', '--halt=2', ROOT / 'README.rst', folder / 'README.html')
        check_sdist(sdist)
        check_installed(wheel, folder / 'from_wheel')
        check_installed(sdist, folder / 'from_sdist')


if __name__ == '__main__':
    main()
