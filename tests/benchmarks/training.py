"""Training through Ray Train against a plain PyTorch loop, two workers against one, and two nodes, in one run.

    python -m tests.benchmarks.training --annotations captions.json --images images/

Ratios of images/s in the third epoch, of a model with the shipped bundle's decoder on cached features.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raycap.model.config import DecoderConfig
from raycap.model.decoder import AttentionDecoder
from raycap.model.vocabulary import PAD
from raycap.storage import open_store
from raycap.train.cider import CiderD
from raycap.train.config import TrainConfig
from raycap.train.features import Features, compute_features
from raycap.train.job import Job
from raycap.train.on_ray import train
from tests.commands import starting_commands
from tests.ray_cluster import cluster_of_cores

EPOCHS = 3
BATCH_SIZE = 64


def plain_loop(config: TrainConfig, num_threads: int) -> float:
    """Images/s of the third epoch of what anybody would write: one process, no Ray, the same model and batches."""
    torch.set_num_threads(num_threads)
    job = Job.open(config)
    features = _features(job)
    words, batch_size = job.start.vocabulary, config.batch_size
    decoder = AttentionDecoder(
        DecoderConfig(vocabulary_size=len(words), feature_size=1280, attention_size=config.attention_size)
    )
    averaged = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.learning_rate, fused=True)
    captions = [[torch.tensor(words.encode(c, max_length=20)) for c in image.captions] for image in job.train_images]
    rate = 0.0
    for _ in range(EPOCHS):
        started = time.monotonic()
        order = np.random.permutation(len(captions))
        steps = len(order) // batch_size
        for step in range(steps):
            images = order[step * batch_size : (step + 1) * batch_size]
            pairs = sorted(
                ((b, caption) for b, image in enumerate(images) for caption in captions[image]),
                key=lambda pair: -len(pair[1]),
            )
            tokens = pad_sequence([caption for _, caption in pairs], batch_first=True, padding_value=PAD)
            logits, targets = decoder(
                features.batch(images, np.random.randint(0, 2, len(images))),
                torch.tensor([b for b, _ in pairs]),
                tokens,
                torch.tensor([len(caption) for _, caption in pairs]),
            )
            loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.max_grad_norm)
            optimizer.step()
            averaged.update_parameters(decoder)
        rate = steps * batch_size / (time.monotonic() - started)
    return rate


def _features(job: Job) -> Features:
    return compute_features(
        job.start.single.encoder.eval(),
        job.start.preprocessing,
        job.train_store,
        [image.file_name for image in job.train_images],
        open_store(job.config.features_path),
        local_dir=Path(),
        flip=True,
    )


def through_ray(config: TrainConfig) -> float:
    """Images/s of the third epoch of the job."""
    train(config)
    return _last_rate(config)


def on_nodes(config: TrainConfig, cores: Sequence[int]) -> float:
    """Images/s of the third epoch of the job, on a Ray node for each core with a worker each."""
    with cluster_of_cores(cores) as cluster, starting_commands() as start:
        settings = {
            "annotations": config.annotations, "images": config.images, "val-annotations": config.val_annotations,
            "attention-size": config.attention_size, "epochs": config.epochs, "batch-size": config.batch_size,
            "output": config.output, "run-dir": config.run_dir, "num-workers": len(cores), "cpus-per-worker": 1,
            "ray-address": cluster.address,
        }  # fmt: skip
        options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        code, _, err = start("train", *options, env=cluster.env).finish(deadline_s=3600)
    assert code == 0, err
    return _last_rate(config)


def _last_rate(config: TrainConfig) -> float:
    events = EventAccumulator(f"{config.run_path}/tensorboard")
    events.Reload()
    return float(events.Scalars("train/images_per_s")[-1].value)


def reward_us(config: TrainConfig) -> float:
    """Microseconds that the reward of a sampled caption takes; other images' captions stand in for samples."""
    job = Job.open(config)
    captions = [[job.start.vocabulary.encode(each)[1:] for each in image.captions] for image in job.train_images]
    reward = CiderD(captions)
    started = time.process_time()
    for image, others in enumerate([*captions[1:], captions[0]]):
        for caption in others:
            reward.score(image, caption)
    return 1e6 * (time.process_time() - started) / sum(map(len, captions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--num-images", type=int, default=1000)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    content = json.loads(Path(options.annotations).read_text())
    content["images"] = content["images"][: options.num_images]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    with tempfile.TemporaryDirectory() as directory:
        few, little = Path(directory) / "train.json", Path(directory) / "val.json"
        few.write_text(json.dumps(content))
        content["images"] = content["images"][:20]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        little.write_text(json.dumps(content))

        def config(name: str, **settings: Any) -> TrainConfig:
            return TrainConfig(
                annotations=str(few), images=options.images, val_annotations=str(little), attention_size=256,
                epochs=EPOCHS, batch_size=BATCH_SIZE, output=f"{directory}/{name}", run_dir=f"{directory}/runs",
                **settings,
            )  # fmt: skip

        _features(Job.open(config("cache")))
        rates = {
            "plain loop, 2 threads, before": plain_loop(config("plain"), 2),
            "1 worker of 2 threads": through_ray(config("one2", cpus_per_worker=2)),
            "plain loop, 2 threads, after": plain_loop(config("plain"), 2),
            "plain loop, 1 thread, before": plain_loop(config("plain"), 1),
            "1 worker of 1 thread, before": through_ray(config("one1", cpus_per_worker=1)),
            "plain loop, 1 thread, after": plain_loop(config("plain"), 1),
            "2 workers of 1 thread": through_ray(config("two1", cpus_per_worker=1, num_workers=2)),
            "1 worker of 1 thread, after": through_ray(config("one1-again", cpus_per_worker=1)),
            "1 node of 1 core, before": on_nodes(config("node"), cores[:1]),
            "2 nodes of 1 core": on_nodes(config("nodes"), cores),
            "1 node of 1 core, after": on_nodes(config("node-again"), cores[:1]),
        }
        before, ray_2, after, before_1, ray_1, after_1, two, one_after, node, nodes, node_after = rates.values()
        rates["reward, microseconds a caption"] = reward_us(config("reward"))
    rates["Ray over plain loop, 2 threads"] = ray_2 / ((before + after) / 2)
    rates["Ray over plain loop, 1 thread"] = ray_1 / ((before_1 + after_1) / 2)
    rates["2 workers over 1"] = two / ((ray_1 + one_after) / 2)
    rates["2 nodes over 1"] = nodes / ((node + node_after) / 2)
    print(json.dumps({name: round(rate, 3) for name, rate in rates.items()}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
