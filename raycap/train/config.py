"""The settings of a training run. Plain data, checked before any worker starts; no torch and no Ray here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from raycap.errors import ConfigurationError
from raycap.model.config import DecoderKind, DecodingConfig, Precision, WeightsDtype, require
from raycap.storage import S3Options, is_s3

Resize = Literal["squash", "crop", "pad"]
Baseline = Literal["mean", "greedy"]
StageKind = Literal["cross_entropy", "fine_tune", "self_critical"]
FEATURE_CACHE = "features"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a training with a loss, a learning rate schedule and an optimizer of its own.

    It begins with the weights that were best so far.
    """

    kind: StageKind
    """cross_entropy: the decoder learns, over features of the CNN as it is. fine_tune: the CNN learns too.
    self_critical: the decoder learns from the CIDEr-D of captions it samples."""
    epochs: int
    learning_rate: float
    warmup_steps: int
    encoder_learning_rate: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a captioner on captioned images and write a model bundle.

    Stages, each begun with the best weights so far: cross-entropy on the features of a frozen CNN (--epochs), with a
    CNN that learns too (--fine-tune-epochs), and self-critical training on CIDEr-D (--scst-epochs).
    """

    annotations: str
    """COCO captions JSON of the training images, local or s3://; or a Karpathy JSON with its split, such as
    dataset_coco.json#train+restval."""
    images: str
    """Directory or s3:// prefix of the training images."""
    val_annotations: str
    """The same of the validation images, which choose the best epoch."""
    val_images: str | None = None
    """Directory or s3:// prefix of the validation images; by default the same as --images."""
    output: str
    """Where the bundle goes: a directory or s3:// prefix."""

    init: str | None = None
    """Bundle to start from, instead of ImageNet weights and a new decoder; its architecture, image size and words are
    kept."""
    extend_vocabulary: bool = False
    """With --init: add the words that the training captions hold at least --min-count times."""
    encoder: str = "efficientnet_lite0"
    """CNN with ImageNet weights: efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, timm:NAME or
    torchvision:NAME."""
    size_px: int | None = None
    """Side of the square that images are resized to, in pixels; by default the encoder's own."""
    resize: Resize = "squash"
    """How an image becomes a square: squash ignores the aspect ratio, crop keeps the centre, pad keeps everything."""
    flip: bool = True
    """Train on mirrored images too."""
    crop: float = 0.9
    """While the CNN learns, train on random crops with this share of the image's side; 1: on whole images."""
    frozen_stages: int = 0
    """While the CNN learns, its stem and this many stages after it stay as they are, which saves their backward pass.
    EfficientNets have 7 stages, ResNets 4."""
    decoder: DecoderKind = "attention"
    """attention: two-layer top-down attention LSTM. att2in: one LSTM that the attended feature enters. show_tell: the
    original Show and Tell."""
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
    """Passes over the training images with cross-entropy and a frozen CNN."""
    fine_tune_epochs: int = 0
    """Passes after these in which the CNN learns too."""
    scst_epochs: int = 0
    """Passes after these of self-critical training on CIDEr-D (Rennie et al. 2017), with a frozen CNN."""
    patience: int | None = None
    """A stage ends after this many epochs without a better validation CIDEr-D; by default it does not."""
    batch_size: int = 20
    """Images in a batch, over all workers; each comes with all its captions."""
    images_per_pass: int | None = None
    """Most images that a worker takes at a time, to need less memory: it cuts its share of a batch into parts. By
    default the whole share."""
    learning_rate: float = 6e-4
    """Peak of the Adam learning rate with cross-entropy."""
    fine_tune_learning_rate: float = 1e-4
    """Peak of the decoder's learning rate while the CNN learns."""
    encoder_learning_rate: float = 2e-5
    """Peak of the CNN's learning rate while it learns."""
    scst_learning_rate: float = 5e-5
    """Peak of the learning rate in self-critical training."""
    warmup_steps: int = 200
    """Batches over which a stage's learning rate climbs from 0 to its peak; then it falls to 0 along a half cosine."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread over all words (Szegedy et al. 2016)."""
    scheduled_sampling: float = 0.0
    """Share of input words that are the model's own samples instead of the reference's at the end of the cross-entropy
    stages, growing from 0 (Bengio et al. 2015, in the parallel form of Mihaylova and Martins 2019)."""
    scst_samples: int = 5
    """Captions sampled of each image in self-critical training."""
    scst_temperature: float = 0.5
    """The scores are divided by it before captions are sampled and learned from in self-critical training. Models that
    were trained with label smoothing say too much nonsense at 1."""
    scst_baseline: Baseline = "mean"
    """What a sample's CIDEr-D is compared with: mean of the image's other samples (Luo 2020), or the greedy caption's
    (Rennie et al. 2017)."""
    max_grad_norm: float = 5.0
    """Gradients with a larger norm are scaled down to it."""
    ema_decay: float = 0.999
    """The bundle holds an exponential moving average of the weights with this decay a batch; 0 turns it off."""
    precision: Precision = "auto"
    """Of the arithmetic (weights stay float32). auto: bfloat16 on a GPU that has it, else float32."""
    seed: int = 0
    """Of the weights, the order of the images, dropout and samples."""

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
    min_workers: int | None = None
    """Go on with as few workers as this when nodes are lost, and with more when they come back; by default not."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: int | None = None
    """CPU cores, and so threads, of each worker; by default the cluster's cores in equal parts, or 1 with --use-gpu."""
    run_dir: str = "runs"
    """Where the runs are kept: checkpoints, TensorBoard files and the feature cache. An s3:// prefix, or a directory
    that all machines share."""
    cache_dir: str | None = None
    """Directory of each machine for copies of a feature cache that is on S3; by default raycap-features in the system's
    temporary directory."""
    name: str | None = None
    """Name of the run; by default that of the output. Starting a run of the same name again resumes it."""
    checkpoint_every: int = 0
    """Batches between checkpoints within an epoch; 0: only after each epoch."""
    keep_checkpoints: int = 2
    """Checkpoints of the best epochs that are kept, besides the last one."""
    max_failures: int = 3
    """How often lost workers are replaced, going on from the last checkpoint, before the training fails; -1: always."""
    log_every_s: float = 15.0
    """Seconds between progress lines."""
    dry_run: bool = False
    """Check data, shapes and one batch on this machine, without Ray, say what was found, and stop."""
    ray_address: str | None = None
    """Ray cluster to train on; by default RAY_ADDRESS, else Ray starts on this machine."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        self._require_ranges()
        for name, allowed in (
            ("resize", Resize), ("decoder", DecoderKind), ("weights_dtype", WeightsDtype),
            ("precision", Precision), ("scst_baseline", Baseline),
        ):  # fmt: skip
            value, values = getattr(self, name), get_args(allowed)
            require(value in values, f"{_flag(name)} must be one of {', '.join(values)}, got {value!r}")
        require(
            sum(self._epochs) >= 1,
            "nothing to do: --epochs, --fine-tune-epochs and --scst-epochs are all 0; give one of them",
        )
        require(
            self.init is not None or self.epochs + self.fine_tune_epochs > 0,
            "self-critical training needs a model that captions already: give --epochs or --init",
        )
        require(
            self.num_workers <= self.batch_size,
            f"--batch-size {self.batch_size} must be at least --num-workers {self.num_workers}: each takes a part",
        )
        require(
            self.scst_baseline == "greedy" or self.scst_samples >= 2,
            f"--scst-samples must be at least 2 with --scst-baseline mean, got {self.scst_samples}",
        )
        if self.min_workers is not None:
            require(
                1 <= self.min_workers <= self.num_workers,
                f"--min-workers must be from 1 to --num-workers {self.num_workers}, got {self.min_workers}",
            )
        if self.init is None:
            require(not self.extend_vocabulary, "--extend-vocabulary goes with --init")
        else:
            default = TrainConfig.__dataclass_fields__
            for name in KEPT_BY_INIT:
                require(
                    getattr(self, name) == default[name].default,
                    f"{_flag(name)} goes without --init: a bundle keeps its architecture and image size",
                )
        require(bool(self.output), "--output must name a directory or s3:// prefix")
        _ = self.decoding, self.run_name  # both check themselves

    def _require_ranges(self) -> None:
        """Raise ConfigurationError for a number that cannot be."""
        at_least = dict.fromkeys(("batch_size", "images_per_pass", "hidden_size", "attention_size", "min_count"), 1)
        at_least |= dict.fromkeys(("max_length", "num_workers", "scst_samples", "keep_checkpoints"), 1)
        at_least |= dict.fromkeys(("patience", "cpus_per_worker"), 1)
        at_least |= dict.fromkeys(("epochs", "fine_tune_epochs", "scst_epochs", "warmup_steps", "weight_decay"), 0)
        at_least |= dict.fromkeys(("seed", "checkpoint_every", "frozen_stages"), 0) | {"max_failures": -1}
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value is None or value >= least, f"{_flag(name)} must be at least {least}, got {value}")
        for name in (
            "learning_rate",
            "fine_tune_learning_rate",
            "scst_learning_rate",
            "scst_temperature",
            "max_grad_norm",
        ):
            require(getattr(self, name) > 0, f"{_flag(name)} must be positive, got {getattr(self, name)}")
        require(
            self.encoder_learning_rate >= 0,
            f"--encoder-learning-rate must not be negative, got {self.encoder_learning_rate}",
        )
        for name in ("dropout", "label_smoothing", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{_flag(name)} must be in [0, 1), got {getattr(self, name)}")
        require(
            0 <= self.scheduled_sampling <= 1,
            f"--scheduled-sampling must be from 0 to 1, got {self.scheduled_sampling}",
        )
        require(0 < self.crop <= 1, f"--crop must be above 0 and at most 1, got {self.crop}")
        if self.size_px is not None:
            require(1 <= self.size_px <= 4096, f"--size-px must be from 1 to 4096, got {self.size_px}")

    @property
    def _epochs(self) -> tuple[int, int, int]:
        return self.epochs, self.fine_tune_epochs, self.scst_epochs

    @property
    def stages(self) -> list[Stage]:
        """The stages with at least one epoch, in their order."""
        stages = [
            Stage(
                kind="cross_entropy",
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                warmup_steps=self.warmup_steps,
            ),
            Stage(
                kind="fine_tune",
                epochs=self.fine_tune_epochs,
                learning_rate=self.fine_tune_learning_rate,
                warmup_steps=self.warmup_steps,
                encoder_learning_rate=self.encoder_learning_rate,
            ),
            Stage(
                kind="self_critical",
                epochs=self.scst_epochs,
                learning_rate=self.scst_learning_rate,
                warmup_steps=self.warmup_steps,
            ),
        ]
        return [stage for stage in stages if stage.epochs]

    @property
    def decoding(self) -> DecodingConfig:
        """The bundle's decoding defaults."""
        return DecodingConfig(beam_size=self.beam_size, length_penalty=self.length_penalty, max_length=self.max_length)

    @property
    def run_name(self) -> str:
        """The run's name below `run_dir`."""
        name = self.name or self.output.rstrip("/").rsplit("/", 1)[-1]
        if not name or name in (".", ".."):
            raise ConfigurationError(f"no run name in --output {self.output!r}; give one with --name")
        if "/" in name or name == FEATURE_CACHE:
            raise ConfigurationError(
                f"--name must be the name of a directory below --run-dir, other than {FEATURE_CACHE}, got {name!r}"
            )
        return name

    @property
    def run_root(self) -> str:
        """`run_dir` as an s3:// prefix or an absolute path."""
        return self.run_dir.rstrip("/") if is_s3(self.run_dir) else str(Path(self.run_dir).expanduser().absolute())

    @property
    def run_path(self) -> str:
        """Where the run's own files are."""
        return f"{self.run_root}/{self.run_name}"

    @property
    def features_path(self) -> str:
        """Where the feature cache is, which all runs below `run_dir` share."""
        return f"{self.run_root}/{FEATURE_CACHE}"


KEPT_BY_INIT = ("encoder", "size_px", "resize", "decoder", "hidden_size", "attention_size")
"""What a bundle decides when a training starts from one."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
