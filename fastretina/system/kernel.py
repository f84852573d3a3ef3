"""Functions that numba compiles, kept on disk where they can be. The cache saves seconds; it is never a reason to fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])


class _Cache(FunctionCache):  # type: ignore[misc]  # numba is untyped
    """numba's, whose files may be corrupt, another user's, or on a disk that is full: the function is compiled then."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # corrupt bytes make pickle raise anything
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):  # what is there already is read before it is added to
            super().save_overload(sig, data)


def kernel(**options: Any) -> Callable[[Function], Function]:
    """`numba.njit` that releases the GIL, with numba's options, and a cache on disk where one can be written."""

    def decorate(function: Function) -> Function:
        compiled = njit(nogil=True, **options)(function)
        with suppress(RuntimeError):  # no folder to write to: not the package's, no home, and no NUMBA_CACHE_DIR
            compiled._cache = _Cache(function)
        return compiled  # type: ignore[no-any-return]

    return decorate
