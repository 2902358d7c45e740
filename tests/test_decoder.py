"""Decoders: whole captions at once give what step by step gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from raycap.errors import ConfigurationError
from raycap.model.config import DecoderConfig, DecoderKind
from raycap.model.decoder import Att2inDecoder, AttentionDecoder, ShowTellDecoder, build_decoder
from raycap.model.vocabulary import BOS, EOS, PAD
from tests.naive import naive_logits, naive_loss_sum
from tests.small import ATTENDING, KINDS, small_decoder, small_features

# Of three images; the longest first. Lengths fall quickly, so that the batch narrows, and slowly, so that it stays.
CAPTIONS = [
    (1, [4, 5, 6, 7, 8, 9, 10, 11]),
    (0, [5, 5, 6, 4, 11, 3, 7]),
    (1, [6, 4, 7, 8]),
    (2, [7, 9, 4, 4]),
    (0, [8, 8, 4]),
    (0, [9]),
    (2, []),
]


def batch(captions: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = [[BOS, *words, EOS] for _, words in captions]
    longest = max(map(len, rows))
    tokens_NT = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    return torch.tensor([image for image, _ in captions]), tokens_NT, torch.tensor([len(row) for row in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[:1], CAPTIONS[2:4], CAPTIONS[6:]], ids=len)
def test_forward_equals_single_steps(kind: DecoderKind, captions: list[tuple[int, list[int]]]) -> None:
    decoder, features_BPC = small_decoder(kind), small_features(3)
    logits_MV, targets_M = decoder(features_BPC, *batch(captions))
    alone = [naive_logits(decoder, features_BPC[image : image + 1], [BOS, *words, EOS]) for image, words in captions]
    in_order_of_time = [
        (logits[t], [*words, EOS][t])
        for t in range(len(alone[0]))
        for logits, (_, words) in zip(alone, captions, strict=True)
        if t < len(logits)
    ]
    torch.testing.assert_close(logits_MV, torch.stack([logits for logits, _ in in_order_of_time]), rtol=1e-4, atol=1e-4)
    assert targets_M.tolist() == [target for _, target in in_order_of_time]
    assert len(targets_M) == sum(len(words) + 1 for _, words in captions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_equals_the_naive_one(kind: DecoderKind, label_smoothing: float) -> None:
    decoder, features_BPC = small_decoder(kind, scale=1.0), small_features(3)
    logits_MV, targets_M = decoder(features_BPC, *batch(CAPTIONS))
    loss = F.cross_entropy(logits_MV, targets_M, label_smoothing=label_smoothing, reduction="sum")
    expected = sum(
        naive_loss_sum(decoder, features_BPC[image : image + 1], [BOS, *words, EOS], label_smoothing=label_smoothing)
        for image, words in CAPTIONS
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_equal_those_of_single_steps(kind: DecoderKind) -> None:
    decoder, features_BPC = small_decoder(kind, scale=1.0), small_features(3)
    logits_MV, targets_M = decoder(features_BPC, *batch(CAPTIONS))
    F.cross_entropy(logits_MV, targets_M, reduction="sum").backward()
    packed = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in packed.values())

    decoder.zero_grad(set_to_none=True)
    for image, words in CAPTIONS:
        logits = naive_logits(decoder, features_BPC[image : image + 1], [BOS, *words, EOS])
        F.cross_entropy(torch.stack(logits), torch.tensor([*words, EOS]), reduction="sum").backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_image_are_grouped(kind: DecoderKind) -> None:
    decoder, features_BPC = small_decoder(kind), small_features(2)
    memory, state = decoder.remember(features_BPC)
    grouped = tuple(tensor.repeat_interleave(3, 0) for tensor in state)
    tokens_R = torch.tensor([4, 5, 6, 7, 8, 9])
    step = decoder.step(tokens_R, grouped, memory)
    for row, token in enumerate(tokens_R):
        memory_1, state_1 = decoder.remember(features_BPC[row // 3 : row // 3 + 1])
        alone = decoder.step(token[None], state_1, memory_1)
        torch.testing.assert_close(step.logits_RV[row], alone.logits_RV[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ATTENDING)
def test_attention_weights_sum_to_one_and_look_where_it_matters(kind: DecoderKind) -> None:
    decoder, features_BPC = small_decoder(kind), small_features(2, num_cells=5)
    memory, state = decoder.remember(features_BPC)
    weights_RP = decoder.step(torch.tensor([BOS, BOS]), state, memory).attention_RP
    assert weights_RP is not None
    assert weights_RP.shape == (2, 5)
    assert (weights_RP >= 0).all()
    torch.testing.assert_close(weights_RP.sum(-1), torch.ones(2))
    assert weights_RP.std() > 0.01


def test_show_tell_has_no_attention_and_reads_the_image_first() -> None:
    """Against torch's own LSTM cell: image, <bos>, word."""
    decoder, features_BPC = small_decoder("show_tell"), small_features(1)
    assert isinstance(decoder, ShowTellDecoder)
    cell = decoder.lstm
    state = cell(decoder.image(features_BPC.mean(1)))
    for token in (BOS, 5):
        state = cell(decoder.embedding(torch.tensor([token])), state)
    expected_V = state[0][0] @ decoder.embedding.weight.T + decoder.output_bias
    torch.testing.assert_close(naive_logits(decoder, features_BPC, [BOS, 5, EOS])[-1], expected_V)
    memory, state = decoder.remember(features_BPC)
    assert decoder.step(torch.tensor([BOS]), state, memory).attention_RP is None


def test_the_attention_decoder_equals_torch_lstm_cells() -> None:
    """Two nn.LSTMCell with inputs [language h, mean value, word] and [attended value, attention h]."""
    decoder, features_BPC = small_decoder("attention"), small_features(1)
    assert isinstance(decoder, AttentionDecoder)
    hidden = decoder.config.hidden_size
    first, second = torch.nn.LSTMCell(3 * hidden, hidden), torch.nn.LSTMCell(2 * hidden, hidden)
    with torch.no_grad():
        on_language, on_itself = decoder.attention_lstm_state.weight.split(hidden, -1)
        first.weight_ih.copy_(
            torch.cat([on_language, decoder.attention_lstm_image.weight, decoder.attention_lstm_word.weight], -1)
        )
        first.weight_hh.copy_(on_itself)
        first.bias_ih.copy_(decoder.attention_lstm_word.bias)
        first.bias_hh.zero_()
        second.weight_ih.copy_(decoder.language_lstm.weight[:, : 2 * hidden])
        second.weight_hh.copy_(decoder.language_lstm.weight[:, 2 * hidden :])
        second.bias_ih.copy_(decoder.language_lstm.bias)
        second.bias_hh.zero_()
        values_PH = torch.relu(decoder.bottleneck(features_BPC[0]))
        attention = language = (torch.zeros(1, hidden), torch.zeros(1, hidden))
        for token in (BOS, 5, 7):
            word_1H = decoder.embedding(torch.tensor([token]))
            attention = first(torch.cat([language[0], values_PH.mean(0)[None], word_1H], -1), attention)
            energy_P = decoder.energy(torch.tanh(decoder.key(values_PH) + decoder.query(attention[0])))[:, 0]
            context_1H = (torch.softmax(energy_P, 0) @ values_PH)[None]
            language = second(torch.cat([context_1H, attention[0]], -1), language)
            expected_V = language[0][0] @ decoder.embedding.weight.T + decoder.output_bias
        found_V = naive_logits(decoder, features_BPC, [BOS, 5, 7, EOS])[-1]
    torch.testing.assert_close(found_V, expected_V, rtol=1e-4, atol=1e-4)


def test_att2in_equals_its_equations() -> None:
    """Rennie et al. 2017, section 2: every gate written out for one image, with the attention of Xu et al. 2015."""
    decoder, features_BPC = small_decoder("att2in"), small_features(1)
    assert isinstance(decoder, Att2inDecoder)
    with torch.no_grad():
        # i, f, o and the two units z of the cell input, each with its own matrices
        w_x, b = decoder.lstm_word.weight.chunk(5), decoder.lstm_word.bias.chunk(5)
        w_h, w_image = decoder.lstm_state.weight.chunk(5), decoder.cell_image.weight.chunk(2)
        values_PH = torch.relu(decoder.bottleneck(features_BPC[0]))
        h_H = c_H = torch.zeros(decoder.config.hidden_size)
        for token in (BOS, 5, 7):
            x_H = decoder.embedding.weight[token]
            energy_P = torch.tanh(values_PH @ decoder.key.weight.T + decoder.query(h_H)) @ decoder.energy.weight[0]
            image_H = torch.softmax(energy_P, 0) @ values_PH
            i_H, f_H, o_H = (torch.sigmoid(w_x[n] @ x_H + w_h[n] @ h_H + b[n]) for n in range(3))
            one_H, other_H = (w_x[3 + n] @ x_H + w_image[n] @ image_H + w_h[3 + n] @ h_H + b[3 + n] for n in range(2))
            c_H = i_H * torch.maximum(one_H, other_H) + f_H * c_H
            h_H = o_H * torch.tanh(c_H)
        expected_V = decoder.embedding.weight @ h_H + decoder.output_bias
        found_V = naive_logits(decoder, features_BPC, [BOS, 5, 7, EOS])[-1]
    torch.testing.assert_close(found_V, expected_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_state_are_as_many_as_declared(kind: DecoderKind) -> None:
    decoder = small_decoder(kind)
    memory, state = decoder.remember(small_features(1))
    assert (len(memory), len(state)) == (decoder.num_memory, decoder.num_state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_vocabulary_leaves_the_old_words_as_they_are(kind: DecoderKind) -> None:
    decoder, features_BPC = small_decoder(kind), small_features(2)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    grown = decoder.with_vocabulary(15, seed=3)
    assert type(grown) is type(decoder)
    assert grown.config == replace(decoder.config, vocabulary_size=15)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    for name, tensor in grown.state_dict().items():
        grows = name in ("embedding.weight", "output_bias")
        assert tensor.shape == ((15, *before[name].shape[1:]) if grows else before[name].shape)
        assert torch.equal(tensor[:12] if grows else tensor, before[name])
    old_WH, new_WH = grown.embedding.weight[4:12], grown.embedding.weight[12:]
    assert ((new_WH - old_WH.mean(0)).abs() < 0.5 * old_WH.std(0)).all()
    assert len(new_WH.unique(dim=0)) == 3, "new words must differ"
    torch.testing.assert_close(
        torch.stack(naive_logits(grown, features_BPC[:1], [BOS, 5, 6, EOS]))[:, :12],
        torch.stack(naive_logits(decoder, features_BPC[:1], [BOS, 5, 6, EOS])),
    )
    again, other = decoder.with_vocabulary(15, seed=3), decoder.with_vocabulary(15, seed=4)
    assert torch.equal(again.embedding.weight, grown.embedding.weight)
    assert not torch.equal(other.embedding.weight, grown.embedding.weight)


def test_new_words_can_be_learnt() -> None:
    decoder, features_BPC = small_decoder(scale=1.0).with_vocabulary(15), small_features(3)
    logits_MV, _ = decoder(features_BPC, *batch([(0, [13, 14, 4])]))
    F.cross_entropy(logits_MV, torch.tensor([13, 14, 4, EOS])).backward()
    assert decoder.embedding.weight.grad is not None
    assert decoder.embedding.weight.grad.shape == (15, 8)
    rebuilt = build_decoder(decoder.config)
    rebuilt.load_state_dict(decoder.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "transformer"}, "decoder must be one of attention, att2in, show_tell, got 'transformer'"),
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"vocabulary_size": 4}, "vocabulary_size must be more than the 4 special tokens, got 4"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DecoderConfig(**({"vocabulary_size": 10} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind: DecoderKind) -> None:
    decoder, features_BPC = (
        build_decoder(
            DecoderConfig(kind=kind, vocabulary_size=12, feature_size=6, hidden_size=8, attention_size=5, dropout=0.5)
        ),
        small_features(3),
    )
    inputs = (features_BPC, *batch(CAPTIONS))
    torch.manual_seed(0)
    assert not torch.equal(decoder.train()(*inputs)[0], decoder(*inputs)[0])
    assert torch.equal(decoder.eval()(*inputs)[0], decoder(*inputs)[0])
