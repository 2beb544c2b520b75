"""Memory that crosses from one stream to another: kept until its own stream may use it again.

A tensor's memory belongs to the stream that it was allocated on, its home: when the last reference
goes, the caching allocator gives it to the next allocation there, at once. If another stream still
reads it, that is too early. ``Tensor.record_stream`` asks the allocator to watch for the end of
that use, but then memory comes back only when the device has got there and somebody allocates,
which a host that runs ahead pays for with new memory. Here the order in which streams wait for each
other anyway is used instead: whoever crosses is kept alive until its home has waited for an event
behind its last use. So nothing is asked of the device, what is alive depends on the order of the
launches alone, and memory is as small in the thousandth step as in the first.

What belongs here: the book about that. Events and waits are made by the caller (``overlap.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class _Use:
    """What one stream uses of another's memory."""

    # By storage: views share their memory.
    alive: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    # Nobody refers to these any more; the event behind which their use is over.
    over: deque[tuple[int, list[torch.UntypedStorage]]] = field(default_factory=deque)


class StreamMemory:
    """Which memory is used on a stream that is not its home.

    Streams are told apart by equality. Events of one stream are numbered in the order in which they
    are recorded.
    """

    def __init__(self) -> None:
        self._uses: dict[tuple[Hashable, Hashable], _Use] = {}  # by (home, user)
        self._homes: dict[int, Hashable] = {}  # of the storages that are alive in some use

    def __len__(self) -> int:
        """Storages that are kept."""
        kept = [use.alive.keys() for use in self._uses.values()]
        over = [id(s) for use in self._uses.values() for _, part in use.over for s in part]
        return len(set().union(*kept)) + len(set(over))

    def crossed(self, values: Iterable[Any], *, made_on: Hashable, user: Hashable) -> None:
        """``user`` will use these; those not seen before were made on ``made_on``.

        Args:
            values: tensors; anything else is passed over.
        """
        for value in values:
            if not (isinstance(value, Tensor) and value.layout is torch.strided):
                continue
            storage = value.untyped_storage()
            home = self._homes.setdefault(storage._cdata, made_on)
            if home == user:
                if not self._is_kept(storage._cdata):
                    del self._homes[storage._cdata]
                continue
            self._uses.setdefault((home, user), _Use()).alive[storage._cdata] = storage

    def recorded(self, user: Hashable, number: int) -> None:
        """``user`` has recorded an event behind everything that was launched on it so far."""
        for (_, of), use in self._uses.items():
            if of != user:
                continue
            # Held by this book alone: no launch can name it again.
            done = [key for key, s in use.alive.items() if torch._C._storage_Use_Count(key) == 1]
            if done:
                use.over.append((number, [use.alive.pop(key) for key in done]))
                for key in done:
                    if not self._is_kept(key):
                        del self._homes[key]

    def waited(self, home: Hashable, user: Hashable, number: int) -> None:
        """``home`` waits for that event of ``user``, and so for every earlier one."""
        use = self._uses.get((home, user))
        while use is not None and use.over and use.over[0][0] <= number:
            use.over.popleft()

    def _is_kept(self, key: int) -> bool:
        return any(key in use.alive for use in self._uses.values())
