"""``python -m experiments.data_cleaning``."""

from experiments.data_cleaning import main

main()
