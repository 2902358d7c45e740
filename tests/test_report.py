"""What report.html counts, and how it takes odd outputs."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycap.bulk.layout import RUN, Round
from raycap.bulk.report import REPORT, write_report
from raycap.bulk.sources.base import skip_message
from raycap.errors import ConfigurationError
from tests.report_outputs import NOW, Page, report, row, summary_of, table, write_output


def test_page_has_counts_source_model_and_rates(tmp_path: Path) -> None:
    rows = [row(f"{i}.jpg", size=1000) for i in range(7)] + [row(f"bad{i}.jpg", None) for i in range(25)]
    rows.append(row("notes.txt", None, status="skipped", error_code="not_an_image_name", error="a text file"))
    output = write_output(tmp_path / "out", rows, summary=summary_of(rows), num_files=3)
    location = write_report(output)
    assert location == str(tmp_path / "out" / REPORT)
    text = Page(location).text
    assert "Captioned 7 21% of 33" in text
    assert "Failed 25 76%" in text
    assert "Skipped 1 3.0%" in text
    assert "Images/s 12.3" in text
    assert "Source size 7.0 kB" in text
    for expected in ("s3://photos/2026", "tiny@1", "2026-03-01 12:31 UTC", "31 min"):
        assert expected in text
    assert "not finished" not in text and "add up" not in text


def test_failures_have_count_example_and_up_to_20_keys(tmp_path: Path) -> None:
    rows = [row(f"bad{i:02d}.jpg", None) for i in range(25)] + [row("empty.jpg", None, error_code="empty", error=None)]
    text = report(write_output(tmp_path / "out", rows, num_files=2)).text
    failures = text[text.index("Objects without a caption") :]
    assert "corrupt 25 bad00.jpg is damaged First 20 of the files" in failures
    assert len(re.findall(r"bad\d\d\.jpg(?! is)", failures)) == 20
    assert "empty 1 no message 1 file empty.jpg" in failures


def test_frequent_captions_and_words(tmp_path: Path) -> None:
    captions = ["a dog runs"] * 5 + ["The Dog's ball."] * 2 + ["a man in a hat"]
    rows = [row(f"{i}.jpg", caption) for i, caption in enumerate(captions)]
    text = report(write_output(tmp_path / "out", rows)).text
    assert "3 different captions. 12% of the images have one that no other image has." in text
    assert "a dog runs 5 images · 62% 0.jpg 1.jpg 2.jpg 3.jpg 4.jpg 5 in the gallery" in text
    assert "The Dog's ball. 2 images · 25% 5.jpg 6.jpg 2 in the gallery" in text
    assert "a man in a hat 1 images" not in text
    assert "9 different words" in text  # a, dog, runs, the, dog's, ball, man, in, hat
    assert "dog 5 runs 5 dog's 2 ball 2 man 1 hat 1" in text


def test_max_images(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out", [row(f"{i:03d}.jpg", f"dog {i}") for i in range(50)])
    assert report(output, max_images=10).source.count('class="tile"') == 10
    assert report(output, max_images=100).source.count('class="tile"') == 50
    assert report(output, max_images=0).source.count('class="tile"') == 0

    def keys(seed: int) -> list[str]:
        return re.findall(r"<bdi>(\d+\.jpg)</bdi>", report(output, max_images=10, seed=seed).source)

    assert keys(1) == keys(1) != keys(2)
    with pytest.raises(ConfigurationError, match="max_images"):
        write_report(output, max_images=-1)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: (path / "captions").mkdir(parents=True)])
def test_no_captions_is_a_configuration_error(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"out is not an output of raycap caption: no captions/ here"):
        write_report(str(tmp_path / "out"))
    assert not (tmp_path / "out" / REPORT).exists()


def test_foreign_and_damaged_parquet_are_configuration_errors(tmp_path: Path) -> None:
    output = Path(write_output(tmp_path / "out", [row("1.jpg")]))
    part = output / "captions/part-00000.parquet"
    pq.write_table(pa.table({"key": ["1.jpg"], "text": ["a dog"]}), part)
    with pytest.raises(ConfigurationError, match=r"part-00000\.parquet was not written by raycap: no column alternat"):
        write_report(str(output))
    part.write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigurationError, match=r"part-00000\.parquet is no readable Parquet file"):
        write_report(str(output))


def write_chunks(output: str, *, round_: int = 0, chunks: list[list[dict[str, Any]]], **run: Any) -> None:
    """Finished chunks of a round that goes on."""
    folder = Path(output) / Round(round_).chunks
    folder.mkdir(parents=True)
    for chunk, rows in enumerate(chunks):
        pq.write_table(table(rows), Path(output) / Round(round_).chunk(chunk))
    (Path(output) / RUN).write_text(json.dumps({"round": round_} | run))


def test_unfinished_run_says_so_and_shows_its_chunks(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out", [row("1.jpg", "a dog")])
    assert "This run has not finished" in report(output).text
    write_chunks(output, chunks=[[row("1.jpg", "a dog"), row("2.jpg", "a cat")]], source="s3://photos/unfinished")
    page = report(output)
    assert "This run has not finished" in page.text and "the 2 rows" in page.text
    assert "a cat" in page.text and "s3://photos/unfinished" in page.text


def test_of_many_finished_chunks_a_random_sample_is_read(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out", [])
    rows = [row(f"{i}.jpg", f"dog {i}", captioned_at=NOW + timedelta(seconds=i // 12)) for i in range(1200)]
    write_chunks(output, chunks=[[each] for each in rows])

    def drawn(page: Page) -> set[str]:
        return set(re.findall(r"<bdi>(\d+)\.jpg</bdi>", page.source))

    page = report(output)
    assert "a random sample: 1,000 of its 1,200 finished files. All counts are of the 1,000 rows in these." in page.text
    assert "Captioned 1,000" in page.text and "Estimated from the sample." in page.text
    assert "Median: 12" in page.text
    assert len(drawn(page)) == 200 and drawn(page) != drawn(report(output, seed=1))


def test_unfinished_later_round_leaves_the_captions_before_it(tmp_path: Path) -> None:
    rows = [row("1.jpg", "a dog")]
    output = write_output(tmp_path / "out", rows, summary=summary_of(rows, round=0))
    write_chunks(output, round_=1, chunks=[[row("1.jpg", "a cat")]])
    page = report(output)
    assert "A round of --update or --retry-failed has not finished." in page.text
    assert "a dog" in page.text and "a cat" not in page.text
    (tmp_path / "out/summary.json").write_text(json.dumps(summary_of(rows, round=1)))
    assert "not finished" not in report(output).text


def test_skipped_objects_are_apart_and_say_why(tmp_path: Path) -> None:
    rows = [row("1.jpg"), row("bad.jpg", None, error_code="not_found")]
    for code, count in {"folder_marker": 1, "old_version": 2, "archived": 3, "deleted": 4, "other_suffix": 5}.items():
        error = skip_message(code, "notes.txt")
        rows += [row(f"{i}.txt", None, status="skipped", error_code=code, error=error) for i in range(count)]
    text = report(write_output(tmp_path / "out", rows)).text
    failed, skipped = text.index("Tried, without success."), text.index("Not tried.")
    assert failed < text.index("not_found 1 bad.jpg is damaged") < skipped < text.index("other_suffix 5 .txt is not")
    assert "deleted 4 a delete marker: the object was deleted" in text
    assert "archived 3 it is in an archive storage class" in text
    assert "folder_marker 1 an empty object whose key ends in '/' marks a folder" in text


def test_sizes_that_are_not_known_are_said(tmp_path: Path) -> None:
    rows = [row("1.jpg", size=3000), row("2.jpg", size=1000), row("3.jpg", size=None)]
    assert (
        "Source size 4.0 kB 2.0 kB per object, of 2 with a known size"
        in report(write_output(tmp_path / "a", rows)).text
    )
    assert "Source size 4.0 kB 2.0 kB per object" in report(write_output(tmp_path / "b", rows[:2])).text
    assert "known size" not in report(write_output(tmp_path / "c", rows[:2])).text


def test_no_rows_at_all_and_no_captioned_row(tmp_path: Path) -> None:
    page = report(write_output(tmp_path / "none", [], summary=summary_of([])))
    assert "No image has a caption." in page.text and "None: every object has a caption." in page.text
    page = report(write_output(tmp_path / "bad", [row("1.jpg", None)]))
    assert "No captions yet." in page.text and "1.jpg is damaged" in page.text


def test_summary_that_contradicts_the_captions_is_pointed_out(tmp_path: Path) -> None:
    rows = [row("1.jpg")]
    page = report(write_output(tmp_path / "out", rows, summary=summary_of(rows, num_objects=5)))
    assert "The rows do not add up" in page.text
