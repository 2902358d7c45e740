"""Caption metrics: values to check by hand, equality with the official scorers, and Java that misbehaves."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raycap.errors import ConfigurationError
from raycap.evaluate import ALL_METRICS, Scores, score_captions
from raycap.evaluate.java import find_java, jar
from raycap.evaluate.meteor import meteor
from raycap.evaluate.table import scores_table
from raycap.evaluate.tokenizers import ptb_tokenize, python_tokenize

needs_java = pytest.mark.skipif(find_java() is None, reason="needs a Java runtime on the PATH")

# What the Stanford tokenizer gives: test_ptb_gives_the_golden_tokens holds it to that wherever there is Java.
GOLDEN_TOKENS = {
    "": "",
    " \t ": "",
    "A man's dog doesn't run.": "a man 's dog does n't run",
    "the girl 's dog does n't": "the girl 's dog does n't",
    "I'm sure they've seen we'll CAN'T go": "i 'm sure they 've seen we 'll ca n't go",
    "cannot gonna wanna gotta lemme 'tis": "can not gon na wan na got ta lem me 't is",
    "A black/white dog, well-known; a t-shirt - red -- etc": "a black/white dog well-known a t-shirt red etc",
    "dog- -dog a\u2014b c\u2013d": "dog dog a b c d",
    "(in parens) [x] {y}": "-lrb- in parens -rrb- -lsb- x -rsb- -lcb- y -rcb-",
    "50% #3 #tag @home A&W AT&T at&t R2-D2": "50 % # 3 #tag @home a&w at&t at & t r2-d2",
    "Mr. Smith in St. Louis, U.S. at 5 p.m. vs. No. 5 etc.": "mr. smith in st. louis u.s. at 5 p.m. vs. no. 5 etc.",
    "vitamin C. And the number 5.": "vitamin c. and the number 5",
    "a 10-year-old in the 1980's, '80s or 1980s": "a 10-year-old in the 1980 's '80s or 1980s",
    "1,000 people 3.5 1/2 10:30 10:30am -5 747-400 24/7": "1,000 people 3.5 1/2 10:30 10:30 am -5 747-400 24/7",
    "wow!! what?! hello...there . . . dogs.": "wow !! what ?! hello there dogs",
    "dog.Cat dog,cat dog;cat dog:cat": "dog.cat dog cat dog cat dog cat",
    "\"hello\" 'hi' \u201cquoted\u201d \u2018x\u2019 don\u2019t ``y''": "hello hi quoted x do n't y",
    "dogs' tails at 5 o'clock, rock 'n' roll, y'all": "dogs tails at 5 o'clock rock 'n' roll y' all",
    "a caf\u00e9, na\u00efve jalape\u00f1o": "a caf\u00e9 na\u00efve jalape\u00f1o",
    "<unk> a < b > c *": "<unk> a < b > c *",
    "smile \U0001f600 now\x01": "smile now",
}

REFERENCES = {
    11: ["A brown dog runs on the grass.", "The dog is running in a field!", "a dog's day out"],
    5: ["Two men are playing football", "Men in red shirts play a game of football ."],
    8: ["A little girl, in a pink dress, climbs the stairs.", "a child goes into a wooden building"],
    2: ["people at the beach", "a crowd of people on a sandy beach near the water"],
}
CANDIDATES = {
    2: "people walking on a beach",
    5: "two men play football",
    8: "",
    11: "a brown dog is running on the grass",
}

GOLDEN_METEOR = 0.2782088230689405
GOLDEN_METEOR_PER_IMAGE = {11: 0.48548461491460776, 5: 0.8582693504876532, 8: 0.0, 2: 0.23548835047709696}


def score(references: Any, candidates: Any, *metrics: str, tokenizer: Any = "python") -> dict[str, float]:
    return score_captions(references, candidates, tokenizer=tokenizer, metrics=metrics).values


@pytest.fixture
def no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Put a `java` on the PATH that answers -version and otherwise runs the given shell lines."""

    def install(script: str) -> Path:
        java = tmp_path / "java"
        java.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit 0\necho $$ > "{tmp_path}/pid"\n{script}\n')
        java.chmod(java.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path / "pid"

    yield install


def is_gone(pid_file: Path) -> bool:
    """Whether the process has ended and was waited for: a zombie still takes signal 0."""
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


# Tokens


@pytest.mark.parametrize(("caption", "tokens"), GOLDEN_TOKENS.items())
def test_python_gives_the_golden_tokens(caption: str, tokens: str) -> None:
    assert python_tokenize([caption]) == [tokens]


@needs_java
def test_ptb_gives_the_golden_tokens() -> None:
    assert dict(zip(GOLDEN_TOKENS, ptb_tokenize(list(GOLDEN_TOKENS)), strict=True)) == GOLDEN_TOKENS


@needs_java
def test_ptb_gives_the_tokens_of_pycocoevalcap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.tokenizer import ptbtokenizer

    name = "stanford-corenlp-3.4.1.jar"  # it writes beside its own file, so it gets a place where that is allowed
    (tmp_path / name).symlink_to(jar("pycocoevalcap.tokenizer", name))
    monkeypatch.setattr(ptbtokenizer, "__file__", str(tmp_path / "ptbtokenizer.py"))
    captions = [caption for captions in REFERENCES.values() for caption in captions]
    official = ptbtokenizer.PTBTokenizer().tokenize({0: [{"caption": caption} for caption in captions]})
    assert ptb_tokenize(captions) == official[0]


@needs_java
@pytest.mark.parametrize("separator", ["\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_a_line_separator_inside_a_caption_shifts_no_other(separator: str) -> None:
    captions = [f"a dog{separator}runs", "a cat"]
    assert ptb_tokenize(captions) == python_tokenize(captions) == ["a dog runs", "a cat"]


def test_half_a_surrogate_pair_is_no_error() -> None:
    captions = ["a \ud83d dog", "a cat"]
    assert score({1: [captions[1]]}, {1: captions[0]}, "bleu_1", tokenizer="auto")["bleu_1"] > 0


@needs_java
def test_nothing_is_written_beside_the_package() -> None:
    """A file made and removed again shows in its directory's time; an installation may be read-only, even to root."""
    directories = [jar("pycocoevalcap.tokenizer", "stanford-corenlp-3.4.1.jar").parent]
    directories.append(jar("pycocoevalcap.meteor", "meteor-1.5.jar").parent)
    before = [directory.stat().st_mtime_ns for directory in directories]
    score_captions(REFERENCES, CANDIDATES, tokenizer="ptb", metrics=["bleu_1"])
    assert [directory.stat().st_mtime_ns for directory in directories] == before


# Values checked by hand


def test_bleu_of_a_perfect_caption_is_1() -> None:
    values = score({1: ["something else", "a dog runs on grass"]}, {1: "A dog runs on grass."}, *ALL_METRICS[:4])
    assert values == pytest.approx(dict.fromkeys(ALL_METRICS[:4], 1.0))


def test_bleu_punishes_brevity() -> None:
    """3 words of 6, all right: exp(1 - 6 / 3)."""
    assert score({1: ["a dog runs on wet grass"]}, {1: "a dog runs"}, "bleu_1")["bleu_1"] == pytest.approx(math.exp(-1))


def test_bleu_counts_a_word_no_oftener_than_a_reference_has_it() -> None:
    """Papineni et al. 2002, section 2.1: 2/7."""
    references = ["The cat is on the mat.", "There is a cat on the mat."]
    assert score({1: references}, {1: "the the the the the the the."}, "bleu_1")["bleu_1"] == pytest.approx(2 / 7)


@pytest.mark.parametrize(("candidate", "value"), [("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4)])
def test_rouge_l_is_the_longest_common_subsequence(candidate: str, value: float) -> None:
    """Lin 2004, section 3.1. Precision and recall are equal here, and so is their F."""
    assert score({1: ["police killed the gunman"]}, {1: candidate}, "rouge_l")["rouge_l"] == pytest.approx(value)


def test_cider_d_of_the_reference_itself_is_10() -> None:
    references = {1: ["a brown dog runs fast"], 2: ["two men play football"]}
    scores = score_captions(references, {1: "a brown dog runs fast", 2: "two men play football"}, metrics=["cider_d"])
    assert scores.values["cider_d"] == pytest.approx(10)


def test_cider_d_by_hand() -> None:
    """No word is in both images, so all weights are equal. Of n-grams of 1 to 4 words, 4, 3, 2, 1 of 5, 4, 3, 2 agree,
    a cosine of sqrt((5 - n) / (6 - n)). The caption is one word short: a factor of exp(-1 / (2 * 6 ** 2))."""
    references = {1: ["red dog runs fast today"], 2: ["two men play football"]}
    scores = score_captions(
        references, {1: "red dog runs fast", 2: "two men play football"}, tokenizer="python", metrics=["cider_d"]
    )
    cosine = sum(math.sqrt((5 - n) / (6 - n)) for n in (1, 2, 3, 4)) / 4
    assert scores.per_image[1]["cider_d"] == pytest.approx(10 * cosine * math.exp(-1 / 72))
    assert scores.per_image[2]["cider_d"] == pytest.approx(10)
    assert scores.values["cider_d"] == pytest.approx((scores.per_image[1]["cider_d"] + 10) / 2)


def test_cider_d_of_one_image_warns_that_it_is_0(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="raycap.evaluate"):
        assert score({1: ["a dog runs fast"]}, {1: "a dog runs fast"}, "cider_d") == {"cider_d": 0}
    assert "one image alone" in caplog.text


def test_an_empty_caption_scores_0() -> None:
    scores = score_captions(REFERENCES, CANDIDATES, tokenizer="python", metrics=["bleu_4", "rouge_l", "cider_d"])
    assert scores.per_image[8] == pytest.approx({"bleu_4": 0, "rouge_l": 0, "cider_d": 0}, abs=1e-9)
    empty = score_captions(REFERENCES, dict.fromkeys(REFERENCES, ""), tokenizer="python", metrics=["bleu_1", "cider_d"])
    assert empty.values == pytest.approx({"bleu_1": 0, "cider_d": 0}, abs=1e-9)


# Official scorers, and the order of images


@needs_java
def test_bleu_rouge_and_cider_equal_the_official_scorers(capfd: pytest.CaptureFixture[str]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    metrics = [name for name in ALL_METRICS if name != "meteor"]
    scores = score_captions(REFERENCES, CANDIDATES, metrics=metrics)
    assert capfd.readouterr() == ("", "")
    assert scores.tokenizer == "ptb"
    assert list(scores.values) == metrics

    references = {image_id: ptb_tokenize(captions) for image_id, captions in REFERENCES.items()}
    candidates = {image_id: ptb_tokenize([CANDIDATES[image_id]]) for image_id in REFERENCES}
    bleu, bleu_per_image = Bleu(4).compute_score(references, candidates, verbose=0)
    expected: dict[str, Any] = dict(zip(ALL_METRICS[:4], zip(bleu, bleu_per_image, strict=True), strict=True))
    expected["rouge_l"] = Rouge().compute_score(references, candidates)
    expected["cider_d"] = Cider().compute_score(references, candidates)
    for name in metrics:
        value, per_image = expected[name]
        assert scores.values[name] == value, name
        assert [scores.per_image[image_id][name] for image_id in REFERENCES] == list(per_image), name


@needs_java
def test_meteor_equals_the_official_wrapper() -> None:
    """The values are what `pycocoevalcap.meteor.meteor.Meteor` gives; to make them again, after tokenizing as above:
    `Meteor().compute_score(references, candidates)`. Starting METEOR takes 4 to 10 s, so it is started once."""
    scores = score_captions(REFERENCES, CANDIDATES, metrics=["meteor"])
    assert scores.values == {"meteor": GOLDEN_METEOR}
    assert {image_id: values["meteor"] for image_id, values in scores.per_image.items()} == GOLDEN_METEOR_PER_IMAGE


def test_scores_do_not_depend_on_the_order_of_the_candidates() -> None:
    shuffled = {image_id: CANDIDATES[image_id] for image_id in (8, 11, 2, 5)}
    metrics = ["bleu_4", "rouge_l", "cider_d"]
    scores = score_captions(REFERENCES, CANDIDATES, tokenizer="python", metrics=metrics)
    assert scores == score_captions(REFERENCES, shuffled, tokenizer="python", metrics=metrics)
    assert list(scores.per_image) == list(REFERENCES)


# Java: none, hung, dead


@pytest.mark.usefixtures("no_java")
def test_without_java_scores_are_labelled_and_meteor_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="raycap.evaluate"):
        scores = score_captions(REFERENCES, CANDIDATES)
    assert scores.tokenizer == "python"
    assert scores.values.get("meteor") is None
    assert scores.unavailable == ("meteor",)
    assert scores.to_dict()["scores"]["meteor"] is None
    assert set(scores.values) == set(ALL_METRICS) - {"meteor"}
    assert "METEOR is left out: no working Java was found" in caplog.text


@pytest.mark.usefixtures("no_java")
def test_asked_for_by_name_ptb_says_that_java_is_missing() -> None:
    with pytest.raises(ConfigurationError, match=r"the PTB tokenizer needs Java.*or use tokenizer='python'"):
        score_captions(REFERENCES, CANDIDATES, tokenizer="ptb")
    with pytest.raises(ConfigurationError, match="METEOR needs Java"):
        meteor([["a dog"]], ["a dog"])


def test_a_java_that_does_not_run_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\necho 'Unable to locate a Java Runtime' >&2\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_java() is None


def test_the_fast_path_starts_no_process(fake_java: Any) -> None:
    pid_file = fake_java("exit 1")
    score_captions(REFERENCES, CANDIDATES, tokenizer="python", metrics=("cider_d",))
    assert not pid_file.exists()


def test_a_meteor_that_hangs_is_killed(fake_java: Any) -> None:
    pid_file = fake_java("while :; do read line; done")
    with pytest.raises(
        ConfigurationError, match=r"METEOR was stopped: no scores of 1 images after 0\.5 s; leave 'meteor'"
    ):
        meteor([["a dog"]], ["a dog"], timeout_s=0.5)
    assert is_gone(pid_file)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'Could not reserve enough space' >&2; exit 1",
            r"exit code 1\), saying: Could not reserve enough space; it n",
        ),
        ("read line; echo 1 2 3; read line; echo Error: bad; read line", r"METEOR's Java process failed"),
        ("read line; echo 1 2 3; exit 0", r"METEOR's Java process failed \(exit code 0\), saying: nothing"),
    ],
    ids=["dies", "no number", "ends early"],
)
def test_a_meteor_that_fails_says_so(fake_java: Any, script: str, message: str) -> None:
    pid_file = fake_java(script)
    with pytest.raises(ConfigurationError, match=message):
        meteor([["a dog"]], ["a dog"])
    assert is_gone(pid_file)


def test_meteor_speaks_its_protocol_and_ends_its_process(fake_java: Any, tmp_path: Path) -> None:
    pid_file = fake_java(
        f'read -r a; echo "$a" >> "{tmp_path}/heard"; echo 1 2; read -r a; echo "$a" >> "{tmp_path}/heard"; echo 3 4\n'
        f'read -r a; echo "$a" >> "{tmp_path}/heard"; echo 0.25; echo 0.75; echo 0.5; read -r a'
    )
    assert meteor([["a dog", "the ||| dog"], ["a cat"]], ["dog", ""]) == (0.5, [0.25, 0.75])
    heard = [line.rstrip() for line in (tmp_path / "heard").read_text().splitlines()]  # `read` trims
    assert heard == ["SCORE ||| a dog ||| the dog ||| dog", "SCORE ||| a cat |||", "EVAL ||| 1 2 ||| 3 4"]
    assert is_gone(pid_file)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "while :; do :; done",
            r"the PTB tokenizer was stopped: no result for 2 captions after 0\.5 s; use tokenizer='pyt",
        ),
        ("echo a dog", r"the PTB tokenizer gave 1 lines for 2 captions and ended with code 0, saying: nothing"),
        (
            "echo 'no such class' >&2; exit 1",
            r"gave 0 lines for 2 captions and ended with code 1, saying: no such class",
        ),
    ],
    ids=["hangs", "loses a line", "dies"],
)
def test_a_ptb_tokenizer_that_fails_says_so(fake_java: Any, script: str, message: str) -> None:
    pid_file = fake_java(script)
    with pytest.raises(ConfigurationError, match=message):
        ptb_tokenize(["a dog", "a cat"], timeout_s=0.5)
    assert is_gone(pid_file)


# What is refused


@pytest.mark.parametrize(
    ("references", "candidates", "options", "message"),
    [
        ({}, {}, {}, "there is nothing to score"),
        (
            {1: ["a"], 2: []},
            {1: "a", 2: "a"},
            {},
            "expected a list of references for each image; none for image ids 2$",
        ),
        ({1: "a dog"}, {1: "a"}, {}, "expected a list of references for each image; none for image ids 1$"),
        ({1: ["a"], 2: ["b"]}, {2: "b"}, {}, "expected a caption for each of 2 images; none for image ids 1; "),
        (
            {n: ["a"] for n in range(9)},
            {0: "a"},
            {},
            "expected a caption for each of 9 images; none for image ids 1, 2, 3, 4, 5 and 3 more; ",
        ),
        ({1: ["a"]}, {1: "a", 4: "b"}, {}, "captions of images that have no references: image ids 4; .*same split"),
        ({1: ["."], 2: [" "]}, {1: "a", 2: "a"}, {}, "none of the references of 2 images holds a word"),
        ({1: ["a"]}, {1: "a"}, {"metrics": ["spice"]}, "expected metrics out of bleu_1, .*; got 'spice'"),
        ({1: ["a"]}, {1: "a"}, {"metrics": "cider_d"}, "expected metrics out of .*; got 'cider_d'"),
        ({1: ["a"]}, {1: "a"}, {"metrics": []}, "expected metrics out of .*; got none"),
        ({1: ["a"]}, {1: "a"}, {"tokenizer": "nltk"}, "unknown tokenizer 'nltk'; expected auto, ptb or python"),
    ],
)
def test_what_cannot_be_scored_is_refused(references: Any, candidates: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        score_captions(references, candidates, **{"tokenizer": "python", **options})


def test_without_pycocoevalcap_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'raycap\[eval\]'"):
        score_captions(REFERENCES, CANDIDATES)


# What comes out


def test_scores_become_json() -> None:
    scores = score_captions(REFERENCES, CANDIDATES, tokenizer="python", metrics=["cider_d", "bleu_1"])
    assert json.loads(json.dumps(scores.to_dict())) == {
        "scores": {"bleu_1": scores.values["bleu_1"], "cider_d": scores.values["cider_d"]},
        "tokenizer": "python",
        "num_images": 4,
    }
    assert all(type(value) is float for image in scores.per_image.values() for value in image.values())


def test_the_table_prints_times_100() -> None:
    scores = Scores(
        values={"bleu_1": 0.5534, "cider_d": 0.664},
        per_image={},
        tokenizer="python",
        num_images=1000,
        unavailable=("meteor",),
    )
    output = io.StringIO()
    Console(file=output, width=100, color_system=None).print(scores_table(scores))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["BLEU-1", "METEOR", "CIDEr-D"] in lines
    assert ["55.3", "-", "66.4"] in lines
    assert "x100, 1000 images, tokenizer python (published scores use ptb, which needs Java)" in " ".join(
        output.getvalue().split()
    )
