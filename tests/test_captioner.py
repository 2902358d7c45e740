"""The one door to the model: bytes in, captions out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raycap.errors import ConfigurationError, ImageError, ImageTooLargeError
from raycap.images import ImageLimits
from raycap.model.captioner import Caption, Captioner
from raycap.model.config import DecoderKind, DecodingConfig
from raycap.model.vocabulary import UNKNOWN
from tests.hostile import base_picture, encode, hostile_files
from tests.naive import naive_attention, naive_beam_search
from tests.small import ATTENDING, KINDS, lite0_bundle, small_bundle


def random_pixels(num_images: int, size_px: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse_BHWC = torch.randint(0, 256, (num_images, 2, 2, 3), dtype=torch.uint8, generator=generator)
    return coarse_BHWC.repeat_interleave(size_px // 2, 1).repeat_interleave(size_px // 2, 2)


def assert_same(found: list[Caption], expected: list[Caption]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.text == other.text
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-3)
        assert [alternative.text for alternative in one.alternatives] == [a.text for a in other.alternatives]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_alone_and_in_a_batch_of_64(kind: str) -> None:
    captioner = Captioner(small_bundle(kind), device="cpu")  # type: ignore[arg-type]
    pixels_BHWC = random_pixels(64)
    together = captioner.caption(pixels_BHWC)
    assert len({caption.text for caption in together}) >= 8, "the pictures must differ for the model"
    for index in range(0, 64, 7):
        assert_same(captioner.caption(pixels_BHWC[index : index + 1]), together[index : index + 1])


def test_the_real_architecture_alone_and_in_a_batch() -> None:
    captioner = Captioner(lite0_bundle(), device="cpu")
    pixels_BHWC = torch.cat([captioner.prepare(encode(base_picture(), "PNG"))[None], random_pixels(4, 64)])
    together = captioner.caption(pixels_BHWC)
    for index in range(5):
        assert_same(captioner.caption(pixels_BHWC[index : index + 1]), together[index : index + 1])


def test_captions_are_those_of_the_search() -> None:
    bundle = small_bundle()
    captioner = Captioner(bundle, device="cpu")
    pixels_BHWC = random_pixels(3)
    features_BPC = bundle.single.encoder(pixels_BHWC)
    for index, caption in enumerate(captioner.caption(pixels_BHWC)):
        best, *others = naive_beam_search(bundle.single.decoder, features_BPC[index : index + 1], bundle.decoding)
        assert caption.text == bundle.vocabulary.decode(best.tokens)
        assert caption.log_prob == pytest.approx(best.log_prob, abs=1e-4)
        assert [a.text for a in caption.alternatives] == [bundle.vocabulary.decode(h.tokens) for h in others]
        assert len({caption.text, *(a.text for a in caption.alternatives)}) == bundle.decoding.beam_size


def test_tensor_sequence_and_array_are_the_same() -> None:
    captioner = Captioner(small_bundle(), device="cpu")
    pixels_BHWC = random_pixels(5)
    expected = captioner.caption(pixels_BHWC)
    assert_same(captioner.caption(list(pixels_BHWC)), expected)
    array_BHWC = pixels_BHWC.numpy().copy()
    array_BHWC.flags.writeable = False  # as out of Ray's object store
    assert_same(captioner.caption_array(array_BHWC), expected)
    assert_same(captioner.caption_array(np.ascontiguousarray(array_BHWC[::-1])[::-1]), expected)


def test_nothing_gives_nothing() -> None:
    captioner = Captioner(small_bundle(), device="cpu")
    assert captioner.caption([]) == []
    assert captioner.caption(torch.empty(0, 16, 16, 3, dtype=torch.uint8)) == []
    assert captioner.caption_array(np.empty((0, 16, 16, 3), dtype=np.uint8)) == []


@pytest.mark.parametrize(
    ("pixels", "got"),
    [
        (torch.zeros(2, 16, 16, 3), r"torch\.float32 \[2, 16, 16, 3\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"torch\.uint8 \[2, 3, 16, 16\]"),
        (torch.zeros(16, 16, 3, dtype=torch.uint8), r"\[16, 16, 3\]"),
        (torch.zeros(2, 16, 15, 3, dtype=torch.uint8), r"\[2, 16, 15, 3\]"),
        ([torch.zeros(16, 16, 3, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)], r"\[8, 8, 3\]"),
        ([torch.zeros(16, 16, 3)], r"torch\.float32 \[16, 16, 3\]"),
    ],
)
def test_wrong_pixels_are_named(pixels: torch.Tensor | list[torch.Tensor], got: str) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 pixels \[B, 16, 16, 3\] .*got .*" + got):
        Captioner(small_bundle(), device="cpu").caption(pixels)


@pytest.mark.parametrize("kind", ATTENDING)
def test_attention_is_that_of_single_steps(kind: DecoderKind) -> None:
    bundle = small_bundle(kind)
    captioner = Captioner(bundle, device="cpu")
    pixels_BHWC = random_pixels(4)
    captions = ["w3 w1, w7.", "w0", "", "w2 unheard w2 w4"]
    ids = [[7, 5, 11], [4], [], [6, UNKNOWN, 6, 8]]
    found = captioner.attention(pixels_BHWC, captions)
    assert found is not None
    features_BPC = bundle.single.encoder(pixels_BHWC)
    for index, (weights_TRC, words) in enumerate(zip(found, ids, strict=True)):
        assert weights_TRC.dtype == np.float32
        expected_TP = naive_attention(bundle.single.decoder, features_BPC[index : index + 1], words)
        np.testing.assert_allclose(weights_TRC, np.reshape(expected_TP, (len(words) + 1, 2, 2)), atol=1e-5)
        np.testing.assert_allclose(weights_TRC.sum((1, 2)), 1, rtol=1e-5)
    assert np.ptp(found[0]) > 0.1, "the weights must differ"
    (alone,) = captioner.attention([pixels_BHWC[3]], captions[3:]) or []
    np.testing.assert_allclose(alone, found[3], atol=1e-5)


def test_attention_in_low_precision_sums_to_one() -> None:
    captioner = Captioner(small_bundle(), device="cpu", precision="bfloat16")
    (weights_TRC,) = captioner.attention(random_pixels(1), ["w1 w2 w3"]) or []
    assert weights_TRC.dtype == np.float32
    np.testing.assert_allclose(weights_TRC.sum((1, 2)), 1, rtol=1e-5)


def test_attention_where_there_is_none_and_of_nothing() -> None:
    captioner = Captioner(small_bundle("show_tell"), device="cpu")
    assert captioner.attention(random_pixels(2), ["w1", "w2 w3"]) is None
    assert Captioner(small_bundle(), device="cpu").attention([], []) == []


def test_attention_needs_a_caption_for_each_image() -> None:
    with pytest.raises(ValueError, match="one caption for each image, got 2 images, 1 captions"):
        Captioner(small_bundle(), device="cpu").attention(random_pixels(2), ["w1"])


@pytest.mark.parametrize("dtype", [np.float32, np.object_, np.int64])
def test_a_wrong_array_is_named(dtype: type) -> None:
    with pytest.raises(ValueError, match="expected uint8 pixels, got"):
        Captioner(small_bundle(), device="cpu").caption_array(np.zeros((1, 16, 16, 3), dtype=dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' is not available here: .*use --device cpu"),
        ({"device": ""}, "device '' is not available here"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here"),
        ({"device": "cpu", "precision": "float16"}, "float16 needs a GPU; on a CPU use --precision float32"),
        ({"device": "cpu", "precision": "int8"}, "precision must be auto, float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_a_device_or_precision_that_is_not_there(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Captioner(small_bundle(), **settings)  # type: ignore[arg-type]


def test_the_bundle_stays_as_it_is() -> None:
    bundle = small_bundle()
    bundle.network.train()
    captioner = Captioner(bundle, device="cpu", precision="bfloat16")
    assert captioner.dtype == torch.bfloat16
    assert captioner.caption(random_pixels(2))[0].text
    assert {parameter.dtype for parameter in bundle.network.parameters()} == {torch.float32}
    assert bundle.network.training


def test_prepare_raises_image_errors_alone() -> None:
    captioner = Captioner(small_bundle(), device="cpu", limits=ImageLimits(max_bytes=2**20))
    for name, (data, code) in hostile_files().items():
        if code == "ok":
            assert captioner.prepare(data).shape == (16, 16, 3), name
        else:
            with pytest.raises(ImageError):
                captioner.prepare(data)
    with pytest.raises(ImageTooLargeError):
        captioner.prepare(bytes(2**20 + 1))


def test_overrides_change_the_search(tmp_path_factory: pytest.TempPathFactory) -> None:
    location = str(tmp_path_factory.mktemp("bundle"))
    model_id = lite0_bundle().save(location)
    captioner = Captioner.load(location, device="cpu", beam_size=5, max_length=2, length_penalty=None)
    assert captioner.decoding == DecodingConfig(beam_size=5, max_length=2)
    assert captioner.model_id == model_id
    (caption,) = captioner.caption(random_pixels(1, 64))
    assert len(caption.alternatives) == 4
    assert all(len(text.split()) <= 2 for text in [caption.text, *(a.text for a in caption.alternatives)])
