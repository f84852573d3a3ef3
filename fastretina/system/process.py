"""The process that something was made in. Its threads do not follow a fork, and a lock that one of them held stays locked there."""

from __future__ import annotations

import os


class OwnProcess:
    """Belongs to what has threads: says whether they can be there. To be asked before any lock of theirs is taken."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """False in a child that was forked after this object was made."""
        return os.getpid() == self._pid
