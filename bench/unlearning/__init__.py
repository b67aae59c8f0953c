"""Does it forget? Experiments that anyone reruns, against what one would use instead.

``python -m bench.unlearning synth|real|requests [--quick]`` runs one and writes its JSON;
``python -m bench.unlearning report [--check]`` makes docs/results.md and its pictures from it.
"""
