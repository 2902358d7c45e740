"""The options that choose objects: globs, sizes and a sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final

from raycap.bulk.config import Selection
from raycap.errors import ConfigurationError

_HASH_BYTES: Final = 8


def selector(selection: Selection) -> Callable[[str, int | None], bool]:
    """Whether an object of this key and size is taken; the limit is not looked at.

    Objects of unknown size pass --min-size and --max-size: nothing is left out on a guess. Raises ConfigurationError
    for a pattern that is none.
    """
    include, exclude = glob_regex(selection.include), glob_regex(selection.exclude)
    smallest, largest = selection.min_size, selection.max_size
    sample_below = int(selection.sample * 2 ** (8 * _HASH_BYTES)) if selection.sample < 1 else None
    seed = f"{selection.seed}\0".encode()

    def takes(key: str, size: int | None) -> bool:
        if size is not None and (size < smallest or (largest is not None and size > largest)):
            return False
        if include is not None and not include.fullmatch(key):
            return False
        if exclude is not None and exclude.fullmatch(key):
            return False
        if sample_below is None:
            return True
        digest = blake2b(seed + key.encode(errors="surrogatepass"), digest_size=_HASH_BYTES).digest()
        return int.from_bytes(digest, "big") < sample_below

    return takes


def glob_regex(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """What matches the whole of a key if one of the patterns does; None without patterns.

    `*` and `?` stop at `/`, `**` does not, and `**/` may be nothing at all; `[ab]`, `[a-z]` and `[!a]` stand for one
    character that is not `/`. A pattern without `/` is for the part of the key after its last `/`.
    """
    return re.compile("|".join(f"(?:{_translated(pattern)})" for pattern in patterns), re.DOTALL) if patterns else None


def _translated(pattern: str) -> str:
    if not pattern:
        raise ConfigurationError("expected a glob pattern like '*.jpg' or 'photos/**', got an empty one")
    for_name = "/" not in pattern
    parts, place = [], 0
    for wildcard in re.finditer(r"\*\*/|\*\*+|\*|\?|\[!?(?:\]|[^]])[^]]*\]", pattern):
        parts.append(re.escape(pattern[place : wildcard.start()]))
        parts.append(_wildcard(wildcard[0], pattern, wildcard.start(), for_name))
        place = wildcard.end()
    parts.append(re.escape(pattern[place:]))
    return ("(?:.*/)?" if for_name else "") + "".join(parts)


def _wildcard(text: str, pattern: str, place: int, for_name: bool) -> str:
    if text == "**/":
        return "(?:.*/)?" if place == 0 or pattern[place - 1] == "/" else ".*/"
    if text.startswith("*"):
        return ".*" if len(text) > 1 and not for_name else "[^/]*"
    if text == "?":
        return "[^/]"
    negated = text.startswith("[!") and len(text) > 3
    body = "".join(each if each == "-" else re.escape(each) for each in text[2 if negated else 1 : -1])
    try:
        re.compile(f"[{body}]")
    except re.error as error:
        raise ConfigurationError(
            f"the glob pattern {pattern!r} holds {text!r}: {error}; write ranges as [a-z]"
        ) from error
    return f"(?!/)[{'^' if negated else ''}{body}]"
