"""A table of cases as one test, and text for property-based tests."""
from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Iterable

# A sample of Unicode: hypothesis would need a second to list all of it, in each worker of a fresh checkout.
CHARACTERS = ''.join(map(chr, (*range(0x700), *range(0x2000, 0x2200), *range(0x3000, 0x3100), *range(0xff00, 0x10000),
                               0xfb01, 0xfeff, 0x1f600, 0xe0001, 0x10ffff)))
SURROGATES = '\ud800\udbff\udc00\udc80\udcff\udfff'


def for_each(names: str, rows: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test once for each row of values of these parameters.

    It is like pytest.mark.parametrize, for functions that need less time than a test of pytest costs, and no fixtures.
    A failure prints its row.
    """
    keys = names.replace(',', ' ').split()

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        assert sorted(inspect.signature(test).parameters) == sorted(keys), 'a fixture would be shared by the rows'

        @functools.wraps(test)
        def run() -> None:
            for row in rows:
                values = dict(zip(keys, row if len(keys) > 1 else [row]))
                try:
                    test(**values)
                except BaseException:
                    print(f'the row that failed: {values!r}')
                    raise

        run.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        return run

    return decorate
