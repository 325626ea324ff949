"""How much memory all requests together may hold: bodies as they come, and images that are decoded."""

from __future__ import annotations

from threading import Lock

from mminfer.serving.errors import RequestError


class Budget:
    """Bytes that are held for requests.

    Args:
        most_bytes: of all together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._lock = most_bytes, Lock()
        self.nbytes = 0

    def share(self) -> Share:
        """Of one request."""
        return Share(self)

    def take(self, count: int, own: int) -> None:
        """Takes bytes for a request that holds `own` already.

        Raises:
            RequestError: there are not so many; with a status that says whether to ask again.
        """
        with self._lock:
            if own + count > self._most:
                raise RequestError(
                    413, f"body and decoded images: wanted {self._most} bytes at most", code="request_too_large"
                )
            if self.nbytes + count > self._most:
                raise RequestError(
                    429, "other requests hold the memory: ask again later", "rate_limit_error", code="memory_full"
                )
            self.nbytes += count

    def give_back(self, count: int) -> None:
        with self._lock:
            self.nbytes -= count


class Share:
    """What one request holds; giving it back twice does nothing."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._nbytes = budget, 0

    def take(self, count: int) -> None:
        """Raises `RequestError` if there is no room."""
        self._budget.take(count, self._nbytes)
        self._nbytes += count

    def release(self) -> None:
        count, self._nbytes = self._nbytes, 0
        self._budget.give_back(count)
