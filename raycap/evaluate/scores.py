"""`score_captions`: the caption metrics of the literature, by their official scorers.

BLEU-1..4 (Papineni et al. 2002), METEOR (Denkowski and Lavie 2014), ROUGE-L (Lin 2004) and CIDEr-D (Vedantam et al.
2015) come from `pycocoevalcap`, scorer by scorer: its `COCOEvalCap` would download SPICE first. Scores are in their
natural scale here (BLEU, METEOR and ROUGE-L from 0 to 1, CIDEr-D from 0 to 10); tables print them times 100, as papers.

CIDEr-D weighs words by how many of the *scored images* have them in their references: scores of different sets of
images, or of a subset and the whole, do not compare. Of one image alone it is always 0.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raycap.errors import ConfigurationError
from raycap.evaluate.java import NO_JAVA, find_java
from raycap.evaluate.meteor import meteor
from raycap.evaluate.tokenizers import ptb_tokenize, python_tokenize

__all__ = ["ALL_METRICS", "Scores", "check_scorers", "score_captions"]

logger = logging.getLogger(__name__)

ALL_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d")

_BLEU = ALL_METRICS[:4]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of one caption for each image."""

    values: dict[str, float]
    """Of the whole set, by metric, natural scale. BLEU and METEOR are not the means of their images. A metric that
    could not be computed is absent: `values.get("meteor")` is None without Java."""
    per_image: dict[int, dict[str, float]]
    """By image id, then by metric, in the order of the references."""
    tokenizer: Literal["ptb", "python"]
    """What split the captions. Published scores are of "ptb"."""
    num_images: int
    unavailable: tuple[str, ...] = ()
    """Metrics that were asked for and could not be computed, for want of Java."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the scores of the set (null: unavailable) and how they were made. No single images."""
        values = {
            name: self.values.get(name) for name in ALL_METRICS if name in self.values or name in self.unavailable
        }
        return {"scores": values, "tokenizer": self.tokenizer, "num_images": self.num_images}


def score_captions(
    references: Mapping[int, Sequence[str]],
    candidates: Mapping[int, str],
    *,
    tokenizer: Literal["auto", "ptb", "python"] = "auto",
    metrics: Sequence[str] = ALL_METRICS,
) -> Scores:
    """Score one caption for each image against its references. Captions are raw text.

    An empty candidate is legal and scores 0 (but for ROUGE-L where a reference has no words either).

    `tokenizer` "auto" is "ptb" where Java is and "python" elsewhere; references and candidates go through the same one.
    METEOR needs Java whatever the tokenizer, and is left out with a warning where there is none. Only what `metrics`
    names is computed, and Java runs for nothing else: `metrics=("cider_d",), tokenizer="python"` starts no process.

    Raises:
        ConfigurationError: the ids differ, an image has no reference, a name is unknown, "ptb" is asked for without
            Java, the Java that is there fails, or pycocoevalcap is not installed.
    """
    _check(references, candidates, tokenizer, metrics)
    if tokenizer == "auto":
        tokenizer = "ptb" if find_java() is not None else "python"
    words, candidate_words = _tokenize(references, candidates, tokenizer)
    if not any(reference for image in words.values() for reference in image):
        raise ConfigurationError(f"none of the references of {len(references)} images holds a word; expected captions")

    unavailable: tuple[str, ...] = ()
    if "meteor" in metrics and find_java() is None:
        logger.warning("METEOR is left out: %s", NO_JAVA)
        unavailable = ("meteor",)
    values, columns = _run_scorers(words, candidate_words, set(metrics) - set(unavailable))
    names = [name for name in ALL_METRICS if name in metrics and name in values]
    per_image: dict[int, dict[str, float]] = {image_id: {} for image_id in words}
    for name in names:
        for image_id, value in zip(per_image, columns[name], strict=True):
            per_image[image_id][name] = float(value)
    return Scores(
        values={name: float(values[name]) for name in names},
        per_image=per_image,
        tokenizer=tokenizer,
        num_images=len(per_image),
        unavailable=unavailable,
    )


def _run_scorers(
    words: dict[int, list[str]], candidate_words: dict[int, list[str]], metrics: set[str]
) -> tuple[dict[str, float], dict[str, Iterable[float]]]:
    """Score of the whole set and of each image, by metric: those asked for, and with one BLEU the others."""
    values: dict[str, float] = {}
    columns: dict[str, Iterable[float]] = {}
    if not metrics.isdisjoint(_BLEU):
        from pycocoevalcap.bleu.bleu import Bleu

        corpus, images = Bleu(len(_BLEU)).compute_score(words, candidate_words, verbose=0)  # 0: it would print
        values.update(zip(_BLEU, corpus, strict=True))
        columns.update(zip(_BLEU, images, strict=True))
    if "meteor" in metrics:
        values["meteor"], columns["meteor"] = meteor(list(words.values()), [c for (c,) in candidate_words.values()])
    if "rouge_l" in metrics:
        from pycocoevalcap.rouge.rouge import Rouge

        values["rouge_l"], columns["rouge_l"] = Rouge().compute_score(words, candidate_words)
    if "cider_d" in metrics:
        from pycocoevalcap.cider.cider import Cider

        if len(words) == 1:
            logger.warning("CIDEr-D of one image alone is always 0: its word weights come from the other images")
        values["cider_d"], columns["cider_d"] = Cider().compute_score(words, candidate_words)
    return values, columns


def _tokenize(
    references: Mapping[int, Sequence[str]], candidates: Mapping[int, str], tokenizer: Literal["ptb", "python"]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Words of references and candidates, keys in the order of the references: what pycocoevalcap's scorers take."""
    captions = [caption for image in references.values() for caption in image]
    captions += [candidates[image_id] for image_id in references]
    tokenized = iter(ptb_tokenize(captions) if tokenizer == "ptb" else python_tokenize(captions))
    words = {image_id: [next(tokenized) for _ in image] for image_id, image in references.items()}
    return words, {image_id: [next(tokenized)] for image_id in references}


def check_scorers(tokenizer: str) -> None:
    """Raise ConfigurationError if the scorers, or what this tokenizer needs, are not there."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ConfigurationError("scoring needs the package pycocoevalcap; pip install 'raycap[eval]'")
    if tokenizer not in ("auto", "ptb", "python"):
        raise ConfigurationError(f"unknown tokenizer {tokenizer!r}; expected auto, ptb or python")
    if tokenizer == "ptb" and find_java() is None:
        raise ConfigurationError(f"the PTB tokenizer needs Java and {NO_JAVA}, or use tokenizer='python'")


def _check(
    references: Mapping[int, Sequence[str]], candidates: Mapping[int, str], tokenizer: str, metrics: Sequence[str]
) -> None:
    check_scorers(tokenizer)
    unknown = [name for name in metrics if name not in ALL_METRICS]
    if unknown or not metrics or isinstance(metrics, str):
        got = repr(metrics) if isinstance(metrics, str) else ", ".join(map(repr, unknown or metrics)) or "none"
        raise ConfigurationError(f"expected metrics out of {', '.join(ALL_METRICS)}; got {got}")
    if not references:
        raise ConfigurationError("there is nothing to score: expected references of at least one image, got none")
    bare = [image_id for image_id, image in references.items() if not image or isinstance(image, str)]
    if bare:
        raise ConfigurationError(f"expected a list of references for each image; none for {_some(bare)}")
    missing = [image_id for image_id in references if image_id not in candidates]
    if missing:
        raise ConfigurationError(
            f"expected a caption for each of {len(references)} images; none for {_some(missing)}; "
            "caption them, or score only the images that have one"
        )
    extra = [image_id for image_id in candidates if image_id not in references]
    if extra:
        raise ConfigurationError(
            f"captions of images that have no references: {_some(extra)}; "
            "do results and annotations come from the same split?"
        )


def _some(image_ids: Sequence[int]) -> str:
    """ "image ids 1, 2, 3 and 97 more"."""
    shown = ", ".join(map(str, image_ids[:5]))
    return f"image ids {shown} and {len(image_ids) - 5} more" if len(image_ids) > 5 else f"image ids {shown}"
