"""Words and their integer ids. Made once, from the training captions, and saved with the bundle."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from raycap.errors import ConfigurationError

PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # letters and digits of any script, with inner apostrophes and hyphens


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words; punctuation is dropped, as the COCO scorers drop it."""
    return _WORD.findall(caption.lower().replace("’", "'"))


def _frequent(captions: Iterable[str], min_count: int) -> list[str]:
    """Words seen at least `min_count` times, the most frequent first, ties in alphabetical order."""
    counts = Counter(word for caption in captions for word in tokenize(caption))
    return sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )


class Vocabulary:
    """A two-way map of words and ids. The ids 0 to 3 are <pad>, <bos>, <eos> and <unk>."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words` in id order, the four special tokens first.

        Raises ConfigurationError if those are missing, or a word is there twice, is empty or holds white space.
        """
        if tuple(words[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise ConfigurationError(
                f"a vocabulary must start with {', '.join(SPECIAL_TOKENS)}; it starts with {list(words[:4])}"
            )
        self.words: tuple[str, ...] = tuple(words)
        self._ids = {word: id_ for id_, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = [word for word, count in Counter(self.words).items() if count > 1]
            raise ConfigurationError(f"a vocabulary must hold each word once; twice: {', '.join(twice[:5])}")
        # Two captions that differ in their ids must differ as texts: so no word may look like none, or like two.
        odd = [word for word in self.words if word.split() != [word]]
        if odd:
            raise ConfigurationError(f"a vocabulary's words must not be empty or hold white space: {odd[:5]}")

    @classmethod
    def from_captions(cls, captions: Iterable[str], *, min_count: int = 5) -> Vocabulary:
        """All words seen at least `min_count` times, the most frequent first (ties in alphabetical order)."""
        kept = _frequent(captions, min_count)
        if not kept:
            raise ConfigurationError(f"no word occurs {min_count} times in the training captions; lower --min-count")
        return cls([*SPECIAL_TOKENS, *kept])

    def extended(self, captions: Iterable[str], *, min_count: int = 5) -> Vocabulary:
        """The same words with the same ids, and after them those of the captions that are new.

        As `from_captions`: words seen at least `min_count` times, the most frequent first. There may be none.
        """
        return Vocabulary([*self.words, *(word for word in _frequent(captions, min_count) if word not in self._ids)])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, *, max_length: int | None = None) -> list[int]:
        """<bos>, at most `max_length` word ids (None: all), <eos>. Words outside the vocabulary become <unk>."""
        ids = [self._ids.get(word, UNKNOWN) for word in tokenize(caption)[:max_length]]
        return [BOS, *ids, EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to the first <eos>, joined by spaces; <bos> and <pad> are left out."""
        words = []
        for id_ in ids:
            if id_ == EOS:
                break
            if id_ not in (PAD, BOS):
                words.append(self.words[id_])
        return " ".join(words)
