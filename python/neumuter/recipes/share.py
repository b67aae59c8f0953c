"""The share of the neurons that a search may touch, where nothing else is asked for."""

# One per cent of SmolLM2-135M's neurons is nearly enough for so many answers. More texts need more neurons;
# hundreds of them need more than in proportion: see HUNDREDS and CAPACITY in docs/results.md.
LEAST, TEXTS = 0.01, 24


def choose_share(texts: int, mode: str) -> float:
    """Choose a share in (0, 1] for so many windows of texts to forget.

    In mode "mute" it is always the least one: the harm of a silenced neuron cannot be fitted away.
    """
    return LEAST if mode == "mute" else min(1.0, LEAST * max(1.0, texts / TEXTS))
