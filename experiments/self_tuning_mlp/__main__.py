"""``python -m experiments.self_tuning_mlp``."""

from experiments.self_tuning_mlp import main

main()
