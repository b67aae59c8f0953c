"""The short form of an experiment."""


def quick_rows(cases):
    return [about | find() for about, find in cases]
