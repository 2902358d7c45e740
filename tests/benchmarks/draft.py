"""What decoding JPEGs at a part of their size gives, in time and in captions.

    python -m tests.benchmarks.draft --annotations captions.json --images DIR [--factor 5]

Photos that a whole decode would do for are enlarged to the size of a camera's, and captioned after decoding them whole,
down to twice the model's size (as raycap does), and down to the model's size.
"""

from __future__ import annotations

import argparse
import sys
import time
from io import BytesIO
from pathlib import Path

from PIL import Image

from raycap import images
from raycap.coco import read_captions
from raycap.evaluate.scores import score_captions
from raycap.model.captioner import Captioner

LEAST_PX = 400
"""Of the longer side of the photos that are taken."""
FACTORS = {"whole": 10**6, "twice the size": 2, "the size": 1}


def enlarged(path: Path, factor: int) -> bytes | None:
    """The photo as a camera might have written it; None if it is too small to begin with."""
    with Image.open(path) as photo:
        if max(photo.size) < LEAST_PX:
            return None
        file = BytesIO()
        photo.resize((factor * photo.width, factor * photo.height), Image.Resampling.LANCZOS).save(file, "JPEG")
    return file.getvalue()


def main() -> None:
    """Measure and print a line for each way to decode."""
    parser = argparse.ArgumentParser(description="What decoding JPEGs at a part of their size gives.")
    parser.add_argument("--annotations", nargs="+", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--factor", type=int, default=5, help="how much larger each side becomes")
    options = parser.parse_args()
    captioner, files, references = Captioner.load(), {}, {}
    for image in (image for location in options.annotations for image in read_captions(location)):
        path = options.images / image.file_name
        if path.exists() and (data := enlarged(path, options.factor)):
            files[len(files)] = data
            references[len(references)] = image.captions
    whole: dict[int, str] = {}
    for name, factor in FACTORS.items():
        images._DRAFT_FACTOR = factor  # type: ignore[misc]
        started = time.process_time()
        pixels = [captioner.prepare(data) for data in files.values()]
        decode_ms = 1000 * (time.process_time() - started) / len(files)
        captions = [caption.text for batch in _batches(pixels) for caption in captioner.caption(batch)]
        candidates = dict(zip(files, captions, strict=True))
        whole = whole or candidates
        equal = sum(candidates[number] == whole[number] for number in files) / len(files)
        values = score_captions(references, candidates, metrics=("cider_d", "bleu_4")).values
        scores = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in values.items())
        sys.stdout.write(f"{name}: {decode_ms:.1f} ms of a core, {100 * equal:.1f}% the same captions, {scores}\n")


def _batches(pixels: list) -> list:  # type: ignore[type-arg]
    return [pixels[first : first + 32] for first in range(0, len(pixels), 32)]


if __name__ == "__main__":
    main()
