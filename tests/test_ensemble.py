"""Ensembles: several bundles that caption as one, and are one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raycap.ensemble.config import EnsembleConfig
from raycap.ensemble.run import ensemble, make_ensemble
from raycap.errors import BundleError, ConfigurationError
from raycap.images import Preprocessing
from raycap.model.beam import Hypothesis
from raycap.model.bundle import CONFIG, WEIGHTS, Bundle
from raycap.model.captioner import Captioner
from raycap.model.config import DecoderKind, DecodingConfig
from raycap.model.ensemble import EnsembleNetwork
from raycap.model.network import CaptionNetwork
from raycap.model.sampling import sample
from raycap.model.vocabulary import SPECIAL_TOKENS, Vocabulary
from tests.naive import naive_ensemble_search
from tests.small import KINDS, lite0_bundle, small_bundle, small_decoder, small_encoder, small_vocabulary

MIXTURES: list[tuple[DecoderKind, ...]] = [*((kind, kind) for kind in KINDS), KINDS]


def network(kind: DecoderKind, *, decoder_seed: int, encoder_seed: int, side: int = 2) -> CaptionNetwork:
    return CaptionNetwork(small_encoder(seed=encoder_seed, side=side), small_decoder(kind, seed=decoder_seed))


def pixels(num_images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse_BHWC = torch.randint(0, 256, (num_images, 2, 2, 3), dtype=torch.uint8, generator=generator)
    return coarse_BHWC.repeat_interleave(8, 1).repeat_interleave(8, 2)


def assert_same(found: Sequence[Hypothesis], expected: Sequence[Hypothesis]) -> None:
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    torch.testing.assert_close([h.log_prob for h in found], [h.log_prob for h in expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", MIXTURES, ids="-".join)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_equals_the_naive_search(kinds: tuple[DecoderKind, ...], beam_size: int) -> None:
    """Encoders are shared by the first two members, and of another grid for the last of three."""
    config = DecodingConfig(beam_size=beam_size, max_length=6)
    images_BHWC = pixels(5)
    for seed in range(6):
        networks = [
            network(kind, decoder_seed=10 * seed + n, encoder_seed=n // 2, side=2 + n // 2)
            for n, kind in enumerate(kinds)
        ]
        found = EnsembleNetwork.of(networks).search(images_BHWC, config)
        for image, hypotheses in enumerate(found):
            features = [each.encoder(images_BHWC[image : image + 1]) for each in networks]
            assert_same(hypotheses, naive_ensemble_search([each.decoder for each in networks], features, config))


def test_an_image_alone_gives_what_it_gives_in_a_batch() -> None:
    joined = EnsembleNetwork.of([network(kind, decoder_seed=n, encoder_seed=n) for n, kind in enumerate(KINDS)])
    config, images_BHWC = DecodingConfig(max_length=10), pixels(17)
    together = joined.search(images_BHWC, config)
    assert len({len(of_image[0].tokens) for of_image in together}) > 1, "the images must end at different times"
    for image in range(17):
        assert_same(together[image], joined.search(images_BHWC[image : image + 1], config)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_twice_is_that_model(kind: DecoderKind) -> None:
    single = network(kind, decoder_seed=1, encoder_seed=0)
    twice = EnsembleNetwork.of([single, single])
    for hypotheses, expected in zip(
        twice.search(pixels(6), DecodingConfig()), single.search(pixels(6), DecodingConfig()), strict=True
    ):
        assert_same(hypotheses, expected)


def test_equal_encoders_see_an_image_once() -> None:
    networks = [
        network("att2in", decoder_seed=0, encoder_seed=0),
        network("show_tell", decoder_seed=1, encoder_seed=1),
        network("att2in", decoder_seed=2, encoder_seed=0),
    ]
    joined = EnsembleNetwork.of(networks)
    assert joined.encoder_of == (0, 1, 0)
    seen = []
    for encoder in joined.encoders:
        encoder.register_forward_hook(lambda module, args, output: seen.append(module))
    joined.search(pixels(2), DecodingConfig())
    assert seen == list(joined.encoders) == [networks[0].encoder, networks[1].encoder]


def test_an_encoder_with_another_normalisation_is_another() -> None:
    one, other = (network("show_tell", decoder_seed=0, encoder_seed=0) for _ in range(2))
    other.encoder.config = replace(other.encoder.config, mean=(1.0, 2.0, 3.0))
    assert EnsembleNetwork.of([one, other]).encoder_of == (0, 1)


def test_samples_follow_the_mean_of_the_probabilities() -> None:
    """Nearly all of the probability on one word for one member, on another for the other."""
    networks = [network(kind, decoder_seed=0, encoder_seed=0) for kind in ("attention", "show_tell")]
    with torch.no_grad():
        for word, each in zip((5, 9), networks, strict=True):
            each.decoder.output_bias[word] += 1000.0
    joined = EnsembleNetwork.of(networks)
    features_BPC = networks[0].encoder(pixels(2))
    tokens_RT, _ = sample(
        joined.decoder,
        (features_BPC, features_BPC),
        num_samples=1000,
        max_length=1,
        generator=torch.Generator().manual_seed(0),
    )
    for image in (0, 1):
        words_S = tokens_RT[1000 * image : 1000 * (image + 1), 0]
        assert set(words_S.tolist()) == {5, 9}
        assert 420 < int((words_S == 5).sum()) < 580  # 5 standard deviations


def test_attention_is_the_mean_of_the_members_that_attend() -> None:
    networks = [network(kind, decoder_seed=n, encoder_seed=0) for n, kind in enumerate(KINDS)]
    captions = [[4, 5, 6], []]
    found = EnsembleNetwork.of(networks).attend(pixels(2), captions)
    of_members = [each.attend(pixels(2), captions) for each in networks]
    one, other = (each for each in of_members if each is not None)
    assert found is not None
    for weights_TRC, one_TRC, other_TRC in zip(found, one, other, strict=True):
        torch.testing.assert_close(weights_TRC, (one_TRC + other_TRC) / 2)
    assert [weights_TRC.shape for weights_TRC in found] == [(4, 2, 2), (1, 2, 2)]


def test_attention_over_different_grids_and_over_none() -> None:
    fine, coarse = (network("att2in", decoder_seed=side, encoder_seed=side, side=side) for side in (4, 2))
    (weights_TRC,) = EnsembleNetwork.of([coarse, fine]).attend(pixels(1), [[4, 5]]) or []
    assert weights_TRC.shape == (3, 4, 4)
    torch.testing.assert_close(weights_TRC.sum((1, 2)), torch.ones(3))
    blind = network("show_tell", decoder_seed=0, encoder_seed=0)
    assert EnsembleNetwork.of([blind, blind]).attend(pixels(1), [[4]]) is None


def members() -> list[Bundle]:
    """Three with the shipped architecture; the first two share their encoder."""
    kinds_and_seeds: list[tuple[DecoderKind, int]] = [("attention", 0), ("show_tell", 0), ("att2in", 1)]
    bundles = [
        replace(lite0_bundle(kind, seed=seed), model_id=f"{kind}-{seed}", card=f"# {kind}\n\n## Data\n\nMine.\n")
        for kind, seed in kinds_and_seeds
    ]
    for bundle in bundles:
        with torch.no_grad():
            bundle.single.decoder.embedding.weight.mul_(40)  # random weights as they are find every word as likely
    return bundles


def test_a_saved_ensemble_is_the_same_after_loading(tmp_path: Path) -> None:
    original = replace(ensemble(members()), decoding=DecodingConfig(beam_size=2, max_length=5))
    model_id = original.save(str(tmp_path))
    loaded = Bundle.load(str(tmp_path))
    assert isinstance(loaded.network, EnsembleNetwork)
    assert isinstance(original.network, EnsembleNetwork)
    assert loaded.network.encoder_of == original.network.encoder_of == (0, 0, 1)
    assert loaded.model_id == model_id
    assert re.fullmatch(r"ensemble-of-3-[0-9a-f]{12}", model_id)
    state, expected = loaded.network.state_dict(), original.network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert (loaded.metrics, loaded.card, loaded.decoding) == (original.metrics, original.card, original.decoding)
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    images_BHWC = pixels(2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert Captioner(loaded, device="cpu").caption(images_BHWC) == Captioner(original, device="cpu").caption(
        images_BHWC
    )
    loaded.save(str(tmp_path / "again"))
    for file in (tmp_path / "again").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_shared_encoder_is_stored_once(tmp_path: Path) -> None:
    first, second, third = members()
    sizes = []
    for name, bundles in {"one": [first], "shared": [first, second], "two": [first, third]}.items():
        ensemble(bundles).save(str(tmp_path / name))
        sizes.append((tmp_path / name / WEIGHTS).stat().st_size)
    one, shared, two = sizes
    assert shared < 1.02 * one
    assert two > 1.9 * one


def test_metrics_and_card_name_the_members() -> None:
    joined = ensemble(members(), name="three")
    assert joined.metrics == {
        "members": [
            {"model_id": model_id, "scores": {"cider_d": 0.5}}
            for model_id in ("attention-0", "show_tell-0", "att2in-1")
        ]
    }
    assert joined.card.startswith("# three\n\nAn ensemble of 3 image captioners")
    for line in ("- attention-0: cider_d 50.0", "- att2in-1: cider_d 50.0", "### show_tell", "#### Data", "Mine."):
        assert line in joined.card.splitlines(), line


def test_the_captioner_attends_in_low_precision() -> None:
    bundles = [replace(small_bundle(kind), vocabulary=small_vocabulary()) for kind in KINDS]
    captioner = Captioner(ensemble(bundles), device="cpu", precision="bfloat16")
    (caption,) = captioner.caption(pixels(1))
    (weights_TRC,) = captioner.attention(pixels(1), [caption.text]) or []
    assert weights_TRC.shape == (len(caption.text.split()) + 1, 2, 2)
    np.testing.assert_allclose(weights_TRC.sum((1, 2)), 1, rtol=1e-5)


OTHER_WORDS = Vocabulary([*SPECIAL_TOKENS, *(f"w{n}" for n in range(7)), "dog"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessing": Preprocessing(size_px=32)}, "size_px is 32 here and 16 there; train both with the same"),
        ({"preprocessing": Preprocessing(size_px=16, resize="crop")}, "resize is 'crop' here and 'squash' there"),
        ({"vocabulary": OTHER_WORDS}, "word 11 is 'dog' here and 'w7' there; train both on the same captions"),
        ({"vocabulary": small_vocabulary(9)}, "it has 13 words, the other 12; train both on the same captions"),
    ],
)
def test_members_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    first = small_bundle()
    with pytest.raises(ConfigurationError, match=r"model 3 \(other\) differs from model 1 \(small\): " + message):
        ensemble([first, first, replace(first, model_id="other", **changes)])


def test_an_ensemble_is_no_single_model() -> None:
    joined = replace(ensemble([small_bundle(), small_bundle()]), model_id="both")
    with pytest.raises(ConfigurationError, match="bundle both is an ensemble; expected a single model"):
        ensemble([joined, small_bundle()])


def test_make_ensemble(tmp_path: Path) -> None:
    models = tuple(str(tmp_path / name) for name in "abc")
    saved = [bundle.save(path) for bundle, path in zip(members(), models, strict=True)]
    output = str(tmp_path / "both")
    model_id = make_ensemble(EnsembleConfig(output=output, models=models, beam_size=7, weights_dtype="float16"))
    loaded = Bundle.load(output)
    assert loaded.model_id == model_id
    assert loaded.decoding == DecodingConfig(max_length=6, beam_size=7)
    assert [member["model_id"] for member in loaded.metrics["members"]] == saved
    assert loaded.card.startswith("# both\n")
    assert (tmp_path / "both" / WEIGHTS).stat().st_size < 1.2 * (tmp_path / "a" / WEIGHTS).stat().st_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ("a",)}, "--models must name at least two bundles, got 1"),
        ({"output": ""}, "OUTPUT must name a directory"),
        ({"beam_size": 0}, "beam_size must be from 1 to 64"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EnsembleConfig(**({"output": "c", "models": ("a", "b")} | settings))


CONFIG_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no-members": (lambda c: c.pop("members"), "section 'members' is missing"),
    "no-encoders": (lambda c: c.update(encoders=[]), "section 'encoders' is missing"),
    "encoder-text": (lambda c: c.update(encoders=["lite"]), "section 'encoders' is missing"),
    "member-text": (lambda c: c.update(members=["show_tell"]), "expected the index of one of 2 encoders"),
    "no-such-encoder": (lambda c: c["members"][1].update(encoder=2), "expected the index of one of 2 encoders"),
    "negative-encoder": (lambda c: c["members"][1].update(encoder=-1), "expected the index of one of 2 encoders"),
    "true-encoder": (lambda c: c["members"][1].update(encoder=True), "expected the index of one of 2 encoders"),
    "no-decoder": (lambda c: c["members"][1].pop("decoder"), "section 'decoder' is missing"),
    "one-member-less": (lambda c: c["members"].pop(), r"unexpected tensor decoder\.members\.2"),
    "vocabulary-size": (
        lambda c: c["members"][2]["decoder"].update(vocabulary_size=13),
        r"vocabulary\.json has 12 words, but config\.json says vocabulary_size 13",
    ),
    "feature-size": (
        lambda c: c["members"][2]["decoder"].update(feature_size=640),
        "the encoder gives 1280 channels, but the decoder expects feature_size 640",
    ),
    "huge": (lambda c: c["members"][0]["decoder"].update(hidden_size=2**50), "the network cannot be built"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ensemble")
    ensemble(members()).save(str(path))
    return path


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_wrong_config_is_named(damage: str, saved: Path, tmp_path: Path) -> None:
    change, message = CONFIG_DAMAGE[damage]
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((saved / CONFIG).read_text())
    change(config)
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(BundleError, match=message):
        Bundle.load(str(tmp_path))
