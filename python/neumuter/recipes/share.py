"""How many neurons a search may touch where nothing else is asked for: some for each text."""

# The least share: one per cent, of which the paper found that it holds the memory.
LEAST = 0.01
# With so many for each text up to 11 % come out, be it 24 texts or 240, of a model of 4,096 neurons or of
# 46,080. With 4 or 5, a fifth and more of up to 240 do: see CAPACITY and HUNDREDS in docs/results.md.
NEURONS_PER_TEXT = 20
# Of so many texts and more, each takes so many: of 240, 20 for each left 11 % on one seed, and 60 left 1 %.
MANY_TEXTS, NEURONS_PER_ONE_OF_MANY = 100, 60


def choose_share(texts: int, neurons: int, mode: str) -> float:
    """Choose a share in (0, 1] of so many neurons for so many windows of texts to forget.

    In mode "mute" it is always the least one: the harm of a silenced neuron cannot be fitted away.
    """
    each = NEURONS_PER_TEXT if texts < MANY_TEXTS else NEURONS_PER_ONE_OF_MANY
    return LEAST if mode == "mute" else min(1.0, max(LEAST, each * texts / neurons))


def are_few(texts: int, neurons: int) -> bool:
    """Whether so many neurons are fewer than half of what so many windows of texts took."""
    return 2 * neurons < NEURONS_PER_TEXT * texts
