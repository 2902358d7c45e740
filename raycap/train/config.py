"""The settings of a training run. Plain data, checked before any worker starts; no torch and no Ray here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from raycap.errors import ConfigurationError
from raycap.model.config import DecoderKind, DecodingConfig, require
from raycap.storage import S3Options

Resize = Literal["squash", "crop", "pad"]
WeightsDtype = Literal["float32", "float16"]
RESIZES, DECODERS, WEIGHTS_DTYPES = get_args(Resize), get_args(DecoderKind), get_args(WeightsDtype)
FEATURE_CACHE = "features"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a captioner on COCO-format captions and write a model bundle."""

    annotations: str
    """COCO captions JSON of the training images; local or s3://."""
    images: str
    """Directory or s3:// prefix of the training images."""
    val_annotations: str
    """COCO captions JSON of the validation images, which choose the best epoch."""
    val_images: str | None = None
    """Directory or s3:// prefix of the validation images; by default the same as --images."""
    output: str
    """Where the bundle goes: a directory or s3:// prefix."""

    encoder: str = "efficientnet_lite0"
    """CNN with ImageNet weights: efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, timm:NAME or
    torchvision:NAME. Frozen."""
    size_px: int | None = None
    """Side of the square that images are resized to, in pixels; by default the encoder's own."""
    resize: Resize = "squash"
    """How an image becomes a square: squash ignores the aspect ratio, crop keeps the centre, pad keeps everything."""
    flip: bool = True
    """Train on mirrored images too."""
    decoder: DecoderKind = "attention"
    """attention: two-layer top-down attention LSTM. show_tell: the original Show and Tell."""
    hidden_size: int = 512
    """Units of each LSTM and of the word embeddings."""
    attention_size: int = 512
    """Units of the attention's hidden layer."""
    dropout: float = 0.5
    """Dropout probability."""
    min_count: int = 5
    """Words that occur less often in the training captions become <unk>."""
    max_length: int = 20
    """Words of a training caption past this one are cut off; also the longest caption the model gives."""

    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 20
    """Images in a batch, over all workers; each comes with all its captions."""
    learning_rate: float = 6e-4
    """Peak of the Adam learning rate."""
    warmup_steps: int = 200
    """Batches over which the learning rate climbs from 0 to its peak; then it falls to 0 along a half cosine."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread over all words (Szegedy et al. 2016)."""
    max_grad_norm: float = 5.0
    """Gradients with a larger norm are scaled down to it."""
    ema_decay: float = 0.999
    """The bundle holds an exponential moving average of the weights with this decay a batch; 0 turns it off."""
    seed: int = 0
    """Of the weights, the order of the images and dropout."""

    beam_size: int = 3
    """Beams of the validation captions, and the bundle's default."""
    length_penalty: float = 0.7
    """Length penalty of the validation captions, and the bundle's default."""
    weights_dtype: WeightsDtype = "float32"
    """Number format of the bundle's weights file."""

    data_notice: str = ""
    """What the model card says of the training data, its licence and whom to cite."""

    num_workers: int = 1
    """Ray Train workers (gloo on CPUs, NCCL on GPUs)."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: int | None = None
    """CPU cores, and so threads, of each worker; by default the cluster's cores in equal parts, or 1 with --use-gpu."""
    run_dir: str = "runs"
    """Directory of the runs: checkpoints, TensorBoard files and the feature cache. All machines must share it."""
    name: str | None = None
    """Name of the run; by default that of the output. Starting a run of the same name again resumes it."""
    log_every_s: float = 15.0
    """Seconds between progress lines."""
    ray_address: str | None = None
    """Ray cluster to train on; by default RAY_ADDRESS, else Ray starts on this machine."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "hidden_size", "attention_size", "min_count", "max_length", "num_workers"):
            require(
                getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
            )
        require(self.learning_rate > 0, f"--learning-rate must be positive, got {self.learning_rate}")
        require(self.max_grad_norm > 0, f"--max-grad-norm must be positive, got {self.max_grad_norm}")
        require(self.warmup_steps >= 0, f"--warmup-steps must not be negative, got {self.warmup_steps}")
        for name in ("dropout", "label_smoothing", "ema_decay"):
            require(
                0 <= getattr(self, name) < 1, f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(self, name)}"
            )
        require(
            self.batch_size % self.num_workers == 0,
            f"--batch-size {self.batch_size} must be a multiple of --num-workers {self.num_workers}: "
            "each worker takes an equal part",
        )
        require(self.seed >= 0, f"--seed must not be negative, got {self.seed}")
        require(self.weight_decay >= 0, f"--weight-decay must not be negative, got {self.weight_decay}")
        if self.cpus_per_worker is not None:
            require(self.cpus_per_worker >= 1, f"--cpus-per-worker must be at least 1, got {self.cpus_per_worker}")
        if self.size_px is not None:
            require(1 <= self.size_px <= 4096, f"--size-px must be from 1 to 4096, got {self.size_px}")
        for name, allowed in (("resize", RESIZES), ("decoder", DECODERS), ("weights_dtype", WEIGHTS_DTYPES)):
            require(
                getattr(self, name) in allowed,
                f"--{name.replace('_', '-')} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}",
            )
        require("://" not in self.run_dir, f"--run-dir must be a directory of this machine, got {self.run_dir}")
        require(bool(self.output), "--output must name a directory or s3:// prefix")
        _ = self.decoding, self.run_name  # both check themselves

    @property
    def decoding(self) -> DecodingConfig:
        """The bundle's decoding defaults."""
        return DecodingConfig(beam_size=self.beam_size, length_penalty=self.length_penalty, max_length=self.max_length)

    @property
    def run_name(self) -> str:
        """The run's directory name below `run_dir`."""
        name = self.name or self.output.rstrip("/").rsplit("/", 1)[-1]
        if not name or name in (".", ".."):
            raise ConfigurationError(f"no run name in --output {self.output!r}; give one with --name")
        if "/" in name or name == FEATURE_CACHE:
            raise ConfigurationError(
                f"--name must be the name of a directory below --run-dir, other than {FEATURE_CACHE}, got {name!r}"
            )
        return name

    @property
    def run_path(self) -> Path:
        """The run's directory."""
        return Path(self.run_dir).expanduser().absolute() / self.run_name

    @property
    def features_path(self) -> Path:
        """The directory of the feature cache, which all runs below `run_dir` share."""
        return self.run_path.with_name(FEATURE_CACHE)
