"""How much room for entries to come a layer of the cache has behind those that it holds."""

HEADROOM = 64  # entries a head, where a cache grows and nobody says how many are to come
LEAST_GROWTH = 32  # of heads that differ in length, where an eighth of their entries is less
AT_REST = 512  # room for one entry in so many, where none is known to come: a five-hundredth at most


def at_rest(entries: int) -> int:
    """Of a layer behind which no entries are known to come; so much that a long one need not be copied for them."""
    return min(HEADROOM, entries // AT_REST)


def growth(entries: int, least: int) -> int:
    """Of a layer that is full: a share of its entries, so that each is copied a fixed number of times at most."""
    return max(least, entries // 8)
