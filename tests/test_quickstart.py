"""The quickstart notebook is its text, runs from top to bottom on one device and on several, and was committed so."""

import os
import pathlib
import sys

import jupytext
import nbclient
import nbformat
import pytest
from ipykernel import kernelspec

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Return a function that runs the notebook by this very Python, in environment variables of its own."""
    kernelspec.write_kernel_spec(str(tmp_path / "jupyter" / "kernels" / "python3"))
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / ("jupyter" if name == "JUPYTER_PATH" else name.lower())))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("MPLBACKEND", "XLA_FLAGS"):  # the notebook chooses its own backend, the test its number of devices
        monkeypatch.delenv(name, raising=False)

    def run(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
        where = {"metadata": {"path": str(EXAMPLES)}}
        client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where)
        client.create_kernel_manager()
        assert client.km.kernel_spec.argv[0] == sys.executable
        return client.execute()

    return run


def printed(notebook, name="stdout"):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == name)


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_notebook_and_text_are_the_same():
    notebook, text = (jupytext.read(EXAMPLES / f"quickstart.{suffix}") for suffix in ("ipynb", "md"))
    ours, theirs = ([(cell.cell_type, cell.source) for cell in each.cells] for each in (notebook, text))
    assert ours == theirs


def test_it_was_committed_as_it_ran():
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(pictures(notebook)) == 3
    assert printed(notebook)
    assert not printed(notebook, "stderr")
    content = (EXAMPLES / "quickstart.ipynb").read_text()
    assert len(content) < 300_000
    assert not any(text in content for text in (os.sep + "tmp" + os.sep, str(pathlib.Path.home()), "Warning"))


@pytest.mark.slow
def test_it_runs_on_two_devices(execute):
    ran = execute(JAX_NUM_CPU_DEVICES="2", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert "devices: 2, outer loss" in printed(ran)
    assert "hypergradient check: not at a solution of the inner problem" in printed(ran)
    assert "the inner problem is not solved at these weights" in printed(ran)
    assert "hypergradient check: passed" in printed(ran)
    assert "arrays are bit-identical after 520 steps" in printed(ran)
    assert len(pictures(ran)) == 3
    assert not printed(ran, "stderr")


@pytest.mark.slow
def test_it_runs_on_one_device_and_prints_what_was_committed(execute):
    ran = execute(JAX_NUM_CPU_DEVICES="1")
    kept = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert "devices: 1, outer loss" in printed(ran)
    for name in (
        "one fixed decay",
        "noise held fixed",
        "check: not at a solution",
        "check: passed",
        "neumann 200",
        "retrained",
    ):
        assert printed(ran).count(name) == printed(kept).count(name) > 0
    assert not printed(ran, "stderr")
