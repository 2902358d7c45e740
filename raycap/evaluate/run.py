"""`raycap evaluate`: caption images with a bundle, or read captions from a file, and score them.

Runs in one process, without Ray.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import track

from raycap.coco import CaptionedImage, read_captions, read_results, write_results
from raycap.errors import ConfigurationError, ObjectError
from raycap.evaluate.config import EvaluateConfig
from raycap.evaluate.scores import Scores, check_scorers, score_captions
from raycap.evaluate.table import scores_table
from raycap.storage import Store, open_store, write_bytes

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> Scores:
    """Score as `config` says: prints a table, and writes the files that were asked for.

    Images that cannot be read are scored as empty captions and counted in the log, so scores of the same annotations
    compare. Raises ConfigurationError or StorageError.
    """
    check_scorers(config.tokenizer)
    if config.output:
        write_bytes(config.output, b"{}\n", config.s3)  # better to learn now that it cannot be written
    images = read_captions(config.annotations, config.s3)
    model_id: str | None = None
    if config.results is not None:
        captions = _known(read_results(config.results, config.s3), images, config.results)
    else:
        captions, model_id = _caption_images(config, images)
        if config.results_output:
            write_results(config.results_output, captions, config.s3)
    references = {image.image_id: list(image.captions) for image in images}
    scores = score_captions(references, captions, tokenizer=config.tokenizer)
    Console().print(scores_table(scores))
    if config.output:
        result: dict[str, Any] = {"model_id": model_id, **scores.to_dict(), "per_image": scores.per_image}
        write_bytes(config.output, (json.dumps(result, indent=1) + "\n").encode(), config.s3)
    return scores


def _known(captions: dict[int, str], images: list[CaptionedImage], location: str) -> dict[int, str]:
    """The captions, if they are of exactly the annotated images."""
    wanted = {image.image_id for image in images}
    missing, unknown = sorted(wanted - captions.keys()), sorted(captions.keys() - wanted)
    if missing or unknown:
        problems = [f"{len(missing)} images have no caption (such as {missing[:3]})"] if missing else []
        problems += [f"{len(unknown)} image ids are not in the annotations (such as {unknown[:3]})"] if unknown else []
        raise ConfigurationError(
            f"{location}: {' and '.join(problems)}; expected one caption for every annotated image"
        )
    return captions


def _caption_images(config: EvaluateConfig, images: list[CaptionedImage]) -> tuple[dict[int, str], str]:
    """Captions by image id, and the id of the model that made them."""
    from raycap.model.captioner import Captioner  # torch: not needed to score a results file

    assert config.images is not None
    store = open_store(config.images, config.s3)
    store.check_readable()
    captioner = Captioner.load(
        config.model,
        s3=config.s3,
        device=config.device,
        beam_size=config.beam_size,
        length_penalty=config.length_penalty,
    )
    captions: dict[int, str] = {image.image_id: "" for image in images}
    failed: list[str] = []
    batches = _batches(store, images, captioner.prepare, config.batch_size)
    total = -(-len(images) // config.batch_size)
    console = Console(stderr=True)
    for batch in track(batches, "captioning", total=total, console=console, disable=not sys.stderr.isatty()):
        good = [(image, pixels) for image, pixels in batch if not isinstance(pixels, ObjectError)]
        failed += [f"{image.file_name}: {error}" for image, error in batch if isinstance(error, ObjectError)]
        for (image, _), caption in zip(good, captioner.caption([pixels for _, pixels in good]), strict=True):
            captions[image.image_id] = caption.text
    if len(failed) == len(images):
        raise ConfigurationError(f"none of the {len(images)} images can be read; the first: {failed[0]}")
    if failed:
        log.warning("%d images cannot be read and count as empty captions; the first: %s", len(failed), failed[0])
    return captions, captioner.model_id


def _batches(
    store: Store, images: list[CaptionedImage], prepare: Any, batch_size: int
) -> Iterator[list[tuple[CaptionedImage, Any]]]:
    """Images with their pixels or their error, read a batch ahead."""

    def load(image: CaptionedImage) -> tuple[CaptionedImage, Any]:
        try:
            return image, prepare(store.read(image.file_name))
        except ObjectError as error:
            return image, error

    with ThreadPoolExecutor(8) as pool:
        ahead = [pool.submit(load, image) for image in images[:batch_size]]
        for start in range(batch_size, len(images) + batch_size, batch_size):
            current, ahead = ahead, [pool.submit(load, image) for image in images[start : start + batch_size]]
            yield [future.result() for future in current]
