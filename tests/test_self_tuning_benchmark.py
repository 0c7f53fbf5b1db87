"""The race of self-tuning against black-box search, and its costs, on tiny settings."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def benchmark(name, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("HYPERGRAD_DATA", None)
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_race(tmp_path):
    benchmark("self_tuning", "--tiny", "--choose", "--out", tmp_path)
    benchmark("self_tuning", "--tiny", "--seeds", 1, "--out", tmp_path, "--picture", tmp_path / "race.png")
    record = json.loads((tmp_path / "self_tuning.json").read_text())
    assert {"cpu", "cores", "python", "jax", "jaxlib", "optax", "numpy"} <= set(record["machine"])
    found, budget = record["seeds"]["0"], record["race"]["budget"]
    assert len(found) == 10
    for name, one in found.items():
        if name.endswith("whole budget"):  # of which runs that stop early leave some
            assert budget / 4 <= one["gradients"] <= record["race"]["full"] * budget
            assert one["trials"] == record["race"]["full"]
        else:
            assert 0.9 * budget < one["gradients"] <= budget
            assert len(one["curve"]) == budget // record["race"]["look"]
            assert one["curve"] == sorted(one["curve"], reverse=True)
            assert one["curve"][-1] == pytest.approx(one["valid_loss"], abs=1e-4)
        assert len(one["values"]) == 5
    assert found["random search"]["trials"] >= record["trials"]["random search"]
    assert set(record["choice"]["valid_loss"]) == set(record["trials"])
    assert str(ROOT) not in json.dumps(record)
    assert "self-tuning, Delta-STN, against" in (tmp_path / "self_tuning.md").read_text()
    assert 10_000 < (tmp_path / "race.png").stat().st_size < 100_000


@pytest.mark.slow
def test_cost(tmp_path):
    benchmark("self_tuning_cost", "--quick", "--out", tmp_path)
    record = json.loads((tmp_path / "self_tuning_cost.json").read_text())
    measured = record["networks"]["mlp256"]["candidates"]
    assert set(record["targets"]) <= set(measured)
    assert measured["plain step"]["in_plain_steps"] == 1
    assert all(measured[f"{form} step"]["over_hand"] > 0 for form in ("STN", "Delta-STN"))
    assert "| STN step, in plain steps | mlp256 |" in (tmp_path / "self_tuning_cost.md").read_text()
