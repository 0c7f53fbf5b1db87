"""``python -m experiments.learning_rate``."""

from experiments.learning_rate import main

main()
