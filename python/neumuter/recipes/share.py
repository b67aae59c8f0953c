"""The share of the neurons that a search may touch, where nothing else is asked for."""

# One per cent of SmolLM2-135M's neurons is enough for so many answers, and ten times as many need ten times
# the neurons.
LEAST, TEXTS = 0.01, 24


def choose_share(texts: int, mode: str) -> float:
    """Choose a share in (0, 1] for so many windows of texts to forget.

    In mode "mute" it is always the least one: the harm of a silenced neuron cannot be fitted away.
    """
    return LEAST if mode == "mute" else min(1.0, LEAST * max(1.0, texts / TEXTS))
