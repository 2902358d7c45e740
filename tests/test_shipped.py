"""What ships in the package: the bundle and the sample photos, together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raycap import Bundle, Captioner
from raycap.model.bundle import shipped_bundle

SAMPLES = Path(__file__).parent.parent / "raycap" / "samples"


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.load(device="cpu")


@pytest.fixture(scope="module")
def photos(captioner: Captioner) -> dict[str, torch.Tensor]:
    return {path.stem: captioner.prepare(path.read_bytes()) for path in sorted(SAMPLES.glob("*.jpg"))}


def test_the_bundle_is_small_scored_and_says_what_it_was_trained_on() -> None:
    folder = Path(shipped_bundle())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 40e6
    bundle = Bundle.load()
    assert bundle.metrics["scores"]["cider_d"] >= 0.58
    assert bundle.metrics["scores"]["bleu_4"] >= 0.235
    assert bundle.metrics["tokenizer"] == "ptb"
    assert "Flickr8k" in bundle.card
    assert "raycap train" in bundle.card
    assert "research and educational use" in bundle.card


def test_captions_of_photos_that_the_model_knows(captioner: Captioner, photos: dict[str, torch.Tensor]) -> None:
    """Each word is one that a person would use too; a broken preprocessing or search loses most of them."""
    expected = {"dog": "dog", "moose": "grass", "river": "water", "whales": "water", "musicians": "guitar"}
    captions = captioner.caption([photos[name] for name in expected])
    for (name, word), caption in zip(expected.items(), captions, strict=True):
        texts = [caption.text, *(other.text for other in caption.alternatives)]
        assert any(word in text for text in texts), (name, texts)
        assert len(set(texts)) == 3


def test_a_caption_does_not_depend_on_its_batch(captioner: Captioner, photos: dict[str, torch.Tensor]) -> None:
    pixels = list(photos.values())
    batch = [pixels[n % len(pixels)] for n in range(64)]
    alone = [captioner.caption([image])[0] for image in pixels]
    for n, caption in enumerate(captioner.caption(batch)):
        expected = alone[n % len(pixels)]
        assert caption.text == expected.text
        assert [other.text for other in caption.alternatives] == [other.text for other in expected.alternatives]
        assert caption.log_prob == pytest.approx(expected.log_prob, abs=1e-3)


def test_every_sample_has_its_source() -> None:
    sources = (SAMPLES / "SOURCES.md").read_text()
    photos = sorted(path.name for path in SAMPLES.glob("*.jpg"))
    assert len(photos) >= 8
    assert [name for name in photos if f"`{name}`" not in sources] == []
