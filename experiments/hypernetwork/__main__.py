"""``python -m experiments.hypernetwork``."""

from experiments.hypernetwork import main

main()
