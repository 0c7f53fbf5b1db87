"""Runs against rivals, as modules: ``python -m experiments.weight_decay``. README.md lists them."""
