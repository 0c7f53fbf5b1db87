"""The benchmark scripts run on tiny settings and write what their documents promise."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_cost", "hessian_modes", "unroll_memory", "methods", "frozen_weights"])
def test_quick_run(name, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["networks"]
    for measured in record["networks"].values():
        assert {"cpu", "cores", "python", "jax", "jaxlib", "optax", "numpy"} <= set(measured["machine"])
    assert str(ROOT) not in json.dumps(record)
    assert "|" in (tmp_path / f"{name}.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["joint_training", "solver_accuracy", "peer_accuracy", "minimize", "scikit_learn", "race"]
)
def test_quick_run_of_quality(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "HYPERGRAD_DATA"}
    command = [sys.executable, f"benchmarks/quality/{name}.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / f"{name}.json").read_text())
    parts = (
        {"tasks"},
        {"trajectories", "one shot", "networks", "comparison"},
        {"problems", "libraries"},
        {"problems"},
        {"splits"},
    )
    assert any(names <= set(record) for names in parts)
    assert str(ROOT) not in json.dumps(record)
    report = (tmp_path / f"{name}.md").read_text()
    assert "|" in report
    assert "nan" not in report


@pytest.mark.slow
def test_quick_run_of_the_check_matrix(tmp_path):
    command = [sys.executable, "benchmarks/check_matrix.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (model,) = json.loads((tmp_path / "check_matrix.json").read_text())["models"].values()
    assert model["implicit"]["none"]["verdict"] == "passed"
    assert model["implicit"]["sign"]["verdict"] == model["unrolled"]["sign"]["verdict"] == "FAILED"
    assert model["unrolled"]["stop_gradient"]["verdict"] == "refused"
    assert model["implicit"]["stop_gradient"]["verdict"] == "refused"


@pytest.mark.slow
def test_quick_run_of_an_experiment(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "HYPERGRAD_DATA"}
    command = [sys.executable, "experiments/text_decay.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (rows,) = json.loads((tmp_path / "text_decay.json").read_text())["seeds"]
    assert len(rows) == 8
    assert rows["by frequency, learned"]["valid"] < rows["one decay, grid"]["valid"]
    assert (tmp_path / "text_decay.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_device_check_runs_on_a_cpu(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "benchmarks/device_check.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "device_check.json").read_text())
    assert len(record["correctness"]) == 9
    assert all(row["right"] for row in record["correctness"])
    meta = record["metagradient"]
    assert meta["right"]
    assert meta["status"] == "FINISHED"
    assert meta["planned_bytes"] > 4 * meta["weights"]
    wide, narrow = record["speed"]
    assert "failed" not in wide
    assert "failed" not in narrow
    assert narrow["bytes_per_weight"] < wide["bytes_per_weight"] - 1  # the first moment takes two bytes less
    assert min(row["cosine"] for row in record["precision"]) > 0.9


def test_the_tables_of_methods_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = runpy.run_path(str(ROOT / "benchmarks" / "methods_report.py"), run_name="methods_report")
    for page, tables in module["pages"]().items():
        for name, table in tables.items():
            assert f"<!-- {name} -->\n\n{table}\n\n<!-- end {name} -->" in (ROOT / page).read_text()
    goodness = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text())["goodness"]
    assert f"number {goodness['condition']:.0f})" in (ROOT / "docs/how_to_choose.md").read_text()


@pytest.mark.slow
def test_the_benchmark_of_scale_runs(tmp_path):
    command = [sys.executable, "benchmarks/cost/scale.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "scale.json").read_text())
    assert {row["network"] for row in record["rows"]} == {"mlp", "transformer"}
    assert all(row["loss"][1] < row["loss"][0] for row in record["rows"])
    assert all(row["skipped"] < 11 for row in record["rows"] if row["network"] == "mlp")
    plans = {row["variant"]: row["planned_bytes_per_weight"] for row in record["rows"] if row["network"] == "mlp"}
    assert plans["bfloat16 moments"] < plans["float32"] - 1.5
    assert all(row["bytes_per_weight_over_all"] > 28 for row in record["mesh"])


@pytest.mark.slow
def test_the_benchmark_of_whole_runs_runs(tmp_path):
    command = [sys.executable, "benchmarks/cost/metagradient.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "metagradient.json").read_text())["rows"]
    assert [row["forward"] for row in rows] == [row["forward_planned"] for row in rows]
    assert all(row["status"] == "FINISHED" for row in rows)
    assert rows[0]["copies"] == pytest.approx(rows[1]["copies"], rel=0.01)  # a vjp does not know the run's length
