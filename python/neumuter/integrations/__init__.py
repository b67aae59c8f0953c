"""Adapters to other people's frameworks; each says in its own docstring what it needs installed."""
