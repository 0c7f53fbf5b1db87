"""Every example stands alone, is short, runs on tiny settings, and shows what it is for."""

import math
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
FILES = sorted(EXAMPLES.rglob("*.py"))
names = lambda f: str(f.relative_to(EXAMPLES))  # noqa: E731


def main_of(name):
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_examples_are_short_and_stand_alone(path):
    text = path.read_text()
    assert text.count("\n") <= 120, "a reader copies it whole"
    others = {file.stem for file in FILES}
    assert not others & set(re.findall(r"^(?:import|from) (\w+)", text, re.M)), "no imports from each other"
    assert f"python examples/{names(path)}" in text


def test_the_index_names_every_example():
    index = (EXAMPLES / "README.md").read_text()
    missing = [names(path) for path in FILES if f"({names(path)})" not in index]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        pytest.param("01_weight_decay", {"steps": 140}, 4, marks=pytest.mark.slow),
        pytest.param("02_learning_rate", {"outer_steps": 2, "grid": (0.1,)}, 2, marks=pytest.mark.slow),
        pytest.param("03_dropout", {"steps": 220}, 3, marks=pytest.mark.slow),
        pytest.param("04_data_cleaning", {"steps": 100}, 3, marks=pytest.mark.slow),
        pytest.param("05_augmentation", {"steps": 20}, 3, marks=pytest.mark.slow),
        pytest.param("07_distillation", {"outer_steps": 30}, 2, marks=pytest.mark.slow),
        pytest.param("08_language_model", {"steps": 40}, 3, marks=pytest.mark.slow),
        pytest.param(
            "10_text_classification", {"max_steps": 2, "size": 60, "num_words": 80}, 6, marks=pytest.mark.slow
        ),
        pytest.param("11_elastic_net", {"max_steps": 2, "ratios": (0.5, 0.9)}, 6, marks=pytest.mark.slow),
        pytest.param("12_kernel_ridge", {"max_steps": 2, "grid": 3}, 6, marks=pytest.mark.slow),
        pytest.param("13_denoising", {"max_steps": 2, "tolerances": (1.0,)}, 3, marks=pytest.mark.slow),
        pytest.param("14_federated", {"rounds": 2, "seeds": 2, "rates": (1e-3,)}, 4, marks=pytest.mark.slow),
        pytest.param("15_one_run", {"calls": 3, "trial_calls": 5}, 2, marks=pytest.mark.slow),
        pytest.param("16_few_shot", {"looks": 2, "outer_steps": 1, "classes": 10}, 4, marks=pytest.mark.slow),
    ],
)
def test_an_example_prints_and_saves_a_picture(name, settings, count, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    found = main_of(f"{name}.py")(**settings, out=str(tmp_path / "picture.png"))
    assert len(found) == count
    assert all(math.isfinite(value) for value in found.values())
    assert capsys.readouterr().out.count("\n") >= 2
    assert 5_000 < (tmp_path / "picture.png").stat().st_size < 200_000


@pytest.mark.slow
def test_verification_passes_at_the_solution_and_names_the_bug(tmp_path, capsys):
    found = main_of("06_verify.py")(points=3, out=str(tmp_path / "picture.png"))
    assert found["at the solution"] == "passed"
    assert found["after 20 steps"] == "not at a solution of the inner problem"
    assert "enters neither" in found["with the bug"]
    assert (tmp_path / "picture.png").stat().st_size > 5_000


@pytest.mark.slow
def test_learned_decays_of_words_hold_when_retrained(capsys):
    rows = main_of("09_retraining.py")()
    (valid, test, together), (single_valid, single_test, single_together) = rows["learned decays"], rows["one decay"]
    assert valid < 0.8 * single_valid
    assert test < 0.87 * single_test
    assert together < 0.93 * single_together
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_framework_learns_decays(name):
    learned = main_of(f"frameworks/{name}.py")(steps=20)
    assert all(abs(float(value) - 1e-3) > 1e-6 for value in jax.tree.leaves(learned))


@pytest.mark.slow
def test_equinox_gives_a_module_back():
    assert main_of("frameworks/equinox_mlp.py")(steps=20)(np.ones(64, np.float32)).shape == (10,)


@pytest.mark.slow
def test_sharding_follows_the_weights():
    variables, state = main_of("frameworks/sharding.py")(steps=5)
    for name, w in variables.params.items():
        for tree in (variables.hyperparams, state.estimator.solution):
            assert tree[name].sharding.is_equivalent_to(w.sharding, w.ndim)


def test_a_resumed_run_is_bit_identical(tmp_path):
    run, restored = main_of("frameworks/resume.py")(tmp_path)
    for a, b in zip(jax.tree.leaves(run), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
