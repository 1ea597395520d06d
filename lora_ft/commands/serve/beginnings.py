"""Prompts that were read lately: another prompt that begins like one of them is not read again as far as they agree."""

from collections import OrderedDict

from lora_ft.model.row_cache import ROOM, RowCache
from lora_ft.nn.rows import shared_length

WORTHWHILE = 8  # tokens: less is read as fast


class Beginnings:
    """The caches of the last prompts, of `limit` tokens together."""

    def __init__(self, limit: int):
        self.limit, self.tokens = limit, 0
        self._caches: OrderedDict[tuple[str | None, tuple[int, ...]], RowCache] = OrderedDict()

    def find(self, adapter: str | None, ids: list[int]) -> tuple[RowCache, int]:
        """A cache with the longest known beginning of a prompt, and its tokens; at least one is left to read."""
        best, most = None, WORTHWHILE - 1
        for key in self._caches:
            shared = min(shared_length(key[1], ids), len(ids) - 1) if key[0] == adapter else 0
            if shared > most:
                best, most = key, shared
        if best is None:
            return RowCache(), 0
        self._caches.move_to_end(best)
        return self._caches[best].beginning(most), most

    def keep(self, adapter: str | None, ids: list[int], cache: RowCache) -> None:
        """Remember a prompt that was read, and forget those not used for longest."""
        key = (adapter, tuple(ids))
        if len(ids) + ROOM > self.limit or key in self._caches:
            return
        self._caches[key] = cache.beginning(len(ids))
        self.tokens += len(ids) + ROOM
        while self.tokens > self.limit:
            self.tokens -= len(self._caches.popitem(last=False)[0][1]) + ROOM

    def forget(self, adapter: str) -> None:
        """Forget the prompts of an adapter."""
        for key in [key for key in self._caches if key[0] == adapter]:
            del self._caches[key]
            self.tokens -= len(key[1]) + ROOM
