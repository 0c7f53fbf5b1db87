"""Thin adapters to training loops of other libraries. None exist yet."""

__all__: list[str] = []
