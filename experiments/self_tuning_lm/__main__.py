"""``python -m experiments.self_tuning_lm``."""

from experiments.self_tuning_lm import main

main()
