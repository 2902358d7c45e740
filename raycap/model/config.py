"""What a model is: the settings that decide its shapes and how it decodes.

Plain data: no torch here, so the command line stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from raycap.errors import ConfigurationError
from raycap.model.vocabulary import SPECIAL_TOKENS


def require(condition: bool, message: str) -> None:
    """Raise `ConfigurationError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigurationError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """A CNN backbone without its classifier."""

    name: str = "efficientnet_lite0"
    """efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, `timm:NAME` or `torchvision:NAME`."""
    num_channels: int = 1280
    """Channels of the feature grid that the backbone gives."""
    mean: tuple[float, float, float] = (127.0, 127.0, 127.0)
    """Subtracted from the 0..255 RGB pixel."""
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    """The rest is divided by it."""

    def __post_init__(self) -> None:
        require(self.num_channels > 0, f"num_channels must be positive, got {self.num_channels}")
        require(
            len(self.mean) == 3 and len(self.std) == 3, "mean and std must have three values, one each for R, G and B"
        )
        require(min(self.std) > 0, f"std must be positive, got {self.std}")


WeightsDtype = Literal["float32", "float16"]
"""What the weights of a bundle are stored as."""
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["auto", "torch", "compile", "onnx"]
"""What runs the encoder. auto: onnx on a CPU if it is installed, else torch."""
DecoderKind = Literal["attention", "att2in", "show_tell"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """An LSTM language model conditioned on the image."""

    kind: DecoderKind = "attention"
    """attention: two-layer top-down attention LSTM (Anderson et al. 2018, section 3.2).
    att2in: one LSTM, the attended feature in its cell input alone (Rennie et al. 2017, section 2).
    show_tell: the image as the LSTM's first input (Vinyals et al. 2015)."""
    vocabulary_size: int = 0
    """Number of tokens, the special ones among them."""
    feature_size: int = 1280
    """Channels of the encoder's feature grid."""
    hidden_size: int = 512
    """Units of each LSTM; also the size of word embeddings, since input and output embeddings are tied."""
    attention_size: int = 512
    """Units of the additive attention's hidden layer. Unused by show_tell."""
    dropout: float = 0.5
    """Dropout probability on image features, word embeddings and the LSTM's output, in training."""

    def __post_init__(self) -> None:
        kinds = get_args(DecoderKind)
        require(self.kind in kinds, f"decoder must be one of {', '.join(kinds)}, got {self.kind!r}")
        for name in ("feature_size", "hidden_size", "attention_size"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        num_special = len(SPECIAL_TOKENS)
        require(
            self.vocabulary_size > num_special,
            f"vocabulary_size must be more than the {num_special} special tokens, got {self.vocabulary_size}",
        )
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingConfig:
    """How captions are searched for."""

    beam_size: int = 3
    """Beams an image; 1 is greedy decoding."""
    max_length: int = 20
    """Longest caption, in words."""
    length_penalty: float = 0.7
    """alpha in score = log_prob / num_tokens ** alpha (Wu et al. 2016, equation 14, without its constants). 0 prefers
    short captions."""
    no_repeat_ngram: int = 3
    """A caption never holds the same n words in a row twice; 0 allows it."""
    allow_unknown: bool = False
    """Whether <unk> may appear in a caption."""

    def __post_init__(self) -> None:
        require(1 <= self.beam_size <= 64, f"beam_size must be from 1 to 64, got {self.beam_size}")
        require(1 <= self.max_length <= 200, f"max_length must be from 1 to 200 words, got {self.max_length}")
        require(0 <= self.length_penalty <= 5, f"length_penalty must be from 0 to 5, got {self.length_penalty}")
        require(0 <= self.no_repeat_ngram <= 10, f"no_repeat_ngram must be from 0 to 10, got {self.no_repeat_ngram}")

    def updated(self, **changes: int | float | bool | None) -> DecodingConfig:
        """With some fields replaced; those given as None stay."""
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        return replace(self, **given)
