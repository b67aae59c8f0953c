"""Does it forget? Experiments that anyone reruns, against what one would use instead.

``python -m bench.unlearning synth|real|tdec|robust|requests|paper [--quick]`` runs one and writes its rows;
``python -m bench report`` makes docs/results.md of them.
"""
