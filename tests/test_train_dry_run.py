"""`raycap train --dry-run`: what is wrong is found before anything runs, and nothing is written."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from raycap.errors import ConfigurationError
from raycap.train.dry_run import dry_run
from tests.training import (
    IMAGES,
    VOCABULARY,
    one_thread,  # noqa: F401  # for the whole module
    tiny_job,
)


def files_below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def test_it_says_what_it_found_and_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    job = tiny_job(tmp_path, epochs=1, fine_tune_epochs=2, scst_epochs=3)
    job.train_store.write("1.png", b"no picture")
    job.train_store.delete("2.png")
    before = files_below(tmp_path)
    found = dry_run(job)
    assert files_below(tmp_path) == before
    assert (found["num_train_images"], found["num_val_images"], found["num_captions"]) == (8, 8, 16)
    assert (found["num_words"], found["unknown_words"]) == (len(VOCABULARY), 0.0)
    assert found["num_parameters"] == sum(p.numel() for p in job.start.single.parameters())
    for stage in ("cross_entropy", "fine_tune", "self_critical"):
        assert {"train/loss", "train/grad_norm", "batch_s"} <= found[stage].keys()
    assert "train/reward" in found["self_critical"]
    for line in (
        "0.00% of the captions' words are not in the vocabulary",
        "8 validation images are training images too: their scores will be too good",
        "training images: 2 of the first 4 can be read",
        "1.png: not_an_image: ",
        "2.png: not_found: ",
        "cross_entropy: inputs [2, 4, 6], loss ",
        "fine_tune: inputs [2, 8, 8, 3], loss ",
        "self_critical: inputs [2, 4, 6], loss ",
        "images of 8 px, on cpu",
        "nothing was written; leave out --dry-run to train",
    ):
        assert line in caplog.text


def test_it_takes_what_one_worker_takes_of_a_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dry_run(tiny_job(tmp_path, epochs=1, fine_tune_epochs=1, scst_epochs=1, batch_size=7, num_workers=3))
    for line in (
        "training images: 7 of the first 7 can be read",
        "cross_entropy: inputs [3, 4, 6], loss ",
        "fine_tune: inputs [3, 8, 8, 3], loss ",
        "self_critical: inputs [3, 4, 6], loss ",
        " s for 3 images, the share of one of 3 workers",
    ):
        assert line in caplog.text


def test_words_outside_the_vocabulary_are_counted(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, epochs=1)
    odd = replace(IMAGES[1], captions=("a zebra quagga", "okapi"))
    found = dry_run(replace(job, train_images=[IMAGES[0], odd]))
    assert found["unknown_words"] == pytest.approx(3 / 11)


@pytest.mark.parametrize("what", ["training", "validation"])
def test_no_readable_image_is_an_error(what: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, epochs=1)
    for image in IMAGES[:4]:
        job.train_store.write(image.file_name, b"no picture")
    if what == "training":
        job = replace(job, val_images=IMAGES[4:])
    with pytest.raises(ConfigurationError, match=f"none of the first 4 {what} images can be read: not_an_image: "):
        dry_run(job)
