"""``python -m experiments.distillation``."""

from experiments.distillation import main

main()
