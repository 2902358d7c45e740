"""The reward's CIDEr-D is the official scorer's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from raycap.train.cider import CiderD

WORDS = ("a", "dog", "runs", "on", "the", "grass")


def official(references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> list[float]:
    """Of one caption an image."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for caption, of_image in zip(captions, references, strict=True):
        scorer += (" ".join(caption), [" ".join(reference) for reference in of_image])
    _, scores = scorer.compute_score()
    return [float(score) for score in scores]


def sentence(random: np.random.Generator, longest: int = 12) -> list[str]:
    """Few words, so that n-grams repeat and match."""
    return [WORDS[n] for n in random.integers(len(WORDS), size=random.integers(longest + 1))]


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_the_official_scorer(seed: int) -> None:
    random = np.random.default_rng(seed)
    references = [[sentence(random) for _ in range(random.integers(1, 6))] for _ in range(random.integers(2, 9))]
    captions = [sentence(random) for _ in references]
    reward = CiderD(references)
    found = [reward.score(image, caption) for image, caption in enumerate(captions)]
    assert found == pytest.approx(official(references, captions), abs=1e-9)
    assert max(found) > 0


def words(*captions: str) -> list[list[str]]:
    return [caption.split() for caption in captions]


REFERENCES = [words("a dog runs on the grass", "the dog"), words("a cat", "cat"), words("the the the the the", "")]


@pytest.mark.parametrize(
    "caption",
    ["", "cat", "dog", "the", "the the the the the the the", "a dog runs on the grass", "zebra", "a zebra a dog"],
)
def test_odd_captions_equal_the_official_scorer(caption: str) -> None:
    reward, captions = CiderD(REFERENCES), words(caption) * len(REFERENCES)
    found = [reward.score(image, tokens) for image, tokens in enumerate(captions)]
    assert found == pytest.approx(official(REFERENCES, captions), abs=1e-9)
    assert any(found) == (caption not in ("", "zebra"))


def test_a_reference_scores_ten_and_repeating_words_does_not_pay() -> None:
    reward = CiderD([words("a dog runs on grass"), words("two cats sleep")])
    reference, plain, repeating = words("a dog runs on grass", "a dog", "a dog dog dog dog")
    assert reward.score(0, reference) == pytest.approx(10)
    assert reward.score(1, reference) == 0
    assert reward.score(0, repeating) < reward.score(0, plain)


@pytest.mark.parametrize("seed", range(3))
def test_words_may_be_ids(seed: int) -> None:
    random = np.random.default_rng(seed)
    references = [[sentence(random) for _ in range(3)] for _ in range(5)]
    captions = [sentence(random) for _ in range(5)]

    def ids(words: Sequence[str]) -> list[int]:
        return [WORDS.index(word) for word in words]

    texts = CiderD(references)
    numbers = CiderD([[ids(reference) for reference in of_image] for of_image in references])
    for image in range(5):
        for caption in captions:
            assert numbers.score(image, ids(caption)) == texts.score(image, caption)


def test_without_references_there_is_no_reward() -> None:
    assert CiderD([[], [["dog"]]]).score(0, ["dog"]) == 0.0
