"""Captions to the words that the scorers compare: lower case, split the Penn Treebank way, without punctuation.

`ptb_tokenize` asks the Stanford tokenizer that every published score went through, and needs Java. `python_tokenize`
behaves like it on captions and needs nothing; it does not know URLs, e-mail addresses, mark-up with blanks in it, HTML
entities, or currency signs other than "$".
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from raycap.errors import ConfigurationError
from raycap.evaluate.java import NO_JAVA, UTF8, find_java, jar, java_environment

__all__ = ["PUNCTUATION", "ptb_tokenize", "python_tokenize"]

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Dropped tokens, the list of `pycocoevalcap`. Dropped after lower-casing, so "-lrb-" stays, with both tokenizers."""

_PTB_TIMEOUT_S = 300.0
"""A million captions take about 30 s, and the start of Java 0.3 s."""


def ptb_tokenize(captions: Sequence[str], *, timeout_s: float = _PTB_TIMEOUT_S) -> list[str]:
    """Words of each caption joined by blanks, as `pycocoevalcap.tokenizer.PTBTokenizer` gives them.

    That class writes its input beside its jar, which a read-only installation forbids, and lets captions with line
    separators in them shift all later ones; here the captions go through a pipe, one on each line.

    Raises:
        ConfigurationError: there is no Java, or the tokenizer fails, hangs or loses a line.
    """
    java = find_java()
    if java is None:
        raise ConfigurationError(f"the PTB tokenizer needs Java and {NO_JAVA}, or use tokenizer='python'")
    path = jar("pycocoevalcap.tokenizer", "stanford-corenlp-3.4.1.jar")
    command = [java, *UTF8, "-cp", str(path), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = [" ".join(caption.split()) for caption in captions]
    advice = "use tokenizer='python' to score without Java"
    try:
        result = subprocess.run(
            command,
            input="".join(f"{line}\n" for line in lines).encode("utf-8", "replace"),
            capture_output=True,
            timeout=timeout_s,
            env=java_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"the PTB tokenizer was stopped: no result for {len(lines)} captions after {timeout_s:g} s; {advice}"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"the PTB tokenizer cannot be started: {error}; {advice}") from error
    tokenized = result.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if result.returncode != 0 or len(tokenized) != len(lines):
        said = result.stderr.decode("utf-8", "replace").strip()[-500:] or "nothing"
        raise ConfigurationError(
            f"the PTB tokenizer gave {len(tokenized)} lines for {len(lines)} captions and ended with code "
            f"{result.returncode}, saying: {said}; {advice}"
        )
    return [_without_punctuation(line.rstrip().split(" ")) for line in tokenized]


def python_tokenize(captions: Sequence[str]) -> list[str]:
    """Words of each caption joined by blanks, nearly as `ptb_tokenize` gives them, without Java."""
    return [_without_punctuation(_split(caption)) for caption in captions]


def _without_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in PUNCTUATION)


_TYPOGRAPHIC = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2026": "...",
        "\u00ad": None,  # soft hyphen
        "\ufeff": None,  # byte order mark
    }
)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\u200b\U00010000-\U0010ffff]")
"""What the Stanford tokenizer calls untokenizable and drops: control characters and emoji."""

_CLITIC = r"(?:'(?:s|m|d|re|ve|ll)|n't)(?!\w)"
_SPLITS = [
    (re.compile(rf"(?<=\w|\.)(?={_CLITIC})", re.IGNORECASE), " "),  # man|'s  does|n't
    (re.compile(r"(?<=\w)('n')(?=\w)", re.IGNORECASE), r" \1 "),  # rock|'n'|roll
    (
        re.compile(r"\b(can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|lem(?=me\b)|gim(?=me\b))", re.IGNORECASE),
        r"\1 ",
    ),
    (re.compile(r"('t)(?=is\b|was\b)", re.IGNORECASE), r"\1 "),  # 't|is
]

# The first alternative that matches at a place wins.
_TOKEN = re.compile(
    rf"""
      </?[a-z][^<>\s]*>                                # <unk>
    | [:;]-?[()]                                       # :)
    | \.{{2,}} | \.\ \.\ \.
    | -{{2,4}}
    | {_CLITIC}
    | 't(?=\ (?:is|was)\b) | 'n' | y'(?=all\b)
    | '(?:\d0s|em|cause|til)(?!\w)                     # '80s
    | [odl]'[^\W\d_]{{2,}} | ma'am                     # o'clock
    | (?<!\w) (?: (?:[a-z]\.)+                         # p.m.  vitamin c.
        | (?:mrs?|ms|drs?|prof|gen|lt|capt|sgt|col|rev|gov|sen|rep|st|mt|ft|etc|vs|jr|sr|bros|inc|co|corp|ltd
            |ave|blvd|rd|jan|feb|aug|sept?|oct|nov|dec|mon|tues?|wed|thurs?|fri|ph\.d)\.
        | nos?\.(?=\ ?\d)
      ) (?!\w)
    | \d+:\d+                                          # 10:30
    | (?<!\w) [-+]? (?:\d+(?:[,.]\d+)*|\.\d+) (?!\w|[-/]\w)  # 1,000  -5
    | (?-i:[A-Z]{{1,2}}&[A-Z]\b)                        # R&B, but not r&b
    | (?:@|\#(?=[^\W\d_]))? [\w\u0300-\u036f]+ (?: [-/@.] [\w\u0300-\u036f]+ )*
    | [!?]+ | \*{{2,}}
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN = {'"': "''", "\u2013": "--", "\u2014": "--"}


def _split(caption: str) -> list[str]:
    """Penn Treebank tokens in lower case, punctuation included."""
    text = " ".join(_UNPRINTABLE.sub(" ", caption.translate(_TYPOGRAPHIC)).split())
    for boundary, replacement in _SPLITS:
        text = boundary.sub(replacement, text)
    tokens = []
    for token in _TOKEN.findall(text):
        if len(token) > 1 and not token.strip(". "):
            token = "..."
        token = _WRITTEN.get(token, token)
        if token[-1] in _BRACKETS:
            token = token[:-1] + _BRACKETS[token[-1]]
        tokens.append(token.lower())
    return tokens
