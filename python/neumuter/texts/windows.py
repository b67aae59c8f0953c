"""Windows of long texts: each token counts in exactly one, behind enough of the text before it."""


def cut_windows(ids: list[int], start: int, head: int, length: int) -> list[tuple[list[int], int]]:
    """Cut a text into windows of at most ``length`` tokens.

    Each token from ``start`` on counts in exactly one window. Before it stand at least half of the window's
    tokens, or all tokens of the text that come before it.

    Args:
        ids: the tokens of the text.
        start: the first that counts.
        head: tokens at the start of the text that every window begins with, such as a start token.

    Returns:
        For each window its tokens, and the position of the first that counts.
    """
    body, counted, windows = ids[head:], start - head, []
    width = length - head
    while counted < len(body) and width > 0:
        end = min(len(body), max(width, counted + max(1, width // 2)))
        begin = max(0, end - width)
        windows.append((ids[:head] + body[begin:end], head + counted - begin))
        counted = end
    return windows
