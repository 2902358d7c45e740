"""A model that answers requests: images of many, with options that differ, in one batch.

Shapes: B images, H x W pixels, R rows (captions) of one image, T tokens, V words.
"""

from __future__ import annotations

import asyncio
import copy
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycap.images import Preprocessing
from raycap.model.captioner import Captioner
from raycap.model.sampling import sample
from raycap.model.vocabulary import BOS, PAD
from raycap.serve.backend import Array, Job, ModelChangedError, ModelInfo, Result
from raycap.serve.batching import Batcher
from raycap.serve.schemas import Options

Texts = tuple[tuple[str, float], ...]


class OnlineCaptioner(Captioner):
    """A captioner that is told with each call how to caption."""

    def caption_with(self, pixels_BHWC: Tensor, options: Options) -> list[Texts]:
        """Captions of prepared images with their log-probabilities, the best first; of samples, the first drawn."""
        if options.samples:
            return [self._draw(pixels_1HWC, options) for pixels_1HWC in self._batch(pixels_BHWC).split(1)]
        searching = copy.copy(self)  # shares the network
        searching.decoding = self.decoding.updated(
            beam_size=options.beam_size, length_penalty=options.length_penalty, max_length=options.max_length
        )
        num_texts = None if options.alternatives is None else 1 + options.alternatives
        return [
            ((best.text, best.log_prob), *((other.text, other.log_prob) for other in best.alternatives))[:num_texts]
            for best in searching.caption(pixels_BHWC)
        ]

    @torch.inference_mode()
    def _draw(self, pixels_1HWC: Tensor, options: Options) -> Texts:
        """Captions of one image, which with a seed do not depend on the others of its batch; each text once."""
        generator = torch.Generator(self.device)
        _ = generator.seed() if options.seed is None else generator.manual_seed(options.seed)
        network: Any = self.network
        decoder, features = network.decoder, network.features(pixels_1HWC)
        tokens_RT, _ = sample(
            decoder,
            features,
            num_samples=1 + (options.alternatives or 0),
            max_length=options.max_length or self.decoding.max_length,
            generator=generator,
            temperature=1.0 if options.temperature is None else options.temperature,
            top_p=1.0 if options.top_p is None else options.top_p,
        )
        log_prob_R = _log_prob(decoder, features, tokens_RT)
        drawn = zip(map(self._vocabulary.decode, tokens_RT.tolist()), log_prob_R.tolist(), strict=True)
        return tuple({text: (text, log_prob) for text, log_prob in drawn}.values())


def _log_prob(decoder: Any, features: Any, tokens_RT: Tensor) -> Tensor:
    """The log-probability of each caption of one image under the model, whatever it was drawn from."""
    memory, state = decoder.remember(features)
    state = tuple(tensor.repeat_interleave(len(tokens_RT), 0) for tensor in state)
    previous_R = torch.full_like(tokens_RT[:, 0], BOS)
    log_prob_R = torch.zeros(len(tokens_RT), device=tokens_RT.device)
    for token_R in tokens_RT.unbind(1):
        step = decoder.step(previous_R, state, memory)
        state = step.state
        word_R1 = torch.log_softmax(step.logits_RV.float(), -1).gather(1, token_R[:, None])
        log_prob_R += word_R1.squeeze(1).masked_fill(token_R == PAD, 0.0)
        previous_R = token_R
    return log_prob_R


_Found = tuple[Texts, Array | None]
"""Captions of one image, and where the model looked."""


class ServedModel:
    """A `Backend` in this process: it batches what comes, and runs it in a thread."""

    def __init__(
        self,
        captioner: OnlineCaptioner,
        *,
        batch_size: int,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        """`thread`: a pool of one thread, if not a new one; ends with this. Best the one that made the captioner: on
        CPUs each thread that calls PyTorch gets threads of OpenMP beside it, and with more of these than cores, all of
        them sleep and wake at each step."""
        self._captioner = captioner
        self._thread = thread or ThreadPoolExecutor(1, "raycap-model")
        self._batcher = Batcher(self._run, max_size=batch_size)

    async def info(self) -> ModelInfo:
        """See `Backend.info`."""
        return ModelInfo(
            model_id=self._captioner.model_id,
            preprocessing=self._captioner.preprocessing,
            decoding=self._captioner.decoding,
        )

    async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
        """See `Backend.caption`."""
        return await self.caption_each(pixels_BHWC, preprocessing, [options] * len(pixels_BHWC))

    async def caption_each(
        self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Sequence[Options]
    ) -> list[Result]:
        """As `caption`, with each image's own options."""
        if preprocessing != self._captioner.preprocessing:
            raise ModelChangedError(await self.info())
        found = await asyncio.gather(*map(self._batcher.submit, map(Job, pixels_BHWC, options)))
        return [
            Result(
                captions=texts,
                attention_TRC=attention_TRC,
                model_id=self._captioner.model_id,
                queue_s=batched.queue_s,
                model_s=batched.run_s,
                batch_size=batched.batch_size,
            )
            for batched in found
            for texts, attention_TRC in [batched.answer]
        ]

    def is_suspect(self, longest_s: float) -> bool:
        """See `Batcher.is_suspect`."""
        return self._batcher.is_suspect(longest_s)

    async def close(self) -> None:
        """End its thread."""
        await self._batcher.close()
        self._thread.shutdown()

    async def _run(self, jobs: Sequence[Job]) -> list[_Found]:
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._answers, jobs)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            with suppress(Exception):
                await running  # nothing stops PyTorch: until then there is no room for another batch
            raise

    def _answers(self, jobs: Sequence[Job]) -> list[_Found]:
        """Each job's captions and attention. Equal options are searched for together."""
        found: list[_Found] = [((), None)] * len(jobs)
        groups: dict[Options, list[int]] = defaultdict(list)
        for number, job in enumerate(jobs):
            groups[job.options].append(number)
        for options, numbers in groups.items():
            pixels_BHWC = torch.from_numpy(np.stack([jobs[number].pixels_HWC for number in numbers]))
            texts = self._captioner.caption_with(pixels_BHWC, options)
            maps: Sequence[Array | None] | None = None
            if options.attention:
                maps = self._captioner.attention(pixels_BHWC, [best for (best, _), *_ in texts])
            for number, each, attention_TRC in zip(numbers, texts, maps or [None] * len(numbers), strict=True):
                found[number] = each, None if attention_TRC is None else attention_TRC[:-1]
        return found
