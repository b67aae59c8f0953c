"""Whole models: a step of mask training, and generation with mute sets."""
