"""``python -m experiments.weight_decay``."""

from experiments.weight_decay import main

main()
