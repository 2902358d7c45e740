"""Words to ids and back."""

from __future__ import annotations

import pytest

from raycap.errors import ConfigurationError
from raycap.model.vocabulary import BOS, EOS, PAD, SPECIAL_TOKENS, UNKNOWN, Vocabulary, tokenize


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog runs.", ["a", "dog", "runs"]),
        ("Two men, one boat!", ["two", "men", "one", "boat"]),
        ("a man's t-shirt", ["a", "man's", "t-shirt"]),
        ("a man’s hat", ["a", "man's", "hat"]),
        ('"quoted" (and more)', ["quoted", "and", "more"]),
        ("- 3 dogs -- running", ["3", "dogs", "running"]),
        ("under_score", ["under", "score"]),
        ("Größe ÉTÉ 犬", ["größe", "été", "犬"]),
        ("<bos> <eos>", ["bos", "eos"]),
        ("", []),
        (" .,!? \n\t", []),
    ],
)
def test_tokenize(caption: str, words: list[str]) -> None:
    assert tokenize(caption) == words


def test_words_are_ordered_by_frequency_then_alphabet() -> None:
    captions = ["b a", "b a", "b c", "rare"]
    assert Vocabulary.from_captions(captions, min_count=1).words == (*SPECIAL_TOKENS, "b", "a", "c", "rare")
    assert Vocabulary.from_captions(captions, min_count=2).words == (*SPECIAL_TOKENS, "b", "a")
    assert Vocabulary.from_captions(reversed(captions), min_count=2).words == (*SPECIAL_TOKENS, "b", "a")


def test_new_words_come_after_the_old_ones() -> None:
    vocabulary = Vocabulary([*SPECIAL_TOKENS, "b", "a"])
    captions = ["c a d", "d e a", "c d f"]
    assert vocabulary.extended(captions, min_count=2).words == (*vocabulary.words, "d", "c")
    assert vocabulary.extended(captions, min_count=1).words == (*vocabulary.words, "d", "c", "e", "f")
    assert vocabulary.extended(captions, min_count=4).words == vocabulary.words
    assert vocabulary.words == (*SPECIAL_TOKENS, "b", "a")


def test_no_frequent_word_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigurationError, match=r"no word occurs 5 times .* lower --min-count"):
        Vocabulary.from_captions(["a dog"] * 4)


def test_encode_and_decode() -> None:
    vocabulary = Vocabulary([*SPECIAL_TOKENS, "a", "dog", "runs"])
    assert len(vocabulary) == 7
    assert vocabulary.encode("A dog runs.", max_length=20) == [BOS, 4, 5, 6, EOS]
    assert vocabulary.encode("A dog runs.", max_length=2) == [BOS, 4, 5, EOS]
    assert vocabulary.encode("a zebra", max_length=20) == [BOS, 4, UNKNOWN, EOS]
    assert vocabulary.encode("", max_length=20) == [BOS, EOS]
    assert vocabulary.decode([BOS, 4, 5, 6, EOS, 4, 4]) == "a dog runs"
    assert vocabulary.decode([4, PAD, UNKNOWN]) == "a <unk>"
    assert vocabulary.decode([]) == ""


def test_a_caption_cannot_name_a_special_token() -> None:
    vocabulary = Vocabulary.from_captions(["<eos> dog <pad>"], min_count=1)
    assert not {PAD, UNKNOWN} & set(vocabulary.encode("<eos> dog <pad>", max_length=9))
    assert vocabulary.encode("<eos> dog", max_length=9).count(EOS) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must start with <pad>, <bos>, <eos>, <unk>"),
        (["<pad>", "<eos>", "<bos>", "<unk>", "a"], "must start with"),
        ([*SPECIAL_TOKENS, "a", "b", "a"], "each word once; twice: a"),
        ([*SPECIAL_TOKENS, "a", ""], "must not be empty or hold white space"),
        ([*SPECIAL_TOKENS, "a dog"], "must not be empty or hold white space: .'a dog'."),
    ],
)
def test_a_broken_vocabulary_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Vocabulary(words)
