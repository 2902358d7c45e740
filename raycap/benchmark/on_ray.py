"""The bulk job as the benchmark runs it: its Ray ends with it, and so does not run while others are measured."""

from __future__ import annotations

import ray

from raycap.bulk.config import CaptionConfig
from raycap.bulk.run import Outcome, caption

__all__ = ["caption_alone"]


def caption_alone(config: CaptionConfig) -> Outcome:
    """As `raycap.bulk.run.caption`. Ends the Ray of this process, whoever started it."""
    try:
        return caption(config)
    finally:
        ray.shutdown()
