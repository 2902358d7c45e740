"""LSTM decoders: image features in, next-word scores out.

Every decoder has three faces. `remember` turns a feature grid into what the steps need, once an image; `step` reads one
token and scores the next (the search in `beam.py` drives it); `forward` scores whole captions at once, for training.

Shapes: B images, P grid cells, C feature channels, N captions, T steps, V words, H hidden units, A attention units,
G rows of one image (beams in a search, 1 in training), R = B * G rows, M tokens of a batch of captions,
S units that make the gates of the LSTM that reads the word: 4H, in Att2in 5H.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.model.config import DecoderConfig, DecoderKind
from raycap.model.vocabulary import SPECIAL_TOKENS

Memory = tuple[Tensor, ...]  # what the decoder keeps of each image; [B, ...] each
NARROW_AT = 0.85  # each narrowing costs a pass over the memory in backward
CACHED_ELEMENTS = 2**18
"""Attention without gradients is computed in parts of this many numbers, which stay in a CPU core's cache: all at once
they would be written to memory and read back, at three times the cost."""
State = tuple[Tensor, ...]  # what the decoder carries from step to step; [R, H] each


class Step(NamedTuple):
    """One decoding step."""

    logits_RV: Tensor
    state: State
    attention_RP: Tensor | None
    """Weights over the grid cells, summing to 1; None from a decoder without attention."""


class Decoder(nn.Module, ABC):
    """What the decoders share: tied word embeddings and the loop over time."""

    num_memory: ClassVar[int]
    """Tensors in its `Memory`."""
    num_state: ClassVar[int]
    """Tensors in its `State`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.hidden_size)
        self.output_bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def with_vocabulary(self, size: int, *, seed: int = 0) -> Decoder:
        """A copy for a vocabulary that has words appended, `size` in all: what it knows of the old ones stays.

        A new word begins as the mean of the old words, with noise of a tenth of their spread.
        """
        assert size >= self.config.vocabulary_size
        generator = torch.Generator().manual_seed(seed)
        grown = copy.deepcopy(self)
        grown.config = replace(self.config, vocabulary_size=size)
        grown.embedding.num_embeddings = size
        for parameter in (grown.embedding.weight, grown.output_bias):
            old = parameter.data[len(SPECIAL_TOKENS) :]
            noise = torch.randn(size - len(parameter), *old.shape[1:], generator=generator).to(old)
            new = old.mean(0) + 0.1 * old.std(0, correction=0) * noise
            parameter.data = torch.cat([parameter.data, new])
        return grown

    @abstractmethod
    def remember(self, features_BPC: Tensor) -> tuple[Memory, State]:
        """The memory of each image and the state before the first token."""

    @abstractmethod
    def input_gates(self, tokens: Tensor, memory: Memory) -> Tensor:
        """The part of the first LSTM's gates [..., S] that depends on the input tokens alone, [R] or [R, T]."""

    def of_words(self, layer: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """What `layer` makes of the embeddings of tokens [...], as [..., S]."""
        if self.training or tokens.device.type != "cpu":
            return layer(self.dropout(self.embedding(tokens)))
        words, place = tokens.unique(return_inverse=True)  # beams read the same few words
        of_words: Tensor = layer(self.embedding(words))
        return of_words[place]

    @abstractmethod
    def recur(self, gates_RS: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        """One step of the recurrence: the output [R, H], the new state and the attention weights."""

    def logits(self, output_H: Tensor) -> Tensor:
        """Scores [..., V] of the next word; the output matrix is the embedding matrix (Press and Wolf 2017)."""
        return F.linear(self.dropout(output_H), self.embedding.weight, self.output_bias)

    def step(self, tokens_R: Tensor, state: State, memory: Memory) -> Step:
        """Read `tokens_R` (int64) and score what comes next. Row r belongs to image r // G."""
        output_RH, state, attention_RP = self.recur(self.input_gates(tokens_R, memory), state, memory)
        return Step(self.logits(output_RH), state, attention_RP)

    def forward(
        self, features_BPC: Tensor, image_N: Tensor, tokens_NT: Tensor, lengths_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Next-word scores of reference captions (teacher forcing).

        Args:
            features_BPC: floating point [B, P, C].
            image_N: int64 [N], the image of each caption.
            tokens_NT: int64 [N, T], <bos> words <eos> padded; rows sorted by length, the longest first.
            lengths_N: int64 [N] on the CPU, tokens of each row with <bos> and <eos>.

        Returns:
            logits [M, V] and targets int64 [M], M = sum(lengths - 1), in order of time, without padding: as captions
            end, the batch narrows, so little is spent on padding.
        """
        memory, state = self.remember(features_BPC)
        memory = tuple(tensor.index_select(0, image_N) for tensor in memory)
        state = tuple(tensor.index_select(0, image_N) for tensor in state)
        gates_T = self.input_gates(tokens_NT[:, :-1], memory).unbind(1)
        num_active_T = (lengths_N[:, None] - 1 > torch.arange(tokens_NT.shape[1] - 1)).sum(0).tolist()
        outputs, targets = [], []
        for t, num_active in enumerate(num_active_T):
            rows = len(state[0])
            if num_active < NARROW_AT * rows:
                rows = num_active
                memory = tuple(tensor[:rows] for tensor in memory)
                state = tuple(tensor[:rows] for tensor in state)
            output_nH, state, _ = self.recur(gates_T[t][:rows], state, memory)
            outputs.append(output_nH[:num_active])
            targets.append(tokens_NT[:num_active, t + 1])
        return self.logits(torch.cat(outputs)), torch.cat(targets)


class ShowTellDecoder(Decoder):
    """Show and Tell (Vinyals et al. 2015): CNN, linear layer, one LSTM that reads the image before the first word.

    Unlike in the paper, the cell's output passes a tanh (equation 8 has none; the authors' released code does so too)
    and input and output embeddings are tied.
    """

    num_memory, num_state = 0, 2

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.image = nn.Linear(config.feature_size, config.hidden_size)
        self.lstm = nn.LSTMCell(config.hidden_size, config.hidden_size)

    def remember(self, features_BPC: Tensor) -> tuple[Memory, State]:
        """Equation 10: x(-1) = CNN(I); the mean of the grid is the CNN's output."""
        return (), self.lstm(self.dropout(self.image(features_BPC.mean(1))))

    def input_gates(self, tokens: Tensor, memory: Memory) -> Tensor:
        return self.of_words(partial(F.linear, weight=self.lstm.weight_ih, bias=self.lstm.bias_ih), tokens)

    def recur(self, gates_RS: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        hidden_RH, cell_RH = state
        hidden_RH, cell_RH = lstm(gates_RS + F.linear(hidden_RH, self.lstm.weight_hh, self.lstm.bias_hh), cell_RH)
        return hidden_RH, (hidden_RH, cell_RH), None


class AttendingDecoder(Decoder):
    """What the decoders with attention share: a learned bottleneck, and the attention over what comes out of it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        hidden, attention = config.hidden_size, config.attention_size
        self.bottleneck = nn.Linear(config.feature_size, hidden)
        self.key = nn.Linear(hidden, attention, bias=False)
        self.query = nn.Linear(hidden, attention)
        self.energy = nn.Linear(attention, 1, bias=False)

    def grid(self, features_BPC: Tensor) -> tuple[Tensor, Tensor]:
        """What `attend` reads of each image: its values [B, P, H] and their keys [B, P, A]."""
        values_BPH = self.dropout(torch.relu(self.bottleneck(features_BPC)))
        return values_BPH, self.key(values_BPH)

    def init_as_lstm(self, *layers: nn.Linear) -> None:
        """Draw the weights of layers that are parts of an LSTM, as nn.LSTM does."""
        bound = self.config.hidden_size**-0.5
        for layer in layers:
            nn.init.uniform_(layer.weight, -bound, bound)

    def attend(self, query_RH: Tensor, values_BPH: Tensor, keys_BPA: Tensor) -> tuple[Tensor, Tensor]:
        """Additive attention (Anderson et al. 2018, equation 3): the attended value [R, H] and the weights [R, P]."""
        num_images, num_cells, _ = values_BPH.shape
        query_BG1A = self.query(query_RH).view(num_images, -1, 1, self.config.attention_size)
        weights_BGP = torch.softmax(self._energies(query_BG1A, keys_BPA), -1)
        context_BGH = weights_BGP @ values_BPH
        return context_BGH.reshape(-1, values_BPH.shape[-1]), weights_BGP.reshape(-1, num_cells)

    def _energies(self, query_BG1A: Tensor, keys_BPA: Tensor) -> Tensor:
        """How well each query suits each cell [B, G, P]."""
        if torch.is_grad_enabled() or keys_BPA.device.type != "cpu":
            energy_BGP1: Tensor = self.energy(torch.tanh(keys_BPA[:, None] + query_BG1A))
            return energy_BGP1.squeeze(-1)
        num_images = max(1, CACHED_ELEMENTS // (query_BG1A.shape[1] * keys_BPA[0].numel()))
        parts = zip(query_BG1A.split(num_images), keys_BPA.split(num_images), strict=True)
        return torch.cat([self.energy(torch.add(keys[:, None], query).tanh_()).squeeze(-1) for query, keys in parts])


class AttentionDecoder(AttendingDecoder):
    """Two-layer top-down attention (Anderson et al. 2018, section 3.2) on a CNN's grid, after a learned bottleneck.

    The first LSTM reads [language LSTM's last output, mean feature, word]; its output asks the grid; the second LSTM
    reads [attended feature, first LSTM's output] and gives the words.
    """

    num_memory, num_state = 3, 4

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        # Both LSTMs are split by what their inputs depend on: what needs no recurrence runs as one product.
        self.attention_lstm_word = nn.Linear(hidden, 4 * hidden)
        self.attention_lstm_image = nn.Linear(hidden, 4 * hidden, bias=False)
        self.attention_lstm_state = nn.Linear(2 * hidden, 4 * hidden, bias=False)
        self.language_lstm = nn.Linear(3 * hidden, 4 * hidden)
        self.init_as_lstm(
            self.attention_lstm_word, self.attention_lstm_image, self.attention_lstm_state, self.language_lstm
        )

    def remember(self, features_BPC: Tensor) -> tuple[Memory, State]:
        values_BPH, keys_BPA = self.grid(features_BPC)
        image_gates_B4H = self.attention_lstm_image(values_BPH.mean(1))
        zeros_BH = values_BPH.new_zeros(values_BPH.shape[0], self.config.hidden_size)
        return (values_BPH, keys_BPA, image_gates_B4H), (zeros_BH,) * 4

    def input_gates(self, tokens: Tensor, memory: Memory) -> Tensor:
        *_, image_gates_B4H = memory
        word_gates = self.of_words(self.attention_lstm_word, tokens)
        num_images, size = image_gates_B4H.shape
        grouped = word_gates.view(num_images, -1, size) + image_gates_B4H[:, None]  # [B, G or T, 4H]
        gates: Tensor = grouped.view_as(word_gates)
        return gates

    def recur(self, gates_RS: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        attention_h, attention_c, language_h, language_c = state
        values_BPH, keys_BPA, _ = memory
        recurrent_R4H = self.attention_lstm_state(torch.cat([language_h, attention_h], -1))
        attention_h, attention_c = lstm(gates_RS + recurrent_R4H, attention_c)
        context_RH, weights_RP = self.attend(attention_h, values_BPH, keys_BPA)
        language_gates_R4H = self.language_lstm(torch.cat([context_RH, attention_h, language_h], -1))
        language_h, language_c = lstm(language_gates_R4H, language_c)
        return language_h, (attention_h, attention_c, language_h, language_c), weights_RP


class Att2inDecoder(AttendingDecoder):
    """Att2in (Rennie et al. 2017, section 2): one LSTM, whose cell input alone reads the attended feature.

    The last output asks the grid; the cell's input is a maxout of two units, each of [word, last output, attended
    feature]; the gates read word and last output.
    """

    num_memory, num_state = 2, 2

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        # Of the 5H: input, forget and output gate, and the two units of the cell's input.
        self.lstm_word = nn.Linear(hidden, 5 * hidden)
        self.lstm_state = nn.Linear(hidden, 5 * hidden, bias=False)
        self.cell_image = nn.Linear(hidden, 2 * hidden, bias=False)
        self.init_as_lstm(self.lstm_word, self.lstm_state, self.cell_image)

    def remember(self, features_BPC: Tensor) -> tuple[Memory, State]:
        values_BPH, keys_BPA = self.grid(features_BPC)
        zeros_BH = values_BPH.new_zeros(values_BPH.shape[0], self.config.hidden_size)
        return (values_BPH, keys_BPA), (zeros_BH, zeros_BH)

    def input_gates(self, tokens: Tensor, memory: Memory) -> Tensor:
        return self.of_words(self.lstm_word, tokens)

    def recur(self, gates_RS: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor | None]:
        hidden_RH, cell_RH = state
        context_RH, weights_RP = self.attend(hidden_RH, *memory)
        hidden_size = self.config.hidden_size
        gates_R3H, units_R2H = (gates_RS + self.lstm_state(hidden_RH)).split([3 * hidden_size, 2 * hidden_size], -1)
        input_, forget, output = torch.sigmoid(gates_R3H).chunk(3, -1)
        cell_RH = forget * cell_RH + input_ * torch.maximum(*(units_R2H + self.cell_image(context_RH)).chunk(2, -1))
        hidden_RH = output * torch.tanh(cell_RH)
        return hidden_RH, (hidden_RH, cell_RH), weights_RP


def lstm(gates_R4H: Tensor, cell_RH: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state after the gates (input, forget, cell, output; as torch.nn.LSTM orders them)."""
    input_, forget, candidate, output = gates_R4H.chunk(4, -1)
    cell_RH = torch.sigmoid(forget) * cell_RH + torch.sigmoid(input_) * torch.tanh(candidate)
    return torch.sigmoid(output) * torch.tanh(cell_RH), cell_RH


def build_decoder(config: DecoderConfig) -> Decoder:
    """The decoder that `config.kind` names, with fresh weights."""
    kinds: dict[DecoderKind, type[Decoder]] = {
        "attention": AttentionDecoder,
        "att2in": Att2inDecoder,
        "show_tell": ShowTellDecoder,
    }
    return kinds[config.kind](config)
