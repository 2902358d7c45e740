"""The result -> the text of the page. Reads and writes no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raycap.benchmark.breakdown import STAGES
from raycap.benchmark.table import batch_sizes
from raycap.html import page_template

__all__ = ["render"]


def render(result: Mapping[str, Any]) -> str:
    """The page."""
    machine = result["machine"]
    facts = {
        "Machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB",
        "GPU": machine["gpu"] or "none",
        "System": machine["system"],
        "Model": result["model_id"],
        "Engine": f"{result['engine']} on {result['device']}",
        "Images": f"{result['num_images']:,}",
        "Rounds": str(result["settings"]["repeats"]),
        "Versions": ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        "Settings": ", ".join(f"{name} {value}" for name, value in _settings(result["settings"])),
    }
    costs = result["core_ms_per_image"]
    filters: dict[str, Callable[..., str]] = {
        "number": lambda value, digits: f"{value:,.{digits}f}",
        "batch_sizes": batch_sizes,
    }
    return page_template("raycap.benchmark", filters).render(
        result=result,
        facts=facts,
        stages=STAGES,
        fastest=max(each["images_per_s"]["highest"] for each in result["measurements"].values()),
        costliest=max((sum(by_stage.values()) for by_stage in costs.values()), default=0.0),
    )


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those that were given and say something of the measurement."""
    untold = ("output", "report", "s3", "repeats", "engine")
    told = [(name, value) for name, value in settings.items() if name not in untold and value is not None]
    return [(name, " ".join(value) if isinstance(value, tuple) else value) for name, value in told]
