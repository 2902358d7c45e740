"""Several bundles made one that captions as their ensemble."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence

from raycap.ensemble.config import EnsembleConfig
from raycap.errors import ConfigurationError
from raycap.model.bundle import Bundle
from raycap.model.config import DecodingConfig
from raycap.model.ensemble import EnsembleNetwork

log = logging.getLogger(__name__)

_CARD = """\
# {name}

An ensemble of {num_members} image captioners, made by raycap: in each step of the beam search it takes the mean of
their words' probabilities.

## Use

    raycap caption DIRECTORY OUTPUT --model BUNDLE

## Members

{members}

The scores, times 100, are those of each member alone, on the split that its card names. `raycap evaluate` gives those
of the ensemble. The cards of the members follow; their notices and limits hold for the ensemble too.

{cards}
"""


def make_ensemble(config: EnsembleConfig) -> str:
    """Join the bundles of `config.models` and write the result; return its model id.

    Raises BundleError if one cannot be read, ConfigurationError if they do not fit together.
    """
    bundles = [Bundle.load(location, s3=config.s3) for location in config.models]
    name = config.output.rstrip("/").rsplit("/", 1)[-1]
    joined = ensemble(bundles, name=name, decoding=bundles[0].decoding.updated(**config.decoding_overrides))
    model_id = joined.save(config.output, s3=config.s3, weights_dtype=config.weights_dtype)
    log.info("wrote bundle %s to %s", model_id, config.output)
    return model_id


def ensemble(bundles: Sequence[Bundle], *, name: str = "ensemble", decoding: DecodingConfig | None = None) -> Bundle:
    """One bundle that captions as all these together, with the decoding of the first unless told.

    Its networks are theirs, not copies. Its metrics hold theirs, its card their cards under the title `name`. Raises
    ConfigurationError if one is an ensemble itself, or if they differ in vocabulary or preprocessing.
    """
    first = bundles[0]
    for number, bundle in enumerate(bundles[1:], 2):
        difference = _difference(first, bundle)
        if difference:
            raise ConfigurationError(
                f"the members of an ensemble must share vocabulary and preprocessing, but model {number} "
                f"({bundle.model_id}) differs from model 1 ({first.model_id}): {difference}"
            )
    return Bundle(
        network=EnsembleNetwork.of([bundle.single for bundle in bundles]).eval(),
        vocabulary=first.vocabulary,
        preprocessing=first.preprocessing,
        decoding=decoding or first.decoding,
        metrics={"members": [{"model_id": bundle.model_id, **bundle.metrics} for bundle in bundles]},
        card=_card(name, bundles),
    )


def _difference(first: Bundle, other: Bundle) -> str:
    """What keeps the two from being members of one ensemble, and what to do; empty if nothing does."""
    for field in dataclasses.fields(first.preprocessing):
        here, there = (getattr(bundle.preprocessing, field.name) for bundle in (other, first))
        if here != there:
            return f"{field.name} is {here!r} here and {there!r} there; train both with the same --size-px and --resize"
    words, first_words = other.vocabulary.words, first.vocabulary.words
    if words == first_words:
        return ""
    remedy = "train both on the same captions with the same --min-count"
    if len(words) != len(first_words):
        return f"it has {len(words):,} words, the other {len(first_words):,}; {remedy}"
    id_ = next(id_ for id_, (here, there) in enumerate(zip(words, first_words, strict=True)) if here != there)
    return f"word {id_} is {words[id_]!r} here and {first_words[id_]!r} there; {remedy}"


def _card(name: str, bundles: Sequence[Bundle]) -> str:
    members = []
    for bundle in bundles:
        scores = bundle.metrics.get("scores", {})
        listed = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in scores.items()) or "no scores"
        members.append(f"- {bundle.model_id}: {listed}")
    cards = [re.sub(r"^#", "###", bundle.card, flags=re.MULTILINE).strip() for bundle in bundles]
    return _CARD.format(name=name, num_members=len(bundles), members="\n".join(members), cards="\n\n".join(cards))
