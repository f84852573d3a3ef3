"""CUDA's streams and events, which a CPU has none of: the same calls serve both."""

from __future__ import annotations

import torch


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that work on a CUDA device is queued on now; None for a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """An event behind all that is queued on a stream by now; None for no stream.

    Who waits for it sleeps: CUDA's default is to poll, which takes a core from decoding.
    """
    if stream is None:
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
