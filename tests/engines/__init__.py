"""Muted models in real engines. Each file says what it needs, and is skipped where that is not installed."""
