"""Every example runs on tiny settings and gives what its ``main`` promises."""

import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Return a loader of an example's ``main``, with its folder importable as when run as a script."""

    def load(name):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
        return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]

    yield load
    for name in [n for n, m in sys.modules.items() if str(EXAMPLES) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]
