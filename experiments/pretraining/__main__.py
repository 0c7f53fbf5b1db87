"""``python -m experiments.pretraining``."""

from experiments.pretraining import main

main()
