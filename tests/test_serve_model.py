"""Requests with options of their own, in one batch, get what each would get alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from raycap.images import Preprocessing
from raycap.model.captioner import Captioner
from raycap.model.config import DecodingConfig
from raycap.model.ensemble import EnsembleNetwork
from raycap.model.network import CaptionNetwork
from raycap.serve.backend import ModelChangedError, Result
from raycap.serve.model import OnlineCaptioner, ServedModel
from raycap.serve.schemas import Options
from tests.naive import naive_log_prob
from tests.serving import GatedCaptioner, picture, small_captioner, until
from tests.small import small_bundle, small_decoder, small_encoder

MIXED = [
    Options(),
    Options(beam_size=1),
    Options(beam_size=5, alternatives=1),
    Options(alternatives=0, length_penalty=0.0),
    Options(max_length=2),
    Options(temperature=1.5, seed=3, alternatives=4),
    Options(top_p=0.9, seed=4),
    Options(attention=True),
]


def pixels_of(captioner: Captioner, num_images: int) -> torch.Tensor:
    return torch.stack([captioner.prepare(picture(number)) for number in range(num_images)])


def caption(model: ServedModel, pixels_BHWC: torch.Tensor, options: Options) -> list[Result]:
    async def main() -> list[Result]:
        found = await model.caption(pixels_BHWC.numpy(), (await model.info()).preprocessing, options)
        await model.close()
        return found

    return asyncio.run(main())


def served(captioner: OnlineCaptioner, batch_size: int = 8) -> ServedModel:
    return ServedModel(captioner, batch_size=batch_size)


def test_says_what_a_captioner_says() -> None:
    captioner = small_captioner()
    pixels_BHWC = pixels_of(captioner, 5)
    plain = Captioner(small_bundle(), device="cpu").caption(pixels_BHWC)
    found = caption(served(captioner, batch_size=2), pixels_BHWC, Options())
    assert [each.captions[0][0] for each in found] == [each.text for each in plain]
    assert [[text for text, _ in each.captions[1:]] for each in found] == [
        [other.text for other in each.alternatives] for each in plain
    ]
    np.testing.assert_allclose([each.captions[0][1] for each in found], [each.log_prob for each in plain], atol=1e-4)
    assert {each.model_id for each in found} == {"small"}


def test_options_change_the_search() -> None:
    captioner = small_captioner()
    pixels_BHWC = pixels_of(captioner, 2)
    wanted = Captioner(
        small_bundle(), device="cpu", decoding=DecodingConfig(beam_size=5, max_length=3, length_penalty=0.0)
    ).caption(pixels_BHWC)
    found = captioner.caption_with(pixels_BHWC, Options(beam_size=5, max_length=3, length_penalty=0.0))
    assert [[text for text, _ in each] for each in found] == [
        [each.text, *(other.text for other in each.alternatives)] for each in wanted
    ]
    (fewer, _) = captioner.caption_with(pixels_BHWC, Options(beam_size=5, alternatives=1))
    assert len(fewer) == 2
    assert captioner.decoding == small_bundle().decoding, "its own settings stay"


def test_options_that_differ_do_not_disturb_each_other_in_a_batch() -> None:
    async def main() -> tuple[list[Result], list[Result]]:
        model = served(gated, batch_size=len(MIXED) + 1)
        preprocessing = gated.preprocessing
        first = asyncio.create_task(model.caption(pixels_BHWC, preprocessing, MIXED[0]))
        await until(lambda: gated.batch_sizes == [1], "the first batch")
        tasks = [asyncio.create_task(model.caption(pixels_BHWC, preprocessing, options)) for options in MIXED]
        await asyncio.sleep(0)
        gated.gate.set()
        together = [(await task)[0] for task in tasks]
        alone = [(await model.caption(pixels_BHWC, preprocessing, options))[0] for options in MIXED]
        await first
        await model.close()
        return together, alone

    gated = GatedCaptioner()
    pixels_BHWC = pixels_of(gated, 1).numpy()
    together, alone = asyncio.run(main())
    assert {each.batch_size for each in together} == {len(MIXED)}
    assert {each.batch_size for each in alone} == {1}
    for one, other in zip(together, alone, strict=True):
        assert [text for text, _ in one.captions] == [text for text, _ in other.captions]
        np.testing.assert_allclose([lp for _, lp in one.captions], [lp for _, lp in other.captions], atol=1e-4)
    assert len(together[2].captions) == 2
    assert len(together[3].captions) == 1


def test_attention_is_of_the_words_of_the_caption() -> None:
    captioner = small_captioner()
    (found,) = caption(served(captioner), pixels_of(captioner, 1), Options(attention=True))
    text, _ = found.captions[0]
    assert found.attention_TRC is not None
    assert found.attention_TRC.shape == (len(text.split()), 2, 2)
    np.testing.assert_allclose(found.attention_TRC.sum((1, 2)), 1, atol=1e-5)


def test_a_model_without_attention_has_none_to_show() -> None:
    captioner = OnlineCaptioner(small_bundle("show_tell"), device="cpu")
    (found,) = caption(served(captioner), pixels_of(captioner, 1), Options(attention=True))
    assert found.attention_TRC is None


def test_the_same_seed_draws_the_same() -> None:
    captioner = small_captioner()
    pixels_BHWC = pixels_of(captioner, 4)
    options = Options(temperature=2.0, alternatives=7, seed=1)
    together = captioner.caption_with(pixels_BHWC, options)
    (alone,) = captioner.caption_with(pixels_BHWC[2:3], options)
    assert dict(alone) == pytest.approx(dict(together[2]))
    assert captioner.caption_with(pixels_BHWC, Options(temperature=2.0, alternatives=7, seed=2)) != together
    unseeded = Options(temperature=2.0, alternatives=7)
    assert captioner.caption_with(pixels_BHWC, unseeded) != captioner.caption_with(pixels_BHWC, unseeded)
    for texts in together:
        assert len({text for text, _ in texts}) == len(texts)


def ensemble_captioner() -> OnlineCaptioner:
    bundle = small_bundle()
    networks = [CaptionNetwork(small_encoder(), small_decoder(seed=seed)) for seed in (0, 1)]
    return OnlineCaptioner(replace(bundle, network=EnsembleNetwork.of(networks)), device="cpu")


def test_the_log_probability_of_a_draw_is_the_models_own() -> None:
    captioner, bundle = small_captioner(), small_bundle()
    pixels_BHWC = pixels_of(captioner, 1)
    features_BPC = bundle.single.encoder(pixels_BHWC)
    (drawn,) = captioner.caption_with(pixels_BHWC, Options(temperature=0.5, top_p=0.8, alternatives=5, seed=0))
    for text, log_prob in drawn:
        words = bundle.vocabulary.encode(text)[1:-1]
        assert log_prob == pytest.approx(naive_log_prob(bundle.single.decoder, features_BPC, words), abs=1e-3)


def test_an_ensemble_draws_what_it_would_find() -> None:
    captioner = ensemble_captioner()
    pixels_BHWC = pixels_of(captioner, 1)
    (drawn,) = captioner.caption_with(pixels_BHWC, Options(temperature=0.3, alternatives=15, seed=0))
    (searched,) = captioner.caption_with(pixels_BHWC, Options(beam_size=16))
    both = dict(drawn).keys() & dict(searched).keys()
    assert both
    assert {text: dict(drawn)[text] for text in both} == pytest.approx(
        {text: dict(searched)[text] for text in both}, abs=1e-3
    )


def test_pixels_of_another_preprocessing_are_refused() -> None:
    async def main() -> None:
        model = served(small_captioner())
        with pytest.raises(ModelChangedError):
            await model.caption(np.zeros((1, 16, 16, 3), np.uint8), Preprocessing(size_px=16, resize="crop"), Options())
        await model.close()

    asyncio.run(main())


def test_a_batch_that_nobody_waits_for_keeps_the_model_busy_to_its_end() -> None:
    async def main() -> None:
        model = served(gated)
        preprocessing = gated.preprocessing
        gone = asyncio.create_task(model.caption(pixels_BHWC, preprocessing, Options()))
        await until(lambda: gated.batch_sizes == [1], "the first batch")
        gone.cancel()
        await asyncio.wait([gone])
        asked = asyncio.create_task(model.caption(pixels_BHWC, preprocessing, Options()))
        for _ in range(10):
            await asyncio.sleep(0)
        assert model.is_suspect(0.0), "it runs still"
        gated.gate.set()
        (result,) = await asked
        assert result.queue_s > 0
        assert gated.batch_sizes == [1, 1]
        await model.close()

    gated = GatedCaptioner()
    pixels_BHWC = pixels_of(gated, 1).numpy()
    asyncio.run(main())
