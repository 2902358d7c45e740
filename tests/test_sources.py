"""What is to be captioned: rows of directories and of manifest files, and which of them are selected."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest

from raycap.bulk.config import Selection
from raycap.bulk.sources import Source, SourceRow, open_source, skip_message
from raycap.bulk.sources.base import skip_reason
from raycap.bulk.sources.formats import BATCH_ROWS
from raycap.bulk.sources.selection import glob_regex, selector
from raycap.errors import ConfigurationError, NotFoundError, StorageError
from raycap.images import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES
from raycap.storage import S3Options, Span

ODD_KEYS = [
    "a b/ leading and trailing .jpg ",
    "ünï/日本語/😀.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "a+b c%2B.jpg",
    "#1/a#b?c=d&e.jpg",
    "comma, \"quote\" 'and\ttab'.jpg",
    "new\nline\r\n.jpg",
    "k" * 1020 + ".jpg",
    "no suffix",
]
MANY = 2 * BATCH_ROWS + 3


def source_of(location: Path | str, **selection: Any) -> Source:
    return open_source(str(location), Selection(**selection), S3Options())


def rows_of(source: Source, num_spans: int = 1) -> list[SourceRow]:
    return [row for span in source.spans(num_spans) for row in source.rows(span)]


def texts_of(source: Source) -> list[str]:
    return [row.key for row in rows_of(source)]


# Writers of manifest files: a table of columns, in each format.

Table = dict[str, Sequence[Any]]


def write_parquet(path: Path, table: Table) -> None:
    pq.write_table(pa.table(table), path, row_group_size=1000)


def write_csv(path: Path, table: Table, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def write_jsonl(path: Path, table: Table) -> None:
    rows = (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_text(path: Path, table: Table) -> None:
    (addresses,) = table.values()
    path.write_bytes("".join(f"{address}\n" for address in addresses).encode())


def packed(write: Callable[[Path, Table], None]) -> Callable[[Path, Table], None]:
    def write_packed(path: Path, table: Table) -> None:
        write(path, table)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_packed


WRITERS: dict[str, Callable[[Path, Table], None]] = {
    "m.parquet": write_parquet,
    "m.csv": write_csv,
    "m.csv.gz": packed(write_csv),
    "m.tsv": lambda path, table: write_csv(path, table, "\t"),
    "m.jsonl": write_jsonl,
    "m.jsonl.gz": packed(write_jsonl),
}
LISTS = {"m.txt": write_text, "m.lst": write_text, "m.txt.gz": packed(write_text)}
ALL = {**WRITERS, **LISTS}


@pytest.fixture(params=WRITERS)
def table_file(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Table], Path]:
    """Writes a table as a manifest file of each kind that has columns."""

    def write(table: Table) -> Path:
        path = tmp_path / request.param
        WRITERS[request.param](path, table)
        return path

    return write


@pytest.fixture(params=ALL)
def any_file(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """Writes addresses as a manifest file of each kind."""

    def write(addresses: Sequence[str]) -> Path:
        path = tmp_path / request.param
        ALL[request.param](path, {"uri": addresses})
        return path

    return write


# Rows of manifest files


def test_columns_become_rows(table_file: Callable[[Table], Path]) -> None:
    path = table_file(
        {"note": ["x", "y"], "S3_URI": ["s3://bucket/1.jpg", "s3://c/d/2.jpg"], "ETag": ['"e1"', "e2"], "Size": [5, 0]}
    )
    assert rows_of(source_of(path)) == [
        SourceRow("s3://bucket/1.jpg", "s3://bucket/1.jpg", "e1", 5, None, "0:0"),
        SourceRow("s3://c/d/2.jpg", "s3://c/d/2.jpg", "e2", 0, None, "0:1"),
    ]


def test_bucket_and_key_make_the_address(table_file: Callable[[Table], Path]) -> None:
    path = table_file({"path": ["x", "y"], "Bucket": ["one", "two"], "Key": ["a/1.jpg", "/s3://2.jpg"]})
    rows = rows_of(source_of(path))
    assert [(row.uri, row.key) for row in rows] == [
        ("s3://one/a/1.jpg", "a/1.jpg"),
        ("s3://two//s3://2.jpg", "/s3://2.jpg"),
    ]


@pytest.mark.parametrize("column", ["uri", "URL", "s3_uri", "Path", "key", "file_name", "FileName"])
def test_names_of_the_address_column(table_file: Callable[[Table], Path], column: str) -> None:
    assert texts_of(source_of(table_file({"x": ["s3://no/no"], column: ["s3://bucket/k"]}))) == ["s3://bucket/k"]


def test_the_first_name_of_the_list_counts_not_the_first_column(table_file: Callable[[Table], Path]) -> None:
    assert texts_of(source_of(table_file({"file_name": ["1.jpg"], "uri": ["s3://bucket/k"]}))) == ["s3://bucket/k"]


def test_what_is_not_known_is_none(table_file: Callable[[Table], Path]) -> None:
    rows = rows_of(
        source_of(table_file({"uri": ["s3://bucket/1", "s3://bucket/2"], "size": [None, 7], "etag": [None, "e"]}))
    )
    assert [(row.size, row.etag) for row in rows] == [(None, ""), (7, "e")]


def test_addresses(any_file: Callable[[Sequence[str]], Path]) -> None:
    path = any_file(["s3://bucket/a/../k", "/data/x y.jpg", "file:///data/x%20y.jpg", "a/b.jpg", "./c.jpg", "../d.jpg"])
    folder = path.parent
    assert [row.uri for row in rows_of(source_of(path))] == [
        "s3://bucket/a/../k",
        "/data/x y.jpg",
        "/data/x y.jpg",
        f"{folder}/a/b.jpg",
        f"{folder}/c.jpg",
        f"{folder.parent}/d.jpg",
    ]


@pytest.mark.parametrize(
    ("root", "uris"),
    [
        ("s3://bucket/photos", ["s3://bucket/photos/a.jpg", "s3://bucket/photos/b.jpg", "s3://other/c.jpg", "/d.jpg"]),
        ("s3://bucket", ["s3://bucket/a.jpg", "s3://bucket/b.jpg", "s3://other/c.jpg", "/d.jpg"]),
        ("/", ["/a.jpg", "/b.jpg", "s3://other/c.jpg", "/d.jpg"]),
        ("/x/", ["/x/a.jpg", "/x/b.jpg", "s3://other/c.jpg", "/d.jpg"]),
    ],
)
def test_root_is_where_relative_addresses_start(tmp_path: Path, root: str, uris: list[str]) -> None:
    (tmp_path / "m.txt").write_text("a.jpg\n./b.jpg\ns3://other/c.jpg\n/d.jpg\n")
    assert [row.uri for row in rows_of(source_of(tmp_path / "m.txt", root=root))] == uris


def test_odd_keys_survive(any_file: Callable[[Sequence[str]], Path]) -> None:
    path = any_file(ODD_KEYS[:1])
    keys = [key for key in ODD_KEYS if path.name in WRITERS or "\n" not in key]
    assert len(keys) >= len(ODD_KEYS) - 1
    source = source_of(any_file(keys), root="s3://bucket/")
    assert [(row.key, row.uri) for row in rows_of(source)] == [(key, f"s3://bucket/{key}") for key in keys]


def test_objects_are_read_by_address_anywhere(tmp_path: Path) -> None:
    for key in ["images/a b.jpg", "images/ü%.jpg"]:
        path = tmp_path / key
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(key.encode())
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.txt").write_text("../images/a b.jpg\n../images/ü%.jpg\n", encoding="utf-8")
    source = source_of(tmp_path / "lists" / "m.txt")
    assert source.reads_by == "uri"
    reader = pickle.loads(pickle.dumps(source.reader))
    assert [reader.read(row.uri) for row in rows_of(source)] == [b"images/a b.jpg", "images/ü%.jpg".encode()]


def test_every_row_is_one_row_also_where_two_are_the_same(any_file: Callable[[Sequence[str]], Path]) -> None:
    assert texts_of(source_of(any_file(["s3://bucket/k", "s3://bucket/k"]))) == ["s3://bucket/k", "s3://bucket/k"]


def test_many_rows_in_any_number_of_spans(any_file: Callable[[Sequence[str]], Path]) -> None:
    path = any_file([f"s3://bucket/{number}" for number in range(MANY)])
    source = source_of(path)
    for num_spans in (1, 2, 3, 1000):
        spans = source.spans(num_spans)
        assert 1 <= len(spans) <= num_spans
        assert [row.key for span in spans for row in source.rows(span)] == [f"s3://bucket/{n}" for n in range(MANY)]
    assert (len(source.spans(3)) == 3) == (path.suffix == ".parquet")


def test_goes_on_after_any_position(any_file: Callable[[Sequence[str]], Path]) -> None:
    source = source_of(any_file([f"s3://bucket/{number}" for number in range(40)]), exclude=("*3",))
    assert_goes_on_anywhere(source)


def test_goes_on_across_batches_and_row_groups(any_file: Callable[[Sequence[str]], Path]) -> None:
    source = source_of(any_file([f"s3://bucket/{number}" for number in range(MANY)]))
    for span in source.spans(3):
        rows = list(source.rows(span))
        for place in (0, 999, 1000, 1001, BATCH_ROWS - 1, BATCH_ROWS, len(rows) - 2, len(rows) - 1):
            if place < len(rows):
                assert list(source.rows(span, after=rows[place].position)) == rows[place + 1 :]


def assert_goes_on_anywhere(source: Source, num_spans: int = 3) -> None:
    for span in source.spans(num_spans):
        all_rows = source.rows(span)
        rows, filtered_before = [], []
        for row in all_rows:
            rows.append(row)
            filtered_before.append(all_rows.num_filtered)
        for place, row in enumerate(rows):
            rest = source.rows(span, after=row.position, taken=place + 1)
            assert list(rest) == rows[place + 1 :]
            assert filtered_before[place] + rest.num_filtered == all_rows.num_filtered


# Text of all sorts


def test_lines(tmp_path: Path) -> None:
    text = "\ufeffs3://bucket/1\r\n\r\n   \n#no comment\n s3 \n\x0bform\x85feed\u2028\nlast without end"
    (tmp_path / "m.txt").write_bytes(text.encode())
    rows = rows_of(source_of(tmp_path / "m.txt", root="s3://root"))
    assert [row.key for row in rows] == [
        "s3://bucket/1",
        "#no comment",
        " s3 ",
        "\x0bform\x85feed\u2028",
        "last without end",
    ]
    assert [row.position for row in rows] == ["0:0", "0:3", "0:4", "0:5", "0:6"]
    assert_goes_on_anywhere(source_of(tmp_path / "m.txt", root="s3://root"))


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ("\ufeffkey\r\na.jpg\r\n\r\nb.jpg\r\n", ["a.jpg", "b.jpg"]),
        ("a.jpg\nb c.jpg", ["a.jpg", "b c.jpg"]),  # one column, no header
        ('"a,b.jpg"\n#c.jpg\n', ["a,b.jpg", "#c.jpg"]),
        ('size,key\n,"a\nb.jpg"\n3,c"d.jpg\n', ["a\nb.jpg", 'c"d.jpg']),
        ("key\n", []),
        ("", []),
    ],
)
def test_csv(tmp_path: Path, content: str, keys: list[str]) -> None:
    (tmp_path / "m.csv").write_bytes(content.encode())
    source = source_of(tmp_path / "m.csv")
    source.check()
    assert texts_of(source) == keys
    assert_goes_on_anywhere(source)


def test_json_lines_may_differ_in_their_columns(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"key": "a", "size": 3}\n\n{"note": [1, {}], "uri": "b"}\n{"bucket": "c", "key": "d"}'
    )
    rows = rows_of(source_of(tmp_path / "m.jsonl", root="/r"))
    assert [(row.uri, row.size, row.position) for row in rows] == [
        ("/r/a", 3, "0:0"),
        ("/r/b", None, "0:2"),
        ("s3://c/d", None, "0:3"),
    ]


def test_parquet_of_other_types(tmp_path: Path) -> None:
    table = {
        "uri": pa.array(["s3://bucket/1", "s3://bucket/2"]).dictionary_encode(),
        "etag": pa.array([b"e1", None], pa.binary()),
        "size": pa.array([5.0, float("nan")]),
    }
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    rows = rows_of(source_of(tmp_path / "m.parquet"))
    assert [row[:4] for row in rows] == [
        ("s3://bucket/1", "s3://bucket/1", "e1", 5),
        ("s3://bucket/2", "s3://bucket/2", "", None),
    ]


def test_odd_columns_do_no_harm(tmp_path: Path) -> None:
    columns = [pa.array(["s3://bucket/1"]), pa.array(["other"]), pa.array([{"path": "x"}])]
    pq.write_table(pa.table(columns, names=["uri", "uri", "image"]), tmp_path / "m.parquet")
    assert texts_of(source_of(tmp_path / "m.parquet")) == ["s3://bucket/1"]
    (tmp_path / "m.jsonl").write_text('{"key": "a", "storage_class": [], "intelligent_tiering_access_tier": 5}')
    assert [row.skip for row in rows_of(source_of(tmp_path / "m.jsonl"))] == [None]


# What is refused, with the file and the row


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.txt", "s3://bucket/1\n\nhttp://host/a?signature=SECRET\n", "m.txt, line 3: http:// addresses are not read"),
        ("m.txt", "https://host/a\n", "line 1: https:// addresses are not read; give s3://bucket/key"),
        ("m.txt", "s3://bucket\n", "line 1: expected s3://bucket/key, got 's3://bucket'"),
        ("m.txt", "s3://bucket/\n", "line 1: expected s3://bucket/key"),
        ("m.txt", "s3:///key\n", "line 1: expected s3://bucket/key"),
        ("m.txt", "S3:bucket/key\n", "line 1: expected s3://bucket/prefix"),
        ("m.txt", "gs://bucket/key\n", "line 1: gs:// locations are not supported"),
        ("m.txt", "file://host/key\n", "line 1: expected file:///absolute/path"),
        ("m.txt", b"a\n\xff\xfea\0\n", "line 2: expected UTF-8 text, got the byte 0xff"),
        ("m.csv", b"key\n\xe9.jpg\n", "line 2: expected UTF-8 text, got the byte 0xe9"),
        ("m.csv", "key,size\na,1\nb\n", "m.csv, row 2: expected 2 fields, got 1"),
        ("m.csv", "a.jpg\nb,c.jpg\n", "m.csv, row 2: expected 1 fields, got 2"),
        ("m.csv", "key,size\na,\nb,many\n", "m.csv, row 2: expected a size in bytes, got 'many'"),
        ("m.csv", "key,size\na,-1\n", "row 1: expected a size in bytes, got '-1'"),
        ("m.csv", "key,size\n,1\n", "row 1: expected an address, got none"),
        ("m.csv", "bucket,key\n,a\n", "row 1: expected the name of a bucket, got ''"),
        ("m.csv", "key,is_latest\na,maybe\n", "row 1: expected true or false, got 'maybe'"),
        ("m.csv", 'key,size\n"a,1\nb,2\n', "m.csv, near line 3: not well-formed"),
        ("m.csv", "name,bucket\na,b\n", "m.csv: expected a column uri, url, s3_uri, path, key, file_name or filename"),
        ("m.csv.gz", gzip.compress(b"key\na\n", mtime=0)[:-9], "m.csv.gz: cannot be read"),
        ("m.parquet", b"PAR1 is not enough", "m.parquet: cannot be read as the kind of file that its name says"),
        ("m.jsonl", '{"key": "a"}\n{"size": 1}\n', "m.jsonl, line 2: expected a column uri"),
        ("m.jsonl", '{"key": "a"}\n["b"]\n', "m.jsonl, line 2: expected a JSON object, got '[\"b\"]'"),
        ("m.jsonl", '{"key": "a"\n', "m.jsonl, line 1: expected a JSON object, got none"),
        ("m.jsonl", "[" * 100_000, "m.jsonl, line 1: expected a JSON object, got none"),
        ("m.jsonl", '{"key": 7}\n', "line 1: expected an address, got 7"),
        ("m.jsonl", '{"key": "a", "size": true}\n', "line 1: expected a size in bytes, got True"),
        ("m.jsonl", '{"key": "a", "size": 1e30}\n', "line 1: expected a size in bytes, got 1e+30"),
        ("m.jsonl", f'{{"key": "a", "size": {2**63}}}\n', "line 1: expected a size in bytes, got 9223372036854775808"),
        ("m.csv", f"key,size\na,{'9' * 5000}\n", "row 1: expected a size in bytes, got '999"),
        ("m.jsonl", '{"key": "a", "etag": "\\ud800"}\n', "line 1: expected an etag of ASCII characters"),
        ("m.jsonl", '{"key": "a", "etag": 7}\n', "line 1: expected an etag, got 7"),
        ("m.jsonl", '{"key": "\\ud800"}\n', "line 1: "),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigurationError) as caught:
        rows_of(source_of(tmp_path / name))
    assert said in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_relative_addresses_stay_below_an_s3_root(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("../a.jpg\n")
    with pytest.raises(ConfigurationError, match=r"line 1: '\.\./a\.jpg' leads out of s3://bucket/p/"):
        rows_of(source_of(tmp_path / "m.txt", root="s3://bucket/p"))


def test_check_finds_what_is_wrong_before_all_is_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no file or directory .*m\.csv"):
        source_of(tmp_path / "m.csv").check()
    (tmp_path / "m.csv").write_text("name,bucket\na,b\n")
    with pytest.raises(ConfigurationError, match="expected a column"):
        source_of(tmp_path / "m.csv").check()
    (tmp_path / "m.csv").write_text("name,url\na,http://b\n")
    with pytest.raises(ConfigurationError, match="row 1: http:// addresses"):
        source_of(tmp_path / "m.csv").check()
    (tmp_path / "m.csv").write_text("name,url\na,s3://bucket/c\n" + "a\n" * 2 * BATCH_ROWS)
    with pytest.raises(ConfigurationError, match="row 2: expected 2 fields"):
        source_of(tmp_path / "m.csv").check()


def test_goes_on_with_the_same_file_alone(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("a.jpg\nb.jpg\n")
    (span,) = source_of(tmp_path / "m.txt").spans(1)
    (tmp_path / "m.txt").write_text("0.jpg\na.jpg\nb.jpg\n")
    with pytest.raises(ConfigurationError, match="was changed after the listing"):
        list(source_of(tmp_path / "m.txt").rows(span, after="0:0"))


# Directories


def make(folder: Path, *keys: str) -> Path:
    for key in keys:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    return folder


def test_a_directory_is_its_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "photos.csv", "a.jpg", "b/c d.png", "notes.txt")
    source = source_of(folder)
    source.check()
    assert source.location == str(folder)
    assert source.reads_by == "key"
    rows = rows_of(source, 8)
    assert [(row.key, row.uri, row.size, row.skip) for row in rows] == [
        ("a.jpg", f"{folder}/a.jpg", 5, None),
        ("b/c d.png", f"{folder}/b/c d.png", 9, None),
        ("notes.txt", f"{folder}/notes.txt", 9, "other_suffix"),
    ]
    assert all(row.etag for row in rows)
    assert source.reader.read("b/c d.png") == b"b/c d.png"


def test_a_directory_goes_on_after_any_key(tmp_path: Path) -> None:
    make(tmp_path, *(f"{folder}{name}.jpg" for folder in ("", "a/", "a-b/", "c/d/") for name in "0x9é"))
    assert_goes_on_anywhere(source_of(tmp_path, exclude=("x*",)))


def test_an_image_file_is_a_source(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    assert texts_of(source_of(tmp_path / "a.jpg")) == ["a.jpg"]


def test_files_left_out_and_files_skipped(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.txt", "c.png")
    source = source_of(tmp_path, include=("*.jpg", "*.txt"))
    rows = source.rows(source.spans(1)[0])
    assert [(row.key, row.skip) for row in rows] == [("a.jpg", None), ("b.txt", "other_suffix")]
    assert rows.num_filtered == 1
    assert [row.skip for row in rows_of(source_of(tmp_path, all_files=True))] == [None, None, None]


def test_a_directory_of_parquet_files_is_no_manifest(tmp_path: Path) -> None:
    make(tmp_path, "part-0.parquet", "part-1.parquet")
    with pytest.raises(ConfigurationError, match="expected images, found Parquet files; a manifest is a single file"):
        source_of(tmp_path).check()
    make(tmp_path, "a.jpg")
    source_of(tmp_path).check()


def test_root_is_for_manifest_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--root is for manifest files"):
        source_of(tmp_path, root="/data")


# Why an object is not tried


def test_other_suffixes_are_those_that_no_image_has() -> None:
    suffixes = [
        "",
        ".",
        ".txt",
        ".TXT",
        ".jpg",
        ".JPeG",
        ".tar.gz",
        ".123",
        ".1a",
        ".toolongone",
        ".mp4 ",
        ".é",
        ".h.i",
    ]
    suffixes += IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES
    for key in [
        f"{stem}{suffix}{end}" for suffix in suffixes for stem in ("", "a", "d.txt/a", "d/") for end in ("", "/")
    ]:
        suffix = PurePosixPath(key).suffix.lower()
        is_name = 2 <= len(suffix) <= 8 and suffix[1:].isalnum() and not suffix[1:].isdigit()
        is_other = is_name and suffix not in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES
        assert skip_reason(key, 1, all_files=False) == ("other_suffix" if is_other else None), key
        assert skip_reason(key, 1, all_files=True) is None


@pytest.mark.parametrize(
    ("key", "size", "told", "code"),
    [
        ("a/", 0, {}, "folder_marker"),
        ("a/", 1, {}, None),
        ("a/", None, {}, None),
        ("a.jpg", 1, {"storage_class": "GLACIER"}, "archived"),
        ("a.jpg", 1, {"storage_class": "DEEP_ARCHIVE"}, "archived"),
        ("a.jpg", 1, {"storage_class": "GLACIER_IR"}, None),  # can be read at once
        ("a.jpg", 1, {"storage_class": "INTELLIGENT_TIERING"}, None),
        ("a.jpg", 1, {"storage_class": "INTELLIGENT_TIERING", "access_tier": "DEEP_ARCHIVE"}, "archived"),
        ("a.jpg", 1, {"storage_class": "INTELLIGENT_TIERING", "access_tier": "Archive Access"}, "archived"),
        ("a.jpg", 1, {"storage_class": "INTELLIGENT_TIERING", "access_tier": "ARCHIVE_INSTANT_ACCESS"}, None),
        ("a.txt", 1, {"storage_class": "GLACIER"}, "other_suffix"),  # nobody is to restore it
        ("a.jpg", 1, {"is_old_version": True}, "old_version"),
        ("a.jpg", None, {"is_old_version": True, "is_deleted": True}, "deleted"),
    ],
)
def test_reasons_to_skip(key: str, size: int | None, told: dict[str, Any], code: str | None) -> None:
    assert skip_reason(key, size, all_files=False, **told) == code
    assert code is None or len(skip_message(code, key)) > 20


def test_the_suffix_is_said() -> None:
    assert (
        skip_message("other_suffix", "a/b.MP4") == ".MP4 is not the suffix of an image; --all-files tries every object"
    )


def test_what_a_manifest_file_tells_of_an_object(table_file: Callable[[Table], Path]) -> None:
    path = table_file(
        {
            "key": ["1", "2", "3", "4", "5"],
            "storage_class": ["STANDARD", "GLACIER", None, "INTELLIGENT_TIERING", None],
            "intelligent_tiering_access_tier": [None, None, None, "ARCHIVE", None],
            "is_latest": [True, None, False, True, False],
            "is_delete_marker": [False, None, False, None, True],
        }
    )
    assert [row.skip for row in rows_of(source_of(path))] == [None, "archived", "old_version", "archived", "deleted"]


# Selection


def naive_match(pattern: str, text: str) -> bool:
    """`*` and `?` stop at `/`, `**` does not; `**/` may be nothing where a part of the pattern begins."""
    if not pattern:
        return not text
    if pattern.startswith("**/"):
        return naive_match(pattern[3:], text) or any(
            text[place] == "/" and naive_match(pattern[3:], text[place + 1 :]) for place in range(len(text))
        )
    if pattern.startswith("**"):
        return any(naive_match(pattern[2:], text[place:]) for place in range(len(text) + 1))
    if pattern.startswith("*"):
        stop = text.find("/") if "/" in text else len(text)
        return any(naive_match(pattern[1:], text[place:]) for place in range(stop + 1))
    first_fits = bool(text) and (text[0] == pattern[0] or (pattern[0] == "?" and text[0] != "/"))
    return first_fits and naive_match(pattern[1:], text[1:])


KEYS = [
    "",
    "/",
    "a",
    "b",
    "ab",
    "a/",
    "/a",
    "a/b",
    "b/a",
    "a/b/a",
    "ab/ab",
    "aa/b",
    "a//b",
    "a\nb",
    "a\n/b",
    "a.b",
    "A",
]
PATTERNS = [
    *("*", "**", "?", "??", "a*", "*b", "a?b", "a.b", "a", "*.*", "ab", "A", "\n", "a\nb", "**b"),
    *("a/*", "*/b", "*/*", "a/**", "**/b", "**/a", "a/**/b", "**/*", "**/a/*", "/a", "*/", "a//b", "?/?", "a/**/**/a"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_agree_with_a_plain_twin(pattern: str) -> None:
    regex = glob_regex([pattern])
    assert regex is not None
    for key in KEYS:
        subject = key if "/" in pattern else key.rpartition("/")[2]
        assert (regex.fullmatch(key) is not None) == naive_match(pattern, subject), key


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*.jp[e]g", ["a.jpeg", "x/y/a.jpeg"], ["a.jpg", "a.jpeg/b"]),
        ("img[0-9][!0-9].jpg", ["img1a.jpg"], ["img11.jpg", "imga1.jpg", "img1/.jpg"]),
        ("[]x]", ["]", "x"], ["[]x]"]),
        ("[a&&b^!-]", ["&", "^", "!", "-", "a"], ["c"]),
        ("[x", ["[x"], ["x"]),
        ("a[!b]c/d", ["axc/d"], ["abc/d", "a/c/d"]),
        ("(a|b)+.$", ["(a|b)+.$"], ["aa.$", "a"]),
        ("2024/**/*.jpg", ["2024/a.jpg", "2024/1/2/a.jpg"], ["2024a.jpg", "x/2024/a.jpg", "2024/a.png"]),
        ("*.jpg", ["a.jpg", "x/a.jpg", " .jpg", "ü\n.jpg"], ["a.jpg ", "a.JPG", "a.jpg/b"]),
    ],
)
def test_globs_by_example(pattern: str, matching: list[str], others: list[str]) -> None:
    takes = selector(Selection(include=(pattern,)))
    assert [key for key in [*matching, *others] if takes(key, None)] == matching


@pytest.mark.parametrize("pattern", ["", "[z-a].jpg"])
def test_patterns_that_are_none_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigurationError, match="glob pattern"):
        source_of(tmp_path, exclude=(pattern,))


def test_included_by_any_and_excluded_by_any() -> None:
    takes = selector(Selection(include=("*.jpg", "a/*"), exclude=("b*", "a/x/**", "**/no.jpg")))
    keys = ["1.jpg", "1.png", "a/1.png", "b1.jpg", "a/b1", "a/x/1.jpg", "no.jpg", "c/no.jpg"]
    assert [key for key in keys if takes(key, None)] == ["1.jpg", "a/1.png"]


def test_sizes_and_those_not_known() -> None:
    takes = selector(Selection(min_size=2, max_size=4))
    assert [size for size in (None, 0, 1, 2, 3, 4, 5) if takes("a", size)] == [None, 2, 3, 4]


def test_a_sample_is_a_share_that_does_not_depend_on_the_order() -> None:
    keys = [f"photos/{number}.jpg" for number in range(20_000)]

    def chosen(**selection: Any) -> set[str]:
        takes = selector(Selection(**selection))
        return {key for key in reversed(keys) if takes(key, 1)}

    tenth = chosen(sample=0.1)
    assert 1800 < len(tenth) < 2200
    assert chosen(sample=0.1) == tenth
    assert tenth < chosen(sample=0.2)  # a larger sample goes on from a smaller one
    other = chosen(sample=0.1, seed=1)
    assert 100 < len(tenth & other) < 300  # independent: a tenth of a tenth
    assert chosen(sample=1.0) == set(keys)
    # The same in every version and on every machine: a run that is repeated must choose the same.
    assert [number for number, key in enumerate(keys[:100]) if key in tenth] == [7, 39, 52, 57, 70, 82, 85]


def test_a_limit_takes_the_first_of_what_is_left(any_file: Callable[[Sequence[str]], Path]) -> None:
    source = source_of(any_file([f"s3://bucket/{number}" for number in range(MANY)]), exclude=("*[0-4]",), limit=7)
    (span,) = source.spans(16)
    rows = source.rows(span)
    taken = list(rows)
    assert [row.key for row in taken] == ["s3://bucket/5", *(f"s3://bucket/{n}" for n in (6, 7, 8, 9, 15, 16))]
    assert rows.num_filtered == 10
    for place, row in enumerate(taken):
        assert list(source.rows(span, after=row.position, taken=place + 1)) == taken[place + 1 :]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("key\n" + "a.jpg\n" * BATCH_ROWS + "wrong,row\n")
    assert len(rows_of(source_of(tmp_path / "m.csv", limit=BATCH_ROWS))) == BATCH_ROWS
    make(tmp_path / "dir", "a.jpg", "b.jpg", "c.jpg")
    assert texts_of(source_of(tmp_path / "dir", limit=2)) == ["a.jpg", "b.jpg"]
    assert source_of(tmp_path / "dir", limit=2).spans(8) == [Span()]


def test_rows_are_streamed(tmp_path: Path) -> None:
    """The first rows are there before what follows is read."""
    (tmp_path / "m.csv").write_text("key\n" + "a.jpg\n" * 3 * BATCH_ROWS + "wrong,row\n")
    source = source_of(tmp_path / "m.csv")
    rows = source.rows(source.spans(1)[0])
    assert [next(rows).position for _ in range(2)] == ["0:0", "0:1"]
    with pytest.raises(ConfigurationError, match=f"row {3 * BATCH_ROWS + 1}: expected 1 fields"):
        list(rows)


# S3 Inventory, copied to this machine

INVENTORY_COLUMNS = {
    "bucket": "Bucket",
    "key": "Key",
    "version_id": "VersionId",
    "is_latest": "IsLatest",
    "is_delete_marker": "IsDeleteMarker",
    "size": "Size",
    "e_tag": "ETag",
    "storage_class": "StorageClass",
    "intelligent_tiering_access_tier": "IntelligentTieringAccessTier",
}
KINDS = ("CSV", "Parquet", "ORC")


def inventory_table(keys: Sequence[str], **columns: Any) -> dict[str, list[Any]]:
    constants = {
        "bucket": "photos",
        "version_id": "v1",
        "is_latest": True,
        "is_delete_marker": False,
        "size": 5,
        "e_tag": "e",
        "storage_class": "STANDARD",
        "intelligent_tiering_access_tier": None,
    }
    table = {name: [value] * len(keys) for name, value in constants.items()} | {"key": list(keys)} | columns
    return {name: table[name] for name in INVENTORY_COLUMNS}


def inventory_bytes(kind: str, table: dict[str, list[Any]]) -> bytes:
    if kind == "CSV":
        texts = {True: "true", False: "false", None: ""}
        columns = table | {"key": [quote_plus(key, safe="/") for key in table["key"]]}
        rows = zip(*columns.values(), strict=True)
        return gzip.compress(
            "".join(
                ",".join(f'"{texts[value] if type(value) in (bool, type(None)) else value}"' for value in row) + "\n"
                for row in rows
            ).encode()
        )
    sink = pa.BufferOutputStream()
    nothing: Any = pa.array([None] * len(table["key"]), pa.string())
    arrow = pa.table({name: values if any(values) else nothing for name, values in table.items()})
    if kind == "Parquet":
        pq.write_table(arrow, sink)
    else:
        orc.write_table(arrow, sink)
    return bytes(sink.getvalue())


def write_inventory(folder: Path, kind: str, *tables: dict[str, list[Any]], **changes: Any) -> Path:
    """`folder/2026-01-01T00-00Z/manifest.json` and `folder/data/...`; its path."""
    schemas = {"CSV": ", ".join(INVENTORY_COLUMNS.values()), "Parquet": "message s3.inventory {}", "ORC": "struct<>"}
    files = []
    for number, table in enumerate(tables):
        data, name = inventory_bytes(kind, table), f"{number}.{kind.lower()}"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(data)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        files.append({"key": f"inventory/photos/daily/data/{name}", "size": len(data), "MD5checksum": md5})
    manifest = {
        "sourceBucket": "photos",
        "destinationBucket": "arn:aws:s3:::reports",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": kind,
        "fileSchema": schemas[kind],
        "files": files,
    }
    path = folder / "2026-01-01T00-00Z" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest | changes))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_inventory(tmp_path: Path, kind: str) -> None:
    second = inventory_table(
        ["v.jpg", "v.jpg", "d.jpg", "g.jpg", "t.jpg", "folder/"],
        is_latest=[True, False, True, True, True, True],
        is_delete_marker=[False, False, True, False, False, False],
        size=[5, 5, None, 5, 5, 0],
        storage_class=["STANDARD", "STANDARD", None, "GLACIER", "INTELLIGENT_TIERING", "STANDARD"],
        intelligent_tiering_access_tier=[None, None, None, None, "ARCHIVE", None],
    )
    source = source_of(write_inventory(tmp_path, kind, inventory_table(ODD_KEYS), second))
    source.check()
    rows = rows_of(source)
    assert [(row.uri, row.key) for row in rows[: len(ODD_KEYS)]] == [(f"s3://photos/{key}", key) for key in ODD_KEYS]
    assert {row[2:5] for row in rows[: len(ODD_KEYS)]} == {("e", 5, None)}
    assert [row.skip for row in rows[len(ODD_KEYS) :]] == [
        None, "old_version", "deleted", "archived", "archived", "folder_marker",
    ]  # fmt: skip
    assert [row.size for row in rows[-4:]] == [None, 5, 5, 0]
    assert [row.position for row in rows[-7:-5]] == ["0:9", "1:0"]


@pytest.mark.parametrize("kind", KINDS)
def test_inventory_in_any_number_of_spans(tmp_path: Path, kind: str) -> None:
    tables = [inventory_table([f"{number}/{each}.jpg" for each in range(3)]) for number in range(5)]
    source = source_of(write_inventory(tmp_path, kind, *tables), exclude=("1.jpg",))
    keys = [f"{number}/{each}.jpg" for number in range(5) for each in (0, 2)]
    for num_spans, expected in ((1, 1), (2, 2), (3, 3), (5, 5), (64, 5)):
        assert len(source.spans(num_spans)) == expected
        assert [row.key for row in rows_of(source, num_spans)] == keys
        assert_goes_on_anywhere(source, num_spans)


@pytest.mark.parametrize("kind", KINDS)
def test_large_inventory_goes_on(tmp_path: Path, kind: str) -> None:
    source = source_of(write_inventory(tmp_path, kind, inventory_table([f"{n}.jpg" for n in range(MANY)])))
    (span,) = source.spans(4)
    rows = list(source.rows(span))
    assert [row.key for row in rows] == [f"{n}.jpg" for n in range(MANY)]
    for place in (0, BATCH_ROWS - 1, BATCH_ROWS, MANY - 1):
        assert list(source.rows(span, after=rows[place].position)) == rows[place + 1 :]


def test_inventory_with_a_changed_file_is_refused(tmp_path: Path) -> None:
    source = source_of(write_inventory(tmp_path, "CSV", inventory_table(["a.jpg"])))
    (tmp_path / "data" / "0.csv").write_bytes(inventory_bytes("CSV", inventory_table(["b.jpg"])))
    with pytest.raises(StorageError, match=r"0\.csv: expected a file with the MD5 [0-9a-f]{32}, got [0-9a-f]{32}"):
        rows_of(source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": None}, "expected the manifest.json of an S3 Inventory, an object with sourceBucket"),
        ({"files": [{"size": 1}]}, "expected the manifest.json of an S3 Inventory"),
        ({"sourceBucket": 3}, "expected the manifest.json of an S3 Inventory"),
        ({"fileFormat": "Avro"}, "expected data files in CSV, Parquet or ORC, got 'Avro'"),
        ({"fileSchema": "Bucket, Size"}, "expected a column uri"),
    ],
)
def test_inventory_that_is_none(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write_inventory(tmp_path, "CSV", inventory_table(["a.jpg"]), **changes)
    with pytest.raises(ConfigurationError) as caught:
        rows_of(source_of(path))
    assert said in str(caught.value)


def test_json_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"expected the manifest\.json of an S3 Inventory, .* got no JSON"):
        source_of(tmp_path / "manifest.json").check()
