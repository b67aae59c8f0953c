"""The benchmarks: every figure of the README, with its baselines, in one command.

``python -m bench kernels|step|select|decode|static|all [--out DIR] [--quick]`` measures and writes JSON;
``python -m bench readme [--check]`` makes the README's performance section and picture from it.
"""
