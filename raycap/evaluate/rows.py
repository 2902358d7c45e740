"""Each scored image by itself: as JSON, as CSV, and which are the best and the worst. Knows no models or files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycap.coco import CaptionedImage
from raycap.evaluate.scores import Scores

__all__ = ["ScoredImage", "best_and_worst", "scored_images", "to_csv", "to_json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredImage:
    """One image of the annotations with its caption."""

    image_id: int
    file_name: str
    caption: str
    references: tuple[str, ...]
    scores: dict[str, float]
    """By metric, natural scale."""
    error: str = ""
    """Why the image could not be read, and so has the empty caption."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the metrics are keys like the others."""
        row = {"image_id": self.image_id, "file_name": self.file_name, "caption": self.caption}
        return row | {"references": list(self.references), "error": self.error or None} | self.scores


def scored_images(
    images: Sequence[CaptionedImage], captions: Mapping[int, str], scores: Scores, errors: Mapping[int, str]
) -> list[ScoredImage]:
    """The images, in their order; `captions`, and `errors` where there is one, by image id."""
    return [
        ScoredImage(
            image_id=image.image_id,
            file_name=image.file_name,
            caption=captions[image.image_id],
            references=image.captions,
            scores=scores.per_image[image.image_id],
            error=errors.get(image.image_id, ""),
        )
        for image in images
    ]


def to_json(model_id: str | None, scores: Scores, images: Sequence[ScoredImage]) -> bytes:
    """The scores of the set and of each image."""
    result = {"model_id": model_id, **scores.to_dict(), "per_image": [image.to_dict() for image in images]}
    return (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode(errors="replace")


def to_csv(images: Sequence[ScoredImage]) -> bytes:
    """One row for each image, with a header. Its references are one cell, a JSON list."""
    rows = [image.to_dict() for image in images]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"references": json.dumps(row["references"], ensure_ascii=False)} for row in rows)
    return text.getvalue().encode(errors="replace")


def best_and_worst(images: Sequence[ScoredImage], num_images: int) -> tuple[list[ScoredImage], list[ScoredImage]]:
    """Up to `num_images` of the highest CIDEr-D, best first, and of the lowest, worst first. None is in both.

    ROUGE-L decides where CIDEr-D is equal, as many are 0. Images that could not be read are in neither.
    """
    ranked = sorted(
        (image for image in images if not image.error),
        key=lambda image: (-image.scores["cider_d"], -image.scores["rouge_l"], image.image_id),
    )
    num_best = min(num_images, (len(ranked) + 1) // 2)
    num_worst = min(num_images, len(ranked) // 2)
    return ranked[:num_best], ranked[len(ranked) - num_worst :][::-1]
