"""What requests and answers hold, as pydantic models: they check the requests, and OpenAPI and the client read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator

EXAMPLE_IMAGE = "R0lGODlhAQABAIAAAAUEBAAAACwAAAAAAQABAAACAkQBADs="
"""A GIF of one pixel, in base64."""


class Options(BaseModel):
    """How to caption. What is left out is as the model's bundle says."""

    # One image's options must not make it cost what hundreds do: the bounds are narrower than those of DecodingConfig.
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None,
        max_length=64,
        description="Name of the model; by default the first that is served, or its canary.",
    )
    beam_size: int | None = Field(default=None, ge=1, le=16, description="Beams of the search; 1 is greedy.")
    alternatives: int | None = Field(
        default=None,
        ge=0,
        le=15,
        description="Other captions to give; by default all other beams, or none when sampling.",
    )
    length_penalty: float | None = Field(default=None, ge=0, le=5, description="0 prefers short captions.")
    max_length: int | None = Field(default=None, ge=1, le=60, description="Longest caption, in words.")
    temperature: float | None = Field(
        default=None, ge=0.05, le=5, description="Draw captions at random, with the scores divided by this."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw from the most probable words that sum to this (nucleus sampling)."
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Of the draw: the same caption each time.")
    attention: bool = Field(default=False, description="Give where the model looked for each word.")

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        if self.samples and (self.beam_size is not None or self.length_penalty is not None):
            raise ValueError("temperature and top_p draw at random: leave out beam_size and length_penalty")
        if self.seed is not None and not self.samples:
            raise ValueError("seed is of a random draw: give temperature or top_p too")
        if self.beam_size is not None and (self.alternatives or 0) >= self.beam_size:
            raise ValueError(f"{self.beam_size} beams give at most {self.beam_size - 1} alternatives: raise beam_size")
        return self

    @property
    def samples(self) -> bool:
        """Whether the captions are drawn at random instead of searched for."""
        return self.temperature is not None or self.top_p is not None


class Base64Image(BaseModel):
    """An image in the request itself."""

    model_config = ConfigDict(extra="forbid")
    data: str = Field(description="The image file, in base64.", examples=[EXAMPLE_IMAGE])


class ImageAddress(BaseModel):
    """An image to fetch; refused unless the server allows its host."""

    model_config = ConfigDict(extra="forbid")
    url: str = Field(max_length=2048, examples=["https://example.org/dog.jpg"])


def _kind_of_image(value: Any) -> str | None:
    given = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    match "data" in given, "url" in given:
        case True, False:
            return "base64"
        case False, True:
            return "address"
    return None


JsonImage = Annotated[
    Annotated[Base64Image, Tag("base64")] | Annotated[ImageAddress, Tag("address")],
    Discriminator(
        _kind_of_image,
        custom_error_type="no_image",
        custom_error_message='expected {"data": the file in base64} or {"url": its address}',
    ),
]
"""An image of a request in JSON."""


class CaptionRequest(BaseModel):
    """The JSON form of a request."""

    model_config = ConfigDict(extra="forbid")
    # The first wrong one is told of: errors of thousands take long to make.
    images: Annotated[list[JsonImage], Field(min_length=1), FailFast()]
    options: Options = Options()


class InputTensor(BaseModel):
    """A tensor of a request; without data, its bytes follow the JSON."""

    name: Literal["image"]
    shape: list[Annotated[int, Field(lt=2**31)]] = Field(min_length=1, max_length=2)
    datatype: Literal["BYTES"]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class RequestedOutput(BaseModel):
    """A tensor to answer with."""

    name: Literal["caption", "log_prob"]
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """What is asked of a model."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] = Field(default=[], max_length=2)


class OutputTensor(BaseModel):
    """A tensor of an answer; without data, its bytes follow the JSON."""

    name: Literal["caption", "log_prob"]
    datatype: Literal["BYTES", "FP32"]
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[str | float] | None = None


class InferResponse(BaseModel):
    """What a model answers."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any]
    outputs: list[OutputTensor]


class Alternative(BaseModel):
    """Another caption of the same image."""

    caption: str
    log_prob: float = Field(description="Natural logarithm of the caption's probability under the model.")
    probability: float


class Attention(BaseModel):
    """Where the model looked for each word of the caption."""

    words: list[str]
    weights: list[list[list[float]]] = Field(
        description="For each word a grid over the box, rows from the top, whose weights sum to 1."
    )
    box: list[float] = Field(
        default=[0.0, 0.0, 1.0, 1.0],
        min_length=4,
        max_length=4,
        description="What the model saw of the image: left, top, right and bottom in widths and heights of it. Not all "
        "of it if the model was trained with --resize crop; with --resize pad there is grey beyond 0 and 1.",
    )


class Captioned(BaseModel):
    """An image with its caption."""

    status: Literal["ok"] = "ok"
    caption: str = Field(examples=["a dog runs through the grass"])
    log_prob: float = Field(description="Natural logarithm of the caption's probability under the model.")
    probability: float
    alternatives: list[Alternative]
    attention: Attention | None = Field(default=None, description="If asked for, and the model has attention.")


class Failed(BaseModel):
    """An image that could not be captioned; the others of its request were."""

    status: Literal["failed"] = "failed"
    code: str = Field(examples=["not_an_image"])
    detail: str


class Timings(BaseModel):
    """How long the stages took, in milliseconds; those of the model are of the slowest image."""

    read: float
    decode: float
    queue: float = Field(description="Waiting for the model.")
    model: float
    total: float


class CaptionResponse(BaseModel):
    """The captions of a request's images, in their order."""

    model: str = Field(examples=["default"])
    model_id: str = Field(description="Names the weights.", examples=["efficientnet_lite0-attention-0123456789ab"])
    results: list[Annotated[Captioned | Failed, Field(discriminator="status")]]
    timings_ms: Timings


class ProblemDetails(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(default="about:blank", description="Always about:blank: `code` says which problem it is.")
    title: str = Field(examples=["Content Too Large"])
    status: int = Field(examples=[413])
    code: str = Field(examples=["body_too_large"])
    detail: str
    request_id: str | None = None
    errors: list[dict[str, Any]] | None = Field(default=None, description="Which fields are wrong, and how.")
