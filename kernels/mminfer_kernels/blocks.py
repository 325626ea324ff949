"""How many rows a blocked op handles at a time, so that its scratch stays small whatever the length."""

SCRATCH_BYTES = 8 * 2**20  # measured on CPU: beyond the last-level cache a block costs more than it saves
FEW_BLOCK_ROWS = 32  # with fewer, heads are better taken in turn
MAX_BLOCK_ROWS = 128  # no block of an N-row problem is ever close to N x N


def block_rows(bytes_per_row: int, rows: int) -> int:
    """Rows of a block whose scratch takes at most `SCRATCH_BYTES`, at least one and at most `rows`."""
    fitting = SCRATCH_BYTES // max(bytes_per_row, 1)
    return max(1, min(fitting, MAX_BLOCK_ROWS, rows))
