"""The benchmarks: every figure of the README, with its baselines, in one command.

``python -m bench check|kernels|losses|step|decode|serve|launch|select|static|all [--out DIR] [--quick] [--fresh]``
measures and writes JSON Lines; ``make gpu`` runs what only a GPU can tell;
``python -m bench readme [--check]`` makes the README's performance section and picture from it.
"""
