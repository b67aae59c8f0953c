"""The ops alone: right or wrong, and how fast next to what else does their work."""
