"""The model bundle: a directory, local or s3://, that holds all that inference needs.

Written by training, read by everyone.

config.json         format version, architecture, preprocessing, decoding defaults
vocabulary.json     the words, in id order
model.safetensors   the weights of encoder and decoder (tensors only: loading runs no code)
metrics.json        scores with split, beam size and tokenizer
README.md           the model card

Format 1 holds one encoder and one decoder. Format 2 holds an ensemble: encoders, and members that are each a decoder
and the index of its encoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from raycap.errors import BundleError, ConfigurationError, NotFoundError, ObjectError, ObjectNotFoundError
from raycap.images import Preprocessing
from raycap.model.config import DecoderConfig, DecodingConfig, EncoderConfig, WeightsDtype
from raycap.model.decoder import build_decoder
from raycap.model.encoder import build_encoder
from raycap.model.ensemble import EnsembleNetwork
from raycap.model.network import CaptionNetwork
from raycap.model.vocabulary import Vocabulary
from raycap.storage import S3Options, Store, open_store

SINGLE, ENSEMBLE = FORMATS = (1, 2)
CONFIG, VOCABULARY, WEIGHTS, METRICS, CARD = (
    "config.json",
    "vocabulary.json",
    "model.safetensors",
    "metrics.json",
    "README.md",
)
T = TypeVar("T")


def shipped_bundle() -> str:
    """The path of the bundle that comes with the package."""
    return str(files("raycap") / "bundle")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A captioning model and everything needed to use it."""

    network: CaptionNetwork | EnsembleNetwork
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    decoding: DecodingConfig
    metrics: dict[str, Any] = field(default_factory=dict)
    card: str = ""
    model_id: str = ""
    """Names the weights in the captions output, by a digest of the weights file. Loading sets it, `save` returns it."""

    @property
    def single(self) -> CaptionNetwork:
        """The network, for what can be done with one alone. Raises ConfigurationError if this is an ensemble."""
        if isinstance(self.network, EnsembleNetwork):
            raise ConfigurationError(
                f"bundle {self.model_id} is an ensemble; expected a single model, such as one of its members"
            )
        return self.network

    def save(self, location: str, *, s3: S3Options | None = None, weights_dtype: WeightsDtype = "float32") -> str:
        """Write the bundle into the directory or s3:// prefix `location`; return the model id.

        float16 halves the file (vectors, such as the statistics of batch normalisation, stay float32); the weights are
        float32 again after loading. The config goes first and comes last, so a bundle that was cut short is not
        mistaken for a whole one, even where there was another bundle before.
        """
        store = open_store(location, s3 or S3Options())
        state = {name: _portable(tensor, weights_dtype) for name, tensor in self.network.state_dict().items()}
        weights = safetensors_save(state)
        config = {
            **_architecture(self.network),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "decoding": dataclasses.asdict(self.decoding),
        }
        if store.exists(CONFIG):
            store.delete(CONFIG)
        store.write(VOCABULARY, _json(list(self.vocabulary.words)))
        store.write(METRICS, _json(self.metrics))
        store.write(CARD, self.card.encode())
        store.write(WEIGHTS, weights)
        store.write(CONFIG, _json(config))
        return _model_id(config, weights)

    @classmethod
    def load(cls, location: str | None = None, *, s3: S3Options | None = None) -> Bundle:
        """Read a bundle; without a location, the one that ships with the package.

        Raises BundleError, naming the file and what differs, if it is incomplete, of a newer format, or if vocabulary
        or tensors do not fit the config.
        """
        location = location or shipped_bundle()
        store = open_store(location, s3 or S3Options())
        config = _read_json(store, CONFIG)
        if not isinstance(config, dict) or not isinstance(config.get("format_version"), int):
            raise BundleError(f"{store.uri(CONFIG)}: not a raycap bundle (no format_version)")
        if config["format_version"] not in FORMATS:
            raise BundleError(
                f"{location}: bundle format {config['format_version']}, but this raycap reads formats {SINGLE} to "
                f"{ENSEMBLE}; upgrade raycap"
            )
        where = store.uri(CONFIG)
        vocabulary = _read_vocabulary(store)
        encoders, members = _parse_architecture(config, where)
        for index, decoder in members:
            if len(vocabulary) != decoder.vocabulary_size:
                raise BundleError(
                    f"{location}: {VOCABULARY} has {len(vocabulary)} words, but {CONFIG} says vocabulary_size "
                    f"{decoder.vocabulary_size}"
                )
            if encoders[index].num_channels != decoder.feature_size:
                raise BundleError(
                    f"{where}: the encoder gives {encoders[index].num_channels} channels, but the decoder expects "
                    f"feature_size {decoder.feature_size}"
                )
        weights = _read(store, WEIGHTS)
        network = _build(config["format_version"], encoders, members, where)
        _load_weights(network, weights, store.uri(WEIGHTS))
        return cls(
            network=network.eval().requires_grad_(False),
            vocabulary=vocabulary,
            preprocessing=_parse(Preprocessing, config, "preprocessing", where),
            decoding=_parse(DecodingConfig, config, "decoding", where),
            metrics=_read_json(store, METRICS),
            card=_read(store, CARD).decode(errors="replace"),
            model_id=_model_id(config, weights),
        )


def _portable(tensor: torch.Tensor, dtype: WeightsDtype) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        # Vectors cost next to nothing, and a variance may be past float16's largest number, 65504.
        tensor = tensor.to(torch.float16 if dtype == "float16" and tensor.ndim > 1 else torch.float32)
    return tensor.contiguous()


def _model_id(config: dict[str, Any], weights: bytes) -> str:
    digest = hashlib.sha256(weights).hexdigest()[:12]
    if config["format_version"] == ENSEMBLE:
        return f"ensemble-of-{len(config['members'])}-{digest}"
    return f"{config['encoder']['name']}-{config['decoder']['kind']}-{digest}"


def _architecture(network: CaptionNetwork | EnsembleNetwork) -> dict[str, Any]:
    """The sections of config.json that `_parse_architecture` reads."""
    if isinstance(network, CaptionNetwork):
        return {
            "format_version": SINGLE,
            "encoder": dataclasses.asdict(network.encoder.config),
            "decoder": dataclasses.asdict(network.decoder.config),
        }
    return {
        "format_version": ENSEMBLE,
        "encoders": [dataclasses.asdict(encoder.config) for encoder in network.encoders],
        "members": [
            {"encoder": index, "decoder": dataclasses.asdict(decoder.config)} for index, decoder in network.members
        ],
    }


def _parse_architecture(
    config: dict[str, Any], where: str
) -> tuple[list[EncoderConfig], list[tuple[int, DecoderConfig]]]:
    """The encoders, and for each member the index of its encoder and its decoder."""
    if config["format_version"] == SINGLE:
        encoder = _parse(EncoderConfig, config, "encoder", where)
        return [encoder], [(0, _parse(DecoderConfig, config, "decoder", where))]
    for section in ("encoders", "members"):
        if not isinstance(config.get(section), list) or not config[section]:
            raise BundleError(f"{where}: section {section!r} is missing")
    encoders = [_parse(EncoderConfig, {"encoders": each}, "encoders", where) for each in config["encoders"]]
    members = []
    for member in config["members"]:
        index = member.get("encoder") if isinstance(member, dict) else None
        if type(index) is not int or not 0 <= index < len(encoders):
            raise BundleError(f"{where}: section 'members': expected the index of one of {len(encoders)} encoders")
        members.append((index, _parse(DecoderConfig, member, "decoder", where)))
    return encoders, members


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _read(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except (NotFoundError, ObjectNotFoundError) as error:
        raise BundleError(
            f"{store.location}: not a model bundle, {name} is missing; expected a directory written by raycap train"
        ) from error
    except ObjectError as error:
        raise BundleError(f"{store.location}: {name} cannot be read: {error}") from error


def _read_json(store: Store, name: str) -> Any:
    try:
        return json.loads(_read(store, name))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{store.uri(name)}: not valid JSON: {error}") from error


def _read_vocabulary(store: Store) -> Vocabulary:
    words = _read_json(store, VOCABULARY)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise BundleError(f"{store.uri(VOCABULARY)}: expected a list of words")
    try:
        return Vocabulary(words)
    except ConfigurationError as error:
        raise BundleError(f"{store.uri(VOCABULARY)}: {error}") from error


def _build(
    format_version: int, encoders: list[EncoderConfig], members: list[tuple[int, DecoderConfig]], where: str
) -> CaptionNetwork | EnsembleNetwork:
    try:
        if format_version == SINGLE:
            return CaptionNetwork.build(encoders[0], members[0][1])
        return EnsembleNetwork(
            [build_encoder(config) for config in encoders],
            [(index, build_decoder(config)) for index, config in members],
        )
    except (ConfigurationError, RuntimeError) as error:  # RuntimeError: shapes beyond this machine's memory
        raise BundleError(f"{where}: the network cannot be built: {error}") from error


def _parse(cls: type[T], config: dict[str, Any], section: str, where: str) -> T:
    """The config dataclass `cls`, every field of which has a default, from its section of the file."""
    values = config.get(section)
    if not isinstance(values, dict):
        raise BundleError(f"{where}: section {section!r} is missing")
    try:
        types = {each.name: type(each.default) for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: _typed(name, value, types.get(name)) for name, value in values.items()})
    except (TypeError, ConfigurationError) as error:
        raise BundleError(f"{where}: section {section!r}: {error}") from error


def _typed(name: str, value: Any, wanted: type | None) -> Any:
    """`value`, as JSON gave it, in the type of its field. Raises TypeError if it is of another."""
    if wanted is tuple and isinstance(value, list):
        return tuple(_typed(name, each, float) for each in value)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is not None and type(value) is not wanted:
        raise TypeError(f"expected {name} to be of type {wanted.__name__}, got {value!r}")
    return value


def _load_weights(network: CaptionNetwork | EnsembleNetwork, weights: bytes, where: str) -> None:
    try:
        state = safetensors_load(weights)
    except Exception as error:  # safetensors raises an error type of its native module
        raise BundleError(f"{where}: not a safetensors file: {error}") from error
    expected = network.state_dict()
    problems = [f"missing tensor {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected tensor {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BundleError(f"{where} does not fit {CONFIG}: {'; '.join(sorted(problems)[:5])}{more}")
    network.load_state_dict(state)  # copies into float32, whatever the file holds
