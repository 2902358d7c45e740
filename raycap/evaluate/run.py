"""`raycap evaluate`: caption images with a bundle, or read captions from a file, and score them.

Runs in one process, without Ray.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from raycap.coco import CaptionedImage, read_captions, read_results, write_results
from raycap.errors import ConfigurationError, ObjectError
from raycap.evaluate.config import EvaluateConfig
from raycap.evaluate.page import render
from raycap.evaluate.rows import ScoredImage, best_and_worst, scored_images, to_csv, to_json
from raycap.evaluate.scores import Scores, check_scorers, score_captions
from raycap.evaluate.table import scores_table
from raycap.evaluate.tiles import Tile, make_tiles
from raycap.readahead import read_ahead
from raycap.storage import Store, check_file_writable, open_store, write_bytes

if TYPE_CHECKING:
    from raycap.model.captioner import Captioner

log = logging.getLogger(__name__)

_NUM_THREADS = 8


def evaluate(config: EvaluateConfig) -> Scores:
    """Score as `config` says: prints a table, and writes the files that were asked for.

    Images that cannot be read are scored as empty captions and counted in the log, so scores of the same annotations
    compare. Raises ConfigurationError or StorageError.
    """
    check_scorers(config.tokenizer)
    for location in filter(None, (config.output, config.results_output, config.report)):
        check_file_writable(location, config.s3)
    images = read_captions(config.annotations, config.s3)
    captioner, store = None, None
    errors: dict[int, str] = {}
    if config.results is not None:
        captions = _known(read_results(config.results, config.s3), images, config.results)
    else:
        captioner, store = _open(config)
        captions, errors = _caption_images(captioner, store, images, config.batch_size)
        if config.results_output:
            write_results(config.results_output, captions, config.s3)
    references = {image.image_id: list(image.captions) for image in images}
    scores = score_captions(references, captions, tokenizer=config.tokenizer)
    Console().print(scores_table(scores))
    rows = scored_images(images, captions, scores, errors)
    if config.output:
        is_csv = config.output.lower().endswith(".csv")
        model_id = captioner.model_id if captioner is not None else None
        write_bytes(config.output, to_csv(rows) if is_csv else to_json(model_id, scores, rows), config.s3)
    if config.report:
        write_bytes(config.report, _report(config, scores, rows, captioner, store).encode(errors="replace"), config.s3)
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


def _open(config: EvaluateConfig) -> tuple[Captioner, Store]:
    """The model and the images that it is to caption."""
    from raycap.model.captioner import Captioner  # torch: not needed to score a results file

    assert config.images is not None
    store = open_store(config.images, config.s3)
    store.check_readable()
    captioner = Captioner.load(
        config.model,
        s3=config.s3,
        device=config.device,
        engine=config.engine,
        beam_size=config.beam_size,
        length_penalty=config.length_penalty,
    )
    return captioner, store


def _caption_images(
    captioner: Captioner, store: Store, images: list[CaptionedImage], batch_size: int
) -> tuple[dict[int, str], dict[int, str]]:
    """Captions by image id, and why it is empty for those that could not be read."""
    captions: dict[int, str] = {image.image_id: "" for image in images}
    errors: dict[int, str] = {}
    names = [image.file_name for image in images]
    batches = read_ahead(store, names, captioner.prepare, batch_size=batch_size, num_threads=_NUM_THREADS)
    total = -(-len(images) // batch_size)
    console = Console(stderr=True)
    for batch in track(batches, "captioning", total=total, console=console, disable=not sys.stderr.isatty()):
        good = [(images[index].image_id, pixels) for index, pixels in batch if not isinstance(pixels, ObjectError)]
        errors |= {images[index].image_id: str(error) for index, error in batch if isinstance(error, ObjectError)}
        for (image_id, _), caption in zip(good, captioner.caption([pixels for _, pixels in good]), strict=True):
            captions[image_id] = caption.text
    if errors:
        first = next(f"{image.file_name}: {errors[image.image_id]}" for image in images if image.image_id in errors)
        if len(errors) == len(images):
            raise ConfigurationError(f"none of the {len(images)} images can be read; the first: {first}")
        log.warning("%d images cannot be read and count as empty captions; the first: %s", len(errors), first)
    return captions, errors


def _report(
    config: EvaluateConfig, scores: Scores, rows: list[ScoredImage], captioner: Captioner | None, store: Store | None
) -> str:
    """The page."""
    chosen = best_and_worst(rows, config.report_images)
    if captioner is None or store is None:
        facts = {"Captions": str(config.results), "Annotations": config.annotations}
        best, worst = ([Tile(image) for image in images] for images in chosen)
    else:
        decoding = captioner.decoding
        facts = {
            "Model": captioner.model_id,
            "Annotations": config.annotations,
            "Images": str(config.images),
            "Beams": f"{decoding.beam_size}, length penalty {decoding.length_penalty:g}",
        }
        best, worst = (make_tiles(images, captioner, store, batch_size=config.batch_size) for images in chosen)
    return render(facts, scores, rows, best, worst)
