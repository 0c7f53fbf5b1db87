"""``python -m experiments.augmentation``."""

from experiments.augmentation import main

main()
